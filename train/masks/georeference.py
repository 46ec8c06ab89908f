"""Where a raster lies on Earth, and the areas of what is in it: geodesic ones, whatever the projection."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

import numpy as np
import pyproj
import rasterio
import shapely
from affine import Affine
from pyproj.exceptions import CRSError
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

from solution import InputError

CACHE = 2**27  # bytes that GDAL may hold of blocks; its own choice is a twentieth of the memory
BLOCK = 256  # px, side of the blocks whose pixels count as equally large
PARTS = 16  # an edge longer than this part of an outline's extent is divided: edges are no geodesics


class Georeference(NamedTuple):
    """Coordinate reference system and affine transform of a raster; None without a georeference."""

    crs: CRS
    transform: Affine

    def pixel_km(self, shape: Sequence[int]) -> Optional[float]:
        """Return the width in km of a pixel in the middle of a raster of this shape; None as for areas."""
        system = _degrees_of(self.crs)
        if system is None:
            return None
        (left, y), (right, _) = (self.transform @ (column, shape[0] / 2) for column in (0, shape[1]))
        metres = self.geod().line_length(*system.transform([left, right], [y, y]))
        return metres / 1000 / shape[1] if np.isfinite(metres) else None

    def geod(self) -> pyproj.Geod:
        """Return the ellipsoid of the coordinate system."""
        geod = pyproj.CRS.from_wkt(self.crs.to_wkt()).get_geod()
        assert geod is not None, "a system on Earth has an ellipsoid"
        return geod


def describe(shape: Sequence[int], place: Optional[Georeference] = None) -> str:
    """Return a raster's size and, where it is known, its pixel, coordinate system and upper left corner in words."""
    size = f"{shape[1]:,} x {shape[0]:,} px"
    if place is None:
        return size
    width = place.pixel_km(shape)
    metres = f" of {1000 * width:.0f} m" if width else ""
    name = place.crs.to_string() if place.crs.to_epsg() else "a system without EPSG code"
    digits = 4 if place.crs.is_geographic else 0
    return f"{size}{metres}, {name}, corner {place.transform.c:,.{digits}f} / {place.transform.f:,.{digits}f}"


def _degrees_of(crs: CRS) -> Optional[pyproj.Transformer]:
    """Return the way from a system to longitude and latitude on its own ellipsoid; None: it has no such."""
    try:
        system = pyproj.CRS.from_wkt(crs.to_wkt())
    except CRSError:
        return None
    if system.geodetic_crs is None or system.get_geod() is None:  # a local system, tied to no ellipsoid
        return None
    return pyproj.Transformer.from_crs(system, system.geodetic_crs, always_xy=True)


def georeference_of(raster: rasterio.DatasetReader) -> Optional[Georeference]:
    """Return the georeference of an open raster, None where it states none."""
    if raster.crs is None or raster.transform == Affine.identity():
        return None
    return Georeference(raster.crs, raster.transform)


def open_raster(path: str | Path) -> rasterio.DatasetReader:
    """Return an open raster.

    Raises:
        InputError: the file cannot be read as a raster.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(path)
    except RasterioIOError as error:
        raise InputError(f"{path}: cannot be read as a raster ({error}); copy the file again") from error


def geodesic_km2(outlines: Sequence[shapely.Polygon], crs: CRS) -> Optional[np.ndarray]:
    """Return the areas (N,) float64 of polygons on the system's ellipsoid, in km2.

    NaN for a polygon beyond what the system can map; None where it is tied to no place on Earth. Areas of
    geodesic polygons by Karney (2013, doi 10.1007/s00190-012-0578-z), as PROJ computes them.
    """
    system = _degrees_of(crs)
    if system is None:
        return None
    polygons = np.asarray(outlines, dtype=object)
    bounds = shapely.bounds(polygons).reshape(-1, 4)
    longest = (bounds[:, 2:] - bounds[:, :2]).max(axis=1) / PARTS
    divided = shapely.segmentize(polygons, np.maximum(longest, 1e-9))
    degrees = shapely.transform(divided, system.transform, interleaved=False)
    geod = Georeference(crs, Affine.identity()).geod()
    oriented = shapely.orient_polygons(degrees)
    return np.array([abs(geod.geometry_area_perimeter(polygon)[0]) for polygon in oriented]) / 1e6


def count_values(classes: np.ndarray) -> np.ndarray:
    """Return how many pixels (256,) of a raster (H, W) uint8 have each value; row by row, since counting takes eight
    bytes a pixel."""
    return np.sum([np.bincount(row, minlength=256) for row in classes], axis=0)


def class_km2(classes: np.ndarray, place: Optional[Georeference]) -> Optional[np.ndarray]:
    """Return the geodesic area (256,) in km2 of each value of a raster; None where that is not known.

    Args:
        classes: (H, W) uint8.
        place: where it lies; None where that is not known.
    """
    height, width = classes.shape
    corners = [(row, column) for row in range(0, height, BLOCK) for column in range(0, width, BLOCK)]
    blocks = [classes[row : row + BLOCK, column : column + BLOCK] for row, column in corners]
    outlines = [_outline(place, *corner, *block.shape) for corner, block in zip(corners, blocks)] if place else []
    areas = geodesic_km2(outlines, place.crs) if place else None
    if areas is None or not np.isfinite(areas).all():
        return None
    counts = [count_values(block) / block.size for block in blocks]
    return areas @ np.array(counts)


def _outline(place: Georeference, row: int, column: int, height: int, width: int) -> shapely.Polygon:
    """Return the outline of a block of pixels in the raster's system."""
    corners = ((0, 0), (width, 0), (width, height), (0, height))
    return shapely.Polygon([place.transform @ (column + x, row + y) for x, y in corners])
