"""Focal and Dice loss for labels that name a set of classes.

The target of a pixel is the network's own detached posterior, restricted to the classes its label allows and
renormalised. A certain label is the special case of a set of one, so there is no second code path, and the
gradient of the log-likelihood of the set equals that of the cross-entropy against this target.
"""

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from prep.labels import allowed_classes
from train.config import LossConfig

SMALLEST = 1e-7  # keeps the power and the quotient below differentiable


class LabelledPixels(NamedTuple):
    """The pixels with a label, N of them, one row each, float32 or bool, classes in the last axis.

    `logits` (N, 4); `allowed` (N, 4) bool, the classes that the label allows.
    """

    logits: Tensor
    allowed: Tensor


def labelled_pixels(logits: Tensor, codes: Tensor, table: Tensor) -> LabelledPixels:
    """Keep the pixels that have a label.

    Args:
        logits: (B, 4, H, W).
        codes: (B, H, W) uint8 label codes of `prep.labels`.
        table: (256, 4) bool, `prep.labels.allowed_classes`.
    """
    allowed = table[codes.long()]  # (B, H, W, 4)
    keep = allowed.any(dim=-1)  # (B, H, W)
    return LabelledPixels(logits.movedim(1, -1)[keep].float(), allowed[keep])


def posterior_target(pixels: LabelledPixels) -> Tensor:
    """Return (N, 4): the detached softmax over the allowed classes, 0 for the others."""
    return pixels.logits.detach().masked_fill(~pixels.allowed, -torch.inf).softmax(dim=-1)


def log_likelihood(pixels: LabelledPixels) -> Tensor:
    """Return (N,): log of the probability that the class is an allowed one, stable for any logits."""
    within = pixels.logits.masked_fill(~pixels.allowed, -torch.inf).logsumexp(dim=-1)
    return (within - pixels.logits.logsumexp(dim=-1)).clamp(max=0)


def focal_loss(pixels: LabelledPixels, gamma: float, class_weights: Optional[Tensor] = None) -> Tensor:
    """Return the mean of -(1 - p)^gamma log p, p the probability of the allowed classes.

    With `class_weights` (4,), the mean weighted by the target's class, as in
    `torch.nn.functional.cross_entropy`. Focal loss: Lin et al. 2017, arXiv 1708.02002.
    """
    log_p = log_likelihood(pixels)
    losses = -log_p * (-torch.expm1(log_p)).clamp(min=SMALLEST) ** gamma
    if class_weights is None:
        return losses.mean()
    weights = posterior_target(pixels) @ class_weights
    return (losses * weights).sum() / weights.sum().clamp(min=SMALLEST)


def dice_loss(pixels: LabelledPixels) -> Tensor:
    """Return 1 - Dice, over all pixels of the batch, averaged over the classes that some label allows.

    The overlap of probability p and target t is written (p + t - |p - t|) / 2: for certain labels this is
    p * t, the usual soft Dice; for soft targets it is smallest at p = t, where p * t would push the
    network towards whichever class it already prefers (Wang et al. 2023, arXiv 2303.16296).
    """
    probs = pixels.logits.softmax(dim=-1)
    target = posterior_target(pixels)
    present = pixels.allowed.any(dim=0)  # (4,)
    difference = (probs - target).abs().sum(dim=0)
    total = (probs + target).sum(dim=0).clamp(min=SMALLEST)
    return (difference / total)[present].mean()  # 1 - (total - difference) / total


class SetLoss(nn.Module):
    """Weighted sum of focal and Dice loss on logits (B, 4, H, W) and label codes (B, H, W)."""

    def __init__(self, config: LossConfig) -> None:
        """Take weights and exponents from the config."""
        super().__init__()
        self.config = config
        self.register_buffer("table", torch.from_numpy(allowed_classes()) > 0, persistent=False)
        self.register_buffer("class_weights", _to_weights(config.class_weights), persistent=False)

    def forward(self, logits: Tensor, codes: Tensor) -> Tensor:
        """Return the loss, 0 (with a gradient of 0) where no pixel has a label."""
        pixels = labelled_pixels(logits, codes, self.table)
        if len(pixels.logits) == 0:
            return logits.float().sum() * 0.0
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.config.focal:
            loss = loss + self.config.focal * focal_loss(pixels, self.config.gamma, self.class_weights)
        if self.config.dice:
            loss = loss + self.config.dice * dice_loss(pixels)
        return loss


def _to_weights(weights: Optional[Sequence[float]]) -> Optional[Tensor]:
    return None if weights is None else torch.tensor(list(weights), dtype=torch.float32)
