"""Folders of masks, whoever wrote them: found by tile id, checked, and read as class indices."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Sequence

import numpy as np

from prep import label_files
from prep.label_files import LabelFile
from solution import CLASS_VALUES, InputError, TileError, TileFiles
from train.masks.georeference import describe
from train.objective import GLACIER, OTHER

# What the values of a folder of masks stand for: "classes" is 0, 85, 170, 255; "extent" is 0 and 255 as in
# phase 1, where 255 is glacier of either kind.
CLASSES, EXTENT = "classes", "extent"
VALUES_OPTIONS = {"auto": None, "extent": EXTENT, "classes": CLASSES}
MEANING = {CLASSES: label_files.SCHEMES["phase2"], EXTENT: label_files.SCHEMES["phase1"]}
PHASE_OF = {CLASSES: "phase2", EXTENT: "phase1"}
MOST_PROBLEMS = 10  # that a message lists


class Masks(NamedTuple):
    """A folder of masks: its files by tile id, and what their values stand for (CLASSES or EXTENT)."""

    files: Mapping[str, LabelFile]
    values: str


def survey_masks(folder: Path, values: Optional[str] = None) -> Masks:
    """Read a folder of masks, TIFF or PNG, and check what is in it.

    Args:
        folder: searched without its subfolders.
        values: CLASSES or EXTENT; None to tell it: classes where 85 or 170 occurs in any mask or where 255
            covers so little that it can be lakes.

    Raises:
        InputError: lists every problem: no masks, unreadable ones, two for a tile, unknown values.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected masks, one PNG or TIFF a tile")
    masks, problems = label_files.survey(folder)
    values = values or tell_values(masks)
    problems += [fault for mask in masks if (fault := _value_fault(mask, values))]
    if not masks and not problems:
        problems = [f"{folder}: no PNG or TIFF in it; write masks with `python solution.py IN {folder}`"]
    raise_problems(problems)
    return Masks({mask.tile_id: mask for mask in masks}, values)


def tell_values(masks: Sequence[LabelFile]) -> str:
    """Return EXTENT where 255 covers more than lakes can and neither 85 nor 170 occurs, else CLASSES."""
    return EXTENT if not label_files.has_glaciers(masks) and label_files.is_disguised(masks) else CLASSES


def read_classes(mask: LabelFile, values: str) -> np.ndarray:
    """Return a mask as class indices, (H, W) uint8; of EXTENT masks, 255 becomes clean glacier."""
    pixels = label_files.read_label(mask.path)
    if values == EXTENT:
        return np.where(pixels == 255, GLACIER, OTHER).astype(np.uint8)
    return label_files.to_codes(pixels, "phase2")


def read_mask(masks: Path, tile: TileFiles, shape: Sequence[int]) -> np.ndarray:
    """Return the class indices (H, W) uint8 of the mask of a tile of this shape, found in a folder by its tile id.

    Raises:
        InputError: there is none, two have this id, or it has other values than a mask's or another size.
    """
    found, twice = label_files.list_files(masks)
    raise_problems(twice)
    path = found.get(tile.tile_id)
    if path is None:
        raise InputError(
            f"{masks}: no mask for {tile.name} (tile id {tile.tile_id}); write it with `python solution.py`"
        )
    try:
        pixels = label_files.read_label(path)
    except TileError as error:
        raise InputError(str(error)) from error
    if not all(
        np.isin(row, CLASS_VALUES).all() for row in pixels
    ):  # a scene at once takes eight bytes a pixel
        raise InputError(f"{path}: is no mask, expected one band of the values {CLASS_VALUES}")
    if pixels.shape != tuple(shape):
        raise InputError(
            f"{path}: {describe(pixels.shape)}, expected {describe(shape)} as in {tile.name}; write it at that size"
        )
    return label_files.to_codes(pixels, "phase2")


def raise_problems(problems: Sequence[str]) -> None:
    """Raise InputError with `problems`, one a line, if there are any."""
    if problems:
        more = "".join(f"\n  - {problem}" for problem in problems[:MOST_PROBLEMS])
        more += f"\n  and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise InputError(problems[0] if len(problems) == 1 else f"{len(problems)} problems:{more}")


def _value_fault(mask: LabelFile, values: str) -> Optional[str]:
    """Return what is wrong with the values of a mask, else None."""
    foreign = {
        value: count
        for value, count in mask.counts.items()
        if value not in label_files.VALUE_CODES[PHASE_OF[values]]
    }
    if not foreign:
        return None
    remedy = "write the mask with these values"
    if set(mask.counts) <= {0, 1, 2, 3}:
        remedy = "it looks like class indices: multiply them by 85 (0 and 1 of an extent: by 255)"
    return f"{mask.path}: found {label_files.list_values(foreign)}; expected {MEANING[values]}; {remedy}"
