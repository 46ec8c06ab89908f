"""What each further forward pass is worth: out-of-fold score against work, over members and views.

Two decisions rest on it: how much work a tile deserves, and the order of the passes in `model.pth`, of which
a run with little time makes only the first.

Members cannot be compared within a run: each tile is unseen by one of them only. A run on other folds has
another one that never saw the tile, so that the mean of the passes of M runs is an honest out-of-fold
ensemble of M members, and the largest that can be measured.
"""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Protocol, Sequence

import numpy as np
import torch
from joblib import Parallel, delayed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from prep.files import write_json, write_text
from prep.store import TileStore
from prep.text import NONE, markdown_table, mcc_text, plural
from solution import (
    VIEWS,
    Model,
    Pass,
    Postprocess,
    decide_classes,
    ensemble_probabilities,
    prepare_torch,
    usable_cores,
)
from train.calibrate import NO_BIAS, STEPS, Run, Settings, open_run, predict_with, score
from train.fit import RunError
from train.masks.pictures import save_figure
from train.objective import TileCounts, count_tile, jackknife_error, score_tiles
from train.predict import as_member, load_passes, read_folds
from train.report.tables import score_run
from train.submit.limits import KNOWN_GMAC
from train.work import count_gmac

REPEATS = 5  # of a timed pass
TIMED_TILES = 3  # for the steps after the passes
CLEANING = "specks and holes"  # a key of calibrate.STEPS
EVERY_VIEW = tuple(range(len(VIEWS)))

Subset = tuple[int, ...]  # ascending numbers of runs, or of views
Place = tuple[int, int]  # members, views: how many of each
Counts = Mapping[tuple[Subset, Subset], Sequence[TileCounts]]  # of all tiles, by the runs and views averaged


class Cost(NamedTuple):
    """What a pass over a tile takes: 10^9 multiply-adds at 512 x 512 px, and seconds on this machine."""

    gmac: float
    seconds: float


class Scores(NamedTuple):
    """Out-of-fold MCC over valid pixels: the objective of `calibrate.score` and what it is the mean of."""

    objective: float
    binary: float
    four_class: float | None


class Cell(NamedTuple):
    """The score of so many members in so many views and what that takes a tile.

    `nested`: the objective where the views of each fold were chosen on the others, `any_views`: its mean over
    all choices of that many views; neither is flattered by the choice, as the scores are.
    `on_front`: nothing measured scores as much for less.
    """

    members: int
    views: int
    passes: int
    gmac: float
    seconds: float
    scores: Scores
    nested: float
    any_views: float
    on_front: bool


class Scored(Protocol):
    """Anything with a score and the work that it takes, such as a `Cell`."""

    @property
    def scores(self) -> Scores: ...

    @property
    def gmac(self) -> float: ...


class Step(NamedTuple):
    """One step of the greedy path: `added` is "member" or "view". Gains are those of a pass, `error` is the
    standard error of the one taken, `instead` what the other choice would have gained (None: no choice)."""

    added: str
    members: int
    views: int
    passes: int
    gain: float
    error: float | None
    instead: float | None


class FoldScore(NamedTuple):
    """Binary MCC on the held-out tiles of a fold, and the baseline's on the same (None: no baseline)."""

    fold: int
    mcc: float
    baseline: float | None

    @property
    def rank(self) -> float:
        """What members are ordered by: folds differ in difficulty, which the baseline takes out."""
        return self.mcc - (self.baseline or 0.0)


class AfterPasses(NamedTuple):
    """The score with a step after the passes, on so many members and views, and the step's seconds a tile."""

    step: str
    members: int
    views: int
    scores: Scores
    seconds: float


class Measurement(NamedTuple):
    """All that was measured; `views` are in the order found, the most useful first; `by_view` has
    the objective of each of them alone, and at last of all, in each run and, at last, in all runs together;
    `passes` are pairs of a fold of the first run and a view."""

    runs: tuple[str, ...]
    views: tuple[int, ...]
    by_view: tuple[tuple[float, ...], ...]
    cost: Cost
    cells: tuple[Cell, ...]
    path: tuple[Step, ...]
    folds: tuple[FoldScore, ...]
    passes: tuple[tuple[int, int], ...]


# --- Scores of every choice ---------------------------------------------------------------------------------


def open_runs(folders: Sequence[Path], store: TileStore) -> list[Run]:
    """Return evaluated runs, whose members join in an ensemble.

    Raises:
        RunError: a fold is missing, or a run is named twice: a network is no second member to itself.
    """
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise RunError(f"{', '.join(map(str, folders))}: expected different runs; name each once")
    runs = [open_run(folder) for folder in folders]
    for run in runs:
        missing = sorted(set(store.tile_ids) - set(run.fold_of))
        if missing:
            raise RunError(
                f"{run.folder}: no finished fold holds out {', '.join(missing)}, expected all "
                f"{len(store.tile_ids)} tiles of {store.folder}; finish the folds with `python -m train fit`"
            )
    return runs


def subsets(count: int, size: int) -> list[Subset]:
    """Return all choices of `size` of the numbers below `count`."""
    return list(combinations(range(count), size))


def all_subsets(count: int) -> list[Subset]:
    """Return all choices of one or more of the numbers below `count`."""
    return [subset for size in range(1, count + 1) for subset in subsets(count, size)]


def mean_passes(runs: Sequence[Run], tile: str) -> np.ndarray:
    """Return a tile's probabilities in each view, averaged over runs, (6, 4, H, W) float32."""
    return np.mean([load_passes(run.folder, tile).astype(np.float32) for run in runs], axis=0)


def count_choices(runs: Sequence[Run], store: TileStore, jobs: int) -> Counts:
    """Return the counts of all tiles for every choice of runs and of views."""
    labels = store.labels

    def count(tile: str) -> dict[tuple[Subset, Subset], TileCounts]:
        mask, fold, counts = store.mask(tile), runs[0].fold_of[tile], {}
        for members in all_subsets(len(runs)):
            passes = mean_passes([runs[number] for number in members], tile)
            for views in all_subsets(len(VIEWS)):
                classes = decide_classes(passes[list(views)].mean(axis=0))
                counts[members, views] = count_tile(tile, fold, labels[tile], mask, classes)
        return counts

    by_tile = Parallel(n_jobs=jobs, prefer="threads")(delayed(count)(tile) for tile in store.tile_ids)
    return {choice: [counts[choice] for counts in by_tile] for choice in by_tile[0]}


def measured_members(counts: Counts) -> int:
    """Return how many members the largest ensemble in `counts` has."""
    return max(len(members) for members, _ in counts)


def mean_objective(counts: Counts, members: int, choices: Sequence[Subset]) -> float:
    """Return the objective, averaged over all choices of so many runs and the given choices of views."""
    runs = subsets(measured_members(counts), members)
    return float(
        np.mean([score(counts[chosen, tuple(sorted(views))]) for chosen in runs for views in choices])
    )


def mean_scores(by_choice: Sequence[Sequence[TileCounts]]) -> Scores:
    """Return the scores of some predictions of the same tiles, averaged over the predictions."""
    both = [score_tiles(tiles)["valid_pixels"] for tiles in by_choice]
    four_class = [scores["four_class"]["mcc"] for scores in both if scores["four_class"] is not None]
    return Scores(
        float(np.mean([score(tiles) for tiles in by_choice])),
        float(np.mean([scores["binary"]["mcc"] for scores in both])),
        float(np.mean(four_class)) if four_class else None,
    )


# --- The order of the passes --------------------------------------------------------------------------------


def order_views(counts: Counts) -> tuple[int, ...]:
    """Return all views: the best of one member, then always the one that gains most given those before it."""
    chosen: tuple[int, ...] = ()
    while len(chosen) < len(VIEWS):
        left = [view for view in range(len(VIEWS)) if view not in chosen]
        best = max(left, key=lambda view: mean_objective(counts, 1, [(*chosen, view)]))
        chosen += (best,)
    return chosen


def nested_orders(counts: Counts) -> dict[int, tuple[int, ...]]:
    """Return for each fold the order of views that is found on the tiles of the other folds."""
    folds = {tile.fold for tile in next(iter(counts.values()))}
    return {
        fold: order_views({choice: [t for t in tiles if t.fold != fold] for choice, tiles in counts.items()})
        for fold in sorted(folds)
    }


def nested_objective(counts: Counts, members: int, views: Mapping[int, Sequence[int]]) -> float:
    """Return the objective with other views for each fold, averaged over all choices of so many runs."""
    scores = []
    for chosen in subsets(measured_members(counts), members):
        held_out = [
            tile
            for fold, of_fold in views.items()
            for tile in counts[chosen, tuple(sorted(of_fold))]
            if tile.fold == fold
        ]
        scores.append(score(held_out))
    return float(np.mean(scores))


def score_views(counts: Counts, order: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Return the objective of each view alone, in `order`, and of all: [view][run, at last all together]."""
    runs = [*subsets(measured_members(counts), 1), tuple(range(measured_members(counts)))]
    choices = [*((view,) for view in order), EVERY_VIEW]
    return tuple(tuple(score(counts[chosen, views]) for chosen in dict.fromkeys(runs)) for views in choices)


def measure_cells(counts: Counts, order: Sequence[int], cost: Cost) -> tuple[Cell, ...]:
    """Return a cell for every number of members and of views, in `order`."""
    cells, nested = [], nested_orders(counts)
    for members in range(1, measured_members(counts) + 1):
        runs = subsets(measured_members(counts), members)
        for views in range(1, len(VIEWS) + 1):
            first, passes = tuple(sorted(order[:views])), members * views
            scores = mean_scores([counts[chosen, first] for chosen in runs])
            any_views = mean_objective(counts, members, subsets(len(VIEWS), views))
            work = (passes, passes * cost.gmac, passes * cost.seconds)
            unseen = nested_objective(counts, members, {fold: of[:views] for fold, of in nested.items()})
            cells.append(Cell(members, views, *work, scores, unseen, any_views, False))
    return tuple(cell._replace(on_front=is_on_front(cell, cells)) for cell in cells)


def is_on_front(one: Scored, among: Sequence[Scored]) -> bool:
    """Return whether nothing scores as much for less work, or more for the same."""
    worth, work = one.scores.objective, one.gmac
    return not any(
        (other.gmac <= work and other.scores.objective > worth)
        or (other.gmac < work and other.scores.objective == worth)
        for other in among
    )


def walk_greedily(counts: Counts, order: Sequence[int]) -> tuple[Step, ...]:
    """Return the way from one member in one view to all, always to what gains most a pass.

    A further member costs a pass for each view, a further view one for each member. At equal gains the member
    comes first.
    """
    end = (measured_members(counts), len(VIEWS))
    place, steps = (1, 1), []
    while place != end:
        members, views = place
        targets = {"member": (members + 1, views), "view": (members, views + 1)}
        possible = {
            kind: there for kind, there in targets.items() if there[0] <= end[0] and there[1] <= end[1]
        }
        gains = {kind: gain_of_a_pass(counts, order, place, there) for kind, there in possible.items()}
        added = max(gains, key=gains.__getitem__)
        instead = next((gain for kind, gain in gains.items() if kind != added), None)
        there = possible[added]
        error = standard_error(counts, order, place, there)
        steps.append(Step(added, *there, there[0] * there[1], gains[added], error, instead))
        place = there
    return tuple(steps)


def gain_of_a_pass(counts: Counts, order: Sequence[int], here: Place, there: Place) -> float:
    """Return the objective gained from `here` to `there` for each pass that it takes."""
    passes = there[0] * there[1] - here[0] * here[1]
    before, after = (mean_objective(counts, m, [tuple(order[:v])]) for m, v in (here, there))
    return (after - before) / passes


def standard_error(counts: Counts, order: Sequence[int], here: Place, there: Place) -> float | None:
    """Return the standard error of `gain_of_a_pass`, by leaving out each tile in turn (jackknife).

    None for a single tile.
    """
    tiles = len(next(iter(counts.values())))
    if tiles < 2:
        return None
    gains = []
    for left_out in range(tiles):
        others = {choice: [*of[:left_out], *of[left_out + 1 :]] for choice, of in counts.items()}
        gains.append(gain_of_a_pass(others, order, here, there))
    return jackknife_error(gains)


def order_folds(
    counts: Sequence[TileCounts], scheme: str, baseline: Path | None, store: TileStore
) -> tuple[FoldScore, ...]:
    """Return the folds of a run by their margin over the baseline; without one, by their own score.

    Args:
        counts: its out-of-fold predictions of all tiles.
        scheme: of its folds.
        baseline: a run on the same folds.
        store: the tiles of both.

    Raises:
        RunError: the baseline has other folds.
    """
    bars: dict[int, float] = {}
    if baseline is not None:
        scores = score_run(baseline, store)
        if scores["scheme"] != scheme:
            raise RunError(
                f"{baseline}: a baseline on {scores['scheme']} folds, expected {scheme} ones as in the first "
                f"run; fit it with `python -m train baseline --scheme {scheme}`"
            )
        folds = scores["folds"].items()
        bars = {int(fold): of["valid_pixels"]["binary"]["mcc"] for fold, of in folds}
    found = []
    for fold in sorted({tile.fold for tile in counts}):
        held_out = mean_scores([[tile for tile in counts if tile.fold == fold]])
        found.append(FoldScore(fold, held_out.binary, bars.get(fold)))
    return tuple(sorted(found, key=lambda fold: -fold.rank))


def expand(
    path: Sequence[Step], measured: int, members: Sequence[int], views: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return all passes (member, view), in the order that the path from one member to `measured` suggests.

    Where the path adds a member, the next one joins with all views so far; where it adds a view, all members
    so far get it. Members beyond the measured ones join together with the last of those: if a second member
    gained more than a second view, all members' first views come before anyone's second. With one measured
    member, nothing is known of the second, and all join at once.
    """
    present = list(members[:1] if measured > 1 else members)
    passes = [(member, views[0]) for member in present]
    for step in path:
        if step.added == "member":
            last = len(members) if step.members == measured else step.members
            newcomers = members[len(present) : last]
            passes += [(member, view) for member in newcomers for view in views[: step.views]]
            present += newcomers
        else:
            passes += [(member, views[step.views - 1]) for member in present]
    return tuple(passes)


# --- Work and time ------------------------------------------------------------------------------------------


def median_seconds(works: Sequence[Callable[[], object]]) -> float:
    """Return the median time of some pieces of work, the first of which is done once before it counts."""
    works[0]()
    seconds = []
    for work in works:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def measure_cost(records: Sequence[Mapping], image: np.ndarray) -> Cost:
    """Return what a pass over `image` (H, W, 5) takes, averaged over the networks of some folds."""
    gmac, seconds = [], []
    for record in records:
        member = as_member(record)
        device = next(iter(member.network.state_dict().values())).device
        model = Model((member,), (Pass(0, 0),), NO_BIAS, Postprocess(), math.inf, device)
        work = partial(ensemble_probabilities, model, image, model.passes)
        gmac.append(count_gmac(record["arch"]))
        seconds.append(median_seconds([work] * REPEATS))
    return Cost(float(np.mean(gmac)), float(np.mean(seconds)))


def measure_after_passes(
    runs: Sequence[Run], store: TileStore, order: Sequence[int], jobs: int
) -> tuple[AfterPasses, ...]:
    """Return what cleaning and CRF bring after the least and after the most passes.

    Of the CRF's options that one is shown that scores best after the most.
    """
    each, together = [[run] for run in runs], [list(runs)]
    most = Settings(views=len(VIEWS))
    crfs = STEPS["CRF"](most)
    of_crfs = score_settings(together, store, order, crfs, jobs)
    steps = {"none": most, CLEANING: STEPS[CLEANING](most)[0]}
    if crfs:
        steps["CRF"] = crfs[int(np.argmax([scores.objective for scores in of_crfs]))]
    rows = []
    for ensembles, views in ((each, 1), (together, len(VIEWS))):
        options = [settings._replace(views=views) for settings in steps.values()]
        found = score_settings(ensembles, store, order, options, jobs)
        seconds = [time_settings(runs, store, option) for option in options]
        members = len(ensembles[0])
        for name, scores, taken in zip(steps, found, seconds):
            rows.append(AfterPasses(name, members, views, scores, taken))
    return tuple(rows)


def score_settings(
    ensembles: Sequence[Sequence[Run]],
    store: TileStore,
    order: Sequence[int],
    options: Sequence[Settings],
    jobs: int,
) -> list[Scores]:
    """Return the scores of each option, averaged over some ensembles of runs; views are taken in `order`."""
    labels = store.labels

    def count(tile: str) -> list[list[TileCounts]]:
        image, mask, counts = store.image(tile), store.mask(tile), []
        for runs in ensembles:
            passes, fold = mean_passes(runs, tile)[list(order)], runs[0].fold_of[tile]
            maps = [predict_with(option, passes, image, runs[0].normalization[fold]) for option in options]
            counts.append([count_tile(tile, fold, labels[tile], mask, classes) for classes in maps])
        return counts

    by_tile = Parallel(n_jobs=jobs, prefer="threads")(delayed(count)(tile) for tile in store.tile_ids)
    return [
        mean_scores([[counts[number][option] for counts in by_tile] for number in range(len(ensembles))])
        for option in range(len(options))
    ]


def time_settings(runs: Sequence[Run], store: TileStore, settings: Settings) -> float:
    """Return the median seconds that a tile takes after its passes, of a few tiles."""
    works = []
    for tile in store.tile_ids[:TIMED_TILES]:
        mean = mean_passes(runs, tile).mean(axis=0, keepdims=True)  # averaged beforehand, which is not timed
        normalization = runs[0].normalization[runs[0].fold_of[tile]]
        works.append(
            partial(predict_with, settings._replace(views=1), mean, store.image(tile), normalization)
        )
    return median_seconds(works)


# --- All of it ----------------------------------------------------------------------------------------------


def measure(runs: Sequence[Run], store: TileStore, baseline: Path | None, jobs: int) -> Measurement:
    """Return scores, work and order of the passes of evaluated runs; the order is for the first's members.

    Args:
        runs: from `open_runs`, on folds of different schemes or seeds.
        store: the tiles of all of them.
        baseline: a run of `train.baseline` on the first run's folds, None to do without.
        jobs: tiles to work on at a time.

    Raises:
        RunError: a tile is not predicted yet, or the baseline has other folds.
    """
    records = [read_folds(run.folder)[0] for run in runs]
    counts = count_choices(runs, store, jobs)
    folds = order_folds(counts[(0,), EVERY_VIEW], records[0]["scheme"], baseline, store)
    order = order_views(counts)
    prepare_torch(usable_cores())
    cost = measure_cost(records, store.image(store.tile_ids[0]))
    path = walk_greedily(counts, order)
    passes = expand(path, len(runs), [fold.fold for fold in folds], order)
    return Measurement(
        tuple(run.name for run in runs),
        order,
        score_views(counts, order),
        cost,
        measure_cells(counts, order, cost),
        path,
        folds,
        passes,
    )


def write_order(path: Path, measured: Measurement) -> None:
    """Write the order of the passes and what it rests on as JSON, for `pack`."""
    content = {
        "runs": list(measured.runs),
        "views": list(measured.views),
        "members": [fold.fold for fold in measured.folds],
        "passes": [list(one) for one in measured.passes],
        "steps": [flat(cell) for cell in measured.cells],
        "path": [step._asdict() for step in measured.path],
    }
    write_json(path, content)


def flat(cell: Cell) -> dict:
    """Return a cell as one dictionary with its scores in it."""
    values = cell._asdict()
    return {**values.pop("scores")._asdict(), **values}


# --- The report ---------------------------------------------------------------------------------------------

INTRODUCTION = """\
- **Score**: the objective, which is the mean of the binary MCC on all tiles and the four-class MCC on those
  with phase-2 labels; out of fold, valid pixels, before class bias, CRF and cleaning.
- **Networks**: within one run each tile is unseen by one network only, so its networks can be neither
  compared nor averaged out of fold. A run on other folds has another network that never saw the tile: *2
  networks* is the mean of the passes of two runs, *1* the mean of the scores of single runs, since those of
  a model.pth are of one kind. More networks than runs (here {runs}) cannot be measured, nor can all {folds}
  of a model.pth together.
- **Views** are taken in the order found below on the same tiles, which flatters the first few. *Nested*
  finds the order for each fold on the others; *any choice* is the mean over all choices of so many views.
- **Work**: 10^9 multiply-adds (GMAC) a tile of 512 x 512 px, counted. The seconds are those of the machine
  that made this report, with {threads} and beside whatever else it did: {seconds:.2f} s a pass. Elsewhere
  only ratios to one pass hold; that of passes is their number. *Front*: nothing else scores as much for less.

All {folds} networks in all {views} views are {every} passes, or {all_gmac:.0f} GMAC. The most that is known
to have passed the platform is {limit} GMAC, which is {fitting} passes of {gmac:.1f}; three times as much did
not pass."""

ORDER = """\
Views, greedily: the best of one network, then always the one that gains most:
{views}.

Then, from one network in one view, always what gains most *for each pass* that it takes: a further network
costs one for each view, a further view one for each network. ± is the standard error over tiles (jackknife);
less than that is noise.

{rule}"""

RULE = """\
Networks beyond the measured ones join together with the last of those, each with all views that the networks
have by then: here they join with {views} each, so that {consequence}."""

NO_RULE = """\
One run has one network a tile, so a second network could not be compared with a second view. All networks'
first views come before anyone's second; name a second run on other folds to measure it."""

MEMBERS = """\
By binary MCC on the tiles that each network of the first run never saw, all views averaged{against}.
Few tiles decide here, so the order of networks is little better than a guess."""
AGAINST_BASELINE = ", less that\nof the baseline on the same tiles: folds differ in difficulty"
ALONE = ";\nfolds differ in difficulty, which `--baseline` would take out"

AFTER = """\
Of the CRF's options that which scores best on the same tiles is shown, which flatters it; `calibrate` decides
with nested folds (`postprocess.md`). *s a tile* is all that follows the passes, *in passes* the same as a
multiple of one."""


def write_report(
    path: Path, measured: Measurement, after: Sequence[AfterPasses], commands: Sequence[str]
) -> None:
    """Write the tables as Markdown, and the score against work as `<stem>.png` beside it."""
    picture = save_figure(draw_scores(measured.cells), Path(path).with_suffix(".png"))
    sections = [
        "# What further passes are worth",
        "\n".join(("```sh", *commands, "```")),
        explain(measured),
        "## Networks and views",
        cell_table(measured.cells),
        f"![Out-of-fold score against work]({picture.name})",
        "## The order of the passes",
        explain_order(measured),
        step_table(measured.path),
        "Each view alone, and all: where runs differ, the poorer one may pull the better one down.",
        view_table(measured),
        "## The order of the networks",
        MEMBERS.format(against=AGAINST_BASELINE if measured.folds[0].baseline is not None else ALONE),
        fold_table(measured.folds),
        "## After the passes",
        AFTER,
        after_table(after, measured.cost),
    ]
    write_text(path, "\n\n".join(sections) + "\n")


def explain(measured: Measurement) -> str:
    """Return what the numbers mean, and what all passes of the first run's folds cost."""
    folds, cost = len(measured.folds), measured.cost
    return INTRODUCTION.format(
        runs=len(measured.runs),
        folds=folds,
        threads=plural(torch.get_num_threads(), "thread"),
        seconds=cost.seconds,
        views=len(VIEWS),
        every=folds * len(VIEWS),
        all_gmac=folds * len(VIEWS) * cost.gmac,
        limit=KNOWN_GMAC,
        fitting=int(KNOWN_GMAC / cost.gmac),
        gmac=cost.gmac,
    )


def explain_order(measured: Measurement) -> str:
    """Return how the order of the passes was found, and how it goes on beyond what was measured."""
    names = ", ".join(VIEWS[view].name for view in measured.views)
    joined = [step.views for step in measured.path if step.added == "member"]
    if not joined:
        return ORDER.format(views=names, rule=NO_RULE)
    consequence = (
        "all networks' first views come before anyone's second"
        if joined[-1] == 1
        else f"network after network comes with its first {joined[-1]} views"
    )
    rule = RULE.format(views=plural(joined[-1], "view"), consequence=consequence)
    return ORDER.format(views=names, rule=rule)


def cell_table(cells: Sequence[Cell]) -> str:
    """Return the score and the work of each number of networks and views."""
    head = ["networks", "views", "passes", "GMAC a tile", "s a tile", "score", "nested", "any choice"]
    head += ["binary", "four classes", "front"]
    rows = [
        [
            *(str(number) for number in (cell.members, cell.views, cell.passes)),
            f"{cell.gmac:.1f}",
            f"{cell.seconds:.2f}",
            *map(mcc_text, (cell.scores.objective, cell.nested, cell.any_views)),
            *map(mcc_text, cell.scores[1:]),
            "yes" if cell.on_front else "",
        ]
        for cell in cells
    ]
    return markdown_table(head, rows)


def step_table(path: Sequence[Step]) -> str:
    """Return the greedy path and what the other choice would have gained."""
    head = ["step", "networks", "views", "passes", "gain a pass", "the other choice"]
    rows = [
        [
            "one more network" if step.added == "member" else "one more view",
            *(str(number) for number in (step.members, step.views, step.passes)),
            f"{step.gain:+.4f}" + ("" if step.error is None else f" ± {step.error:.4f}"),
            NONE if step.instead is None else f"{step.instead:+.4f}",
        ]
        for step in path
    ]
    return markdown_table(head, rows)


def view_table(measured: Measurement) -> str:
    """Return the objective of each view alone and of all, by run and for all runs together."""
    together = ["together"] if len(measured.runs) > 1 else []
    names = [*(VIEWS[view].name for view in measured.views), "all"]
    rows = [[name, *map(mcc_text, scores)] for name, scores in zip(names, measured.by_view)]
    return markdown_table(["view", *measured.runs, *together], rows)


def fold_table(folds: Sequence[FoldScore]) -> str:
    """Return the folds in the order in which their networks come."""
    rows = [
        [
            str(fold.fold),
            mcc_text(fold.mcc),
            mcc_text(fold.baseline),
            NONE if fold.baseline is None else f"{fold.rank:+.4f}",
        ]
        for fold in folds
    ]
    return markdown_table(["fold", "MCC", "baseline", "margin"], rows)


def after_table(after: Sequence[AfterPasses], cost: Cost) -> str:
    """Return the score and the time with each step after the passes."""
    head = ["step", "networks", "views", "score", "binary", "four classes", "s a tile", "in passes"]
    rows = [
        [
            row.step,
            str(row.members),
            str(row.views),
            *(mcc_text(value) for value in row.scores),
            f"{row.seconds:.2f}",
            f"{row.seconds / cost.seconds:.1f}",
        ]
        for row in after
    ]
    return markdown_table(head, rows)


def draw_scores(cells: Sequence[Cell]) -> Figure:
    """Draw the score against work, a line for each number of networks; points are numbered by views."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for members in sorted({cell.members for cell in cells}):
        line = [cell for cell in cells if cell.members == members]
        work = [cell.gmac for cell in line]
        name = plural(members, "network")
        drawn = axis.plot(
            work, [cell.scores.objective for cell in line], "o-", label=f"{name}, best views first"
        )
        axis.plot(
            work,
            [cell.any_views for cell in line],
            "--",
            color=drawn[0].get_color(),
            label=f"{name}, any views",
        )
        for cell in line:
            number_point(axis, cell.views, cell.gmac, cell.scores.objective)
    finish_plot(figure, axis, columns=2)
    return figure


def number_point(axis: Axes, views: int, gmac: float, objective: float) -> None:
    """Write the number of views above a point of score against work."""
    point = (gmac, objective)
    axis.annotate(str(views), point, (0, 5), textcoords="offset points", ha="center", fontsize=8)


def finish_plot(figure: Figure, axis: Axes, columns: int) -> None:
    """Add the limit, the axes and the legend, in so many columns, to a plot of score against work."""
    axis.axvline(KNOWN_GMAC, color="black", linestyle=":", label="most known to pass the platform")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("work a tile of 512 x 512 px, GMAC (points: number of views)")
    axis.set_ylabel("out-of-fold score (MCC)")
    axis.grid(alpha=0.4)
    figure.legend(loc="outside upper center", ncols=columns)
