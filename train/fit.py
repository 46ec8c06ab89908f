"""Fits folds: one Lightning run each, resumable, ending in a `fold.pt` of plain containers and tensors."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from tqdm import tqdm

from prep.files import write_text, write_whole
from prep.labels import CODE_NAMES
from prep.store import TileStore, name_some
from solution import VIEWS, prepare_torch
from train.config import Config, ConfigError, differing_keys, flatten, load_config, save_config, to_dict
from train.data import SIDES, FoldData, open_fold
from train.hardware import (
    held,
    is_first_process,
    over_processes,
    threads_of,
    trainer_options,
    wait_for_each_other,
)
from train.module import RampedAveraging, SegmentationModule
from train.pretrained import input_identity, load_imagenet, read_pretrained, seen_ground
from train.run import (
    ALL,
    CONFIG_FILE,
    FOLD_FILE,
    FOLD_FORMAT,
    HISTORY_FILE,
    RESUME_FILE,
    Fold,
    RunError,
    fold_folder,
    name_of,
    read_record,
    require_same_tiles,
    versions,
)


def open_labelled(config: Config, fold: Fold, folder: Path) -> FoldData:
    """Return the labelled tiles of a fold; raises what `open_fold` does, ConfigError for a student."""
    if config.distil.teachers:
        raise ConfigError(
            f"distil.teachers is {config.distil.teachers}, which `fit` does not use; expected []. Train the "
            "student with `python -m train distil`."
        )
    return open_fold(config, fold, first_normalization(config))


class Method(NamedTuple):
    """How a fold is trained.

    `open_data` takes the config, the fold and its folder, in which it may keep files; `make_module` the
    config.
    """

    open_data: Callable[[Config, Fold, Path], FoldData] = open_labelled
    make_module: Callable[[Config], SegmentationModule] = SegmentationModule


FROM_LABELS = Method()


def fit_fold(
    config: Config,
    fold: Fold,
    run_dir: Path,
    callbacks: Sequence[Callback] = (),
    method: Method = FROM_LABELS,
) -> dict:
    """Fit one fold in `run_dir`/fold<k> and return the record in its `fold.pt`, less the weights.

    A finished fold is not fitted again, and an interrupted one continues after its last finished epoch, with
    the same result as if it had not been interrupted.

    Args:
        config: of the network.
        fold: number of the fold to validate on; all others are trained on. ALL trains on every tile: that
            network has no score, NaN.
        run_dir: folder of the member, made where missing.
        callbacks: further Lightning callbacks.
        method: where the crops come from and what is done with them.

    Raises:
        RunError: the folder holds a run with another config or other tiles, or another process fills it.
        ConfigError: no tile is held out, and a setting follows the score.
        train.data.DataError, prep.store.StoreError: the tiles cannot serve.
    """
    folder = fold_folder(run_dir, fold)
    if fold == ALL:
        require_unscored(config)
    if record := finished_record(config, fold, run_dir):
        return record
    prepare_torch(threads_of(config))
    data = method.open_data(config, fold, folder)
    with held(folder, config) as alone:
        if not alone:
            raise RunError(f"{folder}: another process trains it. Wait for it, or name another --run.")
        if is_first_process(config):
            write_whole(folder / CONFIG_FILE, lambda path: save_config(config, path))
            say(describe_fold(fold, data))
        recorder = Recorder(folder, fold, config, data)
        with quiet_lightning():
            _run_lightning(partial(method.make_module, config), data, recorder, callbacks)
        if is_first_process(config):
            record = recorder.record()
            write_whole(folder / FOLD_FILE, lambda path: torch.save(record, path))
            # several times the size of fold.pt, of no more use
            (folder / RESUME_FILE).unlink(missing_ok=True)
        wait_for_each_other(config)
    return read_record(folder / FOLD_FILE)


def finished_record(config: Config, fold: Fold, run_dir: Path) -> Optional[dict]:
    """Return the record of a fold that is finished; RunError where its folder holds another run."""
    folder = fold_folder(run_dir, fold)
    require_same_config(config, folder)
    if not (folder / FOLD_FILE).is_file():
        return None
    record = read_record(folder / FOLD_FILE)
    require_same_tiles(record, TileStore(config.data.store), folder)
    if is_first_process(config):
        say(f"{run_dir.name}, {name_of(fold)}: already finished, val_mcc {record['val_mcc']:.4f}")
    return record


def say(line: str) -> None:
    """Print a line above the bar, where there is one."""
    with tqdm.external_write_mode():
        print(line, flush=True)


def _run_lightning(
    make_module: Callable[[], SegmentationModule],
    data: FoldData,
    recorder: "Recorder",
    more: Sequence[Callback],
) -> None:
    config = recorder.config
    pl.seed_everything(config.train.seed, verbose=False)
    module = make_module()
    module.scored = recorder.fold != ALL
    if config.model.imagenet:
        load_imagenet(module.network, config.model.args["encoder_name"])
    if config.model.pretrained:
        first = read_pretrained(config.model.pretrained, arch_of(config))["state_dict"]
        module.network.load_state_dict(first)
    # in this order: the average is validated, judged and then recorded
    callbacks = [RampedAveraging(config.optim.ema_decay), *_early_stopping(config), recorder, *more]
    trainer = pl.Trainer(
        **trainer_options(config),
        max_epochs=config.train.epochs,
        gradient_clip_val=config.optim.grad_clip or None,
        callbacks=callbacks,
        enable_progress_bar=False,  # `train.side_by_side` shows one over all networks
        enable_checkpointing=False,  # the recorder does it
        enable_model_summary=False,
        logger=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=recorder.folder,
    )
    resume = recorder.folder / RESUME_FILE
    with keyboard_interrupts():
        trainer.fit(module, data.train_loader, data.val_loader, ckpt_path=resume if resume.is_file() else None)


def require_unscored(config: Config) -> None:
    """Raise ConfigError where a setting follows the score, which a network of all tiles has not."""
    found = flatten(to_dict(config))
    schedules = ("cosine", "constant")
    for key, expected in (("train.keep", ("last",)), ("train.early_stop", (0,)), ("optim.schedule", schedules)):
        if found[key] not in expected:
            raise ConfigError(
                f"{key} is {found[key]}, expected {' or '.join(map(str, expected))} where no tile is held out"
            )


def arch_of(config: Config) -> dict:
    """Return the config's network as `solution.build_network` takes it, in plain containers."""
    return {"name": config.model.name, "args": to_dict(config)["model"]["args"]}


def first_normalization(config: Config) -> Optional[dict]:
    """Return the statistics that the first weights were trained with; None where they are random."""
    first = config.model.pretrained
    return read_pretrained(first, arch_of(config))["normalization"] if first else None


def _early_stopping(config: Config) -> list[Callback]:
    patience = config.train.early_stop
    # after validation, not at the end of the epoch: there the checkpoint to resume from is already written
    stop = EarlyStopping("val_mcc", mode="max", patience=patience, check_on_train_epoch_end=False)
    return [stop] if patience else []


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt again: Lightning ends the process and leaves the signal ignored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips and its advice on loader workers, which is wrong for tiles held in memory."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for topic in ("does not have many workers", "LeafSpec", "Checkpoint directory", "sync_dist"):
                warnings.filterwarnings("ignore", f".*{topic}.*")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


class Recorder(Callback):
    """Keeps the history and the best (or last) weights of a fold, and writes the checkpoint to resume from.

    All of it is part of that checkpoint, so a resumed run knows of the epochs before.
    """

    def __init__(self, folder: Path, fold: Fold, config: Config, data: FoldData) -> None:
        """Record the fold's run in `folder`."""
        self.folder = folder
        self.fold = fold
        self.config = config
        self.data = data
        self.ground = seen_ground(config, data.train_ids)
        self.history: list[dict] = []  # a row an epoch
        self.best: dict[str, Any] = {}  # of the epoch kept: epoch, val_mcc, state_dict
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, for Lightning's checkpoint."""
        return {"history": self.history, "best": self.best, "data": self._data_identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run to resume; RunError where it was trained on other tiles."""
        if state_dict["data"] != self._data_identity():
            raise RunError(
                f"{self.folder / RESUME_FILE} was trained on other tiles than {self.config.data.store} holds "
                f"now for fold {self.fold}. Name another folder with --run, or remove {self.folder}."
            )
        self.history = state_dict["history"]
        self.best = state_dict["best"]

    def _data_identity(self) -> dict:
        tiles = {"train_tiles": self.data.train_ids, "val_tiles": self.data.val_ids}
        return {**tiles, "normalization": self.data.normalization}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at once where the run that is resumed had already met its early stop."""
        for callback in trainer.early_stopping_callbacks:
            trainer.should_stop |= callback.wait_count >= callback.patience
        if self.history and trainer.is_global_zero:
            say(f"{name_of(self.fold)}: continues after epoch {len(self.history)}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock."""
        self._started = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the averaged weights where they are the best so far, or whatever they are."""
        score = float(trainer.callback_metrics["val_mcc"])
        better = not self.best or score > self.best["val_mcc"]
        if better or self.config.train.keep == "last":
            weights = _averaging(trainer).network_state()
            self.best = {"epoch": trainer.current_epoch + 1, "val_mcc": score, "state_dict": weights}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add a row to the history and write it, the checkpoint to resume from, and a line of progress."""
        assert isinstance(pl_module, SegmentationModule)
        self.history.append(self._row(trainer, pl_module))
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.folder / RESUME_FILE)  # takes part, and writes nothing
            return
        table = pd.DataFrame(self.history).to_csv(index=False, float_format="%.6g", na_rep="nan")
        write_text(self.folder / HISTORY_FILE, table)
        write_whole(self.folder / RESUME_FILE, lambda path: trainer.save_checkpoint(path))
        say(self._progress_line())

    def _row(self, trainer: pl.Trainer, module: SegmentationModule) -> dict:
        metrics = trainer.callback_metrics
        code_counts, loss = (
            over_processes(self.config, np.asarray(values), module.device)
            for values in (module.code_counts, module.train_loss())
        )
        pixels = code_counts / code_counts.sum()
        return {
            "epoch": trainer.current_epoch + 1,
            "train_loss": float(loss) / self.config.trainer.processes,
            **{name: float(metrics[name]) for name in ("val_loss", "val_mcc")},
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": time.monotonic() - self._started,
            **{f"pixels_{name}": float(pixels[code]) for code, name in CODE_NAMES.items()},
        }

    def _progress_line(self) -> str:
        row, epochs = self.history[-1], self.config.train.epochs
        return (
            f"{name_of(self.fold)}  epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  "
            f"val_loss {row['val_loss']:.4f}  val_mcc {row['val_mcc']:.4f}  "
            f"best {self.best['val_mcc']:.4f} (epoch {self.best['epoch']})  lr {row['lr']:.1e}  "
            f"{row['seconds']:.1f} s"
        )

    def record(self) -> dict:
        """Return the content of `fold.pt`: plain containers, numbers, strings and tensors."""
        return {
            "format": FOLD_FORMAT,
            "arch": arch_of(self.config),
            **input_identity(),
            **self.best,
            "fold": self.fold,
            "scheme": self.config.data.scheme,
            "views": len(VIEWS) if self.config.augment.every_direction else 1,
            **self._data_identity(),
            "ground": self.ground,
            "fingerprint": TileStore(self.config.data.store).fingerprint,
            "epochs": len(self.history),
            "seconds": float(sum(row["seconds"] for row in self.history)),
            "config": to_dict(self.config),
            "versions": versions(),
        }


def _averaging(trainer: pl.Trainer) -> RampedAveraging:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Trainer does not declare it
    return next(callback for callback in callbacks if isinstance(callback, RampedAveraging))


def require_same_config(config: Config, folder: Path) -> None:
    """Raise RunError where a started or finished fold in `folder` was made with other settings."""
    started = [name for name in (FOLD_FILE, RESUME_FILE) if (folder / name).is_file()]
    if not started or not (folder / CONFIG_FILE).is_file():
        return
    keys = differing_keys(config, load_config(folder / CONFIG_FILE))
    if keys:
        raise RunError(
            f"{folder} holds {started[0]} of a run that differs in {', '.join(keys)}. Name another folder "
            f"with --run, go back to the settings in {folder / CONFIG_FILE}, or remove {folder}."
        )


def describe_fold(fold: Fold, data: FoldData) -> str:
    """Return a line on a fold's tiles and the shares of its crops, and on what it cannot learn."""
    shares = dict(zip(SIDES, data.dataset.pixels.shares))
    drawn = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    absent = [f"; no training tile shows {name}: it cannot be learned" for name in data.dataset.pixels.absent]
    held_out = "none" if fold == ALL else name_some(data.val_ids)
    return (
        f"{name_of(fold)}: {len(data.train_ids)} tiles to train on, validation on {held_out}; "
        f"crops drawn around {drawn}{''.join(absent)}"
    )
