"""Raw data to tile store: labels, statistics, folds and the commands that write `data/<name>/`."""

import io
import os
import sys

# Rasterio and pyproj bring their own data, and nothing here opens a window: what another installation or a notebook
# has set would break them. This is run before they are imported.
for _name in ("PROJ_DATA", "PROJ_LIB", "GDAL_DATA", "GDAL_DRIVER_PATH", "MPLBACKEND"):
    os.environ.pop(_name, None)
for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):  # names of files, which may be any bytes, are printed on any console
        _stream.reconfigure(errors="backslashreplace")
