"""Runs of models of single pixels, which no Lightning trains: their folds, as `train.fit` writes its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from prep.files import write_array, write_whole
from prep.store import TileStore
from train.config import Config, to_dict
from train.data import UNCHANGED
from train.fit import FOLD_FORMAT, arch_of, versions
from train.predict import as_member, predict_views
from train.report.tables import score_run
from train.run import FOLD_FILE, OOF_FOLDER, fold_folder
from train.transfer import input_identity


def fold_record(
    config: Config, fold: int, network: nn.Module, train: Sequence[str], val: Sequence[str], seconds: float
) -> dict:
    """Return the content of a fold's `fold.pt` but for its scores.

    Args:
        config: what a run of `train.fit` would be configured by: names network, data and epochs.
        fold: its number.
        network: fitted, of bands in physical units.
        train: the tiles that it saw.
        val: the tiles that it never saw.
        seconds: that fitting took.
    """
    return {
        "format": FOLD_FORMAT,
        "arch": arch_of(config),
        **input_identity(),
        "epoch": config.train.epochs,
        "epochs": config.train.epochs,
        "fold": fold,
        "scheme": config.data.scheme,
        "scaling": config.data.scaling,
        "views": 1,
        "train_tiles": list(train),
        "val_tiles": list(val),
        "normalization": UNCHANGED,
        "seconds": seconds,
        "config": to_dict(config),
        "versions": versions(),
        "state_dict": dict(network.state_dict()),
    }


def predict_held_out(run_dir: Path, record: Mapping, store: TileStore) -> None:
    """Write the probabilities of the tiles that a fold never saw, (4, H, W) float16."""
    member = as_member(record)
    for tile in record["val_tiles"]:
        probs: np.ndarray = predict_views(member, store.image(tile), views=1)[0]
        write_array(run_dir / OOF_FOLDER / f"{tile}.npy", probs)


def score_and_save(run_dir: Path, records: Sequence[Mapping], store: TileStore) -> dict:
    """Score a predicted run, write each fold with its scores, and return what `score_run` does."""
    scores = score_run(run_dir, store)
    for record in records:
        save_fold(run_dir, {**record, **_mcc_of(scores["folds"].get(str(record["fold"])))})
    return scores


def save_fold(run_dir: Path, record: Mapping) -> None:
    """Write the record of a fold into its folder, made where missing."""
    folder = fold_folder(run_dir, record["fold"])
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FOLD_FILE, lambda path: torch.save(dict(record), path))


def _mcc_of(scores: Mapping | None) -> dict[str, float]:
    """Return a fold's MCC over valid pixels; NaN where labels give none, or no tile is held out."""
    valid = scores["valid_pixels"] if scores else {}
    names = {"val_mcc": "binary", "val_mcc4": "four_class"}
    return {name: valid[task]["mcc"] if valid.get(task) else math.nan for name, task in names.items()}
