"""The grader's environment: finds a Python 3.9 and builds the environment once, outside the repository."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple

GRADER_VERSION = (3, 9)
# For these the pinned packages have wheels: torch 2.0.1 ends with 3.11, numpy 1.26 begins with 3.9.
OLDEST, NEWEST = (3, 9), (3, 11)
PYTHON_VARIABLE = "GRADER_PYTHON"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
NUMPY_2 = "numpy==2.0.2"  # the last for Python 3.9

STAMP = "ready.json"  # written last: an environment without it is half-built
PIP_LOG = "pip.log"
SHOWN_LINES = 5  # of pip's last words


class GraderError(Exception):
    """The check could not be made; the message says what was looked for, what was found and what to do."""


class Interpreter(NamedTuple):
    """A Python that can make virtual environments, and where it was found."""

    path: str
    version: tuple[int, int, int]
    origin: str

    @property
    def label(self) -> str:
        """Its version in words."""
        return "Python " + ".".join(map(str, self.version))


class Environment(NamedTuple):
    """A finished environment. `numpy_2` is a folder that, put first on the path, brings NumPy 2.

    `built` is None where it was there already, else how many seconds it took.
    """

    python: Path
    numpy_2: Path
    built: float | None


# --- Interpreters ---------------------------------------------------------------------------------

PROBE_CODE = "import sys, venv, ensurepip, json; print(json.dumps(sys.version_info[:3]))"


def probe(path: str, origin: str) -> Interpreter | None:
    """Return the interpreter at `path`, or None where it does not run or cannot make environments.

    A shim of pyenv is there for every version and runs only for those that are switched on.
    """
    try:
        done = subprocess.run([path, "-c", PROBE_CODE], capture_output=True, text=True, timeout=60)
        return Interpreter(path, tuple(json.loads(done.stdout)), origin) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def said_by(*command: str) -> str:
    """Return what a command prints, nothing where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def list_pyenv() -> list[str]:
    """Return the Pythons 3.9 that pyenv has installed, the newest first, switched on or not."""
    root = os.environ.get("PYENV_ROOT") or said_by("pyenv", "root")
    if not root:
        return []
    found = Path(root).glob("versions/3.9.*/bin/python3.9")
    return [str(path) for path in sorted(found, key=patch_release, reverse=True)]


def patch_release(path: Path) -> int:
    """Return 18 for .../versions/3.9.18/bin/python3.9, -1 for a pre-release."""
    patch = path.parents[1].name.split(".")[-1]
    return int(patch) if patch.isdigit() else -1


def find_python_3_9() -> Interpreter | None:
    """Return a Python 3.9 from the search path, pyenv or uv, None where there is none that works."""
    places = {"on PATH": [shutil.which("python3.9") or ""], "of pyenv": list_pyenv()}
    places["of uv"] = [said_by("uv", "python", "find", "--no-project", "3.9")]
    for origin, paths in places.items():
        for path in filter(None, paths):
            found = probe(path, origin)
            if found and found.version[:2] == GRADER_VERSION:
                return found
    return None


def named_python() -> Interpreter | None:
    """Return the interpreter that GRADER_PYTHON names, None where it names none.

    Raises:
        GraderError: it names one that does not run.
    """
    path = os.environ.get(PYTHON_VARIABLE)
    if not path:
        return None
    found = probe(path, f"named by {PYTHON_VARIABLE}")
    if found is None:
        raise GraderError(
            f"{PYTHON_VARIABLE}={path}: does not run as a Python with its venv and ensurepip modules; name a "
            "Python 3.9, or unset it to have one searched for"
        )
    return found


def choose_interpreter() -> Interpreter:
    """Return the Python of the grader's version, or the one that runs this if the packages exist for it.

    Raises:
        GraderError: neither can be had.
    """
    chosen = named_python() or find_python_3_9() or probe(sys.executable, "the one that runs this")
    if chosen is None or not OLDEST <= chosen.version[:2] <= NEWEST:
        found = f"{chosen.label} ({chosen.origin})" if chosen else "one without venv and ensurepip"
        raise GraderError(
            f"the check could not be made: looked for Python 3.9 on PATH, in pyenv and in uv, found {found}; "
            "torch 2.0.1 and numpy 1.26 exist for Python 3.9 to 3.11. Install Python 3.9 (`uv python install "
            f"3.9` or `pyenv install 3.9`), or name one in {PYTHON_VARIABLE}"
        )
    return chosen


# --- Building -------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of all cached environments."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glacier-kit"


def environment_folder(interpreter: Interpreter, requirements: str, numpy_2: str) -> Path:
    """Return where the environment belongs: a folder of its own for each list of packages and Python."""
    recipe = json.dumps([requirements, numpy_2, interpreter.version[:2]])
    return cache_folder() / f"grader-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def in_folder(folder: Path, built: float | None) -> Environment:
    """Return the environment that lies in `folder`."""
    return Environment(folder / "venv" / "bin" / "python", folder / "numpy-2", built)


def find_environment(interpreter: Interpreter) -> Environment | None:
    """Return the environment if it is there and whole; nothing is built."""
    folder = environment_folder(interpreter, REQUIREMENTS.read_text(), NUMPY_2)
    return in_folder(folder, None) if is_whole(folder) else None


def is_whole(folder: Path) -> bool:
    """Return whether an environment was built to its end, and its Python is still there."""
    return (folder / STAMP).is_file() and (folder / "venv" / "bin" / "python").exists()


def provide_environment(
    interpreter: Interpreter, requirements: str | None = None, numpy_2: str = NUMPY_2
) -> Environment:
    """Return the environment, built where it is not there yet or was left half-built.

    Args:
        interpreter: the Python to build it with.
        requirements: the text of a requirement list; default: REQUIREMENTS.
        numpy_2: the requirement that is put into a folder of its own; "" for none.

    Raises:
        GraderError: it cannot be built.
    """
    text = REQUIREMENTS.read_text() if requirements is None else requirements
    folder = environment_folder(interpreter, text, numpy_2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if is_whole(folder):
            return in_folder(folder, None)
        started = time.perf_counter()
        try:
            build(interpreter, text, numpy_2, folder)
        except (OSError, subprocess.CalledProcessError) as error:
            status = getattr(error, "returncode", error)
            raise GraderError(
                f"the check could not be made: {folder} could not be built with {interpreter.label} (status "
                f"{status}): {last_words(folder / PIP_LOG)}; is a package index within reach, and is there "
                "room on the disk (5 GB)? It is built again next time"
            ) from error
        seconds = time.perf_counter() - started
        stamp = {"python": interpreter.label, "seconds": round(seconds, 1)}
        (folder / STAMP).write_text(json.dumps(stamp))
    return in_folder(folder, seconds)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two checks do not build in the same folder."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def build(interpreter: Interpreter, requirements: str, numpy_2: str, folder: Path) -> None:
    """Build an environment in `folder`, in place of what is there; pip's words go to a log in it.

    The list is complete, so dependencies are not resolved (--no-deps): nothing unpinned gets in.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "requirements.txt").write_text(requirements)
    environment = in_folder(folder, None)
    with (folder / PIP_LOG).open("wb") as log:
        run_logged([interpreter.path, "-m", "venv", str(folder / "venv")], log)
        # Nor cached by pip: this folder is the cache, and 2 GB twice take longer to write than to fetch.
        options = ["--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
        install = [str(environment.python), "-m", "pip", "install", *options]
        run_logged([*install, "-r", str(folder / "requirements.txt")], log)
        if numpy_2:
            run_logged([*install, "--target", str(environment.numpy_2), numpy_2], log)


def run_logged(command: list[str], log) -> None:
    """Run a command without Python's variables, which belong to another Python; its words go to `log`."""
    subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=clean_variables()
    )


def clean_variables() -> Mapping[str, str]:
    """Return this process's environment variables without those that steer Python."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def last_words(log: Path) -> str:
    """Return the end of pip's log in one line."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return " / ".join(line.strip() for line in lines[-SHOWN_LINES:]) or "nothing was said"
