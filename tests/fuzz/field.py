"""What people feed solution.py, drawn at random: units, places, names, fills and consoles.

Every case has a twin as the competition delivers it, and a right answer: the twin's mask, an error that names the
tile, or a warning that names what the values look like.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import rasterio
from rasterio.transform import Affine
from support import scene_numbers

import solution
from fuzz.runs import Found, call, note

SIDE = 64  # px
NORTH_UP = Affine(30, 0, 500_000, 0, -30, 3_700_000)
RIGHT = "the twin's mask"  # what a case has to give; else words of a warning or of an error
MOST_DIFFERENT = 0.005  # share of pixels: other units are other rounding


class Case(NamedTuple):
    """What a folder has to give: {stem of Band1's file: RIGHT, words of its error, "" for any mask}; a warning."""

    about: str
    expected: dict[str, str]
    warning: str = ""


def write(root: Path, name: str, bands: np.ndarray, places: Callable[[int], tuple[Affine, int]], **profile) -> None:
    """Write a tile of five GeoTIFFs; `places` gives transform and EPSG code of a band by its index."""
    for index, band in enumerate(solution.BANDS):
        transform, epsg = places(index)
        path = root / band.folder / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = {"height": bands.shape[0], "width": bands.shape[1], "count": 1}
        options = {"driver": "GTiff", "crs": f"EPSG:{epsg}", "transform": transform, "dtype": "float32"}
        with rasterio.open(path, "w", **{**options, **shape, **profile}) as raster:
            raster.write(bands[..., index].astype(raster.dtypes[0]), 1)


def at(transform: Affine = NORTH_UP, epsg: int = 32643) -> Callable[[int], tuple[Affine, int]]:
    """Return that all bands lie here."""
    return lambda index: (transform, epsg)


def units(rng: np.random.Generator, bands: np.ndarray, root: Path) -> Case:
    """Write numbers of another scaling: those that are certain are converted, others are named."""
    seen = bands > 0
    physical = np.stack([bands[..., i] * b.scale + b.offset for i, b in enumerate(solution.BANDS)], axis=-1)
    reflective, thermal = (
        str(rng.choice(["dn", "1", "10000", "8-bit"])),
        str(rng.choice(["dn", "kelvin", "celsius"])),
    )
    stored = bands.astype(np.float64)
    if reflective == "8-bit":
        stored[..., :4] = np.ceil(bands[..., :4] / 257)
    elif reflective != "dn":
        stored[..., :4] = np.where(seen[..., :4], physical[..., :4] * int(reflective), 0)
    if thermal != "dn":
        stored[..., 4] = np.where(seen[..., 4], physical[..., 4] - (273.15 if thermal == "celsius" else 0), 0)
    write(root, "img001", stored, at())
    named = {"8-bit": "8-bit numbers", "1": "reflectance", "10000": "reflectance x 10000", "dn": ""}[reflective]
    named = named or {"kelvin": "kelvin", "celsius": "degrees Celsius", "dn": ""}[thermal]
    certain = reflective != "8-bit" and thermal != "celsius"
    return Case(f"{reflective}, {thermal}", {"img001": RIGHT if certain else ""}, named)


def places(rng: np.random.Generator, bands: np.ndarray, root: Path) -> Case:
    """Write bands that lie together, apart, or turned."""
    kind = str(rng.choice(["together", "nearly", "shifted", "zone", "pixel size", "turned"]))
    epsg = int(rng.choice([32643, 32644, 3857, 6933]))
    corner = NORTH_UP @ Affine.translation(*map(int, rng.integers(-9000, 9000, 2)))
    turns = [Affine.scale(1, -1), Affine.scale(-1, 1), Affine.rotation(float(rng.uniform(5, 355)))]
    other = {
        "nearly": (corner @ Affine.translation(*rng.uniform(-0.2, 0.2, 2)), epsg),
        "shifted": (corner @ Affine.translation(*(rng.choice([-1, 1], 2) * rng.integers(1, 60, 2))), epsg),
        "zone": (corner, 32645),
        "pixel size": (corner @ Affine.scale(float(rng.choice([0.5, 2.0]))), epsg),
    }
    odd = int(rng.integers(5))
    if kind == "turned":
        corner = corner @ turns[int(rng.integers(3))]
    write(
        root,
        "img001",
        bands,
        lambda index: other.get(kind, (corner, epsg)) if index == odd else (corner, epsg),
    )
    words = {"turned": "north is not above", "together": RIGHT, "nearly": RIGHT}.get(kind, "begins at")
    return Case(f"{kind}, band {odd + 1}", {"img001": words})


def names(rng: np.random.Generator, bands: np.ndarray, root: Path) -> Case:
    """Write several tiles whose names share what looks like an id; one may lack a band."""
    pattern = str(
        rng.choice(["{}_08_14", "tile_{}01_02", "{}img01", "scène {}", "氷河{}", "a{}[1]", "B{}x", "img{:0>3}"])
    )
    stems = [pattern.format(number) for number in rng.choice(np.arange(1, 90), size=3, replace=False)]
    for stem in stems:
        write(root, stem, bands, at())
    expected = dict.fromkeys(stems, RIGHT)
    if rng.random() < 0.5:
        lost = str(rng.choice(stems))
        (root / f"Band{rng.integers(2, 6)}" / f"{lost}.tif").unlink()
        expected[lost] = "add the missing file"
    return Case(f"{stems}", expected)


def fills(rng: np.random.Generator, bands: np.ndarray, root: Path) -> Case:
    """Write what is no measurement by another number than 0, declared, masked or not said at all."""
    kind = str(rng.choice(["-9999", "-999", "-1", "-32768", "nan", "declared", "mask"]))
    fill = 12345.0 if kind in ("declared", "mask") else float(kind)
    write(
        root,
        "img001",
        np.where(bands > 0, bands, fill),
        at(),
        **({"nodata": fill} if kind == "declared" else {}),
    )
    if kind == "mask":
        internal = bool(rng.random() < 0.5)
        for index, band in enumerate(solution.BANDS):
            path = root / band.folder / "img001.tif"
            with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), rasterio.open(path, "r+") as raster:
                raster.write_mask(bands[..., index] > 0)
    return Case(kind, {"img001": RIGHT})


KINDS = (units, places, names, fills)


class Console(io.TextIOBase):
    """Stands in for standard error and refuses what is written to it."""

    encoding = None

    def __init__(self, error: Exception) -> None:
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


CONSOLES: tuple[Callable[[], object], ...] = (
    lambda: sys.stderr,
    lambda: None,
    lambda: object(),
    lambda: Console(BrokenPipeError("the reader went away")),
    lambda: Console(ValueError("I/O operation on closed file")),
    lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"),
)


def run(data: Path, weights: Path, console: Callable[[], object]) -> solution.Summary:
    """Segment a folder with all passes; messages go to `console`."""
    before = sys.stderr
    sys.stderr = console()  # type: ignore[assignment]
    try:
        return solution.segment_folder(data, weights, None, "inf")
    finally:
        sys.stderr = before


def judge(case: Case, summary: solution.Summary, twin: np.ndarray, said: str) -> list[str]:
    """Return what is wrong with the masks and faults of a case."""
    faults = [] if len(summary.masks) == len(case.expected) else [f"masks of {sorted(summary.masks)}"]
    for stem, right in case.expected.items():
        identifier = stem if stem in summary.masks else solution.tile_id(f"{stem}.tif")
        mask, fault = summary.masks.get(identifier), summary.faults.get(identifier)
        if mask is None:
            faults.append(f"{stem}: no mask")
        elif right == RIGHT and (fault or (mask != twin).mean() > MOST_DIFFERENT):
            faults.append(f"{stem}: {fault or f'{(mask != twin).mean():.1%} of pixels differ'}")
        elif right != RIGHT and (right not in str(fault) if right else fault):
            faults.append(f"{stem}: expected {right or 'a mask'}, found {fault}")
    if case.warning not in said:
        faults.append(f"no warning of {case.warning}: {said}")
    return faults


def fuzz_field(seed: int, cases: int, weights: Path, work: Path, keep: bool = False) -> Found:
    """Run so many cases, each of a kind in turn."""
    bands = scene_numbers(0)[:SIDE, :SIDE]
    write(work / "twin", "img001", bands, at())
    (twin,) = run(work / "twin", weights, lambda: None).masks.values()
    found = Found(cases, set(), 0, 0, [])
    masks = refused = 0
    for number in range(cases):
        rng = np.random.default_rng([seed, 2, number])
        folder, kind = work / f"field{number}", KINDS[number % len(KINDS)]
        case = kind(rng, bands, folder)
        ordinary = bool(case.warning) or rng.random() < 0.5  # what is said has to be heard
        console = CONSOLES[0 if ordinary else int(rng.integers(len(CONSOLES)))]
        ending = call(case.about, lambda: run(folder, weights, console))  # noqa: B023
        faults = [ending.raised] if ending.raised else judge(case, ending.result, twin, ending.said)
        note(found.faults, f"seed {seed} {kind.__name__} {number} ({case.about})", faults)
        found.inputs.add(f"{kind.__name__}: {case.about}")
        refused += sum(bool(right) and right != RIGHT for right in case.expected.values())
        masks += sum(right == RIGHT for right in case.expected.values())
        if not (keep and faults):
            shutil.rmtree(folder)
    return found._replace(masks=masks, refused=refused)
