"""Required packages: torch, torchvision, segmentation_models_pytorch, numpy, tifffile, opencv-python, tqdm

GlacierHack 2025: Landsat-8 tiles in, glacier masks out. Optional package: pydensecrf (dense CRF).

    python solution.py IN_DIR OUT_DIR                      one PNG a tile, stem of Band1's file
    python solution.py --data D --masks M --out O          one TIFF a tile, named exactly as in Band1
    python solution.py --imagepath D --output O            the same
    solution.maskgeration({"Band1": dir, ...}, second)     a dict {tile_id: uint8 (H, W) mask}

A data folder holds Band1 ... Band5 (blue, green, red, SWIR-1, thermal), one single-band TIFF a tile in each.
A mask holds 0 (other), 85 (glacier), 170 (debris-covered glacier) and 255 (glacial lake). The weights are
`model.pth`, named by --weights or found beside this file, in `weights/` or in the working folder.

The file has two parts. Part 1, the method, reads in the order of the data: bands and classes, units and
normalisation, networks, views, ensemble, CRF and clean-up, mask. Part 2, the service, is what a run needs
besides: files of any origin, the weights file, clock and threads, writing, and the doors for its callers.
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
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import (
    Any,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    TypeVar,
    Union,
    cast,
)

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
from tqdm import tqdm

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


# Landsat Collection-2 Level-2 scale factors (USGS Landsat 8-9 Collection 2 Level 2 Science Product Guide,
# LSDS-1619).
BANDS = (
    Band("Band1", "B2", "blue", "reflectance", 2.75e-5, -0.2),
    Band("Band2", "B3", "green", "reflectance", 2.75e-5, -0.2),
    Band("Band3", "B4", "red", "reflectance", 2.75e-5, -0.2),
    Band("Band4", "B6", "SWIR-1", "reflectance", 2.75e-5, -0.2),
    Band("Band5", "B10", "thermal", "kelvin", 0.00341802, 149.0),
)
CLASS_NAMES = ("other", "glacier", "debris", "lake")
CLASS_VALUES = (0, 85, 170, 255)
GLACIER_GROUP = (1, 2)  # the extent: glacier of either kind, which every label tells,
REST_GROUP = (0, 3)  # and what is none

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
    """Return `image`, (H, W, 5) physical units, as a network's input: (5, H, W) float32 of (x - mean) / std,
    nodata 0.

    Args:
        image: a tile, NaN where nodata.
        normalization: `mean` and `std` of the five bands over the valid pixels that the network was trained
            on.
    """
    mean = np.asarray(normalization["mean"], np.float32)
    std = np.asarray(normalization["std"], np.float32)
    scaled = np.nan_to_num((image - mean) / std, nan=0.0)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))  # (5, H, W)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a float32 array as a tensor on the same memory, by the buffer protocol.

    `torch.from_numpy` and `Tensor.numpy` fail where torch < 2.3 meets numpy >= 2 ("Numpy is not available").
    """
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


def local_statistics(x: torch.Tensor, levels: int) -> Iterator[torch.Tensor]:
    """Yield what is around each place, (B, 31, h, w), for windows of 4, 8, 16 ... px that overlap by half.

    Of each band the mean, the standard deviation, the largest and the least value (in the thermal band: how
    high above the valley floor), the differences of the mean north and south, west and east (which way a
    slope faces); and the share of the window that has data (masked cloud and shadow tell of what is beside
    them). A band that is exactly 0 is nodata: it does not count.

    Args:
        x: normalised bands (B, 5, H, W); sides are multiples of STRIDE.
        levels: how many windows, 5 at most; their grids have h = H / 2, H / 4 ...
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


def twice_as_large(maps: torch.Tensor) -> torch.Tensor:
    """Return maps (B, C, h, w) interpolated to (B, C, 2 h, 2 w)."""
    return nn.functional.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)


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
    """Return the network of the extent that `arch` describes, with random weights.

    It maps normalised bands (B, 5, H, W) to logits (B, 1, H, W) of glacier of either kind; H and W are
    multiples of STRIDE.

    Args:
        arch: {"name": a key of NETWORKS, "args": arguments of that network}.

    Raises:
        InputError: there is no such network here.
    """
    if arch["name"] not in NETWORKS:
        raise InputError(
            f"network {arch['name']!r} is not among {', '.join(NETWORKS)} of this solution.py; use the "
            "solution.py that `make submission` writes beside such a model"
        )
    sizes = {"in_channels": len(BANDS), "classes": 1, "encoder_weights": None}
    return NETWORKS[arch["name"]](**{**arch.get("args", {}), **sizes})


# --- Views ----------------------------------------------------------------------------------------

Transform = Callable[[torch.Tensor], torch.Tensor]


class View(NamedTuple):
    """One view of test-time augmentation: a change of a batch (B, C, H, W), and the way back."""

    name: str
    forward: Transform
    inverse: Transform


def flip_view(name: str, axis: int) -> View:
    """Return the view that mirrors along `axis`; a mirror image is its own way back."""
    return View(name, lambda x: x.flip(axis), lambda x: x.flip(axis))


def rotation_view(turns: int) -> View:
    """Return the view rotated by `turns` quarter turns."""
    return View(f"rotation {90 * turns}", lambda x: x.rot90(turns, (2, 3)), lambda x: x.rot90(-turns, (2, 3)))


VIEWS = (
    View("identity", lambda x: x, lambda x: x),
    flip_view("horizontal flip", 3),
    flip_view("vertical flip", 2),
    rotation_view(1),
    rotation_view(2),
    rotation_view(3),
)


def pad_to_multiple(x: torch.Tensor, multiple: int = STRIDE) -> torch.Tensor:
    """Return (B, C, H, W) padded below and right with zeros (nodata) to multiples of `multiple`."""
    height, width = x.shape[2:]
    return nn.functional.pad(x, (0, -width % multiple, 0, -height % multiple))


# --- Ensemble -------------------------------------------------------------------------------------


class Member(NamedTuple):
    """One network, its weight in the average, and the statistics that its input is normalised with."""

    network: nn.Module
    weight: float
    normalization: Mapping[str, Sequence[float]]


class Pass(NamedTuple):
    """One forward pass over an image: the number of a member and of one of VIEWS."""

    member: int
    view: int


class Postprocess(NamedTuple):
    """What follows the forward passes; `model.pth` stores what out-of-fold MCC decided."""

    extent_bias: float = 0.0  # added to the logit of glacier of either kind
    debris_bias: float = 0.0  # added to the logit of debris given glacier
    crf: Optional[Crf] = None  # None: no CRF
    min_speck: int = 0  # px, smaller patches of a glacier or lake class go to what surrounds them
    min_hole: int = 0  # px, smaller gaps in them are filled


class Model(NamedTuple):
    """All that prediction needs, as read from `model.pth`."""

    members: tuple[Member, ...]  # of the extent
    kind: Optional[Member]  # tells debris from clean ice; None: all glacier is clean
    passes: tuple[Pass, ...]  # the most useful first: where time is short, the last are left out
    postprocess: Postprocess
    time_budget: float  # seconds that a run may take, infinite where it may take any
    device: torch.device
    pace: dict[int, float]  # seconds a pixel of a member's latest pass, learned on the way
    workers: int = 1  # threads that segment tiles side by side


class Prediction(NamedTuple):
    """Class probabilities (4, H, W) float32 of an image, and how many passes they rest on."""

    probs: np.ndarray
    passes: int


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
    """Return the probability (H, W) of glacier of either kind, and the number of passes it is the mean of.

    It is the weighted mean over members of the mean of each member's passes: a member's weight does not
    depend on how many of its views there was time for.

    Args:
        model: its members.
        image: (H, W, 5) physical units, NaN where nodata.
        passes: which to make, in this order, at least one.
        until: time of `time.perf_counter` after which none should end. The first is always made; a further
            one is where its member's latest pass, on this image or one before, would fit; of a member
            without any, the slowest of the others'.
    """
    pixels = image.shape[0] * image.shape[1]
    sums: dict[int, torch.Tensor] = {}
    made: Counter = Counter()  # passes of each member
    for number, (member, view) in enumerate(passes):
        started = time.perf_counter()
        expected = model.pace.get(member, max(model.pace.values(), default=0.0)) * pixels
        if number > 0 and started + expected > until:
            break
        probs = member_logits(model.members[member], image, VIEWS[view], model.device).sigmoid()
        sums[member] = sums[member] + probs if member in sums else probs
        made[member] += 1
        model.pace[member] = (time.perf_counter() - started) / pixels
    weights = {member: model.members[member].weight for member in sums}
    parts = [weights[member] / made[member] * maps for member, maps in sums.items()]
    return torch.stack(parts).sum(dim=0) / sum(weights.values()), sum(made.values())


def class_probabilities(extent: torch.Tensor, debris: torch.Tensor) -> np.ndarray:
    """Return probabilities (4, H, W) float32 of the four classes.

    Lakes get none: two small ones in the labels are no basis for a network, and snow lies over both.

    Args:
        extent: (H, W), probability of glacier of either kind.
        debris: (H, W), probability of debris given glacier.
    """
    return to_array(torch.stack([1 - extent, extent * (1 - debris), extent * debris, 0 * extent]))


def predict_window(model: Model, image: np.ndarray, until: float = math.inf) -> Prediction:
    """Return the class probabilities of an image (H, W, 5) small enough for one pass."""
    valid, steps = valid_mask(image), model.postprocess
    if not valid.any():  # nothing was seen: certain background, without a forward pass
        nothing = torch.zeros(image.shape[:2])
        return Prediction(class_probabilities(nothing, nothing), len(model.passes))
    extent, passes = extent_probability(model, image, model.passes, until)  # (H, W)
    debris = torch.zeros_like(extent)
    if model.kind:
        debris = member_logits(model.kind, image, VIEWS[0], model.device).add(steps.debris_bias).sigmoid()
    extent = extent.logit(eps=1e-6).add(steps.extent_bias).sigmoid()
    probs = class_probabilities(extent, debris)  # (4, H, W)
    if steps.crf:
        features = normalize(image, model.members[0].normalization)  # (5, H, W)
        probs = refine_with_crf(probs, features, valid, steps.crf)
    return Prediction(probs, passes)


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

    def ramp(length: int) -> np.ndarray:
        to_edge = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
        return np.minimum(to_edge / OVERLAP, 1).astype(np.float32)

    return ramp(height)[:, None] * ramp(width)[None, :]


def predict_scene(model: Model, image: np.ndarray, until: float = math.inf) -> Prediction:
    """Return blended scores (4, H, W) float32 of a large image from overlapping windows.

    Every window gets an equal part of the time that is left, and one that is not begun in time is background;
    the passes are those of the window with fewest.
    """
    height, width = image.shape[:2]
    total = np.zeros((len(CLASS_NAMES), height, width), np.float32)
    windows = [
        np.s_[top : top + WINDOW, left : left + WINDOW]
        for top in window_starts(height)
        for left in window_starts(width)
    ]
    workers = most_workers(model)

    def predict(number: int) -> Optional[Prediction]:
        if time.perf_counter() > until:
            return None
        until_here = share_of_time(until, min(1.0, workers / (len(windows) - number)))
        return predict_window(model, image[windows[number]], until_here)

    fewest = len(model.passes)
    for window, prediction in zip(windows, side_by_side(predict, range(len(windows)), workers)):
        if prediction:
            total[(slice(None), *window)] += prediction.probs * blend_weights(*prediction.probs.shape[1:])
        fewest = min(fewest, prediction.passes if prediction else 0)
    return Prediction(total, fewest)  # the scale of a pixel's weights does not matter: only their order does


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
    """Return probabilities (4, H, W) float32 after mean-field inference; unchanged without pydensecrf.

    Nodata pixels take no part: they carry no evidence and keep their probabilities.

    Args:
        probs: (4, H, W) float32, sums to 1 over the classes.
        features: (5, H, W) float32, the normalised bands.
        valid: (H, W) bool.
        crf: its settings.
    """
    if densecrf is None:
        warn_once("pydensecrf is not installed: masks are made without the CRF that these weights ask for")
        return probs
    rows, columns = np.nonzero(valid)
    positions = np.stack([rows, columns]).astype(np.float32)  # (2, N)
    appearance = features[:, valid] / np.float32(crf.bilateral_std)  # (5, N)
    field = densecrf.DenseCRF(len(rows), len(probs))
    # Clipped, since the logarithm of an exact 0 would forbid a class whatever the neighbours say.
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(probs[:, valid], 1e-5, 1))))
    field.addPairwiseEnergy(
        np.ascontiguousarray(positions / np.float32(crf.smooth_px)), compat=crf.smooth_weight
    )
    joint = np.concatenate([positions / np.float32(crf.bilateral_px), appearance])  # (7, N)
    field.addPairwiseEnergy(np.ascontiguousarray(joint), compat=crf.bilateral_weight)
    refined = probs.copy()
    refined[:, valid] = np.asarray(field.inference(int(crf.iterations)))
    return refined


def absorb_small_patches(classes: np.ndarray, valid: np.ndarray, of_class: int, min_size: int) -> None:
    """Give each connected patch of `of_class` below `min_size` px to the commonest class around it, in place.

    Patches are 8-connected; nodata has no say, and a patch with nothing but nodata around it becomes
    background.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        ((classes == of_class) & valid).astype(np.uint8), connectivity=8, ltype=cv2.CV_32S
    )
    for label in range(1, count):
        left, top, width, height, size = stats[label]
        if size >= min_size:
            continue
        box = np.s_[max(top - 1, 0) : top + height + 1, max(left - 1, 0) : left + width + 1]
        patch = labels[box] == label
        ring = (
            cv2.dilate(patch.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) & ~patch & valid[box]
        )
        around = np.bincount(classes[box][ring], minlength=len(CLASS_NAMES))
        classes[box][patch] = around.argmax()


def clean_classes(classes: np.ndarray, valid: np.ndarray, min_speck: int, min_hole: int) -> np.ndarray:
    """Return (H, W) class indices without specks and holes, 0 where nodata.

    Args:
        classes: (H, W) uint8.
        valid: (H, W) bool.
        min_speck: px; smaller patches of glacier, debris or lake are absorbed by what surrounds them; 0 keeps
            all. min_hole: px; smaller patches of other are; 0 keeps all.
    """
    cleaned = np.where(valid, classes, 0).astype(np.uint8)
    for of_class in range(1, len(CLASS_NAMES)):
        absorb_small_patches(cleaned, valid, of_class, min_speck)
    absorb_small_patches(cleaned, valid, 0, min_hole)
    return cleaned


# --- Mask -----------------------------------------------------------------------------------------


def decide_classes(probs: np.ndarray) -> np.ndarray:
    """Return the class index of each pixel, (H, W) uint8, of probabilities or scores (4, H, W).

    First glacier of either kind or not, then which: three tenths of clean ice and three of debris outweigh
    four tenths of other, which a plain argmax would choose.
    """

    def likelier(first: int, second: int) -> np.ndarray:
        return np.where(probs[second] > probs[first], np.uint8(second), np.uint8(first))

    glacier, rest = (probs[first] + probs[second] for first, second in (GLACIER_GROUP, REST_GROUP))
    return np.where(glacier > rest, likelier(*GLACIER_GROUP), likelier(*REST_GROUP))


class Segmentation(NamedTuple):
    """Class indices (H, W) uint8, and how many passes they rest on."""

    classes: np.ndarray
    passes: int


def predict_classes(model: Model, image: np.ndarray, until: float = math.inf) -> Segmentation:
    """Return the classes of a tile or scene (H, W, 5) in physical units, NaN where nodata."""
    fits = max(image.shape[:2]) <= LARGEST_TILE
    prediction = (predict_window if fits else predict_scene)(model, image, until)
    steps, classes = model.postprocess, decide_classes(prediction.probs)  # (H, W)
    cleaned = clean_classes(classes, valid_mask(image), steps.min_speck, steps.min_hole)
    return Segmentation(cleaned, prediction.passes)


def to_mask(classes: np.ndarray) -> np.ndarray:
    """Return class indices 0 to 3 as the competition's grey values, uint8 of the same shape."""
    return np.asarray(CLASS_VALUES, np.uint8)[classes]


# ==================================================================================================
# Part 2: the service
# ==================================================================================================
# --- Files: finding and reading -------------------------------------------------------------------

DEFAULT_SHAPE = (512, 512)  # of the mask for a tile of which no band can be read
TIFF_SUFFIXES = (".tif", ".tiff")
MOST_PIXELS = 100_000_000  # of a raster, more than a whole Landsat scene; a small file can declare far more
UNPACKERS: dict[int, Callable[[], Any]] = {  # by compression
    8: zlib.decompressobj,
    32946: zlib.decompressobj,
    34925: lzma.LZMADecompressor,
}
HARMLESS_BYTES = 2**16  # of a packed strip or tile, which unpacks to no more than about a thousand times that
LARGEST_VALUE = 1e6  # stored values are below 65536; what is far above, or below 0, is some fill value
GDAL_NODATA_TAG = 42113
# Fill values in use for signed rasters. In an int16 file that was cast from uint16 they may also be the
# measurements 55537 and 32768, which are then lost: single pixels, against whole areas of fill.
SIGNED_FILL_VALUES = (-9999, -32768)
PLAUSIBLE_KELVIN = (180.0, 360.0)  # surface temperatures on Earth, with a margin
EXPECTED_LAYOUT = (
    "expected a folder with Band1, Band2, Band3, Band4 and Band5 in it, each with one TIFF a tile that "
    "shares its tile id with the other bands (img001.tif everywhere, or B2_B2_masked_02_07.tif in Band1 and "
    "B10_B10_masked_02_07.tif in Band5)"
)

PathLike = Union[str, Path]
DataSource = Union[str, Path, Mapping[str, PathLike]]
Item = TypeVar("Item")
Result = TypeVar("Result")


class TileFiles(NamedTuple):
    """The files of one tile. `name` is Band1's file name; `paths` has None where a band has no file."""

    tile_id: str
    name: str
    paths: tuple[Optional[Path], ...]


def tile_id(filename: str) -> str:
    """Return the id that a tile's files share: "001" for img001.tif, "02_07" for B10_B10_masked_02_07.tif.

    These two are what the platform derives itself. For any other name the id is the stem without leading band
    names.
    """
    stem = Path(filename).stem
    numbered = re.search(r"img(\d+)$", stem, re.IGNORECASE)
    if numbered:
        return numbered.group(1)
    gridded = re.search(r"(\d\d_\d\d)$", stem)
    if gridded:
        return gridded.group(1)
    return re.sub(r"^(?:(?:B|Band)\d+_)+", "", stem, flags=re.IGNORECASE)


def band_number(name: str) -> Optional[int]:
    """Return 1 to 5 for a name of a band ("Band4", "band_4", or Landsat's "B6"), else None."""
    numbered = re.fullmatch(r"band[ _-]?(\d+)", name, re.IGNORECASE)
    if numbered and 1 <= int(numbered.group(1)) <= len(BANDS):
        return int(numbered.group(1))
    landsat_names = [band.landsat for band in BANDS]
    return landsat_names.index(name.upper()) + 1 if name.upper() in landsat_names else None


def band_folders(data: DataSource) -> dict[int, Path]:
    """Return {band number: folder} for a data folder or a mapping of band names to folders.

    Raises:
        InputError: the folder does not exist or holds no band folder.
    """
    try:
        named = named_folders(data)
    except (OSError, TypeError) as error:
        raise InputError(f"{data}: cannot be looked into ({error}); {EXPECTED_LAYOUT}") from error
    folders: dict[int, Path] = {}
    for name, folder in named.items():
        number = band_number(name)
        if number and folders.setdefault(number, folder) != folder:
            warn(f"{folder}: not used, {folders[number]} is that band too; remove one of the two")
    if not folders:
        where = "the mapping given" if isinstance(data, Mapping) else str(data)
        found = ", ".join(sorted(named)[:10]) or "nothing"
        raise InputError(f"{where}: no band folders, found {found}; {EXPECTED_LAYOUT}")
    return folders


def named_folders(data: DataSource) -> dict[str, Path]:
    """Return {name: folder} for the entries of a mapping, or for the folders in a data folder."""
    if isinstance(data, Mapping):
        return {str(name): Path(folder) for name, folder in data.items()}
    if not os.path.isdir(data):
        raise InputError(f"{data}: no such folder; {EXPECTED_LAYOUT}")
    return {entry.name: entry for entry in sorted(Path(data).iterdir()) if os.path.isdir(entry)}


def list_band(folder: Path) -> dict[str, Path]:
    """Return {tile id: file} for the TIFFs of one band folder; one that cannot be looked into has none."""
    try:
        entries = sorted(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        warn(f"{folder}: cannot be looked into ({error.strerror}); make it readable")
        entries = []
    files: dict[str, Path] = {}
    for path in entries:
        if path.suffix.lower() not in TIFF_SUFFIXES or path.name.startswith("."):
            continue
        first = files.setdefault(tile_id(path.name), path)
        if first != path:
            warn(f"{path}: has the tile id of {first.name}, which is used; rename or remove one of the two")
    return files


def find_tiles(data: DataSource) -> list[TileFiles]:
    """Return the tiles of all band folders, sorted by tile id; a tile that lacks some band is listed too.

    Raises:
        InputError: there are no band folders or no tiles in them.
    """
    folders = band_folders(data)
    bands = [list_band(folders[number]) if number in folders else {} for number in range(1, len(BANDS) + 1)]
    tiles = []
    for identifier in sorted(set().union(*bands)):
        paths = tuple(band.get(identifier) for band in bands)
        reference = next(path for path in paths if path is not None)
        tiles.append(TileFiles(identifier, reference.name, paths))
    if not tiles:
        looked = ", ".join(str(folder) for folder in folders.values())
        raise InputError(f"no TIFF in {looked}; {EXPECTED_LAYOUT}")
    return tiles


def decode_tiff(path: Path) -> tuple[np.ndarray, Optional[float]]:
    """Return a TIFF's first page and its declared nodata value.

    Raises:
        TileError: the file cannot be read as a TIFF, or is too large.
    """
    size = os.path.getsize(path) if os.path.isfile(path) else "no"
    try:
        if size == "no":  # a pipe or a device would be read for ever
            raise ValueError("no file that can be reached")
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            assert isinstance(page, tifffile.TiffPage)  # as the first one always is
            refuse_bomb(page, path)
            tag = page.tags.get(GDAL_NODATA_TAG)
            return decode_page(page, path), parse_nodata(tag)
    except TileError:
        raise
    except Exception as error:  # a damaged TIFF may raise almost anything from within its decoder
        raise TileError(
            f"{path}: cannot be read as a TIFF ({size} bytes; {type(error).__name__}: {error}); "
            "copy or export the file again"
        ) from error


def refuse_bomb(page: tifffile.TiffPage, path: Path) -> None:
    """Raise TileError for a page that would take far more memory than its file leads one to expect."""
    height, width = page.imagelength, page.imagewidth
    if max(math.prod(page.shape), page.tilewidth * page.tilelength) > MOST_PIXELS:
        raise TileError(
            f"{path}: declares {width} x {height} px, expected {MOST_PIXELS:,} px or fewer; cut it into "
            "tiles or, if it is no scene of that size, copy or export the file again"
        )
    unpacker = UNPACKERS.get(int(page.compression))
    if unpacker is None:
        return
    most = 2 * page.nbytes + 2**24  # bytes; the last strip or tile may reach beyond the image
    for offset, count in zip(page.dataoffsets, page.databytecounts):
        if count > HARMLESS_BYTES:
            page.parent.filehandle.seek(offset)
            if len(unpacker().decompress(page.parent.filehandle.read(count), most + 1)) > most:
                raise TileError(
                    f"{path}: unpacks to more than its {width} x {height} px; copy or export the file again"
                )


def decode_page(page: tifffile.TiffPage, path: Path) -> np.ndarray:
    """Return a page's pixels, by OpenCV where tifffile lacks the codec (LZW without imagecodecs, for one)."""
    try:
        return page.asarray()
    except ValueError:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise
        return pixels


def parse_nodata(tag: Optional[tifffile.TiffTag]) -> Optional[float]:
    """Return the value of a GDAL_NODATA tag, None where it is absent or no number."""
    try:
        return float(str(tag.value).strip("\x00 ")) if tag else None
    except ValueError:
        return None


def read_raster(path: PathLike) -> np.ndarray:
    """Return one band as stored, (H, W) float32, NaN where nodata: 0, the declared nodata value, NaN,
    infinities and other numbers too large for a measurement.

    Landsat values are unsigned: negative int16 values are those above 32767 of a file that was cast to int16.

    Raises:
        TileError: no readable TIFF, not one band, or not a number type.
    """
    path = Path(path)
    pixels, declared = decode_tiff(path)
    if pixels.ndim == 3 and pixels.shape[0] == 1:
        pixels = pixels[0]
    elif pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 or pixels.size == 0 or pixels.dtype.kind not in "uif":
        raise TileError(
            f"{path}: found an array of shape {pixels.shape} and type {pixels.dtype}, expected one band "
            "(H, W) of integers or floats; split the bands into their own files"
        )
    nodata = (pixels == 0) | ~np.isfinite(pixels)
    if pixels.dtype.itemsize >= 4:
        nodata |= (pixels > LARGEST_VALUE) | (pixels < -LARGEST_VALUE)
    if declared is not None:
        nodata |= pixels == declared
    if pixels.dtype.kind == "i":
        nodata |= np.isin(pixels, SIGNED_FILL_VALUES)
    if pixels.dtype.kind == "i" and pixels.dtype.itemsize == 2:
        pixels = pixels.astype(np.int16).view(np.uint16)
    values = pixels.astype(np.float32)
    values[nodata] = np.nan
    return values


def read_tile(files: TileFiles) -> np.ndarray:
    """Return a tile in physical units, (H, W, 5) float32: reflectance in bands 1-4, kelvin in band 5, NaN
    where nodata.

    Raises:
        TileError: a band is missing or unreadable, or the bands differ in size.
    """
    missing = [band.folder for band, path in zip(BANDS, files.paths) if path is None]
    if missing:
        raise TileError(
            f"tile {files.tile_id}: no file in {', '.join(missing)} (it has {files.name}), expected one in "
            "each of the five bands; add the missing file or remove the tile"
        )
    paths = [path for path in files.paths if path is not None]
    first = read_raster(paths[0])
    image = np.empty(
        first.shape + (len(BANDS),), np.float32
    )  # filled band by band: a scene is never held twice
    for index, (band, path) in enumerate(zip(BANDS, paths)):
        values = first if index == 0 else read_raster(path)
        if values.shape != first.shape:
            raise TileError(
                f"{path}: {values.shape[1]} x {values.shape[0]} px, expected {first.shape[1]} x "
                f"{first.shape[0]} px as in {paths[0].name}; resample the bands to one grid"
            )
        image[..., index] = to_physical(values, band)
    return image


def readable_shape(files: TileFiles) -> tuple[int, int]:
    """Return a broken tile's size (H, W) from its first readable band, else DEFAULT_SHAPE."""
    for path in filter(None, files.paths):
        try:
            return read_raster(path).shape
        except (TileError, MemoryError):
            continue
    return DEFAULT_SHAPE


def implausible_units(image: np.ndarray) -> Optional[str]:
    """Return a warning where the thermal band's median is no temperature of a land surface, else None."""
    thermal = image[..., -1]
    thermal = thermal[~np.isnan(thermal)]
    if thermal.size == 0:
        return None
    median = float(np.median(thermal))
    if PLAUSIBLE_KELVIN[0] <= median <= PLAUSIBLE_KELVIN[1]:
        return None
    band = BANDS[-1]
    stored = (median - band.offset) / band.scale
    return (
        f"the median of the thermal band is {stored:.0f}, which reads as {median:.1f} K; expected "
        "Collection-2 Level-2 scaled integers (about 20000 to 50000). The mask will be poor; export the tile "
        "as Level-2 data"
    )


def warn(message: str) -> None:
    """Say `message` on standard error, on a line of its own even while a progress bar is drawn."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


@lru_cache(maxsize=None)
def warn_once(message: str) -> None:
    """Say `message` as `warn` does, however often it is asked for, once."""
    warn(message)


# --- The weights file -----------------------------------------------------------------------------

MODEL_FILE = "model.pth"
MODEL_FORMAT = "glacier-kit/3"


def find_weights(given: Optional[PathLike] = None) -> Path:
    """Return the weights file: `given`, else model.pth beside this file, in its `weights/`, or in the working
    folder.

    Raises:
        InputError: there is none; it lists where it was looked for.
    """
    if given is not None:
        if os.path.isfile(given):
            return Path(given)
        raise InputError(
            f"{given}: no such weights file; train one with `make train-all` or leave the argument out"
        )
    here = Path(__file__).resolve().parent
    places = [folder / MODEL_FILE for folder in (here, here / "weights", Path.cwd(), Path.cwd() / "weights")]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise InputError(
        f"no weights: looked for {looked}; put {MODEL_FILE} beside solution.py or name it with --weights"
    )


def read_model_file(path: PathLike) -> dict:
    """Return the containers and tensors of a model file.

    Raises:
        InputError: the file is damaged or is no model of this kit.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums of the tensors
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes may raise almost anything
        raise InputError(
            f"{path}: damaged or no weights file ({Path(path).stat().st_size} bytes; {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); copy it again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != MODEL_FORMAT:
        found = content.get("format", "none") if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path}: format {found!r}, expected {MODEL_FORMAT!r}; pack it with `python -m train pack`"
        )
    absent = [key for key in ("members", "passes", "postprocess") if not content.get(key)]
    if absent:
        raise InputError(f"{path}: no {', '.join(absent)} in it; pack it again with `python -m train pack`")
    return content


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load float16 or float32 weights into `network`, strictly.

    Raises:
        InputError: names all missing, unexpected and misshapen weights at once.
    """
    expected = network.state_dict()
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    misshapen = [
        f"{name} {tuple(state[name].shape)} for {tuple(expected[name].shape)}"
        for name in sorted(set(expected) & set(state))
        if state[name].shape != expected[name].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in faults.items() if names
        )
        raise InputError(f"{source}: weights do not fit the network they name: {listed}")
    values = {name: tensor.to(expected[name].dtype) for name, tensor in state.items()}
    broken = [name for name, tensor in values.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(
            f"{source}: {len(broken)} weights are NaN or infinite: {', '.join(broken[:5])}; pack it again"
        )
    network.load_state_dict(values)


def load_network(stored: Mapping, source: str) -> nn.Module:
    """Return the network of one member of a model file, in evaluation mode, BatchNorms merged."""
    arch = stored["arch"]
    network = KindNet(**arch["args"]) if arch["name"] == "KindNet" else build_network(arch)
    load_state(network, stored["state_dict"], source)
    merge_batchnorms(network.requires_grad_(False).eval(), stored.get("batchnorms", ()))
    return network.to(memory_format=torch.channels_last)


def merge_batchnorms(network: nn.Module, pairs: Iterable[Sequence[str]]) -> None:
    """Merge BatchNorms into the convolutions before them, in place: exact, and fewer steps a pass.

    Args:
        network: in evaluation mode.
        pairs: names of a convolution and of the BatchNorm that alone reads its output; `train.pack` found
            them and compared the answers.
    """
    for conv_name, name in pairs:
        conv, bn = (cast(Any, network.get_submodule(layer)) for layer in (conv_name, name))
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        # timm's BatchNormAct2d also holds what follows it: dropout, activation
        rest = nn.Sequential(*(getattr(bn, part) for part in ("drop", "act") if hasattr(bn, part)))
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, rest)


def load_member(stored: Mapping, source: str, device: torch.device) -> Member:
    """Return one member of a model file, ready for inference on `device`.

    Raises:
        InputError: its weights do not fit, or its statistics are not those of five bands.
    """
    for key in ("mean", "std"):
        found = len(stored["normalization"][key])
        if found != len(BANDS):
            raise InputError(f"{source}: {found} values in {key} of normalization, expected {len(BANDS)}")
    network = load_network(stored, source).to(device)
    return Member(network, float(stored["weight"]), stored["normalization"])


def check_settings(model: Model) -> None:
    """Raise ValueError for passes that do not exist, and for a time budget that is none."""
    members, views = range(len(model.members)), range(len(VIEWS))
    unknown = [tuple(p) for p in model.passes if p.member not in members or p.view not in views]
    if unknown or len(set(model.passes)) < len(model.passes):
        raise ValueError(
            f"passes: {unknown or 'some occur twice'}, expected different pairs of one of "
            f"{len(model.members)} members and one of {len(VIEWS)} views, both counted from 0"
        )
    if not model.time_budget > 0:
        raise ValueError(f"time_budget: {model.time_budget}, expected seconds > 0 or null")


def load_model(path: PathLike) -> Model:
    """Return the model that `path` holds, on the GPU where there is one.

    Raises:
        InputError: the file is damaged, incomplete, or its weights do not fit. Random weights are never used.
    """
    content = read_model_file(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        members = tuple(
            load_member(stored, f"{path}, member {number}", device)
            for number, stored in enumerate(content["members"])
        )
        kind = content.get("kind") and load_member(content["kind"], f"{path}, kind", device)
        passes = tuple(Pass(*map(int, pair)) for pair in content["passes"])
        steps = dict(content["postprocess"])
        steps["crf"] = Crf(**steps["crf"]) if steps.get("crf") else None
        time_budget = float(content.get("time_budget") or math.inf)
        model = Model(members, kind, passes, Postprocess(**steps), time_budget, device, {})
        check_settings(model)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: {type(error).__name__}: {error}; pack it again with `python -m train pack`"
        ) from error
    return model


# --- Clock and threads ----------------------------------------------------------------------------

TIME_BUDGET_VARIABLE = "GLACIER_TIME_BUDGET"
JUST_IMPORTED = 30.0  # s after the import within which a call pays for it
SPARE_SECONDS = 3.0  # of a time budget, kept for the last mask and for leaving Python,
SPARE_PART = 0.10  # or this part of it, if that is more: other work on the machine slows the last tiles
MOST_WORKERS = 3  # threads side by side; more need more memory, and share their cores within a pass instead


def usable_cores() -> int:
    """Return how many cores to use: the least of OMP_NUM_THREADS, CPU affinity and cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, cpu_quota(), int(asked) if asked.isdecimal() else cores))


def cpu_quota() -> int:
    """Return the cores that the cgroup (version 2 or 1) grants, sys.maxsize where it sets no limit."""
    try:
        if Path("/sys/fs/cgroup/cpu.max").is_file():
            quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        else:
            quota, period = (
                Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{part}_us").read_text() for part in ("quota", "period")
            )
        return int(quota) // int(period) if int(quota) > 0 else sys.maxsize
    except (OSError, ValueError):  # no such files, or "max"
        return sys.maxsize


def prepare_torch(threads: int) -> None:
    """Set what makes a CPU fast: the number of threads, and no denormal numbers, of which trained networks
    have many and which cost several times the time of others."""
    np.finfo(np.float32)  # NumPy finds its limits on first use, and warns where denormals are flushed by then
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def most_workers(model: Model) -> int:
    """Return how many threads work side by side: none more on a GPU, which works on many pixels at once."""
    return min(usable_cores(), MOST_WORKERS) if model.device.type == "cpu" else 1


def threads_of_each(workers: int) -> int:
    """Return the threads of a pass where so many are made side by side."""
    return max(1, usable_cores() // workers)


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `work(item)` of all items in their order, made by so many threads.

    A pass on several cores waits at the end of each layer for the slowest; passes on one core each wait for
    nothing. Few items are taken ahead of what is yielded, and none after the caller has stopped.
    """
    if workers == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, initializer=prepare_torch, initargs=(threads_of_each(workers),))
    begun: "deque[Future[Result]]" = deque()  # as many as run, and one that waits
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
    """Return the time at which `part` of the time from now to `until` will have passed."""
    now = time.perf_counter()
    return now + (until - now) * part


class TimeBudget(NamedTuple):
    """Seconds that a run may take.

    A binding budget is kept even where tiles are left without any pass. One that nobody asked for may be
    exceeded by the first passes, so that thousands of tiles still get their masks.
    """

    seconds: float
    binding: bool

    def deadline(self, started: float) -> float:
        """Return the time of `time.perf_counter` at which a run that began at `started` plans to end."""
        return started + self.seconds - max(SPARE_SECONDS, SPARE_PART * self.seconds)


def choose_budget(given: Optional[str], stored: float) -> TimeBudget:
    """Return the time budget: `given`, else the environment's, else the one stored with the weights.

    Raises:
        InputError: it is no number of seconds above 0.
    """
    asked = os.environ.get(TIME_BUDGET_VARIABLE) if given is None else given
    if not asked:
        return TimeBudget(stored, binding=False)
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InputError(f"time budget {asked!r}: expected seconds above 0, or inf for no limit")
    return TimeBudget(seconds, binding=True)


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
    """Return a function that writes a mask as a PNG with the stem of Band1's file."""

    def write(tile: TileFiles, mask: np.ndarray) -> None:
        encoded = cv2.imencode(".png", mask)[1]
        write_atomically(folder / f"{Path(tile.name).stem}.png", encoded.tobytes())

    return write


def tiff_writer(folder: Path) -> Writer:
    """Return a function that writes a mask as a TIFF named exactly as Band1's file."""

    def write(tile: TileFiles, mask: np.ndarray) -> None:
        encoded = BytesIO()
        tifffile.imwrite(encoded, mask, photometric="minisblack")
        write_atomically(folder / tile.name, encoded.getvalue())

    return write


def remove_abandoned(folder: Path) -> None:
    """Remove what killed runs left unfinished in `folder`, but nothing that another run is writing now."""
    for path in folder.glob(f"{PARTIAL_PREFIX}*.part"):
        try:
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()
        except FileNotFoundError:  # that other run has renamed it
            continue


def prepare_output(folder: PathLike, data: DataSource) -> Path:
    """Return `folder`, made where it is absent.

    Raises:
        InputError: it cannot be made or written to, or is one of the input folders, whose files would be
        overwritten.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        remove_abandoned(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write masks there ({error.strerror}); name a writable folder"
        ) from error
    if any(os.path.isdir(band) and band.samefile(folder) for band in band_folders(data).values()):
        raise InputError(
            f"{folder}: is an input folder, whose files masks would overwrite; name another output folder"
        )
    return folder


# --- One run over a folder ------------------------------------------------------------------------


class TileResult(NamedTuple):
    """The mask of one tile, uint8 (H, W), how many passes it rests on and how long it took; `fault` says why
    it is plain background, None if all went well."""

    tile: TileFiles
    mask: np.ndarray
    passes: int
    seconds: float
    fault: Optional[str]


class Summary(NamedTuple):
    """What a run did, by tile id: the masks, how many passes each rests on, and what went wrong."""

    masks: dict[str, np.ndarray]
    passes: dict[str, int]
    faults: dict[str, str]


Reading = tuple[TileFiles, "Future[np.ndarray]"]


def read_ahead(tiles: Sequence[TileFiles], read: Callable[[TileFiles], np.ndarray]) -> Iterator[Reading]:
    """Yield each tile and its image, which is read while those before it are segmented."""
    with ThreadPoolExecutor(1) as pool:
        readings = [pool.submit(read, tile) for tile in tiles[:1]]
        for index, tile in enumerate(tiles):
            readings += [pool.submit(read, following) for following in tiles[index + 1 : index + 2]]
            yield tile, readings.pop(0)


def failed(tile: TileFiles, fault: str) -> TileResult:
    """Return the background mask of a tile that could not be segmented."""
    return TileResult(tile, np.zeros(readable_shape(tile), np.uint8), 0, 0.0, fault)


def segment_tile(
    model: Model, tile: TileFiles, reading: "Future[np.ndarray]", until: float = math.inf
) -> TileResult:
    """Return a tile's mask; a tile that cannot be segmented gets a background mask and the reason."""
    started = time.perf_counter()
    try:
        segmentation = predict_classes(model, reading.result(), until)
        seconds = time.perf_counter() - started
        return TileResult(tile, to_mask(segmentation.classes), segmentation.passes, seconds, None)
    except TileError as error:
        return failed(tile, str(error))
    except (RuntimeError, MemoryError, ValueError, cv2.error) as error:  # one tile must not cost the others
        return failed(tile, f"tile {tile.tile_id} ({tile.name}): {type(error).__name__}: {error}")


def read_checked(tile: TileFiles) -> np.ndarray:
    """Return what `read_tile` does, with a warning where the values can hardly be what they should."""
    image = read_tile(tile)
    doubt = implausible_units(image)
    if doubt:
        warn(f"tile {tile.tile_id} ({tile.name}): {doubt}")
    return image


def is_scene(tile: TileFiles) -> bool:
    """Return whether a tile needs windows, and much memory, as its first band's header says."""
    path = next(filter(None, tile.paths))
    try:
        with tifffile.TiffFile(path) as tiff:
            return max(tiff.pages[0].shape[:2]) > LARGEST_TILE
    except Exception:  # damaged bytes may raise almost anything; reading the tile will say what is wrong
        return False


def with_workers(model: Model, tiles: Sequence[TileFiles]) -> Model:
    """Return the model with its threads shared between tiles; those of a scene go to its windows."""
    workers = min(most_workers(model), len(tiles))
    if workers > 1 and any(map(is_scene, tiles)):
        workers = 1
    torch.set_num_threads(threads_of_each(workers))
    return model._replace(workers=workers)


def segment_all(
    model: Model, tiles: Sequence[TileFiles], deadline: float, last_start: float
) -> Iterator[TileResult]:
    """Yield the result of every tile, each with as many passes as fit into its share of the time left.

    Args:
        model: with all its passes.
        tiles: what to segment.
        deadline: time of `time.perf_counter` at which all has to be done; infinite for all passes.
        last_start: time after which a tile is not begun any more: it is background.
    """

    def segment(numbered: tuple[int, Reading]) -> TileResult:
        number, (tile, reading) = numbered
        if time.perf_counter() > last_start:
            return failed(tile, f"tile {tile.tile_id}: the time budget was used up; allow more seconds")
        until = share_of_time(deadline, min(1.0, model.workers / (len(tiles) - number)))
        return segment_tile(model, tile, reading, until)

    return side_by_side(segment, enumerate(read_ahead(tiles, read_checked)), model.workers)


def with_progress(results: Iterator[TileResult], total: int) -> Iterator[TileResult]:
    """Pass `results` on; show a bar with an estimate on a terminal, one line a tile elsewhere."""
    started = time.perf_counter()
    bar = tqdm(total=total, unit="tile", file=sys.stderr, disable=not sys.stderr.isatty())
    for done, result in enumerate(results, start=1):
        bar.update()
        if bar.disable:
            left = (time.perf_counter() - started) / done * (total - done)
            outcome = "background (failed)" if result.fault else f"mask, passes: {result.passes}"
            print(
                f"[{done}/{total}] {result.tile.name}: {outcome}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
        if result.fault:
            tqdm.write(f"error: {result.fault}; this tile gets a background mask", file=sys.stderr)
        yield result
    bar.close()


def save_mask(write: Writer, result: TileResult) -> Optional[str]:
    """Write a mask; return why that failed, else None: one tile must not cost the others their masks."""
    try:
        write(result.tile, result.mask)
    except (OSError, ValueError, cv2.error) as error:
        fault = f"the mask of {result.tile.name} cannot be written ({error}); make room or free the name"
        tqdm.write(f"error: {fault}", file=sys.stderr)
        return fault
    return None


def collect(results: Iterator[TileResult], write: Optional[Writer], keep_masks: bool = True) -> Summary:
    """Return a summary of `results`; each mask is written while the next tile is segmented."""
    summary = Summary({}, {}, {})
    saving: dict[str, "Future[Optional[str]]"] = {}
    with ThreadPoolExecutor(1) as pool:
        for result in results:
            identifier = result.tile.tile_id
            if keep_masks:
                summary.masks[identifier] = result.mask
            summary.passes[identifier] = result.passes
            if result.fault:
                summary.faults[identifier] = result.fault
            if write:
                saving[identifier] = pool.submit(save_mask, write, result)
    for identifier, saved in saving.items():
        fault = saved.result()
        if fault:
            summary.faults.setdefault(identifier, fault)
    return summary


def segment_folder(
    data: DataSource,
    weights: Optional[PathLike],
    write: Optional[Writer],
    time_budget: Optional[str] = None,
    started: Optional[float] = None,
    keep_masks: bool = True,
) -> Summary:
    """Segment all tiles of `data`, hand each mask to `write` as soon as it is ready, and return them all.

    Args:
        data: the tiles.
        weights: the model file, None to look for it.
        write: writes a mask, None to write none.
        time_budget: see `choose_budget`.
        started: time of `time.perf_counter` from which the budget counts, None for now.
        keep_masks: whether they are in the summary; those of thousands of tiles need gigabytes.

    Raises:
        InputError: no tiles, no weights, or a time budget that is none; nothing is written then.
    """
    started = time.perf_counter() if started is None else started
    tiles = find_tiles(data)
    model = with_workers(load_model(find_weights(weights)), tiles)
    budget = choose_budget(time_budget, model.time_budget)
    deadline = budget.deadline(started)
    results = segment_all(model, tiles, deadline, deadline if budget.binding else math.inf)
    summary = collect(with_progress(results, len(tiles)), write, keep_masks)
    print(closing_line(summary, model, time.perf_counter() - started), file=sys.stderr)
    return summary


def closing_line(summary: Summary, model: Model, seconds: float) -> str:
    """Return a run in one line: tiles, failures, seconds a tile, passes a tile."""
    tiles, passes, most = len(summary.passes), sorted(summary.passes.values()), len(model.passes)
    hint = "" if passes[0] == most else " (--time-budget inf makes them all)"
    return (
        f"{tiles} tiles, {len(summary.faults)} failed, {seconds / tiles:.2f} s a tile, "
        f"{passes[0]} to {passes[-1]} of {most} passes{hint}"
    )


# --- The doors ------------------------------------------------------------------------------------


def maskgeration(imagepath: DataSource, second: Optional[PathLike] = None) -> dict[str, np.ndarray]:
    """Segment all tiles; the platform's entry point, whose name the organisers' template spells like this.

    Args:
        imagepath: {"Band1": folder, ...}, or the data folder.
        second: an existing file, or any name that ends in .pth, is taken as weights, as the platform does.
            All else is taken as what its documents promise, a folder, into which masks go named as in Band1
            if it can be written to; a model.pth in it is used.

    Returns:
        {tile id: mask (H, W) uint8 of 0, 85, 170, 255}, background for a tile that could not be read.

    Raises:
        InputError: there are no tiles, or no intact weights.
    """
    if not second or os.path.isfile(second) or Path(second).suffix == ".pth":
        return segment_folder(imagepath, platform_weights(second), None, started=call_started()).masks
    beside_masks = Path(second) / MODEL_FILE
    try:
        write = tiff_writer(prepare_output(second, imagepath))
    except InputError as error:
        warn(f"{error}; masks are returned only")
        write = None
    weights = beside_masks if beside_masks.is_file() else None
    return segment_folder(imagepath, weights, write, started=call_started()).masks


def call_started() -> float:
    """Return the time of `time.perf_counter` from which a call's budget counts.

    The platform imports this file and calls at once, and its clock sees both: then it is the import's start.
    """
    now = time.perf_counter()
    return STARTED if now - STARTED < JUST_IMPORTED else now


def platform_weights(given: Optional[PathLike]) -> Optional[Path]:
    """Return `given` where it exists; else None, with a warning, so that other places are searched."""
    if not given or os.path.isfile(given):
        return Path(given) if given else None
    warn(f"{given}: no such weights file; looking beside solution.py and in the working folder")
    return None


def parse_arguments(arguments: Optional[list[str]]) -> argparse.Namespace:
    """Return `data`, `output`, `named_as_band1` and `weights` from any of the three command lines."""
    parser = argparse.ArgumentParser(
        description="Segment Landsat-8 tiles into glacier masks.", epilog=EXPECTED_LAYOUT, allow_abbrev=False
    )
    parser.add_argument("in_dir", nargs="?", help="data folder; writes one PNG a tile")
    parser.add_argument("out_dir", nargs="?", help="folder for the PNGs")
    parser.add_argument(
        "--data", "--imagepath", dest="data", help="data folder; writes TIFFs named as in Band1"
    )
    parser.add_argument("--out", "--output", dest="output", help="folder for the TIFFs")
    parser.add_argument("--masks", help="accepted for the organisers' template, not used")
    parser.add_argument(
        "--weights", help="model.pth; default: beside this file, in weights/, or in the working folder"
    )
    parser.add_argument(
        "--time-budget",
        metavar="SECONDS",
        help=f"end within so many seconds, inf for no limit; default: {TIME_BUDGET_VARIABLE}, else what the "
        "weights say",
    )
    parsed = parser.parse_args(arguments)
    positional, named = (parsed.in_dir, parsed.out_dir), (parsed.data, parsed.output)
    if all(positional) and not any(named):
        parsed.data, parsed.output, parsed.named_as_band1 = parsed.in_dir, parsed.out_dir, False
    elif all(named) and not any(positional):
        parsed.named_as_band1 = True
    else:
        parser.error("give IN_DIR OUT_DIR, or --data D --masks M --out O, or --imagepath D --output O")
    return parsed


def main(arguments: Optional[list[str]] = None) -> int:
    """Run a command line; return the exit status: 0 done, 1 some tile failed, 2 nothing could be done."""
    args = parse_arguments(arguments)
    try:
        folder = prepare_output(args.output, args.data)
        writer = tiff_writer(folder) if args.named_as_band1 else png_writer(folder)
        summary = segment_folder(args.data, args.weights, writer, args.time_budget, STARTED, keep_masks=False)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if summary.faults else 0


if __name__ == "__main__":
    sys.exit(main())
