"""Adapting BatchNorm to a tile: what is replaced, and that a share of nothing changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import NORMALIZATION, random_network
from train_helpers import make_store, make_tile

from prep.store import TileStore
from solution import normalize
from train.__main__ import main
from train.adapt import blend, measure_run, statistics_of
from train.config import load_config
from train.fit import fit_all

SMOKE = Path(__file__).resolve().parents[1] / "train" / "configs" / "smoke.yaml"
ARCH = {"name": "Unet", "args": {"encoder_name": "resnet18"}}


@pytest.fixture(scope="module")
def record() -> dict:
    torch.manual_seed(0)
    state = random_network(ARCH).state_dict()
    return {"arch": ARCH, "fold": 0, "normalization": NORMALIZATION, "state_dict": dict(state)}


def first_batchnorm(record: dict) -> torch.Tensor:
    return record["state_dict"]["encoder.bn1.running_mean"]


def test_a_share_of_one_takes_the_statistics_of_the_tile(record):
    image, _ = make_tile(0)
    x = torch.from_numpy(normalize(image, NORMALIZATION))[None]
    weight = record["state_dict"]["encoder.conv1.weight"]
    before = torch.nn.functional.conv2d(x, weight, stride=2, padding=3)
    found = first_batchnorm(blend(record, statistics_of(record, image), 1.0))
    assert torch.allclose(found, before.mean(dim=(0, 2, 3)), atol=1e-4)


def test_statistics_are_blended_and_weights_stay(record):
    image, _ = make_tile(0)
    none, half, whole = (blend(record, statistics_of(record, image), share) for share in (0.0, 0.5, 1.0))
    assert torch.equal(first_batchnorm(none), first_batchnorm(record))
    middle = (first_batchnorm(none) + first_batchnorm(whole)) / 2
    assert torch.allclose(first_batchnorm(half), middle, atol=1e-6)
    assert torch.equal(
        half["state_dict"]["encoder.conv1.weight"], record["state_dict"]["encoder.conv1.weight"]
    )


def test_a_run_is_scored_with_each_share_and_reported(tmp_path, capsys):
    store = make_store(tmp_path / "store")
    fit_all(load_config(SMOKE, [f"data.store={store}", "train.epochs=1"]), tmp_path / "run")
    rows = measure_run(tmp_path / "run", TileStore(store), [0.5])
    assert [row.share for row in rows] == [0.0, 0.5]
    assert all(np.isfinite(row.binary) for row in rows)
    report = tmp_path / "adapt.md"
    given = [str(tmp_path / "run"), "--shares", "0.5", "--store", str(store), "--out", str(report)]
    assert main(["adapt", *given]) == 0
    text = report.read_text(encoding="utf-8")
    assert f"| {tmp_path / 'run'} | 0.5 | {rows[1].binary:.4f} |" in text
