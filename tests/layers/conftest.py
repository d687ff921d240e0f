"""A hub of its own, no registrations, and one folder with the small kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kernels_for_tests import write_kernel

from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.layers import mapping
from kernelhub.layers.mode import Mode
from kernelhub.layers.repositories import LocalLayerRepository, Repository
from kernelhub.settings import Settings


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The default hub: no sources, an empty store, and an environment that says nothing."""
    for name in ("DISABLE_KERNEL_MAPPING", "KERNELHUB_TRUST", "LOCAL_KERNELS", "KERNELHUB_HUBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mapping, "_global", mapping._EMPTY)
    found = Hub(Settings(cache=tmp_path / "cache"), sources=[])
    set_default_hub(found)
    yield found
    set_default_hub(None)


@pytest.fixture(scope="module")
def nothing_compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This package's kernels as Python: to compile them takes a minute, and the kernels' own tests do it."""
    set_default_hub(Hub(settings=Settings(cache=tmp_path_factory.mktemp("store"), offline=True, build="never")))
    yield
    set_default_hub(None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the kernels of `kernels_for_tests`."""
    return write_kernel(tmp_path_factory.mktemp("kernels") / "small")


@pytest.fixture
def kernel(folder: Path) -> Callable[[str], Repository]:
    """`kernel("RMSNorm")`: the repository of that layer."""
    return lambda name: LocalLayerRepository(folder, layer_name=name)


@pytest.fixture
def registered(hub: Hub, kernel: Callable[[str], Repository]) -> None:
    """Kernels for the layers of `models_for_tests`, for every mode."""
    mapping.register_kernel_mapping(
        {
            "RMSNorm": {"cpu": {Mode.TRAINING | Mode.TORCH_COMPILE: kernel("RMSNorm")}},
            "Gate": {"cpu": {Mode.TRAINING | Mode.TORCH_COMPILE: kernel("Gate")}},
        }
    )
