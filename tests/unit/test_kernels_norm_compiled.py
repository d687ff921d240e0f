"""The compiled ops of kernelhub/norm, on each level of instructions: against the models' own code and float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

RMS = {
    "RMSNorm": LlamaRMSNorm,
    "RMSNormCastLast": Olmo2RMSNorm,
    "RMSNormZeroCentered": GemmaRMSNorm,
    "RMSNormWeightDtype": T5LayerNorm,
}
GATED = {
    "RMSNormGated": Qwen3NextRMSNormGated,
    "RMSNormGatedCastLast": KimiLinearRMSNormGated,
    "RMSNormGateFirst": BambaRMSNormGated,
}
LAYER = {"LayerNorm": nn.LayerNorm, "LayerNormCastLast": CohereLayerNorm}
ALL = {**RMS, **GATED, **LAYER}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = {"plain": 0, "avx2": 1, "avx512": 2}
WIDTHS = (64, 65, 100, 511, 1000, 2048, 3001, 16384)


@pytest.fixture(scope="session")
def norm(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("norm", request.config, "cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, norm: ModuleType) -> Iterator[str]:
    """Each level that this processor has."""
    wanted = LEVELS[request.param]
    try:
        if norm.compiled.ops.use_level(wanted) != wanted:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        norm.compiled.ops.use_level(2)


def pair(norm: ModuleType, layer: str, width: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A module of the original class, and the same with the kernel's forward, random weights."""
    torch.manual_seed(0)
    cls = ALL[layer]
    original, kernelized = cls(width), cls(width)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    original, kernelized = original.to(dtype), kernelized.to(dtype)
    kernelized.load_state_dict(original.state_dict())
    kernelized.forward = getattr(norm.layers, layer).forward.__get__(kernelized)
    return original, kernelized


def inputs(layer: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = 2 if layer in GATED else 1
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for _ in range(count)]


def same(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    return got.dtype == expected.dtype and torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [*RMS, *GATED])
def test_equals_the_models_own_code_bit_for_bit(norm: ModuleType, level: str, layer: str, dtype: torch.dtype) -> None:
    """needs 7: numerics drift."""
    for width in WIDTHS:
        original, kernelized = pair(norm, layer, width, dtype)
        for scale in (0.02, 3.0):
            # As many elements as PyTorch's vectors take: the few behind them, of each thread, it computes by another e**x.
            arguments = inputs(layer, (32, width), dtype, scale)
            assert norm.compiled.takes(arguments[0], kernelized.weight)
            before = [argument.clone() for argument in arguments]
            with torch.no_grad():
                expected, got = original(*arguments), kernelized(*arguments)
            if level == "plain" and layer in GATED:
                # Without fused multiply-adds the gate's e**x rounds otherwise than PyTorch's vectors do.
                torch.testing.assert_close(got, expected)
            else:
                assert same(got, expected), (width, scale)
            assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True)), "an input was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ALL)
def test_autocast_gives_what_the_original_gives(norm: ModuleType, layer: str, dtype: torch.dtype) -> None:
    original, kernelized = pair(norm, layer, 96, dtype)
    for enabled in (True, False):
        arguments = inputs(layer, (3, 96), dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(enabled):
            expected, got = original(*arguments), kernelized(*arguments)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_a_row_of_equal_elements_is_the_bias(norm: ModuleType, level: str, dtype: torch.dtype) -> None:
    """Whatever they are: their distance from the mean, which is rounded, is divided by next to nothing. So in the gradients."""
    for width in (*WIDTHS, 7, 33):
        _, kernelized = pair(norm, "LayerNorm", width, dtype)
        x = torch.tensor([0.0, 1.1, -1000.0, 3000.0, 60000.0]).repeat(2)[:, None].expand(10, width).to(dtype)
        got = kernelized(x)
        assert torch.equal(got, kernelized.bias.expand(10, width)), width
        got.backward(torch.ones_like(got))
        assert not kernelized.weight.grad.any(), width


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_rows_whose_mean_is_far_from_zero(norm: ModuleType, level: str, dtype: torch.dtype) -> None:
    for width in (64, 1000, 3001):
        original, kernelized = pair(norm, "LayerNorm", width, dtype)
        x = torch.randn(60, width) + torch.tensor([0.0, 0.5, 7.0, 9.0, 100.0, 1000.0]).repeat(10)[:, None]
        x = x.to(dtype)
        wide = nn.LayerNorm(width, dtype=torch.float64)
        wide.load_state_dict(original.state_dict())
        with torch.no_grad():
            reference, eager, got = wide(x.double()), original(x), kernelized(x)
        unit = torch.finfo(dtype).eps * reference.abs().max()
        assert (got - reference).abs().max() <= 2 * (eager - reference).abs().max() + unit, width


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_tiny_huge_and_non_finite_values(norm: ModuleType, level: str, dtype: torch.dtype) -> None:
    width = 70
    rows = torch.randn(32, width).to(dtype)
    rows[0] = 0
    rows[1] *= torch.finfo(dtype).tiny
    rows[2] = torch.finfo(dtype).max
    rows[3, 3] = float("inf")
    rows[4, 69] = float("-inf")
    rows[5, 0] = float("nan")
    rows[6] *= 1e-4
    rows[7] *= 1e4
    for layer in ALL:
        original, kernelized = pair(norm, layer, width, dtype)
        arguments = [rows, rows.flip(1)] if layer in GATED else [rows]
        with torch.no_grad():
            expected, got = original(*arguments), kernelized(*arguments)
        if layer in RMS or (layer in GATED and level != "plain"):
            assert same(got, expected)
        else:
            ordinary = (
                [0, *range(6, 32)] if layer in LAYER else slice(None)
            )  # PyTorch's layer norm overflows on its own
            torch.testing.assert_close(got[ordinary], expected[ordinary], equal_nan=True)
            assert got[3:6].isnan().any(1).tolist() == expected[3:6].isnan().any(1).tolist()


def error(got: Tensor, reference: Tensor) -> float:
    return float((got.double() - reference).abs().max())


def widened(layer: str, norm: ModuleType, module: nn.Module) -> nn.Module:
    """The kernel's module in float64, where PyTorch computes: the reference, tested in test_kernels_norm.py."""
    wide = ALL[layer](module.weight.shape[0]).double()
    wide.load_state_dict(module.state_dict())
    wide.forward = getattr(norm.layers, layer).forward.__get__(wide)
    return wide


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ALL)
def test_is_at_most_twice_as_far_from_float64_as_the_models_own_code(
    norm: ModuleType, level: str, layer: str, dtype: torch.dtype
) -> None:
    """The result and every gradient, over inputs of several scales."""
    for width, scale in ((64, 1e-3), (513, 1.0), (2048, 50.0)):
        original, kernelized = pair(norm, layer, width, dtype)
        arguments = inputs(layer, (67, width), dtype, scale)
        weights = torch.randn(67, width, generator=torch.Generator().manual_seed(2)).to(dtype)
        results = []
        for module, wide in ((widened(layer, norm, original), True), (original, False), (kernelized, False)):
            leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in arguments]
            out = module(*leaves)
            gradients = torch.autograd.grad(out, [*leaves, *module.parameters()], weights.to(out.dtype))
            results.append([out.detach(), *gradients])
        for reference, eager, got in zip(*results, strict=True):
            # A unit of rounding of the largest value is allowed, for where the original happens to be exact.
            unit = torch.finfo(dtype).eps * float(reference.abs().max()) / 4
            assert error(got, reference) <= 2 * error(eager, reference) + unit, (width, scale)


def views(shape: tuple[int, int, int], x: Tensor) -> list[Tensor]:
    """x, of that shape, by other strides, and parts of it."""
    width = shape[2]
    return [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:, ::2],
        x.repeat(1, 1, 3)[:, :, width : 2 * width],
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        x[:, :1].expand(shape),
        x.repeat_interleave(2, dim=2)[:, :, ::2],
        x.flatten(0, 1)[1],
        x[:, None, :, :].transpose(2, 1),
        torch.empty(0, width),
        torch.empty(3, 0, width),
    ]


def steps(x: Tensor) -> list[int]:
    """The strides of dimensions that have any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("layer", ALL)
def test_any_strides_and_empty_inputs(norm: ModuleType, layer: str) -> None:
    """The results lie in memory as the model's own do. The weight's gradient is a sum over rows in the order of memory."""
    shape, (original, kernelized) = (4, 6, 96), pair(norm, layer, 96, torch.float32)
    for operands in zip(*(views(shape, x) for x in inputs(layer, shape, torch.float32)), strict=True):
        leaves = [operand.detach().requires_grad_() for operand in operands]
        got = kernelized(*leaves)
        assert steps(got) == steps(original(*leaves))
        dense = [operand.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for operand in operands]
        expected = kernelized(*dense)
        assert torch.equal(got, expected)
        seed = torch.randn_like(expected)
        *found, of_weight = torch.autograd.grad(
            got, [*leaves, kernelized.weight], seed.mT.contiguous().mT if seed.dim() > 1 else seed
        )
        *others, expected_weight = torch.autograd.grad(expected, [*dense, kernelized.weight], seed)
        assert all(torch.equal(a, b) for a, b in zip(found, others, strict=True))
        torch.testing.assert_close(of_weight, expected_weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("layer", RMS)
def test_compiled_the_results_lie_as_the_models_own(norm: ModuleType, layer: str, grad: bool) -> None:
    torch._dynamo.reset()
    _, kernelized = pair(norm, layer, 96, torch.float32)
    compiled = torch.compile(kernelized, fullgraph=True, dynamic=True, backend="aot_eager")
    for heads in (3, 5):
        for x in (torch.randn(2, 7, heads, 96).transpose(1, 2), torch.randn(2, 96, heads).transpose(1, 2)):
            x.requires_grad_(grad)
            got, expected = compiled(x), kernelized(x)
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride() == x.stride()


def test_compiled_sizes_that_only_the_data_tell_are_taken(norm: ModuleType) -> None:
    torch._dynamo.reset()
    weight, x, mask = torch.randn(8), torch.randn(6, 8), torch.tensor([1, 0, 1, 1, 0, 1]).bool()

    def chosen(x: Tensor, mask: Tensor) -> Tensor:
        return norm.rms_norm(x[mask].view(-1, 2, 8).transpose(0, 1), weight)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, mask), chosen(x, mask))


@pytest.mark.parametrize("layer", ALL)
def test_no_gradient_is_lost_and_expanded_ones_are_read_right(norm: ModuleType, layer: str) -> None:
    original, kernelized = pair(norm, layer, 96, torch.float32)
    for position in range(len(inputs(layer, (5, 96), torch.float32))):
        found = []
        for module in (original.requires_grad_(False), kernelized.requires_grad_(False)):
            arguments = inputs(layer, (5, 96), torch.float32)
            arguments[position].requires_grad_()
            module(*arguments).sum().backward()
            found.append(arguments[position].grad)
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    for module in (original.requires_grad_(True), kernelized.requires_grad_(True)):
        module(*inputs(layer, (5, 96), torch.float32)).sum().backward()
    for expected, got in zip(original.parameters(), kernelized.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert not kernelized(*inputs(layer, (5, 96), torch.float32)).requires_grad


def test_bias_alone_has_a_gradient(norm: ModuleType) -> None:
    x, bias = torch.randn(5, 96), torch.zeros(96, requires_grad=True)
    norm.layer_norm(x, None, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((96,), 5.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_is_the_two_steps(norm: ModuleType, level: str, dtype: torch.dtype) -> None:
    original, _ = pair(norm, "RMSNorm", 130, dtype)
    leaves = [torch.randn(40, 130).to(dtype).requires_grad_() for _ in range(2)]
    seeds = [torch.randn(40, 130).to(dtype) for _ in range(2)]
    expected_sum = leaves[0] + leaves[1]
    expected = original(expected_sum)
    got, got_sum = norm.add_rms_norm(*leaves, original.weight, original.variance_epsilon)
    assert torch.equal(got, expected)
    assert torch.equal(got_sum, expected_sum)
    tensors = [*leaves, original.weight]
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for a, b in zip(
        torch.autograd.grad([got, got_sum], tensors, seeds),
        torch.autograd.grad([expected, expected_sum], tensors, seeds),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    with torch.no_grad():
        assert torch.equal(norm.add_rms_norm(*leaves, original.weight, original.variance_epsilon)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_equals_the_two_steps_bit_for_bit(norm: ModuleType, level: str, dtype: torch.dtype) -> None:
    """Rows that are finished with the next, the last of each thread's, and long ones, which are finished at once."""
    for shape in ((1, 130), (67, 130), (3, 2048), (129, 515), (1030, 64), (5, 4096), (5, 4097), (9, 8192)):
        x, residual = inputs("RMSNormGated", shape, dtype)
        weight = torch.randn(shape[-1]).to(dtype)
        weight[:2] = torch.tensor([0.0, -0.0])
        # Every second row of a wider tensor, so that where the next one lies is no matter of the width.
        apart = torch.empty(2 * shape[0], shape[-1] + 3, dtype=dtype)[::2, : shape[-1]].copy_(residual)
        total = x + residual
        for form in range(3):
            expected = norm.compiled.rms_norm(total, weight, 1e-6, form)
            if form != norm.compiled.ZERO_CENTERED:  # a weight of -0 is one
                assert torch.equal(expected.signbit()[:, 1], ~total.signbit()[:, 1])
            for other in (residual, apart):
                got, got_sum = norm.compiled.add_rms_norm(x, other, weight, 1e-6, form)
                assert torch.equal(got_sum, total), shape
                assert torch.equal(got, expected), (shape, form)
                assert torch.equal(got.signbit(), expected.signbit()), (shape, form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_their_neighbours(norm: ModuleType, level: str, dtype: torch.dtype) -> None:
    for shape in ((70, 130), (260, 515), (5, 4096), (5, 4097)):
        (x,) = inputs("LayerNorm", shape, dtype)
        x[1, 3] = float("nan")
        x[3] = torch.finfo(dtype).max
        weight, bias = torch.randn(2, shape[-1]).to(dtype)
        for options in ((weight, bias), (weight, None), (None, bias), (None, None)):
            got = norm.compiled.layer_norm(x, *options, 1e-5)
            alone = torch.cat([norm.compiled.layer_norm(row, *options, 1e-5) for row in x.split(1)])
            assert same(got, alone), shape


@pytest.mark.parametrize("layer", ALL)
def test_a_second_derivative_is_refused(norm: ModuleType, layer: str) -> None:
    _, kernelized = pair(norm, layer, 32, torch.float32)
    arguments = [x.requires_grad_() for x in inputs(layer, (3, 32), torch.float32)]
    for loss in (kernelized(*arguments).square().sum(), kernelized(*arguments).sum()):
        (first,) = torch.autograd.grad(loss, arguments[:1], create_graph=True)
        # A penalty on the gradient is part of a loss that has a derivative: what is missing would not be noticed.
        with pytest.raises(RuntimeError, match=r"second derivative.*unkernelize"):
            (first.square().sum() + arguments[0].sum()).backward()
        with pytest.raises(RuntimeError, match=r"second derivative.*unkernelize"):
            torch.autograd.grad(first.square().sum() + arguments[0].sum(), arguments[:1])
        with pytest.raises(RuntimeError, match=r"second derivative.*unkernelize"):
            torch.autograd.grad(first.square().sum() + kernelized.weight.sum(), kernelized.weight)


def cases(norm: ModuleType) -> dict[str, tuple]:
    def t(*shape: int) -> Tensor:
        return torch.randn(shape)

    x, gate, y, w = t(2, 3, 40), t(2, 3, 40), t(2, 3, 40), t(40)
    return {
        "rms_norm": (x.transpose(0, 1), w, 1e-6, 0),
        "rms_norm_backward": (y, None, x, w, 1e-6, 2, True),
        "add_rms_norm": (x, y, w, 1e-6, 1),
        "rms_norm_gated": (x, gate, w, 1e-6, 0, 1),
        "rms_norm_gated_backward": (y, x, gate, w, 1e-6, 2),
        "layer_norm": (x, w, None, 1e-5),
        "layer_norm_backward": (y, x, None, 1e-5, False, True),
    }


@pytest.mark.parametrize("op", cases(None))  # type: ignore[arg-type]
def test_ops_are_what_their_schemas_and_shapes_say(norm: ModuleType, op: str) -> None:
    torch.library.opcheck(getattr(norm.compiled.ops, op).default, cases(norm)[op])


def test_every_op_is_tested(norm: ModuleType) -> None:
    namespace = norm.compiled.ops.rms_norm.default.namespace
    found = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")}
    assert found == {*cases(norm), "use_level"}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("layer", ALL)
def test_compiles_to_one_graph_with_the_op_in_it(norm: ModuleType, layer: str, enabled: bool) -> None:
    kernelized = pair(norm, layer, 96, torch.float32)[1]
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(kernelized, fullgraph=True, backend=counter, dynamic=True)
    with torch.set_grad_enabled(enabled):
        for rows in (5, 9):
            arguments = inputs(layer, (rows, 96), torch.float32)
            assert torch.equal(compiled(*arguments), kernelized(*arguments))
    assert counter.frame_count == 1


def test_compiled_gradients_are_those_of_eager(norm: ModuleType) -> None:
    torch._dynamo.reset()
    for layer in ("RMSNorm", "RMSNormGated", "LayerNorm"):
        kernelized = pair(norm, layer, 96, torch.float32)[1]
        compiled = torch.compile(kernelized, fullgraph=True, backend="aot_eager")
        results = []
        for module in (kernelized, compiled):
            arguments = [x.requires_grad_() for x in inputs(layer, (5, 96), torch.float32)]
            kernelized.zero_grad()
            module(*arguments).square().sum().backward()
            results.append([*(x.grad for x in arguments), *(p.grad.clone() for p in kernelized.parameters())])
        for expected, got in zip(*results, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("layer", ["RMSNorm", "RMSNormGated", "LayerNorm"])
def test_exports(norm: ModuleType, layer: str, strict: bool) -> None:
    kernelized = pair(norm, layer, 96, torch.float32)[1]
    rows = torch.export.Dim("rows", min=2, max=64)
    arguments = tuple(inputs(layer, (4, 96), torch.float32))
    with torch.no_grad():
        program = torch.export.export(
            kernelized, arguments, dynamic_shapes=tuple({0: rows} for _ in arguments), strict=strict
        )
        other = inputs(layer, (32, 96), torch.float32)
        torch.testing.assert_close(program.module()(*other), kernelized(*other))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("layer", ALL)
def test_where_the_ops_have_no_rules_pytorch_computes(norm: ModuleType, layer: str, enabled: bool) -> None:
    """vmap, gradients through it, forward mode with and without functorch: nothing is lost silently."""
    original, kernelized = pair(norm, layer, 96, torch.float32)
    arguments = inputs(layer, (4, 3, 96), torch.float32)
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in original.named_parameters()}

    def several(module: nn.Module) -> list[Tensor]:
        with_weights = vmap(lambda weights: functional_call(module, weights, tuple(arguments)))(stacked)
        through = grad(lambda x: vmap(module)(x, *arguments[1:]).square().sum())(arguments[0])
        tangents = tuple(torch.ones_like(x) for x in arguments)
        forward = jvp(module, tuple(arguments), tangents)[1]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in arguments]
            dual = forward_ad.unpack_dual(module(*duals)).tangent
        assert dual is not None
        return [vmap(module)(*arguments), with_weights, through, forward, dual]

    with torch.set_grad_enabled(enabled):
        for expected, got in zip(several(original), several(kernelized), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class Named(Tensor):
    """A subclass, which may keep more than its elements."""


def test_subclasses_and_other_dtypes_are_pytorchs(norm: ModuleType) -> None:
    x, w = torch.randn(3, 96), torch.randn(96)
    assert norm.compiled.takes(x, w)
    assert not norm.compiled.takes(x.as_subclass(Named), w)
    assert not norm.compiled.takes(x, w.as_subclass(Named))
    assert not norm.compiled.takes(x.bfloat16(), w)
    assert not norm.compiled.takes(x.double(), w.double())
    assert isinstance(norm.rms_norm(x.as_subclass(Named), w), Named)


def test_a_layer_norm_over_another_shape_is_an_error(norm: ModuleType) -> None:
    x = torch.randn(3, 96)
    for shape in ((48,), (3, 48)):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm.layer_norm(x, None, None, 1e-5, shape)
    expected = torch.nn.functional.layer_norm(x, (3, 96))
    assert torch.equal(norm.layer_norm(x, None, None, 1e-5, (3, 96)), expected)


def errors() -> dict[str, Callable[[ModuleType], object]]:
    x, w = torch.randn(3, 96), torch.randn(96)
    return {
        "device": lambda norm: norm.rms_norm(x, w.to("meta")),
        "95": lambda norm: norm.rms_norm(x, w[:95]),
        "another shape": lambda norm: norm.compiled._rms_norm_gated(x, x[:2], w, 1e-6, 0, 1),
        "another dtype": lambda norm: norm.compiled._rms_norm(x, w.half(), 1e-6, 0),
        "expected 0, 1 or 2": lambda norm: norm.compiled._rms_norm(x, w, 1e-6, 3),
        "expected 1, 2 or 3": lambda norm: norm.compiled._rms_norm_gated(x, x, w, 1e-6, 0, 0),
        "no such form": lambda norm: norm.compiled._rms_norm_gated(x, x, w, 1e-6, 1, 3),
        "no dimension": lambda norm: norm.compiled._rms_norm(x[0, 0], w, 1e-6, 0),
        "2 dimensions": lambda norm: norm.compiled._rms_norm(x, w[None], 1e-6, 0),
        "neither float32": lambda norm: norm.compiled._rms_norm(x.double(), w.double(), 1e-6, 0),
    }


@pytest.mark.parametrize("message", errors())
def test_wrong_operands_are_errors(norm: ModuleType, message: str) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        errors()[message](norm)


@pytest.mark.parametrize("layer", ALL)
def test_results_do_not_depend_on_the_number_of_threads(norm: ModuleType, layer: str) -> None:
    """The forward's; gradients of weights are sums over as many parts as there are threads."""
    _, kernelized = pair(norm, layer, 512, torch.bfloat16)
    arguments = inputs(layer, (200, 512), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [x.detach().clone().requires_grad_() for x in arguments]
            out = kernelized(*leaves)
            results.append([out, *torch.autograd.grad(out, [*leaves, kernelized.weight], torch.ones_like(out))])
    finally:
        torch.set_num_threads(before)
    for one, other in ((results[0], results[1]), (results[0], results[2])):
        assert all(torch.equal(a, b) for a, b in zip(one[:-1], other[:-1], strict=True))
        torch.testing.assert_close(one[-1], other[-1])
