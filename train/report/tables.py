"""Scores and reports of out-of-fold probabilities, whichever model wrote them.

A run folder holds `oof/<tile_id>.npy`, (4, H, W) class probabilities of each tile of the store by a model
that never saw it, and says which folds it used: in run.json, or in the config.yaml of its folds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from prep.files import write_json, write_text
from prep.labels import IGNORE
from prep.store import TileStore
from prep.text import NONE, markdown_table, number_text
from solution import CLASS_NAMES, decide_classes, valid_mask
from train.config import load_config
from train.masks.pictures import CODE_COLOURS, add_legend, false_colour, paint_codes, save_figure
from train.objective import (
    BINARY_NAMES,
    N_CLASSES,
    TileCounts,
    code_names,
    count_tile,
    pool,
    score_tiles,
)
from train.run import CONFIG_FILE, OOF_FOLDER, RUN_FILE, SCORES_FILE, files_of_folds

STRIPS_FOLDER = "strips"

INTRODUCTION = """\
Every tile is scored on the prediction of a model that never saw it, and the pixels of all tiles are pooled.

- **Binary**: glacier of either kind against the rest, on all {tiles} tiles.
- **Four classes**: on the {phase2} tiles with phase-2 labels; phase-1 labels do not tell debris from ice.
- Scores are over valid pixels unless the heading says *all pixels*, which counts nodata as other, predicted
  as other: nodata is labelled so, and the submission predicts so. Hold that one against a leaderboard.
- Predictions are those of six views averaged, before class bias, CRF and cleaning; for the U-Net and the
  baseline alike, a pixel is glacier where both kinds together outweigh the rest, then the likelier kind.
"""


class ReportError(Exception):
    """A run cannot be scored; the message names the file, what was found and expected, and what to do."""


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


# --- Scoring a run ------------------------------------------------------------------------------------------


def score_run(run_dir: str | os.PathLike, store: TileStore) -> dict:
    """Score a run's out-of-fold probabilities, write `run_dir`/scores.json, and return what is in it.

    Args:
        run_dir: folder with oof/<tile_id>.npy for every tile of the store.
        store: the tiles and labels that the run was trained on.

    Returns:
        {"scheme", "pooled": s, "fold_mean", "folds": {fold: {"tiles", **s}}, "tiles": {tile_id: {"fold",
        "labels", "ignored", "confusion", **s}}, "classes", "codes", "confusion"} where s is what
        `metrics.score_tiles` returns, and confusion is (6, 4) counts of label code against predicted class,
        over valid pixels.

    Raises:
        ReportError: a tile is missing, is no array of probabilities, or the fold scheme is unknown.
    """
    run_dir = Path(run_dir)
    scheme = find_scheme(run_dir)
    _require_tiles(run_dir, store)
    fold_of = store.fold_of(scheme)
    tiles = [
        count_tile(
            row.tile_id,
            fold_of[row.tile_id],
            row.labels,
            store.mask(row.tile_id),
            predicted_classes(run_dir, store, row.tile_id),
        )
        for row in store.tiles
    ]
    scores = _summarise(scheme, tiles)
    write_json(run_dir / SCORES_FILE, scores)
    return scores


def find_scheme(run_dir: Path) -> str:
    """Return the name of the fold scheme of a run, from its run.json or the configs of its folds."""
    if (run_dir / RUN_FILE).is_file():
        return str(json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))["scheme"])
    schemes = {load_config(path).data.scheme for path in files_of_folds(run_dir, CONFIG_FILE)}
    if len(schemes) != 1:
        found = (
            f"folds of the schemes {', '.join(sorted(schemes))}"
            if schemes
            else f"no {RUN_FILE}, no fold*/{CONFIG_FILE}"
        )
        raise ReportError(
            f"{run_dir}: found {found}; expected a run of one fold scheme. Train into an empty folder."
        )
    return schemes.pop()


def predicted_classes(run_dir: Path, store: TileStore, tile_id: str) -> np.ndarray:
    """Return the class decided for each pixel of a tile, (H, W) uint8; errors as of `load_probabilities`."""
    return decide_classes(load_probabilities(run_dir, store, tile_id))


def load_probabilities(run_dir: Path, store: TileStore, tile_id: str) -> np.ndarray:
    """Return the out-of-fold class probabilities of a tile, (4, H, W) float32.

    Raises:
        ReportError: the file does not hold finite (4, H, W) numbers of the tile's size.
    """
    path = run_dir / OOF_FOLDER / f"{tile_id}.npy"
    probabilities = np.load(path)
    expected = (N_CLASSES, *store.mask(tile_id).shape)
    if probabilities.shape != expected or not np.isfinite(probabilities).all():
        state = "finite" if np.isfinite(probabilities).all() else "not all finite"
        raise ReportError(
            f"{path}: found numbers of shape {probabilities.shape}, {state}; expected finite probabilities "
            f"of shape {expected}. Predict the run's tiles again from this store."
        )
    return probabilities.astype(np.float32)


def _require_tiles(run_dir: Path, store: TileStore) -> None:
    missing = [name for name in store.tile_ids if not (run_dir / OOF_FOLDER / f"{name}.npy").is_file()]
    if missing:
        raise ReportError(
            f"{run_dir / OOF_FOLDER}: no probabilities for {', '.join(missing)}; expected all "
            f"{len(store.tile_ids)} tiles of the store. Finish the folds that hold them out, and score again."
        )


def _summarise(scheme: str, tiles: Sequence[TileCounts]) -> dict:
    folds = {
        fold: [tile for tile in tiles if tile.fold == fold] for fold in sorted({tile.fold for tile in tiles})
    }
    by_fold = {fold: score_tiles(members) for fold, members in folds.items()}
    return {
        "scheme": scheme,
        "pooled": score_tiles(tiles),
        "fold_mean": _fold_means(list(by_fold.values())),
        "folds": {str(fold): {"tiles": [t.tile_id for t in folds[fold]], **by_fold[fold]} for fold in folds},
        "tiles": {tile.tile_id: _tile_entry(tile) for tile in tiles},
        "classes": list(CLASS_NAMES),
        "codes": list(code_names()),
        "confusion": pool(tiles).tolist(),
    }


def _tile_entry(tile: TileCounts) -> dict:
    about = {"fold": tile.fold, "labels": tile.labels, "ignored": tile.ignored}
    return {**about, "confusion": tile.confusion.tolist(), **score_tiles([tile])}


def _fold_means(folds: Sequence[dict]) -> dict:
    """Return mean and sample standard deviation of the MCC over the folds that have one."""
    means: dict = {}
    for pixels in ("valid_pixels", "all_pixels"):
        means[pixels] = {}
        for task in ("binary", "four_class"):
            values = [fold[pixels][task]["mcc"] for fold in folds if fold[pixels][task] is not None]
            means[pixels][task] = {
                "mean": float(np.mean(values)) if values else None,
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "folds": len(values),
            }
    return means


# --- The report ---------------------------------------------------------------------------------------------


def write_report(
    run_dirs: Mapping[str, Path], store: TileStore, out: str | os.PathLike, commands: Sequence[str] = ()
) -> dict[str, dict]:
    """Score some runs, compare them in Markdown with figures beside it, and return their scores by name.

    Writes `out`, `<stem>_confusion.png` and `<stem>_tiles.png` in its folder, and in each run's folder
    scores.json and strips/ with images of a few tiles: real tiles may be seen in those, so they stay out of
    the repository. The same runs give the same bytes.

    Args:
        run_dirs: name of each run in the report, and its folder.
        store: the tiles of all of them.
        out: the Markdown file, e.g. reports/out_of_fold.md.
        commands: what to type to make the runs and this report again.

    Raises:
        ReportError: a run cannot be scored.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = {name: score_run(run_dir, store) for name, run_dir in run_dirs.items()}
    figures = {"confusion": draw_confusions(runs), "tiles": draw_tile_bars(runs)}
    for name, figure in figures.items():
        save_figure(figure, out.with_name(f"{out.stem}_{name}.png"))
    write_text(out, _markdown(runs, out.stem, commands))
    for name, run_dir in run_dirs.items():
        write_strips(Path(run_dir), store, telling_tiles(runs[name]))
    return runs


def _markdown(runs: Mapping[str, dict], stem: str, commands: Sequence[str]) -> str:
    labels = [tile["labels"] for tile in next(iter(runs.values()))["tiles"].values()]
    sections = [
        "# Out-of-fold scores",
        INTRODUCTION.format(tiles=len(labels), phase2=labels.count("phase2")).strip(),
        *_reproduce_section(commands),
        "## Matthews correlation, pooled pixels",
        _pooled_table(runs),
        "## Matthews correlation by fold",
        "Binary (mean ± sample standard deviation of the folds):",
        _fold_table(runs, "binary"),
        "Four classes, where a fold holds a tile with phase-2 labels:",
        _fold_table(runs, "four_class"),
        "## Classes",
        "`glacier_any` is on all tiles, the four classes on those with phase-2 labels; – undefined.",
        _class_table(runs),
        "## Matthews correlation by tile",
        "Binary; in brackets four classes where the tile has phase-2 labels.",
        _tile_table(runs),
        f"![Binary MCC of each tile]({stem}_tiles.png)",
        "## Confusion",
        "Pixels of all tiles; rows are labels, columns predictions.",
        f"![Share of each label's pixels by predicted class]({stem}_confusion.png)",
        *[_confusion_table(name, scores) for name, scores in runs.items()],
        f"Images of a few tiles (false colour, label, prediction) are in each run's `{STRIPS_FOLDER}/`.",
    ]
    return "\n\n".join(sections) + "\n"


def _reproduce_section(commands: Sequence[str]) -> list[str]:
    return ["## Commands", "\n".join(("```sh", *commands, "```"))] if commands else []


def _pooled_table(runs: Mapping[str, dict]) -> str:
    head = ["run", "folds", "binary", "four classes", "binary, all pixels", "four classes, all pixels"]
    places = [(p, t) for p in ("valid_pixels", "all_pixels") for t in ("binary", "four_class")]
    rows = [
        [name, scores["scheme"], *[_mcc(scores["pooled"], pixels, task) for pixels, task in places]]
        for name, scores in runs.items()
    ]
    return markdown_table(head, rows)


def _fold_table(runs: Mapping[str, dict], task: str) -> str:
    folds = sorted({fold for scores in runs.values() for fold in scores["folds"]}, key=int)
    rows = []
    for name, scores in runs.items():
        mean = scores["fold_mean"]["valid_pixels"][task]
        cells = [
            _mcc(scores["folds"][fold], "valid_pixels", task) if fold in scores["folds"] else ""
            for fold in folds
        ]
        rows.append([name, *cells, f"{number_text(mean['mean'])} ± {number_text(mean['std'])}"])
    return markdown_table(["run", *[f"fold {fold}" for fold in folds], "mean ± std"], rows)


def _class_table(runs: Mapping[str, dict]) -> str:
    rows = []
    for name, scores in runs.items():
        pooled = scores["pooled"]["valid_pixels"]
        classes = [(pooled["binary"], BINARY_NAMES[1])]
        classes += [(pooled["four_class"], label) for label in CLASS_NAMES if pooled["four_class"]]
        for values, label in classes:
            rows.append(
                [name, label, *[number_text(values[key][label]) for key in ("iou", "precision", "recall")]]
            )
    return markdown_table(["run", "class", "IoU", "precision", "recall"], rows)


def _tile_table(runs: Mapping[str, dict]) -> str:
    rows = []
    for tile_id, tile in next(iter(runs.values()))["tiles"].items():
        rows.append(
            [tile_id, tile["labels"], *[_tile_cell(scores["tiles"][tile_id]) for scores in runs.values()]]
        )
    return markdown_table(["tile", "labels", *runs], rows)


def _tile_cell(tile: dict) -> str:
    binary = _mcc(tile, "valid_pixels", "binary")
    return f"{binary} ({_mcc(tile, 'valid_pixels', 'four_class')})" if tile["labels"] == "phase2" else binary


def _confusion_table(name: str, scores: dict) -> str:
    rows = [[code, *[f"{value:,}" for value in counts]] for code, counts in _occurring(scores)]
    return f"{name}:\n\n" + markdown_table(["label", *scores["classes"]], rows)


def _occurring(scores: dict) -> list[tuple[str, list[int]]]:
    """Return (code name, counts) of the confusion's rows that hold any pixel."""
    return [(code, counts) for code, counts in zip(scores["codes"], scores["confusion"]) if sum(counts)]


def _mcc(scores: dict, pixels: str, task: str) -> str:
    return number_text(scores[pixels][task]["mcc"]) if scores[pixels][task] else NONE


# --- Figures ------------------------------------------------------------------------------------------------


def draw_confusions(runs: Mapping[str, dict]) -> Figure:
    """Draw one heat map a run: the share (%) of each label's pixels by predicted class."""
    columns = min(len(runs), 2)
    lines = -(-len(runs) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (name, scores) in zip(axes, runs.items()):
        _draw_confusion(axis, name, scores)
    for axis in axes[len(runs) :]:
        axis.remove()
    return figure


def _draw_confusion(axis, name: str, scores: dict) -> None:
    labels, counts = zip(*_occurring(scores))
    shares = np.array(counts) / np.sum(counts, axis=1, keepdims=True)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axis.text(
            column,
            row,
            f"{100 * share:.1f}",
            ha="center",
            va="center",
            color="white" if share > 0.5 else "black",
        )
    axis.set_title(name)
    axis.set_xticks(range(N_CLASSES), scores["classes"])
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xlabel("predicted")
    axis.set_ylabel("label, % of its pixels")


def draw_tile_bars(runs: Mapping[str, dict]) -> Figure:
    """Draw the binary MCC of each tile, the runs side by side."""
    tile_ids = list(next(iter(runs.values()))["tiles"])
    figure = Figure(figsize=(max(6.0, 1.5 + 0.5 * len(tile_ids)), 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(runs)
    for index, (name, scores) in enumerate(runs.items()):
        heights = [scores["tiles"][tile_id]["valid_pixels"]["binary"]["mcc"] for tile_id in tile_ids]
        axis.bar(np.arange(len(tile_ids)) + (index + 0.5) * width - 0.4, heights, width, label=name)
    axis.set_xticks(range(len(tile_ids)), tile_ids, rotation=45)
    axis.set_ylabel("binary MCC")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid(axis="y", alpha=0.4)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(len(runs), 4))
    return figure


def telling_tiles(scores: dict) -> list[str]:
    """Return the tiles worth looking at: those with phase-2 labels, at most three, the worst and the best."""
    tiles = scores["tiles"]
    phase2 = [tile_id for tile_id, tile in tiles.items() if tile["labels"] == "phase2"][:3]
    ranked = sorted(tiles, key=lambda tile_id: tiles[tile_id]["valid_pixels"]["binary"]["mcc"])
    return list(dict.fromkeys([*phase2, ranked[0], ranked[-1]]))


def write_strips(run_dir: Path, store: TileStore, tile_ids: Sequence[str]) -> list[Path]:
    """Draw false colour, label and prediction of tiles side by side, to `run_dir`/strips/<tile_id>.png."""
    folder = run_dir / STRIPS_FOLDER
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{tile_id}.png" for tile_id in tile_ids]
    for tile_id, path in zip(tile_ids, paths):
        save_figure(_draw_strip(store, tile_id, predicted_classes(run_dir, store, tile_id)), path)
    return paths


def _draw_strip(store: TileStore, tile_id: str, predicted: np.ndarray) -> Figure:
    image = store.image(tile_id)
    shown = np.where(valid_mask(image), predicted, IGNORE)
    panels = {
        f"{tile_id}: SWIR, red, green": false_colour(image),
        "label": paint_codes(store.mask(tile_id)),
        "prediction": paint_codes(shown),
    }
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for axis, (title, picture) in zip(figure.subplots(1, 3), panels.items()):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title)
        axis.set_axis_off()
    add_legend(figure, CODE_COLOURS)
    return figure
