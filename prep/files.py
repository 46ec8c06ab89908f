"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Callable

import numpy as np


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, then rename it: `path` appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file of text, UTF-8, in a folder that is made where missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a file of JSON, in a folder that is made where missing."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy."""

    def save(part: Path) -> None:
        with open(part, "wb") as stream:  # np.save would add .npy to a path
            np.save(stream, array)

    write_whole(path, save)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
