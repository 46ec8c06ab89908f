"""Per-pixel gradient boosting on local statistics of the bands: what a U-Net has to beat on the same folds.

Two questions in a row, as the labels allow: is a pixel glacier of either kind (all tiles answer), and is a
glacier pixel covered by debris (only tiles with phase-2 labels answer)? A third splits lakes from the rest if
any label shows a lake. The products of their probabilities are the four classes.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence

import cv2
import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from prep.store import TileStore
from solution import BANDS, valid_mask
from train.metrics import DEBRIS, GLACIER, GLACIER_CODES, LAKE, N_CLASSES, OTHER, REST_CODES
from train.report import OOF_FOLDER, RUN_FILE, score_run

WINDOWS = (3, 9, 17, 33, 65)  # px, sides of the windows of local statistics: 90 m to 2 km
GREEN, SWIR, THERMAL = ([band.landsat for band in BANDS].index(name) for name in ("B3", "B6", "B10"))
PIXELS_PER_TILE = 10_000  # drawn for each question, so that every tile weighs about the same
PREDICTED_AT_ONCE = 8192  # pixels
MIN_REFLECTANCE = 0.01  # sum of two bands below which their ratio is noise
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


Answer = Callable[[np.ndarray], np.ndarray]  # features (N, F) -> probability of yes (N,)

IS_GLACIER = Question("glacier of either kind", REST_CODES, GLACIER_CODES)
IS_DEBRIS = Question("debris among glacier", (GLACIER,), (DEBRIS,))
IS_LAKE = Question("lake among the rest", (OTHER,), (LAKE,))
QUESTIONS = (IS_GLACIER, IS_DEBRIS, IS_LAKE)


def local_statistics(band: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the values in a square window around each pixel.

    Args:
        band: (H, W) float32, NaN where there is no value.
        window: odd side of the square in pixels; at the edges only its part inside the array counts.

    Returns:
        Two (H, W) float32 arrays in the band's unit, over the values that are there; NaN where there is none.
    """
    present = ~np.isnan(band)
    # Squares of centred values stay small: the difference of squares below does not cancel.
    centre = band[present].mean(dtype=np.float64) if present.any() else 0.0
    values = np.where(present, band - centre, 0.0).astype(np.float64)
    count = _box_sum(present, window)
    count[count < 0.5] = np.nan  # running sums may leave a residue where there is nothing
    mean = _box_sum(values, window) / count
    variance = _box_sum(values**2, window) / count - mean**2
    return (mean + centre).astype(np.float32), np.sqrt(np.maximum(variance, 0.0)).astype(np.float32)


def pixel_features(image: np.ndarray) -> np.ndarray:
    """Return the features of every pixel of a tile.

    Args:
        image: (H, W, 5), reflectance and kelvin, NaN where nodata.

    Returns:
        (H, W, F) float32: the bands, NDSI, temperature minus the tile's median, and for each window of
        `WINDOWS` the share of valid pixels (masked cloud and shadow are a clue to what is beside them) and
        each band's mean, standard deviation and difference from the mean. NaN where there is no value; the
        trees take it as it is.
    """
    bands = [image[..., index] for index in range(len(BANDS))]
    planes = [*bands, _ndsi(image), bands[THERMAL] - _median(bands[THERMAL])]
    for window in WINDOWS:
        planes.append(_valid_share(image, window))
        for band in bands:
            mean, deviation = local_statistics(band, window)
            planes.extend((mean, deviation, band - mean))
    return np.stack(planes, axis=-1).astype(np.float32, copy=False)


def draw_examples(image: np.ndarray, mask: np.ndarray, seed: Sequence[int]) -> dict[Question, Examples]:
    """Draw up to `PIXELS_PER_TILE` pixels of a tile for each question, evenly among those that answer it.

    Args:
        image: (H, W, 5), physical units, NaN where nodata.
        mask: (H, W) label codes.
        seed: of the draw; the same seed draws the same pixels.
    """
    rng = np.random.default_rng(seed)
    features = pixel_features(image).reshape(mask.size, -1)
    codes = mask.ravel()
    examples = {}
    for question in QUESTIONS:
        answering = np.flatnonzero(np.isin(codes, question.no + question.yes))
        drawn = rng.choice(answering, min(PIXELS_PER_TILE, answering.size), replace=False)
        examples[question] = Examples(features[drawn], np.isin(codes[drawn], question.yes))
    return examples


def fit_answer(examples: Sequence[Examples], seed: int) -> Answer:
    """Return a function from features (N, F) to the probability of yes (N,), fitted to examples of tiles.

    With fewer than `MIN_EXAMPLES` of either answer it is the share of yes among them, and 0 without any: a
    training side that shows no certain debris calls all glacier clean, one that shows no lake predicts none.
    """
    features = np.concatenate([part.features for part in examples])
    answers = np.concatenate([part.answers for part in examples])
    if min(answers.sum(), (~answers).sum()) < MIN_EXAMPLES:
        share = float(answers.mean()) if answers.size else 0.0
        return lambda pixels: np.full(len(pixels), share)
    model = HistGradientBoostingClassifier(**BOOSTING, early_stopping=False, random_state=seed)
    model.fit(features, answers)
    return lambda pixels: _predict_blocks(model, pixels)


def predict_tile(image: np.ndarray, answers: Mapping[Question, Answer]) -> np.ndarray:
    """Return the class probabilities of a tile, (4, H, W) float16; nodata is other with certainty.

    Args:
        image: (H, W, 5), physical units, NaN where nodata.
        answers: what `fit_answer` returned for each question.
    """
    valid = valid_mask(image)
    probabilities = np.zeros((N_CLASSES, *valid.shape), dtype=np.float16)
    probabilities[OTHER, ~valid] = 1.0
    if valid.any():
        pixels = pixel_features(image)[valid]  # (N, F)
        yes = {question: answer(pixels) for question, answer in answers.items()}
        glacier, debris, lake = yes[IS_GLACIER], yes[IS_DEBRIS], yes[IS_LAKE]
        probabilities[GLACIER, valid] = glacier * (1 - debris)
        probabilities[DEBRIS, valid] = glacier * debris
        probabilities[LAKE, valid] = (1 - glacier) * lake
        probabilities[OTHER, valid] = (1 - glacier) * (1 - lake)
    return probabilities


def run_baseline(
    store_folder: str | os.PathLike, scheme: str, run_dir: str | os.PathLike, seed: int = 0, threads: int = 2
) -> dict:
    """Predict every tile of a store by models trained on the other folds, score that, and return the scores.

    Writes `run_dir`/oof/<tile_id>.npy ((4, H, W) float16 probabilities), run.json and scores.json; results of
    an earlier run there are replaced.

    Args:
        store_folder: tile store, e.g. data/competition.
        scheme: fold scheme of the store, "stratified" or "spatial".
        run_dir: folder for the results, made where missing.
        seed: of the drawn pixels and of the trees.
        threads: CPU threads of scikit-learn and OpenCV.

    Raises:
        prep.store.StoreError: the store is incomplete, or has no such scheme.
    """
    store, run_dir = TileStore(store_folder), Path(run_dir)
    fold_of = store.fold_of(scheme)
    _empty_folder(run_dir / OOF_FOLDER)
    (run_dir / RUN_FILE).write_text(json.dumps({"model": "baseline", "scheme": scheme, "seed": seed}) + "\n")
    with limited_threads(threads):
        examples = _draw_store(store, seed)
        for fold in sorted(set(fold_of.values())):
            training = [examples[tile_id] for tile_id in store.tile_ids if fold_of[tile_id] != fold]
            answers = {
                question: fit_answer([tile[question] for tile in training], seed) for question in QUESTIONS
            }
            for tile_id in [tile_id for tile_id in store.tile_ids if fold_of[tile_id] == fold]:
                np.save(run_dir / OOF_FOLDER / f"{tile_id}.npy", predict_tile(store.image(tile_id), answers))
            print(f"baseline, {scheme} fold {fold}: trained on {len(training)} tiles", flush=True)
    return score_run(run_dir, store)


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


def _predict_blocks(model: HistGradientBoostingClassifier, pixels: np.ndarray) -> np.ndarray:
    """Return the probability of yes, in blocks that stay in cache while every tree walks them."""
    blocks = [pixels[start : start + PREDICTED_AT_ONCE] for start in range(0, len(pixels), PREDICTED_AT_ONCE)]
    return np.concatenate([model.predict_proba(block)[:, 1] for block in blocks])


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


def _box_sum(values: np.ndarray, window: int) -> np.ndarray:
    """Sum the values in the part of a square window that lies inside the array."""
    values = values.astype(np.float64, copy=False)
    size = (window, window)
    return cv2.boxFilter(values, cv2.CV_64F, size, normalize=False, borderType=cv2.BORDER_CONSTANT)


def _valid_share(image: np.ndarray, window: int) -> np.ndarray:
    valid = valid_mask(image)
    return (_box_sum(valid, window) / _box_sum(np.ones_like(valid), window)).astype(np.float32)


def _ndsi(image: np.ndarray) -> np.ndarray:
    """Return the normalised difference snow index; NaN where the bands add up to nothing (deep shadow)."""
    green, swir = image[..., GREEN], image[..., SWIR]
    total = green + swir
    return np.divide(green - swir, total, out=np.full_like(total, np.nan), where=total > MIN_REFLECTANCE)


def _median(band: np.ndarray) -> float:
    values = band[~np.isnan(band)]
    return float(np.median(values)) if values.size else 0.0
