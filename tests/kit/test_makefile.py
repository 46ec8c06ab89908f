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
    assert all(f"{name}=" in said for name in ("DATA", "OUT", "RECIPE", "SCHEME", "SET"))


def test_every_target_is_phony():
    (listed,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)", TEXT, re.MULTILINE)
    assert listed.replace("\\\n", " ").split() == ["help", *TARGETS]


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md"))])
def test_documents_name_targets_that_exist(document):
    named = re.findall(r"(?:`|^)make ([a-z][a-z-]*)", (PROJECT / document).read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= set(TARGETS)


@pytest.mark.parametrize("target", ["predict", "preview", "export", "evaluate", "map", "distil", "report", "compare"])
def test_missing_arguments_are_named(target):
    status, said = make(target)
    assert status == 2 and f"make {target} " in said


def test_folders_may_have_spaces_brackets_and_any_letters():
    status, said = make("-n", "predict", "IN=a b (1)", "OUT=gletscher ä")
    assert status == 0 and '"a b (1)" "gletscher ä"' in said


def test_a_missing_store_names_the_command_that_makes_it(tmp_path):
    status, said = make("pretrain", f"HKH={tmp_path}")
    assert status == 2 and "python -m prep hkh" in said


def test_tests_that_make_test_leaves_out_are_run_by_ci():
    for arguments, marker in (([], "not slow"), (["SLOW=yes"], "slow")):
        status, said = make("-n", "test", "PARTS=tests/kit", *arguments)
        assert status == 0 and re.search(rf'pytest .* -m "{marker}" tests/kit$', said, re.MULTILINE)
    steps = (PROJECT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"make test", "make test SLOW=yes"} <= set(steps)
