"""ImageNet weights of an encoder: they arrive whole, under the right names, and are refused elsewhere."""

from collections import OrderedDict

import pytest
import torch

from solution import BANDS, build_network
from train import pretrained
from train.pretrained import PretrainedError, load_imagenet, rename, spread_over_bands, weights_file

ENCODER = "timm-tf_efficientnet_lite0"


def network(encoder: str = ENCODER, name: str = "CoarseUnet"):
    return build_network({"name": name, "args": {"encoder_name": encoder}})


@pytest.fixture(scope="module")
def published():
    return torch.load(weights_file(ENCODER), map_location="cpu", weights_only=True)


@pytest.mark.parametrize("name", ["CoarseUnet", "Unet"])
def test_every_weight_of_the_encoder_arrives_and_no_other_changes(published, name):
    changed = network(name=name)
    before = {key: value.clone() for key, value in changed.state_dict().items()}
    load_imagenet(changed, ENCODER)
    after = changed.state_dict()
    encoder = [key for key in before if "encoder." in key]
    assert all(torch.equal(before[key], after[key]) for key in before if key not in encoder)
    tensors = [value for key, value in published.items() if not key.startswith("_fc.")]
    assert len(tensors) == len(encoder)
    for key, tensor in list(zip(encoder, tensors))[1:]:
        assert torch.equal(after[key], tensor), key


def test_the_encoder_answers_as_the_published_network_does(published):
    """The stem, computed by hand from the published weights, on an image whose bands are all alike."""
    changed = network(name="Unet").eval()
    load_imagenet(changed, ENCODER)
    grey = torch.rand(1, 1, 32, 32)
    kernel = published["_conv_stem.weight"].sum(1, keepdim=True)
    stem = torch.nn.functional.conv2d(grey, kernel, stride=2, padding=1)
    expected = torch.nn.functional.batch_norm(
        stem,
        published["_bn0.running_mean"],
        published["_bn0.running_var"],
        published["_bn0.weight"],
        published["_bn0.bias"],
        eps=1e-5,
    ).clamp(0, 6)
    with torch.no_grad():
        found = changed.encoder(grey.expand(1, len(BANDS), 32, 32))[1]
    assert torch.allclose(found, expected, atol=1e-4)


def test_colours_go_to_their_bands_and_grey_keeps_its_sum():
    rgb = torch.arange(3.0).reshape(1, 3, 1, 1)  # red 0, green 1, blue 2
    spread = spread_over_bands(rgb).flatten()
    assert torch.allclose(spread * len(BANDS) / 3, torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0]))
    assert float(spread.sum()) == pytest.approx(float(rgb.sum()))


def test_an_encoder_without_published_weights_is_refused():
    with pytest.raises(PretrainedError, match="no ImageNet weights for encoder resnet18; there are some for"):
        load_imagenet(network("resnet18", "Unet"), "resnet18")


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(pretrained.PACKAGES, ENCODER, "no_such_package")
    with pytest.raises(PretrainedError, match="no_such_package is not installed; run `make setup`"):
        weights_file(ENCODER)


def test_other_layers_are_refused(published):
    tensors = OrderedDict((key, value) for key, value in published.items() if not key.startswith("_fc."))
    expected = network(name="Unet").encoder.state_dict()
    rename(tensors, expected, ENCODER)
    with pytest.raises(PretrainedError, match="294 published weights for 293"):
        rename(tensors, OrderedDict(list(expected.items())[1:]), ENCODER)
    swapped = OrderedDict(tensors)
    swapped["_bn0.weight"] = torch.zeros(5)
    with pytest.raises(PretrainedError, match=r"_bn0.weight \(5,\) does not fit bn1.weight \(32,\)"):
        rename(swapped, expected, ENCODER)
