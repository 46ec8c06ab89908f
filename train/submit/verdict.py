"""What a check found, the table of all of it, and the progress of commands that take minutes."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple, Sequence

from solution import MODEL_FILE, KitError

SUBMITTED = ("solution.py", MODEL_FILE)

SHOWN = 3  # faults of one kind that are spelt out
WIDTH = 150  # columns


class SubmissionError(KitError):
    """The submission cannot be checked or written; the message says why and what to do."""


class CheckResult(NamedTuple):
    """One line of the verdict: `check` on `subject`, what was found and what was expected.

    `doubtful` marks what passed although it was not as expected: a warning.
    """

    subject: str
    check: str
    passed: bool
    found: str
    expected: str
    doubtful: bool = False


def refuse_missing(*paths: Path) -> None:
    """Raise SubmissionError where one of the files is not there."""
    for path in paths:
        if not path.is_file():
            raise SubmissionError(f"{path}: no such file; train weights with `make train-all`, or name another")


def judge(subject: str, check: str, faults: Sequence[str], expected: str) -> CheckResult:
    """Return the result of a check that passes where there are no `faults`."""
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    found = "; ".join([*faults[:SHOWN], *more]) or expected
    return CheckResult(subject, check, not faults, found, expected)


def list_failures(results: Sequence[CheckResult]) -> list[CheckResult]:
    """Return the checks that failed."""
    return [result for result in results if not result.passed]


def format_results(results: Sequence[CheckResult]) -> str:
    """Return the table: each subject's passes, a line for each failure and warning, and the verdict."""
    lines = []
    for subject in dict.fromkeys(result.subject for result in results):
        own = [result for result in results if result.subject == subject]
        lines += [
            f"{'warn' if one.passed else 'FAIL'}  {subject}  {one.check}: found {one.found} / expected {one.expected}"
            for one in own
            if one.doubtful or not one.passed
        ]
        passes = [
            one.check if one.found == one.expected else f"{one.check} ({one.found})"
            for one in own
            if one.passed and not one.doubtful
        ]
        if passes:
            lines.append(textwrap.fill(f"pass  {subject}  {', '.join(passes)}", WIDTH, subsequent_indent=" " * 6))
    failed, doubtful = len(list_failures(results)), sum(result.doubtful for result in results)
    warned = f", {doubtful} of them with a warning" if doubtful else ""
    verdict = "it would be accepted" if failed == 0 else "it would NOT be accepted"
    return "\n".join([*lines, f"{len(results) - failed} checks passed{warned}, {failed} failed: {verdict}"])


class Steps:
    """Says on standard error what comes next, its number and the time since the start."""

    def __init__(self, total: int):
        self.total, self.done, self.started = total, 0, time.perf_counter()

    def announce(self, text: str) -> None:
        """Print the line of the next step."""
        self.done += 1
        elapsed = time.perf_counter() - self.started
        print(f"[{self.done}/{self.total}] {elapsed:4.0f} s  {text}", file=sys.stderr, flush=True)
