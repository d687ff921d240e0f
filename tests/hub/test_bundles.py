"""Bundles: made from hubs on the network, installed where there is none, refused where anything is not as it should be."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from kernelfiles import kernel_files, write_files, write_kernel
from layout_fixtures import Web, serving

from kernelhub import Hub, Settings
from kernelhub.cli.main import run
from kernelhub.core.canonical import sha256_hex
from kernelhub.core.host import Host
from kernelhub.core.lockfile import LockFile
from kernelhub.core.manifest import ManifestDocument, ManifestVariant
from kernelhub.core.refs import KernelRef, RepoId, Revision, Version
from kernelhub.core.revocations import Revocations, path_of
from kernelhub.core.trust import Origin, TrustedKey
from kernelhub.core.variants import BuildVariant, VariantAccepted
from kernelhub.errors import (
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelHubError,
    KernelNotFound,
    NoCompatibleVariant,
    StoreError,
    UntrustedKernel,
)
from kernelhub.hub import bundling, unbundling
from kernelhub.hub.archive import pack, read
from kernelhub.hub.bundles import installed, remove
from kernelhub.hub.bundling import create
from kernelhub.hub.files import LocalFiles
from kernelhub.hub.locks import make_lock
from kernelhub.hub.publish import publish, yank
from kernelhub.hub.revocations import revoke
from kernelhub.hub.server import app
from kernelhub.hub.signing import Signer, generate, load_signer
from kernelhub.hub.sources.bundle import BundleSource
from kernelhub.hub.unbundling import install

HOST = Host(python=(3, 11), torch=(2, 13), backend="cpu", cpu="x86_64", os="linux")
TOP, BASE = RepoId("org", "top"), RepoId("org", "base")
TOP_V1 = KernelRef(TOP, Version(1))
EPOCH = 1_763_755_200
TIME = "2026-01-01T00:00:00Z"
NOBODY = "http://127.0.0.1:9"
DEPENDS = [{"repo-id": "org/base", "version": 1}]
CODE = "from kernelhub import get_kernel_dep\nVALUE = get_kernel_dep('org/base').VALUE\n"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    folder = tmp_path_factory.mktemp("keys")
    generate(folder / "alice")
    return load_signer(folder / "alice")


@pytest.fixture
def origin(tmp_path: Path, signer: Signer) -> Path:
    """A hub in a folder: org/top for the CPU and for CUDA, which needs org/base; both signed."""
    folder = tmp_path / "origin"
    top = write_kernel(tmp_path / "top", code=CODE, name="top", kernel_depends=DEPENDS)
    write_kernel(top, "torch-cuda", code=CODE, name="top", kernel_depends=DEPENDS, backend={"type": "cuda"})
    write_files(top, {"benchmarks/benchmark.py": b"pass\n"})
    publish(top, str(folder), TOP, epoch=EPOCH, signer=signer)
    publish(
        write_kernel(tmp_path / "base", code="VALUE = 1\n", name="base"), str(folder), BASE, epoch=EPOCH, signer=signer
    )
    return folder


@pytest.fixture
def web(origin: Path) -> Iterator[Web]:
    with serving(origin) as web:
        yield web


@pytest.fixture
def make_hub(tmp_path: Path) -> Callable[..., Hub]:
    """A client; without hubs but one that does not answer, unless the test names some."""

    def make(store: str = "inside", **settings: object) -> Hub:
        settings = {"hf_endpoint": NOBODY, "cache": tmp_path / store, "build": "never", **settings}
        return Hub(Settings(**settings), host=HOST)

    return make


@pytest.fixture
def bundle(web: Web, make_hub, tmp_path: Path) -> Path:
    """A bundle of org/top@v1 with all variants, in a folder with letters of its own."""
    hub = make_hub("outside", hubs=(web.url,))
    path = tmp_path / "büche ü" / "top.khb"
    path.parent.mkdir()
    create(
        hub,
        path,
        make_lock(hub, [TOP_V1], trust_remote_code=True),
        time=TIME,
        all_variants=True,
        trust_remote_code=True,
    )
    web.requests.clear()
    return path


# The way of a kernel in a bundle


def test_what_came_in_a_bundle_is_loaded_and_nothing_is_sent(bundle, web, make_hub):
    hub = make_hub(hubs=(web.url,))
    lock, kernels = install(bundle, hub.store)
    assert [(str(item.locked), item.variants) for item in kernels] == [
        ("org/base@v1", ("torch-cpu",)),
        ("org/top@v1", ("torch-cpu", "torch-cuda")),
    ]
    for trusted in (True, ["org/*"]):
        assert make_hub(hubs=(web.url,)).load(TOP_V1, trust_remote_code=trusted).module.VALUE == 1
    by_lock = make_hub(hubs=(web.url,)).load_locked(TOP, lockfile=lock, trust_remote_code=True)
    assert by_lock.module.VALUE == 1
    pinned = KernelRef(TOP, Revision(lock.find(TOP).commit))
    assert make_hub(hubs=(web.url,), offline=True).load(pinned, trust_remote_code=True).module.VALUE == 1
    assert make_hub(hubs=(web.url,)).benchmarks(TOP_V1, trust_remote_code=True).is_dir()
    assert web.requests == []


def test_a_bundle_grants_no_trust_and_a_signature_by_a_key_that_is_trusted_does(bundle, make_hub, signer):
    assert BundleSource("anywhere", str).origin is Origin.CACHE
    install(bundle, make_hub().store)
    with pytest.raises(UntrustedKernel, match="published by 'org' in the installed bundles"):
        make_hub().load(TOP_V1)
    with pytest.raises(UntrustedKernel):
        make_hub().load(TOP_V1, trust_remote_code=["https://kernels.example.org/org/*"])
    trusting = {"trusted_keys": (TrustedKey(signer.public),), "require_signature": True}
    assert make_hub(**trusting).load(TOP_V1).module.VALUE == 1
    facts = make_hub(**trusting).verify(TOP_V1)
    assert facts["signed_by"] == f"key {signer.public.id}"


def test_a_bundle_for_this_machine_has_only_its_variants(web, make_hub, tmp_path, signer):
    outside, path = make_hub("outside", hubs=(web.url,)), tmp_path / "a.khb"
    lock = make_lock(outside, [TOP_V1], trust_remote_code=True)
    create(outside, path, lock, time=TIME, trust_remote_code=True)
    kernels = install(path, make_hub().store)[1]
    assert [item.variants for item in kernels] == [("torch-cpu",), ("torch-cpu",)]
    assert make_hub().load(TOP_V1, trust_remote_code=True).module.VALUE == 1
    cuda = Hub(make_hub().settings, host=replace(HOST, backend="cuda", backend_version=(12, 8)))
    with pytest.raises(NoCompatibleVariant, match="the bundle does not have it"):
        cuda.install(TOP_V1, trust_remote_code=True)
    signed = Hub(replace(make_hub().settings, trusted_keys=(TrustedKey(signer.public),)), host=cuda.host)
    with pytest.raises(NoCompatibleVariant, match="the bundle does not have it"):
        signed.install(TOP_V1)


def test_a_bundle_with_more_variants_adds_them(bundle, web, make_hub, tmp_path):
    outside, path = make_hub("outside", hubs=(web.url,)), tmp_path / "a.khb"
    create(outside, path, make_lock(outside, [TOP_V1], trust_remote_code=True), time=TIME, trust_remote_code=True)
    install(path, make_hub().store)
    make_hub().load(TOP_V1, trust_remote_code=True)
    install(bundle, make_hub().store)
    cuda = Hub(make_hub().settings, host=replace(HOST, backend="cuda", backend_version=(12, 8)))
    assert cuda.variants(TOP_V1)[0] == VariantAccepted(BuildVariant.parse("torch-cuda"))
    lock = make_lock(cuda, [TOP_V1], trust_remote_code=True)
    assert len(cuda.download(lock.find(TOP), lock, all_variants=True, trust_remote_code=True)) == 2


def test_kernels_from_a_hub_without_manifests_keep_their_own_commit(hub, make_hub, tmp_path):
    """`hub` speaks the Hugging Face Hub's protocol."""
    root = tmp_path / "kernels"
    write_kernel(root / "org" / "base", code="VALUE = 7\n", name="base")
    hub.app = app(root, trusted=True)
    outside, path = make_hub("outside", hf_endpoint=hub.url), tmp_path / "a.khb"
    lock = make_lock(outside, [KernelRef(BASE, Version(1))])
    assert hub.targets("metadata.json") != []
    assert hub.targets("__init__.py") == []  # a lock needs no more of a variant than its metadata
    create(outside, path, lock, time=TIME)
    hub.requests.clear()
    inside = make_hub(hf_endpoint=hub.url)
    assert install(path, inside.store)[0] == lock
    assert inside.load_locked(BASE, lockfile=lock, trust_remote_code=["org/*"]).module.VALUE == 7
    assert make_hub(hf_endpoint=hub.url).load(KernelRef(BASE, Version(1)), trust_remote_code=True).module.VALUE == 7
    assert hub.requests == []
    with pytest.raises(UntrustedKernel, match="the installed bundles"):  # the hub's mark says nothing of a bundle
        make_hub(hf_endpoint=hub.url).load(KernelRef(BASE, Version(1)))


def test_what_no_bundle_has_is_looked_for_elsewhere(bundle, web, origin, make_hub, tmp_path):
    install(bundle, make_hub().store)
    publish(
        write_kernel(tmp_path / "more", code="VALUE = 3\n", name="more"),
        str(origin),
        RepoId("org", "more"),
        epoch=EPOCH,
    )
    two = write_kernel(tmp_path / "two", code="VALUE = 2\n", name="base", version=2)
    publish(two, str(origin), BASE, epoch=EPOCH)
    for ref, value in (("org/more@v1", 3), ("org/base@v2", 2)):
        found = make_hub(hubs=(web.url,)).load(KernelRef.parse(ref), trust_remote_code=True)
        assert value == found.module.VALUE


def test_removing_what_came_in_bundles_gives_the_way_back_to_hubs(bundle, web, make_hub):
    store = make_hub().store
    install(bundle, store)
    make_hub().load(TOP_V1, trust_remote_code=True)
    assert [(str(repo), ref) for repo, ref, _ in installed(store)] == [("org/base", "v1"), ("org/top", "v1")]
    assert remove(store, [TOP]) > 0
    assert [str(repo) for repo, _, _ in installed(store)] == ["org/base"]
    with pytest.raises(KernelHubError):
        make_hub().load(TOP_V1, trust_remote_code=True)
    assert make_hub(hubs=(web.url,)).load(TOP_V1, trust_remote_code=True)
    assert web.requests != []
    remove(store, [BASE])
    assert list((store.root / "bundles").glob("blobs/sha256/*/*")) == []


def test_an_older_bundle_does_not_take_a_newer_ones_place(bundle, origin, web, make_hub, tmp_path):
    new = write_kernel(tmp_path / "new", code="VALUE = 2\n", name="base")
    commit = publish(new, str(origin), BASE, epoch=EPOCH + 60).commit
    outside, path = make_hub("outside", hubs=(web.url,)), tmp_path / "new.khb"
    create(outside, path, make_lock(outside, [TOP_V1], trust_remote_code=True), time=TIME, trust_remote_code=True)
    store = make_hub().store
    install(path, store)
    with pytest.raises(InvalidReference, match=f"org/base@v1 is {commit} of .* here, and the bundle's is"):
        install(bundle, store)
    assert make_hub().load(TOP_V1, trust_remote_code=True).module.VALUE == 2
    install(bundle, store, accept_older=True)
    assert make_hub().load(TOP_V1, trust_remote_code=True).module.VALUE == 1


def test_revocations_come_along_for_keys_that_are_trusted(origin, web, make_hub, tmp_path, signer):
    outside, path = make_hub("outside", hubs=(web.url,)), tmp_path / "a.khb"
    lock = make_lock(outside, [TOP_V1], trust_remote_code=True)
    revoke(str(origin), signer, time=TIME, keys={}, commits={lock.find(BASE).commit: "wrong results"})
    create(outside, path, lock, time=TIME, trust_remote_code=True)
    trusting = {"trusted_keys": (TrustedKey(signer.public),)}
    install(path, make_hub().store)
    assert not (make_hub().store.root / "bundles" / path_of(signer.public.id)).exists()
    install(path, make_hub().store, keys=[signer.public])
    with pytest.raises(UntrustedKernel, match="wrong results"):
        make_hub(**trusting).load(KernelRef(BASE, Version(1)), trust_remote_code=True)


def test_a_list_that_the_key_did_not_sign_is_refused(bundle, make_hub, tmp_path, signer):
    value = {"layout": 1, "key": signer.public.id, "number": 99, "time": TIME, "keys": {}, "commits": {}}
    data = json.dumps({"revocations": value, "signatures": []}).encode()
    path = rewritten(bundle, tmp_path, lambda files: files.update({path_of(signer.public.id): data}))
    with pytest.raises(IntegrityError, match="not signed by its key"):
        install(path, make_hub().store, keys=[signer.public])


def test_a_wrong_revocation_list_has_nothing_installed(origin, web, make_hub, tmp_path, signer):
    outside, path = make_hub("outside", hubs=(web.url,)), tmp_path / "a.khb"
    lock = make_lock(outside, [TOP_V1], trust_remote_code=True)
    revoke(str(origin), signer, time=TIME, keys={}, commits={lock.find(BASE).commit: "wrong results"})
    create(outside, path, lock, time=TIME, trust_remote_code=True)
    name = path_of(signer.public.id)
    path = rewritten(path, tmp_path, lambda files: files.update({name: files[name].replace(b"results", b"Results")}))
    store = make_hub().store
    with pytest.raises(IntegrityError, match="not signed by its key"):
        install(path, store, keys=[signer.public])
    assert installed(store) == []
    assert list((store.root / "bundles").iterdir()) == []


@pytest.mark.parametrize("first", [0, 1])
def test_what_a_key_took_back_in_one_hub_counts_whatever_its_list_of_another_says(make_hub, tmp_path, signer, first):
    """The other list is the one with the higher number."""
    trusting = {"trusted_keys": (TrustedKey(signer.public),)}
    paths = []
    for name, commits in (("one", ["1" * 40, "2" * 40]), ("two", [])):
        folder, repo = tmp_path / f"hub-{name}", RepoId("org", name)
        kernel = write_kernel(tmp_path / name, code="VALUE = 1\n", name=name)
        commit = publish(kernel, str(folder), repo, epoch=EPOCH, signer=signer).commit
        hub = make_hub("outside", hubs=(str(folder),))
        lock = make_lock(hub, [KernelRef(repo, Version(1))], trust_remote_code=True)
        for taken_back in commits or [commit]:
            revoke(str(folder), signer, time=TIME, keys={}, commits={taken_back: "wrong results"})
        create(hub, tmp_path / f"{name}.khb", lock, time=TIME, trust_remote_code=True)
        paths.append(tmp_path / f"{name}.khb")
    for path in (paths[first], paths[1 - first]):
        install(path, make_hub().store, keys=[signer.public])
    assert make_hub(**trusting).load(KernelRef.parse("org/one@v1")).module.VALUE == 1
    with pytest.raises(UntrustedKernel, match="wrong results"):
        make_hub(**trusting).load(KernelRef.parse("org/two@v1"), trust_remote_code=True)


def test_a_bundle_that_claims_to_be_a_commit_of_a_hub_does_not_take_its_place(bundle, make_hub, web, tmp_path, signer):
    """Where no hub is asked it still does, but for what was revoked; a lock has digests."""
    commit = make_lock(make_hub("outside", hubs=(web.url,)), [TOP_V1], trust_remote_code=True).find(BASE).commit
    contents = kernel_files("VALUE = 'evil'\n", name="base")

    def claim(files: dict[str, bytes]) -> None:
        replace_base(files, contents, origin={"hub": "a hub", "commit": commit})
        digests = {kernel["repo"]: kernel for kernel in json.loads(files["kernels.lock"])["kernels"]}
        digests["org/base"] |= {"commit": commit, "variants": {}}
        files["kernels.lock"] = json.dumps({"lock": 1, "kernels": [*digests.values()]}).encode()

    path = rewritten(bundle, tmp_path, claim)
    install(path, make_hub().store)
    pinned = KernelRef(BASE, Revision(commit))
    assert make_hub(hubs=(web.url,)).load(pinned, trust_remote_code=True).module.VALUE == 1
    alone = make_hub("alone")
    install(path, alone.store)
    revocations = Revocations(signer.public.id, 1, TIME, {}, {commit: "wrong results"})
    assert make_hub("alone", offline=True).load(pinned, trust_remote_code=True).module.VALUE == "evil"
    alone.store.set_revocations(revocations)
    with pytest.raises(UntrustedKernel, match="wrong results"):
        make_hub("alone", offline=True, trusted_keys=(TrustedKey(signer.public),)).load(pinned, trust_remote_code=True)


def test_kernels_inside_this_package_are_not_carried(web, make_hub, tmp_path):
    outside = make_hub("outside", hubs=(web.url,))
    with pytest.raises(KernelNotFound, match="nothing to bundle"):
        create(outside, tmp_path / "a.khb", make_lock(outside, [KernelRef.parse("kernelhub/norm@v1")]), time=TIME)
    assert list(tmp_path.glob("*a.khb*")) == []


def test_a_kernel_that_is_not_trusted_is_not_bundled(web, make_hub, tmp_path):
    outside = make_hub("outside", hubs=(web.url,))
    lock = make_lock(outside, [TOP_V1], trust_remote_code=True)
    with pytest.raises(UntrustedKernel):
        create(outside, tmp_path / "a.khb", lock, time=TIME)
    assert list(tmp_path.glob("*a.khb*")) == []


def test_a_bundle_that_cannot_be_written_is_an_error_and_leaves_nothing(web, make_hub, tmp_path, monkeypatch):
    outside = make_hub("outside", hubs=(web.url,))
    lock = make_lock(outside, [TOP_V1], trust_remote_code=True)
    with pytest.raises(StoreError, match="cannot write"):
        create(outside, tmp_path / "none" / "a.khb", lock, time=TIME, trust_remote_code=True)
    monkeypatch.setattr(bundling, "_pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        create(outside, tmp_path / "a.khb", lock, time=TIME, trust_remote_code=True)
    assert list(tmp_path.glob("*a.khb*")) == []


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_install_leaves_nothing(bundle, make_hub, monkeypatch):
    store = make_hub().store
    monkeypatch.setattr(unbundling, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install(bundle, store)
    assert [path.name for path in (store.root / "bundles").iterdir()] == []
    with pytest.raises(KernelNotFound):
        make_hub(offline=True).load(TOP_V1, trust_remote_code=True)


def test_an_install_that_is_interrupted_at_its_last_step_is_whole(bundle, make_hub, monkeypatch):
    store, replaced = make_hub().store, LocalFiles.replace

    def replace_one(self: LocalFiles, path: str, data: bytes) -> None:
        replaced(self, path, data)
        if "/refs/" in path:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(LocalFiles, "replace", replace_one)
    with pytest.raises(KeyboardInterrupt):
        install(bundle, store)
    assert [(str(repo), ref) for repo, ref, _ in installed(store)] == [("org/base", "v1"), ("org/top", "v1")]


@pytest.mark.parametrize("end", ["install", "prune", "load", "list"])
def test_what_a_killed_install_left_is_ended_by_whoever_comes_next(bundle, make_hub, kernelhub, end):
    store = make_hub().store
    install(bundle, store)
    folder = store.root / "bundles"
    ref = folder / "org/base/refs/v1"
    commit, staging = ref.read_text().strip(), folder / ".install-abc"
    ref.unlink()
    (folder / ".refs.json").write_text(json.dumps({"org/base/refs/v1": commit}))
    write_files(staging, {"blobs/sha256/half": b"x" * 1000})
    if end == "install":
        install(bundle, store)
    elif end == "load":
        assert make_hub(offline=True).load(KernelRef(BASE, Version(1)), trust_remote_code=True).module.VALUE == 1
    elif end == "list":
        assert len(installed(store)) == 2
    else:
        assert "1000 B" in kernelhub("cache", "prune", store="inside")[1]
    assert ref.read_text().strip() == commit
    assert [path for path in folder.iterdir() if path.name.startswith(".")] == []


# Hostile bundles


def tar_of(files: dict[str, bytes]) -> bytes:
    """A bundle with these files in this order, whatever they are called."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    blocks = out.getvalue().rstrip(b"\0")
    return zstandard.compress(blocks + b"\0" * (-len(blocks) % 512 + 1024))


def rewritten(bundle: Path, folder: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """A copy of a bundle with its files changed; what is added comes before archives."""
    files = read(bundle.read_bytes())
    change(files)
    order = sorted(files, key=lambda name: (name != "bundle.json", name.startswith("blobs/")))
    path = folder / "hostile.khb"
    path.write_bytes(tar_of({name: files[name] for name in order}))
    return path


def manifest_of(files: dict[str, bytes], repo: str) -> str:
    return next(name for name in files if name.startswith(f"{repo}/commits/"))


def first_blob(files: dict[str, bytes]) -> str:
    return next(name for name in files if name.startswith("blobs/"))


def flip(files: dict[str, bytes], name: str) -> None:
    data = files[name]
    files[name] = data[:-1] + bytes([data[-1] ^ 1])


def rename(files: dict[str, bytes], old: str, new: str) -> None:
    files[new] = files.pop(old)


def set_lock(files: dict[str, bytes], change: Callable[[str], str]) -> None:
    files["kernels.lock"] = change(files["kernels.lock"].decode()).encode()


def other_archive(files: dict[str, bytes]) -> None:
    """Files that are not those of the digest in their metadata, in an archive that the manifest names by its hash."""
    contents = {**kernel_files("VALUE = 1\n", name="base"), "__init__.py": b"VALUE = 'other'\n"}
    replace_base(files, contents)


def replace_base(files: dict[str, bytes], contents: dict[str, bytes], **raw: object) -> None:
    archive = pack(contents)
    name = manifest_of(files, "org/base")
    old = ManifestDocument.parse(files.pop(name)).manifest
    variant = ManifestVariant(sha256_hex(archive), len(archive), contents["metadata.json"].decode())
    new = replace(old, variants={"torch-cpu": variant}, benchmarks=None, raw=raw)
    blob = f"blobs/sha256/{old.variants['torch-cpu'].archive[:2]}/{old.variants['torch-cpu'].archive}"
    del files[blob]
    files[f"blobs/sha256/{variant.archive[:2]}/{variant.archive}"] = archive
    files[f"org/base/commits/{new.commit}.json"] = ManifestDocument(new).to_bytes()
    set_lock(files, lambda text: text.replace(old.commit, new.commit))


def base_archive(files: dict[str, bytes]) -> str:
    archive = ManifestDocument.parse(files[manifest_of(files, "org/base")]).manifest.variants["torch-cpu"].archive
    return f"blobs/sha256/{archive[:2]}/{archive}"


def without_base(files: dict[str, bytes]) -> None:
    del files[base_archive(files)]
    del files[manifest_of(files, "org/base")]


def unread(files: dict[str, bytes]) -> None:
    """A whole other kernel that the lock does not name."""
    data = json.loads(files[manifest_of(files, "org/base")])
    data["manifest"]["repo"] = "org/evil"
    document = ManifestDocument.parse(json.dumps(data))
    files[f"org/evil/commits/{document.manifest.commit}.json"] = document.to_bytes()


def embedded(files: dict[str, bytes]) -> None:
    data = json.loads(files[manifest_of(files, "org/base")])
    data["manifest"]["repo"] = "kernelhub/norm"
    document = ManifestDocument.parse(json.dumps(data))
    files[f"kernelhub/norm/commits/{document.manifest.commit}.json"] = document.to_bytes()


HOSTILE: list[tuple[str, Callable[[dict[str, bytes]], object], str]] = [
    ("a newer format", lambda files: files.update({"bundle.json": b'{"bundle": 2}'}), "A newer kernelhub made it"),
    ("no format", lambda files: files.update({"bundle.json": b"{}"}), "bundle: expected 1, got None"),
    ("true for 1", lambda files: files.update({"bundle.json": b'{"bundle": true}'}), "bundle: expected 1, got True"),
    ("no bundle", lambda files: files.pop("bundle.json"), "it is not a bundle"),
    ("no lock", lambda files: files.pop("kernels.lock"), "has no kernels.lock"),
    ("lock is none", lambda files: set_lock(files, lambda _: "{}"), "the lock file is malformed"),
    ("out of the folder", lambda files: files.update({"../evil": b""}), "not a path inside"),
    ("absolute", lambda files: files.update({"/evil": b""}), "not a path inside"),
    ("unknown file", lambda files: files.update({"evil.py": b""}), "no bundle has such a file"),
    ("a ref", lambda files: files.update({"org/top/refs/v1": b"0" * 40}), "no bundle has such a file"),
    ("hub.json", lambda files: files.update({"hub.json": b"{}"}), "no bundle has such a file"),
    ("other bytes", lambda files: flip(files, first_blob(files)), "the archive is not what its name says"),
    (
        "longer",
        lambda files: files.update({base_archive(files): files[base_archive(files)] + b"x"}),
        "the archive has more than",
    ),
    ("not there", without_base, "the lock names org/base@v1 at .*, and the bundle does not have it"),
    ("shorter", lambda files: files.update({first_blob(files): b"x"}), "the archive is not what its name says"),
    (
        "a blob of no manifest",
        lambda files: files.update({f"blobs/sha256/00/{'0' * 64}": b""}),
        "no manifest before it",
    ),
    ("misplaced", lambda files: rename(files, first_blob(files), f"blobs/sha256/zz/{'0' * 64}"), "no bundle has such"),
    (
        "another commit",
        lambda files: rename(files, manifest_of(files, "org/top"), f"org/top/commits/{'0' * 40}.json"),
        "has other contents",
    ),
    (
        "another repository",
        lambda files: rename(files, (name := manifest_of(files, "org/top")), name.replace("org/", "evil/")),
        "answers for org/top",
    ),
    ("no repository", lambda files: files.update({f"..x/a b/commits/{'0' * 40}.json": b"{}"}), "not name a kernel"),
    ("part of kernelhub", embedded, "comes from nowhere else"),
    ("not in the lock", unread, "what its lock does not name: org/evil@"),
    ("no manifest", lambda files: files.pop(manifest_of(files, "org/base")), "no manifest before it|does not have it"),
    ("files of another digest", other_archive, "is not what was published"),
    (
        "another digest in the lock",
        lambda files: set_lock(files, lambda text: text.replace('"digest": "sha256-', '"digest": "sha256-x')),
        "the lock says",
    ),
    (
        "another build than the lock's",
        lambda files: replace_base(files, kernel_files("VALUE = 'other'\n", name="base")),
        "the lock says",
    ),
]


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_what_is_not_as_bundles_are_is_refused_and_nothing_is_installed(bundle, make_hub, tmp_path, change, words):
    store = make_hub().store
    path = rewritten(bundle, tmp_path, change)
    with pytest.raises((IntegrityError, InvalidMetadata), match=words):
        install(path, store)
    assert [item.name for item in (store.root / "bundles").iterdir()] == []
    assert not (tmp_path / "inside" / "evil").exists()


def test_the_copy_that_hostile_ones_are_made_of_installs(bundle, make_hub, tmp_path):
    install(rewritten(bundle, tmp_path, lambda files: None), make_hub().store)


def test_an_archive_before_its_manifest_a_path_twice_a_link_and_other_files_are_refused(bundle, make_hub, tmp_path):
    files, path = read(bundle.read_bytes()), tmp_path / "a.khb"
    blobs_first = sorted(files, key=lambda name: (name != "bundle.json", not name.startswith("blobs/")))
    path.write_bytes(tar_of({name: files[name] for name in blobs_first}))
    with pytest.raises(IntegrityError, match="no manifest before it names this archive"):
        install(path, make_hub().store)
    twice = read(bundle.read_bytes())
    path.write_bytes(tar_of({**twice, "Kernels.lock": b"{}"}))
    with pytest.raises(IntegrityError, match="cannot both be there"):
        install(path, make_hub().store)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo("bundle.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    for data in (zstandard.compress(out.getvalue()), b"", b"PK\x03\x04", b"\x28\xb5\x2f\xfd"):
        path.write_bytes(data)
        with pytest.raises(IntegrityError):
            install(path, make_hub().store)
    with pytest.raises(InvalidReference, match="no such file"):
        install(tmp_path / "none.khb", make_hub().store)
    with pytest.raises(InvalidReference, match="it cannot be read: Is a directory"):
        install(tmp_path, make_hub().store)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.98])
def test_a_bundle_that_ends_early_is_refused(bundle, make_hub, tmp_path, share):
    data, path = bundle.read_bytes(), tmp_path / "cut.khb"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises((IntegrityError, InvalidMetadata)):
        install(path, make_hub().store)
    assert [item.name for item in (make_hub().store.root / "bundles").iterdir()] == []


def test_no_changed_byte_gets_through(bundle, make_hub, tmp_path):
    """In the file as it is, and in the tar inside of it, where no checksum of the compression helps."""
    store, path = make_hub().store, tmp_path / "a.khb"
    data = bundle.read_bytes()
    tar = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    for whole, packed in ((data, bytes), (tar, zstandard.compress)):
        for place in range(0, len(whole), max(1, len(whole) // 60)):
            path.write_bytes(packed(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]))
            try:
                install(path, store)
            except (IntegrityError, InvalidMetadata):
                continue
            files = read(path.read_bytes())  # what is in no hash: spaces in JSON, times, a reference's signature
            assert {name: files[name] for name in files if name.startswith("blobs/")} == {
                name: content for name, content in read(data).items() if name.startswith("blobs/")
            }
            assert {manifest_of(files, str(repo)) for repo in (TOP, BASE)} == {
                manifest_of(read(data), str(repo)) for repo in (TOP, BASE)
            }


def test_a_bomb_is_refused_before_it_fills_the_disk(bundle, make_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(unbundling, "_LIMITS", replace(unbundling._LIMITS, free_bytes=1 << 20))
    path = rewritten(bundle, tmp_path, lambda files: files.update({f"revocations/{'0' * 32}.json": b"0" * (4 << 20)}))
    with pytest.raises(IntegrityError, match="it unpacks to more than"):
        install(path, make_hub().store)
    path = rewritten(bundle, tmp_path, lambda files: files.update({"bundle.json": b" " * (1 << 17)}))
    with pytest.raises(InvalidMetadata, match="it has more than 65,536 bytes"):
        install(path, make_hub().store)


# The commands


@pytest.fixture
def kernelhub(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in os.environ if name.startswith(("KERNEL", "HF_", "LOCAL_KERNELS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KERNELHUB_OFFLINE", "1")
    monkeypatch.setenv("KERNELHUB_BUILD", "never")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))

    def command(*arguments: object, store: str = "inside", hubs: object = "") -> tuple[int, str, str]:
        monkeypatch.setenv("KERNELHUB_CACHE", str(tmp_path / store))
        monkeypatch.setenv("KERNELHUB_HUBS", str(hubs))
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_the_commands_make_install_list_and_remove(kernelhub, origin, tmp_path):
    path = tmp_path / "ü.khb"
    code, out, err = kernelhub("bundle", "create", path, "org/base@v1", "--json", hubs=origin, store="outside")
    assert code == 0, err
    assert [row["kernel"] for row in json.loads(out)["kernels"]] == ["org/base@v1"]
    first = path.read_bytes()
    assert kernelhub("bundle", "create", path, "org/base@v1", hubs=origin, store="outside")[0] == 0
    assert path.read_bytes() == first
    code, out, err = kernelhub("bundle", "install", path, "--lockfile", tmp_path / "got.lock")
    assert code == 0, err
    assert "org/base@v1" in out
    lock = LockFile.parse((tmp_path / "got.lock").read_bytes())
    assert [str(kernel) for kernel in lock.kernels] == ["org/base@v1"]
    assert kernelhub("get", "org/base@v1")[0] == 4
    assert kernelhub("get", "org/base@v1", "--trust", "org/base")[0] == 0
    assert "org/base" in kernelhub("bundle", "list")[1]
    assert kernelhub("bundle", "remove", "org/base")[0] == 0
    assert json.loads(kernelhub("bundle", "list", "--json")[1])["kernels"] == []
    assert kernelhub("get", "org/base@v1", "--trust", "org/base")[0] == 1


def test_a_bundle_of_a_lock_has_its_commits(kernelhub, origin, tmp_path):
    project = write_files(tmp_path / "p", {"pyproject.toml": b'[tool.kernelhub.dependencies]\n"org/base" = 1\n'})
    assert kernelhub("lock", project, hubs=origin)[0] == 0
    commit = LockFile.parse((project / "kernels.lock").read_bytes()).kernels[0].commit
    publish(write_kernel(tmp_path / "n", code="VALUE = 2\n", name="base"), str(origin), BASE, epoch=EPOCH + 1)
    yank(str(origin), BASE, "v1", "wrong")
    code, out, err = kernelhub(
        "bundle", "create", tmp_path / "a.khb", "--lockfile", project / "kernels.lock", "--json", hubs=origin
    )
    assert code == 0, err
    assert [row["commit"] for row in json.loads(out)["kernels"]] == [commit]


def test_wrong_use_and_wrong_files_end_with_their_codes(kernelhub, tmp_path):
    (tmp_path / "a.khb").write_bytes(b"hello")
    assert kernelhub("bundle", "install", tmp_path / "a.khb")[0] == 4
    assert kernelhub("bundle", "install", tmp_path / "none.khb")[0] == 2
    assert kernelhub("bundle", "create", tmp_path / "b.khb")[0] == 2
    assert kernelhub("bundle", "create", tmp_path / "b.khb", "org/none@v1")[0] == 1
    assert not (tmp_path / "b.khb").exists()
    for command in ("create", "install", "list", "remove"):
        code, out, _ = kernelhub("bundle", command, "--help")
        assert (code, "--json" in out) == (0, True)
