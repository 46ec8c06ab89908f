"""The checklists: all lines pass on synthetic data, and each fails on inputs that are spoilt for it."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from hkh_helpers import SMALL, make_sample, source_of
from support import TINY_ARCH, write_model
from train_helpers import SMOKE

from prep import ground
from prep.competition import prepare as prepare_tiles
from prep.hkh.prepare import prepare as prepare_hkh
from prep.store import TileStore
from prep.synthetic.scenes import write_sample
from train.checklist import LINES, add_checklist_arguments, run_checklist
from train.pretrained import input_identity

PRETRAINING, TUNING, SUBMISSION = (f"before {step}, " for step in ("pretraining", "fine-tuning", "submission"))

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # rasterio 1.4 on affine 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with both stores, a checkpoint, a recipe and weights."""
    folder = tmp_path_factory.mktemp("inputs")
    prepare_hkh(source_of(make_sample(folder / "hkh-raw")), folder / "hkh", SMALL)
    write_sample(folder / "tiles", 5, 64, 0, "training", "both")
    prepare_tiles(folder / "tiles", folder / "store")
    write_checkpoint(folder)
    (folder / "recipe").write_text(f"base: {SMOKE}\n")
    write_model(folder / "weights")
    return folder


def write_checkpoint(folder, **changes) -> None:
    record = {"format": "glacier-kit-fold/2", "state_dict": {}, "arch": TINY_ARCH, **input_identity()}
    seen = ground.union_of(store := TileStore(folder / "hkh"), store.tile_ids).wkt
    torch.save({**record, "normalization": store.stats, "ground": seen, **changes}, folder / "pretrained")


def walk(folder, capsys, weights="none") -> tuple[int, dict[str, str]]:
    """Return the exit status, and the mark of each line."""
    parser = argparse.ArgumentParser()
    add_checklist_arguments(parser)
    given = {name: folder / name for name in ("hkh", "store", "recipe", "pretrained")} | {"weights": folder / weights}
    status = run_checklist(parser.parse_args([part for n, p in given.items() for part in (f"--{n}", str(p))]))
    said = capsys.readouterr().out.splitlines()
    return status, {line[6:].partition(": ")[0]: line[:4].strip() for line in said}


def test_every_line_passes_on_synthetic_data(inputs, capsys):
    status, marks = walk(inputs, capsys, "weights")
    assert len(marks) == len(LINES) and set(marks.values()) == {"pass"} and status == 0


def test_what_is_not_there_does_not_apply(tmp_path, capsys):
    (tmp_path / "recipe").write_text(f"base: {SMOKE}\n")
    status, marks = walk(tmp_path, capsys)
    assert {line for line, mark in marks.items() if mark != "n/a"} == {TUNING + "learning rate"} and status == 0


# --- Ways to spoil them -------------------------------------------------------------------------------------


def change_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def two_thermals(folder, _) -> None:
    wrong = dict(zip(("B1", "B2", "B3", "B6_VCID_1", "B6_VCID_2"), (0, 1, 2, 5, 6)))
    change_json(
        folder / "hkh" / "store.json",
        lambda about: about["channels"].update(dict.fromkeys(about["channels"], wrong)),
    )


def imagenet(folder, store) -> None:
    change_json(
        folder / store / "stats.json",
        lambda stats: stats["mean"].__setitem__(slice(3), [0.406, 0.456, 0.485]),
    )


def digital_numbers(folder, store) -> None:
    change_json(folder / store / "stats.json", lambda stats: stats["mean"].__setitem__(4, 140.0))


def grey_values(folder, store) -> None:
    path = next((folder / store / "masks").iterdir())
    mask = np.load(path)
    mask[0] = 85
    np.save(path, mask)


def no_glaciers(folder, store) -> None:
    head, *rows = (folder / store / "tiles.csv").read_text().splitlines()
    counts = head.split(",").index("other")
    bare = [",".join([*row.split(",")[:counts], "9", "0", "0", "0", "0", "0", "0"]) for row in rows]
    (folder / store / "tiles.csv").write_text("\n".join([head, *bare]) + "\n")


def scene_on_both_sides(folder, store) -> None:
    train, val = (folder / store / name for name in ("train_ids.txt", "val_ids.txt"))
    first, rest = train.read_text().split("\n", 1)
    val.write_text(f"{val.read_text()}{first}\n")
    train.write_text(rest)


def tile_in_no_fold(folder, store) -> None:
    change_json(folder / store / "folds.json", lambda folds: folds["spatial"].popitem())


def one_place_twice(folder, store) -> None:
    outline = next(iter(ground.read_ground(folder / store).values()))
    ground.write_ground(folder / store, dict.fromkeys(TileStore(folder / store).tile_ids, outline))


def seen_tiles(folder, _) -> None:
    store = TileStore(folder / "store")
    write_checkpoint(folder, ground=ground.union_of(store, store.tile_ids[:1]).wkt)


def slow_learning(folder, _) -> None:
    (folder / "recipe").write_text(f"base: {SMOKE}\noptim: {{lr: 5.0e-5}}")


SPOILS = [
    (PRETRAINING + "bands by name", two_thermals),
    (PRETRAINING + "folds without a leak", scene_on_both_sides),
    (TUNING + "folds without a leak", tile_in_no_fold),
    (TUNING + "folds without a leak", one_place_twice),
    (TUNING + "pretrained checkpoint", seen_tiles),
    (TUNING + "pretrained checkpoint", lambda folder, _: write_checkpoint(folder, units=["DN"] * 5)),
    (TUNING + "learning rate", slow_learning),
    *(
        (title + line, spoil)
        for title in (PRETRAINING, TUNING)
        for line, spoil in (
            ("units, normalisation", imagenet),
            ("units, normalisation", digital_numbers),
            ("masks of class indices", grey_values),
            ("tiles without a glacier", no_glaciers),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("line", "spoil"), SPOILS, ids=lambda value: getattr(value, "__name__", None))
def test_a_spoilt_input_fails_its_line_alone(inputs, tmp_path, capsys, line, spoil):
    folder = shutil.copytree(inputs, tmp_path / "in")
    spoil(folder, "hkh" if line.startswith(PRETRAINING) else "store")
    status, marks = walk(folder, capsys)
    assert {name for name, mark in marks.items() if mark == "FAIL"} == {line} and status == 1


def test_weights_that_are_cut_short_fail(inputs, tmp_path, capsys):
    (tmp_path / "recipe").write_text(f"base: {SMOKE}\n")
    (tmp_path / "weights").write_bytes((inputs / "weights").read_bytes()[:1000])
    assert walk(tmp_path, capsys, "weights")[1][SUBMISSION + "size, masks from an empty folder"] == "FAIL"
