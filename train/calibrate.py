"""Decides which steps follow the forward passes, by out-of-fold MCC: views, class bias, CRF, specks and
holes.

Each step is a list of options, the first of which leaves things as they are. Its gain is measured with nested
folds: a fold's tiles are scored with the option that was best on the other folds, so that choosing does not
flatter the score. A step is kept only where it gains in every run that is given (say, one on stratified and
one on spatial folds); then the option with the best score over all tiles is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
from joblib import Parallel, delayed

from prep.files import write_json, write_text
from prep.store import TileStore
from prep.text import markdown_table
from solution import (
    CLASS_NAMES,
    VIEWS,
    Postprocess,
    apply_bias,
    apply_crf,
    clean_classes,
    decide_classes,
    normalize,
    valid_mask,
)
from train.fit import RunError
from train.objective import TileCounts, count_tile, score_tiles
from train.predict import load_passes, read_folds

NO_BIAS = (0.0,) * len(CLASS_NAMES)
MIN_GAIN = 0.001  # MCC; a step that gains less is not worth its time

# Extent first (both kinds of glacier against the rest), then the border between the two kinds.
EXTENT_BIASES = tuple(round(0.1 * step, 1) for step in range(-10, 11))
DEBRIS_BIASES = tuple(0.5 * step for step in range(-8, 13))
CRF_OPTIONS = tuple(
    {
        "smooth_px": 3.0,
        "smooth_weight": smooth,
        "bilateral_px": 30.0,
        "bilateral_std": std,
        "bilateral_weight": weight,
        "iterations": 5,
    }
    for smooth, std, weight in ((1.0, 0.5, 0.0), (1.0, 0.5, 1.0), (1.0, 0.25, 3.0), (3.0, 0.5, 3.0))
)
CLEANING_OPTIONS = ({"min_speck": 100, "min_hole": 50},)


class Settings(NamedTuple):
    """The views and everything after them: what `model.pth` stores as passes, class_bias and postprocess."""

    views: int = 1  # the first so many of solution.VIEWS
    class_bias: tuple[float, ...] = NO_BIAS
    postprocess: Postprocess = Postprocess(crf=None, min_speck=0, min_hole=0)


class Run(NamedTuple):
    """A run's held-out tiles: the fold of each, each fold's band statistics, and where the passes are."""

    name: str
    folder: Path
    fold_of: dict[str, int]
    normalization: dict[int, dict]


class StepResult(NamedTuple):
    """What one step brought: nested score before and after, a pair a run, and whether it was kept."""

    step: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    kept: bool
    choice: str


def open_run(folder: Path) -> Run:
    """Return the run in `folder` with the fold of each held-out tile."""
    records = read_folds(folder)
    fold_of = {tile: record["fold"] for record in records for tile in record["val_tiles"]}
    normalization = {record["fold"]: record["normalization"] for record in records}
    return Run(Path(folder).name, Path(folder), fold_of, normalization)


def predict_with(
    settings: Settings, passes: np.ndarray, image: np.ndarray, normalization: dict
) -> np.ndarray:
    """Return class indices (H, W) uint8 from a tile's passes (6, 4, H, W), as the submission would.

    Args:
        settings: the steps to take.
        passes: class probabilities of each view.
        image: (H, W, 5) physical units, NaN where nodata.
        normalization: mean and std of the bands, from the fold's checkpoint.
    """
    steps, valid = settings.postprocess, valid_mask(image)
    probs = passes[: settings.views].astype(np.float32).mean(axis=0)
    probs = apply_bias(probs, settings.class_bias, steps.extent_bias)
    if steps.crf:
        probs = apply_crf(probs, normalize(image, normalization), valid, steps.crf)
    return clean_classes(decide_classes(probs), valid, steps.min_speck, steps.min_hole)


def score(tiles: Sequence[TileCounts]) -> float:
    """Return the objective: the mean of binary MCC on all tiles and four-class MCC on those with phase-2
    labels.

    The competition scores four classes, but few tiles are labelled so; the extent is known on all.
    """
    scores = score_tiles(tiles)["valid_pixels"]
    values = [scores[task]["mcc"] for task in ("binary", "four_class") if scores[task] is not None]
    return float(np.mean(values))


def count_options(
    run: Run, store: TileStore, options: Sequence[Settings], jobs: int
) -> list[list[TileCounts]]:
    """Return the counts of every tile of a run under every option, [option][tile]."""
    labels = store.labels

    def count(tile: str) -> list[TileCounts]:
        passes, image, mask = load_passes(run.folder, tile), store.image(tile), store.mask(tile)
        fold = run.fold_of[tile]
        maps = [predict_with(option, passes, image, run.normalization[fold]) for option in options]
        return [count_tile(tile, fold, labels[tile], mask, classes) for classes in maps]

    by_tile = Parallel(n_jobs=jobs, prefer="threads")(delayed(count)(tile) for tile in run.fold_of)
    return [list(tiles) for tiles in zip(*by_tile)]


def nested_score(counts: Sequence[Sequence[TileCounts]]) -> float:
    """Return the score with each fold's option chosen on the other folds; `counts` is [option][tile]."""
    held_out: list[TileCounts] = []
    for fold in sorted({tile.fold for tile in counts[0]}):
        others = [score([tile for tile in option if tile.fold != fold]) for option in counts]
        best = int(np.argmax(others))
        held_out += [tile for tile in counts[best] if tile.fold == fold]
    return score(held_out)


def decide_step(
    step: str,
    current: Settings,
    options: Sequence[Settings],
    count: Callable[[Sequence[Settings]], list[list[list[TileCounts]]]],
) -> tuple[Settings, StepResult]:
    """Return the settings after one step and what it brought.

    Args:
        step: its name in the report.
        current: the settings so far, the option of leaving the step out.
        options: the settings with the step.
        count: maps options to counts, [run][option][tile].
    """
    candidates = [current, *options]
    by_run = count(candidates)
    before = tuple(score(counts[0]) for counts in by_run)
    after = tuple(nested_score(counts) for counts in by_run)
    means = np.mean([[score(option) for option in counts] for counts in by_run], axis=0)
    best = int(np.argmax(means))
    kept = best > 0 and all(b - a >= MIN_GAIN for a, b in zip(before, after))
    chosen = candidates[best] if kept else current
    return chosen, StepResult(step, before, after, kept, describe(candidates[best]))


def describe(settings: Settings) -> str:
    """Return settings in one line."""
    steps = settings.postprocess
    crf = ", ".join(f"{key} {value:g}" for key, value in steps.crf.items()) if steps.crf else "off"
    parts = (
        f"views {settings.views}",
        f"extent bias {steps.extent_bias:g}",
        f"class bias {'/'.join(f'{value:g}' for value in settings.class_bias)}",
        f"CRF {crf}",
        f"specks {steps.min_speck} px",
        f"holes {steps.min_hole} px",
    )
    return "; ".join(parts)


def calibrate(run_dirs: Sequence[Path], store: TileStore, jobs: int) -> tuple[Settings, list[StepResult]]:
    """Return the settings to ship and the result of each step, in the order of the pipeline."""
    runs = [open_run(folder) for folder in run_dirs]
    incomplete = [run.name for run in runs if set(run.fold_of) != set(store.tile_ids)]
    if incomplete:
        raise RunError(f"{', '.join(incomplete)}: folds are missing; finish them before calibrating")

    def count(options: Sequence[Settings]) -> list[list[list[TileCounts]]]:
        return [count_options(run, store, options, jobs) for run in runs]

    settings, results = Settings(), []
    for step, expand in STEPS.items():
        settings, result = decide_step(step, settings, expand(settings), count)
        results.append(result)
        print(format_result(result), flush=True)
    return settings, results


def _with_views(settings: Settings) -> list[Settings]:
    return [settings._replace(views=len(VIEWS))]


def _with_extent_bias(settings: Settings) -> list[Settings]:
    steps = settings.postprocess
    return [settings._replace(postprocess=steps._replace(extent_bias=bias)) for bias in EXTENT_BIASES if bias]


def _with_debris_bias(settings: Settings) -> list[Settings]:
    other, glacier, debris, lake = settings.class_bias
    shifts = [shift for shift in DEBRIS_BIASES if shift]
    return [settings._replace(class_bias=(other, glacier, debris + shift, lake)) for shift in shifts]


def _with_crf(settings: Settings) -> list[Settings]:
    return [settings._replace(postprocess=settings.postprocess._replace(crf=crf)) for crf in CRF_OPTIONS]


def _with_cleaning(settings: Settings) -> list[Settings]:
    return [
        settings._replace(postprocess=Postprocess(**{**settings.postprocess._asdict(), **sizes}))
        for sizes in CLEANING_OPTIONS
    ]


STEPS: dict[str, Callable[[Settings], list[Settings]]] = {
    "six views": _with_views,
    "bias of glacier extent": _with_extent_bias,
    "bias of debris": _with_debris_bias,
    "CRF": _with_crf,
    "specks and holes": _with_cleaning,
}


def format_result(result: StepResult) -> str:
    """Return one line for the terminal."""
    gains = ", ".join(f"{a:.4f} -> {b:.4f}" for a, b in zip(result.before, result.after))
    return f"{result.step}: {gains}: {'kept' if result.kept else 'left out'} ({result.choice})"


def write_calibration(
    path: Path, runs: Sequence[Path], settings: Settings, results: Sequence[StepResult]
) -> None:
    """Write settings and results as JSON for `pack` and for the report."""
    content = {
        "runs": [Path(run).name for run in runs],
        "views": settings.views,
        "class_bias": list(settings.class_bias),
        "postprocess": settings.postprocess._asdict(),
        "steps": [result._asdict() for result in results],
    }
    write_json(path, content)


def write_report(
    path: Path, runs: Sequence[Path], results: Sequence[StepResult], commands: Sequence[str]
) -> None:
    """Write the table of steps as Markdown."""
    names = [Path(run).name for run in runs]
    head = [
        "step",
        *[f"{name}: without" for name in names],
        *[f"{name}: with" for name in names],
        "",
        "best option",
    ]
    rows = [
        [
            result.step,
            *[f"{value:.4f}" for value in (*result.before, *result.after)],
            "kept" if result.kept else "left out",
            result.choice,
        ]
        for result in results
    ]
    text = (
        "# What follows the forward passes\n\n"
        "Out-of-fold score: the mean of the binary MCC on all tiles and the four-class MCC on those with "
        "phase-2 labels. *With* is nested: each fold uses the option that was best on the others. A step "
        f"is kept where it gains at least {MIN_GAIN} in every run. Steps build on those kept before them.\n\n"
        "```sh\n" + "\n".join(commands) + "\n```\n\n" + markdown_table(head, rows) + "\n"
    )
    write_text(path, text)
