"""Tests of the grader room: the sandbox refuses what a grader's machine would, environments are built
once, and callers that fail in the grader's environment are caught by name."""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import support

from train.submit import grader
from train.submit.check.masks import Outcome
from train.submit.check.processes import Candidate
from train.submit.grader import Finished, Job, Place, Submission, Tiles, command, environment
from train.submit.grader.environment import GraderError, Interpreter
from train.submit.grader.sandbox import HOOK, probe, sandbox_settings

HERE = Place("here", sys.executable, (), 1, scratch=True)

# --- The sandbox, in the running Python -----------------------------------------------------------


@pytest.fixture
def ground(tmp_path: Path) -> Path:
    """Return a folder with a read-only `inputs`, and `out`, where masks may be written."""
    for name in ("inputs/folder", "out"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "inputs" / "file").write_text("as it was")
    support.make_readonly(tmp_path / "inputs")
    return tmp_path


def run_code(code: str, ground: Path, settings: dict) -> subprocess.CompletedProcess:
    """Run Python code with `ground` as its working folder."""
    command_line = [sys.executable, "-c", code]
    variables = {**os.environ, **settings}
    return subprocess.run(
        command_line, cwd=ground, env=variables, capture_output=True, text=True, timeout=120
    )


def state(ground: Path) -> dict:
    """Return all files and folders with their modes and times of change."""
    return {
        str(path.relative_to(ground)): (path.lstat().st_mode, path.is_file() and path.lstat().st_mtime_ns)
        for path in ground.rglob("*")
    }


CHANGES = {
    "open": "open('inputs/stray', 'w')",
    "append": "os.chmod('inputs/file', 0o644); open('inputs/file', 'a')",
    "os.open": "os.open('stray', os.O_CREAT | os.O_RDWR)",
    "numpy": "import numpy; numpy.zeros(3).tofile('stray')",
    "mkdir": "os.mkdir('inputs/stray')",
    "remove": "os.remove('inputs/file')",
    "rmdir": "os.rmdir('inputs/folder')",
    "rename": "os.rename('inputs/file', 'inputs/other')",
    "carry off": "os.rename('inputs/file', 'out/other')",
    "chmod": "os.chmod('inputs/file', 0o666)",
    "utime": "os.utime('inputs/file', (1, 1))",
    "through a file number": "os.utime(os.open('inputs/file', os.O_RDONLY), (1, 1))",
    "link": "os.link('inputs/file', 'out/other')",
    "symlink": "os.symlink('out', 'inputs/stray')",
    "way round": "open('out/../stray', 'w')",
}


@pytest.mark.parametrize("change", CHANGES)
def test_sandbox_refuses_changes(change, ground):
    code = f"import os; {CHANGES[change]}"
    before = state(ground)

    closed_in = run_code(code, ground, sandbox_settings(ground))

    assert "PermissionError" in closed_in.stderr
    assert state(ground) == before
    if os.geteuid() != 0:  # modes stop others than root without a sandbox
        for path in [ground / "inputs", *(ground / "inputs").rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    free = run_code(code, ground, {})
    assert (free.returncode, free.stderr) == (0, "")
    assert state(ground) != before


def test_sandbox_lets_masks_be_written(ground):
    code = "import os; os.mkdir('out/a'); open('out/a/b', 'w').write('c'); os.rename('out/a/b', 'out/d')"
    done = run_code(code, ground, sandbox_settings(ground))
    assert (done.returncode, done.stderr) == (0, "")
    assert (ground / "out" / "d").read_text() == "c"


def test_sandbox_does_not_take_a_longer_name_for_its_folder(ground):
    (ground / "output").mkdir()
    done = run_code("open('output/stray', 'w')", ground, sandbox_settings(ground))
    assert "PermissionError" in done.stderr


def layers(ground: Path) -> list:
    """Return the layers that hold on this machine."""
    return json.loads(
        run_code(
            "import json, sitecustomize as s; print(json.dumps(s.LAYERS))", ground, sandbox_settings(ground)
        ).stdout
    )


def test_modes_bind_root_in_compiled_code(ground):
    """OpenCV writes without telling Python, so the audit hook hears nothing of it."""
    if "modes of files" not in layers(ground):
        pytest.skip("this machine has no capabilities that a process could give up")
    code = "import cv2, numpy; print(cv2.imwrite('inputs/stray.png', numpy.zeros((8, 8), 'uint8')))"
    done = run_code(code, ground, sandbox_settings(ground))
    assert done.stdout == "False\n"
    assert not (ground / "inputs" / "stray.png").exists()
    assert run_code(code.replace("inputs/", ""), ground, {}).stdout == "True\n"


def test_sandbox_refuses_the_network(ground):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 20)"
        assert run_code(code, ground, {}).returncode == 0
        direct = f"import socket; socket.socket().connect(('127.0.0.1', {port}))"
        for attempt in (code, direct, "import urllib.request as u; u.urlopen('http://localhost/')"):
            assert (
                "refused by the grader's sandbox"
                in run_code(attempt, ground, sandbox_settings(ground)).stderr
            )


@pytest.mark.parametrize(
    "start", ["os.system('true')", "subprocess.run(['true'])", "os.execv('/bin/sh', ['sh'])"]
)
def test_sandbox_refuses_programs(start, ground):
    done = run_code(f"import os, subprocess; {start}", ground, sandbox_settings(ground))
    assert "PermissionError" in done.stderr


def test_a_sandbox_that_fails_lets_nothing_run(ground):
    settings = {**sandbox_settings(ground), "GRADER_SANDBOX": "{"}
    done = run_code("open('stray', 'w')", ground, settings)
    assert done.returncode == 97
    assert "the sandbox failed" in done.stderr
    assert not (ground / "stray").exists()


# --- The proof of it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Submission:
    """Return this solution.py with a tiny network."""
    folder = tmp_path_factory.mktemp("submission")
    return Submission(support.PROJECT / "solution.py", support.write_model(folder / "model.pth"))


@pytest.fixture
def case(tmp_path):
    """Return two small tiles."""
    return grader.lay_out_tiles(Tiles(None, 2, 96), tmp_path)


def enter(place: Place, submission: Submission, workdir: Path) -> Candidate:
    """Return the candidate without a word of progress."""
    return grader.enter(place, submission, workdir, lambda _text: None)


def test_probe_proves_the_sandbox(tiny, case, tmp_path):
    results, report = probe(enter(HERE, tiny, tmp_path / "probe"), case)
    assert [result.passed for result in results] == [True]
    assert "audit hook" in report.layers
    assert report.versions["numpy"] == np.__version__


def test_probe_finds_a_sandbox_that_does_not_hold(tiny, case, tmp_path):
    """A hook that claims its layer and refuses nothing."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text("LAYERS = ['audit hook']")
    candidate = enter(HERE, tiny, tmp_path / "probe")
    candidate.settings["PYTHONPATH"] = str(tmp_path / "hook")

    results, report = probe(candidate, case)

    assert [result.passed for result in results] == [False]
    assert {"make an input writable", "connect", "start a program"} <= set(report.through)


def test_nothing_runs_where_the_sandbox_does_not_hold(tiny, tmp_path):
    interpreter = Interpreter(shutil.which("false"), (3, 9, 0), "for a test")
    broken = environment.Environment(Path(interpreter.path), tmp_path, None)
    verdict = grader.check_in_grader(tiny, interpreter, broken, Tiles(None, 1, 96), tmp_path)
    failed = [result.subject for result in verdict.results if not result.passed]
    assert failed == ["Python 3.9.0, 1 thread: sandbox", "Python 3.9.0, NumPy 2: sandbox"]
    assert verdict.table == ""


# --- The environment ------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Return an empty cache folder that is used in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "glacier-kit"


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """Hide every Python 3.9 of this machine."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.delenv("GRADER_PYTHON", raising=False)


def running() -> Interpreter:
    """Return the running Python."""
    return environment.probe(sys.executable, "the one that runs this")


@pytest.mark.slow
def test_environment_is_built_once_and_a_half_built_one_again(cache):
    nothing = "# no packages\n"
    built = environment.provide_environment(running(), nothing, numpy_2="")
    assert built.built > 0
    again = environment.provide_environment(running(), nothing, numpy_2="")
    assert again == built._replace(built=None)
    folder = built.python.parents[2]
    (folder / environment.STAMP).unlink()
    (folder / "rest").write_text("of a build that was interrupted")
    assert environment.provide_environment(running(), nothing, numpy_2="").built > 0
    assert not (folder / "rest").exists()


@pytest.mark.slow
def test_a_failed_build_says_why_and_is_not_taken_for_whole(cache):
    wrong = "./absent-1.0-py3-none-any.whl\n"
    with pytest.raises(GraderError, match=r"could not be built .*: .*absent-1\.0"):
        environment.provide_environment(running(), wrong, numpy_2="")
    assert list(cache.glob("*/" + environment.PIP_LOG))
    assert not list(cache.glob("*/" + environment.STAMP))


def test_each_list_and_python_has_a_folder_of_its_own(cache):
    old, new = Interpreter("", (3, 9, 18), ""), Interpreter("", (3, 11, 7), "")
    folders = {
        environment.environment_folder(*key) for key in [(old, "a", ""), (old, "b", ""), (new, "a", "")]
    }
    assert len(folders) == 3
    assert environment.environment_folder(old._replace(version=(3, 9, 19)), "a", "") in folders


def test_requirements_are_pinned_and_without_the_crf():
    lines = [line for line in environment.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.match(r"[\w-]+==[\w.]+(; .+)?$", line)] == []
    names = {line.split("==")[0]: line.split("==")[1] for line in lines}
    assert (names["torch"], names["torchvision"], names["segmentation_models_pytorch"]) == (
        "2.0.1",
        "0.15.2",
        "0.3.3",
    )
    assert names["numpy"].startswith("1.26.")
    assert not [name for name in names if "densecrf" in name]


def test_a_shim_that_fails_is_no_python(tmp_path):
    shim = tmp_path / "python3.9"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert environment.probe(str(shim), "on PATH") is None
    assert environment.probe(str(tmp_path / "absent"), "on PATH") is None


def test_pyenv_lists_the_newest_first(tmp_path, monkeypatch):
    for version in ("3.9.2", "3.9.18", "3.9-dev", "3.10.1"):
        path = tmp_path / "versions" / version / "bin" / f"python{version[:3]}"
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    found = [Path(path).parents[1].name for path in environment.list_pyenv()]
    assert found == ["3.9.18", "3.9.2"]


def test_named_python_that_does_not_run_is_an_error(monkeypatch):
    monkeypatch.setenv("GRADER_PYTHON", "/absent/python3.9")
    with pytest.raises(GraderError, match="GRADER_PYTHON=/absent/python3.9: does not run"):
        environment.choose_interpreter()


def test_without_python_3_9_the_running_one_is_taken_or_refused(nowhere):
    assert environment.find_python_3_9() is None
    if sys.version_info[:2] <= environment.NEWEST:
        assert environment.choose_interpreter() == running()
    else:
        with pytest.raises(GraderError, match="exist for Python 3.9 to 3.11"):
            environment.choose_interpreter()


def test_optional_check_says_that_it_was_not_made(nowhere, tmp_path, capsys):
    status = command.grader_check(tmp_path, tmp_path, None, 1, 96, optional=True)
    assert status == 0
    assert "grader-check: NOT MADE: " in capsys.readouterr().out


# --- The judgement --------------------------------------------------------------------------------


def finished(mask: np.ndarray, label: str) -> Finished:
    """Return a job that brought one mask, of tile 02_07."""
    job = Job(HERE._replace(label=label), "maskgeration", grader.check_platform)
    return Finished(job, [], Outcome(label, {"02_07": mask}), 1.0)


@pytest.mark.parametrize(("wrong", "passed"), [(0, True), (10, True), (11, False)])
def test_one_pixel_in_a_thousand_may_differ(wrong, passed):
    mask = np.zeros((100, 100), np.uint8)
    other = mask.copy()
    other.flat[:wrong] = 85
    result = grader.judge_against(Outcome("here", {"02_07": mask}), finished(other, "there"))
    assert result.passed is passed
    assert "02_07" in result.found


@pytest.mark.parametrize("other", [np.zeros((50, 200), np.uint8), "a damaged PNG"])
def test_a_mask_that_cannot_be_compared_is_no_agreement(other):
    mask = np.zeros((100, 100), np.uint8)
    assert not grader.judge_against(Outcome("here", {"02_07": mask}), finished(other, "there")).passed
    assert not grader.judge_against(Outcome("here", {"03_07": mask}), finished(mask, "there")).passed


# --- In the grader's environment ------------------------------------------------------------------


@pytest.fixture(scope="module")
def box():
    """Return the interpreter and its finished environment; skip where it has not been built."""
    interpreter = environment.find_python_3_9()
    if interpreter is None:
        pytest.skip("no Python 3.9 on PATH, in pyenv or in uv")
    found = environment.find_environment(interpreter)
    if found is None:
        pytest.skip("the grader's environment is not built: `make grader-check` builds it")
    return interpreter, found


def sabotaged(tiny: Submission, folder: Path, code: str) -> Submission:
    """Return the submission with `code` after everything else of solution.py, where importers see it."""
    path = folder / "sabotaged.py"
    path.write_text(tiny.solution.read_text(encoding="utf-8") + "\n\n" + code + "\n", encoding="utf-8")
    return tiny._replace(solution=path)


def call(place: Place, submission: Submission, case, workdir: Path) -> Finished:
    """Run maskgeration in a place."""
    job = Job(place, "maskgeration", grader.check_platform)
    return grader.run_job(job, submission, case, workdir, lambda _text: None)


def failures(finished: Finished) -> dict:
    """Return {check: what was found} of what failed."""
    return {result.check: result.found for result in finished.results if not result.passed}


@pytest.mark.slow
def test_the_submission_gives_the_same_masks_in_the_box(box, tiny, tmp_path):
    interpreter, found = box
    verdict = grader.check_in_grader(tiny, interpreter, found, Tiles(None, 2, 96), tmp_path)
    assert [result for result in verdict.results if not result.passed] == []
    versions = [report.versions["numpy"].split(".")[0] for report in verdict.reports[1:]]
    assert versions == ["1", "2"]
    assert verdict.table.count("100.0000%") == 2 * (1 + 2 * 4)


@pytest.mark.slow
def test_masks_that_differ_in_the_box_are_caught(box, tiny, case, tmp_path):
    code = (
        "if sys.version_info < (3, 10):\n    to_mask = lambda classes: np.uint8([0, 85, 255, 170])[classes]"
    )
    submission = sabotaged(tiny, tmp_path, code)
    there = call(Place("there", str(box[1].python), (), 1), submission, case, tmp_path / "there")
    here = call(HERE, submission, case, tmp_path / "here")
    assert failures(there) == failures(here) == {}
    assert not grader.judge_against(here.outcome, there).passed


@pytest.mark.slow
def test_torch_s_numpy_bridge_is_caught_with_numpy_2(box, tiny, case, tmp_path):
    submission = sabotaged(tiny, tmp_path, "to_tensor = torch.from_numpy")
    python = str(box[1].python)
    assert failures(call(Place("1.26", python, (), 1), submission, case, tmp_path / "1")) == {}
    place = Place("2", python, (box[1].numpy_2,), 1)
    faults = grader.judge_finished([call(place, submission, case, tmp_path / "2")], HERE, place)
    told = [result.found for result in faults if not result.passed and result.check == "no fallback"]
    assert len(told) == 1
    assert "Numpy is not available" in told[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "check", "word"),
    [
        ("open('cache.bin', 'wb')", "exit status", "cache.bin"),
        ("import scipy.ndimage, pydensecrf", "exit status", "pydensecrf"),
        ("torch.hub.load_state_dict_from_url('http://localhost/a.pth')", "exit status", "refused"),
        ("import tomllib", "exit status", "tomllib"),
    ],
)
def test_what_the_box_lacks_is_caught(box, tiny, case, tmp_path, code, check, word):
    there = Place("there", str(box[1].python), (), 1)
    found = failures(call(there, sabotaged(tiny, tmp_path, code), case, tmp_path / "there"))
    assert word in found[check]


def test_hook_is_of_the_standard_library():
    """It runs before anything else, in every Python."""
    imports = re.findall(r"^(?:import|from) (\w+)", (HOOK / "sitecustomize.py").read_text(), re.MULTILINE)
    assert set(imports) <= set(sys.stdlib_module_names)
