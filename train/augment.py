"""Random crops of a tile: cut, rotated and scaled, flipped, brightened, and mixed with those of other tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from prep.labels import IGNORE
from solution import BANDS
from train.config import AugmentConfig

BRIGHTEST = 1.6  # reflectance of the largest stored number, which fresh snow reaches: no band saturates above it


class Tile(NamedTuple):
    """One tile in memory.

    `values`: (H, W, C) float32, the normalised bands first, 0 where nodata. `weights`: (H, W, C) float32, 1 where
    has a value, else 0. `codes`: (H, W) uint8 label codes of `prep.labels`, IGNORE where no band has one.
    """

    tile_id: str
    values: np.ndarray
    weights: np.ndarray
    codes: np.ndarray


class Draw(NamedTuple):
    """A pixel that a crop is made around: index of the tile, row, column, and the class it was drawn for."""

    tile: int
    row: int
    col: int
    of_class: int


class Crop(NamedTuple):
    """`values` (S, S, C) float32, the bands first, NaN where nodata; `codes` (S, S) uint8, IGNORE where nodata."""

    values: np.ndarray
    codes: np.ndarray


def cut(tile: Tile, draw: Draw, size: int, rng: np.random.Generator) -> Crop:
    """Return the pixels of a crop of `size` that holds the drawn pixel at a random place, as they are.

    The crop is shifted to lie inside the tile; where the tile is smaller, the rest is nodata.
    """
    height, width = tile.codes.shape
    top = _shift_inside(draw.row - int(rng.integers(size)), size, height)
    left = _shift_inside(draw.col - int(rng.integers(size)), size, width)
    values = np.full((size, size, tile.values.shape[-1]), np.nan, np.float32)
    codes = np.full((size, size), IGNORE, np.uint8)
    source = np.s_[max(top, 0) : top + size, max(left, 0) : left + size]
    rows, cols = tile.codes[source].shape
    target = np.s_[max(-top, 0) : max(-top, 0) + rows, max(-left, 0) : max(-left, 0) + cols]
    values[target] = np.where(tile.weights[source] > 0, tile.values[source], np.nan)
    codes[target] = tile.codes[source]
    return Crop(values, codes)


def _shift_inside(start: int, size: int, length: int) -> int:
    """Return the start of a span of `size` moved inside `length`, or centred on it where it is larger."""
    return -((size - length) // 2) if size >= length else min(max(start, 0), length - size)


def cut_affine(tile: Tile, draw: Draw, size: int, config: AugmentConfig, rng: np.random.Generator) -> Crop:
    """Return a crop like `cut`, rotated and scaled at random: bands bilinear, label codes nearest.

    A band's value is the mean of the neighbours that have one, by their bilinear weights, so that nodata does
    not bleed into valid pixels. What lies outside the tile is nodata.
    """
    matrix = _affine(tile.codes.shape, draw, size, config, rng)
    # one bit a band, so that one nearest warp does for all; weights are 0 and 1, and float32 products fast
    channels = tile.weights.shape[-1]
    bits = tile.weights @ (2.0 ** np.arange(channels)).astype(np.float32)  # (H, W)
    bits = _warp(bits, matrix, size, cv2.INTER_NEAREST, 0).astype(np.uint8)
    codes = _warp(tile.codes, matrix, size, cv2.INTER_NEAREST, IGNORE)
    sums = _warp(tile.values, matrix, size, cv2.INTER_LINEAR, 0)
    weights = _warp(tile.weights, matrix, size, cv2.INTER_LINEAR, 0)
    has_value = np.unpackbits(bits[..., None], axis=-1, count=channels, bitorder="little").view(bool)
    has_value &= weights > 1e-3  # (S, S, C)
    values = np.divide(sums, weights, out=np.full_like(sums, np.nan), where=has_value)
    codes[~has_value.any(axis=-1)] = IGNORE
    return Crop(values, codes)


def _affine(
    shape: tuple[int, int], draw: Draw, size: int, config: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """Return the (2, 3) matrix from crop to tile coordinates (x, y), the drawn pixel at a random place."""
    angle = math.radians(rng.uniform(-config.rotate, config.rotate))
    zoom = math.exp(rng.uniform(math.log(config.scale[0]), math.log(config.scale[1])))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / zoom
    middle = np.full(2, (size - 1) / 2)
    place = rng.integers(size, size=2)  # of the drawn pixel inside the crop
    centre = np.array([draw.col, draw.row]) + turn @ (middle - place)
    half = middle / zoom
    limits = np.array([shape[1] - 1, shape[0] - 1], np.float64)
    inside = np.clip(centre, np.minimum(half, limits / 2), np.maximum(limits - half, limits / 2))
    return np.hstack([turn, (inside - turn @ middle)[:, None]])


def _warp(array: np.ndarray, matrix: np.ndarray, size: int, interpolation: int, outside: int) -> np.ndarray:
    flags = interpolation | cv2.WARP_INVERSE_MAP
    border = cv2.BORDER_CONSTANT
    return cv2.warpAffine(array, matrix, (size, size), flags=flags, borderMode=border, borderValue=outside)


def flip_and_turn(crop: Crop, config: AugmentConfig, rng: np.random.Generator) -> Crop:
    """Return the crop flipped and rotated by a multiple of 90 degrees, as the config allows: exact."""
    values, codes = crop
    if config.flip:
        for axis in (0, 1):
            if rng.random() < 0.5:
                values, codes = np.flip(values, axis), np.flip(codes, axis)
    if config.rot90:
        turns = int(rng.integers(4))
        values, codes = np.rot90(values, turns), np.rot90(codes, turns)
    return Crop(values, codes)


def jitter(values: np.ndarray, normalization: dict, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Return (..., C) values, bands first, with gain, offset and illumination changed, then saturated; NaN stays.

    Channels after the bands are left alone.

    Gains act on reflectance itself, as light does: a reflectance of 0 stays 0. Temperatures have no such
    zero; their gain acts on the deviation from the training mean, and illumination leaves them alone. Of what
    comes out, reflective bands are cut off at one value drawn from [saturate, BRIGHTEST].
    """
    reflective = np.array([band.unit == "reflectance" for band in BANDS])
    mean, std = np.asarray(normalization["mean"]), np.asarray(normalization["std"])
    gain = rng.uniform(1 - config.gain, 1 + config.gain, len(BANDS))
    gain[reflective] *= rng.uniform(1 - config.illumination, 1 + config.illumination)
    offset = rng.uniform(-config.offset, config.offset, len(BANDS))
    # ((x * std + mean) * gain - mean) / std for reflectance, x normalised
    offset += np.where(reflective, (gain - 1) * mean / std, 0.0)
    bands, others = np.split(values, [len(BANDS)], axis=-1)
    changed = bands * gain.astype(np.float32) + offset.astype(np.float32)
    if config.saturate > 0:
        largest = rng.uniform(config.saturate, BRIGHTEST)
        limits = np.where(reflective, (largest - mean) / std, np.inf)
        changed = np.minimum(changed, limits.astype(np.float32))
    return np.concatenate([changed, others], axis=-1) if others.size else changed


def paste_rectangle(crop: Crop, other: Crop, rng: np.random.Generator) -> Crop:
    """Return `crop` with a rectangle of `other`, of the same size, in its place: values and codes alike.

    As in CutMix (Yun et al. 2019, arXiv 1905.04899): the share of the area is uniform in 0 to 1, the
    rectangle has the crop's shape, its centre is uniform in the crop, and what sticks out is lost.
    """
    size = len(crop.codes)
    half = size * math.sqrt(rng.random()) / 2
    row, col = rng.integers(size, size=2)
    rows, cols = (slice(max(0, round(centre - half)), round(centre + half)) for centre in (row, col))
    values, codes = crop.values.copy(), crop.codes.copy()
    values[rows, cols], codes[rows, cols] = other.values[rows, cols], other.codes[rows, cols]
    return Crop(values, codes)
