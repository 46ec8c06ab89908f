"""The typed configuration of a training run: dataclasses, YAML file and `key=value` overrides."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Sequence, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from solution import CLASS_NAMES, STRIDE


class ConfigError(Exception):
    """A configuration cannot be used; the message names source, key, what was found and what is allowed."""


@dataclass
class DataConfig:
    """Where the tiles come from and how crops are drawn from them."""

    store: str = "data/competition"  # tile store made by `python -m prep competition`
    scheme: str = "stratified"  # fold scheme of the store's folds.json: "stratified" or "spatial"
    crop: int = 224  # side of a training crop in pixels, a multiple of 32
    batch_size: int = 8  # crops a step
    steps_per_epoch: int = 40
    # Shares of the classes (other, glacier, debris, lake) among the pixels that crops are drawn around;
    # renormalised over the classes that occur in the training tiles.
    class_shares: list[float] = field(default_factory=lambda: [0.10, 0.35, 0.40, 0.15])
    # What a phase-1 label's glacier of either kind counts as in training. "set": the loss leaves the kind
    # open. "clean": clean ice, right for five sixths of it (published shares: 25.4 % clean, 4.9 % debris).
    unsplit_glacier: str = "set"
    workers: int = 0  # processes that prepare crops; 0: in the training process


@dataclass
class AugmentConfig:
    """Random changes of a training crop; see `train.data` for how each is applied."""

    flip: bool = True  # left-right and up-down, each in half of the crops
    rot90: bool = True  # a multiple of 90 degrees
    affine_share: float = 0.5  # share of crops that are rotated and scaled by the two settings below
    rotate: float = 15.0  # largest rotation to either side, degrees
    scale: list[float] = field(default_factory=lambda: [0.8, 1.25])  # range of magnification, log-uniform
    # Each band is multiplied by a factor from [1 - gain, 1 + gain]: reflectance as it is, temperature as its
    # deviation from the training mean (10 % of 256 K would be no jitter but another climate).
    gain: float = 0.1
    offset: float = 0.1  # each band is shifted by up to this many of its standard deviations, to either side
    # One factor from [1 - illumination, 1 + illumination] for all reflective bands: sun height and haze.
    illumination: float = 0.15


@dataclass
class ModelConfig:
    """The network, as `solution.build_network` takes it."""

    name: str = "Unet"
    args: dict[str, Any] = field(default_factory=lambda: {"encoder_name": "efficientnet-b0"})
    # Momentum of BatchNorm's running statistics. The EfficientNet encoders come with 0.01, which needs more
    # steps than a short run has before its statistics mean anything. null: as the network defines it.
    batchnorm_momentum: Optional[float] = 0.1
    init: Optional[str] = None  # folder of a run whose fold of the same number gives the first weights


@dataclass
class LossConfig:
    """Focal and Dice loss on set-valued labels; see `train.losses`."""

    focal: float = 1.0  # weight of the focal term
    dice: float = 1.0  # weight of the Dice term
    gamma: float = 2.0  # focusing exponent; 0 gives cross-entropy
    class_weights: Optional[list[float]] = None  # of the four classes in the focal term; null: equal


@dataclass
class OptimConfig:
    """AdamW, its learning rate over time, and the averaging of weights."""

    lr: float = 1e-3
    weight_decay: float = 1e-2
    grad_clip: float = 1.0  # largest norm of the gradient; 0: unlimited
    warmup_steps: int = 40  # the learning rate rises linearly over these steps
    plateau_factor: float = 0.5  # the learning rate is multiplied by it ...
    plateau_patience: int = 3  # ... after more than this many epochs without a better val_mcc
    ema_decay: float = 0.99  # of the moving average of the weights, reached by a ramp; 0: no averaging


@dataclass
class TrainConfig:
    """Length, seed and resources of a run."""

    epochs: int = 20
    early_stop: int = 8  # stop after this many epochs without a better val_mcc; 0: never
    seed: int = 0
    threads: int = 0  # CPU threads of PyTorch; 0: all cores that the process may use


@dataclass
class Config:
    """Everything that a training run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


# Settings that change how fast a run is but not what it is meant to compute: a resumed run may change them.
RESOURCE_KEYS = ("data.store", "data.workers", "train.threads")


def load_config(path: Union[str, Path, None] = None, overrides: Sequence[str] = ()) -> Config:
    """Return the defaults, changed by a YAML file, changed by overrides such as "optim.lr=3e-4".

    Raises ConfigError for a missing or damaged file, an unknown key, a value of the wrong type or out of
    range.
    """
    tree = OmegaConf.structured(Config)
    if path is not None:
        tree = _merge(tree, _read_yaml(Path(path)), str(path))
    for override in overrides:
        tree = _merge(tree, _parse_override(override), f"command line ({override})")
    return _finish(tree, str(path))


def save_config(config: Config, path: Union[str, Path]) -> None:
    """Write every setting as YAML, so that `load_config(path)` returns an equal config."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def to_dict(config: Config) -> dict:
    """Return the config as plain nested dicts, lists, numbers and strings."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def from_dict(settings: dict, source: str) -> Config:
    """Return the config that `to_dict` stored; raises ConfigError, in which `source` is named."""
    return _finish(_merge(OmegaConf.structured(Config), OmegaConf.create(settings), source), source)


def differing_keys(config: Config, other: Config) -> list[str]:
    """Return the dotted keys in which two configs differ, apart from those in RESOURCE_KEYS."""
    flat, flat_other = _flatten(to_dict(config)), _flatten(to_dict(other))
    keys = [key for key in {**flat, **flat_other} if key not in RESOURCE_KEYS]
    return [key for key in keys if flat.get(key) != flat_other.get(key)]


def check_config(config: Config) -> None:
    """Raise ConfigError naming the first setting whose value makes no sense."""
    for key, value, sensible, expected in _rules(config):
        if not sensible:
            raise ConfigError(f"{key} is {value!r}, expected {expected}")


def _rules(config: Config) -> list[tuple[str, Any, bool, str]]:
    """List (key, value, is it sensible, what was expected)."""
    data, augment, loss, optim, train = config.data, config.augment, config.loss, config.optim, config.train
    classes = len(CLASS_NAMES)
    shares, scale, weights = data.class_shares, augment.scale, loss.class_weights
    momentum = config.model.batchnorm_momentum
    return [
        ("data.crop", data.crop, _is_crop(data.crop), f"a positive multiple of {STRIDE}"),
        ("data.batch_size", data.batch_size, data.batch_size >= 2, "2 or more (BatchNorm needs a batch)"),
        ("data.steps_per_epoch", data.steps_per_epoch, data.steps_per_epoch >= 1, "1 or more"),
        ("data.class_shares", shares, _is_weights(shares), f"{classes} numbers >= 0, not all 0"),
        ("data.workers", data.workers, data.workers >= 0, "0 or more"),
        ("augment.affine_share", augment.affine_share, 0 <= augment.affine_share <= 1, "0 to 1"),
        ("augment.rotate", augment.rotate, 0 <= augment.rotate <= 180, "0 to 180 degrees"),
        ("augment.scale", scale, _is_range(scale), "two numbers 0 < smallest <= largest"),
        ("augment.gain", augment.gain, 0 <= augment.gain < 1, "0 or more, under 1"),
        ("augment.offset", augment.offset, augment.offset >= 0, "0 or more"),
        ("augment.illumination", augment.illumination, 0 <= augment.illumination < 1, "0 or more, under 1"),
        ("model.batchnorm_momentum", momentum, momentum is None or 0 < momentum <= 1, "null or 0 to 1"),
        ("loss.focal", loss.focal, loss.focal >= 0, "0 or more"),
        ("loss.dice", loss.dice, loss.dice >= 0, "0 or more"),
        ("loss.focal", loss.focal, loss.focal + loss.dice > 0, "more than 0, or loss.dice more than 0"),
        ("loss.gamma", loss.gamma, loss.gamma >= 0, "0 or more"),
        (
            "loss.class_weights",
            weights,
            weights is None or _is_weights(weights),
            f"null or {classes} numbers",
        ),
        ("optim.lr", optim.lr, optim.lr > 0, "more than 0"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "0 or more"),
        ("optim.grad_clip", optim.grad_clip, optim.grad_clip >= 0, "0 or more"),
        ("optim.warmup_steps", optim.warmup_steps, optim.warmup_steps >= 0, "0 or more"),
        (
            "data.unsplit_glacier",
            data.unsplit_glacier,
            data.unsplit_glacier in ("set", "clean"),
            "set or clean",
        ),
        ("optim.plateau_factor", optim.plateau_factor, 0 < optim.plateau_factor < 1, "between 0 and 1"),
        ("optim.plateau_patience", optim.plateau_patience, optim.plateau_patience >= 0, "0 or more"),
        ("optim.ema_decay", optim.ema_decay, 0 <= optim.ema_decay < 1, "0 or more, under 1"),
        ("train.epochs", train.epochs, train.epochs >= 1, "1 or more"),
        ("train.early_stop", train.early_stop, train.early_stop >= 0, "0 or more"),
        ("train.seed", train.seed, 0 <= train.seed < 2**31, "0 to 2147483647"),
        ("train.threads", train.threads, train.threads >= 0, "0 or more"),
    ]


def _is_crop(side: int) -> bool:
    return side > 0 and side % STRIDE == 0


def _is_weights(values: list[float]) -> bool:
    return len(values) == len(CLASS_NAMES) and min(values) >= 0 and sum(values) > 0


def _is_range(values: list[float]) -> bool:
    return len(values) == 2 and 0 < values[0] <= values[1]


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        known = ", ".join(sorted(str(file) for file in path.parent.glob("*.yaml"))) or "no YAML file"
        raise ConfigError(f"config {path} does not exist; {path.parent} holds {known}")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # PyYAML raises several unrelated kinds for damaged files
        raise ConfigError(f"config {path} is no valid YAML: {error}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"config {path} holds no mapping of settings; see train/configs/ for examples")
    return tree


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"'{override}' is no override; expected key=value such as optim.lr=3e-4")
    return OmegaConf.from_dotlist([override])


def _merge(tree: DictConfig, changes: DictConfig, source: str) -> DictConfig:
    """Merge with OmegaConf, whose errors become one line that says where, what and what is allowed."""
    for group in changes:
        if OmegaConf.is_dict(tree.get(str(group))) and not OmegaConf.is_dict(changes[group]):
            allowed = ", ".join(f"{group}.{key}" for key in tree[group])
            raise ConfigError(f"{source}: '{group}' is a group of settings and takes no value; set {allowed}")
    try:
        return OmegaConf.merge(tree, changes)
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise ConfigError(f"{source}: {_explain_unknown(tree, error.full_key)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_reason(error)}") from error


def _finish(tree: DictConfig, source: str) -> Config:
    """Return the dataclasses of a merged tree, checked."""
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # a missing value or a broken interpolation
        raise ConfigError(f"{source}: {_reason(error)}") from error
    check_config(config)
    return config


def _reason(error: OmegaConfBaseException) -> str:
    return f"{error.full_key or 'settings'}: {str(error.msg or error).splitlines()[0]}"


def _explain_unknown(tree: DictConfig, full_key: str) -> str:
    group = str(full_key).rpartition(".")[0]
    node = OmegaConf.select(tree, group) if group else tree
    allowed = ", ".join(str(key) for key in node) if isinstance(node, DictConfig) else "nothing below it"
    return f"unknown key '{full_key}'; '{group or 'the top level'}' allows {allowed}"


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat.update(_flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat
