"""docs/change-the-recipe.md is followed: a recipe of one changed setting is trained; its members load."""

import re
from pathlib import Path

from support import PROJECT
from train_helpers import SMOKE, make_store

from train.__main__ import main
from train.config import describe_differences, load_config, members_of
from train.run import read_record

PAGE = (PROJECT / "docs" / "change-the-recipe.md").read_text(encoding="utf-8")


def code_block(language: str) -> str:
    """Return the page's one code block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found


def write_recipe(path: Path, text: str, base: Path) -> Path:
    """Write a recipe of the page on another base."""
    path.write_text(text.replace("train/recipe.yaml", str(base)), encoding="utf-8")
    return path


def test_one_changed_setting_is_trained(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "mine.yaml", code_block("yaml"), SMOKE)
    assert describe_differences(load_config(recipe), load_config(SMOKE)) == "optim.lr=0.0005"
    run = tmp_path / "runs" / "mine"
    command = ["fit", "--recipe", str(recipe), "--run", str(run), "--folds", "0", "--member", "north"]
    command += [f"data.store={make_store(tmp_path / 'store', size=64)}", "train.epochs=1"]
    assert main(command) == 0
    assert read_record(run / "north" / "fold0" / "fold.pt")["config"]["optim"]["lr"] == 5e-4


def test_the_members_of_the_page_load(tmp_path: Path) -> None:
    text = f"base: train/recipe.yaml\n{code_block('text')}"
    recipe = load_config(write_recipe(tmp_path / "mine.yaml", text, PROJECT / "train" / "recipe.yaml"))
    (_, plain), (second, other) = members_of(recipe)["north"], members_of(recipe)["second"]
    assert describe_differences(other, plain) == "augment.flip=True, augment.rot90=True, train.seed=1"
    assert (second.ship, second.views, second.weight) == ("all", 6, 0.5)


def test_the_setting_for_one_try_exists(tmp_path: Path) -> None:
    (settings,) = re.findall(r'SET="([^"]+)"', PAGE)
    assert load_config(SMOKE, settings.split()).optim.lr == 5e-4
