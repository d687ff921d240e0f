"""The build of one variant as text: flags, steps and the ninja file. Pure, so that the same project gives the same bytes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from kernelhub.build.headers import CUDA_CMAKE_MACROS, PORTABLE, REGISTRATION
from kernelhub.build.recipe import Binding, Recipe, Section
from kernelhub.build.sources import digest_of
from kernelhub.build.targets import Target
from kernelhub.build.toolchain import Toolchain
from kernelhub.core.backends import VersionPair
from kernelhub.core.canonical import canonical_json, sha256_hex
from kernelhub.errors import BuildFailed, InvalidMetadata

GENERATED = "_generated"
OBJECTS = "_objects"
_CPP = (".cpp", ".cc", ".cxx", ".c++")
_CUDA = (".cu",)

# The oldest Python whose limited API is used: what is built serves it and everything newer.
_LIMITED_API = "0x03090000"
# Headers of torch from this version on, but for the stable ones, need C++20.
_CXX20_FROM = (2, 10)
_IDENT = "KERNELHUB_IDENT"  # stands for the namespace while the hash that names it is taken


@dataclass(frozen=True)
class Step:
    """One compiler call: `tool` is cxx, nvcc or link. In `flags`, `@torch@` and the like stand for this machine's paths."""

    tool: str
    flags: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A build: what lies in its folder, the ninja file among it, and what comes out.

    `ident` is the ops' namespace and the extension's name, unique to everything that makes the binary.
    """

    ident: str
    files: Mapping[str, bytes]
    output: str
    steps: tuple[Step, ...]


def plan(recipe: Recipe, target: Target, toolchain: Toolchain, native: Mapping[str, bytes], whole: str) -> Plan:
    """The build of a compiled variant from its native files. `whole` is the digest of the project.

    Raises `InvalidMetadata` for sources that no compiler here takes.
    """
    generated = _generated(toolchain)
    steps = tuple(_steps(recipe, target, toolchain))
    made_of = {
        "steps": [[step.tool, *step.flags, *step.inputs, step.output] for step in steps],
        "toolchain": toolchain.identity,
        "files": digest_of({**native, **generated}),
        "project": whole,
        "variant": str(target.variant),
    }
    digest = sha256_hex(canonical_json(made_of))[:12]
    ident = f"_{recipe.python_name}_{target.backend}_{digest}"
    steps = tuple(_named(step, ident) for step in steps)
    text = _ninja(steps, toolchain)
    return Plan(ident, {**native, **generated, "build.ninja": text.encode()}, steps[-1].output, steps)


def _generated(toolchain: Toolchain) -> dict[str, bytes]:
    files = {f"{GENERATED}/registration.h": REGISTRATION}
    if toolchain.own_runtime:
        files[f"{GENERATED}/portable.h"] = PORTABLE
    if toolchain.torch and toolchain.torch.cuda is None:
        files[f"{GENERATED}/c10/cuda/impl/cuda_cmake_macros.h"] = CUDA_CMAKE_MACROS
        files[f"{GENERATED}/empty.cpp"] = ""
    return {path: text.encode() for path, text in files.items()}


def _steps(recipe: Recipe, target: Target, toolchain: Toolchain) -> Iterator[Step]:
    binding = recipe.binding
    assert binding is not None
    if toolchain.own_runtime and not target.stable_abi:
        reason = "the C++ compiler here has only a static libstdc++, and torch's C++ interface needs the shared one"
        raise BuildFailed(reason, error=reason, hint="Install libstdc++'s development files, or set torch.stable-abi.")
    objects = []
    parts: list[tuple[str, Binding | Section, tuple[str, ...]]] = [("torch", binding, target.archs)]
    parts += [(section.name, section, archs) for section, archs in target.sections]
    for name, part, archs in parts:
        for source in part.sources:
            suffix = PurePosixPath(source).suffix
            if suffix not in _CPP + _CUDA:
                _check_header(source, name)
                continue
            output = f"{OBJECTS}/{name}/{PurePosixPath(source)}.o"
            if output in objects:
                raise InvalidMetadata(f"[{name}] src: {source} is there twice", hint="Name each source once.")
            cuda = suffix in _CUDA
            if cuda and target.backend != "cuda":
                raise InvalidMetadata(f"[{name}] src: {source} is CUDA, the section is for {target.backend}")
            flags = (_cuda_flags if cuda else _cxx_flags)(part, target, toolchain, archs)
            yield Step("nvcc" if cuda else "cxx", (*flags, "-c"), (str(PurePosixPath(source)),), output)
            objects.append(output)
    if not objects:
        raise InvalidMetadata("there is nothing to compile: [torch] and [kernel.*] list no C++ or CUDA source in src")
    stubs = list(_stubs(target, toolchain))
    yield from stubs
    yield _link(recipe, target, toolchain, objects, [step.output for step in stubs])


def _check_header(source: str, section: str) -> None:
    suffix = PurePosixPath(source).suffix
    if suffix in (".c", ".hip", ".mm", ".m", ".metal", ".sycl"):
        raise InvalidMetadata(
            f"[{section}] src: {source}: files with {suffix} are not compiled by this version",
            hint=f"Expected {', '.join(_CPP + _CUDA)}, and headers.",
        )


def _defines(target: Target) -> tuple[str, ...]:
    found = [
        f"-DTORCH_EXTENSION_NAME={_IDENT}",
        f"-D{target.backend.upper()}_KERNEL",
        f"-DPy_LIMITED_API={_LIMITED_API}",
    ]
    if target.stable_abi:
        found.append(f"-DTORCH_TARGET_VERSION={_target_version(target.stable_abi)}")
    if target.backend == "cuda":
        found.append("-DUSE_CUDA")
    return tuple(found)


def _target_version(version: VersionPair) -> str:
    """As torch spells it: one byte each for major and minor, then six of zeros. `(2, 10)` -> 0x020a000000000000."""
    return f"0x{version[0]:02x}{version[1]:02x}000000000000"


def _includes(part: Binding | Section) -> tuple[str, ...]:
    own = [f"-I{PurePosixPath(folder)}" for folder in part.include]
    theirs = ["@torch@/include", "@torch@/include/torch/csrc/api/include", "@python@"]
    return (f"-I{GENERATED}", *own, "-I.", "-Itorch-ext", *(item for path in theirs for item in ("-isystem", path)))


def _standard(target: Target, toolchain: Toolchain) -> str:
    """C++17 for the stable headers, which need no more: in C++20, g++ asks for a libstdc++ three years newer."""
    assert toolchain.torch is not None
    return "-std=c++17" if target.stable_abi or toolchain.torch.pair < _CXX20_FROM else "-std=c++20"


# Paths are written into binaries by __FILE__, which torch's checks use: those are the same on every machine.
_SAME_PATHS = ("-ffile-prefix-map=@torch@=torch", "-ffile-prefix-map=@python@=python")


def _cxx_flags(part: Binding | Section, target: Target, toolchain: Toolchain, _: tuple[str, ...]) -> tuple[str, ...]:
    flags = [_standard(target, toolchain), "-O3", "-DNDEBUG", "-fPIC", *_SAME_PATHS]
    if target.stable_abi:
        # Nothing but the module's entry is seen from outside; torch's own symbols are not shared through this build.
        flags.append("-fvisibility=hidden")
        if toolchain.cxx and toolchain.cxx.kind == "gcc":
            flags.append("-fno-gnu-unique")
    if toolchain.portable:
        flags.append("-g0")
    if toolchain.own_runtime:
        flags += ["-include", f"{GENERATED}/portable.h"]
    cuda = ("-isystem", "@cuda@/include") if target.backend == "cuda" else ()
    return (*flags, *_defines(target), *_includes(part), *cuda, *part.cxx_flags)


def _cuda_flags(
    part: Binding | Section, target: Target, toolchain: Toolchain, archs: tuple[str, ...]
) -> tuple[str, ...]:
    host = ["-fPIC", *_SAME_PATHS, *part.cxx_flags]
    if target.stable_abi:
        host.append("-fvisibility=hidden")
    guard = ("-include", f"{GENERATED}/portable.h") if toolchain.own_runtime else ()
    own = part.flags if isinstance(part, Section) else ()
    return (
        "-ccbin", "@cxx@", _standard(target, toolchain), "-O3", "-DNDEBUG", "--expt-relaxed-constexpr",
        *(item for flag in host for item in ("-Xcompiler", flag)),
        *(flag for arch in archs for flag in _gencode(arch)),
        *guard, *_defines(target), *_includes(part), *own,
    )  # fmt: skip


def _gencode(arch: str) -> Iterator[str]:
    """`"9.0a"` -> machine code for it; `"10.0+PTX"` -> also what newer devices compile for themselves."""
    number = arch.removesuffix("+PTX").replace(".", "")
    yield f"-gencode=arch=compute_{number},code=sm_{number}"
    if arch.endswith("+PTX"):
        yield f"-gencode=arch=compute_{number},code=compute_{number}"


def _stubs(target: Target, toolchain: Toolchain) -> Iterator[Step]:
    """Empty libraries with the names of those that a torch with CUDA has and the one here has not."""
    if target.backend == "cuda" and toolchain.torch and toolchain.torch.cuda is None:
        for name in ("torch_cuda", "c10_cuda"):
            flags = ("-shared", f"-Wl,-soname,lib{name}.so")
            yield Step("cxx", flags, (f"{GENERATED}/empty.cpp",), f"{OBJECTS}/stubs/lib{name}.so")


def _link(recipe: Recipe, target: Target, toolchain: Toolchain, objects: list[str], stubs: list[str]) -> Step:
    libraries = ["-ltorch_cpu"] if target.stable_abi else ["-lc10", "-ltorch_cpu", "-ltorch"]
    flags = ["-shared", "-L@torch@/lib"]
    if toolchain.portable:
        flags.append("-s")  # else it carries the symbols of the whole C++ library: 5 MB
    elif toolchain.own_runtime:
        # Else half of its C++ library is bound to the process's own, and streams stop at the first number.
        flags.append("-Wl,--exclude-libs,ALL")
    if target.backend == "cuda":
        flags += [f"-L{OBJECTS}/stubs"] if stubs else []
        flags += ["-L@cuda@/lib64"]
        libraries += ["-ltorch_cuda", "-lcudart"] if target.stable_abi else ["-lc10_cuda", "-ltorch_cuda", "-lcudart"]
    parts: list[Binding | Section] = [section for section, _ in target.sections]
    assert recipe.binding is not None
    if any("-fopenmp" in part.cxx_flags for part in (recipe.binding, *parts)):
        flags.append("-fopenmp")
    # --no-as-needed: what the library needs must not depend on which symbols this torch happens to define inline
    tail = ("-Wl,--no-as-needed", *libraries, *(["@runtime@"] if toolchain.runtime else []))
    output = f"{_IDENT}.abi3.so"
    return Step("link", (*flags, *tail), tuple(objects), output, tuple(stubs))


def _named(step: Step, ident: str) -> Step:
    flags = tuple(flag.replace(_IDENT, ident) for flag in step.flags)
    return Step(step.tool, flags, step.inputs, step.output.replace(_IDENT, ident), step.after)


def _ninja(steps: tuple[Step, ...], toolchain: Toolchain) -> str:
    """The ninja file. Libraries come after the objects that need them, so linking is a rule of its own."""
    assert toolchain.cxx is not None
    assert toolchain.torch is not None
    places = {
        "@cxx@": toolchain.cxx.program,
        "@torch@": str(toolchain.torch.root),
        "@python@": str(toolchain.python_include),
        "@cuda@": str(toolchain.cuda_root or ""),
        "@runtime@": toolchain.runtime,
    }
    cxx = shlex.join(toolchain.cxx.command)
    nvcc = shlex.join(toolchain.nvcc.command) if toolchain.nvcc else ""
    lines = ["rule cxx", f"  command = {_dollars(cxx)} $flags $in -o $out"]
    lines += ["rule nvcc", f"  command = {_dollars(nvcc)} $flags $in -o $out"]
    lines += ["rule link", f"  command = {_dollars(cxx)} $in -o $out $flags", ""]
    for step in steps:
        after = f" | {' '.join(map(_path, step.after))}" if step.after else ""
        lines.append(f"build {_path(step.output)}: {step.tool} {' '.join(map(_path, step.inputs))}{after}")
        lines.append(f"  flags = {' '.join(_flag(flag, places) for flag in step.flags)}")
    return "\n".join(lines) + "\n"


def _flag(flag: str, places: Mapping[str, str]) -> str:
    """A flag as ninja and the shell read it, with the places that are elsewhere on another machine filled in."""
    for name, place in places.items():
        flag = flag.replace(name, place)
    return _dollars(shlex.quote(flag))


def _dollars(text: str) -> str:
    return text.replace("$", "$$")


def _path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
