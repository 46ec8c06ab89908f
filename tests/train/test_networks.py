"""Networks for comparisons: shapes, size, and that merging their BatchNorms changes nothing."""

import copy

import pytest
import torch
from torch import nn

from solution import InputError, batchnorms_after_convolutions, build_network, fold_batchnorm
from train.config import load_config
from train.module import SegmentationModule
from train.networks import SEResUNet, SqueezeExcitation

SMALL = {"name": "SEResUNet", "args": {"width": 4, "levels": 2}}


def with_random_statistics(network: nn.Module) -> nn.Module:
    """Return the network with BatchNorms that do something, as after training."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    return network.eval()


def test_size_of_the_ninth_places_network():
    with torch.device("meta"):
        network = build_network({"name": "SEResUNet", "args": {"width": 32, "levels": 4}})
    assert sum(parameter.numel() for parameter in network.parameters()) == 8_171_332
    assert [block.body[0].out_channels for block in network.down] == [32, 64, 128, 256, 512]
    assert network.head.out_channels == 4


@pytest.mark.parametrize("height, width", [(33, 95), (64, 64), (1, 70)])
def test_any_size_is_served_after_padding(height, width):
    config = load_config(overrides=["model.name=SEResUNet"])
    config.model.args = SMALL["args"]
    module = SegmentationModule(config).eval()
    with torch.no_grad():
        assert module(torch.randn(2, 5, height, width)).shape == (2, 4, height, width)


@pytest.mark.parametrize(
    "arch",
    [
        SMALL,
        {
            "name": "CoarseUnet",
            "args": {"encoder_name": "efficientnet-b0", "decoder_attention_type": "scse"},
        },
        {"name": "CoarseUnet", "args": {"encoder_name": "timm-tf_efficientnet_lite0"}},
        {"name": "FPN", "args": {"encoder_name": "resnet18", "decoder_dropout": 0.5}},
    ],
    ids=["SEResUNet", "scse", "activation inside BatchNorm", "FPN with dropout"],
)
def test_merging_batchnorms_is_exact(arch):
    network = with_random_statistics(build_network(arch))
    merged = copy.deepcopy(network)
    expected = len(batchnorms_after_convolutions(network))
    assert fold_batchnorm(merged) == expected > 0
    x = torch.randn(1, 5, 64, 96, generator=torch.manual_seed(1))
    with torch.no_grad():
        before, after = network(x), merged(x)
    assert torch.allclose(before, after, atol=1e-4 * before.abs().max().item())


def test_every_batchnorm_of_the_ninth_places_network_is_merged():
    network = build_network(SMALL)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert fold_batchnorm(network) == len(norms) == 15


def test_excitation_scales_whole_channels_between_nothing_and_all():
    layer = SqueezeExcitation(6, reduction=2)
    x = torch.rand(2, 6, 5, 7) + 0.1
    factors = layer(x) / x
    assert torch.allclose(factors, factors[:, :, :1, :1].expand_as(factors), atol=1e-6)
    assert (factors > 0).all()
    assert (factors < 1).all()


def test_dropout_acts_in_training_only():
    network = SEResUNet(width=4, levels=2, dropout=0.5)
    x = torch.randn(1, 5, 32, 32)
    network.eval()
    assert torch.equal(network(x), network(x))
    for layer in network.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.train()
    assert not torch.equal(network(x), network(x))


def test_an_unknown_network_is_named_with_those_that_are_known():
    with pytest.raises(InputError, match="'SEResNet' is unknown.*SEResUNet"):
        build_network({"name": "SEResNet"})
