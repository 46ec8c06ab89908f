"""Tests of the grader room: the sandbox refuses what a grader's machine would, environments are built
once, and callers that fail in the grader's environment are caught by name."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import support

from train.submit import grader
from train.submit.callers import Answer, check_platform
from train.submit.grader import Tiles, environment
from train.submit.grader.environment import GraderError, Interpreter
from train.submit.grader.sandbox import HOOK, check_sandbox, sandbox_settings
from train.submit.tiles import judge_agreement
from train.submit.verdict import CheckResult

Files = tuple[Path, Path]

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
    return subprocess.run(command_line, cwd=ground, env=variables, capture_output=True, text=True, timeout=120)


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
            assert "refused by the grader's sandbox" in run_code(attempt, ground, sandbox_settings(ground)).stderr


@pytest.mark.parametrize("start", ["os.system('true')", "subprocess.run(['true'])", "os.execv('/bin/sh', ['sh'])"])
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
def tiny(tmp_path_factory) -> Files:
    """Return this solution.py with a tiny network."""
    folder = tmp_path_factory.mktemp("submission")
    return support.PROJECT / "solution.py", support.write_model(folder / "model.pth")


@pytest.fixture
def case(tmp_path):
    """Return two small tiles."""
    return grader.lay_out_tiles(Tiles(None, 2, 96), tmp_path)


@pytest.fixture
def any_files(tmp_path) -> Files:
    """Return files that are not looked into."""
    for name in ("any.py", "any.pth"):
        (tmp_path / name).touch()
    return tmp_path / "any.py", tmp_path / "any.pth"


def test_the_sandbox_is_tried_before_anything_is_believed(any_files, case, tmp_path):
    candidate = grader.enter(any_files, tmp_path / "here", sys.executable, 1, print)
    result = check_sandbox(candidate, case, "here")
    assert result.passed and "audit hook" in result.found and "torch 2." in result.found


def test_a_sandbox_that_does_not_hold_is_noticed(any_files, case, tmp_path):
    """A hook that claims its layer and refuses nothing."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text("LAYERS = ['audit hook']")
    candidate = grader.enter(any_files, tmp_path / "here", sys.executable, 1, print)
    candidate.settings["PYTHONPATH"] = str(tmp_path / "hook")
    result = check_sandbox(candidate, case, "here")
    assert not result.passed
    assert "it could write beside solution.py; it could make an input writable; it could connect" in result.found


def test_nothing_runs_where_the_sandbox_does_not_hold(any_files, tmp_path):
    results = grader.check_in_grader(any_files, "/bin/false", Tiles(None, 1, 96), tmp_path)
    failed = [result.subject for result in results if not result.passed]
    assert failed == ["Python 3.9, 1 thread: sandbox", "Python 3.9, 4 threads: sandbox"]
    assert len(results) == 3


# --- The environment ------------------------------------------------------------------------------

RUNNING = Interpreter(sys.executable, "the one that runs this")


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


@pytest.mark.slow
def test_environment_is_built_once_and_a_half_built_one_again(cache):
    nothing = "# no packages\n"
    assert environment.find_environment(nothing) is None
    python = environment.provide_environment(RUNNING, nothing)
    folder = python.parents[2]
    (folder / "rest").write_text("of a build that was interrupted")
    assert environment.provide_environment(RUNNING, nothing) == python
    assert (folder / "rest").exists()
    (folder / environment.STAMP).unlink()
    assert environment.provide_environment(RUNNING, nothing) == python
    assert not (folder / "rest").exists()


@pytest.mark.slow
def test_a_failed_build_says_why_and_is_not_taken_for_whole(cache):
    with pytest.raises(GraderError, match=r"could not be built .*: .*absent-1\.0"):
        environment.provide_environment(RUNNING, "./absent-1.0-py3-none-any.whl\n")
    assert list(cache.glob("*/" + environment.PIP_LOG))
    assert not list(cache.glob("*/" + environment.STAMP))


def test_each_list_has_a_folder_of_its_own(cache):
    assert environment.environment_folder("a").parent == cache
    assert environment.environment_folder("a") != environment.environment_folder("b")


def test_requirements_are_pinned_and_without_the_crf():
    lines = [line for line in environment.REQUIREMENTS.splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.match(r"[\w-]+==[\w.]+(; .+)?$", line)] == []
    names = {line.split("==")[0]: line.split("==")[1] for line in lines}
    assert (names["torch"], names["torchvision"], names["segmentation_models_pytorch"]) == (
        "2.0.1",
        "0.15.2",
        "0.3.3",
    )
    assert names["numpy"].startswith("1.26.")
    assert not [name for name in names if "densecrf" in name]


def script(path: Path, text: str) -> str:
    """Write an executable script; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_shim_that_fails_and_another_version_are_no_python_3_9(tmp_path):
    assert environment.probe(script(tmp_path / "shim", "exit 127")) is None
    assert environment.probe(script(tmp_path / "newer", "echo 3.11.7")) is None
    assert environment.probe(str(tmp_path / "absent")) is None


def test_a_python_of_pyenv_is_found_without_being_switched_on(nowhere, tmp_path):
    path = script(tmp_path / "versions" / "3.9.18" / "bin" / "python3.9", "echo 3.9.18")
    assert environment.choose_interpreter() == Interpreter(path, "Python 3.9.18")


def test_a_named_python_that_does_not_run_is_an_error(monkeypatch):
    monkeypatch.setenv("GRADER_PYTHON", "/absent/python3.9")
    with pytest.raises(GraderError, match="GRADER_PYTHON=/absent/python3.9: found no Python 3.9 that runs"):
        environment.choose_interpreter()


def test_optional_check_says_that_it_was_not_made(nowhere, tmp_path, capsys):
    with pytest.raises(GraderError, match="uv python install 3.9"):
        grader.grader_check(tmp_path, tmp_path, Tiles(None, 1, 96))
    assert grader.grader_check(tmp_path, tmp_path, Tiles(None, 1, 96), optional=True) == 0
    assert "grader-check: NOT MADE: looked on PATH" in capsys.readouterr().out


# --- In the grader's environment ------------------------------------------------------------------


@pytest.fixture(scope="module")
def box() -> str:
    """Return the Python of the finished environment; skip where it has not been built."""
    found = environment.find_environment()
    if found is None:
        pytest.skip("the grader's environment is not built: `make grader-check` builds it")
    return str(found)


def sabotaged(tiny: Files, folder: Path, code: str) -> Files:
    """Return the submission with `code` after everything else of solution.py, where importers see it."""
    path = folder / "sabotaged.py"
    path.write_text(tiny[0].read_text(encoding="utf-8") + "\n\n" + code + "\n", encoding="utf-8")
    return path, tiny[1]


def call(python: str, files: Files, case, workdir: Path) -> Answer:
    """Run maskgeration by a Python."""
    return check_platform(grader.enter(files, workdir, python, 1, print), case)


def failures(results: list[CheckResult]) -> dict:
    """Return {check: what was found} of what failed."""
    return {result.check: result.found for result in results if not result.passed}


@pytest.mark.slow
def test_the_submission_gives_the_same_masks_in_the_box(box, tiny, tmp_path):
    results = grader.check_in_grader(tiny, box, Tiles(None, 2, 96), tmp_path)
    assert failures(results) == {}
    assert "numpy 1.26" in results[1].found and "torch 2.0.1" in results[1].found


@pytest.mark.slow
def test_masks_that_differ_in_the_box_are_caught(box, tiny, case, tmp_path):
    code = "if sys.version_info < (3, 10):\n    to_mask = lambda classes: np.uint8([0, 85, 255, 170])[classes]"
    files = sabotaged(tiny, tmp_path, code)
    there, of_there = call(box, files, case, tmp_path / "there")
    here, of_here = call(sys.executable, files, case, tmp_path / "here")
    assert failures(there) == failures(here) == {}
    assert not judge_agreement("masks", of_here + of_there).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("open('cache.bin', 'wb')", "cache.bin"),
        ("import scipy.ndimage, pydensecrf", "pydensecrf"),
        ("torch.hub.load_state_dict_from_url('http://localhost/a.pth')", "refused"),
        ("import tomllib", "tomllib"),
    ],
)
def test_what_the_box_lacks_is_caught(box, tiny, case, tmp_path, code, word):
    results, _ = call(box, sabotaged(tiny, tmp_path, code), case, tmp_path / "there")
    assert word in failures(results)["exit status"]


def test_hook_is_of_the_standard_library():
    """It runs before anything else, in every Python."""
    imports = re.findall(r"^(?:import|from) (\w+)", (HOOK / "sitecustomize.py").read_text(), re.MULTILINE)
    assert set(imports) <= set(sys.stdlib_module_names)
