"""`prep hkh` on input that means harm; most of it once ended in a traceback, a hang or a crash."""

import os
import shutil

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from fuzz import hkh, runs
from hkh_helpers import contents, make_sample, rewrite, scene_paths, write_patches

from prep.__main__ import main as prep_main
from prep.store import TileStore
from prep.synthetic.hkh import LABELS_FILE, SCENES_FOLDER

BAD_HEADER = b"\x93NUMPY\x01\x00\x20\x00{'descr': '<f4', (\x00" + b"(" * 20  # NumPy's parser fails in many ways
ONE_PIECE = ("--size", "64", "--overlap", "0", "--jobs", "1")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Return three small scenes with their outlines."""
    return make_sample(tmp_path_factory.mktemp("hkh") / "sample")


@pytest.fixture
def data(sample, tmp_path):
    """Return a copy of the sample, to be spoilt."""
    return shutil.copytree(sample, tmp_path / "in")


def run(data, out, *more, labels=LABELS_FILE):
    """Run the command on scenes under the limits of the search; return its exit status and what it said."""
    options = [*ONE_PIECE, "--max-background", "1", "--out", str(out), *more]
    source = ["--scenes", str(data / SCENES_FOLDER), "--labels", str(data / labels)]
    ending = runs.call("prep hkh", lambda: prep_main(["hkh", *source, *options]))
    assert not ending.raised, ending.raised
    assert "Traceback" not in ending.said, ending.said
    return ending.result, ending.said


def assert_refused(data, out, *words, **options):
    """Assert that no store was made, for a reason that holds these words."""
    status, said = run(data, out, **options)
    assert status == 2 and all(word in said for word in words), said
    assert not out.exists()


def test_a_search_finds_nothing(tmp_path):
    found = hkh.fuzz_hkh(7, 12, tmp_path)
    assert found.faults == []
    assert len(found.inputs) > 12 and found.masks and found.refused


@pytest.mark.parametrize("place", ["scene", "outlines", "attributes", "mask"])
def test_a_pipe_is_refused_and_not_waited_for(data, tmp_path, place):
    paths = {
        "scene": scene_paths(data)[0],
        "outlines": data / LABELS_FILE,
        "attributes": (data / LABELS_FILE).with_suffix(".dbf"),
        "mask": data / "masks" / f"{scene_paths(data)[0].stem}_clean.tif",
    }
    if place == "mask":
        (data / "masks").mkdir()
        shutil.copy(scene_paths(data)[0], data / "masks" / f"{scene_paths(data)[0].stem}_debris.tif")
    paths[place].unlink(missing_ok=True)
    os.mkfifo(paths[place])
    labels = "masks" if place == "mask" else LABELS_FILE
    assert_refused(data, tmp_path / "store", paths[place].name, "is no file that can be reached", labels=labels)


def test_a_loop_of_links_is_refused(data, tmp_path):
    first = scene_paths(data)[0]
    first.unlink()
    first.symlink_to(first.name)
    assert_refused(data, tmp_path / "store", first.name, "is no file that can be reached")


@pytest.mark.parametrize("x", [np.nan, np.inf, 1e300])
def test_outlines_that_lead_off_the_earth_are_left_out(data, tmp_path, x):
    """NumPy crashes where such an edge is followed through the rows that it crosses."""
    assert run(data, tmp_path / "whole")[0] == 0
    table = geopandas.read_file(data / LABELS_FILE)
    west, south, east, north = table.total_bounds
    strange = shapely.Polygon([(west, south), (x, south), (east, north), (east, south)])
    geometry = [strange, *table.geometry]
    values = ["Clean ice", *table["Glaciers"]]
    geopandas.GeoDataFrame({"Glaciers": values}, geometry=geometry, crs=table.crs).to_file(data / "odd.gpkg")
    status, said = run(data, tmp_path / "store", labels="odd.gpkg")
    assert status == 0, said
    expected, found = TileStore(tmp_path / "whole"), TileStore(tmp_path / "store")
    assert expected.tile_ids == found.tile_ids
    assert all((expected.mask(name) == found.mask(name)).all() for name in expected.tile_ids)


@pytest.mark.parametrize(
    "transform",
    [
        (0, 0, 5e5, 0, -30, 3e6),
        (30, 0, 1e30, 0, -30, 3e6),
        (30, 0, np.nan, 0, -30, 3e6),
        (30, 0, 2e9, 0, -30, 3e6),
    ],
)
def test_a_scene_that_is_nowhere_is_refused(data, tmp_path, transform):
    path = scene_paths(data)[0]
    rewrite(path, transform=rasterio.Affine(*transform))
    assert_refused(data, tmp_path / "store", path.name, "export it again")


def test_names_with_spaces_and_letters_of_any_script_come_back(data, tmp_path):
    first = scene_paths(data)[0]
    first.rename(first.with_name("a scene é 氷河.tif"))
    status, said = run(data, tmp_path / "store")
    assert status == 0, said
    store = TileStore(tmp_path / "store")
    side = store.fold_of("split")
    assert any(name.startswith("a scene é 氷河_") and name in side for name in store.tile_ids)


@pytest.mark.parametrize("name", [os.fsdecode(b"scene\xe9.tif"), "a\nb.tif", "a\u2028b.tif"])
def test_a_name_that_cannot_be_listed_is_refused(data, tmp_path, name):
    first = scene_paths(data)[0]
    first.rename(first.with_name(name))
    assert_refused(data, tmp_path / "store", "rename the file")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"scene,sun_elevation\nx\n", "sun's elevation"),
        (b"scene,sun_elevation\n\xe9t\xe9,abc\n", "sun's elevation"),
        (b"scene,sun_elevation\n" + b"x" * 200_000, "export the table again"),
        (b"\xff\xfes\0c\0", "add scene, sun_elevation"),
    ],
)
def test_a_damaged_table_of_the_sun_is_named(data, tmp_path, content, word):
    (data / "sun.csv").write_bytes(content)
    status, said = run(data, tmp_path / "store", "--sun", str(data / "sun.csv"))
    assert status == 2 and "sun.csv" in said and word in said, said


def write_masks(data, clean, debris, **profile):
    """Write a clean and a debris mask of each scene; a pair of values is for its upper and lower half."""
    (data / "masks").mkdir()
    for scene in scene_paths(data):
        with rasterio.open(scene) as file:
            kept = {**file.profile, "count": 1, "dtype": "float32", **profile}
            shape = file.shape
        for word, (upper, lower) in {"clean": clean, "debris": debris}.items():
            values = np.full(shape, lower, np.float32)
            values[: shape[0] // 2] = upper
            with rasterio.open(data / "masks" / f"{scene.stem}_{word}.tif", "w", **kept) as file:
                file.write(values, 1)


@pytest.mark.parametrize("nodata", [np.nan, -9999.0])
def test_nodata_of_a_mask_is_no_class(data, tmp_path, nodata):
    write_masks(data, (1, nodata), (nodata, 1), nodata=nodata)
    status, said = run(data, tmp_path / "found", labels="masks")
    assert status == 0, said
    shutil.rmtree(data / "masks")
    write_masks(data, (1, 0), (0, 1))
    run(data, tmp_path / "expected", labels="masks")
    expected = contents(tmp_path / "expected" / "masks")
    assert expected and expected == contents(tmp_path / "found" / "masks")


def test_a_damaged_mask_is_named_and_not_its_scene(data, tmp_path):
    write_masks(data, (1, 0), (0, 1))
    damaged = data / "masks" / f"{scene_paths(data)[1].stem}_debris.tif"
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert_refused(data, tmp_path / "store", f"{damaged}: cannot be read", labels="masks")


@pytest.mark.parametrize("values", [np.full((64, 64, 15), "a"), np.zeros((64, 64, 15), "M8[s]"), b"", BAD_HEADER])
def test_a_patch_of_no_numbers_is_named(tmp_path, values):
    patches = write_patches(tmp_path / "patches")
    path = patches / "slice_1_img_001.npy"
    path.write_bytes(values) if isinstance(values, bytes) else np.save(path, values)
    options = ["--mask-order", "any,clean,debris", "--out", str(tmp_path / "store"), *ONE_PIECE]
    ending = runs.call("prep hkh", lambda: prep_main(["hkh", "--patches", str(patches), *options]))
    assert not ending.raised and ending.result == 2, ending
    assert path.name in ending.said and "Traceback" not in ending.said
