"""A Llama of 1.2 B parameters on a GPU: prefill, forward + backward and peak memory; part of gpu_kernels.py.

Eager, torch.compile, Liger, Liger with torch.compile, kernelized, and kernelized with torch.compile, one after another on
models of the same random weights, batch 4 x 2048, bfloat16. Medians of calls, in ms, each with a device that waits for it, so
that what the processor does before the first kernel counts; and, "in a row", the mean of calls that do not wait for the one before.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.settings import Settings

BATCH, TOKENS = 4, 2048
CALLS = 9


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def kernelized(mode: Any) -> nn.Module:
    """With this package's kernels in all places that it reaches, and the loss in parts."""
    from kernelhub.integrations.transformers import kernelize_pretrained

    model = llama().train()
    kernelize_pretrained(model, mode=mode, fuse_loss=True)
    return model


def liger() -> nn.Module:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = llama()
    apply_liger_kernel_to_llama(
        rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=True, model=model
    )
    return model


def ms(call: Callable[[], object]) -> float:
    found = []
    for number in range(CALLS + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        if number >= 3:
            found.append(start.elapsed_time(stop))
    return statistics.median(found)


def ms_in_a_row(call: Callable[[], object]) -> float:
    """Of a call, where many are made and none is waited for."""
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / CALLS


def measure(make: Callable[[], nn.Module], compiles: bool) -> dict[str, float]:
    """Prefill without a cache up to the last logit, in eval mode; forward and backward, in training mode, and its peak."""
    model = make()
    ids = torch.randint(0, 128256, (BATCH, TOKENS), device="cuda")
    run = torch.compile(model) if compiles else model

    def prefill() -> Tensor:
        with torch.no_grad():
            return run(ids, use_cache=False, logits_to_keep=1).logits

    def step() -> None:
        run(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    model.eval()
    found = {"prefill_ms": ms(prefill), "prefill_in_a_row_ms": ms_in_a_row(prefill)}
    model.train()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found["step_ms"] = ms(step)
    found["step_in_a_row_ms"] = ms_in_a_row(step)
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def measure_models(cache: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Each way's name and figures, when it has been measured; of those that do not run here the reason is printed."""
    from kernelhub.layers.mode import Mode

    training = Mode.TRAINING
    ways: dict[str, tuple[Callable[[], nn.Module], bool]] = {
        "eager": (llama, False),
        "compile": (llama, True),
        "kernelized": (lambda: kernelized(training), False),
        "kernelized + compile": (lambda: kernelized(training | Mode.TORCH_COMPILE), True),
        "liger": (liger, False),  # last: it changes transformers' module for good
        "liger + compile": (liger, True),
    }
    set_default_hub(Hub(settings=Settings(cache=cache, offline=True, build="always")))
    try:
        for name, (make, compiles) in ways.items():
            torch._dynamo.reset()
            try:
                row = measure(make, compiles)
            except Exception as error:
                if name.startswith("kernelized"):
                    raise
                print(f"Llama 1.2 B, {name} does not run: {type(error).__name__}: {str(error)[:300]}", flush=True)
            else:
                figures = (
                    f"prefill {row['prefill_ms']:.1f} ms ({row['prefill_in_a_row_ms']:.1f} in a row), "
                    f"step {row['step_ms']:.1f} ms ({row['step_in_a_row_ms']:.1f}), peak {row['peak_gib']:.1f} GiB"
                )
                print(f"Llama 1.2 B, {name}: {figures}", flush=True)
                yield name, row
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        set_default_hub(None)
