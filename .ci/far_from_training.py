"""Out-of-fold scores of the pixels that lie far from all ground that the network was trained on.

python .ci/far_from_training.py --run runs/recipe --store data/competition

Spatial folds are blocks of tiles side by side: a held-out tile may touch a tile of the training. Pixels are grouped by
their distance from the nearest of those, on the grid of the tiles' rows and columns. The groups are of different
places, so that a difference between them is of both, distance and place.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Mapping

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prep.labels import IGNORE
from prep.store import TileStore
from prep.text import markdown_table
from solution import decide_classes
from train.objective import TileCounts, count_tile, interval_text, pool, score_intervals
from train.run import OOF_FOLDER

PIXEL = 0.03  # km
TILE = 512 * PIXEL  # km, side of a tile
GROUPS = {"all": (0, np.inf), "nearer than a tile": (0, TILE), "a tile or more away": (TILE, np.inf)}  # km


def distance(place: tuple[int, int], trained_on: list[tuple[int, int]], size: int = 512) -> np.ndarray:
    """Return how far each pixel of a tile at (row, column) is from the nearest of other tiles, (size, size) km."""
    nearest = np.full((size, size), np.inf)
    for other in trained_on:
        apart = []  # in rows, in columns
        for own, theirs in zip(place, other):
            pixels = np.arange(size) + (own - theirs) * size  # counted from the other tile's first
            apart.append(np.maximum(np.maximum(-pixels, pixels - (size - 1)), 0))
        nearest = np.minimum(nearest, np.hypot(apart[0][:, None], apart[1][None, :]))
    return nearest * PIXEL


def table(run: Path, store: TileStore, fold_of: Mapping[str, int]) -> str:
    """Return the scores of each group of pixels as a Markdown table."""
    places = {row.tile_id: (row.row, row.col) for row in store.tiles}
    counts: dict[str, list[TileCounts]] = {name: [] for name in GROUPS}
    for tile, fold in fold_of.items():
        far = distance(places[tile], [places[other] for other in fold_of if fold_of[other] != fold])
        classes = decide_classes(np.load(run / OOF_FOLDER / f"{tile}.npy").astype(np.float32))
        for name, (least, most) in GROUPS.items():
            codes = np.where((far >= least) & (far < most), store.mask(tile), IGNORE)
            counts[name].append(count_tile(tile, fold, store.labels[tile], codes, classes))
    lines = [
        [name, f"{pool(tiles).sum():,}", *map(interval_text, score_intervals(tiles).values())]
        for name, tiles in counts.items()
    ]
    return markdown_table(["distance from training", "pixels", "extent", "four classes", "debris, IoU"], lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--store", type=Path, default=Path("data/competition"))
    arguments = parser.parse_args()
    store = TileStore(arguments.store)
    print(table(arguments.run, store, store.fold_of("spatial")))


if __name__ == "__main__":
    main()
