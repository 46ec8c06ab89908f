"""Required packages: torch, torchvision, segmentation_models_pytorch, numpy, tifffile, opencv-python

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
from io import BytesIO, StringIO
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


def say(message: str) -> None:
    """Write a line on standard error, which may be closed, a logger or left by its reader: no message costs a
    mask."""
    for form in (message, message.encode("ascii", "backslashreplace").decode()):
        try:
            print(form, file=sys.stderr or StringIO(), flush=True)
            return
        except UnicodeError:  # an ASCII console
            continue
        except Exception:  # whatever stands in for standard error may raise anything
            return


def warn(message: str) -> None:
    """Say `message` as a warning."""
    say(f"warning: {message}")


warn_once = lru_cache(maxsize=None)(warn)  # however often it is asked for

# --- Finding tiles --------------------------------------------------------------------------------

TIFF_SUFFIXES = (".tif", ".tiff")
EXPECTED_LAYOUT = (
    "expected a folder with Band1, Band2, Band3, Band4 and Band5 in it, each with one TIFF a tile that "
    "shares its tile id with the other bands (img001.tif everywhere, or B2_B2_masked_02_07.tif in Band1 and "
    "B10_B10_masked_02_07.tif in Band5)"
)
RENAMING = ", ".join(f"{band.landsat} ({band.name}) is {band.folder}" for band in BANDS)
USGS_NAME = re.compile(r"_B\d+\.tiff?$", re.IGNORECASE)  # LC08_L2SP_147037_20200814_20210330_02_T1_SR_B2.TIF

PathLike = Union[str, Path]
DataSource = Union[str, Path, Mapping[str, PathLike]]
Item = TypeVar("Item")
Result = TypeVar("Result")


class TileFiles(NamedTuple):
    """The files of one tile. `name` is Band1's file name; `paths` has None where a band has no file."""

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


def band_number(name: str) -> Optional[int]:
    """Return 1 to 5 for a name of a band ("Band4", "band_4", or Landsat's "B6"), else None."""
    numbered = re.fullmatch(r"band[ _-]?([1-5])", name, re.IGNORECASE)
    landsat = [band.landsat for band in BANDS]
    if numbered:
        return int(numbered.group(1))
    return landsat.index(name.upper()) + 1 if name.upper() in landsat else None


def band_folders(data: DataSource) -> dict[int, Path]:
    """Return {band number: folder} for a data folder or a mapping of band names to folders.

    Raises:
        InputError: the folder does not exist, holds no band folder, or numbers them as Landsat does.
    """
    try:
        if isinstance(data, Mapping):
            where, entries = "the mapping given", {str(name): Path(path) for name, path in data.items()}
        elif os.path.isdir(data):
            where, entries = str(data), {path.name: path for path in sorted(Path(data).iterdir())}
        else:
            raise InputError(f"{data}: no such folder; {EXPECTED_LAYOUT}")
        named = [name for name, path in entries.items() if isinstance(data, Mapping) or os.path.isdir(path)]
    except (OSError, TypeError) as error:
        raise InputError(f"{data}: cannot be looked into ({error}); {EXPECTED_LAYOUT}") from error
    foreign = [name for name in named if re.fullmatch(r"band[ _-]?([6-9]|1[01])", name, re.IGNORECASE)]
    if foreign:
        raise InputError(
            f"{where}: {', '.join(foreign)} look like Landsat's own numbers; here {RENAMING}: rename these five "
            "folders, and move the others away"
        )
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


def list_band(folder: Optional[Path]) -> dict[str, Path]:
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
            files[next(longer for longer in (key, key + path.suffix, path.name) if longer not in files)] = (
                path
            )
    return files


def find_tiles(data: DataSource) -> list[TileFiles]:
    """Return the tiles of all band folders, sorted by tile id; a tile that lacks some band is listed too.

    Files belong together where their names differ in leading band names only. Where tiles would share an id,
    as 2019_08_14 and 2020_08_14 would, each one's id is what its bands' names have in common.

    Raises:
        InputError: there are no band folders or no tiles in them.
    """
    folders = band_folders(data)
    bands = [list_band(folders.get(number)) for number in range(1, len(BANDS) + 1)]
    names = {key: path.name for band in reversed(bands) for key, path in band.items()}  # Band1's outdo others
    owners = Counter(map(tile_id, names.values()))
    if not names:
        looked = ", ".join(str(folder) for folder in folders.values())
        raise InputError(f"no TIFF in {looked}; {EXPECTED_LAYOUT}")
    return sorted(
        TileFiles(key if owners[tile_id(name)] > 1 else tile_id(name), name, tuple(b.get(key) for b in bands))
        for key, name in names.items()
    )


# --- Reading rasters ------------------------------------------------------------------------------

DEFAULT_SHAPE = (512, 512)  # of the mask for a tile of which no band can be read
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
MASK_PAGE = 4  # bit of a page's SubfileType
PLACE_TOLERANCE = 0.25  # px by which the files of a tile may lie apart


class Place(NamedTuple):
    """EPSG code, and (a, b, c, d, e, f) of x = a col + b row + c, y = d col + e row + f."""

    epsg: Optional[int]
    affine: tuple[float, ...]


class Raster(NamedTuple):
    """A TIFF's first page, its declared nodata value, its GDAL masks (0: no data), and where it lies."""

    pixels: np.ndarray
    nodata: Optional[float]
    masks: list[np.ndarray]
    place: Optional[Place]


def decode_tiff(path: Path) -> Raster:
    """Return a TIFF's first page and what the file says about it.

    Raises:
        TileError: the file cannot be read as a TIFF, or is too large.
    """
    size = os.path.getsize(path) if os.path.isfile(path) else "no"
    beside = path.with_name(path.name + ".msk")
    try:
        if size == "no":  # a pipe or a device would be read for ever
            raise ValueError("no file that can be reached")
        with tifffile.TiffFile(path) as tiff:
            pages = [cast(tifffile.TiffPage, page) for page in tiff.pages]
            pixels, tag = decode_page(pages[0], path), pages[0].tags.get(GDAL_NODATA_TAG)
            same = [page for page in pages[1:] if page.shape[:2] == pages[0].shape[:2]]
            masks = [decode_page(page, path) for page in same if page.subfiletype & MASK_PAGE]
            place = place_of(pages[0])
        if path.suffix != ".msk" and os.path.isfile(beside):
            masks.append(decode_tiff(beside).pixels)
        try:
            return Raster(pixels, float(str(tag.value).strip("\x00 ")) if tag else None, masks, place)
        except ValueError:  # a nodata value that is no number
            return Raster(pixels, None, masks, place)
    except TileError:
        raise
    except Exception as error:  # a damaged TIFF may raise almost anything from within its decoder
        raise TileError(
            f"{path}: cannot be read as a TIFF ({size} bytes; {type(error).__name__}: {error}); "
            "copy or export the file again"
        ) from error


def refuse_bomb(page: tifffile.TiffPage, path: Path) -> None:
    """Raise TileError for a page that would take far more memory than its file leads one to expect."""
    size = f"{page.imagewidth} x {page.imagelength} px"
    if max(math.prod(page.shape), page.tilewidth * page.tilelength) > MOST_PIXELS:
        raise TileError(
            f"{path}: declares {size}, expected {MOST_PIXELS:,} px or fewer; cut it into tiles or, if it is no "
            "scene of that size, copy or export the file again"
        )
    unpacker = UNPACKERS.get(int(page.compression))
    most = 2 * page.nbytes + 2**24  # bytes; the last strip or tile may reach beyond the image
    for offset, count in zip(page.dataoffsets, page.databytecounts):
        if unpacker and count > HARMLESS_BYTES:
            page.parent.filehandle.seek(offset)
            if len(unpacker().decompress(page.parent.filehandle.read(count), most + 1)) > most:
                raise TileError(f"{path}: unpacks to more than its {size}; copy or export the file again")


def decode_page(page: tifffile.TiffPage, path: Path) -> np.ndarray:
    """Return a page's pixels, by OpenCV where tifffile lacks the codec (LZW without imagecodecs, for one).

    OpenCV drops a second sample and widens 12 bits without a word: what it returns is compared.
    """
    refuse_bomb(page, path)
    try:
        return page.asarray()
    except ValueError:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED) if page.index == 0 else None
        if pixels is None:
            raise
    dtype = np.dtype(page.dtype)
    found = (pixels.shape, 8 * pixels.dtype.itemsize, pixels.dtype.kind == "f")
    expected = (page.shape, page.bitspersample, dtype.kind == "f")
    if found != expected or pixels.dtype.itemsize != dtype.itemsize:
        raise TileError(
            f"{path}: found shape {found[0]} of {found[1]} bits, expected {expected[0]} of "
            f"{expected[1]} as its header says; "
            "export the file again with one band of 8, 16 or 32 bits, uncompressed or deflated"
        )
    return pixels.view(dtype.newbyteorder("="))  # int16 comes as uint16


def place_of(page: tifffile.TiffPage) -> Optional[Place]:
    """Return the place that a page's GeoTIFF tags name (OGC 19-008r4), None where they name none."""
    try:
        codes = (33550, 33922, 34264, 34735)
        tags: list[Any] = [page.tags[code].value if code in page.tags else () for code in codes]
        scale, tie, matrix, keys = tags
        if matrix:
            a, b, c, d, e, f = (float(matrix[index]) for index in (0, 1, 3, 4, 5, 7))
        else:
            a, b, d, e = float(scale[0]), 0.0, 0.0, -float(scale[1])
            c, f = float(tie[3]) - a * tie[0], float(tie[4]) - e * tie[1]
        values = dict(zip(keys[4::4], keys[7::4]))
        if values.get(1025) == 2:  # coordinates are those of the pixels' centres
            c, f = c - (a + b) / 2, f - (d + e) / 2
        sound = math.isfinite(c + f) and a * e - b * d != 0
        return Place(values.get(3072, values.get(2048)), (a, b, c, d, e, f)) if sound else None
    except (IndexError, TypeError, ValueError):  # tags that are absent or make no sense name no place
        return None


def apart(one: Place, other: Place, shape: tuple[int, ...]) -> bool:
    """Return whether two rasters of a size (H, W) lie at different places."""
    difference = np.subtract(one.affine, other.affine).reshape(2, 3)  # (x, y) of (column, row, 1)
    corners = np.array([[0, shape[1], 0, shape[1]], [0, 0, shape[0], shape[0]], [1, 1, 1, 1]])
    pixel = max(abs(step) for step in (*one.affine[:2], *one.affine[3:5]))
    far = bool(np.abs(difference @ corners).max() > PLACE_TOLERANCE * pixel)
    return far or len({one.epsg, other.epsg} - {None}) > 1


class Turn(NamedTuple):
    """What brings a raster's north above: rows and columns swapped, then mirrored."""

    transpose: bool = False
    up_down: bool = False
    left_right: bool = False

    def upright(self, image: np.ndarray) -> np.ndarray:
        """Return a view of an image (H, W, ...) with north above."""
        image = image.swapaxes(0, 1) if self.transpose else image
        return image[:: -1 if self.up_down else 1, :: -1 if self.left_right else 1]

    def back(self, mask: np.ndarray) -> np.ndarray:
        """Return an upright mask as the raster lies in its file."""
        mask = mask[:: -1 if self.up_down else 1, :: -1 if self.left_right else 1]
        return np.ascontiguousarray(mask.T if self.transpose else mask)


def turn_of(place: Optional[Place], source: str) -> Turn:
    """Return how a raster is turned upright. Raises TileError where no quarter turns and mirrors do that."""
    if place is None or place.epsg is None:
        return Turn()
    a, b, _, d, e, _ = place.affine
    transpose = abs(b) > abs(a)
    if transpose:
        a, b, d, e = b, a, e, d
    if max(abs(b), abs(d)) > 0.01 * min(abs(a), abs(e)):
        raise TileError(
            f"{source}: is rotated, expected north above; export it on a north-up grid (gdalwarp)"
        )
    return Turn(transpose, e > 0, a < 0)


def read_band(path: PathLike) -> tuple[np.ndarray, Optional[Place]]:
    """Return what `read_raster` does, and where the raster lies."""
    path = Path(path)
    pixels, declared, masks, place = decode_tiff(path)
    if pixels.ndim == 3 and 1 in (pixels.shape[0], pixels.shape[2]):
        pixels = pixels[0] if pixels.shape[0] == 1 else pixels[..., 0]
    if pixels.ndim != 2 or pixels.size == 0 or pixels.dtype.kind not in "uif":
        raise TileError(
            f"{path}: found an array of shape {pixels.shape} and type {pixels.dtype}, expected one band "
            "(H, W) of integers or floats; split the bands into their own files"
        )
    wrapped = pixels.dtype.kind == "i" and pixels.dtype.itemsize == 2
    nodata = (pixels == 0) | ~np.isfinite(pixels)
    nodata |= np.isin(pixels, SIGNED_FILL_VALUES) if wrapped else pixels < 0
    if pixels.dtype.itemsize >= 4:
        nodata |= pixels > LARGEST_VALUE
    if declared is not None:
        nodata |= pixels == declared
    for mask in masks:
        nodata |= mask.reshape(nodata.shape) == 0
    values = (pixels.astype(np.int16).view(np.uint16) if wrapped else pixels).astype(np.float32)
    values[nodata] = np.nan
    return values, place


def read_raster(path: PathLike) -> np.ndarray:
    """Return one band as stored, (H, W) float32, NaN where nodata: 0, below 0, the declared nodata value, what
    GDAL's masks leave out, NaN, infinities and other numbers too large for a measurement.

    Landsat values are unsigned: negative int16 values are those above 32767 of a file that was cast to int16.

    Raises:
        TileError: no readable TIFF, not one band, or not a number type.
    """
    return read_band(path)[0]


# --- Units ----------------------------------------------------------------------------------------


class Scaling(NamedTuple):
    """What stored values from `least` to `most` may be, if no Level-2 numbers; times `scale` they are
    reflectance or kelvin, None where that cannot be told."""

    name: str
    least: float
    most: float
    scale: Optional[float]


LEVEL_2_DARK = 5000  # the darkest band's median: Level-2 numbers are above 7273 where reflectance is above 0
LEVEL_2_KELVIN = (210.0, 345.0)  # medians of a land surface; Level-1 numbers of 253 K read as 191 K
REFLECTIVE = (  # by the value below which 98 % of the brightest of bands 1 to 4 are
    Scaling("reflectance", 0, 2.5, 1.0),
    Scaling("8-bit numbers", 2.5, 255, None),
    Scaling("reflectance x 10000", 255, 20_000, 1e-4),
    Scaling("no numbers of Landsat", 20_000, math.inf, None),
)
THERMAL = (  # by the median
    Scaling("degrees Celsius", 0, 60, None),
    Scaling("kelvin", 180, 345, 1.0),
    Scaling("Level-1 numbers", 5000, 17_900, None),
    Scaling("no temperature", 0, math.inf, None),
)
FORCED = {"reflectance": REFLECTIVE[0], "x10000": REFLECTIVE[2]}
Judged = tuple[Optional[Scaling], Optional[Scaling]]


def judge_units(stored: np.ndarray) -> Judged:
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
        thermal = next((one for one in THERMAL if one.least <= np.median(heat) <= one.most), THERMAL[-1])
        if (
            reflective is REFLECTIVE[1] and heat.max() <= 255
        ):  # an export of all bands, some of it like kelvin
            thermal = reflective
    return reflective, thermal


def in_words(judged: Judged) -> str:
    """Return which bands look like what, without those that are Level-2 numbers."""
    pairs = zip(("Band1 to Band4 look like", "the thermal band looks like"), judged)
    return ", ".join(f"{bands} {one.name}" for bands, one in pairs if one)


def implausible_units(image: np.ndarray) -> Optional[str]:
    """Return a warning where bands (H, W, 5) in physical units can hardly have been Level-2 numbers."""
    step = max(1, max(image.shape[:2]) // 512)
    scale, offset = (np.array([getattr(band, part) for band in BANDS]) for part in ("scale", "offset"))
    judged = judge_units((image[::step, ::step] - offset) / scale)
    wrong = (
        f"{in_words(judged)}, and are read as Level-2 numbers (about 7000 to 65535): the mask will be poor"
    )
    return f"{wrong}; export the tile as Level-2 data, or as reflectance and kelvin" if any(judged) else None


def convert_units(stored: np.ndarray, units: str, source: str) -> None:
    """Turn bands (H, W, 5) as stored into physical units, in place; say which are no Level-2 numbers."""
    reflective, thermal = judge_units(stored) if units != "dn" else (None, None)
    certain = [one if one and one.scale else None for one in (FORCED.get(units, reflective), thermal)]
    for index, band in enumerate(BANDS):
        one = certain[band is BANDS[-1]]
        stored[..., index] = to_physical(
            stored[..., index], band._replace(scale=one.scale or 1.0, offset=0.0) if one else band
        )
    if any(certain):
        warn(
            f"{source}: {in_words((certain[0], certain[1]))} and are read so; --units dn reads Level-2 numbers"
        )


# --- Reading tiles --------------------------------------------------------------------------------


def read_placed(files: TileFiles, units: str = "auto") -> tuple[np.ndarray, Turn]:
    """Return what `read_tile` does, and how the tile is turned upright."""
    source = f"tile {files.tile_id} ({files.name})"
    missing = [band.folder for band, path in zip(BANDS, files.paths) if path is None]
    if missing:
        usgs = f"; these are names of USGS, whose {RENAMING}" if USGS_NAME.search(files.name) else ""
        raise TileError(
            f"tile {files.tile_id}: no file in {', '.join(missing)} (it has {files.name}), expected one in "
            f"each of the five bands; add the missing file or remove the tile{usgs}"
        )
    paths = [path for path in files.paths if path is not None]
    first, place = read_band(paths[0])
    image = np.empty((*first.shape, len(BANDS)), np.float32)  # band by band: a scene is never held twice
    for index, path in enumerate(paths):
        values, here = (first, place) if index == 0 else read_band(path)
        if values.shape != first.shape:
            raise TileError(
                f"{path}: {values.shape[1]} x {values.shape[0]} px, expected {first.shape[1]} x "
                f"{first.shape[0]} px as in {paths[0].name}; resample the bands to one grid"
            )
        place = place or here
        if place and here and apart(place, here, first.shape):
            raise TileError(
                f"{path}: lies at {here.affine[2::3]} of EPSG:{here.epsg}, expected {place.affine[2::3]} of "
                f"EPSG:{place.epsg} as the bands before it; resample the bands to one grid"
            )
        image[..., index] = values
    turn = turn_of(place, source)
    convert_units(image, units, source)
    return image, turn


def read_tile(files: TileFiles, units: str = "auto") -> np.ndarray:
    """Return a tile in physical units, (H, W, 5) float32: reflectance in bands 1-4, kelvin in band 5, NaN
    where nodata.

    Args:
        files: its files.
        units: of bands 1-4: "dn" for Level-2 numbers, "reflectance", "x10000"; "auto" for what they surely are.

    Raises:
        TileError: a band is missing or unreadable, or the bands differ in size or place.
    """
    return read_placed(files, units)[0]


def readable_shape(files: TileFiles) -> tuple[int, ...]:
    """Return a broken tile's size (H, W) from its first readable band, else DEFAULT_SHAPE."""
    for path in filter(None, files.paths):
        try:
            return read_raster(path).shape
        except (TileError, MemoryError):
            continue
    return DEFAULT_SHAPE


# --- The weights file -----------------------------------------------------------------------------

MODEL_FILE = "model.pth"
MODEL_FORMAT = "glacier-kit/3"


def find_weights(given: Optional[PathLike] = None) -> Path:
    """Return the weights file: `given`, else model.pth beside this file, in its `weights/`, or in the working
    folder. Raises InputError, which lists where it was looked for, where there is none."""
    here, work = Path(__file__).resolve().parent, Path.cwd()
    places = [folder / MODEL_FILE for folder in (here, here / "weights", work, work / "weights")]
    if given is not None:
        places = [Path(given)]
    for place in places:
        if os.path.isfile(place):
            return place
    if given is not None:
        raise InputError(f"{given}: no such weights file; train one with `make train-all` or leave it out")
    looked = ", ".join(str(place) for place in places)
    raise InputError(
        f"no weights: looked for {looked}; put {MODEL_FILE} beside solution.py or name it with --weights"
    )


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
        raise InputError(
            f"{path}: damaged or no weights file ({size} bytes; {first_line(error)}); copy it again"
        ) from error
    found = content.get("format", "none") if isinstance(content, dict) else type(content).__name__
    if found != MODEL_FORMAT:
        raise InputError(
            f"{path}: format {found!r}, expected {MODEL_FORMAT!r}; pack it with `python -m train pack`"
        )
    absent = [key for key in ("members", "passes", "postprocess") if not content.get(key)]
    if absent:
        raise InputError(f"{path}: no {', '.join(absent)} in it; pack it again with `python -m train pack`")
    return content


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load float16 or float32 weights strictly. Raises InputError, which names all that do not fit at once."""
    expected = network.state_dict()
    common = [name for name in expected if name in state]
    faults = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "misshapen": [
            f"{name} {tuple(state[name].shape)} for {tuple(expected[name].shape)}"
            for name in common
            if state[name].shape != expected[name].shape
        ],
        "not finite": [name for name in common if not torch.isfinite(state[name]).all()],
    }
    listed = [f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in faults.items() if names]
    if listed:
        raise InputError(f"{source}: weights do not fit the network they name: {'; '.join(listed)}")
    network.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in state.items()})


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
    """Return one network of a model file, ready for inference on `device`.

    Raises:
        InputError: its weights do not fit, or its statistics are not those of five bands.
    """
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
    """Return the model that `path` holds, on the GPU where there is one that works.

    Raises:
        InputError: the file is damaged, incomplete, or its weights do not fit. Random weights are never used.
    """
    content, device = read_model_file(path), usable_device()
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
        known = {Pass(member, view) for member in range(len(members)) for view in range(len(VIEWS))}
        if not set(passes) <= known or len(set(passes)) < len(passes) or not time_budget > 0:
            raise ValueError(
                f"passes {[tuple(one) for one in passes]} in {time_budget} s, expected different pairs of one of "
                f"{len(members)} members and one of {len(VIEWS)} views, both from 0, in seconds > 0"
            )
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


def usable_device() -> torch.device:
    """Return the GPU where there is one that works: torch also reports GPUs that it has no code for."""
    if torch.cuda.is_available():
        try:
            nn.Conv2d(1, 1, 3, device="cuda")(torch.ones(1, 1, 8, 8, device="cuda")).sum().item()
            return torch.device("cuda")
        except Exception as error:
            warn(f"the GPU cannot be used ({first_line(error)}); this run is on the CPU")
    return torch.device("cpu")


def cpu_quota() -> int:
    """Return the cores that the cgroup (version 2 or 1) grants, sys.maxsize where it sets no limit."""
    cgroup = Path("/sys/fs/cgroup")
    files = (cgroup / "cpu.max",), [cgroup / f"cpu/cpu.cfs_{part}_us" for part in ("quota", "period")]
    try:
        found = files[0] if files[0][0].is_file() else files[1]
        quota, period = (int(word) for path in found for word in path.read_text().split())
        return quota // period if quota > 0 else sys.maxsize
    except (OSError, ValueError):  # no such files, or "max"
        return sys.maxsize


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
    """Return the threads of a pass where so many are made side by side.

    One in a process forked after the import: it would wait for the threads of torch, which it does not have.
    """
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
    """Seconds that a run may take. A binding budget is kept even where tiles are left without any pass; one that
    nobody asked for may be exceeded by first passes, so that thousands of tiles still get their masks."""

    seconds: float
    binding: bool

    def deadline(self, started: float) -> float:
        """Return the time of `time.perf_counter` at which a run that began at `started` plans to end."""
        return started + self.seconds - max(SPARE_SECONDS, SPARE_PART * self.seconds)


def choose_budget(given: Optional[str], stored: float) -> TimeBudget:
    """Return the time budget: `given`, else the environment's, else the one stored with the weights."""
    asked = os.environ.get(TIME_BUDGET_VARIABLE) if given is None else given
    try:
        budget = TimeBudget(float(asked), True) if asked else TimeBudget(stored, False)
    except ValueError:
        budget = TimeBudget(math.nan, True)
    if not budget.seconds > 0:
        raise InputError(f"time budget {asked!r}: expected seconds above 0, or inf for no limit")
    return budget


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
    """Return `folder`, made where it is absent, without what killed runs left unfinished in it.

    Raises:
        InputError: it cannot be made or written to, or is one of the input folders.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for path in folder.glob(f"{PARTIAL_PREFIX}*.part"):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
            except FileNotFoundError:  # another run, which is writing now, has renamed it
                continue
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
    """The mask of one tile, uint8 (H, W), how many passes it rests on, and what went wrong, if anything."""

    tile: TileFiles
    mask: np.ndarray
    passes: int
    fault: Optional[str]


class Summary(NamedTuple):
    """What a run did, by tile id: the masks, how many passes each rests on, and what went wrong."""

    masks: dict[str, np.ndarray]
    passes: dict[str, int]
    faults: dict[str, str]


Reading = tuple[TileFiles, "Future[tuple[np.ndarray, Turn]]"]


def read_ahead(tiles: Sequence[TileFiles], units: str) -> Iterator[Reading]:
    """Yield each tile and its image, which is read while those before it are segmented."""
    with ThreadPoolExecutor(1) as pool:
        readings: "deque[Reading]" = deque()
        for tile in tiles:
            readings.append((tile, pool.submit(read_placed, tile, units)))
            if len(readings) > 1:
                yield readings.popleft()
        yield from readings


def segment_tile(model: Model, reading: Reading, until: float = math.inf) -> TileResult:
    """Return a tile's mask; a tile that cannot be segmented gets a background mask and the reason."""
    tile, read = reading
    name = f"tile {tile.tile_id} ({tile.name})"
    try:
        image, turn = read.result()
        empty = [band.folder for index, band in enumerate(BANDS) if np.isnan(image[..., index]).all()]
        doubt, fault = implausible_units(image), None
        if doubt:
            warn(f"{name}: {doubt}")
        classes, passes = predict_classes(model, turn.upright(image), until)
        if passes == 0:
            fault = f"{name}: the time budget was used up; the rest is background; allow more seconds"
        elif 0 < len(empty) < len(BANDS):
            fault = (
                f"{name}: no value above 0 in {', '.join(empty)}, so that its mask is poor; export it again"
            )
        return TileResult(tile, turn.back(to_mask(classes)), passes, fault)
    except Exception as error:  # one tile must not cost the others their masks
        said = str(error) if isinstance(error, KitError) else f"{name}: {type(error).__name__}: {error}"
        mask = np.zeros(readable_shape(tile), np.uint8)
        return TileResult(tile, mask, 0, f"{said}; this tile gets a background mask")


def is_scene(tile: TileFiles) -> bool:
    """Return whether a tile needs windows, and much memory, as its first band's header says."""
    try:
        with tifffile.TiffFile(next(filter(None, tile.paths))) as tiff:
            return max(tiff.pages[0].shape[:2]) > LARGEST_TILE
    except Exception:  # damaged bytes may raise almost anything; reading the tile will say what is wrong
        return False


def with_workers(model: Model, tiles: Sequence[TileFiles]) -> Model:
    """Return the model with its threads shared between tiles; those of a scene go to its windows."""
    workers = min(most_workers(model), len(tiles))
    if workers > 1 and any(map(is_scene, tiles)):
        workers = 1
    prepare_torch(threads_of_each(workers))
    return model._replace(workers=workers)


def segment_all(
    model: Model, tiles: Sequence[TileFiles], deadline: float, binding: bool, units: str = "auto"
) -> Iterator[TileResult]:
    """Yield the result of every tile, each with as many passes as fit into its share of the time left.

    Args:
        model: with all its passes.
        tiles: what to segment.
        deadline: time of `time.perf_counter` at which all has to be done; infinite for all passes.
        binding: whether what is not begun by then, a tile or a window of a scene, is left as background.
        units: see `read_tile`.
    """

    def segment(numbered: tuple[int, Reading]) -> TileResult:
        number, reading = numbered
        tile = reading[0]
        if binding and time.perf_counter() > deadline:
            fault = f"tile {tile.tile_id} ({tile.name}): the time budget was used up; allow more seconds"
            return TileResult(tile, np.zeros(readable_shape(tile), np.uint8), 0, fault)
        if not binding and is_scene(tile):
            return segment_tile(model, reading)  # all of its windows, however long they take
        share = min(1.0, model.workers / (len(tiles) - number))
        return segment_tile(model, reading, share_of_time(deadline, share))

    return side_by_side(segment, enumerate(read_ahead(tiles, units)), model.workers)


def save_mask(write: Writer, result: TileResult) -> Optional[str]:
    """Write a mask; return why that failed, else None: one tile must not cost the others their masks."""
    try:
        write(result.tile, result.mask)
    except (OSError, ValueError, cv2.error) as error:
        fault = f"the mask of {result.tile.name} cannot be written ({error}); make room or free the name"
        say(f"error: {fault}")
        return fault
    return None


def segment_folder(
    data: DataSource,
    weights: Optional[PathLike],
    write: Optional[Writer],
    time_budget: Optional[str] = None,
    started: Optional[float] = None,
    keep_masks: bool = True,
    units: str = "auto",
) -> Summary:
    """Segment all tiles of `data`, hand each mask to `write` while the next is segmented, and return them all.

    Args:
        data: the tiles.
        weights: the model file, None to look for it.
        write: writes a mask, None to write none.
        time_budget: see `choose_budget`.
        started: time of `time.perf_counter` from which the budget counts, None for now.
        keep_masks: whether they are in the summary; those of thousands of tiles need gigabytes.
        units: see `read_tile`.

    Raises:
        InputError: no tiles, no weights, or a time budget that is none; nothing is written then.
    """
    started = time.perf_counter() if started is None else started
    tiles = find_tiles(data)
    model = with_workers(load_model(find_weights(weights)), tiles)
    budget = choose_budget(time_budget, model.time_budget)
    summary = Summary({}, {}, {})
    saving: dict[str, "Future[Optional[str]]"] = {}
    with ThreadPoolExecutor(1) as pool:
        for result in segment_all(model, tiles, budget.deadline(started), budget.binding, units):
            tile, mask, passes, fault = result
            summary.passes[tile.tile_id] = passes
            left = (time.perf_counter() - started) * (len(tiles) / len(summary.passes) - 1)
            done = f"mask, passes: {passes}" if passes else "background (failed)"
            say(f"[{len(summary.passes)}/{len(tiles)}] {tile.name}: {done}, {left:.0f} s left")
            if keep_masks:
                summary.masks[tile.tile_id] = mask
            if fault:
                say(f"error: {fault}")
                summary.faults[tile.tile_id] = fault
            if write:
                saving[tile.tile_id] = pool.submit(save_mask, write, result)
    for identifier, saved in saving.items():
        fault = saved.result()
        if fault:
            summary.faults.setdefault(identifier, fault)
    fewest, most = min(summary.passes.values()), max(summary.passes.values())
    hint = "" if fewest == len(model.passes) else " (--time-budget inf makes them all)"
    pace = (time.perf_counter() - started) / len(tiles)
    say(
        f"{len(tiles)} tiles, {len(summary.faults)} failed, {pace:.2f} s a tile, "
        f"{fewest} to {most} of {len(model.passes)} passes{hint}"
    )
    return summary


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


def parse_arguments(arguments: Optional[list[str]]) -> argparse.Namespace:
    """Return `data`, `output`, `named_as_band1` and the options from any of the three command lines."""
    parser = argparse.ArgumentParser(
        description="Segment Landsat-8 tiles into glacier masks.", epilog=EXPECTED_LAYOUT, allow_abbrev=False
    )
    add = parser.add_argument
    add("in_dir", nargs="?", help="data folder; writes one PNG a tile")
    add("out_dir", nargs="?", help="folder for the PNGs")
    add("--data", "--imagepath", dest="data", help="data folder; writes TIFFs named as in Band1")
    add("--out", "--output", dest="output", help="folder for the TIFFs")
    add("--masks", help="accepted for the organisers' template, not used")
    add("--weights", help="model.pth; default: beside this file, in weights/, or in the working folder")
    budget = (
        f"end within so many seconds, inf for no limit; default: {TIME_BUDGET_VARIABLE}, else the weights'"
    )
    add("--time-budget", metavar="SECONDS", help=budget)
    units = "of Band1 to Band4; dn: Level-2 numbers; auto: these, or what they and Band5 surely are"
    add("--units", choices=("auto", "dn", *FORCED), default="auto", help=units)
    parsed = parser.parse_args(arguments)
    positional, named = (parsed.in_dir, parsed.out_dir), (parsed.data, parsed.output)
    parsed.named_as_band1 = all(named)
    if not any(all(one) and not any(other) for one, other in ((positional, named), (named, positional))):
        parser.error("give IN_DIR OUT_DIR, or --data D --masks M --out O, or --imagepath D --output O")
    parsed.data, parsed.output = named if parsed.named_as_band1 else positional
    return parsed


def main(arguments: Optional[list[str]] = None) -> int:
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
