"""Runs a submission as a process of its own, in a bare folder, and judges how that went."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence

from solution import MODEL_FILE, TIME_BUDGET_VARIABLE
from train.submit.archive import SubmissionError
from train.submit.check.cases import Case, compare_snapshots, set_modes, take_snapshot
from train.submit.check.verdict import CheckResult, judge

START_LIMIT = 300  # s until a caller that has not finished is stopped, and as many more for each tile:
TILE_LIMIT = 120

UNHURRIED = {TIME_BUDGET_VARIABLE: "inf"}  # masks can be compared only where all of them rest on all passes

COMPLAINT = re.compile(r"^\s*(warning|error|fatal|traceback)\b", re.IGNORECASE)
# Not among the grader's packages: what `solution.py` says without it is no fallback there but the rule.
TOLERATED = ("pydensecrf",)
CLOSED_PORT = (
    "http://127.0.0.1:9"  # a proxy that refuses at once: a download fails instead of passing by luck
)


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
        lines = self.output.strip().splitlines()
        return lines[-1] if lines else "nothing was printed"


class Candidate(NamedTuple):
    """What is under test, where it is tested, and `announce`, which is told of each process to come.

    `settings` are environment variables of all its processes.
    """

    solution: Path
    weights: Path
    workdir: Path
    python: str
    announce: Callable[[str], None]
    settings: Mapping[str, str] = {}


def copy_submission(solution: Path, weights: Path, workdir: Path) -> tuple[Path, Path]:
    """Return copies of both files, which stay as they are during a check of minutes."""
    folder = workdir / "submission"
    folder.mkdir()
    copies = folder / "solution.py", folder / MODEL_FILE
    for path, copy in zip((solution, weights), copies):
        shutil.copyfile(path, copy)
    return copies


def submitted_files(candidate: Candidate) -> dict[str, Path]:
    """Return what the bare folder holds."""
    return {"solution.py": candidate.solution, MODEL_FILE: candidate.weights}


@contextmanager
def bare_folder(workdir: Path, files: Mapping[str, Path]) -> Iterator[Path]:
    """Give a read-only folder with copies of `files` {name: path} and nothing else; it goes afterwards."""
    folder = workdir / "bare"
    folder.mkdir()
    try:
        for name, path in files.items():
            shutil.copyfile(path, folder / name)
        set_modes(folder, 0o444, 0o555)
        yield folder
    finally:
        set_modes(folder, 0o644, 0o755)
        shutil.rmtree(folder)


def bare_environment(home: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with `settings` and without Python's and solution.py's, caches and a
    way to the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GLACIER_"))}
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    caches = ("HOME", "TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME")
    return {**kept, **dict.fromkeys(proxies, CLOSED_PORT), **dict.fromkeys(caches, str(home)), **settings}


def run_bare(
    candidate: Candidate,
    files: Mapping[str, Path],
    arguments: Sequence[str],
    case: Case,
    settings: Mapping[str, str] = UNHURRIED,
) -> Run:
    """Run the interpreter with `arguments` in a bare folder of `files`; watch that folder and the inputs.

    `settings` are environment variables, and go before those of the candidate.
    """
    home = candidate.workdir / "home"
    home.mkdir(exist_ok=True)
    inputs = take_snapshot(case.folder)
    with bare_folder(candidate.workdir, files) as folder:
        beside = take_snapshot(folder)
        started = time.perf_counter()
        try:
            process = subprocess.run(
                [candidate.python, *arguments],
                cwd=folder,
                env=bare_environment(home, {**candidate.settings, **settings}),
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
    status = [] if run.status == 0 else [describe_status(run)]
    complaints = [
        line.strip()
        for line in run.output.splitlines()
        if COMPLAINT.match(line) and not any(word in line for word in TOLERATED)
    ]
    return [
        judge(subject, "exit status", status, "0"),
        judge(subject, "no fallback", complaints, "no warning, no error"),
        judge(subject, "inputs untouched", run.changed_inputs, "as they were"),
        judge(subject, "nothing written beside it", run.changed_beside, "as it was"),
    ]


def describe_status(run: Run) -> str:
    """Return how a process ended, with its last line."""
    if run.status is None:
        return f"stopped after {run.seconds:.0f} s; last line: {run.last_words}"
    return f"{run.status}; last line: {run.last_words}"


@contextmanager
def output_folder(candidate: Candidate) -> Iterator[Path]:
    """Give the path of a folder for masks that is not there yet; it goes afterwards."""
    folder = candidate.workdir / "out"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_interpreter(python: str) -> str:
    """Return the path of an interpreter that is given as a path or as a command.

    Raises:
        SubmissionError: it does not run.
    """
    try:
        command = [python, "-c", "import sys; print(sys.executable)"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SubmissionError(
            f"{python}: does not run as Python ({error}); name another with --python"
        ) from error
