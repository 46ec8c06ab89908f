"""Out-of-fold predictions: each tile by the networks that never saw it, with the submission's own functions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Mapping

import numpy as np
import torch
from tqdm import tqdm

from prep.files import write_array, write_json
from prep.store import TileStore
from solution import (
    VIEWS,
    Member,
    class_probabilities,
    load_member,
    member_logits,
    prepare_torch,
    usable_cores,
)
from train import kind
from train.config import (
    Config,
    MemberConfig,
    PostprocessConfig,
    differing_keys,
    from_dict,
    members_of,
    to_dict,
)
from train.networks import network_class
from train.run import (
    FOLD_FILE,
    KIND_FOLDER,
    OOF_FOLDER,
    RUN_FILE,
    VIEWS_FOLDER,
    RunError,
    fold_folder,
    is_fresh,
    read_folds,
    require_same_tiles,
)


def as_member(record: Mapping) -> Member:
    """Return a fold's network as a member of an ensemble, loaded as the submission loads it."""
    network_class(record["arch"]["name"])  # of train/networks/: load_member knows it from here on
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_member({**record, "weight": 1.0}, f"fold {record['fold']}", device)


def predict_views(member: Member, image: np.ndarray, views: int) -> np.ndarray:
    """Return the logits of the extent of an image (H, W, 5) in the first of VIEWS, (views, H, W) float16."""
    device = next(iter(member.network.state_dict().values())).device
    maps = [member_logits(member, image, view, device) for view in VIEWS[:views]]
    return torch.stack(maps).numpy().astype(np.float16)


def predict_member(run_dir: Path, store: TileStore) -> None:
    """Write `views/` of a member for every held-out tile of its finished folds.

    A tile whose file is newer than its fold's checkpoint is not predicted again.
    """
    folder = Path(run_dir) / VIEWS_FOLDER
    prepare_torch(usable_cores())
    todo = []
    for record in read_folds(run_dir):
        checkpoint = fold_folder(run_dir, record["fold"]) / FOLD_FILE
        late = [t for t in record["val_tiles"] if not is_fresh(folder / f"{t}.npy", checkpoint)]
        todo += [(record, tile) for tile in late]
    folder.mkdir(exist_ok=True)
    member, loaded = None, None
    for record, tile in tqdm(todo, desc=f"predict {Path(run_dir).name}", unit="tile", file=sys.stderr):
        if loaded is not record:
            member, loaded = as_member(record), record
        assert member is not None
        write_array(folder / f"{tile}.npy", predict_views(member, store.image(tile), record["views"]))


def load_views(member_dir: Path, tile: str, views: int) -> torch.Tensor:
    """Return a tile's logits in the first views, (views, H, W) float32. RunError where they are missing."""
    path = Path(member_dir) / VIEWS_FOLDER / f"{tile}.npy"
    if not path.is_file():
        raise RunError(f"{path}: not predicted yet; train all folds, then `python -m train score`")
    return torch.from_numpy(np.load(path)[:views].astype(np.float32))


def extent_out_of_fold(run_dir: Path, tile: str, members: Mapping[str, MemberConfig]) -> torch.Tensor:
    """Return the ensemble's probability (H, W) of glacier of either kind, by networks that never saw the tile.

    As in `solution.extent_probability`: a mean over views, then a weighted mean over members.
    """
    weights = torch.tensor([member.weight for member in members.values()])
    maps = [load_views(run_dir / name, tile, member.views).sigmoid().mean(dim=0) for name, member in members.items()]
    return (torch.stack(maps) * weights[:, None, None]).sum(dim=0) / weights.sum()


def require_made_by(config: Config, store: TileStore, record: Mapping, folder: Path) -> None:
    """Raise RunError where a member's network was trained with other settings, or on other tiles than a store's."""
    used, fold = from_dict(record["config"], str(folder)), f"{folder}, fold {record['fold']}"
    used.distil.teachers = config.distil.teachers  # named by `distil --teacher`, not by the recipe
    if keys := differing_keys(config, used):
        raise RunError(
            f"{fold}: was trained with other settings than the recipe in {', '.join(keys)}; name the recipe of this "
            "run with --recipe, or another --run"
        )
    require_same_tiles(record, store, fold_folder(folder, record["fold"]))


def score_inputs(run_dir: Path, config: Config, store: TileStore) -> dict[str, int]:
    """Predict every held-out tile with every member and the kind; return the fold of each tile that all have."""
    run_dir = Path(run_dir)
    there = {path.parents[1].name for path in run_dir.glob(f"*/fold*/{FOLD_FILE}")} - {KIND_FOLDER}
    members = members_of(config)
    if more := ", ".join(sorted(there - members.keys())):
        raise RunError(f"{run_dir}: holds {more} too; name the recipe of this run with --recipe, or remove that folder")
    common: dict[str, int] = {}
    for number, (name, (_, settings)) in enumerate(members.items()):
        records = read_folds(run_dir / name)
        for record in records:
            require_made_by(settings, store, record, run_dir / name)
        predict_member(run_dir / name, store)
        of_member = {t: record["fold"] for record in records for t in record["val_tiles"]}
        common = {t: fold for t, fold in of_member.items() if number == 0 or common.get(t) == fold}
    for fold in sorted(set(common.values())):
        kind.read_kind(config, store, fold_folder(run_dir / KIND_FOLDER, fold) / FOLD_FILE)
    kind.predict_kind(run_dir / KIND_FOLDER, store, common)
    return common


def probabilities_out_of_fold(run_dir: Path, tile: str, extent: torch.Tensor, steps: PostprocessConfig) -> np.ndarray:
    """Return class probabilities (4, H, W) float32 of a tile: an extent (H, W) and the run's kind, each with its bias.

    As in `solution.predict_window`, before the CRF.
    """
    extent = extent.logit(eps=1e-6).add(steps.extent_bias).sigmoid()
    debris = kind.load_logits(run_dir / KIND_FOLDER, tile).add(steps.debris_bias).sigmoid()
    return class_probabilities(extent, debris)


def predict_run(run_dir: Path, config: Config, store: TileStore) -> dict[str, int]:
    """Write `oof/` of a run, the ensemble's class probabilities of every held-out tile; return their folds."""
    run_dir = Path(run_dir)
    fold_of = score_inputs(run_dir, config, store)
    members = {name: member for name, (member, _) in members_of(config).items()}
    (run_dir / OOF_FOLDER).mkdir(exist_ok=True)
    for path in (run_dir / OOF_FOLDER).glob("*.npy"):
        path.unlink()  # of another ensemble, where a member was added
    for tile in fold_of:
        extent = extent_out_of_fold(run_dir, tile, members)
        probs = probabilities_out_of_fold(run_dir, tile, extent, config.postprocess)
        write_array(run_dir / OOF_FOLDER / f"{tile}.npy", probs.astype(np.float16))
    about = {"model": "ensemble", "scheme": config.data.scheme, "seed": config.train.seed, "fold_of": fold_of}
    about |= {group: to_dict(config)[group] for group in ("members", "kind", "postprocess")}
    write_json(run_dir / RUN_FILE, about)
    return fold_of
