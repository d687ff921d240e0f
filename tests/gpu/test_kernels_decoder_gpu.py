"""kernelhub/decoder on a GPU: gated MLPs and a decoder layer against float64, what they keep, and what is written where."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from kernelprojects import load_compiled
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN, BETWEEN = 256, 704


@pytest.fixture(scope="session")
def decoder(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("decoder", request.config)


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    for mlp, norm in ((LlamaMLP, LlamaRMSNorm), (Qwen3MLP, Qwen3RMSNorm)):
        monkeypatch.setattr(mlp, "kernel_layer_name", "GatedMLP", raising=False)
        monkeypatch.setattr(norm, "kernel_layer_name", "RMSNorm", raising=False)


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


class Layer(nn.Module):
    """A decoder layer with its positions."""

    def __init__(self, config: Any, kind: type = LlamaDecoderLayer) -> None:
        super().__init__()
        self.layer, self.rotary = kind(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        tables = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        return self.layer(x, position_embeddings=tuple(table.to(x.dtype) for table in tables))


def pair(decoder: ModuleType, layer: str, dtype: torch.dtype, bias: bool = False) -> tuple[nn.Module, nn.Module]:
    """A model's layer, and the same with the kernel's forward."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=BETWEEN, num_attention_heads=4, num_key_value_heads=2, mlp_bias=bias
    )
    config._attn_implementation = "sdpa"
    phi = Phi3Config(hidden_size=HIDDEN, intermediate_size=BETWEEN, pad_token_id=0)
    made: dict[str, Callable[[], nn.Module]] = {
        "GatedMLP": lambda: LlamaMLP(config),
        "PackedGatedMLP": lambda: Phi3MLP(phi),
        "DecoderLayer": lambda: Layer(config),
    }
    original = made[layer]().to("cuda", dtype)
    for name, parameter in original.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    kernelized = copy.deepcopy(original)
    inner = kernelized.layer if layer == "DecoderLayer" else kernelized
    inner.forward = getattr(decoder.layers, layer).forward.__get__(inner)
    return original, kernelized


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    out = module(x)
    out.backward(values(*out.shape, dtype=out.dtype, seed=9))
    found = {"result": out.detach(), "input": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    module.zero_grad()
    return found


def assert_as_near(got: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, reference in exact.items():
        assert got[name].dtype == eager[name].dtype, name
        error, allowed = (float((x[name].double() - reference).norm()) for x in (got, eager))
        unit = torch.finfo(got[name].dtype).eps * float(reference.norm()) / 8
        assert error <= 1.25 * allowed + unit, (name, error, allowed, unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layer", "bias"),
    [
        ("GatedMLP", False),
        ("GatedMLP", True),
        ("PackedGatedMLP", False),
        ("DecoderLayer", False),
        ("DecoderLayer", True),
    ],
)
def test_result_and_gradients_are_as_near_to_float64_as_the_models_own(
    decoder: ModuleType, layer: str, bias: bool, dtype: torch.dtype
) -> None:
    original, kernelized = pair(decoder, layer, dtype, bias)
    x = values(2, 300, HIDDEN, dtype=dtype)
    exact = step(copy.deepcopy(original).double(), x.double())
    eager, got = step(original, x), step(kernelized, x)
    assert_as_near(got, eager, exact)
    with torch.no_grad():
        before = x.clone()
        assert_as_near({"result": kernelized(x)}, eager, {"result": exact["result"]})
        assert torch.equal(x, before)


def test_a_layer_leaves_what_others_hold(decoder: ModuleType) -> None:
    """The sum within is the layer's own: nothing that it was called with, or that a hook has seen, is written to."""
    _, kernelized = pair(decoder, "DecoderLayer", torch.bfloat16)
    seen: list[tuple[Tensor, Tensor]] = []
    x = values(2, 64, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = kernelized(x)
        for name in ("layer.self_attn", "layer.post_attention_layernorm", "layer.mlp"):
            part = kernelized.get_submodule(name)
            handle = part.register_forward_hook(
                lambda _, args, out: seen.extend(
                    (one, one.clone())
                    for one in (*args, *(out if isinstance(out, tuple) else (out,)))
                    if isinstance(one, Tensor)
                )
            )
            torch.testing.assert_close(kernelized(x), expected, rtol=2e-2, atol=2e-2)
            handle.remove()
            assert all(torch.equal(*held) for held in seen)
    assert len(seen) >= 5


def adds(module: nn.Module, x: Tensor) -> int:
    """Passes that add, without gradients."""
    with torch.no_grad():
        module(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            module(x)
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert names
    return sum("CUDAFunctor_add<c10::BFloat16>" in name for name in names)


def test_the_residuals_are_added_by_the_norm_and_by_the_product(decoder: ModuleType) -> None:
    original, kernelized = pair(decoder, "DecoderLayer", torch.bfloat16)
    x = values(4, 1024, HIDDEN, dtype=torch.bfloat16)
    assert adds(original, x) - adds(kernelized, x) == 2  # the rotation of q and k, which is transformers', adds, too


def test_the_product_is_not_kept(decoder: ModuleType) -> None:
    _, kernelized = pair(decoder, "DecoderLayer", torch.bfloat16)
    x = values(2, 64, HIDDEN, dtype=torch.bfloat16).requires_grad_()
    held: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (held.setdefault(t.data_ptr(), t.shape[-1] if t.dim() else 0), t)[1], lambda t: t
    ):
        kernelized(x)
    weights = {parameter.data_ptr() for parameter in kernelized.parameters()}
    assert sum(width == BETWEEN for at, width in held.items() if at not in weights) == 2


# The attention


class Attention(nn.Module):
    """An attention with its positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.layer, self.rotary = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor, start: int = 0, cache: DynamicCache | None = None) -> Tensor:
        tables = self.rotary(x, torch.arange(start, start + x.shape[1], device=x.device)[None])
        tables = tuple(table.to(x.dtype) for table in tables)
        return self.layer(x, position_embeddings=tables, attention_mask=None, past_key_values=cache)[0]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaAttention, "kernel_layer_name", "RotaryAttention", raising=False)
    monkeypatch.setattr(Qwen3Attention, "kernel_layer_name", "NormedRotaryAttention", raising=False)


@pytest.fixture
def ops(decoder: ModuleType, named: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops for Hopper that are called."""
    found: list[str] = []
    for name in ("rotary_projections", "add_product"):
        op = getattr(decoder.hopper, name)
        monkeypatch.setattr(decoder.hopper, name, lambda *a, op=op, name=name: (found.append(name), op(*a))[1])
    return found


def attentions(
    decoder: ModuleType, dtype: torch.dtype, hidden: int, heads: int, layer: str = "RotaryAttention", bias: bool = False
) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=heads, num_key_value_heads=heads // 4,
        head_dim=64, attention_bias=bias,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    original = (Attention if layer == "RotaryAttention" else Layer)(config).to("cuda", dtype)
    for name, parameter in original.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=hidden**-0.5)
    kernelized = copy.deepcopy(original)
    kernelized.layer.forward = getattr(decoder.layers, layer).forward.__get__(kernelized.layer)
    return original, kernelized


def on_hopper(decoder: ModuleType, dtype: torch.dtype) -> bool:
    return decoder.hopper.HERE and torch.cuda.get_device_capability() == (9, 0) and dtype is not torch.float32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_attention_is_as_near_to_float64_as_the_models_own(
    decoder: ModuleType, dtype: torch.dtype, bias: bool, ops: list[str]
) -> None:
    """Of few rows, and of as many as one op makes q, k and v of, with gradients and without."""
    for tokens, hidden, heads in ((150, 256, 4), (2048, 2048, 32)):
        original, kernelized = attentions(decoder, dtype, hidden, heads, bias=bias)
        x = values(2, tokens, hidden, dtype=dtype)
        exact = step(copy.deepcopy(original).double(), x.double())
        eager, got = step(original, x), step(kernelized, x)
        assert_as_near(got, eager, exact)
        with torch.no_grad():
            assert_as_near({"result": kernelized(x)}, eager, {"result": exact["result"]})
    assert ops == ["rotary_projections"] * (2 if on_hopper(decoder, dtype) else 0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_decoder_layer_of_many_rows_has_sums_in_its_products(
    decoder: ModuleType, dtype: torch.dtype, ops: list[str]
) -> None:
    original, kernelized = attentions(decoder, dtype, 2048, 32, layer="DecoderLayer")
    x = values(2, 2048, 2048, dtype=dtype)
    exact = step(copy.deepcopy(original).double(), x.double())
    eager = step(original, x)
    assert_as_near(step(kernelized, x), eager, exact)
    here = on_hopper(decoder, dtype)
    assert ops == ["rotary_projections", "add_product", "add_product"] * here
    ops.clear()
    with torch.no_grad():
        before = x.clone()
        assert_as_near({"result": kernelized(x)}, eager, {"result": exact["result"]})
        assert torch.equal(x, before)
    assert ops == ["rotary_projections", "add_product", "add_product"] * here
    if here and dtype is torch.bfloat16:
        assert adds(original, x) - adds(kernelized, x) == 4  # with those that turn q and k


@pytest.mark.parametrize("heads", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_decoder_layer_with_norms_of_q_and_k_has_sums_in_its_products(
    decoder: ModuleType, dtype: torch.dtype, heads: int, ops: list[str]
) -> None:
    """Whose heads are together as wide as the model, and not."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=2048, intermediate_size=4096, num_attention_heads=heads, num_key_value_heads=4, head_dim=128
    )
    config._attn_implementation = "sdpa"
    original = Layer(config, Qwen3DecoderLayer).to("cuda", dtype)
    for name, parameter in original.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=2048**-0.5)
    kernelized = copy.deepcopy(original)
    kernelized.layer.forward = decoder.layers.DecoderLayer.forward.__get__(kernelized.layer)
    x = values(2, 2048, 2048, dtype=dtype)
    exact = step(copy.deepcopy(original).double(), x.double())
    eager = step(original, x)
    assert_as_near(step(kernelized, x), eager, exact)
    here = on_hopper(decoder, dtype)
    assert ops == ["add_product"] * (2 * here)
    ops.clear()
    with torch.no_grad():
        assert_as_near({"result": kernelized(x)}, eager, {"result": exact["result"]})
    assert ops == ["add_product"] * (2 * here)


def test_with_a_cache_it_gives_what_the_classs_forward_gives(decoder: ModuleType, ops: list[str]) -> None:
    """A prompt, of which one op makes q, k and v, and then tokens one by one."""
    both, found = attentions(decoder, torch.bfloat16, 2048, 32), []
    with torch.no_grad():
        for module in both:
            cache = DynamicCache(config=module.layer.config)
            made = [module(values(2, 2048, 2048, dtype=torch.bfloat16), 0, cache)]
            for at in range(3):
                made.append(module(values(2, 1, 2048, dtype=torch.bfloat16, seed=at), 2048 + at, cache))
            found.append([*made, cache.layers[0].keys, cache.layers[0].values])
    for expected, got in zip(*found, strict=True):
        assert float((got - expected).norm()) <= 0.01 * float(expected.norm())
    assert ops == ["rotary_projections"] * on_hopper(decoder, torch.bfloat16)


@pytest.mark.usefixtures("named")
def test_a_graph_can_hold_it(decoder: ModuleType) -> None:
    _, kernelized = attentions(decoder, torch.bfloat16, 2048, 32, layer="DecoderLayer")
    x = values(2, 2048, 2048, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = kernelized(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernelized(x)
        graph.replay()
        assert torch.equal(out, expected)
        other = values(2, 2048, 2048, dtype=torch.bfloat16, seed=1)
        expected = kernelized(other)
        x.copy_(other)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.usefixtures("named")
def test_compiled_it_gives_the_same(decoder: ModuleType, training: bool) -> None:
    original, kernelized = attentions(decoder, torch.bfloat16, 2048, 32, layer="DecoderLayer")
    x = values(2, 2048, 2048, dtype=torch.bfloat16)
    exact = step(copy.deepcopy(original).double(), x.double())
    eager = step(original, x)
    torch._dynamo.reset()
    compiled = torch.compile(kernelized, fullgraph=True)
    if training:
        found = step(compiled, x)
        assert_as_near({name.removeprefix("_orig_mod."): value for name, value in found.items()}, eager, exact)
    else:
        with torch.no_grad():
            assert_as_near({"result": compiled(x)}, eager, {"result": exact["result"]})
    torch._dynamo.reset()
