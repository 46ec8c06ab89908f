"""Where HKH tiles come from: scenes with polygons, scenes with mask files, or ready patches; tile by tile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import rasterio
import rasterio.transform
import rasterio.warp
import rasterio.windows
from rasterio.errors import RasterioError
from rasterio.windows import Window

from prep.hkh.landsat7 import (
    EXPORTS,
    SceneError,
    Sun,
    as_numbers,
    choose_channels,
    find_sun,
    physical_table,
    require_files,
    require_numbers,
    to_physical,
)
from prep.hkh.polygons import BURN_ORDER, FARTHEST, Polygons, burn, read_polygons
from prep.labels import GLACIER_OR_DEBRIS, OTHER_OR_LAKE
from solution import CLASS_NAMES, TIFF_SUFFIXES

# Bytes that GDAL may keep: 512 rows of a scene with 15 channels, whose strips span its width. GDAL rasterises
# within the same limit, and takes many passes where it is small.
RASTER_CACHE = 256 * 1024**2
WGS84 = "EPSG:4326"
PATCH_CHANNELS = ("any", "clean", "debris")  # of a mask in the data set's own patches
PATCH_MARK = re.compile(r"_?img")  # slice_3_img_017.npy has the mask slice_3_mask_017.npy


class LabelSource(NamedTuple):
    """Labels of scenes: a vector file, or a folder with mask files per class; `words` by class name."""

    path: Path
    column: str
    words: Mapping[str, str]


class Grid(NamedTuple):
    """Side of a tile and pixels that neighbours share."""

    size: int
    overlap: int


class RawTile(NamedTuple):
    """A tile before it is known to be of use.

    `codes`: (S, S) uint8, label codes where nodata is not yet ignored. `footprint`: its corners as
    (longitude, latitude), None where unknown. `read`: returns the image (S, S, 5) float32, physical units.
    """

    tile_id: str
    row: int | None
    col: int | None
    codes: np.ndarray
    footprint: list[tuple[float, float]] | None
    read: Callable[[], np.ndarray]


class SceneJob(NamedTuple):
    """A scene and its labels. `masks` is (code, path) of each mask file, none where there are polygons."""

    name: str
    path: Path
    channels: Mapping[str, int]
    sun: Sun
    labels: LabelSource
    masks: tuple[tuple[int, Path], ...]
    grid: Grid

    def files(self) -> list[Path]:
        """Return all files that the result depends on."""
        parts = [path for _, path in self.masks] or sorted(
            self.labels.path.parent.glob(f"{self.labels.path.stem}.*")
        )
        return [self.path, *parts]

    def tiles(self) -> Iterator[RawTile]:
        """Read the scene tile by tile."""
        return scene_tiles(self)


class PatchJob(NamedTuple):
    """The patches of one scene: (image, mask) files, and which mask channel is what."""

    name: str
    patches: tuple[tuple[Path, Path], ...]
    channels: Mapping[str, int]
    sun: Sun
    order: tuple[str, ...]
    grid: Grid

    def files(self) -> list[Path]:
        """Return all files that the result depends on."""
        return [path for pair in self.patches for path in pair]

    def tiles(self) -> Iterator[RawTile]:
        """Read the patches one by one."""
        return patch_tiles(self)


Job = SceneJob | PatchJob


# --- Scenes ---------------------------------------------------------------------------------------


def find_scenes(folder: Path) -> list[Path]:
    """Return the TIFFs of a folder. Raises SceneError where there are none or two have one stem."""
    if not folder.is_dir():
        raise SceneError(f"{folder}: no such folder; expected one with a GeoTIFF a scene (docs/hkh.md)")
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TIFF_SUFFIXES]
    if not paths:
        raise SceneError(f"{folder}: found no TIFF, expected a GeoTIFF a scene (docs/hkh.md)")
    require_names(paths)
    require_files(paths)
    twice = {path.stem for path in paths if sum(other.stem == path.stem for other in paths) > 1}
    if twice:
        raise SceneError(f"{folder}: two files each for {', '.join(sorted(twice))}; remove one of the two")
    return paths


def require_names(paths: Sequence[Path]) -> None:
    """Raise SceneError for a name with a line break, since tile ids are made of it and listed one a line, or
    with bytes that are no UTF-8, which GDAL cannot open.
    """
    for path in paths:
        letters = str(path)
        foreign = any("\ud800" <= letter <= "\udfff" for letter in letters)  # how Python decodes such bytes
        if foreign or len(path.name.splitlines()) > 1:
            raise SceneError(
                f"{path}: has a line break or what is no UTF-8 in its name; rename the file or its folder"
            )


def plan_scene(path: Path, labels: LabelSource, grid: Grid, suns: Mapping[str, Sun]) -> SceneJob:
    """Return the job of a scene after a look at its header.

    Raises:
        SceneError: unreadable, without the needed bands, without a coordinate system, or without mask files
            where `labels` is a folder.
    """
    try:
        with rasterio.open(path) as scene:
            channels = choose_channels(scene.descriptions, str(path))
            check_place(scene, path)
            sun = find_sun(path, scene.tags(), suns)
    except RasterioError as error:
        raise unreadable(path, error) from error
    masks = find_masks(labels.path, path, labels.words) if labels.path.is_dir() else ()
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
    corners = np.array(footprint(scene, Window(0, 0, scene.width, scene.height)))
    if not np.isfinite(corners).all():
        raise SceneError(
            f"{path}: its corners have no longitude and latitude in {scene.crs}; export it again in the UTM "
            "zone that it lies in"
        )


def unreadable(path: Path, error: Exception) -> SceneError:
    """Return the error for a file that GDAL or numpy cannot read."""
    size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no such file"
    return SceneError(f"{path}: cannot be read ({size}; {error}); copy or download the file again")


def scene_tiles(job: SceneJob) -> Iterator[RawTile]:
    """Yield the tiles of a scene, row by row. Raises SceneError where something cannot be read."""
    table = physical_table(list(job.channels), job.sun)
    try:
        with rasterio.Env(GDAL_CACHEMAX=RASTER_CACHE), rasterio.open(job.path) as scene:
            label = label_reader(job, scene)
            for row, col, window in grid_windows(scene.height, scene.width, job.grid):

                def read(window: Window = window) -> np.ndarray:
                    return to_physical(read_numbers(scene, window, job), table)

                corners = footprint(scene, window)
                yield RawTile(f"{job.name}_{row:02d}_{col:02d}", row, col, label(window), corners, read)
    except RasterioError as error:
        raise unreadable(job.path, error) from error


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


def read_numbers(scene: rasterio.DatasetReader, window: Window, job: SceneJob) -> np.ndarray:
    """Return the five channels of a window as digital numbers, (5, S, S) uint8, 0 where nodata or outside.

    Raises:
        SceneError: damaged pixels, or values that are no digital numbers.
    """
    rows = min(window.height, scene.height - window.row_off)
    cols = min(window.width, scene.width - window.col_off)
    inside = Window(window.col_off, window.row_off, cols, rows)
    try:
        values = scene.read([index + 1 for index in job.channels.values()], window=inside)
    except RasterioError as error:
        raise unreadable(job.path, error.__cause__ or error) from error
    if scene.nodata is not None and not np.isnan(scene.nodata):
        values[values == scene.nodata] = 0
    numbers = as_numbers(values, f"{job.path} (rows from {window.row_off}, columns from {window.col_off})")
    if (rows, cols) == (window.height, window.width):
        return numbers
    return np.pad(numbers, ((0, 0), (0, window.height - rows), (0, window.width - cols)))


def footprint(scene: rasterio.DatasetReader, window: Window) -> list[tuple[float, float]]:
    """Return the corners of a window as (longitude, latitude), clockwise from the upper left."""
    transform = rasterio.windows.transform(window, scene.transform)
    rows, cols = (0, 0, window.height, window.height), (0, window.width, window.width, 0)
    xs, ys = rasterio.transform.xy(transform, rows, cols, offset="ul")
    return list(zip(*rasterio.warp.transform(scene.crs, WGS84, xs, ys)))


# --- Labels of scenes -----------------------------------------------------------------------------


def label_reader(job: SceneJob, scene: rasterio.DatasetReader) -> Callable[[Window], np.ndarray]:
    """Return a function from a window to its label codes, (S, S) uint8; background is {other, lake}.

    Raises:
        SceneError: the polygons cannot be read, or a mask file is not on the scene's grid.
    """
    if job.masks:
        for _, path in job.masks:
            check_mask(path, scene)
        return lambda window: read_masks(job.masks, window)
    labels = job.labels
    polygons = read_polygons(labels.path, labels.column, labels.words, scene.crs, scene.bounds)
    return lambda window: _burn_window(polygons, scene, window)


def _burn_window(polygons: Polygons, scene: rasterio.DatasetReader, window: Window) -> np.ndarray:
    transform = rasterio.windows.transform(window, scene.transform)
    return burn(polygons, transform, (window.height, window.width))


def find_masks(folder: Path, scene: Path, words: Mapping[str, str]) -> tuple[tuple[int, Path], ...]:
    """Return (code, path) of a scene's mask files, in burning order: <scene>_<word>.tif, one for each class.

    Raises:
        SceneError: none for clean ice or none for debris, or several for one class.
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
        require_files(paths)
        found += [(CLASS_NAMES.index(name), path) for path in paths]
    return tuple(sorted(found, key=lambda pair: BURN_ORDER.index(pair[0])))


def check_mask(path: Path, scene: rasterio.DatasetReader) -> None:
    """Raise SceneError where a mask file has not the scene's size, coordinate system and place."""
    try:
        with rasterio.open(path) as mask:
            same = mask.shape == scene.shape and mask.crs == scene.crs
            if not same or not mask.transform.almost_equals(scene.transform, 1e-6):
                raise SceneError(
                    f"{path}: {mask.width} x {mask.height} px in {mask.crs} at {mask.bounds[:2]}, expected "
                    f"{scene.width} x {scene.height} px in {scene.crs} at {scene.bounds[:2]} as "
                    f"{scene.name}; export the mask on the scene's grid"
                )
    except RasterioError as error:
        raise unreadable(path, error) from error


def read_masks(masks: Sequence[tuple[int, Path]], window: Window) -> np.ndarray:
    """Return the label codes of a window, (S, S) uint8, from mask files that are not 0 where the class is.

    What a mask declares as nodata, and NaN, is no class either.
    """
    codes = np.full((window.height, window.width), OTHER_OR_LAKE, np.uint8)
    for code, path in masks:
        try:
            with rasterio.open(path) as mask:
                values = mask.read(1, window=window, boundless=True, fill_value=0)
                marked = (values != 0) & (values != mask.nodata) & (values == values)  # NaN is not itself
        except RasterioError as error:
            raise unreadable(path, error) from error
        codes[marked] = code
    return codes


# --- Patches --------------------------------------------------------------------------------------


def find_patches(folder: Path) -> dict[str, list[tuple[Path, Path]]]:
    """Return {scene: [(image, mask)]} of a folder with slice_<scene>_img_<n>.npy and ..._mask_<n>.npy.

    Raises:
        SceneError: no images, or some without a mask.
    """
    images = [path for path in sorted(folder.rglob("*.npy")) if PATCH_MARK.search(path.stem)]
    if not images:
        raise SceneError(
            f"{folder}: found no patch, expected slice_<scene>_img_<n>.npy beside slice_<scene>_mask_<n>.npy"
        )
    require_names(images)
    require_files(images)
    pairs = [(path, path.with_name(path.name.replace("img", "mask"))) for path in images]
    lonely = [image.name for image, mask in pairs if not mask.is_file()]
    if lonely:
        raise SceneError(
            f"{folder}: {len(lonely)} patches have no mask ({', '.join(lonely[:3])} for example); expected "
            f"{pairs[0][1].name} beside {pairs[0][0].name}"
        )
    scenes: dict[str, list[tuple[Path, Path]]] = {}
    for image, mask in pairs:
        scenes.setdefault(PATCH_MARK.split(image.stem)[0], []).append((image, mask))
    return scenes


def parse_order(text: str) -> tuple[str, ...]:
    """Return the mask channels of "any,clean,debris". Raises SceneError where they are not these three."""
    order = tuple(part.strip().lower() for part in text.split(","))
    if sorted(order) != sorted(PATCH_CHANNELS):
        raise SceneError(f"--mask-order: found '{text}', expected {', '.join(PATCH_CHANNELS)} in some order")
    return order


def plan_patches(
    name: str,
    patches: Sequence[tuple[Path, Path]],
    order: tuple[str, ...],
    grid: Grid,
    suns: Mapping[str, Sun],
) -> PatchJob:
    """Return the job of a scene's patches after a look at the first one.

    Raises:
        SceneError: the first patch cannot be read or has an unknown number of channels.
    """
    first = patches[0][0]
    shape = load_patch(first).shape
    channels = choose_channels([None] * (shape[-1] if len(shape) == 3 else 0), str(first))
    return PatchJob(name, tuple(patches), channels, find_sun(Path(name), {}, suns), order, grid)


def load_patch(path: Path) -> np.ndarray:
    """Return a .npy file, memory-mapped. Raises SceneError where it cannot be read or holds no numbers."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header may raise almost anything from within its parser
        raise unreadable(path, error) from error
    require_numbers(values, path)
    return values


def patch_tiles(job: PatchJob) -> Iterator[RawTile]:
    """Yield the patches of a scene. Raises SceneError for files that are damaged or of another shape."""
    table = physical_table(list(job.channels), job.sun)
    side = job.grid.size
    for image_path, mask_path in job.patches:
        image, mask = load_patch(image_path), load_patch(mask_path)
        depths = tuple(EXPORTS)
        if image.shape[:2] != (side, side) or image.ndim != 3 or image.shape[2] not in depths:
            expected = " or ".join(f"({side}, {side}, {depth})" for depth in depths)
            raise SceneError(f"{image_path}: found shape {image.shape}, expected {expected}; see --size")
        if mask.shape != (side, side, len(PATCH_CHANNELS)):
            raise SceneError(
                f"{mask_path}: found shape {mask.shape}, expected {(side, side, len(PATCH_CHANNELS))}"
            )

        def read(image: np.ndarray = image, path: Path = image_path) -> np.ndarray:
            values = np.stack([image[..., index] for index in job.channels.values()])
            return to_physical(as_numbers(values, str(path)), table)

        yield RawTile(
            image_path.stem.replace("_img", ""), None, None, patch_codes(mask, job.order), None, read
        )


def patch_codes(mask: np.ndarray, order: Sequence[str]) -> np.ndarray:
    """Return the label codes, (S, S) uint8, of a patch's mask (S, S, 3) whose channels come in this order.

    A pixel that is any glacier but of no kind is a glacier of unknown kind; one of both kinds is debris.
    """
    channel = {name: np.asarray(mask[..., index]) > 0 for index, name in enumerate(order)}
    codes = np.full(mask.shape[:2], OTHER_OR_LAKE, np.uint8)
    codes[channel["any"]] = GLACIER_OR_DEBRIS
    codes[channel["clean"]] = CLASS_NAMES.index("glacier")
    codes[channel["debris"]] = CLASS_NAMES.index("debris")
    return codes
