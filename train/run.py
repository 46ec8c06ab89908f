"""The files of a run: what lies where in its folder."""

from __future__ import annotations

import os
from pathlib import Path

# In the folder of a fold, `fold_folder`.
FOLD_FILE = "fold.pt"  # the finished fold: weights, scores, tiles, config
RESUME_FILE = "last.ckpt"  # of a fold that is not finished
CONFIG_FILE = "config.yaml"
HISTORY_FILE = "history.csv"  # a row an epoch

# In the folder of the run.
PASSES_FOLDER = "passes"  # <tile_id>.npy: (6, 4, H, W) float16, the probabilities of each view
DIAGONALS_FOLDER = "diagonals"  # <tile_id>.npy: (2, 4, H, W) float16, those mirrored along each diagonal
OOF_FOLDER = "oof"  # <tile_id>.npy: (4, H, W) float16, their mean
RUN_FILE = "run.json"  # {"scheme": name of the fold scheme, ...}
SCORES_FILE = "scores.json"


def fold_folder(run_dir: str | os.PathLike, fold: int) -> Path:
    """Return the folder of a fold in a run's folder."""
    return Path(run_dir) / f"fold{fold}"


def files_of_folds(run_dir: str | os.PathLike, name: str) -> list[Path]:
    """Return the files of this name in the folders of all folds of a run, sorted by path."""
    return sorted(Path(run_dir).glob(f"fold*/{name}"))


def is_fresh(path: Path, checkpoint: Path) -> bool:
    """Return whether a prediction is there and was written after the checkpoint that made it."""
    return path.is_file() and path.stat().st_mtime >= checkpoint.stat().st_mtime
