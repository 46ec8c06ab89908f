"""Crops: cut, rotated and scaled, flipped, brightened, saturated, mixed; labels move along, nodata stays nodata."""

import math

import numpy as np
import pytest

from prep.labels import IGNORE
from train.augment import BRIGHTEST, Crop, Draw, Tile, cut, cut_affine, flip_and_turn, jitter, paste_rectangle
from train.config import AugmentConfig

NORMALIZATION = {"mean": [0.7, 0.7, 0.7, 0.05, 256.0], "std": [0.5, 0.5, 0.5, 0.08, 9.0]}
MEAN, STD = np.array(NORMALIZATION["mean"]), np.array(NORMALIZATION["std"])


def to_tile(image: np.ndarray, mask: np.ndarray) -> Tile:
    """Return a tile whose `values` are those of `image`, not normalised."""
    weights = (~np.isnan(image)).astype(np.float32)
    return Tile("tile", np.nan_to_num(image).astype(np.float32), weights, mask.astype(np.uint8))


def coordinate_tile(height: int = 60, width: int = 90) -> Tile:
    """Return a tile whose first two bands are row and column, with a distinct code left and right of 45."""
    rows, cols = np.mgrid[:height, :width].astype(np.float32)
    return to_tile(np.stack([rows, cols, rows, cols, rows], axis=-1), np.where(cols < 45, 0, 1))


def jitter_physical(values, seed: int = 1, **config) -> np.ndarray:
    """Return physical values (..., 5) after `jitter`."""
    changed = jitter((values - MEAN) / STD, NORMALIZATION, AugmentConfig(**config), np.random.default_rng(seed))
    return changed * STD + MEAN


# --- Cutting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "col"), [(0, 0), (59, 89), (30, 45)])
@pytest.mark.parametrize("warped", [False, True])
def test_a_cut_is_a_slice_that_holds_the_pixel(row, col, warped):
    tile, rng, starts = coordinate_tile(), np.random.default_rng(0), set()
    still = AugmentConfig(rotate=0.0, scale=[1.0, 1.0])
    for _ in range(15):
        draw = Draw(0, row, col, 0)
        values, codes = cut_affine(tile, draw, 32, still, rng) if warped else cut(tile, draw, 32, rng)
        top, left = round(float(values[0, 0, 0])), round(float(values[0, 0, 1]))
        assert np.allclose(values, tile.values[top : top + 32, left : left + 32], atol=1e-3)
        assert np.array_equal(codes, tile.codes[top : top + 32, left : left + 32])
        assert top <= row < top + 32 and left <= col < left + 32
        starts.add((top, left))
    assert (row, col) != (30, 45) or len(starts) > 10  # not always the same place


def test_a_cut_of_a_smaller_tile_holds_all_of_it_once():
    values, codes = cut(coordinate_tile(20, 90), Draw(0, 3, 4, 0), 64, np.random.default_rng(0))
    inside = ~np.isnan(values[..., 0])
    assert inside.sum() == 20 * 64
    assert np.array_equal(codes != IGNORE, inside)
    assert sorted(set(values[inside][:, 0])) == list(range(20))


def test_labels_move_with_the_image():
    """In every augmented crop, band 2 (the column) and the code (left or right of column 45) agree."""
    tile, rng = coordinate_tile(), np.random.default_rng(0)
    config = AugmentConfig(rotate=40.0, flip=True, rot90=True)
    for _ in range(20):
        crop = flip_and_turn(cut_affine(tile, Draw(0, 30, 45, 0), 32, config, rng), config, rng)
        cols = crop.values[..., 1]
        clear = ~np.isnan(cols) & (np.abs(cols - 44.5) > 1.0)
        assert np.array_equal(crop.codes[clear] == 1, cols[clear] > 44.5)


def test_an_affine_cut_has_the_drawn_scale_and_angle():
    """Along a crop's row, the tile's rows and columns change by the drawn zoom and angle."""
    tile, rng, angles = coordinate_tile(200, 200), np.random.default_rng(0), []
    for _ in range(30):
        config = AugmentConfig(rotate=20.0, scale=[2.0, 2.0])
        values, _ = cut_affine(tile, Draw(0, 100, 100, 0), 32, config, rng)
        along_x = (values[16, 31, :2] - values[16, 0, :2]) / 31  # (d row, d column) a pixel
        assert np.hypot(*along_x) == pytest.approx(0.5, abs=0.01)
        angles.append(math.degrees(math.atan2(along_x[0], along_x[1])))
    assert max(np.abs(angles)) <= 20.5 and min(angles) < -5 < 5 < max(angles)


def test_nodata_does_not_bleed_into_its_neighbours():
    """Each band is constant where it has a value, so any other value in a crop came from nodata."""
    rng, constants = np.random.default_rng(0), np.float32([1.0, 2.0, 3.0, 4.0, 5.0])
    image = np.broadcast_to(constants, (80, 80, 5)).copy()
    image[rng.random((80, 80, 5)) < 0.2] = np.nan
    image[rng.random((80, 80)) < 0.2] = np.nan
    tile = to_tile(image, np.where(np.isnan(image).all(axis=-1), IGNORE, 1))
    for _ in range(10):
        values, codes = cut_affine(tile, Draw(0, 40, 40, 1), 64, AugmentConfig(), rng)
        has_value = ~np.isnan(values)
        assert np.abs(values - constants)[has_value].max() < 1e-3
        assert np.array_equal(codes == IGNORE, ~has_value.any(axis=-1))
        assert 0.4 < has_value.mean() < 0.8  # nodata neither vanishes nor spreads


def test_flips_and_turns_reach_all_eight_orientations_exactly():
    rng, config = np.random.default_rng(0), AugmentConfig(flip=True, rot90=True)
    crop = cut(coordinate_tile(40, 40), Draw(0, 20, 20, 0), 40, rng)
    seen = {flip_and_turn(crop, config, rng).values.tobytes() for _ in range(200)}
    square = crop.values
    assert seen == {np.rot90(part, turns).tobytes() for part in (square, square[::-1]) for turns in range(4)}


# --- Light --------------------------------------------------------------------------------------------------


def test_without_jitter_nothing_changes_and_nodata_stays_nodata():
    values = np.random.default_rng(0).normal(size=(6, 7, 5)).astype(np.float32)
    values[2, 3] = values[4, 4, 1] = np.nan
    assert np.array_equal(jitter(values, NORMALIZATION, AugmentConfig(), np.random.default_rng(0)), values, True)
    config = AugmentConfig(gain=0.1, offset=0.1, illumination=0.1, saturate=0.5)
    changed = jitter(values, NORMALIZATION, config, np.random.default_rng(0))
    assert np.array_equal(np.isnan(changed), np.isnan(values))
    assert changed.dtype == np.float32


def test_gain_multiplies_reflectance_and_leaves_its_zero():
    changed = jitter_physical(np.stack([np.zeros(5), np.full(5, 0.4), np.full(5, 0.8)]), gain=0.2)
    assert np.allclose(changed[0, :4], 0.0, atol=1e-6)
    gains = changed[1:, :4] / np.array([[0.4], [0.8]])
    assert np.allclose(gains[0], gains[1], atol=1e-5) and (np.abs(gains - 1) <= 0.2 + 1e-6).all()
    assert len(set(np.round(gains[0], 4))) == 4  # one for each band


def test_illumination_is_common_to_the_reflective_bands_and_leaves_temperature_alone():
    ratio = jitter_physical(np.array([0.4, 0.5, 0.6, 0.1, 250.0]), illumination=0.3) / [
        0.4,
        0.5,
        0.6,
        0.1,
        250.0,
    ]
    assert np.allclose(ratio[:4], ratio[0], atol=1e-6) and abs(ratio[0] - 1) > 0.01
    assert ratio[4] == pytest.approx(1.0)


def test_saturation_cuts_reflectance_off_at_one_random_value_a_crop():
    ramp = np.linspace(0, 2, 201)[:, None] * [1, 1, 1, 1, 0] + [0, 0, 0, 0, 300]
    limits = []
    for seed in range(60):
        changed = jitter_physical(ramp, seed, saturate=0.5)
        limit = changed[-1, 0]
        assert np.allclose(changed[:, :4], np.minimum(ramp[:, :4], limit), atol=1e-6)
        assert np.allclose(changed[:, 4], 300)
        limits.append(limit)
    assert 0.5 <= min(limits) < 0.7 and 1.4 < max(limits) <= BRIGHTEST + 1e-6
    assert np.allclose(jitter_physical(ramp, saturate=0.0), ramp, atol=1e-6)


# --- Mixing -------------------------------------------------------------------------------------------------


def test_pasting_leaves_both_crops_and_takes_values_and_codes_alike():
    rng, areas = np.random.default_rng(0), []
    crop = Crop(np.zeros((40, 40, 5), np.float32), np.zeros((40, 40), np.uint8))
    other = Crop(np.full((40, 40, 5), np.nan, np.float32), np.full((40, 40), IGNORE, np.uint8))
    for _ in range(300):
        values, codes = paste_rectangle(crop, other, rng)
        pasted = codes == IGNORE
        assert np.array_equal(np.isnan(values).all(axis=-1), pasted)
        rows, cols = np.nonzero(pasted)
        assert not len(rows) or pasted[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1].all()
        areas.append(pasted.mean())
    assert not np.isnan(crop.values).any() and (crop.codes == 0).all()
    assert 0.2 < np.mean(areas) < 0.45  # half of the area, less what sticks out
