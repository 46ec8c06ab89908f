"""The one table of label codes: what a mask pixel says about the four classes of the competition."""

from __future__ import annotations

import numpy as np

from solution import CLASS_NAMES

IGNORE = 255
GLACIER_OR_DEBRIS = 4
OTHER_OR_LAKE = 5

# Codes 0-3 are certain labels; 4 is a phase-1 glacier (clean or debris-covered), 5 the background of the HKH
# data set, which has no lakes. A phase-1 zero is stored as 0 and not as 5: lakes cover 0.05 % of the area,
# and as a set it would leave the lake class without a single negative example.
CODE_CLASSES: dict[int, tuple[int, ...]] = {
    0: (0,),
    1: (1,),
    2: (2,),
    3: (3,),
    GLACIER_OR_DEBRIS: (1, 2),
    OTHER_OR_LAKE: (0, 3),
}

CODE_NAMES: dict[int, str] = {
    code: "_or_".join(CLASS_NAMES[index] for index in classes) for code, classes in CODE_CLASSES.items()
} | {IGNORE: "ignore"}


def allowed_classes() -> np.ndarray:
    """Return the lookup from code to allowed classes.

    Shape (256, 4), float32, 0 or 1: row `code` marks the classes that the pixel may belong to. Rows of
    `IGNORE` and of codes that no label uses are all zero, so `allowed_classes()[mask]` weights them out.
    """
    table = np.zeros((256, len(CLASS_NAMES)), dtype=np.float32)
    for code, classes in CODE_CLASSES.items():
        table[code, list(classes)] = 1.0
    return table


def count_codes(mask: np.ndarray) -> dict[str, int]:
    """Count the pixels of each code in a uint8 mask; the keys are the values of `CODE_NAMES`."""
    counts = np.bincount(np.asarray(mask, dtype=np.uint8).ravel(), minlength=256)
    return {name: int(counts[code]) for code, name in CODE_NAMES.items()}
