"""The typed recipe of a run: dataclasses, YAML file and `key=value` overrides.

A recipe says how an ensemble is made: settings of training, the members as differences from them, the network of
the kind, post-processing and packing. `train/recipe.yaml` is that of the shipped weights.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Sequence, Union

import segmentation_models_pytorch as smp
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from solution import STRIDE, VIEWS, KitError
from train.networks import network_class


class ConfigError(KitError):
    """A recipe cannot be used; the message names source, key, what was found and what is allowed."""


@dataclass
class DataConfig:
    """Where the tiles come from and how crops are drawn from them."""

    store: str = "data/competition"  # tile store made by `make prep`
    exclude_ground: Optional[str] = None  # a tile store: tiles on the ground of its tiles are left out
    scheme: str = "stratified"  # of folds.json: "stratified", "spatial", or "split" (HKH)
    crop: int = 256  # side of a training crop in pixels, a multiple of 32
    batch_size: int = 4  # crops a step
    steps_per_epoch: int = 200  # between two validations
    glacier_share: float = 0.6  # share of the crops that are drawn around a pixel of glacier of either kind
    # Share of crops into which a rectangle of a crop of another tile is pasted, labels alike: CutMix (Yun et
    # al. 2019, arXiv 1905.04899).
    mix: float = 0.5
    workers: int = 0  # processes that prepare crops; 0: in the training process


@dataclass
class AugmentConfig:
    """Random changes of a training crop; see `train.augment` for how each is applied."""

    flip: bool = False  # left-right and up-down, each in half of the crops
    rot90: bool = False  # a multiple of 90 degrees
    affine_share: float = 0.5  # share of crops that are rotated and scaled by the two settings below
    rotate: float = 15.0  # largest rotation to either side, degrees
    scale: list[float] = field(default_factory=lambda: [0.8, 1.25])  # range of magnification, log-uniform
    # Each band is multiplied by a factor from [1 - gain, 1 + gain]: reflectance as it is, temperature as its
    # deviation from the training mean (10 % of 256 K would be no jitter but another climate).
    gain: float = 0.0
    offset: float = 0.0  # each band is shifted by up to this many of its standard deviations, to either side
    # One factor from [1 - illumination, 1 + illumination] for all reflective bands: sun height and haze.
    illumination: float = 0.0
    # Reflective bands are cut off at one reflectance a crop, drawn from [saturate, 1.6]; 0: never. Low-gain
    # Landsat-7 bands saturate at reflectances of 0.5 to 0.9 on snow.
    saturate: float = 0.0

    @property
    def every_direction(self) -> bool:
        """Return whether tiles are mirrored and turned, so that the network may be asked in every view."""
        return self.flip and self.rot90


@dataclass
class ModelConfig:
    """The network, as `solution.build_network` takes it."""

    name: str = "Unet"  # that of segmentation_models_pytorch, or a module of train/networks/
    # Arguments of that network, such as encoder_name and decoder_channels.
    args: dict[str, Any] = field(default_factory=lambda: {"encoder_name": "timm-tf_efficientnet_lite0"})
    # Momentum of BatchNorm's running statistics. The EfficientNet encoders come with 0.01, which needs more
    # steps than a short run has before its statistics mean anything. null: as the network defines it.
    batchnorm_momentum: Optional[float] = 0.1
    imagenet: bool = False  # start the encoder from ImageNet; see `train.pretrained` for which encoders can
    # Checkpoint of `make pretrain`: it gives the first weights, and the statistics that normalise the bands.
    pretrained: Optional[str] = None
    # For so many epochs the encoder's weights and BatchNorm statistics stay as they are.
    freeze_epochs: int = 0


@dataclass
class LossConfig:
    """A weighted sum of losses on the extent; see `train.losses`."""

    focal: float = 1.0  # weight of the focal term
    gamma: float = 2.0  # its focusing exponent; 0 gives cross-entropy
    dice: float = 1.0  # weight of the Dice term
    tversky: float = 0.0  # weight of the Tversky term
    tversky_alpha: float = 0.3  # weight of false positives in it (Salehi et al. 2017, arXiv 1706.05721),
    tversky_beta: float = 0.7  # and of false negatives
    lovasz: float = 0.0  # weight of the Lovasz term (Berman et al. 2018, arXiv 1705.08790)
    auxiliary: float = 1.0  # weight of the loss on the auxiliary head of a network that has one (GlaViTU)


@dataclass
class OptimConfig:
    """AdamW, its learning rate over time, and the averaging of weights."""

    lr: float = 1e-3  # highest learning rate
    encoder_lr_factor: float = 1.0  # the encoder learns at this many times `lr`
    weight_decay: float = 1e-2  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: unlimited
    warmup_steps: int = 40  # the learning rate rises linearly over these steps
    # After the warm-up: "cosine" falls to 0 at the run's last step; "constant" stays, and the average of the weights
    # settles instead; "plateau" is multiplied by plateau_factor after plateau_patience epochs without a better val_mcc.
    schedule: str = "cosine"
    plateau_factor: float = 0.5  # see schedule
    plateau_patience: int = 3  # epochs; see schedule
    ema_decay: float = 0.99  # of the moving average of the weights, reached by a ramp; 0: no averaging


@dataclass
class TrainConfig:
    """Length, seed and resources of a run."""

    epochs: int = 4  # of data.steps_per_epoch steps
    early_stop: int = 0  # stop after this many epochs without a better val_mcc; 0: never
    # Whose weights the fold keeps: "best", the epoch with the best val_mcc, or "last". Choosing by the tiles
    # that are held out flatters their score; a schedule that ends at 0 has no need to choose.
    keep: str = "last"
    seed: int = 0  # of first weights, crops and dropout
    threads: int = 0  # CPU threads of PyTorch; 0: all cores that the process may use


@dataclass
class DistilConfig:
    """What a student learns from its teachers; see `train.distil`."""

    teachers: list[str] = field(default_factory=list)  # folders of runs, or of members of runs
    share: float = 0.5  # of the loss that is the teachers'; the rest is the labels'


@dataclass
class TrainerConfig:
    """What a run trains on. Several devices share the crops of a step: `data.batch_size` is that of all."""

    accelerator: str = "auto"  # "cpu", "gpu", or "auto": a GPU where there is one
    devices: int = 1  # of each machine, one process each
    num_nodes: int = 1  # machines, each of which is given the same command (by SLURM, torchrun, by hand)
    # "32", "bf16" or "16", the latter two mixed with float32; "auto": mixed on a GPU, "32" on a CPU.
    precision: str = "auto"
    # Whether BatchNorm takes its statistics from the crops of all devices; without, from each one's own.
    sync_batchnorm: bool = False

    @property
    def processes(self) -> int:
        """Return how many processes share each step."""
        return self.devices * self.num_nodes


@dataclass
class MemberConfig:
    """A kind of network in the ensemble: how it differs from the recipe, and how it is used."""

    settings: dict[str, Any] = field(default_factory=dict)  # e.g. {augment: {flip: true}}, {train: {seed: 1}}
    weight: float = 1.0  # of all its networks together, in the mean of probabilities
    views: int = 1  # of test-time augmentation, the first of solution.VIEWS; more than 1 needs flip and rot90
    ship: str = "folds"  # "folds": its folds are packed; "all": one network trained on all tiles is


@dataclass
class KindConfig:
    """The network that tells debris-covered from clean ice; see `train.kind`."""

    hidden: int = 32  # its hidden units
    epochs: float = 3.0  # over the glacier pixels whose kind is known
    batch_size: int = 4096  # pixels
    lr: float = 3e-3  # highest learning rate of one cycle, AdamW
    weight_decay: float = 1e-2  # of AdamW
    dropout: float = 0.5  # share of the hidden units that is dropped in training
    seed: int = 0  # of first weights, pixels and dropout


@dataclass
class PostprocessConfig:
    """What follows the networks; `python -m train ensemble` measures what each step would bring."""

    extent_bias: float = 0.0  # added to the logit of glacier of either kind
    debris_bias: float = 0.0  # added to the logit of debris given glacier
    crf: Optional[dict[str, float]] = None  # settings of solution.Crf, null: no CRF
    min_speck: int = 0  # px, smaller patches of a glacier class go to what surrounds them
    min_hole: int = 0  # px, smaller gaps in them are filled


@dataclass
class PackConfig:
    """Limits of `model.pth`."""

    time_budget: Optional[float] = 45.0  # seconds that solution.py may take where nobody says; null: any
    max_mb: float = 300.0  # the organisers' limit; what is committed stays below 60


@dataclass
class Config:
    """Everything that a run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    members: dict[str, MemberConfig] = field(default_factory=dict)  # by name; none: one named "unet"
    kind: KindConfig = field(default_factory=KindConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    pack: PackConfig = field(default_factory=PackConfig)


# What one network's training depends on: the rest of a recipe is about the ensemble.
NETWORK_GROUPS = ("data", "augment", "model", "loss", "optim", "train", "trainer", "distil")
# Settings that change how fast a run is but not what it is meant to compute: a resumed run may change them.
# Not among them: the number of devices, which changes the crops that BatchNorm and Dice see together, and the
# precision.
RESOURCE_KEYS = ("data.store", "data.workers", "train.threads", "trainer.accelerator")


def load_config(path: Union[str, Path, None] = None, overrides: Sequence[str] = ()) -> Config:
    """Return the defaults, changed by a YAML file, changed by overrides such as "optim.lr=3e-4".

    A file with `base: other.yaml` holds only what differs from that file beside it.

    Raises ConfigError for a missing or damaged file, an unknown key, a value of the wrong type or out of
    range.
    """
    tree = OmegaConf.structured(Config)
    for file in [] if path is None else _with_bases(Path(path)):
        changes = _read_yaml(file)
        changes.pop("base", None)
        if changes.get("members") is not None:
            tree.members = {}  # a file's members replace those of its base
        tree = _merge(tree, changes, str(file))
    for override in overrides:
        changes = parse_override(override)
        for name in changes.get("members") or ():
            _require(name in tree.members, "members", name, f"one of {', '.join(tree.members)}")
        tree = _merge(tree, changes, f"command line ({override})")
    return _finish(tree, str(path))


def _with_bases(path: Path) -> list[Path]:
    """Return a recipe's file and those that it is based on, the most basic first."""
    files = [path]
    while base := _read_yaml(files[0]).get("base"):
        files.insert(0, files[0].parent / str(base))
        if len(files) > 5:
            raise ConfigError(f"{path}: base leads in a circle or through more than 5 files; expected a recipe")
    return files


def members_of(config: Config) -> dict[str, tuple[MemberConfig, Config]]:
    """Return, by name, each member of a recipe and the config that its networks are trained with.

    Raises ConfigError where a member's settings cannot be used.
    """
    groups = {name: value for name, value in to_dict(config).items() if name in NETWORK_GROUPS}
    plain = from_dict(groups, "recipe")
    members: dict[str, tuple[MemberConfig, Config]] = {}
    for name, member in (config.members or {"unet": MemberConfig()}).items():
        _require(name != "kind", "members", name, "another name: that folder of a run is the kind's")
        settings = change_config(plain, member.settings, f"members.{name}.settings")
        many = member.views == 1 or settings.augment.every_direction
        _require(many, f"members.{name}.views", member.views, "1 without flip and rot90")
        members[name] = member, settings
    return members


def save_config(config: Config, path: Union[str, Path]) -> None:
    """Write every setting as YAML, so that `load_config(path)` returns an equal config."""
    Path(path).write_text(to_text(config), encoding="utf-8")


def to_text(config: Config) -> str:
    """Return every setting as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: object) -> dict:
    """Return a `Config`, or another dataclass of settings, as plain dicts, lists, numbers and strings."""
    settings = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(settings, dict)
    return settings


def from_dict(settings: dict, source: str) -> Config:
    """Return the config that `to_dict` stored; raises ConfigError, in which `source` is named."""
    return _finish(_merge(OmegaConf.structured(Config), OmegaConf.create(settings), source), source)


def change_config(config: Config, settings: Union[dict, DictConfig], source: str) -> Config:
    """Return a config changed by nested settings such as {"optim": {"lr": 3e-4}}, as by a YAML file.

    Raises ConfigError, in which `source` is named.
    """
    return _finish(_merge(OmegaConf.structured(config), OmegaConf.create(settings), source), source)


def describe_differences(config: Config, other: Config) -> str:
    """Return the settings of `config` that `other` has not, such as "loss.dice=0.35, loss.gamma=4.0"."""
    flat = flatten(to_dict(config))
    keys = differing_keys(config, other)
    return ", ".join(f"{key}={flat[key]}" if key in flat else f"no {key}" for key in keys)


def differing_keys(config: Config, other: Config) -> list[str]:
    """Return the dotted keys in which two configs differ, apart from those in RESOURCE_KEYS."""
    flat, flat_other = flatten(to_dict(config)), flatten(to_dict(other))
    keys = [key for key in {**flat, **flat_other} if key not in RESOURCE_KEYS]
    return [key for key in keys if flat.get(key) != flat_other.get(key)]


# --- What values make sense -------------------------------------------------------------------------------

ANY = math.inf
# Keys of numbers: the least value, the largest, and whether these two are allowed themselves.
RANGES: dict[str, tuple[float, float, str]] = {
    "data.batch_size": (2, ANY, "[]"),  # BatchNorm needs a batch
    "data.steps_per_epoch": (1, ANY, "[]"),
    "data.glacier_share": (0, 1, "[]"),
    "data.mix": (0, 1, "[]"),
    "data.workers": (0, ANY, "[]"),
    "augment.affine_share": (0, 1, "[]"),
    "augment.rotate": (0, 180, "[]"),
    "augment.gain": (0, 1, "[)"),
    "augment.offset": (0, ANY, "[]"),
    "augment.illumination": (0, 1, "[)"),
    "augment.saturate": (0, 1.6, "[]"),
    "model.batchnorm_momentum": (0, 1, "(]"),
    "model.freeze_epochs": (0, ANY, "[]"),
    **{f"loss.{term}": (0, ANY, "[)") for term in ("focal", "gamma", "dice", "tversky", "lovasz", "auxiliary")},
    "loss.tversky_alpha": (0, ANY, "()"),
    "loss.tversky_beta": (0, ANY, "()"),
    "optim.lr": (0, ANY, "()"),
    "optim.encoder_lr_factor": (0, ANY, "[)"),
    "optim.weight_decay": (0, ANY, "[]"),
    "optim.grad_clip": (0, ANY, "[]"),
    "optim.warmup_steps": (0, ANY, "[]"),
    "optim.plateau_factor": (0, 1, "()"),
    "optim.plateau_patience": (0, ANY, "[]"),
    "optim.ema_decay": (0, 1, "[)"),
    "train.epochs": (1, ANY, "[]"),
    "train.early_stop": (0, ANY, "[]"),
    "train.seed": (0, 2**31, "[)"),
    "train.threads": (0, ANY, "[]"),
    "trainer.devices": (1, ANY, "[]"),
    "trainer.num_nodes": (1, ANY, "[]"),
    "distil.share": (0, 1, "[]"),
    "kind.hidden": (1, ANY, "[]"),
    "kind.epochs": (0, ANY, "()"),
    "kind.batch_size": (2, ANY, "[]"),
    "kind.lr": (0, ANY, "()"),
    "kind.weight_decay": (0, ANY, "[]"),
    "kind.dropout": (0, 1, "[)"),
    "kind.seed": (0, 2**31, "[)"),
    "postprocess.min_speck": (0, ANY, "[]"),
    "postprocess.min_hole": (0, ANY, "[]"),
    "pack.time_budget": (0, ANY, "()"),
    "pack.max_mb": (0, ANY, "()"),
}
CHOICES = {
    "optim.schedule": ("cosine", "constant", "plateau"),
    "train.keep": ("best", "last"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "trainer.precision": ("auto", "32", "bf16", "16"),
}
LOSS_TERMS = ("focal", "dice", "tversky", "lovasz")


def check_config(config: Config) -> None:
    """Raise ConfigError naming the first setting whose value makes no sense."""
    flat = flatten(to_dict(config))
    for key, (least, most, ends) in RANGES.items():
        value = flat[key]
        inside = value is None or (
            (least <= value if ends[0] == "[" else least < value)
            and (value <= most if ends[1] == "]" else value < most)
        )
        _require(inside, key, value, _spell_range(least, most, ends))
    for key, allowed in CHOICES.items():
        _require(flat[key] in allowed, key, flat[key], " or ".join(allowed))
    data, model, trainer = config.data, config.model, config.trainer
    scale = config.augment.scale
    _require(data.crop > 0 and data.crop % STRIDE == 0, "data.crop", data.crop, f"a positive multiple of {STRIDE}")
    _require(len(scale) == 2 and 0 < scale[0] <= scale[1], "augment.scale", scale, "two numbers 0 < least <= most")
    _require(
        any(getattr(config.loss, term) for term in LOSS_TERMS),
        "loss.focal",
        0,
        f"one of {LOSS_TERMS} above 0",
    )
    lone = not (model.pretrained and model.imagenet)
    _require(lone, "model.pretrained", model.pretrained, "null where model.imagenet gives the first weights")
    least = 1 if trainer.sync_batchnorm else 2
    shared = data.batch_size % trainer.processes == 0 and data.batch_size // trainer.processes >= least
    wanted = f"a multiple of trainer.devices x trainer.num_nodes = {trainer.processes}, {least} or more for each"
    _require(trainer.processes == 1 or shared, "data.batch_size", data.batch_size, wanted)
    for name, member in config.members.items():
        views = member.views
        _require(1 <= views <= len(VIEWS), f"members.{name}.views", views, f"1 to {len(VIEWS)}")
        _require(member.ship in ("folds", "all"), f"members.{name}.ship", member.ship, "folds or all")
        _require(member.weight > 0, f"members.{name}.weight", member.weight, "more than 0")
    check_network(model)


def check_network(model: ModelConfig) -> None:
    """Raise ConfigError for a network or an argument that does not exist: smp swallows unknown ones."""
    network = network_class(model.name)
    if network is None:
        raise ConfigError(f"model.name is {model.name!r}, expected Unet or a module of train/networks/")
    known = list(inspect.signature(network).parameters)
    for name in model.args:
        if name not in known or name in ("in_channels", "classes", "encoder_weights", "kwargs", "aux_params"):
            allowed = ", ".join(key for key in known if key not in ("in_channels", "classes", "encoder_weights"))
            raise ConfigError(f"model.args.{name} is no argument of {model.name}; expected some of {allowed}")
    encoder = model.args.get("encoder_name")
    if encoder is not None and not str(encoder).startswith("tu-") and encoder not in smp.encoders.get_encoder_names():
        raise ConfigError(
            f"model.args.encoder_name is {encoder!r}, expected an encoder of segmentation_models_pytorch "
            "(resnet34, timm-tf_efficientnet_lite0 ...) or tu-<name of timm>"
        )


def _require(sensible: bool, key: str, value: Any, expected: str) -> None:
    if not sensible:
        raise ConfigError(f"{key} is {value!r}, expected {expected}")


def _spell_range(least: float, most: float, ends: str) -> str:
    low = f"{least:g} or more" if ends[0] == "[" else f"more than {least:g}"
    if math.isinf(most):
        return low
    return f"{low}, {f'{most:g} at most' if ends[1] == ']' else f'under {most:g}'}"


# --- OmegaConf ----------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        known = ", ".join(sorted(str(file) for file in path.parent.glob("*.yaml"))) or "no YAML file"
        raise ConfigError(f"recipe {path} does not exist; {path.parent} holds {known}")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # PyYAML raises several unrelated kinds for damaged files
        raise ConfigError(f"recipe {path} is no valid YAML: {error}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"recipe {path} holds no mapping of settings; see train/recipe.yaml for an example")
    return tree


def parse_override(override: str) -> DictConfig:
    """Return the nested setting that text such as "optim.lr=3e-4" states; ConfigError for other text.

    Paths keep what YAML would take for a comment: "data.store=runs #2" names the folder "runs #2".
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"'{override}' is no override; expected key=value such as optim.lr=3e-4")
    tree = OmegaConf.create()
    try:
        found = value if " #" in value else OmegaConf.from_dotlist([f"value={value}"]).value
    except yaml.YAMLError as error:
        raise ConfigError(f"'{override}' is no YAML; quote key=value where it has spaces") from error
    OmegaConf.update(tree, key, found)
    return tree


def _merge(tree: DictConfig, changes: DictConfig, source: str) -> DictConfig:
    """Merge with OmegaConf, whose errors become one line that says where, what and what is allowed.

    A network's arguments mean nothing to another: changes that give both its name and its arguments replace
    all arguments, where others only add to them.
    """
    for name in changes:
        group = str(name)
        if OmegaConf.is_dict(tree.get(group)) and not OmegaConf.is_dict(changes[name]):
            allowed = ", ".join(f"{group}.{key}" for key in tree[group])
            raise ConfigError(f"{source}: '{group}' is a group of settings and takes no value; set {allowed}")
    try:
        tree = tree.copy()
        if {"name", "args"} <= set(changes.get("model") or ()):
            tree.model.args = {}
        merged = OmegaConf.merge(tree, changes)
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise ConfigError(f"{source}: {_explain_unknown(tree, error.full_key)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_reason(error)}") from error
    assert isinstance(merged, DictConfig)  # as the tree is
    return merged


def _finish(tree: DictConfig, source: str) -> Config:
    """Return the dataclasses of a merged tree, checked."""
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # a missing value or a broken interpolation
        raise ConfigError(f"{source}: {_reason(error)}") from error
    assert isinstance(config, Config)  # the tree's schema
    check_config(config)
    return config


def _reason(error: OmegaConfBaseException) -> str:
    return f"{error.full_key or 'settings'}: {str(error.msg or error).splitlines()[0]}"


def _explain_unknown(tree: DictConfig, full_key: Optional[str]) -> str:
    group = str(full_key).rpartition(".")[0]
    node = OmegaConf.select(tree, group) if group else tree
    allowed = ", ".join(str(key) for key in node) if isinstance(node, DictConfig) else "nothing below it"
    last = str(full_key).rpartition(".")[2]
    flat = flatten(to_dict(Config()))
    meant = [key for key in flat if key != full_key and key.rpartition(".")[2] == last]
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    return f"unknown key '{full_key}'; {hint}'{group or 'the top level'}' allows {allowed}"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat
