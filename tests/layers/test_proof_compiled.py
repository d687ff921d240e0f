"""Proofs for `TORCH_COMPILE`: original and kernel run in compiled frames, as the model will run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import proof_kernels as layers
import pytest
import torch
from kernels_for_tests import write_kernel
from torch import nn

from kernelhub import (
    LocalLayerRepository,
    Mode,
    kernel_report,
    kernelize,
    register_kernel_mapping,
    use_kernel_forward_from_hub,
)
from kernelhub.layers.report_values import ReportRow

pytestmark = [pytest.mark.usefixtures("hub"), pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning")]

COMPILED = {mode: mode | Mode.TORCH_COMPILE for mode in (Mode.INFERENCE, Mode.TRAINING)}
Register = Callable[..., None]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that were compiled; what a real backend makes of them is not the question here."""
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield made
    torch._dynamo.reset()


@pytest.fixture
def register(tmp_path: Path) -> Register:
    def register(layer: str, forward: str = "") -> None:
        body = f"can_torch_compile = True\n\n    {forward or layers.RIGHT[layer]}"
        folder = write_kernel(
            tmp_path / layer.lower(), name=layer.lower(), layers=layers.source(body), init="from . import layers"
        )
        register_kernel_mapping({layer: {"cpu": LocalLayerRepository(folder, layer_name="Kernel")}})

    return register


def checked(model: nn.Module, sample: Any, mode: Mode, **options: Any) -> ReportRow:
    kernelize(model, mode=mode, device="cpu", sample_inputs=sample, **{"verify": True, **options})
    return kernel_report(model).rows[0]


@pytest.mark.parametrize("mode", COMPILED)
def test_a_right_kernel_is_equal_in_frames_of_its_own(register: Register, graphs: list[Any], mode: Mode) -> None:
    register("Norm")
    row = checked(nn.Sequential(nn.Linear(8, 8), layers.Norm()), torch.randn(3, 8), COMPILED[mode])
    assert (row.outcome, row.reason, row.reference) == ("kernel", "", "float64")
    assert len(graphs) == 2, "the original's and the kernel's"


def test_a_kernel_that_is_wrong_where_it_is_compiled_is_caught(register: Register, graphs: list[Any]) -> None:
    register("Act", "def forward(self, x):\n        return torch.relu(x) + (1 if torch.compiler.is_compiling() else 0)")
    assert checked(layers.Act(), torch.randn(3, 8), Mode.INFERENCE).outcome == "kernel"
    row = checked(layers.Act(), torch.randn(3, 8), COMPILED[Mode.INFERENCE])
    assert row.outcome == "original"
    assert "not equal: output: it is off by 1" in row.reason


def test_the_original_is_compiled_too(register: Register, graphs: list[Any]) -> None:
    """What the compiled original gives is what the kernel is compared with."""

    @use_kernel_forward_from_hub("Act")
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) if torch.compiler.is_compiling() else x

    register("Act")
    assert checked(Other(), torch.randn(3, 8), COMPILED[Mode.INFERENCE]).outcome == "kernel"
    assert checked(Other(), torch.randn(3, 8), Mode.INFERENCE).outcome == "original"


def test_memory_that_nobody_wrote_to_is_looked_for_outside_of_the_frame(register: Register, graphs: list[Any]) -> None:
    register("Act", "def forward(self, x):\n        return torch.relu(x) + 0 * x.new_empty(9999).sum()")
    row = checked(layers.Act(), torch.randn(3, 8), COMPILED[Mode.INFERENCE])
    assert "NaN" in row.reason


def test_layers_of_a_kind_share_their_frames(register: Register, graphs: list[Any]) -> None:
    register("Norm")
    model = nn.Sequential(*(layers.Norm() for _ in range(10)))
    row = checked(model, torch.randn(3, 8), COMPILED[Mode.INFERENCE], only_if_faster=True)
    assert row.reference == "float64"
    assert len(graphs) == 2, "and past torch's limit of eight they would run as they are written, without a word"


def test_layers_of_another_kind_have_their_own(register: Register, graphs: list[Any]) -> None:
    register("Norm")
    model = nn.Sequential(*(layers.Norm() for _ in range(10)))
    for number, layer in enumerate(model):
        layer.eps = 1e-6 * (number + 1)
    checked(model, torch.randn(3, 8), COMPILED[Mode.INFERENCE])
    assert [row.outcome for row in kernel_report(model).rows] == ["kernel"] * 10
    assert len(graphs) == 20


def test_an_original_that_cannot_be_compiled_is_not_tested(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    register("Act")
    row = checked(layers.Act(), torch.randn(3, 8), COMPILED[Mode.INFERENCE])
    torch._dynamo.reset()
    assert row.outcome == "original"
    assert "not tested: the original cannot be run by itself" in row.reason
