"""Every fault at every kind of request: the result is the kernel, verified, or one clear error, and the store is whole.

Nothing here waits for long: hubs are given up after a second. A fault that would hang is a test that fails.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faulty_hub as faulty
import pytest
from layout_fixtures import EPOCH, REPO, agent, repository
from loopback_hub import write_kernel

from kernelhub.core.refs import KernelRef, RepoId, Version
from kernelhub.errors import KernelHubError
from kernelhub.hub.client import Hub
from kernelhub.hub.http import Patience
from kernelhub.hub.publish import publish
from kernelhub.hub.remote import open_remote
from kernelhub.hub.server import app
from kernelhub.hub.sources.base import Source
from kernelhub.hub.sources.huggingface import HuggingFaceSource
from kernelhub.hub.sources.layout import LayoutSource
from kernelhub.settings import Settings

ALL = os.environ.get("KERNELHUB_TEST_FAULTS") == "all"
PATIENCE = Patience(connect=1.0, read=0.5, total=1.2, attempts=3, backoff=0.01)
ACME = RepoId("acme", "relu")
BIG = {"data/table.txt": b"0123456789abcdef" * 8192}  # larger than what one read brings

# Kinds of requests, by what is in their targets.
HUGGING_FACE = {
    "refs": "/refs$",
    "publisher": "/overview$",
    "builds": r"/build\?",
    "tree": "/build%2F",
    "file": "/resolve/.*__init__",
    "big file": "/resolve/.*table",
}
STATIC = {"hub file": r"hub\.json$", "ref": "/refs/", "manifest": "/commits/", "archive": "/blobs/"}
KINDS = [*(("hugging face", kind) for kind in HUGGING_FACE), *(("static", kind) for kind in STATIC)]


@dataclass(frozen=True)
class Place:
    """A hub on one protocol: what is true there, what is asked for, and the files that should come."""

    truth: faulty.Truth
    repo: RepoId
    files: dict[str, bytes]

    def source(self, url: str) -> Source:
        if self.repo == ACME:
            return HuggingFaceSource(url, agent, lambda: None, PATIENCE)
        source = LayoutSource(url, agent)
        source.__dict__["files"] = open_remote(url, agent, PATIENCE)
        return source

    def where(self, kind: str) -> str:
        return (HUGGING_FACE if self.repo == ACME else STATIC)[kind]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    root = tmp_path_factory.mktemp("hubs")
    there = write_kernel(root / "kernels", files=BIG)
    here = repository(root / "relu", files=3)
    publish(here, str(root / "hub"), REPO, epoch=EPOCH)
    published = Hub(Settings(cache=root / "cache"), sources=[LayoutSource(str(root / "hub"), agent)])
    arrived = files_in(published.install(KernelRef(REPO, Version(1))))  # with the digest that publishing adds
    assert arrived.keys() == files_in(here / "build" / "torch-cpu").keys()
    return {
        "hugging face": Place(faulty.answers_of(app(root / "kernels", trusted=True)), ACME, files_in(there)),
        "static": Place(faulty.files_of(root / "hub"), REPO, arrived),
    }


@dataclass
class Found:
    """What came of one fetch: `kernel`, `error`, or what should not be."""

    outcome: str
    said: str = ""


def fetch(place: Place, url: str, cache: Path) -> Found:
    """Fetch the kernel as a new process would, and look at the store afterwards."""
    hub = Hub(Settings(cache=cache), sources=[place.source(url)])
    trust: Any = place.repo == REPO  # on the other protocol the hub is asked
    ref = KernelRef(place.repo, Version(1))
    try:
        folder = hub.install(ref, trust_remote_code=trust)
        found = Found("kernel") if files_in(folder) == place.files else Found("altered", str(files_in(folder).keys()))
    except KernelHubError as error:
        found = Found("error", str(error))
        if not all(char.isprintable() or char == "\n" for char in found.said) or len(found.said) > 4000:
            found = Found("an unclear error", found.said)
    except BaseException as error:
        found = Found(f"{type(error).__name__} out of the client", str(error))
    broken = [str(error) for _, error in hub.store.verify_all() if error]
    left = [str(path.relative_to(cache)) for path in cache.rglob(".*")]
    return Found("a broken store", str([*broken, *left])) if broken or left else found


def watched(place: Place, url: str, cache: Path) -> Found:
    """What `fetch` finds, if it ends."""
    found: list[Found] = []
    thread = threading.Thread(target=lambda: found.append(fetch(place, url, cache)), daemon=True)
    thread.start()
    thread.join(30)
    return found[0] if found else Found("a hang")


def run(place: Place, kind: str, fault: faulty.Fault, cache: Path, often: Sequence[str]) -> dict[str, Found]:
    """The fault once, and each time; and after each, whether the store is as good as new."""
    found = {}
    with faulty.serving(place.truth) as hub:
        for name in often:
            times = 1 if name == "once" else None
            hub.break_with(place.where(kind), fault, times)
            found[name] = watched(place, hub.url, cache / name)
            hub.heal()
            found[f"after {name}"] = watched(place, hub.url, cache / name)
    return found


Results = dict[tuple[str, str, str], dict[str, Found]]


@pytest.fixture(scope="module")
def results(places: dict[str, Place], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All of them, several at once: most of the time passes with waiting.

    Each is tried once or always, in turn; KERNELHUB_TEST_FAULTS=all (`make faults`) tries both.
    """
    root = tmp_path_factory.mktemp("stores")
    cases = [(protocol, kind, name) for protocol, kind in KINDS for name in faulty.FAULTS]

    def one(number: int) -> dict[str, Found]:
        protocol, kind, name = cases[number]
        turn = (KINDS.index((protocol, kind)) + list(faulty.FAULTS).index(name)) % 2
        often = ("once", "always") if ALL else (("once", "always")[turn],)
        return run(places[protocol], kind, faulty.FAULTS[name][0], root / str(number), often)

    with warnings.catch_warnings(), ThreadPoolExecutor(12) as pool:
        warnings.simplefilter("ignore")
        return dict(zip(cases, pool.map(one, range(len(cases))), strict=True))


@pytest.mark.parametrize("name", faulty.FAULTS)
@pytest.mark.parametrize(("protocol", "kind"), KINDS)
def test_a_fault_ends_in_the_kernel_or_in_one_clear_error(
    results: Results, protocol: str, kind: str, name: str
) -> None:
    found = results[protocol, kind, name]
    expected = dict(zip(("once", "always"), faulty.FAULTS[name][1:], strict=True))
    for often in ("once", "always"):
        if often in found:
            assert found[often].outcome in expected[often], f"{often}: {found[often]}"
            assert found[f"after {often}"] == Found("kernel"), f"{found[often]}, and then {found[f'after {often}']}"
