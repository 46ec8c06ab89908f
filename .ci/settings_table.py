"""Makes docs/settings.md from the dataclasses of train/config.py and the comments beside their fields.

python .ci/settings_table.py           # print the page
python .ci/settings_table.py --write   # write it
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SOURCE = PROJECT / "train" / "config.py"
PAGE = PROJECT / "docs" / "settings.md"


def comment_of(lines: list[str], field: ast.AnnAssign) -> str:
    """Return the comment behind a field, or the whole lines of comment before it."""
    assert field.end_lineno is not None and field.end_col_offset is not None
    behind = lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode().strip()
    if behind.startswith("#"):
        return behind[1:].strip()
    before: list[str] = []
    number = field.lineno - 2
    while lines[number].strip().startswith("#"):
        before.insert(0, lines[number].strip()[1:].strip())
        number -= 1
    return " ".join(before)


def default_of(field: ast.AnnAssign) -> str:
    """Return a field's default as YAML would be written by hand."""
    assert field.value is not None
    value = field.value
    if isinstance(value, ast.Call):  # field(default_factory=...)
        factory = value.keywords[0].value
        text = (
            ast.unparse(factory.body)
            if isinstance(factory, ast.Lambda)
            else {"list": "[]", "dict": "{}"}[ast.unparse(factory)]
        )
    else:
        text = ast.unparse(value)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text.strip("'"))


def page() -> str:
    """Return the page: a table for each group of settings."""
    text = SOURCE.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    parts = [
        "# Settings",
        "All settings of a recipe with their defaults, from `train/config.py` (made by `.ci/settings_table.py`). "
        "[train/recipe.yaml](../train/recipe.yaml) sets those of the shipped weights. On the command line: "
        '`SET="optim.lr=3e-4 train.epochs=6"`.',
    ]
    for field in classes["Config"].body:
        if not isinstance(field, ast.AnnAssign):
            continue
        group = ast.unparse(field.target)
        kind = next(name for name in classes if name in ast.unparse(field.annotation) and name != "Config")
        prefix = f"{group}.<name>" if "dict" in ast.unparse(field.annotation) else group
        about = ast.get_docstring(classes[kind]) or ""
        rows = [
            f"| `{prefix}.{ast.unparse(one.target)}` | `{default_of(one)}` | {comment_of(lines, one)} |"
            for one in classes[kind].body
            if isinstance(one, ast.AnnAssign)
        ]
        parts.append(
            f"## {group}\n\n{about}\n\n| setting | default | effect |\n| --- | --- | --- |\n" + "\n".join(rows)
        )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
