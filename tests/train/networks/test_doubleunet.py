"""DoubleUnet: what it computes, its weights' names, merging of BatchNorms."""

import pytest
import torch
from support import model_content, random_network, stored_member
from torch import nn

from solution import NETWORKS, InputError, load_model
from train.networks import load_any_model, network_class
from train.pack import mergeable_pairs
from train.pretrained import find_encoder

network_class("DoubleUnet")  # solution.build_network knows it from here on
ARGS = {"encoder_name": "mobilenet_v2", "decoder_channels": [32, 16, 8, 8, 8]}
SMALL = {"name": "DoubleUnet", "args": ARGS}


def test_it_is_the_unet_of_the_same_weights_on_the_image_at_twice_its_size():
    double, plain = random_network(SMALL), random_network({"name": "Unet", "args": ARGS})
    plain.load_state_dict(double.state_dict())
    x = torch.randn(2, 5, 32, 64)
    large = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    with torch.no_grad():
        expected = plain(large).reshape(2, 1, 32, 2, 64, 2).mean(dim=(3, 5))
        torch.testing.assert_close(double(x), expected)


def test_a_model_that_names_it_is_loaded_wherever_the_kit_loads_models(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    torch.save({**model_content(), "members": [stored_member(SMALL)]}, path)
    monkeypatch.delitem(NETWORKS, "DoubleUnet")
    with pytest.raises(InputError, match="use the one that `python -m train pack` wrote beside such a model"):
        load_model(path)
    assert len(load_any_model(path).members) == 1


def test_its_encoder_is_found_and_every_batchnorm_merged():
    network = random_network(SMALL)
    assert sum(1 for _ in find_encoder(network).parameters())
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    assert len(mergeable_pairs(SMALL, network.state_dict())) == norms
