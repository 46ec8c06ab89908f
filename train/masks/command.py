"""The commands that use masks: preview and export."""

from __future__ import annotations

import argparse
from pathlib import Path

from prep.text import plural
from solution import InputError


def add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `preview`."""
    parser.add_argument("--data", type=Path, required=True, help="folder with Band1 ... Band5")
    parser.add_argument("--masks", type=Path, help="folder of masks; default: made with --weights")
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
    written = write_quicklooks(arguments.data, arguments.out, arguments.masks, arguments.weights)
    print(f"{written[-1]}: contact sheet; {plural(len(written), 'picture')} in all")
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
