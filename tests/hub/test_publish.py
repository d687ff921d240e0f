from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard
from layout_fixtures import EPOCH, REPO, Bucket, agent, metadata, repository, s3_bucket, serving, write

from kernelhub.core.canonical import sha256_hex
from kernelhub.core.digest import Digest
from kernelhub.core.manifest import LayerInfo, RefFile
from kernelhub.core.metadata import Metadata
from kernelhub.core.refs import RepoId, Revision, Version
from kernelhub.errors import (
    HubUnavailable,
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelHubError,
    KernelNotFound,
    PublishConflict,
    Violation,
)
from kernelhub.hub import publish as publishing
from kernelhub.hub.archive import pack_tar, read
from kernelhub.hub.declared import declared_layers
from kernelhub.hub.files import LocalFiles, WritableFiles
from kernelhub.hub.publish import Published, publish, yank
from kernelhub.hub.signing import generate
from kernelhub.hub.sources.base import NoProgress
from kernelhub.hub.sources.layout import LayoutSource, blob_path

V1 = Version(1)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with s3_bucket(monkeypatch) as found:
        yield found


@pytest.fixture(params=["folder", "s3"])
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "hub") if request.param == "folder" else request.getfixturevalue("bucket").url


def text_of(hub: str, commit: str, folder: Path) -> str:
    """A published commit, read whole and verified: the text that its repository was made with."""
    found = LayoutSource(hub, agent)
    details = found.listing(REPO, commit).variants["torch-cpu"]
    folder.mkdir()
    found.fetch(REPO, commit, "torch-cpu", details, folder, NoProgress())
    digest = Metadata.parse((folder / "metadata.json").read_bytes()).digest
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert digest is not None
    assert digest.violations(Digest.of(contents).files) == []
    return (folder / "__init__.py").read_text().split("'")[1]


def chain(hub: str, ref: str = "v1") -> list[str]:
    """The commits from the ref back to the first."""
    found = LayoutSource(hub, agent)
    commits: list[str] = []
    at: str | None = found.ref(REPO, ref).commit
    while at is not None:
        commits.append(at)
        at = found.manifest(REPO, at).parent
    return commits


def again(folder: Path, text: str) -> Path:
    (folder / "build/torch-cpu/__init__.py").write_text(f"TEXT = {text!r}\n")
    return folder


def test_what_is_published_is_read(hub: str, tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo", variants=("torch-cpu", "torch-cuda"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    published = publish(folder, hub, REPO, epoch=EPOCH)
    assert (published.ref, published.changed) == ("v1", True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    found = LayoutSource(hub, agent)
    found.check()
    manifest = found.manifest(REPO, found.resolve(REPO, V1))
    assert manifest.commit == published.commit
    assert (manifest.version, manifest.parent, manifest.time) == (1, None, "2025-11-21T20:00:00Z")
    assert list(manifest.variants) == ["torch-cpu", "torch-cuda"]
    assert manifest.variants["torch-cpu"].layers == {"Relu": LayerInfo(True, True, "(self, x)")}
    assert manifest.card == sha256_hex(b"# relu\n")
    assert manifest.source is None
    assert text_of(hub, published.commit, tmp_path / "out") == "one"
    publishing_files = publishing.open_files(hub, agent)
    assert publishing_files.read(blob_path(manifest.card), 100) == b"# relu\n"
    benchmarks = publishing_files.read(blob_path(manifest.benchmarks or ""), 10_000)
    assert read(benchmarks or b"") == {"benchmark.py": b"pass\n"}


def test_the_same_again_changes_nothing(hub: str, tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    first = publish(folder, hub, REPO, epoch=EPOCH)
    assert publish(folder, hub, REPO, epoch=EPOCH + 99) == dataclasses.replace(first, changed=False)
    assert chain(hub) == [first.commit]
    second = publish(again(folder, "two"), hub, REPO, epoch=EPOCH)
    third = publish(again(folder, "one"), hub, REPO, epoch=EPOCH)
    assert second.changed
    assert third.changed
    assert chain(hub) == [third.commit, second.commit, first.commit]
    for commit, text in ((first.commit, "one"), (second.commit, "two"), (third.commit, "one")):
        assert text_of(hub, commit, tmp_path / commit) == text


@pytest.mark.parametrize(
    "change",
    [
        {"CARD.md": b"# other\n"},
        {"benchmarks/benchmark.py": b"1\n"},
        {"build.toml": b"[general]\n"},
        {"build/torch-cuda/__init__.py": b"", "build/torch-cuda/metadata.json": metadata()},
        {"build/torch-cpu/metadata.json": metadata(license="MIT")},
    ],
)
def test_every_part_counts(change: dict[str, bytes], tmp_path: Path) -> None:
    hub, folder = str(tmp_path / "hub"), repository(tmp_path / "repo")
    publish(folder, hub, REPO, epoch=EPOCH)
    assert publish(write(folder, change), hub, REPO, epoch=EPOCH).changed


def test_another_compression_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, folder = str(tmp_path / "hub"), repository(tmp_path / "repo")
    first = publish(folder, hub, REPO, epoch=EPOCH)
    monkeypatch.setattr(publishing, "pack", lambda files: zstandard.compress(pack_tar(files), 1))
    assert publish(folder, hub, REPO, epoch=EPOCH) == dataclasses.replace(first, changed=False)
    assert publish(again(folder, "two"), hub, REPO, epoch=EPOCH).changed


def test_equal_folders_give_equal_commits(tmp_path: Path) -> None:
    commits = set()
    for name in ("a", "b"):
        folder = repository(tmp_path / name, files=5)
        os.utime(folder / "build/torch-cpu/__init__.py", (len(name), 5))
        (folder / "build/torch-cpu/__init__.py").chmod(0o700 if name == "a" else 0o644)
        commits.add(publish(folder, str(tmp_path / f"hub-{name}"), REPO, epoch=EPOCH).commit)
    assert len(commits) == 1


def test_refs_are_apart(hub: str, tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    first = publish(folder, hub, REPO, epoch=EPOCH)
    other = publish(again(folder, "two"), hub, REPO, epoch=EPOCH, ref="topic/new")
    assert chain(hub) == [first.commit]
    assert chain(hub, "topic/new") == [other.commit]
    found = LayoutSource(hub, agent)
    assert found.refs(REPO) == {"v1": first.commit, "topic/new": other.commit}
    assert found.resolve(REPO, Revision("topic/new")) == other.commit


@pytest.mark.parametrize("ref", ["../x", "a" * 40, "", ".hidden", "a//b", "a b"])
def test_a_ref_that_is_none_is_refused(ref: str, tmp_path: Path) -> None:
    with pytest.raises(KernelHubError):
        publish(repository(tmp_path / "repo"), str(tmp_path / "hub"), REPO, epoch=EPOCH, ref=ref or " ")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("epoch", [-1, 10**15])
def test_a_time_that_is_none_is_refused(epoch: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidReference, match="seconds since 1970"):
        publish(repository(tmp_path / "repo"), str(tmp_path / "hub"), REPO, epoch=epoch)


# Races


def test_a_publisher_that_is_killed_after_its_claim_is_helped(hub: str, tmp_path: Path, monkeypatch: Any) -> None:
    folder = repository(tmp_path / "repo")
    first = publish(folder, hub, REPO, epoch=EPOCH)

    class Killed(BaseException):
        pass

    def die(*args: Any) -> None:
        raise Killed

    for text in ("two", "three"):
        with monkeypatch.context() as patch:
            # nothing after the claim: neither the manifest nor the ref
            real = publishing._Chain.claim
            patch.setattr(publishing._Chain, "claim", lambda self, document: (real(self, document), die()))  # noqa: B023
            with pytest.raises(Killed):
                publish(again(folder, text), hub, REPO, epoch=EPOCH)
    # "three" was published by one that first had to finish "two", and the ref shows it
    killed = LayoutSource(hub, agent).resolve(REPO, V1)
    assert text_of(hub, killed, tmp_path / "out2") == "two"
    last = publish(again(folder, "four"), hub, REPO, epoch=EPOCH)
    texts = [text_of(hub, commit, tmp_path / commit) for commit in chain(hub)]
    assert texts == ["four", "three", "two", "one"]
    assert chain(hub)[0] == last.commit
    assert chain(hub)[-1] == first.commit


def test_a_publisher_that_was_killed_may_publish_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, folder = str(tmp_path / "hub"), repository(tmp_path / "repo")

    def die(self: Any, path: str, data: bytes) -> None:
        raise HubUnavailable("gone", hub=hub)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "replace", die)
        with pytest.raises(HubUnavailable):
            publish(folder, hub, REPO, epoch=EPOCH)
    published = publish(folder, hub, REPO, epoch=EPOCH + 1)
    assert not published.changed
    assert chain(hub) == [published.commit]
    assert LayoutSource(hub, agent).manifest(REPO, published.commit).time == "2025-11-21T20:00:00Z"


class Before:
    """Files that let something happen before a write."""

    def __init__(self, files: WritableFiles, path: str, event: Any) -> None:
        self._files, self._path, self._event = files, path, event

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def _happen(self, path: str) -> None:
        if path.endswith(self._path) and self._event:
            event, self._event = self._event, None
            event()

    def create(self, path: str, data: bytes) -> bool:
        self._happen(path)
        return self._files.create(path, data)

    def replace(self, path: str, data: bytes) -> None:
        self._happen(path)
        self._files.replace(path, data)


def while_writing(monkeypatch: pytest.MonkeyPatch, path: str, event: Any) -> None:
    """Let `event` happen before the next publisher writes `path`; publishers in `event` are not held up."""
    real = publishing._writable
    waiting = [event]
    monkeypatch.setattr(
        publishing, "_writable", lambda url: Before(real(url), path, waiting.pop()) if waiting else real(url)
    )


def test_who_loses_is_told_who_won(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    winners: list[Published] = []
    other = repository(tmp_path / "other", text="other")
    while_writing(monkeypatch, "null.next.v1", lambda: winners.append(publish(other, hub, REPO, epoch=EPOCH)))
    with pytest.raises(PublishConflict, match="somebody else published") as caught:
        publish(repository(tmp_path / "mine", text="mine"), hub, REPO, epoch=EPOCH)
    assert caught.value.winner == winners[0].commit
    assert chain(hub) == [winners[0].commit]
    assert publish(tmp_path / "mine", hub, REPO, epoch=EPOCH).changed
    assert chain(hub)[1] == winners[0].commit


def test_who_loses_finishes_the_winners_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, other = str(tmp_path / "hub"), repository(tmp_path / "other", text="other")

    def claimed_and_killed() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(publishing._Chain, "settle", lambda self, known=None: None)
            publish(other, hub, REPO, epoch=EPOCH)

    while_writing(monkeypatch, "null.next.v1", claimed_and_killed)
    with pytest.raises(PublishConflict) as caught:
        publish(repository(tmp_path / "mine", text="mine"), hub, REPO, epoch=EPOCH)
    assert chain(hub) == [caught.value.winner]
    assert text_of(hub, caught.value.winner, tmp_path / "out") == "other"


def test_two_who_publish_the_same_both_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, folder = str(tmp_path / "hub"), repository(tmp_path / "repo")
    while_writing(monkeypatch, "null.next.v1", lambda: publish(folder, hub, REPO, epoch=EPOCH + 5))
    published = publish(folder, hub, REPO, epoch=EPOCH)
    assert not published.changed
    assert chain(hub) == [published.commit]


def test_a_slow_writer_does_not_leave_the_ref_behind(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a publisher's claim and its ref two others publish: its late write is followed by a look ahead."""
    folder = repository(tmp_path / "repo")
    other = repository(tmp_path / "other", text="two")

    def two_more() -> None:
        publish(other, hub, REPO, epoch=EPOCH)
        publish(again(other, "three"), hub, REPO, epoch=EPOCH)

    while_writing(monkeypatch, "refs/v1", two_more)
    publish(folder, hub, REPO, epoch=EPOCH)
    assert [text_of(hub, commit, tmp_path / commit) for commit in chain(hub)] == ["three", "two", "one"]


def _publish_one(number: int, folder: str, hub: str, barrier: Any) -> tuple[int, str, str]:
    barrier.wait(60)
    try:
        return number, "done", publish(Path(folder), hub, REPO, epoch=EPOCH).commit
    except PublishConflict as conflict:
        return number, "lost", conflict.winner


PUBLISHER = """
import sys
from pathlib import Path
from kernelhub.core.refs import RepoId
from kernelhub.errors import PublishConflict
from kernelhub.hub.publish import publish
folder, hub, epoch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
try:
    print("done", publish(folder, hub, RepoId("org", "relu"), epoch=epoch).commit)
except PublishConflict as conflict:
    print("lost", conflict.winner)
"""


def _check_race(hub: str, answers: list[tuple[int, str, str]], tmp_path: Path) -> None:
    """Each was told the truth, what was published is whole, and nothing is lost."""
    assert sorted(number for number, _, _ in answers) == list(range(10))
    commits = chain(hub)
    texts = {commit: text_of(hub, commit, tmp_path / f"out-{commit}") for commit in commits}
    done = {commit: number for number, outcome, commit in answers if outcome == "done"}
    assert {texts[commit]: number for commit, number in done.items()} == {f"text {n}": n for n in done.values()}
    assert set(done) == set(commits), "a publish that succeeded is in the chain, and nothing else is"
    assert {winner for _, outcome, winner in answers if outcome == "lost"} <= set(commits)


def test_ten_processes_publish_at_once(tmp_path: Path) -> None:
    hub, processes = str(tmp_path / "hub"), []
    for number in range(10):
        folder = repository(tmp_path / str(number), text=f"text {number}")
        command = [sys.executable, "-c", PUBLISHER, str(folder), hub, str(EPOCH)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=60)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    _check_race(hub, [(number, outcome, commit) for number, (outcome, commit) in enumerate(said)], tmp_path)
    assert not list((tmp_path / "hub").rglob("*.tmp"))


def test_ten_threads_publish_to_a_bucket_at_once(bucket: Bucket, tmp_path: Path) -> None:
    barrier = threading.Barrier(10)
    folders = [repository(tmp_path / str(number), text=f"text {number}") for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        jobs = [
            pool.submit(_publish_one, number, str(folder), bucket.url, barrier) for number, folder in enumerate(folders)
        ]
        _check_race(bucket.url, [job.result(120) for job in jobs], tmp_path)


def test_exclusive_creation(hub: str) -> None:
    """Of those who create a file at once one does, and its contents stay."""
    files = publishing._writable(hub)
    barrier = threading.Barrier(8)

    def create(number: int) -> bool:
        barrier.wait(60)
        return files.create("org/x", str(number).encode())

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(8)))
    assert created.count(True) == 1
    assert files.read("org/x", 10) == str(created.index(True)).encode()
    assert files.create("org/x", b"more") is False
    files.replace("org/x", b"new")
    assert files.read("org/x", 10) == b"new"


# What is refused


def broken(tmp_path: Path, files: dict[str, bytes]) -> Path:
    return write(repository(tmp_path / "repo"), {f"build/torch-cpu/{name}": data for name, data in files.items()})


def nothing_published(tmp_path: Path, folder: Path, error: type[KernelHubError], match: str) -> KernelHubError:
    with pytest.raises(error, match=match) as caught:
        publish(folder, str(tmp_path / "hub"), REPO, epoch=EPOCH)
    assert not (tmp_path / "hub").exists()
    return caught.value


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"{", "torch-cpu: metadata.json is not JSON"),
        (b"\xff\xfe", "torch-cpu: metadata.json is not UTF-8"),
        (metadata(name=""), "torch-cpu: metadata.json: name"),
        (metadata(digest={"algorithm": "md5", "files": {}}), "digest"),
    ],
)
def test_metadata_must_parse(data: bytes, match: str, tmp_path: Path) -> None:
    nothing_published(tmp_path, broken(tmp_path, {"metadata.json": data}), InvalidMetadata, match)


@pytest.mark.parametrize("name", ["metadata.json", "__init__.py"])
def test_what_a_variant_needs(name: str, tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    (folder / "build/torch-cpu" / name).unlink()
    nothing_published(tmp_path, folder, InvalidMetadata, f"torch-cpu: {name} is not there")


def test_a_digest_must_be_right(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    hub = str(tmp_path / "first")
    manifest = LayoutSource(hub, agent).manifest(REPO, publish(folder, hub, REPO, epoch=EPOCH).commit)
    text = manifest.variants["torch-cpu"].metadata
    (folder / "build/torch-cpu/metadata.json").write_text(text)
    assert not publish(folder, hub, REPO, epoch=EPOCH).changed
    error = nothing_published(tmp_path, again(folder, "altered"), IntegrityError, "not those of the digest")
    assert isinstance(error, IntegrityError)
    assert error.violations == (Violation("different", "__init__.py"),)


def test_a_signed_variant_is_not_given_a_digest(tmp_path: Path) -> None:
    folder = broken(tmp_path, {"metadata.json.sigstore": b"{}"})
    nothing_published(tmp_path, folder, InvalidMetadata, "breaks the signature")


@pytest.mark.parametrize("change", [{"name": "other"}, {"version": 2}])
def test_variants_are_of_one_kernel(change: dict[str, Any], tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo", variants=("torch-cpu", "torch-cuda"))
    (folder / "build/torch-cuda/metadata.json").write_bytes(metadata(**change))
    nothing_published(
        tmp_path, folder, InvalidMetadata, "not of one kernel: torch-cpu is relu version 1, torch-cuda is"
    )


@pytest.mark.parametrize("name", ["a.pyc", "__pycache__/a.cpython-311.pyc"])
def test_bytecode_is_refused(name: str, tmp_path: Path) -> None:
    error = nothing_published(tmp_path, broken(tmp_path, {name: b"code"}), IntegrityError, "bytecode")
    assert isinstance(error, IntegrityError)
    assert error.violations == (Violation("bytecode", name),)


@pytest.mark.parametrize(
    "name", ["build/torch-cpu/link", "build/torch-cuda", "benchmarks/link", "benchmarks", "torch-ext"]
)
@pytest.mark.parametrize("target", ["clean", "clean/file", "nowhere"])
def test_links_are_refused(name: str, target: str, tmp_path: Path) -> None:
    folder = write(repository(tmp_path / "repo"), {"build.toml": b""})
    if name == "benchmarks":
        shutil.rmtree(folder / name)
    outside = {"metadata.json": metadata(), "__init__.py": b"", "file": b""}
    (folder / name).symlink_to(write(tmp_path / "clean", outside).parent / target)
    if name in ("build/torch-cuda", "benchmarks") and target != "clean":
        pytest.skip("what is no folder is not looked at")
    with pytest.raises(IntegrityError, match="is a link"):
        publish(folder, str(tmp_path / "hub"), REPO, epoch=EPOCH)
    assert not (tmp_path / "hub/org").exists()


@pytest.mark.parametrize(
    "name", ["acme", "torch-ext/key.txt", "CARD.md", "benchmarks/key", "build/torch-cpu/data.json"]
)
@pytest.mark.parametrize("key", ["ours", "RSA", "words before"])
def test_private_keys_are_not_published(name: str, key: str, tmp_path: Path) -> None:
    generate(tmp_path / "ours")
    pem = (tmp_path / "ours").read_bytes().partition(b"\n")[2]
    keys = {
        "ours": (tmp_path / "ours").read_bytes()[:60],
        "RSA": pem.replace(b"PRIVATE", b"RSA PRIVATE").replace(b"\n", b"\r\n"),
        "words before": b"localKeyID: 01\n" + pem,
    }
    folder = write(repository(tmp_path / "repo"), {"build.toml": b"", name: keys[key]})
    error = nothing_published(tmp_path, folder, IntegrityError, "is a private key, which is never published")
    assert str(folder / name) in error.message


def test_public_keys_and_what_speaks_of_private_ones_are_published(tmp_path: Path) -> None:
    generate(tmp_path / "key")
    code = b'PEM = "-----BEGIN PRIVATE KEY-----"\n'
    files = {"build.toml": b"", "key.pub": (tmp_path / "key.pub").read_bytes(), "torch-ext/relu/pem.py": code}
    assert publish(write(repository(tmp_path / "repo"), files), str(tmp_path / "hub"), REPO, epoch=EPOCH).changed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    os.mkfifo(folder / "build/torch-cpu/pipe")
    nothing_published(tmp_path, folder, IntegrityError, "no regular file")


def test_paths_that_some_systems_cannot_have_are_refused(tmp_path: Path) -> None:
    nothing_published(tmp_path, broken(tmp_path, {"aux.py": b""}), InvalidMetadata, r"aux\.py")
    nothing_published(tmp_path, broken(tmp_path / "2", {"LAYERS.py": b""}), IntegrityError, "cannot both be there")


def test_what_nobody_would_find_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(InvalidReference, match="kernelhub/relu cannot be published"):
        publish(repository(tmp_path / "repo"), str(tmp_path / "hub"), RepoId("kernelhub", "relu"), epoch=EPOCH)
    assert not (tmp_path / "hub").exists()


def test_a_hub_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("text")
    with pytest.raises((HubUnavailable, InvalidReference), match="hub"):
        publish(repository(tmp_path / "repo"), str(tmp_path / "hub"), REPO, epoch=EPOCH)
    assert (tmp_path / "hub").read_text() == "text"


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    nothing_published(tmp_path, tmp_path / "nowhere", InvalidReference, "there is no folder .*nowhere")
    (tmp_path / "a project").mkdir()
    nothing_published(tmp_path, tmp_path / "a project", InvalidReference, "no kernel repository")
    (tmp_path / "a project" / "build.toml").touch()
    command = f"kernelhub build '{tmp_path / 'a project'}'"
    nothing_published(
        tmp_path, tmp_path / "a project", InvalidReference, f"not built yet\n.*Run: {re.escape(command)}$"
    )
    (tmp_path / "repo/build").mkdir(parents=True)
    nothing_published(tmp_path, tmp_path / "repo", InvalidReference, "no variants")
    (tmp_path / "repo/build/relu").mkdir()
    nothing_published(tmp_path, tmp_path / "repo", InvalidReference, "'relu' is not the name of a build variant")


def test_a_web_host_is_read_only(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    publish(folder, str(tmp_path / "hub"), REPO, epoch=EPOCH)
    with serving(tmp_path / "hub") as web:
        with pytest.raises(InvalidReference, match="cannot be published to"):
            publish(again(folder, "two"), web.url, REPO, epoch=EPOCH)
        with pytest.raises(InvalidReference, match="cannot be published to"):
            yank(web.url, REPO, "v1", "no")
        assert web.requests == []


def test_a_folder_of_something_else_is_not_made_a_hub(tmp_path: Path) -> None:
    write(tmp_path / "home", {"letter.txt": b"dear"})
    with pytest.raises(InvalidReference, match="not empty and has no hub.json"):
        publish(repository(tmp_path / "repo"), str(tmp_path / "home"), REPO, epoch=EPOCH)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]
    write(tmp_path / "newer", {"hub.json": b'{"layout": 2}'})
    with pytest.raises(InvalidMetadata, match="layout"):
        publish(repository(tmp_path / "repo"), str(tmp_path / "newer"), REPO, epoch=EPOCH)


def test_a_damaged_blob_is_mended(tmp_path: Path) -> None:
    hub, folder = str(tmp_path / "hub"), repository(tmp_path / "repo")
    published = publish(folder, hub, REPO, epoch=EPOCH)
    archive = LayoutSource(hub, agent).manifest(REPO, published.commit).variants["torch-cpu"].archive
    for damage in (b"", b"x" * 100_000):
        (tmp_path / "hub" / blob_path(archive)).write_bytes(damage)
        publish(folder, hub, REPO, epoch=EPOCH)
        assert sha256_hex((tmp_path / "hub" / blob_path(archive)).read_bytes()) == archive


def test_a_claim_that_is_none_is_refused(tmp_path: Path) -> None:
    hub, folder = tmp_path / "hub", repository(tmp_path / "repo")
    published = publish(folder, str(hub), REPO, epoch=EPOCH)
    claim = f"{REPO}/commits/{published.commit}.next.v1"
    first = (hub / f"{REPO}/commits/{published.commit}.json").read_bytes()
    for data, error in ((b"{", InvalidMetadata), (first, IntegrityError)):
        write(hub, {claim: data})
        with pytest.raises(error, match=claim):
            publish(again(folder, "two"), str(hub), REPO, epoch=EPOCH)
        assert chain(str(hub)) == [published.commit]


def test_a_hub_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(HubUnavailable, match=r"cannot write .*hub.json: No space left on device"):
            publish(repository(tmp_path / "repo"), str(tmp_path / "hub"), REPO, epoch=EPOCH)
    assert [path for path in (tmp_path / "hub").rglob("*") if path.is_file()] == []


# What goes along


def test_the_source_goes_along(tmp_path: Path) -> None:
    hub = str(tmp_path / "hub")
    extra = {
        "build.toml": b"[general]\n",
        "torch-ext/relu/__init__.py": b"1",
        "torch-ext/relu/__pycache__/x.pyc": b"code",
        "relu.cpp": b"//",
        ".git/config": b"secret",
        ".env": b"secret",
        "benchmarks/__pycache__/benchmark.pyc": b"code",
    }
    folder = write(repository(tmp_path / "repo"), extra)
    manifest = LayoutSource(hub, agent).manifest(REPO, publish(folder, hub, REPO, epoch=EPOCH).commit)
    packed = (tmp_path / "hub" / blob_path(manifest.source or "")).read_bytes()
    assert sorted(read(packed)) == ["build.toml", "relu.cpp", "torch-ext/relu/__init__.py"]
    assert publish(folder, hub, REPO, epoch=EPOCH).changed is False


def test_an_archive_holds_the_variant_and_its_new_digest(tmp_path: Path) -> None:
    hub, folder = str(tmp_path / "hub"), repository(tmp_path / "repo", files=2)
    variant = (
        LayoutSource(hub, agent).manifest(REPO, publish(folder, hub, REPO, epoch=EPOCH).commit).variants["torch-cpu"]
    )
    contents = read((tmp_path / "hub" / blob_path(variant.archive)).read_bytes())
    assert contents.pop("metadata.json").decode() == variant.metadata
    assert contents == {
        path.relative_to(folder / "build/torch-cpu").as_posix(): path.read_bytes()
        for path in (folder / "build/torch-cpu").rglob("*")
        if path.is_file() and path.name != "metadata.json"
    }
    assert json.loads(variant.metadata)["license"] == "Apache-2.0"


# Yanking


def test_yanking(hub: str, tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    first = publish(folder, hub, REPO, epoch=EPOCH)
    assert yank(hub, REPO, "v1", "broken") == RefFile(first.commit, "broken")
    found = LayoutSource(hub, agent)
    assert found.ref(REPO, "v1") == RefFile(first.commit, "broken")
    assert not publish(folder, hub, REPO, epoch=EPOCH).changed
    assert found.ref(REPO, "v1").yanked == "broken"
    assert yank(hub, REPO, "v1", None) == RefFile(first.commit)
    yank(hub, REPO, "v1", "broken again")
    second = publish(again(folder, "two"), hub, REPO, epoch=EPOCH)
    assert found.ref(REPO, "v1") == RefFile(second.commit)
    assert chain(hub) == [second.commit, first.commit]
    with pytest.raises(KernelNotFound, match="has no v7"):
        yank(hub, REPO, "v7", "x")


def test_a_publish_during_a_yank_is_not_yanked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, folder = str(tmp_path / "hub"), repository(tmp_path / "repo")
    publish(folder, hub, REPO, epoch=EPOCH)
    newer: list[Published] = []
    while_writing(monkeypatch, "refs/v1", lambda: newer.append(publish(again(folder, "two"), hub, REPO, epoch=EPOCH)))
    with pytest.raises(PublishConflict, match="newer commit") as caught:
        yank(hub, REPO, "v1", "broken")
    assert caught.value.winner == newer[0].commit
    assert LayoutSource(hub, agent).ref(REPO, "v1") == RefFile(newer[0].commit)


# Layers, read from the source


def layers(source: str, path: str = "layers.py") -> dict[str, str]:
    return {name: item.forward for name, item in declared_layers({path: source.encode()}).items()}


def test_layers_are_read_wherever_they_are() -> None:
    source = "class A(nn.Module):\n    def forward(self, x): ..."
    assert layers(source) == layers(source, "layers/__init__.py") == layers(source, "layers/a.py") == {"A": "(self, x)"}
    assert layers(source, "other.py") == layers(source, "layers/deep/a.py") == layers(source, "__init__.py") == {}
    nested = "class layers:\n    class A(torch.nn.Module):\n        def forward(self, x): ..."
    assert layers(nested, "__init__.py") == {"A": "(self, x)"}


@pytest.mark.parametrize(
    "signature",
    [
        "(self)",
        "(self, x, /, y, *, z)",
        "(self, *args, **kwargs)",
        "(self, a, b=None, *c, d=1, e, f=(1, 2))",
        "(s, x=-1.5)",
    ],
)
def test_signatures(signature: str) -> None:
    assert layers(f"class A(Module):\n    def forward{signature} -> int: ...") == {"A": signature}
    assert layers("class A(Module):\n    def forward(self, x: 'Tensor' = None) -> X: ...") == {"A": "(self, x=None)"}


def test_flags() -> None:
    found = declared_layers(
        {
            "layers.py": b"""
class Base(nn.Module):
    can_torch_compile: bool = True
    has_backward = compute()
    def forward(self, x): ...
class Same(Base): pass
class Other(Base):
    can_torch_compile = False
    has_backward = False
class Circle(Circle2): pass
class Circle2(Circle): pass
class _Private(nn.Module):
    def forward(self): ...
class NoForward(nn.Module): pass
class NoModule:
    def forward(self): ...
class Elsewhere(imported.Thing):
    def forward(self): ...
"""
        }
    )
    assert found == {
        "Base": LayerInfo(True, True, "(self, x)"),
        "Same": LayerInfo(True, True, "(self, x)"),
        "Other": LayerInfo(False, False, "(self, x)"),
    }


@pytest.mark.parametrize("source", ["def (", "\0", "x = " + "(" * 5000, "é = 1"])
def test_what_cannot_be_read_is_left_out(source: str) -> None:
    assert layers(source) == {}
    assert declared_layers({"layers.py": b"\xff\xfe\x00"}) == {}
