"""The command that reports on runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="evaluated runs and their names")
    out = Path("reports/local/out_of_fold.md")
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")
    parser.add_argument(
        "--made-with", action="append", default=[], metavar="LINE", help="a command to show in the report"
    )
    parser.add_argument("--weights", type=Path, help="the model.pth made of these runs, for its checksum")
    parser.add_argument(
        "--html", type=Path, help="a page with pictures of all tiles, e.g. reports/index.html"
    )
    parser.add_argument("--store", type=Path, default=Path("data/competition"), help="default: %(default)s")


def run_report(arguments: argparse.Namespace) -> int:
    """Report out-of-fold scores of runs in Markdown, with figures, and on a page with pictures."""
    from prep.store import TileStore
    from train.report.page import write_page
    from train.report.tables import read_run_names, write_report

    runs, store = read_run_names(arguments.runs), TileStore(arguments.store)
    scores = write_report(runs, store, arguments.out, arguments.made_with, arguments.weights)
    print(f"{arguments.out} written")
    if arguments.html:
        page = write_page(runs, scores, store, arguments.html, arguments.made_with)
        print(f"{page} written, {page.stat().st_size / 1e6:.1f} MB")
    return 0
