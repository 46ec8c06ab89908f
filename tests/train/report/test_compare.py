"""Comparisons say what the paired intervals show, which tiles changed, and which settings differ."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from train_helpers import make_store

from prep.labels import IGNORE
from prep.store import TileStore
from train.objective import Interval, binary, difference_intervals, mcc
from train.report.compare import add_compare_arguments, run_compare, verdict
from train.report.scores import ReportError, count_run

SIZE = 240  # 2 x 2 blocks a tile


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TileStore:
    """Return a store of four tiles in two folds."""
    return TileStore(make_store(tmp_path_factory.mktemp("compare") / "store", size=SIZE))


def write_run(folder: Path, store: TileStore, wrong: float, tiles: tuple = ()) -> Path:
    """Write a run that errs in a share of the pixels, the same ones but for those of further errors.

    In `tiles`, if any, twice as many are wrong.
    """
    (folder / "fold0").mkdir(parents=True)
    (folder / "oof").mkdir()
    (folder / "fold0" / "config.yaml").write_text(
        f"data: {{scheme: stratified, store: {folder}}}\noptim: {{lr: {wrong}}}\n"
    )
    for number, tile_id in enumerate(store.tile_ids):
        codes, rng = store.mask(tile_id), np.random.default_rng(number)
        truth = np.where(codes == IGNORE, 0, np.where(codes == 4, 1, codes))
        share = wrong * (2 if tile_id in tiles else 1)
        classes = np.where(rng.random(codes.shape) < share, (truth + 1) % 4, truth)
        probs = 0.1 + 0.6 * (np.arange(4)[:, None, None] == classes)
        np.save(folder / "oof" / f"{tile_id}.npy", probs.astype(np.float16))
    return folder


def compare(run: Path, other: Path, store: TileStore) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser()
    add_compare_arguments(parser)
    return run_compare(parser.parse_args([str(run), str(other), "--store", str(store.folder)]))


def test_a_better_run_is_told_from_a_worse_one(tmp_path, store, capsys):
    worse = write_run(tmp_path / "a", store, 0.2, tiles=("002",))
    better = write_run(tmp_path / "b", store, 0.1)
    assert compare(worse, better, store) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{better} against {worse}, on the 4 tiles that both hold out\n")
    gain = difference_intervals(count_run(better, store), count_run(worse, store))["extent MCC"]
    text = f"{gain.value:.3f}, 95 % interval {gain.low:.3f} to {gain.high:.3f}"
    assert f"extent MCC: {better} is better by {text}\n" in shown
    assert "  optim.lr: 0.2, 0.1\n" in shown and "data.store" not in shown, "where data lie is no setting"
    changes = shown.split("changed most")[1].split("\n")[1:5]
    tile = {tile.tile_id: mcc(binary(tile.confusion)) for tile in count_run(worse, store)}
    assert changes[0].startswith("  002: +") and f"({tile['002']:.3f}, " in changes[0]
    assert compare(better, worse, store) == 0
    assert f"extent MCC: {better} is better by {text}\n" in capsys.readouterr().out, "whichever comes first"


def test_a_run_beside_itself_shows_no_difference(tmp_path, store, capsys):
    run = write_run(tmp_path / "a", store, 0.2)
    assert compare(run, run, store) == 0
    shown = capsys.readouterr().out
    assert shown.count("no difference can be told: 0.000, 95 % interval 0.000 to 0.000") == 3
    assert shown.endswith("Settings that differ:\n  none\n")


def test_runs_are_compared_on_the_tiles_that_both_hold_out(tmp_path, store, capsys):
    run, half = write_run(tmp_path / "a", store, 0.2), write_run(tmp_path / "b", store, 0.1)
    for tile in ("000", "001"):
        (half / "oof" / f"{tile}.npy").unlink()
    assert compare(run, half, store) == 0
    shown = capsys.readouterr().out
    assert "on the 2 tiles" in shown and "  000: " not in shown
    for tile in ("002", "003"):
        (run / "oof" / f"{tile}.npy").unlink()
    with pytest.raises(ReportError, match="hold out no common tile"):
        compare(run, half, store)


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (Interval(0.004, -0.007, 0.015), "no difference can be told: 0.004, 95 % interval -0.007 to 0.015"),
        (Interval(0.02, 0.01, 0.03), "b is better by 0.020, 95 % interval 0.010 to 0.030"),
        (Interval(-0.02, -0.03, -0.01), "a is better by 0.020, 95 % interval 0.010 to 0.030"),
        (None, "undefined, no tile here has such labels"),
    ],
)
def test_verdicts(gain, words):
    assert verdict(gain, "b", "a") == words
