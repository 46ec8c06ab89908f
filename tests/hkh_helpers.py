"""Small HKH inputs for the tests: a sample made once, ways to spoil it, and folders as bytes."""

import shutil
from pathlib import Path

import numpy as np
import rasterio
from hypothesis import settings

from prep.hkh import prepare as hkh
from prep.synthetic.hkh import LABELS_FILE, SCENES_FOLDER, write_hkh_sample

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
SCENES, SIDE = 3, 160
SMALL = hkh.Settings(hkh.Grid(64, 16), hkh.Filter(50, 5, 10, 0.9), val_share=0.3)
ALL = SMALL._replace(keep=hkh.Filter(0, 0, 0, 1.0))


def make_sample(folder: Path) -> Path:
    """Write a sample of three scenes of 160 px and return its folder."""
    write_hkh_sample(folder, SCENES, SIDE, seed=1)
    return folder


def copy_sample(sample: Path, folder: Path) -> Path:
    """Copy a sample, so that a test may spoil it; return the copy."""
    return Path(shutil.copytree(sample, folder))


def source_of(sample: Path, **changes) -> hkh.Source:
    """Return a sample as input of `prepare`."""
    return hkh.Source(scenes=sample / SCENES_FOLDER, labels=(sample / LABELS_FILE,))._replace(**changes)


def scene_paths(sample: Path) -> list[Path]:
    return sorted((sample / SCENES_FOLDER).glob("*.tif"))


def rewrite(path: Path, change=lambda values: values, descriptions="keep", **profile) -> None:
    """Write a scene again with changed values, profile or band descriptions."""
    with rasterio.open(path) as file:
        values, old = change(file.read()), {**file.profile, **profile}
        names = file.descriptions if descriptions == "keep" else descriptions
        tags = file.tags()
    path.unlink()
    with rasterio.open(path, "w", **{**old, "count": len(values), "dtype": values.dtype}) as file:
        file.write(values)
        file.update_tags(**tags)
        if names:
            file.descriptions = names


def contents(folder: Path) -> dict[str, bytes]:
    """Return {relative path: bytes} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def left_over(folder: Path) -> list[str]:
    """Return the names in a folder, hidden ones too."""
    return sorted(entry.name for entry in folder.iterdir())


def write_patches(folder: Path, scenes: int = 3, per_scene: int = 2, side: int = 64, channels: int = 15) -> Path:
    """Write patches as the data set has them: more clean ice than debris, order any, clean, debris."""
    folder.mkdir()
    for scene in range(scenes):
        for number in range(per_scene):
            random = np.random.default_rng([scene, number])
            image = random.integers(2, 250, (side, side, channels)).astype(np.float32)
            image[:4] = 0
            mask = np.zeros((side, side, 3), np.float32)
            mask[20:50, :, 0] = mask[20:40, :, 1] = mask[38:44, :, 2] = 1
            np.save(folder / f"slice_{scene}_img_{number:03d}.npy", image)
            np.save(folder / f"slice_{scene}_mask_{number:03d}.npy", mask)
    return folder
