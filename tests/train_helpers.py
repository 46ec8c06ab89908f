"""A small tile store whose classes can be told from the bands, for the tests of training."""

from pathlib import Path

import numpy as np

from prep import store as tile_store
from prep.labels import GLACIER_OR_DEBRIS, IGNORE, count_codes
from prep.stats import band_statistics, describe
from train.__main__ import main

CONFIGS = Path(__file__).resolve().parents[1] / "train" / "configs"
SMOKE = CONFIGS / "smoke.yaml"

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


def fit_smoke(store: Path, run: Path, *arguments: str) -> Path:
    """Train the smoke config on a store into the folder `run`, and return that.

    Args:
        store: folder of the tile store.
        run: folder of the run.
        arguments: further ones of `python -m train fit`: options, then settings.
    """
    command = ["fit", "--config", str(SMOKE), "--run", str(run), *arguments, f"data.store={store}"]
    assert main(command) == 0
    return run


def make_store(folder: Path, tiles: int = 4, folds: int = 2, size: int = 96) -> Path:
    """Write a store of `tiles` tiles, every second with phase-1 labels, and return its folder."""
    images, rows = [], []
    with tile_store.create(folder) as writer:
        for number in range(tiles):
            labels = "phase1" if number % 2 else "phase2"
            image, mask = make_tile(number, size, labels)
            tile_id = f"{number:03d}"
            writer.write_tile(tile_id, image, mask)
            valid = float((mask != IGNORE).mean())
            rows.append(
                tile_store.TileRow(tile_id, "synthetic", None, None, labels, valid, count_codes(mask))
            )
            images.append(image)
        # tiles 0, 1 in fold 0; 2, 3 in fold 1: both kinds of labels in each
        assignment = {row.tile_id: number // 2 % folds for number, row in enumerate(rows)}
        scheme = {"stratified": assignment, "spatial": assignment, "seed": 0}
        writer.write_index(rows, describe(band_statistics(images)), scheme, {})
    return folder
