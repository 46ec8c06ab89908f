"""Losses on the logit of the extent: focal, Dice, Tversky, Lovasz.

The extent is glacier of either kind against the rest. Every label code falls on one side of it, whether or not
its kind is known, so that all labels of all tiles count alike.
"""

from __future__ import annotations

import torch
from segmentation_models_pytorch.losses import BINARY_MODE, LovaszLoss, TverskyLoss
from torch import Tensor, nn

from train.config import LossConfig
from train.objective import GLACIER_CODES, REST_CODES

SMALLEST = 1e-7  # keeps quotients differentiable
UNKNOWN = -1  # side of a code without a label


def sides_of_codes() -> Tensor:
    """Return the lookup (256,) int64 from label code to side: 1 glacier of either kind, 0 the rest, -1 unknown."""
    sides = torch.full((256,), UNKNOWN)
    sides[list(REST_CODES)], sides[list(GLACIER_CODES)] = 0, 1
    return sides


def focal_loss(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Return the mean of -(1 - p)^gamma log p, p the probability of the right side.

    Lin et al. 2017, arXiv 1708.02002. `logits` and `target` (0 or 1) are (N,) float32.
    """
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (cross_entropy * (-torch.expm1(-cross_entropy)).clamp(min=SMALLEST) ** gamma).mean()


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return 1 - Dice over all pixels (N,) of the batch, the mean of both sides."""
    probs = logits.sigmoid()
    losses = []
    for p, t in ((probs, target), (1 - probs, 1 - target)):
        losses.append(1 - 2 * (p * t).sum() / (p + t).sum().clamp(min=SMALLEST))
    return torch.stack(losses).mean()


class ExtentLoss(nn.Module):
    """The weighted sum of losses that the config asks for."""

    sides: Tensor

    def __init__(self, config: LossConfig) -> None:
        """Take weights and exponents from the config."""
        super().__init__()
        self.config = config
        self.register_buffer("sides", sides_of_codes(), persistent=False)
        self.tversky = TverskyLoss(BINARY_MODE, alpha=config.tversky_alpha, beta=config.tversky_beta)
        self.lovasz = LovaszLoss(BINARY_MODE)

    def forward(self, logits: Tensor, codes: Tensor) -> Tensor:
        """Return the loss, 0 (with a gradient of 0) where no pixel has a label.

        Args:
            logits: (B, 1, H, W).
            codes: (B, H, W) uint8 label codes.
        """
        sides = self.sides[codes.long()]
        labelled = sides != UNKNOWN
        if not labelled.any():
            return logits.float().sum() * 0.0
        values, target = logits[:, 0][labelled].float(), sides[labelled].float()  # (N,)
        config = self.config
        terms = {
            "focal": lambda: focal_loss(values, target, config.gamma),
            "dice": lambda: dice_loss(values, target),
            "tversky": lambda: self.tversky(values[None, None], target[None, None]),
            "lovasz": lambda: self.lovasz(values[None], target[None]),
        }
        weights = {name: getattr(config, name) for name in terms}
        return torch.stack([weight * terms[name]() for name, weight in weights.items() if weight]).sum()
