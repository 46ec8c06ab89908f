"""From a finished run to model.pth: the same answers, float16, BatchNorms merged, passes, limits, the card."""

import copy
import hashlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from support import TINY_ARCH, random_network
from train_helpers import SMOKE, smoke_config

import solution
from prep.store import TileStore
from train.__main__ import main
from train.config import change_config, load_config, to_text
from train.pack import batchnorm_pairs, mergeable_pairs, pack
from train.run import RunError, read_fold


@pytest.fixture(scope="module")
def packed(smoke_run, store, tmp_path_factory):
    """Return model.pth of the smoke run, made by the commands `score` and `pack`."""
    out = tmp_path_factory.mktemp("weights") / "model.pth"
    common = ["--recipe", str(SMOKE), "--run", str(smoke_run), f"data.store={store}"]
    assert main(["score", *common]) == 0
    assert main(["pack", *common, "--out", str(out), "--time-budget", "30"]) == 0
    return out


def test_the_packed_model_answers_as_the_networks_of_its_run(packed, smoke_run, store):
    model, image = solution.load_model(packed), TileStore(store).image("000")
    folders = ["north/fold0", "north/fold1", "turned/foldall", "kind/foldall"]
    members = []
    for folder, weight in zip(folders, (0.5, 0.5, 1.0, 1.0)):
        record = read_fold(smoke_run / folder / "fold.pt")
        members.append(solution.load_member({**record, "weight": weight}, folder, torch.device("cpu")))
    assert [member.weight for member in model.members] == [0.5, 0.5, 1.0]
    assert model.passes == ((0, 0), (1, 0), (2, 0), (2, 1))  # every network before any second view
    whole = model._replace(members=tuple(members[:3]), kind=members[3])
    found, expected = (solution.predict_window(one, image)[0] for one in (model, whole))
    assert np.abs(found - expected).max() < 5e-3  # float16 weights
    assert expected[1].std() > 1e-4


@pytest.mark.parametrize(
    "settings, message",
    [
        ("optim.lr=0.5", "north, fold 0: was trained with other settings than the recipe in optim.lr"),
        ("kind.hidden=64", "kind.*was made with other settings or labels"),
    ],
)
def test_a_run_of_another_recipe_is_neither_scored_nor_packed(smoke_run, store, tmp_path, capsys, settings, message):
    out = tmp_path / "model.pth"
    out.write_bytes(b"precious")
    common = ["--recipe", str(SMOKE), "--run", str(smoke_run), f"data.store={store}", settings]
    for command in (["pack", *common, "--out", str(out)], ["score", *common]):
        assert main(command) == 2
        assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"] and out.read_bytes() == b"precious"


def test_unfinished_folds_are_not_packed(smoke_run, store, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run)
    shutil.rmtree(run / "north" / "fold1")
    with pytest.raises(RunError, match="north: fold 1 not finished; train it with `fit`"):
        pack(run, smoke_config(store), tmp_path / "model.pth", "")


def test_the_file_holds_half_weights_its_recipe_and_where_it_comes_from(packed, store):
    content = torch.load(packed, weights_only=True)
    state = content["members"][0]["state_dict"]
    kinds = {"running" if "running_" in name else "weights": t.dtype for name, t in state.items() if t.ndim}
    assert kinds == {"running": torch.float32, "weights": torch.float16}
    (packed.parent / "recipe.yaml").write_text(content["recipe"])
    recipe = load_config(packed.parent / "recipe.yaml")
    assert recipe == smoke_config(store, "pack.time_budget=30.0")
    assert content["time_budget"] == 30.0 and [m["fold"] for m in content["members"]] == [0, 1, "all"]
    opened, about = TileStore(store), content["provenance"]
    assert (about["fingerprint"], about["tiles"]) == (opened.fingerprint, opened.tile_ids)
    assert about["labels"] == opened.labels


def test_the_card_names_the_hash_of_the_file_and_its_scores(packed, smoke_run, store):
    card = (packed.parent / "model_card.md").read_text()
    assert hashlib.sha256(packed.read_bytes()).hexdigest() in card
    value = json.loads((smoke_run / "scores.json").read_text())["intervals"]["extent MCC"][0]
    assert f"| {value:.3f} |" in card and TileStore(store).fingerprint in card
    assert "2 tiles tell both kinds of glacier, 0 in part, 2 none" in card


def test_the_limits_on_the_card_are_those_of_the_store(packed, store):
    card, opened = (packed.parent / "model_card.md").read_text(), TileStore(store)
    km2 = {name: sum(tile.counts[name] for tile in opened.tiles) * 0.0009 for name in opened.tiles[0].counts}
    assert km2["lake"] > 0.05 and f"Lakes are never predicted ({km2['lake']:.1f} km² in the labels)" in card
    assert f"Debris is known from {km2['debris']:.1f} km² of labels" in card
    assert f"4 tiles with {sum(km2.values()) - km2['ignore']:.0f} km² of labelled pixels (blue " in card
    assert "north above" not in card and "scene" not in card  # asked in two views; how many scenes is not known


def test_the_command_on_the_card_repeats_the_run(packed, store):
    """The settings that the card's SET and SCHEME give are those of the packed recipe."""
    content = torch.load(packed, weights_only=True)
    words = shlex.split(content["provenance"]["command"])
    given = dict(word.split("=", 1) for word in words[-3:])
    assert words[:2] == ["make", "train-all"] and given["RECIPE"] == str(SMOKE)
    made = load_config(SMOKE, [f"data.store={store}", f"data.scheme={given['SCHEME']}", *given["SET"].split()])
    assert to_text(made) == content["recipe"] and given["SET"] == "pack.time_budget=30.0"


def test_merged_batchnorms_change_nothing(packed):
    stored = torch.load(packed, weights_only=True)["members"][0]
    assert len(stored["batchnorms"]) > 10
    plain = random_network(TINY_ARCH, seed=3)
    merged = copy.deepcopy(plain)
    solution.merge_batchnorms(merged, batchnorm_pairs(plain))
    seen = []
    for layer in merged.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # of the encoder's unused deep layers
            layer.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(1, 5, 64, 96, generator=torch.manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(merged(x), plain(x), atol=1e-4)
    assert not seen


class ReadTwice(torch.nn.Module):
    """A convolution whose output its BatchNorm does not read alone: merging the two is wrong."""

    def __init__(self, **_) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(5, 1, 3, padding=1), torch.nn.BatchNorm2d(1)

    def forward(self, x):
        maps = self.conv(x)
        return self.norm(maps) + maps


def test_batchnorms_are_not_merged_where_that_would_change_the_answers(monkeypatch):
    monkeypatch.setitem(solution.NETWORKS, "ReadTwice", ReadTwice)
    network = ReadTwice()
    network.norm.running_var.fill_(4.0)
    assert len(batchnorm_pairs(network)) == 1
    assert mergeable_pairs({"name": "ReadTwice", "args": {}}, network.state_dict()) == []


def test_an_older_file_is_kept_and_too_large_a_one_is_refused(packed, smoke_run, store, tmp_path):
    out = tmp_path / "mine.pth"
    out.write_bytes(b"old")
    config = smoke_config(store)
    with pytest.raises(RunError, match=r"would have \d+\.\d MB, expected pack.max_mb = 0.1 at most"):
        pack(smoke_run, change_config(config, {"pack": {"max_mb": 0.1}}, "test"), out, "make")
    assert out.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["mine.pth"]
    assert pack(smoke_run, config, out, "make") == tmp_path / "mine_card.md"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine.previous.pth",
        "mine.pth",
        "mine_card.md",
    ]
    assert (tmp_path / "mine.previous.pth").read_bytes() == b"old"


def test_another_recipe_than_the_runs_is_refused(smoke_run, store, tmp_path):
    settings = {"augment": {"flip": True, "rot90": True}}
    config = change_config(smoke_config(store), {"members": {"north": {"views": 6, "settings": settings}}}, "test")
    with pytest.raises(RunError, match="other settings than the recipe in augment.flip, augment.rot90"):
        pack(smoke_run, config, tmp_path / "m.pth", "")


def test_a_fold_that_is_missing_is_named(smoke_run, store, tmp_path):
    members = {"north": {"ship": "all"}}
    with pytest.raises(RunError, match=r"north/foldall/fold\.pt: no such fold; train it with"):
        pack(
            smoke_run,
            change_config(smoke_config(store), {"members": members}, "test"),
            tmp_path / "m.pth",
            "",
        )
