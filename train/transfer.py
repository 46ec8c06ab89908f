"""Pretrained checkpoints: what one says of its input, and whether these tiles are the same kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import torch

from solution import BANDS, CLASS_NAMES
from train.config import ConfigError

REMEDY = "pretrain again with `make pretrain`, or leave model.pretrained out"


def input_identity() -> dict[str, list[str]]:
    """Return what a network's weights are made for: bands, their units, and the order of the classes."""
    return {
        "bands": [band.name for band in BANDS],
        "units": [band.unit for band in BANDS],
        "classes": list(CLASS_NAMES),
    }


def read_pretrained(path: str | Path, arch: Mapping) -> dict[str, Any]:
    """Return the record of a pretrained checkpoint: state_dict, normalization and more.

    Args:
        path: fold.pt of a run, or a copy of it.
        arch: of the network that is to take the weights, as `solution.build_network` takes it.

    Raises:
        ConfigError: it is missing, no checkpoint of this kit, or of other bands, units, classes or network.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"model.pretrained: {path} does not exist; make it with `make pretrain`")
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated kinds for damaged files
        raise ConfigError(f"model.pretrained: {path} cannot be read ({error}); {REMEDY}") from error
    needed = ("state_dict", "normalization", "arch")
    if not isinstance(record, dict) or any(key not in record for key in needed):
        raise ConfigError(f"model.pretrained: {path} lacks one of {', '.join(needed)}; {REMEDY}")
    for key, expected in input_identity().items():
        if record.get(key) != expected:
            raise ConfigError(
                f"model.pretrained: {path} was trained with {key} {_spell(record.get(key))}, expected "
                f"{_spell(expected)}; {REMEDY}"
            )
    if record["arch"] != arch:
        raise ConfigError(
            f"model.pretrained: {path} is {record['arch']}, this config's model {dict(arch)}; use the same "
            "model settings in both configs"
        )
    return record


def _spell(names: object) -> str:
    return ", ".join(map(str, names)) if isinstance(names, (list, tuple)) else "unknown"
