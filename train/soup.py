"""Soups: one network whose weights are the average of several networks' of the same fold.

Networks are added one by one, the best first, where the average does not get worse (greedy soup: Wortsman et
al. 2022, arXiv 2203.05482); the statistics of BatchNorm, which no average gives, are estimated again on
training crops. Which runs join is chosen for each fold on the held-out tiles of the other folds, so a soup's
out-of-fold score is as honest as its ingredients'.

The average over the folds of a run has seen every tile. What it scores on them only shows whether averaging
has broken it; its honest score is that on tiles that none of the folds saw, of another store.
"""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prep.store import TileStore
from solution import build_network, decide_classes, prepare_torch, usable_cores
from train.calibrate import score
from train.config import from_dict, save_config
from train.data import ALL_TILES, open_fold
from train.evaluate import as_member, predict_views, read_folds, scaled_for, with_held_out
from train.files import CONFIG_FILE, FOLD_FILE, fold_folder, write_json, write_whole
from train.fit import RunError, arch_of
from train.metrics import TileCounts, count_tile, score_tiles
from train.text import markdown_table, mcc_text

SOUP_FILE = "soup.json"  # which runs each fold's soup is made of, and the scores
SAME = ("arch", "scheme", "scaling", "views", "train_tiles", "val_tiles")  # of what is averaged
BatchNorm = nn.modules.batchnorm._BatchNorm
Choice = tuple[int, ...]  # numbers of the ingredients


class Soup(NamedTuple):
    """A fold's soup: the runs in it, its score on the held-out tiles in one view, and each run's alone."""

    fold: int
    runs: tuple[str, ...]
    mcc: float
    alone: tuple[float, ...]


# --- Averages -----------------------------------------------------------------------------------------------


def average(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of some networks' weights; counters are those of the first."""
    return {
        name: torch.stack([state[name] for state in states]).mean(dim=0)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }


def estimate_batchnorm(network: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set BatchNorm's running statistics, in place, to their means over some batches (B, 5, H, W).

    All else is as in evaluation: no dropout.
    """
    network.eval()
    layers = [layer for layer in network.modules() if isinstance(layer, BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean of all batches
        layer.train()
    with torch.no_grad():
        for batch in batches if layers else ():
            network(batch)
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum
    network.eval()


def stir(records: Sequence[Mapping], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the averaged weights of some networks, with new statistics; of one network, its own."""
    if len(records) == 1:
        return dict(records[0]["state_dict"])
    network = build_network(records[0]["arch"])
    network.load_state_dict(average([record["state_dict"] for record in records]))
    estimate_batchnorm(network, batches)
    return {name: value.clone() for name, value in network.state_dict().items()}


def training_batches(record: Mapping, store: TileStore, fold: int, count: int) -> list[Tensor]:
    """Return `count` batches of training crops of a fold, drawn and changed as in the record's training."""
    config = from_dict(copy.deepcopy(dict(record["config"])), "config of the first run")
    config.data.store, config.data.workers = str(store.folder), 0
    loader = open_fold(config, fold, record["normalization"]).train_loader
    return [batch[0] for batch in islice(loader, count)]


def count_tiles(record: dict, store: TileStore, tiles: Sequence[str], fold: int) -> list[TileCounts]:
    """Return the counts of some tiles under a network in one view."""
    labels = store.labels
    member, counts = as_member(record), []
    for tile in tiles:
        image = store.image(tile)
        probs = predict_views(scaled_for(member, record, image), image, views=1)[0].astype(np.float32)
        counts.append(count_tile(tile, fold, labels[tile], store.mask(tile), decide_classes(probs)))
    return counts


# --- Choosing -----------------------------------------------------------------------------------------------


def choose_greedily(count: int, worth: Callable[[Choice], float]) -> Choice:
    """Return the ingredients: the best one, then each next best with which the soup is at least as good."""
    order = sorted(range(count), key=lambda number: -worth((number,)))
    chosen: Choice = (order[0],)
    best = worth(chosen)
    for number in order[1:]:
        together = tuple(sorted((*chosen, number)))
        found = worth(together)
        if found >= best:
            chosen, best = together, found
    return chosen


def require_alike(records: Sequence[Mapping], names: Sequence[str]) -> None:
    """Raise RunError where networks cannot be averaged: other kinds, other tiles, or nothing to average."""
    for record, name in zip(records[1:], names[1:]):
        differing = [key for key in SAME if record.get(key) != records[0].get(key)]
        if differing:
            raise RunError(
                f"{name}, fold {record['fold']}: differs from {names[0]} in {', '.join(differing)}, "
                "expected the same network on the same tiles; name runs that differ in seed, steps or losses"
            )
    if not any(True for _ in build_network(records[0]["arch"]).parameters()):
        raise RunError(f"{names[0]}: {records[0]['arch']['name']} has no weights that could be averaged")


class Pot:
    """The networks of a fold in several runs, and the scores of their soups on its held-out tiles."""

    def __init__(self, records: Sequence[dict], names: Sequence[str], store: TileStore, batches: int) -> None:
        """Take the fold's record of each run; `batches` is how many estimate BatchNorm's statistics."""
        require_alike(records, names)
        self.records = list(records)
        self.fold = records[0]["fold"]
        self.store = store
        self.batches = training_batches(records[0], store, self.fold, batches)
        self._counts: dict[Choice, list[TileCounts]] = {}

    def soup(self, choice: Choice) -> dict:
        """Return the record of a soup, without scores of its own."""
        chosen = [self.records[number] for number in choice]
        return {**chosen[0], "state_dict": stir(chosen, self.batches)}

    def counts(self, choice: Choice) -> list[TileCounts]:
        """Return the counts of the held-out tiles."""
        if choice not in self._counts:
            tiles = self.records[0]["val_tiles"]
            self._counts[choice] = count_tiles(self.soup(choice), self.store, tiles, self.fold)
        return self._counts[choice]


def choose_for(fold: int, pots: Sequence[Pot]) -> Choice:
    """Return which runs a fold's soup is made of, by the held-out tiles of the other folds.

    Where there is no other fold, all of them.
    """
    others = [pot for pot in pots if pot.fold != fold]
    count = len(pots[0].records)
    if not others:
        return tuple(range(count))
    return choose_greedily(count, lambda choice: score([t for pot in others for t in pot.counts(choice)]))


# --- Runs ---------------------------------------------------------------------------------------------------


def cook(run_dirs: Sequence[Path], store: TileStore, out: Path, batches: int) -> list[Soup]:
    """Write a run of soups into `out`, a fold.pt for each fold that all runs have finished.

    Raises:
        RunError: fewer than two runs, no common fold, or networks that cannot be averaged.
    """
    if len({Path(folder).resolve() for folder in run_dirs}) < 2:
        raise RunError(f"soup: found {', '.join(map(str, run_dirs))}, expected two different runs or more")
    prepare_torch(usable_cores())
    names = [str(folder) for folder in run_dirs]
    by_run = [
        {record["fold"]: record for record in with_held_out(read_folds(Path(folder)))} for folder in run_dirs
    ]
    folds = sorted(set.intersection(*(set(records) for records in by_run)))
    if not folds:
        raise RunError(f"soup: {', '.join(names)} have no finished fold in common; finish the same folds")
    pots = [Pot([records[fold] for records in by_run], names, store, batches) for fold in folds]
    soups = []
    for pot in pots:
        choice = choose_for(pot.fold, pots)
        chosen = tuple(names[number] for number in choice)
        alone = tuple(extent_mcc(pot.counts((number,))) for number in range(len(names)))
        soup = Soup(pot.fold, chosen, extent_mcc(pot.counts(choice)), alone)
        write_record(out, {**pot.soup(choice), **recorded(pot.counts(choice), chosen, batches)})
        soups.append(soup)
    write_json(Path(out) / SOUP_FILE, {"runs": names, "folds": [soup._asdict() for soup in soups]})
    return soups


def cook_folds(run_dir: Path, store: TileStore, out: Path, batches: int) -> tuple[float, list[float]]:
    """Write the average of a run's folds into `out` as one network that holds out no tile.

    Folds join where the score on all tiles, which are no unseen ones, does not fall.

    Returns:
        The binary MCC of the average on all tiles, and of each fold on them: all but one fold has seen each.

    Raises:
        RunError: there is but one fold, or networks that cannot be averaged.
    """
    prepare_torch(usable_cores())
    records = with_held_out(read_folds(run_dir))
    tiles = sorted({tile for record in records for tile in (*record["train_tiles"], *record["val_tiles"])})
    whole = [seen_by_all(record, records, tiles) for record in records]
    names = [f"{run_dir}/fold{record['fold']}" for record in records]
    if len(whole) < 2:
        raise RunError(f"soup: {run_dir} has one finished fold, expected two or more; finish the others")
    require_alike(whole, names)
    crops = training_batches(whole[0], store, ALL_TILES, batches)
    known: dict[Choice, list[TileCounts]] = {}

    def counts(choice: Choice) -> list[TileCounts]:
        if choice not in known:
            chosen = [whole[number] for number in choice]
            record = {**chosen[0], "state_dict": stir(chosen, crops)}
            # a single fold as it was trained, with its own normalisation
            record = records[choice[0]] if len(choice) == 1 else record
            known[choice] = count_tiles(record, store, tiles, ALL_TILES)
        return known[choice]

    choice = choose_greedily(len(whole), lambda choice: score(counts(choice)))
    chosen = [whole[number] for number in choice]
    scores = {"val_mcc": float("nan"), "val_mcc4": float("nan")}
    made_of = {"soup": {"runs": [names[number] for number in choice], "batches": batches}}
    write_record(out, {**chosen[0], "state_dict": stir(chosen, crops), **scores, **made_of})
    return extent_mcc(counts(choice)), [extent_mcc(counts((number,))) for number in range(len(whole))]


def seen_by_all(record: Mapping, records: Sequence[Mapping], tiles: Sequence[str]) -> dict:
    """Return a fold's record as one that has seen all tiles, with the mean of all folds' normalisation."""
    normalization = {
        key: np.mean([each["normalization"][key] for each in records], axis=0).tolist()
        for key in ("mean", "std")
    }
    seen = {"fold": ALL_TILES, "train_tiles": list(tiles), "val_tiles": []}
    return {**record, **seen, "normalization": normalization}


def recorded(counts: Sequence[TileCounts], runs: Sequence[str], batches: int) -> dict:
    """Return what a soup's record has of its own: scores in one view, and what it was made of."""
    scores = score_tiles(counts)["valid_pixels"]
    return {
        "val_mcc": scores["binary"]["mcc"],
        "val_mcc4": scores["four_class"]["mcc"] if scores["four_class"] else float("nan"),
        "soup": {"runs": list(runs), "batches": batches},
    }


def extent_mcc(counts: Sequence[TileCounts]) -> float:
    """Return the binary MCC of some tiles."""
    return score_tiles(counts)["valid_pixels"]["binary"]["mcc"]


def write_record(out: Path, record: dict, mark: str = "soup") -> None:
    """Write a fold.pt and its config into the run `out`; one with the same `mark`, a key, is replaced.

    Raises:
        RunError: the fold there was not made so.
    """
    folder = fold_folder(out, record["fold"])
    path = folder / FOLD_FILE
    if path.is_file() and mark not in torch.load(path, map_location="cpu", weights_only=True):
        raise RunError(f"{path}: is a trained network, no {mark}; name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    config = from_dict(copy.deepcopy(dict(record["config"])), "config of the first run")
    if arch_of(config) != record["arch"]:
        raise RunError(f"{path}: the config names {arch_of(config)}, the network is {record['arch']}")
    write_whole(folder / CONFIG_FILE, lambda part: save_config(config, part))
    write_whole(path, lambda part: torch.save(record, part))


def soup_table(soups: Sequence[Soup], names: Sequence[str]) -> str:
    """Return the binary MCC of each fold's soup and of its ingredients, in one view."""
    rows = [
        [str(soup.fold), ", ".join(soup.runs), mcc_text(soup.mcc), *map(mcc_text, soup.alone)]
        for soup in soups
    ]
    return markdown_table(["fold", "made of", "soup", *names], rows)
