"""Options of training that comparisons need: mixing, scaling per tile, learning rates, restarts, the ramp."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from train_helpers import make_store, make_tile

from prep.labels import IGNORE
from prep.store import TileStore
from solution import NETWORKS, build_network, normalize
from train.config import AugmentConfig, Config, ConfigError, DataConfig, load_config
from train.data import Crop, CropDataset, Tile, open_fold, paste_rectangle, tile_normalization
from train.fit import RunError, fit_fold
from train.losses import SetLoss
from train.module import SegmentationModule, find_head
from train.pack import require_shippable
from train.predict import as_member, predict_run, read_fold, scaled_for

SMOKE = Path(__file__).resolve().parents[2] / "train" / "configs" / "smoke.yaml"
FOLD = {"mean": [0.5] * 4 + [260.0], "std": [0.3] * 4 + [9.0]}
STILL = AugmentConfig(flip=False, rot90=False, affine_share=0.0, gain=0.0, offset=0.0, illumination=0.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def smoke_config(store: Path, *overrides: str) -> Config:
    return load_config(SMOKE, [f"data.store={store}", *overrides])


# --- Mixing -------------------------------------------------------------------------------------------------


def flat_tile(value: int) -> Tile:
    """Return a tile that has one value and one code, both `value`."""
    ones = np.ones((80, 80, 5), np.float32)
    return Tile(str(value), value * ones, ones, np.full((80, 80), value, np.uint8))


def mixing_dataset(mix: float, tiles: int = 3) -> CropDataset:
    data = DataConfig(crop=64, batch_size=2, steps_per_epoch=50, class_shares=[1, 1, 1, 0], mix=mix)
    still = {"mean": [0.0] * 5, "std": [1.0] * 5}
    return CropDataset([flat_tile(value) for value in range(tiles)], still, data, STILL, seed=0)


def test_values_and_codes_are_mixed_alike_and_from_two_tiles():
    dataset = mixing_dataset(1.0)
    mixed = []
    for index in range(60):
        image, codes, of_class = dataset[index]
        assert torch.equal(image, codes.float().expand(5, -1, -1))
        pasted = codes != of_class  # all crops are of one class, so the rest came from another tile
        rows, cols = torch.where(pasted)
        assert len(torch.unique(codes[pasted])) <= 1
        if len(rows):
            assert pasted[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1].all()
        mixed.append(pasted.float().mean().item())
    assert np.mean(np.array(mixed) > 0) > 0.8
    assert 0.15 < np.mean(mixed) < 0.5


def test_share_of_mixed_crops():
    mixed = [len(torch.unique(mixing_dataset(0.5)[index][1])) > 1 for index in range(100)]
    assert 0.25 < np.mean(mixed) < 0.65  # half of them, less those whose rectangle hides or spares everything


def test_mixing_is_seeded_and_off_by_default():
    on, again, off, default = (mixing_dataset(mix) for mix in (0.7, 0.7, 0.0, DataConfig().mix))
    items = [[part[index] for index in range(8)] for part in (on, again, off, default)]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(items[0], items[1]))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(items[2], items[3]))
    assert all(len(torch.unique(codes)) == 1 for _, codes, _ in items[2])


def test_a_single_tile_is_mixed_with_itself():
    assert torch.equal(mixing_dataset(1.0, tiles=1)[0][1], torch.zeros(64, 64, dtype=torch.uint8))


def test_pasting_leaves_both_crops_and_brings_nodata_along():
    rng = np.random.default_rng(0)
    crop = Crop(np.zeros((40, 40, 5), np.float32), np.zeros((40, 40), np.uint8))
    other = Crop(np.full((40, 40, 5), np.nan, np.float32), np.full((40, 40), IGNORE, np.uint8))
    areas = []
    for _ in range(300):
        values, codes = paste_rectangle(crop, other, rng)
        assert np.array_equal(np.isnan(values).all(axis=-1), codes == IGNORE)
        areas.append((codes == IGNORE).mean())
    assert not np.isnan(crop.values).any()
    assert (crop.codes == 0).all()
    # the mean of a rectangle of share u^2 with its centre uniform: half of it sticks out at the corners
    assert 0.2 < np.mean(areas) < 0.45


# --- Scaling per tile ---------------------------------------------------------------------------------------


def test_percentiles_become_nothing_and_one():
    image, _ = make_tile(0)
    image[..., 0] += np.linspace(0, 1, 96, dtype=np.float32)
    scaled = normalize(image, tile_normalization(image, "percentile", FOLD))
    for band in range(5):
        values = scaled[band][~np.isnan(image[..., band])]
        assert np.percentile(values, [2, 98]) == pytest.approx([0, 1], abs=1e-3)
    assert (scaled[:, np.isnan(image).all(axis=-1)] == 0).all()


def test_statistics_are_those_of_the_fold():
    assert tile_normalization(make_tile(0)[0], "statistics", FOLD) is FOLD


@pytest.mark.parametrize("values", [np.nan, 0.25])
def test_a_band_without_a_range_takes_the_folds_statistics(values):
    image, _ = make_tile(0)
    image[..., 2] = values
    found = tile_normalization(image, "percentile", FOLD)
    assert (found["mean"][2], found["std"][2]) == (0.5, 0.3)
    assert found["std"][1] != 0.3


def test_percentile_scaling_ignores_the_brightness_of_a_tile(store):
    image, _ = make_tile(3)
    brighter = image * np.float32([2, 2, 2, 2, 1]) + np.float32([0.1, 0.1, 0.1, 0.1, 5.0])
    one, other = (normalize(part, tile_normalization(part, "percentile", FOLD)) for part in (image, brighter))
    assert np.allclose(one, other, atol=1e-3)


def test_training_and_validation_tiles_are_scaled_by_themselves(store):
    data = open_fold(smoke_config(store, "data.scaling=percentile"), 0)
    for tile in [*data.dataset.tiles, *data.val_loader.dataset.tiles]:
        for band in range(5):
            values = tile.values[..., band][tile.weights[..., band] > 0]
            assert np.percentile(values, [2, 98]) == pytest.approx([0, 1], abs=1e-3)


def test_evaluation_scales_tiles_as_training_did(store, tmp_path):
    config = smoke_config(store, "data.scaling=percentile")
    assert fit_fold(config, 0, tmp_path)["scaling"] == "percentile"
    predict_run(tmp_path, TileStore(store))
    record = read_fold(tmp_path / "fold0" / "fold.pt")
    network = build_network(record["arch"]).eval()
    network.load_state_dict(record["state_dict"])
    served = dict(zip(record["val_tiles"], open_fold(config, 0).val_loader))
    for tile, (image, _) in served.items():
        with torch.no_grad():
            expected = network(image).softmax(dim=1)[0].numpy()
        found = np.load(tmp_path / "passes" / f"{tile}.npy")[0]
        np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize(
    "arch, scaling", [({"name": "SEResUNet"}, "statistics"), ({"name": "Unet"}, "percentile")]
)
def test_what_solution_does_not_know_is_not_packed(arch, scaling):
    with pytest.raises(RunError, match=f"fold 3: found network {arch['name']} with data.scaling {scaling}"):
        require_shippable([{"arch": arch, "scaling": scaling, "fold": 3}])
    require_shippable([{"arch": {"name": "Unet"}, "fold": 3}])


def test_records_of_older_runs_mean_statistics(store, tmp_path):
    fit_fold(smoke_config(store), 0, tmp_path)
    record = read_fold(tmp_path / "fold0" / "fold.pt")
    assert record.pop("scaling") == "statistics"
    image = TileStore(store).image("000")
    assert scaled_for(as_member(record), record, image).normalization == record["normalization"]


# --- Dropout ------------------------------------------------------------------------------------------------

WITH_HEADS = {
    "Unet": {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [32, 16, 16]},
    "CoarseUnet": {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [32, 16, 16]},
    "RefinedUnet": {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [32, 16, 16]},
    "SEResUNet": {"width": 8, "levels": 2},
}


def module_of(name: str, dropout: float) -> SegmentationModule:
    config = load_config(None, [f"model.name={name}", f"model.dropout={dropout}"])
    config.model.args = WITH_HEADS[name]
    torch.manual_seed(0)
    return SegmentationModule(config)


@pytest.mark.parametrize("name", list(WITH_HEADS))
def test_dropout_drops_whole_maps_before_the_head_in_training_only(name):
    plain, dropping = module_of(name, 0.0), module_of(name, 0.25)
    state = dropping.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert len(state) == len(plain.state_dict())
    x = torch.randn(8, 5, 64, 64)
    seen = []
    for module in (plain, dropping):
        find_head(module.network).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert torch.equal(dropping.eval()(x), plain.eval()(x))
        seen.clear()
        plain.train()(x)
        dropping.train()(x)
    whole, left = (maps.flatten(2) for maps in seen)
    kept = left.any(dim=2)
    assert torch.allclose(left, whole * kept[:, :, None] / 0.75, atol=1e-6)
    assert 0.1 < float((~kept & whole.any(dim=2)).float().mean()) < 0.4


def test_maps_that_stay_make_up_for_those_that_are_dropped():
    head = find_head(module_of("Unet", 0.25).network)
    with torch.no_grad():
        head[0].weight.fill_(0)
        head[0].weight[:, :, 1, 1] = 1.0  # logits are sums over the maps
        head[0].bias.zero_()
        logits = head.train()(torch.ones(2000, 16, 1, 1))
    assert float(logits.mean()) == pytest.approx(16, rel=0.01)
    assert float(logits.std()) == pytest.approx((16 * 0.25 / 0.75) ** 0.5, rel=0.05)


def test_a_network_without_a_known_head_takes_no_dropout(monkeypatch):
    monkeypatch.setitem(NETWORKS, "Headless", lambda **_: torch.nn.Conv2d(5, 4, 1))
    with pytest.raises(ConfigError, match="model.dropout is 0.5, but network Conv2d has no head"):
        SegmentationModule(load_config(None, ["model.name=Headless", "model.dropout=0.5"]))


def test_a_resumed_run_drops_the_same_maps(store, tmp_path):
    """Two epochs at once, and the second one after a break, end in the same weights."""
    config = smoke_config(store, "model.dropout=0.3", "optim.schedule=cosine", "optim.warmup_steps=0")

    class Break(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError("break")

    with pytest.raises(RuntimeError, match="break"):
        fit_fold(config, 0, tmp_path / "broken", callbacks=[Break()])
    states = []
    for name in ("broken", "whole"):
        fit_fold(config, 0, tmp_path / name)
        states.append(read_fold(tmp_path / name / "fold0" / "fold.pt")["state_dict"])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# --- The optimiser ------------------------------------------------------------------------------------------


def test_encoder_learns_at_its_own_rate():
    arch = ("model.name=CoarseUnet", "model.args.encoder_name=resnet18")
    config = load_config(None, [*arch, "optim.encoder_lr_factor=0.1", "optim.lr=1e-3"])
    module = SegmentationModule(config)
    optimizers, _ = module.configure_optimizers()
    rest, encoder = optimizers[0].param_groups
    config.optim.warmup_steps = 0
    (optimizer,), _ = module.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-4])
    inside = {id(parameter) for parameter in module.network.unet.encoder.parameters()}
    assert {id(parameter) for parameter in encoder["params"]} == inside
    everything = [id(parameter) for group in (rest, encoder) for parameter in group["params"]]
    assert sorted(everything) == sorted(id(parameter) for parameter in module.parameters())


def test_without_a_factor_there_is_one_group():
    module = SegmentationModule(load_config(SMOKE))
    (optimizer,), _ = module.configure_optimizers()
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(list(module.parameters()))


def test_a_network_without_an_encoder_takes_no_factor():
    config = load_config(None, ["model.name=SEResUNet", "optim.encoder_lr_factor=0.1"])
    config.model.args = {"width": 4}
    with pytest.raises(ConfigError, match="optim.encoder_lr_factor is 0.1.*SEResUNet"):
        SegmentationModule(config).configure_optimizers()


def test_a_frozen_encoder_stays_as_it_was(store, tmp_path):
    settings = ("optim.encoder_lr_factor=0", "optim.ema_decay=0", "train.epochs=1", "train.seed=3")
    fit_fold(smoke_config(store, *settings), 0, tmp_path)
    state = read_fold(tmp_path / "fold0" / "fold.pt")["state_dict"]
    torch.manual_seed(3)
    first = SegmentationModule(smoke_config(store)).network.state_dict()
    learned = [name for name in state if name.endswith("weight")]
    changed = {name for name in learned if not torch.equal(state[name], first[name].contiguous())}
    assert changed
    assert all(name.startswith(("decoder", "segmentation_head")) for name in changed)


def test_restarts_follow_torchs_own_schedule(store):
    settings = ("optim.schedule=restarts", "optim.restart_epochs=2", "optim.warmup_steps=0")
    config = smoke_config(store, *settings, "optim.lr=1e-3", "data.steps_per_epoch=5")
    (optimizer,), (schedule,) = SegmentationModule(config).configure_optimizers()
    assert schedule["interval"] == "step"
    reference = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    expected = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(reference, T_0=10)
    for _ in range(35):
        found = optimizer.param_groups[0]["lr"]
        assert found == pytest.approx(expected.get_last_lr()[0], rel=1e-9)
        for part in (optimizer, schedule["scheduler"], reference, expected):
            part.step()


def test_ramp_follows_the_steps_of_training(store, tmp_path):
    """Two epochs of two steps: the loss is told 0, 1/2, 1 and 3/2 epochs; validation has the whole term."""
    settings = ("loss.boundary=1", "loss.boundary_ramp_epochs=2")
    told, original = [], SetLoss.forward

    def listen(self, logits, codes, *epochs):
        told.append(epochs)
        return original(self, logits, codes, *epochs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SetLoss, "forward", listen)
        fit_fold(smoke_config(store, *settings), 0, tmp_path)
    assert [epochs[0] for epochs in told if epochs] == [0.0, 0.5, 1.0, 1.5]
    assert [epochs for epochs in told if not epochs] == [()] * 4
