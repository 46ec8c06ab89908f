"""The speed of `prep hkh`: that both sides do the same work, and what the report says."""

import pytest

from prep import bench

pytestmark = [
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),  # rasterio 1.4 on affine 3
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
]


def test_both_sides_write_a_file_for_each_window_and_as_many_bytes(tmp_path):
    job = bench.make_job(tmp_path, 1100)  # larger than what is simulated: repeated, in windows that overlap
    for kind, function in (("prep", bench.run_prep), ("bare", bench.run_bare)):
        (tmp_path / kind).mkdir()
        function(job, tmp_path / kind)
    files = list((tmp_path / "prep").rglob("*.npy"))
    bare = list((tmp_path / "bare").iterdir())
    assert len(files) == len(bare) == 2 * 9
    written = sum(path.stat().st_size for path in files)
    assert written == pytest.approx(sum(path.stat().st_size for path in bare), rel=0.001)


def test_the_report_has_the_figures(tmp_path):
    seconds = {
        ("prep", "wall"): [2, 4, 3],
        ("bare", "wall"): [1, 2, 3],
        ("prep", "CPU"): [2.0],
        ("bare", "CPU"): [1.0],
    }
    result = bench.Result(1024, seconds, 1.048576, 0.5, 4)
    assert result.speed("prep", "wall") == pytest.approx(1.048576 / 3)
    assert (result.ratio("wall"), result.ratio("CPU"), result.tiles()) == (0.5, 0.5, 4)
    bench.write_report(tmp_path / "reports" / "prep.md", result)
    text = (tmp_path / "reports" / "prep.md").read_text()
    assert "| `python -m prep hkh`, wall time | 0.3 | 2.00, 4.00, 3.00 |" in text
    assert "in 4 tiles of 512 px" in text and "ratio 0.50" in result.summary()
