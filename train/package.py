"""Packs the folds of a run into `model.pth`, the one file that `solution.py` reads, and writes its card."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Mapping, Sequence

import segmentation_models_pytorch as smp
import torch

from solution import CLASS_NAMES, MODEL_FORMAT, load_model
from train.calibrate import Settings
from train.evaluate import read_folds
from train.fit import RunError, write_whole
from train.submission import sha256

MAX_BYTES = 300_000_000  # the organisers' limit for model.pth
CARD_SCORES = (
    ("valid_pixels", "binary", "glacier of either kind against the rest, valid pixels"),
    ("valid_pixels", "four_class", "four classes (tiles with phase-2 labels), valid pixels"),
    ("all_pixels", "binary", "glacier of either kind against the rest, all pixels"),
    ("all_pixels", "four_class", "four classes (tiles with phase-2 labels), all pixels"),
)


def to_half(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights as float16, BatchNorm's running statistics and counters as they are.

    Variances span more than float16 can hold, and they are few.
    """
    return {
        name: tensor.half() if tensor.is_floating_point() and "running_" not in name else tensor
        for name, tensor in state.items()
    }


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
        RunError: the file is missing.
    """
    if path is None:
        plain = Settings()
        return {
            "class_bias": plain.class_bias,
            "postprocess": plain.postprocess._asdict(),
            "runs": [],
        }
    if not path.is_file():
        raise RunError(f"{path}: no such calibration; make it with `python -m train calibrate`")
    return json.loads(path.read_text(encoding="utf-8"))


def assemble(records: Sequence[Mapping], calibration: Mapping) -> dict:
    """Return the content of model.pth: plain containers and tensors, readable with weights_only=True."""
    return {
        "format": MODEL_FORMAT,
        "members": [as_stored_member(record) for record in records],
        "class_bias": list(calibration["class_bias"]),
        "postprocess": dict(calibration["postprocess"]),
        "provenance": {
            "tiles": sorted({tile for record in records for tile in record["val_tiles"]}),
            "scheme": records[0]["scheme"],
            "config": records[0]["config"],
            "calibrated_on": list(calibration["runs"]),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__.split("+")[0],
                "segmentation_models_pytorch": smp.__version__,
            },
        },
    }


def pack(run_dir: Path, calibration: Path | None, out: Path) -> Path:
    """Write `out` from the finished folds of a run, and `<stem>_card.md` beside it.

    Raises:
        RunError: no finished folds, no calibration, or the file would exceed 300 MB; `out` is left as it was.
        solution.InputError: the packed file does not load.
    """
    records = read_folds(run_dir)
    content = assemble(records, read_calibration(calibration))
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
    scores = (
        json.loads((run_dir / "scores.json").read_text()) if (run_dir / "scores.json").is_file() else None
    )
    card = out.with_name(f"{out.stem}_card.md")
    write_whole(card, lambda path: path.write_text(format_card(out, content, scores), encoding="utf-8"))
    return out


def format_card(weights: Path, content: Mapping, scores: Mapping | None) -> str:
    """Return the model card: what the file is, what it was made from, how it scores, how to make it again."""
    provenance, members = content["provenance"], content["members"]
    config = provenance["config"]
    steps = "\n".join(f"- {name}: {value}" for name, value in content["postprocess"].items())
    folds = "\n".join(f"| {member['fold']} | {member['val_mcc']:.3f} |" for member in members)
    return f"""# Model card of {weights.name}

{len(members)} networks ({members[0]["arch"]["name"]}, {members[0]["arch"]["args"]}), one a fold, averaged \
with equal weights.

- Size: {weights.stat().st_size / 1e6:.1f} MB (float16); SHA-256 `{sha256(weights)}`
- Trained on: {len(provenance["tiles"])} Landsat-8 tiles ({", ".join(provenance["tiles"])}), each network \
without the tiles of its fold ({provenance["scheme"]} folds)
- Steps: {config["train"]["epochs"]} epochs of {config["data"]["steps_per_epoch"]} steps of \
{config["data"]["batch_size"]} crops of {config["data"]["crop"]} px, from \
{config["model"]["init"] or "random weights"}; the epoch with the best validation MCC is kept
- Made with: {", ".join(f"{name} {version}" for name, version in provenance["versions"].items())}
- Command: `make train-all DATA=<folder with Band1 ... Band5 and the labels>`

## Scores

Binary MCC of each network on its held-out tiles, one view; the epoch was chosen on the same tiles:

| fold | MCC |
| --- | --- |
{folds}

{format_scores(scores)}

## After the forward passes

{steps}
- class bias ({", ".join(CLASS_NAMES)}): {", ".join(f"{value:g}" for value in content["class_bias"])}

Each was decided by out-of-fold MCC (`reports/postprocess.md`).

## Limits

- No tile shows a lake: the class has only ever been a negative example, and is never predicted in practice.
- Three tiles tell debris from clean ice, and a network has seen two or three: expect little of debris.
- One scene, one season, one region. Other regions cost others 0.03 to 0.09 MCC.
"""


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
