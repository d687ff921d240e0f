"""The facts about a machine that decide which builds run on it. `kernelhub.hub.probe` finds them out."""

from __future__ import annotations

from dataclasses import dataclass

from kernelhub.core.backends import BY_NAME, Backend, VersionPair
from kernelhub.errors import InvalidReference


@dataclass(frozen=True)
class Host:
    """A machine as the selection sees it.

    `backend` is what torch was built for (`cpu` where it was built for nothing else), `backend_version` the version of it.
    """

    python: VersionPair
    torch: VersionPair | None
    backend: str
    cpu: str
    os: str
    backend_version: VersionPair | None = None
    cxx_abi: str = "cxx11"
    tvm_ffi: VersionPair | None = None
    free_threaded: bool = False
    macos: int | None = None

    def choose_backend(self, name: str | None) -> Backend:
        """The backend to select for: the one asked for, or what torch was built for.

        Raises `InvalidReference` for a backend that this machine does not have, listing those it has.
        """
        supported = dict.fromkeys((self.backend, "cpu"))
        if name is None:
            return BY_NAME[self.backend]
        if name not in supported:
            known = name in BY_NAME
            raise InvalidReference(
                f"backend {name!r} is not supported on this machine" if known else f"{name!r} is not a backend",
                hint=f"Expected {' or '.join(repr(item) for item in supported)}: torch here was built for "
                f"{BY_NAME[self.backend].title}.",
            )
        return BY_NAME[name]

    def __str__(self) -> str:
        parts = [f"torch {_dotted(self.torch)}" if self.torch else "no torch"]
        version = f" {_dotted(self.backend_version)}" if self.backend_version else ""
        parts.append(BY_NAME[self.backend].title + version)
        parts.append(f"{self.cpu}-{self.os}")
        python = f"Python {_dotted(self.python)}"
        parts.append(f"{python} free-threaded" if self.free_threaded else python)
        return ", ".join(parts)


def _dotted(version: VersionPair) -> str:
    return f"{version[0]}.{version[1]}"
