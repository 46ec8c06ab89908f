"""Tiny models and scenes for the tests of what is done with masks."""

import math
from pathlib import Path

import numpy as np
import torch

import solution

ARCH = {
    "name": "Unet",
    "args": {"encoder_name": "mobilenet_v2", "encoder_depth": 3, "decoder_channels": [16, 8, 8]},
}
NORMALIZATION = {"mean": [0.7, 0.7, 0.7, 0.05, 256.0], "std": [0.55, 0.55, 0.55, 0.08, 9.0]}
KIND: dict = {}
POSTPROCESS = {"min_speck": 5, "min_hole": 5}


def networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return an extent and a kind network with seeded weights, whose answers differ from place to place."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extent, kind = solution.build_network(ARCH), solution.KindNet(**KIND)
        sample = torch.randn(2, 5, 64, 64)
        for network in (extent, kind):
            network.train()
            for _ in range(20):  # the statistics of its BatchNorms
                network(sample)
            network.eval()
            head = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)][-1]
            with torch.no_grad():
                std, mean = torch.std_mean(network(sample))
                head.weight *= 2 / std
                head.bias.copy_((head.bias - mean) * 2 / std)
    return extent, kind


def tiny_model(views: int = 1) -> solution.Model:
    """Return a model of one tiny member in so many views, and a kind network."""
    extent, kind = networks()
    passes = tuple((0, view) for view in range(views))
    members = (solution.Member(extent, 1.0, NORMALIZATION),)
    steps = solution.Postprocess(**POSTPROCESS)
    kind_member = solution.Member(kind.eval(), 1.0, NORMALIZATION)
    return solution.Model(members, kind_member, passes, steps, math.inf, torch.device("cpu"), {})


def textured_numbers(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return (height, width, 5) stored values of a smooth random scene, 0 in a corner."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((height // 8 + 1, width // 8 + 1, 5))
    smooth = np.kron(coarse, np.ones((8, 8, 1)))[:height, :width]
    smooth += 0.1 * rng.standard_normal((height, width, 5))
    numbers = [33000, 33000, 33000, 9500, 31000] + smooth * [9000, 9000, 9000, 1500, 1500]
    numbers[: height // 8, : width // 8] = 0
    return np.round(np.where(numbers > 0, np.clip(numbers, 1000, 65000), 0)).astype(np.float32)


def write_tiny_model(path: Path, views: int = 1) -> Path:
    """Write the networks of `tiny_model` as a model file and return its path."""
    extent, kind = networks()
    content = {
        "format": solution.MODEL_FORMAT,
        "members": [_stored(ARCH, extent)],
        "kind": _stored({"name": "KindNet", "args": KIND}, kind),
        "passes": [[0, view] for view in range(views)],
        "postprocess": POSTPROCESS,
        "time_budget": None,
    }
    torch.save(content, path)
    return path


def _stored(arch: dict, network: torch.nn.Module) -> dict:
    return {"arch": arch, "weight": 1.0, "normalization": NORMALIZATION, "state_dict": network.state_dict()}
