"""Command line of the data preparation: `python -m prep competition` and `python -m prep sample`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Sequence

from prep.competition import PHASE_OPTIONS, PrepError, format_summary, prepare
from prep.folds import FoldError
from prep.stats import StatsError
from prep.store import StoreError, refuse_existing
from solution import InputError

EXPECTED_ERRORS = (InputError, PrepError, StoreError, FoldError, StatsError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after an error message where the input does not allow it."""
    options = build_parser().parse_args(arguments)
    try:
        options.command(options)
    except EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each command puts its function into `command`."""
    parser = argparse.ArgumentParser(prog="python -m prep", description="Raw data to tile stores.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_competition(commands)
    _add_sample(commands)
    return parser


def _add_competition(commands: argparse._SubParsersAction) -> None:
    summary = "the organisers' training tiles to a tile store"
    parser = commands.add_parser("competition", help=summary, description=summary)
    parser.add_argument("--data", type=Path, required=True, help="holds Band1 ... Band5 and label folders")
    parser.add_argument("--out", type=Path, default=Path("data/competition"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the stratified folds (default: %(default)s)")
    parser.add_argument(
        "--phase",
        choices=list(PHASE_OPTIONS),
        default="auto",
        help="what label/ holds (auto: told by its values)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older store")
    parser.set_defaults(command=run_competition)


def _add_sample(commands: argparse._SubParsersAction) -> None:
    summary = "synthetic scenes in the competition's layout, for the demo and the tests"
    parser = commands.add_parser("sample", help=summary, description=summary)
    parser.add_argument("--out", type=Path, default=Path("data/sample"), help="default: %(default)s")
    parser.add_argument("--tiles", type=int, default=10, help="number of scenes (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="side in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    parser.add_argument(
        "--naming", choices=["training", "platform"], default="training", help="style of file names"
    )
    parser.add_argument(
        "--labels", choices=["phase1", "phase2", "both"], default="both", help="label folders to write"
    )
    parser.set_defaults(command=run_sample)


def run_competition(options: argparse.Namespace) -> None:
    """Write the tile store and print its statistics and folds."""
    summary = prepare(
        options.data, options.out, seed=options.seed, phase=options.phase, overwrite=options.overwrite
    )
    print(format_summary(summary))


def run_sample(options: argparse.Namespace) -> None:
    """Write synthetic scenes into a new folder."""
    refuse_existing(options.out)
    from prep.synthetic import write_sample  # here, so that the other command does not load what it needs

    write_sample(options.out, options.tiles, options.size, options.seed, options.naming, options.labels)
    print(f"{options.out}: {options.tiles} synthetic tiles of {options.size} px written")


if __name__ == "__main__":
    sys.exit(main())
