from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelhub.core.manifest import (
    LayerInfo,
    Manifest,
    ManifestDocument,
    ManifestVariant,
    RefFile,
    Signature,
    hub_file,
    parse_hub_file,
)
from kernelhub.core.refs import RepoId
from kernelhub.errors import IntegrityError, InvalidMetadata

REPO = RepoId("org", "relu")
SHA = "ab" * 32
RAW: dict[str, Any] = {
    "layout": 1,
    "repo": "org/relu",
    "version": 1,
    "parent": None,
    "time": "2026-11-21T20:00:00Z",
    "variants": {
        "torch-cpu": {
            "archive": SHA,
            "size": 12,
            "metadata": "{}\n",
            "layers": {"Relu": {"can_torch_compile": True, "has_backward": False, "forward": "(self, x)"}},
        }
    },
    "card": SHA,
    "source": None,
    "benchmarks": None,
}


def document(manifest: Any = None, **more: Any) -> bytes:
    return json.dumps({"manifest": RAW if manifest is None else manifest, **more}).encode()


def changed(path: str, value: Any) -> dict[str, Any]:
    """The manifest with one key replaced; `...` takes it away."""
    raw = json.loads(json.dumps(RAW))
    *parents, last = path.split(".")
    at = raw
    for key in parents:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return raw


def test_the_values() -> None:
    manifest = ManifestDocument.parse(document()).manifest
    layer = LayerInfo(can_torch_compile=True, has_backward=False, forward="(self, x)")
    assert manifest == Manifest(
        REPO,
        1,
        None,
        "2026-11-21T20:00:00Z",
        {"torch-cpu": ManifestVariant(SHA, 12, "{}\n", {"Relu": layer})},
        card=SHA,
    )
    assert manifest.to_json() == RAW


def test_the_commit_is_taken_over_the_canonical_text() -> None:
    text = json.dumps(RAW, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    commit = hashlib.sha256(text.encode()).hexdigest()[:40]
    parsed = ManifestDocument.parse(document())
    assert parsed.manifest.commit == commit
    assert dataclasses.replace(parsed.manifest, raw={}).commit == commit
    assert parsed.checked(REPO, commit) is parsed


def test_unknown_keys_keep_the_commit_what_it_is() -> None:
    for raw in (
        {**RAW, "new": {"é": [1, 2.5]}},
        changed("variants.torch-cpu.new", 1),
        changed("variants.torch-cpu.layers.Relu.new", 1),
    ):
        parsed = ManifestDocument.parse(document(raw))
        assert parsed.manifest.commit != ManifestDocument.parse(document()).manifest.commit
        again = ManifestDocument.parse(parsed.to_bytes())
        assert again.manifest.commit == parsed.manifest.commit
        assert again.manifest.to_json() == raw


def test_signing_later_changes_no_commit() -> None:
    parsed = ManifestDocument.parse(document(signatures=[{"key": "a", "ed25519": "AAAA"}]))
    assert parsed.signatures == (Signature("a", "AAAA"),)
    more = parsed.signed(Signature("b", "BBBB")).signed(Signature("a", "AAAA"))
    assert ManifestDocument.parse(more.to_bytes()) == more
    assert [item.key for item in more.signatures] == ["a", "b"]
    assert more.manifest.commit == parsed.manifest.commit


def test_another_repositorys_manifest_or_another_commits_is_refused() -> None:
    parsed = ManifestDocument.parse(document())
    with pytest.raises(IntegrityError, match="answers for org/relu"):
        parsed.checked(RepoId("org", "other"), parsed.manifest.commit)
    with pytest.raises(IntegrityError, match="other contents"):
        parsed.checked(REPO, "0" * 40)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("layout", 2, "layout"),
        ("layout", True, "layout"),
        ("layout", ..., "layout"),
        ("repo", "relu", "repo"),
        ("repo", "../x", "repo"),
        ("repo", None, "repo: expected text"),
        ("version", "1", "version: expected a whole number, got '1'"),
        ("version", True, "version"),
        ("version", -1, "version"),
        ("version", ..., "version: expected a whole number, got nothing"),
        ("parent", "../../x", "parent"),
        ("parent", "AB" * 20, "parent"),
        ("time", "yesterday", "time"),
        ("time", 5, "time"),
        ("variants", [], "variants: expected an object"),
        ("variants", ..., "variants"),
        ("variants.torch-cpu", None, "variants: torch-cpu"),
        ("variants.torch-cpu.archive", "../" + SHA[3:], "torch-cpu: archive"),
        ("variants.torch-cpu.archive", SHA.upper(), "torch-cpu: archive"),
        ("variants.torch-cpu.size", 0, "torch-cpu: size"),
        ("variants.torch-cpu.size", 1.5, "torch-cpu: size"),
        ("variants.torch-cpu.size", True, "torch-cpu: size"),
        ("variants.torch-cpu.metadata", {}, "torch-cpu: metadata"),
        ("variants.torch-cpu.layers", [], "torch-cpu: layers"),
        ("variants.torch-cpu.layers.Relu", "x", "layers: Relu"),
        ("variants.torch-cpu.layers.Relu.forward", ..., "layers: Relu: forward"),
        ("variants.torch-cpu.layers.Relu.has_backward", 1, "Relu: has_backward: expected true or false"),
        ("card", "x", "card"),
        ("source", 5, "source"),
        ("benchmarks", SHA + "0", "benchmarks"),
    ],
)
def test_a_malformed_manifest_names_the_key(path: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidMetadata, match=message):
        ManifestDocument.parse(document(changed(path, value)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"{}",
        b"\xff\xfe",
        b'{"manifest": []}',
        b"[" * 100_000,
        document(changed("time", "\ud800")),
        document(changed("new", "\ud800")),
        document(changed("new", float("nan"))),
        document(signatures={}),
        document(signatures=["x"]),
        document(signatures=[{"key": "a"}]),
        document(changed("card", json.loads("[" * 400 + "]" * 400))),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidMetadata):
        ManifestDocument.parse(data)


def test_a_newer_layout_says_to_update() -> None:
    with pytest.raises(InvalidMetadata, match="pip install --upgrade kernelhub"):
        parse_hub_file(b'{"layout": 2}')
    with pytest.raises(InvalidMetadata, match="expected 1, got None"):
        parse_hub_file(b"{}")
    with pytest.raises(InvalidMetadata, match="not JSON"):
        parse_hub_file(b"<html>")
    parse_hub_file(hub_file())
    parse_hub_file(b'{"layout": 1, "new": true}')


COMMIT = "0123456789" * 4


@given(st.none() | st.text(max_size=30))
def test_a_ref_prints_back(reason: str | None) -> None:
    try:
        (reason or "").encode()
    except UnicodeEncodeError:
        return
    ref = RefFile(COMMIT, reason)
    again = RefFile.parse(ref.to_bytes())
    assert again == RefFile(COMMIT, None if reason is None else " ".join(reason.split()))
    assert again.to_bytes() == ref.to_bytes()
    assert len(ref.to_bytes().decode().splitlines()) == (1 if reason is None else 2)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"main",
        b"../../x",
        COMMIT.encode() + b"0",
        b"<html>",
        b" " + COMMIT.encode(),
        b"\xff" * 40,
        COMMIT.encode() + b"\nx",
        COMMIT.encode() + b"\nyanked: a\nb",
        COMMIT.upper().encode()[:-1] + b"F",
    ],
)
def test_a_malformed_ref_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidMetadata, match="ref"):
        RefFile.parse(data)


def test_refs_may_end_as_files_do() -> None:
    assert RefFile.parse(COMMIT) == RefFile.parse(f"{COMMIT}\r\n") == RefFile(COMMIT)
    assert RefFile.parse(f"{COMMIT}\r\nyanked: no good\r\n") == RefFile(COMMIT, "no good")
