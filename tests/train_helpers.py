"""A small tile store whose classes can be told from the bands, and the smallest runs, for the tests of training."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from support import PROJECT

from prep import store as tile_store
from prep.labels import GLACIER_OR_DEBRIS, IGNORE, count_codes
from prep.stats import band_statistics, describe
from train.__main__ import main
from train.config import Config, load_config

SMOKE = PROJECT / "train" / "recipes" / "smoke.yaml"

# Mean of each class in the five bands: reflectance x 4, kelvin.
CLASS_MEANS = np.array(
    [
        [0.2, 0.2, 0.2, 0.3, 275.0],
        [0.9, 0.9, 0.9, 0.1, 255.0],
        [0.3, 0.3, 0.3, 0.2, 262.0],
        [0.1, 0.2, 0.1, 0.0, 268.0],
    ],
    np.float32,
)


def make_tile(seed: int, size: int = 96, labels: str = "phase2") -> tuple[np.ndarray, np.ndarray]:
    """Return image (size, size, 5) float32 in physical units and mask (size, size) uint8.

    Bands of classes at random heights, a strip of nodata, single pixels without one band. With "phase1"
    labels, glacier and debris are one code.
    """
    rng = np.random.default_rng(seed)
    classes = np.zeros((size, size), np.uint8)
    edges = np.sort(rng.choice(np.arange(8, size - 8, 4), 3, replace=False))
    for number, start in enumerate(edges, start=1):
        classes[start:] = number
    image = CLASS_MEANS[classes] + rng.normal(0, 0.02, (size, size, 5)).astype(np.float32)
    image[rng.random(image.shape) < 0.01] = np.nan
    image[:, :6] = np.nan
    mask = np.where(np.isnan(image).all(axis=-1), IGNORE, classes).astype(np.uint8)
    if labels == "phase1":
        mask[np.isin(mask, (1, 2))] = GLACIER_OR_DEBRIS
        mask[mask == 3] = 0
    return image.astype(np.float32), mask


def make_store(
    folder: Path,
    tiles: int = 4,
    folds: int = 2,
    size: int = 96,
    labels: tuple[str, ...] = ("phase2", "phase1"),
) -> Path:
    """Write a store of `tiles` tiles, whose labels are of these phases in turn, and return its folder."""
    images, rows, digest = [], [], hashlib.sha256()
    with tile_store.create(folder) as writer:
        for number in range(tiles):
            phase, tile_id = labels[number % len(labels)], f"{number:03d}"
            image, mask = make_tile(number, size, phase)
            writer.write_tile(tile_id, image, mask)
            digest.update(image.tobytes() + mask.tobytes())
            valid = float((mask != IGNORE).mean())
            rows.append(tile_store.TileRow(tile_id, "synthetic", None, None, phase, valid, count_codes(mask)))
            images.append(image)
        # tiles 0, 1 in fold 0; 2, 3 in fold 1: both kinds of labels in each
        assignment = {row.tile_id: number // 2 % folds for number, row in enumerate(rows)}
        scheme = {"stratified": assignment, "spatial": assignment, "seed": 0}
        about = {"fingerprint": digest.hexdigest()[:16]}
        writer.write_index(rows, describe(band_statistics(images)), scheme, about)
    return folder


def smoke_config(store: Path, *overrides: str) -> Config:
    """Return the smoke recipe on a store, changed by `key=value` overrides."""
    return load_config(SMOKE, [f"data.store={store}", *overrides])


def fit_smoke(store: Path, run: Path, *arguments: str) -> Path:
    """Train the smoke recipe on a store into the folder `run`, and return that.

    Args:
        store: folder of the tile store.
        run: folder of the run.
        arguments: further ones of `python -m train fit`: options, then settings.
    """
    command = ["fit", "--recipe", str(SMOKE), "--run", str(run), *arguments, f"data.store={store}"]
    assert main(command) == 0
    return run


def read_history(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a fold's history.csv."""
    with open(folder / "history.csv", newline="") as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a fold's fold.pt."""
    return torch.load(folder / "fold.pt", weights_only=True)["state_dict"]


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two folds have bit for bit the same weights."""
    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class StopBefore(Callback):
    """Ends a run with an error before a step, as a power cut would."""

    def __init__(self, step: int, error: type[BaseException] = RuntimeError) -> None:
        """Raise `error` before the step of this number."""
        self.step = step
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Raise the error at the step."""
        if trainer.global_step == self.step:
            raise self.error("interrupted by the test")
