"""Properties of the synthetic scenes: seeded, in the competition's layout, and physically in order."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
from scipy import ndimage, stats
from sklearn.metrics import matthews_corrcoef
from sklearn.tree import DecisionTreeClassifier

from prep.synthetic import scenes as synthetic
from prep.synthetic.scenes import DEBRIS, GLACIER, LAKE, OTHER, Scene, make_scene, write_sample
from solution import BANDS, CLASS_VALUES, InputError, find_tiles, read_tile, tile_id

SIZE = 256


@lru_cache(maxsize=None)
def scene(seed: int, size: int = SIZE, index: int = 0) -> Scene:
    """Return a scene made once for all tests, which do not change it."""
    return make_scene(seed, size, index)


@lru_cache(maxsize=None)
def bare_relief(seed: int) -> tuple[np.ndarray, synthetic.SceneParameters]:
    """Return heights of 320 x 320 pixels before any ice, and their parameters."""
    rng = np.random.default_rng(seed)
    parameters = synthetic.draw_parameters(seed, SIZE, rng)
    return synthetic.add_detail(synthetic.carve_relief(parameters, rng), rng), parameters


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, Path]:
    """Return samples of 64 px tiles by what is special about them."""
    root = tmp_path_factory.mktemp("samples")
    for name, (tiles, seed, naming, labels) in {
        "both": (4, 3, "training", "both"),
        "phase1": (2, 3, "training", "phase1"),
        "platform": (2, 3, "platform", "phase2"),
    }.items():
        write_sample(root / name, tiles, 64, seed, naming, labels)
    return {path.name: path for path in root.iterdir()}


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(stats.spearmanr(a.ravel(), b.ravel()).statistic)


# --- seeds and sizes ---


def test_same_seed_same_bytes(samples, tmp_path):
    write_sample(tmp_path / "again", 2, 64, 3, "training", "phase1")
    assert digests(tmp_path / "again") == digests(samples["phase1"])


def test_seeds_and_tiles_differ():
    scenes = [scene(seed, 64, index) for seed, index in ((0, 0), (1, 0), (0, 1))]
    assert len({one.bands.tobytes() for one in scenes}) == 3
    assert len({one.classes.tobytes() for one in scenes}) == 3


def test_tiles_of_a_sample_share_the_sun():
    first, second, other = (scene(seed, 64, index).parameters for seed, index in ((0, 0), (0, 1), (1, 0)))
    assert (first.sun_azimuth, first.sun_elevation) == (second.sun_azimuth, second.sun_elevation)
    assert first.sun_azimuth != other.sun_azimuth
    assert first.relief != second.relief


@pytest.mark.parametrize("size", [64, 97, 128, 256, 301])
def test_any_size_has_every_class(size):
    one = scene(1, size)
    assert one.bands.shape == (size, size, 5)
    assert one.elevation.shape == one.classes.shape == (size, size)
    assert (one.bands.dtype, one.classes.dtype, one.elevation.dtype) == (np.float32, np.uint8, np.float32)
    assert set(np.unique(one.classes)) == {OTHER, GLACIER, DEBRIS, LAKE}


def test_a_relief_without_some_class_is_replaced():
    for seed, index in ((2, 0), (1, 6), (0, 7)):  # the first relief of these has no clean ice or no lake
        assert len(np.unique(scene(seed, 64, index).classes)) == 4


def test_too_small_a_size_is_an_error():
    with pytest.raises(InputError, match="found a size of 63 px, expected at least 64"):
        make_scene(0, 63)


# --- nodata ---


@pytest.mark.parametrize("seed", [0, 1])
def test_masked_pixels_lack_all_bands_and_are_other(seed):
    missing = np.isnan(scene(seed).bands)
    masked = missing.all(axis=-1)
    assert 0.10 < masked.mean() < 0.30
    assert (scene(seed).classes[masked] == OTHER).all()
    squares = ndimage.binary_opening(np.pad(masked, 9, mode="edge"), np.ones((9, 9)))[9:-9, 9:-9]
    assert squares[masked].mean() > 0.95  # blobs made of squares, not noise


def test_one_percent_lacks_one_band_only():
    missing = np.isnan(scene(0).bands).sum(axis=-1)
    assert set(np.unique(missing)) == {0, 1, 5}
    assert (missing == 1).sum() / (missing < 5).sum() == pytest.approx(0.01, rel=0.02)
    partly = np.isnan(scene(0).bands)[missing == 1].sum(axis=0)
    assert (partly > 0).all()


# --- values ---


def test_statistics_resemble_the_real_tiles():
    bands = np.concatenate([scene(seed).bands[~np.isnan(scene(seed).bands).all(-1)] for seed in range(4)])
    mean, std = np.nanmean(bands, axis=0), np.nanstd(bands, axis=0)
    assert mean[:3] == pytest.approx([0.711, 0.692, 0.688], abs=0.15)
    assert std[:3] == pytest.approx([0.575, 0.566, 0.578], abs=0.15)
    assert mean[3] == pytest.approx(0.050, abs=0.03)
    assert mean[4] == pytest.approx(256.6, abs=3)
    assert std[4] == pytest.approx(9.1, abs=2.5)


def test_class_shares_resemble_the_real_tiles():
    classes = np.stack([scene(seed).classes for seed in range(4)])
    shares = np.bincount(classes.ravel(), minlength=4) / classes.size
    assert shares[:3] == pytest.approx([0.70, 0.25, 0.05], abs=0.10)
    assert 0.0005 < shares[LAKE] < 0.005


def test_reflectance_and_temperature_lie_in_the_sensors_range():
    bands = scene(0).bands
    assert np.nanmin(bands[..., :4]) > -0.2
    assert np.nanmax(bands[..., :4]) <= 1.601
    assert 225 < np.nanmin(bands[..., 4]) < np.nanmax(bands[..., 4]) < 305


def test_relief_is_himalayan():
    heights = np.concatenate([scene(seed).elevation.ravel() for seed in range(3)])
    assert 3000 < heights.min() < 4400
    assert 5600 < heights.max() < 7500
    assert 20 < np.degrees(np.arctan(np.median(synthetic.slope(scene(0).elevation)))) < 45


# --- physics ---


def test_debris_lies_lower_than_the_ice_it_comes_from():
    for seed in range(3):
        one = scene(seed)
        clean, debris = (one.elevation[one.classes == kind].mean() for kind in (GLACIER, DEBRIS))
        assert clean > debris + 100


def test_debris_adjoins_ice():
    one = scene(0)
    parts, count = ndimage.label((one.classes == DEBRIS) | (one.classes == GLACIER), np.ones((3, 3)))
    mixed = sum({GLACIER, DEBRIS} <= set(one.classes[parts == part]) for part in range(1, count + 1))
    stones = np.unique(parts[one.classes == DEBRIS])
    assert mixed >= 0.3 * len(stones)  # masks cut some tongues off


def test_lakes_are_flat_and_below_the_glaciers():
    for seed in range(3):
        one = scene(seed)
        lakes, count = ndimage.label(one.classes == LAKE, np.ones((3, 3)))
        spread = ndimage.standard_deviation(one.elevation, lakes, range(1, count + 1))
        assert np.max(spread) < 60  # two lakes at different levels may touch
        assert np.min(spread) < 0.01
        assert one.elevation[lakes > 0].mean() < one.elevation[one.classes == GLACIER].mean() - 100


def test_ice_flows_downhill():
    """Ice below the equilibrium line has come down from above it, and there is no more than has fallen."""
    heights, _ = bare_relief(5)
    coarse = heights[::4, ::4].copy()
    drainage = synthetic.route_water(coarse)
    line = np.full(coarse.shape, np.quantile(coarse, 0.7))
    ice = synthetic.flow_ice(coarse, line, drainage)
    balance = synthetic.mass_balance(coarse - line)
    assert ice.flux.max() <= balance[balance > 0].sum()
    below = (ice.flux > synthetic.SMALLEST_FLUX) & (coarse < line).ravel()
    assert below.any(), "no tongue reaches below the equilibrium line"
    for cell in np.flatnonzero(below):
        fed_by = [c for c in _upstream(drainage, cell) if coarse.ravel()[c] > line.flat[0]]
        assert fed_by, f"ice at cell {cell} comes from nowhere"


def _upstream(drainage, cell: int) -> list[int]:
    reached = {cell}
    for c in drainage.order:
        if drainage.parent[c] in reached:
            reached.add(c)
    return sorted(reached)


def test_water_routes_reach_the_rim_and_do_not_climb_a_slope():
    coarse = bare_relief(6)[0][::4, ::4].copy()
    drainage = synthetic.route_water(coarse)
    rim = np.ones(coarse.shape, bool)
    rim[1:-1, 1:-1] = False
    outlets = np.flatnonzero(np.array(drainage.parent) == -1)
    assert set(outlets) == set(np.flatnonzero(rim))
    assert sorted(drainage.order) == list(range(coarse.size))
    assert synthetic.accumulate(drainage).ravel()[outlets].sum() == coarse.size
    plane = np.add.outer(np.arange(20.0), 0.5 * np.arange(20.0))
    down = synthetic.route_water(plane)
    assert all(p < 0 or plane.flat[p] < plane.flat[c] for c, p in enumerate(down.parent))


def test_temperature_falls_with_height():
    heights, parameters = bare_relief(2)
    shape = heights.shape
    materials = {name: np.zeros(shape) for name in ("firn", "rock")}
    kelvin = synthetic.warm(
        heights, np.zeros(shape, np.uint8), materials, np.ones(shape), parameters, np.random.default_rng(0)
    )
    slope = stats.linregress(heights.ravel(), kelvin.ravel()).slope
    assert slope == pytest.approx(-6.5e-3, abs=1e-3)
    for seed in range(3):  # and in whole scenes, whatever else acts on the temperature
        valid = ~np.isnan(scene(seed).bands).any(axis=-1) & (scene(seed).classes != LAKE)
        assert correlation(scene(seed).elevation[valid], scene(seed).bands[valid][:, 4]) < -0.2


def test_ice_is_never_above_melting():
    for seed in range(3):
        on_ice = scene(seed).bands[(scene(seed).classes == GLACIER) | (scene(seed).classes == DEBRIS)]
        assert np.nanmax(on_ice[:, 4]) <= 273.16


def test_debris_is_warmer_than_ice():
    one = scene(0)
    assert np.nanmean(one.bands[one.classes == DEBRIS, 4]) > np.nanmean(one.bands[one.classes == GLACIER, 4])


@pytest.mark.parametrize("seed", [0, 1])
def test_slopes_that_face_the_sun_are_brighter(seed):
    one = scene(seed)
    down, right = np.gradient(one.elevation.astype(np.float64), 30.0)
    azimuth = np.radians(one.parameters.sun_azimuth)
    facing = -right * np.sin(azimuth) + down * np.cos(azimuth)  # rows run south
    valid = ~np.isnan(one.bands).any(axis=-1) & (one.classes == GLACIER)
    for band in range(3):
        assert correlation(facing[valid], one.bands[valid][:, band]) > 0.7
    opposite = np.nanmedian(one.bands[valid & (facing < -0.3)][:, 0])
    assert np.nanmedian(one.bands[valid & (facing > 0.3)][:, 0]) > 3 * max(opposite, 0.05)


def test_a_wall_casts_a_shadow_of_the_right_length():
    ground = np.zeros((100, 200))
    ground[:, 100:103] = 300.0  # 10 px high: in the light of 45 degrees its shadow is 10 px long
    west, east = (np.flatnonzero(synthetic.cast_shadow(ground, azimuth, 45.0)[50] > 0.5) for azimuth in (90.0, 270.0))
    assert (west.min(), west.max()) == (pytest.approx(91, abs=1), 99)
    assert (east.min(), east.max()) == (103, pytest.approx(111, abs=1))


def test_light_on_a_plane_is_the_cosine_of_incidence():
    rows, cols = np.mgrid[:64, :64] * 30.0
    plane = 0.3 * rows - 0.2 * cols  # rises to the south and to the west
    light = synthetic.illuminate(plane, 150.0, 60.0)[20:-20, 20:-20]
    normal = np.array([0.2, 0.3, 1.0]) / np.linalg.norm([0.2, 0.3, 1.0])  # east, north, up
    azimuth, elevation = np.radians(150.0), np.radians(60.0)
    sun = [np.sin(azimuth) * np.cos(elevation), np.cos(azimuth) * np.cos(elevation), np.sin(elevation)]
    assert light == pytest.approx(normal @ sun / np.sin(elevation), rel=1e-3)


def test_colour_alone_does_not_give_glaciers_away():
    """A decision tree on the five bands of single pixels stays far from the truth, as on the real tiles.

    There it reaches a Matthews correlation of 0.54, on the synthetic ones 0.45.
    """
    pixels, truth = [], []
    for seed in range(4):
        valid = ~np.isnan(scene(seed).bands).any(axis=-1)
        pixels.append(scene(seed).bands[valid])
        truth.append(np.isin(scene(seed).classes[valid], (GLACIER, DEBRIS)))
    tree = DecisionTreeClassifier(max_depth=8, min_samples_leaf=50, random_state=0)
    tree.fit(np.concatenate(pixels[1:])[::8], np.concatenate(truth[1:])[::8])
    assert 0.1 < matthews_corrcoef(truth[0], tree.predict(pixels[0])) < 0.6


# --- files ---


def test_training_names(samples):
    folder = samples["both"]
    ids = ["01_01", "01_02", "02_01", "02_02"]
    for band, stem in zip(BANDS, ("B2_B2", "B3_B3", "B4_B4", "B6_B6", "B10_B10")):
        names = sorted(path.name for path in (folder / band.folder).iterdir())
        assert names == [f"{stem}_masked_{identifier}.tif" for identifier in ids]
    labels = sorted(path.name for path in (folder / "label").iterdir())
    assert labels == [f"Y_output_resized_{identifier}.tif" for identifier in ids]
    assert [files.tile_id for files in find_tiles(folder)] == ids


def test_platform_names(samples):
    folder = samples["platform"]
    assert sorted(path.name for path in folder.iterdir()) == [f"Band{i}" for i in range(1, 6)] + ["label"]
    for sub in folder.iterdir():
        assert sorted(path.name for path in sub.iterdir()) == ["img001.tif", "img002.tif"]
    assert [files.tile_id for files in find_tiles(folder)] == ["001", "002"]


def test_write_sample_returns_the_tile_ids(tmp_path):
    returned = write_sample(tmp_path / "new", 1, 64, 8, "platform", "phase1")
    assert returned == [tile_id(path.name) for path in (tmp_path / "new" / "Band1").iterdir()] == ["001"]


def test_written_tiles_read_back_as_the_scene(samples):
    for index, files in enumerate(find_tiles(samples["both"])):
        np.testing.assert_allclose(read_tile(files), make_scene(3, 64, index).bands, rtol=0, atol=1e-4)


def test_files_hold_landsat_numbers(samples):
    for files in find_tiles(samples["both"]):
        stack = np.stack([tifffile.imread(path) for path in files.paths], axis=-1)
        assert stack.dtype == np.float32
        assert (stack == np.round(stack)).all()
        assert stack.min() == 0
        assert stack.max() <= 65454
        thermal = stack[..., 4][stack[..., 4] > 0]
        assert 22000 < thermal.min() < thermal.max() < 46000
        masked = (stack == 0).all(axis=-1)
        assert masked.any()
        label = tifffile.imread(samples["both"] / "label" / f"Y_output_resized_{files.tile_id}.tif")
        assert (label[masked] == 0).all()


def test_rasters_are_georeferenced_neighbours(samples):
    bounds = {}
    for path in (samples["both"] / "Band4").iterdir():
        with rasterio.open(path) as raster:
            assert raster.nodata == 0
            assert raster.crs.to_epsg() == 32643
            assert raster.res == (30, 30)
            bounds[tile_id(path.name)] = raster.bounds
    assert bounds["01_01"].right == bounds["01_02"].left
    assert bounds["01_01"].bottom == bounds["02_01"].top


def test_label_values(samples):
    def values(folder: Path) -> set[float]:
        return set(np.unique([tifffile.imread(path) for path in folder.iterdir()]).tolist())

    assert values(samples["both"] / "label") == {0, 255}
    assert values(samples["phase1"] / "label") == {0, 255}
    assert not (samples["phase1"] / "label_phase2").exists()
    assert values(samples["platform"] / "label") == set(CLASS_VALUES)
    assert values(samples["both"] / "label_phase2") == set(CLASS_VALUES)


def test_both_phases_agree(samples):
    second = sorted((samples["both"] / "label_phase2").iterdir())
    assert [tile_id(path.name) for path in second] == ["01_01", "02_02"]  # every third
    for path in second:
        fine = tifffile.imread(path)
        coarse = tifffile.imread(samples["both"] / "label" / path.name)
        np.testing.assert_array_equal(coarse == 255, (fine == 85) | (fine == 170))


def test_a_sample_of_one_tile_has_phase2_labels_too(tmp_path):
    write_sample(tmp_path / "one", 1, 64, 0, "training", "both")
    assert len(list((tmp_path / "one" / "label_phase2").iterdir())) == 1


# --- refusals ---


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_sample(tmp_path, 1, 64, 0, "training", "both")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "sample").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_sample(tmp_path / "sample", 1, 64, 0, "training", "both")


def test_an_empty_folder_is_written_to(tmp_path):
    assert write_sample(tmp_path, 1, 64, 0, "training", "phase2") == ["01_01"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tiles": 0}, "tiles: found 0, expected 1 to 9801"),
        ({"tiles": 1000, "naming": "platform"}, "tiles: found 1000, expected 1 to 999"),
        ({"size": 63}, "size: found 63 px, expected at least 64"),
        ({"seed": -1}, "seed: found -1"),
        ({"naming": "other"}, "naming: found 'other', expected one of training, platform"),
        ({"labels": "phase3"}, "labels: found 'phase3', expected one of phase1, phase2, both"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, changed, message):
    options = {"tiles": 1, "size": 64, "seed": 0, "naming": "training", "labels": "both", **changed}
    with pytest.raises(InputError, match=message):
        write_sample(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_parameters_are_recorded_and_fixed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        scene(0).parameters.size = 1
