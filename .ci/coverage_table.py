"""Tabulates the lines of solution.py, prep and train that no test runs: `make coverage`.

Each test file runs in a process of its own, so that a slow or broken one costs its own lines only. What tests
do in processes that they start themselves is not seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
TOOL = "coverage==7.17.3"
HOME = PROJECT / ".cache" / "coverage"  # the tool and its data: no part of the kit's environment
SOURCES = "solution.py,prep/*,train/*"
SECONDS = 600  # for each test file


def install() -> None:
    """Put the tool where only this program finds it."""
    if not (HOME / "coverage").is_dir():
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*command, "--no-deps", "--target", str(HOME), TOOL], check=True)


def run_coverage(*arguments: str, seconds: float | None = None) -> int:
    """Run the tool with the project's modules; return its exit status, -1 where it took too long."""
    environment = {**os.environ, "PYTHONPATH": str(HOME), "COVERAGE_FILE": str(HOME / ".coverage")}
    command = [sys.executable, "-m", "coverage", *arguments]
    try:
        return subprocess.run(command, env=environment, cwd=PROJECT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return -1


def main(parts: list[str]) -> int:
    """Run the tests, or the files named, and print the table; return 1 where a test failed."""
    install()
    run_coverage("erase")
    files = parts or sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "tests").glob("test_*.py"))
    measured = ["run", "--parallel-mode", f"--include={SOURCES}", "-m", "pytest", "-q"]
    failed = [name for name in files if run_coverage(*measured, name, seconds=SECONDS) != 0]
    run_coverage("combine")
    run_coverage("report", "--show-missing", "--skip-empty")
    print(f"{len(files)} test files, failed or took too long: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
