"""The search for faults (`.ci/tasks.mk`): hostile inputs, killed processes, many tiles; status 1 where any is lost."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Callable

import cv2
import numpy as np
from support import PROJECT, write_model

from fuzz import determinism, field, hkh, kills, load, runs


def fuzz_inputs(options: argparse.Namespace, work: Path) -> list[str]:
    """Run hostile tiles through solution.py, and folders of them through prep."""
    weights = write_model(work / "model.pth")
    found = runs.fuzz_solution(options.seed, options.inputs, weights, work, options.keep)
    print(
        f"solution.py: {len(found.inputs)} distinct tiles in {found.cases} runs, {found.masks} masks, "
        f"{found.refused} refused, faults: {len(found.faults)}",
        flush=True,
    )
    prepared = runs.fuzz_prep(options.seed, options.inputs // 25, work, options.keep)
    print(
        f"prep competition: {len(prepared.inputs)} distinct tiles in {prepared.cases} runs, {prepared.masks} "
        f"stores, {prepared.refused} refused, faults: {len(prepared.faults)}",
        flush=True,
    )
    return found.faults + prepared.faults


def fuzz_field(options: argparse.Namespace, work: Path) -> list[str]:
    """Run tiles in other units, places, names, fills and consoles, each beside its plain twin."""
    weights = write_model(work / "model.pth")
    found = field.fuzz_field(options.seed, options.inputs // 5, weights, work, options.keep)
    print(
        f"field: {len(found.inputs)} distinct cases of {found.cases}, {found.masks} masks, {found.refused} "
        f"refused, faults: {len(found.faults)}",
        flush=True,
    )
    return found.faults


def fuzz_scenes(options: argparse.Namespace, work: Path) -> list[str]:
    """Run small HKH data sets through prep, most of them with a hostile file."""
    found = hkh.fuzz_hkh(options.seed, options.inputs // 4, work, options.keep)
    print(
        f"prep hkh: {len(found.inputs)} distinct files in {found.cases} runs, {found.masks} stores, "
        f"{found.refused} refused, faults: {len(found.faults)}",
        flush=True,
    )
    return found.faults


def tell(what: str, killed: kills.Killed) -> list[str]:
    """Print a line on a campaign of kills; return its faults."""
    left = ", ".join(f"{state}: {count}" for state, count in sorted(killed.states.items()) if count)
    parts = "/".join(str(killed.parts[part]) for part in range(5))
    print(
        f"{what}: {killed.kills} kills, {parts} in the fifths of a run of {np.median(killed.seconds):.2f} s, "
        f"{killed.ended} runs that ended, faults: {len(killed.faults)}; after a kill: {left}",
        flush=True,
    )
    return killed.faults


def kill_runs(options: argparse.Namespace, work: Path) -> list[str]:
    """Kill solution.py and prep of the competition's tiles."""
    weights = write_model(work / "model.pth")
    faults = tell("solution.py", kills.kill_solution(options.seed, options.kills, weights, work))
    return faults + tell("prep competition", kills.kill_prep(options.seed, options.kills, work))


def kill_scenes(options: argparse.Namespace, work: Path) -> list[str]:
    """Kill prep of HKH scenes."""
    return tell("prep hkh", kills.kill_hkh(options.seed, options.kills, work))


def kill_trainings(options: argparse.Namespace, work: Path) -> list[str]:
    """Kill trainings of four epochs."""
    return tell("training", kills.kill_training(options.seed, options.kills, work))


def run_twice(options: argparse.Namespace, work: Path) -> list[str]:
    """Run solution.py and prep twice at a time into one folder."""
    times = max(2, options.kills // 5)
    faults = kills.two_solutions(times, write_model(work / "model.pth"), work) + kills.two_preps(times, work)
    print(f"two runs at a time: {times} of solution.py, {times} of prep, faults: {len(faults)}", flush=True)
    return faults


def run_many(options: argparse.Namespace, work: Path) -> list[str]:
    """Segment 1000 tiles in one run."""
    found = load.run_many(options.tiles, 64, write_model(work / "model.pth"), work)
    print(
        f"{options.tiles} tiles of 64 px: {found.slope:.0f} bytes more a tile, peak {found.peak / 1e6:.0f} MB"
        f", faults: {len(found.faults)}",
        flush=True,
    )
    return found.faults


def compare_masks(options: argparse.Namespace, work: Path) -> list[str]:
    """Segment one scene with the shipped weights, run after run and with 1, 2 and 4 threads."""
    seen, faults = determinism.compare_threads(PROJECT / "weights" / "model.pth", options.seed)
    print("; ".join(seen), flush=True)
    return faults


CAMPAIGNS: dict[str, Callable[[argparse.Namespace, Path], list[str]]] = {
    "kills": kill_runs,  # first, as long as no thread was started here: they fork
    "hkh-kills": kill_scenes,
    "trainings": kill_trainings,
    "twice": run_twice,
    "load": run_many,
    "inputs": fuzz_inputs,
    "field": fuzz_field,
    "hkh": fuzz_scenes,
    "determinism": compare_masks,
}


def main() -> int:
    """Run campaigns; print a line each, and every fault."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("campaigns", nargs="*", default=list(CAMPAIGNS), help=f"of {', '.join(CAMPAIGNS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=2000, help="distinct tiles for solution.py")
    parser.add_argument("--kills", type=int, default=50, help="of solution.py, of prep, and of trainings")
    parser.add_argument("--tiles", type=int, default=1000, help="in one run")
    parser.add_argument("--keep", action="store_true", help="keep the folders of cases that went wrong")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cv2.setNumThreads(1)  # or its threads, of which a child that is forked has none, would be waited for
    warnings.filterwarnings("ignore", message=".*no geotransform.*")
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    faults = []
    for name in options.campaigns or CAMPAIGNS:
        started = time.perf_counter()
        place = work / name
        place.mkdir()
        faults += CAMPAIGNS[name](options, place)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    for fault in faults:
        print(f"fault: {fault}")
    print(f"faults: {len(faults)}" + (f"; cases in {work}" if options.keep else ""))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
