"""Writes the page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Collection, Mapping, Sequence

from prep.store import TileStore
from prep.text import plural
from train.report import sections
from train.report.evidence import gather, read_result
from train.report.markup import Html, fill_page, join, paragraph, tag

TITLE = "Glacier mapping: out-of-fold report"
CALIBRATION_KEYS = ("runs", "steps")
PASSES_KEYS = ("runs", "steps")


def write_page(
    run_dirs: Mapping[str, Path],
    scores: Mapping[str, dict],
    store: TileStore,
    out: str | os.PathLike,
    commands: Sequence[str] = (),
    calibration: Path | None = None,
    passes: Path | None = None,
    against: Collection[str] = (),
) -> Path:
    """Write one HTML file that needs no other: scores, curves, calibration, and pictures of every tile.

    It embeds the tiles: where they are not free to be published, neither is the page. The same runs give the
    same bytes.

    Args:
        run_dirs: name of each run on the page, and its folder; tiles are sorted by the first.
        scores: of each run, as `train.report.tables.score_run` returns them.
        store: the tiles of all of them.
        out: the file, e.g. reports/index.html.
        commands: what to type to make the runs and this page again.
        calibration: JSON file of `calibrate`, if it is to be shown.
        passes: JSON file of `pareto`, if it is to be shown.
        against: names of runs that the others are compared with, as they are with those of `baseline`.

    Raises:
        ReportError: a run or a file cannot be read.
    """
    steps = read_result(calibration, CALIBRATION_KEYS, "calibrate") if calibration else None
    order = read_result(passes, PASSES_KEYS, "pareto") if passes else None
    runs, panels = gather(run_dirs, scores, store, against)
    parts = {
        "Scores": sections.scores_section(runs, commands),
        "Folds and tiles": sections.folds_section(runs),
        "Confusion": sections.confusion_section(runs),
        "Reliability": sections.reliability_section(runs),
        "Learning": sections.learning_section(runs),
        "After the networks": sections.calibration_section(steps) if steps else None,
        "Work": sections.passes_section(order) if order else None,
        "Every tile": sections.tiles_section(runs, panels),
    }
    shown = {name: part for name, part in parts.items() if part is not None}
    body = join(_head(len(store.tile_ids), len(runs)), *shown.values())
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = fill_page(TITLE, _navigation(shown), body)
    out.write_text(page, encoding="utf-8", errors="replace")  # a tile id may be no valid UTF-8
    return out


def _head(tiles: int, runs: int) -> Html:
    rule = "Every tile is predicted by a model that never saw it, and scored by Matthews correlation (MCC)."
    lead = paragraph(f"{plural(runs, 'run')}, {plural(tiles, 'tile')}. {rule}")
    return tag("div", tag("h1", TITLE), lead, class_="lead")


def _navigation(shown: Mapping[str, Html]) -> Html:
    links = []
    for name, part in shown.items():
        anchor = part.split('id="', 1)[1].split('"', 1)[0]
        links.append(tag("a", name, href=f"#{anchor}"))
    return join(*links)
