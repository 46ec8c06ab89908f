"""The loss on set-valued labels against independent formulas and smp's losses."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch.nn import functional

from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE, allowed_classes
from train.config import LossConfig
from train.losses import (
    SetLoss,
    dice_loss,
    focal_loss,
    labelled_pixels,
    log_likelihood,
    posterior_target,
)

TABLE = torch.from_numpy(allowed_classes()) > 0
SHAPE = (2, 9, 7)


def random_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE[0], 4, *SHAPE[1:], generator=torch.manual_seed(seed)) * 3


def random_codes(codes: list[int], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.choice(codes, SHAPE).astype(np.uint8))


def pixels_of(logits: torch.Tensor, codes: torch.Tensor):
    return labelled_pixels(logits, codes, TABLE)


def test_ignored_pixels_are_left_out_in_order():
    logits, codes = random_logits(), random_codes([0, 1, GLACIER_OR_DEBRIS, IGNORE])
    pixels = pixels_of(logits, codes)
    keep = codes.numpy() != IGNORE
    assert np.array_equal(pixels.logits.numpy(), logits.permute(0, 2, 3, 1).numpy()[keep])
    assert np.array_equal(pixels.allowed.numpy(), allowed_classes()[codes.numpy()[keep]] > 0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_equals_the_standard_formula_on_certain_labels(gamma):
    logits, codes = random_logits(), random_codes([0, 1, 2, 3])
    p = logits.softmax(dim=1).gather(1, codes.long()[:, None]).double()
    expected = (-((1 - p) ** gamma) * p.log()).mean()
    assert focal_loss(pixels_of(logits, codes), gamma).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gamma_0_is_cross_entropy_with_and_without_class_weights():
    logits, codes = random_logits(), random_codes([0, 1, 2, 3, IGNORE])
    target = codes.long()
    weights = torch.tensor([0.5, 1.0, 3.0, 0.0])
    for class_weights in (None, weights):
        expected = functional.cross_entropy(logits, target, class_weights, ignore_index=IGNORE)
        found = focal_loss(pixels_of(logits, codes), 0.0, class_weights)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_probability_of_a_set_is_the_sum_of_its_classes():
    logits, codes = random_logits(), torch.full(SHAPE, GLACIER_OR_DEBRIS, dtype=torch.uint8)
    p = logits.softmax(dim=1)
    expected = (p[:, 1] + p[:, 2]).log().flatten()
    assert torch.allclose(log_likelihood(pixels_of(logits, codes)), expected, atol=1e-5)


def test_target_is_the_restricted_posterior_and_one_hot_for_certain_labels():
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0]).reshape(1, 4, 1, 1)
    p = logits.flatten().softmax(dim=0)
    cases = {
        3: torch.tensor([0.0, 0, 0, 1]),
        GLACIER_OR_DEBRIS: torch.stack([p[0] * 0, p[1], p[2], p[3] * 0]) / (p[1] + p[2]),
        OTHER_OR_LAKE: torch.stack([p[0], p[1] * 0, p[2] * 0, p[3]]) / (p[0] + p[3]),
    }
    for code, expected in cases.items():
        target = posterior_target(pixels_of(logits, torch.full((1, 1, 1), code, dtype=torch.uint8)))
        assert torch.allclose(target[0], expected, atol=1e-6)


def test_gradient_equals_cross_entropy_against_the_posterior_target():
    codes = random_codes([0, 1, 2, 3, GLACIER_OR_DEBRIS, OTHER_OR_LAKE, IGNORE])
    own, reference = random_logits().requires_grad_(), random_logits().requires_grad_()
    focal_loss(pixels_of(own, codes), gamma=0.0).backward()
    pixels = pixels_of(reference, codes)
    functional.cross_entropy(pixels.logits, posterior_target(pixels)).backward()
    assert torch.allclose(own.grad, reference.grad, atol=1e-7)


@pytest.mark.parametrize("codes", [[0, 1, 2, 3, IGNORE], [0, 2, IGNORE], [1]])
def test_dice_equals_smp_on_certain_labels(codes):
    logits, labels = random_logits(), random_codes(codes)
    present = [code for code in codes if code != IGNORE]
    reference = smp.losses.DiceLoss("multiclass", classes=present, ignore_index=IGNORE)
    expected = reference(logits, labels.long())
    assert dice_loss(pixels_of(logits, labels)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_dice_does_not_take_sides_within_a_set():
    """Whatever the split between clean and debris, a glacier seen as a glacier costs nothing."""
    logits = random_logits()
    logits[:, (0, 3)] = -40.0
    logits.requires_grad_()
    loss = dice_loss(pixels_of(logits, torch.full(SHAPE, GLACIER_OR_DEBRIS, dtype=torch.uint8)))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad.abs().max().item() < 1e-6


def test_ignored_pixels_contribute_nothing():
    loss = SetLoss(LossConfig())
    codes = random_codes([0, 1, GLACIER_OR_DEBRIS, IGNORE])
    ignored = (codes == IGNORE)[:, None].expand(-1, 4, -1, -1)
    logits = random_logits().requires_grad_()
    value = loss(logits, codes)
    value.backward()
    assert logits.grad[ignored].abs().max().item() == 0.0
    assert logits.grad[~ignored].abs().max().item() > 0.0
    changed = torch.where(ignored, random_logits(seed=1), logits.detach())
    assert loss(changed, codes).item() == value.item()


def test_a_batch_of_ignored_pixels_costs_nothing():
    logits = random_logits().requires_grad_()
    value = SetLoss(LossConfig())(logits, torch.full(SHAPE, IGNORE, dtype=torch.uint8))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_stable_for_extreme_logits(gamma, scale):
    codes = random_codes([0, 1, 2, 3, GLACIER_OR_DEBRIS, OTHER_OR_LAKE, IGNORE])
    logits = (random_logits() * scale).requires_grad_()
    value = SetLoss(LossConfig(gamma=gamma, class_weights=[1.0, 2.0, 3.0, 4.0]))(logits, codes)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def test_loss_is_the_weighted_sum_of_its_terms():
    logits, codes = random_logits(), random_codes([0, 1, 2, 3, GLACIER_OR_DEBRIS])
    pixels = pixels_of(logits, codes)
    expected = 0.3 * focal_loss(pixels, 1.5) + 2 * dice_loss(pixels)
    value = SetLoss(LossConfig(focal=0.3, dice=2.0, gamma=1.5))(logits, codes)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_half_precision_logits_give_a_float32_loss():
    value = SetLoss(LossConfig())(random_logits().bfloat16(), random_codes([0, 1, GLACIER_OR_DEBRIS]))
    assert value.dtype == torch.float32
