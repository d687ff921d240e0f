"""Settings: the only place that reads the environment, and only when asked.

>>> Settings.from_env({"KERNELHUB_HUBS": "/srv/hub, https://kernels.example.org"}).hubs
('/srv/hub', 'https://kernels.example.org')
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelhub.core.refs import RepoId
from kernelhub.core.trust import TrustedIdentity, TrustedKey, TrustPolicy
from kernelhub.errors import InvalidReference, context

_TRUE = frozenset({"1", "on", "yes", "true"})
_FALSE = frozenset({"", "0", "off", "no", "false"})
_BUILDS = ("auto", "never", "always")
_NO_TELEMETRY = ("DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


@dataclass(frozen=True)
class Settings:
    """What the user configured; every field has the default of a machine with no environment variables set.

    `ref_ttl` (seconds) is how long a version's commit is believed without asking the hub again. `cache` None is the
    platform's cache folder. `trust`, `trusted_keys`, `trusted_identities` and `require_signature` are what may run:
    `core/trust.py`; `sigstore_root` is the root of trust of a Sigstore that is not the public one. `cxx` and `cuda_home`
    are the C++ compiler and the CUDA toolkit that kernels are built with; None looks for them. `ranks_timeout` (seconds) is how long the processes of torch.distributed wait for each other.
    """

    hubs: tuple[str, ...] = ()
    cache: Path | None = None
    offline: bool = False
    ref_ttl: float = 3600.0
    verify_always: bool = False
    build: str = "auto"
    trust: tuple[str, ...] = ()
    trusted_keys: tuple[TrustedKey, ...] = ()
    trusted_identities: tuple[TrustedIdentity, ...] = ()
    require_signature: bool = False
    sigstore_root: Path | None = None
    local_kernels: tuple[tuple[str, Path], ...] = ()
    mapping_disabled: bool = False
    cxx: str | None = None
    cuda_home: Path | None = None
    hf_endpoint: str = "https://huggingface.co"
    telemetry: bool = True
    source_date_epoch: int | None = None
    ranks_timeout: float = 600.0

    def __post_init__(self) -> None:
        """Paths may be given as text. Raises `InvalidReference` for what would be taken for something else."""
        for name in ("cache", "sigstore_root", "cuda_home"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Path):
                object.__setattr__(self, name, user_path(value, f"Settings.{name}"))
        for name in ("hubs", "trust"):
            if isinstance(getattr(self, name), str):
                raise InvalidReference(f"Settings.{name} is {getattr(self, name)!r}", hint="Expected a tuple of texts.")
        if self.build not in _BUILDS:
            raise InvalidReference(f"Settings.build is {self.build!r}", hint=f"Expected one of {', '.join(_BUILDS)}.")

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the environment. Raises `InvalidReference`, which names the variable and shows its value."""
        env = os.environ if env is None else env
        cache = env.get("KERNELS_CACHE") or env.get("KERNELHUB_CACHE")
        root = env.get("KERNELHUB_SIGSTORE_ROOT")
        project = _project(env)
        cuda = env.get("CUDA_HOME") or env.get("CUDA_PATH")
        return cls(
            hubs=_listed(env.get("KERNELHUB_HUBS", "")),
            cache=user_path(cache, "KERNELS_CACHE" if env.get("KERNELS_CACHE") else "KERNELHUB_CACHE")
            if cache
            else None,
            offline=_flag(env, "KERNELHUB_OFFLINE") or _foreign_flag(env, "HF_HUB_OFFLINE"),
            ref_ttl=_seconds(env, "KERNELHUB_REF_TTL", cls.ref_ttl),
            verify_always=_choice(env, "KERNELHUB_VERIFY", ("auto", "always")) == "always",
            build=_choice(env, "KERNELHUB_BUILD", _BUILDS),
            trust=(*_trust(env), *project.trust),
            trusted_keys=(
                *_keys(_listed(env.get("KERNELHUB_TRUSTED_KEYS", "")), "KERNELHUB_TRUSTED_KEYS"),
                *project.keys,
            ),
            trusted_identities=(
                *_identities(_listed(env.get("KERNELHUB_TRUSTED_IDENTITIES", "")), "KERNELHUB_TRUSTED_IDENTITIES"),
                *project.identities,
            ),
            require_signature=_flag(env, "KERNELHUB_REQUIRE_SIGNATURE") or project.require_signature,
            sigstore_root=user_path(root, "KERNELHUB_SIGSTORE_ROOT") if root else None,
            local_kernels=_local_kernels(env.get("LOCAL_KERNELS", "")),
            mapping_disabled=_flag(env, "DISABLE_KERNEL_MAPPING"),
            cxx=env.get("CXX", "").strip() or None,
            cuda_home=user_path(cuda, "CUDA_HOME" if env.get("CUDA_HOME") else "CUDA_PATH") if cuda else None,
            hf_endpoint=(env.get("HF_ENDPOINT") or cls.hf_endpoint).rstrip("/"),
            telemetry=not any(_foreign_flag(env, name) for name in _NO_TELEMETRY),
            source_date_epoch=_epoch(env),
            ranks_timeout=_seconds(env, "KERNELHUB_RANKS_TIMEOUT", cls.ranks_timeout),
        )

    @property
    def cache_folder(self) -> Path:
        """Where the local store lies."""
        if self.cache is not None:
            return self.cache
        from platformdirs import user_cache_path  # here: the folder is known without it in most deployments

        return user_cache_path("kernelhub")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(item for item in (part.strip() for part in text.split(",")) if item)


def _flag(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "").strip().lower()
    if value in _TRUE or value in _FALSE:
        return value in _TRUE
    raise InvalidReference(
        f"{name}={env[name]!r} is neither on nor off", hint="Expected 1, on, yes, true, or 0, off, no, false."
    )


def _foreign_flag(env: Mapping[str, str], name: str) -> bool:
    """A variable that other packages read too: what they take for off is no reason to stop here."""
    return env.get(name, "").strip().lower() in _TRUE


def _epoch(env: Mapping[str, str]) -> int | None:
    text = env.get("SOURCE_DATE_EPOCH", "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise InvalidReference(
            f"SOURCE_DATE_EPOCH={text!r} is no time", hint="Expected a whole number of seconds since 1970."
        )
    return int(text)


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InvalidReference(f"{name}={text!r} is not a number of seconds", hint="Expected such as 3600.")
    return value


def _choice(env: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = env.get(name, "").strip().lower() or choices[0]
    if value not in choices:
        raise InvalidReference(f"{name}={env[name]!r}", hint=f"Expected one of {', '.join(choices)}.")
    return value


def _trust(env: Mapping[str, str]) -> tuple[str, ...]:
    patterns = _listed(env.get("KERNELHUB_TRUST", ""))
    with context("KERNELHUB_TRUST"):
        TrustPolicy.of(patterns)
    return patterns


def _keys(texts: Sequence[str], where: str, folder: Path | None = None) -> tuple[TrustedKey, ...]:
    """Trusted keys: each a key's text or the path of a file with one key a line, after `<pattern>=` perhaps."""
    if not texts:
        return ()
    from kernelhub.core.signatures import ALGORITHM

    found: list[TrustedKey] = []
    with context(where):
        for text in texts:
            pattern, equals, path = text.rpartition("=") if f"{ALGORITHM}:" not in text else ("", "", "")
            keys = [text] if not path else [f"{pattern}{equals}{key}" for key in _key_file(path.strip(), folder)]
            found += [TrustedKey.parse(key) for key in keys]
    return tuple(found)


def _read_text(path: Path) -> str:
    """A file's text. Raises `OSError`, also for what is no file: a device may have no end, and a pipe no beginning."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file")
    return path.read_text(encoding="utf-8")


def _key_file(text: str, folder: Path | None) -> list[str]:
    """The keys in a file: the first word of each line that is not empty and does not begin with `#`."""
    path = user_path(text if folder is None or text.startswith("~") else folder / text)
    try:
        lines = [line.split() for line in _read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidReference(
            f"{text!r:.200} is neither a key nor a file with keys: {reason}",
            hint='Expected "ed25519:...", or the path of the .pub file that `kernelhub keygen` makes.',
        ) from error
    keys = [words[0] for words in lines if words and not words[0].startswith("#")]
    if not keys:
        raise InvalidReference(f"{path} has no keys")
    return keys


def _identities(texts: Sequence[str], where: str) -> tuple[TrustedIdentity, ...]:
    with context(where):
        return tuple(TrustedIdentity.parse(text) for text in texts)


@dataclass(frozen=True)
class _Project:
    """What a project's file says of trust."""

    trust: tuple[str, ...] = ()
    keys: tuple[TrustedKey, ...] = ()
    identities: tuple[TrustedIdentity, ...] = ()
    require_signature: bool = False


def _project(env: Mapping[str, str]) -> _Project:
    """The `[tool.kernelhub]` of the pyproject.toml that `KERNELHUB_PROJECT` names; without it, of none.

    The file in the current folder is not taken unasked: it may be one that somebody else wrote, and it says what runs.
    """
    text = env.get("KERNELHUB_PROJECT", "").strip()
    if not text:
        return _Project()
    path = user_path(text, "KERNELHUB_PROJECT")
    path = path / "pyproject.toml" if path.is_dir() else path
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    with context(f"KERNELHUB_PROJECT: {path}"):
        try:
            raw = tomllib.loads(_read_text(path))
        except OSError as error:
            raise InvalidReference(f"cannot read it: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise InvalidReference(f"it is not TOML: {error}") from error
        table = raw.get("tool", {}).get("kernelhub", {}) if isinstance(raw.get("tool", {}), dict) else None
        if not isinstance(table, dict):
            raise InvalidReference("tool.kernelhub is not a table")
        return _project_table(table, path.parent)


def _project_table(table: Mapping[str, Any], folder: Path) -> _Project:
    known = ("trust", "trusted_keys", "trusted_identities", "require_signature", "dependencies")
    if unknown := sorted(table.keys() - set(known)):
        raise InvalidReference(f"[tool.kernelhub] has {', '.join(unknown)}", hint=f"It may have {', '.join(known)}.")
    require = table.get("require_signature", False)
    if not isinstance(require, bool):
        raise InvalidReference(f"require_signature must be true or false, got {require!r}")
    texts = {name: _texts(table, name) for name in known[:3]}
    with context("trust"):
        TrustPolicy.of(texts["trust"])
    return _Project(
        texts["trust"],
        _keys(texts["trusted_keys"], "trusted_keys", folder),
        _identities(texts["trusted_identities"], "trusted_identities"),
        require,
    )


def _texts(table: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = table.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidReference(f"{name} must be a list of texts, got {value!r:.200}")
    return tuple(value)


def _local_kernels(text: str) -> tuple[tuple[str, Path], ...]:
    """`org/name=path` entries, separated as `PATH` is. A malformed one, or a path that is not there, is an error."""
    found: list[tuple[str, Path]] = []
    for entry in filter(None, (part.strip() for part in text.split(os.pathsep))):
        name, equals, path_text = entry.partition("=")
        try:
            repo = RepoId.parse(name.strip())
        except InvalidReference:
            repo = None
        if not equals or repo is None or not path_text.strip():
            raise InvalidReference(
                f"LOCAL_KERNELS: {entry!r} is malformed",
                hint=f'Expected "org/name=path", several separated by {os.pathsep!r}.',
            )
        path = user_path(path_text.strip(), f"LOCAL_KERNELS: {entry!r}")
        if not path.is_dir():
            raise InvalidReference(f"LOCAL_KERNELS: {entry!r}: {path} is not a folder")
        found.append((str(repo), path))
    return tuple(found)


def user_path(written: str | os.PathLike[str], where: str = "") -> Path:
    """A path that the user wrote, `~` and all. Absolute: a later change of the working directory does not move it."""
    label = f"{where}: " if where else ""
    try:
        return Path(written).expanduser().absolute()
    except TypeError:
        raise InvalidReference(f"{label}{written!r} is not a path", hint="Expected text or a pathlib.Path.") from None
    except RuntimeError as error:  # "~name" of nobody's
        raise InvalidReference(f"{label}{str(written)!r}: {error}", hint="Write the path without `~`.") from error
