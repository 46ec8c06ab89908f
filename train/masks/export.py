"""Masks for QGIS and other GIS: GeoTIFFs with a colour table, and polygons with class names and areas."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Iterable, NamedTuple, Optional

import geopandas
import numpy as np
import rasterio
from matplotlib.colors import to_rgb
from rasterio.crs import CRS
from rasterio.features import shapes
from shapely.geometry import shape
from tqdm import tqdm

from solution import (
    CLASS_NAMES,
    CLASS_VALUES,
    InputError,
    TileFiles,
    find_tiles,
    prepare_output,
    read_raster,
    to_mask,
    warn,
    write_atomically,
)
from train.masks.files import read_mask
from train.masks.georeference import Georeference, tile_georeference
from train.masks.pictures import CODE_COLOURS
from train.masks.score import text_table
from train.objective import OTHER

POLYGON_FILE = "glaciers.gpkg"
LAYER = "classes"
COLUMNS = ("tile", "class", "value", "area_km2", "geometry")


class Exported(NamedTuple):
    """What was written: GeoTIFFs, polygons (columns COLUMNS, a frame for each coordinate system), their file,
    and the ids of tiles whose GeoTIFF has no place on Earth."""

    rasters: list[Path]
    polygons: list[geopandas.GeoDataFrame]
    polygon_file: Optional[Path]
    without_place: list[str]


def export_masks(masks: Path, data: Path, out: Path) -> Exported:
    """Write every tile's mask as `out`/<tile id>.tif, and all polygons to `out`/glaciers.gpkg.

    A tile whose bands state no georeference gets a TIFF without one, no polygons, and a warning. Polygons of
    tiles in different coordinate systems go to a layer for each.

    Args:
        masks: folder of masks, one PNG or TIFF a tile, matched by tile id.
        data: Band1 ... Band5 of the tiles.
        out: made where it is absent; files of an earlier export are replaced.

    Raises:
        InputError: no tiles, a tile without a mask or a mask of another size than its tile, or `out` cannot
            be written to or is one of the input folders.
    """
    tiles = find_tiles(data)
    _refuse_inputs(out, masks)
    out = prepare_output(out, data)
    classes = {tile.tile_id: _read_fitting(masks, tile) for tile in tiles}  # all are checked before any
    places = {tile.tile_id: tile_georeference(tile) for tile in tiles}
    rasters, frames = [], []
    for identifier, place in tqdm(places.items(), desc="masks", unit="tile", disable=None):
        rasters.append(out / f"{identifier}.tif")
        write_geotiff(rasters[-1], to_mask(classes[identifier]), place)
        if place:
            frames.append(to_polygons(identifier, classes[identifier], place))
    without = [identifier for identifier, place in places.items() if place is None]
    if without:
        warn(
            f"no georeference in the bands of {', '.join(without)}: their TIFFs are plain ones, without "
            "polygons"
        )
    merged = merge_by_system(frames)
    return Exported(rasters, merged, write_polygons(merged, out / POLYGON_FILE), without)


def _refuse_inputs(out: Path, masks: Path) -> None:
    if out.is_dir() and masks.is_dir() and out.samefile(masks):
        raise InputError(f"{out}: holds the masks to export, which would be overwritten; name another folder")


def _read_fitting(masks: Path, tile: TileFiles) -> np.ndarray:
    """Return a tile's class indices (H, W), of the size of its bands."""
    classes = read_mask(masks, tile)
    expected = read_raster(next(path for path in tile.paths if path)).shape
    if classes.shape != expected:
        raise InputError(
            f"{masks}: the mask of tile {tile.tile_id} has {classes.shape[1]} x {classes.shape[0]} px, "
            f"expected {expected[1]} x {expected[0]} px as in {tile.name}; write it at that size"
        )
    return classes


def write_geotiff(path: Path, mask: np.ndarray, place: Optional[Georeference]) -> None:
    """Write a mask (H, W) uint8 of the competition's values, compressed, with the colours of the classes.

    Nothing is declared nodata: 0 means other as well as not seen.
    """
    height, width = mask.shape
    about = {"driver": "GTiff", "width": width, "height": height, "count": 1, "dtype": "uint8"}
    with rasterio.MemoryFile() as memory:
        where = {"crs": place.crs, "transform": place.transform} if place else {}
        with memory.open(**about, **where, compress="deflate") as raster:
            raster.write(mask, 1)
            raster.write_colormap(1, colour_table())
            raster.update_tags(classes=", ".join(f"{v} {name}" for v, name in zip(CLASS_VALUES, CLASS_NAMES)))
            raster.set_band_description(1, "glacier class")
        write_atomically(path, memory.read())


def colour_table() -> dict[int, tuple[int, int, int, int]]:
    """Return {grey value: (red, green, blue, alpha)} of the four classes, 0 to 255."""
    table = {}
    for code, value in enumerate(CLASS_VALUES):
        red, green, blue = (round(255 * part) for part in to_rgb(CODE_COLOURS[code]))
        table[value] = (red, green, blue, 255)
    return table


def to_polygons(tile_id: str, classes: np.ndarray, place: Georeference) -> geopandas.GeoDataFrame:
    """Return the patches of glacier, debris and lake as polygons along pixel edges, with COLUMNS.

    Patches that touch at a corner only are separate, so that every polygon is valid. `area_km2` is empty
    where the coordinate system counts in degrees.
    """
    found = shapes(classes, mask=classes != OTHER, connectivity=4, transform=place.transform)
    pixel = place.pixel_km2()
    rows = []
    for outline, code in found:
        polygon = shape(outline)
        pixels = polygon.area / abs(place.transform.determinant)
        area = None if pixel is None else round(pixels * pixel, 6)
        rows.append((tile_id, CLASS_NAMES[int(code)], CLASS_VALUES[int(code)], area, polygon))
    return geopandas.GeoDataFrame(rows, columns=list(COLUMNS), geometry="geometry", crs=place.crs)


def merge_by_system(frames: Iterable[geopandas.GeoDataFrame]) -> list[geopandas.GeoDataFrame]:
    """Return the frames as one for each coordinate system, those without a row left out."""
    groups: dict[str, list[geopandas.GeoDataFrame]] = {}
    for frame in frames:
        if len(frame):
            groups.setdefault(frame.crs.to_wkt(), []).append(frame)
    joined = []
    for group in groups.values():
        rows = [row for frame in group for row in frame.itertuples(index=False, name=None)]
        joined.append(
            geopandas.GeoDataFrame(rows, columns=list(COLUMNS), geometry="geometry", crs=group[0].crs)
        )
    return joined


def layer_name(frame: geopandas.GeoDataFrame, systems: int) -> str:
    """Return "classes", with the EPSG code where there are several coordinate systems."""
    code = CRS.from_user_input(frame.crs).to_epsg()
    return LAYER if systems == 1 else f"{LAYER}_{code or 'unknown'}"


def write_polygons(frames: list[geopandas.GeoDataFrame], path: Path) -> Optional[Path]:
    """Write a GeoPackage, whole or not at all; without polygons there is none, and an older one goes."""
    if not frames:
        path.unlink(missing_ok=True)
        return None
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        for frame in frames:
            frame.to_file(draft, layer=layer_name(frame, len(frames)), driver="GPKG", engine="pyogrio")
        write_atomically(path, draft.read_bytes())
    return path


def format_areas(exported: Exported) -> str:
    """Return what was written, and the polygons and km2 of each class, as text."""
    lines = [f"{exported.rasters[0].parent}: {len(exported.rasters)} GeoTIFFs"]
    if exported.polygon_file is None:
        return f"{lines[0]}; no polygons"
    rows = []
    for name in CLASS_NAMES[1:]:
        areas = [
            area for frame in exported.polygons for area in frame.loc[frame["class"] == name, "area_km2"]
        ]
        known = [area for area in areas if area is not None and not np.isnan(area)]
        total = f"{sum(known):,.1f}" if len(known) == len(areas) else "–"
        rows.append([name, f"{len(areas):,}", total])
    return f"{lines[0]}; {exported.polygon_file}:\n\n" + text_table(["class", "polygons", "km²"], rows)
