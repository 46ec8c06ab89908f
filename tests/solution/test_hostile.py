"""Input that means harm or went wrong: files that are none, bombs, names, places closed to the user.

Most of these once ended solution.py in a traceback, a hang or a lost mask; `make fuzz` searches for more.
"""

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from fuzz import field, kills, load, rasters, runs
from support import PROJECT, contents, scene_numbers, write_model, write_tile

import solution


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Keep runs inside this process from taking all cores."""
    monkeypatch.setattr(solution, "usable_cores", lambda: 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a tiny model file."""
    return write_model(tmp_path_factory.mktemp("weights") / "model.pth")


@pytest.fixture
def data(tmp_path):
    """Return a data folder of two tiles of 32 x 40 px."""
    for number in (1, 2):
        write_tile(tmp_path / "in", f"00{number}", scene_numbers(number)[:32, :40])
    return tmp_path / "in"


def run_main(data, out, weights):
    """Run the command line under the limits of the search; return its exit status and the errors it told."""
    door = lambda: solution.main([str(data), str(out), "--weights", str(weights)])  # noqa: E731
    ending = runs.call("main", door)
    assert not ending.raised, ending.raised
    assert "Traceback" not in ending.said, ending.said
    return ending.result, [line for line in ending.said.splitlines() if line.startswith("error: ")]


def assert_only_first_refused(data, tmp_path, weights, *words):
    """Assert that tile 001 is background with an error of these words, and that tile 002 has its mask."""
    status, errors = run_main(data, tmp_path / "out", weights)
    assert status == 1 and len(errors) == 1, errors
    assert all(word in errors[0] for word in words), errors[0]
    masks = {path.name: cv2.imread(str(path), -1) for path in (tmp_path / "out").iterdir()}
    assert sorted(masks) == ["img001.png", "img002.png"]
    assert masks["img001.png"].shape == (32, 40) and not masks["img001.png"].any()
    assert masks["img002.png"].any()


# --- A short search -------------------------------------------------------------------------------


def test_a_short_search_finds_nothing(tmp_path, weights):
    found = runs.fuzz_solution(7, 120, weights, tmp_path)
    assert found.faults == []
    assert len(found.inputs) >= 120 and found.masks > 20 and found.refused > 20


def test_units_places_names_fills_and_consoles_give_the_twins_masks(weights, tmp_path):
    found = field.fuzz_field(7, 24, weights, tmp_path)
    assert found.faults == [] and found.masks and found.refused


def test_a_short_search_through_prep_finds_nothing(tmp_path):
    found = runs.fuzz_prep(7, 5, tmp_path)
    assert found.faults == []
    assert len(found.inputs) == 40


# --- Files that are none --------------------------------------------------------------------------


def make_pipe(path):
    os.mkfifo(path)


def make_endless(path):
    path.symlink_to("/dev/zero")


def make_loop(path):
    path.symlink_to(path.name)


NO_FILES = {
    "a pipe that nobody writes to": make_pipe,
    "an endless device": make_endless,
    "a link to itself": make_loop,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("absent"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_costs_its_tile_only(data, tmp_path, weights, kind):
    path = data / "Band3" / "img001.tif"
    path.unlink()
    NO_FILES[kind](path)
    assert_only_first_refused(data, tmp_path, weights, "Band3/img001.tif", "copy or export the file again")


# --- Bombs ----------------------------------------------------------------------------------------

BOMBS = {
    "60000 px declared": (lambda: rasters.declared(60000), "60000 x 60000 px"),
    "60000 px deflated": (lambda: rasters.bomb(60000), "60000 x 60000 px"),
    "4 GB in a strip of 64 px": (rasters.overfull, "unpacks to more"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_unpacks(data, tmp_path, weights, kind):
    make, finding = BOMBS[kind]
    content = make()
    assert len(content) < 6e6
    (data / "Band3" / "img001.tif").write_bytes(content)
    started = time.perf_counter()
    assert_only_first_refused(data, tmp_path, weights, "Band3/img001.tif", finding)
    assert time.perf_counter() - started < 60


def test_bombs_in_every_band_leave_a_mask_of_the_usual_size(tmp_path, weights):
    for band in solution.BANDS:
        (tmp_path / "in" / band.folder).mkdir(parents=True)
        (tmp_path / "in" / band.folder / "img001.tif").write_bytes(rasters.declared(60000))
    status, errors = run_main(tmp_path / "in", tmp_path / "out", weights)
    assert status == 1 and len(errors) == 1
    assert cv2.imread(str(tmp_path / "out" / "img001.png"), -1).shape == solution.DEFAULT_SHAPE


@pytest.mark.parametrize("options", [{}, {"tile": (256, 256)}, {"rowsperstrip": 7}])
def test_genuine_deflated_files_are_no_bombs(tmp_path, options):
    values = np.full((700, 900), 30000, np.uint16)  # deflates to 1 part in 1000, as a bomb does
    tifffile.imwrite(tmp_path / "a.tif", values, compression="zlib", **options)
    np.testing.assert_array_equal(solution.read_raster(tmp_path / "a.tif")[0], values)


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
@pytest.mark.parametrize("fill", [-3.4028235e38, 1e20, -2147483648])
def test_an_undeclared_fill_value_does_not_spread(tmp_path, weights, dtype, fill):
    if dtype == "int32" and abs(fill) > 2**31:
        pytest.skip("no integer of 32 bits")
    numbers = scene_numbers(0)[:64, :64].astype(np.float64)
    for folder, corner in (("nodata", 0), ("fill", fill)):
        stored = numbers.copy()
        stored[:20, :20] = corner
        write_tile(tmp_path / folder, "001", stored, dtype=dtype)
    masks = [solution.maskgeration(tmp_path / folder, weights)["001"] for folder in ("nodata", "fill")]
    np.testing.assert_array_equal(*masks)
    assert masks[0].any()


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["a tile with spaces", "glaciar Perito Moreno ñ", "氷河", "-rf", "%s{0}\\n", "a\nb", "n" * 251]
    + [os.fsdecode(b"caf\xe9")],
)
def test_any_name_gives_a_mask_of_that_name(tmp_path, weights, name):
    for index, band in enumerate(solution.BANDS):
        (tmp_path / "in" / band.folder).mkdir(parents=True)
        values = scene_numbers(0)[:32, :40, index]
        tifffile.imwrite(tmp_path / "in" / band.folder / f"{name}.tif", values, photometric="minisblack")
    assert run_main(tmp_path / "in", tmp_path / "out", weights) == (0, [])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{name}.png"]


def test_two_folders_of_one_band_are_reported(data, capfd):
    (data / "band_1").mkdir()
    assert len(solution.find_tiles(data)) == 2
    assert "band_1" in capfd.readouterr().err


# --- Places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["x" * 300, "a/" * 3000])
def test_a_name_too_long_is_an_input_error(data, tmp_path, weights, place):
    for arguments in ((place, tmp_path / "out"), (data, place)):
        assert run_main(*arguments, weights)[0] == 2
    assert run_main(data, tmp_path / "out", place)[0] == 2


def test_folders_in_a_circle_are_input_errors(data, tmp_path, weights):
    (tmp_path / "loop").symlink_to("loop")
    for arguments in ((tmp_path / "loop", tmp_path / "out"), (data, tmp_path / "loop")):
        status, errors = run_main(*arguments, weights)
        assert status == 2 and "loop" in errors[0]
    (data / "Band3").rename(tmp_path / "moved")
    (data / "Band3").symlink_to("Band3")
    status, errors = run_main(data, tmp_path / "out", weights)
    assert status == 1 and all("no file in Band3" in error for error in errors)


@pytest.mark.parametrize("mapping", [{}, {"Band1": None}, {"Band1": 3}, {None: "x"}])
def test_a_mapping_of_anything_else_is_an_input_error(weights, mapping):
    with pytest.raises(solution.InputError, match="expected a folder with Band1"):
        solution.maskgeration(mapping, weights)


def test_an_empty_second_argument_writes_nothing(data, weights, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(solution, "find_weights", lambda given: weights)
    assert len(solution.maskgeration(data, "")) == 2
    assert contents(tmp_path / "empty") == {}


def test_a_strange_number_of_threads_is_no_error(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "²")  # isdigit() says yes, int() no
    assert solution.usable_cores() >= 1


# Imports PyTorch once; each command line then runs in a child of a user who may not do all.
UNPRIVILEGED = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import solution
ended = {}
for name, arguments in json.load(sys.stdin).items():
    child = os.fork()
    if not child:
        status = 70
        try:
            os.dup2(os.open(arguments[0] + ".said", os.O_WRONLY | os.O_CREAT), 2)
            if os.geteuid() == 0:
                os.setgroups([]), os.setgid(65534), os.setuid(65534)
            status = solution.main(arguments)
        except BaseException as error:
            print("Traceback", repr(error), file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended[name] = [status, open(arguments[0] + ".said").read()]
print(json.dumps(ended))
"""
HIDDEN = ["in", "in/Band3", "in/Band3/img001.tif", "out"]


@pytest.fixture(scope="module")
def open_folder():
    """Return a folder that any user can reach; every pytest that starts closes those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture(scope="module")
def unprivileged(open_folder, weights):
    """Run the command line with each of HIDDEN closed to its user; return {hidden: (status, said, masks)}."""
    (open_folder / "model.pth").write_bytes(weights.read_bytes())
    commands = {}
    for case, hidden in enumerate(HIDDEN):
        root = open_folder / str(case)
        for number in (1, 2):
            write_tile(root / "in", f"00{number}", scene_numbers(number)[:32, :40])
        (root / "out").mkdir()
        (root / "out").chmod(0o777)
        (root / hidden).chmod(0o000)
        commands[hidden] = [str(root / "in"), str(root / "out"), "--weights", str(open_folder / "model.pth")]
    command = [sys.executable, "-c", UNPRIVILEGED, str(PROJECT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        command, input=json.dumps(commands), env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    ended = {}
    for case, (hidden, (status, said)) in enumerate(json.loads(run.stdout).items()):
        (open_folder / str(case) / hidden).chmod(0o755)
        ended[hidden] = (status, said, contents(open_folder / str(case) / "out"))
    return ended


@pytest.mark.parametrize("hidden", HIDDEN)
def test_places_without_permission_are_errors_not_tracebacks(unprivileged, hidden):
    status, said, masks = unprivileged[hidden]
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == (1 if "Band3" in hidden else 2), said
    assert hidden.rpartition("/")[2] in errors[0]
    assert len(masks) == (2 if "Band3" in hidden else 0)
    assert len(errors) == (2 if hidden == "in/Band3" else 1)


# --- A full disk ----------------------------------------------------------------------------------


@contextmanager
def largest_file(size):
    """Let this process write no file above `size` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_costs_the_masks_that_do_not_fit(tmp_path, weights):
    write_tile(tmp_path / "in", "001", np.full((32, 40, 5), 30000.0))
    write_tile(tmp_path / "in", "002", np.zeros((8, 8, 5)))
    (tmp_path / "out").mkdir()
    with largest_file(300):
        named = ["--data", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--weights", str(weights)]
        with pytest.MonkeyPatch.context() as patch:
            said = []
            patch.setattr(solution, "say", said.append)
            assert solution.main(named) == 1
    assert [line for line in said if "img001.tif cannot be written" in line and "make room" in line]
    assert all(path.stat().st_size <= 300 for path in (tmp_path / "out").iterdir())
    assert "img001.tif" not in os.listdir(tmp_path / "out") and kills.hidden(tmp_path / "out") == []


# --- Killed runs, many tiles -----------------------------------------------------------------------


def test_unfinished_masks_of_killed_runs_are_removed_when_old(data, tmp_path, weights):
    (tmp_path / "out").mkdir()
    parts = [tmp_path / "out" / f"{solution.PARTIAL_PREFIX}{name}.part" for name in ("old", "new")]
    for path in [*parts, tmp_path / "out" / ".mine"]:
        path.write_bytes(b"half")
    kills.grow_old([parts[0], tmp_path / "out" / ".mine"])
    assert run_main(data, tmp_path / "out", weights) == (0, [])
    assert sorted(path.name for path in kills.hidden(tmp_path / "out")) == sorted([".mine", parts[1].name])


def test_many_tiles_need_no_more_memory_and_one_bad_one_costs_itself(tmp_path, weights):
    found = load.run_many(150, 64, weights, tmp_path)
    assert found.faults == []
    assert found.slope < 64 * 64 * 5 * 4 / 2  # bytes a tile: far below what one tile's bands take


# --- Weights --------------------------------------------------------------------------------------

SPOILT = (
    None,
    0,
    -1,
    1e308,
    float("nan"),
    float("inf"),
    "x",
    [],
    {},
    [1],
    torch.zeros(2),
    b"\0",
    True,
    10**30,
)


def places_in(content, path=()):
    """Yield the path of every value below some containers, tensors left out but two."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for number, (key, value) in enumerate(items):
        if path and path[-1] == "state_dict" and number > 1:
            return
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places_in(value, (*path, key))


def test_a_model_file_with_any_setting_spoilt_is_loaded_or_refused_in_one_line(tmp_path, weights):
    rng, whole = np.random.default_rng(0), torch.load(weights, weights_only=True)
    places = [place for place in places_in(whole) if place]
    refused = 0
    for number in range(40):
        content = copy.deepcopy(whole)
        *parents, last = places[int(rng.integers(len(places)))]
        inner = content
        for key in parents:
            inner = inner[key]
        inner[last] = SPOILT[int(rng.integers(len(SPOILT)))]
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        try:
            solution.load_model(path)
        except solution.InputError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and path.name in str(error)
        path.unlink()
    assert refused > 13
