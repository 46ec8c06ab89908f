"""Mixed ensembles: weights of runs, the order of passes, budgets, nested scores, and the packed model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import TINY_ARCH, random_network
from train_helpers import make_store

import solution
from prep.labels import GLACIER_OR_DEBRIS, IGNORE
from prep.store import TileStore
from train import mixture
from train.__main__ import main
from train.calibrate import score
from train.fit import FOLD_FORMAT, RunError
from train.mixture import Budget, Kind, Mix, MixedPass, Prediction, Scorer
from train.objective import count_tile
from train.pareto import open_runs
from train.run import FOLD_FILE

OTHER_ARCH = {
    "name": "CoarseUnet",
    "args": {**TINY_ARCH["args"], "factor": 2},
}
SIDE = 40


# --- Made-up predictions ------------------------------------------------------------------------------------


def certain_of(codes: np.ndarray, wrong: np.ndarray, sure: float) -> np.ndarray:
    """Return (4, H, W) probabilities: `sure` of other or glacier, the wrong one of the two where `wrong`."""
    classes = np.where(wrong, 1 - codes, codes)
    probs = np.zeros((4, *codes.shape), np.float32)
    for index in (0, 1):
        probs[index] = np.where(classes == index, sure, 1 - sure)
    return probs


def made_up(errors: list[list[np.ndarray]], sure: list[float]) -> list[Prediction]:
    """Return tiles on which run r errs in view v (of VIEW_ORDER) where errors[r][v] says."""
    tiles = []
    for number in range(4):
        codes = np.zeros((SIDE, SIDE), np.uint8)
        codes[:, number::2] = 1
        means = tuple(
            mixture.means_of_first(np.stack([certain_of(codes, wrong, p) for wrong in of_run]))
            for of_run, p in zip(errors, sure)
        )
        tiles.append(Prediction(str(number), number // 2, "phase2", codes, means))
    return tiles


def band(start: int, width: int) -> np.ndarray:
    """Return where rows `start` to `start` + `width` are."""
    rows = np.zeros((SIDE, SIDE), bool)
    rows[start : start + width] = True
    return rows


def kinds(*gmac: float, size: int = 1_000_000, folds: int = 2) -> list[Kind]:
    return [Kind(work, size, tuple(range(folds))) for work in gmac]


def test_mixes_average_the_first_views_and_then_the_runs() -> None:
    rng = np.random.default_rng(0)
    passes = [rng.dirichlet(np.ones(4), (6, 8, 9)).transpose(0, 3, 1, 2).astype(np.float32) for _ in range(2)]
    codes = rng.integers(0, 4, (8, 9)).astype(np.uint8)
    prediction = Prediction("a", 0, "phase2", codes, tuple(map(mixture.means_of_first, passes)))
    probs = 0.25 * passes[0][:2].mean(axis=0) + 0.75 * passes[1].mean(axis=0)
    expected = count_tile("a", 0, "phase2", codes, solution.decide_classes(probs))
    found = mixture.count_mix(prediction, Mix((0.25, 0.75), (2, 6)))
    assert np.abs(found.confusion - expected.confusion).sum() <= 2  # float16 may turn a tie


def test_runs_that_err_elsewhere_are_mixed_and_a_useless_one_is_left_out() -> None:
    everywhere = np.random.default_rng(1).random((SIDE, SIDE)) < 0.5
    errors = [[band(0, 8)] * 6, [band(20, 8)] * 6, [everywhere] * 6]
    scorer = Scorer(made_up(errors, [0.7, 0.8, 0.6]), jobs=1)
    weights = mixture.weigh(scorer, kinds(3, 3, 3), Budget())
    # where one errs the other has to outweigh it, which no pair of weights does for both runs
    assert weights[2] == 0 or scorer.score(Mix(weights, (6, 6, 6))) >= 0.99
    best = max(scorer.score(Mix(tuple(np.eye(3)[run]), (6, 6, 6))) for run in range(3))
    assert scorer.score(Mix(weights, (6, 6, 6))) >= best


def test_weights_are_as_good_as_the_best_of_a_grid() -> None:
    rng = np.random.default_rng(2)
    tiles = []
    for number in range(4):
        codes = rng.integers(0, 2, (SIDE, SIDE)).astype(np.uint8)
        means = []
        for noise in (0.9, 1.1, 1.6):
            odds = np.where(codes == 1, 1.0, -1.0) + rng.normal(0, noise, codes.shape)
            glacier = np.stack([1 / (1 + np.exp(-odds))] * 6)  # all views alike
            zeros = np.zeros_like(glacier)
            means.append(mixture.means_of_first(np.stack([1 - glacier, glacier, zeros, zeros], axis=1)))
        tiles.append(Prediction(str(number), number // 2, "phase2", codes, tuple(means)))
    scorer = Scorer(tiles, jobs=1)
    found = scorer.score(Mix(mixture.weigh(scorer, kinds(1, 1, 1), Budget()), (6, 6, 6)))
    grid = [(a / 10, b / 10, (10 - a - b) / 10) for a in range(11) for b in range(11 - a)]
    best = max(scorer.score(Mix(weights, (6, 6, 6))) for weights in grid)
    singles = [scorer.score(Mix(tuple(np.eye(3)[run]), (6, 6, 6))) for run in range(3)]
    assert found > max(singles) + 0.01
    assert found > best - 0.01


def test_the_next_pass_is_what_gains_most_for_its_work() -> None:
    # the second run heals the first's errors, at twenty times the work; the second view half of them
    errors = [[band(0, 12), band(6, 12), *[band(0, 0)] * 4], [band(30, 2)] * 6]
    scorer = Scorer(made_up(errors, [0.6, 0.9]), jobs=1)
    cheap = mixture.order_units(scorer, kinds(1, 1), Budget(), (0.5, 0.5))
    assert cheap[0] == (1, mixture.VIEW_ORDER[0])  # the better one, and both are cheap
    dear = mixture.order_units(scorer, kinds(1, 100), Budget(), (0.5, 0.5))
    assert dear[:2] == [(0, mixture.VIEW_ORDER[0]), (0, mixture.VIEW_ORDER[1])]
    assert sorted(cheap) == sorted(dear) == [(run, view) for run in (0, 1) for view in range(6)]


# --- Budgets ------------------------------------------------------------------------------------------------


def test_passes_that_do_not_fit_are_left_out_and_every_run_keeps_a_place() -> None:
    order = [(0, 0), (0, 4), (1, 0), (0, 3), (1, 4)]
    passes = mixture.spend(order, kinds(3, 10), Budget(gmac=25))
    assert passes[:4] == (MixedPass(0, 0, 0), MixedPass(0, 1, 0), MixedPass(0, 0, 4), MixedPass(0, 1, 4))
    assert passes[4:] == (MixedPass(1, 0, 0), MixedPass(0, 0, 3)) or passes[4:] == (MixedPass(1, 0, 0),)
    assert sum((3, 10)[one.run] for one in passes) <= 25
    small = mixture.spend(order, kinds(3, 3, size=1000), Budget(size=3000, gmac=100))
    assert {(one.run, one.fold) for one in small} == {(0, 0), (0, 1), (1, 0)}
    assert len(set(small)) == len(small)


def test_runs_that_cannot_fit_together_are_not_mixed() -> None:
    errors = [[band(0, 8)] * 6, [band(20, 4)] * 6]
    scorer = Scorer(made_up(errors, [0.7, 0.8]), jobs=1)
    plan = mixture.choose(scorer, kinds(5, 100), Budget(gmac=60))
    assert plan.mix.weights == (1.0, 0.0)
    assert plan.gmac <= 60 and {one.run for one in plan.passes} == {0}
    with pytest.raises(RunError, match="from 1.0 MB and 5.0 GMAC a pass"):
        mixture.choose(scorer, kinds(5, 100), Budget(gmac=4))


# --- Runs on disk -------------------------------------------------------------------------------------------


def write_run(folder: Path, store: TileStore, arch: dict, wrong: slice, sure: float, seed: int) -> Path:
    """Write an evaluated run of two folds that is `sure` of each label and errs in the columns `wrong`."""
    (folder / "passes").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"scheme": "stratified"}))
    fold_of = store.fold_of("stratified")
    for fold in (0, 1):
        held_out = [tile for tile in store.tile_ids if fold_of[tile] == fold]
        record = {
            "format": FOLD_FORMAT,
            "fold": fold,
            "scheme": "stratified",
            "arch": arch,
            "state_dict": random_network(arch, seed=seed + fold).state_dict(),
            "normalization": {"mean": [0.1 * seed] * 4 + [250.0], "std": [1.0] * 5},
            "val_tiles": held_out,
            "train_tiles": [tile for tile in store.tile_ids if fold_of[tile] != fold],
            "val_mcc": 0.5 + 0.1 * fold,
            "config": {
                "train": {"epochs": 1},
                "data": {"steps_per_epoch": 1, "batch_size": 1, "crop": 64},
                "model": {"init": None},
            },
        }
        (folder / f"fold{fold}").mkdir()
        torch.save(record, folder / f"fold{fold}" / FOLD_FILE)
        for tile in held_out:
            codes = store.mask(tile)
            classes = np.where(np.isin(codes, (1, GLACIER_OR_DEBRIS)), 1, np.where(codes == IGNORE, 0, codes))
            classes[:, wrong] = (classes[:, wrong] + 1) % 4
            probs = np.full((4, *codes.shape), (1 - sure) / 3, np.float16)
            np.put_along_axis(probs, classes[None].astype(np.int64), np.float16(sure), axis=0)
            np.save(folder / "passes" / f"{tile}.npy", np.stack([probs] * 6))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return TileStore(make_store(tmp_path_factory.mktemp("mixture") / "store"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, store: TileStore) -> list[Path]:
    """Return runs of two networks that err in different columns, and one that errs where the first does."""
    root = tmp_path_factory.mktemp("runs")
    return [
        write_run(root / "first", store, TINY_ARCH, np.s_[10:30], 0.5, seed=0),
        write_run(root / "second", store, OTHER_ARCH, np.s_[40:60], 0.6, seed=2),
        write_run(root / "third", store, TINY_ARCH, np.s_[10:34], 0.5, seed=4),
    ]


def pack(runs: list[Path], store: TileStore, out: Path, *more: str) -> dict:
    """Run the command and return the written mixture."""
    named = [part for run in runs for part in ("--run", str(run))]
    assert main(["pack", *named, "--store", str(store.folder), "--out", str(out), *more]) == 0
    return json.loads(out.with_name(f"{out.stem}_mixture.json").read_text())


def test_networks_of_different_kinds_are_packed_with_their_weights(
    runs: list[Path], store: TileStore, tmp_path: Path
) -> None:
    found = pack(runs[:2], store, tmp_path / "model.pth")
    model = solution.load_model(tmp_path / "model.pth")
    assert sum(found["weights"]) == pytest.approx(1, abs=1e-5)
    used = [run for run, weight in enumerate(found["weights"]) if weight]
    assert {run for run, _, _ in found["passes"]} == set(used)
    # the networks of a run weigh together what the run does
    shares = [0.0, 0.0]
    members = {one.member: run for (run, _, _), one in zip(found["passes"], model.passes)}
    for member, run in members.items():
        shares[run] += model.members[member].weight
    assert shares == pytest.approx(found["weights"], abs=1e-5)
    assert [view for _, _, view in found["passes"]] == [one.view for one in model.passes]
    card = (tmp_path / "model_card.md").read_text()
    assert "## The mixture" in card and "| first |" in card and "| second |" in card
    assert found["nested"] <= found["flattered"] + 1e-6


def test_a_number_of_networks_and_predictions_are_for_a_single_run_too(
    runs: list[Path], store: TileStore, tmp_path: Path
) -> None:
    pack(runs[:1], store, tmp_path / "model.pth", "--networks", "1", "--oof", str(tmp_path / "oof-run"))
    assert len(solution.load_model(tmp_path / "model.pth").members) == 1
    written = {path.stem for path in (tmp_path / "oof-run" / "oof").iterdir()}
    assert written == set(store.tile_ids)


def test_the_packed_model_answers_with_the_weighted_mean(
    runs: list[Path], store: TileStore, tmp_path: Path
) -> None:
    """Against networks that are run one by one, with their own normalisation."""
    plan = pack(runs[:2], store, tmp_path / "model.pth")
    model = solution.load_model(tmp_path / "model.pth")
    image, total = store.image("000"), np.zeros((4, 96, 96))
    for run, fold, view in plan["passes"]:
        record = torch.load(runs[run] / f"fold{fold}" / FOLD_FILE, weights_only=True)
        network = solution.build_network(record["arch"]).eval()
        network.load_state_dict(record["state_dict"])
        x = torch.from_numpy(solution.normalize(image, record["normalization"]))[None]
        networks = len({other for number, other, _ in plan["passes"] if number == run})
        own = sum(one[:2] == [run, fold] for one in plan["passes"])
        with torch.no_grad():
            probs = solution.forward_probabilities(network, x, solution.VIEWS[view])[0].numpy()
        total += plan["weights"][run] / networks / own * probs
    found = solution.ensemble_probabilities(model, image, model.passes).probs
    np.testing.assert_allclose(found, total, atol=1e-2)  # float16 weights


def test_nested_scores_use_the_mix_of_the_other_folds(runs: list[Path], store: TileStore) -> None:
    opened = open_runs(runs, store)
    fitted = mixture.fit_mixture(opened, kinds(1, 1, 1), store, Budget(), jobs=1)
    held_out = []
    for tile in store.tile_ids:
        fold = store.fold_of("stratified")[tile]
        mix = fitted.by_fold[fold]
        probs = sum(
            weight * np.load(run / "passes" / f"{tile}.npy")[0].astype(np.float32)  # all views are alike
            for weight, run in zip(mix.weights, runs)
        )
        labels = next(row.labels for row in store.tiles if row.tile_id == tile)
        held_out.append(count_tile(tile, fold, labels, store.mask(tile), solution.decide_classes(probs)))
    assert fitted.nested == pytest.approx(score(held_out), abs=2e-3)
    assert fitted.gain == pytest.approx(fitted.nested - max(fitted.singles), abs=1e-9)


def test_budgets_bound_the_packed_model(runs: list[Path], store: TileStore, tmp_path: Path) -> None:
    free = pack(runs, store, tmp_path / "free.pth")
    work = 0.4 * free["gmac"]
    bound = pack(runs, store, tmp_path / "bound.pth", "--max-gmac", f"{work:.4f}")
    assert bound["gmac"] <= work < free["gmac"]


def test_one_run_under_a_budget(runs: list[Path], store: TileStore, tmp_path: Path) -> None:
    found = pack(runs[:1], store, tmp_path / "model.pth", "--max-gmac", "100")
    assert found["weights"] == [1.0]
    assert found["gain"] == pytest.approx(0, abs=1e-9)


def test_an_order_of_a_single_run_is_none_for_several(
    runs: list[Path], store: TileStore, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    named = ["--run", str(runs[0]), "--run", str(runs[1]), "--passes", str(tmp_path / "passes.json")]
    assert main(["pack", *named, "--store", str(store.folder), "--out", str(tmp_path / "model.pth")]) == 2
    assert "find their own" in capsys.readouterr().err
