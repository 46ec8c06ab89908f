"""What a run trains on: the options that Lightning gets, and two processes that share each step's crops."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import PROJECT
from train_helpers import make_store

from train import data
from train.config import ConfigError, differing_keys, load_config, save_config
from train.data import EpochSampler, open_fold
from train.fit import fit_fold, read_record
from train.hardware import precision_of, threads_of, trainer_options

SMOKE = PROJECT / "train" / "configs" / "smoke.yaml"
STEPS = ["data.batch_size=8", "data.steps_per_epoch=3", "train.epochs=1", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store")


# --- Settings -----------------------------------------------------------------------------------------------


def test_by_default_one_device_in_full_precision_on_a_cpu():
    options = trainer_options(load_config(overrides=["trainer.accelerator=cpu"]))
    assert (options["accelerator"], options["devices"], options["num_nodes"]) == ("cpu", 1, 1)
    assert (options["precision"], options["strategy"]) == ("32-true", "auto")


@pytest.mark.parametrize("given, expected", [("32", "32-true"), ("bf16", "bf16-mixed")])
def test_precision_is_what_is_asked_for(given, expected):
    overrides = ["trainer.accelerator=cpu", f"trainer.precision={given}"]
    assert precision_of(load_config(overrides=overrides)) == expected


@pytest.mark.parametrize("setting", ["precision=16", "sync_batchnorm=true"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(setting):
    config = load_config(overrides=["trainer.accelerator=cpu", f"trainer.{setting}"])
    with pytest.raises(ConfigError, match=rf"trainer\.{setting.split('=')[0]} .* GPU"):
        trainer_options(config)


@pytest.mark.parametrize(
    "settings, key",
    [
        (["trainer.devices=0"], "trainer.devices"),
        (["trainer.num_nodes=0"], "trainer.num_nodes"),
        (["trainer.precision=64"], "trainer.precision"),
        (["trainer.accelerator=abacus"], "trainer.accelerator"),
        (["trainer.devices=3", "data.batch_size=8"], "data.batch_size"),
        (["trainer.devices=2", "trainer.num_nodes=4", "data.batch_size=8"], "data.batch_size"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, key):
    with pytest.raises(ConfigError, match=f"^{key} is"):
        load_config(overrides=settings)


def test_configs_of_older_runs_mean_one_device(tmp_path):
    """They have no `trainer`; a run that they belong to goes on."""
    config = load_config(SMOKE)
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text[: text.index("trainer:")])
    assert load_config(tmp_path / "config.yaml").trainer == config.trainer
    assert differing_keys(load_config(tmp_path / "config.yaml"), config) == []


def test_another_accelerator_is_no_other_run_but_more_devices_are():
    config = load_config()
    assert differing_keys(config, load_config(overrides=["trainer.accelerator=cpu"])) == []
    assert differing_keys(config, load_config(overrides=["trainer.devices=2"])) == ["trainer.devices"]


def test_processes_share_the_cores():
    two = load_config(overrides=["trainer.devices=2"])
    assert threads_of(two) == max(1, threads_of(load_config()) // 2)
    assert threads_of(load_config(overrides=["trainer.devices=2", "train.threads=3"])) == 3


# --- Who gets which crop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_step_has_the_same_crops_whoever_cuts_them(processes, monkeypatch):
    batch, steps, epoch = 8, 3, 5
    shares = []
    for process in range(processes):
        monkeypatch.setattr(data, "process_number", lambda process=process: process)
        sampler = EpochSampler(batch * steps, batch, processes)
        sampler.set_epoch(epoch)
        shares.append(np.array(list(sampler)).reshape(steps, batch // processes))
        assert len(sampler) == shares[-1].size
    together = np.concatenate(shares, axis=1)  # (steps, batch)
    first = epoch * batch * steps
    assert np.array_equal(together.ravel(), np.arange(first, first + batch * steps))


def test_loaders_make_the_share_of_a_process(store):
    config = load_config(SMOKE, [f"data.store={store}", *STEPS, "trainer.devices=2"])
    loader = open_fold(config, 0).train_loader
    assert (loader.batch_size, len(loader)) == (4, config.data.steps_per_epoch)


# --- Two processes ------------------------------------------------------------------------------------------


def read_history(folder: Path) -> list[dict[str, float]]:
    with open(folder / "history.csv", newline="") as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory) -> tuple[Path, Path, str]:
    """Return the run of two processes, that of one with the same batches, and what the former printed."""
    root = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "train", "fit", "--config", str(SMOKE), "--run", str(root / "two")]
    command += ["--folds", "0", f"data.store={store}", *STEPS, "trainer.devices=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    fit_fold(load_config(SMOKE, [f"data.store={store}", *STEPS]), 0, root / "one")
    return root / "two", root / "one", ended.stdout


def test_two_processes_train_on_the_crops_of_one(runs):
    two, one, _ = runs
    for shared, alone in zip(read_history(two / "fold0"), read_history(one / "fold0")):
        for key in alone:
            if key.startswith(("drawn_", "pixels_", "epoch", "lr")):
                assert shared[key] == alone[key], key
        # BatchNorm and Dice see half of the crops at a time, so losses are alike and not equal
        assert shared["train_loss"] == pytest.approx(alone["train_loss"], rel=0.2)


def test_two_processes_end_in_one_fold_file(runs):
    two, one, _ = runs
    assert sorted(path.name for path in (two / "fold0").iterdir()) == [
        "config.yaml",
        "fold.pt",
        "history.csv",
    ]
    record, alone = (read_record(run / "fold0" / "fold.pt") for run in (two, one))
    assert record["config"]["trainer"]["devices"] == 2
    assert -1 <= record["val_mcc"] <= 1
    assert record["train_tiles"] == alone["train_tiles"]
    states = [torch.load(run / "fold0" / "fold.pt", weights_only=True)["state_dict"] for run in (two, one)]
    assert list(states[0]) == list(states[1])
    assert all(torch.isfinite(value).all() for value in states[0].values())


def test_only_one_process_speaks(runs):
    _, _, said = runs
    assert said.count("fold 0: 2 tiles to train on") == 1
    assert said.count("epoch 1/1") == 1
