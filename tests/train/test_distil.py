"""Students: who may teach a fold, what they answer, crops of answers, the loss, and whole runs."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_tile
from train_helpers import SMOKE, fit_smoke, make_store

import solution
from prep.labels import IGNORE
from prep.store import TileStore
from prep.synthetic.scenes import make_scene, to_numbers
from train import distil
from train import pack as package
from train.__main__ import main
from train.config import AugmentConfig, Config, ConfigError, DataConfig, load_config
from train.data import ALL_TILES, CropDataset, load_tiles, open_fold
from train.fit import RunError
from train.predict import as_member, read_fold, read_folds
from train.run import FOLD_FILE

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
STILL = AugmentConfig(gain=0.0, offset=0.0, illumination=0.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return TileStore(make_store(tmp_path_factory.mktemp("distil") / "store"))


@pytest.fixture(scope="module")
def teacher_run(store: TileStore) -> Path:
    """Return a finished run of two folds."""
    return fit_smoke(store.folder, store.folder.parent / "teacher")


def student_config(store: TileStore, teacher_run: Path, *overrides: str) -> Config:
    common = [f"data.store={store.folder}", f"distil.teachers=[{teacher_run}]", "train.keep=last"]
    return load_config(SMOKE, [*common, *overrides])


# --- Teachers -----------------------------------------------------------------------------------------------


def test_a_fold_is_taught_by_networks_that_never_saw_its_tiles(store: TileStore, teacher_run: Path) -> None:
    for fold in (0, 1):
        held_out = [tile for tile, number in store.fold_of("stratified").items() if number == fold]
        found = distil.find_teachers([str(teacher_run)], held_out)
        assert [teacher.record["fold"] for teacher in found] == [fold]
    assert len(distil.find_teachers([str(teacher_run)], [])) == 2


def test_a_run_that_saw_the_held_out_tiles_is_refused(teacher_run: Path) -> None:
    with pytest.raises(RunError, match="each of the 2 finished folds .* was trained on some of 000, 002"):
        distil.find_teachers([str(teacher_run)], ["000", "002"])


def test_of_a_tile_only_those_teach_that_never_saw_it(store: TileStore, teacher_run: Path) -> None:
    members = [(as_member(record), record) for record in read_folds(teacher_run)]
    for tile, fold in store.fold_of("stratified").items():
        assert [record["fold"] for _, record in distil.impartial(members, tile)] == [fold]
    seen = [(member, {**record, "train_tiles": list(store.tile_ids)}) for member, record in members]
    assert distil.impartial(seen, "000") == seen
    assert distil.impartial(members, "scene-0") == members


def test_networks_without_pairs_of_folds_teach_both_about_each_other(tmp_path: Path) -> None:
    store = TileStore(make_store(tmp_path / "store", tiles=6, folds=3))
    settings = ["train.epochs=1", "data.steps_per_epoch=1"]
    run = fit_smoke(store.folder, tmp_path / "pairs", "--pairs", *settings)
    records = read_folds(run)
    assert [record["fold"] for record in records] == [101, 102, 112]
    fold_of = store.fold_of("stratified")
    for fold in range(3):
        held_out = [tile for tile, number in fold_of.items() if number == fold]
        teachers = distil.find_teachers([str(run)], held_out)
        assert len(teachers) == 2
        members = [(as_member(teacher.record), teacher.record) for teacher in teachers]
        for tile in set(fold_of) - set(held_out):
            (chosen,) = distil.impartial(members, tile)
            assert not {tile, *held_out} & set(chosen[1]["train_tiles"])


def test_answers_are_the_mean_of_all_views_of_all_teachers(store: TileStore, teacher_run: Path) -> None:
    records, image = read_folds(teacher_run), store.image("000")
    found = distil.ask([(as_member(record), record) for record in records], image)
    total = np.zeros((4, 96, 96))
    for record in records:
        network = solution.build_network(record["arch"]).eval()
        network.load_state_dict(record["state_dict"])
        x = torch.from_numpy(solution.normalize(image, record["normalization"]))[None]
        for turns in range(4):
            total += inverse_rotation(network, x, turns) / 12
        for axis in (2, 3):
            with torch.no_grad():
                total += torch.softmax(network(x.flip(axis)), 1).flip(axis)[0].numpy() / 12
    known = solution.valid_mask(image)
    np.testing.assert_allclose(found[known, :4], total.transpose(1, 2, 0)[known], atol=2e-3)
    assert (found[..., 4] == known).all()
    assert not found[~known].any()


def inverse_rotation(network: torch.nn.Module, x: torch.Tensor, turns: int) -> np.ndarray:
    with torch.no_grad():
        probs = torch.softmax(network(torch.rot90(x, turns, (2, 3))), 1)
    return torch.rot90(probs, -turns, (2, 3))[0].numpy()


# --- Images -------------------------------------------------------------------------------------------------


def test_unlabelled_tiles_come_from_bands_or_a_store_and_never_are_held_out_ones(
    store: TileStore, tmp_path: Path
) -> None:
    for index in range(3):
        write_tile(tmp_path / "bands", f"00{index}", to_numbers(make_scene(3, 64, index).bands))
    held_out = make_scene(3, 64, 1).bands
    found = distil.unlabelled_images(tmp_path / "bands", [held_out])
    assert found.names == ["000", "002"]
    np.testing.assert_array_equal(found.read("002"), make_scene(3, 64, 2).bands)
    kept = distil.unlabelled_images(store.folder, [store.image("001"), store.image("003")])
    assert kept.names == ["000", "002"]
    with pytest.raises(RunError, match="no tile of .* is left besides those held out"):
        distil.unlabelled_images(store.folder, map(store.image, store.tile_ids))


# --- Crops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_answers_are_warped_as_the_image_is(store: TileStore, tmp_path: Path, mix: float) -> None:
    """Where the answers are the image itself, their crops are the image's crops."""
    norm = {"mean": [0.5] * 4 + [270.0], "std": [0.4] * 4 + [9.0]}
    tiles = [
        tile._replace(
            values=np.where(tile.weights.all(2, keepdims=True), tile.values, 0).astype(np.float16),
            weights=np.repeat(tile.weights.all(2, keepdims=True), 5, 2).astype(np.float32),
        )
        for tile in load_tiles(store, ["000", "001", "002"], norm)
    ]
    tiles = [tile._replace(values=tile.values.astype(np.float32)) for tile in tiles]
    paths = [tmp_path / f"{tile.tile_id}.npy" for tile in tiles]
    for path, tile in zip(paths, tiles):
        np.save(path, np.dstack([tile.values[..., :4], tile.weights[..., 0]]).astype(np.float16))
    crops = CropDataset(tiles, norm, DataConfig(crop=64, mix=mix), STILL, seed=3)
    source = distil.with_answers(crops, distil.Answers(paths), labelled=True)
    taught = distil.TaughtCrops([source], [1.0], seed=3)
    for index in range(40):
        image, codes, _, answers = taught[index]
        np.testing.assert_allclose(answers[:4], image[:4], atol=1e-5)
        assert (codes[answers[4] > 0.5] != IGNORE).all()


def test_answers_are_not_jittered_and_stay_distributions(store: TileStore, tmp_path: Path) -> None:
    norm = {"mean": [0.5] * 4 + [270.0], "std": [0.4] * 4 + [9.0]}
    tiles = load_tiles(store, ["000"], norm)
    answers = np.zeros((96, 96, 5), np.float16)
    answers[...] = (0.5, 0.25, 0.125, 0.125, 1)
    np.save(tmp_path / "000.npy", answers)
    crops = CropDataset(tiles, norm, DataConfig(crop=64), AugmentConfig(gain=0.5, offset=1.0), seed=0)
    source = distil.with_answers(crops, distil.Answers([tmp_path / "000.npy"]), labelled=True)
    for index in range(20):
        crop = source.answers[index][0]
        inside = crop[4] > 0
        assert torch.allclose(crop[:4, inside].T, torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=1e-5)


def test_sources_come_in_their_shares_and_only_labelled_ones_have_labels(
    store: TileStore, tmp_path: Path
) -> None:
    norm = {"mean": [0.5] * 4 + [270.0], "std": [0.4] * 4 + [9.0]}
    answers = np.zeros((96, 96, 5), np.float16)
    answers[..., 1] = answers[..., 4] = 1
    np.save(tmp_path / "a.npy", answers)
    crops = CropDataset(load_tiles(store, ["000"], norm), norm, DataConfig(crop=64), STILL, seed=0)
    images = distil.Images(["001"], store.image)
    told = distil.Answers([tmp_path / "a.npy"])
    tiles = distil.AnsweredTiles(images, told, norm, "statistics")
    assert (tiles[0].codes == 1).all()  # what the teachers say, not the label
    without = CropDataset(tiles, norm, DataConfig(crop=64), STILL, seed=0)
    sources = [distil.with_answers(crops, told, True), distil.with_answers(without, told, False)]
    taught = distil.TaughtCrops(sources, [3.0, 1.0], seed=0)
    unlabelled = np.mean([bool((taught[index][1] == IGNORE).all()) for index in range(200)])
    assert 0.17 < unlabelled < 0.33
    assert all(torch.equal(a, b) for a, b in zip(taught[7][:2], taught[7][:2]))


# --- The loss -----------------------------------------------------------------------------------------------


def test_divergence_is_that_of_the_softened_distributions() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), (2, 3, 5))  # (B, H, W, 4)
    known = rng.random((2, 3, 5)) < 0.7
    answers = np.concatenate([probs, np.ones((2, 3, 5, 1))], -1) * known[..., None]
    logits = rng.normal(0, 2, (2, 4, 3, 5))
    temperature, terms = 3.0, []
    for b, row, col in np.argwhere(known):
        p = probs[b, row, col] ** (1 / temperature)
        q = np.exp(logits[b, :, row, col] / temperature)
        p, q = p / p.sum(), q / q.sum()
        terms.append(float((p * np.log(p / q)).sum()))
    found = distil.divergence(torch.tensor(logits), torch.tensor(answers).movedim(-1, 1), temperature)
    assert float(found) == pytest.approx(temperature**2 * np.mean(terms), rel=1e-4)


def test_divergence_vanishes_at_the_answers_and_without_any() -> None:
    probs = torch.softmax(torch.randn(1, 4, 6, 6), 1)
    answers = torch.cat([probs, torch.ones(1, 1, 6, 6)], 1)
    logits = probs.log().requires_grad_()
    loss = distil.divergence(logits, answers, 2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert float(logits.grad.abs().max()) < 1e-6
    nothing = distil.divergence(logits, torch.zeros_like(answers), 2.0)
    assert nothing.requires_grad
    assert float(nothing.detach()) == 0


# --- Runs ---------------------------------------------------------------------------------------------------


def test_students_of_all_sources_are_runs_like_any_other(
    store: TileStore, teacher_run: Path, tmp_path: Path
) -> None:
    for index in range(2):
        write_tile(tmp_path / "bands", f"00{index}", to_numbers(make_scene(5, 96, index).bands))
    run = tmp_path / "student"
    settings = [f"data.store={store.folder}", f"distil.unlabelled={tmp_path / 'bands'}", "distil.synthetic=1"]
    settings += ["distil.synthetic_size=96", "distil.shares=[0.4,0.3,0.3]", "train.keep=last"]
    command = ["distil", "--config", str(SMOKE), "--run", str(run), "--teacher", str(teacher_run)]
    assert main([*command, *settings]) == 0
    records = read_folds(run)
    assert [record["fold"] for record in records] == [0, 1]
    for record, teacher in zip(records, read_folds(teacher_run)):
        assert record["val_tiles"] == teacher["val_tiles"]
        assert record["config"]["distil"]["teachers"] == [str(teacher_run)]
    assert not list(run.glob("fold*/teachers/*.npy"))
    assert main(["evaluate", "--run", str(run), "--store", str(store.folder)]) == 0
    model = solution.load_model(package.pack(run, None, tmp_path / "model.pth"))
    assert len(model.members) == 2
    assert main([*command, *settings, "distil.temperature=4"]) == 2  # another config in the same folder


def test_a_student_learns_what_its_teachers_say(store: TileStore, teacher_run: Path, tmp_path: Path) -> None:
    """Without labels, the loss is the divergence from the teachers, and it falls."""
    settings = ["distil.supervised=0", "data.steps_per_epoch=5", "train.epochs=5", "optim.lr=1e-2"]
    distil.fit_students(student_config(store, teacher_run, *settings), tmp_path / "run", [0])
    with open(tmp_path / "run" / "fold0" / "history.csv", newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.7 * losses[0], losses


def test_an_interrupted_student_ends_as_an_uninterrupted_one(
    store: TileStore, teacher_run: Path, tmp_path: Path
) -> None:
    from train.fit import Recipe, fit_fold

    config = student_config(store, teacher_run, "distil.shares=[1,0,1]", "distil.synthetic=1")
    config.distil.synthetic_size = 64
    recipe = Recipe(distil.open_student, distil.StudentModule)
    whole = fit_fold(config, 0, tmp_path / "whole", recipe=recipe)

    from lightning.pytorch.callbacks import Callback

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        fit_fold(config, 0, tmp_path / "cut", callbacks=[Stop()], recipe=recipe)
    assert not (tmp_path / "cut" / "fold0" / FOLD_FILE).exists()
    resumed = fit_fold(config, 0, tmp_path / "cut", recipe=recipe)
    assert resumed["val_mcc"] == whole["val_mcc"]
    states = [read_fold(tmp_path / name / "fold0" / FOLD_FILE)["state_dict"] for name in ("whole", "cut")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_student_of_all_tiles_learns_from_all_networks_and_has_no_score(
    store: TileStore, teacher_run: Path, tmp_path: Path
) -> None:
    config = student_config(store, teacher_run, "optim.schedule=cosine")
    distil.fit_students(config, tmp_path / "run", [ALL_TILES])
    (record,) = read_folds(tmp_path / "run")
    assert (record["train_tiles"], record["val_tiles"]) == (store.tile_ids, [])
    assert np.isnan(record["val_mcc"])
    identity = json.loads((tmp_path / "run" / f"fold{ALL_TILES}" / "teachers" / "identity.json").read_text())
    assert len(identity["teachers"]) == 2
    assert not set(record["train_tiles"]) - set(open_fold(config, ALL_TILES).train_ids)


def test_settings_that_follow_the_score_need_one(store: TileStore, teacher_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="optim.schedule is plateau, expected cosine or restarts"):
        distil.fit_students(student_config(store, teacher_run), tmp_path, [ALL_TILES])


def test_other_teachers_for_a_started_student_are_refused(
    store: TileStore, teacher_run: Path, tmp_path: Path
) -> None:
    config = student_config(store, teacher_run)
    teachers = distil.find_teachers(config.distil.teachers, [])
    distil.require_same_teachers(teachers, config, tmp_path)
    distil.require_same_teachers(teachers, config, tmp_path)
    with pytest.raises(RunError, match="answers of other teachers"):
        distil.require_same_teachers(teachers[:1], config, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distil.temprature=2", "unknown key 'distil.temprature'"),
        ("distil.temperature=0", "distil.temperature is 0.0, expected more than 0"),
        ("distil.shares=[1,1,0]", "distil.unlabelled is None, expected a folder"),
        ("distil.shares=[1,0,1]", "distil.synthetic is 0, expected 0 or more, and 1"),
        ("distil.shares=[0,0,1]", "the first more than 0"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SMOKE, [override])


def test_fit_and_distil_refuse_each_others_configs(
    store: TileStore, teacher_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    common = ["--config", str(SMOKE), "--run", str(tmp_path / "run"), f"data.store={store.folder}"]
    assert main(["fit", *common, f"distil.teachers=[{teacher_run}]"]) == 2
    assert "python -m train distil" in capsys.readouterr().err
    assert main(["distil", *common]) == 2
    assert "distil.teachers is []" in capsys.readouterr().err


def test_the_shipped_config_is_valid() -> None:
    config = load_config(CONFIGS / "distil.yaml")
    assert config.distil.shares[2] > 0 and config.train.keep == "last"
