"""HKH scenes with outlines or mask files, tile by tile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import rasterio
import shapely
from rasterio.errors import RasterioError
from rasterio.windows import Window
from rasterio.windows import transform as window_transform

from prep import ground
from prep.hkh import landsat7
from prep.hkh.landsat7 import SceneError, Sun, reading
from prep.hkh.polygons import BURN_ORDER, FARTHEST, Layer, burn
from prep.labels import OTHER_OR_LAKE
from solution import CLASS_NAMES, TIFF_SUFFIXES

# Bytes that GDAL may keep: 512 rows of a scene with 15 channels, whose strips span its width. GDAL rasterises
# within the same limit, and takes many passes where it is small.
RASTER_CACHE = 256 * 1024**2


class Labels(NamedTuple):
    """Labels of scenes: vector files, and the border outside of which nothing is known; or a folder of masks.

    `words` by class name: what the names of mask files hold.
    """

    layers: tuple[Layer, ...]
    border: Layer | None
    folder: Path | None
    words: Mapping[str, str]


class Grid(NamedTuple):
    """Side of a tile and pixels that neighbours share."""

    size: int
    overlap: int


class RawTile(NamedTuple):
    """A tile before it is known to be of use.

    `codes`: (S, S) uint8, label codes where nodata is not yet ignored. `footprint`: its outline in longitude
    and latitude, None where unknown. `read`: returns the image (S, S, 5) float32, physical units.
    """

    tile_id: str
    row: int | None
    col: int | None
    codes: np.ndarray
    footprint: shapely.Polygon | None
    read: Callable[[], np.ndarray]


class SceneJob(NamedTuple):
    """A scene and its labels. `masks` is (code, path) of each mask file, none where there are outlines."""

    name: str
    path: Path
    channels: Mapping[str, int]
    sun: Sun
    labels: Labels
    masks: tuple[tuple[int, Path], ...]
    grid: Grid

    def files(self) -> list[Path]:
        """Return all files that the result depends on."""
        vectors = [*self.labels.layers, *([self.labels.border] if self.labels.border else [])]
        return [
            self.path,
            *(path for _, path in self.masks),
            *(p for layer in vectors for p in layer.files()),
        ]

    def meaning(self) -> list:
        """Return what else the result depends on."""
        kinds = [(*layer[1:3], layer.layer, sorted(layer.words.items())) for layer in self.labels.layers]
        return [self.name, self.channels, self.sun, self.grid, kinds, [code for code, _ in self.masks]]

    def tiles(self) -> Iterator[RawTile]:
        """Yield the tiles of the scene, row by row. Raises SceneError where something cannot be read."""
        table = landsat7.physical_table(list(self.channels), self.sun)
        cache = rasterio.Env(GDAL_CACHEMAX=RASTER_CACHE)
        with reading(self.path, RasterioError), cache, rasterio.open(self.path) as scene:
            codes = read_masks(self.masks, scene) if self.masks else burn(*self.labels[:2], scene)
            for row, col, window in grid_windows(scene.height, scene.width, self.grid):

                def read(window: Window = window) -> np.ndarray:
                    return landsat7.to_physical(read_numbers(scene, window, self), table)

                place = window_transform(window, scene.transform)
                corners = ground.outline(scene.crs, place, window.height, window.width)
                label = cut(codes, window, OTHER_OR_LAKE)
                yield RawTile(f"{self.name}_{row:02d}_{col:02d}", row, col, label, corners, read)


# --- Which scenes there are -----------------------------------------------------------------------


def find_scenes(folder: Path) -> list[Path]:
    """Return the TIFFs of a folder. Raises SceneError where there are none or two have one stem."""
    if not folder.is_dir():
        raise SceneError(f"{folder}: no such folder; expected one with a GeoTIFF a scene (docs/hkh.md)")
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TIFF_SUFFIXES]
    if not paths:
        raise SceneError(f"{folder}: found no TIFF, expected a GeoTIFF a scene (docs/hkh.md)")
    require_names(paths)
    landsat7.require_files(paths)
    require_one_each(paths)
    return paths


def require_one_each(paths: Sequence[Path]) -> None:
    """Raise SceneError where two files have one stem, of which tile ids are made."""
    first: dict[str, Path] = {}
    for path in paths:
        if first.setdefault(path.stem, path) != path:
            raise SceneError(f"{first[path.stem]} and {path}: two files of one name; remove one of the two")


def require_names(paths: Sequence[Path]) -> None:
    """Raise SceneError for a name with a line break, since tile ids are made of it and listed one a line, or
    with bytes that are no UTF-8, which GDAL cannot open.
    """
    for path in paths:
        foreign = any("\ud800" <= letter <= "\udfff" for letter in str(path))  # how Python decodes such bytes
        if foreign or len(path.name.splitlines()) > 1:
            raise SceneError(f"{path}: has a line break or what is no UTF-8 in its name; rename the file or its folder")


def plan_scene(path: Path, labels: Labels, grid: Grid, suns: Mapping[str, Sun]) -> SceneJob:
    """Return the job of a scene after a look at its header.

    Raises SceneError: unreadable, without the needed bands, without a coordinate system, or without mask files
    where the labels are a folder.
    """
    with reading(path, RasterioError), rasterio.open(path) as scene:
        channels = landsat7.choose_channels(scene.descriptions, str(path))
        check_place(scene, path)
        sun = landsat7.find_sun(path, scene.tags(), suns)
    masks = find_masks(labels.folder, path, labels.words) if labels.folder else ()
    return SceneJob(path.stem, path, channels, sun, labels, masks, grid)


def check_place(scene: rasterio.DatasetReader, path: Path) -> None:
    """Raise SceneError where a scene does not say where on Earth its pixels are."""
    if scene.crs is None:
        raise SceneError(f"{path}: has no coordinate system; export it again as a GeoTIFF")
    numbers = np.array([*scene.transform[:6], *scene.bounds])
    if not (np.abs(numbers) < FARTHEST).all() or abs(scene.transform.determinant) < 1 / FARTHEST:
        raise SceneError(
            f"{path}: its pixels are nowhere on Earth (transform {tuple(scene.transform[:6])}); export it "
            "again as a GeoTIFF"
        )
    corners = ground.outline(scene.crs, scene.transform, scene.height, scene.width)
    if not np.isfinite(shapely.get_coordinates(corners)).all():
        raise SceneError(
            f"{path}: its corners have no longitude and latitude in {scene.crs}; export it again in the UTM "
            "zone that it lies in"
        )


# --- Windows --------------------------------------------------------------------------------------


def grid_windows(height: int, width: int, grid: Grid) -> Iterator[tuple[int, int, Window]]:
    """Yield (row, col, window) of tiles that cover a scene: place in the grid, and its pixels.

    The last ones are moved back inside the scene; a scene smaller than a tile has windows that reach beyond.
    """
    for row, top in enumerate(_starts(height, grid)):
        for col, left in enumerate(_starts(width, grid)):
            yield row, col, Window(left, top, grid.size, grid.size)


def _starts(length: int, grid: Grid) -> list[int]:
    last = max(0, length - grid.size)
    return [*range(0, last, grid.size - grid.overlap), last]


def cut(values: np.ndarray, window: Window, fill: int) -> np.ndarray:
    """Return a window of (..., H, W) values, filled up where it reaches beyond them."""
    top, left = window.row_off, window.col_off
    inside = values[..., top : top + window.height, left : left + window.width]
    beyond = [(0, window.height - inside.shape[-2]), (0, window.width - inside.shape[-1])]
    return np.pad(inside, [(0, 0)] * (values.ndim - 2) + beyond, constant_values=fill)


def read_numbers(scene: rasterio.DatasetReader, window: Window, job: SceneJob) -> np.ndarray:
    """Return the five channels of a window as digital numbers, (5, S, S) uint8, 0 where nodata or outside.

    Raises SceneError: damaged pixels, or values that are no digital numbers.
    """
    whole = Window(0, 0, scene.width, scene.height)
    with reading(job.path, RasterioError):
        values = scene.read([index + 1 for index in job.channels.values()], window=window.intersection(whole))
    if scene.nodata is not None and not np.isnan(scene.nodata):
        values[values == scene.nodata] = 0
    numbers = landsat7.as_numbers(values, f"{job.path} (rows from {window.row_off}, columns from {window.col_off})")
    return cut(numbers, Window(0, 0, window.width, window.height), 0)


# --- Mask files -----------------------------------------------------------------------------------


def find_masks(folder: Path, scene: Path, words: Mapping[str, str]) -> tuple[tuple[int, Path], ...]:
    """Return (code, path) of a scene's mask files, in burning order: <scene>_<word>.tif, one for each class.

    Raises SceneError: none for clean ice or none for debris, or several for one class.
    """
    found: list[tuple[int, Path]] = []
    for name, word in words.items():
        pattern = re.compile(rf"{re.escape(scene.stem)}[ _-].*{re.escape(word)}.*", re.IGNORECASE)
        paths = [
            path
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in TIFF_SUFFIXES and pattern.fullmatch(path.stem)
        ]
        if len(paths) > 1 or (not paths and name in ("glacier", "debris")):
            listed = ", ".join(path.name for path in paths) or "none"
            raise SceneError(
                f"{folder}: found {listed} as mask of {name} for {scene.name}, expected one file such as "
                f"{scene.stem}_{word}.tif"
            )
        landsat7.require_files(paths)
        found += [(CLASS_NAMES.index(name), path) for path in paths]
    return tuple(sorted(found, key=lambda pair: BURN_ORDER.index(pair[0])))


def read_masks(masks: Sequence[tuple[int, Path]], scene: rasterio.DatasetReader) -> np.ndarray:
    """Return a scene's label codes, (H, W) uint8, from mask files that are not 0 where the class is.

    What a mask declares as nodata, and NaN, is no class either.

    Raises:
        SceneError: a mask cannot be read, or has not the scene's size, coordinate system and place.
    """
    codes = np.full(scene.shape, OTHER_OR_LAKE, np.uint8)
    for code, path in masks:
        with reading(path, RasterioError), rasterio.open(path) as mask:
            same = mask.shape == scene.shape and mask.crs == scene.crs
            if not same or not mask.transform.almost_equals(scene.transform, 1e-6):
                raise SceneError(
                    f"{path}: {mask.width} x {mask.height} px in {mask.crs} at {mask.bounds[:2]}, expected "
                    f"{scene.width} x {scene.height} px in {scene.crs} at {scene.bounds[:2]} as {scene.name}; export "
                    "the mask on the scene's grid"
                )
            values = mask.read(1)
            marked = (values != 0) & (values != mask.nodata) & (values == values)  # NaN is not itself
        codes[marked] = code
    return codes
