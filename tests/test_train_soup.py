"""Soups: averaged weights, BatchNorm's new statistics, which networks join, and runs of soups."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import TINY_ARCH, random_network
from torch import nn
from train_helpers import fit_smoke, make_store

from prep.store import TileStore
from train import soup
from train.__main__ import main
from train.data import ALL_TILES
from train.evaluate import read_folds
from train.fit import RunError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return TileStore(make_store(tmp_path_factory.mktemp("soup") / "store"))


@pytest.fixture(scope="module")
def runs(store: TileStore) -> list[Path]:
    """Return finished runs of two folds with two seeds."""
    root = store.folder.parent
    return [
        fit_smoke(store.folder, root / f"seed{seed}", f"train.seed={seed}", "train.epochs=1")
        for seed in (0, 1)
    ]


def test_an_average_is_the_mean_of_all_weights_and_keeps_counters() -> None:
    states = [random_network(seed=seed).state_dict() for seed in (0, 1, 2)]
    found = soup.average(states)
    for name, value in found.items():
        if value.is_floating_point():
            expected = sum(state[name].double() for state in states) / 3
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, states[0][name])


def test_statistics_are_the_means_over_batches_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.9), nn.Conv2d(3, 2, 1))
    network[1].running_mean.fill_(7.0)
    weights = {name: value.clone() for name, value in network.named_parameters()}
    batches = [torch.randn(4, 5, 8, 8) + number for number in range(3)]
    soup.estimate_batchnorm(network, batches)
    maps = [network[0](batch).detach() for batch in batches]
    mean = torch.stack([one.mean(dim=(0, 2, 3)) for one in maps]).mean(dim=0)
    var = torch.stack([one.var(dim=(0, 2, 3)) for one in maps]).mean(dim=0)
    torch.testing.assert_close(network[1].running_mean, mean)
    torch.testing.assert_close(network[1].running_var, var)
    assert network[1].momentum == 0.1
    assert not any(layer.training for layer in network.modules())
    assert all(torch.equal(value, weights[name]) for name, value in network.named_parameters())


def test_a_soup_of_equal_networks_is_that_network() -> None:
    state = random_network().state_dict()
    record = {"arch": TINY_ARCH, "state_dict": state}
    batches = [torch.randn(2, 5, 64, 64) for _ in range(2)]
    found = soup.stir([record, record], batches)
    for name, value in found.items():
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, state[name])
    assert soup.stir([record], batches).keys() == state.keys()


def test_networks_join_the_best_where_the_soup_gets_no_worse() -> None:
    worth = {(0,): 0.5, (1,): 0.7, (2,): 0.6, (1, 2): 0.65, (0, 1): 0.7, (0, 2): 0.9}
    assert soup.choose_greedily(3, lambda choice: worth[choice]) == (0, 1)
    assert soup.choose_greedily(1, lambda choice: 0.0) == (0,)


def test_a_fold_is_chosen_for_by_the_other_folds(runs: list[Path], store: TileStore) -> None:
    names = [str(run) for run in runs]
    by_run = [{record["fold"]: record for record in read_folds(run)} for run in runs]
    pots = [soup.Pot([records[fold] for records in by_run], names, store, 1) for fold in (0, 1)]
    for fold, other in ((0, 1), (1, 0)):
        worth = {choice: soup.score(pots[other].counts(choice)) for choice in ((0,), (1,), (0, 1))}
        best = max((0, 1), key=lambda number: worth[number,])
        expected = (0, 1) if worth[0, 1] >= worth[best,] else (best,)
        assert soup.choose_for(fold, pots) == expected
    assert soup.choose_for(0, pots[:1]) == (0, 1)  # nothing to choose by


def test_soups_are_a_run_like_any_other(runs: list[Path], store: TileStore, tmp_path: Path) -> None:
    command = ["soup", "--run", str(runs[0]), "--run", str(runs[1]), "--out", str(tmp_path / "soup")]
    assert main([*command, "--store", str(store.folder), "--batches", "2"]) == 0
    records = read_folds(tmp_path / "soup")
    for record, first in zip(records, read_folds(runs[0])):
        assert record["val_tiles"] == first["val_tiles"]
        assert set(record["soup"]["runs"]) <= set(map(str, runs))
        if len(record["soup"]["runs"]) == 1:
            (name,) = record["soup"]["runs"]
            own = read_folds(Path(name))[record["fold"]]["state_dict"]
            assert all(torch.equal(value, own[key]) for key, value in record["state_dict"].items())
    assert main(["evaluate", "--run", str(tmp_path / "soup"), "--store", str(store.folder)]) == 0
    assert main([*command, "--store", str(store.folder), "--batches", "1"]) == 0  # over an earlier one
    over_a_run = [*command[:-1], str(runs[0]), "--store", str(store.folder)]
    assert main(over_a_run) == 2


def test_an_average_of_folds_has_no_score(
    runs: list[Path], store: TileStore, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "all"
    command = ["soup", "--run", str(runs[0]), "--out", str(out), "--store", str(store.folder)]
    assert main([*command, "--batches", "2"]) == 0
    assert "no out-of-fold score" in capsys.readouterr().out
    (record,) = read_folds(out)
    assert (record["fold"], record["val_tiles"]) == (ALL_TILES, [])
    assert record["train_tiles"] == store.tile_ids
    assert np.isnan(record["val_mcc"])
    folds = read_folds(runs[0])
    for key in ("mean", "std"):
        expected = np.mean([fold["normalization"][key] for fold in folds], axis=0)
        np.testing.assert_allclose(record["normalization"][key], expected)


def test_networks_on_other_tiles_or_of_other_kinds_are_refused(runs: list[Path], store: TileStore) -> None:
    first, second = (read_folds(run)[0] for run in runs)
    soup.require_alike([first, second], ["a", "b"])
    with pytest.raises(RunError, match="b, fold 0: differs from a in train_tiles, val_tiles"):
        soup.require_alike([first, {**second, "train_tiles": [], "val_tiles": []}], ["a", "b"])
    with pytest.raises(RunError, match="differs from a in arch"):
        soup.require_alike([first, {**second, "arch": {"name": "FPN", "args": {}}}], ["a", "b"])
    with pytest.raises(RunError, match="expected two different runs"):
        soup.cook([runs[0], runs[0]], store, runs[0].parent / "out", 1)
