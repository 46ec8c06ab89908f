"""The ground that a store's tiles lie on: `ground.geojson` in the store, one outline a tile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Iterable, Mapping

import numpy as np
import rasterio.transform
import rasterio.warp
import shapely
from affine import Affine
from rasterio.crs import CRS

from prep.store import StoreError

GROUND_FILE = "ground.geojson"
WGS84 = "EPSG:4326"


def outline(crs: CRS, transform: Affine, height: int, width: int) -> shapely.Polygon:
    """Return the four corners of a raster as a polygon in longitude and latitude; inf where there are none."""
    rows, cols = (0, 0, height, height), (0, width, width, 0)
    xs, ys = rasterio.transform.xy(transform, rows, cols, offset="ul")
    return shapely.Polygon(np.transpose(rasterio.warp.transform(crs, WGS84, xs, ys)))


def write_ground(folder: Path, outlines: Mapping[str, shapely.Polygon]) -> None:
    """Write the outlines by tile id, longitude and latitude, into a store that is being made."""
    features = [
        {"type": "Feature", "properties": {"tile_id": name}, "geometry": shapely.geometry.mapping(polygon)}
        for name, polygon in outlines.items()
    ]
    content = json.dumps({"type": "FeatureCollection", "features": features})
    (folder / GROUND_FILE).write_text(content + "\n", encoding="utf-8")


def read_ground(store: str | os.PathLike) -> dict[str, shapely.Polygon]:
    """Return {tile_id: outline} of a store. Raises StoreError where it does not say where its tiles lie."""
    path = Path(store) / GROUND_FILE
    try:
        features = json.loads(path.read_text(encoding="utf-8"))["features"]
        return {part["properties"]["tile_id"]: shapely.geometry.shape(part["geometry"]) for part in features}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path}: cannot be read ({error}); expected where the store's tiles lie. Make the store again from "
            "files with a georeference, with python -m prep competition or python -m prep hkh"
        ) from error


def on_ground(outlines: Mapping[str, shapely.Polygon], ground: Iterable[shapely.Polygon]) -> set[str]:
    """Return the ids of the tiles that meet one of the outlines in `ground`."""
    tree = shapely.STRtree(list(ground))
    return {name for name, polygon in outlines.items() if tree.query(polygon, predicate="intersects").size}
