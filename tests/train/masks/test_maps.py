"""Maps of scenes: the classes of solution.py, resumed where killed, in files that other programs read."""

import argparse
import json
import re
import tarfile
from pathlib import Path

import geopandas
import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from affine import Affine
from masks_helpers import textured_numbers, tiny_model, write_tiny_model
from support import write_tile

import solution
from prep.hkh.prepare import Resources
from prep.synthetic.landsat8 import PRODUCT, write_product
from train.masks import command, maps, strips
from train.masks.scene import find_scenes, open_scene, read_rows

HEIGHT, WIDTH = 265, 140
# Windows of a quarter of the size: a scene of few pixels has three rows of two of them.
SMALL = {"WINDOW": 128, "OVERLAP": 32, "LARGEST_TILE": 128}


@pytest.fixture(scope="module", autouse=True)
def small_windows():
    """Make windows small, in solution.py as in the strips."""
    with pytest.MonkeyPatch.context() as patch:
        for name, pixels in SMALL.items():
            for module in (solution, strips):
                if hasattr(module, name):
                    patch.setattr(module, name, pixels)
        yield


@pytest.fixture(scope="module")
def product(tmp_path_factory) -> Path:
    """Return a synthetic Landsat product with three rows of two windows."""
    return write_product(tmp_path_factory.mktemp("usgs"), HEIGHT, WIDTH, pattern=96)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Return tiny weights."""
    return write_tiny_model(tmp_path_factory.mktemp("weights") / "model.pth")


@pytest.fixture(scope="module")
def mapped(product, weights, tmp_path_factory) -> Path:
    """Return the folder of the product's map, made by a run that was killed in its second strip and went on."""
    out, (scene,) = tmp_path_factory.mktemp("map"), find_scenes(product)
    read, seen = strips.read_rows, []

    def killed(scene, top, bottom, keep_clouds):
        seen.append(top)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return read(scene, top, bottom, keep_clouds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "read_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            maps.map_scene(scene, out, maps.Settings(weights))
    assert [path.name for path in (out / maps.PARTS).glob("*.npz")] == ["000.npz"]
    written = (out / maps.PARTS / "000.npz").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "read_rows", lambda *a: (seen.append(a[1]), read(*a))[1])
        maps.map_scene(scene, out, maps.Settings(weights))
    assert (seen, written > 0) == ([0, 96, 96, 137], True)  # the first strip was read once
    return out


def band(path: Path) -> np.ndarray:
    """Return the first band of a raster."""
    with rasterio.open(path) as raster:
        return raster.read(1)


def test_classes_are_those_of_solution_with_clouds_as_nodata(product, mapped):
    (scene,) = find_scenes(product)
    image = read_rows(scene, 0, HEIGHT, keep_clouds=False)
    expected = solution.predict_classes(tiny_model(), image)[0]
    found, valid = band(mapped / "classes.tif"), solution.valid_mask(image)
    assert (found[valid] == expected[valid]).all()
    assert (found[~valid] == 255).all()
    assert len(np.unique(found)) >= 3
    quality = band(product / f"{PRODUCT}_QA_PIXEL.TIF")
    assert (found[np.isin(quality, (1, 22280, 23888))] == 255).all()
    assert (band(mapped / "classes.tif")[quality == 21824] != 255).mean() > 0.95


def test_rasters_are_cloud_optimised_and_say_what_they_hold(product, mapped):
    with (
        rasterio.open(mapped / "probabilities.tif") as raster,
        rasterio.open(mapped / "classes.tif") as classes,
    ):
        probs, scale = raster.read(masked=True), raster.scales[0]
        assert raster.descriptions[1] == "probability of glacier"
        assert "alpha" not in [colour.name for colour in raster.colorinterp]
        for one in (raster, classes):
            assert one.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert one.nodata == 255
            assert one.tags()["DATE_ACQUIRED"] == "2020-09-14"
        assert classes.colormap(1)[2] == (140, 81, 10, 255)
        assert classes.crs.to_epsg() == 32643
        shown = classes.read(1)
    np.testing.assert_allclose((probs * scale).sum(axis=0).compressed(), 1, atol=0.009)
    confidence = band(mapped / "confidence.tif")
    rows, columns = np.nonzero(shown != 255)
    assert (confidence[rows, columns] == probs.data[shown[rows, columns], rows, columns]).all()
    assert "debris" in (mapped / "classes.qml").read_text()


@pytest.mark.parametrize("name", ["classes.tif", "probabilities.tif", "confidence.tif"])
def test_rio_cogeo_finds_the_rasters_valid(mapped, name):
    cog_validate = pytest.importorskip("rio_cogeo.cogeo").cog_validate  # pip install rio-cogeo
    assert cog_validate(mapped / name, strict=True) == (True, [], [])


def test_glaciers_are_whole_and_have_independent_areas(mapped):
    glaciers = geopandas.read_file(mapped / "glaciers.gpkg", layer="glaciers")
    assert glaciers.is_valid.all()
    assert glaciers["area_km2"].min() >= 0.01
    assert (glaciers["area_low_km2"] <= glaciers["area_km2"]).all()
    assert (glaciers["area_high_km2"] >= glaciers["area_km2"]).all()
    assert (glaciers["sum_low_km2"] >= glaciers["area_low_km2"]).all()
    assert (glaciers["sum_high_km2"] <= glaciers["area_high_km2"]).all()
    equal_area = pyproj.Transformer.from_crs(32643, 6933, always_xy=True).transform
    areas = [shapely.transform(one, equal_area, interleaved=False).area / 1e6 for one in glaciers.geometry]
    np.testing.assert_allclose(glaciers["area_km2"], areas, rtol=1e-3)
    classes = band(mapped / "classes.tif")
    extent = np.isin(classes, (1, 2))
    assert (glaciers.area.sum() / 900) == pytest.approx(extent.sum(), rel=0.2)  # less the small ones
    crossing = glaciers.bounds[["miny", "maxy"]].apply(lambda edge: (3790000 - edge) / 30)
    assert ((crossing["maxy"] < 96) & (crossing["miny"] > 96)).any()  # rows where windows meet


def test_the_page_holds_everything_and_asks_for_nothing(mapped, weights):
    page = (mapped / "map.html").read_text(encoding="utf-8")
    summary = json.loads((mapped / "map.json").read_text())
    assert summary["made_of"]["weights"] in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "held 90 of 100 labelled areas" in page
    assert "Date acquired 2020-09-14" in page
    assert sum(summary["pixels"].values()) + summary["nodata_pixels"] == HEIGHT * WIDTH
    assert not (mapped / maps.PARTS).exists()


def test_a_finished_map_is_left_and_other_settings_make_another(product, mapped, weights, tmp_path):
    (scene,) = find_scenes(product)
    before = (mapped / "map.html").stat().st_mtime_ns
    maps.map_scene(scene, mapped, maps.Settings(weights))
    assert (mapped / "map.html").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "system"), [("aoi.geojson", 4326), ("aoi.shp", 3857), ("aoi.gpkg", 32644), ("aoi.fgb", 3413)]
)
def test_an_area_of_interest_limits_the_work_and_changes_no_class(product, mapped, weights, tmp_path, name, system):
    left, top = 600000 + 30 * 40, 3790000 - 30 * 30
    square = geopandas.GeoSeries([shapely.box(left, top - 30 * 60, left + 30 * 50, top)], crs=32643)
    square.to_crs(system).to_file(tmp_path / name)
    (scene,) = find_scenes(product)
    maps.map_scene(scene, tmp_path / "out", maps.Settings(weights, aoi=tmp_path / name))
    found, whole = band(tmp_path / "out" / "classes.tif"), band(mapped / "classes.tif")
    inside = found != 255
    assert 0 < inside.sum() <= 61 * 51
    assert (found[inside] == whole[inside]).mean() > 0.99  # specks are judged within the area


def test_an_area_of_interest_that_is_not_there_is_one_line(product, weights, tmp_path):
    with pytest.raises(solution.InputError, match="aoi.shp: cannot be read as vector data"):
        maps.map_scene(*find_scenes(product), tmp_path, maps.Settings(weights, aoi=tmp_path / "aoi.shp"))


def test_tars_folders_and_five_rasters_are_the_same_scene(product, tmp_path):
    with tarfile.open(tmp_path / f"{PRODUCT}.tar", "w") as archive:
        for path in product.iterdir():
            archive.add(path, path.name)
    (scene,), (packed,), (parent,) = (find_scenes(p) for p in (product, tmp_path / f"{PRODUCT}.tar", product.parent))
    assert scene == parent
    np.testing.assert_array_equal(read_rows(scene, 0, 99, False), read_rows(packed, 0, 99, False))


def test_several_scenes_get_a_folder_each_and_one_that_fails_costs_no_other(weights, tmp_path, capsys):
    good = np.random.default_rng(0).uniform(9000, 40000, (64, 64, 5))
    write_tile(tmp_path / "data", "001", good)
    write_tile(tmp_path / "data", "002", good / 1000)
    parser = argparse.ArgumentParser()
    command.add_map_arguments(parser)
    arguments = [tmp_path / "data", "--out", tmp_path / "out", "--weights", weights]
    assert command.run_map(parser.parse_args([str(argument) for argument in arguments])) == 1
    said = capsys.readouterr()
    assert "002: " in said.err
    assert "1 map: " in said.out
    assert (tmp_path / "out" / "001" / "map.html").is_file()
    tile = solution.find_tiles(tmp_path / "data")[0]
    expected = solution.predict_classes(tiny_model(), solution.read_tile(tile))[0]
    assert (band(tmp_path / "out" / "001" / "classes.tif") == expected).all()


def test_scenes_of_one_name_are_refused(product, weights, tmp_path):
    with pytest.raises(solution.InputError, match="two scenes have this name"):
        maps.map_scenes(find_scenes(product) * 2, tmp_path, maps.Settings(weights), Resources())


def test_two_halves_that_overlap_give_the_glaciers_of_the_whole(weights, tmp_path):
    """Cut at a multiple of the step of the windows (96 px), so that the windows of all three coincide."""
    (product,) = find_scenes(write_product(tmp_path, 416, 128, pattern=96))
    numbers = np.stack([band(Path(path)) for path in product.bands], axis=-1)
    scenes = {"whole": slice(0, 416), "upper": slice(0, 320), "lower": slice(96, 416)}
    found = {}
    for name, rows in scenes.items():
        place = Affine(30, 0, 600000, 0, -30, 3790000 - 30 * rows.start)
        paths = [str(tmp_path / f"{name}{number}.tif") for number in range(5)]
        for path, values in zip(paths, numbers[rows].transpose(2, 0, 1)):
            about = {"height": len(values), "width": 128, "count": 1, "dtype": "float32", "nodata": 0}
            with rasterio.open(path, "w", driver="GTiff", crs=32643, transform=place, **about) as raster:
                raster.write(values, 1)
        maps.map_scene(open_scene(name, paths), tmp_path / name, maps.Settings(weights, min_km2=0))
        found[name] = geopandas.read_file(tmp_path / name / "glaciers.gpkg", layer="glaciers")
    cut = 3790000 - 30 * 208  # in the middle of the overlap, beyond the last window that only one of them has
    outlines = {name: set(frame.normalize().to_wkt()) for name, frame in found.items()}
    top, bottom = found["whole"].bounds["maxy"], found["whole"].bounds["miny"]
    whole = found["whole"].normalize().to_wkt()
    above, below = set(whole[bottom >= cut]), set(whole[top <= cut])
    assert min(len(above), len(below)) > 10
    assert above <= outlines["upper"]
    assert below <= outlines["lower"]
    halves = [
        found["upper"].clip((0, cut, 1e7, 1e7)).union_all(),
        found["lower"].clip((0, 0, 1e7, cut)).union_all(),
    ]
    assert shapely.symmetric_difference(shapely.union_all(halves), found["whole"].union_all()).area < 1e-3


@pytest.fixture(scope="module")
def two_scenes(tmp_path_factory) -> Path:
    """Return the competition's folders with two tiles of 64 px."""
    folder = tmp_path_factory.mktemp("two") / "data"
    for seed, tile in enumerate(("001", "002")):
        write_tile(folder, tile, textured_numbers(64, 64, seed))
    return folder


@pytest.fixture(scope="module")
def serial(two_scenes, weights) -> Path:
    """Return the folder of their maps, made one after the other."""
    assert maps.map_scenes(find_scenes(two_scenes), two_scenes / "one", maps.Settings(weights), Resources()) == []
    return two_scenes / "one"


def rasters_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all rasters below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.tif")}


def test_scenes_side_by_side_give_the_same_bytes(two_scenes, serial, weights, tmp_path):
    maps.map_scenes(find_scenes(two_scenes), tmp_path, maps.Settings(weights), Resources(jobs=2))
    assert rasters_of(tmp_path) == rasters_of(serial)
    assert len(rasters_of(serial)) == 6


def test_a_dask_cluster_gives_the_same_bytes(two_scenes, serial, weights, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        resources = Resources(1, cluster.scheduler_address)
        maps.map_scenes(find_scenes(two_scenes), tmp_path, maps.Settings(weights), resources)
    assert rasters_of(tmp_path) == rasters_of(serial)
