"""Parts of pictures of tiles: false-colour composites, painted masks, outlines, legends."""

from __future__ import annotations

from typing import Any, Iterable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from prep.labels import CODE_NAMES, GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from solution import BANDS
from train.metrics import DEBRIS, GLACIER, LAKE, OTHER

FALSE_COLOUR = tuple([band.landsat for band in BANDS].index(name) for name in ("B6", "B4", "B3"))
STRETCH = (2, 98)  # percentiles of a band that become black and full intensity
GAMMA = 0.6  # of a composite: lifts the shadows, in which half of a mountain scene lies
CODE_COLOURS = {
    OTHER: "#d9d4c7",
    GLACIER: "#6baed6",
    DEBRIS: "#8c510a",
    LAKE: "#08306b",
    GLACIER_OR_DEBRIS: "#9e9ac8",
    OTHER_OR_LAKE: "#bdbdbd",
    IGNORE: "#ffffff",
}
# Over a composite, where ice is cyan and rock brown: colours that neither has.
OUTLINE_COLOURS = {GLACIER: "#ffe100", DEBRIS: "#ff2d95", LAKE: "#7c4dff"}


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
    return np.where(present, 255 * scaled**GAMMA, 255).astype(np.uint8)


def add_legend(figure: Figure, codes: Iterable[int]) -> None:
    """Add the colours and names of label codes below a figure."""
    names = {**CODE_NAMES, IGNORE: "nodata"}
    handles = [Patch(facecolor=CODE_COLOURS[code], edgecolor="grey", label=names[code]) for code in codes]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def draw_outlines(axis: Any, classes: np.ndarray, valid: np.ndarray, width: float = 0.8) -> None:
    """Draw the borders of classes on matplotlib axes; where a class ends at nodata there is none.

    Args:
        axis: shows the tile in pixels.
        classes: (H, W) class indices.
        valid: (H, W) bool, False where nodata.
        width: of the lines in points.
    """
    for label, colour in OUTLINE_COLOURS.items():
        inside = classes == label
        if min(classes.shape) > 1 and inside[valid].any() and not inside[valid].all():
            shown = np.ma.masked_array(inside.astype(float), ~valid)
            axis.contour(shown, levels=[0.5], colors=[colour], linewidths=width)
