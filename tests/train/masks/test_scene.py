"""Scenes: what is taken, what is refused and with which advice, and values as solution.py reads them."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from masks_helpers import textured_numbers
from support import write_tile

import solution
from train.masks.scene import BAND_NAMES, check_units, find_scenes, open_scene, read_rows

UTM = Affine(30, 0, 500000, 0, -30, 3700000)


def write(path: Path, values: np.ndarray, transform: Affine = UTM, crs: str = "EPSG:32643", **more) -> str:
    """Write one band and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"height": values.shape[0], "width": values.shape[1], "count": 1, "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", transform=transform, crs=crs, **about, **more) as raster:
        raster.write(values, 1)
    return str(path)


@pytest.mark.parametrize(
    "name, advice",
    [
        ("LE07_L2SP_147037_20000914_20200919_02_T1_SR_B1.TIF", "looks like another sensor"),
        ("LC08_L1TP_147037_20200914_20200919_02_T1_B2.TIF", "looks like Level-1"),
        ("LC08_L1TP_147037_20200914_20200919_01_T1_B2.TIF", "looks like Collection 1"),
        ("LC09_L2SR_147037_20200914_20200919_02_T1_SR_B2.TIF", "a product without surface temperature"),
        ("LC09_L2SP_147037_20200914_20200919_02_T1_SR_B2.TIF", "has no SR_B3, SR_B4, SR_B6, ST_B10"),
        ("photo.jpg", "no scene in it, found photo.jpg"),
    ],
)
def test_what_is_no_scene_is_told_apart(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(solution.InputError, match=advice):
        find_scenes(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_values_are_those_of_solution(tmp_path, dtype):
    numbers = textured_numbers(40, 50)
    if dtype == np.int16:
        numbers = numbers.astype(np.uint16).view(dtype)
    if dtype == np.float32:
        numbers[6:9, :4] = np.array([-9999, -5, 2e6])[:, None, None]  # no Level-2 number
    write_tile(tmp_path, "001", numbers, dtype=dtype)
    (scene,) = find_scenes(tmp_path)
    np.testing.assert_array_equal(read_rows(scene, 5, 30), solution.read_tile(solution.find_tiles(tmp_path)[0])[5:30])


def test_bands_on_different_grids_are_refused(tmp_path):
    paths = [write(tmp_path / f"{n}.tif", np.full((20, 20), 9000, np.uint16)) for n in range(4)]
    moved = UTM @ Affine.translation(5, 0)
    shifted = write(tmp_path / "4.tif", np.full((20, 20), 9000, np.uint16), moved)
    with pytest.raises(solution.InputError, match="4.tif: 20 x 20 px of 30 m, EPSG:32643, corner 500,150"):
        open_scene("x", [*paths, shifted])
    smaller = write(tmp_path / "4.tif", np.full((20, 19), 9000, np.uint16))
    with pytest.raises(solution.InputError, match="19 x 20 px"):
        open_scene("x", [*paths, smaller])
    zone = write(tmp_path / "4.tif", np.full((20, 20), 9000, np.uint16), crs="EPSG:32644")
    with pytest.raises(solution.InputError, match="EPSG:32644"):
        open_scene("x", [*paths, zone])


def test_scenes_that_are_not_north_up_are_refused(tmp_path):
    south = Affine(30, 0, 500000, 0, 30, 3700000)
    paths = [write(tmp_path / f"{n}.tif", np.full((20, 20), 9000, np.uint16), south) for n in range(5)]
    with pytest.raises(solution.InputError, match="south up, expected north up"):
        open_scene("x", paths)


@pytest.mark.parametrize(
    "bands, thermal, looks",
    [(0.5, 30000, "reflectance"), (9000, 300, "Level-2"), (9000, -12, "degrees Celsius")],
)
def test_other_units_are_told(tmp_path, bands, thermal, looks):
    values = [*[bands] * 4, thermal]
    paths = [write(tmp_path / f"{n}.tif", np.full((9, 9), value, np.float32)) for n, value in enumerate(values)]
    with pytest.raises(solution.InputError, match=looks):
        check_units(open_scene("x", paths))


@pytest.mark.parametrize("packed", [False, True])
def test_metadata_of_a_product_are_read_from_folder_and_tar(tmp_path, packed):
    product = "LC08_L2SP_147037_20200914_20200919_02_T1"
    folder = tmp_path / product
    for name in (*BAND_NAMES, "QA_PIXEL"):
        write(folder / f"{product}_{name}.TIF", np.full((9, 9), 9000, np.uint16))
    text = f"""  LANDSAT_PRODUCT_ID = "{product}"\r\n  DATE_ACQUIRED = 2020-09-14\r\n  SUN_ELEVATION = 52.75
    LANDSAT_PRODUCT_ID = "LC08_L1TP_147037_20200914_20200919_02_T1"\nEND"""
    (folder / f"{product}_MTL.txt").write_text(text, newline="")
    source = folder
    if packed:
        source = tmp_path / f"{product}.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(folder, ".")
    (scene,) = find_scenes(source)
    assert scene.about == {
        "LANDSAT_PRODUCT_ID": product,
        "DATE_ACQUIRED": "2020-09-14",
        "SUN_ELEVATION": "52.75",
    }


def test_a_mask_beside_the_values_is_nodata(tmp_path):
    paths = [write(tmp_path / f"{n}.tif", np.full((9, 9), 9000, np.uint16)) for n in range(5)]
    with rasterio.open(paths[0], "r+") as raster:
        raster.write_mask(np.arange(81).reshape(9, 9) > 8)
    image = read_rows(open_scene("x", paths), 0, 9)
    assert np.isnan(image[0, :, 0]).all()
    assert not np.isnan(image[1:]).any()
