"""Ensembles whose members differ in kind: weights of runs, and the passes that fit a budget.

Every run has one network that never saw a tile, so a weighted mean of the runs' out-of-fold passes is an
honest prediction of one network of each run. Weights belong to runs: the networks of a run are exchangeable,
since no two of them can be compared on the same tile.

Runs are chosen and weighed by ensemble selection with replacement (Caruana et al. 2004,
doi 10.1145/1015330.1015432): the run that gains most is added again and again, and its weight is how often it
was. Then passes are ordered by what a further view of a run, or a further run, gains for its work. `nested`
scores do all of that for each fold on the other folds, so that no choice flatters them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import numpy as np
from joblib import Parallel, delayed

from prep.files import write_array, write_json
from prep.store import TileStore
from prep.text import NONE, markdown_table, mcc_text
from solution import VIEWS, decide_classes
from train.calibrate import Run, score
from train.data import ALL_TILES
from train.fit import RunError
from train.objective import TileCounts, count_tile, jackknife_error, score_tiles
from train.pack import (
    Order,
    assemble,
    read_calibration,
    require_shippable,
    to_half,
    write_model,
)
from train.pareto import open_runs
from train.predict import load_passes, read_folds, usable_views
from train.run import OOF_FOLDER, RUN_FILE
from train.submit.limits import KNOWN_GMAC, MAX_BYTES
from train.work import count_gmac

# The order that `reports/pareto.md` found for earlier networks: fixed, so that it need not be nested.
VIEW_ORDER = (0, 4, 3, 5, 2, 1)
ADDITIONS = 12  # of a run to the ensemble, so weights are multiples of 1/12 or of a simpler fraction
STRIDE_OF_CHOICE = 2  # choices are made on every second pixel of every second row, scores are of all
FIRST_PASS_SHARE = 0.1  # of the budget: the first pass of all tiles has to be made in any case


class Mix(NamedTuple):
    """The weight of each run, and how many views of it are averaged (0: it is left out)."""

    weights: tuple[float, ...]
    views: tuple[int, ...]


class Kind(NamedTuple):
    """What shipping a run takes: 10^9 multiply-adds of a pass, bytes of a network, and its folds in the order
    in which they are taken."""

    gmac: float
    size: int
    folds: tuple[int, ...]
    views: int = len(VIEWS)


class Budget(NamedTuple):
    """The most that a model may take: bytes, 10^9 multiply-adds for a tile of 512 x 512 px, and networks of
    each run (None: all its folds)."""

    size: float = MAX_BYTES
    gmac: float = KNOWN_GMAC
    networks: int | None = None


class MixedPass(NamedTuple):
    """One pass: the number of a run, the fold of its network, and the view."""

    run: int
    fold: int
    view: int


class Plan(NamedTuple):
    """What is shipped: passes, the most useful first, and the mix of one network of each run."""

    mix: Mix
    passes: tuple[MixedPass, ...]
    gmac: float
    size: int


class Prediction(NamedTuple):
    """A tile's label codes (h, w) and, for each run, means of its first views, (views, 4, h, w) float16."""

    tile_id: str
    fold: int
    labels: str
    codes: np.ndarray
    means: tuple[np.ndarray, ...]


class Fitted(NamedTuple):
    """The plan, and objectives over all tiles.

    `singles`: of each run in all views. `flattered`: of the plan, which was chosen for it. `nested`: with
    everything chosen on the other folds. `gain`: that less the best of `singles`, `error` its standard error.
    """

    runs: tuple[str, ...]
    plan: Plan
    singles: tuple[float, ...]
    flattered: float
    nested: float
    nested_binary: float
    nested_four_class: float | None
    gain: float
    error: float
    by_fold: dict[int, Mix]


# --- Scores of mixes ----------------------------------------------------------------------------------------


def load_prediction(
    runs: Sequence[Run], store: TileStore, labels: Mapping[str, str], tile: str, stride: int
) -> Prediction:
    """Return means over the first views of a tile, in VIEW_ORDER, on every `stride`-th row and column."""
    means = tuple(
        means_of_first(load_passes(run.folder, tile)[list(VIEW_ORDER), :, ::stride, ::stride]) for run in runs
    )
    codes = store.mask(tile)[::stride, ::stride]
    return Prediction(tile, runs[0].fold_of[tile], labels[tile], codes, means)


def means_of_first(passes: np.ndarray) -> np.ndarray:
    """Return the mean of the first of (views, 4, H, W), of the first two, ..., in this shape, float16."""
    sums = np.cumsum(passes, axis=0, dtype=np.float32)
    return (sums / np.arange(1, len(passes) + 1).reshape(-1, 1, 1, 1)).astype(np.float16)


def load_predictions(runs: Sequence[Run], store: TileStore, stride: int, jobs: int) -> list[Prediction]:
    """Return `load_prediction` of all tiles."""
    labels = store.labels
    load = partial(load_prediction, runs, store, labels, stride=stride)
    return Parallel(n_jobs=jobs, prefer="threads")(delayed(load)(tile) for tile in store.tile_ids)


def mean_of_runs(prediction: Prediction, mix: Mix) -> np.ndarray:
    """Return the probabilities (4, h, w) float32 of a tile under a mix."""
    parts = [
        weight * means[views - 1].astype(np.float32)
        for weight, views, means in zip(mix.weights, mix.views, prediction.means)
        if weight and views
    ]
    return np.sum(parts, axis=0)


def count_mix(prediction: Prediction, mix: Mix) -> TileCounts:
    """Return the counts of a tile under a mix."""
    classes = decide_classes(mean_of_runs(prediction, mix))
    return count_tile(prediction.tile_id, prediction.fold, prediction.labels, prediction.codes, classes)


class Scorer:
    """Scores mixes on some tiles, each mix once."""

    def __init__(self, predictions: Sequence[Prediction], jobs: int) -> None:
        """Score on these tiles, so many at a time."""
        self.predictions = list(predictions)
        self.jobs = jobs
        self._counts: dict[Mix, list[TileCounts]] = {}

    def counts(self, mix: Mix) -> list[TileCounts]:
        """Return the counts of all tiles."""
        mix = normalised(mix)
        if mix not in self._counts:
            work = (delayed(count_mix)(prediction, mix) for prediction in self.predictions)
            self._counts[mix] = list(Parallel(n_jobs=self.jobs, prefer="threads")(work))
        return self._counts[mix]

    def score(self, mix: Mix, without: int | None = None) -> float:
        """Return the objective, over the tiles of all folds but one."""
        return score([tile for tile in self.counts(mix) if tile.fold != without])


def normalised(mix: Mix) -> Mix:
    """Return the same mix with weights of sum 1, rounded, and 0 where there is no view."""
    weights = [weight if views else 0.0 for weight, views in zip(mix.weights, mix.views)]
    total = sum(weights) or 1.0
    shares = tuple(round(weight / total, 6) for weight in weights)
    return Mix(shares, tuple(views if share else 0 for share, views in zip(shares, mix.views)))


# --- Choosing -----------------------------------------------------------------------------------------------


def choose(scorer: Scorer, kinds: Sequence[Kind], budget: Budget, without: int | None = None) -> Plan:
    """Return the plan that scores best on the tiles of all folds but `without`, under the budget.

    Raises:
        RunError: not even one pass of one network fits.
    """
    weights = weigh(scorer, kinds, budget, without)
    order = order_units(scorer, kinds, budget, weights, without)
    passes = spend(order, kinds, budget)
    views = tuple(len({one.view for one in passes if one.run == number}) for number in range(len(kinds)))
    members = {(one.run, one.fold) for one in passes}
    return Plan(
        normalised(Mix(weights, views)),
        passes,
        sum(kinds[one.run].gmac for one in passes),
        sum(kinds[run].size for run, _ in members),
    )


def fits(chosen: Sequence[float], kinds: Sequence[Kind], budget: Budget) -> bool:
    """Return whether one network in one view of each run with a weight is within the budget."""
    used = [kind for kind, weight in zip(kinds, chosen) if weight]
    return sum(kind.gmac for kind in used) <= budget.gmac and sum(kind.size for kind in used) <= budget.size


def weigh(
    scorer: Scorer, kinds: Sequence[Kind], budget: Budget, without: int | None = None
) -> tuple[float, ...]:
    """Return the weights of the runs, of sum 1: those after the addition with the best score."""
    everything = tuple(kind.views for kind in kinds)
    picks = [0] * len(kinds)
    best: tuple[float, tuple[float, ...]] = (-np.inf, ())
    for _ in range(ADDITIONS):
        options = [
            tuple(pick + (number == added) for number, pick in enumerate(picks))
            for added in range(len(kinds))
        ]
        options = [option for option in options if fits(option, kinds, budget)]
        if not options:
            smallest = min(kinds, key=lambda kind: kind.gmac)
            raise RunError(
                f"budget of {budget.size / 1e6:.1f} MB and {budget.gmac:g} GMAC: found networks from "
                f"{min(kind.size for kind in kinds) / 1e6:.1f} MB and {smallest.gmac:.1f} GMAC a pass, "
                "expected one that fits; allow more with --max-mb and --max-gmac"
            )
        found = [scorer.score(Mix(option, everything), without) for option in options]
        picks = list(options[int(np.argmax(found))])
        if max(found) > best[0]:
            best = max(found), tuple(pick / sum(picks) for pick in picks)
    return best[1]


def order_units(
    scorer: Scorer,
    kinds: Sequence[Kind],
    budget: Budget,
    weights: Sequence[float],
    without: int | None = None,
) -> list[tuple[int, int]]:
    """Return pairs (run, view) of the weighed runs: always what gains most for its work comes next.

    The first is the best single view among the runs that take FIRST_PASS_SHARE of the budget or less, if any
    does.
    """
    used = [number for number, weight in enumerate(weights) if weight]
    views = [0] * len(kinds)
    order: list[tuple[int, int]] = []
    cheap = [number for number in used if kinds[number].gmac <= FIRST_PASS_SHARE * budget.gmac]
    firsts = cheap or [min(used, key=lambda number: kinds[number].gmac)]
    current = 0.0
    while any(views[number] < kinds[number].views for number in used):
        options = [n for n in (used if order else firsts) if views[n] < kinds[n].views]
        found = {
            number: scorer.score(Mix(tuple(weights), _more(views, number)), without) for number in options
        }

        def worth(number: int, found: Mapping[int, float] = found, before: float = current) -> float:
            gain = found[number] - before
            # what loses comes last, the least loss first, however little it takes
            return gain / max(kinds[number].gmac, 1e-3) if gain > 0 and order else gain

        added = max(options, key=worth)
        views, current = list(_more(views, added)), found[added]
        order.append((added, VIEW_ORDER[views[added] - 1]))
    return order


def _more(views: Sequence[int], added: int) -> tuple[int, ...]:
    return tuple(count + (number == added) for number, count in enumerate(views))


def spend(order: Sequence[tuple[int, int]], kinds: Sequence[Kind], budget: Budget) -> tuple[MixedPass, ...]:
    """Return the passes that fit, in `order`, each for all folds of the run; what does not fit is left out.

    The first network of every run keeps its place, so that none is crowded out by others' further passes.
    """
    waiting = {run for run, _ in order}
    passes: list[MixedPass] = []
    members: set[tuple[int, int]] = set()
    gmac, size = 0.0, 0
    for run, view in order:
        for fold in kinds[run].folds:
            new = 0 if (run, fold) in members else kinds[run].size
            reserved = [kinds[other] for other in waiting - {run}]
            if (
                gmac + kinds[run].gmac + sum(kind.gmac for kind in reserved) <= budget.gmac
                and size + new + sum(kind.size for kind in reserved) <= budget.size
            ):
                passes.append(MixedPass(run, fold, view))
                members.add((run, fold))
                gmac, size = gmac + kinds[run].gmac, size + new
                waiting.discard(run)
    return tuple(passes)


def fit_mixture(
    runs: Sequence[Run], kinds: Sequence[Kind], store: TileStore, budget: Budget, jobs: int
) -> Fitted:
    """Return the plan under the budget and what it is worth, with nested choices, beside the best run.

    Raises:
        RunError: a tile is not predicted yet, or nothing fits the budget.
    """
    chooser = Scorer(load_predictions(runs, store, STRIDE_OF_CHOICE, jobs), jobs)
    plan = choose(chooser, kinds, budget)
    folds = sorted({prediction.fold for prediction in chooser.predictions})
    by_fold = (
        {fold: choose(chooser, kinds, budget, without=fold).mix for fold in folds} if len(folds) > 1 else {}
    )
    everything = [
        Mix(tuple(float(other == number) for other in range(len(runs))), (len(VIEWS),) * len(runs))
        for number in range(len(runs))
    ]
    singles, whole, nested = score_on_all_pixels(
        runs, store, [normalised(mix) for mix in everything], plan.mix, by_fold, jobs
    )
    best = int(np.argmax([score(tiles) for tiles in singles]))
    scores = score_tiles(nested)["valid_pixels"]
    return Fitted(
        tuple(run.name for run in runs),
        plan,
        tuple(score(tiles) for tiles in singles),
        score(whole),
        score(nested),
        scores["binary"]["mcc"],
        scores["four_class"]["mcc"] if scores["four_class"] else None,
        score(nested) - score(singles[best]),
        error_of_difference(nested, singles[best]),
        by_fold,
    )


def score_on_all_pixels(
    runs: Sequence[Run],
    store: TileStore,
    singles: Sequence[Mix],
    plan: Mix,
    by_fold: Mapping[int, Mix],
    jobs: int,
) -> tuple[list[list[TileCounts]], list[TileCounts], list[TileCounts]]:
    """Return the counts of all tiles under each of `singles`, under `plan`, and under their fold's mix."""
    labels = store.labels

    def count(tile: str) -> list[TileCounts]:
        prediction = load_prediction(runs, store, labels, tile, stride=1)
        mixes = [*singles, plan, by_fold.get(prediction.fold, plan)]
        return [count_mix(prediction, mix) for mix in mixes]

    by_tile = Parallel(n_jobs=jobs, prefer="threads")(delayed(count)(tile) for tile in store.tile_ids)
    by_mix = [list(counts) for counts in zip(*by_tile)]
    return by_mix[:-2], by_mix[-2], by_mix[-1]


def error_of_difference(tiles: Sequence[TileCounts], others: Sequence[TileCounts]) -> float:
    """Return the standard error of the difference of two objectives, by leaving out each tile (jackknife).

    NaN for a single tile.
    """
    return jackknife_error(
        [
            score([*tiles[:out], *tiles[out + 1 :]]) - score([*others[:out], *others[out + 1 :]])
            for out in range(len(tiles) if len(tiles) > 1 else 0)
        ]
    )


def write_out_of_fold(
    fitted: Fitted, run_dirs: Sequence[Path], store: TileStore, scheme: str, folder: Path
) -> None:
    """Write what the mixture says of every tile, with the mix that was chosen on the other folds, as a run.

    Args:
        fitted: what `fit_mixture` returned for the runs.
        run_dirs: the runs.
        store: the tiles.
        scheme: of the runs' folds.
        folder: of the run that is made: `oof/` and `run.json`, for `report` and `evaluate`.
    """
    (folder / OOF_FOLDER).mkdir(parents=True, exist_ok=True)
    labels = store.labels
    runs = open_runs(run_dirs, store)
    for tile in store.tile_ids:
        prediction = load_prediction(runs, store, labels, tile, stride=1)
        mix = fitted.by_fold.get(prediction.fold, fitted.plan.mix)
        write_array(folder / OOF_FOLDER / f"{tile}.npy", mean_of_runs(prediction, mix).astype(np.float16))
    about = {"model": "mixture", "scheme": scheme, "runs": list(fitted.runs)}
    write_json(folder / RUN_FILE, about)


# --- Packing ------------------------------------------------------------------------------------------------


def stored_size(record: Mapping) -> int:
    """Return the bytes of a network as it is packed."""
    return sum(tensor.numel() * tensor.element_size() for tensor in to_half(record["state_dict"]).values())


def kind_of(records: Sequence[Mapping], most: int | None = None) -> Kind:
    """Return what shipping a run takes; folds come in the order of their held-out scores, `most` at most.

    A network of all tiles is shipped in the place of the folds, which tell what it is worth; where `most`
    asks for more than it, folds follow.
    """
    whole = [record for record in records if record["fold"] == ALL_TILES]
    scored = [record for record in records if record["fold"] != ALL_TILES]
    best_first = sorted(scored, key=lambda record: -record["val_mcc"])
    by_score = whole if whole and most is None else [*whole, *best_first]
    size = max(stored_size(record) for record in records)
    folds = tuple(record["fold"] for record in by_score)[:most]
    return Kind(count_gmac(records[0]["arch"]), size, folds, min(map(usable_views, records)))


def pack_mixture(
    run_dirs: Sequence[Path],
    store: TileStore,
    calibration: Path | None,
    out: Path,
    budget: Budget,
    jobs: int,
) -> Fitted:
    """Write `out` from the networks of several runs, its card and `<stem>_mixture.json`; return what was fit.

    Args:
        run_dirs: evaluated runs of any architectures, inputs and normalisations.
        store: the tiles of all of them.
        calibration: file of `calibrate` for class bias and the steps after the passes; views are chosen here.
        out: the model file.
        budget: what it may take.
        jobs: tiles to work on at a time.

    Raises:
        RunError: a run is not finished or evaluated, nothing fits the budget, or a network cannot be shipped.
    """
    runs = open_runs(run_dirs, store)
    records = [read_folds(run.folder) for run in runs]
    for of_run in records:
        require_shippable(of_run)
    settings = read_calibration(calibration)
    fitted = fit_mixture(runs, [kind_of(of_run, budget.networks) for of_run in records], store, budget, jobs)
    content = assemble_mixture(fitted, records, settings)
    write_model(out, content, None, [format_mixture(fitted, budget)])
    write_mixture(out.with_name(f"{out.stem}_mixture.json"), fitted, run_dirs, budget)
    return fitted


def assemble_mixture(fitted: Fitted, records: Sequence[Sequence[Mapping]], settings: Mapping) -> dict:
    """Return the content of model.pth. A member's weight is its run's, shared among the run's networks."""
    passes, weights = fitted.plan.passes, fitted.plan.mix.weights
    members = list(dict.fromkeys((one.run, one.fold) for one in passes))
    by_fold = [{record["fold"]: record for record in of_run} for of_run in records]
    order = Order(
        [[members.index((one.run, one.fold)), one.view] for one in passes],
        list(dict.fromkeys(fitted.runs)),
    )
    content = assemble([by_fold[run][fold] for run, fold in members], settings, order)
    for (run, _), member in zip(members, content["members"]):
        member["weight"] = weights[run] / sum(other == run for other, _ in members)
        member["run"] = fitted.runs[run]
    return content


def mixture_table(fitted: Fitted) -> str:
    """Return a row for each run: its score alone, its weight, and the passes that it has in the plan."""
    plan, rows = fitted.plan, []
    for number, name in enumerate(fitted.runs):
        mine = [one for one in plan.passes if one.run == number]
        chosen = [mix.weights[number] for mix in fitted.by_fold.values()]
        rows.append(
            [
                name,
                mcc_text(fitted.singles[number]),
                f"{plan.mix.weights[number]:.3f}",
                f"{min(chosen):.2f} to {max(chosen):.2f}" if chosen else NONE,
                str(len({one.fold for one in mine})),
                str(plan.mix.views[number]),
                str(len(mine)),
            ]
        )
    head = ["run", "score alone", "weight", "on other folds", "networks", "views", "passes"]
    return markdown_table(head, rows)


def format_mixture(fitted: Fitted, budget: Budget) -> str:
    """Return the section of the card on how runs were mixed, and what that is worth."""
    plan = fitted.plan
    return f"""## The mixture

{mixture_table(fitted)}

- *Score*: the mean of binary and four-class MCC, out of fold, valid pixels, before the steps below;
  *alone* in all views. *On other folds* is the range of weights that leaving out each fold gives.
- Weights and views of each fold chosen on the other folds: {fitted.nested:.4f} (binary
  {fitted.nested_binary:.4f}, four classes {mcc_text(fitted.nested_four_class)}); chosen on the same tiles,
  which flatters: {fitted.flattered:.4f}
- Gain over the best run alone: {fitted.gain:+.4f} ± {fitted.error:.4f} (standard error over tiles; the best
  run is chosen on the same tiles, the mixture is not)
- Measured is one network of each run. What the others of a run add cannot be: each has seen the others' tiles
- Work: {plan.gmac:.1f} GMAC a tile of 512 x 512 px, of {budget.gmac:g} allowed; weights:
  {plan.size / 1e6:.1f} MB of {budget.size / 1e6:.0f}"""


def write_mixture(path: Path, fitted: Fitted, run_dirs: Sequence[Path], budget: Budget) -> None:
    """Write what was fit, for `pareto` and for people."""
    content = {
        "runs": list(fitted.runs),
        "folders": [str(folder) for folder in run_dirs],
        "weights": list(fitted.plan.mix.weights),
        "views": list(fitted.plan.mix.views),
        "passes": [list(one) for one in fitted.plan.passes],
        "gmac": fitted.plan.gmac,
        "bytes": fitted.plan.size,
        "budget": budget._asdict(),
        "singles": list(fitted.singles),
        "nested": fitted.nested,
        "gain": fitted.gain,
        "error": fitted.error,
        "flattered": fitted.flattered,
        "by_fold": {str(fold): mix._asdict() for fold, mix in fitted.by_fold.items()},
    }
    write_json(path, content)
