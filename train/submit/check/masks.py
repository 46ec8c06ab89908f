"""Judges masks: names, type, shape, values, nodata, and whether all callers got the same."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, NamedTuple, Sequence, Union

import cv2
import numpy as np
import tifffile

from solution import CLASS_NAMES, CLASS_VALUES
from train.submit.check.cases import Tile
from train.submit.check.verdict import CheckResult, judge

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Of two masks' pixels: threads and memory format are chosen by timing, and move the last digits.
SAME_SHARE = 0.999

Mask = Union[np.ndarray, str]  # pixels, or the reason why there are none
Masks = Mapping[str, Mask]


class Outcome(NamedTuple):
    """The masks that one caller got, by tile id."""

    subject: str
    masks: Masks


def read_mask(path: Path) -> Mask:
    """Return the pixels of a mask file, or why it cannot be read as what its name says."""
    try:
        if path.suffix == ".png":
            return decode_png(path.read_bytes())
        return tifffile.imread(path)
    except Exception as error:  # a damaged TIFF may raise almost anything
        return f"{type(error).__name__}: {error}"


def decode_png(content: bytes) -> Mask:
    """Return the pixels of a PNG as stored."""
    if not content.startswith(PNG_SIGNATURE):
        return f"begins with {content[:8]!r}, not as a PNG"
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    return "a damaged PNG" if pixels is None else pixels


def read_folder(folder: Path) -> dict[str, Mask]:
    """Return {file name: mask} of all that lies in `folder`, empty where there is none."""
    if not folder.is_dir():
        return {}
    return {
        str(path.relative_to(folder)): read_mask(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def judge_masks(subject: str, masks: Masks, tiles: Mapping[str, Tile]) -> list[CheckResult]:
    """Return the results on masks whose names should be those of `tiles`."""
    missing = sorted(set(tiles) - set(masks))
    extra = sorted(set(masks) - set(tiles))
    known = {name: mask for name, mask in masks.items() if name in tiles}
    unreadable = [f"{name}: {mask}" for name, mask in known.items() if isinstance(mask, str)]
    arrays = {name: mask for name, mask in known.items() if isinstance(mask, np.ndarray)}
    fitting = {name: mask for name, mask in arrays.items() if mask.shape == tiles[name].nodata.shape}
    dtypes = [f"{name}: {mask.dtype}" for name, mask in arrays.items() if mask.dtype != np.uint8]
    shapes = [
        f"{name}: {mask.shape} for a tile of {tiles[name].nodata.shape}"
        for name, mask in arrays.items()
        if name not in fitting
    ]
    return [
        judge(subject, "a mask for every tile", [f"no {name}" for name in missing], f"{len(tiles)} masks"),
        judge(subject, "nothing else", [f"{name} is extra" for name in extra], "no other name"),
        judge(subject, "readable", unreadable, "an image of the kind that the name says"),
        judge(subject, "type", dtypes, "uint8"),
        judge(subject, "shape", shapes, "the tile's"),
        judge(subject, "values", list_wrong_values(arrays), f"only {', '.join(map(str, CLASS_VALUES))}"),
        judge(subject, "nodata is 0", list_nodata_faults(fitting, tiles), "0 at every nodata pixel"),
    ]


def list_wrong_values(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Return the masks that hold a value which stands for no class."""
    wrong = {name: np.setdiff1d(mask, CLASS_VALUES) for name, mask in arrays.items()}
    return [
        f"{name}: {', '.join(f'{value:g}' for value in values[:4])}"
        for name, values in wrong.items()
        if values.size
    ]


def list_nodata_faults(arrays: Mapping[str, np.ndarray], tiles: Mapping[str, Tile]) -> list[str]:
    """Return the masks that show a class where the tile has no data."""
    counts = {name: np.count_nonzero(mask[tiles[name].nodata]) for name, mask in arrays.items()}
    return [f"{name}: {count} nodata pixels have a class" for name, count in counts.items() if count]


def judge_agreement(subject: str, outcomes: Sequence[Outcome]) -> CheckResult:
    """Return whether all callers got the same masks for the same tiles."""
    first = outcomes[0]
    faults = [
        f"tile {tile_id}: {other.subject} differs from {first.subject}"
        for other in outcomes[1:]
        for tile_id in sorted(set(first.masks) & set(other.masks))
        if not is_same(first.masks[tile_id], other.masks[tile_id])
    ]
    return judge(subject, "all callers agree", faults, f"the same class on {SAME_SHARE:.1%} of the pixels")


def is_same(one: Mask, other: Mask) -> bool:
    """Return whether two masks agree on SAME_SHARE of the pixels; an unreadable one has been reported."""
    if isinstance(one, str) or isinstance(other, str):
        return True
    return one.shape == other.shape and bool(np.mean(one == other) >= SAME_SHARE)


def judge_life(subject: str, outcomes: Sequence[Outcome]) -> CheckResult:
    """Return the class shares over all masks; plain background everywhere is a dead model."""
    masks = [mask for outcome in outcomes for mask in outcome.masks.values() if isinstance(mask, np.ndarray)]
    counts = np.array([sum(np.count_nonzero(mask == value) for mask in masks) for value in CLASS_VALUES])
    shares = counts / max(sum(mask.size for mask in masks), 1)
    found = ", ".join(f"{name} {share:.1%}" for name, share in zip(CLASS_NAMES, shares))
    return CheckResult(subject, "classes", bool(counts[1:].any()), found, "not background everywhere")


def judge_names(outcomes: Sequence[Outcome]) -> CheckResult:
    """Return whether the same scenes got the same masks under each naming style, in the order of tile ids."""
    first, *others = [[outcome.masks[tile_id] for tile_id in sorted(outcome.masks)] for outcome in outcomes]
    faults = [
        f"tile number {number} of {outcome.subject} differs from {outcomes[0].subject}"
        for outcome, masks in zip(outcomes[1:], others)
        for number, (one, other) in enumerate(zip(first, masks), start=1)
        if len(masks) == len(first) and not is_same(one, other)
    ]
    return judge("naming styles", "agree", faults, "the same masks of the same scenes")
