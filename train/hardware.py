"""On what a run trains: devices, precision, and several processes that share the crops of each step."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from prep.store import locked
from prep.text import plural
from solution import usable_cores
from train.config import Config, ConfigError

LIGHTNING_PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
# Encoders hold layers that no logits depend on, which the plain strategy does not bear.
SEVERAL_PROCESSES = "ddp_find_unused_parameters_true"


def trainer_options(config: Config) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer that `trainer` settings decide.

    Raises ConfigError where they ask for a GPU and there is none, or for more of them than there are.
    """
    trainer = config.trainer
    gpu = uses_gpu(config)
    for key, wanting in (("accelerator", "gpu"), ("precision", "16"), ("sync_batchnorm", True)):
        if getattr(trainer, key) == wanting and not gpu:
            raise ConfigError(f"trainer.{key} is {wanting!r}, which needs a GPU; none is used")
    gpus = torch.cuda.device_count() if gpu else 0
    if trainer.accelerator != "cpu" and trainer.devices > max(1, gpus):
        raise ConfigError(
            f"trainer.devices (make: DEVICES) is {trainer.devices}, found {plural(gpus, 'GPU')}; expected "
            f"{max(1, gpus)} at most, or trainer.accelerator=cpu for as many processes on the CPU"
        )
    alone = trainer.processes == 1  # then no batch system's number of tasks counts
    return {
        "plugins": [LightningEnvironment()] if alone else None,
        "accelerator": "gpu" if gpu else "cpu",
        "devices": trainer.devices,
        "num_nodes": trainer.num_nodes,
        "precision": precision_of(config),
        "strategy": "auto" if alone else SEVERAL_PROCESSES,
        "sync_batchnorm": trainer.sync_batchnorm,
        "use_distributed_sampler": False,  # ours deals the crops out itself
    }


def uses_gpu(config: Config) -> bool:
    """Return whether the run trains on a GPU."""
    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def precision_of(config: Config) -> str:
    """Return Lightning's name of the precision; "auto" is mixed precision on a GPU only.

    bfloat16 is many times slower than float32 on CPUs without instructions for it.
    """
    if config.trainer.precision != "auto":
        return LIGHTNING_PRECISION[config.trainer.precision]
    if not uses_gpu(config):
        return LIGHTNING_PRECISION["32"]
    return LIGHTNING_PRECISION["bf16" if torch.cuda.is_bf16_supported() else "16"]


def threads_of(config: Config) -> int:
    """Return the CPU threads of each process: as the config says, else an equal part of all cores."""
    return config.train.threads or max(1, usable_cores() // config.trainer.devices)


# --- Several processes --------------------------------------------------------------------------------------


def is_first_process(config: Config) -> bool:
    """Return whether this is the process that writes files and says something: of a lone run it always is."""
    return config.trainer.processes == 1 or getattr(rank_zero_only, "rank", 0) == 0


def process_number() -> int:
    """Return the number of this process among those that share each step, 0 where there is only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def wait_for_each_other(config: Config) -> None:
    """Return once all processes of the run are here."""
    if config.trainer.processes > 1 and distributed.is_initialized():
        distributed.barrier()


def over_processes(config: Config, values: np.ndarray, device: torch.device) -> np.ndarray:
    """Return the sums of an array over the processes, in each of them.

    Args:
        config: of the run.
        values: any shape and number type.
        device: of this process, where its group exchanges tensors.
    """
    if config.trainer.processes == 1:
        return values
    total = torch.from_numpy(np.array(values)).to(device)
    distributed.all_reduce(total)
    return total.cpu().numpy()


@contextmanager
def held(folder: Path, config: Config) -> Iterator[bool]:
    """Hold the lock on a run's folder in its first process; yield False where another run holds it."""
    if not is_first_process(config):
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False) as alone:
        yield alone
