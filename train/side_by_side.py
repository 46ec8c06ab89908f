"""Trains several networks: one after the other, or side by side, each in a process on one thread or on one GPU.

Small batches gain little from more threads, so networks side by side take less time than one after the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from tqdm import tqdm

from prep.files import write_whole
from train.config import Config, ConfigError, change_config, load_config, save_config
from train.fit import fit_folds, format_records, require_same_config
from train.run import FOLD_FILE, Fold, RunError, fold_folder, name_of, parse_folds, read_record

PROJECT = Path(__file__).resolve().parents[1]
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"


class Job(NamedTuple):
    """One network to train: its config, the folder of its member, and its fold."""

    config: Config
    folder: Path
    fold: Fold

    @property
    def name(self) -> str:
        """What the network is called in what is printed."""
        return f"{self.folder.name}, {name_of(self.fold)}"


def fit_jobs(jobs: Sequence[Job], at_once: int) -> list[dict]:
    """Train networks, `at_once` side by side; finished ones are kept. Return their records.

    What a process prints is in `<member>/fold<k>.log`. The result is that of one after the other.

    Raises:
        ConfigError: fewer than one at once is asked for, or each would need several devices.
        RunError: a network failed; the message has the last line of its log.
    """
    if at_once < 1:
        raise ConfigError(f"--jobs is {at_once}, expected 1 or more")
    if at_once == 1:
        return [fit_folds(job.config, job.folder, [job.fold])[0] for job in jobs]
    for job in jobs:
        if job.config.trainer.processes > 1:
            raise ConfigError(
                f"--jobs is {at_once}, but each network would take {job.config.trainer.processes} devices; "
                "expected trainer.devices=1 and trainer.num_nodes=1, or no --jobs"
            )
        require_same_config(job.config, fold_folder(job.folder, job.fold))
    failed = _run(jobs, at_once)
    if failed:
        raise RunError(explain_failures([log_of(job) for job in failed]))
    records = [read_record(fold_folder(job.folder, job.fold) / FOLD_FILE) for job in jobs]
    print(format_records(records), flush=True)
    return records


def _run(jobs: Sequence[Job], at_once: int) -> list[Job]:
    """Run a process for each job, and return those that failed. On an interruption, the processes are ended."""
    waiting, failed = list(jobs), []
    running: dict[int, tuple[Job, subprocess.Popen]] = {}  # by slot
    try:
        with tqdm(total=len(waiting), desc="networks", unit="network", file=sys.stderr) as bar:
            while waiting or running:
                for slot in [slot for slot in range(at_once) if slot not in running][: len(waiting)]:
                    job = waiting.pop(0)
                    running[slot] = job, start(job, slot)
                for slot, (job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        bar.update()
                        bar.write(
                            f"{job.name}: {'failed' if process.returncode else 'done'}", file=sys.stderr
                        )
                        failed += [job] * (process.returncode != 0)
                time.sleep(0.1)
    finally:
        _end([process for _, process in running.values()])
    return failed


def start(job: Job, slot: int) -> subprocess.Popen:
    """Start the process of a job on one thread; its slot among those at once decides the GPU."""
    job.folder.mkdir(parents=True, exist_ok=True)
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
    return (
        f"{len(logs)} networks failed; the same command tries them again, and keeps the others.\n"
        + "\n".join(lines)
    )


if __name__ == "__main__":
    fit_folds(load_config(sys.argv[1]), Path(sys.argv[2]), parse_folds(sys.argv[3]))
