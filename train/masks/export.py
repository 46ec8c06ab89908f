"""Masks for QGIS and other GIS: GeoTIFFs with a colour table, and polygons with class names and areas."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Mapping, NamedTuple, Optional

import geopandas
import pandas
from tqdm import tqdm

from prep.label_files import LabelFile
from prep.text import NONE
from solution import (
    CLASS_NAMES,
    CLASS_VALUES,
    InputError,
    TileFiles,
    find_tiles,
    prepare_output,
    to_mask,
    warn,
)
from train.masks.files import Masks, find_mask, read_classes, survey_masks
from train.masks.georeference import Georeference, georeference_of, open_raster
from train.masks.outlines import to_polygons, write_geopackage
from train.masks.rasters import Layout, write_raster

POLYGON_FILE = "glaciers.gpkg"
LAYER = "classes"
VALUES = {value: (code, CLASS_NAMES[code]) for code, value in enumerate(CLASS_VALUES)}


class Exported(NamedTuple):
    """What was written: GeoTIFFs, polygons by layer (CLASS_COLUMNS of `outlines`), their file, and the ids of
    tiles whose GeoTIFF has no place on Earth."""

    rasters: list[Path]
    polygons: Mapping[str, geopandas.GeoDataFrame]
    polygon_file: Optional[Path]
    without_place: list[str]


def export_masks(masks: Path, data: Path, out: Path) -> Exported:
    """Write every tile's mask as `out`/<tile id>.tif, and all polygons to `out`/glaciers.gpkg.

    A tile whose bands state no georeference gets a TIFF without one, no polygons, and a warning. Polygons of
    tiles in different coordinate systems go to a layer for each. Areas are geodesic.

    Args:
        masks: folder of masks, one PNG or TIFF a tile, matched by tile id.
        data: Band1 ... Band5 of the tiles.
        out: made where it is absent; files of an earlier export are replaced.

    Raises:
        InputError: no tiles, a tile without a mask or a mask of another size than its tile, or `out` cannot
            be written to or is one of the input folders.
    """
    tiles = find_tiles(data)
    if out.is_dir() and masks.is_dir() and out.samefile(masks):
        raise InputError(f"{out}: holds the masks to export, which would be overwritten; name another folder")
    found, out = survey_masks(masks, only=[tile.tile_id for tile in tiles]), prepare_output(out, data)
    fitting = [_find_fitting(found, tile) for tile in tiles]  # all are checked before any is written
    rasters, frames, without = [], [], []
    for tile, (mask, place) in zip(tqdm(tiles, desc="masks", unit="tile", disable=None), fitting):
        classes = read_classes(mask, found.values)
        layout = Layout(classes.shape, ("glacier class",), values=VALUES)  # no nodata: 0 is other or not seen
        rasters.append(write_raster(out / f"{tile.tile_id}.tif", place, layout, [(0, to_mask(classes)[None])]))
        if place:
            frames.append(to_polygons(tile.tile_id, classes, place))
        else:
            without.append(tile.tile_id)
    if without:
        warn(f"no georeference in the bands of {', '.join(without)}: their TIFFs are plain ones, without polygons")
    layers = as_layers(frames)
    return Exported(rasters, layers, write_geopackage(layers, out / POLYGON_FILE), without)


def _find_fitting(masks: Masks, tile: TileFiles) -> tuple[LabelFile, Optional[Georeference]]:
    """Return a tile's mask, of the size of its bands, and the place that these state."""
    places, shapes = [], []
    for path in filter(None, tile.paths):
        with open_raster(path) as raster:
            places.append(georeference_of(raster))
            shapes.append(raster.shape)
    return find_mask(masks, tile, shapes[0]), next(filter(None, places), None)


def as_layers(frames: Iterable[geopandas.GeoDataFrame]) -> dict[str, geopandas.GeoDataFrame]:
    """Return {layer: frame}, one for each coordinate system, those without a row left out.

    A layer is called "classes"; where there are several, after the system's EPSG code, or "custom", with a
    number behind names that come again.
    """
    groups: dict[str, list[geopandas.GeoDataFrame]] = {}
    for frame in frames:
        if len(frame):
            groups.setdefault(frame.crs.to_wkt(), []).append(frame)
    layers: dict[str, geopandas.GeoDataFrame] = {}
    for group in groups.values():
        name = LAYER if len(groups) == 1 else f"{LAYER}_{group[0].crs.to_epsg() or 'custom'}"
        again = sum(layer == name or layer.startswith(f"{name}_") for layer in layers)
        layers[f"{name}_{again + 1}" if again else name] = pandas.concat(group, ignore_index=True)
    return layers


def format_areas(exported: Exported) -> str:
    """Return what was written, and the polygons and km2 of each class, as text."""
    lines = [f"{exported.rasters[0].parent}: {len(exported.rasters)} GeoTIFFs"]
    if exported.polygon_file is None:
        return f"{lines[0]}; no polygons"
    polygons = pandas.concat([frame.drop(columns="geometry") for frame in exported.polygons.values()])
    areas = polygons.groupby("class")["area_km2"].agg(polygons="size", **{"km²": lambda km2: km2.sum(skipna=False)})
    table = areas.reindex(CLASS_NAMES[1:], fill_value=0).to_string(float_format="{:,.1f}".format, na_rep=NONE)
    return f"{lines[0]}; {exported.polygon_file}:\n\n{table}"
