"""The grader in a box: runs a submission under the grader's Python and packages, with nothing to write to and
no network, and compares its masks with those of the Python that runs this.

Every caller is run with one thread and with four, and one of them once more with NumPy 2, with which torch
2.0.1 cannot exchange arrays.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np

from prep.synthetic.scenes import write_sample
from prep.text import plural
from solution import MODEL_FILE, usable_cores
from train.submit.check.callers import COMMAND_LINES, call_maskgeration, check_command_line, judge_call
from train.submit.check.cases import SAMPLE_SEED, Case, lay_out_case
from train.submit.check.masks import SAME_SHARE, Mask, Outcome, judge_agreement, judge_life
from train.submit.check.processes import Candidate, copy_submission, judge_run, submitted_files
from train.submit.check.verdict import CheckResult, judge
from train.submit.grader.environment import Environment, GraderError, Interpreter
from train.submit.grader.sandbox import SCRATCH, Report, probe, sandbox_settings
from train.submit.steps import Steps

THREADS = (1, 4)
MOST_COLUMNS = 6  # tiles that the table shows


class Submission(NamedTuple):
    """The two files that are handed in."""

    solution: Path
    weights: Path


class Tiles(NamedTuple):
    """What is segmented: the first `most` tiles of `data`; where it is None, synthetic ones of `size` px."""

    data: Path | None
    most: int
    size: int


class Place(NamedTuple):
    """A Python, the folders that are first on its path, and its number of threads.

    `scratch`: whether it gets a folder for temporary files, without which newer torch cannot be imported.
    """

    label: str
    python: str
    path: tuple[Path, ...]
    threads: int
    scratch: bool = False


Answer = tuple[list[CheckResult], list[Outcome]]
Caller = Callable[[Candidate, Case], Answer]


class Job(NamedTuple):
    """One caller in one place."""

    place: Place
    name: str
    call: Caller


class Finished(NamedTuple):
    """What a job brought: `outcome` is None where there were no masks."""

    job: Job
    results: list[CheckResult]
    outcome: Outcome | None
    seconds: float


class Verdict(NamedTuple):
    """All results, what every Python says of itself, and the masks' agreement as a table."""

    results: list[CheckResult]
    reports: list[Report]
    table: str


# --- Callers --------------------------------------------------------------------------------------


def check_platform(candidate: Candidate, case: Case) -> Answer:
    """Call maskgeration as the platform does."""
    subject = f"{case.label}: maskgeration"
    candidate.announce(subject)
    calls = [[case.band_folders, str(candidate.workdir / "bare" / MODEL_FILE)]]
    report = call_maskgeration(candidate, submitted_files(candidate), calls, case)
    results = judge_run(subject, report.run)
    if not report.calls:
        return [*results, judge(subject, "calls", [report.run.last_words], "maskgeration was called")], []
    tiles = {tile.tile_id: tile for tile in case.tiles}
    return [*results, *judge_call(subject, report.calls[0], tiles)], [Outcome(subject, report.calls[0].masks)]


CALLERS: dict[str, Caller] = {
    "maskgeration": check_platform,
    **{line.label: partial(check_command_line, line=line) for line in COMMAND_LINES},
}


def list_jobs(here: Place, grader: Sequence[Place], numpy_2: Place) -> list[Job]:
    """Return every caller in each of the places `grader`, and one in each of the others."""
    places = [here, numpy_2]
    jobs = [Job(place, "maskgeration", check_platform) for place in places]
    return jobs + [Job(place, name, call) for place in grader for name, call in CALLERS.items()]


# --- Running --------------------------------------------------------------------------------------


def enter(place: Place, submission: Submission, workdir: Path, announce: Callable[[str], None]) -> Candidate:
    """Return the submission as it is run in `place`, closed in, with `workdir` to itself."""
    for name in ("home", SCRATCH):
        (workdir / name).mkdir(parents=True)
    (workdir / "home").chmod(0o555)
    (workdir / SCRATCH).chmod(0o755 if place.scratch else 0o555)
    settings = {
        **sandbox_settings(workdir, place.path, place.scratch),
        "OMP_NUM_THREADS": str(place.threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # or threads that wait would keep a busy machine from the others
        "CUDA_VISIBLE_DEVICES": "",  # the platform answers on a CPU, and masks are compared
    }
    return Candidate(submission.solution, submission.weights, workdir, place.python, announce, settings)


def run_job(job: Job, submission: Submission, case: Case, workdir: Path, announce: Callable) -> Finished:
    """Run one job in a folder of its own."""
    candidate = enter(job.place, submission, workdir, announce)
    started = time.perf_counter()
    results, outcomes = job.call(candidate, case._replace(label=job.place.label))
    return Finished(job, results, outcomes[0] if outcomes else None, time.perf_counter() - started)


def run_jobs(
    jobs: Sequence[Job], submission: Submission, case: Case, workdir: Path, announce: Callable
) -> list[Finished]:
    """Run all jobs, as many at a time as there are cores for their threads."""
    finished: list[Finished] = []
    for threads in sorted({job.place.threads for job in jobs}, reverse=True):
        batch = [job for job in jobs if job.place.threads == threads]
        folders = [workdir / f"{threads}-{number}" for number in range(len(batch))]
        with ThreadPoolExecutor(max(1, usable_cores() // threads)) as pool:
            runs = pool.map(
                lambda job, folder: run_job(job, submission, case, folder, announce), batch, folders
            )
            finished += runs
    return finished


def lay_out_tiles(tiles: Tiles, workdir: Path) -> Case:
    """Return the tiles as a read-only case in `workdir`.

    Raises:
        solution.InputError, solution.TileError: `tiles.data` cannot be used.
    """
    source = tiles.data
    if source is None:
        source = workdir / "scenes"
        write_sample(source, tiles.most, tiles.size, SAMPLE_SEED, "training", "phase2")
    return lay_out_case("", source, workdir / "case", tiles.most)


def check_in_grader(
    submission: Submission,
    interpreter: Interpreter,
    environment: Environment,
    tiles: Tiles,
    workdir: Path,
) -> Verdict:
    """Run a submission in the grader's environment and judge it; progress goes to standard error.

    Args:
        submission: what is handed in.
        interpreter: the Python of the environment.
        environment: the grader's packages.
        tiles: what to segment.
        workdir: an empty folder.

    Raises:
        GraderError: a file of the submission is not there.
        solution.InputError, solution.TileError: the tiles cannot be used.
    """
    for path in submission:
        if not path.is_file():
            raise GraderError(f"{path}: no such file; train weights with `make train-all`, or name another")
    workdir = workdir.resolve()
    submission = Submission(*copy_submission(*submission, workdir))
    case = lay_out_tiles(tiles, workdir)
    most = max(THREADS)
    here = Place("here", sys.executable, (), most, scratch=True)
    python = str(environment.python)
    grader = [Place(f"{interpreter.label}, {plural(n, 'thread')}", python, (), n) for n in THREADS]
    numpy_2 = Place(f"{interpreter.label}, NumPy 2", python, (environment.numpy_2,), most)
    results, reports = probe_places([here, grader[0], numpy_2], submission, case, workdir)
    if len(reports) < 3:  # without its sandbox nothing that a caller does means anything
        return Verdict(results, reports, "")
    jobs = list_jobs(here, grader, numpy_2)
    finished = run_jobs(jobs, submission, case, workdir, Steps(len(jobs)).announce)
    results += judge_finished(finished, here, numpy_2)
    return Verdict(results, reports, agreement_table(finished, here, case))


def probe_places(
    places: Sequence[Place], submission: Submission, case: Case, workdir: Path
) -> tuple[list[CheckResult], list[Report]]:
    """Try the sandbox in each place; return the results, and the reports of those where it held."""
    results, reports = [], []
    for number, place in enumerate(places):
        candidate = enter(place, submission, workdir / f"probe-{number}", lambda _text: None)
        found, report = probe(candidate, case._replace(label=place.label))
        results += found
        if report and all(result.passed for result in found):
            reports.append(report)
        if report and place.label != "here":
            own = judge(
                f"{place.label}: packages", "no others", list(report.present), "none but the grader's"
            )
            results.append(own)
    return results, reports


# --- The judgement --------------------------------------------------------------------------------


def judge_finished(finished: Sequence[Finished], here: Place, numpy_2: Place) -> list[CheckResult]:
    """Return the results of all jobs, and on whether their masks are the same everywhere."""
    results = [result for one in finished for result in one.results if is_counted(result, one, numpy_2)]
    reference = next((one.outcome for one in finished if one.job.place == here), None)
    others = [one for one in finished if one.job.place != here]
    outcomes = [one.outcome for one in others if one.outcome]
    if reference is None:
        return [*results, judge("here", "masks", ["none"], "masks to compare with")]
    results += [judge_against(reference, one) for one in others if one.outcome]
    if outcomes:
        results.append(judge_agreement("all callers", outcomes))
    results.append(judge_life("all callers", [reference, *outcomes]))
    return results


def is_counted(result: CheckResult, finished: Finished, numpy_2: Place) -> bool:
    """Return whether a result says something of the submission.

    torch 2.0.1 itself prints a traceback as it is imported beside NumPy 2, and goes on. One that ended the
    process shows in its exit status.
    """
    if finished.job.place != numpy_2 or result.check != "no fallback":
        return True
    return not all(complaint.startswith("Traceback") for complaint in result.found.split("; "))


def share_of_same(one: Mask, other: Mask | None) -> float:
    """Return the share of equal pixels, 0 where a mask is missing, unreadable or of another shape."""
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray) or one.shape != other.shape:
        return 0.0
    return float(np.mean(one == other))


def judge_against(reference: Outcome, finished: Finished) -> CheckResult:
    """Return whether a job's masks are those of the Python that runs this, tile by tile."""
    masks = finished.outcome.masks if finished.outcome else {}
    shares = {tile: share_of_same(mask, masks.get(tile)) for tile, mask in reference.masks.items()}
    worst = min(shares, key=lambda tile: shares[tile])
    subject = f"{finished.job.place.label}: {finished.job.name}"
    found = f"{shares[worst]:.4%} in tile {worst}, the worst"
    expected = f"{SAME_SHARE:.1%} of the pixels in every tile"
    return CheckResult(subject, "same masks as here", shares[worst] >= SAME_SHARE, found, expected)


def agreement_cell(reference: Outcome | None, outcome: Outcome | None, tile: str) -> str:
    """Return what the table says of one tile."""
    if reference is None or outcome is None or tile not in reference.masks or tile not in outcome.masks:
        return "no mask"
    if outcome is reference:
        return "reference"
    return f"{share_of_same(reference.masks[tile], outcome.masks[tile]):.4%}"


def agreement_table(finished: Sequence[Finished], here: Place, case: Case) -> str:
    """Return the share of pixels that are the same as here, for each job and tile, and the seconds."""
    reference = next((one.outcome for one in finished if one.job.place == here), None)
    tiles = [tile.tile_id for tile in case.tiles][:MOST_COLUMNS]
    title = f"{'pixels that are the same as here':54}{'seconds':>8}"
    lines = [title + "".join(f"{tile:>11}" for tile in tiles)]
    for one in finished:
        cells = [f"{agreement_cell(reference, one.outcome, tile):>11}" for tile in tiles]
        lines.append(f"{one.job.place.label:30}{one.job.name:24}{one.seconds:8.1f}" + "".join(cells))
    return "\n".join(lines)
