"""Vector files to label codes: which file shows what, and which pixels lie in an outline."""

import geopandas
import numpy as np
import pytest
import rasterio
import rasterio.features
import shapely
from hkh_helpers import PROPERTY
from hypothesis import given
from hypothesis import strategies as st

from prep.hkh.landsat7 import SceneError
from prep.hkh.polygons import (
    DEFAULT_WORDS,
    Layer,
    burn,
    code_of,
    plan_border,
    plan_layers,
    rasterise,
    read_outlines,
)
from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE

SIDE, PIXEL = 96, 30.0
CORNER = (500_000.0, 3_500_000.0)
TRANSFORM = rasterio.Affine(PIXEL, 0, CORNER[0], 0, -PIXEL, CORNER[1])
BOUNDS = (CORNER[0], CORNER[1] - SIDE * PIXEL, CORNER[0] + SIDE * PIXEL, CORNER[1])
GLACIER, DEBRIS, LAKE = 1, 2, 3

pytestmark = [
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),  # rasterio 1.4 on affine 3
    pytest.mark.filterwarnings("ignore:'crs' was not provided"),
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Return an empty scene of 96 px in UTM zone 43."""
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "height": SIDE, "width": SIDE}
    with rasterio.open(path, "w", **profile, crs="EPSG:32643", transform=TRANSFORM) as file:
        file.write(np.zeros((1, SIDE, SIDE), np.uint8))
    with rasterio.open(path) as file:
        yield file


def square(col: float, row: float, side: float) -> shapely.Polygon:
    """Return a square, pixels from the upper left corner of the scene."""
    return shapely.box(*TRANSFORM * (col, row + side), *TRANSFORM * (col + side, row))


def star(seed: int, corners: int, hole: bool) -> shapely.Polygon:
    """Return a star-shaped polygon of random outline inside the scene, perhaps with a hole."""
    random = np.random.default_rng(seed)
    middle = np.array([BOUNDS[0] + BOUNDS[2], BOUNDS[1] + BOUNDS[3]]) / 2
    angles = np.sort(random.uniform(0, 2 * np.pi, corners))
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline = shapely.Polygon(middle + random.uniform(300, 1300, corners)[:, None] * around)
    outline = outline if outline.is_valid else outline.buffer(0)
    return outline.difference(shapely.Point(middle).buffer(250)) if hole else outline


def write(path, shapes, values=None, crs="EPSG:32643", column="Glaciers"):
    """Write outlines with a column of values."""
    values = ["x"] * len(shapes) if values is None else values
    table = geopandas.GeoDataFrame({column: values}, geometry=list(shapes), crs="EPSG:32643")
    (table.to_crs(crs) if crs else table.set_crs(None, allow_override=True)).to_file(path)
    return path


def plan(*paths, kinds=None, column="Glaciers"):
    return plan_layers(paths, kinds, column, DEFAULT_WORDS)


# --- pixels ---


@given(st.integers(0, 10_000), st.integers(3, 20), st.booleans())
@PROPERTY
def test_a_pixel_is_in_an_outline_where_its_centre_is(scene, seed, corners, hole):
    polygon = star(seed, corners, hole)
    rows, cols = np.mgrid[:SIDE, :SIDE]
    xs, ys = TRANSFORM * (cols + 0.5, rows + 0.5)
    near_edge = shapely.distance(polygon.boundary, shapely.points(xs, ys)) < 1e-6
    found = rasterise([(polygon, GLACIER)], 0, scene) == GLACIER
    assert np.array_equal(found[~near_edge], shapely.contains_xy(polygon, xs, ys)[~near_edge])


def test_outlines_that_cross_themselves_or_cover_a_hole_are_as_rasterio_burns_them(tmp_path, scene):
    """A bow-tie over a neighbour, and a ring whose hole lies on one: both stay glacier."""
    corners = [TRANSFORM * place for place in ((10, 10), (50, 50), (50, 10), (10, 50))]
    bow = shapely.Polygon(corners)
    ring = square(20, 60, 30).difference(square(25, 65, 20))
    shapes = [square(5, 5, 50), bow, square(22, 62, 26), ring]
    (layer,) = plan(write(tmp_path / "clean.gpkg", shapes))
    expected = rasterio.features.rasterize(
        [(shape, GLACIER) for shape in shapes], (SIDE, SIDE), OTHER_OR_LAKE, transform=TRANSFORM
    )
    found = burn([layer], None, scene)
    assert np.array_equal(found, expected)
    assert (found[5:55, 5:55] == GLACIER).all() and (found[60:90, 20:50] == GLACIER).all()


def test_debris_lies_on_ice_a_lake_on_both_and_extents_below_whatever_the_order(tmp_path, scene):
    kinds = {"lake": 10, "debris": 20, "clean": 30, "any": 40}
    paths = [write(tmp_path / f"{kind}.shp", [square(0, 0, side)]) for kind, side in kinds.items()]
    found = burn(plan(*paths, kinds=list(kinds)), None, scene)
    steps = [LAKE, DEBRIS, GLACIER, GLACIER_OR_DEBRIS, OTHER_OR_LAKE]
    assert [found[place, place] for place in (5, 15, 25, 35, 45)] == steps


def test_nothing_is_known_beyond_the_border(tmp_path, scene):
    layers = plan(write(tmp_path / "clean.shp", [square(0, 0, 20), square(50, 0, 20)]))
    border = plan_border(write(tmp_path / "hkh.shp", [square(0, 0, 60)], crs="EPSG:4326"), layers)
    found = burn(layers, border, scene)
    assert (found[:20, 50:60] == GLACIER).all() and (found[30:60, :60] == OTHER_OR_LAKE).all()
    assert (found[:, 60:] == IGNORE).all() and (found[60:] == IGNORE).all()


def test_a_border_around_glaciers_alone_is_refused(tmp_path):
    """The hkh.shp of some copies holds all glaciers; as a border it would leave hardly any background."""
    layers = plan(write(tmp_path / "clean.shp", [square(0, 0, 20)]))
    with pytest.raises(SceneError, match=r"encloses 0.5 km2, the outlines of --labels 0.4 km2.*any in --kinds"):
        plan_border(write(tmp_path / "hkh.shp", [square(0, 0, 23)]), layers)


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32644", "EPSG:3857"])
def test_outlines_in_another_system_give_the_same_pixels(tmp_path, scene, crs):
    shapes = [star(5, 30, True), star(6, 12, False)]
    paths = [write(tmp_path / f"{at}.shp", shapes, ["Clean ice", "Debris covered"], at) for at in (crs, "EPSG:32643")]
    moved, direct = [burn(plan(path), None, scene) for path in paths]
    # edges are straight in the file's system, which is some centimetres off over a few hundred metres
    assert np.count_nonzero(moved != direct) <= 2


def test_outlines_elsewhere_are_not_read(tmp_path, scene):
    far = shapely.affinity.translate(star(5, 30, False), 50_000, 0)
    (layer,) = plan(write(tmp_path / "a.shp", [far, star(6, 12, False)], ["clean", "debris"]))
    assert [code for _, code in read_outlines(layer, scene.crs, BOUNDS)] == [DEBRIS]


def test_shapes_that_are_no_polygons_are_left_out(tmp_path, capsys, scene):
    (layer,) = plan(write(tmp_path / "clean.gpkg", [star(1, 9, False), star(1, 9, False).boundary]))
    assert len(read_outlines(layer, scene.crs, BOUNDS)) == 1
    assert "1 shapes near the scene are no polygons" in capsys.readouterr().err


# --- what a file shows ---


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("Clean Ice", GLACIER),
        ("DEBRIS covered", DEBRIS),
        ("Glacial Lake", LAKE),
        ("clean and debris", GLACIER_OR_DEBRIS),
        ("rock", None),
        (None, None),
        (3, None),
    ],
)
def test_words_are_found_in_any_case(value, code):
    assert code_of(value, DEFAULT_WORDS) == code


@pytest.mark.parametrize("suffix", [".shp", ".gpkg", ".geojson", ".fgb"])
def test_names_tell_the_kind_in_every_format(tmp_path, suffix):
    names = ["Clean", "debris_2005", "Glacier_2005", "lakes"]
    paths = [write(tmp_path / f"{name}{suffix}", [square(0, 0, 9)], column="Name") for name in names]
    assert [layer.code for layer in plan(*paths)] == [GLACIER, DEBRIS, GLACIER_OR_DEBRIS, LAKE]
    assert [layer.code for layer in plan(*paths[:2], kinds=["debris", "any"])] == [DEBRIS, GLACIER_OR_DEBRIS]


def test_a_column_of_kinds_goes_before_a_name_that_tells_the_extent_alone(tmp_path):
    path = write(tmp_path / "glaciers.gpkg", [square(0, 0, 9)], ["Clean ice"])
    assert plan(path) == (Layer(path, None, "Glaciers", DEFAULT_WORDS),)


@pytest.mark.parametrize("kinds", [["clean"], ["clean", "ice"]])
def test_kinds_that_do_not_fit_are_refused(tmp_path, kinds):
    paths = [write(tmp_path / f"{name}.shp", [square(0, 0, 9)]) for name in "ab"]
    with pytest.raises(SceneError, match=r"--kinds: found clean.* for 2 file\(s\).*e.g. --kinds clean,debris"):
        plan(*paths, kinds=kinds)


def test_values_of_no_class_are_left_out_with_a_warning(tmp_path, capsys, scene):
    (layer,) = plan(write(tmp_path / "a.shp", [star(n, 9, False) for n in range(3)], ["clean", "rock", None]))
    assert "'rock' (1)" in (error := capsys.readouterr().err) and "left out" in error
    assert [code for _, code in read_outlines(layer, scene.crs, BOUNDS)] == [GLACIER]


@pytest.mark.parametrize(
    ("column", "value", "crs", "message"),
    [
        (
            "Type",
            "clean",
            "EPSG:4326",
            "no column 'Glaciers', found Type; name .* with --column.*--kinds.*--border",
        ),
        ("Glaciers", "C", "EPSG:4326", r"holds 'C' \(1\), expected values with 'clean' \(glacier\).*--words"),
        ("Glaciers", "clean", None, "no coordinate system; add its .prj"),
    ],
)
def test_a_file_that_does_not_say_what_or_where_is_refused(tmp_path, column, value, crs, message):
    path = write(tmp_path / "a.shp", [star(1, 9, False)], [value], crs, column)
    with pytest.raises(SceneError, match=message):
        plan(path)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "clean.shp").write_bytes(b"not a shapefile")
    with pytest.raises(SceneError, match=r"clean.shp: cannot be read \(15 bytes"):
        plan(tmp_path / "clean.shp")


@pytest.mark.parametrize("suffix", [".gpkg", ".gdb"])
def test_layers_of_a_file_are_chosen_by_name(tmp_path, scene, suffix):
    path = tmp_path / f"hkh{suffix}"
    for name, corner in {"clean": 0, "debris": 30, "roads": 60}.items():
        table = geopandas.GeoDataFrame(geometry=[square(corner, corner, 20)], crs="EPSG:32643")
        table.to_file(path, layer=name, driver="OpenFileGDB" if suffix == ".gdb" else "GPKG")
    with pytest.raises(SceneError, match="found the layers clean, debris, roads, expected one.*--layer clean"):
        plan(path)
    with pytest.raises(SceneError, match="no file of --labels has several layers, of which one is snow"):
        plan_layers([path], None, "Glaciers", DEFAULT_WORDS, ["clean", "snow"])
    layers = plan_layers([path], None, "Glaciers", DEFAULT_WORDS, ["debris", "clean"])
    assert [(layer.layer, layer.code) for layer in layers] == [("debris", DEBRIS), ("clean", GLACIER)]
    found = burn(layers, None, scene)
    assert [found[place, place] for place in (10, 40, 70)] == [GLACIER, DEBRIS, OTHER_OR_LAKE]
    with pytest.raises(SceneError, match="export that of --border as a file of its own"):
        plan_border(path, layers)
