"""Training crops drawn around class-balanced pixels and augmented; whole tiles for validation."""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import combinations
from typing import Iterator, NamedTuple, Optional, Protocol, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from prep.labels import CODE_CLASSES, GLACIER_OR_DEBRIS, IGNORE
from prep.stats import compute
from prep.store import SPLIT_SCHEME, TileStore
from solution import BANDS, CLASS_NAMES, normalize, valid_mask
from train.config import AugmentConfig, Config, DataConfig
from train.hardware import process_number

PERCENTILES = (2, 98)
MIX_TRIES = 8  # draws after which a crop is mixed with one of its own tile
ALL_TILES = -2  # the "fold" that holds out no tile
FIRST_PAIR = 100  # "folds" from here on hold out two; see `pair_of_folds`
UNCHANGED = {"mean": [0.0] * len(BANDS), "std": [1.0] * len(BANDS)}  # leaves physical units as they are
IN_MEMORY_TILES = 256  # 3 GB; tiles of a larger training set are read when a crop is cut from them


class DataError(Exception):
    """The tiles of a store cannot serve this training; the message says why and what to do."""


class Tile(NamedTuple):
    """One tile in memory.

    `values`: (H, W, 5) float32, normalised, 0 where nodata. `weights`: (H, W, 5) float32, 1 where the band
    has a value, else 0. `codes`: (H, W) uint8 label codes of `prep.labels`, IGNORE where no band has one.
    `normalization`: what `values` were normalised with, None for what all tiles of the fold were.
    """

    tile_id: str
    values: np.ndarray
    weights: np.ndarray
    codes: np.ndarray
    normalization: Optional[dict] = None


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

    ALL_TILES holds out none, a pair (`pair_of_folds`) the tiles of both its folds. Raises DataError where the
    scheme has no such fold, or a side of the split has no tile.
    """
    fold_of, held_out = store.fold_of(scheme), held_out_folds(fold)
    if fold == ALL_TILES:
        return list(store.tile_ids), []
    for number in held_out:
        if number not in fold_of.values():
            known = ", ".join(str(number) for number in sorted(set(fold_of.values())))
            raise DataError(f"{store.folder}: scheme '{scheme}' has no fold {number}; it has folds {known}")
    train = [tile_id for tile_id in store.tile_ids if fold_of[tile_id] not in held_out]
    val = [tile_id for tile_id in store.tile_ids if fold_of[tile_id] in held_out]
    if not train:
        which = " and ".join(map(str, held_out))
        raise DataError(f"{store.folder}: fold {which} of scheme '{scheme}' holds every tile, none is left")
    return train, val


def folds_of_scheme(store: TileStore, scheme: str) -> list[int]:
    """Return the numbers of all folds of a scheme that hold tiles out."""
    numbers = set(store.fold_of(scheme).values())
    return sorted(number for number in numbers if number >= 0)  # below: tiles that are never held out


def pair_of_folds(first: int, second: int) -> int:
    """Return the number of the "fold" that holds out the tiles of two folds, both below 10.

    A network of it teaches a student of either fold what it says of the other, which it never saw as well.
    """
    return FIRST_PAIR + 10 * first + second


def held_out_folds(fold: int) -> tuple[int, ...]:
    """Return the folds whose tiles a number holds out: itself, or both of a pair."""
    return divmod(fold - FIRST_PAIR, 10) if fold >= FIRST_PAIR else (fold,)


def name_of(fold: int) -> str:
    """Return what a fold is called in what is printed."""
    if fold == ALL_TILES:
        return "all tiles"
    held_out = held_out_folds(fold)
    return f"fold{'s' if len(held_out) > 1 else ''} {' and '.join(map(str, held_out))}"


def all_pairs(folds: Sequence[int]) -> list[int]:
    """Return the numbers of all pairs of these folds.

    Raises DataError where one of them is no single digit.
    """
    if max(folds, default=0) > 9:
        raise DataError(f"fold {max(folds)}: pairs are of folds 0 to 9; use a scheme of ten folds or fewer")
    return [pair_of_folds(first, second) for first, second in combinations(sorted(folds), 2)]


def tile_normalization(image: np.ndarray, scaling: str, normalization: dict) -> dict:
    """Return the {"mean", "std"} with which `solution.normalize` scales a tile as `data.scaling` says.

    Args:
        image: (H, W, 5) physical units, NaN where nodata.
        scaling: "statistics" returns `normalization`; "percentile" makes the 2nd percentile of each band of
            the tile 0 and its 98th 1, without clipping what lies outside.
        normalization: of the training tiles; taken for a band that has no range of values in the tile.
    """
    if scaling == "statistics":
        return normalization
    mean, std = list(normalization["mean"]), list(normalization["std"])
    for band in range(len(BANDS)):
        values = image[..., band][~np.isnan(image[..., band])]
        low, high = np.percentile(values, PERCENTILES) if values.size else (0.0, 0.0)
        if high > low:
            mean[band], std[band] = float(low), float(high - low)
    return {"mean": mean, "std": std}


def load_tiles(
    store: TileStore, tile_ids: Sequence[str], normalization: dict, scaling: str = "statistics"
) -> list[Tile]:
    """Read tiles into memory (about 11 MB for one of 512 x 512) and normalise them.

    Args:
        store: the tile store.
        tile_ids: which tiles.
        normalization: {"mean": 5 numbers, "std": 5 numbers} of the training tiles, physical units.
        scaling: see `tile_normalization`.
    """
    return [_load_tile(store, tile_id, normalization, scaling) for tile_id in tile_ids]


def _load_tile(store: TileStore, tile_id: str, normalization: dict, scaling: str) -> Tile:
    image = store.image(tile_id)
    normalization = tile_normalization(image, scaling, normalization)
    values = np.ascontiguousarray(normalize(image, normalization).transpose(1, 2, 0))
    weights = (~np.isnan(image)).astype(np.float32)
    codes = np.where(valid_mask(image), store.mask(tile_id), IGNORE).astype(np.uint8)
    return Tile(tile_id, values, weights, codes, normalization)


def count_unsplit_as_clean(tile: Tile) -> Tile:
    """Return a tile whose glacier of unknown kind counts as clean ice."""
    return tile._replace(codes=as_clean(tile.codes))


def as_clean(codes: np.ndarray) -> np.ndarray:
    """Return label codes, uint8, with clean ice for glacier of unknown kind."""
    return np.where(codes == GLACIER_OR_DEBRIS, np.uint8(CLASS_NAMES.index("glacier")), codes)


Item = TypeVar("Item", covariant=True)


class Indexed(Protocol[Item]):
    """Items by their number, as in a list; others than lists may read an item when it is asked for."""

    def __len__(self) -> int:
        """Return the number of items."""

    def __getitem__(self, index: int, /) -> Item:
        """Return one item; IndexError beyond the last one."""

    def __iter__(self) -> Iterator[Item]:
        """Go through all items."""
        return (self[index] for index in range(len(self)))


class StoredTiles(Indexed[Tile]):
    """Tiles that are read from the store when they are asked for; otherwise the same as `load_tiles`."""

    def __init__(
        self,
        store: TileStore,
        tile_ids: Sequence[str],
        normalization: dict,
        unsplit: str = "set",
        scaling: str = "statistics",
    ) -> None:
        """Serve these tiles in their order; `unsplit` and `scaling` are settings of `data`."""
        self.store = store
        self.tile_ids = list(tile_ids)
        self.unsplit = unsplit
        self._read = lru_cache(maxsize=4)(
            partial(_load_tile, store, normalization=normalization, scaling=scaling)
        )

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tile_ids)

    def __getitem__(self, index: int) -> Tile:
        """Read one tile."""
        tile = self._read(self.tile_ids[index])
        return tile._replace(codes=self._change(tile.codes))

    def codes(self, index: int) -> np.ndarray:
        """Read the label codes of a tile alone, (H, W) uint8."""
        return self._change(self.store.mask(self.tile_ids[index]))

    def _change(self, codes: np.ndarray) -> np.ndarray:
        return as_clean(codes) if self.unsplit == "clean" else codes


class StoredCodes(Indexed[np.ndarray]):
    """The label codes of StoredTiles, read one at a time."""

    def __init__(self, tiles: StoredTiles) -> None:
        """Serve the codes of `tiles`."""
        self.tiles = tiles

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tiles)

    def __getitem__(self, index: int) -> np.ndarray:
        """Read one tile's codes."""
        return self.tiles.codes(index)


class PixelSampler:
    """Draws pixels so that the four classes come in given shares, however rare they are.

    A class is drawn by its share among the classes that occur, then a tile uniformly among those that hold
    pixels which may be of this class, then a pixel of it: of the certain ones where the tile has any, else of
    those whose label is a set that holds the class.
    """

    def __init__(self, masks: Indexed[np.ndarray], class_shares: Sequence[float]) -> None:
        """Find out which of `masks`, each (H, W) uint8 label codes, hold which class.

        The pixels themselves are kept for masks in a list; StoredCodes are searched again at each draw.
        Raises DataError where no pixel is of a class whose share is above 0.
        """
        self._masks = masks
        self._index: dict[tuple[int, int], np.ndarray] = {}  # (tile, class): flat pixel indices
        self._holders: list[list[int]] = [[] for _ in CLASS_NAMES]  # class: tiles with candidates
        for number, mask in enumerate(masks):
            for of_class, holders in enumerate(self._holders):
                pixels = pixels_of(mask, of_class)
                if pixels.size:
                    holders.append(number)
                    if not isinstance(masks, StoredCodes):
                        self._index[number, of_class] = pixels
        occurs = np.array([len(holders) > 0 for holders in self._holders])
        shares = np.where(occurs, np.asarray(class_shares, np.float64), 0.0)
        if shares.sum() == 0:
            wanted = ", ".join(f"{name} {share:g}" for name, share in zip(CLASS_NAMES, class_shares))
            raise DataError(f"no training pixel is of a class that data.class_shares asks for ({wanted})")
        self.shares = shares / shares.sum()  # (4,), the target after renormalisation

    def draw(self, rng: np.random.Generator) -> Draw:
        """Return one pixel."""
        of_class = int(rng.choice(len(self.shares), p=self.shares))
        holders = self._holders[of_class]
        tile = holders[rng.integers(len(holders))]
        mask = self._masks[tile]
        pixels = self._index.get((tile, of_class))
        pixels = pixels_of(mask, of_class) if pixels is None else pixels
        row, col = divmod(int(pixels[rng.integers(len(pixels))]), mask.shape[1])
        return Draw(tile, row, col, of_class)


def pixels_of(codes: np.ndarray, of_class: int) -> np.ndarray:
    """Return flat int32 indices of the pixels of a class: the certain ones, else those of sets with it."""
    pixels = np.flatnonzero(codes == of_class)  # certain labels: the code is the class
    if pixels.size == 0:
        sets = [code for code, classes in CODE_CLASSES.items() if of_class in classes and len(classes) > 1]
        pixels = np.flatnonzero(np.isin(codes, sets))
    return pixels.astype(np.int32)


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
    # one bit a band, so that one nearest warp does for all; weights are 0 and 1, and float32 products fast
    bits = tile.weights @ (2.0 ** np.arange(len(BANDS))).astype(np.float32)  # (H, W)
    bits = _warp(bits, matrix, size, cv2.INTER_NEAREST, 0).astype(np.uint8)
    codes = _warp(tile.codes, matrix, size, cv2.INTER_NEAREST, IGNORE)
    sums = _warp(tile.values, matrix, size, cv2.INTER_LINEAR, 0)
    weights = _warp(tile.weights, matrix, size, cv2.INTER_LINEAR, 0)
    has_value = np.unpackbits(bits[..., None], axis=-1, count=len(BANDS), bitorder="little").view(bool)
    has_value &= weights > 1e-3  # (S, S, 5)
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


class CropDataset(Dataset):
    """Training crops. Item `epoch * len + i` depends on seed, epoch and i only, so runs can be resumed."""

    def __init__(
        self, tiles: Indexed[Tile], normalization: dict, data: DataConfig, augment: AugmentConfig, seed: int
    ) -> None:
        """Prepare crops of `tiles`; `normalization` is what their values were normalised with."""
        self.tiles = tiles
        self.normalization = normalization
        self.size = data.crop
        self.augment = augment
        self.mix = data.mix
        self.seed = seed
        self.length = data.steps_per_epoch * data.batch_size
        masks: Indexed[np.ndarray]
        masks = StoredCodes(tiles) if isinstance(tiles, StoredTiles) else [tile.codes for tile in tiles]
        self.pixels = PixelSampler(masks, data.class_shares)
        cv2.setNumThreads(1)  # crops are small; the cores are busy with the network

    def __len__(self) -> int:
        """Return the number of crops in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return image (5, S, S) float32 with nodata 0, codes (S, S) uint8, and the class drawn for."""
        epoch, number = divmod(index, self.length)
        rng = np.random.default_rng([self.seed, epoch, number])
        crop, draw = self.crop(rng)
        if self.mix > 0 and rng.random() < self.mix:
            crop = paste_rectangle(crop, self._crop_of_another_tile(draw.tile, rng), rng)
        image = np.ascontiguousarray(crop.values.transpose(2, 0, 1))
        image[np.isnan(image)] = 0
        codes = np.ascontiguousarray(crop.codes)
        return torch.from_numpy(image), torch.from_numpy(codes), draw.of_class

    def crop(self, rng: np.random.Generator) -> tuple[Crop, Draw]:
        """Return one augmented crop and the pixel it was made around."""
        draw = self.pixels.draw(rng)
        return self._crop_around(draw, rng), draw

    def _crop_of_another_tile(self, tile: int, rng: np.random.Generator) -> Crop:
        for _ in range(MIX_TRIES):
            draw = self.pixels.draw(rng)
            if draw.tile != tile:
                break
        return self._crop_around(draw, rng)

    def _crop_around(self, draw: Draw, rng: np.random.Generator) -> Crop:
        tile = self.tiles[draw.tile]
        if rng.random() < self.augment.affine_share:
            crop = cut_affine(tile, draw, self.size, self.augment, rng)
        else:
            crop = cut(tile, draw, self.size, rng)
        crop = flip_and_turn(crop, self.augment, rng)
        normalization = tile.normalization or self.normalization
        # one band after the other in memory, as the network takes them: several times faster to change
        values = np.ascontiguousarray(crop.values.transpose(2, 0, 1)).transpose(1, 2, 0)
        return crop._replace(values=jitter(values, normalization, self.augment, rng))


class EpochSampler(Sampler):
    """Yields the indices `epoch * length + i`; Lightning calls `set_epoch` at the start of every epoch.

    Of several processes each gets an equal part of every batch, in the order of their numbers: together they
    train on the crops that a single process would train on in the same step.
    """

    def __init__(self, length: int, batch_size: int = 1, processes: int = 1) -> None:
        """Start with epoch 0 of `length` samples, in batches that `processes` share."""
        self.length = length
        self.batch_size = batch_size
        self.processes = processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield this epoch's indices, those of this process."""
        first = self.epoch * self.length
        if self.processes == 1:
            return iter(range(first, first + self.length))
        part = self.batch_size // self.processes
        start = first + process_number() * part
        batches = range(start, start + self.length, self.batch_size)
        return (index for batch in batches for index in range(batch, batch + part))

    def __len__(self) -> int:
        """Return the number of samples in an epoch, those of this process."""
        return self.length // self.processes


class TileDataset(Dataset):
    """Whole tiles, not augmented: image (5, H, W) float32 with nodata 0, codes (H, W) uint8."""

    def __init__(self, tiles: Indexed[Tile]) -> None:
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


def open_fold(config: Config, fold: int, normalization: Optional[dict] = None) -> FoldData:
    """Read a fold's tiles, normalised by the statistics of its training tiles alone, or by those given.

    With `data.scaling` percentile, each tile is normalised by itself (`tile_normalization`). Where ALL_TILES
    holds out none, one of those trained on is validated: weights are recorded after a validation.

    Raises DataError or `prep.store.StoreError`.
    """
    store = TileStore(config.data.store)
    train_ids, val_ids = split_tiles(store, config.data.scheme, fold)
    if normalization is None:
        # stats.json of a store with training and validation ids is that of its training tiles
        statistics = store.stats if config.data.scheme == SPLIT_SCHEME else compute(store, train_ids)
        normalization = {"mean": statistics["mean"], "std": statistics["std"]}
    scaling, shown = config.data.scaling, val_ids or train_ids[:1]
    tiles: Indexed[Tile]
    val_tiles: Indexed[Tile]
    if len(store.tile_ids) > IN_MEMORY_TILES:
        unsplit = config.data.unsplit_glacier
        tiles = StoredTiles(store, train_ids, normalization, unsplit, scaling)
        val_tiles = StoredTiles(store, shown, normalization, scaling=scaling)
    else:
        tiles, val_tiles = (load_tiles(store, ids, normalization, scaling) for ids in (train_ids, shown))
        if config.data.unsplit_glacier == "clean":
            tiles = [count_unsplit_as_clean(tile) for tile in tiles]
    dataset = CropDataset(tiles, normalization, config.data, config.augment, config.train.seed)
    train_loader = DataLoader(
        dataset,
        batch_size=config.data.batch_size // config.trainer.processes,
        sampler=EpochSampler(len(dataset), config.data.batch_size, config.trainer.processes),
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
    )
    # tiles may differ in size, so one at a time
    val_loader = DataLoader(TileDataset(val_tiles), batch_size=1)
    return FoldData(train_ids, val_ids, normalization, dataset, train_loader, val_loader)
