"""The time budget: who sets it, what is done first, and that a run ends inside it with a full set of masks.

The clock is one that the networks move, a second a pass: nothing here depends on the machine.
"""

import math

import numpy as np
import pytest
import torch
from support import file_name, in_memory, random_network, scene_numbers, write_model, write_tile
from torch import nn

import solution


class Clock:
    """Stands in for time.perf_counter; networks move it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Slow(nn.Module):
    """A network whose forward pass takes `seconds` of a clock."""

    def __init__(self, network, clock, seconds=1.0):
        super().__init__()
        self.network, self.clock, self.seconds = network, clock, seconds

    def forward(self, x):
        self.clock.now += self.seconds
        return self.network(x)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Keep runs inside this process from taking all cores, which is slow beside other work."""
    monkeypatch.setattr(solution, "usable_cores", lambda: 1)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(solution.time, "perf_counter", clock)
    return clock


@pytest.fixture
def tiles(tmp_path):
    """Return a data folder of four tiles."""
    for number in range(4):
        write_tile(tmp_path / "data", f"00{number + 1}", scene_numbers(number, 64))
    return tmp_path / "data"


def slow_model(clock, seconds=1.0, **settings):
    return in_memory(Slow(random_network(), clock, seconds), views=6, **settings)


def run(monkeypatch, model, data, budget, write=None):
    """Segment a folder with a model that is already in memory."""
    monkeypatch.setattr(solution, "load_model", lambda path: model)
    monkeypatch.setattr(solution, "find_weights", lambda given: given)
    return solution.segment_folder(data, None, write, budget)


def raise_at_pass(number, model, error):
    """Let the first network raise an error in its pass of this number; return a list with an item a pass."""
    calls = []

    def count(module, args):
        calls.append(1)
        if len(calls) == number:
            raise error

    model.members[0].network.register_forward_pre_hook(count)
    return calls


def masks_after(model, data, passes):
    """Return the mask of each tile after its first so many passes, computed one by one."""
    masks = {}
    for tile in solution.find_tiles(data):
        few = model._replace(passes=model.passes[: passes[tile.tile_id]])
        masks[tile.tile_id] = solution.to_mask(solution.predict_classes(few, solution.read_tile(tile))[0])
    return masks


# --- Who sets it ----------------------------------------------------------------------------------


def test_the_argument_outdoes_the_environment_which_outdoes_the_weights(monkeypatch):
    monkeypatch.delenv(solution.TIME_BUDGET_VARIABLE, raising=False)
    assert solution.choose_budget(None, 45.0) == (45.0, False)
    assert solution.choose_budget(None, math.inf) == (math.inf, False)
    monkeypatch.setenv(solution.TIME_BUDGET_VARIABLE, "12.5")
    assert solution.choose_budget(None, 45.0) == (12.5, True)
    assert solution.choose_budget("7", 45.0) == (7.0, True)
    assert solution.choose_budget("inf", 45.0) == (math.inf, True)


@pytest.mark.parametrize("wrong", ["0", "-3", "soon", "nan"])
def test_a_budget_that_is_none_is_refused(monkeypatch, wrong):
    with pytest.raises(solution.InputError, match="expected seconds above 0, or inf"):
        solution.choose_budget(wrong, 45.0)
    monkeypatch.setenv(solution.TIME_BUDGET_VARIABLE, wrong)
    with pytest.raises(solution.InputError, match=f"'{wrong}'"):
        solution.choose_budget(None, 45.0)


def test_the_weights_carry_a_budget_and_an_order_of_passes(tmp_path):
    path = write_model(tmp_path / "model.pth", member_weights=(1.0, 2.0), views=2, time_budget=30.0)
    content = torch.load(path, weights_only=True)
    content["passes"] = content["passes"][::-1]
    torch.save(content, path)
    model = solution.load_model(path)
    assert model.time_budget == 30.0
    assert model.passes == ((1, 1), (0, 1), (1, 0), (0, 0))
    assert solution.load_model(write_model(tmp_path / "any.pth")).time_budget == math.inf


# --- One image ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, passes", [(-5, 1), (0, 1), (1, 1), (2.5, 2), (4, 4), (100, 6)])
def test_passes_are_made_while_they_fit(clock, seconds, passes):
    model = slow_model(clock)
    image = np.random.default_rng(0).normal(0.5, 0.3, (64, 64, 5)).astype(np.float32)
    extent, made = solution.extent_probability(model, image, model.passes, clock.now + seconds)
    assert made == passes
    expected, _ = solution.extent_probability(model, image, model.passes[:passes])
    assert torch.equal(extent, expected)


def test_every_window_of_a_scene_gets_its_share(clock):
    image = np.random.default_rng(0).normal(0.5, 0.3, (1100, 600, 5)).astype(np.float32)
    windows = len(solution.window_starts(1100)) * len(solution.window_starts(600))
    started = clock.now
    classes, passes = solution.predict_classes(slow_model(clock), image, started + 2.5 * windows)
    assert passes == 2
    assert clock.now - started <= 2.5 * windows
    assert classes.shape == (1100, 600)


# --- A run ----------------------------------------------------------------------------------------


def test_a_short_budget_gives_every_tile_one_pass(clock, tiles, monkeypatch):
    model = slow_model(clock)
    summary = run(monkeypatch, model, tiles, "7")
    assert set(summary.passes.values()) == {1} and not summary.faults
    assert {key: mask.tolist() for key, mask in summary.masks.items()} == {
        key: mask.tolist() for key, mask in masks_after(model, tiles, summary.passes).items()
    }


@pytest.mark.parametrize("budget", [8, 13, 17, 20, 24])
def test_further_passes_are_spent_and_the_run_ends_in_time(clock, tiles, monkeypatch, budget):
    model, started = slow_model(clock), clock.now
    summary = run(monkeypatch, model, tiles, str(budget))
    assert clock.now - started <= budget - solution.SPARE_SECONDS
    assert not summary.faults and len(summary.masks) == 4
    assert all(1 <= passes <= 6 for passes in summary.passes.values())
    assert sum(summary.passes.values()) >= (budget - solution.SPARE_SECONDS - 4) * 0.6
    for key, mask in masks_after(model, tiles, summary.passes).items():
        np.testing.assert_array_equal(summary.masks[key], mask)


def test_an_ample_budget_gives_what_none_gives(clock, tiles, monkeypatch):
    model = slow_model(clock)
    unlimited, ample = (run(monkeypatch, model, tiles, budget) for budget in ("inf", "1000"))
    assert set(unlimited.passes.values()) == set(ample.passes.values()) == {6}
    for key, mask in unlimited.masks.items():
        np.testing.assert_array_equal(ample.masks[key], mask)


def test_where_not_even_one_pass_a_tile_fits_the_rest_is_background_and_named(clock, tiles, monkeypatch, capsys):
    summary = run(monkeypatch, slow_model(clock), tiles, "4.5")
    assert len(summary.masks) == 4 and sorted(summary.passes.values()) == [0, 0, 1, 1]
    assert len(summary.faults) == 2
    for key in summary.faults:
        assert not summary.masks[key].any()
    assert capsys.readouterr().err.count("the time budget was used up; allow more seconds") == 2


def test_a_stored_budget_costs_no_tile_its_mask(clock, tiles, monkeypatch):
    """Nobody asked for it: with more tiles than it was meant for, it is exceeded, by first passes only."""
    monkeypatch.delenv(solution.TIME_BUDGET_VARIABLE, raising=False)
    model = slow_model(clock)._replace(time_budget=3.0)
    summary = run(monkeypatch, model, tiles, None)
    assert set(summary.passes.values()) == {1} and not summary.faults


def test_a_machine_that_slows_down_costs_passes_and_not_the_end(clock, tiles, monkeypatch):
    model, started = slow_model(clock), clock.now
    network = model.members[0].network

    def slower(module, args):
        network.seconds = 1.0 if clock.now - started < 8 else 3.0

    network.register_forward_pre_hook(slower)
    summary = run(monkeypatch, model, tiles, "40")
    assert clock.now - started <= 40 - solution.SPARE_SECONDS
    assert not summary.faults and min(summary.passes.values()) >= 1


def test_a_slow_first_tile_costs_no_other_its_first_pass(clock, tiles, monkeypatch):
    model, started = slow_model(clock), clock.now
    network = model.members[0].network

    def slow_at_first(module, args):
        network.seconds = 12.0 if clock.now == started else 1.0

    network.register_forward_pre_hook(slow_at_first)
    summary = run(monkeypatch, model, tiles, "20")
    assert clock.now - started <= 20 - solution.SPARE_SECONDS
    assert not summary.faults and min(summary.passes.values()) >= 1


def test_a_broken_tile_is_reported_once_and_gets_no_further_time(clock, tiles, monkeypatch, capsys):
    (tiles / "Band2" / file_name(solution.BANDS[1], "platform", "002")).write_bytes(b"")
    summary = run(monkeypatch, slow_model(clock), tiles, "1000")
    assert list(summary.faults) == ["002"] and summary.passes["002"] == 0
    assert [summary.passes[key] for key in ("001", "003", "004")] == [6, 6, 6]
    assert capsys.readouterr().err.count("cannot be read as a TIFF") == 1


def test_a_wrong_budget_is_an_error_before_anything_is_written(tiles, tmp_path, capsys):
    weights = write_model(tmp_path / "model.pth")
    arguments = [str(tiles), str(tmp_path / "out"), "--weights", str(weights), "--time-budget", "never"]
    assert solution.main(arguments) == 2
    assert "time budget 'never'" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


# --- Side by side ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_results_keep_their_order_and_little_is_taken_ahead(workers):
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    squares = []
    for square in solution.side_by_side(lambda number: number**2, items(), workers):
        squares.append(square)
        assert len(taken) <= len(squares) + 2 * workers
    assert squares == [number**2 for number in range(20)]


def test_what_is_not_begun_is_left_when_the_caller_stops():
    begun = []
    results = solution.side_by_side(lambda number: begun.append(number), iter(range(1000)), 2)
    next(results)
    results.close()
    assert len(begun) <= 4


def test_an_error_in_one_thread_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(solution.side_by_side(lambda number: 1 // number, [3, 2, 1, 0, 1, 2], 2))


def test_workers_flush_denormals_and_run_on_one_thread(monkeypatch):
    monkeypatch.setattr(solution, "usable_cores", lambda: 2)
    denormal = torch.tensor([1e-40])

    def work(_):
        return torch.get_num_threads(), float(denormal * 1.0)

    threads = torch.get_num_threads()
    try:
        assert set(solution.side_by_side(work, range(6), 2)) == {(1, 0.0)}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("budget", ["inf", "1000"])
def test_tiles_side_by_side_get_the_same_masks(tiles, monkeypatch, budget):
    alone = run(monkeypatch, in_memory(random_network(), views=6), tiles, budget)
    monkeypatch.setattr(solution, "usable_cores", lambda: 3)
    together = run(monkeypatch, in_memory(random_network(), views=6), tiles, budget)
    assert list(together.masks) == list(alone.masks)
    assert together.passes == alone.passes == dict.fromkeys(alone.masks, 6)
    for identifier, mask in alone.masks.items():
        np.testing.assert_array_equal(together.masks[identifier], mask)


def test_windows_of_a_scene_side_by_side_give_the_same_mask(tmp_path, monkeypatch):
    for name, small in (("LARGEST_TILE", 64), ("WINDOW", 64), ("OVERLAP", 32)):
        monkeypatch.setattr(solution, name, small)
    write_tile(tmp_path / "data", "001", scene_numbers(0, 150))
    alone = run(monkeypatch, in_memory(random_network()), tmp_path / "data", "inf").masks
    monkeypatch.setattr(solution, "usable_cores", lambda: 3)
    together = run(monkeypatch, in_memory(random_network()), tmp_path / "data", "inf").masks
    assert len(np.unique(alone["001"])) > 1
    np.testing.assert_array_equal(together["001"], alone["001"])


@pytest.mark.parametrize("cores, tiles, size, expected", [(8, 25, 64, 3), (2, 25, 64, 2), (4, 3, 64, 3), (4, 9, 65, 1)])
def test_threads_are_shared_between_tiles_unless_windows_need_them(tmp_path, monkeypatch, cores, tiles, size, expected):
    monkeypatch.setattr(solution, "LARGEST_TILE", 64)
    monkeypatch.setattr(solution, "usable_cores", lambda: cores)
    for number in range(2):
        write_tile(tmp_path / "data", f"00{number + 1}", scene_numbers(number, size))
    files = (solution.find_tiles(tmp_path / "data") * tiles)[:tiles]
    threads = torch.get_num_threads()
    try:
        assert solution.with_workers(in_memory(random_network()), files).workers == expected
        assert torch.get_num_threads() == cores // expected
    finally:
        torch.set_num_threads(threads)


def test_a_run_side_by_side_can_be_interrupted(tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(solution, "usable_cores", lambda: 2)
    model = in_memory(random_network(), views=6)
    calls = raise_at_pass(7, model, KeyboardInterrupt)
    folder = solution.prepare_output(tmp_path / "masks", tiles)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, model, tiles, "inf", solution.png_writer(folder))
    assert len(calls) < 6 * 4, "tiles that were not begun are left"


def test_arrays_reach_torch_and_back_without_its_numpy_bridge(monkeypatch):
    def unavailable(*args, **kwargs):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch, "from_numpy", unavailable)
    monkeypatch.setattr(torch.Tensor, "numpy", unavailable)
    image = np.random.default_rng(0).normal(0.5, 0.3, (40, 50, 5)).astype(np.float32)
    crossed = solution.to_array(solution.to_tensor(image.transpose(2, 0, 1)).flip(1))
    np.testing.assert_array_equal(crossed, image.transpose(2, 0, 1)[:, ::-1])
    model = in_memory(random_network())
    assert solution.predict_classes(model, image)[0].shape == (40, 50)
