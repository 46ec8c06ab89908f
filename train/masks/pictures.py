"""Parts of pictures of tiles: false-colour composites, painted masks, outlines, legends."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE, allowed_classes
from solution import BANDS
from train.objective import DEBRIS, GLACIER, GLACIER_CODES, LAKE, OTHER

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


class Outcome(IntEnum):
    """What a prediction is worth at a pixel; WRONG_KIND has the extent of glacier right but not the class."""

    RIGHT_REST = 0
    RIGHT_GLACIER = 1
    MISSED = 2
    FALSE_ALARM = 3
    WRONG_KIND = 4
    NO_LABEL = IGNORE


OUTCOME_NAMES: dict[int, str] = {
    Outcome.RIGHT_REST: "right: no glacier",
    Outcome.RIGHT_GLACIER: "right: glacier",
    Outcome.MISSED: "glacier missed",
    Outcome.FALSE_ALARM: "glacier where there is none",
    Outcome.WRONG_KIND: "wrong kind",
    Outcome.NO_LABEL: "nodata",
}
# What is right is pale; the three mistakes differ in lightness too, for eyes that see few colours.
OUTCOME_COLOURS: dict[int, str] = {
    Outcome.RIGHT_REST: "#e4e1d8",
    Outcome.RIGHT_GLACIER: "#a9cde8",
    Outcome.MISSED: "#d7301f",
    Outcome.FALSE_ALARM: "#3f007d",
    Outcome.WRONG_KIND: "#f0b400",
    Outcome.NO_LABEL: "#ffffff",
}


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
        palette[code] = list(bytes.fromhex(colour[1:]))
    return palette[codes]


def map_outcomes(codes: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the `Outcome` of each pixel, (H, W) uint8.

    Args:
        codes: (H, W) label codes, 255 where ignored; a class that the code allows is right.
        predicted: (H, W) class indices 0-3.
    """
    labelled, found = np.isin(codes, GLACIER_CODES), np.isin(predicted, (GLACIER, DEBRIS))
    wrong_kind = allowed_classes()[codes, predicted] == 0
    choices = {
        Outcome.NO_LABEL: codes == IGNORE,
        Outcome.MISSED: labelled & ~found,
        Outcome.FALSE_ALARM: ~labelled & found,
        Outcome.WRONG_KIND: wrong_kind,
        Outcome.RIGHT_GLACIER: labelled,
    }
    return np.select(list(choices.values()), list(choices), Outcome.RIGHT_REST).astype(np.uint8)


def _stretch(band: np.ndarray) -> np.ndarray:
    present = np.isfinite(band)
    if not present.any():
        return np.full(band.shape, 255, dtype=np.uint8)
    low, high = np.percentile(band[present], STRETCH)
    scaled = np.clip((band - low) / max(high - low, 1e-6), 0, 1)
    return np.where(present, 255 * scaled**GAMMA, 255).astype(np.uint8)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG that is the same for the same content, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})  # its version would change the bytes
    return path


def draw_outlines(axis: Any, codes: np.ndarray, width: float = 0.8) -> None:
    """Draw the borders of classes on matplotlib axes; where a class ends at nodata there is none.

    Args:
        axis: shows the tile in pixels.
        codes: (H, W) class indices, IGNORE where nodata.
        width: of the lines in points.
    """
    valid = codes != IGNORE
    for code, colour in OUTLINE_COLOURS.items():
        inside = codes == code
        if min(codes.shape) > 1 and inside.any() and not inside[valid].all():
            shown = np.ma.masked_array(inside.astype(float), ~valid)
            axis.contour(shown, levels=[0.5], colors=[colour], linewidths=width)
