"""Training crops drawn around pixels of either side of the extent; whole tiles for validation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Callable, Iterator, NamedTuple, Optional

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from prep.folds import KM2_PER_PIXEL
from prep.ground import off_ground
from prep.labels import CODE_NAMES, IGNORE
from prep.stats import compute
from prep.store import SPLIT_SCHEME, TileStore
from solution import BANDS, KitError, normalize, valid_mask
from train.augment import Crop, Draw, Tile, cut, cut_affine, flip_and_turn, jitter, paste_rectangle
from train.config import AugmentConfig, Config, DataConfig
from train.hardware import process_number
from train.losses import sides_of_codes
from train.run import ALL, Fold

MIX_TRIES = 8  # draws after which a crop is mixed with one of its own tile
IN_MEMORY_TILES = 256  # 3 GB; of a larger store, tiles that were not used lately are read again
SIDES = ("rest", "glacier")  # of the extent
SIDE_OF_CODE = sides_of_codes().numpy()


class DataError(KitError):
    """The tiles of a store cannot serve this training; the message says why and what to do."""


def open_store(data: DataConfig) -> TileStore:
    """Return the store of a recipe, without the tiles on the ground of `data.exclude_ground`."""
    store = TileStore(data.store)
    if data.exclude_ground:
        there, store.tile_ids = store.tile_ids, off_ground(store, data.exclude_ground)
        gone = len(there) - len(store.tile_ids)
        if process_number() == 0:
            print(f"{data.store}: {gone} of {len(there)} tiles left out, on the ground of {data.exclude_ground}")
    return store


def split_tiles(store: TileStore, scheme: str, fold: Fold) -> tuple[list[str], list[str]]:
    """Return the ids of the tiles to train on and of those to validate on, in the order of the store.

    ALL holds out none. Raises DataError where the scheme has no such fold, or a side of the split has no tile.
    """
    fold_of = store.fold_of(scheme)
    if fold == ALL:
        return list(store.tile_ids), []
    if fold not in fold_of.values():
        known = ", ".join(str(number) for number in sorted(set(fold_of.values())))
        raise DataError(f"{store.folder}: scheme '{scheme}' has no fold {fold}; it has folds {known}")
    train = [tile_id for tile_id in store.tile_ids if fold_of[tile_id] != fold]
    val = [tile_id for tile_id in store.tile_ids if fold_of[tile_id] == fold]
    if not (train and val):
        raise DataError(
            f"{store.folder}: fold {fold} of scheme '{scheme}' leaves {len(train)} tiles to train on and {len(val)} to "
            "validate on, expected some of each"
        )
    return train, val


def folds_of_scheme(store: TileStore, scheme: str) -> list[int]:
    """Return the numbers of all folds of a scheme that hold tiles out."""
    numbers = set(store.fold_of(scheme).values())
    return sorted(number for number in numbers if number >= 0)  # below: tiles that are never held out


def describe_unlearned(store: TileStore) -> str:
    """Return what the labels show and no network here learns, "" where that is nothing."""
    lakes = sum(tile.counts["lake"] for tile in store.tiles) * KM2_PER_PIXEL
    told = f"{store.folder}: the labels show {lakes:.1f} km² of lakes, which nothing here learns: no crop is drawn"
    return f"{told} around them, and they count as rest (docs/data-and-labels.md)" if lakes else ""


class Tiles(Dataset):
    """Tiles of a store, normalised, in a given order; each is read when it is first asked for."""

    def __init__(self, store: TileStore, tile_ids: Sequence[str], normalization: dict) -> None:
        """Serve these tiles; `normalization` is {"mean", "std"} of the bands, physical units."""
        self.store, self.tile_ids, self.normalization = store, list(tile_ids), normalization
        self._read = lru_cache(maxsize=IN_MEMORY_TILES)(self._read_tile)

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tile_ids)

    def __getitem__(self, index: int) -> Tile:
        """Return one tile; IndexError beyond the last one."""
        return self._read(self.tile_ids[index])

    def _read_tile(self, tile_id: str) -> Tile:
        image = self.store.image(tile_id)
        values = np.ascontiguousarray(normalize(image, self.normalization).transpose(1, 2, 0))
        weights = (~np.isnan(image)).astype(np.float32)
        codes = np.where(valid_mask(image), self.store.mask(tile_id), IGNORE).astype(np.uint8)
        return Tile(tile_id, values, weights, codes)


class PixelSampler:
    """Draws pixels so that glacier has a given share of them, however rare it is.

    A side of the extent is drawn first, then a tile uniformly among those that hold pixels of it, then one of
    these pixels.
    """

    def __init__(self, tiles: Tiles, glacier_share: float) -> None:
        """Find out from the store's counts which tiles hold which side. Raises DataError where none does."""
        self.tiles = tiles
        counts = {tile.tile_id: tile.counts for tile in tiles.store.tiles}
        self._holders: list[list[int]] = [[], []]
        for number, tile_id in enumerate(tiles.tile_ids):
            for side, holders in enumerate(self._holders):
                codes = [code for code in CODE_NAMES if SIDE_OF_CODE[code] == side]
                if sum(counts[tile_id][CODE_NAMES[code]] for code in codes):
                    holders.append(number)
        self.absent = [side for side, holders in zip(SIDES, self._holders) if not holders]
        shares = np.array([1 - glacier_share, glacier_share]) * [bool(holders) for holders in self._holders]
        if shares.sum() == 0:
            raise DataError(
                f"{tiles.store.folder}: no training pixel is of a side that data.glacier_share = "
                f"{glacier_share:g} asks for; label some, or change the share"
            )
        self.shares = shares / shares.sum()  # (2,), after renormalisation over the sides that occur
        self._pixels = lru_cache(maxsize=2 * IN_MEMORY_TILES)(self._find_pixels)

    def draw(self, rng: np.random.Generator) -> Draw:
        """Return one pixel."""
        side = int(rng.choice(2, p=self.shares))
        holders = self._holders[side]
        tile = holders[rng.integers(len(holders))]
        pixels = self._pixels(tile, side)
        row, col = divmod(int(pixels[rng.integers(len(pixels))]), self.tiles[tile].codes.shape[1])
        return Draw(tile, row, col, side)

    def _find_pixels(self, tile: int, side: int) -> np.ndarray:
        return np.flatnonzero(SIDE_OF_CODE[self.tiles[tile].codes] == side).astype(np.int32)


class CropDataset(Dataset):
    """Training crops. Item `epoch * len + i` depends on seed, epoch and i only, so runs can be resumed."""

    def __init__(self, tiles: Tiles, data: DataConfig, augment: AugmentConfig, seed: int) -> None:
        """Prepare crops of `tiles`."""
        self.tiles = tiles
        self.size = data.crop
        self.augment = augment
        self.mix = data.mix
        self.seed = seed
        self.length = data.steps_per_epoch * data.batch_size
        self.pixels = PixelSampler(tiles, data.glacier_share)
        cv2.setNumThreads(1)  # crops are small; the cores are busy with the network

    def __len__(self) -> int:
        """Return the number of crops in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image (C, S, S) float32, bands with nodata 0, and codes (S, S) uint8."""
        epoch, number = divmod(index, self.length)
        rng = np.random.default_rng([self.seed, epoch, number])
        draw = self.pixels.draw(rng)
        crop = self._crop_around(draw, rng)
        if self.mix > 0 and rng.random() < self.mix:
            crop = paste_rectangle(crop, self._crop_of_another_tile(draw.tile, rng), rng)
        image = np.ascontiguousarray(crop.values.transpose(2, 0, 1))
        image[: len(BANDS)] = np.nan_to_num(image[: len(BANDS)])  # what follows the bands keeps its NaN
        return torch.from_numpy(image), torch.from_numpy(np.ascontiguousarray(crop.codes))

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
        # one band after the other in memory, as the network takes them: several times faster to change
        values = np.ascontiguousarray(crop.values.transpose(2, 0, 1)).transpose(1, 2, 0)
        return crop._replace(values=jitter(values, self.tiles.normalization, self.augment, rng))


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
        part = self.batch_size // self.processes
        start = first + process_number() * part
        batches = range(start, start + self.length, self.batch_size)
        return (index for batch in batches for index in range(batch, batch + part))

    def __len__(self) -> int:
        """Return the number of samples in an epoch, those of this process."""
        return self.length // self.processes


def whole_tile(tiles: Sequence[Tile]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of one tile, not augmented: (1, 5, H, W) float32 with nodata 0, codes (1, H, W) uint8."""
    (tile,) = tiles  # they may differ in size, so one at a time
    values = np.ascontiguousarray(tile.values.transpose(2, 0, 1))
    return torch.from_numpy(values)[None], torch.from_numpy(tile.codes)[None]


class FoldData(NamedTuple):
    """What training one fold needs; `normalization` is {"mean", "std"} of its training tiles."""

    train_ids: list[str]
    val_ids: list[str]
    normalization: dict
    dataset: CropDataset
    train_loader: DataLoader
    val_loader: DataLoader


def open_fold(
    config: Config,
    fold: Fold,
    normalization: Optional[dict] = None,
    training_tiles: Callable[[TileStore, list[str], dict], Tiles] = Tiles,
) -> FoldData:
    """Open a fold's tiles, normalised by the statistics of its training tiles alone, or by those given.

    `training_tiles` makes those that crops are drawn from, which may carry channels after the bands.

    Where ALL holds out none, one of those trained on is validated: weights are recorded after a validation.

    Raises DataError or `prep.store.StoreError`.
    """
    store = open_store(config.data)
    train_ids, val_ids = split_tiles(store, config.data.scheme, fold)
    if normalization is None:
        # stats.json of a store with training and validation ids is that of its training tiles
        statistics = store.stats if config.data.scheme == SPLIT_SCHEME else compute(store, train_ids)
        normalization = {"mean": statistics["mean"], "std": statistics["std"]}
    tiles = training_tiles(store, train_ids, normalization)
    shown = Tiles(store, val_ids or train_ids[:1], normalization)
    dataset = CropDataset(tiles, config.data, config.augment, config.train.seed)
    train_loader = DataLoader(
        dataset,
        batch_size=config.data.batch_size // config.trainer.processes,
        sampler=EpochSampler(len(dataset), config.data.batch_size, config.trainer.processes),
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
    )
    val_loader = DataLoader(shown, collate_fn=whole_tile)
    return FoldData(train_ids, val_ids, normalization, dataset, train_loader, val_loader)
