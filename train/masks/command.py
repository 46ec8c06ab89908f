"""The commands `preview`, `export` and `map`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prep.competition import PHASE_OPTIONS
from prep.files import write_json
from prep.text import plural
from solution import InputError, find_weights, usable_cores, warn
from train.masks.files import VALUES_OPTIONS
from train.masks.score import format_scores, score_masks
from train.run import describe_seen


def add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `preview`."""
    parser.add_argument("--data", type=Path, required=True, help="folder with Band1 ... Band5")
    parser.add_argument("--masks", type=Path, help="folder of masks; default: made with --weights")
    parser.add_argument("--labels", type=Path, help="folder of labels, or with label folders, to draw beside them")
    parser.add_argument(
        "--weights", type=Path, help="model.pth, for masks and maps of confidence: takes all its passes"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for a picture a tile; or a PNG for a contact sheet"
    )


def run_preview(arguments: argparse.Namespace) -> int:
    """Draw each tile with its mask, outlines, areas and confidence, and a contact sheet of all of them."""
    from train.masks.preview import write_quicklooks

    if not (arguments.masks or arguments.weights):
        raise InputError("nothing to draw over the tiles; give --masks FOLDER, --weights model.pth, or both")
    given = (arguments.masks, arguments.weights, arguments.labels)
    written = write_quicklooks(arguments.data, arguments.out, *given)
    print(f"{written[-1]}: contact sheet; {plural(len(written), 'picture')} in all")
    return 0


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    parser.add_argument("--pred", type=Path, required=True, help="folder of masks of any origin, PNG or TIFF")
    parser.add_argument("--labels", type=Path, required=True, help="folder of labels, or with label folders in it")
    parser.add_argument(
        "--phase", choices=tuple(PHASE_OPTIONS), default="auto", help="of the labels (auto: by their values)"
    )
    parser.add_argument(
        "--values",
        choices=tuple(VALUES_OPTIONS),
        default="auto",
        help="classes: masks hold 0, 85, 170, 255; extent: 0 and 255, glacier of either kind",
    )
    parser.add_argument("--data", type=Path, help="Band1 ... Band5: scores without nodata as well")
    parser.add_argument("--weights", type=Path, help="model.pth of the masks: was it trained on these tiles?")
    parser.add_argument("--tiles", type=lambda text: text.split(","), default=[], help="e.g. 02_07,03_11")
    parser.add_argument("--json", type=Path, help="file for all figures")


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Score a folder of masks as the organisers do."""
    weights = arguments.weights and find_weights(arguments.weights)
    scores = score_masks(
        arguments.pred,
        arguments.labels,
        phase=PHASE_OPTIONS[arguments.phase],
        values=VALUES_OPTIONS[arguments.values],
        data=arguments.data,
        tiles=arguments.tiles,
    )
    print(format_scores(scores))
    if weights and (seen := describe_seen(weights, list(scores["by_tile"]))):
        warn(seen)
    if arguments.json:
        write_json(arguments.json, scores)
    return 0


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.add_argument("--masks", type=Path, required=True, help="folder of masks, PNG or TIFF")
    parser.add_argument("--data", type=Path, required=True, help="Band1 ... Band5, which say where tiles lie")
    parser.add_argument("--out", type=Path, required=True, help="folder for the GeoTIFFs and the GeoPackage")


def run_export(arguments: argparse.Namespace) -> int:
    """Write masks as GeoTIFFs with a colour table, and as polygons with areas, for QGIS."""
    from train.masks.export import export_masks, format_areas

    print(format_areas(export_masks(arguments.masks, arguments.data, arguments.out)))
    return 0


def add_map_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `map`."""
    parser.add_argument(
        "scenes", nargs="*", type=Path, help="folders or tars of Landsat 8/9 Level-2, or with Band1 ... Band5"
    )
    names = ("B2", "B3", "B4", "B6", "B10")
    parser.add_argument(
        "--bands", nargs=5, type=Path, metavar=names, help="any five rasters of Level-2 numbers on one grid"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the map; of several, one in it each")
    parser.add_argument("--weights", type=Path, help="model.pth; default: where solution.py finds it")
    parser.add_argument("--keep-clouds", action="store_true", help="classify what QA_PIXEL says is cloud")
    parser.add_argument("--aoi", type=Path, help="area of interest: polygons in any format and system")
    parser.add_argument(
        "--min-area", type=float, default=0.01, metavar="KM2", help="smallest glacier; default: %(default)s"
    )
    parser.add_argument("--smooth", action="store_true", help="smooth the steps of pixels in the outlines")
    parser.add_argument("--jobs", type=int, default=1, help="scenes at once; 0: one a core; default: 1")
    parser.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster for several scenes")


def run_map(arguments: argparse.Namespace) -> int:
    """Map scenes: classes, probabilities, glaciers as polygons with areas, and a page; a killed run goes on."""
    from prep.hkh.prepare import Resources
    from train.masks.maps import PAGE, Settings, map_scenes
    from train.masks.scene import find_scenes, open_scene

    scenes = [scene for source in arguments.scenes for scene in find_scenes(source)]
    if arguments.bands:
        scenes.append(open_scene(arguments.bands[0].stem, [str(path) for path in arguments.bands]))
    if not scenes:
        raise InputError("no scene; name a Landsat folder or tar, or five rasters after --bands")
    chosen = (arguments.keep_clouds, arguments.aoi, arguments.min_area, arguments.smooth)
    settings = Settings(find_weights(arguments.weights), *chosen)
    faults = map_scenes(scenes, arguments.out, settings, Resources(arguments.jobs or usable_cores(), arguments.dask))
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if len(faults) < len(scenes):
        pages = arguments.out / PAGE if len(scenes) == 1 else arguments.out / "*" / PAGE
        print(f"{plural(len(scenes) - len(faults), 'map')}: {pages}")
    return 1 if faults else 0
