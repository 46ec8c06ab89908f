"""What each part of an ensemble is worth, out of fold: members, views, steps after the networks.

Everything is scored on tiles that no network involved has seen, and the recipe's own choice is the reference that
the others are compared with. A step with a setting is scored nested: each fold with the setting that was best on the
other folds, so that choosing does not flatter it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Sequence

import numpy as np
import torch

from prep.files import write_text
from prep.store import TileStore
from prep.text import markdown_table
from solution import Crf, clean_classes, decide_classes, normalize, refine_with_crf, valid_mask
from train.config import Config, MemberConfig, PostprocessConfig, members_of
from train.objective import TileCounts, count_tiles, difference_intervals, interval_text, score_intervals
from train.predict import extent_out_of_fold, probabilities_out_of_fold, score_inputs
from train.run import read_folds

EXTENT_BIASES = tuple(round(0.1 * step, 1) for step in range(-10, 11))
DEBRIS_BIASES = tuple(0.25 * step for step in range(-4, 13))
CRFS = tuple(
    {
        "smooth_px": 3.0,
        "smooth_weight": smooth,
        "bilateral_px": 30.0,
        "bilateral_std": std,
        "bilateral_weight": weight,
    }
    for smooth, std, weight in ((1.0, 0.5, 0.0), (1.0, 0.5, 1.0), (1.0, 0.25, 3.0), (3.0, 0.5, 3.0))
)
CLEANINGS = ((50, 25), (100, 50), (200, 100))

Extent = Callable[[str], torch.Tensor]  # from tile id to probability (H, W)


class Row(NamedTuple):
    """A line of the report: what was scored, and its counts of every tile."""

    name: str
    counts: list[TileCounts]


class Evidence:
    """A run's out-of-fold predictions, from which any choice of members and steps can be scored."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        """Predict what is missing."""
        self.run_dir, self.config = Path(run_dir), config
        self.store = TileStore(config.data.store)
        self.fold_of = score_inputs(self.run_dir, config, self.store)
        self.members = {name: member for name, (member, _) in members_of(config).items()}
        first = next(iter(self.members))
        self.normalization = {r["fold"]: r["normalization"] for r in read_folds(self.run_dir / first)}

    def count(self, extent: Extent, steps: PostprocessConfig) -> list[TileCounts]:
        """Count all tiles under an extent and the steps after it."""
        return count_tiles(self.store, self.fold_of, lambda tile: self.classes(tile, extent(tile), steps), self.fold_of)

    def classes(self, tile: str, extent: torch.Tensor, steps: PostprocessConfig) -> np.ndarray:
        """Return class indices (H, W) uint8 of a tile, as `solution.predict_classes` makes them."""
        probs = probabilities_out_of_fold(self.run_dir, tile, extent, steps)
        image = self.store.image(tile)
        valid = valid_mask(image)
        if steps.crf:
            features = normalize(image, self.normalization[self.fold_of[tile]])
            probs = refine_with_crf(probs, features, valid, Crf(**steps.crf))  # type: ignore[arg-type]
        return clean_classes(decide_classes(probs), valid, steps.min_speck, steps.min_hole)

    def of_members(self, members: Mapping[str, MemberConfig]) -> Extent:
        """Return the extent by some members, averaged as the submission does."""
        return lambda tile: extent_out_of_fold(self.run_dir, tile, members)

    def nested(self, options: Sequence[PostprocessConfig]) -> list[TileCounts]:
        """Count each fold's tiles with the option that scores best on the other folds."""
        extent = self.of_members(self.members)
        counted = [self.count(extent, option) for option in options]
        chosen: list[TileCounts] = []
        for fold in sorted(set(self.fold_of.values())):
            scores = [objective([tile for tile in option if tile.fold != fold]) for option in counted]
            chosen += [tile for tile in counted[int(np.argmax(scores))] if tile.fold == fold]
        return chosen


def objective(tiles: Sequence[TileCounts]) -> float:
    """Return the mean of the scores that these tiles have: MCC of the extent, and of four classes."""
    values = [score.value for name, score in score_intervals(tiles).items() if score and name != "debris IoU"]
    return float(np.mean(values))


def measure(evidence: Evidence) -> list[Row]:
    """Return the rows of the report, the recipe's own choice first."""
    steps, members = evidence.config.postprocess, evidence.members
    whole = evidence.of_members(members)
    rows = [Row("the recipe", evidence.count(whole, steps))]

    def add(name: str, extent: Extent = whole, after: PostprocessConfig = steps) -> None:
        rows.append(Row(name, evidence.count(extent, after)))

    for name, member in members.items():
        for views in sorted({1, member.views}):
            alone = {name: replace(member, views=views)}
            add(f"{name} alone, {views} view{'s' * (views > 1)}", evidence.of_members(alone))
    for name in members if len(members) > 2 else ():
        add(f"without {name}", evidence.of_members({n: m for n, m in members.items() if n != name}))
    add("without the network of the kind", after=replace(steps, debris_bias=-100.0))
    for name, options in (
        ("bias of the extent, nested", [replace(steps, extent_bias=bias) for bias in EXTENT_BIASES]),
        ("bias of debris, nested", [replace(steps, debris_bias=bias) for bias in DEBRIS_BIASES]),
        ("CRF, nested", [steps, *(replace(steps, crf=crf) for crf in CRFS)]),
        (
            "specks and holes, nested",
            [replace(steps, min_speck=s, min_hole=h) for s, h in ((0, 0), *CLEANINGS)],
        ),
    ):
        rows.append(Row(name, evidence.nested(options)))
        print(f"{name}: scored", file=sys.stderr)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown: scores with intervals, and the difference from the first row."""
    first = rows[0].counts
    names = ("extent MCC", "four-class MCC", "debris IoU")
    head = [
        "",
        "extent, MCC",
        "four classes, MCC",
        "debris, IoU",
        "extent, difference",
        "four classes, difference",
    ]
    lines = []
    for row in rows:
        scores, gains = score_intervals(row.counts), difference_intervals(row.counts, first)
        differences = ["", ""] if row is rows[0] else [interval_text(gains[name], "+") for name in names[:2]]
        lines.append([row.name, *(interval_text(scores[name]) for name in names), *differences])
    return markdown_table(head, lines)


def write_report(path: Path, rows: Sequence[Row], about: str, command: str) -> None:
    """Write the table of an ensemble's parts as Markdown."""
    write_text(
        path,
        "# What each part of the ensemble is worth\n\n"
        f"{about}\n\nOut of fold, valid pixels, 95 % intervals by bootstrap over blocks of 3 km; differences are "
        "paired and from the first row. *Nested*: each fold uses the setting that was best on the other folds.\n\n"
        f"```sh\n{command}\n```\n\n{table(rows)}\n",
    )
