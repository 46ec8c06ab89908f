"""The commands `check`, `submission`, `grader-check` and `bench`.

What they run is imported as they begin, so that --help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

WEIGHTS = Path("weights/model.pth")
SUBMISSION = Path("dist/submission.zip")


def add_submission_files(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands that run a submission."""
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="default: %(default)s")
    parser.add_argument("--data", type=Path, help="folder with Band1 ... Band5; default: synthetic tiles")
    parser.add_argument(
        "--solution", type=Path, help="default: the kit's, with the networks put in that the weights name"
    )


def find_solution(arguments: argparse.Namespace, folder: str) -> Path:
    """Return the solution.py to check: the one named, else the one that belongs to the weights."""
    if arguments.solution:
        return arguments.solution

    from solution import find_weights, read_model_file
    from train.submit.assemble import write_solution

    return write_solution(read_model_file(find_weights(arguments.weights)), Path(folder) / "solution.py")


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check`."""
    add_submission_files(parser)
    parser.add_argument(
        "--timed-tiles", type=int, default=25, metavar="N", help="tiles of the timed run (default: 25)"
    )


def run_check(arguments: argparse.Namespace) -> int:
    """Run the submission as the grader does and say whether it would be accepted; exit status 1 if not."""
    with tempfile.TemporaryDirectory(prefix="solution-") as folder:
        return 1 if check(arguments, find_solution(arguments, folder)) else 0


def check(arguments: argparse.Namespace, solution: Path) -> set[str]:
    """Check a submission, print the table, and return the names of the checks that failed."""
    from train.submit.check import check_submission
    from train.submit.verdict import format_results, list_failures

    with tempfile.TemporaryDirectory(prefix="check-") as workdir:
        given = (arguments.weights, arguments.data, Path(workdir), arguments.timed_tiles)
        results = check_submission(solution, *given)
    print(format_results(results))
    return {result.check for result in list_failures(results)}


def add_submission_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `submission`."""
    add_check_arguments(parser)
    parser.add_argument("--out", type=Path, default=SUBMISSION, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an older zip; default: refuse")
    parser.add_argument("--force", action="store_true", help="write it even if it took too long (only that)")


def run_submission(arguments: argparse.Namespace) -> int:
    """Check the submission and, if nothing failed, write the zip to hand in."""
    from prep.files import sha256
    from train.submit.archive import refuse_existing, write_submission
    from train.submit.check import TOO_SLOW

    out = arguments.out
    if not arguments.overwrite:
        refuse_existing(out)  # before the check, which takes minutes
    with tempfile.TemporaryDirectory(prefix="solution-") as folder:
        solution = find_solution(arguments, folder)
        failed = check(arguments, solution)
        if failed and not (arguments.force and failed == {TOO_SLOW}):
            way_out = "; ship it all the same with --force (make submission FORCE=yes)"
            way_out = way_out if failed == {TOO_SLOW} else ""
            print(f"{out}: not written, failed: {', '.join(sorted(failed))}{way_out}", file=sys.stderr)
            return 1
        write_submission(solution, arguments.weights, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256(out)}")
    print("unpack it, and upload model.pth and solution.py to the platform, each in its own field")
    return 0


def add_grader_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `grader-check`."""
    add_submission_files(parser)
    parser.add_argument("--tiles", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="px, of synthetic ones (default: %(default)s)")
    parser.add_argument(
        "--optional", action="store_true", help="where Python 3.9 or its packages cannot be had, end well"
    )


def run_grader_check(arguments: argparse.Namespace) -> int:
    """Run the submission under Python 3.9 and the grader's packages, read-only and without network; exit
    status 1 where a caller fails or the masks are others than here."""
    from train.submit.grader import Tiles, grader_check

    tiles = Tiles(arguments.data, arguments.tiles, arguments.size)
    with tempfile.TemporaryDirectory(prefix="solution-") as folder:
        solution = find_solution(arguments, folder)
        return grader_check(solution, arguments.weights, tiles, arguments.optional)


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench`."""
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="default: %(default)s")
    parser.add_argument("--data", type=Path, help="folder with Band1 ... Band5; default: synthetic tiles")
    parser.add_argument("--tiles", type=int, default=25, help="how many (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="px, of synthetic ones (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("reports/local/bench.md"), help="default: %(default)s"
    )


def run_bench(arguments: argparse.Namespace) -> int:
    """Time solution.py: by stage, against its bare forward passes, and against this command's last run."""
    from train.submit.bench import bench

    print(bench(arguments.weights, arguments.data, arguments.tiles, arguments.size, arguments.out))
    return 0
