"""From a finished run to model.pth: passes, calibration, packing, and the command line."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from train_helpers import make_store

import solution
from prep.store import TileStore
from train import calibrate
from train import pack as package
from train.__main__ import main
from train.calibrate import Settings, StepResult, decide_step, nested_score, predict_with, score
from train.fit import RunError
from train.objective import TileCounts, count_tile
from train.predict import load_passes, predict_run, read_folds

CONFIG = Path(__file__).resolve().parents[2] / "train" / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (run folder, store folder) of a two-fold smoke run, fitted, evaluated, calibrated and packed."""
    root = tmp_path_factory.mktemp("pipeline")
    store = make_store(root / "store")
    run = root / "run"
    common = ["--store", str(store)]
    assert main(["fit", "--config", str(CONFIG), "--run", str(run), f"data.store={store}"]) == 0
    assert main(["evaluate", "--run", str(run), *common]) == 0
    files = ["--out", str(root / "calibration.json"), "--report", str(root / "postprocess.md")]
    assert main(["calibrate", str(run), *files, *common]) == 0
    calibration = ["--calibration", str(root / "calibration.json"), "--out", str(root / "model.pth")]
    assert main(["pack", "--run", str(run), *calibration]) == 0
    return run, store


def test_passes_are_the_submissions_own(finished: tuple[Path, Path]) -> None:
    run, folder = finished
    store = TileStore(folder)
    record = read_folds(run)[0]
    tile = record["val_tiles"][0]
    network = solution.build_network(record["arch"]).eval()
    network.load_state_dict(record["state_dict"])
    x = torch.from_numpy(solution.normalize(store.image(tile), record["normalization"]))[None]
    with torch.no_grad():
        plain = torch.softmax(network(x), dim=1)[0].numpy()
        mirrored = torch.softmax(network(x.flip(3)), dim=1).flip(3)[0].numpy()
    passes = load_passes(run, tile)
    assert passes.shape == (6, 4, 96, 96)
    np.testing.assert_allclose(passes[0], plain, atol=2e-3)
    np.testing.assert_allclose(passes[1], mirrored, atol=2e-3)


def test_every_tile_is_predicted_by_the_fold_that_never_saw_it(finished: tuple[Path, Path]) -> None:
    run, folder = finished
    records = read_folds(run)
    for record in records:
        assert not set(record["val_tiles"]) & set(record["train_tiles"])
    held_out = sorted(tile for record in records for tile in record["val_tiles"])
    assert held_out == TileStore(folder).tile_ids


def test_a_second_evaluation_predicts_nothing_again(finished: tuple[Path, Path]) -> None:
    run, folder = finished
    before = {path: path.stat().st_mtime_ns for path in (run / "passes").iterdir()}
    predict_run(run, TileStore(folder))
    assert before == {path: path.stat().st_mtime_ns for path in (run / "passes").iterdir()}


def test_a_run_without_folds_says_how_to_train_them(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="python -m train fit"):
        read_folds(tmp_path)


def test_packed_model_predicts_as_its_folds_do(finished: tuple[Path, Path]) -> None:
    run, folder = finished
    store = TileStore(folder)
    model = solution.load_model(run.parent / "model.pth")
    image = store.image("000")
    members = [read_folds(run)[fold] for fold in (0, 1)]
    total = np.zeros((4, 96, 96))
    for record in members:
        network = solution.build_network(record["arch"]).eval()
        network.load_state_dict(record["state_dict"])
        x = torch.from_numpy(solution.normalize(image, record["normalization"]))[None]
        with torch.no_grad():
            total += torch.softmax(network(x), dim=1)[0].numpy() / 2
    packed = solution.ensemble_probabilities(model, image, model.passes[:2]).probs
    np.testing.assert_allclose(packed, total, atol=5e-3)  # float16 weights


def test_packed_weights_are_half_and_their_statistics_are_not(finished: tuple[Path, Path]) -> None:
    run, _ = finished
    content = torch.load(run.parent / "model.pth", weights_only=True)
    state = content["members"][0]["state_dict"]
    kinds = {"running" if "running_" in name else "weights": t.dtype for name, t in state.items() if t.ndim}
    assert kinds == {"running": torch.float32, "weights": torch.float16}


def test_card_names_the_hash_of_the_file_and_its_scores(finished: tuple[Path, Path]) -> None:
    run, _ = finished
    card = (run.parent / "model_card.md").read_text()
    assert hashlib.sha256((run.parent / "model.pth").read_bytes()).hexdigest() in card
    pooled = json.loads((run / "scores.json").read_text())["pooled"]["valid_pixels"]["binary"]["mcc"]
    assert f"valid pixels | {pooled:.3f} |" in card


def test_too_large_a_model_is_refused_and_the_old_one_stays(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "MAX_BYTES", 1000)
    out = tmp_path / "model.pth"
    out.write_bytes(b"old")
    with pytest.raises(RunError, match="pack fewer folds"):
        package.pack(finished[0], None, out)
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_calibration_needs_all_folds(finished: tuple[Path, Path], tmp_path: Path) -> None:
    store = TileStore(make_store(tmp_path / "store", tiles=6, folds=3))
    with pytest.raises(RunError, match="folds are missing"):
        calibrate.calibrate([finished[0]], store, jobs=1)


def test_calibration_file_is_what_solution_reads(finished: tuple[Path, Path]) -> None:
    run, _ = finished
    stored = json.loads((run.parent / "calibration.json").read_text())
    model = solution.load_model(run.parent / "model.pth")
    assert model.postprocess == solution.Postprocess(**stored["postprocess"])
    assert list(model.class_bias) == stored["class_bias"]
    table = (run.parent / "postprocess.md").read_text()
    assert all(f"| {step} |" in table for step in calibrate.STEPS)


# --- Deciding a step --------------------------------------------------------------------------------------


def counts_of(tile: str, fold: int, right: bool) -> TileCounts:
    """Return the counts of a small phase-2 tile that is predicted right, or as one class too often."""
    codes = np.repeat(np.arange(3), 30).reshape(9, 10)
    predicted = codes if right else np.where(codes == 1, 0, codes)
    return count_tile(tile, fold, "phase2", codes, predicted)


def test_nested_score_uses_the_choice_of_the_other_folds() -> None:
    # option 0 is right on fold 0 only, option 1 on fold 1 only: each fold gets what suited the other one
    options = [
        [counts_of("a", 0, True), counts_of("b", 1, False)],
        [counts_of("a", 0, False), counts_of("b", 1, True)],
    ]
    both_wrong = [counts_of("a", 0, False), counts_of("b", 1, False)]
    assert nested_score(options) == pytest.approx(score(both_wrong))


@pytest.mark.parametrize(("second_run_gains", "kept"), [(True, True), (False, False)])
def test_a_step_must_gain_in_every_run(second_run_gains: bool, kept: bool) -> None:
    better = Settings(class_bias=(0.0, 0.5, 0.5, 0.0))
    bad = [counts_of("a", 0, False), counts_of("b", 1, False)]
    good = [counts_of("a", 0, True), counts_of("b", 1, True)]
    by_run = [[bad, good], [bad, good] if second_run_gains else [bad, bad]]
    settings, result = decide_step("bias", Settings(), [better], lambda options: by_run)
    assert isinstance(result, StepResult)
    assert result.kept is kept
    assert settings == (better if kept else Settings())


def test_settings_reach_the_classes() -> None:
    passes = np.full((6, 4, 20, 20), 0.2, np.float16)
    passes[:, 1] = 0.4
    passes[0, 2] = 0.6
    image = np.ones((20, 20, 5), np.float32)
    image[:5] = np.nan
    norm = {"mean": [0.0] * 5, "std": [1.0] * 5}
    one, six = Settings(), Settings(views=6)
    assert set(np.unique(predict_with(one, passes, image, norm))) == {0, 2}
    assert set(np.unique(predict_with(six, passes, image, norm)[5:])) == {1}
    biased = six._replace(postprocess=six.postprocess._replace(extent_bias=-2.0))
    assert set(np.unique(predict_with(biased, passes, image, norm))) == {0}


# --- The CRF on PyTorch -----------------------------------------------------------------------------------
