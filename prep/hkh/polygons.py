"""Glacier outlines to label codes: what a vector file or an outline in it shows, and which pixels lie in it."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import geopandas
import numpy as np
import pyogrio
import rasterio
import rasterio.features
import rasterio.warp
import shapely
from rasterio.crs import CRS
from shapely.geometry.base import BaseGeometry

from prep.hkh.landsat7 import SceneError, reading, require_files
from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from solution import CLASS_NAMES, warn

DEFAULT_COLUMN = "Glaciers"
DEFAULT_WORDS = {"glacier": "clean", "debris": "debris", "lake": "lake"}
EXTENT_WORD = "glacier"  # in the name of a file with outlines of either kind, such as Glacier_2005.shp
KINDS = {"clean": 1, "debris": 2, "lake": 3, "any": GLACIER_OR_DEBRIS}  # codes of --kinds
# Where outlines overlap, the later of these wins: debris lies on ice, lakes on both.
BURN_ORDER = (GLACIER_OR_DEBRIS, *(CLASS_NAMES.index(name) for name in ("glacier", "debris", "lake")))
FARTHEST = 1e9  # m or degrees, in any coordinate system
AREAS = ("Polygon", "MultiPolygon")
EQUAL_AREA = "EPSG:6933"
LEAST_REGION = 2  # times the glaciers' area: a border around less encloses glaciers, and no region


class Layer(NamedTuple):
    """A layer of a vector file: the label code of all its outlines, or None where `column` tells the kind of each."""

    path: Path
    code: int | None
    column: str = DEFAULT_COLUMN
    words: Mapping[str, str] = DEFAULT_WORDS
    layer: str | None = None  # None: the file's only one

    def files(self) -> list[Path]:
        """Return the file and what belongs to it; a shapefile has several parts, a .gdb is a folder."""
        return files_of(self.path)


def files_of(path: Path) -> list[Path]:
    """Return a vector file and the files that belong to it."""
    if path.is_dir():
        return sorted(path.iterdir())
    return sorted({path, *path.parent.glob(f"{glob.escape(path.stem)}.*")})


def code_of(value: object, words: Mapping[str, str]) -> int | None:
    """Return the label code of an attribute value by the words in it, upper or lower case; None for none.

    A value with the words of both kinds of glacier is a glacier of unknown kind.
    """
    text = str(value).lower() if isinstance(value, str) else ""
    found = {CLASS_NAMES.index(name) for name, word in words.items() if word.lower() in text}
    if found == {CLASS_NAMES.index("glacier"), CLASS_NAMES.index("debris")}:
        return GLACIER_OR_DEBRIS
    return found.pop() if len(found) == 1 else None


# --- Which file shows what ------------------------------------------------------------------------


def plan_layers(
    paths: Sequence[Path],
    kinds: Sequence[str] | None,
    column: str,
    words: Mapping[str, str],
    wanted: Sequence[str] = (),
) -> tuple[Layer, ...]:
    """Return vector files with what they show: by `kinds`, else by their names, else by their column.

    `wanted`: layers of files with several.

    Raises SceneError: a file that cannot be read or does not say where or what its outlines are.
    """
    chosen = [(path, layer) for path in paths for layer in choose_layers(path, wanted)]
    if absent := sorted(set(wanted) - {layer for _, layer in chosen}):
        raise SceneError(f"--layer: no file of --labels has several layers, of which one is {absent[0]}")
    if kinds and (len(kinds) != len(chosen) or not set(kinds) <= set(KINDS)):
        raise SceneError(
            f"--kinds: found {','.join(kinds)} for {len(chosen)} file(s) or layers of --labels, expected one of "
            f"{', '.join(KINDS)} for each, e.g. --kinds clean,debris"
        )
    told: Sequence[str | None] = kinds or [None] * len(chosen)
    return tuple(plan_layer(*one, kind, column, words) for one, kind in zip(chosen, told))


def choose_layers(path: Path, wanted: Sequence[str] = ()) -> list[str | None]:
    """Return the layers of a vector file to read, None for its only one.

    Raises SceneError: it cannot be read, or has several and none is wanted.
    """
    require_files(files_of(path))
    with reading(path):
        names = [str(name) for name in pyogrio.list_layers(path)[:, 0]]
    found: list[str | None] = [name for name in wanted if name in names]
    if len(names) > 1 and not found:
        raise SceneError(
            f"{path}: found the layers {', '.join(names)}, expected one; name those of --labels with --layer, e.g. "
            f"--layer {names[0]}, and export that of --border as a file of its own"
        )
    return found if len(names) > 1 else [None]


def plan_layer(path: Path, layer: str | None, kind: str | None, column: str, words: Mapping[str, str]) -> Layer:
    """Return a layer of a vector file with what it shows. Raises SceneError as `plan_layers`."""
    fields = read_fields(path, layer)
    name = layer or path.stem
    named = code_of(name, words)
    if kind:
        return Layer(path, KINDS[kind], layer=layer)
    if named not in (None, GLACIER_OR_DEBRIS):  # with the words of both kinds its column has to tell
        return Layer(path, named, layer=layer)
    if column in fields:
        planned = Layer(path, None, column, words, layer)
        check_column(planned)
        return planned
    if EXTENT_WORD in name.lower() or named is not None:
        return Layer(path, GLACIER_OR_DEBRIS, layer=layer)
    raise SceneError(
        f"{path}: no column '{column}', found {', '.join(fields) or 'none'}; name the one that tells clean ice from "
        "debris with --column, or say what the file shows with --kinds. A border of the region goes to --border"
    )


def read_fields(path: Path, layer: str | None) -> list[str]:
    """Return the columns of a layer. Raises SceneError where it cannot be read or has no coordinate system."""
    with reading(path):
        info = pyogrio.read_info(path, layer=layer)
    if info["crs"] is None:
        raise SceneError(f"{path}: has no coordinate system; add its .prj file (the real one is in EPSG:4326)")
    return [str(name) for name in info["fields"]]


def check_column(layer: Layer) -> None:
    """Warn of values that are none of the classes. Raises SceneError where all are."""
    path, _, column, words, name = layer
    with reading(path):
        table = pyogrio.read_dataframe(path, layer=name, columns=[column], read_geometry=False)
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


def plan_border(path: Path, layers: Sequence[Layer]) -> Layer:
    """Return the region inside of which there are labels.

    Raises SceneError: it cannot be read, or encloses glaciers rather than a region, as the `hkh.shp` of some
    copies.
    """
    border = Layer(path, 1, layer=choose_layers(path)[0])
    read_fields(path, border.layer)
    areas = {"kinds": 0.0, "extents": 0.0}
    for layer in layers:
        areas["extents" if layer.code == GLACIER_OR_DEBRIS else "kinds"] += area_km2(layer)
    region, glaciers = area_km2(border), max(areas.values())
    if region < LEAST_REGION * glaciers:
        raise SceneError(
            f"--border {path}: encloses {region:,.1f} km2, the outlines of --labels {glaciers:,.1f} km2, expected a "
            "region far larger than its glaciers. These look like outlines of glaciers, outside of which there is "
            "ground that is none: leave --border out, or add the file to --labels, with any in --kinds"
        )
    return border


def area_km2(layer: Layer) -> float:
    """Return the area of all outlines of a file. Raises SceneError where it cannot be read."""
    with reading(layer.path):
        areas = geopandas.read_file(layer.path, layer=layer.layer, columns=[]).to_crs(EQUAL_AREA).area
    return float(areas[np.isfinite(areas)].sum()) / 1e6


# --- Pixels ---------------------------------------------------------------------------------------


def burn(layers: Sequence[Layer], border: Layer | None, scene: rasterio.DatasetReader) -> np.ndarray:
    """Return a scene's label codes, (H, W) uint8: a pixel is in an outline where its centre is.

    Else it is background, {other, lake}, and ignored outside of the border.

    Raises:
        SceneError: a vector file cannot be read.
    """
    coded = [pair for layer in layers for pair in read_outlines(layer, scene.crs, scene.bounds)]
    coded.sort(key=lambda pair: BURN_ORDER.index(pair[1]))  # stable: the file's order within a class
    codes = rasterise(coded, OTHER_OR_LAKE, scene)
    if border is not None:
        region = rasterise(read_outlines(border, scene.crs, scene.bounds), 0, scene)
        codes[region == 0] = IGNORE
    return codes


def rasterise(coded: Sequence[tuple[BaseGeometry, int]], fill: int, scene: rasterio.DatasetReader) -> np.ndarray:
    """Return the codes of outlines, (H, W) uint8 on the scene's grid, the last where they overlap, else `fill`."""
    if not coded:
        return np.full(scene.shape, fill, np.uint8)
    return rasterio.features.rasterize(coded, scene.shape, fill, transform=scene.transform, dtype=np.uint8)


def read_outlines(layer: Layer, crs: CRS, bounds: Sequence[float]) -> list[tuple[BaseGeometry, int]]:
    """Return (outline, code) of what meets a scene, in its CRS; `bounds` are left, bottom, right, top in it.

    Raises SceneError: the file cannot be read.
    """
    with reading(layer.path):
        own = CRS.from_user_input(pyogrio.read_info(layer.path, layer=layer.layer)["crs"])
        box = rasterio.warp.transform_bounds(crs, own, *bounds, densify_pts=21)
        columns = [layer.column] if layer.code is None else []
        table = geopandas.read_file(layer.path, layer=layer.layer, bbox=box, columns=columns)
    areas = table[table.geom_type.isin(AREAS) & ~table.is_empty]  # a missing geometry has no type
    if len(areas) < len(table):
        warn(f"{layer.path}: {len(table) - len(areas)} shapes near the scene are no polygons and are left out")
    shapes = areas.to_crs(crs.to_wkt()).geometry
    values = areas[layer.column] if layer.code is None else [None] * len(areas)
    codes = [code_of(value, layer.words) if layer.code is None else layer.code for value in values]
    placed = [on_earth(shape) for shape in shapes]
    if not all(placed):
        warn(f"{layer.path}: {placed.count(False)} polygons have points that are nowhere on Earth and are left out")
    return [(shape, code) for shape, code, ok in zip(shapes, codes, placed) if ok and code is not None]


def on_earth(shape: BaseGeometry) -> bool:
    """Return whether all coordinates are finite, and small enough to be metres or degrees on Earth."""
    return bool((np.abs(shapely.get_coordinates(shape)) < FARTHEST).all())  # NaN is not less
