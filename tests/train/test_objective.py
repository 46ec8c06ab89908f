"""Scores are those of scikit-learn where it has them; sets, ignored pixels, gaps and doubt are as documented."""

import json

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score, matthews_corrcoef, precision_score, recall_score
from train_helpers import make_store

from prep.labels import GLACIER_OR_DEBRIS, IGNORE, OTHER_OR_LAKE
from prep.store import TileStore
from train import objective as metrics


def count(codes, predicted) -> np.ndarray:
    """Return the (6, 4) counts of label code against predicted class."""
    return metrics.count_blocks(codes, predicted).sum(axis=0)


def correlated_labels(seed, classes, size=4000):
    """Return random labels and predictions of `classes` classes that agree more often than by chance."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, size, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    predicted = np.where(rng.random(size) < 0.6, labels, rng.integers(0, classes, size))
    return labels, predicted


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_mcc_equals_scikit_learn(classes, seed):
    labels, predicted = correlated_labels(seed, classes)
    expected = matthews_corrcoef(labels, predicted)
    assert metrics.mcc(sklearn_confusion(labels, predicted)) == pytest.approx(expected, abs=1e-12)
    coded = count(labels, predicted)
    assert metrics.mcc(metrics.four_class(coded)) == pytest.approx(expected, abs=1e-12)


def test_mcc_of_a_whole_data_set_does_not_overflow():
    # 25 tiles of 512 x 512: the product of the two variances is near 1e27, beyond 64 bits
    confusion = np.array([[4_000_000, 400_000], [500_000, 1_650_000]])
    weights = confusion.ravel()
    expected = matthews_corrcoef([0, 0, 1, 1], [0, 1, 0, 1], sample_weight=weights / weights.sum())
    assert metrics.mcc(confusion) == pytest.approx(expected, abs=1e-12)
    assert metrics.mcc(confusion) == pytest.approx(metrics.mcc(confusion // 1000), abs=1e-12)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize(
    ("labels", "predicted"),
    [([0, 0, 0], [0, 0, 0]), ([0, 0, 0], [0, 1, 2]), ([0, 1, 2], [3, 3, 3]), ([1, 1], [1, 1])],
)
def test_mcc_is_zero_where_scikit_learn_has_it_zero(labels, predicted):
    assert matthews_corrcoef(labels, predicted) == 0
    assert metrics.mcc(metrics.four_class(count(labels, predicted))) == 0


def test_mcc_of_nothing_and_of_the_best_and_the_worst():
    assert metrics.mcc(np.zeros((4, 4), int)) == 0
    assert metrics.mcc(np.diag([3, 2, 1, 1])) == 1
    assert metrics.mcc(np.array([[0, 5], [5, 0]])) == -1


@pytest.mark.parametrize("seed", range(3))
def test_ratios_equal_scikit_learn(seed):
    labels, predicted = correlated_labels(seed, 4)
    confusion = metrics.four_class(count(labels, predicted))
    for ours, theirs in (
        (metrics.iou, jaccard_score),
        (metrics.precision, precision_score),
        (metrics.recall, recall_score),
    ):
        np.testing.assert_allclose(ours(confusion), theirs(labels, predicted, average=None), atol=1e-12)


def test_ratios_of_absent_classes_are_undefined_not_zero():
    confusion = metrics.four_class(count([0, 0, 1], [0, 2, 1]))
    np.testing.assert_array_equal(metrics.iou(confusion), [0.5, 1, 0, np.nan])
    np.testing.assert_array_equal(metrics.precision(confusion), [1, 1, 0, np.nan])
    np.testing.assert_array_equal(metrics.recall(confusion), [0.5, 1, np.nan, np.nan])


def test_confusion_counts_codes_against_classes_and_leaves_ignored_pixels_out():
    codes = np.array([[0, 1, 2, 3, 4], [4, 5, 5, IGNORE, IGNORE]], np.uint8)
    predicted = np.array([[0, 1, 1, 0, 1], [2, 3, 1, 2, 0]], np.uint8)
    confusion = count(codes, predicted)
    expected = np.zeros((6, 4), int)
    for code, guess in [(0, 0), (1, 1), (2, 1), (3, 0), (4, 1), (4, 2), (5, 3), (5, 1)]:
        expected[code, guess] += 1
    np.testing.assert_array_equal(confusion, expected)
    assert confusion.dtype == np.int64


def test_binary_takes_each_set_to_the_side_it_lies_on():
    rng = np.random.default_rng(0)
    codes, predicted = rng.integers(0, 6, 3000), rng.integers(0, 4, 3000)
    glacier = np.isin(codes, [1, 2, GLACIER_OR_DEBRIS])
    assert not np.isin(OTHER_OR_LAKE, codes[glacier])
    expected = sklearn_confusion(glacier, np.isin(predicted, [1, 2]))
    np.testing.assert_array_equal(metrics.binary(count(codes, predicted)), expected)


def test_tiles_pool_by_addition():
    labels, predicted = correlated_labels(1, 4)
    halves = count(labels[:99], predicted[:99]) + count(labels[99:], predicted[99:])
    np.testing.assert_array_equal(halves, count(labels, predicted))


@pytest.mark.parametrize(("codes", "predicted"), [([6], [0]), ([85], [0]), ([0], [4]), ([0], [-1])])
def test_values_outside_the_tables_are_errors_that_name_them(codes, predicted):
    wrong = codes[0] if codes[0] else predicted[0]
    with pytest.raises(ValueError, match=rf"found \[{wrong}\]"):
        count(np.array(codes), np.array(predicted))


def test_shapes_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        count(np.zeros((2, 3), int), np.zeros((3, 2), int))


def score_by_hand(tiles):
    """Return the four MCC values of `score_tiles` from pixels, with scikit-learn."""
    found = {}
    for pixels in ("valid_pixels", "all_pixels"):
        codes = [np.where(codes == IGNORE, 0, codes) if pixels == "all_pixels" else codes for _, codes, _ in tiles]
        guesses = [np.where(codes == IGNORE, 0, guess) for _, codes, guess in tiles]
        kept = [values != IGNORE for values in codes]
        codes = [values[keep] for values, keep in zip(codes, kept)]
        guesses = [values[keep] for values, keep in zip(guesses, kept)]
        certain = [index for index, (labels, _, _) in enumerate(tiles) if labels == "phase2"]
        binary = np.isin(np.concatenate(codes), [1, 2, 4]), np.isin(np.concatenate(guesses), [1, 2])
        four = [np.concatenate([part[index] for index in certain]) for part in (codes, guesses)]
        found[pixels] = matthews_corrcoef(*binary), matthews_corrcoef(*four)
    return found


def test_scores_of_tiles_equal_those_of_their_pixels():
    rng = np.random.default_rng(3)
    tiles = []
    for labels, choices in (
        ("phase2", [0, 1, 2, 3, IGNORE]),
        ("phase1", [0, 4, IGNORE]),
        ("phase2", [0, 1, 2]),
    ):
        codes = rng.choice(choices, 500)
        truth = np.where(codes == 4, 1, np.where(codes == IGNORE, 0, codes))
        tiles.append((labels, codes, np.where(rng.random(500) < 0.5, truth, rng.integers(0, 4, 500))))
    counted = [metrics.count_tile("x", 0, *tile) for tile in tiles]
    scores = metrics.score_tiles(counted)
    for pixels, (binary, four) in score_by_hand(tiles).items():
        assert scores[pixels]["binary"]["mcc"] == pytest.approx(binary, abs=1e-12)
        assert scores[pixels]["four_class"]["mcc"] == pytest.approx(four, abs=1e-12)


def test_phase1_tiles_have_no_four_class_score_and_none_is_valid_json():
    tile = metrics.count_tile("x", 0, "phase1", np.array([0, 0, 4, IGNORE]), np.array([0, 1, 1, 3]))
    scores = metrics.score_tiles([tile])
    assert tile.ignored == 1
    assert scores["valid_pixels"]["four_class"] is None
    assert scores["all_pixels"]["binary"]["recall"]["rest"] == pytest.approx(2 / 3)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_code_names_follow_the_rows():
    assert metrics.code_names() == (
        "other",
        "glacier",
        "debris",
        "lake",
        "glacier_or_debris",
        "other_or_lake",
    )


def test_partial_labels_score_four_classes_on_their_certain_pixels():
    rng = np.random.default_rng(5)
    codes, predicted = rng.choice([0, 1, 2, 4, IGNORE], 900), rng.integers(0, 4, 900)
    certain = codes < 4
    phase1 = metrics.count_tile("x", 0, "phase1", np.zeros(900, int), predicted)
    scores = metrics.score_tiles([metrics.count_tile("y", 0, "partial", codes, predicted), phase1])
    four = scores["valid_pixels"]["four_class"]
    assert four["mcc"] == pytest.approx(matthews_corrcoef(codes[certain], predicted[certain]))
    ious = jaccard_score(codes[certain], predicted[certain], average=None)
    confusion = count(codes, predicted)
    assert four["iou"]["debris"] == metrics.debris_iou(confusion) == pytest.approx(ious[2])


# --- Blocks and intervals -----------------------------------------------------------------------------------


def test_a_tile_is_25_blocks_of_three_kilometres_that_add_up_to_it():
    rng = np.random.default_rng(0)
    codes, predicted = rng.integers(0, 6, (512, 512)), rng.integers(0, 4, (512, 512))
    blocks = metrics.count_blocks(codes, predicted)
    assert blocks.shape == (25, 6, 4)
    assert set(np.sqrt(blocks.sum(axis=(1, 2))).round().astype(int)) <= {102, 103}
    corner = count(codes[:103, 410:], predicted[:103, 410:])  # rows count before columns
    np.testing.assert_array_equal(blocks[4], corner)
    np.testing.assert_array_equal(blocks.sum(axis=0), count(codes, predicted))
    assert metrics.block_numbers((40, 250)).max() == 1, "1 x 2 blocks"


def noisy_tile(seed, right, labels="phase2", size=400):
    """Return the counts of a tile in blocks of 100 px; a pixel is predicted right with the chance of its block."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, (size, size))
    chance = np.clip(right + rng.normal(0, 0.1, 16), 0, 1)[metrics.block_numbers(codes.shape)]
    draw = np.random.default_rng(seed + 100)
    predicted = np.where(draw.random(codes.shape) < chance, codes, draw.integers(0, 4, codes.shape))
    return metrics.count_tile(f"{seed}", 0, labels, codes, predicted)


def test_an_interval_is_that_of_blocks_drawn_one_by_one():
    tiles = [noisy_tile(seed, 0.6) for seed in range(3)]
    blocks = np.concatenate([tile.blocks for tile in tiles])
    rng = np.random.default_rng(9)
    drawn = []
    for _ in range(1000):
        chosen = blocks[rng.integers(0, len(blocks), len(blocks))].sum(axis=0)
        drawn.append(metrics.mcc(metrics.binary(chosen)))
    found = metrics.score_intervals(tiles)["extent MCC"]
    assert found.value == metrics.mcc(metrics.binary(metrics.pool(tiles)))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.006)
    assert metrics.score_intervals(tiles)["extent MCC"] == found, "seeded"


def test_intervals_cover_the_truth_nineteen_times_in_twenty():
    blocks = np.stack([noisy_tile(seed, 0.6, size=200).blocks for seed in range(250)]).reshape(-1, 6, 4)
    truth = metrics.mcc(metrics.four_class(blocks.sum(axis=0)))
    covered = 0
    for start in range(0, 1000, 20):
        tile = metrics.TileCounts("x", 0, "phase2", blocks[start : start + 20], 0)
        interval = metrics.score_intervals([tile])["four-class MCC"]
        covered += interval.low <= truth <= interval.high
    assert 43 <= covered <= 50


def test_pairs_are_told_apart_where_single_intervals_overlap():
    worse, better = ([noisy_tile(seed, right) for seed in range(4)] for right in (0.60, 0.62))
    ours, theirs = (metrics.score_intervals(tiles)["extent MCC"] for tiles in (better, worse))
    assert ours.low < theirs.high
    gain = metrics.difference_intervals(better, worse)["extent MCC"]
    assert gain.value == pytest.approx(ours.value - theirs.value)
    assert 0 < gain.low < gain.value < gain.high
    assert metrics.difference_intervals(better, better)["extent MCC"] == (0, 0, 0)
    with pytest.raises(ValueError, match="the same in the same order"):
        metrics.difference_intervals(better, worse[::-1])


def test_scores_that_no_tile_has_have_no_interval():
    tiles = [noisy_tile(0, 0.6, "phase1")]
    assert metrics.score_intervals(tiles)["four-class MCC"] is None
    assert metrics.difference_intervals(tiles, tiles)["debris IoU"] is None
    bare = metrics.count_tile("x", 0, "phase2", np.array([0, 1, 1]), np.array([0, 1, 0]))
    assert metrics.score_intervals([bare])["debris IoU"] is None, "no debris in label or prediction"


def test_tiles_of_a_store_are_counted_with_their_labels_and_folds(tmp_path):
    store = TileStore(make_store(tmp_path / "store"))
    tiles = metrics.count_tiles(store, ["002", "001"], lambda name: store.mask(name) % 4, {"001": 3, "002": 1})
    assert [(tile.tile_id, tile.fold, tile.labels) for tile in tiles] == [
        ("002", 1, "phase2"),
        ("001", 3, "phase1"),
    ]
    assert tiles[0].confusion.sum() + tiles[0].ignored == store.mask("002").size
