"""Finished runs in other scales: the same weights, asked in other sizes of a tile."""

from pathlib import Path

import numpy as np
import pytest
import torch
from train_helpers import fit_smoke, make_store

from prep.store import TileStore
from train.__main__ import main
from train.evaluate import as_member, predict_views, read_folds


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return TileStore(make_store(tmp_path_factory.mktemp("rescale") / "store"))


@pytest.fixture(scope="module")
def run(store: TileStore) -> Path:
    """Return a finished run of two folds of a CoarseUnet."""
    settings = ["model.name=CoarseUnet", "train.epochs=1", "data.steps_per_epoch=2"]
    return fit_smoke(store.folder, store.folder.parent / "run", *settings)


def test_it_is_the_mean_of_the_run_in_each_scale(store: TileStore, run: Path, tmp_path: Path) -> None:
    probs = []
    for scales in ("1", "1.5", "1,1.5"):
        out = tmp_path / scales
        command = ["rescale", "--run", str(run), "--scales", scales, "--out", str(out)]
        assert main(command) == 0 and main(command) == 0  # a second time replaces it
        probs.append([predict_views(as_member(one), store.image("000")) for one in read_folds(out)])
    plain = [predict_views(as_member(one), store.image("000")) for one in read_folds(run)]
    one, larger, both = (np.asarray(views, np.float32) for views in probs)
    np.testing.assert_array_equal(one, np.asarray(plain, np.float32))
    np.testing.assert_allclose(both, (one + larger) / 2, atol=2e-3)
    assert np.abs(one - larger).max() > 0.01


def test_it_is_a_run_like_any_other_with_the_same_weights(
    store: TileStore, run: Path, tmp_path: Path
) -> None:
    assert main(["rescale", "--run", str(run), "--scales", "1,1.5", "--out", str(tmp_path / "out")]) == 0
    assert main(["evaluate", "--run", str(tmp_path / "out"), "--store", str(store.folder)]) == 0
    for before, after in zip(read_folds(run), read_folds(tmp_path / "out"), strict=True):
        assert after["arch"]["args"]["scales"] == after["config"]["model"]["args"]["scales"] == [1.0, 1.5]
        assert before["val_tiles"] == after["val_tiles"] and np.isnan(after["val_mcc"])
        for name, weights in before["state_dict"].items():
            assert torch.equal(weights, after["state_dict"][name])


@pytest.mark.parametrize(
    "scales, out, message",
    [("0,1", "out", "expected numbers above 0"), ("1", "run", "is a trained network, no rescaled")],
)
def test_mistakes_are_named(run: Path, scales: str, out: str, message: str, capsys, tmp_path) -> None:
    target = run if out == "run" else tmp_path / out
    assert main(["rescale", "--run", str(run), "--scales", scales, "--out", str(target)]) == 2
    assert message in capsys.readouterr().err
