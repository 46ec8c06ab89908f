"""The tiles that a submission is given, and whether it leaves them as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Mapping, NamedTuple

import numpy as np

from prep.synthetic.scenes import NAMINGS, write_sample
from solution import BANDS, TileFiles, find_tiles, read_tile, valid_mask
from train.submit.archive import sha256

SAMPLE_TILES = 3
SAMPLE_SIZE = 256  # px
SAMPLE_SEED = 0


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


def lay_out_case(label: str, source: Path, folder: Path, most: int | None = None) -> Case:
    """Copy the bands of the tiles in `source`, without labels, to `folder` and make them read-only.

    Where there are more than `most` tiles, only the first ones are taken.

    Raises:
        solution.InputError: there are no tiles.
        solution.TileError: one of them is incomplete or unreadable.
    """
    tiles = []
    for files in find_tiles(source)[:most]:
        image = read_tile(files)
        copy_bands(files, folder / "data")
        tiles.append(Tile(files.tile_id, files.name, ~valid_mask(image)))
    (folder / "masks").mkdir()
    set_modes(folder, 0o444, 0o555)
    return Case(label, folder, tuple(tiles))


def copy_bands(files: TileFiles, data: Path) -> None:
    """Copy a tile's five files into band folders under `data`."""
    for band, path in zip(BANDS, files.paths):
        if path is None:
            raise ValueError(f"tile {files.tile_id}: no file in {band.folder}")
        (data / band.folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, data / band.folder / path.name)


def lay_out_cases(data: Path | None, workdir: Path) -> list[Case]:
    """Return the cases to run: the tiles in `data`, else the same synthetic scenes in both naming styles."""
    if data is not None:
        return [lay_out_case("given tiles", data, workdir / "given")]
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
