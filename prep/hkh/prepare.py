"""HKH scenes, or the data set's own patches, to a tile store for pretraining: `python -m prep hkh`.

Scenes are worked on in parallel, and each leaves a complete partial result beside the store, so that an
interrupted run continues; the store itself appears at the end, whole.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import rasterio
import shapely
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

from prep import stats, store
from prep.competition import PrepError
from prep.hkh.landsat7 import SceneError, read_sun_table
from prep.hkh.polygons import DEFAULT_COLUMN, DEFAULT_WORDS, check_polygons
from prep.hkh.sources import (
    Grid,
    Job,
    LabelSource,
    PatchJob,
    RawTile,
    find_patches,
    find_scenes,
    parse_order,
    plan_patches,
    plan_scene,
)
from prep.labels import CODE_NAMES, GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE, count_codes
from solution import CLASS_NAMES, InputError, valid_mask

PARTIAL_FORMAT = "hkh-partial/1"  # changed whenever the same input gives another result
RESULT_FILE = "result.json"
DROPPED_FILE = "dropped.csv"
LABELS = "hkh"  # in tiles.csv
RESTARTS = 200  # of the search for a balanced split; 35 scenes need a few dozen
WAIT_FOR_CLUSTER = 30  # seconds


class Filter(NamedTuple):
    """Which tiles are worth keeping: enough pixels of some class, and not too much background.

    `max_background` is a share (0-1) of the pixels with a label.
    """

    min_debris: int = 500
    min_lake: int = 50
    min_glacier: int = 100
    max_background: float = 0.8

    def reason_to_drop(self, counts: Mapping[str, int]) -> str | None:
        """Return why a tile with these pixels by code is dropped, or None."""
        labelled = sum(counts.values()) - counts[CODE_NAMES[IGNORE]]
        if labelled == 0:
            return "no data"
        ice = counts["glacier"] + counts[CODE_NAMES[GLACIER_OR_DEBRIS]]
        enough = {"debris": self.min_debris, "lake": self.min_lake}
        if ice < self.min_glacier and all(counts[name] < least for name, least in enough.items()):
            return "too little glacier, debris and lake"
        if counts[CODE_NAMES[OTHER_OR_LAKE]] > self.max_background * labelled:
            return "too much background"
        return None


class Settings(NamedTuple):
    """What `prepare` makes of the input: tiles, filter, share of validation, and the seed of the split."""

    grid: Grid = Grid(512, 64)
    keep: Filter = Filter()
    val_share: float = 0.2
    seed: int = 0


class Source(NamedTuple):
    """The input: a folder of scenes and their labels, or one of patches with the order of mask channels."""

    scenes: Path | None = None
    labels: Path | None = None
    patches: Path | None = None
    mask_order: str | None = None
    column: str = DEFAULT_COLUMN
    words: Mapping[str, str] = DEFAULT_WORDS
    sun: Path | None = None

    def images(self) -> Path:
        """Return the folder of scenes or patches. Raises InputError where there is none."""
        return _given(self.patches or self.scenes, "--scenes or --patches")

    def truth(self) -> Path:
        """Return the file or folder that holds the labels. Raises InputError where there is none."""
        return _given(self.patches or self.labels, "--labels")


def _given(path: Path | None, option: str) -> Path:
    if path is None:
        raise InputError(f"no {option}: name what to read")
    return path


class Resources(NamedTuple):
    """Processes, or the address of a Dask scheduler."""

    jobs: int = 1
    dask: str | None = None


class Outcome(NamedTuple):
    """What became of a scene: None, or why it failed."""

    name: str
    problem: str | None


class Summary(NamedTuple):
    """What `prepare` wrote: rows of tiles.csv, stats.json, the split, rows of dropped.csv, and each scene."""

    folder: Path
    tiles: list[store.TileRow]
    stats: dict
    split: store.Split
    dropped: list[dict]
    scenes: dict[str, dict]


def prepare(
    source: Source,
    out: str | os.PathLike,
    settings: Settings = Settings(),  # noqa: B008, immutable
    resources: Resources = Resources(),  # noqa: B008
    overwrite: bool = False,
) -> Summary:
    """Write the tile store `out`, complete or not at all.

    Scenes that were finished by an interrupted run with the same input and settings are not read again: their
    results lie in `.<name>-partial` beside `out`, which is removed at the end.

    Raises:
        PrepError: everything that is wrong with scenes, labels or patches; scenes without fault keep their
            partial results. InputError: a setting out of range, or no cluster at the address.
        prep.store.StoreError: `out` is in the way, or another process makes it.
    """
    check_settings(settings)
    if not overwrite:
        store.refuse_existing(out)
    jobs = plan(source, settings)
    with own_partial_folder(Path(out)) as partial:
        results = finish_scenes(jobs, partial, settings, resources)
        summary = assemble(Path(out), partial, results, describe_source(source, settings, jobs), settings)
        discard([partial / job.name for job in jobs])
        shutil.rmtree(partial)
    return summary


def finish_scenes(
    jobs: Sequence[Job], partial: Path, settings: Settings, resources: Resources
) -> dict[str, dict]:
    """Work on the scenes that an earlier run did not finish; return {scene: result} of all.

    Raises:
        PrepError: all that is wrong with scenes; the others are finished.
    """
    marks = {job.name: fingerprint(job, settings) for job in jobs}
    todo = [job for job in jobs if not is_finished(partial / job.name, marks[job.name])]
    clear_partial(partial, {job.name for job in jobs} - {job.name for job in todo})
    tasks = [(job, settings.keep, partial / job.name, marks[job.name]) for job in todo]
    outcomes = run_tasks(tasks, resources, done=len(jobs) - len(todo))
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    if problems:
        raise PrepError([*problems, f"the other scenes are kept in {partial} and are not read again"])
    return {job.name: read_result(partial / job.name) for job in jobs}


def check_settings(settings: Settings) -> None:
    """Raise InputError naming the first setting that makes no sense."""
    grid, keep = settings.grid, settings.keep
    rules = [
        ("--size", grid.size, grid.size >= 32, "32 px or more"),
        ("--overlap", grid.overlap, 0 <= grid.overlap < grid.size, "0 or more, less than --size"),
        ("--min-debris", keep.min_debris, keep.min_debris >= 0, "0 or more"),
        ("--min-lake", keep.min_lake, keep.min_lake >= 0, "0 or more"),
        ("--min-glacier", keep.min_glacier, keep.min_glacier >= 0, "0 or more"),
        ("--max-background", keep.max_background, 0 <= keep.max_background <= 1, "a share from 0 to 1"),
        ("--val-share", settings.val_share, 0 < settings.val_share < 1, "a share between 0 and 1"),
        ("--seed", settings.seed, settings.seed >= 0, "0 or more"),
    ]
    for name, value, sensible, expected in rules:
        if not sensible:
            raise InputError(f"{name} is {value}, expected {expected}")


# --- Planning -------------------------------------------------------------------------------------


def plan(source: Source, settings: Settings) -> list[Job]:
    """Return a job for each scene, in the order of their names; every scene is looked at first.

    Raises:
        PrepError: all that is wrong with headers and labels.
    """
    planned, problems = [], []
    try:
        suns = read_sun_table(source.sun)
        makers = _patch_makers(source) if source.patches else _scene_makers(source)
    except SceneError as error:
        raise PrepError([str(error)]) from error
    for make in makers:
        try:
            planned.append(make(settings.grid, suns))
        except SceneError as error:
            problems.append(str(error))
    if problems:
        raise PrepError(problems)
    return sorted(planned, key=lambda job: job.name)


def real(path: Path) -> Path:
    """Return the absolute path without links; a loop of them is left as it is, where `resolve` gives up."""
    return Path(os.path.realpath(path))


def _scene_makers(source: Source) -> list:
    """Return for each scene a function of (grid, suns) that plans it."""
    if not source.truth().is_dir():
        check_polygons(source.truth(), source.column, source.words)
    labels = LabelSource(real(source.truth()), source.column, dict(source.words))
    paths = [real(path) for path in find_scenes(source.images())]
    return [lambda grid, suns, path=path: plan_scene(path, labels, grid, suns) for path in paths]


def _patch_makers(source: Source) -> list:
    order = parse_order(source.mask_order or "")
    scenes = find_patches(real(source.images()))
    return [
        lambda grid, suns, name=name, pairs=pairs: plan_patches(name, pairs, order, grid, suns)
        for name, pairs in scenes.items()
    ]


def describe_source(source: Source, settings: Settings, jobs: Sequence[Job]) -> dict:
    """Return the content of store.json that does not depend on the tiles; names only, no paths."""
    patches = source.patches is not None
    labels = (
        {"mask_order": source.mask_order}
        if patches
        else {"column": source.column, "words": dict(source.words)}
    )
    versions = {module.__name__: module.__version__ for module in (np, rasterio, shapely)}
    return {
        "command": "hkh",
        "source": real(source.images()).name,
        "labels": {"file": real(source.truth()).name, **labels},
        "size": settings.grid.size,
        "overlap": settings.grid.overlap,
        "filter": settings.keep._asdict(),
        "val_share": settings.val_share,
        "seed": settings.seed,
        "sun": {job.name: [job.sun.elevation, job.sun.distance] for job in jobs},
        "channels": {job.name: job.channels for job in jobs},
        "versions": {"python": platform.python_version(), **versions},
    }


# --- Partial results ------------------------------------------------------------------------------


def partial_folder(out: Path) -> Path:
    """Return where the results of single scenes are kept until the store is complete."""
    out = real(out)
    return out.with_name(f".{out.name}-partial")


def fingerprint(job: Job, settings: Settings) -> str:
    """Return a hash of what a scene's result depends on: settings, and name, size and time of its files."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in job.files()]
    plain = [
        (key, value)
        for key, value in job._asdict().items()
        if key not in ("path", "patches", "masks", "labels")
    ]
    labels = [] if isinstance(job, PatchJob) else [job.labels.column, sorted(job.labels.words.items())]
    parts = (PARTIAL_FORMAT, settings.keep, files, plain, labels)
    return hashlib.sha256(repr(parts).encode(errors=store.FILE_NAME_ERRORS)).hexdigest()


def is_finished(folder: Path, mark: str) -> bool:
    """Return whether a scene was finished with this fingerprint."""
    try:
        return read_result(folder)["fingerprint"] == mark
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: the scene is read again
        return False


def read_result(folder: Path) -> dict:
    """Return the result of a finished scene."""
    return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))


@contextmanager
def own_partial_folder(out: Path) -> Iterator[Path]:
    """Make the folder of partial results of a store and keep other processes out of it.

    Raises:
        prep.store.StoreError: another process makes the same store.
    """
    partial = partial_folder(out)
    partial.mkdir(parents=True, exist_ok=True)
    with store.locked(partial, wait=False) as held:
        if not (held and partial.is_dir()):  # gone: the other has just ended, and removed it
            raise store.StoreError(
                f"{out}: another process makes this store; wait until it ends, or name another folder with "
                "--out"
            )
        yield partial


def clear_partial(partial: Path, finished: set[str]) -> None:
    """Remove everything from the folder of partial results but the finished scenes."""
    discard([entry for entry in partial.iterdir() if entry.name not in finished])


def discard(folders: Sequence[Path]) -> None:
    """Remove partial results, the marks of all first: a killed run leaves none without its tiles."""
    for folder in folders:
        (folder / RESULT_FILE).unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder)


def process(job: Job, keep: Filter, folder: Path, mark: str) -> Outcome:
    """Write the kept tiles of a scene and its result into `folder`, which appears whole."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    writer = store.StoreWriter(building)
    try:
        result = write_tiles(job, keep, writer)
    except SceneError as error:
        shutil.rmtree(building)
        return Outcome(job.name, str(error))
    (building / RESULT_FILE).write_text(json.dumps({"fingerprint": mark, **result}), encoding="utf-8")
    building.rename(folder)
    return Outcome(job.name, None)


def write_tiles(job: Job, keep: Filter, writer: store.StoreWriter) -> dict:
    """Write the tiles worth keeping; return what is known of them and of the dropped ones.

    A tile whose labels alone rule it out is dropped before its image is read.
    """
    kept, dropped = [], []
    for tile in job.tiles():
        reason = _hopeless(tile, keep)
        if reason is None:
            image = tile.read()
            mask = np.where(valid_mask(image), tile.codes, IGNORE).astype(np.uint8)
            counts = count_codes(mask)
            reason = keep.reason_to_drop(counts)
        else:
            counts = count_codes(tile.codes)
        if reason is not None:
            dropped.append({"tile_id": tile.tile_id, "scene": job.name, "reason": reason, **counts})
            continue
        writer.write_tile(tile.tile_id, image, mask)
        kept.append(_describe(tile, job.name, image, mask, counts))
    return {"kept": kept, "dropped": dropped}


def _hopeless(tile: RawTile, keep: Filter) -> str | None:
    """Return why a tile would be dropped even if all of its labelled area had data, or None."""
    counts = count_codes(tile.codes)
    return keep._replace(max_background=1).reason_to_drop(counts)


def _describe(
    tile: RawTile, scene: str, image: np.ndarray, mask: np.ndarray, counts: Mapping[str, int]
) -> dict:
    accumulator = stats.BandAccumulator()
    accumulator.add(image)
    return {
        "row": [
            tile.tile_id,
            scene,
            tile.row,
            tile.col,
            LABELS,
            float((mask != IGNORE).mean()),
            dict(counts),
        ],
        "stats": accumulator.state(),
        "footprint": tile.footprint,
    }


# --- Many scenes ----------------------------------------------------------------------------------


class ProgressParallel(Parallel):
    """joblib's Parallel with a progress bar, for every backend: joblib calls `print_progress` itself."""

    def __init__(self, bar: tqdm, **options: Any) -> None:
        """Report to `bar`; `options` are joblib's."""
        super().__init__(**options)
        self.bar = bar
        self.before = bar.n

    def print_progress(self) -> None:
        """Move the bar to the number of finished tasks."""
        self.bar.update(self.before + self.n_completed_tasks - self.bar.n)


def run_tasks(tasks: Sequence[tuple], resources: Resources, done: int) -> list[Outcome]:
    """Process the tasks, each the arguments of `process`; `done` scenes are finished already.

    Raises:
        InputError: no cluster at the address.
    """
    total = done + len(tasks)
    with tqdm(total=total, initial=done, desc="scenes", unit="scene", disable=None) as bar:
        if not tasks:
            return []
        with backend(resources):
            return ProgressParallel(bar, batch_size=1)(delayed(process)(*task) for task in tasks)


@contextmanager
def backend(resources: Resources) -> Iterator[None]:
    """Let joblib use processes of this machine, or a Dask cluster that sees the same files."""
    if resources.dask is None:
        with parallel_config(backend="loky", n_jobs=resources.jobs):
            yield
        return
    from distributed import Client  # only here: it takes a second

    try:
        client = Client(resources.dask, timeout=WAIT_FOR_CLUSTER)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--dask {resources.dask}: no Dask scheduler answers ({error}); start one with `dask scheduler` "
            "and workers with `dask worker ADDRESS` in the folder of this kit"
        ) from error
    with client, parallel_config(backend="dask", wait_for_workers_timeout=WAIT_FOR_CLUSTER):
        yield


# --- The split and the store ----------------------------------------------------------------------


def choose_validation(areas: Mapping[str, Sequence[float]], share: float, seed: int) -> set[str]:
    """Return the scenes to validate on, whole ones, whose areas come closest to `share` of each column.

    Args:
        areas: {scene: amounts}, for example tiles and pixels by class.
        share: of validation (0-1).
        seed: of the search among random sets; the result depends on it and the areas alone.

    Raises:
        PrepError: fewer than two scenes.
    """
    names = sorted(areas)
    if len(names) < 2:
        raise PrepError(
            [
                f"tiles to keep come from {len(names)} scene(s), at least 2 are needed to split training and "
                "validation by scene; add scenes, or keep more tiles (--min-glacier, --max-background)"
            ]
        )
    amounts = np.array([areas[name] for name in names], np.float64)
    shares = amounts / np.maximum(amounts.sum(axis=0), 1)  # (scenes, columns); a class that no scene has is 0
    wanted = np.where(amounts.sum(axis=0) > 0, share, 0)
    random = np.random.default_rng(seed)
    best: tuple[float, list[int]] = (np.inf, [])
    for _ in range(RESTARTS):
        order = random.permutation(len(names))
        # of validating on the first scene of this order, the first two, ...
        misses = np.abs(np.cumsum(shares[order], axis=0)[:-1] - wanted).sum(axis=1)
        size = int(misses.argmin()) + 1
        best = min(best, (round(float(misses.min()), 9), sorted(order[:size].tolist())))
    return {names[index] for index in best[1]}


def straddling(kept: Sequence[dict], validation: set[str]) -> set[str]:
    """Return the ids of training tiles on ground that a validation tile shows too: scenes overlap."""
    val = [
        shapely.Polygon(tile["footprint"])
        for tile in kept
        if tile["footprint"] and _scene(tile) in validation
    ]
    tree = shapely.STRtree(val)
    train = [tile for tile in kept if tile["footprint"] and _scene(tile) not in validation]
    return {
        _tile_id(tile)
        for tile in train
        if tree.query(shapely.Polygon(tile["footprint"]), predicate="intersects").size
    }


def _tile_id(tile: dict) -> str:
    return tile["row"][0]


def _scene(tile: dict) -> str:
    return tile["row"][1]


def _drop_overlapping(tile: dict) -> dict:
    """Return the row of dropped.csv for a kept tile that is not kept after all."""
    reason = "overlaps a validation tile"
    return {"tile_id": _tile_id(tile), "scene": _scene(tile), "reason": reason, **tile["row"][6]}


def assemble(
    out: Path, partial: Path, results: Mapping[str, dict], about: Mapping, settings: Settings
) -> Summary:
    """Make the store from the scenes' partial results, in the order of the scenes.

    Raises:
        PrepError: nothing to keep, or debris outweighs clean ice in patches.
    """
    kept = [tile for result in results.values() for tile in result["kept"]]
    dropped = [tile for result in results.values() for tile in result["dropped"]]
    check_kinds(kept, about)
    validation = choose_validation(scene_areas(kept), settings.val_share, settings.seed)
    shared = straddling(kept, validation)
    dropped += [_drop_overlapping(tile) for tile in kept if _tile_id(tile) in shared]
    kept = [tile for tile in kept if _tile_id(tile) not in shared]
    rows = [store.TileRow(*tile["row"]) for tile in kept]
    split = split_by_scene(rows, validation)
    statistics = training_statistics(kept, set(split.train))
    scenes = describe_scenes(results, rows, validation)
    with store.create(out, scratch=partial) as writer:
        for row in rows:
            for kind in ("images", "masks"):
                name = f"{kind}/{row.tile_id}.npy"
                hand_over(partial / row.source / name, writer.folder / name)
        write_dropped(writer.folder / DROPPED_FILE, dropped)
        writer.write_index(rows, statistics, split, {**about, "tiles": len(rows), "scenes": scenes})
    return Summary(out, rows, statistics, split, dropped, scenes)


def split_by_scene(rows: Sequence[store.TileRow], validation: set[str]) -> store.Split:
    """Return the tiles of both sides. Raises PrepError where none is left to train on."""
    sides = [
        [row.tile_id for row in rows if (row.source in validation) == held_out] for held_out in (False, True)
    ]
    split = store.Split(*sides)
    if not split.train:
        raise PrepError(
            ["every training tile overlaps a validation tile; add scenes of other places, or other --seed"]
        )
    return split


def training_statistics(kept: Sequence[dict], training: set[str]) -> dict:
    """Return the content of stats.json: exact, over the valid pixels of the training tiles."""
    accumulator = stats.BandAccumulator()
    for tile in kept:
        if _tile_id(tile) in training:
            accumulator.absorb(tile["stats"])
    return stats.describe(accumulator.result())


def hand_over(source: Path, target: Path) -> None:
    """Give a file a second name: at once, and the first stays; a copy where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_kinds(kept: Sequence[dict], about: Mapping) -> None:
    """Raise PrepError where nothing is kept, or where patches have more debris than clean ice."""
    if not kept:
        raise PrepError(["no tile is worth keeping; are the labels of this region? See --min-glacier"])
    order = about["labels"].get("mask_order")
    clean, debris = (sum(tile["row"][6][name] for tile in kept) for name in ("glacier", "debris"))
    if order and debris >= clean:
        raise PrepError(
            [
                f"--mask-order {order}: debris has {debris:,} px and clean ice {clean:,}; clean is the "
                "larger in this data set, so the two channels are the other way round: change the order"
            ]
        )


def scene_areas(kept: Sequence[dict]) -> dict[str, list[float]]:
    """Return {scene: [tiles, pixels of glacier, of debris, of lake]}."""
    areas: dict[str, list[float]] = {}
    for tile in kept:
        counts = tile["row"][6]
        amounts = areas.setdefault(_scene(tile), [0.0] * 4)
        amounts[0] += 1
        for index, name in enumerate(CLASS_NAMES[1:], start=1):
            amounts[index] += counts[name]
    return areas


def describe_scenes(results: Mapping[str, dict], rows: Sequence[store.TileRow], validation: set[str]) -> dict:
    """Return {scene: side of the split, tiles kept, tiles seen}, a scene without a tile included."""
    kept = {name: sum(row.source == name for row in rows) for name in results}
    seen = {name: len(result["kept"]) + len(result["dropped"]) for name, result in results.items()}
    side = {name: "validation" if name in validation else "training" for name in results}
    return {
        name: {"side": side[name] if kept[name] else None, "kept": kept[name], "tiles": seen[name]}
        for name in results
    }


def write_dropped(path: Path, dropped: Sequence[dict]) -> None:
    """Write one row a dropped tile: id, scene, reason, pixels by code (nodata counted before it is ignored
    where the labels alone ruled the tile out).
    """
    with open(path, "w", newline="", encoding="utf-8", errors=store.FILE_NAME_ERRORS) as stream:
        columns = ("tile_id", "scene", "reason", *CODE_NAMES.values())
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dropped)


def format_summary(summary: Summary) -> str:
    """Return statistics, a line a scene, the reasons for dropped tiles, and a closing line."""
    width = max(len(name) for name in summary.scenes) + 2
    lines = [f"{'scene':<{width}}{'side':<12}{'kept':>6}{'of':>7}"]
    for name, scene in summary.scenes.items():
        lines.append(f"{name:<{width}}{scene['side'] or 'nothing':<12}{scene['kept']:>6}{scene['tiles']:>7}")
    reasons = [tile["reason"] for tile in summary.dropped]
    drops = [f"dropped: {reasons.count(reason):>6}  {reason}" for reason in sorted(set(reasons))]
    closing = (
        f"{summary.folder}: {len(summary.split.train)} tiles to train on, {len(summary.split.val)} to "
        f"validate on; every dropped tile is listed in {DROPPED_FILE}"
    )
    return "\n".join([stats.format_table(summary.stats), "", *lines, "", *drops, closing])
