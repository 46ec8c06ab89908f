"""`python -m prep competition`: labels of both phases, nodata, warnings, refusals, and the 18 real tiles."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image

from prep.__main__ import main
from prep.competition import PrepError, prepare
from prep.folds import FoldError
from prep.store import TileStore
from solution import BANDS, InputError

SHAPE = (20, 24)
IDS = ["02_07", "02_08", "03_07", "03_08", "04_07", "04_08"]
ICE = (slice(4, 16), slice(4, 20))  # 40 % of a tile
NODATA = (slice(0, 3), slice(None))  # 15 % of a tile, apart from the ice


def write_bands(data: Path, tile_id: str, seed: int, dtype=np.uint16) -> None:
    """Write the five bands of a tile as Level-2 integers, with a nodata strip and a hole in band 1 alone."""
    random = np.random.default_rng(seed)
    for number, band in enumerate(BANDS):
        low, high = (25000, 35000) if band.unit == "kelvin" else (8000, 50000)
        values = random.integers(low, high, SHAPE).astype(dtype)
        values[NODATA] = 0
        values[10, 10] = 0 if number == 0 else values[10, 10]
        folder = data / band.folder
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{band.landsat}_{band.landsat}_masked_{tile_id}.tif" if "_" in tile_id else f"img{tile_id}.tif"
        tifffile.imwrite(folder / name, values)


def phase1_label() -> np.ndarray:
    """Return a phase-1 label: 40 % glacier."""
    label = np.zeros(SHAPE, np.float32)
    label[ICE] = 255
    return label


def phase2_label() -> np.ndarray:
    """Return a phase-2 label of the same extent: clean ice, debris below, and a lake of 4 px beside it."""
    label = np.where(phase1_label() == 255, 85, 0).astype(np.float32)
    label[14:16, 4:20] = 170
    label[17:19, 10:12] = 255
    return label


def write_label(data: Path, folder: str, tile_id: str, label: np.ndarray) -> Path:
    """Write a label under the organisers' name for it."""
    (data / folder).mkdir(parents=True, exist_ok=True)
    path = data / folder / f"Y_output_resized_{tile_id}.tif"
    tifffile.imwrite(path, label)
    return path


pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture
def data(tmp_path) -> Path:
    """Return a training folder: six tiles with phase-1 labels, the first two with phase-2 labels as well."""
    folder = tmp_path / "Train"
    for seed, tile_id in enumerate(IDS):
        write_bands(folder, tile_id, seed)
        write_label(folder, "label", tile_id, phase1_label())
    for tile_id in IDS[:2]:
        write_label(folder, "label_phase2", tile_id, phase2_label())
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    """Return the place for a store, in a folder that does not exist yet."""
    return tmp_path / "stores" / "competition"


def assert_no_store(out: Path) -> None:
    """Assert that neither a store nor a temporary folder was left."""
    assert not out.exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def expected_codes(label: np.ndarray, codes: dict[int, int]) -> np.ndarray:
    """Return the mask that a label should become, with the nodata strip ignored."""
    mask = np.vectorize(codes.get)(label.astype(int)).astype(np.uint8)
    mask[NODATA] = 255
    return mask


# --- what is written ---


def test_phase2_labels_are_used_where_present_and_phase1_labels_elsewhere(data, out):
    prepare(data, out)
    store = TileStore(out)
    assert store.tile_ids == IDS
    assert [tile.labels for tile in store.tiles] == ["phase2"] * 2 + ["phase1"] * 4
    for tile_id in IDS[:2]:
        expected = expected_codes(phase2_label(), {0: 0, 85: 1, 170: 2, 255: 3})
        assert np.array_equal(store.mask(tile_id), expected)
    for tile_id in IDS[2:]:
        assert np.array_equal(store.mask(tile_id), expected_codes(phase1_label(), {0: 0, 255: 4}))


def test_images_are_in_physical_units_with_nan_for_nodata_as_rasterio_reads_them(data, out):
    prepare(data, out)
    image = TileStore(out).image("03_07")
    assert image.shape == (*SHAPE, 5)
    for number, band in enumerate(BANDS):
        with rasterio.open(next((data / band.folder).glob("*03_07.tif"))) as raster:
            stored = raster.read(1).astype(float)
        expected = np.where(stored == 0, np.nan, stored * band.scale + band.offset)
        assert np.allclose(image[..., number], expected, rtol=1e-6, equal_nan=True)


def test_a_pixel_with_a_value_in_some_band_keeps_its_label(data, out):
    prepare(data, out)
    store = TileStore(out)
    assert np.isnan(store.image("03_07")[10, 10]).tolist() == [True, False, False, False, False]
    assert store.mask("03_07")[10, 10] == 4


def test_tiles_csv_counts_every_pixel_once(data, out):
    prepare(data, out)
    for tile in TileStore(out).tiles:
        assert sum(tile.counts.values()) == SHAPE[0] * SHAPE[1]
        assert tile.valid_share == pytest.approx(1 - tile.counts["ignore"] / (SHAPE[0] * SHAPE[1]), abs=1e-6)
        assert tile.source == f"B2_B2_masked_{tile.tile_id}.tif"
        assert f"{tile.row:02d}_{tile.col:02d}" == tile.tile_id


def test_folds_cover_all_tiles_and_the_seed_is_kept(data, out):
    prepare(data, out, seed=5)
    store = TileStore(out)
    for scheme in ("stratified", "spatial"):
        assert sorted(store.fold_of(scheme)) == IDS
        assert sorted(set(store.fold_of(scheme).values())) == [0, 1, 2, 3, 4]
    assert store.folds["seed"] == 5


def test_provenance_names_the_source_without_a_path(data, out):
    prepare(data, out, seed=5)
    text = (out / "store.json").read_text()
    about = json.loads(text)
    assert (about["source"], about["seed"], about["tiles"]) == ("Train", 5, 6)
    assert about["labels"] == {"phase1": 4, "partial": 0, "phase2": 2}
    assert about["versions"]["numpy"] == np.__version__
    assert str(data.parent) not in text


def test_the_same_input_gives_the_same_store(data, out, tmp_path):
    prepare(data, out)
    prepare(data, tmp_path / "again")
    names = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert len(names) == 17
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_platform_names_and_png_labels_are_read_too(tmp_path, out):
    data = tmp_path / "Train"
    (data / "label").mkdir(parents=True)
    for number in range(1, 6):
        write_bands(data, f"{number:03d}", number, dtype=np.float32)
        cv2.imwrite(str(data / "label" / f"img{number:03d}.png"), phase2_label().astype(np.uint8))
    prepare(data, out)
    store = TileStore(out)
    assert store.tile_ids == ["001", "002", "003", "004", "005"]
    assert list(store.fold_of("spatial").values()) == [0, 1, 2, 3, 4]
    assert store.tiles[0].row is None
    assert np.array_equal(store.mask("003"), expected_codes(phase2_label(), {0: 0, 85: 1, 170: 2, 255: 3}))


# --- labels whose kinds are known in part ---


def test_partial_labels_keep_what_is_unknown_as_a_set_and_rank_between_the_phases(data, out):
    partial = phase2_label()
    partial[ICE] = 127
    partial[14:16, 4:12] = 170
    for tile_id in IDS[1:4]:
        write_label(data, "label_partial", tile_id, partial)
    prepare(data, out)
    store = TileStore(out)
    assert list(store.labels.values()) == ["phase2", "phase2", "partial", "partial", "phase1", "phase1"]
    codes = {0: 0, 85: 1, 127: 4, 170: 2, 255: 3}
    assert np.array_equal(store.mask(IDS[2]), expected_codes(partial, codes))
    assert np.array_equal(store.mask(IDS[1]), expected_codes(phase2_label(), codes))
    counts = store.tiles[2].counts
    assert (counts["debris"], counts["glacier"], counts["glacier_or_debris"]) == (16, 0, 192 - 16)


@pytest.mark.parametrize(
    ("folder", "value", "expected"),
    [
        ("label_phase2", 127, r"found 127 \(2 px\); expected only 0 \(other\), 85 \(glacier\)"),
        ("label_partial", 126, r"found 126 \(2 px\); expected only .*127 \(glacier of unknown kind\)"),
    ],
)
def test_unknown_kinds_belong_to_partial_labels_alone(data, out, folder, value, expected):
    label = phase2_label()
    label[5, 5:7] = value
    write_label(data, folder, IDS[0], label)
    with pytest.raises(PrepError, match=expected):
        prepare(data, out)


# --- a store that is there already ---


def test_the_same_files_in_another_folder_are_up_to_date(data, out, tmp_path, capsys):
    first = prepare(data, out)
    before = os.stat(out / "tiles.csv").st_ino
    shutil.copytree(data, tmp_path / "elsewhere")
    assert prepare(tmp_path / "elsewhere", out)[1:] == first[1:]
    assert "is up to date: made of the same files" in capsys.readouterr().out
    assert os.stat(out / "tiles.csv").st_ino == before
    (out / "ground.geojson").unlink()  # as of an earlier release
    prepare(data, out)
    assert (out / "ground.geojson").is_file()
    prepare(data, out, overwrite=True)
    assert os.stat(out / "tiles.csv").st_ino != before


def test_a_changed_label_is_refused_with_both_fingerprints(data, out, tmp_path, capsys):
    prepare(data, out)
    label = phase1_label()
    label[4, 4] = 0
    write_label(data, "label", IDS[4], label)
    there = TileStore(out).fingerprint
    new = prepare(data, tmp_path / "new").folder
    command = ["competition", "--data", str(data), "--out", str(out)]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"with the fingerprint {there}, these have {TileStore(new).fingerprint}" in said
    assert there != TileStore(new).fingerprint and "--overwrite" in said
    assert main([*command, "--overwrite"]) == 0
    assert TileStore(out).fingerprint == TileStore(new).fingerprint


# --- which phase ---


def test_phase2_labels_in_the_label_folder_are_told_by_their_values(data, out):
    shutil.rmtree(data / "label")
    (data / "label_phase2").rename(data / "label")
    for tile_id in IDS[2:]:
        write_label(data, "label", tile_id, phase2_label())
    prepare(data, out)
    assert {tile.labels for tile in TileStore(out).tiles} == {"phase2"}


def test_phase1_labels_passed_off_as_phase2_are_refused(data, out):
    shutil.rmtree(data / "label_phase2")
    (data / "label").rename(data / "label_phase2")
    with pytest.raises(PrepError, match=r"label_phase2: meant as phase 2, but 255 covers 40\.0%.*marks glaciers"):
        prepare(data, out)
    assert_no_store(out)


def test_a_phase1_label_among_phase2_labels_is_refused_by_name(data, out):
    write_label(data, "label_phase2", IDS[4], phase1_label())
    with pytest.raises(PrepError, match=r"Y_output_resized_04_07\.tif: 255 covers 40\.0% of the tile") as caught:
        prepare(data, out)
    assert len(caught.value.problems) == 1


def test_a_phase2_tile_without_glacier_but_with_a_large_lake_is_accepted(data, out):
    label = np.zeros(SHAPE, np.float32)
    label[10:14, 10:15] = 255  # 4.2 % of the tile
    write_label(data, "label_phase2", IDS[4], label)
    prepare(data, out)
    assert TileStore(out).tiles[4].counts["lake"] == 20


def test_phase2_labels_declared_phase1_are_named_with_their_values(data, out):
    write_label(data, "label", IDS[4], phase2_label())
    with pytest.raises(PrepError, match=r"04_07\.tif: found 85 \(160 px\), 170 \(32 px\); expected only 0"):
        prepare(data, out, phase="1")


# --- refusals ---


@pytest.mark.parametrize(
    ("folder", "value", "expected"),
    [
        ("label_phase2", 2, r"found 2 \(2 px\)"),
        ("label", 128, r"128 \(2 px\); expected only 0 \(other\) and 255"),
        ("label", np.nan, r"nan \(2 px\)"),
        ("label", -9999, r"-9999 \(2 px\)"),
        ("label_phase2", 84.5, r"84\.5 \(2 px\); expected only 0 \(other\), 85 \(glacier\), 170"),
    ],
)
def test_values_outside_the_scheme_are_named_with_file_and_count(data, out, folder, value, expected):
    label = phase1_label() if folder == "label" else phase2_label()
    label[5, 5:7] = value
    path = write_label(data, folder, IDS[1], label)
    with pytest.raises(PrepError, match=expected) as caught:
        prepare(data, out)
    assert str(path) in str(caught.value)
    assert_no_store(out)


def test_all_problems_are_reported_together_and_no_store_is_left(data, out):
    next((data / "Band3").glob("*02_07.tif")).unlink()
    next((data / "Band4").glob("*02_08.tif")).write_bytes(b"II*\0 no raster")
    write_label(data, "label", "03_07", np.zeros((5, 6), np.uint8))
    write_label(data, "label", "03_08", np.full((*SHAPE, 3), (0, 85, 170), np.uint8))
    (data / "label" / "Y_output_resized_04_07.tif").write_bytes(b"")
    with pytest.raises(PrepError) as caught:
        prepare(data, out)
    message = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "Band3" in message
    assert "B6_B6_masked_02_08.tif" in message
    assert "6 x 5 px, expected 24 x 20 px as in tile 03_07" in message
    assert "(20, 24, 3)" in message
    assert "Y_output_resized_04_07.tif: cannot be read" in message
    assert_no_store(out)


def test_a_grey_label_saved_as_red_green_blue_is_read(data, out):
    expected = prepare(data, out).tiles
    coloured = np.repeat(phase1_label().astype(np.uint8)[..., None], 3, axis=-1)
    write_label(data, "label", "03_08", coloured)
    assert prepare(data, out.with_name("again")).tiles == expected


@pytest.mark.parametrize("codec", ["ZSTD", "LERC"])
@pytest.mark.parametrize("place", ["Band2", "label"])
def test_a_compression_that_nothing_here_undoes_is_named_with_the_way_out(data, out, codec, place):
    path = next((data / place).glob("*03_08.tif"))
    values = tifffile.imread(path)
    profile = {"height": SHAPE[0], "width": SHAPE[1], "count": 1, "dtype": values.dtype, "compress": codec}
    with rasterio.open(path, "w", driver="GTiff", **profile) as file:
        file.write(values, 1)
    with pytest.raises(PrepError, match=rf"03_08.tif: found {codec} compression.*-co COMPRESS=DEFLATE") as caught:
        prepare(data, out)
    assert len(caught.value.problems) == 1


def test_a_png_with_a_palette_is_read_where_it_is_grey_and_named_where_it_is_not(data, out):
    expected = prepare(data, out).tiles
    (data / "label" / "Y_output_resized_03_08.tif").unlink()
    picture = Image.fromarray(phase1_label().astype(np.uint8) // 255, "P")
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(data / "label" / "label_03_08.png")
    assert prepare(data, out.with_name("again")).tiles == expected
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.save(data / "label" / "label_03_08.png")
    with pytest.raises(PrepError, match="label_03_08.png: found .* a palette, expected one grey channel"):
        prepare(data, out.with_name("again"), overwrite=True)


def test_two_labels_for_one_tile_are_refused(data, out):
    cv2.imwrite(str(data / "label" / "label_02_07.png"), phase1_label().astype(np.uint8))
    with pytest.raises(PrepError, match=r"label_02_07\.png.* of tile 02_07 too"):
        prepare(data, out)


def test_a_missing_folder_or_one_without_tiles_is_an_input_error(tmp_path, out):
    with pytest.raises(InputError, match="nowhere"):
        prepare(tmp_path / "nowhere", out)
    with pytest.raises(InputError, match="Band1"):
        prepare(tmp_path, out)


def test_fewer_tiles_than_folds_leave_no_store(data, out):
    for tile_id in IDS[:2]:
        for label in data.glob(f"label*/*{tile_id}.tif"):
            label.unlink()
    with pytest.raises(FoldError, match="4 labelled tiles"):
        prepare(data, out)
    assert_no_store(out)


@pytest.mark.parametrize("other", [False, True])
def test_a_folder_without_labels_of_its_tiles_is_refused(data, out, other):
    shutil.rmtree(data / "label")
    shutil.rmtree(data / "label_phase2")
    if other:
        write_label(data, "label", "09_09", phase1_label())
    with pytest.raises(PrepError, match="no tile has a label" if other else "no label found"):
        prepare(data, out)


# --- warnings ---


def test_tiles_without_label_and_labels_without_tile_are_named_and_left_out(data, out, capsys):
    (data / "label" / "Y_output_resized_04_08.tif").unlink()
    write_label(data, "label", "09_09", phase1_label())
    prepare(data, out)
    said = capsys.readouterr().err
    assert "tile 04_08 (B2_B2_masked_04_08.tif) has no label" in said
    assert "Y_output_resized_09_09.tif belongs to no tile" in said
    assert TileStore(out).tile_ids == IDS[:-1]


def test_a_label_on_nodata_is_ignored_and_named(data, out, capsys):
    label = phase1_label()
    label[0, :10] = 255  # of 72 px without data
    write_label(data, "label", "04_08", label)
    prepare(data, out)
    assert "04_08.tif marks 10 px without data" in capsys.readouterr().err
    assert np.array_equal(TileStore(out).mask("04_08"), expected_codes(label, {0: 0, 255: 4}))


def test_nothing_is_warned_of_where_nothing_is_wrong(data, out, capsys):
    prepare(data, out)
    assert "warning" not in capsys.readouterr().err


# --- command line ---


def test_the_command_prints_both_fold_tables_and_what_was_written(data, out, capsys):
    assert main(["competition", "--data", str(data), "--out", str(out), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "stratified folds" in printed
    assert "spatial folds" in printed
    assert printed.splitlines()[-1].startswith(f"{out}: 6 tiles written")
    assert TileStore(out).folds["seed"] == 3


def test_a_failed_overwrite_keeps_the_older_store(data, out):
    prepare(data, out)
    write_label(data, "label", IDS[2], np.full(SHAPE, 7, np.uint8))
    with pytest.raises(PrepError):
        prepare(data, out, overwrite=True)
    assert TileStore(out).tile_ids == IDS
    assert [entry.name for entry in out.parent.iterdir()] == ["competition"]


def test_sample_writes_what_competition_reads(tmp_path, out, capsys):
    pytest.importorskip("prep.synthetic", reason="the sample generator is not there")
    sample = tmp_path / "sample"
    arguments = ["sample", "--out", str(sample), "--tiles", "5", "--size", "64", "--seed", "1"]
    assert main(arguments) == 0
    assert main(["competition", "--data", str(sample), "--out", str(out)]) == 0
    assert len(TileStore(out).tile_ids) == 5
    assert TileStore(out).image(TileStore(out).tile_ids[0]).shape == (64, 64, 5)


# --- the real tiles ---


@pytest.fixture(scope="module")
def real_store(real_tiles, tmp_path_factory) -> TileStore:
    """Return the store of the 18 real tiles."""
    folder = tmp_path_factory.mktemp("real") / "competition"
    prepare(real_tiles, folder)
    return TileStore(folder)


def test_real_tiles_have_18_labels_of_three_sorts(real_store):
    assert Counter(real_store.labels.values()) == {"phase1": 9, "partial": 6, "phase2": 3}
    debris = sum(tile.counts["debris"] for tile in real_store.tiles)
    assert 55_000 < debris < 70_000


def test_real_masks_ignore_exactly_the_pixels_without_data(real_store, real_tiles):
    for tile_id in real_store.tile_ids[::4]:
        paths = [next((real_tiles / band.folder).glob(f"*{tile_id}.tif")) for band in BANDS]
        stored = np.stack([rasterio.open(path).read(1) for path in paths])
        assert np.array_equal(real_store.mask(tile_id) == 255, (stored == 0).all(axis=0))
        assert np.array_equal(np.isnan(real_store.image(tile_id)), (stored == 0).transpose(1, 2, 0))


def test_real_statistics_and_folds(real_store):
    assert np.allclose(real_store.stats["mean"], [0.711, 0.692, 0.688, 0.050, 256.6], atol=[0.02] * 4 + [1])
    assert np.allclose(real_store.stats["std"], [0.575, 0.566, 0.578, 0.077, 9.1], atol=[0.02] * 4 + [1])
    for scheme in ("stratified", "spatial"):
        assert sorted(Counter(real_store.fold_of(scheme).values()).values()) == [3, 3, 4, 4, 4]
    fold_of, area = real_store.fold_of("stratified"), np.zeros(5)
    kinds = Counter(fold_of[tile] for tile, labels in real_store.labels.items() if labels != "phase1")
    assert sorted(kinds.values()) == [1, 2, 2, 2, 2]
    for tile in real_store.tiles:
        area[fold_of[tile.tile_id]] += sum(tile.counts[n] for n in ("glacier", "debris", "glacier_or_debris"))
    assert np.abs(area / area.mean() - 1).max() < 0.05
