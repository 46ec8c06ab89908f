"""Command line of training: `python -m train <command> --help`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional, Sequence

from train.submit.archive import add_check_arguments, add_submission_arguments, run_check, run_submission

if TYPE_CHECKING:
    from train.config import Config


class Command(NamedTuple):
    """A subcommand. `run` imports what it needs itself, so that --help and mistakes are answered at once."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that trains folds."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see train/configs/")
    parser.add_argument("--run", type=Path, required=True, help="folder for the results, e.g. runs/unet")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--folds", type=whole_numbers, help="fold numbers, e.g. 0,1,2; default: all folds")
    which.add_argument(
        "--all-tiles",
        action="store_true",
        help="one network of all tiles (a student: of all teachers) for submission; it has no score",
    )
    which.add_argument(
        "--pairs",
        action="store_true",
        help="a network without each pair of folds, which teaches either about the other (docs/ensembles.md)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. optim.lr=3e-4")


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fit`."""
    add_training_arguments(parser)
    parser.add_argument(
        "--jobs", type=int, help="folds at once, each a process on one thread, or on a GPU of its own"
    )


def run_fit(arguments: argparse.Namespace) -> int:
    """Fit folds; a run that was interrupted is continued by the same command."""
    from train.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from train.fit import fit_all
    from train.side_by_side import fit_side_by_side

    if arguments.jobs is None:
        fit_all(config, arguments.run, asked_folds(arguments, config))
    else:
        fit_side_by_side(config, arguments.run, asked_folds(arguments, config), arguments.jobs)
    return 0


def asked_folds(arguments: argparse.Namespace, config: "Config") -> Optional[list[int]]:
    """Return the folds that `add_training_arguments` asks for, None for all."""
    from train.data import ALL_TILES
    from train.fit import numbers_of_pairs

    if arguments.pairs:
        return numbers_of_pairs(config)
    return [ALL_TILES] if arguments.all_tiles else arguments.folds


def add_distil_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `distil`."""
    add_training_arguments(parser)
    parser.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="RUN",
        help="folder of a finished run; more than one may be given; default: distil.teachers of the config",
    )


def run_distil(arguments: argparse.Namespace) -> int:
    """Train students on the averaged answers of finished networks, besides the labels; each fold learns from
    networks that never saw its held-out tiles. An interrupted run is continued by the same command."""
    from train.config import load_config

    teachers = [f"distil.teachers=[{','.join(arguments.teacher)}]"] if arguments.teacher else []
    config = load_config(arguments.config, [*arguments.overrides, *teachers])

    from train.distil import fit_students

    fit_students(config, arguments.run, asked_folds(arguments, config))
    return 0


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="folder of a run with finished folds")
    what.add_argument("--pred", type=Path, help="folder of masks of any origin, PNG or TIFF, with --labels")
    add_store_argument(parser)
    masks = parser.add_argument_group("with --pred")
    masks.add_argument("--labels", type=Path, help="folder of labels, or with label/ and label_phase2/ in it")
    masks.add_argument(
        "--phase", choices=("auto", "1", "2"), default="auto", help="of the labels (auto: by their values)"
    )
    masks.add_argument(
        "--values",
        choices=("auto", "classes", "extent"),
        default="auto",
        help="classes: masks hold 0, 85, 170, 255; extent: 0 and 255, glacier of either kind",
    )
    masks.add_argument("--data", type=Path, help="Band1 ... Band5: scores without nodata as well")
    masks.add_argument("--tiles", type=lambda text: text.split(","), default=[], help="e.g. 02_07,03_11")
    masks.add_argument("--json", type=Path, help="file for all figures")


def add_store_argument(parser: argparse._ActionsContainer) -> None:
    """Add --store."""
    parser.add_argument("--store", type=Path, default=Path("data/competition"), help="default: %(default)s")


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Score every tile by the fold that never saw it (--run), or a folder of masks (--pred, --labels)."""
    return evaluate_masks(arguments) if arguments.pred else evaluate_run(arguments)


def evaluate_run(arguments: argparse.Namespace) -> int:
    """Predict every tile with the fold that never saw it, and score the predictions."""
    from prep.store import TileStore
    from train.predict import predict_run
    from train.report.tables import score_run

    store = TileStore(arguments.store)
    predict_run(arguments.run, store)
    print_scores(arguments.run, score_run(arguments.run, store))
    return 0


def print_scores(run: Path, scores: dict) -> None:
    """Print a run's scores over valid pixels in one line."""
    pooled = scores["pooled"]["valid_pixels"]
    four = f"{pooled['four_class']['mcc']:.4f}" if pooled["four_class"] else "undefined"
    print(f"{run}: out-of-fold MCC {pooled['binary']['mcc']:.4f} (extent), {four} (four classes)")


def evaluate_masks(arguments: argparse.Namespace) -> int:
    """Score a folder of masks as the organisers do."""
    from prep.competition import PHASE_OPTIONS
    from solution import InputError
    from train.masks.files import VALUES_OPTIONS
    from train.masks.score import format_scores, score_masks, write_scores

    if not arguments.labels:
        raise InputError("--pred: the masks have nothing to be scored against; give --labels FOLDER")
    scores = score_masks(
        arguments.pred,
        arguments.labels,
        phase=PHASE_OPTIONS[arguments.phase],
        values=VALUES_OPTIONS[arguments.values],
        data=arguments.data,
        tiles=arguments.tiles,
    )
    print(format_scores(scores))
    if arguments.json:
        write_scores(scores, arguments.json)
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


def add_pixels_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pixels`."""
    parser.add_argument("--config", type=Path, default=Path("train/configs/pixels.yaml"), help="YAML file")
    parser.add_argument("--run", type=Path, required=True, help="folder for the folds and their predictions")
    parser.add_argument(
        "--pairs", action="store_true", help="one without each pair of folds, to teach students"
    )
    parser.add_argument("overrides", nargs="*", help="e.g. scheme=spatial epochs=4")


def run_pixels(arguments: argparse.Namespace) -> int:
    """Fit the folds of a network on single pixels, and score them; or those without a pair of folds."""
    from solution import usable_cores
    from train.pixels import fit_pairs, fit_run, load_pixel_config

    config = load_pixel_config(arguments.config, arguments.overrides)
    if arguments.pairs:
        fit_pairs(config, arguments.run, usable_cores())
    else:
        print_scores(arguments.run, fit_run(config, arguments.run, usable_cores()))
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


def add_pareto_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pareto`."""
    parser.add_argument(
        "runs",
        nargs="+",
        help="evaluated runs on different folds; the first is the one to pack. Or models to compare, "
        "NAME=RUN, NAME=RUN:0.7,RUN:0.3 or NAME=<model>_mixture.json, the first of which is the reference",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file: of runs with the order for `pack`, of models"
    )
    parser.add_argument("--baseline", type=Path, help="run of `baseline` on the first run's folds")
    parser.add_argument("--report", type=Path, help="Markdown file for the tables; its plot goes beside it")
    add_store_argument(parser)


def run_pareto(arguments: argparse.Namespace) -> int:
    """Measure score against work: of further networks and views of runs, ordering the passes by it; or of
    models of any kind side by side."""
    named = ["=" in run for run in arguments.runs]
    return compare_models(arguments) if all(named) else order_runs(arguments)


def order_runs(arguments: argparse.Namespace) -> int:
    """Measure what further networks and views are worth, and order the passes by it."""
    from prep.store import TileStore
    from solution import usable_cores
    from train import pareto

    folders = [Path(run) for run in arguments.runs]
    store, cores = TileStore(arguments.store), usable_cores()
    opened = pareto.open_runs(folders, store)
    measured = pareto.measure(opened, store, arguments.baseline, cores)
    pareto.write_order(arguments.out, measured)
    print(pareto.cell_table(measured.cells))
    if arguments.report:
        after = pareto.measure_after_passes(opened, store, measured.views, cores)
        baseline = f"--baseline {arguments.baseline} " if arguments.baseline else ""
        pareto.write_report(arguments.report, measured, after, [pareto_command(arguments, baseline)])
    return 0


def compare_models(arguments: argparse.Namespace) -> int:
    """Measure the score of models against their work, with one view to eight."""
    from prep.store import TileStore
    from solution import InputError, usable_cores
    from train import frontier

    if arguments.baseline:
        raise InputError("--baseline: orders the networks of runs; leave it out to compare models")
    candidates = frontier.read_candidates(arguments.runs)
    points = frontier.measure_points(candidates, TileStore(arguments.store), usable_cores())
    frontier.write_points(arguments.out, points, candidates)
    print(frontier.point_table(points))
    print(frontier.describe_best(points))
    if arguments.report:
        frontier.write_report(arguments.report, points, candidates, pareto_command(arguments, ""))
    return 0


def pareto_command(arguments: argparse.Namespace, baseline: str) -> str:
    """Return the command line that makes the report."""
    files = f"--out {arguments.out} --report {arguments.report}"
    return f"python -m train pareto {' '.join(arguments.runs)} --store {arguments.store} {baseline}{files}"


def add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pack`."""
    parser.add_argument(
        "--run",
        type=Path,
        required=True,
        action="append",
        help="folder of a run with finished folds; several, of any kinds, are weighed against each other",
    )
    parser.add_argument(
        "--calibration", type=Path, help="JSON file of `calibrate`; default: no optional step"
    )
    parser.add_argument(
        "--passes",
        type=Path,
        help="JSON file of `pareto`, for a single run; default: every network's first view, then the second",
    )
    parser.add_argument("--out", type=Path, default=Path("weights/model.pth"), help="default: %(default)s")
    mixture = parser.add_argument_group("several runs, or a budget")
    mixture.add_argument("--max-mb", type=float, help="most megabytes of the file (default: 300)")
    mixture.add_argument("--max-gmac", type=float, help="most 10^9 multiply-adds a tile (default: 160)")
    mixture.add_argument("--oof", type=Path, help="folder: a run of the mixture's out-of-fold predictions")
    mixture.add_argument(
        "--networks",
        type=int,
        help="most networks of each run, that of all tiles first (default: it alone, or all folds)",
    )
    add_store_argument(mixture)


def run_pack(arguments: argparse.Namespace) -> int:
    """Pack the folds of one run, or of several under a budget, into one model.pth and write its card."""
    of_mixtures = (arguments.max_mb, arguments.max_gmac, arguments.networks, arguments.oof)
    alone = len(arguments.run) == 1 and all(given is None for given in of_mixtures)
    return pack_run(arguments) if alone else pack_runs(arguments)


def pack_run(arguments: argparse.Namespace) -> int:
    """Pack all folds of one run."""
    from train.pack import pack

    out = pack(arguments.run[0], arguments.calibration, arguments.out, arguments.passes)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def pack_runs(arguments: argparse.Namespace) -> int:
    """Choose and weigh the passes of some runs under a budget, and pack their networks."""
    from prep.store import TileStore
    from solution import InputError, usable_cores
    from train.mixture import Budget, mixture_table, pack_mixture, write_out_of_fold
    from train.report.tables import find_scheme

    if arguments.passes:
        raise InputError("--passes: an order for a single run; several runs, or a budget, find their own")
    given = {
        "size": (arguments.max_mb or 0) * 1e6,
        "gmac": arguments.max_gmac,
        "networks": arguments.networks,
    }
    budget = Budget(**{name: value for name, value in given.items() if value})
    store, cores = TileStore(arguments.store), usable_cores()
    fitted = pack_mixture(arguments.run, store, arguments.calibration, arguments.out, budget, cores)
    if arguments.oof:
        write_out_of_fold(fitted, arguments.run, store, find_scheme(arguments.run[0]), arguments.oof)
    print(mixture_table(fitted))
    print(
        f"score with choices of each fold made on the others {fitted.nested:.4f}, {fitted.gain:+.4f} ± "
        f"{fitted.error:.4f} beside the best run\n{arguments.out}: "
        f"{arguments.out.stat().st_size / 1e6:.1f} MB, {fitted.plan.gmac:.1f} GMAC a tile"
    )
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
    parser.add_argument(
        "--html", type=Path, help="a page with pictures of all tiles, e.g. reports/index.html"
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME",
        help="compare the other runs with this one on that page; default: with those of `baseline`",
    )
    parser.add_argument("--calibration", type=Path, help="JSON file of `calibrate` to show on that page")
    parser.add_argument("--passes", type=Path, help="JSON file of `pareto` to show on that page")
    add_store_argument(parser)


def run_report(arguments: argparse.Namespace) -> int:
    """Compare the out-of-fold scores of runs in Markdown, with figures, and on a page with pictures."""
    from prep.store import TileStore
    from train.report.page import write_page
    from train.report.tables import read_run_names, write_report

    runs, store = read_run_names(arguments.runs), TileStore(arguments.store)
    scores = write_report(runs, store, arguments.out, arguments.made_with)
    print(f"{arguments.out} written")
    if arguments.html:
        shown = (arguments.made_with, arguments.calibration, arguments.passes, arguments.against)
        page = write_page(runs, scores, store, arguments.html, *shown)
        print(f"{page} written, {page.stat().st_size / 1e6:.1f} MB")
    return 0


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
    from prep.text import plural
    from solution import InputError
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

    exported = export_masks(arguments.masks, arguments.data, arguments.out)
    print(format_areas(exported))
    return 0


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench`."""
    parser.add_argument("--data", type=Path, help="folder with Band1 ... Band5; default: synthetic tiles")
    parser.add_argument("--tiles", type=int, default=25, help="how many of them (default: %(default)s)")
    parser.add_argument(
        "--weights", type=Path, default=Path("weights/model.pth"), help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("reports/bench.md"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small images, once: only to see that it works")


def run_bench(arguments: argparse.Namespace) -> int:
    """Time solution.py by stage and against its forward passes and a straightforward program; exit status 1
    where their masks differ."""
    from train.submit.bench import AGREEMENT_AIM, bench

    data = ["--data <folder with Band1 ... Band5>"] if arguments.data else []
    command = " ".join(["python -m train bench", *data, f"--tiles {arguments.tiles}"])
    command += " --quick" if arguments.quick else ""
    given = (arguments.data, arguments.tiles, arguments.weights, arguments.out, arguments.quick)
    return 0 if bench(*given, command).agreement >= AGREEMENT_AIM else 1


def add_ablate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ablate`."""
    parser.add_argument("--set", type=Path, help="YAML file of named trials: train/configs/ablations.yaml")
    parser.add_argument(
        "--trials", help="names of the set's trials to run, e.g. focal-dice,mcc; default: all"
    )
    parser.add_argument("--configs", type=Path, nargs="+", default=[], help="YAML files, each a trial")
    parser.add_argument(
        "--include", nargs="+", default=[], metavar="NAME=FOLDER[,FOLDER]", help="runs that are there: rows"
    )
    parser.add_argument(
        "--reference", help="name of the trial to compare with; default: the set's or the first"
    )
    parser.add_argument("--run", type=Path, default=Path("runs/ablate"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--report", type=Path, default=Path("reports/ablations.md"), help="default: %(default)s"
    )
    parser.add_argument("--seeds", type=whole_numbers, default=[0], help="e.g. 0,1; default: 0")
    parser.add_argument("--folds", type=whole_numbers, help="e.g. 0,1; default: all folds")
    parser.add_argument("--steps", type=int, help="steps of every fold; default: as each config says")
    parser.add_argument("--jobs", type=int, help="processes at once, one thread each; default: one a core")
    parser.add_argument(
        "--override", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every trial"
    )
    parser.add_argument("--store", type=Path, help="tile store; default: as the configs say")


def run_ablate(arguments: argparse.Namespace) -> int:
    """Train a set of configs on the same folds with the same seeds, and tabulate what each is worth."""
    from train.ablate import ablate, parse_arguments

    ablate(parse_arguments(arguments))
    print(f"{arguments.report} written")
    return 0


def add_grader_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `grader-check`."""
    parser.add_argument("--solution", type=Path, default=Path("solution.py"), help="default: %(default)s")
    parser.add_argument(
        "--weights", type=Path, default=Path("weights/model.pth"), help="default: %(default)s"
    )
    parser.add_argument("--data", type=Path, help="folder with Band1 ... Band5; default: synthetic tiles")
    parser.add_argument("--tiles", type=int, default=3, help="how many of them (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=512, help="side of synthetic ones in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--optional",
        action="store_true",
        help="where there is no Python 3.9, or its packages cannot be installed, say so and end well",
    )


def run_grader_check(arguments: argparse.Namespace) -> int:
    """Run the submission under Python 3.9 and the grader's packages, read-only and without network; exit
    status 1 where a caller fails or the masks are others than here."""
    from train.submit.grader.command import grader_check

    given = (arguments.solution, arguments.weights, arguments.data, arguments.tiles, arguments.size)
    return grader_check(*given, optional=arguments.optional)


def whole_numbers(text: str) -> list[int]:
    """Return the numbers in text such as "0,1,2"."""
    return [int(number) for number in text.split(",")]


def numbers(text: str) -> list[float]:
    """Return the numbers in text such as "1,1.5"."""
    return [float(number) for number in text.split(",")]


COMMANDS = {
    "fit": Command("train the folds of a tile store", add_fit_arguments, run_fit),
    "distil": Command("train students of finished runs", add_distil_arguments, run_distil),
    "evaluate": Command(
        "score the held-out tiles of a run, or any folder of masks", add_evaluate_arguments, run_evaluate
    ),
    "ablate": Command("what is each ingredient worth?", add_ablate_arguments, run_ablate),
    "baseline": Command("score a gradient boosting on the same folds", add_baseline_arguments, run_baseline),
    "pixels": Command("fit a network on single pixels", add_pixels_arguments, run_pixels),
    "calibrate": Command("decide on views, bias, CRF, cleaning", add_calibrate_arguments, run_calibrate),
    "pareto": Command("score against work, and the order of passes", add_pareto_arguments, run_pareto),
    "pack": Command("write weights/model.pth", add_pack_arguments, run_pack),
    "preview": Command("draw tiles, masks and a contact sheet", add_preview_arguments, run_preview),
    "export": Command("masks as GeoTIFF and polygons for QGIS", add_export_arguments, run_export),
    "check": Command("would the submission be accepted?", add_check_arguments, run_check),
    "bench": Command("time solution.py, and where it goes", add_bench_arguments, run_bench),
    "grader-check": Command("the same masks in the grader's Python?", add_grader_arguments, run_grader_check),
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
    "BenchError",
    "ConfigError",
    "DataError",
    "GraderError",
    "InputError",
    "PretrainedError",
    "ReportError",
    "RunError",
    "StoreError",
    "SubmissionError",
    "TileError",
)


if __name__ == "__main__":
    sys.exit(main())
