"""Proofs on GPUs: the same tests on the device's own memory, clocks and random state. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import proof_kernels as layers
import pytest
import torch
from kernels_for_tests import write_kernel
from torch import nn

from kernelhub import LocalLayerRepository, Mode, kernel_report, kernelize, register_kernel_mapping
from kernelhub.hub.client import Hub
from kernelhub.layers import capture
from kernelhub.layers.report_values import ReportRow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

I, T = Mode.INFERENCE, Mode.TRAINING  # noqa: E741 - as in the tables


def verified(tmp_path: Path, layer: str, forward: str, mode: Mode, **options: Any) -> ReportRow:
    folder = write_kernel(
        tmp_path / "kernel",
        name="gpu",
        layers=layers.source(forward),
        init="from . import layers",
        backends=("cpu", "rocm" if torch.version.hip else "cuda"),
    )
    register_kernel_mapping({layer: {"cuda": LocalLayerRepository(folder, layer_name="Kernel")}})
    model = nn.Sequential(nn.Linear(8, 8), getattr(layers, layer)()).cuda()
    sample, state = torch.randn(64, 8, device="cuda"), torch.cuda.get_rng_state()
    kernelize(model, mode=mode, sample_inputs=sample, **options)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    return kernel_report(model).rows[0]


@pytest.mark.parametrize("mode", [I, T])
@pytest.mark.parametrize("layer", ["Norm", "Act"])
def test_right_kernels_are_equal(hub: Hub, tmp_path: Path, layer: str, mode: Mode) -> None:
    row = verified(tmp_path, layer, layers.RIGHT[layer], mode, verify=True)
    assert (row.outcome, row.reason, row.reference) == ("kernel", "", "float64")


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        ("return norm(x, self.weight, 1e-4)", "output"),
        ("return norm(x, self.weight, self.eps).cpu()", "its device is cpu"),
        ("padded = x.new_empty(9999)\n        return norm(x, self.weight, self.eps) + 0 * padded.sum()", "NaN"),
        ("return norm(x, self.weight.detach(), self.eps)", "gradient of weight"),
    ],
)
def test_wrong_kernels_are_not(hub: Hub, tmp_path: Path, forward: str, expected: str) -> None:
    row = verified(tmp_path, "Norm", f"def forward(self, x):\n        {forward}", T, verify=True)
    assert row.outcome == "original"
    assert expected in row.reason


@pytest.mark.parametrize("mode", [I, T, I | Mode.TORCH_COMPILE])
def test_a_slow_kernel_is_not_faster(hub: Hub, tmp_path: Path, mode: Mode) -> None:
    """Thousands of times the original's work: no load of the machine turns that around."""
    slow = """can_torch_compile = True

    def forward(self, x):
        big = torch.ones(4096, 4096, device=x.device)
        for _ in range(10):
            big = big @ big * 2.0**-12
        return norm(x, self.weight, self.eps) * big[0, 0]"""
    row = verified(tmp_path, "Norm", slow, mode, only_if_faster=True)
    assert row.outcome == "original"
    assert "not faster" in row.reason, row.reason
    assert row.speedup is not None


@pytest.mark.parametrize("mode", [I, T])
def test_equality_is_looked_at_in_compiled_frames(hub: Hub, tmp_path: Path, mode: Mode) -> None:
    right = f"can_torch_compile = True\n\n    {layers.RIGHT['Norm']}"
    row = verified(tmp_path, "Norm", right, mode | Mode.TORCH_COMPILE, verify=True)
    assert (row.outcome, row.reason, row.reference) == ("kernel", "", "float64")
    wrong = right.replace("self.eps)", "self.eps) + (1 if torch.compiler.is_compiling() else 0)")
    row = verified(tmp_path / "wrong", "Norm", wrong, mode | Mode.TORCH_COMPILE, verify=True)
    assert "not equal: output" in row.reason


def test_a_second_run_measures_nothing_and_another_device_of_the_name_neither(hub: Hub, tmp_path: Path) -> None:
    options = {"verify": True, "only_if_faster": True}
    assert verified(tmp_path, "Norm", layers.RIGHT["Norm"], I, **options).remembered is None
    assert verified(tmp_path, "Norm", layers.RIGHT["Norm"], I, **options).remembered is not None
    assert verified(tmp_path, "Norm", layers.RIGHT["Norm"], I, refresh=True, **options).remembered is None
    names = {torch.cuda.get_device_properties(index).name for index in range(torch.cuda.device_count())}
    if torch.cuda.device_count() > 1 and len(names) == 1:
        with torch.cuda.device(1):
            row = verified(tmp_path, "Norm", layers.RIGHT["Norm"], I, **options)
        assert (row.device, row.remembered is not None) == ("cuda:1", True)


def test_copies_wait_on_the_cpu_where_the_device_has_no_room(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_room_for", lambda tensor: torch.device("cpu"))
    row = verified(tmp_path, "Norm", layers.RIGHT["Norm"], T, verify=True)
    assert (row.outcome, row.reason) == ("kernel", "")
