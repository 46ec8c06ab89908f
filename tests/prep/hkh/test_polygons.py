"""Polygons to label codes: areas, holes, zones, order, attribute values; against shapely and rasterio."""

import geopandas
import numpy as np
import pytest
import rasterio.features
import rasterio.warp
import shapely
from affine import Affine
from hkh_helpers import PROPERTY
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.windows import Window
from rasterio.windows import transform as window_transform

from prep.hkh.landsat7 import SceneError
from prep.hkh.polygons import DEFAULT_WORDS, burn, check_polygons, code_of, make_polygons, read_polygons
from prep.labels import GLACIER_OR_DEBRIS, OTHER_OR_LAKE

SIDE = 96
PIXEL = 30.0
CORNER = (500_000.0, 3_500_000.0)
TRANSFORM = Affine(PIXEL, 0, CORNER[0], 0, -PIXEL, CORNER[1])
BOUNDS = (CORNER[0], CORNER[1] - SIDE * PIXEL, CORNER[0] + SIDE * PIXEL, CORNER[1])
GLACIER, DEBRIS, LAKE = 1, 2, 3

pytestmark = [
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),  # rasterio 1.4 on affine 3
    pytest.mark.filterwarnings("ignore:'crs' was not provided"),
]


def star(seed: int, corners: int, hole: bool) -> shapely.Polygon:
    """Return a star-shaped polygon of random outline inside the grid, in metres, perhaps with a hole."""
    random = np.random.default_rng(seed)
    middle = np.array([BOUNDS[0] + BOUNDS[2], BOUNDS[1] + BOUNDS[3]]) / 2
    angles = np.sort(random.uniform(0, 2 * np.pi, corners))
    radii = random.uniform(300, 1300, corners)
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline = shapely.Polygon(middle + radii[:, None] * around)
    outline = outline if outline.is_valid else outline.buffer(0)
    return outline.difference(shapely.Point(middle).buffer(250)) if hole else outline


def burn_all(*coded: tuple[shapely.Geometry, int]) -> np.ndarray:
    return burn(make_polygons(coded), TRANSFORM, (SIDE, SIDE))


def write_shapefile(path, shapes, values, crs="EPSG:32643", column="Glaciers"):
    table = geopandas.GeoDataFrame({column: values}, geometry=list(shapes), crs="EPSG:32643")
    table = table.to_crs(crs) if crs else table.set_crs(None, allow_override=True)
    table.to_file(path)
    return path


def read_back(path, crs=32643):
    return read_polygons(path, "Glaciers", DEFAULT_WORDS, CRS.from_epsg(crs), BOUNDS)


# --- areas ---


@given(st.integers(0, 10_000), st.integers(3, 40), st.booleans())
@PROPERTY
def test_a_rasterised_area_agrees_to_one_pixel_of_perimeter(seed, corners, hole):
    polygon = star(seed, corners, hole)
    pixels = np.count_nonzero(burn_all((polygon, GLACIER)) == GLACIER)
    assert abs(pixels * PIXEL**2 - polygon.area) <= polygon.length * PIXEL


@given(st.integers(0, 10_000), st.integers(3, 20), st.booleans())
@PROPERTY
def test_a_pixel_is_in_a_polygon_where_its_centre_is(seed, corners, hole):
    polygon = star(seed, corners, hole)
    rows, cols = np.mgrid[:SIDE, :SIDE]
    xs, ys = CORNER[0] + (cols + 0.5) * PIXEL, CORNER[1] - (rows + 0.5) * PIXEL
    near_edge = shapely.distance(polygon.boundary, shapely.points(xs, ys)) < 1e-6
    expected = shapely.contains_xy(polygon, xs, ys)
    found = burn_all((polygon, GLACIER)) == GLACIER
    assert np.array_equal(found[~near_edge], expected[~near_edge])


@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
@PROPERTY
def test_overlapping_polygons_are_burnt_as_rasterio_does(seed, count, hole):
    coded = [(star(seed + n, 5 + 3 * n, hole), (GLACIER, DEBRIS, LAKE)[(seed + n) % 3]) for n in range(count)]
    coded.append((shapely.union_all([star(seed + 7, 9, False), shapely.box(*BOUNDS).buffer(-1400)]), GLACIER))
    ordered = sorted(coded, key=lambda pair: pair[1])
    expected = rasterio.features.rasterize(ordered, (SIDE, SIDE), fill=OTHER_OR_LAKE, transform=TRANSFORM)
    assert np.array_equal(burn_all(*coded), expected)


@given(st.integers(0, 10_000), st.integers(1, 95), st.integers(1, 95))
@PROPERTY
def test_windows_stitched_equal_the_scene(seed, row, col):
    polygons = make_polygons([(star(seed, 12, True), GLACIER), (star(seed + 1, 9, False), DEBRIS)])
    whole = burn(polygons, TRANSFORM, (SIDE, SIDE))
    stitched = np.zeros_like(whole)
    for top, bottom in ((0, row), (row, SIDE)):
        for left, right in ((0, col), (col, SIDE)):
            transform = window_transform(Window(left, top, right - left, bottom - top), TRANSFORM)
            stitched[top:bottom, left:right] = burn(polygons, transform, (bottom - top, right - left))
    assert np.array_equal(stitched, whole)


def test_a_hole_is_background():
    outer = shapely.box(CORNER[0] + 300, CORNER[1] - 1500, CORNER[0] + 1500, CORNER[1] - 300)
    ring = outer.difference(shapely.box(CORNER[0] + 600, CORNER[1] - 1200, CORNER[0] + 1200, CORNER[1] - 600))
    mask = burn_all((ring, GLACIER))
    assert np.count_nonzero(mask == GLACIER) == 40 * 40 - 20 * 20
    assert (mask[20:40, 20:40] == OTHER_OR_LAKE).all()


def test_no_polygon_gives_background():
    assert (burn_all() == OTHER_OR_LAKE).all()


def test_debris_lies_on_ice_and_a_lake_on_both_whatever_the_order_in_the_file():
    ice, stones, water = (
        shapely.box(CORNER[0], CORNER[1] - n, CORNER[0] + n, CORNER[1]) for n in (900, 600, 300)
    )
    mask = burn_all((water, LAKE), (stones, DEBRIS), (ice, GLACIER))
    assert (mask[:10, :10] == LAKE).all()
    assert (mask[10:20, :20] == DEBRIS).all()
    assert (mask[20:30, :30] == GLACIER).all()


# --- files ---


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32644", "EPSG:3857", "EPSG:32643"])
def test_polygons_in_another_system_give_the_same_pixels(tmp_path, crs):
    shapes = [star(5, 30, True), star(6, 12, False)]
    path = write_shapefile(tmp_path / "a.shp", shapes, ["Clean ice", "Debris covered"], crs)
    direct = burn_all((shapes[0], GLACIER), (shapes[1], DEBRIS))
    read = burn(read_back(path), TRANSFORM, (SIDE, SIDE))
    # edges are straight in the file's system, which is some centimetres off over a few hundred metres
    assert np.count_nonzero(read != direct) <= 2


def test_a_scene_in_another_zone_gets_its_polygons(tmp_path):
    path = write_shapefile(tmp_path / "a.shp", [star(5, 30, False)], ["clean"], "EPSG:4326")
    near = rasterio.warp.transform_bounds(CRS.from_epsg(32643), CRS.from_epsg(32644), *BOUNDS)
    found = read_polygons(path, "Glaciers", DEFAULT_WORDS, CRS.from_epsg(32644), near)
    assert found.codes == [GLACIER]
    assert found.shapes[0].area == pytest.approx(
        star(5, 30, False).area, rel=0.01
    )  # scale 1.005 outside the zone


def test_polygons_elsewhere_are_not_read(tmp_path):
    far = shapely.affinity.translate(star(5, 30, False), 50_000, 0)
    path = write_shapefile(tmp_path / "a.shp", [far, star(6, 12, False)], ["clean", "debris"])
    assert read_back(path).codes == [DEBRIS]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("Clean Ice", GLACIER),
        ("clean-type", GLACIER),
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


def test_values_of_no_class_are_left_out_with_a_warning(tmp_path, capsys):
    path = write_shapefile(tmp_path / "a.shp", [star(n, 9, False) for n in range(3)], ["clean", "rock", None])
    assert check_polygons(path, "Glaciers", DEFAULT_WORDS)["clean"] == 1
    assert "left out" in (error := capsys.readouterr().err)
    assert "'rock' (1)" in error
    assert read_back(path).codes == [GLACIER]


def test_a_missing_column_lists_the_columns(tmp_path):
    path = write_shapefile(tmp_path / "a.shp", [star(1, 9, False)], ["clean"], column="Type")
    with pytest.raises(SceneError, match="no column 'Glaciers', found Type; name .* with --column"):
        check_polygons(path, "Glaciers", DEFAULT_WORDS)


def test_no_polygon_of_any_class_lists_the_values(tmp_path):
    path = write_shapefile(tmp_path / "a.shp", [star(1, 9, False)], ["C"])
    with pytest.raises(
        SceneError, match=r"holds 'C' \(1\), expected values with 'clean' \(glacier\).*--words"
    ):
        check_polygons(path, "Glaciers", DEFAULT_WORDS)


def test_a_file_without_a_coordinate_system_is_refused(tmp_path):
    path = write_shapefile(tmp_path / "a.shp", [star(1, 9, False)], ["clean"], crs=None)
    with pytest.raises(SceneError, match="no coordinate system; add its .prj"):
        check_polygons(path, "Glaciers", DEFAULT_WORDS)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.shp").write_bytes(b"not a shapefile")
    with pytest.raises(SceneError, match="a.shp: cannot be read as polygons"):
        check_polygons(tmp_path / "a.shp", "Glaciers", DEFAULT_WORDS)


def test_shapes_that_are_no_polygons_are_left_out(tmp_path, capsys):
    table = geopandas.GeoDataFrame(
        {"Glaciers": ["clean", "clean"]},
        geometry=[star(1, 9, False), star(1, 9, False).boundary],
        crs="EPSG:32643",
    )
    table.to_file(tmp_path / "a.gpkg")
    assert read_back(tmp_path / "a.gpkg").codes == [GLACIER]
    assert "1 shapes near the scene are no polygons" in capsys.readouterr().err
