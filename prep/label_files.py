"""The organisers' label files: finding them, telling phase 1 from phase 2, refusing what cannot be right."""

from __future__ import annotations

import math
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Iterable, NamedTuple, Optional, Sequence

import cv2
import numpy as np
import tifffile

from prep.labels import GLACIER_OR_DEBRIS
from solution import CLASS_NAMES, CLASS_VALUES, MOST_PIXELS, TIFF_SUFFIXES, TileError, decode_tiff, tile_id

# Label folders and what they hold, None to tell it by the values. Of two labels of a tile the later folder's is read.
LABEL_FOLDERS: dict[str, Optional[str]] = {
    "label": None,
    "label_partial": "partial",
    "label_phase2": "phase2",
}
LABEL_SUFFIXES = (*TIFF_SUFFIXES, ".png")
PHASES = ("phase1", "partial", "phase2")
KIND_UNKNOWN = 127  # value of a glacier in label_partial/ whose kind nobody has mapped
UNREAD = {
    34887: "LERC",
    34926: "ZSTD",
    50000: "ZSTD",
    50001: "WebP",
    50002: "JPEG XL",
}  # the grader cannot either
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

LAKE_VALUE = CLASS_VALUES[CLASS_NAMES.index("lake")]
GLACIER_VALUES = (CLASS_VALUES[CLASS_NAMES.index("glacier")], CLASS_VALUES[CLASS_NAMES.index("debris")])

# What a grey value becomes in a mask. 255 is a glacier of either kind in phase 1, a lake in phase 2.
VALUE_CODES: dict[str, dict[int, int]] = {
    "phase1": {0: 0, 255: GLACIER_OR_DEBRIS},
    "phase2": {value: index for index, value in enumerate(CLASS_VALUES)},
}
VALUE_CODES["partial"] = {**VALUE_CODES["phase2"], KIND_UNKNOWN: GLACIER_OR_DEBRIS}
SCHEMES = {
    "phase1": "0 (other) and 255 (glacier of either kind)",
    "phase2": ", ".join(f"{value} ({name})" for value, name in zip(CLASS_VALUES, CLASS_NAMES)),
}
SCHEMES["partial"] = f"{SCHEMES['phase2']}, {KIND_UNKNOWN} (glacier of unknown kind)"

# Lakes cover 0.05 % of the published phase-2 area, glaciers of phase 1 14 to 52 % of a tile. A folder with
# more "lake" than the first share and no glacier at all holds phase-1 labels. For one tile among genuine
# phase-2 labels the bar is higher: it may have a large lake and no glacier, but 5 % of a 512 px tile are
# 12 km2, twice the largest glacial lakes of the Himalaya.
LARGEST_LAKE_SHARE_OF_FOLDER = 0.02
LARGEST_LAKE_SHARE_OF_TILE = 0.05

EXPLANATION = (
    "These are phase-1 values: there 255 marks glaciers, in phase 2 it marks lakes, which cover about 0.05 % "
    "of the area. Keep phase-1 labels in label/ (--phase 1) and phase-2 labels in label_phase2/"
)


class LabelFile(NamedTuple):
    """One label file and what it holds: `counts` are pixels per distinct value, `shape` is (H, W)."""

    tile_id: str
    path: Path
    shape: tuple[int, int]
    counts: dict[float, int]

    def share(self, value: int) -> float:
        """Return the share (0-1) of the pixels that have this grey value."""
        return self.counts.get(value, 0) / max(1, sum(self.counts.values()))

    def has_glacier_values(self) -> bool:
        """Tell whether 85 or 170 occurs, which only phase-2 labels have."""
        return any(value in self.counts for value in GLACIER_VALUES)


def read_label(path: Path) -> np.ndarray:
    """Return a label file's values as stored, (H, W), any number type; 0 stays 0 (for bands it is nodata).

    A grey picture that was saved as red, green and blue is read as what it is.

    Raises:
        TileError: unreadable, or more than one channel.
    """
    require_codec(path)
    pixels = decode_tiff(path)[0] if path.suffix.lower() in TIFF_SUFFIXES else _decode_png(path)
    if pixels.ndim == 3 and pixels.shape[-1] in (3, 4) and (pixels[..., :3] == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim == 3 and 1 in (pixels.shape[0], pixels.shape[-1]):
        pixels = pixels[0] if pixels.shape[0] == 1 else pixels[..., 0]
    if pixels.ndim != 2 or pixels.size == 0:
        raise TileError(
            f"{path}: found an array of shape {pixels.shape}, as of colours or a palette, expected one grey channel "
            "(H, W); export the label's values, without a palette, as a single-band file"
        )
    return pixels


def require_codec(path: Path) -> None:
    """Raise TileError for a TIFF of a compression that solution.py cannot undo either."""
    codec = None
    if path.is_file():  # a pipe would be read for ever; what is damaged is explained by who reads it
        with suppress(Exception), tifffile.TiffFile(path) as tiff:
            codec = UNREAD.get(tiff.pages.first.compression)
    if codec:
        raise TileError(
            f"{path}: found {codec} compression, expected deflate, LZW or none; convert it with "
            f"gdal_translate -co COMPRESS=DEFLATE {path.name} new.tif"
        )


def _decode_png(path: Path) -> np.ndarray:
    size = os.path.getsize(path) if os.path.isfile(path) else 0  # a pipe would be read for ever
    try:
        encoded = np.fromfile(path, np.uint8) if size else np.empty(0, np.uint8)
        is_png = encoded[:8].tobytes() == PNG_SIGNATURE
        # a small file can declare very many pixels
        whole = is_png and math.prod(struct.unpack(">II", encoded[16:24].tobytes())) <= MOST_PIXELS
        pixels = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED) if whole else None
    except (OSError, cv2.error, struct.error):
        pixels = None
    if pixels is None:
        raise TileError(f"{path}: cannot be read as a PNG ({size} bytes); copy or export the file again")
    return pixels


class Labels(NamedTuple):
    """The chosen labels: `files` and `phases` (of PHASES) by tile id, and `problems` found."""

    files: dict[str, LabelFile]
    phases: dict[str, str]
    problems: list[str]


def read_labels(folders: Sequence[Path], phase: Optional[str]) -> Labels:
    """Survey label folders, check their values, and choose each tile's label: of two the later folder's.

    Args:
        folders: those that do not exist hold nothing; LABEL_FOLDERS in its order.
        phase: of a folder whose name does not tell it; None to tell it by the values.
    """
    found = Labels({}, {}, [])
    for folder in folders:
        surveyed, problems = survey(folder)
        scheme = LABEL_FOLDERS.get(folder.name) or phase or detect_phase(surveyed)
        problems += scheme_problems(surveyed, scheme)
        if scheme == "phase2":
            problems += disguise_problems(surveyed)
        found.problems.extend(problems)
        found.files.update({label.tile_id: label for label in surveyed})
        found.phases.update({label.tile_id: scheme for label in surveyed})
    return found


def list_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return ({tile id: TIFF or PNG} of a folder, one message for each further file with an id of these)."""
    files: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() not in LABEL_SUFFIXES or path.name.startswith("."):
            continue
        identifier = tile_id(path.name)
        if identifier in files:
            first = files[identifier].name
            problems.append(f"{path}: {first} is of tile {identifier} too; remove one of the two")
        else:
            files[identifier] = path
    return files, problems


def survey(folder: Path, only: Optional[Iterable[str]] = None) -> tuple[list[LabelFile], list[str]]:
    """Read every label file of a folder, or those of the tiles `only`; return (them by tile id, problems found).

    A folder that does not exist has none. Problems are unreadable files and two files for one tile.
    """
    files, problems = list_files(folder)
    labels = []
    for identifier in sorted(files if only is None else files.keys() & set(only)):
        try:
            pixels = read_label(files[identifier])
            values, counts = np.unique(pixels, return_counts=True)
            shape = (pixels.shape[0], pixels.shape[1])
            labels.append(LabelFile(identifier, files[identifier], shape, dict(zip(values.tolist(), counts.tolist()))))
        except TileError as error:
            problems.append(str(error))
    return labels, problems


def has_glaciers(labels: Iterable[LabelFile]) -> bool:
    """Tell whether 85 or 170 occurs in any of the labels of a folder."""
    return any(label.has_glacier_values() for label in labels)


def detect_phase(labels: Iterable[LabelFile]) -> str:
    """Return "phase2" where 85 or 170 occurs in any of the labels of a folder, else "phase1"."""
    return "phase2" if has_glaciers(labels) else "phase1"


def scheme_problems(labels: Iterable[LabelFile], phase: str) -> list[str]:
    """Return one message for each label file with values outside the phase's scheme."""
    problems = []
    for label in labels:
        foreign = {value: n for value, n in label.counts.items() if value not in VALUE_CODES[phase]}
        if foreign:
            problems.append(
                f"{label.path}: found {list_values(foreign)}; expected only {SCHEMES[phase]} in a "
                f"{_spell(phase)} label; export the label with these values"
            )
    return problems


def disguise_problems(labels: Iterable[LabelFile]) -> list[str]:
    """Return messages for phase-1 labels among labels that are meant to be phase 2.

    Nothing else would notice: read as phase 2, a phase-1 glacier is a lake, and 30 % of the area with it.
    """
    labels = list(labels)
    if not has_glaciers(labels):
        share = f"{lake_share(labels):.1%} of its {len(labels)} tiles and neither 85 nor 170 occurs in any"
        found = [f"{one.path.parent}: meant as phase 2, but 255 covers {share}. {EXPLANATION}" for one in labels[:1]]
        return found if is_disguised(labels) else []
    return [
        f"{label.path}: 255 covers {label.share(LAKE_VALUE):.1%} of the tile and neither 85 nor 170 occurs "
        f"in it, while they do in labels beside it. {EXPLANATION}"
        for label in labels
        if not label.has_glacier_values() and label.share(LAKE_VALUE) > LARGEST_LAKE_SHARE_OF_TILE
    ]


def lake_share(labels: Sequence[LabelFile]) -> float:
    """Return the share (0-1) of the area of some labels that has the value of lakes."""
    area = sum(sum(label.counts.values()) for label in labels)
    return sum(label.counts.get(LAKE_VALUE, 0) for label in labels) / max(1, area)


def is_disguised(labels: Sequence[LabelFile]) -> bool:
    """Tell whether 255 covers more of a folder's area than lakes can."""
    return lake_share(labels) > LARGEST_LAKE_SHARE_OF_FOLDER


def to_codes(values: np.ndarray, phase: str) -> np.ndarray:
    """Return the mask of codes, (H, W) uint8; values that `scheme_problems` complains of become 0."""
    mask = np.zeros(values.shape, np.uint8)
    for value, code in VALUE_CODES[phase].items():
        mask[values == value] = code
    return mask


def _spell(phase: str) -> str:
    return phase.replace("phase", "phase-")


def list_values(counts: dict[float, int], most: int = 8) -> str:
    """Spell out values with their pixel counts, the commonest first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{value:g} ({count:,} px)" for value, count in ordered[:most])
    return listed + (f" and {len(ordered) - most} more values" if len(ordered) > most else "")
