"""Command line of the data preparation: `python -m prep competition`, `hkh` and `sample`."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import Sequence

from prep.competition import PHASE_OPTIONS, format_summary, prepare
from prep.store import refuse_existing
from solution import CLASS_NAMES, InputError, KitError, usable_cores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after an error message where the input does not allow it."""
    options = build_parser().parse_args(arguments)
    try:
        options.command(options)
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no permission, or a full disk
        where = getattr(options, "out", "the store")
        advice = "see to permissions and free space, or name another folder with --out"
        print(f"error: {error}; {where} was not written: {advice}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each command puts its function into `command`."""
    parser = argparse.ArgumentParser(prog="python -m prep", description="Raw data to tile stores.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_competition(commands)
    _add_hkh(commands)
    _add_sample(commands)
    return parser


def _add_competition(commands: argparse._SubParsersAction) -> None:
    summary = "the organisers' training tiles to a tile store"
    parser = commands.add_parser("competition", help=summary, description=summary)
    parser.add_argument("--data", type=Path, required=True, help="holds Band1 ... Band5 and label folders")
    parser.add_argument("--out", type=Path, default=Path("data/competition"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the stratified folds (default: %(default)s)")
    parser.add_argument(
        "--phase",
        choices=list(PHASE_OPTIONS),
        default="auto",
        help="what label/ holds (auto: told by its values)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older store")
    parser.set_defaults(command=run_competition)


def _add_hkh(commands: argparse._SubParsersAction) -> None:
    summary = "the HKH data set's Landsat-7 scenes and outlines, or its patches, to a tile store"
    parser = commands.add_parser("hkh", help=summary, description=f"{summary} (docs/hkh.md)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scenes", type=Path, help="folder with a GeoTIFF a scene")
    source.add_argument("--patches", type=Path, help="folder with the data set's own .npy patches")
    parser.add_argument(
        "--labels",
        type=Path,
        nargs="+",
        default=[],
        help="of scenes: clean.shp debris.shp, perhaps Glacier_2005.shp (.gpkg, .geojson, .fgb as well); or one "
        "file with a column of kinds; or a folder of mask files",
    )
    shown = "what these files show, where their names do not say it: clean,debris,any"
    parser.add_argument("--kinds", type=lambda text: text.replace(" ", "").split(","), help=shown)
    several = "of a vector file with several, in the order of --kinds"
    parser.add_argument("--layer", dest="layers", metavar="LAYER", nargs="+", default=[], help=several)
    parser.add_argument("--border", type=Path, help="region outside of which nothing is labelled, hkh.shp")
    parser.add_argument("--mask-order", help="channels of a patch's mask (clean,debris where it has two)")
    parser.add_argument("--column", default="Glaciers", help="attribute with the class (%(default)s)")
    parser.add_argument(
        "--words",
        nargs="+",
        metavar="CLASS=WORD",
        default=["glacier=clean", "debris=debris", "lake=lake"],
        help="word in a file's name, in the attribute's value, or in a mask file's name (default: %(default)s)",
    )
    parser.add_argument("--sun", type=Path, help="CSV with the columns scene and sun_elevation (degrees)")
    parser.add_argument("--exclude-ground", type=Path, metavar="STORE", help="leave out its tiles' ground")
    parser.add_argument("--out", type=Path, default=Path("data/hkh"), help="default: %(default)s")
    _add_hkh_settings(parser)
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: all cores)")
    parser.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster, e.g. tcp://host:8786")
    parser.add_argument("--overwrite", action="store_true", help="replace an older store")
    parser.set_defaults(command=run_hkh)


def _add_hkh_settings(parser: argparse.ArgumentParser) -> None:
    numbers = (
        (("--tile-size", "--size"), int, 512, "side of a tile in pixels"),
        (("--overlap",), str, "64", "what neighbours share: pixels (64) or a share of the side (0.1)"),
        (("--min-debris", "--min-debris-pixels"), int, 500, "a tile is kept from this many px of debris on"),
        (("--min-lake", "--min-lake-pixels"), int, 50, "... or of lake"),
        (("--min-glacier", "--min-glacier-pixels"), int, 100, "... or of clean ice"),
        (("--max-background",), float, 0.8, "... but with no more background than this share of its data"),
        (("--val-share",), float, 0.2, "share of validation, in whole scenes"),
        (("--seed",), int, 0, "of the split"),
    )
    for names, kind, default, text in numbers:
        parser.add_argument(*names, type=kind, default=default, help=f"{text} (default: %(default)s)")


def _add_sample(commands: argparse._SubParsersAction) -> None:
    summary = "synthetic scenes in the layout of the competition or of HKH, for the demo and the tests"
    parser = commands.add_parser("sample", help=summary, description=summary)
    parser.add_argument("--out", type=Path, default=Path("data/sample"), help="default: %(default)s")
    parser.add_argument(
        "--like",
        choices=["competition", "scene", "hkh", "hkh-lila", "hkh-patches"],
        default="competition",
        help="scene: Landsat 8 by USGS; hkh: Landsat-7 scenes with stripes and a shapefile; hkh-lila: filled, outlines "
        "by kind and a border; hkh-patches: arrays of 512 px (default: %(default)s)",
    )
    parser.add_argument("--tiles", type=int, default=10, help="number of scenes (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="side in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    parser.add_argument("--naming", choices=["training", "platform"], default="training", help="of files")
    parser.add_argument("--labels", choices=["phase1", "phase2", "both"], default="both", help="to write")
    parser.set_defaults(command=run_sample)


def run_competition(options: argparse.Namespace) -> None:
    """Write the tile store and print its statistics and folds."""
    summary = prepare(options.data, options.out, seed=options.seed, phase=options.phase, overwrite=options.overwrite)
    print(format_summary(summary))


def run_hkh(options: argparse.Namespace) -> None:
    """Write the tile store of HKH and print what was kept, what was dropped and why."""
    if bool(options.scenes) != bool(options.labels):
        raise InputError("--labels belongs to --scenes: vector files, or a folder of mask files per class")
    if options.mask_order and not options.patches:
        raise InputError("--mask-order belongs to --patches: what the channels of their masks are")
    from prep.hkh import prepare as hkh

    options.words = parse_words(options.words)
    source = hkh.Source(**{name: getattr(options, name) for name in hkh.Source._fields})
    keep = hkh.Filter(options.min_debris, options.min_lake, options.min_glacier, options.max_background)
    grid = hkh.Grid(options.tile_size, parse_overlap(options.overlap, options.tile_size))
    settings = hkh.Settings(grid, keep, options.val_share, options.seed)
    resources = hkh.Resources(options.jobs or usable_cores(), options.dask)
    print(hkh.format_summary(hkh.prepare(source, options.out, settings, resources, options.overwrite)))


def parse_overlap(text: str, size: int) -> int:
    """Return an overlap in pixels, given in pixels ("64") or as a share of the side ("0.1")."""
    if text.isdecimal():
        return int(text)
    with suppress(ValueError):
        if 0 <= float(text) < 1:
            return round(float(text) * size)
    raise InputError(f"--overlap: found '{text}', expected pixels such as 64 or a share such as 0.1")


def parse_words(pairs: Sequence[str]) -> dict[str, str]:
    """Return {class: word} of pairs such as "glacier=clean". Raises InputError for anything else."""
    words = dict(pair.partition("=")[::2] for pair in pairs)
    classes = CLASS_NAMES[1:]
    if not {"glacier", "debris"} <= set(words) <= set(classes) or not all(words.values()):
        raise InputError(f"--words: found {' '.join(pairs)}, expected glacier=WORD debris=WORD [lake=WORD]")
    return words


def run_sample(options: argparse.Namespace) -> None:
    """Write synthetic scenes into a new folder."""
    refuse_existing(options.out)
    if options.like == "scene":
        from prep.synthetic.landsat8 import write_product

        scene = write_product(options.out, options.size, options.size, options.seed)
        print(
            f"{scene}: a synthetic Landsat-8 scene of {options.size} px written. Next: make map SCENE={scene} OUT=map"
        )
        return
    if options.like != "competition":
        from prep.synthetic import hkh

        layout = options.like.partition("-")[2] or "release"
        hkh.write_hkh_sample(options.out, options.tiles, options.size, options.seed, layout)
        print(f"{options.out}: {options.tiles} Landsat-7 scenes of {options.size} px written. Next:")
        print(f"python -m prep hkh {hkh.next_arguments(options.out, layout)}")
        return
    from prep.synthetic.scenes import write_sample  # here: the other commands need not wait for it

    write_sample(options.out, options.tiles, options.size, options.seed, options.naming, options.labels)
    print(f"{options.out}: {options.tiles} synthetic tiles of {options.size} px written")


if __name__ == "__main__":
    sys.exit(main())
