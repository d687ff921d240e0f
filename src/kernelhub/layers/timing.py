"""Is a kernel faster? Both sides take turns on the same inputs, and the kernel must win by more than the spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], object]
Stopwatch = Callable[[Work], float]

ROUNDS = 15
# The 4th smallest and the 4th largest of 15 ratios hold their median with 96 % (binomial; no assumption on how they spread).
_TAIL = 3
_WARM_UP = 2
# Seconds that one measurement takes at least: the work is repeated until then, 100 times at most. A call of 20 us, timed
# alone, is mostly the clock's and the launch's.
_LEAST = 5e-4
_MOST_REPEATS = 100


@dataclass(frozen=True)
class Speed:
    """The original's time over the kernel's: median, and the ends of a 95 % interval."""

    ratio: float
    low: float
    high: float

    @property
    def wins(self) -> bool:
        """The kernel is faster by more than the spread."""
        return self.low > 1.0

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f})"


def stopwatch(device: torch.device) -> Stopwatch:
    """What measures work on the device, in seconds: events on GPUs, the clock elsewhere."""
    return _by_events(device) if device.type == "cuda" else by_clock


def by_clock(work: Work) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _by_events(device: torch.device) -> Stopwatch:
    def measure(work: Work) -> float:
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return measure


def race(original: Work, kernel: Work, watch: Stopwatch, rounds: int = ROUNDS) -> Speed:
    """Both timed in turns, after a warm-up, the first of a round the other one each time."""
    for _ in range(_WARM_UP):
        watch(original)
        watch(kernel)
    repeats = _repeats(min(watch(original), watch(kernel)))
    sides = _repeated(original, repeats), _repeated(kernel, repeats)
    ratios = []
    for number in range(rounds):
        first = number % 2
        took = {first: watch(sides[first]), 1 - first: watch(sides[1 - first])}
        ratios.append(took[0] / took[1] if took[1] > 0 else 1.0)
    ratios.sort()
    tail = min(_TAIL, (rounds - 1) // 2)
    return Speed(statistics.median(ratios), ratios[tail], ratios[-1 - tail])


def _repeats(seconds: float) -> int:
    return _MOST_REPEATS if seconds <= _LEAST / _MOST_REPEATS else max(1, round(_LEAST / seconds))


def _repeated(work: Work, times: int) -> Work:
    def repeated() -> None:
        for _ in range(times):
            work()

    return repeated
