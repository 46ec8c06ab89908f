"""`train bench` counts right: stages add up to the run, and a second run is compared with the first.

No time is asserted.
"""

import re
import threading
from pathlib import Path

import pytest
import support

import solution
from train.submit import bench
from train.submit.bench import BenchError, Stopwatch


class Clock:
    """A clock that the timed functions move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


def test_a_stage_has_its_time_without_the_stages_within_it():
    clock = Clock()
    watch = Stopwatch(clock)
    inner = watch.watch("inner", clock.pass_by)

    def work(before, within):
        clock.pass_by(before)
        inner(within)
        inner(within)
        return before

    outer = watch.watch("outer", work)
    assert outer(3.0, 1.5) == 3.0
    assert dict(watch.seconds) == {"inner": 3.0, "outer": 3.0}
    with pytest.raises(TypeError):
        outer(1.0)
    assert outer(0.5, 0.0) == 0.5  # the failure before left nothing open
    assert watch.seconds["outer"] == 3.5


def test_stages_of_other_threads_are_not_within_those_of_this_one():
    clock = Clock()
    watch = Stopwatch(clock)
    aside = watch.watch("aside", clock.pass_by)

    def work():
        thread = threading.Thread(target=aside, args=(2.0,))
        thread.start()
        thread.join()

    watch.watch("in line", work)()
    assert dict(watch.seconds) == {"aside": 2.0, "in line": 2.0}


def test_every_stage_is_a_function_of_solution():
    assert all(callable(getattr(solution, name)) for name in [*bench.STAGES.values(), *bench.ASIDE.values()])


def measured(seconds: float, **changes) -> dict:
    """Return made-up figures of a run over ten tiles."""
    stages = {"loading the weights": 2.0, "forward passes": seconds - 2.0, "writing": 1.0}
    found = {"seconds": seconds, "stages": stages, "bare": 8.0, "passes": 40, "workers": 2, "start": 4.0}
    found |= {"peak_memory": 1_500_000_000, "tiles": 10, "size": "512", "cores": 2, "machine": "machine free"}
    return {**found, "weights": "a" * 64, "date": "2026-01-01", **changes}


def test_a_report_compares_with_the_run_before():
    alone = bench.format_report(measured(12.0), {})
    assert "| whole run / its bare forward passes | 1.500 | – | – |" in alone
    assert "| writing, beside the passes | 1.000 | 8.3% |" in alone
    beside = bench.format_report(measured(9.0), measured(12.0))
    assert "| whole run, s | 9.000 | 12.000 | 0.750 |" in beside
    assert "| a tile, s | 0.900 | 1.200 | 0.750 |" in beside
    assert f"SHA-256 `{'a' * 64}`" in beside and "machine free" in beside


def test_figures_lie_beside_the_report_and_only_the_like_are_compared(tmp_path, monkeypatch):
    runs = [measured(12.0), measured(9.0), measured(9.0, passes=80)]
    monkeypatch.setattr(bench, "run_measurement", lambda *_: runs.pop(0))
    monkeypatch.setattr(bench, "measure_machine", lambda load: "machine free")
    weights, out = tmp_path / "model.pth", tmp_path / "local" / "bench.md"
    weights.write_bytes(b"any")
    first, second, third = (bench.bench(weights, None, 1, 64, out) for _ in range(3))
    assert "| 12.000 | – | – |" in first and "| 9.000 | 12.000 | 0.750 |" in second.replace("| 108", "")
    assert "| 9.000 | – | – |" in third or "| 90.000 | – | – |" in third
    assert sorted(path.name for path in out.parent.iterdir()) == ["bench.json", "bench.md"]


@pytest.mark.slow
def test_the_whole_measurement(tmp_path):
    weights = support.write_model(tmp_path / "model.pth", views=2)
    report = bench.bench(weights, None, 2, 96, tmp_path / "bench.md")
    stages = re.findall(r"^\| ([a-zA-Z ,]+) \| (-?[\d.]+) \| -?[\d.]+% \|$", report, re.MULTILINE)
    seconds = {name: float(value) for name, value in stages}
    assert set(seconds) >= {*bench.STAGES, bench.FORWARD, bench.OTHERWISE}
    whole = float(re.search(r"whole run, s \| ([\d.]+)", report)[1])
    beside = sum(value for name, value in seconds.items() if name.endswith("beside the passes"))
    assert sum(seconds.values()) - beside == pytest.approx(whole, abs=0.01)
    assert seconds[bench.FORWARD] > 0 and "2 tiles, 4 passes in all" in report
    assert not re.search(r"/(tmp|home|root|work)/", report.rsplit("\n", 1)[0])


def test_what_cannot_be_measured_is_named(tmp_path):
    support.write_tile(tmp_path / "tiles", "001", support.scene_numbers(0))
    (tmp_path / "model.pth").write_text("no model")
    with pytest.raises(BenchError, match="ended with status 1, expected 0; it said: .*damaged"):
        bench.run_measurement(tmp_path / "tiles", tmp_path / "model.pth", tmp_path / "out")
    with pytest.raises(solution.InputError, match="no weights: looked for"):
        bench.bench(Path("none.pth"), None, 1, 64, tmp_path / "bench.md")
