"""Names of kernels: `"org/name@v1:Layer"` and the value it stands for.

>>> KernelRef.parse("kernels-community/relu@v1")
KernelRef(repo=RepoId(org='kernels-community', name='relu'), pin=Version(number=1), layer=None)
>>> str(KernelRef.parse("kernels-community/relu@main:ReLU"))
'kernels-community/relu@main:ReLU'
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kernelhub.errors import InvalidReference

# One path segment of a repository's name, up to 96 characters as on the Hugging Face Hub. Names become folders in the
# store, so what is special to a file system is out: a leading or trailing dot or hyphen, "..", and "--", which stands
# between organisation and name there.
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_]|-(?!-)|\.(?!\.)){0,95}(?<![.-])", re.ASCII)
_VERSION = re.compile(r"v(0|[1-9][0-9]{0,8})", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_+/-]|\.(?!\.)){0,199}", re.ASCII)


@dataclass(frozen=True, order=True)
class RepoId:
    """A repository: `org/name`."""

    org: str
    name: str

    @classmethod
    def parse(cls, text: str) -> RepoId:
        org, slash, name = text.partition("/") if isinstance(text, str) else ("", "", "")
        if not (slash and _SEGMENT.fullmatch(org) and _SEGMENT.fullmatch(name)):
            raise InvalidReference(
                f"{text!r} does not name a kernel repository",
                hint='Expected "org/name" (letters, digits, "_", single "-" and "."), such as "kernels-community/relu".',
            )
        return cls(org, name)

    def __str__(self) -> str:
        return f"{self.org}/{self.name}"


@dataclass(frozen=True, order=True)
class Version:
    """A major version of a kernel: the branch `v<N>`. Within a version the API never breaks."""

    number: int

    @classmethod
    def parse(cls, text: str) -> Version:
        match = _VERSION.fullmatch(text)
        if not match:
            raise InvalidReference(f"{text!r} is not a version", hint='Expected "v" and a whole number, such as "v1".')
        return cls(int(match[1]))

    @property
    def ref(self) -> str:
        """The branch that holds it."""
        return str(self)

    def __str__(self) -> str:
        return f"v{self.number}"


@dataclass(frozen=True, order=True)
class Revision:
    """A branch, a tag or a commit."""

    ref: str

    @classmethod
    def parse(cls, text: str) -> Revision:
        if not is_revision(text):
            raise InvalidReference(
                f"{text!r} is not a revision", hint="Expected the name of a branch, a tag or a commit."
            )
        return cls(text)

    @property
    def commit(self) -> str | None:
        """The commit, where this names one by all of its 40 hex digits."""
        return self.ref if is_commit(self.ref) else None

    def __str__(self) -> str:
        return self.ref


Pin = Version | Revision


def is_revision(text: str) -> bool:
    """Whether `text` may be the name of a branch, a tag or a commit."""
    return (
        isinstance(text, str)
        and bool(_REVISION.fullmatch(text))
        and not text.endswith(("/", ".", ".lock"))
        and "//" not in text
        and "/." not in text
    )


def is_commit(text: str) -> bool:
    """Whether `text` is a commit's full name: 40 hex digits."""
    return bool(_COMMIT.fullmatch(text))


def parse_pin(text: str) -> Pin:
    """`"v1"` is a version, anything else a revision."""
    return Version.parse(text) if _VERSION.fullmatch(text) else Revision.parse(text)


def version_of(pin: Pin | None) -> int | None:
    """The number of the version that a pin names, as a version or by its branch; None where it names none."""
    named = parse_pin(str(pin)) if pin is not None else None
    return named.number if isinstance(named, Version) else None


@dataclass(frozen=True)
class KernelRef:
    """A kernel, perhaps at a version or revision, perhaps one layer of it."""

    repo: RepoId
    pin: Pin | None = None
    layer: str | None = None

    @classmethod
    def parse(cls, text: str) -> KernelRef:
        """Read `org/name[@pin][:Layer]`. Raises `InvalidReference`, which says what was expected."""
        if not isinstance(text, str):
            raise InvalidReference(f"{text!r} does not name a kernel", hint='Expected text such as "org/name@v1".')
        rest, colon, layer = text.partition(":")
        name, at, pin = rest.partition("@")
        if colon and not layer.isidentifier():
            raise InvalidReference(
                f"{text!r}: {layer!r} is not the name of a layer",
                hint='Expected "org/name:Layer" or "org/name@v1:Layer".',
            )
        return cls(RepoId.parse(name), parse_pin(pin) if at else None, layer if colon else None)

    @classmethod
    def of(cls, repo_id: str, *, version: int | None = None, revision: str | None = None) -> KernelRef:
        """What the arguments of `get_kernel` name: exactly one pin, in the name or beside it."""
        ref = cls.parse(repo_id)
        if ref.layer is not None:
            raise InvalidReference(
                f"{repo_id!r} names a layer; here a kernel is wanted", hint=f'Use "{replace(ref, layer=None)}".'
            )
        pins = [pin for pin in (ref.pin, _version(version), revision and Revision.parse(revision)) if pin]
        if len(pins) != 1:
            got = "none" if not pins else " and ".join(str(pin) for pin in pins)
            raise InvalidReference(
                f"{ref.repo} needs exactly one of version and revision, got {got}",
                hint=f'Such as get_kernel("{ref.repo}", version=1) or "{ref.repo}@v1". `kernelhub versions {ref.repo}` '
                "lists what there is.",
            )
        return replace(ref, pin=pins[0])

    def __str__(self) -> str:
        pin = f"@{self.pin}" if self.pin else ""
        return f"{self.repo}{pin}" + (f":{self.layer}" if self.layer else "")


def _version(number: int | None) -> Version | None:
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int):
        raise InvalidReference(f"version must be a whole number, got {number!r}", hint="Such as version=1.")
    return Version.parse(f"v{number}")
