"""Numbers, plurals and tables as the text of reports."""

from __future__ import annotations

import math
from typing import Iterable, Sequence

NONE = "–"  # where there is nothing to show


def number_text(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits after the point; – for None and what is not finite."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def plural(number: int, noun: str) -> str:
    """Return "1 view", "2 views"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; cells may hold any text of one line."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)
