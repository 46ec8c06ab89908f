"""The grader in a box: runs a submission under the grader's Python and packages, with nothing to write to and
no network, and compares its masks with those of the Python that runs this."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

from prep.text import plural
from train.submit.assemble import add_submission_files, find_solution
from train.submit.callers import (
    COMMAND_LINES,
    UNHURRIED,
    Answer,
    Candidate,
    check_command_line,
    check_platform,
    copy_submission,
)
from train.submit.grader.environment import GraderError, choose_interpreter, provide_environment
from train.submit.grader.sandbox import SCRATCH, check_sandbox, sandbox_settings
from train.submit.tiles import Case, judge_agreement, judge_life, lay_out_case, lay_out_samples
from train.submit.verdict import CheckResult, Steps, format_results, list_failures

THREADS = (1, 4)


class Tiles(NamedTuple):
    """What is segmented: the first `most` tiles of `data`; where it is None, synthetic ones of `size` px."""

    data: Path | None
    most: int
    size: int


def enter(files: Sequence[Path], workdir: Path, python: str, threads: int, announce: Callable) -> Candidate:
    """Return the submission `files` as `python` runs it, closed in, with `workdir` to itself."""
    scratch = python == sys.executable  # newer torch cannot be imported without a folder for temporary files
    for name, mode in (("home", 0o555), (SCRATCH, 0o755 if scratch else 0o555)):
        (workdir / name).mkdir(parents=True)
        (workdir / name).chmod(mode)
    settings = {
        **UNHURRIED,
        **sandbox_settings(workdir, scratch),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # or threads that wait would keep a busy machine from the others
        "CUDA_VISIBLE_DEVICES": "",  # the platform answers on a CPU, and masks are compared
    }
    return Candidate(files[0], files[1], workdir, python, announce, settings)


def lay_out_tiles(tiles: Tiles, workdir: Path) -> Case:
    """Return the tiles as a read-only case in `workdir`."""
    if tiles.data is None:
        return lay_out_samples("sample", tiles.most, tiles.size, "training", workdir)
    return lay_out_case("given", tiles.data, workdir / "given", tiles.most)


def check_in_grader(
    files: Sequence[Path], python: str, tiles: Tiles, workdir: Path, label: str = "Python 3.9"
) -> list[CheckResult]:
    """Run a submission in the grader's environment, and here, and judge it; progress goes to standard error.

    Args:
        files: solution.py and model.pth.
        python: that of the environment.
        tiles: what to segment.
        workdir: an empty folder.
        label: of the environment.

    Raises:
        KitError: a file of the submission is not there, or the tiles cannot be used.
    """
    workdir = workdir.resolve()
    files, case = copy_submission(files[0], files[1], workdir), lay_out_tiles(tiles, workdir)
    steps = Steps(1 + len(THREADS) * (1 + len(COMMAND_LINES)))
    places = {"here": (sys.executable, max(THREADS))}
    places |= {f"{label}, {plural(threads, 'thread')}": (python, threads) for threads in THREADS}
    candidates = {
        name: enter(files, workdir / str(number), *place, steps.announce)
        for number, (name, place) in enumerate(places.items())
    }
    results = [check_sandbox(candidate, case, name) for name, candidate in candidates.items()]
    if list_failures(results):  # without its sandbox nothing that a caller does means anything
        return results
    answers: list[Answer] = []
    for name, candidate in candidates.items():
        placed = case._replace(label=name)
        answers.append(check_platform(candidate, placed))
        if name != "here":
            answers += [check_command_line(candidate, placed, line) for line in COMMAND_LINES]
    results += [result for found, _ in answers for result in found]
    outcomes = [outcome for _, got in answers for outcome in got]  # the first is that of here
    return [*results, judge_agreement("masks", outcomes), judge_life("masks", outcomes)]


def grader_check(solution: Path, weights: Path, tiles: Tiles, optional: bool = False) -> int:
    """Check a submission in the grader's environment, print the verdict and return 1 where something failed.

    Args:
        solution: the file to hand in.
        weights: its model.pth.
        tiles: what to segment.
        optional: where the environment cannot be had, say so and return 0.

    Raises:
        KitError: the environment cannot be had, or as check_in_grader.
    """
    started = time.perf_counter()
    try:
        interpreter = choose_interpreter()
        python = provide_environment(interpreter)
    except GraderError as error:
        if not optional:
            raise
        print(f"grader-check: NOT MADE: {error}")
        return 0
    with tempfile.TemporaryDirectory(prefix="grader-") as workdir:
        results = check_in_grader((solution, weights), str(python), tiles, Path(workdir), interpreter.label)
    print(format_results(results))
    print(f"grader-check: made in {interpreter.label}, {time.perf_counter() - started:.0f} s")
    return 1 if list_failures(results) else 0


def add_grader_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `grader-check`."""
    add_submission_files(parser)
    parser.add_argument("--tiles", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="px, of synthetic ones (default: %(default)s)")
    parser.add_argument(
        "--optional", action="store_true", help="where Python 3.9 or its packages cannot be had, end well"
    )


def run_grader_check(arguments: argparse.Namespace) -> int:
    """Run the submission under Python 3.9 and the grader's packages, read-only and without network; exit
    status 1 where a caller fails or the masks are others than here."""
    tiles = Tiles(arguments.data, arguments.tiles, arguments.size)
    with tempfile.TemporaryDirectory(prefix="solution-") as folder:
        solution = find_solution(arguments.solution, arguments.weights, Path(folder))
        return grader_check(solution, arguments.weights, tiles, arguments.optional)
