"""What the page shows beyond the scores: histories, recipes, reliability, pictures, later steps."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Collection, Mapping, NamedTuple, Sequence

import numpy as np

from prep.labels import IGNORE
from prep.store import TileStore
from solution import decide_classes, valid_mask
from train.config import Config, load_config
from train.data import ALL_TILES
from train.masks.pictures import CODE_COLOURS, OUTCOME_COLOURS, Outcome, false_colour, map_outcomes
from train.report.images import map_uri, photo_uri
from train.report.reliability import Reliability, count_reliability, pool_reliability
from train.report.tables import ReportError, load_probabilities
from train.run import CONFIG_FILE, HISTORY_FILE, RUN_FILE, files_of_folds, fold_folder

CURVES = ("epoch", "train_loss", "val_loss", "val_mcc", "lr", "seconds")  # columns that the page needs


class History(NamedTuple):
    """The epochs of a fold: its columns by name, and the number of the epoch that was kept."""

    fold: int
    columns: dict[str, list[float]]
    kept: int


class RunEvidence(NamedTuple):
    """A run beside its scores. `config` and its text `recipe` are None and empty for one of `baseline`, which
    has `settings` instead. `is_baseline`: others on the same folds are compared with it."""

    name: str
    folder: Path
    scores: dict
    config: Config | None
    recipe: str
    settings: dict
    histories: tuple[History, ...]
    reliability: Reliability
    is_baseline: bool


class Panels(NamedTuple):
    """Pictures of a tile as data URIs; prediction and errors of each run, and its pixels of each outcome."""

    tile_id: str
    image: str
    label: str
    predictions: tuple[str, ...]
    errors: tuple[str, ...]
    outcomes: tuple[dict[Outcome, int], ...]


def gather(
    run_dirs: Mapping[str, Path], scores: Mapping[str, dict], store: TileStore, against: Collection[str] = ()
) -> tuple[list[RunEvidence], list[Panels]]:
    """Return what there is on each run and the pictures of each tile; every file is read once.

    `against` names runs that are baselines beside those of `python -m train baseline`.

    Raises:
        ReportError: probabilities or a history are damaged, or `against` names no run.
    """
    if unknown := sorted(set(against) - set(run_dirs)):
        raise ReportError(f"{', '.join(unknown)}: no such run; expected names of {', '.join(run_dirs)}")
    panels, counts = [], []
    for tile_id in store.tile_ids:
        drawn, counted = draw_tile(list(run_dirs.values()), store, tile_id)
        panels.append(drawn)
        counts.append(counted)
    pooled = [pool_reliability(tiles) for tiles in zip(*counts)]
    runs = [
        read_run(name, Path(folder), scores[name], reliability, name in against)
        for (name, folder), reliability in zip(run_dirs.items(), pooled)
    ]
    return runs, panels


def draw_tile(folders: Sequence[Path], store: TileStore, tile_id: str) -> tuple[Panels, list[Reliability]]:
    """Return the pictures of a tile and how reliable each run is on it."""
    image, codes = store.image(tile_id), store.mask(tile_id)
    valid, predictions, errors, outcomes, counts = valid_mask(image), [], [], [], []
    for folder in folders:
        probs = load_probabilities(Path(folder), store, tile_id)
        classes = decide_classes(probs)
        judged = map_outcomes(codes, classes)
        predictions.append(map_uri(np.where(valid, classes, IGNORE), CODE_COLOURS))
        errors.append(map_uri(judged, OUTCOME_COLOURS))
        outcomes.append({outcome: int(np.count_nonzero(judged == outcome)) for outcome in Outcome})
        counts.append(count_reliability(codes, probs))
    shared = (tile_id, photo_uri(false_colour(image)), map_uri(codes, CODE_COLOURS))
    return Panels(*shared, tuple(predictions), tuple(errors), tuple(outcomes)), counts


def read_run(name: str, folder: Path, scores: dict, reliability: Reliability, named: bool) -> RunEvidence:
    """Return a run with its recipe and the histories of its folds, where it has any.

    `named`: whether it was named as a baseline.
    """
    configs = files_of_folds(folder, CONFIG_FILE)
    config = load_config(configs[0]) if configs else None
    recipe = configs[0].read_text(encoding="utf-8") if configs else ""
    settings = {} if config else json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    keep = config.train.keep if config else "last"
    paths = [
        path for path in files_of_folds(folder, HISTORY_FILE) if path.parent != fold_folder(folder, ALL_TILES)
    ]
    histories = [read_history(path, keep) for path in paths]
    ordered = tuple(sorted(histories, key=lambda history: history.fold))
    return RunEvidence(
        name, folder, scores, config, recipe, settings, ordered, reliability, named or config is None
    )


def read_history(path: Path, keep: str) -> History:
    """Return the epochs of a fold from its history.csv; `keep` says which of them was kept: "last" or "best".

    Raises:
        ReportError: columns are missing, there is no epoch, or a cell is no number.
    """
    try:
        with open(path, newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        columns = {column: [float(row[column]) for row in rows] for column in CURVES}
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{path}: {error!r}; expected numbers in {', '.join(CURVES)}. Fit it again."
        ) from error
    if not rows:
        raise ReportError(f"{path}: found no epoch; expected one row each. Fit the fold again.")
    mcc = np.nan_to_num(columns["val_mcc"], nan=-np.inf)
    kept = len(rows) - 1 if keep == "last" else int(np.argmax(mcc))
    return History(int(path.parent.name.removeprefix("fold")), columns, int(columns["epoch"][kept]))


def read_result(path: Path, keys: Sequence[str], made_by: str) -> dict:
    """Return the content of a JSON file of a later step.

    Args:
        path: the file.
        keys: what must be in it.
        made_by: the command that writes it.

    Raises:
        ReportError: it is missing, damaged, or lacks a key.
    """
    remedy = f"Make it with `python -m train {made_by}`, or leave the option out."
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read as JSON ({error}). {remedy}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ReportError(
            f"{path}: found no {', '.join(missing)}; expected the file of `{made_by}`. {remedy}"
        )
    return content
