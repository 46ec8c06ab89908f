"""Runs a submission as graders do: each caller a process of its own, in a bare folder, without network.

Its working folder holds only copies of `solution.py` and `model.pth`: nothing of the project is on its path,
there is no cache of downloaded weights, and the network cannot be reached.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from solution import TIME_BUDGET_VARIABLE
from train.submit.tiles import (
    Case,
    Masks,
    Outcome,
    compare_snapshots,
    judge_masks,
    read_folder,
    set_modes,
    take_snapshot,
)
from train.submit.verdict import SUBMITTED, CheckResult, judge, refuse_missing

START_LIMIT, TILE_LIMIT = (
    300,
    120,
)  # s until a caller that has not finished is stopped: once, and for each tile
UNHURRIED = {TIME_BUDGET_VARIABLE: "inf"}  # masks can be compared only where all of them rest on all passes
COMPLAINT = re.compile(r"^\s*(warning|error|fatal|traceback)\b", re.IGNORECASE)
TOLERATED = "pydensecrf"  # not among the grader's packages: to go on without it is no fallback there
CLOSED_PORT = "http://127.0.0.1:9"  # a proxy that refuses at once: no download passes by luck

Answer = tuple[list[CheckResult], list[Outcome]]


class Run(NamedTuple):
    """A finished process; `status` is None where it was stopped at its time limit."""

    status: int | None
    seconds: float
    output: str
    changed_inputs: list[str]
    changed_beside: list[str]  # in the folder of solution.py

    @property
    def last_words(self) -> str:
        """The last line that it printed."""
        return (self.output.strip() or "nothing was printed").splitlines()[-1]

    @property
    def ending(self) -> str:
        """How it ended, with its last line."""
        status = f"stopped after {self.seconds:.0f} s" if self.status is None else str(self.status)
        return f"{status}; last line: {self.last_words}"


class Candidate(NamedTuple):
    """What is under test, where it is tested, and `announce`, which is told of each process to come.

    `settings` are environment variables of all its processes; `weights` may be absent.
    """

    solution: Path
    weights: Path
    workdir: Path
    python: str
    announce: Callable[[str], None]
    settings: Mapping[str, str] = UNHURRIED

    @property
    def bare_weights(self) -> str:
        """Where the weights lie while it runs."""
        return str(self.workdir / "bare" / SUBMITTED[1])


# --- Processes ------------------------------------------------------------------------------------


def copy_submission(solution: Path, weights: Path, workdir: Path) -> list[Path]:
    """Return copies of both files, which stay as they are during a check of minutes."""
    refuse_missing(solution, weights)
    folder = workdir / "submission"
    folder.mkdir()
    return [Path(shutil.copyfile(path, folder / name)) for path, name in zip((solution, weights), SUBMITTED)]


@contextmanager
def bare_folder(candidate: Candidate) -> Iterator[Path]:
    """Give a read-only folder with copies of the submission's files and nothing else; it goes afterwards."""
    folder = candidate.workdir / "bare"
    folder.mkdir()
    try:
        for name, path in zip(SUBMITTED, (candidate.solution, candidate.weights)):
            if path.is_file():
                shutil.copyfile(path, folder / name)
        set_modes(folder, 0o444, 0o555)
        yield folder
    finally:
        set_modes(folder, 0o644, 0o755)
        shutil.rmtree(folder)


def run_bare(candidate: Candidate, arguments: Sequence[str], case: Case) -> Run:
    """Run the interpreter with `arguments` in the candidate's bare folder; watch that folder and the inputs.

    Of this process's environment it gets neither Python's and solution.py's variables, nor caches, nor a way
    to the network.
    """
    home = candidate.workdir / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GLACIER_"))}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), CLOSED_PORT)
    caches = dict.fromkeys(("HOME", "TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME"), str(home))
    inputs = take_snapshot(case.folder)
    with bare_folder(candidate) as folder:
        beside, started = take_snapshot(folder), time.perf_counter()
        try:
            process = subprocess.run(
                [candidate.python, *arguments],
                cwd=folder,
                env={**kept, **proxies, **caches, **candidate.settings},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=START_LIMIT + TILE_LIMIT * len(case.tiles),
            )
            status, output = process.returncode, process.stdout
        except subprocess.TimeoutExpired as error:
            status, output = None, error.stdout or b""
        seconds = time.perf_counter() - started
        changed_beside = compare_snapshots(beside, take_snapshot(folder))
    changed_inputs = compare_snapshots(inputs, take_snapshot(case.folder))
    return Run(status, seconds, output.decode(errors="replace"), changed_inputs, changed_beside)


def judge_run(subject: str, run: Run) -> list[CheckResult]:
    """Return the results on a process that should have done its work without a word of complaint."""
    complaints = [line.strip() for line in run.output.splitlines() if COMPLAINT.match(line) and TOLERATED not in line]
    return [
        judge(subject, "exit status", [] if run.status == 0 else [run.ending], "0"),
        judge(subject, "no fallback", complaints, "no warning, no error"),
        judge(subject, "inputs untouched", run.changed_inputs, "as they were"),
        judge(subject, "nothing written beside it", run.changed_beside, "as it was"),
    ]


@contextmanager
def output_folder(candidate: Candidate, name: str = "out") -> Iterator[Path]:
    """Give the path of a folder for masks that is not there yet; it goes afterwards."""
    folder = candidate.workdir / name
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- Command lines --------------------------------------------------------------------------------


class CommandLine(NamedTuple):
    """A way to call solution.py; {data}, {masks} and {out} stand for folders. `suffix` is that of its masks;
    None: that of Band1's files."""

    label: str
    arguments: str
    suffix: str | None


COMMAND_LINES = (
    CommandLine("IN OUT", "{data} {out}", ".png"),
    CommandLine("--data --masks --out", "--data {data} --masks {masks} --out {out}", None),
    CommandLine("--imagepath --output", "--imagepath {data} --output {out}", None),
)


def run_command_line(candidate: Candidate, case: Case, line: CommandLine) -> tuple[Run, Masks]:
    """Run one command line; return the process, and the masks it wrote by file name."""
    candidate.announce(f"{case.label}: {line.label}")
    with output_folder(candidate) as out:
        folders = {"data": case.data, "masks": case.folder / "masks", "out": out}
        arguments = [argument.format_map(folders) for argument in line.arguments.split()]
        return run_bare(candidate, ["solution.py", *arguments], case), read_folder(out)


def check_command_line(candidate: Candidate, case: Case, line: CommandLine) -> Answer:
    """Run one command line; return the results, and the masks it wrote."""
    subject = f"{case.label}: {line.label}"
    run, masks = run_command_line(candidate, case, line)
    results, outcomes = judge_files(subject, masks, case, line.suffix)
    return [*judge_run(subject, run), *results], outcomes


def judge_files(subject: str, masks: Masks, case: Case, suffix: str | None) -> Answer:
    """Return the results on written masks, and those that belong to a tile by its id."""
    by_name = {str(Path(tile.name).with_suffix(suffix)) if suffix else tile.name: tile for tile in case.tiles}
    of_tiles = {by_name[name].tile_id: mask for name, mask in masks.items() if name in by_name}
    return judge_masks(subject, masks, by_name), [Outcome(subject, of_tiles)]


# --- maskgeration ---------------------------------------------------------------------------------

# Run by the interpreter under test, Python 3.9 too, in the bare folder.
PLATFORM_CODE = """
import json, os, sys
folder, calls = sys.argv[1], json.loads(sys.argv[2])
import numpy
import solution
report = []
for number, arguments in enumerate(calls):
    try:
        returned = solution.maskgeration(*arguments)
    except BaseException as error:
        report.append(["%s: %s" % (type(error).__name__, error), "", []])
        continue
    masks = []
    for index, (key, mask) in enumerate(returned.items() if isinstance(returned, dict) else ()):
        name = key if isinstance(key, str) else "%s %r" % (type(key).__name__, key)
        is_array = isinstance(mask, numpy.ndarray) and mask.dtype.kind in "biuf"
        file = "%s/%d-%d.npy" % (folder, number, index) if is_array else None
        if is_array:
            numpy.save(file, mask)
        masks.append([name, "a %s, not a numeric array" % type(mask).__name__, file])
    report.append(["", type(returned).__name__, masks])
status = open("/proc/self/status").read() if os.path.exists("/proc/self/status") else ""
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 if "VmHWM:" in status else None
with open(folder + "/report.json", "w") as stream:
    json.dump({"calls": report, "peak": peak}, stream)
"""


class Call(NamedTuple):
    """One call of maskgeration: what was raised, or the type of what came back, and masks by tile id."""

    raised: str
    returned: str
    masks: Masks


def call_maskgeration(
    candidate: Candidate, calls: Sequence[Sequence], case: Case
) -> tuple[Run, list[Call], int | None]:
    """Import solution in the bare folder and call maskgeration with each of `calls`' arguments.

    Returns:
        the process; the calls, none where the import failed; the peak memory in bytes, None where unknown.
    """
    with output_folder(candidate, "returned") as folder:
        folder.mkdir()
        run = run_bare(candidate, ["-c", PLATFORM_CODE, str(folder), json.dumps(calls)], case)
        if not (folder / "report.json").is_file():
            return run, [], None
        report = json.loads((folder / "report.json").read_text())
        made = [
            (raised, returned, {name: np.load(file) if file else why_not for name, why_not, file in masks})
            for raised, returned, masks in report["calls"]
        ]
        return run, [Call(*call) for call in made], report["peak"]


def check_calls(candidate: Candidate, case: Case, calls: Mapping[str, Sequence]) -> Answer:
    """Call maskgeration with each of `calls` {name: arguments}; return the results and the masks."""
    subject = f"{case.label}: maskgeration"
    candidate.announce(subject)
    run, made, _ = call_maskgeration(candidate, list(calls.values()), case)
    results, outcomes = judge_run(subject, run), []
    for name, call in zip(calls, made):
        results += judge_call(f"{case.label}: {name}", call, case)
        outcomes.append(Outcome(f"{case.label}: {name}", call.masks))
    return results, outcomes


def judge_call(subject: str, call: Call, case: Case) -> list[CheckResult]:
    """Return the results on what a call gave back."""
    wrong = f"raised {call.raised}" if call.raised else f"a {call.returned}"
    is_dict = call.returned == "dict"
    returned = judge(subject, "returns a dict", [] if is_dict else [wrong], "a dict of tile ids and masks")
    by_id = {tile.tile_id: tile for tile in case.tiles}
    return [returned, *(judge_masks(subject, call.masks, by_id) if is_dict else [])]


def check_platform(candidate: Candidate, case: Case) -> Answer:
    """Call maskgeration as the platform does."""
    return check_calls(candidate, case, {"maskgeration": [case.band_folders, candidate.bare_weights]})


def check_maskgeration(candidate: Candidate, case: Case) -> Answer:
    """Call maskgeration as the platform does, as its documents say, and on a data folder, in one process."""
    with output_folder(candidate) as out:
        out.mkdir()
        calls: dict[str, list] = {
            "maskgeration(bands, model.pth)": [case.band_folders, candidate.bare_weights],
            "maskgeration(bands, OUT)": [case.band_folders, str(out)],
            "maskgeration(folder, model.pth)": [str(case.data), candidate.bare_weights],
        }
        results, outcomes = check_calls(candidate, case, calls)
        written = read_folder(out)
    judged, files = judge_files(f"{case.label}: maskgeration(bands, OUT), files", written, case, None)
    return [*results, *judged], [*outcomes, *files]
