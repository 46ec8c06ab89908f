"""The table of label codes."""

import numpy as np

from prep.labels import CODE_CLASSES, CODE_NAMES, IGNORE, allowed_classes, count_codes


def test_allowed_classes_mark_exactly_the_classes_of_each_code():
    table = allowed_classes()
    assert table.shape == (256, 4)
    assert table.dtype == np.float32
    assert np.array_equal(table[:4], np.eye(4))
    assert table[4].tolist() == [0, 1, 1, 0]
    assert table[5].tolist() == [1, 0, 0, 1]


def test_ignore_and_unknown_codes_allow_nothing():
    table = allowed_classes()
    unknown = [code for code in range(256) if code not in CODE_CLASSES]
    assert IGNORE in unknown
    assert not table[unknown].any()


def test_count_codes_agrees_with_unique():
    mask = np.random.default_rng(0).choice(list(CODE_NAMES), size=(40, 30)).astype(np.uint8)
    values, counts = np.unique(mask, return_counts=True)
    assert count_codes(mask) == {CODE_NAMES[value]: count for value, count in zip(values, counts)}
    assert list(count_codes(mask)) == [
        "other",
        "glacier",
        "debris",
        "lake",
        "glacier_or_debris",
        "other_or_lake",
        "ignore",
    ]
