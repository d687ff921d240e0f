"""kernelhub/decoder on a GPU: gated MLPs and a decoder layer against float64, what they keep, and what is written where."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from kernelprojects import load_compiled
from torch import Tensor, nn
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3MLP

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
    monkeypatch.setattr(LlamaMLP, "kernel_layer_name", "GatedMLP", raising=False)
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


class Layer(nn.Module):
    """A decoder layer with its positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.layer, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

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
