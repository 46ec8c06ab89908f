"""Speed of `prep hkh` beside a bare rasterio read and write of the same bytes: `make bench-prep`."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import geopandas
import numpy as np
import pandas as pd
import rasterio

from prep.hkh import prepare as hkh
from prep.hkh import sources as hkh_sources
from prep.hkh.polygons import DEFAULT_COLUMN, DEFAULT_WORDS
from prep.synthetic.hkh import LABELS_FILE, write_hkh_sample
from prep.synthetic.scenes import PIXEL
from solution import usable_cores

KEEP_ALL = hkh.Filter(0, 0, 0, 1.0)  # so that every tile is converted and written
GRID = hkh.Grid(512, 0)  # no overlap: each pixel once, in both
WARM_UP = 1  # runs of each that are not counted: the file comes from memory afterwards


CLOCKS = {
    "wall": time.perf_counter,
    "CPU": time.process_time,
}  # CPU time is steadier on a machine with other work


class Result(NamedTuple):
    """Seconds of each repeat by kind, "prep" and "bare", and clock; megapixels; and the machine's state."""

    size: int
    seconds: dict[tuple[str, str], list[float]]
    megapixels: float
    load: float
    cores: int

    def speed(self, kind: str, clock: str) -> float:
        """Return megapixels a second, of the median repeat."""
        return self.megapixels / float(np.median(self.seconds[kind, clock]))

    def ratio(self, clock: str) -> float:
        """Return the speed of `prep` over that of the bare read and write, median of the paired repeats."""
        return float(np.median(np.divide(self.seconds["bare", clock], self.seconds["prep", clock])))

    def tiles(self) -> int:
        """Return the number of tiles."""
        return (-(-self.size // GRID.size)) ** 2

    def summary(self) -> str:
        """Return the figures in a line."""
        return "; ".join(
            f"{clock} time: prep hkh {self.speed('prep', clock):.1f} megapixels/s, bare read and write "
            f"{self.speed('bare', clock):.1f}, ratio {self.ratio(clock):.2f}"
            for clock in CLOCKS
        )


def run(size: int, repeats: int) -> Result:
    """Time both on a synthetic scene of `size` px a side, taking turns, on one core each."""
    with tempfile.TemporaryDirectory(prefix="bench-prep-") as work:
        folder = Path(work)
        job = make_job(folder, size)
        kinds: dict[str, Callable[[], None]] = {
            "prep": lambda: run_prep(job, folder / "out"),
            "bare": lambda: run_bare(job, folder / "out"),
        }
        seconds: dict[tuple[str, str], list[float]] = {}
        for repeat in range(WARM_UP + repeats):
            for kind, function in kinds.items():
                for clock, elapsed in time_once(function, folder / "out").items():
                    if repeat >= WARM_UP:
                        seconds.setdefault((kind, clock), []).append(elapsed)
    return Result(size, seconds, size**2 / 1e6, os.getloadavg()[0], usable_cores())


def time_once(function: Callable[[], None], out: Path) -> dict[str, float]:
    """Return the seconds of a call that fills the empty folder `out`, by each clock."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started = {name: clock() for name, clock in CLOCKS.items()}
    function()
    return {name: clock() - started[name] for name, clock in CLOCKS.items()}


def make_job(folder: Path, size: int) -> hkh_sources.SceneJob:
    """Write a synthetic scene and its polygons; return the job of preparing it."""
    side = min(size, 1024)  # a larger one is the same ground again: simulating it would take minutes
    scene = write_hkh_sample(folder / "sample", 1, side, seed=0)[0]
    labels = folder / "sample" / LABELS_FILE
    if size > side:
        repeat_scene(scene, labels, size)
    source = hkh_sources.LabelSource(labels, DEFAULT_COLUMN, DEFAULT_WORDS)
    return hkh_sources.plan_scene(scene, source, GRID, {})


def repeat_scene(path: Path, labels: Path, size: int) -> None:
    """Enlarge a scene to `size` px by repeating it and its polygons to the right and below."""
    with rasterio.open(path) as file:
        values, profile, names, tags = file.read(), file.profile, file.descriptions, file.tags()
    side = values.shape[1]
    times = -(-size // side)
    large = np.tile(values, (1, times, times))[:, :size, :size]
    with rasterio.open(path, "w", **{**profile, "height": size, "width": size}) as file:
        file.write(large)
        file.descriptions = names
        file.update_tags(**tags)
    table = geopandas.read_file(labels).to_crs(profile["crs"].to_wkt())
    steps = [(col * side * PIXEL, -row * side * PIXEL) for row in range(times) for col in range(times)]
    copies = [table.assign(geometry=table.geometry.translate(east, north)) for east, north in steps]
    pd.concat(copies, ignore_index=True).to_crs("EPSG:4326").to_file(labels)


def run_prep(job: hkh_sources.SceneJob, out: Path) -> None:
    """Prepare the scene as `prep hkh` does: labels, units, filter, statistics, files."""
    outcome = hkh.process(job, KEEP_ALL, out / job.name, "bench")
    if outcome.problem:
        raise RuntimeError(outcome.problem)


def run_bare(job: hkh_sources.SceneJob, out: Path) -> None:
    """Read the same windows and write files of as many bytes with rasterio alone, converting nothing."""
    bands = [index + 1 for index in job.channels.values()]
    profile = {"driver": "GTiff", "width": GRID.size, "height": GRID.size}
    with rasterio.open(job.path) as scene:
        for row, col, window in hkh_sources.grid_windows(scene.height, scene.width, GRID):
            values = scene.read(bands, window=window)
            stem = out / f"{row:02d}_{col:02d}"
            with rasterio.open(f"{stem}_image.tif", "w", count=5, dtype="float32", **profile) as image:
                image.write(values.astype(np.float32))
            with rasterio.open(f"{stem}_mask.tif", "w", count=1, dtype="uint8", **profile) as mask:
                mask.write(values[0], 1)


def write_report(path: Path, result: Result) -> None:
    """Write the figures as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(format_report(result), encoding="utf-8")


def format_report(result: Result) -> str:
    """Return the report: what was timed, the table, the ratio."""
    repeats = len(result.seconds["prep", "wall"])
    kinds = {"prep": "`python -m prep hkh`", "bare": "bare rasterio read and write"}
    rows = "\n".join(
        f"| {text}, {clock} time | {result.speed(kind, clock):.1f} | "
        f"{', '.join(f'{s:.2f}' for s in result.seconds[kind, clock])} |"
        for clock in CLOCKS
        for kind, text in kinds.items()
    )
    return f"""# Speed of `python -m prep hkh`

`make bench-prep`: a synthetic scene of {result.size} x {result.size} px, 15 channels of 8 bits (LZW,
tiled), outlines all over it, in {result.tiles()} tiles of {GRID.size} px, on one core. Both read the same
windows of the same five bands and write as many bytes (float32 image, uint8 mask); the bare one converts
nothing. They take turns, {repeats} times after a warm-up.

| | megapixels/s (median) | seconds |
| --- | --- | --- |
{rows}

Ratio, median of the pairs: **{result.ratio("CPU"):.2f}** by CPU time, {result.ratio("wall"):.2f} by wall time
(aim: at least 0.5 a core). The prepared tiles carry physical units, rasterised outlines, ignored stripes,
exact statistics and pixels by class.

The machine had {result.cores} usable core(s) for this and a load of {result.load:.1f} at the end.
"""
