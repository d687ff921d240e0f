"""The modes, and the table of which registered mode serves which asked-for one, row by row."""

from __future__ import annotations

import pickle

import pytest

from kernelhub.errors import InvalidReference
from kernelhub.layers.mode import KernelizeFallback, Mode, serving

I, T, C, F = Mode.INFERENCE, Mode.TRAINING, Mode.TORCH_COMPILE, Mode.FALLBACK  # noqa: E741 - as in the table

# The table of api.md: asked for, and what is tried, in order.
ROWS = [(I, [I, I | C, T, T | C, F]), (I | C, [I | C, T | C, F]), (T, [T, T | C, F]), (T | C, [T | C, F])]


@pytest.mark.parametrize(("asked", "tried"), ROWS, ids=lambda value: str(value) if isinstance(value, Mode) else "")
def test_each_mode_is_served_by_the_modes_of_its_row_in_order(asked: Mode, tried: list[Mode]) -> None:
    assert list(serving(asked)) == tried


@pytest.mark.parametrize("mode", [F, C, Mode(0), "inference"])
def test_a_model_is_not_kernelized_for_what_is_no_use_of_a_model(mode: Mode) -> None:
    with pytest.raises(ValueError, match="cannot be kernelized for mode"):
        serving(mode)


def test_the_members_have_the_values_that_other_libraries_know() -> None:
    assert [(mode.name, mode.value) for mode in (F, T, I, C)] == [
        ("FALLBACK", 1),
        ("TRAINING", 2),
        ("INFERENCE", 4),
        ("TORCH_COMPILE", 8),
    ]


@pytest.mark.parametrize(("one", "other"), [(I, T), (T | C, I), (F, I), (C, F)])
def test_modes_that_exclude_each_other_do_not_combine(one: Mode, other: Mode) -> None:
    with pytest.raises(InvalidReference):
        one | other
    with pytest.raises(ValueError):
        other | one


def test_a_mode_is_masked_printed_and_pickled() -> None:
    assert (I | C) & ~C == I
    assert str(T | C) == "TRAINING|TORCH_COMPILE"
    assert pickle.loads(pickle.dumps(I | C)) == I | C
    assert F | F is F


def test_fallback_cases_are_the_known_ones_and_three_more() -> None:
    names = "NO_LAYER NO_DEVICE NO_COMPATIBLE_PROPERTIES NO_COMPATIBLE_MODE CANNOT_LOAD CONTRACT NOT_EQUAL NOT_FASTER"
    cases = [KernelizeFallback[name] for name in names.split()]
    assert [case.value for case in cases] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert all(case in KernelizeFallback.ALL for case in cases)
    outside = [case.name for case in cases if case not in KernelizeFallback.DEFAULT]
    assert outside == ["CANNOT_LOAD", "CONTRACT"]


def test_use_fallback_is_a_bool_or_cases() -> None:
    assert KernelizeFallback.of(True) is KernelizeFallback.DEFAULT
    assert KernelizeFallback.of(False) is KernelizeFallback.NONE
    assert KernelizeFallback.of(KernelizeFallback.ALL) is KernelizeFallback.ALL
    with pytest.raises(ValueError):
        KernelizeFallback.of("yes")  # type: ignore[arg-type]
