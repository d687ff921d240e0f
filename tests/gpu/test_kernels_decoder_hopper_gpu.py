"""The op for GPUs of compute capability 9.0: both first products of a gated MLP with theirs, against float64 and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_on_the_tensors_device_whichever_is_current(decoder: ModuleType) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
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


def test_it_compiles_in_one_graph_for_any_number_of_rows(decoder: ModuleType) -> None:
    torch.manual_seed(0)
    mlp = MLP(128, 256).to("cuda", torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: decoder.layers.GatedMLP.forward(mlp, x), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (300, 500, 513):
            x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), mlp(x), atol=2e-3, rtol=2e-2)


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
