"""Times the steps of docs/first-minutes.md on a clean clone, and writes them into its table.

python .ci/first_minutes.py                                      # print the table of all steps but the training
python .ci/first_minutes.py --data ../shared/.../Train --write   # train too (hours), and write it into the page
python .ci/first_minutes.py --venv .venv --steps sample,score    # some steps, in an environment that is there
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PAGE = PROJECT / "docs" / "first-minutes.md"
START, END = "<!-- made by .ci/first_minutes.py -->\n", "<!-- end -->"
HEAD = "| step | command | minutes |\n| --- | --- | --- |\n"
# Name: command in the clone, as the page has it. DATA is the folder that --data names.
STEPS = {
    "setup": "make setup",
    "sample": "python -m prep sample --out data/demo/scenes --tiles 6 --size 256",
    "demo": "make demo",
    "score": "make evaluate MASKS=data/demo/masks LABELS=data/demo/scenes IN=data/demo/scenes",
    "submission": "make submission",
    "training": "make train-all DATA=DATA WEIGHTS=runs/mine.pth JOBS=2",
}


def clone(folder: Path, venv: Path | None) -> None:
    """Clone what is committed, with a link to an environment where one is given."""
    subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(folder)], check=True)
    if venv:
        (folder / ".venv").symlink_to(venv.resolve())


def time_step(command: str, folder: Path) -> float:
    """Return the minutes that a command takes; it ends this program where the command fails."""
    print(f"$ {command}", file=sys.stderr, flush=True)
    words = re.sub(r"^python ", f"{folder}/.venv/bin/python ", command).split()
    started = time.monotonic()
    status = subprocess.run(words, cwd=folder, stdout=sys.stderr).returncode
    if status:
        sys.exit(f"{command}: exit status {status}, expected 0; nothing is written")
    return (time.monotonic() - started) / 60


def table(minutes: dict[str, float], about: str) -> str:
    """Return the part of the page: where it was measured, and a row for each step that was."""
    rows = [f"| {name} | `{STEPS[name]}` | {value:.1f} |\n" for name, value in minutes.items()]
    return f"{START}{about}\n\n{HEAD}{''.join(rows)}{END}"


def describe_machine(venv: Path | None) -> str:
    """Return the line on where and when it was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
    there = "an environment that was there" if venv else "nothing installed"
    return (
        f"On a clean clone of {commit.stdout.strip()} with {there}, {date.today()}: {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f} before, {platform.machine()}, Python {platform.python_version()}."
    )


def main() -> None:
    """Time the steps asked for; print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="real tiles with labels, for the step `training`")
    parser.add_argument("--venv", type=Path, help="an environment to use, so that `setup` has nothing to do")
    parser.add_argument("--steps", help=f"some of {','.join(STEPS)} (default: all that can be made)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/first-minutes.md")
    options = parser.parse_args()
    names = options.steps.split(",") if options.steps else [n for n in STEPS if n != "training" or options.data]
    if unknown := [name for name in names if name not in STEPS or (name == "training" and not options.data)]:
        parser.error(f"--steps: found {unknown[0]}, expected some of {', '.join(STEPS)}; training needs --data")
    about = describe_machine(options.venv)
    with tempfile.TemporaryDirectory(prefix="first-minutes-") as temporary:
        folder = Path(temporary) / "kit"
        clone(folder, options.venv)
        data = f"DATA='{options.data.resolve()}'" if options.data else "DATA=DATA"
        minutes = {name: time_step(STEPS[name].replace("DATA=DATA", data), folder) for name in names}
    made = table(minutes, about)
    if not options.write:
        print(made)
        return
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{made}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
