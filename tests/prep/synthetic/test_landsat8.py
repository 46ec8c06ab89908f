"""Synthetic products: named and filled as USGS does, and the same for the same seed."""

import numpy as np
import pytest
import rasterio

from prep.synthetic.landsat8 import FILES, PRODUCT, write_product
from solution import BANDS, InputError, to_physical


def test_a_product_has_all_files_with_clouds_and_fill(tmp_path):
    folder = write_product(tmp_path, 300, 200, pattern=96)
    assert {path.name.removeprefix(f"{PRODUCT}_") for path in folder.iterdir()} == {
        *(f"{name}.TIF" for name in FILES),
        "QA_PIXEL.TIF",
        "QA_RADSAT.TIF",
        "MTL.txt",
    }
    with rasterio.open(folder / f"{PRODUCT}_QA_PIXEL.TIF") as raster:
        quality, place = raster.read(1), (raster.crs, raster.transform)
    with rasterio.open(folder / f"{PRODUCT}_ST_B10.TIF") as raster:
        assert (raster.crs, raster.transform) == place
        kelvin = to_physical(raster.read(1).astype(np.float32), BANDS[4])[quality != 1]
    assert quality.shape == (300, 200)
    assert set(np.unique(quality)) == {1, 21824, 22280, 23888}
    assert 230 < np.median(kelvin) < 290
    assert "L2SP" in (folder / f"{PRODUCT}_MTL.txt").read_text()


def test_the_same_seed_gives_the_same_pixels(tmp_path):
    first, again = (write_product(tmp_path / name, 80, 80, seed=2, pattern=64) for name in ("a", "b"))
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_a_scene_without_a_pixel_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a pixel at least"):
        write_product(tmp_path, 0, 10)
