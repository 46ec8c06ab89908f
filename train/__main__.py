"""Command line of training: `python -m train <command> --help`."""

import argparse
import sys
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Sequence

from train.submission import add_check_arguments, add_submission_arguments, run_check, run_submission


class Command(NamedTuple):
    """A subcommand. `run` imports what it needs itself, so that --help and mistakes are answered at once."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fit`."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see train/configs/")
    parser.add_argument("--run", type=Path, required=True, help="folder for the results, e.g. runs/unet")
    parser.add_argument("--folds", type=fold_numbers, help="fold numbers, e.g. 0,1,2; default: all folds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. optim.lr=3e-4")


def run_fit(arguments: argparse.Namespace) -> int:
    """Fit folds; a run that was interrupted is continued by the same command."""
    from train.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from train.fit import fit_all

    fit_all(config, arguments.run, arguments.folds)
    return 0


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a run with finished folds")
    add_store_argument(parser)


def add_store_argument(parser: argparse.ArgumentParser) -> None:
    """Add --store."""
    parser.add_argument("--store", type=Path, default=Path("data/competition"), help="default: %(default)s")


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Predict every tile with the fold that never saw it, and score the predictions."""
    from prep.store import TileStore
    from train.evaluate import predict_run
    from train.report import score_run

    store = TileStore(arguments.store)
    predict_run(arguments.run, store)
    pooled = score_run(arguments.run, store)["pooled"]["valid_pixels"]
    four = f"{pooled['four_class']['mcc']:.4f}" if pooled["four_class"] else "undefined"
    print(f"{arguments.run}: out-of-fold MCC {pooled['binary']['mcc']:.4f} (extent), {four} (four classes)")
    return 0


def add_baseline_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `baseline`."""
    parser.add_argument("--scheme", default="stratified", help="fold scheme (default: %(default)s)")
    parser.add_argument("--run", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    add_store_argument(parser)


def run_baseline(arguments: argparse.Namespace) -> int:
    """Fit the per-pixel gradient boosting on the same folds, and score it."""
    from solution import usable_cores
    from train.baseline import run_baseline as fit_baseline

    fit_baseline(arguments.store, arguments.scheme, arguments.run, arguments.seed, usable_cores())
    return 0


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `calibrate`."""
    parser.add_argument("runs", type=Path, nargs="+", help="evaluated runs; a step must gain in each of them")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for `pack`")
    parser.add_argument("--report", type=Path, help="Markdown file for the table of steps")
    add_store_argument(parser)


def run_calibrate(arguments: argparse.Namespace) -> int:
    """Decide by out-of-fold MCC which steps follow the forward passes."""
    from prep.store import TileStore
    from solution import usable_cores
    from train import calibrate

    settings, results = calibrate.calibrate(arguments.runs, TileStore(arguments.store), usable_cores())
    calibrate.write_calibration(arguments.out, arguments.runs, settings, results)
    if arguments.report:
        runs = " ".join(str(run) for run in arguments.runs)
        commands = [f"python -m train calibrate {runs} --out {arguments.out} --report {arguments.report}"]
        calibrate.write_report(arguments.report, arguments.runs, results, commands)
    return 0


def add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pack`."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a run with finished folds")
    parser.add_argument(
        "--calibration", type=Path, help="JSON file of `calibrate`; default: no optional step"
    )
    parser.add_argument("--out", type=Path, default=Path("weights/model.pth"), help="default: %(default)s")


def run_pack(arguments: argparse.Namespace) -> int:
    """Pack the folds into one model.pth and write its card."""
    from train.package import pack

    out = pack(arguments.run, arguments.calibration, arguments.out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="evaluated runs and their names")
    parser.add_argument(
        "--out", type=Path, default=Path("reports/out_of_fold.md"), help="default: %(default)s"
    )
    parser.add_argument(
        "--made-with", action="append", default=[], metavar="LINE", help="a command to show in the report"
    )
    add_store_argument(parser)


def run_report(arguments: argparse.Namespace) -> int:
    """Compare the out-of-fold scores of runs in Markdown, with figures."""
    from prep.store import TileStore
    from train.report import write_report

    runs = {name: Path(folder) for name, folder in (run.split("=", 1) for run in arguments.runs)}
    write_report(runs, TileStore(arguments.store), arguments.out, arguments.made_with)
    print(f"{arguments.out} written")
    return 0


def add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `preview`."""
    parser.add_argument("--data", type=Path, required=True, help="folder with Band1 ... Band5")
    parser.add_argument("--masks", type=Path, required=True, help="folder of masks that solution.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")


def run_preview(arguments: argparse.Namespace) -> int:
    """Draw a contact sheet of tiles and their masks."""
    from train.pictures import write_contact_sheet

    count = write_contact_sheet(arguments.data, arguments.masks, arguments.out)
    print(f"{arguments.out}: {count} tiles")
    return 0


def fold_numbers(text: str) -> list[int]:
    """Return the numbers in text such as "0,1,2"."""
    return [int(number) for number in text.split(",")]


COMMANDS = {
    "fit": Command("train the folds of a tile store", add_fit_arguments, run_fit),
    "evaluate": Command(
        "predict and score the held-out tiles of a run", add_evaluate_arguments, run_evaluate
    ),
    "baseline": Command("score a gradient boosting on the same folds", add_baseline_arguments, run_baseline),
    "calibrate": Command("decide on views, bias, CRF, cleaning", add_calibrate_arguments, run_calibrate),
    "pack": Command("write weights/model.pth", add_pack_arguments, run_pack),
    "preview": Command("draw a contact sheet of tiles and masks", add_preview_arguments, run_preview),
    "check": Command("would the submission be accepted?", add_check_arguments, run_check),
    "submission": Command("check, then zip the submission", add_submission_arguments, run_submission),
    "report": Command("compare runs in Markdown", add_report_arguments, run_report),
}


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a subcommand and return the exit status: 0 done, 2 wrong use or unusable input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.help, description=command.run.__doc__))
    parsed = parser.parse_args(arguments)
    try:
        return COMMANDS[parsed.command].run(parsed)
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the last finished epoch", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ not in EXPECTED_ERRORS:
            raise
        print(f"python -m train {parsed.command}: {error}", file=sys.stderr)
        return 2


# Errors that are the user's to solve: their message is enough. By name, since importing them takes seconds.
EXPECTED_ERRORS = (
    "ConfigError",
    "DataError",
    "InputError",
    "ReportError",
    "RunError",
    "StoreError",
    "TileError",
)


if __name__ == "__main__":
    sys.exit(main())
