"""`only_if_faster`: what is timed, who wins, and what the report says. No test reads a real clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import proof_kernels as layers
import pytest
import torch
from kernels_for_tests import write_kernel
from torch import nn

from kernelhub import (
    KernelizeFallback,
    LocalLayerRepository,
    Mode,
    kernel_report,
    kernelize,
    register_kernel_mapping,
)
from kernelhub.errors import NoKernelForLayer
from kernelhub.hub.client import Hub
from kernelhub.layers import timing
from kernelhub.layers.timing import Speed, race

pytestmark = [pytest.mark.usefixtures("hub"), pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning")]

I, T = Mode.INFERENCE, Mode.TRAINING  # noqa: E741 - as in the tables


class Watch:
    """A stopwatch that says what it was told, and runs the work. `kernel` is how long a kernel's call takes."""

    def __init__(self, original: float, kernel: float) -> None:
        self.original, self.kernel, self.measured = original, kernel, 0

    def __call__(self, work: Callable[[], object]) -> float:
        self.measured += 1
        CALLS.clear()
        work()
        return self.kernel * len(CALLS) if CALLS else self.original


CALLS: list[int] = []


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], Watch]:
    def install(original: float, kernel: float) -> Watch:
        made = Watch(original, kernel)
        monkeypatch.setattr(timing, "stopwatch", lambda device: made)
        monkeypatch.setattr(timing, "_LEAST", 0.0)  # one call a measurement
        return made

    return install


@pytest.fixture
def timed_norm(hub: Hub, tmp_path: Path) -> None:
    """A right kernel that says when it runs."""
    before = "from test_proof_timing import CALLS"
    code = layers.source(
        "can_torch_compile = True\n\n    def forward(self, x):\n        CALLS.append(1)\n        return norm(x, self.weight, self.eps)",
        before,
    )
    folder = write_kernel(tmp_path / "kernel", name="timed", layers=code, init="from . import layers")
    mode = T | Mode.TORCH_COMPILE
    register_kernel_mapping({"Norm": {"cpu": {mode: LocalLayerRepository(folder, layer_name="Kernel")}}})


# The race


def run_race(originals: list[float], kernels: list[float]) -> tuple[Speed, list[str]]:
    order: list[str] = []
    times = {"original": iter(originals), "kernel": iter(kernels)}

    def watch(work: Callable[[], object]) -> float:
        before = len(order)
        work()
        return next(times[order[before]])

    speed = race(lambda: order.append("original"), lambda: order.append("kernel"), watch)
    return speed, order


def test_the_median_of_the_ratios_and_its_interval() -> None:
    speed, _ = run_race([1.0] * 3 + [2.0] * 15, [1.0] * 3 + [1.0] * 15)
    assert speed == Speed(2.0, 2.0, 2.0)
    assert speed.wins


def test_both_take_turns_in_being_first() -> None:
    _, order = run_race([1.0] * 18, [1.0] * 18)
    pairs = [tuple(order[at : at + 2]) for at in range(6, len(order), 2)]
    assert len(pairs) == timing.ROUNDS
    assert pairs[:4] == [("original", "kernel"), ("kernel", "original")] * 2


def test_a_win_within_the_spread_is_none() -> None:
    """The median says 1.2, and four of fifteen rounds say that the kernel is slower."""
    speed, _ = run_race([1.0] * 3 + [0.9] * 4 + [1.2] * 11, [1.0] * 18)
    assert speed == Speed(1.2, 0.9, 1.2)
    assert not speed.wins
    speed, _ = run_race([1.0] * 3 + [0.9] * 3 + [1.2] * 12, [1.0] * 18)
    assert speed.wins, "three rounds may be anything"


def test_short_work_is_repeated_until_it_can_be_measured() -> None:
    assert timing._repeats(1e-3) == 1
    assert timing._repeats(1e-4) == 5
    assert timing._repeats(0.0) == 100


def test_the_clock_measures_the_work() -> None:
    done: list[int] = []
    assert timing.stopwatch(torch.device("cpu"))(lambda: done.append(1)) >= 0
    assert done == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_measure_on_gpus() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(1024, 1024, device=device)
    watch = timing.stopwatch(device)
    assert watch is not timing.by_clock
    assert watch(lambda: x @ x) > 0


# In kernelize


@pytest.mark.usefixtures("timed_norm")
def test_a_kernel_that_is_equal_but_slower_is_not_taken(watch: Callable[[float, float], Watch]) -> None:
    watch(1.0, 2.0)
    model = nn.Sequential(layers.Norm())
    kernelize(model, mode=I, sample_inputs=torch.randn(3, 8), verify=True, only_if_faster=True)
    (row,) = kernel_report(model).rows
    assert (row.outcome, row.speedup, row.speedup_low, row.speedup_high) == ("original", 0.5, 0.5, 0.5)
    assert "not faster: 0.50x (0.50 to 0.50)" in row.reason
    assert str(kernel_report(model)).count("0.50x (0.50 to 0.50)") == 1, "the speed stands in its column"
    assert row.reference == "float64"
    assert "forward" not in vars(model[0])


@pytest.mark.usefixtures("timed_norm")
@pytest.mark.parametrize("mode", [I, T])
@pytest.mark.parametrize("verify", [False, True])
def test_a_kernel_that_wins_is_taken_and_the_report_says_by_how_much(
    watch: Callable[[float, float], Watch], mode: Mode, verify: bool
) -> None:
    watch(3.0, 2.0)
    model = nn.Sequential(layers.Norm())
    kernelize(model, mode=mode, sample_inputs=torch.randn(3, 8), verify=verify, only_if_faster=True)
    (row,) = kernel_report(model).rows
    assert (row.outcome, row.speedup, row.reason) == ("kernel", 1.5, "")
    assert row.reference == ("float64" if verify else None)
    assert "1.50x (1.50 to 1.50)" in str(kernel_report(model))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("timed_norm")
def test_who_must_not_keep_the_original_is_told(watch: Callable[[float, float], Watch]) -> None:
    watch(1.0, 1.0)
    model = nn.Sequential(layers.Norm())
    allowed = KernelizeFallback.ALL & ~KernelizeFallback.NOT_FASTER
    with pytest.raises(NoKernelForLayer, match=r"0 \(Norm\).*not faster: 1.00x") as caught:
        kernelize(model, mode=I, sample_inputs=torch.randn(3, 8), only_if_faster=True, use_fallback=allowed)
    assert "KernelizeFallback.NOT_FASTER" in str(caught.value)


@pytest.mark.usefixtures("timed_norm")
def test_layers_of_one_kind_share_a_timing_and_say_so(watch: Callable[[float, float], Watch]) -> None:
    made = watch(3.0, 2.0)
    model = nn.Sequential(layers.Norm(), layers.Norm(), layers.Norm(4), layers.Norm())
    model[3].eps = 1e-5

    def run(model: nn.Module) -> None:
        x = model[3](model[1](model[0](torch.randn(3, 8))))
        model[2](x[:, :4].contiguous())

    kernelize(model, mode=I, sample_inputs=run, verify=True, only_if_faster=True)
    rows = kernel_report(model).rows
    assert [row.timed_on for row in rows] == ["0", "0", "2", "3"], "another size and another epsilon are timed again"
    assert [row.outcome for row in rows] == ["kernel"] * 4
    lines = str(kernel_report(model)).splitlines()
    assert ["*" in line for line in lines[3:7]] == [False, True, False, False]
    assert lines[7] == "* timed on another layer of its kind: 0"
    each = 2 * (timing._WARM_UP + 1 + timing.ROUNDS)
    assert made.measured == 3 * each


@pytest.mark.usefixtures("timed_norm")
def test_compiled_models_are_compared_and_timed_in_compiled_frames(
    watch: Callable[[float, float], Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One frame for the original and one for the kernel, whatever many layers of the kind there are."""
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    watch(3.0, 2.0)
    model = nn.Sequential(layers.Norm(), layers.Norm())
    kernelize(model, mode=I, sample_inputs=torch.randn(3, 8), verify=True, only_if_faster=True)
    assert compiled == []
    mode = I | Mode.TORCH_COMPILE
    kernelize(model, mode=mode, sample_inputs=torch.randn(3, 8), verify=True, only_if_faster=True)
    assert len({id(function.__code__) for function in compiled}) == len(compiled) == 2, "cached by its code object"
    assert [row.outcome for row in kernel_report(model).rows] == ["kernel"] * 2


def test_a_kernel_that_raises_is_not_faster(tmp_path: Path, watch: Callable[[float, float], Watch]) -> None:
    watch(3.0, 2.0)
    code = layers.source("def forward(self, x):\n        raise ValueError('no')")
    folder = write_kernel(tmp_path / "kernel", name="raising", layers=code, init="from . import layers")
    register_kernel_mapping({"Norm": {"cpu": LocalLayerRepository(folder, layer_name="Kernel")}})
    model = nn.Sequential(layers.Norm())
    kernelize(model, mode=I, sample_inputs=torch.randn(3, 8), only_if_faster=True)
    assert "timing it failed: ValueError: no" in kernel_report(model).rows[0].reason
