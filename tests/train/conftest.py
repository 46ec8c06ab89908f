"""Fixtures of the tests of training: one small store, one finished run of the smoke recipe."""

from pathlib import Path

import pytest
from train_helpers import fit_smoke, make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    """Return the folder of a store of four tiles in two folds."""
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="session")
def smoke_run(store, tmp_path_factory) -> Path:
    """Return a run of the smoke recipe: members `north` and `turned`, two folds each, and the kind."""
    return fit_smoke(store, tmp_path_factory.mktemp("smoke") / "run")
