from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kernelhub.core.digest import Digest
from kernelhub.core.metadata import (
    KERNELS_LEVEL,
    PYTHON_DEPENDS,
    BackendInfo,
    KernelDepend,
    Metadata,
    Provenance,
)
from kernelhub.core.refs import RepoId, Revision, Version
from kernelhub.errors import InvalidMetadata

LEAST: dict[str, Any] = {
    "name": "my-relu",
    "id": "_my_relu_abc",
    "version": 1,
    "license": "Apache-2.0",
    "python-depends": [],
    "backend": {"type": "cpu"},
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FULL: dict[str, Any] = {
    **LEAST,
    "upstream": "https://example.org/relu",
    "source": "https://example.org/kernel",
    "python-depends": ["einops", "nvidia-cutlass-dsl"],
    "kernel-depends": [
        {"repo-id": "org/one", "version": 1, "why": "kept"},
        {"repo-id": "org/two", "revision": "main"},
    ],
    "kernels-minver": "0.17.2",
    "backend": {"type": "cuda", "archs": ["8.0", "9.0+PTX"], "note": "kept"},
    "digest": {**Digest.of({"__init__.py": b""}).to_json(), "note": "kept"},
    "provenance": {
        "kernel-builder": {"sha": COMMIT, "dirty": True},
        "kernel": {"commit": COMMIT, "dirty": False, "note": "kept"},
        "another-tool": ["kept"],
    },
    "x-unknown": {"kept": [1, None, "é"]},
}


def of(**changes: Any) -> Metadata:
    return Metadata.parse(json.dumps({**LEAST, **{key.replace("_", "-"): value for key, value in changes.items()}}))


def test_the_least_metadata_is_read() -> None:
    assert of() == Metadata("my-relu", "_my_relu_abc", 1, "Apache-2.0", BackendInfo("cpu"))
    assert of().python_name == "my_relu"


def test_every_key_is_read() -> None:
    metadata = Metadata.parse(json.dumps(FULL).encode())
    assert metadata == Metadata(
        name="my-relu",
        id="_my_relu_abc",
        version=1,
        license="Apache-2.0",
        backend=BackendInfo("cuda", ("8.0", "9.0+PTX")),
        python_depends=("einops", "nvidia-cutlass-dsl"),
        kernel_depends=(
            KernelDepend(RepoId("org", "one"), Version(1)),
            KernelDepend(RepoId("org", "two"), Revision("main")),
        ),
        upstream="https://example.org/relu",
        source="https://example.org/kernel",
        kernels_minver=(0, 17, 2),
        digest=Digest.of({"__init__.py": b""}),
        provenance={"kernel-builder": Provenance(COMMIT, True), "kernel": Provenance(COMMIT, False)},
    )
    assert [str(item) for item in metadata.kernel_depends] == ["org/one@v1", "org/two@main"]


@pytest.mark.parametrize("raw", [LEAST, FULL, {**LEAST, "upstream": None, "digest": None, "kernel-depends": []}])
def test_what_was_read_is_written_as_it_was(raw: dict[str, Any]) -> None:
    metadata = Metadata.parse(json.dumps(raw))
    assert metadata.to_json() == raw
    assert metadata.to_text() == json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert Metadata.parse(metadata.to_text()) == metadata


def test_a_changed_field_is_written_and_the_rest_is_kept() -> None:
    metadata = replace(Metadata.parse(json.dumps(FULL)), id="other", digest=None, kernels_minver=None)
    expected = {key: value for key, value in FULL.items() if key not in ("digest", "kernels-minver")}
    assert metadata.to_json() == {**expected, "id": "other"}


def test_metadata_made_here_is_written_from_its_fields() -> None:
    read = Metadata.parse(json.dumps(FULL))
    made = replace(read, raw={"x-unknown": 1, "name": "ignored"})
    assert made.to_json()["x-unknown"] == 1
    assert made.to_json()["provenance"]["kernel-builder"] == {"commit": COMMIT, "dirty": True}
    assert Metadata.parse(made.to_text()) == read


@pytest.mark.parametrize("key", LEAST)
def test_a_missing_required_key_is_an_error_that_names_it(key: str) -> None:
    raw = {name: value for name, value in LEAST.items() if name != key}
    with pytest.raises(InvalidMetadata, match=f"metadata.json: {key}: expected"):
        Metadata.parse(json.dumps(raw))


@pytest.mark.parametrize("name", ["a", "1a", "-a", "a-", "A-b", "a_b", "a b", "é-a", "ab\n", "", None, 1])
def test_a_name_is_lower_case_letters_digits_and_hyphens(name: object) -> None:
    with pytest.raises(InvalidMetadata, match="name: expected"):
        of(name=name)


@pytest.mark.parametrize("ident", ["1a", "a-b", "a.b", "", "a b", "class", "None", "é", "a\n", "../a", None, 3])
def test_an_id_is_a_python_identifier(ident: object) -> None:
    with pytest.raises(InvalidMetadata, match="id: expected"):
        of(id=ident)


@pytest.mark.parametrize("ident", ["json", "_x", "A1"])
def test_any_identifier_is_an_id(ident: str) -> None:
    assert of(id=ident).id == ident


@pytest.mark.parametrize("version", [-1, True, "1", 1.0, None, [1]])
def test_a_version_is_a_whole_number(version: object) -> None:
    with pytest.raises(InvalidMetadata, match="version: expected a whole number"):
        of(version=version)


def test_python_packages_are_read_as_written_and_belong_to_backends() -> None:
    assert of(python_depends=["einops", "newer"]).python_depends == ("einops", "newer")
    only = {row.name: row.backends for row in PYTHON_DEPENDS.values() if len(row.backends) == 1}
    assert only == {"nvidia-cutlass-dsl": ("cuda",), "onednn": ("xpu",), "nki": ("neuron",)}


def test_packages_have_the_names_of_the_registry_and_of_import() -> None:
    assert {row.name: (row.package, row.module) for row in PYTHON_DEPENDS.values()} == {
        "einops": ("einops", "einops"),
        "helion": ("helion", "helion"),
        "tvm-ffi": ("apache-tvm-ffi", "tvm_ffi"),
        "nvidia-cutlass-dsl": ("nvidia-cutlass-dsl", "cutlass"),
        "onednn": ("onednn", "onednn"),
        "nki": ("nki", "nki"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"license": ""},
        {"license": 1},
        {"upstream": 1},
        {"source": []},
        {"python_depends": None},
        {"python_depends": "einops"},
        {"python_depends": [1]},
        {"kernel_depends": "org/name"},
        {"kernel_depends": ["org/name"]},
        {"kernel_depends": [{"version": 1}]},
        {"kernel_depends": [{"repo-id": "org/name"}]},
        {"kernel_depends": [{"repo-id": "org/name", "version": 1, "revision": "main"}]},
        {"kernel_depends": [{"repo-id": "name", "version": 1}]},
        {"kernel_depends": [{"repo-id": "org/name", "version": "1"}]},
        {"kernel_depends": [{"repo-id": "org/name", "version": True}]},
        {"kernel_depends": [{"repo-id": "org/name", "version": -1}]},
        {"kernel_depends": [{"repo-id": "org/name", "revision": 1}]},
        {"kernel_depends": [{"repo-id": "org/name", "revision": "../x"}]},
        {"kernels_minver": "0.17"},
        {"kernels_minver": "0.17.2.1"},
        {"kernels_minver": "0.017.2"},
        {"kernels_minver": "00.17.2"},
        {"kernels_minver": "0.17.02"},
        {"kernels_minver": "0.17.2\n"},
        {"kernels_minver": "0.17.dev"},
        {"kernels_minver": 17},
        {"kernels_minver": [0, 17, 2]},
        {"backend": "cpu"},
        {"backend": {}},
        {"backend": {"type": "npu"}},
        {"backend": {"type": ["cpu"]}},
        {"backend": {"type": "cuda", "archs": "9.0"}},
        {"backend": {"type": "cuda", "archs": [9.0]}},
        {"digest": []},
        {"digest": {"algorithm": "sha256", "files": {"../x": "a"}}},
        {"provenance": []},
        {"provenance": {"kernel": {}}},
        {"provenance": {"kernel": {"commit": 1}}},
        {"provenance": {"kernel": {"commit": COMMIT, "dirty": "no"}}},
        {"provenance": {"kernel-builder": None}},
    ],
)
def test_a_malformed_value_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidMetadata) as caught:
        of(**changes)
    key = next(iter(changes))
    assert str(caught.value).startswith("metadata.json: ")
    assert key.replace("_", "-") in str(caught.value) or "archs: " in str(caught.value)
    assert "expected" in str(caught.value) or "not" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100000,
        b'{"x": 1e999}',
        b'{"x": NaN}',
        b'{"x": "\\ud800"}',
        b'{"x": ' + b"1" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_an_error(data: bytes) -> None:
    with pytest.raises(InvalidMetadata, match=r"metadata\.json(:| is not JSON)"):
        Metadata.parse(data)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"\\ud800"', '{"\\udfff": 1}'])
def test_what_only_python_takes_for_json_is_an_error(value: str) -> None:
    text = json.dumps(LEAST)
    with pytest.raises(InvalidMetadata, match=r"metadata\.json is not JSON"):
        Metadata.parse(text[:-1] + f', "x-unknown": {value}}}')


def test_a_very_large_file_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(LEAST)
    monkeypatch.setattr("kernelhub.core.metadata.MAX_BYTES", len(text))
    assert Metadata.parse(text) == of()
    with pytest.raises(InvalidMetadata, match="the most is"):
        Metadata.parse(text + " ")


def test_the_level_is_that_of_the_package_whose_features_there_are() -> None:
    assert KERNELS_LEVEL == (0, 17, 2)
    assert of(kernels_minver="0.9.10").kernels_minver == (0, 9, 10)
