"""The compiled op of kernelhub/decoder, on each level of instructions: against the modules apart and float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import wraps
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import vmap
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from kernelhub import Mode, kernel_report, kernelize, use_kernel_mapping
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.integrations.transformers import default_mapping, mark
from kernelhub.settings import Settings

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = {"plain": 0, "avx2": 1, "avx512": 2}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SiLUActivation": F.silu,
    "GELUTanh": lambda x: F.gelu(x, approximate="tanh"),
}
CAST_FIRST, CAST_LAST, ZERO_CENTERED = range(3)


@pytest.fixture(scope="session")
def decoder(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("decoder", request.config, "cpu")


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
    [(256, 300, (1, 2, 3, 4)), (33, 70, (1, 5, 24)), (1030, 130, (1, 7, 24)), (48, 1100, (6, 70))],
)
def test_is_as_close_to_float64_as_the_modules_apart(
    decoder: ModuleType, level: str, hidden: int, between: int, rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    errors = {"apart": 0.0, "op": 0.0}
    for count, (bias, product) in itertools.product(rows, zip((False, True), FUNCTIONS, strict=True)):
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
        around = {
            "residual": values(2, 3, 300, seed=9).to(dtype) if with_residual else None,
            "norm": norm,
            "form": form,
        }
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
    assert run(torch.full_like(x, float("nan")), of, "SiLUActivation").isnan().all()
    # Memory that held NaNs is used again: what lies behind the rows must not come into the sums. So much is asked for.
    few, floats = x[:2].contiguous(), 2 * 4 * 1536
    for _ in range(3):
        torch.full((floats,), float("nan"))
        assert run(few, of, "SiLUActivation").isfinite().all()
    one = x.clone()
    one[2, 5] = float("inf")
    finite = run(one, of, "SiLUActivation").isfinite().all(-1)
    assert finite.tolist() == [True, True, False, True, True, True]
    bias = few[0]  # all that comes of rows without elements
    nothing = of._replace(gate=of.gate[:, :0], up=of.up[:, :0], down_bias=bias)
    assert torch.equal(run(x[:, :0], nothing, "SiLUActivation"), bias.expand(6, 37))


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
    monkeypatch.setattr(
        decoder.compiled, "_gated_mlp", lambda x, *rest: (found.append(tuple(x.shape)), op(x, *rest))[1]
    )
    monkeypatch.setattr(
        decoder.compiled, "_MOST_ROWS", {torch.float32: (16, 32), torch.bfloat16: (4, 4), torch.float16: (1 << 40,) * 2}
    )
    return found


class Case(NamedTuple):
    layer: nn.Module  # the kernel's
    model: nn.Module
    run: Callable[[nn.Module, Tensor], Tensor]


def cases() -> dict[str, Case]:
    """Modules with kernels' forwards, each with the same module as it was."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        attn_implementation="sdpa",
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
    set_default_hub(Hub(settings=Settings(cache=request.config.cache.mkdir("kernels"), offline=True, build="always")))
    try:
        with use_kernel_mapping(default_mapping(), inherit_mapping=False):
            kernelize(found.layer, mode=Mode.INFERENCE)
    finally:
        set_default_hub(None)
    assert request.param in {row.layer for row in kernel_report(found.layer).kernels}
    return found


@torch.no_grad()
def test_layers_have_few_rows_computed_by_the_op(case: Case, calls: list[tuple[int, ...]]) -> None:
    for dtype, rows, taken in ((torch.float32, 3, True), (torch.float32, 17, False), (torch.bfloat16, 2, True)):
        x = values(1, rows, 32).to(dtype)
        calls.clear()
        got, expected = case.run(case.layer.to(dtype), x), case.run(case.model.to(dtype), x)
        assert calls == ([(1, rows, 32)] if taken else [])
        scale = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=scale, atol=scale)


@torch.no_grad()
@pytest.mark.parametrize("formula", ["RMSNorm", "RMSNormCastLast", "RMSNormZeroCentered", "RMSNormWeightDtype"])
def test_a_norm_and_the_mlp_after_it_are_one_call(
    decoder: ModuleType, calls: list[tuple[int, ...]], formula: str
) -> None:
    of, x, norm = weights(decoder, 32, 48, torch.float16), values(2, 5, 32).half(), values(32, seed=9).half()
    functions = decoder.functions
    got = functions.rms_norm_gated_mlp(x, norm, 1e-5, of, formula)
    assert calls == [(2, 5, 32)]
    n = functions.FORMULAS[formula](x, norm, 1e-5)
    torch.testing.assert_close(got, apart(n, of), rtol=4e-3, atol=4e-3)


def test_with_gradients_it_is_not_called(case: Case, calls: list[tuple[int, ...]]) -> None:
    x = values(1, 3, 32)
    torch.testing.assert_close(case.run(case.layer, x), case.run(case.model, x))
    assert calls == []
    with torch.inference_mode():
        case.run(case.layer, x)
    assert calls == [(1, 3, 32)]


@torch.no_grad()
def test_parts_that_are_listened_to_are_called(case: Case, calls: list[tuple[int, ...]]) -> None:
    x, heard = values(1, 3, 32), []
    mlp = getattr(case.layer, "mlp", case.layer)
    expected = case.run(case.model, x)
    with mlp.down_proj.register_forward_hook(lambda *_: heard.append("down")):
        torch.testing.assert_close(case.run(case.layer, x), expected)
    assert (heard, calls) == (["down"], [])
    case.run(case.layer, x)
    assert (heard, calls) == (["down"], [(1, 3, 32)])


@torch.no_grad()
@pytest.mark.parametrize("case", ["GatedMLP"], indirect=True)
def test_compiles_in_one_graph_for_any_number_of_rows(case: Case, calls: list[tuple[int, ...]]) -> None:
    counter = CompileCounter()
    compiled = torch.compile(case.layer, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 30, 4):
        x = values(1, rows, 32)
        torch.testing.assert_close(case.run(compiled, x), case.run(case.model, x))
    assert calls == []
    assert counter.frame_count == 1


def watching(function: Any) -> Any:
    """As a kernel's forward is wrapped that is watched; all that are have the same code."""

    @wraps(function)
    def watch(self: nn.Module, x: Tensor) -> Tensor:
        return function(self, x)

    vars(watch)["watches"] = function
    return watch


def test_compiled_programs_look_at_parts_too(decoder: ModuleType) -> None:
    plain, parts = decoder.plain, nn.ModuleDict({name: nn.Linear(4, 4) for name in ("gate", "up", "down")})
    part, x = parts["down"], torch.zeros(2, 4)

    def kernel(self: nn.Module, x: Tensor) -> Tensor:
        return x

    known = plain.forwards(kernel)

    def looked(x: Tensor) -> Tensor:
        weights = plain.linears(parts, "gate", "up", "down")
        return x + (0 if weights is None else 1) + (10 if plain.runs(part, known) else 0)

    def weighed(x: Tensor) -> Tensor:
        return x + (0 if plain.linears(parts, "gate", "up", "down") is None else 1)

    def said(compiled: Any) -> float:
        assert torch.equal(compiled(x), looked(x))
        return float(looked(x)[0, 0])

    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        torch._dynamo.reset()
        with getattr(part, register)(lambda *_: None):
            assert said(torch.compile(looked, backend="eager", fullgraph=True)) == 0
    torch._dynamo.reset()
    compiled = torch.compile(weighed, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x + 1)
    for forward in (MethodType(kernel, part), lambda x: x, parts["up"].forward):
        part.forward = forward
        assert torch.equal(compiled(x), x)
        del part.forward
        assert torch.equal(compiled(x), x + 1)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(looked, backend="eager", fullgraph=True)
        assert said(compiled) == 11
        with part.register_forward_hook(lambda *_: None):
            assert said(compiled) == 0
    torch._dynamo.reset()
    compiled = torch.compile(looked, backend="eager", fullgraph=True)
    assert said(compiled) == 11
    part.forward = MethodType(lambda self, x: x, part)
    assert said(compiled) == 0
    part.forward = parts["up"].forward
    assert said(compiled) == 0
    del part.forward
    assert said(compiled) == 11
    part.forward = MethodType(kernel, part)
    assert said(compiled) == 10
    part.forward = MethodType(lambda self, x: x, part)
    assert said(compiled) == 0
    for function, expected in ((kernel, 10), (lambda self, x: x, 0), (kernel, 10)):
        part.forward = MethodType(watching(function), part)
        assert said(compiled) == expected
    torch._dynamo.reset()  # whom a method is bound to, programs of torch 2.11 do not look at again
    part.forward = MethodType(kernel, parts["up"])
    assert said(compiled) == 0
    del part.forward
    part.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Marked))
    assert said(compiled) == 11
    parts["down"] = nn.Identity()
    assert said(compiled) == 10
    torch._dynamo.reset()


def test_compiled_programs_look_at_a_class_where_nothing_stands_before_it(
    decoder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Part(nn.Module):
        kernel_layer_name = "GatedMLP"

        def forward(self, x: Tensor) -> Tensor:
            return x

    plain, part, x = decoder.plain, Part(), torch.zeros(2, 4)
    none, marks = plain.forwards(), plain.marks("DecoderLayer", "GatedMLP")

    def looked(x: Tensor) -> Tensor:
        return x + (1 if plain.mark_of(part, marks) == "GatedMLP" and plain.runs(part, none) else 0)

    torch._dynamo.reset()
    compiled = torch.compile(looked, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x + 1)
    monkeypatch.setattr(Part, "forward", lambda self, x: x)
    monkeypatch.setattr(
        Part, "kernel_condition", staticmethod(lambda module: False), raising=False
    )  # not looked at by itself
    assert torch.equal(looked(x), x)
    assert torch.equal(compiled(x), x)
    torch._dynamo.reset()


def test_compiled_programs_look_at_the_class_of_a_tensor(decoder: ModuleType) -> None:
    plain, x = decoder.plain, torch.zeros(2, 4)
    weight = nn.Parameter(torch.zeros(4, 4))

    def looked(x: Tensor, weight: Tensor) -> Tensor:
        return x + (1 if plain.takes(x, plain.Weights(weight, None, None, None, weight, None)) else 0)

    torch._dynamo.reset()
    compiled = torch.compile(looked, backend="eager")
    for of in (weight, weight.detach().as_subclass(Marked), weight.detach()):
        assert torch.equal(compiled(x, of), looked(x, of))
    torch._dynamo.reset()


class Marked(Tensor):
    pass


def test_what_it_takes(decoder: ModuleType, calls: list[tuple[int, ...]]) -> None:
    del calls  # its limits
    of, x, silu = weights(decoder, 32, 48, torch.float32, bias=True), values(2, 32), "SiLUActivation"
    takes = decoder.compiled.takes
    with torch.no_grad():
        assert takes(x, of, silu)
        assert takes(x, of, "GELUTanh", values(32), x)
        assert not takes(x, of, "GELUActivation")
        assert not takes(x, of, None)
        assert not takes(values(17, 32), of, silu)
        large = decoder.plain.Weights(torch.empty(1024, 1024), None, None, None, torch.empty(32, 512), None)
        assert takes(values(32, 1024), large, silu)
        assert not takes(values(33, 1024), large, silu)
        assert not takes(x, of._replace(down=of.down.t().contiguous().t()), silu)
        assert not takes(x, of._replace(gate=of.gate.t().contiguous().t()), silu)
        assert not takes(x, of._replace(up=of.up.t().contiguous().t()), silu)
        for bias in ("gate_bias", "up_bias", "down_bias"):
            assert not takes(x, of._replace(**{bias: getattr(of, bias).repeat_interleave(2)[::2]}), silu)
        assert not takes(x, of._replace(up=of.up.bfloat16()), silu)
        assert not takes(x.double(), doubled(of), silu)
        assert not takes(x, of, silu, values(32).bfloat16())
        assert not takes(x, of, silu, values(32), x[:1])
        assert not takes(x.as_subclass(Marked), of, silu)
        assert not takes(x, of._replace(gate=of.gate.as_subclass(Marked)), silu)
        assert not takes(torch.empty(2, 32, device="meta"), of, silu)
        with torch.autocast("cpu", torch.bfloat16):
            assert not takes(x, of, silu)
        with forward_ad.dual_level():
            assert not takes(x, of, silu)
        found: list[bool] = []

        def look(row: Tensor) -> Tensor:
            found.append(takes(row[None], of, silu))
            return row

        vmap(look)(x)
        assert found == [False]
        assert torch.compile(lambda x: x + takes(x, of, silu), backend="eager", fullgraph=True)(x).equal(x)
    assert not takes(x, of, silu)


def test_without_wide_vectors_or_an_op_nothing_is_taken(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = decoder.compiled
    monkeypatch.setattr(compiled, "_multiplies", lambda dtype: dtype == "bf16")
    assert compiled._most_rows()[torch.bfloat16] == (4, 4)
    assert compiled._most_rows()[torch.float16][0] > 1 << 40
    monkeypatch.setattr(compiled, "HERE", False)
    assert compiled._most_rows() == {}
    assert not compiled.may_take(values(1, 8))
