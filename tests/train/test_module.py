"""The average of the weights, learning rates, frozen encoders, BatchNorm's momentum."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from train_helpers import SMOKE, smoke_config, weights_of

from train.config import ConfigError, load_config
from train.fit import fit_fold
from train.module import RampedAveraging, SegmentationModule, warmup_and_cosine


def test_average_follows_its_ramp_and_takes_batchnorm_along():
    averaging = RampedAveraging(decay=0.5)
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    averaged = torch.optim.swa_utils.AveragedModel(network, use_buffers=True, **averaging._kwargs)
    expected = None
    for step in range(12):
        value = float(np.cos(step))
        nn.init.constant_(network[0].weight, value)
        network[1].running_mean.fill_(2 * value)
        network[1].num_batches_tracked.fill_(step)
        averaged.update_parameters(network)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert averaged.module[0].weight[0, 0].item() == pytest.approx(expected, abs=1e-6)
        assert averaged.module[1].running_mean[0].item() == pytest.approx(2 * expected, abs=1e-6)
        assert averaged.module[1].num_batches_tracked.item() == step


def test_no_averaging_keeps_the_current_weights():
    averaged, current = torch.randn(5), torch.randn(5)
    RampedAveraging(decay=0.0)._kwargs["multi_avg_fn"]([averaged], [current], torch.tensor(100))
    assert torch.equal(averaged, current)


def test_cosine_rises_in_the_warm_up_and_ends_at_zero():
    rates = [warmup_and_cosine(step, warmup=3, total=10) for step in range(11)]
    falling = 0.5 * (1 + np.cos(np.pi * np.arange(8) / 7))
    assert rates == pytest.approx([0.25, 0.5, 0.75, *falling])


@pytest.mark.parametrize("schedule, last", [("cosine", 0.0), ("constant", 1e-3)])
def test_a_schedule_ends_where_it_says(store, schedule, last):
    settings = (f"optim.schedule={schedule}", "optim.warmup_steps=4", "optim.lr=1e-3", "train.epochs=9")
    module = SegmentationModule(smoke_config(store, *settings))
    (optimizer,), (schedule_by_step,) = module.configure_optimizers()
    rates = []
    for _ in range(module.config.train.epochs * module.config.data.steps_per_epoch + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule_by_step["scheduler"].step()
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3]) and rates[-1] == pytest.approx(last)


def test_plateau_has_a_linear_warm_up(store):
    settings = ("optim.schedule=plateau", "optim.warmup_steps=4", "optim.lr=1e-3")
    (optimizer,), schedulers = SegmentationModule(smoke_config(store, *settings)).configure_optimizers()
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers[1]["scheduler"].step()
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])


def test_the_encoder_learns_at_its_own_rate(store):
    module = SegmentationModule(smoke_config(store, "optim.encoder_lr_factor=0.1", "optim.warmup_steps=0"))
    (optimizer,), _ = module.configure_optimizers()
    rest, encoder = optimizer.param_groups
    assert (rest["lr"], encoder["lr"]) == pytest.approx((1e-3, 1e-4))
    inside = {id(parameter) for parameter in module.network.encoder.parameters()}
    assert {id(parameter) for parameter in encoder["params"]} == inside
    everything = [id(parameter) for group in (rest, encoder) for parameter in group["params"]]
    assert sorted(everything) == sorted(id(parameter) for parameter in module.parameters())
    config = load_config(overrides=["optim.encoder_lr_factor=0.1"])
    config.model.name, config.model.args = "SEResUNet", {"width": 4}
    with pytest.raises(ConfigError, match="optim.encoder_lr_factor is 0.1.*SEResUNet"):
        SegmentationModule(config).configure_optimizers()


class Watch(Callback):
    """Notes the encoder's state at the end of each epoch."""

    def __init__(self) -> None:
        self.states = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if not self.states:
            self.note(pl_module)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.note(pl_module)

    def note(self, module) -> None:
        """Keep a copy of the encoder's weights and statistics."""
        state = module.network.encoder.state_dict()
        self.states.append({name: value.clone() for name, value in state.items()})


def test_a_frozen_encoder_keeps_weights_and_statistics_for_its_epochs(store, tmp_path):
    watch = Watch()
    config = smoke_config(store, "model.freeze_epochs=1", "optim.ema_decay=0")
    fit_fold(config, 0, tmp_path, callbacks=[watch])
    first, frozen, free = watch.states
    assert all(torch.equal(first[name], frozen[name]) for name in first)
    changed = {name for name in first if not torch.equal(frozen[name], free[name])}
    assert any(name.endswith("running_mean") for name in changed)
    assert any(name.endswith("conv.weight") or name.endswith("0.0.weight") for name in changed)
    state = weights_of(tmp_path / "fold0")
    assert all(torch.equal(state[f"encoder.{name}"], free[name]) for name in free)


def test_batchnorms_have_the_momentum_that_is_asked_for(store):
    def momenta(setting):
        network = SegmentationModule(smoke_config(store, f"model.batchnorm_momentum={setting}")).network
        return {layer.momentum for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)}

    assert momenta(0.3) == {0.3}
    assert momenta("null") == {0.1}


@pytest.mark.parametrize("argument", ["encoder_name=tu-nope", "decoder_channels=[16,8]", "encoder_depth=9"])
def test_a_network_that_cannot_be_built_is_told_in_one_line(argument):
    config = load_config(SMOKE, [f"model.args.{argument}"])
    with pytest.raises(ConfigError, match="model.args .* no Unet can be built: "):
        SegmentationModule(config)
