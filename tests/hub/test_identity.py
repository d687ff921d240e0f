"""Sigstore bundles: who is trusted as whom, against bundles that are right, altered, or signed by somebody else."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernelfiles import MemorySource, kernel_files
from sigstore_fixtures import TestSigstore

from kernelhub import Hub, Settings
from kernelhub.core.host import Host
from kernelhub.core.lockfile import LockedKernel, LockFile
from kernelhub.core.refs import KernelRef, RepoId
from kernelhub.core.trust import TrustedIdentity
from kernelhub.errors import IntegrityError, InvalidReference, MissingDependency, NoCompatibleVariant, UntrustedKernel
from kernelhub.hub import identity as identity_module
from kernelhub.hub.sources import base

HOST = Host(python=(3, 11), torch=(2, 13), backend="cpu", cpu="x86_64", os="linux")
SMALL = KernelRef.parse("org/small@v1")
BUILD = "https://github.com/org/kernels/.github/workflows/build.yaml@refs/heads/main"
GITHUB = "https://token.actions.githubusercontent.com"
SOURCE = "https://github.com/org/kernels"
TRUSTED = f"org/*={BUILD}|{GITHUB}|{SOURCE}"


@pytest.fixture(scope="module")
def sigstore() -> TestSigstore:
    return TestSigstore()


@pytest.fixture
def root(sigstore: TestSigstore, tmp_path: Path) -> Path:
    path = tmp_path / "trusted_root.json"
    path.write_text(sigstore.trusted_root())
    return path


@pytest.fixture
def client(tmp_path: Path, root: Path) -> Callable[..., Hub]:
    def make(source: Any, *identities: str, **settings: Any) -> Hub:
        settings.setdefault("sigstore_root", root)
        trusted = tuple(TrustedIdentity.parse(text) for text in identities)
        made = Settings(cache=tmp_path / "store", trusted_identities=trusted, build="never", **settings)
        return Hub(made, sources=[source], host=HOST)

    return make


def signed(
    sigstore: TestSigstore,
    *,
    as_: str = BUILD,
    issuer: str = GITHUB,
    source: str | None = SOURCE,
    over: bytes | None = None,
    change: Callable[[dict[str, Any]], Any] | None = None,
    repo: str = "org/small",
    **kernel: Any,
) -> MemorySource:
    """A hub that marks nobody as trusted, with a kernel that is signed."""
    files = kernel_files(**kernel)
    bundle = sigstore.bundle(files["metadata.json"] if over is None else over, as_, issuer, source)
    if change is not None:
        change(bundle)
    files["metadata.json.sigstore"] = json.dumps(bundle).encode()
    return MemorySource({repo: {"torch-cpu": files}}, trusted=False)


def refused(hub: Hub, match: str, ref: KernelRef = SMALL) -> None:
    with pytest.raises(UntrustedKernel, match=f"(?s){match}"):
        hub.load(ref)


@pytest.fixture
def ran(tmp_path: Path) -> tuple[str, Callable[[], bool]]:
    mark = tmp_path / "mark"
    return f"open({str(mark)!r}, 'w').close()\n", mark.exists


def test_what_a_trusted_identity_signed_runs_also_offline_and_where_a_signature_is_required(client, sigstore) -> None:
    source = signed(sigstore, code="VALUE = 1\n")
    assert client(source, TRUSTED).load(SMALL).module.VALUE == 1
    source.asked.clear()
    assert client(source, TRUSTED, offline=True).load(SMALL).module.VALUE == 1
    assert source.asked == []
    assert client(source, TRUSTED, require_signature=True).load(SMALL)
    assert client(source, TRUSTED).has(SMALL)
    refused(client(source), "does not mark as a trusted publisher")


def test_people_sign_too(client, sigstore) -> None:
    source = signed(sigstore, as_="me@example.org", issuer="https://accounts.example.org", source=None)
    assert client(source, "org/small=me@example.org|https://accounts.example.org").load(SMALL)


@pytest.mark.parametrize(
    "trusted",
    [
        f"other/*={BUILD}|{GITHUB}",
        f"https://elsewhere.test/org/*={BUILD}|{GITHUB}",
    ],
)
def test_an_identity_counts_for_its_pattern_only(client, sigstore, trusted) -> None:
    refused(client(signed(sigstore), trusted), "no key or identity is trusted for it")


@pytest.mark.parametrize(
    "trusted",
    [
        f"org/*={BUILD.replace('main', 'evil')}|{GITHUB}",
        f"org/*={BUILD}|https://issuer.evil",
        f"org/*={BUILD}|{GITHUB}|https://github.com/evil/fork",
    ],
)
def test_who_signed_it_must_be_who_is_trusted_in_every_word(client, sigstore, ran, trusted) -> None:
    code, did_run = ran
    refused(client(signed(sigstore, code=code), trusted), "not one of those who are trusted for it")
    assert not did_run()
    # another identity beside it is enough
    assert client(signed(sigstore, code=code), trusted, TRUSTED).load(SMALL)


def _entry(bundle: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = bundle["verificationMaterial"]["tlogEntries"][0]
    return entry


def _altered(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[-1] ^= 1
    return base64.b64encode(bytes(data)).decode()


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: bundle["messageSignature"].update(signature=_altered(bundle["messageSignature"]["signature"])),
        lambda bundle: bundle["messageSignature"]["messageDigest"].update(digest=base64.b64encode(b"\0" * 32).decode()),
        lambda bundle: _entry(bundle).update(integratedTime="1"),
        lambda bundle: _entry(bundle).update(canonicalizedBody=base64.b64encode(b"{}").decode()),
        lambda bundle: _entry(bundle)["inclusionProof"].update(rootHash=base64.b64encode(b"\0" * 32).decode()),
        lambda bundle: _entry(bundle)["inclusionPromise"].update(signedEntryTimestamp="AAAA"),
        lambda bundle: _entry(bundle)["inclusionProof"]["checkpoint"].update(envelope="x\n1\nx\n\n— x AAAAAAAA\n"),
        lambda bundle: bundle["verificationMaterial"]["certificate"].update(rawBytes="AAAA"),
        lambda bundle: bundle.update(mediaType="other"),
        lambda bundle: bundle.pop("messageSignature"),
        lambda bundle: bundle["verificationMaterial"].update(tlogEntries=[]),
        lambda bundle: bundle.clear(),
    ],
)
def test_an_altered_bundle_is_none(client, sigstore, ran, change) -> None:
    code, did_run = ran
    refused(client(signed(sigstore, code=code, change=change), TRUSTED), "Sigstore bundle")
    assert not did_run()


def test_a_signature_over_other_metadata_is_none(client, sigstore, ran) -> None:
    code, did_run = ran
    refused(client(signed(sigstore, code=code, over=b"{}"), TRUSTED), "not one of those")
    assert not did_run()


def test_another_sigstore_with_the_same_words_is_none(client, sigstore, ran) -> None:
    """An attacker has an authority and logs of his own, and signs as whomever he likes."""
    code, did_run = ran
    refused(client(signed(TestSigstore(), code=code), TRUSTED), "not one of those")
    half = TestSigstore(authority=sigstore.authority)  # a certificate that was never logged
    refused(client(signed(half, code=code), TRUSTED), "not one of those")
    assert not did_run()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"mediaType": 5}'])
def test_what_is_no_bundle_is_none(client, sigstore, data) -> None:
    source = signed(sigstore)
    source.kernels["org/small"]["torch-cpu"]["metadata.json.sigstore"] = data
    refused(client(source, TRUSTED), "is no Sigstore bundle")


def test_a_kernel_without_a_bundle_is_refused_whatever_is_trusted_of_others(client, ran) -> None:
    code, did_run = ran
    source = MemorySource({"org/small": {"torch-cpu": kernel_files(code=code)}}, trusted=False)
    refused(client(source, TRUSTED), "has no Sigstore bundle")
    with pytest.raises(UntrustedKernel):
        client(source, TRUSTED).has(SMALL)
    with pytest.raises(UntrustedKernel):
        client(source, TRUSTED).install(SMALL)
    assert not did_run()


def test_a_signature_over_metadata_without_a_digest_covers_nothing(client, sigstore, ran) -> None:
    code, did_run = ran
    refused(client(signed(sigstore, code=code, digest=False), TRUSTED), "has no digest")
    assert not did_run()


def test_files_that_the_signed_metadata_does_not_name_are_refused(client, sigstore) -> None:
    source = signed(sigstore)
    source.kernels["org/small"]["torch-cpu"]["__init__.py"] = b"evil = 1\n"
    with pytest.raises(IntegrityError, match=r"different: __init__.py"):
        client(source, TRUSTED).load(SMALL)


def test_a_signed_kernel_is_not_another_and_not_another_version(client, sigstore) -> None:
    refused(
        client(signed(sigstore, repo="org/other"), TRUSTED),
        "what is signed is version 1 of small",
        KernelRef.parse("org/other@v1"),
    )
    source = signed(sigstore, version=2)
    refused(client(source, TRUSTED), "what is signed is version 2 of small")
    refused(client(source, TRUSTED), "what is signed is version 2 of small", KernelRef.of("org/small", revision="v1"))
    spelt = signed(sigstore, repo="org/Small_er", name="small-er", id="small_er")
    assert client(spelt, TRUSTED).load(KernelRef.parse("org/Small_er@v1"))


def test_a_locked_kernel_and_a_dependency_are_checked_too(client, sigstore, tmp_path) -> None:
    source = signed(sigstore, code="LOCKED = 1\n")
    commit = source.commit("org/small")
    lock = tmp_path / "kernels.lock"
    lock.write_text(LockFile((LockedKernel(RepoId("org", "small"), commit),)).to_text())
    assert client(source, TRUSTED).load_locked(RepoId("org", "small"), lockfile=lock)
    with pytest.raises(UntrustedKernel):
        client(source, TRUSTED.replace("main", "evil")).load_locked(RepoId("org", "small"), lockfile=lock)
    top = signed(sigstore, repo="org/top", name="top", kernel_depends=[{"repo-id": "org/small", "version": 1}])
    evil = signed(sigstore, as_=BUILD.replace("main", "evil"))
    both = MemorySource({**top.kernels, **evil.kernels}, trusted=False, key="both")
    with pytest.raises(UntrustedKernel, match="org/small"):
        client(both, TRUSTED).load(KernelRef.parse("org/top@v1"))


def test_nothing_is_built_and_no_benchmark_run_for_a_signature_that_covers_builds_only(
    client, sigstore, tmp_path, root
) -> None:
    class WithSource(MemorySource):
        def listing(self, repo: RepoId, commit: str) -> base.Listing:
            return base.Listing(super().listing(repo, commit).variants, {base.SOURCE: {}, base.BENCHMARKS: {}})

        def fetch_part(self, *arguments: Any) -> None:
            self.asked.append("part")

    files = signed(sigstore).kernels["org/small"]["torch-cpu"]
    source = WithSource({"org/small": {"torch-cuda": files}}, trusted=False)
    trusted = (TrustedIdentity.parse(TRUSTED),)
    for build in ("auto", "always"):
        settings = Settings(cache=tmp_path / "store", trusted_identities=trusted, build=build, sigstore_root=root)
        hub = Hub(settings, sources=[source], host=HOST)
        with pytest.raises(NoCompatibleVariant):
            hub.load(SMALL)
        with pytest.raises(UntrustedKernel, match="cover builds only"):
            hub.benchmarks(SMALL)
    assert "part" not in source.asked


def test_metadata_that_is_exchanged_after_it_was_verified_is_refused(client, sigstore, monkeypatch) -> None:
    """Somebody who can write to the store has the signed metadata there only while the signature is looked at."""
    source = signed(sigstore, code="VALUE = 1\n")
    good = client(source, TRUSTED).load(SMALL).path / "metadata.json"
    text = good.read_bytes()
    evil = json.dumps({**json.loads(text), "upstream": "https://evil.test"}).encode()
    real = identity_module.signed_by

    def exchanged(verified: Any, *rest: Any) -> str:
        good.parent.chmod(0o755)
        good.chmod(0o644)
        good.write_bytes(evil)
        return real(verified, *rest)

    monkeypatch.setattr(identity_module, "signed_by", exchanged)
    with pytest.raises(IntegrityError, match="changed after it was verified"):
        client(source, TRUSTED).load(SMALL)


def test_verify_says_who_signed_it(client, sigstore) -> None:
    facts = client(signed(sigstore), TRUSTED).verify(SMALL)
    assert facts["signed_by"] == f"{BUILD} ({GITHUB})"
    facts = client(signed(sigstore), TRUSTED.replace("main", "evil")).verify(SMALL)
    assert facts["signed_by"] is None
    assert "not one of those who are trusted" in facts["unsigned"]


def test_the_public_root_comes_with_the_package_and_needs_no_network(client, sigstore, monkeypatch, tmp_path) -> None:
    import socket

    def no(*arguments: object, **more: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no)
    monkeypatch.setattr(socket.socket, "connect", no)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    identity_module._verifier.cache_clear()
    try:
        refused(client(signed(sigstore), TRUSTED, sigstore_root=None), "not one of those")
    finally:
        identity_module._verifier.cache_clear()


def test_without_the_package_and_with_no_root_it_says_what_to_do(client, sigstore, monkeypatch, tmp_path) -> None:
    with pytest.raises(InvalidReference, match="no trusted root of Sigstore"):
        client(signed(sigstore), TRUSTED, sigstore_root=tmp_path / "none.json").load(SMALL)
    monkeypatch.setitem(__import__("sys").modules, "sigstore.models", None)
    identity_module._verifier.cache_clear()
    with pytest.raises(MissingDependency, match=r"kernelhub\[sigstore\]"):
        client(signed(sigstore), TRUSTED).load(SMALL)


@pytest.mark.parametrize(
    "text", ["", "org/*", "org/*=x", "org/*=|y", "org/*=x|y|z|w", "=x|y", "*=x|y", "org=x|y", "org/*=x|"]
)
def test_a_malformed_identity_is_an_error(text) -> None:
    with pytest.raises(InvalidReference, match="Expected"):
        TrustedIdentity.parse(text)
    assert str(TrustedIdentity.parse(TRUSTED)) == TRUSTED
