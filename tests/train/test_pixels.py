"""The network on single pixels: its features, its loss, its folds, and how it is asked."""

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from train_helpers import make_store

import solution
from prep.store import TileStore
from train.__main__ import main
from train.config import ConfigError
from train.pixels import (
    PixelConfig,
    Pixels,
    allowed_classes,
    draw_pixels,
    fit_network,
    fit_run,
    load_pixel_config,
    set_cross_entropy,
)
from train.predict import load_passes, predict_run, read_folds


@pytest.fixture()
def image() -> np.ndarray:
    """(40, 48, 5) physical units with a hole and a missing band."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0.1, 0.9, (40, 48, 5)).astype(np.float32)
    values[..., 4] = 250 + 20 * values[..., 4]
    values[5:15, 5:20] = np.nan
    values[30, 30, 2] = np.nan
    return values


def as_bands(image: np.ndarray) -> np.ndarray:
    return np.nan_to_num(image.transpose(2, 0, 1), nan=0.0)


def network_with(**args) -> solution.PixelNet:
    return solution.build_network({"name": "PixelNet", "args": {"hidden": [16], **args}}).eval()


def slopes_of(image: np.ndarray) -> np.ndarray:
    features = network_with().features(image, solution.median_temperature(image))
    return features[solution.PIXEL_FEATURES :]


def test_slopes_change_sign_with_the_direction(image):
    north_up, upside_down = slopes_of(image), slopes_of(image[::-1])[:, ::-1]
    np.testing.assert_allclose(upside_down[0::2], -north_up[0::2], atol=1e-4)  # north less south
    np.testing.assert_allclose(upside_down[1::2], north_up[1::2], atol=1e-4)  # west less east


def test_a_slope_is_the_difference_of_two_local_means():
    rows = np.broadcast_to(np.arange(64, dtype=np.float32)[:, None], (64, 64))
    image = np.repeat(rows[..., None], 5, axis=2)
    window = solution.SLOPE_WINDOWS[0]
    north_south, west_east = slopes_of(image)[:2]
    assert north_south[32, 32] == pytest.approx(-2 * (window // 2 + 1), abs=1e-4)
    assert west_east[32, 32] == pytest.approx(0, abs=1e-4)
    assert np.isnan(north_south[0, 32]), "north of the image there is nothing"


@pytest.mark.parametrize("window", [3, 9])
def test_ranges_equal_those_of_each_window(image, window):
    index, half = solution.RANGE_BANDS[1], window // 2
    above, below = list(solution.range_features(image, [window]))[2:]
    band = image[..., index]
    for row, column in ((0, 0), (4, 4), (20, 30), (39, 47)):
        part = band[max(row - half, 0) : row + half + 1, max(column - half, 0) : column + half + 1]
        assert above[row, column] == band[row, column] - np.nanmin(part)
        assert below[row, column] == np.nanmax(part) - band[row, column]
    np.testing.assert_array_equal(np.isnan(above), np.isnan(band))


@pytest.mark.parametrize("band", [2, 4])
def test_tophats_of_an_image_without_gaps_are_those_of_opencv(band):
    image = np.random.default_rng(0).normal(size=(40, 56, 5)).astype(np.float32)
    values = np.ascontiguousarray(image[..., band])
    found = list(solution.tophat_features(image, [3, 9], [band]))
    squares = [np.ones((window, window), np.uint8) for window in (3, 9)]
    expected = [
        cv2.morphologyEx(values, kind, square)
        for kind in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT)
        for square in squares
    ]
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))


def test_tophats_are_known_where_the_band_is(image):
    for index, feature in enumerate(solution.tophat_features(image, [3, 17], [2, 4])):
        band = image[..., 2 if index < 4 else 4]
        np.testing.assert_array_equal(np.isnan(feature), np.isnan(band))
        assert np.nanmin(feature) >= 0 and np.isfinite(feature[~np.isnan(feature)]).all()


@pytest.mark.parametrize(
    "windows", [{}, {"ranges": [9, 65]}, {"ranges": [9], "tophats": [5, 33], "range_bands": [2, 4]}]
)
def test_rows_are_independent_of_each_other(image, monkeypatch, windows):
    torch.manual_seed(0)
    network = network_with(**windows)
    x = torch.from_numpy(as_bands(image))[None]
    with torch.no_grad():
        whole = network(x)
        monkeypatch.setattr(solution, "ROWS_AT_ONCE", 7)
        assert torch.allclose(network(x), whole, atol=1e-5)
    assert whole.shape == (1, 4, 40, 48) and torch.isfinite(whole).all()


def test_batchnorms_merge_exactly(image):
    torch.manual_seed(0)
    network = solution.build_network({"name": "PixelNet", "args": {"hidden": [16, 8]}})
    network.layers.train()(torch.randn(64, len(network.running_mean), 1, 1))  # sets statistics
    merged = copy.deepcopy(network)
    assert solution.merge_batchnorm(merged)
    assert not [layer for layer in merged.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    x = torch.from_numpy(as_bands(image))[None]
    with torch.no_grad():
        assert torch.allclose(network.eval()(x), merged(x), atol=1e-4)


def test_the_loss_of_certain_labels_is_cross_entropy_and_of_sets_their_sum():
    torch.manual_seed(0)
    logits, certain = torch.randn(20, 4), torch.randint(4, (20,))
    expected = torch.nn.functional.cross_entropy(logits, certain)
    assert torch.allclose(
        set_cross_entropy(logits, allowed_classes(certain.numpy().astype(np.uint8))), expected
    )
    either = allowed_classes(np.full(20, 4, np.uint8))  # glacier or debris
    inside = torch.softmax(logits, 1)[:, [1, 2]].sum(1)
    assert torch.allclose(set_cross_entropy(logits, either), -inside.log().mean(), atol=1e-6)


def test_only_labelled_valid_pixels_are_drawn(image):
    codes = np.zeros((40, 48), np.uint8)
    codes[:, :24] = 255
    codes[20:, 30:] = 1
    drawn = draw_pixels(network_with(), image, codes, 10_000, np.random.default_rng(0))
    assert len(drawn.codes) == ((codes != 255) & solution.valid_mask(image)).sum()
    assert set(np.unique(drawn.codes)) == {0, 1}
    features = network_with().features(image, solution.median_temperature(image))
    assert np.array_equal(drawn.features[0], features[:, 0, 24], equal_nan=True)


def test_it_learns_what_its_features_tell():
    rng = np.random.default_rng(0)
    count = solution.PIXEL_FEATURES + solution.SLOPE_FEATURES
    features = rng.normal(3, 2, (4000, count)).astype(np.float32)
    codes = (features[:, 0] + features[:, 20] > 6).astype(np.uint8)
    config = PixelConfig(hidden=[16], ranges=[], tophats=[], epochs=20, batch_size=256)
    network = fit_network([Pixels(features[:3000], codes[:3000])], config)
    with torch.no_grad():
        found = network.layers(network.standardise(torch.from_numpy(features[3000:])[..., None, None]))
    assert (found[..., 0, 0].argmax(1).numpy() == codes[3000:]).mean() > 0.9


@pytest.mark.parametrize(
    "override",
    [
        "pixels=3",
        "epochs=many",
        "unsplit_glacier=ice",
        "hidden=[0]",
        "ranges=[8]",
        "tophats=[65]",
        "range_bands=[5]",
    ],
)
def test_unknown_and_senseless_settings_are_errors(override):
    with pytest.raises(ConfigError):
        load_pixel_config(Path("train/configs/pixels.yaml"), [override])


def test_a_run_is_one_like_any_other_and_asked_in_one_view(tmp_path):
    store = TileStore(make_store(tmp_path / "store"))
    config = PixelConfig(store=str(store.folder), pixels_per_tile=500, epochs=1, hidden=[8])
    scores = fit_run(config, tmp_path / "run", 1)
    predict_run(tmp_path / "run", store)
    records = read_folds(tmp_path / "run")
    assert sorted(tile for record in records for tile in record["val_tiles"]) == sorted(store.tile_ids)
    assert all(not set(record["train_tiles"]) & set(record["val_tiles"]) for record in records)
    passes = load_passes(tmp_path / "run", store.tile_ids[0])
    assert (passes == passes[:1]).all(), "further views bring nothing"
    assert -1 <= scores["pooled"]["valid_pixels"]["binary"]["mcc"] <= 1


def test_pairs_of_folds_have_networks_that_saw_neither(tmp_path):
    store = TileStore(make_store(tmp_path / "store", tiles=6, folds=3))
    settings = [f"store={store.folder}", "pixels_per_tile=200", "epochs=1", "hidden=[8]"]
    assert main(["pixels", "--run", str(tmp_path / "pairs"), "--pairs", *settings]) == 0
    records = read_folds(tmp_path / "pairs")
    fold_of = store.fold_of("stratified")
    for record, pair in zip(records, ((0, 1), (0, 2), (1, 2)), strict=True):
        assert {fold_of[tile] for tile in record["val_tiles"]} == set(pair)
        assert not set(record["val_tiles"]) & set(record["train_tiles"])
    assert not list((tmp_path / "pairs").glob("oof/*"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pairs").glob("fold*/fold.pt")}
    assert main(["pixels", "--run", str(tmp_path / "pairs"), "--pairs", *settings]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert main(["pixels", "--run", str(tmp_path / "pairs"), "--pairs", *settings, "seed=1"]) == 0
    assert all(path.stat().st_mtime_ns > changed for path, changed in before.items())
