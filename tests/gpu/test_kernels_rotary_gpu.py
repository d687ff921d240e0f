"""The compiled CUDA ops of kernelhub/rotary: bit for bit the models' own code on the same GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.esm import modeling_esm as esm
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.nanochat import modeling_nanochat as nanochat
from transformers.models.olmo2 import modeling_olmo2 as olmo2

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["llama", "nanochat", "gptj"])
def test_some_of_each_head_wherever_q_and_k_lie(rotary: ModuleType, form: str, dtype: torch.dtype) -> None:
    original, options = FORMS[form]
    for width, turned, tokens in ((64, 64, 9), (64, 32, 300), (80, 48, 9), (96, 64, 1), (40, 16, 7), (24, 6, 5)):
        q, k, cos, sin = operands(width, dtype, tokens=tokens)
        cos, sin = cos[..., :turned].contiguous(), sin[..., :turned].contiguous()
        expected = tuple(
            torch.cat((of, x[..., turned:]), -1)
            for of, x in zip(original(q[..., :turned], k[..., :turned], cos, sin), (q, k), strict=True)
        )
        whole = torch.cat((q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2)), 2)  # q, k and v of one product
        ways = {
            "as models have it": (q, k),
            "tokens inside heads": (q.contiguous(), k.contiguous()),
            "one of each": (q, k.contiguous()),
            "parts of one": tuple(whole[:, :, some].transpose(1, 2) for some in (slice(4), slice(4, 6))),
        }
        for way, inputs in ways.items():
            assert same(rotary.apply_rotary(*inputs, cos, sin, **options), expected), (width, turned, way)


def test_heads_of_two_widths(rotary: ModuleType) -> None:
    q, _, cos, sin = operands(64, torch.bfloat16, tokens=300)
    _, k, _, _ = operands(128, torch.bfloat16, tokens=300)
    got = rotary.apply_rotary(q, k, cos, sin)
    turned = llama.apply_rotary_pos_emb(q, k[..., :64], cos, sin)
    assert same(got, (turned[0], torch.cat((turned[1], k[..., 64:]), -1)))


def test_more_batches_than_a_grid_has(rotary: ModuleType) -> None:
    q = torch.randn(65537, 1, 1, 32, generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()
    table = torch.randn(2, 1, 1, 32, generator=torch.Generator("cuda").manual_seed(1), device="cuda").bfloat16()
    assert same(rotary.apply_rotary(q, q, *table), llama.apply_rotary_pos_emb(q, q, *table))


@pytest.mark.parametrize("outside", ["tokens", "heads"])
def test_tensors_of_more_than_2_31_elements(
    rotary: ModuleType, outside: str, needs_memory: Callable[[int], None]
) -> None:
    tokens, heads = (1 << 16) + 8, 129
    needs_memory(12 << 30)

    def made(heads: int) -> Tensor:
        shape = (2, tokens, heads, 128) if outside == "tokens" else (2, heads, tokens, 128)
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
        return x.transpose(1, 2) if outside == "tokens" else x

    q, k = made(heads), made(1)
    cos, sin = (torch.randn(1, tokens, 128, device="cuda").bfloat16() for _ in range(2))
    got = rotary.apply_rotary(q, k, cos, sin)
    for some in (slice(0, 8), slice(tokens - 8, tokens)):
        expected = llama.apply_rotary_pos_emb(q[:, :, some], k[:, :, some], cos[:, some], sin[:, some])
        assert same((got[0][:, :, some], got[1][:, :, some]), expected)


def test_more_heads_of_one_token_than_a_grid_is_wide(rotary: ModuleType) -> None:
    q = torch.randn(1, 65535 * 85 + 3, 1, 6, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    table = torch.randn(2, 1, 1, 6, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    assert same(rotary.apply_rotary(q, q[:, :1], *table), llama.apply_rotary_pos_emb(q, q[:, :1], *table))


def test_op_is_what_its_schema_says(rotary: ModuleType) -> None:
    arguments = operands(64, torch.float32)
    torch.library.opcheck(rotary.compiled.ops.rotate.default, (*arguments, 1, 64, 0))


# Tables

HALVES, NEIGHBOURS, PAIRS = 0, 1, 2
TABLES: dict[type[nn.Module], int] = {
    llama.LlamaRotaryEmbedding: HALVES,
    gemma3.Gemma3RotaryEmbedding: HALVES,
    olmo2.Olmo2RotaryEmbedding: HALVES,
    cohere.CohereRotaryEmbedding: NEIGHBOURS,
    gpt_oss.GptOssRotaryEmbedding: PAIRS,
}


def maker(cls: type[nn.Module], pairs: int, scale: float = 1.0) -> nn.Module:
    """An instance with what its forward reads, on the GPU."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for prefix in ("", "full_"):
        module.register_buffer(f"{prefix}inv_freq", 1 / 500000 ** (torch.arange(pairs, device="cuda") / pairs))
        setattr(module, f"{prefix}attention_scaling", scale)
    module.rope_type = {"full": "default"} if cls is gemma3.Gemma3RotaryEmbedding else "default"
    return module


def swapped(rotary: ModuleType, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    by_layer_type = isinstance(module.rope_type, dict)
    layer = rotary.layers.RotaryEmbeddingByLayerType if by_layer_type else rotary.layers.RotaryEmbedding
    return layer.forward.__get__(module)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", TABLES, ids=lambda cls: cls.__name__)
def test_tables_equal_the_models_own_bit_for_bit(rotary: ModuleType, cls: type[nn.Module], dtype: torch.dtype) -> None:
    """At every position up to 131072, where the cosine of large angles is reduced another way, and far beyond."""
    rest = ("full",) if cls is gemma3.Gemma3RotaryEmbedding else ()
    every = torch.arange(131073, device="cuda")[None]
    for pairs, scale in ((64, 1.0), (32, 1.2079441541679836), (3, 1.0), (20, 0.1)):
        module = maker(cls, pairs, scale)
        for positions in (every, every[:, 77:78], every[:, -5:] * 8191, every[:, :12].reshape(3, 4), -every[:, :6]):
            x = torch.empty(1, 1, 1, dtype=dtype, device="cuda")
            assert rotary.tables.takes(module.inv_freq, positions, x)
            assert rotary.tables.with_op(module.inv_freq, positions)
            got, expected = swapped(rotary, module)(x, positions, *rest), module(x, positions, *rest)
            assert same(got, expected), (pairs, scale, tuple(positions.shape))
            assert all(one.is_contiguous() for one in got)
            assert not any(one.requires_grad for one in got)


def test_tables_of_any_strides_and_integers_and_nothing(rotary: ModuleType) -> None:
    module, x = maker(llama.LlamaRotaryEmbedding, 64), torch.empty(1, dtype=torch.bfloat16, device="cuda")
    some = torch.arange(3000, device="cuda").reshape(3, 1000)
    for positions in (
        some,
        some.int(),
        some[:1].expand(3, -1),
        some[:, :1].expand(-1, 7),
        some.t(),
        some[:, 1::3],
        some.int()[::2, 5:].t(),
        some[:, :0],
        some[:0],
    ):
        assert rotary.tables.with_op(module.inv_freq, positions)
        assert same(swapped(rotary, module)(x, positions), module(x, positions)), positions.stride()
    for dtype in DTYPES:
        inv_freq = module.inv_freq.to(dtype)
        for frequencies in (inv_freq, inv_freq.repeat_interleave(2)[::2], inv_freq[:0], inv_freq[1:]):
            module.inv_freq = frequencies
            assert same(swapped(rotary, module)(x, some), module(x, some)), (dtype, frequencies.stride())
    for positions in (some[0], some[None]):  # of other dimensions: PyTorch's code
        assert not rotary.tables.with_op(module.inv_freq, positions)
        assert same(swapped(rotary, module)(x, positions), module(x, positions))


def test_tables_op_is_what_its_schema_says_and_refuses_the_rest(rotary: ModuleType) -> None:
    op = rotary.compiled.ops.tables.default
    inv_freq, positions = torch.rand(8, device="cuda"), torch.arange(6, device="cuda").reshape(2, 3)
    for layout, dtype in itertools.product(range(3), range(3)):
        torch.library.opcheck(op, (inv_freq, positions, 1.25, dtype, layout))
    for arguments, message in (
        ((inv_freq.cpu(), positions, 1.0, 0, 0), "one GPU"),
        ((inv_freq, positions[0], 1.0, 0, 0), "dimensions"),
        ((inv_freq[None], positions, 1.0, 0, 0), "dimensions"),
        ((inv_freq, positions.float(), 1.0, 0, 0), "int64 nor int32"),
        ((inv_freq.double(), positions, 1.0, 0, 0), "float32"),
        ((inv_freq, positions, 1.0, 3, 0), "dtype is 3"),
        ((inv_freq, positions, 1.0, 0, 3), "layout is 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_tables_of_a_model_on_its_own_device_compiled_and_captured(rotary: ModuleType) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=YARN)
    module = llama.LlamaRotaryEmbedding(config).to("cuda")
    expected = llama.LlamaRotaryEmbedding(config).to("cuda")
    module.forward = swapped(rotary, module)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (5, 9):
        x, positions = torch.empty(2, tokens, 4, device="cuda").half(), torch.arange(tokens, device="cuda")[None]
        assert same(compiled(x, positions), expected(x, positions))
        assert same(module(x, position_ids=positions), expected(x, positions))
    assert counter.frame_count == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = module(x, positions)
    positions += 100
    graph.replay()
    assert same(got, expected(x, positions))


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}


def test_frequencies_that_stayed_on_the_cpu_are_the_classs_own(rotary: ModuleType) -> None:
    module = maker(llama.LlamaRotaryEmbedding, 16)
    module.inv_freq = module.inv_freq.cpu()
    x, positions = torch.empty(1, device="cuda"), torch.arange(6, device="cuda")[None]
    assert not rotary.tables.takes(module.inv_freq, positions, x)
    assert same(swapped(rotary, module)(x, positions), module(x, positions))
