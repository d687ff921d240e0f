"""Signatures, revocation lists and the gate, against hubs in folders and on loopback, as an attacker would have them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kernelfiles import MemorySource, kernel_files, write_kernel
from layout_fixtures import EPOCH, Web, agent, s3_bucket, serving

import kernelhub
from kernelhub import Hub, Settings
from kernelhub.cli.main import run
from kernelhub.core.canonical import b64, canonical_json, sha256_hex
from kernelhub.core.host import Host
from kernelhub.core.lockfile import LockedKernel, LockFile
from kernelhub.core.manifest import Manifest, ManifestDocument
from kernelhub.core.refs import KernelRef, RepoId
from kernelhub.core.revocations import Revocations, RevocationsDocument
from kernelhub.core.signatures import MAX_SIGNATURES, PublicKey, Signature
from kernelhub.core.trust import Origin, TrustedKey
from kernelhub.errors import (
    HubUnavailable,
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelHubWarning,
    KernelNotFound,
    MissingDependency,
    UntrustedKernel,
)
from kernelhub.hub import signing, store_files
from kernelhub.hub import store as store_module
from kernelhub.hub.archive import pack
from kernelhub.hub.publish import publish, sign
from kernelhub.hub.revocations import revoke
from kernelhub.hub.signing import Signer, generate, load_signer, right_signers
from kernelhub.hub.sources.base import Moved
from kernelhub.hub.sources.layout import LayoutSource, blob_path
from kernelhub.hub.sources.local import local_source
from kernelhub.hub.sources.project import ProjectSource
from kernelhub.hub.store import Store
from kernelhub.hub.store_files import remove_tree
from kernelhub.hub.verify import LARGE, scan, stamps

HOST = Host(python=(3, 11), torch=(2, 13), backend="cpu", cpu="x86_64", os="linux")
REPO = RepoId("org", "small")
SMALL = KernelRef.parse("org/small@v1")


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Signer]:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "bob", "eve"):
        generate(folder / name)
    return {name: load_signer(folder / name) for name in ("alice", "bob", "eve")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def web(root: Path) -> Iterator[Web]:
    root.mkdir()
    with serving(root) as served:
        yield served


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(tmp_path: Path, web: Web, clock: Clock) -> Callable[..., Hub]:
    """A client of the hub on the web host, who trusts these keys and nothing else."""

    def make(*trusted: Signer | str | TrustedKey, store: str = "store", source: Any = None, **settings: Any) -> Hub:
        found = tuple(
            item
            if isinstance(item, TrustedKey)
            else TrustedKey.parse(item if isinstance(item, str) else str(item.public))
            for item in trusted
        )
        made = Settings(cache=tmp_path / store, trusted_keys=found, build="never", **settings)
        sources = [LayoutSource(web.url, agent) if source is None else source]
        return Hub(made, sources=sources, host=HOST, clock=clock)

    return make


def put(
    root: Path, folder: Path, signer: Signer | None = None, *, code: str = "VALUE = 1\n", name: str = "org/small"
) -> str:
    """Publish a kernel with this code; its commit."""
    shutil.rmtree(folder, ignore_errors=True)
    repo = RepoId.parse(name)
    write_kernel(folder, code=code, name=repo.name)
    return publish(folder, str(root), repo, epoch=EPOCH, signer=signer).commit


@pytest.fixture
def published(root: Path, tmp_path: Path, web: Web) -> Callable[..., str]:
    return lambda signer=None, **kernel: put(root, tmp_path / "kernel", signer, **kernel)


def manifest_path(root: Path, commit: str) -> Path:
    return root / "org/small/commits" / f"{commit}.json"


def resign(root: Path, commit: str, *signatures: Signature) -> None:
    path = manifest_path(root, commit)
    document = ManifestDocument.parse(path.read_bytes())
    path.write_bytes(ManifestDocument(document.manifest, signatures).to_bytes())


def refused(hub: Hub, match: str = "nobody who is trusted for it signed it", ref: KernelRef = SMALL) -> None:
    with pytest.raises(UntrustedKernel, match=match):
        hub.load(ref)


# Keys


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_key_needs_a_name(path: str) -> None:
    with pytest.raises(InvalidReference, match="no name for a key"):
        generate(Path(path))


def test_a_key_is_two_files_and_only_its_owner_reads_the_private_one(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "my key"
    before = os.umask(0)
    try:
        key = generate(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.with_name("my key.pub").read_text() == f"{key} {key.id}\n"
    assert key.id in path.read_text().splitlines()[0]
    assert load_signer(path).public == key
    assert PublicKey.parse(str(key)) == key


@pytest.mark.parametrize("there", ["key", "key.pub"])
def test_no_key_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(InvalidReference, match="is there already"):
        generate(tmp_path / "key")
    assert (tmp_path / there).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_a_key_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidReference, match="is there already"):
        generate(tmp_path / "key")
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_that_others_can_read_does_not_sign(tmp_path: Path) -> None:
    generate(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(InvalidReference, match="chmod 600"):
        load_signer(tmp_path / "key")
    with pytest.raises(InvalidReference, match="is a public key, which does not sign"):  # others may read it
        load_signer(tmp_path / "key.pub")


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\xff" * 100, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_what_is_no_key_does_not_sign(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InvalidReference, match="holds no private key"):
        load_signer(path)
    with pytest.raises(InvalidReference, match="cannot read the key"):
        load_signer(tmp_path / "none")


def test_keys_of_other_kinds_do_not_sign(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "key"
    path.write_bytes(pem)
    path.chmod(0o600)
    with pytest.raises(InvalidReference, match="is no Ed25519 key"):
        load_signer(path)


@pytest.mark.parametrize(
    "text", ["", "ed25519:", "ed25519:AAAA", "rsa:" + "A" * 43 + "=", "A" * 43 + "=", "ed25519:!" + "A" * 42 + "="]
)
def test_what_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference, match="is not a public key"):
        PublicKey.parse(text)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, keys: dict[str, Signer]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    with pytest.raises(MissingDependency, match=r"kernelhub\[signatures\]"):
        right_signers(b"", [Signature(keys["alice"].public.id, "")], [keys["alice"].public])


def test_only_right_signatures_of_the_named_keys_count(keys: dict[str, Signer]) -> None:
    alice, bob = keys["alice"], keys["bob"]
    right = alice.sign(b"text")
    bad = [
        alice.sign(b"other text"),
        Signature(alice.public.id, bob.sign(b"text").ed25519),
        Signature(alice.public.id, ""),
        Signature(alice.public.id, "not base64"),
        Signature(alice.public.id, base64.b64encode(b"short").decode()),
        Signature("", right.ed25519),
        Signature(bob.public.id, right.ed25519),
    ]
    both = [alice.public, bob.public]
    assert right_signers(b"text", bad, both) == []
    assert right_signers(b"text", [*bad, right], both) == [alice.public]
    assert right_signers(b"text", [right], [bob.public]) == []


# The gate: a signature


def test_a_kernel_signed_by_a_trusted_key_runs_and_the_hub_is_asked_for_nothing_more(
    client, published, keys, web
) -> None:
    published(keys["alice"])
    hub = client(keys["alice"])
    assert hub.load(SMALL).module.VALUE == 1
    paths = [path.lstrip("/").split("/")[0] for path, _ in web.requests]
    # hub.json once a day, the key's revocation list once an hour, and then what every cold load takes
    assert sorted(paths) == ["blobs", "hub.json", "org", "org", "revocations"]


def test_a_description_says_why_it_is_not_trusted(client, published, keys, root) -> None:
    commit = published(keys["alice"])
    assert "nothing vouches for" in client().describe(SMALL)["untrusted"]
    revoke(str(root), keys["alice"], time="t", keys={}, commits={commit: "wrong"})
    facts = client(keys["alice"], trust=("org/*",), store="two").describe(SMALL)
    assert (facts["trusted"], "wrong" in facts["untrusted"], "stop trusting" in facts["hint"]) == (None, True, True)


def test_the_reason_names_the_key(client, published, keys) -> None:
    published(keys["alice"])
    facts = client(keys["alice"]).describe(SMALL)
    assert facts["trusted"] == f"it is signed by key {keys['alice'].public.id}, which the user trusts"


@pytest.mark.parametrize("signer", [None, "eve"])
def test_a_kernel_that_no_trusted_key_signed_is_refused_before_it_is_fetched(
    client, published, keys, web, signer
) -> None:
    published(keys[signer] if signer else None)
    refused(client(keys["alice"]))
    assert not [path for path, _ in web.requests if path.startswith("/blobs")]


def test_a_signature_over_another_commit_is_none(client, published, keys, root) -> None:
    first = published(keys["alice"])
    second = published(code="VALUE = 'evil'\n")
    good = ManifestDocument.parse(manifest_path(root, first).read_bytes()).signatures
    resign(root, second, *good)
    refused(client(keys["alice"]))


def test_a_signature_under_the_name_of_a_trusted_key_is_none(client, published, keys, root) -> None:
    commit = published(keys["eve"])
    document = ManifestDocument.parse(manifest_path(root, commit).read_bytes())
    resign(root, commit, Signature(keys["alice"].public.id, document.signatures[0].ed25519))
    refused(client(keys["alice"]))


def test_another_repositorys_signed_manifest_is_not_this_ones(client, published, keys, root) -> None:
    """A hub serves a kernel that is signed, under the name of another."""
    commit = published(keys["alice"], name="org/other")
    for part in ("refs", "commits"):
        shutil.copytree(root / "org/other" / part, root / "org/small" / part)
    with pytest.raises(IntegrityError, match="answers for org/other"):
        client(keys["alice"]).load(SMALL)
    assert (root / f"org/small/commits/{commit}.json").is_file()


def test_another_version_that_is_signed_is_not_the_one_that_was_asked_for(client, published, keys, root) -> None:
    published(keys["alice"])
    shutil.copy(root / "org/small/refs/v1", root / "org/small/refs/v2")
    with pytest.raises(IntegrityError, match="org/small@v2 is .* a version 1"):
        client(keys["alice"]).load(KernelRef.parse("org/small@v2"))


def test_a_branch_that_is_called_as_a_version_holds_that_version(client, published, keys, root, tmp_path) -> None:
    write_kernel(tmp_path / "second", code="VALUE = 2\n", version=2)
    second = publish(tmp_path / "second", str(root), REPO, epoch=EPOCH, signer=keys["alice"]).commit
    published(keys["alice"])
    (root / "org/small/refs/v1").write_text(f"{second}\n")
    with pytest.raises(IntegrityError, match="a version 2"):
        client(keys["alice"]).load(KernelRef.of("org/small", revision="v1"))


def test_signatures_that_a_hub_no_longer_shows_still_hold_offline(client, published, keys, root) -> None:
    commit = published(keys["alice"])
    assert client(keys["alice"]).load(SMALL)
    resign(root, commit)
    refused(client(keys["bob"]))  # who asks the hub again, whether bob has signed it meanwhile
    assert client(keys["alice"], offline=True).load(SMALL)


def test_signatures_that_a_hub_no_longer_shows_still_hold_where_it_shows_as_many_others_as_there_may_be(
    client, published, keys, root
) -> None:
    commit = published(keys["alice"])
    assert client(keys["alice"]).load(SMALL)
    resign(root, commit, *(Signature(f"{number:032x}", b64(b"x" * 64)) for number in range(MAX_SIGNATURES)))
    assert client(keys["alice"]).load(SMALL, refresh=True)
    assert client(keys["alice"], offline=True).load(SMALL)


@pytest.mark.parametrize("trust", [None, 1, 0, 5.0, b"org/small", {"org/small": False}, [["org/small"]], [None]])
def test_trust_that_is_neither_a_list_nor_yes_or_no_is_an_error(client, published, trust) -> None:
    published()
    with pytest.raises(InvalidReference):
        client().load(SMALL, trust_remote_code=trust)


def test_trust_may_be_given_by_what_can_be_read_once(client, published) -> None:
    published()
    assert client().load(SMALL, trust_remote_code=(name for name in ["org/small"]))


def test_what_a_hub_says_steers_no_terminal(client, published, root, clock) -> None:
    commit = published()
    assert client(trust=("org/*",)).load(SMALL)
    (root / "org/small/refs/v1").write_text(f"{commit}\nyanked: \x1b[2J\x9b\x07{'A' * 9999}\n")
    clock.now += 4000
    with pytest.warns(KernelHubWarning, match="was withdrawn") as warned:
        client(trust=("org/*",)).load(SMALL)
    assert all(char.isprintable() or char == "\n" for char in str(warned[0].message))
    assert len(str(warned[0].message)) < 500
    with pytest.raises(KernelNotFound, match="was withdrawn") as refusal:
        client(trust=("org/*",), store="two").load(SMALL)
    assert all(char.isprintable() or char == "\n" for char in str(refusal.value))


def test_archives_and_metadata_are_those_that_were_signed(client, published, keys, root) -> None:
    commit = published(keys["alice"])
    evil = published(code="VALUE = 'evil'\n")
    signed = ManifestDocument.parse(manifest_path(root, commit).read_bytes()).manifest.variants["torch-cpu"].archive
    other = ManifestDocument.parse(manifest_path(root, evil).read_bytes()).manifest.variants["torch-cpu"].archive
    (root / "org/small/refs/v1").write_text(f"{commit}\n")
    shutil.copy(root / f"blobs/sha256/{other[:2]}/{other}", root / f"blobs/sha256/{signed[:2]}/{signed}")
    with pytest.raises(IntegrityError):
        client(keys["alice"]).load(SMALL)


def test_several_keys_may_be_trusted_and_a_kernel_may_be_signed_by_several(client, published, keys, root) -> None:
    commit = published(keys["alice"])
    assert client(keys["bob"], keys["alice"]).load(SMALL)
    refused(client(keys["bob"], store="two"))
    sign(str(root), REPO, commit, keys["bob"])
    assert client(keys["bob"], store="three").load(SMALL).repo_info.revision == commit
    assert client(keys["alice"], store="four").load(SMALL)


def test_a_signature_that_is_added_later_counts_and_changes_no_commit(client, published, keys, root, web) -> None:
    commit = published()
    hub = client(keys["alice"])
    refused(hub)
    sign(str(root), REPO, commit, keys["alice"])
    assert client(keys["alice"]).load(SMALL).repo_info.revision == commit
    web.requests.clear()
    assert client(keys["alice"], offline=True).load(SMALL)
    assert web.requests == []


def test_a_key_of_one_publisher_does_not_sign_for_another(client, published, keys, web) -> None:
    published(keys["alice"])
    refused(client(f"other/*={keys['alice'].public}"), "no key or identity is trusted for it")
    refused(client(f"https://elsewhere.example/org/*={keys['alice'].public}"), "no key or identity is trusted for it")
    assert client(f"org/small={keys['alice'].public}").load(SMALL)
    assert client(f"{web.url}/org/*={keys['alice'].public}", store="two").load(SMALL)


def test_offline_the_signature_is_checked_again_from_what_was_fetched(client, published, keys, web) -> None:
    published(keys["alice"])
    client(keys["alice"]).load(SMALL)
    web.requests.clear()
    assert client(keys["alice"], offline=True).load(SMALL).module.VALUE == 1
    refused(client(keys["bob"], offline=True))
    refused(client(offline=True), "does not mark trusted publishers")
    assert web.requests == []


def test_whoever_writes_the_store_cannot_pass_for_the_signer(client, published, keys, tmp_path, root) -> None:
    published(keys["alice"])
    loaded = client(keys["alice"]).load(SMALL)
    variant = loaded.path
    evil = kernel_files("VALUE = 'evil'\n")
    for folder in (variant.parent, variant):
        folder.chmod(0o755)
    for name, data in evil.items():
        (variant / name).chmod(0o644)
        (variant / name).write_bytes(data)
    from kernelhub.hub.verify import learn

    known = learn(variant)
    record = variant.with_name(f"{variant.name}.json")
    record.write_bytes(canonical_json({"files": known.files, "stamps": known.stamps}))
    with pytest.raises(IntegrityError, match="is not what the commit"):
        client(keys["alice"], offline=True).load(SMALL)


def alter_large_file(variant: Path) -> None:
    """As somebody does who can write to the store and knows how it remembers what was hashed."""
    variant.chmod(0o755)
    large = variant / "large.py"
    large.chmod(0o644)
    large.write_bytes(b"VALUE = 666" + large.read_bytes()[11:])
    record = variant.with_name(f"{variant.name}.json")
    noted = json.loads(record.read_bytes())
    record.write_bytes(canonical_json({**noted, "stamps": stamps(scan(variant))}))


@pytest.mark.parametrize("way", ["load", "install", "verify", "digest of a kernel that nobody signed"])
def test_the_stores_note_of_when_a_large_file_was_hashed_stands_in_for_no_hash(
    client, root, keys, tmp_path, web, way
) -> None:
    large = "VALUE = 1  #" + "x" * LARGE
    write_kernel(tmp_path / "kernel", code={"__init__.py": "from .large import VALUE\n", "large.py": large})
    publish(tmp_path / "kernel", str(root), REPO, epoch=EPOCH, signer=keys["alice"])
    alter_large_file(client(keys["alice"]).install(SMALL))
    hub = client(keys["alice"], offline=True)
    steps: dict[str, Callable[[], object]] = {
        "load": lambda: hub.load(SMALL).module.VALUE,
        "install": lambda: hub.install(SMALL),
        "verify": lambda: hub.verify(SMALL),
        "digest of a kernel that nobody signed": lambda: client(offline=True).digest_of(SMALL, "torch-cpu"),
    }
    with pytest.raises(IntegrityError, match="is not what was published"):
        steps[way]()


def test_a_signature_over_metadata_without_a_digest_is_none(client, published, keys, root) -> None:
    """Its archive is named by the manifest, and the files in the store by nothing that is signed."""
    commit = published()
    files = kernel_files("VALUE = 1\n", digest=False)
    archive = pack(files)
    blob = root / blob_path(sha256_hex(archive))
    blob.parent.mkdir(parents=True)
    blob.write_bytes(archive)
    raw = json.loads(manifest_path(root, commit).read_bytes())["manifest"]
    raw["variants"]["torch-cpu"] |= {
        "archive": sha256_hex(archive),
        "size": len(archive),
        "metadata": files["metadata.json"].decode(),
    }
    document = ManifestDocument(Manifest.from_raw(raw))
    commit = document.manifest.commit
    manifest_path(root, commit).write_bytes(document.signed(keys["alice"].sign(document.payload)).to_bytes())
    (root / "org/small/refs/v1").write_text(f"{commit}\n")
    assert client(trust=("org/*",), store="two").load(SMALL).module.VALUE == 1
    refused(client(keys["alice"]), "is signed, and its metadata.json has no digest")


def test_the_stores_note_of_what_to_fetch_does_not_stand_in_for_the_manifest(
    client, published, keys, root, tmp_path
) -> None:
    """listing.json is not signed: with it altered, another archive of the hub's would be fetched and loaded."""
    commit = published(keys["alice"])
    evil = published(code="VALUE = 'evil'\n")
    (root / "org/small/refs/v1").write_text(f"{commit}\n")
    client(keys["alice"]).describe(SMALL)
    other = ManifestDocument.parse(manifest_path(root, evil).read_bytes()).manifest.variants["torch-cpu"]
    (listing,) = (tmp_path / "store").rglob("listing.json")
    listing.write_text(json.dumps({"variants": {"torch-cpu": other.to_json()}, "parts": {}}))
    remove_tree(next((tmp_path / "store").rglob("torch-cpu")))
    assert client(keys["alice"]).load(SMALL).module.VALUE == 1


def test_an_altered_manifest_in_the_store_is_no_signed_one(client, published, keys, tmp_path) -> None:
    published(keys["alice"])
    client(keys["alice"]).load(SMALL)
    (manifest,) = (tmp_path / "store").rglob("manifest.json")
    document = json.loads(manifest.read_text())
    document["manifest"]["version"] = 2
    manifest.write_text(json.dumps(document))
    refused(client(keys["alice"], offline=True))
    assert client(keys["alice"]).load(SMALL)  # online the hub is asked again


def test_a_manifest_with_too_many_signatures_is_malformed(client, published, keys, root) -> None:
    commit = published()
    resign(root, commit, *[Signature("0" * 32, "AAAA")] * 65)
    with pytest.raises(InvalidMetadata, match="65 of them; the most is 64"):
        client(keys["alice"]).load(SMALL)


@pytest.mark.parametrize("value", [5, "x", [5], [{}], [{"key": 1, "ed25519": "x"}], [{"key": "x"}], None])
def test_malformed_signatures_are_an_error(client, published, keys, root, value) -> None:
    path = manifest_path(root, published())
    path.write_text(json.dumps({**json.loads(path.read_text()), "signatures": value}))
    with pytest.raises(InvalidMetadata, match="signatures"):
        client(keys["alice"]).load(SMALL)


# require_signature


def test_a_required_signature_is_required_of_every_source(client, published, keys, root, tmp_path) -> None:
    published()
    everything: dict[str, Any] = {"require_signature": True, "trust": ("org/*",)}
    for source in (
        None,
        LayoutSource(str(root), agent),
        MemorySource({"org/small": {"torch-cpu": kernel_files()}}, trusted=True),
        local_source(write_kernel(tmp_path / "mine"), REPO)[0],
    ):
        hub = client(keys["alice"], source=source, **everything)
        for step in (hub.install, hub.has, hub.load):
            with pytest.raises(UntrustedKernel, match="a signature is required"):
                step(SMALL, trust_remote_code=True)
    with pytest.raises(UntrustedKernel, match="a signature is required"):
        client(**everything).load_local(tmp_path / "mine", trust_remote_code=True)


def test_a_required_signature_that_is_there_is_enough(client, published, keys, root) -> None:
    published(keys["alice"])
    assert client(keys["alice"], require_signature=True).load(SMALL)
    folder = LayoutSource(str(root), agent)
    assert client(keys["alice"], source=folder, require_signature=True, store="two").load(SMALL)


def test_the_kernels_of_this_package_need_none(client) -> None:
    hub = client(source=ProjectSource.embedded(), require_signature=True)
    assert hub.has(KernelRef.parse("kernelhub/norm@v1"))


# One gate for every way in


def ways_in(hub: Hub, tmp_path: Path, commit: str) -> dict[str, Callable[[], object]]:
    lock = tmp_path / "kernels.lock"
    lock.write_text(LockFile((LockedKernel(REPO, commit),)).to_text())
    top = write_kernel(tmp_path / "top", name="top", kernel_depends=[{"repo-id": "org/small", "version": 1}])
    return {
        "get": lambda: hub.load(SMALL),
        "pinned": lambda: hub.load(KernelRef.parse(f"org/small@{commit}")),
        "has": lambda: hub.has(SMALL),
        "install": lambda: hub.install(SMALL),
        "lock": lambda: hub.load_locked(REPO, lockfile=lock),
        "offline lock": lambda: hub.load_locked(REPO, lockfile=lock, local_files_only=True),
        "offline": lambda: hub.without_network().load(SMALL),
        "dependency": lambda: hub.load_local(top),
        "benchmarks": lambda: hub.benchmarks(SMALL),
    }


WAYS = ("get", "pinned", "has", "install", "lock", "offline lock", "offline", "dependency", "benchmarks")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_goes_through_the_gate(client, published, keys, tmp_path, way) -> None:
    commit = published(keys["eve"])
    client(keys["eve"]).load(SMALL)  # it is in the store, from when somebody trusted it
    with pytest.raises(UntrustedKernel, match="nobody who is trusted for it signed it"):
        ways_in(client(keys["alice"]), tmp_path, commit)[way]()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "benchmarks"])
def test_every_way_in_is_open_to_what_is_signed(client, published, keys, tmp_path, way) -> None:
    commit = published(keys["alice"])
    client(keys["alice"]).load(SMALL)
    assert ways_in(client(keys["alice"]), tmp_path, commit)[way]()


@pytest.mark.parametrize("way", WAYS)
def test_no_way_in_is_open_to_what_is_revoked(client, published, keys, tmp_path, root, clock, way) -> None:
    commit = published(keys["alice"])
    hub = client(keys["alice"])
    hub.load(SMALL)
    revoke(str(root), keys["alice"], time="t", keys={}, commits={commit: "it leaks memory"})
    clock.now += 4000
    with pytest.raises(UntrustedKernel, match="it leaks memory"):
        client(keys["alice"]).load(SMALL)
    with pytest.raises(UntrustedKernel, match="no longer counts.*it leaks memory"):
        ways_in(client(keys["alice"], trust=("org/*",)), tmp_path, commit)[way]()


def test_functions_layers_and_configs_go_through_the_gate(client, published, keys, monkeypatch, tmp_path) -> None:
    from torch import nn

    from kernelhub import LayerRepository, LockedLayerRepository, use_kernel_forward_from_hub
    from kernelhub.config.kernel_config import KernelConfig
    from kernelhub.hub.client import set_default_hub

    commit = published(keys["eve"])
    hub = client(keys["alice"])
    set_default_hub(hub)
    lock = tmp_path / "kernels.lock"
    lock.write_text(LockFile((LockedKernel(REPO, commit),)).to_text())
    Model = use_kernel_forward_from_hub("Layer")(type("Model", (nn.Linear,), {"forward": lambda self, x: x}))
    try:
        client(keys["eve"]).load(SMALL)  # it is in the store, from when somebody trusted it
        for function, arguments in (
            (kernelhub.get_kernel, {"version": 1}),
            (kernelhub.has_kernel, {"version": 1}),
            (kernelhub.install_kernel, {"version": 1}),
            (kernelhub.install_kernel, {"version": 1, "local_files_only": True}),
            (kernelhub.get_locked_kernel, {"lockfile": lock}),
            (kernelhub.load_kernel, {"lockfile": lock}),
        ):
            with pytest.raises(UntrustedKernel):
                function("org/small", **arguments)
        for repository in (
            LayerRepository("org/small", layer_name="Layer", version=1),
            LockedLayerRepository("org/small", layer_name="Layer", lockfile=lock),
        ):
            with pytest.raises(UntrustedKernel):
                repository.kernel(hub)
        config = KernelConfig.from_dict(
            {"schema_version": 1, "kernel_mapping": {"Layer": {"cpu": "org/small@v1:Layer"}}}
        )
        with pytest.raises(UntrustedKernel):
            config.apply(Model(2, 2))
    finally:
        set_default_hub(None)


def test_of_a_redirect_the_destinations_trust_counts(client, keys) -> None:
    class Redirecting(MemorySource):
        def listing(self, repo, commit):
            if repo.org == "old":
                raise Moved(KernelRef.parse("evil/small@v1"))
            return super().listing(repo, commit)

    files = {"torch-cpu": kernel_files()}
    source = Redirecting({"evil/small": files, "old/small": files}, trusted=False)
    with pytest.raises(UntrustedKernel, match="evil/small"):
        client(source=source, trust=("old/*",)).load(KernelRef.parse("old/small@v1"))


def test_a_pattern_may_name_the_hub(client, published, web) -> None:
    published()
    refused(client(trust=("https://elsewhere.example/org/*",)), "does not mark trusted publishers")
    assert client(trust=(f"{web.url}/org/small",)).load(SMALL)
    with pytest.raises(UntrustedKernel) as caught:
        client(store="two").load(SMALL)
    assert f'trust_remote_code=["{web.url}/org/small"]' in str(caught.value)


# Revocation


def test_a_revoked_key_signs_no_more_and_another_goes_on(client, published, keys, root) -> None:
    commit = published(keys["alice"])
    revoke(str(root), keys["bob"], time="t", keys={keys["alice"].public.id: "it was stolen"}, commits={})
    assert client(keys["alice"]).load(SMALL)  # who does not trust bob does not hear him
    refused(client(keys["alice"], keys["bob"], store="two"), "the key that signed it is revoked")
    sign(str(root), REPO, commit, keys["bob"])
    assert client(keys["alice"], keys["bob"], store="three").load(SMALL)


def test_a_stolen_key_cannot_unsay_what_was_revoked(client, published, keys, root) -> None:
    """Whoever has the key of alice revokes bob's, who revoked it: then neither counts, and what bob revoked stays so."""
    commit = published(keys["bob"])
    revoke(str(root), keys["bob"], time="t", keys={keys["alice"].public.id: "stolen"}, commits={commit: "wrong"})
    revoke(str(root), keys["alice"], time="t", keys={keys["bob"].public.id: "stolen"}, commits={})
    refused(client(keys["alice"], keys["bob"]), "wrong")


def test_a_revoked_commit_is_refused_offline_and_from_folders_and_from_other_hubs(
    client, published, keys, root, tmp_path, clock
) -> None:
    commit = published(keys["alice"])
    client(keys["alice"]).load(SMALL)
    revoke(str(root), keys["alice"], time="t", keys={}, commits={commit: "wrong results"})
    clock.now += 4000
    client(keys["alice"]).has(KernelRef.parse("org/small@main"))
    refused(client(keys["alice"], offline=True), "wrong results")
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    shutil.rmtree(copy / "revocations")
    refused(client(keys["alice"], source=LayoutSource(str(copy), agent)), "wrong results")


@pytest.mark.parametrize("pin", ["v1", "commit"])
def test_a_folder_hubs_list_is_read_offline_and_for_pinned_commits(client, published, keys, root, pin) -> None:
    commit = published(keys["alice"])
    ref = SMALL if pin == "v1" else KernelRef.parse(f"org/small@{commit}")
    folder = LayoutSource(str(root), agent)
    assert client(keys["alice"], source=folder, offline=True).load(ref)
    revoke(str(root), keys["alice"], time="t", keys={}, commits={commit: "wrong"})
    refused(client(keys["alice"], source=folder, offline=True), "wrong", ref)


def test_asking_again_asks_for_the_lists_of_a_pinned_commit(client, published, keys, root, web) -> None:
    commit = published(keys["alice"])
    ref = KernelRef.parse(f"org/small@{commit}")
    client(keys["alice"]).load(ref)
    revoke(str(root), keys["alice"], time="t", keys={}, commits={commit: "wrong"})
    web.requests.clear()
    assert client(keys["alice"]).load(ref)
    assert web.requests == []
    with pytest.raises(UntrustedKernel, match="wrong"):
        client(keys["alice"]).load(ref, refresh=True)


def test_a_list_that_its_key_did_not_sign_is_an_error(client, published, keys, root) -> None:
    published(keys["alice"])
    revoke(str(root), keys["eve"], time="t", keys={}, commits={"0" * 40: ""})
    (found,) = (root / "revocations").iterdir()
    alice = root / "revocations" / f"{keys['alice'].public.id}.json"
    shutil.copy(found, alice)
    with pytest.raises(IntegrityError, match="is one of"):
        client(keys["alice"]).load(SMALL)
    document = json.loads(found.read_text())
    document["revocations"]["key"] = keys["alice"].public.id
    alice.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="is not signed by its key"):
        client(keys["alice"]).load(SMALL)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layout", 2),
        ("number", 0),
        ("number", True),
        ("number", "1"),
        ("keys", []),
        ("commits", {"x": ""}),
        ("keys", {"a" * 32: 1}),
    ],
)
def test_a_malformed_list_is_an_error(client, published, keys, root, key, value) -> None:
    published(keys["alice"])
    revoke(str(root), keys["alice"], time="t", keys={}, commits={"0" * 40: ""})
    path = root / "revocations" / f"{keys['alice'].public.id}.json"
    document = json.loads(path.read_text())
    document["revocations"][key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidMetadata, match="revocations"):
        client(keys["alice"]).load(SMALL)


@pytest.mark.parametrize("way", ["older", "none"])
def test_an_older_list_is_refused_and_the_newest_still_counts(client, published, keys, root, clock, way) -> None:
    commit = published(keys["alice"])
    path = root / "revocations" / f"{keys['alice'].public.id}.json"
    revoke(str(root), keys["alice"], time="t", keys={}, commits={"0" * 40: ""})
    before = path.read_bytes()
    revoke(str(root), keys["alice"], time="t", keys={}, commits={commit: "wrong"})
    refused(client(keys["alice"]), "wrong")
    path.write_bytes(before) if way == "older" else path.unlink()
    clock.now += 4000
    expected = "number 1" if way == "older" else "none"
    with pytest.warns(KernelHubWarning, match=f"had revocation list 2 .* and has {expected} now"):
        refused(client(keys["alice"]), "wrong")


def test_a_hub_that_withholds_its_list_has_not_answered(client, published, keys, web, clock) -> None:
    published(keys["alice"])
    name = f"{keys['alice'].public.id}.json"
    web.answers[name] = [(403, {})] * 3
    with pytest.raises(HubUnavailable):
        client(keys["alice"]).load(SMALL)
    web.answers.clear()
    assert client(keys["alice"]).load(SMALL).module.VALUE == 1
    published(keys["alice"], code="VALUE = 2\n")
    clock.now += 4000
    web.answers[name] = [(403, {})] * 3
    with pytest.warns(KernelHubWarning, match="as it was known before"):
        assert client(keys["alice"]).load(SMALL).module.VALUE == 1


def test_a_damaged_list_in_the_store_is_an_error(client, published, keys, root, tmp_path) -> None:
    published(keys["alice"])
    revoke(str(root), keys["alice"], time="t", keys={}, commits={"0" * 40: ""})
    client(keys["alice"]).load(SMALL)
    (path,) = (tmp_path / "store" / "revocations").iterdir()
    path.write_text("{}")
    with pytest.raises(IntegrityError, match="is damaged"):
        client(keys["alice"], offline=True).load(SMALL)


def test_the_newest_list_counts_though_the_store_cannot_be_written(client, published, keys, root, monkeypatch) -> None:
    commit = published(keys["alice"])
    path = root / "revocations" / f"{keys['alice'].public.id}.json"
    revoke(str(root), keys["alice"], time="t", keys={}, commits={"0" * 40: ""})
    older = path.read_bytes()
    revoke(str(root), keys["alice"], time="t", keys={}, commits={commit: "wrong"})
    for module in (store_module, store_files):
        monkeypatch.setattr(module, "write_file", lambda *arguments, **more: None)
    hub = client(keys["alice"])
    refused(hub, "wrong")
    path.write_bytes(older)
    refused(hub, "wrong")


def test_of_processes_that_learn_lists_of_a_key_all_that_they_say_stays(tmp_path, keys) -> None:
    store, alice = Store(tmp_path / "store"), keys["alice"].public.id
    for number in (2, 1, 3, 2):
        store.set_revocations(Revocations(alice, number, commits={str(number) * 40: f"of {number}"}))
    kept = store.revocations(alice)
    assert kept is not None
    assert kept.number == 3
    assert kept.commits == {"1" * 40: "of 1", "2" * 40: "of 2", "3" * 40: "of 3"}


def write_list(root: Path, signer: Signer, listed: Revocations) -> None:
    path = root / "revocations" / f"{signer.public.id}.json"
    path.write_bytes(RevocationsDocument(listed, (signer.sign(listed.payload),)).to_bytes())


def test_lists_of_one_key_in_two_hubs_both_count(client, published, keys, root, tmp_path) -> None:
    """Revoked in each by itself, so that both have the number 1."""
    commit = published(keys["alice"])
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    revoke(str(root), keys["alice"], time="t", keys={}, commits={"0" * 40: "another"})
    revoke(str(copy), keys["alice"], time="t", keys={}, commits={commit: "wrong"})
    assert client(keys["alice"]).load(SMALL)
    refused(client(keys["alice"], source=LayoutSource(str(copy), agent)), "wrong")
    refused(client(keys["alice"], offline=True), "wrong")


def test_a_later_list_takes_back_no_revocation(client, published, keys, root, clock) -> None:
    """As one that somebody signed who stole the key, whose signatures no longer count: see the docs."""
    commit = published(keys["bob"])
    revoke(str(root), keys["alice"], time="t", keys={}, commits={commit: "wrong"})
    refused(client(keys["alice"], keys["bob"]), "wrong")
    write_list(root, keys["alice"], Revocations(keys["alice"].public.id, 99, "t"))
    clock.now += 4000
    refused(client(keys["alice"], keys["bob"]), "wrong")


def test_what_is_revoked_after_the_hub_lost_its_list_counts(client, published, keys, root, clock) -> None:
    """Then the key's owner begins again with number 1, and clients that know a higher one must not pass over it."""
    commit = published(keys["alice"])
    for digit in "123":
        revoke(str(root), keys["alice"], time="t", keys={}, commits={digit * 40: ""})
    assert client(keys["alice"]).load(SMALL)
    (root / "revocations" / f"{keys['alice'].public.id}.json").unlink()
    revoke(str(root), keys["alice"], time="t", keys={}, commits={commit: "wrong"})
    clock.now += 4000
    with pytest.warns(KernelHubWarning, match="had revocation list 3 .* and has number 1 now"):
        refused(client(keys["alice"]), "wrong")


def test_lists_that_are_too_large_together_are_an_error(client, published, keys, root, tmp_path, monkeypatch) -> None:
    published(keys["alice"])
    monkeypatch.setattr("kernelhub.core.revocations.MAX_BYTES", 1000)
    lists = [Revocations(keys["alice"].public.id, 1, "t", commits={digit * 40: "x" * 500}) for digit in "12"]
    (root / "revocations").mkdir()
    write_list(root, keys["alice"], lists[0])
    hub = client(keys["alice"])
    assert hub.load(SMALL)
    write_list(root, keys["alice"], lists[1])
    with pytest.raises(IntegrityError, match="do not know of each other"):
        hub.load(SMALL, refresh=True)


def test_a_trusted_key_sends_no_more_requests_to_hubs_without_signatures(client, keys) -> None:
    source = MemorySource({"org/small": {"torch-cpu": kernel_files("MARKED = 1\n")}}, trusted=True)
    assert client(keys["alice"], source=source).load(SMALL)
    assert source.asked == ["resolve", "listing", "publisher_trusted", "fetch"]
    source.asked.clear()
    assert client(keys["alice"], source=source).load(SMALL)
    assert source.asked == []


def test_lists_count_up_and_keep_what_they_have(root, keys, web) -> None:
    revoke(str(root), keys["alice"], time="t1", keys={}, commits={"0" * 40: "one"})
    listed = revoke(str(root), keys["alice"], time="t2", keys={"a" * 32: "two"}, commits={"0" * 40: "other"})
    assert (listed.number, dict(listed.commits), dict(listed.keys)) == (2, {"0" * 40: "one"}, {"a" * 32: "two"})
    assert revoke(str(root), keys["alice"], time="t3", keys={"a" * 32: ""}, commits={}).number == 2
    path = root / "revocations" / f"{keys['alice'].public.id}.json"
    document = RevocationsDocument.parse(path.read_bytes(), keys["alice"].public.id)
    assert right_signers(document.revocations.payload, document.signatures, [keys["alice"].public])


def test_keys_of_a_list_that_are_unknown_here_stay_signed(root, keys, web, client, published) -> None:
    published(keys["alice"])
    alice = keys["alice"]
    revoke(str(root), alice, time="t", keys={}, commits={"0" * 40: ""})
    path = root / "revocations" / f"{alice.public.id}.json"
    value = {**json.loads(path.read_text())["revocations"], "later": [1]}
    signature = alice.sign(canonical_json(value))
    path.write_text(
        json.dumps({"revocations": value, "signatures": [{"key": signature.key, "ed25519": signature.ed25519}]})
    )
    assert client(alice).load(SMALL)


# Publishing


def test_what_is_there_unsigned_is_signed_by_publishing_it_again(root, tmp_path, keys, web) -> None:
    first = put(root, tmp_path / "k")
    again = publish(tmp_path / "k", str(root), REPO, epoch=EPOCH + 9, signer=keys["alice"])
    assert (again.commit, again.changed, again.signed_by) == (first, False, keys["alice"].public.id)
    document = ManifestDocument.parse(manifest_path(root, first).read_bytes()).checked(REPO, first)
    assert right_signers(document.payload, document.signatures, [keys["alice"].public])
    before = manifest_path(root, first).read_bytes()
    publish(tmp_path / "k", str(root), REPO, epoch=EPOCH + 9, signer=keys["alice"])
    assert manifest_path(root, first).read_bytes() == before


def test_a_publisher_signs_no_word_that_somebody_else_put_into_the_manifest(root, tmp_path, keys, web) -> None:
    """Somebody who can write to the hub publishes the same files first, and says something else of them."""
    commit = put(root, tmp_path / "k")
    path = manifest_path(root, commit)
    raw = json.loads(path.read_text())["manifest"]
    raw["note"] = "this kernel is audited"
    evil = ManifestDocument.parse(json.dumps({"manifest": raw}))
    manifest_path(root, evil.manifest.commit).write_bytes(evil.to_bytes())
    (root / "org/small/refs/v1").write_text(f"{evil.manifest.commit}\n")
    done = publish(tmp_path / "k", str(root), REPO, epoch=EPOCH, signer=keys["alice"])
    assert done.changed
    assert not ManifestDocument.parse(manifest_path(root, evil.manifest.commit).read_bytes()).signatures
    assert "note" not in json.loads(manifest_path(root, done.commit).read_text())["manifest"]


def test_signing_again_replaces_what_stands_under_the_keys_name(root, tmp_path, keys, web, client) -> None:
    commit = put(root, tmp_path / "k")
    resign(root, commit, *[Signature(keys["alice"].public.id, "AAAA")] * 64)
    sign(str(root), REPO, commit, keys["alice"])
    assert len(ManifestDocument.parse(manifest_path(root, commit).read_bytes()).signatures) == 1
    resign(root, commit, *[Signature("0" * 32, "AAAA")] * 64)
    with pytest.raises(InvalidMetadata, match="64 signatures of other keys"):
        sign(str(root), REPO, commit, keys["alice"])


def test_what_is_not_there_is_not_signed(root, tmp_path, keys, web) -> None:
    put(root, tmp_path / "k")
    with pytest.raises(KernelNotFound, match="signing org/small at 0000"):
        sign(str(root), REPO, "0" * 40, keys["alice"])


def test_a_bucket_holds_signatures_and_lists_too(client, keys, tmp_path, monkeypatch) -> None:
    with s3_bucket(monkeypatch) as bucket:
        write_kernel(tmp_path / "k", code="VALUE = 's3'\n")
        commit = publish(tmp_path / "k", bucket.url, REPO, epoch=EPOCH, signer=keys["alice"]).commit
        sign(bucket.url, REPO, commit, keys["bob"])
        for name in ("alice", "bob"):
            hub = client(keys[name], source=LayoutSource(bucket.url, agent), store=name)
            assert hub.load(SMALL).module.VALUE == "s3"
        revoke(bucket.url, keys["bob"], time="t", keys={}, commits={commit: "wrong"})
        refused(client(keys["bob"], source=LayoutSource(bucket.url, agent), store="three"), "wrong")


# The commands


@pytest.fixture
def command(monkeypatch, tmp_path, web, capsys) -> Callable[..., tuple[int, Any, str]]:
    for name in list(os.environ):
        if name.startswith(("KERNELHUB_", "KERNELS_", "LOCAL_KERNELS")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("KERNELHUB_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("KERNELHUB_HUBS", web.url)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))

    def call(*arguments: str) -> tuple[int, Any, str]:
        code = run([*arguments, "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out), captured.err

    return call


def test_the_commands_sign_verify_rotate_and_revoke(command, root, tmp_path, monkeypatch) -> None:
    _, old, _ = command("keygen", str(tmp_path / "old"))
    _, new, _ = command("keygen", str(tmp_path / "new"))
    kernel = write_kernel(tmp_path / "k", variant="torch-universal", code="VALUE = 1\n")
    code, done, _ = command(
        "publish", str(kernel), str(root), "--repo-id", "org/small", "--sign", str(tmp_path / "old")
    )
    assert (code, done["signed_by"]) == (0, old["id"])

    code, facts, _ = command("verify", "org/small@v1")
    assert (code, facts["signed_by"]) == (1, None)
    assert "--refresh" in facts["unsigned"]
    assert "--refresh" not in command("verify", "org/small@v1", "--refresh")[1]["unsigned"]
    monkeypatch.setenv("KERNELHUB_TRUSTED_KEYS", str(tmp_path / "old.pub"))
    code, facts, _ = command("verify", "org/small@v1")
    assert (code, facts["signed_by"], facts["commit"]) == (0, f"key {old['id']}", done["commit"])
    assert facts["signatures"] == [{"key": old["id"], "state": "right"}]
    assert command("get", "org/small@v1")[0] == 0

    monkeypatch.setenv("KERNELHUB_TRUSTED_KEYS", f"{tmp_path / 'old.pub'},org/*={new['key']}")
    at = f"org/small@{done['commit']}"
    assert command("sign", str(root), at, str(tmp_path / "new"))[0] == 0
    assert command("revoke", str(root), "--sign", str(tmp_path / "new"), "--key", old["id"], "--reason", "lost")[0] == 0
    code, facts, _ = command("verify", "org/small@v1", "--refresh")
    assert (code, facts["signed_by"]) == (0, f"key {new['id']}")
    assert [item["state"] for item in facts["signatures"]] == ["right, but the key is revoked", "right"]

    assert command("revoke", str(root), "--sign", str(tmp_path / "new"), "--commit", done["commit"])[0] == 0
    code, facts, error = command("verify", "org/small@v1", "--refresh")
    assert code == 4
    assert "no longer counts" in error
    assert command("get", "org/small@v1")[0] == 4


def test_verify_ends_with_4_for_a_wrong_signature_and_for_altered_bytes(command, root, tmp_path, monkeypatch) -> None:
    _, key, _ = command("keygen", str(tmp_path / "key"))
    monkeypatch.setenv("KERNELHUB_TRUSTED_KEYS", key["key"])
    write_kernel(tmp_path / "k", variant="torch-universal")
    commit = publish(tmp_path / "k", str(root), REPO, epoch=EPOCH, signer=load_signer(tmp_path / "key")).commit
    _, facts, _ = command("verify", "org/small@v1")
    init = Path(facts["path"]) / "__init__.py"
    init.parent.chmod(0o755)
    init.chmod(0o644)
    init.write_text("evil = 1\n")
    monkeypatch.setenv("KERNELHUB_OFFLINE", "1")
    code, _, error = command("verify", "org/small@v1")
    assert (code, "different: __init__.py" in error) == (4, True)
    monkeypatch.delenv("KERNELHUB_OFFLINE")
    resign(root, commit, Signature(key["id"], "AAAA"))
    monkeypatch.setenv("KERNELHUB_CACHE", str(tmp_path / "other"))
    code, facts, _ = command("verify", "org/small@v1")
    assert (code, facts["signatures"][0]["state"]) == (4, "WRONG: it is not over this commit")


@pytest.mark.parametrize(
    "arguments",
    [
        ("sign", "HUB", "org/small@v1", "KEY"),
        ("sign", "HUB", "org/small", "KEY"),
        ("revoke", "HUB", "--sign", "KEY"),
        ("revoke", "HUB", "--sign", "KEY", "--commit", "v1"),
        ("revoke", "HUB", "--sign", "KEY", "--key", "../x"),
        ("keygen", "KEY"),
    ],
)
def test_wrong_use_ends_with_2(command, root, tmp_path, arguments) -> None:
    generate(tmp_path / "key")
    named = [str(tmp_path / "key") if item == "KEY" else str(root) if item == "HUB" else item for item in arguments]
    assert command(*named)[0] == 2
    assert not (root / "revocations").exists()


def test_origins_that_are_not_remote_are_not_asked_for_lists_they_cannot_have(client, keys, tmp_path) -> None:
    source = local_source(write_kernel(tmp_path / "k", code="HERE = 1\n"), REPO)[0]
    assert source.origin is Origin.FOLDER
    assert client(keys["alice"], source=source).load(SMALL).module.HERE == 1
    assert signing.PUBLIC_SUFFIX == ".pub"


def test_a_folder_that_is_called_as_a_kernel_does_not_stand_in_for_it(command, root, tmp_path, monkeypatch) -> None:
    """One who clones a repository trusts nothing that lies in it, whatever it is called."""
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    cloned = write_kernel(tmp_path / "org" / "small@v1", code=f"open({str(ran)!r}, 'w')\n")
    (cloned / "benchmarks").mkdir()
    (cloned / "benchmarks" / "benchmark.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setenv("KERNELHUB_OFFLINE", "1")
    code, _, err = command("benchmark", "org/small@v1")
    assert (code, "was not found" in err) == (1, True)
    assert not ran.exists()
    command("benchmark", "./org/small@v1")  # so it is named
    assert ran.exists()
