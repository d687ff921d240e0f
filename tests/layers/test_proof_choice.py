"""Several kernels for a layer: which one runs, and what the report says of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import proof_kernels as layers
import pytest
import torch
from kernels_for_tests import write_kernel
from torch import nn

from kernelhub import (
    KernelizeFallback,
    LayerRepository,
    LocalLayerRepository,
    Mode,
    kernel_report,
    kernelize,
    plan_kernels,
    register_kernel_mapping,
    use_kernel_mapping,
)
from kernelhub.errors import InvalidReference, KernelNotFound, NoKernelForLayer
from kernelhub.layers import proof, timing
from kernelhub.layers.mapping import parse
from kernelhub.layers.report_values import ReportRow
from kernelhub.layers.timing import Speed

pytestmark = [pytest.mark.usefixtures("hub"), pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning")]

I = Mode.INFERENCE  # noqa: E741 - as in the tables
CALLS: list[str] = []
SPEEDS: dict[str, Speed] = {}
MISSING = LayerRepository("org/missing", layer_name="Kernel", version=1)
Make = Callable[..., LocalLayerRepository]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make("fast", speed=2.0)`: a kernel for `Norm` that is timed as so much faster than the original."""
    CALLS.clear()
    SPEEDS.clear()

    def race(original: Callable[[], object], kernel: Callable[[], object], watch: object) -> Speed:
        CALLS.clear()
        kernel()
        return SPEEDS[CALLS[0]]

    monkeypatch.setattr(timing, "race", race)

    def make(
        name: str, *, speed: float = 1.5, low: float | None = None, forward: str = "{right}"
    ) -> LocalLayerRepository:
        SPEEDS[name] = Speed(speed, speed - 0.1 if low is None else low, speed + 0.1)
        right = f"CALLS.append({name!r})\n        return norm(x, self.weight, self.eps)"
        code = layers.source(
            f"def forward(self, x):\n        {forward.format(right=right)}", "from test_proof_choice import CALLS"
        )
        folder = write_kernel(tmp_path / name, name=name, layers=code, init="from . import layers")
        return LocalLayerRepository(folder, layer_name="Kernel")

    return make


def chosen(repositories: Any, model: nn.Module | None = None, **options: Any) -> ReportRow:
    """The row of a `Norm` for which these are registered."""
    model = layers.Norm() if model is None else model
    asked = {"mode": I, "sample_inputs": torch.randn(3, 8), "verify": True, "only_if_faster": True, **options}
    if not (asked["verify"] or asked["only_if_faster"]):
        del asked["sample_inputs"]
    with use_kernel_mapping({"Norm": {"cpu": {I: repositories}}}):
        kernelize(model, device="cpu", **asked)
    return kernel_report(model).rows[0]


def ran(row: ReportRow) -> str | None:
    return row.repository and Path(row.repository).name


# Measured


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_fastest_of_the_equal_ones_wins_wherever_it_stands(make: Make, order: tuple[int, ...]) -> None:
    made = [make("good", speed=1.5), make("best", speed=2.0), make("slow", speed=0.5)]
    row = chosen([made[at] for at in order])
    assert (ran(row), row.speedup, row.outcome) == ("best", 2.0, "kernel")
    lost = {Path(text.partition(":Kernel: ")[0]).name: text.partition(":Kernel: ")[2] for text in row.lost}
    assert lost.keys() == {"good", "slow"}
    assert lost["good"].startswith("1.50x, and ")
    assert lost["good"].endswith("best:Kernel 2.00x")
    assert lost["slow"] == "not faster: 0.50x (0.40 to 0.60)"


def test_the_fastest_is_no_use_where_it_is_wrong(make: Make) -> None:
    wrong = make("wrong", speed=9.0, forward="return norm(x, self.weight, self.eps) + 1")
    row = chosen([wrong, make("right", speed=1.5)])
    assert ran(row) == "right"
    (text,) = row.lost
    assert "wrong:Kernel: not equal: output" in text
    assert "lost: " in str(kernel_report(_kernelized([wrong, make("right")])))


def _kernelized(repositories: Any) -> nn.Module:
    model = nn.Sequential(layers.Norm())
    chosen(repositories, model)
    return model


def test_the_original_is_always_a_candidate(make: Make) -> None:
    row = chosen([make("one", speed=0.9), make("other", speed=1.2, low=0.99)])
    assert row.outcome == "original"
    assert "one:Kernel: not faster: 0.90x" in row.reason
    assert "other:Kernel: not faster: 1.20x" in row.reason
    assert row.lost == ()


def test_of_two_that_are_as_fast_the_first_named_is_taken(make: Make) -> None:
    assert ran(chosen([make("one"), make("other")])) == "one"
    assert ran(chosen([make("other"), make("one")])) == "other"


def test_equality_alone_takes_the_first_that_is_equal_and_looks_no_further(make: Make) -> None:
    wrong = make("wrong", forward="return x")
    right, never = make("right"), make("never", forward="raise AssertionError('it is not asked')")
    row = chosen([wrong, right, never], only_if_faster=False)
    assert (ran(row), row.speedup) == ("right", None)
    assert len(row.lost) == 1
    assert row.reference == "float64"


def test_speed_alone_takes_the_fastest(make: Make) -> None:
    assert ran(chosen([make("one", speed=1.1), make("two", speed=3.0)], verify=False)) == "two"


def test_each_layer_has_the_kernel_that_is_right_for_it(make: Make) -> None:
    """The first is wrong for one size: that layer gets the second."""
    small = make("small", speed=2.0, forward="{right} + (x.shape[-1] > 4)")
    model = nn.Sequential(layers.Norm(4), layers.Norm(8))

    def run(model: nn.Module) -> None:
        model[0](torch.randn(2, 4))
        model[1](torch.randn(2, 8))

    chosen([small, make("all", speed=1.5)], model, sample_inputs=run)
    assert [ran(row) for row in kernel_report(model).rows] == ["small", "all"]


def test_a_choice_is_remembered_with_its_reasons(make: Make) -> None:
    made = [make("good", speed=1.5), make("best", speed=2.0)]
    first = chosen(made)
    SPEEDS.clear()  # whoever is timed now fails
    second = chosen(made)
    assert (ran(second), second.lost) == ("best", first.lost)
    assert second.remembered is not None


def test_what_cannot_be_used_has_lost_and_the_report_says_why(make: Make) -> None:
    row = chosen([MISSING, make("here")])
    assert ran(row) == "here"
    assert row.lost[0].startswith("org/missing@v1:Kernel: ")
    assert "was not found" in row.lost[0]


# Not measured


def test_unmeasured_the_first_that_can_be_used_is_taken(make: Make) -> None:
    one, other = make("one"), make("other")
    row = chosen([one, other], verify=False, only_if_faster=False)
    assert (ran(row), row.lost) == ("one", ())
    row = chosen([MISSING, other, one], verify=False, only_if_faster=False)
    assert ran(row) == "other"
    assert len(row.lost) == 1


def test_no_later_kernel_is_loaded_where_an_earlier_one_will_do(make: Make) -> None:
    assert ran(chosen([make("one"), MISSING], verify=False, only_if_faster=False)) == "one"


def test_where_none_can_be_used_the_first_error_that_is_not_allowed_is_raised(make: Make) -> None:
    contract = make("contract", forward="return x").repo_path
    text = (contract / "build" / "torch-cpu" / "layers.py").read_text()
    (contract / "build" / "torch-cpu" / "layers.py").write_text(text.replace("forward(self, x)", "forward(self, x, y)"))
    broken = LocalLayerRepository(contract, layer_name="Kernel")
    options: dict[str, Any] = {"verify": False, "only_if_faster": False}
    with pytest.raises(KernelNotFound, match="org/missing"):
        chosen([MISSING, broken], **options)
    with pytest.raises(TypeError, match="cannot stand in"):
        chosen([MISSING, broken], use_fallback=KernelizeFallback.CANNOT_LOAD, **options)
    row = chosen([MISSING, broken], use_fallback=KernelizeFallback.ALL, **options)
    assert row.outcome == "original"
    assert "org/missing@v1:Kernel: " in row.reason
    assert "cannot stand in" in row.reason


def test_strictness_covers_a_choice_that_nobody_wins(make: Make) -> None:
    allowed = KernelizeFallback.ALL & ~KernelizeFallback.NOT_FASTER
    with pytest.raises(NoKernelForLayer, match="not faster: 0.90x"):
        chosen([make("one", speed=0.9), make("wrong", forward="return x")], use_fallback=allowed)
    assert ran(chosen([make("slow", speed=0.9), make("fast")], use_fallback=allowed)) == "fast"


# What is written


def test_a_list_is_one_registration(make: Make) -> None:
    one, other = make("one"), make("other")
    (row,) = parse({"Norm": {"cpu": [one, other, one]}})["Norm"]
    assert row.repositories == (one, other)
    register_kernel_mapping({"Norm": {"cpu": [one, other]}})
    register_kernel_mapping({"Norm": {"cpu": other}})
    (planned,) = plan_kernels(layers.Norm(), mode=I).rows
    assert planned.repository == str(other)
    register_kernel_mapping({"Norm": {"cpu": (one, other)}})
    (planned,) = plan_kernels(layers.Norm(), mode=I).rows
    assert planned.repository == f"{one}, or {other}"
    assert "the fastest of them where they are measured" in planned.reason


@pytest.mark.parametrize(
    ("value", "expected"),
    [([], "the list of repositories is empty"), (["org/name"], r"'cpu'\[0\]: 'org/name' is not a kernel repository")],
)
def test_lists_that_name_no_kernel_are_errors(value: Any, expected: str) -> None:
    with pytest.raises(InvalidReference, match=expected):
        parse({"Norm": {"cpu": value}})


def test_kernels_of_a_choice_are_timed_once_for_all_layers_of_a_kind(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    real = proof.time_calls

    def counted(*args: Any) -> Speed:
        speed = real(*args)
        timed.append(CALLS[0])
        return speed

    monkeypatch.setattr(proof, "time_calls", counted)
    made = [make("one", speed=1.5), make("two", speed=2.0)]
    model = nn.Sequential(layers.Norm(), layers.Norm(), layers.Norm())
    chosen(made, model)
    assert timed == ["one", "two"]
    assert [(ran(row), row.timed_on) for row in kernel_report(model).rows] == [("two", "0")] * 3
