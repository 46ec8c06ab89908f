"""How fast is `solution.py`, where does its time go, and how much memory does it take? On a CPU, as graded.

One command measures all of it on the same tiles and writes it down. Seconds depend on the machine and on what
else it does; the ratios are the result. What is timed runs in processes of its own (`bench_runs`).
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple, Sequence

import cv2
import numpy as np
import tifffile
import torch

from prep.files import write_text
from prep.synthetic.scenes import write_sample
from prep.text import NONE, markdown_table
from solution import (
    BANDS,
    LARGEST_TILE,
    MODEL_FILE,
    WORTH_TIMING,
    TileFiles,
    find_tiles,
    find_weights,
    read_model_file,
    readable_shape,
    usable_cores,
)
from train.submit.bench_runs import ASIDE, ONCE, PLAIN
from train.submit.check.cases import copy_bands
from train.submit.steps import Steps

PROJECT = Path(__file__).resolve().parents[2]
SEED = 0
PUBLIC_TILES = 25  # for which the ratio is foretold: what happens once weighs less there
BARE_AIM = 1.10  # most seconds of a run for one of its forward passes
PLAIN_AIM = 0.6  # most seconds of a run for one of the straightforward implementation
AGREEMENT_AIM = 0.999  # least share of pixels on which the two agree
TILE_MEMORY_AIM = 2e9  # bytes
SCENE_MEMORY_AIM = 4e9
EXPLANATION = (
    "The whole run is one without a time budget, from after the import of its packages to its last mask. The "
    "bare forward passes are as many, of the same networks in the same form, on inputs that are in memory. "
    "The straightforward implementation (`bench_plain.py`) takes one network and one view at a time "
    "with torch as it starts, BatchNorms as layers, and reads and writes in between."
)
CLOCK, CPU = 0, 1  # places in train.submit.bench_runs.Seconds
BUSY = 0.5  # processes that wait for a core, from which on seconds say little


class BenchError(Exception):
    """Something cannot be measured; the message says what and why."""


class Sizes(NamedTuple):
    """What is segmented: synthetic tiles and their side in pixels, the scene's side, and how often."""

    tile: int
    scene: int
    rounds: int


FULL = Sizes(512, 7000, 2)
QUICK = Sizes(96, 1100, 1)  # to see that it works: its numbers mean nothing


class Measurements(NamedTuple):
    """All that was measured. `whole`, `plain`, `scene` and `forms` are as in `train.submit.bench_runs`."""

    tiles: int
    load: float  # processes that ran or waited on average during the minute before
    start: float  # s from starting Python to having imported solution
    whole: Mapping
    plain: Mapping
    agreement: float  # share of pixels
    forms: Sequence[Mapping]
    scene: Mapping
    scene_side: int

    @property
    def to_bare(self) -> float:
        """Seconds of the whole run for one of its bare forward passes."""
        return self.mean("whole") / self.mean("bare")

    @property
    def to_plain(self) -> float:
        """Seconds of the whole run for one of the straightforward implementation."""
        return self.mean("whole") / self.plain["seconds"][CLOCK]

    @property
    def cpu_ratios(self) -> tuple[float, float]:
        """The same two in seconds of the processor, which other processes disturb less."""
        whole = self.mean("whole", CPU)
        return whole / self.mean("bare", CPU), whole / self.plain["seconds"][CPU]

    def mean(self, what: str, kind: int = CLOCK) -> float:
        """Return the mean over all rounds of the "whole" run or of its "bare" passes."""
        return float(np.mean([seconds[kind] for seconds in self.whole[what]]))

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage, the mean of all rounds."""
        rounds = self.whole["stages"]
        return {stage: float(np.mean([one[stage] for one in rounds])) for stage in rounds[0]}

    def to_bare_with(self, tiles: int) -> float:
        """Return what `to_bare` would be with so many tiles, where some stages happen once only."""
        once = sum(self.stages[stage] for stage in ONCE)
        a_tile = (self.mean("whole") - once) / self.tiles
        return (once + a_tile * tiles) / (self.mean("bare") / self.tiles * tiles)


# --- What is segmented ----------------------------------------------------------------------------


def lay_out_tiles(data: Path | None, tiles: int, size: int, folder: Path) -> Path:
    """Return a data folder of the first `tiles` tiles of `data`, or of synthetic ones of `size` px.

    Raises:
        BenchError: a tile lacks a band or is larger than what both implementations segment in one piece.
        solution.InputError: there are no tiles.
    """
    if data is None:
        write_sample(folder, tiles, size, SEED, "platform", "phase2")
        return folder
    for files in find_tiles(data)[:tiles]:
        height, width = readable_shape(files)
        if None in files.paths or max(height, width) > LARGEST_TILE:
            raise BenchError(
                f"{data}: tile {files.tile_id} has {sum(map(bool, files.paths))} bands and {width} x "
                f"{height} px, expected {len(BANDS)} bands and at most {LARGEST_TILE} px a side; leave it out"
            )
        copy_bands(files, folder)
    return folder


def write_scene(tile: TileFiles, side: int, folder: Path) -> Path:
    """Return `folder` with a scene of `side` x `side` px in it: a tile, repeated, of the same number type."""
    for band, path in zip(BANDS, tile.paths):
        numbers = tifffile.imread(path)
        times = math.ceil(side / min(numbers.shape))
        (folder / band.folder).mkdir(parents=True)
        scene = np.tile(numbers, (times, times))[:side, :side]
        tifffile.imwrite(folder / band.folder / "img001.tif", scene, photometric="minisblack")
    return folder


def write_first_pass(weights: Path, path: Path) -> Path:
    """Return `path`, a model file with the first pass of `weights` only, and without the CRF: a scene takes
    hundreds of windows, each of which needs no more memory than a tile."""
    content = read_model_file(weights)
    content["passes"] = content["passes"][:1]
    content["postprocess"]["crf"] = None
    torch.save(content, path)
    return path


# --- Measuring ------------------------------------------------------------------------------------


@contextmanager
def exit_at_sigterm() -> Iterator[None]:
    """Leave by SystemExit where the process is told to end, so that no scene of a gigabyte stays behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_task(task: str, folder: Path, **arguments: Path | str | int) -> dict:
    """Do a task of `train.submit.bench_runs` in a process of its own; return its result and `started_at`.

    Raises:
        BenchError: it failed.
    """
    result = folder / f"{task}.json"
    named = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    request = json.dumps({"task": task, "arguments": named, "result": str(result)})
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GLACIER_")}
    started_at = time.time()
    process = subprocess.run(
        [sys.executable, "-m", "train.submit.bench_runs", request],
        cwd=PROJECT,
        env={**kept, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        words = process.stderr.strip().splitlines()
        raise BenchError(
            f"{task}: ended with status {process.returncode}, expected 0; its last line: "
            f"{words[-1] if words else 'none'}"
        )
    return {**json.loads(result.read_text()), "started_at": started_at}


def compare_masks(one: Path, other: Path) -> float:
    """Return the share of pixels that have the same class in the PNGs of two folders.

    Raises:
        BenchError: the folders hold masks of other tiles, or a mask cannot be read.
    """
    names = [sorted(path.name for path in folder.glob("*.png")) for folder in (one, other)]
    if names[0] != names[1] or not names[0]:
        raise BenchError(
            f"masks to compare: found {names[0]} and {names[1]}, expected those of the same tiles"
        )
    same = total = 0
    for name in names[0]:
        a, b = (read_mask(folder / name) for folder in (one, other))
        same += int(np.count_nonzero(a == b))
        total += a.size
    return same / total


def read_mask(path: Path) -> np.ndarray:
    """Return the values of a mask, (H, W) uint8; BenchError where it cannot be read."""
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise BenchError(f"{path}: cannot be read as a mask; run `make bench` again")
    return mask


def measure(data: Path | None, tiles: int, weights: Path, sizes: Sizes) -> Measurements:
    """Measure everything; progress goes to standard error, files to a temporary folder.

    Raises:
        BenchError: a part failed, or the tiles cannot be used.
        solution.InputError: there are no tiles or no weights.
    """
    weights = find_weights(weights).resolve()
    steps, load = Steps(5), os.getloadavg()[0]
    with exit_at_sigterm(), tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        steps.announce("tiles")
        tile_data = lay_out_tiles(data, tiles, sizes.tile, folder / "tiles")
        found = find_tiles(tile_data)
        steps.announce(f"{sizes.rounds} x the whole run over {len(found)} tiles, and its bare forward passes")
        common = {"data": tile_data, "weights": weights}
        whole = run_task("whole", folder, **common, out=folder / "masks", rounds=sizes.rounds)
        steps.announce("the straightforward implementation")
        plain = run_task("plain", folder, **common, out=folder / "plain-masks")
        agreement = compare_masks(folder / "masks", folder / "plain-masks")
        steps.announce("forms of execution")
        forms = run_task("forms", folder, **common)["forms"]
        steps.announce(f"a scene of {sizes.scene} x {sizes.scene} px, first pass only")
        scene_data = write_scene(found[0], sizes.scene, folder / "scene")
        first_pass = write_first_pass(weights, folder / MODEL_FILE)
        scene = run_task("scene", folder, data=scene_data, weights=first_pass, out=folder / "scene-masks")
    start = whole["imported_at"] - whole["started_at"]
    return Measurements(len(found), load, start, whole, plain, agreement, forms, scene, sizes.scene)


# --- The report -----------------------------------------------------------------------------------


class Aim(NamedTuple):
    """A number, what it should be, and whether it is."""

    name: str
    measured: str
    aim: str
    reached: bool


def list_aims(found: Measurements) -> list[Aim]:
    """Return what is aimed at beside what was measured."""
    tile_memory, scene_memory = found.whole["peak_memory"], found.scene["peak_memory"]
    side = found.scene_side
    return [
        Aim(
            "seconds of the whole run / of its bare forward passes",
            f"{found.to_bare:.3f}",
            f"at most {BARE_AIM:.2f}",
            found.to_bare <= BARE_AIM,
        ),
        Aim(
            "seconds of the whole run / of the straightforward implementation",
            f"{found.to_plain:.3f}",
            f"at most {PLAIN_AIM:.2f}",
            found.to_plain <= PLAIN_AIM,
        ),
        Aim(
            "pixels on which the two agree",
            f"{found.agreement:.4%}",
            f"at least {AGREEMENT_AIM:.1%}",
            found.agreement >= AGREEMENT_AIM,
        ),
        Aim(
            "peak memory, tiles",
            f"{tile_memory / 1e9:.2f} GB",
            f"at most {TILE_MEMORY_AIM / 1e9:g} GB",
            tile_memory <= TILE_MEMORY_AIM,
        ),
        Aim(
            f"peak memory, a scene of {side} x {side} px",
            f"{scene_memory / 1e9:.2f} GB",
            f"at most {SCENE_MEMORY_AIM / 1e9:g} GB",
            scene_memory <= SCENE_MEMORY_AIM,
        ),
    ]


def format_report(found: Measurements, command: str) -> str:
    """Return the report in Markdown."""
    aims = [(aim.name, aim.measured, aim.aim, "yes" if aim.reached else "no") for aim in list_aims(found)]
    return "\n\n".join(
        [
            "# Speed and memory of solution.py",
            f"```sh\n{command}\n```",
            describe_machine(found),
            markdown_table(("", "measured", "aim", "reached"), aims),
            EXPLANATION,
            "## Where the time goes",
            markdown_table(("stage", "s in all", "s a tile", "share of the run"), stage_rows(found)),
            describe_stages(found),
            "## Forms of execution",
            markdown_table(
                ("form", "threads", "s a pass", "CPU s", "largest difference of a probability", "to make it"),
                [form_row(form, found.forms) for form in found.forms],
            ),
            describe_choice(found),
        ]
    )


def describe_machine(found: Measurements) -> str:
    """Return what the seconds depend on."""
    load = (
        f" The machine was busy (load average {found.load:.1f} before): seconds and ratios are uncertain."
        if found.load > BUSY
        else ""
    )
    return (
        f"{found.tiles} tiles, {found.whole['passes']} forward passes in all; {usable_cores()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, "
        f"no GPU. The seconds are this machine's; the ratios are the result.{load}"
    )


def stage_rows(found: Measurements) -> list[tuple[str, ...]]:
    """Return the table of stages: once before it all, those that add up to the run, the run, those aside."""
    stages, whole = found.stages, sum(found.stages[stage] for stage in found.stages if stage not in ASIDE)

    def row(name: str, seconds: float, once: bool = False) -> tuple[str, ...]:
        a_tile = "once" if once else f"{seconds / found.tiles:.4f}"
        return name, f"{seconds:.3f}", a_tile, f"{seconds / whole:.1%}"

    start = ("starting Python and importing", f"{found.start:.3f}", "once", "before it")
    in_line = [row(stage, stages[stage], stage in ONCE) for stage in stages if stage not in ASIDE]
    aside = [row(f"{stage}, beside the passes", stages[stage]) for stage in ASIDE]
    return [start, *in_line, row("**the whole run**", whole), *aside]


def describe_stages(found: Measurements) -> str:
    """Return the ratio to the bare passes by round, and what it would be for the public tiles."""
    rounds = ", ".join(
        f"{whole[CLOCK]:.2f} / {bare[CLOCK]:.2f} s"
        for whole, bare in zip(found.whole["whole"], found.whole["bare"])
    )
    to_bare, to_plain = found.cpu_ratios
    return (
        f"Whole run / bare passes by round: {rounds}. With {PUBLIC_TILES} tiles the ratio would be "
        f"{found.to_bare_with(PUBLIC_TILES):.3f}: what happens once weighs less. The straightforward program "
        f"took {found.plain['seconds'][CLOCK]:.2f} s, the scene {found.scene['seconds']:.0f} s. "
        "In seconds of the processor, summed over threads, which other processes disturb less, the ratios "
        f"are {to_bare:.3f} (bare passes) and {to_plain:.3f} (straightforward). "
        "*Rest of prediction* is turning views, softmax, mean, bias, decision, cleaning and, if on, the CRF. "
        "Seconds of stages that several threads pass through are shared by their number."
    )


def form_row(form: Mapping, forms: Sequence[Mapping]) -> tuple[str, ...]:
    """Return a line of the table of forms."""
    once = f"{form['once']:.1f} s, {describe_payoff(form, forms)}" if form["once"] else NONE
    seconds = (f"{form['seconds']:.4f}", f"{form['cpu']:.4f}")
    return form["name"], str(form["threads"]), *seconds, f"{form['difference']:.1e}", once


def describe_payoff(form: Mapping, forms: Sequence[Mapping]) -> str:
    """Return after how many passes of one network a form has earned the seconds that making it takes."""
    plain = next(other for other in forms if other["name"] == PLAIN and other["threads"] == form["threads"])
    gain = plain["seconds"] - form["seconds"]
    return f"pays after {math.ceil(form['once'] / gain)} passes of the network" if gain > 0 else "never pays"


def describe_choice(found: Measurements) -> str:
    """Return the form in which the run made its passes, and how it came to it."""
    chosen = "channels_last" if found.whole["channels_last"] else "plain"
    timed = found.whole["passes"] >= WORTH_TIMING
    why = "by timing" if timed else f"untimed: it had fewer than {WORTH_TIMING} passes to make"
    return (
        f"The run chose: {chosen} ({why}), {found.whole['workers']} tiles side by side, threads of each: "
        f"{found.whole['threads']}."
    )


def bench(data: Path | None, tiles: int, weights: Path, out: Path, quick: bool, command: str) -> Measurements:
    """Measure everything, write the report to `out` and print its aims; return what was measured.

    Raises:
        BenchError, solution.InputError: see `measure`.
    """
    found = measure(data, tiles, weights, QUICK if quick else FULL)
    write_text(out, format_report(found, command) + "\n")
    for aim in list_aims(found):
        print(f"{'reached' if aim.reached else 'MISSED '}  {aim.name}: {aim.measured} ({aim.aim})")
    print(f"{out} written")
    return found
