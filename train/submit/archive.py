"""The zip that is handed in: solution.py and model.pth at its top, and nothing else."""

from __future__ import annotations

import zipfile
from pathlib import Path

from prep.files import write_whole
from solution import MODEL_FILE, KitError
from train.submit.command import (  # noqa: F401 (until train/__main__.py takes them from there)
    add_check_arguments,
    add_submission_arguments,
    run_check,
    run_submission,
)

MEMBERS = ("solution.py", MODEL_FILE)
TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold: the same files make the same zip


class SubmissionError(KitError):
    """The submission cannot be checked or written; the message says why and what to do."""


def refuse_missing(*paths: Path) -> None:
    """Raise SubmissionError where one of the files is not there."""
    for path in paths:
        if not path.is_file():
            raise SubmissionError(
                f"{path}: no such file; train weights with `make train-all`, or name another"
            )


def refuse_existing(out: Path) -> None:
    """Raise SubmissionError where `out` is there already."""
    if out.exists():
        raise SubmissionError(
            f"{out}: is there already; move it away, or replace it with --overwrite (make submission "
            "OVERWRITE=yes)"
        )


def write_submission(solution: Path, weights: Path, out: Path) -> None:
    """Write `out`, a zip of both files, in place of an older one, which stays until the new one is complete.

    The same files make the same bytes. Whether they would be accepted is not asked here: see
    train.submit.check.

    Raises:
        SubmissionError: a file is missing, or the zip does not unpack to what went in.
    """
    refuse_missing(solution, weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {name: path.read_bytes() for name, path in zip(MEMBERS, (solution, weights))}
    write_whole(out, lambda part: write_zip(content, part))
    with zipfile.ZipFile(out) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    if found != content:
        out.unlink()
        raise SubmissionError(f"{out}: did not hold what was written to it; is the disk full or failing?")


def write_zip(content: dict[str, bytes], path: Path) -> None:
    """Write {name in the zip: bytes}, stored: float16 weights hardly shrink, and zlib's versions differ."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, stored in content.items():
            entry = zipfile.ZipInfo(name, TIMESTAMP)
            entry.create_system = 3  # Unix, on Windows too
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, stored)
