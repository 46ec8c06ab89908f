"""Every caller of solution.py, from a folder that holds only it and model.pth, with all that can go wrong."""

import ast
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import rasterio
import tifffile
import torch
from support import (
    CRF,
    PLAIN,
    PROJECT,
    contents,
    import_submission,
    make_readonly,
    make_submission,
    scene_numbers,
    write_model,
    write_tile,
)

import solution

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
GRADERS_PACKAGES = {"torch", "torchvision", "tqdm", "cv2", "PIL", "sklearn", "numpy", "tifffile"} | {
    "segmentation_models_pytorch"
}
MIXED = PLAIN._replace(min_speck=3, min_hole=3)
PLATFORM_SCRIPT = """
import json, sys
sys.modules["pydensecrf"] = None  # as on the platform
sys.path.insert(0, sys.argv[1])
import numpy as np
import solution
data, weights, second, result = sys.argv[2:6]
order = ("Band5", "Band2", "Band4", "Band1", "Band3")
folders = {band: data + "/" + band for band in order}
masks = solution.maskgeration(folders, weights)
np.savez(result, **masks)
stored = solution.maskgeration(data, second)
kinds = {key: [str(mask.dtype), list(mask.shape), type(mask).__name__] for key, mask in masks.items()}
np.savez(result + ".stored.npz", **stored)
told = {"kinds": kinds, "type": type(masks).__name__, "crf": solution.densecrf is not None}
print(json.dumps(told))
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Keep runs inside this process from taking all cores."""
    monkeypatch.setattr(solution, "usable_cores", lambda: 1)


@pytest.fixture(scope="module")
def submission(tmp_path_factory):
    """Return a read-only folder with solution.py and a model of two tiny members."""
    root = tmp_path_factory.mktemp("submission")
    model = write_model(root / "tiny.pth", member_weights=(1.0, 2.0), postprocess=MIXED)
    folder = make_submission(root / "kit", model)
    make_readonly(folder)
    return folder


@pytest.fixture(scope="module")
def module(submission):
    """Return that folder's solution.py, imported."""
    return import_submission(submission)


@pytest.fixture(scope="module")
def platform_tiles(tmp_path_factory):
    """Return a read-only data folder with three tiles img001 ... img003, one of an odd size, one uint16."""
    root = tmp_path_factory.mktemp("platform") / "data"
    write_tile(root, "001", scene_numbers(0))
    write_tile(root, "002", scene_numbers(1)[:70, :90])
    write_tile(root, "003", scene_numbers(1), dtype=np.uint16, suffix=".tiff")
    make_readonly(root)
    return root


@pytest.fixture(scope="module")
def training_tiles(tmp_path_factory):
    """Return a read-only data folder in the training tiles' naming style, labels beside the bands."""
    root = tmp_path_factory.mktemp("training") / "data"
    write_tile(root, "02_07", scene_numbers(0), "training")
    write_tile(root, "10_11", scene_numbers(1), "training", suffix=".TIF")
    (root / "label").mkdir()
    make_readonly(root)
    return root


def copy_of(tiles, folder):
    """Write the tiles 001 ... 003 anew, to be damaged."""
    for name, content in contents(tiles).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def run_python(arguments, cwd, turn):
    """Start a fresh interpreter in `cwd`, as a caller would, on the `turn`-th core."""
    cores = sorted(os.sched_getaffinity(0))
    core = {cores[turn % len(cores)]}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )


@pytest.fixture(scope="module")
def expected(module, platform_tiles):
    """Return the masks of the platform's tiles."""
    masks = module.maskgeration(str(platform_tiles), None)
    assert all(set(np.unique(mask)) == {0, 85, 170} for mask in masks.values())
    return masks


@pytest.fixture(scope="module")
def runs(submission, platform_tiles, training_tiles, tmp_path_factory):
    """Run every caller in its own process, all at once; return {caller: (exit status, stdout, stderr)}."""
    out = tmp_path_factory.mktemp("out")
    empty = tmp_path_factory.mktemp("working_folder")
    inputs = {folder: contents(folder) for folder in (submission, platform_tiles, training_tiles)}
    script = out / "grader.py"
    script.write_text(PLATFORM_SCRIPT)
    crf_model = write_model(out / "crf.pth", member_weights=(1.0, 2.0), postprocess=MIXED._replace(crf=CRF))
    solve = submission / "solution.py"
    broken = copy_of(platform_tiles, tmp_path_factory.mktemp("broken") / "data")
    (broken / "Band4" / "img002.tif").write_bytes(b"")
    started = {
        "user": run_python([solve, platform_tiles, out / "user"], empty, 0),
        "template": run_python(
            ["solution.py", "--data", training_tiles, "--masks", "none", "--out", out / "template"],
            submission,
            1,
        ),
        "instructions": run_python([solve, "--imagepath", broken, "--output", out / "instructions"], empty, 2),
        "platform": run_python(
            [script, submission, platform_tiles, crf_model, out / "second", out / "masks.npz"], empty, 3
        ),
    }
    ended = {}
    for name, process in started.items():
        stdout, stderr = process.communicate(timeout=300)
        ended[name] = (process.returncode, stdout, stderr)
    assert {folder: contents(folder) for folder in inputs} == inputs  # read only, in deed
    assert contents(empty) == {}
    return {**ended, "out": out}


def read_png(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


# --- The callers, each in its own process ---------------------------------------------------------


def test_the_user_gets_pngs_with_the_stems_of_band1(runs, expected):
    status, stdout, stderr = runs["user"]
    assert (status, stdout) == (0, ""), stderr
    folder = runs["out"] / "user"
    assert sorted(path.name for path in folder.iterdir()) == ["img001.png", "img002.png", "img003.png"]
    for identifier, mask in expected.items():
        written = read_png(folder / f"img{identifier}.png")
        assert written.dtype == np.uint8
        np.testing.assert_array_equal(written, mask)


def test_progress_is_one_line_a_tile_and_a_closing_line(runs):
    lines = runs["user"][2].splitlines()
    assert [line.rpartition(",")[0] for line in lines[-4:-1]] == [
        "[1/3] img001.tif: mask, passes: 2",
        "[2/3] img002.tif: mask, passes: 2",
        "[3/3] img003.tiff: mask, passes: 2",
    ]
    assert lines[-1].startswith("3 tiles, 0 failed, ") and lines[-1].endswith(" s a tile, 2 to 2 of 2 passes")
    assert "\r" not in runs["user"][2]


def test_the_template_gets_files_named_exactly_as_in_band1(runs, module, training_tiles):
    status, _, stderr = runs["template"]
    assert status == 0, stderr
    folder = runs["out"] / "template"
    names = sorted(path.name for path in (training_tiles / "Band1").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    masks = module.maskgeration(training_tiles, None)
    assert list(masks) == ["02_07", "10_11"]
    for name, mask in zip(names, masks.values()):
        with rasterio.open(folder / name) as raster:
            assert raster.driver == "GTiff" and raster.count == 1 and raster.dtypes == ("uint8",)
            np.testing.assert_array_equal(raster.read(1), mask)
        assert (folder / name).stat().st_mode & 0o044 == 0o044  # another user can read it


def test_the_instructions_get_the_same_and_a_broken_tile_costs_only_itself(runs, expected):
    status, _, stderr = runs["instructions"]
    assert status == 1, stderr
    folder = runs["out"] / "instructions"
    assert sorted(path.name for path in folder.iterdir()) == ["img001.tif", "img002.tif", "img003.tiff"]
    with rasterio.open(folder / "img001.tif") as first, rasterio.open(folder / "img003.tiff") as third:
        np.testing.assert_array_equal(first.read(1), expected["001"])
        np.testing.assert_array_equal(third.read(1), expected["003"])
    with rasterio.open(folder / "img002.tif") as second:
        np.testing.assert_array_equal(second.read(1), np.zeros((70, 90)))
    assert "Band4/img002.tif: cannot be read as a TIFF (0 bytes" in stderr
    assert "copy or export the file again" in stderr
    assert stderr.splitlines()[-1].startswith("3 tiles, 1 failed, ")


def test_the_platform_gets_a_dict_of_arrays(runs, expected):
    """Called with folders out of order and the path of weights that ask for a CRF, without pydensecrf."""
    status, stdout, stderr = runs["platform"]
    assert status == 0, stderr
    told = json.loads(stdout)
    shapes = {"001": [96, 96], "002": [70, 90], "003": [96, 96]}
    assert told["kinds"] == {key: ["uint8", shape, "ndarray"] for key, shape in shapes.items()}
    assert told["type"] == "dict" and told["crf"] is False
    masks = np.load(runs["out"] / "masks.npz")
    assert_same(dict(masks), expected)
    assert "pydensecrf is not installed" in stderr


def test_the_documented_second_argument_gets_files(runs, expected):
    stored = np.load(runs["out"] / "masks.npz.stored.npz")
    assert_same(dict(stored), expected)
    folder = runs["out"] / "second"
    assert sorted(path.name for path in folder.iterdir()) == ["img001.tif", "img002.tif", "img003.tiff"]
    np.testing.assert_array_equal(tifffile.imread(folder / "img002.tif"), expected["002"])


# --- maskgeration's second argument ---------------------------------------------------------------


def assert_same(masks, expected):
    assert masks.keys() == expected.keys()
    for identifier, mask in expected.items():
        np.testing.assert_array_equal(masks[identifier], mask)


def test_a_folder_that_cannot_be_written_to_still_gives_masks(module, platform_tiles, expected, tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    masks = module.maskgeration(platform_tiles, tmp_path / "file" / "out")
    assert_same(masks, expected)
    assert "cannot be written to" in capfd.readouterr().err
    assert contents(tmp_path) == {"file": b"in the way"}


def test_a_file_that_cannot_be_written_still_gives_all_masks(module, platform_tiles, expected, tmp_path, capfd):
    (tmp_path / "img002.tif").mkdir()
    assert_same(module.maskgeration(platform_tiles, str(tmp_path)), expected)
    assert "the mask of img002.tif cannot be written" in capfd.readouterr().err
    assert sorted(contents(tmp_path)) == ["img001.tif", "img003.tiff"]


def test_missing_weights_named_by_the_platform_are_looked_for_elsewhere(
    module, platform_tiles, expected, tmp_path, capfd
):
    assert_same(module.maskgeration(platform_tiles, tmp_path / "PATH" / "model.pth"), expected)
    assert "model.pth: no such weights file; looking beside solution.py" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_an_error_never_replaced(module, platform_tiles, tmp_path):
    weights = tmp_path / "model.pth"
    weights.write_bytes(b"\0" * 1000)
    with pytest.raises(module.InputError, match="model.pth: damaged.*1000 bytes"):
        module.maskgeration(platform_tiles, weights)


def test_no_weights_anywhere_is_an_error(tmp_path, platform_tiles, submission, monkeypatch):
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "solution.py").write_bytes((submission / "solution.py").read_bytes())
    monkeypatch.chdir(tmp_path / "kit")
    alone = import_submission(tmp_path / "kit")
    with pytest.raises(alone.InputError, match="no weights: looked for"):
        alone.maskgeration(platform_tiles, "model.pth")


def test_masks_never_go_over_the_input(module, tmp_path, platform_tiles, expected, capfd):
    data = copy_of(platform_tiles, tmp_path / "data")
    before = contents(data)
    assert_same(module.maskgeration(data, data / "Band1"), expected)
    assert "is an input folder" in capfd.readouterr().err
    assert contents(data) == before


# --- The command line, in this process ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("fill", [0, np.nan])
def test_every_type_and_nodata_gives_the_same_kind_of_mask(module, tmp_path, dtype, fill):
    numbers = scene_numbers(0).copy()
    numbers[np.isin(numbers, np.array(solution.SIGNED_FILL_VALUES) % 65536)] += 1  # nodata in int16 files
    if dtype == "uint8":
        numbers = np.ceil(numbers / 257)
    nodata = (numbers == 0).all(axis=-1)
    assert 0.02 < nodata.mean() < 0.9
    if dtype == "float32":
        numbers[numbers == 0] = fill
    stored = numbers.astype(np.uint16).view(np.int16) if dtype == "int16" else numbers
    write_tile(tmp_path / "in", "001", stored, dtype=dtype)
    assert module.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    mask = read_png(tmp_path / "out" / "img001.png")
    assert mask.shape == (96, 96) and mask.dtype == np.uint8
    assert not mask[nodata].any() and mask[~nodata].any()
    assert set(np.unique(mask)) <= {0, 85, 170, 255}
    if dtype != "uint8":
        write_tile(tmp_path / "reference", "001", np.nan_to_num(numbers))
        np.testing.assert_array_equal(mask, module.maskgeration(tmp_path / "reference")["001"])


def lose(path):
    path.unlink()


def shrink(path):
    tifffile.imwrite(path, np.ones((10, 12), np.float32))


FAULTS = {
    "missing": (lose, "no file in Band3", "add the missing file"),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:9000]),
        "cannot be read",
        "copy or export",
    ),
    "zero bytes": (lambda path: path.write_bytes(b""), "(0 bytes", "copy or export"),
    "text": (lambda path: path.write_text("404"), "(3 bytes", "copy or export"),
    "another size": (shrink, "12 x 10 px, expected 96 x 96 px", "resample"),
    "three bands": (
        lambda path: tifffile.imwrite(path, np.ones((96, 96, 3), np.uint8)),
        "shape (96, 96, 3)",
        "split the bands",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_band_costs_that_tile_only(module, platform_tiles, expected, tmp_path, capfd, fault):
    damage, finding, remedy = FAULTS[fault]
    data = copy_of(platform_tiles, tmp_path / "data")
    damage(data / "Band3" / "img001.tif")
    assert module.main([str(data), str(tmp_path / "out")]) == 1
    error = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert "001" in error and "Band3" in error and finding in error and remedy in error
    assert "background mask" in error
    assert sorted(contents(tmp_path / "out")) == ["img001.png", "img002.png", "img003.png"]
    np.testing.assert_array_equal(read_png(tmp_path / "out" / "img001.png"), np.zeros((96, 96), np.uint8))
    for identifier in ("002", "003"):
        np.testing.assert_array_equal(read_png(tmp_path / "out" / f"img{identifier}.png"), expected[identifier])


def test_a_missing_band_folder_costs_every_tile_but_says_so(module, platform_tiles, tmp_path, capfd):
    data = copy_of(platform_tiles, tmp_path / "data")
    (data / "Band5").rename(data / "thermal")
    assert module.main([str(data), str(tmp_path / "out")]) == 1
    assert len(contents(tmp_path / "out")) == 3
    assert capfd.readouterr().err.count("no file in Band5") == 3


def test_a_mask_that_cannot_be_written_costs_that_tile_only(module, platform_tiles, expected, tmp_path, capfd):
    (tmp_path / "img001.png").mkdir()
    assert module.main([str(platform_tiles), str(tmp_path)]) == 1
    error = capfd.readouterr().err
    assert "the mask of img001.tif cannot be written" in error and "3 tiles, 1 failed" in error
    assert sorted(contents(tmp_path)) == ["img002.png", "img003.png"]  # and nothing half-written
    np.testing.assert_array_equal(read_png(tmp_path / "img002.png"), expected["002"])


@pytest.mark.parametrize("doors", [("", ""), ("--data", "--out"), ("--imagepath", "--output")])
def test_no_tiles_is_status_2_with_the_layout(module, tmp_path, capfd, doors):
    (tmp_path / "in" / "Band1").mkdir(parents=True)
    places = (str(tmp_path / "in"), str(tmp_path / "out"))
    arguments = [word for pair in zip(doors, places) for word in pair if word]
    assert module.main(arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: no TIFF in") and "Band1 ... Band5" in error
    assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}
    assert module.main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "no folder that can be looked into" in capfd.readouterr().err


@pytest.mark.parametrize("weights", ["missing", "empty", "damaged", "text"])
def test_bad_weights_are_status_2_and_nothing_is_written(module, submission, platform_tiles, tmp_path, capfd, weights):
    path = tmp_path / "model.pth"
    whole = (submission / "model.pth").read_bytes()
    content = {"empty": b"", "damaged": whole[: len(whole) // 2], "text": b"git-lfs pointer"}.get(weights)
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out"
    assert module.main([str(platform_tiles), str(out), "--weights", str(path)]) == 2
    error = capfd.readouterr().err
    assert str(path) in error and len(error.splitlines()) == 1
    assert ("no weights: looked for" if weights == "missing" else "copy it again") in error
    assert contents(out) == {}


@pytest.mark.parametrize("arguments", [[], ["IN"], ["--data", "D"], ["--out", "O"], ["A", "B", "--data", "D"]])
def test_incomplete_command_lines_are_status_2(module, arguments, capfd):
    with pytest.raises(SystemExit) as stopped:
        module.main(arguments)
    assert stopped.value.code == 2
    assert "give IN_DIR OUT_DIR, or --data D --masks M --out O" in capfd.readouterr().err


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_an_input_folder_is_no_output_folder(module, platform_tiles, tmp_path, capfd, through):
    data = copy_of(platform_tiles, tmp_path / "data")
    before = contents(data)
    target = data / "Band1"
    if through == "a link":
        (tmp_path / "link").symlink_to(target)
        target = tmp_path / "link"
    assert module.main(["--data", str(data), "--masks", "m", "--out", str(target)]) == 2
    assert "is an input folder; name another" in capfd.readouterr().err
    assert contents(data) == before


def test_an_output_that_is_a_file_is_status_2(module, platform_tiles, tmp_path, capfd):
    (tmp_path / "out").write_text("in the way")
    assert module.main([str(platform_tiles), str(tmp_path / "out")]) == 2
    assert "cannot be written to" in capfd.readouterr().err


def test_a_second_run_replaces_masks_and_leaves_other_files(module, platform_tiles, expected, tmp_path):
    (tmp_path / "img001.png").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    assert module.main([str(platform_tiles), str(tmp_path)]) == 0
    np.testing.assert_array_equal(read_png(tmp_path / "img001.png"), expected["001"])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_large_scene_goes_through(module, tmp_path):
    numbers = np.tile(scene_numbers(0), (11, 1, 1))[:1040]  # one side above the limit
    write_tile(tmp_path / "in", "02_07", numbers, "training", np.uint16)
    mask = module.maskgeration(tmp_path / "in")["02_07"]
    assert mask.shape == (1040, 96)
    assert not mask[(numbers == 0).all(axis=-1)].any() and len(np.unique(mask)) == 3


# --- Atomic writes --------------------------------------------------------------------------------


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a full disk, for files above 1000 bytes
        with pytest.raises(OSError):
            solution.write_atomically(path, b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert contents(tmp_path) == {"mask.png": b"old"}


def write_for_ever(path):
    """Write two contents in turn until killed."""
    while True:
        for letter in (b"a", b"b"):
            solution.write_atomically(path, letter * 3_000_000)


def test_a_killed_run_leaves_whole_files(tmp_path):
    path = tmp_path / "mask.png"
    for _ in range(3):
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
        process.start()
        deadline = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02)
        process.kill()
        process.join()
        content = path.read_bytes()
        assert content in (b"a" * 3_000_000, b"b" * 3_000_000)
        path.unlink()
    assert all(left.name.startswith(".") and left.suffix == ".part" for left in tmp_path.iterdir())


# --- The source -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree():
    """Return solution.py as Python 3.9 parses it."""
    source = (PROJECT / "solution.py").read_text(encoding="utf-8")
    return ast.parse(source, feature_version=(3, 9))


def imports_of(nodes):
    """Return the top-level packages that these statements import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    return names


def test_only_the_graders_packages_are_needed(tree):
    foreign = imports_of(ast.walk(tree)) - set(sys.stdlib_module_names) - GRADERS_PACKAGES
    assert foreign == {"pydensecrf"}
    tries = [node for node in tree.body if isinstance(node, ast.Try)]
    assert {"pydensecrf"} == set().union(*(imports_of(node.body) for node in tries))
    assert "pydensecrf" not in imports_of(tree.body)


def test_the_file_starts_with_its_packages(tree):
    first = (PROJECT / "solution.py").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith('"""Required packages: ')
    named = {name.strip() for name in first.split(":", 1)[1].split(",")}
    imported = imports_of(tree.body) - set(sys.stdlib_module_names)
    modules = {"opencv-python": "cv2", "pillow": "PIL", "scikit-learn": "sklearn"}
    assert {modules.get(name, name) for name in named} >= imported
    assert ast.get_docstring(tree).startswith("Required packages")


def test_annotations_are_python_3_9(tree):
    """`int | None` runs from 3.10 on: in 3.9 it may stand in annotations, which are not evaluated, and only there."""
    assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    optional = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and ast.unparse(node.right) == "None"
    ]
    annotations = [node.annotation for node in ast.walk(tree) if isinstance(node, (ast.arg, ast.AnnAssign))]
    annotations += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    within = {id(node) for annotation in filter(None, annotations) for node in ast.walk(annotation)}
    assert optional and all(id(node) in within for node in optional)


def test_nothing_is_loaded_loosely(tree):
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        strict = [keyword.value for keyword in call.keywords if keyword.arg == "strict"]
        assert all(ast.unparse(value) == "True" for value in strict)
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in handlers)  # no bare except


def test_the_model_file_here_is_tiny(submission):
    assert sorted(path.name for path in submission.iterdir()) == ["model.pth", "solution.py"]
    assert torch.load(submission / "model.pth", weights_only=True)["format"] == solution.MODEL_FORMAT


def test_a_folder_with_weights_in_it_serves_as_both(tmp_path) -> None:
    write_tile(tmp_path / "in", "001", scene_numbers(0))
    (tmp_path / "out").mkdir()
    debris_only = PLAIN._replace(extent_bias=50.0, debris_bias=50.0)
    write_model(tmp_path / "out" / "model.pth", postprocess=debris_only)
    masks = solution.maskgeration(tmp_path / "in", tmp_path / "out")
    assert set(np.unique(masks["001"])) == {0, 170}
    assert (tmp_path / "out" / "img001.tif").is_file()


def test_omp_num_threads_is_honoured(monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= solution.usable_cores() <= os.cpu_count()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert solution.usable_cores() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")  # nested levels, a form that only OpenMP reads
    assert solution.usable_cores() >= 1
