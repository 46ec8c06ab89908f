"""Fixtures for all tests: few threads, the real tiles where this machine has them, and slow tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch is loaded, and for every process that a test starts: on busy cores threads wait for each
# other, which makes small networks slower by orders of magnitude.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
REAL_TILES = PROJECT.parent / "shared" / "data" / "glacierhack" / "Train"
MOST_PROCESSES = 8  # each takes 1 to 2 GB
LEFT_OUT = pytest.StashKey[int]()

sys.path.insert(0, str(PROJECT))  # the kit is run from its folder, not installed
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_tiles() -> Path:
    """Return the folder with the 18 real training tiles; skip the test where it is absent."""
    if not (REAL_TILES / "Band1").is_dir():
        pytest.skip("the real tiles are not at ../shared/data/glacierhack/Train")
    return REAL_TILES


# --- Tests side by side ---------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes share the tests with `-n auto`: one for each core that may be used."""
    from solution import cpu_quota

    return min(len(os.sched_getaffinity(0)), max(1, cpu_quota()), MOST_PROCESSES)


# --- Slow tests that are left out are told --------------------------------------------------------


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the slow tests that this process left out."""
    for item in items:
        if item.get_closest_marker("slow"):
            count(item.config, 1)


def count(config: pytest.Config, more: int) -> None:
    """Note so many more slow tests that were left out."""
    config.stash[LEFT_OUT] = config.stash.get(LEFT_OUT, 0) + more
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Take over what a process counted; each collects all tests, so that all count the same."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many slow tests were left out, and how they are run."""
    if config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{config.stash[LEFT_OUT]} slow tests were left out: make test SLOW=yes runs them")
