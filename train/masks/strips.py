"""A scene's class probabilities in strips from north to south: those of solution.py, in little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Optional

import numpy as np

from prep.files import write_whole
from solution import (
    CLASS_NAMES,
    LARGEST_TILE,
    WINDOW,
    Model,
    blend_weights,
    clean_classes,
    decide_classes,
    most_workers,
    predict_window,
    side_by_side,
    valid_mask,
    window_starts,
)
from train.masks.scene import Scene, read_rows, saturated

NODATA = 255  # of stored classes and probabilities
STEPS = 250  # a stored probability is a number of steps of 1 / 250
LARGEST_PICTURE = 1024  # px, longer side of a scene's picture


class Strip(NamedTuple):
    """Some rows of a scene, W px wide.

    top: the first row.
    probabilities: (4, h, W) uint8, in STEPS; NODATA where nothing was measured or asked for.
    classes: (h, W) uint8 class indices as decided, before clean-up; NODATA likewise.
    picture: every n-th pixel of the bands, (h', W', 5) float32 physical units.
    rest: (4, k, W) float32, sums of blended probabilities of the rows below, to which further windows add.
    saturated: pixels that are saturated in a reflective band.
    """

    top: int
    probabilities: np.ndarray
    classes: np.ndarray
    picture: np.ndarray
    rest: np.ndarray
    saturated: int

    @property
    def rows(self) -> slice:
        """Return its place in the scene."""
        return slice(self.top, self.top + len(self.classes))

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""

        def save(part: Path) -> None:
            with open(part, "wb") as stream:
                np.savez(stream, **self._asdict())

        write_whole(path, save)

    @staticmethod
    def read(path: Path) -> Strip:
        """Return a strip as written."""
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in Strip._fields}
        return Strip(**{**arrays, "top": int(arrays["top"]), "saturated": int(arrays["saturated"])})


def picture_step(scene: Scene) -> int:
    """Return n where a picture shows every n-th pixel."""
    return -(-max(scene.shape) // LARGEST_PICTURE)


def strip_edges(scene: Scene) -> list[int]:
    """Return the first rows of a scene's strips, one for each row of windows, and its height."""
    whole = max(scene.shape) <= LARGEST_TILE
    return [*([0] if whole else window_starts(scene.shape[0])), scene.shape[0]]


def window_columns(scene: Scene) -> list[slice]:
    """Return the columns of the windows in a row of windows."""
    width = scene.shape[1]
    if max(scene.shape) <= LARGEST_TILE:
        return [slice(0, width)]
    return [slice(left, left + WINDOW) for left in window_starts(width)]


def predict_strips(
    model: Optional[Model],
    scene: Scene,
    keep_clouds: bool = True,
    asked: Optional[np.ndarray] = None,
    folder: Optional[Path] = None,
    progress: Callable[[int], object] = lambda windows: None,
) -> Iterator[Strip]:
    """Yield the strips of a scene from north to south.

    Windows, passes, blending and their order are those of solution.predict_scene, and where a scene is small
    enough, those of its one window.

    Args:
        model: makes all its passes; None for strips without probabilities, all of class 0.
        scene: read by strips.
        keep_clouds: whether pixels under cloud are classified.
        asked: (H, W) bool, the area of interest; None for the whole scene.
        folder: where finished strips are kept, and found by a run that goes on; None to keep none.
        progress: called with a number of windows that are done.
    """
    edges = strip_edges(scene)
    rest = np.zeros((len(CLASS_NAMES), 0, scene.shape[1]), np.float32)
    for number, (top, bottom) in enumerate(zip(edges, edges[1:])):
        kept = folder / f"{number:03d}.npz" if folder else None
        if kept and kept.is_file():
            strip = Strip.read(kept)
            progress(len(window_columns(scene)))
        else:
            strip = _predict(model, scene, (top, bottom), rest, keep_clouds, asked, progress)
            if kept:
                strip.write(kept)
        rest = strip.rest
        yield strip


def _predict(
    model: Optional[Model],
    scene: Scene,
    edges: tuple[int, int],
    above: np.ndarray,
    keep_clouds: bool,
    asked: Optional[np.ndarray],
    progress: Callable[[int], object],
) -> Strip:
    """Return a strip from its row of windows and the sums of the rows of windows above."""
    (top, bottom), height = edges, scene.shape[0]
    whole = max(scene.shape) <= LARGEST_TILE
    image = read_rows(scene, top, height if whole else min(top + WINDOW, height), keep_clouds)
    wanted = np.ones(image.shape[:2], bool) if asked is None else asked[top : top + len(image)]
    sums = np.zeros((len(CLASS_NAMES), *image.shape[:2]), np.float32)
    sums[:, : above.shape[1]] = above
    columns = [part for part in window_columns(scene) if model and wanted[:, part].any()]
    progress(len(window_columns(scene)) - len(columns))
    found: Iterable[np.ndarray] = ()
    if model:
        found = side_by_side(lambda part: predict_window(model, image[:, part])[0], columns, most_workers(model))
    for part, probs in zip(columns, found):
        sums[:, :, part] += probs if whole else probs * blend_weights(*probs.shape[1:])
        progress(1)
    mine, step = bottom - top, picture_step(scene)
    valid = valid_mask(image[:mine]) & wanted[:mine]
    done = sums[:, :mine]
    share = done / np.maximum(done.sum(axis=0), 1e-9)
    return Strip(
        top,
        np.where(valid, np.rint(share * STEPS), NODATA).astype(np.uint8),
        np.where(valid, decide_classes(done), np.uint8(NODATA)),
        image[-top % step : mine : step, ::step].copy(),
        sums[:, mine:].copy(),
        saturated(image[:mine]),
    )


def finish_classes(model: Model, decided: np.ndarray) -> np.ndarray:
    """Return a scene's classes (H, W) uint8 after clean-up, NODATA kept, of classes as decided."""
    valid, steps = decided != NODATA, model.postprocess
    classes = clean_classes(decided, valid, steps.min_speck, steps.min_hole)
    classes[~valid] = NODATA
    return classes


def class_confidence(probabilities: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the stored probability (h, W) uint8 of the classes of some rows; NODATA where they have none."""
    chosen = np.where(classes == NODATA, 0, classes)[None].astype(np.intp)
    return np.take_along_axis(probabilities, chosen, axis=0)[0]
