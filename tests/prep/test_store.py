"""The tile store: complete or absent, and what reading it back gives."""

import json

import numpy as np
import pytest

from prep import store
from prep.labels import CODE_NAMES, count_codes

STATS = {"mean": [0.5] * 5, "std": [1.0] * 5, "count": [10] * 5}
FOLDS = {"stratified": {"02_07": 0, "001": 1}, "spatial": {"02_07": 1, "001": 0}, "seed": 3}


def make_tile(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a small image with a NaN and a mask with every code."""
    random = np.random.default_rng(seed)
    image = random.random((6, 8, 5)).astype(np.float32)
    image[0, 0] = np.nan
    return image, random.choice(list(CODE_NAMES), size=(6, 8)).astype(np.uint8)


def write_store(folder, tile_ids=("001", "02_07")) -> None:
    """Write a store of small tiles."""
    with store.create(folder) as writer:
        rows = []
        for seed, tile_id in enumerate(tile_ids):
            image, mask = make_tile(seed)
            writer.write_tile(tile_id, image, mask)
            place = (2, 7) if "_" in tile_id else (None, None)
            rows.append(store.TileRow(tile_id, f"{tile_id}.tif", *place, "phase2", 0.75, count_codes(mask)))
        writer.write_index(rows, STATS, FOLDS, {"source": "Train"})


def left_over(folder) -> list[str]:
    """Return the names in a folder, hidden ones too."""
    return sorted(entry.name for entry in folder.iterdir())


def test_a_store_reads_back_as_written(tmp_path):
    write_store(tmp_path / "tiles")
    opened = store.TileStore(tmp_path / "tiles")
    assert opened.tile_ids == ["001", "02_07"]
    for seed, tile_id in enumerate(opened.tile_ids):
        image, mask = make_tile(seed)
        assert np.array_equal(opened.image(tile_id), image, equal_nan=True)
        assert opened.image(tile_id).dtype == np.float32
        assert np.array_equal(opened.mask(tile_id), mask)
        assert opened.mask(tile_id).dtype == np.uint8
        assert opened.tiles[seed].counts == count_codes(mask)
    assert (opened.tiles[0].row, opened.tiles[0].col) == (None, None)
    assert (opened.tiles[1].row, opened.tiles[1].col, opened.tiles[1].valid_share) == (2, 7, 0.75)
    assert opened.stats == STATS
    assert opened.fold_of("spatial") == FOLDS["spatial"]


def test_an_error_while_building_keeps_the_older_store(tmp_path):
    write_store(tmp_path / "tiles", ["001"])
    with pytest.raises(ZeroDivisionError), store.create(tmp_path / "tiles"):
        raise ZeroDivisionError
    assert store.TileStore(tmp_path / "tiles").tile_ids == ["001"]
    assert left_over(tmp_path) == ["tiles"]


def test_creating_replaces_an_older_store_whole(tmp_path):
    write_store(tmp_path / "tiles", ["001", "02_07"])
    write_store(tmp_path / "tiles", ["02_07"])
    assert store.TileStore(tmp_path / "tiles").tile_ids == ["02_07"]
    assert left_over(tmp_path / "tiles" / "images") == ["02_07.npy"]
    assert left_over(tmp_path) == ["tiles"]


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path):
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "thesis.txt").write_text("years of work")
    with pytest.raises(store.StoreError, match="no tile store"):
        write_store(tmp_path / "tiles")
    assert (tmp_path / "tiles" / "thesis.txt").read_text() == "years of work"


def test_refuse_existing_names_the_option(tmp_path):
    store.refuse_existing(tmp_path / "absent")
    store.refuse_existing(tmp_path)  # an empty folder is not in the way
    write_store(tmp_path / "tiles")
    with pytest.raises(store.StoreError, match="--overwrite"):
        store.refuse_existing(tmp_path / "tiles")


def test_the_fingerprint_is_that_of_store_json_where_it_has_one(tmp_path):
    write_store(tmp_path / "tiles")
    assert store.TileStore(tmp_path / "tiles").fingerprint is None
    (tmp_path / "tiles" / "store.json").write_text('{"fingerprint": "abc"}')
    assert store.TileStore(tmp_path / "tiles").fingerprint == "abc"
    (tmp_path / "tiles" / "stats.json").write_text("{")
    with pytest.raises(store.StoreError, match=r"stats\.json is damaged"):
        store.TileStore(tmp_path / "tiles")


def test_image_and_mask_must_fit_each_other(tmp_path):
    with pytest.raises(store.StoreError, match="001"), store.create(tmp_path / "tiles") as writer:
        writer.write_tile("001", np.zeros((4, 4, 5)), np.zeros((4, 5), np.uint8))


@pytest.mark.parametrize("part", ["tiles.csv", "stats.json", "folds.json"])
def test_a_missing_part_is_named_with_the_remedy(tmp_path, part):
    write_store(tmp_path / "tiles")
    (tmp_path / "tiles" / part).unlink()
    with pytest.raises(store.StoreError, match=f"{part} missing.*make prep"):
        store.TileStore(tmp_path / "tiles")


def test_a_missing_image_is_named(tmp_path):
    write_store(tmp_path / "tiles")
    (tmp_path / "tiles" / "images" / "001.npy").unlink()
    with pytest.raises(store.StoreError, match=r"images/001\.npy"):
        store.TileStore(tmp_path / "tiles")


def test_an_unknown_tile_or_scheme_is_answered_with_the_known_ones(tmp_path):
    write_store(tmp_path / "tiles")
    opened = store.TileStore(tmp_path / "tiles")
    with pytest.raises(store.StoreError, match="02_07"):
        opened.image("99_99")
    with pytest.raises(store.StoreError, match="stratified, spatial"):
        opened.fold_of("random")


def test_the_index_holds_the_contract_columns(tmp_path):
    write_store(tmp_path / "tiles")
    head = (tmp_path / "tiles" / "tiles.csv").read_text().splitlines()[0]
    assert head == (
        "tile_id,source,row,col,labels,valid_share,other,glacier,debris,lake,glacier_or_debris,other_or_lake,ignore"
    )
    assert json.loads((tmp_path / "tiles" / "store.json").read_text()) == {"source": "Train"}
