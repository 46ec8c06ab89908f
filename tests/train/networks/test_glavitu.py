"""GlaViTU: size, gradients, positions, deep supervision, merging of BatchNorms, and that it learns."""

import numpy as np
import pytest
import torch
from support import random_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from train_helpers import SMOKE, make_tile

import solution
from prep.labels import IGNORE
from train.config import load_config
from train.fit import arch_of
from train.losses import UNKNOWN
from train.module import SegmentationModule
from train.networks import network_class
from train.pack import mergeable_pairs

network_class("GlaViTU")  # solution.build_network knows it from here on
SMALL = {"name": "GlaViTU", "args": {"width": 8, "depth": 2, "heads": 2, "steps": 2, "grid": 4}}
HALF = {"name": "GlaViTU", "args": {**SMALL["args"], "factor": 2}}


def noise(*shape: int) -> torch.Tensor:
    """Return seeded normal noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def count_gmac(arguments: dict) -> float:
    """Return the 10^9 multiply-adds of a pass over a tile of 512 x 512 px."""
    network = solution.build_network({"name": "GlaViTU", "args": arguments}).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 5, 512, 512))
    return counter.get_total_flops() / 2 / 1e9  # it counts a multiplication and an addition as two


def test_size_and_work_are_those_of_the_published_configuration():
    with torch.device("meta"):
        network = solution.build_network({"name": "GlaViTU"})
    # the published layers add up to 9,969,160 for four classes: three logits more on each of both heads
    found = sum(parameter.numel() for parameter in network.parameters())
    assert abs(found / (9_969_160 - 2 * 3 * 65) - 1) < 1e-3
    with torch.device("meta"):
        half, whole = (count_gmac({"factor": factor}) for factor in (2, 1))
    assert (half, whole) == pytest.approx((45.8, 184.5), abs=0.3)


def test_the_recipe_is_focal_loss_on_both_heads_of_the_published_network():
    config = load_config(SMOKE.parent / "glavitu.yaml")
    assert (config.loss.focal, config.loss.auxiliary, config.loss.gamma, config.loss.dice) == (
        1.0,
        1.0,
        2.0,
        0.0,
    )
    with torch.device("meta"):
        network = solution.build_network(arch_of(config))
    assert len(network.setr.blocks) == 12 and network.setr.embed.kernel_size == (16, 16)
    assert [block.body[0].out_channels for block in network.resunet.down] == [64, 128, 256, 512]


@pytest.mark.parametrize("arch", [SMALL, HALF], ids=["full resolution", "half resolution"])
def test_gradient_reaches_every_parameter_and_any_size_is_served(arch):
    torch.manual_seed(0)
    network = solution.build_network(arch).train()
    logits, auxiliary = network.forward_with_auxiliary(noise(2, 5, 64, 96))
    target = torch.arange(96).expand(2, 1, 64, 96) % 2.0
    losses = [nn.functional.binary_cross_entropy_with_logits(maps, target) for maps in (logits, auxiliary)]
    sum(losses).backward()
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter.grad).all() and (parameter.grad != 0).any(), name
    with torch.no_grad():
        for height, width in ((32, 224), (96, 96)):
            assert network.eval()(noise(1, 5, height, width)).shape == (1, 1, height, width)


def test_positions_are_interpolated_and_tell_equal_patches_apart():
    setr = random_network(SMALL).setr
    grid = setr.positions.shape[-1]
    same = noise(1, 8, 16, 16).repeat(1, 1, 2, 2)
    with torch.no_grad():
        assert torch.equal(setr.positions_for(grid, grid), setr.positions)
        tokens = [setr.embed(same) + part for part in (setr.positions_for(2, 2), 0)]
        told, not_told = [setr.blocks(part.flatten(2).transpose(1, 2)) for part in tokens]
        assert torch.allclose(not_told, not_told[:, :1], atol=1e-5)
        assert not torch.allclose(told, told[:, :1], atol=1e-2)
        setr.positions.copy_(torch.arange(float(grid)).expand_as(setr.positions))  # rises from left to right
        finer = setr.positions_for(5, 2 * grid)[0, 0]
    assert torch.equal(finer[0], finer[-1])
    assert torch.allclose(finer[0, 1:-1].diff(), torch.tensor(0.5))


def small_module(weight: float = 1.0) -> SegmentationModule:
    """Return a small network in training, without dropout."""
    config = load_config(SMOKE.parent / "glavitu.yaml", [f"loss.auxiliary={weight}"])
    config.model.args = {**HALF["args"], "dropout": 0.0}
    torch.manual_seed(0)
    return SegmentationModule(config).train()


def test_training_adds_the_auxiliary_loss_by_its_weight_and_inference_leaves_it_out():
    image, codes = noise(2, 5, 64, 64), torch.arange(4, dtype=torch.uint8).repeat(2, 64, 16)
    logits, auxiliary = small_module().network.forward_with_auxiliary(image)
    alone, beside = (small_module().loss(maps, codes).item() for maps in (logits, auxiliary))
    losses = [small_module(weight).batch_loss(image, codes).item() for weight in (0.0, 1.0, 2.5)]
    assert losses == pytest.approx([alone, alone + beside, alone + 2.5 * beside], rel=1e-5)
    network = random_network(HALF)
    with torch.no_grad():
        expected = network(image)
        network.auxiliary_head.weight.zero_()
        assert torch.equal(network(image), expected)


def test_every_batchnorm_is_merged():
    network = random_network(HALF, seed=1)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert len(mergeable_pairs(HALF, network.state_dict())) == norms == 16


def test_it_overfits_one_tile():
    image, mask = make_tile(1, size=64)
    statistics = {"mean": np.nanmean(image, (0, 1)).tolist(), "std": np.nanstd(image, (0, 1)).tolist()}
    x, codes = torch.from_numpy(solution.normalize(image, statistics))[None], torch.from_numpy(mask)[None]
    module = small_module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        module.batch_loss(x, codes).backward()
        optimizer.step()
    sides = module.loss.sides[codes.long()][0]
    with torch.no_grad():
        predicted = module.eval().network(x)[0, 0] > 0
    known = sides != UNKNOWN
    assert (mask == IGNORE).any() and (predicted[known] == sides[known].bool()).float().mean() > 0.97
