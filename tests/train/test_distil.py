"""Distillation: who teaches whom, that answers follow their crops, the loss, and a student from start to score."""

import numpy as np
import pytest
import torch
from train_helpers import SMOKE, smoke_config

from prep.store import TileStore
from solution import load_model, valid_mask
from train.__main__ import main
from train.config import AugmentConfig, DataConfig, change_config
from train.data import CropDataset
from train.distil import StudentModule, TaughtTiles, find_teachers, open_taught, teacher_loss, write_answers
from train.fit import Method
from train.losses import ExtentLoss
from train.predict import as_member, predict_views
from train.run import ALL, RunError, read_fold
from train.side_by_side import Job, fit_jobs

HELD_OUT = {0: ["000", "001"], 1: ["002", "003"]}
NORMALIZATION = {"mean": [0.0] * 5, "std": [1.0] * 5}


def test_a_fold_is_taught_by_networks_that_never_saw_what_it_holds_out(smoke_run):
    for fold, held_out in HELD_OUT.items():
        teachers = find_teachers([str(smoke_run)], fold, held_out)
        assert [record["views"] for record in teachers] == [1, 6]  # both members, and no network of the kind
        assert all(record["val_tiles"] == held_out for record in teachers)
    assert len(find_teachers([str(smoke_run / "north")], 0, HELD_OUT[0])) == 1
    with pytest.raises(RunError, match=r"fold0.fold\.pt: was trained on tile 002, which the student's fold 0 hol"):
        find_teachers([str(smoke_run)], 0, ["000", "002"])


def test_a_student_of_all_tiles_learns_from_all_networks(smoke_run):
    """`turned` has a network of all tiles, `north` has those of its folds only."""
    folds = [record["fold"] for record in find_teachers([str(smoke_run)], ALL, [])]
    assert folds == [0, 1, ALL]


def test_a_folder_without_networks_is_no_teacher(smoke_run, tmp_path):
    with pytest.raises(RunError, match="no finished folds in it; expected a teacher"):
        find_teachers([str(tmp_path)], 0, [])
    with pytest.raises(RunError, match="fold7.*no such fold"):
        find_teachers([str(smoke_run)], 7, [])


def test_answers_are_the_mean_of_networks_in_all_their_views(smoke_run, store, tmp_path):
    tiles = TileStore(store)
    teachers = find_teachers([str(smoke_run)], 0, HELD_OUT[0])
    write_answers(teachers, tiles, ["002"], tmp_path)
    image, means = tiles.image("002"), []
    for record in teachers:
        logits = predict_views(as_member(record), image, record["views"]).astype(np.float32)
        means.append((1 / (1 + np.exp(-logits))).mean(axis=0))
    found, valid = np.load(tmp_path / "002.npy"), valid_mask(image)
    np.testing.assert_allclose(found[valid], np.mean(means, axis=0)[valid], atol=1e-3)
    assert np.isnan(found[~valid]).all() and not valid.all()


def test_of_the_folds_those_answer_that_did_not_train_on_the_tile(smoke_run, store, tmp_path):
    tiles = TileStore(store)
    write_answers(find_teachers([str(smoke_run / "north")], ALL, []), tiles, ["000"], tmp_path / "both")
    write_answers([read_fold(smoke_run / "north" / "fold0" / "fold.pt")], tiles, ["000"], tmp_path / "one")
    np.testing.assert_array_equal(np.load(tmp_path / "both" / "000.npy"), np.load(tmp_path / "one" / "000.npy"))


@pytest.mark.parametrize("affine_share", [0.0, 1.0])
def test_answers_follow_their_crops_and_are_not_jittered(store, tmp_path, affine_share):
    """The answer is the first band itself: in a crop it must be that, before jitter, and nothing without one."""
    tiles = TileStore(store)
    for tile in tiles.tile_ids:
        np.save(tmp_path / f"{tile}.npy", tiles.image(tile)[..., 0])
    taught = TaughtTiles(tmp_path, tiles, tiles.tile_ids, NORMALIZATION)
    turns = {"flip": True, "rot90": True, "affine_share": affine_share}
    data = DataConfig(crop=64, batch_size=2, steps_per_epoch=4, mix=0.5)
    plain, bright = (
        CropDataset(taught, data, AugmentConfig(**turns, **jitter), seed=0)
        for jitter in ({}, {"gain": 0.2, "offset": 0.2, "saturate": 0.5})
    )
    for number in range(8):
        image, _ = plain[number]
        known = ~image[5].isnan()
        assert image.shape == (6, 64, 64) and not image[:5].isnan().any() and known.any()
        torch.testing.assert_close(image[5][known], image[0][known], atol=1e-5, rtol=0)
        assert (image[0][~known] == 0).all()
    if affine_share == 1.0:
        return
    differing = [not torch.equal(plain[number][0][:5], bright[number][0][:5]) for number in range(8)]
    assert all(differing)


def test_the_teachers_loss_is_least_at_their_probability():
    taught = torch.tensor([0.1, 0.5, 0.9, float("nan")]).reshape(1, 2, 2)
    best = taught.nan_to_num(0.3).logit()[:, None]
    at_best = teacher_loss(best, taught)
    entropy = -(taught * taught.log() + (1 - taught) * (1 - taught).log())
    assert at_best == pytest.approx(float(entropy.nanmean()), abs=1e-6)
    assert teacher_loss(best + 0.1, taught) > at_best < teacher_loss(best - 0.1, taught)
    assert teacher_loss(best, torch.full_like(taught, float("nan"))) == 0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_loss_is_shared_between_teachers_and_labels(share):
    torch.manual_seed(0)
    module = StudentModule(smoke_config("nowhere", f"distil.share={share}")).eval()
    image, codes = torch.rand(2, 6, 64, 64), torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        logits = module(image[:, :5])
        expected = share * teacher_loss(logits, image[:, 5]) + (1 - share) * ExtentLoss(module.config.loss)(
            logits, codes
        )
        torch.testing.assert_close(module.batch_loss(image, codes), expected)


def test_a_student_without_teachers_is_the_network_of_its_labels(smoke_run, store, tmp_path):
    """With a share of 0 answers have no say: the weights are those that `fit` makes of the same settings."""
    settings = {"distil": {"teachers": [str(smoke_run)], "share": 0.0}}
    config = change_config(smoke_config(store), settings, "test")
    (record,) = fit_jobs([Job(config, tmp_path / "student", 0)], 1, Method(open_taught, StudentModule))
    assert (record["val_tiles"], record["train_tiles"]) == (HELD_OUT[0], HELD_OUT[1])
    taught = read_fold(tmp_path / "student" / "fold0" / "fold.pt")["state_dict"]
    alone = read_fold(smoke_run / "north" / "fold0" / "fold.pt")["state_dict"]
    assert all(torch.allclose(taught[name].float(), alone[name].float(), atol=1e-5) for name in alone)


def test_the_command_trains_students_that_are_scored_and_packed_like_any_run(smoke_run, store, tmp_path, capsys):
    recipe = tmp_path / "student.yaml"
    recipe.write_text(f"base: {SMOKE}\nmembers: {{student: {{ship: all}}}}\n")
    run = tmp_path / "run"
    common = ["--recipe", str(recipe), "--run", str(run), f"data.store={store}"]
    assert main(["distil", "--teacher", str(smoke_run), *common]) == 0
    assert {path.parent.name for path in run.glob("student/*/fold.pt")} == {"fold0", "fold1", "foldall"}
    assert not list(run.rglob("teachers/*.npy"))
    assert "fold 0: taught by 2 networks" in capsys.readouterr().out
    record = read_fold(run / "student" / "fold0" / "fold.pt")
    assert record["config"]["distil"]["teachers"] == [str(smoke_run)]
    assert main(["score", *common]) == 0
    assert "extent MCC, out of fold" in capsys.readouterr().out
    assert main(["pack", *common, "--out", str(tmp_path / "model.pth")]) == 0
    assert len(load_model(tmp_path / "model.pth").members) == 1


def test_a_student_needs_a_teacher(store, tmp_path, capsys):
    assert main(["distil", "--recipe", str(SMOKE), "--run", str(tmp_path), f"data.store={store}"]) == 2
    assert "distil.teachers is [], expected folders of runs: give --teacher" in capsys.readouterr().err
