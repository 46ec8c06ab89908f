"""Quicklooks: one picture a tile of image, outlines, mask, temperature and confidence, and contact sheets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterable, NamedTuple, Optional, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from tqdm import tqdm

from prep.labels import IGNORE
from solution import (
    BANDS,
    CLASS_NAMES,
    WINDOW,
    InputError,
    Model,
    TileFiles,
    find_tiles,
    load_model,
    prepare_torch,
    usable_cores,
    valid_mask,
    warn,
)
from train.masks.files import read_mask, refuse_other_size
from train.masks.georeference import Georeference, class_km2
from train.masks.pictures import (
    CODE_COLOURS,
    OUTLINE_COLOURS,
    STRETCH,
    add_legend,
    draw_outlines,
    false_colour,
    paint_codes,
    save_figure,
)
from train.masks.scene import Scene, read_rows, tile_scene
from train.masks.strips import (
    NODATA,
    STEPS,
    class_confidence,
    finish_classes,
    picture_step,
    predict_strips,
)
from train.objective import DEBRIS, GLACIER, LAKE, OTHER

THERMAL = [band.name for band in BANDS].index("thermal")
ZERO_CELSIUS = 273.15  # kelvin
TILES_A_SHEET, TILES_A_LINE = 24, 6
SHEET = "contact_sheet"
SHOWN_CODES = (OTHER, GLACIER, DEBRIS, LAKE, IGNORE)


class View(NamedTuple):
    """All that a picture of a tile shows; of a large one, every n-th pixel, so that none is held as a whole.

    `image`: (h, w, 5) physical units, NaN where nodata. `classes`: (h, w) class indices. `confidence`: (h, w)
    probability (0-1) of the class shown; None where only a mask is known. `place`: None without georeference.
    `shape`: (H, W) of the whole tile; `pixels` and `km2`: (256,), what each class, and IGNORE for nodata,
    covers of it; `km2` is None where that is not known.
    """

    tile_id: str
    image: np.ndarray
    classes: np.ndarray
    confidence: Optional[np.ndarray]
    place: Optional[Georeference]
    shape: tuple[int, int]
    pixels: np.ndarray
    km2: Optional[np.ndarray]


# --- What is shown --------------------------------------------------------------------------------


def open_view(tile: TileFiles, masks: Optional[Path], model: Optional[Model]) -> View:
    """Return the view of a tile: its mask from a folder, else by the model; its confidence by the model.

    A tile that cannot be read is shown white, with a warning.

    Raises:
        InputError: the mask is missing or is none, or there is neither a folder of masks nor a model.
    """
    mask = read_mask(masks, tile) if masks else None
    try:
        scene = tile_scene(tile)
        image, decided, probabilities = _look(scene, model)
    except InputError as error:
        warn(f"{error}; its picture stays white")
        blank = np.zeros((64, 64), np.uint8) if mask is None else mask
        image = np.full((*blank.shape, len(BANDS)), np.nan)
        return View(tile.tile_id, image, blank, None, None, blank.shape, np.zeros(256, int), None)
    if mask is None:
        assert model is not None, "neither masks nor weights"
        mask = finish_classes(model, decided)
    if masks:
        refuse_other_size(mask, scene.shape, masks, tile)
    codes = np.where(decided == NODATA, np.uint8(IGNORE), mask)
    pixels, km2 = np.bincount(codes.ravel(), minlength=256), class_km2(codes, scene.place)
    small = np.where(codes == IGNORE, 0, codes)[:: picture_step(scene), :: picture_step(scene)]
    sure = class_confidence(probabilities, small) / STEPS if probabilities is not None else None
    return View(tile.tile_id, image, small, sure, scene.place, scene.shape, pixels, km2)


def _look(scene: Scene, model: Optional[Model]) -> tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]:
    """Return every n-th pixel of a scene's bands; the classes (H, W) that the model decides on, 0 without
    one, NODATA where nothing was measured; every n-th pixel's probabilities (4, h, w), None without one."""
    step = picture_step(scene)
    if model:
        strips = [
            strip._replace(probabilities=strip.probabilities[:, -strip.top % step :: step, ::step].copy())
            for strip in predict_strips(model, scene)
        ]
        parts = [(strip.picture, strip.classes) for strip in strips]
        probabilities = np.concatenate([strip.probabilities for strip in strips], axis=1)
    else:
        parts, probabilities = [], None
        for top in range(0, scene.shape[0], WINDOW):
            image = read_rows(scene, top, min(top + WINDOW, scene.shape[0]))
            seen = np.where(valid_mask(image), np.uint8(0), np.uint8(NODATA))
            parts.append((image[-top % step :: step, ::step].copy(), seen))
    image, decided = (np.concatenate(pieces) for pieces in zip(*parts))
    return image, decided, probabilities


def class_areas(view: View) -> list[list[str]]:
    """Return rows of class, km² and share of the pixels with data; km² only where the tile has a place."""
    rows = []
    for name, code in [*zip(CLASS_NAMES, range(len(CLASS_NAMES))), ("nodata", IGNORE)]:
        area = "–" if view.km2 is None else f"{view.km2[code]:,.1f}"
        share = f"{view.pixels[code] / max(1, view.pixels[:IGNORE].sum()):.1%}"
        rows.append([name, area, "" if code == IGNORE else share])
    return rows


def describe_place(place: Optional[Georeference], shape: Sequence[int]) -> str:
    """Return a tile's size, its coordinate system and its upper left corner in words."""
    size = f"{shape[1]} x {shape[0]} px"
    if place is None:
        return f"{size}, not georeferenced"
    width = place.pixel_km(shape)
    metres = f" of {1000 * width:.0f} m" if width else ""
    name = place.crs.to_string() if place.crs.to_epsg() else "a system without EPSG code"
    digits = 4 if place.crs.is_geographic else 0
    corner = f"{place.transform.c:,.{digits}f} / {place.transform.f:,.{digits}f}"
    return f"{size}{metres}, {name}, upper left {corner}"


# --- One tile -------------------------------------------------------------------------------------


def draw_quicklook(view: View) -> Figure:
    """Draw a tile: composite, outlines, mask, temperature, confidence where it is known, areas."""
    figure = Figure(figsize=(16.5, 11.4), layout="constrained")
    below = "DEF" if view.confidence is not None else "DF."
    axes = figure.subplot_mosaic(f"ABC;{below}")
    composite = false_colour(view.image)
    for name, title in (("A", "SWIR-1, red, green"), ("B", "outlines of the mask")):
        axes[name].imshow(composite, interpolation="nearest")
        axes[name].set_title(title)
    draw_outlines(axes["B"], view.classes, valid_mask(view.image), width=1.0)
    _draw_mask(axes["C"], view)
    axes["C"].set_title("mask")
    _draw_temperature(figure, axes["D"], view.image)
    if view.confidence is not None:
        _draw_confidence(figure, axes["E"], np.where(valid_mask(view.image), view.confidence, np.nan))
    for axis in axes.values():
        axis.set_axis_off()
    _draw_facts(axes["F"], view)
    _draw_scale_bar(axes["A"], view)
    figure.suptitle(f"{view.tile_id}: {describe_place(view.place, view.shape)}", fontsize=14)
    return figure


def _draw_mask(axis: Any, view: View) -> None:
    shown = np.where(valid_mask(view.image), view.classes, IGNORE)
    axis.imshow(paint_codes(shown), interpolation="nearest")
    axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, edgecolor="grey"))


def _draw_temperature(figure: Figure, axis: Any, image: np.ndarray) -> None:
    celsius = image[..., THERMAL] - ZERO_CELSIUS
    present = celsius[np.isfinite(celsius)]
    low, high = np.percentile(present, STRETCH) if present.size else (0.0, 1.0)
    drawn = axis.imshow(celsius, cmap="inferno", vmin=low, vmax=high, interpolation="nearest")
    axis.set_title("surface temperature, °C")
    figure.colorbar(drawn, ax=axis, location="bottom", shrink=0.7, aspect=40, extend="both")


def _draw_confidence(figure: Figure, axis: Any, confidence: np.ndarray) -> None:
    drawn = axis.imshow(confidence, cmap="viridis", vmin=0.25, vmax=1, interpolation="nearest")
    axis.set_title("confidence: probability of the class shown")
    figure.colorbar(drawn, ax=axis, location="bottom", shrink=0.7, aspect=40)


def _draw_facts(axis: Any, view: View) -> None:
    """Write the legend and the areas of the classes into an empty panel."""
    rows = class_areas(view)
    table = axis.table(
        cellText=[["", *row] for row in rows],
        colLabels=["", "class", "km²", "of valid"],
        cellColours=[[CODE_COLOURS[code], *["white"] * 3] for code in SHOWN_CODES],
        colWidths=[0.08, 0.24, 0.22, 0.22],
        cellLoc="right",
        bbox=[0.05, 0.45, 0.85, 0.5],
    )
    table.auto_set_font_size(False)
    table.set_fontsize(13)
    for cell in table.get_celld().values():
        cell.set_edgecolor("#cccccc")
    axis.legend(
        handles=_outline_handles(view.classes),
        title="outlines",
        loc="upper left",
        bbox_to_anchor=(0.03, 0.40),
        frameon=False,
        fontsize=12,
        alignment="left",
    )


def _outline_handles(classes: np.ndarray) -> list[Line2D]:
    """Return legend entries of the outlines of those classes that occur."""
    return [
        Line2D([], [], color=colour, linewidth=2.5, label=CLASS_NAMES[label])
        for label, colour in OUTLINE_COLOURS.items()
        if (classes == label).any()
    ]


def _draw_scale_bar(axis: Any, view: View) -> None:
    """Draw a bar of a round number of km, about a fifth of the tile's width; none without a georeference."""
    pixel = view.place.pixel_km(view.shape) if view.place else None
    if pixel is None:
        return
    height, width = view.classes.shape
    pixel *= view.shape[1] / width
    fifth = width * pixel / 5
    length = max((step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if step <= fifth), default=fifth)
    left, bottom, pixels = 0.04 * width, 0.95 * height, length / pixel
    box = (left - 0.015 * width, bottom - 0.055 * height)
    axis.add_patch(Rectangle(box, pixels + 0.03 * width, 0.08 * height, facecolor="white", alpha=0.85))
    axis.plot([left, left + pixels], [bottom, bottom], color="black", linewidth=3, solid_capstyle="butt")
    axis.text(left + pixels / 2, bottom - 0.012 * height, f"{length:g} km", ha="center", va="bottom")


# --- A set of tiles -------------------------------------------------------------------------------


class Thumbnail(NamedTuple):
    """A view at fewer pixels, and the area of glacier of either kind in words, from all of them."""

    view: View
    area: str


def make_thumbnail(view: View, side: int = 256) -> Thumbnail:
    """Return a view with every n-th pixel, so that its longer side has about `side` or less."""
    step = -(-max(view.classes.shape) // side)
    small = view._replace(
        image=view.image[::step, ::step].copy(), classes=view.classes[::step, ::step].copy()
    )
    return Thumbnail(small._replace(confidence=None), _glacier_area(view))


def _glacier_area(view: View) -> str:
    if view.km2 is None:
        share = view.pixels[[GLACIER, DEBRIS]].sum() / max(1, view.pixels[:IGNORE].sum())
        return f"{share:.0%} glacier"
    return f"{view.km2[[GLACIER, DEBRIS]].sum():,.1f} km² glacier"


def draw_contact_sheet(thumbnails: Sequence[Thumbnail]) -> Figure:
    """Draw composites with outlines, each above its mask, up to six a line."""
    lines = -(-len(thumbnails) // TILES_A_LINE)
    columns = -(-len(thumbnails) // lines)
    figure = Figure(figsize=(max(2.7 * columns, 5.5), 5.7 * lines + 0.7), layout="constrained")
    axes = figure.subplots(2 * lines, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for index, (view, area) in enumerate(thumbnails):
        line, column = divmod(index, columns)
        upper, lower = axes[2 * line, column], axes[2 * line + 1, column]
        upper.imshow(false_colour(view.image))
        draw_outlines(upper, view.classes, valid_mask(view.image), width=0.6)
        upper.set_title(view.tile_id, fontsize=10)
        _draw_mask(lower, view)
        lower.set_title(area, fontsize=9)
    add_legend(figure, SHOWN_CODES)
    figure.suptitle("SWIR-1, red, green with outlines; mask and area of glacier of either kind", fontsize=10)
    return figure


def write_contact_sheets(thumbnails: Sequence[Thumbnail], out: Path) -> list[Path]:
    """Write contact sheets of up to TILES_A_SHEET tiles: `out`, and numbered ones beside it for the rest."""
    starts = range(0, len(thumbnails), TILES_A_SHEET)
    parts = [thumbnails[start : start + TILES_A_SHEET] for start in starts]
    paths = [out if not number else out.with_stem(f"{out.stem}_{number + 1}") for number in range(len(parts))]
    for part, path in zip(parts, paths):
        save_figure(draw_contact_sheet(part), path)
    return paths


def write_quicklooks(
    data: Path, out: Path, masks: Optional[Path] = None, weights: Optional[Path] = None
) -> list[Path]:
    """Write pictures of all tiles of a folder and return their files.

    Args:
        data: Band1 ... Band5.
        out: a folder, for one picture a tile (<tile id>.png) and contact sheets; or a PNG file, for the
            contact sheet alone.
        masks: folder of masks; None to make them with the weights.
        weights: model file, for masks that are not given and for maps of confidence; None for neither.

    Raises:
        InputError: no tiles, neither masks nor weights, a mask is missing, or the weights are damaged.
    """
    tiles = find_tiles(data)
    model = _open_model(weights) if weights else None
    only_sheet = out.suffix.lower() == ".png"
    written, thumbnails = [], []
    for view in _views(tiles, masks, model):
        if not only_sheet:
            written.append(save_figure(draw_quicklook(view), out / f"{view.tile_id}.png"))
        thumbnails.append(make_thumbnail(view))
    return [*written, *write_contact_sheets(thumbnails, out if only_sheet else out / f"{SHEET}.png")]


def _open_model(weights: Path) -> Model:
    prepare_torch(usable_cores())
    return load_model(weights)


def _views(tiles: Sequence[TileFiles], masks: Optional[Path], model: Optional[Model]) -> Iterable[View]:
    for tile in tqdm(tiles, desc="pictures", unit="tile", disable=None):
        yield open_view(tile, masks, model)
