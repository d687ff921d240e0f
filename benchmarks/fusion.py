"""Fused kernels beside the kernels apart, and beside the model's own code: one layer of a Llama, in turn, in one run.

    python benchmarks/fusion.py [--json FILE] [--seconds N] [--dtype float32] [--hidden 1024]

Prints medians in microseconds and how many times as long as the fused kernel the others take: the kernels apart (those of
norms and of activations, and PyTorch's products in between) and the model's own code. Each round calls all of them once, in
another order, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from kernelhub import Mode, get_kernel, kernel_report, kernelize, use_kernel_mapping
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.integrations.transformers import default_mapping, mark
from kernelhub.layers.repositories import LayerRepository
from kernelhub.settings import Settings

# tokens, hidden, between the projections
SHAPES = (
    *((tokens, 256, 512) for tokens in (1, 4, 32, 512)),
    *((tokens, 1024, 2816) for tokens in (1, 4, 32, 512)),
    *((tokens, 2048, 8192) for tokens in (1, 4, 32, 256)),
    (4096, 512, 2048),
    (8192, 256, 1024),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEY = (("RMSNorm", "post_attention_layernorm"), ("MLP", "mlp"))
Way = Callable[[], object]


class NormAndMLP(nn.Module):
    """What is fused of a decoder layer, as it calls them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.post_attention_layernorm(x))


class PartsMLP(nn.Module):
    """A gated MLP of the layer's projections, which has the product by itself from a kernel."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.product = get_kernel("kernelhub/activation", version=1).silu_and_mul

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.product(self.gate_proj(x), self.up_proj(x)))


def layers(hidden: int, between: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, LlamaConfig]:
    """A decoder layer, the same layer with an MLP in parts, and their configuration."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=between,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(config, 0).eval().to(dtype)
    parts = copy.copy(layer)
    parts._modules = {**layer._modules, "mlp": PartsMLP(layer.mlp)}
    mark(layer)
    mark(parts)
    return layer, parts, config


def kernelized(model: nn.Module, *, fused: bool, leave: tuple[str, ...] = ()) -> nn.Module:
    mapping = {name: value for name, value in default_mapping().items() if name not in leave}
    if fused:
        mapping[KEY] = {"cpu": LayerRepository("kernelhub/decoder", layer_name="RMSNormGatedMLP", version=1)}
    made = copy.deepcopy(model)  # of weights of its own: those of each way empty the caches for the next
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(made, mode=Mode.INFERENCE)
    names = {row.layer for row in kernel_report(made).kernels}
    assert ("RMSNormGatedMLP" in names) == fused, kernel_report(made)
    return made


def ways(tokens: int, hidden: int, between: int, dtype: torch.dtype) -> dict[str, dict[str, Way]]:
    """Each fusion, done in each way: name -> way -> a function without arguments."""
    layer, parts, config = layers(hidden, between, dtype)
    x = torch.randn(1, tokens, hidden).to(dtype)
    pair = NormAndMLP(layer)
    pairs = {
        "fused": kernelized(pair, fused=True),
        "apart": kernelized(NormAndMLP(parts), fused=False),
        "eager": pair,
    }
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(tokens)[None])
    whole = {
        "fused": kernelized(layer, fused=False),
        "apart": kernelized(parts, fused=False, leave=("DecoderLayer",)),
        "eager": layer,
    }
    assert "DecoderLayer" in {row.layer for row in kernel_report(whole["fused"]).kernels}
    found = {"RMSNormGatedMLP": {name: _call(model, x) for name, model in pairs.items()}}
    if tokens <= 1024:  # attention decides beyond
        found["DecoderLayer"] = {name: _call(model, x, position_embeddings=positions) for name, model in whole.items()}
    for calls in found.values():
        expected = calls["eager"]()
        for call in calls.values():
            bound = 1e-4 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(call(), expected, rtol=bound, atol=bound)
    return found


def _call(model: nn.Module, x: torch.Tensor, **options: object) -> Way:
    return lambda: model(x, **options)


def medians(calls: dict[str, Way], seconds: float) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end, order = time.perf_counter() + seconds, list(calls.items())
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        order.append(order.pop(0))  # who comes after whom decides what the caches hold
        for name, call in order:
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0, help="for one fusion at one shape")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only this one")
    parser.add_argument("--hidden", type=int, action="append", help="only shapes of this hidden size")
    parser.add_argument("--store", type=Path, help="where built kernels are kept; else they are built anew")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        set_default_hub(Hub(settings=Settings(cache=options.store or Path(folder), offline=True, build="auto")))
        results = []
        shapes = [shape for shape in SHAPES if not options.hidden or shape[1] in options.hidden]
        for dtype, shape in itertools.product(options.dtype or DTYPES, shapes):
            for name, calls in ways(*shape, DTYPES[dtype]).items():
                found = medians(calls, options.seconds)
                results.append({"fusion": name, "dtype": dtype, "shape": list(shape), "us": found})
                ratios = ", ".join(f"{way} {found[way] / found['fused']:.2f}x" for way in ("apart", "eager"))
                size = " x ".join(map(str, shape))
                print(f"{name:16} {dtype:8} {size:18} fused {found['fused']:>10,.1f} us; {ratios}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
