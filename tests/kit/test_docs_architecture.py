"""docs/add-an-architecture.md is followed to the letter: its code, its configuration and its commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from support import PROJECT, scene_numbers, write_tile
from train_helpers import make_store

PAGE = PROJECT / "docs" / "add-an-architecture.md"
# The page trains at full length; a test of it takes the steps of train/configs/smoke.yaml.
SHORT = "data.crop=64 data.batch_size=2 data.steps_per_epoch=2 optim.warmup_steps=1 train.epochs=1"
# Runs the commands of standard input one after the other, as a shell would, but imports PyTorch once.
DRIVER = """
import runpy, shlex, sys
for line in sys.stdin.read().splitlines():
    words = shlex.split(line)[1:]
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{line}: exit status {end.code}")
"""


def code_block(language: str) -> str:
    """Return the page's one code block of a language."""
    found = re.findall(
        rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(found) == 1
    return found[0]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a copy of the kit with a tile store and two tiles to segment."""
    kit = tmp_path / "kit"
    kit.mkdir()
    shutil.copy(PROJECT / "solution.py", kit)
    for package in ("prep", "train"):
        shutil.copytree(PROJECT / package, kit / package, ignore=shutil.ignore_patterns("__pycache__"))
    make_store(kit / "data" / "competition")
    for index in range(2):
        write_tile(kit / "data" / "tiles", f"{index + 1:03d}", scene_numbers(index))
    return kit


def test_the_three_steps_end_in_masks(clone: Path) -> None:
    source = (clone / "solution.py").read_text(encoding="utf-8")
    before = "def build_network("
    assert source.count(before) == 1
    with_network = source.replace(before, f"{code_block('python')}\n\n{before}")
    (clone / "solution.py").write_text(with_network, encoding="utf-8")
    (clone / "train" / "configs" / "plainnet.yaml").write_text(code_block("yaml"), encoding="utf-8")
    commands = code_block("sh").splitlines()
    assert commands[0].startswith("python -m train fit")
    commands[0] += f" {SHORT}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, '')\n" + DRIVER],
        cwd=clone,
        input="\n".join(commands),
        env=environment,
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "out-of-fold MCC" in run.stdout
    masks = sorted((clone / "data" / "masks").iterdir())
    assert [path.name for path in masks] == ["img001.png", "img002.png"]
    assert np.isin(cv2.imread(str(masks[0]), cv2.IMREAD_UNCHANGED), (0, 85, 170, 255)).all()
