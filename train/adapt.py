"""What adapting BatchNorm to each test tile would bring: a measurement, which nothing that is shipped uses.

A share of every BatchNorm's running statistics is replaced by those of the tile itself (adaptive BatchNorm:
Li et al. 2018, doi 10.1016/j.patcog.2018.03.005; blended: Schneider et al. 2020, arXiv 2006.16971).
`solution.py` merges BatchNorms into the convolutions before them, so it could not do this without giving that
up.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from tqdm import tqdm

from prep.store import TileStore
from solution import build_network, decide_classes, normalize, pad_to_multiple, prepare_torch, usable_cores
from train.evaluate import as_member, predict_views, read_folds, with_held_out
from train.files import write_text
from train.metrics import TileCounts, count_tile, score_tiles
from train.soup import estimate_batchnorm
from train.text import markdown_table, mcc_text

STATISTICS = ("running_mean", "running_var")


class Adapted(NamedTuple):
    """A run's scores over valid pixels, one view, with a share of the tiles' own statistics."""

    share: float
    binary: float
    four_class: float | None


def statistics_of(record: dict, image: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the means and variances that a fold's BatchNorms see in an image, by their names.

    Args:
        record: with weights.
        image: (H, W, 5) physical units, NaN where nodata.
    """
    network = build_network(record["arch"])
    network.load_state_dict(record["state_dict"])
    x = torch.from_numpy(normalize(image, record["normalization"]))[None]
    estimate_batchnorm(network, [pad_to_multiple(x)])
    return {name: value for name, value in network.state_dict().items() if name.endswith(STATISTICS)}


def blend(record: dict, statistics: dict[str, torch.Tensor], share: float) -> dict:
    """Return a fold's record with `share`, 0 to 1, of an image's statistics in its BatchNorms."""
    state = record["state_dict"]
    blended = {name: torch.lerp(state[name], value, share) for name, value in statistics.items()}
    return {**record, "state_dict": {**state, **blended}}


def measure_run(run_dir: Path, store: TileStore, shares: Sequence[float]) -> list[Adapted]:
    """Return the scores of a run on its held-out tiles with each of some shares, first without.

    Raises RunError for a run without finished folds.
    """
    prepare_torch(usable_cores())
    shares = [0.0, *shares]
    counts: list[list[TileCounts]] = [[] for _ in shares]
    labels = store.labels
    records = with_held_out(read_folds(run_dir))
    with tqdm(total=sum(len(record["val_tiles"]) for record in records), unit="tile") as bar:
        for record in records:
            for tile in record["val_tiles"]:
                image, codes = store.image(tile), store.mask(tile)
                statistics = statistics_of(record, image)
                for number, share in enumerate(shares):
                    member = as_member(blend(record, statistics, share))
                    probs = predict_views(member, image, views=1)[0].astype(np.float32)
                    classes = decide_classes(probs)
                    counts[number].append(count_tile(tile, record["fold"], labels[tile], codes, classes))
                bar.update()
    return [summarise(share, tiles) for share, tiles in zip(shares, counts)]


def summarise(share: float, tiles: Sequence[TileCounts]) -> Adapted:
    """Return the pooled scores of some tiles."""
    scores = score_tiles(tiles)["valid_pixels"]
    four_class = scores["four_class"]
    return Adapted(share, scores["binary"]["mcc"], four_class["mcc"] if four_class else None)


def write_report(path: Path, measured: dict[str, list[Adapted]], command: str) -> None:
    """Write the scores of some runs as a table, a row for each run and share."""
    rows = [
        [name, f"{row.share:g}", mcc_text(row.binary), mcc_text(row.four_class)]
        for name, rows_of_run in measured.items()
        for row in rows_of_run
    ]
    table = markdown_table(["run", "share of the tile's statistics", "binary", "four classes"], rows)
    write_text(
        path,
        f"""# BatchNorm adapted to each test tile

A share of every BatchNorm's running mean and variance is replaced by those of the tile that is predicted,
without its labels. Out-of-fold MCC over valid pixels, one view.

```sh
{command}
```

{table}
""",
    )
