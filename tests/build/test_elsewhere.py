"""Builds for other machines: CUDA compiled where there is no GPU, and binaries that any Linux from glibc 2.28 on runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from build_projects import copied

from kernelhub.build.assemble import Workshop
from kernelhub.build.project import build_project
from kernelhub.build.toolchain import find_toolchain, missing, ready
from kernelhub.core.metadata import Metadata

# What a portable kernel is loaded with in a process of its own: an error that ended the process would be seen.
USE = """
import sys, torch
from pathlib import Path
from kernelhub import Hub, Settings
kernel = Hub(Settings(cache=Path(sys.argv[2]))).load_local(Path(sys.argv[1])).module
assert kernel.relu(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
for _ in range(3):
    try:
        kernel.relu(torch.zeros(3, dtype=torch.int64))
    except RuntimeError as error:
        assert "relu takes float32 tensors" in str(error), error
    else:
        raise AssertionError("nothing was raised")
print("fine")
"""


def test_cuda_is_compiled_where_torch_has_none(toolchain, tmp_path):
    if toolchain.nvcc is None:
        pytest.skip("no nvcc")
    project = copied("scale-cuda", tmp_path)
    (built,) = build_project(project, Workshop(toolchain, tmp_path / "work"))
    major, minor = toolchain.nvcc.version if toolchain.torch.cuda is None else toolchain.torch.cuda
    assert built.variant == f"torch-stable-abi210-cu{major}{minor}-{toolchain.cpu}-linux"
    metadata = Metadata.parse((built.path / "metadata.json").read_bytes())
    assert metadata.backend.archs == ("9.0",)
    abi = pytest.importorskip("kernelhub.build.abi")
    library = abi.read(next(built.path.glob("*.so")))
    assert {"libtorch_cpu.so", "libtorch_cuda.so", f"libcudart.so.{major}"} <= set(library.needed)
    assert "aoti_torch_get_current_cuda_stream" in {symbol.name for symbol in library.undefined}


@pytest.mark.slow
def test_a_portable_build_asks_for_little_and_its_errors_arrive(tmp_path):
    toolchain = find_toolchain(portable=True)
    if reason := missing(toolchain):
        pytest.skip(reason)
    abi = pytest.importorskip("kernelhub.build.abi")
    project = copied("relu-stable", tmp_path)
    (built,) = build_project(project, Workshop(toolchain, tmp_path / "work"))
    (report,) = abi.check(built.path)
    assert report.problems == ()
    assert not any("GLIBCXX" in version for version in report.versions)
    assert next(built.path.glob("*.so")).stat().st_size < 2_000_000
    ran = subprocess.run(
        [sys.executable, "-c", USE, str(project), str(tmp_path / "store")], capture_output=True, text=True, timeout=300
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "fine"), ran.stderr


def compiler_without(folder, toolchain, *names):
    """g++ of a container that lacks these files: it is asked for them in vain."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "g++"
    cases = "".join(f'-print-file-name={name}) echo "{name}"; exit ;; ' for name in names)
    static = "-static-libstdc++" if "libstdc++.so.6" in names else ""
    script.write_text(f'#!/bin/sh\ncase "$1" in {cases}esac\nexec {toolchain.cxx.command[0]} {static} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("names", [["libstdc++.so"], ["libstdc++.so", "libstdc++.so.6"]])
def test_errors_arrive_where_the_compiler_has_only_a_static_cxx_library(names, toolchain, tmp_path):
    """With the shared one by its other name, and with the static one linked in: the process lives on in both."""
    if toolchain.cxx.kind != "gcc":
        pytest.skip("for g++")
    static = ready(find_toolchain(compiler_without(tmp_path / "bin", toolchain, *names)))
    assert (bool(static.runtime), static.own_runtime) == (len(names) == 1, len(names) == 2)
    project = copied("relu-stable", tmp_path)
    build_project(project, Workshop(static, tmp_path / "work"))
    (library,) = (project / "build").rglob("*.so")
    assert (b"libstdc++.so.6" in library.read_bytes()) == (not static.own_runtime)
    ran = subprocess.run(
        [sys.executable, "-c", USE, str(project), str(tmp_path / "store")], capture_output=True, text=True, timeout=300
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "fine"), ran.stderr
