"""The compiled op of kernelhub/rotary, on each level of instructions: against the models' own code and float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.esm import modeling_esm as esm
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.nanochat import modeling_nanochat as nanochat
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.phi3 import modeling_phi3 as phi3

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = {"plain": 0, "avx2": 1, "avx512": 2}
WIDTHS = (2, 6, 16, 40, 64, 80, 96, 128, 256)

Turn = Callable[..., tuple[Tensor, Tensor]]


def neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """GPT-J's, with a cosine for each element."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + gptj.rotate_every_two(q) * sin, k * cos + gptj.rotate_every_two(k) * sin


# The models' own code, and the options that say the same.
FORMS: dict[str, tuple[Turn, dict[str, bool]]] = {
    "llama": (llama.apply_rotary_pos_emb, {}),
    "esm": (esm.apply_rotary_pos_emb, {"round_once": True}),
    "nanochat": (nanochat.apply_rotary_pos_emb, {"inverse": True}),
    "gptj": (neighbours, {"interleaved": True}),
    "cohere": (cohere.apply_rotary_pos_emb, {"interleaved": True, "round_once": True}),
}


@pytest.fixture(scope="session")
def rotary(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("rotary", request.config, "cpu")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, rotary: ModuleType) -> Iterator[str]:
    """Each level that this processor has."""
    wanted = LEVELS[request.param]
    try:
        if rotary.compiled.ops.use_level(wanted) != wanted:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        rotary.compiled.ops.use_level(2)


def operands(
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    tables: torch.dtype | None = None,
    scale: float = 1.0,
    tokens: int = 5,
) -> list[Tensor]:
    """q, k, cos and sin as a model makes them; the tables' halves differ, as nothing says that they are alike."""
    generator = torch.Generator().manual_seed(width)
    q = torch.randn(2, tokens, 4, width, generator=generator).mul(scale).to(dtype).transpose(1, 2)
    k = torch.randn(2, tokens, 2, width, generator=generator).mul(scale).to(dtype).transpose(1, 2)
    angles = torch.randn(2, tokens, width, generator=generator) * 3
    return [q, k, angles.cos().to(tables or dtype), angles.sin().to(tables or dtype)]


def takes(rotary: ModuleType, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int = 1, once: bool = False) -> bool:
    return rotary.compiled.takes(q, k, cos, sin, dim, cos.shape[-1], once)


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Bit for bit, but for which NaN it is and the sign of zeros."""
    return all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_models_own_code_bit_for_bit(rotary: ModuleType, level: str, form: str, dtype: torch.dtype) -> None:
    """needs 7: numerics drift."""
    original, options = FORMS[form]
    once = options.get("round_once", False)
    for width, tables in itertools.product(WIDTHS, {dtype, torch.float32} if once else {dtype}):
        arguments = operands(width, dtype, tables)
        before = [argument.clone() for argument in arguments]
        assert takes(rotary, *arguments, once=once)
        got, expected = rotary.apply_rotary(*arguments, **options), original(*arguments)
        assert same(got, expected), (width, tables)
        assert [one.stride() for one in got] == [one.stride() for one in arguments[:2]]
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True)), "an input was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["llama", "nanochat", "gptj"])
def test_gradients_equal_the_models_own_bit_for_bit(
    rotary: ModuleType, level: str, form: str, dtype: torch.dtype
) -> None:
    original, options = FORMS[form]
    for width in (6, 80, 128):
        *inputs, cos, sin = operands(width, dtype)
        seeds = [torch.randn(x.shape).to(dtype) for x in inputs]
        results = []
        for function in (original, lambda *a: rotary.apply_rotary(*a, **options)):
            leaves = [x.detach().requires_grad_() for x in inputs]
            results.append(torch.autograd.grad(function(*leaves, cos, sin), leaves, seeds))
        assert same(results[1], results[0]), width


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_is_at_most_twice_as_far_from_float64_as_the_models_own_code(
    rotary: ModuleType, level: str, form: str, dtype: torch.dtype
) -> None:
    """The results and the gradients, over inputs of several scales."""
    original, options = FORMS[form]
    for width, scale in ((40, 1e-3), (64, 1.0), (128, 50.0)):
        arguments = operands(width, dtype, scale=scale)
        seeds = [torch.randn(x.shape).to(dtype) for x in arguments[:2]]
        results = []
        for function, wide in ((in_float64(form), True), (original, False), (rotary.apply_rotary, False)):
            cast = [(x.double() if wide else x).detach() for x in arguments]
            leaves = [x.requires_grad_() for x in cast[:2]]
            out = function(*cast, **(options if function is rotary.apply_rotary else {}))
            results.append([*out, *torch.autograd.grad(out, leaves, [seed.to(x.dtype) for seed, x in zip(seeds, out)])])  # noqa: B905
        for reference, eager, got in zip(*results, strict=True):
            assert reference.dtype == torch.float64
            assert error(got, reference) <= 2 * error(eager, reference), (width, scale)


def error(got: Tensor, reference: Tensor) -> float:
    return float((got.detach().double() - reference.detach()).abs().max())


def in_float64(form: str) -> Turn:
    """The formula as a matrix, 2 x 2 for each pair."""

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[-1] // 2
        return (x[..., ::2], x[..., 1::2]) if form in ("gptj", "cohere") else (x[..., :half], x[..., half:])

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        sign = -1 if form == "nanochat" else 1
        (a, b), (c, d), (s, t) = pairs(x), pairs(cos[:, None]), pairs(sin[:, None])
        first, second = a * c - sign * b * s, b * d + sign * a * t
        if form in ("gptj", "cohere"):
            return torch.stack((first, second), -1).flatten(-2)
        return torch.cat((first, second), -1)

    return lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_zeros_tiny_huge_and_non_finite_values(rotary: ModuleType, level: str, form: str, dtype: torch.dtype) -> None:
    original, options = FORMS[form]
    arguments = operands(80, dtype)
    for x in arguments[:2]:
        x[0, 0] = 0
        x[0, 1] *= torch.finfo(dtype).tiny
        x[1, 0, 0] = torch.finfo(dtype).max
        x[1, 0, 1, 3] = float("inf")
        x[1, 0, 2, 79] = float("-inf")
        x[1, 1, 3, 0] = float("nan")
    assert same(rotary.apply_rotary(*arguments, **options), original(*arguments))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_part_of_a_head_and_tables_of_pairs(
    rotary: ModuleType, level: str, dtype: torch.dtype, interleaved: bool
) -> None:
    for width, rotary_dim in ((96, 24), (128, 64), (20, 6), (64, 64), (8, 0)):
        q, k, cos, sin = operands(width, dtype)
        cos, sin = cos[..., : rotary_dim // 2].contiguous(), sin[..., : rotary_dim // 2]
        whole = [x.repeat_interleave(2, -1) if interleaved else torch.cat((x, x), -1) for x in (cos, sin)]
        if interleaved:
            turned = neighbours(q[..., :rotary_dim], k[..., :rotary_dim], *whole)
            passed = q[..., rotary_dim:], k[..., rotary_dim:]
            expected = tuple(torch.cat(parts, -1) for parts in zip(turned, passed, strict=True))
        else:
            expected = phi3.apply_rotary_pos_emb(q, k, *whole)
        assert takes(rotary, q, k, *whole)
        assert same(rotary.apply_rotary(q, k, *whole, interleaved=interleaved), expected)
        for inverse in (False, True):
            full = rotary.apply_rotary(q, k, *whole, interleaved=interleaved, inverse=inverse)
            options = {"interleaved": interleaved, "inverse": inverse, "rotary_dim": rotary_dim}
            assert rotary.compiled.takes(q, k, cos, sin, 1, rotary_dim, False)
            leaves = [x.detach().requires_grad_() for x in (q, k)]
            half = rotary.apply_rotary(*leaves, cos, sin, **options)
            assert same(half, full)
            seeds = [torch.randn(x.shape).to(dtype) for x in half]
            gradients = torch.autograd.grad(half, leaves, seeds)
            back = rotary.apply_rotary(*seeds, cos, sin, **{**options, "inverse": not inverse})
            assert same(gradients, back), "the transposed of a rotation is its inverse"


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_of_two_widths_and_one_batch_of_tables(rotary: ModuleType, interleaved: bool) -> None:
    q, _, cos, sin = operands(64)
    k = operands(96)[1]
    cos, sin = cos[:1], sin[:1]
    assert takes(rotary, q, k, cos, sin)
    got = rotary.apply_rotary(q, k, cos, sin, interleaved=interleaved)
    for x, y in zip((q, k), got, strict=True):
        both = rotary.apply_rotary(x, x, cos.expand(2, -1, -1), sin.expand(2, -1, -1), interleaved=interleaved)
        assert same((y, y), both)


def layouts(x: Tensor) -> list[Tensor]:
    """x, (2, tokens, heads, width), by other strides."""
    width = x.shape[3]
    return [
        x.contiguous(),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.repeat(1, 1, 1, 3)[..., width : 2 * width],
        x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        x[:1].expand(x.shape),
        x[:, :, :1].expand(x.shape),
        x.repeat_interleave(2, dim=3)[..., ::2],
        x.repeat_interleave(2, dim=1)[:, ::2],
    ]


@pytest.mark.parametrize("dim", [1, 2, -2, -3])
def test_any_strides_with_heads_before_and_behind_tokens(rotary: ModuleType, dim: int) -> None:
    q, k, cos, sin = operands(48)
    tables = list(zip(layouts(cos[:, :, None]), layouts(sin[:, :, None]), strict=True))
    for (a, b), (c, s) in itertools.product(
        zip(layouts(q.transpose(1, 2)), layouts(k.transpose(1, 2)), strict=True), tables
    ):
        arguments = [x.transpose(1, 2) if dim in (1, -3) else x for x in (a, b)]
        leaves = [x.detach().requires_grad_() for x in arguments]
        c, s = c[:, :, 0], s[:, :, 0]
        assert takes(rotary, *leaves, c, s, dim)
        got = rotary.apply_rotary(*leaves, c, s, dim)
        expected = llama.apply_rotary_pos_emb(*arguments, c, s, dim)
        assert same(got, expected)
        seeds = [torch.randn(x.shape).mT.contiguous().mT for x in got]
        dense = [x.detach().contiguous().requires_grad_() for x in arguments]
        assert same(
            torch.autograd.grad(got, leaves, seeds),
            torch.autograd.grad(llama.apply_rotary_pos_emb(*dense, c, s, dim), dense, seeds),
        )


@pytest.mark.parametrize("dim", [0, 1])
def test_without_a_batch(rotary: ModuleType, dim: int) -> None:
    q, k, cos, sin = (x[0] for x in operands(48))
    if dim == 1:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    assert takes(rotary, q, k, cos, sin, dim)
    assert same(rotary.apply_rotary(q, k, cos, sin, dim), llama.apply_rotary_pos_emb(q, k, cos, sin, dim))


def test_empty_inputs(rotary: ModuleType) -> None:
    for shape in ((0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8), (2, 3, 5, 0)):
        q, tables = torch.empty(shape, requires_grad=True), torch.empty(shape[0], shape[2], shape[3])
        assert takes(rotary, q, q, tables, tables)
        turned = rotary.apply_rotary(q, q, tables, tables)
        assert [x.shape for x in turned] == [torch.Size(shape)] * 2
        assert torch.autograd.grad(turned, [q], turned)[0].shape == torch.Size(shape)
    one, none = torch.randn(2, 3, 5, 8), torch.empty(2, 0, 5, 8)
    tables = torch.randn(2, 5, 8)
    turned = rotary.apply_rotary(one, none, tables, tables)
    assert same(turned, llama.apply_rotary_pos_emb(one, none, tables, tables))


def test_results_do_not_depend_on_the_number_of_threads(rotary: ModuleType) -> None:
    """Tokens in pieces, with a last one that is smaller, and few tokens of many heads."""
    before = torch.get_num_threads()
    try:
        for tokens, heads in ((203, 4), (3, 200), (1, 300)):
            q = torch.randn(2, heads, tokens, 64)
            cos, sin = torch.randn(2, tokens, 64), torch.randn(2, tokens, 64)
            expected = llama.apply_rotary_pos_emb(q, q[:, :3], cos, sin)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert same(rotary.apply_rotary(q, q[:, :3], cos, sin), expected)
    finally:
        torch.set_num_threads(before)


def test_no_gradient_is_lost(rotary: ModuleType) -> None:
    """Whichever operand requires one; those of cos and sin are PyTorch's."""
    for position in range(4):
        found = []
        for function in (llama.apply_rotary_pos_emb, rotary.apply_rotary):
            arguments = operands()
            arguments[position].requires_grad_()
            sum(x.square().sum() for x in function(*arguments)).backward()
            found.append(arguments[position].grad)
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert takes(rotary, *arguments)
            assert not rotary.apply_rotary(*arguments)[0].requires_grad
    arguments = [x.requires_grad_() for x in operands()[:2]]
    only_q = rotary.apply_rotary(*arguments, *operands()[2:])[0]
    only_q.sum().backward()
    assert torch.equal(arguments[1].grad, torch.zeros_like(arguments[1]))
    with torch.inference_mode():
        assert not rotary.apply_rotary(*arguments, *operands()[2:])[0].requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_every_order(rotary: ModuleType, form: str) -> None:
    original, options = FORMS[form]
    results = []
    for function in (original, lambda *a: rotary.apply_rotary(*a, **options)):
        *leaves, cos, sin = operands(16)
        leaves = [x.requires_grad_() for x in leaves]
        out = sum(x.pow(3).sum() for x in function(*leaves, cos, sin))
        first = torch.autograd.grad(out, leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves, create_graph=True)
        results.append([*first, *second, *torch.autograd.grad(sum(x.sum() for x in second), leaves)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("form", range(16))
def test_the_op_is_what_its_schema_and_shapes_say(rotary: ModuleType, form: int) -> None:
    q, k, cos, sin = operands(16)
    for dim, inputs in ((1, (q, k)), (1, (q.contiguous(), k)), (2, (q.transpose(1, 2), k.transpose(1, 2)))):
        torch.library.opcheck(rotary.compiled.ops.rotate.default, (*inputs, cos, sin, dim, 16, form))


def test_every_op_is_tested(rotary: ModuleType) -> None:
    namespace = rotary.compiled.ops.rotate.default.namespace
    found = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")}
    assert found == {"rotate", "use_level"}


@pytest.mark.parametrize("enabled", [True, False])
def test_compiles_to_one_graph(rotary: ModuleType, enabled: bool) -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(rotary.apply_rotary, fullgraph=True, backend=counter, dynamic=True)
    with torch.set_grad_enabled(enabled):
        for tokens in (5, 9):
            arguments = operands(tokens=tokens)
            assert same(compiled(*arguments), rotary.apply_rotary(*arguments))
    assert counter.frame_count == 1


def test_compiled_gradients_are_those_of_eager(rotary: ModuleType) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rotary.apply_rotary, fullgraph=True, backend="aot_eager")
    results = []
    for function in (rotary.apply_rotary, compiled):
        *leaves, cos, sin = operands()
        leaves = [x.requires_grad_() for x in leaves]
        sum(x.square().sum() for x in function(*leaves, cos, sin)).backward()
        results.append([x.grad for x in leaves])
    assert same(*results)


def test_where_the_op_has_no_rules_pytorch_computes(rotary: ModuleType) -> None:
    """vmap, gradients through it, forward mode with and without functorch: nothing is lost silently."""
    arguments = operands()
    tangents = tuple(torch.ones_like(x) for x in arguments)

    def several(function: Turn) -> list[Tensor]:
        single = lambda q, k, cos, sin: function(q, k, cos, sin, 0)  # noqa: E731
        found = [*vmap(single)(*arguments), *jvp(function, tuple(arguments), tangents)[1]]
        found.append(grad(lambda q: vmap(single)(q, *arguments[1:])[0].square().sum())(arguments[0]))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, y) for x, y in zip(arguments, tangents, strict=True)]
            found += [forward_ad.unpack_dual(x).tangent for x in function(*duals)]
        return found

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            for expected, got in zip(several(llama.apply_rotary_pos_emb), several(rotary.apply_rotary), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("enabled", [True, False])
def test_a_trace_is_pytorchs(rotary: ModuleType, enabled: bool) -> None:
    q, k, cos, sin = operands()
    leaves = (q.clone().requires_grad_(), k.clone().requires_grad_())
    with torch.set_grad_enabled(enabled):
        traced = torch.jit.trace(rotary.apply_rotary, (*leaves, cos, sin))
    assert rotary.compiled.ops.name not in str(traced.graph)
    found, expected = ([x.flip(-1) for x in function(*leaves, cos, sin)] for function in (traced, rotary.apply_rotary))
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(sum(x.square().sum() for x in made), leaves) for made in (found, expected))
    torch.testing.assert_close(ours, theirs)


class Named(Tensor):
    """A subclass, which may keep more than its elements."""


def test_what_the_op_does_not_take_is_pytorchs(rotary: ModuleType) -> None:
    q, k, cos, sin = operands()
    assert takes(rotary, q, k, cos, sin)
    others = {
        "a subclass": (q.as_subclass(Named), k, cos, sin),
        "two dtypes": (q, k.bfloat16(), cos, sin),
        "another dtype": (q.double(), k.double(), cos.double(), sin.double()),
        "float32 tables": (q.half(), k.half(), cos, sin),
        "tables of two dtypes": (q, k, cos, sin.double()),
        "one token of tables": (q, k, cos[:, :1], sin[:, :1]),
        "tables of two shapes": (q, k, cos[:1], sin),
        "one batch of k": (q, k[:1], cos, sin),
        "tables without a batch": (q, k, cos[0], sin[0], 0),
    }
    for name, arguments in others.items():
        dim = arguments[4] if len(arguments) > 4 else 1
        assert not takes(rotary, *arguments[:4], dim), name
        got, expected = rotary.apply_rotary(*arguments[:4], dim), llama.apply_rotary_pos_emb(*arguments[:4], dim)
        assert same(got, expected), name
    assert isinstance(rotary.apply_rotary(*others["a subclass"])[0], Named)
    assert takes(rotary, q.half(), k.half(), cos, sin, once=True)


def errors() -> dict[str, Callable[[ModuleType], object]]:
    q, k, cos, sin = operands(16)

    def op(*changed: object, dim: int = 1, width: int = 16, form: int = 0) -> Callable[[ModuleType], object]:
        given = [*changed, *(q, k, cos, sin)[len(changed) :]]
        return lambda rotary: rotary.compiled._rotate(*given, dim, width, form)

    return {
        "device": lambda rotary: rotary.apply_rotary(q, k, cos.to("meta"), sin.to("meta")),
        "on device": lambda rotary: rotary.apply_rotary(q, k.to("meta"), cos, sin),
        "5": op(q[None], k[None], cos[None], sin[None]),
        "expected 1 or 2": op(dim=3),
        "expected an even number": op(width=15),
        "expected 0 to 15": op(form=16),
        "another dtype than q": op(q, k.half()),
        "k has 3 dimensions": op(q, k[0]),
        "k has other batches": op(q, k[:1]),
        "heads of 16": op(width=18),
        "cos has 4 dimensions": op(q, k, cos[None], sin),
        "cos has other batches": op(q, k, cos[:, :2], sin),
        "cos has 12": op(q, k, cos[..., :12], sin),
        "different shapes or dtypes": op(q, k, cos, sin[..., :8]),
        "rounding once": op(q.half(), k.half()),
        "neither float32": op(q.double(), k.double(), cos.double(), sin.double()),
    }


@pytest.mark.parametrize("message", errors())
def test_wrong_operands_are_errors(rotary: ModuleType, message: str) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        errors()[message](rotary)


def test_a_rotary_dim_that_cannot_be_is_an_error(rotary: ModuleType) -> None:
    q, k, cos, sin = operands(16)
    for width, message in ((15, "even"), (18, "even"), (12, "half as many")):
        with pytest.raises(ValueError, match=message):
            rotary.apply_rotary(q, k, cos, sin, rotary_dim=width)


class Kept(nn.Module):
    """A marked function, as `use_kernel_forward_from_hub` makes it one."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return olmo2.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


@pytest.mark.parametrize("strict", [True, False])
def test_the_layer_compiles_and_exports_before_it_was_ever_called(rotary: ModuleType, strict: bool) -> None:
    class Model(nn.Module):
        def __init__(self, function: nn.Module) -> None:
            super().__init__()
            self.__dict__["function"] = function

        def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
            return self.function(*arguments)

    for form in ("compile", "export"):
        function = type("Fresh", (Kept,), {"forward": staticmethod(Kept.forward)})()
        function.forward = rotary.layers.rotary_pos_emb.forward.__get__(function)
        arguments = tuple(operands())
        with torch.no_grad():
            if form == "compile":
                torch._dynamo.reset()
                traced = torch.compile(Model(function), fullgraph=True, backend="aot_eager")
            else:
                program = torch.export.export(Model(function), arguments, strict=strict)
                assert (
                    "rotate" in str(program.graph)
                ) is strict  # otherwise the tensors are a subclass's: PyTorch's code
                traced = program.module()
            assert same(traced(*arguments), olmo2.apply_rotary_pos_emb(*arguments))
