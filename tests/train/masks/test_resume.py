"""Maps whose process is killed in the middle: the same command goes on, to the same map."""

import os
import subprocess
import sys
import time
from pathlib import Path

from masks_helpers import textured_numbers, write_tiny_model
from support import PROJECT, write_tile

from train.masks import maps
from train.masks.scene import find_scenes


def start(folder: Path) -> subprocess.Popen:
    """Start a process that maps `folder`/data into `folder`/killed."""
    command = [sys.executable, "-m", "train", "map", "data", "--weights", "model.pth", "--out", "killed"]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(PROJECT)})


def test_a_process_that_is_killed_goes_on(tmp_path):
    weights = write_tiny_model(tmp_path / "model.pth")
    write_tile(tmp_path / "data", "001", textured_numbers(3000, 96))  # eight windows of 512 px
    parts = tmp_path / "killed" / maps.PARTS
    with start(tmp_path) as process:
        while not (parts / "000.npz").is_file() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    left = {path: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert 1 <= len(left) < 8
    with start(tmp_path) as process:
        while process.poll() is None and len(list(parts.glob("*.npz"))) == len(left):
            time.sleep(0.002)
        again = {path: path.stat().st_mtime_ns for path in left if path.is_file()}
        assert again == left  # what was finished is not made again
        assert process.wait() == 0
    (scene,) = find_scenes(tmp_path / "data")
    maps.map_scene(scene, tmp_path / "whole", maps.Settings(weights))
    for name in ("classes.tif", "probabilities.tif", "confidence.tif"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
