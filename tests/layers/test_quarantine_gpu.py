"""`on_error="restore"` on a GPU: what is answered, and what nothing can be run for any more. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import models_for_tests as models
import pytest
import torch
from kernels_for_tests import write_kernel

from kernelhub import LocalLayerRepository, Mode, kernelize, register_kernel_mapping
from kernelhub.errors import KernelHubWarning
from kernelhub.layers.swap import in_effect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]

RAISES = """
from torch import nn

class Gate(nn.Module):
    def forward(self, x):
        y = x + 1000
        raise ValueError("it broke")
"""

# The device itself fails: an index that is out of bounds stops every kernel of the process.
FAILS = """
import sys
import torch
import models_for_tests as models
from kernelhub.layers.quarantine import watched

def kernel(self, x):
    found = torch.zeros(4, device=x.device)[torch.full((1,), 10, device=x.device)]
    torch.cuda.synchronize()
    return found

model = models.Gate()
model.forward = watched(kernel).__get__(model)
try:
    model(torch.ones(4, device="cuda"))
except RuntimeError as error:
    print("raised", type(error).__name__)
"""


@pytest.fixture
def gate(hub: object, tmp_path: Path) -> models.Gate:
    folder = write_kernel(
        tmp_path / "small", name="gpufault", layers=RAISES, init="from . import layers", backends=("cuda",)
    )
    register_kernel_mapping({"Gate": {"cuda": LocalLayerRepository(folder, layer_name="Gate")}})
    return kernelize(models.Gate(), mode=Mode.INFERENCE, device="cuda", on_error="restore")


def test_an_error_on_the_host_is_answered_for(gate: models.Gate) -> None:
    x = torch.linspace(-1, 1, 64, device="cuda")
    with pytest.warns(KernelHubWarning, match="runs its own forward from now on"):
        answer = gate(x)
    assert torch.equal(answer, torch.relu(x))
    assert in_effect(gate) is None


def test_while_a_graph_is_recorded_the_error_is_passed_on(gate: models.Gate) -> None:
    x = torch.ones(8, device="cuda")
    with pytest.raises(ValueError, match="it broke"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        gate(x)
    assert in_effect(gate), "nothing is decided while a graph is recorded"


def test_where_the_device_has_failed_its_error_is_passed_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert "raised" in done.stdout, done.stderr
    assert "runs its own forward" not in done.stderr
