"""Out-of-fold predictions: each tile by the fold that never saw it, with the submission's own passes."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from tqdm import tqdm

from prep.files import write_array
from prep.store import TileStore
from solution import (
    CLASS_NAMES,
    VIEWS,
    Member,
    Model,
    Pass,
    Postprocess,
    ensemble_probabilities,
    load_member,
    prepare_torch,
    usable_cores,
)
from train.data import ALL_TILES, tile_normalization
from train.fit import FOLD_FORMAT, RunError
from train.run import (
    DIAGONALS_FOLDER,
    FOLD_FILE,
    OOF_FOLDER,
    PASSES_FOLDER,
    files_of_folds,
    fold_folder,
    is_fresh,
)

HALF_TURN = [view.name for view in VIEWS].index("rotation 180")


def read_fold(path: Path) -> dict:
    """Return the record of a finished fold with its weights.

    Raises:
        RunError: it is missing or of another format.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such fold; train it with `python -m train fit` (or `make train-all`)")
    record = torch.load(path, map_location="cpu", weights_only=True)
    if record.get("format") != FOLD_FORMAT:
        raise RunError(f"{path}: format {record.get('format')!r}, expected {FOLD_FORMAT!r}; train it again")
    return record


def read_folds(run_dir: Path) -> list[dict]:
    """Return the records of all finished folds of a run, in the order of their numbers.

    Raises:
        RunError: there are none.
    """
    paths = files_of_folds(run_dir, FOLD_FILE)
    if not paths:
        raise RunError(f"{run_dir}: no finished folds; train them with `python -m train fit --run {run_dir}`")
    return sorted((read_fold(path) for path in paths), key=lambda record: record["fold"])


def with_held_out(records: Sequence[dict]) -> list[dict]:
    """Return the folds of a run that hold tiles out; all, where none does.

    A network of all tiles beside them is for mixtures (`train.mixture`), which know the folds' worth.
    """
    return [record for record in records if record["fold"] != ALL_TILES] or list(records)


def as_member(record: Mapping) -> Member:
    """Return a fold as a member of an ensemble, loaded as the submission loads it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_member({**record, "weight": 1.0}, f"fold {record['fold']}", device)


def predict_views(member: Member, image: np.ndarray, views: int = len(VIEWS)) -> np.ndarray:
    """Return the class probabilities of an image (H, W, 5) in the first views, (views, 4, H, W) float16."""
    return predict_passes(member, image, range(views))


def predict_passes(member: Member, image: np.ndarray, views: Iterable[int]) -> np.ndarray:
    """Return the class probabilities of an image (H, W, 5) in these of VIEWS, (n, 4, H, W) float16."""
    device = next(iter(member.network.state_dict().values())).device
    passes = tuple(Pass(0, number) for number in views)
    model = Model((member,), passes, (0.0,) * len(CLASS_NAMES), Postprocess(), math.inf, device)
    maps = [ensemble_probabilities(model, image, (view,)).probs for view in passes]
    return np.stack(maps).astype(np.float16)


def predict_diagonals(member: Member, image: np.ndarray) -> np.ndarray:
    """Return the probabilities of an image (H, W, 5) mirrored along each diagonal, (2, 4, H, W) float16.

    With VIEWS these are all eight ways to mirror and turn a square. Rows and columns swapped is the one; that
    turned by half is the other.
    """
    return predict_passes(member, image.swapaxes(0, 1), (0, HALF_TURN)).swapaxes(2, 3)


def scaled_for(member: Member, record: Mapping, image: np.ndarray) -> Member:
    """Return a fold's member with the normalisation of `image` that the fold was trained with."""
    scaling = record.get("scaling", "statistics")  # records of older runs say nothing
    return member._replace(normalization=tile_normalization(image, scaling, record["normalization"]))


def usable_views(record: Mapping) -> int:
    """Return in how many of solution.VIEWS a fold's network can be asked: 1 where it needs north above."""
    return record.get("views", len(VIEWS))


def in_every_view(passes: np.ndarray) -> np.ndarray:
    """Return (6, 4, H, W): the passes, or a single one six times, so that further views bring nothing."""
    return passes if len(passes) == len(VIEWS) else np.repeat(passes[:1], len(VIEWS), axis=0)


def mean_of_views(passes: np.ndarray) -> np.ndarray:
    """Return the mean of (views, 4, H, W) over the views, (4, H, W) float16."""
    return passes.mean(axis=0, dtype=np.float32).astype(np.float16)


def predict_run(run_dir: Path, store: TileStore) -> None:
    """Write `passes/` and `oof/` of a run for every held-out tile of its finished folds.

    A tile whose files are newer than its fold's checkpoint is not predicted again.
    """

    def predict(member: Member, record: Mapping, image: np.ndarray) -> tuple[np.ndarray, ...]:
        passes = in_every_view(predict_views(member, image, usable_views(record)))
        return mean_of_views(passes), passes

    _write_held_out(Path(run_dir), store, (OOF_FOLDER, PASSES_FOLDER), predict)


def predict_run_diagonally(run_dir: Path, store: TileStore) -> None:
    """Write `diagonals/` of a run, what `predict_diagonals` returns, as `predict_run` writes `passes/`."""

    def predict(member: Member, record: Mapping, image: np.ndarray) -> tuple[np.ndarray, ...]:
        return (predict_diagonals(member, image),)

    _write_held_out(Path(run_dir), store, (DIAGONALS_FOLDER,), predict)


def _write_held_out(
    run_dir: Path,
    store: TileStore,
    folders: Sequence[str],
    predict: Callable[[Member, Mapping, np.ndarray], tuple[np.ndarray, ...]],
) -> None:
    """Write what `predict` returns of every tile, an array into each of `folders`, by the network that never
    saw the tile.

    The last folder is written last: a tile whose file there is newer than the network is left alone.
    """
    for folder in folders:
        (run_dir / folder).mkdir(exist_ok=True)
    prepare_torch(usable_cores())
    records = read_folds(run_dir)
    with tqdm(total=sum(len(record["val_tiles"]) for record in records), unit="tile", file=sys.stderr) as bar:
        for record in records:
            checkpoint = fold_folder(run_dir, record["fold"]) / FOLD_FILE
            tiles = record["val_tiles"]
            todo = [
                tile for tile in tiles if not is_fresh(_tile_file(run_dir, folders[-1], tile), checkpoint)
            ]
            bar.update(len(tiles) - len(todo))
            if not todo:
                continue
            member = as_member(record)
            for tile in todo:
                image = store.image(tile)
                arrays = predict(scaled_for(member, record, image), record, image)
                for folder, array in zip(folders, arrays):
                    write_array(_tile_file(run_dir, folder, tile), array)
                bar.update()


def _tile_file(run_dir: Path, folder: str, tile: str) -> Path:
    return run_dir / folder / f"{tile}.npy"


def load_passes(run_dir: Path, tile: str) -> np.ndarray:
    """Return a tile's probabilities in each view, (6, 4, H, W) float16.

    Raises:
        RunError: they have not been predicted.
    """
    path = _tile_file(Path(run_dir), PASSES_FOLDER, tile)
    if not path.is_file():
        raise RunError(
            f"{path}: not predicted yet; finish all folds, then `python -m train evaluate --run {run_dir}`"
        )
    return np.load(path)
