"""Fitting of folds: what is learned, what is stored, and that an interruption changes nothing."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.metrics import matthews_corrcoef
from torch import nn
from train_helpers import make_store

from prep.files import write_whole
from prep.labels import GLACIER_OR_DEBRIS, IGNORE
from prep.store import TileStore
from solution import build_network, normalize, pad_to_multiple
from train.__main__ import main
from train.config import Config, ConfigError, load_config
from train.data import ALL_TILES, open_fold
from train.fit import RunError, first_weights, fit_all, fit_fold, read_record
from train.mixture import kind_of
from train.module import RampedAveraging, SegmentationModule, set_batchnorm_momentum
from train.pack import pack
from train.predict import predict_run, read_folds
from train.pretrained import load_imagenet
from train.report.evidence import read_run
from train.report.reliability import Reliability
from train.report.tables import score_run

SMOKE = Path(__file__).resolve().parents[2] / "train" / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def smoke_config(store: Path, *overrides: str) -> Config:
    return load_config(SMOKE, [f"data.store={store}", *overrides])


def read_history(folder: Path) -> list[dict]:
    with open(folder / "history.csv", newline="") as stream:
        return list(csv.DictReader(stream))


class StopBefore(Callback):
    """Ends a run with an error before a step, as a power cut would."""

    def __init__(self, step: int, error: type[BaseException] = RuntimeError) -> None:
        self.step = step
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise self.error("interrupted by the test")


class StopAtEnd(Callback):
    """Ends a run with an error after the last epoch, before its result is written."""

    def on_train_end(self, trainer, pl_module) -> None:
        raise RuntimeError("interrupted by the test")


def score_again(folder: Path, store: TileStore) -> tuple[float, float]:
    """Return val_mcc and val_mcc4 of a fold.pt, computed without any of the training code."""
    stored = torch.load(folder / "fold.pt", weights_only=True)
    network = build_network(stored["arch"])
    network.load_state_dict(stored["state_dict"], strict=True)
    network.eval()
    extents, classes = [], []
    for tile_id in stored["val_tiles"]:
        image, mask = store.image(tile_id), store.mask(tile_id)
        x = pad_to_multiple(torch.from_numpy(normalize(image, stored["normalization"]))[None])
        with torch.no_grad():
            predicted = network(x)[0, :, : mask.shape[0], : mask.shape[1]].argmax(dim=0).numpy()
        kept = mask != IGNORE
        predicted, codes = predicted[kept], mask[kept]
        extents.append((np.isin(predicted, (1, 2)), np.isin(codes, (1, 2, GLACIER_OR_DEBRIS))))
        if codes.max() < 4:
            classes.append((predicted, codes))
    scores = []
    for pairs in (extents, classes):
        predicted, codes = (np.concatenate(part) for part in zip(*pairs))
        scores.append(matthews_corrcoef(codes, predicted))
    return tuple(scores)


# --- one finished fold --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> tuple[Path, dict, Config]:
    """Return run folder, record and config of a fold trained long enough to learn the synthetic classes."""
    run = tmp_path_factory.mktemp("run")
    config = smoke_config(
        store, "data.batch_size=4", "data.steps_per_epoch=20", "train.epochs=4", "optim.ema_decay=0.8"
    )
    return run, fit_fold(config, 0, run), config


def test_training_learns_the_synthetic_classes(finished):
    _, record, _ = finished
    assert record["val_mcc"] > 0.9
    assert record["val_mcc4"] > 0.8


def test_stored_weights_reproduce_the_recorded_scores(finished, store):
    run, record, _ = finished
    extent, classes = score_again(run / "fold0", TileStore(store))
    assert extent == pytest.approx(record["val_mcc"], abs=2e-4)
    assert classes == pytest.approx(record["val_mcc4"], abs=2e-4)


def test_fold_file_holds_plain_containers(finished, store):
    run, _, config = finished
    stored = torch.load(run / "fold0" / "fold.pt", weights_only=True)
    assert stored["arch"] == {"name": "Unet", "args": config.model.args}
    assert stored["scheme"] == "stratified"
    assert stored["fold"] == 0
    assert (stored["train_tiles"], stored["val_tiles"]) == (["002", "003"], ["000", "001"])
    assert stored["config"]["data"]["store"] == str(store)
    assert 1 <= stored["epoch"] <= 4
    assert stored["seconds"] > 0
    assert {"torch", "lightning", "segmentation_models_pytorch", "python"} <= set(stored["versions"])
    floats = [value for value in stored["state_dict"].values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}
    assert all(value.is_contiguous() for value in floats)


def test_history_has_a_row_an_epoch_with_measured_shares(finished):
    run, record, _ = finished
    rows = read_history(run / "fold0")
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert float(rows[record["epoch"] - 1]["val_mcc"]) == pytest.approx(record["val_mcc"], abs=1e-5)
    assert max(float(row["val_mcc"]) for row in rows) == pytest.approx(record["val_mcc"], abs=1e-5)
    for row in rows:
        for kind in ("drawn_", "pixels_"):
            shares = [float(value) for key, value in row.items() if key.startswith(kind)]
            assert sum(shares) == pytest.approx(1.0, abs=1e-4)


def test_folder_holds_results_only(finished):
    run, _, config = finished
    assert sorted(path.name for path in (run / "fold0").iterdir()) == [
        "config.yaml",
        "fold.pt",
        "history.csv",
    ]
    assert load_config(run / "fold0" / "config.yaml") == config


def test_finished_fold_is_not_fitted_again(finished, capsys):
    run, record, config = finished
    before = (run / "fold0" / "fold.pt").stat().st_mtime_ns
    assert fit_all(config, run, [0]) == [record]
    assert (run / "fold0" / "fold.pt").stat().st_mtime_ns == before
    assert "already finished" in capsys.readouterr().out


def test_other_settings_in_the_same_folder_are_refused(finished, store):
    run, _, config = finished
    other = load_config(run / "fold0" / "config.yaml", ["optim.lr=0.5", "train.threads=2"])
    with pytest.raises(RunError, match=r"differs in optim\.lr\. "):
        fit_fold(other, 0, run)


def test_read_record_refuses_other_files(tmp_path):
    torch.save({"format": "something"}, tmp_path / "fold.pt")
    with pytest.raises(RunError, match="expected format"):
        read_record(tmp_path / "fold.pt")


# --- interruption -------------------------------------------------------------------------------------------


def test_interrupted_run_ends_with_the_same_result(store, tmp_path):
    """Four epochs equal two, an interruption within the third, and two; the learning rate falls meanwhile.

    The encoder drops connections at random, so the random state has to be right as well.
    """
    config = smoke_config(
        store,
        "train.epochs=4",
        "optim.plateau_patience=0",
        "optim.lr=1e-6",
        "data.batch_size=4",
        "model.args.encoder_name=efficientnet-b0",
    )
    whole = fit_fold(config, 0, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        fit_fold(config, 0, tmp_path / "broken", [StopBefore(step=5)])
    assert not (tmp_path / "broken" / "fold0" / "fold.pt").exists()
    assert len(read_history(tmp_path / "broken" / "fold0")) == 2
    broken = fit_fold(config, 0, tmp_path / "broken")
    for record in (whole, broken):
        del record["seconds"]
    assert broken == whole
    states = [
        torch.load(tmp_path / run / "fold0" / "fold.pt", weights_only=True)["state_dict"]
        for run in ("whole", "broken")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    histories = [read_history(tmp_path / run / "fold0") for run in ("whole", "broken")]
    for row in histories[0] + histories[1]:
        del row["seconds"]
    assert histories[0] == histories[1]
    assert float(histories[0][-1]["lr"]) < 1e-6


def test_early_stop_is_kept_over_an_interruption(store, tmp_path):
    """The run ends two epochs after its best one, also where it is interrupted between or after these two."""
    config = smoke_config(store, "train.epochs=9", "train.early_stop=2", "optim.lr=1e-30")
    whole = fit_fold(config, 0, tmp_path / "whole")
    epochs = whole["epoch"] + 2
    assert whole["epochs"] == epochs < 9
    for interruption in (StopBefore(step=2 * (epochs - 1)), StopAtEnd()):
        with pytest.raises(RuntimeError, match="interrupted by the test"):
            fit_fold(config, 0, tmp_path / "broken", [interruption])
    assert len(read_history(tmp_path / "broken" / "fold0")) == epochs
    assert fit_fold(config, 0, tmp_path / "broken")["epochs"] == epochs


def test_run_on_other_tiles_is_not_continued(store, tmp_path):
    config = smoke_config(store)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        fit_fold(config, 0, tmp_path, [StopBefore(step=3)])
    moved = smoke_config(make_store(tmp_path / "other", size=80))
    with pytest.raises(RunError, match="other tiles"):
        fit_fold(moved, 0, tmp_path)


def test_keyboard_interrupt_reaches_the_caller_and_can_be_raised_again(store, tmp_path):
    for step in (1, 1):
        with pytest.raises(KeyboardInterrupt):
            fit_fold(smoke_config(store), 0, tmp_path, [StopBefore(step, KeyboardInterrupt)])


def test_file_appears_whole_or_not_at_all(tmp_path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    write_whole(tmp_path / "file", lambda path: path.write_text("first"))
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "first"


# --- parts of the module ------------------------------------------------------------------------------------


def test_average_follows_its_ramp_and_takes_batchnorm_along():
    averaging = RampedAveraging(decay=0.5)
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    averaged = torch.optim.swa_utils.AveragedModel(network, use_buffers=True, **averaging._kwargs)
    expected = None
    for step in range(12):
        value = float(np.cos(step))
        nn.init.constant_(network[0].weight, value)
        network[1].running_mean.fill_(2 * value)
        network[1].num_batches_tracked.fill_(step)
        averaged.update_parameters(network)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert averaged.module[0].weight[0, 0].item() == pytest.approx(expected, abs=1e-6)
        assert averaged.module[1].running_mean[0].item() == pytest.approx(2 * expected, abs=1e-6)
        assert averaged.module[1].num_batches_tracked.item() == step


def test_no_averaging_keeps_the_current_weights():
    average = RampedAveraging(decay=0.0)._kwargs["multi_avg_fn"]
    averaged, current = torch.randn(5), torch.randn(5)
    average([averaged], [current], torch.tensor(100))
    assert torch.equal(averaged, current)


def test_learning_rate_rises_linearly_in_the_warm_up(store):
    module = SegmentationModule(smoke_config(store, "optim.warmup_steps=4", "optim.lr=1e-3"))
    optimizers, schedulers = module.configure_optimizers()
    rates = []
    for _ in range(6):
        rates.append(optimizers[0].param_groups[0]["lr"])
        optimizers[0].step()
        schedulers[1]["scheduler"].step()
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])


def test_cosine_rises_in_the_warm_up_and_ends_at_zero(store):
    settings = ("optim.schedule=cosine", "optim.warmup_steps=3", "optim.lr=1e-3", "train.epochs=2")
    config = smoke_config(store, *settings, "data.steps_per_epoch=5")
    optimizers, (schedule,) = SegmentationModule(config).configure_optimizers()
    rates = []
    for _ in range(11):
        rates.append(optimizers[0].param_groups[0]["lr"])
        optimizers[0].step()
        schedule["scheduler"].step()
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1e-3), 7)
    falling = []
    for _ in range(8):
        falling.append(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, *falling])
    assert rates[-1] == 0


def test_cosine_run_resumes_as_if_it_had_not_been_interrupted(store, tmp_path):
    config = smoke_config(store, "optim.schedule=cosine", "train.keep=last")
    whole = fit_fold(config, 0, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="interrupted"):
        fit_fold(config, 0, tmp_path / "parts", [StopBefore(config.data.steps_per_epoch + 1)])
    parts = fit_fold(config, 0, tmp_path / "parts")
    assert whole["val_mcc"] == parts["val_mcc"]
    states = [
        torch.load(tmp_path / name / "fold0" / "fold.pt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_epoch_that_is_kept(store, tmp_path, keep):
    config = smoke_config(store, "train.epochs=4", "optim.lr=0.05", f"train.keep={keep}")
    record = fit_fold(config, 0, tmp_path)
    scores = [float(row["val_mcc"]) for row in read_history(tmp_path / "fold0")]
    expected = int(np.argmax(scores)) + 1 if keep == "best" else 4
    assert record["epoch"] == expected
    assert record["val_mcc"] == pytest.approx(scores[expected - 1], abs=1e-5)


def test_a_network_of_all_tiles_has_seen_them_and_has_no_score(store, tmp_path, capsys):
    common = ["fit", "--config", str(SMOKE), "--run", str(tmp_path), "--all-tiles", f"data.store={store}"]
    assert main([*common, "train.keep=last", "optim.schedule=cosine"]) == 0
    said = capsys.readouterr().out
    assert "all tiles: 4 tiles to train on, validation on none" in said
    assert "all tiles  epoch 1/2" in said and "mean" not in said
    record = torch.load(tmp_path / f"fold{ALL_TILES}" / "fold.pt", weights_only=True)
    assert (record["train_tiles"], record["val_tiles"]) == (TileStore(store).tile_ids, [])
    assert np.isnan(record["val_mcc"]) and np.isnan(record["val_mcc4"])
    assert all(row["val_mcc"] == "nan" for row in read_history(tmp_path / f"fold{ALL_TILES}"))


def test_a_network_of_all_tiles_stands_beside_the_folds(store, tmp_path):
    config = smoke_config(store, "train.keep=last", "optim.schedule=cosine")
    fit_all(config, tmp_path, [0, 1, ALL_TILES])
    records = {record["fold"]: record for record in read_folds(tmp_path)}
    states = [records[fold]["state_dict"] for fold in (0, ALL_TILES)]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    kinds = [kind_of(list(records.values()), most) for most in (None, 1, 2)]
    assert [kind.folds for kind in kinds[:2]] == [(ALL_TILES,)] * 2, "a mixture ships it in the folds' place"
    assert kinds[2].folds[0] == ALL_TILES and len(kinds[2].folds) == 2, "a fold follows where there is room"
    pack(tmp_path, None, tmp_path / "model.pth")
    packed = torch.load(tmp_path / "model.pth", weights_only=True)
    assert [member["fold"] for member in packed["members"]] == [0, 1], "a single run is its folds"
    predict_run(tmp_path, TileStore(store))
    scores = score_run(tmp_path, TileStore(store))
    evidence = read_run("run", tmp_path, scores, Reliability(*np.zeros((4, 1))), named=False)
    assert [history.fold for history in evidence.histories] == [0, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "train.keep is best, expected last where no tile is held out"),
        (["train.keep=last", "train.early_stop=3"], "train.early_stop is 3, expected 0 where"),
        (["train.keep=last"], "optim.schedule is plateau, expected cosine or restarts where"),
    ],
)
def test_settings_that_follow_a_score_need_held_out_tiles(store, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        fit_fold(smoke_config(store, *overrides), ALL_TILES, tmp_path)


def test_imagenet_weights_are_where_a_fold_starts(store, tmp_path):
    encoder = "timm-tf_efficientnet_lite0"
    settings = ("model.imagenet=true", "train.epochs=1", "data.steps_per_epoch=1", "optim.lr=1e-30")
    arch = ("model.name=Unet", f"model.args={{encoder_name: {encoder}}}")
    config = smoke_config(store, *settings, *arch, "optim.weight_decay=0")
    fit_fold(config, 0, tmp_path)
    network = build_network({"name": "Unet", "args": {"encoder_name": encoder}})
    load_imagenet(network, encoder)
    state = torch.load(tmp_path / "fold0" / "fold.pt", weights_only=True)["state_dict"]
    name = "encoder.blocks.3.0.conv_pw.weight"
    assert torch.allclose(state[name], network.state_dict()[name], atol=1e-6)


def test_batchnorm_momentum_is_set_or_left():
    network = nn.Sequential(nn.BatchNorm2d(3, momentum=0.01), nn.Sequential(nn.BatchNorm2d(3)))
    set_batchnorm_momentum(network, None)
    assert network[0].momentum == 0.01
    set_batchnorm_momentum(network, 0.2)
    assert [layer.momentum for layer in (network[0], network[1][0])] == [0.2, 0.2]


# --- command line -------------------------------------------------------------------------------------------


def test_command_line_fits_and_reports(store, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["fit", "--config", str(SMOKE), "--run", str(run), "--folds", "1", f"data.store={store}"]
    assert main(arguments) == 0
    assert (run / "fold1" / "fold.pt").is_file()
    out = capsys.readouterr().out
    assert "epoch 2/2" in out
    assert "min left" in out
    assert "mean" in out


@pytest.mark.parametrize(
    "extra, message",
    [
        (["optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
        (["data.store=nowhere"], "nowhere"),
        (["--folds", "9"], "has no fold 9"),
    ],
)
def test_command_line_explains_mistakes(store, tmp_path, capsys, extra, message):
    arguments = ["fit", "--config", str(SMOKE), "--run", str(tmp_path), *extra]
    arguments += [] if "data.store" in extra[0] else [f"data.store={store}"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_folds_must_be_numbers(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "a", "--run", "b", "--folds", "one"])
    assert "--folds" in capsys.readouterr().err


# --- The second phase -------------------------------------------------------------------------------------


def test_a_second_phase_starts_from_the_same_fold_of_the_first(store, tmp_path):
    fit_fold(smoke_config(store), 0, tmp_path / "first")
    weights = torch.load(tmp_path / "first" / "fold0" / "fold.pt", weights_only=True)["state_dict"]
    still = smoke_config(store, f"model.init={tmp_path / 'first'}", "optim.lr=1e-12", "optim.weight_decay=0")
    fit_fold(still, 0, tmp_path / "second")
    again = torch.load(tmp_path / "second" / "fold0" / "fold.pt", weights_only=True)["state_dict"]
    learned = [name for name in weights if "running_" not in name and "num_batches" not in name]
    assert all(torch.allclose(weights[name], again[name], atol=1e-6) for name in learned)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [("model.args.encoder_depth=4", "Use the same model"), ("model.init=nowhere", "does not exist")],
)
def test_first_weights_that_do_not_fit_are_refused(store, tmp_path, setting, complaint):
    fit_fold(smoke_config(store), 0, tmp_path / "first")
    config = smoke_config(store, f"model.init={tmp_path / 'first'}", setting)
    with pytest.raises(RunError, match=complaint):
        first_weights(config, 0, open_fold(smoke_config(store), 0))


def test_weights_that_saw_the_held_out_tiles_are_refused(store, tmp_path):
    fit_fold(smoke_config(store), 0, tmp_path / "first")
    (tmp_path / "first" / "fold0").rename(tmp_path / "first" / "fold1")
    config = smoke_config(store, f"model.init={tmp_path / 'first'}")
    with pytest.raises(RunError, match="which fold 1 holds out"):
        first_weights(config, 1, open_fold(smoke_config(store), 1))
