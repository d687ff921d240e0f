"""The compiled CUDA op of kernelhub/rotary: bit for bit the models' own code on the same GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from kernelprojects import load_compiled
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.esm import modeling_esm as esm
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.nanochat import modeling_nanochat as nanochat

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (2, 6, 16, 40, 64, 80, 96, 128, 256)


def neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """GPT-J's, with a cosine for each element."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + gptj.rotate_every_two(q) * sin, k * cos + gptj.rotate_every_two(k) * sin


FORMS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], dict[str, bool]]] = {
    "llama": (llama.apply_rotary_pos_emb, {}),
    "esm": (esm.apply_rotary_pos_emb, {"round_once": True}),
    "nanochat": (nanochat.apply_rotary_pos_emb, {"inverse": True}),
    "gptj": (neighbours, {"interleaved": True}),
    "cohere": (cohere.apply_rotary_pos_emb, {"interleaved": True, "round_once": True}),
}


@pytest.fixture(scope="session")
def rotary(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("rotary", request.config)


def operands(
    width: int, dtype: torch.dtype, tables: torch.dtype | None = None, tokens: int = 5, heads: tuple[int, int] = (4, 2)
) -> list[Tensor]:
    """q, k, cos and sin as a model makes them; the tables' halves differ, as nothing says that they are alike."""
    generator = torch.Generator("cuda").manual_seed(width)
    q, k = (
        torch.randn(2, tokens, count, width, generator=generator, device="cuda").to(dtype).transpose(1, 2)
        for count in heads
    )
    angles = torch.randn(2, tokens, width, generator=generator, device="cuda") * 3
    return [q, k, angles.cos().to(tables or dtype), angles.sin().to(tables or dtype)]


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_models_own_code_bit_for_bit(rotary: ModuleType, form: str, dtype: torch.dtype) -> None:
    original, options = FORMS[form]
    once = options.get("round_once", False)
    for width, tables, tokens in itertools.product(WIDTHS, {dtype, torch.float32} if once else {dtype}, (1, 700)):
        arguments = operands(width, dtype, tables, tokens)
        assert rotary.compiled.takes(*arguments, 1, width, once)
        got, expected = rotary.apply_rotary(*arguments, **options), original(*arguments)
        assert same(got, expected), (width, tables, tokens)
        assert [one.stride() for one in got] == [one.stride() for one in arguments[:2]]


@pytest.mark.parametrize("heads", [(32, 8), (71, 1), (1, 1)], ids=str)
def test_any_number_of_heads(rotary: ModuleType, heads: tuple[int, int]) -> None:
    for width, tokens in ((64, 3), (128, 300), (256, 3)):
        arguments = operands(width, torch.bfloat16, tokens=tokens, heads=heads)
        assert same(rotary.apply_rotary(*arguments), llama.apply_rotary_pos_emb(*arguments)), (width, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["llama", "nanochat", "gptj"])
def test_gradients_equal_the_models_own_bit_for_bit(rotary: ModuleType, form: str, dtype: torch.dtype) -> None:
    original, options = FORMS[form]
    for width in (6, 80, 128):
        *inputs, cos, sin = operands(width, dtype)
        seeds = [torch.randn(x.shape, device="cuda").to(dtype) for x in inputs]
        results = []
        for function in (original, lambda *a: rotary.apply_rotary(*a, **options)):
            leaves = [x.detach().requires_grad_() for x in inputs]
            results.append(torch.autograd.grad(function(*leaves, cos, sin), leaves, seeds))
        assert same(results[1], results[0]), width


def test_strides_halves_of_tables_one_token_of_many_and_nothing(rotary: ModuleType) -> None:
    q, k, cos, sin = operands(128, torch.bfloat16, tokens=7)
    cos, sin = (torch.cat([x[..., :64]] * 2, -1) for x in (cos, sin))
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    dense = q.contiguous(), k.contiguous()
    apart = q.repeat_interleave(2, -1)[..., ::2], torch.cat([k[..., :3], k], -1)[..., 3:]
    for some in ((q, k), dense, apart):
        assert same(rotary.apply_rotary(*some, cos, sin), expected)
        assert same(rotary.apply_rotary(*some, cos[..., :64], sin[..., :64], rotary_dim=128), expected)
    assert same(rotary.apply_rotary(q, k, cos[:1], sin[:1]), llama.apply_rotary_pos_emb(q, k, cos[:1], sin[:1]))
    none = rotary.apply_rotary(q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0])
    assert [x.numel() for x in none] == [0, 0]


def test_op_compiles_and_is_what_its_schema_says(rotary: ModuleType) -> None:
    arguments = operands(64, torch.float32)
    torch.library.opcheck(rotary.compiled.ops.rotate.default, (*arguments, 1, 64, 0))
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(rotary.apply_rotary, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (5, 9):
        arguments = operands(64, torch.bfloat16, tokens=tokens)
        assert same(compiled(*arguments), rotary.apply_rotary(*arguments))
    assert counter.frame_count == 1
