"""Command line of training: `python -m train <command> --help`."""

import argparse
import sys
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Sequence


class Command(NamedTuple):
    """A subcommand. `run` imports what it needs itself, so that --help and mistakes are answered at once."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fit`."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see train/configs/")
    parser.add_argument("--run", type=Path, required=True, help="folder for the results, e.g. runs/unet")
    parser.add_argument("--folds", type=fold_numbers, help="fold numbers, e.g. 0,1,2; default: all folds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. optim.lr=3e-4")


def run_fit(arguments: argparse.Namespace) -> int:
    """Fit folds; a run that was interrupted is continued by the same command."""
    from train.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from train.fit import fit_all

    fit_all(config, arguments.run, arguments.folds)
    return 0


def fold_numbers(text: str) -> list[int]:
    """Return the numbers in text such as "0,1,2"."""
    return [int(number) for number in text.split(",")]


COMMANDS = {
    "fit": Command("train the folds of a tile store", add_fit_arguments, run_fit),
}


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a subcommand and return the exit status: 0 done, 2 wrong use or unusable input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.help, description=command.run.__doc__))
    parsed = parser.parse_args(arguments)
    try:
        return COMMANDS[parsed.command].run(parsed)
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the last finished epoch", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ not in EXPECTED_ERRORS:
            raise
        print(f"python -m train {parsed.command}: {error}", file=sys.stderr)
        return 2


# Errors that are the user's to solve: their message is enough. By name, since importing them takes seconds.
EXPECTED_ERRORS = ("ConfigError", "DataError", "InputError", "RunError", "StoreError", "TileError")


if __name__ == "__main__":
    sys.exit(main())
