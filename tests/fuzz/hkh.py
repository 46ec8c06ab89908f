"""Hands hostile scenes, outlines, mask files and patches to `prep hkh`, and judges what comes out.

A case is one run over a small data set in which every file has a form of its own and of which a part may be
damaged. It ends well in a whole store, or in an error that names a file and a remedy and leaves no store.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Callable, NamedTuple

import geopandas
import numpy as np
import rasterio
import shapely
from hkh_helpers import rewrite, write_patches
from rasterio.crs import CRS

from fuzz import rasters
from fuzz.runs import Found, call, judge_end, note, snapshot
from prep.__main__ import main as prep_main
from prep.labels import CODE_NAMES
from prep.store import StoreError, TileStore
from prep.synthetic.hkh import LABELS_FILE, SCENES_FOLDER, write_hkh_sample

REMEDIES = (
    "copy or",
    "xport",
    "expected",
    "add",
    "remove",
    "name ",
    "free space",
    "change the order",
    "rename",
    "check the files",
    "pass --",
    "leave --",
)
# Whole data sets may have nothing to train on: scenes that are all nodata, for one. And one damaged mask may speak
# against the order of all.
EMPTY = ("no valid pixel", "no tile is worth keeping", "at least 2 are needed to split", "--mask-order")
SCENES, SIDE, TILE = 3, 96, 48  # px
SUFFIXES = (".shp", ".shx", ".dbf", ".prj")
Random = np.random.Generator
Spoil = Callable[[Random, Path], None]


class Case(NamedTuple):
    """The arguments of one run, and the files in it that are damaged."""

    arguments: list[str]
    damaged: list[Path]


# --- Forms of a whole scene -----------------------------------------------------------------------


def plain(rng: Random, path: Path) -> None:
    """Leave the scene as it is."""


def other_type(rng: Random, path: Path) -> None:
    """Store the digital numbers in a wider type."""
    dtype = str(rng.choice(["uint16", "int16", "float32", "float64"]))
    rewrite(path, lambda values: values.astype(dtype))


def other_layout(rng: Random, path: Path) -> None:
    """Write strips or tiles, another compression or byte order, or a BigTIFF."""
    profile: dict = {
        "compress": str(rng.choice(["none", "deflate", "lzw"])),
        "tiled": bool(rng.random() < 0.5),
    }
    profile |= {"blockxsize": 16, "blockysize": 16} if profile["tiled"] else {}
    profile |= {"interleave": str(rng.choice(["pixel", "band"])), "BIGTIFF": str(rng.choice(["YES", "NO"]))}
    with rasterio.open(path) as file:
        values, names, tags = file.read(), file.descriptions, file.tags()
        kept = {key: file.profile[key] for key in ("driver", "dtype", "width", "height", "crs", "transform")}
    path.unlink()
    with rasterio.open(path, "w", **{**kept, "count": len(values), **profile}) as file:
        file.write(values)
        file.descriptions = names
        file.update_tags(**tags)


def undescribed(rng: Random, path: Path) -> None:
    """Take the names of the bands away; keep all of them or the first eight."""
    count = int(rng.choice([8, 15]))
    rewrite(path, lambda values: values[:count], descriptions=None)


def with_nodata(rng: Random, path: Path) -> None:
    """Declare a nodata value, of a type that may not hold it."""
    rewrite(path, lambda values: values.astype(np.float32), nodata=float(rng.choice([0, 255, np.nan, -9999])))


def noise(rng: Random, path: Path) -> None:
    """Fill the scene with random digital numbers."""
    rewrite(path, lambda values: rng.integers(0, 256, values.shape).astype(np.uint8))


def constant(rng: Random, path: Path) -> None:
    """Fill the scene with one number, or with nodata."""
    rewrite(path, lambda values: np.full_like(values, int(rng.choice([0, 1, 255]))))


def filled(rng: Random, path: Path) -> None:
    """Store what Earth Engine's gap filling predicts: fractions, some of them beyond 0 to 255, NaN outside."""

    def predict(values: np.ndarray) -> np.ndarray:
        predicted = values * rng.uniform(0.9, 1.1) + rng.normal(0, 3, values.shape)
        return np.where(values == 0, np.nan, predicted).astype(np.float32)

    rewrite(path, predict)


def without_sun(rng: Random, path: Path) -> None:
    """Take the sun's elevation away."""
    with rasterio.open(path, "r+") as file:
        file.update_tags(SUN_ELEVATION="")


FORMS: tuple[Spoil, ...] = (
    plain,
    plain,
    plain,
    other_type,
    other_layout,
    undescribed,
    with_nodata,
    noise,
    constant,
    filled,
)

# --- Damage ---------------------------------------------------------------------------------------


def bytes_of(rng: Random, path: Path) -> None:
    """Damage the bytes of a file."""
    name = str(rng.choice(list(rasters.DAMAGES)))
    path.write_bytes(rasters.DAMAGES[name](rng, path.read_bytes()))


def wrong_numbers(rng: Random, path: Path) -> None:
    """Store values that are no digital numbers."""
    bad = float(rng.choice([-1, 256, 0.5, np.inf, -np.inf, 3.4e38, 65535]))
    rewrite(path, lambda values: np.where(rng.random(values.shape) < 0.01, bad, values).astype(np.float32))


def wrong_place(rng: Random, path: Path) -> None:
    """Give the scene no coordinate system, an odd one, or a transform that no scene has."""
    step = float(rng.choice([0.0, 1e-300, 1e300, np.nan, -30.0, 30.0]))
    transforms = [
        rasterio.Affine(step, 0, 5e5, 0, -30, 3.5e6),
        rasterio.Affine(30, 0, 1e30, 0, -30, np.inf),
        rasterio.Affine(21, 21, 5e5, -21, 21, 3.5e6),
        rasterio.Affine(0, 0, 0, 0, 0, 0),
    ]
    odd = [None, CRS.from_epsg(4326), CRS.from_epsg(3031), CRS.from_epsg(3857), CRS.from_epsg(4978)]
    profile: dict = {"transform": transforms[int(rng.integers(4))]} if rng.random() < 0.6 else {}
    profile |= {"crs": odd[int(rng.integers(5))]} if not profile or rng.random() < 0.3 else {}
    rewrite(path, **profile)


def wrong_names(rng: Random, path: Path) -> None:
    """Describe the bands in another way."""
    with rasterio.open(path) as file:
        count = file.count
    kinds = [["B1"] * 15, ["é\n%s"] * 15, [f"b{n}" for n in range(15)], ["x" * 3000] * 15]
    names = kinds[int(rng.integers(4))][:count]
    rewrite(path, descriptions=names)


def wrong_sun(rng: Random, path: Path) -> None:
    """Write an elevation of the sun that there is none of."""
    with rasterio.open(path, "r+") as file:
        file.update_tags(SUN_ELEVATION=str(rng.choice(["abc", "nan", "-5", "91", "1e400", "0", "45,5"])))


def other_channels(rng: Random, path: Path) -> None:
    """Leave some bands out."""
    count = int(rng.integers(1, 15))
    rewrite(path, lambda values: values[:count], descriptions=None)


def in_the_way(rng: Random, path: Path) -> None:
    """Replace the file by what is none: a folder, a pipe, a link to itself or to nothing, an empty file."""
    path.unlink()
    kinds: list[Callable[[], object]] = [
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        path.touch,
        lambda: None,
    ]
    kinds[int(rng.integers(len(kinds)))]()


def twin(rng: Random, path: Path) -> None:
    """Put a second file of the same stem beside it."""
    shutil.copy(path, path.with_suffix(".TIFF"))


def other_size(rng: Random, path: Path) -> None:
    """Cut the scene to a line, a column or a pixel."""
    height, width = [(1, SIDE), (SIDE, 1), (1, 1), (7, 5)][int(rng.integers(4))]
    rewrite(path, lambda values: values[:, :height, :width], height=height, width=width)


SCENE_DAMAGES: tuple[Spoil, ...] = (
    bytes_of,
    bytes_of,
    bytes_of,
    wrong_numbers,
    wrong_place,
    wrong_names,
    wrong_sun,
    other_channels,
    in_the_way,
    twin,
    other_size,
    without_sun,
)


# --- Outlines -------------------------------------------------------------------------------------


def odd_shapes(rng: Random, table: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
    """Replace some outlines by shapes that are no outlines, or not of this world."""
    box = shapely.box(*table.total_bounds)
    bow = shapely.Polygon([(0, 0), (1, 1), (1, 0), (0, 1)])
    (x0, y0, x1, y1) = table.total_bounds
    bow = shapely.transform(bow, lambda xy: xy * [x1 - x0, y1 - y0] + [x0, y0])
    shapes = [
        None,
        shapely.Polygon(),
        shapely.Point(x0, y0),
        shapely.LineString([(x0, y0), (x1, y1)]),
        bow,
        shapely.box(-1e9, -1e9, 1e9, 1e9),
        shapely.box(-180, -90, 180, 90),
        shapely.Polygon([(x0, y0), (np.inf, y0), (x1, y1)]),
        shapely.Polygon([(x0, y0), (np.nan, y0), (x1, y1)]),
        shapely.force_3d(box, 5000.0),
        shapely.Polygon([(x0, y0)] * 4),
        shapely.GeometryCollection([box, shapely.Point(x0, y0)]),
        shapely.MultiPolygon([box, box]),
        box.difference(shapely.affinity.scale(box, 0.5, 0.5)),
    ]
    chosen = rng.choice(len(table), size=min(len(table), 3), replace=False)
    geometry = table.geometry.tolist()
    for index in chosen:
        geometry[index] = shapes[int(rng.integers(len(shapes)))]
    return geopandas.GeoDataFrame({"Glaciers": table["Glaciers"]}, geometry=geometry, crs=table.crs)


def odd_values(rng: Random, table: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
    """Replace the classes by values of other types and words, or the column's name."""
    kinds: list[list] = [
        [None] * len(table),
        [7] * len(table),
        [2.5] * len(table),
        ["Gletscher é\n"] * len(table),
        ["clean debris"] * len(table),
        ["", "Clean ice"] * len(table),
        ["x" * 250] * len(table),
    ]
    values = kinds[int(rng.integers(len(kinds)))][: len(table)]
    name = "Glaciers" if rng.random() < 0.8 else str(rng.choice(["glaciers", "class"]))
    kept = rng.random(len(table)) < 0.3
    mixed = [old if keep and isinstance(new, str) else new for keep, old, new in zip(kept, table["Glaciers"], values)]
    return geopandas.GeoDataFrame({name: mixed}, geometry=table.geometry.tolist(), crs=table.crs)


def other_system(rng: Random, table: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
    """Write the outlines in another coordinate system, in one that is not theirs, or in none."""
    if rng.random() < 0.5:
        return table.to_crs(int(rng.choice([32644, 3857, 4978, 3035])))
    return table.set_crs(None if rng.random() < 0.5 else int(rng.choice([32644, 3031])), allow_override=True)


def no_rows(rng: Random, table: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
    """Leave no outline, or a single one."""
    return table.iloc[: int(rng.integers(2))]


def damage_outlines(rng: Random, path: Path) -> Path:
    """Damage the outlines at `path` in one way; return the file that holds them now."""
    kind = rng.random()
    if kind < 0.5:  # one of the files that a shapefile consists of
        part = path.with_suffix(str(rng.choice(SUFFIXES)))
        (in_the_way if rng.random() < 0.25 else bytes_of)(rng, part)
        return path
    change = (odd_shapes, odd_shapes, odd_values, other_system, no_rows)[int(rng.integers(5))]
    table = change(rng, geopandas.read_file(path))
    suffix = str(rng.choice([".shp", ".gpkg", ".geojson"]))
    target = path.with_name(f"outlines{suffix}")
    try:
        table.to_file(target)
    except Exception:  # GDAL refuses some shapes in some formats
        return path
    if rng.random() < 0.1:
        bytes_of(rng, target)
    return target


# --- Cases ----------------------------------------------------------------------------------------


def prepare_base(work: Path) -> Path:
    """Write a whole data set of each kind: scenes with outlines and mask files, and patches."""
    base = work / "base"
    write_hkh_sample(base, SCENES, SIDE, seed=1)
    write_patches(base / "patches", side=TILE)
    (base / "masks").mkdir()
    rng = np.random.default_rng(0)
    for scene in sorted((base / SCENES_FOLDER).iterdir()):
        with rasterio.open(scene) as file:
            profile = {**file.profile, "count": 1}
            shape = file.shape
        for word in ("clean", "debris"):
            with rasterio.open(base / "masks" / f"{scene.stem}_{word}.tif", "w", **profile) as file:
                file.write((rng.random(shape) < 0.5).astype(np.uint8), 1)
    return base


def vary_scenes(rng: Random, data: Path) -> list[Path]:
    """Give each scene a form, and one of them some name; return their paths."""
    for path in sorted((data / SCENES_FOLDER).iterdir()):
        FORMS[int(rng.integers(len(FORMS)))](rng, path)
    first = sorted((data / SCENES_FOLDER).iterdir())[0]
    if rng.random() < 0.2 and not (data / "masks").exists():
        names = ["a scene é", os.fsdecode(b"scene\xe9"), "-scene", "s" * 200, "a.b.c"]
        first.rename(first.with_name(f"{names[int(rng.integers(len(names)))]}.tif"))
    return sorted((data / SCENES_FOLDER).iterdir())


def damage_one(rng: Random, paths: list[Path], damages: tuple[Spoil, ...]) -> list[Path]:
    """Damage one or two files; return them."""
    chosen = rng.choice(len(paths), size=1 if rng.random() < 0.8 else 2, replace=False)
    for index in chosen:
        damages[int(rng.integers(len(damages)))](rng, paths[index])
    return [paths[index] for index in chosen]


def outline_case(rng: Random, base: Path, data: Path, damage: str) -> Case:
    """Lay out scenes and their outlines, with `damage` to one of them or none."""
    for part in (SCENES_FOLDER, "labels"):
        shutil.copytree(base / part, data / part)
    labels = data / LABELS_FILE
    paths = vary_scenes(rng, data)
    damaged = [path for path in paths if not path.name.isprintable()]  # which GDAL cannot open
    if damage == "scenes":
        damaged += damage_one(rng, paths, SCENE_DAMAGES)
    elif damage == "labels":
        labels = damage_outlines(rng, labels)
        damaged.append(labels)
    arguments = ["--scenes", str(data / SCENES_FOLDER), "--labels", str(labels)]
    if damage == "sun":
        sun = write_sun(rng, data / "sun.csv", [path.stem for path in paths])
        damaged.append(sun)
        arguments += ["--sun", str(sun)]
    return Case(arguments, damaged)


def write_sun(rng: Random, path: Path, stems: list[str]) -> Path:
    """Write a table of the sun that is damaged in some way."""
    rows = ["scene,sun_elevation"] + [f"{stem},45" for stem in stems]
    text = "\n".join(rows).encode("utf-8", "surrogateescape")
    kinds = [
        text.replace(b"45", b"abc"),
        text.replace(b",45", b""),
        text.replace(b"scene,", b"name,"),
        text.replace(b"\n", b"\r\n") + b"\r\n",
        b"\xff\xfe" + text,
        text + b"\n\xe9t\xe9,45",
        text + b"\n,,,,\n\n",
        b"",
        text + b"\0" * 20,
        text.replace(b"45", b'"45'),
        b"scene,sun_elevation\n" + b"x" * 200_000,
        rng.bytes(500),
    ]
    path.write_bytes(kinds[int(rng.integers(len(kinds)))])
    return path


def mask_case(rng: Random, base: Path, data: Path, damage: str) -> Case:
    """Lay out scenes and their mask files, with `damage` to one of them or none."""
    for part in (SCENES_FOLDER, "masks"):
        shutil.copytree(base / part, data / part)
    paths, damaged = vary_scenes(rng, data), []
    masks = sorted((data / "masks").iterdir())
    if damage == "scenes":
        damaged = damage_one(rng, paths, SCENE_DAMAGES)
    elif damage != "nothing":
        kinds = (bytes_of, bytes_of, wrong_numbers, wrong_place, other_size, in_the_way, twin)
        damaged = damage_one(rng, masks, kinds)
    return Case(["--scenes", str(data / SCENES_FOLDER), "--labels", str(data / "masks")], damaged)


def patch_case(rng: Random, base: Path, data: Path, damage: str) -> Case:
    """Lay out patches, with `damage` to one of them or none."""
    shutil.copytree(base / "patches", data / "patches")
    paths, damaged = sorted((data / "patches").iterdir()), []
    if damage != "nothing":
        kinds = (bytes_of, bytes_of, other_array, other_array, in_the_way)
        damaged = damage_one(rng, paths, kinds)
    return Case(["--patches", str(data / "patches"), "--mask-order", "any,clean,debris"], damaged)


def other_array(rng: Random, path: Path) -> None:
    """Replace an array by one of another shape, type or content."""
    values = np.load(path)
    with np.errstate(invalid="ignore"):
        arrays: list[Callable[[], np.ndarray]] = [
            lambda: values[0],
            lambda: values[:-1],
            lambda: values[..., :2],
            lambda: np.float32(3),
            lambda: values.astype(">f8"),
            lambda: np.asfortranarray(values),
            lambda: values.astype(np.uint8),
            lambda: values.astype(np.complex64),
            lambda: values.astype(bool),
            lambda: values.astype("S3"),
            lambda: values.astype("U3"),
            lambda: np.full(values.shape, np.nan, np.float32),
            lambda: values - 1000,
            lambda: values.astype("datetime64[s]"),
            lambda: np.zeros(values.shape, [("a", "f4"), ("b", "u1")]),
            lambda: np.array([{"a": 1}], dtype=object),
            lambda: np.zeros((0, 0, 15), np.float32),
        ]
        np.save(path, arrays[int(rng.integers(len(arrays)))](), allow_pickle=True)


CASES = (outline_case, mask_case, outline_case, patch_case)
DAMAGED_PARTS = ("nothing", "scenes", "scenes", "labels", "labels", "labels", "sun")


def digests_of(data: Path) -> set[str]:
    """Return a digest of each regular file below a folder."""
    return {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in data.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


# --- Judgement ------------------------------------------------------------------------------------


def check_store(out: Path) -> list[str]:
    """Return what is wrong with a store that prep says is complete."""
    try:
        store = TileStore(out)
    except StoreError as error:
        return [f"no whole store: {error}"]
    faults = []
    for name in store.tile_ids:
        image, mask = store.image(name), store.mask(name)
        if image.shape != (TILE, TILE, 5) or image.dtype != np.float32 or mask.shape != (TILE, TILE):
            faults.append(f"tile {name!r}: {image.dtype} {image.shape} and {mask.shape}")
        elif not set(np.unique(mask)) <= set(CODE_NAMES) or np.isinf(image).any():
            faults.append(f"tile {name!r}: codes {np.unique(mask)}, infinite: {np.isinf(image).any()}")
    if not np.isfinite([store.stats[key] for key in ("mean", "std")]).all():
        faults.append(f"statistics: {store.stats}")
    return faults


def run_hkh(folder: Path, case: Case) -> tuple[list[str], bool]:
    """Run `prep hkh` on a case; return the faults and whether it made a store."""
    out = folder / "stores" / "store"
    options = [
        "--out",
        str(out),
        "--size",
        str(TILE),
        "--overlap",
        "8",
        "--jobs",
        "1",
        "--max-background",
        "1",
    ]
    options += ["--min-glacier", "0", "--val-share", "0.3"]
    before = snapshot(folder / "in")
    ending = call(str(folder), lambda: prep_main(["hkh", *case.arguments, *options]))
    faults = judge_end(ending, (0, 2))
    if snapshot(folder / "in") != before:
        faults.append("prep hkh changed the input")
    left = {path.name for path in out.parent.iterdir()} if out.parent.exists() else set()
    if ending.result == 0:
        faults += [] if left == {"store"} else [f"beside the store: {left}"]
        return faults + check_store(out), True
    faults += [f"prep hkh left {left}"] if left - {".store-partial"} else []
    if not faults and not any(remedy in ending.said for remedy in REMEDIES):
        faults.append(f"no remedy in: {ending.said}")
    if not faults and not case.damaged and not any(reason in ending.said for reason in EMPTY):
        faults.append(f"a whole data set was refused: {ending.said[-600:]}")
    said = ending.said
    named = [path for path in case.damaged if ascii(path.stem)[1:-1] in said or path.parent.name in said]
    if not faults and case.damaged and not named and not any(reason in ending.said for reason in EMPTY):
        faults.append(f"names none of {[str(path) for path in case.damaged]}: {ending.said[-600:]}")
    return faults, False


def fuzz_hkh(seed: int, cases: int, work: Path, keep: bool = False) -> Found:
    """Run `prep hkh` over so many small data sets, most of them damaged."""
    found, stores = Found(cases, set(), 0, 0, []), 0
    base = prepare_base(work)
    for number in range(cases):
        rng = np.random.default_rng([seed, 5, number])
        folder = work / f"hkh{number}"
        (folder / "in").mkdir(parents=True)
        damage = str(rng.choice(DAMAGED_PARTS))
        case = CASES[number % len(CASES)](rng, base, folder / "in", damage)
        found.inputs.update(digests_of(folder / "in"))
        faults, stored = run_hkh(folder, case)
        note(found.faults, f"seed {seed} hkh {number}", faults)
        stores += stored
        if not (keep and faults):
            shutil.rmtree(folder)
    return found._replace(masks=stores, refused=cases - stores)
