"""Quicklooks: one picture a tile of image, outlines, mask, label, temperature and confidence, and contact sheets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from tqdm import tqdm

from prep.label_files import Labels, read_label, to_codes
from prep.labels import CODE_NAMES, GLACIER_OR_DEBRIS, IGNORE
from solution import (
    BANDS,
    InputError,
    Model,
    TileFiles,
    find_tiles,
    prepare_torch,
    usable_cores,
    warn,
)
from train.masks.files import Masks, read_mask, survey_masks
from train.masks.georeference import Georeference, class_km2, count_values, describe
from train.masks.pictures import (
    CODE_COLOURS,
    OUTLINE_COLOURS,
    STRETCH,
    draw_outlines,
    false_colour,
    paint_codes,
    save_figure,
)
from train.masks.scene import check_units, tile_scene
from train.masks.score import read_label_set
from train.masks.strips import NODATA, STEPS, class_confidence, finish_classes, picture_step, predict_strips
from train.networks import load_any_model
from train.objective import DEBRIS, GLACIER, LAKE, OTHER

THERMAL = [band.name for band in BANDS].index("thermal")
ZERO_CELSIUS = 273.15  # kelvin
TILES_A_SHEET, TILES_A_LINE, THUMBNAIL = 24, 6, 256
SHOWN_CODES = (OTHER, GLACIER, DEBRIS, LAKE, IGNORE)


class View(NamedTuple):
    """All that a picture of a tile shows; of a large one, every n-th pixel, so that none is held as a whole.

    `image`: (h, w, 5) physical units, NaN where nodata. `codes`: (h, w) class indices, IGNORE where nodata.
    `confidence`: (h, w) probability (0-1) of the class shown; None where only a mask is known. `label`: (h, w)
    label codes, if there is one. `place`: None without georeference. `shape`: (H, W) of the whole tile; `pixels`
    and `km2`: (256,), what each code covers of it; `km2` is None where that is not known.
    """

    tile_id: str
    image: np.ndarray
    codes: np.ndarray
    confidence: Optional[np.ndarray]
    label: Optional[np.ndarray]
    place: Optional[Georeference]
    shape: tuple[int, int]
    pixels: np.ndarray
    km2: Optional[np.ndarray]

    def area(self, *codes: int) -> str:
        """Return what some codes cover: km², where that is known, and the share of the pixels with data."""
        share = self.pixels[list(codes)].sum() / max(1, self.pixels[:IGNORE].sum())
        return f"{share:.1%}" if self.km2 is None else f"{self.km2[list(codes)].sum():,.1f} km², {share:.1%}"


def open_view(tile: TileFiles, masks: Optional[Masks], model: Optional[Model], labels: Optional[Labels] = None) -> View:
    """Return the view of a tile: its mask from a folder, else by the model; its confidence by the model.

    A tile that cannot be read is shown white, with a warning.

    Raises:
        InputError: the mask is missing or is none, or it or the label has another size than the tile.
    """
    try:
        scene = tile_scene(tile)
        if model:
            check_units(scene)
        step, strips = picture_step(scene), []
        for strip in predict_strips(model, scene):
            small = strip.probabilities[:, -strip.top % step :: step, ::step].copy()
            strips.append(strip._replace(probabilities=small, rest=strip.rest[:0].copy()))
    except InputError as error:
        warn(f"{error}; its picture stays white")
        blank = np.full((64, 64), IGNORE, np.uint8)
        image = np.full((*blank.shape, len(BANDS)), np.nan)
        return View(tile.tile_id, image, blank, None, None, None, blank.shape, np.zeros(256, int), None)
    decided = np.concatenate([strip.classes for strip in strips])
    if masks:
        codes = read_mask(masks, tile, scene.shape)
    else:
        assert model, "neither masks nor weights"
        codes = finish_classes(model, decided)
    codes[decided == NODATA] = IGNORE
    small, confidence, label = codes[::step, ::step].copy(), None, None
    if model:
        stored = np.concatenate([strip.probabilities for strip in strips], axis=1)
        confidence = np.where(small == IGNORE, np.nan, class_confidence(stored, small) / STEPS)
    if labels and tile.tile_id in labels.files:
        path = labels.files[tile.tile_id].path
        label = to_codes(read_label(path), labels.phases[tile.tile_id])
        if label.shape != scene.shape:
            raise InputError(f"{path}: {describe(label.shape)}, expected {describe(scene.shape)} as in {tile.name}")
        label = label[::step, ::step]
    image, pixels = np.concatenate([strip.picture for strip in strips]), count_values(codes)
    km2 = class_km2(codes, scene.place)
    return View(tile.tile_id, image, small, confidence, label, scene.place, scene.shape, pixels, km2)


# --- One tile -------------------------------------------------------------------------------------


def draw_quicklook(view: View) -> Figure:
    """Draw a tile: composite, outlines, mask, label where there is one, temperature, confidence, areas."""
    columns = -(-(5 + (view.label is not None) + (view.confidence is not None)) // 2)
    figure = Figure(figsize=(5.5 * columns, 11.4), layout="constrained")
    axes = iter(figure.subplots(2, columns).ravel())
    for axis in figure.axes:
        axis.set_axis_off()
    composite = false_colour(view.image)
    _draw_scale_bar(_show(next(axes), "SWIR-1, red, green", composite), view)
    draw_outlines(_show(next(axes), "outlines of the mask", composite), view.codes, width=1.0)
    _show(next(axes), "mask", paint_codes(view.codes))
    if view.label is not None:
        _show(next(axes), "label", paint_codes(view.label))
    celsius = view.image[..., THERMAL] - ZERO_CELSIUS
    present = celsius[np.isfinite(celsius)]
    limits = np.percentile(present, STRETCH) if present.size else (0, 1)
    _show(next(axes), "surface temperature, °C", celsius, cmap="inferno", vmin=limits[0], vmax=limits[1])
    if view.confidence is not None:
        title = "confidence: probability of the class shown"
        _show(next(axes), title, view.confidence, cmap="viridis", vmin=0.25, vmax=1)
    next(axes).legend(handles=_legend(view), loc="upper left", frameon=False, fontsize=13)
    figure.suptitle(f"{view.tile_id}: {describe(view.shape, view.place)}", fontsize=14)
    return figure


def _show(axis: Any, title: str, pixels: np.ndarray, **colours: Any) -> Any:
    """Draw pixels with a thin border, and a bar below where numbers become colours; return the axis."""
    drawn = axis.imshow(pixels, interpolation="nearest", **colours)
    axis.set_title(title)
    axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, edgecolor="grey"))
    if colours:
        axis.figure.colorbar(drawn, ax=axis, location="bottom", shrink=0.7, aspect=40, extend="both")
    return axis


def _legend(view: Optional[View] = None) -> list[Patch | Line2D]:
    """Return legend entries of the classes; of a view, with their areas, and of its outlines."""
    names = {**CODE_NAMES, IGNORE: "nodata"}
    labels = {code: names[code] + (f": {view.area(code)}" if view else "") for code in SHOWN_CODES}
    if view and view.label is not None:
        labels[GLACIER_OR_DEBRIS] = "glacier of either kind, in the label"
    outlined = [code for code in OUTLINE_COLOURS if view and (view.codes == code).any()]
    return [
        *[Patch(facecolor=CODE_COLOURS[code], edgecolor="grey", label=text) for code, text in labels.items()],
        *[Line2D([], [], color=OUTLINE_COLOURS[code], label=f"outline of {names[code]}") for code in outlined],
    ]


def _draw_scale_bar(axis: Any, view: View) -> None:
    """Draw a bar of a round number of km, about a fifth of the tile's width; none without a georeference."""
    pixel = view.place.pixel_km(view.shape) if view.place else None
    if pixel is None:
        return
    pixel *= view.shape[1] / view.codes.shape[1]
    fifth = view.codes.shape[1] * pixel / 5
    length = max((step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if step <= fifth), default=fifth)
    axis.add_artist(AnchoredSizeBar(axis.transData, length / pixel, f"{length:g} km", "lower left", pad=0.5))


# --- A set of tiles -------------------------------------------------------------------------------


def make_thumbnail(view: View) -> View:
    """Return a view with every n-th pixel, so that its longer side has THUMBNAIL px or less; areas stay."""
    step = -(-max(view.codes.shape) // THUMBNAIL)
    image, codes = view.image[::step, ::step].copy(), view.codes[::step, ::step].copy()
    return view._replace(image=image, codes=codes, confidence=None, label=None)


def draw_contact_sheet(views: Sequence[View]) -> Figure:
    """Draw composites with outlines, each above its mask, up to six a line."""
    lines = -(-len(views) // TILES_A_LINE)
    columns = -(-len(views) // lines)
    figure = Figure(figsize=(max(2.7 * columns, 5.5), 5.7 * lines + 0.7), layout="constrained")
    axes = figure.subplots(2 * lines, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for index, view in enumerate(views):
        line, column = divmod(index, columns)
        upper = _show(axes[2 * line, column], view.tile_id, false_colour(view.image))
        draw_outlines(upper, view.codes, width=0.6)
        area = f"glacier {view.area(GLACIER, DEBRIS)}"
        _show(axes[2 * line + 1, column], area, paint_codes(view.codes)).title.set_fontsize(9)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle("SWIR-1, red, green with outlines; mask and area of glacier of either kind", fontsize=10)
    return figure


def write_quicklooks(
    data: Path,
    out: Path,
    masks: Optional[Path] = None,
    weights: Optional[Path] = None,
    labels: Optional[Path] = None,
) -> list[Path]:
    """Write pictures of all tiles of a folder and return their files.

    Args:
        data: Band1 ... Band5.
        out: a folder, for one picture a tile (<tile id>.png) and contact sheets of TILES_A_SHEET tiles; or a PNG
            file, for the contact sheets alone.
        masks: folder of masks; None to make them with the weights.
        weights: model file, for masks that are not given and for maps of confidence; None for neither.
        labels: folder of label files, or with label folders in it, to draw beside the masks; None for none.

    Raises:
        InputError: no tiles, neither masks nor weights, a mask is missing, or the weights are damaged.
    """
    tiles, known = find_tiles(data), read_label_set(labels, None) if labels else None
    if weights:
        prepare_torch(usable_cores())
    model = load_any_model(weights) if weights else None
    found = survey_masks(masks, only=[tile.tile_id for tile in tiles]) if masks else None
    only_sheet = out.suffix.lower() == ".png"
    sheet, written, thumbnails = out if only_sheet else out / "contact_sheet.png", [], []
    for tile in tqdm(tiles, desc="pictures", unit="tile", disable=None):
        view = open_view(tile, found, model, known)
        if not only_sheet:
            written.append(save_figure(draw_quicklook(view), out / f"{view.tile_id}.png"))
        thumbnails.append(make_thumbnail(view))
    for number, start in enumerate(range(0, len(thumbnails), TILES_A_SHEET), 1):
        path = sheet if number == 1 else sheet.with_stem(f"{sheet.stem}_{number}")
        written.append(save_figure(draw_contact_sheet(thumbnails[start : start + TILES_A_SHEET]), path))
    return written
