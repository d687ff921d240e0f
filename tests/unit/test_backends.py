from __future__ import annotations

import pytest

from kernelhub.core.backends import BACKENDS, BY_NAME, Fit, VersionPair, backend, parse_tag, split_version
from kernelhub.errors import InvalidReference

# Name, torch device, tag, spelling in noarch variants: formats.md, "Variant names".
TABLE = [
    ("cpu", "cpu", "cpu", "cpu"),
    ("cuda", "cuda", "cu", "cuda"),
    ("rocm", "cuda", "rocm", "rocm"),
    ("xpu", "xpu", "xpu", "xpu"),
    ("cann", "npu", "cann", "npu"),
    ("metal", "mps", "metal", "metal"),
    ("neuron", "neuron", "neuron", "neuron"),
    ("tpu", "tpu", "tpu", "tpu"),
]


def test_the_table_is_that_of_the_format() -> None:
    assert [(row.name, row.device, row.tag, row.noarch) for row in BACKENDS] == TABLE


@pytest.mark.parametrize(
    ("tag", "name", "version"),
    [
        ("cpu", "cpu", None),
        ("metal", "metal", None),
        ("neuron", "neuron", None),
        ("tpu", "tpu", None),
        ("cu128", "cuda", (12, 8)),
        ("cu1210", "cuda", (12, 10)),
        ("cu130", "cuda", (13, 0)),
        ("rocm64", "rocm", (6, 4)),
        ("rocm710", "rocm", (7, 10)),
        ("xpu20252", "xpu", (2025, 2)),
        ("cann81", "cann", (8, 1)),
    ],
)
def test_a_tag_is_a_backend_and_its_version(tag: str, name: str, version: VersionPair | None) -> None:
    assert parse_tag(tag) == (BY_NAME[name], version)
    if version:
        assert BY_NAME[name].version_text(version) == tag


@pytest.mark.parametrize(
    "tag",
    [
        "",
        "cu",
        "cu12",
        "cu012",
        "cu1208",
        "cu12x",
        "cu-128",
        "cpu1",
        "metal26",
        "rocm",
        "rocm7",
        "cann8",
        "xpu2025",
        "CU128",
        "cu128 ",
        "cu１２８",
        "npu",
        "cuda",
        "cuda128",
        "gaudi",
    ],
)
def test_other_tags_are_nothing(tag: str) -> None:
    assert parse_tag(tag) is None


@pytest.mark.parametrize(
    ("digits", "major_digits", "version"),
    [
        ("29", 1, (2, 9)),
        ("210", 1, (2, 10)),
        ("20", 1, (2, 0)),
        ("00", 1, (0, 0)),
        ("201", 1, None),
        ("2", 1, None),
        ("", 1, None),
        ("0128", 2, None),
        ("211111", 1, None),
        ("2¹", 1, None),
        ("-29", 1, None),
    ],
)
def test_versions_are_split_after_the_major_digits(digits: str, major_digits: int, version: VersionPair | None) -> None:
    assert split_version(digits, major_digits) == version


def test_only_cuda_versions_fit_by_their_major() -> None:
    assert [row.name for row in BACKENDS if row.fit is Fit.SAME_MAJOR] == ["cuda"]


def test_only_metal_needs_a_macos() -> None:
    assert {row.name: row.min_macos for row in BACKENDS if row.min_macos} == {"metal": 26}


def test_a_backend_is_found_by_name() -> None:
    assert backend("cuda") is BY_NAME["cuda"]


@pytest.mark.parametrize("name", ["", "CUDA", "npu", "gpu"])
def test_an_unknown_backend_is_an_error_that_lists_those_there_are(name: str) -> None:
    with pytest.raises(InvalidReference, match="cann, cpu, cuda, metal, neuron, rocm, tpu, xpu"):
        backend(name)
