"""Scores of out-of-fold probabilities, whichever model wrote them.

A run's folder holds `oof/<tile_id>.npy`, (4, H, W) class probabilities of each tile by a model that never saw
it, and says which folds it used: in run.json, or in the config.yaml of its folds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Sequence

import numpy as np
from omegaconf import OmegaConf

from prep.files import write_json
from prep.store import TileStore, name_some
from solution import CLASS_NAMES, KitError, decide_classes
from train.config import NETWORK_GROUPS, flatten
from train.objective import N_CLASSES, TileCounts, code_names, count_tiles, pool, score_intervals, score_tiles
from train.run import CONFIG_FILE, OOF_FOLDER, RUN_FILE, SCORES_FILE


class ReportError(KitError):
    """A run cannot be scored; the message names the file, what was found and expected, and what to do."""


def score_run(run_dir: str | os.PathLike, store: TileStore) -> dict:
    """Score a run's out-of-fold probabilities, write `run_dir`/scores.json, and return what is in it.

    A run is scored on the folds that are predicted, while others may still be trained.

    Args:
        run_dir: folder with oof/<tile_id>.npy for every tile of a fold, of at least one fold.
        store: the tiles and labels that the run was trained on.

    Returns:
        {"scheme", "pooled": s, "intervals": {name: [value, low, high] or None}, "fold_mean", "folds": {fold:
        {"tiles", **s}}, "tiles": {tile_id: {"fold", "labels", "ignored", "confusion", **s}}, "classes",
        "codes", "confusion"}. s is what `objective.score_tiles` returns, intervals are those of
        `objective.score_intervals`, and confusion is (6, 4) counts of label code against predicted class, over
        valid pixels.

    Raises:
        ReportError: a tile is missing, is no array of probabilities, or the fold scheme is unknown.
    """
    scores = summarise(find_scheme(Path(run_dir)), count_run(run_dir, store))
    write_json(Path(run_dir) / SCORES_FILE, scores)
    return scores


def count_run(run_dir: str | os.PathLike, store: TileStore) -> list[TileCounts]:
    """Return the counts of a run's predicted tiles, in the order of the store; errors as of `score_run`."""
    run_dir = Path(run_dir)
    fold_of = store.fold_of(find_scheme(run_dir))
    there = {name for name in store.tile_ids if (run_dir / OOF_FOLDER / f"{name}.npy").is_file()}
    folds = {fold_of[name] for name in there}
    tile_ids = [name for name in store.tile_ids if fold_of[name] in folds]
    missing = [name for name in tile_ids if name not in there] if there else store.tile_ids
    if missing:
        raise ReportError(
            f"{run_dir / OOF_FOLDER}: no probabilities for {name_some(missing)}; expected all tiles of a fold. "
            f"Finish the folds that hold them out, then `python -m train score --run {run_dir}`."
        )
    return count_tiles(store, tile_ids, lambda tile: decide_classes(load_probabilities(run_dir, store, tile)), fold_of)


def find_scheme(run_dir: Path) -> str:
    """Return the name of the fold scheme of a run, from its run.json or the configs of its folds."""
    if (run_dir / RUN_FILE).is_file():
        return str(json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))["scheme"])
    schemes = {str(OmegaConf.load(path).data.scheme) for path in _configs(run_dir)}
    if not schemes:
        there = name_some(sorted(str(path) for path in run_dir.parent.glob("*/") if path != run_dir))
        raise ReportError(
            f"{run_dir}: holds no finished run; expected a folder that `python -m train fit` and then `score` wrote. "
            f"Beside it: {there or 'nothing'}"
        )
    if len(schemes) > 1:
        found = ", ".join(sorted(schemes))
        raise ReportError(
            f"{run_dir}: found folds of the schemes {found}; expected one. Train each into a folder of its own."
        )
    return schemes.pop()


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Return what a run was made with, by dotted keys: its run.json, and the config of each member's folds.

    Those of the folds of a member `wide` are "wide: optim.lr"; without members they are "optim.lr".
    """
    settings: dict[str, Any] = {}
    if (run_dir / RUN_FILE).is_file():
        settings = flatten(json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8")))
    for path in _configs(run_dir):
        member = path.parent.parent.relative_to(run_dir).as_posix()
        prefix = "" if member == "." else f"{member}: "
        flat = flatten(OmegaConf.to_container(OmegaConf.load(path)))
        own = {key: value for key, value in flat.items() if key.split(".")[0] in NETWORK_GROUPS}
        settings = {f"{prefix}{key}": value for key, value in own.items()} | settings
    return settings


def _configs(run_dir: Path) -> list[Path]:
    return sorted(run_dir.rglob(f"fold*/{CONFIG_FILE}"))


def load_probabilities(run_dir: Path, store: TileStore, tile_id: str) -> np.ndarray:
    """Return the out-of-fold class probabilities of a tile, (4, H, W) float32.

    Raises:
        ReportError: the file does not hold finite (4, H, W) numbers of the tile's size.
    """
    path = run_dir / OOF_FOLDER / f"{tile_id}.npy"
    probabilities = np.load(path)
    expected = (N_CLASSES, *store.mask(tile_id).shape)
    finite = bool(np.isfinite(probabilities).all())
    if probabilities.shape != expected or not finite:
        raise ReportError(
            f"{path}: found numbers of shape {probabilities.shape}, {'' if finite else 'not all '}finite; "
            f"expected finite probabilities of shape {expected}. Predict the run's tiles again from this store."
        )
    return probabilities.astype(np.float32)


def summarise(scheme: str, tiles: Sequence[TileCounts]) -> dict:
    """Return what `score_run` returns, from counts."""
    by_fold = {fold: [tile for tile in tiles if tile.fold == fold] for fold in sorted({tile.fold for tile in tiles})}
    folds = {
        str(fold): {"tiles": [tile.tile_id for tile in members], **score_tiles(members)}
        for fold, members in by_fold.items()
    }
    return {
        "scheme": scheme,
        "pooled": score_tiles(tiles),
        "intervals": {name: found and list(found) for name, found in score_intervals(tiles).items()},
        "fold_mean": {task: _fold_mean(list(folds.values()), task) for task in ("binary", "four_class")},
        "folds": folds,
        "tiles": {tile.tile_id: _tile_entry(tile) for tile in tiles},
        "classes": list(CLASS_NAMES),
        "codes": list(code_names()),
        "confusion": pool(tiles).tolist(),
    }


def _tile_entry(tile: TileCounts) -> dict:
    about = {"fold": tile.fold, "labels": tile.labels, "ignored": tile.ignored}
    return {**about, "confusion": tile.confusion.tolist(), **score_tiles([tile])}


def _fold_mean(folds: Sequence[dict], task: str) -> dict:
    """Return mean and sample standard deviation of the MCC over the folds that have one, valid pixels."""
    values = [fold["valid_pixels"][task]["mcc"] for fold in folds if fold["valid_pixels"][task] is not None]
    return {
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "folds": len(values),
    }
