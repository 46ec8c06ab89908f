"""Fits `solution.PixelNet`: a small network on features of single pixels, in seconds a fold on one core.

Every training tile gives as many pixels, drawn at random among those with a label. The loss is the
cross-entropy of the set that a label allows, so glacier of unknown kind asks for either kind.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from prep.files import write_json
from prep.labels import CODE_CLASSES, IGNORE
from prep.store import TileStore
from solution import (
    BANDS,
    CLASS_NAMES,
    SIGHT,
    STATISTICS_WINDOWS,
    PixelNet,
    median_temperature,
    prepare_torch,
    valid_mask,
)
from train.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig, to_dict
from train.data import ALL_TILES, all_pairs, as_clean, folds_of_scheme, name_of, split_tiles
from train.pixel_runs import fold_record, predict_held_out, save_fold, score_and_save
from train.predict import read_fold
from train.run import FOLD_FILE, OOF_FOLDER, RUN_FILE, fold_folder

LEAST_STD = 1e-6  # of a feature that is the same everywhere


@dataclass
class PixelConfig:
    """The content of train/configs/pixels.yaml."""

    store: str = "data/competition"
    scheme: str = "stratified"
    pixels_per_tile: int = 20_000
    unsplit_glacier: str = "set"  # as data.unsplit_glacier of train.config
    hidden: list[int] = field(default_factory=lambda: [128, 64])  # channels of the layers
    ranges: list[int] = field(default_factory=lambda: [9, 17, 33, 65])  # px, windows of its range features,
    tophats: list[int] = field(default_factory=lambda: [9, 17, 33])  # px, of its top-hats,
    range_bands: list[int] = field(default_factory=lambda: [2, 3, 4])  # and bands of both, in solution.BANDS
    dropout: float = 0.2
    epochs: int = 8
    batch_size: int = 1024
    lr: float = 2e-3  # of AdamW, falls to 0 along a cosine
    weight_decay: float = 0.02
    noise: float = 0.05  # every feature of a batch is multiplied by 1 + this many standard normal numbers
    seed: int = 0


class Pixels(NamedTuple):
    """Features (N, F) float32, NaN without a value, and label codes (N,) uint8."""

    features: np.ndarray
    codes: np.ndarray


def load_pixel_config(path: Path | None, overrides: Sequence[str] = ()) -> PixelConfig:
    """Return the defaults, changed by a YAML file, changed by overrides such as "epochs=4".

    Raises ConfigError for a missing file, an unknown key, or a value of the wrong type.
    """
    tree = OmegaConf.structured(PixelConfig)
    try:
        if path is not None:
            if not path.is_file():
                raise ConfigError(f"config {path} does not exist; see train/configs/pixels.yaml")
            tree = OmegaConf.merge(tree, OmegaConf.load(path))
        config: Any = OmegaConf.to_object(OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides))))
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{path}, {', '.join(overrides)}: {error.full_key}: {reason}") from error
    if config.unsplit_glacier not in ("set", "clean"):
        raise ConfigError(f"unsplit_glacier is {config.unsplit_glacier!r}, expected set or clean")
    widest = STATISTICS_WINDOWS[-1]
    if any(window % 2 == 0 or not 1 < window <= widest for window in config.ranges):
        raise ConfigError(f"ranges: {config.ranges}, expected odd windows of 3 to {widest} px")
    if any(window % 2 == 0 or not 1 < window <= SIGHT for window in config.tophats):
        raise ConfigError(f"tophats: {config.tophats}, expected odd windows of 3 to {SIGHT} px")
    if not set(config.range_bands) <= set(range(len(BANDS))):
        raise ConfigError(f"range_bands: {config.range_bands}, expected numbers 0 to {len(BANDS) - 1}")
    if min(config.pixels_per_tile, config.epochs, config.batch_size, *config.hidden) < 1:
        raise ConfigError("pixels_per_tile, epochs, batch_size and hidden: expected 1 or more")
    return config


def network_args(config: PixelConfig) -> dict:
    """Return the arguments of `PixelNet`."""
    names = ("hidden", "dropout", "ranges", "tophats", "range_bands")
    return {name: copy.copy(getattr(config, name)) for name in names}


def empty_network(config: PixelConfig) -> PixelNet:
    """Return the network that a configuration describes, with random weights."""
    return PixelNet(len(BANDS), len(CLASS_NAMES), None, **network_args(config))


def draw_pixels(
    network: PixelNet, image: np.ndarray, codes: np.ndarray, count: int, rng: np.random.Generator
) -> Pixels:
    """Return up to `count` labelled pixels of a tile.

    Args:
        network: says which features.
        image: (H, W, 5) physical units, NaN where nodata.
        codes: (H, W) uint8 label codes, IGNORE where there is none.
        count: how many.
        rng: draws them.
    """
    labelled = np.flatnonzero((codes != IGNORE) & valid_mask(image))
    drawn = np.sort(rng.choice(labelled, min(count, labelled.size), replace=False))
    features = network.features(image, median_temperature(image))
    return Pixels(features.reshape(len(features), -1)[:, drawn].T.copy(), codes.ravel()[drawn])


def draw_store(store: TileStore, config: PixelConfig) -> dict[str, Pixels]:
    """Return pixels of every tile; those of a tile do not depend on the folds."""
    drawn, network = {}, empty_network(config)
    for index, tile in enumerate(store.tile_ids):
        codes = store.mask(tile)
        codes = as_clean(codes) if config.unsplit_glacier == "clean" else codes
        rng = np.random.default_rng([config.seed, index])
        drawn[tile] = draw_pixels(network, store.image(tile), codes, config.pixels_per_tile, rng)
    return drawn


def allowed_classes(codes: np.ndarray) -> Tensor:
    """Return (N, 4) float32: 1 for every class that a label code (N,) allows."""
    table = np.zeros((256, len(CLASS_NAMES)), np.float32)
    for code, classes in CODE_CLASSES.items():
        table[code, list(classes)] = 1
    return torch.from_numpy(table[codes])


def set_cross_entropy(logits: Tensor, allowed: Tensor) -> Tensor:
    """Return the mean of -log of the probability (N, 4) that lies within the allowed sets (N, 4)."""
    inside = logits.masked_fill(allowed == 0, -math.inf)
    return (logits.logsumexp(dim=1) - inside.logsumexp(dim=1)).mean()


def fit_network(tiles: Iterable[Pixels], config: PixelConfig) -> PixelNet:
    """Return a network fitted to pixels, in evaluation mode."""
    tiles = list(tiles)
    features = np.concatenate([tile.features for tile in tiles])
    allowed = allowed_classes(np.concatenate([tile.codes for tile in tiles]))
    torch.manual_seed(config.seed)
    network = empty_network(config)
    network.running_mean.copy_(torch.from_numpy(np.nanmean(features, axis=0, dtype=np.float64)))
    deviation = np.nanstd(features, axis=0, dtype=np.float64)
    network.running_std.copy_(torch.from_numpy(np.maximum(deviation, LEAST_STD)))
    inputs = network.standardise(torch.from_numpy(features)[..., None, None])
    steps = max(1, config.epochs * len(inputs) // config.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        batch = torch.randint(len(inputs), (min(config.batch_size, len(inputs)),))
        noise = 1 + config.noise * torch.randn(inputs.shape[1:])
        loss = set_cross_entropy(network.layers(inputs[batch] * noise)[..., 0, 0], allowed[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def fit_run(config: PixelConfig, run_dir: Path, threads: int) -> dict:
    """Fit every fold of the scheme, and a network on all tiles for submission; return the folds' scores.

    Writes `fold<k>/fold.pt`, for the last one with k = ALL_TILES, and the out-of-fold predictions. Raises
    `prep.store.StoreError` where the store is incomplete or has no such scheme.
    """
    store = TileStore(config.store)
    (run_dir / OOF_FOLDER).mkdir(parents=True, exist_ok=True)
    about = {"model": "PixelNet", "scheme": config.scheme, "seed": config.seed}
    write_json(run_dir / RUN_FILE, about)
    folds = [*folds_of_scheme(store, config.scheme), ALL_TILES]
    records = list(fit_folds(config, store, folds, threads))
    for record in records:
        predict_held_out(run_dir, record, store)
    return score_and_save(run_dir, records, store)


def fit_pairs(config: PixelConfig, run_dir: Path, threads: int) -> None:
    """Fit a network without each pair of folds, `fold<its number>/fold.pt`: teachers, without scores.

    Those that are there with these settings are not fitted again.
    """
    store = TileStore(config.store)
    pairs = all_pairs(folds_of_scheme(store, config.scheme))
    todo = [pair for pair in pairs if not is_finished(run_dir, pair, config)]
    print(f"{run_dir}: {len(pairs) - len(todo)} of {len(pairs)} pairs of folds are finished", flush=True)
    for record in fit_folds(config, store, todo, threads):
        save_fold(run_dir, {**record, "val_mcc": math.nan, "val_mcc4": math.nan})


def is_finished(run_dir: Path, fold: int, config: PixelConfig) -> bool:
    """Return whether the run has a network of this fold and these settings."""
    path = fold_folder(run_dir, fold) / FOLD_FILE
    return path.is_file() and read_fold(path)["config"].get("pixels") == to_dict(config)


def fit_folds(config: PixelConfig, store: TileStore, folds: Sequence[int], threads: int) -> Iterator[dict]:
    """Yield the records of some folds, but for their scores, each as soon as it is fitted."""
    prepare_torch(threads)
    drawn = draw_store(store, config) if folds else {}
    for fold in folds:
        yield fit_fold(config, store, drawn, fold)


def fit_fold(config: PixelConfig, store: TileStore, drawn: Mapping[str, Pixels], fold: int) -> dict:
    """Return the record of one fold, or of all tiles, but for its scores."""
    started = time.monotonic()
    train, val = split_tiles(store, config.scheme, fold)
    network = fit_network([drawn[tile] for tile in train], config)
    seconds = time.monotonic() - started
    print(f"PixelNet, {config.scheme}, {name_of(fold)}: {len(train)} tiles, {seconds:.0f} s", flush=True)
    record = fold_record(as_config(config), fold, network, train, val, seconds)
    return {**record, "config": {**record["config"], "pixels": to_dict(config)}}


def as_config(config: PixelConfig) -> Config:
    """Return the config of a run of networks that names this one, its folds and its epochs."""
    return Config(
        data=DataConfig(store=config.store, scheme=config.scheme, unsplit_glacier=config.unsplit_glacier),
        model=ModelConfig(name="PixelNet", args=network_args(config)),
        train=TrainConfig(epochs=config.epochs, early_stop=0, keep="last", seed=config.seed),
    )
