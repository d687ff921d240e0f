"""Kernelized models under what torch does with models: compile, export, checkpointing, autocast, function transforms."""

from __future__ import annotations

from collections.abc import Callable

import models_for_tests as models
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from kernelhub import Mode, kernel_report, kernelize, register_kernel_mapping, unkernelize
from kernelhub.layers.repositories import Repository

pytestmark = [pytest.mark.usefixtures("hub", "registered"), pytest.mark.filterwarnings("ignore")]

Kernel = Callable[[str], Repository]


class Counting:
    """A backend for torch.compile that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_a_compiled_model_is_one_graph_and_is_not_compiled_again() -> None:
    """needs 13: fullgraph=True, one graph, no recompilation on the second call."""
    backend, x = Counting(), torch.randn(2, 8)
    model = kernelize(models.Model(layers=3), mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x), expected)
    assert backend.graphs == 1


def test_a_model_with_kernelized_functions_compiles_in_one_graph(kernel: Kernel) -> None:
    register_kernel_mapping({"rotary": {"cpu": kernel("Rotary")}})
    backend, x = Counting(), torch.randn(2, 8)
    model = kernelize(models.Attention(), mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend=backend)(x), expected)
    assert backend.graphs == 1
    unkernelize(model)


def test_a_compiled_training_step_has_the_eager_gradients() -> None:
    """needs 13."""
    model, x = kernelize(models.Model(), mode=Mode.TRAINING | Mode.TORCH_COMPILE), torch.randn(2, 8)
    model(x).sum().backward()
    eager = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(torch.allclose(parameter.grad, item) for parameter, item in zip(model.parameters(), eager, strict=True))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_is_compiled_already_is_kernelized_inside(in_place: bool) -> None:
    model, x, backend = models.Model(), torch.randn(2, 8), Counting()
    if in_place:
        model.compile(fullgraph=True, backend=backend)
        compiled = model
    else:
        compiled = torch.compile(model, fullgraph=True, backend=backend)
    plain = compiled(x)
    assert kernelize(compiled, mode=Mode.INFERENCE | Mode.TORCH_COMPILE) is compiled
    report = kernel_report(compiled)
    assert (report.model, [row.path for row in report.kernels][-1]) == ("Model", "norm")
    swapped = compiled(x)
    assert not torch.equal(swapped, plain)
    assert backend.graphs == 2
    kernelize(compiled, mode=Mode.INFERENCE | Mode.TORCH_COMPILE, include="norm")
    assert [row.path for row in kernel_report(compiled).kernels] == ["norm"]
    unkernelize(compiled)
    assert torch.equal(compiled(x), plain)


@pytest.mark.parametrize("strict", [False, True])
def test_a_kernelized_model_is_exported(strict: bool) -> None:
    """needs 13."""
    model, x = kernelize(models.Model().eval(), mode=Mode.INFERENCE | Mode.TORCH_COMPILE), torch.randn(2, 8)
    program = torch.export.export(model, (x,), strict=strict)
    assert torch.equal(program.module()(x), model(x))
    assert set(program.state_dict) == set(model.state_dict())
    assert [row.outcome for row in kernel_report(model).rows] == ["kernel"] * 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, x = kernelize(models.Model(), mode=Mode.TRAINING), torch.randn(2, 8, requires_grad=True)

    def gradients(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        run(x).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return model.norm(x)

    assert all(map(torch.equal, gradients(checkpointed), gradients(model)))


def test_under_autocast_a_kernel_sees_what_the_original_would_have_seen(kernel: Kernel) -> None:
    seen: dict[str, list[torch.dtype]] = {}
    model, x = models.Model(), torch.randn(2, 8)

    def record(name: str) -> None:
        seen[name] = []
        handle = model.layers[0].gate.register_forward_pre_hook(lambda _, args: seen[name].append(args[0].dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen[name].append(model(x).dtype)
        handle.remove()

    record("original")
    kernelize(model, mode=Mode.INFERENCE)
    record("kernel")
    assert seen["kernel"] == seen["original"]
    assert seen["kernel"][0] is torch.bfloat16


def test_functional_call_reads_the_parameters_that_it_is_given() -> None:
    model, x = models.Model(), torch.randn(2, 8)
    kernelize(model, mode=Mode.INFERENCE, include=models.Norm)
    given = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    expected = functional_call(unkernelize_copy(model), given, (x,))
    assert torch.allclose(functional_call(model, given, (x,)), expected)
    assert not torch.allclose(model(x), expected)


def unkernelize_copy(model: nn.Module) -> nn.Module:
    import copy

    return unkernelize(copy.deepcopy(model))


def test_vmap_grad_and_jvp_go_through_a_kernel_of_torchs_operations() -> None:
    model, x = models.Norm(), torch.randn(4, 3, 8)
    original = unkernelize_copy(model)
    kernelize(model, mode=Mode.TRAINING)
    assert torch.allclose(vmap(model)(x), vmap(original)(x))

    def loss(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda item: module(item).pow(2).sum()

    assert torch.allclose(grad(loss(model))(x), grad(loss(original))(x))
    tangent = torch.ones_like(x)
    got, want = (torch.func.jvp(module, (x,), (tangent,)) for module in (model, original))
    assert all(torch.allclose(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("layer", ["Function", "NoBackward"])
def test_a_transform_that_the_kernels_op_does_not_support_is_refused_and_the_original_takes_it(
    layer: str, kernel: Kernel
) -> None:
    """Nothing is on the call's path that could choose: the op refuses, and an unkernelized copy takes the transform."""
    register_kernel_mapping({"Gate": {"cpu": kernel(layer)}}, inherit_mapping=False)
    gate, x = kernelize(models.Gate(), mode=Mode.INFERENCE, device="cpu"), torch.randn(3)
    original = unkernelize_copy(gate)
    with pytest.raises((RuntimeError, NotImplementedError)):
        grad(lambda item: gate(item).sum())(x)
    assert torch.equal(grad(lambda item: original(item).sum())(x), (x > 0).float())
    if layer == "Function":
        with pytest.raises((RuntimeError, NotImplementedError)):
            vmap(gate)(x)
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(gate, (x,), (torch.ones_like(x),))
    assert torch.equal(vmap(original)(x), torch.relu(x))


def test_a_kernel_without_a_backward_refuses_to_be_differentiated_and_its_row_says_stale(kernel: Kernel) -> None:
    register_kernel_mapping({"Gate": {"cpu": kernel("NoBackward")}}, inherit_mapping=False)
    model = nn.Sequential(nn.Linear(2, 2), models.Gate()).eval()
    kernelize(model, mode=Mode.INFERENCE)
    assert not kernel_report(model).rows[0].stale
    with torch.no_grad():
        assert (model(torch.zeros(1, 2)) > 900).all()
    model.train()
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(torch.zeros(1, 2)).sum().backward()
    row = kernel_report(model).rows[0]
    assert row.stale
    assert row.reason == "stale: it was kernelized for INFERENCE and is in training mode; kernelize again"
    kernelize(model, mode=Mode.TRAINING)
    model(torch.zeros(1, 2)).sum().backward()
    assert not kernel_report(model).rows[0].stale


def test_a_layer_that_moved_says_stale(kernel: Kernel) -> None:
    """needs 5."""
    model = kernelize(models.Model(), mode=Mode.INFERENCE).to("meta")
    rows = kernel_report(model).rows
    assert all(row.stale and "is on meta" in row.reason for row in rows)
    assert "5 stale" in kernel_report(model).summary()
    kernelize(models.Model().half(), mode=Mode.INFERENCE)


def test_training_and_inference_kernels_are_stale_only_where_they_do_not_fit() -> None:
    training = kernelize(models.Model().train(), mode=Mode.TRAINING).eval()
    assert not any(row.stale for row in kernel_report(training).rows)
    half = kernelize(models.Model(), mode=Mode.INFERENCE).half()
    assert not any(row.stale for row in kernel_report(half).rows)
    assert half(torch.zeros(1, 8, dtype=torch.half)).dtype is torch.half


def test_inference_mode_and_no_grad() -> None:
    model, x = kernelize(models.Model().eval(), mode=Mode.INFERENCE), torch.randn(2, 8)
    with torch.inference_mode():
        inference = model(x)
    with torch.no_grad():
        assert torch.equal(inference.clone(), model(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="DataParallel wants its module on a GPU then")
def test_data_parallel_replicas_share_the_first_modules_weights_and_devices() -> None:
    """A replica calls the forward that is bound to the first module; on the CPU there is one of them only."""
    model = kernelize(models.Model(), mode=Mode.INFERENCE)
    x = torch.randn(2, 8)
    assert torch.equal(nn.DataParallel(model)(x), model(x))


def test_models_with_scripted_traced_lazy_and_parametrized_parts_are_walked() -> None:
    """None of these is kernel-aware; the layers beside them are."""
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))
    parts = [torch.jit.script(nn.Linear(8, 8)), traced, nn.LazyLinear(8)]
    parts.append(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    model, x = nn.Sequential(*parts, models.Norm(), models.Gate()), torch.randn(2, 8)
    kernelize(model, mode=Mode.INFERENCE)
    assert [row.path for row in kernel_report(model).kernels] == ["4", "5"]
    assert (model(x) >= 0).any()
    unkernelize(model)


def test_a_layer_whose_weight_is_not_initialised_keeps_its_forward() -> None:
    model = models.Norm()
    model.weight = nn.UninitializedParameter()
    kernelize(model, mode=Mode.INFERENCE)
    row = kernel_report(model).rows[0]
    assert (row.outcome, "UninitializedParameter" in row.reason) == ("original", True)


def test_a_parametrized_weight_is_computed_for_the_kernel_as_for_the_original() -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model, x = models.Norm(), torch.randn(2, 8)
    plain = model(x)
    nn.utils.parametrize.register_parametrization(model, "weight", Double())
    kernelize(model, mode=Mode.INFERENCE)
    assert torch.allclose(model(x), 2 * plain)
