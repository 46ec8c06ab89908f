"""Runs are scored from their files, the report repeats scores.json, and what cannot be scored is an error."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import matthews_corrcoef

from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE, count_codes
from prep.store import TileRow, TileStore, create
from solution import CLASS_NAMES, decide_classes
from train.config import Config, DataConfig, save_config
from train.masks.pictures import false_colour, paint_codes
from train.report import scores as report
from train.report.tables import read_run_names, write_report

SHAPE = (24, 36)
LABELS = {"01_01": "phase2", "01_02": "phase1", "02_01": "phase2", "02_02": "phase1", "03_01": "phase1"}
FOLDS = {"01_01": 0, "01_02": 0, "02_01": 1, "02_02": 1, "03_01": 2}


@pytest.fixture
def store(tmp_path) -> TileStore:
    """Return a store of five tiles with random labels, two of them of phase 2."""
    rng = np.random.default_rng(0)
    rows = []
    with create(tmp_path / "store") as writer:
        for tile_id, labels in LABELS.items():
            codes = (0, 1, 2, 3) if labels == "phase2" else (0, GLACIER_OR_DEBRIS)
            mask = rng.choice(codes, SHAPE).astype(np.uint8)
            image = rng.normal(0.5, 0.2, (*SHAPE, 5)).astype(np.float32)
            mask[:4], image[:4] = IGNORE, np.nan
            writer.write_tile(tile_id, image, mask)
            rows.append(TileRow(tile_id, "made", None, None, labels, 0.9, count_codes(mask)))
        writer.write_index(rows, {}, {"stratified": FOLDS, "seed": 0}, {})
    return TileStore(tmp_path / "store")


def write_run(folder: Path, store: TileStore, skill: float) -> Path:
    """Write probabilities that are right for a share `skill` of the pixels and random elsewhere."""
    rng = np.random.default_rng(1)
    (folder / "oof").mkdir(parents=True)
    (folder / "run.json").write_text('{"scheme": "stratified"}')
    for tile_id in store.tile_ids:
        mask = store.mask(tile_id)
        truth = np.where(mask == IGNORE, 3, np.where(mask == GLACIER_OR_DEBRIS, 1, mask))
        classes = np.where(rng.random(SHAPE) < skill, truth, rng.integers(0, 4, SHAPE))
        probabilities = np.full((4, *SHAPE), 0.1) + 0.6 * (np.arange(4)[:, None, None] == classes)
        np.save(folder / "oof" / f"{tile_id}.npy", probabilities.astype(np.float16))
    return folder


@pytest.fixture
def run(tmp_path, store) -> Path:
    """Return the folder of a run that is right more often than not."""
    return write_run(tmp_path / "runs" / "good", store, 0.7)


def pixels_of(run, store, tile_ids):
    """Return label codes and predicted classes of the labelled pixels of some tiles."""
    codes = np.concatenate([store.mask(tile_id).ravel() for tile_id in tile_ids])
    maps = [np.load(run / "oof" / f"{tile_id}.npy").astype(np.float32) for tile_id in tile_ids]
    guesses = [decide_classes(probs).ravel() for probs in maps]
    return codes[codes != IGNORE], np.concatenate(guesses)[codes != IGNORE]


def binary_mcc(run, store, tile_ids):
    """Return the MCC of glacier of either kind by scikit-learn."""
    codes, guesses = pixels_of(run, store, tile_ids)
    return matthews_corrcoef(np.isin(codes, [1, 2, 4]), np.isin(guesses, [1, 2]))


def test_scores_are_those_of_the_pixels(run, store):
    scores = report.score_run(run, store)
    pooled = scores["pooled"]["valid_pixels"]
    assert pooled["binary"]["mcc"] == pytest.approx(binary_mcc(run, store, store.tile_ids))
    certain = pixels_of(run, store, ["01_01", "02_01"])
    assert pooled["four_class"]["mcc"] == pytest.approx(matthews_corrcoef(*certain))
    for tile_id, tile in scores["tiles"].items():
        assert tile["valid_pixels"]["binary"]["mcc"] == pytest.approx(binary_mcc(run, store, [tile_id]))
        assert (tile["valid_pixels"]["four_class"] is None) == (LABELS[tile_id] == "phase1")
    assert np.sum(scores["confusion"]) == len(store.tile_ids) * (SHAPE[0] - 4) * SHAPE[1]
    assert json.loads((run / "scores.json").read_text()) == scores


def test_fold_means_are_over_the_folds_that_have_a_score(run, store):
    scores = report.score_run(run, store)
    members = {fold: [name for name in FOLDS if FOLDS[name] == fold] for fold in (0, 1, 2)}
    assert {int(fold): entry["tiles"] for fold, entry in scores["folds"].items()} == members
    by_hand = [binary_mcc(run, store, tile_ids) for tile_ids in members.values()]
    mean = scores["fold_mean"]
    assert mean["binary"]["mean"] == pytest.approx(np.mean(by_hand))
    assert mean["binary"]["std"] == pytest.approx(np.std(by_hand, ddof=1))
    assert (mean["binary"]["folds"], mean["four_class"]["folds"]) == (3, 2)


def test_nodata_counts_as_right_in_all_pixels_whatever_was_predicted(run, store):
    scores = report.score_run(run, store)  # the run predicts lakes there
    codes, guesses = pixels_of(run, store, store.tile_ids)
    nodata = np.zeros(len(store.tile_ids) * 4 * SHAPE[1], int)
    labels, predicted = (
        np.append(np.isin(codes, [1, 2, 4]), nodata),
        np.append(np.isin(guesses, [1, 2]), nodata),
    )
    expected = matthews_corrcoef(labels, predicted)
    assert scores["pooled"]["all_pixels"]["binary"]["mcc"] == pytest.approx(expected)


def test_a_fold_that_is_predicted_in_part_is_an_error_that_names_the_tiles(run, store):
    for tile_id in ("01_02", "02_01"):
        (run / "oof" / f"{tile_id}.npy").unlink()
    with pytest.raises(report.ReportError, match="no probabilities for 01_02, 02_01; expected"):
        report.score_run(run, store)
    assert not (run / "scores.json").exists()


def test_folds_that_are_predicted_are_scored_while_others_are_trained(run, store):
    for tile_id in ("01_01", "01_02"):
        (run / "oof" / f"{tile_id}.npy").unlink()
    scores = report.score_run(run, store)
    assert list(scores["folds"]) == ["1", "2"] and list(scores["tiles"]) == ["02_01", "02_02", "03_01"]
    mcc = binary_mcc(run, store, ["02_01", "02_02", "03_01"])
    assert scores["pooled"]["valid_pixels"]["binary"]["mcc"] == pytest.approx(mcc)
    for path in (run / "oof").iterdir():
        path.unlink()
    with pytest.raises(report.ReportError, match="no probabilities for 01_01, "):
        report.score_run(run, store)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros(SHAPE), np.zeros((4, 24, 24)), np.zeros((5, *SHAPE)), np.full((4, *SHAPE), np.nan)],
    ids=["classes", "size", "channels", "nan"],
)
def test_a_file_that_holds_no_probabilities_is_an_error_that_names_it(run, store, wrong):
    np.save(run / "oof" / "02_01.npy", wrong)
    with pytest.raises(report.ReportError, match=r"02_01\.npy.*expected finite probabilities of shape \(4, 24, 36\)"):
        report.score_run(run, store)


def test_the_scheme_is_read_from_the_configs_of_the_folds(run, store):
    (run / "run.json").unlink()
    for fold in (0, 1):
        (run / f"fold{fold}").mkdir()
        save_config(Config(data=DataConfig(scheme="stratified")), run / f"fold{fold}" / "config.yaml")
    assert report.score_run(run, store)["scheme"] == "stratified"
    save_config(Config(data=DataConfig(scheme="spatial")), run / "fold1" / "config.yaml")
    with pytest.raises(report.ReportError, match="spatial, stratified"):
        report.score_run(run, store)


def test_settings_are_those_of_the_run_and_of_each_member(run):
    for member, rate in (("unet", 0.5), ("wide", 0.25)):
        for fold in (0, 1):
            (run / member / f"fold{fold}").mkdir(parents=True)
            text = f"optim: {{lr: {rate}}}\ndata: {{scheme: stratified, class_shares: [1, 2]}}\n"
            (run / member / f"fold{fold}" / "config.yaml").write_text(text)
    settings = report.read_settings(run)
    assert settings["scheme"] == "stratified"
    assert (settings["unet: optim.lr"], settings["wide: optim.lr"]) == (0.5, 0.25)
    assert settings["wide: data.class_shares"] == [1, 2]
    assert report.find_scheme(run) == "stratified"


def test_a_run_that_names_no_scheme_is_an_error(run, store):
    (run / "run.json").unlink()
    with pytest.raises(report.ReportError, match="holds no finished run"):
        report.score_run(run, store)


@pytest.fixture
def written(tmp_path, store, run):
    """Return the Markdown of a report on two runs, its folder, and the scores.json of both."""
    runs = {"U-Net": run, "baseline": write_run(tmp_path / "runs" / "poor", store, 0.2)}
    out = tmp_path / "reports" / "out_of_fold.md"
    write_report(runs, store, out, ["make baseline", "make report"])
    scores = {name: json.loads((folder / "scores.json").read_text()) for name, folder in runs.items()}
    return out.read_text(), out.parent, scores


def table_rows(markdown, heading):
    """Return the rows of the first table after a heading, as lists of cells."""
    section = markdown.split(heading, 1)[1]
    table = re.search(r"(?:^\|.*\n?)+", section, re.MULTILINE).group()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_report_repeats_the_numbers_of_scores_json(written):
    markdown, _, scores = written
    for row in table_rows(markdown, "pooled pixels"):
        pooled, intervals = scores[row[0]]["pooled"], scores[row[0]]["intervals"]
        valid, everywhere = (
            [pooled[pixels][task]["mcc"] for task in ("binary", "four_class")]
            for pixels in ("valid_pixels", "all_pixels")
        )
        assert [value for value, _, _ in intervals.values()][:2] == valid
        doubts = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in intervals.values()]
        assert row[1:] == ["stratified", "5", *doubts, *[f"{value:.3f}" for value in everywhere]]
    for row in table_rows(markdown, "by fold"):
        entry = scores[row[0]]
        expected = [entry["folds"][fold]["valid_pixels"]["binary"]["mcc"] for fold in ("0", "1", "2")]
        mean = entry["fold_mean"]["binary"]
        assert row[1:] == [*[f"{value:.3f}" for value in expected], f"{mean['mean']:.3f} ± {mean['std']:.3f}"]
    for run, name, *values in table_rows(markdown, "## Classes"):
        pooled = scores[run]["pooled"]["valid_pixels"]
        group = pooled["four_class" if name in CLASS_NAMES else "binary"]
        assert values == [f"{group[key][name]:.3f}" for key in ("iou", "precision", "recall")]
    for tile_id, labels, *cells in table_rows(markdown, "by tile"):
        for cell, entry in zip(cells, scores.values()):
            tile = entry["tiles"][tile_id]["valid_pixels"]
            four = f" ({tile['four_class']['mcc']:.3f})" if labels == "phase2" else ""
            assert cell == f"{tile['binary']['mcc']:.3f}{four}"


def test_the_report_holds_its_commands_and_every_row(written):
    markdown, _, scores = written
    assert "```sh\nmake baseline\nmake report\n```" in markdown
    assert len(table_rows(markdown, "pooled pixels")) == len(scores)
    assert [row[0] for row in table_rows(markdown, "by tile")] == list(LABELS)
    assert [row[1] for row in table_rows(markdown, "## Classes")] == ["glacier_any", *CLASS_NAMES] * 2


def test_figures_are_small_and_linked_and_no_tile_is_among_them(written):
    markdown, folder, _ = written
    figures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["out_of_fold.md", *figures])
    for name in figures:
        assert (folder / name).stat().st_size < 100_000
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200


def test_the_same_runs_give_the_same_bytes(tmp_path, store, run):
    for name in ("a", "b"):
        write_report({"run": run}, store, tmp_path / name / "out.md")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_store_without_phase2_labels_has_a_report(tmp_path):
    with create(tmp_path / "store") as writer:
        mask = np.zeros(SHAPE, np.uint8)
        mask[:12] = GLACIER_OR_DEBRIS
        writer.write_tile("01_01", np.ones((*SHAPE, 5)), mask)
        row = TileRow("01_01", "made", None, None, "phase1", 1.0, count_codes(mask))
        writer.write_index([row], {}, {"stratified": {"01_01": 0}}, {})
    store = TileStore(tmp_path / "store")
    run = write_run(tmp_path / "run", store, 1.0)
    write_report({"run": run}, store, tmp_path / "out.md")
    assert table_rows((tmp_path / "out.md").read_text(), "pooled pixels") == [
        ["run", "stratified", "1", "1.000 (1.000 to 1.000)", "–", "–", "1.000", "–"]
    ]


def test_the_report_names_the_weights_that_it_is_about(tmp_path, store, run):
    (tmp_path / "model.pth").write_bytes(b"weights")
    write_report({"run": run}, store, tmp_path / "out.md", weights=tmp_path / "model.pth")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert f"\nWeights: SHA-256 {digest}\n" in (tmp_path / "out.md").read_text()


@pytest.mark.parametrize("given", [["runs/x"], ["a="], ["a=x", "a=y"]])
def test_runs_are_named(given):
    with pytest.raises(report.ReportError, match="NAME=FOLDER"):
        read_run_names(given)


def test_false_colour_stretches_each_band_and_leaves_nodata_white():
    image = np.zeros((10, 10, 5), np.float32)
    image[..., 3] = np.arange(100).reshape(10, 10)  # SWIR is shown as red
    image[0, 0, 2] = np.nan  # one band only, or it would shine in the colour of that band
    picture = false_colour(image)
    assert picture.dtype == np.uint8
    assert (picture[0, 0] == 255).all()
    assert picture[9, 9, 0] == 255
    assert picture[0, 1, 0] == 0
    assert (np.diff(picture[..., 0].ravel()[1:].astype(int)) >= 0).all()


def test_every_code_has_a_colour_of_its_own():
    codes = np.array([[0, 1, 2, 3, GLACIER_OR_DEBRIS, OTHER_OR_LAKE, IGNORE]])
    assert len({tuple(colour) for colour in paint_codes(codes)[0]}) == codes.size
