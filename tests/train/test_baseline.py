"""The baseline's features are what they are said to be, and it learns from a small store without leaks."""

import json
import os

import cv2
import numpy as np
import pytest
from threadpoolctl import threadpool_info

import solution
from prep.labels import GLACIER_OR_DEBRIS, IGNORE, count_codes
from prep.store import StoreError, TileRow, TileStore, create
from train import baseline

SIDE = 40
FOLDS = 2
CERTAIN = ("01_01", "01_02", "02_01")  # with phase-2 labels; both folds hold some


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    """Keep the classifiers small: what is tested does not depend on their number of trees."""
    monkeypatch.setattr(baseline, "BOOSTING", {**baseline.BOOSTING, "max_iter": 30, "min_samples_leaf": 20})


def make_tile(seed, codes=(0, 1, 2)):
    """Return image and mask: ice is cold, its debris warmer and red; a corner has no data."""
    rng = np.random.default_rng(seed)
    relief = cv2.GaussianBlur(rng.normal(size=(SIDE, SIDE)), (0, 0), 4)
    classes = np.digitize(relief, np.quantile(relief, [0.5, 0.85])).astype(np.uint8)
    kelvin = np.array([265.0, 250.0, 258.0])[classes]
    red = np.array([0.3, 0.8, 0.5])[classes]
    reflectance = np.stack([red * 1.1, red * 1.05, red, 0.1 * red + 0.05], axis=-1)
    image = np.concatenate([reflectance, kelvin[..., None]], axis=-1)
    image = (image * rng.normal(1, 0.01, image.shape)).astype(np.float32)
    mask = np.array(codes, np.uint8)[classes]
    image[:5, :7] = np.nan
    mask[:5, :7] = IGNORE
    return image, mask


def make_store(folder, codes_of):
    """Write a store of the tiles in {tile_id: codes of rest, ice and debris}, folds in turn."""
    rows = []
    with create(folder) as writer:
        for index, (tile_id, codes) in enumerate(codes_of.items()):
            image, mask = make_tile(index, codes)
            writer.write_tile(tile_id, image, mask)
            labels = "phase1" if GLACIER_OR_DEBRIS in codes else "phase2"
            rows.append(TileRow(tile_id, "made", None, None, labels, 0.98, count_codes(mask)))
        folds = {tile_id: index % FOLDS for index, tile_id in enumerate(codes_of)}
        writer.write_index(rows, {"mean": [0.0] * 5, "std": [1.0] * 5}, {"stratified": folds, "seed": 0}, {})
    return TileStore(folder)


@pytest.fixture
def store(tmp_path):
    """Return a store of six tiles, three of them with phase-2 labels."""
    names = [*CERTAIN, "02_02", "03_01", "03_02"]
    return make_store(
        tmp_path / "store", {name: (0, 1, 2) if name in CERTAIN else (0, 4, 4) for name in names}
    )


def windows_of(array, window):
    """Return (row, column, the part of the array in the window around it)."""
    half = window // 2
    for row, column in np.ndindex(array.shape):
        rows = slice(max(row - half, 0), row + half + 1)
        yield row, column, array[rows, max(column - half, 0) : column + half + 1]


@pytest.mark.parametrize("window", [3, 9, 33])
def test_local_statistics_equal_those_of_each_window(window):
    rng = np.random.default_rng(0)
    band = rng.normal(256.6, 9.1, (15, 21)).astype(np.float32)
    band[rng.random(band.shape) < 0.3] = np.nan
    band[:6, :6] = np.nan  # a window of 3 px sees nothing in there
    mean, deviation = solution.LocalStatistics(band).within(window)
    for row, column, part in windows_of(band.astype(np.float64), window):
        values = part[~np.isnan(part)]
        expected = (values.mean(), values.std()) if values.size else (np.nan, np.nan)
        found = (mean[row, column], deviation[row, column])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-4)


def test_local_statistics_of_an_empty_band_are_nan():
    mean, deviation = solution.LocalStatistics(np.full((4, 5), np.nan, np.float32)).within(3)
    assert np.isnan(mean).all()
    assert np.isnan(deviation).all()


def test_a_constant_band_has_no_deviation_even_at_256_kelvin():
    _, deviation = solution.LocalStatistics(np.full((40, 40), 256.6, np.float32)).within(33)
    assert deviation.max() == 0


def features_of(image):
    return list(solution.pixel_features(image, solution.median_temperature(image)))


def test_features_hold_bands_index_temperature_and_windows():
    image, _ = make_tile(0)
    features = np.stack(features_of(image), axis=-1)
    assert features.shape == (SIDE, SIDE, solution.PIXEL_FEATURES)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features[..., :5], image)
    green, swir, kelvin = image[..., 1], image[..., 3], image[..., 4]
    np.testing.assert_allclose(features[..., 5], (green - swir) / (green + swir), rtol=1e-5)
    np.testing.assert_allclose(features[..., 6], kelvin - np.nanmedian(kelvin), atol=1e-4)
    valid = (~np.isnan(image[..., 0])).astype(float)
    for row, column, part in windows_of(valid, solution.STATISTICS_WINDOWS[0]):
        assert features[row, column, 7] == pytest.approx(part.mean(), abs=1e-6)


def test_the_index_is_no_ratio_of_noise():
    image = np.full((3, 3, 5), -0.002, np.float32)
    image[..., 3] = 0.0021
    assert np.isnan(features_of(image)[5]).all()


def test_examples_answer_their_question_only():
    for codes, debris_drawn in (((0, 1, 2), True), ((0, 4, 4), False)):
        image, mask = make_tile(1, codes)
        examples = baseline.draw_examples(image, mask, (0, 1))
        glacier = examples[baseline.IS_GLACIER]
        assert len(glacier.answers) == (mask != IGNORE).sum()
        assert glacier.answers.sum() == np.isin(mask, [1, 2, 4]).sum()
        debris = examples[baseline.IS_DEBRIS]
        assert len(debris.answers) == (np.isin(mask, [1, 2]).sum() if debris_drawn else 0)
        assert debris.answers.sum() == (mask == 2).sum()


def test_examples_are_limited_and_seeded(monkeypatch):
    monkeypatch.setattr(baseline, "PIXELS_PER_TILE", 100)
    image, mask = make_tile(1)
    first, again, other = (
        baseline.draw_examples(image, mask, (seed, 1))[baseline.IS_GLACIER] for seed in (0, 0, 1)
    )
    assert len(first.answers) == 100
    np.testing.assert_array_equal(first.features, again.features)
    assert not np.array_equal(first.features, other.features, equal_nan=True)


def test_an_answer_without_examples_is_the_share_of_yes():
    features = np.zeros((40, 3), np.float32)
    few = baseline.Examples(features, np.arange(40) < 10)
    assert baseline.fit_answer([few], 0) == (pytest.approx(np.log(1 / 3)), ())
    none = baseline.Examples(features[:0], np.zeros(0, bool))
    start, trees = baseline.fit_answer([none], 0)
    assert 1 / (1 + np.exp(-start)) < 1e-14
    assert trees == ()


def test_baseline_beats_the_majority_and_tells_debris_from_ice(store, tmp_path):
    scores = baseline.run_baseline(store.folder, "stratified", tmp_path / "run", threads=1)
    pooled = scores["pooled"]["valid_pixels"]
    assert pooled["binary"]["mcc"] > 0.8  # always answering with the majority scores 0
    assert pooled["four_class"]["mcc"] > 0.7
    assert pooled["four_class"]["iou"]["debris"] > 0.5
    assert scores["scheme"] == "stratified"
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == scores


def test_predictions_are_probabilities_and_nodata_is_other(store, tmp_path):
    baseline.run_baseline(store.folder, "stratified", tmp_path / "run", threads=1)
    files = sorted(path.stem for path in (tmp_path / "run" / "oof").iterdir())
    assert files == sorted(store.tile_ids)
    for tile_id in store.tile_ids:
        probabilities = np.load(tmp_path / "run" / "oof" / f"{tile_id}.npy")
        assert probabilities.dtype == np.float16
        assert probabilities.shape == (4, SIDE, SIDE)
        np.testing.assert_allclose(probabilities.astype(np.float32).sum(axis=0), 1, atol=2e-3)
        assert (probabilities[0, :5, :7] == 1).all()
        assert (probabilities[3] == 0).all()  # no label shows a lake


def test_a_tile_is_predicted_without_its_labels(tmp_path):
    codes = {"01_01": (0, 1, 2), "01_02": (0, 1, 2), "02_01": (0, 1, 2), "02_02": (0, 1, 2)}
    make_store(tmp_path / "right", codes)
    make_store(tmp_path / "wrong", {**codes, "01_01": (1, 0, 0)})
    for name in ("right", "wrong"):
        baseline.run_baseline(tmp_path / name, "stratified", tmp_path / f"run-{name}", threads=1)
    right, wrong = (np.load(tmp_path / f"run-{name}" / "oof" / "01_01.npy") for name in ("right", "wrong"))
    np.testing.assert_array_equal(right, wrong)


def test_without_certain_debris_all_glacier_is_clean(tmp_path):
    store = make_store(tmp_path / "store", {"01_01": (0, 4, 4), "01_02": (0, 4, 4), "02_01": (0, 4, 4)})
    scores = baseline.run_baseline(store.folder, "stratified", tmp_path / "run", threads=1)
    assert scores["pooled"]["valid_pixels"]["four_class"] is None
    probabilities = np.load(tmp_path / "run" / "oof" / "01_01.npy")
    assert (probabilities[2] == 0).all()
    assert probabilities[1].max() > 0.5


def test_lakes_are_predicted_where_labels_show_them(tmp_path):
    store = make_store(tmp_path / "store", {"01_01": (0, 1, 3), "01_02": (0, 1, 3)})
    scores = baseline.run_baseline(store.folder, "stratified", tmp_path / "run", threads=1)
    assert scores["pooled"]["valid_pixels"]["four_class"]["iou"]["lake"] > 0.5


def test_same_seed_same_predictions_and_old_ones_are_removed(store, tmp_path):
    (tmp_path / "again" / "oof").mkdir(parents=True)
    stale = tmp_path / "again" / "oof" / "09_09.npy"
    stale.write_bytes(b"from another store")
    for name in ("first", "again"):
        baseline.run_baseline(store.folder, "stratified", tmp_path / name, seed=3, threads=1)
    assert not stale.exists()
    for tile_id in store.tile_ids:
        paths = [tmp_path / name / "oof" / f"{tile_id}.npy" for name in ("first", "again")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_an_unknown_scheme_is_an_error_that_names_the_known(store, tmp_path):
    with pytest.raises(StoreError, match="stratified"):
        baseline.run_baseline(store.folder, "random", tmp_path / "run")
    assert not os.path.exists(tmp_path / "run")


def test_threads_are_limited_for_the_block_only():
    before = cv2.getNumThreads()
    with baseline.limited_threads(1):
        assert cv2.getNumThreads() == 1
        assert {pool["num_threads"] for pool in threadpool_info()} == {1}
    assert cv2.getNumThreads() == before
