"""A disk that is really full, at many moments of a run: all that is there is whole.

The disk is a small tmpfs. Only root may mount one; as another user, `unshare -Umr make test` does it too.
"""

import os
import subprocess
from pathlib import Path

import pytest
from fuzz import kills, runs
from hkh_helpers import make_sample
from support import write_model

import solution
from prep.__main__ import main as prep_main
from prep.synthetic.hkh import LABELS_FILE, SCENES_FOLDER

ROOM = 64 * 2**20  # bytes


class Disk:
    """A mounted tmpfs whose size can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def in_use(self) -> int:
        """Return the bytes of the pages in use; a kernel refuses a size below that."""
        state = os.statvfs(self.folder)
        return (state.f_blocks - state.f_bfree) * state.f_frsize

    def resize(self, size: int) -> None:
        """Give the disk another size in bytes, rounded up to pages, but never less than is in use."""
        page = os.statvfs(self.folder).f_frsize
        pages = max(-(-size // page) * page, self.in_use(), page)  # 0 would be no limit
        refusal = mount("-o", f"remount,size={pages}", str(self.folder))
        assert not refusal, refusal


def mount(*arguments: str) -> str:
    """Run mount; return what it says where it fails."""
    ended = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    return ended.stderr if ended.returncode else ""


@pytest.fixture
def disk(tmp_path):
    """Return a small disk; skip the test where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    refusal = mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder))
    if refusal:
        pytest.skip(f"no disk can be mounted here ({refusal.strip()}); as root, or with unshare -Umr, it can")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run(door, *arguments: str) -> tuple[object, str]:
    """Call a command line; return its exit status and what it said."""
    ending = runs.call("full disk", lambda: door([str(argument) for argument in arguments]))
    assert not ending.raised and "Traceback" not in ending.said, ending
    return ending.result, ending.said


@pytest.mark.parametrize("pages", [0, 1, 2, 4, 7])
def test_masks_that_do_not_fit_are_named_and_come_with_the_next_run(disk, tmp_path, pages):
    runs.healthy_tiles(tmp_path / "in", 6, 48)
    call = (tmp_path / "in", disk.folder / "out", "--weights", write_model(tmp_path / "model.pth"))
    assert run(solution.main, *call)[0] == 0
    expected = kills.digests(disk.folder / "out")
    for path in (disk.folder / "out").iterdir():
        path.unlink()
    disk.resize(4096 * (pages + 1))  # a page for the folder
    status, said = run(solution.main, *call)
    left = kills.digests(disk.folder / "out")
    assert status == 0 if left == expected else status in (1, 2)
    assert len(left) >= min(pages, len(expected))
    assert all(expected[name] == digest for name, digest in left.items())
    assert not kills.hidden(disk.folder / "out")
    if left != expected:
        assert "No space left on device" in said
    disk.resize(ROOM)
    assert run(solution.main, *call)[0] == 0 and kills.digests(disk.folder / "out") == expected


def prepare_twice(disk, call, shares: list[float]) -> None:
    """Run a command of prep on disks with room for these shares of another store, then with room for all."""
    out = disk.folder / "store"
    assert run(prep_main, *call)[0] == 0
    expected = kills.digests(out)
    assert run(prep_main, *call, "--overwrite")[0] == 0
    assert kills.digests(out) == expected
    used = disk.in_use()
    statuses = []
    for share in shares:
        disk.resize(int(used * (1 + share)))  # the older store takes its place
        status, said = run(prep_main, *call, "--overwrite")
        assert status == 0 or "free space" in said, said
        statuses.append(status)
        assert kills.digests(out) == expected
        disk.resize(ROOM)
    assert statuses.count(2) >= 3
    assert run(prep_main, *call, "--overwrite")[0] == 0
    assert kills.digests(out) == expected and kills.hidden(disk.folder) == []


SHARES = [0.05, 0.2, 0.5, 0.8, 0.95, 1.1]


def test_prep_competition_keeps_the_older_store_on_a_full_disk(disk, tmp_path):
    kills.lay_out_training(tmp_path / "in", 8, 48)
    call = ("competition", "--data", tmp_path / "in", "--out", disk.folder / "store")
    prepare_twice(disk, call, SHARES)


def test_prep_hkh_keeps_the_older_store_on_a_full_disk(disk, tmp_path):
    data = make_sample(tmp_path / "in")
    source = ("--scenes", data / SCENES_FOLDER, "--labels", data / LABELS_FILE)
    options = ("--size", 64, "--overlap", 16, "--max-background", 1, "--jobs", 1)
    prepare_twice(disk, ("hkh", *source, *options, "--out", disk.folder / "store"), SHARES)


def test_a_full_disk_leaves_no_store_where_there_was_none(disk, tmp_path):
    kills.lay_out_training(tmp_path / "in", 8, 48)
    disk.resize(100 * 1024)
    status, said = run(prep_main, "competition", "--data", tmp_path / "in", "--out", disk.folder / "store")
    assert status == 2 and "free space" in said
    assert list(disk.folder.iterdir()) == []
