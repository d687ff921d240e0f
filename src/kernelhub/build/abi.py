"""Does a compiled kernel run where its name says that it runs? Read from the file itself.

`problems` is a pure function of what `read` finds in a shared object: which symbols it takes and gives, which libraries it
needs. pyelftools reads the files and abi3info knows Python's limited API; both are in the extra `build`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelhub.core.variants import BuildVariant, parse_variant
from kernelhub.errors import InvalidReference, MissingDependency

# The newest symbol versions that every manylinux_2_28 system has (PEP 600; its policy as auditwheel writes it).
MANYLINUX_2_28 = {
    "GLIBC": (2, 28),
    "GLIBCXX": (3, 4, 24),
    "CXXABI": (1, 3, 11),
    "GCC": (7, 0, 0),
}  # fmt: skip
# The oldest Python that kernels are built for.
_PYTHON = (3, 9)

_VERSION = re.compile(r"([A-Z]+)_(\d+(?:\.\d+)*)")
_LIBRARIES = {
    "torch's": r"lib(torch|torch_cpu|torch_cuda|torch_hip|torch_xpu|torch_python|c10|c10_cuda|c10_hip|c10_xpu)\.so",
    "the system's": r"(ld-linux[-\w]*|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|util|gomp))\.so\.\d+",
    "the CUDA toolkit's": r"lib(cuda|cudart|cublas|cublasLt|cudnn\w*|cufft|curand|cusolver|cusparse|nvrtc|nvJitLink|nccl)\.so(\.\d+)*",
    "ROCm's": r"lib(amdhip64|hip\w+|roc\w+|hsa-runtime64)\.so(\.\d+)*",
}
# torch's stable C interface. Everything else of torch's has C++ names, which change with its version.
_STABLE = re.compile(r"(aoti_torch|torch)_\w+")
_TORCH_CXX = re.compile(r"_Z\w*?(N[KVRO]*)?(2at|3c10|5torch|6caffe2)\d*")
_CUDA = re.compile(r"(__)?(cu|nv|hip)\w+")


@dataclass(frozen=True)
class Symbol:
    """A symbol that a library takes from elsewhere: `version` as in `GLIBC_2.17`, empty where it has none."""

    name: str
    version: str = ""
    weak: bool = False


@dataclass(frozen=True)
class SharedObject:
    """What a shared object says of itself."""

    name: str
    needed: tuple[str, ...]
    undefined: tuple[Symbol, ...]
    defined: tuple[str, ...]
    run_paths: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """One file with what is wrong with it; `versions` are the newest symbol versions that it asks for."""

    path: Path
    needed: tuple[str, ...]
    versions: tuple[str, ...]
    problems: tuple[str, ...]


def check(path: Path) -> list[Report]:
    """Check a shared object, or every one below a folder; a stable-ABI variant is known by its folder's name.

    Raises `InvalidReference` where there is none, or where a file is no ELF file.
    """
    files = sorted(path.rglob("*.so")) if path.is_dir() else [path]
    if not files:
        raise InvalidReference(f"{path} has no shared objects (*.so)", hint="Noarch variants need no check.")
    return [_report(file) for file in files]


def _report(file: Path) -> Report:
    parsed = [parse_variant(part.name) for part in file.absolute().parents]
    variant = next((item for item in parsed if isinstance(item, BuildVariant)), None)
    found = read(file)
    versions = tuple(f"{family}_{'.'.join(map(str, newest))}" for family, newest in sorted(_newest(found).items()))
    return Report(file, found.needed, versions, tuple(problems(found, variant)))


def problems(library: SharedObject, variant: BuildVariant | None) -> Iterator[str]:
    """What keeps a library from running on every manylinux_2_28 system, with every Python, and with every torch its
    variant names."""
    for family, newest in sorted(_newest(library).items()):
        if family in MANYLINUX_2_28 and newest > MANYLINUX_2_28[family]:
            have, most = ".".join(map(str, newest)), ".".join(map(str, MANYLINUX_2_28[family]))
            names = ", ".join(sorted(s.name for s in library.undefined if s.version == f"{family}_{have}")[:3])
            yield f"asks for {family}_{have} ({names}); manylinux_2_28 has {family}_{most} at most"
    for name in library.needed:
        if not any(re.fullmatch(pattern, name) for pattern in _LIBRARIES.values()):
            yield f"needs {name}, which is none of torch's, CUDA's or the system's libraries"
    for place in library.run_paths:
        yield f"looks for libraries in {place}"
    yield from _python_problems(library)
    if variant is not None and variant.framework.kind == "torch-stable-abi":
        yield from _stable_problems(library)


def _python_problems(library: SharedObject) -> Iterator[str]:
    if not library.name.endswith(".abi3.so"):
        yield "its name does not end in .abi3.so: it is for one Python version"
    entries = [name for name in library.defined if name.startswith("PyInit_")]
    if f"PyInit_{library.name.split('.')[0]}" not in entries:
        yield f"it has no PyInit_{library.name.split('.')[0]}: Python cannot import it (REGISTER_EXTENSION is missing)"
    for symbol in library.undefined:
        if symbol.name.startswith(("Py", "_Py")) and not _limited(symbol.name):
            yield f"takes {symbol.name}, which is not in the limited API of Python {'.'.join(map(str, _PYTHON))}"


def _stable_problems(library: SharedObject) -> Iterator[str]:
    for symbol in library.undefined:
        if _TORCH_CXX.match(symbol.name):
            yield f"takes {symbol.name}, which is not in torch's stable ABI"
        elif not (
            symbol.version or symbol.weak or symbol.name.startswith(("Py", "_Py"))
            or _STABLE.fullmatch(symbol.name) or _CUDA.fullmatch(symbol.name)
        ):  # fmt: skip
            yield f"takes {symbol.name}, which nothing that it needs is known to have"


def _newest(library: SharedObject) -> dict[str, tuple[int, ...]]:
    """The newest version that is asked for, by family: `{"GLIBC": (2, 17)}`."""
    found: dict[str, tuple[int, ...]] = {}
    for symbol in library.undefined:
        if match := _VERSION.fullmatch(symbol.version):
            version = tuple(int(part) for part in match[2].split("."))
            found[match[1]] = max(found.get(match[1], ()), version)
    return found


def _limited(name: str) -> bool:
    """Whether a symbol of Python's is in the limited API."""
    try:
        from abi3info import DATAS, FUNCTIONS
        from abi3info.models import Symbol as PythonSymbol
    except ImportError as error:
        raise _extra() from error
    row = FUNCTIONS.get(PythonSymbol(name)) or DATAS.get(PythonSymbol(name))
    return row is not None and (row.added.major, row.added.minor) <= _PYTHON


def read(file: Path) -> SharedObject:
    """What a shared object says of itself. Raises `InvalidReference` where it is no ELF file."""
    try:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise _extra() from error
    try:
        with file.open("rb") as stream:
            return _read(file.name, ELFFile(stream))
    except OSError as error:
        raise InvalidReference(f"{file}: {error.strerror}") from error
    except ELFError as error:
        raise InvalidReference(f"{file} is no ELF file: {error}", hint="Expected a kernel's .so for Linux.") from error


def _read(name: str, elf: Any) -> SharedObject:
    dynamic = elf.get_section_by_name(".dynamic")
    symbols = elf.get_section_by_name(".dynsym")
    if dynamic is None or symbols is None:
        raise InvalidReference(f"{name} is no shared object", hint="Expected a kernel's .so.")
    numbers = elf.get_section_by_name(".gnu.version")
    needs = elf.get_section_by_name(".gnu.version_r")
    texts = (
        {vernaux["vna_other"]: vernaux.name for _, rows in needs.iter_versions() for vernaux in rows} if needs else {}
    )
    undefined, defined = [], []
    for index, symbol in enumerate(symbols.iter_symbols()):
        if not symbol.name:
            continue
        if symbol["st_shndx"] != "SHN_UNDEF":
            defined.append(symbol.name)
            continue
        number = numbers.get_symbol(index)["ndx"] if numbers else None
        text = texts.get(number & 0x7FFF, "") if isinstance(number, int) else ""
        undefined.append(Symbol(symbol.name, text, symbol["st_info"]["bind"] == "STB_WEAK"))
    tags = list(dynamic.iter_tags())
    return SharedObject(
        name=name,
        needed=tuple(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"),
        undefined=tuple(sorted(undefined, key=lambda symbol: (symbol.name, symbol.version))),
        defined=tuple(sorted(defined)),
        run_paths=tuple(
            getattr(tag, kind)
            for tag in tags
            for kind in ("rpath", "runpath")
            if tag.entry.d_tag == f"DT_{kind.upper()}"
        ),
    )


def _extra() -> MissingDependency:
    return MissingDependency("checking binaries needs pyelftools and abi3info", packages=["'kernelhub[build]'"])
