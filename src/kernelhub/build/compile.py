"""Run a build: a folder, ninja in it, and the first thing that a compiler complains of."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kernelhub.build.ninja import Plan
from kernelhub.build.toolchain import Toolchain
from kernelhub.errors import BuildFailed
from kernelhub.hub.store_files import locked, replace_folder

# Told how many of how many steps are done.
Steps = Callable[[int, int], None]

_STATUS = re.compile(r"\[(\d+)/(\d+)\] ")
_COMPILER = re.compile(
    r"^(?P<where>[^\s:][^:]*?)(?::(?P<line>\d+)(?::\d+)?|\((?P<nvcc>\d+)\)):?\s(?:fatal |catastrophic )?error:? (?P<text>.+)$"
)
# What may be installed tomorrow.
_MISSING = re.compile(r"No such file|file not found|cannot open source file")
_LINKER = re.compile(r"(undefined reference to .*|undefined symbol: .*|cannot find -l\S+.*|multiple definition of .*)")
_DRIVER = re.compile(r"^(?:\S+: (?:fatal )?error: |nvcc fatal\s*: )(.+)$")

# The usual causes, the most telling first.
_HINTS = (
    (r"Python\.h.*(No such file|not found)", "The Python headers are missing: apt-get install python3-dev."),
    (
        r"should not be included when either TORCH_STABLE_ONLY or TORCH_TARGET_VERSION",
        "torch.stable-abi is set: sources may include torch/csrc/stable/*, torch/headeronly/* and the AOTI shim, "
        "and no other header of torch.",
    ),
    (
        r"(requires? C\+\+|C\+\+ ?(17|20|23) (or later )?(is required|compiler|compatible)|need C\+\+|unrecognized command[- ]line option .-std=|invalid value .*-std=)",
        "The C++ standard: torch's headers need C++20 here. Use g++ 11, clang 16 or newer; a -std in cxx-flags wins.",
    ),
    (
        r"(cublas|cusparse|cusolver|curand|cufft)\w*\.h.*(No such file|not found)",
        "The CUDA toolkit here lacks this library's headers: install it whole. Kernels on the stable ABI do not need them.",
    ),
    (r"\.(h|hpp|cuh|hxx|inc).*(No such file|file not found|cannot open source file)", "Is its folder in `include` of the section? Paths are relative to build.toml."),
    (r"unsupported GNU version|unsupported clang version", "nvcc does not take this host compiler: set CXX to an older one."),
    (r"[Uu]nsupported gpu architecture", "nvcc here does not know an architecture of cuda-capabilities."),
    (r"is not a member of .torch::stable|no member named .* in namespace 'torch::stable", "Newer torch has it: raise torch.stable-abi."),
    (r"cannot find -l|unable to find library", "The linker does not find this library."),
    (r"undefined reference|undefined symbol", "Is the source that defines it in `src` of a section?"),
    (r"Killed|out of memory|cannot allocate memory", "The compiler ran out of memory: try --jobs 1."),
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """What went wrong first: the compiler's line, where, and the command that was run."""

    text: str
    command: str
    log: str


def compile_plan(
    plan: Plan, toolchain: Toolchain, folder: Path, *, jobs: int | None = None, steps: Steps | None = None
) -> bytes:
    """The shared library that a plan makes. It is built in a folder of its own below `folder`.

    The folder goes when it is done. After a failure it stays as `<folder>/<ident>.failed`, so that the command that
    failed can be run again; the next try for the same kernel and backend removes it. Raises `BuildFailed`.
    """
    for before in folder.glob(f"{plan.ident.rpartition('_')[0]}_*.failed"):
        shutil.rmtree(before, ignore_errors=True)
    work = folder / f".{plan.ident}.{uuid.uuid4().hex[:8]}"
    try:
        _write(plan, work)
        failed = _run(toolchain, work, jobs, steps)
        if failed is None:
            return _checked(_made(work / plan.output, toolchain), toolchain)
        raise _error(failed, keep(work, folder / f"{plan.ident}.failed"))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _made(library: Path, toolchain: Toolchain) -> bytes:
    """What was compiled; a command that compiles nothing ends without an error too."""
    try:
        return library.read_bytes()
    except FileNotFoundError:
        assert toolchain.cxx is not None
        command = shlex.join(toolchain.cxx.command)
        raise BuildFailed(
            f"{command} made no library, and no error",
            error="the compiler made no library, and no error",
            hint="Is it a C++ compiler? CXX names another.",
        ) from None


def keep(work: Path, kept: Path) -> Path:
    """Rename the folder of a failed build, over that of the one before, which another process may be doing too."""
    with locked(kept.parent, kept):
        replace_folder(work, kept)
    return kept


def _checked(library: bytes, toolchain: Toolchain) -> bytes:
    """A library that shares torch's C++ runtime, or is made to have its own: else the first error ends the process."""
    if not toolchain.own_runtime and not any(name in library for name in (b"libstdc++.so", b"libc++.so")):
        raise BuildFailed(
            "the C++ library was linked into the kernel",
            error="the C++ library was linked into the kernel",
            hint="Errors could not leave it. Is there a -static in cxx-flags or CXX? The compiler needs the shared libstdc++.",
        )
    return library


def _write(plan: Plan, work: Path) -> None:
    for path, data in plan.files.items():
        target = work / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def _run(toolchain: Toolchain, work: Path, jobs: int | None, steps: Steps | None) -> Failure | None:
    assert toolchain.ninja is not None
    command = [*toolchain.ninja, "-C", str(work), *(["-j", str(jobs)] if jobs else [])]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as ran:
        assert ran.stdout is not None
        try:
            for line in ran.stdout:
                lines.append(line.rstrip("\n"))
                if steps and (status := _STATUS.match(line)):
                    steps(int(status[1]), int(status[2]))
        except BaseException:
            ran.terminate()  # it ends its compilers; their folder is about to go
            raise
    if ran.returncode == 0:
        return None
    failure = read_failure(lines)
    return failure if failure.command else replace(failure, command=shlex.join(toolchain.ninja))  # no step was begun


def read_failure(lines: list[str]) -> Failure:
    """What ninja printed, read: the first step that failed, and the first error that its compiler names."""
    at = next((number for number, line in enumerate(lines) if line.startswith("FAILED:")), None)
    command = lines[at + 1] if at is not None and at + 1 < len(lines) else ""
    output = [line for line in lines[at + 2 if at is not None else 0 :] if not _STATUS.match(line)]
    text = next(_errors(output), None) or next((line for line in output if line.strip()), "the compiler said nothing")
    return Failure(text, command, "\n".join(output))


def _errors(output: Iterable[str]) -> Iterator[str]:
    """Errors in the order of their worth: where in a source, what a linker misses, what a compiler's driver says."""
    kept = list(output)
    for line in kept:
        if match := _COMPILER.match(line):
            where = match["where"].removeprefix("./")
            yield f"{where}:{match['line'] or match['nvcc']}: {match['text']}"
    for line in kept:
        if match := _LINKER.search(line):
            yield match[1]
    for line in kept:
        if match := _DRIVER.match(line):
            yield match[1]


def _error(failure: Failure, folder: Path) -> BuildFailed:
    hint = next((text for pattern, text in _HINTS if re.search(pattern, failure.text)), None) or next(
        (text for pattern, text in _HINTS if re.search(pattern, failure.log)), None
    )
    command = f"cd {shlex.quote(str(folder))} && {failure.command}"
    return BuildFailed(
        f"the kernel's sources do not compile\n    {failure.text}",
        error=failure.text,
        command=command,
        log=failure.log,
        in_source=any(map(_COMPILER.match, failure.log.splitlines())) and not _MISSING.search(failure.text),
        hint="\n  ".join(filter(None, (hint, f"To repeat it: {command}"))),
    )
