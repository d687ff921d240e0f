from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from kernelhub.core.backends import BY_NAME
from kernelhub.core.host import Host
from kernelhub.core.select import rank, reject
from kernelhub.core.variants import VariantAccepted, VariantRejected, parse_variant
from kernelhub.errors import InvalidReference

CUDA = Host((3, 12), (2, 10), "cuda", "x86_64", "linux", backend_version=(12, 8), tvm_ffi=(0, 1))
CPU = replace(CUDA, backend="cpu", backend_version=None)
ROCM = replace(CUDA, backend="rocm", backend_version=(7, 1))
MAC = Host((3, 12), (2, 10), "metal", "aarch64", "darwin", macos=26)


def why(name: str, host: Host = CUDA, backend: str | None = None) -> str | None:
    return reject(parse_variant(name), host, BY_NAME[backend or host.backend])


# formats.md, "Order": stable ABI (newest first), torch (untagged before tagged), tvm-ffi, noarch of the backend,
# universal; within each the highest backend version; last the name.
IN_ORDER = [
    "torch-stable-abi210-cu128-x86_64-linux",
    "torch-stable-abi210-cu126-x86_64-linux",
    "torch-stable-abi29-cu128-x86_64-linux",
    "torch-stable-abi29-cu120-x86_64-linux",
    "torch210-cu128-x86_64-linux",
    "torch210-cu126-x86_64-linux",
    "torch210-cxx11-cu128-x86_64-linux",
    "torch210-cxx11-cu126-x86_64-linux",
    "tvm-ffi01-cu128-x86_64-linux",
    "tvm-ffi01-cu121-x86_64-linux",
    "torch-cuda",
    "torch-universal",
]


def test_the_best_comes_first() -> None:
    for names in (IN_ORDER, IN_ORDER[::-1], sorted(IN_ORDER)):
        ranked = rank(names, CUDA, BY_NAME["cuda"])
        assert [item.variant.variant_str for item in ranked] == IN_ORDER
        assert all(isinstance(item, VariantAccepted) for item in ranked)


@pytest.mark.parametrize("backend", sorted(BY_NAME))
def test_a_build_for_the_backend_goes_before_the_universal_one(backend: str) -> None:
    name = f"torch-{BY_NAME[backend].noarch}"
    ranked = rank(["torch-universal", name], replace(CPU, backend=backend), BY_NAME[backend])
    assert [item.variant.variant_str for item in ranked] == [name, "torch-universal"]


def test_minor_versions_are_numbers_in_the_order() -> None:
    host = replace(CUDA, backend_version=(12, 10))
    names = ["torch210-cu129-x86_64-linux", "torch210-cu1210-x86_64-linux"]
    assert [item.variant.variant_str for item in rank(names, host, BY_NAME["cuda"])] == names[::-1]


def test_the_rejected_follow_by_name_with_their_reasons() -> None:
    ranked = rank(["torch-rocm", "zzz", "torch-cuda", "../x"], CUDA, BY_NAME["cuda"])
    assert ranked[0] == VariantAccepted(parse_variant("torch-cuda"))
    assert ranked[1:] == [
        VariantRejected(parse_variant(name), reason)
        for name, reason in [
            ("../x", "not the name of a build variant"),
            ("torch-rocm", "made for ROCm, wanted is CUDA"),
            ("zzz", "not the name of a build variant"),
        ]
    ]


def test_a_name_that_is_given_twice_is_ranked_once() -> None:
    assert len(rank(["torch-cuda", "torch-cuda"], CUDA, BY_NAME["cuda"])) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torch-stable-abi29-cu128-x86_64-linux", None),
        ("torch-stable-abi210-cu128-x86_64-linux", None),
        ("torch-stable-abi211-cu128-x86_64-linux", "built for torch 2.11 and newer, this machine has 2.10"),
        ("torch-stable-abi19-cu128-x86_64-linux", None),
        ("torch-stable-abi30-cu128-x86_64-linux", "built for torch 3.0 and newer, this machine has 2.10"),
        ("torch210-cu128-x86_64-linux", None),
        ("torch29-cu128-x86_64-linux", "built for torch 2.9, this machine has 2.10"),
        ("torch211-cu128-x86_64-linux", "built for torch 2.11, this machine has 2.10"),
        ("torch210-cxx11-cu128-x86_64-linux", None),
        ("torch210-cxx98-cu128-x86_64-linux", "built for the cxx98 ABI, torch here has cxx11"),
        ("tvm-ffi01-cu128-x86_64-linux", None),
        ("tvm-ffi02-cu128-x86_64-linux", "built for tvm-ffi 0.2, this machine has 0.1"),
        ("tvm-ffi00-cu128-x86_64-linux", "built for tvm-ffi 0.0, this machine has 0.1"),
        ("torch210-cu126-x86_64-linux", None),
        ("torch210-cu129-x86_64-linux", "built for CUDA 12.9, this machine has 12.8"),
        ("torch210-cu1210-x86_64-linux", "built for CUDA 12.10, this machine has 12.8"),
        ("torch210-cu118-x86_64-linux", "built for CUDA 11.8, this machine has 12.8"),
        ("torch210-cu130-x86_64-linux", "built for CUDA 13.0, this machine has 12.8"),
        ("torch210-cu128-aarch64-linux", "built for aarch64 processors, this machine has x86_64"),
        ("torch210-cu128-x86_64-windows", "built for windows, this machine runs linux"),
        ("torch210-cpu-x86_64-linux", "built for the CPU, wanted is CUDA"),
        ("torch210-rocm71-x86_64-linux", "built for ROCm, wanted is CUDA"),
        ("torch-cuda", None),
        ("torch-universal", None),
        ("torch-cpu", "made for the CPU, wanted is CUDA"),
        ("torch-npu", "made for CANN, wanted is CUDA"),
    ],
)
def test_what_fits_a_cuda_machine(name: str, reason: str | None) -> None:
    assert why(name) == reason


def test_other_backends_fit_by_an_equal_version() -> None:
    assert why("torch210-rocm71-x86_64-linux", ROCM) is None
    assert why("torch210-rocm70-x86_64-linux", ROCM) == "built for ROCm 7.0, this machine has 7.1"
    xpu = replace(CUDA, backend="xpu", backend_version=(2025, 2))
    assert why("torch210-xpu20252-x86_64-linux", xpu) is None
    assert why("torch210-xpu20251-x86_64-linux", xpu) == "built for XPU 2025.1, this machine has 2025.2"


def test_a_cpu_build_runs_on_a_machine_with_another_backend_where_it_is_asked_for() -> None:
    assert why("torch210-cpu-x86_64-linux", CUDA, "cpu") is None
    assert why("torch-cpu", CUDA, "cpu") is None
    assert why("torch210-cu128-x86_64-linux", CUDA, "cpu") == "built for CUDA, wanted is the CPU"


def test_metal_needs_macos_26() -> None:
    name = "torch210-metal-aarch64-darwin"
    assert why(name, MAC) is None
    assert why(name, replace(MAC, macos=27)) is None
    assert why(name, replace(MAC, macos=15)) == "needs macOS 26, this machine has 15"
    assert why(name, replace(MAC, macos=None)) == "needs macOS 26, this machine has none"
    assert why("torch210-cpu-aarch64-darwin", replace(MAC, macos=15), "cpu") is None
    assert why("torch-metal", replace(MAC, macos=15)) is None


def test_compiled_builds_do_not_fit_free_threaded_python_before_3_15() -> None:
    free = replace(CPU, free_threaded=True, python=(3, 14))
    for name in ("torch210-cpu-x86_64-linux", "torch-stable-abi29-cpu-x86_64-linux", "tvm-ffi01-cpu-x86_64-linux"):
        assert "free-threaded" in (why(name, free) or "")
        assert why(name, replace(free, python=(3, 15))) is None
        assert why(name, replace(free, free_threaded=False)) is None
    for name in ("torch-cpu", "torch-universal"):
        assert why(name, free) is None


def test_without_torch_only_noarch_and_tvm_ffi_builds_fit() -> None:
    host = replace(CPU, torch=None)
    assert why("torch-cpu", host) is None
    assert why("tvm-ffi01-cpu-x86_64-linux", host) is None
    assert why("torch210-cpu-x86_64-linux", host) == "built for torch 2.10, this machine has none"
    assert (
        why("torch-stable-abi29-cpu-x86_64-linux", host) == "built for torch 2.9 and newer, this machine has no torch"
    )


def test_a_version_that_is_not_known_fits_nothing() -> None:
    assert why("torch210-cu128-x86_64-linux", replace(CUDA, backend_version=None)) == (
        "built for CUDA 12.8, this machine has none"
    )
    assert why("tvm-ffi01-cu128-x86_64-linux", replace(CUDA, tvm_ffi=None)) == (
        "built for tvm-ffi 0.1, this machine has none"
    )


def test_a_machine_is_drawn_in_one_line() -> None:
    assert str(CUDA) == "torch 2.10, CUDA 12.8, x86_64-linux, Python 3.12"
    free = replace(CPU, torch=None, free_threaded=True)
    assert str(free) == "no torch, the CPU, x86_64-linux, Python 3.12 free-threaded"


def test_the_backend_is_the_one_asked_for_or_torchs() -> None:
    assert CUDA.choose_backend(None).name == "cuda"
    assert CUDA.choose_backend("cuda").name == "cuda"
    assert CUDA.choose_backend("cpu").name == "cpu"
    assert CPU.choose_backend(None).name == "cpu"


@pytest.mark.parametrize("name", ["rocm", "npu", "bogus", "", "CUDA"])
def test_any_other_backend_is_an_error_that_lists_what_the_machine_supports(name: str) -> None:
    with pytest.raises(InvalidReference, match="Expected 'cuda' or 'cpu': torch here was built for CUDA"):
        CUDA.choose_backend(name)
    with pytest.raises(ValueError, match="Expected 'cpu': torch here was built for the CPU"):
        CPU.choose_backend(name)


def test_the_order_does_not_depend_on_the_input() -> None:
    names = [IN_ORDER[3], IN_ORDER[6], IN_ORDER[11], "torch-rocm", "bogus"]
    assert len({tuple(map(str, rank(order, CUDA, BY_NAME["cuda"]))) for order in itertools.permutations(names)}) == 1
