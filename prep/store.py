"""The tile store `data/<name>/`: reading one, and writing one so that it is complete or absent."""

from __future__ import annotations

import csv
import fcntl
import glob
import json
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from prep.labels import CODE_NAMES
from solution import KitError

TILES_FILE = "tiles.csv"
STATS_FILE = "stats.json"
FOLDS_FILE = "folds.json"
STORE_FILE = "store.json"
SPLIT_FILES = ("train_ids.txt", "val_ids.txt")  # instead of folds.json, one tile id a line
SPLIT_SCHEME = "split"  # name of the fold scheme that the two make
TRAIN_ONLY = -1  # "fold" of a tile that is never held out
FILE_NAME_ERRORS = "surrogateescape"  # names of files may be any bytes
TILE_COLUMNS = ("tile_id", "source", "row", "col", "labels", "valid_share", *CODE_NAMES.values())


class StoreError(KitError):
    """A tile store is missing, incomplete, damaged, or in the way; the message says what to do."""


class TileRow(NamedTuple):
    """One row of tiles.csv.

    `row`, `col`: place in the grid that a tile id `row_col` states, None where the id states none.
    `labels`: "phase1", "partial", "phase2" or "hkh". `valid_share`: share (0-1) of pixels with a value in some band.
    `counts`: pixels per code, keyed by the names in `prep.labels.CODE_NAMES`.
    """

    tile_id: str
    source: str
    row: int | None
    col: int | None
    labels: str
    valid_share: float
    counts: Mapping[str, int]


class Split(NamedTuple):
    """Ids of the tiles to train on and of those to validate on, where a store has these instead of folds."""

    train: list[str]
    val: list[str]


class TileStore:
    """Read side of a tile store; opening it checks that every file it lists is there."""

    def __init__(self, folder: str | os.PathLike) -> None:
        """Open the store in `folder`. Raises StoreError where something is missing or damaged."""
        self.folder = Path(folder)
        self._require_complete()
        self.tiles: list[TileRow] = _read_tiles(self.folder / TILES_FILE)
        self.tile_ids: list[str] = [tile.tile_id for tile in self.tiles]
        self.stats: dict = _read_json(self.folder / STATS_FILE)
        self._known = set(self.tile_ids)
        self.folds: dict = self._read_folds()
        self._require_tiles()

    def image(self, tile_id: str) -> np.ndarray:
        """Return a tile's (H, W, 5) float32 image: reflectance, kelvin in band 5, NaN where nodata."""
        return np.load(self._path("images", tile_id))

    def mask(self, tile_id: str) -> np.ndarray:
        """Return a tile's (H, W) uint8 mask of label codes (see `prep.labels`)."""
        return np.load(self._path("masks", tile_id))

    @property
    def fingerprint(self) -> str | None:
        """Return the fingerprint of the files that the store was made of; None where store.json has none."""
        path = self.folder / STORE_FILE
        return _read_json(path).get("fingerprint") if path.is_file() else None

    @property
    def labels(self) -> dict[str, str]:
        """Return {tile_id: "phase1", "partial", "phase2" or "hkh"}: what the label of each tile is of."""
        return {tile.tile_id: tile.labels for tile in self.tiles}

    def fold_of(self, scheme: str) -> dict[str, int]:
        """Return {tile_id: fold} of the scheme "stratified" or "spatial", or of "split".

        The last is that of a store with training and validation ids: 0 for validation, else TRAIN_ONLY.
        """
        assignment = self.folds.get(scheme)
        if not isinstance(assignment, dict):
            known = ", ".join(name for name, value in self.folds.items() if isinstance(value, dict))
            raise StoreError(f"{self.folder / FOLDS_FILE}: no fold scheme '{scheme}'; it holds {known}")
        return {tile_id: int(fold) for tile_id, fold in assignment.items()}

    def _path(self, kind: str, tile_id: str) -> Path:
        if tile_id not in self._known:
            raise StoreError(f"{self.folder}: no tile '{tile_id}'; it holds {name_some(self.tile_ids)}")
        return self.folder / kind / f"{tile_id}.npy"

    def _require_complete(self) -> None:
        split = any((self.folder / name).exists() for name in SPLIT_FILES)
        parts = ("images", "masks", TILES_FILE, STATS_FILE, *(SPLIT_FILES if split else (FOLDS_FILE,)))
        missing = [part for part in parts if not (self.folder / part).exists()]
        if missing:
            raise StoreError(f"{self.folder} is no complete tile store: {', '.join(missing)} missing. {_remedy()}")

    def _read_folds(self) -> dict:
        if not (self.folder / SPLIT_FILES[0]).exists():
            return _read_json(self.folder / FOLDS_FILE)
        sides = [read_ids(self.folder / name) for name in SPLIT_FILES]
        ids = [tile_id for side in sides for tile_id in side]
        if sorted(ids) != sorted(self.tile_ids):
            raise StoreError(
                f"{self.folder}: {' and '.join(SPLIT_FILES)} name {len(ids)} tiles, which are not the "
                f"{len(self.tile_ids)} of {TILES_FILE}. {_remedy()}"
            )
        return {SPLIT_SCHEME: {**dict.fromkeys(sides[0], TRAIN_ONLY), **dict.fromkeys(sides[1], 0)}}

    def _require_tiles(self) -> None:
        paths = [self._path(kind, tile_id) for kind in ("images", "masks") for tile_id in self.tile_ids]
        missing = [str(path.relative_to(self.folder)) for path in paths if not path.is_file()]
        if missing:
            raise StoreError(
                f"{self.folder}: {TILES_FILE} lists files that are missing: {name_some(missing)}. {_remedy()}"
            )


class StoreWriter:
    """Write side of a tile store: an open folder that `create` later moves into place."""

    def __init__(self, folder: Path) -> None:
        """Prepare `folder` (existing, empty) for tiles."""
        self.folder = folder
        for kind in ("images", "masks"):
            (folder / kind).mkdir()

    def write_tile(self, tile_id: str, image: np.ndarray, mask: np.ndarray) -> None:
        """Store a tile: image (H, W, 5) in physical units, saved as float32; mask (H, W) of codes, uint8."""
        if image.ndim != 3 or mask.shape != image.shape[:2]:
            raise StoreError(f"tile {tile_id}: image {image.shape} and mask {mask.shape} do not fit each other")
        np.save(self.folder / "images" / f"{tile_id}.npy", image.astype(np.float32, copy=False))
        np.save(self.folder / "masks" / f"{tile_id}.npy", mask.astype(np.uint8, copy=False))

    def write_index(self, tiles: Sequence[TileRow], stats: Mapping, folds: Mapping | Split, about: Mapping) -> None:
        """Store tiles.csv, stats.json, store.json (the provenance), and folds.json or the ids of a Split."""
        with open(self.folder / TILES_FILE, "w", newline="", encoding="utf-8", errors=FILE_NAME_ERRORS) as stream:
            writer = csv.DictWriter(stream, TILE_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(_to_record(tile) for tile in tiles)
        files = {STATS_FILE: stats, STORE_FILE: about}
        if isinstance(folds, Split):
            for name, ids in zip(SPLIT_FILES, folds):
                write_ids(self.folder / name, ids)
        else:
            files[FOLDS_FILE] = folds
        for name, content in files.items():
            (self.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_existing(target: str | os.PathLike) -> None:
    """Raise StoreError where `target` exists and is no empty folder: for callers not told to overwrite."""
    target = Path(target)
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise StoreError(f"{target} exists already. Pass --overwrite to replace it, or name another folder with --out.")


@contextmanager
def create(target: str | os.PathLike, scratch: Path | None = None) -> Iterator[StoreWriter]:
    """Build a store in a temporary folder beside `target`; rename it when the block ends without an error.

    The temporary folder is made in `scratch` where one is given (existing, on the same file system): its
    owner can remove what a killed process left there. Elsewhere the next call for `target` does.

    An older store at `target` stays as it was until then, and whenever an error occurs. Anything else at
    `target` (a file, a folder with other content) is never replaced: StoreError.
    """
    target = Path(os.path.realpath(target))
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(target, scratch or target.parent) as work:
        building = work / "store"
        building.mkdir()
        yield StoreWriter(building)
        with locked(target.parent):
            _replace(target, building)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock on a folder, which ends with the process at the latest; yield False where another process
    holds it and is not waited for."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(handle)


@contextmanager
def _temporary_folder(target: Path, parent: Path) -> Iterator[Path]:
    """Make a folder for the time of the block, locked to show that its process lives.

    Those that killed processes left for `target` are removed.
    """
    prefix = f".{target.name}-building-"
    with ExitStack() as stack:
        with locked(target.parent):
            for abandoned in parent.glob(f"{glob.escape(prefix)}*"):
                _remove_abandoned(abandoned, target)
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=parent)))
            stack.enter_context(locked(work))
        yield work


def _remove_abandoned(folder: Path, target: Path) -> None:
    """Remove a temporary folder unless its process lives; a store that was about to be replaced goes back."""
    with locked(folder, wait=False) as abandoned:
        if abandoned:
            if (folder / "old").exists() and not target.exists():
                (folder / "old").rename(target)
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_foreign(target: Path) -> None:
    if not target.exists() or (target / STORE_FILE).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise StoreError(
            f"{target} is no tile store (it has no {STORE_FILE}), so it is not replaced. "
            "Name another folder with --out."
        )


def _replace(target: Path, building: Path) -> None:
    """Rename `building` to `target`; an older store is moved aside first, and back if that fails."""
    old = building.with_name("old")
    if target.exists():
        target.rename(old)
    try:
        building.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def write_ids(path: Path, ids: Sequence[str]) -> None:
    """Write tile ids, one a line."""
    text = "".join(f"{tile_id}\n" for tile_id in ids)
    path.write_text(text, encoding="utf-8", errors=FILE_NAME_ERRORS, newline="\n")


def read_ids(path: Path) -> list[str]:
    """Return the tile ids that a file lists, one a line; they may hold spaces."""
    return path.read_text(encoding="utf-8", errors=FILE_NAME_ERRORS).split("\n")[:-1]


def name_some(names: Sequence[str], most: int = 10) -> str:
    """Return the names as a list, cut short where there are many."""
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def _to_record(tile: TileRow) -> dict:
    record = {**tile._asdict(), **tile.counts, "valid_share": f"{tile.valid_share:.6f}"}
    del record["counts"]
    return record  # csv writes None as an empty field


def _read_tiles(path: Path) -> list[TileRow]:
    with open(path, newline="", encoding="utf-8", errors=FILE_NAME_ERRORS) as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in TILE_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise StoreError(f"{path}: columns {', '.join(missing)} missing. {_remedy()}")
        return [_from_record(record) for record in reader]


def _from_record(record: Mapping[str, str]) -> TileRow:
    return TileRow(
        tile_id=record["tile_id"],
        source=record["source"],
        row=int(record["row"]) if record["row"] else None,
        col=int(record["col"]) if record["col"] else None,
        labels=record["labels"],
        valid_share=float(record["valid_share"]),
        counts={name: int(record[name]) for name in CODE_NAMES.values()},
    )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StoreError(f"{path} is damaged ({error}). {_remedy()}") from error


def _remedy() -> str:
    return (
        "Make the store with `make prep DATA=<folder with Band1 ... Band5 and label>` (competition) or "
        "`python -m prep hkh` (HKH)."
    )
