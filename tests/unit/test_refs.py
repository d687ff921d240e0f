from __future__ import annotations

import pytest

from kernelhub.core.refs import KernelRef, RepoId, Revision, Version, is_commit, parse_pin
from kernelhub.errors import InvalidReference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "text", ["a/b", "kernels-community/relu", "Org_1/na.me-2_x", "_a/0", "a-.b/c", "x" * 96 + "/y"]
)
def test_a_repository_prints_back(text: str) -> None:
    assert str(RepoId.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "a", "a/", "/b", "a/b/c", "a//b", " a/b", "a/b ", "a/b\n", "a\\b", "é/b", "a/b@v1", "a/b:L"),
        *("-a/b", "a-/b", ".a/b", "a./b", "a/..", "a/.", "../b", "a/b--c", "a--b/c", "a/b..c", "x" * 97 + "/y"),
    ],
)
def test_what_is_no_repository_is_an_error_that_shows_what_was_expected(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        RepoId.parse(text)
    assert repr(text) in str(caught.value)
    assert '"org/name"' in str(caught.value)


@pytest.mark.parametrize(("text", "number"), [("v0", 0), ("v1", 1), ("v10", 10), ("v999999999", 999_999_999)])
def test_a_version_is_v_and_a_whole_number(text: str, number: int) -> None:
    assert Version.parse(text) == Version(number)
    assert str(Version(number)) == Version(number).ref == text


@pytest.mark.parametrize(
    "text", ["v01", "v00", "v+1", "v-1", "v1_0", "v 1", "v1 ", "v1\n", "V1", "1", "v", "", "v1.0", "v١"]
)
def test_nothing_else_is_a_version(text: str) -> None:
    with pytest.raises(InvalidReference, match="is not a version"):
        Version.parse(text)


def test_versions_are_ordered_as_numbers() -> None:
    assert Version(2) < Version(10)


@pytest.mark.parametrize("text", ["main", "v01", "v1.0", "refs/pr/3", "feature/x-y_z+1", COMMIT, "a" * 200, "v1_0"])
def test_a_revision_prints_back(text: str) -> None:
    assert str(Revision.parse(text)) == Revision.parse(text).ref == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "..", "a..b", "../x", "a/../b", "/a", "a/", "a//b", "a/.b", ".a", "-a", "a.", "a.lock", "a b", "a\n"),
        *("a~1", "a^", "a:b", "a@b", "a\\b", "é", "a" * 201, "a?b", "a*"),
    ],
)
def test_what_is_no_revision_is_an_error(text: str) -> None:
    with pytest.raises(InvalidReference, match="is not a revision"):
        Revision.parse(text)


def test_a_commit_is_all_forty_hex_digits() -> None:
    assert is_commit(COMMIT)
    assert Revision.parse(COMMIT).commit == COMMIT
    for text in (COMMIT[:39], COMMIT + "0", COMMIT.upper(), COMMIT[:39] + "g", COMMIT + "\n"):
        assert not is_commit(text)
    assert Revision.parse("main").commit is None
    assert Revision.parse(COMMIT[:39]).commit is None


def test_a_pin_is_a_version_where_it_is_spelt_as_one() -> None:
    assert parse_pin("v3") == Version(3)
    assert parse_pin("v03") == Revision("v03")
    assert parse_pin("main") == Revision("main")


@pytest.mark.parametrize("text", ["a/b", "a/b@v1", "a/b@main:Layer", "a/b:Layer", f"a/b@{COMMIT}", "a/b@refs/pr/1"])
def test_a_kernel_prints_back(text: str) -> None:
    assert str(KernelRef.parse(text)) == text


def test_a_kernel_has_its_parts() -> None:
    assert KernelRef.parse("a/b@v2:SiluAndMul") == KernelRef(RepoId("a", "b"), Version(2), "SiluAndMul")


@pytest.mark.parametrize(
    "text", ["a/b@", "a/b:", "a/b@v1:", "a/b@v1:1x", "a/b:a.b", "a/b@v1@v2", "a@v1/b", "a/b:x:y", "@v1"]
)
def test_what_is_no_kernel_is_an_error(text: str) -> None:
    with pytest.raises(InvalidReference):
        KernelRef.parse(text)


def test_the_arguments_of_get_kernel_name_one_pin() -> None:
    assert KernelRef.of("a/b", version=0) == KernelRef(RepoId("a", "b"), Version(0))
    assert KernelRef.of("a/b", revision="main").pin == Revision("main")
    assert KernelRef.of("a/b@v1").pin == Version(1)


@pytest.mark.parametrize(
    ("repo", "version", "revision", "got"),
    [
        ("a/b", None, None, "got none"),
        ("a/b", 1, "main", "got v1 and main"),
        ("a/b@v1", 1, None, "got v1 and v1"),
        ("a/b@main", None, "x", "got main and x"),
        ("a/b", 0, "main", "got v0 and main"),
    ],
)
def test_no_pin_and_two_pins_are_value_errors(repo: str, version: int | None, revision: str | None, got: str) -> None:
    with pytest.raises(ValueError, match=got):
        KernelRef.of(repo, version=version, revision=revision)


@pytest.mark.parametrize("version", [True, False, "1", 1.0, -1, 10**9])
def test_a_version_argument_is_a_whole_number(version: object) -> None:
    with pytest.raises(InvalidReference):
        KernelRef.of("a/b", version=version)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [True, "1", 1.0])
def test_what_is_no_number_is_said_to_be_none(version: object) -> None:
    with pytest.raises(InvalidReference, match=f"version must be a whole number, got {version!r}"):
        KernelRef.of("a/b", version=version)  # type: ignore[arg-type]


def test_a_layer_is_not_a_kernel() -> None:
    with pytest.raises(InvalidReference, match='Use "a/b@v1"'):
        KernelRef.of("a/b@v1:Layer")
