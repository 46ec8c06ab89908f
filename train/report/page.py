"""One HTML file that needs no other: scores, learning curves, reliability, and pictures of every tile."""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

from prep.files import write_whole
from prep.labels import CODE_NAMES, IGNORE
from prep.store import TileStore
from solution import decide_classes, valid_mask
from train.masks.pictures import (
    CODE_COLOURS,
    OUTCOME_COLOURS,
    OUTCOME_NAMES,
    Outcome,
    false_colour,
    map_outcomes,
)
from train.objective import binary
from train.report.figures import (
    data_uri,
    draw_confusions,
    draw_learning,
    draw_reliability,
    draw_tiles,
    figure_uri,
)
from train.report.reliability import Reliability, count_reliability, pool_reliability
from train.report.scores import load_probabilities, read_settings
from train.report.tables import fold_table, pooled_table, read_run_names, write_report
from train.run import HISTORY_FILE

LONGEST_SIDE = 512  # px of a picture
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
QUALITY = 75  # of WebP, 0-100: false colour of 512 x 512 px takes about 60 kB


class Picture(NamedTuple):
    """A picture of a tile: its data URI, its kind ("image", "label", "prediction", "errors"), what is below it,
    and of which run it is (None: of the tile)."""

    source: str
    kind: str
    caption: str
    facts: str = ""
    run: int | None = None


def write_page(
    run_dirs: Mapping[str, Path],
    scores: Mapping[str, dict],
    store: TileStore,
    out: str | os.PathLike,
    commands: Sequence[str] = (),
) -> Path:
    """Write the page on some runs, with the tiles that all of them hold out, and return its path.

    It embeds the tiles: where they are not free to be published, neither is the page. The same runs give the
    same bytes.

    Args:
        run_dirs: name of each run on the page, and its folder; tiles are sorted by the first.
        scores: of each run, as `train.report.scores.score_run` returns them.
        store: the tiles of all of them.
        out: the file, e.g. reports/index.html.
        commands: what to type to make the runs and this page again.

    Raises:
        ReportError: a run cannot be read.
    """
    first, *others = scores.values()
    shared = [tile for tile in first["tiles"] if all(tile in other["tiles"] for other in others)]
    tiles, counts = [], []
    shared.sort(key=lambda tile: first["tiles"][tile]["valid_pixels"]["binary"]["mcc"])
    for tile_id in tqdm(shared, desc="pictures", unit="tile", disable=None):
        codes, image = store.mask(tile_id), store.image(tile_id)
        probs = {name: load_probabilities(Path(run), store, tile_id) for name, run in run_dirs.items()}
        tiles.append(describe_tile(tile_id, image, codes, probs, scores))
        counts.append([count_reliability(codes, maps) for maps in probs.values()])
    reliability = {name: pool_reliability(run) for name, run in zip(run_dirs, zip(*counts))}
    content = {
        "runs": list(run_dirs),
        "commands": "\n".join(commands),
        "settings": {name: read_settings(Path(folder)) for name, folder in run_dirs.items()},
        "pooled": pooled_table(scores),
        "folds": fold_table(scores, "binary"),
        "figures": _figures(run_dirs, scores, reliability),
        "swatches": {"Classes": _swatches(CODE_COLOURS), "Errors": _swatches(OUTCOME_COLOURS, OUTCOME_NAMES)},
        "tiles": tiles,
    }
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = TEMPLATES.get_template("page.html").render(content)
    # a tile id may be no valid UTF-8
    write_whole(out, lambda part: part.write_text(text, encoding="utf-8", errors="replace"))
    return out


def _figures(
    run_dirs: Mapping[str, Path], scores: Mapping[str, dict], reliability: Mapping[str, Reliability]
) -> dict[str, list[tuple[str, str]]]:
    """Return (caption, data URI) of the figures of each section."""
    histories = {name: read_histories(Path(folder)) for name, folder in run_dirs.items()}
    return {
        "tiles": [("Extent MCC of each tile", figure_uri(draw_tiles(scores)))],
        "confusion": [("Share of each label's pixels by predicted class", figure_uri(draw_confusions(scores)))],
        "reliability": [
            (
                f"{name}: expected calibration error {counts.expected_calibration_error:.4f}",
                figure_uri(draw_reliability(counts)),
            )
            for name, counts in reliability.items()
        ],
        "learning": [
            (f"{name}: loss (dashed: training crops) and validation MCC", figure_uri(draw_learning(curves)))
            for name, curves in histories.items()
            if curves
        ],
    }


def read_histories(run_dir: Path) -> dict[str, pd.DataFrame]:
    """Return the epochs of each fold of a run that holds tiles out, by its folder such as "unet/fold0"."""
    paths = sorted(run_dir.rglob(f"fold[0-9]*/{HISTORY_FILE}"))
    return {path.parent.relative_to(run_dir).as_posix(): pd.read_csv(path) for path in paths}


# --- Tiles --------------------------------------------------------------------------------------------------


def describe_tile(
    tile_id: str,
    image: np.ndarray,
    codes: np.ndarray,
    probs: Mapping[str, np.ndarray],
    scores: Mapping[str, dict],
) -> dict:
    """Return what the page shows of a tile: its facts and pictures, and each run's extent MCC.

    Args:
        tile_id: of the tile.
        image: (H, W, 5) in physical units.
        codes: (H, W) label codes.
        probs: of each run, (4, H, W) class probabilities.
        scores: of each run, as `write_page` takes them.
    """
    entries = {name: run["tiles"][tile_id] for name, run in scores.items()}
    first = next(iter(entries.values()))
    counts = np.array(first["confusion"])
    labelled = max(1, int(counts.sum()))
    share = binary(counts)[1].sum() / labelled
    folds = ", ".join(dict.fromkeys(str(entry["fold"]) for entry in entries.values()))
    pictures = [
        Picture(photo_uri(false_colour(image)), "image", "SWIR, red, green in false colour"),
        Picture(map_uri(codes, CODE_COLOURS), "label", f"label, {first['labels']}"),
    ]
    for index, (name, maps) in enumerate(probs.items()):
        classes = decide_classes(maps)
        shown = map_uri(np.where(valid_mask(image), classes, IGNORE), CODE_COLOURS)
        pictures.append(Picture(shown, "prediction", f"{name}: prediction", run=index))
        outcomes = map_outcomes(codes, classes)
        facts = _facts(outcomes, entries[name]["valid_pixels"], labelled)
        errors = map_uri(outcomes, OUTCOME_COLOURS)
        pictures.append(Picture(errors, "errors", f"{name}: errors", facts, index))
    return {
        "id": tile_id,
        "about": f"fold {folds} · glacier {share:.0%} of valid pixels · nodata "
        f"{first['ignored'] / max(1, codes.size):.0%} · {first['labels']} labels",
        "mcc": [entry["valid_pixels"]["binary"]["mcc"] for entry in entries.values()],
        "glacier": share,
        "pictures": pictures,
    }


def _facts(outcomes: np.ndarray, scores: Mapping, labelled: int) -> str:
    """Return scores of a run on a tile and the shares of its errors in words."""
    four = f", four classes {scores['four_class']['mcc']:.3f}" if scores["four_class"] else ""
    missed, false = (np.count_nonzero(outcomes == kind) / labelled for kind in (Outcome.MISSED, Outcome.FALSE_ALARM))
    return f"extent MCC {scores['binary']['mcc']:.3f}{four}, missed {missed:.1%}, false {false:.1%}"


def _swatches(colours: Mapping[int, str], names: Mapping[int, str] = CODE_NAMES) -> list[tuple[str, str]]:
    return [("nodata" if code == IGNORE else names[code].replace("_", " "), colour) for code, colour in colours.items()]


def photo_uri(picture: np.ndarray) -> str:
    """Return a picture (H, W, 3) uint8 as a data URI."""
    return _uri(Image.fromarray(thin_out(picture)), "WEBP", quality=QUALITY)


def map_uri(codes: np.ndarray, colours: Mapping[int, str]) -> str:
    """Return a map (H, W) uint8 in the colours ("#rrggbb") of its codes as a data URI, every pixel exact."""
    palette = np.zeros((256, 3), np.uint8)
    for code, colour in colours.items():
        palette[code] = tuple(bytes.fromhex(colour[1:]))
    image = Image.fromarray(np.ascontiguousarray(thin_out(codes), dtype=np.uint8))
    image.putpalette(palette.tobytes())
    return _uri(image, "PNG", optimize=True)


def thin_out(picture: np.ndarray) -> np.ndarray:
    """Return every n-th pixel (H, W, ...), so that no side is longer than LONGEST_SIDE."""
    step = -(-max(picture.shape[:2]) // LONGEST_SIDE)
    return picture[::step, ::step]


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return data_uri(kind.lower(), content.getvalue())


# --- The command ---------------------------------------------------------------------------------------------


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="evaluated runs and their names")
    out = Path("reports/local/out_of_fold.md")
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")
    parser.add_argument(
        "--made-with", action="append", default=[], metavar="LINE", help="a command to show in the report"
    )
    parser.add_argument("--weights", type=Path, help="the model.pth made of these runs, for its checksum")
    parser.add_argument("--html", type=Path, help="a page with pictures of all tiles, e.g. reports/index.html")
    parser.add_argument("--store", type=Path, default=Path("data/competition"), help="default: %(default)s")


def run_report(arguments: argparse.Namespace) -> int:
    """Report out-of-fold scores of runs in Markdown, with figures, and on a page with pictures."""
    runs, store = read_run_names(arguments.runs), TileStore(arguments.store)
    scores = write_report(runs, store, arguments.out, arguments.made_with, arguments.weights)
    print(f"{arguments.out} written")
    if arguments.html:
        page = write_page(runs, scores, store, arguments.html, arguments.made_with)
        print(f"{page} written, {page.stat().st_size / 1e6:.1f} MB")
    return 0
