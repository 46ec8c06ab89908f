"""What the kit trusts: no file of others is executed, no shell is built from names, weights are pinned."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import PROJECT, write_model

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
    assert {"solution.py", "prep/store.py", "train/fit.py", "tests/test_trust.py"} <= names


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


# --- The pin of the weights -----------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """Return a tiny model with a card that states its SHA-256."""
    path = write_model(tmp_path / "model.pth")
    release.card_of(path).write_text(f"- Size: 1 MB; SHA-256 `{release.sha256(path)}`\n")
    return path


def test_weights_are_those_of_their_card(weights):
    assert release.check_pin(weights).passed and not release.check_pin(weights).doubtful
    write_model(weights, class_bias=(0.0, 0.0, 0.0, 1.0))
    result = release.check_pin(weights)
    assert not result.passed and "not that of model_card.md" in result.found


def test_weights_without_a_card_pass_with_a_warning(weights):
    release.card_of(weights).unlink()
    result = release.check_pin(weights)
    assert result.passed and result.doubtful and "train pack" in result.expected


def test_the_card_that_pack_writes_is_read():
    card = release.card_of(PROJECT / "weights" / "model.pth")
    assert re.fullmatch("[0-9a-f]{64}", release.pinned_sha256(card))


# --- The reference mask ---------------------------------------------------------------------------


def test_a_reference_is_met_by_its_own_weights_only(weights, capsys):
    (undecided,) = release.check_reference(weights)
    assert undecided.passed and undecided.doubtful and "--write" in undecided.expected
    assert release.main(["--weights", str(weights), "--write"]) == 0
    assert sum(release.write_reference(weights)["pixels"].values()) == 512 * 512
    (met,) = release.check_reference(weights)
    assert met.passed and met.found.startswith("100.0000%")
    assert release.main(["--weights", str(weights)]) == 0
    write_model(weights, class_bias=(0.0, 0.0, 0.0, 1.0))
    assert release.main(["--weights", str(weights)]) == 1
    assert "is of other weights" in capsys.readouterr().out


def test_a_changed_reference_is_noticed(weights):
    release.write_reference(weights)
    shutil.copy(weights.parent / release.REFERENCE_MASK, weights.parent / "kept.png")
    release.cv2.imwrite(str(weights.parent / release.REFERENCE_MASK), release.np.zeros((512, 512), "uint8"))
    (result,) = release.check_reference(weights)
    assert not result.passed and "was changed" in result.found
