"""GlaViTU: shapes, gradients, positions, deep supervision, folding, size, and that it learns."""

import copy

import numpy as np
import pytest
import torch
from support import model_content, random_network, stored_member
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from train_helpers import make_tile

import solution
from prep.labels import IGNORE
from train.config import load_config
from train.fit import arch_of
from train.module import SegmentationModule
from train.objective import mcc

SMALL = {"name": "GlaViTU", "args": {"width": 8, "depth": 2, "heads": 2, "steps": 2, "grid": 4}}
HALF = {"name": "GlaViTU", "args": {**SMALL["args"], "factor": 2}}


def published_parameters(bands: int, classes: int, patches: int) -> int:
    """Count what is learned in the published configuration for these bands, classes, and patches in a tile.

    Width 64, patches of 16 px, 12 blocks of 4 heads with a perceptron of 256, a decoder of four convolutions,
    three steps from 64 filters. A Dense layer there is a 1x1 convolution, and every 3x3 one has a bias.
    """

    def conv(before, after, side=3, bias=True):
        return before * after * side**2 + bias * after

    def norm(channels):
        return 2 * channels

    def double(before, after):
        return conv(before, after) + norm(after) + conv(after, after) + norm(after)

    def residual(before, after):
        return double(before, after) + conv(before, after, 1, bias=False)

    attention = 4 * conv(64, 64, 1)  # queries, keys, values, and what joins the heads
    block = norm(64) + attention + norm(64) + conv(64, 256, 1) + conv(256, 64, 1)
    setr = conv(64, 64, 16) + 64 * patches + 12 * block + 4 * (conv(64, 64) + norm(64)) + conv(64, 64, 1)
    down = residual(64, 64) + residual(64, 128) + residual(128, 256) + residual(256, 512)
    up = sum(conv(2 * n, n, 2, bias=False) + norm(n) + residual(2 * n, n) for n in (256, 128, 64))
    return double(bands, 64) + setr + down + up + conv(64, 64, 1) + 2 * conv(64, classes, 1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_size_is_that_of_the_published_configuration():
    with torch.device("meta"):
        network = solution.build_network({"name": "GlaViTU"})
    found = sum(parameter.numel() for parameter in network.parameters())
    published = published_parameters(bands=5, classes=4, patches=(384 // 16) ** 2)
    assert (found, published) == (9_965_512, 9_969_160)
    assert abs(found / published - 1) < 0.1
    resunet = published_resunet_parameters()
    assert published / resunet == pytest.approx(1 / 3, abs=0.05)  # "about a third of ResU-Net's parameters"


def published_resunet_parameters() -> int:
    """Count the ResU-Net that GlaViTU was compared with: four steps from 64 filters, on fused input."""
    with torch.device("meta"):
        body = solution.ResUNet(64, steps=4, dropout=0.1)
    return sum(parameter.numel() for parameter in body.parameters())


def test_work_of_a_tile():
    """A quarter of it at half resolution; attention alone grows with the square of the number of patches."""
    assert count_gmac({}) == pytest.approx(184.5, abs=0.1)
    assert count_gmac({"factor": 2}) == pytest.approx(45.8, abs=0.1)


def count_gmac(args: dict) -> float:
    """Return the 10^9 multiply-adds of a pass over 512 x 512 px, counted from shapes alone."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        solution.build_network({"name": "GlaViTU", "args": args}).eval()(torch.zeros(1, 5, 512, 512))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("arch", [SMALL, HALF], ids=["full resolution", "half resolution"])
def test_gradient_reaches_every_parameter(arch):
    torch.manual_seed(0)
    network = solution.build_network(arch).train()
    logits, auxiliary = network.forward_with_auxiliary(noise(2, 5, 64, 96))
    labels = torch.arange(4).repeat(2, 64, 24)
    loss = nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(auxiliary, labels)
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("arch", [SMALL, HALF], ids=["full resolution", "half resolution"])
@pytest.mark.parametrize("height, width", [(256, 256), (384, 384), (512, 512), (301, 97), (33, 65), (1, 200)])
def test_any_size_is_served(arch, height, width):
    network = random_network(arch)
    image = noise(1, 5, height, width)
    with torch.inference_mode():
        logits = network(solution.pad_to_multiple(image))[..., :height, :width]
    assert logits.shape == (1, 4, height, width)
    assert torch.isfinite(logits).all()


def test_positions_are_interpolated():
    setr = solution.build_network(SMALL).setr
    positions = setr.positions.detach()
    grid = positions.shape[-1]
    assert torch.equal(setr.positions_for(grid, grid), positions)
    for rows, cols in ((2 * grid, 3 * grid), (3, 7)):
        larger = setr.positions_for(rows, cols)
        assert larger.shape == (1, 8, rows, cols)
        # each lies between the learned ones around it
        assert larger.max() <= positions.max()
        assert larger.min() >= positions.min()
    slope = torch.arange(float(grid)).expand(1, 8, grid, grid)  # rises from left to right
    setr.positions.data.copy_(slope)
    finer = setr.positions_for(5, 2 * grid)[0, 0]
    assert torch.equal(finer[0], finer[-1])
    assert torch.allclose(finer[0, 1:-1].diff(), torch.tensor(0.5))


def test_positions_tell_equal_patches_apart():
    """Without them, a transformer answers the same wherever the same patch lies."""
    setr = random_network(SMALL).setr
    same = noise(1, 8, 16, 16).repeat(1, 1, 2, 2)
    with torch.no_grad():
        tokens = [setr.embed(same) + part for part in (setr.positions_for(2, 2), 0)]
        told, not_told = [setr.blocks(part.flatten(2).transpose(1, 2)) for part in tokens]
    assert torch.allclose(not_told, not_told[:, :1], atol=1e-5)
    assert not torch.allclose(told, told[:, :1], atol=1e-2)


def test_deep_supervision_takes_part_in_training_only():
    network = random_network(SMALL)
    x = noise(1, 5, 64, 64)
    calls = []
    network.auxiliary_head.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        alone = network(x)
        assert not calls
        logits, auxiliary = network.forward_with_auxiliary(x)
        assert torch.equal(logits, alone)
        network.auxiliary_head.weight.zero_()
        assert torch.equal(network(x), alone)
    assert auxiliary.shape == logits.shape
    assert not torch.allclose(auxiliary, logits)


def small_module(*overrides: str) -> SegmentationModule:
    config = load_config(overrides=["model.name=GlaViTU", "loss.dice=0", *overrides])
    config.model.args = {**HALF["args"], "dropout": 0.0}
    torch.manual_seed(0)
    return SegmentationModule(config)


def test_training_adds_the_auxiliary_loss_by_its_weight():
    image, codes = noise(2, 5, 64, 64), torch.arange(4, dtype=torch.uint8).repeat(2, 64, 16)
    batch = (image, codes, torch.zeros(2, dtype=torch.long))
    losses = []
    for weight in (0.0, 1.0, 2.5):
        module = small_module(f"loss.auxiliary={weight}")
        module.batch_loss = lambda logits, batch, module=module: module.loss(logits, batch[1])
        losses.append(module.heads_loss(image, batch).item())
    logits, auxiliary = small_module().network.forward_with_auxiliary(image)
    alone, beside = (module.loss(maps, codes).item() for maps in (logits, auxiliary))
    assert losses == pytest.approx([alone, alone + beside, alone + 2.5 * beside], rel=1e-5)


def test_the_shipped_configuration_is_focal_loss_on_both_heads_of_the_published_network():
    config = load_config("train/configs/glavitu.yaml")
    terms = {name: getattr(config.loss, name) for name in ("focal", "auxiliary", "gamma", "dice", "mcc")}
    assert terms == {"focal": 1.0, "auxiliary": 1.0, "gamma": 2.0, "dice": 0.0, "mcc": 0.0}
    with torch.device("meta"):
        network = solution.build_network(arch_of(config))
    assert len(network.setr.blocks) == 12
    assert [block.body[0].out_channels for block in network.resunet.down] == [64, 128, 256, 512]
    assert network.setr.embed.kernel_size == (16, 16)
    assert all(
        isinstance(module.p, float) and module.p == 0.1 for module in network.modules() if is_dropout(module)
    )


def is_dropout(module: nn.Module) -> bool:
    return isinstance(module, (nn.Dropout, nn.Dropout2d))


@pytest.mark.parametrize("arch", [SMALL, HALF], ids=["full resolution", "half resolution"])
def test_every_batchnorm_is_folded_exactly(arch):
    network = random_network(arch, seed=1)
    x = noise(2, 5, 64, 96)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    folded = copy.deepcopy(network)
    assert solution.fold_batchnorm(folded) == norms == 16
    with torch.no_grad():
        before, after = network(x), folded(x)
    assert torch.allclose(before, after, atol=1e-4 * before.abs().max().item())
    assert solution.merge_batchnorm(network)


def test_a_model_file_with_it_is_loaded_strictly_and_answers_as_the_network(tmp_path):
    member = stored_member(HALF, seed=2)
    content = {**model_content(views=2), "members": [member]}
    content["passes"] = [[0, 0], [0, 1]]
    torch.save(content, tmp_path / "model.pth")
    model = solution.load_model(tmp_path / "model.pth")
    image = make_tile(0, size=70)[0]
    found = solution.ensemble_probabilities(model, image, model.passes[:1]).probs
    x = torch.from_numpy(solution.normalize(image, member["normalization"]))[None]
    with torch.no_grad():
        logits = random_network(HALF, seed=2)(solution.pad_to_multiple(x))
    expected = logits.softmax(1)[0, :, :70, :70].numpy()
    assert np.abs(found - expected).max() < 0.02  # float16 weights
    fast = solution.in_fastest_form(model)
    again = solution.ensemble_probabilities(fast, image, model.passes[:1]).probs
    assert np.abs(found - again).max() < 1e-3

    del content["members"][0]["state_dict"]["setr.positions"]
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(solution.InputError, match="1 missing: setr.positions"):
        solution.load_model(tmp_path / "model.pth")


def test_it_overfits_one_tile():
    image, mask = make_tile(1, size=96)
    known = mask != IGNORE
    statistics = {"mean": np.nanmean(image, (0, 1)).tolist(), "std": np.nanstd(image, (0, 1)).tolist()}
    x = torch.from_numpy(solution.normalize(image, statistics))[None]
    codes = torch.from_numpy(mask)[None]
    module = small_module().train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        logits, auxiliary = module.network.forward_with_auxiliary(x)
        (module.loss(logits, codes) + module.loss(auxiliary, codes)).backward()
        optimizer.step()
    with torch.no_grad():
        predicted = module.eval().network(x).argmax(1)[0].numpy()
    confusion = np.zeros((4, 4), np.int64)
    np.add.at(confusion, (mask[known], predicted[known]), 1)
    assert mcc(confusion) >= 0.95
