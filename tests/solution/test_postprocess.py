"""Specks, holes and the dense CRF, against scipy and by properties."""

import numpy as np
import pytest
from scipy import ndimage
from support import CRF, NORMALIZATION, PLAIN, in_memory, random_network

import solution

NEIGHBOURS = np.ones((3, 3), int)
needs_crf = pytest.mark.skipif(solution.densecrf is None, reason="pydensecrf is not installed")


# --- Specks and holes -----------------------------------------------------------------------------


def random_blobs(seed: int, size: int = 120) -> np.ndarray:
    """Return (size, size) bool with blobs and holes of many sizes."""
    noise = np.random.default_rng(seed).normal(size=(size, size))
    field = ndimage.gaussian_filter(noise, 1) + 2 * ndimage.gaussian_filter(noise[::-1], 5)
    return field > 0.05


def without_small(mask: np.ndarray, smallest: int) -> np.ndarray:
    """Return `mask` without its 8-connected components below `smallest` px (scipy)."""
    labels, count = ndimage.label(mask, NEIGHBOURS)
    sizes = ndimage.sum_labels(mask, labels, np.arange(count + 1))
    return mask & (sizes[labels] >= smallest)


@pytest.mark.parametrize("of_class", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_specks_and_holes_of_one_class_as_scipy_finds_them(seed, of_class):
    blobs = random_blobs(seed)
    valid = np.ones(blobs.shape, bool)
    expected = without_small(blobs, 100)
    expected = ~without_small(~expected, 50)
    cleaned = solution.clean_classes((blobs * of_class).astype(np.uint8), valid, 100, 50)
    assert (blobs != expected).any()
    assert cleaned.dtype == np.uint8
    np.testing.assert_array_equal(cleaned, expected * of_class)


@pytest.mark.parametrize("seed", range(3))
def test_nodata_is_background_and_divides_patches(seed):
    blobs, valid = random_blobs(seed), ~random_blobs(seed + 50)
    cleaned = solution.clean_classes(blobs.astype(np.uint8), valid, 100, 0)
    np.testing.assert_array_equal(cleaned == 1, without_small(blobs & valid, 100))


def test_sizes_are_the_first_that_stay():
    classes = np.zeros((40, 60), np.uint8)
    classes[5:15, 5:15] = 1  # 100 px
    classes[20:29, 5:16] = 1  # 99 px
    classes[5:35, 25:55] = 2
    classes[8:13, 30:40] = 0  # a hole of 50 px
    classes[20:27, 30:37] = 0  # a hole of 49 px
    cleaned = solution.clean_classes(classes, np.ones(classes.shape, bool), 100, 50)
    expected = classes.copy()
    expected[20:29, 5:16] = 0
    expected[20:27, 30:37] = 2
    np.testing.assert_array_equal(cleaned, expected)


def test_a_speck_goes_to_the_commonest_class_around_it():
    classes = np.ones((30, 30), np.uint8)
    classes[:, 15:] = 2
    classes[10:14, 10:14] = 3  # inside glacier
    classes[20:24, 13:23] = 3  # mostly on debris
    cleaned = solution.clean_classes(classes, np.ones(classes.shape, bool), 100, 50)
    assert (cleaned[10:14, 10:14] == 1).all()
    assert (cleaned[20:24, 13:23] == 2).all()
    assert set(np.unique(cleaned)) == {1, 2}


def test_diagonal_neighbours_belong_to_one_patch():
    classes = np.zeros((20, 20), np.uint8)
    np.fill_diagonal(classes, 1)
    valid = np.ones(classes.shape, bool)
    np.testing.assert_array_equal(solution.clean_classes(classes, valid, 20, 0), classes)
    assert not solution.clean_classes(classes, valid, 21, 0).any()


def test_a_speck_amid_nodata_becomes_background():
    classes = np.full((20, 20), 2, np.uint8)
    valid = np.zeros(classes.shape, bool)
    valid[5:8, 5:8] = True
    assert not solution.clean_classes(classes, valid, 100, 50).any()
    np.testing.assert_array_equal(solution.clean_classes(classes, valid, 0, 0), np.where(valid, 2, 0))


def test_zero_keeps_everything():
    classes = np.random.default_rng(0).integers(0, 4, (50, 60)).astype(np.uint8)
    valid = np.ones(classes.shape, bool)
    before = classes.copy()
    np.testing.assert_array_equal(solution.clean_classes(classes, valid, 0, 0), before)
    solution.clean_classes(classes, valid, 100, 50)
    np.testing.assert_array_equal(classes, before)  # the argument is left alone


def test_masks_hold_the_competitions_values():
    mask = solution.to_mask(np.array([[0, 1], [2, 3]], np.uint8))
    np.testing.assert_array_equal(mask, [[0, 85], [170, 255]])
    assert mask.dtype == np.uint8


# --- Dense CRF ------------------------------------------------------------------------------------


def certain(classes: np.ndarray, confidence: float = 0.9) -> np.ndarray:
    """Return (4, H, W) float32 probabilities: `confidence` for each pixel's class, the rest shared."""
    probs = np.full((4,) + classes.shape, (1 - confidence) / 3, np.float32)
    np.put_along_axis(probs, classes[None].astype(int), confidence, axis=0)
    return probs


@needs_crf
def test_without_pairwise_weights_the_classes_stay():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), (20, 30)).transpose(2, 0, 1).astype(np.float32)
    features = rng.normal(size=(5, 20, 30)).astype(np.float32)
    valid = rng.random((20, 30)) < 0.8
    plain = {**CRF, "smooth_weight": 0.0, "bilateral_weight": 0.0}
    refined = solution.refine_with_crf(probs, features, valid, solution.Crf(**plain))
    assert refined.shape == probs.shape and refined.dtype == np.float32
    np.testing.assert_allclose(refined, probs, atol=1e-3)
    np.testing.assert_array_equal(refined.argmax(axis=0), probs.argmax(axis=0))


@needs_crf
@pytest.mark.parametrize("kernel", ["smooth_weight", "bilateral_weight"])
def test_a_lone_unsure_pixel_takes_its_neighbours_class(kernel):
    classes = np.full((24, 31), 1)  # not square: a transposed position would show
    probs = certain(classes)
    probs[:, 12, 20] = (0.05, 0.42, 0.48, 0.05)
    settings = {**CRF, "smooth_weight": 0.0, "bilateral_weight": 0.0, kernel: 3.0}
    features, valid = np.zeros((5, 24, 31), np.float32), np.ones((24, 31), bool)
    before = probs.copy()
    refined = solution.refine_with_crf(probs, features, valid, solution.Crf(**settings))
    assert probs[:, 12, 20].argmax() == 2
    assert (refined.argmax(axis=0) == 1).all()
    np.testing.assert_array_equal(probs, before)


@needs_crf
@pytest.mark.parametrize("band", range(5))
def test_the_bilateral_kernel_uses_every_band(band):
    """Of noisy probabilities and classes that differ in one band, the CRF finds the border only with it."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[:40, :50]
    classes = (columns > 25 + 8 * np.sin(rows / 5)).astype(int)
    noisy = np.where(rng.random(classes.shape) < 0.3, 1 - classes, classes)
    probs = certain(noisy, 0.6)
    features = np.zeros((5, 40, 50), np.float32)
    features[band] = np.where(classes == 1, 1.0, -1.0) + rng.normal(0, 0.1, classes.shape)
    settings = {**CRF, "smooth_weight": 0.0, "bilateral_px": 15.0, "bilateral_weight": 8.0}
    valid = np.ones(classes.shape, bool)

    def accuracy(bands):
        return (
            solution.refine_with_crf(probs, bands, valid, solution.Crf(**settings)).argmax(axis=0) == classes
        ).mean()

    assert accuracy(features) > 0.99
    assert accuracy(np.zeros_like(features)) < 0.95


@needs_crf
def test_nodata_takes_no_part_in_the_crf():
    probs = certain(np.zeros((20, 20), int))
    probs[:, 10, 10] = (0.05, 0.9, 0.02, 0.03)
    features, valid = np.zeros((5, 20, 20), np.float32), np.zeros((20, 20), bool)
    valid[10, 10] = True
    refined = solution.refine_with_crf(probs, features, valid, solution.Crf(**CRF))
    np.testing.assert_array_equal(refined[:, ~valid], probs[:, ~valid])
    assert refined[:, 10, 10].argmax() == 1  # whatever the nodata around it says


@needs_crf
def test_the_crf_runs_only_where_the_model_asks_for_it():
    image = np.random.default_rng(2).normal(0.5, 0.5, (32, 40, 5)).astype(np.float32)
    network, crf = random_network(), solution.Crf(**CRF)
    plain = solution.predict_window(in_memory(network), image)[0]
    refined = solution.predict_window(in_memory(network, postprocess=PLAIN._replace(crf=crf)), image)[0]
    features = solution.normalize(image, NORMALIZATION)
    expected = solution.refine_with_crf(plain, features, np.ones((32, 40), bool), crf)
    np.testing.assert_allclose(refined, expected, atol=1e-5)
    assert np.abs(refined - plain).max() > 0.05


def test_without_pydensecrf_masks_are_made_without_it_and_say_so(monkeypatch, capsys):
    monkeypatch.setattr(solution, "densecrf", None)
    solution.warn_once.cache_clear()
    probs = certain(np.ones((8, 9), int))
    features, valid = np.zeros((5, 8, 9), np.float32), np.ones((8, 9), bool)
    for _ in range(2):
        assert solution.refine_with_crf(probs, features, valid, solution.Crf(**CRF)) is probs
    assert capsys.readouterr().err.count("pydensecrf is not installed") == 1
