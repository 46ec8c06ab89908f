"""Distillation: one network, the student, learns the averaged answers of trained ones, besides the labels.

The teachers' mean probability of the extent is made once for each training tile and cut, turned and warped with
it as a sixth channel, which is split off before the network. As in Hinton et al. 2015 (arXiv 1503.02531), at
temperature 1.

The student of a fold learns from the teachers' networks of the same fold, which never saw the tiles that it is
scored on. One that trains on all tiles learns from networks of all tiles, else from those of the folds: each
tile is then answered by the networks that did not train on it, where there are any.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prep.files import write_array
from prep.store import TileStore
from prep.text import plural
from solution import BANDS, valid_mask
from train import kind
from train.augment import Tile
from train.commands import add_recipe_arguments
from train.config import Config, ConfigError, load_config
from train.data import FoldData, Tiles, open_fold
from train.fit import Method, first_normalization
from train.module import SegmentationModule
from train.predict import as_member, predict_views
from train.run import (
    ALL,
    FOLD_FILE,
    KIND_FOLDER,
    Fold,
    RunError,
    files_of_folds,
    fold_folder,
    name_of,
    parse_folds,
    read_fold,
    read_folds,
)
from train.side_by_side import fit_jobs, jobs_of

ANSWERS_FOLDER = "teachers"  # of a fold while it trains: <tile_id>.npy, (H, W) float16 probability, NaN nodata


def find_teachers(folders: Sequence[str], fold: Fold, held_out: Sequence[str]) -> list[dict]:
    """Return the records of the networks that teach the student of a fold, which is scored on `held_out`.

    Raises RunError where a network is missing, or was trained on a tile that is held out.
    """
    teachers = []
    for folder in [member for name in folders for member in _members_in(Path(name))]:
        path = fold_folder(folder, fold) / FOLD_FILE
        if fold == ALL and not path.is_file():
            teachers += read_folds(folder)
            continue
        record = read_fold(path)
        seen = sorted(set(record["train_tiles"]) & set(held_out))
        if seen:
            raise RunError(
                f"{path}: was trained on tile {seen[0]}, which the student's {name_of(fold)} holds out; "
                "expected a teacher of the same store and data.scheme"
            )
        teachers.append(record)
    return teachers


def _members_in(folder: Path) -> list[Path]:
    """Return a member's folder itself, or the folders of all members of a run."""
    if files_of_folds(folder, FOLD_FILE):
        return [folder]
    found = {path.parent.parent for path in folder.glob(f"*/fold*/{FOLD_FILE}")}
    members = sorted(path for path in found if path.name != KIND_FOLDER)
    if not members:
        raise RunError(f"{folder}: no finished folds in it; expected a teacher, a run of `python -m train fit`")
    return members


def write_answers(teachers: Sequence[dict], store: TileStore, tiles: Sequence[str], folder: Path) -> None:
    """Write what the teachers say of some tiles, the mean over networks and views, to `folder`/<tile>.npy."""
    folder.mkdir(parents=True, exist_ok=True)
    members = [(as_member(record), record) for record in teachers]
    for tile in tiles:
        asked = [one for one in members if tile not in one[1]["train_tiles"]] or members
        image = store.image(tile)
        views = [predict_views(member, image, record["views"]) for member, record in asked]
        means = [torch.from_numpy(logits).float().sigmoid().mean(dim=0) for logits in views]
        answer = np.where(valid_mask(image), torch.stack(means).mean(dim=0).numpy(), np.nan)
        write_array(folder / f"{tile}.npy", answer.astype(np.float16))


class TaughtTiles(Tiles):
    """Tiles whose last channel is the teachers' probability of the extent."""

    def __init__(self, answers: Path, store: TileStore, tile_ids: Sequence[str], normalization: dict) -> None:
        """Serve these tiles as `Tiles` does, with the answers in a folder."""
        super().__init__(store, tile_ids, normalization)
        self.answers = answers

    def _read_tile(self, tile_id: str) -> Tile:
        tile = super()._read_tile(tile_id)
        answer = np.load(self.answers / f"{tile_id}.npy").astype(np.float32)
        known = np.isfinite(answer).astype(np.float32)
        values = np.dstack([tile.values, np.nan_to_num(answer)])
        return tile._replace(values=values, weights=np.dstack([tile.weights, known]))


def open_taught(config: Config, fold: Fold, folder: Path) -> FoldData:
    """Return a fold's tiles with the teachers' answers, which are kept in its folder; `find_teachers` raises."""
    answers = folder / ANSWERS_FOLDER
    data = open_fold(config, fold, first_normalization(config), partial(TaughtTiles, answers))
    teachers = find_teachers(config.distil.teachers, fold, data.val_ids)
    print(f"{name_of(fold)}: taught by {plural(len(teachers), 'network')}", flush=True)
    write_answers(teachers, TileStore(config.data.store), data.train_ids, answers)
    return data


def teacher_loss(logits: Tensor, taught: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, 1, H, W) with probabilities (B, H, W), 0 where all are NaN."""
    known = ~taught.isnan()
    if not known.any():
        return logits.float().sum() * 0.0
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0][known].float(), taught[known].float())


class StudentModule(SegmentationModule):
    """Trains a network on answers and labels; it is validated on labels as any other."""

    def batch_loss(self, image: Tensor, codes: Tensor) -> Tensor:
        """Return share x the teachers' loss + (1 - share) x the labels'; an auxiliary head is not trained."""
        bands, taught = image[:, : len(BANDS)], image[:, len(BANDS)]
        logits, share = self(bands), self.config.distil.share
        return share * teacher_loss(logits, taught) + (1 - share) * self.loss(logits, codes)


def fit_students(config: Config, run_dir: Path, folds: Optional[Sequence[Fold]] = None) -> None:
    """Train the students of a recipe and its network of the kind, by default all that the recipe needs."""
    if not config.distil.teachers:
        raise ConfigError("distil.teachers is [], expected folders of runs: give --teacher runs/recipe")
    kind.fit_kind(config, run_dir / KIND_FOLDER, folds or kind.kind_folds(config))
    jobs = jobs_of(config, run_dir, folds)
    fit_jobs(jobs, 1, Method(open_taught, StudentModule))
    for path in run_dir.glob(f"*/fold*/{ANSWERS_FOLDER}/*.npy"):
        path.unlink()  # of no more use


def add_distil_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `distil`."""
    add_recipe_arguments(parser)
    parser.add_argument("--teacher", action="append", default=[], help="folder of a run; may be repeated")
    parser.add_argument("--folds", type=parse_folds, help="e.g. 0,1,all; default: what the recipe needs")


def run_distil(arguments: argparse.Namespace) -> int:
    """Train one network on the answers of others; `score` and `pack` then take its run as any other."""
    config = load_config(arguments.recipe, arguments.overrides)
    config.distil.teachers = arguments.teacher or config.distil.teachers
    fit_students(config, arguments.run, arguments.folds)
    return 0
