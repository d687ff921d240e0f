"""What users and hubs write of trust: read and printed back, or one of the documented errors."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelhub.core.canonical import canonical_json
from kernelhub.core.revocations import Revocations, RevocationsDocument
from kernelhub.core.signatures import PublicKey, Signature
from kernelhub.core.trust import Pattern, TrustedIdentity, TrustedKey
from kernelhub.errors import IntegrityError, InvalidMetadata, InvalidReference

ID = "a" * 32
HEX = st.text("0123456789abcdef", min_size=32, max_size=32)
COMMIT = st.text("0123456789abcdef", min_size=40, max_size=40)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)


@given(st.text() | st.text("/:*=|.eorgnamed25519@ ", max_size=40))
def test_texts_of_trust_are_read_or_refused(text: str) -> None:
    for kind in (Pattern, TrustedKey, TrustedIdentity, PublicKey):
        try:
            value = kind.parse(text)
        except InvalidReference:
            continue
        assert kind.parse(str(value)) == value


@given(st.binary(min_size=32, max_size=32))
def test_every_key_prints_back(raw: bytes) -> None:
    key = PublicKey(raw)
    assert PublicKey.parse(str(key)) == key
    assert len(key.id) == 32


@given(
    st.integers(1, 10**9), TEXT, st.dictionaries(HEX, TEXT), st.dictionaries(COMMIT, TEXT), st.dictionaries(TEXT, TEXT)
)
def test_a_list_prints_back_with_what_it_does_not_know(
    number: int, time: str, keys: dict[str, str], commits: dict[str, str], more: dict[str, str]
) -> None:
    known = Revocations("", 1).to_json()
    raw = {**more, **Revocations(ID, number, time, keys, commits).to_json()}
    document = RevocationsDocument(Revocations.from_raw(raw), (Signature(ID, "x"),))
    again = RevocationsDocument.parse(document.to_bytes(), ID)
    assert again == document
    assert again.revocations.payload == canonical_json(raw)
    assert set(again.revocations.more) == set(more) - set(known)


@given(JSON, st.sampled_from(["layout", "key", "number", "time", "keys", "commits", "more"]))
def test_a_list_that_is_malformed_is_refused(value: Any, key: str) -> None:
    raw = {**Revocations(ID, 1).to_json(), key: value}
    for text in (json.dumps({"revocations": raw}), json.dumps(value), json.dumps({"revocations": value})):
        with suppress(InvalidMetadata, IntegrityError):
            RevocationsDocument.parse(text.encode("utf-8", "surrogatepass"), ID)


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff", b'{"revocations": {"layout": NaN}}', b"{" * 9_000_000])
def test_hostile_bytes_are_no_list(data: bytes) -> None:
    with pytest.raises(InvalidMetadata):
        RevocationsDocument.parse(data, ID)
