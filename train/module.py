"""The Lightning module: network, loss, optimiser, validation on whole tiles; and the averaging of weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Optional, Union

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau
from torchmetrics.classification import BinaryMatthewsCorrCoef

from solution import build_network, pad_to_multiple
from train.config import Config, ConfigError
from train.hardware import process_number
from train.losses import UNKNOWN, ExtentLoss
from train.networks import network_class
from train.pretrained import find_encoder


class SegmentationModule(pl.LightningModule):
    """Trains one network of the extent on crops and validates it on whole tiles.

    Metrics, both over pixels with a label: `val_mcc`, glacier of either kind against the rest, and `val_loss`,
    the mean of the tiles' losses. NaN where `scored` is false: the network trains on every tile, and what it
    says of those it has seen is no score.
    """

    scored = True

    def __init__(self, config: Config) -> None:
        """Build the network that the config names, with random weights."""
        super().__init__()
        self.config = config
        network_class(config.model.name)  # of train/networks/: build_network knows it from here on
        try:
            network = build_network({"name": config.model.name, "args": config.model.args})
        except (
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # by smp and timm, each in its own way
            raise ConfigError(
                f"model.args {config.model.args}: no {config.model.name} can be built: {error}"
            ) from error
        self.network = network.to(memory_format=torch.channels_last)  # 10-20 % faster steps on a CPU
        set_batchnorm_momentum(self.network, config.model.batchnorm_momentum)
        self.loss = ExtentLoss(config.loss)
        self.extent_mcc = BinaryMatthewsCorrCoef()
        self.val_losses: list[float] = []
        self._reset_epoch_counts()

    def _reset_epoch_counts(self) -> None:
        self.train_losses: list[Tensor] = []  # tensors: reading each one at once would stall a GPU
        self.code_counts = np.zeros(256, np.int64)  # label codes of the pixels in the crops

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, 1, H, W) of normalised bands (B, 5, H, W) of any size."""
        height, width = image.shape[-2:]
        padded = pad_to_multiple(image).contiguous(memory_format=torch.channels_last)
        return self.network(padded)[..., :height, :width]

    def on_train_epoch_start(self) -> None:
        """Start the epoch's counts at zero; freeze the encoder, or let it learn."""
        self._reset_epoch_counts()
        if self.config.model.freeze_epochs:
            encoder = find_encoder(self.network)
            frozen = self.current_epoch < self.config.model.freeze_epochs
            encoder.requires_grad_(not frozen).train(not frozen)  # in evaluation BatchNorm keeps its statistics

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed by the step, so that dropout in a resumed run is what it would have been without the break.

        Processes that share a step drop different maps.
        """
        process = process_number()
        sequence = np.random.SeedSequence([self.config.train.seed, self.global_step, *([process] * (process > 0))])
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss of a batch of crops: images and label codes."""
        loss = self.batch_loss(*batch)
        self.train_losses.append(loss.detach())
        self.code_counts += np.bincount(batch[1].cpu().numpy().ravel(), minlength=256)
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def batch_loss(self, image: Tensor, codes: Tensor) -> Tensor:
        """Return the loss of a network's logits, and with it the auxiliary head's where there is one."""
        forward_with_auxiliary = getattr(self.network, "forward_with_auxiliary", None)
        if forward_with_auxiliary is None:
            return self.loss(self(image), codes)
        crops = image.contiguous(memory_format=torch.channels_last)  # their sides need no padding
        logits, auxiliary = forward_with_auxiliary(crops)
        return self.loss(logits, codes) + self.config.loss.auxiliary * self.loss(auxiliary, codes)

    def train_loss(self) -> float:
        """Return the mean loss of the epoch's steps so far."""
        return float(torch.stack(self.train_losses).mean())

    def on_validation_epoch_start(self) -> None:
        """Start the metrics at zero."""
        self.extent_mcc.reset()
        self.val_losses = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a tile to the metrics."""
        image, codes = batch
        logits = self(image)
        self.val_losses.append(float(self.loss(logits, codes)))
        sides = self.loss.sides[codes.long()]
        labelled = sides != UNKNOWN
        self.extent_mcc.update(logits[:, 0][labelled] > 0, sides[labelled])

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and let the learning rate follow them."""
        extent = float(self.extent_mcc.compute()) if self.scored else math.nan
        self.log("val_loss", float(np.mean(self.val_losses)) if self.scored else math.nan)
        self.log("val_mcc", extent, prog_bar=True)
        if self.scored:
            for scheduler in self._plateau_schedulers():
                scheduler.step(extent)

    def _plateau_schedulers(self) -> list[ReduceLROnPlateau]:
        found = self.lr_schedulers()
        schedulers = found if isinstance(found, list) else [found]
        return [scheduler for scheduler in schedulers if isinstance(scheduler, ReduceLROnPlateau)]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the warm-up only: Lightning would step the plateau after the epoch's checkpoint is written."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def configure_optimizers(self) -> tuple[list, list]:
        """Return AdamW and the schedulers of its learning rate."""
        optim = self.config.optim
        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=optim.lr, weight_decay=optim.weight_decay)
        if optim.schedule == "plateau":
            return [optimizer], self._plateau_schedule(optimizer)
        steps = self.config.train.epochs * self.config.data.steps_per_epoch
        total = steps if optim.schedule == "cosine" else math.inf
        schedule = LambdaLR(optimizer, partial(warmup_and_cosine, warmup=optim.warmup_steps, total=total))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _parameter_groups(self) -> list[dict]:
        """Return all parameters in one group, or the encoder's in a second one with its own learning rate."""
        optim = self.config.optim
        if optim.encoder_lr_factor == 1:
            return [{"params": list(self.parameters())}]
        try:
            encoder = list(find_encoder(self.network).parameters())
        except AttributeError as error:
            raise ConfigError(
                f"optim.encoder_lr_factor is {optim.encoder_lr_factor}, but network {self.config.model.name} "
                "has no encoder of its own; expected 1"
            ) from error
        inside = {id(parameter) for parameter in encoder}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in inside]
        return [{"params": rest}, {"params": encoder, "lr": optim.lr * optim.encoder_lr_factor}]

    def _plateau_schedule(self, optimizer: Optimizer) -> list[dict]:
        """Return the warm-up (by step) and the reduction on a plateau of val_mcc (by epoch)."""
        optim = self.config.optim
        plateau = ReduceLROnPlateau(
            optimizer, mode="max", factor=optim.plateau_factor, patience=optim.plateau_patience, threshold=0
        )
        schedulers = [{"scheduler": plateau, "interval": "epoch", "monitor": "val_mcc"}]
        if optim.warmup_steps:
            steps = optim.warmup_steps
            warmup = LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)
            schedulers.append({"scheduler": warmup, "interval": "step"})
        return schedulers


def warmup_and_cosine(step: int, warmup: int, total: float) -> float:
    """Return the factor of the learning rate after `step` steps: a linear rise, then half a cosine to 0 at `total`.

    Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_batchnorm_momentum(network: nn.Module, momentum: Optional[float]) -> None:
    """Set the momentum of the running statistics of every BatchNorm; None leaves them alone."""
    for layer in network.modules():
        if momentum is not None and isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = momentum


class RampedAveraging(WeightAveraging):
    """Exponential moving average of weights and BatchNorm statistics, which is what is validated and saved.

    The decay of step t is min(decay, (1 + t) / (10 + t)): the random first weights are soon forgotten.
    A decay of 0 makes the average the current weights.
    """

    def __init__(self, decay: float) -> None:
        """Average with a decay that rises to `decay`."""

        def average(averaged: list[Tensor], current: list[Tensor], steps: Union[Tensor, int]) -> None:
            ramp = (1 + float(steps)) / (10 + float(steps))
            kept = min(decay, ramp)
            if kept > 0 and averaged[0].is_floating_point():
                torch._foreach_lerp_(averaged, current, 1 - kept)
            else:  # BatchNorm's batch counters; or no average, which lerp would round
                torch._foreach_copy_(averaged, current)

        super().__init__(multi_avg_fn=average)

    def network_state(self) -> dict[str, Tensor]:
        """Return a copy of the averaged network's state dict, float32 on the CPU. Not during validation."""
        assert self._average_model is not None, "no fit has begun"
        state = self._average_model.module.get_submodule("network").state_dict()
        return {name: _to_storage(value) for name, value in state.items()}


def _to_storage(value: Tensor) -> Tensor:
    value = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return value.float() if value.is_floating_point() else value
