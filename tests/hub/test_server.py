"""The server: what huggingface_hub, the `kernels` package and this one get from a folder, and what nobody gets."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from loopback_hub import LoopbackHub, write_kernel

from kernelhub.core.canonical import sha256_hex
from kernelhub.core.manifest import Manifest, ManifestDocument, ManifestVariant, RefFile, hub_file
from kernelhub.core.refs import RepoId, Version
from kernelhub.errors import InvalidMetadata, InvalidReference
from kernelhub.hub.archive import pack
from kernelhub.hub.server import app, listen
from kernelhub.hub.sources.base import NoProgress
from kernelhub.hub.sources.huggingface import HuggingFaceSource

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers"
API = "/api/kernels/acme/relu"
VARIANT = "torch-universal"


def tree_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_hub(root: Path, kernels: Path, repo: str = "acme/relu") -> str:
    """A hub's folder with the repository's builds as version 1, written by hand; its commit."""
    variants = {}
    for folder in sorted((kernels / repo / "build").iterdir()):
        archive = pack(tree_of(folder))
        _blob(root, archive)
        variants[folder.name] = ManifestVariant(
            sha256_hex(archive), len(archive), (folder / "metadata.json").read_text()
        )
    return write_manifest(root, variants, repo)


def write_manifest(root: Path, variants: dict[str, ManifestVariant], repo: str = "acme/relu") -> str:
    card = b"# ReLU\n"
    _blob(root, card)
    manifest = Manifest(RepoId.parse(repo), 1, None, "2026-11-21T20:00:00Z", variants, card=sha256_hex(card))
    for path, data in {
        "hub.json": hub_file(),
        f"{repo}/commits/{manifest.commit}.json": ManifestDocument(manifest).to_bytes(),
        f"{repo}/refs/v1": RefFile(manifest.commit).to_bytes(),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return manifest.commit


def _blob(root: Path, data: bytes) -> Path:
    name = sha256_hex(data)
    path = root / "blobs/sha256" / name[:2] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture(params=["repositories", "hub folder"])
def served(request: pytest.FixtureRequest, hub: LoopbackHub, kernels: Path, tmp_path: Path) -> LoopbackHub:
    """The server over the same kernel, from both kinds of folder."""
    write_kernel(kernels, files={"native.abi3.so": os.urandom(1_200_000), "sub/code.py": b"X = 1\n"})
    if request.param == "hub folder":
        write_hub(tmp_path / "hub", kernels)
        hub.app = app(tmp_path / "hub")
    else:
        hub.app = app(kernels)
    return hub


@pytest.fixture
def ask(hub: LoopbackHub) -> Callable[..., Any]:
    """Send a request as it is written: no path is tidied up on the way."""
    import http.client

    def send(target: str, method: str = "GET", **headers: str) -> Any:
        connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=30)
        connection.request(method, target, headers=headers)
        response = connection.getresponse()
        response.content = response.read()  # type: ignore[attr-defined]
        connection.close()
        return response

    return send


def commit_of(ask: Callable[..., Any]) -> str:
    refs = json.loads(ask(f"{API}/refs").content)
    (row,) = [row for row in refs["branches"] if row["name"] == "v1"]
    commit: str = row["targetCommit"]
    return commit


# Other clients


def test_our_own_client(served: LoopbackHub, kernels: Path, tmp_path: Path) -> None:
    source = HuggingFaceSource(served.url, lambda: "a", lambda: None)
    repo, folder = RepoId("acme", "relu"), tmp_path / "arrived"
    folder.mkdir()
    commit = source.resolve(repo, Version(1))
    assert source.refs(repo)["main"] == commit
    assert set(source.listing(repo, commit).variants) == {VARIANT}
    source.fetch(repo, commit, VARIANT, {}, folder, NoProgress())
    assert tree_of(folder) == tree_of(kernels / "acme/relu/build" / VARIANT)


def test_huggingface_hub_downloads_a_snapshot(served: LoopbackHub, kernels: Path, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    path = snapshot_download(
        "acme/relu", repo_type="kernel", revision="v1", endpoint=served.url, cache_dir=tmp_path / "cache"
    )
    assert tree_of(Path(path) / "build" / VARIANT) == tree_of(kernels / "acme/relu/build" / VARIANT)
    large = (Path(path) / "build" / VARIANT / "native.abi3.so").resolve()
    assert large.name == hashlib.sha256(large.read_bytes()).hexdigest()  # it took the LFS hash


def _load_with_kernels(hub: LoopbackHub, home: Path, code: str) -> str:
    """Run code under the unmodified `kernels` package, in a process that has nothing of ours on its path."""
    if not (PEERS / "kernels").is_dir():
        pytest.fail(
            f"{PEERS} has no `kernels` package: pip install --target {PEERS} --no-deps kernels==0.17.2 (make test does)"
        )
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    env = {**kept, "PYTHONPATH": str(PEERS), "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_kernels_package_loads_a_kernel(served: LoopbackHub, tmp_path: Path) -> None:
    out = _load_with_kernels(
        served,
        tmp_path / "home",
        "import kernels\n"
        "module = kernels.get_kernel('acme/relu', version=1, trust_remote_code=True)\n"
        "print(kernels.__version__, module.answer(), 'kernelhub' in __import__('sys').modules)\n",
    )
    assert out.split() == ["0.17.2", "42", "False"]
    served_bodies = [request for request in served.requests if "/resolve/" in request.target]
    assert any(request.method == "HEAD" for request in served_bodies)
    assert any(request.method == "GET" for request in served_bodies)


@pytest.mark.slow
def test_the_kernels_package_asks_whether_the_publisher_is_trusted(
    hub: LoopbackHub, kernels: Path, tmp_path: Path
) -> None:
    code = (
        "import kernels\n"
        "try:\n"
        "    print(kernels.get_kernel('acme/relu', version=1).answer())\n"
        "except ValueError:\n"
        "    print('refused')\n"
    )
    for trusted, answer in ((True, "42"), (False, "refused")):
        hub.app = app(kernels, trusted=trusted)
        assert _load_with_kernels(hub, tmp_path / answer, code).strip() == answer
    assert hub.targets("/api/organizations/acme/overview")


# The endpoints


def test_refs_have_all_three_lists(served: LoopbackHub, ask: Callable[..., Any]) -> None:
    refs = json.loads(ask(f"{API}/refs").content)
    commit = commit_of(ask)
    assert refs == {
        "branches": [
            {"name": "main", "ref": "refs/heads/main", "targetCommit": commit},
            {"name": "v1", "ref": "refs/heads/v1", "targetCommit": commit},
        ],
        "tags": [],
        "converts": [],
    }


@pytest.mark.parametrize("revision", ["main", "v1", "refs%2Fheads%2Fv1", "COMMIT"])
def test_revisions_as_clients_spell_them(served: LoopbackHub, ask: Callable[..., Any], revision: str) -> None:
    commit = commit_of(ask)
    revision = revision.replace("COMMIT", commit)
    info = json.loads(ask(f"{API}/revision/{revision}").content)
    assert (info["id"], info["sha"]) == ("acme/relu", commit)
    assert json.loads(ask(API).content)["sha"] == commit
    assert ask(f"{API}/tree/{revision}/build").status == 200
    body = ask(f"/kernels/acme/relu/resolve/{revision}/build/{VARIANT}/sub/code.py")
    assert (body.content, body.getheader("X-Repo-Commit")) == (b"X = 1\n", commit)


def test_the_tree_by_level(served: LoopbackHub, ask: Callable[..., Any]) -> None:
    def paths(target: str) -> list[tuple[str, str]]:
        return [(row["type"], row["path"]) for row in json.loads(ask(f"{API}/tree/v1{target}").content)]

    here = f"build/{VARIANT}"
    assert paths("/build?recursive=false&expand=false") == [("directory", here)]
    below = [
        ("file", f"{here}/__init__.py"),
        ("file", f"{here}/metadata.json"),
        ("file", f"{here}/native.abi3.so"),
        ("directory", f"{here}/relu"),
    ]
    assert paths(f"/build%2F{VARIANT}") == paths(f"/build/{VARIANT}") == [*below, ("directory", f"{here}/sub")]
    everything = [
        *below,
        ("file", f"{here}/relu/__init__.py"),
        ("directory", f"{here}/sub"),
        ("file", f"{here}/sub/code.py"),
    ]
    assert paths(f"/build%2F{VARIANT}?recursive=true") == everything
    whole = paths("?recursive=true")
    assert [row for row in whole if row[1].startswith(here + "/")] == everything
    assert ("directory", "build") in whole
    assert ("directory", "build") in paths("")


def test_files_have_gits_hash_and_large_ones_lfs(served: LoopbackHub, ask: Callable[..., Any], kernels: Path) -> None:
    rows = {row["path"]: row for row in json.loads(ask(f"{API}/tree/v1?recursive=true").content)}
    code = (kernels / f"acme/relu/build/{VARIANT}/sub/code.py").read_bytes()
    large = (kernels / f"acme/relu/build/{VARIANT}/native.abi3.so").read_bytes()
    row = rows[f"build/{VARIANT}/sub/code.py"]
    assert row["oid"] == hashlib.sha1(b"blob %d\0" % len(code) + code).hexdigest()
    assert row["size"] == len(code)
    assert "lfs" not in row
    lfs = rows[f"build/{VARIANT}/native.abi3.so"]["lfs"]
    assert (lfs["oid"], lfs["size"]) == (hashlib.sha256(large).hexdigest(), len(large))
    assert "xet" not in json.dumps(rows).lower()


@pytest.mark.parametrize("name", ["sub/code.py", "native.abi3.so"])
def test_head_says_what_get_would(served: LoopbackHub, ask: Callable[..., Any], kernels: Path, name: str) -> None:
    target = f"/kernels/acme/relu/resolve/v1/build/{VARIANT}/{name}"
    data = (kernels / f"acme/relu/build/{VARIANT}/{name}").read_bytes()
    head, get = ask(target, "HEAD"), ask(target)
    assert head.content == b""
    assert get.content == data
    assert head.getheader("Content-Length") == get.getheader("Content-Length") == str(len(data))
    same = ("ETag", "X-Linked-Etag", "X-Linked-Size", "X-Repo-Commit", "Accept-Ranges")
    assert [head.getheader(header) for header in same] == [get.getheader(header) for header in same]
    assert not any("xet" in header.lower() for header, _ in get.getheaders())
    if name.endswith(".so"):
        expected = hashlib.sha256(data).hexdigest()
        assert get.getheader("X-Linked-Etag") == f'"{expected}"'
        assert get.getheader("X-Linked-Size") == str(len(data))


@pytest.mark.parametrize("name", ["sub/code.py", "native.abi3.so"])
def test_ranges(served: LoopbackHub, ask: Callable[..., Any], kernels: Path, name: str) -> None:
    target = f"/kernels/acme/relu/resolve/v1/build/{VARIANT}/{name}"
    data = (kernels / f"acme/relu/build/{VARIANT}/{name}").read_bytes()
    size = len(data)
    for text, start, end in [
        ("bytes=2-", 2, size),
        ("bytes=2-3", 2, 4),
        ("bytes=0-0", 0, 1),
        ("bytes=-2", size - 2, size),
        (f"bytes=1-{size + 100}", 1, size),
        (f"bytes=-{size + 100}", 0, size),
    ]:
        response = ask(target, Range=text)
        assert (response.status, response.content) == (206, data[start:end]), text
        assert response.getheader("Content-Range") == f"bytes {start}-{end - 1}/{size}"
    for text in ("bytes=3-2", "bytes=-", "lines=1-2", "bytes=1-2,4-5", "bytes=a-b"):
        response = ask(target, Range=text)
        assert (response.status, response.content) == (200, data), text
    for text in (f"bytes={size}-", "bytes=-0"):
        response = ask(target, Range=text)
        assert (response.status, response.getheader("Content-Range")) == (416, f"bytes */{size}"), text


@pytest.mark.parametrize("cursor", ["-1", "x", "\u00b2", "9" * 5000])
def test_a_page_that_there_is_not_is_the_first(
    hub: LoopbackHub, kernels: Path, ask: Callable[..., Any], cursor: str
) -> None:
    write_kernel(kernels)
    hub.app = app(kernels)
    assert ask(f"{API}/tree/refs%2Fheads%2Fv1?cursor={quote(cursor)}").status == 200


@pytest.mark.parametrize("page", [4, 7, 14])
def test_pages(hub: LoopbackHub, kernels: Path, ask: Callable[..., Any], page: int) -> None:
    write_kernel(kernels, files={f"{number}.py": b"#" for number in range(10)})
    hub.app = app(kernels, page=page)
    target, found = f"{API}/tree/refs%2Fheads%2Fv1/build%2F{VARIANT}?recursive=true", []
    while target:
        response = ask(target)
        rows = json.loads(response.content)
        assert 0 < len(rows) <= page  # no empty page at the end
        found += [row["path"] for row in rows]
        link = response.getheader("Link")
        if link:
            assert link.startswith(f"<{hub.url}/")  # absolute, as clients expect
            assert link.endswith('>; rel="next"')
        target = link[1:].partition(">")[0].removeprefix(hub.url) if link else ""
    assert len(found) == len(set(found)) == 14


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/api/kernels/acme/nothing/refs", 404, "RepoNotFound"),
        ("/api/kernels/nobody/relu", 404, "RepoNotFound"),
        ("/api/kernels/../relu/refs", 404, "RepoNotFound"),
        ("/api/kernels/acme/..%2F..%2Fetc/refs", 404, "RepoNotFound"),
        (f"{API}/tree/v9/build", 404, "RevisionNotFound"),
        (f"{API}/revision/{'a' * 40}", 404, "RevisionNotFound"),
        (f"{API}/revision/..%2F..%2Fx", 404, "RevisionNotFound"),
        (f"{API}/tree/v1/missing", 404, "EntryNotFound"),
        (f"{API}/tree/v1/build%2F..", 404, "EntryNotFound"),
        ("/kernels/acme/relu/resolve/v1/missing.txt", 404, "EntryNotFound"),
        ("/kernels/acme/relu/resolve/v9/metadata.json", 404, "RevisionNotFound"),
        ("/kernels/acme/nothing/resolve/v1/x", 404, "RepoNotFound"),
        (f"/kernels/acme/relu/resolve/v1/build/{VARIANT}/../../../../../secret", 404, "EntryNotFound"),
        (f"/kernels/acme/relu/resolve/v1/build/{VARIANT}/..%2F..%2F..%2F..%2F..%2Fsecret", 404, "EntryNotFound"),
        ("/kernels/acme/relu/resolve/v1//etc/passwd", 404, "EntryNotFound"),
        ("/api/organizations/nobody/overview", 404, None),
        ("/api/organizations/..%2Fkernels/overview", 404, None),
        ("/api/whoami-v2", 404, None),
        ("/", 404, None),
    ],
)
def test_errors_carry_the_hubs_codes(
    served: LoopbackHub, ask: Callable[..., Any], tmp_path: Path, target: str, status: int, code: str | None
) -> None:
    (tmp_path / "secret").write_text("secret")
    response = ask(target)
    assert (response.status, response.getheader("X-Error-Code")) == (status, code)
    assert json.loads(response.content)["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_is_written(served: LoopbackHub, ask: Callable[..., Any], method: str) -> None:
    assert ask(f"{API}/branch/v2", method).status == 405


def test_the_overview(hub: LoopbackHub, kernels: Path, ask: Callable[..., Any]) -> None:
    for trusted in (True, False):
        hub.app = app(kernels, trusted=trusted)
        assert json.loads(ask("/api/organizations/acme/overview").content)["trustedKernelPublisher"] is trusted


# Folders of repositories


def test_what_is_not_served(hub: LoopbackHub, kernels: Path, ask: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    repo = kernels / "acme/relu"
    variant = repo / "build" / VARIANT
    (repo / ".git").mkdir()
    (repo / ".git/config").write_text("[core]")
    (variant / "link.py").symlink_to(tmp_path / "secret")
    (variant / "folder").symlink_to(tmp_path)
    (variant / "__pycache__").mkdir()
    (variant / "__pycache__/x.cpython-311.pyc").write_bytes(b"")
    hub.app = app(kernels)
    paths = [row["path"] for row in json.loads(ask(f"{API}/tree/main?recursive=true").content)]
    assert paths == [
        "build",
        f"build/{VARIANT}",
        f"build/{VARIANT}/__init__.py",
        f"build/{VARIANT}/metadata.json",
        f"build/{VARIANT}/relu",
        f"build/{VARIANT}/relu/__init__.py",
    ]
    for name in (".git/config", f"build/{VARIANT}/link.py", f"build/{VARIANT}/folder/secret"):
        assert ask(f"/kernels/acme/relu/resolve/main/{name}").status == 404


def test_the_commit_is_that_of_the_content(hub: LoopbackHub, kernels: Path, ask: Callable[..., Any]) -> None:
    hub.app = app(kernels)
    first = commit_of(ask)
    hub.app = app(kernels)
    assert commit_of(ask) == first
    target = f"build/{VARIANT}/__init__.py"
    (kernels / "acme/relu" / target).write_text("def answer():\n    return 4321\n")
    second = commit_of(ask)
    assert second != first
    assert ask(f"/kernels/acme/relu/resolve/{second}/{target}").status == 200
    # The old commit's file is gone: nothing is better than the new one's bytes under the old one's name.
    assert ask(f"/kernels/acme/relu/resolve/{first}/{target}").status == 404
    assert ask(f"/kernels/acme/relu/resolve/{first}/build/{VARIANT}/metadata.json").status == 200


def test_a_file_beside_the_variants(hub: LoopbackHub, kernels: Path, ask: Callable[..., Any]) -> None:
    (kernels / "acme/relu/build/notes.txt").write_text("notes")
    hub.app = app(kernels)
    rows = json.loads(ask(f"{API}/tree/main/build?recursive=false").content)
    assert [(row["type"], row["path"]) for row in rows] == [
        ("directory", f"build/{VARIANT}"),
        ("file", "build/notes.txt"),
    ]


def test_a_branch_for_each_version_of_the_metadata(hub: LoopbackHub, kernels: Path, ask: Callable[..., Any]) -> None:
    for number, metadata in enumerate(['{"version": 12}', '{"version": true}', '{"version": -1}', "[]", "{", "\xff"]):
        folder = write_kernel(kernels, variant=f"torch-{number}")
        (folder / "metadata.json").write_text(metadata, encoding="latin-1")
    hub.app = app(kernels)
    refs = json.loads(ask(f"{API}/refs").content)
    assert [row["name"] for row in refs["branches"]] == ["main", "v1", "v12"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidReference, match="not a folder"):
        app(tmp_path / "missing")


def test_serving_a_folder_on_a_free_port(kernels: Path) -> None:
    import urllib.request

    with listen(kernels) as server:
        with urllib.request.urlopen(f"{server.url}{API}/refs", timeout=30) as response:
            assert response.status == 200
        port = int(server.url.rpartition(":")[2])
        with (
            pytest.raises(InvalidReference, match=f"cannot listen on 127.0.0.1 port {port}"),
            listen(kernels, port=port),
        ):
            pass
    assert not server.thread.is_alive()
    server.wait()  # returns, because it has ended


# A hub's folder


@pytest.fixture
def hub_folder(hub: LoopbackHub, kernels: Path, tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "hub"
    write_hub(root, kernels)
    hub.app = app(root)
    return root


def test_a_hubs_commits_are_its_own(hub: LoopbackHub, kernels: Path, tmp_path: Path, ask: Callable[..., Any]) -> None:
    commit = write_hub(tmp_path / "hub", kernels)
    hub.app = app(tmp_path / "hub")
    assert commit_of(ask) == commit
    assert ask("/kernels/acme/relu/resolve/v1/README.md").content == b"# ReLU\n"


def test_listing_the_builds_unpacks_none(hub_folder: Path, ask: Callable[..., Any]) -> None:
    for path in (hub_folder / "blobs").rglob("*"):
        if path.is_file() and path.read_bytes() != b"# ReLU\n":
            path.write_bytes(b"not an archive")
    assert json.loads(ask(f"{API}/tree/v1/build").content)[0]["path"] == f"build/{VARIANT}"
    response = ask(f"{API}/tree/v1/build%2F{VARIANT}?recursive=true")
    assert response.status == 500
    assert "is not what its name says" in json.loads(response.content)["error"]


def test_an_archive_that_does_not_unpack_is_never_served_in_part(
    hub: LoopbackHub, kernels: Path, tmp_path: Path, ask: Callable[..., Any]
) -> None:
    import zstandard

    whole = zstandard.decompress(pack(tree_of(kernels / "acme/relu/build" / VARIANT)))
    cut = zstandard.compress(whole[: len(whole) - 1100])  # without its end, and with its first files
    text = (kernels / "acme/relu/build" / VARIANT / "metadata.json").read_text()
    root = tmp_path / "hub"
    write_manifest(root, {VARIANT: ManifestVariant(_blob(root, cut).name, len(cut), text)})
    hub.app = app(root)
    for _ in range(2):
        assert ask(f"/kernels/acme/relu/resolve/v1/build/{VARIANT}/__init__.py").status == 500


def test_a_card_that_is_missing_keeps_nobody_from_the_kernel(hub_folder: Path, ask: Callable[..., Any]) -> None:
    for path in (hub_folder / "blobs").rglob("*"):
        if path.is_file() and path.read_bytes() == b"# ReLU\n":
            path.unlink()
    assert ask("/kernels/acme/relu/resolve/v1/README.md").status == 404
    assert ask(f"/kernels/acme/relu/resolve/v1/build/{VARIANT}/metadata.json").status == 200


def test_a_yanked_version_is_not_served(hub_folder: Path, ask: Callable[..., Any]) -> None:
    ref = hub_folder / "acme/relu/refs/v1"
    ref.write_bytes(RefFile(RefFile.parse(ref.read_bytes()).commit, "wrong results").to_bytes())
    assert json.loads(ask(f"{API}/refs").content)["branches"] == []


def test_a_manifest_that_answers_for_another_commit(hub_folder: Path, ask: Callable[..., Any]) -> None:
    (manifest,) = (hub_folder / "acme/relu/commits").iterdir()
    other = manifest.with_name("a" * 40 + ".json")
    manifest.rename(other)
    assert ask(f"{API}/tree/{'a' * 40}/build").status == 500


@pytest.mark.parametrize("text", [b'{"layout": 2}', b"{}", b""])
def test_a_hub_of_another_layout(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "hub.json").write_bytes(text)
    with pytest.raises(InvalidMetadata, match="hub.json"):
        app(tmp_path)
