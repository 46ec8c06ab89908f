"""The organisers' training tiles to a tile store: `python -m prep competition`."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Sequence

import cv2
import numpy as np
import rasterio
import tifffile
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
from shapely import Polygon
from tqdm import tqdm

from prep import folds, ground, label_files, stats, store
from prep.files import sha256
from prep.label_files import LabelFile, Labels
from prep.labels import IGNORE, count_codes
from solution import KitError, TileError, TileFiles, find_tiles, read_tile, valid_mask, warn

# Debris tongues run on across nodata in genuine phase-2 labels: 0.2 to 4.6 % of a tile's nodata. A label of
# another tile marks what is glacier there, about a third.
LARGEST_MARKED_SHARE = 0.10
PHASE_OPTIONS = {"auto": None, "1": "phase1", "2": "phase2"}


class PrepError(KitError):
    """The data cannot become a store; the message lists every problem found, and nothing was written."""

    def __init__(self, problems: Sequence[str]) -> None:
        """Take one message a problem."""
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem(s), no store written:\n{lines}")
        self.problems = list(problems)


class Summary(NamedTuple):
    """What `prepare` wrote: the rows of tiles.csv, and the content of stats.json and folds.json."""

    folder: Path
    tiles: list[store.TileRow]
    stats: dict
    folds: dict


def prepare(
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    seed: int = 0,
    phase: str = "auto",
    overwrite: bool = False,
) -> Summary:
    """Write the tile store `out` from the training folder `data`, complete or not at all.

    Args:
        data: holds Band1 ... Band5 and some of label/, label_partial/ and label_phase2/; of several labels of
            a tile that of the last folder is read.
        seed: of the stratified folds.
        phase: what label/ holds: "1", "2" or "auto" (phase 2 where 85 or 170 occurs in it).
        overwrite: replace an older store at `out`; without, one of the same files is left as it is.

    Raises:
        PrepError: unreadable tiles or labels, or labels that cannot be right; all of them are listed.
        solution.InputError: no tiles. StoreError: `out` is in the way. FoldError: fewer tiles than folds.
    """
    tiles = find_tiles(Path(data))
    labels = read_labels(Path(data), phase)
    source = fingerprint(tiles, labels)
    if not overwrite and is_current(Path(out), source, seed):
        there = store.TileStore(out)
        if not (there.folder / ground.GROUND_FILE).is_file():  # made by an earlier release
            known = set(there.tile_ids)
            ground.write_ground(there.folder, outlines_of([tile for tile in tiles if tile.tile_id in known]))
        print(f"{out} is up to date: made of the same files")
        return Summary(Path(out), there.tiles, there.stats, there.folds)
    labelled = _match(tiles, labels)
    with store.create(out) as writer:
        rows, statistics = _write_tiles(writer, labelled, labels)
        divided = folds.make_folds(rows, seed)
        ground.write_ground(writer.folder, outlines_of(labelled))
        writer.write_index(rows, statistics, divided, _provenance(Path(data), seed, rows, source))
    return Summary(Path(out), rows, statistics, divided)


def fingerprint(tiles: Sequence[TileFiles], labels: Labels) -> str:
    """Return 16 hex digits that change with the content of any band or label, whatever the folder is called."""
    digest = hashlib.sha256()
    for tile in tiles:
        label = labels.files.get(tile.tile_id)
        for path in (*tile.paths, label.path if label else None):
            found = sha256(path) if path and path.is_file() else "none"
            digest.update(
                f"{tile.tile_id} {found} {labels.phases.get(tile.tile_id)}\n".encode(errors="surrogateescape")
            )
    return digest.hexdigest()[:16]


def is_current(out: Path, source: str, seed: int) -> bool:
    """Return whether `out` is a store of the files with the fingerprint `source`; False where nothing is there.

    Raises StoreError where it is a store of other files or another seed, or something else.
    """
    if not (out / store.STORE_FILE).is_file():
        store.refuse_existing(out)
        return False
    there = store.TileStore(out)
    found = there.fingerprint
    if there.folds.get("seed") != seed:
        raise store.StoreError(
            f"{out} has folds of seed {there.folds.get('seed')}, asked for is {seed}. Pass --overwrite to replace "
            "it, or name another --out"
        )
    if found != source:
        raise store.StoreError(
            f"{out} was made of files with the fingerprint {found}, these have {source}: other tiles or labels. "
            "Pass --overwrite to replace it (runs trained on it are then refused), or name another --out "
            "(make: STORE=<folder>)"
        )
    return True


def read_labels(data: Path, phase: str) -> Labels:
    """Return the labels of all label folders; where a tile has several, that of the last folder.

    Raises:
        PrepError: there are none at all.
    """
    folders = [data / name for name in label_files.LABEL_FOLDERS]
    found = label_files.read_labels(folders, PHASE_OPTIONS[phase])
    if not found.files and not found.problems:
        wanted = " or ".join(f"{name}/" for name in label_files.LABEL_FOLDERS)
        raise PrepError([f"{data}: no label found; expected TIFF or PNG files in {wanted}"])
    return found


def _match(tiles: Sequence[TileFiles], labels: Labels) -> list[TileFiles]:
    """Return the tiles that have a label; warn of tiles without a label and labels without a tile."""
    for tile in tiles:
        if tile.tile_id not in labels.files:
            warn(f"tile {tile.tile_id} ({tile.name}) has no label and is left out")
    for identifier in sorted(set(labels.files) - {tile.tile_id for tile in tiles}):
        warn(f"{labels.files[identifier].path} belongs to no tile and is not used (tile id {identifier})")
    return [tile for tile in tiles if tile.tile_id in labels.files]


def _write_tiles(
    writer: store.StoreWriter, tiles: Sequence[TileFiles], labels: Labels
) -> tuple[list[store.TileRow], dict]:
    """Convert all tiles; return their rows and the statistics.

    Raises:
        PrepError: something was wrong with some tile or label; raised once every tile was looked at.
    """
    rows, problems, accumulator = [], list(labels.problems), stats.BandAccumulator()
    for files in tqdm(tiles, desc="tiles", unit="tile", disable=None):
        label, phase = labels.files[files.tile_id], labels.phases[files.tile_id]
        try:
            for path in filter(None, files.paths):
                label_files.require_codec(path)
            image = read_tile(files)
            mask = make_mask(image, label, phase)
        except TileError as error:
            problems.append(str(error))
            continue
        writer.write_tile(files.tile_id, image, mask)
        accumulator.add(image)
        rows.append(_describe(files, phase, mask))
    if not tiles and not problems:
        problems.append("no tile has a label: the tile ids in Band1 and in the label folders differ")
    if problems:
        raise PrepError(problems)
    return rows, stats.describe(accumulator.result())


def outlines_of(tiles: Sequence[TileFiles]) -> dict[str, Polygon]:
    """Return the ground of each tile whose first band says where it lies, longitude and latitude.

    Files that GDAL cannot open, by their names or as they are, have no known ground.
    """
    found = {}
    for tile in tiles:
        assert tile.paths[0] is not None, "tiles without a first band are no longer here"
        with warnings.catch_warnings(), suppress(RasterioIOError, UnicodeError):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(tile.paths[0]) as file:
                if file.crs:
                    found[tile.tile_id] = ground.outline(file.crs, file.transform, file.height, file.width)
    return found


def make_mask(image: np.ndarray, label: LabelFile, phase: str) -> np.ndarray:
    """Return the mask of codes, (H, W) uint8, for an image (H, W, 5); nodata pixels become IGNORE.

    Warns where the label marks much of what is nodata.

    Raises:
        TileError: the label's shape is not the tile's.
    """
    if label.shape != image.shape[:2]:
        raise TileError(
            f"{label.path}: {label.shape[1]} x {label.shape[0]} px, expected {image.shape[1]} x "
            f"{image.shape[0]} px as in tile {label.tile_id}; export the label on the tile's grid"
        )
    mask = label_files.to_codes(label_files.read_label(label.path), phase)
    nodata = ~valid_mask(image)
    marked = int(np.count_nonzero(mask[nodata]))
    if marked > LARGEST_MARKED_SHARE * max(1, int(np.count_nonzero(nodata))):
        warn(f"{label.path} marks {marked:,} px without data, ignored here; does it belong to this tile?")
    mask[nodata] = IGNORE
    return mask


def _describe(files: TileFiles, phase: str, mask: np.ndarray) -> store.TileRow:
    place = re.fullmatch(r"(\d+)_(\d+)", files.tile_id)
    row, col = (int(place[1]), int(place[2])) if place else (None, None)
    valid_share = float((mask != IGNORE).mean())
    return store.TileRow(files.tile_id, files.name, row, col, phase, valid_share, count_codes(mask))


def _provenance(data: Path, seed: int, rows: Sequence[store.TileRow], source: str) -> dict:
    """Return the content of store.json: where the store comes from, without a path of this machine."""
    by_phase = {phase: sum(row.labels == phase for row in rows) for phase in label_files.PHASES}
    versions = {module.__name__: module.__version__ for module in (np, tifffile, cv2)}
    return {
        "command": "competition",
        "source": data.resolve().name,
        "fingerprint": source,
        "seed": seed,
        "tiles": len(rows),
        "labels": by_phase,
        "versions": {"python": platform.python_version(), **versions},
    }


def format_summary(summary: Summary) -> str:
    """Return the statistics, both fold tables and a closing line."""
    tables = [folds.format_table(scheme, summary.folds[scheme], summary.tiles) for scheme in ("stratified", "spatial")]
    phases = " and ".join(
        f"{count} with {phase} labels"
        for phase in label_files.PHASES
        if (count := sum(tile.labels == phase for tile in summary.tiles))
    )
    valid = np.mean([tile.valid_share for tile in summary.tiles])
    closing = f"{summary.folder}: {len(summary.tiles)} tiles written, {phases}; {valid:.1%} of pixels valid"
    return "\n\n".join([stats.format_table(summary.stats), *tables, closing])
