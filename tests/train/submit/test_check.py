"""Tests of train.submit: an honest submission passes, each sabotage is caught by name."""

import argparse
import os
import sys
import zipfile
from pathlib import Path

import pytest
import support
import torch

from prep.files import sha256
from train.submit import archive, check
from train.submit.callers import (
    CLOSED_PORT,
    COMMAND_LINES,
    Candidate,
    check_command_line,
    check_maskgeration,
    copy_submission,
    run_bare,
)
from train.submit.check import KNOWN_SECONDS, Machine, check_case, check_submission, judge_seconds
from train.submit.tiles import Outcome, judge_agreement, lay_out_case
from train.submit.verdict import CheckResult, format_results

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
    return {"level": float(text.split()[1])}

def load_model(path):
    return read_model_file(path)["level"]

def segment(paths, level):
    try:
        bands = np.stack([tifffile.imread(path) for path in paths])
    except Exception:
        return np.zeros(tifffile.imread(paths[0]).shape, np.uint8)
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
        ("level = load_model(\"model.pth\")\n        import os; os.chmod('.', 0o755); open('log.txt', 'w').close()\n"),
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
WHOLE_SABOTAGES = [
    (
        "random weights",
        READ_LEVEL,
        'try:\n        return read_model_file(path)["level"]\n    except InputError:\n        return 12345.0',
        {"refused by a command line", "refused by maskgeration", "no masks"},
    ),
    (
        "not strict",
        "def load_model",
        "def load_anything",
        {"strict loading", "exit status", "returns a dict"},
    ),
    (
        "hostile tile",
        "    except Exception:\n",
        "    except KeyError:\n",
        {"returns a dict"},
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
    return check_submission(*files, tiles, tmp_path / "work", 2, 64)


def make_candidate(workdir: Path, solution: Path, weights: Path) -> Candidate:
    """Return a candidate that tells nothing."""
    return Candidate(solution, weights, workdir, sys.executable, lambda text: None)


def test_an_honest_submission_passes_with_both_naming_styles(tmp_path, capsys):
    results = run_check(tmp_path, HONEST, None)
    assert [result for result in results if not result.passed] == []
    subjects = {result.subject for result in results}
    callers = [*(line.label for line in COMMAND_LINES), "maskgeration(bands, model.pth)"]
    assert {f"{naming} names: {caller}" for naming in ("training", "platform") for caller in callers} < subjects
    assert {"training names: maskgeration(bands, OUT), files", "a damaged tile: maskgeration"} < subjects
    progress = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert progress[0].startswith("[1/15]") and progress[-1].startswith("[15/15]")


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
    assert_caught(check_case(make_candidate(tmp_path, *files), case)[0], caught)


@sabotages(WHOLE_SABOTAGES)
def test_what_is_not_safe_is_caught_by_name(tmp_path, tiles, piece, instead, caught):
    assert HONEST.count(piece) == 1
    assert_caught(run_check(tmp_path, HONEST.replace(piece, instead), tiles), caught)


def test_weights_over_the_limit_fail(tmp_path):
    weights = tmp_path / "model.pth"
    with weights.open("wb") as stream:  # sparse: takes no room on the disk
        stream.truncate(300_000_001)
    result = check.check_size(weights)
    assert (result.check, result.passed) == ("size", False)
    with weights.open("wb") as stream:
        stream.truncate(300_000_000)
    assert check.check_size(weights).passed


@pytest.fixture
def one_core():
    """Let this process and its children use one core: threads that wait for a busy one cost minutes."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.slow
def test_the_kits_own_solution_passes(tmp_path, tiles, one_core):
    """Its real processes: loading, a command line, the platform's way, damaged weights, a damaged tile."""
    weights = support.write_model(tmp_path / "model.pth")
    case = lay_out_case("tiny", tiles, tmp_path / "tiny")
    candidate = make_candidate(tmp_path, support.PROJECT / "solution.py", weights)
    results = [check.check_loading(candidate, case)]
    written, first = check_command_line(candidate, case, COMMAND_LINES[0])
    returned, others = check_maskgeration(candidate, case)
    results += [*written, *returned, judge_agreement("tiny", first + others)]
    damaged = check.damage_weights(weights, tmp_path / "damaged")
    assert set(damaged) == {"weights cut in half", "no weights", "a tensor missing"}
    results += check.check_damaged_weights(candidate, case, "a tensor missing", damaged["a tensor missing"])
    results += check.check_damaged_tile(candidate, check.damage_case(case, tmp_path / "damaged tile"))
    assert [result for result in results if not result.passed] == []


def test_tiles_are_read_only_and_nothing_of_the_project_is_in_reach(tmp_path, tiles):
    case = lay_out_case("tiny", tiles, tmp_path / "tiny")
    assert all(path.stat().st_mode & 0o222 == 0 for path in [case.folder, *case.folder.rglob("*")])
    code = "import os; print(sorted(os.listdir('.')), os.environ.get('PYTHONPATH'), os.environ['https_proxy'])"
    (tmp_path / "a.py").write_text("x")
    run = run_bare(make_candidate(tmp_path, tmp_path / "a.py", tmp_path / "absent"), ["-c", code], case)
    assert run.output.split("\n")[0] == f"['solution.py'] None {CLOSED_PORT}"
    assert not (tmp_path / "bare").exists()


def test_what_is_checked_stays_as_it_was_handed_in(tmp_path):
    handed_in = write_submission(tmp_path / "handed in", HONEST)
    copies = copy_submission(*handed_in, tmp_path)
    for path in handed_in:
        path.write_text("changed while the check ran")
    assert [path.read_text() for path in copies] == [HONEST, "level 25000 end"]
    assert [path.name for path in copies] == ["solution.py", "model.pth"]


def test_missing_files_are_named(tmp_path, tiles):
    solution, _ = write_submission(tmp_path / "handed in", HONEST)
    with pytest.raises(archive.SubmissionError, match="no-model.pth: no such file"):
        check_submission(solution, tmp_path / "no-model.pth", tiles, tmp_path, 1)


@pytest.mark.parametrize("share, agree", [(0.0, True), (0.0009, True), (0.002, False)])
def test_masks_may_differ_in_single_pixels(share, agree):
    one = torch.zeros(100, 100, dtype=torch.uint8).numpy()
    other = one.copy()
    other.reshape(-1)[: int(share * other.size)] = 85
    outcomes = [Outcome("one", {"001": one}), Outcome("other", {"001": other})]
    assert judge_agreement("callers", outcomes).passed == agree


# --- The clock ------------------------------------------------------------------------------------

FREE, BUSY = Machine(0.0, 1.0), Machine(0.0, 0.6)


def test_a_machine_is_busy_where_work_gets_a_part_of_its_time_or_others_wait():
    assert not FREE.busy and BUSY.busy and Machine(float(os.cpu_count()), 1.0).busy
    assert str(BUSY) == f"machine busy: load 0.0 on {os.cpu_count()} cores, work gets 60%"
    assert 0 < check.measure_machine(0.0).share <= 1


def test_a_slow_run_fails_on_a_free_machine_and_is_a_warning_on_a_busy_one():
    late = KNOWN_SECONDS + 0.2
    assert judge_seconds("tiles", KNOWN_SECONDS - 0.1, "", FREE)[2:3] == (True,)
    assert not judge_seconds("tiles", KNOWN_SECONDS - 0.1, "", BUSY).doubtful
    failed, warned = judge_seconds("tiles", late, "", FREE), judge_seconds("tiles", late, "", BUSY)
    assert not failed.passed and "--time-budget" in failed.expected
    assert warned.passed and warned.doubtful and "when the machine is free" in warned.expected
    table = format_results([warned])
    assert "warn  tiles  seconds: found 45.2 s with start" in table and "work gets 60%" in table
    assert "1 checks passed, 1 of them with a warning, 0 failed: it would be accepted" in table


def timed(tmp_path: Path, code: str) -> dict[str, CheckResult]:
    """Return the results on the clock of a submission without a network, by what they check."""
    files = write_submission(tmp_path / "handed in", code)
    return {result.check: result for result in check.check_clock(make_candidate(tmp_path, *files), 2, 64, 0.0)}


def test_a_run_that_is_too_slow_is_made_once_more(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "KNOWN_SECONDS", 0.0)
    monkeypatch.setattr(check, "measure_machine", lambda load: FREE)
    counted = HONEST + f"\nopen({str(tmp_path / 'runs')!r}, 'a').write('x')\n"
    assert not timed(tmp_path, counted)["seconds"].passed
    assert (tmp_path / "runs").read_text() == "xx"
    assert "once more" in capsys.readouterr().err


def test_the_timed_run_tells_its_memory_and_has_no_time_budget_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("GLACIER_TIME_BUDGET", "0.001")  # the platform has no such variable
    code = HONEST + "\nimport os; assert 'GLACIER_TIME_BUDGET' not in os.environ\n"
    results = timed(tmp_path, code)
    assert [result for result in results.values() if not result.passed] == []
    assert 0.02 < float(results["peak memory"].found.split()[0]) < 2
    assert not check.judge_memory("tiles", int(check.MEMORY_AIM)).doubtful
    assert check.judge_memory("tiles", int(check.MEMORY_AIM) + 1).doubtful


# --- The zip --------------------------------------------------------------------------------------


def test_the_zip_holds_both_files_at_its_top_and_is_reproducible(tmp_path):
    solution, weights = write_submission(tmp_path / "handed in", HONEST)
    one, other = tmp_path / "dist" / "one.zip", tmp_path / "dist" / "other.zip"
    archive.write_submission(solution, weights, one)
    weights.touch()
    archive.write_submission(solution, weights, other)
    assert one.read_bytes() == other.read_bytes()
    with zipfile.ZipFile(one) as opened:
        assert opened.namelist() == ["solution.py", "model.pth"]
        assert opened.read("model.pth") == weights.read_bytes()
    assert sorted(path.name for path in one.parent.iterdir()) == ["one.zip", "other.zip"]


def test_an_older_zip_is_kept_until_the_new_one_is_there(tmp_path):
    solution, weights = write_submission(tmp_path / "handed in", HONEST)
    out = tmp_path / "submission.zip"
    out.write_text("older")
    with pytest.raises(archive.SubmissionError, match="OVERWRITE=yes"):
        archive.refuse_existing(out)
    with pytest.raises(archive.SubmissionError, match="no such file"):
        archive.write_submission(solution, tmp_path / "none.pth", out)
    assert out.read_text() == "older"
    archive.write_submission(solution, weights, out)
    assert zipfile.is_zipfile(out)


def run_submission(tmp_path: Path, tiles: Path, name: str, code: str, *options: str) -> int:
    """Run the command `submission` on a submission without a network."""
    parser = argparse.ArgumentParser()
    archive.add_submission_arguments(parser)
    solution, weights = write_submission(tmp_path / name, code)
    files = ["--solution", str(solution), "--weights", str(weights), "--data", str(tiles)]
    out = ["--timed-tiles", "1", "--out", str(tmp_path / "submission.zip")]
    return archive.run_submission(parser.parse_args([*files, *out, *options]))


def test_the_command_writes_a_zip_only_after_a_passed_check(tmp_path, tiles, capsys):
    out, wrong = tmp_path / "submission.zip", HONEST.replace("level, 85, 0)", "level, 1, 0)")
    assert run_submission(tmp_path, tiles, "bad", wrong, "--force") == 1
    assert not out.exists() and "values" in capsys.readouterr().err
    assert run_submission(tmp_path, tiles, "good", HONEST) == 0
    *_, told, last = capsys.readouterr().out.splitlines()
    assert f"SHA-256 {sha256(out)}" in told
    assert "upload model.pth and solution.py" in last
    with pytest.raises(archive.SubmissionError, match="--overwrite"):
        run_submission(tmp_path, tiles, "again", HONEST)


def test_force_ships_what_only_took_too_long(tmp_path, tiles, monkeypatch, capsys):
    late = CheckResult("tiles", "seconds", False, "46 s", "45 s")
    monkeypatch.setattr(check, "check_submission", lambda *_: [late])
    assert run_submission(tmp_path, tiles, "late", HONEST) == 1
    assert "make submission FORCE=yes" in capsys.readouterr().err
    assert run_submission(tmp_path, tiles, "forced", HONEST, "--force") == 0
    assert (tmp_path / "submission.zip").is_file()
