"""Networks that the kit's own solution.py does not hold: one file each, named as the network in lower case."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Callable, Optional

from torch import nn

from solution import NETWORKS, Model, find_weights, load_model, read_model_file


def network_class(name: str) -> Optional[Callable[..., nn.Module]]:
    """Return what builds the network `name`, and let `solution.build_network` know it; None where there is none.

    `train/networks/<name in lower case>.py` has to define it.
    """
    module = f"{__name__}.{name.lower()}"
    if name not in NETWORKS and name.isidentifier() and importlib.util.find_spec(module):
        found = getattr(importlib.import_module(module), name, None)
        if found is not None:
            NETWORKS[name] = found
    return NETWORKS.get(name)


def load_any_model(given: Optional[Path]) -> Model:
    """Return what `solution.load_model` does of the weights that `solution.find_weights` finds, whatever networks of
    this folder they name. Raises InputError as these do."""
    path = find_weights(given)
    for member in read_model_file(path)["members"]:
        network_class(member["arch"]["name"])
    return load_model(path)
