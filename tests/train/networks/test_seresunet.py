"""SEResUNet: size, any size of image, merging of BatchNorms, squeeze-and-excitation."""

import torch
from support import random_network
from torch import nn

import solution
from train.networks import network_class
from train.networks.seresunet import SqueezeExcitation
from train.pack import mergeable_pairs

network_class("SEResUNet")  # solution.build_network knows it from here on
SMALL = {"name": "SEResUNet", "args": {"width": 4, "levels": 2}}


def test_size_of_the_ninth_places_network():
    arch = {"name": "SEResUNet", "args": {"width": 32, "levels": 4}}
    with torch.device("meta"):
        network = solution.build_network(arch)
    # with the four logits of the description; each has 32 weights and a bias
    assert sum(parameter.numel() for parameter in network.parameters()) + 3 * 33 == 8_171_332
    assert [block.body[0].out_channels for block in network.down] == [32, 64, 128, 256, 512]


def test_logits_have_the_size_of_the_image():
    with torch.no_grad():
        assert random_network(SMALL)(torch.randn(2, 5, 64, 96)).shape == (2, 1, 64, 96)


def test_every_batchnorm_is_merged():
    network = random_network(SMALL)
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    assert len(mergeable_pairs(SMALL, network.state_dict())) == norms == 15


def test_excitation_scales_whole_channels_between_nothing_and_all():
    x = torch.rand(2, 6, 5, 7) + 0.1
    factors = SqueezeExcitation(6, reduction=2)(x) / x
    assert torch.allclose(factors, factors[:, :, :1, :1].expand_as(factors), atol=1e-6)
    assert (factors > 0).all() and (factors < 1).all()


def test_names_that_are_no_network_are_unknown():
    assert network_class("SEResNet") is None
    assert network_class("seresunet") is None  # the file, not the class
