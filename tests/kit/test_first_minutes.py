"""docs/first-minutes.md: its table is the script's, its commands exist, and an environment that is there is taken."""

import re
import runpy
import shutil
import subprocess

from support import PROJECT

SCRIPT = runpy.run_path(str(PROJECT / ".ci" / "first_minutes.py"))
PAGE = (PROJECT / "docs" / "first-minutes.md").read_text(encoding="utf-8")


def test_the_table_has_the_form_that_the_script_writes():
    part = SCRIPT["START"] + PAGE.split(SCRIPT["START"])[1].split(SCRIPT["END"])[0] + SCRIPT["END"]
    rows = re.findall(r"^\| ([a-z]+) \| `[^`]+` \| ([\d.]+) \|$", part, re.MULTILINE)
    assert rows and {name for name, _ in rows} <= set(SCRIPT["STEPS"])
    about = part.splitlines()[1]
    assert part == SCRIPT["table"]({name: float(minutes) for name, minutes in rows}, about)
    assert re.match(r"On a clean clone of [0-9a-f]{7,} with .*, \d{4}-\d\d-\d\d: \d+ cores, load", about)


def test_every_step_of_the_script_is_on_the_page_and_can_be_made():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    for command in SCRIPT["STEPS"].values():
        assert command.partition(" DATA=")[0] in PAGE + makefile.replace("$(DEMO)", "data/demo")
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


def test_an_environment_with_the_locks_checksum_is_taken_whatever_the_files_times(tmp_path):
    """As in a clone with a link to it: its files are newer than the environment, and git does not list the link."""
    for name in ("Makefile", "requirements.txt", "requirements.lock", ".gitignore"):
        shutil.copyfile(PROJECT / name, tmp_path / name)  # with the times of now
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".venv").symlink_to(tmp_path / "elsewhere")
    wanted = subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True).stdout
    stamp = re.findall(r"touch (\S+)", wanted)[0]
    assert "bash .ci/setup .venv" in wanted and re.fullmatch(r"\.venv/\.ready-\d+", stamp)
    (tmp_path / stamp).touch()
    (tmp_path / "requirements.lock").touch()
    made = subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert "bash" not in made and "setup: done" not in made
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    listed = subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert ".venv" not in listed
    with (tmp_path / "requirements.txt").open("a") as stream:
        stream.write("# changed\n")
    assert (
        "bash .ci/setup" in subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True).stdout
    )
