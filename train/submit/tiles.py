"""The tiles that a submission is given, and what the masks of them must be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence, Union

import cv2
import numpy as np
import tifffile

from prep.files import sha256
from prep.synthetic.scenes import write_sample
from solution import BANDS, CLASS_NAMES, CLASS_VALUES, TileFiles, find_tiles, read_tile, valid_mask
from train.submit.verdict import CheckResult, judge

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SAME_SHARE = 0.999  # of two masks' pixels: the number of threads moves the last digits of a probability

Mask = Union[np.ndarray, str]  # pixels, or the reason why there are none
Masks = Mapping[str, Mask]


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


class Outcome(NamedTuple):
    """The masks that one caller got, by tile id."""

    subject: str
    masks: Masks


# --- Tiles ----------------------------------------------------------------------------------------


def lay_out_case(label: str, source: Path, folder: Path, most: int | None = None) -> Case:
    """Copy the bands of the first `most` tiles in `source`, without labels, to `folder`, read-only.

    Raises:
        solution.InputError: there are no tiles.
        solution.TileError: one of them is incomplete or unreadable.
    """
    tiles = []
    for files in find_tiles(source)[:most]:
        tiles.append(Tile(files.tile_id, files.name, ~valid_mask(read_tile(files))))
        copy_bands(files, folder / "data")
    (folder / "masks").mkdir()
    set_modes(folder, 0o444, 0o555)
    return Case(label, folder, tuple(tiles))


def copy_bands(files: TileFiles, data: Path) -> None:
    """Copy the files that a tile has into band folders under `data`."""
    for band, path in zip(BANDS, files.paths):
        (data / band.folder).mkdir(parents=True, exist_ok=True)
        if path is not None:
            shutil.copyfile(path, data / band.folder / path.name)


def lay_out_samples(label: str, tiles: int, size: int, naming: str, workdir: Path) -> Case:
    """Return a case of synthetic tiles of `size` px."""
    write_sample(workdir / f"{label}-scenes", tiles, size, 0, naming, "phase2")
    return lay_out_case(label, workdir / f"{label}-scenes", workdir / label)


def damage_case(case: Case, folder: Path) -> Case:
    """Return a copy of a case in which one band of its first tile is cut off after 100 bytes."""
    shutil.copytree(case.folder, folder)
    set_modes(folder, 0o644, 0o755)
    band = find_tiles(folder / "data")[0].paths[2]
    assert band is not None  # a case holds whole tiles
    band.write_bytes(band.read_bytes()[:100])
    set_modes(folder, 0o444, 0o555)
    return Case("a damaged tile", folder, case.tiles)


def set_modes(folder: Path, file_mode: int, folder_mode: int) -> None:
    """Give all files and folders in and at `folder` these modes."""
    folder.chmod(0o755)  # or its entries could not be changed
    for path in sorted(folder.rglob("*")):
        path.chmod(folder_mode if path.is_dir() else file_mode)
    folder.chmod(folder_mode)


def take_snapshot(folder: Path) -> dict[str, tuple]:
    """Return all that `folder` holds with content hash and time of change: modes do not bind root.

    A folder's time changes with its entries, which are compared themselves.
    """
    return {
        str(path.relative_to(folder)): (sha256(path), path.stat().st_mtime_ns) if path.is_file() else ()
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def compare_snapshots(before: Mapping[str, tuple], after: Mapping[str, tuple]) -> list[str]:
    """Return what was added, removed and changed."""
    added = [f"{name} is new" for name in sorted(set(after) - set(before))]
    removed = [f"{name} is gone" for name in sorted(set(before) - set(after))]
    kept = sorted(set(before) & set(after))
    return added + removed + [f"{name} was changed" for name in kept if before[name] != after[name]]


# --- Masks ----------------------------------------------------------------------------------------


def read_mask(path: Path) -> Mask:
    """Return the pixels of a mask file, or why it cannot be read as what its name says."""
    try:
        if path.suffix != ".png":
            return tifffile.imread(path)
        content = path.read_bytes()
        if not content.startswith(PNG_SIGNATURE):
            return f"begins with {content[:8]!r}, not as a PNG"
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        return "a damaged PNG" if pixels is None else pixels
    except Exception as error:  # a damaged TIFF may raise almost anything
        return f"{type(error).__name__}: {error}"


def read_folder(folder: Path) -> dict[str, Mask]:
    """Return {file name: mask} of all that lies in `folder`, empty where there is none."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): read_mask(path) for path in paths}


def judge_masks(subject: str, masks: Masks, tiles: Mapping[str, Tile]) -> list[CheckResult]:
    """Return the results on masks whose names should be those of `tiles`."""
    missing = [f"no {name}" for name in sorted(set(tiles) - set(masks))]
    extra = [f"{name} is extra" for name in sorted(set(masks) - set(tiles))]
    unreadable, types, shapes, values, nodata = [], [], [], [], []
    for name in sorted(set(masks) & set(tiles)):
        mask, background = masks[name], tiles[name].nodata
        if isinstance(mask, str):
            unreadable.append(f"{name}: {mask}")
            continue
        if mask.dtype != np.uint8:
            types.append(f"{name}: {mask.dtype}")
        strange = np.setdiff1d(mask, CLASS_VALUES)[:4]
        if strange.size:
            values.append(f"{name}: {', '.join(f'{value:g}' for value in strange)}")
        if mask.shape != background.shape:
            shapes.append(f"{name}: {mask.shape} for a tile of {background.shape}")
        elif mask[background].any():
            nodata.append(f"{name}: {np.count_nonzero(mask[background])} nodata pixels have a class")
    return [
        judge(subject, "a mask for every tile", missing, f"{len(tiles)} masks"),
        judge(subject, "nothing else", extra, "no other name"),
        judge(subject, "readable", unreadable, "an image of the kind that the name says"),
        judge(subject, "type", types, "uint8"),
        judge(subject, "shape", shapes, "the tile's"),
        judge(subject, "values", values, f"only {', '.join(map(str, CLASS_VALUES))}"),
        judge(subject, "nodata is 0", nodata, "0 at every nodata pixel"),
    ]


def share_of_same(one: Mask | None, other: Mask | None) -> float:
    """Return the share of equal pixels, 0 where a mask is missing, unreadable or of another shape."""
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray) or one.shape != other.shape:
        return 0.0
    return float(np.mean(one == other))


def judge_agreement(subject: str, outcomes: Sequence[Outcome]) -> CheckResult:
    """Return whether all callers got the masks of the first, tile by tile."""
    shares = {
        f"tile {tile_id} of {other.subject}": share_of_same(mask, other.masks.get(tile_id))
        for other in outcomes[1:]
        for tile_id, mask in outcomes[0].masks.items()
    }
    faults = [f"{tile}: {share:.2%} of the pixels" for tile, share in shares.items() if share < SAME_SHARE]
    expected = f"the same class as by {outcomes[0].subject} on {SAME_SHARE:.1%} of the pixels"
    return judge(subject, "all callers agree", faults, expected)


def judge_life(subject: str, outcomes: Sequence[Outcome]) -> CheckResult:
    """Return the class shares over all masks; plain background everywhere is a dead model."""
    masks = [mask for outcome in outcomes for mask in outcome.masks.values() if isinstance(mask, np.ndarray)]
    counts = np.array([sum(np.count_nonzero(mask == value) for mask in masks) for value in CLASS_VALUES])
    shares = counts / max(sum(mask.size for mask in masks), 1)
    found = ", ".join(f"{name} {share:.1%}" for name, share in zip(CLASS_NAMES, shares))
    return CheckResult(subject, "classes", bool(counts[1:].any()), found, "not background everywhere")
