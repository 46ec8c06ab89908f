"""What `solution.py` is timed against: the same masks from the same weights, written down without any thought
of speed. One network and one view at a time with torch as it starts, reading and writing in between.

Of `solution.py` it takes what decides the masks and costs little: the architectures, units and the steps
after the mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Mapping, NamedTuple

import cv2
import numpy as np
import tifffile
import torch

import solution
from solution import BANDS, CLASS_VALUES, STRIDE, TileFiles

Turn = Callable[[np.ndarray], np.ndarray]
# The views of `solution.VIEWS`, in its order, of an array (C, H, W): there and back.
TURNS: tuple[tuple[Turn, Turn], ...] = (
    (lambda x: x, lambda x: x),
    (lambda x: x[:, :, ::-1], lambda x: x[:, :, ::-1]),
    (lambda x: x[:, ::-1], lambda x: x[:, ::-1]),
    (lambda x: np.rot90(x, 1, (1, 2)), lambda x: np.rot90(x, -1, (1, 2))),
    (lambda x: np.rot90(x, 2, (1, 2)), lambda x: np.rot90(x, -2, (1, 2))),
    (lambda x: np.rot90(x, 3, (1, 2)), lambda x: np.rot90(x, -3, (1, 2))),
)


class PlainMember(NamedTuple):
    """A network, its weight in the mean, and mean and standard deviation of its bands, each (5, 1, 1)."""

    network: torch.nn.Module
    weight: float
    mean: np.ndarray
    std: np.ndarray


def segment(data: Path, weights: Path, out: Path) -> int:
    """Write a mask of every tile of `data` to the folder `out`, as PNG; return the number of passes.

    Tiles have at most `solution.LARGEST_TILE` px a side and all their bands; 0 is nodata.
    """
    content = torch.load(weights, map_location="cpu", weights_only=True)
    members = [load_member(stored) for stored in content["members"]]
    count = 0
    for files in solution.find_tiles(data):
        bands = read_bands(files)
        inputs = [normalize(bands, member.mean, member.std) for member in members]
        total = np.zeros((4,) + bands.shape[1:], np.float32)
        for number, view in content["passes"]:
            member = members[number]
            share = member.weight / sum(number == other for other, _ in content["passes"])
            total += share * predict(member.network, inputs[number], TURNS[view])
            count += 1
        mask = finish(total / total.sum(axis=0), bands, content)
        cv2.imwrite(str(out / f"{Path(files.name).stem}.png"), mask)
    return count


def load_member(stored: Mapping) -> PlainMember:
    """Return a member as it is stored: its BatchNorms stay layers of their own."""
    network = solution.build_network(stored["arch"])
    network.load_state_dict({name: tensor.float() for name, tensor in stored["state_dict"].items()})
    network.eval()
    return PlainMember(network, stored["weight"], *statistics(stored["normalization"]))


def statistics(normalization: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the bands, each (5, 1, 1) float32."""
    mean, std = (np.array(normalization[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    return mean, std


def read_bands(files: TileFiles) -> np.ndarray:
    """Return a tile in reflectance and kelvin, (5, H, W) float32, NaN where nodata."""
    bands = np.stack([tifffile.imread(path).astype(np.float32) for path in files.paths])
    bands[bands == 0] = np.nan
    scale, offset = (
        np.array([getattr(band, key) for band in BANDS], np.float32) for key in ("scale", "offset")
    )
    return bands * scale.reshape(-1, 1, 1) + offset.reshape(-1, 1, 1)


def normalize(bands: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return (x - mean) / std of `bands` (5, H, W), 0 where nodata."""
    return np.nan_to_num((bands - mean) / std, nan=0.0)


def predict(network: torch.nn.Module, inputs: np.ndarray, turn: tuple[Turn, Turn]) -> np.ndarray:
    """Return the class probabilities (4, H, W) of one network in one view of normalised bands (5, H, W)."""
    there, back = turn
    height, width = inputs.shape[1:]
    padded = np.pad(inputs, ((0, 0), (0, -height % STRIDE), (0, -width % STRIDE)))
    with torch.no_grad():
        logits = network(torch.from_numpy(there(padded).copy())[None])
        probs = torch.softmax(logits, dim=1)[0].numpy()
    return back(probs)[:, :height, :width]


def finish(probs: np.ndarray, bands: np.ndarray, content: Mapping) -> np.ndarray:
    """Return the mask (H, W) of mean probabilities (4, H, W): class bias, CRF, decision, cleaning."""
    steps = solution.Postprocess(**content["postprocess"])
    valid = ~np.isnan(bands).all(axis=0)
    probs = solution.apply_bias(probs, content["class_bias"], steps.extent_bias)
    if steps.crf:
        features = normalize(bands, *statistics(content["members"][0]["normalization"]))
        probs = solution.apply_crf(probs, features, valid, steps.crf)
    classes = solution.clean_classes(solution.decide_classes(probs), valid, steps.min_speck, steps.min_hole)
    return np.array(CLASS_VALUES, np.uint8)[classes]
