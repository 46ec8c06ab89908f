"""Markup as strings that cannot be unescaped by oversight: text becomes HTML only through `tag`."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from string import Template
from typing import Iterable, Sequence


class Html(str):
    """Markup. Whatever is no Html is text, and escaped where it enters a page."""


VOID = {"br", "img"}  # elements without an end


def as_html(child: str) -> Html:
    """Return markup as it is and text escaped."""
    return child if isinstance(child, Html) else Html(escape(str(child)))


def join(*children: str) -> Html:
    """Return some markup and texts one after the other."""
    return Html("".join(as_html(child) for child in children))


def tag(name: str, *children: str, **attributes: object) -> Html:
    """Return an element.

    Args:
        name: of the element.
        children: markup, or text to escape.
        attributes: `class_` is written class and `data_run` data-run; True leaves out the value, None and
            False the attribute.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        shown = key.rstrip("_").replace("_", "-")
        written.append(f" {shown}" if value is True else f' {shown}="{escape(str(value))}"')
    start = f"<{name}{''.join(written)}>"
    return Html(start if name in VOID else f"{start}{join(*children)}</{name}>")


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], class_: str | None = None
) -> Html:
    """Return a table that scrolls sideways where it is wider than the screen.

    Args:
        caption: its title.
        head: of each column.
        rows: of each, the head and then the cells; a cell may be a whole `td`.
        class_: of the table.
    """
    top = tag("tr", *[tag("th", text, scope="col") for text in head])
    lines = [tag("tr", tag("th", first, scope="row"), *map(_cell, rest)) for first, *rest in rows]
    content = tag("table", tag("thead", top), tag("tbody", *lines), class_=class_, aria_label=caption)
    window = tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return tag("figure", tag("figcaption", caption), window, class_="table")


def _cell(content: str) -> Html:
    whole = isinstance(content, Html) and content.startswith("<td")
    return Html(content) if whole else tag("td", content)


def section(anchor: str, title: str, *children: str) -> Html:
    """Return a section with its heading."""
    return tag("section", tag("h2", title), *children, id=anchor)


def paragraph(*children: str) -> Html:
    """Return a paragraph."""
    return tag("p", *children)


def details(summary: str, *children: str) -> Html:
    """Return what a reader may unfold."""
    return tag("details", tag("summary", summary), *children)


def fill_page(title: str, navigation: Html, body: Html) -> str:
    """Return the whole page: the template with its style and script in it."""
    folder = files(__package__)
    parts = {
        name: (folder / name).read_text(encoding="utf-8") for name in ("style.css", "script.js", "page.html")
    }
    return Template(parts["page.html"]).substitute(
        title=as_html(title),
        style=parts["style.css"],
        script=parts["script.js"],
        navigation=navigation,
        body=body,
    )
