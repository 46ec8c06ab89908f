"""How often intervals hold: by margins that are counted right, chosen on other folds, and told of a whole run."""

import argparse

import cv2
import numpy as np
import pandas
import pytest

from prep.store import TileStore
from solution import decide_classes
from train.report import calibration


def cones(labelled: float) -> tuple[np.ndarray, np.ndarray]:
    """Return label codes and probabilities (4, 80, 160) of two glaciers whose probability falls by 0.02 a pixel
    from their middle; all that is above `labelled` is ice in the label. The last columns are nodata."""
    middle = np.ones((80, 160), np.uint8)
    middle[40, 40] = middle[40, 120] = 0
    extent = np.clip(1 - 0.02 * cv2.distanceTransform(middle, cv2.DIST_L2, 5), 0, 1)
    codes = np.where(extent > labelled, 1, 0).astype(np.uint8)
    codes[:, 150:] = 255
    return codes, np.stack([1 - extent, extent, 0 * extent, 0 * extent])


@pytest.mark.parametrize(("labelled", "margin"), [(0.5, 0.05), (0.42, 0.1), (0.69, 0.2), (0.27, 0.25)])
def test_an_interval_holds_from_the_margin_on_at_which_the_label_ends(labelled, margin):
    codes, probs = cones(labelled)
    areas = calibration.count_areas(codes, probs, decide_classes(probs))
    assert len(areas) == 2
    assert areas["ice"].sum() == (codes == 1).sum()
    held = [areas["ice"].between(areas["low", m], areas["high", m]).all() for m in calibration.TRIED]
    assert held == [m >= margin for m in calibration.TRIED]


def test_the_last_row_is_of_margins_that_other_folds_chose():
    rows = {"fold": [0] * 10 + [1] * 10, "pixels": 1000, "ice": [1000] * 10 + [1300] * 10}
    areas = pandas.DataFrame(rows)
    for margin in calibration.TRIED:
        areas["low", margin], areas["high", margin] = 1000 * (1 - margin), 1000 * (1 + margin)
    table = calibration.coverage_table(areas).splitlines()
    assert "0.1 to 1 km² (20)" in table[0]
    assert "| 0.05 | 50%, 0.10 | 50%, 0.10 |" in table
    assert "| 0.3 | 100%, 0.60 | 100%, 0.60 |" in table
    assert table[-1] == "| chosen on the other folds | 50% | 50% |"  # fold 0 asks for 0.05, fold 1 for 0.3


def test_the_command_tells_of_a_run(store, tmp_path, capsys):
    tiles, run, out = TileStore(store), tmp_path / "run", tmp_path / "deep" / "calibration.md"
    (run / "oof").mkdir(parents=True)
    (run / "run.json").write_text('{"scheme": "stratified"}')
    for tile in tiles.tile_ids:
        glacier = np.isin(tiles.mask(tile), (1, 2, 4)) * 0.6 + 0.2
        np.save(run / "oof" / f"{tile}.npy", np.stack([1 - glacier, glacier, 0 * glacier, 0 * glacier]))
    parser = argparse.ArgumentParser()
    calibration.add_calibration_arguments(parser)
    given = ["--run", str(run), "--store", str(store), "--out", str(out)]
    assert calibration.run_calibration(parser.parse_args(given)) == 0
    text = out.read_text(encoding="utf-8")
    assert "Expected calibration error: 0.200; by tile" in text
    assert all(tile in text for tile in tiles.tile_ids)
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "calibration.md" in capsys.readouterr().out
