"""HKH scenes, or the data set's own patches, to a tile store for pretraining: `python -m prep hkh`.

Scenes are worked on in parallel, and each leaves a complete partial result beside the store, so that an
interrupted run continues; the store itself appears at the end, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import pandas
import rasterio
import shapely
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

from prep import ground, stats, store
from prep.competition import PrepError
from prep.hkh.landsat7 import SceneError, read_sun_table
from prep.hkh.patches import PatchJob, plan_patches
from prep.hkh.polygons import DEFAULT_COLUMN, DEFAULT_WORDS, plan_border, plan_layers
from prep.hkh.sources import Grid, Labels, SceneJob, find_scenes, plan_scene
from prep.labels import CODE_NAMES, GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE, count_codes
from solution import CLASS_NAMES, InputError, valid_mask

PARTIAL_FORMAT = "hkh-partial/2"  # changed whenever the same input gives another result
RESULT_FILE = "result.json"
DROPPED_FILE = "dropped.csv"
LABELS = "hkh"  # in tiles.csv
RESTARTS = 200  # of the search for a balanced split; 35 scenes need a few dozen
WAIT_FOR_CLUSTER = 30  # seconds
Job = SceneJob | PatchJob


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
    """The input: a folder of scenes and their labels, or one of patches.

    `labels`: vector files with `kinds` a file, or one folder of mask files. `layers`: of files with
    several. `mask_order`: channels of a patch's mask. `exclude_ground`: a store on whose ground no tile is kept.
    """

    scenes: Path | None = None
    labels: Sequence[Path] = ()
    patches: Path | None = None
    mask_order: str | None = None
    kinds: Sequence[str] | None = None
    layers: Sequence[str] = ()
    border: Path | None = None
    column: str = DEFAULT_COLUMN
    words: Mapping[str, str] = DEFAULT_WORDS
    sun: Path | None = None
    exclude_ground: Path | None = None


class Resources(NamedTuple):
    """Processes, or the address of a Dask scheduler."""

    jobs: int = 1
    dask: str | None = None


class Kept(NamedTuple):
    """A tile worth keeping: its row in tiles.csv, sums for the statistics, its outline where that is known."""

    row: store.TileRow
    stats: dict
    footprint: shapely.Polygon | None


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
    seen = list(ground.read_ground(source.exclude_ground).values()) if source.exclude_ground else []
    jobs = plan(source, settings)
    with own_partial_folder(Path(out)) as partial:
        results = finish_scenes(jobs, partial, settings, resources)
        about = describe_source(source, settings, jobs)
        summary = assemble(Path(out), partial, results, about, settings, seen)
        discard([partial / job.name for job in jobs])
        shutil.rmtree(partial)
    return summary


def check_settings(settings: Settings) -> None:
    """Raise InputError naming the first setting that makes no sense."""
    (size, overlap), keep = settings.grid, settings.keep
    least = {f"--min-{name}": getattr(keep, f"min_{name}") for name in ("debris", "lake", "glacier")}
    rules = [
        ("--tile-size", size, size >= 32, "32 px or more"),
        ("--overlap", overlap, 0 <= overlap < size, "0 or more px, less than --tile-size"),
        ("--max-background", keep.max_background, 0 <= keep.max_background <= 1, "a share from 0 to 1"),
        ("--val-share", settings.val_share, 0 < settings.val_share < 1, "a share between 0 and 1"),
        ("--seed", settings.seed, settings.seed >= 0, "0 or more"),
        *((name, number, number >= 0, "0 or more") for name, number in least.items()),
    ]
    for name, value, sensible, expected in rules:
        if not sensible:
            raise InputError(f"{name} is {value}, expected {expected}")


# --- Planning -------------------------------------------------------------------------------------


def plan(source: Source, settings: Settings) -> list[Job]:
    """Return a job for each scene, in the order of their names; every scene is looked at first.

    Raises PrepError: all that is wrong with headers and labels.
    """
    planned: list[Job] = []
    problems = []
    try:
        suns = read_sun_table(source.sun)
        if source.patches:
            planned += plan_patches(real(source.patches), source.mask_order, settings.grid, suns)
        labels = plan_labels(source)
        paths = find_scenes(source.scenes) if source.scenes else []
    except SceneError as error:
        raise PrepError([str(error)]) from error
    for path in paths:
        try:
            planned.append(plan_scene(real(path), labels, settings.grid, suns))
        except SceneError as error:
            problems.append(str(error))
    if problems:
        raise PrepError(problems)
    return sorted(planned, key=lambda job: job.name)


def plan_labels(source: Source) -> Labels:
    """Return the labels of scenes. Raises SceneError where they cannot be used."""
    paths = [real(path) for path in source.labels]
    if len(paths) == 1 and paths[0].is_dir() and paths[0].suffix != ".gdb":
        return Labels((), None, paths[0], source.words)
    layers = plan_layers(paths, source.kinds, source.column, source.words, source.layers)
    border = plan_border(real(source.border), layers) if source.border else None
    return Labels(layers, border, None, source.words)


def real(path: Path) -> Path:
    """Return the absolute path without links; a loop of them is left as it is, where `resolve` gives up."""
    return Path(os.path.realpath(path))


def describe_source(source: Source, settings: Settings, jobs: Sequence[Job]) -> dict:
    """Return the content of store.json that does not depend on the tiles; names only, no paths."""

    def name(path: Path | None) -> str | None:
        return real(path).name if path else None

    versions = {module.__name__: module.__version__ for module in (np, rasterio, shapely)}
    return {
        "command": "hkh",
        "source": name(source.patches or source.scenes),
        "labels": [name(path) for path in source.labels],
        "kinds": source.kinds,
        "layers": list(source.layers),
        "border": name(source.border),
        "column": source.column,
        "words": dict(source.words),
        "mask_order": next((job.order for job in jobs if isinstance(job, PatchJob)), None),
        "exclude_ground": name(source.exclude_ground),
        "size": settings.grid.size,
        "overlap": settings.grid.overlap,
        "filter": settings.keep._asdict(),
        "val_share": settings.val_share,
        "seed": settings.seed,
        "sun": {job.name: job.sun[:2] for job in jobs},  # its source may be a path
        "channels": {job.name: job.channels for job in jobs},
        "versions": {"python": platform.python_version(), **versions},
    }


# --- Scenes and their partial results -------------------------------------------------------------


@contextmanager
def own_partial_folder(out: Path) -> Iterator[Path]:
    """Make the folder of partial results of a store and keep other processes out of it.

    Raises:
        prep.store.StoreError: another process makes the same store.
    """
    partial = real(out).with_name(f".{real(out).name}-partial")
    partial.mkdir(parents=True, exist_ok=True)
    with store.locked(partial, wait=False) as held:
        if not (held and partial.is_dir()):  # gone: the other has just ended, and removed it
            raise store.StoreError(
                f"{out}: another process makes this store; wait until it ends, or name another folder with --out"
            )
        yield partial


def finish_scenes(jobs: Sequence[Job], partial: Path, settings: Settings, resources: Resources) -> dict[str, dict]:
    """Work on the scenes that an earlier run did not finish; return {scene: result} of all.

    Raises PrepError: all that is wrong with scenes; the others are finished. InputError: no cluster at the address.
    """
    marks = {job.name: fingerprint(job, settings) for job in jobs}
    results = {job.name: read_result(partial / job.name, marks[job.name]) for job in jobs}
    finished = [name for name, result in results.items() if result]
    discard([entry for entry in partial.iterdir() if entry.name not in finished])
    tasks = [
        delayed(process)(job, settings.keep, partial / job.name, marks[job.name])
        for job in jobs
        if not results[job.name]
    ]
    problems = []
    with (
        tqdm(total=len(jobs), initial=len(finished), desc="scenes", unit="scene", disable=None) as bar,
        backend(resources),
    ):
        for problem in Parallel(batch_size=1, return_as="generator")(tasks):
            bar.update()
            problems += [problem] if problem else []
    if problems:
        raise PrepError([*problems, f"the other scenes are kept in {partial} and are not read again"])
    return {name: read_result(partial / name, mark) for name, mark in marks.items()}


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


def fingerprint(job: Job, settings: Settings) -> str:
    """Return a hash of what a scene's result depends on: settings, and name, size and time of its files."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in job.files()]
    parts = (PARTIAL_FORMAT, settings.keep, files, job.meaning())
    return hashlib.sha256(repr(parts).encode(errors=store.FILE_NAME_ERRORS)).hexdigest()


def read_result(folder: Path, mark: str) -> dict:
    """Return the result of a scene that was finished with this fingerprint, an empty one where there is none."""
    try:
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        return result if result["fingerprint"] == mark else {}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: the scene is read again
        return {}


def discard(folders: Sequence[Path]) -> None:
    """Remove partial results, the marks of all first: a killed run leaves none without its tiles."""
    for folder in folders:
        (folder / RESULT_FILE).unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder)


def process(job: Job, keep: Filter, folder: Path, mark: str) -> str | None:
    """Write the kept tiles of a scene and its result into `folder`, which appears whole.

    Returns:
        What is wrong with the scene, or None.
    """
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        result = write_tiles(job, keep, store.StoreWriter(building))
    except SceneError as error:
        shutil.rmtree(building)
        return str(error)
    (building / RESULT_FILE).write_text(json.dumps({"fingerprint": mark, **result}), encoding="utf-8")
    building.rename(folder)
    return None


def write_tiles(job: Job, keep: Filter, writer: store.StoreWriter) -> dict:
    """Write the tiles worth keeping; return what is known of them and of the dropped ones.

    A tile whose labels alone rule it out is dropped before its image is read.
    """
    kept, dropped = [], []
    for tile in job.tiles():
        counts = count_codes(tile.codes)
        reason = keep._replace(max_background=1).reason_to_drop(counts)
        if reason is None:
            image = tile.read()
            mask = np.where(valid_mask(image), tile.codes, IGNORE).astype(np.uint8)
            counts = count_codes(mask)
            reason = keep.reason_to_drop(counts)
        if reason is not None:
            dropped.append({"tile_id": tile.tile_id, "scene": job.name, "reason": reason, **counts})
            continue
        writer.write_tile(tile.tile_id, image, mask)
        accumulator = stats.BandAccumulator()
        accumulator.add(image)
        share = float((mask != IGNORE).mean())
        row = store.TileRow(tile.tile_id, job.name, tile.row, tile.col, LABELS, share, counts)
        kept.append((row, accumulator.state(), tile.footprint.wkt if tile.footprint else None))
    return {"kept": kept, "dropped": dropped}


# --- The split ------------------------------------------------------------------------------------


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


def scene_areas(kept: Sequence[Kept]) -> dict[str, list[float]]:
    """Return {scene: [tiles, pixels of glacier, of debris, of lake]}."""
    amounts = [[tile.row.source, 1, *(tile.row.counts[name] for name in CLASS_NAMES[1:])] for tile in kept]
    return pandas.DataFrame(amounts).groupby(0).sum().T.to_dict("list")


def outlines(kept: Sequence[Kept]) -> dict[str, shapely.Polygon]:
    """Return {tile_id: outline in longitude and latitude} of the tiles whose place is known."""
    return {tile.row.tile_id: tile.footprint for tile in kept if tile.footprint}


def on_seen_ground(kept: Sequence[Kept], seen: Sequence[shapely.Polygon]) -> set[str]:
    """Return the ids of tiles that meet `seen` ground. Raises PrepError where the place of some is unknown."""
    unknown = sum(not tile.footprint for tile in kept)
    if seen and unknown:
        raise PrepError([f"--exclude-ground: where {unknown} tiles lie is not known; {ground.PLACES}"])
    return ground.on_ground(outlines(kept), seen)


def straddling(kept: Sequence[Kept], validation: set[str]) -> set[str]:
    """Return the ids of training tiles on ground that a validation tile shows too: scenes overlap."""
    train, held_out = [
        outlines([tile for tile in kept if (tile.row.source in validation) == side]) for side in (False, True)
    ]
    return ground.on_ground(train, held_out.values())


def leave_out(kept: list[Kept], dropped: list[dict], ids: set[str], reason: str) -> list[Kept]:
    """Return the tiles without those with these ids, which become rows of dropped.csv."""
    for row in (tile.row for tile in kept if tile.row.tile_id in ids):
        dropped.append({"tile_id": row.tile_id, "scene": row.source, "reason": reason, **row.counts})
    return [tile for tile in kept if tile.row.tile_id not in ids]


# --- The store ------------------------------------------------------------------------------------


def assemble(
    out: Path,
    partial: Path,
    results: Mapping[str, dict],
    about: Mapping,
    settings: Settings,
    seen: Sequence[shapely.Polygon],
) -> Summary:
    """Make the store from the scenes' partial results, in the order of the scenes; none on `seen` ground.

    Raises PrepError: nothing to keep, or tiles of unknown place where some ground is to be left out.
    """
    kept = [
        Kept(store.TileRow(*row), sums, shapely.from_wkt(footprint) if footprint else None)
        for result in results.values()
        for row, sums, footprint in result["kept"]
    ]
    dropped = [tile for result in results.values() for tile in result["dropped"]]
    kept = leave_out(kept, dropped, on_seen_ground(kept, seen), f"on the ground of {about['exclude_ground']}")
    if not kept:
        raise PrepError(["no tile is worth keeping; are the labels of this region? See --min-glacier"])
    validation = choose_validation(scene_areas(kept), settings.val_share, settings.seed)
    kept = leave_out(kept, dropped, straddling(kept, validation), "overlaps a validation tile")
    rows = [tile.row for tile in kept]
    train = [tile for tile in kept if tile.row.source not in validation]
    if not train:
        raise PrepError(["every training tile overlaps a validation tile; add other scenes, or other --seed"])
    split = store.Split([tile.row.tile_id for tile in train], [row.tile_id for row in rows if row.source in validation])
    accumulator = stats.BandAccumulator()
    for tile in train:
        accumulator.absorb(tile.stats)
    statistics = stats.describe(accumulator.result())
    scenes = describe_scenes(results, rows, validation)
    # of what it holds; the input's files are known to the partial results alone
    mark = hashlib.sha256(repr((rows, statistics)).encode(errors=store.FILE_NAME_ERRORS)).hexdigest()[:16]
    about = {**about, "fingerprint": mark, "tiles": len(rows), "scenes": scenes}
    with store.create(out, scratch=partial) as writer:
        for row in rows:
            for kind in ("images", "masks"):
                name = f"{kind}/{row.tile_id}.npy"
                hand_over(partial / row.source / name, writer.folder / name)
        # pixels by code: nodata is counted before it is ignored where the labels alone ruled a tile out
        table = pandas.DataFrame(dropped, columns=["tile_id", "scene", "reason", *CODE_NAMES.values()])
        table.to_csv(writer.folder / DROPPED_FILE, index=False, errors=store.FILE_NAME_ERRORS)
        ground.write_ground(writer.folder, outlines(kept))
        writer.write_index(rows, statistics, split, about)
    return Summary(out, rows, statistics, split, dropped, scenes)


def hand_over(source: Path, target: Path) -> None:
    """Give a file a second name: at once, and the first stays; a copy where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def describe_scenes(results: Mapping[str, dict], rows: Sequence[store.TileRow], validation: set[str]) -> dict:
    """Return {scene: side of the split, tiles kept, tiles seen}, a scene without a tile included."""
    scenes = {}
    for name, result in results.items():
        kept = sum(row.source == name for row in rows)
        side = "validation" if name in validation else "training"
        seen = len(result["kept"]) + len(result["dropped"])
        scenes[name] = {"side": side if kept else None, "kept": kept, "tiles": seen}
    return scenes


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
