"""Every fault at every kind of request: the result is the kernel, verified, or one clear error, and the store is whole.

Nothing here waits for long: hubs are given up after a second. A fault that would hang is a test that fails.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
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
from kernelhub.hub.archive import pack
from kernelhub.hub.client import Hub
from kernelhub.hub.patience import Patience
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


# What only one protocol can lie about. Each lie is told each time, and may end in an error alone, unless it is no lie.


def of_each(change: Callable[[dict[str, Any]], Any]) -> faulty.Fault:
    """Change each row of a tree; a value that is returned stands for the row."""
    return lambda ask: ask.rewrite(lambda rows: [change(row) or row for row in rows])


def more(count: int, row: Callable[[int], dict[str, Any]]) -> faulty.Fault:
    return lambda ask: ask.rewrite(lambda rows: [*rows, *map(row, range(count))])


def named(name: str) -> faulty.Fault:
    """Give the first file of a tree another name."""
    return lambda ask: ask.rewrite(lambda rows: [{**rows[0], "path": name, "type": "file"}, *rows[1:]])


def branches(change: Callable[[dict[str, Any]], Any]) -> faulty.Fault:
    return lambda ask: ask.rewrite(lambda refs: {**refs, "branches": [change(row) or row for row in refs["branches"]]})


BUILD = "build/torch-universal"
LIES: dict[str, tuple[str, str, faulty.Fault, frozenset[str]]] = {
    "a commit that is none": ("hugging face", "refs", branches(lambda row: {**row, "targetCommit": "main"}), faulty.ERROR),
    "a commit that is a path": ("hugging face", "refs", branches(lambda row: {**row, "targetCommit": "../" * 13 + "a"}), faulty.ERROR),
    "a commit that is not there": ("hugging face", "refs", branches(lambda row: {**row, "targetCommit": "f" * 40}), faulty.ERROR),
    "branches that are paths": ("hugging face", "refs", branches(lambda row: {**row, "name": "../" + row["name"]}), faulty.ERROR),
    "a mark that is a word": ("hugging face", "publisher", lambda ask: ask.rewrite(lambda _: {"trustedKernelPublisher": "yes"}), faulty.ERROR),
    "10,000 other builds": (
        "hugging face", "builds", more(10_000, lambda n: {"type": "directory", "path": f"build/torch{n}-cu126", "oid": ""}), faulty.KERNEL),
    "10,000 builds that are paths": (
        "hugging face", "builds", more(10_000, lambda n: {"type": "directory", "path": f"build/../../{n}", "oid": ""}), faulty.EITHER),
    "10,000 files": (
        "hugging face", "tree", more(10_000, lambda n: {"type": "file", "path": f"{BUILD}/{n}.py", "oid": "0" * 40, "size": 9}), faulty.ERROR),
    "200,000 files": (
        "hugging face", "tree", more(200_000, lambda n: {"type": "file", "path": f"{BUILD}/{n}.py", "oid": "0" * 40, "size": 9}), faulty.ERROR),
    "a file of 10 GB": ("hugging face", "tree", of_each(lambda row: {**row, "size": 10 * faulty.GIGABYTE, "lfs": None}), faulty.ERROR),
    "files one byte longer": ("hugging face", "tree", of_each(lambda row: {**row, "size": row.get("size", 0) + 1}), faulty.ERROR),
    "files one byte shorter": ("hugging face", "tree", of_each(lambda row: {**row, "size": max(row.get("size", 0) - 1, 0)}), faulty.ERROR),
    "files of other hashes": ("hugging face", "tree", of_each(lambda row: {**row, "oid": "0" * 40, "lfs": None}), faulty.ERROR),
    "files without sizes": ("hugging face", "tree", of_each(lambda row: {**row, "size": None, "lfs": None}), faulty.ERROR),
    "files of negative sizes": ("hugging face", "tree", of_each(lambda row: {**row, "size": -1, "lfs": None}), faulty.ERROR),
    "no files": ("hugging face", "tree", lambda ask: ask.instead(b"[]"), faulty.ERROR),
    "a file above": ("hugging face", "tree", named(f"{BUILD}/../../../evil.py"), faulty.ERROR),
    "a file at the root": ("hugging face", "tree", named("/etc/evil"), faulty.ERROR),
    "a file elsewhere": ("hugging face", "tree", named("build/torch-cuda/__init__.py"), faulty.ERROR),
    "a file with a drive": ("hugging face", "tree", named(f"{BUILD}/C:evil.py"), faulty.ERROR),
    "a file without a name": ("hugging face", "tree", named(f"{BUILD}/"), faulty.ERROR),
    "a file with a NUL": ("hugging face", "tree", named(f"{BUILD}/a\0b.py"), faulty.ERROR),
    "bytecode": ("hugging face", "tree", named(f"{BUILD}/__pycache__/x.cpython-311.pyc"), faulty.ERROR),
    "a file twice": ("hugging face", "tree", lambda ask: ask.rewrite(lambda rows: [*rows, *rows]), faulty.ERROR),
    "pages without end": (
        "hugging face", "tree",
        lambda ask: ask.reply(200, {"link": f'<{ask.hub.url}{ask.target}>; rel="next"'}, ask.answer.body), faulty.ERROR),
    "a page elsewhere": (
        "hugging face", "tree",
        lambda ask: ask.reply(200, {"link": '<http://elsewhere.invalid/>; rel="next"'}, ask.answer.body), faulty.ERROR),
    "another ref": ("static", "ref", faulty.body(b"f" * 40), faulty.ERROR),
    "a ref that is a path": ("static", "ref", faulty.body(b"../" * 13 + b"a"), faulty.ERROR),
    "a withdrawn version": ("static", "ref", lambda ask: ask.instead(ask.answer.body.strip() + b"\nyanked: it is bad\n"), faulty.ERROR),
    "another repository's manifest": ("static", "manifest", lambda ask: ask.instead(ask.answer.body.replace(b"org/relu", b"org/nope")), faulty.ERROR),
    "another layout": ("static", "hub file", faulty.body(b'{"layout": 99}'), faulty.ERROR),
    "another archive": ("static", "archive", lambda ask: ask.instead(pack({"__init__.py": b"evil = True"})), faulty.ERROR),
    "an archive of 10 GB": ("static", "archive", faulty.endless, faulty.ERROR),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_found_out(places: dict[str, Place], tmp_path: Path, name: str) -> None:
    protocol, kind, fault, expected = LIES[name]
    place, before = places[protocol], sorted(tmp_path.parent.iterdir())
    found = run(place, kind, fault, tmp_path / "store", ["always"])
    assert found["always"].outcome in expected, str(found["always"])
    assert found["after always"] == Found("kernel"), f"{found['always']}, and then {found['after always']}"
    assert sorted(tmp_path.parent.iterdir()) == before, "nothing is written outside of the store"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
