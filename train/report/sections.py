"""The sections of the page, in the order of its reader's questions."""

from __future__ import annotations

import re
from typing import Mapping, NamedTuple, Sequence

import numpy as np

from prep.labels import CODE_NAMES, IGNORE
from prep.text import NONE, number_text, plural
from train.masks.pictures import CODE_COLOURS, OUTCOME_COLOURS, OUTCOME_NAMES, Outcome
from train.objective import BINARY_NAMES, binary
from train.report.charts import (
    COLOURS,
    Dot,
    Mark,
    Series,
    dot_rows,
    legend,
    line_chart,
    reliability_diagram,
)
from train.report.evidence import Panels, RunEvidence
from train.report.markup import Html, details, paragraph, section, table, tag

FIRST_RECIPE = "fold0/config.yaml"
PLACES = [(pixels, task) for pixels in ("valid_pixels", "all_pixels") for task in ("binary", "four_class")]


class Comparison(NamedTuple):
    """A run against a baseline on the same folds: difference in binary MCC, and where the run is better."""

    baseline: str
    gain: float
    folds: tuple[int, int]  # better on, of
    tiles: tuple[int, int]


# --- Scores -------------------------------------------------------------------------------------------------


def scores_section(runs: Sequence[RunEvidence], commands: Sequence[str]) -> Html:
    """Return the headline scores against the baselines, and how each run is made again."""
    shown = [run for run in runs if not run.is_baseline] or runs
    head = ["run", "folds", "glacier of either kind", "four classes"]
    head += ["either kind, all pixels", "four classes, all pixels", "IoU of glacier", "against"]
    rows = [_score_row(run, runs) for run in runs]
    return section(
        "scores",
        "Scores",
        tag("div", *[_card(run, runs) for run in shown], class_="cards"),
        table("Out-of-fold Matthews correlation, pixels of all tiles pooled", head, rows, class_="scores"),
        paragraph(
            "1 is perfect, 0 is chance. Valid pixels only; ",
            tag("em", "all pixels"),
            " counts nodata as background, predicted as background: hold that one against a leaderboard. "
            "Four classes are scored on tiles with phase-2 labels, which alone tell debris from ice. "
            "Six views are averaged; class bias, CRF and cleaning come later.",
        ),
        details("The commands that made these", tag("pre", "\n".join([*commands, *_commands(runs)]))),
        *[_recipe(run) for run in runs if run.recipe],
    )


def _card(run: RunEvidence, runs: Sequence[RunEvidence]) -> Html:
    pooled = run.scores["pooled"]["valid_pixels"]
    lines = [tag("p", _verdict(comparison)) for comparison in compare(run, runs)]
    if pooled["four_class"]:
        lines.append(tag("p", f"{_number(pooled['four_class']['mcc'])} in four classes"))
    title = tag("h3", f"{run.name}, {run.scores['scheme']} folds")
    return tag("div", title, tag("p", _number(pooled["binary"]["mcc"]), class_="big"), *lines, class_="card")


def _verdict(comparison: Comparison) -> str:
    folds, tiles = (f"{better} of {whole}" for better, whole in (comparison.folds, comparison.tiles))
    return f"{_signed(comparison.gain)} against {comparison.baseline}: better on {folds} folds, {tiles} tiles"


def compare(run: RunEvidence, runs: Sequence[RunEvidence]) -> list[Comparison]:
    """Return how a run compares with each baseline that was scored on the same folds."""
    if run.is_baseline:
        return []
    fold_of = {tile: entry["fold"] for tile, entry in run.scores["tiles"].items()}
    same = [
        other
        for other in runs
        if other.is_baseline and {t: e["fold"] for t, e in other.scores["tiles"].items()} == fold_of
    ]
    return [
        Comparison(
            other.name,
            _mcc(run.scores["pooled"]) - _mcc(other.scores["pooled"]),
            _count_better(run.scores["folds"], other.scores["folds"]),
            _count_better(run.scores["tiles"], other.scores["tiles"]),
        )
        for other in same
    ]


def _count_better(ours: Mapping[str, dict], theirs: Mapping[str, dict]) -> tuple[int, int]:
    return sum(_mcc(ours[key]) > _mcc(theirs[key]) for key in ours), len(ours)


def _score_row(run: RunEvidence, runs: Sequence[RunEvidence]) -> list[str]:
    pooled = run.scores["pooled"]
    cells = [
        _number(pooled[pixels][task]["mcc"]) if pooled[pixels][task] else NONE for pixels, task in PLACES
    ]
    iou = pooled["valid_pixels"]["binary"]["iou"][BINARY_NAMES[1]]
    against = ", ".join(f"{_signed(other.gain)} {other.baseline}" for other in compare(run, runs))
    return [run.name, run.scores["scheme"], *cells, _number(iou), against or NONE]


def _commands(runs: Sequence[RunEvidence]) -> list[str]:
    """Return what makes each run again, from the settings that lie in its folder."""
    lines = []
    for run in runs:
        if run.config:
            lines.append(f"python -m train fit --config {run.folder}/{FIRST_RECIPE} --run {run.folder}")
            lines.append(f"python -m train evaluate --run {run.folder} --store {run.config.data.store}")
        else:
            options = " ".join(
                f"--{key} {run.settings[key]}" for key in ("scheme", "seed") if key in run.settings
            )
            lines.append(f"python -m train baseline {options} --run {run.folder}")
    return lines


def _recipe(run: RunEvidence) -> Html:
    return details(f"Recipe of {run.name}: every setting", tag("pre", run.recipe))


# --- Folds and tiles ----------------------------------------------------------------------------------------


def folds_section(runs: Sequence[RunEvidence]) -> Html:
    """Return the binary MCC of each fold and of each tile, as tables and as rows of dots."""
    numbers = sorted({fold for run in runs for fold in run.scores["folds"]}, key=int)
    rows = [
        (
            run.name,
            None,
            [
                Dot(_mcc(scores), index, f"{run.name}, fold {fold}: {_mcc(scores):.3f}")
                for fold, scores in run.scores["folds"].items()
            ],
        )
        for index, run in enumerate(runs)
    ]
    table_rows = [_fold_row(run, numbers) for run in runs]
    return section(
        "folds",
        "Folds and tiles",
        dot_rows(
            "Binary MCC of each fold, a row of dots for each run",
            rows,
            "MCC of a fold, glacier of either kind",
        ),
        table(
            "Glacier of either kind by fold; mean and sample standard deviation of the folds",
            ["run", *[f"fold {number}" for number in numbers], "mean ± std"],
            table_rows,
        ),
        tag("h3", "Each tile"),
        paragraph("Sorted by the first run; a name leads to the tile's pictures."),
        legend([(run.name, index) for index, run in enumerate(runs)], class_="dot-key"),
        dot_rows(
            "Binary MCC of each tile, one dot for each run",
            _tile_rows(runs),
            "MCC of a tile, glacier of either kind",
        ),
    )


def _fold_row(run: RunEvidence, numbers: Sequence[str]) -> list[str]:
    folds, mean = run.scores["folds"], run.scores["fold_mean"]["valid_pixels"]["binary"]
    cells = [_number(_mcc(folds[number])) if number in folds else "" for number in numbers]
    return [run.name, *cells, f"{_number(mean['mean'])} ± {_number(mean['std'])}"]


def _tile_rows(runs: Sequence[RunEvidence]) -> list[tuple[str, str | None, list[Dot]]]:
    rows: list[tuple[str, str | None, list[Dot]]] = []
    for tile_id in worst_first(runs[0]):
        dots = []
        for index, run in enumerate(runs):
            value = _mcc(run.scores["tiles"][tile_id])
            dots.append(Dot(value, index, f"{run.name}, tile {tile_id}: {value:.3f}"))
        rows.append((tile_id, tile_anchor(tile_id), dots))
    return rows


def worst_first(run: RunEvidence) -> list[str]:
    """Return the ids of all tiles in the order of their binary MCC."""
    tiles = run.scores["tiles"]
    return sorted(tiles, key=lambda tile_id: _mcc(tiles[tile_id]))


def tile_anchor(tile_id: str) -> str:
    """Return the id of a tile's pictures on the page, in which there is no white space."""
    return "tile-" + re.sub(r"\s", "_", tile_id)


# --- Confusion ----------------------------------------------------------------------------------------------


def confusion_section(runs: Sequence[RunEvidence]) -> Html:
    """Return two confusion matrices for each run, coloured by the share of the label's pixels."""
    parts = []
    for run in runs:
        counts = np.array(run.scores["confusion"])
        present = counts.sum(axis=1) > 0
        codes = [name for name, keep in zip(run.scores["codes"], present) if keep]
        both = [
            _confusion_table(
                f"{run.name}: glacier of either kind", BINARY_NAMES, BINARY_NAMES, binary(counts)
            ),
            _confusion_table(f"{run.name}: every label", codes, run.scores["classes"], counts[present]),
        ]
        parts.append(tag("div", *both, class_="pair"))
    return section(
        "confusion",
        "Confusion",
        paragraph("Pixels of all tiles. Rows are labels, columns predictions, shares are those of the row."),
        *parts,
    )


def _confusion_table(caption: str, rows: Sequence[str], columns: Sequence[str], counts: np.ndarray) -> Html:
    totals = np.maximum(1, counts.sum(axis=1))
    lines = [
        [_spaced(name), *[_heat_cell(count, count / total) for count in line]]
        for name, line, total in zip(rows, counts, totals)
    ]
    return table(caption, ["label", *map(_spaced, columns)], lines, class_="confusion")


def _heat_cell(count: int, share: float) -> Html:
    content = (tag("b", _percent(share)), tag("small", f"{count:,}"))
    return tag("td", *content, style=f"--share:{share:.3f}")


# --- Reliability --------------------------------------------------------------------------------------------


def reliability_section(runs: Sequence[RunEvidence]) -> Html:
    """Return a reliability diagram for each run."""
    parts = []
    for index, run in enumerate(runs):
        error, brier = run.reliability.expected_calibration_error, run.reliability.brier
        about = f"Reliability diagram of {run.name}: expected calibration error {error:.4f}"
        caption = tag(
            "figcaption",
            tag("b", run.name),
            f": expected calibration error {error:.4f}, Brier score {brier:.4f}",
        )
        diagram = reliability_diagram(about, run.reliability, index % COLOURS)
        parts.append(tag("figure", caption, diagram, details("Its numbers", _reliability_table(run))))
    return section(
        "reliability",
        "Can the probabilities be believed?",
        paragraph(
            "Out-of-fold probability of glacier of either kind, valid pixels of all tiles. On the dashed "
            "line a probability of 0.7 is right 70 % of the time; below it the model claims too much. The "
            "expected calibration error is the mean distance from that line, weighted by pixels."
        ),
        tag("div", *parts, class_="charts"),
    )


def _reliability_table(run: RunEvidence) -> Html:
    counts, bins = run.reliability, len(run.reliability.pixels)
    rows = [
        [f"{index / bins:.2f}–{(index + 1) / bins:.2f}", f"{pixels:,}", _number(said), _number(seen)]
        for index, (pixels, said, seen) in enumerate(
            zip(counts.pixels, counts.mean_probability, counts.frequency)
        )
    ]
    return table(
        f"Reliability of {run.name}", ["probability", "pixels", "mean probability", "share glacier"], rows
    )


# --- Learning curves ----------------------------------------------------------------------------------------


def learning_section(runs: Sequence[RunEvidence]) -> Html | None:
    """Return the learning curves of the runs that have any; None where none has."""
    parts = [_curves(run) for run in runs if run.histories]
    if not parts:
        return None
    return section(
        "learning",
        "Learning curves",
        paragraph(
            "One colour a fold; rings are the epochs that were kept. The validation tiles are those that the "
            "fold holds out. The learning rate is that at the end of an epoch, of the first group of "
            "parameters."
        ),
        *parts,
    )


def _curves(run: RunEvidence) -> Html:
    folds = run.histories
    losses = [line for history in folds for line in _loss_lines(history.fold, history.columns)]
    charts = [
        ("Loss: dashed training, solid validation", losses, "loss", []),
        ("Validation MCC, glacier of either kind", _lines(run, "val_mcc"), "MCC", _kept(run)),
        ("Learning rate", _lines(run, "lr"), "learning rate", []),
    ]
    figures = [
        tag(
            "figure",
            tag("figcaption", title),
            line_chart(
                f"{run.name}. {title}, by epoch",
                lines,
                "epoch",
                label,
                marks,
                from_zero=label == "learning rate",
            ),
        )
        for title, lines, label, marks in charts
    ]
    keys = legend([(f"fold {history.fold}", history.fold % COLOURS) for history in folds])
    return tag("div", tag("h3", run.name), keys, tag("div", *figures, class_="charts"), _history_table(run))


def _loss_lines(fold: int, columns: Mapping[str, Sequence[float]]) -> list[Series]:
    return [
        Series(
            f"fold {fold}, {name}", columns["epoch"], columns[column], fold % COLOURS, column == "train_loss"
        )
        for column, name in (("train_loss", "training"), ("val_loss", "validation"))
    ]


def _lines(run: RunEvidence, column: str) -> list[Series]:
    return [
        Series(
            f"fold {history.fold}", history.columns["epoch"], history.columns[column], history.fold % COLOURS
        )
        for history in run.histories
    ]


def _kept(run: RunEvidence) -> list[Mark]:
    marks = []
    for history in run.histories:
        mcc = history.columns["val_mcc"][history.columns["epoch"].index(history.kept)]
        meaning = f"fold {history.fold}: epoch {history.kept} was kept, MCC {mcc:.3f}"
        marks.append(Mark(history.kept, mcc, history.fold % COLOURS, meaning))
    return marks


def _history_table(run: RunEvidence) -> Html:
    rows = []
    for history in run.histories:
        columns = history.columns
        kept = columns["epoch"].index(history.kept)
        values = [_number(columns[name][kept]) for name in ("train_loss", "val_loss", "val_mcc")]
        rates = [f"{value:.2g}" for value in (max(columns["lr"]), columns["lr"][-1])]
        minutes = f"{sum(columns['seconds']) / 60:.1f}"
        epochs = f"{history.kept} of {len(columns['epoch'])}"
        rows.append([f"fold {history.fold}", epochs, *values, *rates, minutes])
    head = ["fold", "epoch kept", "training loss", "validation loss", "validation MCC"]
    head += ["highest learning rate", "last learning rate", "minutes"]
    return details("Its numbers, at the epoch kept", table(f"Training of {run.name}", head, rows))


# --- What follows the networks ------------------------------------------------------------------------------


def calibration_section(content: Mapping) -> Html:
    """Return what each step after the passes gains, from the JSON file of `calibrate`."""
    names = content["runs"]
    head = ["step", *[f"{name}: {when}" for name in names for when in ("without", "with")], "", "best option"]
    rows = []
    for step in content["steps"]:
        pairs = [f"{value:.4f}" for pair in zip(step["before"], step["after"]) for value in pair]
        kept = "kept" if step["kept"] else "left out"
        rows.append([step["step"], *pairs, kept, tag("td", step["choice"], class_="text")])
    settings = {key: value for key, value in content.items() if key not in ("runs", "steps")}
    return section(
        "calibration",
        "What follows the networks",
        paragraph(
            "Out-of-fold score, the mean of MCC for glacier of either kind and, where labels allow, in four "
            "classes. ",
            tag("em", "With"),
            " is nested: each fold uses the option that was best on the others. Steps build on those kept.",
        ),
        table("Steps after the passes", head, rows),
        details(
            "The settings that ship",
            tag("pre", "\n".join(f"{key}: {value}" for key, value in settings.items())),
        ),
    )


def passes_section(content: Mapping) -> Html:
    """Return what further passes are worth, from the JSON file of `pareto`."""
    cells = content["steps"]
    members = sorted({cell["members"] for cell in cells})
    lines = []
    for index, number in enumerate(members):
        of_number = sorted(
            (cell for cell in cells if cell["members"] == number), key=lambda cell: cell["passes"]
        )
        points = ([cell["passes"] for cell in of_number], [cell["objective"] for cell in of_number])
        lines.append(Series(plural(number, "network"), *points, index % COLOURS))
    rows = [
        [
            f"{cell['members']} × {cell['views']}",
            str(cell["passes"]),
            f"{cell['gmac']:.1f}",
            *[_number(cell[key]) for key in ("objective", "nested", "binary", "four_class")],
        ]
        for cell in cells
    ]
    return section(
        "passes",
        "What more work brings",
        paragraph(
            "Score against forward passes a tile, runs ",
            ", ".join(content["runs"]),
            ". A network more is one that never saw the tile either. ",
            tag("em", "Nested"),
            ": the views were chosen on other folds.",
        ),
        tag(
            "figure",
            legend([(line.name, line.colour) for line in lines]),
            line_chart("Score against the number of passes", lines, "passes", "score"),
        ),
        table(
            "Networks and views",
            ["networks × views", "passes", "GMAC a tile", "score", "nested", "either kind", "four classes"],
            rows,
        ),
    )


# --- Pictures of the tiles ----------------------------------------------------------------------------------


def tiles_section(runs: Sequence[RunEvidence], panels: Sequence[Panels]) -> Html:
    """Return the pictures of every tile, those where the first run is worst on top."""
    by_id = {drawn.tile_id: drawn for drawn in panels}
    articles = [_tile_article(runs, by_id[tile_id]) for tile_id in worst_first(runs[0])]
    return section(
        "tiles",
        "Every tile, worst first",
        paragraph(
            "Click or tap a picture to enlarge it; the arrow keys then flip between image, label, prediction "
            "and errors in place."
        ),
        _controls(runs),
        _swatches("Classes", {code: CODE_COLOURS[code] for code in _codes_shown(runs)}, _code_names()),
        _swatches("Errors", OUTCOME_COLOURS, OUTCOME_NAMES),
        tag("div", *articles, id="gallery"),
    )


def _controls(runs: Sequence[RunEvidence]) -> Html:
    """Return the choices of run and order; the script shows them, so that none is dead without it."""
    chosen = [tag("option", run.name, value=index) for index, run in enumerate(runs)]
    everything = tag("option", "all runs", value="all")
    orders = {"worst": "worst first", "best": "best first", "glacier": "most glacier first", "id": "tile id"}
    options = [tag("option", text, value=value) for value, text in orders.items()]
    run_choice = tag("label", "Prediction of ", tag("select", *chosen, everything, id="run"))
    order_choice = tag("label", "Order ", tag("select", *options, id="order"))
    return tag("form", run_choice, order_choice, class_="controls", hidden=True)


def _codes_shown(runs: Sequence[RunEvidence]) -> list[int]:
    counts = np.sum([run.scores["confusion"] for run in runs], axis=0)
    present = [code for code in CODE_COLOURS if code < len(counts) and counts[code].any()]
    predicted = [code for code in range(counts.shape[1]) if counts[:, code].any()]
    return [*sorted({*present, *predicted}), IGNORE]


def _code_names() -> dict[int, str]:
    return {code: _spaced(name) for code, name in CODE_NAMES.items()} | {IGNORE: "nodata"}


def _swatches(title: str, colours: Mapping[int, str], names: Mapping[int, str]) -> Html:
    items = []
    for code, colour in colours.items():
        swatch = tag("span", class_="swatch", style=f"background:{colour}", aria_hidden="true")
        items.append(tag("li", swatch, names[code]))
    return tag("div", tag("b", title), tag("ul", *items, class_="legend"), class_="swatches")


def _tile_article(runs: Sequence[RunEvidence], drawn: Panels) -> Html:
    tile_id = drawn.tile_id
    first = runs[0].scores["tiles"][tile_id]
    counts = np.array(first["confusion"])
    share = label_share(counts)
    pictures = [
        _picture(drawn.image, tile_id, "image", "SWIR, red, green in false colour"),
        _picture(drawn.label, tile_id, "label", f"label, phase {first['labels'][-1]}"),
    ]
    for index, run in enumerate(runs):
        facts = _facts(run, drawn, index)
        prediction = _picture(
            drawn.predictions[index], tile_id, "prediction", f"{run.name}: prediction", index
        )
        errors = _picture(drawn.errors[index], tile_id, "errors", f"{run.name}: errors", index, facts)
        pictures += [prediction, errors]
    nodata = first["ignored"] / max(1, first["ignored"] + counts.sum())
    folds = ", ".join(dict.fromkeys(str(run.scores["tiles"][tile_id]["fold"]) for run in runs))
    title = tag("h3", f"Tile {tile_id}", tag("span", f"MCC {_mcc(first):.3f}", class_="mcc"))
    shares = f"glacier {_percent(share, 0)} of valid pixels · nodata {_percent(nodata, 0)}"
    about = f"fold {folds} · {shares} · phase-{first['labels'][-1]} labels"
    scores = " ".join(f"{_mcc(run.scores['tiles'][tile_id]):.6f}" for run in runs)
    data = {"data_tile": tile_id, "data_mcc": scores, "data_glacier": f"{share:.6f}"}
    grid = tag("div", *pictures, class_="panels")
    return tag("article", title, tag("p", about), grid, id=tile_anchor(tile_id), class_="tile", **data)


def label_share(counts: np.ndarray) -> float:
    """Return the share of a tile's labelled pixels, (6, 4) counts, that are glacier of either kind."""
    return float(binary(counts)[1].sum() / max(1, counts.sum()))


def _facts(run: RunEvidence, drawn: Panels, index: int) -> str:
    """Return scores and shares of errors of a run on a tile in words."""
    outcomes, scores = drawn.outcomes[index], run.scores["tiles"][drawn.tile_id]["valid_pixels"]
    labelled = max(1, sum(count for outcome, count in outcomes.items() if outcome != Outcome.NO_LABEL))
    parts = [f"MCC {scores['binary']['mcc']:.3f}"]
    parts += [f"four classes {scores['four_class']['mcc']:.3f}"] if scores["four_class"] else []
    parts.append(f"missed {_percent(outcomes[Outcome.MISSED] / labelled)}")
    parts.append(f"false {_percent(outcomes[Outcome.FALSE_ALARM] / labelled)}")
    return ", ".join(parts)


def _picture(
    source: str, tile_id: str, kind: str, caption: str, run: int | None = None, facts: str | None = None
) -> Html:
    alt = f"Tile {tile_id}, {caption}" + (f" ({facts})" if facts else "")
    image = tag("img", src=source, alt=alt, width=512, height=512, class_=kind)
    words = (caption, tag("small", facts)) if facts else (caption,)
    button = tag("button", image, type="button", aria_label=f"Enlarge: {alt}")
    return tag("figure", button, tag("figcaption", *words), data_run=run)


# --- Text ---------------------------------------------------------------------------------------------------


def _mcc(scores: Mapping) -> float:
    return scores["valid_pixels"]["binary"]["mcc"]


def _number(value: float | None) -> str:
    return number_text(value).replace("-", "−")


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _spaced(name: str) -> str:
    return name.replace("_", " ")
