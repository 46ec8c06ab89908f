"""Score against work of any models, side by side: single networks, soups, students, ensembles of runs.

A model is one or several evaluated runs, of each of which a tile is predicted by the network that never saw
it, averaged with weights; or what `python -m train pack` fitted. It is scored with one view, two, and so on.
A student or a soup is a run like any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import numpy as np
from joblib import Parallel, delayed
from matplotlib.figure import Figure

from prep.files import write_json, write_text
from prep.store import TileStore
from prep.text import markdown_table, mcc_text, plural
from solution import VIEWS, prepare_torch, usable_cores
from train.calibrate import Run, score
from train.fit import RunError
from train.masks.pictures import save_figure
from train.mixture import (
    VIEW_ORDER,
    Mix,
    Prediction,
    count_mix,
    error_of_difference,
    means_of_first,
    normalised,
    stored_size,
)
from train.objective import TileCounts
from train.pack import read_settings
from train.pareto import (
    Cost,
    Scores,
    finish_plot,
    is_on_front,
    mean_scores,
    measure_cost,
    number_point,
    open_runs,
)
from train.predict import load_passes, predict_run_diagonally, read_folds, usable_views
from train.run import DIAGONALS_FOLDER
from train.submit.limits import KNOWN_GMAC

DIAGONALS = 2  # views besides VIEWS, mirrored along a diagonal, measured here and not shipped
SHIPPABLE_SIZE = 70e6  # bytes: what is committed to git stays below


class Candidate(NamedTuple):
    """A model to be scored: its name, the folders of its runs, and their weights."""

    name: str
    folders: tuple[Path, ...]
    weights: tuple[float, ...]


class Point(NamedTuple):
    """A model with so many views: what it takes a tile and what it scores.

    `difference`: of the objective to that of the first model in all views, `error` its standard error.
    `on_front`: nothing here scores as much for less work.
    """

    model: str
    networks: int
    views: int
    gmac: float
    seconds: float
    size: int
    scores: Scores
    difference: float
    error: float
    on_front: bool


def read_candidates(named: Sequence[str]) -> list[Candidate]:
    """Return models from text: NAME=RUN, NAME=RUN,RUN, NAME=RUN:0.7,RUN:0.3, or NAME=<model>_mixture.json.

    Raises:
        RunError: a name is there twice, or text is none of these.
    """
    candidates = [read_candidate(text) for text in named]
    names = [candidate.name for candidate in candidates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RunError(f"models: the name {', '.join(twice)} occurs twice, expected different ones")
    return candidates


def read_candidate(text: str) -> Candidate:
    """Return one model from text, see `read_candidates`."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise RunError(
            f"models: found {text!r}, expected NAME=RUN, NAME=RUN,RUN or NAME=<model>_mixture.json for each"
        )
    if value.endswith(".json"):
        content = read_settings(Path(value), ("folders", "weights"), "pack --run A --run B")
        pairs = [(folder, weight) for folder, weight in zip(content["folders"], content["weights"]) if weight]
    else:
        pairs = [read_weight(part) for part in value.split(",")]
    return Candidate(name, tuple(Path(folder) for folder, _ in pairs), tuple(weight for _, weight in pairs))


def read_weight(text: str) -> tuple[str, float]:
    """Return folder and weight from "folder:0.7"; 1 where none is given."""
    folder, colon, weight = text.rpartition(":")
    try:
        return (folder, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def measure_points(candidates: Sequence[Candidate], store: TileStore, jobs: int) -> list[Point]:
    """Return a point for each model with each number of views, in VIEW_ORDER and then along the diagonals.

    Raises:
        RunError: a run is not finished or evaluated.
    """
    folders = list(dict.fromkeys(folder for candidate in candidates for folder in candidate.folders))
    runs = dict(zip(folders, open_runs(folders, store)))
    prepare_torch(usable_cores())
    image = store.image(store.tile_ids[0])
    costs, sizes, most = {}, {}, {}
    for folder in folders:
        record = read_folds(folder)[0]
        costs[folder], sizes[folder] = measure_cost([record], image), stored_size(record)
        most[folder] = usable_views(record)
        if most[folder] == len(VIEWS):
            predict_run_diagonally(folder, store)
            most[folder] += DIAGONALS
    counts = count_candidates(candidates, runs, store, most, jobs)
    reference = counts[0][-1]
    points = []
    for candidate, by_views in zip(candidates, counts):
        for views, tiles in enumerate(by_views, start=1):
            work = total_cost([(costs[f], min(views, most[f])) for f in candidate.folders])
            points.append(
                Point(
                    candidate.name,
                    len(candidate.folders),
                    views,
                    *work,
                    sum(sizes[folder] for folder in candidate.folders),
                    mean_scores([tiles]),
                    score(tiles) - score(reference),
                    error_of_difference(tiles, reference),
                    False,
                )
            )
    return [point._replace(on_front=is_on_front(point, points)) for point in points]


def total_cost(costs: Sequence[tuple[Cost, int]]) -> Cost:
    """Return what one network of each run takes, each in so many views."""
    gmac = sum(views * cost.gmac for cost, views in costs)
    return Cost(gmac, sum(views * cost.seconds for cost, views in costs))


def count_candidates(
    candidates: Sequence[Candidate],
    runs: Mapping[Path, Run],
    store: TileStore,
    most: Mapping[Path, int],
    jobs: int,
) -> list[list[list[TileCounts]]]:
    """Return the counts of all tiles, [model][number of views - 1][tile].

    `most` is in how many views the networks of a run can be asked.
    """
    labels = store.labels

    def count(tile: str) -> list[list[TileCounts]]:
        found = []
        for candidate in candidates:
            own = [runs[folder] for folder in candidate.folders]
            limits = [most[folder] for folder in candidate.folders]
            means = [means_of_all(run, limit, tile) for run, limit in zip(own, limits)]
            fold, codes = own[0].fold_of[tile], store.mask(tile)
            prediction = Prediction(tile, fold, labels[tile], codes, tuple(means))
            mixes = [
                Mix(candidate.weights, tuple(min(views, limit) for limit in limits))
                for views in range(1, max(limits) + 1)
            ]
            found.append([count_mix(prediction, normalised(mix)) for mix in mixes])
        return found

    by_tile = Parallel(n_jobs=jobs, prefer="threads")(delayed(count)(tile) for tile in store.tile_ids)
    return [
        [list(tiles) for tiles in zip(*(counts[model] for counts in by_tile))]
        for model in range(len(candidates))
    ]


def means_of_all(run: Run, views: int, tile: str) -> np.ndarray:
    """Return the mean of a tile's first view, of the first two, ..., (views, 4, H, W) float16."""
    passes = load_passes(run.folder, tile)[list(VIEW_ORDER[:views])]
    if views > len(passes):
        passes = np.concatenate([passes, np.load(run.folder / DIAGONALS_FOLDER / f"{tile}.npy")])
    return means_of_first(passes)


def best_within(points: Sequence[Point], gmac: float, size: float) -> Point | None:
    """Return the point that scores best within so much work and so many bytes, None where none is."""
    inside = [point for point in points if point.gmac <= gmac and point.size <= size]
    return max(inside, key=lambda point: point.scores.objective) if inside else None


# --- The report ---------------------------------------------------------------------------------------------

INTRODUCTION = """\
- **Score**: the mean of the binary MCC on all tiles and the four-class MCC on those with phase-2 labels; out
  of fold, valid pixels, before class bias, CRF and cleaning.
- **Networks**: one of each run, the one that never saw the tile. Those of a run that did see it cannot be
  averaged with it out of fold.
- **Difference**: of the score, to {reference} in all views, ± its standard error over tiles (jackknife).
- **Work**: 10^9 multiply-adds (GMAC) a tile of 512 x 512 px, counted; of trees, what takes as long. The
  seconds are those of this machine beside whatever else it did. *Time*: the seconds as a share of those of
  {reference} in all views.
- **MB**: of the networks that are counted here, in float16. A model.pth may hold all folds of a run.
- **Front**: nothing else here scores as much for less work. Views are taken in the order {views},
  and mirrored along each diagonal; the latter two are measured only, model.pth has at most six."""


def write_points(path: Path, points: Sequence[Point], candidates: Sequence[Candidate]) -> None:
    """Write the points and what the models are as JSON."""
    content = {
        "models": {
            candidate.name: dict(zip(map(str, candidate.folders), candidate.weights))
            for candidate in candidates
        },
        "points": [{**point._asdict(), "scores": point.scores._asdict()} for point in points],
    }
    write_json(path, content)


def write_report(path: Path, points: Sequence[Point], candidates: Sequence[Candidate], command: str) -> None:
    """Write the table as Markdown, and score against work as `<stem>.png` beside it."""
    picture = save_figure(draw_points(points), path.with_suffix(".png"))
    sections = [
        "# Score against work of different models",
        f"```sh\n{command}\n```",
        INTRODUCTION.format(
            reference=candidates[0].name, views=", ".join(VIEWS[view].name for view in VIEW_ORDER)
        ),
        describe_candidates(candidates),
        f"![Out-of-fold score against work]({picture.name})",
        point_table(points),
        describe_best(points),
    ]
    write_text(path, "\n\n".join(sections) + "\n")


def describe_candidates(candidates: Sequence[Candidate]) -> str:
    """Return what each model is, one a line."""
    lines = []
    for candidate in candidates:
        equal = len(set(candidate.weights)) == 1
        parts = [
            f"`{folder}`" + ("" if equal else f" ({weight:.2f})")
            for folder, weight in zip(candidate.folders, candidate.weights)
        ]
        lines.append(f"- {candidate.name}: {' + '.join(parts)}")
    return "\n".join(lines)


def describe_best(points: Sequence[Point]) -> str:
    """Return which point is best under the limits of platform and repository."""
    best = best_within(points, KNOWN_GMAC, SHIPPABLE_SIZE)
    limits = f"{KNOWN_GMAC} GMAC a tile and {SHIPPABLE_SIZE / 1e6:.0f} MB"
    if best is None:
        return f"Nothing here stays under {limits}."
    return (
        f"The best under {limits}: {best.model} in {plural(best.views, 'view')}, "
        f"{best.scores.objective:.4f} for {best.gmac:.1f} GMAC."
    )


def point_table(points: Sequence[Point]) -> str:
    """Return a row for each model and number of views."""
    head = ["model", "networks", "views", "GMAC a tile", "s a tile", "time", "MB", "score", "difference"]
    head += ["binary", "four classes", "front"]
    whole = [point for point in points if point.model == points[0].model][-1]
    rows = [
        [
            point.model,
            str(point.networks),
            str(point.views),
            f"{point.gmac:.1f}",
            f"{point.seconds:.2f}",
            f"{point.seconds / whole.seconds:.3f}",
            f"{point.size / 1e6:.1f}",
            mcc_text(point.scores.objective),
            f"{point.difference:+.4f} ± {point.error:.4f}",
            *map(mcc_text, point.scores[1:]),
            "yes" if point.on_front else "",
        ]
        for point in points
    ]
    return markdown_table(head, rows)


def draw_points(points: Sequence[Point]) -> Figure:
    """Draw the score against work, a line for each model; points are numbered by views."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(point.model for point in points):
        line = [point for point in points if point.model == name]
        work = [max(point.gmac, 1e-2) for point in line]
        axis.plot(work, [point.scores.objective for point in line], "o-", label=name)
        for x, point in zip(work, line):
            number_point(axis, point.views, x, point.scores.objective)
    front = sorted((point for point in points if point.on_front), key=lambda point: point.gmac)
    axis.step(
        [max(point.gmac, 1e-2) for point in front],
        [point.scores.objective for point in front],
        where="post",
        color="grey",
        linewidth=6,
        alpha=0.3,
        label="front",
    )
    finish_plot(figure, axis, columns=3)
    return figure
