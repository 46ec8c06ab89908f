"""Required packages: torch, torchvision, segmentation_models_pytorch, numpy, tifffile, opencv-python

GlacierHack 2025: Landsat-8 tiles in, glacier masks out. Optional package: pydensecrf (dense CRF).

    python solution.py IN_DIR OUT_DIR                      one PNG a tile, stem of Band1's file
    python solution.py --data D --masks M --out O          one TIFF a tile, named exactly as in Band1
    python solution.py --imagepath D --output O            the same
    solution.maskgeration({"Band1": dir, ...}, second)     a dict {tile_id: uint8 (H, W) mask}

A data folder holds Band1 ... Band5 (blue, green, red, SWIR-1, thermal), one single-band TIFF a tile in each.
A mask holds 0 (other), 85 (glacier), 170 (debris-covered glacier) and 255 (glacial lake). The weights are
`model.pth`, named by --weights, or found beside this file, in the working folder, or in `weights/` of either.

Part 1, the method, reads in the order of the data: bands and classes, units and normalisation, networks, views,
ensemble, CRF and clean-up, mask. Part 2, the service, is what a run needs besides: files of any origin, the
weights file, clock and threads, writing, and the doors for its callers.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before the slow imports, which a time budget has to count

import argparse
import lzma
import math
import os
import re
import sys
import tempfile
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar, Union, cast

# Read when torch is loaded: waiting threads sleep. On cores shared with other work, threads that spin instead
# make a pass several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import tifffile
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

try:  # not among the grader's packages
    import pydensecrf.densecrf as densecrf
except ImportError:
    densecrf = None


class KitError(Exception):
    """Something that the user can mend; the message names what was found, what was expected, what to do."""


class InputError(KitError):
    """The run cannot start: no tiles, no weights, or nowhere to write."""


class TileError(KitError):
    """One tile cannot be segmented; the message names file, finding, expectation and remedy."""


# ==================================================================================================
# Part 1: the method
# ==================================================================================================


# --- Bands and classes ----------------------------------------------------------------------------
class Band(NamedTuple):
    """One input band; `scale` and `offset` turn a stored value into `unit`."""

    folder: str
    landsat: str
    name: str
    unit: str
    scale: float
    offset: float


# Scale factors: USGS, Landsat 8-9 Collection 2 Level 2 Science Product Guide, LSDS-1619.
BANDS = (
    Band("Band1", "B2", "blue", "reflectance", 2.75e-5, -0.2),
    Band("Band2", "B3", "green", "reflectance", 2.75e-5, -0.2),
    Band("Band3", "B4", "red", "reflectance", 2.75e-5, -0.2),
    Band("Band4", "B6", "SWIR-1", "reflectance", 2.75e-5, -0.2),
    Band("Band5", "B10", "thermal", "kelvin", 0.00341802, 149.0),
)
CLASS_NAMES = ("other", "glacier", "debris", "lake")
CLASS_VALUES = (0, 85, 170, 255)


# --- Units and normalisation ----------------------------------------------------------------------
def to_physical(values: np.ndarray, band: Band) -> np.ndarray:
    """Return stored Level-2 integers, any shape, as float32 in the band's unit; NaN stays NaN."""
    return (values * np.float32(band.scale) + np.float32(band.offset)).astype(np.float32)


def valid_mask(image: np.ndarray) -> np.ndarray:
    """Return (H, W) bool: True where at least one of the bands of `image` (H, W, 5) has a value."""
    valid = np.zeros(image.shape[:2], bool)
    for index in range(image.shape[2]):  # band by band: no temporary of the size of the scene
        valid |= ~np.isnan(image[..., index])
    return valid


def normalize(image: np.ndarray, normalization: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Return an image (H, W, 5) in physical units, NaN where nodata, as a network's input: (5, H, W) float32 of
    (x - mean) / std with the statistics of the network's training tiles, nodata 0."""
    mean, std = (np.asarray(normalization[key], np.float32) for key in ("mean", "std"))
    scaled = np.nan_to_num((image - mean) / std, nan=0.0)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))  # (5, H, W)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a float32 array as a tensor on the same memory, by the buffer protocol: `torch.from_numpy` and
    `Tensor.numpy` fail where torch < 2.3 meets numpy >= 2 ("Numpy is not available")."""
    array = np.ascontiguousarray(array, np.float32)
    return torch.frombuffer(array, dtype=torch.float32).reshape(array.shape)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy of a tensor of any device as a float32 array, by the buffer protocol."""
    array = np.empty(tuple(tensor.shape), np.float32)
    torch.frombuffer(array, dtype=torch.float32).copy_(tensor.reshape(-1))
    return array


# --- Networks -------------------------------------------------------------------------------------
# Two questions, two kinds of networks. The extent, glacier of either kind or not, is a matter of shapes: a
# U-Net. Which kind a glacier pixel is, clean or debris-covered, is a matter of the surface around it: U-Nets
# remember where the few labelled tongues lie, so a small network on local statistics answers it.

STRIDE = 32  # the coarsest feature map of the encoders: image sides are padded to a multiple of it
MOST_DEVIATIONS = 6.0  # normalised bands further from their mean count as so far in the kind's statistics
twice_as_large = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)


def local_statistics(x: torch.Tensor, levels: int) -> Iterator[torch.Tensor]:
    """Yield what is around each place of normalised bands (B, 5, H, W), sides multiples of STRIDE: (B, 31, h, w)
    for each of `levels` windows of 4, 8, 16 ... px that overlap by half, so that h = H / 2, H / 4 ...

    Of each band the mean, the standard deviation, the largest and the least value (in the thermal band: how
    high above the valley floor), the differences of the mean north and south, west and east (which way a
    slope faces); and the share of the window that has data (masked cloud and shadow tell of what is beside
    them). A band that is exactly 0 is nodata: it does not count.
    """
    known = (x != 0).to(x.dtype)
    nothing = torch.full_like(x, -MOST_DEVIATIONS)
    sums = torch.cat([known, x, x * x, known.amax(dim=1, keepdim=True)], dim=1)  # (B, 16, H, W)
    tops = torch.cat([torch.where(known > 0, sign * x, nothing) for sign in (1, -1)], dim=1)  # (B, 10, H, W)
    for _ in range(levels):
        share, mean, squares, data = nn.functional.avg_pool2d(sums, 4, 2, 1).split([5, 5, 5, 1], dim=1)
        share = share.clamp(min=1e-6)
        mean, squares = mean / share, squares / share
        deviation = (squares - mean * mean).clamp(min=0).sqrt()
        extremes = nn.functional.max_pool2d(tops, 4, 2, 1)
        near = nn.functional.pad(mean, (1, 1, 1, 1), mode="replicate")
        north_south = near[:, :, :-2, 1:-1] - near[:, :, 2:, 1:-1]
        west_east = near[:, :, 1:-1, :-2] - near[:, :, 1:-1, 2:]
        yield torch.cat([mean, deviation, extremes, north_south, west_east, data], dim=1)
        sums, tops = nn.functional.avg_pool2d(sums, 2), nn.functional.max_pool2d(tops, 2)


class KindNet(nn.Module):
    """The kind of a glacier pixel: a perceptron on its bands and on the statistics of ever larger windows.

    One hidden layer, small on purpose: labelled debris covers a few dozen tongues, which a larger network
    learns by heart. Each window's share of the hidden layer is computed where its statistics are, on a coarse
    grid, and interpolated to the next finer one; that is the same as interpolating the statistics themselves.
    """

    LEVELS = 5  # windows of 4 to 64 px, 120 m to 2 km
    STATISTICS = 31  # of each window

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.pixel = nn.Conv2d(len(BANDS), hidden, 1)
        self.around = nn.ModuleList(nn.Conv2d(self.STATISTICS, hidden, 1) for _ in range(self.LEVELS))
        self.last = nn.Conv2d(hidden, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 1, H, W), debris against clean ice, of normalised bands (B, 5, H, W)."""
        x = x.clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        parts = [layer(maps) for layer, maps in zip(self.around, local_statistics(x, self.LEVELS))]
        hidden = torch.zeros_like(parts[-1])
        for part in reversed(parts):  # from coarse to fine
            hidden = twice_as_large(hidden + part)
        return self.last(torch.relu(hidden + self.pixel(x)))


NETWORKS: dict[str, Callable[..., nn.Module]] = {"Unet": smp.Unet}  # with one logit: the extent
# --- Further networks are put in here by train/submit/assemble.py ---


def build_network(arch: Mapping) -> nn.Module:
    """Return a network of the extent, {"name": a key of NETWORKS, "args": its arguments}, with random weights.

    It maps normalised bands (B, 5, H, W), sides multiples of STRIDE, to logits (B, 1, H, W) of glacier of
    either kind. Raises InputError where there is no such network here.
    """
    if arch["name"] not in NETWORKS:
        here = f"network {arch['name']!r} is not among {', '.join(NETWORKS)} of this solution.py"
        raise InputError(f"{here}; use the one that `python -m train pack` wrote beside such a model")
    sizes = {"in_channels": len(BANDS), "classes": 1, "encoder_weights": None}
    return NETWORKS[arch["name"]](**{**arch.get("args", {}), **sizes})


# --- Views ----------------------------------------------------------------------------------------
class View(NamedTuple):
    """One view of test-time augmentation: a batch (B, C, H, W) mirrored along some axes, then turned."""

    name: str
    axes: tuple[int, ...]
    quarter_turns: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(self.axes).rot90(self.quarter_turns, (2, 3))

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x.rot90(-self.quarter_turns, (2, 3)).flip(self.axes)


VIEWS = (
    View("identity", (), 0),
    View("horizontal flip", (3,), 0),
    View("vertical flip", (2,), 0),
    *(View(f"rotation {90 * turns}", (), turns) for turns in (1, 2, 3)),
)


def pad_to_multiple(x: torch.Tensor, multiple: int = STRIDE) -> torch.Tensor:
    """Return (B, C, H, W) padded below and right with zeros (nodata) to multiples of `multiple`."""
    height, width = x.shape[2:]
    return nn.functional.pad(x, (0, -width % multiple, 0, -height % multiple))


# --- Ensemble -------------------------------------------------------------------------------------
Pass = tuple[int, int]  # over an image: the number of a member and of one of VIEWS
Prediction = tuple[np.ndarray, int]  # probabilities (4, H, W) float32 of the classes, passes they rest on


class Member(NamedTuple):
    """One network, its weight in the average, and the statistics that its input is normalised with."""

    network: nn.Module
    weight: float
    normalization: Mapping[str, Sequence[float]]


class Postprocess(NamedTuple):
    """What follows the forward passes; `model.pth` stores what out-of-fold MCC decided."""

    extent_bias: float = 0.0  # added to the logit of glacier of either kind
    debris_bias: float = 0.0  # added to the logit of debris given glacier
    crf: Crf | None = None  # None: no CRF
    min_speck: int = 0  # px, smaller patches of a glacier or lake class go to what surrounds them
    min_hole: int = 0  # px, smaller gaps in them are filled


class Model(NamedTuple):
    """All that prediction needs, as read from `model.pth`."""

    members: tuple[Member, ...]  # of the extent
    kind: Member | None  # tells debris from clean ice; None: all glacier is clean
    passes: tuple[Pass, ...]  # each network once, then more views: where time is short, the last are left out
    postprocess: Postprocess
    time_budget: float  # seconds that a run may take, infinite where it may take any
    device: torch.device
    pace: dict[int, float]  # seconds a pixel of a member's latest pass, learned on the way
    workers: int = 1  # threads that segment tiles side by side


def member_logits(member: Member, image: np.ndarray, view: View, device: torch.device) -> torch.Tensor:
    """Return a member's logits (H, W) of an image (H, W, 5) in physical units, as seen in `view`."""
    height, width = image.shape[:2]
    x = to_tensor(normalize(image, member.normalization))[None].to(device)  # (1, 5, H, W)
    x = pad_to_multiple(x).contiguous(memory_format=torch.channels_last)  # sides are multiples of STRIDE
    with torch.inference_mode():
        logits = view.inverse(member.network(view.forward(x)))  # (1, 1, H', W')
    return logits[0, 0, :height, :width].float().cpu()


def extent_probability(
    model: Model, image: np.ndarray, passes: Sequence[Pass], until: float = math.inf
) -> tuple[torch.Tensor, int]:
    """Return the probability (H, W) of glacier of either kind of an image (H, W, 5) in physical units, and the
    number of passes it is the mean of.

    It is the weighted mean over members of the mean of each member's passes: a member's weight does not
    depend on how many of its views there was time for. The first of `passes` is always made; a further one
    where its member's latest pass (or, before that, the slowest other's) took less than is left until the
    time `until` of `time.perf_counter`.
    """
    pixels = image.shape[0] * image.shape[1]
    seen: dict[int, list[torch.Tensor]] = {}  # by member
    for number, (member, view) in enumerate(passes):
        started = time.perf_counter()
        expected = model.pace.get(member, max(model.pace.values(), default=0.0)) * pixels
        if number > 0 and started + expected > until:
            break
        logits = member_logits(model.members[member], image, VIEWS[view], model.device)
        seen.setdefault(member, []).append(logits.sigmoid())
        model.pace[member] = (time.perf_counter() - started) / pixels
    weights = [model.members[member].weight for member in seen]
    parts = [weight * torch.stack(maps).mean(dim=0) for weight, maps in zip(weights, seen.values())]
    return torch.stack(parts).sum(dim=0) / sum(weights), sum(map(len, seen.values()))


def class_probabilities(extent: torch.Tensor, debris: torch.Tensor) -> np.ndarray:
    """Return probabilities (4, H, W) float32 of the classes: from glacier of either kind, and debris given that.

    Lakes get none: two small ones in the labels are no basis for a network, and snow lies over both.
    """
    return to_array(torch.stack([1 - extent, extent * (1 - debris), extent * debris, 0 * extent]))


def predict_window(model: Model, image: np.ndarray, until: float = math.inf) -> Prediction:
    """Return the class probabilities of an image (H, W, 5) small enough for one pass."""
    valid, steps = valid_mask(image), model.postprocess
    if not valid.any():  # nothing was seen: certain background, without a forward pass
        nothing = torch.zeros(image.shape[:2])
        return class_probabilities(nothing, nothing), len(model.passes)
    extent, passes = extent_probability(model, image, model.passes, until)  # (H, W)
    debris = torch.zeros_like(extent)
    if model.kind:
        debris = member_logits(model.kind, image, VIEWS[0], model.device).add(steps.debris_bias).sigmoid()
    extent = extent.logit(eps=1e-6).add(steps.extent_bias).sigmoid()
    probs = class_probabilities(extent, debris)  # (4, H, W)
    if steps.crf:
        features = normalize(image, model.members[0].normalization)  # (5, H, W)
        probs = refine_with_crf(probs, features, valid, steps.crf)
    return probs, passes


# --- Scenes: windows that overlap, blended --------------------------------------------------------
LARGEST_TILE = 1024  # px; larger images are processed in windows
WINDOW = 512  # px, the size of the training tiles
OVERLAP = 128  # px shared by neighbouring windows, where their probabilities are blended


def window_starts(length: int) -> list[int]:
    """Return the starts of windows of WINDOW px that cover `length` px and overlap by OVERLAP px or more."""
    last = max(length - WINDOW, 0)
    return [*range(0, last, WINDOW - OVERLAP), last]


def blend_weights(height: int, width: int) -> np.ndarray:
    """Return (H, W) float32 weights that rise linearly from a window's edges over OVERLAP px, never 0."""
    to_edge = (np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) for n in (height, width))
    return np.outer(*(np.minimum(px / OVERLAP, 1).astype(np.float32) for px in to_edge))


def predict_scene(model: Model, image: np.ndarray, until: float = math.inf) -> Prediction:
    """Return blended scores (4, H, W) float32 of a large image from overlapping windows.

    Each gets an equal part of the time left; one that is not begun in time is background, of no pass.
    """
    total = np.zeros((len(CLASS_NAMES), *image.shape[:2]), np.float32)
    starts = [(top, left) for top in window_starts(image.shape[0]) for left in window_starts(image.shape[1])]
    windows = [np.s_[top : top + WINDOW, left : left + WINDOW] for top, left in starts]
    workers = most_workers(model)

    def predict(number: int) -> Prediction:
        part = image[windows[number]]
        if time.perf_counter() > until:
            return np.zeros((len(CLASS_NAMES), *part.shape[:2]), np.float32), 0
        return predict_window(model, part, share_of_time(until, workers / (len(windows) - number)))

    fewest = len(model.passes)
    for number, (probs, passes) in enumerate(side_by_side(predict, range(len(windows)), workers)):
        total[(slice(None), *windows[number])] += probs * blend_weights(*probs.shape[1:])
        fewest = min(fewest, passes)
        if number % 20 == 19:
            say(f"  {number + 1} of {len(windows)} windows of {WINDOW} px")
    return total, fewest  # the scale of a pixel's weights does not matter: only their order does


# --- CRF and clean-up -----------------------------------------------------------------------------
class Crf(NamedTuple):
    """Settings of a dense CRF (Kraehenbuehl and Koltun 2011, arXiv 1210.5644) with two Gaussian kernels.

    The smoothness kernel compares places, the bilateral one places and the five normalised bands.
    """

    smooth_px: float  # standard deviation in pixels
    smooth_weight: float
    bilateral_px: float  # standard deviation in pixels
    bilateral_std: float  # standard deviation in the normalised bands
    bilateral_weight: float
    iterations: int = 5  # mean-field steps


def refine_with_crf(probs: np.ndarray, features: np.ndarray, valid: np.ndarray, crf: Crf) -> np.ndarray:
    """Return probabilities (4, H, W) float32 after mean-field inference on those given and the normalised bands
    (5, H, W); unchanged without pydensecrf. Nodata pixels carry no evidence and keep their probabilities."""
    if densecrf is None:
        warn_once("pydensecrf is not installed: masks are made without the CRF that these weights ask for")
        return probs
    rows, columns = np.nonzero(valid)
    positions = np.stack([rows, columns]).astype(np.float32)  # (2, N)
    appearance = features[:, valid] / np.float32(crf.bilateral_std)  # (5, N)
    field = densecrf.DenseCRF(len(rows), len(probs))
    # Clipped, since the logarithm of an exact 0 would forbid a class whatever the neighbours say.
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(probs[:, valid], 1e-5, 1))))
    smooth = positions / np.float32(crf.smooth_px)  # (2, N)
    joint = np.concatenate([positions / np.float32(crf.bilateral_px), appearance])  # (7, N)
    field.addPairwiseEnergy(np.ascontiguousarray(smooth), compat=crf.smooth_weight)
    field.addPairwiseEnergy(np.ascontiguousarray(joint), compat=crf.bilateral_weight)
    refined = probs.copy()
    refined[:, valid] = np.asarray(field.inference(int(crf.iterations)))
    return refined


def absorb_small_patches(classes: np.ndarray, valid: np.ndarray, of_class: int, min_size: int) -> None:
    """Give each 8-connected patch of `of_class` below `min_size` px to the commonest class around it, in place;
    nodata has no say, and a patch with nothing but nodata around it becomes background."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        ((classes == of_class) & valid).astype(np.uint8), connectivity=8, ltype=cv2.CV_32S
    )
    for label in range(1, count):
        left, top, width, height, size = stats[label]
        if size >= min_size:
            continue
        box = np.s_[max(top - 1, 0) : top + height + 1, max(left - 1, 0) : left + width + 1]
        patch = labels[box] == label
        grown = cv2.dilate(patch.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        around = np.bincount(classes[box][grown & ~patch & valid[box]], minlength=len(CLASS_NAMES))
        classes[box][patch] = around.argmax()


def clean_classes(classes: np.ndarray, valid: np.ndarray, min_speck: int, min_hole: int) -> np.ndarray:
    """Return class indices (H, W) uint8, 0 where not valid (H, W), without patches of glacier, debris or lake
    below `min_speck` px and of other below `min_hole` px; 0 keeps all."""
    cleaned = np.where(valid, classes, 0).astype(np.uint8)
    for of_class, least in ((1, min_speck), (2, min_speck), (3, min_speck), (0, min_hole)):
        if least > 1:
            absorb_small_patches(cleaned, valid, of_class, least)
    return cleaned


# --- Mask -----------------------------------------------------------------------------------------
def decide_classes(probs: np.ndarray) -> np.ndarray:
    """Return the class index of each pixel, (H, W) uint8, of probabilities or scores (4, H, W): first glacier of
    either kind or not, then which. Three tenths of clean ice and three of debris outweigh four of other."""
    other, clean, debris, lake = probs
    # The numbers are those of CLASS_NAMES.
    kinds = np.where(debris > clean, np.uint8(2), np.uint8(1))
    rest = np.where(lake > other, np.uint8(3), np.uint8(0))
    return np.where(clean + debris > other + lake, kinds, rest)


def predict_classes(model: Model, image: np.ndarray, until: float = math.inf) -> tuple[np.ndarray, int]:
    """Return the class indices (H, W) uint8 of a tile or scene (H, W, 5) in physical units, NaN where nodata,
    and how many passes they rest on."""
    fits = max(image.shape[:2]) <= LARGEST_TILE
    probs, passes = (predict_window if fits else predict_scene)(model, image, until)  # (4, H, W)
    classes, steps = decide_classes(probs), model.postprocess  # (H, W)
    return clean_classes(classes, valid_mask(image), steps.min_speck, steps.min_hole), passes


def to_mask(classes: np.ndarray) -> np.ndarray:
    """Return class indices 0 to 3 as the competition's grey values, uint8 of the same shape."""
    return np.asarray(CLASS_VALUES, np.uint8)[classes]


# ==================================================================================================
# Part 2: the service
# ==================================================================================================


def say(message: str) -> None:
    """Write a line on standard error, whatever stands in for it: no message costs a mask."""
    with suppress(Exception):  # a logger, a closed file, a pipe that its reader has left
        encoding = getattr(sys.stderr, "encoding", None) or "ascii"
        if sys.stderr:
            print(message.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Say `message` as a warning."""
    say(f"warning: {message}")


warn_once = lru_cache(maxsize=None)(warn)  # however often it is asked for

# --- Finding tiles --------------------------------------------------------------------------------
TIFF_SUFFIXES = (".tif", ".tiff")
EXPECTED_LAYOUT = (
    "expected a folder with Band1 ... Band5 in it, each with one TIFF a tile that shares its tile id with the "
    "other bands (img001.tif everywhere, or B2_B2_masked_02_07.tif in Band1, B10_B10_masked_02_07.tif in Band5)"
)
RENAMING = ", ".join(f"{band.landsat} ({band.name}) is {band.folder}" for band in BANDS)
USGS_NAME = re.compile(r"_B\d+\.tiff?$", re.IGNORECASE)  # LC08_L2SP_147037_20200814_20210330_02_T1_SR_B2.TIF

PathLike = Union[str, Path]
DataSource = Union[str, Path, Mapping[str, PathLike]]
Item = TypeVar("Item")
Result = TypeVar("Result")


class TileFiles(NamedTuple):
    """The files of one tile. `name` is that of the first band that has one; `paths` has None where a band has none."""

    tile_id: str
    name: str
    paths: tuple[Optional[Path], ...]


def common_stem(filename: str) -> str:
    """Return what the files of a tile have in common: the stem without leading band names."""
    stem = re.sub(r"^(?:(?:B|Band)\d+_)+", "", Path(filename).stem, flags=re.IGNORECASE)
    return stem.lower() if re.fullmatch(r"img\d+", stem, re.IGNORECASE) else stem


def tile_id(filename: str) -> str:
    """Return a tile's id by a file's name: "001" of img001.tif, "02_07" of B10_B10_masked_02_07.tif, as the
    platform derives it; of any other name the stem without leading band names."""
    known = re.search(r"img(\d+)$|(\d\d_\d\d)$", Path(filename).stem, re.IGNORECASE)
    return known.group(1) or known.group(2) if known else common_stem(filename)


def band_number(name: str) -> int | None:
    """Return 1 to 5 for a name of a band ("Band4", "band_4", or Landsat's "B6"), else None."""
    plain = re.sub("[ _-]", "", name.upper())
    return next((n for n, band in enumerate(BANDS, 1) if plain in (band.folder.upper(), band.landsat)), None)


def band_folders(data: DataSource) -> dict[int, Path]:
    """Return {band number: folder} for a data folder or a mapping of band names to folders. Raises InputError
    for a folder that cannot be looked into, holds no band folder, or numbers them as Landsat does."""
    try:
        if isinstance(data, Mapping):
            entries = {str(name): Path(path) for name, path in data.items()}
            where, named = "the mapping given", list(entries)
        else:
            entries = {path.name: path for path in sorted(Path(data).iterdir())}
            where, named = str(data), [name for name, path in entries.items() if os.path.isdir(path)]
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{data}: no folder that can be looked into ({error}); {EXPECTED_LAYOUT}") from error
    foreign = [name for name in named if re.fullmatch(r"band[ _-]?([6-9]|1[01])", name, re.IGNORECASE)]
    if foreign:
        found = f"{where}: {', '.join(foreign)} look like Landsat's own numbers"
        raise InputError(f"{found}; here {RENAMING}: rename these five folders, and move the others away")
    folders: dict[int, Path] = {}
    for name in named:
        number, folder = band_number(name), entries[name]
        if number and folders.setdefault(number, folder) != folder:
            warn(f"{folder}: not used, {folders[number]} is that band too; remove one of the two")
    if not folders:
        usgs = "; its files look like a scene from USGS" if any(map(USGS_NAME.search, entries)) else ""
        found = ", ".join(named[:10]) or "nothing"
        raise InputError(f"{where}: no band folders, found {found}{usgs}; {EXPECTED_LAYOUT}; {RENAMING}")
    return folders


def list_band(folder: Path | None) -> dict[str, Path]:
    """Return {key: file} for the TIFFs of a folder, none where it cannot be looked into. The key is what the
    bands' names have in common, and the suffix where two files would share it (img001.tif, img001.tiff)."""
    files: dict[str, Path] = {}
    try:
        entries = sorted(folder.iterdir()) if folder and os.path.isdir(folder) else []
    except OSError as error:
        warn(f"{folder}: cannot be looked into ({error.strerror}); make it readable")
        return files
    for path in entries:
        if path.suffix.lower() in TIFF_SUFFIXES and not path.name.startswith("."):
            key = common_stem(path.name)
            keys = (key, key + path.suffix, path.name)
            files[next(longer for longer in keys if longer not in files)] = path
    return files


def find_tiles(data: DataSource) -> list[TileFiles]:
    """Return the tiles of all band folders, sorted by tile id, also one that lacks a band; InputError for none.

    Files belong together where their names differ in leading band names only. Where tiles would share an id,
    as 2019_08_14 and 2020_08_14 would, each one's id is what its bands' names have in common.
    """
    folders = band_folders(data)
    bands = [list_band(folders.get(number)) for number in range(1, len(BANDS) + 1)]
    names = {key: path.name for band in reversed(bands) for key, path in band.items()}  # Band1's outdo others
    owners = Counter(map(tile_id, names.values()))
    if not names:
        raise InputError(f"no TIFF in {', '.join(map(str, folders.values()))}; {EXPECTED_LAYOUT}")
    return sorted(
        TileFiles(key if owners[tile_id(name)] > 1 else tile_id(name), name, tuple(b.get(key) for b in bands))
        for key, name in names.items()
    )


# --- Reading rasters ------------------------------------------------------------------------------
DEFAULT_SHAPE = (512, 512)  # of the mask for a tile of which no band can be read
MOST_PIXELS = 100_000_000  # of a raster, more than a whole Landsat scene; a small file can declare far more
UNPACKERS: dict[int, Any] = {8: zlib.decompressobj, 32946: zlib.decompressobj, 34925: lzma.LZMADecompressor}
HARMLESS_BYTES = 2**16  # of a packed strip or tile, which unpacks to no more than about a thousand times that
LARGEST_VALUE = 1e6  # stored values are below 65536; what is far above is some fill value
GDAL_NODATA_TAG = 42113
# Fill values in use for signed rasters. In an int16 file that was cast from uint16 they may also be the
# measurements 55537 and 32768, which are then lost: single pixels, against whole areas of fill.
SIGNED_FILL_VALUES = (-9999, -32768)
PLACE_TOLERANCE = 0.25  # px by which the files of a tile may lie apart


class Place(NamedTuple):
    """Where a raster lies: EPSG code, and (x, y) of its upper left, upper right and lower left corner, (3, 2)."""

    epsg: int | None
    corners: np.ndarray


def decode_tiff(path: Path) -> tuple[np.ndarray, float | None, list[np.ndarray], Place | None]:
    """Return a TIFF's first page, its declared nodata value, its GDAL masks (0: no data), and where it lies.
    Raises TileError for a file that cannot be read as a TIFF, or is too large."""
    size = os.path.getsize(path) if os.path.isfile(path) else "no"
    beside, nodata = path.with_name(path.name + ".msk"), None
    try:
        if size == "no":  # a pipe or a device would be read for ever
            raise ValueError("no file that can be reached")
        with tifffile.TiffFile(path) as tiff:
            first, *others = (cast(tifffile.TiffPage, page) for page in tiff.pages)
            pixels, place = decode_page(first, path), place_of(first)
            same = [page for page in others if page.shape[:2] == first.shape[:2]]
            masks = [decode_page(page, path) for page in same if page.subfiletype & 4]  # 4: a mask
            with suppress(KeyError, ValueError):  # none declared, or one that is no number
                nodata = float(str(first.tags[GDAL_NODATA_TAG].value).strip("\x00 "))
        if path.suffix != ".msk" and os.path.isfile(beside):
            masks.append(decode_tiff(beside)[0])
        return pixels, nodata, masks, place
    except TileError:
        raise
    except Exception as error:  # a damaged TIFF may raise almost anything from within its decoder
        said = f"({size} bytes; {type(error).__name__}: {error})"
        raise TileError(
            f"{path}: cannot be read as a TIFF {said}; copy or export the file again, uncompressed"
        ) from error


def refuse_bomb(page: tifffile.TiffPage, path: Path) -> None:
    """Raise TileError for a page that would take far more memory than its file leads one to expect."""
    size = f"{page.imagewidth} x {page.imagelength} px"
    if max(math.prod(page.shape), page.tilewidth * page.tilelength) > MOST_PIXELS:
        raise TileError(f"{path}: declares {size}, expected {MOST_PIXELS:,} px or fewer; cut it into tiles")
    unpacker = UNPACKERS.get(int(page.compression))
    most = 2 * page.nbytes + 2**24  # bytes; the last strip or tile may reach beyond the image
    for offset, count in zip(page.dataoffsets, page.databytecounts):
        if unpacker and count > HARMLESS_BYTES:
            page.parent.filehandle.seek(offset)
            if len(unpacker().decompress(page.parent.filehandle.read(count), most + 1)) > most:
                raise TileError(f"{path}: unpacks to more than its {size}; copy or export the file again")


def decode_page(page: tifffile.TiffPage, path: Path) -> np.ndarray:
    """Return a page's pixels, by OpenCV where tifffile lacks the codec (LZW without imagecodecs, for one)."""
    refuse_bomb(page, path)
    try:
        return page.asarray()
    except ValueError:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED) if page.index == 0 else None
        dtype = np.dtype(page.dtype)
        expected = (page.shape, page.bitspersample, dtype.kind == "f")
        # OpenCV drops a second sample and widens 12 bits without a word.
        if pixels is None or expected != (pixels.shape, 8 * pixels.itemsize, pixels.dtype.kind == "f"):
            raise
    return pixels.view(dtype.newbyteorder("="))  # int16 comes as uint16


def place_of(page: tifffile.TiffPage) -> Place | None:
    """Return the place that a page's GeoTIFF tags name (OGC 19-008r4), None where they name none."""
    try:
        codes = (33550, 33922, 34264, 34735)
        scale, tie, matrix, keys = (page.tags[c].value if c in page.tags else cast(Any, ()) for c in codes)
        if matrix:
            a, b, c, d, e, f = (float(matrix[index]) for index in (0, 1, 3, 4, 5, 7))
        else:
            a, b, d, e = float(scale[0]), 0.0, 0.0, -float(scale[1])
            c, f = float(tie[3]) - a * tie[0], float(tie[4]) - e * tie[1]
        values = dict(zip(keys[4::4], keys[7::4]))
        if values.get(1025) == 2:  # coordinates are those of the pixels' centres
            c, f = c - (a + b) / 2, f - (d + e) / 2
        across, down = np.multiply((a, d), page.imagewidth), np.multiply((b, e), page.imagelength)
        corners = np.add((c, f), [np.zeros(2), across, down])
        sound = np.isfinite(corners).all() and a * e - b * d != 0
        return Place(values.get(3072, values.get(2048)), corners) if sound else None
    except (IndexError, TypeError, ValueError):  # tags that are absent or make no sense name no place
        return None


def apart(one: Place, other: Place, shape: tuple[int, ...]) -> bool:
    """Return whether two rasters of a size (H, W) lie at different places."""
    pixel = np.ptp(one.corners, axis=0).max() / max(shape)
    far = np.abs(one.corners - other.corners).max() > PLACE_TOLERANCE * pixel
    return bool(far) or len({one.epsg, other.epsg} - {None}) > 1


def is_north_up(place: Place | None) -> bool:
    """Return whether north is above in a raster, as the networks expect; where no place is told, it is."""
    if place is None or place.epsg is None:
        return True
    (right, up), (left, down) = place.corners[1:] - place.corners[0]
    return right > 0 > down and max(abs(up), abs(left)) <= 0.01 * min(right, -down)


def measured(stored: np.ndarray) -> np.ndarray:
    """Return stored numbers, any shape, as float32, NaN where they are nodata: 0, NaN, and what is too small or too
    large for a measurement. Negative int16 numbers are those above 32767 of a file that was cast from uint16."""
    wrapped = stored.dtype.kind == "i" and stored.itemsize == 2
    nodata = (stored == 0) | ~np.isfinite(stored) | (stored > LARGEST_VALUE)
    nodata |= np.isin(stored, SIGNED_FILL_VALUES) if wrapped else stored < -2000  # reflectance -0.2 x 10000
    values = (stored.astype(np.int16).view(np.uint16) if wrapped else stored).astype(np.float32)
    values[nodata] = np.nan
    return values


def read_raster(path: PathLike) -> tuple[np.ndarray, Place | None]:
    """Return one band as stored, (H, W) float32, and where it lies. NaN is where it was not `measured`, has the
    declared nodata value, or is left out by GDAL's masks. Raises TileError for what is no readable TIFF of one band
    of numbers."""
    path = Path(path)
    pixels, declared, masks, place = decode_tiff(path)
    if pixels.ndim == 3:
        pixels = pixels.squeeze()
    if pixels.ndim != 2 or pixels.size == 0 or pixels.dtype.kind not in "uif":
        found = f"{path}: found shape {pixels.shape} of type {pixels.dtype}"
        raise TileError(f"{found}, expected one band (H, W) of numbers; split the bands into their own files")
    values = measured(pixels)
    for left_out in (pixels == declared, *(mask.reshape(values.shape) == 0 for mask in masks)):
        values[left_out] = np.nan
    return values, place


# --- Units ----------------------------------------------------------------------------------------
class Scaling(NamedTuple):
    """What stored values up to `most` may be, if no Level-2 numbers; times `scale` they are reflectance or
    kelvin, None where that cannot be told."""

    name: str
    most: float
    scale: float | None


LEVEL_2_DARK = 5000  # the darkest band's median: Level-2 numbers are above 7273 where reflectance is above 0
LEVEL_2_KELVIN = (210.0, 345.0)  # medians of a land surface; Level-1 numbers of 253 K read as 191 K
REFLECTIVE = (  # by the value below which 98 % of the brightest of bands 1 to 4 are
    Scaling("reflectance", 2.5, 1.0),
    Scaling("8-bit numbers", 255, None),
    Scaling("reflectance x 10000", 20_000, 1e-4),
    Scaling("no numbers of Landsat", math.inf, None),
)
THERMAL = (  # by the median
    Scaling("degrees Celsius", 60, None),
    Scaling("8-bit numbers", 180, None),
    Scaling("kelvin", 345, 1.0),
    Scaling("no temperature", 5000, None),
    Scaling("Level-1 numbers", 17_900, None),
    Scaling("no temperature", math.inf, None),
)
FORCED = {"reflectance": REFLECTIVE[0], "x10000": REFLECTIVE[2]}
POOR = "Level-2 numbers (about 7000 to 65535): a poor mask; export Level-2 data, or reflectance and kelvin"


def judge_units(stored: np.ndarray) -> tuple[Scaling | None, Scaling | None]:
    """Return what bands 1 to 4 and the thermal band of a tile (H, W, 5) as stored look like; None for Level-2
    numbers, or where there is no value to judge by."""
    step = max(1, max(stored.shape[:2]) // 512)
    *seen, heat = (band[~np.isnan(band)] for band in np.moveaxis(stored[::step, ::step], -1, 0))
    seen, reflective, thermal = [band for band in seen if band.size], None, None
    if seen and min(np.median(band) for band in seen) < LEVEL_2_DARK:
        bright = max(np.percentile(band, 98) for band in seen)
        reflective = next(one for one in REFLECTIVE if bright <= one.most)
    kelvin = np.median(heat) * BANDS[-1].scale + BANDS[-1].offset if heat.size else LEVEL_2_KELVIN[0]
    if not LEVEL_2_KELVIN[0] <= kelvin <= LEVEL_2_KELVIN[1]:
        thermal = next(one for one in THERMAL if np.median(heat) <= one.most)
        if reflective is REFLECTIVE[1] and heat.max() <= 255:  # all bands in 8 bits, some of it like kelvin
            thermal = reflective
    return reflective, thermal


def convert_units(stored: np.ndarray, units: str, source: str) -> None:
    """Turn bands (H, W, 5) as stored into physical units, in place; say which are no Level-2 numbers."""
    reflective, thermal = judge_units(stored) if units != "dn" else (None, None)
    judged = (FORCED.get(units, reflective), thermal)
    for index, band in enumerate(BANDS):
        one = judged[band is BANDS[-1]]
        own = band._replace(scale=one.scale, offset=0.0) if one and one.scale else band
        stored[..., index] = to_physical(stored[..., index], own)
        stored[..., index][stored[..., index] < band.offset] = np.nan  # less than a Level-2 number can say
    for bands, one in zip(("Band1 to Band4 look", "the thermal band looks"), judged):
        if one:
            taken = "such (--units dn: as Level-2 numbers)" if one.scale else POOR
            warn(f"{source}: {bands} like {one.name}, read as {taken}")


# --- Reading tiles --------------------------------------------------------------------------------
def read_tile(files: TileFiles, units: str = "auto") -> np.ndarray:
    """Return a tile, (H, W, 5) float32: reflectance in bands 1-4, kelvin in band 5, NaN where nodata.

    `units` are those of bands 1-4: "dn" for Level-2 numbers, "reflectance", "x10000"; "auto" for what they
    surely are. Raises TileError where a band is missing or unreadable, or where the bands differ in size or
    place, or north is not above.
    """
    missing = [band.folder for band, path in zip(BANDS, files.paths) if path is None]
    if missing:
        usgs = f"; these are names of USGS, whose {RENAMING}" if USGS_NAME.search(files.name) else ""
        found = f"tile {files.tile_id}: no file in {', '.join(missing)} (it has {files.name})"
        raise TileError(f"{found}, expected one in each band; add the missing file or remove the tile{usgs}")
    paths = [path for path in files.paths if path is not None]
    first, place = read_raster(paths[0])
    image = np.empty((*first.shape, len(BANDS)), np.float32)  # band by band: a scene is never held twice
    for index, path in enumerate(paths):
        values, here = (first, place) if index == 0 else read_raster(path)
        if values.shape != first.shape:
            found, expected = (f"{band.shape[1]} x {band.shape[0]} px" for band in (values, first))
            as_in = f"{expected} as in {paths[0].name}"
            raise TileError(f"{path}: {found}, expected {as_in}; resample the bands to one grid")
        place = place or here
        if place and here and apart(place, here, first.shape):
            found, expected = (f"{one.corners[0]} of EPSG:{one.epsg}" for one in (here, place))
            raise TileError(f"{path}: begins at {found}, expected {expected}; resample the bands to one grid")
        image[..., index] = values
    if not is_north_up(place):
        raise TileError(f"{paths[0]}: north is not above; export it on a north-up grid (gdalwarp makes one)")
    convert_units(image, units, f"tile {files.tile_id} ({files.name})")
    return image


def readable_shape(files: TileFiles) -> tuple[int, ...]:
    """Return a broken tile's size (H, W) from its first readable band, else DEFAULT_SHAPE."""
    for path in filter(None, files.paths):
        with suppress(TileError, MemoryError):
            return read_raster(path)[0].shape
    return DEFAULT_SHAPE


# --- The weights file -----------------------------------------------------------------------------
MODEL_FILE = "model.pth"
MODEL_FORMAT = "glacier-kit/3"


def find_weights(given: PathLike | None = None) -> Path:
    """Return the weights file: `given`, else model.pth beside this file, in the working folder, or in `weights/`
    of either. Raises InputError, which lists where it was looked for, where there is none."""
    here, work = Path(__file__).resolve().parent, Path.cwd()
    usual = [folder / MODEL_FILE for folder in (here, here / "weights", work, work / "weights")]
    places = usual if given is None else [Path(given)]
    for place in filter(os.path.isfile, places):
        return place
    looked = ", ".join(map(str, places))
    raise InputError(f"no weights: looked for {looked}; put {MODEL_FILE} beside solution.py or use --weights")


def first_line(error: Exception) -> str:
    """Return an error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def read_model_file(path: PathLike) -> dict:
    """Return the containers and tensors of a model file. Raises InputError for one that is damaged or foreign."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums of the tensors
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes may raise almost anything
        size = Path(path).stat().st_size
        said = f"damaged or no weights file ({size} bytes; {first_line(error)})"
        raise InputError(f"{path}: {said}; copy it again") from error
    found = content.get("format", "none") if isinstance(content, dict) else type(content).__name__
    if found != MODEL_FORMAT:
        said = f"format {found!r}, expected {MODEL_FORMAT!r}"
        raise InputError(f"{path}: {said}; pack it with `python -m train pack`")
    return content


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load float16 or float32 weights strictly. Raises InputError, which says all that does not fit."""
    try:
        network.load_state_dict(state)
        broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise RuntimeError(f"not finite: {', '.join(broken)}")
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise InputError(f"{source}: weights do not fit the network they name: {said[:500]}") from error


def merge_batchnorms(network: nn.Module, pairs: Iterable[Sequence[str]]) -> None:
    """Merge BatchNorms into the convolutions before them, in place: exact, and fewer steps a pass. A pair names
    a convolution and the BatchNorm that alone reads its output; `train.pack` found them, and compared."""
    for conv_name, name in pairs:
        conv, bn = (cast(Any, network.get_submodule(layer)) for layer in (conv_name, name))
        normalises = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *normalises)
        # timm's BatchNormAct2d also holds what follows it: dropout, activation
        rest = nn.Sequential(*(getattr(bn, part) for part in ("drop", "act") if hasattr(bn, part)))
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, rest)


def load_member(stored: Mapping, source: str, device: torch.device) -> Member:
    """Return one network of a model file, ready for inference on `device`. Raises InputError where its weights
    do not fit, or its statistics are not those of five bands."""
    arch, statistics = stored["arch"], stored["normalization"]
    if any(len(statistics[key]) != len(BANDS) for key in ("mean", "std")):
        raise InputError(f"{source}: normalization {statistics}, expected mean and std of {len(BANDS)} bands")
    try:
        network = KindNet(**arch["args"]) if arch["name"] == "KindNet" else build_network(arch)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    load_state(network, stored["state_dict"], source)
    merge_batchnorms(network.requires_grad_(False).eval(), stored.get("batchnorms", ()))
    network = network.to(device).to(memory_format=torch.channels_last)
    return Member(network, float(stored["weight"]), statistics)


def load_model(path: PathLike) -> Model:
    """Return the model that `path` holds, on the GPU where there is one that works. Raises InputError where it is
    damaged, incomplete, or its weights do not fit: random weights are never used."""
    content, device = read_model_file(path), usable_device()
    try:
        stored = enumerate(content["members"])
        members = tuple(load_member(one, f"{path}, member {number}", device) for number, one in stored)
        kind = content.get("kind") and load_member(content["kind"], f"{path}, kind", device)
        passes = tuple((int(member), int(view)) for member, view in content["passes"])
        steps = dict(content["postprocess"])
        steps["crf"] = Crf(**steps["crf"]) if steps.get("crf") else None
        time_budget = float(content.get("time_budget") or math.inf)
        known = {(member, view) for member in range(len(members)) for view in range(len(VIEWS))}
        if not passes or not set(passes) <= known or len(set(passes)) < len(passes) or not time_budget > 0:
            raise ValueError(f"passes {content['passes']} in {time_budget} s for {len(members)} members")
        return Model(members, kind, passes, Postprocess(**steps), time_budget, device, {})
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {first_line(error)}; pack it again with `python -m train pack`") from error


# --- Clock, threads and device --------------------------------------------------------------------
TIME_BUDGET_VARIABLE = "GLACIER_TIME_BUDGET"
JUST_IMPORTED = 30.0  # s after the import within which a call pays for it
SPARE_SECONDS = 3.0  # of a time budget, kept for the last mask and for leaving Python,
SPARE_PART = 0.10  # or this part of it, if that is more: other work on the machine slows the last tiles
IMPORTED_BY = os.getpid()
MOST_WORKERS = 3  # threads side by side; more need more memory, and share their cores within a pass instead


def usable_cores() -> int:
    """Return how many cores to use: the least of OMP_NUM_THREADS, CPU affinity and cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, cpu_quota(), int(asked) if asked.isdecimal() else cores))


def cpu_quota() -> int:
    """Return the cores that the cgroup (version 2 or 1) grants, sys.maxsize where it sets no limit."""
    cgroup = Path("/sys/fs/cgroup")
    files = (cgroup / "cpu.max",), [cgroup / f"cpu/cpu.cfs_{part}_us" for part in ("quota", "period")]
    with suppress(OSError, ValueError):  # no such files, or "max"
        found = files[0] if files[0][0].is_file() else files[1]
        quota, period = (int(word) for path in found for word in path.read_text().split())
        return quota // period if quota > 0 else sys.maxsize
    return sys.maxsize


def usable_device() -> torch.device:
    """Return the GPU where there is one that works: torch also reports GPUs that it has no code for."""
    if torch.cuda.is_available():
        try:
            nn.Conv2d(1, 1, 3, device="cuda")(torch.ones(1, 1, 8, 8, device="cuda")).sum().item()
            return torch.device("cuda")
        except Exception as error:
            warn(f"the GPU cannot be used ({first_line(error)}); this run is on the CPU")
    return torch.device("cpu")


def prepare_torch(threads: int) -> None:
    """Set what makes a CPU fast: the number of threads, and no denormal numbers, of which trained networks
    have many and which cost several times the time of others."""
    cv2.setNumThreads(1)  # a process that is forked later would wait for OpenCV's threads
    np.finfo(np.float32)  # NumPy finds its limits on first use, and warns where denormals are flushed by then
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def most_workers(model: Model) -> int:
    """Return how many threads work side by side: none more on a GPU, which works on many pixels at once."""
    return min(usable_cores(), MOST_WORKERS) if model.device.type == "cpu" else 1


def threads_of_each(workers: int) -> int:
    """Return the threads of a pass where so many are made side by side; one in a process that was forked after
    the import, which would wait for the threads of torch that it does not have."""
    return max(1, usable_cores() // workers) if os.getpid() == IMPORTED_BY else 1


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `work(item)` of all items in their order, made by so many threads.

    A pass on several cores waits at the end of each layer for the slowest; passes on one core each wait for
    nothing. Few items are taken ahead of what is yielded, and none after the caller has stopped.
    """
    if workers == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, initializer=prepare_torch, initargs=(threads_of_each(workers),))
    begun: deque[Future[Result]] = deque()  # as many as run, and one that waits
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def share_of_time(until: float, part: float) -> float:
    """Return the time at which `part`, 1 at most, of the time from now to `until` will have passed."""
    now = time.perf_counter()
    return now + (until - now) * min(1.0, part)


def choose_budget(given: str | None, stored: float) -> tuple[float, bool]:
    """Return the seconds that a run may take, `given`, else the environment's, else those of the weights, and
    whether they bind: those of the weights do not, so that thousands of tiles still get their masks."""
    asked = os.environ.get(TIME_BUDGET_VARIABLE) if given is None else given
    with suppress(ValueError):
        seconds = float(asked) if asked else stored
        if seconds > 0:
            return seconds, bool(asked)
    raise InputError(f"time budget {asked!r}: expected seconds above 0, or inf for no limit")


# --- Writing --------------------------------------------------------------------------------------
Writer = Callable[["TileFiles", np.ndarray], None]
PARTIAL_PREFIX = ".mask-"  # and no name of a tile, which may be as long as names can be
ABANDONED_SECONDS = 60.0  # no mask takes so long to write


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that `path` appears whole or not at all, whenever the run is killed."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL_PREFIX, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out a grader that runs as another user
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink()
        raise


def png_writer(folder: Path) -> Writer:
    """Return a function that writes a mask as a PNG with the stem of Band1's file, or, where img001.tif and
    img001.tiff are two tiles, with the second one's whole name."""
    owners: dict[str, str] = {}

    def write(tile: TileFiles, mask: np.ndarray) -> None:
        stem = Path(tile.name).stem
        name = stem if owners.setdefault(stem, tile.name) == tile.name else tile.name
        write_atomically(folder / f"{name}.png", cv2.imencode(".png", mask)[1].tobytes())

    return write


def tiff_writer(folder: Path) -> Writer:
    """Return a function that writes a mask as a TIFF named exactly as Band1's file."""

    def write(tile: TileFiles, mask: np.ndarray) -> None:
        encoded = BytesIO()
        tifffile.imwrite(encoded, mask, photometric="minisblack")
        write_atomically(folder / tile.name, encoded.getvalue())

    return write


def prepare_output(folder: PathLike, data: DataSource) -> Path:
    """Return `folder`, made where it is absent, without what killed runs left unfinished in it. Raises
    InputError where it cannot be written to, or is one of the input folders."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for path in folder.glob(f"{PARTIAL_PREFIX}*.part"):
            with suppress(FileNotFoundError):  # another run, which is writing now, has renamed it
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error}); name a writable folder") from error
    if any(os.path.isdir(band) and band.samefile(folder) for band in band_folders(data).values()):
        raise InputError(f"{folder}: is an input folder; name another, where masks overwrite nothing")
    return folder


# --- One run over a folder ------------------------------------------------------------------------
class TileResult(NamedTuple):
    """The mask of one tile, uint8 (H, W), how many passes it rests on, and what went wrong, if anything."""

    tile: TileFiles
    mask: np.ndarray
    passes: int
    fault: str | None


class Summary(NamedTuple):
    """What a run did, by tile id: the masks, how many passes each rests on, and what went wrong."""

    masks: dict[str, np.ndarray]
    passes: dict[str, int]
    faults: dict[str, str]


def is_scene(tile: TileFiles) -> bool:
    """Return whether a tile needs windows, and much memory, as its first band's header says."""
    # Damaged bytes may raise almost anything; reading the tile will say what is wrong.
    with suppress(Exception), tifffile.TiffFile(next(filter(None, tile.paths))) as tiff:
        return max(tiff.pages[0].shape[:2]) > LARGEST_TILE
    return False


def with_workers(model: Model, tiles: Sequence[TileFiles]) -> Model:
    """Return the model with its threads shared between tiles; those of a scene go to its windows."""
    workers = 1 if any(map(is_scene, tiles)) else min(most_workers(model), len(tiles))
    prepare_torch(threads_of_each(workers))
    return model._replace(workers=workers)


def segment_tile(model: Model, tile: TileFiles, until: float, latest: float, units: str) -> TileResult:
    """Return a tile's mask: background, and the reason, where it cannot be segmented or be begun by `latest`."""
    name, fault = f"tile {tile.tile_id} ({tile.name})", None
    try:
        if time.perf_counter() > latest:
            raise TileError(f"{name}: the time budget was used up; allow more seconds")
        image = read_tile(tile, units)
        empty = [band.folder for index, band in enumerate(BANDS) if np.isnan(image[..., index]).all()]
        classes, passes = predict_classes(model, image, until)
        if passes == 0:
            fault = f"{name}: the time budget was used up; the rest is background; allow more seconds"
        elif 0 < len(empty) < len(BANDS):
            fault = f"{name}: no value above 0 in {', '.join(empty)}: a poor mask; export these bands again"
        return TileResult(tile, to_mask(classes), passes, fault)
    except Exception as error:  # one tile must not cost the others their masks
        said = str(error) if isinstance(error, KitError) else f"{name}: {type(error).__name__}: {error}"
        mask = np.zeros(readable_shape(tile), np.uint8)
        return TileResult(tile, mask, 0, f"{said}; this tile gets a background mask")


def segment_all(
    model: Model, tiles: Sequence[TileFiles], deadline: float, binding: bool, units: str
) -> Iterator[TileResult]:
    """Yield the result of every tile, each with as many passes as fit into its share of the time left.

    What is not begun by `deadline`, a time of `time.perf_counter`, is left as background if that is `binding`:
    a tile, or a window of a scene. Else a scene gets all of its windows and passes, however long they take.
    """

    def segment(number: int) -> TileResult:
        tile, until = tiles[number], share_of_time(deadline, model.workers / (len(tiles) - number))
        if not binding and is_scene(tile):
            until = math.inf
        return segment_tile(model, tile, until, deadline if binding else math.inf, units)

    return side_by_side(segment, range(len(tiles)), model.workers)


def save_mask(write: Writer, result: TileResult) -> str | None:
    """Write a mask; return why that failed, else None: one tile must not cost the others their masks."""
    try:
        write(result.tile, result.mask)
    except (OSError, ValueError, cv2.error) as error:
        return f"the mask of {result.tile.name} cannot be written ({error}); make room or free the name"
    return None


def segment_folder(
    data: DataSource,
    weights: PathLike | None,
    write: Writer | None,
    time_budget: str | None = None,
    started: float | None = None,
    keep_masks: bool = True,
    units: str = "auto",
) -> Summary:
    """Segment all tiles of `data`, hand each mask to `write`, if given, and return what came of them.

    Args:
        weights: the model file, None to look for it.
        time_budget, units: see `choose_budget`, `read_tile`.
        started: time of `time.perf_counter` from which the budget counts, None for now.
        keep_masks: whether they are in the summary; those of thousands of tiles need gigabytes.

    Raises:
        InputError: no tiles, no weights, or a time budget that is none; nothing is written then.
    """
    started = time.perf_counter() if started is None else started
    tiles = find_tiles(data)
    prepare_torch(threads_of_each(1))  # loading computes too, and a forked process has no threads for that
    model = with_workers(load_model(find_weights(weights)), tiles)
    seconds, binding = choose_budget(time_budget, model.time_budget)
    deadline = started + min(seconds - SPARE_SECONDS, seconds * (1 - SPARE_PART))
    masks, passes, faults = summary = Summary({}, {}, {})
    for result in segment_all(model, tiles, deadline, binding, units):
        tile = result.tile
        passes[tile.tile_id] = result.passes
        left = (time.perf_counter() - started) * (len(tiles) / len(passes) - 1)
        done = f"mask, passes: {result.passes}" if result.passes else "background (failed)"
        say(f"[{len(passes)}/{len(tiles)}] {tile.name}: {done}, {left:.0f} s left")
        for fault in filter(None, (result.fault, save_mask(write, result) if write else None)):
            say(f"error: {fault}")
            faults.setdefault(tile.tile_id, fault)
        if keep_masks:
            masks[tile.tile_id] = result.mask
    fewest, most = min(passes.values()), max(passes.values())
    hint = "" if fewest == len(model.passes) else " (--time-budget inf makes them all)"
    pace = (time.perf_counter() - started) / len(tiles)
    done = f"{len(tiles)} tiles, {len(faults)} failed, {pace:.2f} s a tile"
    say(f"{done}, {fewest} to {most} of {len(model.passes)} passes{hint}")
    return summary


# --- The doors ------------------------------------------------------------------------------------
def maskgeration(imagepath: DataSource, second: PathLike | None = None) -> dict[str, np.ndarray]:
    """Segment all tiles; the platform's entry point, whose name the organisers' template spells like this.

    Args:
        imagepath: {"Band1": folder, ...}, or the data folder.
        second: an existing file, or any name that ends in .pth, is taken as weights, as the platform does.
            All else is taken as what its documents promise, a folder, into which masks go named as in Band1
            if it can be written to; a model.pth in it is used.

    Returns {tile id: mask (H, W) uint8}, background for a tile that cannot be read. Raises InputError where
    there are no tiles, or no intact weights.
    """
    now, weights, write = time.perf_counter(), None, None
    if second:
        names_weights = os.path.isfile(second) or Path(second).suffix == ".pth"
        weights = Path(second) if names_weights else Path(second) / MODEL_FILE
        if not os.path.isfile(weights):
            if names_weights:
                warn(f"{second}: no such weights file; looking beside solution.py and in the working folder")
            weights = None
        try:
            write = None if names_weights else tiff_writer(prepare_output(second, imagepath))
        except InputError as error:
            warn(f"{error}; masks are returned only")
    # The platform imports this file and calls at once, and its clock sees both.
    started = STARTED if now - STARTED < JUST_IMPORTED else now
    return segment_folder(imagepath, weights, write, started=started).masks


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return `data`, `output`, `named_as_band1` and the options from any of the three command lines."""
    parser = argparse.ArgumentParser(epilog=EXPECTED_LAYOUT, allow_abbrev=False)
    add = parser.add_argument
    add("in_dir", nargs="?", help="data folder; writes one PNG a tile")
    add("out_dir", nargs="?", help="folder for the PNGs")
    add("--data", "--imagepath", dest="data", help="data folder; writes TIFFs named as in Band1")
    add("--out", "--output", dest="output", help="folder for the TIFFs")
    add("--masks", help="accepted for the organisers' template, not used")
    add("--weights", help="model.pth; default: beside this file, in weights/, or in the working folder")
    limit = f"end within so many seconds, inf: no limit; default: {TIME_BUDGET_VARIABLE}, else the weights'"
    add("--time-budget", metavar="SECONDS", help=limit)
    units = "of Band1 to Band4; dn: Level-2 numbers; auto: these, or what they and Band5 surely are"
    add("--units", choices=("auto", "dn", *FORCED), default="auto", help=units)
    parsed = parser.parse_args(arguments)
    positional, named = (parsed.in_dir, parsed.out_dir), (parsed.data, parsed.output)
    parsed.named_as_band1 = all(named)
    if not any(all(one) and not any(other) for one, other in ((positional, named), (named, positional))):
        parser.error("give IN_DIR OUT_DIR, or --data D --masks M --out O, or --imagepath D --output O")
    parsed.data, parsed.output = named if parsed.named_as_band1 else positional
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return the exit status: 0 done, 1 some tile failed, 2 nothing could be done."""
    args = parse_arguments(arguments)
    try:
        folder = prepare_output(args.output, args.data)
        writer = tiff_writer(folder) if args.named_as_band1 else png_writer(folder)
        budget, weights = args.time_budget, args.weights
        summary = segment_folder(args.data, weights, writer, budget, STARTED, False, args.units)
    except InputError as error:
        say(f"error: {error}")
        return 2
    return 1 if summary.faults else 0


if __name__ == "__main__":
    sys.exit(main())
