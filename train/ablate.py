"""Ablations: networks that differ from a recipe in a few named settings, trained and scored on the same folds.

What is compared is the extent, glacier of either kind against the rest: the kind is another network's. A trial's
networks with one seed lie in `<run>/<trial>/seed<k>`, a folder like that of any member; finished ones are kept.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prep.files import write_text
from prep.store import TileStore
from prep.text import NONE, markdown_table
from solution import VIEWS, KitError
from train.config import Config, ConfigError, change_config, describe_differences, load_config, members_of
from train.data import folds_of_scheme
from train.objective import (
    GLACIER,
    HEADLINES,
    OTHER,
    TileCounts,
    count_tiles,
    difference_intervals,
    interval_text,
    pool,
    score_intervals,
)
from train.predict import load_views, predict_member
from train.run import ALL, RunError, parse_folds
from train.side_by_side import Job, fit_jobs

SET = Path("train/recipes/ablations.yaml")
SCORE = "extent MCC"  # of objective.HEADLINES


@dataclass
class TrialSpec:
    """A trial in a set file: what is changed of the base, and with how many views it is scored."""

    about: str = ""  # a line for the report
    settings: dict[str, Any] = field(default_factory=dict)  # nested, as in a recipe
    views: int = 1  # the first so many of solution.VIEWS are averaged


@dataclass
class SetSpec:
    """The content of a set file, such as train/recipes/ablations.yaml."""

    base: str = "???"  # recipe, a path from the set file
    reference: str = "???"  # name of the trial that the others are compared with
    trials: dict[str, TrialSpec] = field(default_factory=dict)


class Trial(NamedTuple):
    """A named config of one network, a line about it, and the number of views that are averaged."""

    name: str
    config: Config
    about: str
    views: int


class Row(NamedTuple):
    """A trained trial: the mean seconds to train a network, and for each seed the counts of the tiles."""

    trial: Trial
    seconds: float
    by_seed: list[list[TileCounts]]

    @property
    def counts(self) -> list[TileCounts]:
        """The counts of all seeds added up, block by block: a block counts once, however many seeds there are."""
        return [tiles[0]._replace(blocks=sum(tile.blocks for tile in tiles)) for tiles in zip(*self.by_seed)]


def read_set(path: Path, overrides: Sequence[str] = ()) -> list[Trial]:
    """Return the trials of a set file, the reference first; `overrides` change the recipe that they differ from.

    Raises ConfigError for a missing or damaged file, an unknown key, a value of the wrong type or out of range.
    """
    try:
        tree = OmegaConf.load(path) if path.is_file() else None
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"{path}: found no set of trials; see {SET} for an example")
        spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SetSpec), tree))
    except (OmegaConfBaseException, TypeError) as error:  # the latter for a list where a mapping is expected
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: {getattr(error, 'full_key', '') or 'set of trials'}: {reason}") from error
    assert isinstance(spec, SetSpec)  # the schema merged with
    if spec.reference not in spec.trials:
        known = ", ".join(spec.trials)
        raise ConfigError(f"{path}: reference is {spec.reference!r}, expected one of its trials: {known}")
    recipe = replace(load_config(path.parent / spec.base, overrides), members={})
    ((_, base),) = members_of(recipe).values()  # of one network: nothing about members or steps after them
    trials = []
    for name, trial in spec.trials.items():
        config = change_config(base, trial.settings, f"{path}: trial {name}")
        if config.data.scheme != base.data.scheme:
            raise ConfigError(f"{path}: trial {name}: changes data.scheme, and is compared on other tiles then")
        most = len(VIEWS) if config.augment.every_direction else 1
        if not 1 <= trial.views <= most:
            raise ConfigError(
                f"{path}: trial {name}: views is {trial.views}, expected 1 to {most}; more than 1 needs "
                "augment.flip and augment.rot90"
            )
        trials.append(Trial(name, config, trial.about, trial.views))
    return sorted(trials, key=lambda trial: trial.name != spec.reference)


def select(trials: Sequence[Trial], names: Optional[str]) -> list[Trial]:
    """Return the reference and the trials that text such as "no-mix,lite2" names; all for None."""
    wanted = [trial.name for trial in trials] if names is None else names.split(",")
    unknown = sorted(set(wanted) - {trial.name for trial in trials})
    if unknown:
        known = ", ".join(trial.name for trial in trials)
        raise ConfigError(f"--trials: found {unknown[0]!r}, expected some of {known}")
    return [trial for trial in trials if trial is trials[0] or trial.name in wanted]


def run_trial(trial: Trial, run: Path, seeds: Sequence[int], folds: Sequence[int], jobs: int) -> Row:
    """Train a trial's networks, `jobs` side by side, and count what they say of tiles that they never saw."""
    store = TileStore(trial.config.data.store)
    fold_of = store.fold_of(trial.config.data.scheme)
    held_out = [tile for tile in store.tile_ids if fold_of[tile] in folds]
    folders = {seed: run / trial.name / f"seed{seed}" for seed in seeds}
    todo = []
    for seed, folder in folders.items():
        config = change_config(trial.config, {"train": {"seed": seed}}, f"--seeds {seed}")
        todo += [Job(config, folder, fold) for fold in folds]
    records = fit_jobs(todo, jobs)
    by_seed = []
    for folder in folders.values():
        predict_member(folder, store)

        def classes(tile: str, folder: Path = folder) -> np.ndarray:
            probability = load_views(folder, tile, trial.views).sigmoid().mean(dim=0).numpy()
            return np.where(probability > 0.5, GLACIER, OTHER)

        by_seed.append(count_tiles(store, held_out, classes, fold_of))
    return Row(trial, float(np.mean([record["seconds"] for record in records])), by_seed)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown, each with its difference from the first."""
    head = ["trial", "MCC", "difference", "seeds", "better folds", "steps", "seconds a network"]
    first, lines = rows[0].counts, []
    for row in rows:
        counts, train = row.counts, row.trial.config.train
        scores = sorted(_mcc(tiles) for tiles in row.by_seed)
        spread = NONE if len(scores) == 1 else f"{scores[0]:.3f} to {scores[-1]:.3f}"
        folds = sorted({tile.fold for tile in counts})
        better = [_mcc(counts, fold) > _mcc(first, fold) for fold in folds]
        steps = train.epochs * row.trial.config.data.steps_per_epoch
        score = interval_text(score_intervals(counts)[SCORE])
        gain = interval_text(difference_intervals(counts, first)[SCORE], "+")
        compared = ["", spread, ""] if row is rows[0] else [gain, spread, f"{sum(better)} of {len(folds)}"]
        lines.append([row.trial.name, score, *compared, str(steps), f"{row.seconds:.0f}"])
    return markdown_table(head, lines)


def _mcc(tiles: Sequence[TileCounts], fold: Optional[int] = None) -> float:
    """Return the MCC of the extent over some tiles, or those of one fold."""
    return float(HEADLINES[SCORE][0](pool([tile for tile in tiles if fold in (None, tile.fold)])))


def report(rows: Sequence[Row], command: str) -> str:
    """Return the Markdown report of some rows, the reference first."""
    reference = rows[0].trial
    tiles = len(rows[0].counts)
    settings = [
        [row.trial.name, describe_differences(row.trial.config, reference.config) or NONE, row.trial.about]
        for row in rows
    ]
    return (
        f"# What each ingredient is worth\n\n{tiles} tiles, {reference.config.data.scheme} folds, "
        f"{len(rows[0].by_seed)} seed(s). Glacier of either kind against the rest, out of fold, valid pixels, 95 % "
        f"intervals by bootstrap over blocks of 3 km; differences are paired and from `{reference.name}`. *Seeds*: "
        "lowest and highest score of one seed. *Better folds*: those that score above the reference.\n\n"
        f"```sh\n{command}\n```\n\n{table(rows)}\n\n## The trials\n\n"
        f"{markdown_table(['trial', f'settings that differ from {reference.name}', 'about'], settings)}\n"
    )


def add_ablate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ablate`."""
    parser.add_argument("--set", type=Path, default=SET, help="YAML file of trials (default: %(default)s)")
    parser.add_argument("--run", type=Path, required=True, help="folder of all trials, e.g. runs/ablate")
    parser.add_argument("--trials", help="only these and the reference, e.g. no-mix,lite2")
    parser.add_argument("--seeds", default="0", help="e.g. 0,1 (default: 0)")
    parser.add_argument("--folds", type=parse_folds, help="e.g. 0,1; default: all of the scheme")
    parser.add_argument("--store", help="tile store, in the place of the recipe's data.store")
    parser.add_argument("--jobs", type=int, default=1, help="networks at once (default: 1)")
    parser.add_argument("--report", type=Path, help="Markdown file (default: ablations.md in the run)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the base recipe")


def run_ablate(arguments: argparse.Namespace) -> int:
    """Train each trial on the same folds and tabulate its worth; the report grows with every trial."""
    overrides = arguments.overrides + ([f"data.store={arguments.store}"] if arguments.store else [])
    trials = select(read_set(arguments.set, overrides), arguments.trials)
    if not all(seed.isdecimal() for seed in arguments.seeds.split(",")):
        raise ConfigError(f"--seeds is {arguments.seeds!r}, expected numbers such as 0,1")
    seeds = sorted({int(seed) for seed in arguments.seeds.split(",")})
    data = trials[0].config.data
    folds = arguments.folds or folds_of_scheme(TileStore(data.store), data.scheme)
    if ALL in folds:
        raise ConfigError(f"--folds: found {ALL!r}, expected folds that hold tiles out, e.g. 0,1")
    command, path = "python -m train " + shlex.join(sys.argv[1:]), arguments.report
    rows, failed = [], []
    for trial in trials:
        try:
            rows.append(run_trial(trial, arguments.run, seeds, folds, arguments.jobs))
        except KitError as error:  # others may still be trained, unless there is nothing to compare them with
            if trial is trials[0]:
                raise
            failed.append(f"{trial.name}: {error}")
            continue
        write_text(path or arguments.run / "ablations.md", report(rows, command))
    print(table(rows))
    if failed:
        raise RunError(f"{len(failed)} trials failed, the others are in the report.\n" + "\n".join(failed))
    return 0
