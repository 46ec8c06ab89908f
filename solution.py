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

import argparse
import inspect
import os
import re
import sys
import tempfile
import time
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

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
GLACIER_GROUP = (1, 2)  # glacier of either kind, which the labels know best,
REST_GROUP = (0, 3)  # and what is none

STRIDE = 32  # the coarsest feature map of the encoders: image sides are padded to a multiple of it
LARGEST_TILE = 1024  # px; larger images are processed in windows
WINDOW = 512  # px, the size of the training tiles
OVERLAP = 128  # px shared by neighbouring windows, where their probabilities are blended
DEFAULT_SHAPE = (512, 512)  # of the mask for a tile of which no band can be read

TIFF_SUFFIXES = (".tif", ".tiff")
GDAL_NODATA_TAG = 42113
# Fill values in use for signed rasters. In an int16 file that was cast from uint16 they may also be the
# measurements 55537 and 32768, which are then lost: single pixels, against whole areas of fill.
SIGNED_FILL_VALUES = (-9999, -32768)
PLAUSIBLE_KELVIN = (180.0, 360.0)  # surface temperatures on Earth, with a margin

MODEL_FILE = "model.pth"
MODEL_FORMAT = "glacier-kit/1"
EXPECTED_LAYOUT = (
    "expected a folder with Band1, Band2, Band3, Band4 and Band5 in it, each with one TIFF a tile that "
    "shares its tile id with the other bands (img001.tif everywhere, or B2_B2_masked_02_07.tif in Band1 and "
    "B10_B10_masked_02_07.tif in Band5)"
)

PathLike = Union[str, Path]
DataSource = Union[str, Path, Mapping[str, PathLike]]


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
    if isinstance(data, Mapping):
        named = {str(name): Path(folder) for name, folder in data.items()}
    else:
        root = Path(data)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; {EXPECTED_LAYOUT}")
        named = {entry.name: entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    folders = {band_number(name): folder for name, folder in named.items() if band_number(name)}
    if not folders:
        where = "the mapping given" if isinstance(data, Mapping) else str(data)
        found = ", ".join(sorted(named)[:10]) or "nothing"
        raise InputError(f"{where}: no band folders, found {found}; {EXPECTED_LAYOUT}")
    return folders


def list_band(folder: Path) -> Dict[str, Path]:
    """Return {tile id: file} for the TIFFs of one band folder; a missing folder has none."""
    if not folder.is_dir():
        return {}
    files: Dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
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
        TileError: the file cannot be read as a TIFF.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            tag = page.tags.get(GDAL_NODATA_TAG)
            return decode_page(page, path), parse_nodata(tag)
    except Exception as error:  # a damaged TIFF may raise almost anything from within its decoder
        size = path.stat().st_size if path.is_file() else "no"
        raise TileError(
            f"{path}: cannot be read as a TIFF ({size} bytes; {type(error).__name__}: {error}); "
            "copy or export the file again"
        ) from error


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
    """Return one band as stored, (H, W) float32, NaN where nodata: 0, the declared nodata value, NaN and
    infinities.

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
    first = read_raster(files.paths[0])
    image = np.empty(
        first.shape + (len(BANDS),), np.float32
    )  # filled band by band: a scene is never held twice
    for index, (band, path) in enumerate(zip(BANDS, files.paths)):
        values = first if index == 0 else read_raster(path)
        if values.shape != first.shape:
            raise TileError(
                f"{path}: {values.shape[1]} x {values.shape[0]} px, expected {first.shape[1]} x "
                f"{first.shape[0]} px as in {files.paths[0].name}; resample the bands to one grid"
            )
        image[..., index] = to_physical(values, band)
    return image


def readable_shape(files: TileFiles) -> Tuple[int, int]:
    """Return a broken tile's size (H, W) from its first readable band, else DEFAULT_SHAPE."""
    for path in filter(None, files.paths):
        try:
            return read_raster(path).shape
        except TileError:
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


class CoarseUnet(nn.Module):
    """A U-Net that sees the image at 1/`factor` of its resolution, and whose logits are enlarged again.

    Glaciers are large against a pixel of 30 m: for the same work a step covers `factor`^2 times the area.
    """

    def __init__(self, factor: int = 2, **args: Any) -> None:
        super().__init__()
        self.factor = factor
        self.unet = smp.Unet(**args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 4, H, W) of normalised bands (B, 5, H, W); H and W are multiples of STRIDE."""
        coarse = nn.functional.avg_pool2d(x, self.factor)
        height, width = coarse.shape[2:]
        logits = self.unet(pad_to_multiple(coarse))[:, :, :height, :width]
        return nn.functional.interpolate(
            logits, scale_factor=self.factor, mode="bilinear", align_corners=False
        )


NETWORKS: Dict[str, Callable[..., nn.Module]] = {
    "Unet": smp.Unet,
    "CoarseUnet": CoarseUnet,
    "UnetPlusPlus": smp.UnetPlusPlus,
    "FPN": smp.FPN,
    "DeepLabV3Plus": smp.DeepLabV3Plus,
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

    A convolution that runs twice is left out: it may feed two of them.
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
    runs = [conv for _, conv in outputs]
    return [
        (conv, inputs[id(output)])
        for output, conv in outputs
        if id(output) in inputs and runs.count(conv) == 1
    ]


def fold_batchnorm(network: nn.Module) -> int:
    """Merge BatchNorms into the convolutions before them, in place and for evaluation; return how many.

    Exact where nothing but its BatchNorm reads such a convolution's output, as in the networks above.
    """
    pairs = batchnorms_after_convolutions(network.eval())
    for conv, bn in pairs:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
    merged = {id(batchnorm) for _, batchnorm in pairs}
    for module in list(network.modules()):
        for name, child in module.named_children():
            if id(child) in merged:
                setattr(module, name, nn.Identity())
    return len(pairs)


# --- Weights --------------------------------------------------------------------------------------


class Member(NamedTuple):
    """One network of the ensemble, its weight in the average and the statistics it was trained with."""

    network: nn.Module
    weight: float
    normalization: Mapping[str, List[float]]


class Postprocess(NamedTuple):
    """Which steps follow the forward passes; `model.pth` stores what out-of-fold MCC decided."""

    views: int = 6  # the first so many of VIEWS
    extent_bias: float = 0.0  # added to the log-odds of glacier of either kind
    crf: Optional[Mapping[str, float]] = None  # the arguments of refine_with_crf, None to skip it
    min_speck: int = 100  # px, smaller patches of a glacier or lake class go to what surrounds them
    min_hole: int = 50  # px, smaller gaps in them are filled


class Model(NamedTuple):
    """All that prediction needs, as read from `model.pth`."""

    members: Tuple[Member, ...]
    class_bias: Tuple[float, ...]  # added to the log-probability of each class within its group
    postprocess: Postprocess
    device: torch.device


def find_weights(given: Optional[PathLike] = None) -> Path:
    """Return the weights file: `given`, else model.pth beside this file, in its `weights/`, or in the working
    folder.

    Raises:
        InputError: there is none; it lists where it was looked for.
    """
    if given is not None:
        if Path(given).is_file():
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
    absent = [key for key in ("members", "class_bias", "postprocess") if not content.get(key)]
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


def load_member(stored: Mapping, source: str, device: torch.device) -> Member:
    """Return one member of a model file, ready for inference on `device`."""
    network = build_network(stored["arch"])
    load_state(network, stored["state_dict"], source)
    fold_batchnorm(network)
    network.requires_grad_(False)
    return Member(network.to(device), float(stored["weight"]), stored["normalization"])


def check_settings(members: Sequence[Member], class_bias: Sequence[float], postprocess: Postprocess) -> None:
    """Raise ValueError where settings would fail at every tile: lists of a wrong length, CRF arguments."""
    lengths = {"class_bias": (len(class_bias), len(CLASS_NAMES))}
    for number, member in enumerate(members):
        for key in ("mean", "std"):
            found = len(member.normalization[key])
            lengths[f"{key} in normalization of member {number}"] = (found, len(BANDS))
    wrong = [f"{found} values in {name}, expected {n}" for name, (found, n) in lengths.items() if found != n]
    if wrong:
        raise ValueError("; ".join(wrong))
    if postprocess.crf:
        try:
            inspect.signature(refine_with_crf).bind(None, None, None, **postprocess.crf)
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
        postprocess = Postprocess(**content["postprocess"])
        check_settings(members, content["class_bias"], postprocess)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: {type(error).__name__}: {error}; pack it again with `python -m train pack`"
        ) from error
    if postprocess.crf and densecrf is None:
        warn("pydensecrf cannot be imported: masks are written without the CRF that the weights ask for")
    return Model(members, tuple(content["class_bias"]), postprocess, device)


# --- Passes ---------------------------------------------------------------------------------------

Transform = Callable[[torch.Tensor], torch.Tensor]


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


def ensemble_probabilities(model: Model, image: np.ndarray, views: Sequence[View]) -> np.ndarray:
    """Return the weighted mean of class probabilities over members and views, (4, H, W) float32."""
    height, width = image.shape[:2]
    total = torch.zeros(1, len(CLASS_NAMES), 1, 1, device=model.device)
    with torch.inference_mode():
        for member in model.members:
            x = torch.from_numpy(normalize(image, member.normalization))[None].to(model.device)
            x = pad_to_multiple(x)
            for view in views:
                total = total + member.weight * forward_probabilities(member.network, x, view)
    total = total / total.sum(dim=1, keepdim=True)
    return total[0, :, :height, :width].cpu().numpy()


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
    glacier = probs[list(GLACIER_GROUP)].sum(axis=0) > probs[list(REST_GROUP)].sum(axis=0)
    kind, other = (
        np.asarray(group, np.uint8)[probs[list(group)].argmax(axis=0)]
        for group in (GLACIER_GROUP, REST_GROUP)
    )
    return np.where(glacier, kind, other)


def predict_window(model: Model, image: np.ndarray) -> np.ndarray:
    """Return the class probabilities (4, H, W) float32 of an image (H, W, 5) small enough for one pass."""
    if not valid_mask(image).any():  # nothing was seen: certain background, without a forward pass
        certain = np.zeros((len(CLASS_NAMES),) + image.shape[:2], np.float32)
        certain[0] = 1
        return certain
    probs = ensemble_probabilities(model, image, VIEWS[: model.postprocess.views])
    probs = apply_bias(probs, model.class_bias, model.postprocess.extent_bias)
    if model.postprocess.crf and densecrf is not None:
        features = normalize(image, model.members[0].normalization)
        probs = refine_with_crf(probs, features, valid_mask(image), **model.postprocess.crf)
    return probs


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


def predict_scene(model: Model, image: np.ndarray) -> np.ndarray:
    """Return blended scores (4, H, W) float32 of a large image from overlapping windows."""
    height, width = image.shape[:2]
    total = np.zeros((len(CLASS_NAMES), height, width), np.float32)
    for top in window_starts(height):
        for left in window_starts(width):
            window = np.s_[top : top + WINDOW, left : left + WINDOW]
            probs = predict_window(model, image[window])
            total[(slice(None),) + window] += probs * blend_weights(*probs.shape[1:])
    return total  # the scale of a pixel's weights does not matter to what follows: only their order does


def predict_classes(model: Model, image: np.ndarray) -> np.ndarray:
    """Return the class index of each pixel, (H, W) uint8, for a tile or scene (H, W, 5) in physical units."""
    fits = max(image.shape[:2]) <= LARGEST_TILE
    probs = predict_window(model, image) if fits else predict_scene(model, image)
    return clean_classes(
        decide_classes(probs), valid_mask(image), model.postprocess.min_speck, model.postprocess.min_hole
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


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that `path` appears whole or not at all, whenever the run is killed."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
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
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write masks there ({error.strerror}); name a writable folder"
        ) from error
    if any(band.is_dir() and band.samefile(folder) for band in band_folders(data).values()):
        raise InputError(
            f"{folder}: is an input folder, whose files masks would overwrite; name another output folder"
        )
    return folder


# --- One run over a folder ------------------------------------------------------------------------


class TileResult(NamedTuple):
    """The mask of one tile, uint8 (H, W); `fault` says why it is plain background, None if all went well."""

    tile: TileFiles
    mask: np.ndarray
    fault: Optional[str]


class Summary(NamedTuple):
    """What a run did."""

    masks: Dict[str, np.ndarray]
    faults: Dict[str, str]


def usable_cores() -> int:
    """Return how many cores to use: the least of OMP_NUM_THREADS, CPU affinity and cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, cpu_quota(), int(asked) if asked.isdigit() else cores))


def cpu_quota() -> float:
    """Return the cores that the cgroup (version 2 or 1) grants, infinity where it sets no limit."""
    try:
        if Path("/sys/fs/cgroup/cpu.max").is_file():
            quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        else:
            quota, period = (
                Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{part}_us").read_text() for part in ("quota", "period")
            )
        return int(quota) // int(period) if int(quota) > 0 else float("inf")
    except (OSError, ValueError):  # no such files, or "max"
        return float("inf")


def segment_tile(model: Model, tile: TileFiles) -> TileResult:
    """Return a tile's mask; a tile that cannot be segmented gets a background mask and the reason."""
    try:
        image = read_tile(tile)
        doubt = implausible_units(image)
        if doubt:
            warn(f"tile {tile.tile_id} ({tile.name}): {doubt}")
        return TileResult(tile, to_mask(predict_classes(model, image)), None)
    except TileError as error:
        fault = str(error)
    except (RuntimeError, MemoryError, ValueError) as error:  # one tile must not cost the others their masks
        fault = f"tile {tile.tile_id} ({tile.name}): {type(error).__name__}: {error}"
    return TileResult(tile, np.zeros(readable_shape(tile), np.uint8), fault)


def with_progress(results: Iterator[TileResult], total: int) -> Iterator[TileResult]:
    """Pass `results` on; show a bar with an estimate on a terminal, one line a tile elsewhere."""
    started = time.perf_counter()
    bar = tqdm(total=total, unit="tile", file=sys.stderr, disable=not sys.stderr.isatty())
    for done, result in enumerate(results, start=1):
        bar.update()
        if bar.disable:
            left = (time.perf_counter() - started) / done * (total - done)
            outcome = "background (failed)" if result.fault else "mask"
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
    except OSError as error:
        fault = f"the mask of {result.tile.name} cannot be written ({error}); make room or free the name"
        tqdm.write(f"error: {fault}", file=sys.stderr)
        return fault
    return None


def segment_folder(data: DataSource, weights: Optional[PathLike], write: Optional[Writer]) -> Summary:
    """Segment all tiles of `data`, hand each mask to `write` as soon as it is ready, and return them all.

    Raises:
        InputError: no tiles or no weights; nothing is written then.
    """
    started = time.perf_counter()
    tiles = find_tiles(data)
    torch.set_num_threads(usable_cores())
    torch.set_flush_denormal(True)  # trained networks slow down several-fold on the CPU without it
    model = load_model(find_weights(weights))
    summary = Summary({}, {})
    for result in with_progress((segment_tile(model, tile) for tile in tiles), len(tiles)):
        summary.masks[result.tile.tile_id] = result.mask
        unsaved = save_mask(write, result) if write else None
        if result.fault or unsaved:
            summary.faults[result.tile.tile_id] = result.fault or unsaved
    seconds = (time.perf_counter() - started) / len(tiles)
    print(f"{len(tiles)} tiles, {len(summary.faults)} failed, {seconds:.2f} s a tile", file=sys.stderr)
    return summary


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
    if second is None or Path(second).is_file() or Path(second).suffix == ".pth":
        return segment_folder(imagepath, platform_weights(second), None).masks
    beside_masks = Path(second) / MODEL_FILE
    try:
        write = tiff_writer(prepare_output(second, imagepath))
    except InputError as error:
        warn(f"{error}; masks are returned only")
        write = None
    return segment_folder(imagepath, beside_masks if beside_masks.is_file() else None, write).masks


def platform_weights(given: Optional[PathLike]) -> Optional[Path]:
    """Return `given` where it exists; else None, with a warning, so that other places are searched."""
    if given is None or Path(given).is_file():
        return Path(given) if given is not None else None
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
        summary = segment_folder(args.data, args.weights, writer)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if summary.faults else 0


if __name__ == "__main__":
    sys.exit(main())
