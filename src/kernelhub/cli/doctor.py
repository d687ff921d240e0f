"""`kernelhub doctor`: this machine as the selection sees it, and what would keep a kernel from loading."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kernelhub.cli.options import Json
from kernelhub.cli.render import show_facts, show_json, size

if TYPE_CHECKING:
    from kernelhub.hub.sources.base import Source

COMPILERS = ("g++", "clang++", "nvcc", "hipcc", "ninja")


@dataclass(frozen=True)
class Finding:
    """One fact; `ok` is False where it keeps some kernel from loading, None where it only informs."""

    topic: str
    name: str
    value: str
    ok: bool | None = None


def doctor(as_json: Json = False) -> int:
    """Show this machine as kernels see it: torch, devices, compilers, hubs, store. Ends with 1 if something is in the way."""
    findings = [*_machine(), *_compilers(), *_hubs(), *_store(), *_variables(os.environ)]
    if as_json:
        show_json([asdict(finding) for finding in findings])
    else:
        marks = {True: "ok: ", False: "IN THE WAY: ", None: ""}
        for topic, items in groupby(findings, lambda finding: finding.topic):
            show_facts(topic, [(item.name, f"{marks[item.ok]}{item.value}") for item in items])
    return 1 if any(finding.ok is False for finding in findings) else 0


def _machine() -> list[Finding]:
    from kernelhub import __version__
    from kernelhub.core.backends import BY_NAME
    from kernelhub.core.metadata import KERNELS_LEVEL
    from kernelhub.hub.probe import detect_host, torch_versions, visible_archs

    host = detect_host()
    torch = torch_versions().get("__version__")
    found = [
        Finding(
            "machine", "kernelhub", f"{__version__} (level of the kernels package: {'.'.join(map(str, KERNELS_LEVEL))})"
        ),
        Finding("machine", "selection sees", str(host)),
        Finding("machine", "torch", torch or "not installed; pip install 'kernelhub[torch]'", bool(torch)),
    ]
    if host.free_threaded and host.python < (3, 15):
        found.append(Finding("machine", "python", "free-threaded: compiled kernels need Python 3.15 there", False))
    if host.backend != "cpu":
        archs = visible_archs(BY_NAME[host.backend])
        text = (
            ", ".join(f"{index}: {arch}" for index, arch in enumerate(archs))
            or f"torch is built for {host.backend}, and no device is visible"
        )
        found.append(Finding("machine", "devices", text))
    return found


def _compilers() -> list[Finding]:
    found = []
    if cxx := os.environ.get("CXX", "").strip():
        from kernelhub.build.toolchain import broken_cxx, find_toolchain

        chosen = find_toolchain(cxx, with_cuda=False)
        said = chosen.cxx.identity.splitlines()[0] if chosen.cxx else broken_cxx(chosen)
        found.append(Finding("compilers", "CXX", str(said), bool(chosen.cxx)))
    for name in COMPILERS:
        path = shutil.which(name)
        found.append(Finding("compilers", name, f"{_first_line(path)} ({path})" if path else "not found"))
    return found


def _first_line(path: str) -> str:
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    lines = (result.stdout or result.stderr).strip().splitlines()
    return lines[-1 if "nvcc" in path and lines else 0] if lines else "says nothing"


def _hubs() -> list[Finding]:
    """Ask each source for a kernel that it does not have: an answer, whichever, means that it is there."""
    from concurrent.futures import ThreadPoolExecutor

    from kernelhub.hub.client import Hub

    hub = Hub()
    sources = hub.sources()
    with ThreadPoolExecutor(max_workers=len(sources)) as pool:
        answers = list(pool.map(lambda source: _reach(source, hub.settings.offline), sources))
    return [Finding("hubs", source.name, text, ok) for source, (text, ok) in zip(sources, answers, strict=True)]


def _reach(source: Source, offline: bool) -> tuple[str, bool | None]:
    from kernelhub.core.refs import RepoId
    from kernelhub.core.trust import Origin
    from kernelhub.errors import KernelHubError, KernelNotFound

    if offline and source.origin is Origin.REMOTE:
        return "not asked: offline", None
    try:
        source.refs(RepoId("kernelhub-doctor", "asks"))
    except KernelNotFound:
        pass
    except KernelHubError as error:
        return str(error), False
    return f"answers ({source.origin.value})", True


def _variables(env: Mapping[str, str]) -> list[Finding]:
    """Variables that look like settings and are none: nobody else would say that they do nothing."""
    from kernelhub.settings import Settings

    asked = _Asked()
    Settings.from_env(asked)
    unknown = [name for name in sorted(env) if name.startswith("KERNELHUB_") and name not in asked.names]
    found = []
    for name in unknown:
        near = get_close_matches(name, sorted(asked.names), n=1, cutoff=0.8)
        found.append(Finding("variables", name, "is no setting" + (f"; is {near[0]} meant?" if near else "")))
    return found


class _Asked(dict[str, str]):
    """An empty environment that knows which variables it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def _store() -> list[Finding]:
    from kernelhub.hub.client import open_store

    root = open_store().root
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    writable = os.access(there, os.W_OK)
    return [
        Finding("store", "folder", f"{root}{'' if root.exists() else ' (not made yet)'}"),
        Finding("store", "writable", "yes" if writable else f"no: {there} cannot be written", writable),
        Finding("store", "free", size(shutil.disk_usage(there).free)),
    ]
