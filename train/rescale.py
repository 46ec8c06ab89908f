"""A finished run asked in other sizes of its tiles, without training: `scales` of `solution.CoarseUnet`.

Training looks at the first scale only, so networks of the same weights can be asked in any others.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Mapping, Sequence

from train.evaluate import read_folds
from train.fit import RunError
from train.soup import write_record

MARK = "rescaled"  # key of a record that was made here: the run that it is of


def rescale_run(run_dir: Path, scales: Sequence[float], out: Path) -> None:
    """Write a run of the same networks, asked in `scales`; its scores are those that `evaluate` finds.

    Args:
        run_dir: a run with finished folds.
        scales: how many times as large a tile is looked at, see `solution.CoarseUnet`.
        out: folder of the run that is made.

    Raises:
        RunError: its networks have no scales, some scale is none, or `out` holds another run.
    """
    if not scales or min(scales) <= 0:
        raise RunError(f"--scales: found {list(scales)}, expected numbers above 0, such as 1,1.5")
    records = read_folds(run_dir)
    name = records[0]["arch"]["name"]
    if name != "CoarseUnet":
        raise RunError(f"{run_dir}: a run of {name}, expected CoarseUnet, which has scales")
    for record in records:
        write_record(out, {**rescaled(record, scales), MARK: str(run_dir)}, MARK)


def rescaled(record: Mapping, scales: Sequence[float]) -> dict:
    """Return the record of a fold with other scales, its scores unknown."""
    changed = copy.deepcopy({key: value for key, value in record.items() if key != "state_dict"})
    for args in (changed["arch"]["args"], changed["config"]["model"]["args"]):
        args["scales"] = list(scales)
    unknown = {"val_mcc": math.nan, "val_mcc4": math.nan}
    return {**changed, **unknown, "state_dict": record["state_dict"]}
