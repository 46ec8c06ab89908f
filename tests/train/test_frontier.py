"""Score against work of models of different kinds: what is scored, what it costs, what is best."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import NORMALIZATION, TINY_ARCH, stored_member
from train.test_mixture import OTHER_ARCH, write_run
from train_helpers import make_store

from prep.store import TileStore
from solution import decide_classes, load_member, normalize
from train import frontier
from train.__main__ import main
from train.calibrate import score
from train.fit import RunError
from train.frontier import Candidate, Point
from train.objective import count_tile
from train.pareto import Scores, open_runs
from train.predict import predict_diagonals
from train.work import count_gmac


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return TileStore(make_store(tmp_path_factory.mktemp("frontier") / "store"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, store: TileStore) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        write_run(root / "teacher", store, TINY_ARCH, np.s_[10:20], 0.55, seed=0),
        write_run(root / "student", store, OTHER_ARCH, np.s_[30:42], 0.6, seed=2),
    ]


def point(model: str, gmac: float, objective: float, size: int = 10) -> Point:
    return Point(model, 1, 1, gmac, 1.0, size, Scores(objective, objective, None), 0.0, 0.0, False)


def test_models_are_read_from_names_weights_and_mixtures(tmp_path: Path) -> None:
    mixture = tmp_path / "model_mixture.json"
    mixture.write_text(json.dumps({"folders": ["runs/a", "runs/b", "runs/c"], "weights": [0.25, 0, 0.75]}))
    found = frontier.read_candidates(["one=runs/a", "two=runs/a:0.7,runs/b:0.3", f"mixed={mixture}"])
    assert found == [
        Candidate("one", (Path("runs/a"),), (1.0,)),
        Candidate("two", (Path("runs/a"), Path("runs/b")), (0.7, 0.3)),
        Candidate("mixed", (Path("runs/a"), Path("runs/c")), (0.25, 0.75)),
    ]


@pytest.mark.parametrize("named", [["runs/a"], ["=runs/a"], ["a="], ["a=runs/a", "a=runs/b"]])
def test_models_without_a_name_of_their_own_are_refused(named: list[str]) -> None:
    with pytest.raises(RunError, match="models: "):
        frontier.read_candidates(named)


def test_a_table_a_plot_and_a_file_of_all_models(runs: list[Path], store: TileStore, tmp_path: Path) -> None:
    teacher, student = runs
    models = [f"teacher={teacher}", f"student={student}", f"both={teacher}:0.25,{student}:0.75"]
    out, report = tmp_path / "frontier.json", tmp_path / "frontier.md"
    files = ["--store", str(store.folder), "--out", str(out), "--report", str(report)]
    assert main(["pareto", *models, *files]) == 0
    points = json.loads(out.read_text())["points"]
    assert [(p["model"], p["views"]) for p in points] == [
        (name, views) for name in ("teacher", "student", "both") for views in range(1, 9)
    ]
    by_place = {(p["model"], p["views"]): p for p in points}
    work = {"teacher": count_gmac(TINY_ARCH), "student": count_gmac(OTHER_ARCH)}
    for name, gmac in {**work, "both": sum(work.values())}.items():
        assert by_place[name, 4]["gmac"] == pytest.approx(4 * gmac)
    assert by_place["both", 2]["seconds"] == pytest.approx(
        by_place["teacher", 2]["seconds"] + by_place["student", 2]["seconds"]
    )
    assert by_place["teacher", 8]["difference"] == 0
    assert by_place["both", 8]["scores"]["objective"] == pytest.approx(mixed_score(runs, store), abs=2e-3)
    text = report.read_text()
    assert f"python -m train pareto teacher={teacher}" in text
    assert "| student | 1 | 3 |" in text and "The best under 160 GMAC" in text
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def mixed_score(runs: list[Path], store: TileStore) -> float:
    """Return the objective of both runs, weighed 1 to 3, from their files."""
    tiles = []
    for row in store.tiles:
        teacher, student = (
            np.concatenate(
                [np.load(run / folder / f"{row.tile_id}.npy") for folder in ("passes", "diagonals")]
            ).mean(axis=0, dtype=np.float64)
            for run in runs
        )
        classes = decide_classes(0.25 * teacher + 0.75 * student)
        tiles.append(count_tile(row.tile_id, 0, row.labels, store.mask(row.tile_id), classes))
    return score(tiles)


def test_networks_that_need_north_above_are_asked_once(
    runs: list[Path], store: TileStore, tmp_path: Path
) -> None:
    shutil.copytree(runs[1], tmp_path / "north")
    for path in (tmp_path / "north").glob("fold*/fold.pt"):
        torch.save({**torch.load(path, weights_only=True), "views": 1}, path)
    models = [f"all={runs[0]}", f"north={tmp_path / 'north'}", f"both={runs[0]},{tmp_path / 'north'}"]
    points = frontier.measure_points(frontier.read_candidates(models), store, jobs=1)
    by_place = {(point.model, point.views): point for point in points}
    assert ("north", 2) not in by_place
    expected = 8 * count_gmac(TINY_ARCH) + count_gmac(OTHER_ARCH)
    assert by_place["both", 8].gmac == pytest.approx(expected)


def test_diagonals_are_what_the_network_says_of_mirrored_tiles(store: TileStore) -> None:
    """By NumPy and the bare network, on an image that is no square."""
    member = load_member(
        {**stored_member(TINY_ARCH), "normalization": NORMALIZATION}, "test", torch.device("cpu")
    )
    image = np.random.default_rng(0).normal(1, 1, (64, 96, 5)).astype(np.float32)
    found = predict_diagonals(member, image)
    mirrors = (lambda a: a.swapaxes(-1, -2), lambda a: a[..., ::-1, ::-1].swapaxes(-1, -2))
    x = normalize(image, NORMALIZATION)
    for mirror, probs in zip(mirrors, found):
        with torch.no_grad():
            logits = member.network(torch.from_numpy(np.ascontiguousarray(mirror(x)))[None])
        expected = mirror(logits.softmax(1)[0].numpy())
        np.testing.assert_allclose(probs, expected, atol=1e-3)
    assert found.shape == (2, 4, 64, 96) and np.abs(found[0] - found[1]).max() > 0.01


def test_eight_views_are_the_six_and_both_diagonals(runs: list[Path], store: TileStore) -> None:
    run, tile = open_runs(runs[:1], store)[0], store.tile_ids[0]
    frontier.measure_points(frontier.read_candidates([f"teacher={runs[0]}"]), store, jobs=1)
    means = frontier.means_of_all(run, 8, tile).astype(np.float32)
    six = np.load(run.folder / "passes" / f"{tile}.npy").astype(np.float32)
    both = np.load(run.folder / "diagonals" / f"{tile}.npy").astype(np.float32)
    np.testing.assert_allclose(means[5], six.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(means[7], np.concatenate([six, both]).mean(axis=0), atol=1e-3)
    np.testing.assert_array_equal(frontier.means_of_all(run, 1, tile)[0], six[0].astype(np.float16))


def test_front_and_the_best_within_limits() -> None:
    points = [point("a", 10, 0.5), point("b", 10, 0.6), point("c", 20, 0.6), point("d", 200, 0.7)]
    assert [frontier.is_on_front(one, points) for one in points] == [False, True, False, True]
    assert frontier.best_within(points, 160, 100).model == "b"
    assert frontier.best_within(points, 160, 5) is None
    assert frontier.describe_best([points[3]]).startswith("Nothing here stays under 160 GMAC")


def test_plot_has_a_line_for_each_model() -> None:
    points = [point(name, gmac, 0.5) for name in ("a", "b") for gmac in (1.0, 2.0)]
    axis = frontier.draw_points(points).axes[0]
    named = [line.get_label() for line in axis.lines]
    assert {"a", "b", "most known to pass the platform"} <= set(named)
    assert "GMAC" in axis.get_xlabel() and "MCC" in axis.get_ylabel()
