"""The solution.py that belongs to a model: the kit's own, or with the networks that the model names."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch

from train.submit.assemble import MARK, SOLUTION, AssemblyError, assemble, write_solution

MODULE = '''"""Two convolutions."""

from __future__ import annotations

import torch
from torch import nn

from solution import (
    BANDS,
    STRIDE,
)

WIDTH = 4


class TwoLayers(nn.Module):
    """Logits (B, 1, H, W) of bands (B, 5, H, W); H and W are multiples of STRIDE."""

    def __init__(self, in_channels: int, classes: int, encoder_weights: None, width: int = WIDTH) -> None:
        super().__init__()
        assert in_channels == len(BANDS)
        self.layers = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, classes, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        assert x.shape[2] % STRIDE == 0
        return self.layers(x)
'''
UNET = {"name": "Unet", "args": {}}
TWO = {"name": "TwoLayers", "args": {"width": 3}}


@pytest.fixture
def modules(tmp_path) -> Path:
    """Return a folder with one network."""
    (tmp_path / "twolayers.py").write_text(MODULE)
    return tmp_path


def model_of(*archs: dict, **content) -> dict:
    """Return as much of a model's content as says which networks it has."""
    return {"members": [{"arch": arch} for arch in archs], **content}


def test_a_model_of_the_kits_networks_gets_the_kits_file_byte_for_byte(tmp_path):
    model = model_of(UNET, UNET, kind={"arch": {"name": "KindNet", "args": {}}})
    out = write_solution(model, tmp_path / "solution.py")
    assert out.read_bytes() == SOLUTION.read_bytes() == (support.PROJECT / "solution.py").read_bytes()
    assert SOLUTION.read_text(encoding="utf-8").count(MARK) == 1


def test_a_network_that_the_model_names_is_put_in_and_found(modules, tmp_path):
    text = assemble(model_of(UNET, TWO, TWO), modules)
    assert text.count("class TwoLayers") == 1 and "from solution import" not in text
    path = tmp_path / "assembled_solution.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assembled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(assembled)
    network = assembled.build_network(TWO)
    assert network(torch.zeros(1, 5, 32, 64)).shape == (1, 1, 32, 64)
    assert network.layers[0].out_channels == 3


def test_the_assembled_file_runs_from_a_bare_folder(modules, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "solution.py").write_text(assemble(model_of(TWO), modules))
    code = "import solution; print(sorted(solution.NETWORKS))"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "bare", capture_output=True, text=True, check=True
    )
    assert told.stdout == "['TwoLayers', 'Unet']\n"


@pytest.mark.parametrize(
    ("piece", "instead", "message"),
    [
        ("class TwoLayers", "class OneLayer", "defines no TwoLayers, found OneLayer, WIDTH"),
        ("WIDTH", "WINDOW", "solution.py defines WINDOW too"),
        (
            "import torch\n",
            "import torch\nfrom train import fit\n",
            "line 6: from train import fit; expected",
        ),
        ("import torch\n", "import torch\nimport solution\n", "line 6: import solution; expected"),
        ("    STRIDE,", "    STRIDE as MULTIPLE,", "STRIDE as MULTIPLE; expected"),
        ("import torch\n", "import torch\nimport timm\n", "grader's packages only"),
    ],
)
def test_a_module_that_would_not_work_in_the_graded_file_is_refused(modules, piece, instead, message):
    (modules / "twolayers.py").write_text(MODULE.replace(piece, instead))
    with pytest.raises(AssemblyError, match=message):
        assemble(model_of(TWO), modules)


def test_a_network_without_a_module_is_named_with_the_place_for_it(tmp_path):
    with pytest.raises(AssemblyError, match="'TwoLayers' is neither in solution.py nor in .*/twolayers.py"):
        assemble(model_of(TWO), tmp_path)
