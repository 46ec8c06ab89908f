"""How much of the training loop's time is its network's? Crops a second, as a share of what that allows.

One run alternates rounds of two kinds: an epoch of the training loop as `python -m train fit` runs it, and as
many bare steps (forward, loss, backward, optimiser) of a copy of its network on crops that are in memory.
What the loop does besides is preparing crops, clipping, averaging the weights and keeping count. Validation
and checkpoints, once an epoch and so of no fixed share, are not counted.
"""

from __future__ import annotations

import copy
import os
import platform
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from prep import competition, synthetic
from prep.labels import IGNORE
from solution import CLASS_NAMES, usable_cores
from train.config import Config, change_config
from train.data import FoldData, open_fold
from train.files import write_text
from train.fit import fit_fold
from train.hardware import precision_of, threads_of, uses_gpu
from train.module import SegmentationModule

AIM = 0.9  # of the bare steps' crops a second
TILES = 6  # synthetic ones
IN_MEMORY = 4  # batches that the bare steps take in turn
CROPS_TIMED = 24

Clock = Callable[[], float]
Loss = Callable[[Tensor, Tensor], Tensor]


class Round(NamedTuple):
    """Crops a second in a round: of the loop, of bare steps, and of bare steps with plain cross-entropy."""

    loop: float
    bare: float
    cross_entropy: float

    @property
    def ratio(self) -> float:
        """Return the loop's speed as a share of the bare steps'."""
        return self.loop / self.bare


class Measured(NamedTuple):
    """The rounds, after one that does not count; seconds to prepare a crop; what the seconds are of."""

    rounds: list[Round]
    crop_seconds: float
    clock: str

    @property
    def ratio(self) -> float:
        """Return the median ratio of the rounds."""
        return float(np.median([one.ratio for one in self.rounds]))


class AlternatingRounds(Callback):
    """Times each epoch of a run from its first crop to its last step, and bare steps after it."""

    def __init__(self, config: Config, data: FoldData, clock: Clock) -> None:
        """Time the run of `config`; `data` gives the crops that the bare steps have in memory."""
        self.config = config
        self.data = data
        self.clock = clock
        self.rounds: list[Round] = []
        self._loop_seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the network, and put the crops where it is."""
        assert isinstance(pl_module, SegmentationModule)
        self.device, self.loss = pl_module.device, pl_module.loss
        self.network = copy.deepcopy(pl_module.network).train()
        optim = self.config.optim
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=optim.lr, weight_decay=optim.weight_decay
        )
        batches = islice(self.data.train_loader, IN_MEMORY)
        self.batches = [
            (image.to(self.device, memory_format=torch.channels_last), codes.to(self.device))
            for image, codes, _ in batches
        ]
        self._started = self._now()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the loop's clock: the epoch's steps are done."""
        self._loop_seconds = self._now() - self._started

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take as many bare steps, and start the clock of the next epoch."""
        data = self.config.data
        crops = data.steps_per_epoch * data.batch_size
        bare, plain = self._bare_seconds(self.loss), self._bare_seconds(plain_cross_entropy)
        self.rounds.append(Round(crops / self._loop_seconds, crops / bare, crops / plain))
        self._started = self._now()

    def _bare_seconds(self, loss: Loss) -> float:
        started = self._now()
        for image, codes in islice(cycle(self.batches), self.config.data.steps_per_epoch):
            with autocast(self.config, self.device):
                value = loss(self.network(image), codes)
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
        return self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def plain_cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the cross-entropy of the pixels with a certain label, by one call of PyTorch."""
    target = codes.long().masked_fill(codes >= len(CLASS_NAMES), IGNORE)
    return nn.functional.cross_entropy(logits, target, ignore_index=IGNORE)


def autocast(config: Config, device: torch.device) -> Any:
    """Return the context in which the loop computes, too."""
    precision = precision_of(config)
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "32-true")


def make_synthetic_store(folder: Path) -> Path:
    """Write a tile store of synthetic scenes, and return its folder."""
    synthetic.write_sample(folder / "scenes", TILES, 512, 0, "training", "both")
    competition.prepare(folder / "scenes", folder / "store")
    return folder / "store"


def measure(config: Config, steps: int, rounds: int, work: Path) -> Measured:
    """Train fold 0 of a config for some rounds of `steps` steps, bare ones between them.

    Args:
        config: what to train, and on which store.
        steps: of each round.
        rounds: that count, after one that does not.
        work: folder for the run.
    """
    settings = {"data": {"steps_per_epoch": steps}, "train": {"epochs": rounds + 1, "early_stop": 0}}
    config = change_config(config, settings, "bench-train")
    alone = threads_of(config) == 1 and not uses_gpu(config) and config.data.workers == 0
    # what other processes do on the machine does not count in CPU seconds
    clock = time.process_time if alone else time.perf_counter
    data = open_fold(config, 0)
    callback = AlternatingRounds(config, data, clock)
    fit_fold(config, 0, work / "run", callbacks=[callback])
    started = clock()
    for number in range(CROPS_TIMED):
        data.dataset[number]
    crop_seconds = (clock() - started) / CROPS_TIMED
    return Measured(callback.rounds[1:], crop_seconds, "CPU" if alone else "clock")


def format_measured(measured: Measured, config: Config, steps: int, command: str) -> str:
    """Return the Markdown report."""
    data, model = config.data, config.model
    verdict = "reached" if measured.ratio >= AIM else "missed"
    whole = 1 / _median(measured, "loop")
    parts = [
        "# How fast is training?",
        f"```sh\n{command}\n```",
        f"The training loop makes **{measured.ratio:.2f}** of the crops a second that its network alone "
        f"makes (aim: {AIM} or more, {verdict}): the median of {len(measured.rounds)} rounds, each of "
        f"{steps} steps of the loop and as many bare ones (forward, loss, backward, optimiser on crops in "
        "memory). "
        "Validation and checkpoints, once an epoch, are not counted.",
        _table(measured.rounds),
        f"Preparing a crop takes {1e3 * measured.crop_seconds:.1f} ms of {1e3 * whole:.0f} ms in all. Times "
        f"are by the {measured.clock}.",
        f"{model.name} {model.args.get('encoder_name', '')}, {data.batch_size} crops of {data.crop} px a "
        f"step, prepared by {data.workers or 'no'} processes of their own; precision {precision_of(config)}; "
        f"threads: {threads_of(config)}, cores: {usable_cores()}, load average {os.getloadavg()[0]:.1f}; "
        f"{platform.machine()}, {_gpu(config)}, torch {torch.__version__.split('+')[0]}.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(rounds: Sequence[Round]) -> str:
    lines = [
        "| round | loop, crops/s | bare steps, crops/s | ratio | bare with plain cross-entropy, crops/s |",
        "|---|---|---|---|---|",
    ]
    for number, one in enumerate(rounds, start=1):
        cells = [f"{one.loop:.2f}", f"{one.bare:.2f}", f"{one.ratio:.3f}", f"{one.cross_entropy:.2f}"]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _median(measured: Measured, name: str) -> float:
    return float(np.median([getattr(one, name) for one in measured.rounds]))


def _gpu(config: Config) -> str:
    return torch.cuda.get_device_name() if uses_gpu(config) else "no GPU"


def bench_train(
    config: Config, store: Optional[Path], out: Path, steps: int, rounds: int, command: str
) -> Measured:
    """Measure the training loop on a store, or on synthetic scenes, and write the report."""
    with tempfile.TemporaryDirectory() as work:
        folder = store or make_synthetic_store(Path(work))
        config = change_config(config, {"data": {"store": str(folder)}}, "bench-train")
        measured = measure(config, steps, rounds, Path(work))
    text = format_measured(measured, config, steps, command)
    write_text(out, text)
    print(text)
    return measured
