"""The data set's own patches: 512 px `.npy` images and masks, and the `slices.geojson` that says where they lie."""

from __future__ import annotations

import itertools
import re
from pathlib import Path, PurePosixPath
from typing import Iterator, Mapping, NamedTuple, Sequence

import geopandas
import numpy as np
import shapely
from rasterio.crs import CRS
from rasterio.warp import transform as transform_points

from prep.ground import WGS84
from prep.hkh import landsat7
from prep.hkh.landsat7 import SceneError, Sun, reading
from prep.hkh.polygons import LEAST_REGION
from prep.hkh.sources import Grid, RawTile, require_names, require_one_each
from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from solution import CLASS_NAMES, warn

PATCH_MARK = re.compile(r"_?img")  # slice_3_img_017.npy has the mask slice_3_mask_017.npy
ORDERS = (  # of the channels of a mask, by their number
    *itertools.permutations(("clean", "debris")),
    *itertools.permutations(("clean", "debris", "any")),
    *itertools.permutations(("clean", "debris", "region")),
)
PUBLISHED = {2: ("clean", "debris")}
SURVEYED = 400  # patches whose masks are looked at before anything is written
ROUNDING = 0.02  # of the glaciers: outlines that were burnt one by one may differ in their edge pixels
UTM_ZONES = range(41, 49)  # of the Hindu Kush Himalaya
IMAGE_COLUMN, SOURCE_COLUMN = "img_slice", "img_source"  # of slices.geojson


class Patch(NamedTuple):
    """An image, its mask, and its outline in longitude and latitude where that is known."""

    image: Path
    mask: Path
    footprint: shapely.Polygon | None


class PatchJob(NamedTuple):
    """The patches of one scene, and which mask channel is what."""

    name: str
    patches: tuple[Patch, ...]
    channels: Mapping[str, int]
    sun: Sun
    order: tuple[str, ...]
    grid: Grid

    def files(self) -> list[Path]:
        """Return all files that the result depends on."""
        return [path for patch in self.patches for path in patch[:2]]

    def meaning(self) -> list:
        """Return what else the result depends on."""
        places = [patch.footprint.wkt if patch.footprint else None for patch in self.patches]
        return [self.name, self.channels, self.sun, self.order, self.grid, places]

    def tiles(self) -> Iterator[RawTile]:
        """Yield the patches one by one. Raises SceneError for files that are damaged or of another shape."""
        table = landsat7.physical_table(list(self.channels), self.sun)
        for patch in self.patches:
            image = load(patch.image, self.grid.size, tuple(landsat7.EXPORTS))
            mask = load(patch.mask, self.grid.size, (len(self.order),))

            def read(image: np.ndarray = image, path: Path = patch.image) -> np.ndarray:
                values = np.stack([image[..., index] for index in self.channels.values()])
                return landsat7.to_physical(landsat7.as_numbers(values, str(path)), table)

            name = PATCH_MARK.sub("", patch.image.stem, count=1)
            yield RawTile(name, None, None, patch_codes(mask, self.order), patch.footprint, read)


def load(path: Path, side: int, depths: Sequence[int]) -> np.ndarray:
    """Return a .npy file, memory-mapped. Raises SceneError where it cannot be read or has another shape."""
    with reading(path):
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    landsat7.require_numbers(values, path)
    if values.ndim != 3 or values.shape[:2] != (side, side) or values.shape[2] not in depths:
        expected = " or ".join(f"({side}, {side}, {depth})" for depth in depths)
        raise SceneError(f"{path}: found shape {values.shape}, expected {expected}; see --tile-size")
    return values


# --- Which patches there are ----------------------------------------------------------------------


def plan_patches(folder: Path, order: str | None, grid: Grid, suns: Mapping[str, Sun]) -> list[PatchJob]:
    """Return a job for the patches of each scene.

    Args:
        folder: holds slice_<scene>_img_<n>.npy and slice_<scene>_mask_<n>.npy, and perhaps slices.geojson.
        order: of the masks' channels, e.g. "any,clean,debris"; None for masks of two as published.

    Raises:
        SceneError: no patches, some without a mask or of another shape, or an order that is not theirs.
    """
    places = read_places(folder)
    scenes: dict[str, list[Patch]] = {}
    for image, mask in find_pairs(folder):
        scene, footprint = places.get(image.stem, (PATCH_MARK.split(image.stem)[0], None))
        scenes.setdefault(scene, []).append(Patch(image, mask, footprint))
    patches = [patch for members in scenes.values() for patch in members]
    unplaced = sum(patch.footprint is None for patch in patches)
    if unplaced:
        warn(
            f"{folder}: where {unplaced:,} of {len(patches):,} patches lie is not known, so that they are split by the "
            "number in their names, and ground that scenes share is not seen; put slices.geojson beside them"
        )
    depths = [int(load(patch.image, grid.size, tuple(landsat7.EXPORTS)).shape[2]) for patch in patches[:1]]
    channels = landsat7.choose_channels([None] * depths[0], str(patches[0].image))
    chosen = choose_order(order, survey(patches, grid.size))
    return [
        PatchJob(name, tuple(members), channels, landsat7.find_sun(Path(name), {}, suns), chosen, grid)
        for name, members in scenes.items()
    ]


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Return the images below a folder with their masks. Raises SceneError where some are missing or double."""
    images = [path for path in sorted(folder.rglob("*.npy")) if PATCH_MARK.search(path.stem)]
    if not images:
        raise SceneError(
            f"{folder}: found no patch, expected slice_<scene>_img_<n>.npy beside slice_<scene>_mask_<n>.npy"
        )
    require_names(images)
    landsat7.require_files(images)
    require_one_each(images)
    pairs = [(path, path.with_name(path.name.replace("img", "mask"))) for path in images]
    lonely = [image.name for image, mask in pairs if not mask.is_file()]
    if lonely:
        raise SceneError(
            f"{folder}: {len(lonely)} patches have no mask ({', '.join(lonely[:3])} for example); expected "
            f"{pairs[0][1].name} beside {pairs[0][0].name}"
        )
    return pairs


# --- What the mask's channels are -----------------------------------------------------------------


def survey(patches: Sequence[Patch], side: int) -> np.ndarray:
    """Return how many pixels have which channels: entry 5 of 8 counts those of the first and the third of three.

    Counted over up to 400 patches, evenly spread. Raises SceneError where masks differ in their channels.
    """
    chosen = patches[:: -(-len(patches) // SURVEYED)]
    depth = load(chosen[0].mask, side, (2, 3)).shape[2]
    weights = 1 << np.arange(depth)
    counts = np.zeros(1 << depth, np.int64)
    for patch in chosen:
        marked = np.asarray(load(patch.mask, side, (depth,))) > 0
        counts += np.bincount((marked @ weights).ravel(), minlength=len(counts))
    return counts


def choose_order(text: str | None, counts: np.ndarray) -> tuple[str, ...]:
    """Return what the masks' channels are: `text`, or the published order of two, if the masks agree with it.

    Raises SceneError: another number of channels, an unknown order, or one that the masks contradict.
    """
    depth = len(counts).bit_length() - 1
    fitting = [",".join(order) for order in ORDERS if len(order) == depth and not contradiction(order, counts)]
    advice = (
        f"pass --mask-order {' or '.join(fitting)}, which the masks agree with"
        if fitting
        else ("no order fits: see docs/hkh.md for what the channels may be")
    )
    if text is None and depth not in PUBLISHED:
        raise SceneError(f"the masks have {depth} channels, whose order differs between copies: {advice}")
    order = tuple(part.strip().lower() for part in text.split(",")) if text else PUBLISHED[depth]
    if order not in ORDERS or len(order) != depth:
        raise SceneError(
            f"--mask-order: found '{text}' for masks of {depth} channels, expected clean,debris, with any or region "
            f"where there are three, in some order; {advice}"
        )
    found = contradiction(order, counts)
    if found:
        raise SceneError(f"--mask-order {','.join(order)}: {found}; {advice}")
    return order


def contradiction(order: Sequence[str], counts: np.ndarray) -> str | None:
    """Return what in the masks says that their channels do not come in this order, or None."""
    entries = np.arange(len(counts))
    has = {name: (entries >> index & 1) == 1 for index, name in enumerate(order)}
    pixels = {name: int(counts[marked].sum()) for name, marked in has.items()}
    if pixels["debris"] > pixels["clean"]:
        return (
            f"debris has {pixels['debris']:,} px and clean ice {pixels['clean']:,}, but clean is the larger in this "
            "data set"
        )
    glacier = has["clean"] | has["debris"]
    union = int(counts[glacier].sum())
    for name in ("any", "region"):
        if name not in has:
            continue
        outside = int(counts[glacier & ~has[name]].sum())
        if outside > ROUNDING * union:
            return f"{outside:,} of {union:,} px of clean ice and debris lie outside of '{name}' ({pixels[name]:,} px)"
        far = pixels[name] > LEAST_REGION * union
        if far != (name == "region"):
            expected = "far more than" if name == "region" else "about"
            return f"'{name}' has {pixels[name]:,} px, expected {expected} the {union:,} px of clean ice and debris"
    return None


def patch_codes(mask: np.ndarray, order: Sequence[str]) -> np.ndarray:
    """Return the label codes, (S, S) uint8, of a patch's mask (S, S, 2 or 3) whose channels come in this order.

    A pixel that is any glacier but of no kind is a glacier of unknown kind; one of both kinds is debris; outside
    of the region nothing is known.
    """
    channel = {name: np.asarray(mask[..., index]) > 0 for index, name in enumerate(order)}
    codes = np.full(mask.shape[:2], OTHER_OR_LAKE, np.uint8)
    if "any" in channel:
        codes[channel["any"]] = GLACIER_OR_DEBRIS
    codes[channel["clean"]] = CLASS_NAMES.index("glacier")
    codes[channel["debris"]] = CLASS_NAMES.index("debris")
    if "region" in channel:
        codes[~channel["region"]] = IGNORE
    return codes


# --- Where they lie -------------------------------------------------------------------------------


def read_places(folder: Path) -> dict[str, tuple[str, shapely.Polygon]]:
    """Return {stem of the image: (scene, outline in longitude and latitude)} by the geojson beside the patches.

    Raises SceneError: a file that cannot be read or lacks a column.
    """
    files = [*folder.rglob("*.geojson"), *folder.parent.glob("slices*.geojson")]
    places: dict[str, tuple[str, shapely.Polygon]] = {}
    for path in sorted(set(files), key=lambda path: (path.stat().st_size, path)):  # whole lists after parts of them
        landsat7.require_files([path])
        with reading(path):
            table = geopandas.read_file(path)
        missing = [name for name in (IMAGE_COLUMN, SOURCE_COLUMN) if name not in table]
        if missing or table.crs is None:
            raise SceneError(
                f"{path}: found the columns {', '.join(table.columns)[:200]}, expected {IMAGE_COLUMN} and "
                f"{SOURCE_COLUMN}, and a coordinate system; download it again, or move it elsewhere"
            )
        table = table[~(table.geometry.isna() | table.is_empty)]
        for source, members in table.groupby(SOURCE_COLUMN):
            scene = PurePosixPath(str(source)).stem
            stems = [PurePosixPath(str(name)).stem for name in members[IMAGE_COLUMN]]
            places |= {stem: (scene, shape) for stem, shape in zip(stems, outlines(scene, stems, members))}
    return places


def outlines(scene: str, stems: Sequence[str], table: geopandas.GeoDataFrame) -> Iterator[shapely.Polygon]:
    """Return where the patches of a scene lie, as polygons in longitude and latitude.

    Two faults of the published file are mended. Patches are cut from the top of a scene and their outlines were
    counted from its bottom, so they are turned over; since the scene's upper edge is not known, each then reaches
    one patch farther up. And one coordinate system is named for scenes of several UTM zones.
    """
    west, south, east, north = table.bounds.to_numpy().T
    numbers = np.array([int(re.sub(r"\D", "", stem.rsplit("_", 1)[-1]) or 0) for stem in stems])
    if ((numbers - numbers.mean()) * (south - south.mean())).sum() > 0:  # a later one lies farther up
        south, north = south.min() + north.max() - north, south.min() + north.max() - south + (north - south)
    crs = own_zone(scene, table.crs, float((west.min() + east.max()) / 2), float((south.min() + north.max()) / 2))
    yield from geopandas.GeoSeries(shapely.box(west, south, east, north), crs=crs).to_crs(WGS84)


def own_zone(scene: str, crs: CRS, x: float, y: float) -> str:
    """Return the coordinate system in which a point of a scene lies nearest to where its name says it is."""
    taken, epsg = landsat7.read_name(scene), crs.to_epsg()
    if taken is None or epsg is None or epsg - 32600 not in UTM_ZONES:
        return crs.to_wkt()
    zones = [f"EPSG:{32600 + zone}" for zone in UTM_ZONES]
    return min(zones, key=lambda zone: abs(transform_points(zone, WGS84, [x], [y])[0][0] - taken.centre()[0]))
