"""Layers on GPUs: each layer's own device, its build and its capability. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import models_for_tests as models
import pytest
import torch
from kernels_for_tests import write_kernel
from torch import nn

from kernelhub import Mode, kernel_report, kernelize, register_kernel_mapping, unkernelize
from kernelhub.layers.device import CUDAProperties, Device
from kernelhub.layers.repositories import LocalLayerRepository

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("hub"),
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]


@pytest.fixture
def norm(tmp_path: Path) -> LocalLayerRepository:
    return LocalLayerRepository(write_kernel(tmp_path / "both", backends=("cpu", "cuda")), layer_name="RMSNorm")


def devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def test_layers_of_a_model_over_several_devices_run_their_own_devices_builds(norm: LocalLayerRepository) -> None:
    """needs 5: no layer is launched on another device than its own."""
    register_kernel_mapping({"RMSNorm": {"cpu": norm, "cuda": norm}})
    model = nn.ModuleList([models.Norm().to(device) for device in devices()])
    inputs = [torch.randn(4, 8, device=device) for device in devices()]
    expected = [layer(x) for layer, x in zip(model, inputs, strict=True)]
    kernelize(model, mode=Mode.TRAINING)
    rows = kernel_report(model).rows
    assert [row.device for row in rows] == devices()
    assert [row.variant for row in rows] == ["torch-cpu", *["torch-cuda"] * torch.cuda.device_count()]
    for layer, x, want in zip(model, inputs, expected, strict=True):
        found = layer(x)
        assert found.device == x.device
        assert torch.equal(found, want)
    unkernelize(model)


def test_a_model_that_moved_says_stale_until_it_is_kernelized_again(norm: LocalLayerRepository) -> None:
    register_kernel_mapping({"RMSNorm": {"cpu": norm, "cuda": norm}})
    model = kernelize(models.Norm(), mode=Mode.INFERENCE).to("cuda")
    assert kernel_report(model).rows[0].stale
    kernelize(model, mode=Mode.INFERENCE)
    assert not kernel_report(model).rows[0].stale
    assert kernel_report(model).rows[0].variant == "torch-cuda"


def test_a_model_is_kernelized_for_a_device_that_it_will_be_on(norm: LocalLayerRepository) -> None:
    register_kernel_mapping({"RMSNorm": {"cuda": norm}})
    model = kernelize(models.Norm(), mode=Mode.INFERENCE, device="cuda").to("cuda")
    assert not kernel_report(model).rows[0].stale
    assert model(torch.randn(2, 8, device="cuda")).device.type == "cuda"


def test_the_capability_of_the_layers_own_device_decides(norm: LocalLayerRepository) -> None:
    """needs 6."""
    major, minor = torch.cuda.get_device_capability(0)
    here = major * 10 + minor
    gate = LocalLayerRepository(norm.repo_path, layer_name="Marked")
    register_kernel_mapping(
        {
            "RMSNorm": {
                Device("cuda", CUDAProperties(here, here)): norm,
                Device("cuda", CUDAProperties(here - 10, here)): gate,
                Device("cuda", CUDAProperties(here + 1, here + 1)): gate,
            }
        }
    )
    model = kernelize(models.Norm().cuda(), mode=Mode.INFERENCE)
    assert kernel_report(model).rows[0].layer == "RMSNorm"
