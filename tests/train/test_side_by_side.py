"""Networks in processes side by side: the same weights as one after the other, and failures are told."""

import subprocess
import sys

import pytest
import torch
from train_helpers import SMOKE, fit_smoke, same_weights

from train import side_by_side
from train.__main__ import main
from train.side_by_side import Job, _run, explain_failures, gpu_of, log_of


def test_networks_at_once_have_the_weights_of_one_after_the_other(store, smoke_run, tmp_path, capsys):
    run = fit_smoke(store, tmp_path / "run", "--jobs", "2", "--member", "north")
    assert capsys.readouterr().out.splitlines()[0].split()[0] == "fold"
    for fold in ("fold0", "fold1"):
        assert "epoch 2/2" in (run / "north" / f"{fold}.log").read_text()
        assert same_weights(run / "north" / fold, smoke_run / "north" / fold)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--jobs", "0"], "--jobs is 0, expected 1 or more"),
        (["--jobs", "2", "data.batch_size=4", "trainer.devices=2"], "each network would take 2 devices"),
    ],
)
def test_what_cannot_run_side_by_side_is_refused(store, tmp_path, capsys, given, message):
    arguments = ["fit", "--recipe", str(SMOKE), "--run", str(tmp_path / "run"), *given, f"data.store={store}"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def start_scripts(monkeypatch, scripts: dict, started: list) -> None:
    """Let each job run the script of its fold, whose output goes to the job's log."""

    def start(job, slot):
        assert sum(process.poll() is None for _, process in started) < 2
        with open(log_of(job), "w") as log:
            command = [sys.executable, "-c", scripts[job.fold]]
            started.append((slot, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)))
        return started[-1][1]

    monkeypatch.setattr(side_by_side, "start", start)


def test_at_most_so_many_run_at_once_and_failures_are_named(tmp_path, monkeypatch):
    scripts, started = {0: "print('done')", 1: "raise SystemExit('b has no tiles')", 2: "print('done')"}, []
    start_scripts(monkeypatch, scripts, started)
    failed = _run([Job(None, tmp_path, fold) for fold in scripts], 2)
    assert [job.fold for job in failed] == [1] and {slot for slot, _ in started} == {0, 1}
    text = explain_failures([log_of(job) for job in failed])
    assert text.startswith("1 networks failed; the same command tries them again")
    assert text.endswith(f"{tmp_path / 'fold1.log'}: b has no tiles")


def test_an_interruption_ends_the_processes(tmp_path, monkeypatch):
    started = []
    start_scripts(monkeypatch, {0: "import time; time.sleep(600)"}, started)
    with pytest.raises(KeyError):  # there is no script for the second one
        _run([Job(None, tmp_path, 0), Job(None, tmp_path, 1)], 2)
    assert started[0][1].poll() is not None


@pytest.mark.parametrize(
    ("count", "named", "expected"),
    [(0, "", [{}, {}]), (1, "", [{}, {}]), (2, "", ["0", "1", "0"]), (3, "5,7,9", ["5", "7", "9", "5"])],
)
def test_each_slot_has_a_gpu_of_its_own_where_there_are_several(monkeypatch, count, named, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv(side_by_side.GPU_VARIABLE, named)
    expected = [{side_by_side.GPU_VARIABLE: name} if isinstance(name, str) else name for name in expected]
    assert [gpu_of(slot) for slot in range(len(expected))] == expected
