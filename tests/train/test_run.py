"""What a run's files tell: which tiles weights have seen, and what to type where nothing is finished."""

import pytest
import torch
from support import write_model

from train.__main__ import main
from train.run import RunError, describe_seen, read_folds


def test_a_score_on_tiles_that_weights_were_trained_on_is_told(tmp_path):
    weights = write_model(tmp_path / "m.pth")
    content = torch.load(weights, weights_only=True)
    torch.save({**content, "provenance": {"tiles": ["02_07", "03_11", "img001"]}}, weights)
    said = describe_seen(weights, ["03_11", "02_07", "09_09"])
    assert said.startswith(f"{weights} was trained on 2 of these 3 tiles, by their ids: 02_07, 03_11. ")
    assert describe_seen(weights, ["09_09"]) == ""
    assert describe_seen(write_model(tmp_path / "silent.pth"), ["02_07"]) == ""


def test_a_run_that_does_not_exist_is_told_with_what_to_type(store, tmp_path, capsys):
    with pytest.raises(RunError, match="The same arguments after `python -m train fit` train them"):
        read_folds(tmp_path / "none" / "north")
    (tmp_path / "there").mkdir()
    for arguments in (
        ["compare", str(tmp_path / "none"), str(tmp_path / "none"), "--store", str(store)],
        ["report", f"a={tmp_path / 'none'}", "--store", str(store), "--out", str(tmp_path / "r.md")],
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "none: holds no finished run" in said and f"Beside it: {tmp_path / 'there'}" in said
