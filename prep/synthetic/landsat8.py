"""Synthetic Landsat 8 products as USGS delivers them: all files of a Collection-2 Level-2 scene of any size.

One synthetic scene is repeated as its mirror images, since a scene's relief takes long to carve. Clouds lie where
the scene's own mask is; the corners are fill, as of every scene along an inclined orbit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.windows import Window

from prep.files import write_text
from prep.synthetic.scenes import GRID_ORIGIN, PIXEL, UTM_ZONE_43N, make_scene, to_numbers
from solution import InputError

PRODUCT = "LC08_L2SP_147037_20200914_20200919_02_T1"  # Zanskar, in the naming of USGS
PATTERN = 512  # px, side of the scene that is repeated
ROWS = 512  # written at once
INCLINATION = 0.12  # columns a row by which the edge of the data wanders, as of Landsat's orbit at 33 N
CLEAR, FILL, CLOUD, SHADOW = 21824, 1, 22280, 23888  # QA_PIXEL as USGS writes them for Landsat 8
CLOUD_NUMBER, COLD_NUMBER = 42000, 24000  # of a cloud in the reflective bands and in the thermal one
# Each file's band among the five of a scene: those that a scene lacks look like their neighbours.
FILES = {"SR_B1": 0, "SR_B2": 0, "SR_B3": 1, "SR_B4": 2, "SR_B5": 2, "SR_B6": 3, "SR_B7": 3, "ST_B10": 4}
THERMAL = 4
MTL = """GROUP = LANDSAT_METADATA_FILE
  GROUP = PRODUCT_CONTENTS
    LANDSAT_PRODUCT_ID = "{product}"
    PROCESSING_LEVEL = "L2SP"
    COLLECTION_NUMBER = 02
    COLLECTION_CATEGORY = "T1"
  END_GROUP = PRODUCT_CONTENTS
  GROUP = IMAGE_ATTRIBUTES
    SPACECRAFT_ID = "LANDSAT_8"
    SENSOR_ID = "OLI_TIRS"
    WRS_PATH = 147
    WRS_ROW = 37
    DATE_ACQUIRED = 2020-09-14
    SUN_AZIMUTH = 145.20
    SUN_ELEVATION = 52.75
    CLOUD_COVER = {cloud:.2f}
  END_GROUP = IMAGE_ATTRIBUTES
  GROUP = LEVEL2_SURFACE_REFLECTANCE_PARAMETERS
    REFLECTANCE_MULT_BAND_2 = 2.75e-05
    REFLECTANCE_ADD_BAND_2 = -0.2
  END_GROUP = LEVEL2_SURFACE_REFLECTANCE_PARAMETERS
  GROUP = LEVEL2_SURFACE_TEMPERATURE_PARAMETERS
    TEMPERATURE_MULT_BAND_ST_B10 = 0.00341802
    TEMPERATURE_ADD_BAND_ST_B10 = 149.0
  END_GROUP = LEVEL2_SURFACE_TEMPERATURE_PARAMETERS
END_GROUP = LANDSAT_METADATA_FILE
END
"""


def write_product(out: Path, height: int, width: int, seed: int = 0, pattern: int = PATTERN) -> Path:
    """Write a product of height x width px into `out`/<product id> and return that folder.

    It repeats a scene of `pattern` px; the same seed gives the same pixels. Raises InputError for a side of less
    than a pixel, or as `make_scene` does.
    """
    if min(height, width) < 1:
        raise InputError(f"found {width} x {height} px, expected a pixel at least")
    folder = out / PRODUCT
    folder.mkdir(parents=True, exist_ok=True)
    scene = make_scene(seed, pattern)
    numbers, clouded = to_numbers(scene.bands), np.isnan(scene.bands).all(axis=-1)
    numbers[clouded] = [CLOUD_NUMBER] * THERMAL + [COLD_NUMBER]
    quality = np.where(clouded, np.where(np.arange(pattern) % 64 < 12, SHADOW, CLOUD), CLEAR)
    for name, band in FILES.items():
        _write(folder / f"{PRODUCT}_{name}.TIF", numbers[..., band], (height, width), 0)
    _write(folder / f"{PRODUCT}_QA_PIXEL.TIF", quality, (height, width), FILL)
    _write(folder / f"{PRODUCT}_QA_RADSAT.TIF", np.zeros_like(quality), (height, width), 0)
    write_text(folder / f"{PRODUCT}_MTL.txt", MTL.format(product=PRODUCT, cloud=100 * clouded.mean()))
    return folder


def _write(path: Path, pattern: np.ndarray, shape: tuple[int, int], fill: int) -> None:
    """Write a file of a product: the pattern and its mirror images, with fill beyond the inclined edges."""
    height, width = shape
    mirrored = np.block([[pattern, pattern[:, ::-1]], [pattern[::-1], pattern[::-1, ::-1]]])
    columns = np.arange(width)
    place = Affine(PIXEL, 0, GRID_ORIGIN[0], 0, -PIXEL, GRID_ORIGIN[1])
    grid = {
        "width": width,
        "height": height,
        "crs": f"EPSG:{UTM_ZONE_43N}",
        "transform": place,
        "nodata": fill,
    }
    packed = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "predictor": 2}
    with rasterio.open(path, "w", driver="GTiff", count=1, dtype="uint16", **grid, **packed) as raster:
        for top in range(0, height, ROWS):
            rows = np.arange(top, min(top + ROWS, height))
            values = mirrored[rows % len(mirrored)][:, columns % mirrored.shape[1]].astype(np.uint16)
            left = (INCLINATION * (height - rows))[:, None] * width / (width + height)
            right = width - (INCLINATION * rows)[:, None] * width / (width + height)
            values[(columns < left) | (columns >= right)] = fill
            raster.write(values, 1, window=Window(0, top, width, len(rows)))
