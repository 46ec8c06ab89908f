"""Ends runs by SIGKILL at random moments, and looks at what they leave and what the next run makes of it.

The runs are children of a process that has imported all they need, so that a kill meets their work and not
the imports. The moments are spread evenly over the time that a run takes, which is measured all along. What
each leaves has to be whole; the next run has to end with what an undisturbed one does.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from train_helpers import make_store

import solution
from fuzz import rasters, runs
from prep.__main__ import main as prep_main
from prep.store import TileStore
from prep.synthetic.hkh import LABELS_FILE, SCENES_FOLDER, write_hkh_sample
from train.config import load_config, members_of
from train.fit import fit_fold
from train.run import FOLD_FILE, RESUME_FILE

Work = Callable[[], object]
PATIENCE = 300.0  # seconds
WARM_UPS = 3  # undisturbed runs, to learn how long one takes


class Killed:
    """A campaign: kills that met a run at work, runs that ended before theirs, what was left, and the faults.

    `parts` counts the kills in each fifth of the time that a run takes.
    """

    def __init__(self, kills: int, rng: np.random.Generator) -> None:
        """Plan so many kills, one in each of as many equal parts of a run, in random order."""
        self.shares = list((rng.permutation(kills) + rng.random(kills)) / kills)
        self.kills = self.ended = 0
        self.states: Counter = Counter()
        self.parts: Counter = Counter()
        self.faults: list[str] = []
        self.seconds: list[float] = []  # that undisturbed runs took

    def finish(self, work: Work, said: Path) -> None:
        """Run `work` undisturbed, note what goes wrong and how long it takes."""
        started = time.perf_counter()
        self.faults += finish(work, said)
        self.seconds.append(time.perf_counter() - started)

    def kill(self, work: Work, said: Path, share: float, seconds: float | None = None) -> bool:
        """Start `work` and kill it after this share of its time; return whether it was at work."""
        whole = float(np.median(self.seconds[-5:])) if seconds is None else seconds
        caught = kill_after(start(work, said), share * whole)
        self.kills, self.ended = self.kills + caught, self.ended + (not caught)
        self.parts[int(5 * share)] += caught
        return caught

    def kill_surely(self, work: Work, said: Path, share: float, clear: Callable[[], object]) -> bool:
        """Kill like `kill`, from the start after `clear`; earlier where a run was faster than that."""
        for attempt in range(6):
            clear()
            if self.kill(work, said, share * (1 - attempt / 25)):
                return True
        return False


def start(work: Work, said: Path) -> int:
    """Run `work` in a child whose words go to the file `said`; return its process id.

    Its exit status is that which `work` returns, 70 after an exception.
    """
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1), os.dup2(stream, 2)
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Return the exit status of a child, negative the signal that ended it; one that hangs is killed."""
    given_up = time.monotonic() + PATIENCE
    while time.monotonic() < given_up:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> bool:
    """Kill a child after so many seconds; return whether it was still at work."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


def finish(work: Work, said: Path) -> list[str]:
    """Run `work` undisturbed; return what went wrong."""
    status = wait(start(work, said))
    words = said.read_text(errors="replace")
    return [] if status == 0 and "Traceback" not in words else [f"ended with {status}: {words[-800:]}"]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of all files below a folder but hidden ones."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def hidden(folder: Path) -> list[Path]:
    """Return the hidden entries directly in a folder."""
    return [path for path in folder.iterdir() if path.name.startswith(".")] if folder.exists() else []


def grow_old(paths: list[Path]) -> None:
    """Make entries look as if they had been written an hour ago."""
    for path in paths:
        os.utime(path, (time.time() - 3600,) * 2)


# --- solution.py ----------------------------------------------------------------------------------


def kill_solution(seed: int, kills: int, weights: Path, work: Path, tiles: int = 40) -> Killed:
    """Kill the command line all over its run; each next run has to end with the same masks."""
    killed = Killed(kills, np.random.default_rng([seed, 2]))
    data, out, said = work / "kill-in", work / "kill-out", work / "kill-said"
    runs.healthy_tiles(data, tiles, 64)

    def run() -> int:
        return solution.main([str(data), str(out), "--weights", str(weights)])

    for _ in range(WARM_UPS):
        shutil.rmtree(out, ignore_errors=True)
        killed.finish(run, said)
    expected = digests(out)
    for share in killed.shares:
        caught = killed.kill_surely(run, said, share, lambda: shutil.rmtree(out))
        left = digests(out)
        some = f"{1 + 3 * len(left) // (tiles + 1)} of 3 thirds of the masks"
        killed.states["no mask" if not left else "all masks" if left == expected else some] += caught
        broken = [name for name, digest in left.items() if expected.get(name) != digest]
        parts = hidden(out)
        killed.states["unfinished file left"] += bool(parts)
        grow_old(parts)
        killed.faults += [f"kill at {share:.2f}: {name} is no whole mask" for name in broken]
        killed.faults += finish(run, said)
        if digests(out) != expected or hidden(out):
            killed.faults.append(f"kill at {share:.2f}: then {sorted(digests(out))}, {hidden(out)}")
    return killed


def two_solutions(times: int, weights: Path, work: Path) -> list[str]:
    """Run the command line twice at a time into one folder; return what went wrong."""
    data, out = work / "two-in", work / "two-out"
    runs.healthy_tiles(data, 12, 48)

    def run() -> int:
        return solution.main([str(data), str(out), "--weights", str(weights)])

    faults = finish(run, work / "two-said")
    expected = digests(out)
    for _ in range(times):
        shutil.rmtree(out)
        children = [start(run, work / f"two-said{number}") for number in (1, 2)]
        statuses = [wait(child) for child in children]
        if statuses != [0, 0] or digests(out) != expected or hidden(out):
            faults.append(f"two runs ended with {statuses}, {sorted(digests(out))}, {hidden(out)}")
    return faults


# --- prep -----------------------------------------------------------------------------------------


def lay_out_training(data: Path, tiles: int, side: int) -> None:
    """Write whole tiles with phase-1 labels."""
    runs.healthy_tiles(data, tiles, side)
    (data / "label").mkdir()
    rng = np.random.default_rng(0)
    for number in range(tiles):
        label = np.where(rng.random((side, side)) < 0.4, 255, 0).astype(np.float32)
        (data / "label" / f"img{number:03d}.tif").write_bytes(rasters.encode(label, "u1"))


def kill_prep(seed: int, kills: int, work: Path) -> Killed:
    """Kill `prep competition` all over its run, half of the times while it replaces an older store."""
    data = work / "kill-train"
    lay_out_training(data, 24, 64)
    return kill_stores(np.random.default_rng([seed, 3]), kills, ["competition", "--data", str(data)], work)


def kill_hkh(seed: int, kills: int, work: Path) -> Killed:
    """Kill `prep hkh` all over its run, half of the times while it replaces an older store."""
    data = work / "kill-hkh"
    write_hkh_sample(data, 6, 128, seed=1)
    source = ["--scenes", str(data / SCENES_FOLDER), "--labels", str(data / LABELS_FILE)]
    options = [
        "--size",
        "64",
        "--overlap",
        "16",
        "--max-background",
        "1",
        "--min-glacier",
        "0",
        "--jobs",
        "1",
    ]
    return kill_stores(np.random.default_rng([seed, 6]), kills, ["hkh", *source, *options], work)


def kill_stores(rng: np.random.Generator, kills: int, command: list[str], work: Path) -> Killed:
    """Kill a command of prep; the next one has to end with the same bytes, and to leave nothing else."""
    killed = Killed(kills, rng)
    out, said = work / f"kill-{command[0]}-stores" / "store", work / "kill-said"

    def run() -> int:
        return prep_main([*command, "--out", str(out), "--overwrite"])

    for _ in range(WARM_UPS):
        killed.finish(run, said)
    expected = digests(out)
    for share in killed.shares:
        replaces = bool(rng.random() < 0.5)
        clear = (lambda: None) if replaces else (lambda: shutil.rmtree(out, ignore_errors=True))
        caught = killed.kill_surely(run, said, share, clear)
        state = ("a store" if out.exists() else "no store") + (" of an older run" if replaces else "")
        killed.states[state] += caught
        killed.states["unfinished work left"] += bool(hidden(out.parent))
        if out.exists() and digests(out) != expected:
            killed.faults.append(f"kill at {share:.2f}: no whole store: {sorted(digests(out))}")
        killed.finish(run, said)
        if digests(out) != expected or hidden(out.parent):
            killed.faults.append(f"kill at {share:.2f}: then {sorted(digests(out))}, {hidden(out.parent)}")
    if not killed.faults:
        TileStore(out)
    return killed


def two_preps(times: int, work: Path) -> list[str]:
    """Run `prep competition` twice at a time into one store; return what went wrong."""
    data, out = work / "two-train", work / "two-stores" / "store"
    lay_out_training(data, 6, 48)

    def run() -> int:
        return prep_main(["competition", "--data", str(data), "--out", str(out), "--overwrite"])

    faults = finish(run, work / "two-said")
    expected = digests(out)
    for _ in range(times):
        children = [start(run, work / f"two-said{number}") for number in (1, 2)]
        statuses = [wait(child) for child in children]
        words = "".join((work / f"two-said{number}").read_text(errors="replace") for number in (1, 2))
        if set(statuses) - {0, 2} or "Traceback" in words or digests(out) != expected or hidden(out.parent):
            faults.append(f"two preps ended with {statuses}, {hidden(out.parent)}: {words[-800:]}")
    return faults


# --- Training -------------------------------------------------------------------------------------


def kill_training(seed: int, kills: int, work: Path) -> Killed:
    """Kill trainings of four epochs all over their run, some of them again when they go on.

    Each has to end with the scores and weights of an undisturbed one.
    """
    rng = np.random.default_rng([seed, 4])
    killed = Killed(kills, rng)
    store, said = make_store(work / "kill-fold-store", size=64), work / "kill-said"
    smoke = Path(solution.__file__).parent / "train" / "recipes" / "smoke.yaml"
    settings = [f"data.store={store}", "train.epochs=4", "data.steps_per_epoch=1", "data.crop=32"]
    config = members_of(load_config(smoke, settings))["north"][1]
    folder = work / "kill-run"

    def run() -> int:
        fit_fold(config, 0, folder)
        return 0

    for _ in range(WARM_UPS):
        shutil.rmtree(folder, ignore_errors=True)
        killed.finish(run, said)
    expected = training_result(folder / "fold0" / FOLD_FILE)
    for share in killed.shares:
        caught = killed.kill_surely(run, said, share, lambda: shutil.rmtree(folder, ignore_errors=True))
        killed.states[epochs_in(folder / "fold0" / RESUME_FILE)] += caught
        if rng.random() < 0.3:
            left = (1 - share) * float(np.median(killed.seconds))
            again = killed.kill(run, said, float(rng.random()), left)
            killed.states[epochs_in(folder / "fold0" / RESUME_FILE)] += again
        killed.faults += finish(run, said)  # nothing is left to do, or the last step
        found = training_result(folder / "fold0" / FOLD_FILE)
        if found != expected:
            killed.faults.append(f"kill at {share:.2f}: ended with {found}, expected {expected}")
    return killed


def epochs_in(checkpoint: Path) -> str:
    """Return what a checkpoint to resume from holds; reading it shows that it is whole."""
    if not checkpoint.exists():
        return "no checkpoint"
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return f"checkpoint of {content['epoch'] + 1} epochs"


def training_result(path: Path) -> tuple:
    """Return the scores and the digest of the weights of a finished fold."""
    record = torch.load(path, map_location="cpu", weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in sorted(record["state_dict"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return record["val_mcc"], record["epochs"], digest.hexdigest()
