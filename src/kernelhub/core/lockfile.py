"""`kernels.lock`: which commit and which bytes of each kernel a project uses.

Written in one format, read in three: this one, and the two of the `kernels` package (a list of
`{repo_id, sha, variants}`, and a list of `{dependency, lock: {commit}}`).

>>> dependencies_of({"tool": {"kernelhub": {"dependencies": {"org/relu": 1}}}})
(KernelRef(repo=RepoId(org='org', name='relu'), pin=Version(number=1), layer=None),)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernelhub.core.canonical import canonical_json
from kernelhub.core.refs import KernelRef, Pin, RepoId, Revision, Version, is_commit, parse_pin
from kernelhub.errors import InvalidMetadata, InvalidReference, KernelNotFound, context

LAYOUT = 1

# The file's name, beside pyproject.toml and in a package's metadata.
NAME = "kernels.lock"

# How `Digest.text` begins; locks of another package name other hashes, as `<type>:<hash>`.
DIGEST = "sha256-"

# Room for some thousand kernels; what is larger is no lock.
MAX_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class LockedKernel:
    """A kernel in a lock: its commit, and for each variant the digest that it must have.

    `variants` maps a variant's name to `Digest.text` (or to the hash text of another package's lock). `hub` is where it
    came from; None where the file does not say. `version` or `revision` is what was asked for, where the file says;
    `asked` is the name that it was asked for by, where the repository had moved to `repo`.
    """

    repo: RepoId
    commit: str
    version: Version | None = None
    hub: str | None = None
    variants: Mapping[str, str] = field(default_factory=dict, hash=False)
    depends: tuple[RepoId, ...] = ()
    revision: str | None = None
    asked: RepoId | None = None

    @property
    def pin(self) -> Pin | None:
        """What was asked for; None where the file does not say."""
        return self.version or (Revision(self.revision) if self.revision else None)

    @property
    def ref(self) -> KernelRef:
        """The reference that names this very commit."""
        return KernelRef(self.repo, Revision(self.commit))

    def answers(self, pin: Pin) -> bool:
        """Whether this is what `pin` asks for."""
        return self.pin == pin or pin == Revision(self.commit)

    def __str__(self) -> str:
        return f"{self.asked or self.repo}" + (f"@{self.pin}" if self.pin else "")


@dataclass(frozen=True)
class LockFile:
    """All kernels of a project, dependencies included."""

    kernels: tuple[LockedKernel, ...] = ()

    def find(self, repo: RepoId, pin: Pin | None = None) -> LockedKernel:
        """The entry of a kernel; with several, that of `pin`. An entry that does not say what it was asked for by is
        what any pin asks for, where it is the only one.

        Raises `KernelNotFound`, which names those that there are, and `InvalidReference` where several would do.
        """
        there = [kernel for kernel in self.kernels if repo in (kernel.asked or kernel.repo, kernel.repo)]
        fits = [kernel for kernel in there if pin is None or kernel.answers(pin)]
        if not fits and len(there) == 1 and there[0].pin is None and not (isinstance(pin, Revision) and pin.commit):
            fits = there
        if len({kernel.commit for kernel in fits}) > 1:
            raise InvalidReference(
                f"the lock file has {' and '.join(map(str, fits))}",
                hint=f'Say which, such as "{fits[0]}".',
            )
        if fits:
            return fits[0]
        names = ", ".join(map(str, there or self.kernels)) or "none"
        wanted = f"{repo}@{pin}" if pin else str(repo)
        raise KernelNotFound(f"{wanted} is not in the lock file (there: {names})", hint="Add it with `kernelhub lock`.")

    def check_covers(self, wanted: Sequence[KernelRef]) -> None:
        """Raises `KernelNotFound` for a dependency of a project that is not locked, or at another version."""
        for ref in wanted:
            self.find(ref.repo, ref.pin)

    @classmethod
    def parse(cls, data: bytes | str) -> LockFile:
        """Read a lock file of any of the three formats. Raises `InvalidMetadata`."""
        if len(data) > MAX_BYTES:
            raise InvalidMetadata(f"the lock file has {len(data):,} bytes; the most is {MAX_BYTES:,}")
        try:
            raw = json.loads(data)
            canonical_json(raw)  # refuses NaN and lone surrogates, which Python reads and JSON does not have
        except (ValueError, RecursionError) as error:
            raise InvalidMetadata(
                f"the lock file is not JSON: {error}", hint="Where it cannot be mended, delete it and lock again."
            ) from error
        try:
            return cls(tuple(_kernel(item) for item in _entries(raw)))
        except KeyError as error:
            raise InvalidMetadata(f"the lock file is malformed: an entry has no {error}") from error
        except InvalidReference as error:
            raise InvalidMetadata(f"the lock file is malformed: {error.message}") from error

    def to_text(self) -> str:
        """The file's text, sorted: the same kernels always give the same bytes."""
        kernels = [_to_json(kernel) for kernel in sorted(self.kernels, key=_by_name)]
        return json.dumps({"lock": LAYOUT, "kernels": kernels}, indent=2, ensure_ascii=False) + "\n"


def _entries(raw: Any) -> list[Any]:
    if isinstance(raw, list):
        return raw
    if not isinstance(raw, dict) or raw.get("lock") != LAYOUT:
        found = raw.get("lock") if isinstance(raw, dict) else type(raw).__name__
        raise InvalidMetadata(f'the lock file is malformed: expected a list or {{"lock": {LAYOUT}}}, got {found!r}')
    kernels = raw["kernels"]
    if not isinstance(kernels, list):
        raise InvalidMetadata("the lock file is malformed: kernels is not a list")
    return kernels


def _kernel(item: Any) -> LockedKernel:
    item = _object(item, "a kernel")
    if "repo" in item:
        hub, depends = item.get("hub"), item.get("depends") or []
        if not isinstance(depends, list):
            raise InvalidMetadata(f"the lock file is malformed: depends: expected a list, got {depends!r}")
        return LockedKernel(
            _repo(item["repo"]),
            _commit(item["commit"]),
            _version(item.get("version")),
            None if hub is None else _string(hub, "a hub"),
            {name: _string(value["digest"], "a digest") for name, value in _objects(item.get("variants"))},
            tuple(map(_repo, depends)),
            _revision(item.get("revision")),
            None if item.get("asked") is None else _repo(item["asked"]),
        )
    if "repo_id" in item:
        variants = {
            name: f"{_string(value['hash_type'], 'a type of hash')}:{_string(value['hash'], 'a hash')}"
            for name, value in _objects(item["variants"])
        }
        return LockedKernel(_repo(item["repo_id"]), _commit(item["sha"]), variants=variants)
    dependency, lock = _object(item["dependency"], "a dependency"), _object(item["lock"], "a lock")
    repo = dependency["repo_id" if "repo_id" in dependency else "repo-id"]
    return LockedKernel(
        _repo(repo),
        _commit(lock["commit"]),
        _version(dependency.get("version")),
        revision=_revision(dependency.get("revision")),
    )


def dependencies_of(pyproject: Mapping[str, Any]) -> tuple[KernelRef, ...]:
    """The kernels that a project's `[tool.kernelhub.dependencies]` names, or else `[tool.kernels.dependencies]`.

    Each is `"org/name" = 1`, a version, or `"org/name" = "main"`, a revision. Raises `InvalidReference`.
    """
    tool = pyproject.get("tool", {})
    for name in ("kernelhub", "kernels"):
        section = tool.get(name, {}) if isinstance(tool, dict) else None
        table = section.get("dependencies") if isinstance(section, dict) else None
        if table is None:
            continue
        with context(f"[tool.{name}.dependencies]"):
            if not isinstance(table, dict):
                raise InvalidReference("it is not a table", hint='Expected lines such as "org/name" = 1.')
            return tuple(_dependency(repo, value) for repo, value in sorted(table.items()))
    return ()


def changes(before: LockFile, after: LockFile) -> list[str]:
    """What is different in a lock, a line for each kernel; empty where nothing is.

    Which hub a kernel came from is no difference: the same folder may lie elsewhere on another machine.
    """
    old, new = ({(str(kernel), kernel.repo): kernel for kernel in lock.kernels} for lock in (before, after))
    lines = []
    for key in sorted(old.keys() | new.keys(), key=str):
        one, other = old.get(key), new.get(key)
        if one is None or other is None:
            lines.append(f"{key[0]} is not needed any more" if other is None else f"{key[0]} is new")
        elif one.commit != other.commit:
            lines.append(f"{key[0]} was {one.commit}, and is {other.commit}")
        elif one != other:
            fields = [name for name in ("variants", "depends") if getattr(one, name) != getattr(other, name)]
            lines += [f"{key[0]} has other {' and '.join(fields)}"] if fields else []
    return lines


def _dependency(repo: str, value: Any) -> KernelRef:
    if isinstance(value, int) and not isinstance(value, bool):
        return KernelRef(RepoId.parse(repo), Version.parse(f"v{value}"))
    if isinstance(value, str):
        return KernelRef(RepoId.parse(repo), parse_pin(value))
    raise InvalidReference(f"{repo}: {value!r:.100} is neither a version nor a revision", hint=f'Such as "{repo}" = 1.')


def _by_name(kernel: LockedKernel) -> tuple[RepoId, int, str, str]:
    return kernel.repo, kernel.version.number if kernel.version else -1, kernel.revision or "", kernel.commit


def _to_json(kernel: LockedKernel) -> dict[str, Any]:
    more = {"revision": kernel.revision, "asked": kernel.asked and str(kernel.asked)}
    return {
        "repo": str(kernel.repo),
        "hub": kernel.hub,
        "version": kernel.version.number if kernel.version else None,
        **{key: value for key, value in more.items() if value is not None},
        "commit": kernel.commit,
        "variants": {name: {"digest": digest} for name, digest in sorted(kernel.variants.items())},
        "depends": [str(repo) for repo in sorted(kernel.depends)],
    }


def _commit(value: Any) -> str:
    if not isinstance(value, str) or not is_commit(value):
        raise InvalidMetadata(f"the lock file is malformed: {value!r} is not a commit (40 hex digits)")
    return value


def _version(value: Any) -> Version | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidMetadata(f"the lock file is malformed: {value!r} is not a version (a whole number)")
    return Version.parse(f"v{value}")


def _revision(value: Any) -> str | None:
    return None if value is None else Revision.parse(_string(value, "a revision")).ref


def _repo(value: Any) -> RepoId:
    return RepoId.parse(_string(value, "a repository"))


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidMetadata(f"the lock file is malformed: {value!r} is not {what}")
    return value


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidMetadata(f"the lock file is malformed: {value!r} is not {what} (an object)")
    return value


def _objects(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """The variants of an entry, by name; none where it has none."""
    entries = {} if value is None else _object(value, "a table of variants")
    return [(name, _object(entry, "a variant")) for name, entry in entries.items()]
