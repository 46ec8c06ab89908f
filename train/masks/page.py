"""The page of a map: one HTML file with pictures, areas, settings and limits, that needs nothing beside it."""

from __future__ import annotations

import base64
import math
from html import escape
from typing import Any, Mapping, NamedTuple, Sequence

import cv2
import numpy as np

from prep.labels import IGNORE
from prep.text import NONE, plural
from solution import CLASS_NAMES
from train.masks.georeference import describe
from train.masks.pictures import CODE_COLOURS, false_colour, paint_codes
from train.masks.scene import Scene
from train.masks.strips import NODATA, picture_step
from train.objective import DEBRIS, GLACIER, LAKE

STYLE = """
:root{color-scheme:light dark;--line:#8886}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
figure{margin:0}img{width:100%;height:auto;display:block;border:1px solid var(--line)}
figcaption,.note{font-size:.9rem;opacity:.8}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;padding:0;list-style:none}
.legend i{display:inline-block;width:1em;height:1em;border:1px solid var(--line);
  vertical-align:-.12em;margin-right:.4em}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid var(--line);padding:.25rem .7rem;text-align:right;white-space:nowrap}
th{white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
.files td,.files th{text-align:left;white-space:normal;vertical-align:top}.files td:first-child{overflow-wrap:normal}
@media(max-width:30rem){th,td{padding:.25rem .4rem;font-size:.85rem}ul{padding-left:1.2rem}}
"""
LIMITS = (
    "The networks were trained on 18 tiles of one scene of the Zanskar-Lahaul Himalaya, under snow. In other "
    "regions and seasons, and without snow, expect more mistakes than the scores of the model card say.",
    "Debris-covered ice looks like the ground around it. Its share and its lower end are the least certain part.",
    "Lakes were too few to learn from: the model marks none, or hardly any.",
    "Glaciers that touch each other are one polygon. Ice divides need a terrain model.",
    'Cloud, its shadow and fill are nodata: a glacier marked "cut" is larger than its polygon.',
    "The intervals are those that held 90 of 100 labelled areas of the training scene, on ground that the networks "
    "had not seen. They tell what the networks are unsure of, not what they never learned: elsewhere they hold less.",
)
FILES = (
    ("classes.tif", "classes 0 to 3, 255 nodata; classes.qml is its style in QGIS"),
    ("probabilities.tif", "one band a class, stored value / 250"),
    ("confidence.tif", "probability of the class shown, stored value / 250"),
    (
        "glaciers.gpkg",
        "layer glaciers: one polygon each, with shares, area and interval; layer lakes, if any",
    ),
    ("map.json", "the numbers of this page"),
)


class Map(NamedTuple):
    """What a page tells of: the scene, the numbers of map.json, the settings."""

    scene: Scene
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]


def map_page(shown: Map, picture: np.ndarray, classes: np.ndarray, seconds: float) -> str:
    """Return the page.

    Args:
        shown: what it tells of.
        picture: every n-th pixel of the bands, (h, w, 5) physical units, n as `picture_step` says.
        classes: (H, W) class indices, NODATA.
        seconds: that the map took.
    """
    name = escape(shown.scene.name)
    told = {key: value for key, value in shown.scene.about.items() if value != shown.scene.name}
    about = [f"{key.replace('_', ' ').capitalize()} {value}" for key, value in told.items()]
    parts = [
        f"<h1>Glacier map of {name}</h1>",
        f'<p class="note">{escape("; ".join([describe(shown.scene.shape, shown.scene.place), *about]))}</p>',
        _pictures(shown.scene, picture, classes),
        _legend(),
        "<h2>Areas</h2>",
        _areas(shown.summary),
        _glaciers(shown.summary),
        "<h2>Limits</h2><ul>" + "".join(f"<li>{escape(text)}</li>" for text in LIMITS) + "</ul>",
        "<h2>Files</h2>" + _table(("file", "holds"), FILES, "files"),
        "<h2>Made with</h2>" + _table(("setting", "value"), _settings(shown, seconds), "files"),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>Glacier map of {name}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _pictures(scene: Scene, picture: np.ndarray, classes: np.ndarray) -> str:
    """Return the composite, and the classes over it."""
    step = picture_step(scene)
    small, composite = classes[::step, ::step], false_colour(picture)
    painted = np.isin(small, (GLACIER, DEBRIS, LAKE))[..., None]
    colours = paint_codes(np.where(small == NODATA, IGNORE, small).astype(np.uint8))
    grey = composite.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    over = np.where(painted, 0.25 * composite + 0.75 * colours, grey).astype(np.uint8)
    figures = (
        (composite, "SWIR-1, red and green as red, green and blue: ice is cyan; white is nodata"),
        (over, "classes over brightness"),
    )
    return '<div class="pictures">' + "".join(_figure(*figure) for figure in figures) + "</div>"


def _figure(pixels: np.ndarray, caption: str) -> str:
    encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    data = base64.b64encode(encoded.tobytes()).decode()
    size = f'width="{pixels.shape[1]}" height="{pixels.shape[0]}"'
    return (
        f'<figure><img {size} alt="{escape(caption)}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _legend() -> str:
    entries = [(CODE_COLOURS[code], CLASS_NAMES[code]) for code in (GLACIER, DEBRIS, LAKE)]
    items = [f'<li><i style="background:{colour}"></i>{name}</li>' for colour, name in entries]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _areas(summary: Mapping[str, Any]) -> str:
    """Return the table of the classes, and what was not seen."""
    seen = max(1, sum(summary["pixels"].values()))
    rows = [
        (name, _km2(summary["km2"][name]) if summary["km2"] else NONE, f"{count / seen:.1%}")
        for name, count in summary["pixels"].items()
    ]
    missing = summary["nodata_pixels"] / (seen + summary["nodata_pixels"])
    bright = summary["saturated_pixels"] / seen
    note = f"{missing:.1%} of the pixels are nodata; {bright:.2%} of the others are saturated."
    return _table(("class", "km²", "of what was seen"), rows) + f'<p class="note">{note}</p>'


def _glaciers(summary: Mapping[str, Any]) -> str:
    """Return the total of the glaciers and the table of the largest ones."""
    found = summary["glaciers"]
    if not found or not found["number"]:
        return "<p>No glacier polygons.</p>"
    total = (
        f"{plural(found['number'], 'glacier')} of {_km2(found['area_km2'])} km² in all "
        f"(90 % interval {_km2(found['sum_low_km2'])} to {_km2(found['sum_high_km2'])} km²); "
        f"{found['cut']} of them cut by nodata or the edge."
    )
    rows = [
        (
            f"{row['id']}, cut" if row["cut"] else str(row["id"]),
            _km2(row["area_km2"]),
            f"{_km2(row['area_low_km2'])} to {_km2(row['area_high_km2'])}",
            f"{row['debris_share']:.0%}",
        )
        for row in found["largest"]
    ]
    head = ("largest", "km²", "90 % interval", "debris")
    return f"<p>{escape(total)}</p>" + _table(head, rows)


def _km2(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 10 else 2}f}"


def _settings(shown: Map, seconds: float) -> Sequence[Sequence[str]]:
    words = {"True": "yes", "False": "no", "None": "none"}
    chosen = [(key, words.get(str(value), str(value))) for key, value in shown.settings.items() if key != "weights"]
    return (
        ("weights", shown.summary["made_of"]["weights"]),
        ("passes of each window", str(shown.summary["passes"])),
        *((key.replace("_", " ").replace("km2", "area, km²"), value) for key, value in chosen),
        ("seconds", f"{seconds:.0f}"),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="wide"><table class="{kind}"><tr>{"</tr><tr>".join(lines)}</tr></table></div>'
