"""The 9th place's network in phase 2: a U-Net of residual blocks with squeeze-and-excitation.

Python 3.9, and only what the grader has: `make submission` puts this file into the solution.py of such a model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SqueezeExcitation(nn.Module):
    """Scales each channel by a factor 0 to 1 that all channels' means decide (arXiv 1709.01507)."""

    def __init__(self, channels: int, reduction: int) -> None:
        """Squeeze `channels` to one `reduction`-th, but not below 4."""
        super().__init__()
        squeezed = max(4, channels // reduction)
        self.gate = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) scaled."""
        return x * self.gate(x.mean(dim=(2, 3)))[:, :, None, None]


class SEResidual(nn.Module):
    """Two 3x3 convolutions with BatchNorm, squeeze-and-excitation, and a shortcut around them.

    He et al. 2016, arXiv 1512.03385. No convolution's output is read by anything but its BatchNorm, so that
    merging the two is exact.
    """

    def __init__(self, in_channels: int, channels: int, reduction: int) -> None:
        """Map `in_channels` to `channels`."""
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(in_channels, channels, 3),
            nn.ReLU(),
            *_convolution(channels, channels, 3),
            SqueezeExcitation(channels, reduction),
        )
        self.shortcut = nn.Sequential(*_convolution(in_channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, H, W) of (B, in_channels, H, W)."""
        return torch.relu(self.body(x) + self.shortcut(x))


class SEResUNet(nn.Module):
    """A U-Net of residual blocks with squeeze-and-excitation.

    With 4 classes it has 8,171,332 parameters and takes 51 GMAC for a tile of 512 x 512. U-Net:
    Ronneberger et al. 2015, arXiv 1505.04597; with residual blocks: Zhang et al. 2018, arXiv 1711.10684.
    """

    def __init__(
        self,
        in_channels: int = 5,
        classes: int = 1,
        encoder_weights: None = None,
        width: int = 32,
        levels: int = 4,
        reduction: int = 16,
        dropout: float = 0.0,
    ) -> None:
        """Build the network with random weights.

        Args:
            in_channels: bands.
            classes: logits a pixel.
            encoder_weights: None; `build_network` passes it to every network.
            width: channels at full resolution, doubled at each level below.
            levels: how often the resolution is halved, at most 5 since inputs are multiples of 32.
            reduction: of the channels in squeeze-and-excitation.
            dropout: share of the channels at the bottom that is dropped in training.
        """
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList(
            SEResidual(before, after, reduction) for before, after in zip([in_channels, *widths], widths)
        )
        self.dropout = nn.Dropout2d(dropout)
        pairs = list(zip(widths[1:], widths))[::-1]  # (channels below, channels here), bottom first
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(below, here, 2, stride=2) for below, here in pairs)
        self.up = nn.ModuleList(SEResidual(2 * here, here, reduction) for _, here in pairs)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes, H, W); H and W are multiples of 2^levels."""
        skips: list[Tensor] = []
        for block in self.down:
            x = block(nn.functional.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        x = self.dropout(skips.pop())
        for enlarge, block in zip(self.enlarge, self.up):
            x = block(torch.cat([skips.pop(), enlarge(x)], dim=1))
        return self.head(x)


def _convolution(in_channels: int, channels: int, size: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=False), nn.BatchNorm2d(channels)
