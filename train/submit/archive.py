"""The zip that is handed in: solution.py and model.pth at its top, and nothing else."""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

from prep.files import sha256, write_whole
from train.submit.assemble import find_solution
from train.submit.check import TOO_SLOW, add_check_arguments, check_and_print
from train.submit.verdict import SUBMITTED, SubmissionError, refuse_missing

SUBMISSION = Path("dist/submission.zip")
TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold: the same files make the same zip


def refuse_existing(out: Path) -> None:
    """Raise SubmissionError where `out` is there already."""
    if out.exists():
        raise SubmissionError(
            f"{out}: is there already; move it away, or replace it with --overwrite (make submission OVERWRITE=yes)"
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
    content = {name: path.read_bytes() for name, path in zip(SUBMITTED, (solution, weights))}
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


def add_submission_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `submission`."""
    add_check_arguments(parser)
    parser.add_argument("--out", type=Path, default=SUBMISSION, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an older zip; default: refuse")
    parser.add_argument("--force", action="store_true", help="write it even if it took too long (only that)")


def run_submission(arguments: argparse.Namespace) -> int:
    """Check the submission and, if nothing failed, write the zip to hand in."""
    out = arguments.out
    if not arguments.overwrite:
        refuse_existing(out)  # before the check, which takes minutes
    with tempfile.TemporaryDirectory(prefix="solution-") as folder:
        solution = find_solution(arguments.solution, arguments.weights, Path(folder))
        failed = check_and_print(arguments, solution)
        if failed and not (arguments.force and failed == {TOO_SLOW}):
            way_out = "; ship it all the same with --force (make submission FORCE=yes)"
            way_out = way_out if failed == {TOO_SLOW} else ""
            print(f"{out}: not written, failed: {', '.join(sorted(failed))}{way_out}", file=sys.stderr)
            return 1
        write_submission(solution, arguments.weights, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256(out)}")
    print("unpack it, and upload model.pth and solution.py to the platform, each in its own field")
    return 0
