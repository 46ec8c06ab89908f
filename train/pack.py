"""Packs the folds of a run into `model.pth`, the one file that `solution.py` reads, and writes its card."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import segmentation_models_pytorch as smp
import torch

from prep.files import write_text, write_whole
from prep.text import number_text
from solution import CLASS_NAMES, MODEL_FORMAT, VIEWS, load_model
from train.calibrate import Settings
from train.data import ALL_TILES
from train.fit import RunError
from train.networks import COMPARED
from train.predict import read_folds, usable_views, with_held_out
from train.run import SCORES_FILE
from train.submit.archive import sha256
from train.submit.limits import KNOWN_SECONDS, MAX_BYTES

CARD_SCORES = (
    ("valid_pixels", "binary", "glacier of either kind against the rest, valid pixels"),
    ("valid_pixels", "four_class", "four classes (tiles with phase-2 labels), valid pixels"),
    ("all_pixels", "binary", "glacier of either kind against the rest, all pixels"),
    ("all_pixels", "four_class", "four classes (tiles with phase-2 labels), all pixels"),
)

OF_MIXTURE = "Those of the whole, out of fold: see the mixture."
DECIDED = "Each was decided by out-of-fold MCC (`reports/postprocess.md`)."


def to_half(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights as float16; BatchNorm's running statistics, counters, and what is float64 as they are.

    Variances span more than float16 can hold, and they are few. The thresholds of trees are float64.
    """
    return {
        name: tensor.half() if tensor.dtype == torch.float32 and "running_" not in name else tensor
        for name, tensor in state.items()
    }


def require_shippable(records: Sequence[Mapping]) -> None:
    """Raise RunError where a fold's network or scaling is one for comparisons, unknown to `solution.py`."""
    for record in records:
        name, scaling = record["arch"]["name"], record.get("scaling", "statistics")
        if name in COMPARED or scaling != "statistics":
            raise RunError(
                f"fold {record['fold']}: found network {name} with data.scaling {scaling}, which solution.py "
                f"does not know; expected a network other than {', '.join(COMPARED)} and scaling statistics"
            )


def as_stored_member(record: Mapping) -> dict:
    """Return a fold's record as a member of model.pth; all members weigh the same."""
    return {
        "arch": record["arch"],
        "weight": 1.0,
        "fold": record["fold"],
        "val_mcc": record["val_mcc"],
        "normalization": {key: [float(v) for v in record["normalization"][key]] for key in ("mean", "std")},
        "state_dict": to_half(record["state_dict"]),
    }


def read_calibration(path: Path | None) -> dict:
    """Return class bias and post-processing from `calibrate`'s file; without one, no optional step.

    Raises:
        RunError: the file is missing or was made by an older version.
    """
    if path is None:
        plain = Settings()
        return {
            "views": plain.views,
            "class_bias": plain.class_bias,
            "postprocess": plain.postprocess._asdict(),
            "runs": [],
        }
    if not path.is_file():
        raise RunError(f"{path}: no such calibration; make it with `python -m train calibrate`")
    return read_settings(path, ("views", "class_bias", "postprocess", "runs"), "calibrate")


def read_settings(path: Path, keys: Sequence[str], command: str) -> dict:
    """Return the JSON object in `path`, which `command` writes.

    Raises:
        RunError: it is no such object, or lacks some of `keys`.
    """
    again = f"make it again with `python -m train {command}`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: cannot be read as JSON ({error}); {again}") from error
    absent = [key for key in keys if not isinstance(content, dict) or key not in content]
    if absent:
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise RunError(
            f"{path}: no {', '.join(absent)} in it (found {found}), expected what `{command}` now writes; "
            f"{again}"
        )
    return content


def every_pass(members: int, views: int) -> list[list[int]]:
    """Return all pairs of member and view, each member's first view before anyone's second.

    Another member brings more than another view of the same (`python -m train pareto` measures it).
    """
    return [[member, view] for view in range(views) for member in range(members)]


class Order(NamedTuple):
    """The passes [index of a member, view], the most useful first, and the runs on which that was measured
    (none: it is the order of `every_pass`)."""

    passes: Sequence[Sequence[int]]
    runs: Sequence[str] = ()


def read_order(path: Path, run: str, folds: Sequence[int], views: int) -> Order:
    """Return the passes in the order that `pareto` found; members are numbered as in `folds`.

    Args:
        path: its file.
        run: name of the run to pack.
        folds: its finished folds.
        views: how many views calibration kept: the most useful ones are taken.

    Raises:
        RunError: the file is missing, was made for another run, or does not hold each fold in each view once.
    """
    again = f"make it again with `python -m train pareto {run}`"
    if not path.is_file():
        raise RunError(f"{path}: no such order of passes; {again}")
    content = read_settings(path, ("runs", "views", "passes"), "pareto")
    if content["runs"][:1] != [run]:
        raise RunError(f"{path}: found the order for {content['runs'][:1]}, expected one for {run}; {again}")
    order, passes = content["views"], [tuple(one) for one in content["passes"]]
    wrong = set(passes) ^ {(fold, view) for fold in folds for view in range(len(VIEWS))}
    if wrong or len(set(passes)) < len(passes) or sorted(order) != list(range(len(VIEWS))):
        raise RunError(
            f"{path}: found {len(passes)} passes and the views {order}, expected each of the folds "
            f"{', '.join(map(str, folds))} of {run} once in each of {len(VIEWS)} views, counted from 0; "
            f"missing or unknown [fold, view]: {sorted(wrong)[:5] or 'none'}; {again}"
        )
    kept = [[list(folds).index(fold), view] for fold, view in passes if view in order[:views]]
    return Order(kept, content["runs"])


def assemble(records: Sequence[Mapping], calibration: Mapping, order: Order) -> dict:
    """Return the content of model.pth: plain containers and tensors, readable with weights_only=True."""
    return {
        "format": MODEL_FORMAT,
        "members": [as_stored_member(record) for record in records],
        "passes": [[number, view] for number, view in order.passes if view < usable_views(records[number])],
        "time_budget": KNOWN_SECONDS,
        "class_bias": list(calibration["class_bias"]),
        "postprocess": dict(calibration["postprocess"]),
        "provenance": {
            "tiles": sorted(
                {t for record in records for t in (*record["val_tiles"], *record.get("train_tiles", ()))}
            ),
            "scheme": records[0]["scheme"],
            "config": records[0]["config"],
            "calibrated_on": list(calibration["runs"]),
            "ordered_on": list(order.runs),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__.split("+")[0],
                "segmentation_models_pytorch": smp.__version__,
            },
        },
    }


def pack(run_dir: Path, calibration: Path | None, out: Path, passes: Path | None = None) -> Path:
    """Write `out` from the finished folds of a run, and `<stem>_card.md` beside it.

    Args:
        run_dir: the run.
        calibration: file of `calibrate`, None for no optional step.
        out: the model file.
        passes: file of `pareto`, None for the order of `every_pass`.

    Raises:
        RunError: no finished folds, no calibration, an order that does not fit, or the file would exceed
            300 MB; `out` is left as it was.
        solution.InputError: the packed file does not load.
    """
    records = with_held_out(read_folds(run_dir))
    require_shippable(records)
    settings = read_calibration(calibration)
    folds = [record["fold"] for record in records]
    if passes is None:
        order = Order(every_pass(len(folds), settings["views"]))
    else:
        order = read_order(passes, Path(run_dir).name, folds, settings["views"])
    scores = run_dir / SCORES_FILE
    content = assemble(records, settings, order)
    return write_model(out, content, json.loads(scores.read_text()) if scores.is_file() else None)


def write_model(out: Path, content: Mapping, scores: Mapping | None, sections: Sequence[str] = ()) -> Path:
    """Write `out` and `<stem>_card.md` beside it; both are left as they were where that fails.

    Args:
        out: the model file.
        content: what it holds.
        scores: of the run, for the card, None where it has none.
        sections: more text for the card.

    Raises:
        RunError: the file would exceed 300 MB.
        solution.InputError: the packed file does not load.
    """
    out.parent.mkdir(parents=True, exist_ok=True)

    def save_checked(path: Path) -> None:
        torch.save(content, path)
        size = path.stat().st_size
        if size > MAX_BYTES:
            path.unlink()
            raise RunError(
                f"{out}: would be {size / 1e6:.0f} MB, the organisers allow {MAX_BYTES / 1e6:.0f} MB; pack "
                "fewer folds or train a smaller encoder"
            )
        load_model(path)

    write_whole(out, save_checked)
    write_text(out.with_name(f"{out.stem}_card.md"), format_card(out, content, scores, sections))
    return out


def format_networks(members: Sequence[Mapping]) -> str:
    """Return which networks there are, and how they are averaged."""
    kinds = dict.fromkeys(f"{member['arch']['name']}, {member['arch']['args']}" for member in members)
    equal = len({member["weight"] for member in members}) == 1
    weighed = "equal weights" if equal else "a weight for each run"
    return f"{len(members)} networks ({'; '.join(kinds)}), averaged with {weighed}"


def fold_name(member: Mapping) -> str:
    """Return a member's fold for the card, and its run where there are several."""
    fold = "none held out" if member["fold"] == ALL_TILES else str(member["fold"])
    return f"{member['run']}: {fold}" if "run" in member else fold


def format_card(weights: Path, content: Mapping, scores: Mapping | None, sections: Sequence[str] = ()) -> str:
    """Return the model card: what the file is, what it was made from, how it scores, how to make it again."""
    provenance, members = content["provenance"], content["members"]
    config = provenance["config"]
    steps = "\n".join(f"- {name}: {value}" for name, value in content["postprocess"].items())
    views = len({view for _, view in content["passes"]})
    folds = "\n".join(f"| {fold_name(member)} | {number_text(member['val_mcc'])} |" for member in members)
    mixed = any("run" in member for member in members)
    order = format_order(provenance, mixed)
    further = "".join(f"\n{section}\n" for section in sections)
    return f"""# Model card of {weights.name}

{format_networks(members)}.

- Size: {weights.stat().st_size / 1e6:.1f} MB (float16); SHA-256 `{sha256(weights)}`
- Trained on: {len(provenance["tiles"])} Landsat-8 tiles ({", ".join(provenance["tiles"])}), each network \
without the tiles of its fold ({provenance["scheme"]} folds){format_whole(members)}
- Steps{f" of {members[0]['run']}" if mixed else ""}: {format_steps(config, members[0]["arch"])}
- Made with: {", ".join(f"{name} {version}" for name, version in provenance["versions"].items())}
- Command: `make {"train-mixed" if mixed else "train-all"} SCHEME={provenance["scheme"]} \
DATA=<folder with Band1 ... Band5 and the labels>`

## Scores

Binary MCC of each network on its held-out tiles, one view; {format_kept(config)}:

| fold | MCC |
| --- | --- |
{folds}

{OF_MIXTURE if mixed and scores is None else format_scores(scores)}
{further}
## After the forward passes

{steps}
- passes: {len(content["passes"])}, {len(members)} networks in {views} views, {order}; time budget: \
{content["time_budget"]} s
- class bias ({", ".join(CLASS_NAMES)}): {", ".join(f"{value:g}" for value in content["class_bias"])}

{DECIDED if provenance["calibrated_on"] else "Nothing here was calibrated: no optional step is taken."}

## Limits

- No tile shows a lake: the class has only ever been a negative example, and is never predicted in practice.
- Three tiles tell debris from clean ice, and a network has seen two or three: expect little of debris.
- One scene, one season, one region. Other regions cost others 0.03 to 0.09 MCC.
"""


def format_whole(members: Sequence[Mapping]) -> str:
    """Return that some networks saw all tiles; empty where none did."""
    whole = any(member["fold"] == ALL_TILES for member in members)
    return "; one that holds out none has seen all of them" if whole else ""


def format_order(provenance: Mapping, mixed: bool) -> str:
    """Return in which order the passes come."""
    if not provenance["ordered_on"]:
        return "in turn"
    return "the most useful first" + ("" if mixed else " (`reports/pareto.md`)")


def format_steps(config: Mapping, arch: Mapping) -> str:
    """Return how long the networks were trained, on what, and from which first weights."""
    if arch["name"] == "BoostedTrees":
        return f"{arch['args']['trees']} trees for the questions of train/baseline.py"
    data = config["data"]
    return (
        f"{config['train']['epochs']} epochs of {data['steps_per_epoch']} steps of {data['batch_size']} "
        f"crops of {data['crop']} px, from {format_start(config)}; {format_kept(config)}"
    )


def format_start(config: Mapping) -> str:
    """Return what the networks' first weights were."""
    if config["model"]["init"]:
        return str(config["model"]["init"])
    if config["model"].get("imagenet"):
        return (
            "ImageNet for the encoder (Google's EfficientNet-Lite, Apache License 2.0), random ones elsewhere"
        )
    return "random weights"


def format_kept(config: Mapping) -> str:
    """Return which epoch's weights a fold keeps, and whether the held-out tiles had a say in it."""
    if config["train"].get("keep") == "last":
        return "the last epoch is kept, so that the held-out tiles chose nothing"
    return "the epoch with the best MCC on the held-out tiles is kept, which flatters it"


def format_scores(scores: Mapping | None) -> str:
    """Return the table of out-of-fold scores; says so where the run has not been scored."""
    if scores is None:
        return "Out-of-fold scores: not computed for this run (`python -m train report`)."
    pooled = scores["pooled"]
    rows = [
        f"| {text} | {pooled[pixels][task]['mcc']:.3f} |"
        for pixels, task, text in CARD_SCORES
        if pooled[pixels][task] is not None
    ]
    return "\n".join(
        [
            "Out of fold, six views averaged, before the steps below:",
            "",
            "| score | MCC |",
            "| --- | --- |",
            *rows,
        ]
    )
