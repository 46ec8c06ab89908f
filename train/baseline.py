"""Per-pixel gradient boosting on local statistics of the bands: what a U-Net has to beat on the same folds.

Two questions in a row, as the labels allow: is a pixel glacier of either kind (all tiles answer), and is a
glacier pixel covered by debris (only tiles with phase-2 labels answer)? A third splits lakes from the rest if
any label shows a lake. The products of their probabilities are the four classes.

What is fitted here becomes a `solution.BoostedTrees`, plain arrays that are evaluated without scikit-learn,
and a `fold.pt` like that of any network: the run can be evaluated, mixed with others, packed and submitted.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import cv2
import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from prep.files import write_json
from prep.store import TileStore
from solution import BANDS, CLASS_NAMES, PIXEL_FEATURES, BoostedTrees, median_temperature, pixel_features
from train.config import Config, DataConfig, ModelConfig, TrainConfig
from train.objective import DEBRIS, GLACIER, GLACIER_CODES, LAKE, OTHER, REST_CODES
from train.pixel_runs import fold_record, predict_held_out, score_and_save
from train.run import FOLD_FILE, OOF_FOLDER, RUN_FILE, files_of_folds

PIXELS_PER_TILE = 10_000  # drawn for each question, so that every tile weighs about the same
NEVER = 1e-15  # probability of what the training side does not show
LARGEST = float(np.finfo(np.float32).max)  # in the place of infinity, which no stored weight may be
MIN_EXAMPLES = 50  # fewer pixels of a class on the training side are no basis for a classifier
# Chosen on the folds it is scored on, which favours the baseline a little. For the glacier question the share
# of valid pixels is worth 0.012 of MCC, and 400 trees at this rate 0.008 over 200 at 0.06; windows of 129 px,
# twice the pixels and ranks within the tile are worth nothing.
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

    name: str
    no: tuple[int, ...]
    yes: tuple[int, ...]


class Examples(NamedTuple):
    """Pixels that answer a question: features (N, F) float32, answers (N,) bool."""

    features: np.ndarray
    answers: np.ndarray


class Answer(NamedTuple):
    """How a question is answered: the log-odds of yes before any tree, and each tree's nodes as scikit-learn
    has them (records with feature_idx, num_threshold, missing_go_to_left, left, right, is_leaf, value)."""

    start: float
    trees: tuple[np.ndarray, ...]


IS_GLACIER = Question("glacier of either kind", REST_CODES, GLACIER_CODES)
IS_DEBRIS = Question("debris among glacier", (GLACIER,), (DEBRIS,))
IS_LAKE = Question("lake among the rest", (OTHER,), (LAKE,))
QUESTIONS = (IS_GLACIER, IS_DEBRIS, IS_LAKE)


def draw_examples(image: np.ndarray, mask: np.ndarray, seed: Sequence[int]) -> dict[Question, Examples]:
    """Draw up to `PIXELS_PER_TILE` pixels of a tile for each question, evenly among those that answer it.

    Args:
        image: (H, W, 5), physical units, NaN where nodata.
        mask: (H, W) label codes.
        seed: of the draw; the same seed draws the same pixels.
    """
    rng = np.random.default_rng(seed)
    features = np.stack(
        [plane.ravel() for plane in pixel_features(image, median_temperature(image))], axis=-1
    )
    codes = mask.ravel()
    examples = {}
    for question in QUESTIONS:
        answering = np.flatnonzero(np.isin(codes, question.no + question.yes))
        drawn = rng.choice(answering, min(PIXELS_PER_TILE, answering.size), replace=False)
        examples[question] = Examples(features[drawn], np.isin(codes[drawn], question.yes))
    return examples


def fit_answer(examples: Sequence[Examples], seed: int) -> Answer:
    """Return trees that say how probable yes is, fitted to examples of tiles.

    With fewer than `MIN_EXAMPLES` of either answer it is the share of yes among them, and 0 without any: a
    training side that shows no certain debris calls all glacier clean, one that shows no lake predicts none.
    """
    features = np.concatenate([part.features for part in examples])
    answers = np.concatenate([part.answers for part in examples])
    if min(answers.sum(), (~answers).sum()) < MIN_EXAMPLES:
        share = np.clip(answers.mean() if answers.size else 0.0, NEVER, 1 - NEVER)
        return Answer(math.log(share / (1 - share)), ())
    model = HistGradientBoostingClassifier(**BOOSTING, early_stopping=False, random_state=seed)
    return as_answer(model.fit(features, answers))


def as_answer(model: HistGradientBoostingClassifier) -> Answer:
    """Return what a fitted classifier of two classes and numbers only consists of."""
    trees = tuple(predictor.nodes for (predictor,) in model._predictors)
    return Answer(float(model._baseline_prediction.item()), trees)


def as_network(answers: Sequence[Answer]) -> BoostedTrees:
    """Return the trees of all questions, in the order of `QUESTIONS`, as `solution.py` evaluates them."""
    network = BoostedTrees(len(BANDS), len(CLASS_NAMES), None, [len(answer.trees) for answer in answers])
    thresholds = [sorted_thresholds(answer.trees) for answer in answers]
    trees = [
        tree_arrays(nodes, limits) for answer, limits in zip(answers, thresholds) for nodes in answer.trees
    ]
    state = {"start": [answer.start for answer in answers], "thresholds": thresholds}
    for name in ("feature", "threshold", "missing_left", "left_leaves", "value"):
        state[name] = [tree[name] for tree in trees]
    for name, buffer in network.state_dict().items():  # shares its memory with the network
        if buffer.numel():
            buffer.copy_(torch.from_numpy(np.array(state[name])))
    return network


def sorted_thresholds(trees: Sequence[np.ndarray]) -> np.ndarray:
    """Return each feature's different thresholds in ascending order, (F, 255) float64, then `LARGEST`."""
    thresholds = np.full((PIXEL_FEATURES, BoostedTrees.MISSING), LARGEST)
    if trees:
        nodes = np.concatenate(trees)
        tests = nodes[nodes["is_leaf"] == 0]
        for feature in np.unique(tests["feature_idx"]):
            found = np.unique(_finite(tests["num_threshold"][tests["feature_idx"] == feature]))
            thresholds[feature, : len(found)] = found
    return thresholds


def _finite(thresholds: np.ndarray) -> np.ndarray:
    """Return thresholds without infinity, by which scikit-learn parts missing values from all others."""
    return np.minimum(thresholds, LARGEST)


def tree_arrays(nodes: np.ndarray, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Return a tree's rows of the buffers of `BoostedTrees`; its tests are in any order, its leaves from left
    to right.

    Args:
        nodes: as scikit-learn has them.
        thresholds: what `sorted_thresholds` returned for the question.
    """
    below = leaves_below(nodes)
    tests, leaves = nodes[nodes["is_leaf"] == 0], np.flatnonzero(nodes["is_leaf"])
    limits = zip(tests["feature_idx"], _finite(tests["num_threshold"]))
    value = np.zeros(BoostedTrees.LEAVES)
    value[: len(leaves)] = nodes["value"][sorted(leaves.tolist(), key=below.__getitem__)]
    row = {
        "feature": tests["feature_idx"],
        "threshold": np.array([np.searchsorted(thresholds[feature], limit) for feature, limit in limits]),
        "missing_left": tests["missing_go_to_left"],
        "left_leaves": np.array([below[left] for left in tests["left"]]),
    }
    unused = BoostedTrees.LEAVES - 1 - len(tests)
    return {
        "value": value,
        **{name: np.pad(array, (0, unused)).astype(np.int64) for name, array in row.items()},
    }


def leaves_below(nodes: np.ndarray) -> dict[int, int]:
    """Return which leaves lie below each node of a tree, as bits that count them from the left."""
    below: dict[int, int] = {}

    def visit(index: int, first: int) -> int:
        """Number the leaves below a node from `first` on, and return the number after them."""
        node = nodes[index]
        after = first + 1 if node["is_leaf"] else visit(node["right"], visit(node["left"], first))
        below[index] = 2**after - 2**first
        return after

    visit(0, 0)
    return below


def run_baseline(
    store_folder: str | os.PathLike, scheme: str, run_dir: str | os.PathLike, seed: int = 0, threads: int = 2
) -> dict:
    """Predict every tile of a store by models trained on the other folds, score that, and return the scores.

    Writes `run_dir`/fold<n>/fold.pt, oof/<tile_id>.npy ((4, H, W) float16 probabilities), run.json and
    scores.json; results of an earlier run there are replaced.

    Args:
        store_folder: tile store, e.g. data/competition.
        scheme: fold scheme of the store, "stratified" or "spatial".
        run_dir: folder for the results, made where missing.
        seed: of the drawn pixels and of the trees.
        threads: CPU threads of scikit-learn, PyTorch and OpenCV.

    Raises:
        prep.store.StoreError: the store is incomplete, or has no such scheme.
    """
    store, run_dir = TileStore(store_folder), Path(run_dir)
    fold_of = store.fold_of(scheme)
    _empty_folder(run_dir / OOF_FOLDER)
    for path in files_of_folds(run_dir, FOLD_FILE):
        path.unlink()
    write_json(run_dir / RUN_FILE, {"model": "baseline", "scheme": scheme, "seed": seed})
    records = []
    with limited_threads(threads):
        examples = _draw_store(store, seed)
        for fold in sorted(set(fold_of.values())):
            started = time.monotonic()
            training = [tile_id for tile_id in store.tile_ids if fold_of[tile_id] != fold]
            answers = [
                fit_answer([examples[tile_id][question] for tile_id in training], seed)
                for question in QUESTIONS
            ]
            network = as_network(answers)
            held_out = [tile_id for tile_id in store.tile_ids if fold_of[tile_id] == fold]
            config = as_config(store, scheme, network, seed)
            seconds = time.monotonic() - started
            records.append(fold_record(config, fold, network, training, held_out, seconds))
            predict_held_out(run_dir, records[-1], store)
            print(f"baseline, {scheme} fold {fold}: trained on {len(training)} tiles", flush=True)
    return score_and_save(run_dir, records, store)


def as_config(store: TileStore, scheme: str, network: BoostedTrees, seed: int) -> Config:
    """Return the config of a run of networks that names these trees and their folds."""
    return Config(
        data=DataConfig(store=str(store.folder), scheme=scheme),
        model=ModelConfig(name="BoostedTrees", args={"trees": list(network.trees)}),
        train=TrainConfig(epochs=1, seed=seed, keep="last"),  # no tile of the fold chose anything
    )


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Limit OpenMP (scikit-learn) and OpenCV to some CPU threads for the time of the block."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        cv2.setNumThreads(before)


def _empty_folder(folder: Path) -> None:
    """Make the folder, and remove predictions of an earlier run, which must not be taken for this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.npy"):
        path.unlink()


def _draw_store(store: TileStore, seed: int) -> dict[str, dict[Question, Examples]]:
    """Draw the examples of all tiles; those of a tile do not depend on the folds."""
    return {
        tile_id: draw_examples(store.image(tile_id), store.mask(tile_id), (seed, index))
        for index, tile_id in enumerate(store.tile_ids)
    }
