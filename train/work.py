"""Counts the multiply-adds of a network's pass: what a budget in GMAC a tile is held against."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from solution import BANDS, WINDOW, BoostedTrees, build_network

# What takes as long as one test of a tree: on one core, 800 trees of 30 tests take 3.9 s a tile, a U-Net of
# 31.8 GMAC (resnet34 with scse) 0.95 s.
MULTIPLY_ADDS_OF_A_TEST = 20


def count_gmac(arch: Mapping) -> float:
    """Return the 10^9 multiply-adds of a pass over a tile of 512 x 512 px; of trees, what takes as long."""
    return _count_gmac(json.dumps(arch, sort_keys=True))


@lru_cache(maxsize=None)
def _count_gmac(arch: str) -> float:
    network = build_network(json.loads(arch)).eval()
    if isinstance(network, BoostedTrees):
        tests = sum(network.trees) * (network.LEAVES - 1)
        return MULTIPLY_ADDS_OF_A_TEST * tests * WINDOW**2 / 1e9
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, len(BANDS), WINDOW, WINDOW))
    return counter.get_total_flops() / 2 / 1e9  # it counts a multiplication and an addition as two
