"""Scenes as they come: Landsat products as USGS delivers them, the competition's folders, any five rasters.

A scene is never held as a whole: its bands are read by windows, in physical units.
"""

from __future__ import annotations

import re
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Sequence

import numpy as np
import rasterio
from rasterio.windows import Window

from solution import (
    BANDS,
    MOST_PIXELS,
    InputError,
    TileFiles,
    convert_units,
    find_tiles,
    judge_units,
    measured,
    to_physical,
    warn,
)
from train.masks.georeference import CACHE, Georeference, describe, georeference_of, open_raster

# Sensor and satellite, level, path and row, dates, collection and tier, as USGS names products and files.
PRODUCT = re.compile(
    r"((L[A-Z]\d\d)_(L\w{3})_\d{6}_\d{8}_\d{8}_(\d\d)_(?:T1|T2|RT))_(\w+)\.(?:TIFF?|txt)", re.IGNORECASE
)
BAND_NAMES = tuple(f"{'ST' if band.unit == 'kelvin' else 'SR'}_{band.landsat}" for band in BANDS)
TARS = (".tar", ".tar.gz", ".tgz")
# Bits of QA_PIXEL (Landsat 8-9 Collection 2 Level 2 Science Product Guide, LSDS-1619). Cirrus is left: its
# band sees high mountains too.
FILL, CLOUDS = 1 << 0, 1 << 1 | 1 << 3 | 1 << 4  # dilated cloud, cloud, cloud shadow
METADATA = ("LANDSAT_PRODUCT_ID", "DATE_ACQUIRED", "SUN_ELEVATION", "SUN_AZIMUTH")  # of MTL, degrees
LARGEST_NUMBER = 65455  # of a reflectance; beyond it the sensor or the correction was saturated
PROBE = 512  # px, side of the picture from which units are judged
EXPECTED = (
    "expected a Landsat 8 or 9 Collection-2 Level-2 product (folder or tar with "
    f"{', '.join(BAND_NAMES)}, QA_PIXEL), a folder with Band1 ... Band5, or five rasters after --bands"
)


class Scene(NamedTuple):
    """What a map is made of: where the bands are, how large they are and where they lie.

    `bands` are five names that GDAL opens, in the order of BANDS; `quality` is QA_PIXEL, if there is one; `about`
    is what MTL says of METADATA.
    """

    name: str
    bands: tuple[str, ...]
    quality: Optional[str]
    shape: tuple[int, int]
    place: Optional[Georeference]
    about: Mapping[str, str] = {}


# --- Finding --------------------------------------------------------------------------------------


def find_scenes(source: Path) -> list[Scene]:
    """Return the scenes of a folder or tar, or of the folders and tars in it.

    Raises:
        InputError: there is none, or one that cannot be used; it says what it looks like.
    """
    if not source.exists():
        raise InputError(f"{source}: no such folder or file; {EXPECTED}")
    files = _list_tar(source) if source.name.lower().endswith(TARS) else _list_folder(source)
    products: dict[str, dict[str, str]] = {}
    for name, opened in files.items():
        found = PRODUCT.fullmatch(name)
        if found:
            _refuse_other_products(found, source)
            products.setdefault(found[1], {})[found[5].upper()] = opened
    if products:
        return [_open_product(name, parts, source) for name, parts in sorted(products.items())]
    inside = [path for path in sorted(source.iterdir()) if _may_hold_product(path)] if source.is_dir() else []
    if inside:
        return [scene for path in inside for scene in find_scenes(path)]
    if source.is_dir() and (source / "Band1").is_dir():
        return [tile_scene(tile) for tile in find_tiles(source)]
    there = ", ".join([path.name for path in sorted(source.iterdir())][:5]) if source.is_dir() else "a file"
    raise InputError(f"{source}: no scene in it, found {there or 'nothing'}; {EXPECTED}")


def _list_tar(path: Path) -> dict[str, str]:
    try:
        with tarfile.open(path) as archive:
            members = archive.getnames()
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path}: cannot be read as a tar ({error}); download it again") from error
    return {Path(name).name: f"/vsitar/{path.resolve()}/{name.removeprefix('./')}" for name in members}


def _list_folder(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        raise InputError(f"{folder}: is neither folder nor tar; {EXPECTED}")
    return {path.name: str(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _may_hold_product(path: Path) -> bool:
    if path.is_dir():
        return any(PRODUCT.fullmatch(name) for name in _list_folder(path))
    return path.name.lower().endswith(TARS)


def _refuse_other_products(found: re.Match, source: Path) -> None:
    """Raise InputError for products that look like ours and hold other bands or other units."""
    sensor, level, collection = found[2].upper(), found[3].upper(), found[4]
    advice = "order the Level-2 product (L2SP) of Landsat 8 or 9, Collection 2, at earthexplorer.usgs.gov"
    looks = {
        "another sensor, whose bands have other numbers": sensor not in ("LC08", "LC09"),
        "Collection 1, which has other units": collection != "02",
        "Level-1, numbers at the sensor without reflectance or temperature": level.startswith("L1"),
        "a product without surface temperature": level == "L2SR",
    }
    for what, applies in looks.items():
        if applies:
            raise InputError(f"{source}: {found[1]} looks like {what}, expected LC08_L2SP or LC09_L2SP; {advice}")


def _open_product(name: str, parts: Mapping[str, str], source: Path) -> Scene:
    missing = [band for band in BAND_NAMES if band not in parts]
    if missing:
        raise InputError(
            f"{source}: {name} has no {', '.join(missing)}, expected {', '.join(BAND_NAMES)}; "
            "download the whole product"
        )
    if "QA_PIXEL" not in parts:
        warn(f"{source}: {name} has no QA_PIXEL: clouds stay in the map")
    scene = open_scene(name, [parts[band] for band in BAND_NAMES], parts.get("QA_PIXEL"))
    return scene._replace(about=_read_metadata(parts["MTL"], source) if "MTL" in parts else {})


def _read_metadata(opened: str, source: Path) -> dict[str, str]:
    """Return what a product's MTL says of METADATA; of a key that comes again, as in a Level-2 product, the first."""
    if source.is_dir():
        content = Path(opened).read_bytes()
    else:
        with tarfile.open(source) as archive:
            member = next(one for one in archive if Path(one.name).name == Path(opened).name)
            content = (archive.extractfile(member) or BytesIO()).read()
    said = dict(reversed(re.findall(r'(\w+) = "?([^"\r\n]+)', content.decode(errors="replace"))))
    return {key: said[key] for key in METADATA if key in said}


def tile_scene(tile: TileFiles) -> Scene:
    """Return a tile of the competition's folders as a scene.

    Raises:
        InputError: a band is missing, unreadable, or of another size or place than the others.
    """
    missing = [band.folder for band, path in zip(BANDS, tile.paths) if path is None]
    if missing:
        raise InputError(f"tile {tile.tile_id}: no file in {', '.join(missing)}; add it or remove the tile")
    return open_scene(tile.tile_id, [str(path) for path in tile.paths])


def open_scene(name: str, bands: Sequence[str], quality: Optional[str] = None) -> Scene:
    """Return a scene after a look into all its files.

    Raises:
        InputError: a file cannot be read, has several bands, or differs from the first in size or place; or
            the scene is too large or not north up.
    """
    grids = []
    for path in filter(None, [*bands, quality]):
        with open_raster(path) as raster:
            if raster.count != 1:
                raise InputError(f"{path}: {raster.count} bands, expected one; split it, one file a band")
            grids.append((raster.shape, georeference_of(raster)))
            if grids[-1] != grids[0] and None not in (grids[0][1], grids[-1][1]) or raster.shape != grids[0][0]:
                raise InputError(
                    f"{path}: {describe(*grids[-1])}, expected {describe(*grids[0])} as in {bands[0]}; "
                    "resample it to that grid (gdalwarp)"
                )
    shape, place = next((grid for grid in grids if grid[1]), grids[0])
    if shape[0] * shape[1] > MOST_PIXELS:
        raise InputError(f"{bands[0]}: {shape[1]} x {shape[0]} px, expected {MOST_PIXELS:,} px or fewer; cut it")
    if place and (place.transform.b or place.transform.d or place.transform.e > 0):
        raise InputError(f"{bands[0]}: is rotated or south up, expected north up; turn all bands with gdalwarp")
    return Scene(name, tuple(bands), quality, shape, place)


# --- Reading --------------------------------------------------------------------------------------


def read_rows(scene: Scene, top: int, bottom: int, keep_clouds: bool = True) -> np.ndarray:
    """Return rows `top` to `bottom` of a scene, (h, W, 5) float32 in physical units, NaN where nodata.

    Fill is nodata, and so are cloud and its shadow by QA_PIXEL unless `keep_clouds`.

    Raises:
        InputError: a file is damaged.
    """
    window = Window(0, top, scene.shape[1], bottom - top)
    image = np.empty((bottom - top, scene.shape[1], len(BANDS)), np.float32)
    for index, path in enumerate(scene.bands):
        image[..., index] = _read_band(path, window)
    convert_units(image, "dn", scene.name)
    if scene.quality:
        bits = _read(scene.quality, window).data
        image[(bits & (FILL if keep_clouds else FILL | CLOUDS)) > 0] = np.nan
    return image


def _read_band(path: str, window: Optional[Window], shape: Optional[tuple[int, int]] = None) -> np.ndarray:
    """Return a band's values as stored, (h, W) float32, NaN where it or its mask says nodata."""
    stored = _read(path, window, shape)
    return np.where(stored.mask, np.float32(np.nan), measured(stored.data))


def _read(path: str, window: Optional[Window], shape: Optional[tuple[int, int]] = None) -> np.ma.MaskedArray:
    with rasterio.Env(GDAL_CACHEMAX=CACHE), open_raster(path) as raster:
        try:
            return raster.read(1, window=window, out_shape=shape, masked=True)
        except rasterio.errors.RasterioIOError as error:
            raise InputError(f"{path}: is damaged ({error}); copy or download it again") from error


def check_units(scene: Scene) -> None:
    """Raise InputError where the values of a scene cannot be Level-2 numbers; it says what they look like."""
    shape = (min(PROBE, scene.shape[0]), min(PROBE, scene.shape[1]))
    sample = np.stack([_read_band(path, None, shape) for path in scene.bands], axis=-1)
    doubt = ", ".join(one.name for one in judge_units(sample) if one)
    empty = [path for index, path in enumerate(scene.bands) if np.isnan(sample[..., index]).all()]
    if empty:
        raise InputError(f"{empty[0]}: no value in it; give a band with measurements")
    if doubt:
        raise InputError(
            f"{scene.bands[-1]} and the bands beside it look like {doubt}, expected Level-2 numbers (about 7000 to "
            "65535); order the scene as Collection 2 Level-2"
        )


def saturated(image: np.ndarray) -> int:
    """Return how many pixels of an image (h, W, 5) are saturated in a reflective band."""
    limit = min(to_physical(np.array(LARGEST_NUMBER), band) for band in BANDS[:4])
    return int((image[..., :4] >= limit).any(axis=-1).sum())
