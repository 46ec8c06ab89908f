"""Scores far from the training: the distances, against SciPy's distance transform."""

import importlib.util

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from support import PROJECT

spec = importlib.util.spec_from_file_location("far", PROJECT / ".ci" / "far_from_training.py")
far = importlib.util.module_from_spec(spec)
spec.loader.exec_module(far)


@pytest.mark.parametrize("trained_on", [[(0, 0)], [(2, 2), (0, 3)], [(1, 2)]])
def test_distances_are_those_to_the_nearest_pixel_of_the_training(trained_on):
    size, place = 8, (1, 1)
    ground = np.ones((4 * size, 4 * size), bool)
    for row, col in trained_on:
        ground[row * size : (row + 1) * size, col * size : (col + 1) * size] = False
    expected = distance_transform_edt(ground)[size : 2 * size, size : 2 * size] * far.PIXEL
    np.testing.assert_allclose(far.distance(place, trained_on, size), expected)
