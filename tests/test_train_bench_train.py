"""The benchmark of training: rounds alternate, bare steps are steps, the report says what was measured."""

from pathlib import Path

import pytest
import torch
from support import PROJECT
from torch.nn import functional
from train_helpers import make_store

from prep.labels import GLACIER_OR_DEBRIS, IGNORE
from train.bench_train import AIM, Measured, Round, bench_train, format_measured, measure, plain_cross_entropy
from train.config import load_config

SMOKE = PROJECT / "train" / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def test_every_round_but_the_first_is_measured_and_reported(store, tmp_path):
    config = load_config(SMOKE, ["train.threads=1", "trainer.accelerator=cpu"])
    measured = bench_train(config, store, tmp_path / "report.md", 2, 3, "the command")
    assert len(measured.rounds) == 3
    assert all(0 < speed < float("inf") for one in measured.rounds for speed in one)
    # a step of the loop does all that a bare one does; small steps leave room for noise
    assert measured.ratio < 1.5
    assert 0 < measured.crop_seconds < 1
    text = (tmp_path / "report.md").read_text()
    assert "the command" in text
    assert f"**{measured.ratio:.2f}**" in text
    assert text.count("\n| ") == 1 + 3
    assert str(store) not in text


def test_other_processes_count_only_where_there_are_several_threads(store, tmp_path):
    config = load_config(SMOKE, [f"data.store={store}", "train.threads=2", "trainer.accelerator=cpu"])
    assert measure(config, 1, 1, tmp_path).clock == "clock"


@pytest.mark.parametrize("loop, verdict", [(AIM * 2, "reached"), (AIM * 1.9, "missed")])
def test_the_median_round_decides(loop, verdict):
    rounds = [Round(0.1, 2.0, 3.0), Round(loop, 2.0, 3.0), Round(9.0, 2.0, 3.0)]
    measured = Measured(rounds, 0.01, "CPU")
    assert measured.ratio == pytest.approx(loop / 2)
    text = format_measured(measured, load_config(SMOKE), 5, "command")
    assert f"aim: {AIM} or more, {verdict}" in text


def test_plain_cross_entropy_leaves_sets_out():
    logits = torch.randn(2, 4, 3, 5, generator=torch.manual_seed(0))
    codes = torch.tensor([0, 1, 2, 3, GLACIER_OR_DEBRIS, IGNORE], dtype=torch.uint8)
    codes = codes.repeat(5).reshape(2, 3, 5)
    certain = codes < 4
    rows = logits.movedim(1, -1)[certain]
    expected = functional.cross_entropy(rows, codes[certain].long())
    assert plain_cross_entropy(logits, codes).item() == pytest.approx(expected.item(), rel=1e-6)
