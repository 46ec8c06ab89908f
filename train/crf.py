"""Compares the CRF on PyTorch with pydensecrf: labels and time, on out-of-fold probabilities."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

import solution
from prep.store import TileStore
from train.calibrate import CRF_OPTIONS, Run, open_run
from train.evaluate import load_passes
from train.fit import RunError
from train.text import markdown_table, plural

Refine = Callable[..., np.ndarray]


class Comparison(NamedTuple):
    """One tile under one setting: the share of valid pixels with the same class, and the seconds of each."""

    agreement: float
    package_seconds: float
    torch_seconds: float


def compare(run: Run, store: TileStore, tile: str, settings: Mapping[str, float]) -> Comparison | None:
    """Return how the two agree on a tile, None where it has no valid pixel."""
    image = store.image(tile)
    valid = solution.valid_mask(image)
    if not valid.any():
        return None
    features = solution.normalize(image, run.normalization[run.fold_of[tile]])
    probs = load_passes(run.folder, tile).astype(np.float32).mean(axis=0)
    probs /= probs.sum(axis=0, keepdims=True)
    package, package_seconds = timed(solution.refine_with_crf, probs, features, valid, settings)
    own, torch_seconds = timed(solution.refine_with_torch_crf, probs, features, valid, settings)
    same = solution.decide_classes(package)[valid] == solution.decide_classes(own)[valid]
    return Comparison(float(same.mean()), package_seconds, torch_seconds)


def timed(
    refine: Refine, probs: np.ndarray, features: np.ndarray, valid: np.ndarray, settings: Mapping[str, float]
) -> tuple[np.ndarray, float]:
    """Return refined probabilities and the shorter of two times that they took, in seconds."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        refined = refine(probs, features, valid, **settings)
        seconds.append(time.perf_counter() - started)
    return refined, min(seconds)


def compare_run(run_dir: Path, store: TileStore) -> list[list[Comparison]]:
    """Return the comparisons of all held-out tiles of a run, [setting of CRF_OPTIONS][tile].

    Raises:
        RunError: pydensecrf is not installed, or the run's tiles have not been predicted.
    """
    if solution.densecrf is None:
        raise RunError("pydensecrf is not installed, so there is nothing to compare with; run `make setup`")
    run = open_run(run_dir)
    table = []
    for settings in CRF_OPTIONS:
        tiles = [compare(run, store, tile, settings) for tile in tqdm(sorted(run.fold_of), unit="tile")]
        table.append([comparison for comparison in tiles if comparison is not None])
    return table


def format_comparisons(table: Sequence[Sequence[Comparison]], threads: int, command: str) -> str:
    """Return the Markdown report."""
    head = ["smoothness", "bilateral", "agreement: least", "mean", "time ratio: mean", "largest"]
    head.append("pydensecrf, s a tile")
    rows = []
    for settings, tiles in zip(CRF_OPTIONS, table):
        agreements = [tile.agreement for tile in tiles]
        ratios = [tile.torch_seconds / tile.package_seconds for tile in tiles]
        seconds = statistics.mean(tile.package_seconds for tile in tiles)
        rows.append(
            [
                f"{settings['smooth_weight']:g}, {settings['smooth_px']:g} px",
                ", ".join(f"{settings[f'bilateral_{key}']:g}" for key in ("weight", "px", "std")),
                f"{min(agreements):.6f}",
                f"{statistics.mean(agreements):.6f}",
                f"{statistics.mean(ratios):.2f}",
                f"{max(ratios):.2f}",
                f"{seconds:.2f}",
            ]
        )
    return (
        "# The CRF without pydensecrf\n\n"
        f"`{command}`, {plural(threads, 'thread')}\n\n"
        "`solution.refine_with_torch_crf` filters on the permutohedral lattice, as pydensecrf does, in plain "
        "PyTorch. Agreement is the share of a tile's valid pixels that get the same class, over "
        f"{len(table[0])} tiles with their out-of-fold probabilities (aim: 0.99 on each); the time ratio "
        "is PyTorch's to pydensecrf's, which uses one thread (aim: at most 2). Kernels: strength, width in "
        "pixels and, of the bilateral one, width in the normalised bands.\n\n"
        f"{markdown_table(head, rows)}\n"
    )
