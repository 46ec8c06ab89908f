"""Pictures of tiles: false-colour composites, painted masks, and a contact sheet of a whole folder."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from prep.labels import CODE_NAMES, GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from solution import BANDS, CLASS_VALUES, InputError, TileError, TileFiles, find_tiles, read_tile, valid_mask
from train.metrics import DEBRIS, GLACIER, LAKE, OTHER

FALSE_COLOUR = tuple([band.landsat for band in BANDS].index(name) for name in ("B6", "B4", "B3"))
STRETCH = (2, 98)  # percentiles of a band that become black and full intensity
CODE_COLOURS = {
    OTHER: "#d9d4c7",
    GLACIER: "#6baed6",
    DEBRIS: "#8c510a",
    LAKE: "#08306b",
    GLACIER_OR_DEBRIS: "#9e9ac8",
    OTHER_OR_LAKE: "#bdbdbd",
    IGNORE: "#ffffff",
}
MOST_TILES = 24  # on a contact sheet


def false_colour(image: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8 of SWIR, red, green of a tile (H, W, 5), stretched; white where any is NaN."""
    shown = image[..., list(FALSE_COLOUR)]
    picture = np.stack([_stretch(shown[..., index]) for index in range(3)], axis=-1)
    picture[np.isnan(shown).any(axis=-1)] = 255
    return picture


def paint_codes(codes: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8 colours of label codes or class indices (H, W)."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    for code, colour in CODE_COLOURS.items():
        palette[code] = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return palette[codes]


def _stretch(band: np.ndarray) -> np.ndarray:
    present = np.isfinite(band)
    if not present.any():
        return np.full(band.shape, 255, dtype=np.uint8)
    low, high = np.percentile(band[present], STRETCH)
    scaled = np.clip((band - low) / max(high - low, 1e-6), 0, 1)
    return np.where(present, 255 * scaled, 255).astype(np.uint8)


def add_legend(figure: Figure, codes: Iterable[int]) -> None:
    """Add the colours and names of label codes below a figure."""
    names = {**CODE_NAMES, IGNORE: "nodata"}
    handles = [Patch(facecolor=CODE_COLOURS[code], edgecolor="grey", label=names[code]) for code in codes]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def read_mask(masks: Path, tile: TileFiles) -> np.ndarray:
    """Return the class indices (H, W) uint8 of the mask that was written for a tile, as PNG or TIFF.

    Raises:
        InputError: there is none, or it holds other values than a mask's.
    """
    candidates = (masks / f"{Path(tile.name).stem}.png", masks / tile.name)
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(f"{masks}: no mask for {tile.name}; write it with `python solution.py`")
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if mask is None or not np.isin(mask, CLASS_VALUES).all():
        raise InputError(f"{path}: is no mask, expected one band of the values {CLASS_VALUES}")
    return np.searchsorted(CLASS_VALUES, mask).astype(np.uint8)


def write_contact_sheet(data: Path, masks: Path, out: Path) -> int:
    """Write a PNG with a false-colour composite and the mask of up to MOST_TILES tiles; return their number.

    Raises:
        InputError: there are no tiles, or a mask is missing.
    """
    tiles = find_tiles(data)[:MOST_TILES]
    columns = min(len(tiles), 6)
    lines = -(-len(tiles) // columns)
    figure = Figure(figsize=(2.6 * columns, 5.4 * lines + 0.4), layout="constrained")
    axes = figure.subplots(2 * lines, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for index, tile in enumerate(tiles):
        line, column = divmod(index, columns)
        image, painted = picture_tile(tile, read_mask(masks, tile))
        axes[2 * line, column].imshow(image)
        axes[2 * line, column].set_title(f"{tile.tile_id}: SWIR, red, green", fontsize=8)
        axes[2 * line + 1, column].imshow(painted, interpolation="nearest")
    add_legend(figure, (OTHER, GLACIER, DEBRIS, LAKE, IGNORE))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    return len(tiles)


def picture_tile(tile: TileFiles, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a tile's composite and painted mask, both (H, W, 3) uint8; white where it is unreadable."""
    try:
        image = read_tile(tile)
    except TileError:
        return np.full((*classes.shape, 3), 255, np.uint8), paint_codes(classes)
    return false_colour(image), paint_codes(np.where(valid_mask(image), classes, IGNORE))
