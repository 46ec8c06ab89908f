"""solution.py reads band files of every naming style and type, and explains what it cannot read."""

import numpy as np
import pytest
import rasterio
import tifffile
from support import NORMALIZATION, file_name, scene_numbers, write_tile

import solution
from prep.synthetic.scenes import make_scene

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
SHARES = [pytest.param(share, id=f"{share:.0%}") for share in (0.0, 0.02, 0.3, 0.7, 0.99)]


def write_band(path, values, **tags):
    """Write one band with rasterio; `tags` are its creation options."""
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=values.shape[0],
        width=values.shape[1],
        count=1,
        dtype=values.dtype,
        **tags,
    ) as raster:
        raster.write(values, 1)
    return path


# --- Names and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("img001.tif", "001"),
        ("img025.TIF", "025"),
        ("IMG7.tiff", "7"),
        ("B2_B2_masked_02_07.tif", "02_07"),
        ("B10_B10_masked_02_07.tif", "02_07"),
        ("Y_output_resized_10_11.tif", "10_11"),
        ("2019_08_14.tif", "08_14"),
        ("B4_zanskar.tif", "zanskar"),
        ("Band5_zanskar.tif", "zanskar"),
    ],
)
def test_tile_id_is_the_part_that_all_bands_share(name, expected):
    assert solution.tile_id(name) == expected


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("Band1", 1),
        ("band_4", 4),
        ("BAND5", 5),
        ("B2", 1),
        ("B10", 5),
        ("b6", 4),
        ("Band6", None),
        ("label", None),
    ],
)
def test_band_numbers(name, number):
    assert solution.band_number(name) == number


def test_bands_are_ordered_by_number_whatever_the_order_of_the_mapping(tmp_path):
    numbers = scene_numbers(0)
    write_tile(tmp_path, "001", numbers)
    shuffled = {f"Band{n}": str(tmp_path / f"Band{n}") for n in (5, 2, 4, 1, 3)}
    (from_mapping,), (from_folder,) = solution.find_tiles(shuffled), solution.find_tiles(tmp_path)
    assert [path.parent.name for path in from_mapping.paths] == ["Band1", "Band2", "Band3", "Band4", "Band5"]
    assert from_mapping == from_folder


@pytest.mark.parametrize("suffix", [".tif", ".TIF", ".tiff", ".TIFF"])
@pytest.mark.parametrize(("naming", "ids"), [("platform", ["001", "010"]), ("training", ["02_07", "10_11"])])
def test_tiles_are_matched_by_id_in_every_naming_style(tmp_path, naming, ids, suffix):
    for identifier in reversed(ids):
        write_tile(tmp_path, identifier, np.ones((4, 4, 5)), naming, suffix=suffix)
    for stray in ("Band1/notes.txt", "Band2/.img001.tif", "Band1/img001.tif.aux.xml"):
        (tmp_path / stray).write_text("not a tile")
    (tmp_path / "label").mkdir()
    tiles = solution.find_tiles(tmp_path)
    assert [tile.tile_id for tile in tiles] == ids
    for tile in tiles:
        expected = [file_name(band, naming, tile.tile_id, suffix) for band in solution.BANDS]
        assert [path.name for path in tile.paths] == expected
        assert tile.name == expected[0]


def test_a_tile_that_lacks_a_band_is_listed(tmp_path):
    write_tile(tmp_path, "001", np.ones((4, 4, 5)))
    (tmp_path / "Band3" / "img001.tif").unlink()
    (tile,) = solution.find_tiles(tmp_path)
    assert [path is None for path in tile.paths] == [False, False, True, False, False]
    with pytest.raises(solution.TileError, match="tile 001: no file in Band3.*add the missing file"):
        solution.read_tile(tile)


def test_folders_without_tiles_are_an_error_with_the_layout(tmp_path):
    with pytest.raises(solution.InputError, match="no folder that can be looked into.*Band1 ... Band5"):
        solution.find_tiles(tmp_path / "absent")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(solution.InputError, match="found pictures; expected a folder with Band1 ... Band5"):
        solution.find_tiles(tmp_path)
    (tmp_path / "Band1").mkdir()
    with pytest.raises(solution.InputError, match="no TIFF in .*Band1; expected a folder with Band1 ... Band5"):
        solution.find_tiles(tmp_path)
    with pytest.raises(solution.InputError, match="expected a folder with Band1 ... Band5"):
        solution.find_tiles({"Band1": tmp_path / "absent"})


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_values_are_those_that_rasterio_reads(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 250, (7, 9)).astype(dtype)
    values[2, 3] = 0
    path = write_band(tmp_path / "a.tif", values)
    read, _ = solution.read_raster(path)
    with rasterio.open(path) as raster:
        expected = raster.read(1)
    assert read.dtype == np.float32 and read.shape == (7, 9)
    np.testing.assert_array_equal(np.isnan(read), expected == 0)
    np.testing.assert_array_equal(np.nan_to_num(read), expected)


def test_int16_files_hold_the_upper_half_as_negative_values(tmp_path):
    stored = np.array([[1, 32767, 32769], [65535, 0, 40000]], np.uint16)
    path = write_band(tmp_path / "a.tif", stored.view(np.int16))
    np.testing.assert_array_equal(solution.read_raster(path)[0], [[1, 32767, 32769], [65535, np.nan, 40000]])


@pytest.mark.parametrize(
    ("dtype", "fill", "declared"),
    [
        ("float32", 0, None),
        ("float32", np.nan, None),
        ("float32", np.inf, None),
        ("float32", -np.inf, None),
        ("float32", -9999, -9999),
        ("float32", np.finfo(np.float32).min, float(np.finfo(np.float32).min)),
        ("uint16", 65535, 65535),
        ("uint16", 0, 0),
        ("int16", -9999, None),
        ("int16", -32768, -32768),
        ("uint8", 255, 255),
    ],
)
def test_nodata_becomes_nan(tmp_path, dtype, fill, declared):
    values = np.full((3, 4), 100, dtype)
    values[1, 2] = fill
    path = write_band(tmp_path / "a.tif", values, nodata=declared)
    expected = np.full((3, 4), 100, np.float32)
    expected[1, 2] = np.nan
    np.testing.assert_array_equal(solution.read_raster(path)[0], expected)


@pytest.mark.parametrize(
    "options",
    [{"compress": "deflate"}, {"compress": "lzw"}, {"compress": "lzw", "predictor": 2}, {"blockysize": 3}]
    + [{"tiled": True, "blockxsize": 16, "blockysize": 16}],
)
def test_compressed_and_tiled_files(tmp_path, options):
    values = np.random.default_rng(1).integers(1, 65000, (40, 50)).astype(np.uint16)
    np.testing.assert_array_equal(solution.read_raster(write_band(tmp_path / "a.tif", values, **options))[0], values)


def test_an_axis_of_length_one_is_dropped(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((1, 6, 5), np.uint16), photometric="minisblack")
    assert solution.read_raster(tmp_path / "a.tif")[0].shape == (6, 5)


def test_a_tile_in_physical_units(tmp_path):
    numbers = np.full((2, 3, 5), 20000.0)
    numbers[0, 0] = 0  # nodata
    numbers[1, 2, 4] = 0  # no temperature
    write_tile(tmp_path, "001", numbers, dtype=np.uint16)
    image = solution.read_tile(solution.find_tiles(tmp_path)[0])
    assert image.shape == (2, 3, 5) and image.dtype == np.float32
    np.testing.assert_allclose(image[0, 1], [0.35, 0.35, 0.35, 0.35, 217.3604], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(image), numbers == 0)
    np.testing.assert_array_equal(solution.valid_mask(image), [[False, True, True], [True, True, True]])


def test_a_synthetic_scene_reads_as_it_was_made(tmp_path):
    scene = make_scene(seed=3, size=96, index=0)
    write_tile(tmp_path, "02_07", scene_numbers(0), "training")
    image = solution.read_tile(solution.find_tiles(tmp_path)[0])
    np.testing.assert_array_equal(image, scene.bands)


def test_real_tiles_read_as_rasterio_reads_them(real_tiles):
    tiles = solution.find_tiles(real_tiles)
    assert len(tiles) == 18
    image = solution.read_tile(tiles[0])
    for index, (band, path) in enumerate(zip(solution.BANDS, tiles[0].paths)):
        with rasterio.open(path) as raster:
            stored = raster.read(1).astype(np.float64)
        expected = np.where(stored == 0, np.nan, stored * band.scale + band.offset)
        np.testing.assert_allclose(image[..., index], expected, rtol=1e-5, atol=1e-6)


# --- Files that cannot be read --------------------------------------------------------------------


@pytest.mark.parametrize("compress", [None, "deflate", "lzw"])
@pytest.mark.parametrize("share", SHARES)
def test_truncated_files_are_refused_not_filled_up(tmp_path, share, compress):
    values = np.random.default_rng(2).integers(1, 65000, (40, 50)).astype(np.uint16)
    path = write_band(tmp_path / "img001.tif", values, compress=compress)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(solution.TileError, match=r"img001\.tif: cannot be read.*\d+ bytes.*copy or export"):
        solution.read_raster(path)


def test_text_and_folders_are_refused(tmp_path):
    (tmp_path / "a.tif").write_text("<html>404 Not Found</html>")
    with pytest.raises(solution.TileError, match="a.tif: cannot be read as a TIFF.*26 bytes"):
        solution.read_raster(tmp_path / "a.tif")
    (tmp_path / "b.tif").mkdir()
    with pytest.raises(solution.TileError, match="b.tif: cannot be read"):
        solution.read_raster(tmp_path / "b.tif")
    (tmp_path / "c.tif").symlink_to(tmp_path / "absent")
    with pytest.raises(solution.TileError, match="c.tif: cannot be read"):
        solution.read_raster(tmp_path / "c.tif")


@pytest.mark.parametrize("values", [np.ones((8, 8, 3), np.uint8), np.ones((8, 8), np.complex64)])
def test_rasters_that_are_no_band_are_refused(tmp_path, values):
    tifffile.imwrite(tmp_path / "a.tif", values)
    with pytest.raises(solution.TileError, match="a.tif: found shape.*expected one band.*split"):
        solution.read_raster(tmp_path / "a.tif")


def test_a_band_of_another_size_is_refused(tmp_path):
    write_tile(tmp_path, "001", np.ones((6, 8, 5)))
    tifffile.imwrite(tmp_path / "Band4" / "img001.tif", np.ones((3, 4), np.float32))
    with pytest.raises(solution.TileError, match="Band4.*4 x 3 px, expected 8 x 6 px.*resample"):
        solution.read_tile(solution.find_tiles(tmp_path)[0])


@pytest.mark.parametrize("lost", [0, 2])
def test_a_broken_tile_has_the_size_of_a_band_that_can_be_read(tmp_path, lost):
    write_tile(tmp_path, "001", np.ones((6, 8, 5)))
    band = solution.BANDS[lost].folder
    (tmp_path / band / "img001.tif").unlink()
    assert solution.readable_shape(solution.find_tiles(tmp_path)[0]) == (6, 8)
    (tmp_path / band / "img001.tif").write_bytes(b"")
    assert solution.readable_shape(solution.find_tiles(tmp_path)[0]) == (6, 8)


def test_a_tile_without_a_readable_band_has_the_usual_size(tmp_path):
    write_tile(tmp_path, "001", np.ones((6, 8, 5)))
    for path in tmp_path.glob("Band*/*"):
        path.write_bytes(b"")
    assert solution.readable_shape(solution.find_tiles(tmp_path)[0]) == (512, 512)


# --- Units ----------------------------------------------------------------------------------------


def test_normalization_is_zero_where_nodata():
    image = np.random.default_rng(3).normal(1, 1, (4, 6, 5)).astype(np.float32)
    image[1, 2, 3] = np.nan
    network_input = solution.normalize(image, NORMALIZATION)
    assert network_input.shape == (5, 4, 6) and network_input.dtype == np.float32
    assert network_input.flags.c_contiguous
    assert network_input[3, 1, 2] == 0
    expected = (image[0, 0, 4].astype(np.float64) - 256) / 9
    assert network_input[4, 0, 0] == pytest.approx(expected, rel=1e-5)
