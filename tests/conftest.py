"""What all tests share."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="module", autouse=True)
def nobodys_kernels() -> None:
    """A kernel-aware function is the process's, and runs its kernel until the last kernelized model is gone: from the file before."""
    if "kernelhub.layers.swap" in sys.modules:
        gc.collect()


@pytest.fixture
def unnamed() -> Iterator[None]:
    """Classes are the process's: what a test names of torch's and transformers' does not stay named."""
    from torch import nn

    from kernelhub.layers.markers import FunctionModule

    def subclasses(cls: type) -> set[type]:
        return {cls} | {found for child in type.__subclasses__(cls) for found in subclasses(child)}

    yield
    for cls in subclasses(nn.Module):
        if cls.__module__.startswith(("torch.", "transformers.")) and not issubclass(cls, FunctionModule):
            for name in ("kernel_layer_name", "kernel_condition", "kernel_calls_children"):
                if name in vars(cls):
                    delattr(cls, name)
