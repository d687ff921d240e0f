"""kernelhub/activation against the code whose place it takes, and against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernelprojects import load_noarch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import grad, hessian, jvp, vmap
from transformers import LlamaConfig, activations
from transformers.models.llama.modeling_llama import LlamaMLP

import kernelhub
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.settings import Settings

activation = load_noarch("activation", "_activation_under_test")


def and_mul(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What models write for a fused pair: the function of one half times the other."""
    return lambda x: function(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def tanh_gelu(x: Tensor, constant: float = math.sqrt(2 / math.pi)) -> Tensor:
    return x / 2 * (1 + torch.tanh(constant * (x + 0.044715 * x * x * x)))


def exact_gelu(x: Tensor) -> Tensor:
    return x / 2 * torch.special.erfc(-x / math.sqrt(2))


# Per layer: the modules whose forward it stands in for, and the formula.
LAYERS: dict[str, tuple[list[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "SiLU": ([activations.SiLUActivation(), nn.SiLU()], lambda x: x * sigmoid(x)),
    "GeLU": ([activations.GELUActivation()], exact_gelu),
    "GeluTanh": ([activations.GELUTanh(), activations.GELUTanh(use_gelu_tanh_python=True)], tanh_gelu),
    "TorchGELU": ([nn.GELU()], exact_gelu),
    "NewGELU": ([activations.NewGELUActivation(), activations.AccurateGELUActivation()], tanh_gelu),
    "FastGELU": ([activations.FastGELUActivation()], lambda x: tanh_gelu(x, 0.7978845608)),
    "QuickGELU": ([activations.QuickGELUActivation()], lambda x: x * sigmoid(1.702 * x)),
    "Mish": ([activations.MishActivation(), nn.Mish()], lambda x: x * torch.tanh(torch.log1p(torch.exp(x)))),
    "ReLUSquared": ([activations.ReLUSquaredActivation()], lambda x: x.clamp(min=0) ** 2),
    "Tanh": ([nn.Tanh()], torch.tanh),
    "SiluAndMul": ([and_mul(nn.SiLU())], and_mul(lambda x: x * sigmoid(x))),
    "GeluAndMul": ([and_mul(nn.GELU())], and_mul(exact_gelu)),
    "GeluTanhAndMul": ([and_mul(nn.GELU(approximate="tanh"))], and_mul(tanh_gelu)),
}
BIT_EQUAL = sorted(set(LAYERS) - {"GeluTanh", "NewGELU", "FastGELU"})
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((6, 32), (3, 2, 16), (4096,), (2,))


MLPS = {"SwiGLUMLP": "silu", "GeGLUMLP": "gelu_pytorch_tanh"}


class Bare(nn.Module):
    """Something for a kernel's forward to be bound to."""

    approximate = "none"


def kernel(layer: str) -> nn.Module:
    module = Bare()
    module.forward = getattr(activation.layers, layer).forward.__get__(module)
    return module


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """From the tails, where formulas go wrong, to around zero."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", BIT_EQUAL)
def test_equals_the_models_own_code_bit_for_bit(layer: str, dtype: torch.dtype, enabled: bool) -> None:
    for original in LAYERS[layer][0]:
        for shape in SHAPES:
            x = values(shape, dtype)
            before = x.clone()
            with torch.set_grad_enabled(enabled):
                got = kernel(layer)(x)
            assert got.dtype == dtype
            assert torch.equal(got, original(x))
            assert torch.equal(x, before), "the input was written to"


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_is_at_most_twice_as_far_from_float64_as_the_models_own_code(
    layer: str, dtype: torch.dtype, enabled: bool
) -> None:
    originals, formula = LAYERS[layer]
    x = values((64, 64), dtype)
    reference = formula(x.double())
    with torch.set_grad_enabled(enabled):
        error = float((kernel(layer)(x).double() - reference).abs().max())
    for original in originals:
        # In float64 the formula's own rounding is all there is to compare with.
        allowed = 2 * float((original(x).double() - reference).abs().max()) if dtype != torch.float64 else 1e-14
        assert error <= allowed


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_torch_gelu_reads_which_of_the_two_it_is(approximate: str) -> None:
    module = nn.GELU(approximate=approximate)
    x = values((6, 32))
    expected = module(x)
    module.forward = activation.layers.TorchGELU.forward.__get__(module)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_finite_differences(layer: str) -> None:
    x = values((3, 8), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(kernel(layer), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(kernel(layer), (x,))


@pytest.mark.parametrize("layer", LAYERS)
def test_no_gradient_is_lost(layer: str) -> None:
    module = kernel(layer)
    assert module(values((4, 8)).requires_grad_()).requires_grad
    # The tensor that vmap hands on says of itself that it requires no gradient; the one outside does.
    x = values((4, 8)).requires_grad_()
    expected = torch.autograd.grad(module(x).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(vmap(module)(x).square().sum(), x)[0], expected)
    torch.testing.assert_close(grad(lambda y: vmap(module)(y).square().sum())(x.detach()), expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_vmap_forward_mode_and_second_derivatives(layer: str) -> None:
    module, formula = kernel(layer), LAYERS[layer][1]
    x = values((4, 8), torch.float64)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(vmap(module)(x), module(x))
            primal, tangent = jvp(module, (x,), (torch.ones_like(x),))
            torch.testing.assert_close(primal, formula(x))
            torch.testing.assert_close(tangent, jvp(formula, (x,), (torch.ones_like(x),))[1])
    expected = hessian(lambda y: formula(y).sum())(x[0])
    torch.testing.assert_close(hessian(lambda y: module(y).sum())(x[0]), expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_any_strides_and_empty_inputs(layer: str) -> None:
    originals, _ = LAYERS[layer]
    base = values((6, 8, 4))
    views = [base.transpose(0, 2), base[:, ::2], base[:, :1].expand(6, 5, 4), torch.empty(0, 8), torch.empty(3, 0)]
    with torch.no_grad():
        for view in views:
            torch.testing.assert_close(kernel(layer)(view), originals[0](view), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_and_meta_tensors_give_what_the_original_gives(layer: str, dtype: torch.dtype, enabled: bool) -> None:
    x = values((6, 32), dtype)
    for original in LAYERS[layer][0]:
        with torch.set_grad_enabled(enabled):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert kernel(layer)(x).dtype == original(x).dtype
            got, expected = kernel(layer)(x.to("meta")), original(x.to("meta"))
        assert (got.is_meta, got.dtype, got.shape) == (True, expected.dtype, expected.shape)


def test_the_written_out_gelu_is_wide_where_autocast_widens_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it does on GPUs only; there tests compare it with the original."""
    x = values((6, 32), torch.bfloat16)
    assert kernel("NewGELU")(x).dtype == torch.bfloat16
    monkeypatch.setattr(activation.functions, "_widens_powers", lambda _: True)
    assert kernel("NewGELU")(x).dtype == torch.float32


@pytest.mark.parametrize("layer", LAYERS)
def test_special_values(layer: str) -> None:
    """Zero stays zero, a NaN stays one, and large numbers do what the formula's limit says."""
    x = torch.tensor([[0.0, float("nan"), 50.0, -50.0] * 2])
    original = LAYERS[layer][0][0]
    with torch.no_grad():
        torch.testing.assert_close(kernel(layer)(x), original(x), equal_nan=True)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_compiles_to_one_graph_and_only_once(layer: str, enabled: bool) -> None:
    module, counter = kernel(layer), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(enabled):
        for _ in range(2):
            torch.testing.assert_close(compiled(values((6, 32))), module(values((6, 32))))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_exports(layer: str, strict: bool) -> None:
    module = kernel(layer)
    shapes = ({0: torch.export.Dim("rows", min=2, max=64)},)
    with torch.no_grad():
        program = torch.export.export(module, (values((6, 32)),), dynamic_shapes=shapes, strict=strict)
        torch.testing.assert_close(program.module()(values((9, 32))), module(values((9, 32))))


@pytest.mark.parametrize("function", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
def test_an_odd_last_dimension_is_an_error(function: str) -> None:
    for shape in ((3, 5), ()):
        with pytest.raises(ValueError, match="expected an even last dimension"):
            getattr(activation, function)(torch.zeros(shape))


def test_every_layer_has_its_function() -> None:
    """The functions that a user calls and the layers that kernelize takes are the same."""
    names = {
        "SiLU": "silu",
        "GeLU": "gelu",
        "GeluTanh": "gelu_tanh",
        "TorchGELU": "gelu",
        "NewGELU": "gelu_new",
        "FastGELU": "gelu_fast",
        "QuickGELU": "gelu_quick",
        "Mish": "mish",
        "ReLUSquared": "relu_squared",
        "Tanh": "tanh",
        "SiluAndMul": "silu_and_mul",
        "GeluAndMul": "gelu_and_mul",
        "GeluTanhAndMul": "gelu_tanh_and_mul",
    }
    assert set(names) == set(LAYERS)
    assert {*names, *MLPS} == set(activation.layers.__all__)
    assert set(activation.__all__) == {*names.values(), "layers"}
    for layer, function in names.items():
        assert torch.equal(getattr(activation, function)(values((6, 32))), kernel(layer)(values((6, 32))))


def mlp(layer: str, dtype: torch.dtype) -> tuple[LlamaMLP, LlamaMLP]:
    """A model's MLP, and the same with the kernel's forward."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=80, hidden_act=MLPS[layer])
    original, kernelized = LlamaMLP(config).to(dtype), LlamaMLP(config).to(dtype)
    kernelized.load_state_dict(original.state_dict())
    kernelized.forward = getattr(activation.layers, layer).forward.__get__(kernelized)
    return original, kernelized


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", MLPS)
def test_mlps_equal_the_models_own_code_bit_for_bit(layer: str, dtype: torch.dtype) -> None:
    original, kernelized = mlp(layer, dtype)
    x = values((3, 5, 32), dtype)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(kernelized(x), original(x))


@pytest.mark.parametrize("function", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
def test_two_operands_are_as_the_halves_of_one(function: str) -> None:
    x = values((4, 6, 32))
    call = getattr(activation, function)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(call(x[..., :16], x[..., 16:]), call(x))
            assert call(x[..., :16].bfloat16(), x[..., 16:]).dtype == torch.float32
            assert torch.equal(call(x[..., :16], x[:1, :1, 16:].expand(4, 6, 16)), call(x[..., :16], x[:1, :1, 16:]))


def test_layers_have_nothing_but_what_the_contract_allows() -> None:
    for name in activation.layers.__all__:
        layer = getattr(activation.layers, name)
        assert issubclass(layer, nn.Module)
        members = {member for member in vars(layer) if not (member.startswith("__") and member.endswith("__"))}
        assert members <= {"forward", "can_torch_compile", "has_backward"}
        assert layer.can_torch_compile is True
        assert layer.has_backward is True


def test_comes_from_the_embedded_hub(tmp_path: Path) -> None:
    """What the tests above read from the folder is what users get by name."""
    set_default_hub(Hub(settings=Settings(cache=tmp_path, offline=True, build="never")))
    try:
        kernel = kernelhub.get_kernel("kernelhub/activation", version=1)
    finally:
        set_default_hub(None)
    assert kernel.__all__ == activation.__all__
    assert kernel.layers.__all__ == activation.layers.__all__
    assert torch.equal(kernel.gelu_quick(values((3, 8))), activation.gelu_quick(values((3, 8))))
