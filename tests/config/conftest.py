"""A default hub with an empty store and the embedded kernels, no registrations, and a model with two marked layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from kernelhub import use_kernel_forward_from_hub
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.layers import mapping
from kernelhub.settings import Settings


@use_kernel_forward_from_hub("SiLU")
class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


@use_kernel_forward_from_hub("RMSNorm")
class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(Norm(), nn.Linear(8, 8), Gate()).eval()


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("DISABLE_KERNEL_MAPPING", "KERNELHUB_OFFLINE", "HF_HUB_OFFLINE", "KERNELHUB_HUBS", "LOCAL_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mapping, "_global", mapping._EMPTY)
    found = Hub(Settings(cache=tmp_path / "cache", offline=True, build="never"))
    set_default_hub(found)
    yield found
    set_default_hub(None)
