"""Ground that two stores share: what meets, what only touches, what has no place; folds that share some."""

import numpy as np
import pytest
import shapely
from train_helpers import make_store

from prep import ground
from prep.store import StoreError, TileStore

TILES = {"000": shapely.box(76, 33, 76.1, 33.1), "001": shapely.box(76.1, 33, 76.2, 33.1)}  # side by side
ELSEWHERE = shapely.box(10, 10, 11, 11)


@pytest.fixture
def store(tmp_path):
    """Return a store of four tiles: two side by side, two far away."""
    folder = make_store(tmp_path / "store", size=64)
    ground.write_ground(folder, {**TILES, "002": ELSEWHERE, "003": shapely.box(20, 10, 21, 11)})
    return TileStore(folder)


def test_neighbours_touch_and_share_no_ground():
    assert not ground.on_ground({"000": TILES["000"]}, [TILES["001"]])
    assert ground.on_ground(TILES, [shapely.box(76.09, 33, 76.095, 33.01)]) == {"000"}
    assert ground.on_ground(TILES, [shapely.union_all(list(TILES.values()))]) == set(TILES)


def test_outlines_without_a_place_are_on_no_ground_and_not_written(tmp_path):
    nowhere = {"a": shapely.Polygon([(np.inf, np.inf)] * 3), "b": shapely.Polygon()}
    assert not ground.on_ground(nowhere, [ELSEWHERE])
    ground.write_ground(tmp_path, {**nowhere, "c": ELSEWHERE})
    assert list(ground.read_ground(tmp_path)) == ["c"]


def test_tiles_off_the_ground_of_another_store_are_kept(store, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    ground.write_ground(other, {"x": TILES["001"].buffer(-0.01)})
    assert ground.off_ground(store, other) == ["000", "002", "003"]
    ground.write_ground(other, {})
    assert ground.off_ground(store, other) == store.tile_ids


def test_tiles_of_unknown_place_cannot_be_told_from_those_on_the_ground(store, tmp_path):
    ground.write_ground(tmp_path, {"x": ELSEWHERE})
    ground.write_ground(store.folder, TILES)
    with pytest.raises(StoreError, match=r"where 2 tiles lie is not known \(002, 003\).*slices.geojson"):
        ground.off_ground(store, tmp_path)
    (store.folder / ground.GROUND_FILE).unlink()
    with pytest.raises(StoreError, match="ground.geojson: cannot be read"):
        ground.off_ground(store, tmp_path)
    assert ground.union_of(store, ["000"]).is_empty


def test_tiles_in_two_folds_are_found(store):
    assert ground.in_two_folds(store, "spatial") == set()
    ground.write_ground(store.folder, {**TILES, "002": TILES["001"]})  # 0 and 1 in fold 0, 2 in fold 1
    assert ground.in_two_folds(store, "spatial") == {"001", "002"}
