from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest

from kernelhub.core.canonical import b64, canonical_json, sha256_hex
from kernelhub.core.digest import Digest
from kernelhub.errors import InvalidMetadata, Violation

FILES = {"__init__.py": b"", "a/b.so": b"\x7fELF"}
EMPTY = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_the_digest_has_the_base64_hash_of_each_file(algorithm: str) -> None:
    digest = Digest.of(FILES, algorithm)
    for path, data in FILES.items():
        assert base64.b64decode(digest.files[path]) == hashlib.new(algorithm, data).digest()
    assert digest.violations(digest.files) == []


def test_every_file_is_covered_but_the_two_top_level_ones() -> None:
    names = ["metadata.json", "metadata.json.sigstore", "a/metadata.json", "a/metadata.json.sigstore", "README.md"]
    covered = ["README.md", "a/metadata.json", "a/metadata.json.sigstore"]
    digest = Digest.of(dict.fromkeys(names, b""))
    assert sorted(digest.files) == covered
    everywhere = dict.fromkeys(names, EMPTY)
    assert digest.violations(everywhere) == []
    assert [v.path for v in Digest("sha256", {}).violations(everywhere)] == covered


def test_what_is_wrong_is_named_by_kind_in_order_of_the_paths() -> None:
    digest = Digest("sha256", {"gone.py": EMPTY, "same.py": EMPTY, "changed.py": EMPTY})
    actual = {"same.py": EMPTY, "changed.py": "x", "new.py": EMPTY, "a.pyc": EMPTY, "__pycache__/b.py": EMPTY}
    assert digest.violations(actual) == [
        Violation("bytecode", "__pycache__/b.py"),
        Violation("bytecode", "a.pyc"),
        Violation("different", "changed.py"),
        Violation("missing", "gone.py"),
        Violation("unknown", "new.py"),
    ]


def test_bytecode_is_refused_also_where_the_digest_names_it() -> None:
    assert Digest("sha256", {"a.pyc": EMPTY}).violations({"a.pyc": EMPTY}) == [Violation("bytecode", "a.pyc")]


def test_a_digest_reads_back() -> None:
    digest = Digest.of(FILES)
    assert Digest.parse(json.loads(json.dumps(digest.to_json()))) == digest
    assert list(digest.to_json()["files"]) == sorted(FILES)


def test_the_text_of_a_digest_is_a_hash_of_its_canonical_json() -> None:
    text = '{"algorithm":"sha256","files":{"__init__.py":"' + EMPTY + '"}}'
    assert Digest.of({"__init__.py": b""}).text == "sha256-" + b64(hashlib.sha256(text.encode()).digest())
    assert Digest.of({"a": b"1", "b": b"2"}).text == Digest.of({"b": b"2", "a": b"1"}).text


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "expected"),
        ([], "expected"),
        ({}, "expected"),
        ({"algorithm": "sha256"}, "expected"),
        ({"algorithm": "sha256", "files": []}, "expected"),
        ({"files": {}}, "expected algorithm sha256 or sha512, got None"),
        ({"algorithm": "md5", "files": {}}, "expected algorithm"),
        ({"algorithm": ["sha256"], "files": {}}, "expected algorithm"),
        ({"algorithm": "sha256", "files": {"../a": EMPTY}}, "^digest: .* is not a path"),
        ({"algorithm": "sha256", "files": {"/a": EMPTY}}, "not a path"),
        ({"algorithm": "sha256", "files": {"a": None}}, "a: not a base64 sha256 hash"),
        ({"algorithm": "sha256", "files": {"a": ""}}, "not a base64"),
        ({"algorithm": "sha256", "files": {"a": EMPTY[:-1]}}, "not a base64"),
        ({"algorithm": "sha256", "files": {"a": EMPTY + "\n"}}, "not a base64"),
        ({"algorithm": "sha256", "files": {"a": EMPTY.replace("+", "-")}}, "not a base64"),
        ({"algorithm": "sha256", "files": {"a": EMPTY[:-2] + "V="}}, "not a base64"),
        ({"algorithm": "sha256", "files": {"a": "é" * 44}}, "not a base64"),
        ({"algorithm": "sha512", "files": {"a": EMPTY}}, "not a base64 sha512"),
        ({"algorithm": "sha256", "files": {"a": EMPTY, "A": EMPTY}}, "upper and lower case"),
        ({"algorithm": "sha256", "files": {"metadata.json": EMPTY}}, "no digest covers"),
        ({"algorithm": "sha256", "files": {"Metadata.json": EMPTY}}, "no digest covers"),
        ({"algorithm": "sha256", "files": {"metadata.json.sigstore": EMPTY}}, "no digest covers"),
    ],
)
def test_a_malformed_digest_is_an_error_that_says_what_is_wrong(value: Any, problem: str) -> None:
    with pytest.raises(InvalidMetadata, match=problem):
        Digest.parse(value)


def test_canonical_json_is_sorted_without_spaces_in_utf8() -> None:
    assert canonical_json({"b": [1, None, True], "a": {"é": "x y"}}) == '{"a":{"é":"x y"},"b":[1,null,true]}'.encode()
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_hashes_are_written_as_others_write_them() -> None:
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert b64(b"\xfb\xff") == "+/8="
