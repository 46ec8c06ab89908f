"""Scores of class maps against set-valued labels, from counts: Matthews correlation, IoU, precision, recall.

A label code stands for a set of classes (`prep.labels.CODE_CLASSES`), so two scores are taken:

- `binary`, the extent: glacier of either kind against the rest. Every code falls on one side of it, so all
  tiles count.
- `four_class`: the competition's classes, over pixels whose class is certain, on tiles whose labels tell
  debris from ice (`CERTAIN_LABELS`). A phase-1 tile has certain zeros but no certain glacier, so its zeros
  alone would add a million easy pixels of one class to the score.

Does the official score count nodata pixels? The organisers score all pixels of a tile, label nodata 0, and
the submission predicts 0 there. Each score is therefore given twice: `valid_pixels` leaves out those ignored,
and `all_pixels` counts them as other, predicted as other, whatever the network said. The first compares
models, the second is the one to hold against a leaderboard.

A score's doubt is that of its pixels' places: a tile is counted in blocks of about 3 km, and blocks are drawn
again with replacement. Blocks count as independent; they are not wholly so within a tile, so an interval says
little about regions that no tile shows.
"""

from __future__ import annotations

from typing import Callable, Iterable, Mapping, NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

from prep.labels import CODE_CLASSES, CODE_NAMES, GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from prep.store import TileStore
from prep.text import NONE
from solution import CLASS_NAMES

N_CODES = len(CODE_CLASSES)
N_CLASSES = len(CLASS_NAMES)
OTHER, GLACIER, DEBRIS, LAKE = range(N_CLASSES)
GLACIER_CODES = (GLACIER, DEBRIS, GLACIER_OR_DEBRIS)
REST_CODES = (OTHER, LAKE, OTHER_OR_LAKE)
BINARY_NAMES = ("rest", "glacier_any")
CERTAIN_LABELS = ("phase2", "partial")  # labels of tiles that the four-class score is taken on
BLOCK = 100  # px, 3 km: the side that a block comes closest to
DRAWS, SEED = 1000, 0  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles: 95 %


class TileCounts(NamedTuple):
    """What one tile adds to a score.

    `labels`: "phase1", "phase2", "partial" or "hkh". `blocks`: (B, 6, 4) int64, for each block rows of label
    codes and columns of predicted classes. `ignored`: pixels without a label.
    """

    tile_id: str
    fold: int
    labels: str
    blocks: np.ndarray
    ignored: int

    @property
    def confusion(self) -> np.ndarray:
        """The counts of the whole tile, (6, 4) int64."""
        return self.blocks.sum(axis=0)


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def interval_text(interval: Sequence[float] | None, sign: str = "") -> str:
    """Return (value, low, high) as "0.711 (0.690 to 0.731)"; with the sign "+" as a difference."""
    return NONE if interval is None else "{:{s}.3f} ({:{s}.3f} to {:{s}.3f})".format(*interval, s=sign)


# --- Counting -----------------------------------------------------------------------------------------------


def count_blocks(codes: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Count label code against predicted class in each block.

    Args:
        codes: label codes of any shape, 0-5, or 255 where the pixel is ignored.
        predicted: class indices 0-3, of the same shape.

    Returns:
        (B, 6, 4) int64 counts; rows are codes, columns classes. Counts pool by addition.

    Raises:
        ValueError: shapes differ, or a value is neither a code nor a class.
    """
    codes, predicted = np.asarray(codes), np.asarray(predicted)
    if codes.shape != predicted.shape:
        raise ValueError(f"labels have shape {codes.shape}, predictions {predicted.shape}; they must be equal")
    numbers = block_numbers(codes.shape)
    n_blocks = int(numbers.max(initial=0)) + 1
    labelled = codes != IGNORE
    codes, predicted = codes[labelled].astype(np.int64), predicted[labelled].astype(np.int64)
    _require_range("label codes", codes, N_CODES)
    _require_range("predicted classes", predicted, N_CLASSES)
    places = (numbers[labelled] * N_CODES + codes) * N_CLASSES + predicted
    counts = np.bincount(places, minlength=n_blocks * N_CODES * N_CLASSES)
    return counts.reshape(n_blocks, N_CODES, N_CLASSES).astype(np.int64)


def block_numbers(shape: Sequence[int]) -> np.ndarray:
    """Return the number of each pixel's block, int64; a tile of 512 x 512 px has 5 x 5 alike."""
    numbers = np.zeros((), np.int64)
    for length in shape:
        parts = max(1, round(length / BLOCK))
        numbers = np.add.outer(numbers * parts, np.arange(length) * parts // max(1, length))
    return numbers


def count_tile(tile_id: str, fold: int, labels: str, codes: np.ndarray, predicted: np.ndarray) -> TileCounts:
    """Count one tile: `codes` (H, W) label codes, `predicted` (H, W) class indices."""
    ignored = int(np.count_nonzero(np.asarray(codes) == IGNORE))
    return TileCounts(tile_id, fold, labels, count_blocks(codes, predicted), ignored)


def count_tiles(
    store: TileStore,
    tile_ids: Iterable[str],
    predict: Callable[[str], np.ndarray],
    fold_of: Mapping[str, int],
) -> list[TileCounts]:
    """Count tiles of a store; `predict` returns the class indices (H, W) of a tile by its id."""
    labels = store.labels
    shown = tqdm(tile_ids, desc="count", unit="tile", delay=2, leave=False, disable=None)
    return [count_tile(name, fold_of[name], labels[name], store.mask(name), predict(name)) for name in shown]


def pool(tiles: Sequence[TileCounts]) -> np.ndarray:
    """Add up the (6, 4) counts of some tiles over their labelled pixels."""
    return sum((tile.confusion for tile in tiles), np.zeros((N_CODES, N_CLASSES), dtype=np.int64))


def pool_all_pixels(tiles: Sequence[TileCounts]) -> np.ndarray:
    """Add up the (6, 4) counts of some tiles with every ignored pixel as other, predicted as other."""
    confusion = pool(tiles)
    confusion[OTHER, OTHER] += sum(tile.ignored for tile in tiles)
    return confusion


def with_certain_labels(tiles: Iterable[TileCounts]) -> list[TileCounts]:
    """Return the tiles that the four-class score is taken on."""
    return [tile for tile in tiles if tile.labels in CERTAIN_LABELS]


def code_names() -> tuple[str, ...]:
    """Return the names of the confusion matrix's rows, in their order."""
    return tuple(CODE_NAMES[code] for code in range(N_CODES))


# --- Scores of counts; counts may have any number of leading axes -------------------------------------------


def binary(confusion: np.ndarray) -> np.ndarray:
    """Reduce (..., 6, 4) coded counts to (..., 2, 2): index 1 is glacier of either kind, index 0 the rest."""
    sides = [confusion[..., codes, :].sum(axis=-2) for codes in (REST_CODES, GLACIER_CODES)]
    rows = np.stack(sides, axis=-2)  # (..., 2, 4)
    return np.stack([rows[..., kind].sum(axis=-1) for kind in ((OTHER, LAKE), (GLACIER, DEBRIS))], axis=-1)


def four_class(confusion: np.ndarray) -> np.ndarray:
    """Return the (..., 4, 4) rows of certain labels of (..., 6, 4) coded counts."""
    return confusion[..., :N_CLASSES, :]


def mcc(confusion: np.ndarray) -> float:
    """Return `correlations` of one matrix of (K, K) counts."""
    return float(correlations(confusion))


def correlations(confusion: np.ndarray) -> np.ndarray:
    """Return the multiclass Matthews correlation (Gorodkin 2004) of (..., K, K) counts, (...) float64.

    0 where it is undefined (one class only among labels or predictions, or no pixels), as in scikit-learn.
    """
    counts = np.asarray(confusion, dtype=np.float64)  # products of sums exceed 64-bit integers
    labelled, predicted = counts.sum(axis=-1), counts.sum(axis=-2)
    total, correct = labelled.sum(axis=-1), np.trace(counts, axis1=-2, axis2=-1)
    covariance = correct * total - (labelled * predicted).sum(axis=-1)
    spread = [total**2 - (sums**2).sum(axis=-1) for sums in (labelled, predicted)]
    product = np.asarray(spread[0] * spread[1])
    return np.divide(covariance, np.sqrt(product), out=np.zeros(product.shape), where=product > 0)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Return intersection over union by class of (..., K, K) counts; NaN for a class that is nowhere."""
    hits = _hits(confusion)
    return _ratio(hits, confusion.sum(axis=-2) + confusion.sum(axis=-1) - hits)


def precision(confusion: np.ndarray) -> np.ndarray:
    """Return the share of each predicted class that is right, (..., K); NaN where none is predicted."""
    return _ratio(_hits(confusion), confusion.sum(axis=-2))


def recall(confusion: np.ndarray) -> np.ndarray:
    """Return the share of each labelled class that is found, (..., K); NaN for a class without labels."""
    return _ratio(_hits(confusion), confusion.sum(axis=-1))


def debris_iou(confusion: np.ndarray) -> np.ndarray:
    """Return the IoU of debris over pixels of certain class, of (..., 6, 4) counts; NaN without debris."""
    return iou(four_class(confusion))[..., DEBRIS]


def score_tiles(tiles: Sequence[TileCounts]) -> dict:
    """Score the pooled pixels of some tiles: all of them, those of a fold, or a single one.

    Returns:
        {"valid_pixels": {"binary": s, "four_class": s}, "all_pixels": the same with ignored pixels as correct
        other}, where s is {"mcc", "iou", "precision", "recall"} (the last three keyed by class) and None for
        four_class where no tile has certain labels. Undefined ratios are None: the dict is valid JSON.
    """
    certain = with_certain_labels(tiles)
    return {
        "valid_pixels": _both_scores(pool(tiles), pool(certain), len(certain)),
        "all_pixels": _both_scores(pool_all_pixels(tiles), pool_all_pixels(certain), len(certain)),
    }


# --- The doubt of a score -----------------------------------------------------------------------------------

# The scores that are given with an interval: what each is of (6, 4) counts, and of which tiles.
HEADLINES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[Iterable[TileCounts]], list]]] = {
    "extent MCC": (lambda counts: correlations(binary(counts)), list),
    "four-class MCC": (lambda counts: correlations(four_class(counts)), with_certain_labels),
    "debris IoU": (debris_iou, with_certain_labels),
}


def resample(tiles: Sequence[TileCounts]) -> np.ndarray:
    """Return the pooled counts of `DRAWS` draws of the tiles' blocks with replacement, (draws, 6, 4) int64.

    The same tiles in the same order give the same draws: those of two models are pairs.
    """
    blocks = np.concatenate([tile.blocks for tile in tiles])
    shares = np.full(len(blocks), 1 / len(blocks))
    times = np.random.default_rng(SEED).multinomial(len(blocks), shares, DRAWS)  # (draws, B)
    return np.tensordot(times, blocks, axes=1)


def score_intervals(tiles: Sequence[TileCounts]) -> dict[str, Interval | None]:
    """Return each of `HEADLINES` over valid pixels with its bootstrap interval; None where undefined."""
    return {
        name: _interval(score(pool(chosen)), score(resample(chosen))) if (chosen := choose(tiles)) else None
        for name, (score, choose) in HEADLINES.items()
    }


def difference_intervals(tiles: Sequence[TileCounts], others: Sequence[TileCounts]) -> dict[str, Interval | None]:
    """Return `tiles` less `others`, the counts of another model, in each of `HEADLINES`; the draws are pairs.

    Both are of the same tiles in the same order. None where a score is undefined.
    """
    if [tile.tile_id for tile in tiles] != [tile.tile_id for tile in others]:
        raise ValueError("the two models are counted on different tiles; expected the same in the same order")
    differences: dict[str, Interval | None] = {}
    for name, (score, choose) in HEADLINES.items():
        pair = choose(tiles), choose(others)
        pooled, drawn = ([score(count(side)) for side in pair if side] for count in (pool, resample))
        differences[name] = _interval(pooled[0] - pooled[1], drawn[0] - drawn[1]) if pooled else None
    return differences


def _interval(value: np.ndarray, drawn: np.ndarray) -> Interval | None:
    if not np.isfinite(value):
        return None
    low, high = np.nanpercentile(drawn, INTERVAL)
    return Interval(float(value), float(low), float(high))


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


def _hits(confusion: np.ndarray) -> np.ndarray:
    return np.diagonal(confusion, axis1=-2, axis2=-1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _require_range(what: str, values: np.ndarray, end: int) -> None:
    if values.size and (values.min() < 0 or values.max() >= end):
        found = np.unique(values[(values < 0) | (values >= end)])[:8].tolist()
        raise ValueError(f"{what} must lie in 0..{end - 1}; found {found}")
