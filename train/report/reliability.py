"""How far probabilities of glacier can be believed: the reliability diagram and its calibration error.

The expected calibration error is that of Guo et al. 2017, "On calibration of modern neural networks"
(arXiv 1706.04599, equation 3): bins of equal width, each weighted by its pixels; here on the probability of
glacier of either kind rather than on that of the winning class.
"""

from __future__ import annotations

from typing import Iterable, NamedTuple

import numpy as np

from prep.labels import IGNORE
from train.objective import DEBRIS, GLACIER, GLACIER_CODES

BINS = 15


class Reliability(NamedTuple):
    """Pixels in bins of equal width of the probability of glacier; those of several tiles add up.

    `pixels`, `glacier`: (bins,) int64 counts, of all pixels and of those labelled glacier. `probability`: (bins,)
    float64 sums of their probabilities.
    """

    pixels: np.ndarray
    glacier: np.ndarray
    probability: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance of the share of glacier from its probability, weighted by pixels (0 is best)."""
        return float(np.abs(self.glacier - self.probability).sum() / max(1, self.pixels.sum()))


def count_reliability(codes: np.ndarray, probs: np.ndarray, bins: int = BINS) -> Reliability:
    """Count a tile's labelled pixels by their probability of glacier of either kind.

    Args:
        codes: (H, W) label codes, 255 where ignored.
        probs: (4, H, W) class probabilities; those of a pixel need not sum to 1 exactly.
        bins: how many, of equal width over 0..1; each holds its lower edge, the last one also 1.
    """
    labelled = codes != IGNORE
    chosen = probs[:, labelled].astype(np.float64)
    glacier = np.isin(codes[labelled], GLACIER_CODES)
    share = chosen[[GLACIER, DEBRIS]].sum(axis=0) / chosen.sum(axis=0)
    place = np.minimum((share * bins).astype(int), bins - 1)
    return Reliability(
        np.bincount(place, minlength=bins),
        np.bincount(place[glacier], minlength=bins),
        np.bincount(place, share, minlength=bins),
    )


def pool_reliability(tiles: Iterable[Reliability]) -> Reliability:
    """Add up the counts of some tiles, at least one."""
    return Reliability(*(np.sum(parts, axis=0) for parts in zip(*tiles)))
