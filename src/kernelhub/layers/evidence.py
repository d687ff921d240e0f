"""What was measured of a swap: the numbers that a report has of a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """What comparing and timing a kernel found.

    `max_error` is the largest difference to the reference, `max_relative_error` the largest of any tensor over that tensor's
    largest value, `worst` the name of the result that came nearest to (or went farthest over) what is allowed. `reference`
    is `float64` or `original`; `calls` how many of the model's calls were compared. `speedup` is the original's time
    over the kernel's, with a 95 % interval; it was measured on the layer `timed_on`. `remembered` is when (UTC), where it was
    not in this run: the errors are then the largest of all layers of the kind.
    """

    reference: str | None = None
    calls: int = 0
    max_error: float | None = None
    max_relative_error: float | None = None
    worst: str | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    timed_on: str | None = None
    remembered: str | None = None


NOTHING = Evidence()
