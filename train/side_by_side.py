"""Runs several trainings at once: each a process of its own on one thread, and on a GPU where there are some.

Small batches gain little from more threads, so folds side by side take less time than one after the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple, Sequence, TypeVar

import torch
from tqdm import tqdm

from prep.files import write_whole
from train.config import Config, ConfigError, change_config, save_config
from train.fit import RunError, format_records, numbers_of_folds, read_record, require_same_config
from train.run import CONFIG_FILE, FOLD_FILE, fold_folder

PROJECT = Path(__file__).resolve().parents[1]
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"

Item = TypeVar("Item")


class Work(NamedTuple):
    """One process: `python -m <arguments>`, what it prints added to `log`, and what it is called."""

    name: str
    arguments: Sequence[str]
    log: Path


def start(work: Work, slot: int = 0) -> subprocess.Popen:
    """Start the process of some work on one thread; its slot among those at once decides the GPU."""
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **gpu_of(slot)}
    with open(work.log, "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *work.arguments], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def gpu_of(slot: int) -> dict[str, str]:
    """Return the variable that shows a process its GPU alone, {} where there is none to choose from."""
    gpus = visible_gpus()
    return {GPU_VARIABLE: gpus[slot % len(gpus)]} if len(gpus) > 1 else {}


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    count = torch.cuda.device_count()
    named = os.environ.get(GPU_VARIABLE, "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def run_side_by_side(
    items: Sequence[Item],
    jobs: int,
    begin: Callable[[Item, int], subprocess.Popen],
    name: Callable[[Item], str],
    finished: Callable[[Item], None],
) -> list[Item]:
    """Run a process for each item, `jobs` at once, and return the items whose process failed.

    On an interruption, the processes are ended.

    Args:
        items: what to run, in this order.
        jobs: largest number of processes at a time.
        begin: starts the process of an item in a slot, 0 to jobs - 1.
        name: of an item, for the line that says how it ended.
        finished: called after each item whose process did not fail.
    """
    waiting, failed = list(items), []
    running: dict[int, tuple[Item, subprocess.Popen]] = {}  # by slot
    try:
        with tqdm(total=len(waiting), unit="fold", file=sys.stderr, disable=not waiting) as bar:
            while waiting or running:
                for slot in [slot for slot in range(jobs) if slot not in running][: len(waiting)]:
                    item = waiting.pop(0)
                    running[slot] = item, begin(item, slot)
                for slot, (item, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    bar.update()
                    ended = "done" if process.returncode == 0 else "failed"
                    bar.write(f"{name(item)}: {ended}", file=sys.stderr)
                    if process.returncode == 0:
                        finished(item)
                    else:
                        failed.append(item)
                time.sleep(0.1)
    finally:
        _end([process for _, process in running.values()])
    return failed


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
    return (
        f"{len(logs)} folds failed; the same command tries them again, and keeps the others.\n"
        + "\n".join(lines)
    )


# --- The folds of a run -------------------------------------------------------------------------------------


def fit_side_by_side(config: Config, run_dir: Path, folds: Sequence[int] | None, jobs: int) -> list[dict]:
    """Fit folds as `train.fit.fit_all` does, but `jobs` at once, each in a process; return their records.

    Each process has one thread unless `train.threads` says otherwise; what it prints is in
    `run_dir`/fold<k>.log. The result is that of one fold after the other with as many threads.

    Raises:
        ConfigError: fewer than one process is asked for, or each would need several devices.
        RunError: a fold failed; the message has the last line of its log.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}, expected 1 or more")
    if config.trainer.processes > 1:
        raise ConfigError(
            f"--jobs is {jobs}, but each fold would take {config.trainer.processes} devices; expected "
            "trainer.devices=1 and trainer.num_nodes=1, or no --jobs"
        )
    config = change_config(config, {"train": {"threads": config.train.threads or 1}}, "--jobs")
    folds = numbers_of_folds(config) if folds is None else folds
    for fold in folds:
        require_same_config(config, fold_folder(run_dir, fold))
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = run_dir / CONFIG_FILE
    write_whole(settings, lambda part: save_config(config, part))
    works = [work_of(settings, run_dir, fold) for fold in folds]
    failed = run_side_by_side(works, jobs, start, lambda work: work.name, lambda work: None)
    if failed:
        raise RunError(explain_failures([work.log for work in failed]))
    records = [read_record(fold_folder(run_dir, fold) / FOLD_FILE) for fold in folds]
    print(format_records(records), flush=True)
    return records


def work_of(settings: Path, run_dir: Path, fold: int) -> Work:
    """Return the process that fits one fold of a run whose config is in the file `settings`."""
    arguments = ["train", "fit", "--config", settings, "--run", run_dir, f"--folds={fold}"]
    return Work(f"fold {fold}", [str(argument) for argument in arguments], run_dir / f"fold{fold}.log")
