"""The gradient boosting: what it learns from, what it says without examples, and its run from tiles to scores."""

import json

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from train_helpers import make_store

from prep.labels import GLACIER_OR_DEBRIS, IGNORE
from prep.stats import compute
from prep.store import TileStore
from train import baseline
from train.__main__ import main
from train.baseline import BOOSTING, IS_DEBRIS, IS_GLACIER, QUESTIONS, Answer, Examples, draw_examples
from train.kind import features_of
from train.report.scores import score_run


@pytest.fixture(scope="module", autouse=True)
def few_trees():
    """Let the tests wait for ten trees, not for 400."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BOOSTING, "max_iter", 10)
        yield


def test_examples_are_pixels_that_answer_the_question():
    codes = np.random.default_rng(0).choice([0, 1, 2, GLACIER_OR_DEBRIS, IGNORE], (40, 50)).astype(np.uint8)
    features = np.stack([codes, np.arange(2000).reshape(40, 50)]).astype(np.float32)
    extent = draw_examples(features, codes, IS_GLACIER, (0, 0))
    assert len(np.unique(extent.features[:, 1])) == len(extent.answers) == (codes != IGNORE).sum()
    np.testing.assert_array_equal(extent.answers, np.isin(extent.features[:, 0], (1, 2, GLACIER_OR_DEBRIS)))
    debris = draw_examples(features, codes, IS_DEBRIS, (0, 0))
    assert set(debris.features[:, 0]) == {1, 2}  # a glacier of unknown kind has no say
    np.testing.assert_array_equal(debris.answers, debris.features[:, 0] == 2)


def test_every_tile_gives_as_many_pixels_at_most(monkeypatch):
    monkeypatch.setattr(baseline, "PIXELS_PER_TILE", 30)
    codes = np.tile(np.uint8([0, 1]), (20, 20))
    features = np.arange(800, dtype=np.float32).reshape(1, 20, 40)
    one, again, other = (draw_examples(features, codes, IS_GLACIER, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert len(one.answers) == 30
    assert np.array_equal(one.features, again.features) and not np.array_equal(one.features, other.features)


@pytest.mark.parametrize("yes, no", [(0, 0), (0, 100), (10, 30), (100, 0)])
def test_with_few_examples_the_answer_is_their_share(yes, no):
    examples = Examples(np.zeros((yes + no, 3), np.float32), np.arange(yes + no) < yes)
    probability = Answer([examples], 0).logits(np.zeros((3, 2, 5), np.float32)).sigmoid()
    assert probability.shape == (2, 5)
    assert torch.allclose(probability, torch.tensor(yes / max(1, yes + no)))


def test_an_answer_is_scikit_learns_probability_at_its_pixel():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2000, 4)).astype(np.float32)
    answers = pixels[:, 0] * pixels[:, 1] > 0
    image = rng.normal(size=(4, 3, 7)).astype(np.float32)
    found = Answer([Examples(pixels[:900], answers[:900]), Examples(pixels[900:], answers[900:])], 5)
    model = HistGradientBoostingClassifier(**BOOSTING, early_stopping=False, random_state=5).fit(pixels, answers)
    expected = model.predict_proba(image[:, 1, 2][None])[0, 1]
    assert found.logits(image).sigmoid()[1, 2] == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return the folders of a store and of the baseline's run on it."""
    root = tmp_path_factory.mktemp("baseline")
    make_store(root / "store")
    command = ["baseline", "--run", str(root / "run"), "--store", str(root / "store"), "--threads", "1"]
    assert main([*command, "--scheme", "stratified"]) == 0
    return root / "store", root / "run"


def test_a_run_is_scored_like_any_other_and_tells_classes_apart(done):
    store, run = done
    assert json.loads((run / "run.json").read_text()) == {
        "model": "baseline",
        "scheme": "stratified",
        "seed": 0,
    }
    scores = json.loads((run / "scores.json").read_text())
    assert scores == json.loads(json.dumps(score_run(run, TileStore(store))))
    assert scores["pooled"]["valid_pixels"]["binary"]["mcc"] > 0.8
    assert scores["pooled"]["valid_pixels"]["four_class"]["iou"]["debris"] > 0.5
    for tile in ("000", "003"):
        probs = np.load(run / "oof" / f"{tile}.npy").astype(np.float32)
        assert probs.shape == (4, 96, 96) and not probs[3].any()
        np.testing.assert_allclose(probs.sum(axis=0), 1, atol=2e-3)


def test_a_fold_is_predicted_by_what_the_others_show(done):
    """The tiles of fold 0 by the examples of fold 1, normalised by its statistics."""
    store, run = TileStore(done[0]), done[1]
    statistics = compute(store, ["002", "003"])
    features = {t: features_of(store.image(t), statistics).numpy() for t in ("000", "002", "003")}
    logits = []
    for question in QUESTIONS:
        parts = [
            draw_examples(features[tile], store.mask(tile), question, (0, 0, number))
            for number, tile in enumerate(("002", "003"))
        ]
        logits.append(Answer(parts, 0).logits(features["000"]))
    glacier, debris = (one.sigmoid().numpy() for one in logits)
    expected = np.stack([1 - glacier, glacier * (1 - debris), glacier * debris, np.zeros_like(glacier)])
    np.testing.assert_allclose(np.load(run / "oof" / "000.npy"), expected, atol=1e-3)


def test_what_an_earlier_run_left_is_removed(done, tmp_path):
    (tmp_path / "oof").mkdir()
    (tmp_path / "oof" / "999.npy").write_bytes(b"")
    command = ["baseline", "--run", str(tmp_path), "--store", str(done[0]), "--threads", "1"]
    assert main([*command, "--scheme", "stratified", "--seed", "3"]) == 0
    assert sorted(path.stem for path in (tmp_path / "oof").iterdir()) == ["000", "001", "002", "003"]
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 3


def test_an_unknown_scheme_is_named(done, tmp_path, capsys):
    command = ["baseline", "--run", str(tmp_path), "--store", str(done[0]), "--scheme", "random"]
    assert main(command) == 2
    assert "random" in capsys.readouterr().err
