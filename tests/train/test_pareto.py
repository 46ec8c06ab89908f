"""What further passes are worth: scores over members and views, the order of passes, and packing it."""

import json
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import pytest
import torch
from support import NORMALIZATION, TINY_ARCH, random_network
from train_helpers import make_store

import solution
from prep.labels import GLACIER_OR_DEBRIS, IGNORE
from prep.store import TileStore
from train import calibrate, pareto
from train import pack as package
from train.__main__ import main
from train.calibrate import Settings, score
from train.fit import FOLD_FORMAT, RunError
from train.objective import TileCounts, count_tile
from train.pareto import Cell, Counts, Scores, Step, Subset
from train.run import FOLD_FILE
from train.work import count_gmac

FREE = pareto.Cost(gmac=3.0, seconds=0.5)
PIXELS = 1000  # of either class in a made-up tile


def tile_scoring(mcc: float, tile: str = "a", fold: int = 0) -> TileCounts:
    """Return counts of other and glacier, equally many and equally often right, whose MCC is `mcc`."""
    right = round(PIXELS * (1 + mcc) / 2)
    codes = np.repeat([0, 1], PIXELS)
    wrong = np.tile(np.arange(PIXELS) >= right, 2)
    return count_tile(tile, fold, "phase2", codes, np.where(wrong, 1 - codes, codes))


def counts_of(mcc: Callable[[Subset, Subset], float], runs: int) -> Counts:
    """Return the counts of one tile, of which `mcc` says what a choice of runs and views scores."""
    members, views = pareto.all_subsets(runs), pareto.all_subsets(len(solution.VIEWS))
    return {(m, v): [tile_scoring(mcc(m, v))] for m in members for v in views}


def by_number(gains_of_members: Sequence[float], gains_of_views: Sequence[float], runs: int = 2) -> Counts:
    """Return counts whose score only depends on how many members and views there are."""
    return counts_of(lambda m, v: gains_of_members[len(m) - 1] + gains_of_views[len(v) - 1], runs)


# --- The order of views and members -------------------------------------------------------------------------


def test_views_are_ordered_by_what_they_add_not_by_what_they_are_alone() -> None:
    alone = (0.10, 0.12, 0.30, 0.14, 0.29, 0.16)

    def mcc(_: Subset, views: Subset) -> float:
        best = max(alone[view] for view in views)
        return best + (0.1 if {2, 5} <= set(views) else 0.0) + (0.05 if {5, 0} <= set(views) else 0.0)

    assert pareto.order_views(counts_of(mcc, 1)) == (2, 5, 0, 1, 3, 4)


def test_views_are_judged_on_all_runs() -> None:
    alone = {0: (0.5, 0.1, 0.3, 0.0, 0.0, 0.0), 1: (0.1, 0.2, 0.6, 0.0, 0.0, 0.0)}
    counts = counts_of(lambda m, v: np.mean([max(alone[run][view] for view in v) for run in m]), 2)
    assert pareto.order_views(counts)[:2] == (2, 0)  # alone 0.3, 0.15, 0.45; each first in one run


def test_nested_score_uses_the_views_that_the_other_folds_chose() -> None:
    # view 0 is right on fold 0 only, view 1 on fold 1 only: each fold gets the one that suited the other
    values = {0: (0.8, 0.2), 1: (0.2, 0.6)}  # fold: views 0 and 1

    def tiles(views: Subset) -> list[TileCounts]:
        of_fold = {fold: [pair[view] if view < 2 else 0.0 for view in views] for fold, pair in values.items()}
        return [tile_scoring(max(mccs), str(fold), fold) for fold, mccs in of_fold.items()]

    counts = {((0,), views): tiles(views) for views in pareto.all_subsets(len(solution.VIEWS))}
    orders = pareto.nested_orders(counts)
    assert (orders[0][0], orders[1][0]) == (1, 0)
    chosen = {fold: order[:1] for fold, order in orders.items()}
    assert pareto.nested_objective(counts, 1, chosen) == pytest.approx(0.2, abs=2e-3)
    first = pareto.measure_cells(counts, pareto.order_views(counts), FREE)[0]
    assert first.nested == pytest.approx(0.2, abs=2e-3)
    assert first.scores.objective == pytest.approx(0.5, abs=2e-3)


def test_cells_hold_scores_and_work() -> None:
    cells = pareto.measure_cells(by_number((0.2, 0.3), (0, 0.1, 0.1, 0.1, 0.1, 0.2)), range(6), FREE)
    assert [(cell.members, cell.views) for cell in cells] == [(m, v) for m in (1, 2) for v in range(1, 7)]
    last = cells[-1]
    assert (last.passes, last.gmac, last.seconds) == (12, 36.0, 6.0)
    assert last.scores == pytest.approx(Scores(0.5, 0.5, 0.5), abs=2e-3)
    best = [(cell.members, cell.views) for cell in cells if cell.on_front]
    assert best == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 6)]  # (1, 2) and (2, 1): as good, and as much work


def test_any_views_is_the_mean_over_all_choices() -> None:
    counts = counts_of(lambda m, v: 0.6 if 4 in v else 0.0, 1)
    cells = pareto.measure_cells(counts, pareto.order_views(counts), FREE)
    assert [cell.scores.objective for cell in cells] == pytest.approx([0.6] * 6, abs=2e-3)
    assert [cell.any_views for cell in cells] == pytest.approx([0.1 * n for n in range(1, 7)], abs=2e-3)


# --- The path -----------------------------------------------------------------------------------------------


def walked(counts: Counts) -> list[tuple[int, int]]:
    return [(step.members, step.views) for step in pareto.walk_greedily(counts, range(6))]


def test_a_second_member_that_gains_more_comes_before_the_second_view() -> None:
    steps = pareto.walk_greedily(by_number((0.2, 0.3), (0, 0.05, 0.06, 0.07, 0.08, 0.09)), range(6))
    assert [(step.members, step.views) for step in steps] == [(2, views) for views in range(1, 7)]
    assert (steps[0].added, steps[0].passes, steps[0].instead is None) == ("member", 2, False)
    assert (steps[0].gain, steps[0].instead) == pytest.approx((0.1, 0.05), abs=2e-3)
    assert (steps[1].gain, steps[1].instead) == (pytest.approx(0.025, abs=2e-3), None)


def test_views_that_gain_more_come_first() -> None:
    counts = by_number((0.2, 0.21), (0, 0.1, 0.2, 0.2, 0.2, 0.2))
    assert walked(counts)[:3] == [(1, 2), (1, 3), (2, 3)]


def test_gains_are_compared_for_each_pass() -> None:
    # at (1, 2) a member brings 0.12 for two passes, a view 0.08 for one
    counts = by_number((0.2, 0.32), (0, 0.15, 0.23, 0.23, 0.23, 0.23))
    assert walked(counts)[:3] == [(1, 2), (1, 3), (2, 3)]


def test_standard_error_is_that_of_the_mean_over_like_tiles() -> None:
    gains = (0.1, 0.2, 0.4, 0.1)
    counts = {
        ((0,), views): [
            tile_scoring(0.2 + (gain if len(views) > 1 else 0), str(n)) for n, gain in enumerate(gains)
        ]
        for views in pareto.all_subsets(6)
    }
    expected = np.std(gains, ddof=1) / np.sqrt(len(gains))
    assert pareto.standard_error(counts, range(6), (1, 1), (1, 2)) == pytest.approx(expected, rel=0.02)
    assert pareto.walk_greedily(by_number((0.2,), range(6), runs=1), range(6))[0].error is None  # one tile


def path_through(*places: tuple[int, int]) -> list[Step]:
    """Return the steps of a path from one member in one view."""
    steps = []
    for (members, _), (m, v) in zip(((1, 1), *places), places):
        steps.append(Step("member" if m > members else "view", m, v, m * v, 0.0, None, None))
    return steps


@pytest.mark.parametrize(
    ("path", "measured", "expected"),
    [
        pytest.param(
            path_through((2, 1), (2, 2), (2, 3)),
            2,
            "7a 8a 9a 7b 8b 9b 7c 8c 9c",
            id="members first: all join with one view",
        ),
        pytest.param(
            path_through((1, 2), (2, 2), (2, 3)),
            2,
            "7a 7b 8a 8b 9a 9b 7c 8c 9c",
            id="a second view first: all others join with two",
        ),
        pytest.param(
            path_through((1, 2), (1, 3), (2, 3)),
            2,
            "7a 7b 7c 8a 8b 8c 9a 9b 9c",
            id="all views first",
        ),
        pytest.param(
            path_through((2, 1), (2, 2), (3, 2), (3, 3)),
            3,
            "7a 8a 7b 8b 9a 9b 7c 8c 9c",
            id="the third of three measured ones is worth less than a second view",
        ),
        pytest.param(path_through((1, 2), (1, 3)), 1, "7a 8a 9a 7b 8b 9b 7c 8c 9c", id="one run"),
    ],
)
def test_path_goes_on_to_all_members(path: Sequence[Step], measured: int, expected: str) -> None:
    passes = pareto.expand(path, measured, [7, 8, 9], ["a", "b", "c"])
    assert " ".join(f"{member}{view}" for member, view in passes) == expected


def test_all_members_beyond_the_measured_ones_join_together() -> None:
    passes = pareto.expand(path_through((2, 1), (2, 2)), 2, [0, 1, 2, 3, 4], [0, 1])
    assert passes == (*((member, 0) for member in range(5)), *((member, 1) for member in range(5)))


def test_work_of_a_pass_is_what_was_published_of_it() -> None:
    arch = {"name": "Unet", "args": {"encoder_name": "resnet18"}}
    assert count_gmac(arch) == pytest.approx(22.1, abs=0.05)


# --- From passes on disk to model.pth -----------------------------------------------------------------------


def truth(mask: np.ndarray) -> np.ndarray:
    """Return a class for each label code, (H, W): clean ice for glacier of unknown kind, other for nodata."""
    classes = np.where(mask == GLACIER_OR_DEBRIS, 1, mask)
    return np.where(mask == IGNORE, 0, classes).astype(int)


def wrong_in(mask: np.ndarray, columns: slice) -> np.ndarray:
    """Return probabilities (4, H, W) that are right for 0.9, and in some columns wrong for 0.6.

    So the mean of two is right where one of them is.
    """
    classes = truth(mask)
    right = np.eye(4)[classes].transpose(2, 0, 1)
    probs = right * (0.9 - 0.1 / 3) + 0.1 / 3
    opposite = np.eye(4)[np.where(np.isin(classes, (1, 2)), 0, 1)].transpose(2, 0, 1)
    probs[:, :, columns] = (0.4 * right + 0.6 * opposite)[:, :, columns]
    return probs


def make_run(
    folder: Path, store: TileStore, wrong: Callable[[int, str], slice], scheme: str = "stratified"
) -> Path:
    """Write an evaluated run of two folds; `wrong` says in which columns a view of a tile errs."""
    (folder / "passes").mkdir(parents=True)
    fold_of = store.fold_of(scheme)
    for fold in (0, 1):
        tiles = [tile for tile in store.tile_ids if fold_of[tile] == fold]
        record = {
            "format": FOLD_FORMAT,
            "fold": fold,
            "scheme": scheme,
            "arch": TINY_ARCH,
            "state_dict": random_network(seed=fold).state_dict(),
            "normalization": NORMALIZATION,
            "val_tiles": tiles,
            "val_mcc": 0.5,
            "config": {
                "train": {"epochs": 1},
                "data": {"steps_per_epoch": 1, "batch_size": 1, "crop": 64},
                "model": {"init": None},
            },
        }
        (folder / f"fold{fold}").mkdir()
        torch.save(record, folder / f"fold{fold}" / FOLD_FILE)
        for tile in tiles:
            passes = [wrong_in(store.mask(tile), wrong(view, tile)) for view in range(6)]
            np.save(folder / "passes" / f"{tile}.npy", np.array(passes, np.float16))
    return folder


def make_baseline(folder: Path, store: TileStore, wrong: Callable[[str], slice], scheme: str) -> Path:
    """Write what `train.baseline` does; `wrong` says in which columns of a tile it errs."""
    (folder / "oof").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"scheme": scheme}))
    for tile in store.tile_ids:
        np.save(folder / "oof" / f"{tile}.npy", wrong_in(store.mask(tile), wrong(tile)))
    return folder


def stripe(number: int, width: int = 8) -> slice:
    """Return columns that no other number has."""
    return slice(12 + 12 * number, 12 + 12 * number + width)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return TileStore(make_store(tmp_path_factory.mktemp("pareto") / "store"))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory, store: TileStore) -> list[Path]:
    """Return two runs: the views of each err alike, view 4 least, and never where the other run errs."""
    root = tmp_path_factory.mktemp("runs")
    width = (8, 7, 6, 5, 3, 4)
    return [
        make_run(
            root / name, store, lambda view, tile, n=number: stripe(n, width[view] + 2 * (tile == "000"))
        )
        for number, name in enumerate(("first", "second"))
    ]


def ordered(out: Path) -> dict:
    return json.loads(out.read_text())


def run_pareto(runs: Sequence[Path], store: TileStore, out: Path, *more: str) -> dict:
    """Run the command and return what it wrote."""
    assert main(["pareto", *map(str, runs), "--store", str(store.folder), "--out", str(out), *more]) == 0
    return ordered(out)


def test_second_run_that_errs_elsewhere_comes_before_second_views(
    two_runs: list[Path], store: TileStore, tmp_path: Path
) -> None:
    found = run_pareto(two_runs, store, tmp_path / "passes.json")
    assert found["runs"] == ["first", "second"]
    assert found["views"][0] == 4
    assert [step["added"] for step in found["path"]] == ["member"] + ["view"] * 5
    by_place = {(cell["members"], cell["views"]): cell for cell in found["steps"]}
    assert by_place[1, 1]["objective"] < 1
    assert by_place[2, 1]["objective"] == 1
    # the first fold errs more (tile 000), and without a baseline the better one is the first
    assert found["members"] == [1, 0]
    assert found["passes"] == [[fold, view] for view in found["views"] for fold in (1, 0)]


def test_views_that_err_elsewhere_come_before_a_second_run(store: TileStore, tmp_path: Path) -> None:
    def wrong(view: int, tile: str) -> slice:
        return stripe(view, 4 if view == 2 else 8)

    runs = [make_run(tmp_path / name, store, wrong) for name in ("first", "second")]
    found = run_pareto(runs, store, tmp_path / "passes.json")
    assert found["views"][0] == 2
    assert found["path"][0]["added"] == "view"
    # nothing gains once two views agree: then the second member joins, with two views
    assert found["passes"][:4] == [[fold, view] for fold in found["members"] for view in found["views"][:2]]


def test_counts_are_those_of_calibration(two_runs: list[Path], store: TileStore) -> None:
    runs = pareto.open_runs(two_runs, store)
    counts = pareto.count_choices(runs, store, jobs=2)
    expected = calibrate.count_options(runs[1], store, [Settings(), Settings(views=6)], jobs=1)
    for views, tiles in zip(((0,), (0, 1, 2, 3, 4, 5)), expected):
        assert score(counts[(1,), views]) == pytest.approx(score(tiles), abs=1e-6)
        assert score(counts[(1,), views]) < 1


def test_steps_after_the_passes_take_the_views_in_order(two_runs: list[Path], store: TileStore) -> None:
    runs = pareto.open_runs(two_runs, store)
    order = (4, 5, 3, 2, 1, 0)
    expected = pareto.count_choices(runs[:1], store, jobs=1)[(0,), (4,)]
    found = pareto.score_settings([runs[:1]], store, order, [Settings(), Settings(views=6)], jobs=1)
    assert found[0].objective == pytest.approx(score(expected), abs=1e-6)
    assert found[0].objective > found[1].objective


def test_members_are_ordered_by_their_margin_over_the_baseline(
    two_runs: list[Path], store: TileStore, tmp_path: Path
) -> None:
    hard = {tile for tile, fold in store.fold_of("stratified").items() if fold == 0}
    baseline = make_baseline(
        tmp_path / "baseline", store, lambda tile: stripe(0, 40 if tile in hard else 4), "stratified"
    )
    found = run_pareto(two_runs, store, tmp_path / "passes.json", "--baseline", str(baseline))
    assert found["members"] == [0, 1]


def test_baseline_on_other_folds_is_refused(
    two_runs: list[Path], store: TileStore, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    baseline = make_baseline(tmp_path / "baseline", store, lambda tile: stripe(0), "spatial")
    files = ["--store", str(store.folder), "--out", str(tmp_path / "passes.json")]
    assert main(["pareto", str(two_runs[0]), *files, "--baseline", str(baseline)]) == 2
    assert "a baseline on spatial folds, expected stratified ones" in capsys.readouterr().err
    assert not (tmp_path / "passes.json").exists()


def test_report_has_all_places_the_command_and_a_plot(
    two_runs: list[Path], store: TileStore, tmp_path: Path
) -> None:
    report = tmp_path / "reports" / "pareto.md"
    run_pareto(two_runs, store, tmp_path / "passes.json", "--report", str(report))
    text = report.read_text()
    assert f"python -m train pareto {two_runs[0]} {two_runs[1]}" in text.splitlines()[3]
    places = [(members, views) for members in (1, 2) for views in range(1, 7)]
    assert all(f"| {members} | {views} | {members * views} |" in text for members, views in places)
    assert "| one more network | 2 | 1 | 2 |" in text
    assert "| specks and holes | 2 | 6 |" in text
    assert ("| CRF | 2 | 6 |" in text) is (solution.densecrf is not None)
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_single_run_says_that_members_were_not_compared(
    two_runs: list[Path], store: TileStore, tmp_path: Path
) -> None:
    report = tmp_path / "pareto.md"
    found = run_pareto(two_runs[:1], store, tmp_path / "passes.json", "--report", str(report))
    assert found["passes"] == [[fold, view] for view in found["views"] for fold in found["members"]]
    assert "name a second run on other folds" in report.read_text()


def test_plot_draws_a_line_for_each_number_of_networks() -> None:
    cells = [
        Cell(m, v, m * v, 3.0 * m * v, 1.0, Scores(0.5, 0.5, None), 0.5, 0.5, False)
        for m in (1, 2, 3)
        for v in range(1, 7)
    ]
    axis = pareto.draw_scores(cells).axes[0]
    solid = [line for line in axis.lines if line.get_linestyle() == "-"]
    assert [list(line.get_xdata())[0] for line in solid] == [3.0, 6.0, 9.0]
    assert any(list(line.get_xdata()) == [160, 160] for line in axis.lines)
    assert "GMAC" in axis.get_xlabel()
    assert "MCC" in axis.get_ylabel()


def test_a_run_is_no_second_member_to_itself(two_runs: list[Path], store: TileStore) -> None:
    with pytest.raises(RunError, match="different runs; name each once"):
        pareto.open_runs([two_runs[0], two_runs[0].parent / "." / "first"], store)


def test_runs_need_all_tiles(two_runs: list[Path], tmp_path: Path) -> None:
    larger = TileStore(make_store(tmp_path / "larger", tiles=6, folds=3))
    with pytest.raises(RunError, match="no finished fold holds out 004, 005"):
        pareto.open_runs(two_runs, larger)


# --- Packing ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(
    two_runs: list[Path], store: TileStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return the files of `calibrate` (six views) and `pareto` for the first run."""
    root = tmp_path_factory.mktemp("files")
    calibration = root / "calibration.json"
    calibrate.write_calibration(calibration, two_runs, Settings(views=6), [])
    run_pareto(two_runs, store, root / "passes.json")
    return calibration, root / "passes.json"


def test_order_reaches_the_packed_model(
    two_runs: list[Path], files: tuple[Path, Path], tmp_path: Path
) -> None:
    calibration, passes = files
    out = tmp_path / "model.pth"
    arguments = ["--calibration", str(calibration), "--passes", str(passes), "--out", str(out)]
    assert main(["pack", "--run", str(two_runs[0]), *arguments]) == 0
    assert [list(one) for one in solution.load_model(out).passes] == ordered(passes)["passes"]
    assert "the most useful first" in (tmp_path / "model_card.md").read_text()


def test_without_a_second_view_only_the_best_one_is_packed(
    two_runs: list[Path], files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = package.pack(two_runs[0], None, tmp_path / "model.pth", files[1])  # no calibration: one view
    assert solution.load_model(out).passes == ((1, 4), (0, 4))


def test_without_an_order_first_views_come_first(two_runs: list[Path], tmp_path: Path) -> None:
    out = package.pack(two_runs[0], None, tmp_path / "model.pth")
    assert solution.load_model(out).passes == ((0, 0), (1, 0))
    assert "the most useful first" not in (tmp_path / "model_card.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["passes"].append([2, 0]), r"unknown \[fold, view\]: \[\(2, 0\)\]"),
        (lambda found: found["passes"].append([0, 6]), r"unknown \[fold, view\]: \[\(0, 6\)\]"),
        (lambda found: found["passes"].remove([1, 3]), r"missing or unknown \[fold, view\]: \[\(1, 3\)\]"),
        (lambda found: found["passes"].append([0, 0]), "found 13 passes"),
        (lambda found: found["views"].pop(), "in each of 6 views"),
        (lambda found: found.pop("passes"), "no passes in it"),
        (lambda found: found["runs"].reverse(), "found the order for .'second'., expected one for first"),
    ],
    ids=["fold", "view", "missing", "twice", "views", "no passes", "other run"],
)
def test_an_order_that_does_not_fit_is_refused(
    change: Callable[[dict], object], message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    content = ordered(files[1])
    change(content)
    path = tmp_path / "passes.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=message) as caught:
        package.read_order(path, "first", [0, 1], 6)
    assert "python -m train pareto" in str(caught.value)


def test_missing_or_damaged_order_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such order of passes"):
        package.read_order(tmp_path / "passes.json", "first", [0, 1], 6)
    (tmp_path / "passes.json").write_text('{"runs": [')
    with pytest.raises(RunError, match="cannot be read as JSON"):
        package.read_order(tmp_path / "passes.json", "first", [0, 1], 6)


def test_calibration_of_an_older_version_says_to_calibrate_again(
    two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    old = {"runs": [], "class_bias": [0, 0, 0, 0], "postprocess": {"views": 6}}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(old))
    files = ["--calibration", str(path), "--out", str(tmp_path / "model.pth")]
    assert main(["pack", "--run", str(two_runs[0]), *files]) == 2
    error = capsys.readouterr().err
    assert "no views in it" in error
    assert "python -m train calibrate" in error
