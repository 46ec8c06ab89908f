"""Pretraining: stores too large for memory, what a checkpoint refuses, and the whole way in small."""

import numpy as np
import pytest
import torch
from train_helpers import CONFIGS, SMOKE, make_store

from prep import store as tile_store
from prep.store import SPLIT_SCHEME, Split, StoreError, TileStore
from solution import BANDS, CLASS_NAMES
from train import data
from train.__main__ import main
from train.config import ConfigError, load_config
from train.data import StoredTiles, load_tiles, open_fold
from train.fit import fit_all, fit_fold, read_record
from train.run import FOLD_FILE
from train.transfer import read_pretrained

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # rasterio 1.4 on affine 3


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """Return a store with folds."""
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def split(folds, tmp_path_factory):
    """Return the same tiles as a store with training and validation ids, statistics of the former."""
    old, folder = TileStore(folds), tmp_path_factory.mktemp("data") / "split"
    with tile_store.create(folder) as writer:
        for tile_id in old.tile_ids:
            writer.write_tile(tile_id, old.image(tile_id), old.mask(tile_id))
        sides = Split(["000", "001", "003"], ["002"])
        writer.write_index(old.tiles, data.compute(old, sides.train), sides, {})
    return folder


def config_of(store, *overrides):
    return load_config(SMOKE, [f"data.store={store}", *overrides])


@pytest.fixture(scope="module")
def pretrained(split, tmp_path_factory):
    """Return the checkpoint of a short pretraining."""
    run = tmp_path_factory.mktemp("pretrain")
    fit_all(config_of(split, f"data.scheme={SPLIT_SCHEME}"), run)
    return run / "fold0" / FOLD_FILE


# --- stores with a split ---


def test_a_split_is_one_fold_with_tiles_that_are_never_held_out(split, pretrained):
    opened = TileStore(split)
    assert opened.fold_of(SPLIT_SCHEME) == {"000": -1, "001": -1, "002": 0, "003": -1}
    record = read_record(pretrained)
    assert (record["train_tiles"], record["val_tiles"]) == (["000", "001", "003"], ["002"])
    assert [path.name for path in pretrained.parents[1].iterdir()] == ["fold0"]
    assert record["normalization"] == {key: opened.stats[key] for key in ("mean", "std")}


def test_ids_that_are_not_the_stores_tiles_are_refused(split, tmp_path):
    with tile_store.create(tmp_path / "bad") as writer:
        old = TileStore(split)
        writer.write_tile("000", old.image("000"), old.mask("000"))
        writer.write_index(old.tiles[:1], old.stats, Split(["000"], ["777"]), {})
    with pytest.raises(StoreError, match="train_ids.txt and val_ids.txt name 2 tiles, which are not the 1"):
        TileStore(tmp_path / "bad")


@pytest.mark.parametrize("unsplit", ["set", "clean"])
def test_tiles_read_on_demand_give_the_same_crops(split, monkeypatch, unsplit):
    config = config_of(split, f"data.scheme={SPLIT_SCHEME}", f"data.unsplit_glacier={unsplit}")
    in_memory = open_fold(config, 0)
    monkeypatch.setattr(data, "IN_MEMORY_TILES", 0)
    on_demand = open_fold(config, 0)
    assert isinstance(on_demand.dataset.tiles, StoredTiles)
    for index in range(len(in_memory.dataset)):
        one, other = in_memory.dataset[index], on_demand.dataset[index]
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]
    for one, other in zip(in_memory.val_loader, on_demand.val_loader):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_tiles_read_on_demand_equal_tiles_in_memory(folds):
    opened = TileStore(folds)
    normalization = {"mean": [0.5] * 5, "std": [2.0] * 5}
    loaded = load_tiles(opened, opened.tile_ids, normalization)
    stored = StoredTiles(opened, opened.tile_ids, normalization)
    assert len(stored) == len(loaded)
    for index, tile in enumerate(loaded):
        for one, other in zip(tile[1:], stored[index][1:]):
            assert np.array_equal(one, other)
        assert np.array_equal(stored.codes(index), tile.codes)


# --- the checkpoint ---


def test_a_checkpoint_names_its_bands_units_and_classes(pretrained):
    record = read_record(pretrained)
    assert record["bands"] == ["blue", "green", "red", "SWIR-1", "thermal"]
    assert record["units"] == ["reflectance"] * 4 + ["kelvin"]
    assert record["classes"] == list(CLASS_NAMES) and len(record["bands"]) == len(BANDS)


def test_fine_tuning_starts_from_the_weights_and_keeps_the_statistics(folds, pretrained, tmp_path):
    before = torch.load(pretrained, weights_only=True)
    frozen = ["optim.lr=1e-12", "optim.ema_decay=0.0", "optim.weight_decay=0", "train.epochs=1"]
    record = fit_fold(config_of(folds, f"model.pretrained={pretrained}", *frozen), 1, tmp_path)
    assert record["normalization"] == before["normalization"]
    after = torch.load(tmp_path / "fold1" / FOLD_FILE, weights_only=True)["state_dict"]
    weights = [key for key in after if key.endswith("weight")]
    assert all(torch.allclose(after[key], before["state_dict"][key], atol=1e-6) for key in weights)


def test_a_second_phase_keeps_the_statistics_of_pretraining(folds, pretrained, tmp_path):
    short = ["train.epochs=1", "data.steps_per_epoch=1"]
    first = fit_fold(config_of(folds, f"model.pretrained={pretrained}", *short), 0, tmp_path / "one")
    second = fit_fold(config_of(folds, f"model.init={tmp_path / 'one'}", *short), 0, tmp_path / "two")
    assert first["normalization"] == second["normalization"] == read_record(pretrained)["normalization"]


def spoil(pretrained, path, **changes):
    record = torch.load(pretrained, weights_only=True)
    torch.save({key: value for key, value in {**record, **changes}.items() if value is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bands": ["blue", "green", "red", "thermal", "thermal"]},
            "trained with bands blue, green, red, thermal",
        ),
        ({"units": ["DN"] * 5}, "trained with units DN, DN, DN, DN, DN, expected reflectance, .*kelvin"),
        (
            {"classes": ["other", "glacier", "debris"]},
            "trained with classes other, glacier, debris, expected",
        ),
        ({"units": None}, "trained with units unknown"),
        (
            {"arch": {"name": "FPN", "args": {}}},
            "is {'name': 'FPN', 'args': {}}, this config's model .*'Unet'",
        ),
        ({"normalization": None}, "lacks one of state_dict, normalization, arch"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(folds, pretrained, tmp_path, changes, message):
    path = spoil(pretrained, tmp_path / "other.ckpt", **changes)
    with pytest.raises(ConfigError, match=message):
        fit_fold(config_of(folds, f"model.pretrained={path}"), 0, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_or_damaged_checkpoint_is_named(folds, tmp_path, capsys):
    arguments = ["fit", "--config", str(SMOKE), "--run", str(tmp_path / "run"), f"data.store={folds}"]
    assert main([*arguments, f"model.pretrained={tmp_path / 'no.ckpt'}"]) == 2
    assert "no.ckpt does not exist; make it with `make pretrain`" in capsys.readouterr().err
    (tmp_path / "damaged.ckpt").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="damaged.ckpt cannot be read"):
        read_pretrained(tmp_path / "damaged.ckpt", {})


def test_two_sources_of_first_weights_are_refused():
    with pytest.raises(ConfigError, match="model.pretrained is 'a.ckpt', expected null where model.init"):
        load_config(SMOKE, ["model.pretrained=a.ckpt", "model.init=runs/b"])


def test_the_pretraining_config_is_what_the_issue_asks_and_fits_the_fine_tuning():
    config = load_config(CONFIGS / "pretrain.yaml")
    assert (config.loss.focal, config.loss.gamma, config.loss.dice) == (0.50, 3.0, 0.30)
    assert (config.loss.boundary, config.loss.interface_weight) == (0.20, 5.0)
    assert config.data.batch_size == 16
    assert config.train.epochs <= 80 and config.train.early_stop == 15
    assert config.model == load_config(CONFIGS / "imagenet.yaml").model


# --- the whole way ---
