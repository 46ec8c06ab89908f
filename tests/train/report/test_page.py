"""The page of a run: whole HTML that needs nothing else, with the scores of its pixels and true pictures."""

import argparse
import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import matthews_corrcoef
from support import PROJECT
from train_helpers import make_store

from prep.labels import CODE_CLASSES, IGNORE
from prep.store import TileStore
from solution import decide_classes, valid_mask
from train.masks.pictures import OUTCOME_COLOURS, Outcome, map_outcomes, paint_codes
from train.report.figures import draw_learning, draw_reliability
from train.report.page import add_report_arguments, map_uri, read_histories, run_report
from train.report.reliability import count_reliability, pool_reliability

VOID = {"meta", "img", "br", "link", "input", "hr"}
NAME = '<i>U-Net</i> & "co"'
EPOCHS = 3


class Page(HTMLParser):
    """Elements of a page as (name, attributes, text so far inside), with what is wrong in their nesting."""

    def __init__(self, text: str) -> None:
        """Parse a page."""
        super().__init__()
        self.open: list[dict] = []
        self.elements: list[dict] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += [f"never closed: {element['element']}" for element in self.open]

    def handle_starttag(self, tag, attrs):
        element = {"element": tag, "text": "", **dict(attrs), "inside": [e["element"] for e in self.open]}
        self.elements.append(element)
        if len(dict(attrs)) < len(attrs):
            self.wrong.append(f"{tag}: an attribute twice")
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1]["element"] != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")
        else:
            self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def find(self, name: str, **attributes: str) -> list[dict]:
        """Return the elements of a name whose attributes hold these words."""
        keys = {key.rstrip("_").replace("_", "-"): word for key, word in attributes.items()}
        named = [element for element in self.elements if element["element"] == name]
        return [e for e in named if all(word in (e.get(key) or "") for key, word in keys.items())]

    def table(self, title: str) -> list[list[str]]:
        """Return the rows of the table with a title, cells as text."""
        rows, seen = [], False
        for element in self.elements:
            if element["element"] == "table":
                seen = title in element["aria-label"]
            elif seen and element["element"] == "tr":
                rows.append([])
            elif seen and element["element"] in ("td", "th"):
                rows[-1].append(element["text"])
        return rows


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Path:
    """Return a folder with a store, a trained run of two folds on it, a baseline, and their page."""
    folder = tmp_path_factory.mktemp("page")
    store = TileStore(make_store(folder / "store"))
    write_run(folder / "run", store, 0.8)
    for fold in (0, 1):
        (folder / "run" / "unet" / f"fold{fold}").mkdir(parents=True)
        rows = [f"{epoch},{2 / epoch},{3 / epoch + fold},{epoch / 10},0.001" for epoch in range(1, EPOCHS + 1)]
        text = "\n".join(["epoch,train_loss,val_loss,val_mcc,lr", *rows])
        (folder / "run" / "unet" / f"fold{fold}" / "history.csv").write_text(text)
    write_run(folder / "baseline", store, 0.6)
    assert write(folder, folder / "index.html") == 0
    return folder


def write_run(folder: Path, store: TileStore, skill: float) -> None:
    """Write probabilities that are right for a share `skill` of the pixels and random elsewhere."""
    rng = np.random.default_rng(0)
    (folder / "oof").mkdir(parents=True)
    (folder / "run.json").write_text('{"scheme": "stratified", "note": "six <views>"}')
    for tile_id in store.tile_ids:
        codes = store.mask(tile_id)
        truth = np.where(codes == IGNORE, 3, np.where(codes == 4, 1, codes))
        classes = np.where(rng.random(codes.shape) < skill, truth, rng.integers(0, 4, codes.shape))
        probs = rng.random((4, *codes.shape)) + 2 * (np.arange(4)[:, None, None] == classes)
        np.save(folder / "oof" / f"{tile_id}.npy", (probs / probs.sum(axis=0)).astype(np.float16))


def write(kit: Path, out: Path) -> int:
    """Write the page by the command's arguments."""
    return report(f"{NAME}={kit / 'run'}", f"baseline={kit / 'baseline'}", kit=kit, out=out)


def report(*runs: str, kit: Path, out: Path) -> int:
    """Run `report` on the store of `kit`."""
    parser = argparse.ArgumentParser()
    add_report_arguments(parser)
    words = [
        *runs,
        "--store",
        kit / "store",
        "--out",
        kit / "out.md",
        "--html",
        out,
        "--made-with",
        "make <x>",
    ]
    return run_report(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def text(kit) -> str:
    """Return the page."""
    return (kit / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Page:
    """Return the page, parsed."""
    return Page(text)


@pytest.fixture(scope="module")
def store(kit) -> TileStore:
    """Return the store."""
    return TileStore(kit / "store")


def codes_and_classes(kit, store, run, tile_ids):
    """Return label codes and predicted classes of the labelled pixels of some tiles."""
    codes = np.concatenate([store.mask(tile).ravel() for tile in tile_ids])
    maps = [np.load(kit / run / "oof" / f"{tile}.npy").astype(np.float32) for tile in tile_ids]
    classes = np.concatenate([decide_classes(probs).ravel() for probs in maps])
    return codes[codes != IGNORE], classes[codes != IGNORE]


def binary_mcc(kit, store, run, tile_ids) -> float:
    """Return the MCC of glacier of either kind by scikit-learn."""
    codes, classes = codes_and_classes(kit, store, run, tile_ids)
    return matthews_corrcoef(np.isin(codes, [1, 2, 4]), np.isin(classes, [1, 2]))


# --- Structure ----------------------------------------------------------------------------------------------


def test_the_page_is_well_formed(page, text):
    assert text.startswith("<!DOCTYPE html>")
    assert not page.wrong
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(ids) == len(set(ids))
    links = [element["href"] for element in page.elements if "href" in element]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    assert page.find("html", lang="en") and page.find("meta", name_="viewport")
    headings = [int(e["element"][1]) for e in page.elements if re.fullmatch("h[1-6]", e["element"])]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(headings, headings[1:]))


def test_the_page_needs_no_other_file_and_no_network(page, text):
    sources = [e[key] for e in page.elements for key in ("src", "srcset", "data", "xlink:href") if key in e]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not page.find("link") and not page.find("iframe") and not page.find("svg")
    outside_pictures = re.sub(r"data:image/[^\"]*", "", text)
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import", outside_pictures)


def test_everything_can_be_read_without_seeing_it(page, store):
    pictures = page.find("img")
    charts = page.find("img", class_="chart")
    assert len(charts) == 5, "tiles, confusion, two of reliability, one of learning"
    assert len(pictures) == len(charts) + len(store.tile_ids) * (2 + 2 * 2)
    assert all(len(picture["alt"]) > 10 for picture in pictures)
    assert len({picture["alt"] for picture in pictures}) == len(pictures)
    assert all(e["scope"] in ("row", "col") for e in page.find("th"))
    assert all(e["aria-label"] for e in page.find("table"))
    labelled = [e for e in page.find("select") if "label" in e["inside"]]
    assert len(labelled) == len(page.find("select")) == 2


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2.2)."""
    parts = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_ground(text, mode):
    found = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", text)
    colours = {name: luminance(pair[mode]) for name, *pair in found}
    need = {"ink": 7, "soft": 4.5, "accent": 4.5}
    for name, least in need.items():
        for ground in ("ground", "surface"):
            low, high = sorted((colours[name], colours[ground]))
            assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


def test_names_are_escaped(page, text):
    assert "<i>" not in text and "six <views>" not in text
    assert page.find("option") and page.find("option")[0]["text"] == NAME
    assert not page.find("i") and not page.find("views")
    shown = [element["text"] for element in page.find("pre")]
    assert shown[0] == "make <x>" and "note: six <views>" in shown[1]


# --- Figures ------------------------------------------------------------------------------------------------


def test_headline_and_folds_are_those_of_the_pixels(kit, page, store):
    folds = store.fold_of("stratified")
    runs = {NAME: "run", "baseline": "baseline"}
    rows = {row[0]: row[1:] for row in page.table("Out-of-fold scores")[1:]}
    for name, run in runs.items():
        extent = binary_mcc(kit, store, run, store.tile_ids)
        certain = [row.tile_id for row in store.tiles if row.labels == "phase2"]
        four = matthews_corrcoef(*codes_and_classes(kit, store, run, certain))
        assert rows[name][:2] == ["stratified", str(len(store.tile_ids))]
        for cell, value in zip(rows[name][2:], (extent, four)):
            assert re.match(rf"{value:.3f} \(0\.\d+ to 0\.\d+\)$", cell)
    for name, *cells in page.table("Extent MCC by fold")[1:]:
        members = [[tile for tile in folds if folds[tile] == fold] for fold in (0, 1)]
        assert cells[:2] == [f"{binary_mcc(kit, store, runs[name], tiles):.3f}" for tiles in members]


def test_tiles_come_worst_first_with_their_own_scores(kit, page, store):
    articles = page.find("article")
    scores = [float(article["data-mcc"].split()[0]) for article in articles]
    assert scores == sorted(scores)
    assert {article["data-tile"] for article in articles} == set(store.tile_ids)
    for article in articles:
        tile = article["data-tile"]
        expected = [binary_mcc(kit, store, run, [tile]) for run in ("run", "baseline")]
        assert [float(value) for value in article["data-mcc"].split()] == pytest.approx(expected, abs=1e-6)
        codes, _ = codes_and_classes(kit, store, "run", [tile])
        assert float(article["data-glacier"]) == pytest.approx(np.isin(codes, [1, 2, 4]).mean(), abs=1e-6)
        assert f"fold {store.fold_of('stratified')[tile]}" in article["text"]


def test_learning_curves_are_those_of_the_histories(kit):
    histories = read_histories(kit / "run")
    assert list(histories) == ["unet/fold0", "unet/fold1"]
    axes = draw_learning(histories).axes
    assert [list(line.get_ydata()) for line in axes[1].lines] == [[0.1, 0.2, 0.3]] * 2
    assert [list(line.get_ydata()) for line in axes[0].lines[2:]] == [[4, 2.5, 2], [2, 1, 2 / 3]]


# --- Pictures -----------------------------------------------------------------------------------------------


def decode(picture: dict) -> np.ndarray:
    """Return the pixels (H, W, 3) of an img element."""
    content = base64.b64decode(picture["src"].split(",", 1)[1])
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert("RGB"))


def test_pictures_show_label_prediction_and_errors(kit, page, store):
    for tile in store.tile_ids:
        image, codes = store.image(tile), store.mask(tile)
        classes = decide_classes(np.load(kit / "run" / "oof" / f"{tile}.npy").astype(np.float32))
        pictures = {p["class"]: p for p in reversed(page.find("img", alt=f"Tile {tile},"))}  # the first run's
        assert decode(pictures["image"]).shape == (*codes.shape, 3)
        assert (decode(pictures["label"]) == paint_codes(codes)).all()
        assert (decode(pictures["prediction"]) == paint_codes(np.where(valid_mask(image), classes, 255))).all()
        shown = decode(pictures["errors"])
        for outcome, colour in OUTCOME_COLOURS.items():
            same = (shown == list(bytes.fromhex(colour[1:]))).all(axis=-1)
            assert (same == (map_outcomes(codes, classes) == outcome)).all()


def test_outcomes_are_those_that_a_pixel_by_pixel_reading_gives():
    for code, allowed in {**CODE_CLASSES, IGNORE: ()}.items():
        for predicted in range(4):
            glacier, found = bool(set(allowed) & {1, 2}), predicted in (1, 2)
            if code == IGNORE:
                expected = Outcome.NO_LABEL
            elif glacier != found:
                expected = Outcome.MISSED if glacier else Outcome.FALSE_ALARM
            elif predicted not in allowed:
                expected = Outcome.WRONG_KIND
            else:
                expected = Outcome.RIGHT_GLACIER if glacier else Outcome.RIGHT_REST
            assert map_outcomes(np.array([[code]]), np.array([[predicted]])) == expected


def test_a_large_tile_is_shown_smaller(tmp_path):
    codes = np.zeros((1100, 700), np.uint8)
    picture = decode({"src": map_uri(codes, {0: "#102030"})})
    assert picture.shape == (367, 234, 3)
    assert (picture == [16, 32, 48]).all()


# --- Reliability --------------------------------------------------------------------------------------------


def test_reliability_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    tiles = []
    for _ in range(2):
        codes = rng.choice([0, 1, 2, 3, 4, 5, IGNORE], (40, 50)).astype(np.uint8)
        probs = rng.dirichlet([0.5] * 4, (40, 50)).transpose(2, 0, 1).astype(np.float32)
        tiles.append((codes, probs))
    found = pool_reliability([count_reliability(*tile, bins=10) for tile in tiles])
    codes = np.concatenate([codes.ravel() for codes, _ in tiles])
    share = np.concatenate([(probs[1] + probs[2]).ravel() for _, probs in tiles])[codes != IGNORE]
    truth = np.isin(codes[codes != IGNORE], [1, 2, 4])
    frequency, said = calibration_curve(truth, np.clip(share, 0, 1), n_bins=10)
    assert found.glacier / found.pixels == pytest.approx(frequency)
    assert found.probability / found.pixels == pytest.approx(said, abs=1e-6)
    line = draw_reliability(found).axes[0].lines[1]
    np.testing.assert_allclose(line.get_xydata(), np.transpose([said, frequency]), atol=1e-6)
    error = sum(count / len(share) * abs(f - p) for count, f, p in zip(found.pixels, frequency, said))
    assert found.expected_calibration_error == pytest.approx(error, abs=1e-6)


def test_probabilities_that_hold_what_they_say_have_no_error():
    codes = np.array([[1, 0, 0, 0]] * 4, np.uint8)
    probs = np.zeros((4, 4, 4), np.float32)
    probs[1], probs[0] = 0.25, 0.75
    counts = count_reliability(codes, probs)
    assert counts.expected_calibration_error == pytest.approx(0)
    assert counts.pixels.sum() == 16


# --- The command --------------------------------------------------------------------------------------------


def test_the_same_runs_give_the_same_page(kit, text):
    assert write(kit, kit / "again.html") == 0
    assert (kit / "again.html").read_text(encoding="utf-8") == text


def test_one_run_without_history_is_enough(kit):
    assert report(f"b={kit / 'baseline'}", kit=kit, out=kit / "one.html") == 0
    page = Page((kit / "one.html").read_text(encoding="utf-8"))
    assert not page.wrong and not page.find("section", id="learning") and page.find("section", id="tiles")


def test_tiles_that_a_run_has_not_predicted_yet_are_not_on_the_page(kit, store):
    half = kit / "half"
    (half / "oof").mkdir(parents=True)
    (half / "run.json").write_text('{"scheme": "stratified"}')
    for tile in ("000", "001"):
        shutil.copy(kit / "run" / "oof" / f"{tile}.npy", half / "oof")
    assert report(f"a={kit / 'run'}", f"half={half}", kit=kit, out=kit / "half.html") == 0
    page = Page((kit / "half.html").read_text(encoding="utf-8"))
    assert {article["data-tile"] for article in page.find("article")} == {"000", "001"}
    assert [row[2] for row in page.table("Out-of-fold scores")[1:]] == ["4", "2"]


def test_the_page_with_tiles_in_it_stays_out_of_the_repository():
    assert "reports/local/" in (PROJECT / ".gitignore").read_text(encoding="utf-8").splitlines()
