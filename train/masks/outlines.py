"""Outlines of classes and of whole glaciers as polygons, their geodesic areas, and intervals for these."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Sequence

import cv2
import geopandas
import numpy as np
import shapely
from rasterio.crs import CRS
from rasterio.features import shapes

from prep.files import write_whole
from solution import CLASS_NAMES, CLASS_VALUES
from train.masks.georeference import Georeference, geodesic_km2
from train.masks.strips import NODATA, STEPS
from train.objective import DEBRIS, GLACIER, LAKE, OTHER

CLASS_COLUMNS = ("tile", "class", "value", "area_km2", "geometry")
# An area's interval lies between the outlines at probabilities of glacier so far above and below a half. Out of
# fold 90 of 100 labelled areas are in it, of a glacier and of a sum of glaciers (reports/maps.md).
MARGINS = {"area": 0.35, "sum": 0.25}
REACH = 16  # px, a possible pixel further from a glacier is none of its own
ROWS_AT_ONCE = 1024  # for which distances are held in memory


# --- Patches of one class -------------------------------------------------------------------------


def to_polygons(name: str, classes: np.ndarray, place: Georeference) -> geopandas.GeoDataFrame:
    """Return the patches of glacier, debris and lake as polygons along pixel edges, with CLASS_COLUMNS.

    Patches that touch at a corner only are separate, so that every polygon is valid. `area_km2` is geodesic,
    and empty where the coordinate system is tied to no place on Earth.
    """
    codes, polygons = trace(classes, (classes != OTHER) & (classes != NODATA), place)
    columns: Mapping[str, object] = {
        "tile": name,
        "class": [CLASS_NAMES[code] for code in codes],
        "value": [CLASS_VALUES[code] for code in codes],
        "area_km2": areas_of(polygons, place.crs),
    }
    return geopandas.GeoDataFrame(columns, columns=list(CLASS_COLUMNS), geometry=polygons, crs=place.crs)


def trace(values: np.ndarray, inside: np.ndarray, place: Georeference) -> tuple[list[int], list[shapely.Polygon]]:
    """Return the values and outlines of all 4-connected patches of equal values."""
    codes, outlines = [], []
    for outline, value in shapes(values, mask=inside, connectivity=4, transform=place.transform):
        codes.append(int(value))
        outlines.append(shapely.geometry.shape(outline))
    return codes, outlines


def areas_of(polygons: Sequence[shapely.Polygon], crs: CRS) -> np.ndarray:
    """Return geodesic areas in km2, NaN where there is no place on Earth."""
    areas = geodesic_km2(polygons, crs)
    return np.full(len(polygons), np.nan) if areas is None else areas


# --- Glaciers of either kind ----------------------------------------------------------------------


class GlacierPixels(NamedTuple):
    """What is counted of each glacier, arrays (N,) over the glaciers where not said otherwise."""

    pixels: np.ndarray
    debris: np.ndarray
    cut: np.ndarray  # bool: nodata or the scene's edge touches it
    low: np.ndarray  # (margins, N) of its pixels, those that are surer than a half by a margin
    high: np.ndarray  # (margins, N) its pixels and those beside it that are less sure by no more than a margin


def glacier_polygons(
    classes: np.ndarray,
    probability: np.ndarray,
    place: Georeference,
    min_km2: float = 0.0,
    smooth: bool = False,
) -> geopandas.GeoDataFrame:
    """Return one polygon for each 4-connected glacier of either kind.

    Columns: id, area_km2 (geodesic), area_low_km2 and area_high_km2, sum_low_km2 and sum_high_km2 (see
    docs/maps.md), clean_share and debris_share (0 to 1), cut (nodata or the edge of the scene touches it).

    Args:
        classes: (H, W) uint8, NODATA where nothing was measured.
        probability: (H, W) uint8 of glacier of either kind, in STEPS.
        place: where the scene lies.
        min_km2: smaller glaciers are left out.
        smooth: whether the steps of the pixels are smoothed, by up to a pixel; areas are those of the result.
    """
    ice = (classes == GLACIER) | (classes == DEBRIS)
    labels = cv2.connectedComponents(ice.astype(np.uint8), connectivity=4)[1]
    counted = count_glaciers(labels, classes, probability, list(MARGINS.values()))
    numbers, polygons = trace(labels, labels > 0, place)
    if smooth:
        pixel = abs(place.transform.determinant) ** 0.5
        polygons = [shapely.simplify(polygon, pixel) for polygon in polygons]
    areas = areas_of(polygons, place.crs)
    of = GlacierPixels._make(values[..., numbers] for values in counted)
    ends = {
        f"{name}_{end}_km2": areas * pixels / of.pixels
        for name, *both in zip(MARGINS, of.low, of.high)
        for end, pixels in zip(("low", "high"), both)
    }
    frame = geopandas.GeoDataFrame(
        {
            "area_km2": areas,
            **ends,
            "clean_share": 1 - of.debris / of.pixels,
            "debris_share": of.debris / of.pixels,
            "cut": of.cut,
        },
        geometry=polygons,
        crs=place.crs,
    )
    frame = frame[~(areas < min_km2)].sort_values("area_km2", ascending=False, kind="stable")
    frame.insert(0, "id", range(1, len(frame) + 1))
    return frame.reset_index(drop=True)


def count_glaciers(
    labels: np.ndarray, classes: np.ndarray, probability: np.ndarray, margins: Sequence[float]
) -> GlacierPixels:
    """Return what is counted of each glacier; number 0 stands for what is none.

    Args:
        labels: (H, W) int32, the number of each pixel's glacier.
        classes: (H, W) uint8, NODATA where nothing was measured.
        probability: (H, W) uint8 of glacier of either kind, in STEPS.
        margins: of probability above and below a half.
    """
    number = int(labels.max()) + 1
    sums = np.zeros((2 + 2 * len(margins), number), np.int64)
    cut = np.zeros(number, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        cut[edge] = True
    for top in range(0, len(labels), ROWS_AT_ONCE):
        start = max(top - REACH, 0)
        mine = slice(top - start, top - start + min(ROWS_AT_ONCE, len(labels) - top))
        here, kinds, likely = (part[start : top + ROWS_AT_ONCE + REACH] for part in (labels, classes, probability))
        missing = cv2.dilate((kinds == NODATA).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        cut[here[missing]] = True
        near = nearest_glacier(here) * (kinds != NODATA)
        chosen = [here > 0, (here > 0) & (kinds == DEBRIS)]
        chosen += [(here > 0) & (likely >= (0.5 + margin) * STEPS) for margin in margins]
        chosen += [(here > 0) | (likely > (0.5 - margin) * STEPS) for margin in margins]
        for row, which in enumerate(chosen):
            sums[row] += np.bincount(near[mine][which[mine]], minlength=number)
    low, high = np.split(sums[2:], 2)
    return GlacierPixels(sums[0], sums[1], cut, low, high)


def nearest_glacier(labels: np.ndarray) -> np.ndarray:
    """Return the number (H, W) of the glacier nearest to each pixel, 0 where none is within REACH."""
    if not labels.any():
        return np.zeros_like(labels)
    outside = (labels == 0).astype(np.uint8)
    distance, places = cv2.distanceTransformWithLabels(outside, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    number_at = np.zeros(int(places.max()) + 1, labels.dtype)
    inside = labels > 0
    number_at[places[inside]] = labels[inside]
    return np.where(distance <= REACH, number_at[places], 0)


def lake_polygons(classes: np.ndarray, place: Georeference) -> geopandas.GeoDataFrame:
    """Return the lakes as polygons with `area_km2`."""
    polygons = trace(classes, classes == LAKE, place)[1]
    return geopandas.GeoDataFrame({"area_km2": areas_of(polygons, place.crs)}, geometry=polygons, crs=place.crs)


# --- Files ----------------------------------------------------------------------------------------


def write_geopackage(layers: Mapping[str, geopandas.GeoDataFrame], path: Path) -> Optional[Path]:
    """Write a GeoPackage, whole or not at all; without any layer there is none, and an older one goes."""
    if not layers:
        path.unlink(missing_ok=True)
        return None

    def save(part: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
            draft = Path(folder) / path.name
            for name, frame in layers.items():
                frame.to_file(draft, layer=name, driver="GPKG", engine="pyogrio")
            draft.replace(part)

    write_whole(path, save)
    return path
