"""The starter kernels' Triton ops, which noarch builds run on a GPU: against PyTorch's own code there and against float64.

Without a GPU most of them run in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/gpu/test_kernels_triton_gpu.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernelprojects import load_noarch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import kernelhub
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.settings import Settings

GPU = torch.cuda.is_available()
INTERPRETED = not GPU and os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or not (GPU or INTERPRETED), reason="needs Triton and a GPU"
    ),
]
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
PROJECTS = ("norm", "activation", "rotary", "loss")
DEVICE = "cuda" if GPU else "cpu"
# The interpreter cuts to bfloat16 where a GPU rounds.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)


def let_numpy_convert() -> None:
    """Have the interpreter's scalars, arrays of one element, be numbers where NumPy 2.4 takes only arrays without dimensions."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    let_numpy_convert()


def load(project: str, name: str) -> ModuleType:
    module = load_noarch(project, name)
    here = module.compiled.triton_here
    if INTERPRETED:
        here._DEVICES = frozenset(("cpu",))
        here.works = lambda kind, index: bool(importlib.import_module(f"{name}.triton_ops"))
    return module


@pytest.fixture(scope="session")
def triton() -> dict[str, ModuleType]:
    return {project: load(project, f"_{project}_in_triton") for project in PROJECTS}


@pytest.fixture(scope="session")
def pytorch() -> dict[str, ModuleType]:
    """The same without Triton."""
    found = {project: load_noarch(project, f"_{project}_in_pytorch") for project in PROJECTS}
    for module in found.values():
        module.compiled.triton_here.works = lambda kind, index: False
    return found


def numbers(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def everything(function: Callable[..., Any], operands: list[Tensor], wide: bool = False) -> list[Tensor]:
    """The results, and the gradients of each operand of floating point, in float64 where `wide`."""
    leaves = [x.detach() if x.dtype is torch.int64 else (x.double() if wide else x).detach() for x in operands]
    floating = [x.requires_grad_() for x in leaves if x.dtype is not torch.int64]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    seeds = [numbers(*one.shape, dtype=operands[0].dtype, scale=1.0, seed=9).to(one.dtype) for one in outs]
    return [*(one.detach() for one in outs), *torch.autograd.grad(outs, floating, seeds)]


def assert_as_near(ours: ModuleType, theirs: ModuleType, name: str, operands: list[Tensor], **options: Any) -> None:
    """At most twice as far from float64 as PyTorch's code, the result and every gradient; or a unit of rounding."""

    def results(module: ModuleType, wide: bool = False) -> list[Tensor]:
        return everything(lambda *leaves: getattr(module, name)(*leaves, **options), operands, wide)

    for place, (got, eager, exact) in enumerate(
        zip(results(ours), results(theirs), results(theirs, True), strict=True)
    ):
        assert got.dtype == eager.dtype
        assert got.shape == eager.shape
        if got.numel():
            error, allowed = (float((x.double() - exact).abs().max()) for x in (got, eager))
            unit = torch.finfo(got.dtype).eps * float(exact.abs().max())
            assert error <= 2 * allowed + unit, (name, place, [tuple(x.shape) for x in operands], error, allowed)


RMS = ("rms_norm", "rms_norm_cast_last", "rms_norm_zero_centered", "rms_norm_weight_dtype")
GATED = ("rms_norm_gated", "rms_norm_gated_cast_last", "rms_norm_gate_first")
NORMS = (*RMS, *GATED, "add_rms_norm", "layer_norm", "layer_norm_cast_last")
# Widths: tails, several rows to a program, one row, rows too long for the backward's registers, and for the forward's.
WIDTHS = (
    ((5, 7), (6, 130))
    if INTERPRETED
    else ((67, 7), (700, 128), (67, 1000), (5, 4096), (600, 5120), (9, 16392), (3, 70001))
)


def norm_operands(name: str, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    x, other = numbers(rows, width, dtype=dtype), numbers(rows, width, dtype=dtype, seed=1)
    weight, bias = numbers(width, dtype=dtype, scale=1.0, seed=2), numbers(width, dtype=dtype, seed=3)
    if name in GATED:
        return [x, weight, other]
    return {"add_rms_norm": [x, other, weight], "layer_norm": [x, weight, bias]}.get(name, [x, weight])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms(triton: dict[str, ModuleType], pytorch: dict[str, ModuleType], name: str, dtype: torch.dtype) -> None:
    for rows, width in WIDTHS:
        operands = norm_operands(name, rows, width, dtype)
        assert triton["norm"].compiled.takes(operands[0], numbers(width, dtype=dtype))
        assert_as_near(triton["norm"], pytorch["norm"], name, operands)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_without_an_eps_the_places_of_rows_that_there_are_not_add_nothing(
    triton: dict[str, ModuleType], name: str
) -> None:
    """A program's tile is of more rows than there are, and nothing over nothing is not a number."""
    x, weight, bias = (of.requires_grad_() for of in norm_operands("layer_norm", 5, 7, torch.float32))
    rows = [weight, bias] if name == "layer_norm" else [weight]
    y = getattr(triton["norm"], name)(x, *rows, 0.0)
    for grad in torch.autograd.grad(y.sum(), [x, *rows]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_gated", "add_rms_norm", "layer_norm"])
def test_long_rows_in_steps(
    triton: dict[str, ModuleType], pytorch: dict[str, ModuleType], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ways of rows that are too long for registers, with short ones."""
    triton["norm"].rms_norm(numbers(1, 8), numbers(8))  # imports them
    ops = importlib.import_module("_norm_in_triton.triton_ops")
    for longest in ("_LONGEST", "_LONGEST_BACKWARD"):
        monkeypatch.setattr(ops, longest, 1)
    monkeypatch.setattr(ops, "_STEP", 64)
    for shape in ((3, 64), (5, 150)):
        assert_as_near(triton["norm"], pytorch["norm"], name, norm_operands(name, *shape, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_steps", [False, True])
def test_layer_norm_of_rows_whose_mean_is_far_from_zero(
    triton: dict[str, ModuleType], in_steps: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of equal elements gives the bias, whatever they are and whatever rows are beside it; so in the gradients."""
    layer_norm = triton["norm"].layer_norm
    layer_norm(numbers(1, 8), numbers(8))  # imports them
    if in_steps:
        ops = importlib.import_module("_norm_in_triton.triton_ops")
        for longest in ("_LONGEST", "_LONGEST_BACKWARD"):
            monkeypatch.setattr(ops, longest, 1)
        monkeypatch.setattr(ops, "_STEP", 64)
    for width in (70, 1000) if INTERPRETED else (70, 1000, 4096, 9000):
        weight, bias = numbers(width, dtype=dtype, scale=1.0, seed=2), numbers(width, dtype=dtype, seed=3)
        means = torch.tensor([0.0, 1.1, 7.9, 1000.3, 3000.7, 60000.0], device=DEVICE)[:, None]
        equal, x = means.expand(6, width).to(dtype), (numbers(6, width, scale=1.0) + means).to(dtype)
        rows = torch.cat((equal, x)).requires_grad_()
        leaves = [rows, weight.clone().requires_grad_()]
        got, grad = layer_norm(*leaves, bias), numbers(12, width, dtype=dtype, seed=9)
        grad[6:] = 0  # the weight's gradient is of the equal elements alone
        x_grad, weight_grad = torch.autograd.grad(got, leaves, grad)
        assert torch.equal(got[:6], bias.expand(6, width)), width
        assert not weight_grad.any(), width
        g = (grad * weight.double())[:6]
        unit = torch.finfo(dtype).eps
        exact = (g - g.mean(1, keepdim=True)) * 1e-5**-0.5
        assert float((x_grad[:6] - exact).abs().max()) <= 2 * unit * float(exact.abs().max()), width
        wide = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double())
        of_pytorch = torch.nn.functional.layer_norm(x, (width,), weight, bias)
        error, allowed = (float((of - wide).detach().abs().max()) for of in (got[6:], of_pytorch))
        assert error <= 2 * allowed + 2 * unit * float(wide.abs().max()), width


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_round_where_pytorchs_code_rounds(
    triton: dict[str, ModuleType], pytorch: dict[str, ModuleType], dtype: torch.dtype
) -> None:
    """Only the order of the sum differs, which seldom decides. Rounding once less changes a quarter of the elements."""
    for name, width in itertools.product((*RMS, *GATED, "add_rms_norm"), (4096, 1001)):
        operands = norm_operands(name, 512, width, dtype)
        got, expected = (getattr(module["norm"], name)(*operands) for module in (triton, pytorch))
        if name == "add_rms_norm":
            assert torch.equal(got[1], expected[1])
            got, expected = got[0], expected[0]
        assert (got != expected).float().mean() < 0.005, (name, width)


def test_layer_norm_with_and_without_weight_and_bias(
    triton: dict[str, ModuleType], pytorch: dict[str, ModuleType]
) -> None:
    x, weight, bias = numbers(6, 40), numbers(40), numbers(40, seed=1)
    for w, b in itertools.product((weight, None), (bias, None)):
        operands = [x, *(row for row in (w, b) if row is not None)]

        def called(module: ModuleType, leaves: tuple[Tensor, ...], w: Any = w, b: Any = b) -> Tensor:
            rest = iter(leaves[1:])
            return module.layer_norm(
                leaves[0], w if w is None else next(rest), b if b is None else next(rest), 1e-5, (40,)
            )

        got, expected = (
            everything(lambda *leaves, m=module["norm"]: called(m, leaves), operands) for module in (triton, pytorch)
        )
        for a, e in zip(got, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


ACTIVATIONS = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "gelu_tanh", "gelu_quick")


def activation_operands(dtype: torch.dtype) -> Iterator[list[Tensor]]:
    def n(*shape: int, seed: int = 0) -> Tensor:
        return numbers(*shape, dtype=dtype, scale=4.0, seed=seed)

    yield [n(3, 14)]
    yield [n(5, 4, 2050)[:, ::2]]
    yield [n(6, 40).t()[:, :4]]
    yield [n(2, 8, 30).transpose(0, 1)]
    yield [torch.linspace(-90, 90, 4000, device=DEVICE).to(dtype)]
    yield [n(0, 6)]
    yield [n(3, 14), n(3, 14, seed=1)]
    yield [*n(7, 60).chunk(2, -1)]
    yield [n(6, 40).t(), n(40, 6, seed=1)]
    yield [n(6, 2, 5)[:, 0], n(6, 5, seed=1)]
    yield [n(), n(seed=1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(
    triton: dict[str, ModuleType], pytorch: dict[str, ModuleType], name: str, dtype: torch.dtype
) -> None:
    for operands in activation_operands(dtype):
        if len(operands) == 1 or name.endswith("mul"):
            assert triton["activation"].compiled.takes(*operands)
            assert_as_near(triton["activation"], pytorch["activation"], name, operands)


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
def test_gradients_with_the_result_are_those_and_the_result(triton: dict[str, ModuleType], name: str) -> None:
    forward = getattr(triton["activation"], name)
    backward = getattr(triton["activation"].functions, f"{name}_backward")
    for dtype in DTYPES:
        for operands in activation_operands(dtype):
            leaves = [x.detach().requires_grad_() for x in operands]
            y = forward(*leaves)
            grad = numbers(*y.shape, dtype=dtype, seed=9)
            x_grad, other_grad, again = backward(grad, *operands, result=True)
            found = [one for one in (x_grad, other_grad) if one is not None]
            assert all(torch.equal(*pair) for pair in zip(found, torch.autograd.grad(y, leaves, grad), strict=True))
            assert torch.equal(again, y)


def test_gradients_of_another_shape_than_the_product_of_halves_are_errors(triton: dict[str, ModuleType]) -> None:
    """Which the kernels would read beyond their end, or in another order."""
    backward, x = triton["activation"].functions.silu_and_mul_backward, numbers(6, 4, 32)
    for shape in ((5, 4, 16), (4, 6, 16), (6, 4, 15), (6, 4)):
        with pytest.raises(RuntimeError, match="must match"):
            backward(numbers(*shape), x)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_silu_times_the_other_rounds_in_between(
    triton: dict[str, ModuleType], pytorch: dict[str, ModuleType], dtype: torch.dtype
) -> None:
    operands = [numbers(500, 1000, dtype=dtype, seed=seed) for seed in (0, 1)]
    got, expected = (module["activation"].silu_and_mul(*operands) for module in (triton, pytorch))
    assert (got != expected).float().mean() < 0.005


def rotary_forms() -> list[dict[str, bool]]:
    bits = itertools.product((False, True), repeat=3)
    return [dict(zip(("interleaved", "inverse", "round_once"), form, strict=True)) for form in bits]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", rotary_forms(), ids=str)
def test_rotary(
    triton: dict[str, ModuleType], pytorch: dict[str, ModuleType], form: dict[str, bool], dtype: torch.dtype
) -> None:
    """Bit for bit; the gradients of what rounds once are rounded once, too, and PyTorch's are not."""
    shapes = (
        ((6, 0, 1, 4), (16, 5, 2, 3))
        if INTERPRETED
        else ((6, 0, 1, 4), (16, 5, 2, 3), (64, 64, 2, 4), (128, 0, 1, 4), (80, 0, 1, 3))
    )
    for (width, extra, dim, dims), paired in itertools.product(shapes, (False, True)):
        q, k = numbers(2, 3, 20, width + extra, dtype=dtype), numbers(2, 3, 2, width + extra, dtype=dtype, seed=1)
        if dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        tables = {dtype, torch.float32} if form["round_once"] else {dtype}
        for of in tables:
            cos, sin = (
                numbers(1, 3, width // 2 if paired else width, dtype=of, scale=1.0, seed=seed) for seed in (2, 3)
            )
            operands = [q, k, cos, sin] if dims == 4 else [x[0] for x in (q, k, cos, sin)]
            unsqueeze = dim if dims == 4 else dim - 1
            assert triton["rotary"].compiled.takes(*operands, unsqueeze, width, form["round_once"])
            results = []
            for module in (triton, pytorch):
                leaves = [x.detach().requires_grad_() for x in operands[:2]]
                got = module["rotary"].apply_rotary(*leaves, *operands[2:], unsqueeze, rotary_dim=width, **form)
                seeds = [numbers(*x.shape, dtype=dtype, seed=4) for x in got]
                results.append([*got, *torch.autograd.grad(got, leaves, seeds)])
            for place, (a, b) in enumerate(zip(*results, strict=True)):
                if place < 2 or not form["round_once"]:
                    assert torch.equal(a, b), (width, extra, dim, place)
                else:
                    unit = torch.finfo(dtype).eps
                    torch.testing.assert_close(a, b, rtol=4 * unit, atol=4 * unit * float(b.detach().abs().max()))
            if extra == 0:
                assert [x.stride() for x in results[0][:2]] == [x.stride() for x in operands[:2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [{}, {"interleaved": True}, {"paired": True}], ids=str)
def test_rotary_tables(
    triton: dict[str, ModuleType], pytorch: dict[str, ModuleType], layout: dict[str, bool], dtype: torch.dtype
) -> None:
    """Bit for bit on a GPU. The interpreter's cosine is NumPy's, which rounds otherwise than PyTorch's."""
    every = torch.arange(131073, device=DEVICE)[None]
    some = every[:, :3000].reshape(3, 1000)
    cases = (some[:, ::300], some[:1, :4].expand(3, -1).int(), some.t()[5:8], some[:, :0], every[:, 131072:])
    for pairs, positions in itertools.product((3, 16) if INTERPRETED else (1, 20, 64, 1500), (*cases, every[:, :77])):
        inv_freq = (1 / 10000 ** (torch.arange(2 * pairs, device=DEVICE) / pairs / 2)).to(dtype)[::2]
        assert triton["rotary"].tables.with_op(inv_freq, positions)
        assert not pytorch["rotary"].tables.with_op(inv_freq, positions)
        got, expected = (
            module["rotary"].rotary_tables(inv_freq, positions, 1.25, dtype, **layout) for module in (triton, pytorch)
        )
        for a, b in zip(got, expected, strict=True):
            assert a.dtype is dtype
            if INTERPRETED:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if dtype is torch.float32 else 2e-3)
            else:
                assert torch.equal(a, b), (pairs, tuple(positions.shape))
    if not INTERPRETED:
        got, expected = (
            module["rotary"].rotary_tables(inv_freq[:64], every, 1.25, dtype, **layout) for module in (triton, pytorch)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses(
    triton: dict[str, ModuleType], pytorch: dict[str, ModuleType], reduction: str, dtype: torch.dtype
) -> None:
    shapes = (
        ((5, 7), (3, 4, 700), (2, 9001)) if INTERPRETED else ((5, 7), (3, 4, 700), (300, 9001), (20, 128256), (4, 1))
    )
    for shape, smoothing, z_loss in itertools.product(shapes, (0.0, 0.1), (0.0, 1e-3)):
        logits = numbers(*shape, dtype=dtype, scale=5.0)
        labels = torch.randint(0, shape[-1], shape[:-1], device=DEVICE)
        labels.view(-1)[0] = -100
        logits.view(-1, shape[-1])[0, 0] = float("nan")
        if len(shape) == 3:
            logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
        assert triton["loss"].compiled.takes(logits, labels)
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "reduction": reduction}
        assert_as_near(triton["loss"], pytorch["loss"], "cross_entropy", [logits, labels], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_with_the_projection(
    triton: dict[str, ModuleType], pytorch: dict[str, ModuleType], dtype: torch.dtype
) -> None:
    """Of which the gradient is written over the logits."""
    hidden, weight = numbers(30, 16, dtype=dtype, scale=1.0), numbers(700, 16, dtype=dtype, scale=1.0, seed=1)
    labels = torch.randint(0, 700, (30,), device=DEVICE)
    labels[3] = -100
    for smoothing in (0.0, 0.1):
        got, expected = (
            everything(
                lambda h, w, m=module["loss"], s=smoothing: m.linear_cross_entropy(h, w, labels, label_smoothing=s),
                [hidden, weight],
            )
            for module in (triton, pytorch)
        )
        unit = torch.finfo(dtype).eps
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=8 * unit, atol=8 * unit * float(b.abs().max()))


def test_losses_of_what_is_not_finite_and_of_labels_that_are_no_class(
    triton: dict[str, ModuleType], pytorch: dict[str, ModuleType]
) -> None:
    logits, labels = numbers(4, 50), torch.tensor([1, 2, 3, 4], device=DEVICE)
    logits[0] = float("-inf")
    logits[1, 3] = float("inf")
    logits[2] = -3e38
    got, expected = (module["loss"].cross_entropy(logits, labels, reduction="none") for module in (triton, pytorch))
    torch.testing.assert_close(got, expected, equal_nan=True)
    leaf = numbers(3, 50).requires_grad_()
    found = triton["loss"].cross_entropy(leaf, torch.tensor([1, 50, -1], device=DEVICE), reduction="none")
    assert found.isnan().tolist() == [False, True, True]
    (grad,) = torch.autograd.grad(found.sum(), leaf)
    assert grad.isnan().any(1).tolist() == [False, True, True]


def steps(x: Tensor) -> list[int]:
    """The strides of dimensions that have any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def test_any_strides_and_empty_inputs(triton: dict[str, ModuleType]) -> None:
    norm, x = triton["norm"], numbers(4, 6, 96)
    weight = numbers(96, scale=1.0, seed=1)
    views = [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:, ::2],
        torch.cat([x[:, :, :1], x, x[:, :, :1]], 2)[:, :, 1:97],
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        x[:, :1].expand(4, 6, 96),
        x.repeat_interleave(2, dim=2)[:, :, ::2],
        x.flatten(0, 1)[1],
        x.new_empty(0, 96),
        x.new_empty(3, 0, 96),
    ]
    for function in (norm.rms_norm, norm.layer_norm):
        for view in views:
            dense = view.clone(memory_format=torch.contiguous_format)
            got, expected = (everything(function, [one, weight]) for one in (view, dense))
            as_usual = view * weight if function is norm.rms_norm else dense
            assert steps(got[0]) == steps(as_usual)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)


@on_gpu
def test_two_runs_give_the_same_bits(triton: dict[str, ModuleType]) -> None:
    for name in NORMS:
        for rows, width in ((20000, 128), (4096, 4096), (300, 40000)):
            operands = norm_operands(name, rows, width, torch.bfloat16)
            first, second = (everything(getattr(triton["norm"], name), operands) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), (name, width)


@on_gpu
def test_tensors_of_more_than_2_31_elements(triton: dict[str, ModuleType], needs_memory: Callable[[int], None]) -> None:
    rows, width = (1 << 31) // 4096 + 16, 4096
    needs_memory(6 * rows * width * 2)
    weight = numbers(width, dtype=torch.bfloat16)
    x = numbers(16, width, dtype=torch.bfloat16).repeat(rows // 16, 1).requires_grad_()
    out = triton["norm"].rms_norm(x, weight)
    assert torch.equal(out[-16:], out[:16])
    (grad,) = torch.autograd.grad(out, x, out.detach())
    assert torch.equal(grad[-16:], grad[:16])
    out = triton["activation"].silu_and_mul(x.detach(), x.detach())
    assert torch.equal(out[-16:], out[:16])


@on_gpu
def test_graphs_replay_forward_and_backward(triton: dict[str, ModuleType]) -> None:
    x, weight = numbers(300, 2048, dtype=torch.bfloat16).requires_grad_(), numbers(2048, dtype=torch.bfloat16)
    weight.requires_grad_()

    def step() -> list[Tensor]:
        out = triton["activation"].silu_and_mul(triton["norm"].rms_norm(x, weight))
        return [out, *torch.autograd.grad(out, [x, weight], torch.ones_like(out))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        x.mul_(0.5).add_(0.25)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


@on_gpu
def test_runs_on_the_current_stream(triton: dict[str, ModuleType]) -> None:
    x, weight = torch.zeros(2000, 4096, device="cuda"), numbers(4096)
    expected = triton["norm"].rms_norm(torch.ones_like(x), weight)
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        x.fill_(1)
        got = triton["norm"].rms_norm(x, weight)
        x.zero_()
    torch.cuda.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", [0, 1])
def test_runs_on_the_tensors_device_whichever_is_current(triton: dict[str, ModuleType], current: int) -> None:
    x, weight = numbers(50, 256).to("cuda:1"), numbers(256).to("cuda:1")
    with torch.cuda.device(current):
        out = triton["norm"].rms_norm(x, weight)
        assert torch.cuda.current_device() == current
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (256,), weight, 1e-6))
    with pytest.raises(RuntimeError, match="device"):
        triton["norm"].rms_norm(x, weight.to("cuda:0"))


def test_a_second_derivative_is_an_error(triton: dict[str, ModuleType]) -> None:
    x = numbers(3, 8).requires_grad_()
    for out in (
        triton["norm"].rms_norm(x, numbers(8)),
        triton["activation"].silu_and_mul(x, x),
        triton["loss"].cross_entropy(x, torch.tensor([1, 2, 3], device=DEVICE)),
    ):
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_transforms_and_other_dtypes_are_pytorchs(triton: dict[str, ModuleType]) -> None:
    norm, x, weight = triton["norm"], numbers(4, 32), numbers(32)
    assert not norm.compiled.takes(x.double(), weight.double())
    assert not norm.compiled.takes(x, weight.double())
    assert not norm.compiled.takes(x, weight[:31])
    torch.testing.assert_close(torch.func.vmap(norm.rms_norm, (0, None))(x, weight), norm.rms_norm(x, weight))
    with pytest.raises(RuntimeError):
        norm.rms_norm(x, weight[:31])


def ops(triton: dict[str, ModuleType]) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    x, y, w = numbers(2, 3, 40), numbers(2, 3, 40, seed=1), numbers(40)
    yield "norm", "rms_norm", (x.transpose(0, 1), w, 1e-6, 0)
    yield "norm", "rms_norm_backward", (y, None, x, w, 1e-6, 2, True)
    yield "norm", "add_rms_norm", (x, y, w, 1e-6, 1)
    yield "norm", "rms_norm_gated", (x, y, w, 1e-6, 0, 1)
    yield "norm", "rms_norm_gated_backward", (y, x, y, w, 1e-6, 2)
    yield "norm", "layer_norm", (x, w, None, 1e-5)
    yield "norm", "layer_norm_backward", (y, x, None, 1e-5, False, True)
    yield "activation", "apply", (x, 2)
    yield "activation", "apply_backward", (y, x, 2)
    yield "activation", "multiply", (x, y.transpose(0, 1).contiguous().transpose(0, 1), 0)
    yield "activation", "multiply_backward", (y, x, y, 1)
    yield "activation", "halves", (x, 0)
    yield "activation", "halves_backward", (y[..., :20].contiguous(), x, 0)
    yield "activation", "multiply_backward_result", (y, x, y, 0)
    yield "activation", "halves_backward_result", (y[..., :20].contiguous(), x, 1)
    q, k, table = numbers(2, 4, 3, 16), numbers(2, 3, 2, 16).transpose(1, 2), numbers(1, 3, 16)
    yield "rotary", "rotate", (q, k, table, table, 1, 16, 0)
    positions = torch.arange(6, device=DEVICE).reshape(2, 3)
    for layout in range(3):
        yield "rotary", "tables", (numbers(16), positions, 1.25, layout, layout)
    labels = torch.tensor([1, 2, 3, 4, 5, -100], device=DEVICE)
    logits, sums = numbers(6, 40), numbers(12).abs()
    yield "loss", "cross_entropy", (logits, labels, -100, 0.1, 0.0)
    yield "loss", "cross_entropy_backward", (numbers(6), logits, labels, sums, -100, 0.0, 0.0)
    yield "loss", "cross_entropy_gradient_", (logits, labels, numbers(6), -100, 0.0, 0.0)


@on_gpu
def test_ops_are_what_their_schemas_and_shapes_say(triton: dict[str, ModuleType]) -> None:
    failed = []
    for project, name, arguments in ops(triton):
        module = triton[project]
        assert module.compiled.triton_here.works("cuda", torch.cuda.current_device())
        try:
            torch.library.opcheck(getattr(module.compiled.ops, f"triton_{name}").default, arguments)
        except Exception as error:
            failed.append((name, str(error)[:200]))
    assert not failed


def functions(triton: dict[str, ModuleType]) -> Iterator[tuple[str, Callable[..., Any], Callable[[int], list[Tensor]]]]:
    """Each with its operands for so many rows."""
    weight, b = numbers(96, scale=1.0, dtype=torch.bfloat16, seed=5), torch.bfloat16
    norm, activation, rotary, loss = (triton[project] for project in PROJECTS)
    yield "rms_norm", lambda x: norm.rms_norm(x, weight), lambda n: [numbers(n, 96, dtype=b)]
    yield "layer_norm", lambda x: norm.layer_norm(x, weight, weight), lambda n: [numbers(n, 96, dtype=b)]
    yield (
        "add",
        lambda x, y: norm.add_rms_norm(x, y, weight)[0],
        lambda n: [numbers(n, 96, dtype=b, seed=i) for i in (0, 1)],
    )
    yield (
        "gated",
        lambda x, y: norm.rms_norm_gated(x, weight, y),
        lambda n: [numbers(n, 96, dtype=b, seed=i) for i in (0, 1)],
    )
    yield "silu", activation.silu_and_mul, lambda n: [numbers(n, 96, dtype=b)]
    yield "gelu", activation.gelu_tanh_and_mul, lambda n: [numbers(n, 96, dtype=b, seed=i) for i in (0, 1)]
    table = numbers(1, 6, 16, dtype=b)
    yield (
        "rotary",
        lambda q, k: rotary.apply_rotary(q, k, table, table)[0],
        lambda n: [numbers(n, 6, heads, 16, dtype=b).transpose(1, 2) for heads in (4, 2)],
    )
    labels = torch.tensor([0, 1, 2, 3] * 30, device=DEVICE)
    yield "loss", lambda x: loss.cross_entropy(x, labels[: len(x)]), lambda n: [numbers(n, 96, dtype=b)]


@on_gpu
def test_compiles_to_one_graph_with_the_op_in_it(triton: dict[str, ModuleType]) -> None:
    for (name, function, operands), grad in itertools.product(functions(triton), (False, True)):
        counter = CompileCounter()
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
        for rows in (5, 9):
            arguments = [x.requires_grad_(grad) for x in operands(rows)]
            assert torch.equal(compiled(*arguments), function(*arguments)), name
        assert counter.frame_count == 1, name


@on_gpu
def test_inductor_gives_the_same_forward_and_backward_for_any_rows(triton: dict[str, ModuleType]) -> None:
    for name, function, operands in functions(triton):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=True)
        for rows in (50, 23):
            results = [everything(one, operands(rows)) for one in (function, compiled)]
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(results[0][0], results[1][0]) or name == "loss", name


@on_gpu
def test_exports(triton: dict[str, ModuleType]) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(numbers(96))

        def forward(self, x: Tensor) -> Tensor:
            return triton["activation"].silu_and_mul(triton["norm"].rms_norm(x, self.weight))

    layer, rows = Layer(), torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(layer, (numbers(4, 96),), dynamic_shapes=({0: rows},), strict=True)
        assert "triton_rms_norm" in str(program.graph)
        more = numbers(9, 96)
        torch.testing.assert_close(program.module()(more), layer(more))


@on_gpu
def test_where_triton_does_not_compile_pytorch_runs_and_one_warning_says_so(pytorch: dict[str, ModuleType]) -> None:
    norm = load_noarch("norm", "_norm_with_a_broken_triton")

    def broken(device: torch.device) -> None:
        raise RuntimeError("no C compiler\nmore")

    importlib.import_module("_norm_with_a_broken_triton.triton_ops").probe = broken
    x, weight = numbers(4, 32), numbers(32)
    with pytest.warns(UserWarning, match=r"does not work on cuda:0 \(RuntimeError: no C compiler\)"):
        got = norm.rms_norm(x, weight)
    assert torch.equal(got, pytorch["norm"].rms_norm(x, weight))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm.rms_norm(x, weight)


@on_gpu
@pytest.mark.parametrize("project", PROJECTS)
def test_the_noarch_variants_of_the_hub_run_triton(project: str, tmp_path: Path) -> None:
    set_default_hub(Hub(settings=Settings(cache=tmp_path, offline=True, build="never")))
    try:
        kernel = kernelhub.get_kernel(f"kernelhub/{project}", version=1)
    finally:
        set_default_hub(None)
    assert not kernel.compiled.HERE
    assert kernel.compiled.triton_here.takes(numbers(2, 8))
