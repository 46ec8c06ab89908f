"""Tabulates the lines of solution.py, prep and train that the tests run: `make coverage`.

The tests run as `make test` runs them, side by side and without the slow ones. Python processes that tests
start are measured as well, unless they run in an environment of their own, as a submission under check does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
TOOL = "coverage==7.17.3"
HOME = PROJECT / ".cache" / "coverage"  # the tool and its data: no part of the kit's environment
TESTS = ["-m", "pytest", "-n", "auto", "--dist", "loadfile", "-m", "not slow"]
SETTINGS = f"""
[run]
data_file = {HOME}/.coverage
parallel = true
patch = _exit
include =
    {PROJECT}/solution.py
    {PROJECT}/prep/*
    {PROJECT}/train/*
"""
# Python imports a module of this name when it starts, so that each process which finds it measures itself.
# Another Python than this one could not load the tool.
HOOK = f"""
import sys

if sys.version_info[:2] == {sys.version_info[:2]}:
    import coverage

    coverage.process_startup()
"""


def install() -> None:
    """Put the tool, its settings and its hook where only this program's processes find them."""
    if not (HOME / "coverage").is_dir():
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*command, "--no-deps", "--target", str(HOME), TOOL], check=True)
    (HOME / "settings").write_text(SETTINGS, encoding="utf-8")
    (HOME / "sitecustomize.py").write_text(HOOK, encoding="utf-8")


def run_python(*arguments: str, measured: bool = False) -> int:
    """Run Python with the tool in reach, itself measured or not; return its exit status."""
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    if measured:
        environment["COVERAGE_PROCESS_START"] = str(HOME / "settings")
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=PROJECT).returncode


def run_tool(*arguments: str) -> int:
    """Run a command of the tool on what was measured."""
    return run_python("-m", "coverage", *arguments, f"--rcfile={HOME / 'settings'}")


def main(parts: list[str]) -> int:
    """Run the tests, or the files named, and print the table; return the exit status of the tests."""
    install()
    run_tool("erase")
    status = run_python(*TESTS, *parts, measured=True)
    run_tool("combine", "--quiet")
    run_tool("report", "--show-missing", "--skip-empty")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
