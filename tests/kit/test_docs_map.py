"""docs/map.md and docs/gpu.md: every path exists, every name is in the file that it is said to be in, settings load."""

import re

import pytest
from support import PROJECT

from train.config import load_config

MAP = (PROJECT / "docs" / "map.md").read_text(encoding="utf-8")
GPU = (PROJECT / "docs" / "gpu.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")


def is_path(text: str) -> bool:
    """Return whether a word in backquotes is a path of the kit."""
    return bool(re.fullmatch(r"[.\w]+(/[\w.]*)*", text)) and ("/" in text or text.endswith((".py", ".yaml")))


def test_every_path_exists_and_ten_modules_are_listed():
    paths = [text for text in CODE.findall(MAP) if is_path(text)]
    assert len(set(paths)) > 20 and [path for path in paths if not (PROJECT / path).exists()] == []
    ten = MAP.split("## Ten modules")[1].split("## ")[0]
    assert len(re.findall(r"^\| `", ten, re.MULTILINE)) == 10


def test_names_are_in_the_files_of_their_row():
    for row in re.findall(r"^\| .*\|$", MAP, re.MULTILINE):
        words = CODE.findall(row)
        texts = [(PROJECT / path).read_text("utf-8") for path in words if is_path(path) and (PROJECT / path).is_file()]
        for name in (word for word in words if re.fullmatch(r"[A-Za-z_]+", word) and not is_path(word)):
            assert name == "Makefile" or any(re.search(rf"\b{name}\b", text) for text in texts), (name, row)


@pytest.mark.parametrize("settings", re.findall(r'SET="([^".]+\.[^"]*[^."])"', GPU))
def test_the_settings_of_the_page_on_gpus_load(settings):
    load_config(PROJECT / "train" / "recipe.yaml", settings.split())


def test_every_precision_of_the_config_has_a_row():
    rows = re.findall(r"^\| `(\w+)`", GPU.split("## Precision")[1].split("## ")[0], re.MULTILINE)
    with pytest.raises(Exception, match="trainer.precision is 'x', expected " + " or ".join(rows)):
        load_config(overrides=["trainer.precision=x"])
