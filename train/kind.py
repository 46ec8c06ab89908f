"""The network of the kind: debris-covered or clean ice, from local statistics of glacier pixels.

It trains on every pixel whose kind is known, in seconds, and an unknown kind has no say in it. What a fold's
network learns from are the tiles of the other folds, as for the extent.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from prep.files import write_array, write_whole
from prep.stats import compute
from prep.store import TileStore
from solution import (
    BANDS,
    CLASS_NAMES,
    MOST_DEVIATIONS,
    VIEWS,
    KindNet,
    load_member,
    local_statistics,
    member_logits,
    normalize,
    pad_to_multiple,
    twice_as_large,
)
from train.config import Config, KindConfig, to_dict
from train.data import DataError, folds_of_scheme, split_tiles
from train.run import (
    ALL,
    FOLD_FILE,
    FOLD_FORMAT,
    Fold,
    RunError,
    fold_folder,
    is_fresh,
    read_fold,
)

CPU = torch.device("cpu")
CLEAN, DEBRIS = CLASS_NAMES.index("glacier"), CLASS_NAMES.index("debris")


class KnownPixels(NamedTuple):
    """Glacier pixels whose kind is known: features (N, F) float32, and whether they are debris, (N,) float32."""

    features: Tensor
    debris: Tensor


def features_of(image: np.ndarray, normalization: Mapping) -> Tensor:
    """Return what `solution.KindNet` sees of each pixel, (F, H, W) float32, interpolated to full resolution."""
    height, width = image.shape[:2]
    x = pad_to_multiple(torch.from_numpy(normalize(image, normalization))[None])
    x = x.clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
    maps = [x]
    for statistics in local_statistics(x, KindNet.LEVELS):
        while statistics.shape[2] < x.shape[2]:
            statistics = twice_as_large(statistics)
        maps.append(statistics)
    return torch.cat(maps, dim=1)[0, :, :height, :width]


def known_pixels(store: TileStore, tile: str, normalization: Mapping) -> KnownPixels:
    """Return the pixels of a tile that are certainly clean or certainly debris-covered ice."""
    codes = store.mask(tile)
    known = torch.from_numpy(np.isin(codes, (CLEAN, DEBRIS)))
    if not known.any():
        return KnownPixels(torch.zeros(0, len(BANDS) + KindNet.LEVELS * KindNet.STATISTICS), torch.zeros(0))
    features = features_of(store.image(tile), normalization)[:, known].T.contiguous()
    return KnownPixels(features, torch.from_numpy(codes)[known].eq(DEBRIS).float())


def train_network(pixels: KnownPixels, config: KindConfig) -> KindNet:
    """Return a network fitted to some pixels: one cycle of the learning rate, cross-entropy.

    While it trains, features are standardised; the result has that standardisation in its weights.
    """
    torch.manual_seed(config.seed)
    mean, std = pixels.features.mean(dim=0), pixels.features.std(dim=0).clamp(min=1e-3)
    features = ((pixels.features - mean) / std).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
    first, last = nn.Linear(features.shape[1], config.hidden), nn.Linear(config.hidden, 1)
    network = nn.Sequential(first, nn.ReLU(), nn.Dropout(config.dropout), last)
    steps = max(1, round(config.epochs * len(features) / config.batch_size))
    optimizer = torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps + 1)
    for _ in range(steps):
        rows = torch.randint(len(features), (config.batch_size,))
        logits = network(features[rows])[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, pixels.debris[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return as_kind_net(first, last, mean, std)


@torch.no_grad()
def as_kind_net(first: nn.Linear, last: nn.Linear, mean: Tensor, std: Tensor) -> KindNet:
    """Return the KindNet that answers as two layers do on features that are standardised first."""
    net = KindNet(len(last.weight[0]))
    weight = first.weight / std  # (hidden, F)
    parts = weight.split([len(BANDS), *[KindNet.STATISTICS] * KindNet.LEVELS], dim=1)
    state = {"last.weight": last.weight[:, :, None, None], "last.bias": last.bias}
    for name, part in zip(["pixel", *(f"around.{level}" for level in range(KindNet.LEVELS))], parts):
        state |= {f"{name}.weight": part[:, :, None, None], f"{name}.bias": torch.zeros(len(part))}
    state["pixel.bias"] = first.bias - weight @ mean
    net.load_state_dict(state)
    return net.eval()


def _made_by(config: Config, store: TileStore) -> dict:
    """Return what decides a network of the kind, besides its fold."""
    return {"settings": to_dict(config.kind), "scheme": config.data.scheme, "fingerprint": store.fingerprint}


def read_kind(config: Config, store: TileStore, path: Path) -> dict:
    """Return the record of a fold. RunError where it is missing, or of other settings or labels than a recipe's."""
    record, expected = read_fold(path), _made_by(config, store)
    if {key: record.get(key) for key in expected} != expected:
        raise RunError(f"{path}: was made with other settings or labels; remove {path.parents[1]} to make it again")
    return record


def fit_kind(config: Config, folder: Path, folds: Sequence[Fold]) -> None:
    """Fit the network of the kind of each fold in `folder`/fold<k>/fold.pt; finished folds are kept.

    Raises DataError where the training tiles show only one kind.
    """
    store = TileStore(config.data.store)
    for fold in folds:
        path = fold_folder(folder, fold) / FOLD_FILE
        if path.is_file():
            read_kind(config, store, path)
            continue
        train_ids, val_ids = split_tiles(store, config.data.scheme, fold)
        statistics = compute(store, train_ids)
        normalization = {"mean": statistics["mean"], "std": statistics["std"]}
        parts = [known_pixels(store, tile, normalization) for tile in train_ids]
        pixels = KnownPixels(*(torch.cat(part) for part in zip(*parts)))
        debris = int(pixels.debris.sum())
        if debris in (0, len(pixels.debris)):
            raise DataError(
                f"{config.data.store}: {len(pixels.debris)} pixels of known kind to train on, {debris} of them "
                "debris; expected both kinds. Label some tiles with 85 and 170 in label_phase2/ or label_partial/"
            )
        network = train_network(pixels, config.kind)
        record = {
            "format": FOLD_FORMAT,
            "arch": {"name": "KindNet", "args": {"hidden": config.kind.hidden}},
            "fold": fold,
            "train_tiles": train_ids,
            "val_tiles": val_ids,
            "normalization": normalization,
            "pixels": {"debris": debris, "clean": len(pixels.debris) - debris},
            "state_dict": network.state_dict(),
            **_made_by(config, store),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, partial(torch.save, record))
        print(
            f"kind, fold {fold}: {debris:,} pixels of debris and {len(pixels.debris) - debris:,} clean",
            flush=True,
        )


def kind_folds(config: Config) -> list[Fold]:
    """Return the folds that a run's network of the kind is fitted for: each of the scheme, and all tiles."""
    return [*folds_of_scheme(TileStore(config.data.store), config.data.scheme), ALL]


def predict_kind(folder: Path, store: TileStore, fold_of: Mapping[str, int]) -> None:
    """Write `folder`/<tile>.npy, (H, W) float16 logits of debris given glacier, by the fold of each tile."""
    for tile, fold in tqdm(fold_of.items(), desc="predict kind", unit="tile", file=sys.stderr):
        checkpoint = fold_folder(folder, fold) / FOLD_FILE
        if not is_fresh(folder / f"{tile}.npy", checkpoint):
            member = load_member({**read_fold(checkpoint), "weight": 1.0}, str(checkpoint), CPU)
            logits = member_logits(member, store.image(tile), VIEWS[0], CPU)
            write_array(folder / f"{tile}.npy", logits.numpy().astype(np.float16))


def load_logits(folder: Path, tile: str) -> Tensor:
    """Return what `predict_kind` wrote of a tile, (H, W) float32. RunError where it is missing."""
    path = Path(folder) / f"{tile}.npy"
    if not path.is_file():
        raise RunError(f"{path}: not predicted yet; run `python -m train score`")
    return torch.from_numpy(np.load(path).astype(np.float32))
