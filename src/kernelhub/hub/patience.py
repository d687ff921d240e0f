"""How long a hub is waited for, and what an attempt that failed means: for every client that sends requests.

A request has a `Budget`, which `Patience` bounds: its attempts, the waits between them, and a deadline that bytes renew.
"""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

# What may pass: worth another attempt.
RETRIED = frozenset({408, 429, *range(500, 600)})

# Bytes that count as progress. A hub that sends less within `Patience.total` trickles, which is no better than silence.
_PROGRESS = 64 * 1024


@dataclass(frozen=True)
class Patience:
    """How long a hub is waited for, in seconds, and what time is.

    `total` is what a request may take without progress, its retries and the waits between them included; a read that
    is under way when it ends may add `read`, so that a hub that stalls or trickles has ended in an error after a minute.
    A body that keeps coming may take as long as it needs. `clock`, `now` (for dates), `sleep` and `random` are
    parameters so that tests need not wait.
    """

    connect: float = 10.0
    read: float = 15.0
    total: float = 45.0
    attempts: int = 5
    backoff: float = 0.5
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random


class Budget:
    """What a request may still cost: its deadline and its failures, both forgotten when bytes arrive."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.failures = 0
        self.request = ""
        self.cancelled = False
        self._since_progress = 0
        self._deadline = patience.clock() + patience.total

    def received(self, size: int) -> None:
        """Count bytes of a body that no attempt before had: enough of them renew the budget. Raises as `check` does."""
        self._since_progress += size
        if self._since_progress >= _PROGRESS:
            self._since_progress, self.failures = 0, 0
            self._deadline = self.patience.clock() + self.patience.total
        self.check()

    def check(self) -> None:
        """Raises `Cancelled` where the call that this request belongs to is over, `Interrupted` after the deadline."""
        if self.cancelled:
            raise Cancelled
        if self.remaining() <= 0:
            raise Interrupted("it sent almost nothing")

    def remaining(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self._deadline - self.patience.clock()

    def pause(self, interrupted: Interrupted) -> str:
        """Wait before the next attempt: as long as the hub asks, else longer each time. Or say why there will be none."""
        self.failures += 1
        patience = self.patience
        wait = patience.backoff * 2 ** (self.failures - 1) * (0.5 + patience.random() / 2)
        if interrupted.after is not None:
            wait = max(interrupted.after, 0.0) + patience.random() * patience.backoff
        if self.failures >= patience.attempts or wait >= self.remaining():
            asked = "" if interrupted.after is None else f"; it asks to wait {interrupted.after:.0f} s"
            times = "" if self.failures == 1 else f", {self.failures} times"
            return f"{interrupted}{times}{asked}"
        patience.sleep(wait)
        return ""

    @property
    def overdue(self) -> bool:
        """Whether the deadline is past and no read that was under way then can still be."""
        return self.remaining() < -(self.patience.read + 1.0)

    def timeouts(self) -> tuple[float, float, float, float]:
        """Connect, read, write and pool timeouts of the next attempt."""
        left = max(self.remaining(), 0.1)
        read = min(self.patience.read, left)
        return min(self.patience.connect, left), read, read, left


class Interrupted(Exception):
    """An attempt that failed in a way that may pass: worth another one. `after` is how long the hub asks to wait."""

    def __init__(self, reason: str, *, status: int | None = None, after: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.after = status, after


class Cancelled(Exception):
    """The call that a request belongs to is over, so the thread that does it ends; nobody sees this."""


def retry_after(text: str | None, now: float) -> float | None:
    """Seconds to wait, from a `Retry-After` header: a number of seconds or a date (RFC 9110, 10.2.3)."""
    if not text:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - now, 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def reason_of(error: BaseException) -> str:
    """What went wrong, fit for a terminal: libraries quote what a host sent, however long and whatever is in it."""
    return said(f"{type(error).__name__}: {error}".rstrip(": "))


def said(text: str) -> str:
    """What a hub says, fit for a terminal: no control characters, not long."""
    return "".join(char if char.isprintable() else "?" for char in text[:200])
