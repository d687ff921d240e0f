"""Builds for other machines: CUDA compiled where there is no GPU, and binaries that any Linux from glibc 2.28 on runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_projects import copied, counting_compiler, tiny

from kernelhub.build.assemble import Workshop
from kernelhub.build.project import build_project
from kernelhub.build.toolchain import find_toolchain, missing, ready
from kernelhub.cli.main import run
from kernelhub.core.metadata import Metadata

ROOT = Path(__file__).resolve().parents[2]

# What a portable kernel is loaded with in a process of its own: an error that ended the process would be seen.
USE = """
import sys, torch
from pathlib import Path
from kernelhub import Hub, Settings
kernel = Hub(Settings(cache=Path(sys.argv[2]))).load_local(Path(sys.argv[1]), backend="cpu").module
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


@pytest.mark.parametrize("before", ["", "env "])
def test_the_host_compiler_of_cuda_is_the_compiler_whatever_is_given_to_it(before, toolchain, tmp_path, monkeypatch):
    if toolchain.nvcc is None:
        pytest.skip("no nvcc")
    monkeypatch.setenv("CXX", f"{before}g++ -isystem {tmp_path}")
    assert run(["build", str(copied("scale-cuda", tmp_path)), "--backend", "cuda"]) == 0


@pytest.mark.parametrize("before", ["", "env "])
def test_a_compiler_is_found_from_the_folder_where_it_is_named(before, toolchain, tmp_path, monkeypatch):
    counting_compiler(tmp_path / "bin")
    monkeypatch.chdir(tmp_path / "bin")
    monkeypatch.setenv("CXX", f"{before}./counting-g++")
    assert run(["build", str(tiny(tmp_path / "tiny"))]) == 0
    assert (tmp_path / "bin" / "compiled.log").read_text()


def test_capabilities_that_nvcc_does_not_know_are_said(toolchain, tmp_path, capsys):
    if toolchain.nvcc is None or "3.5" in toolchain.nvcc.devices:
        pytest.skip("no nvcc, or one of another time")
    project = copied("scale-cuda", tmp_path)
    toml = project / "build.toml"
    toml.write_text(toml.read_text().replace('["9.0"]', '["3.5", "9.0", "3.7"]'))
    assert run(["build", str(project), "--backend", "cuda"]) == 0
    assert "is not for 3.5, 3.7: nvcc here does not compile for them" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_cuda_is_compiled_with_the_toolkit_that_the_user_names(variable, toolchain, tmp_path, capsys, monkeypatch):
    if toolchain.cuda_root is None or not (toolchain.cuda_root / "bin" / "nvcc").is_file():
        pytest.skip("no CUDA toolkit")
    project = copied("scale-cuda", tmp_path)
    monkeypatch.setenv(variable, str(toolchain.cuda_root))
    assert run(["build", str(project), "--backend", "cuda", "--json"]) == 0
    (built,) = json.loads(capsys.readouterr().out)["built"]
    assert built["path"]
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    assert run(["build", str(project), "--backend", "cuda"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'nowhere'}, which CUDA_HOME or CUDA_PATH names, has no bin/nvcc that runs" in error


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


# A Python with another torch, which this package is shown to by its path: that torch's own dependencies are enough.
OTHER = os.environ.get("KERNELHUB_TEST_OTHER_PYTHON")

NORM = """
import sys, torch
from pathlib import Path
from kernelhub import Hub, Settings
kernel = Hub(Settings(cache=Path(sys.argv[2]), build="never")).load_local(Path(sys.argv[1]), backend="cpu")
assert str(kernel.variant).startswith("torch-stable-abi"), kernel.variant
x, weight = torch.randn(3, 64, requires_grad=True), torch.rand(64)
expected = torch.nn.functional.rms_norm(x.detach().double(), (64,), weight.double(), 1e-6)
result = kernel.module.rms_norm(x, weight, 1e-6)
assert result.grad_fn is not None
assert torch.allclose(result.double(), expected, atol=1e-6)
result.sum().backward()
assert x.grad.isfinite().all()
print("fine")
"""


@pytest.mark.skipif(OTHER is None, reason="KERNELHUB_TEST_OTHER_PYTHON names no Python with another torch")
@pytest.mark.parametrize(("name", "code"), [("relu-stable", USE), ("norm", NORM)])
def test_a_build_on_the_stable_abi_runs_under_another_torch(toolchain, tmp_path, name, code):
    assert OTHER is not None
    version = [OTHER, "-W", "ignore", "-c", "import torch; print(torch.__version__)"]
    other = subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()
    assert other.split("+")[0] != torch.__version__.split("+")[0], "it has the same torch"
    source = ROOT / "kernels" / name
    project = Path(shutil.copytree(source, tmp_path / name)) if source.is_dir() else copied(name, tmp_path)
    assert any(item.path for item in build_project(project, Workshop(toolchain, tmp_path / "work"), backends=["cpu"]))
    done = subprocess.run(
        [OTHER, "-W", "ignore", "-c", code, str(project), str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "KERNELHUB_BUILD": "never"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
