"""The recipe: what is accepted, what is refused and how the refusal reads, bases, members."""

import pytest
from support import PROJECT
from train_helpers import SMOKE

from train.config import (
    Config,
    ConfigError,
    change_config,
    describe_differences,
    differing_keys,
    from_dict,
    load_config,
    members_of,
    save_config,
    to_dict,
)

RECIPE = PROJECT / "train" / "recipe.yaml"
# Sets of trials, which `ablate` reads, lie beside the recipes.
RECIPES = sorted(path for path in SMOKE.parent.glob("*.yaml") if "\ntrials:" not in path.read_text())


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", [RECIPE, *RECIPES], ids=lambda path: path.name)
def test_every_recipe_of_the_kit_loads(path):
    assert all(isinstance(config, Config) for _, config in members_of(load_config(path)).values())


def test_file_changes_defaults_and_override_changes_file(tmp_path):
    path = write(tmp_path / "run.yaml", "optim:\n  lr: 2e-3\n  weight_decay: 0.5\n")
    config = load_config(path, ["optim.lr=3e-4", "augment.scale=[1,2]", "train.epochs=7", "pack.time_budget=null"])
    assert (config.optim.lr, config.optim.weight_decay, config.train.epochs) == (3e-4, 0.5, 7)
    assert config.augment.scale == [1.0, 2.0] and config.pack.time_budget is None
    assert config.loss == Config().loss


def test_a_path_with_a_number_sign_is_no_comment():
    assert load_config(overrides=["data.store=run #2"]).data.store == "run #2"
    assert load_config(overrides=["distil.teachers=[runs/a,runs/b]"]).distil.teachers == ["runs/a", "runs/b"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"unknown key 'optim\.learning_rate'; 'optim' allows .*weight_decay"),
        ("optimiser.lr=1", "unknown key 'optimiser"),
        ("train.epochs=ten", r"train\.epochs"),
        ("augment.flip=maybe", r"augment\.flip"),
        ("optim=3", r"'optim' is a group.*optim\.lr"),
        ("optim.lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("loss.focal=0", r"^loss\.focal is 0, expected one of"),
        ("postprocess.crf={smooth_px:", "is no YAML; quote key=value"),
    ],
)
def test_a_wrong_setting_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=["loss.dice=0", override])


@pytest.mark.parametrize(
    "override",
    [
        "data.crop=100",
        "data.batch_size=1",
        "data.mix=1.5",
        "augment.scale=[1.2,0.8]",
        "augment.saturate=1.7",
        "optim.lr=nan",
        "optim.ema_decay=1",
        "optim.schedule=linear",
        "train.keep=first",
        "train.threads=-1",
        "loss.lovasz=inf",
        "kind.hidden=0",
        "postprocess.min_hole=-1",
        "pack.time_budget=0",
        "trainer.devices=0",
        "trainer.precision=64",
    ],
)
def test_a_senseless_value_is_named_with_what_is_expected(override):
    with pytest.raises(ConfigError, match=rf"^{override.split('=')[0]} is .*, expected "):
        load_config(overrides=[override])


def test_crops_are_shared_evenly_by_the_devices():
    assert load_config(overrides=["trainer.devices=2", "data.batch_size=8"]).trainer.processes == 2
    for devices in ("trainer.devices=3", "trainer.devices=8"):
        with pytest.raises(ConfigError, match="^data.batch_size is 8"):
            load_config(overrides=[devices, "data.batch_size=8"])


def test_members_of_a_file_replace_those_of_its_base_and_an_override_changes_one(tmp_path):
    write(tmp_path / "base.yaml", "members:\n  a: {views: 1}\n  b: {ship: all}\n")
    path = write(tmp_path / "mine.yaml", "base: base.yaml\nmembers:\n  c: {ship: all}\n  d: {}\n")
    assert list(load_config(path).members) == ["c", "d"]
    changed = load_config(path, ["members.c.weight=2"]).members
    assert list(changed) == ["c", "d"] and (changed["c"].weight, changed["c"].ship) == (2.0, "all")
    with pytest.raises(ConfigError, match="^members is 'a', expected one of c, d"):
        load_config(path, ["members.a.weight=2"])
    with pytest.raises(ConfigError, match="^members is 'kind', expected another name"):
        members_of(load_config(write(tmp_path / "kind.yaml", "members: {kind: {}}\n")))


# --- Networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # segmentation_models_pytorch would swallow these without a word
        (
            ["model.args.encoder=resnet34"],
            r"model\.args\.encoder is no argument of Unet; expected .*encoder_name",
        ),
        (["model.args.decoder_atention_type=scse"], r"model\.args\.decoder_atention_type is no argument"),
        (["model.args.classes=4"], r"model\.args\.classes is no argument"),
        (["model.args.encoder_name=resnet35"], "encoder_name is 'resnet35', expected an encoder"),
        (["model.name=UNet"], "model.name is 'UNet', expected Unet or a module of train/networks/"),
        (["model.imagenet=true", "model.pretrained=a.pt"], "model.pretrained is 'a.pt', expected null where"),
    ],
)
def test_a_network_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


def test_arguments_of_another_network_replace_those_before(tmp_path):
    config = load_config(write(tmp_path / "run.yaml", "model: {name: SEResUNet, args: {width: 8}}\n"))
    assert config.model.args == {"width": 8}
    other = change_config(config, {"model": {"name": "Unet", "args": {"encoder_depth": 4}}}, "test")
    more = change_config(other, {"model": {"args": {"encoder_name": "resnet18"}}}, "test")
    assert more.model.args == {"encoder_depth": 4, "encoder_name": "resnet18"}


# --- Files --------------------------------------------------------------------------------------------------


def test_bases_are_read_first_and_members_replace_those_of_the_base(tmp_path):
    write(tmp_path / "a.yaml", "optim: {lr: 1e-3}\ntrain: {epochs: 3}\nmembers: {one: {}, two: {views: 6}}\n")
    write(tmp_path / "b.yaml", "base: a.yaml\noptim: {lr: 2e-3}\n")
    (tmp_path / "c").mkdir()
    config = load_config(write(tmp_path / "c" / "c.yaml", "base: ../b.yaml\nmembers: {three: {}}\n"))
    assert (config.optim.lr, config.train.epochs, list(config.members)) == (2e-3, 3, ["three"])
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    with pytest.raises(ConfigError, match="base leads in a circle"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n"])
def test_a_damaged_file_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match="run.yaml"):
        load_config(write(tmp_path / "run.yaml", text))


def test_a_missing_file_lists_what_is_there(tmp_path):
    write(tmp_path / "unet.yaml", "")
    with pytest.raises(ConfigError, match="does not exist.*unet.yaml"):
        load_config(tmp_path / "unett.yaml")


def test_a_saved_recipe_is_the_same_recipe(tmp_path):
    config = load_config(SMOKE, ["optim.lr=1.23456789e-5", "postprocess.crf={smooth_px: 3.0}"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config == from_dict(to_dict(config), "test")


def test_differences_leave_out_resources_and_are_checked():
    resources = ["train.threads=1", "data.workers=3", "data.store=elsewhere", "trainer.accelerator=cpu"]
    changed = load_config(overrides=["optim.lr=1", "trainer.devices=2", *resources])
    assert differing_keys(Config(), changed) == ["optim.lr", "trainer.devices"]
    assert describe_differences(load_config(overrides=["loss.dice=0.5"]), Config()) == "loss.dice=0.5"
    with pytest.raises(ConfigError, match=r"trial: unknown key 'loss\.dyce'"):
        change_config(Config(), {"loss": {"dyce": 1.0}}, "trial")


# --- Members ------------------------------------------------------------------------------------------------


def test_members_differ_from_the_recipe_by_their_settings():
    members = members_of(load_config(SMOKE))
    (north, plain), (turned, mirrored) = members["north"], members["turned"]
    assert differing_keys(plain, mirrored) == ["augment.flip", "augment.rot90"]
    assert (north.ship, north.views, turned.ship, turned.views) == ("folds", 1, "all", 2)
    assert plain.members == {} and list(members_of(Config())) == ["unet"]


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"views": 7}, r"members\.a\.views is 7, expected 1 to 6"),
        ({"ship": "best"}, r"members\.a\.ship is 'best', expected folds or all"),
        ({"weight": 0}, r"members\.a\.weight is 0.0, expected more than 0"),
        ({"views": 2}, r"members\.a\.views is 2, expected 1 without flip and rot90"),
        ({"settings": {"optim": {"rate": 1}}}, r"members\.a\.settings: unknown key 'optim\.rate'"),
        ({"settings": {"train": {"epochs": 0}}}, r"train\.epochs is 0"),
    ],
)
def test_a_member_that_cannot_be_is_named(member, message):
    with pytest.raises(ConfigError, match=message):
        members_of(from_dict({"members": {"a": member}}, "test"))


def test_a_setting_without_its_group_is_told_with_it():
    with pytest.raises(ConfigError, match=r"unknown key 'encoder_name'; did you mean model\.args\.encoder_name\? "):
        load_config(overrides=["encoder_name=resnet99"])
