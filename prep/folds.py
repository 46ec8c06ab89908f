"""Five folds of the tiles, two ways: balanced on class areas, and in contiguous blocks of the grid."""

from __future__ import annotations

from functools import lru_cache
from typing import Iterator, NamedTuple, Sequence

import numpy as np

from prep.store import TileRow
from solution import KitError

FOLDS = 5
KINDS_SHOWN = ("phase2", "partial")  # labels that tell clean ice from debris, all or in part
RESTARTS = 200  # of the stratified search: 0.1 s; the real tiles need 30 to come within 1e-5 of the best
CUT_ANGLES = np.deg2rad(np.arange(0, 180, 15))  # directions in which the spatial scheme cuts
KM2_PER_PIXEL = 0.0009  # 30 m x 30 m

# Areas that the stratified folds balance: every glacier pixel, whether or not its kind is known, and the two
# classes that only phase-2 labels show. Clean ice is the rest of the first and needs no column of its own.
BALANCED_AREAS = {
    "glacier of either kind": ("glacier", "debris", "glacier_or_debris"),
    "debris": ("debris",),
    "lake": ("lake",),
}


class FoldError(KitError):
    """The tiles cannot be divided; the message says how many there are and how many are needed."""


def make_folds(tiles: Sequence[TileRow], seed: int) -> dict:
    """Return the content of folds.json: {"stratified": {tile_id: fold}, "spatial": {...}, "seed": seed}.

    Both depend on the tiles and the seed alone, not on the order in which the tiles are given.
    """
    if len(tiles) < FOLDS:
        raise FoldError(f"{len(tiles)} labelled tiles cannot fill {FOLDS} folds; at least {FOLDS} are needed")
    tiles = sorted(tiles, key=lambda tile: tile.tile_id)
    return {"stratified": stratified(tiles, seed), "spatial": spatial(tiles), "seed": seed}


# --- stratified ---


def stratified(tiles: Sequence[TileRow], seed: int) -> dict[str, int]:
    """Return {tile_id: fold} with the areas of `BALANCED_AREAS` as even as a seeded search finds.

    Whole tiles only. Fold sizes differ by at most one, and so do the folds' numbers of tiles with phase-2
    labels, which are few and alone tell clean ice from debris. scikit-learn's StratifiedGroupKFold balances
    class counts, not areas, hence the search: random deals that keep both promises, each improved by swaps of
    two tiles with labels of the same phase until none helps.
    """
    areas = _relative_areas(tiles)
    phase2 = np.array([tile.labels in KINDS_SHOWN for tile in tiles])
    random = np.random.default_rng(seed)
    deals = [_improve(_deal(phase2, random), areas, phase2) for _ in range(RESTARTS)]
    best = min(deals, key=lambda folds: (round(_imbalance(folds, areas), 9), folds.tolist()))
    return {tile.tile_id: int(fold) for tile, fold in zip(tiles, best)}


def _relative_areas(tiles: Sequence[TileRow]) -> np.ndarray:
    """Return (tiles, areas): each tile's area over that of an even fold; 0 for a class that no tile has."""
    sums = [[sum(tile.counts[name] for name in names) for names in BALANCED_AREAS.values()] for tile in tiles]
    areas = np.array(sums, dtype=float)
    return areas * FOLDS / np.maximum(areas.sum(axis=0), 1)


def _deal(phase2: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Deal the tiles out to the folds in turn and in random order, the phase-2 tiles first."""
    folds = np.empty(len(phase2), dtype=int)
    order = random.permutation(FOLDS)
    shuffled = random.permutation(len(phase2))
    for turn, tile in enumerate(sorted(shuffled, key=lambda index: not phase2[index])):
        folds[tile] = order[turn % FOLDS]
    return folds


def _imbalance(folds: np.ndarray, areas: np.ndarray) -> float:
    """Return the sum over folds and classes of the squared relative deviation from an even share."""
    sums = np.stack([areas[folds == fold].sum(axis=0) for fold in range(FOLDS)])
    return float(((sums - areas.sum(axis=0) / FOLDS) ** 2).sum())


def _improve(folds: np.ndarray, areas: np.ndarray, phase2: np.ndarray) -> np.ndarray:
    """Swap, best first, pairs of tiles with labels of the same phase until no swap lowers the imbalance."""
    folds = folds.copy()
    while True:
        gain = _swap_gains(folds, areas)
        gain[phase2[:, None] != phase2[None, :]] = 0
        first, second = np.unravel_index(np.argmax(gain), gain.shape)
        if gain[first, second] < 1e-9:
            return folds
        folds[[first, second]] = folds[[second, first]]


def _swap_gains(folds: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Return (tiles, tiles): by how much swapping two tiles lowers the imbalance."""
    sums = np.stack([areas[folds == fold].sum(axis=0) for fold in range(FOLDS)])[folds]
    change = areas[None, :, :] - areas[:, None, :]  # what the first tile's fold would gain
    difference = sums[:, None, :] - sums[None, :, :]
    gain = -2 * (change * (change + difference)).sum(axis=2)
    gain[folds[:, None] == folds[None, :]] = 0
    return gain


# --- spatial ---


class Partition(NamedTuple):
    """A division of some tiles into blocks: sets of tile indices, and their scatter (squared tile widths)."""

    scatter: float
    blocks: tuple[frozenset, ...]


def spatial(tiles: Sequence[TileRow]) -> dict[str, int]:
    """Return {tile_id: fold} in compact blocks of the grid, sizes equal to within one tile.

    Straight cuts divide the tiles in two again and again; of all divisions by cuts in `CUT_ANGLES` the one
    with the least scatter around the blocks' centres is taken, so that few held-out tiles touch a training
    tile. Blocks made by straight cuts are contiguous: no tile of another fold lies between two of theirs.
    Nothing is random; folds are numbered from the grid's first corner. Where some tile id states no place in
    the grid, the tiles stand in a row, sorted by id (phase 2's img001 ... are the grid's tiles, sorted).
    """
    places = _places(tiles)
    blocks = sorted(_divide(places), key=lambda block: (places[sorted(block)].mean(axis=0).sum(), sorted(block)))
    fold_of = {tile: fold for fold, block in enumerate(blocks) for tile in block}
    return {tile.tile_id: fold_of[index] for index, tile in enumerate(tiles)}


def _places(tiles: Sequence[TileRow]) -> np.ndarray:
    """Return (tiles, 2): row and column of each tile, or its rank where some tile has no place."""
    if any(tile.row is None or tile.col is None for tile in tiles):
        return np.array([(0.0, rank) for rank in range(len(tiles))])
    return np.array([(tile.row, tile.col) for tile in tiles], dtype=float)


def _divide(places: np.ndarray) -> tuple[frozenset, ...]:
    """Return FOLDS blocks of tile indices with least scatter."""

    @lru_cache(maxsize=None)
    def best(block: frozenset, folds: int) -> Partition:
        if folds == 1:
            points = places[sorted(block)]
            return Partition(float(((points - points.mean(axis=0)) ** 2).sum()), (block,))
        options = (
            join(best(near, count), best(far, folds - count)) for near, far, count in _cuts(block, folds, places)
        )
        return min(options, key=lambda option: round(option.scatter, 9))

    def join(near: Partition, far: Partition) -> Partition:
        return Partition(near.scatter + far.scatter, near.blocks + far.blocks)

    return best(frozenset(range(len(places))), FOLDS).blocks


def _cuts(block: frozenset, folds: int, places: np.ndarray) -> Iterator[tuple[frozenset, frozenset, int]]:
    """Yield (near side, far side, folds on the near side) of the straight cuts that keep fold sizes equal."""
    tiles = np.array(sorted(block))
    smallest, larger = divmod(len(tiles), folds)
    seen = set()
    for angle in CUT_ANGLES:
        distance = np.round(places[tiles] @ (np.sin(angle), np.cos(angle)), 9)
        ordered = tiles[np.lexsort((tiles, distance))]
        for near_folds in {folds // 2, folds - folds // 2}:
            for near_larger in range(max(0, larger - (folds - near_folds)), min(near_folds, larger) + 1):
                size = smallest * near_folds + near_larger
                near = frozenset(ordered[:size].tolist())
                if (near, near_folds) not in seen:
                    seen.add((near, near_folds))
                    yield near, block - near, near_folds


# --- table ---


def format_table(scheme: str, fold_of: dict[str, int], tiles: Sequence[TileRow]) -> str:
    """Return a scheme as a text table: a fold's tiles, those with phase-2 labels, km2 of each code."""
    names = [name for name in tiles[0].counts if sum(tile.counts[name] for tile in tiles) > 0]
    head = f"{'fold':<6}{'tiles':>6}{'kinds':>8}" + "".join(f"{name:>{_width(name)}}" for name in names)
    lines = [f"{scheme} folds, km2 at 30 m a pixel", head]
    for fold in range(FOLDS):
        members = [tile for tile in tiles if fold_of[tile.tile_id] == fold]
        lines.append(_table_row(str(fold), members, names) + "  " + " ".join(tile.tile_id for tile in members))
    lines.append(_table_row("all", tiles, names))
    return "\n".join(lines)


def _table_row(head: str, tiles: Sequence[TileRow], names: Sequence[str]) -> str:
    phase2 = sum(tile.labels in KINDS_SHOWN for tile in tiles)
    areas = (sum(tile.counts[name] for tile in tiles) * KM2_PER_PIXEL for name in names)
    cells = "".join(f"{area:>{_width(name)}.1f}" for name, area in zip(names, areas))
    return f"{head:<6}{len(tiles):>6}{phase2:>8}{cells}"


def _width(name: str) -> int:
    return max(9, len(name) + 2)
