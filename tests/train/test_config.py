"""The configuration: what is accepted, what is refused, and how the refusal reads."""

from pathlib import Path

import pytest

from train.config import (
    Config,
    ConfigError,
    change_config,
    describe_differences,
    differing_keys,
    from_dict,
    load_config,
    save_config,
    to_dict,
)

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"


OF_OTHER_COMMANDS = ("ablations.yaml", "pixels.yaml")
CONFIG_FILES = sorted(path for path in CONFIGS.glob("*.yaml") if path.name not in OF_OTHER_COMMANDS)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_shipped_configs_load(path):
    assert isinstance(load_config(path), Config)


def test_file_changes_defaults_and_override_changes_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim:\n  lr: 2e-3\n  weight_decay: 0.5\n")
    config = load_config(path, ["optim.lr=3e-4", "data.class_shares=[1,1,1,0]", "train.epochs=7"])
    assert config.optim.lr == 3e-4
    assert config.optim.weight_decay == 0.5
    assert config.data.class_shares == [1.0, 1.0, 1.0, 0.0]
    assert config.train.epochs == 7
    assert config.loss == Config().loss


def test_network_arguments_are_free():
    config = load_config(overrides=["model.args.decoder_attention_type=scse"])
    assert config.model.args == {"encoder_name": "efficientnet-b0", "decoder_attention_type": "scse"}


def test_unknown_key_in_file_is_named_with_file_and_allowed_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim:\n  learning_rate: 1e-3\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "optim.learning_rate" in message
    assert str(path) in message
    assert "weight_decay" in message


@pytest.mark.parametrize("override", ["optim.learning_rate=1", "optimiser.lr=1", "epochs=3"])
def test_unknown_key_on_the_command_line_is_named(override):
    with pytest.raises(ConfigError, match=f"unknown key '{override.split('=')[0].split('.')[0]}"):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs=ten",
        "train.epochs=1.5",
        "optim.lr=fast",
        "augment.flip=maybe",
        "data.class_shares=[a,1,1,1]",
    ],
)
def test_wrong_type_names_the_key(override):
    with pytest.raises(ConfigError, match=override.split("=")[0].replace(".", r"\.")):
        load_config(overrides=[override])


@pytest.mark.parametrize("override", ["optim=3", "optim=null", "optim=[1]"])
def test_group_takes_no_value(override):
    with pytest.raises(ConfigError, match=r"'optim' is a group.*optim\.lr"):
        load_config(overrides=[override])


@pytest.mark.parametrize("override", ["optim.lr", "=3", ""])
def test_override_without_key_or_value(override):
    with pytest.raises(ConfigError, match="expected key=value"):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    "override",
    [
        "data.crop=100",
        "data.batch_size=1",
        "data.class_shares=[1,1,1]",
        "data.class_shares=[0,0,0,0]",
        "augment.scale=[1.2,0.8]",
        "augment.gain=1",
        "optim.lr=nan",
        "optim.ema_decay=1",
        "train.threads=-1",
        "loss.class_weights=[1,2]",
        "loss.mcc=-1",
        "loss.lovasz=inf",
        "loss.boundary_sigma=0",
        "loss.border_smoothing=0.6",
        "loss.border_sigma=0",
        "loss.interface_weight=0.5",
        "loss.boundary_ramp_epochs=-1",
        "loss.tversky_alpha=0",
        "data.mix=1.5",
        "model.dropout=1",
        "data.scaling=minmax",
        "optim.schedule=linear",
        "optim.restart_epochs=0",
        "optim.encoder_lr_factor=-1",
    ],
)
def test_senseless_value_names_key_value_and_expectation(override):
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key} is .*, expected "):
        load_config(overrides=[override])


def test_all_loss_terms_off_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.focal"):
        load_config(overrides=["loss.focal=0", "loss.dice=0"])


@pytest.mark.parametrize("term", ["mcc", "boundary", "tversky", "lovasz"])
def test_any_loss_term_will_do(term):
    assert load_config(overrides=[f"loss.{term}=1", "loss.focal=0", "loss.dice=0"]).loss.focal == 0


def test_arguments_of_another_network_replace_those_before(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: SEResUNet, args: {width: 8}}\n")
    config = load_config(path)
    assert config.model.args == {"width": 8}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    other = change_config(config, {"model": {"name": "Unet", "args": {"encoder_depth": 4}}}, "test")
    assert other.model.args == {"encoder_depth": 4}
    more = change_config(other, {"model": {"args": {"encoder_name": "resnet18"}}}, "test")
    assert more.model.args == {"encoder_depth": 4, "encoder_name": "resnet18"}


def test_changed_settings_are_checked_and_described():
    config = change_config(Config(), {"loss": {"mcc": 0.35}, "train": {"epochs": 3}}, "test")
    assert describe_differences(config, Config()) == "loss.mcc=0.35, train.epochs=3"
    with pytest.raises(ConfigError, match=r"trial mcc: unknown key 'loss\.mmc'.*mcc"):
        change_config(Config(), {"loss": {"mmc": 1.0}}, "trial mcc")
    with pytest.raises(ConfigError, match=r"^loss\.mcc is -1"):
        change_config(Config(), {"loss": {"mcc": -1}}, "trial mcc")


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", ""])
def test_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    if text == "":
        assert load_config(path) == Config()  # an empty file changes nothing
        return
    with pytest.raises(ConfigError, match="run.yaml"):
        load_config(path)


def test_missing_file_lists_what_is_there(tmp_path):
    (tmp_path / "unet.yaml").write_text("")
    with pytest.raises(ConfigError, match="does not exist.*unet.yaml"):
        load_config(tmp_path / "unett.yaml")


def test_saved_config_is_the_same_config(tmp_path):
    config = load_config(CONFIGS / "smoke.yaml", ["optim.lr=1.23456789e-5", "loss.class_weights=[1,2,3,4]"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert from_dict(to_dict(config), "test") == config


def test_differing_keys_leaves_out_resources():
    changed = load_config(
        overrides=["optim.lr=1", "train.threads=1", "data.workers=3", "data.store=elsewhere"]
    )
    assert differing_keys(Config(), changed) == ["optim.lr"]
    other_network = load_config(overrides=["model.args.encoder_depth=4"])
    assert differing_keys(Config(), other_network) == ["model.args.encoder_depth"]


def test_a_retired_setting_of_an_older_run_is_passed_over_where_it_does_nothing(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  label_shift: [0, 0]\n  crop: 96\n")
    assert load_config(path).data.crop == 96
    assert from_dict({"data": {"label_shift": [0, 0]}}, "a run") == Config()
    path.write_text("data:\n  label_shift: [0, -1]\n")
    with pytest.raises(ConfigError, match="unknown key 'data.label_shift'"):
        load_config(path)
