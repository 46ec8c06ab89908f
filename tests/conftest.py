"""Fixtures for all tests: few threads, and the real training tiles where this machine has them."""

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

sys.path.insert(0, str(PROJECT))  # the kit is run from its folder, not installed
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_tiles() -> Path:
    """Return the folder with the 18 real training tiles; skip the test where it is absent."""
    if not (REAL_TILES / "Band1").is_dir():
        pytest.skip("the real tiles are not at ../shared/data/glacierhack/Train")
    return REAL_TILES
