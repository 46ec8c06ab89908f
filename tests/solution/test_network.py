"""Networks and weights: BatchNorm folding is exact, loading is strict, damaged files are never survived."""

import ast
import copy
import pickle

import numpy as np
import pytest
import torch
from support import PROJECT, TINY_ARCH, model_content, random_network, stored_member, write_model
from torch import nn

import solution


@pytest.fixture(scope="module")
def content() -> dict:
    """Content of a good model file; change copies of it."""
    return model_content()


@pytest.fixture
def load(tmp_path, content):
    """Return a function that applies a change to a good model's content and loads the changed file."""

    def load_changed(change):
        changed = copy.deepcopy(content)
        change(changed)
        torch.save(changed, tmp_path / "model.pth")
        return solution.load_model(tmp_path / "model.pth")

    return load_changed


# --- Networks -------------------------------------------------------------------------------------


def test_merging_batchnorms_keeps_the_logits():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x))

    network, x = Small(), torch.randn(2, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    network.train()(x)
    network.eval().requires_grad_(False)
    before = network(x)
    solution.merge_batchnorms(network, [["conv", "norm"]])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(x), before, atol=1e-5, rtol=1e-5)


def test_sizes_are_the_tasks_whatever_the_file_says():
    network = solution.build_network({"name": "Unet", "args": {**TINY_ARCH["args"], "classes": 7, "in_channels": 3}})
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 5, 32, 32)).shape == (1, 1, 32, 32)


def test_unknown_networks_are_named():
    with pytest.raises(solution.InputError, match="'Transformer' is not among Unet"):
        solution.build_network({"name": "Transformer"})


# --- Strict loading -------------------------------------------------------------------------------


def test_loading_reports_everything_that_does_not_fit_at_once():
    network = random_network(seed=0)
    state = dict(network.state_dict())
    names = [name for name in state if name.endswith("conv.weight") or name.endswith("0.weight")]
    del state[names[0]], state[names[1]]
    state["extra.weight"] = torch.zeros(1)
    state[names[2]] = torch.zeros(3, 3)
    with pytest.raises(solution.InputError) as caught:
        solution.load_state(network, state, "model.pth, member 3")
    message = str(caught.value)
    assert message.startswith("model.pth, member 3: ")
    assert all(name in message for name in (*names[:3], "extra.weight"))
    assert "Missing" in message and "Unexpected" in message and "size mismatch" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value):
    state = dict(random_network(seed=0).state_dict())
    state["segmentation_head.0.bias"] = torch.full_like(state["segmentation_head.0.bias"], value)
    with pytest.raises(solution.InputError, match="not finite: segmentation_head.0.bias"):
        solution.load_state(random_network(seed=1), state, "model.pth")


def test_a_model_file_gives_back_what_was_stored(tmp_path):
    path = write_model(tmp_path / "model.pth", member_weights=(1.0, 3.0))
    model = solution.load_model(path)
    assert [member.weight for member in model.members] == [1.0, 3.0]
    assert isinstance(model.kind.network, solution.KindNet)
    x = torch.randn(1, 5, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for seed, member in enumerate(model.members):
            stored = random_network(seed=seed)
            stored.load_state_dict({k: v.float() for k, v in stored_member(seed=seed)["state_dict"].items()})
            assert (stored(x) - member.network(x)).abs().max() < 1e-4
            assert not member.network.training
            assert {weight.dtype for weight in member.network.parameters()} == {torch.float32}


def test_float16_storage_hardly_changes_the_classes(tmp_path):
    model = solution.load_model(write_model(tmp_path / "model.pth"))
    x = torch.randn(1, 5, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        same = (random_network(seed=0)(x) > 0) == (model.members[0].network(x) > 0)
    assert same.float().mean() > 0.99


# --- Files that must not be survived --------------------------------------------------------------


def break_member(key, value):
    return lambda content: content["members"][0].__setitem__(key, value)


CHANGES = {
    "another format": (lambda c: c.update(format="other/2"), "format 'other/2', expected 'glacier-kit/3'"),
    "no format": (lambda c: c.pop("format"), "format 'none'"),
    "no members": (lambda c: c.update(members=[]), "0 members; pack it again"),
    "no postprocess": (lambda c: c.pop("postprocess"), "'postprocess'; pack it again"),
    "unknown step": (lambda c: c["postprocess"].update(magic=1), "magic.*pack it again"),
    "a pass that does not exist": (lambda c: c.update(passes=[[0, 6]]), "passes.*pack it again"),
    "member without weights": (lambda c: c["members"][0].pop("state_dict"), "state_dict.*pack it again"),
    "member without arch": (lambda c: c["members"][0].pop("arch"), "arch.*pack it again"),
    "member without statistics": (
        lambda c: c["members"][0].pop("normalization"),
        "normalization.*pack it again",
    ),
    "statistics of four bands": (
        break_member("normalization", {"mean": [0.0] * 4, "std": [1.0] * 4}),
        "normalization.*expected mean and std of 5 bands",
    ),
    "statistics without std": (break_member("normalization", {"mean": [0.0] * 5}), "std.*pack it again"),
    "unknown encoder": (break_member("arch", {"name": "Unet", "args": {"encoder_name": "vit-9"}}), "vit-9"),
    "unknown argument": (
        break_member("arch", {"name": "Unet", "args": {"depth": 9}}),
        "depth.*pack it again",
    ),
    "impossible decoder": (
        break_member("arch", {"name": "Unet", "args": {**TINY_ARCH["args"], "decoder_channels": [8]}}),
        "pack it again",
    ),
    "members that are text": (lambda c: c.update(members="five"), "pack it again"),
    "weight that is text": (break_member("weight", "much"), "much.*pack it again"),
    "weights of another encoder": (
        break_member("arch", {"name": "Unet", "args": {"encoder_name": "resnet18"}}),
        "member 0: weights do not fit.*Missing",
    ),
    "CRF without its strengths": (
        lambda c: c["postprocess"].update(crf={"iterations": 5}),
        "Crf.*pack it again",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_incomplete_model_files_are_refused(load, tmp_path, change):
    apply, expected = CHANGES[change]
    with pytest.raises(solution.InputError, match=expected) as caught:
        load(apply)
    assert str(tmp_path / "model.pth") in str(caught.value) or "unknown" in str(caught.value)


def test_a_good_file_loads(load):
    assert len(load(lambda content: None).members) == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_model_files_are_refused(tmp_path, content, share):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(solution.InputError, match=r"model\.pth: damaged.*\d+ bytes.*copy it again"):
        solution.load_model(path)


def test_flipped_bytes_are_refused(tmp_path, content):
    """A torch file is a zip archive whose checksums cover every tensor."""
    path = tmp_path / "model.pth"
    torch.save(content, path)
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 64] = bytes(byte ^ 0xFF for byte in damaged[middle : middle + 64])
    path.write_bytes(bytes(damaged))
    with pytest.raises(solution.InputError, match="model.pth"):
        solution.load_model(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(solution.InputError, match="model.pth: damaged or no weights file"):
        solution.load_model(path)
    torch.save(random_network().state_dict(), path)
    with pytest.raises(solution.InputError, match="format 'none', expected 'glacier-kit/3'"):
        solution.load_model(path)
    torch.save([1, 2, 3], path)
    with pytest.raises(solution.InputError, match="format 'list'"):
        solution.load_model(path)


class Payload:
    """Runs code when a careless reader unpickles it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_code_in_a_model_file_does_not_run(tmp_path):
    path, mark = tmp_path / "model.pth", tmp_path / "ran"
    torch.save({"format": solution.MODEL_FORMAT, "members": Payload(mark)}, path)
    with pytest.raises(solution.InputError, match="model.pth: damaged or no weights file"):
        solution.load_model(path)
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(solution.InputError, match="model.pth: damaged or no weights file"):
        solution.load_model(path)
    assert not mark.exists()


def test_every_load_is_weights_only():
    """Checked in the source: torch before 2.6 unpickles anything by default."""
    tree = ast.parse((PROJECT / "solution.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) == "torch.load"]
    assert loads
    for call in loads:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords["weights_only"] == "True" and keywords["map_location"] == "'cpu'"


# --- Where the weights are ------------------------------------------------------------------------


def test_weights_are_searched_in_the_documented_places(tmp_path, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home / "weights", work / "weights"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(solution, "__file__", str(home / "solution.py"))
    monkeypatch.chdir(work)
    with pytest.raises(solution.InputError, match="no weights: looked for .*home.*work.*--weights"):
        solution.find_weights()
    places = [home, home / "weights", work, work / "weights"]
    for place in reversed(places):  # each is found, and goes before those after it
        (place / "model.pth").write_bytes(b"x")
        assert solution.find_weights() == place / "model.pth"
    (tmp_path / "mine.pth").write_bytes(b"x")
    assert solution.find_weights(tmp_path / "mine.pth") == tmp_path / "mine.pth"
    with pytest.raises(solution.InputError, match="no weights: looked for .*absent.pth"):
        solution.find_weights(tmp_path / "absent.pth")


def test_two_tiny_networks_differ_and_give_both_answers():
    x = torch.randn(1, 5, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        first, second = ((random_network(seed=seed)(x) > 0).numpy() for seed in (0, 1))
    assert set(np.unique(first)) == {False, True}
    assert (first != second).mean() > 0.2


def test_loading_leaves_the_number_of_threads_to_the_caller(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        solution.load_model(write_model(tmp_path / "model.pth"))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
