"""The tile store `data/<name>/`: reading one, and writing one so that it is complete or absent."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from prep.labels import CODE_NAMES

TILES_FILE = "tiles.csv"
STATS_FILE = "stats.json"
FOLDS_FILE = "folds.json"
STORE_FILE = "store.json"
TILE_COLUMNS = ("tile_id", "source", "row", "col", "labels", "valid_share", *CODE_NAMES.values())


class StoreError(Exception):
    """A tile store is missing, incomplete, damaged, or in the way; the message says what to do."""


class TileRow(NamedTuple):
    """One row of tiles.csv.

    `row`, `col`: place in the grid that a tile id `row_col` states, None where the id states none.
    `labels`: "phase1" or "phase2". `valid_share`: share (0-1) of pixels with a value in some band.
    `counts`: pixels per code, keyed by the names in `prep.labels.CODE_NAMES`.
    """

    tile_id: str
    source: str
    row: int | None
    col: int | None
    labels: str
    valid_share: float
    counts: Mapping[str, int]


class TileStore:
    """Read side of a tile store; opening it checks that every file it lists is there."""

    def __init__(self, folder: str | os.PathLike) -> None:
        """Open the store in `folder`. Raises StoreError where something is missing or damaged."""
        self.folder = Path(folder)
        self._require_complete()
        self.tiles: list[TileRow] = _read_tiles(self.folder / TILES_FILE)
        self.tile_ids: list[str] = [tile.tile_id for tile in self.tiles]
        self.stats: dict = _read_json(self.folder / STATS_FILE)
        self.folds: dict = _read_json(self.folder / FOLDS_FILE)
        self._require_tiles()

    def image(self, tile_id: str) -> np.ndarray:
        """Return a tile's (H, W, 5) float32 image: reflectance, kelvin in band 5, NaN where nodata."""
        return np.load(self._path("images", tile_id))

    def mask(self, tile_id: str) -> np.ndarray:
        """Return a tile's (H, W) uint8 mask of label codes (see `prep.labels`)."""
        return np.load(self._path("masks", tile_id))

    def fold_of(self, scheme: str) -> dict[str, int]:
        """Return {tile_id: fold} of the scheme "stratified" or "spatial"."""
        assignment = self.folds.get(scheme)
        if not isinstance(assignment, dict):
            known = ", ".join(name for name, value in self.folds.items() if isinstance(value, dict))
            raise StoreError(f"{self.folder / FOLDS_FILE}: no fold scheme '{scheme}'; it holds {known}")
        return {tile_id: int(fold) for tile_id, fold in assignment.items()}

    def _path(self, kind: str, tile_id: str) -> Path:
        if tile_id not in self.tile_ids:
            raise StoreError(f"{self.folder}: no tile '{tile_id}'; it holds {', '.join(self.tile_ids)}")
        return self.folder / kind / f"{tile_id}.npy"

    def _require_complete(self) -> None:
        parts = ("images", "masks", TILES_FILE, STATS_FILE, FOLDS_FILE)
        missing = [part for part in parts if not (self.folder / part).exists()]
        if missing:
            raise StoreError(
                f"{self.folder} is no complete tile store: {', '.join(missing)} missing. {_remedy()}"
            )

    def _require_tiles(self) -> None:
        paths = [self._path(kind, tile_id) for kind in ("images", "masks") for tile_id in self.tile_ids]
        missing = [str(path.relative_to(self.folder)) for path in paths if not path.is_file()]
        if missing:
            raise StoreError(
                f"{self.folder}: {TILES_FILE} lists files that are missing: {', '.join(missing)}. {_remedy()}"
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
            raise StoreError(
                f"tile {tile_id}: image {image.shape} and mask {mask.shape} do not fit each other"
            )
        np.save(self.folder / "images" / f"{tile_id}.npy", image.astype(np.float32, copy=False))
        np.save(self.folder / "masks" / f"{tile_id}.npy", mask.astype(np.uint8, copy=False))

    def write_index(self, tiles: Sequence[TileRow], stats: Mapping, folds: Mapping, about: Mapping) -> None:
        """Store tiles.csv, stats.json, folds.json and the provenance in store.json."""
        with open(self.folder / TILES_FILE, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, TILE_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(_to_record(tile) for tile in tiles)
        for name, content in ((STATS_FILE, stats), (FOLDS_FILE, folds), (STORE_FILE, about)):
            (self.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_existing(target: str | os.PathLike) -> None:
    """Raise StoreError where `target` exists and is no empty folder: for callers not told to overwrite."""
    target = Path(target)
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise StoreError(
            f"{target} exists already. Pass --overwrite to replace it, or name another folder with --out."
        )


@contextmanager
def create(target: str | os.PathLike) -> Iterator[StoreWriter]:
    """Build a store in a temporary folder beside `target`; rename it when the block ends without an error.

    An older store at `target` stays as it was until then, and whenever an error occurs. Anything else at
    `target` (a file, a folder with other content) is never replaced: StoreError.
    """
    target = Path(target).resolve()
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-building-", dir=target.parent) as work:
        building = Path(work) / "store"
        building.mkdir()
        yield StoreWriter(building)
        _replace(target, building)


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


def _to_record(tile: TileRow) -> dict:
    record = {**tile._asdict(), **tile.counts, "valid_share": f"{tile.valid_share:.6f}"}
    del record["counts"]
    return record  # csv writes None as an empty field


def _read_tiles(path: Path) -> list[TileRow]:
    with open(path, newline="", encoding="utf-8") as stream:
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
    return "Make the store with `make prep DATA=<folder with Band1 ... Band5 and label>`."
