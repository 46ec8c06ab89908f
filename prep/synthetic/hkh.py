"""Synthetic HKH data in the real one's formats: `python -m prep sample --like hkh`.

The ground is that of `prep.synthetic.scenes`; a Landsat 7 with a broken scan-line corrector looks at it: 15
channels of digital numbers. Three layouts, as they are published:

- release: 8-bit scenes with stripes, and one shapefile with a column of kinds;
- lila: float32 scenes whose gaps are filled, as Earth Engine exported them, with clean.shp, debris.shp,
  Glacier_2005.shp and the region's border;
- patches: float32 arrays of 15 channels, masks, and the slices.geojson with the faults of the published one.

Snow saturates the visible bands, as it does in low gain. No real data is read or copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

import geopandas
import numpy as np
import pandas as pd
import rasterio.features
import shapely
from affine import Affine
from rasterio.crs import CRS

from prep.hkh.landsat7 import EXPORT_15, IRRADIANCES, K1, K2, LARGEST_NUMBER, RADIANCES, SMALLEST_NUMBER
from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from prep.synthetic.scenes import DEBRIS, GLACIER, PIXEL, SMALLEST_SIZE, Scene, make_scene, slope
from solution import InputError

LAYOUTS = ("release", "lila", "patches")
SCENES_FOLDER, PATCHES_FOLDER = "scenes", "patches"
LABELS_FILE = "labels/HKH_CIDC_5basins_all.shp"
COLUMN = "Glaciers"
VALUES = {GLACIER: "Clean ice", DEBRIS: "Debris covered"}
PUBLISHED_ORDER = ("clean", "debris")
STEP_BACK = 6  # px that neighbouring patches share
SCENE_SEED = 1000  # added to the seed, so that the tiles of a competition sample with the same one differ
UNKNOWN_FROM, REGION_TO = (
    0.7,
    0.85,
)  # shares of the height and the width: kinds unknown below, region to the left

UTM_ZONES = (32643, 32644, 32645)  # EPSG; scenes take turns
NAMES = ("LE07_148037_20071127", "LE07_144039_20011013", "LE07_140041_20071221")  # real ones of these zones
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
FILL_GAIN, FILL_NOISE = 1.04, 3.0  # what a gap is filled with is a little off, and no whole number


def write_hkh_sample(
    out: Path,
    scenes: int,
    size: int,
    seed: int,
    layout: str = "release",
    side: int = 512,
    order: Sequence[str] = PUBLISHED_ORDER,
) -> list[Path]:
    """Write synthetic scenes and their labels; return the scenes' paths, or the patches' images.

    Args:
        out: new or empty folder; it gets scenes/ and labels/, or patches/.
        scenes: how many; neighbours lie in different UTM zones.
        size: side of a scene in pixels, at least 64.
        seed: the same seed gives the same pixels and outlines.
        layout: of `LAYOUTS`.
        side: of a patch, px.
        order: of the channels of a patch's mask.

    Raises:
        InputError: an option out of range, or a folder that holds something.
    """
    out = Path(out)
    if scenes < 1 or size < SMALLEST_SIZE or seed < 0 or (layout == "patches" and side > size):
        raise InputError(
            f"found {scenes} scenes of {size} px with seed {seed}, expected 1 or more of at least "
            f"{SMALLEST_SIZE} px, patches of at most that, and a seed of 0 or more"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: not empty, expected a new or empty folder; name another or remove this one")
    for folder in (PATCHES_FOLDER,) if layout == "patches" else (SCENES_FOLDER, "labels"):
        (out / folder).mkdir(parents=True)
    paths: list[Path] = []
    labels: list[dict[str, geopandas.GeoDataFrame]] = []
    for index in range(scenes):
        scene = make_scene(SCENE_SEED + seed, size, index)
        crs, transform = place(index, size)
        random = np.random.default_rng([seed, index, 7])
        if layout == "release":
            paths.append(out / SCENES_FOLDER / f"LE07_{140 + index:03d}041_2005.tif")
            tags = {"SUN_ELEVATION": f"{scene.parameters.sun_elevation:.6f}"}
            write_scene(paths[-1], striped(make_channels(scene), random), crs, transform, tags)
            labels.append({LABELS_FILE: outlines(scene.classes, crs, transform, VALUES)})
            continue
        image, codes = gap_filled(make_channels(scene), random), published_codes(scene.classes)
        if layout == "lila":
            paths.append(out / SCENES_FOLDER / f"{scene_name(index)}.tif")
            write_scene(paths[-1], image, crs, transform, {})
            labels.append(published_outlines(scene.classes, codes, crs, transform))
        else:
            images = write_patches(out / PATCHES_FOLDER, index, image, mask_channels(codes, order), side)
            labels.append({f"{PATCHES_FOLDER}/slices.geojson": patch_places(index, size, side, images)})
            paths += images
    for name in labels[0]:
        write_together([of_scene[name] for of_scene in labels], out / name)
    return paths


def write_together(tables: list[geopandas.GeoDataFrame], path: Path) -> None:
    """Write the tables of all scenes as one file."""
    table = geopandas.GeoDataFrame(pd.concat(tables, ignore_index=True), crs=tables[0].crs)
    table.to_file(path)


def scene_name(index: int) -> str:
    """Return a name such as the real ones have, with a year of its own for each scene of a zone."""
    name = NAMES[index % len(NAMES)]
    return f"{name[:12]}{int(name[12:16]) + index // len(NAMES)}{name[16:]}"


def place(index: int, size: int) -> tuple[CRS, Affine]:
    """Return a scene's coordinate system and the transform from (col, row) to it."""
    zone, number = UTM_ZONES[index % len(UTM_ZONES)], index // len(UTM_ZONES)
    north = ORIGIN[1] + number * GAP * size * PIXEL
    return CRS.from_epsg(zone), Affine(PIXEL, 0, ORIGIN[0], 0, -PIXEL, north)


# --- Labels ---------------------------------------------------------------------------------------


def published_codes(classes: np.ndarray) -> np.ndarray:
    """Return the label codes of a scene in the layouts of LILA, (H, W) uint8: all that its labels tell.

    Below 70 % of the height only the extent of a glacier is mapped; beyond 85 % of the width nothing is.
    """
    glacier = np.isin(classes, list(VALUES))
    codes = np.where(glacier, classes, OTHER_OR_LAKE).astype(np.uint8)
    lower = codes[int(UNKNOWN_FROM * len(codes)) :]
    lower[lower != OTHER_OR_LAKE] = GLACIER_OR_DEBRIS
    codes[:, int(REGION_TO * codes.shape[1]) :] = IGNORE
    return codes


def mask_channels(codes: np.ndarray, order: Sequence[str]) -> np.ndarray:
    """Return the channels of a mask, (H, W, C) uint8, of clean, debris, any and region in this order."""
    channels = {
        "clean": codes == GLACIER,
        "debris": codes == DEBRIS,
        "any": np.isin(codes, (GLACIER, DEBRIS, GLACIER_OR_DEBRIS)),
        "region": codes != IGNORE,
    }
    return np.stack([channels[name] for name in order], axis=-1).astype(np.uint8)


def published_outlines(
    classes: np.ndarray, codes: np.ndarray, crs: CRS, transform: Affine
) -> dict[str, geopandas.GeoDataFrame]:
    """Return the outlines of a scene by the name of their file: kinds, extents of all glaciers, and border."""
    extent = np.isin(codes, (GLACIER, DEBRIS, GLACIER_OR_DEBRIS)).astype(np.uint8)
    return {
        "labels/clean.shp": outlines(codes, crs, transform, {GLACIER: "Clean ice"}),
        "labels/debris.shp": outlines(codes, crs, transform, {DEBRIS: "Debris covered"}),
        "labels/Glacier_2005.shp": outlines(extent, crs, transform, {1: "glacier"}, "Name"),
        "labels/hkh.shp": outlines((codes != IGNORE).astype(np.uint8), crs, transform, {1: "HKH"}, "Name"),
    }


def outlines(
    values: np.ndarray, crs: CRS, transform: Affine, names: dict[int, str], column: str = COLUMN
) -> geopandas.GeoDataFrame:
    """Return the areas of some values as polygons in EPSG:4326 with a column of their names."""
    found = list(rasterio.features.shapes(values, np.isin(values, list(names)), transform=transform))
    areas = [shapely.segmentize(shapely.geometry.shape(area), 20 * PIXEL) for area, _ in found]
    table = {column: [names[int(value)] for _, value in found]}
    return geopandas.GeoDataFrame(table, geometry=areas, crs=crs.to_wkt()).to_crs("EPSG:4326")


# --- Patches --------------------------------------------------------------------------------------


def write_patches(folder: Path, index: int, image: np.ndarray, masks: np.ndarray, side: int) -> list[Path]:
    """Write a scene's patches from the top left on, row by row, and their masks; return the images."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (side, side), axis=(1, 2))
    labels = np.lib.stride_tricks.sliding_window_view(masks, (side, side), axis=(0, 1))
    step = side - STEP_BACK
    count, paths = 0, []
    for row in range(0, windows.shape[1], step):
        for col in range(0, windows.shape[2], step):
            paths.append(folder / f"slice_{index}_img_{count:03d}.npy")
            np.save(paths[-1], np.moveaxis(windows[:, row, col], 0, -1).copy())
            mask = np.moveaxis(labels[row, col], 0, -1).copy()
            np.save(folder / f"slice_{index}_mask_{count:03d}.npy", mask)
            count += 1
    return paths


def patch_places(index: int, size: int, side: int, images: Sequence[Path]) -> geopandas.GeoDataFrame:
    """Return the slices.geojson of a scene's patches, with its two faults.

    Outlines are counted from the bottom of the scene and patches from its top; and all scenes are said to be in
    the UTM zone of the first.
    """
    transform = place(index, size)[1]
    west, north = transform * (0, 0)
    east, south = transform * (size, size)
    xs, ys = np.linspace(west, east, size), np.linspace(south, north, size)
    corners = np.arange(0, size, side - STEP_BACK)
    boxes = [
        shapely.box(xs[left], ys[low], xs[right], ys[high])
        for low, high in zip(corners, corners[1:])
        for left, right in zip(corners, corners[1:])
    ]
    columns = {
        "img_source": [f"/datadrive/glaciers/unique_tiles/{scene_name(index)}.tif"] * len(images),
        "mask_source": [f"/datadrive/glaciers/processed/masks/mask_{index:02d}.npy"] * len(images),
        "img_slice": [f"/datadrive/glaciers/processed/slices/{path.name}" for path in images],
        "mask_slice": [f"/datadrive/glaciers/processed/slices/{mask_of(path).name}" for path in images],
        "img_mean": [float(np.nan_to_num(np.load(path)).mean()) for path in images],
    }
    means = np.array([np.load(mask_of(path)).mean(axis=(0, 1)) for path in images])
    columns |= {f"mask_mean_{channel}": means[:, channel] for channel in range(means.shape[1])}
    return geopandas.GeoDataFrame(columns, geometry=boxes[: len(images)], crs=f"EPSG:{UTM_ZONES[0]}")


def mask_of(image: Path) -> Path:
    """Return the path of the mask that belongs to a patch's image."""
    return image.with_name(image.name.replace("img", "mask"))


# --- Scenes ---------------------------------------------------------------------------------------


def write_scene(path: Path, channels: np.ndarray, crs: CRS, transform: Affine, tags: dict[str, str]) -> None:
    """Write a scene as a GeoTIFF with described bands."""
    profile = {
        "driver": "GTiff",
        "dtype": channels.dtype,
        "count": len(channels),
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
        file.update_tags(**tags)


def make_channels(scene: Scene) -> np.ndarray:
    """Return the 15 channels of a scene without gaps, (15, H, W) uint8, 0 where there is no data."""
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
    return channels * ~beyond_border(*red.shape)


def gaps_of(channels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return what a scan-line corrector that is off leaves out of each channel, (15, H, W) bool."""
    height, width = channels.shape[1:]
    gaps = missing_lines(height, width, phase=random.uniform(0, STRIPE_PERIOD))
    thermal = np.roll(gaps, THERMAL_SHIFT, axis=0)
    return np.stack([thermal if name.startswith("B6") else gaps for name in EXPORT_15])


def striped(channels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return channels with 0 in the gaps, uint8."""
    return channels * ~gaps_of(channels, random)


def gap_filled(channels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return channels whose gaps are filled from another year, float32, some values beyond 0 to 255; NaN outside."""
    values = channels.astype(np.float32)
    predicted = FILL_GAIN * values + random.normal(0, FILL_NOISE, values.shape)
    values = np.where(gaps_of(channels, random), predicted, values)
    values[:, (channels == 0).any(axis=0)] = np.nan
    return values.astype(np.float32)


def from_reflectance(reflectance: np.ndarray, channel: str, sun_elevation: float) -> np.ndarray:
    """Return the radiance, W/(m2 sr um), that `prep.hkh.landsat7.to_reflectance` takes back at distance 1."""
    return reflectance * IRRADIANCES[channel] * np.sin(np.radians(sun_elevation)) / np.pi


def to_number(radiance: np.ndarray, channel: str) -> np.ndarray:
    """Return radiance as the nearest digital number, uint8, saturated at 1 and 255; NaN becomes 0."""
    least, most = RADIANCES[channel]
    share = (radiance - least) / (most - least)
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


def next_arguments(out: Path, layout: str) -> str:
    """Return the arguments with which `python -m prep hkh` reads a sample."""
    labels = out / "labels"
    return {
        "release": f"--scenes {out / SCENES_FOLDER} --labels {out / LABELS_FILE}",
        "lila": f"--scenes {out / SCENES_FOLDER} --labels {labels}/clean.shp {labels}/debris.shp "
        f"{labels}/Glacier_2005.shp --border {labels}/hkh.shp",
        "patches": f"--patches {out / PATCHES_FOLDER}",
    }[layout]
