"""Trains a set of configs on the same folds with the same seeds and budgets, and tabulates their worth.

A trial is a config with a name. Its run with one seed, `<run>/<trial>/seed<k>`, is a folder like those of
`python -m train fit`, with the out-of-fold probabilities beside the folds. One process fits one fold on one
thread, and several run at once: small batches gain little from more threads. Finished folds are not fitted
again, interrupted ones continue.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional, Sequence

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prep.files import write_array, write_json, write_text, write_whole
from prep.store import TileStore
from prep.text import NONE, markdown_table, number_text
from solution import VIEWS, usable_cores
from train import side_by_side
from train.config import (
    Config,
    ConfigError,
    change_config,
    describe_differences,
    load_config,
    parse_override,
    save_config,
)
from train.data import folds_of_scheme
from train.fit import RunError, fit_fold, read_record, require_same_config
from train.objective import TileCounts, count_tile, score_tiles
from train.predict import (
    as_member,
    mean_of_views,
    predict_run,
    predict_views,
    read_fold,
    scaled_for,
)
from train.report.tables import find_scheme, predicted_classes
from train.run import CONFIG_FILE, FOLD_FILE, OOF_FOLDER, RUN_FILE, files_of_folds, fold_folder, is_fresh
from train.side_by_side import Work

MIN_GAIN = 0.01  # MCC beyond the spread of seeds that an ingredient must bring to be kept

RULE = f"""\
An ingredient is kept where its mean gains at least {MIN_GAIN} beyond the spread of seeds: the larger of its
own and the reference's. The *mean* is over folds and seeds, *pooled* is of the pixels of all tiles together.
The spread over folds is the standard deviation of their scores, that over seeds is the largest mean less the
smallest."""


@dataclass
class TrialSpec:
    """A trial in a set file: a base config, what is changed of it, and with how many views it is scored."""

    about: str = ""  # a line for the report
    config: Optional[str] = None  # YAML file beside the set file; null: the set's base
    settings: dict[str, Any] = field(default_factory=dict)  # nested, as in a config
    views: int = len(VIEWS)  # the first so many of solution.VIEWS are averaged


@dataclass
class SetSpec:
    """The content of a set file, such as train/configs/ablations.yaml."""

    base: str = "???"  # YAML file beside the set file
    reference: str = "???"  # name of the trial that the others are compared with
    trials: dict[str, TrialSpec] = field(default_factory=dict)


class Trial(NamedTuple):
    """A named config, a line about it, and the number of views that are averaged when it is scored."""

    name: str
    config: Config
    about: str = ""
    views: int = len(VIEWS)


class Task(NamedTuple):
    """One fold of a trial with one seed; `folder` is the run folder of trial and seed."""

    trial: Trial
    seed: int
    fold: int
    folder: Path


class Row(NamedTuple):
    """The scores of a trial, or of runs that were there already.

    `extent`, `four`: MCC over valid pixels, (seeds, folds), NaN for a fold without labels of four classes.
    `pooled`, `pooled_four`: of all tiles, (seeds,). `seconds`: to fit a fold, NaN where unknown. `config`:
    None where unknown.
    """

    name: str
    extent: np.ndarray
    four: np.ndarray
    pooled: np.ndarray
    pooled_four: np.ndarray
    seconds: float
    config: Optional[Config]
    about: str

    @property
    def mean(self) -> float:
        """Return the mean extent MCC over folds and seeds."""
        return float(self.extent.mean())

    @property
    def seed_spread(self) -> Optional[float]:
        """Return the largest less the smallest mean over folds, None for a single seed."""
        means = self.extent.mean(axis=1)
        return float(np.ptp(means)) if len(means) > 1 else None

    @property
    def fold_spread(self) -> Optional[float]:
        """Return the sample standard deviation of the folds' means over seeds, None for a single fold."""
        folds = self.extent.mean(axis=0)
        return float(folds.std(ddof=1)) if len(folds) > 1 else None


# --- Which trials -------------------------------------------------------------------------------------------


def read_set(path: Path) -> tuple[list[Trial], str]:
    """Return the trials of a set file and the name of its reference.

    Raises ConfigError for a missing or damaged file, an unknown key, a value of the wrong type or out of
    range, and for a reference that is no trial.
    """
    try:
        tree = OmegaConf.load(path) if path.is_file() else None
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"{path}: found no set of trials; see train/configs/ablations.yaml")
        spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SetSpec), tree))
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{path}: {error.full_key or 'set of trials'}: {reason}") from error
    assert isinstance(spec, SetSpec)  # the schema merged with
    trials = [_read_trial(path, spec.base, name, trial) for name, trial in spec.trials.items()]
    if spec.reference not in spec.trials:
        raise ConfigError(
            f"{path}: reference is {spec.reference!r}, expected one of its trials: {', '.join(spec.trials)}"
        )
    return trials, spec.reference


def _read_trial(path: Path, base: str, name: str, spec: TrialSpec) -> Trial:
    if not 1 <= spec.views <= len(VIEWS):
        raise ConfigError(f"{path}: trial {name}: views is {spec.views}, expected 1 to {len(VIEWS)}")
    config = load_config(path.parent / (spec.config or base))
    return Trial(name, change_config(config, spec.settings, f"{path}: trial {name}"), spec.about, spec.views)


def read_configs(paths: Iterable[Path]) -> list[Trial]:
    """Return a trial for each config file, named by the file. Raises ConfigError."""
    return [Trial(path.stem, load_config(path)) for path in paths]


def with_overrides(trial: Trial, overrides: Sequence[str], steps: Optional[int]) -> Trial:
    """Return a trial for single-threaded processes, with common overrides and a common number of steps."""
    config = change_config(trial.config, {"train": {"threads": 1}}, trial.name)
    for override in overrides:
        config = change_config(config, parse_override(override), f"trial {trial.name}: {override}")
    return trial._replace(config=config if steps is None else with_steps(config, steps))


def with_steps(config: Config, steps: int) -> Config:
    """Return a config that makes exactly `steps` steps, in the most epochs that divide them and are no more
    than the config's, without early stop. Raises ConfigError where `steps` is below 1.
    """
    if steps < 1:
        raise ConfigError(f"--steps is {steps}, expected 1 or more")
    epochs = max(number for number in range(1, config.train.epochs + 1) if steps % number == 0)
    settings = {
        "train": {"epochs": epochs, "early_stop": 0},
        "data": {"steps_per_epoch": steps // epochs},
    }
    return change_config(config, settings, "--steps")


def require_comparable(trials: Sequence[Trial], rows: Iterable[str], reference: str) -> None:
    """Raise ConfigError where names repeat, the reference is unknown, or folds or tiles of trials differ."""
    names = [trial.name for trial in trials] + list(rows)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)}: several trials have this name; rename the config file or row")
    if reference not in names:
        raise ConfigError(f"reference is {reference!r}, expected one of {', '.join(names)}")
    for key in ("scheme", "store"):
        values = sorted({getattr(trial.config.data, key) for trial in trials})
        if len(values) > 1:
            raise ConfigError(
                f"data.{key} differs between trials ({', '.join(values)}); expected one for all"
            )


# --- Running them -------------------------------------------------------------------------------------------


def list_tasks(trials: Sequence[Trial], seeds: Sequence[int], folds: Sequence[int], run: Path) -> list[Task]:
    """Return every fold of every trial and seed, all trials of the first seed first."""
    tasks = []
    for seed in seeds:
        for trial in trials:
            config = change_config(trial.config, {"train": {"seed": seed}}, f"seed {seed}")
            seeded = trial._replace(config=config)
            tasks += [Task(seeded, seed, fold, run / trial.name / f"seed{seed}") for fold in folds]
    return tasks


def prepare_folder(task: Task) -> None:
    """Write what the task's process reads: config.yaml, and run.json with scheme and views.

    Predictions of another number of views are removed. Raises RunError where the fold was begun with other
    settings.
    """
    require_same_config(task.trial.config, fold_folder(task.folder, task.fold))
    task.folder.mkdir(parents=True, exist_ok=True)
    about = {
        "model": task.trial.name,
        "scheme": task.trial.config.data.scheme,
        "views": task.trial.views,
    }
    path = task.folder / RUN_FILE
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("views") != task.trial.views:
        for prediction in (task.folder / OOF_FOLDER).glob("*.npy"):
            prediction.unlink()
    write_json(path, about)
    write_whole(task.folder / CONFIG_FILE, lambda part: save_config(task.trial.config, part))


def is_finished(task: Task, store: TileStore) -> bool:
    """Return whether the fold is fitted and all its held-out tiles are predicted."""
    checkpoint = fold_folder(task.folder, task.fold) / FOLD_FILE
    tiles = tiles_of(store, task.trial.config.data.scheme, [task.fold])
    return checkpoint.is_file() and all(
        is_fresh(_prediction(task.folder, tile), checkpoint) for tile in tiles
    )


def _prediction(folder: Path, tile: str) -> Path:
    return folder / OOF_FOLDER / f"{tile}.npy"


def tiles_of(store: TileStore, scheme: str, folds: Sequence[int]) -> list[str]:
    """Return the tiles that some folds of a scheme hold out, in the order of the store."""
    fold_of = store.fold_of(scheme)
    return [tile for tile in store.tile_ids if fold_of[tile] in folds]


def fit_and_predict(config_file: Path, folder: Path, fold: int, views: int) -> None:
    """Fit a fold and write the mean of `views` views of its held-out tiles to `folder`/oof: one task."""
    config = load_config(config_file)
    fit_fold(config, fold, folder)
    checkpoint = fold_folder(folder, fold) / FOLD_FILE
    record, store = read_fold(checkpoint), TileStore(config.data.store)
    member = as_member(record)
    (folder / OOF_FOLDER).mkdir(exist_ok=True)
    for tile in record["val_tiles"]:
        if not is_fresh(_prediction(folder, tile), checkpoint):
            image = store.image(tile)
            probs = mean_of_views(predict_views(scaled_for(member, record, image), image, views))
            write_array(_prediction(folder, tile), probs)


def log_of(task: Task) -> Path:
    """Return the file with what the task's process printed."""
    return task.folder / f"fold{task.fold}.log"


def work_of(task: Task) -> Work:
    """Return the process of a task."""
    arguments = ["train.ablate", task.folder / CONFIG_FILE, task.folder, task.fold, task.trial.views]
    name = f"{task.trial.name}, seed {task.seed}, fold {task.fold}"
    return Work(name, [str(argument) for argument in arguments], log_of(task))


def start(task: Task, slot: int) -> subprocess.Popen:
    """Start the process of a task, on one thread, its output in `log_of(task)`."""
    return side_by_side.start(work_of(task), slot)


def run_tasks(tasks: Sequence[Task], jobs: int, finished: Callable[[Task], None]) -> list[Task]:
    """Run the tasks' processes, `jobs` at once, and return the tasks that failed.

    `finished` is called after each one that did not. On an interruption, the processes are ended.
    """
    return side_by_side.run_side_by_side(tasks, jobs, start, lambda task: work_of(task).name, finished)


# --- Scoring them -------------------------------------------------------------------------------------------


def score_row(
    name: str,
    folders: Sequence[Path],
    store: TileStore,
    scheme: str,
    folds: Sequence[int],
    config: Optional[Config],
    about: str = "",
) -> Row:
    """Return the row of a trial from its run folders, one for each seed.

    Raises:
        RunError: a folder has other folds, or no predictions of some tile.
        train.report.ReportError: its predictions are damaged.
    """
    labels = store.labels
    fold_of = store.fold_of(scheme)
    scores = []
    for folder in folders:
        _require_predictions(name, folder, store, scheme, folds)
        tiles = [
            count_tile(
                tile, fold_of[tile], labels[tile], store.mask(tile), predicted_classes(folder, store, tile)
            )
            for tile in tiles_of(store, scheme, folds)
        ]
        scores.append(_mcc_of(tiles, folds))
    by_fold = np.array([seed[:-1] for seed in scores])  # (seeds, folds, 2)
    pooled = np.array([seed[-1] for seed in scores])  # (seeds, 2)
    seconds = _seconds(folders, folds)
    return Row(name, by_fold[..., 0], by_fold[..., 1], pooled[:, 0], pooled[:, 1], seconds, config, about)


def _mcc_of(tiles: Sequence[TileCounts], folds: Sequence[int]) -> list[tuple[float, float]]:
    """Return (extent MCC, four-class MCC or NaN) of each fold, and last of all tiles."""
    groups = [[tile for tile in tiles if tile.fold == fold] for fold in folds] + [list(tiles)]
    scores = [score_tiles(group)["valid_pixels"] for group in groups]
    return [
        (score["binary"]["mcc"], score["four_class"]["mcc"] if score["four_class"] else np.nan)
        for score in scores
    ]


def _require_predictions(
    name: str, folder: Path, store: TileStore, scheme: str, folds: Sequence[int]
) -> None:
    found = find_scheme(folder)
    if found != scheme:
        raise RunError(f"{name}: {folder} is a run on {found} folds, expected {scheme} as the other rows")
    wanted = tiles_of(store, scheme, folds)
    missing = [tile for tile in wanted if not _prediction(folder, tile).is_file()]
    if missing:
        raise RunError(
            f"{name}: {folder / OOF_FOLDER} has no predictions of {', '.join(missing)}. Finish the run's "
            "folds and evaluate them, or leave their folds out with --folds."
        )


def _seconds(folders: Sequence[Path], folds: Sequence[int]) -> float:
    """Return the mean seconds to fit a fold, NaN where there are no folds' records."""
    paths = [fold_folder(folder, fold) / FOLD_FILE for folder in folders for fold in folds]
    seconds = [read_record(path)["seconds"] for path in paths if path.is_file()]
    return float(np.mean(seconds)) if seconds else float("nan")


def include_run(
    name: str, folders: Sequence[Path], store: TileStore, scheme: str, folds: Sequence[int]
) -> Row:
    """Return the row of runs that are there already, one for each seed; predict what is not predicted."""
    for folder in folders:
        tiles = tiles_of(store, scheme, folds)
        if any(not _prediction(folder, tile).is_file() for tile in tiles):
            predict_run(folder, store)
    configs = files_of_folds(folders[0], CONFIG_FILE)
    config = load_config(configs[0]) if configs else None
    where = ", ".join(str(folder) for folder in folders)
    return score_row(name, folders, store, scheme, folds, config, f"there already: {where}")


def parse_includes(texts: Iterable[str]) -> dict[str, list[Path]]:
    """Return {name: run folders, one a seed} of texts such as "U-Net=runs/a" or "U-Net=runs/a,runs/b".

    Raises ConfigError for text of another form, or a folder that is not there.
    """
    included = {}
    for text in texts:
        name, equals, folders = text.partition("=")
        paths = [Path(folder) for folder in folders.split(",") if folder]
        if not (name and equals and paths):
            raise ConfigError(
                f"--include {text}: expected name=folder, or name=folder,folder for several seeds"
            )
        absent = [str(path) for path in paths if not path.is_dir()]
        if absent:
            raise ConfigError(f"--include {text}: no such folder: {', '.join(absent)}")
        included[name] = paths
    return included


# --- The table ----------------------------------------------------------------------------------------------


def decide(row: Row, reference: Row) -> str:
    """Return "reference", "kept" or "dropped" by `RULE`, with a star where a spread of seeds is unknown."""
    if row.name == reference.name:
        return "reference"
    spreads = [row.seed_spread, reference.seed_spread]
    needed = MIN_GAIN + max((spread for spread in spreads if spread is not None), default=0.0)
    gain = row.mean - reference.mean
    return ("kept" if gain >= needed - 1e-9 else "dropped") + ("*" if None in spreads else "")


def format_report(rows: Sequence[Row], reference: Row, folds: Sequence[int], about: str, command: str) -> str:
    """Return the Markdown report of some rows, the reference among them."""
    decisions = {row.name: decide(row, reference) for row in rows}
    star = "\n\\* The spread is not known of a row with one seed: the other row's counts, or none.\n"
    parts = [
        "# What each ingredient is worth",
        f"{about}\n\n```sh\n{command}\n```\n\n{RULE}",
        "## Glacier of either kind against the rest",
        "Out-of-fold MCC over valid pixels.",
        markdown_table(*_extent_table(rows, reference, folds, decisions))
        + (star if any(text.endswith("*") for text in decisions.values()) else ""),
        "## Four classes",
        "Of the tiles with phase-2 labels; folds without one have no score.",
        markdown_table(*_four_class_table(rows, folds)),
        "## The trials",
        markdown_table(
            ["trial", f"settings that differ from {reference.name}", "about"],
            _settings_table(rows, reference),
        ),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _extent_table(
    rows: Sequence[Row], reference: Row, folds: Sequence[int], decisions: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    head = ["trial", *(f"fold {fold}" for fold in folds), "mean", "gain", "over folds", "over seeds", "seeds"]
    head += ["pooled", "seconds a fold", "steps", ""]
    lines = []
    for row in rows:
        gain = NONE if row is reference else f"{row.mean - reference.mean:+.3f}"
        scores = [number_text(value) for value in (*row.extent.mean(axis=0), row.mean)]
        spreads = [number_text(row.fold_spread), number_text(row.seed_spread), str(len(row.extent))]
        seconds = NONE if np.isnan(row.seconds) else f"{row.seconds:.0f}"
        cost = [number_text(float(row.pooled.mean())), seconds, _steps(row.config)]
        lines.append([row.name, *scores, gain, *spreads, *cost, decisions[row.name]])
    return head, lines


def _four_class_table(rows: Sequence[Row], folds: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    shown = [number for number in range(len(folds)) if not np.isnan(rows[0].four[:, number]).any()]
    head = ["trial", *(f"fold {folds[number]}" for number in shown), "mean", "pooled"]
    lines = []
    for row in rows:
        scores = row.four[:, shown].mean(axis=0)
        mean = float(scores.mean()) if shown else None
        cells = [*scores, mean, float(row.pooled_four.mean())]
        lines.append([row.name, *(number_text(value) for value in cells)])
    return head, lines


def _settings_table(rows: Sequence[Row], reference: Row) -> list[list[str]]:
    lines = []
    for row in rows:
        changed = ""
        if row.config is not None and reference.config is not None:
            changed = describe_differences(without_seed(row.config), without_seed(reference.config))
        lines.append([row.name, f"`{changed}`" if changed else NONE, row.about or NONE])
    return lines


def without_seed(config: Config) -> Config:
    """Return a config with seed 0, for comparisons of all else."""
    return change_config(config, {"train": {"seed": 0}}, "seed")


def _steps(config: Optional[Config]) -> str:
    return NONE if config is None else str(config.train.epochs * config.data.steps_per_epoch)


# --- All of it ----------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What `python -m train ablate` was asked for."""

    trials: Sequence[Trial]
    included: Mapping[str, Sequence[Path]]
    reference: str
    run: Path
    report: Path
    store: Path
    seeds: Sequence[int] = (0,)
    folds: Optional[Sequence[int]] = None
    jobs: int = 1
    command: str = ""


def ablate(request: Request) -> list[Row]:
    """Run the trials, and write the report after each that is complete; return the rows.

    Raises:
        ConfigError: trials cannot be compared.
        RunError: a folder holds a run with other settings, or some folds failed (after all others are done).
        prep.store.StoreError: the store is incomplete, or has no such scheme.
    """
    require_comparable(request.trials, request.included, request.reference)
    store = TileStore(request.store)
    scheme = _scheme(request)
    folds = _folds(store, scheme, request.folds)
    tasks = list_tasks(request.trials, request.seeds, folds, request.run)
    for task in tasks:
        prepare_folder(task)
    rows = {
        name: include_run(name, folders, store, scheme, folds) for name, folders in request.included.items()
    }
    to_do = [task for task in tasks if not is_finished(task, store)]
    open_tasks = {(task.folder, task.fold) for task in to_do}

    def complete(trial: Trial) -> None:
        """Score the trial and write the report, if all its folds are done."""
        folders = [request.run / trial.name / f"seed{seed}" for seed in request.seeds]
        if not any((folder, fold) in open_tasks for folder in folders for fold in folds):
            rows[trial.name] = score_row(trial.name, folders, store, scheme, folds, trial.config, trial.about)
            _write(request, rows, folds, scheme, len(store.tile_ids))

    def finished(task: Task) -> None:
        open_tasks.remove((task.folder, task.fold))
        complete(task.trial)

    for trial in request.trials:
        complete(trial)
    if not request.trials:
        _write(request, rows, folds, scheme, len(store.tile_ids))
    failed = run_tasks(to_do, request.jobs, finished)
    if failed:
        raise RunError(side_by_side.explain_failures([log_of(task) for task in failed]))
    return list(rows.values())


def _scheme(request: Request) -> str:
    if request.trials:
        return request.trials[0].config.data.scheme
    return find_scheme(next(iter(request.included.values()))[0])


def _folds(store: TileStore, scheme: str, wanted: Optional[Sequence[int]]) -> list[int]:
    known = folds_of_scheme(store, scheme)
    unknown = sorted(set(wanted or ()) - set(known))
    if unknown:
        raise ConfigError(f"--folds: {scheme} has no fold {unknown[0]}; it has {', '.join(map(str, known))}")
    return sorted(set(wanted)) if wanted else known


def _write(request: Request, rows: Mapping[str, Row], folds: Sequence[int], scheme: str, tiles: int) -> None:
    """Write the report of the complete rows in the order they were asked for, once the reference is one."""
    if request.reference not in rows:
        return
    order = [*(trial.name for trial in request.trials), *request.included]
    complete = [rows[name] for name in order if name in rows]
    unfinished = [name for name in order if name not in rows]
    about = f"{tiles} tiles, {scheme} folds {', '.join(map(str, folds))}."
    if unfinished:
        about += f" Not finished yet: {', '.join(unfinished)}."
    text = format_report(complete, rows[request.reference], folds, about, request.command)
    write_text(request.report, text)


def parse_arguments(arguments: argparse.Namespace) -> Request:
    """Return the request that the command line of `python -m train ablate` states.

    Raises ConfigError where a file, a setting or a name is wrong, or nothing is asked for.
    """
    trials, reference = read_set(arguments.set) if arguments.set else ([], None)
    trials = _selected(trials, arguments.trials) + read_configs(arguments.configs)
    included = parse_includes(arguments.include)
    names = [*(trial.name for trial in trials), *included]
    if not names:
        raise ConfigError("nothing to compare: give --set, --configs or --include")
    overrides = list(arguments.override)
    if arguments.store:
        overrides.append(f"data.store={arguments.store}")
    trials = [with_overrides(trial, overrides, arguments.steps) for trial in trials]
    store = trials[0].config.data.store if trials else arguments.store or Config().data.store
    return Request(
        trials=trials,
        included=included,
        reference=arguments.reference or (reference if reference in names else names[0]),
        run=arguments.run,
        report=arguments.report,
        store=Path(store),
        seeds=sorted(set(arguments.seeds)),
        folds=arguments.folds,
        jobs=max(1, arguments.jobs or usable_cores()),
        command="python -m train " + shlex.join(sys.argv[1:]),
    )


def _selected(trials: Sequence[Trial], names: Optional[str]) -> list[Trial]:
    if names is None:
        return list(trials)
    known = {trial.name: trial for trial in trials}
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(
            f"--trials: no trial {unknown[0]!r} in the set; it has {', '.join(known) or 'none'}"
        )
    return [known[name] for name in wanted]


def run_worker(arguments: Optional[Sequence[str]] = None) -> None:
    """Run one task: the command that `start` starts."""
    parser = argparse.ArgumentParser(prog="python -m train.ablate", description=fit_and_predict.__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("fold", type=int)
    parser.add_argument("views", type=int)
    parsed = parser.parse_args(arguments)
    fit_and_predict(parsed.config, parsed.folder, parsed.fold, parsed.views)


if __name__ == "__main__":
    run_worker()
