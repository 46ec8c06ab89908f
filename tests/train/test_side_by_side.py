"""Folds in processes side by side: the same weights as one after the other, and failures are told."""

from pathlib import Path

import pytest
import torch
from support import PROJECT
from train_helpers import make_store

from train import side_by_side
from train.__main__ import main
from train.config import load_config
from train.fit import fit_fold
from train.side_by_side import Work, explain_failures, gpu_of, run_side_by_side, start

SMOKE = PROJECT / "train" / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def weights_of(run: Path, fold: int) -> dict[str, torch.Tensor]:
    return torch.load(run / f"fold{fold}" / "fold.pt", weights_only=True)["state_dict"]


def write_script(folder: Path, name: str, text: str) -> Work:
    """Return the work of running a script beside its log; `python -m` takes modules only."""
    (folder / f"{name}.py").write_text(text)
    runner = f"import runpy; runpy.run_path({str(folder / (name + '.py'))!r}, run_name='__main__')"
    return Work(name, ["timeit", "-n1", "-r1", runner], folder / f"{name}.log")


def test_folds_at_once_have_the_weights_of_one_after_the_other(store, tmp_path, capsys):
    settings = [f"data.store={store}", "train.epochs=1"]
    arguments = ["fit", "--config", str(SMOKE), "--run", str(tmp_path / "at_once"), "--jobs", "2", *settings]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == ["fold", "0", "1", "mean"]
    for fold in (0, 1):
        log = (tmp_path / "at_once" / f"fold{fold}.log").read_text()
        assert f"fold {fold}  epoch 1/1" in log
        fit_fold(load_config(SMOKE, settings), fold, tmp_path / "in_turn")
        expected = weights_of(tmp_path / "in_turn", fold)
        found = weights_of(tmp_path / "at_once", fold)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--jobs", "0"], "--jobs is 0, expected 1 or more"),
        (["--jobs", "2", "data.batch_size=4", "trainer.devices=2"], "each fold would take 2 devices"),
    ],
)
def test_what_cannot_run_side_by_side_is_refused(store, tmp_path, capsys, given, message):
    arguments = ["fit", "--config", str(SMOKE), "--run", str(tmp_path / "run"), *given, f"data.store={store}"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_all_run_at_most_so_many_at_once_and_failures_are_named(tmp_path):
    texts = {"a": "print('a is done')", "b": "raise SystemExit('b has no tiles')", "c": "print('c is done')"}
    works = [write_script(tmp_path, name, text) for name, text in texts.items()]
    slots, finished, alive = [], [], []

    def begin(work, slot):
        alive[:] = [process for process in alive if process.poll() is None]
        assert len(alive) < 2
        slots.append(slot)
        alive.append(start(work, slot))
        return alive[-1]

    failed = run_side_by_side(
        works, 2, begin, lambda work: work.name, lambda work: finished.append(work.name)
    )
    assert sorted(finished) == ["a", "c"]
    assert [work.name for work in failed] == ["b"]
    assert set(slots) == {0, 1}
    text = explain_failures([work.log for work in failed])
    assert text.startswith("1 folds failed")
    assert text.endswith(f"{tmp_path / 'b.log'}: SystemExit: b has no tiles")


def test_an_interruption_ends_the_processes(tmp_path):
    work = write_script(tmp_path, "sleeper", "import time; time.sleep(600)")
    begun = []

    def begin(work, slot):
        if begun:
            raise KeyboardInterrupt
        begun.append(start(work, slot))
        return begun[0]

    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([work, work], 2, begin, lambda work: work.name, lambda work: None)
    assert begun[0].poll() is not None


@pytest.mark.parametrize(
    "count, named, expected",
    [(0, "", [{}, {}]), (1, "", [{}, {}]), (2, "", ["0", "1", "0"]), (3, "5,7,9", ["5", "7", "9", "5"])],
)
def test_each_slot_has_a_gpu_of_its_own_where_there_are_several(monkeypatch, count, named, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv(side_by_side.GPU_VARIABLE, named)
    expected = [{side_by_side.GPU_VARIABLE: name} if isinstance(name, str) else name for name in expected]
    assert [gpu_of(slot) for slot in range(len(expected))] == expected


def test_processes_have_one_thread(tmp_path):
    work = write_script(tmp_path, "threads", "import os; print(os.environ['OMP_NUM_THREADS'])")
    assert start(work).wait(timeout=60) == 0
    assert work.log.read_text().startswith("1\n")
