"""The same tile, weights and settings in several processes and numbers of threads: are the masks alike?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from support import PROJECT

from prep.synthetic.scenes import write_sample

AIM = 0.9999  # least share of pixels that are alike


def mask_with(threads: int, data: Path, out: Path, weights: Path, budget: str = "inf") -> np.ndarray:
    """Return the mask of one tile by solution.py in a process of its own."""
    command = [sys.executable, str(PROJECT / "solution.py"), str(data), str(out), "--weights", str(weights)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, "--time-budget", budget], env=environment, check=True, capture_output=True)
    (written,) = out.iterdir()
    return cv2.imread(str(written), cv2.IMREAD_UNCHANGED)


def compare_threads(weights: Path, seed: int, size: int = 512) -> tuple[list[str], list[str]]:
    """Segment a synthetic scene on one thread twice, then on two and four; return (what was seen, faults)."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(shutil.copy(weights, folder))  # whatever replaces them meanwhile
        data = Path(folder) / "scene"
        write_sample(data, 1, size, seed, "platform", "phase2")
        masks = [mask_with(n, data, Path(folder) / f"out{i}", weights) for i, n in enumerate((1, 1, 2, 4))]
    alike = [float((mask == masks[0]).mean()) for mask in masks[1:]]
    names = ("a second run", "2 threads", "4 threads")
    seen = [f"{name}: {share:.4%} of the pixels alike" for name, share in zip(names, alike)]
    limits = (1.0, AIM, AIM)
    return seen, [line for line, share, limit in zip(seen, alike, limits) if share < limit]
