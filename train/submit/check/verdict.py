"""What a check found, and the table of all of them."""

from __future__ import annotations

import textwrap
from typing import NamedTuple, Sequence

SHOWN = 3  # faults of one kind that are spelt out
TABLE_WIDTH = 150  # columns


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


def judge(subject: str, check: str, faults: Sequence[str], expected: str) -> CheckResult:
    """Return the result of a check that passes where there are no `faults`."""
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    found = "; ".join([*faults[:SHOWN], *more]) or expected
    return CheckResult(subject, check, not faults, found, expected)


def count_failures(results: Sequence[CheckResult]) -> int:
    """Return how many checks failed."""
    return sum(not result.passed for result in results)


def format_results(results: Sequence[CheckResult]) -> str:
    """Return the table: each subject's passes, a line for each failure and warning, and the verdict."""
    subjects = list(dict.fromkeys(result.subject for result in results))
    width = max(map(len, subjects))
    lines = [line for subject in subjects for line in format_subject(subject.ljust(width), subject, results)]
    failed, doubtful = count_failures(results), sum(result.doubtful for result in results)
    warned = f", {doubtful} of them with a warning" if doubtful else ""
    verdict = "it would be accepted" if failed == 0 else "it would NOT be accepted"
    return "\n".join([*lines, f"{len(results) - failed} checks passed{warned}, {failed} failed: {verdict}"])


def format_subject(title: str, subject: str, results: Sequence[CheckResult]) -> list[str]:
    """Return the lines of one subject: failures and warnings in full, passes by name and measurement."""
    own = [result for result in results if result.subject == subject]
    passes = [
        result.check if result.found == result.expected else f"{result.check} ({result.found})"
        for result in own
        if result.passed and not result.doubtful
    ]
    others = [
        f"{'warn' if result.passed else 'FAIL'}  {title}  {result.check}: "
        f"found {result.found} / expected {result.expected}"
        for result in own
        if result.doubtful or not result.passed
    ]
    indent = " " * (len("pass  ") + len(title) + 2)
    listed = textwrap.fill(", ".join(passes), TABLE_WIDTH, initial_indent=indent, subsequent_indent=indent)
    return others + ([f"pass  {title}  {listed.lstrip()}"] if passes else [])
