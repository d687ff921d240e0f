"""What holds of every value of `core`, whatever the text, the order or the machine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelhub.core.archs import covers
from kernelhub.core.backends import BACKENDS, BY_NAME, parse_tag, split_version
from kernelhub.core.canonical import canonical_json
from kernelhub.core.digest import Digest
from kernelhub.core.host import Host
from kernelhub.core.lockfile import LockedKernel, LockFile
from kernelhub.core.metadata import BackendInfo, KernelDepend, Metadata, Provenance
from kernelhub.core.paths import safe_path
from kernelhub.core.refs import KernelRef, RepoId, Revision, Version, is_commit, parse_pin
from kernelhub.core.select import rank, reject
from kernelhub.core.trust import TrustPolicy
from kernelhub.core.variants import (
    CPUS,
    CXX_ABIS,
    SYSTEMS,
    BuildVariant,
    Compiled,
    Framework,
    NoArch,
    UnknownVariant,
    VariantAccepted,
    VariantRejected,
    parse_variant,
)
from kernelhub.errors import InvalidMetadata, InvalidReference

# ---------------------------------------------------------------------------------------------------- how values are made

segments = st.from_regex(r"[A-Za-z0-9_]{1,8}([.-][A-Za-z0-9_]{1,8}){0,3}", fullmatch=True)
repos = st.builds(RepoId, segments, segments)
versions = st.builds(Version, st.integers(0, 999_999_999))
commits = st.text("0123456789abcdef", min_size=40, max_size=40)
branches = st.from_regex(r"[A-Za-uw-z0-9_][A-Za-z0-9_+-]{0,9}(/[A-Za-z0-9_]{1,5}){0,2}", fullmatch=True)
revisions = st.builds(Revision, st.one_of(branches, commits))
pins = st.one_of(versions, revisions)
layers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True)
refs = st.builds(KernelRef, repos, st.none() | pins, st.none() | layers)

pairs = st.tuples(st.integers(0, 9), st.integers(0, 12))


@st.composite
def compiled(draw: st.DrawFn) -> Compiled:
    row = draw(st.sampled_from(BACKENDS))
    cpu, system = draw(st.sampled_from(CPUS)), draw(st.sampled_from(SYSTEMS))
    if row.major_digits is None:
        return Compiled(row.name, None, cpu, system)
    lowest = 10 ** (row.major_digits - 1) if row.major_digits > 1 else 0
    # Few versions, so that builds and machines meet.
    major = draw(st.sampled_from([lowest, lowest + 2, 10**row.major_digits - 1]))
    return Compiled(row.name, (major, draw(st.integers(0, 12))), cpu, system)


frameworks = st.one_of(
    st.builds(Framework, st.just("torch"), pairs, st.sampled_from([None, *CXX_ABIS])),
    st.builds(Framework, st.sampled_from(["torch-stable-abi", "tvm-ffi"]), pairs),
)
noarchs = st.builds(NoArch, st.sampled_from([None, *BY_NAME]))
variants = st.one_of(
    st.builds(BuildVariant, frameworks, compiled()), st.builds(BuildVariant, st.just(Framework("noarch")), noarchs)
)

# Texts that are almost right: made of the pieces that names are made of.
pieces = [
    "torch",
    "-stable-abi",
    "tvm-ffi",
    "-",
    "-cxx11",
    "cu",
    "cpu",
    "rocm",
    "metal",
    "x86_64",
    "linux",
    "universal",
]
pieces += ["29", "210", "0", "1", "v", "@", ":", "/", ".", "..", "org", "name", " ", "\n", "é", "\0", "\ud800", "１"]
nearly = st.lists(st.sampled_from(pieces), max_size=8).map("".join)
texts = st.one_of(nearly, st.text(max_size=40), st.text(st.characters(codec=None), max_size=10))


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    """Machines on which about half of the builds of `variants` for their backend fit."""
    row = draw(st.sampled_from(BACKENDS))
    arch = draw(compiled().filter(lambda arch: arch.backend == row.name) if row.major_digits else st.none())
    return Host(
        python=draw(st.sampled_from([(3, 10), (3, 14), (3, 15)])),
        torch=draw(st.none() | pairs),
        backend=row.name,
        cpu=draw(st.sampled_from(CPUS)),
        os=draw(st.sampled_from(SYSTEMS)),
        backend_version=arch.version if arch else None,
        cxx_abi=draw(st.sampled_from(CXX_ABIS)),
        tvm_ffi=draw(st.none() | pairs),
        free_threaded=draw(st.booleans()),
        macos=draw(st.sampled_from([None, 15, 26])),
    )


names = st.lists(st.one_of(variants.map(str), nearly), max_size=12)

# ----------------------------------------------------------------------------------------------------- text <-> value


@given(variants)
def test_a_variant_prints_back(variant: BuildVariant) -> None:
    assert BuildVariant.parse(str(variant)) == variant
    assert parse_variant(variant.variant_str) == variant


@given(refs)
def test_a_kernel_prints_back(ref: KernelRef) -> None:
    assert KernelRef.parse(str(ref)) == ref


@given(repos, versions, revisions)
def test_repositories_versions_and_revisions_print_back(repo: RepoId, version: Version, revision: Revision) -> None:
    assert RepoId.parse(str(repo)) == repo
    assert Version.parse(str(version)) == parse_pin(version.ref) == version
    assert Revision.parse(str(revision)) == parse_pin(str(revision)) == revision
    assert (revision.commit == revision.ref) is is_commit(revision.ref)


@pytest.mark.parametrize(
    "parse",
    [BuildVariant.parse, KernelRef.parse, RepoId.parse, Version.parse, Revision.parse, parse_pin, parse_variant],
)
@given(text=texts)
def test_any_text_is_a_value_that_prints_back_or_the_documented_error(parse: Callable[[str], Any], text: str) -> None:
    try:
        assert str(parse(text)) == text
    except InvalidReference as error:
        said = (error.message, error.hint)
        assert all(said)
        assert parse is not parse_variant


@given(st.sampled_from(BACKENDS), st.text("0123456789", max_size=8))
def test_a_tag_prints_back(row: Any, digits: str) -> None:
    tag = parse_tag(row.tag + digits)
    if tag:
        found, version = tag
        assert (found.version_text(version) if version else found.tag) == row.tag + digits


@given(st.text(max_size=8), st.integers(1, 4))
def test_a_split_version_prints_back(digits: str, major_digits: int) -> None:
    version = split_version(digits, major_digits)
    if version:
        assert f"{version[0]}{version[1]}" == digits
        assert len(str(version[0])) == major_digits


# ----------------------------------------------------------------------------------------------------- select


def drawn(item: VariantAccepted | VariantRejected) -> tuple[str, str | None]:
    return item.variant.variant_str, item.reason if isinstance(item, VariantRejected) else None


@given(names, hosts(), st.randoms(use_true_random=False), st.booleans())
def test_rank_is_one_partition_whatever_the_order(given_names: list[str], host: Host, random: Any, cpu: bool) -> None:
    backend = BY_NAME["cpu" if cpu else host.backend]
    ranked = rank(given_names, host, backend)
    assert sorted(item.variant.variant_str for item in ranked) == sorted(set(given_names))
    for item in ranked:
        assert drawn(item)[1] == reject(item.variant, host, backend)
        assert isinstance(item, VariantRejected) or isinstance(item.variant, BuildVariant)
        assert drawn(item)[1] != ""
    accepted = [isinstance(item, VariantAccepted) for item in ranked]
    assert accepted == sorted(accepted, reverse=True)
    shuffled = [*given_names, *given_names[:3]]
    random.shuffle(shuffled)
    assert rank(shuffled, host, backend) == ranked


@given(names, hosts())
def test_the_order_of_two_does_not_depend_on_the_others(given_names: list[str], host: Host) -> None:
    backend = BY_NAME[host.backend]
    ranked = [item.variant.variant_str for item in rank(given_names, host, backend)]
    for first, second in itertools.pairwise(ranked):
        assert [item.variant.variant_str for item in rank([second, first], host, backend)] == [first, second]


@given(st.lists(variants, max_size=12), hosts())
def test_the_order_is_that_of_the_format(built: list[BuildVariant], host: Host) -> None:
    """formats.md: stable ABI (newest first), torch (untagged first), tvm-ffi, noarch, universal; highest backend version."""
    backend = BY_NAME[host.backend]
    best = [item.variant for item in rank(map(str, built), host, backend) if isinstance(item, VariantAccepted)]
    for first, second in itertools.pairwise(best):
        assert isinstance(first, BuildVariant)
        assert isinstance(second, BuildVariant)
        kinds = ["torch-stable-abi", "torch", "tvm-ffi", "noarch"]
        a, b = kinds.index(first.framework.kind), kinds.index(second.framework.kind)
        assert a <= b
        if a != b:
            continue
        if first.framework.kind == "torch-stable-abi":
            assert (first.framework.version or ()) >= (second.framework.version or ())
        assert (first.framework.cxx_abi is not None) <= (second.framework.cxx_abi is not None)
        assert (first.backend is None) <= (second.backend is None)
        if (
            first.framework == second.framework
            and isinstance(first.arch, Compiled)
            and isinstance(second.arch, Compiled)
        ):
            assert (first.arch.version or ()) >= (second.arch.version or ())


@given(variants, hosts())
def test_what_fits_satisfies_each_rule_of_the_format(variant: BuildVariant, host: Host) -> None:
    framework, arch = variant.framework, variant.arch
    if isinstance(arch, NoArch):
        fits = arch.backend in (None, host.backend)
    else:
        have = host.backend_version
        version = {
            "torch-stable-abi": lambda: host.torch is not None and framework.version <= host.torch,  # type: ignore[operator]
            "torch": lambda: framework.version == host.torch and framework.cxx_abi in (None, host.cxx_abi),
            "tvm-ffi": lambda: framework.version == host.tvm_ffi,
        }[framework.kind]
        if arch.version is None:
            machine = arch.backend != "metal" or (host.macos or 0) >= 26
        elif arch.backend == "cuda":
            machine = have is not None and arch.version[0] == have[0] and arch.version[1] <= have[1]
        else:
            machine = arch.version == have
        same = (arch.backend, arch.cpu, arch.os) == (host.backend, host.cpu, host.os)
        fits = same and machine and version() and (not host.free_threaded or host.python >= (3, 15))
    assert (reject(variant, host, BY_NAME[host.backend]) is None) is fits


@given(texts, hosts())
def test_an_unknown_name_never_fits(text: str, host: Host) -> None:
    variant = parse_variant(text)
    if isinstance(variant, UnknownVariant):
        assert reject(variant, host, BY_NAME[host.backend]) == "not the name of a build variant"


# ------------------------------------------------------------------------------------------------- digests and JSON

path_parts = st.one_of(st.sampled_from(["a", "b.py", "metadata.json", "x.pyc", "__pycache__", "c.so"]), segments)
relative = st.lists(path_parts, min_size=1, max_size=3).map("/".join)
files = st.dictionaries(relative, st.binary(max_size=3), max_size=6)
OPPOSITE = {"missing": {"unknown", "bytecode"}, "unknown": {"missing"}, "bytecode": {"missing", "bytecode"}}


@given(files, files, st.sampled_from(["sha256", "sha512"]))
def test_violations_are_symmetric(mine: dict[str, bytes], yours: dict[str, bytes], algorithm: str) -> None:
    one, other = Digest.of(mine, algorithm), Digest.of(yours, algorithm)
    there = {violation.path: violation.kind for violation in one.violations(other.files)}
    back = {violation.path: violation.kind for violation in other.violations(one.files)}
    assert there.keys() - back.keys() == back.keys() - there.keys() == set()
    for path, kind in there.items():
        assert back[path] in OPPOSITE.get(kind, {"different"})
    clean = not any(".pyc" in path or "__pycache__" in path for path in other.files)
    assert not clean or (there == {}) is (one == other)


@given(files)
def test_a_digest_of_files_reads_back_and_has_one_text(contents: dict[str, bytes]) -> None:
    digest = Digest.of(contents)
    backwards = Digest.of(dict(reversed(contents.items())))
    assert digest.text == backwards.text
    assert {*contents} - {*digest.files} <= {"metadata.json", "metadata.json.sigstore"}
    if len({path.casefold() for path in contents}) == len(contents):
        assert Digest.parse(json.loads(canonical_json(digest.to_json()))) == digest


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def shuffled(value: Any) -> Any:
    """The same value with the keys of its objects the other way round."""
    if isinstance(value, dict):
        return {key: shuffled(item) for key, item in reversed(value.items())}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(values)
def test_canonical_json_is_one_text_for_one_value(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == canonical_json(shuffled(value)) == text


@given(st.dictionaries(st.text(max_size=3), st.integers(), max_size=4))
def test_canonical_json_has_no_spaces_and_sorted_keys(value: dict[str, int]) -> None:
    text = canonical_json(value).decode()
    expected = ",".join(f"{json.dumps(key, ensure_ascii=False)}:{item}" for key, item in sorted(value.items()))
    assert text == "{" + expected + "}"


# ------------------------------------------------------------------------------------------------- files of JSON

locked = st.builds(
    LockedKernel,
    repos,
    commits,
    st.none() | versions,
    st.none() | st.text(max_size=9),
    st.dictionaries(variants.map(str), st.text(max_size=9), max_size=3),
    st.lists(repos, max_size=3, unique=True).map(lambda found: tuple(sorted(found))),
)


@given(st.lists(locked, max_size=4, unique_by=lambda kernel: kernel.repo), st.randoms(use_true_random=False))
def test_a_lock_reads_back_whatever_the_order(kernels: list[LockedKernel], random: Any) -> None:
    text = LockFile(tuple(kernels)).to_text()
    assert set(LockFile.parse(text).kernels) == set(kernels)
    assert LockFile.parse(text).to_text() == text
    random.shuffle(kernels)
    assert LockFile(tuple(kernels)).to_text() == text


json_keys = st.sampled_from(
    [
        "lock",
        "kernels",
        "repo",
        "commit",
        "version",
        "variants",
        "digest",
        "depends",
        "repo_id",
        "sha",
        "dependency",
        "hash",
        "hash_type",
        "hub",
        "name",
        "id",
        "license",
        "python-depends",
        "backend",
        "type",
        "archs",
        "provenance",
        "kernel",
        "kernel-depends",
        "repo-id",
        "revision",
        "kernels-minver",
        "algorithm",
        "files",
        "a.py",
        "upstream",
    ]
)
json_leaves = st.one_of(
    values,
    st.sampled_from([1, "org/name", "f" * 40, "cpu", "cuda", "sha256", "ab", "einops", "main", "0.17.2", "Apache-2.0"]),
)
json_trees = st.recursive(
    json_leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_keys, inner, max_size=5),
    max_leaves=15,
)
LEAST = {"name": "ab", "id": "x", "version": 1, "license": "MIT", "python-depends": [], "backend": {"type": "cpu"}}


@given(st.one_of(st.binary(max_size=20), json_trees.map(canonical_json)))
def test_any_bytes_are_a_lock_or_the_documented_error(data: bytes) -> None:
    try:
        lock = LockFile.parse(data)
    except InvalidMetadata:
        return
    assert LockFile.parse(lock.to_text()).to_text() == lock.to_text()


@given(st.dictionaries(json_keys, json_trees, max_size=4), st.sets(st.sampled_from(sorted(LEAST)), max_size=1))
def test_any_object_is_a_metadata_that_is_written_as_it_was_or_the_error(changes: Any, dropped: set[str]) -> None:
    raw = {key: value for key, value in {**LEAST, **changes}.items() if key not in dropped}
    try:
        metadata = Metadata.parse(canonical_json(raw))
    except InvalidMetadata:
        return
    assert metadata.to_json() == raw
    assert Metadata.parse(metadata.to_text()) == metadata


@given(st.binary(max_size=30))
def test_any_bytes_are_no_metadata(data: bytes) -> None:
    with pytest.raises(InvalidMetadata):
        Metadata.parse(data)


@given(
    st.builds(
        Metadata,
        name=st.from_regex(r"[a-z][-a-z0-9]{0,5}[a-z0-9]", fullmatch=True),
        id=st.from_regex(r"_[a-z0-9_]{1,5}", fullmatch=True).filter(lambda ident: ident != "_"),
        version=st.integers(0, 10**6),
        license=st.text(min_size=1, max_size=5),
        backend=st.builds(BackendInfo, st.sampled_from(sorted(BY_NAME)), st.lists(st.text(max_size=3)).map(tuple)),
        python_depends=st.lists(st.sampled_from(["einops", "helion", "tvm-ffi"]), max_size=3).map(tuple),
        kernel_depends=st.lists(st.builds(KernelDepend, repos, pins), max_size=3).map(tuple),
        upstream=st.none() | st.text(min_size=1, max_size=5),
        source=st.none() | st.text(min_size=1, max_size=5),
        kernels_minver=st.none() | st.tuples(*[st.integers(0, 99)] * 3),
        digest=st.none() | st.just(Digest.of({"a.py": b"1"})),
        provenance=st.dictionaries(
            st.sampled_from(["kernel", "kernel-builder"]), st.builds(Provenance, commits, st.booleans())
        ),
        raw=st.dictionaries(st.sampled_from(["x-one", "x-two"]), values),
    )
)
def test_metadata_that_is_made_reads_back(metadata: Metadata) -> None:
    back = Metadata.parse(metadata.to_text().encode())
    assert back == metadata
    assert {key: back.raw[key] for key in metadata.raw} == metadata.raw


# ------------------------------------------------------------------------------------------------------ paths and archs

hostile = st.sampled_from(
    [
        "..",
        ".",
        "",
        "a",
        "b.py",
        "C:",
        "\\",
        "~",
        "con",
        "nul.txt",
        " ",
        "a.",
        "a ",
        "\0",
        "\n",
        "\ud800",
        "..\\..",
        "//h/s",
    ]
)
paths = st.one_of(st.lists(hostile, max_size=5).map("/".join), texts, st.text(st.characters(codec=None), max_size=30))


@given(paths)
def test_an_accepted_path_never_leaves_its_folder(path: str) -> None:
    try:
        assert safe_path(path) == path
    except InvalidMetadata:
        return
    for flavour, folder in ((PurePosixPath, "/store/kernel"), (PureWindowsPath, "C:\\store\\kernel")):
        joined, inside = flavour(folder) / path, flavour(folder)
        assert not flavour(path).is_absolute()
        assert not flavour(path).drive
        assert not flavour(path).root
        assert ".." not in joined.parts
        assert joined.parts == (*inside.parts, *path.split("/"))
        assert joined != inside
        assert joined.is_relative_to(inside)
    path.encode()


@given(st.lists(path_parts, min_size=1, max_size=4))
def test_ordinary_paths_are_accepted(parts: list[str]) -> None:
    reserved = {"con", "prn", "aux", "nul"}
    if not any(part.split(".")[0].lower() in reserved or part[:3].lower() in ("com", "lpt") for part in parts):
        assert safe_path("/".join(parts)) == "/".join(parts)


cuda_archs = st.builds(
    lambda major, minor, suffix: f"{major}.{minor}{suffix}",
    st.integers(7, 12),
    st.integers(0, 9),
    st.sampled_from(["", "a", "f", "+PTX"]),
)


@given(st.lists(st.one_of(cuda_archs, st.text(max_size=5)), max_size=4), st.randoms(use_true_random=False))
def test_coverage_does_not_depend_on_the_order(archs: list[str], random: Any) -> None:
    def answer(order: list[str]) -> bool | None:
        try:
            return covers(tuple(order), "9.0")
        except InvalidMetadata:
            return None

    before = answer(archs)
    random.shuffle(archs)
    assert answer(archs) == before


@given(st.integers(7, 12), st.integers(0, 9), st.sampled_from(["", "a", "f", "+PTX"]))
def test_a_build_covers_the_device_it_was_built_for(major: int, minor: int, suffix: str) -> None:
    assert covers((f"{major}.{minor}{suffix}",), f"{major}.{minor}")
    assert not covers((f"{major}.{minor}{suffix}",), f"{major - 1}.{minor}")


@given(texts)
def test_any_text_is_a_pattern_of_trust_or_the_documented_error(text: str) -> None:
    try:
        policy = TrustPolicy.of([text])
    except InvalidReference:
        pass
    else:
        assert policy.patterns == {text}
        org, _, name = text.partition("/")
        assert RepoId.parse(f"{org}/{'any' if name == '*' else name}").org == org
