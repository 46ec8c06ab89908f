"""Would the submission be accepted? Runs it as the grader does, in bare folders, and judges what comes out.

Every caller is a process of its own whose working folder holds only copies of `solution.py` and `model.pth`,
with nothing of the project on its path, no cache of downloaded weights and a network that cannot be reached.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence, Union

import cv2
import numpy as np
import tifffile
import torch

from prep.synthetic import NAMINGS, write_sample
from solution import (
    BANDS,
    CLASS_NAMES,
    CLASS_VALUES,
    MODEL_FILE,
    InputError,
    TileFiles,
    find_tiles,
    read_model_file,
    read_tile,
    valid_mask,
)
from train.package import MAX_BYTES
from train.submission import SubmissionError, sha256

SAMPLE_TILES = 3
SAMPLE_SIZE = 256  # px
SAMPLE_SEED = 0

# What `model.pth` has to hold, see "Contracts" in the architecture.
MODEL_KEYS = ("format", "members", "class_bias", "postprocess", "provenance")
MEMBER_KEYS = ("arch", "weight", "fold", "val_mcc", "normalization", "state_dict")
PROVENANCE_KEYS = ("tiles", "scheme", "config", "versions")

START_LIMIT = 300  # s until a caller that has not finished is stopped, and as many more for each tile:
TILE_LIMIT = 120

NO_MASKS_STATUS = 2  # of a run that could not start
COMPLAINT = re.compile(r"^\s*(warning|error|fatal|traceback)\b", re.IGNORECASE)
# Not among the grader's packages: what `solution.py` says without it is no fallback there but the rule.
TOLERATED = ("pydensecrf",)
CLOSED_PORT = (
    "http://127.0.0.1:9"  # a proxy that refuses at once: a download fails instead of passing by luck
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SHOWN = 3  # faults of one kind that are spelt out
TABLE_WIDTH = 150  # columns

# --- What is checked and what was found -----------------------------------------------------------


class CheckResult(NamedTuple):
    """One line of the verdict: `check` on `subject`, what was found and what was expected."""

    subject: str
    check: str
    passed: bool
    found: str
    expected: str


class Tile(NamedTuple):
    """What is known of a tile without the submission. `nodata`: (H, W) bool, no band has a value."""

    tile_id: str
    name: str
    nodata: np.ndarray


class Case(NamedTuple):
    """A set of tiles as a grader would hand it over: read-only, in `folder`/data, beside an empty masks/."""

    label: str
    folder: Path
    tiles: tuple[Tile, ...]

    @property
    def data(self) -> Path:
        """The folder of the band folders."""
        return self.folder / "data"

    @property
    def band_folders(self) -> dict[str, str]:
        """The bands as the platform names them, e.g. {"Band1": ".../Band1"}."""
        return {band.folder: str(self.data / band.folder) for band in BANDS}


Mask = Union[np.ndarray, str]  # pixels, or the reason why there are none
Masks = Mapping[str, Mask]


class Outcome(NamedTuple):
    """The masks that one caller got, by tile id."""

    subject: str
    masks: Masks


class Run(NamedTuple):
    """A finished process; `status` is None where it was stopped at its time limit."""

    status: int | None
    seconds: float
    output: str
    changed_inputs: list[str]
    changed_beside: list[str]  # in the folder of solution.py

    @property
    def last_words(self) -> str:
        """The last line that it printed."""
        lines = self.output.strip().splitlines()
        return lines[-1] if lines else "nothing was printed"


class Bench(NamedTuple):
    """What is under test, where it is tested, and `announce`, which is told of each process to come."""

    solution: Path
    weights: Path
    workdir: Path
    python: str
    announce: Callable[[str], None]


def judge(subject: str, check: str, faults: Sequence[str], expected: str) -> CheckResult:
    """Return the result of a check that passes where there are no `faults`."""
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    found = "; ".join([*faults[:SHOWN], *more]) or expected
    return CheckResult(subject, check, not faults, found, expected)


# --- Tiles ----------------------------------------------------------------------------------------


def lay_out_case(label: str, source: Path, folder: Path) -> Case:
    """Copy the bands of the tiles in `source`, without labels, to `folder` and make them read-only.

    Raises:
        solution.InputError: there are no tiles.
        solution.TileError: one of them is incomplete or unreadable.
    """
    tiles = []
    for files in find_tiles(source):
        image = read_tile(files)
        copy_bands(files, folder / "data")
        tiles.append(Tile(files.tile_id, files.name, ~valid_mask(image)))
    (folder / "masks").mkdir()
    set_modes(folder, 0o444, 0o555)
    return Case(label, folder, tuple(tiles))


def copy_bands(files: TileFiles, data: Path) -> None:
    """Copy a tile's five files into band folders under `data`."""
    for band, path in zip(BANDS, files.paths):
        (data / band.folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, data / band.folder / path.name)


def lay_out_cases(tiles: Path | None, workdir: Path) -> list[Case]:
    """Return the cases to run: the tiles in `tiles`, else the same synthetic scenes in both naming styles."""
    if tiles is not None:
        return [lay_out_case("given tiles", tiles, workdir / "given")]
    cases = []
    for naming in NAMINGS:
        scenes = workdir / f"{naming}-scenes"
        write_sample(scenes, SAMPLE_TILES, SAMPLE_SIZE, SAMPLE_SEED, naming, "phase2")
        cases.append(lay_out_case(f"{naming} names", scenes, workdir / naming))
    return cases


def set_modes(folder: Path, file_mode: int, folder_mode: int) -> None:
    """Give all files and folders in and at `folder` these modes."""
    folder.chmod(0o755)  # or its entries could not be changed
    for path in sorted(folder.rglob("*")):
        path.chmod(folder_mode if path.is_dir() else file_mode)
    folder.chmod(folder_mode)


def take_snapshot(folder: Path) -> dict[str, tuple]:
    """Return all that `folder` holds with content hash and time of change: modes do not bind root."""
    snapshot = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" in path.parts:
            continue
        is_file = path.is_file()
        digest = sha256(path) if is_file else ""
        # A folder's time changes with its entries, which are compared themselves.
        snapshot[str(path.relative_to(folder))] = (digest, path.stat().st_mtime_ns if is_file else 0)
    return snapshot


def compare_snapshots(before: Mapping[str, tuple], after: Mapping[str, tuple]) -> list[str]:
    """Return what was added, removed and changed."""
    added = [f"{name} is new" for name in sorted(set(after) - set(before))]
    removed = [f"{name} is gone" for name in sorted(set(before) - set(after))]
    kept = sorted(set(before) & set(after))
    return added + removed + [f"{name} was changed" for name in kept if before[name] != after[name]]


# --- Processes ------------------------------------------------------------------------------------


@contextmanager
def bare_folder(workdir: Path, files: Mapping[str, Path]) -> Iterator[Path]:
    """Give a read-only folder with copies of `files` {name: path} and nothing else; it goes afterwards."""
    folder = workdir / "bare"
    folder.mkdir()
    try:
        for name, path in files.items():
            shutil.copyfile(path, folder / name)
        set_modes(folder, 0o444, 0o555)
        yield folder
    finally:
        set_modes(folder, 0o644, 0o755)
        shutil.rmtree(folder)


def bare_environment(home: Path) -> dict[str, str]:
    """Return this process's environment without Python's settings, caches and a way to the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    caches = ("HOME", "TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME")
    return {**kept, **dict.fromkeys(proxies, CLOSED_PORT), **dict.fromkeys(caches, str(home))}


def run_bare(bench: Bench, files: Mapping[str, Path], arguments: Sequence[str], case: Case) -> Run:
    """Run the interpreter with `arguments` in a bare folder of `files`; watch that folder and the inputs."""
    home = bench.workdir / "home"
    home.mkdir(exist_ok=True)
    inputs = take_snapshot(case.folder)
    with bare_folder(bench.workdir, files) as folder:
        beside = take_snapshot(folder)
        started = time.perf_counter()
        try:
            process = subprocess.run(
                [bench.python, *arguments],
                cwd=folder,
                env=bare_environment(home),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=START_LIMIT + TILE_LIMIT * len(case.tiles),
            )
            status, output = process.returncode, process.stdout
        except subprocess.TimeoutExpired as error:
            status, output = None, error.stdout or b""
        seconds = time.perf_counter() - started
        changed_beside = compare_snapshots(beside, take_snapshot(folder))
    changed_inputs = compare_snapshots(inputs, take_snapshot(case.folder))
    return Run(status, seconds, output.decode(errors="replace"), changed_inputs, changed_beside)


def judge_run(subject: str, run: Run) -> list[CheckResult]:
    """Return the results on a process that should have done its work without a word of complaint."""
    status = [] if run.status == 0 else [describe_status(run)]
    complaints = [
        line.strip()
        for line in run.output.splitlines()
        if COMPLAINT.match(line) and not any(word in line for word in TOLERATED)
    ]
    return [
        judge(subject, "exit status", status, "0"),
        judge(subject, "no fallback", complaints, "no warning, no error"),
        judge(subject, "inputs untouched", run.changed_inputs, "as they were"),
        judge(subject, "nothing written beside it", run.changed_beside, "as it was"),
    ]


def describe_status(run: Run) -> str:
    """Return how a process ended, with its last line."""
    if run.status is None:
        return f"stopped after {run.seconds:.0f} s; last line: {run.last_words}"
    return f"{run.status}; last line: {run.last_words}"


# --- Masks ----------------------------------------------------------------------------------------


def read_mask(path: Path) -> Mask:
    """Return the pixels of a mask file, or why it cannot be read as what its name says."""
    try:
        if path.suffix == ".png":
            return decode_png(path.read_bytes())
        return tifffile.imread(path)
    except Exception as error:  # a damaged TIFF may raise almost anything
        return f"{type(error).__name__}: {error}"


def decode_png(content: bytes) -> Mask:
    """Return the pixels of a PNG as stored."""
    if not content.startswith(PNG_SIGNATURE):
        return f"begins with {content[:8]!r}, not as a PNG"
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    return "a damaged PNG" if pixels is None else pixels


def read_folder(folder: Path) -> dict[str, Mask]:
    """Return {file name: mask} of all that lies in `folder`, empty where there is none."""
    if not folder.is_dir():
        return {}
    return {
        str(path.relative_to(folder)): read_mask(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def judge_masks(subject: str, masks: Masks, tiles: Mapping[str, Tile]) -> list[CheckResult]:
    """Return the results on masks whose names should be those of `tiles`."""
    missing = sorted(set(tiles) - set(masks))
    extra = sorted(set(masks) - set(tiles))
    known = {name: mask for name, mask in masks.items() if name in tiles}
    unreadable = [f"{name}: {mask}" for name, mask in known.items() if isinstance(mask, str)]
    arrays = {name: mask for name, mask in known.items() if isinstance(mask, np.ndarray)}
    fitting = {name: mask for name, mask in arrays.items() if mask.shape == tiles[name].nodata.shape}
    dtypes = [f"{name}: {mask.dtype}" for name, mask in arrays.items() if mask.dtype != np.uint8]
    shapes = [
        f"{name}: {mask.shape} for a tile of {tiles[name].nodata.shape}"
        for name, mask in arrays.items()
        if name not in fitting
    ]
    return [
        judge(subject, "a mask for every tile", [f"no {name}" for name in missing], f"{len(tiles)} masks"),
        judge(subject, "nothing else", [f"{name} is extra" for name in extra], "no other name"),
        judge(subject, "readable", unreadable, "an image of the kind that the name says"),
        judge(subject, "type", dtypes, "uint8"),
        judge(subject, "shape", shapes, "the tile's"),
        judge(subject, "values", list_wrong_values(arrays), f"only {', '.join(map(str, CLASS_VALUES))}"),
        judge(subject, "nodata is 0", list_nodata_faults(fitting, tiles), "0 at every nodata pixel"),
    ]


def list_wrong_values(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Return the masks that hold a value which stands for no class."""
    wrong = {name: np.setdiff1d(mask, CLASS_VALUES) for name, mask in arrays.items()}
    return [
        f"{name}: {', '.join(f'{value:g}' for value in values[:4])}"
        for name, values in wrong.items()
        if values.size
    ]


def list_nodata_faults(arrays: Mapping[str, np.ndarray], tiles: Mapping[str, Tile]) -> list[str]:
    """Return the masks that show a class where the tile has no data."""
    counts = {name: np.count_nonzero(mask[tiles[name].nodata]) for name, mask in arrays.items()}
    return [f"{name}: {count} nodata pixels have a class" for name, count in counts.items() if count]


def judge_agreement(subject: str, outcomes: Sequence[Outcome]) -> CheckResult:
    """Return whether all callers got the same masks for the same tiles."""
    first = outcomes[0]
    faults = [
        f"tile {tile_id}: {other.subject} differs from {first.subject}"
        for other in outcomes[1:]
        for tile_id in sorted(set(first.masks) & set(other.masks))
        if not is_same(first.masks[tile_id], other.masks[tile_id])
    ]
    return judge(subject, "all callers agree", faults, "identical masks")


def is_same(one: Mask, other: Mask) -> bool:
    """Return whether two masks are equal; what could not be read has been reported already."""
    return isinstance(one, str) or isinstance(other, str) or np.array_equal(one, other)


def judge_life(subject: str, outcomes: Sequence[Outcome]) -> CheckResult:
    """Return the class shares over all masks; plain background everywhere is a dead model."""
    masks = [mask for outcome in outcomes for mask in outcome.masks.values() if isinstance(mask, np.ndarray)]
    counts = np.array([sum(np.count_nonzero(mask == value) for mask in masks) for value in CLASS_VALUES])
    shares = counts / max(sum(mask.size for mask in masks), 1)
    found = ", ".join(f"{name} {share:.1%}" for name, share in zip(CLASS_NAMES, shares))
    return CheckResult(subject, "classes", bool(counts[1:].any()), found, "not background everywhere")


def judge_names(outcomes: Sequence[Outcome]) -> CheckResult:
    """Return whether the same scenes got the same masks under each naming style, in the order of tile ids."""
    first, *others = [[outcome.masks[tile_id] for tile_id in sorted(outcome.masks)] for outcome in outcomes]
    faults = [
        f"tile number {number} of {outcome.subject} differs from {outcomes[0].subject}"
        for outcome, masks in zip(outcomes[1:], others)
        for number, (one, other) in enumerate(zip(first, masks), start=1)
        if len(masks) == len(first) and not is_same(one, other)
    ]
    return judge("naming styles", "agree", faults, "identical masks of identical scenes")


def name_as_png(tile: Tile) -> str:
    """Return the name of a mask for the positional caller."""
    return f"{Path(tile.name).stem}.png"


def name_as_band1(tile: Tile) -> str:
    """Return the name of a mask for the organisers' callers."""
    return tile.name


# --- Callers: command lines -----------------------------------------------------------------------


class CommandLine(NamedTuple):
    """A way to call solution.py; `name` gives the file name of a tile's mask."""

    label: str
    arguments: Callable[[Case, Path], list[Path | str]]
    name: Callable[[Tile], str]


COMMAND_LINES = (
    CommandLine("IN OUT", lambda case, out: [case.data, out], name_as_png),
    CommandLine(
        "--data --masks --out",
        lambda case, out: ["--data", case.data, "--masks", case.folder / "masks", "--out", out],
        name_as_band1,
    ),
    CommandLine(
        "--imagepath --output",
        lambda case, out: ["--imagepath", case.data, "--output", out],
        name_as_band1,
    ),
)


def submitted_files(bench: Bench) -> dict[str, Path]:
    """Return what the bare folder holds."""
    return {"solution.py": bench.solution, MODEL_FILE: bench.weights}


def check_command_line(
    bench: Bench, case: Case, line: CommandLine
) -> tuple[list[CheckResult], list[Outcome]]:
    """Run one command line; return the results, and the masks it wrote."""
    subject = f"{case.label}: {line.label}"
    bench.announce(subject)
    with output_folder(bench) as out:
        arguments = ["solution.py", *map(str, line.arguments(case, out))]
        run = run_bare(bench, submitted_files(bench), arguments, case)
        masks = read_folder(out)
    by_name = {line.name(tile): tile for tile in case.tiles}
    pace = f"{run.seconds / len(case.tiles):.2f} s a tile, start included"
    results = [*judge_run(subject, run), *judge_masks(subject, masks, by_name), report_time(subject, pace)]
    return results, [Outcome(subject, by_tile_id(masks, by_name))]


def report_time(subject: str, pace: str) -> CheckResult:
    """Return a result that always passes: the platform's limit is not published."""
    return CheckResult(subject, "time", True, pace, "as short as can be")


@contextmanager
def output_folder(bench: Bench) -> Iterator[Path]:
    """Give the path of a folder for masks that is not there yet; it goes afterwards."""
    folder = bench.workdir / "out"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def by_tile_id(masks: Masks, by_name: Mapping[str, Tile]) -> dict[str, Mask]:
    """Return masks under their tile ids, leaving out what belongs to no tile."""
    return {by_name[name].tile_id: mask for name, mask in masks.items() if name in by_name}


# --- Callers: maskgeration ------------------------------------------------------------------------

# Run by the interpreter under test, Python 3.9 too, in the bare folder.
PLATFORM_CODE = """
import json, sys, time
request = json.loads(sys.argv[1])
started = time.perf_counter()
import numpy
import solution
report = {"start": time.perf_counter() - started, "calls": []}
for number, arguments in enumerate(request["calls"]):
    started = time.perf_counter()
    try:
        returned = solution.maskgeration(*arguments)
    except BaseException as error:
        report["calls"].append({"raised": "%s: %s" % (type(error).__name__, error)})
        continue
    call = {"seconds": time.perf_counter() - started, "type": type(returned).__name__, "masks": []}
    for index, (key, mask) in enumerate(returned.items() if isinstance(returned, dict) else ()):
        name = key if isinstance(key, str) else "%s %r" % (type(key).__name__, key)
        is_array = isinstance(mask, numpy.ndarray) and mask.dtype.kind in "biuf"
        file = "%d-%d.npy" % (number, index) if is_array else None
        if is_array:
            numpy.save(request["folder"] + "/" + file, mask)
        call["masks"].append([name, type(mask).__name__, file])
    report["calls"].append(call)
with open(request["folder"] + "/report.json", "w") as stream:
    json.dump(report, stream)
"""


class Call(NamedTuple):
    """One call of maskgeration: what came back, masks by tile id, or what was raised."""

    raised: str | None
    returned: str  # name of the type
    seconds: float
    masks: Masks


class PlatformReport(NamedTuple):
    """A process that imported solution and called maskgeration; no calls where the import failed."""

    run: Run
    start: float  # s that the import took
    calls: list[Call]


def call_maskgeration(
    bench: Bench, files: Mapping[str, Path], calls: Sequence[Sequence], case: Case
) -> PlatformReport:
    """Import solution in a bare folder of `files` and call maskgeration with each of `calls`' arguments."""
    folder = bench.workdir / "returned"
    folder.mkdir()
    try:
        request = json.dumps({"folder": str(folder), "calls": calls})
        run = run_bare(bench, files, ["-c", PLATFORM_CODE, request], case)
        if not (folder / "report.json").is_file():
            return PlatformReport(run, 0.0, [])
        report = json.loads((folder / "report.json").read_text())
        return PlatformReport(run, report["start"], [read_call(call, folder) for call in report["calls"]])
    finally:
        shutil.rmtree(folder)


def read_call(call: Mapping, folder: Path) -> Call:
    """Return a call as the driver reported it, with the arrays that it saved in `folder`."""
    if "raised" in call:
        return Call(call["raised"], "", 0.0, {})
    masks = {
        name: np.load(folder / file) if file else f"a {kind}, not a numeric array"
        for name, kind, file in call["masks"]
    }
    return Call(None, call["type"], call["seconds"], masks)


def check_maskgeration(bench: Bench, case: Case) -> tuple[list[CheckResult], list[Outcome]]:
    """Call maskgeration as the platform does, as its documents say, and on a data folder, in one process."""
    subject = f"{case.label}: import solution"
    bench.announce(f"{case.label}: maskgeration")
    weights = str(bench.workdir / "bare" / MODEL_FILE)
    with output_folder(bench) as out:
        out.mkdir()
        calls = {
            f"{case.label}: maskgeration(bands, model.pth)": [case.band_folders, weights],
            f"{case.label}: maskgeration(bands, OUT)": [case.band_folders, str(out)],
            f"{case.label}: maskgeration(folder, model.pth)": [str(case.data), weights],
        }
        report = call_maskgeration(bench, submitted_files(bench), list(calls.values()), case)
        written = read_folder(out)
    results, outcomes = judge_run(subject, report.run), []
    if not report.calls:
        return [*results, judge(subject, "calls", [report.run.last_words], "maskgeration was called")], []
    results.append(report_time(subject, f"{report.start:.1f} s to start"))
    tiles = {tile.tile_id: tile for tile in case.tiles}
    for name, call in zip(calls, report.calls):
        results.extend(judge_call(name, call, tiles))
        outcomes.append(Outcome(name, call.masks))
    by_name = {name_as_band1(tile): tile for tile in case.tiles}
    subject = f"{case.label}: maskgeration(bands, OUT), files"
    results.extend(judge_masks(subject, written, by_name))
    return results, [*outcomes, Outcome(subject, by_tile_id(written, by_name))]


def judge_call(subject: str, call: Call, tiles: Mapping[str, Tile]) -> list[CheckResult]:
    """Return the results on what a call gave back."""
    wrong = (
        [f"raised {call.raised}"]
        if call.raised
        else [f"a {call.returned}"]
        if call.returned != "dict"
        else []
    )
    returned = judge(subject, "returns a dict", wrong, "a dict of tile ids and masks")
    if wrong:
        return [returned]
    pace = report_time(subject, f"{call.seconds / len(tiles):.2f} s a tile")
    return [returned, *judge_masks(subject, call.masks, tiles), pace]


# --- Weights --------------------------------------------------------------------------------------

LOADING_CODE = """
import json, sys
import solution
content = solution.read_model_file("model.pth")
solution.load_model("model.pth")
keys = {
    "model": list(content),
    "members": [list(member) for member in content.get("members", [])],
    "provenance": list(content.get("provenance") or []),
}
with open(sys.argv[1], "w") as stream:
    json.dump(keys, stream)
"""


def check_size(weights: Path) -> CheckResult:
    """Return whether the weights are small enough to be handed in."""
    size = weights.stat().st_size
    found, expected = f"{size / 1e6:.1f} MB", f"at most {MAX_BYTES / 1e6:.0f} MB"
    return CheckResult(MODEL_FILE, "size", size <= MAX_BYTES, found, expected)


def check_loading(bench: Bench, case: Case) -> list[CheckResult]:
    """Load the weights with the submission's own strict loader and look for the keys of the contract."""
    bench.announce(f"{MODEL_FILE}: loading")
    report = bench.workdir / "keys.json"
    run = run_bare(bench, submitted_files(bench), ["-c", LOADING_CODE, str(report)], case)
    status = [] if run.status == 0 and report.is_file() else [describe_status(run)]
    loading = judge(MODEL_FILE, "strict loading", status, "solution.load_model takes it")
    if status:
        return [loading]
    keys = json.loads(report.read_text())
    absent = [f"no {key}" for key in MODEL_KEYS if key not in keys["model"]]
    absent += [
        f"member {number}: no {key}"
        for number, member in enumerate(keys["members"])
        for key in MEMBER_KEYS
        if key not in member
    ]
    absent += [f"provenance: no {key}" for key in PROVENANCE_KEYS if key not in keys["provenance"]]
    return [loading, judge(MODEL_FILE, "contents", absent, "the keys of the contract")]


def make_damaged_weights(weights: Path, folder: Path) -> dict[str, Path]:
    """Write weights that none should take for good ones; return {what is wrong: file}, one of them absent."""
    damaged = {"weights cut in half": folder / "cut.pth", "no weights": folder / "absent.pth"}
    folder.mkdir()
    whole = weights.read_bytes()
    damaged["weights cut in half"].write_bytes(whole[: len(whole) // 2])
    try:
        content = read_model_file(weights)
    except InputError:  # another format, in which no tensor can be left out
        return damaged
    content["members"][0]["state_dict"].popitem()
    damaged["a tensor missing"] = folder / "lacking.pth"
    torch.save(content, damaged["a tensor missing"])
    return damaged


def check_damaged(bench: Bench, case: Case, damaged: Mapping[str, Path]) -> list[CheckResult]:
    """Return whether damaged weights stop every kind of caller: no masks, least of all random ones."""
    results = []
    for fault, weights in damaged.items():
        results.extend(check_damaged_command(bench, case, fault, weights))
    bench.announce("damaged weights: maskgeration")
    calls = [[case.band_folders, str(weights)] for weights in damaged.values()]
    report = call_maskgeration(bench, {"solution.py": bench.solution}, calls, case)
    for number, fault in enumerate(damaged):
        raised = [call.raised for call in report.calls[number : number + 1]]
        faults = [] if raised and raised[0] else ["masks were returned" if raised else report.run.last_words]
        results.append(judge(f"{fault}: maskgeration", "refused", faults, "an error is raised"))
    return results


def check_damaged_command(bench: Bench, case: Case, fault: str, weights: Path) -> list[CheckResult]:
    """Run the positional command line on damaged weights, or on none where `weights` does not exist."""
    subject = f"{fault}: IN OUT"
    bench.announce(subject)
    files = {"solution.py": bench.solution} | ({MODEL_FILE: weights} if weights.is_file() else {})
    with output_folder(bench) as out:
        run = run_bare(bench, files, ["solution.py", str(case.data), str(out)], case)
        written = sorted(read_folder(out))
    status = [] if run.status == NO_MASKS_STATUS else [describe_status(run)]
    return [
        judge(subject, "refused", status, f"exit status {NO_MASKS_STATUS}"),
        judge(subject, "no masks", written, "no file"),
    ]


# --- The whole ------------------------------------------------------------------------------------


class Steps:
    """Says on standard error what comes next, its number and the time since the start."""

    def __init__(self, total: int):
        self.total, self.done, self.started = total, 0, time.perf_counter()

    def announce(self, text: str) -> None:
        """Print the line of the next step."""
        self.done += 1
        elapsed = time.perf_counter() - self.started
        print(f"[{self.done}/{self.total}] {elapsed:4.0f} s  {text}", file=sys.stderr, flush=True)


def find_interpreter(python: str) -> str:
    """Return the path of an interpreter that is given as a path or as a command.

    Raises:
        SubmissionError: it does not run.
    """
    try:
        command = [python, "-c", "import sys; print(sys.executable)"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SubmissionError(
            f"{python}: does not run as Python ({error}); name another with --python"
        ) from error


def check_submission(
    solution: Path, weights: Path, tiles: Path | None, workdir: Path, python: str = sys.executable
) -> list[CheckResult]:
    """Check a submission from its weights to the masks of every caller; progress goes to standard error.

    Args:
        solution: the solution.py to submit, any that keeps this kit's interface.
        weights: its model.pth.
        tiles: data folder; None makes synthetic tiles of both naming styles.
        workdir: an empty folder for tiles and masks; some tiles are left in it.
        python: the interpreter that runs the submission.

    Raises:
        SubmissionError: a file or the interpreter is not there.
        solution.InputError, solution.TileError: `tiles` cannot be used.
    """
    for path in (solution, weights):
        if not path.is_file():
            raise SubmissionError(
                f"{path}: no such file; train weights with `make train-all`, or name another"
            )
    workdir = workdir.resolve()
    python = find_interpreter(python)
    cases = lay_out_cases(tiles, workdir)
    damaged = make_damaged_weights(weights, workdir / "damaged")
    steps = Steps(1 + len(cases) * (len(COMMAND_LINES) + 1) + len(damaged) + 1)
    bench = Bench(solution.resolve(), weights.resolve(), workdir, python, steps.announce)
    results = [check_size(bench.weights), *check_loading(bench, cases[0])]
    outcomes = []
    for case in cases:
        case_results, case_outcomes = check_case(bench, case)
        results += case_results
        outcomes += case_outcomes[:1]
    if len(outcomes) > 1:
        results.append(judge_names(outcomes))
    return results + check_damaged(bench, cases[0], damaged)


def check_case(bench: Bench, case: Case) -> tuple[list[CheckResult], list[Outcome]]:
    """Run every caller on one set of tiles; return the results, and the masks that each of them got."""
    results, outcomes = [], []
    callers = [partial(check_command_line, line=line) for line in COMMAND_LINES]
    for check in [*callers, check_maskgeration]:
        caller_results, caller_outcomes = check(bench, case)
        results += caller_results
        outcomes += caller_outcomes
    results.append(judge_agreement(case.label, outcomes))
    results.append(judge_life(case.label, outcomes))
    return results, outcomes


def count_failures(results: Sequence[CheckResult]) -> int:
    """Return how many checks failed."""
    return sum(not result.passed for result in results)


def format_results(results: Sequence[CheckResult]) -> str:
    """Return the table: a line for each subject's passes, a line for each failure, and the verdict."""
    subjects = list(dict.fromkeys(result.subject for result in results))
    width = max(map(len, subjects))
    lines = [line for subject in subjects for line in format_subject(subject.ljust(width), subject, results)]
    failed = count_failures(results)
    verdict = "it would be accepted" if failed == 0 else "it would NOT be accepted"
    return "\n".join([*lines, f"{len(results) - failed} checks passed, {failed} failed: {verdict}"])


def format_subject(title: str, subject: str, results: Sequence[CheckResult]) -> list[str]:
    """Return the lines of one subject: failures in full, passes by name and with what was measured."""
    own = [result for result in results if result.subject == subject]
    passes = [
        result.check if result.found == result.expected else f"{result.check} ({result.found})"
        for result in own
        if result.passed
    ]
    failures = [
        f"FAIL  {title}  {result.check}: found {result.found} / expected {result.expected}"
        for result in own
        if not result.passed
    ]
    indent = " " * (len("pass  ") + len(title) + 2)
    listed = textwrap.fill(", ".join(passes), TABLE_WIDTH, initial_indent=indent, subsequent_indent=indent)
    return failures + ([f"pass  {title}  {listed.lstrip()}"] if passes else [])
