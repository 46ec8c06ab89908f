"""Checks model.pth: its size, its contents, and that damaged weights stop every caller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Mapping

import torch

from solution import MODEL_FILE, InputError, read_model_file
from train.submit.check.callers import call_maskgeration
from train.submit.check.cases import Case
from train.submit.check.masks import read_folder
from train.submit.check.processes import (
    Candidate,
    describe_status,
    output_folder,
    run_bare,
    submitted_files,
)
from train.submit.check.verdict import CheckResult, judge
from train.submit.limits import MAX_BYTES

# What `model.pth` has to hold, see "Contracts" in the architecture.
MODEL_KEYS = ("format", "members", "passes", "class_bias", "postprocess", "provenance")
MEMBER_KEYS = ("arch", "weight", "fold", "val_mcc", "normalization", "state_dict")
PROVENANCE_KEYS = ("tiles", "scheme", "config", "versions")

NO_MASKS_STATUS = 2  # of a run that could not start


LOADING_CODE = """
import json, sys
import solution
content = solution.read_model_file("model.pth")
solution.load_model("model.pth")
keys = {
    "model": list(content),
    "members": [list(member) for member in content.get("members", [])],
    "provenance": list(content.get("provenance") or []),
}
with open(sys.argv[1], "w") as stream:
    json.dump(keys, stream)
"""


def check_size(weights: Path) -> CheckResult:
    """Return whether the weights are small enough to be handed in."""
    size = weights.stat().st_size
    found, expected = f"{size / 1e6:.1f} MB", f"at most {MAX_BYTES / 1e6:.0f} MB"
    return CheckResult(MODEL_FILE, "size", size <= MAX_BYTES, found, expected)


def check_loading(candidate: Candidate, case: Case) -> list[CheckResult]:
    """Load the weights with the submission's own strict loader and look for the keys of the contract."""
    candidate.announce(f"{MODEL_FILE}: loading")
    report = candidate.workdir / "keys.json"
    run = run_bare(candidate, submitted_files(candidate), ["-c", LOADING_CODE, str(report)], case)
    status = [] if run.status == 0 and report.is_file() else [describe_status(run)]
    loading = judge(MODEL_FILE, "strict loading", status, "solution.load_model takes it")
    if status:
        return [loading]
    keys = json.loads(report.read_text())
    absent = [f"no {key}" for key in MODEL_KEYS if key not in keys["model"]]
    absent += [
        f"member {number}: no {key}"
        for number, member in enumerate(keys["members"])
        for key in MEMBER_KEYS
        if key not in member
    ]
    absent += [f"provenance: no {key}" for key in PROVENANCE_KEYS if key not in keys["provenance"]]
    return [loading, judge(MODEL_FILE, "contents", absent, "the keys of the contract")]


def make_damaged_weights(weights: Path, folder: Path) -> dict[str, Path]:
    """Write weights that none should take for good ones; return {what is wrong: file}, one of them absent."""
    damaged = {"weights cut in half": folder / "cut.pth", "no weights": folder / "absent.pth"}
    folder.mkdir()
    whole = weights.read_bytes()
    damaged["weights cut in half"].write_bytes(whole[: len(whole) // 2])
    try:
        content = read_model_file(weights)
    except InputError:  # another format, in which no tensor can be left out
        return damaged
    content["members"][0]["state_dict"].popitem()
    damaged["a tensor missing"] = folder / "lacking.pth"
    torch.save(content, damaged["a tensor missing"])
    return damaged


def check_damaged(candidate: Candidate, case: Case, damaged: Mapping[str, Path]) -> list[CheckResult]:
    """Return whether damaged weights stop every kind of caller: no masks, least of all random ones."""
    results = []
    for fault, weights in damaged.items():
        results.extend(check_damaged_command(candidate, case, fault, weights))
    candidate.announce("damaged weights: maskgeration")
    calls = [[case.band_folders, str(weights)] for weights in damaged.values()]
    report = call_maskgeration(candidate, {"solution.py": candidate.solution}, calls, case)
    for number, fault in enumerate(damaged):
        raised = [call.raised for call in report.calls[number : number + 1]]
        faults = [] if raised and raised[0] else ["masks were returned" if raised else report.run.last_words]
        results.append(judge(f"{fault}: maskgeration", "refused", faults, "an error is raised"))
    return results


def check_damaged_command(candidate: Candidate, case: Case, fault: str, weights: Path) -> list[CheckResult]:
    """Run the positional command line on damaged weights, or on none where `weights` does not exist."""
    subject = f"{fault}: IN OUT"
    candidate.announce(subject)
    files = {"solution.py": candidate.solution} | ({MODEL_FILE: weights} if weights.is_file() else {})
    with output_folder(candidate) as out:
        run = run_bare(candidate, files, ["solution.py", str(case.data), str(out)], case)
        written = sorted(read_folder(out))
    status = [] if run.status == NO_MASKS_STATUS else [describe_status(run)]
    return [
        judge(subject, "refused", status, f"exit status {NO_MASKS_STATUS}"),
        judge(subject, "no masks", written, "no file"),
    ]
