"""Many tiles in one run: what they cost in memory, and that one bad tile costs itself."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import NamedTuple

import numpy as np

import solution
from fuzz import runs


class Load(NamedTuple):
    """What a run over many tiles took: bytes a tile by a straight line, bytes at its peak, and the faults."""

    slope: float
    peak: int
    faults: list[str]


def resident() -> int:
    """Return the bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def lay_out_many(data: Path, tiles: int, side: int) -> None:
    """Write so many tiles as links to the files of a few."""
    runs.healthy_tiles(data, 5, side)
    for band in solution.BANDS:
        for number in range(5, tiles):
            os.link(data / band.folder / f"img{number % 5:03d}.tif", data / band.folder / f"img{number:03d}.tif")


def run_many(tiles: int, side: int, weights: Path, work: Path) -> Load:
    """Segment so many tiles, of which the last but one is damaged; note the memory after every mask."""
    data, out = work / "many-in", work / "many-out"
    lay_out_many(data, tiles, side)
    bad = tiles - 2
    (data / "Band3" / f"img{bad:03d}.tif").unlink()
    (data / "Band3" / f"img{bad:03d}.tif").write_bytes(b"")
    out.mkdir()
    memory, save = [], solution.png_writer(out)

    def write(tile: solution.TileFiles, mask: np.ndarray) -> None:
        save(tile, mask)
        memory.append(resident())

    with runs.captured():
        summary = solution.segment_folder(data, weights, write, keep_masks=False)
    warm = tiles // 5  # until then buffers grow to their size
    slope = float(np.polyfit(np.arange(warm, tiles), memory[warm:], 1)[0])
    faults = [] if list(summary.faults) == [f"{bad:03d}"] else [f"failed: {list(summary.faults)[:5]}"]
    if len(list(out.iterdir())) != tiles:
        faults.append(f"{len(list(out.iterdir()))} masks")
    return Load(slope, max(memory), faults)
