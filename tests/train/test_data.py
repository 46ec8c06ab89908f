"""Which pixels crops are drawn around, what a crop holds, reproducibility, folds, splits."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from train_helpers import make_store, smoke_config

from prep import store as tile_store
from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE, count_codes
from prep.store import SPLIT_SCHEME, Split, StoreError, TileStore
from train import data
from train.data import (
    ALL,
    SIDE_OF_CODE,
    CropDataset,
    DataError,
    EpochSampler,
    PixelSampler,
    Tiles,
    compute,
    folds_of_scheme,
    open_fold,
    split_tiles,
)

STILL = {"mean": [0.0] * 5, "std": [1.0] * 5}


def store_of_masks(folder, *masks) -> Tiles:
    """Return the tiles of a store with these masks; an image has the number of its tile in every band."""
    with tile_store.create(folder) as writer:
        rows = []
        for number, mask in enumerate(masks):
            writer.write_tile(str(number), np.full((*mask.shape, 5), number, np.float32), mask)
            rows.append(tile_store.TileRow(str(number), "", None, None, "phase2", 1.0, count_codes(mask)))
        writer.write_index(rows, {}, {"stratified": {row.tile_id: 0 for row in rows}}, {})
    opened = TileStore(folder)
    return Tiles(opened, opened.tile_ids, STILL)


# --- Which pixels are drawn ---------------------------------------------------------------------------------


def test_glacier_has_its_share_however_rare_and_whatever_its_code(tmp_path):
    rare = np.zeros((50, 40), np.uint8)
    rare[0, 0], rare[1, 1], rare[2, 2], rare[10], rare[11] = 1, 2, GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
    tiles = store_of_masks(tmp_path / "store", rare)
    sampler, rng = PixelSampler(tiles, 0.6), np.random.default_rng(0)
    draws = [sampler.draw(rng) for _ in range(4000)]
    for draw in draws:
        assert SIDE_OF_CODE[rare[draw.row, draw.col]] == draw.of_class
    glacier = np.mean([draw.of_class for draw in draws])
    assert glacier == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / 4000))  # four standard errors
    assert {(d.row, d.col) for d in draws if d.of_class == 1} == {(0, 0), (1, 1), (2, 2)}


def test_tiles_are_drawn_uniformly_whatever_their_area_of_glacier(tmp_path):
    small, large = np.zeros((20, 20), np.uint8), np.ones((20, 20), np.uint8)
    small[0, 0] = 1
    sampler = PixelSampler(store_of_masks(tmp_path / "store", small, 0 * small, large), 1.0)
    rng = np.random.default_rng(0)
    drawn = np.bincount([sampler.draw(rng).tile for _ in range(2000)], minlength=3)
    assert drawn[1] == 0 and drawn[0] / 2000 == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000))


def test_a_side_that_is_nowhere_leaves_its_share_to_the_other(tmp_path):
    tiles = store_of_masks(tmp_path / "store", np.zeros((4, 4), np.uint8))
    sampler = PixelSampler(tiles, 0.6)
    assert sampler.shares.tolist() == [1.0, 0.0] and sampler.absent == ["glacier"]
    with pytest.raises(DataError, match="no training pixel .* data.glacier_share = 1 asks for"):
        PixelSampler(tiles, 1.0)


# --- Crops --------------------------------------------------------------------------------------------------


def dataset_of(store, *overrides, seed=0) -> CropDataset:
    config = smoke_config(store, "data.steps_per_epoch=3", *overrides)
    opened = TileStore(store)
    return CropDataset(Tiles(opened, opened.tile_ids, STILL), config.data, config.augment, seed)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_items_are_tensors_with_nodata_zero_and_known_codes(store):
    dataset = dataset_of(store, "augment.rotate=45", "augment.affine_share=0.7", "augment.flip=true")
    known = {0, 1, 2, 3, GLACIER_OR_DEBRIS, IGNORE}
    ignored = 0
    for index in range(12):
        image, codes = dataset[index]
        assert (image.shape, image.dtype, codes.shape, codes.dtype) == (
            (5, 64, 64),
            torch.float32,
            (64, 64),
            torch.uint8,
        )
        assert torch.isfinite(image).all() and set(codes.unique().tolist()) <= known
        assert (image[:, codes == IGNORE] == 0).all()
        ignored += int((codes == IGNORE).sum())
    assert ignored > 0


def test_an_item_depends_on_seed_epoch_and_index_only(store):
    dataset, again = dataset_of(store, seed=5), dataset_of(store, seed=5)
    items = [dataset[i] for i in range(12)]
    assert all(same(again[i], items[i]) for i in reversed(range(12)))
    assert not same(items[0], items[6])  # the same place in the next epoch
    assert not same(items[0], items[1])
    assert not same(items[0], dataset_of(store, seed=6)[0])


def test_worker_processes_and_a_small_memory_give_the_same_crops(store, monkeypatch):
    items = [
        list(DataLoader(dataset_of(store), batch_size=2, sampler=EpochSampler(6), num_workers=workers))
        for workers in (0, 1)
    ]
    monkeypatch.setattr(data, "IN_MEMORY_TILES", 1)
    items.append(list(DataLoader(dataset_of(store), batch_size=2)))
    assert all(same(items[0][i], part[i]) for part in items[1:] for i in range(3))


def test_mixed_crops_hold_rectangles_of_other_tiles(tmp_path):
    tiles = store_of_masks(tmp_path / "store", *(np.full((80, 80), n, np.uint8) for n in range(4)))
    config = smoke_config(tmp_path / "store", "data.mix=1.0", "data.steps_per_epoch=30", "augment.affine_share=0")
    dataset = CropDataset(tiles, config.data, config.augment, seed=0)
    mixed = []
    for index in range(60):
        image, codes = dataset[index]
        assert torch.equal(image, codes.float().expand(5, -1, -1))  # values and codes come from the same tile
        mixed.append(len(codes.unique()))
    assert set(mixed) <= {1, 2} and np.mean(mixed) > 1.7


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_step_has_the_same_crops_whoever_cuts_them(processes, monkeypatch):
    batch, steps, epoch, shares = 8, 3, 5, []
    for process in range(processes):
        monkeypatch.setattr(data, "process_number", lambda process=process: process)
        sampler = EpochSampler(batch * steps, batch, processes)
        sampler.set_epoch(epoch)
        shares.append(np.array(list(sampler)).reshape(steps, batch // processes))
        assert len(sampler) == shares[-1].size
    together = np.concatenate(shares, axis=1).ravel()  # (steps, batch)
    assert np.array_equal(together, epoch * batch * steps + np.arange(batch * steps))


# --- Folds --------------------------------------------------------------------------------------------------


def test_a_fold_is_kept_out_and_all_keeps_none(store, tmp_path):
    opened = TileStore(store)
    assert split_tiles(opened, "stratified", 1) == (["000", "001"], ["002", "003"])
    assert split_tiles(opened, "stratified", ALL) == (["000", "001", "002", "003"], [])
    with pytest.raises(DataError, match="no fold 7; it has folds 0, 1"):
        split_tiles(opened, "stratified", 7)
    with pytest.raises(DataError, match="fold 0 .* leaves 0 tiles to train on and 2 to validate on"):
        split_tiles(TileStore(make_store(tmp_path / "two", tiles=2, size=64)), "stratified", 0)


def test_normalisation_knows_nothing_of_the_held_out_tiles_which_are_served_whole(store):
    opened, fold = TileStore(store), open_fold(smoke_config(store), 0)
    assert (fold.train_ids, fold.val_ids) == (["002", "003"], ["000", "001"])
    pixels = np.concatenate([opened.image(tile_id).reshape(-1, 5) for tile_id in fold.train_ids]).astype(float)
    assert fold.normalization["mean"] == pytest.approx(np.nanmean(pixels, axis=0), rel=1e-6)
    assert fold.normalization["std"] == pytest.approx(np.nanstd(pixels, axis=0), rel=1e-6)
    for tile_id, (image, codes) in zip(fold.val_ids, fold.val_loader):
        assert np.array_equal(codes[0].numpy(), opened.mask(tile_id))
        physical = image[0].numpy().transpose(1, 2, 0) * fold.normalization["std"] + fold.normalization["mean"]
        known = ~np.isnan(opened.image(tile_id))
        assert np.allclose(physical[known], opened.image(tile_id)[known], rtol=1e-4, atol=1e-4)


def write_split(folder, source, sides) -> None:
    """Write tiles of a store as one with training and validation ids, statistics of the former."""
    with tile_store.create(folder) as writer:
        for tile_id in source.tile_ids:
            writer.write_tile(tile_id, source.image(tile_id), source.mask(tile_id))
        writer.write_index(source.tiles, compute(source, source.tile_ids[:3]), sides, {})


def test_a_split_is_one_fold_with_tiles_that_are_never_held_out(store, tmp_path):
    write_split(tmp_path / "split", TileStore(store), Split(["000", "001", "002"], ["003"]))
    opened = TileStore(tmp_path / "split")
    assert opened.fold_of(SPLIT_SCHEME) == {"000": -1, "001": -1, "002": -1, "003": 0}
    assert folds_of_scheme(opened, SPLIT_SCHEME) == [0]
    fold = open_fold(smoke_config(tmp_path / "split", f"data.scheme={SPLIT_SCHEME}"), 0)
    assert (fold.train_ids, fold.val_ids) == (["000", "001", "002"], ["003"])
    assert fold.normalization == {key: opened.stats[key] for key in ("mean", "std")}
    write_split(tmp_path / "bad", TileStore(store), Split(["000"], ["777"]))
    with pytest.raises(StoreError, match="train_ids.txt and val_ids.txt name 2 tiles, which are not the 4"):
        TileStore(tmp_path / "bad")
