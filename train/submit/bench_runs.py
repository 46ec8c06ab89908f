"""What `make bench` times, each in a process of its own: `python -m train.submit.bench_runs REQUEST`.

REQUEST is JSON with the name of one of TASKS, its arguments, and the file that gets the result. All that is
imported here, `solution` imports too, so that the time this takes is the submission's own.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import threading
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch

import solution
from train.submit.memory import peak_memory

IMPORTED_AT = time.time()

# Stages of a run, by the function of `solution` in which they happen. A stage has the time of its function
# without that of others within it.
STAGES = {
    "loading the weights": "load_model",
    "finding the fastest form": "in_fastest_form",
    "waiting for the reading": "segment_tile",
    "reading": "read_checked",
    "normalising": "normalize",
    "rest of prediction": "predict_classes",
    "writing": "save_mask",
}
FORWARD = "forward passes"
OTHERWISE = "everything else"
PLAIN = "plain"  # form of execution
ASIDE = ("reading", "writing")  # in threads of their own, while the passes run
ONCE = ("loading the weights", "finding the fastest form")  # however many tiles there are
REPEATS = 3  # of a pass that is timed; the shortest counts
SQUARE_VIEWS = (0, 1, 2, 4)  # keep the shape of an image that is no square: they can share a batch


class Seconds(NamedTuple):
    """What something took: by the clock, and of the processor in all threads.

    The second hardly depends on what else the machine does.
    """

    clock: float
    cpu: float

    @staticmethod
    def now() -> Seconds:
        """Return the present time, to subtract from a later one."""
        return Seconds(time.perf_counter(), time.process_time())

    def since(self, earlier: Seconds) -> Seconds:
        """Return the time that has passed from `earlier` to this."""
        return Seconds(self.clock - earlier.clock, self.cpu - earlier.cpu)


# --- Stages ---------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds by stage, each without the stages within it; `clock` gives the time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.lock = threading.Lock()
        self.local = threading.local()  # a stack for each thread: the seconds of stages within the open ones

    def watch(self, stage: str, function: Callable) -> Callable:
        """Return `function` with its time counted to `stage`."""

        @functools.wraps(function)
        def timed(*args: Any, **settings: Any) -> Any:
            within = self.local.__dict__.setdefault("within", [])
            within.append(0.0)
            started = self.clock()
            try:
                return function(*args, **settings)
            finally:
                whole = self.clock() - started
                with self.lock:
                    self.seconds[stage] += whole - within.pop()
                if within:
                    within[-1] += whole

        return timed


class WatchedRun:
    """One run over a folder whose stages are timed.

    Attributes:
        seconds: of the whole run, importing left out.
        stages: seconds by stage; those in ASIDE pass beside the others, whose sum is the whole's.
        model: the networks as the run used them.
        summary: its result.
        peak_memory: bytes, until its end.
    """

    def __init__(self, data: Path, weights: Path, out: Path) -> None:
        self.watch = Stopwatch()
        originals = {name: getattr(solution, name) for name in (*STAGES.values(), "segment_fully")}
        for stage, name in STAGES.items():
            setattr(solution, name, self.watch.watch(stage, originals[name]))
        solution.segment_fully = self._segment(originals["segment_fully"])
        started = Seconds.now()
        try:
            writer = solution.png_writer(solution.prepare_output(out, data))
            self.summary = solution.segment_folder(data, weights, writer, "inf")
            self.seconds = Seconds.now().since(started)
        finally:
            for name, original in originals.items():
                setattr(solution, name, original)
        self.peak_memory = peak_memory()
        for member in self.model.members:
            del member.network.forward  # the timed one, which hid that of its class
        self.stages = complete(dict(self.watch.seconds), self.seconds.clock, self.model.workers)

    def _segment(self, segment_fully: Callable) -> Callable:
        """Return `segment_fully` with the forward passes of its model counted."""

        def watched(model: solution.Model, tiles: Sequence[solution.TileFiles]) -> Iterator:
            self.model = model
            for member in model.members:
                member.network.forward = self.watch.watch(FORWARD, member.network.forward)
            return segment_fully(model, tiles)

        return watched


def complete(stages: dict[str, float], whole: float, workers: int) -> dict[str, float]:
    """Return the seconds by stage in the order of a run, with what is in none of them.

    Args:
        stages: seconds by stage, as far as they occurred, summed over threads.
        whole: seconds of the whole run.
        workers: threads that segmented tiles side by side: their seconds are shared by it.
    """
    order = [*ONCE, "reading", "waiting for the reading", "normalising", FORWARD, "rest of prediction"]
    ordered = {stage: stages.get(stage, 0.0) for stage in [*order, "writing"]}
    ordered.update({stage: ordered[stage] / workers for stage in ordered if stage not in (*ONCE, *ASIDE)})
    in_line = sum(seconds for stage, seconds in ordered.items() if stage not in ASIDE)
    return {**ordered, OTHERWISE: whole - in_line}


# --- Tasks ----------------------------------------------------------------------------------------


def time_whole(data: str, weights: str, out: str, rounds: int) -> dict:
    """Time runs over a folder, and after each its bare forward passes in the same form.

    Returns:
        imported_at: time of time.time() at which `solution` was imported. whole, bare: Seconds of each round.
        stages: seconds by stage of each round. passes: in all. peak_memory: bytes, of the first run.
        workers, threads, channels_last: what the first run chose.
    """
    runs, bare, forms = [], [], []
    for _ in range(rounds):
        run = WatchedRun(Path(data), Path(weights), Path(out))
        runs.append(run)
        forms.append(describe_form(run.model))
        bare.append(bare_seconds(run.model, Path(data)))
    if runs[0].summary.faults:
        raise solution.InputError(f"tiles that cannot be timed: {'; '.join(runs[0].summary.faults.values())}")
    return {
        "imported_at": IMPORTED_AT,
        "whole": [run.seconds for run in runs],
        "bare": bare,
        "stages": [run.stages for run in runs],
        "passes": sum(runs[0].summary.passes.values()),
        "peak_memory": runs[0].peak_memory,
        **forms[0],
    }


def describe_form(model: solution.Model) -> dict:
    """Return how many tiles were segmented side by side, the threads of each, and whether the networks are in
    channels_last."""
    weights = [p for p in model.members[0].network.parameters() if p.dim() == 4 and min(p.shape[1:3]) > 1]
    formats = {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights}
    threads = solution.threads_of_each(model.workers)
    return {"workers": model.workers, "threads": threads, "channels_last": formats == {True}}


class PassInput(NamedTuple):
    """A network, its input (1, 5, H, W), and the view in which it sees that."""

    network: torch.nn.Module
    x: torch.Tensor
    view: solution.View


def pass_inputs(model: solution.Model, image: np.ndarray) -> list[PassInput]:
    """Return what each pass over an image (H, W, 5) needs."""
    inputs = [
        solution.pad_to_multiple(solution.to_tensor(solution.normalize(image, member.normalization))[None])
        for member in model.members
    ]
    return [
        PassInput(model.members[number].network, inputs[number], solution.VIEWS[view])
        for number, view in model.passes
    ]


def bare_seconds(model: solution.Model, data: Path) -> Seconds:
    """Return what all forward passes over the tiles of a folder take, whose inputs are in memory.

    A tile without data has none, as in a run.
    """
    images = [solution.read_tile(tile) for tile in solution.find_tiles(data)]
    tiles = [pass_inputs(model, image) for image in images if solution.valid_mask(image).any()]

    def make_passes(inputs: Sequence[PassInput]) -> None:
        with torch.inference_mode():
            for network, x, view in inputs:
                network(view.forward(x))

    started = Seconds.now()
    for _ in solution.side_by_side(make_passes, tiles, model.workers):
        pass
    return Seconds.now().since(started)


def time_plain(data: str, weights: str, out: str) -> dict:
    """Time the straightforward implementation; return its `seconds` (Seconds) and `passes`."""
    from train.submit import bench_plain

    started = Seconds.now()
    Path(out).mkdir()
    passes = bench_plain.segment(Path(data), Path(weights), Path(out))
    return {"seconds": Seconds.now().since(started), "passes": passes}


def time_scene(data: str, weights: str, out: str) -> dict:
    """Segment a scene; return `seconds` and the peak of memory in bytes."""
    started = time.perf_counter()
    writer = solution.png_writer(solution.prepare_output(out, data))
    summary = solution.segment_folder(data, weights, writer, "inf")
    if summary.faults:
        raise solution.InputError(f"the scene: {'; '.join(summary.faults.values())}")
    return {"seconds": time.perf_counter() - started, "peak_memory": peak_memory()}


# --- Forms ----------------------------------------------------------------------------------------

Network = Callable[[torch.Tensor], Any]


class Form(NamedTuple):
    """A way to make a pass.

    Attributes:
        name: what it is.
        threads: that it had.
        seconds: of a pass by the clock, the shortest of some. cpu: of the processor, in all threads.
        difference: largest of a probability from the plain form's.
        once: seconds that making it takes.
    """

    name: str
    threads: int
    seconds: float
    cpu: float
    difference: float
    once: float = 0.0


def time_forms(data: str, weights: str) -> dict:
    """Time a pass of the first member over the first tile in every form of execution.

    Returns:
        forms: each as a mapping, see Form.
    """
    solution.prepare_torch(solution.usable_cores())
    model = solution.load_model(weights)
    member, workers = model.members[0], solution.most_workers(model)
    image = solution.read_tile(solution.find_tiles(data)[0])
    x = solution.pad_to_multiple(solution.to_tensor(solution.normalize(image, member.normalization))[None])
    with torch.inference_mode():
        expected = member.network(x).softmax(1)
        forms = [time_threads(member.network, x, expected, count) for count in thread_counts()]
        plain = min(forms, key=lambda form: form.seconds)
        torch.set_num_threads(plain.threads)
        forms.append(time_batched(member.network, x))
        forms.append(time_form("BatchNorm not folded", unfolded(weights), x, expected))
    last = copy.deepcopy(member.network).to(memory_format=torch.channels_last)
    last_x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        forms.append(time_form("channels_last", last, x, expected))
        forms.append(time_form("channels_last, input too", last, last_x, expected))
        forms.append(time_side_by_side("side by side", member.network, x, expected, workers))
        forms.append(time_side_by_side("side by side, channels_last", last, x, expected, workers))
    for network, sample, where in ((member.network, x, ""), (last, last_x, ", channels_last")):
        for optimize in (False, True):
            forms.append(time_traced(network, sample, expected, where, optimize, plain.seconds))
    return {"forms": [form._asdict() for form in forms]}


def thread_counts() -> list[int]:
    """Return 1, 2, 4 and so on, up to the usable cores."""
    most = solution.usable_cores()
    return sorted({min(2**power, most) for power in range(most.bit_length() + 1)})


def shortest(network: Network, x: torch.Tensor) -> Seconds:
    """Return the shortest times of REPEATS passes, after one that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        started = Seconds.now()
        network(x)
        times.append(Seconds.now().since(started))
    return Seconds(*map(min, zip(*times[1:])))


def largest_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference between the probabilities of `logits` and those expected."""
    return float((logits.softmax(1) - expected).abs().max())


def time_form(
    name: str, network: Network, x: torch.Tensor, expected: torch.Tensor, once: float = 0.0
) -> Form:
    """Time passes of `network` over `x` (B, 5, H, W); `expected` are its probabilities (B, 4, H, W)."""
    difference = largest_difference(network(x), expected)
    seconds = shortest(network, x)
    threads = torch.get_num_threads()
    return Form(name, threads, seconds.clock / len(x), seconds.cpu / len(x), difference, once)


def time_threads(network: Network, x: torch.Tensor, expected: torch.Tensor, threads: int) -> Form:
    """Time the plain form on so many threads."""
    torch.set_num_threads(threads)
    return time_form(PLAIN, network, x, expected)


def time_side_by_side(
    name: str, network: Network, x: torch.Tensor, expected: torch.Tensor, workers: int
) -> Form:
    """Time passes of which so many run at once, each on its share of the threads, two after each other."""
    threads = torch.get_num_threads()

    def make_all(x: torch.Tensor) -> None:
        for _ in solution.side_by_side(inference(network), [x] * 2 * workers, workers):
            pass

    seconds = shortest(make_all, x)
    torch.set_num_threads(threads)
    share = 1 / (2 * workers)
    difference = largest_difference(network(x), expected)
    each = solution.threads_of_each(workers)
    return Form(f"{workers} {name}", each, seconds.clock * share, seconds.cpu * share, difference)


def inference(network: Network) -> Network:
    """Return `network` without gradients, which is a setting of each thread."""

    def passed(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return network(x)

    return passed


def time_batched(network: Network, x: torch.Tensor) -> Form:
    """Time four views in one batch, compared with four passes."""
    batch = torch.cat([solution.VIEWS[number].forward(x) for number in SQUARE_VIEWS])
    alone = torch.cat([network(part[None]) for part in batch]).softmax(1)
    return time_form("four views in a batch", network, batch, alone)


def unfolded(weights: str) -> torch.nn.Module:
    """Return the first member's network with its BatchNorms as layers of their own."""
    stored = solution.read_model_file(weights)["members"][0]
    network = solution.build_network(stored["arch"]).eval()
    solution.load_state(network, stored["state_dict"], weights)
    return network


def time_traced(
    network: torch.nn.Module,
    x: torch.Tensor,
    expected: torch.Tensor,
    where: str,
    optimize: bool,
    plain: float,
) -> Form:
    """Time torch.jit.trace and freeze, and optimize_for_inference if `optimize`; `where` ends its name.

    Making it counts too what its first two passes, in which it is compiled, take over `plain` seconds.
    """
    started = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch 2.14 would rather compile, for which C++ is needed
        traced = torch.jit.freeze(torch.jit.trace(network, x, check_trace=False))
        if optimize:
            traced = torch.jit.optimize_for_inference(traced)
        for _ in range(2):
            traced(x)
        once = max(0.0, time.perf_counter() - started - 2 * plain)
        name = "torch.jit: trace, freeze" + (", optimize_for_inference" if optimize else "") + where
        return time_form(name, traced, x, expected, once)


TASKS: dict[str, Callable[..., object]] = {
    "whole": time_whole,
    "plain": time_plain,
    "scene": time_scene,
    "forms": time_forms,
}


def main(request: str) -> None:
    """Do a task and write its result."""
    parsed = json.loads(request)
    result = TASKS[parsed["task"]](**parsed["arguments"])
    Path(parsed["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
