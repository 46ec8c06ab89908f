"""The layouts as they are published: every pixel's code against the truth, places, orders of channels, ground."""

import itertools
import shlex
import shutil

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from hkh_helpers import ALL, contents, write_patches

from prep import ground
from prep.__main__ import main, parse_overlap
from prep.competition import PrepError
from prep.hkh import patches as hkh_patches
from prep.hkh import prepare as hkh
from prep.hkh.prepare import prepare
from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from prep.store import StoreError, TileStore
from prep.synthetic import hkh as synthetic
from prep.synthetic.scenes import make_scene
from solution import InputError

SCENES, SIDE, SEED = 2, 160, 1
WHOLE = ALL._replace(grid=hkh.Grid(SIDE, 0))
PATCH = ALL._replace(grid=hkh.Grid(64, 0))
FILES = ("clean", "debris", "Glacier_2005")
CORNERS = (0, 58)  # of the patches of a scene: 64 px, 6 of them shared

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # rasterio 1.4 on affine 3


@pytest.fixture(scope="module")
def lila(tmp_path_factory):
    """Return filled scenes with outlines by kind, extents and a border."""
    folder = tmp_path_factory.mktemp("lila") / "in"
    synthetic.write_hkh_sample(folder, SCENES, SIDE, SEED, "lila")
    return folder


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Return a folder of patches as published, with slices.geojson."""
    folder = tmp_path_factory.mktemp("arrays") / "in"
    synthetic.write_hkh_sample(folder, SCENES, SIDE, SEED, "patches", side=64)
    return folder / synthetic.PATCHES_FOLDER


@pytest.fixture(scope="module")
def stored(arrays, tmp_path_factory):
    """Return the store of the patches."""
    out = tmp_path_factory.mktemp("stored") / "hkh"
    prepare(hkh.Source(patches=arrays), out, PATCH)
    return TileStore(out)


def lila_source(lila, *names, **changes):
    labels = tuple(lila / "labels" / f"{name}.shp" for name in names)
    source = hkh.Source(scenes=lila / "scenes", labels=labels, border=lila / "labels" / "hkh.shp")
    return source._replace(**changes)


def classes_of(number):
    return make_scene(synthetic.SCENE_SEED + SEED, SIDE, number).classes


# --- outlines by kind, extents, border ---


def test_every_pixel_of_filled_scenes_has_its_code(lila, tmp_path):
    prepare(lila_source(lila, *FILES), tmp_path / "hkh", WHOLE)
    store, seen = TileStore(tmp_path / "hkh"), set()
    for number in range(SCENES):
        name = synthetic.scene_name(number)
        with rasterio.open(lila / "scenes" / f"{name}.tif") as file:
            nodata = np.isnan(file.read(1))
        expected = np.where(nodata, IGNORE, synthetic.published_codes(classes_of(number)))
        mask = store.mask(f"{name}_00_00")
        assert np.array_equal(mask, expected)
        assert np.array_equal(np.isnan(store.image(f"{name}_00_00")).all(axis=-1), nodata)
        seen |= set(np.unique(mask))
    assert seen == {1, 2, GLACIER_OR_DEBRIS, OTHER_OR_LAKE, IGNORE}


def test_the_sample_has_values_between_below_and_above_the_numbers(lila):
    with rasterio.open(lila / "scenes" / f"{synthetic.scene_name(0)}.tif") as file:
        values, tags = file.read([1, 2, 3, 5, 6]), file.tags()
    found = values[np.isfinite(values)]
    assert file.dtypes[0] == "float32" and "SUN_ELEVATION" not in tags
    assert found.min() < 0 and found.max() > 255 and (found != np.rint(found)).any()


def test_without_extents_and_border_the_rest_is_background(lila, tmp_path):
    prepare(lila_source(lila, *FILES[:2], border=None), tmp_path / "hkh", WHOLE)
    mask = TileStore(tmp_path / "hkh").mask(f"{synthetic.scene_name(0)}_00_00")
    truth = synthetic.published_codes(classes_of(0))
    known = mask != IGNORE
    assert np.array_equal(mask[known], np.where(np.isin(truth, (1, 2)), truth, OTHER_OR_LAKE)[known])


def test_the_name_of_a_scene_gives_its_sun(lila, tmp_path, capsys):
    prepare(lila_source(lila, *FILES), tmp_path / "hkh", WHOLE)
    assert "45 degrees assumed" not in capsys.readouterr().err


# --- patches ---


def test_every_pixel_of_the_patches_has_its_code(arrays, stored):
    """Masks of two channels know neither extents nor the region: what they do not mark is background."""
    for number in range(SCENES):
        truth = synthetic.published_codes(classes_of(number))
        truth = np.where(np.isin(truth, (1, 2)), truth, OTHER_OR_LAKE)
        for count, (row, col) in enumerate(itertools.product(CORNERS, CORNERS)):
            nodata = np.isnan(np.load(arrays / f"slice_{number}_img_{count:03d}.npy")[..., 0])
            expected = np.where(nodata, IGNORE, truth[row : row + 64, col : col + 64])
            assert np.array_equal(stored.mask(f"slice_{number}_{count:03d}"), expected)


def test_scenes_are_named_by_the_geojson(stored):
    assert {tile.source for tile in stored.tiles} == {synthetic.scene_name(number) for number in range(SCENES)}


def test_patches_lie_where_they_were_cut_and_not_where_the_geojson_says(stored):
    """The published outlines are upside down, and those of all scenes are said to be in one UTM zone."""
    outlines = ground.read_ground(stored.folder)
    for number in range(SCENES):
        crs, transform = synthetic.place(number, SIDE)
        for count, (row, col) in enumerate(itertools.product(CORNERS, CORNERS)):
            place = transform * rasterio.Affine.translation(col, row)
            true = ground.outline(crs, place, 58, 58)  # the published outlines are as wide as the step
            found = outlines[f"slice_{number}_{count:03d}"]
            assert true.intersection(found).area > 0.85 * true.area
            assert found.area < 2.2 * true.area  # reaches one patch farther up at most


def test_without_the_geojson_there_is_a_warning_and_a_store(arrays, tmp_path, capsys):
    folder = shutil.copytree(arrays, tmp_path / "in")
    (folder / "slices.geojson").unlink()
    prepare(hkh.Source(patches=folder), tmp_path / "hkh", PATCH)
    assert "where 8 of 8 patches lie is not known" in capsys.readouterr().err
    assert {tile.source for tile in TileStore(tmp_path / "hkh").tiles} == {"slice_0", "slice_1"}


def test_a_geojson_of_something_else_is_named(arrays, tmp_path):
    folder = shutil.copytree(arrays, tmp_path / "in")
    table = geopandas.read_file(folder / "slices.geojson").rename(columns={"img_slice": "image"})
    table.to_file(folder / "slices.geojson")
    with pytest.raises(PrepError, match="slices.geojson: found the columns .* expected img_slice and img_source"):
        prepare(hkh.Source(patches=folder), tmp_path / "hkh", PATCH)


@pytest.mark.parametrize("channels", [15, 8])
def test_patches_become_tiles(tmp_path, channels):
    patches = write_patches(tmp_path / "patches", channels=channels)
    prepare(hkh.Source(patches=patches, mask_order="any,clean,debris"), tmp_path / "hkh", PATCH)
    store = TileStore(tmp_path / "hkh")
    assert len(store.tile_ids) == 6
    mask = store.mask("slice_0_000")
    assert [mask[row, 0] for row in (0, 10, 25, 41, 47)] == [IGNORE, OTHER_OR_LAKE, 1, 2, GLACIER_OR_DEBRIS]
    numbers = np.load(patches / "slice_0_img_000.npy")
    red = np.pi * ((234.4 + 5) / 254 * (numbers[10:, :, 2] - 1) - 5) / (1533 * np.sin(np.radians(45)))
    np.testing.assert_allclose(store.image("slice_0_000")[10:, :, 2], red, rtol=1e-5)
    side = store.fold_of("split")
    assert len({tile.source for tile in store.tiles if side[tile.tile_id] == 0}) == 1


def test_damaged_patches_are_named(tmp_path):
    patches = write_patches(tmp_path / "patches")
    source = hkh.Source(patches=patches, mask_order="any,clean,debris")
    (patches / "slice_1_mask_001.npy").write_bytes(b"damaged")
    with pytest.raises(PrepError, match=r"slice_1_mask_001.npy: cannot be read \(7 bytes"):
        prepare(source, tmp_path / "hkh", PATCH)
    (patches / "slice_1_mask_001.npy").unlink()
    with pytest.raises(PrepError, match=r"1 patches have no mask \(slice_1_img_001.npy"):
        prepare(source, tmp_path / "hkh", PATCH)


def test_two_patches_of_one_name_are_refused(arrays, tmp_path):
    shutil.copytree(arrays, tmp_path / "in" / "patches")
    shutil.copytree(arrays, tmp_path / "in" / "splits" / "train")
    with pytest.raises(PrepError, match="slice_0_img_000.npy: two files of one name"):
        prepare(hkh.Source(patches=tmp_path / "in"), tmp_path / "hkh", PATCH)


# --- orders of a mask's channels ---

TRUE_ORDERS = [
    *itertools.permutations(("clean", "debris")),
    *itertools.permutations(("any", "clean", "debris")),
    *itertools.permutations(("clean", "debris", "region")),
]


def counts_of(order):
    masks = [synthetic.mask_channels(synthetic.published_codes(classes_of(number)), order) for number in range(2)]
    bits = np.concatenate([(mask @ (1 << np.arange(len(order)))).ravel() for mask in masks])
    return np.bincount(bits, minlength=1 << len(order))


@pytest.mark.parametrize("order", TRUE_ORDERS, ids=",".join)
def test_masks_agree_with_their_own_order_alone(order):
    counts = counts_of(order)
    agreeing = [other for other in hkh_patches.ORDERS if len(other) == len(order)]
    assert [other for other in agreeing if not hkh_patches.contradiction(other, counts)] == [order]


def test_an_order_that_the_masks_contradict_is_refused_with_what_was_found():
    counts = counts_of(("clean", "debris", "region"))
    message = r"--mask-order clean,debris,any: 'any' has [\d,]+ px, expected about .*--mask-order clean,debris,region"
    with pytest.raises(hkh_patches.SceneError, match=message):
        hkh_patches.choose_order("clean,debris,any", counts)
    with pytest.raises(hkh_patches.SceneError, match="have 3 channels.*--mask-order clean,debris,region"):
        hkh_patches.choose_order(None, counts)
    with pytest.raises(hkh_patches.SceneError, match=r"debris has [\d,]+ px and clean ice [\d,]+"):
        hkh_patches.choose_order("debris,clean", counts_of(("clean", "debris")))


@pytest.mark.parametrize("text", ["clean", "any,clean,clean", "a,b,c", "clean,debris"])
def test_an_order_of_other_channels_is_refused(text):
    with pytest.raises(hkh_patches.SceneError, match="for masks of 3 channels, expected clean,debris"):
        hkh_patches.choose_order(text, counts_of(("any", "clean", "debris")))


def test_outside_the_region_nothing_is_known():
    mask = np.zeros((2, 3, 3), np.uint8)
    mask[:, :2, 2] = mask[0, 0, 0] = mask[1, 0, 1] = 1
    codes = hkh_patches.patch_codes(mask, ("clean", "debris", "region"))
    assert codes.tolist() == [[1, OTHER_OR_LAKE, IGNORE], [2, OTHER_OR_LAKE, IGNORE]]


# --- ground ---


def test_a_store_knows_its_ground(lila, tmp_path):
    prepare(lila_source(lila, *FILES), tmp_path / "hkh", WHOLE)
    outlines = ground.read_ground(tmp_path / "hkh")
    assert list(outlines) == TileStore(tmp_path / "hkh").tile_ids
    crs, transform = synthetic.place(0, SIDE)
    true = ground.outline(crs, transform, SIDE, SIDE)
    assert outlines[f"{synthetic.scene_name(0)}_00_00"].symmetric_difference(true).area < 1e-9


def test_tiles_on_the_ground_of_another_store_are_left_out(lila, tmp_path, capsys):
    crs, transform = synthetic.place(0, SIDE)
    (tmp_path / "other").mkdir()
    corner = ground.outline(crs, transform, 40, 40)
    ground.write_ground(tmp_path / "other", {"a": corner})
    options = shlex.split("--tile-size 64 --overlap 0 --min-glacier 0 --max-background 1 --jobs 1")
    labels = [str(path) for path in lila_source(lila, *FILES).labels]
    arguments = ["--scenes", str(lila / "scenes"), "--labels", *labels]
    more = ["--exclude-ground", str(tmp_path / "other"), "--val-share", "0.4", "--out", str(tmp_path / "hkh")]
    assert main(["hkh", *arguments, *options, *more]) == 0
    assert "dropped:      1  on the ground of other" in capsys.readouterr().out
    assert not ground.on_ground(ground.read_ground(tmp_path / "hkh"), [corner])


def test_a_store_without_ground_and_patches_without_place_are_refused(arrays, tmp_path):
    (tmp_path / "other").mkdir()
    source = hkh.Source(patches=shutil.copytree(arrays, tmp_path / "in"), exclude_ground=tmp_path / "other")
    with pytest.raises(StoreError, match=r"other/ground.geojson: cannot be read .*Make the store again"):
        prepare(source, tmp_path / "hkh", PATCH)
    ground.write_ground(tmp_path / "other", {"a": shapely.box(0, 0, 1, 1)})
    (tmp_path / "in" / "slices.geojson").unlink()
    with pytest.raises(PrepError, match="--exclude-ground: where 8 tiles lie is not known"):
        prepare(source, tmp_path / "hkh", PATCH)


# --- the rest ---


@pytest.mark.parametrize(("text", "pixels"), [("64", 64), ("0", 0), ("0.1", 51), ("0.5", 256)])
def test_an_overlap_is_pixels_or_a_share(text, pixels):
    assert parse_overlap(text, 512) == pixels


@pytest.mark.parametrize("text", ["1.5", "ten", "-0.1"])
def test_another_overlap_is_refused(text):
    with pytest.raises(InputError, match="expected pixels such as 64 or a share such as 0.1"):
        parse_overlap(text, 512)


@pytest.mark.parametrize("layout", ["lila", "patches"])
def test_the_same_seed_gives_the_same_sample(layout, tmp_path):
    for name in ("one", "two"):
        synthetic.write_hkh_sample(tmp_path / name, 1, 64, SEED, layout, side=48)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
