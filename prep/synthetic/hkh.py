"""Synthetic HKH data in the real one's format: `python -m prep sample --like hkh`.

The ground is that of `prep.synthetic.scenes`; a Landsat 7 with a broken scan-line corrector looks at it: 15
channels of digital numbers, stripes without data, slanted scene borders, and the class outlines as polygons.
Snow saturates the visible bands, as it does in low gain. No real data is read or copied.
"""

from __future__ import annotations

from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import rasterio.features
from affine import Affine
from rasterio.crs import CRS
from shapely.geometry import shape

from prep.hkh.landsat7 import CALIBRATIONS, EXPORT_15, K1, K2, LARGEST_NUMBER, SMALLEST_NUMBER
from prep.synthetic.scenes import DEBRIS, GLACIER, PIXEL, SMALLEST_SIZE, Scene, make_scene, slope
from solution import InputError

SCENES_FOLDER = "scenes"
LABELS_FILE = "labels/HKH_CIDC_5basins_all.shp"
COLUMN = "Glaciers"
VALUES = {GLACIER: "Clean ice", DEBRIS: "Debris covered"}
SCENE_SEED = 1000  # added to the seed, so that the tiles of a competition sample with the same one differ

UTM_ZONES = (32643, 32644, 32645)  # EPSG; scenes take turns
ORIGIN = (500_000.0, 3_500_000.0)  # m, corner of the first scene of a zone, on its central meridian
GAP = 4  # scenes of a zone lie this many of their sides apart

# SLC-off: gaps repeat every 33 rows or so and reach 14 px at the edges of the scene, none in its middle:
# 22 % of a scene are lost (USGS, Landsat 7 data users handbook, LSDS-1927); lines are tilted by 8 to 9
# degrees.
STRIPE_PERIOD = 33.0
WIDEST_STRIPE = 14.0
TILT = np.tan(np.radians(8.5))
BORDER = 0.06  # share of the width that the slanted border takes at the top left and bottom right
THERMAL_SHIFT = 1  # px by which the thermal gaps lie lower: it has its own detectors
SWIR2_SHARE, NIR_SHARE = 0.8, 0.95  # of SWIR-1 and red, roughly those of snow and rock


def write_hkh_sample(out: Path, scenes: int, size: int, seed: int) -> list[Path]:
    """Write synthetic scenes and the polygons of all of them; return the scenes' paths.

    Args:
        out: new or empty folder; it gets scenes/<name>.tif and labels/HKH_CIDC_5basins_all.shp.
        scenes: how many; neighbours lie in different UTM zones.
        size: side of a scene in pixels, at least 64.
        seed: the same seed gives the same pixels and polygons.

    Raises:
        InputError: an option out of range, or a folder that holds something.
    """
    out = Path(out)
    if scenes < 1 or size < SMALLEST_SIZE or seed < 0:
        raise InputError(
            f"found {scenes} scenes of {size} px with seed {seed}, expected 1 or more of at least "
            f"{SMALLEST_SIZE} px and a seed of 0 or more"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: not empty, expected a new or empty folder; name another or remove this one")
    (out / SCENES_FOLDER).mkdir(parents=True)
    (out / LABELS_FILE).parent.mkdir()
    paths, outlines = [], []
    for index in range(scenes):
        scene = make_scene(SCENE_SEED + seed, size, index)
        crs, transform = place(index, size)
        paths.append(out / SCENES_FOLDER / f"LE07_{140 + index:03d}041_2005.tif")
        write_scene(paths[-1], scene, crs, transform, np.random.default_rng([seed, index, 7]))
        outlines.append(outline(scene.classes, crs, transform))
    table = geopandas.GeoDataFrame(pd.concat(outlines, ignore_index=True), crs="EPSG:4326")
    table.to_file(out / LABELS_FILE)
    return paths


def place(index: int, size: int) -> tuple[CRS, Affine]:
    """Return a scene's coordinate system and the transform from (col, row) to it."""
    zone, number = UTM_ZONES[index % len(UTM_ZONES)], index // len(UTM_ZONES)
    north = ORIGIN[1] + number * GAP * size * PIXEL
    return CRS.from_epsg(zone), Affine(PIXEL, 0, ORIGIN[0], 0, -PIXEL, north)


def outline(classes: np.ndarray, crs: CRS, transform: Affine) -> geopandas.GeoDataFrame:
    """Return the glaciers of a scene as polygons in EPSG:4326 with the column `Glaciers`; no lakes."""
    marked = np.isin(classes, list(VALUES))
    found = rasterio.features.shapes(classes, mask=marked, transform=transform)
    polygons = [(shape(outline), VALUES[int(value)]) for outline, value in found]
    columns = {COLUMN: [value for _, value in polygons]}
    table = geopandas.GeoDataFrame(columns, geometry=[polygon for polygon, _ in polygons], crs=crs.to_wkt())
    return table.to_crs("EPSG:4326")


def write_scene(path: Path, scene: Scene, crs: CRS, transform: Affine, random: np.random.Generator) -> None:
    """Write a scene as an 8-bit GeoTIFF with described bands and the sun's elevation in its tags."""
    channels = make_channels(scene, random)
    profile = {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": len(EXPORT_15),
        "height": channels.shape[1],
        "width": channels.shape[2],
        "crs": crs,
        "transform": transform,
        "compress": "lzw",
        "tiled": True,
    }
    with rasterio.open(path, "w", **profile) as file:
        file.write(channels)
        file.descriptions = EXPORT_15
        file.update_tags(SUN_ELEVATION=f"{scene.parameters.sun_elevation:.6f}")


def make_channels(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """Return the 15 channels of a scene, (15, H, W) uint8, 0 where there is no data."""
    blue, green, red, swir, kelvin = np.moveaxis(scene.bands.astype(np.float64), -1, 0)
    sun = scene.parameters.sun_elevation
    numbers = {
        "B1": to_number(from_reflectance(blue, "B1", sun), "B1"),
        "B2": to_number(from_reflectance(green, "B2", sun), "B2"),
        "B3": to_number(from_reflectance(red, "B3", sun), "B3"),
        "B5": to_number(from_reflectance(swir, "B5", sun), "B5"),
        "B6_VCID_1": to_number(K1 / np.expm1(K2 / kelvin), "B6_VCID_1"),
        "B6_VCID_2": to_number(K1 / np.expm1(K2 / kelvin), "B6_VCID_2"),
        "B4": fill(NIR_SHARE * 200 * red),
        "B7": fill(SWIR2_SHARE * 400 * swir),
        "B8": fill(200 * (green + red) / 2),
        "BQA": fill(np.full(red.shape, 32.0)),
        "NDVI": index_number(NIR_SHARE * red, red),
        "NDSI": index_number(green, swir),
        "NDWI": index_number(green, NIR_SHARE * red),
        "elevation": fill(scene.elevation.astype(np.float64) / 32),
        "slope": fill(np.degrees(np.arctan(slope(scene.elevation.astype(np.float64))))),
    }
    channels = np.stack([numbers[name] for name in EXPORT_15])
    height, width = red.shape
    gaps = missing_lines(height, width, phase=random.uniform(0, STRIPE_PERIOD))
    thermal = np.isin(EXPORT_15, ("B6_VCID_1", "B6_VCID_2"))
    channels[~thermal] *= ~gaps
    channels[thermal] *= ~np.roll(gaps, THERMAL_SHIFT, axis=0)
    return channels * ~beyond_border(height, width)


def from_reflectance(reflectance: np.ndarray, channel: str, sun_elevation: float) -> np.ndarray:
    """Return the radiance, W/(m2 sr um), that `prep.hkh.landsat7.to_reflectance` takes back at distance 1."""
    return reflectance * CALIBRATIONS[channel].irradiance() * np.sin(np.radians(sun_elevation)) / np.pi


def to_number(radiance: np.ndarray, channel: str) -> np.ndarray:
    """Return radiance as the nearest digital number, uint8, saturated at 1 and 255; NaN becomes 0."""
    calibration = CALIBRATIONS[channel]
    share = (radiance - calibration.lmin) / (calibration.lmax - calibration.lmin)
    return fill(share * (LARGEST_NUMBER - SMALLEST_NUMBER) + SMALLEST_NUMBER)


def fill(values: np.ndarray) -> np.ndarray:
    """Return values rounded to 1 ... 255, uint8, 0 where NaN."""
    whole = np.clip(np.round(values), SMALLEST_NUMBER, LARGEST_NUMBER)
    return np.nan_to_num(whole, nan=0).astype(np.uint8)


def index_number(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the normalised difference of two bands, -1 ... 1 as 1 ... 255, uint8."""
    total = np.where(np.abs(a + b) > 1e-6, a + b, np.nan)
    return fill(128 + 127 * np.clip((a - b) / total, -1, 1))


def missing_lines(height: int, width: int, phase: float) -> np.ndarray:
    """Return the gaps of a scan-line corrector that is off, (H, W) bool: wedges, widest at both sides."""
    rows, cols = np.mgrid[:height, :width]
    along = (rows + cols * TILT + phase) % STRIPE_PERIOD
    return along < WIDEST_STRIPE * np.abs(2 * (cols + 0.5) / width - 1)


def beyond_border(height: int, width: int) -> np.ndarray:
    """Return what lies beyond the slanted borders of the scene, (H, W) bool."""
    rows, cols = np.mgrid[:height, :width]
    left = BORDER * width * (1 - rows / height)
    right = width - BORDER * width * rows / height
    return (cols < left) | (cols > right)
