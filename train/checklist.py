"""The checklists of the way to a submission: before pretraining, before fine-tuning, before submission.

A line's function takes what is looked at and the members' configs and returns what it found, or raises a KitError.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Callable

import numpy as np

from prep import ground, stats
from prep.hkh.landsat7 import CHANNELS_OF_BAND
from prep.labels import CODE_NAMES
from prep.store import STORE_FILE, TileStore
from solution import BANDS, KitError
from train.commands import RECIPE
from train.config import Config, load_config, members_of
from train.fit import arch_of
from train.objective import GLACIER_CODES
from train.pretrained import ground_seen_by, read_pretrained
from train.submit import callers, check
from train.submit.assemble import find_solution
from train.submit.tiles import lay_out_samples
from train.submit.verdict import list_failures

LOOKED_AT, MOST_EMPTY = 200, 0.2  # masks, evenly spread over a store; share of tiles without a glacier
RATES = (1e-4, 3e-3)  # reports/pretraining.md: 1e-3 is best, 5e-5 learns too little
AGAIN = "make the store again with python -m prep"


def expect(sound: object, found: object, otherwise: str) -> str:
    """Return what was found as text. Raises KitError with what was expected where it is not sound."""
    if not sound:
        raise KitError(f"found {found}, expected {otherwise}")
    return str(found)


def _channels(one: TileStore, _: object) -> str:
    about = json.loads((one.folder / STORE_FILE).read_text(encoding="utf-8"))
    found = next(iter(about.get("channels", {"": {}}).values()))
    right = len(found) == len(BANDS) and all(a in b for a, b in zip(found, CHANNELS_OF_BAND))
    return expect(right, found, f"B1, B2, B3, B5, B6_VCID_1, of 15 those at 0, 1, 2, 4, 5; {AGAIN} hkh")


def _codes(one: TileStore, _: object) -> str:
    chosen = one.tile_ids[:: -(-len(one.tile_ids) // LOOKED_AT)]
    found = sorted({int(value) for name in chosen for value in np.unique(one.mask(name))})
    return expect(set(found) <= set(CODE_NAMES), found, f"indices 0 to 5, 255 where unknown; {AGAIN}")


def _empty(one: TileStore, _: object) -> str:
    share = np.mean([not any(tile.counts[CODE_NAMES[code]] for code in GLACIER_CODES) for tile in one.tiles])
    return expect(share <= MOST_EMPTY, f"{share:.0%}", f"{MOST_EMPTY:.0%} or less; leave some tiles out")


def _folds(one: TileStore, _: object) -> str:
    for scheme in (name for name, value in one.folds.items() if isinstance(value, dict)):
        odd = sorted(set(one.fold_of(scheme)) ^ set(one.tile_ids) or ground.in_two_folds(one, scheme))
        expect(not odd, f"{odd[:3]} in none or two of {scheme}", f"tile, scene and place in one; {AGAIN}")
    return f"{len(one.tile_ids)} tiles, each in one fold"


def _checkpoint(path: Path, members: list[Config]) -> str:
    (record, *_) = [read_pretrained(path, arch_of(config)) for config in members]
    known = ground.on_ground(ground.read_ground(members[0].data.store), [ground_seen_by(record)])
    expect(not known, f"{len(known)} tiles whose ground it has seen", "none; repeat make pretrain")
    return stats.plausible(record["normalization"])


def _rates(_: object, members: list[Config]) -> str:
    found = [config.optim.lr for config in members]
    sound = RATES[0] <= min(found) <= max(found) <= RATES[1]
    return expect(sound, found, f"{RATES[0]:g} to {RATES[1]:g}, best 1e-3: set optim.lr")


def _accepted(path: Path, _: object) -> str:
    with tempfile.TemporaryDirectory(prefix="checklist-") as work:
        solution, model = callers.copy_submission(find_solution(None, path, Path(work)), path, Path(work))
        candidate = callers.Candidate(solution, model, Path(work), sys.executable, lambda text: None)
        case = lay_out_samples("tile", 1, 256, "platform", Path(work))
        results = callers.check_command_line(candidate, case, callers.COMMAND_LINES[0])[0]
        results += [*callers.check_maskgeration(candidate, case)[0], check.check_size(path)]
    faults = [f"{one.check}: {one.found}" for one in list_failures(results)]
    return expect(not faults, faults or f"{len(results)} checks passed", "no fault: make check says more")


OF_STORE: tuple[tuple[str, Callable[..., str]], ...] = (
    ("units, normalisation", lambda one, _: stats.plausible(one.stats)),
    ("masks of class indices", _codes),
    ("tiles without a glacier", _empty),
    ("folds without a leak", _folds),
)
LINES: tuple[tuple[str, str, str, Callable[..., str]], ...] = (  # list, line, what it looks at, how
    ("before pretraining", "bands by name", "hkh", _channels),
    *(("before pretraining", line, "hkh", look) for line, look in OF_STORE),
    *(("before fine-tuning", line, "store", look) for line, look in OF_STORE),
    ("before fine-tuning", "pretrained checkpoint", "pretrained", _checkpoint),
    ("before fine-tuning", "learning rate", "recipe", _rates),
    ("before submission", "size, masks from an empty folder", "weights", _accepted),
)


def add_checklist_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `checklist`."""
    names = "hkh", "store", "recipe", "weights", "pretrained"
    places = "data/hkh", "data/competition", str(RECIPE), "weights/model.pth", "no checkpoint"
    for name, place in zip(names, places):
        parser.add_argument(f"--{name}", type=Path, default=Path(place), help="default: %(default)s")


def run_checklist(arguments: argparse.Namespace) -> int:
    """Walk the lists, a line each: pass, FAIL or n/a, what was found, what was expected; 1 where some fail."""
    recipe = load_config(arguments.recipe, [f"data.store={arguments.store}"])
    members, marks = [config for _, config in members_of(recipe).values()], []
    for title, line, needed, look in LINES:
        path = getattr(arguments, needed)
        try:
            given = TileStore(path) if path.is_dir() else path
            mark, found = ("pass", look(given, members)) if path.exists() else ("n/a", f"{path} is not there")
        except (KitError, OSError, ValueError) as error:  # the latter of arrays that are damaged
            mark, found = "FAIL", str(error)
        marks.append(mark)
        print(f"{mark:<5} {title}, {line}: {found}", flush=True)
    return int("FAIL" in marks)
