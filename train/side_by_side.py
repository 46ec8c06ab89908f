"""Trains several networks: one after the other, or side by side, each in a process on one thread or on one GPU.

Small batches gain little from more threads, so networks side by side take less time than one after the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from prep.files import write_text, write_whole
from prep.store import TileStore, name_some
from prep.text import plural
from train import kind
from train.config import Config, ConfigError, change_config, load_config, members_of, save_config
from train.data import split_tiles
from train.fit import (
    FROM_LABELS,
    Method,
    finished_record,
    fit_fold,
    require_same_config,
    require_unscored,
    say,
)
from train.hardware import is_first_process, precision_of, threads_of, trainer_options, uses_gpu
from train.module import SegmentationModule
from train.run import ALL, FOLD_FILE, Fold, RunError, fold_folder, name_of, parse_folds, read_record

PROJECT = Path(__file__).resolve().parents[1]
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
STEPS_FILE = "steps.txt"  # in a fold's folder while a process trains it: how many steps it has made


class Job(NamedTuple):
    """One network to train: its config, the folder of its member, and its fold."""

    config: Config
    folder: Path
    fold: Fold

    @property
    def name(self) -> str:
        """What the network is called in what is printed."""
        return f"{self.folder.name}, {name_of(self.fold)}"

    @property
    def steps(self) -> int:
        """How many steps its training has, unless it stops early."""
        return self.config.train.epochs * self.config.data.steps_per_epoch


def jobs_of(
    config: Config, run_dir: Path, folds: Optional[Sequence[Fold]] = None, only: Optional[str] = None
) -> list[Job]:
    """Return the networks of a recipe, or of its member `only`: of these folds, by default of all it needs."""
    members = members_of(config)
    if only not in (None, *members):
        raise ConfigError(f"--member is {only!r}, expected one of {', '.join(members)}")
    return [
        Job(settings, run_dir / name, fold)
        for name, (member, settings) in members.items()
        if only in (None, name)
        for fold in folds or [f for f in kind.kind_folds(config) if f != ALL or member.ship == ALL]
    ]


def fit_jobs(jobs: Sequence[Job], at_once: int, method: Method = FROM_LABELS) -> list[dict]:
    """Train networks, `at_once` side by side; finished ones are kept. Return their records.

    What a process prints is in `<member>/fold<k>.log`. The result is that of one after the other.

    Args:
        jobs: the networks.
        at_once: how many are trained at the same time.
        method: how; side by side it is always from labels.

    Raises:
        ConfigError, train.data.DataError: as `require_possible` raises them.
        RunError: a network failed; the message has the last line of its log.
    """
    require_possible(jobs, at_once)
    todo = [job for job in jobs if not finished_record(job.config, job.fold, job.folder)]
    if todo:
        if is_first_process(jobs[0].config):
            say(describe_training(todo, at_once))
        steps = Steps(todo)
        with steps.bar:
            if at_once == 1:
                for job in todo:
                    counter = StepCounter(partial(steps.show, job))
                    fit_fold(job.config, job.fold, job.folder, [counter], method)
                    steps.show(job, job.steps)
            elif failed := _run(todo, at_once, steps):
                raise RunError(explain_failures([log_of(job) for job in failed]))
    records = [read_record(fold_folder(job.folder, job.fold) / FOLD_FILE) for job in jobs]
    if is_first_process(jobs[0].config):
        print(format_records(records), flush=True)
    return records


def require_possible(jobs: Sequence[Job], at_once: int) -> None:
    """Raise what the first of these networks would end with, before any is trained.

    Raises:
        ConfigError: fewer than one at once is asked for, each would need several devices, they are not there, or
            the network cannot be built.
        train.data.DataError: the store has no such fold.
        RunError: a folder holds a run with other settings.
    """
    if at_once < 1:
        raise ConfigError(f"--jobs is {at_once}, expected 1 or more")
    for job in jobs:
        if at_once > 1 and job.config.trainer.processes > 1:
            raise ConfigError(
                f"--jobs is {at_once}, but each network would take {job.config.trainer.processes} devices; "
                "expected trainer.devices=1 and trainer.num_nodes=1, or --jobs 1"
            )
        trainer_options(job.config)
        split_tiles(TileStore(job.config.data.store), job.config.data.scheme, job.fold)
        require_same_config(job.config, fold_folder(job.folder, job.fold))
        if job.fold == ALL:
            require_unscored(job.config)
    for config in {job.folder: job.config for job in jobs}.values():
        SegmentationModule(config)  # can the network be built?


def describe_training(jobs: Sequence[Job], at_once: int) -> str:
    """Return the first line of a training: how many networks, on what, with how many steps."""
    config = jobs[0].config
    devices = plural(config.trainer.processes, "GPU" if uses_gpu(config) else "CPU")
    threads = config.train.threads or 1 if at_once > 1 else threads_of(config)
    return (
        f"training {plural(len(jobs), 'network')}, {at_once} at once, on {devices}, precision "
        f"{precision_of(config)}, {plural(threads, 'thread')} each; {sum(job.steps for job in jobs):,} steps of "
        f"{config.data.batch_size} crops of {config.data.crop} px in all"
    )


class Steps:
    """The steps of all networks in one bar, whose time left is that of all: every 30 s where there is no terminal."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        """Show the bar of these networks."""
        self.made: dict[tuple[Path, Fold], int] = {}  # by a job's folder and fold
        self.bar = tqdm(
            total=sum(job.steps for job in jobs),
            desc="all networks",
            unit="step",
            smoothing=0,
            mininterval=0.1 if sys.stderr.isatty() else 30,
            disable=not is_first_process(jobs[0].config),
        )

    def show(self, job: Job, made: int) -> None:
        """Take note of a network's steps; those of an earlier run do not count as fast ones."""
        before = self.made.get((job.folder, job.fold), 0)
        self.made[job.folder, job.fold] = made = max(made, before)  # its file goes before its process ends
        if not self.bar.disable:
            self.bar.initial += made if before == 0 else 0
            self.bar.update(made - before)


class StepCounter(Callback):
    """Tells how many steps a network has made, after each."""

    def __init__(self, tell: Callable[[int], Any]) -> None:
        """Call `tell` with the number."""
        self.tell = tell

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Tell it."""
        self.tell(trainer.global_step)


def format_records(records: Sequence[dict]) -> str:
    """Return a table of fitted folds, one a line."""
    lines = [f"{'fold':>4}{'val_mcc':>10}{'epoch':>7}{'of':>4}{'minutes':>9}  validated on"]
    for record in records:
        lines.append(
            f"{record['fold']:>4}{record['val_mcc']:>10.4f}{record['epoch']:>7}"
            f"{record['epochs']:>4}{record['seconds'] / 60:>9.1f}  {name_some(record['val_tiles'])}"
        )
    scores = [record["val_mcc"] for record in records if record["fold"] != ALL]
    if scores:
        lines.append(f"mean{np.mean(scores):>10.4f}")
    return "\n".join(lines)


def _run(jobs: Sequence[Job], at_once: int, steps: Steps) -> list[Job]:
    """Run a process for each job, and return those that failed. On an interruption, the processes are ended."""
    waiting, failed = list(jobs), []
    running: dict[int, tuple[Job, subprocess.Popen]] = {}  # by slot
    try:
        while waiting or running:
            for slot in [slot for slot in range(at_once) if slot not in running][: len(waiting)]:
                job = waiting.pop(0)
                running[slot] = job, start(job, slot)
            for slot, (job, process) in list(running.items()):
                if process.poll() is None:
                    steps.show(job, steps_made(job))
                    continue
                del running[slot]
                say(f"{job.name}: {'failed' if process.returncode else 'done'}")
                if process.returncode:
                    failed.append(job)
                else:
                    steps.show(job, job.steps)
            time.sleep(0.1)
    finally:
        _end([process for _, process in running.values()])
    return failed


def steps_made(job: Job) -> int:
    """Return how many steps the process of a job has made, 0 while it has not begun."""
    path = fold_folder(job.folder, job.fold) / STEPS_FILE
    return int(path.read_text()) if path.is_file() else 0


def start(job: Job, slot: int) -> subprocess.Popen:
    """Start the process of a job on one thread; its slot among those at once decides the GPU."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (fold_folder(job.folder, job.fold) / STEPS_FILE).unlink(missing_ok=True)  # of a process that was killed
    settings = job.folder / f"fold{job.fold}.yaml"
    config = change_config(job.config, {"train": {"threads": job.config.train.threads or 1}}, "--jobs")
    write_whole(settings, lambda part: save_config(config, part))
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **gpu_of(slot)}
    arguments = [str(settings), str(job.folder), str(job.fold)]
    with open(log_of(job), "a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "train.side_by_side", *arguments]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def log_of(job: Job) -> Path:
    """Return the file with what a job's process prints."""
    return job.folder / f"fold{job.fold}.log"


def gpu_of(slot: int) -> dict[str, str]:
    """Return the variable that shows a process its GPU alone, {} where there is none to choose from."""
    gpus = visible_gpus()
    return {GPU_VARIABLE: gpus[slot % len(gpus)]} if len(gpus) > 1 else {}


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    count = torch.cuda.device_count()
    named = os.environ.get(GPU_VARIABLE, "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def explain_failures(logs: Sequence[Path]) -> str:
    """Return a line for each failed process, with the last line of its log."""
    lines = []
    for log in logs:
        text = log.read_text(encoding="utf-8", errors="replace").strip()
        lines.append(f"{log}: {text.splitlines()[-1] if text else 'nothing was printed'}")
    return f"{len(logs)} networks failed; the same command tries them again, and keeps the others.\n" + "\n".join(lines)


if __name__ == "__main__":
    CONFIG, FOLDER, FOLD = load_config(sys.argv[1]), Path(sys.argv[2]), parse_folds(sys.argv[3])[0]
    MADE = fold_folder(FOLDER, FOLD) / STEPS_FILE
    fit_fold(CONFIG, FOLD, FOLDER, [StepCounter(lambda steps: write_text(MADE, str(steps)))])
    MADE.unlink(missing_ok=True)
