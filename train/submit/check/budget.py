"""Does a submission answer in time? Runs it as the platform does, on few cores, and counts its work.

What is known to pass the platform: 160 billion multiply-adds (GMAC) a tile, and an answer within 45 s in all.
Three views of 161 GMAC ended in HTTP 504. The platform's real limits are not published.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from prep.synthetic.scenes import write_sample
from solution import (
    MODEL_FILE,
    InputError,
    read_model_file,
    usable_cores,
)
from train.submit.check.cases import SAMPLE_SEED, Case, lay_out_case
from train.submit.check.processes import Candidate, Run, judge_run, run_bare, submitted_files
from train.submit.check.verdict import CheckResult, judge
from train.submit.limits import KNOWN_GMAC, KNOWN_SECONDS
from train.submit.memory import peak_memory
from train.work import count_gmac

MEMORY_AIM = 2e9  # bytes; what the platform has is not known
MOST_CORES = 2  # the platform's cores are few
TILE_SIZE = 512  # px, of the competition's tiles


class Batch(NamedTuple):
    """How many synthetic tiles of which side in pixels are segmented against the clock."""

    tiles: int
    size: int


WHOLE_BATCH = Batch(25, TILE_SIZE)  # as many as the public set has


class Plan(NamedTuple):
    """What a model file means to do: seconds that a run may take, None for any, and the GMAC of each of its
    passes over a tile of 512 x 512 px, in order."""

    time_budget: float | None
    gmac: tuple[float, ...]


class TimedRun(NamedTuple):
    """A run against the clock: how many masks, passes by tile id (none where not told), peak bytes."""

    run: Run
    tiles: int
    passes: Mapping[str, int]
    peak_memory: int


# --- The work of a model --------------------------------------------------------------------------


def read_plan(weights: Path) -> Plan:
    """Return the plan of a model file; of one in another format nothing is known, and it has no passes."""
    try:
        content = read_model_file(weights)
    except InputError:
        return Plan(None, ())
    gmac = [count_gmac(member["arch"]) for member in content["members"]]
    return Plan(content.get("time_budget"), tuple(gmac[member] for member, _ in content["passes"]))


# --- The run --------------------------------------------------------------------------------------

TIMED_CODE = f"""
import json, sys
{inspect.getsource(peak_memory)}
import solution
summaries = []
if hasattr(solution, "segment_folder"):
    segment_folder = solution.segment_folder

    def remember(*args, **settings):
        summaries.append(segment_folder(*args, **settings))
        return summaries[-1]

    solution.segment_folder = remember
request = json.loads(sys.argv[1])
masks = solution.maskgeration(request["bands"], request["weights"])
passes = summaries[0].passes if summaries else {{}}
with open(request["report"], "w") as stream:
    json.dump({{"tiles": len(masks), "passes": passes, "peak_memory": peak_memory()}}, stream)
"""


def lay_out_batch(batch: Batch, workdir: Path) -> Case:
    """Return synthetic tiles with the platform's names, read-only."""
    scenes = workdir / "timed-scenes"
    write_sample(scenes, batch.tiles, batch.size, SAMPLE_SEED, "platform", "phase2")
    label = f"{batch.tiles} tiles of {batch.size} px"
    return lay_out_case(label, scenes, workdir / "timed")


def run_timed(candidate: Candidate, case: Case) -> TimedRun:
    """Import the submission and call maskgeration in a process that has MOST_CORES threads and no GPU.

    No variable sets its time budget: it is the one that is stored with the weights, as on the platform.
    """
    report = candidate.workdir / "timed.json"
    weights = str(candidate.workdir / "bare" / MODEL_FILE)
    request = {"bands": case.band_folders, "weights": weights, "report": str(report)}
    settings = {"OMP_NUM_THREADS": str(timed_cores()), "CUDA_VISIBLE_DEVICES": ""}
    arguments = ["-c", TIMED_CODE, json.dumps(request)]
    run = run_bare(candidate, submitted_files(candidate), arguments, case, settings)
    if not report.is_file():
        return TimedRun(run, 0, {}, 0)
    return TimedRun(run, **json.loads(report.read_text()))


def timed_cores() -> int:
    """Return how many threads a timed run gets."""
    return min(MOST_CORES, usable_cores())


def check_budget(candidate: Candidate, batch: Batch) -> list[CheckResult]:
    """Segment a batch of tiles under the stored time budget; return the results on time, work and memory."""
    plan = read_plan(candidate.weights)
    limit = min(plan.time_budget or KNOWN_SECONDS, KNOWN_SECONDS)
    cores = timed_cores()
    candidate.announce(f"{batch.tiles} tiles of {batch.size} px within {limit:g} s, threads: {cores}")
    case = lay_out_batch(batch, candidate.workdir)
    timed = run_timed(candidate, case)
    subject = f"{case.label}, threads: {cores}"
    results = judge_run(subject, timed.run)
    if not timed.tiles:
        return [*results, judge(subject, "seconds", [timed.run.last_words], "maskgeration returned masks")]
    return [
        *results,
        judge_count(subject, timed.tiles, batch.tiles),
        judge_seconds(subject, timed.run.seconds, limit),
        *judge_work(subject, plan, list(timed.passes.values())),
        judge_memory(subject, timed.peak_memory),
    ]


# --- The judgement --------------------------------------------------------------------------------


def judge_count(subject: str, found: int, tiles: int) -> CheckResult:
    """Return whether there is a mask of every tile."""
    faults = [] if found == tiles else [f"{found} masks"]
    return judge(subject, "a mask for every tile", faults, f"{tiles} masks")


def judge_seconds(subject: str, seconds: float, limit: float) -> CheckResult:
    """Return whether the whole process, from starting Python to its end, took no longer than `limit`."""
    expected = f"at most {limit:g} s; on an idle machine, pack lighter networks or a shorter time budget"
    return CheckResult(subject, "seconds", seconds <= limit, f"{seconds:.1f} s with start", expected)


def judge_work(subject: str, plan: Plan, passes: Sequence[int]) -> list[CheckResult]:
    """Return the results on the GMAC a tile of the passes that were made and of all of them.

    Args:
        subject: of the results.
        plan: the passes of the model.
        passes: how many of them each tile got; none where the submission does not tell.
    """
    if not plan.gmac:
        return []
    everything = sum(plan.gmac)
    results = [
        judge_gmac(subject, "work of all passes", everything, f"{len(plan.gmac)} passes", plan.time_budget)
    ]
    if passes:
        made = sum(sum(plan.gmac[:count]) for count in passes) / len(passes)
        counted = f"{min(passes)} to {max(passes)} passes"
        results.insert(0, judge_gmac(subject, "work done", made, counted, plan.time_budget))
    return results


def judge_gmac(subject: str, check: str, gmac: float, passes: str, time_budget: float | None) -> CheckResult:
    """Return whether so much work a tile is known to pass; if not, it is a failure unless time bounds it."""
    found = f"{gmac:.1f} GMAC a tile of 512 px in {passes}"
    fits = gmac <= KNOWN_GMAC
    bounded = time_budget is not None
    expected = f"at most {KNOWN_GMAC:g} GMAC; " + (
        f"the time budget of {time_budget:g} s bounds it"
        if bounded
        else "leave out passes or pack a time_budget"
    )
    return CheckResult(subject, check, fits or bounded, found, expected, doubtful=bounded and not fits)


def judge_memory(subject: str, peak: int) -> CheckResult:
    """Return the peak memory, with a warning where it is more than small machines have."""
    found, expected = f"{peak / 1e9:.2f} GB", f"at most {MEMORY_AIM / 1e9:g} GB"
    return CheckResult(subject, "peak memory", True, found, expected, doubtful=peak > MEMORY_AIM)
