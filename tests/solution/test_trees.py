"""Trees in the place of a network: answers as scikit-learn's, the same nodata, a member among others."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from support import NORMALIZATION, PLAIN, random_network
from train_helpers import make_store

import solution
from prep.store import TileStore
from prep.synthetic.scenes import make_scene, to_numbers
from train import baseline
from train.__main__ import main
from train.data import UNCHANGED
from train.pack import pack, to_half
from train.predict import as_member, load_passes, predict_run, read_folds
from train.work import count_gmac

SETTINGS = {
    "max_iter": 40,
    "learning_rate": 0.3,
    "max_leaf_nodes": 31,
    "max_features": 0.3,
    "random_state": 0,
}
FEATURES = solution.PIXEL_FEATURES


def random_pixels(count: int, missing: float, seed: int) -> np.ndarray:
    """Return features (count, F) float32 of which many are equal, and a share is NaN."""
    rng = np.random.default_rng(seed)
    features = np.round(rng.normal(size=(count, FEATURES)), 2).astype(np.float32)
    features[:, 4] += 256
    features[rng.random(features.shape) < missing] = np.nan
    return features


def fitted(features: np.ndarray, seed: int, **settings) -> HistGradientBoostingClassifier:
    """Return trees of a noisy question about the first features, in which missing ones count."""
    rng = np.random.default_rng(seed)
    known = np.nan_to_num(features, nan=1.5)
    answers = known[:, 0] * known[:, 1] + known[:, 2] + rng.normal(0, 0.5, len(known)) > 0
    return HistGradientBoostingClassifier(**{**SETTINGS, **settings}).fit(features, answers)


def constant(share: float) -> baseline.Answer:
    return baseline.Answer(math.log(share / (1 - share)), ())


def places_of(network: solution.BoostedTrees, features: np.ndarray) -> np.ndarray:
    """Return where features (N, F) lie among the thresholds, by counting those below."""
    thresholds = network.thresholds.numpy()[:, :, None, :]
    below = (features.T[None, :, :, None].astype(np.float64) > thresholds).sum(axis=-1)
    return np.where(np.isnan(features.T), 255, below).astype(np.uint8)


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("seed", [0, 1])
def test_trees_answer_as_scikit_learn_does(missing, seed):
    model = fitted(random_pixels(1500, missing, seed), seed, min_samples_leaf=5)
    network = baseline.as_network([constant(0.5), baseline.as_answer(model), constant(0.25)])
    pixels = random_pixels(700, 0.2, seed + 10)  # missing values, too, where training saw none
    glacier, debris, lake = network.answers(places_of(network, pixels))
    assert np.abs(debris - model.predict_proba(pixels)[:, 1]).max() < 1e-9
    assert np.allclose(glacier, 0.5)
    assert np.allclose(lake, 0.25)


def test_values_on_a_threshold_and_far_outside_go_where_scikit_learn_sends_them():
    model = fitted(random_pixels(1500, 0.1, 0), 0)
    answer = baseline.as_answer(model)
    network = baseline.as_network([answer, constant(0.5), constant(0.5)])
    thresholds = baseline.sorted_thresholds(answer.trees)[0]
    at = np.unique(np.float32(thresholds[thresholds < 1e30]))
    column = np.concatenate(
        [at, np.nextafter(at, np.float32(9)), np.nextafter(at, np.float32(-9)), [-1e30, 1e30]]
    )
    pixels = np.resize(random_pixels(50, 0.0, 3), (len(column), FEATURES))
    pixels[:, 0] = column
    found = network.answers(places_of(network, pixels))[0]
    assert np.abs(found - model.predict_proba(pixels)[:, 1]).max() < 1e-9


def test_a_split_of_missing_from_all_other_values():
    rng = np.random.default_rng(0)
    features = np.zeros((400, FEATURES), np.float32)
    features[:, 3] = rng.normal(size=400)
    features[rng.random(400) < 0.5, 3] = np.nan
    model = HistGradientBoostingClassifier(max_iter=2).fit(features, np.isnan(features[:, 3]))
    network = baseline.as_network([baseline.as_answer(model), constant(0.5), constant(0.5)])
    found = network.answers(places_of(network, features))[0]
    assert np.abs(found - model.predict_proba(features)[:, 1]).max() < 1e-9
    assert torch.isfinite(network.thresholds).all()


def test_no_stored_number_becomes_exactly_zero_in_physical_units():
    """So that 0 in a member's input with mean 0 and deviation 1 is nodata and nothing else."""
    stored = np.arange(1, 65536, dtype=np.float32)
    for band in solution.BANDS:
        assert (solution.to_physical(stored, band) != 0).all()


# --- A member of an ensemble --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Return a synthetic scene in physical units, with nodata, and single pixels without one band."""
    numbers = to_numbers(make_scene(seed=5, size=96, index=0).bands)
    numbers[:9, 20:40] = 0
    numbers[50:60, 50:60, 2] = 0
    bands = [
        solution.to_physical(np.where(numbers[..., i] == 0, np.nan, numbers[..., i]), band)
        for i, band in enumerate(solution.BANDS)
    ]
    return np.stack(bands, axis=-1)


@pytest.fixture(scope="module")
def models(image) -> list[HistGradientBoostingClassifier]:
    """Return trees for each question, fitted to features of the scene and answers made of them."""
    table = feature_table(image)[solution.valid_mask(image)]
    known = np.nan_to_num(table, nan=0.0)
    answers = [known[:, column] > np.median(known[:, column]) for column in (9, 14, 6)]
    return [HistGradientBoostingClassifier(**{**SETTINGS, "max_iter": 12}).fit(table, yes) for yes in answers]


def feature_table(image: np.ndarray) -> np.ndarray:
    return np.stack(list(solution.pixel_features(image, solution.median_temperature(image))), axis=-1)


@pytest.fixture(scope="module")
def record(models) -> dict:
    """Return what a member's record needs."""
    network = baseline.as_network([baseline.as_answer(model) for model in models])
    arch = {"name": "BoostedTrees", "args": {"trees": list(network.trees)}}
    return {
        "arch": arch,
        "weight": 1.0,
        "fold": 0,
        "normalization": UNCHANGED,
        "state_dict": to_half(network.state_dict()),
    }


def expected_probabilities(image, models) -> np.ndarray:
    """Return (4, H, W) by scikit-learn, nodata other."""
    valid = solution.valid_mask(image)
    expected = np.zeros((4, *valid.shape))
    expected[0] = 1
    table = feature_table(image)[valid]
    glacier, debris, lake = (model.predict_proba(table)[:, 1] for model in models)
    expected[:, valid] = np.stack(
        [(1 - glacier) * (1 - lake), glacier * (1 - debris), glacier * debris, (1 - glacier) * lake]
    )
    return expected


def test_a_tile_gets_what_scikit_learn_says_through_the_ensemble(image, models, record, tmp_path):
    content = {
        "format": solution.MODEL_FORMAT,
        "members": [record],
        "passes": [[0, 0]],
        "time_budget": None,
        "class_bias": [0.0] * 4,
        "postprocess": PLAIN._asdict(),
    }
    torch.save(content, tmp_path / "model.pth")
    model = solution.load_model(tmp_path / "model.pth")
    expected = expected_probabilities(image, models)
    found = solution.ensemble_probabilities(model, image, model.passes).probs
    assert np.abs(found - expected).max() < 1e-5
    nodata = ~solution.valid_mask(image)
    assert nodata.any()
    assert (found[0][nodata] == 1).all()
    decided = solution.predict_classes(solution.in_fastest_form(model), image).classes
    assert (decided == np.where(nodata, 0, solution.decide_classes(expected))).mean() > 0.999


def test_views_change_nothing(image, record):
    member = solution.load_member(record, "trees", torch.device("cpu"))
    x = solution.to_tensor(solution.normalize(image, member.normalization))[None]
    plain = solution.forward_probabilities(member.network, x, solution.VIEWS[0])
    for view in solution.VIEWS[1:]:
        turned = solution.forward_probabilities(member.network, x, view)
        # sums over windows are rounded in another order: a value on a threshold may change its side
        assert ((turned - plain).abs() > 1e-4).float().mean() < 0.01


def test_the_parts_of_an_image_do_not_depend_on_how_many_are_done_at_once(image, record, monkeypatch):
    network = solution.load_member(record, "trees", torch.device("cpu")).network
    bands = solution.normalize(image, UNCHANGED)
    whole = network.probabilities(bands)
    monkeypatch.setattr(solution, "PIXELS_AT_ONCE", 1000)
    assert np.array_equal(network.probabilities(bands), whole)


def test_an_image_without_any_value_is_other(record):
    network = solution.load_member(record, "trees", torch.device("cpu")).network
    probabilities = network(torch.zeros(2, 5, 32, 64)).softmax(1)
    assert probabilities.shape == (2, 4, 32, 64)
    assert (probabilities[:, 0] == 1).all()


def test_it_is_averaged_with_a_network_by_weight(image, record):
    device = torch.device("cpu")
    trees = solution.load_member({**record, "weight": 3.0}, "trees", device)
    other = solution.Member(random_network(), 1.0, NORMALIZATION)
    passes = (solution.Pass(0, 0), solution.Pass(1, 0))
    model = solution.Model((trees, other), passes, (0.0,) * 4, PLAIN, math.inf, device)
    both, first, second = (
        solution.ensemble_probabilities(model, image, chosen).probs
        for chosen in (passes, passes[:1], passes[1:])
    )
    assert np.abs(both - (3 * first + second) / 4).max() < 1e-5


def test_weights_that_do_not_fit_are_refused(record):
    fewer = copy.deepcopy(record)
    fewer["arch"]["args"]["trees"][0] -= 1
    with pytest.raises(solution.InputError, match="misshapen: feature"):
        solution.load_member(fewer, "trees", torch.device("cpu"))


# --- A run of the baseline ----------------------------------------------------------------------------------


def test_a_run_is_treated_as_any_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baseline, "BOOSTING", {**baseline.BOOSTING, "max_iter": 8, "min_samples_leaf": 20})
    store = TileStore(make_store(tmp_path / "store", tiles=4, folds=2, size=64))
    run = tmp_path / "run"
    assert main(["baseline", "--scheme", "stratified", "--run", str(run), "--store", str(store.folder)]) == 0
    scores = json.loads((run / "scores.json").read_text())
    records = read_folds(run)
    assert [record["fold"] for record in records] == [0, 1]
    for record in records:
        fold = scores["folds"][str(record["fold"])]
        assert record["val_tiles"] == fold["tiles"]
        assert not set(record["val_tiles"]) & set(record["train_tiles"])
        assert record["val_mcc"] == fold["valid_pixels"]["binary"]["mcc"]
    out_of_fold = {tile: np.load(run / "oof" / f"{tile}.npy") for tile in store.tile_ids}

    predict_run(run, store)  # what `evaluate` does
    for tile, first in out_of_fold.items():
        passes = load_passes(run, tile)
        assert passes.shape == (6, 4, 64, 64)
        assert np.array_equal(passes[0], first)

    pack(run, None, tmp_path / "model.pth")
    model = solution.load_model(tmp_path / "model.pth")
    tile = records[1]["val_tiles"][0]
    packed = solution.ensemble_probabilities(model, store.image(tile), (solution.Pass(1, 0),)).probs
    assert np.abs(packed - out_of_fold[tile].astype(np.float32)).max() < 1e-3  # float16 as stored


def test_a_run_into_the_same_folder_leaves_no_fold_of_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "BOOSTING", {**baseline.BOOSTING, "max_iter": 2, "min_samples_leaf": 20})
    store = make_store(tmp_path / "store", tiles=4, folds=2, size=64)
    old = tmp_path / "run" / "fold7" / "fold.pt"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of another scheme")
    baseline.run_baseline(store, "stratified", tmp_path / "run", threads=1)
    assert not old.exists()
    assert as_member(read_folds(tmp_path / "run")[0]).network.trees[0] == 2


def test_the_work_of_trees_grows_with_their_number_and_the_card_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "BOOSTING", {**baseline.BOOSTING, "max_iter": 2, "min_samples_leaf": 20})
    store = make_store(tmp_path / "store", tiles=4, folds=2, size=64)
    baseline.run_baseline(store, "stratified", tmp_path / "run", threads=1)
    pack(tmp_path / "run", None, tmp_path / "model.pth")
    assert "Steps: [2, 2, 2] trees" in (tmp_path / "model_card.md").read_text()
    work = [count_gmac({"name": "BoostedTrees", "args": {"trees": [count] * 3}}) for count in (0, 100, 200)]
    assert work[0] == 0
    assert work[2] == 2 * work[1] > 0
