"""Rasters of classes and probabilities for every GIS: cloud-optimised GeoTIFFs, and a style for QGIS."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Iterable, Mapping, NamedTuple, Optional
from xml.sax.saxutils import quoteattr

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.errors import NotGeoreferencedWarning

from prep.files import write_text
from train.masks.georeference import CACHE, Georeference
from train.masks.pictures import CODE_COLOURS


class Layout(NamedTuple):
    """What a raster of bytes is: names of its bands, and what its values mean.

    `values` {stored value: (code of CODE_COLOURS, name)} gives a colour table. `scale` times a stored value
    is the quantity. `tags` are metadata of the file.
    """

    shape: tuple[int, int]
    bands: tuple[str, ...]
    nodata: Optional[int] = None
    scale: float = 1.0
    values: Mapping[int, tuple[int, str]] = {}
    tags: Mapping[str, str] = {}


def write_raster(
    path: Path, place: Optional[Georeference], layout: Layout, rows: Iterable[tuple[int, np.ndarray]]
) -> Path:
    """Write a cloud-optimised GeoTIFF, whole or not at all, holding no more than some rows in memory.

    Args:
        path: the file; a style for QGIS goes beside it where there is a colour table.
        place: None for a raster without georeference.
        layout: its shape, bands and values.
        rows: (first row, (bands, h, W) uint8) from top to bottom.
    """
    height, width = layout.shape
    where = {"crs": place.crs, "transform": place.transform} if place else {}
    about = {"count": len(layout.bands), "dtype": "uint8", "nodata": layout.nodata, "compress": "deflate"}
    if not layout.values:
        about["photometric"] = "minisblack"  # or GDAL takes four bands for a colour picture with alpha
    with (
        warnings.catch_warnings(),
        rasterio.Env(GDAL_CACHEMAX=CACHE),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder,
    ):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        draft, finished = Path(folder) / "draft.tif", Path(folder) / path.name
        with rasterio.open(
            draft,
            "w",
            driver="GTiff",
            width=width,
            height=height,
            tiled=True,
            bigtiff="if_safer",
            **about,
            **where,
        ) as raster:
            if layout.values:
                colours = {value: CODE_COLOURS[code] for value, (code, _) in layout.values.items()}
                raster.write_colormap(1, {value: (*bytes.fromhex(one[1:]), 255) for value, one in colours.items()})
                raster.update_tags(classes=", ".join(f"{value} {name}" for value, (_, name) in layout.values.items()))
            raster.update_tags(**layout.tags)
            raster.scales = (layout.scale,) * len(layout.bands)
            raster.descriptions = layout.bands
            for row, values in rows:
                raster.write(values, window=((row, row + values.shape[1]), (0, width)))
        overviews = "mode" if layout.values else "average"
        rasterio.shutil.copy(draft, finished, driver="COG", compress="deflate", overview_resampling=overviews)
        os.replace(finished, path)
    if layout.values:
        write_style(path.with_suffix(".qml"), layout.values)
    return path


def write_style(path: Path, values: Mapping[int, tuple[int, str]]) -> None:
    """Write the style that QGIS takes for the raster of the same name: colours and names of the values."""
    entries = "\n".join(
        f'   <paletteEntry value="{value}" color="{CODE_COLOURS[code]}" alpha="255" label={quoteattr(name)}/>'
        for value, (code, name) in values.items()
    )
    write_text(
        path,
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        '<qgis version="3.22"><pipe><rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1">\n'
        f"  <colorPalette>\n{entries}\n  </colorPalette>\n</rasterrenderer></pipe></qgis>\n",
    )
