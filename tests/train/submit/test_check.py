"""Tests of train.submit: an honest submission passes, each sabotage is caught by name."""

import argparse
import os
import sys
import zipfile
from pathlib import Path

import pytest
import support
import torch

from train.submit import archive as submission
from train.submit.check import check_case, check_submission
from train.submit.check.budget import Batch
from train.submit.check.callers import COMMAND_LINES, check_command_line, check_maskgeration
from train.submit.check.cases import lay_out_case
from train.submit.check.masks import judge_agreement
from train.submit.check.processes import CLOSED_PORT, Candidate, copy_submission, run_bare
from train.submit.check.verdict import CheckResult, format_results
from train.submit.check.weights import check_damaged_command, check_loading, check_size, make_damaged_weights

# A whole submission without a network, so that its processes start at once. `model.pth` is text: the level of
# the blue band above which a pixel is ice. Each sabotage below replaces one piece of it.
HONEST = """
import pathlib, sys
import numpy as np
import tifffile

class InputError(Exception):
    pass

def read_model_file(path):
    text = pathlib.Path(path).read_text() if pathlib.Path(path).is_file() else "absent"
    if not text.startswith("level ") or not text.endswith(" end"):
        raise InputError("damaged weights")
    keys = dict.fromkeys(["format", "members", "passes", "class_bias", "postprocess", "provenance"])
    keys["members"] = [dict.fromkeys(["arch", "weight", "fold", "val_mcc", "normalization", "state_dict"])]
    keys["provenance"] = dict.fromkeys(["tiles", "scheme", "config", "versions"])
    return {**keys, "level": float(text.split()[1])}

def load_model(path):
    return read_model_file(path)["level"]

def segment(paths, level):
    bands = np.stack([tifffile.imread(path) for path in paths])
    mask = np.where(bands[0] > level, 85, 0).astype(np.uint8)
    mask[(bands == 0).all(axis=0)] = 0
    return mask

def run(folders, level):
    bands = [sorted(pathlib.Path(folders["Band%d" % n]).iterdir()) for n in range(1, 6)]
    return {paths[0].name: segment(paths, level) for paths in zip(*bands)}

def tile_id(name):
    stem = name[:-4]
    return stem[3:] if stem.startswith("img") else stem[-5:]

def write(masks, out, suffix):
    out.mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        path = (out / name).with_suffix(suffix)
        if suffix == ".png":
            import cv2
            cv2.imwrite(str(path), mask)
        else:
            tifffile.imwrite(path, mask)

def folders_of(data):
    return {"Band%d" % n: pathlib.Path(data) / ("Band%d" % n) for n in range(1, 6)}

def maskgeration(imagepath, second):
    folders = imagepath if isinstance(imagepath, dict) else folders_of(imagepath)
    is_folder = pathlib.Path(second).is_dir()
    masks = run(folders, load_model("model.pth" if is_folder else second))
    if is_folder:
        write(masks, pathlib.Path(second), ".tif")
    return {tile_id(name): mask for name, mask in masks.items()}

def main(arguments):
    named = arguments[0].startswith("--")
    data, out = (arguments[1], arguments[-1]) if named else arguments
    try:
        level = load_model("model.pth")
    except InputError as error:
        print("error:", error, file=sys.stderr)
        return 2
    masks = run(folders_of(data), level)
    write(masks, pathlib.Path(out), ".tif" if named else ".png")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
RETURNED = "return {tile_id(name): mask for name, mask in masks.items()}"
READ_LEVEL = 'return read_model_file(path)["level"]'
ZEROED = "    mask[(bands == 0).all(axis=0)] = 0\n"
NAMED = "path = (out / name).with_suffix(suffix)"

# (name, piece of HONEST, what stands there instead, checks that must fail)
CALLER_SABOTAGES = [
    ("type", "astype(np.uint8)", "astype(np.int32)", {"type"}),
    ("values", "level, 85, 0)", "level, 1, 0)", {"values"}),
    (
        "skipped tile",
        "for paths in zip(*bands)}",
        "for paths in list(zip(*bands))[1:]}",
        {"a mask for every tile"},
    ),
    (
        "extra file",
        "    for name, mask in masks.items():\n",
        ('    (out / "notes.txt").write_text("done")\n    for name, mask in masks.items():\n'),
        {"nothing else"},
    ),
    ("nodata", ZEROED, ZEROED.replace("= 0\n", "= 170\n"), {"nodata is 0"}),
    ("name", NAMED, NAMED.replace("name)", '("mask_" + name))'), {"a mask for every tile", "nothing else"}),
    ("list", RETURNED, "return list(masks.values())", {"returns a dict"}),
    ("tile ids", RETURNED, "return masks", {"a mask for every tile", "nothing else"}),
    ("paths for masks", RETURNED, "return {tile_id(name): name for name in masks}", {"readable"}),
    (
        "inputs",
        "    mask[(bands",
        "    import os; os.chmod(paths[0], 0o644); os.utime(paths[0]);\n    mask[(bands",
        {"inputs untouched"},
    ),
    (
        "stray file",
        'level = load_model("model.pth")\n',
        (
            'level = load_model("model.pth")\n'
            "        import os; os.chmod('.', 0o755); open('log.txt', 'w').close()\n"
        ),
        {"nothing written beside it"},
    ),
    ("shape", ZEROED, ZEROED + "    mask = mask[:-1]\n", {"shape"}),
    (
        "warning",
        "    masks = run(folders_of(data), level)\n",
        ("    masks = run(folders_of(data), level)\n    print('warning: a tile was guessed')\n"),
        {"no fallback"},
    ),
    ("status", "    return 0\n", "    return 1\n", {"exit status"}),
    (
        "one caller differs",
        "masks = run(folders_of(data), level)\n",
        ("masks = run(folders_of(data), level + 4000 * named)\n"),
        {"all callers agree"},
    ),
    ("dead model", "level, 85, 0)", "1e9, 85, 0)", {"classes"}),
]
WEIGHT_SABOTAGES = [
    (
        "random weights",
        READ_LEVEL,
        (
            'try:\n        return read_model_file(path)["level"]\n'
            "    except InputError:\n        return 12345.0"
        ),
        {"refused", "no masks"},
    ),
    ("incomplete weights", '"class_bias", ', "", {"contents"}),
    (
        "not strict",
        "def load_model",
        "def load_anything",
        {"strict loading", "exit status", "returns a dict"},
    ),
]


@pytest.fixture(scope="session")
def tiles(tmp_path_factory) -> Path:
    """Two synthetic tiles with the platform's names."""
    folder = tmp_path_factory.mktemp("tiles")
    for index in range(2):
        support.write_tile(folder, f"{index + 1:03d}", support.scene_numbers(index))
    return folder


def write_submission(folder: Path, code: str) -> tuple[Path, Path]:
    """Write a submission without a network, return its two files."""
    folder.mkdir()
    (folder / "solution.py").write_text(code)
    (folder / "model.pth").write_text("level 25000 end")
    return folder / "solution.py", folder / "model.pth"


def run_check(tmp_path: Path, code: str, tiles: Path | None) -> list[CheckResult]:
    """Check a submission without a network."""
    (tmp_path / "work").mkdir()
    files = write_submission(tmp_path / "handed in", code)
    return check_submission(*files, tiles, tmp_path / "work", batch=Batch(2, 64))


def test_an_honest_submission_passes_with_both_naming_styles(tmp_path, capsys):
    results = run_check(tmp_path, HONEST, None)
    assert [result for result in results if not result.passed] == []
    subjects = {result.subject for result in results}
    assert {
        f"{naming} names: {line.label}" for naming in ("training", "platform") for line in COMMAND_LINES
    } < (subjects)
    assert "platform names: maskgeration(bands, model.pth)" in subjects
    assert "training names: maskgeration(bands, OUT), files" in subjects
    progress = capsys.readouterr().err.splitlines()
    assert progress[0].startswith("[1/13]") and progress[-1].startswith("[13/13]")


def sabotages(rows: list[tuple]):
    """Return a decorator that runs a test for each of `rows`."""
    names = [row[0] for row in rows]
    return pytest.mark.parametrize("piece, instead, caught", [row[1:] for row in rows], ids=names)


def assert_caught(results: list[CheckResult], caught: set[str]) -> None:
    """Assert that the checks `caught` failed and that the table says so."""
    assert caught <= {result.check for result in results if not result.passed}
    table = format_results(results)
    assert "NOT be accepted" in table
    assert all(f"  {name}: found " in table for name in caught)


@sabotages(CALLER_SABOTAGES)
def test_a_sabotaged_caller_is_caught_by_name(tmp_path, tiles, piece, instead, caught):
    assert HONEST.count(piece) == 1
    files = write_submission(tmp_path / "handed in", HONEST.replace(piece, instead))
    case = lay_out_case("two tiles", tiles, tmp_path / "tiles")
    candidate = Candidate(*files, tmp_path, sys.executable, lambda text: None)
    assert_caught(check_case(candidate, case)[0], caught)


@sabotages(WEIGHT_SABOTAGES)
def test_a_sabotaged_loader_is_caught_by_name(tmp_path, tiles, piece, instead, caught):
    assert HONEST.count(piece) == 1
    assert_caught(run_check(tmp_path, HONEST.replace(piece, instead), tiles), caught)


def test_weights_over_the_limit_fail(tmp_path):
    weights = tmp_path / "model.pth"
    with weights.open("wb") as stream:  # sparse: takes no room on the disk
        stream.truncate(300_000_001)
    result = check_size(weights)
    assert (result.check, result.passed) == ("size", False)
    with weights.open("wb") as stream:
        stream.truncate(300_000_000)
    assert check_size(weights).passed


@pytest.fixture
def one_core():
    """Let this process and its children use one core: threads that wait for a busy one cost minutes."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.slow
def test_the_kits_own_solution_passes(tmp_path, tiles, one_core):
    """Its real processes: loading, one command line, the platform's way, damaged weights."""
    content = support.model_content()
    content["members"][0].update(fold=0, val_mcc=0.0)
    content["provenance"] = {"tiles": ["001"], "scheme": "stratified", "config": {}, "versions": {}}
    torch.save(content, tmp_path / "model.pth")
    case = lay_out_case("tiny", tiles, tmp_path / "tiny")
    candidate = Candidate(
        support.PROJECT / "solution.py", tmp_path / "model.pth", tmp_path, sys.executable, lambda text: None
    )
    results = check_loading(candidate, case)
    written, first = check_command_line(candidate, case, COMMAND_LINES[0])
    returned, others = check_maskgeration(candidate, case)
    results += [*written, *returned, judge_agreement("tiny", first + others)]
    damaged = make_damaged_weights(candidate.weights, tmp_path / "damaged")
    assert set(damaged) == {"weights cut in half", "no weights", "a tensor missing"}
    results += check_damaged_command(candidate, case, "a tensor missing", damaged["a tensor missing"])
    assert [result for result in results if not result.passed] == []


def test_tiles_are_read_only_and_nothing_of_the_project_is_in_reach(tmp_path, tiles):
    case = lay_out_case("tiny", tiles, tmp_path / "tiny")
    assert all(path.stat().st_mode & 0o222 == 0 for path in [case.folder, *case.folder.rglob("*")])
    candidate = Candidate(Path("solution.py"), Path("model.pth"), tmp_path, sys.executable, lambda text: None)
    code = (
        "import os; print(sorted(os.listdir('.')), os.environ.get('PYTHONPATH'), os.environ['https_proxy'])"
    )
    (tmp_path / "a").write_text("x")
    run = run_bare(candidate, {"a.txt": tmp_path / "a"}, ["-c", code], case)
    assert run.output.split("\n")[0] == f"['a.txt'] None {CLOSED_PORT}"
    assert not (tmp_path / "bare").exists()


def test_what_is_checked_stays_as_it_was_handed_in(tmp_path):
    handed_in = write_submission(tmp_path / "handed in", HONEST)
    copies = copy_submission(*handed_in, tmp_path)
    for path in handed_in:
        path.write_text("changed while the check ran")
    assert [path.read_text() for path in copies] == [HONEST, "level 25000 end"]
    assert [path.name for path in copies] == ["solution.py", "model.pth"]


def test_missing_files_and_interpreters_are_named(tmp_path, tiles):
    solution, weights = write_submission(tmp_path / "handed in", HONEST)
    with pytest.raises(submission.SubmissionError, match="no-model.pth: no such file"):
        check_submission(solution, tmp_path / "no-model.pth", tiles, tmp_path)
    with pytest.raises(submission.SubmissionError, match="no-python: does not run"):
        check_submission(solution, weights, tiles, tmp_path, "no-python")


# --- The zip --------------------------------------------------------------------------------------


def test_the_zip_holds_both_files_at_its_top_and_is_reproducible(tmp_path):
    solution, weights = write_submission(tmp_path / "handed in", HONEST)
    one = submission.make_submission(solution, weights, tmp_path / "dist" / "one.zip")
    weights.touch()
    other = submission.make_submission(solution, weights, tmp_path / "dist" / "other.zip")
    assert one.read_bytes() == other.read_bytes()
    with zipfile.ZipFile(one) as archive:
        assert archive.namelist() == ["solution.py", "model.pth"]
        assert archive.read("model.pth") == weights.read_bytes()
    assert sorted(path.name for path in one.parent.iterdir()) == ["one.zip", "other.zip"]


def test_an_older_zip_is_kept_unless_told(tmp_path):
    solution, weights = write_submission(tmp_path / "handed in", HONEST)
    out = tmp_path / "submission.zip"
    out.write_text("older")
    with pytest.raises(submission.SubmissionError, match="--overwrite"):
        submission.make_submission(solution, weights, out)
    with pytest.raises(submission.SubmissionError, match="no such file"):
        submission.replace_submission(solution, tmp_path / "none.pth", out)
    assert out.read_text() == "older"
    submission.replace_submission(solution, weights, out)
    assert zipfile.is_zipfile(out)


def test_a_zip_that_unpacks_to_something_else_is_refused(tmp_path):
    solution, weights = write_submission(tmp_path / "handed in", HONEST)
    submission.write_zip({"solution.py": solution, "model.pth": solution}, tmp_path / "wrong.zip")
    with pytest.raises(submission.SubmissionError, match="unpacks to"):
        submission.verify_zip({"solution.py": solution, "model.pth": weights}, tmp_path / "wrong.zip")


def test_the_command_writes_a_zip_only_after_a_passed_check(tmp_path, tiles, capsys):
    parser = argparse.ArgumentParser()
    submission.add_submission_arguments(parser)
    out = tmp_path / "submission.zip"

    def run(name: str, code: str) -> int:
        solution, weights = write_submission(tmp_path / name, code)
        files = ["--solution", str(solution), "--weights", str(weights)]
        return submission.run_submission(
            parser.parse_args([*files, "--data", str(tiles), "--timed-tiles", "1", "--out", str(out)])
        )

    assert run("bad", HONEST.replace("level, 85, 0)", "level, 1, 0)")) == 1
    assert not out.exists()
    assert run("good", HONEST) == 0
    assert f"SHA-256 {submission.sha256(out)}" in capsys.readouterr().out
    with pytest.raises(submission.SubmissionError, match="--overwrite"):
        run("again", HONEST)
