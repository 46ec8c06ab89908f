"""Training crops drawn around class-balanced pixels and augmented; whole tiles for validation."""

import math
from typing import Iterator, NamedTuple, Sequence

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from prep.labels import CODE_CLASSES, GLACIER_OR_DEBRIS, IGNORE
from prep.stats import compute
from prep.store import TileStore
from solution import BANDS, CLASS_NAMES, normalize, valid_mask
from train.config import AugmentConfig, Config, DataConfig


class DataError(Exception):
    """The tiles of a store cannot serve this training; the message says why and what to do."""


class Tile(NamedTuple):
    """One tile in memory.

    `values`: (H, W, 5) float32, normalised, 0 where nodata. `weights`: (H, W, 5) float32, 1 where the band
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
    """`values` (S, S, 5) float32, normalised, NaN where nodata; `codes` (S, S) uint8, IGNORE where nodata."""

    values: np.ndarray
    codes: np.ndarray


def split_tiles(store: TileStore, scheme: str, fold: int) -> tuple[list[str], list[str]]:
    """Return the ids of the tiles to train on and of those to validate on, in the order of the store.

    Raises DataError where the scheme has no such fold, or a side of the split has no tile.
    """
    fold_of = store.fold_of(scheme)
    train = [tile_id for tile_id in store.tile_ids if fold_of[tile_id] != fold]
    val = [tile_id for tile_id in store.tile_ids if fold_of[tile_id] == fold]
    if not val:
        known = ", ".join(str(number) for number in sorted(set(fold_of.values())))
        raise DataError(f"{store.folder}: scheme '{scheme}' has no fold {fold}; it has folds {known}")
    if not train:
        raise DataError(f"{store.folder}: fold {fold} of scheme '{scheme}' holds every tile, none is left")
    return train, val


def load_tiles(store: TileStore, tile_ids: Sequence[str], normalization: dict) -> list[Tile]:
    """Read tiles into memory (about 11 MB for one of 512 x 512) and normalise them.

    Args:
        store: the tile store.
        tile_ids: which tiles.
        normalization: {"mean": 5 numbers, "std": 5 numbers} of the training tiles, physical units.
    """
    return [_load_tile(store, tile_id, normalization) for tile_id in tile_ids]


def _load_tile(store: TileStore, tile_id: str, normalization: dict) -> Tile:
    image = store.image(tile_id)
    values = np.ascontiguousarray(normalize(image, normalization).transpose(1, 2, 0))
    weights = (~np.isnan(image)).astype(np.float32)
    codes = np.where(valid_mask(image), store.mask(tile_id), IGNORE).astype(np.uint8)
    return Tile(tile_id, values, weights, codes)


def count_unsplit_as_clean(tile: Tile) -> Tile:
    """Return a tile whose glacier of unknown kind counts as clean ice."""
    clean = np.uint8(CLASS_NAMES.index("glacier"))
    return tile._replace(codes=np.where(tile.codes == GLACIER_OR_DEBRIS, clean, tile.codes))


class PixelSampler:
    """Draws pixels so that the four classes come in given shares, however rare they are.

    A class is drawn by its share among the classes that occur, then a tile uniformly among those that hold
    pixels which may be of this class, then a pixel of it: of the certain ones where the tile has any, else of
    those whose label is a set that holds the class.
    """

    def __init__(self, masks: Sequence[np.ndarray], class_shares: Sequence[float]) -> None:
        """Index the pixels of `masks`, each (H, W) uint8 label codes.

        Raises DataError where no pixel is of a class whose share is above 0.
        """
        self._widths = [mask.shape[1] for mask in masks]
        # class -> [(tile index, flat pixel indices)], only tiles with candidates
        self._pixels = [_index_class(masks, of_class) for of_class in range(len(CLASS_NAMES))]
        occurs = np.array([len(tiles) > 0 for tiles in self._pixels])
        shares = np.where(occurs, np.asarray(class_shares, np.float64), 0.0)
        if shares.sum() == 0:
            wanted = ", ".join(f"{name} {share:g}" for name, share in zip(CLASS_NAMES, class_shares))
            raise DataError(f"no training pixel is of a class that data.class_shares asks for ({wanted})")
        self.shares = shares / shares.sum()  # (4,), the target after renormalisation

    def draw(self, rng: np.random.Generator) -> Draw:
        """Return one pixel."""
        of_class = int(rng.choice(len(self.shares), p=self.shares))
        tiles = self._pixels[of_class]
        tile, pixels = tiles[rng.integers(len(tiles))]
        row, col = divmod(int(pixels[rng.integers(len(pixels))]), self._widths[tile])
        return Draw(tile, row, col, of_class)


def _index_class(masks: Sequence[np.ndarray], of_class: int) -> list[tuple[int, np.ndarray]]:
    sets = [code for code, classes in CODE_CLASSES.items() if of_class in classes and len(classes) > 1]
    found = []
    for index, mask in enumerate(masks):
        pixels = np.flatnonzero(mask == of_class)  # certain labels: the code is the class
        if pixels.size == 0:
            pixels = np.flatnonzero(np.isin(mask, sets))
        if pixels.size:
            found.append((index, pixels.astype(np.int32)))
    return found


def cut(tile: Tile, draw: Draw, size: int, rng: np.random.Generator) -> Crop:
    """Return the pixels of a crop of `size` that holds the drawn pixel at a random place, as they are.

    The crop is shifted to lie inside the tile; where the tile is smaller, the rest is nodata.
    """
    height, width = tile.codes.shape
    top = _shift_inside(draw.row - int(rng.integers(size)), size, height)
    left = _shift_inside(draw.col - int(rng.integers(size)), size, width)
    values = np.full((size, size, len(BANDS)), np.nan, np.float32)
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
    bits = (tile.weights > 0) @ (
        1 << np.arange(len(BANDS))
    )  # (H, W), one bit a band: one nearest warp for all
    bits = _warp(bits.astype(np.uint8), matrix, size, cv2.INTER_NEAREST, 0)
    codes = _warp(tile.codes, matrix, size, cv2.INTER_NEAREST, IGNORE)
    sums = _warp(tile.values, matrix, size, cv2.INTER_LINEAR, 0)
    weights = _warp(tile.weights, matrix, size, cv2.INTER_LINEAR, 0)
    has_value = (bits[..., None] >> np.arange(len(BANDS))) & 1 > 0  # (S, S, 5)
    has_value &= weights > 1e-3
    values = np.where(has_value, sums / np.maximum(weights, 1e-3), np.nan).astype(np.float32)
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


def jitter(
    values: np.ndarray, normalization: dict, config: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """Return (..., 5) normalised values with gain, offset and illumination changed; NaN stays NaN.

    Gains act on reflectance itself, as light does: a reflectance of 0 stays 0. Temperatures have no such
    zero; their gain acts on the deviation from the training mean, and illumination leaves them alone.
    """
    reflective = np.array([band.unit == "reflectance" for band in BANDS])
    mean, std = np.asarray(normalization["mean"]), np.asarray(normalization["std"])
    gain = rng.uniform(1 - config.gain, 1 + config.gain, len(BANDS))
    gain[reflective] *= rng.uniform(1 - config.illumination, 1 + config.illumination)
    offset = rng.uniform(-config.offset, config.offset, len(BANDS))
    # ((x * std + mean) * gain - mean) / std for reflectance, x normalised
    offset += np.where(reflective, (gain - 1) * mean / std, 0.0)
    return values * gain.astype(np.float32) + offset.astype(np.float32)


class CropDataset(Dataset):
    """Training crops. Item `epoch * len + i` depends on seed, epoch and i only, so runs can be resumed."""

    def __init__(
        self, tiles: Sequence[Tile], normalization: dict, data: DataConfig, augment: AugmentConfig, seed: int
    ) -> None:
        """Prepare crops of `tiles`; `normalization` is what their values were normalised with."""
        self.tiles = tiles
        self.normalization = normalization
        self.size = data.crop
        self.augment = augment
        self.seed = seed
        self.length = data.steps_per_epoch * data.batch_size
        self.pixels = PixelSampler([tile.codes for tile in tiles], data.class_shares)
        cv2.setNumThreads(1)  # crops are small; the cores are busy with the network

    def __len__(self) -> int:
        """Return the number of crops in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return image (5, S, S) float32 with nodata 0, codes (S, S) uint8, and the class drawn for."""
        epoch, number = divmod(index, self.length)
        rng = np.random.default_rng([self.seed, epoch, number])
        crop, draw = self.crop(rng)
        image = np.nan_to_num(crop.values.transpose(2, 0, 1), nan=0.0)
        codes = np.ascontiguousarray(crop.codes)
        return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(codes), draw.of_class

    def crop(self, rng: np.random.Generator) -> tuple[Crop, Draw]:
        """Return one augmented crop and the pixel it was made around."""
        draw = self.pixels.draw(rng)
        tile = self.tiles[draw.tile]
        if rng.random() < self.augment.affine_share:
            crop = cut_affine(tile, draw, self.size, self.augment, rng)
        else:
            crop = cut(tile, draw, self.size, rng)
        crop = flip_and_turn(crop, self.augment, rng)
        return crop._replace(values=jitter(crop.values, self.normalization, self.augment, rng)), draw


class EpochSampler(Sampler):
    """Yields the indices `epoch * length + i`; Lightning calls `set_epoch` at the start of every epoch."""

    def __init__(self, length: int) -> None:
        """Start with epoch 0 of `length` samples."""
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield this epoch's indices."""
        first = self.epoch * self.length
        return iter(range(first, first + self.length))

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return self.length


class TileDataset(Dataset):
    """Whole tiles, not augmented: image (5, H, W) float32 with nodata 0, codes (H, W) uint8."""

    def __init__(self, tiles: Sequence[Tile]) -> None:
        """Serve `tiles` in their order."""
        self.tiles = tiles

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tiles)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one tile."""
        tile = self.tiles[index]
        image = np.ascontiguousarray(tile.values.transpose(2, 0, 1))
        return torch.from_numpy(image), torch.from_numpy(tile.codes)


class FoldData(NamedTuple):
    """What training one fold needs; `normalization` is {"mean", "std"} of its training tiles."""

    train_ids: list[str]
    val_ids: list[str]
    normalization: dict
    dataset: CropDataset
    train_loader: DataLoader
    val_loader: DataLoader


def open_fold(config: Config, fold: int) -> FoldData:
    """Read a fold's tiles, normalised by the statistics of its training tiles alone.

    Raises DataError or `prep.store.StoreError`.
    """
    store = TileStore(config.data.store)
    train_ids, val_ids = split_tiles(store, config.data.scheme, fold)
    statistics = compute(store, train_ids)
    normalization = {"mean": statistics["mean"], "std": statistics["std"]}
    tiles = load_tiles(store, train_ids, normalization)
    if config.data.unsplit_glacier == "clean":
        tiles = [count_unsplit_as_clean(tile) for tile in tiles]
    dataset = CropDataset(tiles, normalization, config.data, config.augment, config.train.seed)
    train_loader = DataLoader(
        dataset,
        batch_size=config.data.batch_size,
        sampler=EpochSampler(len(dataset)),
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
    )
    # tiles may differ in size, so one at a time
    val_loader = DataLoader(TileDataset(load_tiles(store, val_ids, normalization)), batch_size=1)
    return FoldData(train_ids, val_ids, normalization, dataset, train_loader, val_loader)
