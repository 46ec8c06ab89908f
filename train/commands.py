"""The commands that make weights: fit, score, ensemble, pack."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from prep.store import TileStore
from solution import KitError, read_model_file, warn
from train.config import Config, load_config, members_of
from train.objective import interval_text
from train.run import KIND_FOLDER, parse_folds

RECIPE = Path("train/recipe.yaml")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that works on a run."""
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="YAML file (default: %(default)s)")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, e.g. runs/mine")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. optim.lr=3e-4")


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fit`."""
    add_recipe_arguments(parser)
    parser.add_argument("--folds", type=parse_folds, help="e.g. 0,1,all; default: what the recipe needs")
    parser.add_argument("--member", help="only this member, without the network of the kind")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="networks at once, each a process on one thread or GPU (default: 1)",
    )


def run_fit(arguments: argparse.Namespace) -> int:
    """Train all networks of a recipe; the same command continues a run that was interrupted."""
    from train import kind
    from train.data import describe_unlearned
    from train.hardware import is_first_process
    from train.side_by_side import fit_jobs, jobs_of, require_possible

    config = load_config(arguments.recipe, arguments.overrides)
    jobs = jobs_of(config, arguments.run, arguments.folds, arguments.member)
    require_possible(jobs, arguments.jobs)
    if (unlearned := describe_unlearned(TileStore(config.data.store))) and is_first_process(config):
        warn(unlearned)
    if not arguments.member:  # first: in seconds it is told that labels lack a kind, and finished folds can be scored
        kind.fit_kind(config, arguments.run / KIND_FOLDER, arguments.folds or kind.kind_folds(config))
    fit_jobs(jobs, arguments.jobs)
    return 0


add_score_arguments = add_recipe_arguments


def run_score(arguments: argparse.Namespace) -> int:
    """Predict each tile by the networks that never saw it, and score the ensemble."""
    from train.predict import predict_run
    from train.pretrained import warn_of_seen_ground
    from train.report.scores import score_run

    config = load_config(arguments.recipe, arguments.overrides)
    store = TileStore(config.data.store)
    predict_run(arguments.run, config, store)
    warn_of_seen_ground(arguments.run, members_of(config), store)
    print_scores(arguments.run, score_run(arguments.run, store))
    return 0


def print_scores(run: Path, scores: dict) -> None:
    """Print a run's out-of-fold scores, a line each."""
    for name, found in scores["intervals"].items():
        print(f"{run}: {name}, out of fold, valid pixels, with its 95 % interval: {interval_text(found)}")


def add_ensemble_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ensemble`."""
    add_recipe_arguments(parser)
    parser.add_argument("--report", type=Path, help="Markdown file (default: ensemble.md in the run)")


def run_ensemble(arguments: argparse.Namespace) -> int:
    """Measure what each member, view and step after the networks is worth, out of fold."""
    from train.ensemble import Evidence, measure, table, write_report

    config = load_config(arguments.recipe, arguments.overrides)
    rows = measure(Evidence(arguments.run, config))
    command = "python -m train " + shlex.join(sys.argv[1:])
    about = f"{len(rows[0].counts)} tiles, {config.data.scheme} folds, recipe {arguments.recipe}."
    write_report(arguments.report or arguments.run / "ensemble.md", rows, about, command)
    print(table(rows))
    return 0


def make_command(arguments: argparse.Namespace, config: Config) -> str:
    """Return the `make` command that repeats a run, with every setting that was given."""
    recipe = [] if arguments.recipe == RECIPE else [f"RECIPE={arguments.recipe}"]
    own = ("data.store", "data.scheme")  # DATA and SCHEME say these
    given = [text for text in arguments.overrides if text.partition("=")[0] not in own]
    settings = [f"SET={shlex.join(given)}"] if given else []
    more = shlex.join([f"SCHEME={config.data.scheme}", *recipe, *settings])
    return f"make train-all DATA=<folder with Band1 ... Band5 and labels> {more}"


def add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pack`."""
    add_recipe_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("weights/model.pth"), help="default: %(default)s")
    parser.add_argument("--time-budget", type=float, help="seconds, in the place of the recipe's pack.time_budget")


def run_pack(arguments: argparse.Namespace) -> int:
    """Write model.pth and its card from a finished run."""
    from train.pack import pack
    from train.submit.assemble import SOLUTION, assemble, write_solution

    if arguments.time_budget is not None:
        arguments.overrides.append(f"pack.time_budget={arguments.time_budget}")
    config = load_config(arguments.recipe, arguments.overrides)
    command = make_command(arguments, config)
    card = pack(arguments.run, config, arguments.out, command)
    print(f"{arguments.out} and {card} written")
    content = read_model_file(arguments.out)
    if assemble(content) != SOLUTION.read_text(encoding="utf-8"):
        beside = arguments.out.with_name("solution.py")
        if beside.resolve() == SOLUTION:
            raise KitError(f"{beside}: is the kit's own, and this model needs another; give --out in another folder")
        write_solution(content, beside)
        print(f"{beside} written: this model needs it in the place of the kit's own (make submission takes it)")
    return 0
