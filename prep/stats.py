"""Mean and standard deviation of each band over valid pixels: exact, in float64, tile by tile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, Mapping

import numpy as np

from solution import BANDS, KitError

if TYPE_CHECKING:
    from prep.store import TileStore

IMAGENET = (0.406, 0.456, 0.485)  # means of blue, green and red in guides
PLAUSIBLE = {"reflectance": (-0.2, 1.6), "kelvin": (200, 330)}  # means of a band


class StatsError(KitError):
    """No statistics can be computed; the message names the band."""


class BandAccumulator:
    """Running count, mean and sum of squared deviations per band.

    Tiles are merged with the pairwise update of Chan, Golub and LeVeque (1979, STAN-CS-79-773). A sum of
    squares would cancel for kelvins, which vary little around 256.
    """

    def __init__(self) -> None:
        self._count = np.zeros(len(BANDS), dtype=np.int64)
        self._mean = np.zeros(len(BANDS))
        self._squares = np.zeros(len(BANDS))

    def add(self, image: np.ndarray) -> None:
        """Take in an image (H, W, 5) in physical units; NaN is nodata and left out band by band."""
        if image.ndim != 3 or image.shape[-1] != len(BANDS):
            raise StatsError(f"an image of shape (H, W, {len(BANDS)}) was expected, not {image.shape}")
        for band in range(len(BANDS)):
            values = image[..., band].astype(np.float64)
            self._merge(band, values[~np.isnan(values)])

    def _merge(self, band: int, values: np.ndarray) -> None:
        if values.size:
            mean = values.mean()
            self._combine(band, values.size, mean, ((values - mean) ** 2).sum())

    def _combine(self, band: int, count: int, mean: float, squares: float) -> None:
        total = self._count[band] + count
        shift = mean - self._mean[band]
        self._squares[band] += squares
        self._squares[band] += shift**2 * self._count[band] * (count / total)
        self._mean[band] += shift * (count / total)
        self._count[band] = total

    def state(self) -> dict[str, list]:
        """Return all that was taken in, as numbers that JSON keeps exactly, for `absorb`."""
        arrays = {"count": self._count, "mean": self._mean, "squares": self._squares}
        return {name: array.tolist() for name, array in arrays.items()}

    def absorb(self, state: Mapping[str, list]) -> None:
        """Take in another accumulator's `state`, as if its images had been added here."""
        for band, (count, mean, squares) in enumerate(zip(state["count"], state["mean"], state["squares"])):
            if count:
                self._combine(band, count, mean, squares)

    def result(self) -> dict[str, list]:
        """Return {"mean", "std", "count"}, each a list of 5; std is the population's (numpy's default).

        Raises StatsError where a band has no valid pixel at all.
        """
        empty = [f"{band.folder} ({band.name})" for band, count in zip(BANDS, self._count) if count == 0]
        if empty:
            raise StatsError(f"no valid pixel in {', '.join(empty)}: check the files that hold these bands")
        std = np.sqrt(self._squares / self._count)
        return {"mean": self._mean.tolist(), "std": std.tolist(), "count": self._count.tolist()}


def band_statistics(images: Iterable[np.ndarray]) -> dict[str, list]:
    """Return {"mean", "std", "count"} per band over valid pixels of images (H, W, 5) in physical units."""
    accumulator = BandAccumulator()
    for image in images:
        accumulator.add(image)
    return accumulator.result()


def compute(store: TileStore, tile_ids: Iterable[str]) -> dict[str, list]:
    """Return the statistics of these tiles of a store, e.g. a fold's training side, as in stats.json."""
    return describe(band_statistics(store.image(tile_id) for tile_id in tile_ids))


def describe(statistics: dict[str, list]) -> dict[str, list]:
    """Add the names and units of the bands: the content of stats.json."""
    return {"bands": [band.name for band in BANDS], "units": [band.unit for band in BANDS], **statistics}


def plausible(statistics: Mapping[str, list]) -> str:
    """Return the bands' means as text. Raises StatsError where they are ImageNet's, or in other units than ours."""
    found = np.round(statistics["mean"], 3)
    low, high = np.transpose([PLAUSIBLE[band.unit] for band in BANDS])
    if not ((low < found) & (found < high)).all() or np.allclose(np.sort(found[:3]), IMAGENET, atol=0.01):
        raise StatsError(
            f"found means {found.tolist()}, expected those of the tiles, reflectance and kelvin, and not ImageNet's; "
            "make the store again with python -m prep, and train again"
        )
    return f"means {found.tolist()}"


def format_table(statistics: dict[str, list]) -> str:
    """Return the statistics as a text table, one band a line."""
    lines = [f"{'band':<10}{'unit':<13}{'mean':>11}{'std':>11}{'valid pixels':>15}"]
    for band, mean, std, count in zip(BANDS, statistics["mean"], statistics["std"], statistics["count"]):
        lines.append(f"{band.name:<10}{band.unit:<13}{mean:>11.4f}{std:>11.4f}{count:>15,}")
    return "\n".join(lines)
