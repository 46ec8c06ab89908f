"""docs/add-an-architecture.md is followed to the letter: its module, its recipe, and the solution.py of its model."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
from support import PROJECT, scene_numbers, write_tile
from train_helpers import make_store

PAGE = PROJECT / "docs" / "add-an-architecture.md"
SHORT = [
    "data.scheme=stratified",
    "data.crop=64",
    "data.batch_size=2",
    "data.steps_per_epoch=1",
    "train.epochs=1",
]
# What `make train-all` and `make submission` run, in one process so that PyTorch is imported once.
DRIVER = """
import sys
from pathlib import Path
from train.__main__ import main
from solution import read_model_file
from train.submit.assemble import write_solution
for command in ("fit", "score", "pack"):
    out = ["--out", "bare/model.pth"] if command == "pack" else []
    status = main([command, "--recipe", "mine.yaml", "--run", "runs/mine", *out, *sys.argv[1:]])
    assert status == 0, command
write_solution(read_model_file("bare/model.pth"), Path("bare/solution.py"))
"""


def code_block(language: str) -> str:
    """Return the page's one code block of a language."""
    text = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return found


def run(arguments: list, folder: Path) -> str:
    """Return what a Python command prints that is run in a folder."""
    ended = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def test_the_three_steps_end_in_masks(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    for package in ("prep", "train"):
        shutil.copytree(PROJECT / package, kit / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "solution.py", kit)
    make_store(kit / "data" / "competition", size=64)
    (kit / "train" / "networks" / "plainnet.py").write_text(code_block("python"), encoding="utf-8")
    (kit / "mine.yaml").write_text(code_block("yaml"), encoding="utf-8")
    (kit / "bare").mkdir()
    (kit / "driver.py").write_text(DRIVER)
    assert "extent MCC, out of fold" in run(["driver.py", *SHORT], kit)
    assert "class PlainNet" in (kit / "bare" / "solution.py").read_text(encoding="utf-8")
    assert "class PlainNet" not in (kit / "solution.py").read_text(encoding="utf-8")
    bare = (kit / "bare").rename(tmp_path / "bare")
    write_tile(tmp_path / "tiles", "001", scene_numbers(0))
    run(["solution.py", str(tmp_path / "tiles"), str(tmp_path / "masks")], bare)
    mask = cv2.imread(str(tmp_path / "masks" / "img001.png"), cv2.IMREAD_UNCHANGED)
    assert np.isin(mask, (0, 85, 170, 255)).all()
