"""The timed run of the check: work is counted right, and what takes too long or does too much is said."""

import sys

import pytest
import support
import torch

from train.submit.check.budget import (
    MEMORY_AIM,
    Batch,
    Plan,
    check_budget,
    judge_memory,
    judge_seconds,
    judge_work,
    read_plan,
)
from train.submit.check.masks import Outcome, judge_agreement
from train.submit.check.processes import Candidate
from train.submit.check.verdict import CheckResult, format_results
from train.submit.limits import KNOWN_GMAC, KNOWN_SECONDS
from train.work import count_gmac

B0 = {"encoder_name": "efficientnet-b0"}


# --- Work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder, gmac", [("resnet34", 31.8), ("resnet18", 22.1)])
def test_multiply_adds_are_those_that_others_published(encoder, gmac):
    assert count_gmac({"name": "Unet", "args": {"encoder_name": encoder}}) == pytest.approx(gmac, abs=0.5)


def test_a_pass_at_half_the_resolution_is_a_quarter_of_the_work():
    whole, coarse = (count_gmac({"name": name, "args": B0}) for name in ("Unet", "CoarseUnet"))
    assert coarse == pytest.approx(whole / 4, rel=0.01)


def test_the_plan_follows_the_order_of_the_passes(tmp_path):
    path = support.write_model(tmp_path / "model.pth", member_weights=(1.0, 1.0), views=2, time_budget=30.0)
    content = torch.load(path, weights_only=True)
    content["members"][1] = support.stored_member({"name": "Unet", "args": {"encoder_name": "resnet18"}})
    torch.save(content, path)
    tiny, large = (count_gmac(member["arch"]) for member in content["members"])
    assert tiny < large / 4
    assert read_plan(path) == Plan(30.0, (tiny, large, tiny, large))
    path.write_text("of another kit")
    assert read_plan(path) == Plan(None, ())


def by_check(results: list[CheckResult]) -> dict[str, CheckResult]:
    """Return results by what they check."""
    return {result.check: result for result in results}


def test_work_done_is_that_of_the_passes_made():
    plan = Plan(45.0, (10.0, 20.0, 30.0))
    results = by_check(judge_work("tiles", plan, [1, 3]))
    assert results["work done"].found.startswith("35.0 GMAC a tile")  # the mean of 10 and 60
    assert results["work done"].found.endswith("in 1 to 3 passes")
    assert results["work of all passes"].found.startswith("60.0 GMAC a tile")
    assert all(result.passed and not result.doubtful for result in results.values())


def test_too_much_work_fails_unless_a_time_budget_bounds_it():
    much = (KNOWN_GMAC, 1.0)
    bounded = by_check(judge_work("tiles", Plan(45.0, much), [1]))
    assert not bounded["work done"].doubtful
    assert bounded["work of all passes"].passed and bounded["work of all passes"].doubtful
    unbounded = by_check(judge_work("tiles", Plan(None, much), [2]))
    assert not unbounded["work done"].passed and not unbounded["work of all passes"].passed


def test_work_is_not_judged_where_it_is_not_known():
    assert judge_work("tiles", Plan(None, ()), [1]) == []
    assert list(by_check(judge_work("tiles", Plan(45.0, (1.0,)), []))) == ["work of all passes"]


def test_seconds_and_memory_have_limits():
    assert judge_seconds("tiles", 44.9, KNOWN_SECONDS).passed
    late = judge_seconds("tiles", 45.2, KNOWN_SECONDS)
    assert not late.passed and "shorter time budget" in late.expected
    assert not judge_memory("tiles", int(MEMORY_AIM)).doubtful
    assert judge_memory("tiles", int(MEMORY_AIM) + 1).doubtful


def test_warnings_are_listed_and_do_not_fail():
    results = judge_work("tiles", Plan(45.0, (KNOWN_GMAC, 1.0)), [1])
    table = format_results([*results, judge_seconds("tiles", 1.0, KNOWN_SECONDS)])
    assert "warn  tiles  work of all passes: found 161.0 GMAC" in table
    assert "3 checks passed, 1 of them with a warning, 0 failed: it would be accepted" in table


# --- The run --------------------------------------------------------------------------------------


def timed(tmp_path, **content) -> dict[str, CheckResult]:
    """Return the results for the kit's own solution.py with a tiny model, on two tiny tiles."""
    weights = support.write_model(tmp_path / "model.pth", views=3, **content)
    candidate = Candidate(
        support.PROJECT / "solution.py", weights, tmp_path, sys.executable, lambda text: None
    )
    return by_check(check_budget(candidate, Batch(2, 64)))


def test_the_kits_own_solution_tells_its_passes_time_and_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("GLACIER_TIME_BUDGET", "0.001")  # the platform has no such variable
    results = timed(tmp_path, time_budget=40.0)
    seconds = results.pop("seconds")  # how many depends on what else this machine does
    assert float(seconds.found.split()[0]) > 0 and "at most 40 s" in seconds.expected
    assert [result for result in results.values() if not result.passed or result.doubtful] == []
    assert results["work done"].found == results["work of all passes"].found.replace("in 3", "in 3 to 3")
    assert 0.1 < float(results["peak memory"].found.split()[0]) < 2


def test_a_run_over_its_budget_fails(tmp_path):
    results = timed(tmp_path, time_budget=0.01)
    assert not results["seconds"].passed
    assert "at most 0.01 s" in results["seconds"].expected
    assert results["work done"].found.endswith("in 1 to 1 passes")


# --- Agreement ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share, agree", [(0.0, True), (0.0009, True), (0.002, False)])
def test_masks_may_differ_in_single_pixels(share, agree):
    one = torch.zeros(100, 100, dtype=torch.uint8).numpy()
    other = one.copy()
    other.reshape(-1)[: int(share * other.size)] = 85
    outcomes = [Outcome("one", {"001": one}), Outcome("other", {"001": other})]
    assert judge_agreement("callers", outcomes).passed == agree
