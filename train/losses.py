"""Losses for labels that name a set of classes: focal, Dice, MCC, boundary, Tversky, Lovasz.

The target of a pixel is the network's own detached posterior, restricted to the classes its label allows and
renormalised. A certain label is the special case of a set of one, so there is no second code path, and the
gradient of the log-likelihood of the set equals that of the cross-entropy against this target.

Near a border between classes the target may be softened (`BorderSoftening`): a share of it moves to the set
of classes that the label across the border allows.

The exceptions are Tversky and Lovasz-softmax, which are there for comparisons and are those of
segmentation_models_pytorch: they know certain labels only, and get the likeliest class of the target.
"""

import math
from typing import Callable, NamedTuple, Optional, Sequence

import torch
from segmentation_models_pytorch.losses import MULTICLASS_MODE, LovaszLoss, TverskyLoss
from torch import Tensor, nn

from prep.labels import CODE_CLASSES, allowed_classes
from solution import CLASS_NAMES, distance_to
from train.config import LossConfig

SMALLEST = 1e-7  # keeps the power and the quotients below differentiable
SMALLEST_VARIANCES = 1e-14  # of MCC, below what one pixel among ten million makes
BLUR_REACH = 3  # a Gaussian neighbourhood ends after so many sigmas, beyond which 0.3 % of it would lie
REACH = 5  # border weights are 0 beyond so many sigmas, where exp(-REACH) is 0.007
INTERFACE = (CLASS_NAMES.index("glacier"), CLASS_NAMES.index("debris"))


class LabelledPixels(NamedTuple):
    """The pixels with a label, N of them, one row each, float32 or bool, classes in the last axis.

    `logits` (N, 4); `allowed` (N, 4) bool, the classes that the label allows; `softened` what moves across
    a nearby border, None where nothing does.
    """

    logits: Tensor
    allowed: Tensor
    softened: Optional["Softened"] = None


class Softened(NamedTuple):
    """The M of N pixels whose targets are softened, as rows of LabelledPixels.

    `rows` (M,) int64; `allowed` (M, 4) bool, the classes of the label across the border; `share` (M,) float32
    of the target that is theirs.
    """

    rows: Tensor
    allowed: Tensor
    share: Tensor


def labelled_pixels(logits: Tensor, codes: Tensor, table: Tensor) -> LabelledPixels:
    """Keep the pixels that have a label.

    Args:
        logits: (B, 4, H, W).
        codes: (B, H, W) uint8 label codes of `prep.labels`.
        table: (256, 4) bool, `prep.labels.allowed_classes`.
    """
    rows = rows_with_label(codes, table)
    flat = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    allowed = table[codes.flatten().index_select(0, rows).long()]
    return LabelledPixels(flat.index_select(0, rows).float(), allowed)


def rows_with_label(codes: Tensor, table: Tensor) -> Tensor:
    """Return the flat indices (N,) int64 of the pixels of `codes` (B, H, W) that have a label."""
    return table.any(dim=-1)[codes.flatten().long()].nonzero()[:, 0]


def softmax(logits: Tensor) -> Tensor:
    """Return the softmax over the classes of (N, 4), as `torch.softmax` over the last axis.

    On a CPU that is several times slower than over the first axis of the transposed numbers.
    """
    return logits.T.contiguous().softmax(dim=0).T


def posterior_target(pixels: LabelledPixels) -> Tensor:
    """Return (N, 4): the detached softmax over the allowed classes, 0 for the others.

    Of softened pixels a share is the softmax over the classes across the border.
    """
    target = _restricted(pixels.logits, pixels.allowed)
    if pixels.softened is None:
        return target
    rows, allowed, share = pixels.softened
    across = _restricted(pixels.logits[rows], allowed)
    return target.index_copy(0, rows, torch.lerp(target[rows], across, share[:, None]))


def _restricted(logits: Tensor, allowed: Tensor) -> Tensor:
    return softmax(logits.detach().masked_fill(~allowed, -torch.inf))


def log_likelihood(pixels: LabelledPixels) -> Tensor:
    """Return (N,): log of the probability that the class is an allowed one, stable for any logits."""
    within = pixels.logits.masked_fill(~pixels.allowed, -torch.inf).logsumexp(dim=-1)
    return (within - pixels.logits.logsumexp(dim=-1)).clamp(max=0)


def expected_over_sides(pixels: LabelledPixels, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return (N,): the loss of the log-likelihoods, for softened pixels its mean over both labels' sets.

    Args:
        pixels: logits and allowed classes.
        loss: from log-likelihoods (N,) to losses (N,).
    """
    losses = loss(log_likelihood(pixels))
    if pixels.softened is None:
        return losses
    rows, allowed, share = pixels.softened
    across = loss(log_likelihood(LabelledPixels(pixels.logits[rows], allowed)))
    return losses.index_add(0, rows, share * (across - losses[rows]))


def focal_loss(pixels: LabelledPixels, gamma: float, class_weights: Optional[Tensor] = None) -> Tensor:
    """Return the mean of -(1 - p)^gamma log p, p the probability of the allowed classes.

    With `class_weights` (4,), the mean weighted by the target's class, as in
    `torch.nn.functional.cross_entropy`. Focal loss: Lin et al. 2017, arXiv 1708.02002.
    """
    losses = expected_over_sides(
        pixels, lambda log_p: -log_p * (-torch.expm1(log_p)).clamp(min=SMALLEST) ** gamma
    )
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
    probs = softmax(pixels.logits)
    target = posterior_target(pixels)
    present = pixels.allowed.any(dim=0)  # (4,)
    difference = (probs - target).abs().sum(dim=0)
    total = (probs + target).sum(dim=0).clamp(min=SMALLEST)
    return (difference / total)[present].mean()  # 1 - (total - difference) / total


def mcc_loss(pixels: LabelledPixels) -> Tensor:
    """Return 1 - the multiclass Matthews correlation of the batch's soft confusion matrix.

    Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006. Of the matrix it takes the sum of the diagonal and
    the margins, here as shares of the pixels. A pixel adds sum_k min(p_k, t_k) to the diagonal, p its
    probabilities and t its target: p_k of its class for a certain label, and the probability of the set for
    a set, so that a network is not pushed towards the class of the set that it already prefers. For hard
    labels and predictions this is the correlation that scikit-learn returns, 0 where it is undefined.
    """
    probs, target = softmax(pixels.logits), posterior_target(pixels)
    agreement = log_likelihood(pixels).exp()
    if pixels.softened is not None:
        rows = pixels.softened.rows
        agreement = agreement.index_copy(0, rows, torch.minimum(probs[rows], target[rows]).sum(dim=-1))
    correct = agreement.mean(dtype=torch.float64)  # float64: single pixels of a class must count
    predicted = probs.mean(dim=0, dtype=torch.float64)  # (4,)
    labelled = target.mean(dim=0, dtype=torch.float64)  # (4,)
    covariance = correct - (predicted * labelled).sum()
    variances = (predicted * (1 - predicted)).sum() * (labelled * (1 - labelled)).sum()
    return (1 - covariance / variances.clamp(min=SMALLEST_VARIANCES).sqrt()).float()


def boundary_loss(pixels: LabelledPixels, weights: Tensor) -> Tensor:
    """Return the mean of -log p weighted by `weights` (N,), p the probability of the allowed classes.

    0 where all weights are 0: a batch without any border between classes.
    """
    losses = expected_over_sides(pixels, torch.neg)
    return (losses * weights).sum() / weights.sum().clamp(min=SMALLEST)


def tversky_loss(pixels: LabelledPixels, alpha: float, beta: float) -> Tensor:
    """Return 1 - Tversky index over all pixels of the batch, averaged over the classes of `likeliest_class`.

    Args:
        pixels: logits and allowed classes.
        alpha: weight of false positives; the index is TP / (TP + alpha FP + beta FN).
        beta: weight of false negatives. Salehi et al. 2017, arXiv 1706.05721.
    """
    labels = likeliest_class(pixels)
    loss = TverskyLoss(MULTICLASS_MODE, classes=labels.unique().tolist(), alpha=alpha, beta=beta)
    return loss(pixels.logits.T[None], labels[None])


def lovasz_loss(pixels: LabelledPixels) -> Tensor:
    """Return the Lovasz-softmax loss over all pixels of the batch, averaged over the classes that occur.

    It extends the Jaccard loss to probabilities: Berman et al. 2018, arXiv 1705.08790.
    """
    images = pixels.logits.T[None, :, None]  # (1, 4, 1, N)
    return LovaszLoss(MULTICLASS_MODE)(images, likeliest_class(pixels)[None, None])


def likeliest_class(pixels: LabelledPixels) -> Tensor:
    """Return (N,) int64: the allowed class that the network finds likeliest; for certain labels the class."""
    return pixels.logits.detach().masked_fill(~pixels.allowed, -torch.inf).argmax(dim=-1)


def border_pairs(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return which pairs of label codes surely differ in class, and which are glacier beside debris.

    Both (256, 256) bool and symmetric. Codes that share a class (glacier, glacier or debris) may show the
    same, and one without a class (nodata) shows nothing: no border in either case.

    Args:
        table: (256, 4) bool, `prep.labels.allowed_classes`.
    """
    known = table.any(dim=-1)
    disjoint = (table.float() @ table.float().T) == 0
    interface = torch.zeros_like(disjoint)
    interface[INTERFACE], interface[INTERFACE[::-1]] = True, True
    return disjoint & known[:, None] & known[None, :], interface


def touching(codes: Tensor, pairs: Tensor) -> Tensor:
    """Return (B, H, W) bool: the pixel and one of its four neighbours have codes that `pairs` names.

    Args:
        codes: (B, H, W) uint8 label codes.
        pairs: (256, 256) bool, symmetric.
    """
    codes = codes.long()
    found = torch.zeros_like(codes, dtype=torch.bool)
    below = pairs[codes[:, 1:], codes[:, :-1]]
    found[:, 1:] |= below
    found[:, :-1] |= below
    right = pairs[codes[:, :, 1:], codes[:, :, :-1]]
    found[:, :, 1:] |= right
    found[:, :, :-1] |= right
    return found


class BorderWeights(nn.Module):
    """Weights of pixels by their distance d to class borders in label codes.

    exp(-d / sigma), and `interface_weight` times as much of the distance to a border of glacier and debris,
    whichever is larger; d in pixels, 0 for the pixels on either side of the border, weight 0 beyond REACH
    sigmas. Weights that fall with the distance: Ronneberger et al. 2015, arXiv 1505.04597.
    """

    borders: Tensor
    interface: Tensor

    def __init__(self, table: Tensor, sigma: float, interface_weight: float) -> None:
        """Take the table (256, 4) bool of allowed classes, sigma in pixels, and the interface's weight."""
        super().__init__()
        self.sigma = sigma
        self.interface_weight = interface_weight
        borders, interface = border_pairs(table)
        self.register_buffer("borders", borders, persistent=False)
        self.register_buffer("interface", interface, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Return weights (B, H, W) float32 of label codes (B, H, W) uint8."""
        weights = self._near(touching(codes, self.borders))
        interface = touching(codes, self.interface)
        if interface.any():
            weights = torch.maximum(weights, self.interface_weight * self._near(interface))
        return weights

    def _near(self, marked: Tensor) -> Tensor:
        return torch.exp(-distance_to(marked, math.ceil(REACH * self.sigma)) / self.sigma)


class BorderSoftening(nn.Module):
    """How much of a pixel's target moves to the label across a border, where borders are drawn inexactly.

    If the label map is off by a Gaussian shift of `sigma` pixels, the label at a pixel is really another one
    with the share that this label has in the pixel's Gaussian neighbourhood: for a straight border at
    distance d, Phi(-d / sigma), a half at the border itself. `largest` is what a half becomes, so 0.5 is
    this model and less moves proportionally less; no pixel moves more than `largest`.

    Of several labels around only the most frequent one counts, and only one that surely differs from the
    pixel's own: sets that share a class with it are no evidence of another class.
    """

    borders: Tensor

    def __init__(self, table: Tensor, sigma: float, largest: float) -> None:
        """Take the table (256, 4) bool of allowed classes, sigma in pixels, and the largest share."""
        super().__init__()
        self.largest = largest
        self.reach = math.ceil(BLUR_REACH * sigma)
        offsets = torch.arange(-self.reach, self.reach + 1, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        self.kernel = (kernel / kernel.sum()).tolist()
        self.register_buffer("borders", border_pairs(table)[0], persistent=False)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares that move (B, H, W) float32, and the codes that they move to (B, H, W) uint8.

        Where nothing moves, the share is 0 and the code the pixel's own. `codes` (B, H, W) uint8; pixels
        without a label count neither as neighbours nor move.
        """
        known = [code for code in CODE_CLASSES if (codes == code).any()]
        if len(known) < 2:
            return torch.zeros(codes.shape, device=codes.device), codes
        around = torch.stack([self._blur((codes == code).float()) for code in known])  # (K, B, H, W)
        differs = self.borders[torch.tensor(known, device=codes.device)[:, None, None, None], codes.long()]
        most, label = (around * differs).max(dim=0)
        share = most / around.sum(dim=0).clamp(min=SMALLEST)
        moved = (2 * share).clamp(max=1) * self.largest
        across = torch.tensor(known, dtype=torch.uint8, device=codes.device)[label]
        return moved, torch.where(moved > 0, across, codes)

    def _blur(self, values: Tensor) -> Tensor:
        """Return the Gaussian mean of (B, H, W), 0 beyond the edges."""
        for dim in (1, 2):
            blurred = values * self.kernel[self.reach]
            length = values.shape[dim]
            for offset in range(1, min(self.reach, length - 1) + 1):
                weight = self.kernel[self.reach + offset]
                for here, there in ((0, offset), (offset, 0)):
                    neighbour = values.narrow(dim, there, length - offset)
                    blurred.narrow(dim, here, length - offset).add_(neighbour, alpha=weight)
            values = blurred
        return values


class SetLoss(nn.Module):
    """Weighted sum of losses on logits (B, 4, H, W) and label codes (B, H, W)."""

    table: Tensor
    class_weights: Optional[Tensor]

    def __init__(self, config: LossConfig) -> None:
        """Take weights and exponents from the config."""
        super().__init__()
        self.config = config
        table = torch.from_numpy(allowed_classes()) > 0
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("class_weights", _to_weights(config.class_weights), persistent=False)
        self.border_weights = BorderWeights(table, config.boundary_sigma, config.interface_weight)
        self.softening = BorderSoftening(table, config.border_sigma, config.border_smoothing)

    def forward(self, logits: Tensor, codes: Tensor, epochs: float = math.inf) -> Tensor:
        """Return the loss, 0 (with a gradient of 0) where no pixel has a label.

        Args:
            logits: (B, 4, H, W).
            codes: (B, H, W) uint8 label codes.
            epochs: of training so far, with fractions, for the ramp of the boundary term.
        """
        pixels = labelled_pixels(logits, codes, self.table)
        if len(pixels.logits) == 0:
            return logits.float().sum() * 0.0
        config = self.config
        if config.border_smoothing:
            pixels = pixels._replace(softened=self._softened(codes))
        loss = logits.new_zeros((), dtype=torch.float32)
        if config.focal:
            loss = loss + config.focal * focal_loss(pixels, config.gamma, self.class_weights)
        if config.dice:
            loss = loss + config.dice * dice_loss(pixels)
        if config.mcc:
            loss = loss + config.mcc * mcc_loss(pixels)
        if config.boundary:
            weight = config.boundary * ramp(epochs, config.boundary_ramp_epochs)
            loss = loss + weight * boundary_loss(pixels, self._weights_of(codes))
        if config.tversky:
            loss = loss + config.tversky * tversky_loss(pixels, config.tversky_alpha, config.tversky_beta)
        if config.lovasz:
            loss = loss + config.lovasz * lovasz_loss(pixels)
        return loss

    def _softened(self, codes: Tensor) -> Softened:
        """Return the softened ones of the pixels that `labelled_pixels` keeps."""
        labelled = rows_with_label(codes, self.table)
        share, across = (part.flatten().index_select(0, labelled) for part in self.softening(codes))
        rows = share.nonzero()[:, 0]
        return Softened(rows, self.table[across[rows].long()], share[rows])

    def _weights_of(self, codes: Tensor) -> Tensor:
        """Return the border weights (N,) of the pixels that `labelled_pixels` keeps."""
        return self.border_weights(codes).flatten().index_select(0, rows_with_label(codes, self.table))


def ramp(epochs: float, length: int) -> float:
    """Return the share, 0 to 1, of a linear rise over `length` epochs that is done after `epochs`."""
    return min(1.0, epochs / length) if length else 1.0


def _to_weights(weights: Optional[Sequence[float]]) -> Optional[Tensor]:
    return None if weights is None else torch.tensor(list(weights), dtype=torch.float32)
