"""`prep competition` on input that means harm, in places that are full, closed or shared, and after kills."""

import os
import resource
import shutil
import signal
import struct
import zlib
from pathlib import Path

import pytest
from fuzz import kills, runs

from prep import store
from prep.__main__ import main as prep_main
from prep.store import TileStore


@pytest.fixture
def data(tmp_path):
    """Return a training folder of six tiles."""
    kills.lay_out_training(tmp_path / "train", 6, 32)
    return tmp_path / "train"


@pytest.fixture
def out(tmp_path):
    """Return the place for a store."""
    return tmp_path / "stores" / "store"


def run_main(data, out, *more):
    """Run the command under the limits of the search; return its exit status and what it said."""
    ending = runs.call("prep", lambda: prep_main(["competition", "--data", str(data), "--out", str(out), *more]))
    assert not ending.raised, ending.raised
    assert "Traceback" not in ending.said, ending.said
    return ending.result, ending.said


def assert_refused(data, out, *words):
    """Assert that no store was made, for a reason that holds these words."""
    status, said = run_main(data, out)
    assert status == 2 and all(word in said for word in words), said
    assert not out.exists() and (not out.parent.exists() or kills.hidden(out.parent) == [])


def png_bomb(side):
    """Return a small PNG of side x side px."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packed = zlib.compress(bytes(side + 1) * 100, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


LABELS = {
    "a folder": Path.mkdir,
    "a pipe that nobody writes to": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a bomb": lambda path: path.write_bytes(png_bomb(60000)),
    "cut short": lambda path: path.write_bytes(png_bomb(60000)[:20]),
    "no picture": lambda path: path.write_text("404 Not Found"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_label_that_is_none_is_refused(data, out, kind):
    (data / "label" / "img001.tif").unlink()
    LABELS[kind](data / "label" / "img001.png")
    assert_refused(data, out, "label/img001.png: cannot be read as a PNG", "copy or export the file again")


def test_names_of_any_bytes_come_back_from_the_store(data, out):
    name = os.fsdecode(b"img 001 \xe9\n\xff.tif")
    for path in list(data.glob("*/img001.tif")):
        path.rename(path.with_name(name))
    status, said = run_main(data, out)
    assert status == 0, said
    tiles = TileStore(out)
    assert name[:-4] in tiles.tile_ids and name in [tile.source for tile in tiles.tiles]
    assert tiles.image(name[:-4]).shape == (32, 32, 5)
    assert name[:-4] in tiles.fold_of("stratified")


@pytest.mark.parametrize("place", ["x" * 300, "a/" * 3000, "loop", "loop/store", "file/store"])
def test_a_place_that_cannot_be_is_an_error(data, tmp_path, place):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("in the way")
    status, said = run_main(data, tmp_path / place)
    assert status == 2 and "error: " in said
    assert "name another" in said.lower()


def test_a_full_disk_is_an_error_and_leaves_nothing(data, out):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        assert_refused(data, out, "free space", "--out", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


# --- Killed and simultaneous runs -----------------------------------------------------------------


def abandon(out):
    """Make what a process leaves that is killed between moving an older store aside and the new one in."""
    folder = out.parent / ".store-building-abcd"
    folder.mkdir(parents=True)
    (folder / "store").mkdir()
    shutil.move(out, folder / "old")
    return folder


def test_a_store_that_was_moved_aside_comes_back_with_the_next_call(data, out):
    assert run_main(data, out)[0] == 0
    before = kills.digests(out)
    abandoned = abandon(out)
    with pytest.raises(ValueError, match="stop"), store.create(out):
        assert not abandoned.exists()
        raise ValueError("stop")
    assert kills.digests(out) == before and kills.hidden(out.parent) == []


def test_a_folder_that_a_living_process_fills_is_left_alone(out):
    with store.create(out) as first:
        with pytest.raises(ValueError, match="stop"), store.create(out):
            assert first.folder.is_dir()
            raise ValueError("stop")
        assert first.folder.is_dir()
