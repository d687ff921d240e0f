"""The compiled op of kernelhub/decoder, on each level of instructions: against the modules apart and float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = {"plain": 0, "avx2": 1, "avx512": 2}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SiLUActivation": F.silu,
    "GELUTanh": lambda x: F.gelu(x, approximate="tanh"),
}
CAST_FIRST, CAST_LAST, ZERO_CENTERED = range(3)


@pytest.fixture(scope="session")
def decoder(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("decoder", request.config)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, decoder: ModuleType) -> Iterator[str]:
    """Each level that this processor has."""
    wanted = LEVELS[request.param]
    try:
        if decoder.compiled.ops.use_level(wanted) != wanted:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        decoder.compiled.ops.use_level(2)


def values(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def weights(decoder: ModuleType, hidden: int, between: int, dtype: torch.dtype, *, bias: bool = False) -> Any:
    found = [
        values(between, hidden, seed=1, scale=hidden**-0.5),
        values(between, seed=2) if bias else None,
        values(between, hidden, seed=3, scale=hidden**-0.5),
        values(between, seed=4) if bias else None,
        values(hidden, between, seed=5, scale=between**-0.5),
        values(hidden, seed=6) if bias else None,
    ]
    return decoder.plain.Weights(*(of if of is None else of.to(dtype) for of in found))


def apart(
    x: Tensor,
    of: Any,
    product: str = "SiLUActivation",
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    form: int = CAST_FIRST,
) -> Tensor:
    """As the modules compute it, each rounding to the dtype; in float64, the reference."""
    if residual is not None:
        x = residual = x + residual
    if norm is not None:
        wide = x if x.dtype == torch.float64 else x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        factor = norm.to(wide.dtype) + (1 if form == ZERO_CENTERED else 0)
        normal = normal.to(x.dtype) * norm if form == CAST_FIRST else (normal * factor).to(x.dtype)
        x = normal
    inner = FUNCTIONS[product](F.linear(x, of.gate, of.gate_bias)) * F.linear(x, of.up, of.up_bias)
    y = F.linear(inner, of.down, of.down_bias)
    return y if residual is None else residual + y


def doubled(of: Any) -> Any:
    return type(of)(*(part if part is None else part.double() for part in of))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "between", "rows"),
    # Tails of vectors, of outputs and of blocks; one tile, several, weights copied first, rows in two parts.
    [(256, 512, (1, 2, 3, 4)), (33, 70, (1, 5, 24)), (1030, 515, (1, 7, 31)), (48, 2000, (6, 70))],
)
def test_is_as_close_to_float64_as_the_modules_apart(
    decoder: ModuleType, level: str, hidden: int, between: int, rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    errors = {"apart": 0.0, "op": 0.0}
    for count, bias, product in itertools.product(rows, (False, True), FUNCTIONS):
        of = weights(decoder, hidden, between, dtype, bias=bias)
        x = values(count, hidden, seed=count).to(dtype)
        reference = apart(x.double(), doubled(of), product)
        got = decoder.compiled.gated_mlp(x, of, product)
        assert got.dtype == dtype
        for name, found in (("apart", apart(x, of, product)), ("op", got)):
            errors[name] += float((found - reference).square().sum())
    # In float32 it is mostly half as far, and with a row of few elements up to a tenth farther.
    assert errors["op"] ** 0.5 <= 1.1 * errors["apart"] ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_residual_are_those_of_the_modules(decoder: ModuleType, level: str, dtype: torch.dtype) -> None:
    of = weights(decoder, 300, 100, dtype)
    scale = torch.finfo(dtype).eps
    norm = (values(300, seed=7, scale=0.1) + 1).to(dtype)
    for form, with_residual in itertools.product((CAST_FIRST, CAST_LAST, ZERO_CENTERED), (False, True)):
        x = values(2, 3, 300, seed=8).to(dtype)
        around = {"residual": values(2, 3, 300, seed=9).to(dtype) if with_residual else None, "norm": norm, "form": form}
        expected = apart(x, of, eps=1e-3, **around)
        got = decoder.compiled.gated_mlp(x, of, "SiLUActivation", eps=1e-3, **around)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=4 * scale, atol=4 * scale * float(expected.abs().max()))
    # Added without a norm, too.
    got = decoder.compiled.gated_mlp(x, of, "SiLUActivation", residual=around["residual"])
    expected = apart(x, of, residual=around["residual"])
    torch.testing.assert_close(got, expected, rtol=4 * scale, atol=4 * scale * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_comes_out_the_same_whatever_rows_and_threads_there_are(
    decoder: ModuleType, level: str, dtype: torch.dtype
) -> None:
    of, x = weights(decoder, 530, 300, dtype), values(70, 530, seed=1).to(dtype)
    single = torch.cat([decoder.compiled.gated_mlp(row[None], of, "SiLUActivation") for row in x])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (2, 3, 4, 7, 24, 64, 70):
                assert torch.equal(decoder.compiled.gated_mlp(x[:rows], of, "SiLUActivation"), single[:rows])
    finally:
        torch.set_num_threads(threads)


def test_gate_and_up_in_one_weight(decoder: ModuleType) -> None:
    for bias in (False, True):
        of, x = weights(decoder, 40, 70, torch.float32, bias=bias), values(3, 40)
        both = torch.cat([of.gate, of.up])
        biases = torch.cat([of.gate_bias, of.up_bias]) if bias else None
        packed = decoder.plain.Weights(both, biases, None, None, of.down, of.down_bias)
        got = decoder.compiled.gated_mlp(x, packed, "SiLUActivation")
        assert torch.equal(got, decoder.compiled.gated_mlp(x, of, "SiLUActivation"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_no_rows_and_values_that_are_not_finite(decoder: ModuleType, level: str, dtype: torch.dtype) -> None:
    of = weights(decoder, 37, 45, dtype)
    run = decoder.compiled.gated_mlp
    x = values(37, 6, seed=3).to(dtype).t()
    assert torch.equal(run(x, of, "SiLUActivation"), run(x.contiguous(), of, "SiLUActivation"))
    assert run(x[:0], of, "SiLUActivation").shape == (0, 37)
    # Memory that held NaNs is used again: what lies behind the rows must not come into the sums.
    for _ in range(3):
        assert run(torch.full_like(x, float("nan")), of, "SiLUActivation").isnan().all()
        assert run(x, of, "SiLUActivation").isfinite().all()
    one = x.clone()
    one[2, 5] = float("inf")
    finite = run(one, of, "SiLUActivation").isfinite().all(-1)
    assert finite.tolist() == [True, True, False, True, True, True]


def test_operands_that_do_not_fit_are_errors(decoder: ModuleType) -> None:
    of, x = weights(decoder, 16, 24, torch.float32, bias=True), values(2, 16)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (of._replace(gate=of.gate[:, :8].contiguous()), {}, "the gate's weight is not of shape \\(24, 16\\)"),
        (of._replace(up=of.up[:8]), {}, "the up's weight is not of shape"),
        (of._replace(down=of.down.t().contiguous().t()), {}, "the down's weight is not contiguous"),
        (of._replace(up=of.up.double()), {}, "the up's weight has another dtype than the input"),
        (of._replace(gate_bias=of.gate_bias[:5]), {}, "the gate's bias is not of shape"),
        (of._replace(down=of.down[:8], down_bias=None), {"residual": x}, "as many outputs as inputs"),
        (of, {"residual": x[:1]}, "the residual has another shape than the input"),
        (of, {"norm": values(8)}, "the norm's weight is not of shape"),
        (of, {"form": 3}, "form is 3; expected 0, 1 or 2"),
    ]
    for others, options, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            decoder.compiled.gated_mlp(x, others, "SiLUActivation", **options)
    with pytest.raises(RuntimeError, match="neither float32 nor bfloat16 nor float16"):
        decoder.compiled.gated_mlp(x.double(), doubled(of), "SiLUActivation")


# Which calls it takes


@pytest.fixture
def calls(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the inputs that the op gets."""
    found: list[tuple[int, ...]] = []
    op = decoder.compiled._gated_mlp
    monkeypatch.setattr(decoder.compiled, "_gated_mlp", lambda x, *rest: (found.append(tuple(x.shape)), op(x, *rest))[1])
    monkeypatch.setattr(
        decoder.compiled, "_MOST_ROWS", {torch.float32: (16, 32), torch.bfloat16: (4, 4), torch.float16: (1 << 40,) * 2}
    )
    return found


class Case(NamedTuple):
    layer: nn.Module  # the kernel's
    model: nn.Module
    run: Callable[[nn.Module, Tensor], Tensor]


def cases(bias: bool = False) -> dict[str, Case]:
    """Modules with kernels' forwards, each with the same module as it was."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, mlp_bias=bias
    )
    layer = LlamaDecoderLayer(config, 0).eval()
    phi = Phi3MLP(Phi3Config(hidden_size=32, intermediate_size=48, pad_token_id=0)).eval()
    with torch.no_grad():
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(torch.rand(32) + 0.5)
    table = LlamaRotaryEmbedding(config)

    def whole(module: nn.Module, x: Tensor) -> Tensor:
        positions = table(x, torch.arange(x.shape[1])[None])
        return module(x, position_embeddings=positions)

    return {
        "GatedMLP": Case(layer.mlp, copy.deepcopy(layer.mlp), lambda module, x: module(x)),
        "PackedGatedMLP": Case(phi, copy.deepcopy(phi), lambda module, x: module(x)),
        "DecoderLayer": Case(layer, copy.deepcopy(layer), whole),
    }


@pytest.fixture(params=["GatedMLP", "PackedGatedMLP", "DecoderLayer"])
def case(request: pytest.FixtureRequest, decoder: ModuleType) -> Case:
    found = cases()[request.param]
    mark(found.layer)
    with use_kernel_mapping(default_mapping(), inherit_mapping=False):
        kernelize(found.layer, mode=Mode.INFERENCE)
    return found
