"""The mask that a release of the weights has to give again.

    python -m train.submit.reference            # compare weights/ with its reference
    python -m train.submit.reference --write    # make the reference anew, after the weights were replaced

It is a synthetic scene's mask (`reference.png`) with its class counts and SHA-256, and that of the weights
(`reference.json`). Processors differ in the last bits of a float32, so AGREEMENT of the pixels will do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from prep.files import sha256, write_json
from prep.synthetic.scenes import write_sample
from solution import CLASS_NAMES, CLASS_VALUES, segment_folder
from train.submit.verdict import CheckResult, format_results, judge

WEIGHTS = Path(__file__).resolve().parents[2] / "weights" / "model.pth"  # the kit's release
REFERENCE, REFERENCE_MASK = "reference.json", "reference.png"  # beside weights
SCENE = {"seed": 20, "size": 512}  # of the synthetic scene
AGREEMENT = 0.999  # least share of pixels that are as in the reference
REMEDY = "make it with `python -m train.submit.reference --write`"


def reference_mask(weights: Path) -> np.ndarray:
    """Return the mask (512, 512) uint8 that these weights give for the reference scene."""
    with tempfile.TemporaryDirectory() as folder:
        write_sample(Path(folder) / "scene", 1, SCENE["size"], SCENE["seed"], "platform", "phase2")
        masks = segment_folder(Path(folder) / "scene", weights, None, "inf").masks  # all passes, however slow
    return next(iter(masks.values()))


def write_reference(weights: Path) -> dict:
    """Write reference.json and reference.png beside the weights; return the content of the first."""
    mask = reference_mask(weights)
    counts = {name: int((mask == value).sum()) for name, value in zip(CLASS_NAMES, CLASS_VALUES)}
    digest = hashlib.sha256(mask.tobytes()).hexdigest()
    content = {"weights_sha256": sha256(weights), "scene": SCENE, "pixels": counts, "mask_sha256": digest}
    cv2.imwrite(str(weights.with_name(REFERENCE_MASK)), mask)
    write_json(weights.with_name(REFERENCE), content)
    return content


def check_reference(weights: Path) -> CheckResult:
    """Return whether the reference beside the weights is theirs, and whether they give its mask again."""
    described, drawn = weights.with_name(REFERENCE), weights.with_name(REFERENCE_MASK)
    if not (described.is_file() and drawn.is_file()):
        return CheckResult(weights.name, "reference mask", True, "none", REMEDY, doubtful=True)
    content = json.loads(described.read_text(encoding="utf-8"))
    if content["weights_sha256"] != sha256(weights) or content["scene"] != SCENE:
        return judge(weights.name, "reference mask", [f"{REFERENCE} is of other weights"], REMEDY)
    expected = cv2.imread(str(drawn), cv2.IMREAD_UNCHANGED)
    if expected is None or hashlib.sha256(expected.tobytes()).hexdigest() != content["mask_sha256"]:
        return judge(weights.name, "reference mask", [f"{REFERENCE_MASK} was changed"], REMEDY)
    same = float((reference_mask(weights) == expected).mean())
    found, wanted = f"{same:.4%} of its pixels again", f"{AGREEMENT:.1%} of its pixels again"
    return CheckResult(weights.name, "reference mask", same >= AGREEMENT, found, wanted)


def check_shipped(weights: Path, release: Path = WEIGHTS) -> list[CheckResult]:
    """Return the result on the reference mask where these are the weights of the release; of others it says
    nothing."""
    described = release.with_name(REFERENCE)
    pinned = json.loads(described.read_text(encoding="utf-8"))["weights_sha256"] if described.is_file() else ""
    return [check_reference(release)] if pinned == sha256(weights) == sha256(release) else []


def main(arguments: list[str] | None = None) -> int:
    """Compare or write; return 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m train.submit.reference", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="default: the kit's release")
    parser.add_argument("--write", action="store_true", help="make the reference anew")
    options = parser.parse_args(arguments)
    if options.write:
        print(json.dumps(write_reference(options.weights), indent=2))
        return 0
    result = check_reference(options.weights)
    print(format_results([result]))
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
