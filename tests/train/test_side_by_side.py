"""Networks in processes side by side: the same weights as one after the other, and failures are told."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_helpers import SMOKE, fit_smoke, same_weights, smoke_config

from train import side_by_side
from train.__main__ import main
from train.side_by_side import (
    Job,
    Steps,
    _run,
    describe_training,
    explain_failures,
    gpu_of,
    log_of,
    steps_made,
)


def test_networks_at_once_have_the_weights_of_one_after_the_other(store, smoke_run, tmp_path, capsys):
    run = fit_smoke(store, tmp_path / "run", "--jobs", "2", "--member", "north")
    said = capsys.readouterr().out
    assert said.startswith("training 2 networks, 2 at once, on 1 CPU, precision 32-true, 1 thread each; 8 steps of 2 ")
    assert {"north, fold 0: done", "north, fold 1: done"} <= set(said.splitlines())
    assert not list(run.rglob(side_by_side.STEPS_FILE))
    for fold in ("fold0", "fold1"):
        assert "epoch 2/2" in (run / "north" / f"{fold}.log").read_text()
        assert same_weights(run / "north" / fold, smoke_run / "north" / fold)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--jobs", "0"], "--jobs is 0, expected 1 or more"),
        (["--jobs", "2", "data.batch_size=4", "trainer.devices=2"], "each network would take 2 devices"),
        (["--jobs", "2", "--folds", "9", "--member", "north"], "has no fold 9; it has folds 0, 1"),
        (["--jobs", "2", "--folds", "0,all", "train.keep=best"], "expected last where no tile is held out"),
        (["--jobs", "2", "model.args.encoder_name=tu-nope"], "no Unet can be built: Unknown model (nope)"),
    ],
)
def test_what_cannot_run_side_by_side_is_refused(store, tmp_path, capsys, given, message):
    arguments = ["fit", "--recipe", str(SMOKE), "--run", str(tmp_path / "run"), *given, f"data.store={store}"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_bar_and_its_time_left_are_of_all_networks(capsys):
    """Three networks of 40 steps: the bar counts the steps of all, and an earlier run's steps are not fast ones."""
    config = smoke_config("nowhere", "train.epochs=20")
    jobs = [Job(config, Path(name), 0) for name in "abc"]
    steps = Steps(jobs)
    steps.show(jobs[0], 10)  # made before an interruption
    for made in range(1, 13):
        steps.show(jobs[0], 10 + made)
        steps.show(jobs[1], made)
    steps.show(jobs[1], 0)  # the file with its steps is gone
    assert (steps.bar.total, steps.bar.n, steps.bar.initial) == (120, 34, 11)
    steps.bar.close()
    assert "all networks" in capsys.readouterr().err
    assert describe_training(jobs, 2).startswith(
        "training 3 networks, 2 at once, on 1 CPU, precision 32-true, 1 thread "
    )
    assert describe_training(jobs, 2).endswith("; 120 steps of 2 crops of 64 px in all")


def test_steps_of_a_process_are_read_from_its_file(tmp_path):
    job = Job(smoke_config("nowhere"), tmp_path, 1)
    assert steps_made(job) == 0
    (tmp_path / "fold1").mkdir()
    (tmp_path / "fold1" / side_by_side.STEPS_FILE).write_text("17")
    assert steps_made(job) == 17


def test_finished_networks_start_no_process(store, smoke_run, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "start", lambda *_: pytest.fail("a process was started"))
    fit_smoke(store, smoke_run, "--jobs", "2")
    assert "north, fold 0: already finished, val_mcc" in capsys.readouterr().out


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
    jobs = [Job(smoke_config("nowhere"), tmp_path, fold) for fold in scripts]
    failed = _run(jobs, 2, Steps(jobs))
    assert [job.fold for job in failed] == [1] and {slot for slot, _ in started} == {0, 1}
    text = explain_failures([log_of(job) for job in failed])
    assert text.startswith("1 networks failed; the same command tries them again")
    assert text.endswith(f"{tmp_path / 'fold1.log'}: b has no tiles")


def test_an_interruption_ends_the_processes(tmp_path, monkeypatch):
    started = []
    start_scripts(monkeypatch, {0: "import time; time.sleep(600)"}, started)
    jobs = [Job(smoke_config("nowhere"), tmp_path, fold) for fold in (0, 1)]
    with pytest.raises(KeyError):  # there is no script for the second one
        _run(jobs, 2, Steps(jobs))
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
