"""`train bench` counts right: stages add up, forms and the straightforward program agree, aims compare.

No time is asserted.
"""

import re
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import support
import torch

import solution
from train.__main__ import main
from train.submit import bench, bench_plain, bench_runs
from train.submit.bench import BenchError, Measurements


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Path:
    """Return a data folder of two tiles, one of which is neither square nor a multiple of 32 px."""
    folder = tmp_path_factory.mktemp("tiles")
    support.write_tile(folder, "001", support.scene_numbers(0))
    support.write_tile(folder, "002", support.scene_numbers(1)[:70])
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Return a model file of two members of unequal weight and normalisation, six views, all cheap steps."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    steps = solution.Postprocess(extent_bias=0.3, crf=None, min_speck=6, min_hole=4)
    content = support.model_content((1.0, 2.5), steps, (0.0, 0.1, -0.2, 0.3), views=6)
    content["members"][1]["normalization"] = {
        "mean": [0.6, 0.6, 0.6, 0.1, 250.0],
        "std": [0.4, 0.5, 0.6, 0.1, 7.0],
    }
    torch.save(content, path)
    return path


@pytest.fixture(autouse=True)
def same_torch():
    """Give torch its settings back: what is timed sets them for a process of its own."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


# --- Stages ---------------------------------------------------------------------------------------


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
    watch = bench_runs.Stopwatch(clock)
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
    watch = bench_runs.Stopwatch(clock)
    aside = watch.watch("aside", clock.pass_by)

    def work():
        thread = threading.Thread(target=aside, args=(2.0,))
        thread.start()
        thread.join()

    watch.watch("in line", work)()
    assert dict(watch.seconds) == {"aside": 2.0, "in line": 2.0}


def test_the_stages_of_a_run_add_up_to_it():
    stages = {"loading the weights": 2.0, "reading": 5.0, "forward passes": 10.0, "writing": 4.0}
    completed = bench_runs.complete(stages, 13.5, 1)
    assert completed["everything else"] == 1.5
    in_line = [seconds for stage, seconds in completed.items() if stage not in bench_runs.ASIDE]
    assert sum(in_line) == 13.5
    assert set(completed) == {*bench_runs.STAGES, bench_runs.FORWARD, bench_runs.OTHERWISE}
    shared = bench_runs.complete(stages, 13.5, 4)
    assert (shared["loading the weights"], shared["reading"]) == (2.0, 5.0), "in one thread"
    assert (shared["forward passes"], shared["everything else"]) == (2.5, 9.0)


def test_a_watched_run_gives_the_same_masks_and_leaves_solution_as_it_was(tiles, weights, tmp_path):
    before = {name: getattr(solution, name) for name in (*bench_runs.STAGES.values(), "segment_fully")}
    run = bench_runs.WatchedRun(tiles, weights, tmp_path / "masks")
    assert before == {name: getattr(solution, name) for name in before}
    assert all("forward" not in vars(member.network) for member in run.model.members)
    expected = solution.segment_folder(tiles, weights, None, "inf")
    assert run.summary.passes == expected.passes == {"001": 12, "002": 12}
    for key, mask in expected.masks.items():
        np.testing.assert_array_equal(run.summary.masks[key], mask)
    needed = set(bench_runs.STAGES) - {"finding the fastest form"}
    assert all(run.stages[stage] > 0 for stage in {*needed, bench_runs.FORWARD})
    assert run.stages["finding the fastest form"] == 0  # for so few passes it is not looked for
    assert 0 <= run.stages[bench_runs.OTHERWISE] < run.seconds.clock


def test_the_bare_passes_are_those_of_the_run(tiles, weights):
    model = solution.load_model(weights)
    image = solution.read_tile(solution.find_tiles(tiles)[1])
    total = 0.0
    with torch.inference_mode():
        inputs = bench_runs.pass_inputs(model, image)
        assert len(inputs) == len(model.passes) == 12
        for (network, x, view), (number, _) in zip(inputs, model.passes):
            assert network is model.members[number].network
            probs = view.inverse(network(view.forward(x)).softmax(1))
            total = total + model.members[number].weight * probs
    height, width = image.shape[:2]
    mean = (total / total.sum(1, keepdim=True))[0, :, :height, :width]
    expected = solution.ensemble_probabilities(model, image, model.passes).probs
    np.testing.assert_allclose(solution.to_array(mean), expected, atol=1e-5)


def test_the_form_of_a_run_is_recognised(weights, monkeypatch):
    model = solution.load_model(weights)
    monkeypatch.setattr(solution, "usable_cores", lambda: 6)
    expected = {"workers": 3, "threads": 2, "channels_last": False}
    assert bench_runs.describe_form(model._replace(workers=3)) == expected
    model.members[0].network.to(memory_format=torch.channels_last)
    assert bench_runs.describe_form(model)["channels_last"]


# --- The straightforward program and the forms ----------------------------------------------------


def test_the_straightforward_program_gives_the_same_masks(tiles, weights, tmp_path):
    plain, own = tmp_path / "plain", tmp_path / "own"
    plain.mkdir()
    assert bench_plain.segment(tiles, weights, plain) == 24
    solution.segment_folder(tiles, weights, solution.png_writer(solution.prepare_output(own, tiles)), "inf")
    assert bench.compare_masks(own, plain) >= 0.9995
    mask = cv2.imread(str(plain / "img002.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (70, 96) and len(np.unique(mask)) > 1


def test_a_view_turned_wrongly_would_be_seen(tiles, weights, tmp_path, monkeypatch):
    there, _ = bench_plain.TURNS[1]
    monkeypatch.setattr(
        bench_plain, "TURNS", (bench_plain.TURNS[0], (there, lambda x: x), *bench_plain.TURNS[2:])
    )
    plain, own = tmp_path / "plain", tmp_path / "own"
    plain.mkdir()
    bench_plain.segment(tiles, weights, plain)
    solution.segment_folder(tiles, weights, solution.png_writer(solution.prepare_output(own, tiles)), "inf")
    assert bench.compare_masks(own, plain) < bench.AGREEMENT_AIM


def test_agreement_is_the_share_of_equal_pixels(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        for name in ("a.png", "b.png"):
            cv2.imwrite(str(folder / name), np.zeros((10, 20), np.uint8))
    changed = np.zeros((10, 20), np.uint8)
    changed[0, :4] = 85
    cv2.imwrite(str(folders[1] / "b.png"), changed)
    assert bench.compare_masks(*folders) == 1 - 4 / 400
    (folders[1] / "b.png").write_bytes(b"cut off")
    with pytest.raises(BenchError, match="b.png: cannot be read"):
        bench.compare_masks(*folders)
    (folders[0] / "a.png").unlink()
    with pytest.raises(BenchError, match="expected those of the same tiles"):
        bench.compare_masks(*folders)


def test_every_form_gives_the_probabilities_of_the_plain_one(tiles, weights):
    forms = bench_runs.time_forms(str(tiles), str(weights))["forms"]
    names = [form["name"] for form in forms]
    counts = bench_runs.thread_counts()
    assert names[: len(counts) + 6] == [
        *["plain"] * len(counts),
        "four views in a batch",
        "BatchNorm not folded",
        "channels_last",
        "channels_last, input too",
        f"{counts[-1]} side by side",
        f"{counts[-1]} side by side, channels_last",
    ]
    assert [form["threads"] for form in forms[: len(counts)]] == counts
    assert all(form["seconds"] > 0 and form["difference"] < 1e-4 for form in forms)
    traced = names[len(counts) + 6 :]
    assert len(traced) == 4 and traced == [form["name"] for form in forms if form["once"]]


def test_a_form_that_differs_shows_it():
    logits = torch.tensor([[[[0.0]], [[0.0]], [[-50.0]], [[-50.0]]]])
    expected = torch.tensor([[[[0.75]], [[0.25]], [[0.0]], [[0.0]]]])
    assert bench_runs.largest_difference(logits, expected) == pytest.approx(0.25)


# --- What is segmented ----------------------------------------------------------------------------


def test_given_tiles_are_taken_in_order_and_checked(tiles, tmp_path):
    found = solution.find_tiles(bench.lay_out_tiles(tiles, 1, 96, tmp_path / "first"))
    assert [tile.tile_id for tile in found] == ["001"]
    assert len(solution.find_tiles(bench.lay_out_tiles(None, 3, 64, tmp_path / "made"))) == 3
    support.write_tile(tmp_path / "broken", "001", support.scene_numbers(0))
    (tmp_path / "broken" / "Band3" / "img001.tif").unlink()
    with pytest.raises(BenchError, match="tile 001 has 4 bands and 96 x 96 px, expected 5 bands"):
        bench.lay_out_tiles(tmp_path / "broken", 1, 96, tmp_path / "copy")
    support.write_tile(tmp_path / "large", "001", np.ones((1030, 64, 5), np.float32))
    with pytest.raises(BenchError, match="at most 1024 px a side"):
        bench.lay_out_tiles(tmp_path / "large", 1, 96, tmp_path / "copy")


def test_a_scene_is_the_tile_over_and_over(tiles, tmp_path):
    tile = solution.find_tiles(tiles)[1]
    scene = bench.write_scene(tile, 200, tmp_path / "scene")
    image, piece = (solution.read_tile(files) for files in (solution.find_tiles(scene)[0], tile))
    assert image.shape == (200, 200, 5)
    np.testing.assert_array_equal(image[70:140, 96:192], piece)
    np.testing.assert_array_equal(image[140:, 192:], piece[:60, :8])


def test_the_scene_gets_the_first_pass_only(weights, tmp_path):
    model = solution.load_model(bench.write_first_pass(weights, tmp_path / "first.pth"))
    assert model.passes == ((0, 0),) and len(model.members) == 2
    assert model.postprocess.min_speck == 6 and model.postprocess.crf is None


# --- The report -----------------------------------------------------------------------------------


def measurements(**changes) -> Measurements:
    """Return made-up measurements: ten tiles, of 1 s for passes each, and 2 s that are spent once."""
    stages = bench_runs.complete(
        {"loading the weights": 2.0, "forward passes": 10.0, "reading": 1.0}, 13.0, 1
    )
    whole = {
        "whole": [[12.0, 20.0], [14.0, 22.0]],
        "bare": [[9.0, 19.0], [11.0, 21.0]],
        "stages": [stages, stages],
        "passes": 40,
        "peak_memory": 2_000_000_000,
        "workers": 2,
        "threads": 1,
        "channels_last": True,
    }
    forms = [
        {"name": "plain", "threads": 1, "seconds": 0.4, "cpu": 0.4, "difference": 0.0, "once": 0.0},
        {"name": "plain", "threads": 2, "seconds": 0.3, "cpu": 0.6, "difference": 0.0, "once": 0.0},
        {"name": "traced", "threads": 2, "seconds": 0.2, "cpu": 0.4, "difference": 1e-6, "once": 5.05},
    ]
    scene = {"seconds": 60.0, "peak_memory": 3_000_000_000}
    plain = {"seconds": [26.0, 42.0], "passes": 40}
    return Measurements(10, 0.1, 4.0, whole, plain, 0.9995, forms, scene, 7000)._replace(**changes)


def test_ratios_are_those_of_the_seconds():
    found = measurements()
    assert found.to_bare == 26 / 20
    assert found.to_plain == 0.5
    assert found.cpu_ratios == (1.05, 0.5)
    assert found.to_bare_with(10) == pytest.approx(found.to_bare)
    assert found.to_bare_with(100) == pytest.approx((2 + 110) / 100)


def test_aims_are_reached_or_missed():
    reached = [aim.reached for aim in bench.list_aims(measurements())]
    assert reached == [False, True, True, True, True]
    scene = {"seconds": 60.0, "peak_memory": 4_000_000_001}
    worse = measurements(agreement=0.9989, scene=scene, plain={"seconds": [21.0, 42.0], "passes": 40})
    assert [aim.reached for aim in bench.list_aims(worse)] == [False, False, False, True, False]


def test_tracing_pays_after_as_many_passes_as_earn_its_seconds():
    forms = measurements().forms
    assert bench.describe_payoff(forms[2], forms) == "pays after 51 passes of the network"
    slower = {**forms[2], "seconds": 0.3}
    assert bench.describe_payoff(slower, forms) == "never pays"


def test_the_table_of_stages_repeats_the_seconds():
    rows = {row[0]: row[1:] for row in bench.stage_rows(measurements())}
    assert rows["starting Python and importing"] == ("4.000", "once", "before it")
    assert rows["loading the weights"] == ("2.000", "once", "15.4%")
    assert rows["forward passes"] == ("10.000", "1.0000", "76.9%")
    assert rows["everything else"] == ("1.000", "0.1000", "7.7%")
    assert rows["**the whole run**"] == ("13.000", "1.3000", "100.0%")
    assert rows["reading, beside the passes"] == ("1.000", "0.1000", "7.7%")


def test_the_report_says_whether_the_machine_was_idle_and_what_was_chosen():
    idle = bench.format_report(measurements(), "make bench")
    assert "busy" not in idle
    assert "The run chose: channels_last (untimed" in idle
    assert "2 tiles side by side, threads of each: 1." in idle
    assert "load average 3.9" in bench.format_report(measurements(load=3.9), "make bench")


@pytest.mark.slow
def test_the_command_measures_everything(weights, tmp_path, capsys):
    out = tmp_path / "reports" / "bench.md"
    assert main(["bench", "--quick", "--tiles", "2", "--weights", str(weights), "--out", str(out)]) == 0
    report = out.read_text()
    shown = re.findall(r"^\| ([^|]+) \| ([^|]+) \| at (?:most|least) ", report, re.MULTILINE)
    assert len(shown) == 5
    assert float(dict(shown)["pixels on which the two agree"].rstrip("%")) > 99.9
    assert "24 forward passes in all" in report and "| torch.jit: trace, freeze |" in report
    assert not re.search(r"/(tmp|home|root|work)/", report)
    progress = capsys.readouterr().err.splitlines()
    assert progress[0].startswith("[1/5]") and progress[-1].startswith("[5/5]")


def test_what_cannot_be_measured_is_named(tiles, tmp_path, capsys):
    (tmp_path / "model.pth").write_text("no model")
    with pytest.raises(BenchError, match="whole: ended with status 1, expected 0; its last line: .*damaged"):
        out = tmp_path / "out"
        bench.run_task("whole", tmp_path, data=tiles, weights=tmp_path / "model.pth", out=out, rounds=1)
    assert main(["bench", "--weights", str(tmp_path / "none.pth")]) == 2
    assert "none.pth: no such weights file" in capsys.readouterr().err
