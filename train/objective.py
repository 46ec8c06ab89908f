"""Scores of class maps against set-valued labels, from counts: Matthews correlation, IoU, precision, recall.

A label code stands for a set of classes (`prep.labels.CODE_CLASSES`), so two scores are taken:

- `binary`: glacier of either kind against the rest. Every code falls on one side of it, so all tiles count.
- `four_class`: the competition's classes, on tiles with phase-2 labels only. A phase-1 tile has certain zeros
  but no certain glacier, so its zeros alone would add a million easy pixels of one class to the score.

Does the official score count nodata pixels? The organisers score all pixels of a tile, label nodata 0, and
the submission predicts 0 there. Each score is therefore given twice: `valid_pixels` leaves out those ignored,
and `all_pixels` counts them as other, predicted as other, whatever the network said. The first compares
models, the second is the one to hold against a leaderboard.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import numpy as np

from prep.labels import CODE_CLASSES, CODE_NAMES, GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from solution import CLASS_NAMES

N_CODES = len(CODE_CLASSES)
N_CLASSES = len(CLASS_NAMES)
OTHER, GLACIER, DEBRIS, LAKE = range(N_CLASSES)
GLACIER_CODES = (GLACIER, DEBRIS, GLACIER_OR_DEBRIS)
REST_CODES = (OTHER, LAKE, OTHER_OR_LAKE)
BINARY_NAMES = ("rest", "glacier_any")


class TileCounts(NamedTuple):
    """What one tile adds to a score.

    `confusion`: (6, 4) int64, rows label codes, columns predicted classes. `ignored`: pixels without a label.
    `labels`: "phase1" or "phase2".
    """

    tile_id: str
    fold: int
    labels: str
    confusion: np.ndarray
    ignored: int


def confusion_matrix(codes: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Count label code against predicted class.

    Args:
        codes: label codes of any shape, 0-5, or 255 where the pixel is ignored.
        predicted: class indices 0-3, of the same shape.

    Returns:
        (6, 4) int64 counts; rows are codes, columns classes. Matrices of several tiles pool by addition.

    Raises:
        ValueError: shapes differ, or a value is neither a code nor a class.
    """
    codes, predicted = np.asarray(codes), np.asarray(predicted)
    if codes.shape != predicted.shape:
        raise ValueError(
            f"labels have shape {codes.shape}, predictions {predicted.shape}; they must be equal"
        )
    labelled = codes != IGNORE
    codes, predicted = codes[labelled].astype(np.int64), predicted[labelled].astype(np.int64)
    _require_range("label codes", codes, N_CODES)
    _require_range("predicted classes", predicted, N_CLASSES)
    counts = np.bincount(codes * N_CLASSES + predicted, minlength=N_CODES * N_CLASSES)
    return counts.reshape(N_CODES, N_CLASSES).astype(np.int64)


def binary(confusion: np.ndarray) -> np.ndarray:
    """Reduce (6, 4) coded counts to (2, 2): index 1 is glacier of either kind, index 0 the rest."""
    rows = np.stack(
        [confusion[list(REST_CODES)].sum(axis=0), confusion[list(GLACIER_CODES)].sum(axis=0)]
    )  # (2, 4)
    return np.stack([rows[:, [OTHER, LAKE]].sum(axis=1), rows[:, [GLACIER, DEBRIS]].sum(axis=1)], axis=1)


def four_class(confusion: np.ndarray) -> np.ndarray:
    """Return the (4, 4) rows of certain labels of (6, 4) coded counts of tiles with phase-2 labels."""
    return confusion[:N_CLASSES]


def mcc(confusion: np.ndarray) -> float:
    """Return the multiclass Matthews correlation (Gorodkin 2004) of (K, K) counts.

    The sums are exact Python integers: their products exceed 64 bits for a few tiles. 0 where it is undefined
    (one class only among labels or predictions, or no pixels), as in scikit-learn.
    """
    counts = [[int(value) for value in row] for row in confusion]
    labelled = [sum(row) for row in counts]
    predicted = [sum(column) for column in zip(*counts)]
    correct, total = sum(row[index] for index, row in enumerate(counts)), sum(labelled)
    covariance = correct * total - sum(t * p for t, p in zip(labelled, predicted))
    variances = (total**2 - sum(t * t for t in labelled)) * (total**2 - sum(p * p for p in predicted))
    return covariance / math.sqrt(variances) if variances else 0.0


def iou(confusion: np.ndarray) -> np.ndarray:
    """Return intersection over union per class of (K, K) counts, float64; NaN for a class that is nowhere."""
    hits = np.diag(confusion)
    return _ratio(hits, confusion.sum(axis=0) + confusion.sum(axis=1) - hits)


def precision(confusion: np.ndarray) -> np.ndarray:
    """Return the share of each predicted class that is right, (K,) float64; NaN where none is predicted."""
    return _ratio(np.diag(confusion), confusion.sum(axis=0))


def recall(confusion: np.ndarray) -> np.ndarray:
    """Return the share of each labelled class that is found, (K,) float64; NaN for a class without labels."""
    return _ratio(np.diag(confusion), confusion.sum(axis=1))


def count_tile(tile_id: str, fold: int, labels: str, codes: np.ndarray, predicted: np.ndarray) -> TileCounts:
    """Count one tile: `codes` (H, W) label codes, `predicted` (H, W) class indices."""
    ignored = int(np.count_nonzero(np.asarray(codes) == IGNORE))
    return TileCounts(tile_id, fold, labels, confusion_matrix(codes, predicted), ignored)


def score_tiles(tiles: Sequence[TileCounts]) -> dict:
    """Score the pooled pixels of some tiles: all of them, those of a fold, or a single one.

    Returns:
        {"valid_pixels": {"binary": s, "four_class": s}, "all_pixels": the same with ignored pixels as correct
        other}, where s is {"mcc", "iou", "precision", "recall"} (the last three keyed by class) and None for
        four_class where no tile has phase-2 labels. Undefined ratios are None: the dict is valid JSON.
    """
    phase2 = [tile for tile in tiles if tile.labels == "phase2"]
    return {
        "valid_pixels": _both_scores(pool(tiles), pool(phase2), len(phase2)),
        "all_pixels": _both_scores(pool_all_pixels(tiles), pool_all_pixels(phase2), len(phase2)),
    }


def jackknife_error(without: Sequence[float]) -> float:
    """Return the standard error of a score from what it is without each tile in turn; NaN below two tiles."""
    return float(np.std(without) * np.sqrt(len(without) - 1)) if len(without) > 1 else math.nan


def pool(tiles: Sequence[TileCounts]) -> np.ndarray:
    """Add up the (6, 4) counts of some tiles over their labelled pixels."""
    return sum((tile.confusion for tile in tiles), np.zeros((N_CODES, N_CLASSES), dtype=np.int64))


def pool_all_pixels(tiles: Sequence[TileCounts]) -> np.ndarray:
    """Add up the (6, 4) counts of some tiles with every ignored pixel as other, predicted as other."""
    confusion = pool(tiles)
    confusion[OTHER, OTHER] += sum(tile.ignored for tile in tiles)
    return confusion


def code_names() -> tuple[str, ...]:
    """Return the names of the confusion matrix's rows, in their order."""
    return tuple(CODE_NAMES[code] for code in range(N_CODES))


def _both_scores(confusion: np.ndarray, certain: np.ndarray, n_certain: int) -> dict:
    return {
        "binary": _scores(binary(confusion), BINARY_NAMES),
        "four_class": _scores(four_class(certain), CLASS_NAMES) if n_certain else None,
    }


def _scores(confusion: np.ndarray, names: Sequence[str]) -> dict:
    by_class = {"iou": iou(confusion), "precision": precision(confusion), "recall": recall(confusion)}
    return {"mcc": mcc(confusion)} | {
        score: {name: None if np.isnan(value) else float(value) for name, value in zip(names, values)}
        for score, values in by_class.items()
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _require_range(what: str, values: np.ndarray, end: int) -> None:
    if values.size and (values.min() < 0 or values.max() >= end):
        found = np.unique(values[(values < 0) | (values >= end)])[:8].tolist()
        raise ValueError(f"{what} must lie in 0..{end - 1}; found {found}")
