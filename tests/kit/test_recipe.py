"""The shipped weights are those of train/recipe.yaml, and the kit's own solution.py is what belongs to them."""

import re

import torch
from support import PROJECT

from prep.files import sha256
from train.config import differing_keys, load_config
from train.submit.assemble import assemble

MODEL = PROJECT / "weights" / "model.pth"
CONTENT = torch.load(MODEL, map_location="cpu", weights_only=True)


def test_the_recipe_in_the_weights_is_that_of_the_file(tmp_path):
    (tmp_path / "stored.yaml").write_text(CONTENT["recipe"], encoding="utf-8")
    stored, written = load_config(tmp_path / "stored.yaml"), load_config(PROJECT / "train" / "recipe.yaml")
    assert differing_keys(stored, written) == []


def test_the_card_is_of_these_weights():
    card = (PROJECT / "weights" / "model_card.md").read_text(encoding="utf-8")
    assert re.findall(r"SHA-256 `([0-9a-f]{64})`", card) == [sha256(MODEL)]
    assert f"`{CONTENT['provenance']['command']}`" in card


def test_the_weights_need_nothing_but_the_kits_own_solution():
    assert assemble(CONTENT) == (PROJECT / "solution.py").read_text(encoding="utf-8")


def test_what_is_committed_stays_small():
    assert MODEL.stat().st_size <= 60_000_000
