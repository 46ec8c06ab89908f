"""Out-of-fold predictions: by which network, with which formula, and when they are made again."""

import os

import numpy as np
import pytest
import torch
from train_helpers import smoke_config

import solution
from prep.store import TileStore
from train.config import MemberConfig
from train.predict import extent_out_of_fold, load_views, predict_run
from train.run import RunError, read_fold, read_folds


@pytest.fixture(scope="module")
def predicted(smoke_run, store):
    """Return the run, predicted, and the fold of each tile."""
    return smoke_run, predict_run(smoke_run, smoke_config(store), TileStore(store))


def test_every_tile_is_predicted_by_the_fold_that_never_saw_it(predicted, store):
    run, fold_of = predicted
    assert fold_of == TileStore(store).fold_of("stratified")
    for member in ("north", "turned", "kind"):
        for tile, fold in fold_of.items():
            record = read_fold(run / member / f"fold{fold}" / "fold.pt")
            assert tile in record["val_tiles"] and tile not in record["train_tiles"]


def test_no_prediction_of_another_ensemble_is_left(smoke_run, store):
    """A member may be added to a run that is already scored, and not be trained on all folds yet."""
    old = smoke_run / "oof" / "999.npy"
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"")
    predict_run(smoke_run, smoke_config(store), TileStore(store))
    assert not old.exists()


def test_a_run_is_not_scored_by_a_recipe_that_names_a_part_of_it(smoke_run, store):
    config = smoke_config(store)
    del config.members["turned"]
    with pytest.raises(RunError, match="holds turned too; name the recipe of this run with --recipe"):
        predict_run(smoke_run, config, TileStore(store))


def test_views_are_the_logits_of_that_network(predicted, store):
    run, _ = predicted
    record = read_folds(run / "turned")[1]
    tile = record["val_tiles"][0]
    network = solution.build_network(record["arch"]).eval()
    network.load_state_dict(record["state_dict"])
    x = torch.from_numpy(solution.normalize(TileStore(store).image(tile), record["normalization"]))[None]
    with torch.no_grad():
        expected = [network(x)[0, 0], network(x.flip(3)).flip(3)[0, 0]]
    views = load_views(run / "turned", tile, 6)
    assert views.shape == (6, 96, 96) and load_views(run / "north", tile, 6).shape == (1, 96, 96)
    for view, logits in zip(views, expected):
        assert torch.allclose(view, logits, atol=1e-2, rtol=1e-3)


def test_the_ensemble_is_the_mean_over_views_then_members(tmp_path):
    """Worked numbers: 0.8 by one view of weight 1; 0.1 and 0.3 by two views of weight 3."""
    for name, values in (("a", [0.8]), ("b", [0.1, 0.3, 0.9])):
        (tmp_path / name / "views").mkdir(parents=True)
        logits = [np.full((2, 3), np.log(p / (1 - p)), np.float16) for p in values]
        np.save(tmp_path / name / "views" / "t.npy", np.stack(logits))
    members = {"a": MemberConfig(weight=1.0, views=1), "b": MemberConfig(weight=3.0, views=2)}
    expected = (1 * 0.8 + 3 * (0.1 + 0.3) / 2) / 4
    assert extent_out_of_fold(tmp_path, "t", members).numpy() == pytest.approx(np.full((2, 3), expected), abs=1e-3)
    with pytest.raises(RunError, match="missing.npy: not predicted yet"):
        load_views(tmp_path / "a", "missing", 1)


def test_probabilities_are_what_the_submission_makes_of_the_same_networks(predicted, store):
    run, fold_of = predicted
    tile, opened = "002", TileStore(store)
    found = np.load(run / "oof" / f"{tile}.npy").astype(float)
    assert found.sum(axis=0) == pytest.approx(np.ones((96, 96)), abs=2e-3) and not found[3].any()
    members = []
    for name in ("north", "turned", "kind"):
        record = read_fold(run / name / f"fold{fold_of[tile]}" / "fold.pt")
        members.append(solution.load_member({**record, "weight": 1.0}, name, torch.device("cpu")))
    passes = tuple(tuple(pair) for pair in ((0, 0), (1, 0), (1, 1)))
    recipe = smoke_config(store).postprocess
    steps = solution.Postprocess(recipe.extent_bias, recipe.debris_bias)
    model = solution.Model(tuple(members[:2]), members[2], passes, steps, np.inf, torch.device("cpu"), {})
    expected = solution.predict_window(model, opened.image(tile))[0]
    assert np.abs(found - expected).max() < 5e-3  # stored in float16


def test_only_what_is_older_than_its_fold_is_predicted_again(predicted, store):
    run, _ = predicted
    files = sorted((run / "north" / "views").iterdir())
    before = [path.stat().st_mtime_ns for path in files]
    predict_run(run, smoke_config(store), TileStore(store))
    assert [path.stat().st_mtime_ns for path in files] == before
    os.utime(files[0], (0, 0))
    predict_run(run, smoke_config(store), TileStore(store))
    assert files[0].stat().st_mtime > 0 and [path.stat().st_mtime_ns for path in files[1:]] == before[1:]
