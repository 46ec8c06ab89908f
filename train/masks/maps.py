"""From scenes to maps: rasters of classes and probabilities, glaciers as polygons, and a page about them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import geopandas
import numpy as np
from joblib import Parallel, delayed
from rasterio.features import geometry_mask
from tqdm import tqdm

from prep.files import write_json, write_text
from prep.hkh.prepare import Resources, backend
from solution import CLASS_NAMES, InputError, prepare_torch, usable_cores, warn
from train.masks.georeference import class_km2, count_values
from train.masks.outlines import glacier_polygons, lake_polygons, write_geopackage
from train.masks.page import Map, map_page
from train.masks.rasters import Layout, write_raster
from train.masks.scene import Scene, check_units
from train.masks.strips import (
    NODATA,
    STEPS,
    Strip,
    class_confidence,
    finish_classes,
    predict_strips,
    strip_edges,
    window_columns,
)
from train.networks import load_any_model
from train.objective import DEBRIS, GLACIER

PARTS = ".parts"  # finished strips of a run, until its map is complete
SUMMARY, PAGE, POLYGONS = "map.json", "map.html", "glaciers.gpkg"
RASTERS = ("classes.tif", "probabilities.tif", "confidence.tif")
CLASS_VALUES = {code: (code, name) for code, name in enumerate(CLASS_NAMES)}


class Settings(NamedTuple):
    """How maps are made; areas in km2."""

    weights: Path
    keep_clouds: bool = False
    aoi: Optional[Path] = None
    min_km2: float = 0.01
    smooth: bool = False


def map_scenes(scenes: Sequence[Scene], out: Path, settings: Settings, resources: Resources) -> list[str]:
    """Map one scene into `out`, or several into a folder each in it; return why scenes failed, one a line.

    What is finished stays: the same call again goes on with the strips and scenes that are missing.
    """
    if len(scenes) == 1:
        return list(filter(None, [_try_map(scenes[0], out, settings, usable_cores(), True)]))
    alike = sorted({scene.name for scene in scenes if [other.name for other in scenes].count(scene.name) > 1})
    if alike:
        raise InputError(f"{alike[0]}: two scenes have this name; map them into different folders")
    threads = max(1, usable_cores() // resources.jobs)
    with backend(resources):
        done = Parallel(return_as="generator")(
            delayed(_try_map)(scene, out / scene.name, settings, threads, False) for scene in scenes
        )
        return list(filter(None, tqdm(done, total=len(scenes), unit="scene", desc="maps", disable=None)))


def _try_map(scene: Scene, folder: Path, settings: Settings, threads: int, bar: bool) -> Optional[str]:
    """Map a scene; return why it failed, since one scene must not cost the others."""
    try:
        map_scene(scene, folder, settings, threads, bar)
        return None
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        return f"{scene.name}: {error}"


def map_scene(scene: Scene, folder: Path, settings: Settings, threads: int = 1, bar: bool = False) -> dict:
    """Write the map of a scene into a folder and return its summary, which map.json holds too.

    Raises:
        InputError: the scene, the weights or the area of interest cannot be used.
    """
    started, made_of = time.perf_counter(), _made_of(scene, settings)
    before = _read_json(folder / SUMMARY)
    if before.get("made_of") == made_of and all((folder / name).is_file() for name in (*RASTERS, PAGE)):
        return before
    check_units(scene)
    asked = _area_of_interest(scene, settings.aoi) if settings.aoi else None
    parts = folder / PARTS
    if _read_json(parts / SUMMARY) != made_of:
        shutil.rmtree(parts, ignore_errors=True)
        write_json(parts / SUMMARY, made_of)
    prepare_torch(threads)
    model = load_any_model(settings.weights)
    found = _Found(scene)
    windows = (len(strip_edges(scene)) - 1) * len(window_columns(scene))
    with tqdm(total=windows, unit="window", desc=scene.name, disable=None if bar else True) as progress:
        for strip in predict_strips(model, scene, settings.keep_clouds, asked, parts, progress.update):
            found.add(strip)
    classes = finish_classes(model, found.decided)
    _write_rasters(scene, folder, classes, parts)
    summary = _summarise(scene, folder, settings, classes, found)
    shown = Map(scene, summary | {"made_of": made_of, "passes": len(model.passes)}, settings._asdict())
    seconds = time.perf_counter() - started
    write_text(folder / PAGE, map_page(shown, np.concatenate(found.pictures), classes, seconds))
    write_json(folder / SUMMARY, shown.summary)
    shutil.rmtree(parts)
    return dict(shown.summary)


class _Found:
    """What is kept in memory of all strips, three bytes a pixel at most."""

    def __init__(self, scene: Scene) -> None:
        self.decided = np.empty(scene.shape, np.uint8)
        self.likely = np.empty(scene.shape, np.uint8)  # glacier of either kind
        self.pictures: list[np.ndarray] = []
        self.saturated = 0

    def add(self, strip: Strip) -> None:
        """Take over the rows of a strip."""
        self.decided[strip.rows] = strip.classes
        either = strip.probabilities[GLACIER].astype(np.uint16) + strip.probabilities[DEBRIS]
        self.likely[strip.rows] = np.where(strip.classes == NODATA, NODATA, np.minimum(either, STEPS))
        self.pictures.append(strip.picture)
        self.saturated += strip.saturated


def _made_of(scene: Scene, settings: Settings) -> dict[str, Any]:
    """Return what a map depends on: weights, files with sizes and times, settings, as JSON holds them."""
    with open(settings.weights, "rb") as stream:
        weights = hashlib.file_digest(stream, "sha256").hexdigest()
    named = [path for path in (*scene.bands, scene.quality, settings.aoi) if path]
    files = [Path(str(path).removeprefix("/vsitar/")) for path in named]
    files = [next(part for part in (path, *path.parents) if part.exists()) for path in files]
    stamps = [[str(path), file.stat().st_size, file.stat().st_mtime_ns] for path, file in zip(named, files)]
    chosen = {key: str(value) for key, value in settings._asdict().items() if key != "weights"}
    return {"weights": weights, "files": stamps, **chosen}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or not finished
        return {}


def _area_of_interest(scene: Scene, path: Path) -> np.ndarray:
    """Return (H, W) bool, True inside the polygons of a vector file of any coordinate system."""
    if scene.place is None:
        raise InputError(f"{path}: {scene.name} has no georeference to compare it with; leave --aoi out")
    try:
        areas = geopandas.read_file(path)
    except Exception as error:  # damaged files raise almost anything from within GDAL
        raise InputError(f"{path}: cannot be read as vector data ({error}); export it as GeoPackage") from error
    if areas.crs is None:
        raise InputError(f"{path}: states no coordinate system; set it (ogr2ogr -a_srs EPSG:4326)")
    outlines = areas.to_crs(scene.place.crs.to_wkt()).geometry.dropna()
    asked = geometry_mask(outlines, scene.shape, scene.place.transform, invert=True)
    if not asked.any():
        raise InputError(f"{path}: no pixel of {scene.name} lies in it; check its coordinate system")
    return asked


def _write_rasters(scene: Scene, folder: Path, classes: np.ndarray, parts: Path) -> None:
    """Write classes.tif, probabilities.tif and confidence.tif."""

    def strips() -> Iterator[Strip]:
        return (Strip.read(path) for path in sorted(parts.glob("*.npz")))

    share = Layout(scene.shape, ("probability of the class",), NODATA, scale=1 / STEPS, tags=scene.about)
    names = tuple(f"probability of {name}" for name in CLASS_NAMES)
    write_raster(
        folder / "probabilities.tif",
        scene.place,
        share._replace(bands=names),
        ((strip.top, strip.probabilities) for strip in strips()),
    )
    sure = ((strip.top, class_confidence(strip.probabilities, classes[strip.rows])[None]) for strip in strips())
    write_raster(folder / "confidence.tif", scene.place, share, sure)
    layout = Layout(scene.shape, ("class",), NODATA, values=CLASS_VALUES, tags=scene.about)
    write_raster(folder / "classes.tif", scene.place, layout, [(0, classes[None])])


def _summarise(scene: Scene, folder: Path, settings: Settings, classes: np.ndarray, found: _Found) -> dict[str, Any]:
    """Write glaciers.gpkg where the scene has a place, and return what the map says in numbers."""
    pixels, km2 = count_values(classes), class_km2(classes, scene.place)
    summary: dict[str, Any] = {
        "scene": scene.name,
        "about": dict(scene.about),
        "pixels": {name: int(pixels[code]) for code, name in enumerate(CLASS_NAMES)},
        "nodata_pixels": int(pixels[NODATA]),
        "saturated_pixels": found.saturated,
        "km2": None if km2 is None else {name: float(km2[code]) for code, name in enumerate(CLASS_NAMES)},
        "glaciers": None,
    }
    (folder / POLYGONS).unlink(missing_ok=True)  # another scene's
    if scene.place is None:
        warn(f"{scene.name}: no georeference, so there are neither polygons nor areas")
        return summary
    glaciers = glacier_polygons(classes, found.likely, scene.place, settings.min_km2, settings.smooth)
    layers = {"glaciers": glaciers, "lakes": lake_polygons(classes, scene.place)}
    write_geopackage({name: frame for name, frame in layers.items() if len(frame)}, folder / POLYGONS)
    areas = glaciers.drop(columns="geometry")
    summary["glaciers"] = {
        "number": len(areas),
        "cut": int(areas["cut"].sum()),
        **{column: float(areas[column].sum()) for column in areas.filter(like="km2")},
        "largest": json.loads(areas.head(20).to_json(orient="records")),
    }
    return summary
