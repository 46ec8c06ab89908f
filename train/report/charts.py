"""Charts as inline SVG, in the colours of the page, so that they follow light and dark mode."""

from __future__ import annotations

import math
from typing import Iterable, NamedTuple, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from train.report.markup import Html, join, tag
from train.report.reliability import Reliability

COLOURS = 8  # style.css has so many colours of series
WIDTH, HEIGHT = 380, 250  # px of a chart; it shrinks with the screen
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 40  # px around the plot
ROW = 22  # px of a row of dots
DOT_WIDTH = 600
LETTER, LONGEST_NAME = 9, 24  # px of a letter beside a row of dots, where a phone shows it larger; letters
MARKERS = 4  # shapes of dots, so that colour is not all that tells series apart


class Series(NamedTuple):
    """A line: its points, which colour it has, and whether it is dashed. NaN breaks the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    dashed: bool = False


class Mark(NamedTuple):
    """A ring around a point of a series, and what it means."""

    x: float
    y: float
    colour: int
    meaning: str


class Dot(NamedTuple):
    """A value in a row of dots: of which series, and what a pointer on it is told."""

    value: float
    colour: int
    meaning: str


class Plot(NamedTuple):
    """Maps data to pixels: the ranges of the data and of the pixels (the y of pixels grows downwards)."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM

    def at_x(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.x
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 2)

    def at_y(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.y
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 2)


# --- Kinds of charts ----------------------------------------------------------------------------------------


def line_chart(
    about: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
) -> Html:
    """Draw lines, one for each series.

    Args:
        about: what the chart shows, for readers who cannot see it.
        series: the lines.
        x_label: of the axis; x counts from 0 or 1 upwards in whole numbers.
        y_label: of the axis.
        marks: rings around points.
        from_zero: y starts at 0.
    """
    xs = [value for line in series for value in line.x]
    ys = [value for line in series for value in line.y if math.isfinite(value)]
    y_ticks = ticks([*ys, 0.0] if from_zero else ys)
    plot = Plot((min(xs) - 0.2, max(xs) + 0.2), (y_ticks[0], y_ticks[-1]))
    x_ticks = [value for value in ticks(xs, whole=True) if min(xs) <= value <= max(xs)]
    content = [*axes(plot, x_ticks, y_ticks, x_label, y_label), *[_line(plot, line) for line in series]]
    content += [_ring(plot, mark) for mark in marks if math.isfinite(mark.y)]
    return svg(about, WIDTH, HEIGHT, *content)


def dot_rows(about: str, rows: Sequence[tuple[str, str | None, Sequence[Dot]]], x_label: str) -> Html:
    """Draw one row of dots for each (name, anchor on the page or None, values)."""
    values = [dot.value for _, _, dots in rows for dot in dots]
    x_ticks = ticks(values)
    height = ROW * len(rows) + TOP + BOTTOM
    left = 24 + LETTER * min(LONGEST_NAME, max(len(name) for name, _, _ in rows))
    area = (left, DOT_WIDTH - 16, TOP, TOP + ROW * len(rows))
    plot = Plot((x_ticks[0], x_ticks[-1]), (len(rows) - 0.5, -0.5), *area)
    content = [_vertical(plot, value) for value in x_ticks]
    content.append(_text(plot.at_x(sum(plot.x) / 2), height - 6, x_label, "middle"))
    for index, (name, anchor, dots) in enumerate(rows):
        y = plot.at_y(index)
        label = _text(plot.left - 10, y + 4, name, "end")
        content.append(tag("a", label, href=f"#{anchor}") if anchor else label)
        content.append(tag("line", x1=plot.left, x2=plot.right, y1=y, y2=y, class_="row"))
        content += [_marker(plot.at_x(dot.value), y, dot.colour, dot.meaning) for dot in dots]
    drawing = svg(about, DOT_WIDTH, height, *content)
    return tag("div", drawing, class_="scroll wide", tabindex="0", role="region", aria_label=about)


def reliability_diagram(about: str, counts: Reliability, colour: int) -> Html:
    """Draw the frequency of glacier against its probability, above a histogram of the pixels."""
    grid = [0.0, 0.25, 0.5, 0.75, 1.0]
    plot = Plot((0.0, 1.0), (0.0, 1.0), bottom=HEIGHT - BOTTOM)
    tall, low = HEIGHT + 60, HEIGHT - BOTTOM + 70
    shown = [
        (said, seen, pixels)
        for said, seen, pixels in zip(counts.mean_probability, counts.frequency, counts.pixels)
        if pixels
    ]
    line = Series("", [point[0] for point in shown], [point[1] for point in shown], colour)
    content = axes(plot, grid, grid, "", "share that is glacier")
    content.append(
        tag("line", x1=plot.at_x(0), y1=plot.at_y(0), x2=plot.at_x(1), y2=plot.at_y(1), class_="ideal")
    )
    content.append(_line(plot, line))
    for said, seen, pixels in shown:
        meaning = f"said {said:.2f}, is {seen:.2f} of {pixels:,} pixels"
        content.append(_circle(plot.at_x(said), plot.at_y(seen), 4, colour, meaning))
    content += _histogram(plot._replace(top=plot.bottom + 24, bottom=low), counts.pixels, colour)
    content.append(_text((plot.left + plot.right) / 2, tall - 6, "probability of glacier", "middle"))
    return svg(about, WIDTH, tall, *content)


def _histogram(plot: Plot, pixels: np.ndarray, colour: int) -> list[Html]:
    shares = pixels / max(1, pixels.sum())
    plot = plot._replace(y=(0.0, float(shares.max()) or 1.0))
    bars = []
    for index, share in enumerate(shares):
        x, width = plot.at_x(index / len(shares)), (plot.right - plot.left) / len(shares) - 1
        height = round(plot.bottom - plot.at_y(share), 2)
        title = tag("title", f"{100 * share:.1f} % of the pixels")
        place = {"x": x, "y": plot.at_y(share), "width": round(width, 2), "height": height}
        bars.append(tag("rect", title, class_=f"bar s{colour}", **place))
    label = _text(plot.left - 6, plot.bottom, "pixels", "end")
    return [
        label,
        tag("line", x1=plot.left, x2=plot.right, y1=plot.bottom, y2=plot.bottom, class_="axis"),
        *bars,
    ]


# --- Parts --------------------------------------------------------------------------------------------------


def svg(about: str, width: int, height: int, *content: Html) -> Html:
    """Return a drawing with a description for readers who cannot see it."""
    box = f"0 0 {width} {height}"
    return tag(
        "svg",
        *content,
        viewBox=box,
        role="img",
        aria_label=about,
        class_="chart",
        style=f"max-width:{width}px",
    )


def legend(entries: Iterable[tuple[str, int]], class_: str = "line-key") -> Html:
    """Return the names of series beside their colours; `class_` "dot-key" shows the shapes of dots."""
    items = []
    for name, colour in entries:
        key = tag("svg", _marker(8, 8, colour, ""), viewBox="0 0 16 16", class_="key", aria_hidden="true")
        line = tag("span", class_=f"key line s{colour}", aria_hidden="true")
        items.append(tag("li", key if class_ == "dot-key" else line, name))
    return tag("ul", *items, class_="legend")


def ticks(values: Sequence[float], whole: bool = False) -> list[float]:
    """Return round numbers, at least two, that enclose finite values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-12:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    return [
        float(value)
        for value in MaxNLocator(nbins=6, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    ]


def axes(
    plot: Plot, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str
) -> list[Html]:
    """Return grid lines, numbers and names of both axes."""
    content = []
    for value in y_ticks:
        y = plot.at_y(value)
        content.append(tag("line", x1=plot.left, x2=plot.right, y1=y, y2=y, class_="grid"))
        content.append(_text(plot.left - 6, y + 4, f"{value:.4g}", "end"))
    for value in x_ticks:
        content.append(_text(plot.at_x(value), plot.bottom + 16, f"{value:.4g}", "middle"))
    content.append(_text((plot.left + plot.right) / 2, plot.bottom + 34, x_label, "middle"))
    middle = (plot.top + plot.bottom) / 2
    turned = f"translate(11 {middle}) rotate(-90)"
    return [*content, tag("text", y_label, transform=turned, text_anchor="middle")]


def _vertical(plot: Plot, value: float) -> Html:
    x = plot.at_x(value)
    line = tag("line", x1=x, x2=x, y1=plot.top, y2=plot.bottom, class_="grid" if value else "axis")
    return join(line, _text(x, plot.bottom + 15, f"{value:.4g}", "middle"))


def _line(plot: Plot, line: Series) -> Html:
    pen, path = "M", []
    for x, y in zip(line.x, line.y):
        if math.isfinite(y):
            path.append(f"{pen}{plot.at_x(x):g} {plot.at_y(y):g}")
        pen = "L" if math.isfinite(y) else "M"
    classes = f"line s{line.colour}{' dashed' if line.dashed else ''}"
    return tag("path", tag("title", line.name) if line.name else "", d="".join(path), class_=classes)


def _ring(plot: Plot, mark: Mark) -> Html:
    return _circle(plot.at_x(mark.x), plot.at_y(mark.y), 4.5, mark.colour, mark.meaning)


def _circle(x: float, y: float, radius: float, colour: int, meaning: str) -> Html:
    return tag("circle", tag("title", meaning), cx=x, cy=y, r=radius, class_=f"ring s{colour}")


def _marker(x: float, y: float, colour: int, meaning: str) -> Html:
    """Return a disc, square, triangle or diamond of a series' colour."""
    shapes = (
        "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
        "M-4.5-4.5h9v9h-9z",
        "M0-5.5L5.5 4.5H-5.5z",
        "M0-6L6 0L0 6L-6 0z",
    )
    title = tag("title", meaning) if meaning else ""
    shape = shapes[colour % MARKERS]
    return tag("path", title, d=shape, transform=f"translate({x} {y})", class_=f"dot s{colour % COLOURS}")


def _text(x: float, y: float, content: str, anchor: str) -> Html:
    return tag("text", content, x=round(x, 2), y=round(y, 2), text_anchor=anchor)
