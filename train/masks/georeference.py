"""Where a tile lies and how large its pixels are, from the tags of its GeoTIFF."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple, Optional

import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

from solution import InputError, TileFiles


class Georeference(NamedTuple):
    """Coordinate reference system and affine transform of a raster; None without a georeference."""

    crs: CRS
    transform: Affine

    def pixel_km2(self) -> Optional[float]:
        """Return the area of a pixel in km2; None where the system counts in degrees, not in metres."""
        if not self.crs.is_projected:
            return None
        metres = self.crs.linear_units_factor[1]
        return abs(self.transform.determinant) * (metres / 1000) ** 2

    def pixel_km(self) -> Optional[float]:
        """Return the width of a pixel in km; None as in `pixel_km2`."""
        area = self.pixel_km2()
        return None if area is None else area**0.5


def read_georeference(path: Path) -> Optional[Georeference]:
    """Return the georeference of a raster, None where it states none.

    Raises:
        InputError: the file cannot be read as a raster.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as raster:
                if raster.crs is None or raster.transform == Affine.identity():
                    return None
                return Georeference(raster.crs, raster.transform)
    except RasterioIOError as error:
        raise InputError(f"{path}: cannot be read as a raster ({error}); copy the file again") from error


def tile_georeference(tile: TileFiles) -> Optional[Georeference]:
    """Return the georeference of the first of a tile's files that states one.

    Raises:
        InputError: a file cannot be read as a raster.
    """
    for path in filter(None, tile.paths):
        found = read_georeference(path)
        if found:
            return found
    return None
