"""Command line of training: `python -m train <command> --help`."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from typing import Optional, Sequence

from solution import KitError

# Command: the module that has add_<command>_arguments and run_<command>, and what it does. Modules are imported
# when their command is called: some need seconds for their libraries.
COMMANDS = {
    "fit": ("train.commands", "train the networks of a recipe"),
    "score": ("train.commands", "score a run out of fold"),
    "ensemble": ("train.commands", "what is each member, view and step worth?"),
    "pack": ("train.commands", "write model.pth from a run"),
    "distil": ("train.distil", "train one network on the answers of a run"),
    "ablate": ("train.ablate", "what is each ingredient of a recipe worth?"),
    "baseline": ("train.baseline", "score a gradient boosting on the same folds"),
    "report": ("train.report.page", "tables and a page on runs"),
    "calibration": ("train.report.calibration", "do probabilities and areas of maps hold?"),
    "compare": ("train.report.compare", "do two runs differ?"),
    "preview": ("train.masks.command", "draw tiles, masks and a contact sheet"),
    "evaluate": ("train.masks.command", "score any folder of masks"),
    "export": ("train.masks.command", "masks as GeoTIFF and polygons for QGIS"),
    "map": ("train.masks.command", "a Landsat scene to a glacier map"),
    "checklist": ("train.checklist", "are data, recipe and weights as they should be?"),
    "check": ("train.submit.check", "would the submission be accepted?"),
    "grader-check": ("train.submit.grader", "the same masks in the grader's Python?"),
    "submission": ("train.submit.archive", "check, then zip the submission"),
    "bench": ("train.submit.bench", "time solution.py, and where it goes"),
}

# Of options: the variable of the Makefile that gives them, for those who typed `make`.
ALIKE = ("run", "recipe", "jobs", "store", "weights", "masks", "labels", "out")
MAKE_NAMES = {f"--{name}": f"{name.upper()}=" for name in ALIKE}
MAKE_NAMES |= {"--pred": "MASKS=", "--data": "IN=", "--overwrite": "OVERWRITE=yes", "--force": "FORCE=yes"}


def in_words_of_caller(message: str) -> str:
    """Return a message with options named as the caller gives them: the Makefile says that it is one."""
    if "CALLED_BY_MAKE" not in os.environ:
        return message
    # what stands in backquotes is a command as it is typed
    return re.sub(r"`[^`]*`|--[a-z]+\b(?!-)", lambda found: MAKE_NAMES.get(found[0], found[0]), message)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command and return the exit status: 0 done, 1 it found faults, 2 wrong use, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in COMMANDS:
        print("usage: python -m train <command> [--help]\n")
        print("\n".join(f"  {name:<13} {text}" for name, (_, text) in COMMANDS.items()))
        known = given and given[0] in ("-h", "--help")
        if given and not known:
            print(f"\npython -m train: found {given[0]!r}, expected one of these commands", file=sys.stderr)
        return 0 if known else 2
    name = given[0].replace("-", "_")
    module = importlib.import_module(COMMANDS[given[0]][0])
    run = getattr(module, f"run_{name}")
    parser = argparse.ArgumentParser(prog=f"python -m train {given[0]}", description=run.__doc__)
    getattr(module, f"add_{name}_arguments")(parser)
    try:
        return run(parser.parse_intermixed_args(given[1:]))
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it was", file=sys.stderr)
        return 130
    except (KitError, OSError) as error:  # the latter: no permission, a full disk, a name that is taken
        print(f"python -m train {given[0]}: {in_words_of_caller(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
