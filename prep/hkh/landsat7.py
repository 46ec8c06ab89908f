"""Landsat-7 scenes as Google Earth Engine exports them: channels by name, digital numbers to physical units.

Constants are those of low gain in Chander, Markham and Helder (2009), "Summary of current radiometric
calibration coefficients", Remote Sensing of Environment 113, tables 2, 4 and 5.
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Iterable, Mapping, NamedTuple, Sequence

import numpy as np

from solution import BANDS, warn

# Orders of the two exports in circulation, for files whose bands have no descriptions. SWIR-1 is index 4.
EXPORT_15 = (
    "B1", "B2", "B3", "B4", "B5", "B6_VCID_1", "B6_VCID_2", "B7", "B8", "BQA",
    "NDVI", "NDSI", "NDWI", "elevation", "slope",
)  # fmt: skip
EXPORTS = {15: EXPORT_15, 8: EXPORT_15[:8]}

# Channels that can serve as each band of `solution.BANDS`, the best first.
CHANNELS_OF_BAND = (("B1",), ("B2",), ("B3",), ("B5",), ("B6_VCID_1", "B6_VCID_2"))
SYNONYMS = {
    "BLUE": "B1",
    "GREEN": "B2",
    "RED": "B3",
    "SWIR1": "B5",
    "SWIR_1": "B5",
    "B61": "B6_VCID_1",
    "B62": "B6_VCID_2",
}

SMALLEST_NUMBER, LARGEST_NUMBER = 1, 255  # QCALMIN and QCALMAX; 0 is fill
K1, K2 = 666.09, 1282.71  # of band 6, W/(m2 sr um) and K
DEFAULT_SUN = 45.0  # degrees, where the elevation is not known
DEFAULT_DISTANCE = 1.0  # astronomical units; it varies by 1.7 %
SUN_COLUMNS = ("scene", "sun_elevation")


class SceneError(Exception):
    """A scene or its labels cannot be used; the message names file, finding, expectation and remedy."""


def require_files(paths: Iterable[Path]) -> None:
    """Raise SceneError for the first path that is no file, such as a pipe, which would be read for ever."""
    for path in paths:
        if not path.is_file():
            raise SceneError(
                f"{path}: is no file that can be reached; copy or download it again, or remove it"
            )


class Calibration(NamedTuple):
    """Radiance at numbers 1 and 255, and the sun's irradiance (None: thermal).

    Units: W/(m2 sr um), irradiance W/(m2 um).
    """

    lmin: float
    lmax: float
    esun: float | None

    def irradiance(self) -> float:
        """Return the sun's irradiance, W/(m2 um). Raises ValueError for a thermal channel, which has none."""
        if self.esun is None:
            raise ValueError("a thermal channel has no solar irradiance")
        return self.esun


CALIBRATIONS = {
    "B1": Calibration(-6.2, 293.7, 1997.0),
    "B2": Calibration(-6.4, 300.9, 1812.0),
    "B3": Calibration(-5.0, 234.4, 1533.0),
    "B5": Calibration(-1.0, 47.57, 230.8),
    "B6_VCID_1": Calibration(0.0, 17.04, None),
    "B6_VCID_2": Calibration(3.2, 12.65, None),
}


class Sun(NamedTuple):
    """Where the sun stood: elevation in degrees, distance in astronomical units, and who says so."""

    elevation: float
    distance: float
    source: str


# --- Channels -------------------------------------------------------------------------------------


def channel_name(description: str) -> str:
    """Return the channel that a band description means: "LE7 B1 (blue)", "blue" and "b1" are all "B1"."""
    bare = re.sub(r"\(.*?\)", "", description).strip()
    bare = re.sub(r"^LE0?7[ _-]+", "", bare, flags=re.IGNORECASE)
    name = re.sub(r"[^A-Z0-9]+", "_", bare.upper()).strip("_")
    return SYNONYMS.get(name, name)


def choose_channels(descriptions: Sequence[str | None], where: str) -> dict[str, int]:
    """Return {channel: index from 0} for the five bands, in the order of `solution.BANDS`.

    By the descriptions; where there are none at all, by the order of the export with that many bands.

    Raises:
        SceneError: a band is missing or named twice, or there are no names and an unknown number of bands.
    """
    count = len(descriptions)
    if not any(descriptions):
        if count not in EXPORTS:
            known = " or ".join(str(number) for number in sorted(EXPORTS))
            raise SceneError(
                f"{where}: found {count} bands without descriptions, expected {known} in the documented "
                "order (docs/hkh.md) or bands described by name; describe them, e.g. with rio edit-info"
            )
        names: list[str] = list(EXPORTS[count])
    else:
        names = [channel_name(text or "") for text in descriptions]
    found = [_first_present(candidates, names) for candidates in CHANNELS_OF_BAND]
    lacking = [
        f"{' or '.join(candidates)} ({band.name})"
        for band, candidates, channel in zip(BANDS, CHANNELS_OF_BAND, found)
        if channel is None
    ]
    chosen = [channel for channel in found if channel is not None]
    twice = [channel for channel in chosen if names.count(channel) > 1]
    if lacking or twice:
        problem = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(twice)} more than once"
        raise SceneError(
            f"{where}: {problem}; found bands {', '.join(text or '(none)' for text in descriptions)}. Export "
            "the scene with the bands of Landsat 7, each described by its name"
        )
    return {channel: names.index(channel) for channel in chosen}


def _first_present(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    return next((candidate for candidate in candidates if candidate in names), None)


# --- Units ----------------------------------------------------------------------------------------


def physical_table(channels: Sequence[str], sun: Sun) -> np.ndarray:
    """Return (5, 256) float32: what a digital number means in each channel, reflectance or kelvin.

    NaN for 0, which is fill, and for a thermal radiance of 0 (number 1 of the low gain), which has no
    temperature.
    """
    numbers = np.arange(256)
    table = np.empty((len(channels), 256), np.float32)
    for row, channel in enumerate(channels):
        calibration = CALIBRATIONS[channel]
        radiance = to_radiance(numbers, calibration)
        thermal = calibration.esun is None
        table[row] = to_kelvin(radiance) if thermal else to_reflectance(radiance, channel, sun)
        table[row, :SMALLEST_NUMBER] = np.nan
    return table


def to_radiance(numbers: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Return digital numbers, any shape, as radiance in W/(m2 sr um), float64."""
    gain = (calibration.lmax - calibration.lmin) / (LARGEST_NUMBER - SMALLEST_NUMBER)
    return gain * (np.asarray(numbers, np.float64) - SMALLEST_NUMBER) + calibration.lmin


def to_reflectance(radiance: np.ndarray, channel: str, sun: Sun) -> np.ndarray:
    """Return radiance in W/(m2 sr um) as reflectance at the top of the atmosphere."""
    irradiance = CALIBRATIONS[channel].irradiance() * math.sin(math.radians(sun.elevation))
    return math.pi * radiance * sun.distance**2 / irradiance


def to_kelvin(radiance: np.ndarray) -> np.ndarray:
    """Return radiance in W/(m2 sr um) as temperature in kelvin, NaN where it is 0 or less."""
    positive = np.where(radiance > 0, radiance, np.nan)
    return K2 / np.log(K1 / positive + 1)


def as_numbers(values: np.ndarray, where: str) -> np.ndarray:
    """Return values of any number type as digital numbers, uint8; NaN becomes 0, which is fill.

    Raises:
        SceneError: values that are no whole numbers from 0 to 255.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0)
    require_numbers(values, where)
    foreign = (values < 0) | (values > LARGEST_NUMBER) | (values != np.rint(values))
    if foreign.any():
        found = np.unique(values[foreign])[:3]
        raise SceneError(
            f"{where}: found {', '.join(f'{value:g}' for value in found)}, expected whole digital numbers "
            "0 to 255 of LANDSAT/LE07/C01/T1_RT. Scaled reflectance and 16-bit products are other units: "
            "export the digital numbers"
        )
    return values.astype(np.uint8)


def require_numbers(values: np.ndarray, where: str | Path) -> None:
    """Raise SceneError for text, dates, records or complex numbers."""
    if values.dtype.kind not in "buif":
        raise SceneError(f"{where}: found values of type {values.dtype}, expected numbers; export them again")


def to_physical(numbers: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return digital numbers (5, H, W) uint8 in physical units, (H, W, 5) float32, by `physical_table`."""
    image = np.empty((*numbers.shape[1:], len(table)), np.float32)
    for band, (values, meaning) in enumerate(zip(numbers, table)):
        image[..., band] = meaning[values]
    return image


# --- The sun --------------------------------------------------------------------------------------


def read_sun_table(path: Path | None) -> dict[str, Sun]:
    """Return {scene: Sun} from a CSV with the columns scene and sun_elevation, perhaps earth_sun_distance.

    `scene` is a file name or its stem.

    Raises:
        SceneError: no such file, missing columns, or no elevation between 0 and 90 degrees.
    """
    if path is None:
        return {}
    if not path.is_file():
        raise SceneError(f"{path}: no such file; expected a CSV with the columns {', '.join(SUN_COLUMNS)}")
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            reader = csv.DictReader(stream)
            columns, rows = reader.fieldnames or [], list(reader)
    except csv.Error as error:
        raise SceneError(f"{path}: cannot be read as a CSV ({error}); export the table again") from error
    missing = [name for name in SUN_COLUMNS if name not in columns]
    if missing:
        raise SceneError(
            f"{path}: found the columns {', '.join(columns)[:200] or 'none'}, expected "
            f"{', '.join(SUN_COLUMNS)}; add {', '.join(missing)}"
        )
    return {Path(row["scene"] or "").stem: _to_sun(row, f"{path}, scene {row['scene']}") for row in rows}


def _to_sun(row: Mapping[str, str | None], where: str) -> Sun:
    return make_sun(row["sun_elevation"] or "", row.get("earth_sun_distance") or DEFAULT_DISTANCE, where)


def make_sun(elevation: float | str, distance: float | str, where: str) -> Sun:
    """Return a Sun from numbers or their text. Raises SceneError where they are out of range."""
    try:
        sun = Sun(float(elevation), float(distance), where)
    except ValueError as error:
        raise SceneError(f"{where}: {error}; expected the sun's elevation in degrees") from error
    if not 0 < sun.elevation <= 90:
        raise SceneError(
            f"{where}: sun elevation {sun.elevation:g}, expected more than 0 and up to 90 degrees"
        )
    if not 0.9 < sun.distance < 1.1:
        raise SceneError(
            f"{where}: distance to the sun {sun.distance:g}, expected 0.98 to 1.02 astronomical units"
        )
    return sun


def find_sun(path: Path, tags: Mapping[str, str], table: Mapping[str, Sun]) -> Sun:
    """Return a scene's sun: from the CSV, else the file's tags, else its _MTL.txt, else 45 degrees.

    Tags and MTL are read under Landsat's own names, SUN_ELEVATION and EARTH_SUN_DISTANCE. Warns where the
    elevation is not known.

    Raises:
        SceneError: an elevation out of range.
    """
    if path.stem in table:
        return table[path.stem]
    sidecar = path.with_name(f"{path.stem}_MTL.txt")
    sources = {f"{path} (tags)": dict(tags)}
    if sidecar.is_file():
        pattern = r"^\s*(SUN_ELEVATION|EARTH_SUN_DISTANCE)\s*=\s*(\S+)"
        text = sidecar.read_text(encoding="utf-8", errors="replace")
        sources[str(sidecar)] = dict(re.findall(pattern, text, re.MULTILINE))
    for where, values in sources.items():
        if "SUN_ELEVATION" in values:
            return make_sun(
                values["SUN_ELEVATION"], values.get("EARTH_SUN_DISTANCE", DEFAULT_DISTANCE), where
            )
    warn(
        f"{path}: no sun elevation in its tags, {sidecar.name} or the CSV of --sun; {DEFAULT_SUN:g} degrees "
        "assumed, which scales its reflectance by sin(elevation) / 0.707"
    )
    return Sun(DEFAULT_SUN, DEFAULT_DISTANCE, "assumed")
