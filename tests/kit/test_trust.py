"""What the kit trusts: no file of others is executed, no shell is built from names, weights are pinned."""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from support import PROJECT, write_model

from prep.files import sha256
from train.submit import reference as release

FORBIDDEN = {
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "joblib.load",
    "torch.hub.load",
    "eval",
    "exec",
}


def python_files() -> list[Path]:
    """Return the project's own Python files: those that git tracks or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    return [PROJECT / name for name in listed.splitlines() if (PROJECT / name).is_file()]


FILES = python_files()


def calls_of(path: Path) -> list[tuple[str, ast.Call]]:
    """Return (name as written, call) of all calls in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> str | None:
    """Return the source of a call's keyword argument, None where it is not given."""
    return next((ast.unparse(given.value) for given in call.keywords if given.arg == name), None)


def test_the_files_are_found():
    names = {str(path.relative_to(PROJECT)) for path in FILES}
    assert {"solution.py", "prep/store.py", "train/fit.py", "tests/kit/test_trust.py"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_no_file_of_others_is_executed(path):
    for name, call in calls_of(path):
        where = f"{path.name}:{call.lineno}: {ast.unparse(call)[:80]}"
        assert name not in FORBIDDEN, where
        if name in ("torch.load", "load") and "torch" in name:
            assert keyword(call, "weights_only") == "True", where
        if name.endswith("load_from_checkpoint") or name.endswith(".read_pickle"):
            pytest.fail(where)
        if not name.endswith(".save"):  # hostile files have to be made
            assert keyword(call, "allow_pickle") in (None, "False"), where
        assert keyword(call, "shell") in (None, "False"), where
        assert keyword(call, "trust_remote_code") is None, where


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_dangerous_readers_are_not_imported_under_another_name(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in imported for alias in node.names}
    assert not names & (FORBIDDEN | {"torch.load", "os.system"})


def test_lightning_resumes_from_plain_containers_only():
    """Its own loader follows torch's default, which has been weights_only since 2.6."""
    required = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    version = re.search(r"^torch==(\d+)\.(\d+)", required, re.MULTILINE)
    assert (int(version[1]), int(version[2])) >= (2, 6)


# --- The weights that are shipped -----------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Return a tiny model with its reference, as a release has it."""
    path = write_model(tmp_path_factory.mktemp("weights") / "model.pth")
    assert release.main(["--weights", str(path), "--write"]) == 0
    return path


@pytest.fixture
def other(weights, tmp_path) -> Path:
    """Return other weights beside the same reference."""
    shutil.copytree(weights.parent, tmp_path / "weights")
    return write_model(tmp_path / "weights" / "model.pth", views=2)


def test_the_card_states_the_sha256_of_the_shipped_weights():
    card = (PROJECT / "weights" / "model_card.md").read_text(encoding="utf-8")
    assert f"SHA-256 `{sha256(PROJECT / 'weights' / 'model.pth')}`" in card


def test_a_reference_is_met_by_its_own_weights_only(weights, other, capsys):
    met = release.check_reference(weights)
    assert met.passed and met.found.startswith("100.0000%")
    assert sum(json.loads(weights.with_name(release.REFERENCE).read_text())["pixels"].values()) == 512 * 512
    assert release.main(["--weights", str(other)]) == 1
    assert "is of other weights" in capsys.readouterr().out
    other.with_name(release.REFERENCE).unlink()
    undecided = release.check_reference(other)
    assert undecided.passed and undecided.doubtful and "--write" in undecided.expected


def test_the_check_of_ones_own_weights_does_not_speak_of_the_release(weights, other):
    assert [result.check for result in release.check_shipped(weights, weights)] == ["reference mask"]
    assert release.check_shipped(other, weights) == release.check_shipped(other, other) == []


def test_a_changed_reference_is_noticed(weights, tmp_path):
    copy = shutil.copytree(weights.parent, tmp_path / "weights") / "model.pth"
    cv2.imwrite(str(copy.with_name(release.REFERENCE_MASK)), np.zeros((512, 512), np.uint8))
    result = release.check_reference(copy)
    assert not result.passed and "was changed" in result.found
