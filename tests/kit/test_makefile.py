"""The Makefile's help and what it says where something is missing; nothing is installed or trained."""

import re
import subprocess

import pytest
from support import PROJECT

TEXT = (PROJECT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):.*## ", TEXT, re.MULTILINE)


def make(*arguments):
    """Run make without a look at the environment; return its exit status and what it said."""
    command = ["make", "--no-print-directory", "-o", "setup", *arguments]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def test_help_lists_every_target_in_its_group():
    status, said = make()
    assert status == 0
    assert re.findall(r"^  make ([a-z-]+) +\S", said, re.MULTILINE) == TARGETS
    assert len(re.findall(r"^##@ ", TEXT, re.MULTILINE)) == 6
    assert all(f"{name}=" in said for name in ("DATA", "OUT", "CONFIG", "DEVICES", "SET"))


def test_every_target_is_phony():
    (listed,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)", TEXT, re.MULTILINE)
    assert listed.replace("\\\n", " ").split() == TARGETS


@pytest.mark.parametrize(
    "document", ["README.md", *(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md"))]
)
def test_documents_name_targets_that_exist(document):
    named = re.findall(
        r"(?:`|^)make ([a-z-]+)", (PROJECT / document).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(named) <= set(TARGETS)


@pytest.mark.parametrize("target", ["prep", "fit", "train-all"])
def test_missing_tiles_are_named_with_what_to_do(target, tmp_path):
    status, said = make(target, f"DATA={tmp_path / 'none'}", f"STORE={tmp_path / 'store'}")
    assert status == 2 and f"make {target} DATA=<folder" in said and "make demo" in said


@pytest.mark.parametrize("target", ["predict", "preview", "export", "score"])
def test_missing_arguments_are_named(target):
    status, said = make(target)
    assert status == 2 and f"make {target} " in said


def test_a_missing_store_names_the_command_that_makes_it(tmp_path):
    status, said = make("pretrain", f"HKH={tmp_path}")
    assert status == 2 and "python -m prep hkh" in said


def test_tests_that_make_test_leaves_out_are_run_by_make_test_slow_and_by_ci():
    status, said = make("-n", "test", "test-slow", "PARTS=tests/test_lock.py")
    assert status == 0
    selections = re.findall(r"pytest .* -m (\"not slow\"|slow) tests/test_lock\.py$", said, re.MULTILINE)
    assert selections == ['"not slow"', "slow"]
    steps = (PROJECT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"make test", "make test-slow"} <= set(steps)
