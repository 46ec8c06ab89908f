"""How fast is `solution.py`, where does its time go, and how much memory does it take? On a CPU, as graded.

Seconds depend on the machine and on what else it does; ratios do less: that of a run to its bare forward
passes, and that to the run of this command before, whose figures lie beside the report. So what a change
brings is measured by running it twice.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Mapping

import torch

import solution
from prep.files import sha256, write_json, write_text
from prep.synthetic.scenes import write_sample
from prep.text import markdown_table, number_text
from train.submit.check import measure_machine
from train.submit.tiles import copy_bands

IMPORTED_AT = time.time()
PROJECT = Path(__file__).resolve().parents[2]

# Stages of a run, by the function of `solution` in which they happen. A stage has the time of its function
# without that of others within it.
STAGES = {
    "loading the weights": "load_model",
    "reading": "read_tile",
    "normalising": "normalize",
    "dense CRF": "refine_with_crf",
    "specks and holes": "clean_classes",
    "views, ensemble, decision": "predict_classes",
}
FORWARD, OTHERWISE = "forward passes", "everything else"
ASIDE = {"writing": "save_mask"}  # by the main thread, while the passes run in theirs
COMPARED = ("tiles", "size", "passes", "cores")  # two runs are compared where these are the same


class BenchError(solution.KitError):
    """Something cannot be measured; the message says what and why."""


# --- The measurement, in a process of its own -----------------------------------------------------


class Stopwatch:
    """Seconds by stage, each without the stages within it; `clock` gives the time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.lock = threading.Lock()
        self.local = threading.local()  # a stack for each thread: the seconds of stages within the open ones

    def watch(self, stage: str, function: Callable) -> Callable:
        """Return `function` with its time counted to `stage`."""

        @functools.wraps(function)
        def timed(*args: Any, **settings: Any) -> Any:
            within = self.local.__dict__.setdefault("within", [])
            within.append(0.0)
            started = self.clock()
            try:
                return function(*args, **settings)
            finally:
                whole = self.clock() - started
                with self.lock:
                    self.seconds[stage] += whole - within.pop()
                if within:
                    within[-1] += whole

        return timed


def measure(data: str, weights: str, out: str) -> dict[str, Any]:
    """Segment a folder with all passes, and time it; then the forward passes alone.

    It changes functions of `solution`, and is meant for a process that ends then.

    Returns:
        seconds: of the run, without importing. stages: seconds by stage, shared by the threads side by side;
        those in ASIDE pass beside the others. bare: seconds of all forward passes on inputs in memory.
        passes: in all. peak_memory: bytes. imported_at: time of time.time().
    """
    watch, models = Stopwatch(), []
    for stage, name in {**STAGES, **ASIDE}.items():
        setattr(solution, name, watch.watch(stage, getattr(solution, name)))
    with_workers = solution.with_workers

    def watched(model: solution.Model, tiles: Any) -> solution.Model:
        models.append(with_workers(model, tiles))
        for member in members_of(model):
            member.network.forward = watch.watch(FORWARD, member.network.forward)
        return models[0]

    solution.with_workers = watched
    started = time.perf_counter()
    writer = solution.png_writer(solution.prepare_output(out, data))
    summary = solution.segment_folder(data, weights, writer, "inf", keep_masks=False)
    seconds, found, workers = time.perf_counter() - started, dict(watch.seconds), models[0].workers
    if summary.faults:
        raise BenchError(f"tiles that cannot be timed: {'; '.join(summary.faults.values())}")
    memory = peak_memory()
    loading, *others = STAGES
    stages = {loading: found[loading]}
    stages |= {stage: found.get(stage, 0.0) / workers for stage in (FORWARD, *others)}
    stages[OTHERWISE] = seconds - sum(stages.values())
    return {
        "seconds": seconds,
        "stages": stages | {stage: found[stage] for stage in ASIDE},
        "bare": bare_seconds(models[0], data),
        "passes": sum(summary.passes.values()),
        "workers": workers,
        "peak_memory": memory,
        "imported_at": IMPORTED_AT,
    }


def members_of(model: solution.Model) -> list[solution.Member]:
    """Return all members of a model, that of the kind of glacier last."""
    return [*model.members, *([model.kind] if model.kind else [])]


def peak_memory() -> int:
    """Return the most bytes that this process has held at a time, 0 where that is not told.

    Not `ru_maxrss`, which Linux keeps across exec: a child would report its parent's.
    """
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 if "VmHWM:" in status else 0


def bare_seconds(model: solution.Model, data: str) -> float:
    """Return what the forward passes over the tiles of a folder take, by that of a tile in memory."""
    images = [solution.read_tile(tile) for tile in solution.find_tiles(data)]
    images = [image for image in images if solution.valid_mask(image).any()]  # others have no pass
    sample = images[0][: solution.WINDOW, : solution.WINDOW]
    passes = [(model.members[number], solution.VIEWS[view]) for number, view in model.passes]
    inputs = []
    for member, view in passes + ([(model.kind, solution.VIEWS[0])] if model.kind else []):
        x = solution.to_tensor(solution.normalize(sample, member.normalization))[None]  # (1, 5, H, W)
        x = solution.pad_to_multiple(view.forward(x)).contiguous(memory_format=torch.channels_last)
        inputs.append((member.network, x))

    def make_passes(_number: int) -> None:
        with torch.inference_mode():
            for network, x in inputs:
                network(x)

    started, times = time.perf_counter(), 2 * model.workers
    for _ in solution.side_by_side(make_passes, range(times), model.workers):
        pass
    of_a_pixel = (time.perf_counter() - started) / times / sample.size
    return of_a_pixel * sum(image.size for image in images)


# --- The command ----------------------------------------------------------------------------------


def run_measurement(data: Path, weights: Path, out: Path) -> dict[str, Any]:
    """Return what `measure` does, in a process of its own without a GPU, and the seconds of its start."""
    started_at = time.time()
    process = subprocess.run(
        [sys.executable, "-m", "train.submit.bench", str(data), str(weights), str(out)],
        cwd=PROJECT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        words = process.stderr.strip().splitlines() or ["nothing"]
        raise BenchError(f"the run ended with status {process.returncode}, expected 0; it said: {words[-1]}")
    found = json.loads(process.stdout.splitlines()[-1])
    return {**found, "start": found["imported_at"] - started_at}


def bench(weights: Path, data: Path | None, tiles: int, size: int, out: Path) -> str:
    """Measure a run, write the report to `out` and its figures beside it, and return it.

    The first `tiles` tiles or scenes of `data` are segmented; where it is None, synthetic ones of `size` px.

    Raises:
        KitError: there are no tiles or no weights, or the run failed.
    """
    weights, machine = solution.find_weights(weights).resolve(), measure_machine(os.getloadavg()[0])
    print(f"{machine}; all passes over {tiles} tiles, then the forward passes alone", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary) / "tiles"
        if data is None:
            write_sample(folder, tiles, size, 0, "platform", "phase2")
        for files in solution.find_tiles(data)[:tiles] if data else []:
            copy_bands(files, folder)
        found = run_measurement(folder, weights, Path(temporary) / "masks")
        found["tiles"] = len(solution.find_tiles(folder))
    found |= {"size": str(data or size), "cores": solution.usable_cores(), "machine": str(machine)}
    found |= {"weights": sha256(weights), "date": time.strftime("%Y-%m-%d")}
    figures = out.with_suffix(".json")
    before = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {}
    write_json(figures, found)
    comparable = all(before.get(key) == found[key] for key in COMPARED)
    report = format_report(found, before if comparable else {})
    write_text(out, report + "\n")
    return f"{report}\n\n{out} written"


def figures_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a measurement by their names."""
    return {
        "whole run, s": found["seconds"],
        "a tile, s": found["seconds"] / found["tiles"],
        "starting Python and importing, s": found["start"],
        "whole run / its bare forward passes": found["seconds"] / found["bare"],
        "peak memory, GB": found["peak_memory"] / 1e9,
    }


def format_report(found: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Return the report in Markdown; `before` is an earlier measurement to compare with, or empty."""
    then = figures_of(before) if before else {}
    rows = []
    for name, value in figures_of(found).items():
        ratio = value / then[name] if then else None
        rows.append((name, number_text(value), number_text(then.get(name)), number_text(ratio)))
    stages = [
        (
            stage + (", beside the passes" if stage in ASIDE else ""),
            number_text(s),
            f"{s / found['seconds']:.1%}",
        )
        for stage, s in found["stages"].items()
    ]
    return f"""# Speed and memory of solution.py

`make bench`, {found["date"]}, weights with SHA-256 `{found["weights"]}`.

{found["tiles"]} tiles, {found["passes"]} passes in all without a time budget, tiles side by side: \
{found["workers"]}; {found["cores"]} cores, {platform.machine()}, Python {platform.python_version()}, torch \
{torch.__version__.split("+")[0]}, no GPU; {found["machine"]}.

{markdown_table(("", "now", "before", "now / before"), rows)}

The bare forward passes are as many, by the same networks in as many threads, on inputs that are in memory. \
*Before* is the run of this command before this one, if it had as many tiles, passes and cores.

## Where the time goes

{markdown_table(("stage", "s", "share of the run"), stages)}"""


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench`."""
    parser.add_argument("--weights", type=Path, default=Path("weights/model.pth"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, help="folder with Band1 ... Band5; default: synthetic tiles")
    parser.add_argument("--tiles", type=int, default=25, help="how many (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="px, of synthetic ones (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("reports/local/bench.md"), help="default: %(default)s")


def run_bench(arguments: argparse.Namespace) -> int:
    """Time solution.py: by stage, against its bare forward passes, and against this command's last run."""
    print(bench(arguments.weights, arguments.data, arguments.tiles, arguments.size, arguments.out))
    return 0


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
