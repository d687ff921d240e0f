"""The compiled CPU kernels beside eager, `F.*`, torch.compile and a copy, in turn, in one run.

    python benchmarks/cpu_kernels.py [--json FILE] [--quick] [--only NAME] [--threads N] [--processor-time]

Prints medians in microseconds and how many times as long as the kernel each of the others takes. Every round calls all
of them once after another, so that what else the machine does meets all alike. On a machine that others use, two threads
wait for each other's turns: `--threads 1 --processor-time` then says more. `NOTES.md` has figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import kernelhub
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.settings import Settings

SHAPES = ((1, 2048), (32, 2048), (256, 4096), (2048, 2048), (4096, 8192))
TOKENS = (1, 2048)  # of 32 heads and 8, 128 wide
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = 1.0  # for one operation at one shape
Way = Callable[[], object]


def kernel(name: str, folder: Path) -> ModuleType:
    set_default_hub(Hub(settings=Settings(cache=folder, offline=True, build="always")))
    try:
        return kernelhub.get_kernel(f"kernelhub/{name}", version=1)
    finally:
        set_default_hub(None)


def ways(norm: ModuleType, activation: ModuleType, rows: int, width: int, dtype: torch.dtype) -> dict[str, dict]:
    """Each operation, done in each way: name -> way -> a function without arguments."""
    x, y = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    w, b = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    original = LlamaRMSNorm(width).to(dtype)
    eager_norm = original.forward
    compiled = {
        "rms": torch.compile(original),
        "layer": torch.compile(lambda x: F.layer_norm(x, (width,), w, b)),
        "silu": torch.compile(lambda x, y: F.silu(x) * y),
        "tanh": torch.compile(lambda x, y: F.gelu(x, approximate="tanh") * y),
    }
    return {
        "RMSNorm": {
            "kernel": lambda: norm.rms_norm(x, original.weight, 1e-6),
            "eager": lambda: eager_norm(x),
            "F": lambda: F.rms_norm(x, (width,), original.weight, 1e-6),
            "compile": lambda: compiled["rms"](x),
            "copy": lambda: x.clone(),
        },
        "LayerNorm": {
            "kernel": lambda: norm.layer_norm(x, w, b, 1e-5),
            "F": lambda: F.layer_norm(x, (width,), w, b),
            "compile": lambda: compiled["layer"](x),
            "copy": lambda: x.clone(),
        },
        "silu(a) * b": {
            "kernel": lambda: activation.silu_and_mul(x, y),
            "eager": lambda: F.silu(x) * y,
            "compile": lambda: compiled["silu"](x, y),
            "add": lambda: torch.add(x, y),
        },
        "gelu_tanh(a) * b": {
            "kernel": lambda: activation.gelu_tanh_and_mul(x, y),
            "eager": lambda: F.gelu(x, approximate="tanh") * y,
            "compile": lambda: compiled["tanh"](x, y),
            "add": lambda: torch.add(x, y),
        },
    }


def rotary_ways(rotary: ModuleType, tokens: int, dtype: torch.dtype) -> dict[str, Way]:
    """The rotary embedding of q and k as a model's projections make them, each way."""
    q, k = (torch.randn(1, tokens, heads, 128).to(dtype).transpose(1, 2) for heads in (32, 8))
    angles = torch.randn(1, tokens, 64).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    compiled = torch.compile(apply_rotary_pos_emb)
    return {
        "kernel": lambda: rotary.apply_rotary(q, k, cos, sin),
        "eager": lambda: apply_rotary_pos_emb(q, k, cos, sin),
        "compile": lambda: compiled(q, k, cos, sin),
        "copy": lambda: (q.clone(), k.clone()),
    }


def measure(of: dict[str, Way], now: Callable[[], float]) -> dict[str, float]:
    """Medians in microseconds by the clock `now`, by name, of calls in turn."""
    for way in of.values():
        way()
        way()
    times: dict[str, list[float]] = {name: [] for name in of}
    least = min(clock(way, 1, now) for way in of.values())
    calls = max(1, min(200, int(2e-4 / least)))  # of one after another, so that the clock does not count
    stop = time.perf_counter() + SECONDS
    while time.perf_counter() < stop or len(times["kernel"]) < 7:
        for name, way in of.items():
            times[name].append(clock(way, calls, now))
    return {name: statistics.median(found) * 1e6 for name, found in times.items()}


def clock(way: Way, calls: int, now: Callable[[], float]) -> float:
    start = now()
    for _ in range(calls):
        way()
    return (now() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="the smallest and the middle shapes only")
    parser.add_argument("--only", help="one operation, by its name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="time on the processor, not by the clock")
    options = parser.parse_args()
    now = time.thread_time if options.processor_time else time.perf_counter
    torch.set_num_threads(options.threads)
    found = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if options.only != "rotary":
            norm, activation = kernel("norm", Path(folder)), kernel("activation", Path(folder))
            for rows, width in SHAPES[:2] if options.quick else SHAPES:
                for dtype in DTYPES:
                    torch._dynamo.reset()
                    for name, of in ways(norm, activation, rows, width, DTYPES[dtype]).items():
                        if options.only in (None, name):
                            medians = measure(of, now)
                            found.append(
                                {"operation": name, "rows": rows, "width": width, "dtype": dtype, "us": medians}
                            )
                            show(found[-1])
        if options.only in (None, "rotary"):
            rotary = kernel("rotary", Path(folder))
            for tokens in TOKENS[:1] if options.quick else TOKENS:
                for dtype in DTYPES:
                    torch._dynamo.reset()
                    medians = measure(rotary_ways(rotary, tokens, DTYPES[dtype]), now)
                    found.append(
                        {"operation": "rotary", "rows": tokens, "width": 40 * 128, "dtype": dtype, "us": medians}
                    )
                    show(found[-1])
    machine = {
        "torch": torch.__version__,
        "threads": options.threads,
        "cpu": platform.processor(),
        "load": os.getloadavg(),
    }
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "measured": found}, indent=1) + "\n")
    print(f"\nload over 1, 5 and 15 minutes: {', '.join(f'{value:.1f}' for value in machine['load'])}")


def show(row: dict) -> None:
    kernel = row["us"]["kernel"]
    others = "  ".join(f"{name} {us:9.1f} ({us / kernel:4.2f}x)" for name, us in row["us"].items() if name != "kernel")
    print(
        f"{row['operation']:18} {row['rows']:5} x {row['width']:<5} {row['dtype']:8} kernel {kernel:9.1f}  {others}",
        flush=True,
    )


if __name__ == "__main__":
    main()
