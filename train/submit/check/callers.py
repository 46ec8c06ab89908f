"""Every way in which solution.py is called: command lines, and maskgeration as the platform does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Sequence

import numpy as np

from solution import MODEL_FILE
from train.submit.check.cases import Case, Tile
from train.submit.check.masks import Mask, Masks, Outcome, judge_masks, read_folder
from train.submit.check.processes import Candidate, Run, judge_run, output_folder, run_bare, submitted_files
from train.submit.check.verdict import CheckResult, judge


def name_as_png(tile: Tile) -> str:
    """Return the name of a mask for the positional caller."""
    return f"{Path(tile.name).stem}.png"


def name_as_band1(tile: Tile) -> str:
    """Return the name of a mask for the organisers' callers."""
    return tile.name


# --- Callers: command lines -----------------------------------------------------------------------


class CommandLine(NamedTuple):
    """A way to call solution.py; `name` gives the file name of a tile's mask."""

    label: str
    arguments: Callable[[Case, Path], list[Path | str]]
    name: Callable[[Tile], str]


COMMAND_LINES = (
    CommandLine("IN OUT", lambda case, out: [case.data, out], name_as_png),
    CommandLine(
        "--data --masks --out",
        lambda case, out: ["--data", case.data, "--masks", case.folder / "masks", "--out", out],
        name_as_band1,
    ),
    CommandLine(
        "--imagepath --output",
        lambda case, out: ["--imagepath", case.data, "--output", out],
        name_as_band1,
    ),
)


def check_command_line(
    candidate: Candidate, case: Case, line: CommandLine
) -> tuple[list[CheckResult], list[Outcome]]:
    """Run one command line; return the results, and the masks it wrote."""
    subject = f"{case.label}: {line.label}"
    candidate.announce(subject)
    with output_folder(candidate) as out:
        arguments = ["solution.py", *map(str, line.arguments(case, out))]
        run = run_bare(candidate, submitted_files(candidate), arguments, case)
        masks = read_folder(out)
    by_name = {line.name(tile): tile for tile in case.tiles}
    results = [*judge_run(subject, run), *judge_masks(subject, masks, by_name)]
    return results, [Outcome(subject, by_tile_id(masks, by_name))]


def by_tile_id(masks: Masks, by_name: Mapping[str, Tile]) -> dict[str, Mask]:
    """Return masks under their tile ids, leaving out what belongs to no tile."""
    return {by_name[name].tile_id: mask for name, mask in masks.items() if name in by_name}


# --- Callers: maskgeration ------------------------------------------------------------------------

# Run by the interpreter under test, Python 3.9 too, in the bare folder.
PLATFORM_CODE = """
import json, sys
request = json.loads(sys.argv[1])
import numpy
import solution
report = {"calls": []}
for number, arguments in enumerate(request["calls"]):
    try:
        returned = solution.maskgeration(*arguments)
    except BaseException as error:
        report["calls"].append({"raised": "%s: %s" % (type(error).__name__, error)})
        continue
    call = {"type": type(returned).__name__, "masks": []}
    for index, (key, mask) in enumerate(returned.items() if isinstance(returned, dict) else ()):
        name = key if isinstance(key, str) else "%s %r" % (type(key).__name__, key)
        is_array = isinstance(mask, numpy.ndarray) and mask.dtype.kind in "biuf"
        file = "%d-%d.npy" % (number, index) if is_array else None
        if is_array:
            numpy.save(request["folder"] + "/" + file, mask)
        call["masks"].append([name, type(mask).__name__, file])
    report["calls"].append(call)
with open(request["folder"] + "/report.json", "w") as stream:
    json.dump(report, stream)
"""


class Call(NamedTuple):
    """One call of maskgeration: what came back, masks by tile id, or what was raised."""

    raised: str | None
    returned: str  # name of the type
    masks: Masks


class PlatformReport(NamedTuple):
    """A process that imported solution and called maskgeration; no calls where the import failed."""

    run: Run
    calls: list[Call]


def call_maskgeration(
    candidate: Candidate, files: Mapping[str, Path], calls: Sequence[Sequence], case: Case
) -> PlatformReport:
    """Import solution in a bare folder of `files` and call maskgeration with each of `calls`' arguments."""
    folder = candidate.workdir / "returned"
    folder.mkdir()
    try:
        request = json.dumps({"folder": str(folder), "calls": calls})
        run = run_bare(candidate, files, ["-c", PLATFORM_CODE, request], case)
        if not (folder / "report.json").is_file():
            return PlatformReport(run, [])
        report = json.loads((folder / "report.json").read_text())
        return PlatformReport(run, [read_call(call, folder) for call in report["calls"]])
    finally:
        shutil.rmtree(folder)


def read_call(call: Mapping, folder: Path) -> Call:
    """Return a call as the driver reported it, with the arrays that it saved in `folder`."""
    if "raised" in call:
        return Call(call["raised"], "", {})
    masks = {
        name: np.load(folder / file) if file else f"a {kind}, not a numeric array"
        for name, kind, file in call["masks"]
    }
    return Call(None, call["type"], masks)


def check_maskgeration(candidate: Candidate, case: Case) -> tuple[list[CheckResult], list[Outcome]]:
    """Call maskgeration as the platform does, as its documents say, and on a data folder, in one process."""
    subject = f"{case.label}: import solution"
    candidate.announce(f"{case.label}: maskgeration")
    weights = str(candidate.workdir / "bare" / MODEL_FILE)
    with output_folder(candidate) as out:
        out.mkdir()
        calls: dict[str, list] = {
            f"{case.label}: maskgeration(bands, model.pth)": [case.band_folders, weights],
            f"{case.label}: maskgeration(bands, OUT)": [case.band_folders, str(out)],
            f"{case.label}: maskgeration(folder, model.pth)": [str(case.data), weights],
        }
        report = call_maskgeration(candidate, submitted_files(candidate), list(calls.values()), case)
        written = read_folder(out)
    results, outcomes = judge_run(subject, report.run), []
    if not report.calls:
        return [*results, judge(subject, "calls", [report.run.last_words], "maskgeration was called")], []
    tiles = {tile.tile_id: tile for tile in case.tiles}
    for name, call in zip(calls, report.calls):
        results.extend(judge_call(name, call, tiles))
        outcomes.append(Outcome(name, call.masks))
    by_name = {name_as_band1(tile): tile for tile in case.tiles}
    subject = f"{case.label}: maskgeration(bands, OUT), files"
    results.extend(judge_masks(subject, written, by_name))
    return results, [*outcomes, Outcome(subject, by_tile_id(written, by_name))]


def judge_call(subject: str, call: Call, tiles: Mapping[str, Tile]) -> list[CheckResult]:
    """Return the results on what a call gave back."""
    wrong = (
        [f"raised {call.raised}"]
        if call.raised
        else [f"a {call.returned}"]
        if call.returned != "dict"
        else []
    )
    returned = judge(subject, "returns a dict", wrong, "a dict of tile ids and masks")
    if wrong:
        return [returned]
    return [returned, *judge_masks(subject, call.masks, tiles)]
