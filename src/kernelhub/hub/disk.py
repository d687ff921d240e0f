"""What the disk refuses, as an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernelhub.errors import KernelHubError, StoreError

FULL = "Is the disk full, or the folder read-only?"


@contextmanager
def writing(place: Path | str, hint: str = FULL) -> Iterator[None]:
    """What the disk refuses becomes a `StoreError`. A hub's errors pass, though they are `OSError`s too."""
    try:
        yield
    except KernelHubError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write {place}: {error.strerror or error}", hint=hint) from error
