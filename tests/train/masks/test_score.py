"""Any folder of masks is scored as the organisers do: pooled pixels, matched by tile id, either phase."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from sklearn.metrics import jaccard_score, matthews_corrcoef

from solution import InputError
from train.__main__ import main
from train.masks.files import survey_masks
from train.masks.score import format_scores, score_masks

SHAPE = (40, 50)
VALUES = (0, 85, 170, 255)


def random_classes(seed: int) -> np.ndarray:
    """Return a map (40, 50) of the four grey values, with few lakes."""
    return np.random.default_rng(seed).choice(VALUES, SHAPE, p=(0.5, 0.3, 0.19, 0.01)).astype(np.uint8)


def spoil(values: np.ndarray, seed: int) -> np.ndarray:
    """Return a map with a third of its pixels drawn again."""
    again = np.random.default_rng(seed).random(SHAPE) < 1 / 3
    return np.where(again, random_classes(seed + 100), values).astype(np.uint8)


def extent_of(values: np.ndarray) -> np.ndarray:
    """Return grey values as phase-1 values."""
    return np.where(np.isin(values, (85, 170)), 255, 0).astype(np.uint8)


TRUTH = {"01_01": random_classes(0), "01_02": random_classes(1), "02_01": random_classes(2)}
GUESS = {tile: spoil(values, seed) for seed, (tile, values) in enumerate(TRUTH.items())}


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Return a folder of masks as this kit writes them: PNG, stem of Band1's file."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for tile, values in GUESS.items():
        cv2.imwrite(str(folder / f"B2_B2_masked_{tile}.png"), values)
    return folder


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Return a folder with label/ of phase 1, and label_phase2/ of the first two tiles."""
    folder = tmp_path / "Train"
    for name in ("label", "label_phase2"):
        (folder / name).mkdir(parents=True)
    for tile, values in TRUTH.items():
        tifffile.imwrite(folder / "label" / f"Y_output_resized_{tile}.tif", extent_of(values) * 1.0)
    for tile in ("01_01", "01_02"):
        tifffile.imwrite(folder / "label_phase2" / f"Y_output_resized_{tile}.tif", TRUTH[tile] * 1.0)
    return folder


def pooled(maps: dict, tiles=TRUTH) -> np.ndarray:
    """Return the pixels of some tiles in a row."""
    return np.concatenate([maps[tile].ravel() for tile in tiles])


def test_scores_are_those_of_scikit_learn_over_all_pixels(masks, labels):
    scores = score_masks(masks, labels)
    four = scores["all_pixels"]["four_class"]
    phase2 = ("01_01", "01_02")
    truth, guess = pooled(TRUTH, phase2), pooled(GUESS, phase2)
    assert four["mcc"] == pytest.approx(matthews_corrcoef(truth, guess))
    assert list(four["iou"].values()) == pytest.approx(jaccard_score(truth, guess, average=None))
    extents = extent_of(pooled(TRUTH)), extent_of(pooled(GUESS))
    assert scores["all_pixels"]["binary"]["mcc"] == pytest.approx(matthews_corrcoef(*extents))
    assert np.sum(scores["confusion"]["four_class"]) == 2 * 40 * 50
    assert np.sum(scores["confusion"]["binary"]) == 3 * 40 * 50
    assert scores["valid_pixels"] is None


def test_each_tile_has_its_own_score_and_four_classes_only_with_phase_2_labels(masks, labels):
    tiles = score_masks(masks, labels)["by_tile"]
    assert {tile: entry["labels"] for tile, entry in tiles.items()} == {
        "01_01": "phase2",
        "01_02": "phase2",
        "02_01": "phase1",
    }
    assert tiles["02_01"]["all_pixels"]["four_class"] is None
    for tile, entry in tiles.items():
        truth, guess = extent_of(TRUTH[tile]).ravel(), extent_of(GUESS[tile]).ravel()
        assert entry["all_pixels"]["binary"]["mcc"] == pytest.approx(matthews_corrcoef(truth, guess))
        assert entry["share_masked"] == pytest.approx((guess == 255).mean())


def test_masks_of_another_entry_score_alike(masks, labels, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for number, (tile, values) in enumerate(GUESS.items()):
        if number == 0:
            tifffile.imwrite(other / f"Y_{tile}.tiff", values.astype(np.float32)[None])
        else:
            cv2.imwrite(str(other / f"prediction_{tile}.png"), np.repeat(values[..., None], 3, axis=-1))
    ours, theirs = score_masks(masks, labels), score_masks(other, labels)
    assert ours["all_pixels"] == theirs["all_pixels"]
    assert ours["confusion"] == theirs["confusion"]


def test_masks_of_an_extent_are_told_by_their_values_and_get_no_four_class_score(labels, tmp_path):
    folder = tmp_path / "extent"
    folder.mkdir()
    for tile, values in GUESS.items():
        cv2.imwrite(str(folder / f"{tile}.png"), extent_of(values))
    scores = score_masks(folder, labels)
    assert scores["values"] == "extent"
    assert scores["all_pixels"]["four_class"] is None
    extents = extent_of(pooled(TRUTH)), extent_of(pooled(GUESS))
    assert scores["all_pixels"]["binary"]["mcc"] == pytest.approx(matthews_corrcoef(*extents))
    assert "255 would be lakes" in format_scores(scores)
    as_lakes = score_masks(folder, labels, values="classes")
    assert as_lakes["all_pixels"]["binary"]["iou"]["glacier_any"] == 0


def test_blank_masks_are_classes_and_score_nothing(labels, tmp_path):
    folder = tmp_path / "blank"
    folder.mkdir()
    for tile in GUESS:
        cv2.imwrite(str(folder / f"{tile}.png"), np.zeros(SHAPE, np.uint8))
    scores = score_masks(folder, labels)
    assert scores["values"] == "classes"
    assert scores["all_pixels"]["four_class"]["mcc"] == 0


def test_bands_add_a_score_without_nodata(masks, labels, tmp_path):
    for band in ("Band1", "Band2", "Band3", "Band4", "Band5"):
        (tmp_path / "bands" / band).mkdir(parents=True)
        for tile in TRUTH:
            values = np.full(SHAPE, 30000, np.uint16)
            values[:10] = 0
            tifffile.imwrite(tmp_path / "bands" / band / f"x_{tile}.tif", values)
    scores = score_masks(masks, labels, data=tmp_path / "bands", tiles=["01_01"])
    truth, guess = TRUTH["01_01"][10:].ravel(), GUESS["01_01"][10:].ravel()
    assert scores["valid_pixels"]["four_class"]["mcc"] == pytest.approx(matthews_corrcoef(truth, guess))
    assert scores["by_tile"]["01_01"]["marked_nodata"] == np.count_nonzero(GUESS["01_01"][:10])
    everywhere = matthews_corrcoef(TRUTH["01_01"].ravel(), GUESS["01_01"].ravel())
    assert scores["all_pixels"]["four_class"]["mcc"] == pytest.approx(everywhere)


def test_every_problem_of_the_files_is_named(masks, labels):
    (masks / "B2_B2_masked_02_01.png").unlink()
    with pytest.raises(InputError, match=r"no mask of 1 labelled tiles \(02_01\).*found masks of 01_01, 01_02"):
        score_masks(masks, labels)
    assert score_masks(masks, labels, tiles=["01_02"])["tiles"] == 1
    with pytest.raises(InputError, match=r"no label of 09_09; there are labels of 01_01, 01_02, 02_01"):
        score_masks(masks, labels, tiles=["09_09"])
    cv2.imwrite(str(masks / "B2_B2_masked_02_01.png"), np.zeros((5, 6), np.uint8))
    with pytest.raises(InputError, match=r"02_01\.png: 6 x 5 px, expected 50 x 40 px as in .*02_01\.tif"):
        score_masks(masks, labels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1, 2, 3), r"x_01_01\.png: found .*class indices: multiply them by 85"),
        ((0, 85, 99), r"x_01_01\.png: found 99 \(\d+ px\); expected 0 \(other\), 85 \(glacier\)"),
    ],
)
def test_unknown_values_come_with_a_remedy(tmp_path, values, message):
    drawn = np.random.default_rng(0).choice(values, SHAPE).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "x_01_01.png"), drawn)
    with pytest.raises(InputError, match=message):
        survey_masks(tmp_path)


def test_two_masks_of_a_tile_and_a_picture_in_colour_are_refused_together(tmp_path):
    for name in ("a_01_01.png", "b_01_01.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros(SHAPE, np.uint8))
    cv2.imwrite(str(tmp_path / "a_01_02.png"), np.full((*SHAPE, 3), (0, 85, 170), np.uint8))
    with pytest.raises(InputError, match=r"(?s)2 problems.*of tile 01_01 too.*expected one grey channel"):
        survey_masks(tmp_path)


def test_labels_of_the_wrong_phase_are_refused(masks, labels):
    with pytest.raises(InputError, match="These are phase-1 values"):
        score_masks(masks, labels / "label", phase="phase2")


def test_command_prints_a_table_and_writes_json(masks, labels, tmp_path, capsys):
    out = tmp_path / "deep" / "scores.json"
    assert main(["evaluate", "--pred", str(masks), "--labels", str(labels), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    scores = json.loads(out.read_text())
    assert f"{scores['all_pixels']['four_class']['mcc']:.4f}" in printed
    for word in ("four classes", "glacier extent", "glacier of either kind", "lake", "02_01", "phase1"):
        assert word in printed


def test_command_says_what_is_missing(capsys):
    assert main(["evaluate", "--pred", "nowhere", "--labels", "nowhere"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert main(["evaluate", "--pred", "nowhere", "--labels", "nowhere", "--weights", "none.pth"]) == 2
    assert "no weights: looked for none.pth" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--pred", "nowhere"])
    assert "--labels" in capsys.readouterr().err
