"""Whether one run is better than another: differences with paired intervals, in words, and where they come from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Sequence

from prep.store import TileStore
from prep.text import NONE, number_text, plural
from train.config import RESOURCE_KEYS
from train.objective import (
    HEADLINES,
    Interval,
    TileCounts,
    binary,
    difference_intervals,
    interval_text,
    mcc,
    score_intervals,
)
from train.report.scores import ReportError, count_run, read_settings

MOST_TILES = 5  # that changed most are named


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`."""
    parser.add_argument("run", type=Path, help="folder of an evaluated run")
    parser.add_argument("other", type=Path, help="folder of the run that may be better")
    parser.add_argument("--store", type=Path, default=Path("data/competition"), help="default: %(default)s")


def run_compare(arguments: argparse.Namespace) -> int:
    """Tell whether one run scores better than another, on which tiles, and which settings differ."""
    print("\n".join(compare_runs(arguments.run, arguments.other, TileStore(arguments.store))))
    return 0


def compare_runs(run: Path, other: Path, store: TileStore) -> list[str]:
    """Return the comparison of two runs as lines of text, on the tiles that both hold out.

    Raises:
        ReportError: a run cannot be scored, or they share no tile.
    """
    counts = count_run(run, store), count_run(other, store)
    shared = {tile.tile_id for tile in counts[0]} & {tile.tile_id for tile in counts[1]}
    if not shared:
        raise ReportError(f"{run} and {other} hold out no common tile; expected one. Finish a fold of each.")
    ours, theirs = ([tile for tile in tiles if tile.tile_id in shared] for tiles in counts)
    about = f"{other} against {run}, on the {plural(len(shared), 'tile')} that both hold out"
    return [
        about,
        *_scores(str(run), str(other), ours, theirs),
        f"\nTiles that changed most (extent MCC, {run}, {other}):",
        *_tiles(ours, theirs),
        "\nSettings that differ:",
        *describe_settings(run, other),
    ]


def _scores(name: str, other: str, ours: Sequence[TileCounts], theirs: Sequence[TileCounts]) -> list[str]:
    before, after = score_intervals(ours), score_intervals(theirs)
    gains = difference_intervals(theirs, ours)
    lines = []
    for headline in HEADLINES:
        lines += [
            f"\n{headline}: {verdict(gains[headline], other, name)}",
            f"  {name}: {interval_text(before[headline])}",
            f"  {other}: {interval_text(after[headline])}",
        ]
    return lines


def verdict(gain: Interval | None, other: str, run: str) -> str:
    """Say what the paired difference of two runs shows, that of `other` less that of `run`."""
    if gain is None:
        return "undefined, no tile here has such labels"
    if gain.low <= 0 <= gain.high:
        value, low, high = map(number_text, gain)
        return f"no difference can be told: {value}, 95 % interval {low} to {high}"
    low, value, high = (number_text(size) for size in sorted(map(abs, gain)))
    return f"{other if gain.value > 0 else run} is better by {value}, 95 % interval {low} to {high}"


def _tiles(ours: Sequence[TileCounts], theirs: Sequence[TileCounts]) -> list[str]:
    """Return a line for each of the tiles whose extent MCC changed most, the largest change first."""
    rows = []
    for before, after in zip(ours, theirs):
        pair = mcc(binary(before.confusion)), mcc(binary(after.confusion))
        rows.append((pair[1] - pair[0], before.tile_id, pair))
    rows.sort(key=lambda row: -abs(row[0]))
    return [
        f"  {tile}: {gain:+.3f} ({number_text(pair[0])}, {number_text(pair[1])})"
        for gain, tile, pair in rows[:MOST_TILES]
    ]


def describe_settings(run: Path, other: Path) -> list[str]:
    """Return a line for each setting in which two runs differ, apart from those of speed alone."""
    ours, theirs = read_settings(run), read_settings(other)
    differing = [
        key
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key) and key.split(": ")[-1] not in RESOURCE_KEYS
    ]
    lines = [f"  {key}: {ours.get(key, NONE)}, {theirs.get(key, NONE)}" for key in differing]
    return lines or ["  none"]
