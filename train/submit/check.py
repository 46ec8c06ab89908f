"""Would the submission be accepted? Its weights, the masks of every caller, hostile files, and the clock.

What is known to pass the platform is an answer within 45 s in all; its real limit is not published.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from prep.synthetic.scenes import NAMINGS
from solution import MODEL_FILE, InputError, read_model_file, usable_cores
from train.submit import callers
from train.submit.assemble import add_submission_files, find_solution
from train.submit.callers import COMMAND_LINES, Candidate
from train.submit.reference import check_shipped
from train.submit.tiles import (
    Case,
    Outcome,
    damage_case,
    judge_agreement,
    judge_life,
    lay_out_case,
    lay_out_samples,
)
from train.submit.verdict import CheckResult, Steps, format_results, judge, list_failures

MAX_BYTES = 300_000_000  # of model.pth; the organisers say so
KNOWN_SECONDS = 45.0  # in all, starting Python included; entries that took longer ended in HTTP 504
SAMPLES = 3, 256  # tiles of so many px for each way of naming them
MEMORY_AIM = 2e9  # bytes; what the platform has is not known
MOST_CORES = 2  # the platform's cores are few
NO_MASKS_STATUS = 2  # of a run that could not start
TOO_SLOW = "seconds"  # the one check whose outcome depends on what else the machine does
FREE_SHARE = 0.9  # of its cores' time that work gets at least where nothing else runs
FIXED_WORK = 8, 2**25  # so often the SHA-256 of so many bytes: some tenths of a second


def check_submission(
    solution: Path, weights: Path, data: Path | None, workdir: Path, timed_tiles: int, timed_size: int = 512
) -> list[CheckResult]:
    """Check a submission from its weights to the masks of every caller; progress goes to standard error.

    Args:
        solution: the solution.py to submit, any that keeps this kit's interface.
        weights: its model.pth.
        data: folder with Band1 ... Band5; None makes synthetic tiles of both naming styles.
        workdir: an empty folder for tiles and masks; some tiles are left in it.
        timed_tiles: how many synthetic tiles of `timed_size` px are segmented against the clock.

    Raises:
        SubmissionError: a file is not there.
        solution.InputError, solution.TileError: `data` cannot be used.
    """
    load, workdir = os.getloadavg()[0], workdir.resolve()  # the load before the check adds its own
    copies = callers.copy_submission(solution, weights, workdir)
    if data is not None:
        cases = [lay_out_case("given tiles", data, workdir / "given")]
    else:
        cases = [lay_out_samples(f"{naming} names", *SAMPLES, naming, workdir) for naming in NAMINGS]
    damaged = damage_weights(copies[1], workdir / "damaged")
    steps = Steps(1 + len(cases) * (len(COMMAND_LINES) + 1) + 1 + 2 * len(damaged) + 1)
    candidate = Candidate(copies[0], copies[1], workdir, sys.executable, steps.announce)
    results = [check_size(weights), *check_shipped(weights), check_loading(candidate, cases[0])]
    named = []
    for case in cases:
        case_results, outcomes = check_case(candidate, case)
        ordered = [mask for _, mask in sorted(outcomes[0].masks.items())]
        named.append(Outcome(case.label, {str(number): mask for number, mask in enumerate(ordered, 1)}))
        results += case_results
    if data is None:
        results.append(judge_agreement("naming styles", named))
    results += check_damaged_tile(candidate, damage_case(cases[0], workdir / "damaged tile"))
    for fault, path in damaged.items():
        results += check_damaged_weights(candidate, cases[0], fault, path)
    return results + check_clock(candidate, timed_tiles, timed_size, load)


def check_case(candidate: Candidate, case: Case) -> tuple[list[CheckResult], list[Outcome]]:
    """Run every caller on one set of tiles; return the results, and the masks that each of them got."""
    answers = [callers.check_command_line(candidate, case, line) for line in COMMAND_LINES]
    answers.append(callers.check_maskgeration(candidate, case))
    results = [result for found, _ in answers for result in found]
    outcomes = [outcome for _, got in answers for outcome in got]
    return [*results, judge_agreement(case.label, outcomes), judge_life(case.label, outcomes)], outcomes


# --- Weights and hostile files --------------------------------------------------------------------


def check_size(weights: Path) -> CheckResult:
    """Return whether the weights are small enough to be handed in."""
    size = weights.stat().st_size
    found, expected = f"{size / 1e6:.1f} MB", f"at most {MAX_BYTES / 1e6:.0f} MB"
    return CheckResult(MODEL_FILE, "size", size <= MAX_BYTES, found, expected)


def check_loading(candidate: Candidate, case: Case) -> CheckResult:
    """Return whether the submission's own strict loader takes the weights."""
    candidate.announce(f"{MODEL_FILE}: loading")
    run = callers.run_bare(candidate, ["-c", f"import solution; solution.load_model({MODEL_FILE!r})"], case)
    faults = [] if run.status == 0 else [run.ending]
    return judge(MODEL_FILE, "strict loading", faults, "solution.load_model takes it")


def damage_weights(weights: Path, folder: Path) -> dict[str, Path]:
    """Write weights that none should take for good ones; return {what is wrong: file}, one of them absent."""
    damaged = {"no weights": folder / "absent.pth", "weights cut in half": folder / "cut.pth"}
    folder.mkdir()
    whole = weights.read_bytes()
    damaged["weights cut in half"].write_bytes(whole[: len(whole) // 2])
    try:
        content = read_model_file(weights)
    except InputError:  # another format, in which no tensor can be left out
        return damaged
    content["members"][0]["state_dict"].popitem()
    torch.save(content, folder / "lacking.pth")
    return {**damaged, "a tensor missing": folder / "lacking.pth"}


def check_damaged_weights(candidate: Candidate, case: Case, fault: str, weights: Path) -> list[CheckResult]:
    """Return whether damaged weights stop both kinds of caller: no masks, least of all random ones."""
    candidate, case = candidate._replace(weights=weights), case._replace(label=fault)
    run, masks = callers.run_command_line(candidate, case, COMMAND_LINES[0])
    status = [] if run.status == NO_MASKS_STATUS else [run.ending]
    candidate.announce(f"{fault}: maskgeration")
    called, calls, _ = callers.call_maskgeration(candidate, [[case.band_folders, candidate.bare_weights]], case)
    raised = calls and calls[0].raised
    returned = [] if raised else ["masks were returned" if calls else called.last_words]
    return [
        judge(fault, "refused by a command line", status, f"exit status {NO_MASKS_STATUS}"),
        judge(fault, "no masks", sorted(masks), "no file"),
        judge(fault, "refused by maskgeration", returned, "an error is raised"),
    ]


def check_damaged_tile(candidate: Candidate, case: Case) -> list[CheckResult]:
    """Return whether a tile that cannot be read whole gets a mask, and costs the others none."""
    candidate.announce(f"{case.label}: maskgeration")
    run, calls, _ = callers.call_maskgeration(candidate, [[case.band_folders, candidate.bare_weights]], case)
    subject = f"{case.label}: maskgeration"
    called = judge(subject, "called", [] if calls else [run.last_words], "it returns")
    return [called, *(result for call in calls for result in callers.judge_call(subject, call, case))]


# --- The clock ------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """What else the machine does: the load average before the check, and the share of its cores' time that a
    fixed piece of work gets."""

    load: float
    share: float

    @property
    def busy(self) -> bool:
        """Whether a run must be expected to take longer than it would alone."""
        free = (os.cpu_count() or 1) - self.load
        return self.share < FREE_SHARE or free < timed_cores() - 0.5

    def __str__(self) -> str:
        state = "busy" if self.busy else "free"
        return f"machine {state}: load {self.load:.1f} on {os.cpu_count()} cores, work gets {self.share:.0%}"


def measure_machine(load: float) -> Machine:
    """Return how busy the machine is now: on cores that are shared, work gets a part of the time only."""
    times, size = FIXED_WORK
    content = bytes(size)

    def work(_number: int) -> tuple[float, float]:
        clock, cpu = time.perf_counter(), time.thread_time()
        for _ in range(times):
            hashlib.sha256(content).digest()  # lets other threads run meanwhile
        return time.thread_time() - cpu, time.perf_counter() - clock

    with ThreadPoolExecutor(timed_cores()) as pool:
        got, passed = map(sum, zip(*pool.map(work, range(timed_cores()))))
    return Machine(load, min(1.0, got / passed))


def timed_cores() -> int:
    """Return how many threads a timed run gets."""
    return min(MOST_CORES, usable_cores())


def check_clock(candidate: Candidate, tiles: int, size: int, load: float) -> list[CheckResult]:
    """Call maskgeration on synthetic tiles, as the platform does, on few threads and without a GPU; once more
    where it took too long.

    No variable sets a time budget: it is the one that is stored with the weights, as on the platform.
    """
    subject = f"{tiles} tiles of {size} px, threads: {timed_cores()}"
    case = lay_out_samples("timed", tiles, size, "platform", candidate.workdir)
    settings = {"OMP_NUM_THREADS": str(timed_cores()), "CUDA_VISIBLE_DEVICES": ""}
    timed, call = candidate._replace(settings=settings), [case.band_folders, candidate.bare_weights]
    machine = measure_machine(load)
    candidate.announce(f"{subject}, within {KNOWN_SECONDS:g} s; {machine}")
    run, calls, peak = callers.call_maskgeration(timed, [call], case)
    machine = min(machine, measure_machine(load), key=lambda one: one.share)
    if run.seconds > KNOWN_SECONDS:
        print(f"{run.seconds:.1f} s, {machine}; once more", file=sys.stderr, flush=True)
        again = callers.call_maskgeration(timed, [call], case)
        if again[0].seconds < run.seconds:
            run, calls, peak = again
        machine = min(machine, measure_machine(load), key=lambda one: one.share)
    return [
        *callers.judge_run(subject, run),
        *(result for one in calls for result in callers.judge_call(subject, one, case)),
        judge_seconds(subject, run.seconds, run.last_words, machine),
        *([judge_memory(subject, peak)] if peak else []),
    ]


def judge_seconds(subject: str, seconds: float, said: str, machine: Machine) -> CheckResult:
    """Return whether the whole process, from starting Python to its end, was fast enough; if it was not, that
    is a warning where the machine was busy. `said` is its last line."""
    late = seconds > KNOWN_SECONDS
    remedy = "check again when the machine is free" if machine.busy else "`python -m train pack` with --time-budget 40"
    expected = f"at most {KNOWN_SECONDS:g} s" + (f"; {remedy}" if late else "")
    found = f"{seconds:.1f} s with start ({said}; {machine})"
    return CheckResult(subject, TOO_SLOW, machine.busy or not late, found, expected, machine.busy and late)


def judge_memory(subject: str, peak: int) -> CheckResult:
    """Return the peak memory, with a warning where it is more than small machines have."""
    found, expected = f"{peak / 1e9:.2f} GB", f"at most {MEMORY_AIM / 1e9:g} GB"
    return CheckResult(subject, "peak memory", True, found, expected, doubtful=peak > MEMORY_AIM)


# --- The command ----------------------------------------------------------------------------------


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check`."""
    add_submission_files(parser)
    parser.add_argument("--timed-tiles", type=int, default=25, metavar="N", help="tiles of the timed run (default: 25)")


def run_check(arguments: argparse.Namespace) -> int:
    """Run the submission as the grader does and say whether it would be accepted; exit status 1 if not."""
    with tempfile.TemporaryDirectory(prefix="solution-") as folder:
        solution = find_solution(arguments.solution, arguments.weights, Path(folder))
        return 1 if check_and_print(arguments, solution) else 0


def check_and_print(arguments: argparse.Namespace, solution: Path) -> set[str]:
    """Check a submission, print the table, and return the names of the checks that failed."""
    with tempfile.TemporaryDirectory(prefix="check-") as workdir:
        given = (arguments.weights, arguments.data, Path(workdir), arguments.timed_tiles)
        results = check_submission(solution, *given)
    print(format_results(results))
    return {result.check for result in list_failures(results)}
