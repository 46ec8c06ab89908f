"""The figures of a report, the same in Markdown and on the page."""

from __future__ import annotations

import base64
import io
from typing import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from train.objective import N_CLASSES
from train.report.reliability import Reliability

matplotlib.rcParams["svg.hashsalt"] = "report"  # the same figure gives the same bytes


def draw_confusions(runs: Mapping[str, dict]) -> Figure:
    """Draw one heat map a run: the share (%) of each label's pixels by predicted class."""
    columns = min(len(runs), 2)
    figure = Figure(figsize=(4.6 * columns, 3.2 * -(-len(runs) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(runs) // columns), columns, squeeze=False).ravel()
    for axis, (name, scores) in zip(axes, runs.items()):
        labels, counts = zip(*[(code, row) for code, row in zip(scores["codes"], scores["confusion"]) if sum(row)])
        shares = np.array(counts) / np.sum(counts, axis=1, keepdims=True)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 0.5 else "black"
            axis.text(column, row, f"{100 * share:.1f}", ha="center", va="center", color=colour)
        axis.set_title(name)
        axis.set_xticks(range(N_CLASSES), scores["classes"])
        axis.set_yticks(range(len(labels)), labels)
        axis.set_xlabel("predicted")
        axis.set_ylabel("label, % of its pixels")
    for axis in axes[len(runs) :]:
        axis.remove()
    return figure


def draw_tiles(runs: Mapping[str, dict]) -> Figure:
    """Draw the extent MCC of each tile, the runs side by side."""
    tile_ids = list(dict.fromkeys(tile for scores in runs.values() for tile in scores["tiles"]))
    figure = Figure(figsize=(max(6.0, 1.5 + 0.5 * len(tile_ids)), 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(runs)
    for index, (name, scores) in enumerate(runs.items()):
        tiles = [scores["tiles"].get(tile) for tile in tile_ids]
        heights = [tile["valid_pixels"]["binary"]["mcc"] if tile else np.nan for tile in tiles]
        axis.bar(np.arange(len(tile_ids)) + (index + 0.5) * width - 0.4, heights, width, label=name)
    axis.set_xticks(range(len(tile_ids)), tile_ids, rotation=45)
    axis.set_ylabel("extent MCC")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid(axis="y", alpha=0.4)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(len(runs), 4))
    return figure


def draw_reliability(counts: Reliability) -> Figure:
    """Draw the share of glacier against its probability, above a histogram of the pixels."""
    figure = Figure(figsize=(4.2, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    full = counts.pixels > 0
    upper.plot([0, 1], [0, 1], "--", color="grey")
    pixels = counts.pixels[full]
    upper.plot(counts.probability[full] / pixels, counts.glacier[full] / pixels, "o-", gid="reliability")
    upper.set_ylabel("share that is glacier")
    upper.grid(alpha=0.4)
    bins = len(counts.pixels)
    lower.bar((np.arange(bins) + 0.5) / bins, counts.pixels / max(1, counts.pixels.sum()), 0.9 / bins)
    lower.set_ylabel("pixels")
    lower.set_xlabel("probability of glacier of either kind")
    return figure


def draw_learning(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw loss and validation MCC by epoch, a colour a fold; dashed is the loss on the training crops."""
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    loss, mcc = figure.subplots(1, 2)
    for fold, history in histories.items():
        (line,) = loss.plot(history["epoch"], history["val_loss"], label=fold)
        loss.plot(history["epoch"], history["train_loss"], "--", color=line.get_color())
        mcc.plot(history["epoch"], history["val_mcc"], color=line.get_color())
    for axis, label in ((loss, "loss"), (mcc, "validation MCC of the extent")):
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.grid(alpha=0.4)
    figure.legend(loc="outside right center")
    return figure


def figure_uri(figure: Figure) -> str:
    """Return a figure as an SVG in a data URI."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return data_uri("svg+xml", content.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """Return the content of an image file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
