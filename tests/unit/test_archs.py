from __future__ import annotations

import pytest

from kernelhub.core.archs import covers
from kernelhub.errors import InvalidMetadata


@pytest.mark.parametrize(
    ("arch", "device", "covered"),
    [
        ("8.0", "8.0", True),
        ("8.0", "8.6", True),
        ("8.6", "8.0", False),
        ("8.0", "9.0", False),
        ("9.0", "8.9", False),
        ("9.0a", "9.0", True),
        ("12.0a", "12.1", False),
        ("10.0f", "10.0", True),
        ("10.0f", "10.3", True),
        ("10.3f", "10.0", False),
        ("10.0f", "11.0", False),
        ("9.0+PTX", "9.0", True),
        ("9.0+PTX", "12.0", True),
        ("9.0+PTX", "8.9", False),
        ("8.6+PTX", "8.0", False),
        ("10.0a+PTX", "12.0", False),
        ("8.0", "10.0", False),
        ("gfx942", "gfx942", True),
        ("gfx942", "gfx942:sramecc+:xnack-", True),
        ("gfx942:xnack+", "gfx942", True),
        ("gfx942", "gfx90a", False),
        ("9.0", "gfx942", False),
    ],
)
def test_a_build_for_one_architecture(arch: str, device: str, covered: bool) -> None:
    assert covers((arch,), device) is covered


def test_one_of_several_is_enough_and_none_named_covers_all() -> None:
    assert covers(("7.0", "8.0", "9.0"), "8.6")
    assert not covers(("7.0", "9.0"), "8.6")
    assert covers((), "8.6")
    assert covers((), "gfx942")


@pytest.mark.parametrize("arch", ["", "sm_90", "9", "9.0b", "9.0 ", "09.0", "9.0+ptx", "9.0a+", "9.10", "gfx942"])
@pytest.mark.parametrize("first", [True, False])
def test_an_unknown_cuda_architecture_is_an_error_wherever_it_stands(arch: str, first: bool) -> None:
    archs = (arch, "9.0") if first else ("9.0", arch)
    with pytest.raises(InvalidMetadata, match="is not a CUDA architecture such as"):
        covers(archs, "9.0")
