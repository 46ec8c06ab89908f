"""Ablations: which trials there are, what a row counts, and a set from start to report."""

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef
from train_helpers import SMOKE, make_store

from prep.labels import IGNORE
from prep.store import TileStore
from solution import build_network
from train.__main__ import main
from train.ablate import SET, Row, Trial, read_set, report, select
from train.config import Config, ConfigError, change_config
from train.losses import ExtentLoss
from train.objective import binary, count_tile, mcc, pool
from train.predict import load_views

TRIALS = read_set(SMOKE.parents[2] / SET)


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_every_shipped_trial_has_a_network_and_a_loss_and_differs(trial):
    build_network({"name": trial.config.model.name, "args": dict(trial.config.model.args)})
    ExtentLoss(trial.config.loss)
    assert [other.name for other in TRIALS if other.config == trial.config] == [trial.name]
    assert trial.config.data.scheme == TRIALS[0].config.data.scheme


def write_set(folder, trials: str, reference: str = "plain"):
    """Write a set on the smoke recipe and return its path."""
    path = folder / "set.yaml"
    path.write_text(f"base: {SMOKE}\nreference: {reference}\ntrials: {trials}\n")
    return path


def test_trials_are_the_base_with_changes_and_the_reference_is_first(tmp_path):
    path = write_set(tmp_path, "{wide: {about: so, settings: {optim: {lr: 0.5}}}, plain: {}}")
    plain, wide = read_set(path, ["train.epochs=3"])
    assert (plain.name, wide.name, wide.about, wide.views) == ("plain", "wide", "so", 1)
    assert wide.config == change_config(plain.config, {"optim": {"lr": 0.5}}, "")
    assert (plain.config.data.crop, plain.config.train.epochs, plain.config.members) == (64, 3, {})
    assert [trial.name for trial in select([plain, wide], "wide")] == ["plain", "wide"]
    assert select([plain, wide], "plain") == [plain]
    with pytest.raises(ConfigError, match="--trials: found 'wode', expected some of plain, wide"):
        select([plain, wide], "wode")


@pytest.mark.parametrize(
    "trials, message",
    [
        ("{plain: {settings: {loss: {mmc: 1}}}}", r"trial plain: unknown key 'loss\.mmc'"),
        ("{plain: {setings: {}}}", "setings"),
        ("{plain: {views: 2}}", r"views is 2, expected 1 to 1; more than 1 needs augment\.flip"),
        ("{other: {}}", "reference is 'plain', expected one of its trials: other"),
        ("[1]", "trials"),
    ],
)
def test_mistakes_in_a_set_are_named(tmp_path, trials, message):
    with pytest.raises(ConfigError, match=message):
        read_set(write_set(tmp_path, trials))


def test_a_missing_set_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: found no set of trials"):
        read_set(tmp_path / "nowhere.yaml")


def counts_of(errors: int, seed: int):
    """Return the counts of two tiles of two folds, `errors` random pixels of each predicted wrong."""
    codes = np.random.default_rng(0).integers(0, 2, (200, 200))
    wrong = np.zeros(codes.size, bool)
    wrong[np.random.default_rng(seed).choice(codes.size, errors, replace=False)] = True
    predicted = np.where(wrong.reshape(codes.shape), 1 - codes, codes)
    return [count_tile(str(fold), fold, "phase2", codes, predicted) for fold in (0, 1)]


def cells(text: str, name: str) -> list[list[str]]:
    """Return the cells of every table line that begins with `name`."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_seeds_are_shown_by_their_spread_and_a_block_counts_once():
    plain = Trial("plain", Config(), "", 1)
    other = Trial("other", change_config(Config(), {"optim": {"lr": 0.5}}, ""), "so", 1)
    first = Row(plain, 1.0, [counts_of(8000, 1), counts_of(8000, 2)])
    rows = [first, Row(other, 2.0, [counts_of(4000, 3), counts_of(6000, 4)])]
    assert rows[1].counts[0].blocks.shape == first.by_seed[0][0].blocks.shape
    (score, settings), (reference, _) = (
        cells(report(rows, "the command"), "other"),
        cells(report(rows, ""), "plain"),
    )
    scores = [mcc(binary(pool(tiles))) for tiles in rows[1].by_seed]
    assert score[3] == f"{min(scores):.3f} to {max(scores):.3f}"
    gain = np.mean(scores) - mcc(binary(pool(first.counts)))
    assert float(score[2].split()[0]) == pytest.approx(gain, abs=2e-3) and score[2].startswith("+0.15")
    assert score[4:] == ["2 of 2", "800", "2"] and reference[2] == reference[4] == ""
    assert settings == ["other", "optim.lr=0.5", "so"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return the folder of a set of three trials, of which one cannot be trained, its command and exit status."""
    root = tmp_path_factory.mktemp("ablate")
    make_store(root / "store", size=64)
    one_epoch = "train: {epochs: 1}"
    path = write_set(
        root,
        f"{{plain: {{settings: {{{one_epoch}}}}}, pretrained: {{settings: {{model: {{imagenet: true}}}}}}, turned: "
        f"{{views: 3, settings: {{{one_epoch}, augment: {{flip: true, rot90: true}}}}}}}}",
    )
    command = ["ablate", "--set", str(path), "--run", str(root / "run"), "--store", str(root / "store")]
    return root, command, main(command)


def test_a_row_is_the_out_of_fold_score_of_its_views(done):
    root, _, _ = done
    store, folder = TileStore(root / "store"), root / "run" / "turned" / "seed0"
    labels = np.concatenate([store.mask(tile).ravel() for tile in store.tile_ids])
    maps = [load_views(folder, tile, 3).sigmoid().mean(dim=0).numpy() > 0.5 for tile in store.tile_ids]
    known = labels != IGNORE
    predicted = np.concatenate([one.ravel() for one in maps])[known]
    expected = matthews_corrcoef(np.isin(labels[known], (1, 2, 4)), predicted)
    text = (root / "run" / "ablations.md").read_text()
    assert cells(text, "turned")[0][1].startswith(f"{expected:.3f} (")
    assert "4 tiles, stratified folds, 1 seed(s)" in text


def test_a_trial_that_fails_leaves_the_others(done):
    root, _, status = done
    assert status == 2
    text = (root / "run" / "ablations.md").read_text()
    assert cells(text, "plain") and cells(text, "turned") and not cells(text, "pretrained")


def test_finished_networks_are_kept_and_other_settings_refused(done, capsys):
    root, command, _ = done
    files = sorted((root / "run").rglob("fold.pt"))
    before = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 4
    assert main([*command, "--trials", "turned", "--report", str(root / "again.md")]) == 0
    assert [path.stat().st_mtime_ns for path in files] == before
    shown = [cells(path.read_text(), "turned") for path in (root / "again.md", root / "run" / "ablations.md")]
    assert shown[0] == shown[1]
    assert main([*command, "--trials", "plain", "optim.lr=0.5"]) == 2
    assert "differs in optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize("option, message", [("--seeds=a", "--seeds is 'a'"), ("--folds=all", "found 'all'")])
def test_wrong_options_are_named(done, capsys, option, message):
    assert main([*done[1], option]) == 2
    assert message in capsys.readouterr().err
