"""The losses on set-valued labels against independent formulas, scikit-learn, scipy and smp's losses."""

import math

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.stats import norm
from sklearn.metrics import jaccard_score, matthews_corrcoef
from torch.nn import functional

from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE, allowed_classes
from train.config import LossConfig
from train.losses import (
    BorderSoftening,
    BorderWeights,
    SetLoss,
    Softened,
    border_pairs,
    boundary_loss,
    dice_loss,
    distance_to,
    focal_loss,
    labelled_pixels,
    likeliest_class,
    log_likelihood,
    lovasz_loss,
    mcc_loss,
    posterior_target,
    ramp,
    touching,
    tversky_loss,
)

TABLE = torch.from_numpy(allowed_classes()) > 0
SHAPE = (2, 9, 7)
ALL_CODES = [0, 1, 2, 3, GLACIER_OR_DEBRIS, OTHER_OR_LAKE, IGNORE]
EVERY_TERM = {"focal": 1.0, "dice": 1.0, "mcc": 1.0, "boundary": 1.0, "tversky": 1.0, "lovasz": 1.0}


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


@pytest.mark.parametrize("terms", [{}, EVERY_TERM])
def test_ignored_pixels_contribute_nothing(terms):
    loss = SetLoss(LossConfig(**terms))
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
    value = SetLoss(LossConfig(**EVERY_TERM))(logits, torch.full(SHAPE, IGNORE, dtype=torch.uint8))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_stable_for_extreme_logits(gamma, scale):
    codes = random_codes([0, 1, 2, 3, GLACIER_OR_DEBRIS, OTHER_OR_LAKE, IGNORE])
    logits = (random_logits() * scale).requires_grad_()
    config = LossConfig(gamma=gamma, class_weights=[1.0, 2.0, 3.0, 4.0], **EVERY_TERM)
    value = SetLoss(config)(logits, codes)
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


# --- Matthews correlation -----------------------------------------------------------------------------------

CLASSES = st.integers(0, 3)


def hard_logits(classes: np.ndarray, shape: tuple) -> torch.Tensor:
    """Return logits (1, 4, *shape) that are certain of `classes`."""
    return 100.0 * functional.one_hot(torch.from_numpy(classes).reshape(1, *shape), 4).movedim(-1, 1).float()


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(CLASSES, CLASSES), min_size=1, max_size=60))
def test_mcc_equals_scikit_learn_on_hard_labels_and_predictions(pairs):
    labels, predicted = np.array(pairs).T
    logits = hard_logits(predicted, (1, len(pairs)))
    codes = torch.from_numpy(labels.astype(np.uint8)).reshape(1, 1, -1)
    expected = 1 - matthews_corrcoef(labels, predicted)
    assert mcc_loss(pixels_of(logits, codes)).item() == pytest.approx(expected, abs=1e-5)


def test_mcc_counts_a_single_pixel_among_a_million():
    codes = torch.zeros(1, 1000, 1000, dtype=torch.uint8)
    codes[0, 0, 0] = 1
    logits = hard_logits(codes.numpy().astype(np.int64), (1000, 1000))
    assert mcc_loss(pixels_of(logits, codes)).item() == pytest.approx(0.0, abs=1e-4)


def test_mcc_of_probabilities_is_that_of_the_soft_confusion_matrix():
    logits, codes = random_logits(), random_codes([0, 1, 2, 3])
    probs = logits.softmax(dim=1).movedim(1, -1).reshape(-1, 4).double().numpy()
    labels = np.eye(4)[codes.numpy().ravel()]
    counts = labels.T @ probs
    total, right, rows, cols = counts.sum(), np.trace(counts), counts.sum(axis=1), counts.sum(axis=0)
    variances = (total**2 - rows @ rows) * (total**2 - cols @ cols)
    expected = 1 - (right * total - rows @ cols) / math.sqrt(variances)
    assert mcc_loss(pixels_of(logits, codes)).item() == pytest.approx(expected, rel=1e-5)


def test_mcc_does_not_take_sides_within_a_set():
    """Where every pixel is surely of its set, no split within the sets is better than another."""
    codes = random_codes([0, GLACIER_OR_DEBRIS])
    logits = random_logits()
    logits[:, 3] = -40.0
    glacier = (codes == GLACIER_OR_DEBRIS)[:, None]
    logits = torch.where(glacier.expand_as(logits), logits, torch.tensor([40.0, 0, 0, 0])[:, None, None])
    logits[:, :1] = torch.where(glacier, -40.0, logits[:, :1])
    logits.requires_grad_()
    loss = mcc_loss(pixels_of(logits, codes))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad.abs().max().item() < 1e-6


@pytest.mark.parametrize("codes", [[0, 1, 2, 3, IGNORE], [0, GLACIER_OR_DEBRIS]])
def test_following_the_gradient_of_mcc_lowers_it(codes):
    labels, logits = random_codes(codes), random_logits(seed=1).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=20.0)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = mcc_loss(pixels_of(logits, labels))
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert all(after < before for before, after in zip(values, values[1:]))
    assert values[-1] < 0.6 * values[0]


# --- Borders ------------------------------------------------------------------------------------------------


def by_hand_weights(codes: np.ndarray, sigma: float, interface_weight: float) -> np.ndarray:
    """Return the border weights of codes (H, W) pixel by pixel, pair by pair."""
    allowed = allowed_classes() > 0
    height, width = codes.shape
    borders: list[tuple[int, int, float]] = []
    for row in range(height):
        for col in range(width):
            for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                if not (0 <= row + dr < height and 0 <= col + dc < width):
                    continue
                here, there = codes[row, col], codes[row + dr, col + dc]
                if (
                    allowed[here].any()
                    and allowed[there].any()
                    and not (allowed[here] & allowed[there]).any()
                ):
                    borders.append((row, col, interface_weight if {here, there} == {1, 2} else 1.0))
    weights = np.zeros(codes.shape)
    for row, col in np.ndindex(*codes.shape):
        for r, c, factor in borders:
            distance = math.hypot(row - r, col - c)
            if distance <= math.ceil(5 * sigma):
                weights[row, col] = max(weights[row, col], factor * math.exp(-distance / sigma))
    return weights


@pytest.mark.parametrize("codes", [[0, 1], [1, 2], ALL_CODES, [GLACIER_OR_DEBRIS, 1, IGNORE]])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_border_weights_equal_those_by_hand(codes, sigma):
    blocks = np.random.default_rng(0).choice(codes, (2, 4, 5)).astype(np.uint8)
    labels = np.kron(blocks, np.ones((1, 4, 3), np.uint8))
    found = BorderWeights(TABLE, sigma, 5.0)(torch.from_numpy(labels)).numpy()
    expected = np.stack([by_hand_weights(tile, sigma, 5.0) for tile in labels])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_interface_of_glacier_and_debris_weighs_more():
    codes = torch.zeros(1, 1, 12, dtype=torch.uint8)
    codes[..., 4:8], codes[..., 8:] = 1, 2
    weights = BorderWeights(TABLE, 1.0, 5.0)(codes)[0, 0]
    assert weights[[3, 4]].tolist() == [1.0, 1.0]
    assert weights[[7, 8]].tolist() == [5.0, 5.0]
    assert weights[9].item() == pytest.approx(5 * math.exp(-1), rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.002, 0.05, 0.6])
def test_distance_equals_scipy_within_reach(share):
    marked = np.random.default_rng(0).random((3, 50, 41)) < share
    found = distance_to(torch.from_numpy(marked), 9).numpy()
    for number, tile in enumerate(marked):
        expected = distance_transform_edt(~tile) if tile.any() else np.full(tile.shape, np.inf)
        np.testing.assert_allclose(found[number], np.where(expected <= 9, expected, np.inf), rtol=1e-6)


def test_codes_that_may_show_the_same_class_make_no_border():
    borders, interface = border_pairs(TABLE)
    assert torch.equal(borders, borders.T)
    assert torch.equal(interface, interface.T)
    for pair in ((1, GLACIER_OR_DEBRIS), (2, GLACIER_OR_DEBRIS), (0, OTHER_OR_LAKE), (0, 0), (0, IGNORE)):
        assert not borders[pair]
    for pair in ((0, 1), (1, 2), (0, GLACIER_OR_DEBRIS), (OTHER_OR_LAKE, GLACIER_OR_DEBRIS), (0, 3)):
        assert borders[pair]
    assert interface.nonzero().tolist() == [[1, 2], [2, 1]]
    assert not touching(torch.full(SHAPE, IGNORE, dtype=torch.uint8), borders).any()


def test_boundary_loss_is_the_weighted_cross_entropy():
    logits, codes = random_logits(), random_codes([0, 1, 2, 3, IGNORE])
    weights = BorderWeights(TABLE, 3.0, 5.0)(codes)
    costs = functional.cross_entropy(logits, codes.long(), ignore_index=IGNORE, reduction="none")
    weights[codes == IGNORE] = 0
    expected = ((costs * weights).sum() / weights.sum()).item()
    value = SetLoss(LossConfig(focal=0, dice=0, boundary=1.0))(logits, codes).item()
    assert value == pytest.approx(expected, rel=1e-5)


def test_without_a_border_the_boundary_term_is_zero():
    logits = random_logits().requires_grad_()
    codes = torch.full(SHAPE, GLACIER_OR_DEBRIS, dtype=torch.uint8)
    value = SetLoss(LossConfig(focal=0, dice=0, boundary=1.0))(logits, codes)
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_boundary_term_is_ramped_in_linearly():
    logits, codes = random_logits(), random_codes([0, 1, 2])
    loss = SetLoss(LossConfig(focal=1.0, dice=0, boundary=2.0, boundary_ramp_epochs=4))
    start, whole = loss(logits, codes, 0.0).item(), loss(logits, codes).item()
    assert start == pytest.approx(focal_loss(pixels_of(logits, codes), 2.0).item(), rel=1e-6)
    for epochs, share in ((1.0, 0.25), (2.5, 0.625), (4.0, 1.0), (9.0, 1.0)):
        value = loss(logits, codes, epochs).item()
        assert value == pytest.approx(start + share * (whole - start), rel=1e-5)
    assert [ramp(epochs, 0) for epochs in (0.0, 3.0)] == [1.0, 1.0]


# --- Tversky and Lovasz -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [[0, 1, 2, 3, IGNORE], [0, 2, IGNORE], [1]])
def test_tversky_equals_its_formula_and_half_and_half_is_dice(codes):
    logits, labels = random_logits(), random_codes(codes)
    pixels = pixels_of(logits, labels)
    assert tversky_loss(pixels, 0.5, 0.5).item() == pytest.approx(dice_loss(pixels).item(), rel=1e-5)
    probs, target = pixels.logits.softmax(dim=-1), pixels.allowed.float()
    hits = (probs * target).sum(dim=0)
    index = hits / (hits + 0.3 * (probs * (1 - target)).sum(dim=0) + 0.7 * ((1 - probs) * target).sum(dim=0))
    expected = 1 - index[target.any(dim=0)].mean()
    assert tversky_loss(pixels, 0.3, 0.7).item() == pytest.approx(expected.item(), rel=1e-5)


def test_lovasz_of_hard_predictions_is_the_jaccard_loss():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, (2, 60))
    codes = torch.from_numpy(labels.astype(np.uint8)).reshape(1, 6, 10)
    present = jaccard_score(labels, predicted, labels=[0, 1, 2], average=None)
    value = lovasz_loss(pixels_of(hard_logits(predicted, (6, 10)), codes)).item()
    assert value == pytest.approx(1 - present.mean(), abs=1e-5)


def test_sets_become_their_likeliest_class():
    logits, codes = random_logits(), random_codes(ALL_CODES)
    pixels = pixels_of(logits, codes)
    likeliest = likeliest_class(pixels)
    assert torch.equal(likeliest, posterior_target(pixels).argmax(dim=-1))
    certain = pixels._replace(allowed=functional.one_hot(likeliest, 4).bool())
    for loss in (lovasz_loss, lambda p: tversky_loss(p, 0.3, 0.7)):
        assert loss(pixels).item() == loss(certain).item()


# --- Softened targets at borders ----------------------------------------------------------------------------


def softened_pixels(logits: torch.Tensor, codes: torch.Tensor, sigma: float = 2.0, largest: float = 0.5):
    """Return the pixels, each with a label, their targets softened, and the share (N,) that moves."""
    share, across = (part.flatten() for part in BorderSoftening(TABLE, sigma, largest)(codes))
    rows = share.nonzero()[:, 0]
    softened = Softened(rows, TABLE[across[rows].long()], share[rows])
    return pixels_of(logits, codes)._replace(softened=softened), share


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_a_straight_border_moves_what_a_gaussian_error_of_it_would(sigma):
    codes = torch.zeros(1, 40, 40, dtype=torch.uint8)
    codes[:, 20:] = 1
    share, across = BorderSoftening(TABLE, sigma, 0.5)(codes)
    distance = np.abs(np.arange(40) - 19.5)  # of pixel centres to the border
    assert share[0, :, 5].numpy() == pytest.approx(norm.cdf(-distance / sigma), abs=0.01)
    moved = share > 0
    assert torch.equal(across[moved], 1 - codes[moved])
    assert torch.equal(across[~moved], codes[~moved])


@pytest.mark.parametrize("codes", [[0, 1], [0, 1, 2, 3, IGNORE], ALL_CODES])
def test_shares_are_those_of_the_likeliest_disjoint_label_around(codes):
    rng = np.random.default_rng(1)
    labels = np.kron(rng.choice(codes, (2, 5, 6)), np.ones((1, 5, 5))).astype(np.uint8)
    share, across = BorderSoftening(TABLE, 1.0, 0.3)(torch.from_numpy(labels))
    classes = {code: set(np.flatnonzero(allowed_classes()[code])) for code in ALL_CODES}
    for image, found, to in zip(labels, share.numpy(), across.numpy()):
        around = {
            code: gaussian_filter((image == code).astype(float), 1.0, mode="constant", truncate=3)
            for code in ALL_CODES[:-1]
        }
        total = sum(around.values())
        for place in np.ndindex(image.shape):
            own = image[place]
            rivals = [code for code in around if classes[own] and not classes[own] & classes[code]]
            best = max(rivals, key=lambda code: around[code][place], default=own)
            expected = min(1, 2 * around[best][place] / total[place]) * 0.3 if rivals else 0.0
            assert found[place] == pytest.approx(expected, abs=1e-5)
            if found[place] > 0:  # of equally frequent labels either will do
                assert to[place] in rivals
                assert around[to[place]][place] == pytest.approx(around[best][place], abs=1e-6)
            else:
                assert to[place] == own


@pytest.mark.parametrize("turn", [lambda x: x.flip(1), lambda x: x.flip(2), lambda x: x.rot90(1, (1, 2))])
def test_softening_turns_with_the_labels(turn):
    codes = random_codes(ALL_CODES)
    softening = BorderSoftening(TABLE, 1.5, 0.5)
    for turned, expected in zip(softening(turn(codes)), softening(codes)):
        assert torch.allclose(turned.float(), turn(expected).float(), atol=1e-6)


def test_softened_losses_are_those_of_the_mixed_target():
    """Cross-entropy with soft targets by PyTorch, Dice and MCC by their formulas on mixed one-hot maps."""
    logits, codes = random_logits(), random_codes([0, 1, 2])
    pixels, share = softened_pixels(logits, codes)
    assert (share > 0).any()
    target = functional.one_hot(codes.flatten().long(), 4).float()
    across = BorderSoftening(TABLE, 2.0, 0.5)(codes)[1].flatten().long()
    target = (1 - share[:, None]) * target + share[:, None] * functional.one_hot(across, 4)
    assert torch.allclose(posterior_target(pixels), target, atol=1e-6)
    flat = logits.movedim(1, -1).reshape(-1, 4)
    cross_entropy = functional.cross_entropy(flat, target)
    assert focal_loss(pixels, 0.0).item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    ones = torch.ones(len(flat))
    assert boundary_loss(pixels, ones).item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    probs = flat.softmax(dim=-1)
    dice = 1 - (2 * torch.minimum(probs, target).sum(dim=0) / (probs + target).sum(dim=0))[:3].mean()
    assert dice_loss(pixels).item() == pytest.approx(dice.item(), rel=1e-4)
    agree, p, t = torch.minimum(probs, target).sum(dim=1).mean(), probs.mean(dim=0), target.mean(dim=0)
    mcc = (agree - p @ t) / ((1 - p @ p) * (1 - t @ t)).sqrt()
    assert mcc_loss(pixels).item() == pytest.approx(1 - mcc.item(), rel=1e-4)


@pytest.mark.parametrize("term", ["focal", "dice", "mcc"])
def test_the_mixed_target_has_the_smallest_loss(term):
    """One column of pixels each side of a border: descent ends at the softened target, not at 0 or 1."""
    codes = torch.tensor([[[0] * 6 + [1] * 6] * 2], dtype=torch.uint8)
    logits = torch.zeros(1, 4, 2, 12, requires_grad=True)
    weights = {**dict.fromkeys(EVERY_TERM, 0.0), term: 1.0}
    loss = SetLoss(LossConfig(**weights, gamma=0.0, border_smoothing=0.5, border_sigma=1.0))
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        loss(logits, codes).backward()
        optimizer.step()
    share = BorderSoftening(TABLE, 1.0, 0.5)(codes)[0][0, 0]
    expected = torch.cat([share[4:6], 1 - share[6:8]])
    found = logits.detach().softmax(dim=1)[0, 1, 0]  # probability of class 1 along the row
    assert found[4:8].numpy() == pytest.approx(expected.numpy(), abs=0.03)


def test_sets_stay_sets_at_borders():
    codes = torch.full((1, 8, 8), GLACIER_OR_DEBRIS, dtype=torch.uint8)
    codes[:, :, :4] = 0
    logits = random_logits()[:1, :, :8, :7].repeat(1, 1, 1, 2)[..., :8]
    pixels, share = softened_pixels(logits, codes)
    target = posterior_target(pixels).reshape(8, 8, 4)
    share = share.reshape(8, 8)
    assert torch.allclose(target[:, :4, 1:3].sum(dim=-1), share[:, :4], atol=1e-6)
    assert torch.allclose(target[:, 4:, 0], share[:, 4:], atol=1e-6)
    posterior = logits.softmax(dim=1)[0]
    ratio = target[:, 4:, 1] / target[:, 4:, 2]
    assert torch.allclose(ratio, (posterior[1] / posterior[2])[:, 4:], rtol=1e-3)
    inside = torch.full((1, 8, 8), GLACIER_OR_DEBRIS, dtype=torch.uint8)
    inside[:, :, :4] = 1  # may be the same class: no border
    assert not BorderSoftening(TABLE, 2.0, 0.5)(inside)[0].any()


def test_without_a_border_or_without_smoothing_nothing_changes():
    logits = random_logits()
    weights = {"mcc": 1.0, "boundary": 1.0}
    for codes, smoothing in ((random_codes([1, IGNORE]), 0.5), (random_codes([0, 1]), 0.0)):
        plain = SetLoss(LossConfig(**weights))(logits, codes)
        assert (
            SetLoss(LossConfig(**weights, border_smoothing=smoothing))(logits, codes).item() == plain.item()
        )


# --- All terms together -------------------------------------------------------------------------------------


def test_every_term_counts_by_its_weight():
    logits, codes = random_logits(), random_codes([0, 1, 2, GLACIER_OR_DEBRIS, IGNORE])
    pixels = pixels_of(logits, codes)
    weights = BorderWeights(TABLE, 3.0, 5.0)(codes)[codes != IGNORE]
    expected = (
        0.25 * focal_loss(pixels, 2.0)
        + 0.25 * dice_loss(pixels)
        + 0.35 * mcc_loss(pixels)
        + 0.15 * boundary_loss(pixels, weights)
        + 0.4 * tversky_loss(pixels, 0.3, 0.7)
        + 0.6 * lovasz_loss(pixels)
    )
    config = LossConfig(focal=0.25, dice=0.25, mcc=0.35, boundary=0.15, tversky=0.4, lovasz=0.6)
    assert SetLoss(config)(logits, codes).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("term", list(EVERY_TERM))
@pytest.mark.parametrize("codes", [ALL_CODES, [1], [GLACIER_OR_DEBRIS], [0, IGNORE]])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_gradients_are_finite(term, codes, smoothing):
    config = LossConfig(**{**dict.fromkeys(EVERY_TERM, 0.0), term: 1.0}, border_smoothing=smoothing)
    logits = random_logits().requires_grad_()
    value = SetLoss(config)(logits, random_codes(codes))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
