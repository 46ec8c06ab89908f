"""The report on some runs in Markdown: scores with their intervals, by fold, by class and by tile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Mapping, Sequence

from prep.files import sha256, write_text
from prep.store import TileStore
from prep.text import NONE, markdown_table, number_text
from solution import CLASS_NAMES
from train.masks.pictures import save_figure
from train.objective import BINARY_NAMES, CERTAIN_LABELS, HEADLINES, interval_text
from train.report.figures import draw_confusions, draw_tiles
from train.report.scores import ReportError, score_run

INTRODUCTION = """\
Every tile is scored on the prediction of a model that never saw it, and the pixels of all tiles are pooled.

- **Extent**: glacier of either kind against the rest, on all tiles.
- **Four classes**: on pixels of certain class of the tiles whose labels tell debris from ice, here {certain}.
- In brackets: 95 % interval, from drawing blocks of 3 km with replacement. It is of these tiles' places, and
  too narrow for other regions. Whether two runs differ is for `make compare` to tell, which draws both alike.
- Scores are over valid pixels unless the heading says *all pixels*, which counts nodata as other, predicted
  as other: nodata is labelled so, and the submission predicts so. Hold that one against a leaderboard.
"""


def read_run_names(given: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each run by its name, from NAME=FOLDER.

    Raises:
        ReportError: one is not written so, or a name is given twice.
    """
    runs: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in runs:
            raise ReportError(f"{text}: expected NAME=FOLDER with a name that no other run has")
        runs[name] = Path(folder)
    return runs


def write_report(
    run_dirs: Mapping[str, Path],
    store: TileStore,
    out: str | os.PathLike,
    commands: Sequence[str] = (),
    weights: Path | None = None,
) -> dict[str, dict]:
    """Score some runs, compare them in Markdown with figures beside it, and return their scores by name.

    Writes `out`, `<stem>_confusion.png` and `<stem>_tiles.png` in its folder, and scores.json in each run's.
    The same runs give the same bytes.

    Args:
        run_dirs: name of each run in the report, and its folder.
        store: the tiles of all of them.
        out: the Markdown file, e.g. reports/out_of_fold.md.
        commands: what to type to make the runs and this report again.
        weights: the model.pth that was made of these runs; the report then says which one it is about.

    Raises:
        ReportError: a run cannot be scored.
    """
    out = Path(out)
    runs = {name: score_run(run_dir, store) for name, run_dir in run_dirs.items()}
    save_figure(draw_confusions(runs), out.with_name(f"{out.stem}_confusion.png"))
    save_figure(draw_tiles(runs), out.with_name(f"{out.stem}_tiles.png"))
    certain = [row.tile_id for row in store.tiles if row.labels in CERTAIN_LABELS]
    sections = [
        "# Out-of-fold scores",
        INTRODUCTION.format(certain=", ".join(certain) or "none").strip(),
        *([f"Weights: SHA-256 {sha256(weights)}"] if weights else []),
        *(["## Commands", "\n".join(("```sh", *commands, "```"))] if commands else []),
        "## Scores, pooled pixels",
        markdown_table(*pooled_table(runs)),
        "## Matthews correlation by fold",
        "Extent (mean ± sample standard deviation of the folds):",
        markdown_table(*fold_table(runs, "binary")),
        "Four classes, where a fold holds a tile whose labels tell debris from ice:",
        markdown_table(*fold_table(runs, "four_class")),
        "## Classes",
        "`glacier_any` is on all tiles, the four classes on those that they are scored on; – undefined.",
        markdown_table(*_class_table(runs)),
        "## Matthews correlation by tile",
        "Extent; in brackets four classes.",
        markdown_table(*_tile_table(runs, store)),
        f"![Extent MCC of each tile]({out.stem}_tiles.png)",
        "## Confusion",
        f"![Share of each label's pixels by predicted class]({out.stem}_confusion.png)",
    ]
    write_text(out, "\n\n".join(sections) + "\n")
    return runs


Table = tuple[list[str], list[list[str]]]  # head, rows


def pooled_table(runs: Mapping[str, dict]) -> Table:
    """Return the scores of the runs with their intervals, and those of all pixels."""
    head = ["run", "folds", "tiles", *HEADLINES, "extent MCC, all pixels", "four-class MCC, all pixels"]
    rows = []
    for name, scores in runs.items():
        intervals = [interval_text(scores["intervals"][headline]) for headline in HEADLINES]
        everywhere = [_mcc(scores["pooled"], task, "all_pixels") for task in ("binary", "four_class")]
        rows.append([name, scores["scheme"], str(len(scores["tiles"])), *intervals, *everywhere])
    return head, rows


def fold_table(runs: Mapping[str, dict], task: str) -> Table:
    """Return the MCC of each fold: of the extent (task "binary") or in four classes ("four_class")."""
    folds = sorted({fold for scores in runs.values() for fold in scores["folds"]}, key=int)
    rows = []
    for name, scores in runs.items():
        mean = scores["fold_mean"][task]
        cells = [_mcc(scores["folds"][fold], task) if fold in scores["folds"] else "" for fold in folds]
        rows.append([name, *cells, f"{number_text(mean['mean'])} ± {number_text(mean['std'])}"])
    return ["run", *[f"fold {fold}" for fold in folds], "mean ± std"], rows


def _class_table(runs: Mapping[str, dict]) -> Table:
    rows = []
    for name, scores in runs.items():
        pooled = scores["pooled"]["valid_pixels"]
        classes = [(pooled["binary"], BINARY_NAMES[1])]
        classes += [(pooled["four_class"], label) for label in CLASS_NAMES if pooled["four_class"]]
        for values, label in classes:
            ratios = [number_text(values[key][label]) for key in ("iou", "precision", "recall")]
            rows.append([name, label, *ratios])
    return ["run", "class", "IoU", "precision", "recall"], rows


def _tile_table(runs: Mapping[str, dict], store: TileStore) -> Table:
    rows = [
        [row.tile_id, row.labels, *[_tile_cell(scores["tiles"].get(row.tile_id)) for scores in runs.values()]]
        for row in store.tiles
        if any(row.tile_id in scores["tiles"] for scores in runs.values())
    ]
    return ["tile", "labels", *runs], rows


def _tile_cell(tile: dict | None) -> str:
    if tile is None:
        return ""
    four = f" ({_mcc(tile, 'four_class')})" if tile["valid_pixels"]["four_class"] else ""
    return _mcc(tile, "binary") + four


def _mcc(scores: dict, task: str, pixels: str = "valid_pixels") -> str:
    return number_text(scores[pixels][task]["mcc"]) if scores[pixels][task] else NONE
