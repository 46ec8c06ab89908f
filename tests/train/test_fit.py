"""Fitting of folds: what is learned, what is stored, what is refused, and that an interruption changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef
from train_helpers import (
    SMOKE,
    StopBefore,
    fit_smoke,
    make_store,
    read_history,
    same_weights,
    smoke_config,
)

from prep.files import write_whole
from prep.labels import GLACIER_OR_DEBRIS, IGNORE
from prep.store import TileStore
from solution import build_network, normalize, pad_to_multiple
from train.__main__ import main
from train.config import Config, ConfigError, load_config
from train.data import describe_unlearned, open_fold
from train.fit import describe_fold, fit_fold
from train.run import ALL, RunError, parse_folds, read_fold, read_folds, read_record
from train.side_by_side import Job, fit_jobs


def score_again(folder: Path, store: TileStore) -> float:
    """Return val_mcc of a fold.pt, computed without any of the training code."""
    stored = torch.load(folder / "fold.pt", weights_only=True)
    network = build_network(stored["arch"]).eval()
    network.load_state_dict(stored["state_dict"], strict=True)
    pairs = []
    for tile_id in stored["val_tiles"]:
        image, mask = store.image(tile_id), store.mask(tile_id)
        x = pad_to_multiple(torch.from_numpy(normalize(image, stored["normalization"]))[None])
        with torch.no_grad():
            predicted = network(x)[0, 0, : mask.shape[0], : mask.shape[1]].numpy() > 0
        pairs.append((predicted[mask != IGNORE], np.isin(mask, (1, 2, GLACIER_OR_DEBRIS))[mask != IGNORE]))
    return matthews_corrcoef(*(np.concatenate(part) for part in zip(*pairs)))


# --- One finished fold --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> tuple[Path, dict, Config]:
    """Return run folder, record and config of a fold trained long enough to learn the synthetic classes."""
    run = tmp_path_factory.mktemp("run")
    settings = ("data.batch_size=4", "data.steps_per_epoch=15", "train.epochs=3", "optim.ema_decay=0.8")
    config = smoke_config(store, *settings, "optim.lr=3e-3", "train.keep=best")
    return run, fit_fold(config, 0, run), config


def test_training_learns_and_the_stored_weights_have_the_recorded_score(finished, store):
    run, record, _ = finished
    assert record["val_mcc"] > 0.7
    assert score_again(run / "fold0", TileStore(store)) == pytest.approx(record["val_mcc"], abs=2e-4)


def test_the_fold_file_says_what_it_was_made_of_in_plain_containers(finished, store):
    run, _, config = finished
    stored = torch.load(run / "fold0" / "fold.pt", weights_only=True)
    assert stored["arch"] == {"name": "Unet", "args": config.model.args}
    assert (stored["scheme"], stored["fold"], stored["views"]) == ("stratified", 0, 1)
    assert (stored["train_tiles"], stored["val_tiles"]) == (["002", "003"], ["000", "001"])
    assert stored["fingerprint"] == TileStore(store).fingerprint
    assert stored["config"]["data"]["store"] == str(store)
    assert {"torch", "lightning", "segmentation_models_pytorch", "python"} <= set(stored["versions"])
    floats = [value for value in stored["state_dict"].values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32} and all(v.is_contiguous() for v in floats)


def test_the_folder_holds_results_only_with_the_history_of_the_kept_epoch(finished):
    run, record, config = finished
    assert sorted(path.name for path in (run / "fold0").iterdir()) == [
        "config.yaml",
        "fold.pt",
        "history.csv",
    ]
    assert load_config(run / "fold0" / "config.yaml") == config
    rows = read_history(run / "fold0")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[record["epoch"] - 1]["val_mcc"] == pytest.approx(record["val_mcc"], abs=1e-5)
    assert max(row["val_mcc"] for row in rows) == pytest.approx(record["val_mcc"], abs=1e-5)
    for row in rows:
        assert sum(value for key, value in row.items() if key.startswith("pixels_")) == pytest.approx(1, abs=1e-4)


def test_a_finished_fold_is_not_fitted_again(finished, capsys):
    run, record, config = finished
    before = (run / "fold0" / "fold.pt").stat().st_mtime_ns
    assert fit_jobs([Job(config, run, 0)], 1) == [record]
    assert (run / "fold0" / "fold.pt").stat().st_mtime_ns == before
    assert "already finished" in capsys.readouterr().out


def test_other_settings_or_tiles_in_the_same_folder_are_refused(finished, tmp_path):
    run, record, _ = finished
    config = load_config(run / "fold0" / "config.yaml", ["optim.lr=0.5", "train.threads=2"])
    with pytest.raises(RunError, match=r"differs in optim\.lr\. Name another folder with --run"):
        fit_fold(config, 0, run)
    other = make_store(tmp_path / "other", size=64)
    moved = load_config(run / "fold0" / "config.yaml", [f"data.store={other}"])
    now = TileStore(other).fingerprint
    with pytest.raises(RunError, match=f"fingerprint {record['fingerprint']}, and .*other has {now} now"):
        fit_fold(moved, 0, run)


# --- Interruption -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [[], ["optim.schedule=plateau", "optim.plateau_patience=0", "train.keep=best", "optim.lr=1e-6"]],
)
def test_an_interrupted_run_ends_with_the_same_result(store, tmp_path, settings):
    """Three epochs equal one, an interruption within the second, and two.

    The encoder drops connections at random, so the random state has to be right as well.
    """
    config = smoke_config(store, "train.epochs=3", "model.args.encoder_name=efficientnet-b0", *settings)
    whole = fit_fold(config, 0, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        fit_fold(config, 0, tmp_path / "broken", [StopBefore(step=3)])
    assert not (tmp_path / "broken" / "fold0" / "fold.pt").exists()
    assert len(read_history(tmp_path / "broken" / "fold0")) == 1
    broken = fit_fold(config, 0, tmp_path / "broken")
    histories = [read_history(tmp_path / run / "fold0") for run in ("whole", "broken")]
    for part in (whole, broken, *histories[0], *histories[1]):
        del part["seconds"]
    assert broken == whole and histories[0] == histories[1]
    assert same_weights(tmp_path / "whole" / "fold0", tmp_path / "broken" / "fold0")
    assert histories[0][-1]["lr"] < config.optim.lr


def test_an_early_stop_is_kept_over_an_interruption(store, tmp_path):
    """The run ends one epoch after its best one, also where it is interrupted between."""
    config = smoke_config(store, "train.epochs=9", "train.early_stop=1", "train.keep=best", "optim.lr=1e-30")
    whole = fit_fold(config, 0, tmp_path / "whole")
    assert whole["epochs"] == whole["epoch"] + 1 < 9
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        fit_fold(config, 0, tmp_path / "broken", [StopBefore(step=2 * (whole["epochs"] - 1))])
    assert fit_fold(config, 0, tmp_path / "broken")["epochs"] == whole["epochs"]


def test_a_run_on_other_tiles_is_not_continued(store, tmp_path):
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        fit_fold(smoke_config(store), 0, tmp_path, [StopBefore(step=3)])
    moved = smoke_config(make_store(tmp_path / "other", size=80))
    with pytest.raises(RunError, match="was trained on other tiles than .*other holds now for fold 0"):
        fit_fold(moved, 0, tmp_path)


def test_ctrl_c_reaches_the_caller(store, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit_fold(smoke_config(store), 0, tmp_path, [StopBefore(1, KeyboardInterrupt)])


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    write_whole(tmp_path / "file", lambda path: path.write_text("first"))
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "first"


# --- All tiles ----------------------------------------------------------------------------------------------


def test_a_network_of_all_tiles_has_seen_them_and_has_no_score(smoke_run, store):
    record = read_record(smoke_run / "turned" / f"fold{ALL}" / "fold.pt")
    assert (record["fold"], record["train_tiles"], record["val_tiles"]) == (
        ALL,
        TileStore(store).tile_ids,
        [],
    )
    assert np.isnan(record["val_mcc"])
    assert all(np.isnan(row["val_mcc"]) for row in read_history(smoke_run / "turned" / f"fold{ALL}"))
    assert [record["fold"] for record in read_folds(smoke_run / "turned")] == [0, 1]


@pytest.mark.parametrize("setting", ["train.keep=best", "train.early_stop=3", "optim.schedule=plateau"])
def test_what_follows_a_score_is_refused_where_there_is_none(store, tmp_path, setting):
    key, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=f"{key} is {value}, expected .* where no tile is held out"):
        fit_fold(smoke_config(store, setting), ALL, tmp_path)


# --- The command --------------------------------------------------------------------------------------------


def test_the_command_trains_what_the_recipe_needs(smoke_run):
    found = sorted(str(path.parent.relative_to(smoke_run)) for path in smoke_run.rglob("fold.pt"))
    members = ["north/fold0", "north/fold1", "turned/fold0", "turned/fold1", "turned/foldall"]
    assert found == ["kind/fold0", "kind/fold1", "kind/foldall", *members]


def test_labels_that_lack_a_kind_are_told_before_anything_is_trained(tmp_path, capsys):
    store, run = make_store(tmp_path / "store", size=64, labels=("phase1",)), tmp_path / "run"
    assert main(["fit", "--recipe", str(SMOKE), "--run", str(run), f"data.store={store}"]) == 2
    assert "expected both kinds" in capsys.readouterr().err and not run.exists()


def test_what_no_network_learns_is_told(store, tmp_path, capsys):
    opened = TileStore(store)
    lakes = sum(tile.counts["lake"] for tile in opened.tiles) * 0.0009
    fit_smoke(store, tmp_path / "run", "--member", "north", "--folds", "1", "train.epochs=1")
    assert f"{store}: the labels show {lakes:.1f} km² of lakes, which nothing here learns" in capsys.readouterr().err
    bare = opened.tiles[0]._replace(counts=dict.fromkeys(opened.tiles[0].counts, 0))
    opened.tiles = [bare._replace(tile_id=tile.tile_id) for tile in opened.tiles]
    assert describe_unlearned(opened) == ""


def test_a_side_without_crops_is_told(store):
    data = open_fold(smoke_config(store), 0)
    assert "cannot be learned" not in describe_fold(0, data)
    data.dataset.pixels.absent = ["glacier"]
    assert describe_fold(0, data).endswith("; no training tile shows glacier: it cannot be learned")


def test_one_member_and_some_folds_can_be_asked_for(store, tmp_path):
    fit_smoke(store, tmp_path / "run", "--member", "north", "--folds", "1", "train.epochs=1")
    found = sorted(str(path.parent.relative_to(tmp_path / "run")) for path in tmp_path.rglob("fold.pt"))
    assert found == ["north/fold1"]


def test_folds_are_numbers_or_all_and_members_those_of_the_recipe(capsys, tmp_path):
    assert parse_folds("0,12,all") == [0, 12, ALL]
    with pytest.raises(RunError, match="found 'x', expected numbers of folds or 'all'"):
        parse_folds("0,x")
    command = ["fit", "--recipe", str(SMOKE), "--run", str(tmp_path), "optim.rate=1"]
    assert main(command) == 2
    assert "unknown key 'optim.rate'" in capsys.readouterr().err
    assert main([*command[:-1], "--member", "nort"]) == 2
    assert "--member is 'nort', expected one of north, turned" in capsys.readouterr().err


def test_records_that_are_none_are_refused(tmp_path):
    torch.save({"format": "something"}, tmp_path / "fold.pt")
    with pytest.raises(RunError, match="format 'something', expected 'glacier-kit-fold/2'"):
        read_fold(tmp_path / "fold.pt")
    (tmp_path / "fold.pt").write_bytes(b"damaged")
    with pytest.raises(RunError, match="cannot be read"):
        read_fold(tmp_path / "fold.pt")
    with pytest.raises(RunError, match="python -m train fit"):
        read_folds(tmp_path)
