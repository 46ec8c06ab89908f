"""Would the submission be accepted? Runs it as the grader does, in bare folders, and judges what comes out.

Every caller is a process of its own whose working folder holds only copies of `solution.py` and `model.pth`,
with nothing of the project on its path, no cache of downloaded weights and a network that cannot be reached.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Callable

from train.submit.archive import SubmissionError
from train.submit.check.budget import WHOLE_BATCH, Batch, check_budget
from train.submit.check.callers import COMMAND_LINES, check_command_line, check_maskgeration
from train.submit.check.cases import Case, lay_out_cases
from train.submit.check.masks import Outcome, judge_agreement, judge_life, judge_names
from train.submit.check.processes import Candidate, copy_submission, find_interpreter
from train.submit.check.verdict import CheckResult
from train.submit.check.weights import check_damaged, check_loading, check_size, make_damaged_weights
from train.submit.steps import Steps


def check_submission(
    solution: Path,
    weights: Path,
    data: Path | None,
    workdir: Path,
    python: str = sys.executable,
    batch: Batch = WHOLE_BATCH,
) -> list[CheckResult]:
    """Check a submission from its weights to the masks of every caller; progress goes to standard error.

    Args:
        solution: the solution.py to submit, any that keeps this kit's interface.
        weights: its model.pth.
        data: folder with Band1 ... Band5; None makes synthetic tiles of both naming styles.
        workdir: an empty folder for tiles and masks; some tiles are left in it.
        python: the interpreter that runs the submission.
        batch: the synthetic tiles that are segmented against the clock.

    Raises:
        SubmissionError: a file or the interpreter is not there.
        solution.InputError, solution.TileError: `data` cannot be used.
    """
    for path in (solution, weights):
        if not path.is_file():
            raise SubmissionError(
                f"{path}: no such file; train weights with `make train-all`, or name another"
            )
    workdir = workdir.resolve()
    python = find_interpreter(python)
    cases = lay_out_cases(data, workdir)
    copies = copy_submission(solution, weights, workdir)
    damaged = make_damaged_weights(copies[1], workdir / "damaged")
    steps = Steps(1 + len(cases) * (len(COMMAND_LINES) + 1) + len(damaged) + 2)
    candidate = Candidate(*copies, workdir, python, steps.announce)
    from train.submit.reference import (  # here: it takes its verdicts from this package
        check_pin,
        check_reference,
    )

    results = [check_size(candidate.weights), check_pin(weights)]
    results += [*check_reference(weights), *check_loading(candidate, cases[0])]
    outcomes = []
    for case in cases:
        case_results, case_outcomes = check_case(candidate, case)
        results += case_results
        outcomes += case_outcomes[:1]
    if len(outcomes) > 1:
        results.append(judge_names(outcomes))
    results += check_damaged(candidate, cases[0], damaged)
    return results + check_budget(candidate, batch)


def check_case(candidate: Candidate, case: Case) -> tuple[list[CheckResult], list[Outcome]]:
    """Run every caller on one set of tiles; return the results, and the masks that each of them got."""
    results, outcomes = [], []
    callers: list[Callable] = [partial(check_command_line, line=line) for line in COMMAND_LINES]
    for check in [*callers, check_maskgeration]:
        caller_results, caller_outcomes = check(candidate, case)
        results += caller_results
        outcomes += caller_outcomes
    results.append(judge_agreement(case.label, outcomes))
    results.append(judge_life(case.label, outcomes))
    return results, outcomes
