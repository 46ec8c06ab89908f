"""What another installation, a notebook or a batch system leaves in the environment breaks no command."""

import os
import subprocess
import sys

import numpy as np
from support import PROJECT, scene_numbers, write_tile

FOREIGN = {
    **dict.fromkeys(("PROJ_DATA", "PROJ_LIB", "GDAL_DATA"), "/nowhere/of/another/installation"),
    "MPLBACKEND": "module://a_notebook.of_another_environment",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NAME": "glaciers",
    "PYTHONIOENCODING": "ascii",
}
PLACE = """
import train.masks.georeference, train.report.figures
from rasterio.crs import CRS
from pyproj import Geod, Transformer
print(CRS.from_epsg(32643).to_wkt()[:6], Transformer.from_crs(32643, 4326).transform(5e5, 37e5)[0] > 33)
"""
TRAINER = """
import lightning.pytorch as pl
from train.config import load_config
from train.hardware import trainer_options
print(pl.Trainer(**trainer_options(load_config()), logger=False).num_devices)
"""


def run(*arguments) -> str:
    """Return what Python says in those surroundings; it has to end well."""
    surroundings = {**os.environ, **FOREIGN}
    ended = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=PROJECT, env=surroundings, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_coordinate_systems_and_pictures_use_their_own_data():
    assert run("-c", PLACE).split() == ["PROJCS", "True"]


def test_a_training_of_one_process_counts_no_tasks_of_a_batch_system():
    assert run("-c", TRAINER).strip() == "1"


def test_a_console_of_ascii_is_enough(tmp_path):
    folder = tmp_path / "Gletscher ä"
    write_tile(folder, "001", scene_numbers(0)[:64, :64])
    run("solution.py", folder, tmp_path / "氷河", "--time-budget", "inf")
    assert len(list((tmp_path / "氷河").glob("*.png"))) == 1
    run("-m", "train", "preview", "--data", folder, "--masks", tmp_path / "氷河", "--out", tmp_path / "ö.png")
    assert (tmp_path / "ö.png").is_file() and np.any(scene_numbers(0))
