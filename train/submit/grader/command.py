"""The command `grader-check`: provides the environment, runs the check and prints what was found."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from train.submit.check.verdict import count_failures, format_results
from train.submit.grader import Submission, Tiles, Verdict, check_in_grader
from train.submit.grader.environment import (
    GRADER_VERSION,
    PYTHON_VARIABLE,
    Environment,
    GraderError,
    Interpreter,
    choose_interpreter,
    find_environment,
    provide_environment,
)


def grader_check(
    solution: Path, weights: Path, data: Path | None, count: int, size: int, optional: bool = False
) -> int:
    """Check a submission in the grader's environment, print the verdict and return 1 where something failed.

    Args:
        solution: the file to hand in. weights: its model.pth.
        data: tiles, None for synthetic ones. count: how many. size: side of synthetic ones in pixels.
        optional: where the environment cannot be had, say so and return 0.

    Raises:
        GraderError: the environment cannot be had, or a file is not there.
    """
    try:
        interpreter = choose_interpreter()
        if optional and interpreter.version[:2] != GRADER_VERSION:
            raise GraderError(f"no Python 3.9 was found, only {interpreter.label} ({interpreter.origin})")
        environment = announce_environment(interpreter)
    except GraderError as error:
        if not optional:
            raise
        print(f"grader-check: NOT MADE: {error}")
        return 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="grader-") as workdir:
        tiles = Tiles(data, count, size)
        verdict = check_in_grader(
            Submission(solution, weights), interpreter, environment, tiles, Path(workdir)
        )
    print(describe(verdict))
    print(f"grader-check: made in {interpreter.label}, {time.perf_counter() - started:.0f} s")
    return 1 if count_failures(verdict.results) else 0


def announce_environment(interpreter: Interpreter) -> Environment:
    """Return the environment, and say which Python it has and whether it had to be built."""
    say(f"{interpreter.label}, {interpreter.origin}: {interpreter.path}")
    if interpreter.version[:2] != GRADER_VERSION:
        say(
            "the grader has Python 3.9, and none was found on PATH, in pyenv or in uv: this checks its "
            f"packages, not its Python; name one in {PYTHON_VARIABLE}"
        )
    if find_environment(interpreter) is None:
        say("building its environment once: downloads 2 GB, takes 4 GB and some minutes")
    environment = provide_environment(interpreter)
    built = "found" if environment.built is None else f"built in {environment.built:.0f} s"
    say(f"environment {built}: {environment.python}")
    return environment


def say(text: str) -> None:
    """Print a line of progress on standard error."""
    print(f"grader-check: {text}", file=sys.stderr, flush=True)


def describe(verdict: Verdict) -> str:
    """Return the versions, how callers were closed in, the agreement and the results."""
    lines = [f"{report.label}\n  closed in by: {', '.join(report.layers)}" for report in verdict.reports]
    lines.append(
        "  and inputs, solution.py's folder and what lies beside it were compared before and after each run"
    )
    return "\n".join([*lines, "", verdict.table, "", format_results(verdict.results)])
