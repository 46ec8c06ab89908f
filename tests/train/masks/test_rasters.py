"""Rasters: cloud-optimised, with overviews that keep classes whole, and nothing left beside them."""

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS

from train.masks.georeference import Georeference
from train.masks.rasters import Layout, write_raster


def test_rows_become_a_raster_with_overviews(tmp_path):
    place = Georeference(CRS.from_epsg(32643), Affine(30, 0, 500000, 0, -30, 3700000))
    classes = np.random.default_rng(0).choice([0, 2], (1, 1100, 600)).astype(np.uint8)
    layout = Layout((1100, 600), ("class",), 255, values={0: (0, "other"), 2: (2, "a < b")}, tags={"DATE": "2020"})
    path = write_raster(tmp_path / "x.tif", place, layout, [(0, classes[:, :700]), (700, classes[:, 700:])])
    with rasterio.open(path) as raster:
        assert (raster.read() == classes).all()
        assert raster.overviews(1) == [2, 4]
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert raster.crs == place.crs
        assert (raster.tags()["DATE"], raster.tags()["classes"]) == ("2020", "0 other, 2 a < b")
    with rasterio.open(path, overview_level=0) as small:
        assert set(np.unique(small.read())) == {0, 2}
    assert 'label="a &lt; b"' in (tmp_path / "x.qml").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.qml", "x.tif"]
