"""Do maps hold what they say? The calibration of out-of-fold probabilities, and how often intervals of areas hold.

The interval of an area lies between two outlines, at probabilities a margin above and below a half. The margin is
the least that holds 90 of 100 labelled areas: nested conformal prediction (Gupta et al. 2022, arXiv 1910.10562).
Whole folds are held out, since glaciers of one place err alike.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pandas

from prep.files import write_text
from prep.labels import IGNORE
from prep.store import TileStore
from prep.text import markdown_table
from solution import decide_classes
from train.masks.outlines import MARGINS, count_glaciers, nearest_glacier
from train.masks.pictures import save_figure
from train.masks.strips import NODATA, STEPS
from train.objective import DEBRIS, GLACIER, GLACIER_CODES
from train.report.figures import draw_reliability
from train.report.reliability import count_reliability, pool_reliability
from train.report.scores import find_scheme, load_probabilities

TRIED = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
HOLD = 0.9  # of the cases
PIXEL_KM2 = 0.03**2
EDGES = (0.01, 0.1, 1, 10, np.inf)  # km²; smaller glaciers are none


def count_areas(codes: np.ndarray, probs: np.ndarray, classes: np.ndarray) -> pandas.DataFrame:
    """Return a row for each glacier of a tile: pixels, `ice` that is labelled, and the interval's ends by margin.

    The labelled ice of a glacier is what is nearer to it than to others and within reach.

    Args:
        codes: (H, W) label codes, IGNORE where nothing was measured.
        probs: (4, H, W) class probabilities.
        classes: (H, W) class indices.
    """
    shown, ice = np.where(codes == IGNORE, NODATA, classes).astype(np.uint8), np.isin(codes, GLACIER_CODES)
    likely = np.rint(probs[[GLACIER, DEBRIS]].sum(axis=0) * STEPS).astype(np.uint8)
    labels = cv2.connectedComponents(np.isin(shown, (GLACIER, DEBRIS)).astype(np.uint8), connectivity=4)[1]
    found = count_glaciers(labels, shown, likely, TRIED)
    near = np.bincount(nearest_glacier(labels)[ice], minlength=len(found.pixels))
    areas = pandas.DataFrame({"pixels": found.pixels, "ice": near})
    for margin, low, high in zip(TRIED, found.low, found.high):
        areas["low", margin], areas["high", margin] = low, high
    return areas[1:]


def coverage_table(areas: pandas.DataFrame) -> str:
    """Return, by margin and size, how many intervals hold the labelled ice and their median width, as Markdown.

    The last row is of margins that the other folds chose.
    """
    held = pandas.DataFrame({m: areas["ice"].between(areas["low", m], areas["high", m]) for m in TRIED})
    width = pandas.DataFrame({m: (areas["high", m] - areas["low", m]) / areas["pixels"] for m in TRIED})
    chosen = pandas.Series(False, areas.index)
    for fold in areas["fold"].unique():
        mine = areas["fold"] == fold
        enough = held[~mine].mean() >= HOLD
        chosen[mine] = held.loc[mine, enough.idxmax() if enough.any() else TRIED[-1]]
    km2 = areas["pixels"] * PIXEL_KM2
    groups = {f"{low:g} to {high:g} km²": km2.between(low, high, "left") for low, high in pairwise(EDGES)}
    groups = {name: group for name, group in {**groups, "all": km2 > 0}.items() if group.any()}
    rows = [[f"{m}", *[f"{held[m][g].mean():.0%}, {width[m][g].median():.2f}" for g in groups.values()]] for m in TRIED]
    rows.append(["chosen on the other folds", *[f"{chosen[group].mean():.0%}" for group in groups.values()]])
    return markdown_table(["margin", *[f"{name} ({group.sum():,})" for name, group in groups.items()]], rows)


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `calibration`."""
    parser.add_argument("--run", type=Path, default=Path("runs/recipe"), help="default: %(default)s")
    parser.add_argument("--store", type=Path, default=Path("data/competition"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="a Markdown file; its diagram goes beside it")


def run_calibration(arguments: argparse.Namespace) -> int:
    """Report how far out-of-fold probabilities can be believed, and how often intervals of areas hold."""
    store, run = TileStore(arguments.store), arguments.run
    fold_of, counts, glaciers, sums = store.fold_of(find_scheme(run)), {}, [], []
    for tile in store.tile_ids:
        codes, probs = store.mask(tile), load_probabilities(run, store, tile)
        counts[tile] = count_reliability(codes, probs)
        areas = count_areas(codes, probs, decide_classes(probs))
        areas = areas[areas["pixels"] * PIXEL_KM2 >= EDGES[0]]
        total = areas.sum()
        total["ice"] = np.isin(codes, GLACIER_CODES).sum()  # also what is far from any glacier of the map
        glaciers.append(areas.assign(fold=fold_of[tile]))
        sums.append(total.to_frame().T.assign(fold=fold_of[tile]))
    pooled = pool_reliability(counts.values())
    by_tile = ", ".join(f"{tile} {one.expected_calibration_error:.3f}" for tile, one in counts.items())
    sections = [
        f"Expected calibration error: {pooled.expected_calibration_error:.3f}; by tile {by_tile}",
        f"Glaciers, labelled areas held and median width; the margin of maps is {MARGINS['area']}:",
        coverage_table(pandas.concat(glaciers, ignore_index=True)),
        f"Sums over a tile, likewise; the margin of maps is {MARGINS['sum']}:",
        coverage_table(pandas.concat(sums, ignore_index=True)),
    ]
    write_text(arguments.out, "\n\n".join(sections) + "\n")
    print(f"{arguments.out}, {save_figure(draw_reliability(pooled), arguments.out.with_suffix('.png'))} written")
    return 0
