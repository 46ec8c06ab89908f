"""Scores of a folder of masks, written by this kit or any other entry, against labels of either phase."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional, Sequence

import numpy as np

from prep import label_files
from prep.files import write_json
from prep.label_files import LabelFile, Labels
from prep.labels import GLACIER_OR_DEBRIS, IGNORE
from prep.store import name_some
from prep.text import number_text
from solution import CLASS_NAMES, InputError, TileError, TileFiles, find_tiles, read_tile, valid_mask, warn
from train.masks.files import EXTENT, MEANING, Masks, raise_problems, read_classes, survey_masks
from train.objective import (
    BINARY_NAMES,
    GLACIER_CODES,
    OTHER,
    TileCounts,
    binary,
    count_tile,
    four_class,
    pool,
    score_tiles,
)

TASKS = ("four_class", "binary")
TASK_NAMES = {"four_class": "four classes", "binary": "glacier extent"}


class Pair(NamedTuple):
    """A tile's label and mask, the label's phase, and the tile's bands where they are known."""

    label: LabelFile
    phase: str
    mask: LabelFile
    bands: Optional[TileFiles]


class PairCounts(NamedTuple):
    """Counts of one tile: over all pixels, over those with data (None where the bands are not known), and
    the pixels without data that the mask gives a class."""

    everywhere: TileCounts
    valid: Optional[TileCounts]
    marked_nodata: int


# --- Scoring --------------------------------------------------------------------------------------


def score_masks(
    pred: Path,
    labels: Path,
    *,
    phase: Optional[str] = None,
    values: Optional[str] = None,
    data: Optional[Path] = None,
    tiles: Sequence[str] = (),
) -> dict:
    """Score a folder of masks as the organisers do: all pixels of all tiles pooled, nodata labelled 0.

    Args:
        pred: masks, one PNG or TIFF a tile, matched to labels by tile id.
        labels: a folder of label files, or one that holds label/, label_phase2/ or both (phase 2 first).
        phase: of the labels, "phase1" or "phase2"; None to tell it by their values.
        values: what the masks hold, `mask_files.CLASSES` or `mask_files.EXTENT`; None to tell it.
        data: Band1 ... Band5 of the same tiles, for scores without nodata beside those of all pixels.
        tiles: ids of the tiles to score; none for all that have a label.

    Returns:
        {"pred", "labels", "values", "tiles": how many, "all_pixels": s, "valid_pixels": s or None,
        "mean_of_tiles": {task: MCC}, "confusion": {task: counts, rows labels}, "by_tile": {tile id:
        {"labels", "mask", "all_pixels": s, "valid_pixels", "marked_nodata", "share_labelled",
        "share_masked"}}}, where s is what `metrics.score_tiles` returns: {"binary", "four_class"}, the latter
        None without phase-2 labels or where the masks know an extent only. Shares are of glacier of either
        kind, 0 to 1.

    Raises:
        InputError: lists every problem: labels without a mask, unlike sizes, unknown values.
    """
    masks = survey_masks(pred, values)
    known = read_label_set(labels, phase)
    bands = {tile.tile_id: tile for tile in find_tiles(data)} if data else {}
    pairs = match(masks, known, bands if data else None, tiles)
    counted = {identifier: count_pair(pair, masks.values) for identifier, pair in sorted(pairs.items())}
    return summarise(counted, pairs, {"pred": str(pred), "labels": str(labels), "values": masks.values})


def read_label_set(folder: Path, phase: Optional[str]) -> Labels:
    """Return the labels of a folder, or of label/, label_partial/ and label_phase2/ in it.

    Raises:
        InputError: there are none, or some cannot be right.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected label files, or label/ and label_phase2/")
    inside = [folder / name for name in label_files.LABEL_FOLDERS if (folder / name).is_dir()]
    labels = label_files.read_labels(inside or [folder], phase)
    raise_problems(labels.problems)
    if not labels.files:
        raise InputError(f"{folder}: no label found; expected TIFF or PNG files in it, or in label/ in it")
    return labels


def match(
    masks: Masks, labels: Labels, bands: Optional[dict[str, TileFiles]], tiles: Sequence[str]
) -> dict[str, Pair]:
    """Return {tile id: pair} of the labels and their masks; warn of masks that nothing is known about.

    Raises:
        InputError: a label without a mask, a size that differs, a tile asked for that has no label.
    """
    wanted = list(tiles) or sorted(labels.files)
    problems = _unmatched(masks, labels, wanted)
    unknown = sorted(set(masks.files) - set(labels.files))
    if unknown and not problems:
        warn(f"{len(unknown)} masks have no label and are not scored: {name_some(unknown)}")
    both = [tile for tile in wanted if tile in labels.files and tile in masks.files]
    pairs = {
        tile: Pair(labels.files[tile], labels.phases[tile], masks.files[tile], (bands or {}).get(tile))
        for tile in both
    }
    problems += [fault for pair in pairs.values() if (fault := _size_fault(pair))]
    problems += [
        f"tile {tile}: not among the bands given, which tell where data are missing; add it, or leave "
        "--data out"
        for tile in both
        if bands is not None and tile not in bands
    ]
    raise_problems(problems)
    return pairs


def _unmatched(masks: Masks, labels: Labels, wanted: Sequence[str]) -> list[str]:
    """Return one message for all labels without a mask, and one for all tiles without a label."""
    no_label = [tile for tile in wanted if tile not in labels.files]
    no_mask = [tile for tile in wanted if tile in labels.files and tile not in masks.files]
    problems = []
    if no_label:
        there = name_some(sorted(labels.files))
        problems.append(f"no label of {name_some(no_label)}; there are labels of {there}")
    if no_mask:
        folder = next(iter(masks.files.values())).path.parent
        problems.append(
            f"{folder}: no mask of {len(no_mask)} labelled tiles ({name_some(no_mask)}), expected one a "
            f"label, found masks of {name_some(sorted(masks.files))}; write the missing ones, rename those "
            "found so that they end in the tile id, or score some tiles only with --tiles"
        )
    return problems


def _size_fault(pair: Pair) -> Optional[str]:
    if pair.mask.shape == pair.label.shape:
        return None
    found, expected = (f"{shape[1]} x {shape[0]} px" for shape in (pair.mask.shape, pair.label.shape))
    return f"{pair.mask.path}: {found}, expected {expected} as in {pair.label.path}; write it at that size"


def count_pair(pair: Pair, values: str) -> PairCounts:
    """Count a tile's label codes against the mask's classes.

    Where the mask knows an extent only, the label's classes are reduced to it.
    """
    codes = label_files.to_codes(label_files.read_label(pair.label.path), pair.phase)
    predicted = read_classes(pair.mask, values)
    phase = pair.phase
    if values == EXTENT:
        codes, phase = reduce_to_extent(codes), "phase1"
    identifier = pair.label.tile_id
    everywhere = count_tile(identifier, 0, phase, codes, predicted)
    if pair.bands is None:
        return PairCounts(everywhere, None, 0)
    nodata = ~_valid_pixels(pair)
    marked = int(np.count_nonzero(predicted[nodata]))
    valid = count_tile(identifier, 0, phase, np.where(nodata, IGNORE, codes).astype(np.uint8), predicted)
    return PairCounts(everywhere, valid, marked)


def reduce_to_extent(codes: np.ndarray) -> np.ndarray:
    """Return label codes (H, W) as glacier of either kind or other, uint8."""
    return np.where(np.isin(codes, GLACIER_CODES), GLACIER_OR_DEBRIS, OTHER).astype(np.uint8)


def _valid_pixels(pair: Pair) -> np.ndarray:
    """Return (H, W) bool: where any of the tile's bands has a value."""
    assert pair.bands is not None
    try:
        valid = valid_mask(read_tile(pair.bands))
    except TileError as error:
        raise InputError(str(error)) from error
    if valid.shape != pair.label.shape:
        raise InputError(
            f"tile {pair.label.tile_id}: bands of {valid.shape[1]} x {valid.shape[0]} px, expected "
            f"{pair.label.shape[1]} x {pair.label.shape[0]} px as in {pair.label.path}; give the bands of "
            "the labels"
        )
    return valid


def summarise(counted: dict[str, PairCounts], pairs: dict[str, Pair], about: dict) -> dict:
    """Return what `score_masks` returns."""
    everywhere = [counts.everywhere for counts in counted.values()]
    valid = [counts.valid for counts in counted.values() if counts.valid]
    by_tile = {tile: _tile_entry(counts, pairs[tile]) for tile, counts in counted.items()}
    phase2 = [tile for tile in everywhere if tile.labels == "phase2"]
    return {
        **about,
        "tiles": len(counted),
        "all_pixels": score_tiles(everywhere)["all_pixels"],
        "valid_pixels": score_tiles(valid)["valid_pixels"] if valid else None,
        "mean_of_tiles": {task: _mean_mcc(by_tile, task) for task in TASKS},
        "confusion": {
            "four_class": four_class(pool(phase2)).tolist() if phase2 else None,
            "binary": binary(pool(everywhere)).tolist(),
        },
        "by_tile": by_tile,
    }


def _tile_entry(counts: PairCounts, pair: Pair) -> dict:
    extent = binary(counts.everywhere.confusion)
    return {
        "labels": pair.phase,
        "mask": pair.mask.path.name,
        "all_pixels": score_tiles([counts.everywhere])["all_pixels"],
        "valid_pixels": score_tiles([counts.valid])["valid_pixels"] if counts.valid else None,
        "marked_nodata": counts.marked_nodata,
        "share_labelled": float(extent[1].sum() / extent.sum()),
        "share_masked": float(extent[:, 1].sum() / extent.sum()),
    }


def _mean_mcc(by_tile: dict, task: str) -> Optional[float]:
    scores = [entry["all_pixels"][task]["mcc"] for entry in by_tile.values() if entry["all_pixels"][task]]
    return float(np.mean(scores)) if scores else None


# --- The table ------------------------------------------------------------------------------------


def format_scores(scores: dict) -> str:
    """Return the scores as text for a terminal: MCC, classes, confusion, tiles."""
    sections = [_head(scores), _mcc_table(scores), _class_table(scores)]
    sections += [_confusion_table(scores, task) for task in TASKS if scores["confusion"][task]]
    return "\n\n".join([*sections, _tile_table(scores)])


def _head(scores: dict) -> str:
    lines = [f"{scores['pred']} against {scores['labels']}: {scores['tiles']} tiles"]
    if scores["values"] == EXTENT:
        lines.append(f"The masks are read as {MEANING[EXTENT]}; as four classes their 255 would be lakes.")
    marked = sum(entry["marked_nodata"] for entry in scores["by_tile"].values())
    if marked:
        lines.append(f"{marked:,} px without data have a class in the masks; labels have 0 there.")
    return "\n".join(lines)


def _mcc_table(scores: dict) -> str:
    head = ["MCC", "all pixels", "mean of tiles", "tiles"]
    head += ["pixels with data"] if scores["valid_pixels"] else []
    rows = []
    for task in TASKS:
        if not scores["all_pixels"][task]:
            continue
        having = sum(bool(entry["all_pixels"][task]) for entry in scores["by_tile"].values())
        row = [TASK_NAMES[task], number_text(scores["all_pixels"][task]["mcc"], 4)]
        row += [number_text(scores["mean_of_tiles"][task], 4), str(having)]
        row += [number_text(scores["valid_pixels"][task]["mcc"], 4)] if scores["valid_pixels"] else []
        rows.append(row)
    return text_table(head, rows)


def _class_table(scores: dict) -> str:
    pooled, rows = scores["all_pixels"], []
    for task, names in (("four_class", CLASS_NAMES), ("binary", BINARY_NAMES[1:])):
        for name in names if pooled[task] else ():
            label = "glacier of either kind" if task == "binary" else name
            rows.append(
                [label, *[number_text(pooled[task][key][name], 3) for key in ("iou", "precision", "recall")]]
            )
    return text_table(["class, all pixels", "IoU", "precision", "recall"], rows)


def _confusion_table(scores: dict, task: str) -> str:
    names = CLASS_NAMES if task == "four_class" else ("rest", "glacier")
    rows = [[name, *[f"{n:,}" for n in row]] for name, row in zip(names, scores["confusion"][task])]
    return text_table([f"{TASK_NAMES[task]}: label \\ mask, px", *names], rows)


def _tile_table(scores: dict) -> str:
    head = ["tile", "labels", "MCC four classes", "MCC extent", "IoU extent", "glacier in label", "in mask"]
    rows = []
    for tile, entry in scores["by_tile"].items():
        pooled = entry["all_pixels"]
        four = number_text(pooled["four_class"]["mcc"], 3) if pooled["four_class"] else ""
        extent = [pooled["binary"]["mcc"], pooled["binary"]["iou"][BINARY_NAMES[1]]]
        shares = [f"{entry[key]:.1%}" for key in ("share_labelled", "share_masked")]
        rows.append([tile, entry["labels"], four, *[number_text(value, 3) for value in extent], *shares])
    return text_table(head, rows)


def write_scores(scores: dict, path: Path) -> None:
    """Write all figures as JSON."""
    write_json(path, scores)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows below a head as text: the first column to the left, the others to the right."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]])
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
