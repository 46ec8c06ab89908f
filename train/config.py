"""The typed configuration of a training run: dataclasses, YAML file and `key=value` overrides."""

import math
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
    # What bands are normalised with, in training and evaluation. "statistics": mean and standard deviation of
    # the fold's training tiles, as `solution.py` does. "percentile": each tile's own 2nd percentile becomes 0
    # and its 98th 1; for comparisons, `solution.py` cannot ship it.
    scaling: str = "statistics"
    # Share of crops into which a rectangle of a crop of another tile is pasted, labels alike: CutMix (Yun et
    # al. 2019, arXiv 1905.04899).
    mix: float = 0.0
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
    # Share of the maps that the segmentation head reads which are dropped whole in training (Tompson et al.
    # 2015, arXiv 1411.4280); besides whatever dropout the network's own arguments ask for.
    dropout: float = 0.0
    imagenet: bool = False  # start the encoder from ImageNet; see `train.pretrained` for which encoders can
    init: Optional[str] = None  # folder of a run whose fold of the same number gives the first weights
    # Checkpoint of `make pretrain`: it gives the first weights, and the statistics that normalise the bands.
    pretrained: Optional[str] = None


@dataclass
class LossConfig:
    """A weighted sum of losses on set-valued labels; see `train.losses`."""

    focal: float = 1.0  # weight of the focal term
    dice: float = 1.0  # weight of the Dice term
    gamma: float = 2.0  # focusing exponent; 0 gives cross-entropy
    class_weights: Optional[list[float]] = None  # of the four classes in the focal term; null: equal
    mcc: float = 0.0  # weight of 1 - Matthews correlation of the batch
    # Weight of the cross-entropy that is weighted by exp(-d / boundary_sigma), d the distance in pixels to
    # the nearest border between classes, and interface_weight times as much for that of glacier and debris.
    boundary: float = 0.0
    boundary_sigma: float = 3.0  # pixels
    interface_weight: float = 5.0
    boundary_ramp_epochs: int = 0  # the weight of the boundary term rises linearly over the first so many
    tversky: float = 0.0  # weight of the Tversky term
    tversky_alpha: float = 0.3  # weight of false positives in it (Salehi et al. 2017, arXiv 1706.05721),
    tversky_beta: float = 0.7  # and of false negatives; both 0.5 is Dice
    lovasz: float = 0.0  # weight of the Lovasz-softmax term
    # The share of a pixel's target that moves to the other class right at a border between classes, 0.5 where
    # the true border is as likely on either side; further away it falls as if borders were drawn with a
    # Gaussian error of border_sigma. Focal, Dice, MCC and boundary term; 0: labels are taken as they are.
    border_smoothing: float = 0.0
    border_sigma: float = 1.5  # pixels
    auxiliary: float = 1.0  # weight of the loss on the auxiliary head of a network that has one (GlaViTU)


@dataclass
class OptimConfig:
    """AdamW, its learning rate over time, and the averaging of weights."""

    lr: float = 1e-3
    encoder_lr_factor: float = 1.0  # the encoder learns at this many times `lr`
    weight_decay: float = 1e-2
    grad_clip: float = 1.0  # largest norm of the gradient; 0: unlimited
    warmup_steps: int = 40  # the learning rate rises linearly over these steps
    # After the warm-up: "plateau" follows the two settings below, "cosine" falls to 0 at the run's last step,
    # "restarts" does so every `restart_epochs` and starts again from `lr`.
    schedule: str = "plateau"
    plateau_factor: float = 0.5  # the learning rate is multiplied by it ...
    plateau_patience: int = 3  # ... after more than this many epochs without a better val_mcc
    restart_epochs: int = 10
    ema_decay: float = 0.99  # of the moving average of the weights, reached by a ramp; 0: no averaging


@dataclass
class TrainConfig:
    """Length, seed and resources of a run."""

    epochs: int = 20
    early_stop: int = 8  # stop after this many epochs without a better val_mcc; 0: never
    # Whose weights the fold keeps: "best", the epoch with the best val_mcc, or "last". Choosing by the tiles
    # that are held out flatters their score; a schedule that ends at 0 has no need to choose.
    keep: str = "best"
    seed: int = 0
    threads: int = 0  # CPU threads of PyTorch; 0: all cores that the process may use


@dataclass
class DistilConfig:
    """What a student learns from its teachers; see `train.distil`."""

    # Folders of finished runs. The networks among them that never saw a fold's held-out tiles teach it.
    teachers: list[str] = field(default_factory=list)
    temperature: float = 2.0  # probabilities become p^(1/temperature), renormalised
    kl: float = 1.0  # weight of temperature^2 times the divergence of the student from its teachers
    supervised: float = 1.0  # weight of the loss on the labels, whose terms `loss` weighs
    # Shares of the crops: from labelled tiles, from unlabelled ones, from synthetic scenes.
    shares: list[float] = field(default_factory=lambda: [1.0, 0.0, 0.0])
    unlabelled: Optional[str] = None  # tile store, or folder with Band1 ... Band5, whose labels are not read
    synthetic: int = 0  # scenes
    synthetic_size: int = 512  # their side in pixels
    synthetic_seed: int = 0


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
class Config:
    """Everything that a training run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)


# Settings that change how fast a run is but not what it is meant to compute: a resumed run may change them.
# Not among them: the number of devices, which changes the crops that BatchNorm and Dice see together, and the
# precision.
RESOURCE_KEYS = ("data.store", "data.workers", "train.threads", "trainer.accelerator")

SCALINGS = ("statistics", "percentile")
# Settings that are gone, and the value with which older runs that name them mean what is done now.
RETIRED = {"data.label_shift": [0, 0]}
ACCELERATORS = ("auto", "cpu", "gpu")
PRECISIONS = ("auto", "32", "bf16", "16")
SCHEDULES = ("plateau", "cosine", "restarts")
LOSS_TERMS = ("focal", "dice", "mcc", "boundary", "tversky", "lovasz")  # settings that weigh a term


def load_config(path: Union[str, Path, None] = None, overrides: Sequence[str] = ()) -> Config:
    """Return the defaults, changed by a YAML file, changed by overrides such as "optim.lr=3e-4".

    Raises ConfigError for a missing or damaged file, an unknown key, a value of the wrong type or out of
    range.
    """
    tree = OmegaConf.structured(Config)
    if path is not None:
        tree = _merge(tree, _without_retired(_read_yaml(Path(path))), str(path))
    for override in overrides:
        tree = _merge(tree, parse_override(override), f"command line ({override})")
    return _finish(tree, str(path))


def save_config(config: Config, path: Union[str, Path]) -> None:
    """Write every setting as YAML, so that `load_config(path)` returns an equal config."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def to_dict(config: object) -> dict:
    """Return a `Config`, or another dataclass of settings, as plain dicts, lists, numbers and strings."""
    settings = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(settings, dict)
    return settings


def from_dict(settings: dict, source: str) -> Config:
    """Return the config that `to_dict` stored; raises ConfigError, in which `source` is named."""
    changes = _without_retired(OmegaConf.create(settings))
    return _finish(_merge(OmegaConf.structured(Config), changes, source), source)


def change_config(config: Config, settings: Union[dict, DictConfig], source: str) -> Config:
    """Return a config changed by nested settings such as {"optim": {"lr": 3e-4}}, as by a YAML file.

    Raises ConfigError, in which `source` is named.
    """
    return _finish(_merge(OmegaConf.structured(config), OmegaConf.create(settings), source), source)


def describe_differences(config: Config, other: Config) -> str:
    """Return the settings of `config` that `other` has not, such as "loss.mcc=0.35, loss.gamma=4.0"."""
    flat = _flatten(to_dict(config))
    keys = differing_keys(config, other)
    return ", ".join(f"{key}={flat[key]}" if key in flat else f"no {key}" for key in keys)


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


Rule = tuple[str, Any, bool, str]  # key, value, is it sensible, what was expected


def _rules(config: Config) -> list[Rule]:
    return [
        *_data_rules(config.data),
        *_augment_rules(config.augment),
        *_model_rules(config.model),
        *_loss_rules(config.loss),
        *_optim_rules(config.optim),
        *_train_rules(config.train),
        *_trainer_rules(config.trainer, config.data.batch_size),
        *_distil_rules(config.distil),
    ]


def _data_rules(data: DataConfig) -> list[Rule]:
    shares, unsplit = data.class_shares, data.unsplit_glacier
    return [
        ("data.crop", data.crop, _is_crop(data.crop), f"a positive multiple of {STRIDE}"),
        ("data.batch_size", data.batch_size, data.batch_size >= 2, "2 or more (BatchNorm needs a batch)"),
        ("data.steps_per_epoch", data.steps_per_epoch, data.steps_per_epoch >= 1, "1 or more"),
        ("data.class_shares", shares, _is_weights(shares), f"{len(CLASS_NAMES)} numbers >= 0, not all 0"),
        ("data.scaling", data.scaling, data.scaling in SCALINGS, " or ".join(SCALINGS)),
        ("data.unsplit_glacier", unsplit, unsplit in ("set", "clean"), "set or clean"),
        ("data.mix", data.mix, 0 <= data.mix <= 1, "0 to 1"),
        ("data.workers", data.workers, data.workers >= 0, "0 or more"),
    ]


def _augment_rules(augment: AugmentConfig) -> list[Rule]:
    scale = augment.scale
    return [
        ("augment.affine_share", augment.affine_share, 0 <= augment.affine_share <= 1, "0 to 1"),
        ("augment.rotate", augment.rotate, 0 <= augment.rotate <= 180, "0 to 180 degrees"),
        ("augment.scale", scale, _is_range(scale), "two numbers 0 < smallest <= largest"),
        ("augment.gain", augment.gain, 0 <= augment.gain < 1, "0 or more, under 1"),
        ("augment.offset", augment.offset, augment.offset >= 0, "0 or more"),
        ("augment.illumination", augment.illumination, 0 <= augment.illumination < 1, "0 or more, under 1"),
    ]


def _model_rules(model: ModelConfig) -> list[Rule]:
    momentum, alone = model.batchnorm_momentum, not (model.pretrained and (model.init or model.imagenet))
    other = "null where model.init or model.imagenet gives the first weights"
    return [
        ("model.batchnorm_momentum", momentum, momentum is None or 0 < momentum <= 1, "null or 0 to 1"),
        ("model.dropout", model.dropout, 0 <= model.dropout < 1, "0 or more, under 1"),
        ("model.pretrained", model.pretrained, alone, other),
    ]


def _loss_rules(loss: LossConfig) -> list[Rule]:
    terms = {name: getattr(loss, name) for name in LOSS_TERMS}
    weights, ramp = loss.class_weights, loss.boundary_ramp_epochs
    each_class = weights is None or _is_weights(weights)
    return [
        *((f"loss.{term}", weight, 0 <= weight < math.inf, "0 or more") for term, weight in terms.items()),
        ("loss.focal", loss.focal, sum(terms.values()) > 0, f"more than 0, or one of {', '.join(terms)}"),
        ("loss.gamma", loss.gamma, loss.gamma >= 0, "0 or more"),
        ("loss.auxiliary", loss.auxiliary, 0 <= loss.auxiliary < math.inf, "0 or more"),
        ("loss.class_weights", weights, each_class, f"null or {len(CLASS_NAMES)} numbers"),
        ("loss.boundary_sigma", loss.boundary_sigma, 0 < loss.boundary_sigma <= 32, "0 to 32 pixels"),
        ("loss.interface_weight", loss.interface_weight, loss.interface_weight >= 1, "1 or more"),
        ("loss.boundary_ramp_epochs", ramp, ramp >= 0, "0 or more"),
        ("loss.tversky_alpha", loss.tversky_alpha, loss.tversky_alpha > 0, "more than 0"),
        ("loss.tversky_beta", loss.tversky_beta, loss.tversky_beta > 0, "more than 0"),
        ("loss.border_smoothing", loss.border_smoothing, 0 <= loss.border_smoothing <= 0.5, "0 to 0.5"),
        ("loss.border_sigma", loss.border_sigma, 0 < loss.border_sigma <= 16, "0 to 16 pixels"),
    ]


def _optim_rules(optim: OptimConfig) -> list[Rule]:
    factor = optim.encoder_lr_factor
    return [
        ("optim.lr", optim.lr, optim.lr > 0, "more than 0"),
        ("optim.encoder_lr_factor", factor, 0 <= factor < math.inf, "0 or more"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "0 or more"),
        ("optim.grad_clip", optim.grad_clip, optim.grad_clip >= 0, "0 or more"),
        ("optim.warmup_steps", optim.warmup_steps, optim.warmup_steps >= 0, "0 or more"),
        ("optim.schedule", optim.schedule, optim.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("optim.plateau_factor", optim.plateau_factor, 0 < optim.plateau_factor < 1, "between 0 and 1"),
        ("optim.plateau_patience", optim.plateau_patience, optim.plateau_patience >= 0, "0 or more"),
        ("optim.restart_epochs", optim.restart_epochs, optim.restart_epochs >= 1, "1 or more"),
        ("optim.ema_decay", optim.ema_decay, 0 <= optim.ema_decay < 1, "0 or more, under 1"),
    ]


def _train_rules(train: TrainConfig) -> list[Rule]:
    return [
        ("train.epochs", train.epochs, train.epochs >= 1, "1 or more"),
        ("train.early_stop", train.early_stop, train.early_stop >= 0, "0 or more"),
        ("train.keep", train.keep, train.keep in ("best", "last"), "best or last"),
        ("train.seed", train.seed, 0 <= train.seed < 2**31, "0 to 2147483647"),
        ("train.threads", train.threads, train.threads >= 0, "0 or more"),
    ]


def _trainer_rules(trainer: TrainerConfig, batch_size: int) -> list[Rule]:
    numbers = {"devices": trainer.devices, "num_nodes": trainer.num_nodes}
    rules = [(f"trainer.{key}", number, number >= 1, "1 or more") for key, number in numbers.items()]
    processes = max(1, trainer.processes)
    smallest = 1 if trainer.sync_batchnorm else 2
    shared = batch_size % processes == 0 and batch_size // processes >= smallest
    names = {"accelerator": ACCELERATORS, "precision": PRECISIONS}
    rules += [
        (f"trainer.{key}", getattr(trainer, key), getattr(trainer, key) in allowed, " or ".join(allowed))
        for key, allowed in names.items()
    ]
    of_each = f"a multiple of trainer.devices x trainer.num_nodes = {processes}, {smallest} or more for each"
    return [*rules, ("data.batch_size", batch_size, processes == 1 or shared, of_each)]


def _distil_rules(distil: DistilConfig) -> list[Rule]:
    shares = distil.shares
    sources = len(shares) == 3 and shares[0] > 0 and min(shares) >= 0
    _, unlabelled, synthetic = shares if sources else (1.0, 0.0, 0.0)
    return [
        ("distil.temperature", distil.temperature, 0 < distil.temperature < math.inf, "more than 0"),
        ("distil.kl", distil.kl, 0 <= distil.kl < math.inf, "0 or more"),
        ("distil.supervised", distil.supervised, 0 <= distil.supervised < math.inf, "0 or more"),
        ("distil.kl", distil.kl, distil.kl + distil.supervised > 0, "more than 0, or distil.supervised"),
        ("distil.shares", shares, sources, "three numbers >= 0, the first more than 0"),
        (
            "distil.unlabelled",
            distil.unlabelled,
            bool(distil.unlabelled) or not unlabelled,
            "a folder of tiles, or a second share of 0 in distil.shares",
        ),
        (
            "distil.synthetic",
            distil.synthetic,
            distil.synthetic >= (1 if synthetic else 0),
            "0 or more, and 1 or more where the third of distil.shares is not 0",
        ),
        ("distil.synthetic_size", distil.synthetic_size, distil.synthetic_size >= 64, "64 or more pixels"),
        ("distil.synthetic_seed", distil.synthetic_seed, distil.synthetic_seed >= 0, "0 or more"),
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


def _without_retired(changes: DictConfig) -> DictConfig:
    """Return settings less those in RETIRED that have their harmless value; others stay, unknown."""
    for key, harmless in RETIRED.items():
        if OmegaConf.select(changes, key) == harmless:
            group, _, name = key.rpartition(".")
            del OmegaConf.select(changes, group)[name]
    return changes


def parse_override(override: str) -> DictConfig:
    """Return the nested setting that text such as "optim.lr=3e-4" states; ConfigError for other text."""
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"'{override}' is no override; expected key=value such as optim.lr=3e-4")
    return OmegaConf.from_dotlist([override])


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
        model = changes.get("model")
        if model is not None and {"name", "args"} <= set(model):
            tree = tree.copy()
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
    return f"unknown key '{full_key}'; '{group or 'the top level'}' allows {allowed}"


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat.update(_flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat
