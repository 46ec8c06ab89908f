"""The network of the kind: its features, that it answers as what was trained, what it learns from."""

import numpy as np
import pytest
import torch
from torch import nn
from train_helpers import make_store, smoke_config

from prep.labels import GLACIER_OR_DEBRIS, IGNORE
from prep.store import TileStore
from solution import MOST_DEVIATIONS, VIEWS, KindNet, Member, local_statistics, member_logits, normalize
from train import kind
from train.config import KindConfig
from train.data import DataError
from train.kind import KnownPixels, as_kind_net, features_of, fit_kind, known_pixels, train_network
from train.run import ALL, RunError, read_fold

NORMALIZATION = {"mean": [0.5] * 4 + [265.0], "std": [0.3] * 4 + [9.0]}
FEATURES = 5 + KindNet.LEVELS * KindNet.STATISTICS


def make_image(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """Return an image (H, W, 5) of smooth noise with nodata, whole pixels and single bands."""
    rng = np.random.default_rng(seed)
    image = rng.normal(NORMALIZATION["mean"], NORMALIZATION["std"], (height, width, 5)).astype(np.float32)
    image[rng.random((height, width)) < 0.1] = np.nan
    image[rng.random(image.shape) < 0.02] = np.nan
    return image


def test_features_are_the_bands_and_the_statistics_around_them():
    image = make_image()
    features = features_of(image, NORMALIZATION)
    assert features.shape == (FEATURES, 64, 96)
    x = torch.from_numpy(normalize(image, NORMALIZATION))
    assert torch.equal(features[:5], x.clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS))
    finest = next(iter(local_statistics(features[None, :5], 1)))
    middle = nn.functional.interpolate(finest, scale_factor=2, mode="bilinear")[0]
    assert torch.allclose(features[5 : 5 + KindNet.STATISTICS], middle, atol=1e-6)
    assert features_of(image[:50, :70], NORMALIZATION).shape == (FEATURES, 50, 70)


def test_the_network_answers_as_the_layers_on_standardised_features():
    torch.manual_seed(0)
    first, last = nn.Linear(FEATURES, 7), nn.Linear(7, 1)
    mean, std = torch.randn(FEATURES), torch.rand(FEATURES) + 0.5
    image = make_image()
    features = features_of(image, NORMALIZATION)
    standard = (features.flatten(1).T - mean) / std
    with torch.no_grad():
        expected = last(torch.relu(first(standard)))[:, 0].reshape(64, 96)
    member = Member(as_kind_net(first, last, mean, std), 1.0, NORMALIZATION)
    found = member_logits(member, image, VIEWS[0], torch.device("cpu"))
    assert torch.allclose(found, expected, atol=1e-4)


def test_it_learns_to_tell_two_surfaces_apart():
    torch.manual_seed(0)
    features = torch.randn(4000, FEATURES)
    debris = ((features[:, 4] > 0) != (features[:, 20] > 0.3)).float()  # no single feature tells
    config = KindConfig(hidden=16, epochs=60, batch_size=256, dropout=0.0)
    network = train_network(KnownPixels(features, debris), config)
    again = train_network(KnownPixels(features, debris), config)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values()))
    weight = torch.cat([network.pixel.weight, *(layer.weight for layer in network.around)], dim=1)[:, :, 0, 0]
    with torch.no_grad():
        hidden = torch.relu(features @ weight.T + network.pixel.bias)
        logits = hidden @ network.last.weight[0, :, 0, 0] + network.last.bias
    assert ((logits > 0) == (debris > 0)).float().mean() > 0.9


def test_only_pixels_of_known_kind_count(tmp_path):
    store = TileStore(make_store(tmp_path / "store", labels=("phase2", "phase1")))
    codes = store.mask("000")
    pixels = known_pixels(store, "000", NORMALIZATION)
    assert len(pixels.debris) == np.isin(codes, (1, 2)).sum()
    assert int(pixels.debris.sum()) == (codes == 2).sum()
    features = features_of(store.image("000"), NORMALIZATION)
    assert torch.equal(pixels.features[pixels.debris == 1], features[:, torch.from_numpy(codes == 2)].T)
    assert GLACIER_OR_DEBRIS in store.mask("001") and IGNORE in codes
    unknown = known_pixels(store, "001", NORMALIZATION)
    assert unknown.features.shape == (0, FEATURES) and len(unknown.debris) == 0


def test_a_store_without_a_kind_is_refused(tmp_path):
    config = smoke_config(make_store(tmp_path / "store", size=64, labels=("phase1",)))
    with pytest.raises(DataError, match="0 pixels of known kind to train on, 0 of them debris; expected both"):
        fit_kind(config, tmp_path / "kind", [0])


def test_a_fold_learns_from_the_other_folds_and_is_kept(store, smoke_run, tmp_path, capsys):
    record = read_fold(smoke_run / "kind" / "fold0" / "fold.pt")
    assert (record["train_tiles"], record["val_tiles"]) == (["002", "003"], ["000", "001"])
    codes = TileStore(store).mask("002")  # 003 is of phase 1
    assert record["pixels"] == {"debris": int((codes == 2).sum()), "clean": int((codes == 1).sum())}
    assert read_fold(smoke_run / "kind" / "foldall" / "fold.pt")["val_tiles"] == []
    config = smoke_config(store)
    assert kind.kind_folds(config) == [0, 1, ALL]
    before = (smoke_run / "kind" / "fold0" / "fold.pt").stat().st_mtime_ns
    fit_kind(config, smoke_run / "kind", [0])
    assert (smoke_run / "kind" / "fold0" / "fold.pt").stat().st_mtime_ns == before
    for other in (
        smoke_config(store, "kind.hidden=9"),
        smoke_config(make_store(tmp_path / "other", size=64)),
    ):
        with pytest.raises(RunError, match="made with other settings or labels; remove"):
            fit_kind(other, smoke_run / "kind", [0])
