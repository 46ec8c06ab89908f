"""What a run trains on: the options that Lightning gets, and two processes that share each step's crops."""

import os
import subprocess
import sys

import pytest
import torch
from support import PROJECT
from train_helpers import SMOKE, read_history, smoke_config, weights_of

from train.config import ConfigError, load_config
from train.data import open_fold
from train.fit import fit_fold
from train.hardware import precision_of, threads_of, trainer_options
from train.run import read_record

CPU = "trainer.accelerator=cpu"
STEPS = ["data.batch_size=8", "data.steps_per_epoch=2", "train.epochs=1", CPU]


def test_by_default_one_device_in_full_precision_on_a_cpu():
    options = trainer_options(load_config(overrides=[CPU]))
    assert (options["accelerator"], options["devices"], options["num_nodes"]) == ("cpu", 1, 1)
    assert (options["precision"], options["strategy"]) == ("32-true", "auto")
    assert precision_of(load_config(overrides=[CPU, "trainer.precision=bf16"])) == "bf16-mixed"


@pytest.mark.parametrize("setting", ["precision=16", "sync_batchnorm=true"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(setting):
    with pytest.raises(ConfigError, match=rf"trainer\.{setting.split('=')[0]} .* GPU"):
        trainer_options(load_config(overrides=[CPU, f"trainer.{setting}"]))


def test_more_devices_than_there_are_gpus_are_refused():
    there = max(1, torch.cuda.device_count())
    more = [f"trainer.devices={there + 1}", f"data.batch_size={2 * (there + 1)}"]
    with pytest.raises(ConfigError, match=rf"\(make: DEVICES\) is {there + 1}, found .*; expected {there} at most"):
        trainer_options(load_config(overrides=more))
    assert trainer_options(load_config(overrides=[*more, CPU]))["devices"] == there + 1


def test_processes_share_cores_and_crops(store):
    two = load_config(overrides=["trainer.devices=2", "data.batch_size=4"])
    assert threads_of(two) == max(1, threads_of(load_config()) // 2)
    assert threads_of(load_config(overrides=["trainer.devices=2", "train.threads=3"])) == 3
    loader = open_fold(smoke_config(store, *STEPS, "trainer.devices=2"), 0).train_loader
    assert (loader.batch_size, len(loader)) == (4, 2)


@pytest.mark.slow
def test_two_processes_train_on_the_crops_of_one_and_end_in_one_fold_file(store, tmp_path):
    command = [sys.executable, "-m", "train", "fit", "--recipe", str(SMOKE), "--run", str(tmp_path / "two")]
    command += ["--folds", "0", "--member", "north", f"data.store={store}", *STEPS, "trainer.devices=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("fold 0: 2 tiles to train on") == ended.stdout.count("epoch 1/1") == 1
    fit_fold(smoke_config(store, *STEPS), 0, tmp_path / "one")
    two, one = tmp_path / "two" / "north" / "fold0", tmp_path / "one" / "fold0"
    (shared,), (alone,) = read_history(two), read_history(one)
    for key in alone:
        if key.startswith(("pixels_", "epoch", "lr")):
            assert shared[key] == alone[key], key
    # BatchNorm and Dice see half of the crops at a time, so losses are alike and not equal
    assert shared["train_loss"] == pytest.approx(alone["train_loss"], rel=0.2)
    assert sorted(path.name for path in two.iterdir()) == ["config.yaml", "fold.pt", "history.csv"]
    assert read_record(two / "fold.pt")["train_tiles"] == read_record(one / "fold.pt")["train_tiles"]
    assert all(torch.isfinite(value).all() for value in weights_of(two).values())
