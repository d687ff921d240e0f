"""What the tests on GPUs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def needs_memory() -> Iterator[Callable[[int], None]]:
    """Skips where so many bytes of the GPU's memory are not free. What the test had is given back: others run beside it."""

    def needs(size: int) -> None:
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < size:
            pytest.skip(f"needs {size >> 30} GiB of a GPU's memory")

    yield needs
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
