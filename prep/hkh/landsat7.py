"""Landsat-7 scenes as Google Earth Engine exports them: channels by name, digital numbers to physical units.

Constants are those of low gain in Chander, Markham and Helder (2009), "Summary of current radiometric
calibration coefficients", Remote Sensing of Environment 113, tables 2, 4 and 5.
"""

from __future__ import annotations

import csv
import datetime
import math
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from solution import BANDS, KitError, warn

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

# The orbit (Landsat 7 data users handbook, LSDS-1927): inclination, grid of paths and rows (WRS-2), period, and
# mean solar time at the equator.
INCLINATION = math.radians(98.2)
PATHS, ROWS, EQUATOR_ROW, FIRST_LONGITUDE = 233, 248, 60, -64.6
PERIOD = 98.9 / 60  # hours
CROSSING = 10.1  # hours
SCENE_NAME = re.compile(r"LE0?7_(?:[A-Z0-9]{4}_)?(\d{3})(\d{3})_(\d{4})(\d\d)(\d\d)")

# Gap filling predicts from another year's scene, so some values lie beyond 0 to 255, but few of them far.
FARTHEST_NUMBERS, MOST_FAR = (-255, 510), 0.05
LARGEST_REFLECTANCE = 2.0


class SceneError(KitError):
    """A scene or its labels cannot be used; the message names file, finding, expectation and remedy."""


@contextmanager
def reading(path: Path, kind: type[Exception] = Exception) -> Iterator[None]:
    """Raise SceneError, which names the file, for an error of this kind: GDAL and numpy know many for damaged files."""
    try:
        yield
    except SceneError:
        raise
    except kind as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no such file"
        reason = error.__cause__ or error
        raise SceneError(f"{path}: cannot be read ({size}; {reason}); copy or download the file again") from error


def require_files(paths: Iterable[Path]) -> None:
    """Raise SceneError for the first path that is no file, such as a pipe, which would be read for ever."""
    for path in paths:
        if not path.is_file():
            raise SceneError(f"{path}: is no file that can be reached; copy or download it again, or remove it")


# Radiance at numbers 1 and 255, W/(m2 sr um), and the sun's irradiance of the channels that see it, W/(m2 um).
RADIANCES = {
    "B1": (-6.2, 293.7),
    "B2": (-6.4, 300.9),
    "B3": (-5.0, 234.4),
    "B5": (-1.0, 47.57),
    "B6_VCID_1": (0.0, 17.04),
    "B6_VCID_2": (3.2, 12.65),
}
IRRADIANCES = {"B1": 1997.0, "B2": 1812.0, "B3": 1533.0, "B5": 230.8}


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
        radiance = to_radiance(numbers, channel)
        seen = channel in IRRADIANCES
        table[row] = to_reflectance(radiance, channel, sun) if seen else to_kelvin(radiance)
        table[row, :SMALLEST_NUMBER] = np.nan
    return table


def to_radiance(numbers: np.ndarray, channel: str) -> np.ndarray:
    """Return digital numbers, any shape, as radiance in W/(m2 sr um), float64."""
    least, most = RADIANCES[channel]
    gain = (most - least) / (LARGEST_NUMBER - SMALLEST_NUMBER)
    return gain * (np.asarray(numbers, np.float64) - SMALLEST_NUMBER) + least


def to_reflectance(radiance: np.ndarray, channel: str, sun: Sun) -> np.ndarray:
    """Return radiance in W/(m2 sr um) as reflectance at the top of the atmosphere."""
    irradiance = IRRADIANCES[channel] * math.sin(math.radians(sun.elevation))
    return math.pi * radiance * sun.distance**2 / irradiance


def to_kelvin(radiance: np.ndarray) -> np.ndarray:
    """Return radiance in W/(m2 sr um) as temperature in kelvin, NaN where it is 0 or less."""
    positive = np.where(radiance > 0, radiance, np.nan)
    return K2 / np.log(K1 / positive + 1)


def as_numbers(values: np.ndarray, where: str) -> np.ndarray:
    """Return values of any number type as digital numbers, uint8; 0, which is fill, for what is not finite.

    Values between whole numbers are those of filled gaps: they are rounded and clipped to 1 ... 255.

    Raises:
        SceneError: values of another unit, such as reflectance, 16-bit products or standardised values.
    """
    if values.dtype == np.uint8:
        return values
    require_numbers(values, where)
    measured = np.isfinite(values) & (values != 0)
    found = values[measured]
    far = (found < FARTHEST_NUMBERS[0]) | (found > FARTHEST_NUMBERS[1])
    fractions = (found != np.rint(found)).any()
    if np.count_nonzero(far) > MOST_FAR * found.size or (fractions and np.median(found) <= LARGEST_REFLECTANCE):
        raise SceneError(
            f"{where}: found values from {found.min():g} to {found.max():g}, expected digital numbers 0 to 255 "
            "of LANDSAT/LE07/C01/T1_RT. Reflectance, 16-bit products and standardised patches are other units: "
            "export the digital numbers"
        )
    numbers = np.zeros(values.shape, np.uint8)
    numbers[measured] = np.clip(np.rint(found), SMALLEST_NUMBER, LARGEST_NUMBER)
    return numbers


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
        raise SceneError(f"{where}: sun elevation {sun.elevation:g}, expected more than 0 and up to 90 degrees")
    if not 0.9 < sun.distance < 1.1:
        raise SceneError(f"{where}: distance to the sun {sun.distance:g}, expected 0.98 to 1.02 astronomical units")
    return sun


def find_sun(path: Path, tags: Mapping[str, str], table: Mapping[str, Sun]) -> Sun:
    """Return a scene's sun: from the CSV, else its tags, else its _MTL.txt, else its name, else 45 degrees.

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
            return make_sun(values["SUN_ELEVATION"], values.get("EARTH_SUN_DISTANCE", DEFAULT_DISTANCE), where)
    taken = read_name(path.name)
    if taken:
        return sun_of(taken)
    warn(
        f"{path}: no sun elevation in its tags, {sidecar.name} or the CSV of --sun, and no date in its name as "
        f"in LE07_140041_20051012; {DEFAULT_SUN:g} degrees assumed, which scales its reflectance by "
        "sin(elevation) / 0.707"
    )
    return Sun(DEFAULT_SUN, DEFAULT_DISTANCE, "assumed")


class Acquisition(NamedTuple):
    """Where and when a scene was taken: path and row of WRS-2, and the day."""

    path: int
    row: int
    day: datetime.date

    def orbit_angle(self) -> float:
        """Return the angle from the scene to the equator along the orbit, radians, positive in the north."""
        return 2 * math.pi * (EQUATOR_ROW - self.row) / ROWS

    def equator(self) -> float:
        """Return the longitude at which the path crosses the equator, degrees."""
        return FIRST_LONGITUDE - (self.path - 1) * 360 / PATHS

    def centre(self) -> tuple[float, float]:
        """Return longitude and latitude of the scene's centre, degrees, to about half a degree."""
        angle = self.orbit_angle()
        latitude = math.degrees(math.asin(math.sin(INCLINATION) * math.sin(angle)))
        along = math.degrees(math.atan(-math.cos(INCLINATION) * math.tan(angle)))
        turned = 15 * PERIOD * angle / (2 * math.pi)  # degrees by which Earth turns from here to the equator
        return (self.equator() + along + turned + 180) % 360 - 180, latitude


def read_name(name: str) -> Acquisition | None:
    """Return what a name such as LE07_140041_20051012 says, None where it says nothing of the kind."""
    found = SCENE_NAME.search(name)
    if not found:
        return None
    path, row, year, month, day = map(int, found.groups())
    try:
        return Acquisition(path, row, datetime.date(year, month, day))
    except ValueError:
        return None


def sun_of(taken: Acquisition) -> Sun:
    """Return the sun over a scene's centre when Landsat 7 passed, to about two degrees.

    Declination and equation of time by their usual first terms; distance as in Chander et al. (2009).
    """
    longitude, latitude = taken.centre()
    before = PERIOD * taken.orbit_angle() / (2 * math.pi)  # hours until the equator is crossed
    local = CROSSING - before + (longitude - taken.equator()) / 15  # mean solar time of the place
    number = taken.day.timetuple().tm_yday
    declination = math.radians(-23.44) * math.cos(2 * math.pi * (number + 10) / 365)
    turn = 2 * math.pi * (number - 81) / 364
    minutes = 9.87 * math.sin(2 * turn) - 7.53 * math.cos(turn) - 1.5 * math.sin(turn)
    hour_angle = math.radians(15 * (local + minutes / 60 - 12))
    north = math.radians(latitude)
    height = math.sin(north) * math.sin(declination)
    height += math.cos(north) * math.cos(declination) * math.cos(hour_angle)
    distance = 1 - 0.01672 * math.cos(math.radians(0.9856 * (number - 4)))
    return Sun(math.degrees(math.asin(height)), distance, "date and place in its name")
