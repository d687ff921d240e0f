"""The compiled CUDA ops of kernelhub/norm: against the models' own code and float64, on every path that a shape can take."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]

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
# Rows and widths: a few elements, less than a warp, unaligned, one to eight packs to a thread with few rows and with many, rows too long
# for registers (forwards above 8192 packs of 16 bytes, backwards above 2048), aligned and not.
SHAPES = (
    (67, 7), (67, 65), (700, 128), (3000, 64), (67, 1000), (5, 4096), (901, 2048), (601, 4096), (600, 5120),
    (600, 8192), (600, 10240), (600, 16384), (600, 20480), (9, 16384), (7, 16392), (5, 40004), (3, 70001), (3, 131072),
)  # fmt: skip


@pytest.fixture(scope="session")
def norm(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("norm", request.config)


def pair(norm: ModuleType, layer: str, width: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A module of the original class, and the same with the kernel's forward, random weights."""
    cls = ALL[layer]
    torch.manual_seed(0)
    original, kernelized = cls(width), cls(width)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    original, kernelized = original.to("cuda", dtype), kernelized.to("cuda", dtype)
    kernelized.load_state_dict(original.state_dict())
    kernelized.forward = getattr(norm.layers, layer).forward.__get__(kernelized)
    return original, kernelized


def widened(layer: str, norm: ModuleType, module: nn.Module) -> nn.Module:
    """The kernel's module in float64, where PyTorch computes: the reference, tested in test_kernels_norm.py."""
    wide = ALL[layer](module.weight.shape[0]).to("cuda", torch.float64)
    wide.load_state_dict(module.state_dict())
    wide.forward = getattr(norm.layers, layer).forward.__get__(wide)
    return wide


def inputs(layer: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    count = 2 if layer in GATED else 1
    return [(torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype) for _ in range(count)]


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that an element that nothing writes is seen."""
    for size in (1 << 12, 1 << 18, 1 << 20, 1 << 26):
        kept = [torch.full((size,), float("nan"), device="cuda") for _ in range(4)]
        del kept


def error(got: Tensor, reference: Tensor) -> float:
    return float((got.double() - reference).detach().abs().max()) if got.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ALL)
def test_is_at_most_twice_as_far_from_float64_as_the_models_own_code(
    norm: ModuleType, layer: str, dtype: torch.dtype
) -> None:
    """The result and every gradient."""
    for rows, width in SHAPES:
        original, kernelized = pair(norm, layer, width, dtype)
        arguments = inputs(layer, (rows, width), dtype)
        assert norm.compiled.takes(arguments[0], kernelized.weight)
        seed = torch.randn(rows, width, generator=torch.Generator("cuda").manual_seed(2), device="cuda").to(dtype)
        results = []
        for module, wide in ((widened(layer, norm, original), True), (original, False), (kernelized, False)):
            leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in arguments]
            poison()
            out = module(*leaves)
            poison()
            gradients = torch.autograd.grad(out, [*leaves, *module.parameters()], seed.to(out.dtype))
            results.append([out.detach(), *gradients])
        for place, (reference, eager, got) in enumerate(zip(*results, strict=True)):
            assert got.dtype == eager.dtype
            # A unit of rounding of the largest value is allowed, for where the original happens to be exact.
            unit = torch.finfo(dtype).eps * float(reference.detach().abs().max())
            assert error(got, reference) <= 2 * error(eager, reference) + unit, (rows, width, place)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.bfloat16, 8192), (torch.float16, 12288), (torch.float32, 6656), (torch.bfloat16, 16384)],
    ids=str,
)
def test_rows_that_no_cache_holds_are_read_twice(norm: ModuleType, dtype: torch.dtype, width: int) -> None:
    """Two, three and four packs to a thread; against the models' own code and float64, and rows that lie apart."""
    rows = 4 * torch.cuda.get_device_properties("cuda").L2_cache_size // (width * dtype.itemsize) + 3
    whole = inputs("RMSNorm", (rows, width + 64), dtype)[0]
    x, apart = whole[:, :width].contiguous(), whole[:, :width]
    for layer in RMS:
        original, kernelized = pair(norm, layer, width, dtype)
        with torch.no_grad():
            poison()
            got = kernelized(x)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                poison()
                assert torch.equal(kernelized(apart), got)
            assert any("rms_rows_twice" in event.name for event in profile.events())
            for some in (slice(0, 50), slice(rows // 2, rows // 2 + 50), slice(rows - 50, rows)):
                reference, eager = widened(layer, norm, original)(x[some].double()), original(x[some])
                unit = torch.finfo(dtype).eps * float(reference.abs().max())
                assert error(got[some], reference) <= 2 * error(eager, reference) + unit, (layer, some)
            parts = torch.cat([kernelized(part) for part in x.chunk(5)])  # of each a cache holds enough
            limits = torch.finfo(dtype)
            torch.testing.assert_close(got, parts, rtol=2 * limits.eps, atol=limits.smallest_normal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_rows_whose_mean_is_far_from_zero(norm: ModuleType, dtype: torch.dtype) -> None:
    """Where the mean square is nearly all the mean's square no digits are lost, whatever the rows beside it are like."""
    for rows, width in ((700, 64), (67, 70), (5, 1000), (901, 2048), (601, 4096), (600, 8192), (5, 40004), (3, 131072)):
        original, kernelized = pair(norm, "LayerNorm", width, dtype)
        (x,) = inputs("LayerNorm", (rows, width), torch.float32, 1.0)
        x += torch.tensor([0.0, 0.5, 7.0, 9.0, 100.0, 1000.0], device="cuda")[torch.arange(rows) % 6, None]
        x[2::5] = 7.9  # no deviation at all
        x = x.to(dtype)
        with torch.no_grad():
            reference, eager = widened("LayerNorm", norm, original)(x.double()), original(x)
            got = kernelized(x)
        unit = torch.finfo(dtype).eps * float(reference.abs().max())
        assert error(got, reference) <= 2 * error(eager, reference) + 2 * unit, (rows, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_a_row_of_equal_elements_is_the_bias(norm: ModuleType, dtype: torch.dtype) -> None:
    """Whatever they are: their distance from the mean is divided by next to nothing. So in the gradients."""
    for rows, width in SHAPES:
        _, kernelized = pair(norm, "LayerNorm", width, dtype)
        x = torch.tensor([0.0, 7.9, -1000.0, 3000.0, 60000.0], device="cuda")[torch.arange(rows) % 5, None]
        x = x.expand(rows, width).to(dtype).requires_grad_()
        got = kernelized(x)
        assert torch.equal(got, kernelized.bias.expand(rows, width)), (rows, width)
        grad = torch.randn(rows, width, generator=torch.Generator("cuda").manual_seed(2), device="cuda").to(dtype)
        x_grad, weight_grad = torch.autograd.grad(got, (x, kernelized.weight), grad)
        assert not weight_grad.any(), (rows, width)
        g = grad.double() * kernelized.weight.detach()
        exact = (g - g.mean(1, keepdim=True)) * kernelized.eps**-0.5
        unit = torch.finfo(dtype).eps * float(exact.abs().max())
        assert error(x_grad, exact) <= 3 * unit, (rows, width)  # a GPU's reciprocal square root alone is off by up to 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_of_numbers_whose_squares_no_float_holds(norm: ModuleType, dtype: torch.dtype) -> None:
    """Those of their distances from the mean it does; and equal elements of any size give the bias."""
    for rows, width in ((5, 1000), (67, 1000), (901, 2048), (601, 4096), (600, 5120), (3, 16384)):
        _, kernelized = pair(norm, "LayerNorm", width, dtype)
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).cuda()
        x = (1e19 + 1e17 * x).to(dtype)
        equal = torch.logspace(4, 14, rows, device="cuda")[:, None].expand(rows, width).to(dtype)
        reference = F.layer_norm(x.double(), (width,), kernelized.weight.double(), kernelized.bias.double())
        with torch.no_grad():
            got, of_equal = kernelized(x), kernelized(equal)
        unit = torch.finfo(dtype).eps * float(reference.abs().max())
        assert error(got, reference) <= 2 * unit + 1e-4, (rows, width)
        assert torch.equal(of_equal, kernelized.bias.expand(rows, width)), (rows, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_without_weight_or_bias(norm: ModuleType, dtype: torch.dtype) -> None:
    """Wherever a kernel has them: in registers, in shared memory, in global memory."""
    for rows, width in ((5, 4096), (67, 1000), (901, 2048), (601, 4096), (600, 5120), (600, 8192), (3, 131072)):
        (x,) = inputs("LayerNorm", (rows, width), dtype)
        x[0] = 60000.0  # the mean far from zero, in the same block
        weight, bias = (torch.randn(width, device="cuda").to(dtype) for _ in range(2))
        for w, b in ((None, None), (weight, None), (None, bias)):
            wide = [None if of is None else of.double() for of in (w, b)]
            reference, eager = F.layer_norm(x.double(), (width,), *wide), F.layer_norm(x, (width,), w, b)
            poison()
            got = norm.layer_norm(x, w, b)
            unit = torch.finfo(dtype).eps * float(reference.abs().max())
            assert torch.equal(got[0], torch.zeros_like(got[0]) if b is None else b), (rows, width)
            assert error(got[1:], reference[1:]) <= 2 * error(eager[1:], reference[1:]) + unit, (rows, width, w is None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [*RMS, *GATED])
def test_rounds_where_the_models_own_code_rounds(norm: ModuleType, layer: str, dtype: torch.dtype) -> None:
    """Only the order of the sum differs: where a value lies between two of the dtype it seldom decides. Rounding once less
    changes a quarter of them."""
    for rows, width in ((64, 4096), (4096, 2048), (64, 1001)):
        original, kernelized = pair(norm, layer, width, dtype)
        arguments = inputs(layer, (rows, width), dtype)
        with torch.no_grad():
            expected, got = original(*arguments), kernelized(*arguments)
        if dtype == torch.float32:
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7)
        else:
            assert (got != expected).float().mean() < 0.005, (rows, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_tiny_huge_and_non_finite_values(norm: ModuleType, dtype: torch.dtype) -> None:
    for width in (70, 4096):
        rows = torch.randn(32, width, device="cuda").to(dtype)
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
            ordinary = [0, *range(6, 32)] if layer in LAYER else slice(None)
            torch.testing.assert_close(got[ordinary], expected[ordinary], equal_nan=True)
            assert got[3:6].isnan().any(1).tolist() == expected[3:6].isnan().any(1).tolist()


def views(shape: tuple[int, int, int], x: Tensor) -> list[Tensor]:
    """x, of that shape, by other strides and at other places, and parts of it."""
    width = shape[2]
    return [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:, ::2],
        x.repeat(1, 1, 3)[:, :, width : 2 * width],
        torch.cat([x[:, :, :1], x, x[:, :, :1]], 2)[:, :, 1 : width + 1],
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        x[:, :1].expand(shape),
        x.repeat_interleave(2, dim=2)[:, :, ::2],
        x.flatten(0, 1)[1],
        x[:, None, :, :].transpose(2, 1),
        x.view(2, 2, 3, 2, width).permute(1, 3, 0, 2, 4),
        torch.cat([x.flatten()[:1], x.flatten()])[1:].view(shape),
        x.new_empty(0, width),
        x.new_empty(3, 0, width),
    ]


def steps(x: Tensor) -> list[int]:
    """The strides of dimensions that have any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", ALL)
def test_any_strides_and_empty_inputs(norm: ModuleType, layer: str, dtype: torch.dtype) -> None:
    shape, (original, kernelized) = (4, 6, 96), pair(norm, layer, 96, dtype)
    for place, operands in enumerate(zip(*(views(shape, x) for x in inputs(layer, shape, dtype)), strict=True)):
        leaves = [operand.detach().requires_grad_() for operand in operands]
        poison()
        got = kernelized(*leaves)
        dense = [operand.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for operand in operands]
        expected = kernelized(*dense)
        assert steps(got) == steps(original(*leaves))
        seed = torch.randn_like(expected)
        apart = seed.mT.contiguous().mT if seed.dim() > 1 else seed
        for a, b in zip(
            [got, *torch.autograd.grad(got, [*leaves, kernelized.weight], apart)],
            [expected, *torch.autograd.grad(expected, [*dense, kernelized.weight], seed)],
            strict=True,
        ):
            # Rows that are not aligned are added up in another order.
            torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4, msg=str(place))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_is_the_two_steps(norm: ModuleType, dtype: torch.dtype) -> None:
    for rows, width in ((40, 130), (3, 4096), (2000, 2048), (3, 80000)):
        _, kernelized = pair(norm, "RMSNorm", width, dtype)
        leaves = [torch.randn(rows, width, device="cuda").to(dtype).requires_grad_() for _ in range(2)]
        seeds = [torch.randn(rows, width, device="cuda").to(dtype) for _ in range(2)]
        expected_sum = leaves[0] + leaves[1]
        expected = kernelized(expected_sum)
        got, got_sum = norm.add_rms_norm(*leaves, kernelized.weight, kernelized.variance_epsilon)
        assert torch.equal(got_sum, expected_sum)
        torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-5)
        assert (got != expected).float().mean() < (0.5 if dtype == torch.float32 else 0.005)  # the order of the sum
        tensors = [*leaves, kernelized.weight]
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        for a, b in zip(
            torch.autograd.grad([got, got_sum], tensors, seeds),
            torch.autograd.grad([expected, expected_sum], tensors, seeds),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("layer", ALL)
def test_two_runs_give_the_same_bits(norm: ModuleType, layer: str) -> None:
    for rows, width in ((20000, 128), (4096, 4096), (3000, 1001), (200, 40000)):
        _, kernelized = pair(norm, layer, width, torch.bfloat16)
        arguments = [x.requires_grad_() for x in inputs(layer, (rows, width), torch.bfloat16)]
        runs = []
        for _ in range(2):
            out = kernelized(*arguments)
            runs.append([out, *torch.autograd.grad(out.float().square().sum(), [*arguments, *kernelized.parameters()])])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("layer", ALL)
def test_graphs_replay_forward_and_backward(norm: ModuleType, layer: str) -> None:
    _, kernelized = pair(norm, layer, 2048, torch.bfloat16)
    arguments = [x.requires_grad_() for x in inputs(layer, (300, 2048), torch.bfloat16)]
    seed = torch.randn(300, 2048, device="cuda").to(torch.bfloat16)

    def step() -> list[Tensor]:
        out = kernelized(*arguments)
        return [out, *torch.autograd.grad(out, [*arguments, *kernelized.parameters()], seed)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for argument in arguments:
            argument.mul_(0.5).add_(0.25)
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


def test_tensors_of_more_than_2_31_elements(norm: ModuleType, needs_memory: Callable[[int], None]) -> None:
    rows, width = (1 << 31) // 4096 + 8, 4096
    needs_memory(5 * rows * width * 2)
    weight = torch.randn(width, device="cuda").to(torch.bfloat16).requires_grad_()
    x = torch.randn(16, width, device="cuda").to(torch.bfloat16).repeat(rows // 16, 1).requires_grad_()
    out = norm.rms_norm(x, weight)
    assert torch.equal(out[-16:], out[:16])
    (x_grad,) = torch.autograd.grad(out, x, out.detach())
    assert torch.equal(x_grad[-16:], x_grad[:16])
    column = torch.randn(rows * width, 1, device="cuda").to(torch.bfloat16)  # as many rows
    assert torch.equal(norm.rms_norm(column, weight[:1])[-9:], norm.rms_norm(column[-9:], weight[:1]))


def test_what_the_ops_do_not_take_is_pytorchs(norm: ModuleType) -> None:
    x, weight = torch.randn(4, 32), torch.randn(32)
    assert not norm.compiled.takes(x, weight)
    assert not norm.compiled.takes(x.cuda(), weight)
    assert not norm.compiled.takes(x.cuda().double(), weight.cuda().double())
    torch.testing.assert_close(norm.rms_norm(x, weight), norm.rms_norm(x.cuda(), weight.cuda()).cpu())
    with pytest.raises(RuntimeError, match="expected as many as the input's last dimension, 32"):
        norm.rms_norm(x.cuda(), weight.cuda()[:31])


def cases(norm: ModuleType) -> dict[str, tuple]:
    def t(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    if norm is None:
        return dict.fromkeys(
            (
                "rms_norm", "rms_norm_backward", "add_rms_norm", "rms_norm_gated", "rms_norm_gated_backward",
                "layer_norm", "layer_norm_backward",
            )
        )  # type: ignore[arg-type]  # fmt: skip
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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layer", ALL)
def test_autocast_gives_what_the_original_gives(norm: ModuleType, layer: str, compiled: bool) -> None:
    """PyTorch's layer norm is float32 there, whatever it is given, and its gradients are as before."""
    for dtype, enabled in itertools.product(DTYPES, (True, False)):
        torch._dynamo.reset()  # one module's code is compiled 8 times at most
        original, kernelized = pair(norm, layer, 96, dtype)
        called = torch.compile(kernelized, fullgraph=True, backend="eager") if compiled else kernelized
        for cast in (torch.bfloat16, torch.float16):
            arguments = [x.requires_grad_(enabled) for x in inputs(layer, (5, 96), dtype)]
            results = []
            for module, parameters in ((original, original.parameters()), (called, kernelized.parameters())):
                with torch.autocast("cuda", dtype=cast), torch.set_grad_enabled(enabled):
                    out = module(*arguments)
                results.append([out, *torch.autograd.grad(out.sum(), [*arguments, *parameters])] if enabled else [out])
            for expected, got in zip(*results, strict=True):
                assert got.dtype == expected.dtype
                torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("layer", ALL)
def test_compiles_to_one_graph_with_the_op_in_it(norm: ModuleType, layer: str, enabled: bool) -> None:
    kernelized = pair(norm, layer, 96, torch.bfloat16)[1]
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(kernelized, fullgraph=True, backend=counter, dynamic=True)
    with torch.set_grad_enabled(enabled):
        for rows in (5, 9):
            arguments = inputs(layer, (rows, 96), torch.bfloat16)
            assert torch.equal(compiled(*arguments), kernelized(*arguments))
    assert counter.frame_count == 1


def test_inductor_gives_the_same_forward_and_backward(norm: ModuleType) -> None:
    torch._dynamo.reset()
    for layer in ("RMSNorm", "RMSNormGated", "LayerNorm"):
        kernelized = pair(norm, layer, 256, torch.bfloat16)[1]
        compiled = torch.compile(kernelized, fullgraph=True)
        results = []
        for module in (kernelized, compiled):
            arguments = [x.requires_grad_() for x in inputs(layer, (50, 256), torch.bfloat16)]
            out = module(*arguments)
            results.append([out, *torch.autograd.grad(out, [*arguments, *kernelized.parameters()], out.detach())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layer", ["RMSNorm", "RMSNormGated", "LayerNorm"])
def test_exports(norm: ModuleType, layer: str) -> None:
    kernelized = pair(norm, layer, 96, torch.float32)[1]
    rows = torch.export.Dim("rows", min=2, max=64)
    arguments = tuple(inputs(layer, (4, 96), torch.float32))
    with torch.no_grad():
        program = torch.export.export(kernelized, arguments, dynamic_shapes=tuple({0: rows} for _ in arguments))
        more = inputs(layer, (9, 96), torch.float32)
        torch.testing.assert_close(program.module()(*more), kernelized(*more))
