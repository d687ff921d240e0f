"""The ops for GPUs of compute capability 9.0, products with what becomes of them, against float64 and PyTorch's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]

DTYPES = (torch.bfloat16, torch.float16)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SiLUActivation": F.silu,
    "GELUTanh": lambda x: F.gelu(x, approximate="tanh"),
}
# Rows, depth, columns: whole tiles, tails of each, fewer steps than a tile is written in, more tiles than blocks.
SIZES = (
    (256, 64, 128),
    (257, 2048, 136),
    (1000, 200, 344),
    (513, 72, 1000),
    (300, 576, 8),
    (5000, 640, 2304),
    (1, 8, 8),
)


@pytest.fixture(scope="session")
def decoder(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("decoder", request.config)


def operands(rows: int, depth: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows)
    made = [torch.randn(n, depth, generator=generator, device="cuda") for n in (rows, columns, columns)]
    return made[0].to(dtype), *((2 * weight * depth**-0.5).to(dtype) for weight in made[1:])


def weights_of(decoder: ModuleType, gate: Tensor, up: Tensor | None) -> tuple[Tensor | None, ...]:
    return decoder.plain.Weights(gate, None, up, None, gate.t(), None)  # type: ignore[no-any-return]


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that an element that nothing writes is seen."""
    for size in (1 << 12, 1 << 18, 1 << 20, 1 << 24):
        kept = [torch.full((size,), float("nan"), device="cuda") for _ in range(4)]
        del kept


def distance(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", FUNCTIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_is_as_near_to_float64_as_the_products_apart(
    decoder: ModuleType, sizes: tuple[int, int, int], product: str, dtype: torch.dtype
) -> None:
    f = FUNCTIONS[product]
    x, gate, up = operands(*sizes, dtype)
    exact = f(x.double() @ gate.double().t()) * (x.double() @ up.double().t())
    apart = f(F.linear(x, gate)) * F.linear(x, up)
    poison()
    got = decoder.hopper.gated_product(x, weights_of(decoder, gate, up), product)
    assert got.dtype is dtype
    assert got.shape == apart.shape
    assert distance(got, exact) <= 1.02 * distance(apart, exact)
    poison()
    again, a, b = decoder.hopper.gated_product_parts(x, weights_of(decoder, gate, up), product)
    assert torch.equal(again, got)
    for part, weight in ((a, gate), (b, up)):
        exact_part = x.double() @ weight.double().t()
        assert distance(part, exact_part) <= 1.02 * distance(F.linear(x, weight), exact_part)


def test_halves_of_one_weight_are_the_two(decoder: ModuleType) -> None:
    x, gate, up = operands(300, 128, 264, torch.bfloat16)
    packed = torch.cat((gate, up))
    expected = decoder.hopper.gated_product(x, weights_of(decoder, gate, up), "SiLU")
    assert torch.equal(decoder.hopper.gated_product(x, weights_of(decoder, packed, None), "SiLU"), expected)


def test_leading_dimensions_strides_and_places(decoder: ModuleType) -> None:
    """Rows apart, columns apart, and memory that does not begin at a multiple of 16 bytes."""
    x, gate, up = operands(512, 128, 256, torch.bfloat16)
    weights = weights_of(decoder, gate, up)
    expected = decoder.hopper.gated_product(x, weights, "SiLU")
    assert torch.equal(decoder.hopper.gated_product(x.view(2, 4, 64, 128), weights, "SiLU").view(512, 256), expected)
    apart = torch.zeros(512, 200, device="cuda", dtype=x.dtype)[:, :128].copy_(x)
    assert torch.equal(decoder.hopper.gated_product(apart, weights, "SiLU"), expected)
    odd = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view_as(x).copy_(x)
    assert odd.data_ptr() % 16
    assert torch.equal(decoder.hopper.gated_product(odd, weights, "SiLU"), expected)
    turned = weights_of(decoder, gate.t().contiguous().t(), up)
    assert torch.equal(decoder.hopper.gated_product(x, turned, "SiLU"), expected)
    assert decoder.hopper.gated_product(x[:0], weights, "SiLU").shape == (0, 256)


def test_what_does_not_fit_is_said(decoder: ModuleType) -> None:
    x, gate, up = operands(256, 64, 128, torch.bfloat16)
    op = decoder.hopper.ops.gated_product
    for wrong in (
        (x.float(), gate.float(), up.float(), 0),
        (x, gate.half(), up, 0),
        (x, gate[:, :32], up, 0),
        (x, gate[:100], up, 0),
        (x, gate[:, :60], up[:, :60], 0),
        (x[:, :60], gate[:, :60], up[:, :60], 0),
        (x, gate, up, 1),
        (x, gate.cpu(), up, 0),
    ):
        with pytest.raises(RuntimeError, match="gated_product|expected"):
            op(*wrong)


def test_more_rows_than_its_numbers_hold_are_left_to_pytorch(decoder: ModuleType) -> None:
    most = 2**31 - 256
    x, gate, up = operands(1, 8, 8, torch.bfloat16)
    weights = weights_of(decoder, gate, up)
    assert decoder.hopper.takes(x.expand(most, 8), weights, "SiLU")
    assert not decoder.hopper.takes(x.expand(most + 1, 8), weights, "SiLU")
    with pytest.raises(RuntimeError, match=f"at most {most}"):
        decoder.hopper.ops.gated_product(x.expand(most + 1, 8), gate, up, 0)
    nothing = weights_of(decoder, gate[:, :0], up[:, :0])
    assert not decoder.hopper.takes(x[:, :0].expand(300, 0), nothing, "SiLU")


def test_runs_give_the_same_bits_and_graphs_can_hold_it(decoder: ModuleType) -> None:
    x, gate, up = operands(3000, 1024, 1536, torch.bfloat16)
    weights = weights_of(decoder, gate, up)
    first = decoder.hopper.gated_product(x, weights, "SiLU")
    assert all(torch.equal(decoder.hopper.gated_product(x, weights, "SiLU"), first) for _ in range(20))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        held = decoder.hopper.gated_product(x, weights, "SiLU")
    x.mul_(0.5)
    graph.replay()
    assert torch.equal(held, decoder.hopper.gated_product(x, weights, "SiLU"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_tensors_device_whichever_is_current(decoder: ModuleType) -> None:
    x, gate, up = operands(300, 128, 256, torch.bfloat16)
    expected = decoder.hopper.gated_product(x, weights_of(decoder, gate, up), "SiLU")
    there = [of.to("cuda:1") for of in (x, gate, up)]
    got = decoder.hopper.gated_product(there[0], weights_of(decoder, *there[1:]), "SiLU")
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.to("cuda:0"), expected)


class Seen(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().rpartition("::")[2])
        return func(*args, **(kwargs or {}))


class MLP(nn.Module):
    def __init__(self, hidden: int, features: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, features, bias=bias)
        self.up_proj = nn.Linear(hidden, features, bias=bias)
        self.down_proj = nn.Linear(features, hidden, bias=bias)
        self.act_fn = SiLUActivation()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SiLUActivation(nn.SiLU):
    """Of the name that transformers' has."""


def run(decoder: ModuleType, mlp: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    with Seen() as seen:
        made = decoder.layers.GatedMLP.forward(mlp, x)
    return made, seen.names


@pytest.mark.parametrize("training", [False, True])
def test_gated_mlps_of_many_rows_run_it(decoder: ModuleType, training: bool) -> None:
    torch.manual_seed(0)
    mlp = MLP(128, 256).to("cuda", torch.bfloat16)
    x = torch.randn(2, 300, 128, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    with torch.set_grad_enabled(training):
        expected = mlp(x)
        got, names = run(decoder, mlp, x)
    assert ("gated_product_parts" if training else "gated_product") in names
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-2)
    if training:
        grad = torch.randn_like(got)
        wanted = torch.autograd.grad(expected, (x, *mlp.parameters()), grad)
        for one, other in zip(torch.autograd.grad(got, (x, *mlp.parameters()), grad), wanted, strict=True):
            assert distance(one, other.double()) <= 0.01


def test_others_run_as_before(decoder: ModuleType) -> None:
    for mlp, rows in (
        (MLP(128, 256).to("cuda", torch.bfloat16), 255),
        (MLP(128, 256).cuda(), 300),
        (MLP(128, 256, bias=True).to("cuda", torch.bfloat16), 300),
        (MLP(100, 256).to("cuda", torch.bfloat16), 300),
    ):
        weight = mlp.gate_proj.weight
        x = torch.randn(rows, weight.shape[1], device="cuda", dtype=weight.dtype)
        with torch.no_grad():
            _, names = run(decoder, mlp, x)
        assert not any(name.startswith("gated_product") for name in names)


class Targets:
    """A backend of torch.compile that runs what it is given, and keeps the names of the ops in it."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        for part in graph.modules():
            if isinstance(part, torch.fx.GraphModule):
                targets = [str(node.target).removesuffix(".default") for node in part.graph.nodes]
                self.names |= {target.rpartition(".")[2] for target in targets}
        return graph.forward


@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_in_one_graph_for_any_number_of_rows(decoder: ModuleType, training: bool) -> None:
    torch.manual_seed(0)
    mlp = MLP(128, 256).to("cuda", torch.bfloat16)
    forward = functools.partial(decoder.layers.GatedMLP.forward, mlp)
    targets = Targets()
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    seen = torch.compile(forward, fullgraph=True, dynamic=True, backend=targets)
    with torch.set_grad_enabled(training):
        for rows in (300, 500, 513):
            x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
            expected = mlp(x)
            for way in (compiled, seen):
                torch.testing.assert_close(way(x), expected, atol=2e-3, rtol=2e-2)
    assert ("gated_product_parts" if training else "gated_product") in targets.names
    assert targets.graphs == 1


def test_exported_programs_take_any_number_of_rows(decoder: ModuleType) -> None:
    torch.manual_seed(0)
    mlp = MLP(128, 256).to("cuda", torch.bfloat16)

    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            return decoder.layers.GatedMLP.forward(self.mlp, x)

    x = torch.randn(300, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        program = torch.export.export(Kernel(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
        for rows in (2, 300, 513):
            torch.testing.assert_close(
                program(x[:1].expand(rows, -1)), mlp(x[:1].expand(rows, -1)), atol=2e-3, rtol=2e-2
            )


# Batches, tokens, hidden, heads of q, of k and v, elements of a head: whole tiles, tails of rows, of columns and of depth, a
# tile of several results' heads, fewer steps than a tile is written in, more tiles than blocks.
ATTENTIONS = (
    (1, 256, 64, 4, 4, 64),
    (2, 1000, 2048, 32, 8, 64),
    (1, 77, 72, 3, 1, 64),
    (3, 333, 200, 5, 2, 128),
    (1, 1500, 640, 3, 1, 256),
    (4, 1111, 576, 14, 2, 64),
    (1, 1, 8, 1, 1, 64),
)


class Attention(NamedTuple):
    x: Tensor
    projections: Any
    cos: Tensor
    sin: Tensor
    head_dim: int


def attention(
    decoder: ModuleType, sizes: tuple[int, ...], dtype: torch.dtype, bias: bool = False, tables: int = 1
) -> Attention:
    batches, tokens, hidden, of_q, of_k, head_dim = sizes
    generator = torch.Generator("cuda").manual_seed(tokens)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    parts: list[Tensor | None] = []
    for heads in (of_q, of_k, of_k):
        parts.append((2 * hidden**-0.5 * numbers(heads * head_dim, hidden)).to(dtype))
        parts.append(numbers(heads * head_dim).to(dtype) if bias else None)
    # no table of a model has halves that differ, but the formula takes both
    cos, sin = numbers(tables, tokens, head_dim).to(dtype), numbers(tables, tokens, head_dim).to(dtype)
    x = numbers(batches, tokens, hidden).to(dtype)
    return Attention(x, decoder.plain.Projections(*parts, parts[0].t(), None), cos, sin, head_dim)


def turned(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    heads = x.unflatten(-1, (-1, head_dim))
    first, second = heads.chunk(2, -1)
    return (heads * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)).flatten(-2)


def products(of: Attention, dtype: torch.dtype) -> list[Tensor]:
    x = of.x.to(dtype)
    parts = [None if part is None else part.to(dtype) for part in of.projections[:6]]
    return [F.linear(x, weight, bias) for weight, bias in zip(parts[::2], parts[1::2], strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "tables"), [(False, False), (True, True)], ids=["plain", "bias-and-tables"])
@pytest.mark.parametrize("sizes", ATTENTIONS, ids=str)
def test_projections_are_turned_as_pytorch_turns_them(
    decoder: ModuleType, sizes: tuple[int, ...], bias: bool, tables: bool, dtype: torch.dtype
) -> None:
    of = attention(decoder, sizes, dtype, bias, sizes[0] if tables else 1)
    poison()
    q, k, v = decoder.hopper.rotary_projections(*of)
    # The bits of the products with what PyTorch does after them: turned by numbers that change nothing, then by it.
    nothing = torch.ones_like(of.cos), torch.zeros_like(of.sin)
    poison()
    plain = decoder.hopper.rotary_projections(of.x, of.projections, *nothing, of.head_dim)
    assert torch.equal(v, plain[2])
    for got, product in zip((q, k), plain, strict=False):
        assert torch.equal(got, turned(product, of.cos, of.sin, of.head_dim))
    for got, apart, exact in zip(plain, products(of, dtype), products(of, torch.float64), strict=True):
        assert got.dtype is dtype
        assert got.shape == apart.shape
        assert got.is_contiguous()
        assert distance(got, exact) <= 1.02 * distance(apart, exact)


def test_projections_of_any_strides_and_places(decoder: ModuleType) -> None:
    of = attention(decoder, (2, 150, 128, 4, 2, 64), torch.bfloat16, bias=True, tables=2)
    expected = decoder.hopper.rotary_projections(*of)

    def apart(x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], x.shape[-1] + 1, device="cuda", dtype=x.dtype)[..., 1:].copy_(x)

    moved = of._replace(
        x=apart(of.x),
        projections=of.projections._replace(
            **{n: apart(getattr(of.projections, n)) for n in ("q", "q_bias", "k", "v")}
        ),
        cos=apart(of.cos),
        sin=of.sin.transpose(1, 2).contiguous().transpose(1, 2),
    )
    for got, want in zip(decoder.hopper.rotary_projections(*moved), expected, strict=True):
        assert torch.equal(got, want)
    flat = of.x.flatten(0, 1)
    for got, want in zip(decoder.hopper.rotary_projections(flat, *of[1:]), expected, strict=True):
        assert torch.equal(got, want.flatten(0, 1))
    none = of._replace(x=of.x[:0], cos=of.cos[:1], sin=of.sin[:1])
    assert [made.shape for made in decoder.hopper.rotary_projections(*none)] == [
        (0, 150, 256),
        (0, 150, 128),
        (0, 150, 128),
    ]


# Rows, depth, columns: as SIZES, with a row of tiles that is not full and columns of which a tile has few.
SUMS = (
    (256, 64, 256),
    (257, 2048, 136),
    (1000, 200, 344),
    (513, 72, 1000),
    (300, 576, 8),
    (5000, 640, 2304),
    (1, 8, 8),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SUMS, ids=str)
def test_a_sum_is_rounded_once(decoder: ModuleType, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, _ = operands(*sizes, dtype)
    residual = torch.randn(sizes[0], sizes[2], device="cuda").to(dtype)
    before = residual.clone()
    exact = residual.double() + x.double() @ weight.double().t()
    poison()
    got = decoder.hopper.add_product(x, weight, residual)
    assert got.dtype is dtype
    assert torch.equal(residual, before)
    # Half of the distance of two numbers of the dtype, and of a sum in float32.
    precision = torch.finfo(dtype).eps / 2 + 1e-4 * torch.finfo(dtype).eps
    slack = 1e-5 * (x.abs().double() @ weight.abs().double().t() + residual.abs())
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(((got.double() - exact).abs() <= precision * exact.abs() + slack + smallest).all())
    assert distance(got, exact) <= 1.02 * distance(torch.addmm(residual, x, weight.t()), exact)


def test_sums_of_any_strides_and_places(decoder: ModuleType) -> None:
    x, weight, _ = operands(512, 128, 264, torch.bfloat16)
    residual = torch.randn(512, 264, device="cuda").bfloat16()
    expected = decoder.hopper.add_product(x, weight, residual)
    assert torch.equal(
        decoder.hopper.add_product(x.view(2, 4, 64, 128), weight, residual.view(2, 4, 64, 264)).view(512, 264), expected
    )
    apart = [
        torch.zeros(*of.shape[:-1], of.shape[-1] + 3, device="cuda").bfloat16()[:, 3:].copy_(of) for of in (x, weight)
    ]
    turned_round = residual.t().contiguous().t()
    assert torch.equal(decoder.hopper.add_product(*apart, turned_round), expected)
    assert torch.equal(decoder.hopper.add_product(x[:1].expand(512, 128), weight, residual)[0], expected[0])
    assert decoder.hopper.add_product(x[:0], weight, residual[:0]).shape == (0, 264)


# Rows, depth, features, columns: fewer tiles than pairs of blocks, tails of each, few steps of either kind, and tiles of the second
# kind that wait for others'.
MLPS = (
    (256, 64, 128, 64),
    (257, 2048, 136, 72),
    (1000, 200, 344, 520),
    (300, 576, 8, 8),
    (5000, 640, 2304, 640),
    (8192, 512, 1024, 512),
    (9000, 64, 72, 2048),
    (4352, 1800, 1024, 512),
    (1, 8, 8, 8),
)


def mlp_operands(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, depth, features, columns = sizes
    down, residual = (torch.randn(n, m, device="cuda").to(dtype) for n, m in ((columns, features), (rows, columns)))
    return *operands(rows, depth, features, dtype), down, residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [0, 2])
@pytest.mark.parametrize("sizes", MLPS, ids=str)
def test_an_mlp_in_one_launch_has_the_bits_of_its_parts(
    decoder: ModuleType, sizes: tuple[int, int, int, int], function: int, dtype: torch.dtype
) -> None:
    x, gate, up, down, residual = mlp_operands(sizes, dtype)
    ops = decoder.hopper.ops
    inner, a, b = ops.gated_product_parts(x, gate, up, function)
    expected = ops.add_product(inner, down, residual)
    for _ in range(3):
        poison()
        assert torch.equal(ops.added_mlp(x, gate, up, down, residual, function), expected)
        poison()
        parts = ops.added_mlp_parts(x, gate, up, down, residual, function)
        assert all(torch.equal(*pair) for pair in zip(parts, (expected, a, b), strict=True))


def test_mlps_of_two_streams_do_not_wait_for_each_other_forever(decoder: ModuleType) -> None:
    """Each waits for blocks of its own; where some of both were at work, neither would end."""
    of = mlp_operands((8192, 512, 1024, 512), torch.bfloat16)
    op = decoder.hopper.ops.added_mlp
    expected = op(*of, 0)
    torch.cuda.synchronize()
    streams, made = [torch.cuda.Stream() for _ in range(3)], []
    for _ in range(30):
        for stream in streams:
            with torch.cuda.stream(stream):
                made.append(op(*of, 0))
    torch.cuda.synchronize()
    assert all(torch.equal(one, expected) for one in made)


def test_mlps_of_any_strides_and_places(decoder: ModuleType) -> None:
    x, gate, up, down, residual = mlp_operands((512, 128, 256, 264), torch.bfloat16)
    op = decoder.hopper.ops.added_mlp
    expected = op(x, gate, up, down, residual, 0)
    apart = [
        torch.zeros(*of.shape[:-1], of.shape[-1] + 3, device="cuda").bfloat16()[:, 3:].copy_(of)
        for of in (x, gate, up, down)
    ]
    assert torch.equal(op(*apart, residual.t().contiguous().t(), 0), expected)
    shaped = op(x.view(2, 4, 64, 128), gate, up, down, residual.view(2, 4, 64, 264), 0)
    assert torch.equal(shaped.view(512, 264), expected)
    assert op(x[:0], gate, up, down, residual[:0], 0).shape == (0, 264)
    packed = decoder.plain.Weights(torch.cat((gate, up)), None, None, None, down, None)
    assert torch.equal(decoder.hopper.added_mlp(x, packed, residual, "SiLU"), expected)


# Rows, depth, columns, as those of sums; and more steps than what follows a tile has parts.
GRADIENTS = (
    (256, 2048, 256),
    (300, 2056, 264),
    (1000, 200, 1000),
    (257, 64, 8),
    (1, 8, 8),
    (513, 4096, 520),
    (5000, 640, 2304),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", FUNCTIONS)
@pytest.mark.parametrize("sizes", GRADIENTS, ids=str)
def test_gradients_are_as_near_to_float64_as_a_product_and_its_function(
    decoder: ModuleType, sizes: tuple[int, int, int], product: str, dtype: torch.dtype
) -> None:
    grad, weight, a, b = factors(*sizes, dtype)
    # Where powers of e are no floats; gelu's third power is one.
    least = (-6e4, -3e4) if dtype is torch.float16 else (-3e38, -1e30) if product == "SiLUActivation" else (-1e16, -1e9)
    a[0, :8] = torch.tensor([1e-3, 20, -20, 80, -80, -200, *least], device="cuda")
    wide = grad.double() @ weight.double()
    leaves = [of.double().requires_grad_() for of in (a, b)]
    made = FUNCTIONS[product](leaves[0]) * leaves[1]
    exact = (*torch.autograd.grad(made, leaves, wide), made.detach())
    function = decoder.gated._GRADIENTS[decoder.gated.PRODUCTS[product]]
    apart = function.backward(grad.mm(weight), a, b, result=True)
    poison()
    got = decoder.hopper.gated_gradients(grad, weight, a, b, product, True)
    for one, other, reference in zip(got, apart, exact, strict=True):
        assert one.dtype is dtype
        assert bool(one.isfinite().all())
        assert distance(one, reference) <= 1.02 * distance(other, reference)
        unit = torch.finfo(dtype).eps * float(reference.abs().max())
        assert (
            float((one.double() - reference).abs().max()) <= 2 * float((other.double() - reference).abs().max()) + unit
        )
    poison()
    *without, none = decoder.hopper.gated_gradients(grad, weight, a, b, product, False)
    assert none is None
    assert all(torch.equal(one, other) for one, other in zip(without, got[:2], strict=True))


def factors(rows: int, depth: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A gradient, (rows, depth), a weight, (depth, columns), and the factors of its product, (rows, columns)."""
    generator = torch.Generator("cuda").manual_seed(rows)
    sizes = ((rows, depth), (depth, columns), (rows, columns), (rows, columns))
    grad, weight, a, b = (torch.randn(size, generator=generator, device="cuda") for size in sizes)
    return grad.to(dtype), (2 * weight * depth**-0.5).to(dtype), a.to(dtype), b.to(dtype)


def test_gradients_of_any_strides_and_places(decoder: ModuleType) -> None:
    operand = factors(512, 128, 264, torch.bfloat16)
    op = decoder.hopper.ops.gated_gradients
    expected = op(*operand, 0, True)
    grad, weight, a, b = operand
    shaped = op(grad.view(2, 256, 128), weight, a.view(2, 256, 264), b.view(2, 256, 264), 0, True)
    assert all(one.shape == (2, 256, 264) for one in shaped)
    apart = [torch.zeros(*of.shape[:-1], of.shape[-1] + 3, device="cuda").bfloat16()[:, 3:].copy_(of) for of in operand]
    turned = [of.t().contiguous().t() for of in operand]
    for got in (shaped, op(*apart, 0, True), op(*turned, 0, True)):
        assert all(torch.equal(one.view(512, 264), other) for one, other in zip(got, expected, strict=True))
    assert [of.shape for of in op(grad[:0], weight, a[:0], b[:0], 0, False)] == [(0, 264), (0, 264), (0,)]


@pytest.mark.parametrize("product", FUNCTIONS)
def test_gated_mlps_of_very_many_rows_have_their_gradients_by_it(decoder: ModuleType, product: str) -> None:
    torch.manual_seed(0)
    mlp = MLP(2048, 512).to("cuda", torch.bfloat16)
    rows, a_round = (
        256 * 6 * decoder.hopper._pairs(0),
        128 * decoder.hopper._pairs(0),
    )  # two tiles across: twelve rounds
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mlp.act_fn = ACT2FN[{"SiLUActivation": "silu", "GELUTanh": "gelu_pytorch_tanh"}[product]]
    expected = mlp(x)
    grad = torch.randn_like(expected)
    for less, seen in ((0, True), (a_round, False)):
        with Seen() as names:
            got = decoder.layers.GatedMLP.forward(mlp, x[less:])
            found = torch.autograd.grad(got, (x, *mlp.parameters()), grad[less:])
        assert ("gated_gradients" in names.names) is seen
        wanted = torch.autograd.grad(expected[less:], (x, *mlp.parameters()), grad[less:], retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            assert distance(one, other.double()) <= 0.01


def test_operands_that_do_not_fit_are_said(decoder: ModuleType) -> None:
    x, q, _ = operands(256, 64, 128, torch.bfloat16)
    bias, table = q[:, 0].contiguous(), torch.randn(1, 256, 64, device="cuda").bfloat16()
    op = decoder.hopper.ops.rotary_projections
    right = (x, q, None, q, bias, q, None, table, table, 64)
    assert len(op(*right)) == 3
    for place, wrong in (
        (0, x.cpu()),
        (0, x.float()),
        (0, x[:, :60]),
        (0, x[:255]),
        (1, q[:100]),
        (3, q[:, :56]),
        (5, q.half()),
        (4, bias[:64]),
        (4, bias.float()),
        (7, table[:, :, :32]),
        (7, table[:, :128]),
        (8, table.float()),
        (8, table[0]),
        (8, table.cpu()),
        (9, 32),
        (9, 128),
    ):
        with pytest.raises(RuntimeError, match="rotary_projections"):
            op(*(wrong if at == place else of for at, of in enumerate(right)))
    op = decoder.hopper.ops.add_product
    residual = torch.randn(256, 128, device="cuda").bfloat16()
    for wrong in (
        (x.float(), q.float(), residual.float()),
        (x, q, residual[:, :64]),
        (x, q, residual[:255]),
        (x, q, residual[None]),
        (x, q, residual.half()),
        (x, q[:100], residual[:, :100]),
        (x, q[:, :32], residual),
        (x, q, residual.cpu()),
    ):
        with pytest.raises(RuntimeError, match="add_product"):
            op(*wrong)
    x, gate, up, down, residual = mlp_operands((256, 64, 128, 72), torch.bfloat16)
    for op in (decoder.hopper.ops.added_mlp, decoder.hopper.ops.added_mlp_parts):
        for wrong in (
            (x.float(), gate.float(), up.float(), down.float(), residual.float(), 0),
            (x, gate, up[:64], down, residual, 0),
            (x, gate, up, down[:, :64], residual, 0),
            (x, gate, up, down[:70], residual[:, :70], 0),
            (x, gate, up, down.half(), residual, 0),
            (x, gate, up, down, residual[:, :64], 0),
            (x, gate, up, down, residual[:255], 0),
            (x, gate, up, down, residual.cpu(), 0),
            (x, gate, up, down, residual, 1),
        ):
            with pytest.raises(RuntimeError, match="added_mlp"):
                op(*wrong)
    op, (grad, weight, a, b) = decoder.hopper.ops.gated_gradients, factors(256, 64, 128, torch.bfloat16)
    for wrong in (
        (grad.float(), weight.float(), a.float(), b.float(), 0),
        (grad, weight[:32], a, b, 0),
        (grad[:, :60], weight[:60], a, b, 0),
        (grad, weight[:, :100], a[:, :100], b[:, :100], 0),
        (grad, weight[:, :0], a[:, :0], b[:, :0], 0),
        (grad, weight, a[:255], b, 0),
        (grad, weight, a, b[:, :64], 0),
        (grad, weight, a, b.half(), 0),
        (grad, weight, a.cpu(), b, 0),
        (grad, weight.half(), a, b, 0),
        (grad, weight, a, b, 1),
    ):
        with pytest.raises(RuntimeError, match="gated_gradients"):
            op(*wrong, True)


def calls(decoder: ModuleType) -> list[tuple[Tensor, Callable[[], tuple[Tensor, ...]]]]:
    """The ops by operands that are taken, each with one that may be changed."""
    of = attention(decoder, (4, 2048, 512, 16, 4, 64), torch.bfloat16, bias=True)
    x, weight, _ = operands(8192, 512, 1024, torch.bfloat16)
    residual = torch.randn(8192, 1024, device="cuda").bfloat16()
    assert decoder.hopper.takes_projections(*of)
    assert decoder.hopper.takes_add(x, weight, residual)
    parts = factors(256 * 6 * decoder.hopper._pairs(0), 2048, 512, torch.bfloat16)
    assert decoder.hopper.takes_gradients(*parts, "SiLU")
    mlp = mlp_operands((8192, 512, 1024, 512), torch.bfloat16)
    return [
        (of.x, lambda: decoder.hopper.rotary_projections(*of)),
        (residual, lambda: (decoder.hopper.add_product(x, weight, residual),)),
        (parts[0], lambda: decoder.hopper.gated_gradients(*parts, "SiLU", True)),
        (mlp[0], lambda: decoder.hopper.ops.added_mlp_parts(*mlp, 0)),
    ]


def test_all_give_the_same_bits_and_graphs_can_hold_them(decoder: ModuleType) -> None:
    for operand, call in calls(decoder):
        first = call()
        for _ in range(20):
            assert all(torch.equal(one, other) for one, other in zip(call(), first, strict=True))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            held = call()
        operand.mul_(0.5)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(held, call(), strict=True))


def test_they_run_on_the_current_stream(decoder: ModuleType) -> None:
    for operand, call in calls(decoder):
        expected = call()
        kept = operand.clone()
        operand.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            operand.copy_(kept)
            got = call()
        stream.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_they_run_on_the_tensors_device(decoder: ModuleType) -> None:
    of = attention(decoder, (1, 300, 128, 4, 2, 64), torch.bfloat16)
    x, weight, _ = operands(300, 128, 256, torch.bfloat16)
    parts = factors(300, 128, 256, torch.bfloat16)
    mlp = mlp_operands((300, 128, 256, 128), torch.bfloat16)
    expected = (
        *decoder.hopper.rotary_projections(*of),
        decoder.hopper.add_product(x, weight, of.x[0] @ weight.t()),
        *decoder.hopper.gated_gradients(*parts, "SiLU", True),
        decoder.hopper.ops.added_mlp(*mlp, 0),
    )
    moved = [None if part is None else part.to("cuda:1") for part in of.projections]
    projections = decoder.plain.Projections(*moved)
    there = [part.to("cuda:1") for part in (of.x, of.cos, of.sin, x, weight)]
    got = (
        *decoder.hopper.rotary_projections(there[0], projections, *there[1:3], 64),
        decoder.hopper.add_product(*there[3:], there[0][0] @ there[4].t()),
        *decoder.hopper.gated_gradients(*(part.to("cuda:1") for part in parts), "SiLU", True),
        decoder.hopper.ops.added_mlp(*(part.to("cuda:1") for part in mlp), 0),
    )
    for one, other in zip(got, expected, strict=True):
        assert one.device == torch.device("cuda:1")
        torch.testing.assert_close(one.to("cuda:0"), other, atol=1e-2, rtol=1e-2)


def test_what_is_taken(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = decoder.hopper
    of = attention(decoder, (4, 2048, 512, 16, 4, 64), torch.bfloat16)
    assert hopper.takes_projections(*of)
    for wrong in (
        of._replace(x=of.x[:, :, :508]),
        of._replace(x=of.x[:1], cos=of.cos[:, :250], sin=of.sin[:, :250]),
        of._replace(cos=of.cos.float(), sin=of.sin.float()),
        of._replace(cos=of.cos[0], sin=of.sin[0]),
        of._replace(cos=of.cos.cpu(), sin=of.sin.cpu()),
        of._replace(head_dim=32),
        of._replace(head_dim=128),
        of._replace(projections=of.projections._replace(v=of.projections.v[:200])),
        of._replace(projections=of.projections._replace(k=of.projections.k.half())),
    ):
        assert not hopper.takes_projections(*wrong)
    x, weight, _ = operands(8192, 512, 1024, torch.bfloat16)
    residual = torch.randn(8192, 1024, device="cuda").bfloat16()
    assert hopper.takes_add(x, weight, residual)
    for wrong in (
        (x[:250], weight, residual[:250]),
        (x, weight, residual[:1]),
        (x, weight, residual.float()),
        (x, weight.half(), residual),
        (x[:, :508], weight[:, :508], residual),
        (x.cpu(), weight, residual),
    ):
        assert not hopper.takes_add(*wrong)
    parts, less = (
        factors(256 * 6 * hopper._pairs(0), 2048, 512, torch.bfloat16),
        256 * hopper._pairs(0),
    )  # of 12 rounds, 2
    grad, weight, a, b = parts
    assert hopper.takes_gradients(*parts, "SiLU")
    for wrong in (
        (grad[less:], weight, a[less:], b[less:], "SiLU"),
        (grad[:, :1024], weight[:1024], a, b, "SiLU"),
        (grad, weight.half(), a, b, "SiLU"),
        (grad, weight, a.half(), b, "SiLU"),
        (grad, weight, a, None, "SiLU"),
        (grad, weight, a, b, "GELUActivation"),
        (grad.cpu(), weight, a, b, "SiLU"),
    ):
        assert not hopper.takes_gradients(*wrong)
    monkeypatch.setattr(hopper, "_pairs", lambda _: 66)  # as an H200 has
    x, gate, up, down, residual = mlp_operands((8192, 2048, 8192, 2048), torch.bfloat16)
    weights = weights_of(decoder, gate, up)._replace(down=down)
    assert hopper.takes_added_mlp(x, weights, residual, "SiLU")
    assert hopper.takes_added_mlp(x.view(2, -1, 2048), weights, residual.view(2, -1, 2048), "SiLU")
    for wrong in (
        (x[:4096], weights, residual[:4096], "SiLU"),
        (x, weights._replace(down_bias=down[:, 0].contiguous()), residual, "SiLU"),
        (x, weights._replace(down=down[:2044]), residual[:, :2044], "SiLU"),
        (x, weights, residual[:1], "SiLU"),
        (x, weights, residual.half(), "SiLU"),
        (x, weights, residual.as_subclass(type("Own", (Tensor,), {})), "SiLU"),
        (x, weights, residual.cpu(), "SiLU"),
        (x, weights, residual, "GELUActivation"),
    ):
        assert not hopper.takes_added_mlp(*wrong)
    monkeypatch.undo()
    x, weight, _ = operands(8192, 512, 1024, torch.bfloat16)
    residual = torch.randn(8192, 1024, device="cuda").bfloat16()
    with torch.autocast("cuda", torch.float16):
        assert not hopper.takes_add(x, weight, residual)
        assert not hopper.takes_projections(*of)
    full = hopper._pairs(0)
    # a round of tiles of 256 x 256, of which one is left: it is full, and with one tile more half of the next is not
    assert hopper._fills(256, [256] * full, 0, one=100, several=100)
    assert not hopper._fills(512, [256] * (full + 1), 0, one=10, several=90)
    assert not hopper._fills(255, [256] * full, 0, one=100, several=100)
    assert hopper._fills(256 * 100, [256] * full, 0, one=100, several=100)


def test_both_compile_in_one_graph_for_any_number_of_rows(decoder: ModuleType) -> None:
    of = attention(decoder, (4, 2048, 512, 16, 4, 64), torch.bfloat16, bias=True)
    _, weight, _ = operands(1, 512, 1024, torch.bfloat16)

    def both(x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        hopper = decoder.hopper
        assert hopper.takes_projections(x, of.projections, cos, sin, of.head_dim)
        assert hopper.takes_add(x, weight, residual)
        made = hopper.rotary_projections(x, of.projections, cos, sin, of.head_dim)
        return *made, hopper.add_product(x, weight, residual)

    targets = Targets()
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    seen = torch.compile(both, fullgraph=True, dynamic=True, backend=targets)
    with torch.no_grad():
        for batches, tokens in ((4, 2048), (5, 1600), (3, 2700)):
            x, residual = (torch.randn(batches, tokens, n, device="cuda").bfloat16() for n in (512, 1024))
            tables = [torch.randn(1, tokens, of.head_dim, device="cuda").bfloat16() for _ in range(2)]
            expected = both(x, residual, *tables)
            for way in (compiled, seen):
                assert all(torch.equal(*pair) for pair in zip(way(x, residual, *tables), expected, strict=True))
    assert {"rotary_projections", "add_product"} <= targets.names
    assert targets.graphs == 1


def layers(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, nn.Module]:
    """A model's decoder layer, and the same with the kernels' forwards."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, head_dim=64)
    config._attn_implementation = "sdpa"
    original = LlamaDecoderLayer(config, 0).to("cuda", torch.bfloat16)
    layer = copy.deepcopy(original)
    for name, kernel in (("", "DecoderLayer"), ("self_attn", "RotaryAttention"), ("mlp", "GatedMLP")):
        part = layer.get_submodule(name)
        part.forward = MethodType(getattr(decoder.layers, kernel).forward, part)
        monkeypatch.setattr(type(part), "kernel_layer_name", kernel, raising=False)
    monkeypatch.setattr(type(layer.input_layernorm), "kernel_layer_name", "RMSNorm", raising=False)
    return original, layer


def positions(tokens: int) -> tuple[Tensor, Tensor]:
    """cos and sin for heads of 64."""
    angles = torch.arange(tokens, device="cuda")[None, :, None] / 100 ** (torch.arange(64, device="cuda") % 32 / 32)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def test_a_decoder_layer_of_many_rows_has_them_all(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    original, layer = layers(decoder, monkeypatch)
    x = torch.randn(4, 2048, 512, device="cuda").bfloat16()
    with torch.no_grad():
        expected = original(x, position_embeddings=positions(2048))
        with Seen() as seen:
            got = layer(x, position_embeddings=positions(2048))
    assert distance(got, expected.double()) <= 0.01
    found = ["rotary_projections", "add_product", "gated_product", "add_product"]
    assert [name for name in seen.names if name in {*found, "addmm", "addmm_", "mm"}] == found
    monkeypatch.setattr(decoder.hopper, "_saves", lambda *_: True)
    with torch.no_grad(), Seen() as seen:
        assert torch.equal(layer(x, position_embeddings=positions(2048)), got)
    found = ["rotary_projections", "add_product", "added_mlp"]
    assert [name for name in seen.names if name in {*found, "gated_product", "addmm", "addmm_", "mm"}] == found


@pytest.mark.parametrize("as_one", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_decoder_layer_has_them_all(
    decoder: ModuleType, monkeypatch: pytest.MonkeyPatch, training: bool, as_one: bool
) -> None:
    monkeypatch.setattr(decoder.hopper, "_saves", lambda *_: as_one)
    original, layer = (module.train(training) for module in layers(decoder, monkeypatch))
    targets = Targets()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=targets)
    with torch.set_grad_enabled(training):
        for batches, tokens in ((4, 2048), (5, 1600)):
            x = torch.randn(batches, tokens, 512, device="cuda").bfloat16().requires_grad_(training)
            expected, got = (of(x, position_embeddings=positions(tokens)) for of in (original, compiled))
            assert distance(got.detach(), expected.detach().double()) <= 0.01
            if training:
                grad = torch.randn_like(got)
                leaves = [(x, *of.parameters()) for of in (original, layer)]
                wanted, found = (
                    torch.autograd.grad(made, of, grad) for made, of in zip((expected, got), leaves, strict=True)
                )
                for one, other in zip(found, wanted, strict=True):
                    assert distance(one, other.double()) <= 0.02
    first = ("added_mlp" if as_one else "gated_product") + "_parts" * training
    assert {first, "rotary_projections", "add_product"} <= targets.names
    assert targets.graphs == 1
