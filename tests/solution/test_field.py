"""What people really feed it: values that are no measurement, units, places, names and consoles."""

import io
import math
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import rasterio
import support
import tifffile
import torch
from rasterio.transform import Affine
from support import in_memory, random_network, scene_numbers, write_model, write_tile

import solution

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
NORTH_UP = Affine(30, 0, 500_000, 0, -30, 3_700_000)


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """Let every run use one tiny model on one thread."""
    made = in_memory(random_network(), kind=support.random_kind())
    monkeypatch.setattr(solution, "usable_cores", lambda: 1)
    monkeypatch.setattr(solution, "find_weights", lambda given: given)
    monkeypatch.setattr(solution, "load_model", lambda path: made)
    return made


def numbers(side: int = 64) -> np.ndarray:
    return scene_numbers(0)[:side, :side].copy()


def write_placed(root, bands, name="img001.tif", transform=NORTH_UP, epsg=32643, places=None):
    """Write five GeoTIFFs; `places` has {band number: (transform, epsg)} of those that lie elsewhere."""
    for index, band in enumerate(solution.BANDS):
        lies, crs = (places or {}).get(index + 1, (transform, epsg))
        values = bands[..., index].astype(np.float32)
        path = root / band.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        profile = {"driver": "GTiff", "height": values.shape[0], "width": values.shape[1], "count": 1}
        with rasterio.open(path, "w", dtype="float32", crs=f"EPSG:{crs}", transform=lies, **profile) as raster:
            raster.write(values, 1)
    return root


def run(data):
    """Return the summary of a run."""
    return solution.segment_folder(data, None, None, "inf")


# --- Values that are no measurement ---------------------------------------------------------------


@pytest.mark.parametrize("fill", [-9999, -999, -1, -32768])
def test_a_value_below_zero_is_no_measurement(tmp_path, fill):
    for name, corner in (("zero", 0), ("fill", fill)):
        bands = numbers()
        bands[:20, :30] = corner
        write_tile(tmp_path / name, "001", bands)
    zero, filled = (run(tmp_path / name).masks["001"] for name in ("zero", "fill"))
    assert zero.any()
    np.testing.assert_array_equal(filled, zero)


@pytest.mark.parametrize("internal", [True, False])
def test_what_a_gdal_mask_leaves_out_is_nodata(tmp_path, internal):
    values, data = np.full((40, 50), 30000, np.uint16), np.ones((40, 50), bool)
    data[:10, :20] = False
    profile = {"driver": "GTiff", "height": 40, "width": 50, "count": 1, "dtype": "uint16"}
    path = tmp_path / "a.tif"
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal),
        rasterio.open(path, "w", **profile) as raster,
    ):
        raster.write(values, 1)
        raster.write_mask(data)
    assert path.with_name("a.tif.msk").is_file() != internal
    np.testing.assert_array_equal(np.isnan(solution.read_raster(path)[0]), ~data)


@pytest.mark.parametrize("nothing", [0, np.nan])
def test_a_band_without_any_value_is_named_and_counted(tmp_path, capsys, nothing):
    bands = numbers()
    bands[..., 4] = nothing
    write_tile(tmp_path, "001", bands)
    assert "Band5" in run(tmp_path).faults["001"]
    assert "no value above 0 in Band5" in capsys.readouterr().err


def test_lzw_with_an_alpha_band_is_refused(tmp_path):
    values = np.full((2, 40, 50), 40306, np.uint16)
    profile = {"driver": "GTiff", "height": 40, "width": 50, "count": 2, "dtype": "uint16"}
    with rasterio.open(tmp_path / "a.tif", "w", compress="lzw", interleave="pixel", alpha="yes", **profile) as raster:
        raster.write(values)
    with pytest.raises(solution.TileError, match="a.tif: .*export the file again"):
        solution.read_raster(tmp_path / "a.tif")


def test_twelve_bits_in_lzw_are_read_rightly_or_refused(tmp_path):
    values = np.arange(1, 2001, dtype=np.uint16).reshape(40, 50)
    profile = {"driver": "GTiff", "height": 40, "width": 50, "count": 1, "dtype": "uint16"}
    with rasterio.open(tmp_path / "a.tif", "w", compress="lzw", nbits=12, **profile) as raster:
        raster.write(values, 1)
    try:
        np.testing.assert_array_equal(solution.read_raster(tmp_path / "a.tif")[0], values)
    except solution.TileError as error:
        assert "uncompressed" in str(error)


# --- Units ----------------------------------------------------------------------------------------


def physical(bands):
    """Return stored numbers in physical units, 0 where nodata."""
    parts = [bands[..., i] * band.scale + band.offset for i, band in enumerate(solution.BANDS)]
    return np.where(bands > 0, np.stack(parts, axis=-1), 0)


def celsius(bands, warmer):
    """Return stored numbers with the thermal band in degrees Celsius, so many kelvin warmer; 0 where nodata."""
    degrees = np.where(bands > 0, physical(bands) - 273.15 + warmer, 0)
    return np.dstack([bands[..., :4], degrees[..., 4]])


@pytest.mark.parametrize("factor", [1, 10_000])
@pytest.mark.parametrize("kelvin", [True, False])
def test_reflectance_and_kelvin_are_told_and_converted(tmp_path, capsys, factor, kelvin):
    bands = numbers()
    stored = bands.astype(np.float64)
    stored[..., :4] = physical(bands)[..., :4] * factor
    if kelvin:
        stored[..., 4] = physical(bands)[..., 4]
    write_tile(tmp_path / "numbers", "001", bands)
    write_tile(tmp_path / "other", "001", stored)
    expected, image = (solution.read_tile(solution.find_tiles(tmp_path / name)[0]) for name in ("numbers", "other"))
    np.testing.assert_allclose(image, expected, atol=1e-3)  # NaN is where NaN is: dark snow is below 0
    assert "look like reflectance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda bands: np.ceil(bands / 257), "8-bit numbers"),
        (lambda bands: np.where(bands > 0, bands * 0.4, 0), "Level-1 numbers"),
        (lambda bands: celsius(bands, -60.0), "degrees Celsius"),  # below zero everywhere
        (lambda bands: celsius(bands, 40.0), "degrees Celsius"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, capsys, change, words):
    write_tile(tmp_path, "001", change(numbers()))
    run(tmp_path)
    said = capsys.readouterr().err
    assert words in said and "export Level-2 data" in said


def test_level_2_numbers_are_let_pass(tmp_path, capsys):
    write_tile(tmp_path, "001", numbers())
    assert not run(tmp_path).faults
    assert "warning" not in capsys.readouterr().err


def test_units_can_be_said(tmp_path):
    write_tile(tmp_path, "001", physical(numbers()))
    (tile,) = solution.find_tiles(tmp_path)
    read = {units: solution.read_tile(tile, units)[..., 0] for units in ("auto", "dn", "reflectance")}
    assert np.nanmax(read["dn"]) < -0.19
    np.testing.assert_array_equal(read["auto"], read["reflectance"])


# --- Places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "elsewhere", [(NORTH_UP @ Affine.translation(40, 0), 32643), (NORTH_UP, 32644)], ids=["shifted", "zone"]
)
def test_a_band_that_lies_elsewhere_is_that_tiles_error(tmp_path, elsewhere):
    write_placed(tmp_path, numbers(), places={5: elsewhere})
    write_placed(tmp_path, numbers(), "img002.tif")
    faults = run(tmp_path).faults
    assert list(faults) == ["001"]
    assert "Band5" in faults["001"] and "begins at" in faults["001"]


TURNED = {
    "south-up": Affine(30, 0, 500_000, 0, 30, 3_698_000),
    "mirrored": Affine(-30, 0, 502_000, 0, -30, 3_700_000),
    "east above": Affine(0, -30, 502_000, -30, 0, 3_700_000),
    "south above": Affine(-30, 0, 502_000, 0, 30, 3_698_000),
    "transposed": Affine(0, 30, 500_000, -30, 0, 3_700_000),
    "rotated": NORTH_UP @ Affine.rotation(20),
}


@pytest.mark.parametrize("transform", TURNED.values(), ids=TURNED)
def test_a_raster_without_north_above_is_refused(tmp_path, transform):
    write_placed(tmp_path, numbers(), transform=transform)
    write_placed(tmp_path, numbers(), "img002.tif")
    faults = run(tmp_path).faults
    assert list(faults) == ["001"] and "north is not above" in faults["001"] and "gdalwarp" in faults["001"]


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("2019_08_14", "2020_08_14", "2021_08_14"),
        ("tile_101_02", "tile_201_02"),
        ("north_img01", "south_img01"),
    ],
)
def test_every_file_gets_a_mask_of_its_own(tmp_path, names):
    for name in names:
        write_placed(tmp_path, numbers(), f"{name}.tif")
    summary = run(tmp_path)
    assert sorted(summary.masks) == sorted(names) and not summary.faults


def test_bands_of_different_stems_are_never_joined(tmp_path):
    write_placed(tmp_path, numbers(), "2019_08_14.tif")
    write_placed(tmp_path, numbers(), "2020_08_14.tif")
    (tmp_path / "Band5" / "2019_08_14.tif").unlink()
    for folder in ("Band1", "Band2", "Band3", "Band4"):
        (tmp_path / folder / "2020_08_14.tif").unlink()
    summary = run(tmp_path)
    assert len(summary.masks) == 2 and len(summary.faults) == 2


def test_two_files_of_one_stem_are_two_tiles(tmp_path):
    write_tile(tmp_path / "in", "001", numbers())
    tifffile.imwrite(tmp_path / "in" / "Band1" / "img001.tiff", np.ones((64, 64), np.float32))
    folder = solution.prepare_output(tmp_path / "out", tmp_path / "in")
    summary = solution.segment_folder(tmp_path / "in", None, solution.png_writer(folder), "inf")
    assert len(summary.masks) == 2 and len(summary.faults) == 1
    assert cv2.imread(str(folder / "img001.png"), -1).any()
    assert (folder / "img001.tiff.png").is_file()


def test_the_platforms_ids_stay():
    assert solution.tile_id("img001.tif") == "001"
    assert solution.tile_id("B10_B10_masked_02_07.tif") == "02_07"


def test_landsats_own_numbers_are_recognised(tmp_path):
    for number in (1, 2, 3, 4, 5, 6, 7, 10):
        (tmp_path / f"Band{number}").mkdir()
    with pytest.raises(solution.InputError, match="Band10.*Landsat's own numbers.*B2 .blue. is Band1"):
        solution.find_tiles(tmp_path)


def test_a_scene_from_usgs_is_recognised(tmp_path):
    for number in (2, 3, 4, 6, 10):
        (tmp_path / f"LC08_L2SP_147037_20200814_20210330_02_T1_SR_B{number}.TIF").write_bytes(b"")
    with pytest.raises(solution.InputError, match="like a scene from USGS"):
        solution.find_tiles(tmp_path)


# --- Consoles and surroundings --------------------------------------------------------------------


class Logger:
    """Stands in for standard error and can do little."""

    def write(self, text):
        raise BrokenPipeError("the reader went away")


class Ascii(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict")


@pytest.mark.parametrize("stderr", [Logger, Ascii, lambda: None, lambda: object()])
def test_messages_never_cost_masks(tmp_path, monkeypatch, stderr):
    write_placed(tmp_path, numbers(), "氷河.tif")
    write_placed(tmp_path, numbers(), "glaciär.tif")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr())
        summary = run(tmp_path)
    assert len(summary.masks) == 2 and not summary.faults


def test_a_closed_standard_error_costs_nothing(tmp_path):
    write_tile(tmp_path / "in", "001", numbers())
    weights = write_model(tmp_path / "model.pth")
    command = f"{sys.executable} solution.py {tmp_path / 'in'} {tmp_path / 'out'} --weights {weights} 2>&-"
    shell = ["bash", "-c", command]
    ended = subprocess.run(shell, cwd=support.PROJECT, stdout=subprocess.PIPE, timeout=300)
    assert ended.returncode == 0 and ended.stdout == b""
    assert cv2.imread(str(tmp_path / "out" / "img001.png"), -1).any()


def test_a_gpu_that_cannot_be_used_is_left(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if torch.cuda.device_count():
        pytest.skip("there is a GPU that works")
    assert solution.usable_device().type == "cpu"
    assert "the GPU cannot be used" in capsys.readouterr().err


# A process that has used two threads forks, as workers of a server do.
FORKED = """
import os, signal, sys
import solution
before = solution.maskgeration(*sys.argv[1:])
child = os.fork()
if child == 0:
    signal.alarm(120)
    after = solution.maskgeration(*sys.argv[1:])
    os._exit(any((before[name] != after[name]).any() for name in before))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_makes_the_same_masks(tmp_path):
    write_tile(tmp_path / "in", "001", numbers())  # one tile, so that its passes use both threads
    command = [sys.executable, "-c", FORKED, tmp_path / "in", write_model(tmp_path / "model.pth")]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "2"}
    assert subprocess.run(command, cwd=support.PROJECT, env=surroundings, timeout=300).returncode == 0


# --- Time -----------------------------------------------------------------------------------------


def test_a_scene_that_does_not_end_in_time_is_named(tmp_path, monkeypatch):
    for name, small in (("LARGEST_TILE", 64), ("WINDOW", 64), ("OVERLAP", 32)):
        monkeypatch.setattr(solution, name, small)
    write_tile(tmp_path, "001", scene_numbers(0, 96))
    (tile,) = solution.find_tiles(tmp_path)
    result = solution.segment_tile(solution.load_model(None), tile, 0.0, math.inf, "auto")
    assert result.passes == 0 and "the rest is background" in result.fault
