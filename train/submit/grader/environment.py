"""The grader's environment: finds a Python 3.9 and builds the environment once, outside the repository."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from solution import KitError

GRADER_VERSION = "3.9."
PYTHON_VARIABLE = "GRADER_PYTHON"
REQUIREMENTS = Path(__file__).with_name("requirements.txt").read_text()
STAMP = "ready"  # written last: an environment without it is half-built
PIP_LOG = "pip.log"
SHOWN_LINES = 5  # of pip's last words
PROBE_CODE = "import platform, venv, ensurepip; print(platform.python_version())"


class GraderError(KitError):
    """The check could not be made; the message says what was looked for, what was found and what to do."""


class Interpreter(NamedTuple):
    """A Python 3.9 that can make virtual environments."""

    path: str
    label: str


def said_by(*command: str) -> str:
    """Return what a command prints, nothing where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def probe(path: str) -> Interpreter | None:
    """Return the interpreter at `path`, or None where it does not run, is no Python 3.9, or cannot make
    environments.

    A shim of pyenv is there for every version and runs only for those that are switched on.
    """
    version = said_by(path, "-c", PROBE_CODE) if path else ""
    return Interpreter(path, f"Python {version}") if version.startswith(GRADER_VERSION) else None


def find_python_3_9() -> Interpreter | None:
    """Return a Python 3.9 from the search path, pyenv or uv, None where there is none that works."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv").glob("versions/3.9.*/bin/python3.9")
    paths = [shutil.which("python3.9") or "", *map(str, sorted(pyenv))]
    found = filter(None, map(probe, paths))
    return next(found, None) or probe(said_by("uv", "python", "find", "--no-project", "3.9"))


def choose_interpreter() -> Interpreter:
    """Return the Python 3.9 that GRADER_PYTHON names, else one that is found.

    Raises:
        GraderError: there is none.
    """
    named = os.environ.get(PYTHON_VARIABLE, "")
    chosen = probe(named) if named else find_python_3_9()
    if chosen is None:
        raise GraderError(
            (f"{PYTHON_VARIABLE}={named}" if named else "looked on PATH, in pyenv and in uv")
            + ": found no Python 3.9 that runs, with its modules venv and ensurepip; install one (`uv python "
            f"install 3.9` or `pyenv install 3.9`), or name one in {PYTHON_VARIABLE}"
        )
    return chosen


def environment_folder(requirements: str) -> Path:
    """Return where the environment belongs: a folder of its own for each list of packages."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glacier-kit"
    return cache / f"grader-{hashlib.sha256(requirements.encode()).hexdigest()[:12]}"


def find_environment(requirements: str = REQUIREMENTS) -> Path | None:
    """Return the environment's Python if it is there and was built to its end; nothing is built."""
    folder = environment_folder(requirements)
    python = folder / "venv" / "bin" / "python"
    return python if (folder / STAMP).is_file() and python.exists() else None


def provide_environment(interpreter: Interpreter, requirements: str = REQUIREMENTS) -> Path:
    """Return the environment's Python; the environment is built where it is not there or was left half-built.

    Raises:
        GraderError: it cannot be built.
    """
    folder = environment_folder(requirements)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two checks do not build in the same folder
        if find_environment(requirements) is None:
            print(f"building {folder} once: 2 GB to download, 4 GB of disk, minutes", file=sys.stderr)
            try:
                build(interpreter, requirements, folder)
            except (OSError, subprocess.CalledProcessError) as error:
                log = folder / PIP_LOG
                words = log.read_text(errors="replace").split("\n") if log.is_file() else []
                raise GraderError(
                    f"{folder} could not be built with {interpreter.label} ({error}): "
                    f"{' / '.join(words[-SHOWN_LINES:])}; is a package index within reach, and is there room "
                    "on the disk (5 GB)? It is built again next time"
                ) from error
            (folder / STAMP).write_text(interpreter.label)
    return folder / "venv" / "bin" / "python"


def build(interpreter: Interpreter, requirements: str, folder: Path) -> None:
    """Build an environment in `folder`, in place of what is there; pip's words go to a log in it.

    The list is complete, so dependencies are not resolved (--no-deps): nothing unpinned gets in. Nor does pip
    cache what it fetches: this folder is the cache, and 2 GB twice take longer to write than to fetch.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "requirements.txt").write_text(requirements)
    options = ["--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    packages = ["-r", str(folder / "requirements.txt")]
    # Python's variables belong to another Python.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with (folder / PIP_LOG).open("wb") as log:
        for command in (
            [interpreter.path, "-m", "venv", str(folder / "venv")],
            [str(folder / "venv" / "bin" / "python"), "-m", "pip", "install", *options, *packages],
        ):
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables)
