"""The loss kernel beside eager, `F.cross_entropy` and torch.compile, in turn, in one run; and the memory it takes.

    python benchmarks/cpu_loss.py [--json FILE] [--only PART-OF-A-NAME] [--threads N] [--processor-time]

Prints medians in milliseconds of calls in turn, and how many times as long as the kernel each of the others takes. For
the projection with its loss it also prints the most memory that a forward and backward holds beyond its inputs, as
PyTorch's allocator counts it. `NOTES.md` has figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from cpu_kernels import kernel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROWS, FEATURES = 512, 512
VOCABULARIES = (32000, 128256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS, SECONDS = 5, 2.0
Way = Callable[[], object]


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """What transformers' loss computes."""
    return F.cross_entropy(logits.float(), labels)


def trained(function: Callable[..., Tensor], *tensors: Tensor) -> Way:
    """A forward and a backward of a function of leaves."""
    leaves = [x for x in tensors if x.requires_grad]
    return lambda: torch.autograd.grad(function(*tensors), leaves)


def untrained(function: Callable[..., Tensor], *tensors: Tensor) -> Way:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    return call


def cases(loss: object) -> Iterator[tuple[str, dict[str, Way]]]:
    """Each operation with its ways, made when it is asked for: the logits are large."""
    for classes in VOCABULARIES:
        for name, dtype in DTYPES.items():
            torch._dynamo.reset()
            labels = torch.randint(0, classes, (ROWS,))
            logits = torch.randn(ROWS, classes).to(dtype).requires_grad_()
            ways = {
                "kernel": loss.cross_entropy,
                "eager": eager,
                "F": F.cross_entropy,
                "compile": torch.compile(eager),
            }
            if dtype is torch.float32:
                del ways["F"]  # is what eager is
            for kind, made in (("forward", untrained), ("forward + backward", trained)):
                yield (
                    f"cross_entropy {kind}, {ROWS} x {classes} {name}",
                    {way: made(function, logits, labels) for way, function in ways.items()},
                )
            del logits
    for name, dtype in DTYPES.items():
        labels = torch.randint(0, VOCABULARIES[0], (2 * ROWS,))
        hidden = torch.randn(2 * ROWS, FEATURES).to(dtype).requires_grad_()
        weight = (torch.randn(VOCABULARIES[0], FEATURES) / FEATURES**0.5).to(dtype).requires_grad_()

        def separate(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return eager(F.linear(hidden, weight), labels)

        yield (
            f"linear_cross_entropy, {2 * ROWS} x {FEATURES} to {VOCABULARIES[0]} {name}",
            {
                "kernel": trained(loss.linear_cross_entropy, hidden, weight, labels),
                "eager": trained(separate, hidden, weight, labels),
            },
        )


def measure(of: dict[str, Way], now: Callable[[], float]) -> dict[str, float]:
    for way in of.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in of}
    stop = time.perf_counter() + SECONDS
    while time.perf_counter() < stop or len(times["kernel"]) < ROUNDS:
        for name, way in of.items():
            start = now()
            way()
            times[name].append(now() - start)
    return {name: statistics.median(found) * 1e3 for name, found in times.items()}


def peak(way: Way) -> int:
    """The most bytes that are allocated at a time while `way` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="only operations with this in their name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="time on the processor, not by the clock")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        loss = kernel("loss", Path(folder))
        for name, ways in cases(loss):
            if options.only not in name:
                continue
            row = {
                "operation": name,
                "ms": measure(ways, time.thread_time if options.processor_time else time.perf_counter),
            }
            if name.startswith("linear"):
                row["peak"] = {way: peak(call) for way, call in ways.items()}
            found.append(row)
            show(row)
    machine = {"torch": torch.__version__, "threads": options.threads, "load": os.getloadavg()}
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "measured": found}, indent=1) + "\n")
    print(f"\nload over 1, 5 and 15 minutes: {', '.join(f'{value:.1f}' for value in machine['load'])}")


def show(row: dict) -> None:
    mine = row["ms"]["kernel"]
    others = "  ".join(f"{name} {ms:8.1f} ({ms / mine:4.2f}x)" for name, ms in row["ms"].items() if name != "kernel")
    memory = "  ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in row.get("peak", {}).items())
    print(f"{row['operation']:58} kernel {mine:8.1f}  {others}  {memory}", flush=True)


if __name__ == "__main__":
    main()
