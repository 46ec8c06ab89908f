"""Scores of a folder of masks, written by this kit or any other entry, against labels of either phase."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional, Sequence

import numpy as np
import pandas

from prep import label_files
from prep.label_files import LabelFile, Labels
from prep.labels import GLACIER_OR_DEBRIS, IGNORE
from prep.store import name_some
from prep.text import NONE
from solution import CLASS_NAMES, InputError, TileError, TileFiles, find_tiles, read_tile, valid_mask, warn
from train.masks.files import EXTENT, MEANING, Masks, raise_problems, read_classes, survey_masks
from train.masks.georeference import describe
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
    """Counts of one tile, over all pixels and over those with data, and the pixels without data that the mask gives
    a class; None where the bands are not known."""

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
    bands = {tile.tile_id: tile for tile in find_tiles(data)} if data else None
    pairs = dict(sorted(match(masks, known, bands, tiles).items()))
    counted = {tile: count_pair(pair, masks.values) for tile, pair in pairs.items()}
    everywhere = [counts.everywhere for counts in counted.values()]
    valid = [counts.valid for counts in counted.values() if counts.valid]
    by_tile = {tile: _tile_entry(counts, pairs[tile]) for tile, counts in counted.items()}
    phase2 = [tile for tile in everywhere if tile.labels == "phase2"]
    return {
        "pred": str(pred),
        "labels": str(labels),
        "values": masks.values,
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


def match(masks: Masks, labels: Labels, bands: Optional[dict[str, TileFiles]], tiles: Sequence[str]) -> dict[str, Pair]:
    """Return {tile id: pair} of the labels and their masks; warn of masks that nothing is known about.

    Raises:
        InputError: a label without a mask, a size that differs, a tile asked for that has no label.
    """
    wanted, problems = list(tiles) or sorted(labels.files), []
    no_label = [tile for tile in wanted if tile not in labels.files]
    no_mask = [tile for tile in wanted if tile in labels.files and tile not in masks.files]
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
    unknown = sorted(set(masks.files) - set(labels.files))
    if unknown and not problems:
        warn(f"{len(unknown)} masks have no label and are not scored: {name_some(unknown)}")
    pairs = {}
    for tile in set(wanted) - set(no_label) - set(no_mask):
        label, mask = labels.files[tile], masks.files[tile]
        pairs[tile] = Pair(label, labels.phases[tile], mask, bands.get(tile) if bands else None)
        if mask.shape != label.shape:
            found, expected = describe(mask.shape), describe(label.shape)
            problems.append(f"{mask.path}: {found}, expected {expected} as in {label.path}; write it at that size")
        if bands is not None and tile not in bands:
            problems.append(f"tile {tile}: not among the bands given; add it, or leave --data out")
    raise_problems(sorted(problems))
    return pairs


def count_pair(pair: Pair, values: str) -> PairCounts:
    """Count a tile's label codes against the mask's classes.

    Where the mask knows an extent only, the label's classes are reduced to it.
    """
    codes = label_files.to_codes(label_files.read_label(pair.label.path), pair.phase)
    predicted, phase, tile = read_classes(pair.mask, values), pair.phase, pair.label.tile_id
    if values == EXTENT:
        phase, glacier = "phase1", np.isin(codes, GLACIER_CODES)
        codes = np.where(glacier, GLACIER_OR_DEBRIS, OTHER).astype(np.uint8)
    everywhere = count_tile(tile, 0, phase, codes, predicted)
    if pair.bands is None:
        return PairCounts(everywhere, None, 0)
    try:
        nodata = ~valid_mask(read_tile(pair.bands))
    except TileError as error:
        raise InputError(str(error)) from error
    if nodata.shape != codes.shape:
        found, expected = describe(nodata.shape), describe(codes.shape)
        raise InputError(f"{pair.bands.name}: {found}, expected {expected} as in {pair.label.path}; give its bands")
    valid = count_tile(tile, 0, phase, np.where(nodata, IGNORE, codes).astype(np.uint8), predicted)
    return PairCounts(everywhere, valid, int(np.count_nonzero(predicted[nodata])))


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
    tables = [_mcc_table(scores), _class_table(scores)]
    tables += [_confusion_table(scores, task) for task in TASKS if scores["confusion"][task]]
    tables.append(_tile_table(scores))
    return "\n\n".join([_head(scores), *[t.to_string(float_format="{:.4f}".format, na_rep=NONE) for t in tables]])


def _head(scores: dict) -> str:
    lines = [f"{scores['pred']} against {scores['labels']}: {scores['tiles']} tiles"]
    if scores["values"] == EXTENT:
        lines.append(f"The masks are read as {MEANING[EXTENT]}; as four classes their 255 would be lakes.")
    marked = sum(entry["marked_nodata"] for entry in scores["by_tile"].values())
    if marked:
        lines.append(f"{marked:,} px without data have a class in the masks; labels have 0 there.")
    return "\n".join(lines)


def _mcc_table(scores: dict) -> pandas.DataFrame:
    rows = {}
    for task in TASKS:
        if scores["all_pixels"][task]:
            rows[TASK_NAMES[task]] = {
                "MCC, all pixels": scores["all_pixels"][task]["mcc"],
                "mean of tiles": scores["mean_of_tiles"][task],
                "tiles": sum(bool(entry["all_pixels"][task]) for entry in scores["by_tile"].values()),
            }
            if scores["valid_pixels"]:
                rows[TASK_NAMES[task]]["pixels with data"] = scores["valid_pixels"][task]["mcc"]
    return pandas.DataFrame.from_dict(rows, orient="index")


def _class_table(scores: dict) -> pandas.DataFrame:
    four, extent = (scores["all_pixels"][task] for task in TASKS)
    keys, kind = {"iou": "IoU", "precision": "precision", "recall": "recall"}, "glacier of either kind"
    rows = {name: {text: four[key][name] for key, text in keys.items()} for name in CLASS_NAMES if four}
    rows[kind] = {text: extent[key][BINARY_NAMES[1]] for key, text in keys.items()}
    return pandas.DataFrame.from_dict(rows, orient="index", dtype=float)


def _confusion_table(scores: dict, task: str) -> pandas.DataFrame:
    names = CLASS_NAMES if task == "four_class" else ("rest", "glacier")
    counts = pandas.DataFrame(scores["confusion"][task], index=names, columns=names).map("{:,}".format)
    return counts.rename_axis(columns=f"{TASK_NAMES[task]}: label \\ mask, px")


def _tile_table(scores: dict) -> pandas.DataFrame:
    rows = {}
    for tile, entry in scores["by_tile"].items():
        four, extent = (entry["all_pixels"][task] for task in TASKS)
        rows[tile] = {
            "labels": entry["labels"],
            "MCC four classes": four["mcc"] if four else np.nan,
            "MCC extent": extent["mcc"],
            "IoU extent": extent["iou"][BINARY_NAMES[1]],
            "glacier in label": f"{entry['share_labelled']:.1%}",
            "in mask": f"{entry['share_masked']:.1%}",
        }
    return pandas.DataFrame.from_dict(rows, orient="index")
