"""First weights: of ImageNet, under the right names; of a checkpoint, with its statistics; refused elsewhere."""

import shutil
from collections import OrderedDict

import pytest
import shapely
import torch
from train_helpers import SMOKE, make_store, smoke_config, weights_of

from prep import ground
from prep.store import TileStore
from solution import BANDS, build_network
from train import pretrained
from train.__main__ import main
from train.data import DataError
from train.fit import fit_fold
from train.pretrained import (
    PretrainedError,
    load_imagenet,
    read_pretrained,
    rename,
    seen_ground,
    spread_over_bands,
    warn_of_seen_ground,
    weights_file,
)
from train.run import read_fold

ENCODER = "timm-tf_efficientnet_lite0"


def network(encoder: str = ENCODER):
    """Return a U-Net with random weights."""
    return build_network({"name": "Unet", "args": {"encoder_name": encoder}})


# --- ImageNet -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """Return the published weights without their classifier."""
    tensors = torch.load(weights_file(ENCODER), map_location="cpu", weights_only=True)
    return OrderedDict((key, value) for key, value in tensors.items() if not key.startswith("_fc."))


def test_every_weight_of_the_encoder_arrives_and_no_other_changes(published):
    changed = network()
    before = {key: value.clone() for key, value in changed.state_dict().items()}
    load_imagenet(changed, ENCODER)
    after = changed.state_dict()
    encoder = [key for key in before if "encoder." in key]
    assert all(torch.equal(before[key], after[key]) for key in before if key not in encoder)
    assert len(published) == len(encoder)
    for key, tensor in list(zip(encoder, published.values()))[1:]:
        assert torch.equal(after[key], tensor), key


def test_the_encoder_answers_as_the_published_network_does(published):
    """The stem, computed by hand from the published weights, on an image whose bands are all alike."""
    changed = network().eval()
    load_imagenet(changed, ENCODER)
    grey = torch.rand(1, 1, 32, 32)
    kernel = published["_conv_stem.weight"].sum(1, keepdim=True)
    stem = torch.nn.functional.conv2d(grey, kernel, stride=2, padding=1)
    norm = [published[f"_bn0.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    expected = torch.nn.functional.batch_norm(stem, *norm, eps=1e-5).clamp(0, 6)
    with torch.no_grad():
        found = changed.encoder(grey.expand(1, len(BANDS), 32, 32))[1]
    assert torch.allclose(found, expected, atol=1e-4)


def test_colours_go_to_their_bands_and_grey_keeps_its_sum():
    spread = spread_over_bands(torch.arange(3.0).reshape(1, 3, 1, 1)).flatten()  # red 0, green 1, blue 2
    assert torch.allclose(spread * len(BANDS) / 3, torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0]))
    assert float(spread.sum()) == pytest.approx(3.0)


def test_encoders_packages_and_layers_that_do_not_fit_are_refused(published, monkeypatch):
    with pytest.raises(PretrainedError, match="no ImageNet weights for encoder resnet18; there are some for"):
        load_imagenet(network("resnet18"), "resnet18")
    expected = network().encoder.state_dict()
    with pytest.raises(PretrainedError, match="294 published weights for 293"):
        rename(published, OrderedDict(list(expected.items())[1:]), ENCODER)
    swapped = OrderedDict(published, **{"_bn0.weight": torch.zeros(5)})
    with pytest.raises(PretrainedError, match=r"_bn0.weight \(5,\) does not fit bn1.weight \(32,\)"):
        rename(swapped, expected, ENCODER)
    monkeypatch.setitem(pretrained.PACKAGES, ENCODER, "no_such_package")
    with pytest.raises(PretrainedError, match="no_such_package is not installed; run `make setup`"):
        weights_file(ENCODER)


# --- Checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(smoke_run):
    """Return the checkpoint of a short training."""
    return smoke_run / "north" / "fold0" / "fold.pt"


def test_fine_tuning_starts_from_the_weights_and_keeps_the_statistics(store, checkpoint, tmp_path):
    before = read_fold(checkpoint)
    still = ["optim.lr=1e-12", "optim.ema_decay=0.0", "optim.weight_decay=0", "train.epochs=1"]
    record = fit_fold(smoke_config(store, f"model.pretrained={checkpoint}", *still), 1, tmp_path)
    assert record["normalization"] == before["normalization"]
    after = weights_of(tmp_path / "fold1")
    weights = [key for key in after if key.endswith("weight")]
    assert all(torch.allclose(after[key], before["state_dict"][key], atol=1e-6) for key in weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bands": ["blue", "green", "red", "thermal"]},
            "trained with bands blue, green, red, thermal, expected",
        ),
        ({"units": ["DN"] * 5}, "trained with units DN, DN, DN, DN, DN, expected reflectance, .*kelvin"),
        ({"units": None}, "trained with units unknown"),
        ({"answer": "four classes"}, "trained with answer unknown, expected unknown|answer"),
        (
            {"arch": {"name": "FPN", "args": {}}},
            "is {'name': 'FPN', 'args': {}}, this config's model .*'Unet'",
        ),
        ({"normalization": None}, "lacks one of state_dict, normalization, arch"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(store, checkpoint, tmp_path, changes, message):
    record = {key: value for key, value in {**read_fold(checkpoint), **changes}.items() if value is not None}
    torch.save(record, tmp_path / "other.pt")
    with pytest.raises(PretrainedError, match=message):
        fit_fold(smoke_config(store, f"model.pretrained={tmp_path / 'other.pt'}"), 0, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_or_damaged_checkpoint_is_named(store, tmp_path, capsys):
    arguments = ["fit", "--recipe", str(SMOKE), "--run", str(tmp_path / "run"), f"data.store={store}"]
    assert main([*arguments, f"model.pretrained={tmp_path / 'no.pt'}"]) == 2
    assert "no.pt does not exist; make it with `make pretrain`" in capsys.readouterr().err
    (tmp_path / "damaged.pt").write_bytes(b"damaged")
    with pytest.raises(PretrainedError, match="damaged.pt cannot be read"):
        read_pretrained(tmp_path / "damaged.pt", {})


# --- Ground -------------------------------------------------------------------------------------------------


def with_ground(folder, ids):
    """Write where these tiles of a store lie, side by side; return the outlines."""
    outlines = {name: shapely.box(76 + number, 33, 77 + number, 34) for number, name in enumerate(ids)}
    ground.write_ground(folder, outlines)
    return outlines


def test_a_network_has_seen_the_ground_of_its_tiles_and_of_its_first_weights(checkpoint, tmp_path):
    folder = make_store(tmp_path / "store", size=64)
    config = smoke_config(folder)
    assert shapely.from_wkt(seen_ground(config, ["000", "001"])).is_empty  # a store without ground.geojson
    outlines = with_ground(folder, ["000", "001"])
    assert shapely.from_wkt(seen_ground(config, ["000", "002"])).equals(outlines["000"])
    torch.save({**read_fold(checkpoint), "ground": outlines["001"].wkt}, tmp_path / "first.pt")
    config.model.pretrained = str(tmp_path / "first.pt")
    assert shapely.from_wkt(seen_ground(config, ["000"])).equals(shapely.box(76, 33, 78, 34))


def test_held_out_tiles_on_ground_that_was_seen_are_named(smoke_run, store, tmp_path, capsys):
    run, folder = shutil.copytree(smoke_run, tmp_path / "run"), shutil.copytree(store, tmp_path / "store")
    outlines, opened = with_ground(folder, TileStore(folder).tile_ids), TileStore(folder)
    record = read_fold(run / "north" / "fold0" / "fold.pt")
    own = shapely.union_all([outlines[name] for name in record["train_tiles"]])
    for seen, expected in ((own, set()), (own.union(outlines["001"].buffer(-0.4)), {"001"})):
        torch.save({**record, "ground": seen.wkt}, run / "north" / "fold0" / "fold.pt")
        assert warn_of_seen_ground(run, ["north"], opened) == expected
        assert ("1 held-out tiles lie on ground" in capsys.readouterr().err) == bool(expected)


def test_tiles_on_the_ground_of_another_store_are_left_out_of_training(store, tmp_path, capsys):
    folder, other = shutil.copytree(store, tmp_path / "store"), tmp_path / "other"
    outlines = with_ground(folder, TileStore(folder).tile_ids)
    other.mkdir()
    ground.write_ground(other, {"x": outlines["002"]})
    config = smoke_config(folder, f"data.exclude_ground={other}", "train.epochs=1")
    record = fit_fold(config, 0, tmp_path / "run")
    assert (record["train_tiles"], record["val_tiles"]) == (["003"], ["000", "001"])
    assert shapely.from_wkt(record["ground"]).equals(outlines["003"])
    assert f"1 of 4 tiles left out, on the ground of {other}" in capsys.readouterr().out
    ground.write_ground(other, {name: outlines[name] for name in ("000", "001")})
    with pytest.raises(DataError, match="leaves 2 tiles to train on and 0 to validate on"):
        fit_fold(config, 0, tmp_path / "again")
