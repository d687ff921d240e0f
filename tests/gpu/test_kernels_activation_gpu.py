"""The compiled CUDA ops of kernelhub/activation: against PyTorch's own and float64, on every path that a shape can take."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled
from torch import Tensor, nn
from transformers import activations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
}
NUMBERS = {name: number for number, name in enumerate(FUNCTIONS)}
LAYERS = {
    "SiLU": activations.SiLUActivation(),
    "GeLU": activations.GELUActivation(),
    "GeluTanh": activations.GELUTanh(),
    "TorchGELU": nn.GELU(),
    "NewGELU": activations.NewGELUActivation(),
    "FastGELU": activations.FastGELUActivation(),
    "QuickGELU": activations.QuickGELUActivation(),
    "Mish": activations.MishActivation(),
    "ReLUSquared": activations.ReLUSquaredActivation(),
    "Tanh": nn.Tanh(),
}
# Few elements and many; tails; rows of halves whose parts fill a block's threads, all but some, and not half of them
SHAPES = ((1,), (7,), (3, 14336), (64, 1001), (5, 3, 136), (4097, 2048), (900, 720), (3000, 320))


@pytest.fixture(scope="session")
def activation(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("activation", request.config)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") * 4).to(dtype)


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that an element that nothing writes is seen."""
    for size in (1 << 12, 1 << 18, 1 << 20, 1 << 24):
        kept = [torch.full((size,), float("nan"), device="cuda") for _ in range(4)]
        del kept


def error(got: Tensor, reference: Tensor) -> float:
    return float((got.double() - reference).detach().abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_is_at_most_twice_as_far_from_float64_as_pytorch(
    activation: ModuleType, function: str, dtype: torch.dtype
) -> None:
    """f(x), f(a) * b, and f(a) * b of two halves, with their gradients."""
    f, number, compiled = FUNCTIONS[function], NUMBERS[function], activation.compiled
    for shape in SHAPES:
        a, b, seed = (randn(*shape, dtype=dtype, seed=k) for k in range(3))
        ways = {
            "apply": (lambda a, b: f(a), lambda a, b: compiled.apply(a, number), 1),
            "multiply": (lambda a, b: f(a) * b, lambda a, b: compiled.multiply(a, b, number), 2),
            "halves": (lambda a, b: f(a) * b, lambda a, b: compiled.halves(torch.cat([a, b], -1), number), 2),
        }
        for name, (formula, ours, count) in ways.items():
            results = []
            for way, wide in ((formula, True), (formula, False), (ours, False)):
                leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in (a, b)]
                poison()
                out = way(*leaves)
                results.append([out, *torch.autograd.grad(out, leaves[:count], seed.to(out.dtype))])
            for reference, eager, got in zip(*results, strict=True):
                assert got.dtype == dtype
                assert got.shape == eager.shape
                unit = torch.finfo(dtype).eps * float(reference.detach().abs().max())
                assert error(got, reference) <= 2 * error(eager, reference) + unit, (shape, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_16_bits(activation: ModuleType, dtype: torch.dtype) -> None:
    """As PyTorch has it, but for one value in 500, which is the next one to it; infinities and NaN among them.

    And below 1e-35, where a quotient of the GPU's own by more than 2**126 is 0.
    """
    x = torch.arange(-(1 << 15), 1 << 15, device="cuda").to(torch.int16).view(dtype)
    for name, f in FUNCTIONS.items():
        got, expected = activation.compiled.apply(x, NUMBERS[name]), f(x)
        if name == "gelu_tanh":  # PyTorch's cancels far from zero
            expected = f(x.double()).to(dtype)
        assert torch.equal(got.isnan(), expected.isnan()), name
        apart = (got.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        apart[got.isnan() | (got == expected)] = 0
        apart[(expected.abs() < 1e-35) & (got.abs() < 1e-35)] = 0
        if name in ("gelu_tanh", "gelu"):  # x * (1 + erf(x)) or tanh ends where float32 does
            apart[(expected.abs() < 1e-6) & (got.abs() < 1e-6)] = 0
        assert apart.max() <= 1, (name, x[apart.argmax()], got[apart.argmax()], expected[apart.argmax()])
        assert apart.sum() <= len(x) // 500, (name, int(apart.sum()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*LAYERS])
def test_autocast_gives_what_the_original_gives(activation: ModuleType, name: str, dtype: torch.dtype) -> None:
    """Powers are float32 there, whatever they are of, and so is what is made of them."""
    original = LAYERS[name]
    kernelized = copy.deepcopy(original)
    kernelized.forward = getattr(activation.layers, name).forward.__get__(kernelized)
    torch._dynamo.reset()
    compiled = torch.compile(kernelized, fullgraph=True, backend="eager")
    for cast, enabled in itertools.product((torch.bfloat16, torch.float16), (True, False)):
        x = randn(5, 96, dtype=dtype).requires_grad_(enabled)
        results = []
        for module in (original, kernelized, compiled):
            with torch.autocast("cuda", dtype=cast), torch.set_grad_enabled(enabled):
                out = module(x)
            results.append([out, *torch.autograd.grad(out.sum(), [x])] if enabled else [out])
        for expected, *found in zip(*results, strict=True):
            for got in found:
                assert got.dtype == expected.dtype
                torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_silu_and_mul_rounds_as_the_two_steps_of_pytorch(activation: ModuleType) -> None:
    for dtype in DTYPES:
        a, b = randn(700, 1024, dtype=dtype), randn(700, 1024, dtype=dtype, seed=1)
        got, expected = activation.silu_and_mul(a, b), F.silu(a) * b
        assert (got != expected).float().mean() <= (0 if dtype == torch.float32 else 0.002)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
def test_gradients_with_the_result_are_those_and_the_result(
    activation: ModuleType, name: str, dtype: torch.dtype
) -> None:
    """Bit for bit: whole and in parts of 16 bytes, a tail, rows that lie apart, and a row that is not aligned."""
    forward, backward = getattr(activation, name), getattr(activation.functions, f"{name}_backward")
    for shape in (*SHAPES, (4, 0)):
        grad, a, b = (randn(*shape, dtype=dtype, seed=k) for k in range(3))
        ways = [(grad, a, b), tuple(torch.stack([x, x], -2)[..., 0, :] for x in (grad, a, b))]
        ways.append(tuple(torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (grad, a, b)))
        for operands in ways:
            expected = forward(*operands[1:])
            leaves = [x.detach().requires_grad_() for x in operands[1:]]
            gradients = torch.autograd.grad(forward(*leaves), leaves, operands[0])
            poison()
            found = backward(*operands, result=True)
            assert all(torch.equal(x, y) for x, y in zip(found, (*gradients, expected), strict=True)), shape
            x = torch.cat(operands[1:], -1)
            poison()
            both, none, again = backward(operands[0], x, result=True)
            assert none is None
            assert torch.equal(both, torch.cat(gradients, -1)), shape
            assert torch.equal(again, expected), shape


def views(x: Tensor) -> list[Tensor]:
    width = x.shape[-1]
    return [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:, ::2],
        x.repeat(1, 1, 3)[:, :, width : 2 * width],
        torch.cat([x[:, :, :1], x, x[:, :, :1]], 2)[:, :, 1 : width + 1],
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        x[:, :1].expand(x.shape),
        x.repeat_interleave(2, dim=2)[:, :, ::2],
        torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
        x.new_empty(0, width),
        x.flatten()[0],
    ]


def steps(x: Tensor) -> list[int]:
    """The strides of dimensions that have any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("shape", [(4, 6, 96), (40, 30, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_empty_inputs(activation: ModuleType, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compiled = activation.compiled
    for a, b in zip(views(randn(*shape, dtype=dtype)), views(randn(*shape, dtype=dtype, seed=1)), strict=True):
        plain = [x.clone(memory_format=torch.contiguous_format) for x in (a, b)]
        for name, count, usual in (
            ("apply", 1, F.silu),
            ("multiply", 2, lambda a, b: F.silu(a) * b),
            ("halves", 1, F.glu),
        ):
            if name == "halves" and a.dim() == 0:
                continue
            results = []
            for operands in ((a, b), plain):
                leaves = [x.detach().requires_grad_() for x in operands[:count]]
                poison()
                out = getattr(compiled, name)(*leaves, 0)
                seed = torch.full_like(out, 0.75)
                results.append([out, *torch.autograd.grad(out, leaves, seed)])
            assert steps(results[0][0]) == steps(usual(*(a, b)[:count]))
            assert all(torch.equal(x, y) for x, y in zip(*results, strict=True)), (name, a.shape, a.stride())


def test_tensors_of_more_than_2_31_elements(activation: ModuleType, needs_memory: Callable[[int], None]) -> None:
    count = (1 << 31) + 24
    needs_memory(12 * count)
    a = torch.randn(count // 16, device="cuda").to(torch.bfloat16).repeat(17)[:count]
    out = activation.silu_and_mul(a, a)
    torch.testing.assert_close(out[-1000:], F.silu(a[-1000:]) * a[-1000:])
    for width in (64, 1024):
        wide = a[: 1 << 31].view(-1, 2, width)[:, 0]  # as rows that lie apart
        torch.testing.assert_close(activation.silu_and_mul(wide, wide)[-3:], F.silu(wide[-3:]) * wide[-3:])


def cases(activation: ModuleType | None) -> dict[str, tuple]:
    if activation is None:
        both = ("multiply_backward_result", "halves_backward_result")
        return dict.fromkeys(
            ("apply", "apply_backward", "multiply", "multiply_backward", "halves", "halves_backward", *both)
        )  # type: ignore[arg-type]
    a, b, grad, both = (randn(3, 40 * (1 + k // 3), dtype=torch.float32, seed=k) for k in range(4))
    return {
        "apply": (a, 2),
        "apply_backward": (grad, a, 1),
        "multiply": (a, b, 0),
        "multiply_backward": (grad, a, b, 3),
        "halves": (both, 0),
        "halves_backward": (grad, both, 0),
        "multiply_backward_result": (grad, a, b, 1),
        "halves_backward_result": (grad, both, 2),
    }


@pytest.mark.parametrize("op", cases(None))
def test_ops_are_what_their_schemas_and_shapes_say(activation: ModuleType, op: str) -> None:
    torch.library.opcheck(getattr(activation.compiled.ops, op).default, cases(activation)[op])
