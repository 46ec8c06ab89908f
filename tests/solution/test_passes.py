"""Views, averages, padding and windows: what happens between a normalised tile and its class indices."""

import time

import numpy as np
import pytest
import torch
from support import NORMALIZATION, PLAIN, in_memory
from torch import nn

import solution


def pixelwise(seed: int) -> nn.Module:
    """Return a network that looks at single pixels only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(5, 1, 1)


def local(seed: int) -> nn.Module:
    """Return a network whose answer depends on the direction in which it looks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(5, 1, 3, padding=1)


class Constant(nn.Module):
    """Answers the same logit everywhere, and keeps the sizes it was shown."""

    def __init__(self, logit=1.0):
        super().__init__()
        self.logit = logit
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape[2:]))
        return torch.full((len(x), 1, *x.shape[2:]), self.logit)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a tile in physical units without nodata, (H, W, 5) float32."""
    noise = np.random.default_rng(seed).normal(0, 1, (height, width, 5)).astype(np.float32)
    return noise * np.float32(NORMALIZATION["std"]) + np.float32(NORMALIZATION["mean"])


def network_input(image: np.ndarray) -> np.ndarray:
    """Return (5, H, W) float32 normalised bands, worked out apart from solution.normalize."""
    channels = [(image[..., i] - NORMALIZATION["mean"][i]) / NORMALIZATION["std"][i] for i in range(image.shape[2])]
    return np.stack(channels).astype(np.float32)


def of_classes(logits: np.ndarray, debris: float = 0.0) -> np.ndarray:
    """Return probabilities (4, H, W) of logits (1, H, W) of glacier, worked out apart from solution."""
    extent = 1 / (1 + np.exp(-logits[0].astype(np.float64)))
    return np.stack([1 - extent, extent * (1 - debris), extent * debris, 0 * extent])


def answer(network: nn.Module, x: np.ndarray) -> np.ndarray:
    """Return a network's (1, H, W) logits for (5, H, W)."""
    with torch.no_grad():
        return network(torch.from_numpy(np.ascontiguousarray(x))[None])[0].numpy()


# --- Views ----------------------------------------------------------------------------------------

NUMPY_VIEWS = {
    "identity": (lambda a: a, lambda a: a),
    "horizontal flip": (lambda a: a[..., ::-1], lambda a: a[..., ::-1]),
    "vertical flip": (lambda a: a[..., ::-1, :], lambda a: a[..., ::-1, :]),
    "rotation 90": (lambda a: np.rot90(a, 1, (1, 2)), lambda a: np.rot90(a, 3, (1, 2))),
    "rotation 180": (lambda a: np.rot90(a, 2, (1, 2)), lambda a: np.rot90(a, 2, (1, 2))),
    "rotation 270": (lambda a: np.rot90(a, 3, (1, 2)), lambda a: np.rot90(a, 1, (1, 2))),
}


@pytest.mark.parametrize("shape", [(2, 3, 4, 7), (1, 1, 7, 4), (1, 2, 5, 5)])
def test_views_invert_exactly_and_are_distinct(shape):
    x = torch.arange(int(np.prod(shape))).reshape(shape)
    seen = set()
    for view in solution.VIEWS:
        there = view.forward(x)
        assert torch.equal(view.inverse(there), x), view.name
        assert sorted(there.shape[2:]) == sorted(shape[2:])
        seen.add((tuple(there.shape), tuple(there.flatten().tolist())))
    assert len(seen) == len(solution.VIEWS) == 6


def test_views_are_what_their_names_say():
    x = torch.arange(2 * 4 * 7).reshape(2, 4, 7)
    assert [view.name for view in solution.VIEWS] == list(NUMPY_VIEWS)
    for view in solution.VIEWS:
        np.testing.assert_array_equal(view.forward(x[None])[0].numpy(), NUMPY_VIEWS[view.name][0](x.numpy()))


# --- Averages -------------------------------------------------------------------------------------


def test_members_are_averaged_with_their_weights():
    image, networks = random_image(32, 64), (pixelwise(1), pixelwise(2))
    model = in_memory(*networks, weights=(1.0, 3.0))
    probs = solution.predict_window(model, image)[0]
    first, second = (of_classes(answer(network, network_input(image))) for network in networks)
    np.testing.assert_allclose(probs, (first + 3 * second) / 4, atol=1e-5)
    assert probs.dtype == np.float32


@pytest.mark.parametrize("count", [1, 2, 6])
def test_views_are_averaged(count):
    image, network = random_image(32, 64), local(3)
    model = in_memory(network, views=count)
    probs = solution.predict_window(model, image)[0]
    x, there_and_back = network_input(image), list(NUMPY_VIEWS.values())[:count]
    expected = np.mean([back(of_classes(answer(network, there(x)))) for there, back in there_and_back], axis=0)
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    if count > 1:
        assert np.abs(probs - of_classes(answer(network, x))).max() > 0.01


def test_each_member_gets_its_own_statistics():
    image, network = random_image(32, 32), pixelwise(1)
    other = {"mean": [0.1] * 5, "std": [2.0, 1.0, 1.0, 1.0, 50.0]}
    model = in_memory(network)._replace(members=(solution.Member(network, 1.0, other),))
    x = ((image - np.float32(other["mean"])) / np.float32(other["std"])).transpose(2, 0, 1)
    probs = solution.predict_window(model, image)[0]
    np.testing.assert_allclose(probs, of_classes(answer(network, x)), atol=1e-5)


def test_biases_are_added_to_the_logits():
    image, steps = random_image(32, 32), PLAIN._replace(extent_bias=-0.5, debris_bias=2.0)
    model = in_memory(Constant(1.0), kind=Constant(-1.0), postprocess=steps)
    extent, debris = 1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(-1.0))
    expected = [1 - extent, extent * (1 - debris), extent * debris, 0]
    np.testing.assert_allclose(solution.predict_window(model, image)[0][:, 3, 4], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ((0.4, 0.3, 0.3, 0.0), 1),  # glacier of either kind outweighs other
        ((0.4, 0.2, 0.4, 0.0), 2),
        ((0.3, 0.4, 0.0, 0.3), 0),  # so does the rest
        ((0.2, 0.1, 0.1, 0.6), 3),
    ],
)
def test_extent_is_decided_before_kind(probs, expected):
    decided = solution.decide_classes(np.array(probs, np.float32).reshape(4, 1, 1))
    assert decided.dtype == np.uint8
    assert decided.item() == expected


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "padded"),
    [(1, 1, (32, 32)), (32, 64, (32, 64)), (33, 70, (64, 96)), (31, 65, (32, 96))],
)
def test_padding_reaches_the_next_multiple_of_32(height, width, padded):
    x = torch.rand(1, 5, height, width) + 1
    result = solution.pad_to_multiple(x)
    assert tuple(result.shape[2:]) == padded
    assert torch.equal(result[..., :height, :width], x)
    assert result.sum() == pytest.approx(float(x.sum()), rel=1e-5)  # nothing but zeros was added


@pytest.mark.parametrize("size", [(1, 1), (33, 70), (31, 65), (20, 300)])
def test_odd_sizes_come_back_as_they_were(size):
    image, network, seen = random_image(*size), pixelwise(4), Constant()
    classes = solution.predict_classes(in_memory(network, views=6), image)[0]
    assert classes.shape == size and classes.dtype == np.uint8
    probs = of_classes(answer(network, network_input(image)))
    np.testing.assert_array_equal(classes, solution.decide_classes(probs))
    solution.predict_classes(in_memory(seen, views=6), image)
    assert all(side % 32 == 0 for shape in seen.shapes for side in shape)


def test_a_tile_without_any_value_is_background_without_a_pass():
    seen = Constant()
    image = np.full((40, 50, 5), np.nan, np.float32)
    assert (solution.predict_classes(in_memory(seen), image)[0] == 0).all()
    assert seen.shapes == []


def test_nodata_is_background_and_pixels_with_a_missing_band_are_not():
    image = random_image(32, 32)
    image[:4] = np.nan
    image[10, 10, :4] = np.nan
    classes = solution.predict_classes(in_memory(Constant()), image)[0]
    assert (classes[:4] == 0).all() and (classes[4:] == 1).all()


# --- Large scenes ---------------------------------------------------------------------------------


def test_windows_cover_every_length_and_overlap():
    for length in [*range(1, 40), *range(500, 2100)]:
        starts = solution.window_starts(length)
        assert starts[0] == 0 and starts == sorted(set(starts))
        assert starts[-1] == max(length - solution.WINDOW, 0)
        assert all(b - a <= solution.WINDOW - solution.OVERLAP for a, b in zip(starts, starts[1:]))


def test_blend_weights_rise_from_the_edges_and_are_never_zero():
    weights = solution.blend_weights(solution.WINDOW, 300)
    assert weights.shape == (solution.WINDOW, 300) and weights.min() > 0 and weights.max() == 1
    np.testing.assert_array_equal(weights, weights[::-1, ::-1])
    assert (np.diff(weights[: solution.OVERLAP, 150]) > 0).all()


@pytest.mark.parametrize("size", [(1100, 300), (300, 1100), (1030, 1200)])
def test_a_constant_answer_leaves_no_seams(size):
    seen = Constant()
    scores = solution.predict_scene(in_memory(seen), random_image(*size))[0]
    shares = scores / scores.sum(axis=0)
    expected = of_classes(np.full((1, 1, 1), seen.logit))
    np.testing.assert_allclose(shares, np.broadcast_to(expected, shares.shape), atol=1e-5)
    assert max(max(shape) for shape in seen.shapes) <= solution.WINDOW  # bounded memory


@pytest.mark.parametrize("size", [(1100, 300), (1030, 1200)])
def test_windows_of_a_pixelwise_network_equal_one_pass(size):
    image, network = random_image(*size), pixelwise(5)
    image[200:260, 100:180] = np.nan
    classes = solution.predict_classes(in_memory(network), image)[0]
    logits = answer(network, np.nan_to_num(network_input(image)))
    expected = np.where(np.isnan(image).all(axis=-1), 0, solution.decide_classes(of_classes(logits)))
    top = np.sort(of_classes(logits), axis=0)
    clear = top[-1] - top[-2] > 1e-4  # blending may round a tie either way
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(classes[clear], expected[clear])


def test_scenes_are_cut_into_windows_only_above_the_limit():
    for size, most in (
        (solution.LARGEST_TILE, solution.LARGEST_TILE),
        (solution.LARGEST_TILE + 1, solution.WINDOW),
    ):
        seen = Constant()
        assert (solution.predict_classes(in_memory(seen), random_image(size, 40))[0] == 1).all()
        assert max(max(shape) for shape in seen.shapes) == most


def test_a_window_without_values_does_not_touch_its_neighbours():
    image = random_image(1100, 200)
    image[:520] = np.nan
    classes = solution.predict_classes(in_memory(Constant()), image)[0]
    assert (classes[:520] == 0).all() and (classes[520:] == 1).all()


def test_a_pass_that_is_known_to_be_slow_is_not_begun():
    model = in_memory(pixelwise(0), pixelwise(1), views=2)._replace(pace={1: 1.0})
    image = np.full((64, 64, 5), 0.5, np.float32)
    soon = time.perf_counter() + 1000  # s; a pass of member 1 is said to take 64 * 64

    def made(*passes: tuple[int, int]) -> int:
        pairs = [tuple(one) for one in passes]
        return solution.extent_probability(model, image, pairs, soon)[1]

    assert made((0, 0), (1, 0)) == 1
    assert 0 < model.pace[0] < 1, "what the first member took was learned"
    assert made((0, 0), (0, 1), (1, 0)) == 2
