"""Band statistics against numpy's over everything at once."""

import numpy as np
import pytest

from prep import stats


def make_images(seed: int = 0, sizes=((30, 40), (7, 3), (64, 64), (1, 1))) -> list[np.ndarray]:
    """Return images of different sizes whose thermal band varies little around 256 K, a quarter of it NaN."""
    random = np.random.default_rng(seed)
    images = []
    for number, (height, width) in enumerate(sizes):
        image = random.normal([0.7, 0.7, 0.7, 0.05, 256], [0.5, 0.5, 0.5, 0.08, 0.3], (height, width, 5))
        image = (image + number).astype(np.float32)
        image[random.random(image.shape) < 0.25] = np.nan
        images.append(image)
    return images


def flatten(images: list[np.ndarray]) -> np.ndarray:
    """Return all pixels as (pixels, 5) float64."""
    return np.concatenate([image.reshape(-1, 5) for image in images]).astype(np.float64)


def test_statistics_equal_numpys_over_the_concatenation():
    images = make_images()
    found, pixels = stats.band_statistics(iter(images)), flatten(images)
    assert np.allclose(found["mean"], np.nanmean(pixels, axis=0), rtol=1e-9)
    assert np.allclose(found["std"], np.nanstd(pixels, axis=0), rtol=1e-9)
    assert found["count"] == (~np.isnan(pixels)).sum(axis=0).tolist()


def test_statistics_do_not_cancel_far_from_zero():
    images = [(np.random.default_rng(n).normal(size=(50, 50, 5)) + 1e7).astype(np.float64) for n in range(4)]
    assert np.allclose(stats.band_statistics(images)["std"], flatten(images).std(axis=0), rtol=1e-6)


def test_an_empty_tile_changes_nothing():
    images = make_images()
    empty = np.full((5, 5, 5), np.nan, np.float32)
    assert stats.band_statistics([empty, *images, empty]) == stats.band_statistics(images)


def test_a_band_without_a_valid_pixel_is_named():
    image = np.ones((4, 4, 5), np.float32)
    image[..., 3] = np.nan
    with pytest.raises(stats.StatsError, match=r"Band4 \(SWIR-1\)"):
        stats.band_statistics([image])


def test_a_wrong_shape_is_an_error():
    with pytest.raises(stats.StatsError, match=r"\(4, 4, 3\)"):
        stats.band_statistics([np.ones((4, 4, 3), np.float32)])
