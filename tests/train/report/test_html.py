"""The page of a run: whole HTML that needs nothing else, with the figures of train.metrics, true pictures."""

import base64
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix, matthews_corrcoef
from support import PROJECT
from train_helpers import make_store

from prep.labels import CODE_CLASSES, IGNORE
from prep.store import TileStore
from solution import decide_classes, valid_mask
from train.__main__ import main
from train.config import load_config
from train.fit import fit_all
from train.masks.pictures import OUTCOME_COLOURS, Outcome, map_outcomes, paint_codes
from train.predict import predict_run
from train.report.evidence import read_history
from train.report.markup import Html, join, tag
from train.report.reliability import count_reliability, pool_reliability
from train.report.tables import ReportError, read_run_names

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
    """Return a folder with a store, a run of two folds and three epochs on it, a baseline, and their page."""
    folder = tmp_path_factory.mktemp("page")
    make_store(folder / "store")
    settings = [f"data.store={folder / 'store'}", f"train.epochs={EPOCHS}", "optim.schedule=cosine"]
    config = load_config(PROJECT / "train" / "configs" / "smoke.yaml", settings)
    fit_all(config, folder / "run")
    store = TileStore(folder / "store")
    predict_run(folder / "run", store)
    write_baseline(folder / "baseline", store)
    steps = [{"step": "six <views>", "before": [0.5], "after": [0.625], "kept": True, "choice": "6 & more"}]
    (folder / "calibration.json").write_text(json.dumps({"runs": ["run"], "views": 6, "steps": steps}))
    cells = [
        {"members": 1, "views": v, "passes": v, "gmac": 2.5 * v, "objective": 0.4 + v / 100, "nested": 0.4}
        | {"binary": 0.5, "four_class": None}
        for v in (1, 2)
    ]
    (folder / "passes.json").write_text(json.dumps({"runs": ["run"], "steps": cells}))
    assert write(folder, folder / "index.html") == 0
    return folder


def write_baseline(folder: Path, store: TileStore) -> None:
    """Write probabilities that are right for about two thirds of the pixels, as a run of `baseline`."""
    rng = np.random.default_rng(0)
    (folder / "oof").mkdir(parents=True)
    (folder / "run.json").write_text('{"model": "baseline", "scheme": "stratified", "seed": 0}')
    for tile_id in store.tile_ids:
        codes = store.mask(tile_id)
        truth = np.where(codes == IGNORE, 3, np.where(codes == 4, 1, codes))
        classes = np.where(rng.random(codes.shape) < 0.6, truth, rng.integers(0, 4, codes.shape))
        probs = rng.random((4, *codes.shape)) + 2 * (np.arange(4)[:, None, None] == classes)
        np.save(folder / "oof" / f"{tile_id}.npy", (probs / probs.sum(axis=0)).astype(np.float16))


def write(kit: Path, out: Path, *more: str) -> int:
    """Write the page by the command line."""
    runs = [f"{NAME}={kit / 'run'}", f"baseline={kit / 'baseline'}"]
    files = ["--store", kit / "store", "--out", kit / "out.md", "--html", out]
    later = ["--calibration", kit / "calibration.json", "--passes", kit / "passes.json"]
    return main([str(word) for word in ["report", *runs, *files, *later, *more]])


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
    assert not page.find("link") and not page.find("iframe")
    outside_pictures = re.sub(r"data:image/[^\"]*", "", text)
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import", outside_pictures)


def test_everything_can_be_read_without_seeing_it(page, store):
    pictures = page.find("img")
    assert len(pictures) == len(store.tile_ids) * (2 + 2 * 2)
    assert all(len(picture["alt"]) > 10 for picture in pictures)
    assert len({picture["alt"] for picture in pictures}) == len(pictures)
    drawings = [e for e in page.find("svg") if e.get("aria-hidden") != "true"]
    assert drawings and all(e["role"] == "img" and e["aria-label"] for e in drawings)
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
    need = {"ink": 7, "soft": 4.5, "accent": 4.5, **{f"s{number}": 3 for number in range(8)}}
    for name, least in need.items():
        for ground in ("ground", "surface"):
            low, high = sorted((colours[name], colours[ground]))
            assert (high + 0.05) / (low + 0.05) >= least, (name, ground)
    low, high = sorted((colours["ink"], colours["heat"]))  # numbers in the confusion matrices
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_names_are_escaped(page, text):
    assert "<i>" not in text and "six <views>" not in text
    assert page.find("option") and page.find("option")[0]["text"] == NAME
    assert not page.find("i") and not page.find("views")
    assert page.table("Steps after the passes")[1][0] == "six <views>"


def test_markup_escapes_all_that_is_no_markup():
    assert tag("p", "a < b & c", title='"x"') == '<p title="&quot;x&quot;">a &lt; b &amp; c</p>'
    assert tag("p", tag("b", "x"), hidden=True, class_=None) == "<p hidden><b>x</b></p>"
    assert isinstance(join("<", tag("br")), Html) and join("<", tag("br")) == "&lt;<br>"


# --- Figures ------------------------------------------------------------------------------------------------


def test_headline_and_folds_are_those_of_the_pixels(kit, page, store):
    folds = store.fold_of("stratified")
    runs = {NAME: "run", "baseline": "baseline"}
    pooled = {name: binary_mcc(kit, store, run, store.tile_ids) for name, run in runs.items()}
    rows = {row[0]: row[1:] for row in page.table("Out-of-fold Matthews correlation")[1:]}
    for name, run in runs.items():
        certain = [row.tile_id for row in store.tiles if row.labels == "phase2"]
        four = matthews_corrcoef(*codes_and_classes(kit, store, run, certain))
        assert rows[name][:3] == ["stratified", signed(pooled[name]), signed(four)]
    gain = f"{pooled[NAME] - pooled['baseline']:+.3f}".replace("-", "−")
    assert rows[NAME][-1] == f"{gain} baseline" and rows["baseline"][-1] == "–"
    assert [card["text"] for card in page.find("p", class_="big")] == [signed(pooled[NAME])]
    for name, *cells in page.table("Glacier of either kind by fold")[1:]:
        members = [[tile for tile in folds if folds[tile] == fold] for fold in (0, 1)]
        assert cells[:2] == [signed(binary_mcc(kit, store, runs[name], tiles)) for tiles in members]


def signed(value: float) -> str:
    """Return a number as the page shows it."""
    return f"{value:.3f}".replace("-", "−")


def test_confusion_is_that_of_the_pixels(kit, page, store):
    codes, classes = codes_and_classes(kit, store, "run", store.tile_ids)
    counts = confusion_matrix(np.isin(codes, [1, 2, 4]), np.isin(classes, [1, 2]))
    rows = page.table(f"{NAME}: glacier of either kind")[1:]
    for row, line in zip(rows, counts):
        assert row[1:] == [f"{100 * count / line.sum():.1f} %{count:,}" for count in line]


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


def test_learning_curves_are_those_of_the_histories(kit, page):
    for column, title in {"lr": "Learning rate", "val_mcc": "Validation MCC"}.items():
        assert page.find("svg", aria_label=title)
        paths = curves(page, title)
        assert len(paths) == 2
        values, heights = [], []
        for fold, path in enumerate(paths):
            with open(kit / "run" / f"fold{fold}" / "history.csv", newline="") as lines:
                values += [float(row[column]) for row in csv.DictReader(lines)]
            points = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)
            assert len(points) == EPOCHS
            heights += [float(y) for _, y in points]
        slope, _ = np.polyfit(values, heights, 1)  # pixels are a falling linear function of what they show
        assert slope < 0
        assert np.polyval(np.polyfit(values, heights, 1), values) == pytest.approx(heights, abs=0.02)


def curves(page: Page, title: str) -> list[str]:
    """Return the paths of the lines of the chart whose description holds a title."""
    start = next(i for i, e in enumerate(page.elements) if title in (e.get("aria-label") or ""))
    rest = page.elements[start + 1 :]
    end = next((i for i, e in enumerate(rest) if e["element"] == "svg"), len(rest))
    return [e["d"] for e in rest[:end] if e["element"] == "path" and "line" in e["class"]]


def test_steps_and_passes_are_shown_where_they_are_given(page):
    assert page.table("Steps after the passes")[1] == ["six <views>", "0.5000", "0.6250", "kept", "6 & more"]
    assert page.table("Networks and views")[2][:4] == ["1 × 2", "2", "5.0", "0.420"]


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
        assert (
            decode(pictures["prediction"]) == paint_codes(np.where(valid_mask(image), classes, 255))
        ).all()
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
    from train.report.images import map_uri

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
    assert found.frequency == pytest.approx(frequency)
    assert found.mean_probability == pytest.approx(said, abs=1e-6)
    error = sum(count / len(share) * abs(f - p) for count, f, p in zip(found.pixels, frequency, said))
    assert found.expected_calibration_error == pytest.approx(error, abs=1e-6)
    assert found.brier == pytest.approx(brier_score_loss(truth, np.clip(share, 0, 1)), abs=1e-6)


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


def test_one_run_without_history_or_later_steps_is_enough(kit):
    out = kit / "one.html"
    words = ["report", f"b={kit / 'baseline'}", "--store", str(kit / "store"), "--out", str(kit / "one.md")]
    assert main([*words, "--html", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert not page.wrong and not page.find("section", id="learning") and page.find("section", id="tiles")


def test_any_run_can_be_what_others_are_compared_with(kit, store):
    out, runs = kit / "against.html", [f"a={kit / 'run'}", f"b={kit / 'run'}"]
    words = ["report", *runs, "--store", str(kit / "store"), "--out", str(kit / "two.md"), "--html", str(out)]
    assert main([*words, "--against", "b"]) == 0
    rows = Page(out.read_text(encoding="utf-8")).table("Out-of-fold Matthews correlation")[1:]
    assert [row[-1] for row in rows] == ["+0.000 b", "–"]
    assert main([*words, "--against", "c"]) == 2


def test_files_that_cannot_be_read_are_named(kit, tmp_path, capsys):
    assert write(kit, tmp_path / "x.html", "--passes", str(tmp_path / "none.json")) == 2
    assert "none.json" in capsys.readouterr().err
    (tmp_path / "fold0").mkdir()
    history = shutil.copy(kit / "run" / "fold0" / "history.csv", tmp_path / "fold0")
    Path(history).write_text("epoch,lr\n1,0.1\n")
    with pytest.raises(ReportError, match="history.csv.*train_loss"):
        read_history(Path(history), "last")
    for given in (["runs/x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(ReportError, match="NAME=FOLDER"):
            read_run_names(given)


def test_the_page_with_tiles_in_it_stays_out_of_the_repository():
    assert "reports/index.html" in (PROJECT / ".gitignore").read_text(encoding="utf-8").splitlines()
