"""Glacier polygons to label codes: which class a polygon is, and which pixels lie in it."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import geopandas
import numpy as np
import pyogrio
import rasterio.transform
import rasterio.warp
import shapely
from affine import Affine
from rasterio.crs import CRS
from shapely.geometry.base import BaseGeometry

from prep.hkh.landsat7 import SceneError, require_files
from prep.labels import GLACIER_OR_DEBRIS, OTHER_OR_LAKE
from solution import CLASS_NAMES, warn

DEFAULT_COLUMN = "Glaciers"
DEFAULT_WORDS = {"glacier": "clean", "debris": "debris", "lake": "lake"}
# Where polygons overlap, the later of these wins: debris lies on ice, lakes on both.
BURN_ORDER = (GLACIER_OR_DEBRIS, *(CLASS_NAMES.index(name) for name in ("glacier", "debris", "lake")))
FARTHEST = 1e9  # m or degrees, in any coordinate system
AREAS = ("Polygon", "MultiPolygon")


class Polygons(NamedTuple):
    """Polygons in a scene's CRS: `shapes`, their label `codes`, in the order in which they are burnt."""

    shapes: list[BaseGeometry]
    codes: list[int]
    tree: shapely.STRtree


def code_of(value: object, words: Mapping[str, str]) -> int | None:
    """Return the label code of an attribute value by the words in it, upper or lower case; None for none.

    A value with the words of both kinds of glacier is a glacier of unknown kind.
    """
    text = str(value).lower() if isinstance(value, str) else ""
    found = {CLASS_NAMES.index(name) for name, word in words.items() if word.lower() in text}
    if found == {CLASS_NAMES.index("glacier"), CLASS_NAMES.index("debris")}:
        return GLACIER_OR_DEBRIS
    return found.pop() if len(found) == 1 else None


def check_polygons(path: Path, column: str, words: Mapping[str, str]) -> dict[str, int]:
    """Return the number of polygons by attribute value; warn of values that are none of the classes.

    Raises:
        SceneError: unreadable, no such column, no CRS, or no polygon of any class.
    """
    require_files([path, *path.parent.glob(f"{glob.escape(path.stem)}.*")])  # a shapefile has several
    try:
        info = pyogrio.read_info(path)
        table = pyogrio.read_dataframe(path, read_geometry=False)
    except Exception as error:  # GDAL's many kinds for files that are missing or damaged
        raise SceneError(f"{path}: cannot be read as polygons ({error}); copy or export it again") from error
    fields = [str(name) for name in info["fields"]]
    if column not in fields:
        raise SceneError(
            f"{path}: no column '{column}', found {', '.join(fields) or 'none'}; name the one that "
            "tells clean ice from debris with --column"
        )
    if info["crs"] is None:
        raise SceneError(
            f"{path}: has no coordinate system; add its .prj file (the real one is in EPSG:4326)"
        )
    values = Counter(str(value) for value in table[column])
    unknown = {value: count for value, count in values.items() if code_of(value, words) is None}
    listed = ", ".join(f"{value!r} ({count})" for value, count in sorted(unknown.items())[:10])
    wanted = ", ".join(f"'{word}' ({name})" for name, word in words.items())
    if len(unknown) == len(values):
        raise SceneError(
            f"{path}: no polygon of any class; column '{column}' holds {listed or 'nothing'}, expected "
            f"values with {wanted}; set the words with --words"
        )
    if unknown:
        warn(f"{path}: polygons of no class are left out: {listed}; the words looked for are {wanted}")
    return dict(values)


def read_polygons(
    path: Path, column: str, words: Mapping[str, str], crs: CRS, bounds: Sequence[float]
) -> Polygons:
    """Return the polygons that meet a scene, in its CRS.

    Args:
        path: vector file of any format that GDAL reads, in any CRS.
        column: attribute that tells the class.
        words: {class name: word in the attribute's value}.
        crs: of the scene.
        bounds: of the scene in that CRS: left, bottom, right, top.

    Raises:
        SceneError: the file cannot be read.
    """
    try:
        own = CRS.from_user_input(pyogrio.read_info(path)["crs"])
        box = rasterio.warp.transform_bounds(crs, own, *bounds, densify_pts=21)
        table = geopandas.read_file(path, bbox=box, columns=[column])
    except Exception as error:
        raise SceneError(f"{path}: cannot be read ({error}); copy or export it again") from error
    areas = table[table.geom_type.isin(AREAS) & ~table.is_empty]  # a missing geometry has no type
    if len(areas) < len(table):
        warn(f"{path}: {len(table) - len(areas)} shapes near the scene are no polygons and are left out")
    areas = areas.to_crs(crs.to_wkt())
    placed = np.array([on_earth(shape) for shape in areas.geometry], bool)
    if not placed.all():
        warn(f"{path}: {(~placed).sum()} polygons have points that are nowhere on Earth and are left out")
    areas = areas[placed]
    meaning = {value: code_of(value, words) for value in areas[column].unique()}
    coded = [(shape, meaning[value]) for shape, value in zip(areas.geometry, areas[column])]
    return make_polygons([(shape, code) for shape, code in coded if code is not None])


def on_earth(shape: BaseGeometry) -> bool:
    """Return whether all coordinates are finite, and small enough to be metres or degrees on Earth."""
    return bool((np.abs(shapely.get_coordinates(shape)) < FARTHEST).all())  # NaN is not less


def make_polygons(coded: Sequence[tuple[BaseGeometry, int]]) -> Polygons:
    """Return polygons and their codes in burning order, with a tree to find those in a window."""
    ordered = sorted(
        coded, key=lambda pair: BURN_ORDER.index(pair[1])
    )  # stable: the file's order within a class
    shapes = [shape for shape, _ in ordered]
    return Polygons(shapes, [code for _, code in ordered], shapely.STRtree(shapes))


def burn(polygons: Polygons, transform: Affine, shape: tuple[int, int]) -> np.ndarray:
    """Return label codes, `shape` uint8: a pixel is in a polygon where its centre is; else {other, lake}.

    The same as `rasterio.features.rasterize`, which the tests compare it with, in a third of the time: that
    turns every point into a Python object, twice.

    `transform` maps pixels (col, row) of the window to the polygons' CRS.
    """
    mask = np.full(shape, OTHER_OR_LAKE, np.uint8)
    window = shapely.box(*rasterio.transform.array_bounds(*shape, transform))
    near = np.sort(polygons.tree.query(window))
    codes = np.array(polygons.codes)[near] if near.size else near
    for code in BURN_ORDER:
        of_code = [polygons.shapes[index] for index in near[codes == code]]
        if of_code:
            mask[inside(of_code, transform, shape)] = code
    return mask


def inside(shapes: Sequence[BaseGeometry], transform: Affine, shape: tuple[int, int]) -> np.ndarray:
    """Return whether each pixel's centre is in one of the polygons, `shape` bool.

    By winding numbers: along a row of centres, each edge crossed from one side adds 1 and from the other
    takes 1 away. Outer rings run one way and holes the other, so that the sum is 0 outside of all.
    """
    edges = pixel_edges(shapes, transform)
    low, high = np.sort(edges[:, :, 1], axis=1).T  # of each edge, in rows
    first = np.clip(np.ceil(low - 0.5), 0, shape[0]).astype(
        int
    )  # the first row whose centre lies on or past it
    crossed = np.clip(np.ceil(high - 0.5), 0, shape[0]).astype(int) - first
    number = np.repeat(np.arange(len(edges)), crossed)  # the edge of each crossing
    rows = first[number] + np.arange(len(number)) - np.repeat(np.cumsum(crossed) - crossed, crossed)
    (x0, y0), (x1, y1) = edges[number].transpose(1, 2, 0)
    x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
    cols = np.clip(np.ceil(x - 0.5), 0, shape[1]).astype(int)  # the first column whose centre lies past it
    width = shape[1] + 1
    steps = np.bincount(rows * width + cols, weights=np.sign(y1 - y0), minlength=shape[0] * width)
    return steps.reshape(shape[0], width)[:, :-1].cumsum(axis=1) != 0


def pixel_edges(shapes: Sequence[BaseGeometry], transform: Affine) -> np.ndarray:
    """Return all edges of polygons in pixels, (N, 2, 2) float64: start and end, (col, row)."""
    rings = shapely.get_rings(shapely.orient_polygons(shapely.get_parts(shapes)))
    points, ring = shapely.get_coordinates(rings, return_index=True)
    to_pixel = ~transform
    cols = to_pixel.a * points[:, 0] + to_pixel.b * points[:, 1] + to_pixel.c
    rows = to_pixel.d * points[:, 0] + to_pixel.e * points[:, 1] + to_pixel.f
    points = np.stack([cols, rows], axis=1)
    within = ring[1:] == ring[:-1]  # no edge from the end of one ring to the start of the next
    return np.stack([points[:-1][within], points[1:][within]], axis=1)
