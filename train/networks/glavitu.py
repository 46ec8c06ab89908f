"""GlaViTU: a vision transformer for the large picture and a ResU-Net for the outlines.

Python 3.9, and only what the grader has: `make submission` puts it into the solution.py of such a model.
"""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import nn

from solution import pad_to_multiple


def run_coarsely(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the maps (B, C, H, W) that `network` makes of `x` at 1/`factor` of its resolution, enlarged."""
    coarse = nn.functional.avg_pool2d(x, factor)
    height, width = coarse.shape[2:]
    maps = network(pad_to_multiple(coarse))[:, :, :height, :width]
    return nn.functional.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)


def double_convolution(before: int, after: int, dropout: float) -> nn.Sequential:
    """Return two 3x3 convolutions to `after` channels, with whole channels dropped in training."""
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers.append(nn.Conv2d(channels, after, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.3)]
    return nn.Sequential(*layers, nn.Dropout2d(dropout))


class ResidualBlock(nn.Module):
    """Two convolutions, and a projection to as many channels around them."""

    def __init__(self, before: int, after: int, dropout: float) -> None:
        super().__init__()
        self.body = double_convolution(before, after, dropout)
        self.shortcut = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, after, H, W) of (B, before, H, W)."""
        return self.body(x) + self.shortcut(x)


class ResUNet(nn.Module):
    """A U-Net of residual blocks (Zhang et al. 2018, arXiv 1711.10684), from features to features."""

    def __init__(self, width: int, steps: int, dropout: float) -> None:
        super().__init__()
        widths = [width * 2**step for step in range(steps + 1)]  # the last at the bottom
        self.down = nn.ModuleList(ResidualBlock(*pair, dropout) for pair in zip([width] + widths, widths))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(2 * n, n, 2, stride=2) for n in widths[-2::-1])
        self.up = nn.ModuleList(ResidualBlock(2 * n, n, dropout) for n in widths[-2::-1])
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, width, H, W) of the same; H and W are multiples of 2^steps."""
        skips = [self.down[0](x)]
        for block in self.down[1:]:
            skips.append(block(nn.functional.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for enlarge, block in zip(self.enlarge, self.up):
            x = block(torch.cat([enlarge(x), skips.pop()], dim=1))
        return self.last(x)


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron of four times the width, each normalised first and added."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (B, N, width) of the same."""
        parts = self.queries_keys_values(self.norm(tokens)).unflatten(2, (3, self.heads, -1))
        attended = nn.functional.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        tokens = tokens + self.join(attended.transpose(1, 2).flatten(2))
        return tokens + self.perceptron(tokens)


class SETR(nn.Module):
    """A vision transformer on patches, enlarged again step by step (Zheng et al. 2021, arXiv 2012.15840)."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, grid: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Conv2d(width, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, grid, grid))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, dropout) for _ in range(depth)))
        layers: list[nn.Module] = []
        for _ in range(int(math.log2(patch))):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.LeakyReLU(0.3), nn.Upsample(scale_factor=2, mode="bilinear")]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width, width, 1))

    def positions_for(self, rows: int, cols: int) -> torch.Tensor:
        """Return the positional embedding for `rows` x `cols` patches, (1, width, rows, cols)."""
        return nn.functional.interpolate(self.positions, size=(rows, cols), mode="bilinear", align_corners=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, width, H, W) of the same; H and W are multiples of `patch`."""
        patches = self.embed(x)
        rows, cols = patches.shape[2:]
        tokens = (patches + self.positions_for(rows, cols)).flatten(2).transpose(1, 2)
        return self.decoder(self.blocks(tokens).transpose(1, 2).unflatten(2, (rows, cols)))


class GlaViTU(nn.Module):
    """Glacier-VisionTransformer-U-Net: a SETR for the large picture, then a ResU-Net for the outlines.

    Maslov et al. 2023 (IGARSS), arXiv 2401.15113, with transposed convolutions in place of enlarging and 2x2
    convolutions, which have as many weights and take a quarter of the work, and activations in the SETR's
    decoder, as SETR has.
    """

    def __init__(
        self,
        in_channels: int = 5,
        classes: int = 1,
        encoder_weights: None = None,
        width: int = 64,
        depth: int = 12,
        heads: int = 4,
        patch: int = 16,
        grid: int = 24,
        steps: int = 3,
        dropout: float = 0.1,
        factor: int = 1,
    ) -> None:
        """Build the network with random weights; the defaults are the published configuration.

        Args:
            in_channels: bands.
            classes: logits a pixel.
            encoder_weights: None; `build_network` passes it to every network.
            width: channels of fused input, tokens and the ResU-Net's first step, a multiple of `heads`.
            depth: transformer blocks.
            heads: of their attention.
            patch: side of a patch in pixels, a power of 2 up to 32.
            grid: patches in a row of the learned positional embedding, interpolated for any other number.
            steps: how often the ResU-Net halves the resolution, at most 5.
            dropout: share dropped in training.
            factor: it works at 1/`factor` of the resolution.
        """
        super().__init__()
        self.factor = factor
        self.fuse = double_convolution(in_channels, width, dropout)
        self.setr = SETR(width, depth, heads, patch, grid, dropout)
        self.auxiliary_head = nn.Conv2d(width, classes, 1)
        self.resunet = ResUNet(width, steps, dropout)
        self.head = nn.Conv2d(width, classes, 1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features (B, width, H, W) that the auxiliary head and the ResU-Net see."""
        fused = self.fuse(x)
        return fused + self.setr(fused)

    def decode(self, encoded: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes, H, W) of the features (B, width, H, W)."""
        return self.head(encoded + self.resunet(encoded))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes, H, W) of normalised bands (B, 5, H, W); H and W are multiples of STRIDE."""
        return run_coarsely(lambda coarse: self.decode(self.encode(coarse)), x, self.factor)

    def forward_with_auxiliary(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `forward` does and the auxiliary head's logits: deep supervision, in training only."""

        def both(coarse: torch.Tensor) -> torch.Tensor:
            encoded = self.encode(coarse)
            return torch.cat([self.decode(encoded), self.auxiliary_head(encoded)], dim=1)

        logits, auxiliary = run_coarsely(both, x, self.factor).chunk(2, dim=1)
        return logits, auxiliary
