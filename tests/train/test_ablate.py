"""Ablations: which trials, their budgets, runs that resume, the decision, and the report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef
from train_helpers import make_store

from prep.labels import IGNORE
from prep.store import TileStore
from solution import build_network, decide_classes, normalize
from train import ablate
from train.__main__ import main
from train.ablate import (
    Row,
    Trial,
    decide,
    format_report,
    is_finished,
    list_tasks,
    parse_includes,
    prepare_folder,
    read_set,
    run_worker,
    with_overrides,
    with_steps,
    work_of,
)
from train.config import Config, ConfigError, load_config
from train.fit import RunError
from train.losses import SetLoss

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
TRIALS, REFERENCE = read_set(CONFIGS / "ablations.yaml")


# --- The shipped set ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_every_shipped_trial_is_a_config_with_a_network_and_a_loss(trial):
    assert isinstance(trial.config, Config)
    build_network({"name": trial.config.model.name, "args": dict(trial.config.model.args)})
    SetLoss(trial.config.loss)


def test_shipped_trials_differ_from_each_other_and_share_the_folds():
    assert len({str(trial.config) for trial in TRIALS}) == len(TRIALS)
    assert {trial.config.data.scheme for trial in TRIALS} == {"spatial"}
    assert REFERENCE in [trial.name for trial in TRIALS]


def test_losses_of_the_two_phases_and_of_the_ninth_place():
    a, b, ninth = (load_config(CONFIGS / f"{name}.yaml") for name in ("phase_a", "phase_b", "ninth_place"))
    assert [a.loss.focal, a.loss.dice, a.loss.mcc, a.loss.boundary] == [1, 1, 0, 0]
    assert [b.loss.focal, b.loss.dice, b.loss.mcc, b.loss.boundary] == [0.25, 0.25, 0.35, 0.15]
    assert b.loss.boundary_ramp_epochs > 0
    assert [ninth.loss.tversky, ninth.loss.lovasz, ninth.loss.focal, ninth.loss.dice] == [0.4, 0.6, 0, 0]
    assert (ninth.data.scaling, ninth.optim.schedule, ninth.train.epochs) == ("percentile", "restarts", 50)
    assert next(trial.views for trial in TRIALS if trial.name == "ninth-place") == 1


# --- Sets of one's own --------------------------------------------------------------------------------------


def write_set(folder: Path, text: str) -> Path:
    (folder / "base.yaml").write_text("loss: {gamma: 1.0}\n")
    (folder / "set.yaml").write_text(text)
    return folder / "set.yaml"


def test_trials_are_the_base_with_changes(tmp_path):
    path = write_set(
        tmp_path,
        "base: base.yaml\nreference: plain\ntrials:\n  plain: {}\n"
        "  mcc: {about: a term, views: 1, settings: {loss: {mcc: 0.5}, train: {epochs: 3}}}\n",
    )
    (plain, mcc), reference = read_set(path)
    assert (plain.name, plain.about, plain.views, reference) == ("plain", "", 6, "plain")
    assert (mcc.name, mcc.about, mcc.views) == ("mcc", "a term", 1)
    assert (mcc.config.loss.gamma, mcc.config.loss.mcc, mcc.config.train.epochs) == (1.0, 0.5, 3)


@pytest.mark.parametrize(
    "trial, message",
    [
        ("{settings: {loss: {mmc: 1}}}", r"trial odd: unknown key 'loss\.mmc'"),
        ("{settings: {loss: {mcc: high}}}", r"trial odd: loss\.mcc"),
        ("{settings: {loss: {mcc: -1}}}", r"loss\.mcc is -1"),
        ("{setings: {}}", "setings"),
        ("{views: 7}", "views is 7, expected 1 to 6"),
        ("{config: nowhere.yaml}", "nowhere.yaml does not exist"),
    ],
)
def test_mistakes_in_a_set_are_named(tmp_path, trial, message):
    path = write_set(tmp_path, f"base: base.yaml\nreference: odd\ntrials:\n  odd: {trial}\n")
    with pytest.raises(ConfigError, match=message):
        read_set(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("base: base.yaml\nreference: none\ntrials: {one: {}}\n", "reference is 'none'.*one"),
        ("reference: one\ntrials: {one: {}}\n", "base"),
        ("- 1\n", "no set of trials"),
    ],
)
def test_mistakes_of_a_set_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_set(write_set(tmp_path, text))


def test_a_missing_set_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml.*no set of trials"):
        read_set(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "steps, epochs, expected", [(600, 12, 12), (600, 50, 50), (600, 7, 6), (7, 5, 1), (4, 9, 4)]
)
def test_every_trial_makes_exactly_so_many_steps(steps, epochs, expected):
    config = with_steps(load_config(overrides=[f"train.epochs={epochs}"]), steps)
    assert config.train.epochs == expected
    assert config.train.epochs * config.data.steps_per_epoch == steps
    assert config.train.early_stop == 0


def test_common_overrides_are_those_of_a_config():
    trial = with_overrides(Trial("one", Config()), ["data.scheme=spatial", "optim.lr=3e-4"], None)
    assert (trial.config.data.scheme, trial.config.optim.lr, trial.config.train.threads) == (
        "spatial",
        3e-4,
        1,
    )
    with pytest.raises(ConfigError, match="unknown key 'optim.rate'"):
        with_overrides(Trial("one", Config()), ["optim.rate=1"], None)


def test_included_runs_have_a_name_and_folders(tmp_path):
    (tmp_path / "a").mkdir()
    assert parse_includes([f"U-Net={tmp_path / 'a'}"]) == {"U-Net": [tmp_path / "a"]}
    with pytest.raises(ConfigError, match="no such folder: .*b"):
        parse_includes([f"U-Net={tmp_path / 'a'},{tmp_path / 'b'}"])
    with pytest.raises(ConfigError, match="expected name=folder"):
        parse_includes(["runs/a"])


# --- The decision and the table -----------------------------------------------------------------------------


def make_row(name: str, extent: list, seconds: float = 60.0) -> Row:
    scores = np.array(extent, float)
    four = scores - 0.1
    four[:, 1] = np.nan
    config = load_config(overrides=["loss.mcc=0.5"] if name != "reference" else [])
    return Row(name, scores, four, scores.mean(axis=1), four[:, 0], seconds, config, f"about {name}")


def test_kept_where_the_gain_exceeds_the_spread_of_seeds_by_a_hundredth():
    reference = make_row("reference", [[0.50, 0.60], [0.52, 0.62]])  # means 0.55 and 0.57: 0.56, spread 0.02
    assert reference.mean == pytest.approx(0.56)
    assert reference.seed_spread == pytest.approx(0.02)
    assert reference.fold_spread == pytest.approx(np.std([0.51, 0.61], ddof=1))
    assert decide(reference, reference) == "reference"
    assert decide(make_row("a", [[0.54, 0.64], [0.54, 0.64]]), reference) == "kept"  # gain 0.03
    assert decide(make_row("b", [[0.53, 0.64], [0.54, 0.64]]), reference) == "dropped"
    assert (
        decide(make_row("c", [[0.53, 0.63], [0.57, 0.67]]), reference) == "dropped"
    )  # 0.04, its spread 0.04
    assert decide(make_row("d", [[0.50, 0.60], [0.50, 0.60]]), reference) == "dropped"


def test_a_single_seed_is_marked():
    reference, one = make_row("reference", [[0.5, 0.6]]), make_row("one", [[0.52, 0.6]])
    assert reference.seed_spread is None
    assert decide(one, reference) == "kept*"
    assert decide(one, make_row("reference", [[0.5, 0.6], [0.5, 0.6]])) == "kept*"
    assert decide(one, make_row("reference", [[0.5, 0.6], [0.52, 0.6]])) == "dropped*"


def cells(text: str, name: str) -> list[list[str]]:
    """Return the cells of every table line that begins with `name`."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_report_shows_scores_spreads_and_what_differs():
    reference = make_row("reference", [[0.50, 0.60], [0.52, 0.62]], seconds=float("nan"))
    other = make_row("mcc", [[0.60, 0.70], [0.60, 0.70]])
    text = format_report([reference, other], reference, [0, 3], "2 tiles.", "python -m train ablate")
    first, four, settings = cells(text, "mcc")
    assert first == [
        "mcc",
        *("0.600", "0.700", "0.650", "+0.090", "0.071", "0.000", "2", "0.650", "60", "800", "kept"),
    ]
    assert four == ["mcc", "0.500", "0.500", "0.500"]
    assert settings == ["mcc", "`loss.mcc=0.5`", "about mcc"]
    assert cells(text, "reference")[0][-3:] == ["–", "800", "reference"]
    assert "| fold 0 | fold 3 |" in text
    assert "python -m train ablate" in text


# --- From configs to the report -----------------------------------------------------------------------------


def smoke_set(folder: Path) -> Path:
    """Write a set of two trials on the smoke config."""
    (folder / "smoke.yaml").write_text((CONFIGS / "smoke.yaml").read_text())
    text = (
        "base: smoke.yaml\nreference: plain\ntrials:\n  plain: {about: as it is}\n"
        "  ninth:\n    views: 1\n    settings:\n"
        "      data: {scaling: percentile, mix: 0.5}\n"
        "      loss: {focal: 0.0, dice: 0.0, tversky: 0.4, lovasz: 0.6, mcc: 0.1, boundary: 0.1}\n"
        "      model: {name: SEResUNet, args: {width: 4, levels: 2}}\n"
        "      optim: {schedule: restarts, restart_epochs: 1}\n"
    )
    (folder / "set.yaml").write_text(text)
    return folder / "set.yaml"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, list[str]]:
    """Return the folder of a set of two trials on two folds, run from the command line, and the command.

    The folds of one trial are finished before, in this process: each other starts Python and PyTorch anew.
    """
    root = tmp_path_factory.mktemp("ablate")
    make_store(root / "store")
    trials, reference = read_set(smoke_set(root))
    plain = next(trial for trial in trials if trial.name == reference)
    trial = with_overrides(plain, [f"data.store={root / 'store'}"], 2)
    for task in list_tasks([trial], [0], [0, 1], root / "run"):
        prepare_folder(task)
        run_worker(work_of(task).arguments[1:])
    arguments = ["ablate", "--set", str(root / "set.yaml"), "--run", str(root / "run"), "--jobs", "2"]
    arguments += ["--report", str(root / "report.md"), "--steps", "2", "--store", str(root / "store")]
    assert main(arguments) == 0
    return root, arguments


def test_report_holds_the_out_of_fold_scores(done):
    root, _ = done
    store, run = TileStore(root / "store"), root / "run" / "ninth" / "seed0"
    scores = []
    for fold in (0, 1):
        tiles = [tile for tile, of in store.fold_of("stratified").items() if of == fold]
        labels = np.concatenate([store.mask(tile).ravel() for tile in tiles])
        classes = [decide_classes(np.load(run / "oof" / f"{tile}.npy").astype(np.float32)) for tile in tiles]
        known = labels != IGNORE
        predicted = np.concatenate([part.ravel() for part in classes])[known]
        scores.append(matthews_corrcoef(np.isin(labels[known], (1, 2, 4)), np.isin(predicted, (1, 2))))
    shown = cells((root / "report.md").read_text(), "ninth")[0]
    assert shown[1:4] == [f"{score:.3f}" for score in (*scores, np.mean(scores))]
    assert shown[-2] == "2"


def test_tiles_are_predicted_with_the_trials_views_and_scaling(done):
    root, _ = done
    store, run = TileStore(root / "store"), root / "run" / "ninth" / "seed0"
    record = torch.load(run / "fold0" / "fold.pt", weights_only=True)
    network = build_network(record["arch"]).eval()
    network.load_state_dict(record["state_dict"])
    image = store.image("000")
    low, high = np.nanpercentile(image, [2, 98], axis=(0, 1))
    x = torch.from_numpy(normalize(image, {"mean": low.tolist(), "std": (high - low).tolist()}))[None]
    with torch.no_grad():
        expected = network(x).softmax(dim=1)[0].numpy()
    np.testing.assert_allclose(np.load(run / "oof" / "000.npy"), expected, atol=2e-3)
    assert json.loads((run / "run.json").read_text())["views"] == 1


def test_only_what_is_missing_is_run_again(done, monkeypatch):
    root, arguments = done
    before = (root / "report.md").read_text()
    (root / "run" / "plain" / "seed0" / "oof" / "002.npy").unlink()
    started = []

    def start(task, slot, original=ablate.start):
        started.append((task.trial.name, task.fold))
        return original(task, slot)

    monkeypatch.setattr(ablate, "start", start)
    assert main(arguments) == 0
    assert started == [("plain", 1)]
    assert main(arguments) == 0
    assert started == [("plain", 1)]
    assert (root / "report.md").read_text() == before


def test_other_settings_in_the_same_folder_are_refused(done, capsys):
    _, arguments = done
    assert main([*arguments, "--override", "optim.lr=0.5"]) == 2
    assert "differs in optim.lr" in capsys.readouterr().err


def test_runs_that_are_there_become_rows(done, tmp_path):
    root, _ = done
    plain = root / "run" / "plain" / "seed0"
    arguments = [
        "ablate",
        "--include",
        f"before={plain}",
        f"twice={plain},{plain}",
        "--store",
        str(root / "store"),
    ]
    assert main([*arguments, "--report", str(tmp_path / "report.md"), "--reference", "before"]) == 0
    text, whole = (tmp_path / "report.md").read_text(), (root / "report.md").read_text()
    assert cells(text, "before")[0][1:4] == cells(whole, "plain")[0][1:4]
    assert cells(text, "twice")[0][4:8] == ["+0.000", *cells(whole, "plain")[0][5:6], "0.000", "2"]


def test_a_run_without_the_folds_asked_for_is_refused(done, tmp_path, capsys):
    root, _ = done
    partial = tmp_path / "partial"
    source = root / "run" / "plain" / "seed0"
    (partial / "fold0").mkdir(parents=True)
    for name in ("fold.pt", "config.yaml"):
        (partial / "fold0" / name).write_bytes((source / "fold0" / name).read_bytes())
    arguments = ["ablate", "--include", f"part={partial}", "--store", str(root / "store")]
    report = ["--report", str(tmp_path / "report.md")]
    assert main([*arguments, *report]) == 2
    assert "no predictions of 002, 003" in capsys.readouterr().err
    assert main([*arguments, *report, "--folds", "0"]) == 0
    assert (
        cells((tmp_path / "report.md").read_text(), "part")[0][1]
        == cells((root / "report.md").read_text(), "plain")[0][1]
    )


def test_predictions_of_other_views_are_not_kept(done, tmp_path):
    root, _ = done
    shutil.copytree(root / "run", tmp_path / "run")
    trial = with_overrides(read_set(root / "set.yaml")[0][0], [f"data.store={root / 'store'}"], 2)
    (task,), store = list_tasks([trial], [0], [0], tmp_path / "run"), TileStore(root / "store")
    prepare_folder(task)
    assert is_finished(task, store)
    fewer = task._replace(trial=task.trial._replace(views=2))
    prepare_folder(fewer)
    assert not is_finished(fewer, store)
    assert (fewer.folder / "fold0" / "fold.pt").is_file()


def test_a_failed_fold_is_named_and_the_others_are_finished(done, tmp_path, capsys):
    root, arguments = done
    changed = ["--override", "model.args.encoder_name=nonsense", "--folds", "0", "--run", str(tmp_path)]
    assert main([*arguments, *changed, "--trials", "plain", "--report", str(tmp_path / "report.md")]) == 2
    message = capsys.readouterr().err
    assert "1 folds failed; the same command tries them again" in message
    assert "fold0.log" in message
    assert "nonsense" in message
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--trials", "plain,nowhere"], "no trial 'nowhere'"),
        (["--reference", "nowhere"], "reference is 'nowhere'"),
        (["--folds", "0,7"], "no fold 7"),
        (["--steps", "0"], "--steps is 0"),
        (["--override", "train.seed=x"], "train.seed"),
    ],
)
def test_command_line_explains_mistakes(done, capsys, extra, message):
    _, arguments = done
    assert main([*arguments, *extra]) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_compare_is_said(capsys):
    assert main(["ablate"]) == 2
    assert "--set, --configs or --include" in capsys.readouterr().err


def test_equal_names_are_refused(done, capsys):
    root, arguments = done
    (root / "other").mkdir()
    (root / "other" / "plain.yaml").write_text((root / "smoke.yaml").read_text())
    assert main([*arguments, "--configs", str(root / "other" / "plain.yaml")]) == 2
    assert "plain: several trials have this name" in capsys.readouterr().err


def test_trials_on_other_folds_are_not_compared(tmp_path):
    trials = [Trial("one", Config()), Trial("two", load_config(overrides=["data.scheme=spatial"]))]
    with pytest.raises(ConfigError, match=r"data\.scheme differs between trials \(spatial, stratified\)"):
        ablate.require_comparable(trials, [], "one")


def test_a_run_on_other_folds_is_no_row(done):
    root, _ = done
    with pytest.raises(RunError, match="is a run on stratified folds, expected spatial"):
        ablate.score_row(
            "x", [root / "run" / "plain" / "seed0"], TileStore(root / "store"), "spatial", [0], None
        )
