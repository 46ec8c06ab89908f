"""What pins a release of the weights: the SHA-256 in its card, and a mask that it has to give again.

    python -m train.submit.reference            # compare weights/ with its card and its reference
    python -m train.submit.reference --write    # make the reference anew, after the weights were replaced

The reference is a synthetic scene's mask (`reference.png`) with its class counts and SHA-256
(`reference.json`). Processors differ in the last bits of a float32, so AGREEMENT of the pixels will do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from prep.synthetic.scenes import write_sample
from solution import CLASS_NAMES, CLASS_VALUES, segment_folder
from train.submit.archive import sha256
from train.submit.check.verdict import CheckResult, count_failures, format_results, judge

REFERENCE = "reference.json"
REFERENCE_MASK = "reference.png"
SCENE = {"seed": 20, "size": 512}  # of the synthetic scene
AGREEMENT = 0.999  # least share of pixels that are as in the reference


def card_of(weights: Path) -> Path:
    """Return the path of the card that `python -m train pack` writes beside weights."""
    return weights.with_name(f"{weights.stem}_card.md")


def pinned_sha256(card: Path) -> str | None:
    """Return the SHA-256 that a card states for its weights, None where it states none or is not there."""
    stated = (
        re.search(r"SHA-256 `([0-9a-f]{64})`", card.read_text(encoding="utf-8")) if card.is_file() else None
    )
    return stated[1] if stated else None


def check_pin(weights: Path) -> CheckResult:
    """Return whether the weights are those that the card beside them describes; a warning without a card."""
    card = card_of(weights)
    stated, found = pinned_sha256(card), sha256(weights)
    if stated is None:
        expected = f"{card.name} beside it, with its SHA-256; `python -m train pack` writes both"
        return CheckResult(weights.name, "pinned by its card", True, "no card", expected, doubtful=True)
    faults = [] if found == stated else [f"SHA-256 {found[:12]}..., not that of {card.name}"]
    return judge(weights.name, "pinned by its card", faults, f"SHA-256 {stated[:12]}... as in {card.name}")


def reference_mask(weights: Path) -> np.ndarray:
    """Return the mask (512, 512) uint8 that these weights give for the reference scene."""
    with tempfile.TemporaryDirectory() as folder:
        write_sample(Path(folder) / "scene", 1, SCENE["size"], SCENE["seed"], "platform", "phase2")
        masks = segment_folder(Path(folder) / "scene", weights, None, "inf").masks  # all passes, however slow
    return next(iter(masks.values()))


def describe(weights: Path, mask: np.ndarray) -> dict:
    """Return the content of reference.json."""
    counts = {name: int((mask == value).sum()) for name, value in zip(CLASS_NAMES, CLASS_VALUES)}
    digest = hashlib.sha256(mask.tobytes()).hexdigest()
    return {"weights_sha256": sha256(weights), "scene": SCENE, "pixels": counts, "mask_sha256": digest}


def write_reference(weights: Path) -> dict:
    """Write reference.json and reference.png beside the weights; return the content of the first."""
    mask = reference_mask(weights)
    content = describe(weights, mask)
    cv2.imwrite(str(weights.with_name(REFERENCE_MASK)), mask)
    weights.with_name(REFERENCE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def check_reference(weights: Path) -> list[CheckResult]:
    """Return whether the reference is of these weights, and whether they give its mask again."""
    described, drawn = weights.with_name(REFERENCE), weights.with_name(REFERENCE_MASK)
    remedy = "make it with `python -m train.submit.reference --write`"
    if not (described.is_file() and drawn.is_file()):
        return [CheckResult(weights.name, "reference mask", True, "none", remedy, doubtful=True)]
    content = json.loads(described.read_text(encoding="utf-8"))
    if content["weights_sha256"] != sha256(weights) or content["scene"] != SCENE:
        return [judge(weights.name, "reference mask", [f"{REFERENCE} is of other weights"], remedy)]
    expected = cv2.imread(str(drawn), cv2.IMREAD_UNCHANGED)
    if expected is None or hashlib.sha256(expected.tobytes()).hexdigest() != content["mask_sha256"]:
        return [judge(weights.name, "reference mask", [f"{REFERENCE_MASK} was changed"], remedy)]
    same = float((reference_mask(weights) == expected).mean())
    found, wanted = f"{same:.4%} of its pixels again", f"{AGREEMENT:.1%} of its pixels again"
    return [CheckResult(weights.name, "reference mask", same >= AGREEMENT, found, wanted)]


def main(arguments: list[str] | None = None) -> int:
    """Compare or write; return 1 where something differs."""
    parser = argparse.ArgumentParser(
        prog="python -m train.submit.reference", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--weights", type=Path, default=Path("weights/model.pth"), help="default: %(default)s"
    )
    parser.add_argument("--write", action="store_true", help="make the reference anew")
    options = parser.parse_args(arguments)
    if options.write:
        print(json.dumps(write_reference(options.weights), indent=2))
        return 0
    results = [check_pin(options.weights), *check_reference(options.weights)]
    print(format_results(results))
    return 1 if count_failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
