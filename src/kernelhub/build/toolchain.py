"""What this machine can compile with: compilers, torch's headers, ninja. Found without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from pathlib import Path

from kernelhub.core.backends import VersionPair
from kernelhub.hub.probe import detect_host, torch_versions

# What `--portable` targets: the glibc of manylinux_2_28.
PORTABLE_GLIBC = "2.28"
_TIMEOUT = 60.0  # seconds; the first start of a compiler on a cold disk takes several


@dataclass(frozen=True)
class Compiler:
    """A compiler that runs here. `identity` is what it says of its version: another text, another binary.

    `devices` are the architectures that nvcc compiles for (`"9.0"`); empty where it does not say.
    """

    kind: str  # gcc, clang, zig or nvcc
    command: tuple[str, ...]
    identity: str
    version: VersionPair | None
    devices: tuple[str, ...] = ()

    @property
    def program(self) -> str:
        """The compiler alone, of a command such as `ccache g++ -isystem folder`."""
        *_, program = takewhile(_no_option, self.command)
        return program


@dataclass(frozen=True)
class TorchInstall:
    """The torch of this environment; `cuda` is what it was built for."""

    version: str
    pair: VersionPair
    root: Path
    cuda: VersionPair | None


@dataclass(frozen=True)
class Toolchain:
    """Everything outside a project that decides what is built from it."""

    cxx: Compiler | None
    nvcc: Compiler | None
    cuda_root: Path | None
    torch: TorchInstall | None
    ninja: tuple[str, ...] | None
    python_include: Path
    cpu: str
    os: str
    libc: str
    portable: bool = False
    # The C++ library is linked into what is built: exceptions may not leave it (headers.PORTABLE).
    own_runtime: bool = False
    # The shared C++ library, where the compiler does not find it by itself.
    runtime: str = ""
    # The C++ compiler and the CUDA toolkit that were asked for.
    wanted: str | None = None
    wanted_cuda: Path | None = None

    @property
    def identity(self) -> list[str]:
        """What makes binaries differ, as text; no path is in it."""
        compilers = [item.identity for item in (self.cxx, self.nvcc) if item]
        torch = self.torch.version if self.torch else ""
        return [*compilers, torch, self.cpu, self.os, self.libc, *(["own C++ runtime"] if self.own_runtime else [])]


@cache
def find_toolchain(
    cxx: str | None = None, cuda_home: Path | None = None, *, portable: bool = False, with_cuda: bool = True
) -> Toolchain:
    """The toolchain of this machine, asked once a process: one start of each compiler, about 3 ms.

    `cxx` is the C++ compiler to use (a name or path), `cuda_home` the CUDA toolkit's folder; else they are looked for.
    `portable` takes the ziglang package's compiler and a fixed old glibc; `with_cuda=False` does not look for nvcc.
    """
    host = detect_host()
    nvcc = _nvcc(cuda_home) if with_cuda and not portable else None
    return Toolchain(
        cxx=_zig(host.cpu) if portable else _cxx(cxx),
        nvcc=nvcc,
        cuda_root=_cuda_root(nvcc) if nvcc else None,
        torch=_torch(),
        ninja=_ninja(),
        python_include=Path(sysconfig.get_path("include")),
        cpu=host.cpu,
        os=host.os,
        libc=f"glibc {PORTABLE_GLIBC}" if portable else _libc(),
        portable=portable,
        own_runtime=portable,
        wanted=None if portable else cxx,
        wanted_cuda=cuda_home,
    )


@cache
def ready(toolchain: Toolchain) -> Toolchain:
    """The toolchain with what only building needs to know of it: how its compiler links the C++ library.

    Seen in containers: g++ with the static library alone. Linked in, it is a second C++ runtime in the process, and an
    exception that reaches torch's frames ends it. The shared one is there too, since torch needs it, by another name.
    """
    cxx = toolchain.cxx
    if cxx is None or cxx.kind != "gcc" or _file_of(cxx, "libstdc++.so"):
        return toolchain
    shared = _file_of(cxx, "libstdc++.so.6")
    return replace(toolchain, runtime=shared) if shared else replace(toolchain, own_runtime=True)


def _file_of(compiler: Compiler, name: str) -> str:
    """Where a compiler finds a library; empty where it does not. It then prints the name as it was given."""
    path = (_ask([*compiler.command, f"-print-file-name={name}"]) or "").strip()
    return path if path != name else ""


def broken_cxx(toolchain: Toolchain) -> str | None:
    """What is wrong with the C++ compiler that was asked for; None where it runs, or none was asked for."""
    if toolchain.cxx is not None or not toolchain.wanted:
        return None
    if not _words(toolchain.wanted):
        return f"CXX is {toolchain.wanted!r}, which no shell takes for a command: is a quotation mark missing?"
    return f"CXX is {toolchain.wanted!r}, and `{toolchain.wanted} --version` says nothing: is it there, and a compiler?"


def missing_nvcc(toolchain: Toolchain) -> str:
    """What to do about an nvcc that was not found: of the toolkit that was asked for, or of any."""
    if toolchain.wanted_cuda:
        return f"{toolchain.wanted_cuda}, which CUDA_HOME or CUDA_PATH names, has no bin/nvcc that runs"
    return "no nvcc was found: install the CUDA toolkit, or set CUDA_HOME"


def missing(toolchain: Toolchain) -> str | None:
    """Why nothing can be compiled at all; None where something can."""
    if toolchain.os != "linux":
        return f"kernels are compiled on Linux only; this machine runs {toolchain.os}"
    if toolchain.cxx is None:
        if toolchain.portable:
            return "no ziglang: pip install 'kernelhub[portable]'"
        return (
            broken_cxx(toolchain)
            or "no C++ compiler was found (looked for g++ and clang++): apt-get install g++, or set CXX"
        )
    if toolchain.torch is None:
        return "torch is not installed: its headers are needed"
    if toolchain.ninja is None:
        return "no ninja was found: pip install ninja"
    if not (toolchain.python_include / "Python.h").is_file():
        return f"{toolchain.python_include} has no Python.h: apt-get install python3-dev, or a Python with headers"
    return None


def _cxx(wanted: str | None) -> Compiler | None:
    """The first C++ compiler that runs; `wanted` may have arguments, as CXX has them (`ccache g++`)."""
    for name, *arguments in filter(None, [_words(wanted)]) if wanted else (["g++"], ["clang++"]):
        path = _which(name)
        text = _ask([path, *arguments, "--version"]) if path else None
        if path and text:
            kind = "clang" if "clang" in text.lower() else "gcc"
            return Compiler(kind, (path, *arguments), _identity(text), _version(text))
    return None


def _words(command: str) -> list[str]:
    """The words of a command, its programs by paths that hold in any folder; none where a quotation mark is missing."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    programs = len(list(takewhile(_no_option, words)))
    return [str(Path(word).absolute()) if "/" in word else word for word in words[:programs]] + words[programs:]


def _no_option(word: str) -> bool:
    return not word.startswith("-")


def _which(name: str) -> str | None:
    """Where a program is, from whatever folder it is called."""
    path = shutil.which(name)
    return str(Path(path).absolute()) if path else None


def _zig(cpu: str) -> Compiler | None:
    if importlib.util.find_spec("ziglang") is None:
        return None
    zig = (sys.executable, "-m", "ziglang")
    version = _ask([*zig, "version"])
    if not version:
        return None
    target = f"{cpu}-linux-gnu.{PORTABLE_GLIBC}"
    return Compiler("zig", (*zig, "c++", "-target", target), f"zig {version.strip()} {target}", _version(version))


def _nvcc(cuda_home: Path | None) -> Compiler | None:
    # As text: before Python 3.12 `which` gives a path back as it came, and commands are joined as text.
    places = [str(cuda_home / "bin" / "nvcc")] if cuda_home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        path = _which(place)
        text = _ask([path, "--version"]) if path else None
        release = re.search(r"release (\d+)\.(\d+)", text or "")
        if path and text and release:
            listed = re.findall(r"compute_(\d+)(\d)\b", _ask([path, "--list-gpu-arch"]) or "")
            devices = tuple(f"{major}.{minor}" for major, minor in listed)
            return Compiler("nvcc", (path,), _identity(text), (int(release[1]), int(release[2])), devices)
    return None


def _cuda_root(nvcc: Compiler) -> Path | None:
    """The toolkit's folder, with `include` and `lib64`: nvcc itself may be a script that starts the real one."""
    places = Path(nvcc.command[0]).resolve().parent.parent, Path("/usr/local/cuda")
    return next((place for place in places if (place / "include" / "cuda_runtime.h").is_file()), None)


def _libc() -> str:
    """The C library that binaries made here ask for, where the system says it."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return ""


def _torch() -> TorchInstall | None:
    versions, host = torch_versions(), detect_host()
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin or host.torch is None:
        return None
    cuda = host.backend_version if host.backend == "cuda" else None
    return TorchInstall(versions["__version__"], host.torch, Path(spec.origin).parent, cuda)


def _ninja() -> tuple[str, ...] | None:
    """The ninja of this environment, else the one on the path: an environment need not be activated to be used."""
    own = Path(sysconfig.get_path("scripts"), "ninja")
    path = str(own) if own.is_file() else shutil.which("ninja")
    return (path,) if path else None


def _ask(command: list[str]) -> str | None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout if ran.returncode == 0 else None


def _identity(text: str) -> str:
    """What a compiler says of its version: no folder, no licence."""
    lines = text.strip().splitlines()
    return "\n".join(line for line in lines if line == lines[0] or line.startswith(("Target:", "Cuda", "Build")))


def _version(text: str) -> VersionPair | None:
    match = re.search(r"(\d+)\.(\d+)(?:\.\d+)?(?!.*\d+\.\d+\.\d+)", text.splitlines()[0])
    return (int(match[1]), int(match[2])) if match else None
