"""FSDP2, DDP and tensor parallelism over two processes (gloo, this machine), kernelized before and after wrapping."""

from __future__ import annotations

import traceback
from pathlib import Path

import fused_kernels
import models_for_tests as models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from kernelhub import Mode, kernel_report, kernelize, register_kernel_mapping, unkernelize, use_kernel_mapping
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.layers.kernel import load_layer
from kernelhub.layers.repositories import LocalLayerRepository
from kernelhub.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")]


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def mixed(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    return fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def each(model: nn.Module) -> nn.Module:
    """Every module sharded on its own, the kernelized ones too."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        for child in (layer.norm, layer.linear):
            fully_shard(child)
    return fully_shard(model)


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """The output, gradients and state of one training step, whole on each process."""
    torch.manual_seed(dist.get_rank())
    x = torch.randn(4, 8)
    output = model(x)
    output.float().pow(2).sum().backward()
    found = {"output": output.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[f"grad {name}"] = whole(parameter.grad)
    for name, value in model.state_dict().items():
        found[f"state {name}"] = whole(value)
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def fresh() -> nn.Module:
    torch.manual_seed(7)
    return models.Model()


def check_wrapped() -> None:
    """needs 14: equal outputs, gradients and state dicts, with the kernels under either side of the wrapper."""
    for wrap in (fsdp, each, mixed, ddp):
        expected = step(wrap(fresh()))
        before = wrap(kernelize(fresh(), mode=Mode.TRAINING))
        after = kernelize(wrap(fresh()), mode=Mode.TRAINING)
        for model in (before, after):
            report = kernel_report(model)
            assert len(report.kernels) == 3, f"{wrap.__name__}\n{report}"
            found = step(model)
            assert list(found) == list(expected)
            for name, value in expected.items():
                assert torch.equal(found[name], value), f"{wrap.__name__}: {name}"
            assert len(kernel_report(model).kernels) == 3
            unkernelize(model)
            model.zero_grad()
            again = step(model)
            assert all(torch.equal(again[name], value) for name, value in expected.items())
            assert kernel_report(model).kernels == ()


def check_tensor_parallel(folder: Path) -> None:
    """Weights that stay DTensors: the layer keeps its forward, unless the kernel says that it takes them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    model = fresh()
    model.norm.weight = nn.Parameter(distribute_tensor(model.norm.weight.data, mesh["tp"], [Replicate()]))
    for candidate in (model, fully_shard(model, mesh=mesh["dp"])):
        kernelize(candidate, mode=Mode.TRAINING)
        rows = {row.path: row for row in kernel_report(candidate).rows}
        assert rows["norm"].outcome == "original"
        assert "DTensors" in rows["norm"].reason
        assert rows["layers.0.norm"].outcome == "kernel", "what FSDP gathers is plain when the kernel sees it"
    linear = models.Linear(8, 8, bias=False)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, mesh["tp"], [Replicate()]))
    register_kernel_mapping({"Linear": {"cpu": LocalLayerRepository(folder, layer_name="Anything")}})
    kernelize(linear, mode=Mode.INFERENCE)
    assert kernel_report(linear).rows[0].outcome == "kernel"


def check_children() -> None:
    """A child that is sharded on its own has shards where the parent's kernel would read weights."""
    from torch.distributed.fsdp import fully_shard

    mlp = models.Mlp()
    fully_shard(mlp.up)
    kernelize(mlp, mode=Mode.TRAINING)
    row = kernel_report(mlp).rows[0]
    assert row.outcome == "original"
    assert "its up has hooks" in row.reason


def check_fused(fused: Path) -> None:
    """Two modules with one kernel, which reads weights that FSDP2 gathers for the parent, as a step changes them."""
    from torch.distributed.fsdp import fully_shard

    with use_kernel_mapping(
        {fused_kernels.KEY: {"cpu": LocalLayerRepository(fused, layer_name="NormMlp")}}, inherit_mapping=False
    ):
        expected = step(fsdp(fused_kernels.Model()))
        before = fsdp(kernelize(fused_kernels.Model(), mode=Mode.TRAINING))
        after = kernelize(fsdp(fused_kernels.Model()), mode=Mode.TRAINING)
        for model in (before, after):
            assert len(kernel_report(model).kernels) == 4, kernel_report(model)
            found = step(model)
            assert list(found) == list(expected)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.5)
            other = fsdp(fused_kernels.Model())
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.mul_(0.5)
            x = torch.linspace(-1, 1, 32).reshape(4, 8)
            torch.testing.assert_close(model(x), other(x))
        apart = fused_kernels.Model()
        for layer in apart.layers:
            fully_shard(layer.mlp)
        kernelize(apart, mode=Mode.TRAINING)
        assert kernel_report(apart).kernels == ()
        assert "layers.0.mlp has hooks" in kernel_report(apart).notes[0]


def worker(rank: int, folder: Path, fused: Path, scratch: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=2)
    try:
        torch.set_num_threads(1)
        set_default_hub(Hub(Settings(cache=scratch / f"cache{rank}"), sources=[]))
        norm = LocalLayerRepository(folder, layer_name="RMSNorm")
        assert load_layer(norm, "cpu", Hub(Settings(cache=scratch / f"cache{rank}"), sources=[])).has_backward
        register_kernel_mapping(
            {"RMSNorm": {"cpu": norm}, "Mlp": {"cpu": LocalLayerRepository(folder, layer_name="Mlp")}}
        )
        check_wrapped()
        check_tensor_parallel(folder)
        check_children()
        check_fused(fused)
        (scratch / f"done{rank}").touch()
    except BaseException:
        (scratch / f"error{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def test_kernels_under_fsdp2_ddp_and_tensor_parallelism(folder: Path, tmp_path: Path) -> None:
    """One start of two processes for all cases: each start costs several seconds."""
    fused = fused_kernels.write_fused(tmp_path / "fused")
    context = mp.spawn(worker, args=(folder, fused, tmp_path), nprocs=2, join=False)
    try:
        while not context.join(timeout=240):
            pass
    except Exception:
        errors = [path.read_text() for path in sorted(tmp_path.glob("error*"))]
        pytest.fail("\n".join(errors) or "a process ended without saying why")
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done0", "done1"]
