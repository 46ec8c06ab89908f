"""Per-pixel gradient boosting on local statistics of the bands: what a U-Net has to beat on the same folds.

Two questions in a row, as the labels allow: is a pixel glacier of either kind (all tiles answer), and is a glacier
pixel covered by debris (tiles whose labels tell it answer)? Lakes are never predicted, as by the networks.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from prep.files import write_array, write_json
from prep.stats import compute
from prep.store import TileStore
from solution import class_probabilities, prepare_torch, usable_cores
from train.commands import print_scores
from train.config import DataConfig
from train.data import folds_of_scheme, split_tiles
from train.kind import features_of
from train.objective import DEBRIS, GLACIER, GLACIER_CODES, REST_CODES
from train.report.scores import score_run
from train.run import OOF_FOLDER, RUN_FILE

PIXELS_PER_TILE = 10_000  # drawn for each question, so that every tile weighs about the same
MIN_EXAMPLES = 50  # fewer pixels of an answer on the training side are no basis for a classifier
LEAST = 1e-15  # probability, of what the training side does not show
# Chosen on the folds that are scored, with other statistics, which favours the baseline a little: for the extent,
# 400 trees at this rate are worth 0.008 of MCC over 200 at 0.06.
BOOSTING = {
    "max_iter": 400,
    "learning_rate": 0.1,
    "max_leaf_nodes": 31,
    "min_samples_leaf": 200,
    "l2_regularization": 10.0,
    "max_features": 0.3,
}


class Question(NamedTuple):
    """A yes-or-no question to a pixel: the label codes that answer it with no and with yes."""

    no: tuple[int, ...]
    yes: tuple[int, ...]


IS_GLACIER = Question(REST_CODES, GLACIER_CODES)
IS_DEBRIS = Question((GLACIER,), (DEBRIS,))  # given glacier
QUESTIONS = (IS_GLACIER, IS_DEBRIS)


class Examples(NamedTuple):
    """Pixels that answer a question: features (N, F) float32, answers (N,) bool."""

    features: np.ndarray
    answers: np.ndarray


def draw_examples(features: np.ndarray, codes: np.ndarray, question: Question, seed: Sequence[int]) -> Examples:
    """Draw up to `PIXELS_PER_TILE` pixels of a tile, evenly among those that answer a question.

    Args:
        features: (F, H, W).
        codes: (H, W) label codes.
        question: to the pixels.
        seed: the same seed draws the same pixels.
    """
    answering = np.flatnonzero(np.isin(codes, question.no + question.yes))
    drawn = np.random.default_rng(seed).choice(answering, min(PIXELS_PER_TILE, answering.size), replace=False)
    return Examples(features.reshape(len(features), -1)[:, drawn].T, np.isin(codes.ravel()[drawn], question.yes))


class Answer:
    """How probable yes is: boosted trees, or the share of yes where examples are few."""

    def __init__(self, parts: Sequence[Examples], seed: int) -> None:
        """Fit the examples of several tiles. Without any, the answer is no."""
        features = np.concatenate([part.features for part in parts])
        answers = np.concatenate([part.answers for part in parts])
        self.share = float(answers.mean()) if answers.size else 0.0
        self.trees = None
        if min(answers.sum(), (~answers).sum()) >= MIN_EXAMPLES:
            model = HistGradientBoostingClassifier(**BOOSTING, early_stopping=False, random_state=seed)
            self.trees = model.fit(features, answers)

    def logits(self, features: np.ndarray) -> torch.Tensor:
        """Return the logits of yes of (F, H, W) features, (H, W) float32."""
        shape = features.shape[1:]
        if self.trees is None:
            share = min(max(self.share, LEAST), 1 - LEAST)
            return torch.full(shape, math.log(share / (1 - share)))
        logits = self.trees.decision_function(features.reshape(len(features), -1).T)
        return torch.from_numpy(logits.reshape(shape)).float()


def predict_fold(store: TileStore, scheme: str, fold: int, folder: Path, seed: int) -> None:
    """Train on all other folds, and write (4, H, W) float16 probabilities of the fold's tiles to `folder`."""
    train_ids, held_out = split_tiles(store, scheme, fold)
    statistics = compute(store, train_ids)

    def features(tile: str) -> np.ndarray:
        return features_of(store.image(tile), statistics).numpy()

    examples: dict[Question, list[Examples]] = {question: [] for question in QUESTIONS}
    for number, tile in enumerate(train_ids):
        seen, codes = features(tile), store.mask(tile)
        for question, parts in examples.items():
            parts.append(draw_examples(seen, codes, question, (seed, fold, number)))
    glacier, debris = (Answer(examples[question], seed) for question in QUESTIONS)
    for tile in held_out:
        seen = features(tile)
        probs = class_probabilities(glacier.logits(seen).sigmoid(), debris.logits(seen).sigmoid())
        write_array(folder / f"{tile}.npy", probs.astype(np.float16))
    print(f"baseline, {scheme} fold {fold}: trained on {len(train_ids)} tiles", flush=True)


def fit_baseline(store: TileStore, scheme: str, run_dir: Path, seed: int, threads: int) -> dict:
    """Predict every tile by trees that never saw it, score that, and return the scores.

    Writes `run_dir`/oof/<tile_id>.npy, run.json and scores.json; those of an earlier run there are replaced.
    """
    folder = run_dir / OOF_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.npy"):
        path.unlink()  # not to be taken for this run's
    prepare_torch(threads)
    with threadpool_limits(threads):
        for fold in folds_of_scheme(store, scheme):
            predict_fold(store, scheme, fold, folder, seed)
    write_json(run_dir / RUN_FILE, {"model": "baseline", "scheme": scheme, "seed": seed})
    return score_run(run_dir, store)


def add_baseline_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `baseline`."""
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, e.g. runs/baseline")
    parser.add_argument("--store", type=Path, default=DataConfig.store, help="default: %(default)s")
    parser.add_argument("--scheme", default="spatial", help="fold scheme (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn pixels and the trees (default: 0)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: all cores")


def run_baseline(arguments: argparse.Namespace) -> int:
    """Predict each tile by gradient boosting on the pixels of the other folds, and score it."""
    store = TileStore(arguments.store)
    scores = fit_baseline(store, arguments.scheme, arguments.run, arguments.seed, arguments.threads)
    print_scores(arguments.run, scores)
    return 0
