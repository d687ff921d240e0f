from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kernelhub.core.lockfile import LockedKernel, LockFile, changes
from kernelhub.core.refs import RepoId, Revision, Version
from kernelhub.errors import InvalidMetadata, InvalidReference, KernelNotFound

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
ONE = LockedKernel(
    RepoId("org", "name"),
    COMMIT,
    Version(1),
    "https://hub.example",
    {"torch-cpu": "sha256-abc", "torch-cuda": "sha256-def"},
    (RepoId("org", "other"),),
)
TWO = LockedKernel(RepoId("org", "other"), OTHER)

TEXT = """{
  "lock": 1,
  "kernels": [
    {
      "repo": "org/name",
      "hub": "https://hub.example",
      "version": 1,
      "commit": "0123456789abcdef0123456789abcdef01234567",
      "variants": {
        "torch-cpu": {
          "digest": "sha256-abc"
        },
        "torch-cuda": {
          "digest": "sha256-def"
        }
      },
      "depends": [
        "org/other"
      ]
    },
    {
      "repo": "org/other",
      "hub": null,
      "version": null,
      "commit": "ffffffffffffffffffffffffffffffffffffffff",
      "variants": {},
      "depends": []
    }
  ]
}
"""


def test_a_lock_is_written_sorted_and_reads_back() -> None:
    assert LockFile((TWO, ONE)).to_text() == TEXT
    assert LockFile.parse(TEXT) == LockFile.parse(TEXT.encode()) == LockFile((ONE, TWO))


def test_two_entries_of_one_repository_are_written_in_one_order() -> None:
    old, new = LockedKernel(TWO.repo, COMMIT, Version(2)), LockedKernel(TWO.repo, OTHER, Version(10))
    same = LockedKernel(TWO.repo, OTHER, Version(2))
    assert LockFile((new, same, old)).to_text() == LockFile((old, same, new)).to_text()
    assert LockFile.parse(LockFile((same, new, old)).to_text()).kernels == (old, same, new)


def test_a_kernel_is_found_by_its_repository() -> None:
    assert LockFile((ONE, TWO)).find(RepoId("org", "other")) is TWO


def test_a_kernel_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(KernelNotFound, match=r"org/x is not in the lock file \(there: org/name@v1, org/other\)"):
        LockFile((ONE, TWO)).find(RepoId("org", "x"))
    with pytest.raises(FileNotFoundError, match=r"\(there: none\)"):
        LockFile().find(RepoId("org", "x"))


def test_the_older_lock_of_the_kernels_package_is_read() -> None:
    hashes = {"torch-cpu": {"hash": "sha256-abc", "hash_type": "git_lfs_concat"}}
    text = json.dumps([{"repo_id": "org/name", "sha": COMMIT, "variants": hashes}])
    variants = {"torch-cpu": "git_lfs_concat:sha256-abc"}
    assert LockFile.parse(text) == LockFile((LockedKernel(ONE.repo, COMMIT, variants=variants),))


@pytest.mark.parametrize("key", ["repo_id", "repo-id"])
def test_the_newer_lock_of_the_kernels_package_is_read(key: str) -> None:
    entries = [
        {"dependency": {key: "org/name", "version": 1}, "lock": {"commit": COMMIT}},
        {"dependency": {key: "org/other"}, "lock": {"commit": OTHER}},
    ]
    locked = LockFile((LockedKernel(ONE.repo, COMMIT, Version(1)), TWO))
    assert LockFile.parse(json.dumps(entries)) == locked


def entry(**changes: Any) -> dict[str, Any]:
    return {"repo": "org/name", "commit": COMMIT, **changes}


def new(**changes: Any) -> list[Any]:
    return [{"dependency": {"repo_id": "a/b"}, "lock": {"commit": COMMIT}, **changes}]


@pytest.mark.parametrize(
    "value",
    [
        *(None, 1, "x", {}, {"lock": 2, "kernels": []}, {"lock": "1", "kernels": []}, {"kernels": []}, {"lock": 1}),
        *({"lock": 1, "kernels": {}}, {"lock": 1, "kernels": None}, ["repo"], [1], [None], [[]], [{}]),
        *([entry(repo="name")], [entry(repo=1)], [entry(commit="main")], [entry(commit=COMMIT.upper())]),
        *([entry(commit=None)], [{"repo": "org/name"}], [entry(version="1")], [entry(version=True)]),
        *([entry(version=-1)], [entry(version=1.5)], [entry(hub=1)], [entry(depends="org/name")]),
        *([entry(depends=["name"])], [entry(depends=[1])], [entry(variants="abc")], [entry(variants=[["a", "b"]])]),
        *([entry(variants={"torch-cpu": "x"})], [entry(variants={"torch-cpu": {}})]),
        *([entry(variants={"torch-cpu": {"digest": 1}})],),
        *([{"repo_id": "a/b", "sha": COMMIT}], [{"repo_id": "a/b", "variants": {}}]),
        *([{"repo_id": "a/b", "sha": "main", "variants": {}}], [{"repo_id": "a/b", "sha": COMMIT, "variants": []}]),
        *([{"repo_id": "a/b", "sha": COMMIT, "variants": {"x": {"hash": 1, "hash_type": "y"}}}],),
        *(new(dependency="a/b"), new(dependency={}), new(dependency={"repo_id": "b"}), new(lock="x"), new(lock={})),
        *(new(lock={"commit": "main"}), new(dependency={"repo_id": "a/b", "version": "1"})),
    ],
)
def test_a_malformed_lock_is_an_error(value: Any) -> None:
    with pytest.raises(InvalidMetadata, match="the lock file is malformed"):
        LockFile.parse(json.dumps(value))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"[NaN]", b'["\\ud800"]', b"<<<<<<< HEAD"])
def test_what_is_no_json_is_an_error(data: bytes) -> None:
    with pytest.raises(InvalidMetadata, match="the lock file is not JSON"):
        LockFile.parse(data)


V1, V2, MAIN = Version(1), Version(2), Revision("main")


def test_of_two_entries_the_one_of_the_version_or_revision_is_found() -> None:
    one, two = LockedKernel(TWO.repo, COMMIT, V1), LockedKernel(TWO.repo, OTHER, V2)
    main = LockedKernel(TWO.repo, "a" * 40, revision="main")
    lock = LockFile((one, two, main))
    assert lock.find(TWO.repo, V2) is two
    assert lock.find(TWO.repo, V1) is one
    assert lock.find(TWO.repo, MAIN) is main
    assert lock.find(TWO.repo, Revision(OTHER)) is two
    with pytest.raises(InvalidReference, match=r"the lock file has org/other@v1 and org/other@v2 and org/other@main"):
        lock.find(TWO.repo)
    with pytest.raises(KernelNotFound, match=r"org/other@v3 is not in the lock file \(there: org/other@v1, "):
        lock.find(TWO.repo, Version(3))
    assert LockFile.parse(lock.to_text()) == LockFile((main, one, two))


def test_an_entry_that_does_not_say_its_version_is_what_any_asks_for_but_no_other_commit() -> None:
    assert LockFile((TWO,)).find(TWO.repo, V1) is TWO
    assert LockFile((ONE,)).find(ONE.repo) is ONE
    with pytest.raises(KernelNotFound):
        LockFile((ONE,)).find(ONE.repo, V2)
    with pytest.raises(KernelNotFound):
        LockFile((TWO,)).find(TWO.repo, Revision(COMMIT))


def test_a_repository_that_moved_is_found_by_either_name() -> None:
    moved = LockedKernel(RepoId("new", "name"), COMMIT, V1, asked=RepoId("old", "name"))
    lock = LockFile.parse(LockFile((moved,)).to_text())
    assert lock.kernels == (moved,)
    assert lock.find(RepoId("old", "name"), V1) == lock.find(RepoId("new", "name")) == moved


def test_what_is_longer_than_any_lock_is_not_parsed() -> None:
    with pytest.raises(InvalidMetadata, match="the most is"):
        LockFile.parse(b" " * (32 * 1024 * 1024 + 1))


def test_changes_are_told_and_where_a_hub_lies_is_none() -> None:
    assert changes(LockFile((ONE,)), LockFile((replace(ONE, hub="/srv"),))) == []
    assert changes(LockFile((ONE,)), LockFile((TWO,))) == [
        "org/name@v1 is not needed any more",
        "org/other is new",
    ]
    other = replace(ONE, variants={"torch-cpu": "sha256-x"}, depends=())
    assert changes(LockFile((ONE,)), LockFile((other,))) == ["org/name@v1 has other variants and depends"]
