"""Fused kernels beside the kernels apart, and beside the model's own code: one layer of a Llama, in turn, in one run.

    python benchmarks/fusion.py [--json FILE] [--seconds N]

Prints medians in microseconds and how many times as long as the fused kernel the others take. Each round calls all of them
once, in another order, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import copy
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

from kernelhub import Mode, kernel_report, kernelize, use_kernel_mapping
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.integrations.transformers import default_mapping, mark
from kernelhub.layers.repositories import LayerRepository
from kernelhub.settings import Settings

# tokens, hidden, between the projections
SHAPES = ((1, 256, 512), (32, 256, 512), (1, 1024, 2816), (512, 256, 512), (4096, 512, 2048), (8192, 256, 1024))
KEY = (("RMSNorm", "post_attention_layernorm"), ("MLP", "mlp"))
Way = Callable[[], object]


class NormAndMLP(nn.Module):
    """What is fused of a decoder layer, as it calls them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.post_attention_layernorm(x))


def layers(hidden: int, between: int) -> tuple[nn.Module, LlamaConfig]:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=between, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=1
    )
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(config, 0).eval()
    mark(layer)
    return layer, config


def kernelized(model: nn.Module, *, fused: bool, leave: tuple[str, ...] = ()) -> nn.Module:
    mapping = {name: value for name, value in default_mapping().items() if name not in leave}
    if fused:
        mapping[KEY] = {"cpu": LayerRepository("kernelhub/decoder", layer_name="RMSNormGatedMLP", version=1)}
    made = copy.deepcopy(model)
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(made, mode=Mode.INFERENCE)
    names = {row.layer for row in kernel_report(made).kernels}
    assert ("RMSNormGatedMLP" in names) == fused, kernel_report(made)
    return made


def ways(tokens: int, hidden: int, between: int) -> dict[str, dict[str, Way]]:
    """Each fusion, done in each way: name -> way -> a function without arguments."""
    layer, config = layers(hidden, between)
    x = torch.randn(1, tokens, hidden)
    pair = NormAndMLP(layer)
    pairs = {"fused": kernelized(pair, fused=True), "apart": kernelized(pair, fused=False), "eager": pair}
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(tokens)[None])
    whole = {
        "fused": kernelized(layer, fused=False),
        "apart": kernelized(layer, fused=False, leave=("DecoderLayer",)),
        "eager": layer,
    }
    assert "DecoderLayer" in {row.layer for row in kernel_report(whole["fused"]).kernels}
    found = {"RMSNormGatedMLP": {name: _call(model, x) for name, model in pairs.items()}}
    if tokens <= 1024:  # attention decides beyond
        found["DecoderLayer"] = {name: _call(model, x, position_embeddings=positions) for name, model in whole.items()}
    for calls in found.values():
        expected = calls["eager"]()
        for call in calls.values():
            torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
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
    parser.add_argument("--seconds", type=float, default=5.0, help="for one fusion at one shape")
    parser.add_argument("--store", type=Path, help="where built kernels are kept; else they are built anew")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        set_default_hub(Hub(settings=Settings(cache=options.store or Path(folder), offline=True, build="auto")))
        results = []
        for shape in SHAPES:
            for name, calls in ways(*shape).items():
                found = medians(calls, options.seconds)
                results.append({"fusion": name, "shape": list(shape), "us": found})
                ratios = ", ".join(f"{way} {found[way] / found['fused']:.2f}x" for way in ("apart", "eager"))
                print(f"{name:16} {' x '.join(map(str, shape)):18} fused {found['fused']:>10,.1f} us; {ratios}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
