"""kernelhub/norm against the code whose place it takes, and against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from kernelprojects import load_noarch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jvp, vmap
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

import kernelhub
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.settings import Settings

norm = load_noarch("norm", "_norm_under_test")
functions = sys.modules["_norm_under_test.functions"]

HIDDEN = 96
BIT_EQUAL = {
    "RMSNorm": LlamaRMSNorm,
    "RMSNormCastLast": Olmo2RMSNorm,
    "RMSNormZeroCentered": GemmaRMSNorm,
    "RMSNormWeightDtype": T5LayerNorm,
    "RMSNormGated": Qwen3NextRMSNormGated,
    "RMSNormGatedCastLast": KimiLinearRMSNormGated,
    "RMSNormGateFirst": BambaRMSNormGated,
    "LayerNorm": nn.LayerNorm,
}
ALL = {**BIT_EQUAL, "LayerNormCastLast": CohereLayerNorm}
GATED = ("RMSNormGated", "RMSNormGatedCastLast", "RMSNormGateFirst")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((5, HIDDEN), (2, 3, HIDDEN), (HIDDEN,))


@pytest.fixture(params=["small", "large", "huge"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way through the functions, at the same small sizes."""
    monkeypatch.setattr(functions, "_LARGE", 1 << 60 if request.param == "small" else 0)
    monkeypatch.setattr(functions, "_HUGE", 0 if request.param == "huge" else 1 << 60)
    return request.param


def pair(layer: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A module of the original class, and the same with the kernel's forward, random weights."""
    torch.manual_seed(0)
    cls = ALL[layer]
    original, kernelized = cls(HIDDEN), cls(HIDDEN)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    original, kernelized = original.to(dtype), kernelized.to(dtype)
    kernelized.load_state_dict(original.state_dict())
    kernelized.forward = getattr(norm.layers, layer).forward.__get__(kernelized)
    return original, kernelized


def inputs(layer: str, shape: tuple[int, ...] = (5, HIDDEN), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = 2 if layer in GATED else 1
    return [(torch.randn(shape, generator=generator) * 3).to(dtype) for _ in range(count)]


def widened(layer: str, module: nn.Module) -> nn.Module:
    """The kernel's module again in float64, where its functions compute in float64: the reference."""
    wide = ALL[layer](HIDDEN).double()
    wide.load_state_dict(module.state_dict())
    wide.forward = getattr(norm.layers, layer).forward.__get__(wide)
    return wide


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", BIT_EQUAL)
def test_equals_the_models_own_code_bit_for_bit(layer: str, dtype: torch.dtype, path: str) -> None:
    """needs 7: numerics drift."""
    original, kernelized = pair(layer, dtype)
    for shape in SHAPES:
        arguments = inputs(layer, shape, dtype)
        before = [argument.clone() for argument in arguments]
        with torch.no_grad():
            expected, got = original(*arguments), kernelized(*arguments)
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True)), "an input was written to"


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("layer", [name for name in BIT_EQUAL if name != "LayerNorm"])
def test_input_and_weight_of_two_dtypes(layer: str, dtypes: tuple[torch.dtype, torch.dtype], path: str) -> None:
    original, kernelized = pair(layer, dtypes[1])
    arguments = inputs(layer, dtype=dtypes[0])
    with torch.no_grad():
        expected, got = original(*arguments), kernelized(*arguments)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_layer_norm_with_float32_weights_under_a_16_bit_input() -> None:
    original, kernelized = pair("LayerNorm")
    x = inputs("LayerNorm", dtype=torch.bfloat16)[0]
    assert torch.equal(kernelized(x), original(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_over_several_dimensions_and_without_weight_or_bias(affine: bool, bias: bool) -> None:
    module = nn.LayerNorm((3, HIDDEN), elementwise_affine=affine, bias=bias)
    x = torch.randn(4, 3, HIDDEN)
    expected = module(x)
    assert torch.equal(norm.layers.LayerNorm.forward(module, x), expected)
    assert torch.equal(norm.layer_norm(x[0, 0]), nn.functional.layer_norm(x[0, 0], (HIDDEN,)))


def error(got: Tensor, reference: Tensor) -> float:
    return float((got.double() - reference).abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ALL)
def test_is_at_most_twice_as_far_from_float64_as_the_models_own_code(layer: str, dtype: torch.dtype, path: str) -> None:
    original, kernelized = pair(layer, dtype)
    arguments = inputs(layer, (64, HIDDEN), dtype)
    with torch.no_grad():
        reference = widened(layer, original)(*(argument.double() for argument in arguments))
        assert reference.dtype == torch.float64
        allowed = 2 * error(original(*arguments), reference)
        assert error(kernelized(*arguments), reference) <= allowed


def test_the_reference_in_float64_is_the_formula() -> None:
    """What the test above measures against is the mathematics, not the kernel's own idea of it."""
    x, w = torch.randn(7, HIDDEN, dtype=torch.float64), torch.randn(HIDDEN, dtype=torch.float64)
    gate = torch.randn(7, HIDDEN, dtype=torch.float64)
    hat = x / torch.sqrt((x * x).sum(-1, keepdim=True) / HIDDEN + 1e-6)
    silu = gate / (1 + torch.exp(-gate))
    gated = x * silu
    gated_hat = gated / torch.sqrt((gated * gated).sum(-1, keepdim=True) / HIDDEN + 1e-6)
    centred = x - x.mean(-1, keepdim=True)
    centred_hat = centred / torch.sqrt((centred * centred).sum(-1, keepdim=True) / HIDDEN + 1e-6)
    for got, expected in [
        (norm.rms_norm(x, w), hat * w),
        (norm.rms_norm_cast_last(x, w), hat * w),
        (norm.rms_norm_weight_dtype(x, w), hat * w),
        (norm.rms_norm_zero_centered(x, w), hat * (1 + w)),
        (norm.rms_norm_gated(x, w, gate), hat * w * silu),
        (norm.rms_norm_gated_cast_last(x, w, gate), hat * w / (1 + torch.exp(-gate))),
        (norm.rms_norm_gate_first(x, w, gate), gated_hat * w),
        (norm.rms_norm_gate_first(x, w, None), hat * w),
        (norm.layer_norm_cast_last(x, w, 1e-6), centred_hat * w),
        (norm.layer_norm(x, w, gate[0], 1e-6), centred_hat * w + gate[0]),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def as_function(layer: str):
    """The layer as a function of its weight and inputs, in float64."""
    module = pair(layer, torch.float64)[1]
    names = [name for name, _ in module.named_parameters()]

    def call(*tensors: Tensor) -> Tensor:
        weights = dict(zip(names, tensors, strict=False))
        return functional_call(module, weights, tensors[len(names) :])

    weights = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    arguments = [argument.requires_grad_() for argument in inputs(layer, (3, HIDDEN), torch.float64)]
    return call, (*weights, *arguments)


@pytest.mark.parametrize("layer", ALL)
def test_gradients_are_those_of_finite_differences(layer: str, path: str) -> None:
    call, tensors = as_function(layer)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ALL)
def test_gradients_are_those_of_the_models_own_code(layer: str, dtype: torch.dtype, path: str) -> None:
    results = []
    for module in pair(layer, dtype):
        arguments = [argument.requires_grad_() for argument in inputs(layer, dtype=dtype)]
        out = module(*arguments)
        results.append(torch.autograd.grad(out.float().square().sum(), [*arguments, *module.parameters()]))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for expected, got in zip(*results, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("layer", ALL)
def test_no_gradient_is_lost(layer: str, path: str) -> None:
    """Whichever operand requires one, through whichever path, the result has a graph."""
    module = pair(layer)[1]
    for position in range(len(inputs(layer))):
        module.requires_grad_(False)
        arguments = inputs(layer)
        arguments[position].requires_grad_()
        assert module(*arguments).requires_grad
    module.requires_grad_(True)
    module(*inputs(layer)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    with torch.inference_mode():
        assert torch.isfinite(module(*inputs(layer))).all()


@pytest.mark.parametrize("layer", ALL)
def test_any_strides_and_empty_inputs(layer: str, path: str) -> None:
    original, kernelized = pair(layer)
    base = inputs(layer, (HIDDEN, 4, 6))
    views = [
        [x.transpose(0, 2) for x in base],
        [x.permute(1, 2, 0)[:, ::2] for x in base],
        [x[:, :1, :1].permute(1, 2, 0).expand(3, 2, HIDDEN) for x in base],
    ]
    with torch.no_grad():
        for view in views:
            torch.testing.assert_close(kernelized(*view), original(*view), rtol=1e-6, atol=1e-6)
        empty = [torch.empty(0, HIDDEN) for _ in base]
        assert kernelized(*empty).shape == (0, HIDDEN)


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("layer", ALL)
def test_compiles_to_one_graph_and_only_once(layer: str, mode: str) -> None:
    kernelized = pair(layer)[1]
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(kernelized, fullgraph=True, backend=counter)
    with torch.no_grad() if mode == "no_grad" else torch.enable_grad():
        for shape in ((5, HIDDEN), (5, HIDDEN)):
            arguments = inputs(layer, shape)
            torch.testing.assert_close(compiled(*arguments), kernelized(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("layer", ALL)
def test_sizes_around_the_thresholds_share_one_compiled_graph(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch on the size is for eager only: it is no guard."""
    monkeypatch.setattr(functions, "_LARGE", 8 * HIDDEN)
    kernelized = pair(layer)[1]
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(kernelized, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for rows in (4, 7, 9, 30):
            compiled(*inputs(layer, (rows, HIDDEN)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("layer", ALL)
def test_exports(layer: str, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "_LARGE", 8 * HIDDEN)
    kernelized = pair(layer)[1]
    rows = torch.export.Dim("rows", min=2, max=64)
    arguments = tuple(inputs(layer, (4, HIDDEN)))
    with torch.no_grad():
        program = torch.export.export(
            kernelized, arguments, dynamic_shapes=tuple({0: rows} for _ in arguments), strict=strict
        )
        other = inputs(layer, (32, HIDDEN))
        torch.testing.assert_close(program.module()(*other), kernelized(*other))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("layer", ALL)
def test_vmap_over_inputs_and_over_weights(layer: str, enabled: bool, path: str) -> None:
    original, kernelized = pair(layer)
    arguments = inputs(layer, (4, 3, HIDDEN))
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in original.named_parameters()}

    def with_weights(module: nn.Module):
        return vmap(lambda weights: functional_call(module, weights, tuple(arguments)))(stacked)

    with torch.set_grad_enabled(enabled):
        torch.testing.assert_close(vmap(kernelized)(*arguments), vmap(original)(*arguments))
        torch.testing.assert_close(with_weights(kernelized), with_weights(original))


@pytest.mark.parametrize("layer", ALL)
def test_gradients_through_vmap(layer: str, path: str) -> None:
    original, kernelized = pair(layer)
    arguments = inputs(layer, (4, 3, HIDDEN))
    rest = arguments[1:]

    def through_vmap(module: nn.Module) -> Tensor:
        return grad(lambda x: vmap(module)(x, *rest).square().sum())(arguments[0])

    torch.testing.assert_close(through_vmap(kernelized), through_vmap(original), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", ALL)
def test_forward_mode_without_a_graph(layer: str, dtype: torch.dtype, path: str) -> None:
    """In place is where forward mode goes wrong: `y.mul_(y)` halves the tangent."""
    original, kernelized = pair(layer, dtype)
    arguments = inputs(layer, (4, 3, HIDDEN), dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        tangents = tuple(torch.ones_like(argument) for argument in arguments)
        expected = jvp(original, tuple(arguments), tangents)[1]
        got = jvp(kernelized, tuple(arguments), tangents)[1]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("layer", [name for name in BIT_EQUAL if name != "LayerNorm"])
def test_rounds_in_the_same_places_where_autocast_widens_the_norm(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA and XPU autocast lets `rms_norm` return float32; this machine may have neither, so it is told to."""
    original, kernelized = pair(layer, torch.bfloat16)
    arguments = inputs(layer, dtype=torch.bfloat16)
    expected, plain = original(*arguments), torch.nn.functional.rms_norm

    def widened(x: Tensor, shape: torch.Size, weight: Tensor | None, eps: float) -> Tensor:
        return plain(x.float(), shape, None if weight is None else weight.float(), eps)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", widened)
    assert torch.equal(kernelized(*arguments), expected)


@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("layer", ALL)
def test_autocast_gives_what_the_original_gives(layer: str, dtypes: tuple[torch.dtype, torch.dtype], path: str) -> None:
    original, kernelized = pair(layer, dtypes[1])
    arguments = inputs(layer, dtype=dtypes[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = original(*arguments), kernelized(*arguments)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ALL)
def test_of_meta_tensors_it_gives_shape_and_dtype(layer: str, dtype: torch.dtype, path: str) -> None:
    original, kernelized = (module.to("meta") for module in pair(layer, dtype))
    arguments = [x.to("meta") for x in inputs(layer, dtype=dtype)]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            expected, got = original(*arguments), kernelized(*arguments)
        assert (got.is_meta, got.dtype, got.shape) == (True, expected.dtype, expected.shape)


@pytest.mark.parametrize("layer", ALL)
def test_a_weight_on_another_device_is_an_error(layer: str, path: str) -> None:
    kernelized = pair(layer)[1].to("meta")
    with torch.no_grad(), pytest.raises(RuntimeError, match="device"):
        kernelized(*inputs(layer))


@pytest.mark.parametrize("layer", ALL)
def test_a_weight_of_another_length_is_an_error(layer: str, path: str) -> None:
    kernelized = pair(layer)[1]
    short = [argument[..., : HIDDEN - 1].contiguous() for argument in inputs(layer)]
    with torch.no_grad(), pytest.raises(RuntimeError):
        kernelized(*short)


@pytest.mark.parametrize("layer", [name for name in ALL if name != "LayerNorm"])
def test_a_weight_of_two_dimensions_is_an_error(layer: str, path: str) -> None:
    kernelized = pair(layer)[1]
    kernelized.weight = nn.Parameter(torch.ones(5, HIDDEN))
    with torch.no_grad(), pytest.raises(ValueError, match="expected one dimension"):
        kernelized(*inputs(layer))


def test_gates() -> None:
    x, w = torch.randn(3, HIDDEN), torch.randn(HIDDEN)
    for function in (norm.rms_norm_gated, norm.rms_norm_gated_cast_last):
        with pytest.raises(TypeError, match="there is no gate"):
            function(x, w, None)
        with pytest.raises(ValueError, match="expected silu, swish or sigmoid"):
            function(x, w, x, activation="relu")
        assert torch.equal(function(x, w, x, activation="swish"), function(x, w, x, activation="silu"))
    original, kernelized = pair("RMSNormGateFirst")
    assert torch.equal(kernelized(x), original(x))


def test_layers_have_nothing_but_what_the_contract_allows() -> None:
    for name in norm.layers.__all__:
        layer = getattr(norm.layers, name)
        assert issubclass(layer, nn.Module)
        members = {member for member in vars(layer) if not (member.startswith("__") and member.endswith("__"))}
        assert members <= {"forward", "can_torch_compile", "has_backward"}
        assert layer.can_torch_compile is True
        assert layer.has_backward is True
        assert "__init__" not in vars(layer)
    assert set(ALL) == set(norm.layers.__all__)


def test_comes_from_the_embedded_hub(tmp_path: Path) -> None:
    """What the tests above read from the folder is what users get by name."""
    set_default_hub(Hub(settings=Settings(cache=tmp_path, offline=True, build="never")))
    try:
        kernel = kernelhub.get_kernel("kernelhub/norm", version=1)
    finally:
        set_default_hub(None)
    assert kernel.__all__ == norm.__all__
    assert kernel.layers.__all__ == norm.layers.__all__
    x, weight = torch.randn(3, HIDDEN), torch.randn(HIDDEN)
    assert torch.equal(kernel.rms_norm(x, weight), norm.rms_norm(x, weight))
