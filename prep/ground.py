"""The ground that a store's tiles lie on: `ground.geojson` in the store, one outline a tile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Iterable, Mapping, Sequence

import numpy as np
import rasterio.transform
import rasterio.warp
import shapely
from affine import Affine
from rasterio.crs import CRS

from prep.store import SPLIT_SCHEME, StoreError, TileStore, name_some

GROUND_FILE = "ground.geojson"
PLACES = "put the slices.geojson of the data set beside the patches, and make the store again"
WGS84 = "EPSG:4326"
TOUCH = 1e-4  # degrees, 10 m: neighbours in a grid share an edge, and no ground


def outline(crs: CRS, transform: Affine, height: int, width: int) -> shapely.Polygon:
    """Return the four corners of a raster as a polygon in longitude and latitude; inf where there are none."""
    rows, cols = (0, 0, height, height), (0, width, width, 0)
    xs, ys = rasterio.transform.xy(transform, rows, cols, offset="ul")
    return shapely.Polygon(np.transpose(rasterio.warp.transform(crs, WGS84, xs, ys)))


def is_placed(polygon: shapely.Polygon) -> bool:
    """Return whether an outline has a place on Earth: it is not empty, nor are some of its corners inf."""
    return bool(np.isfinite(polygon.bounds).all())


def write_ground(folder: Path, outlines: Mapping[str, shapely.Polygon]) -> None:
    """Write the outlines by tile id, longitude and latitude, into a store that is being made."""
    features = [
        {"type": "Feature", "properties": {"tile_id": name}, "geometry": shapely.geometry.mapping(polygon)}
        for name, polygon in outlines.items()
        if is_placed(polygon)
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


def on_ground(outlines: Mapping[str, shapely.Polygon], ground: Iterable[shapely.Geometry]) -> set[str]:
    """Return the ids of the tiles that share ground with one of the outlines in `ground`."""
    tree = shapely.STRtree(list(ground))
    inner = {name: polygon.buffer(-TOUCH) for name, polygon in outlines.items() if is_placed(polygon)}
    return {name for name, polygon in inner.items() if tree.query(polygon, predicate="intersects").size}


def union_of(store: TileStore, tile_ids: Sequence[str]) -> shapely.Geometry:
    """Return the ground of some tiles of a store; empty where the store does not say where its tiles lie."""
    known = read_ground(store.folder) if (store.folder / GROUND_FILE).is_file() else {}
    return shapely.union_all([known[name] for name in tile_ids if name in known])


def in_two_folds(store: TileStore, scheme: str) -> set[str]:
    """Return the ids of tiles that share ground, or the scene of a split by scenes, with a tile of another fold."""
    fold_of, found = store.fold_of(scheme), set[str]()
    known = read_ground(store.folder) if (store.folder / GROUND_FILE).is_file() else {}
    for fold in set(fold_of.values()):
        own = [tile for tile in store.tiles if fold_of[tile.tile_id] == fold]
        rest = [tile for tile in store.tiles if fold_of[tile.tile_id] != fold]
        sources = {tile.source for tile in rest if scheme == SPLIT_SCHEME}
        found |= {tile.tile_id for tile in own if tile.source in sources}
        own_places = {tile.tile_id: known[tile.tile_id] for tile in own if tile.tile_id in known}
        found |= on_ground(own_places, [known[tile.tile_id] for tile in rest if tile.tile_id in known])
    return found


def off_ground(store: TileStore, other: str | os.PathLike) -> list[str]:
    """Return the ids of a store's tiles that share no ground with the tiles of another.

    Raises StoreError where one of the two does not say where its tiles lie.
    """
    seen, places = read_ground(other).values(), read_ground(store.folder)
    unknown = [name for name in store.tile_ids if name not in places]
    if seen and unknown:
        raise StoreError(
            f"{store.folder}: where {len(unknown)} tiles lie is not known ({name_some(unknown, 3)}), so that those "
            f"on the ground of {other} cannot be left out; {PLACES}"
        )
    shared = on_ground(places, seen)
    return [name for name in store.tile_ids if name not in shared]
