"""Folders of masks, whoever wrote them: found by tile id, checked, and read as class indices."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from prep import label_files
from prep.label_files import LabelFile
from prep.store import name_some
from solution import InputError, TileFiles
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


def survey_masks(folder: Path, values: Optional[str] = None, only: Optional[Iterable[str]] = None) -> Masks:
    """Read a folder of masks, TIFF or PNG, and check what is in it.

    Args:
        folder: searched without its subfolders.
        values: CLASSES or EXTENT; None to tell it: classes where 85 or 170 occurs in any mask or where 255
            covers so little that it can be lakes.
        only: tile ids; other files are not read. None for all.

    Raises:
        InputError: lists every problem: no masks, unreadable ones, two for a tile, unknown values.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected masks, one PNG or TIFF a tile")
    masks, problems = label_files.survey(folder, only)
    values = values or tell_values(masks)
    problems += [fault for mask in masks if (fault := _value_fault(mask, values))]
    if not masks and not problems:
        problems = [f"{folder}: no mask of a tile in it; write masks with `python solution.py IN {folder}`"]
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


def find_mask(masks: Masks, tile: TileFiles, shape: Sequence[int]) -> LabelFile:
    """Return the mask of a tile of this shape, found by its tile id. InputError: there is none, or of another size."""
    mask = masks.files.get(tile.tile_id)
    if mask is None:
        found = name_some(sorted(masks.files))
        raise InputError(f"no mask for {tile.name} (tile id {tile.tile_id}) among {found}; write it with solution.py")
    if mask.shape != tuple(shape):
        raise InputError(
            f"{mask.path}: {describe(mask.shape)}, expected {describe(shape)} as in {tile.name}; write it at that size"
        )
    return mask


def read_mask(masks: Masks, tile: TileFiles, shape: Sequence[int]) -> np.ndarray:
    """Return the class indices (H, W) uint8 of the mask that `find_mask` finds; errors as there."""
    return read_classes(find_mask(masks, tile, shape), masks.values)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise InputError with `problems`, one a line, if there are any."""
    if problems:
        more = "".join(f"\n  - {problem}" for problem in problems[:MOST_PROBLEMS])
        more += f"\n  and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise InputError(problems[0] if len(problems) == 1 else f"{len(problems)} problems:{more}")


def _value_fault(mask: LabelFile, values: str) -> Optional[str]:
    """Return what is wrong with the values of a mask, else None."""
    foreign = {
        value: count for value, count in mask.counts.items() if value not in label_files.VALUE_CODES[PHASE_OF[values]]
    }
    if not foreign:
        return None
    remedy = "write the mask with these values"
    if set(mask.counts) <= {0, 1, 2, 3}:
        remedy = "it looks like class indices: multiply them by 85 (0 and 1 of an extent: by 255)"
    return f"{mask.path}: found {label_files.list_values(foreign)}; expected {MEANING[values]}; {remedy}"
