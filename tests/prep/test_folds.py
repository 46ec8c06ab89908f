"""Folds: sizes, spread of phase-2 labels, balance, contiguity, determinism."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import linprog

from prep import folds
from prep.labels import CODE_NAMES
from prep.store import TileRow

ZERO = dict.fromkeys(CODE_NAMES.values(), 0)


def make_tile(place, labels="phase1", **counts) -> TileRow:
    """Return a tile at (row, col), or one named by a number where place is an int."""
    row, col = place if isinstance(place, tuple) else (None, None)
    tile_id = f"{row:02d}_{col:02d}" if isinstance(place, tuple) else f"{place:03d}"
    return TileRow(tile_id, f"{tile_id}.tif", row, col, labels, 1.0, {**ZERO, **counts})


def scatter_tiles(number: int, phase2: int, seed: int) -> list[TileRow]:
    """Return tiles at random places of a 10 x 10 grid with random class areas, some with phase-2 labels."""
    random = np.random.default_rng(seed)
    tiles = []
    for index, cell in enumerate(random.choice(100, number, replace=False)):
        ice, debris, lake = (int(area) for area in random.gamma(1, [60000, 5000, 300]))
        counts = {"glacier": ice, "debris": debris, "lake": lake} if index < phase2 else {"glacier_or_debris": ice}
        labels = "phase2" if index < phase2 else "phase1"
        tiles.append(make_tile((int(cell) // 10, int(cell) % 10), labels, other=100000, **counts))
    return tiles


def sizes_of(fold_of: dict[str, int]) -> list[int]:
    """Return the number of tiles in each fold."""
    counts = Counter(fold_of.values())
    assert set(counts) <= set(range(folds.FOLDS))
    return [counts[fold] for fold in range(folds.FOLDS)]


def area_spread(fold_of: dict[str, int], tiles: list[TileRow], names: tuple[str, ...]) -> float:
    """Return the standard deviation over folds of a class's area, relative to its mean."""
    areas = np.zeros(folds.FOLDS)
    for tile in tiles:
        areas[fold_of[tile.tile_id]] += sum(tile.counts[name] for name in names)
    return areas.std() / areas.mean()


def separable(first: np.ndarray, second: np.ndarray) -> bool:
    """Tell by linear programming whether a straight line parts two sets of points."""
    signed = np.concatenate([-np.c_[first, np.ones(len(first))], np.c_[second, np.ones(len(second))]])
    return linprog(np.zeros(3), A_ub=signed, b_ub=-np.ones(len(signed)), bounds=(None, None)).status == 0


def assert_contiguous(fold_of: dict[str, int], tiles: list[TileRow]) -> None:
    """Assert that straight lines part all folds: none reaches into or around another."""
    places = {f: [] for f in range(folds.FOLDS)}
    for tile in tiles:
        places[fold_of[tile.tile_id]].append((tile.row, tile.col))
    for first, second in combinations(places.values(), 2):
        assert separable(np.array(first), np.array(second))


@pytest.mark.parametrize(("number", "phase2"), [(5, 0), (18, 3), (23, 7), (25, 25)])
@pytest.mark.parametrize("scheme", ["stratified", "spatial"])
def test_every_tile_is_in_one_fold_and_sizes_are_equal_to_within_one(scheme, number, phase2):
    tiles = scatter_tiles(number, phase2, seed=number)
    fold_of = folds.make_folds(tiles, seed=0)[scheme]
    assert sorted(fold_of) == sorted(tile.tile_id for tile in tiles)
    assert max(sizes_of(fold_of)) - min(sizes_of(fold_of)) <= 1


@pytest.mark.parametrize("phase2", [1, 3, 5, 8])
def test_tiles_with_phase2_labels_are_spread_over_the_folds(phase2):
    tiles = scatter_tiles(18, phase2, seed=phase2)
    fold_of = folds.make_folds(tiles, seed=1)["stratified"]
    spread = Counter(fold_of[tile.tile_id] for tile in tiles if tile.labels == "phase2")
    assert max(spread.values()) == -(-phase2 // folds.FOLDS)
    assert len(spread) == min(phase2, folds.FOLDS)


def test_tiles_of_partial_labels_are_spread_with_those_of_phase_2():
    tiles = [t._replace(labels="partial") if n % 2 else t for n, t in enumerate(scatter_tiles(18, 5, seed=2))]
    fold_of = folds.make_folds(tiles, seed=0)["stratified"]
    shown = Counter(fold_of[tile.tile_id] for tile in tiles if tile.labels != "phase1")
    assert max(shown.values()) - min(shown.values()) <= 1 and len(shown) == 5


def test_stratified_folds_balance_areas_better_than_any_of_100_random_deals():
    tiles = sorted(scatter_tiles(25, 25, seed=4), key=lambda tile: tile.tile_id)
    areas = folds.BALANCED_AREAS.values()
    fold_of = folds.make_folds(tiles, seed=0)["stratified"]
    ours = sum(area_spread(fold_of, tiles, names) ** 2 for names in areas)
    for seed in range(100):
        dealt = np.random.default_rng(seed).permutation(np.arange(25) % folds.FOLDS)
        random_fold = {tile.tile_id: int(fold) for tile, fold in zip(tiles, dealt)}
        assert ours < sum(area_spread(random_fold, tiles, names) ** 2 for names in areas)


def test_phase1_glacier_area_counts_with_that_of_known_kind():
    tiles = [make_tile(n, "phase1", glacier_or_debris=100 * (n + 1)) for n in range(10)]
    fold_of = folds.make_folds(tiles, seed=0)["stratified"]
    assert area_spread(fold_of, tiles, ("glacier_or_debris",)) == 0  # 1+10, 2+9, ... is found


def test_swap_gains_are_the_changes_of_the_imbalance():
    random = np.random.default_rng(0)
    areas, assigned = random.random((12, 3)), random.permutation(np.arange(12) % folds.FOLDS)
    gains = folds._swap_gains(assigned, areas)
    for first, second in combinations(range(12), 2):
        swapped = assigned.copy()
        swapped[[first, second]] = swapped[[second, first]]
        expected = folds._imbalance(assigned, areas) - folds._imbalance(swapped, areas)
        assert gains[first, second] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_spatial_folds_are_contiguous(seed):
    tiles = scatter_tiles(18 + seed, 3, seed)
    assert_contiguous(folds.make_folds(tiles, seed=0)["spatial"], tiles)


def test_spatial_folds_of_a_strip_are_its_consecutive_parts():
    tiles = [make_tile((4, col)) for col in range(10)]
    fold_of = folds.make_folds(tiles, seed=0)["spatial"]
    assert [fold_of[tile.tile_id] for tile in tiles] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_tiles_without_a_place_are_cut_in_sorted_order():
    tiles = [make_tile(number) for number in range(1, 26)]
    fold_of = folds.make_folds(tiles, seed=0)["spatial"]
    assert [fold_of[tile.tile_id] for tile in tiles] == sorted(list(range(5)) * 5)


def test_folds_depend_on_the_seed_alone_and_not_on_the_order_of_tiles():
    tiles = scatter_tiles(18, 3, seed=0)
    assert folds.make_folds(tiles, seed=7) == folds.make_folds(tiles[::-1], seed=7)
    assert folds.make_folds(tiles, seed=7)["seed"] == 7


def test_fewer_tiles_than_folds_is_an_error_that_says_so():
    with pytest.raises(folds.FoldError, match="4 labelled tiles"):
        folds.make_folds(scatter_tiles(4, 1, seed=0), seed=0)


def test_the_table_adds_up_to_all_tiles():
    tiles = scatter_tiles(18, 3, seed=0)
    lines = folds.format_table("spatial", folds.make_folds(tiles, seed=0)["spatial"], tiles).splitlines()
    assert "other_or_lake" not in lines[1]
    columns = lines[1].split()
    rows = np.array([[float(cell) for cell in line.split()[1 : len(columns)]] for line in lines[2:]])
    assert np.allclose(rows[:5].sum(axis=0), rows[5], atol=0.3)
    assert rows[5, columns.index("other") - 1] == pytest.approx(18 * 100000 * 0.0009, abs=0.05)
