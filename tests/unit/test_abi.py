"""What keeps a binary from running elsewhere, decided from what it says of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kernelhub.core.variants import BuildVariant
from kernelhub.errors import InvalidReference

pytest.importorskip("elftools")
pytest.importorskip("abi3info")

from kernelhub.build.abi import SharedObject, Symbol, check, problems

STABLE = BuildVariant.parse("torch-stable-abi210-cpu-x86_64-linux")
TORCH = BuildVariant.parse("torch213-cxx11-cpu-x86_64-linux")
GOOD = SharedObject(
    name="_small_cpu_0123.abi3.so",
    needed=("libtorch_cpu.so", "libc10.so", "libcudart.so.13", "libstdc++.so.6", "libc.so.6", "ld-linux-x86-64.so.2", "libgomp.so.1"),
    undefined=(
        Symbol("memcpy", "GLIBC_2.28"),
        Symbol("_ZNSt13runtime_errorD1Ev", "GLIBCXX_3.4.24"),
        Symbol("PyModuleDef_Init"),
        Symbol("_Py_NoneStruct"),
        Symbol("aoti_torch_check"),
        Symbol("torch_parallel_for"),
        Symbol("cudaLaunchKernel", "libcudart.so.13"),
        Symbol("_ITM_registerTMCloneTable", weak=True),
    ),
    defined=("PyInit__small_cpu_0123",),
    run_paths=(),
)  # fmt: skip


def test_a_good_one_has_no_problems() -> None:
    assert list(problems(GOOD, STABLE)) == []


@pytest.mark.parametrize(
    ("symbol", "problem"),
    [
        (Symbol("pthread_create", "GLIBC_2.34"), "asks for GLIBC_2.34 (pthread_create); manylinux_2_28 has GLIBC_2.28"),
        (Symbol("_ZSt4x", "GLIBCXX_3.4.25"), "asks for GLIBCXX_3.4.25"),
        (Symbol("__cxa_y", "CXXABI_1.3.13"), "asks for CXXABI_1.3.13"),
        (Symbol("PyUnicode_AsUTF8"), "takes PyUnicode_AsUTF8, which is not in the limited API of Python 3.9"),
        (Symbol("_PyObject_GetMethod"), "takes _PyObject_GetMethod"),
        (Symbol("PyType_GetModuleByDef"), "takes PyType_GetModuleByDef"),  # in the limited API, of 3.13
        (Symbol("_ZN2at4_ops10empty_like4callE"), "which is not in torch's stable ABI"),
        (Symbol("_ZNK3c1010TensorImpl5sizesEv"), "which is not in torch's stable ABI"),
        (Symbol("_ZN5torch7LibraryC1E"), "which is not in torch's stable ABI"),
        (Symbol("cblas_sgemm"), "takes cblas_sgemm, which nothing that it needs is known to have"),
    ],
)
def test_each_symbol_that_is_not_everywhere(symbol: Symbol, problem: str) -> None:
    (found,) = problems(replace(GOOD, undefined=(*GOOD.undefined, symbol)), STABLE)
    assert problem in found


def test_a_build_for_one_torch_may_use_all_of_it() -> None:
    library = replace(GOOD, undefined=(*GOOD.undefined, Symbol("_ZN2at4_ops10empty_like4callE")))
    assert list(problems(library, TORCH)) == []
    assert list(problems(library, None)) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"needed": ("libopenblas.so.0",)}, "needs libopenblas.so.0"),
        ({"needed": ("libtorch_evil.so",)}, "needs libtorch_evil.so"),
        ({"run_paths": ("/home/me/lib",)}, "looks for libraries in /home/me/lib"),
        ({"name": "_small_cpu_0123.cpython-311-x86_64-linux-gnu.so"}, "its name does not end in .abi3.so"),
        ({"defined": ("PyInit_other",)}, "it has no PyInit__small_cpu_0123"),
    ],
)
def test_each_fact_of_the_file_that_is_not_right(change: dict[str, object], problem: str) -> None:
    (found,) = problems(replace(GOOD, **change), STABLE)
    assert problem in found


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidReference, match="no shared objects"):
        check(tmp_path)
    with pytest.raises(InvalidReference, match="No such file"):
        check(tmp_path / "x.so")
    (tmp_path / "x.so").write_text("text")
    with pytest.raises(InvalidReference, match="is no ELF file"):
        check(tmp_path)
