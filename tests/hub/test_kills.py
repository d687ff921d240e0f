"""Clients that are killed, many at once, and disks that refuse: the store is whole, and nothing leaks.

A client is killed at one of the things that it asks of the system (a file opened, made, renamed or removed, a connection), so
that the points are all there are, and the same in each run. KERNELHUB_TEST_KILLS is how many of them are tried (20);
`make faults` tries 200.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_hub as faulty
import pytest
from layout_fixtures import EPOCH, REPO, agent, repository
from loopback_hub import write_kernel
from test_faults import ACME, files_in

from kernelhub.core.refs import KernelRef, Version
from kernelhub.errors import KernelHubError, StoreError
from kernelhub.hub.client import Hub
from kernelhub.hub.publish import publish
from kernelhub.hub.server import app
from kernelhub.hub.sources.huggingface import HuggingFaceSource
from kernelhub.hub.sources.layout import LayoutSource
from kernelhub.hub.store import RefRecord, Store
from kernelhub.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the signals and limits of Linux")

KILLS = int(os.environ.get("KERNELHUB_TEST_KILLS", "20"))
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "socket.connect"}
REF = {ACME: KernelRef(ACME, Version(1)), REPO: KernelRef(REPO, Version(1))}
PROTOCOLS = {"hugging face": ACME, "static": REPO}

# Forked: importing all of it again takes seconds.
FORK = multiprocessing.get_context("fork")


def client(protocol: str, url: str, cache: Path) -> Hub:
    source: Any = LayoutSource(url, agent)
    if protocol == "hugging face":
        source = HuggingFaceSource(url, agent, lambda: None)
    return Hub(Settings(cache=cache), sources=[source])


def install(protocol: str, url: str, cache: Path) -> Path:
    return client(protocol, url, cache).install(REF[PROTOCOLS[protocol]], trust_remote_code=True)


def one(protocol: str, url: str, cache: Path, out: Path, die_at: int = 0, start: Any = None, limit: int = -1) -> None:
    """One client, in a process of its own: what came of it goes to `out`."""
    count = 0

    def watch(event: str, args: Any) -> None:
        nonlocal count
        if event in EVENTS and (event != "open" or str(cache) in str(args[0])):
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if limit >= 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if start is not None:
        start.wait(60)
    sys.addaudithook(watch)
    try:
        said = ["kernel", str(install(protocol, url, cache))]
    except KernelHubError as error:
        said = [type(error).__name__, str(error)]
    if limit >= 0:
        os.write(int(str(out)), json.dumps([*said, count]).encode())
    else:
        out.write_text(json.dumps([*said, count]))


def run(*args: Any, **more: Any) -> int | None:
    process = FORK.Process(target=one, args=args, kwargs=more, daemon=True)
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[faulty.FaultyHub, dict[str, bytes]]]]:
    """A hub of each protocol, and the files that come from it."""
    root = tmp_path_factory.mktemp("hubs")
    write_kernel(root / "kernels", files={"data/table.txt": b"0123456789abcdef" * 8192, "more/a.py": b"a = 1\n"})
    publish(repository(root / "relu", files=3), str(root / "hub"), REPO, epoch=EPOCH)
    truths = {"hugging face": faulty.answers_of(app(root / "kernels")), "static": faulty.files_of(root / "hub")}
    with faulty.serving(truths["hugging face"]) as one, faulty.serving(truths["static"]) as other:
        found = {"hugging face": one, "static": other}
        yield {name: (hub, files_in(install(name, hub.url, root / f"cache-{name}"))) for name, hub in found.items()}


def left_in(cache: Path) -> set[str]:
    """The names of all that is in the store, but locks, which stay."""
    names = (path.relative_to(cache) for path in cache.rglob("*") if path.is_file())
    return {str(name) for name in names if name.parts[0] != "locks"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_that_is_killed_leaves_a_store_that_is_whole(hubs: Any, tmp_path: Path, protocol: str) -> None:
    hub, files = hubs[protocol]
    assert run(protocol, hub.url, tmp_path / "whole", tmp_path / "out") == 0
    outcome, _, events = json.loads((tmp_path / "out").read_text())
    assert outcome == "kernel"
    assert events > 20
    expected = left_in(tmp_path / "whole")
    points = random.Random(8).sample(range(1, events + 1), min(KILLS // 2, events))
    for point in points:
        cache = tmp_path / str(point)
        assert run(protocol, hub.url, cache, tmp_path / "out", point) == -signal.SIGKILL
        store = Store(cache)
        assert [error for _, error in store.verify_all() if error] == [], f"killed at {point} of {events}"
        # Somebody else comes: no lock is held, nothing half-written is taken for whole.
        assert files_in(install(protocol, hub.url, cache)) == files, f"killed at {point} of {events}"
        list(store.prune(lambda repo: False))
        assert left_in(cache) == expected, f"killed at {point} of {events}"


def test_small_files_that_were_being_written_are_pruned_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    store = Store(tmp_path / "cache")
    writes = [
        lambda: store.set_checked("hub", 1.0),
        lambda: store.set_ref("hub", REPO, "v1", RefRecord("a" * 40, 1.0)),
        lambda: store.set_listing("hub", REPO, "a" * 40, {}),
        lambda: store.set_revocations_seen("hub", "a" * 32, 1, 1.0),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        for write in writes:
            with pytest.raises(KeyboardInterrupt):
                write()
    assert len(left_in(store.root)) == len(writes)
    assert len(list(store.prune(lambda repo: False))) == len(writes)
    assert left_in(store.root) == set()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_many_processes_on_an_empty_store_download_once(hubs: Any, tmp_path: Path, protocol: str) -> None:
    hub, files = hubs[protocol]
    start, before = FORK.Barrier(32), len(hub.targets)
    outs = [tmp_path / f"out{number}" for number in range(32)]
    processes = [
        FORK.Process(target=one, args=(protocol, hub.url, tmp_path / "cache", out, 0, start), daemon=True)
        for out in outs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        process.kill()
    found = [json.loads(out.read_text()) for out in outs]
    assert {outcome for outcome, *_ in found} == {"kernel"}, [said for outcome, said, _ in found if outcome != "kernel"]
    assert {said for _, said, _ in found} == {str(next(iter({Path(said) for _, said, _ in found})))}
    assert files_in(Path(found[0][1])) == files
    bodies = [target for target in hub.targets[before:] if "/blobs/" in target or "/resolve/" in target]
    assert len(bodies) == len(set(bodies)) > 0, "each body was asked for once"


@pytest.mark.parametrize("limit", [0, 1, 100, 600, 70_000])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_disk_that_is_full_is_the_stores_error(hubs: Any, tmp_path: Path, protocol: str, limit: int) -> None:
    """No file may become larger than the limit, as if the disk ended there."""
    hub, files = hubs[protocol]
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            one(protocol, hub.url, tmp_path / "cache", Path(str(write)), limit=limit)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    outcome, said, _ = json.loads(text)
    fits = protocol == "static" and limit >= 600
    assert outcome == "StoreError" or (outcome == "kernel" and fits), said
    store = Store(tmp_path / "cache")
    assert [error for _, error in store.verify_all() if error] == []
    assert not [path for path in (tmp_path / "cache").rglob(".*.tmp") if path.is_dir()]
    assert files_in(install(protocol, hub.url, tmp_path / "cache")) == files


# Stores on odd file systems, and of other users


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_files_cannot_be_locked_kernels_still_arrive_whole(
    hubs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    hub, files = hubs["static"]
    found: list[Any] = []

    def get() -> None:
        try:
            found.append(files_in(install("static", hub.url, tmp_path / "cache")))
        except KernelHubError as error:
            found.append(error)

    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [files] * 4
    assert not [path for path in (tmp_path / "cache").rglob(".*") if path.suffix != ".lock"]


def test_two_that_are_as_fast_without_locks_are_both_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hubs: Any
) -> None:
    """The slower one finds the folder there when it renames its own."""
    hub, files = hubs["static"]
    rename = Path.rename

    def slower(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp" and not target.exists():
            monkeypatch.setattr(Path, "rename", rename)
            monkeypatch.setattr("filelock.FileLock.acquire", lambda *_: None)
            install("static", hub.url, tmp_path / "cache")
        return rename(self, target)

    import fcntl

    monkeypatch.setattr(fcntl, "flock", _no_locks)
    monkeypatch.setattr(Path, "rename", slower)
    assert files_in(install("static", hub.url, tmp_path / "cache")) == files
    assert not list((tmp_path / "cache").rglob(".*.tmp"))


def _no_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("where", ["", "kernels", "variant"])
def test_a_store_of_somebody_else_where_all_may_write_is_refused(
    hubs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    hub, files = hubs["static"]
    folder = install("static", hub.url, tmp_path / "cache")
    place = folder if where == "variant" else tmp_path / "cache" / where
    mode = place.stat().st_mode
    place.chmod(0o777)
    assert files_in(install("static", hub.url, tmp_path / "cache")) == files, "one's own folder is one's own matter"
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
    with pytest.raises(StoreError, match="everybody may write to it") as caught:
        install("static", hub.url, tmp_path / "cache")
    assert str(place) in str(caught.value)
    place.chmod(0o755)
    assert files_in(install("static", hub.url, tmp_path / "cache")) == files, "an administrator's store is read"
    place.chmod(mode)
