"""Hands hostile tiles to solution.py and to `prep competition`, and judges what comes out.

A case is one run of a door over a folder of tiles of which some are damaged. It ends well where every tile
that can be read gets a mask of its size, every other one an error that names file and remedy, and nothing
else is written. A traceback, an end that takes too long and memory beyond a limit are faults.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import cv2
import numpy as np
import tifffile
from support import write_tile

import solution
from fuzz import rasters
from prep.__main__ import main as prep_main
from prep.store import StoreError, TileStore

REMEDIES = (
    "copy or export the file again",
    "split the bands",
    "resample the bands",
    "add the missing file",
    "export",
    "remove one of the two",
    "check the files",
    "name another",
    "cut it into tiles",
)
NO_VALUE = "no value above 0"  # anywhere in a band: what solution.py says of one
TILES_A_CASE = 12
SECONDS_A_CASE = 120.0
REAL_STDERR = os.dup(2)  # also while what is written there is collected
SPARE_MEMORY = 1_500_000_000  # bytes that a case may add to the address space


class Tile(NamedTuple):
    """A tile of a case: its id, size, what is in its bands, and the names of the damaged ones."""

    identifier: str
    shape: tuple[int, int]
    forms: tuple[str, ...]
    damaged: tuple[str, ...]


class Found(NamedTuple):
    """What a campaign found: cases, distinct inputs, readable and refused tiles, and the faults."""

    cases: int
    inputs: set[str]
    masks: int
    refused: int
    faults: list[str]


# --- Limits ---------------------------------------------------------------------------------------


@contextmanager
def memory_limit(spare: int = SPARE_MEMORY) -> Iterator[None]:
    """Let this process add no more than `spare` bytes to its address space."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def time_limit(what: str, seconds: float = SECONDS_A_CASE) -> Iterator[None]:
    """End this process where the block takes longer: a thread that hangs can be ended in no other way."""

    def give_up(*_: object) -> None:
        os.write(REAL_STDERR, f"HANG: {what} took longer than {seconds:g} s\n".encode())
        os._exit(3)

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """Collect all that is written to standard output and error, by C libraries too."""
    sys.stdout.flush(), sys.stderr.flush()
    kept, streams = (os.dup(1), os.dup(2)), (sys.stdout, sys.stderr)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="surrogateescape") as stream:
        os.dup2(stream.fileno(), 1), os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = open(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        try:
            yield lambda: (sys.stderr.flush(), stream.seek(0), stream.read())[-1]
        finally:
            sys.stderr.close()
            sys.stdout, sys.stderr = streams
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])


class Ending(NamedTuple):
    """How a call ended: its exit status or result, all it said, and the traceback if it raised one."""

    result: object
    said: str
    raised: str


def call(what: str, door: Callable[[], object], allowed: tuple = (solution.InputError,)) -> Ending:
    """Call a door under the limits; an exception that is no part of its contract is a traceback."""
    result, raised = None, ""
    with captured() as said, memory_limit(), time_limit(what):
        try:
            result = door()
        except allowed as error:
            result = error
        except SystemExit as stop:
            result = stop.code
        except BaseException:
            raised = traceback.format_exc()
        return Ending(result, said(), raised)


# --- Cases ----------------------------------------------------------------------------------------


def make_tile(rng: np.random.Generator, root: Path, identifier: str, damage: float) -> tuple[Tile, str]:
    """Write a tile of five whole bands of any form; damage one or two of them with probability `damage`.

    Return it and the digest of its bytes.
    """
    shape = rasters.random_shape(rng)
    numbers = rasters.random_numbers(rng, shape)
    bands = [rasters.whole_raster(rng, numbers[..., index]) for index in range(len(solution.BANDS))]
    if rng.random() < damage:
        for index in rng.choice(len(bands), size=1 if rng.random() < 0.8 else 2, replace=False):
            bands[index] = rasters.damaged_raster(rng, bands[index])
    digest = hashlib.sha256()
    for band, raster in zip(solution.BANDS, bands):
        path = root / band.folder / f"img{identifier}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raster.content)
        digest.update(hashlib.sha256(raster.content).digest())
    damaged = tuple(band.folder for band, raster in zip(solution.BANDS, bands) if not raster.whole)
    return Tile(identifier, shape, tuple(raster.form for raster in bands), damaged), digest.hexdigest()


def snapshot(folder: Path) -> dict[str, tuple]:
    """Return size, time and type of all that is below a folder, to see what a run changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns, status.st_mode)
    return found


def read_mask(path: Path) -> np.ndarray | None:
    """Return a written mask, None where the file is none."""
    if path.suffix == ".png":
        return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    return tifffile.imread(path)


def error_lines(said: str) -> list[str]:
    """Return the lines that report an error, each with what follows it up to the next report."""
    return [line for line in said.splitlines() if line.startswith("error: ")]


def fault_of(tile: Tile, lines: Sequence[str]) -> str | None:
    """Return the error that names a tile or one of its files."""
    name = re.compile(rf"img{tile.identifier}\.tif|tile {tile.identifier}\b")
    return next((line for line in lines if name.search(line)), None)


def judge_tile(tile: Tile, mask: np.ndarray | None, fault: str | None) -> list[str]:
    """Return what is wrong with a tile's mask, or with the error that was reported instead."""
    where = f"tile {tile.identifier} {tile.shape} {tile.forms}"
    if mask is None:
        return [f"{where}: no mask, {fault}"]
    faults = []
    if mask.dtype != np.uint8 or not set(np.unique(mask)) <= set(solution.CLASS_VALUES):
        faults.append(f"{where}: {mask.dtype} mask of {np.unique(mask)[:9]}")
    if fault and NO_VALUE in fault:  # named and counted, with a mask of what the other bands show
        return faults
    if not tile.damaged and fault:
        faults.append(f"{where}: a whole tile was refused: {fault}")
    if fault and mask.any():
        faults.append(f"{where}: {fault}, but its mask is no background")
    if len(tile.damaged) < len(solution.BANDS) and not fault and not tile.damaged and mask.shape != tile.shape:
        faults.append(f"{where}: the mask has shape {mask.shape}")
    if fault and not any(remedy in fault for remedy in REMEDIES):
        faults.append(f"{where}: no remedy in: {fault}")
    return faults


def judge_end(ending: Ending, statuses: Sequence[object]) -> list[str]:
    """Return whether a call ended in a traceback or a status that it does not have."""
    faults = []
    if ending.raised or "Traceback" in ending.said:
        faults.append(f"traceback: {ending.raised or ending.said}")
    elif not any(ending.result is status or ending.result == status for status in statuses):
        faults.append(f"ended with {ending.result!r}: {ending.said[-500:]}")
    return faults


# --- solution.py ----------------------------------------------------------------------------------


def run_command_line(folder: Path, weights: Path, tiles: Sequence[Tile], as_png: bool) -> tuple[list[str], int]:
    """Run the command line over folder/in; return the faults and how many tiles were refused."""
    out, data = folder / "out", folder / "in"
    arguments = [str(data), str(out)] if as_png else ["--data", str(data), "--out", str(out)]
    before = snapshot(data)
    ending = call(str(folder), lambda: solution.main([*arguments, "--weights", str(weights)]))
    faults, lines = judge_end(ending, (0, 1)), error_lines(ending.said)
    if faults:
        return faults, 0
    suffix = ".png" if as_png else ".tif"
    names = {f"img{tile.identifier}{suffix}" for tile in tiles}
    found = {path.name for path in out.iterdir()}
    if found != names:
        faults.append(f"files {sorted(found ^ names)}")
    refused = 0
    for tile in tiles:
        fault = fault_of(tile, lines)
        refused += fault is not None
        path = out / f"img{tile.identifier}{suffix}"
        faults += judge_tile(tile, read_mask(path) if path.is_file() else None, fault)
    if (ending.result == 1) != bool(refused):
        faults.append(f"status {ending.result} with {refused} errors")
    if snapshot(data) != before:
        faults.append("the input was changed")
    return faults, refused


def run_maskgeration(folder: Path, weights: Path, tiles: Sequence[Tile]) -> tuple[list[str], int]:
    """Call maskgeration as the platform does; return the faults and how many tiles were refused."""
    data = {band.folder: str(folder / "in" / band.folder) for band in reversed(solution.BANDS)}
    before = snapshot(folder)
    ending = call(str(folder), lambda: solution.maskgeration(data, str(weights)))
    if ending.raised or not isinstance(ending.result, dict):
        return [f"maskgeration: {ending.raised or ending.result!r}"], 0
    lines, masks = error_lines(ending.said), ending.result
    faults = [] if set(masks) == {tile.identifier for tile in tiles} else [f"masks of {sorted(masks)}"]
    refused = 0
    for tile in tiles:
        fault = fault_of(tile, lines)
        refused += fault is not None
        faults += judge_tile(tile, masks.get(tile.identifier), fault)
    if snapshot(folder) != before:
        faults.append("maskgeration wrote something")
    return faults, refused


def note(noted: list[str], where: str, faults: Sequence[str]) -> None:
    """Add faults to those noted, and say so at once: a search takes long."""
    for fault in faults:
        noted.append(f"{where}: {fault}")
        print(f"fault: {noted[-1]}", file=sys.stderr, flush=True)


def fuzz_solution(seed: int, inputs: int, weights: Path, work: Path, keep: bool = False) -> Found:
    """Run so many distinct tiles through the three doors of solution.py, TILES_A_CASE at a time."""
    found = Found(0, set(), 0, 0, [])
    cases, masks, refused = 0, 0, 0
    while len(found.inputs) < inputs:
        rng = np.random.default_rng([seed, cases])
        folder = work / f"case{cases}"
        made = [make_tile(rng, folder / "in", f"{number:03d}", 0.6) for number in range(TILES_A_CASE)]
        tiles = [tile for tile, _ in made]
        if cases % 3 == 2:
            faults, out = run_maskgeration(folder, weights, tiles)
        else:
            faults, out = run_command_line(folder, weights, tiles, cases % 3 == 0)
        found.inputs.update(digest for _, digest in made)
        note(found.faults, f"seed {seed} case {cases}", faults)
        cases, masks, refused = cases + 1, masks + len(tiles) - out, refused + out
        if not (keep and faults):
            shutil.rmtree(folder)
    return found._replace(cases=cases, masks=masks, refused=refused)


# --- prep competition -----------------------------------------------------------------------------


def write_labels(rng: np.random.Generator, root: Path, tiles: Sequence[Tile], damage: float) -> list[str]:
    """Write a phase-1 label for each tile, some of them damaged; return the digests."""
    (root / "label").mkdir()
    digests = []
    for tile in tiles:
        label = np.where(rng.random(tile.shape) < 0.4, 255, 0).astype(np.float32)
        if rng.random() < 0.3:
            name, content = (
                f"img{tile.identifier}.png",
                cv2.imencode(".png", label.astype(np.uint8))[1].tobytes(),
            )
        else:
            name, content = (
                f"Y_img{tile.identifier}.tif",
                rasters.encode(label, str(rng.choice(["u1", "f4"]))),
            )
        if rng.random() < damage:
            content = rasters.damaged_raster(rng, rasters.Raster("label", content, True)).content
        (root / "label" / name).write_bytes(content)
        digests.append(hashlib.sha256(content).hexdigest())
    return digests


def run_prep(folder: Path, tiles: Sequence[Tile]) -> tuple[list[str], bool]:
    """Run `prep competition` over folder/in; return the faults and whether it made a store."""
    out, data = folder / "stores" / "store", folder / "in"
    before = snapshot(data)
    ending = call(str(folder), lambda: prep_main(["competition", "--data", str(data), "--out", str(out)]))
    faults = judge_end(ending, (0, 2))
    if snapshot(data) != before:
        faults.append("prep changed the input")
    left = [path.name for path in out.parent.iterdir()] if out.parent.exists() else []
    if ending.result == 0:
        faults += [] if left == ["store"] else [f"beside the store: {left}"]
        return faults + check_store(out, tiles), True
    faults += [f"prep left {left}"] if left else []
    if not faults and not any(remedy in ending.said for remedy in (*REMEDIES, "expected")):
        faults.append(f"no remedy in: {ending.said}")
    unnamed = [line for line in ending.said.splitlines() if line.startswith("  - ") and "/" not in line]
    return faults + [f"names no file: {line}" for line in unnamed if "tile " not in line], False


def check_store(out: Path, tiles: Sequence[Tile]) -> list[str]:
    """Return what is wrong with a store that prep says is complete."""
    try:
        store = TileStore(out)
    except StoreError as error:
        return [f"no whole store: {error}"]
    shapes = {tile.identifier: tile.shape for tile in tiles if not tile.damaged}
    return [
        f"tile {identifier}: {store.image(identifier).shape} and {store.mask(identifier).shape}"
        for identifier in store.tile_ids
        if identifier in shapes
        and not store.image(identifier).shape[:2] == store.mask(identifier).shape == shapes[identifier]
    ]


def fuzz_prep(seed: int, cases: int, work: Path, keep: bool = False) -> Found:
    """Run `prep competition` over so many folders of eight tiles, few or none of them damaged."""
    found = Found(cases, set(), 0, 0, [])
    stores = 0
    for case in range(cases):
        rng = np.random.default_rng([seed, 1, case])
        folder = work / f"prep{case}"
        damage = float(rng.choice([0.0, 0.15]))
        made = [make_tile(rng, folder / "in", f"{number:03d}", damage) for number in range(8)]
        tiles = [tile for tile, _ in made]
        labels = write_labels(rng, folder / "in", tiles, damage)
        faults, stored = run_prep(folder, tiles)
        found.inputs.update(digest + label for (_, digest), label in zip(made, labels))
        note(found.faults, f"seed {seed} prep {case}", faults)
        stores += stored
        if not (keep and faults):
            shutil.rmtree(folder)
    return found._replace(masks=stores, refused=cases - stores)


def healthy_tiles(root: Path, tiles: int, side: int = 32) -> None:
    """Write so many plain tiles."""
    for number in range(tiles):
        numbers = rasters.random_numbers(np.random.default_rng(number), (side, side))
        write_tile(root, f"{number:03d}", numbers)
