"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kernel_store(request: pytest.FixtureRequest) -> Path:
    """A store in which this repository's kernels are compiled, once for all tests, their processes and the next run.

    Builds lie there by what they are built from, and are made under a lock. A test that counts, changes or breaks
    anything in a store has one of its own.
    """
    assert request.config.cache is not None
    return request.config.cache.mkdir("kernels")
