"""Inputs that the network derives from the bands: their formulas, and that nothing else is disturbed."""

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from support import NORMALIZATION, random_network
from train_helpers import make_store

import solution
from solution import (
    DERIVED_INPUTS,
    NODATA_REACH,
    RANGE_BANDS,
    VIEWS,
    CoarseUnet,
    DerivedInputs,
    InputError,
    normalize,
    range_features,
    with_surroundings,
)
from train.config import ConfigError, load_config
from train.fit import fit_fold
from train.pack import to_half
from train.predict import as_member, predict_views, read_fold
from train.pretrained import load_imagenet

SMOKE = Path(__file__).resolve().parents[2] / "train" / "configs" / "smoke.yaml"
LITE = "timm-tf_efficientnet_lite0"
ARCH = {"encoder_name": LITE, "derived": list(DERIVED_INPUTS)}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Return (70, 96, 5) physical units with a hole, a strip and single bands of nodata."""
    rng = np.random.default_rng(0)
    image = rng.uniform(-0.05, 1.2, (70, 96, 5)).astype(np.float32)
    image[..., 4] = rng.normal(256, 9, image.shape[:2])
    image[:, :5] = np.nan
    image[30:34, 40:52] = np.nan
    image[rng.random(image.shape) < 0.02] = np.nan
    return image


def derive(*names: str) -> DerivedInputs:
    layer = DerivedInputs(names)
    layer.set_units(NORMALIZATION)
    return layer


def as_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(normalize(image, NORMALIZATION))[None]


# --- The formulas -------------------------------------------------------------------------------------------


def test_bands_stay_as_they_are_and_maps_follow_in_order(image):
    x = as_batch(image)
    joined = derive(*DERIVED_INPUTS)(x)
    assert joined.shape == (1, 5 + len(DERIVED_INPUTS), 70, 96)
    assert torch.equal(joined[:, :5], x)
    for place, name in enumerate(DERIVED_INPUTS):
        assert torch.equal(derive(name)(x)[:, 5], joined[:, 5 + place])


def test_ndsi_is_that_of_the_reflectances(image):
    green, swir = image[..., 1].astype(np.float64), image[..., 3].astype(np.float64)
    expected = np.clip((green - swir) / np.maximum(green + swir, 0.05), -1, 1)
    found = derive("ndsi")(as_batch(image))[0, 5].numpy()
    assert found == pytest.approx(np.nan_to_num(expected, nan=0.0), abs=1e-3)


def test_ndsi_does_not_see_illumination(image):
    bright = image.copy()
    bright[..., :4] *= 1.3
    lit = np.nan_to_num(image[..., 1] + image[..., 3]) > 0.05  # below, it is damped
    before, after = (derive("ndsi")(as_batch(values))[0, 5].numpy() for values in (image, bright))
    assert after[lit] == pytest.approx(before[lit], abs=1e-3)


def test_temperature_is_that_above_the_median_in_units_of_the_band(image):
    kelvin = image[..., 4].astype(np.float64)
    expected = (kelvin - np.nanmedian(kelvin)) / NORMALIZATION["std"][4]
    found = derive("temperature_anomaly")(as_batch(image))[0, 5].numpy()
    # torch takes the lower of the two values in the middle, NumPy their mean
    assert found == pytest.approx(np.nan_to_num(expected, nan=0.0), abs=0.01)
    warm = image + np.array([0, 0, 0, 0, 20], np.float32)
    assert derive("temperature_anomaly")(as_batch(warm))[0, 5].numpy() == pytest.approx(found, abs=1e-4)


def test_each_image_of_a_batch_has_its_own_median(image):
    warm = image + np.array([0, 0, 0, 0, 20], np.float32)
    layer = derive("temperature_anomaly")
    together = layer(torch.cat([as_batch(image), as_batch(warm)]))
    assert torch.equal(together[:1], layer(as_batch(image)))
    assert torch.allclose(together[1, 5], together[0, 5], atol=1e-4)


def test_distance_is_euclidean_to_where_all_bands_are_missing(image):
    missing = np.isnan(image).all(axis=-1)
    expected = np.minimum(distance_transform_edt(~missing) / NODATA_REACH, 1)
    assert derive("nodata_distance")(as_batch(image))[0, 5].numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name, value", [("ndsi", 0), ("temperature_anomaly", 0), ("nodata_distance", 0)])
def test_an_image_without_data_has_plain_maps(name, value):
    assert (derive(name)(torch.zeros(2, 5, 64, 64))[:, 5] == value).all()


def test_without_nodata_the_distance_is_the_largest():
    assert (derive("nodata_distance")(torch.ones(1, 5, 64, 64))[:, 5] == 1).all()


@pytest.mark.parametrize("view", VIEWS, ids=range(len(VIEWS)))
def test_maps_turn_with_the_image(image, view):
    layer = derive(*DERIVED_INPUTS)
    x = as_batch(image)
    turned = layer(view.forward(x))
    assert torch.equal(view.inverse(turned), layer(x))


def test_padding_is_nodata_and_changes_no_units(image):
    layer = derive(*DERIVED_INPUTS)
    x = as_batch(image)
    inner = layer(solution.pad_to_multiple(x))[..., :70, :96]
    assert torch.equal(inner[:, :7], layer(x)[:, :7])
    near = 70 - NODATA_REACH
    assert torch.equal(inner[..., :near, :], layer(x)[..., :near, :])


def test_memory_format_and_precision_are_kept(image):
    layer = derive(*DERIVED_INPUTS)
    x = as_batch(image).repeat(2, 1, 1, 1)
    fast = layer(x.contiguous(memory_format=torch.channels_last))
    assert fast.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(fast, layer(x))
    assert fast.dtype == torch.float32


def test_an_unknown_map_is_named_with_those_that_are_known():
    with pytest.raises(InputError, match="derived input 'ndvi' is unknown, expected some of ndsi, temp"):
        CoarseUnet(encoder_name="resnet18", encoder_weights=None, derived=["ndsi", "ndvi"])


# --- In a network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CoarseUnet", "RefinedUnet"])
def test_merging_batchnorms_is_exact_and_answers_are_finite(name, image):
    network = random_network({"name": name, "args": ARCH})
    merged = copy.deepcopy(network)
    assert solution.merge_batchnorm(merged)
    x = solution.pad_to_multiple(as_batch(image))
    with torch.no_grad():
        before, after = network(x), merged(x)
    assert torch.allclose(before, after, atol=1e-3 * before.abs().max().item())
    with torch.no_grad():
        assert torch.isfinite(merged(torch.zeros(1, 5, 64, 64))).all()


def test_without_derived_inputs_the_state_dict_is_that_of_older_runs():
    network = CoarseUnet(in_channels=5, classes=4, encoder_name="resnet18", encoder_weights=None)
    assert all(key.startswith("unet.") for key in network.state_dict())


@pytest.mark.parametrize("derived", [["ndsi"], list(DERIVED_INPUTS)])
def test_from_imagenet_the_maps_weigh_nothing_at_first(derived, image):
    answers = []
    for names in ([], derived):
        torch.manual_seed(0)
        network = solution.build_network(
            {"name": "CoarseUnet", "args": {"encoder_name": LITE, "derived": names}}
        )
        load_imagenet(network, LITE)
        answers.append(network.unet.encoder)
    x = torch.randn(2, 5 + len(derived), 64, 64)
    with torch.no_grad():
        plain, more = answers[0].eval()(x[:, :5])[1:], answers[1].eval()(x)[1:]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, more))
    assert answers[1].state_dict()["conv_stem.weight"].shape[1] == 5 + len(derived)


# --- Ranges -------------------------------------------------------------------------------------------------


def test_ranges_are_those_that_pixel_networks_see(image):
    """An independent implementation, by OpenCV, in physical units: the same up to the unit of the band."""
    windows = (3, 9, 33)
    seen = with_surroundings(as_batch(image), windows, ())[0, 5:].numpy()
    units = np.repeat(np.asarray(NORMALIZATION["std"])[list(RANGE_BANDS)], 2 * len(windows))
    expected = np.stack(list(range_features(image, windows)))  # band, window, above and below
    expected = expected.reshape(len(RANGE_BANDS), len(windows), 2, *image.shape[:2]).swapaxes(1, 2)
    expected = expected.reshape(seen.shape) / units[:, None, None]
    assert seen == pytest.approx(np.nan_to_num(expected, nan=0.0), abs=1e-3)


def test_tophats_are_those_of_opencv():
    x = torch.randn(2, 5, 40, 56)
    windows = (3, 9, 17)
    seen = with_surroundings(x, (), windows)[:, 5:].unflatten(1, (len(RANGE_BANDS), 2, len(windows))).numpy()
    for image, maps in zip(x.numpy(), seen):
        for band, (white, black) in zip(RANGE_BANDS, maps):
            for number, window in enumerate(windows):
                square = np.ones((window, window), np.uint8)
                opened = cv2.morphologyEx(image[band], cv2.MORPH_TOPHAT, square)
                closed = cv2.morphologyEx(image[band], cv2.MORPH_BLACKHAT, square)
                np.testing.assert_array_equal(white[number], opened)
                np.testing.assert_array_equal(black[number], closed)


@pytest.mark.parametrize("ranges, tophats", [((5, 9), ()), ((), (3, 17)), ((9,), (5, 9))])
def test_what_is_seen_around_follows_the_bands_and_knows_no_direction(image, ranges, tophats):
    x = as_batch(image).contiguous(memory_format=torch.channels_last)
    seen = with_surroundings(x, ranges, tophats)
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen[:, :5], x)
    assert torch.equal(with_surroundings(x.flip(-1), ranges, tophats).flip(-1), seen)
    assert torch.isfinite(seen).all() and (seen[:, 5:] >= 0).all()
    missing = x[:, list(RANGE_BANDS)] == 0  # (1, bands, H, W)
    maps = [
        part.unflatten(1, (len(RANGE_BANDS), -1))
        for part in seen[:, 5:].split(
            [2 * len(RANGE_BANDS) * len(windows) for windows in (ranges, tophats)], dim=1
        )
        if part.shape[1]
    ]
    assert all((part == 0).all(dim=2)[missing].all() for part in maps)


@pytest.mark.parametrize("ranges, tophats", [((5, 9), ()), ((), (3, 17)), ((9,), (5, 9))])
def test_an_image_without_data_stands_out_of_nothing(ranges, tophats):
    assert (with_surroundings(torch.zeros(2, 5, 64, 64), ranges, tophats) == 0).all()


def test_a_network_sees_ranges_and_tophats_of_the_reduced_image(image):
    network = random_network({"name": "CoarseUnet", "args": {**ARCH, "ranges": [5, 9], "tophats": [7]}})
    merged = copy.deepcopy(network)
    assert solution.merge_batchnorm(merged)
    x = solution.pad_to_multiple(as_batch(image))
    coarse = torch.nn.functional.avg_pool2d(network.derive(x), 2)
    with torch.no_grad():
        expected = network.unet(with_surroundings(solution.pad_to_multiple(coarse), (5, 9), (7,)))
        expected = expected[..., : coarse.shape[2], : coarse.shape[3]]
        expected = torch.nn.functional.interpolate(expected, scale_factor=2, mode="bilinear")
        assert torch.allclose(network(x), expected, atol=1e-5)
        assert torch.allclose(merged(x), expected, atol=1e-3 * expected.abs().max().item())


# --- Scales -------------------------------------------------------------------------------------------------


def with_scales(*scales: float) -> CoarseUnet:
    """Return a network that looks at its image in some scales; its weights are always the same."""
    args = {**ARCH, "ranges": [5]}
    network = solution.build_network({"name": "CoarseUnet", "args": {**args, "scales": scales}})
    network.load_state_dict(random_network({"name": "CoarseUnet", "args": args}).state_dict())
    return network.eval()


@pytest.mark.parametrize("size", [(60, 96), (105, 144), (83, 97)])
def test_magnifying_is_bilinear_as_opencv_does_it(size):
    x = torch.rand(2, 5, 40, 64) + 0.5
    found = solution.magnify(x, size).permute(0, 2, 3, 1).numpy()
    expected = [
        cv2.resize(np.ascontiguousarray(image), size[::-1]) for image in x.permute(0, 2, 3, 1).numpy()
    ]
    assert found == pytest.approx(np.stack(expected), abs=1e-5)


def test_nodata_stays_nodata_at_every_scale(image):
    x = as_batch(image)
    twice = solution.magnify(x, (140, 192))
    assert torch.equal(twice == 0, (x == 0).repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("scales", [(1.0, 1.5), (1.25,), (1.0, 0.75, 1.3)])
def test_probabilities_are_the_mean_of_those_at_each_scale(image, scales):
    x = solution.pad_to_multiple(as_batch(image))
    with torch.no_grad():
        found = with_scales(*scales)(x).softmax(1)
        expected = [with_scales(scale)(x).softmax(1) for scale in scales]
    assert torch.allclose(found, torch.stack(expected).mean(0), atol=1e-5)


def test_a_scale_is_the_network_on_a_resized_image(image):
    x = solution.pad_to_multiple(as_batch(image))
    height, width = x.shape[2:]
    with torch.no_grad():
        larger = with_scales(1.0)(solution.magnify(x, (height * 3 // 2, width * 3 // 2)))
        expected = torch.nn.functional.interpolate(larger, (height, width), mode="bilinear")
        assert torch.allclose(with_scales(1.5)(x), expected, atol=1e-4)


def test_training_looks_at_the_first_scale_only(image):
    x = solution.pad_to_multiple(as_batch(image))
    network = with_scales(1.0, 1.5)
    network.training = True  # of this module alone: its BatchNorms stay as they are
    with torch.no_grad():
        assert torch.equal(network(x), with_scales(1.0)(x))


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.5)])
def test_scales_that_are_none_are_refused(scales):
    with pytest.raises(InputError, match="scales of CoarseUnet: found .*, expected one or more above 0"):
        CoarseUnet(encoder_name="resnet18", encoder_weights=None, scales=scales)


# --- In training --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def derived_config(store: Path, *overrides: str):
    arch = ["model.name=CoarseUnet", "model.args.derived=[ndsi,temperature_anomaly,nodata_distance]"]
    return load_config(SMOKE, [f"data.store={store}", *arch, *overrides])


def test_training_stores_the_units_and_the_submission_reads_them(store, tmp_path, image):
    fit_fold(derived_config(store, "train.epochs=1"), 0, tmp_path)
    record = read_fold(tmp_path / "fold0" / "fold.pt")
    for key in ("mean", "std"):
        stored = record["state_dict"][f"derive.{key}"].tolist()
        assert stored == pytest.approx(record["normalization"][key], rel=1e-6)
    member = as_member({**record, "state_dict": to_half(record["state_dict"])})
    layer = DerivedInputs(["ndsi"])
    layer.set_units(record["normalization"])
    x = torch.from_numpy(normalize(image, record["normalization"]))[None]
    packed = DerivedInputs(["ndsi"])
    packed.load_state_dict(member.network.derive.state_dict())
    assert torch.allclose(packed(x), layer(x), atol=2e-3)
    probs = predict_views(member, image).astype(np.float32)
    assert probs.shape == (6, 4, 70, 96)
    assert probs.sum(axis=1) == pytest.approx(1, abs=5e-3)


def test_tiles_scaled_one_by_one_have_no_units(store, tmp_path):
    with pytest.raises(ConfigError, match="data.scaling is 'percentile', expected 'statistics'.*ndsi"):
        fit_fold(derived_config(store, "data.scaling=percentile"), 0, tmp_path)
