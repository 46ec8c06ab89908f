"""Landsat-7 channels by name, digital numbers to physical units against values worked out by hand."""

import math

import numpy as np
import pytest
from hkh_helpers import PROPERTY
from hypothesis import given
from hypothesis import strategies as st

from prep.hkh import landsat7
from prep.hkh.landsat7 import EXPORT_15, SceneError, Sun, choose_channels, find_sun, read_sun_table

HIGH_SUN = Sun(90.0, 1.0, "test")
CHOSEN = ["B1", "B2", "B3", "B5", "B6_VCID_1"]


# --- channels ---


@pytest.mark.parametrize("count", [15, 8])
def test_without_descriptions_the_documented_order_holds_and_swir_is_index_4(count):
    assert choose_channels([None] * count, "x.tif") == dict(zip(CHOSEN, [0, 1, 2, 4, 5]))


@given(st.permutations(EXPORT_15))
@PROPERTY
def test_described_bands_are_found_wherever_they_are(names):
    assert choose_channels(names, "x.tif") == {name: list(names).index(name) for name in CHOSEN}


def test_names_are_read_in_several_spellings():
    names = ["LE7 B1 (blue)", "green", "b3", "B4", "SWIR-1", "B6 VCID 1"]
    assert choose_channels(names, "x.tif") == dict(zip(CHOSEN, [0, 1, 2, 4, 5]))


def test_high_gain_serves_where_low_gain_is_missing():
    assert choose_channels(["B1", "B2", "B3", "B5", "B6_VCID_2"], "x.tif")["B6_VCID_2"] == 4


@pytest.mark.parametrize(
    ("descriptions", "message"),
    [
        ([None] * 9, r"x.tif: found 9 bands without descriptions, expected 8 or 15"),
        (
            ["B1", "B2", "B3", "B4", "B6_VCID_1"],
            r"x.tif: lacks B5 \(SWIR-1\); found bands B1, B2, B3, B4, B6_VCID_1",
        ),
        (["B1", "B2", "B3", "B5", None], r"lacks B6_VCID_1 or B6_VCID_2 \(thermal\); found .*\(none\)"),
        (["B1", "blue", "B2", "B3", "B5", "B6_VCID_1"], r"has B1 more than once; found bands B1, blue"),
        (["SR_B1", "SR_B2", "SR_B3", "SR_B5", "ST_B6"], r"lacks B1 \(blue\), B2 \(green\)"),
    ],
)
def test_anything_else_is_an_error_that_lists_what_was_found(descriptions, message):
    with pytest.raises(SceneError, match=message):
        choose_channels(descriptions, "x.tif")


# --- units ---

# Worked out by hand: radiance of the numbers 1 and 255 is LMIN and LMAX, that of 128 their mean; reflectance
# is pi L / ESUN with the sun at the zenith, temperature 1282.71 / ln(666.09 / L + 1).
HAND_COMPUTED = [
    ("B1", 1, -0.0097536),  # L = -6.2
    ("B1", 128, 0.2261425),  # 143.75
    ("B1", 255, 0.4620386),  # 293.7
    ("B2", 255, 0.5216911),  # 300.9
    ("B3", 128, 0.2350559),  # 114.7
    ("B5", 128, 0.3169486),  # 23.285
    ("B5", 1, -0.0136118),  # -1
    ("B6_VCID_1", 128, 293.4110),  # 8.52
    ("B6_VCID_1", 255, 347.5122),  # 17.04
    ("B6_VCID_2", 1, 240.0700),  # 3.2
    ("B6_VCID_2", 255, 322.0801),  # 12.65
]


@pytest.mark.parametrize(("channel", "number", "expected"), HAND_COMPUTED)
def test_conversion_agrees_with_hand_computed_values(channel, number, expected):
    table = landsat7.physical_table([channel], HIGH_SUN)
    assert table[0, number] == pytest.approx(expected, rel=2e-5)


def test_a_low_sun_and_a_far_one_scale_reflectance_and_leave_temperature():
    low = landsat7.physical_table(CHOSEN, Sun(30.0, 1.01, "test"))
    high = landsat7.physical_table(CHOSEN, HIGH_SUN)
    assert np.allclose(low[:4, 1:], high[:4, 1:] * 1.01**2 / 0.5)
    assert np.array_equal(low[4], high[4], equal_nan=True)


def test_fill_and_a_thermal_radiance_of_zero_are_nodata():
    table = landsat7.physical_table(CHOSEN, HIGH_SUN)
    assert np.isnan(table[:, 0]).all()
    assert np.isnan(table[4, 1])
    assert not np.isnan(table[:, 2:]).any()


@given(st.integers(0, 2**32 - 1))
@PROPERTY
def test_the_table_equals_the_formulas_pixel_by_pixel(seed):
    random = np.random.default_rng(seed)
    numbers = random.integers(2, 256, (5, 7, 9)).astype(np.uint8)
    sun = Sun(random.uniform(10, 90), random.uniform(0.98, 1.02), "test")
    image = landsat7.to_physical(numbers, landsat7.physical_table(CHOSEN, sun))
    assert (image.shape, image.dtype) == ((7, 9, 5), np.float32)
    for band, channel in enumerate(CHOSEN):
        (lmin, lmax), esun = landsat7.RADIANCES[channel], landsat7.IRRADIANCES.get(channel)
        radiance = (lmax - lmin) / 254 * (numbers[band].astype(float) - 1) + lmin
        if esun is None:
            expected = 1282.71 / np.log(666.09 / radiance + 1)
        else:
            expected = math.pi * radiance * sun.distance**2 / (esun * math.sin(math.radians(sun.elevation)))
        assert np.allclose(image[..., band], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint16, np.float64])
def test_whole_numbers_of_any_type_are_digital_numbers(dtype):
    values = np.arange(256).astype(dtype)
    assert np.array_equal(landsat7.as_numbers(values, "x"), np.arange(256, dtype=np.uint8))


def test_nan_is_fill():
    assert landsat7.as_numbers(np.array([np.nan, 3.0]), "x").tolist() == [0, 3]


@pytest.mark.parametrize(
    ("values", "numbers"),
    [([0.4, 1.6, 200.5, 31.0], [1, 2, 200, 31]), ([-12.3, 264.9, 90.2, 40.0], [1, 255, 90, 40])],
)
def test_values_of_filled_gaps_are_rounded_and_clipped(values, numbers):
    assert landsat7.as_numbers(np.array(values, np.float32), "x").tolist() == numbers


def test_a_few_predictions_far_off_are_clipped():
    values = np.full(100, 77.5)
    values[:4] = (-900, 3000, -1e6, np.inf)
    assert landsat7.as_numbers(values, "x")[:5].tolist() == [1, 255, 1, 0, 78]


@pytest.mark.parametrize(
    "values",
    [
        [0.43, 0.71, 0.05, 256.2],  # reflectance and kelvin
        [10_000, 7500, 8200, 600],  # 16-bit
        [-9999, -9999, 30, 40],  # nodata that is not declared
        [-1.2, 0.3, 0.01, 2.4],  # standardised
    ],
)
def test_other_units_are_refused(values):
    with pytest.raises(SceneError, match="x.tif: found values from .* expected digital numbers 0 to 255"):
        landsat7.as_numbers(np.array(values, np.float32), "x.tif")


# --- the sun ---


def write_csv(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_csv_comes_before_tags_before_mtl(tmp_path):
    scene = tmp_path / "LE07.tif"
    (tmp_path / "LE07_MTL.txt").write_text("  SUN_ELEVATION = 31.5\n  EARTH_SUN_DISTANCE = 1.0100\nEND\n")
    table = read_sun_table(write_csv(tmp_path / "sun.csv", "scene,sun_elevation\nLE07.tif,33\n"))
    assert find_sun(scene, {"SUN_ELEVATION": "32"}, table).elevation == 33
    assert find_sun(scene, {"SUN_ELEVATION": "32"}, {})[:2] == (32, 1.0)
    assert find_sun(scene, {}, {})[:2] == (31.5, 1.01)


def test_an_unknown_sun_is_45_degrees_with_a_warning(tmp_path, capsys):
    assert find_sun(tmp_path / "LE07.tif", {}, {}) == Sun(45.0, 1.0, "assumed")
    assert "LE07.tif: no sun elevation in its tags, LE07_MTL.txt or the CSV" in capsys.readouterr().err


# Worked out by hand from declination and hour angle of 10:20 apparent solar time, at the path's place.
@pytest.mark.parametrize(
    ("name", "elevation", "distance"),
    [
        ("LE07_140041_20051012", 50, 0.998),
        ("LE07_148036_20050902", 56, 1.009),
        ("LE07_146039_20010101", 31, 0.983),
    ],
)
def test_the_name_tells_the_sun(tmp_path, capsys, name, elevation, distance):
    sun = find_sun(tmp_path / f"{name}.tif", {}, {})
    assert sun.elevation == pytest.approx(elevation, abs=2)
    assert sun.distance == pytest.approx(distance, abs=0.002)
    assert find_sun(tmp_path / f"{name}.tif", {"SUN_ELEVATION": "12"}, {}).elevation == 12
    assert not capsys.readouterr().err


# Centres of WRS-2 as USGS lists them: 140/041 is the Khumbu, 148/036 Zanskar, 134/040 eastern Tibet.
@pytest.mark.parametrize(
    ("name", "longitude", "latitude"),
    [
        ("LE07_140041_20051012", 86.4, 27.4),
        ("LE07_148036_20050902", 75.9, 34.6),
        ("LE07_134040_20070922", 96.0, 28.9),
    ],
)
def test_the_name_tells_the_place(name, longitude, latitude):
    centre = landsat7.read_name(name).centre()
    assert centre == (pytest.approx(longitude, abs=0.6), pytest.approx(latitude, abs=0.4))


@pytest.mark.parametrize("name", ["scene", "LE07_140041_2005", "LE07_140041_20051399", "LC08_140041_20151012"])
def test_other_names_tell_nothing(name):
    assert landsat7.read_name(name) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "scene,elevation\na,3\n",
            "found the columns scene, elevation, expected scene, sun_elevation; add sun_elev",
        ),
        ("scene,sun_elevation\na,ninety\n", "sun.csv, scene a: .*ninety.*degrees"),
        ("scene,sun_elevation\na,0\n", "sun elevation 0, expected more than 0"),
        ("scene,sun_elevation,earth_sun_distance\na,40,149\n", "distance to the sun 149"),
    ],
)
def test_a_wrong_csv_is_named(tmp_path, text, message):
    with pytest.raises(SceneError, match=message):
        read_sun_table(write_csv(tmp_path / "sun.csv", text))


def test_a_missing_csv_is_named(tmp_path):
    with pytest.raises(SceneError, match="no.csv: no such file"):
        read_sun_table(tmp_path / "no.csv")
