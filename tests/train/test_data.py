"""Drawing of pixels, cutting and augmenting of crops, and their reproducibility."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from train_helpers import make_store, make_tile

from prep.labels import CODE_CLASSES, GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from prep.store import TileStore
from solution import BANDS
from train.config import AugmentConfig, DataConfig, load_config
from train.data import (
    CropDataset,
    DataError,
    Draw,
    EpochSampler,
    PixelSampler,
    Tile,
    all_pairs,
    cut,
    cut_affine,
    flip_and_turn,
    jitter,
    name_of,
    open_fold,
    pair_of_folds,
    split_tiles,
)

NORMALIZATION = {"mean": [0.7, 0.7, 0.7, 0.05, 256.0], "std": [0.5, 0.5, 0.5, 0.08, 9.0]}
SHARES = [0.10, 0.35, 0.40, 0.15]
NO_WARP = AugmentConfig(rotate=0.0, scale=[1.0, 1.0])


def to_tile(image: np.ndarray, mask: np.ndarray) -> Tile:
    """Return a tile whose `values` are those of `image`, not normalised."""
    weights = (~np.isnan(image)).astype(np.float32)
    return Tile("tile", np.nan_to_num(image).astype(np.float32), weights, mask.astype(np.uint8))


def coordinate_tile(height: int = 60, width: int = 90) -> Tile:
    """Return a tile whose first two bands are row and column, with a distinct code left and right of 45."""
    rows, cols = np.mgrid[:height, :width].astype(np.float32)
    image = np.stack([rows, cols, rows, cols, rows], axis=-1)
    return to_tile(image, np.where(cols < 45, 0, 1))


def make_dataset(seed: int = 0, **augment) -> CropDataset:
    tiles = []
    for number, labels in enumerate(("phase2", "phase1")):
        image, mask = make_tile(number, labels=labels)
        normalized = (image - np.float32(NORMALIZATION["mean"])) / np.float32(NORMALIZATION["std"])
        tiles.append(to_tile(normalized, mask))
    data = DataConfig(crop=64, batch_size=2, steps_per_epoch=3)
    return CropDataset(tiles, NORMALIZATION, data, AugmentConfig(**augment), seed)


# --- which pixels are drawn ---------------------------------------------------------------------------------


def rare_classes_mask() -> np.ndarray:
    """Return a mask that is nearly all background, with one single pixel of lake."""
    mask = np.zeros((50, 40), np.uint8)
    mask[:3, :9], mask[3, :5], mask[49, 39], mask[10] = 1, 2, 3, IGNORE
    return mask


def test_classes_come_in_the_target_shares_however_rare():
    sampler = PixelSampler([rare_classes_mask()], SHARES)
    rng = np.random.default_rng(0)
    drawn = np.bincount([sampler.draw(rng).of_class for _ in range(8000)], minlength=4) / 8000
    # four standard errors of a share
    assert np.abs(drawn - SHARES).max() < 4 * math.sqrt(0.25 / 8000)


def test_drawn_pixel_may_be_of_the_class():
    phase1 = np.full((8, 9), GLACIER_OR_DEBRIS, np.uint8)
    phase1[2:5], phase1[5] = 0, OTHER_OR_LAKE
    masks = [rare_classes_mask(), phase1]
    sampler = PixelSampler(masks, SHARES)
    rng = np.random.default_rng(0)
    for draw in (sampler.draw(rng) for _ in range(500)):
        code = masks[draw.tile][draw.row, draw.col]
        assert draw.of_class in CODE_CLASSES[int(code)]


def test_shares_are_renormalised_over_the_classes_that_occur():
    mask = np.zeros((10, 10), np.uint8)
    mask[0] = GLACIER_OR_DEBRIS
    sampler = PixelSampler([mask], SHARES)
    assert sampler.shares == pytest.approx(np.array([0.10, 0.35, 0.40, 0.0]) / 0.85)


def test_certain_pixels_are_preferred_within_a_tile():
    mask = np.full((10, 10), GLACIER_OR_DEBRIS, np.uint8)
    mask[0, 0] = 2
    sampler = PixelSampler([mask], [0, 0, 1, 0])
    rng = np.random.default_rng(0)
    assert {(draw.row, draw.col) for draw in (sampler.draw(rng) for _ in range(50))} == {(0, 0)}


def test_tiles_are_drawn_uniformly_whatever_their_area_of_the_class():
    small, large = np.zeros((20, 20), np.uint8), np.ones((20, 20), np.uint8)
    small[0, 0] = 1
    without = np.zeros((20, 20), np.uint8)
    sampler = PixelSampler([small, without, large], [0, 1, 0, 0])
    rng = np.random.default_rng(0)
    tiles = np.bincount([sampler.draw(rng).tile for _ in range(4000)], minlength=3)
    assert tiles[1] == 0
    assert tiles[0] / 4000 == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))


def test_no_pixel_of_any_wanted_class_is_an_error():
    with pytest.raises(DataError, match="lake 1"):
        PixelSampler([np.zeros((4, 4), np.uint8)], [0, 0, 0, 1])


# --- how crops are cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, col", [(0, 0), (59, 89), (30, 45), (5, 80)])
def test_cut_is_a_slice_that_holds_the_pixel(row, col):
    tile, rng = coordinate_tile(), np.random.default_rng(0)
    starts = set()
    for _ in range(20):
        values, codes = cut(tile, Draw(0, row, col, 0), 32, rng)
        top, left = int(values[0, 0, 0]), int(values[0, 0, 1])
        starts.add((top, left))
        assert np.array_equal(values, tile.values[top : top + 32, left : left + 32])
        assert np.array_equal(codes, tile.codes[top : top + 32, left : left + 32])
        assert top <= row < top + 32
        assert left <= col < left + 32
    if (row, col) == (30, 45):
        assert len(starts) > 10  # not always the same place


def test_cut_of_a_smaller_tile_holds_all_of_it_once():
    tile = coordinate_tile(20, 90)
    values, codes = cut(tile, Draw(0, 3, 4, 0), 64, np.random.default_rng(0))
    inside = ~np.isnan(values[..., 0])
    assert inside.sum() == 20 * 64
    assert np.array_equal(codes != IGNORE, inside)
    assert sorted(set(values[inside][:, 0])) == list(range(20))


def test_affine_cut_without_rotation_and_scale_is_a_slice():
    tile, rng = coordinate_tile(), np.random.default_rng(0)
    for _ in range(10):
        values, codes = cut_affine(tile, Draw(0, 30, 45, 0), 32, NO_WARP, rng)
        top, left = round(float(values[0, 0, 0])), round(float(values[0, 0, 1]))
        assert np.allclose(values, tile.values[top : top + 32, left : left + 32], atol=1e-3)
        assert np.array_equal(codes, tile.codes[top : top + 32, left : left + 32])


def test_labels_move_with_the_image():
    """In every augmented crop, band 2 (the column) and the code (left or right of column 45) agree."""
    tile, rng = coordinate_tile(), np.random.default_rng(0)
    config = AugmentConfig(rotate=40.0)
    for _ in range(20):
        crop = flip_and_turn(cut_affine(tile, Draw(0, 30, 45, 0), 32, config, rng), config, rng)
        cols = crop.values[..., 1]
        clear = ~np.isnan(cols) & (np.abs(cols - 44.5) > 1.0)
        assert np.array_equal(crop.codes[clear] == 1, cols[clear] > 44.5)


def test_affine_cut_has_the_drawn_scale_and_angle():
    """Along a crop's row, the tile's rows and columns change by the drawn zoom and angle."""
    tile, rng = coordinate_tile(200, 200), np.random.default_rng(0)
    config = AugmentConfig(rotate=20.0, scale=[2.0, 2.0])
    angles = []
    for _ in range(30):
        values, _ = cut_affine(tile, Draw(0, 100, 100, 0), 32, config, rng)
        along_x = (values[16, 31, :2] - values[16, 0, :2]) / 31  # (d row, d column) a pixel
        assert np.hypot(*along_x) == pytest.approx(0.5, abs=0.01)
        angles.append(math.degrees(math.atan2(along_x[0], along_x[1])))
    assert max(np.abs(angles)) <= 20.5
    assert min(angles) < -5 < 5 < max(angles)


def test_nodata_does_not_bleed_into_its_neighbours():
    """Each band is constant where it has a value, so any other value in a crop came from nodata."""
    rng = np.random.default_rng(0)
    constants = np.float32([1.0, 2.0, 3.0, 4.0, 5.0])
    image = np.broadcast_to(constants, (80, 80, 5)).copy()
    image[rng.random((80, 80, 5)) < 0.2] = np.nan
    image[rng.random((80, 80)) < 0.2] = np.nan
    mask = np.where(np.isnan(image).all(axis=-1), IGNORE, 1)
    for _ in range(10):
        values, codes = cut_affine(to_tile(image, mask), Draw(0, 40, 40, 1), 64, AugmentConfig(), rng)
        has_value = ~np.isnan(values)
        assert np.abs(values - constants)[has_value].max() < 1e-3
        assert np.array_equal(codes == IGNORE, ~has_value.any(axis=-1))
        assert 0.4 < has_value.mean() < 0.8  # nodata neither vanishes nor spreads


# --- what augmentation leaves alone -------------------------------------------------------------------------


def test_crops_hold_no_new_codes_and_nodata_stays_nodata():
    dataset = make_dataset(rotate=45.0, affine_share=0.7)
    known = set(np.unique([tile.codes for tile in dataset.tiles]))
    for number in range(30):
        crop, _ = dataset.crop(np.random.default_rng(number))
        assert set(np.unique(crop.codes)) <= known
        assert np.isnan(crop.values[crop.codes == IGNORE]).all()
        assert (~np.isnan(crop.values[crop.codes != IGNORE])).any(axis=-1).all()


def test_items_are_tensors_with_nodata_zero():
    dataset = make_dataset()
    image, codes, of_class = dataset[1]
    assert image.shape == (5, 64, 64)
    assert image.dtype == torch.float32
    assert codes.shape == (64, 64)
    assert codes.dtype == torch.uint8
    assert of_class in range(4)
    assert torch.isfinite(image).all()
    ignored = torch.cat([dataset[i][0][:, dataset[i][1] == IGNORE] for i in range(6)], dim=1)
    assert ignored.shape[1] > 0
    assert (ignored == 0).all()


def test_flips_and_turns_reach_all_eight_orientations_exactly():
    tile, rng = coordinate_tile(40, 40), np.random.default_rng(0)
    crop = cut(tile, Draw(0, 20, 20, 0), 40, rng)
    seen = {flip_and_turn(crop, AugmentConfig(), rng).values.tobytes() for _ in range(200)}
    square = crop.values
    expected = {np.rot90(part, turns).tobytes() for part in (square, square[::-1]) for turns in range(4)}
    assert seen == expected


def test_jitter_can_be_switched_off():
    values = np.random.default_rng(0).normal(size=(6, 7, 5)).astype(np.float32)
    config = AugmentConfig(gain=0.0, offset=0.0, illumination=0.0)
    assert np.allclose(jitter(values, NORMALIZATION, config, np.random.default_rng(0)), values, atol=1e-6)


def test_gain_multiplies_reflectance_and_leaves_its_zero():
    mean, std = np.array(NORMALIZATION["mean"]), np.array(NORMALIZATION["std"])
    physical = np.stack([np.zeros(5), np.full(5, 0.4), np.full(5, 0.8)])
    config = AugmentConfig(gain=0.2, offset=0.0, illumination=0.0)
    changed = jitter((physical - mean) / std, NORMALIZATION, config, np.random.default_rng(3)) * std + mean
    assert np.allclose(changed[0, :4], 0.0, atol=1e-6)
    gains = changed[1:, :4] / physical[1:, :4]
    assert np.allclose(gains[0], gains[1], atol=1e-5)
    assert (np.abs(gains - 1) <= 0.2 + 1e-6).all()
    assert len(set(np.round(gains[0], 4))) == 4  # one for each band


def test_illumination_is_common_to_the_reflective_bands_and_leaves_temperature_alone():
    mean, std = np.array(NORMALIZATION["mean"]), np.array(NORMALIZATION["std"])
    physical = np.array([[0.4, 0.5, 0.6, 0.1, 250.0]])
    config = AugmentConfig(gain=0.0, offset=0.0, illumination=0.3)
    changed = jitter((physical - mean) / std, NORMALIZATION, config, np.random.default_rng(1)) * std + mean
    ratio = changed / physical
    assert np.allclose(ratio[0, :4], ratio[0, 0], atol=1e-6)
    assert abs(ratio[0, 0] - 1) > 0.01
    assert changed[0, 4] == pytest.approx(250.0)


def test_jitter_keeps_nodata():
    values = np.full((2, len(BANDS)), np.nan, np.float32)
    values[1, 2] = 1.0
    changed = jitter(values, NORMALIZATION, AugmentConfig(), np.random.default_rng(0))
    assert np.array_equal(np.isnan(changed), np.isnan(values))


# --- reproducibility ----------------------------------------------------------------------------------------


def same(one, other) -> bool:
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other))


def test_an_item_depends_on_seed_epoch_and_index_only():
    dataset, again = make_dataset(seed=5), make_dataset(seed=5)
    items = [dataset[i] for i in range(12)]
    assert all(same(again[i], items[i]) for i in reversed(range(12)))
    assert not same(items[0], items[6])  # the same place in the next epoch
    assert not same(items[0], items[1])
    assert not same(items[0], make_dataset(seed=6)[0])


def test_sampler_moves_on_with_the_epoch():
    sampler = EpochSampler(4)
    assert list(sampler) == [0, 1, 2, 3]
    sampler.set_epoch(3)
    assert list(sampler) == [12, 13, 14, 15]
    assert len(sampler) == 4


def test_worker_processes_give_the_same_crops():
    dataset = make_dataset()
    loaders = [
        DataLoader(dataset, batch_size=2, sampler=EpochSampler(6), num_workers=workers) for workers in (0, 1)
    ]
    assert all(same(one, other) for one, other in zip(*loaders))


# --- folds --------------------------------------------------------------------------------------------------


def test_pairs_hold_out_the_tiles_of_both_folds(tmp_path):
    store = TileStore(make_store(tmp_path / "store", tiles=8, folds=4))
    folds = store.fold_of("stratified")
    numbers = all_pairs([0, 1, 2, 3])
    assert len(numbers) == len(set(numbers)) == 6
    held_out = []
    for number in numbers:
        train, val = split_tiles(store, "stratified", number)
        assert sorted(train + val) == sorted(store.tile_ids) and not set(train) & set(val)
        held_out.append({folds[tile] for tile in val})
        assert len(held_out[-1]) == 2 and len(val) == 4
        assert name_of(number) == "folds " + " and ".join(map(str, sorted(held_out[-1])))
    assert len({frozenset(pair) for pair in held_out}) == 6
    with pytest.raises(DataError, match="scheme 'stratified' has no fold 7; it has folds 0, 1, 2, 3"):
        split_tiles(store, "stratified", pair_of_folds(2, 7))
    with pytest.raises(DataError, match="fold 11: pairs are of folds 0 to 9"):
        all_pairs([0, 11])


def test_split_keeps_the_fold_out_and_names_unknown_folds(tmp_path):
    store = TileStore(make_store(tmp_path / "store"))
    assert split_tiles(store, "stratified", 1) == (["000", "001"], ["002", "003"])
    with pytest.raises(DataError, match="no fold 7; it has folds 0, 1"):
        split_tiles(store, "stratified", 7)


def test_fold_without_training_tiles_is_an_error(tmp_path):
    store = TileStore(make_store(tmp_path / "store", tiles=2))
    with pytest.raises(DataError, match="holds every tile"):
        split_tiles(store, "stratified", 0)


def test_normalisation_knows_nothing_of_the_held_out_tiles(tmp_path):
    folder = make_store(tmp_path / "store")
    store = TileStore(folder)
    data = open_fold(load_config(overrides=[f"data.store={folder}", "data.crop=64"]), 0)
    pixels = np.concatenate([store.image(tile_id).reshape(-1, 5) for tile_id in ("002", "003")]).astype(float)
    assert data.normalization["mean"] == pytest.approx(np.nanmean(pixels, axis=0), rel=1e-6)
    assert data.normalization["std"] == pytest.approx(np.nanstd(pixels, axis=0), rel=1e-6)
    assert data.train_ids == ["002", "003"]


def test_validation_serves_whole_tiles_in_order(tmp_path):
    folder = make_store(tmp_path / "store", size=70)
    data = open_fold(load_config(overrides=[f"data.store={folder}", "data.crop=64"]), 1)
    store = TileStore(folder)
    served = list(data.val_loader)
    assert len(served) == 2
    for tile_id, (image, codes) in zip(data.val_ids, served):
        assert image.shape == (1, 5, 70, 70)
        assert np.array_equal(codes[0].numpy(), store.mask(tile_id))
        restored = (
            image[0].numpy().transpose(1, 2, 0) * data.normalization["std"] + data.normalization["mean"]
        )
        known = ~np.isnan(store.image(tile_id))
        assert np.allclose(restored[known], store.image(tile_id)[known], rtol=1e-4, atol=1e-4)


def test_glacier_of_unknown_kind_can_count_as_clean_in_training_only(tmp_path):
    folder = make_store(tmp_path / "store")
    settings = [f"data.store={folder}", "data.crop=64", "data.unsplit_glacier=clean"]
    data = open_fold(load_config(None, settings), 0)
    trained = np.unique(np.concatenate([tile.codes.ravel() for tile in data.dataset.tiles]))
    assert set(trained) == {0, 1, 2, 3, IGNORE}
    held_out = np.unique(np.concatenate([codes.numpy().ravel() for _, codes in data.val_loader.dataset]))
    assert GLACIER_OR_DEBRIS in held_out
