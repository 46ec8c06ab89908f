"""Required packages: torch, torchvision, segmentation_models_pytorch, numpy, tifffile, opencv-python, tqdm

GlacierHack 2025: Landsat-8 tiles in, glacier masks out. Optional package: pydensecrf (dense CRF).

    python solution.py IN_DIR OUT_DIR                      one PNG a tile, stem of Band1's file
    python solution.py --data D --masks M --out O          one TIFF a tile, named exactly as in Band1
    python solution.py --imagepath D --output O            the same
    solution.maskgeration({"Band1": dir, ...}, second)     a dict {tile_id: uint8 (H, W) mask}

A data folder holds Band1 ... Band5 (blue, green, red, SWIR-1, thermal), one single-band TIFF a tile in each.
A mask holds 0 (other), 85 (glacier), 170 (debris-covered glacier) and 255 (glacial lake). The weights are
`model.pth`, named by --weights or found beside this file, in `weights/` or in the working folder.

The file reads in the order in which data flows: domain, reading, units, networks, weights, passes, post-
processing, writing, one run over a folder, and the doors for its callers.
"""

import time

STARTED = time.perf_counter()  # before the slow imports, which a time budget has to count

import argparse
import copy
import inspect
import lzma
import math
import os
import re
import sys
import tempfile
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
)

# Read when torch is loaded: waiting threads sleep. On cores shared with other work, threads that spin instead
# make a pass several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import tifffile
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from tqdm import tqdm

try:  # not among the grader's packages
    import pydensecrf.densecrf as densecrf
except ImportError:
    densecrf = None

# --- The domain -----------------------------------------------------------------------------------


class Band(NamedTuple):
    """One input band; `scale` and `offset` turn a stored value into `unit`."""

    folder: str
    landsat: str
    name: str
    unit: str
    scale: float
    offset: float


# Landsat Collection-2 Level-2 scale factors (USGS Landsat 8-9 Collection 2 Level 2 Science Product Guide,
# LSDS-1619).
BANDS = (
    Band("Band1", "B2", "blue", "reflectance", 2.75e-5, -0.2),
    Band("Band2", "B3", "green", "reflectance", 2.75e-5, -0.2),
    Band("Band3", "B4", "red", "reflectance", 2.75e-5, -0.2),
    Band("Band4", "B6", "SWIR-1", "reflectance", 2.75e-5, -0.2),
    Band("Band5", "B10", "thermal", "kelvin", 0.00341802, 149.0),
)
CLASS_NAMES = ("other", "glacier", "debris", "lake")
CLASS_VALUES = (0, 85, 170, 255)
GREEN, SWIR, THERMAL = 1, 3, 4  # in BANDS
# Maps that a network can be given besides the bands; see DerivedInputs.
DERIVED_INPUTS = ("ndsi", "temperature_anomaly", "nodata_distance")
DARKEST_SUM = 0.05  # of two reflectances: below, their quotient is mostly noise and is damped
LEAST_PROBABILITY = 1e-9  # whose logarithm is a logit
NODATA_REACH = 32  # px, further away the distance to nodata is the same
# Features of a pixel for trees; see pixel_features and BoostedTrees.
LEAST_REFLECTANCE = 0.01  # sum of two bands below which their quotient is no feature of a pixel
STATISTICS_WINDOWS = (3, 9, 17, 33, 65)  # px, sides of the windows of local statistics: 90 m to 2 km
PIXEL_FEATURES = len(BANDS) + 2 + len(STATISTICS_WINDOWS) * (1 + 3 * len(BANDS))
SLOPE_WINDOWS = (9, 17, 33)  # px, of local means whose differences to both sides tell which way a slope faces
SLOPE_BANDS = (2, 3, 4)  # red, SWIR-1, thermal
SLOPE_FEATURES = 2 * len(SLOPE_WINDOWS) * len(SLOPE_BANDS)
RANGE_BANDS = (3, 4)  # SWIR-1 and thermal, of which a pixel is placed between the extremes around it
MOST_DEVIATIONS = 6.0  # a feature further from its mean counts as so far
SIGHT = max(STATISTICS_WINDOWS[-1] // 2, SLOPE_WINDOWS[-1])  # px around a pixel that its features depend on
ROWS_AT_ONCE = 64  # of a tile, for which PixelNet holds features and layers in memory
PIXELS_AT_ONCE = 32768  # their places among the thresholds stay in the cache
FLOAT32_BIAS, FLOAT32_FRACTION = 127, 23  # 2^n has the exponent n + 127, behind 23 bits of fraction
GLACIER_GROUP = (1, 2)  # glacier of either kind, which the labels know best,
REST_GROUP = (0, 3)  # and what is none

STRIDE = 32  # the coarsest feature map of the encoders: image sides are padded to a multiple of it
LARGEST_TILE = 1024  # px; larger images are processed in windows
WINDOW = 512  # px, the size of the training tiles
OVERLAP = 128  # px shared by neighbouring windows, where their probabilities are blended
DEFAULT_SHAPE = (512, 512)  # of the mask for a tile of which no band can be read
JUST_IMPORTED = 30.0  # s after the import within which a call pays for it
SPARE_SECONDS = 1.0  # of a time budget, kept for the last mask and for leaving Python,
SPARE_PART = 0.03  # or this part of it, if that is more
MOST_WORKERS = 3  # threads side by side; more need more memory, and share their cores within a pass instead
WORTH_TIMING = 60  # passes in all; for fewer, finding out what is fastest costs more than it brings

TIFF_SUFFIXES = (".tif", ".tiff")
MOST_PIXELS = 100_000_000  # of a raster, more than a whole Landsat scene; a small file can declare far more
UNPACKERS: Dict[int, Callable[[], Any]] = {  # by compression
    8: zlib.decompressobj,
    32946: zlib.decompressobj,
    34925: lzma.LZMADecompressor,
}
HARMLESS_BYTES = 2**16  # of a packed strip or tile, which unpacks to no more than about a thousand times that
LARGEST_VALUE = 1e6  # stored values are below 65536; what is far above, or below 0, is some fill value
GDAL_NODATA_TAG = 42113
# Fill values in use for signed rasters. In an int16 file that was cast from uint16 they may also be the
# measurements 55537 and 32768, which are then lost: single pixels, against whole areas of fill.
SIGNED_FILL_VALUES = (-9999, -32768)
PLAUSIBLE_KELVIN = (180.0, 360.0)  # surface temperatures on Earth, with a margin

MODEL_FILE = "model.pth"
MODEL_FORMAT = "glacier-kit/2"
TIME_BUDGET_VARIABLE = "GLACIER_TIME_BUDGET"
EXPECTED_LAYOUT = (
    "expected a folder with Band1, Band2, Band3, Band4 and Band5 in it, each with one TIFF a tile that "
    "shares its tile id with the other bands (img001.tif everywhere, or B2_B2_masked_02_07.tif in Band1 and "
    "B10_B10_masked_02_07.tif in Band5)"
)

PathLike = Union[str, Path]
DataSource = Union[str, Path, Mapping[str, PathLike]]
Item = TypeVar("Item")
Result = TypeVar("Result")


class InputError(Exception):
    """The run cannot start: no tiles, no weights, or nowhere to write."""


class TileError(Exception):
    """One tile cannot be segmented; the message names file, finding, expectation and remedy."""


# --- Reading --------------------------------------------------------------------------------------


class TileFiles(NamedTuple):
    """The files of one tile. `name` is Band1's file name; `paths` has None where a band has no file."""

    tile_id: str
    name: str
    paths: Tuple[Optional[Path], ...]


def tile_id(filename: str) -> str:
    """Return the id that a tile's files share: "001" for img001.tif, "02_07" for B10_B10_masked_02_07.tif.

    These two are what the platform derives itself. For any other name the id is the stem without leading band
    names.
    """
    stem = Path(filename).stem
    numbered = re.search(r"img(\d+)$", stem, re.IGNORECASE)
    if numbered:
        return numbered.group(1)
    gridded = re.search(r"(\d\d_\d\d)$", stem)
    if gridded:
        return gridded.group(1)
    return re.sub(r"^(?:(?:B|Band)\d+_)+", "", stem, flags=re.IGNORECASE)


def band_number(name: str) -> Optional[int]:
    """Return 1 to 5 for a name of a band ("Band4", "band_4", or Landsat's "B6"), else None."""
    numbered = re.fullmatch(r"band[ _-]?(\d+)", name, re.IGNORECASE)
    if numbered and 1 <= int(numbered.group(1)) <= len(BANDS):
        return int(numbered.group(1))
    landsat_names = [band.landsat for band in BANDS]
    return landsat_names.index(name.upper()) + 1 if name.upper() in landsat_names else None


def band_folders(data: DataSource) -> Dict[int, Path]:
    """Return {band number: folder} for a data folder or a mapping of band names to folders.

    Raises:
        InputError: the folder does not exist or holds no band folder.
    """
    try:
        named = named_folders(data)
    except (OSError, TypeError) as error:
        raise InputError(f"{data}: cannot be looked into ({error}); {EXPECTED_LAYOUT}") from error
    folders: Dict[int, Path] = {}
    for name, folder in named.items():
        number = band_number(name)
        if number and folders.setdefault(number, folder) != folder:
            warn(f"{folder}: not used, {folders[number]} is that band too; remove one of the two")
    if not folders:
        where = "the mapping given" if isinstance(data, Mapping) else str(data)
        found = ", ".join(sorted(named)[:10]) or "nothing"
        raise InputError(f"{where}: no band folders, found {found}; {EXPECTED_LAYOUT}")
    return folders


def named_folders(data: DataSource) -> Dict[str, Path]:
    """Return {name: folder} for the entries of a mapping, or for the folders in a data folder."""
    if isinstance(data, Mapping):
        return {str(name): Path(folder) for name, folder in data.items()}
    if not os.path.isdir(data):
        raise InputError(f"{data}: no such folder; {EXPECTED_LAYOUT}")
    return {entry.name: entry for entry in sorted(Path(data).iterdir()) if os.path.isdir(entry)}


def list_band(folder: Path) -> Dict[str, Path]:
    """Return {tile id: file} for the TIFFs of one band folder; one that cannot be looked into has none."""
    try:
        entries = sorted(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        warn(f"{folder}: cannot be looked into ({error.strerror}); make it readable")
        entries = []
    files: Dict[str, Path] = {}
    for path in entries:
        if path.suffix.lower() not in TIFF_SUFFIXES or path.name.startswith("."):
            continue
        first = files.setdefault(tile_id(path.name), path)
        if first != path:
            warn(f"{path}: has the tile id of {first.name}, which is used; rename or remove one of the two")
    return files


def find_tiles(data: DataSource) -> List[TileFiles]:
    """Return the tiles of all band folders, sorted by tile id; a tile that lacks some band is listed too.

    Raises:
        InputError: there are no band folders or no tiles in them.
    """
    folders = band_folders(data)
    bands = [list_band(folders[number]) if number in folders else {} for number in range(1, len(BANDS) + 1)]
    tiles = []
    for identifier in sorted(set().union(*bands)):
        paths = tuple(band.get(identifier) for band in bands)
        reference = next(path for path in paths if path is not None)
        tiles.append(TileFiles(identifier, reference.name, paths))
    if not tiles:
        looked = ", ".join(str(folder) for folder in folders.values())
        raise InputError(f"no TIFF in {looked}; {EXPECTED_LAYOUT}")
    return tiles


def decode_tiff(path: Path) -> Tuple[np.ndarray, Optional[float]]:
    """Return a TIFF's first page and its declared nodata value.

    Raises:
        TileError: the file cannot be read as a TIFF, or is too large.
    """
    size = os.path.getsize(path) if os.path.isfile(path) else "no"
    try:
        if size == "no":  # a pipe or a device would be read for ever
            raise ValueError("no file that can be reached")
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            assert isinstance(page, tifffile.TiffPage)  # as the first one always is
            refuse_bomb(page, path)
            tag = page.tags.get(GDAL_NODATA_TAG)
            return decode_page(page, path), parse_nodata(tag)
    except TileError:
        raise
    except Exception as error:  # a damaged TIFF may raise almost anything from within its decoder
        raise TileError(
            f"{path}: cannot be read as a TIFF ({size} bytes; {type(error).__name__}: {error}); "
            "copy or export the file again"
        ) from error


def refuse_bomb(page: tifffile.TiffPage, path: Path) -> None:
    """Raise TileError for a page that would take far more memory than its file leads one to expect."""
    height, width = page.imagelength, page.imagewidth
    if max(math.prod(page.shape), page.tilewidth * page.tilelength) > MOST_PIXELS:
        raise TileError(
            f"{path}: declares {width} x {height} px, expected {MOST_PIXELS:,} px or fewer; cut it into "
            "tiles or, if it is no scene of that size, copy or export the file again"
        )
    unpacker = UNPACKERS.get(int(page.compression))
    if unpacker is None:
        return
    most = 2 * page.nbytes + 2**24  # bytes; the last strip or tile may reach beyond the image
    for offset, count in zip(page.dataoffsets, page.databytecounts):
        if count > HARMLESS_BYTES:
            page.parent.filehandle.seek(offset)
            if len(unpacker().decompress(page.parent.filehandle.read(count), most + 1)) > most:
                raise TileError(
                    f"{path}: unpacks to more than its {width} x {height} px; copy or export the file again"
                )


def decode_page(page: tifffile.TiffPage, path: Path) -> np.ndarray:
    """Return a page's pixels, by OpenCV where tifffile lacks the codec (LZW without imagecodecs, for one)."""
    try:
        return page.asarray()
    except ValueError:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise
        return pixels


def parse_nodata(tag: Optional[tifffile.TiffTag]) -> Optional[float]:
    """Return the value of a GDAL_NODATA tag, None where it is absent or no number."""
    try:
        return float(str(tag.value).strip("\x00 ")) if tag else None
    except ValueError:
        return None


def read_raster(path: PathLike) -> np.ndarray:
    """Return one band as stored, (H, W) float32, NaN where nodata: 0, the declared nodata value, NaN,
    infinities and other numbers too large for a measurement.

    Landsat values are unsigned: negative int16 values are those above 32767 of a file that was cast to int16.

    Raises:
        TileError: no readable TIFF, not one band, or not a number type.
    """
    path = Path(path)
    pixels, declared = decode_tiff(path)
    if pixels.ndim == 3 and pixels.shape[0] == 1:
        pixels = pixels[0]
    elif pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 or pixels.size == 0 or pixels.dtype.kind not in "uif":
        raise TileError(
            f"{path}: found an array of shape {pixels.shape} and type {pixels.dtype}, expected one band "
            "(H, W) of integers or floats; split the bands into their own files"
        )
    nodata = (pixels == 0) | ~np.isfinite(pixels)
    if pixels.dtype.itemsize >= 4:
        nodata |= (pixels > LARGEST_VALUE) | (pixels < -LARGEST_VALUE)
    if declared is not None:
        nodata |= pixels == declared
    if pixels.dtype.kind == "i":
        nodata |= np.isin(pixels, SIGNED_FILL_VALUES)
    if pixels.dtype.kind == "i" and pixels.dtype.itemsize == 2:
        pixels = pixels.astype(np.int16).view(np.uint16)
    values = pixels.astype(np.float32)
    values[nodata] = np.nan
    return values


def read_tile(files: TileFiles) -> np.ndarray:
    """Return a tile in physical units, (H, W, 5) float32: reflectance in bands 1-4, kelvin in band 5, NaN
    where nodata.

    Raises:
        TileError: a band is missing or unreadable, or the bands differ in size.
    """
    missing = [band.folder for band, path in zip(BANDS, files.paths) if path is None]
    if missing:
        raise TileError(
            f"tile {files.tile_id}: no file in {', '.join(missing)} (it has {files.name}), expected one in "
            "each of the five bands; add the missing file or remove the tile"
        )
    paths = [path for path in files.paths if path is not None]
    first = read_raster(paths[0])
    image = np.empty(
        first.shape + (len(BANDS),), np.float32
    )  # filled band by band: a scene is never held twice
    for index, (band, path) in enumerate(zip(BANDS, paths)):
        values = first if index == 0 else read_raster(path)
        if values.shape != first.shape:
            raise TileError(
                f"{path}: {values.shape[1]} x {values.shape[0]} px, expected {first.shape[1]} x "
                f"{first.shape[0]} px as in {paths[0].name}; resample the bands to one grid"
            )
        image[..., index] = to_physical(values, band)
    return image


def readable_shape(files: TileFiles) -> Tuple[int, int]:
    """Return a broken tile's size (H, W) from its first readable band, else DEFAULT_SHAPE."""
    for path in filter(None, files.paths):
        try:
            return read_raster(path).shape
        except (TileError, MemoryError):
            continue
    return DEFAULT_SHAPE


# --- Units ----------------------------------------------------------------------------------------


def to_physical(values: np.ndarray, band: Band) -> np.ndarray:
    """Return stored Level-2 integers, any shape, as float32 in the band's unit; NaN stays NaN."""
    return (values * np.float32(band.scale) + np.float32(band.offset)).astype(np.float32)


def valid_mask(image: np.ndarray) -> np.ndarray:
    """Return (H, W) bool: True where at least one of the bands of `image` (H, W, 5) has a value."""
    valid = np.zeros(image.shape[:2], bool)
    for index in range(image.shape[2]):  # band by band: no temporary of the size of the scene
        valid |= ~np.isnan(image[..., index])
    return valid


def normalize(image: np.ndarray, normalization: Mapping[str, List[float]]) -> np.ndarray:
    """Return `image`, (H, W, 5) physical units, as a network's input: (5, H, W) float32 of (x - mean) / std,
    nodata 0.

    Args:
        image: a tile, NaN where nodata.
        normalization: `mean` and `std` of the five bands over the valid pixels that the network was trained
            on.
    """
    mean = np.asarray(normalization["mean"], np.float32)
    std = np.asarray(normalization["std"], np.float32)
    scaled = np.nan_to_num((image - mean) / std, nan=0.0)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a float32 array as a tensor on the same memory, by the buffer protocol.

    `torch.from_numpy` and `Tensor.numpy` fail where torch < 2.3 meets numpy >= 2 ("Numpy is not available").
    """
    array = np.ascontiguousarray(array, np.float32)
    return torch.frombuffer(array, dtype=torch.float32).reshape(array.shape)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy of a tensor of any device as a float32 array, by the buffer protocol."""
    array = np.empty(tuple(tensor.shape), np.float32)
    torch.frombuffer(array, dtype=torch.float32).copy_(tensor.reshape(-1))
    return array


def implausible_units(image: np.ndarray) -> Optional[str]:
    """Return a warning where the thermal band's median is no temperature of a land surface, else None."""
    thermal = image[..., -1]
    thermal = thermal[~np.isnan(thermal)]
    if thermal.size == 0:
        return None
    median = float(np.median(thermal))
    if PLAUSIBLE_KELVIN[0] <= median <= PLAUSIBLE_KELVIN[1]:
        return None
    band = BANDS[-1]
    stored = (median - band.offset) / band.scale
    return (
        f"the median of the thermal band is {stored:.0f}, which reads as {median:.1f} K; expected "
        "Collection-2 Level-2 scaled integers (about 20000 to 50000). The mask will be poor; export the tile "
        "as Level-2 data"
    )


def warn(message: str) -> None:
    """Say `message` on standard error, on a line of its own even while a progress bar is drawn."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


# --- Networks -------------------------------------------------------------------------------------

Transform = Callable[[torch.Tensor], torch.Tensor]


def run_coarsely(network: Transform, x: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the maps (B, C, H, W) that `network` makes of `x` at 1/`factor` of its resolution, enlarged."""
    coarse = nn.functional.avg_pool2d(x, factor)
    height, width = coarse.shape[2:]
    maps = network(pad_to_multiple(coarse))[:, :, :height, :width]
    return nn.functional.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)


def distance_to(marked: torch.Tensor, reach: int) -> torch.Tensor:
    """Return (B, H, W) float32: Euclidean distance in pixels to the nearest marked pixel, inf beyond `reach`.

    Exact for distances up to `reach`, on any device: the squared distance is a minimum first over the rows,
    then over the columns, since its two parts add up (Felzenszwalb and Huttenlocher 2012,
    doi 10.4086/toc.2012.v008a019, with a minimum over all offsets in reach for their lower envelope).

    Args:
        marked: (B, H, W) bool.
        reach: pixels.
    """
    squares = torch.where(marked, 0.0, math.inf).to(torch.float32)
    for dim in (1, 2):
        squares = nearest_along(squares, reach, dim)
    return squares.masked_fill_(squares > reach**2, math.inf).sqrt_()


def nearest_along(squares: torch.Tensor, reach: int, dim: int) -> torch.Tensor:
    """Return the minimum over offsets o along `dim`, at most `reach`, of the value there plus o^2."""
    nearest = squares.clone()
    length = squares.shape[dim]
    for offset in range(1, min(reach, length - 1) + 1):
        shifted = squares + offset**2
        for here, there in ((0, offset), (offset, 0)):
            part = nearest.narrow(dim, here, length - offset)
            torch.minimum(part, shifted.narrow(dim, there, length - offset), out=part)
    return nearest


def like_first(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return maps (B, c, H, W) one behind the other, in the memory format of the first."""
    joined = torch.cat(list(maps), dim=1)
    if maps[0].is_contiguous(memory_format=torch.channels_last):
        return joined.contiguous(memory_format=torch.channels_last)
    return joined


class DerivedInputs(nn.Module):
    """Puts maps behind the five normalised bands that are made of them; (B, 5, H, W) to (B, 5 + n, H, W).

    ndsi: (green - SWIR-1) / (green + SWIR-1) of the reflectances (Hall et al. 1995, doi
    10.1016/0034-4257(95)00137-P), which illumination leaves alone; 0 where one of them is nodata.
    temperature_anomaly: temperature less the median of the image's valid pixels, in the normalised unit.
    nodata_distance: to the nearest pixel without any band, 0 to 1 at NODATA_REACH pixels and beyond.

    A band is nodata where it is exactly 0, as `normalize` and padding leave it. Of the three only NDSI needs
    physical units: `mean` and `std` are what bands were normalised with, set by training (`set_units`) and
    stored with the weights. As they are first, inputs count as physical units.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        unknown = sorted(set(names) - set(DERIVED_INPUTS))
        if unknown:
            raise InputError(
                f"derived input {unknown[0]!r} is unknown, expected some of {', '.join(DERIVED_INPUTS)}"
            )
        self.names = tuple(names)
        self.register_buffer("mean", torch.zeros(len(BANDS)))
        self.register_buffer("std", torch.ones(len(BANDS)))

    def set_units(self, normalization: Mapping[str, List[float]]) -> None:
        """Take the mean and standard deviation that the bands are normalised with."""
        self.mean.copy_(torch.tensor(list(normalization["mean"])))
        self.std.copy_(torch.tensor(list(normalization["std"])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the bands and, behind them, the maps in the order of their names."""
        with torch.no_grad():
            maps = [getattr(self, name)(x)[:, None] for name in self.names]
        return like_first([x, *maps])

    def ndsi(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised difference snow index (B, H, W), -1 to 1."""
        green, swir = (x[:, band] * self.std[band] + self.mean[band] for band in (GREEN, SWIR))
        index = (green - swir) / (green + swir).clamp(min=DARKEST_SUM)
        known = (x[:, GREEN] != 0) & (x[:, SWIR] != 0)
        return torch.where(known, index.clamp(-1, 1), 0.0)

    def temperature_anomaly(self, x: torch.Tensor) -> torch.Tensor:
        """Return the temperature (B, H, W) less the median of its image, 0 where nodata."""
        thermal = x[:, THERMAL]
        known = thermal != 0
        median = torch.where(known, thermal, math.nan).flatten(1).nanmedian(dim=1).values
        return torch.where(known, thermal - median[:, None, None], 0.0)

    def nodata_distance(self, x: torch.Tensor) -> torch.Tensor:
        """Return the distance (B, H, W) to the nearest nodata pixel as a share of NODATA_REACH."""
        return (distance_to((x == 0).all(dim=1), NODATA_REACH) / NODATA_REACH).clamp(max=1)


def largest_within(values: torch.Tensor, window: int) -> torch.Tensor:
    """Return, for every place of (..., H, W), the largest value in the square around it.

    Args:
        values: any; outside the image there are none.
        window: odd side of the square.
    """
    reach = window // 2
    values = nn.functional.pad(values, (reach,) * 4, value=-math.inf)
    for dim in (-2, -1):
        span = 1  # of the places behind each one whose largest value it holds
        while span < window:
            step = min(span, window - span)
            length = values.shape[dim] - step
            values = torch.maximum(values.narrow(dim, 0, length), values.narrow(dim, step, length))
            span += step
    return values


def with_surroundings(x: torch.Tensor, ranges: Sequence[int], tophats: Sequence[int]) -> torch.Tensor:
    """Return bands (B, C, H, W) and behind them where each pixel stands among those around it.

    Maps of all `ranges`, then of all `tophats`, for each of RANGE_BANDS and each window, in the unit of `x`,
    0 where nodata. Ranges: how far it is above the least value around it, and below the largest. Top-hats
    (Serra 1982), white and black: how far it is above the morphological opening, and below the closing, so
    how far it stands out of what is wider than the window. PixelNet sees the same (`range_features`,
    `tophat_features`); a convolution knows means, not extremes.

    Args:
        x: normalised bands first, exactly 0 where nodata.
        ranges: odd sides of squares in pixels.
        tophats: the same.
    """
    if not (ranges or tophats):
        return x
    near, beside = [], []
    with torch.no_grad():
        for known, values in each_way_up(x):
            largest = {window: largest_within(values, window) for window in {*ranges, *tophats}}
            near += [torch.where(known, largest[window] - values, 0.0) for window in ranges]
            beside += [
                torch.where(known, closing(largest[window], window) - values, 0.0) for window in tophats
            ]
    return like_first([x, *near, *beside])


def each_way_up(x: torch.Tensor) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each of RANGE_BANDS, first turned upside down, where it is known and its values, two
    (B, 1, H, W); -inf where it is not."""
    for band in RANGE_BANDS:
        values = x[:, band : band + 1]
        known = values != 0
        for sign in (-1, 1):
            yield known, torch.where(known, sign * values, -math.inf)


def closing(largest: torch.Tensor, window: int) -> torch.Tensor:
    """Return the morphological closing, given the largest values within `window` of each place.

    It is the least of those within the window; -inf, where nothing was near, limits nothing.
    """
    return -largest_within(-torch.where(largest.isinf(), math.inf, largest), window)


def magnify(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return normalised bands (B, C, H, W) in another size (height, width); nodata, exactly 0, stays so."""
    known = nn.functional.interpolate((x != 0).to(x.dtype), list(size), mode="nearest")
    return known * nn.functional.interpolate(x, list(size), mode="bilinear", align_corners=False)


class CoarseUnet(nn.Module):
    """A U-Net that sees the image at 1/`factor` of its resolution, and whose logits are enlarged again.

    Glaciers are large against a pixel of 30 m: for the same work a step covers `factor`^2 times the area.
    `derived` names maps that it sees besides the bands; see DerivedInputs. `ranges` and `tophats` are
    windows, in pixels of the reduced image, in which it sees each pixel's surroundings: `with_surroundings`.
    `scales` are how many times as large the image is looked at, once each; the probabilities are averaged.
    In training it is looked at in the first of them.
    """

    def __init__(
        self,
        factor: int = 2,
        derived: Sequence[str] = (),
        ranges: Sequence[int] = (),
        tophats: Sequence[int] = (),
        scales: Sequence[float] = (1.0,),
        **args: Any,
    ) -> None:
        super().__init__()
        if not scales or min(scales) <= 0:
            raise InputError(f"scales of CoarseUnet: found {list(scales)}, expected one or more above 0")
        self.factor = factor
        self.ranges, self.tophats, self.scales = tuple(ranges), tuple(tophats), tuple(scales)
        self.derive = DerivedInputs(derived) if derived else nn.Identity()
        more = len(derived) + 2 * len(RANGE_BANDS) * (len(self.ranges) + len(self.tophats))
        in_channels = args.pop("in_channels", len(BANDS)) + more
        self.unet = smp.Unet(in_channels=in_channels, **args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 4, H, W) of normalised bands (B, 5, H, W); H and W are multiples of STRIDE."""
        if self.training or len(self.scales) == 1:
            return self.at_scale(x, self.scales[0])
        probs = [self.at_scale(x, scale).softmax(dim=1) for scale in self.scales]
        return torch.stack(probs).mean(dim=0).clamp(min=LEAST_PROBABILITY).log()

    def at_scale(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the logits of an image that is looked at `scale` times as large, in the image's own size."""
        if scale == 1:
            return run_coarsely(self.see, self.derive(x), self.factor)
        size = (x.shape[2], x.shape[3])
        larger = magnify(x, [max(1, round(side * scale / self.factor)) * self.factor for side in size])
        logits = run_coarsely(self.see, self.derive(larger), self.factor)
        return nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)

    def see(self, coarse: torch.Tensor) -> torch.Tensor:
        """Return the logits of the reduced image."""
        return self.unet(with_surroundings(coarse, self.ranges, self.tophats))


def double_convolution(before: int, after: int, dropout: float) -> nn.Sequential:
    """Return two 3x3 convolutions to `after` channels, with whole channels dropped in training."""
    layers: List[nn.Module] = []
    for channels in (before, after):
        layers.append(nn.Conv2d(channels, after, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.3)]
    return nn.Sequential(*layers, nn.Dropout2d(dropout))


class ResidualBlock(nn.Module):
    """Two convolutions, and a projection to as many channels around them."""

    def __init__(self, before: int, after: int, dropout: float) -> None:
        super().__init__()
        self.body = double_convolution(before, after, dropout)
        self.shortcut = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, after, H, W) of (B, before, H, W)."""
        return self.body(x) + self.shortcut(x)


class ResUNet(nn.Module):
    """A U-Net of residual blocks (Zhang et al. 2018, arXiv 1711.10684), from features to features."""

    def __init__(self, width: int, steps: int, dropout: float) -> None:
        super().__init__()
        widths = [width * 2**step for step in range(steps + 1)]  # the last at the bottom
        self.down = nn.ModuleList(ResidualBlock(*pair, dropout) for pair in zip([width] + widths, widths))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(2 * n, n, 2, stride=2) for n in widths[-2::-1])
        self.up = nn.ModuleList(ResidualBlock(2 * n, n, dropout) for n in widths[-2::-1])
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, width, H, W) of the same; H and W are multiples of 2^steps."""
        skips = [self.down[0](x)]
        for block in self.down[1:]:
            skips.append(block(nn.functional.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for enlarge, block in zip(self.enlarge, self.up):
            x = block(torch.cat([enlarge(x), skips.pop()], dim=1))
        return self.last(x)


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron of four times the width, each normalised first and added."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (B, N, width) of the same."""
        parts = self.queries_keys_values(self.norm(tokens)).unflatten(2, (3, self.heads, -1))
        attended = nn.functional.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        tokens = tokens + self.join(attended.transpose(1, 2).flatten(2))
        return tokens + self.perceptron(tokens)


class SETR(nn.Module):
    """A vision transformer on patches, enlarged again step by step (Zheng et al. 2021, arXiv 2012.15840)."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, grid: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Conv2d(width, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, grid, grid))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, dropout) for _ in range(depth)))
        layers: List[nn.Module] = []
        for _ in range(int(math.log2(patch))):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.LeakyReLU(0.3), nn.Upsample(scale_factor=2, mode="bilinear")]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width, width, 1))

    def positions_for(self, rows: int, cols: int) -> torch.Tensor:
        """Return the positional embedding for `rows` x `cols` patches, (1, width, rows, cols)."""
        return nn.functional.interpolate(
            self.positions, size=(rows, cols), mode="bilinear", align_corners=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, width, H, W) of the same; H and W are multiples of `patch`."""
        patches = self.embed(x)
        rows, cols = patches.shape[2:]
        tokens = (patches + self.positions_for(rows, cols)).flatten(2).transpose(1, 2)
        return self.decoder(self.blocks(tokens).transpose(1, 2).unflatten(2, (rows, cols)))


class GlaViTU(nn.Module):
    """Glacier-VisionTransformer-U-Net: a SETR for the large picture, then a ResU-Net for the outlines.

    Maslov et al. 2023 (IGARSS), arXiv 2401.15113, with transposed convolutions in place of enlarging and 2x2
    convolutions, which have as many weights and take a quarter of the work, and activations in the SETR's
    decoder, as SETR has. `reports/glavitu.md` counts its parameters beside those of the published network.
    """

    def __init__(
        self,
        in_channels: int = 5,
        classes: int = 4,
        encoder_weights: None = None,
        width: int = 64,
        depth: int = 12,
        heads: int = 4,
        patch: int = 16,
        grid: int = 24,
        steps: int = 3,
        dropout: float = 0.1,
        factor: int = 1,
    ) -> None:
        """Build the network with random weights; the defaults are the published configuration.

        Args:
            in_channels: bands.
            classes: logits a pixel.
            encoder_weights: None; `build_network` passes it to every network.
            width: channels of fused input, tokens and the ResU-Net's first step, a multiple of `heads`.
            depth: transformer blocks.
            heads: of their attention.
            patch: side of a patch in pixels, a power of 2 up to 32.
            grid: patches in a row of the learned positional embedding, interpolated for any other number.
            steps: how often the ResU-Net halves the resolution, at most 5.
            dropout: share dropped in training.
            factor: it works at 1/`factor` of the resolution, as CoarseUnet does.
        """
        super().__init__()
        self.factor = factor
        self.fuse = double_convolution(in_channels, width, dropout)
        self.setr = SETR(width, depth, heads, patch, grid, dropout)
        self.auxiliary_head = nn.Conv2d(width, classes, 1)
        self.resunet = ResUNet(width, steps, dropout)
        self.head = nn.Conv2d(width, classes, 1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features (B, width, H, W) that the auxiliary head and the ResU-Net see."""
        fused = self.fuse(x)
        return fused + self.setr(fused)

    def decode(self, encoded: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 4, H, W) of the features (B, width, H, W)."""
        return self.head(encoded + self.resunet(encoded))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 4, H, W) of normalised bands (B, 5, H, W); H and W are multiples of STRIDE."""
        return run_coarsely(lambda coarse: self.decode(self.encode(coarse)), x, self.factor)

    def forward_with_auxiliary(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return what `forward` does and the auxiliary head's logits: deep supervision, in training only."""

        def both(coarse: torch.Tensor) -> torch.Tensor:
            encoded = self.encode(coarse)
            return torch.cat([self.decode(encoded), self.auxiliary_head(encoded)], dim=1)

        logits, auxiliary = run_coarsely(both, x, self.factor).chunk(2, dim=1)
        return logits, auxiliary


def box_sum(values: np.ndarray, window: int) -> np.ndarray:
    """Return the sums (H, W) float32 over the part of a square window that lies inside the array (H, W)."""
    values = values.astype(np.float32, copy=False)  # OpenCV adds them up in double precision
    return cv2.boxFilter(
        values, cv2.CV_32F, (window, window), normalize=False, borderType=cv2.BORDER_CONSTANT
    )


class LocalStatistics:
    """Mean and standard deviation of a band's values in square windows around each pixel."""

    def __init__(self, band: np.ndarray) -> None:
        """Take a band (H, W) float32, NaN where there is no value."""
        self.present = ~np.isnan(band)
        # Squares of centred values stay small: the difference of squares below does not cancel.
        known = band[self.present]
        self.centre = np.float32(known.mean(dtype=np.float64) if known.size else 0.0)
        self.values = np.where(self.present, band - self.centre, np.float32(0))
        self.squares = self.values * self.values

    def within(self, window: int) -> Tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation, two (H, W) float32 arrays in the band's unit.

        Args:
            window: odd side of the square in pixels; at the edges only its part inside the array counts. Both
                are over the values that are there, NaN where there is none.
        """
        count = box_sum(self.present, window)
        count[count < 0.5] = np.nan  # running sums may leave a residue where there is nothing
        mean = box_sum(self.values, window) / count
        variance = box_sum(self.squares, window) / count - mean * mean
        return mean + self.centre, np.sqrt(np.maximum(variance, 0, out=variance))


def snow_index(image: np.ndarray) -> np.ndarray:
    """Return NDSI (H, W) of an image (H, W, 5); NaN where the bands add up to nothing (deep shadow)."""
    green, swir = image[..., GREEN], image[..., SWIR]
    total = green + swir
    return np.divide(green - swir, total, out=np.full_like(total, np.nan), where=total > LEAST_REFLECTANCE)


def median_temperature(image: np.ndarray) -> np.float32:
    """Return the median of the thermal band of an image (H, W, 5) in kelvin, 0 where it has no value."""
    thermal = image[..., THERMAL]
    known = thermal[~np.isnan(thermal)]
    return np.float32(np.median(known) if known.size else 0.0)


def pixel_features(image: np.ndarray, kelvin: np.float32) -> Iterator[np.ndarray]:
    """Yield the PIXEL_FEATURES features of every pixel, each (H, W) float32, NaN where it has no value.

    They are the bands, NDSI, temperature minus the tile's median, and for each of STATISTICS_WINDOWS the
    share of valid pixels (masked cloud and shadow are a clue to what is beside them) and each band's mean,
    standard deviation and difference from the mean.

    Args:
        image: (H, W, 5), reflectance and kelvin, NaN where nodata; a tile or some rows of it.
        kelvin: median temperature of the tile.
    """
    bands = [np.ascontiguousarray(image[..., index], np.float32) for index in range(len(BANDS))]
    yield from bands
    yield snow_index(image)
    yield bands[THERMAL] - kelvin
    valid = valid_mask(image)
    statistics = [LocalStatistics(band) for band in bands]
    for window in STATISTICS_WINDOWS:
        yield box_sum(valid, window) / box_sum(np.ones_like(valid), window)
        for band, of_band in zip(bands, statistics):
            mean, deviation = of_band.within(window)
            yield from (mean, deviation, band - mean)


def local_mean(features: np.ndarray, window: int, band: int) -> np.ndarray:
    """Return the local mean (H, W) of a band among what `pixel_features` yields, (F, H, W)."""
    before = len(BANDS) + 2 + STATISTICS_WINDOWS.index(window) * (1 + 3 * len(BANDS))
    return features[before + 1 + 3 * band]


def slope_features(features: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the SLOPE_FEATURES differences of local means north and south, west and east of every pixel.

    Each is (H, W) float32, NaN where one of the two is nodata or outside. What light and temperature do
    across a slope tells its aspect, and glaciers keep to those that face away from the sun.

    Args:
        features: (F, H, W), what `pixel_features` yields.
    """
    height, width = features.shape[1:]
    for window in SLOPE_WINDOWS:
        reach = window // 2 + 1
        rows, cols = slice(reach, reach + height), slice(reach, reach + width)
        for band in SLOPE_BANDS:
            mean = np.pad(local_mean(features, window, band), reach, constant_values=np.nan)
            yield mean[:height, cols] - mean[2 * reach :, cols]
            yield mean[rows, :width] - mean[rows, 2 * reach :]


def range_features(
    image: np.ndarray, windows: Sequence[int], bands: Sequence[int] = RANGE_BANDS
) -> Iterator[np.ndarray]:
    """Yield how far every pixel is above the least and below the largest value in windows around it.

    Each is (H, W) float32, NaN where nodata. In the thermal band they tell the valley floor from the ridge,
    whatever the height of both.

    Args:
        image: (H, W, 5), reflectance and kelvin, NaN where nodata.
        windows: odd sides of the squares in pixels; only values inside the image count.
        bands: which of BANDS.
    """
    for index in bands:
        band = np.ascontiguousarray(image[..., index], np.float32)
        least, largest = (np.nan_to_num(band, nan=fill) for fill in (np.inf, -np.inf))
        for window in windows:
            square = np.ones((window, window), np.uint8)
            yield band - cv2.erode(least, square)
            yield cv2.dilate(largest, square) - band


def tophat_features(image: np.ndarray, windows: Sequence[int], bands: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield how far every pixel stands out of what is wider than a window: the white and black top-hats.

    Each is (H, W) float32, NaN where nodata; see `with_surroundings`, and `range_features` for the arguments.
    """
    for index in bands:
        band = np.ascontiguousarray(image[..., index], np.float32)
        for sign in (1, -1):
            values = np.nan_to_num(sign * band, nan=np.inf)
            for window in windows:
                square = np.ones((window, window), np.uint8)
                least = cv2.erode(values, square)
                least[np.isinf(least)] = -np.inf  # nothing near limits nothing
                yield sign * band - cv2.dilate(least, square)


class PixelNet(nn.Module):
    """A small network on each pixel's features, in full resolution, beside those that see shapes.

    Unlike theirs, its answers depend on where north is: it is trained and asked in one view only. Inputs are
    physical units (a normalisation of mean 0 and deviation 1), with 0 where nodata.
    """

    running_mean: torch.Tensor
    running_std: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        classes: int,
        encoder_weights: None,
        hidden: Sequence[int] = (128, 64),
        dropout: float = 0.2,
        ranges: Sequence[int] = (),
        tophats: Sequence[int] = (),
        range_bands: Sequence[int] = RANGE_BANDS,
    ) -> None:
        """Make the layers with random weights; the first three sizes are as for any network.

        Args:
            hidden: channels of the layers.
            dropout: share dropped in training.
            ranges: windows of its range features in pixels, at most those of its statistics.
            tophats: windows of its top-hats, at most half as wide.
            range_bands: bands of both.
        """
        super().__init__()
        self.ranges, self.tophats, self.range_bands = tuple(ranges), tuple(tophats), tuple(range_bands)
        around = 2 * len(self.range_bands) * (len(self.ranges) + len(self.tophats))
        features = PIXEL_FEATURES + SLOPE_FEATURES + around
        self.register_buffer("running_mean", torch.zeros(features))  # by this name stored in full precision
        self.register_buffer("running_std", torch.ones(features))
        layers: List[nn.Module] = []
        for before, after in zip([features, *hidden], hidden):
            layers += [
                nn.Conv2d(before, after, 1),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(hidden[-1], classes, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 4, H, W) of bands (B, 5, H, W) in physical units, 0 where nodata."""
        return torch.stack([self.of_image(to_array(image)) for image in x.cpu()]).to(x.device)

    def features(self, image: np.ndarray, kelvin: np.float32) -> np.ndarray:
        """Return the features (F, H, W) float32 of a tile, or of some rows of it; see `pixel_features`."""
        features = np.empty((len(self.running_mean),) + image.shape[:2], np.float32)
        planes = chain(
            pixel_features(image, kelvin),
            slope_features(features),  # looks at the statistics when they are there
            range_features(image, self.ranges, self.range_bands),
            tophat_features(image, self.tophats, self.range_bands),
        )
        for number, plane in enumerate(planes):
            features[number] = plane
        return features

    def of_image(self, bands: np.ndarray) -> torch.Tensor:
        """Return logits (4, H, W) of bands (5, H, W), some rows at a time since features need much memory."""
        image = np.where(bands == 0, np.float32(np.nan), bands).transpose(1, 2, 0)
        kelvin = median_temperature(image)
        starts = range(0, len(image), ROWS_AT_ONCE)
        return torch.cat([self.layers(self.of_rows(image, start, kelvin))[0] for start in starts], dim=1)

    def of_rows(self, image: np.ndarray, start: int, kelvin: np.float32) -> torch.Tensor:
        """Return standardised features (1, F, R, W) of ROWS_AT_ONCE rows of a tile (H, W, 5) from `start`."""
        above = min(start, SIGHT)
        seen = self.features(image[start - above : start + ROWS_AT_ONCE + SIGHT], kelvin)
        rows = to_tensor(seen[:, above : above + ROWS_AT_ONCE])
        return self.standardise(rows[None].to(self.running_mean.device))

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features (N, F, H, W), in place, into standard deviations from their means; return them.

        They are 0 where there is no value.
        """
        mean, std = (stored[:, None, None] for stored in (self.running_mean, self.running_std))
        features.sub_(mean).div_(std).nan_to_num_(nan=0.0)
        return features.clamp_(-MOST_DEVIATIONS, MOST_DEVIATIONS)


class TreeTables(NamedTuple):
    """A tree's features (n,), for each the leaves that remain at each of its 256 places, (n, 256) int32, and
    the value (256,) of each leaf at the exponent of the float32 that has its bit alone."""

    features: np.ndarray
    remaining: np.ndarray
    values: np.ndarray


class BoostedTrees(nn.Module):
    """Gradient-boosted trees on each pixel's surroundings, in the place of a network.

    They answer three questions: is it glacier of either kind, is glacier covered by debris, is the rest a
    lake? Products of their probabilities are the classes. Inputs are physical units (a normalisation of mean
    0 and deviation 1): where a band is exactly 0, which no stored integer becomes, it is nodata.

    A tree is evaluated without walking it (QuickScorer, Lucchese et al. 2015, doi 10.1145/2766462.2767733):
    each of its tests that a pixel fails rules out the leaves to the left of it, a set of bits. All tests of
    one feature are one table, from the feature's place among its thresholds to the leaves that remain. Leaves
    count from the left, so that the answer is the lowest bit that remains of all tables.
    """

    LEAVES = 31  # of a tree at most
    MISSING = 255  # place of a feature without a value; the others are 0 to 254

    start: torch.Tensor
    thresholds: torch.Tensor
    feature: torch.Tensor
    threshold: torch.Tensor
    missing_left: torch.Tensor
    left_leaves: torch.Tensor
    value: torch.Tensor

    def __init__(
        self, in_channels: int, classes: int, encoder_weights: None, trees: Sequence[int] = (0, 0, 0)
    ) -> None:
        """Make as many empty trees for each question as `trees` says; sizes as for any network."""
        super().__init__()
        self.trees = tuple(trees)
        nodes = (sum(trees), self.LEAVES - 1)
        start, thresholds = torch.zeros(len(trees)), torch.zeros(len(trees), PIXEL_FEATURES, self.MISSING)
        self.register_buffer("start", start.double())  # log-odds before any tree
        self.register_buffer("thresholds", thresholds.double())  # ascending, the last the largest float32
        self.register_buffer("feature", torch.zeros(nodes, dtype=torch.uint8))
        self.register_buffer("threshold", torch.zeros(nodes, dtype=torch.uint8))  # goes left up to this one
        self.register_buffer("missing_left", torch.zeros(nodes, dtype=torch.bool))
        self.register_buffer("left_leaves", torch.zeros(nodes, dtype=torch.int32))  # bits, 0: no test
        self.register_buffer("value", torch.zeros(sum(trees), self.LEAVES).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities (B, 4, H, W) of bands (B, 5, H, W) in physical units, 0 where nodata."""
        maps = [to_tensor(np.log(self.probabilities(to_array(image)))) for image in x]
        return torch.stack(maps).to(x.device)

    def probabilities(self, bands: np.ndarray) -> np.ndarray:
        """Return the probabilities (4, H, W) float32, above 0, of bands (5, H, W); nodata is other."""
        image = np.where(bands == 0, np.float32(np.nan), bands).transpose(1, 2, 0)
        valid = valid_mask(image)
        glacier, debris, lake = np.zeros((len(self.trees),) + valid.shape)
        if valid.any():
            glacier[valid], debris[valid], lake[valid] = self.answers(self.places(image, valid))
        rest = 1 - glacier
        classes = [rest * (1 - lake), glacier * (1 - debris), glacier * debris, rest * lake]
        return np.maximum(np.stack(classes), 1e-30).astype(np.float32)

    def places(self, image: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Return (3, PIXEL_FEATURES, N) uint8: where the features of the N valid pixels of an image (H, W, 5)
        lie among the thresholds of each question."""
        thresholds = np.array(self.thresholds.tolist())
        places = np.zeros(thresholds.shape[:2] + (int(valid.sum()),), np.uint8)
        for feature, plane in enumerate(pixel_features(image, median_temperature(image))):
            values = plane[valid].astype(np.float64)
            for question in np.flatnonzero(self.trees):  # NaN sorts behind all: its place is MISSING
                places[question, feature] = np.searchsorted(thresholds[question, feature], values)
        return places

    def answers(self, places: np.ndarray) -> np.ndarray:
        """Return (3, N) float64: how probable each question's yes is."""
        ends = np.cumsum(self.trees)
        tables = [self.tables(tree) for tree in range(sum(self.trees))]
        scores = np.empty((len(self.trees), places.shape[2]))

        def fill(start: int) -> None:
            part = np.s_[start : start + PIXELS_AT_ONCE]
            for question, (end, count) in enumerate(zip(ends, self.trees)):
                chosen = tables[end - count : end]
                scores[question, part] = sum_of_trees(np.ascontiguousarray(places[question, :, part]), chosen)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, range(0, places.shape[2], PIXELS_AT_ONCE)))
        start = np.array(self.start.tolist())
        return 1 / (1 + np.exp(-(scores + start[:, None])))

    def tables(self, tree: int) -> TreeTables:
        """Return what evaluates a tree."""
        feature, threshold, left_leaves = (
            np.array(stored[tree].tolist()) for stored in (self.feature, self.threshold, self.left_leaves)
        )
        goes_left = np.arange(self.MISSING + 1) <= threshold[:, None]
        goes_left[:, self.MISSING] = self.missing_left[tree].tolist()
        remaining = np.where(goes_left, -1, ~left_leaves[:, None]).astype(np.int32)
        order = np.argsort(feature, kind="stable")
        used, starts = np.unique(feature[order], return_index=True)
        values = np.zeros(256)
        values[FLOAT32_BIAS : FLOAT32_BIAS + self.LEAVES] = self.value[tree].tolist()
        return TreeTables(used, np.bitwise_and.reduceat(remaining[order], starts), values)


def sum_of_trees(places: np.ndarray, trees: Sequence[TreeTables]) -> np.ndarray:
    """Return the sum (N,) float64 of what trees say of pixels with these places (PIXEL_FEATURES, N) uint8."""
    total = np.zeros((1, places.shape[1]))
    for tree in trees:
        remaining = np.full(total.shape, -1, np.int32)
        for feature, table in zip(tree.features, tree.remaining):
            cv2.bitwise_and(remaining, cv2.LUT(places[feature : feature + 1], table[None]), dst=remaining)
        lowest = (remaining & -remaining).astype(np.float32)
        exponents = (lowest.view(np.int32) >> FLOAT32_FRACTION).astype(np.uint8)
        total += cv2.LUT(exponents, tree.values[None])
    return total[0]


NETWORKS: Dict[str, Callable[..., nn.Module]] = {
    "Unet": smp.Unet,
    "CoarseUnet": CoarseUnet,
    "UnetPlusPlus": smp.UnetPlusPlus,
    "FPN": smp.FPN,
    "DeepLabV3Plus": smp.DeepLabV3Plus,
    "GlaViTU": GlaViTU,
    "BoostedTrees": BoostedTrees,
    "PixelNet": PixelNet,
}


def build_network(arch: Mapping) -> nn.Module:
    """Return the network that `arch` = {"name": a key of NETWORKS, "args": its arguments} describes, with
    random weights.

    It maps (B, 5, H, W) normalised bands to (B, 4, H, W) logits; H and W are multiples of STRIDE.

    Raises:
        InputError: there is no such network.
    """
    if arch["name"] not in NETWORKS:
        raise InputError(f"network {arch['name']!r} is unknown, expected one of {', '.join(NETWORKS)}")
    sizes = {"in_channels": len(BANDS), "classes": len(CLASS_NAMES), "encoder_weights": None}
    return NETWORKS[arch["name"]](**{**arch.get("args", {}), **sizes})


def batchnorms_after_convolutions(network: nn.Module) -> List[Tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Return the BatchNorms whose input is the output of a convolution, as seen in one forward pass.

    A convolution that runs twice is left out unless it always feeds the same one.
    """
    outputs: List[Tuple[torch.Tensor, nn.Conv2d]] = []  # kept alive, so that no two of them share an id
    inputs: Dict[int, nn.BatchNorm2d] = {}

    def note_output(conv: nn.Conv2d, _args: Tuple, output: torch.Tensor) -> None:
        outputs.append((output, conv))

    def note_input(batchnorm: nn.BatchNorm2d, args: Tuple) -> None:
        inputs[id(args[0])] = batchnorm

    hooks = [m.register_forward_hook(note_output) for m in network.modules() if isinstance(m, nn.Conv2d)]
    hooks += [
        m.register_forward_pre_hook(note_input) for m in network.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        network(torch.zeros(1, len(BANDS), 2 * STRIDE, 2 * STRIDE))
    for hook in hooks:
        hook.remove()
    readers: Dict[nn.Conv2d, Set[Optional[nn.BatchNorm2d]]] = {conv: set() for _, conv in outputs}
    for output, conv in outputs:
        readers[conv].add(inputs.get(id(output)))
    found = [(conv, batchnorms.pop()) for conv, batchnorms in readers.items() if len(batchnorms) == 1]
    return [(conv, batchnorm) for conv, batchnorm in found if batchnorm is not None]


def fold_batchnorm(network: nn.Module) -> int:
    """Merge BatchNorms into the convolutions before them, in place and for evaluation; return how many.

    Exact where nothing but its BatchNorm reads such a convolution's output, as in the networks above.
    """
    pairs = batchnorms_after_convolutions(network.eval())
    for conv, bn in pairs:
        assert bn.running_mean is not None and bn.running_var is not None  # as a loaded one has them
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
    merged = {id(batchnorm) for _, batchnorm in pairs}
    for module in list(network.modules()):
        for name, child in module.named_children():
            if id(child) in merged:  # timm's BatchNormAct2d also holds what follows it: dropout, activation
                rest = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
                setattr(module, name, nn.Sequential(*rest))
    return len(pairs)


def merge_batchnorm(network: nn.Module) -> bool:
    """Merge BatchNorms in place, as `fold_batchnorm` does; return whether the answers are still the same."""
    x = torch.randn(1, len(BANDS), 2 * STRIDE, 2 * STRIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval()(x)
        fold_batchnorm(network)
        return torch.allclose(network(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


# --- Weights --------------------------------------------------------------------------------------


class Member(NamedTuple):
    """One network of the ensemble, its weight in the average and the statistics it was trained with."""

    network: nn.Module
    weight: float
    normalization: Mapping[str, List[float]]


class Postprocess(NamedTuple):
    """Which steps follow the forward passes; `model.pth` stores what out-of-fold MCC decided."""

    extent_bias: float = 0.0  # added to the log-odds of glacier of either kind
    crf: Optional[Mapping[str, float]] = None  # the arguments of refine_with_crf, None to skip it
    min_speck: int = 100  # px, smaller patches of a glacier or lake class go to what surrounds them
    min_hole: int = 50  # px, smaller gaps in them are filled


class Pass(NamedTuple):
    """One forward pass over an image: the number of a member and of one of VIEWS."""

    member: int
    view: int


class Model(NamedTuple):
    """All that prediction needs, as read from `model.pth`."""

    members: Tuple[Member, ...]
    passes: Tuple[Pass, ...]  # the most useful first: where time is short, the last are left out
    class_bias: Tuple[float, ...]  # added to the log-probability of each class within its group
    postprocess: Postprocess
    time_budget: float  # seconds that a run may take, infinite where it may take any
    device: torch.device
    pace: Optional[Dict[int, float]] = None  # seconds a pixel of a member's latest pass, learned on the way
    workers: int = 1  # threads that segment tiles side by side


def find_weights(given: Optional[PathLike] = None) -> Path:
    """Return the weights file: `given`, else model.pth beside this file, in its `weights/`, or in the working
    folder.

    Raises:
        InputError: there is none; it lists where it was looked for.
    """
    if given is not None:
        if os.path.isfile(given):
            return Path(given)
        raise InputError(
            f"{given}: no such weights file; train one with `make train-all` or leave the argument out"
        )
    here = Path(__file__).resolve().parent
    places = [folder / MODEL_FILE for folder in (here, here / "weights", Path.cwd(), Path.cwd() / "weights")]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise InputError(
        f"no weights: looked for {looked}; put {MODEL_FILE} beside solution.py or name it with --weights"
    )


def read_model_file(path: PathLike) -> Dict:
    """Return the containers and tensors of a model file.

    Raises:
        InputError: the file is damaged or is no model of this kit.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums of the tensors
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes may raise almost anything
        raise InputError(
            f"{path}: damaged or no weights file ({Path(path).stat().st_size} bytes; {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); copy it again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != MODEL_FORMAT:
        found = content.get("format", "none") if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path}: format {found!r}, expected {MODEL_FORMAT!r}; pack it with `python -m train pack`"
        )
    absent = [key for key in ("members", "passes", "class_bias", "postprocess") if not content.get(key)]
    if absent:
        raise InputError(f"{path}: no {', '.join(absent)} in it; pack it again with `python -m train pack`")
    return content


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load float16 or float32 weights into `network`, strictly.

    Raises:
        InputError: names all missing, unexpected and misshapen weights at once.
    """
    expected = network.state_dict()
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    misshapen = [
        f"{name} {tuple(state[name].shape)} for {tuple(expected[name].shape)}"
        for name in sorted(set(expected) & set(state))
        if state[name].shape != expected[name].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in faults.items() if names
        )
        raise InputError(f"{source}: weights do not fit the network they name: {listed}")
    values = {name: tensor.to(expected[name].dtype) for name, tensor in state.items()}
    broken = [name for name, tensor in values.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(
            f"{source}: {len(broken)} weights are NaN or infinite: {', '.join(broken[:5])}; pack it again"
        )
    network.load_state_dict(values)


def load_network(stored: Mapping, source: str) -> nn.Module:
    """Return the network of one member of a model file, in evaluation mode."""
    network = build_network(stored["arch"])
    load_state(network, stored["state_dict"], source)
    return network.requires_grad_(False).eval()


def load_member(stored: Mapping, source: str, device: torch.device) -> Member:
    """Return one member of a model file, ready for inference on `device`."""
    network = load_network(stored, source)
    if not merge_batchnorm(network):
        warn(f"{source}: merging its BatchNorms would change its answers; it runs without, and more slowly")
        network = load_network(stored, source)
    return Member(network.to(device), float(stored["weight"]), stored["normalization"])


def check_settings(model: Model) -> None:
    """Raise ValueError where settings would fail at every tile: unknown passes, lists of a wrong length, CRF
    arguments, a time budget that is none."""
    members, views = range(len(model.members)), range(len(VIEWS))
    unknown = [tuple(p) for p in model.passes if p.member not in members or p.view not in views]
    if unknown or len(set(model.passes)) < len(model.passes):
        raise ValueError(
            f"passes: {unknown or 'some occur twice'}, expected different pairs of one of "
            f"{len(model.members)} members and one of {len(VIEWS)} views, both counted from 0"
        )
    if not model.time_budget > 0:
        raise ValueError(f"time_budget: {model.time_budget}, expected seconds > 0 or null")
    lengths = {"class_bias": (len(model.class_bias), len(CLASS_NAMES))}
    for number, member in enumerate(model.members):
        for key in ("mean", "std"):
            found = len(member.normalization[key])
            lengths[f"{key} in normalization of member {number}"] = (found, len(BANDS))
    wrong = [f"{found} values in {name}, expected {n}" for name, (found, n) in lengths.items() if found != n]
    if wrong:
        raise ValueError("; ".join(wrong))
    if model.postprocess.crf:
        try:
            inspect.signature(refine_with_crf).bind(None, None, None, **model.postprocess.crf)
        except TypeError as error:
            raise ValueError(f"crf: {error}") from error


def load_model(path: PathLike) -> Model:
    """Return the model that `path` holds, on the GPU where there is one.

    Raises:
        InputError: the file is damaged, incomplete, or its weights do not fit. Random weights are never used.
    """
    content = read_model_file(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        members = tuple(
            load_member(stored, f"{path}, member {number}", device)
            for number, stored in enumerate(content["members"])
        )
        model = Model(
            members,
            tuple(Pass(*map(int, pair)) for pair in content["passes"]),
            tuple(content["class_bias"]),
            Postprocess(**content["postprocess"]),
            float(content.get("time_budget") or math.inf),
            device,
            {},
        )
        check_settings(model)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: {type(error).__name__}: {error}; pack it again with `python -m train pack`"
        ) from error
    return model


# --- Passes ---------------------------------------------------------------------------------------


class View(NamedTuple):
    """One test-time view of a batch (B, C, H, W) and the way back."""

    name: str
    forward: Transform
    inverse: Transform


def flip_view(name: str, axis: int) -> View:
    """Return the view that mirrors along `axis`; a mirror image is its own way back."""
    return View(name, lambda x: x.flip(axis), lambda x: x.flip(axis))


def rotation_view(turns: int) -> View:
    """Return the view rotated by `turns` quarter turns."""
    return View(f"rotation {90 * turns}", lambda x: x.rot90(turns, (2, 3)), lambda x: x.rot90(-turns, (2, 3)))


VIEWS = (
    View("identity", lambda x: x, lambda x: x),
    flip_view("horizontal flip", 3),
    flip_view("vertical flip", 2),
    rotation_view(1),
    rotation_view(2),
    rotation_view(3),
)


def pad_to_multiple(x: torch.Tensor, multiple: int = STRIDE) -> torch.Tensor:
    """Return (B, C, H, W) padded below and right with zeros (nodata) to multiples of `multiple`."""
    height, width = x.shape[2:]
    return nn.functional.pad(x, (0, -width % multiple, 0, -height % multiple))


def forward_probabilities(network: nn.Module, x: torch.Tensor, view: View) -> torch.Tensor:
    """Return (B, 4, H, W) class probabilities of `x` (B, 5, H, W) as seen in `view`, turned back."""
    return view.inverse(torch.softmax(network(view.forward(x)), dim=1))


class Ensemble(NamedTuple):
    """Mean class probabilities (4, H, W) float32 of an image, and how many passes they are the mean of."""

    probs: np.ndarray
    passes: int


def probability_maps(model: Model, image: np.ndarray, passes: Sequence[Pass]) -> Iterator[torch.Tensor]:
    """Yield the class probabilities (1, 4, H', W') of each pass.

    H' and W' are those of `image` (H, W, 5), padded to multiples of STRIDE.
    """
    inputs: Dict[
        Tuple[float, ...], torch.Tensor
    ] = {}  # by normalisation: members trained on the same share it
    for number, view in passes:
        network, _, normalization = model.members[number]
        key = (*normalization["mean"], *normalization["std"])
        if key not in inputs:
            x = to_tensor(normalize(image, normalization))[None].to(model.device)
            inputs[key] = pad_to_multiple(x)
        with torch.inference_mode():
            probs = forward_probabilities(network, inputs[key], VIEWS[view])
        yield probs


def ensemble_probabilities(
    model: Model, image: np.ndarray, passes: Sequence[Pass], until: float = math.inf
) -> Ensemble:
    """Return the weighted mean over members of the mean of each member's passes.

    So a member's weight does not depend on how many of its views there was time for.

    Args:
        model: its members.
        image: (H, W, 5) physical units, NaN where nodata.
        passes: which to make, in this order, at least one.
        until: time of `time.perf_counter` after which none should end. The first is always made; a further
            one is where its member's latest pass, on this image or one before, would fit; of a member
            without any, the slowest of the others'.
    """
    height, width = image.shape[:2]
    sums: Dict[int, torch.Tensor] = {}
    made: Counter = Counter()  # passes of each member
    pace = {} if model.pace is None else model.pace
    following = [number for number, _ in passes[1:]]
    before = time.perf_counter()
    for (number, _), probs in zip(passes, probability_maps(model, image, passes)):
        sums[number] = sums[number] + probs if number in sums else probs
        made[number] += 1
        now = time.perf_counter()
        pace[number], before = (now - before) / (height * width), now
        after = following.pop(0) if following else number
        if now + pace.get(after, max(pace.values())) * height * width > until:
            break
    parts = (model.members[number].weight / made[number] * maps for number, maps in sums.items())
    total = sum(parts, torch.zeros(()))
    mean = to_array(total[0, :, :height, :width])
    return Ensemble(mean / mean.sum(axis=0, keepdims=True), sum(made.values()))


def apply_bias(probs: np.ndarray, class_bias: Sequence[float], extent_bias: float) -> np.ndarray:
    """Return probabilities (4, H, W) float32 shifted by what calibration found.

    Args:
        probs: (4, H, W) float32, sums to 1 over the classes.
        class_bias: added to the log-probability of each class within its group; the groups, glacier of either
            kind and the rest, keep their sums. So a bias of debris moves its border with clean ice only.
        extent_bias: added to the log-odds of glacier of either kind against the rest.
    """
    weighed = probs * np.exp(np.asarray(class_bias, np.float32)).reshape(-1, 1, 1)
    for group, shift in ((GLACIER_GROUP, extent_bias), (REST_GROUP, 0.0)):
        members = list(group)
        before, after = probs[members].sum(axis=0), weighed[members].sum(axis=0)
        weighed[members] *= np.float32(np.exp(shift)) * before / np.maximum(after, 1e-12)
    return weighed / weighed.sum(axis=0, keepdims=True)


def decide_classes(probs: np.ndarray) -> np.ndarray:
    """Return the class index of each pixel, (H, W) uint8, of probabilities or scores (4, H, W).

    First glacier of either kind or not, then which: three tenths of clean ice and three of debris outweigh
    four tenths of other, which a plain argmax would choose.
    """
    glacier, rest = (probs[first] + probs[second] for first, second in (GLACIER_GROUP, REST_GROUP))
    return np.where(glacier > rest, likelier(probs, *GLACIER_GROUP), likelier(probs, *REST_GROUP))


def likelier(probs: np.ndarray, first: int, second: int) -> np.ndarray:
    """Return the likelier of two classes, (H, W) uint8, without the large array that an argmax makes."""
    return np.where(probs[second] > probs[first], np.uint8(second), np.uint8(first))


def predict_window(model: Model, image: np.ndarray, until: float = math.inf) -> Ensemble:
    """Return the class probabilities of an image (H, W, 5) small enough for one pass."""
    if not valid_mask(image).any():  # nothing was seen: certain background, without a forward pass
        certain = np.zeros((len(CLASS_NAMES),) + image.shape[:2], np.float32)
        certain[0] = 1
        return Ensemble(certain, len(model.passes))
    ensemble = ensemble_probabilities(model, image, model.passes, until)
    probs = apply_bias(ensemble.probs, model.class_bias, model.postprocess.extent_bias)
    if model.postprocess.crf:
        features = normalize(image, model.members[0].normalization)
        probs = apply_crf(probs, features, valid_mask(image), model.postprocess.crf)
    return ensemble._replace(probs=probs)


def window_starts(length: int) -> List[int]:
    """Return the starts of windows of WINDOW px that cover `length` px and overlap by OVERLAP px or more."""
    last = max(length - WINDOW, 0)
    return list(range(0, last, WINDOW - OVERLAP)) + [last]


def blend_weights(height: int, width: int) -> np.ndarray:
    """Return (H, W) float32 weights that rise linearly from a window's edges over OVERLAP px, never 0."""

    def ramp(length: int) -> np.ndarray:
        to_edge = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
        return np.minimum(to_edge / OVERLAP, 1).astype(np.float32)

    return ramp(height)[:, None] * ramp(width)[None, :]


def predict_scene(model: Model, image: np.ndarray, until: float = math.inf) -> Ensemble:
    """Return blended scores (4, H, W) float32 of a large image from overlapping windows.

    Every window gets an equal part of the time that is left; the passes are those of the window with fewest.
    """
    height, width = image.shape[:2]
    total = np.zeros((len(CLASS_NAMES), height, width), np.float32)
    windows = [
        np.s_[top : top + WINDOW, left : left + WINDOW]
        for top in window_starts(height)
        for left in window_starts(width)
    ]
    workers = most_workers(model)

    def predict(number: int) -> Ensemble:
        until_here = share_of_time(until, min(1.0, workers / (len(windows) - number)))
        return predict_window(model, image[windows[number]], until_here)

    fewest = len(model.passes)
    for window, ensemble in zip(windows, side_by_side(predict, range(len(windows)), workers)):
        total[(slice(None),) + window] += ensemble.probs * blend_weights(*ensemble.probs.shape[1:])
        fewest = min(fewest, ensemble.passes)
    return Ensemble(total, fewest)  # the scale of a pixel's weights does not matter: only their order does


def most_workers(model: Model) -> int:
    """Return how many threads work side by side: none more on a GPU, which works on many pixels at once."""
    return min(usable_cores(), MOST_WORKERS) if model.device.type == "cpu" else 1


def threads_of_each(workers: int) -> int:
    """Return the threads of a pass where so many are made side by side."""
    return max(1, usable_cores() // workers)


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `work(item)` of all items in their order, made by so many threads.

    A pass on several cores waits at the end of each layer for the slowest; passes on one core each wait for
    nothing. Few items are taken ahead of what is yielded, and none after the caller has stopped.
    """
    if workers == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, initializer=prepare_torch, initargs=(threads_of_each(workers),))
    begun: "Deque[Future[Result]]" = deque()  # as many as run, and one that waits
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def share_of_time(until: float, part: float) -> float:
    """Return the time at which `part` of the time from now to `until` will have passed."""
    now = time.perf_counter()
    return now + (until - now) * part


class Prediction(NamedTuple):
    """Class indices (H, W) uint8, and how many passes they rest on."""

    classes: np.ndarray
    passes: int


def predict_classes(model: Model, image: np.ndarray, until: float = math.inf) -> Prediction:
    """Return the classes of a tile or scene (H, W, 5) in physical units, NaN where nodata."""
    fits = max(image.shape[:2]) <= LARGEST_TILE
    ensemble = (predict_window if fits else predict_scene)(model, image, until)
    steps = model.postprocess
    classes = decide_classes(ensemble.probs)
    return Prediction(
        clean_classes(classes, valid_mask(image), steps.min_speck, steps.min_hole), ensemble.passes
    )


# --- Post-processing ------------------------------------------------------------------------------


def refine_with_crf(
    probs: np.ndarray,
    features: np.ndarray,
    valid: np.ndarray,
    smooth_px: float,
    smooth_weight: float,
    bilateral_px: float,
    bilateral_std: float,
    bilateral_weight: float,
    iterations: float,
) -> np.ndarray:
    """Return probabilities after mean-field inference in a dense CRF (Kraehenbuehl and Koltun 2011).

    Nodata pixels take no part: they carry no evidence and keep their probabilities.

    Args:
        probs: (4, H, W) float32, sums to 1 over the classes.
        features: (5, H, W) float32, the normalised bands; the bilateral kernel compares all five, not only
            red, green, blue. valid: (H, W) bool. smooth_px: standard deviation in pixels of the Gaussian
            smoothness kernel. smooth_weight: its strength. bilateral_px: standard deviation in pixels of the
            bilateral kernel. bilateral_std: its standard deviation in the features. bilateral_weight: its
            strength. iterations: mean-field steps.

    Returns:
        (4, H, W) float32.
    """
    rows, columns = np.nonzero(valid)
    positions = np.stack([rows, columns]).astype(np.float32)
    appearance = features[:, valid] / np.float32(bilateral_std)
    field = densecrf.DenseCRF(len(rows), len(probs))
    # Clipped, since the logarithm of an exact 0 would forbid a class whatever the neighbours say.
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(probs[:, valid], 1e-5, 1))))
    field.addPairwiseEnergy(np.ascontiguousarray(positions / np.float32(smooth_px)), compat=smooth_weight)
    joint = np.concatenate([positions / np.float32(bilateral_px), appearance])
    field.addPairwiseEnergy(np.ascontiguousarray(joint), compat=bilateral_weight)
    refined = probs.copy()
    refined[:, valid] = np.asarray(field.inference(int(iterations)))
    return refined


def gaussian_kernel(points: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the map of values (C, N) to sum_j k_ij / sqrt(n_i n_j) values_j, with k a Gaussian of deviation
    1 in the distance of `points`, (N, D), n_i = sum_j k_ij, on a permutohedral lattice (Adams et al. 2010).

    Values go to the corners of a point's simplex, spread to the next corners along each axis, and come back.
    A corner is D + 1 integers up to adding 1 to all; its code is their product with `steps`, which sum to 0.
    """
    i = torch.arange(1.0, points.shape[1] + 1)
    basis = torch.ones(len(i), len(i) + 1).tril() - nn.functional.pad(torch.diag(i), (1, 0))
    elevated = points * torch.sqrt(2 / 3 / (i * (i + 1))) @ basis
    part, order = (elevated - elevated.floor()).sort(dim=1, descending=True)
    shares = torch.cat([1 - part[:, :1] + part[:, -1:], part[:, :-1] - part[:, 1:]], dim=1)
    steps = torch.randint(2**48, basis.shape[1:], generator=torch.Generator().manual_seed(0))
    steps[-1] -= steps.sum()
    codes = torch.cat([(elevated.floor().long() @ steps)[:, None], steps.take(order[:, :-1])], dim=1)
    codes, place = codes.cumsum(dim=1).flatten().sort()
    codes, corner, sizes = codes.unique_consecutive(return_inverse=True, return_counts=True)
    corners = torch.empty_like(corner).scatter_(0, place, corner).view_as(order)
    starts = nn.functional.pad(sizes.cumsum(0), (1, 0))  # one more than corners: it takes in nothing, and is
    spread = torch.full((len(steps), len(starts), 2), len(codes))  # the neighbour of those that lack one
    for neighbours, step in zip(spread, steps):
        after = torch.searchsorted(codes, codes + step).clamp(max=len(codes) - 1)
        before = (codes[after] == codes + step).nonzero()[:, 0]
        neighbours[before, 0], neighbours[after[before], 1] = after[before], before
    sources, source_shares = place // len(steps), shares.take(place)
    gather = partial(nn.functional.embedding_bag, mode="sum")

    def filtered(values: torch.Tensor) -> torch.Tensor:
        at_corners = gather(sources, values.T.contiguous(), starts, per_sample_weights=source_shares)
        for neighbours in spread:
            at_corners = 2 * at_corners + gather(neighbours, at_corners)
        return gather(corners, at_corners, per_sample_weights=shares).T

    scale = filtered(torch.ones(1, len(points))).rsqrt()
    return lambda values: scale * filtered(scale * values)


def refine_with_torch_crf(
    probs: np.ndarray,
    features: np.ndarray,
    valid: np.ndarray,
    smooth_px: float,
    smooth_weight: float,
    bilateral_px: float,
    bilateral_std: float,
    bilateral_weight: float,
    iterations: float,
) -> np.ndarray:
    """Return what refine_with_crf does, of the same arguments, where pydensecrf is absent."""
    refined = probs.copy()
    if valid.any():
        at, bands = to_tensor(np.argwhere(valid)), to_tensor(features[:, valid].T) / bilateral_std
        pairs = (smooth_weight, at / smooth_px), (bilateral_weight, torch.cat([at / bilateral_px, bands], 1))
        kernels = [(weight, gaussian_kernel(points)) for weight, points in pairs if weight]
        evidence = to_tensor(probs[:, valid]).clamp(1e-5, 1).log()
        current = evidence.softmax(dim=0)
        for _ in range(int(iterations)):
            current = (evidence + sum(weight * kernel(current) for weight, kernel in kernels)).softmax(dim=0)
        refined[:, valid] = to_array(current)
    return refined


def apply_crf(
    probs: np.ndarray, features: np.ndarray, valid: np.ndarray, settings: Mapping[str, float]
) -> np.ndarray:
    """Return refined probabilities, by pydensecrf where it is installed; `settings` for refine_with_crf."""
    refine = refine_with_crf if densecrf is not None else refine_with_torch_crf
    return refine(probs, features, valid, **settings)


def absorb_small_patches(classes: np.ndarray, valid: np.ndarray, of_class: int, min_size: int) -> None:
    """Give each connected patch of `of_class` below `min_size` px to the commonest class around it, in place.

    Patches are 8-connected; nodata has no say, and a patch with nothing but nodata around it becomes
    background.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        ((classes == of_class) & valid).astype(np.uint8), connectivity=8, ltype=cv2.CV_32S
    )
    for label in range(1, count):
        left, top, width, height, size = stats[label]
        if size >= min_size:
            continue
        box = np.s_[max(top - 1, 0) : top + height + 1, max(left - 1, 0) : left + width + 1]
        patch = labels[box] == label
        ring = (
            cv2.dilate(patch.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) & ~patch & valid[box]
        )
        around = np.bincount(classes[box][ring], minlength=len(CLASS_NAMES))
        classes[box][patch] = around.argmax()


def clean_classes(classes: np.ndarray, valid: np.ndarray, min_speck: int, min_hole: int) -> np.ndarray:
    """Return (H, W) class indices without specks and holes, 0 where nodata.

    Args:
        classes: (H, W) uint8.
        valid: (H, W) bool.
        min_speck: px; smaller patches of glacier, debris or lake are absorbed by what surrounds them; 0 keeps
            all. min_hole: px; smaller patches of other are; 0 keeps all.
    """
    cleaned = np.where(valid, classes, 0).astype(np.uint8)
    for of_class in range(1, len(CLASS_NAMES)):
        absorb_small_patches(cleaned, valid, of_class, min_speck)
    absorb_small_patches(cleaned, valid, 0, min_hole)
    return cleaned


def to_mask(classes: np.ndarray) -> np.ndarray:
    """Return class indices 0 to 3 as the competition's grey values, uint8 of the same shape."""
    return np.asarray(CLASS_VALUES, np.uint8)[classes]


# --- Writing --------------------------------------------------------------------------------------

Writer = Callable[[TileFiles, np.ndarray], None]
PARTIAL_PREFIX = ".mask-"  # and no name of a tile, which may be as long as names can be
ABANDONED_SECONDS = 60.0  # no mask takes so long to write


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that `path` appears whole or not at all, whenever the run is killed."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL_PREFIX, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out a grader that runs as another user
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink()
        raise


def png_writer(folder: Path) -> Writer:
    """Return a function that writes a mask as a PNG with the stem of Band1's file."""

    def write(tile: TileFiles, mask: np.ndarray) -> None:
        encoded = cv2.imencode(".png", mask)[1]
        write_atomically(folder / f"{Path(tile.name).stem}.png", encoded.tobytes())

    return write


def tiff_writer(folder: Path) -> Writer:
    """Return a function that writes a mask as a TIFF named exactly as Band1's file."""

    def write(tile: TileFiles, mask: np.ndarray) -> None:
        encoded = BytesIO()
        tifffile.imwrite(encoded, mask, photometric="minisblack")
        write_atomically(folder / tile.name, encoded.getvalue())

    return write


def remove_abandoned(folder: Path) -> None:
    """Remove what killed runs left unfinished in `folder`, but nothing that another run is writing now."""
    for path in folder.glob(f"{PARTIAL_PREFIX}*.part"):
        try:
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()
        except FileNotFoundError:  # that other run has renamed it
            continue


def prepare_output(folder: PathLike, data: DataSource) -> Path:
    """Return `folder`, made where it is absent.

    Raises:
        InputError: it cannot be made or written to, or is one of the input folders, whose files would be
        overwritten.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        remove_abandoned(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write masks there ({error.strerror}); name a writable folder"
        ) from error
    if any(os.path.isdir(band) and band.samefile(folder) for band in band_folders(data).values()):
        raise InputError(
            f"{folder}: is an input folder, whose files masks would overwrite; name another output folder"
        )
    return folder


# --- One run over a folder ------------------------------------------------------------------------


class TileResult(NamedTuple):
    """The mask of one tile, uint8 (H, W), how many passes it rests on and how long it took; `fault` says why
    it is plain background, None if all went well."""

    tile: TileFiles
    mask: np.ndarray
    passes: int
    seconds: float
    fault: Optional[str]


class Summary(NamedTuple):
    """What a run did, by tile id: the masks, how many passes each rests on, and what went wrong."""

    masks: Dict[str, np.ndarray]
    passes: Dict[str, int]
    faults: Dict[str, str]


def usable_cores() -> int:
    """Return how many cores to use: the least of OMP_NUM_THREADS, CPU affinity and cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, cpu_quota(), int(asked) if asked.isdecimal() else cores))


def cpu_quota() -> int:
    """Return the cores that the cgroup (version 2 or 1) grants, sys.maxsize where it sets no limit."""
    try:
        if Path("/sys/fs/cgroup/cpu.max").is_file():
            quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        else:
            quota, period = (
                Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{part}_us").read_text() for part in ("quota", "period")
            )
        return int(quota) // int(period) if int(quota) > 0 else sys.maxsize
    except (OSError, ValueError):  # no such files, or "max"
        return sys.maxsize


def prepare_torch(threads: int) -> None:
    """Set what makes a CPU fast: the number of threads, and no denormal numbers, of which trained networks
    have many and which cost several times the time of others."""
    np.finfo(np.float32)  # NumPy finds its limits on first use, and warns where denormals are flushed by then
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def best_seconds(network: nn.Module, x: torch.Tensor) -> float:
    """Return the shorter time of two forward passes, after one that does not count."""
    times = []
    with torch.inference_mode():
        for _ in range(3):
            started = time.perf_counter()
            network(x)
            times.append(time.perf_counter() - started)
    return min(times[1:])


def in_fastest_form(model: Model) -> Model:
    """Return the model in the memory format in which a pass on one thread is fastest here.

    Networks and processors differ in which it is. A form whose probabilities differ is not taken.
    """
    x = torch.zeros(1, len(BANDS), WINDOW // 2, WINDOW // 2)
    plain = model.members[0].network
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        same = torch.allclose(plain(x).softmax(1), other(x).softmax(1), atol=1e-4)
    if same and best_seconds(other, x) < best_seconds(plain, x):
        for member in model.members:
            member.network.to(memory_format=torch.channels_last)
    return model


Reading = Tuple[TileFiles, "Future[np.ndarray]"]


def read_ahead(tiles: Sequence[TileFiles], read: Callable[[TileFiles], np.ndarray]) -> Iterator[Reading]:
    """Yield each tile and its image, which is read while those before it are segmented."""
    with ThreadPoolExecutor(1) as pool:
        readings = [pool.submit(read, tile) for tile in tiles[:1]]
        for index, tile in enumerate(tiles):
            readings += [pool.submit(read, following) for following in tiles[index + 1 : index + 2]]
            yield tile, readings.pop(0)


def failed(tile: TileFiles, fault: str) -> TileResult:
    """Return the background mask of a tile that could not be segmented."""
    return TileResult(tile, np.zeros(readable_shape(tile), np.uint8), 0, 0.0, fault)


def segment_tile(
    model: Model, tile: TileFiles, reading: "Future[np.ndarray]", until: float = math.inf
) -> TileResult:
    """Return a tile's mask; a tile that cannot be segmented gets a background mask and the reason."""
    started = time.perf_counter()
    try:
        image = reading.result()
        prediction = predict_classes(model, image, until)
        seconds = time.perf_counter() - started
        return TileResult(tile, to_mask(prediction.classes), prediction.passes, seconds, None)
    except TileError as error:
        return failed(tile, str(error))
    except (RuntimeError, MemoryError, ValueError, cv2.error) as error:  # one tile must not cost the others
        return failed(tile, f"tile {tile.tile_id} ({tile.name}): {type(error).__name__}: {error}")


def read_checked(tile: TileFiles) -> np.ndarray:
    """Return what `read_tile` does, with a warning where the values can hardly be what they should."""
    image = read_tile(tile)
    doubt = implausible_units(image)
    if doubt:
        warn(f"tile {tile.tile_id} ({tile.name}): {doubt}")
    return image


def is_scene(tile: TileFiles) -> bool:
    """Return whether a tile needs windows, and much memory, as its first band's header says."""
    path = next(filter(None, tile.paths))
    try:
        with tifffile.TiffFile(path) as tiff:
            return max(tiff.pages[0].shape[:2]) > LARGEST_TILE
    except Exception:  # damaged bytes may raise almost anything; reading the tile will say what is wrong
        return False


def with_workers(model: Model, tiles: Sequence[TileFiles]) -> Model:
    """Return the model with its threads shared between tiles; those of a scene go to its windows."""
    workers = min(most_workers(model), len(tiles))
    if workers > 1 and any(map(is_scene, tiles)):
        workers = 1
    torch.set_num_threads(threads_of_each(workers))
    return model._replace(workers=workers)


def segment_fully(model: Model, tiles: Sequence[TileFiles]) -> Iterator[TileResult]:
    """Yield the result of every tile after all passes."""
    readings = read_ahead(tiles, read_checked)
    return side_by_side(lambda read: segment_tile(model, *read), readings, model.workers)


def first_pass_only(model: Model) -> Model:
    """Return the model with the least work that gives a mask."""
    return model._replace(passes=model.passes[:1], postprocess=model.postprocess._replace(crf=None))


def segment_quickly(model: Model, tiles: Sequence[TileFiles], last_start: float) -> Iterator[TileResult]:
    """Yield the result of every tile after one pass; what is not begun by `last_start` is background."""
    quick = first_pass_only(model)

    def segment(read: Reading) -> TileResult:
        if time.perf_counter() < last_start:
            return segment_tile(quick, *read)
        return failed(read[0], f"tile {read[0].tile_id}: the time budget was used up; allow more seconds")

    return side_by_side(segment, read_ahead(tiles, read_checked), model.workers)


def segment_further(
    model: Model, tiles: Sequence[TileFiles], seconds: Mapping[str, float], deadline: float
) -> Iterator[TileResult]:
    """Yield results of more passes, as many as fit into each tile's share of the time that is left.

    A tile whose share does not reach for two passes is left out, and keeps its mask of one.

    Args:
        model: with all passes.
        tiles: those that have a mask of one pass.
        seconds: how long that took, by tile id; the shares are in proportion to it.
        deadline: time of `time.perf_counter` at which all has to be done.
    """
    quick = [seconds[tile.tile_id] for tile in tiles]
    after_passes = [0.0]  # what tiles went on after the end of their share: CRF and cleaning

    def segment(numbered: Tuple[int, Reading]) -> Optional[TileResult]:
        number, read = numbered
        part = min(1.0, model.workers * quick[number] / sum(quick[number:]))
        until = share_of_time(deadline - max(after_passes), part)
        if until - time.perf_counter() < 2 * quick[number]:
            return None
        result = segment_tile(model, *read, until)
        after_passes.append(time.perf_counter() - until)
        return result

    for result in side_by_side(segment, enumerate(read_ahead(tiles, read_tile)), model.workers):
        if result and result.fault:
            warn(f"{result.fault}; its mask of one pass stays")
        elif result:
            yield result


def segment_within(
    model: Model, tiles: Sequence[TileFiles], deadline: float, last_start: float
) -> Iterator[TileResult]:
    """Yield results in time: of one pass for every tile, then of more for those that have time left.

    `deadline` and `last_start`: as for `segment_further` and `segment_quickly`.
    """
    seconds: Dict[str, float] = {}
    for result in with_progress(segment_quickly(model, tiles, last_start), len(tiles)):
        if not result.fault:
            seconds[result.tile.tile_id] = result.seconds
        yield result
    todo = [tile for tile in tiles if tile.tile_id in seconds]
    if todo and first_pass_only(model) != model:
        yield from with_progress(segment_further(model, todo, seconds, deadline), len(todo))


def with_progress(results: Iterator[TileResult], total: int) -> Iterator[TileResult]:
    """Pass `results` on; show a bar with an estimate on a terminal, one line a tile elsewhere."""
    started = time.perf_counter()
    bar = tqdm(total=total, unit="tile", file=sys.stderr, disable=not sys.stderr.isatty())
    for done, result in enumerate(results, start=1):
        bar.update()
        if bar.disable:
            left = (time.perf_counter() - started) / done * (total - done)
            outcome = "background (failed)" if result.fault else f"mask, passes: {result.passes}"
            print(
                f"[{done}/{total}] {result.tile.name}: {outcome}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
        if result.fault:
            tqdm.write(f"error: {result.fault}; this tile gets a background mask", file=sys.stderr)
        yield result
    bar.close()


def save_mask(write: Writer, result: TileResult) -> Optional[str]:
    """Write a mask; return why that failed, else None: one tile must not cost the others their masks."""
    try:
        write(result.tile, result.mask)
    except (OSError, ValueError, cv2.error) as error:
        fault = f"the mask of {result.tile.name} cannot be written ({error}); make room or free the name"
        tqdm.write(f"error: {fault}", file=sys.stderr)
        return fault
    return None


def collect(results: Iterator[TileResult], write: Optional[Writer], keep_masks: bool = True) -> Summary:
    """Return a summary of `results`; each mask is written while the next tile is segmented."""
    summary = Summary({}, {}, {})
    saving: Dict[str, "Future[Optional[str]]"] = {}
    with ThreadPoolExecutor(1) as pool:
        for result in results:
            identifier = result.tile.tile_id
            if keep_masks:
                summary.masks[identifier] = result.mask
            summary.passes[identifier] = result.passes
            if result.fault:
                summary.faults[identifier] = result.fault
            if write:
                saving[identifier] = pool.submit(save_mask, write, result)
    for identifier, saved in saving.items():
        fault = saved.result()
        if fault:
            summary.faults.setdefault(identifier, fault)
    return summary


class TimeBudget(NamedTuple):
    """Seconds that a run may take.

    A binding budget is kept even where tiles are left without any pass. One that nobody asked for may be
    exceeded by the first passes, so that thousands of tiles still get their masks.
    """

    seconds: float
    binding: bool


def choose_budget(given: Optional[str], stored: float) -> TimeBudget:
    """Return the time budget: `given`, else the environment's, else the one stored with the weights.

    Raises:
        InputError: it is no number of seconds above 0.
    """
    asked = os.environ.get(TIME_BUDGET_VARIABLE) if given is None else given
    if not asked:
        return TimeBudget(stored, binding=False)
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InputError(f"time budget {asked!r}: expected seconds above 0, or inf for no limit")
    return TimeBudget(seconds, binding=True)


def segment_folder(
    data: DataSource,
    weights: Optional[PathLike],
    write: Optional[Writer],
    time_budget: Optional[str] = None,
    started: Optional[float] = None,
    keep_masks: bool = True,
) -> Summary:
    """Segment all tiles of `data`, hand each mask to `write` as soon as it is ready, and return them all.

    Args:
        data: the tiles.
        weights: the model file, None to look for it.
        write: writes a mask, None to write none.
        time_budget: see `choose_budget`.
        started: time of `time.perf_counter` from which the budget counts, None for now.
        keep_masks: whether they are in the summary; those of thousands of tiles need gigabytes.

    Raises:
        InputError: no tiles, no weights, or a time budget that is none; nothing is written then.
    """
    started = time.perf_counter() if started is None else started
    tiles = find_tiles(data)
    prepare_torch(1)  # loading runs networks on a few pixels, where more threads only wait for each other
    model = with_workers(load_model(find_weights(weights)), tiles)
    budget = choose_budget(time_budget, model.time_budget)
    if model.device.type == "cpu" and len(tiles) * len(model.passes) >= WORTH_TIMING:
        model = in_fastest_form(model)
    if math.isinf(budget.seconds):
        results = with_progress(segment_fully(model, tiles), len(tiles))
    else:
        deadline = started + budget.seconds - max(SPARE_SECONDS, SPARE_PART * budget.seconds)
        results = segment_within(model, tiles, deadline, deadline if budget.binding else math.inf)
    summary = collect(results, write, keep_masks)
    print(closing_line(summary, model, time.perf_counter() - started), file=sys.stderr)
    return summary


def closing_line(summary: Summary, model: Model, seconds: float) -> str:
    """Return a run in one line: tiles, failures, seconds a tile, passes a tile."""
    tiles, passes, most = len(summary.passes), sorted(summary.passes.values()), len(model.passes)
    hint = "" if passes[-1] == most else " (--time-budget inf makes them all)"
    return (
        f"{tiles} tiles, {len(summary.faults)} failed, {seconds / tiles:.2f} s a tile, "
        f"{passes[0]} to {passes[-1]} of {most} passes{hint}"
    )


# --- The doors ------------------------------------------------------------------------------------


def maskgeration(imagepath: DataSource, second: Optional[PathLike] = None) -> Dict[str, np.ndarray]:
    """Segment all tiles; the platform's entry point, whose name the organisers' template spells like this.

    Args:
        imagepath: {"Band1": folder, ...}, or the data folder.
        second: an existing file, or any name that ends in .pth, is taken as weights, as the platform does.
            All else is taken as what its documents promise, a folder, into which masks go named as in Band1
            if it can be written to; a model.pth in it is used.

    Returns:
        {tile id: mask (H, W) uint8 of 0, 85, 170, 255}, background for a tile that could not be read.

    Raises:
        InputError: there are no tiles, or no intact weights.
    """
    if not second or os.path.isfile(second) or Path(second).suffix == ".pth":
        return segment_folder(imagepath, platform_weights(second), None, started=call_started()).masks
    beside_masks = Path(second) / MODEL_FILE
    try:
        write = tiff_writer(prepare_output(second, imagepath))
    except InputError as error:
        warn(f"{error}; masks are returned only")
        write = None
    weights = beside_masks if beside_masks.is_file() else None
    return segment_folder(imagepath, weights, write, started=call_started()).masks


def call_started() -> float:
    """Return the time of `time.perf_counter` from which a call's budget counts.

    The platform imports this file and calls at once, and its clock sees both: then it is the import's start.
    """
    now = time.perf_counter()
    return STARTED if now - STARTED < JUST_IMPORTED else now


def platform_weights(given: Optional[PathLike]) -> Optional[Path]:
    """Return `given` where it exists; else None, with a warning, so that other places are searched."""
    if not given or os.path.isfile(given):
        return Path(given) if given else None
    warn(f"{given}: no such weights file; looking beside solution.py and in the working folder")
    return None


def parse_arguments(arguments: Optional[List[str]]) -> argparse.Namespace:
    """Return `data`, `output`, `named_as_band1` and `weights` from any of the three command lines."""
    parser = argparse.ArgumentParser(
        description="Segment Landsat-8 tiles into glacier masks.", epilog=EXPECTED_LAYOUT, allow_abbrev=False
    )
    parser.add_argument("in_dir", nargs="?", help="data folder; writes one PNG a tile")
    parser.add_argument("out_dir", nargs="?", help="folder for the PNGs")
    parser.add_argument(
        "--data", "--imagepath", dest="data", help="data folder; writes TIFFs named as in Band1"
    )
    parser.add_argument("--out", "--output", dest="output", help="folder for the TIFFs")
    parser.add_argument("--masks", help="accepted for the organisers' template, not used")
    parser.add_argument(
        "--weights", help="model.pth; default: beside this file, in weights/, or in the working folder"
    )
    parser.add_argument(
        "--time-budget",
        metavar="SECONDS",
        help=f"end within so many seconds, inf for no limit; default: {TIME_BUDGET_VARIABLE}, else what the "
        "weights say",
    )
    parsed = parser.parse_args(arguments)
    positional, named = (parsed.in_dir, parsed.out_dir), (parsed.data, parsed.output)
    if all(positional) and not any(named):
        parsed.data, parsed.output, parsed.named_as_band1 = parsed.in_dir, parsed.out_dir, False
    elif all(named) and not any(positional):
        parsed.named_as_band1 = True
    else:
        parser.error("give IN_DIR OUT_DIR, or --data D --masks M --out O, or --imagepath D --output O")
    return parsed


def main(arguments: Optional[List[str]] = None) -> int:
    """Run a command line; return the exit status: 0 done, 1 some tile failed, 2 nothing could be done."""
    args = parse_arguments(arguments)
    try:
        folder = prepare_output(args.output, args.data)
        writer = tiff_writer(folder) if args.named_as_band1 else png_writer(folder)
        summary = segment_folder(args.data, args.weights, writer, args.time_budget, STARTED, keep_masks=False)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if summary.faults else 0


if __name__ == "__main__":
    sys.exit(main())
