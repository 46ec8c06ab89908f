"""The zip that is handed in, and the command line of `check` and `submission`.

It imports only the standard library, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import zipfile
from pathlib import Path

SOLUTION = Path("solution.py")
WEIGHTS = Path("weights/model.pth")
SUBMISSION = Path("dist/submission.zip")
MEMBERS = ("solution.py", "model.pth")  # at the top of the zip
TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold: the same files make the same zip


class SubmissionError(Exception):
    """The submission cannot be checked or written; the message says why and what to do."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_submission(solution: Path, weights: Path, out: Path) -> Path:
    """Write `out`, a zip of both files that unpacks to exactly them, and return it; the same input gives the
    same bytes.

    Whether the files are worth it is not asked here, see train.submit.check.

    Raises:
        SubmissionError: `out` is there already, a file is missing, or the zip holds something else.
    """
    refuse_existing(out)
    return replace_submission(solution, weights, out)


def refuse_existing(out: Path) -> None:
    """Raise SubmissionError where `out` is there already."""
    if out.exists():
        raise SubmissionError(f"{out}: is there already; move it away, or say --overwrite to replace it")


def replace_submission(solution: Path, weights: Path, out: Path) -> Path:
    """As make_submission, in place of an older zip, which stays until the new one is complete.

    Raises:
        SubmissionError: as above, `out` being there apart.
    """
    sources = dict(zip(MEMBERS, (solution, weights)))
    for path in sources.values():
        if not path.is_file():
            raise SubmissionError(
                f"{path}: no such file; train weights with `make train-all`, or name another"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        write_zip(sources, partial)
        verify_zip(sources, partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def write_zip(sources: dict[str, Path], path: Path) -> None:
    """Write {name in the zip: file}, stored: float16 weights hardly shrink, and zlib's versions differ."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, source in sources.items():
            entry = zipfile.ZipInfo(name, TIMESTAMP)
            entry.create_system = 3  # Unix, on Windows too
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, source.read_bytes())


def verify_zip(sources: dict[str, Path], path: Path) -> None:
    """Unpack a zip elsewhere and compare it with what went in.

    Raises:
        SubmissionError: it holds other files or other bytes.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
        found = {str(file.relative_to(folder)): sha256(file) for file in Path(folder).rglob("*")}
    expected = {name: sha256(source) for name, source in sources.items()}
    if found != expected:
        raise SubmissionError(
            f"{path}: unpacks to {found}, expected {expected}; is the disk full or failing?"
        )


# --- Command line ---------------------------------------------------------------------------------


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check`."""
    parser.add_argument("--solution", type=Path, default=SOLUTION, help="default: %(default)s")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="default: %(default)s")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with Band1 ... Band5; default: synthetic tiles of both namings",
    )
    parser.add_argument(
        "--timed-tiles",
        type=int,
        default=25,
        metavar="N",
        help="synthetic 512 x 512 tiles that are segmented under the time budget; default: %(default)s",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that runs the submission; default: this one"
    )


def run_check(arguments: argparse.Namespace) -> int:
    """Run the submission as the grader does and say whether it would be accepted; exit status 1 if not."""
    from train.submit.check import check_submission
    from train.submit.check.budget import WHOLE_BATCH
    from train.submit.check.verdict import count_failures, format_results

    with tempfile.TemporaryDirectory(prefix="check-") as workdir:
        results = check_submission(
            arguments.solution,
            arguments.weights,
            arguments.data,
            Path(workdir),
            arguments.python,
            WHOLE_BATCH._replace(tiles=arguments.timed_tiles),
        )
    print(format_results(results))
    return 1 if count_failures(results) else 0


def add_submission_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `submission`."""
    add_check_arguments(parser)
    parser.add_argument("--out", type=Path, default=SUBMISSION, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an older zip; default: refuse")


def run_submission(arguments: argparse.Namespace) -> int:
    """Check the submission and, if nothing failed, write the zip to hand in."""
    if not arguments.overwrite:
        refuse_existing(arguments.out)  # before the check, which takes minutes
    failed = run_check(arguments)
    if failed:
        print(f"{arguments.out}: not written, the check failed", file=sys.stderr)
        return failed
    write = replace_submission if arguments.overwrite else make_submission
    out = write(arguments.solution, arguments.weights, arguments.out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256(out)}")
    return 0
