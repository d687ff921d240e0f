from __future__ import annotations

import pytest

from kernelhub.core.variants import BuildVariant, Compiled, Framework, NoArch, UnknownVariant, parse_variant
from kernelhub.errors import InvalidReference

LINUX = ("x86_64", "linux")

VARIANTS = {
    "torch-stable-abi29-cpu-x86_64-linux": (Framework("torch-stable-abi", (2, 9)), Compiled("cpu", None, *LINUX)),
    "torch210-cxx11-cu128-x86_64-linux": (Framework("torch", (2, 10), "cxx11"), Compiled("cuda", (12, 8), *LINUX)),
    "torch29-cxx98-cu1210-aarch64-linux": (
        Framework("torch", (2, 9), "cxx98"),
        Compiled("cuda", (12, 10), "aarch64", "linux"),
    ),
    "torch210-metal-aarch64-darwin": (Framework("torch", (2, 10)), Compiled("metal", None, "aarch64", "darwin")),
    "torch29-cu126-x86_64-windows": (Framework("torch", (2, 9)), Compiled("cuda", (12, 6), "x86_64", "windows")),
    "torch29-rocm710-x86_64-linux": (Framework("torch", (2, 9)), Compiled("rocm", (7, 10), *LINUX)),
    "torch29-cxx11-xpu20252-x86_64-linux": (
        Framework("torch", (2, 9), "cxx11"),
        Compiled("xpu", (2025, 2), *LINUX),
    ),
    "torch29-cann81-aarch64-linux": (Framework("torch", (2, 9)), Compiled("cann", (8, 1), "aarch64", "linux")),
    "tvm-ffi01-cu128-x86_64-linux": (Framework("tvm-ffi", (0, 1)), Compiled("cuda", (12, 8), *LINUX)),
    "torch-cuda": (Framework("noarch"), NoArch("cuda")),
    "torch-npu": (Framework("noarch"), NoArch("cann")),
    "torch-cpu": (Framework("noarch"), NoArch("cpu")),
    "torch-universal": (Framework("noarch"), NoArch(None)),
}


@pytest.mark.parametrize("text", VARIANTS)
def test_a_name_is_a_value_that_prints_back(text: str) -> None:
    variant = BuildVariant.parse(text)
    assert variant == BuildVariant(*VARIANTS[text])
    assert str(variant) == variant.variant_str == text
    assert parse_variant(text) == variant


def test_a_variant_knows_its_backend() -> None:
    assert BuildVariant.parse("torch-npu").backend == "cann"
    assert BuildVariant.parse("torch29-cu128-x86_64-linux").backend == "cuda"
    assert BuildVariant.parse("torch-universal").backend is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "torch", "torch-", "torch-cann", "torch-gaudi", "torch-mps", "torch-cpu-x86_64-linux", "Torch-cpu"),
        *("torch-cpu\n", "torch--cpu", "tvm-ffi-cpu", "torch-stable-abi-cpu", "torch-stable-abi-cpu-x86_64-linux"),
        *("torch29", "torch29-cpu", "torch29-cpu-x86_64", "torch29-cpu-x86_64-linux-extra", "torch2-cpu-x86_64-linux"),
        *(
            "torch29-cpu-arm64-linux",
            "torch29-cpu-amd64-windows",
            "torch29-cpu-x86_64-macos",
            "torch29-cpu1-x86_64-linux",
        ),
        *("torch29-cu12-x86_64-linux", "torch29-cu-x86_64-linux", "torch29-cxx14-cpu-x86_64-linux"),
        *("torch29-cxx11-cxx11-cpu-x86_64-linux", "torch29--cpu-x86_64-linux", "torch290-cpu-x86_64-linux-"),
        *("torch-stable-abi29-cxx11-cpu-x86_64-linux", "tvm-ffi01-cxx11-cpu-x86_64-linux", "torch201-cpu-x86_64-linux"),
        *("torch2.9-cpu-x86_64-linux", "tvm-ffi-01-cpu-x86_64-linux", "jax09-cpu-x86_64-linux", "../torch-cpu"),
    ],
)
def test_other_names_are_errors_and_kept_as_unknown(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        BuildVariant.parse(text)
    assert repr(text) in str(caught.value)
    assert '"torch-universal"' in str(caught.value)
    assert parse_variant(text) == UnknownVariant(text)
    assert str(UnknownVariant(text)) == text
