"""The compiled ops of kernelhub/activation, on each level of instructions: against the models' own code and float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from transformers.activations import NewGELUActivation, QuickGELUActivation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = {"plain": 0, "avx2": 1, "avx512": 2}


def tanh_gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# By the number that the ops know it by: PyTorch's or the models' own code, and the formula.
FUNCTIONS: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    (F.silu, lambda x: x / (1 + torch.exp(-x))),
    (F.gelu, lambda x: x / 2 * torch.special.erfc(-x / math.sqrt(2))),
    (NewGELUActivation(), tanh_gelu),
    (QuickGELUActivation(), lambda x: x / (1 + torch.exp(-1.702 * x))),
]
SILU, GELU, GELU_TANH, QUICK = range(4)
PRODUCTS = {"silu_and_mul": SILU, "gelu_and_mul": GELU, "gelu_tanh_and_mul": GELU_TANH}
SINGLES = {"gelu_tanh": GELU_TANH, "gelu_new": GELU_TANH, "gelu_fast": GELU_TANH, "gelu_quick": QUICK}


@pytest.fixture(scope="session")
def activation(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("activation", request.config, "cpu")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, activation: ModuleType) -> Iterator[str]:
    """Each level that this processor has."""
    wanted = LEVELS[request.param]
    try:
        if activation.compiled.ops.use_level(wanted) != wanted:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        activation.compiled.ops.use_level(2)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def values(dtype: torch.dtype, shape: tuple[int, ...] = (64, 1024), scale: float = 3.0, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def all_values(dtype: torch.dtype) -> Tensor:
    """Every number that 16 bits can be."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, 1024)


def same(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    return got.dtype == expected.dtype and torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [SILU, QUICK])
def test_equals_pytorch_and_the_models_own_code_bit_for_bit(
    activation: ModuleType, level: str, function: int, dtype: torch.dtype
) -> None:
    ops, eager = activation.compiled, FUNCTIONS[function][0]
    everything = all_values(dtype) if dtype != torch.float32 else torch.linspace(-110, 110, 1 << 16).reshape(64, 1024)
    for x in (everything, values(dtype), values(dtype, scale=0.01), values(dtype, (32, 3001))):
        b = values(dtype, tuple(x.shape), seed=1)
        if level == "plain" and dtype == torch.float32:
            # Without fused multiply-adds e**x rounds otherwise than PyTorch's vectors do.
            torch.testing.assert_close(ops.apply(x, function), eager(x))
            continue
        assert same(ops.apply(x, function), eager(x))
        assert same(ops.multiply(x, b, function), eager(x) * b)
        assert same(ops.halves(torch.cat([x, b], -1), function), eager(x) * b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", range(4))
def test_is_at_most_twice_as_far_from_float64_as_the_models_own_code(
    activation: ModuleType, level: str, function: int, dtype: torch.dtype
) -> None:
    """The result and every gradient, alone and times another."""
    eager, formula = FUNCTIONS[function]
    for scale in (1e-3, 1.0, 10.0):
        operands = [values(dtype, (9, 1001), scale), values(dtype, (9, 1001), seed=1)]
        seed = values(dtype, (9, 1001), seed=2)
        ways = [
            (formula, lambda a, b: formula(a) * b, torch.float64),
            (eager, lambda a, b: eager(a) * b, dtype),
            (
                lambda a: activation.compiled.apply(a, function),
                lambda a, b: activation.compiled.multiply(a, b, function),
                dtype,
            ),
        ]
        results = []
        for single, product, computed_in in ways:
            a, b = (x.to(computed_in).requires_grad_() for x in operands)
            found = [single(a), product(a, b)]
            found += torch.autograd.grad(found[0], a, seed.to(computed_in))
            found += torch.autograd.grad(found[1], (a, b), seed.to(computed_in))
            results.append([x.detach().double() for x in found])
        for reference, expected, got in zip(*results, strict=True):
            # A unit of rounding of the largest value is allowed, for where the original happens to be exact.
            unit = torch.finfo(dtype).eps * float(reference.abs().max()) / 4
            allowed = 2 * float((expected - reference).abs().max()) + unit
            assert float((got - reference).abs().max()) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", range(4))
def test_zeros_tiny_huge_and_non_finite_values(
    activation: ModuleType, level: str, function: int, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor([0.0, -0.0, info.tiny, -info.tiny, info.eps, 80.0, -80.0, 120.0, -120.0], dtype=dtype)
    got, expected = activation.compiled.apply(x, function), FUNCTIONS[function][1](x.double())
    torch.testing.assert_close(got, expected.to(dtype), rtol=2 * info.eps, atol=1e-6)
    for value, limit in ((float("inf"), float("inf")), (float("nan"), float("nan")), (info.max, info.max)):
        got = activation.compiled.apply(torch.full((3,), value, dtype=dtype), function)
        torch.testing.assert_close(got, torch.full((3,), limit, dtype=dtype), equal_nan=True)
    # The derivative where its factors are very large and very small: gelu's third power is a float as long as they are.
    large = min(1e16, info.max) * torch.ones(20, dtype=dtype)
    for x, slope in ((large, 1.0), (-large, 0.0)):
        x.requires_grad_()
        (found,) = torch.autograd.grad(activation.compiled.apply(x, function).sum(), x)
        torch.testing.assert_close(found, torch.full_like(x, slope))


@pytest.mark.parametrize("name", [*PRODUCTS, *SINGLES])
def test_public_functions_use_the_ops(activation: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for op in ("_apply_now", "_multiply_now", "_halves_now"):
        original = getattr(activation.compiled, op)
        monkeypatch.setattr(
            activation.compiled, op, lambda *a, op=op, original=original: (called.append(op), original(*a))[1]
        )
    x = values(torch.float32, (8, 32))[::2]  # side by side they would go the way that test_kernels_direct.py tests
    function = getattr(activation, name)
    with torch.no_grad():
        function(x)
        if name in PRODUCTS:
            function(x, x)
    assert called == (["_halves_now", "_multiply_now"] if name in PRODUCTS else ["_apply_now"])


def views(x: Tensor) -> list[Tensor]:
    """x, (4, 6, 96), by other strides, and parts of it."""
    return [
        x.transpose(0, 1),
        x[:, ::2],
        x.repeat(1, 1, 3)[:, :, 96:192],
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        x[:, :1].expand(4, 6, 96),
        x.repeat_interleave(2, dim=2)[:, :, ::2],
        x[1, 2],
        torch.empty(0, 96),
        torch.empty(3, 0),
    ]


def steps(x: Tensor) -> list[int]:
    """The strides of dimensions that have any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("name", [*PRODUCTS, *SINGLES])
def test_any_strides_and_empty_inputs(activation: ModuleType, name: str) -> None:
    """The results lie in memory as those of PyTorch's operations do."""
    function = getattr(activation, name)
    calls = [function] if name in SINGLES else [function, lambda x: function(x, x.flip(0)), lambda x: function(x, x)]
    usual = [F.silu] if name in SINGLES else [F.glu, lambda x: F.silu(x) * x.flip(0), lambda x: F.silu(x) * x]
    for view in views(values(torch.float32, (4, 6, 96))):
        for call, as_usual in zip(calls, usual, strict=True):
            strided = view.detach().requires_grad_()
            dense = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            got, expected = call(strided), call(dense)
            assert torch.equal(got, expected)
            assert steps(got) == steps(as_usual(view))
            seed = torch.randn_like(expected)
            other = seed.mT.contiguous().mT if seed.dim() > 1 else seed
            first, second = torch.autograd.grad(got, strided, other), torch.autograd.grad(expected, dense, seed)
            assert torch.equal(first[0], second[0])


def test_compiled_the_results_lie_as_pytorchs(activation: ModuleType) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (activation.gelu_tanh(x), activation.silu_and_mul(x, x)), fullgraph=True)
    for x in (torch.randn(2, 7, 9, 5).to(memory_format=torch.channels_last), torch.randn(2, 8, 7).transpose(1, 2)):
        for got in compiled(x):
            assert got.stride() == x.stride()


def test_a_scalar_has_its_value(activation: ModuleType) -> None:
    x = torch.tensor(1.5)
    torch.testing.assert_close(activation.gelu_quick(x), QuickGELUActivation()(x))
    torch.testing.assert_close(activation.silu_and_mul(x, x), F.silu(x) * x)


@pytest.mark.parametrize("name", PRODUCTS)
def test_no_gradient_is_lost_and_expanded_ones_are_read_right(activation: ModuleType, name: str) -> None:
    function, eager = getattr(activation, name), FUNCTIONS[PRODUCTS[name]][1]
    operands = [values(torch.float32, (5, 32)), values(torch.float32, (5, 32), seed=1)]
    for position in range(2):
        found = []
        for call in (function, lambda a, b: eager(a) * b):
            leaves = [x.clone() for x in operands]
            leaves[position].requires_grad_()
            call(*leaves).sum().backward()
            found.append(leaves[position].grad)
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    x = operands[0].clone().requires_grad_()
    function(x).sum().backward()
    y = operands[0].clone().requires_grad_()
    (eager(y[:, :16]) * y[:, 16:]).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        assert not function(*operands).requires_grad


@pytest.mark.parametrize("name", [*PRODUCTS, *SINGLES])
def test_a_second_derivative_is_refused(activation: ModuleType, name: str) -> None:
    x = values(torch.float32, (3, 32)).requires_grad_()
    for loss in (getattr(activation, name)(x).square().sum(), getattr(activation, name)(x).sum()):
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        # A penalty on the gradient is part of a loss that has a derivative: what is missing would not be noticed.
        with pytest.raises(RuntimeError, match=r"second derivative.*unkernelize"):
            (first.square().sum() + x.sum()).backward()
        with pytest.raises(RuntimeError, match=r"second derivative.*unkernelize"):
            torch.autograd.grad(first.square().sum() + x.sum(), x)


def cases() -> dict[str, tuple]:
    x, y, z, half = (torch.randn(2, 3, n) for n in (40, 40, 40, 20))
    return {
        "apply": (x.transpose(0, 1), 2),
        "apply_backward": (y, x, 3),
        "multiply": (x, y, 0),
        "multiply_backward": (z, x, y, 1),
        "multiply_backward_result": (z, x.transpose(0, 1).contiguous().transpose(0, 1), y, 0),
        "halves": (x[:, ::2], 1),
        "halves_backward": (half, x, 2),
        "halves_backward_result": (half[:, ::2], x[:, ::2], 1),
    }


@pytest.mark.parametrize("op", cases())
def test_ops_are_what_their_schemas_and_shapes_say(activation: ModuleType, op: str) -> None:
    torch.library.opcheck(getattr(activation.compiled.ops, op).default, cases()[op])


def test_every_op_is_tested(activation: ModuleType) -> None:
    namespace = activation.compiled.ops.apply.default.namespace
    found = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")}
    assert found == {*cases(), "use_level"}


class Layer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", [*PRODUCTS, *SINGLES])
def test_compiles_to_one_graph_and_exports(activation: ModuleType, name: str, enabled: bool) -> None:
    module, counter = Layer(getattr(activation, name)), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    with torch.set_grad_enabled(enabled):
        for rows in (5, 9):
            x = values(torch.float32, (rows, 32)).requires_grad_(enabled)
            assert torch.equal(compiled(x), module(x))
    assert counter.frame_count == 1
    shapes = ({0: torch.export.Dim("rows", min=2, max=64)},)
    with torch.no_grad():
        for strict in (True, False):
            x = values(torch.float32, (6, 32))
            program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict)
            other = values(torch.float32, (9, 32))
            torch.testing.assert_close(program.module()(other), module(other))


def test_compiled_gradients_are_those_of_eager(activation: ModuleType) -> None:
    for name in ("silu_and_mul", "gelu_quick"):
        function = getattr(activation, name)
        torch._dynamo.reset()
        results = []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            x = values(torch.float32, (4, 32)).requires_grad_()
            call(x).square().sum().backward()
            results.append(x.grad)
        assert torch.equal(*results)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", [*PRODUCTS, *SINGLES])
def test_where_the_ops_have_no_rules_pytorch_computes(activation: ModuleType, name: str, enabled: bool) -> None:
    """vmap, gradients through it, forward mode with and without functorch: nothing is lost silently."""
    function = getattr(activation, name)
    eager = FUNCTIONS[{**PRODUCTS, **SINGLES}[name]][1]
    formula = (lambda x: eager(x[..., :16]) * x[..., 16:]) if name in PRODUCTS else eager
    x = values(torch.float32, (4, 3, 32))

    def several(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        assert dual is not None
        through = grad(lambda y: vmap(call)(y).square().sum())(x)
        return [vmap(call)(x), through, jvp(call, (x,), (torch.ones_like(x),))[1], dual]

    with torch.set_grad_enabled(enabled):
        for expected, got in zip(several(formula), several(function), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class Named(Tensor):
    """A subclass, which may keep more than its elements."""


def test_subclasses_other_dtypes_and_other_shapes_are_pytorchs(activation: ModuleType) -> None:
    x = values(torch.float32, (4, 32))
    takes = activation.compiled.takes
    assert takes(x)
    assert takes(x, x)
    assert not takes(x.double())
    assert not takes(x.as_subclass(Named))
    assert not takes(x, x.as_subclass(Named))
    assert not takes(x, x.half())
    assert not takes(x, x[:1])
    assert not takes(x, x.to("meta"))
    assert isinstance(activation.silu_and_mul(x.as_subclass(Named)), Named)


def errors() -> dict[str, Callable[[ModuleType], object]]:
    x = torch.randn(3, 32)
    return {
        "another shape": lambda ops: ops._multiply(x, x[:2], 0),
        "another dtype": lambda ops: ops._multiply(x, x.half(), 0),
        "expected 0 to 3": lambda ops: ops._apply(x, 4),
        "neither float32": lambda ops: ops._apply(x.double(), 0),
        "even last dimension": lambda ops: ops._halves(x[:, 1:], 0),
        "not one of the result": lambda ops: ops._halves_backward(x, x, 0),
    }


@pytest.mark.parametrize("message", errors())
def test_wrong_operands_are_errors(activation: ModuleType, message: str) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        errors()[message](activation.compiled)


def test_operands_on_two_devices_are_an_error(activation: ModuleType) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="device"):
        activation.silu_and_mul(torch.randn(3, 32), torch.randn(3, 32, device="meta"))
