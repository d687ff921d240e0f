"""The user agent of requests to a remote hub: all the telemetry there is.

Switched off (`DISABLE_TELEMETRY`, `HF_HUB_DISABLE_TELEMETRY`, `DO_NOT_TRACK`) it is `kernelhub/<version>` alone.
Folders and the embedded hub are sent nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping

from kernelhub import __version__
from kernelhub.errors import InvalidReference
from kernelhub.hub.probe import detect_host, torch_versions

UserAgent = str | Mapping[str, str] | None


def user_agent(*, enabled: bool, caller: UserAgent = None) -> str:
    """The header's text: `kernelhub/0.1.0; python/3.11.7; torch/2.13.0; ...`, and the caller's own at the end.

    Raises `InvalidReference` for a caller's text that cannot stand in a header.
    """
    own = f"kernelhub/{__version__}"
    if not enabled:
        return own
    host = detect_host()
    libc, glibc = platform.libc_ver()
    facts = {
        "python": platform.python_version(),
        "torch": torch_versions().get("__version__", ""),
        "backend": host.backend + (".".join(map(str, host.backend_version)) if host.backend_version else ""),
        "platform": f"{host.os}-{host.cpu}",
        "glibc": glibc if libc == "glibc" else "",
    }
    parts = [own, *(f"{name}/{value}" for name, value in facts.items() if value), *_caller(caller)]
    return "; ".join(parts)


def _caller(caller: UserAgent) -> list[str]:
    if not caller:
        return []
    parts = [caller] if isinstance(caller, str) else [f"{name}/{value}" for name, value in caller.items()]
    for part in parts:
        if not part.isascii() or not part.isprintable():
            raise InvalidReference(
                f"user_agent: {part!r} cannot stand in a header", hint="Expected printable ASCII, without line breaks."
            )
    return parts
