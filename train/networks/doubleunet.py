"""DoubleUnet: a U-Net on the image at twice its size, since the first convolution of its encoder halves what it sees.

Python 3.9, and only what the grader has: `make submission` puts this file into the solution.py of such a model.
"""

from __future__ import annotations

import segmentation_models_pytorch as smp
from torch import Tensor, nn

from solution import twice_as_large


class DoubleUnet(smp.Unet):
    """smp.Unet, with its arguments, between an enlargement and a mean: four times its work for a tile."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 1, H, W) of normalised bands (B, 5, H, W); H and W are multiples of 16."""
        return nn.functional.avg_pool2d(super().forward(twice_as_large(x)), 2)
