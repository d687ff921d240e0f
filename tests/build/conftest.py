"""What the builder's tests share: each project is compiled once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from build_projects import copied

from kernelhub.build.assemble import Workshop
from kernelhub.build.project import Built, build_project
from kernelhub.build.toolchain import Toolchain, find_toolchain, missing

Build = Callable[[str], tuple[Path, list[Built]]]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests' own store, and none of the user's choices."""
    ours = [name for name in os.environ if name.startswith(("KERNEL", "LOCAL_KERNELS"))]
    for name in [*ours, "CXX", "CUDA_HOME", "CUDA_PATH"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KERNELHUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    found = find_toolchain()
    if reason := missing(found):
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def build(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a project of `projects/`, once: its folder, and what was built."""
    done: dict[str, tuple[Path, list[Built]]] = {}

    def make(name: str) -> tuple[Path, list[Built]]:
        if name not in done:
            folder = tmp_path_factory.mktemp("projects")
            project = copied(name, folder)
            done[name] = project, build_project(project, Workshop(toolchain, folder / "work"))
        return done[name]

    return make
