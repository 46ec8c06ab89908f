"""Tiny models, band folders and submissions for the tests of solution.py."""

import importlib.util
import math
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Mapping, Optional, Sequence

import numpy as np
import tifffile
import torch
from torch import nn

import solution
from prep.synthetic.scenes import make_scene, to_numbers

PROJECT = Path(solution.__file__).resolve().parent
TINY_ARCH = {
    "name": "Unet",
    "args": {"encoder_name": "mobilenet_v2", "encoder_depth": 3, "decoder_channels": [16, 8, 8]},
}
NORMALIZATION = {"mean": [0.7, 0.7, 0.7, 0.05, 256.0], "std": [0.55, 0.55, 0.55, 0.08, 9.0]}
PLAIN = solution.Postprocess(crf=None, min_speck=0, min_hole=0)
CRF = {
    "smooth_px": 2.0,
    "smooth_weight": 1.0,
    "bilateral_px": 8.0,
    "bilateral_std": 0.5,
    "bilateral_weight": 3.0,
    "iterations": 5,
}


# --- Models ---------------------------------------------------------------------------------------


def random_network(arch: Mapping = TINY_ARCH, seed: int = 0) -> nn.Module:
    """Return a network of one logit with seeded weights, in eval mode.

    Its BatchNorms have random scales and offsets, and the statistics of a batch of noise.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = solution.build_network(arch)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.6, 1.4)
                nn.init.normal_(module.bias, 0, 0.3)
                module.momentum = 0.9
        with torch.no_grad():
            network.train()(torch.randn(4, 5, 64, 64))
        return spread_logits(network.eval())


def random_kind(seed: int = 0) -> solution.KindNet:
    """Return a tiny network of the kind with seeded weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return spread_logits(solution.KindNet(hidden=4).eval())


def spread_logits(network: nn.Module) -> nn.Module:
    """Scale the last convolution so that both answers win somewhere: logits of mean 0 and deviation 1."""
    head = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        std, mean = torch.std_mean(network(torch.randn(1, 5, 64, 64)))
        head.weight *= 1 / std
        head.bias.copy_((head.bias - mean) / std)
    return network


def stored(network: nn.Module, arch: Mapping, weight: float = 1.0) -> dict:
    """Return a network as model.pth stores it: float16 weights, float32 BatchNorm statistics."""
    state = {
        name: tensor.half() if tensor.is_floating_point() and "running_" not in name else tensor
        for name, tensor in network.state_dict().items()
    }
    return {"arch": arch, "weight": weight, "fold": None, "normalization": NORMALIZATION, "state_dict": state}


def stored_member(arch: Mapping = TINY_ARCH, seed: int = 0, weight: float = 1.0) -> dict:
    """Return a member of the extent as model.pth stores it."""
    return {**stored(random_network(arch, seed), arch, weight), "batchnorms": []}


def stored_kind(seed: int = 0) -> dict:
    """Return a network of the kind as model.pth stores it."""
    return stored(random_kind(seed), {"name": "KindNet", "args": {"hidden": 4}})


def passes_of(members: int, views: int) -> tuple[solution.Pass, ...]:
    """Return all pairs of a member and one of the first so many views, view by view."""
    return tuple((member, view) for view in range(views) for member in range(members))


def model_content(
    member_weights: Sequence[float] = (1.0,),
    postprocess: solution.Postprocess = PLAIN,
    views: int = 1,
    time_budget: Optional[float] = None,
    kind: bool = True,
) -> dict:
    """Return the content of a model file with one tiny member for each of `member_weights`."""
    return {
        "format": solution.MODEL_FORMAT,
        "members": [stored_member(seed=seed, weight=weight) for seed, weight in enumerate(member_weights)],
        "kind": stored_kind() if kind else None,
        "passes": [list(one) for one in passes_of(len(member_weights), views)],
        "postprocess": postprocess._asdict(),
        "time_budget": time_budget,
        "recipe": "tiny",
        "provenance": {},
    }


def write_model(path: Path, **content) -> Path:
    """Write a tiny model file; `content` as for model_content."""
    torch.save(model_content(**content), path)
    return path


def in_memory(
    *networks: nn.Module,
    weights: Sequence[float] = (),
    postprocess: solution.Postprocess = PLAIN,
    views: int = 1,
    kind: Optional[nn.Module] = None,
) -> solution.Model:
    """Return a model of these networks in the first so many views; their weights are 1 unless given."""
    shares = weights or [1.0] * len(networks)
    members = tuple(solution.Member(network.eval(), weight, NORMALIZATION) for network, weight in zip(networks, shares))
    return solution.Model(
        members,
        solution.Member(kind.eval(), 1.0, NORMALIZATION) if kind else None,
        passes_of(len(networks), views),
        postprocess,
        math.inf,
        torch.device("cpu"),
        {},
    )


# --- Tiles ----------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def scene_numbers(index: int, size: int = 96) -> np.ndarray:
    """Return a synthetic scene as stored, (size, size, 5) float32 scaled integers, 0 where nodata."""
    numbers = to_numbers(make_scene(seed=3, size=size, index=index).bands)
    numbers.setflags(write=False)
    return numbers


def file_name(band: solution.Band, naming: str, identifier: str, suffix: str = ".tif") -> str:
    """Return a band's file name: "platform" is img001.tif, "training" is B2_B2_masked_02_07.tif."""
    if naming == "platform":
        return f"img{identifier}{suffix}"
    return f"{band.landsat}_{band.landsat}_masked_{identifier}{suffix}"


def write_tile(
    root: Path,
    identifier: str,
    numbers: np.ndarray,
    naming: str = "platform",
    dtype=np.float32,
    suffix: str = ".tif",
) -> None:
    """Write (H, W, 5) stored values as five band files of type `dtype` under `root`/Band1 ... Band5."""
    for index, band in enumerate(solution.BANDS):
        path = root / band.folder / file_name(band, naming, identifier, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, numbers[..., index].astype(dtype), photometric="minisblack")


def contents(folder: Path) -> dict:
    """Return {relative path: bytes} of all files below `folder`, to see what a run changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_readonly(folder: Path) -> None:
    """Take away the write permission of all that is in `folder` (root may write all the same)."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


# --- Submissions ----------------------------------------------------------------------------------


def make_submission(folder: Path, model: Path) -> Path:
    """Make `folder` with nothing but solution.py and model.pth in it."""
    folder.mkdir(parents=True)
    shutil.copy(PROJECT / "solution.py", folder / "solution.py")
    shutil.copy(model, folder / "model.pth")
    return folder


def import_submission(folder: Path) -> ModuleType:
    """Import `folder`/solution.py, as a caller does who has put the folder on its path."""
    spec = importlib.util.spec_from_file_location("submitted_solution", folder / "solution.py")
    module = importlib.util.module_from_spec(spec)
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = keep
    module.usable_cores = lambda: 1  # tests run beside other work
    return module
