"""The addresses of hubs: what users call a place, and the store's folder for it.

Apart from the sources, because these are needed for every kernel that is here already, and what talks to hubs is not: it
takes 15 ms to import, three times a whole warm load.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from kernelhub.core.canonical import sha256_hex
from kernelhub.core.trust import Origin
from kernelhub.errors import InvalidReference
from kernelhub.settings import user_path

HUGGING_FACE = "https://huggingface.co"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://", re.ASCII)


@dataclass(frozen=True)
class Address:
    """A source's `name`, `key` and `origin`, as `sources.base.Source` has them.

    `claims`: it answers for commits of other hubs, which nothing but a digest in a lock can tell to be those.
    """

    name: str
    key: str
    origin: Origin
    claims: bool = False


# What was installed from bundles lies in a folder of this name in the store.
BUNDLES = "bundles"
BUNDLES_ADDRESS = Address("the installed bundles", BUNDLES, Origin.CACHE)
CLAIMED_ADDRESS = Address("the installed bundles", BUNDLES, Origin.CACHE, claims=True)


def hub_address(url: str) -> Address:
    """Of a hub at a path, `file://`, `https://`, `s3://`. Raises `InvalidReference` for what is no address."""
    name = shown(url)
    words = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[-48:].strip("-")
    origin = Origin.REMOTE if local_path(url) is None else Origin.FOLDER
    return Address(name, f"{words or 'hub'}-{sha256_hex(name.encode())[:12]}", origin)


def endpoint_address(endpoint: str) -> Address:
    """Of a server that speaks the Hugging Face Hub's protocol; no two of them share a folder in the store."""
    endpoint = endpoint.rstrip("/")
    parts = _split(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidReference(
            f"{endpoint!r} is not the address of a hub", hint="Expected such as https://huggingface.co."
        )
    if endpoint == HUGGING_FACE:
        return Address(endpoint, parts.hostname, Origin.REMOTE)
    host = re.sub(r"[^a-z0-9.-]", "_", parts.netloc.lower().rpartition("@")[2]).strip(".")
    return Address(endpoint, f"{host[:80]}-{sha256_hex(endpoint.encode())[:8]}", Origin.REMOTE)


def local_path(url: str) -> Path | None:
    """The folder that an address names; None where it is an address elsewhere."""
    scheme = _SCHEME.match(url)
    if not url.strip():
        raise InvalidReference("a hub's address is empty", hint="Expected a path, file://, https:// or s3://.")
    if scheme is None:
        return user_path(url)
    if scheme[1].lower() != "file":
        return None
    parts = _split(url)
    if parts.netloc not in ("", "localhost"):
        raise InvalidReference(f"{url!r} names the machine {parts.netloc!r}", hint="Expected file:///path.")
    from urllib.request import url2pathname  # 10 ms, for the rarest spelling of a folder

    return Path(url2pathname(unquote(parts.path) if os.name != "nt" else parts.path))


def _split(url: str) -> SplitResult:
    """The parts of a URL. Raises `InvalidReference` for what has none, also for a port that is no number of one."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - read only now
    except ValueError as error:
        shown = url.rpartition("@")[2]  # no credentials
        raise InvalidReference(f"{shown!r} is not the address of a hub: {error}") from error
    return parts


def shown(url: str) -> str:
    """The address as users are shown it and told apart by: a whole path, or a URL without credentials."""
    local = local_path(url)
    if local is not None:
        return str(local)
    parts = _split(url.rstrip("/"))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
