"""Every error kernelhub raises: what happened as data, the text drawn from it, and what to do about it.

Each error is a `KernelHubError` and also the builtin that users of similar packages already catch. A leaf states the
fact; whoever knows more adds it with `add_context`, and the last line says what to do (`hint`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = [
    "BuildFailed",
    "CompatibilityWarning",
    "HubUnavailable",
    "IncompatibleDevice",
    "IntegrityError",
    "InvalidMetadata",
    "InvalidReference",
    "KernelCycle",
    "KernelHubError",
    "KernelHubWarning",
    "KernelImportError",
    "KernelNotFound",
    "LayerContractError",
    "MissingDependency",
    "NoCompatibleVariant",
    "NoKernelForLayer",
    "PublishConflict",
    "RankFailed",
    "RanksDisagree",
    "RepositoryNotFound",
    "StoreError",
    "UntrustedKernel",
    "Violation",
    "Yanked",
    "context",
]


class KernelHubWarning(UserWarning):
    """Something that a user should know and that stops nothing."""


class CompatibilityWarning(KernelHubWarning):
    """A kernel is used in a way that works here and may not elsewhere."""


class KernelHubError(Exception):
    """The base of all errors of this package.

    `message` states the fact, `hint` what to do, `contexts` what was being done, outermost first. `exit_code` is what
    the command line ends with: 1 the answer is no, 2 wrong use, 3 the hub, 4 integrity or trust.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.contexts: tuple[str, ...] = ()

    def add_context(self, text: str) -> None:
        """Say what was being done when this happened; the same text twice is kept once."""
        if text not in self.contexts:
            self.contexts = (text, *self.contexts)

    def __str__(self) -> str:
        text = ": ".join((*self.contexts, self.message))
        return printable(f"{text}\n  {self.hint}" if self.hint else text)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def printable(text: str) -> str:
    """The text with what would steer a terminal written out: names, reasons and licences come from hubs.

    >>> print(printable("as it was\\x1b[2J"))
    as it was\\x1b[2J
    """
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def _rebuild(cls: type[KernelHubError], args: tuple[Any, ...], state: dict[str, Any]) -> KernelHubError:
    """Make a pickled error again, past its own constructor, whose arguments are in its attributes.

    The builtin's constructor is called: it keeps what users of that builtin read (`args`, `ImportError.msg`).
    """
    error = cls.__new__(cls)
    super(KernelHubError, error).__init__(*args)
    error.__dict__.update(state)
    return error


@contextmanager
def context(text: str) -> Iterator[None]:
    """Add what is being done to every `KernelHubError` raised inside."""
    try:
        yield
    except KernelHubError as error:
        error.add_context(text)
        raise


class InvalidReference(KernelHubError, ValueError):
    """A name, version, revision, backend or setting that cannot be what it should be."""

    exit_code = 2


class InvalidMetadata(KernelHubError, ValueError):
    """A metadata.json, manifest, lock file or listing that is missing or malformed."""

    exit_code = 4


class KernelNotFound(KernelHubError, FileNotFoundError):
    """No hub has the repository, or it does not have the version or revision."""


class RepositoryNotFound(KernelNotFound):
    """This source does not have the repository: the next one is asked."""


class Yanked(KernelNotFound):
    """The version was withdrawn: nobody new gets it. Who has `commit` locked may go on, with a warning."""

    def __init__(self, message: str, *, commit: str, reason: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.commit, self.reason = commit, reason


class NoCompatibleVariant(KernelHubError, FileNotFoundError):
    """The repository has no build that runs on this machine; `rejected` has each one with the reason."""

    def __init__(self, ref: str, machine: str, rejected: Sequence[tuple[str, str]]) -> None:
        width = max((len(name) for name, _ in rejected), default=0)
        lines = [f"{ref} has no build that runs here ({machine})"]
        lines += [f"    {name.ljust(width)}  {reason}" for name, reason in rejected]
        if not rejected:
            lines.append("    it has no builds at all")
        super().__init__("\n".join(lines), hint="`kernelhub doctor` shows this machine as the selection sees it.")
        self.ref, self.machine, self.rejected = ref, machine, tuple(rejected)


class UntrustedKernel(KernelHubError, ValueError):
    """The kernel's code may not run: nobody whom the user trusts has published it."""

    exit_code = 4


@dataclass(frozen=True)
class Violation:
    """One file that is not what it should be: `missing`, `unknown`, `different` or `bytecode`."""

    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.path}"


class IntegrityError(KernelHubError, ValueError):
    """Bytes are not what was published; `violations` names each file."""

    exit_code = 4

    def __init__(self, message: str, violations: Sequence[Violation] = (), *, hint: str | None = None) -> None:
        shown = [f"    {violation}" for violation in violations[:20]]
        if len(violations) > len(shown):
            shown.append(f"    and {len(violations) - len(shown)} more")
        super().__init__("\n".join([message, *shown]), hint=hint)
        self.violations = tuple(violations)


class MissingDependency(KernelHubError, ImportError):
    """The kernel needs a Python package that is not installed; the hint is the command that installs it."""

    def __init__(self, message: str, *, packages: Sequence[str]) -> None:
        super().__init__(message, hint=f"pip install {' '.join(packages)}")
        self.packages = tuple(packages)


class KernelImportError(KernelHubError, ImportError):
    """The kernel's own code raised while it was imported; the cause is that error."""


class IncompatibleDevice(KernelHubError, RuntimeError):
    """The build does not cover the architecture of the device that it would run on."""


class BuildFailed(KernelHubError, RuntimeError):
    """A kernel's sources did not compile. `error` is the first thing the compiler said, `command` repeats it.

    `in_source` says that the compiler named a line: the same sources fail again, where a killed compiler might not, nor one
    that missed a file.
    """

    def __init__(
        self,
        message: str,
        *,
        error: str,
        command: str = "",
        log: str = "",
        in_source: bool = False,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.error, self.command, self.log, self.in_source = error, command, log, in_source


class HubUnavailable(KernelHubError, OSError):
    """A hub did not answer, or not with what its protocol says; `hub`, `request` and `status` say which."""

    exit_code = 3

    def __init__(
        self, message: str, *, hub: str, request: str = "", status: int | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.hub, self.request, self.status = hub, request, status


class StoreError(KernelHubError, OSError):
    """The local store, or a file that was asked for, cannot be written or read: a full disk, a folder that is read-only."""


class PublishConflict(KernelHubError, RuntimeError):
    """Somebody else published to the same ref in the meantime; `winner` is their commit."""

    def __init__(self, message: str, *, winner: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.winner = winner


class KernelCycle(KernelHubError, RuntimeError):
    """Kernels that depend on each other in a circle; `path` names them."""

    def __init__(self, path: Sequence[str]) -> None:
        super().__init__(f"kernels depend on each other in a circle: {' -> '.join(path)}")
        self.path = tuple(path)


class LayerContractError(KernelHubError, TypeError):
    """A layer kernel cannot stand in for the forward; `problems` names each difference."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *(f"    {problem}" for problem in problems)]))
        self.problems = tuple(problems)


class NoKernelForLayer(KernelHubError, ValueError):
    """A layer that was to be kernelized has no kernel, and `use_fallback` does not let it keep its forward."""


class RankFailed(KernelHubError, RuntimeError):
    """Processes that decide together could not: `failed` maps each rank that failed, or did not come, to the reason."""

    def __init__(self, message: str, failed: Mapping[int, str], *, hint: str | None = None) -> None:
        lines = [f"    rank {rank}: {reason}" for rank, reason in sorted(failed.items())]
        super().__init__("\n".join([message, *lines]), hint=hint)
        self.failed = dict(failed)


class RanksDisagree(KernelHubError, RuntimeError):
    """Processes that decide together were asked for different things; `differences` names ranks and layers."""

    def __init__(self, message: str, differences: Sequence[str], *, hint: str | None = None) -> None:
        shown = [f"    {difference}" for difference in differences[:20]]
        if len(differences) > len(shown):
            shown.append(f"    and {len(differences) - len(shown)} more")
        super().__init__("\n".join([message, *shown]), hint=hint)
        self.differences = tuple(differences)
