"""Masks for GIS: georeferenced rasters in colour, and polygons whose areas are those of the pixels."""

import argparse
from pathlib import Path

import cv2
import geopandas
import numpy as np
import pyogrio
import pyproj
import pytest
import rasterio
import shapely
from affine import Affine
from rasterio.crs import CRS

from prep.synthetic.scenes import write_sample
from solution import BANDS, InputError
from train.masks import command, export, outlines
from train.masks.georeference import Georeference, class_km2
from train.masks.score import score_masks

UTM43 = Georeference(CRS.from_epsg(32643), Affine(30, 0, 500000, 0, -30, 3700000))
UTM44 = UTM43._replace(crs=CRS.from_epsg(32644))


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[Path, Path]:
    """Return (data, masks) of two synthetic tiles; their labels, as PNG, are the masks."""
    data = tmp_path_factory.mktemp("export") / "data"
    write_sample(data, tiles=2, size=64, seed=1, naming="training", labels="phase2")
    masks = data.parent / "masks"
    masks.mkdir()
    for path in sorted((data / "label").iterdir()):
        cv2.imwrite(str(masks / f"{path.stem}.png"), rasterio.open(path).read(1).astype(np.uint8))
    return data, masks


def test_rasters_lie_where_their_tiles_do_and_score_as_the_masks_did(sample, tmp_path):
    data, masks = sample
    exported = export.export_masks(masks, data, tmp_path / "out")
    assert [path.name for path in exported.rasters] == ["01_01.tif", "01_02.tif"]
    for path, band in zip(exported.rasters, sorted((data / "Band1").iterdir())):
        with rasterio.open(path) as written, rasterio.open(band) as source:
            assert (written.crs, written.transform) == (source.crs, source.transform)
            assert written.colormap(1)[85] == (107, 174, 214, 255)
            assert written.nodata is None
            assert written.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert 'label="debris"' in path.with_suffix(".qml").read_text()
    again = score_masks(tmp_path / "out", data / "label")["all_pixels"]
    assert again["four_class"]["mcc"] == 1.0


def test_polygons_cover_the_area_of_their_class(sample, tmp_path):
    data, masks = sample
    exported = export.export_masks(masks, data, tmp_path)
    polygons = geopandas.read_file(exported.polygon_file)
    assert list(polygons.columns) == ["tile", "class", "value", "area_km2", "geometry"]
    assert polygons.crs.to_epsg() == 32643
    assert polygons.is_valid.all()
    for path in exported.rasters:
        counts = np.bincount(rasterio.open(path).read(1).ravel(), minlength=256)
        rows = polygons[polygons["tile"] == path.stem]
        for value in (85, 170, 255):
            expected = counts[value] * 0.0009
            assert rows.loc[rows["value"] == value, "area_km2"].sum() == pytest.approx(expected, rel=2e-3)
            assert rows[rows["value"] == value].area.sum() / 1e6 == pytest.approx(expected)


def test_patches_that_touch_at_a_corner_are_two_polygons_with_their_holes():
    classes = np.zeros((6, 6), np.uint8)
    classes[:3, :3], classes[3:, 3:], classes[1, 1] = 1, 2, 0
    frame = outlines.to_polygons("t", classes, UTM43)
    assert list(frame["class"]) == ["glacier", "debris"]
    assert list(frame["area_km2"]) == pytest.approx([8 * 0.0009, 9 * 0.0009], rel=2e-3)


def test_each_coordinate_system_gets_a_layer(tmp_path):
    classes = np.ones((4, 4), np.uint8)
    frames = [outlines.to_polygons(name, classes, place) for name, place in (("a", UTM43), ("b", UTM44))]
    layers = export.as_layers([*frames, outlines.to_polygons("c", 0 * classes, UTM43)])
    path = outlines.write_geopackage(layers, tmp_path / "x.gpkg")
    assert sorted(pyogrio.list_layers(path)[:, 0]) == ["classes_32643", "classes_32644"]


def test_systems_without_a_code_keep_all_their_polygons(tmp_path):
    classes = np.ones((4, 4), np.uint8)
    frames = []
    for meridian in (76, 77, 78):
        crs = CRS.from_proj4(f"+proj=tmerc +lon_0={meridian} +ellps=GRS80 +units=m")
        frames.append(outlines.to_polygons(f"m{meridian}", classes, UTM43._replace(crs=crs)))
    path = outlines.write_geopackage(export.as_layers(frames), tmp_path / "x.gpkg")
    layers = pyogrio.list_layers(path)[:, 0]
    assert sorted(layers) == ["classes_custom", "classes_custom_2", "classes_custom_3"]
    tiles = {tile for layer in layers for tile in geopandas.read_file(path, layer=layer)["tile"]}
    assert tiles == {"m76", "m77", "m78"}


@pytest.mark.parametrize("code", [3857, 3413, 32643, 4326, 6933, 54034])
def test_areas_do_not_depend_on_the_projection(code):
    """A cell of 0.01 degrees at 33 N, traced as 40 x 40 px of any system, has its area on the ellipsoid."""
    crs = CRS.from_string(f"ESRI:{code}" if code == 54034 else f"EPSG:{code}")
    to_system = pyproj.Transformer.from_crs(4326, pyproj.CRS.from_wkt(crs.to_wkt()), always_xy=True).transform
    x, y = to_system(77, 33)
    side = np.hypot(*(np.subtract(to_system(77.01, 33), (x, y)))) / 40
    place = Georeference(crs, Affine(side, 0, x, 0, -side, y))
    frame = outlines.to_polygons("t", np.ones((40, 40), np.uint8), place)
    corners = [place.transform @ corner for corner in ((0, 0), (40, 0), (40, 40), (0, 40))]
    back = pyproj.Transformer.from_crs(pyproj.CRS.from_wkt(crs.to_wkt()), 4326, always_xy=True).transform
    equal_area = pyproj.Transformer.from_crs(4326, 6933, always_xy=True).transform  # independent of Geod
    expected = shapely.Polygon([equal_area(*back(*corner)) for corner in corners]).area / 1e6
    assert frame["area_km2"].sum() == pytest.approx(expected, rel=1e-3)
    assert class_km2(np.ones((40, 40), np.uint8), place)[1] == pytest.approx(expected, rel=1e-3)


def test_a_system_without_a_place_on_earth_gives_no_area():
    local = CRS.from_wkt('LOCAL_CS["mine",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]')
    frame = outlines.to_polygons("t", np.ones((3, 3), np.uint8), UTM43._replace(crs=local))
    assert frame["area_km2"].isna().all()
    assert class_km2(np.ones((3, 3), np.uint8), UTM43._replace(crs=local)) is None


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_tiles_without_a_place_get_plain_rasters_and_a_warning(tmp_path, capsys):
    for band in BANDS:
        (tmp_path / "data" / band.folder).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "data" / band.folder / "img001.tif"), np.full((8, 8), 9000, np.uint16))
    (tmp_path / "masks").mkdir()
    cv2.imwrite(str(tmp_path / "masks" / "img001.png"), np.full((8, 8), 85, np.uint8))
    exported = export.export_masks(tmp_path / "masks", tmp_path / "data", tmp_path / "out")
    assert exported.without_place == ["001"]
    assert exported.polygon_file is None
    assert "no georeference in the bands of 001" in capsys.readouterr().err
    assert (rasterio.open(tmp_path / "out" / "001.tif").read(1) == 85).all()


def test_nothing_is_written_over_masks_nor_for_a_mask_of_the_wrong_size(sample, tmp_path):
    data, masks = sample
    with pytest.raises(InputError, match="holds the masks to export"):
        export.export_masks(masks, data, masks)
    with pytest.raises(InputError, match="is an input folder"):
        export.export_masks(masks, data, data / "Band1")
    for tile in ("01_01", "01_02"):
        cv2.imwrite(str(tmp_path / f"{tile}.png"), np.zeros((5, 6), np.uint8))
    with pytest.raises(InputError, match="01_01.png: 6 x 5 px, expected 64 x 64 px"):
        export.export_masks(tmp_path, data, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_command_prints_the_areas(sample, tmp_path, capsys):
    data, masks = sample
    parser = argparse.ArgumentParser()
    command.add_export_arguments(parser)
    arguments = ["--masks", str(masks), "--data", str(data), "--out", str(tmp_path / "gis")]
    assert command.run_export(parser.parse_args(arguments)) == 0
    printed = capsys.readouterr().out
    assert "2 GeoTIFFs" in printed
    assert "glacier " in printed
