"""What is built of a project, decided from facts about a machine that is not this one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kernelhub.build.recipe import Recipe
from kernelhub.build.targets import RELEASE_ARCHS, Skipped, Target, compiled_target, targets
from kernelhub.build.toolchain import Compiler, Toolchain, TorchInstall, missing

GXX = Compiler("gcc", ("/usr/bin/g++",), "g++ 12", (12, 2))
NVCC = Compiler("nvcc", ("/cuda/bin/nvcc",), "nvcc 13.0", (13, 0))
TORCH = TorchInstall("2.13.0+cu130", (2, 13), Path("/torch"), (13, 0))


@pytest.fixture
def machine(tmp_path: Path) -> Toolchain:
    (tmp_path / "Python.h").touch()
    return Toolchain(GXX, NVCC, Path("/cuda"), TORCH, ("ninja",), tmp_path, "x86_64", "linux", "glibc 2.36")


def recipe(torch: str = 'stable-abi = "2.10"', kernel: str = "", backend: str = "cuda", general: str = "") -> Recipe:
    return Recipe.parse(f"""
[general]
name = "small"
version = 1
edition = 5
license = "MIT"
backends = ["cpu", "cuda", "rocm"]
{general}
[torch]
{torch}
[kernel.one]
backend = "{backend}"
src = ["one.cu"]
{kernel}
""")


def test_compiled_before_noarch_in_the_order_of_the_backends(machine: Toolchain) -> None:
    text = """
[general]
name = "small"
version = 1
edition = 5
license = "MIT"
backends = ["cuda", "cpu"]
[torch]
stable-abi = {cuda = "2.10"}
[torch-noarch]
"""
    found = targets(Recipe.parse(text), machine)
    assert [str(item.variant) for item in found] == [
        "torch-stable-abi210-cu130-x86_64-linux",
        "torch213-cxx11-cpu-x86_64-linux",
        "torch-cuda",
        "torch-cpu",
    ]
    assert [item.compiled for item in found if isinstance(item, Target)] == [True, True, False, False]
    assert [str(item.variant) for item in targets(replace(Recipe.parse(text), binding=None), machine)] == [
        "torch-cuda",
        "torch-cpu",
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cxx": None}, r"no C\+\+ compiler was found"),
        ({"torch": None}, "torch is not installed"),
        ({"ninja": None}, "no ninja"),
        ({"python_include": Path("/nowhere")}, r"has no Python\.h"),
        ({"os": "darwin"}, "compiled on Linux only"),
        ({"cxx": None, "portable": True}, "no ziglang"),
    ],
)
def test_what_a_machine_lacks(machine: Toolchain, change: dict[str, object], reason: str) -> None:
    assert missing(machine) is None
    found = compiled_target(recipe(), "cpu", replace(machine, **change), None)
    assert isinstance(found, Skipped)
    assert reason.replace("\\", "") in found.reason
    assert found.variant is None or found.variant.backend == "cpu"


@pytest.mark.parametrize(
    ("made", "change", "reason"),
    [
        (recipe(), {"nvcc": None}, "no nvcc was found"),
        (
            recipe(),
            {"nvcc": replace(NVCC, version=(12, 8))},
            "nvcc here is of CUDA 12.8, torch was built for CUDA 13.0",
        ),
        (recipe(general='[general.cuda]\nminver = "13.1"'), {}, "CUDA here is 13.0, the kernel needs 13.1 or newer"),
        (recipe(general='[general.cuda]\nmaxver = "12.9"'), {}, "CUDA here is 13.0, the kernel needs 12.9 or older"),
        (recipe('stable-abi = "2.14"'), {}, "torch.stable-abi is 2.14, torch here is 2.13"),
        (recipe('minver = "2.14"'), {}, "torch here is 2.13, the kernel needs 2.14 or newer"),
        (recipe('maxver = "2.12"'), {}, "torch here is 2.13, the kernel needs 2.12 or older"),
        (recipe(kernel='depends = ["torch", "cutlass_3_8"]'), {}, "kernel.one depends on cutlass_3_8"),
        (recipe(), {"portable": True}, "portable builds are made of CPU kernels on torch's stable ABI only"),
    ],
)
def test_why_cuda_is_not_built(machine: Toolchain, made: Recipe, change: dict[str, object], reason: str) -> None:
    assert isinstance(compiled_target(recipe(), "cuda", machine, None), Target)
    found = compiled_target(made, "cuda", replace(machine, **change), None)
    assert isinstance(found, Skipped)
    assert reason in found.reason


def test_a_portable_build_needs_the_stable_abi(machine: Toolchain) -> None:
    portable = replace(machine, portable=True)
    assert isinstance(compiled_target(recipe(backend="cpu"), "cpu", portable, None), Target)
    assert isinstance(compiled_target(recipe("", backend="cpu"), "cpu", portable, None), Skipped)


def test_a_machine_without_a_gpu_builds_for_its_compilers_cuda(machine: Toolchain) -> None:
    found = compiled_target(recipe(), "cuda", replace(machine, torch=replace(TORCH, cuda=None)), None)
    assert isinstance(found, Target)
    assert found.cuda == (13, 0)


@pytest.mark.parametrize(
    ("listed", "devices", "archs"),
    [
        ("", None, RELEASE_ARCHS),
        ("", ("9.0", "9.0", "12.0"), ("9.0", "12.0")),
        ('cuda-capabilities = ["8.0", "9.0a"]', None, ("8.0", "9.0a")),
        ('cuda-capabilities = ["8.0", "9.0a"]', ("9.0",), ("9.0a",)),
        ('cuda-capabilities = ["8.0", "9.0a"]', ("8.6",), ("8.0",)),
        ('cuda-capabilities = ["8.0+PTX"]', ("12.0",), ("8.0+PTX",)),
    ],
)
def test_architectures(
    machine: Toolchain, listed: str, devices: tuple[str, ...] | None, archs: tuple[str, ...]
) -> None:
    found = compiled_target(recipe(kernel=listed), "cuda", machine, devices)
    assert isinstance(found, Target)
    assert found.archs == archs


def test_devices_that_nvcc_does_not_know_are_left_out(machine: Toolchain) -> None:
    # Projects list the devices of every CUDA they are built with: 7.0 went with CUDA 13, 11.8 never was.
    nvcc = replace(NVCC, devices=("7.5", "8.0", "9.0", "10.0"))
    machine = replace(machine, nvcc=nvcc)
    listed = recipe(kernel='cuda-capabilities = ["7.0", "8.0", "9.0a", "10.0+PTX", "11.8"]')
    found = compiled_target(listed, "cuda", machine, None)
    assert isinstance(found, Target)
    assert found.archs == ("8.0", "9.0a", "10.0+PTX")
    assert found.left_out == ("7.0", "11.8")
    released = compiled_target(recipe(), "cuda", machine, None)
    assert isinstance(released, Target)
    assert (released.archs, released.left_out) == (("8.0", "9.0", "10.0+PTX"), ())  # the project names none

    none = compiled_target(recipe(kernel='cuda-capabilities = ["7.0"]'), "cuda", machine, None)
    assert isinstance(none, Skipped)
    assert "kernel.one is for 7.0; nvcc here compiles for 7.5, 8.0, 9.0, 10.0" in none.reason


def test_a_section_for_other_devices_is_a_reason_and_one_for_newer_cuda_is_left_out(machine: Toolchain) -> None:
    found = compiled_target(recipe(kernel='cuda-capabilities = ["10.0a"]'), "cuda", machine, ("9.0",))
    assert isinstance(found, Skipped)
    assert "kernel.one is for 10.0a; the devices here are 9.0" in found.reason
    newer = compiled_target(recipe(kernel='cuda-minver = "13.1"'), "cuda", machine, None)
    assert isinstance(newer, Target)
    assert newer.sections == ()


@pytest.mark.parametrize("backend", ["rocm", "cpu"])
def test_other_frameworks_and_backends_say_that_they_are_not_built(machine: Toolchain, backend: str) -> None:
    made = recipe() if backend == "rocm" else replace(recipe(), tvm_ffi=True)
    found = compiled_target(made, backend, machine, None)
    assert isinstance(found, Skipped)
    assert "not built by this version" in found.reason


def test_backends_without_sources_of_their_own_have_the_noarch_variant_alone(machine: Toolchain) -> None:
    made = replace(recipe(backend="cpu"), noarch=True)
    assert isinstance(compiled_target(made, "cpu", machine, None), Target)
    assert [made.compiles_for(name) for name in ("cpu", "cuda", "xpu")] == [True, False, False]
    found = compiled_target(made, "cuda", machine, None)
    assert isinstance(found, Skipped)
    assert (found.variant, "its variant is the noarch one" in found.reason) == (None, True)
    assert isinstance(compiled_target(replace(made, noarch=False), "cuda", machine, None), Target)
