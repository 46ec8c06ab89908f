"""`python -m prep hkh`: tiles, labels, filter, split, statistics, refusals, and what a broken run leaves."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from hkh_helpers import (
    ALL,
    PROPERTY,
    SCENES,
    SIDE,
    SMALL,
    contents,
    copy_sample,
    left_over,
    make_sample,
    rewrite,
    scene_paths,
    source_of,
)
from hypothesis import given
from hypothesis import strategies as st

from prep.__main__ import main
from prep.competition import PrepError
from prep.hkh import landsat7
from prep.hkh import prepare as hkh
from prep.hkh import sources as hkh_sources
from prep.hkh.prepare import Filter, Grid, Resources, prepare
from prep.labels import IGNORE, OTHER_OR_LAKE
from prep.store import StoreError, TileRow, TileStore, locked
from prep.synthetic.hkh import LABELS_FILE, SCENE_SEED
from prep.synthetic.scenes import make_scene
from solution import InputError

PROJECT = Path(__file__).resolve().parents[3]
KEPT_CHANNELS = [0, 1, 2, 4, 5]

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # rasterio 1.4 on affine 3


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    return make_sample(tmp_path_factory.mktemp("hkh") / "sample")


@pytest.fixture(scope="module")
def everything(sample, tmp_path_factory) -> TileStore:
    """Return a store of all tiles that hold any data, none filtered."""
    out = tmp_path_factory.mktemp("stores") / "all"
    prepare(source_of(sample), out, ALL)
    return TileStore(out)


def read_scene(path: Path) -> np.ndarray:
    """Return a scene's five channels in physical units, (H, W, 5), by formulas of this test alone."""
    with rasterio.open(path) as file:
        numbers = file.read([index + 1 for index in KEPT_CHANNELS]).astype(np.float64)
        sun = np.sin(np.radians(float(file.tags()["SUN_ELEVATION"])))
    image = np.empty((*numbers.shape[1:], 5))
    for band, (lmin, lmax, esun) in enumerate(
        [(-6.2, 293.7, 1997), (-6.4, 300.9, 1812), (-5, 234.4, 1533), (-1, 47.57, 230.8), (0, 17.04, None)]
    ):
        radiance = lmin + (lmax - lmin) / 254 * (numbers[band] - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            kelvin = 1282.71 / np.log(666.09 / radiance + 1)
        image[..., band] = kelvin if esun is None else np.pi * radiance / (esun * sun)
        image[..., band][numbers[band] == 0] = np.nan
    return image


def stitch(store: TileStore, scene: str, read, empty) -> np.ndarray:
    """Return a scene put together from its tiles, (160, 160, ...)."""
    first = read(store.tiles[0].tile_id)
    whole = np.full((SIDE, SIDE, *first.shape[2:]), empty, first.dtype)
    starts = [0, 48, 96]
    for tile in store.tiles:
        if tile.source == scene:
            place = np.s_[starts[tile.row] : starts[tile.row] + 64, starts[tile.col] : starts[tile.col] + 64]
            whole[place] = read(tile.tile_id)
    return whole


# --- what is written ---


@pytest.mark.parametrize("number", range(SCENES))
def test_stitched_tiles_equal_the_scene(sample, everything, number):
    path = scene_paths(sample)[number]
    image = stitch(everything, path.stem, everything.image, np.nan)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, read_scene(path), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("number", range(SCENES))
def test_stitched_masks_equal_the_classes_that_the_polygons_were_drawn_from(sample, everything, number):
    """The sample's outlines follow pixel edges, so not one pixel may differ, through EPSG:4326 and back."""
    path = scene_paths(sample)[number]
    classes = make_scene(SCENE_SEED + 1, SIDE, number).classes
    expected = np.where(np.isin(classes, (1, 2)), classes, OTHER_OR_LAKE)
    expected[np.isnan(read_scene(path)).all(axis=-1)] = IGNORE
    assert np.array_equal(stitch(everything, path.stem, everything.mask, IGNORE), expected)


def test_stripes_and_borders_are_ignored_and_nan(everything):
    shares = []
    for tile in everything.tiles:
        image, mask = everything.image(tile.tile_id), everything.mask(tile.tile_id)
        assert np.array_equal(np.isnan(image).all(axis=-1), mask == IGNORE)
        shares.append((mask == IGNORE).mean())
    assert 0.2 < np.mean(shares) < 0.6  # 22 % stripes, the border, and the scenes' clouds


def test_scenes_lie_in_different_utm_zones(sample):
    zones = {rasterio.open(path).crs.to_epsg() for path in scene_paths(sample)}
    assert zones == {32643, 32644, 32645}


def test_training_and_validation_share_no_scene_and_cover_the_store(everything):
    side = everything.fold_of("split")
    assert set(side) == set(everything.tile_ids)
    scenes = {fold: {tile.source for tile in everything.tiles if side[tile.tile_id] == fold} for fold in (-1, 0)}
    assert scenes[-1] and scenes[0] and not scenes[-1] & scenes[0]
    ids = (everything.folder / "val_ids.txt").read_text().split()
    assert ids == [tile for tile in everything.tile_ids if side[tile] == 0]


def test_statistics_equal_numpys_over_the_training_tiles(everything):
    side = everything.fold_of("split")
    images = [everything.image(tile) for tile in everything.tile_ids if side[tile] == -1]
    pixels = np.concatenate([image.reshape(-1, 5) for image in images]).astype(np.float64)
    assert np.allclose(everything.stats["mean"], np.nanmean(pixels, axis=0), rtol=1e-9)
    assert np.allclose(everything.stats["std"], np.nanstd(pixels, axis=0), rtol=1e-9)
    assert everything.stats["count"] == (~np.isnan(pixels)).sum(axis=0).tolist()


def test_no_machine_path_is_stored(sample, everything):
    about = (everything.folder / "store.json").read_text()
    assert str(sample) not in about
    assert json.loads(about)["source"] == "scenes"


# --- windows ---


@given(st.integers(1, 400), st.integers(1, 400), st.integers(32, 128), st.data())
@PROPERTY
def test_windows_cover_every_pixel_and_stay_inside(height, width, size, data):
    grid = Grid(size, data.draw(st.integers(0, size - 1)))
    if size - grid.overlap < 8:
        grid = Grid(size, size - 8)
    covered = np.zeros((max(height, size), max(width, size)), int)
    for _, _, window in hkh_sources.grid_windows(height, width, grid):
        assert (window.height, window.width) == (size, size)
        assert window.row_off + size <= max(height, size)
        covered[window.row_off : window.row_off + size, window.col_off : window.col_off + size] += 1
    assert covered.min() >= 1


def test_a_scene_smaller_than_a_tile_is_padded_with_nodata(sample, tmp_path):
    prepare(source_of(sample), tmp_path / "hkh", ALL._replace(grid=Grid(192, 0)))
    store = TileStore(tmp_path / "hkh")
    assert len(store.tile_ids) == SCENES
    for path, tile_id in zip(scene_paths(sample), store.tile_ids):
        image = store.image(tile_id)
        np.testing.assert_allclose(image[:SIDE, :SIDE], read_scene(path), rtol=1e-6, atol=1e-7)
        assert np.isnan(image[SIDE:]).all() and np.isnan(image[:, SIDE:]).all()
        assert (store.mask(tile_id)[SIDE:] == IGNORE).all()


# --- the filter ---

NAMES = ("other", "glacier", "debris", "lake", "glacier_or_debris", "other_or_lake", "ignore")


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ((0, 100, 0, 0, 0, 400, 0), None),
        ((0, 99, 0, 0, 0, 300, 0), "too little glacier, debris and lake"),
        ((0, 60, 0, 0, 40, 400, 0), None),
        ((0, 0, 500, 0, 0, 2000, 0), None),
        ((0, 0, 499, 0, 0, 1000, 0), "too little glacier, debris and lake"),
        ((0, 0, 0, 50, 0, 200, 0), None),
        ((0, 100, 0, 0, 0, 401, 0), "too much background"),
        ((0, 100, 0, 0, 0, 401, 9000), "too much background"),
        ((0, 0, 0, 0, 0, 0, 9000), "no data"),
    ],
)
def test_the_filter_keeps_what_the_issue_says(counts, reason):
    assert Filter().reason_to_drop(dict(zip(NAMES, counts))) == reason


def test_every_tile_is_kept_or_listed_with_its_reason(sample, tmp_path):
    summary = prepare(source_of(sample), tmp_path / "hkh", SMALL)
    with open(tmp_path / "hkh" / "dropped.csv", newline="") as stream:
        dropped = list(csv.DictReader(stream))
    assert len(summary.tiles) + len(dropped) == SCENES * 9
    assert dropped and {row["reason"] for row in dropped} <= {
        "no data",
        "too little glacier, debris and lake",
        "too much background",
    }
    for tile in summary.tiles:
        assert SMALL.keep.reason_to_drop(tile.counts) is None


# --- the split ---


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 3), min_size=2, max_size=12), st.integers(0, 5))
@PROPERTY
def test_validation_is_some_scenes_but_not_all_and_depends_on_the_seed_alone(areas, seed):
    named = {f"s{number:02d}": values for number, values in enumerate(areas)}
    chosen = hkh.choose_validation(named, 0.2, seed)
    assert 0 < len(chosen) < len(named)
    assert chosen == hkh.choose_validation(dict(reversed(named.items())), 0.2, seed)


def test_validation_has_its_share_of_each_column():
    random = np.random.default_rng(0)
    areas = {f"s{number:02d}": random.uniform(50, 500, 4) for number in range(35)}
    chosen = hkh.choose_validation(areas, 0.2, 0)
    share = sum(areas[name] for name in chosen) / sum(areas.values())
    assert np.abs(share - 0.2).max() < 0.03


def test_training_tiles_on_the_ground_of_validation_are_dropped(sample, tmp_path):
    """A scene again under another name, shifted by half: its tiles may not end up on the other side."""
    folder = copy_sample(sample, tmp_path / "sample")
    first = scene_paths(folder)[0]
    twin = first.with_name("TWIN.tif")
    twin.write_bytes(first.read_bytes())
    with rasterio.open(first) as file:
        shift = file.transform * rasterio.Affine.translation(SIDE // 2, 0)
    rewrite(twin, transform=shift)
    summary = prepare(source_of(folder), tmp_path / "hkh", ALL)
    sides = {name: scene["side"] for name, scene in summary.scenes.items()}
    shared = [row for row in summary.dropped if row["reason"] == "overlaps a validation tile"]
    assert sides[first.stem] == sides["TWIN"] or 0 < len(shared) < 9
    held_out = [tile for tile in summary.tiles if tile.tile_id in summary.split.val]
    assert {tile.source for tile in held_out} == {name for name, side in sides.items() if side == "validation"}


def test_straddling_finds_footprints_that_meet():
    def tile(name, scene, west):
        footprint = None if west is None else shapely.box(west, 0, west + 1, 1)
        return hkh.Kept(TileRow(name, scene, None, None, "hkh", 1.0, {}), {}, footprint)

    kept = [tile("v", "a", 0), tile("near", "b", 0.5), tile("far", "b", 5), tile("p", "c", None)]
    assert hkh.straddling(kept, {"a"}) == {"near"}


def test_one_scene_cannot_be_split(sample, tmp_path):
    folder = copy_sample(sample, tmp_path / "sample")
    for path in scene_paths(folder)[1:]:
        path.unlink()
    with pytest.raises(PrepError, match=r"come from 1 scene\(s\), at least 2 are needed"):
        prepare(source_of(folder), tmp_path / "hkh", ALL)
    assert not (tmp_path / "hkh").exists()


# --- scenes that are empty, damaged or different ---


def test_empty_scenes_are_reported_and_do_no_harm(sample, tmp_path, everything):
    folder = copy_sample(sample, tmp_path / "sample")
    empty = scene_paths(folder)[0].with_name("EMPTY.tif")
    empty.write_bytes(scene_paths(folder)[0].read_bytes())
    rewrite(empty, lambda values: values * 0)
    summary = prepare(source_of(folder), tmp_path / "hkh", ALL)
    assert summary.scenes["EMPTY"] == {"side": None, "kept": 0, "tiles": 9}
    assert len(summary.tiles) == len(everything.tiles)


def test_no_tile_at_all_is_an_error_and_leaves_no_store(sample, tmp_path):
    keep = Filter(10**6, 10**6, 10**6, 0.8)
    with pytest.raises(PrepError, match="no tile is worth keeping"):
        prepare(source_of(sample), tmp_path / "hkh", SMALL._replace(keep=keep))
    assert not (tmp_path / "hkh").exists()


def test_a_damaged_header_is_found_before_anything_is_read(sample, tmp_path):
    folder = copy_sample(sample, tmp_path / "sample")
    scene_paths(folder)[1].write_bytes(b"II*\x00damaged")
    with pytest.raises(PrepError, match=rf"{scene_paths(folder)[1].name}: cannot be read \(11 bytes"):
        prepare(source_of(folder), tmp_path / "hkh", SMALL)
    assert left_over(tmp_path) == ["sample"]


def test_a_scene_with_damaged_pixels_is_named_and_the_others_need_not_be_read_again(sample, tmp_path):
    folder = copy_sample(sample, tmp_path / "sample")
    broken = scene_paths(folder)[1]
    whole = broken.read_bytes()
    third = len(whole) // 3
    broken.write_bytes(whole[:third] + b"\xff" * third + whole[2 * third :])
    with pytest.raises(PrepError, match=rf"(?s){broken.name}: cannot be read .*the other scenes are kept") as error:
        prepare(source_of(folder), tmp_path / "hkh", SMALL)
    assert len(error.value.problems) == 2
    assert not (tmp_path / "hkh").exists()
    done = [path.name for path in (tmp_path / ".hkh-partial").iterdir()]
    assert sorted(done) == sorted(path.stem for path in scene_paths(folder) if path != broken)
    broken.write_bytes(whole)
    prepare(source_of(folder), tmp_path / "hkh", SMALL)
    prepare(source_of(folder), tmp_path / "again", SMALL)
    assert contents(tmp_path / "hkh") == contents(tmp_path / "again")


def test_reflectance_passed_off_as_numbers_is_refused(sample, tmp_path):
    folder = copy_sample(sample, tmp_path / "sample")
    rewrite(scene_paths(folder)[0], lambda values: (values / 255).astype(np.float32))
    with pytest.raises(PrepError, match=r"expected digital numbers 0 to 255 of LANDSAT/LE07/C01/T1_RT"):
        prepare(source_of(folder), tmp_path / "hkh", SMALL)


def test_missing_bands_are_listed(sample, tmp_path):
    folder = copy_sample(sample, tmp_path / "sample")
    rewrite(scene_paths(folder)[0], lambda values: values[:4], ["B1", "B2", "B3", "B4"])
    with pytest.raises(PrepError, match=r"lacks B5 \(SWIR-1\), B6_VCID_1 or B6_VCID_2 \(thermal\); found bands B1, B2"):
        prepare(source_of(folder), tmp_path / "hkh", SMALL)


@pytest.mark.parametrize("count", [15, 8])
def test_both_exports_without_descriptions_give_the_same_store(sample, tmp_path, everything, count):
    folder = copy_sample(sample, tmp_path / "sample")
    for path in scene_paths(folder):
        rewrite(path, lambda values: values[:count].astype(np.float32), None)
    prepare(source_of(folder), tmp_path / "hkh", ALL)
    for tile_id in everything.tile_ids:
        assert np.array_equal(TileStore(tmp_path / "hkh").image(tile_id), everything.image(tile_id), equal_nan=True)


def test_outlines_in_a_folder_of_a_geodatabase_give_the_same_store(sample, tmp_path, everything):
    geopandas.read_file(sample / LABELS_FILE).to_file(tmp_path / "hkh.gdb", driver="OpenFileGDB", layer="all")
    prepare(source_of(sample, labels=(tmp_path / "hkh.gdb",)), tmp_path / "hkh", ALL)
    store = TileStore(tmp_path / "hkh")
    assert all(np.array_equal(store.mask(name), everything.mask(name)) for name in everything.tile_ids)


def test_a_missing_column_is_named(sample, tmp_path):
    with pytest.raises(PrepError, match="no column 'Kind', found Glaciers"):
        prepare(source_of(sample, column="Kind"), tmp_path / "hkh", SMALL)


def test_mask_files_per_class_give_the_same_store(sample, tmp_path, everything):
    masks = tmp_path / "masks"
    masks.mkdir()
    for number, path in enumerate(scene_paths(sample)):
        classes = make_scene(SCENE_SEED + 1, SIDE, number).classes
        with rasterio.open(path) as file:
            profile = {**file.profile, "count": 1}
        for code, word in ((1, "Clean"), (2, "debris")):
            with rasterio.open(masks / f"{path.stem}_{word}.tif", "w", **profile) as file:
                file.write((classes == code).astype(np.uint8) * 255, 1)
    prepare(source_of(sample, labels=(masks,)), tmp_path / "hkh", ALL)
    store = TileStore(tmp_path / "hkh")
    assert store.tile_ids == everything.tile_ids
    for tile_id in store.tile_ids:
        assert np.array_equal(store.mask(tile_id), everything.mask(tile_id))
    next(masks.glob("*Clean.tif")).unlink()
    with pytest.raises(PrepError, match=r"found none as mask of glacier for .*expected one file such as .*_clean.tif"):
        prepare(source_of(sample, labels=(masks,)), tmp_path / "other", ALL)


def test_a_mask_on_another_grid_is_refused(sample, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in scene_paths(sample):
        for word in ("clean", "debris"):
            (masks / f"{path.stem}_{word}.tif").write_bytes(path.read_bytes())
    rewrite(next(masks.glob("*debris.tif")), lambda values: values[:, :100, :100], height=100, width=100)
    with pytest.raises(PrepError, match="100 x 100 px .*expected 160 x 160 px"):
        prepare(source_of(sample, labels=(masks,)), tmp_path / "hkh", ALL)


# --- parallel, resumed, killed ---


def test_processes_give_the_same_bytes(sample, tmp_path):
    prepare(source_of(sample), tmp_path / "one", SMALL)
    prepare(source_of(sample), tmp_path / "two", SMALL, Resources(jobs=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_gives_the_same_bytes(sample, tmp_path):
    from distributed import LocalCluster

    prepare(source_of(sample), tmp_path / "one", SMALL)
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        dashboard_address=None,
        protocol="tcp",
        host="127.0.0.1",
    ) as cluster:
        prepare(source_of(sample), tmp_path / "two", SMALL, Resources(dask=cluster.scheduler_address))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_no_cluster_at_the_address_is_named(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(hkh, "WAIT_FOR_CLUSTER", 1)
    with pytest.raises(InputError, match=r"--dask tcp://127.0.0.1:9: no Dask scheduler answers"):
        prepare(source_of(sample), tmp_path / "hkh", SMALL, Resources(dask="tcp://127.0.0.1:9"))


class Interrupted(Exception):
    """What a test raises to stop a run."""


def test_an_interrupted_run_continues_to_the_same_bytes(sample, tmp_path, monkeypatch):
    prepare(source_of(sample), tmp_path / "whole", SMALL)
    write, seen = hkh.write_tiles, []

    def stop_at_second(job, keep, writer):
        seen.append(job.name)
        if len(seen) == 2:
            raise Interrupted
        return write(job, keep, writer)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(hkh, "write_tiles", stop_at_second)
        prepare(source_of(sample), tmp_path / "hkh", SMALL)
    assert not (tmp_path / "hkh").exists()
    again = []
    monkeypatch.setattr(hkh, "write_tiles", lambda job, *rest: (again.append(job.name), write(job, *rest))[1])
    prepare(source_of(sample), tmp_path / "hkh", SMALL)
    assert again == [path.stem for path in scene_paths(sample)[1:]]
    assert contents(tmp_path / "hkh") == contents(tmp_path / "whole")
    assert left_over(tmp_path) == ["hkh", "whole"]


def test_one_store_is_made_by_one_process(sample, tmp_path):
    (tmp_path / ".hkh-partial").mkdir()
    with (
        locked(tmp_path / ".hkh-partial"),
        pytest.raises(StoreError, match="another process makes this store"),
    ):
        prepare(source_of(sample), tmp_path / "hkh", SMALL)
    assert left_over(tmp_path) == [".hkh-partial"]


def test_marks_of_finished_scenes_go_before_their_tiles(tmp_path):
    """A run killed while it tidied up left marks without tiles, and every later run stumbled over them."""
    for name in ("a", "b"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "result.json").write_text('{"fingerprint": "x"}')
    with pytest.raises(FileNotFoundError):  # as a kill does, this stops it after the first
        hkh.discard([tmp_path / "a", tmp_path / "missing", tmp_path / "b"])
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b" / "images").exists() and not hkh.read_result(tmp_path / "b", "x")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null"])
def test_a_damaged_partial_result_is_made_again(sample, tmp_path, content):
    folder = tmp_path / ".hkh-partial" / scene_paths(sample)[0].stem
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(content)
    assert prepare(source_of(sample), tmp_path / "hkh", SMALL).tiles
    assert left_over(tmp_path) == ["hkh"]


@pytest.mark.parametrize("change", ["settings", "labels"])
def test_a_partial_result_of_other_settings_or_labels_is_not_used(sample, tmp_path, change):
    folder = copy_sample(sample, tmp_path / "sample")
    jobs = hkh.plan(source_of(folder), SMALL)
    before = [hkh.fingerprint(job, SMALL) for job in jobs]
    assert before == [hkh.fingerprint(job, SMALL) for job in hkh.plan(source_of(folder), SMALL)]
    if change == "settings":
        after = [hkh.fingerprint(job, ALL) for job in jobs]
    else:
        os.utime(folder / LABELS_FILE, (1, 1))
        after = [hkh.fingerprint(job, SMALL) for job in jobs]
    assert not set(before) & set(after)


def test_a_killed_run_leaves_no_store_and_continues(sample, tmp_path):
    """SIGKILL once the first scene is done, then the same command."""
    command = ["hkh", "--out", str(tmp_path / "hkh"), "--jobs", "1"]
    command += ["--scenes", str(sample / "scenes"), "--labels", str(sample / LABELS_FILE)]
    command += ["--size", "32", "--overlap", "20", "--min-glacier", "1", "--val-share", "0.3"]
    options = {"cwd": PROJECT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "prep", *command], **options)
    partial = tmp_path / ".hkh-partial"
    while process.poll() is None and not any(partial.glob("LE07_14?041_2005/result.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "hkh").exists()
    assert main(command) == 0
    command[2] = str(tmp_path / "whole")
    assert main(command) == 0
    assert contents(tmp_path / "hkh") == contents(tmp_path / "whole")
    assert left_over(tmp_path) == ["hkh", "whole"]


def test_an_older_store_stays_unless_told_otherwise(sample, tmp_path):
    prepare(source_of(sample), tmp_path / "hkh", SMALL)
    with pytest.raises(StoreError, match="--overwrite"):
        prepare(source_of(sample), tmp_path / "hkh", ALL)
    prepare(source_of(sample), tmp_path / "hkh", ALL, overwrite=True)
    assert left_over(tmp_path) == ["hkh"]


# --- the command line ---


def test_command_line_from_sample_to_store(tmp_path, capsys):
    out, store = str(tmp_path / "sample"), str(tmp_path / "hkh")
    assert main(["sample", "--like", "hkh", "--out", out, "--tiles", "2", "--size", "96"]) == 0
    options = shlex.split("--tile-size 64 --overlap 0.25 --min-glacier-pixels 10 --max-background 1 --jobs 1")
    labels = f"{out}/labels/HKH_CIDC_5basins_all.shp"
    assert main(["hkh", "--scenes", f"{out}/scenes", "--labels", labels, "--out", store, *options]) == 0
    printed = capsys.readouterr().out
    assert "LE07_140041_2005" in printed and "tiles to train on" in printed
    assert TileStore(store).fold_of("split")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scenes", "x"], "--labels belongs to --scenes"),
        (
            ["--scenes", "x", "--labels", "y.shp", "--mask-order", "clean,debris"],
            "--mask-order belongs to --patch",
        ),
        (
            ["--scenes", "x", "--labels", "y.shp", "--overlap", "1.5"],
            "--overlap: found '1.5', expected pixels",
        ),
        (["--scenes", "x", "--labels", "y.shp", "--words", "clean=glacier"], "--words: found clean=glacier"),
        (
            ["--scenes", "x", "--labels", "y.shp", "--max-background", "80"],
            "--max-background is 80.0, expected a share",
        ),
        (["--scenes", "x", "--labels", "y.shp"], "y.shp: is no file that can be reached"),
    ],
)
def test_wrong_use_is_answered_with_a_message_and_2(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["hkh", "--out", str(tmp_path / "hkh"), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_sample_is_in_the_real_format(sample):
    for path in scene_paths(sample):
        with rasterio.open(path) as file:
            assert (file.count, file.dtypes[0], file.descriptions) == (15, "uint8", landsat7.EXPORT_15)
    table = geopandas.read_file(sample / LABELS_FILE)
    assert table.crs.to_epsg() == 4326
    assert set(table["Glaciers"]) == {"Clean ice", "Debris covered"}


def test_the_same_seed_gives_the_same_sample(sample, tmp_path):
    again = make_sample(tmp_path / "again")
    for one, other in zip(scene_paths(sample), scene_paths(again)):
        assert one.read_bytes() == other.read_bytes()
    assert (sample / LABELS_FILE).read_bytes() == (again / LABELS_FILE).read_bytes()


def test_stripes_cost_a_fifth_of_a_scene():
    from prep.synthetic.hkh import missing_lines

    assert missing_lines(1000, 1000, 0).mean() == pytest.approx(0.22, abs=0.015)
