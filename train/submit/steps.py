"""Progress of a command that takes minutes: a numbered line for each step."""

import sys
import time


class Steps:
    """Says on standard error what comes next, its number and the time since the start."""

    def __init__(self, total: int):
        self.total, self.done, self.started = total, 0, time.perf_counter()

    def announce(self, text: str) -> None:
        """Print the line of the next step."""
        self.done += 1
        elapsed = time.perf_counter() - self.started
        print(f"[{self.done}/{self.total}] {elapsed:4.0f} s  {text}", file=sys.stderr, flush=True)
