"""What each part of an ensemble is worth: nested choices, the steps after the networks, the report."""

from types import SimpleNamespace

import numpy as np
import pytest
from train_helpers import SMOKE, smoke_config

import solution
from train.__main__ import main
from train.config import Config, MemberConfig, PostprocessConfig
from train.ensemble import Evidence, measure, objective
from train.objective import TileCounts, count_tile


def counts_of(tile: str, fold: int, right: bool) -> TileCounts:
    """Return the counts of a small phase-2 tile that is predicted right, or without its glacier."""
    codes = np.repeat(np.arange(3), 30).reshape(9, 10)
    return count_tile(tile, fold, "phase2", codes, codes if right else np.where(codes == 1, 0, codes))


def test_a_nested_score_uses_the_choice_of_the_other_folds():
    """Option 0 is right on fold 0 alone, option 1 on fold 1 alone: each fold gets what suited the other."""
    by_bias = {
        0.0: [counts_of("a", 0, True), counts_of("b", 1, False)],
        1.0: [counts_of("a", 0, False), counts_of("b", 1, True)],
    }
    evidence = SimpleNamespace(
        fold_of={"a": 0, "b": 1},
        members={},
        of_members=lambda members: None,
        count=lambda extent, steps: by_bias[steps.extent_bias],
    )
    options = [PostprocessConfig(extent_bias=bias) for bias in by_bias]
    found = Evidence.nested(evidence, options)
    wrong = [counts_of("a", 0, False), counts_of("b", 1, False)]
    assert [tile.tile_id for tile in found] == ["a", "b"]
    assert objective(found) == pytest.approx(objective(wrong))
    assert objective(wrong) < objective([counts_of("a", 0, True)])


@pytest.fixture(scope="module")
def evidence(smoke_run, store) -> Evidence:
    """Return the predictions of the smoke run."""
    return Evidence(smoke_run, smoke_config(store))


def test_classes_follow_the_steps(evidence):
    extent = evidence.of_members(evidence.members)
    probability = extent("000")
    image = evidence.store.image("000")
    valid = solution.valid_mask(image)
    none = evidence.classes("000", probability, PostprocessConfig(extent_bias=-100.0))
    clean = evidence.classes("000", probability, PostprocessConfig(extent_bias=100.0, debris_bias=-100.0))
    debris = evidence.classes("000", probability, PostprocessConfig(extent_bias=100.0, debris_bias=100.0))
    assert set(none[valid]) == {0} and set(clean[valid]) == {1} and set(debris[valid]) == {2}
    assert not clean[~valid].any()
    crf = {
        "smooth_px": 3.0,
        "smooth_weight": 1.0,
        "bilateral_px": 30.0,
        "bilateral_std": 0.5,
        "bilateral_weight": 1.0,
    }
    steps = PostprocessConfig(crf=crf, min_speck=20, min_hole=20)
    assert evidence.classes("000", probability, steps).shape == (96, 96)


def test_of_three_members_each_is_left_out_in_turn():
    evidence = SimpleNamespace(
        config=Config(),
        members={name: MemberConfig() for name in "abc"},
        of_members="".join,
        count=lambda extent, steps: extent,
        nested=lambda options: "",
    )
    left_out = {row.name: row.counts for row in measure(evidence) if row.name.startswith("without ")}
    assert left_out.pop("without the network of the kind") == "abc"
    assert left_out == {"without a": "bc", "without b": "ac", "without c": "ab"}


def test_the_command_reports_every_part_with_its_interval(smoke_run, store, tmp_path, capsys):
    report = tmp_path / "ensemble.md"
    command = ["ensemble", "--recipe", str(SMOKE), "--run", str(smoke_run), "--report", str(report)]
    assert main([*command, f"data.store={store}"]) == 0
    text = report.read_text()
    for row in (
        "the recipe",
        "north alone, 1 view",
        "turned alone, 2 views",
        "CRF, nested",
    ):
        assert f"| {row}" in text
    assert text.count(" to ") > 20 and "4 tiles, stratified folds" in text
    assert "| the recipe" in capsys.readouterr().out
