"""The files of a run: what lies where in its folder, what a fold is, and what a finished fold's record holds."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Collection, Mapping, Union

import torch

from prep.store import TileStore, name_some
from solution import KitError, read_model_file

# A network's fold: the number of the fold of tiles that it never saw, or ALL where it saw every tile.
Fold = Union[int, str]
ALL = "all"

# In a run's folder lie a folder for each member of its ensemble, in that one for each fold, `fold_folder`.
FOLD_FILE = "fold.pt"  # the finished fold: weights, scores, tiles, config
FOLD_FORMAT = "glacier-kit-fold/2"
RESUME_FILE = "last.ckpt"  # of a fold that is not finished
CONFIG_FILE = "config.yaml"
HISTORY_FILE = "history.csv"  # a row an epoch

VIEWS_FOLDER = "views"  # of a member: <tile_id>.npy, (views, H, W) float16 logits of the extent
KIND_FOLDER = "kind"  # of a run: folds of the network of the kind, and <tile_id>.npy, (H, W) float16 logits
OOF_FOLDER = "oof"  # of a run: <tile_id>.npy, (4, H, W) float16 class probabilities, out of fold
RUN_FILE = "run.json"  # of a run: {"scheme": name of the fold scheme, ...}
SCORES_FILE = "scores.json"


class RunError(KitError):
    """A run folder does not fit what was asked for; the message says what differs and what to do."""


def name_of(fold: Fold) -> str:
    """Return what a fold is called in what is printed."""
    return "all tiles" if fold == ALL else f"fold {fold}"


def parse_folds(text: str) -> list[Fold]:
    """Return the folds that text such as "0,1,all" names; RunError for other text."""
    parts = text.split(",")
    wrong = [part for part in parts if part != ALL and not part.isdecimal()]
    if wrong:
        raise RunError(f"--folds: found {wrong[0]!r}, expected numbers of folds or {ALL!r}, e.g. 0,1,{ALL}")
    return [ALL if part == ALL else int(part) for part in parts]


def fold_folder(run_dir: str | os.PathLike, fold: Fold) -> Path:
    """Return the folder of a fold in a member's folder."""
    return Path(run_dir) / f"fold{fold}"


def files_of_folds(run_dir: str | os.PathLike, name: str) -> list[Path]:
    """Return the files of this name in the folders of all folds of a member, sorted by path."""
    return sorted(Path(run_dir).glob(f"fold*/{name}"))


def describe_seen(weights: Path, tiles: Collection[str]) -> str:
    """Return what to know of a score of these weights' masks on some tiles, "" where they saw none of them."""
    known = read_model_file(weights)["provenance"].get("tiles", [])
    seen = sorted(set(known) & set(tiles))
    return (
        f"{weights} was trained on {len(seen)} of these {len(tiles)} tiles, by their ids: {name_some(seen)}. Of masks "
        "that it made the score there says how well it remembers, not how well it finds glaciers elsewhere; for that "
        "see the out-of-fold scores on its card"
        if seen
        else ""
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that the weights depend on."""
    modules = ("torch", "lightning", "segmentation_models_pytorch", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in modules}}


def is_fresh(path: Path, checkpoint: Path) -> bool:
    """Return whether a prediction is there and was written after the checkpoint that made it."""
    return path.is_file() and path.stat().st_mtime >= checkpoint.stat().st_mtime


def read_fold(path: Path) -> dict[str, Any]:
    """Return the record of a finished fold: plain containers and the weights in `state_dict`.

    Raises RunError where it is missing, damaged or of another format.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such fold; train it with `python -m train fit` (or `make train-all`)")
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated kinds for damaged files
        raise RunError(f"{path}: cannot be read ({error}); remove it and train it again") from error
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if found != FOLD_FORMAT:
        raise RunError(f"{path}: format {found!r}, expected {FOLD_FORMAT!r}; remove it and train it again")
    return record


def require_same_tiles(record: Mapping[str, Any], store: TileStore, folder: Path) -> None:
    """Raise RunError where a fold in `folder` was trained on other tiles than the store holds now."""
    found, now = record.get("fingerprint"), store.fingerprint
    if found != now:
        raise RunError(
            f"{folder}: was trained on data with fingerprint {found}, and {store.folder} has {now} now. "
            f"Name another run with --run, or remove {folder} to train it again."
        )


def read_record(path: Path) -> dict[str, Any]:
    """Return what `read_fold` does, without the weights."""
    return {key: value for key, value in read_fold(path).items() if key != "state_dict"}


def read_folds(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the records of all finished folds of a member that hold tiles out, in the order of their numbers.

    Raises RunError where there are none.
    """
    records = [read_fold(path) for path in files_of_folds(run_dir, FOLD_FILE)]
    records = [record for record in records if record["fold"] != ALL]
    if not records:
        raise RunError(
            f"{run_dir}: no finished folds; expected some. The same arguments after `python -m train fit` train them"
        )
    return sorted(records, key=lambda record: record["fold"])
