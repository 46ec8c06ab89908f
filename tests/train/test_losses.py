"""Losses on the extent against independent formulas, and what a label code means to them."""

import numpy as np
import pytest
import torch
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss
from torch.nn import functional

from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from train.config import LossConfig
from train.losses import ExtentLoss, dice_loss, focal_loss

TERMS = ("focal", "dice", "tversky", "lovasz")
EVERY_CODE = [0, 1, 2, 3, GLACIER_OR_DEBRIS, OTHER_OR_LAKE, IGNORE]


def only(term: str, **settings) -> ExtentLoss:
    """Return the loss with one term alone."""
    return ExtentLoss(LossConfig(**{**dict.fromkeys(TERMS, 0.0), term: 1.0}, **settings))


def make_pixels(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (500,) and targets (500,) of 0 and 1."""
    rng = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(500, generator=rng), (torch.rand(500, generator=rng) < 0.3).float()


def as_maps(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (1, 1, 20, 25) and label codes (1, 20, 25) of pixels."""
    return logits.reshape(1, 1, 20, 25), target.reshape(1, 20, 25).to(torch.uint8)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.5])
def test_focal_loss_is_that_of_the_paper(gamma):
    logits, target = make_pixels()
    right = torch.where(target == 1, logits.sigmoid(), 1 - logits.sigmoid())
    expected = (-((1 - right) ** gamma) * right.log()).mean()
    assert focal_loss(logits, target, gamma).item() == pytest.approx(expected.item(), rel=1e-4)
    if gamma:
        library = FocalLoss("binary", gamma=gamma)(logits, target).item()
        assert focal_loss(logits, target, gamma).item() == pytest.approx(library, rel=1e-4)
    else:
        cross_entropy = functional.binary_cross_entropy_with_logits(logits, target).item()
        assert focal_loss(logits, target, gamma).item() == pytest.approx(cross_entropy, rel=1e-5)


def test_dice_loss_is_the_mean_of_both_sides():
    logits, target = make_pixels()
    sides = [DiceLoss("binary")(s * logits[None, None], t[None, None]) for s, t in ((1, target), (-1, 1 - target))]
    assert dice_loss(logits, target).item() == pytest.approx(float(sum(sides)) / 2, rel=1e-5)


def test_tversky_loss_weighs_its_errors():
    logits, target = make_pixels()
    p = logits.sigmoid()
    hits, false, missed = (p * target).sum(), (p * (1 - target)).sum(), ((1 - p) * target).sum()
    expected = 1 - hits / (hits + 0.2 * false + 0.9 * missed)
    loss = only("tversky", tversky_alpha=0.2, tversky_beta=0.9)
    assert loss(*as_maps(logits, target)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_lovasz_hinge_is_the_integral_over_its_level_sets():
    """The Lovasz extension of 1 - IoU at the margin errors, by its definition as a sum over sorted errors."""
    logits, target = (part.numpy() for part in make_pixels())
    errors = 1 - logits * (2 * target - 1)
    order = np.argsort(-errors)
    jaccard = []
    for count in range(len(order) + 1):
        wrong = np.zeros(len(order), bool)
        wrong[order[:count]] = True
        union = target.sum() + (wrong & (target == 0)).sum()
        jaccard.append((wrong.sum()) / union)
    expected = (np.maximum(errors[order], 0) * np.diff(jaccard)).sum()
    found = only("lovasz")(*as_maps(torch.tensor(logits), torch.tensor(target))).item()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("term", TERMS)
def test_only_the_side_of_a_code_counts(term):
    logits, target = as_maps(*make_pixels())
    rng = np.random.default_rng(0)
    codes = np.where(
        target.numpy(),
        rng.choice([1, 2, GLACIER_OR_DEBRIS], target.shape),
        rng.choice([0, 3, OTHER_OR_LAKE], target.shape),
    ).astype(np.uint8)
    loss = only(term)
    assert loss(logits, torch.from_numpy(codes)).item() == loss(logits, target).item()
    codes[0, :5] = IGNORE
    expected = loss(logits[:, :, 5:], target[:, 5:]).item()
    assert loss(logits, torch.from_numpy(codes)).item() == pytest.approx(expected, rel=1e-6)


def test_every_term_counts_by_its_weight():
    logits, target = as_maps(*make_pixels())
    weights = {"focal": 0.25, "dice": 0.5, "tversky": 0.4, "lovasz": 0.6}
    expected = sum(weight * only(term)(logits, target) for term, weight in weights.items())
    assert ExtentLoss(LossConfig(**weights))(logits, target).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("codes", [EVERY_CODE, [1], [0], [IGNORE]])
def test_gradients_are_finite_and_none_come_from_nodata(term, codes):
    logits = make_pixels()[0].reshape(1, 1, 20, 25).mul(20).requires_grad_()
    chosen = torch.from_numpy(np.random.default_rng(0).choice(codes, (1, 20, 25)).astype(np.uint8))
    value = only(term)(logits, chosen)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all()
    assert not logits.grad[0, 0][chosen[0] == IGNORE].any()
    assert codes != [IGNORE] or value.item() == 0
