"""Killed runs of solution.py, prep and training, and two at a time: all that is left is whole."""

import os
import re
import subprocess
import sys

import pytest
from support import PROJECT
from train_helpers import smoke_config

from prep.store import locked
from train.fit import fit_fold
from train.run import RunError


@pytest.mark.slow
def test_killed_runs_leave_whole_files_and_the_next_run_ends_alike():
    """In a process of its own: it forks, which no process does well that has used threads."""
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fuzz", "kills", "hkh-kills", "trainings", "twice", "--kills", "4"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(re.findall(r": [1-9]\d* kills, ", ended.stdout)) == 4, ended.stdout


def test_a_fold_is_trained_by_one_process(store, tmp_path):
    (tmp_path / "run" / "fold0").mkdir(parents=True)
    with locked(tmp_path / "run" / "fold0"), pytest.raises(RunError, match="another process trains it"):
        fit_fold(smoke_config(store), 0, tmp_path / "run")
    assert list((tmp_path / "run" / "fold0").iterdir()) == []
