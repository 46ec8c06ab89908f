"""Pictures of tiles: what they say of areas and places, what they need, and one file a tile."""

import argparse
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
from affine import Affine
from masks_helpers import textured_numbers, tiny_model, write_tiny_model
from support import write_tile

import solution
from prep.synthetic.scenes import write_sample
from train.masks import command
from train.masks import preview as quicklook
from train.masks.files import read_mask, survey_masks
from train.masks.georeference import Georeference, class_km2, describe
from train.masks.pictures import false_colour
from train.masks.score import read_label_set

UTM = Georeference(rasterio.crs.CRS.from_epsg(32643), Affine(30, 0, 500000, 0, -30, 3700000))
DEGREES = Georeference(rasterio.crs.CRS.from_epsg(4326), Affine(0.001, 0, 77, 0, -0.001, 33))


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[Path, Path]:
    """Return (data, masks) of two synthetic tiles; their labels, as PNG, are the masks."""
    data = tmp_path_factory.mktemp("quicklook") / "data"
    write_sample(data, tiles=2, size=64, seed=0, naming="platform", labels="phase2")
    masks = data.parent / "masks"
    masks.mkdir()
    for path in sorted((data / "label").iterdir()):
        cv2.imwrite(str(masks / f"{path.stem}.png"), solution.decode_tiff(path)[0].astype(np.uint8))
    return data, masks


def some_view(place=UTM) -> quicklook.View:
    """Return a view of 10 x 20 px: two rows nodata, one of glacier, one of debris, one of lake, six other."""
    image = np.full((10, 20, 5), 0.5, np.float32)
    image[..., 4] = 260
    image[:2] = np.nan
    classes = np.zeros((10, 20), np.uint8)
    classes[2], classes[3], classes[4] = 1, 2, 3
    codes = np.where(np.isnan(image[..., 0]), np.uint8(255), classes)
    pixels = np.bincount(codes.ravel(), minlength=256)
    return quicklook.View("01_01", image, codes, None, None, place, (10, 20), pixels, class_km2(codes, place))


def test_areas_are_those_of_the_pixels():
    assert some_view().area(1) == f"{20 * 0.0009:.1f} km², 12.5%"
    wide = some_view(UTM._replace(transform=Affine(1000, 0, 500000, 0, -1000, 3700000)))
    assert wide.km2[[0, 1, 2, 3, 255]] == pytest.approx([100, 20, 20, 20, 40], rel=2e-3)


def test_without_a_place_there_are_shares_only():
    assert quicklook.make_thumbnail(some_view(None)).area(1, 2) == "25.0%"


def test_a_pixel_is_as_large_as_it_is_on_the_ground():
    assert UTM.pixel_km((10, 10)) == pytest.approx(0.03, rel=1e-3)
    feet = Georeference(rasterio.crs.CRS.from_epsg(2263), Affine(100, 0, 984250, 0, -100, 200000))
    assert feet.pixel_km((10, 10)) == pytest.approx(0.03048, rel=1e-3)
    assert DEGREES.pixel_km((10, 10)) == pytest.approx(0.0934, rel=1e-2)  # a thousandth of a degree at 33 N


def test_a_place_is_told_in_words():
    assert describe((10, 20), UTM) == "20 x 10 px of 30 m, EPSG:32643, corner 500,000 / 3,700,000"
    assert describe((10, 20)) == "20 x 10 px"


@pytest.mark.parametrize("place", [UTM, DEGREES, None])
@pytest.mark.parametrize("confidence", [None, np.full((10, 20), 0.7)])
def test_a_quicklook_can_be_drawn_of_any_view(tmp_path, place, confidence):
    figure = quicklook.draw_quicklook(some_view(place)._replace(confidence=confidence))
    panels = [axis.get_title() for axis in figure.axes]
    assert ("confidence: probability of the class shown" in panels) is (confidence is not None)
    assert bool(figure.axes[0].artists) is (place is not None)  # the scale bar
    assert quicklook.save_figure(figure, tmp_path / "deep" / "a.png").stat().st_size > 10_000


def test_outlines_stop_at_nodata():
    view = some_view()
    lines = [line for line in draw_lines(view) if len(line)]
    assert lines
    assert min(line[:, 1].min() for line in lines) > 2  # the border of ice and nodata, at 1.5, is none


def draw_lines(view):
    """Return the outlines of a view as arrays (N, 2) of x and y."""
    figure = quicklook.Figure()
    axis = figure.subplots()
    quicklook.draw_outlines(axis, view.codes)
    return [path for drawn in axis.collections for one in drawn.get_paths() for path in one.to_polygons()]


def test_pictures_of_a_folder_and_their_order(sample, tmp_path, monkeypatch):
    data, masks = sample
    written = quicklook.write_quicklooks(data, tmp_path / "out", masks)
    assert [path.name for path in written] == ["001.png", "002.png", "contact_sheet.png"]
    assert all(cv2.imread(str(path)).shape[1] > 500 for path in written)
    monkeypatch.setattr(quicklook, "TILES_A_SHEET", 1)
    sheets = quicklook.write_quicklooks(data, tmp_path / "sheet.png", masks)
    assert [path.name for path in sheets] == ["sheet.png", "sheet_2.png"]


def test_a_label_is_drawn_beside_the_mask(sample):
    data, masks = sample
    tile = solution.find_tiles(data)[0]
    view = quicklook.open_view(tile, survey_masks(masks), None, read_label_set(data, None))
    valid = view.codes != 255
    assert (view.label[valid] == view.codes[valid]).all()  # the masks are the labels
    figure = quicklook.draw_quicklook(view)
    assert "label" in [axis.get_title() for axis in figure.axes]
    assert run("--data", data, "--masks", masks, "--labels", data, "--out", masks / "one.png") == 0


def test_the_same_tiles_give_the_same_bytes(sample, tmp_path):
    first, again = (quicklook.write_quicklooks(*sample[:1], tmp_path / n, sample[1])[0] for n in ("a", "b"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("height", [64, 1100])
def test_weights_give_the_masks_of_solution_and_their_confidence(tmp_path, height):
    write_tile(tmp_path, "001", textured_numbers(height, 160))
    tile = solution.find_tiles(tmp_path)[0]
    model = tiny_model(views=1 if height > 64 else 2)
    view, step = quicklook.open_view(tile, None, model), 1 + (height > 1024)
    image = solution.read_tile(tile)
    classes = solution.predict_classes(model, image)[0]
    valid = solution.valid_mask(image)
    assert (view.codes == np.where(valid, classes, 255)[::step, ::step]).all()
    np.testing.assert_array_equal(view.image, image[::step, ::step])
    assert view.pixels[:4].sum() == valid.sum()
    if height == 64:
        probs, (rows, columns) = (
            solution.predict_window(model, image)[0],
            np.nonzero(valid),
        )
        found = view.confidence[rows, columns]
        np.testing.assert_allclose(found, probs[view.codes[rows, columns], rows, columns], atol=0.0021)


def test_command_draws_with_weights_alone(sample, tmp_path, capsys):
    weights = write_tiny_model(tmp_path / "model.pth")
    out = tmp_path / "pictures"
    assert run("--data", sample[0], "--weights", weights, "--out", out) == 0
    assert "contact_sheet.png: contact sheet; 3 pictures" in capsys.readouterr().out


def run(*arguments) -> int:
    """Run `preview` with these arguments."""
    parser = argparse.ArgumentParser()
    command.add_preview_arguments(parser)
    return command.run_preview(parser.parse_args([str(argument) for argument in arguments]))


def test_what_is_missing_is_said(sample, tmp_path):
    with pytest.raises(solution.InputError, match="give --masks FOLDER, --weights model.pth, or both"):
        run("--data", sample[0], "--out", tmp_path)
    with pytest.raises(solution.InputError, match="no mask of a tile in it"):
        quicklook.write_quicklooks(sample[0], tmp_path, tmp_path)


def test_a_broken_tile_is_shown_white(sample, tmp_path, capsys):
    write_tile(tmp_path / "data", "001", np.full((64, 64, 5), 30000.0))
    (tmp_path / "data" / "Band3" / "img001.tif").unlink()
    tile = solution.find_tiles(tmp_path / "data")[0]
    view = quicklook.open_view(tile, survey_masks(sample[1], only=[tile.tile_id]), None)
    assert (false_colour(view.image) == 255).all()
    assert "its picture stays white" in capsys.readouterr().err


def test_masks_are_found_by_tile_id_whatever_their_name(tmp_path):
    tile = solution.TileFiles("02_07", "B2_B2_masked_02_07.tif", (None,) * 5)
    cv2.imwrite(str(tmp_path / "prediction_02_07.png"), np.full((8, 8), 170, np.uint8))
    assert (read_mask(survey_masks(tmp_path), tile, (8, 8)) == 2).all()
    cv2.imwrite(str(tmp_path / "prediction_02_07.png"), np.full((8, 8), 17, np.uint8))
    with pytest.raises(solution.InputError, match="found 17 .*; expected 0"):
        survey_masks(tmp_path)


def test_masks_of_an_extent_are_glacier_and_no_lakes(tmp_path):
    tile = solution.TileFiles("02_07", "B2_B2_masked_02_07.tif", (None,) * 5)
    cv2.imwrite(str(tmp_path / "02_07.png"), np.repeat(np.uint8([[0, 255]]), 8, axis=0))
    assert (read_mask(survey_masks(tmp_path), tile, (8, 2)) == [0, 1]).all()


def test_a_tile_in_other_units_is_not_segmented_as_if_it_were_level_2(tmp_path, capsys):
    write_tile(tmp_path, "001", np.full((64, 64, 5), [0.5, 0.5, 0.5, 0.1, 260.0]), dtype=np.float32)
    quicklook.open_view(solution.find_tiles(tmp_path)[0], None, tiny_model())
    assert "look like reflectance" in capsys.readouterr().err
