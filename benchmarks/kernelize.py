"""How long `kernelize` takes per kernel-aware layer, beside the `kernels` package in the same run.

    python benchmarks/kernelize.py [--layers 10000] [--rounds 7] [--json]

Both packages get the same model (a list of RMSNorm layers), the same kernel, already loaded, and their own registration
of it. They take turns, each on a model that is not kernelized, and medians are compared; the walk over the modules alone
is measured beside them. The `kernels` package is looked for in `.peers` and where Python finds it.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
LAYERS = """
import torch
from torch import nn

class RMSNorm(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
"""


class Norm(nn.Module):
    """The layer that is kernelized."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def write_kernel(folder: Path) -> Path:
    build = folder / "build" / "torch-cpu"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text("from . import layers\n")
    (build / "layers.py").write_text(LAYERS)
    metadata = {
        "name": "norm",
        "id": "_norm_benchmark",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (build / "metadata.json").write_text(json.dumps(metadata))
    return folder


def ours(repository: Path, layers: int) -> tuple[Callable[[], object], nn.Module]:
    import kernelhub

    cls = type("OurNorm", (Norm,), {})
    kernelhub.replace_kernel_forward_from_hub(cls, "RMSNorm")
    layer = kernelhub.LocalLayerRepository(repository, layer_name="RMSNorm")
    kernelhub.register_kernel_mapping({"RMSNorm": {"cpu": {kernelhub.Mode.INFERENCE: layer}}}, inherit_mapping=False)
    model = nn.Sequential(*(cls() for _ in range(layers)))
    return lambda: kernelhub.kernelize(model, mode=kernelhub.Mode.INFERENCE), model


def theirs(repository: Path, layers: int) -> tuple[Callable[[], object], nn.Module] | None:
    sys.path.append(str(ROOT / ".peers"))
    try:
        import kernels
    except ImportError:
        return None
    cls = type("TheirNorm", (Norm,), {})
    kernels.replace_kernel_forward_from_hub(cls, "RMSNorm")
    layer = kernels.LocalLayerRepository(repository, layer_name="RMSNorm")
    kernels.register_kernel_mapping({"RMSNorm": {"cpu": {kernels.Mode.INFERENCE: layer}}}, inherit_mapping=False)
    model = nn.Sequential(*(cls() for _ in range(layers)))
    return lambda: kernels.kernelize(model, mode=kernels.Mode.INFERENCE), model


def restore(models: list[nn.Module]) -> None:
    """Make the models what they were; `kernels` has no function for that, and sets nothing but the forward."""
    import kernelhub

    for model in models:
        kernelhub.unkernelize(model)
        for module in model.modules():
            module.__dict__.pop("forward", None)
    gc.collect()


def walk(model: nn.Module) -> None:
    for _ in model.named_modules():
        pass


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """How long it took on the clock, and of the processor: on a machine that others use the two differ."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(layers: int, rounds: int) -> dict[str, Any]:
    """Medians in us per layer, clock and processor; the packages take turns in each round."""
    with tempfile.TemporaryDirectory() as folder:
        repository = write_kernel(Path(folder))
        our_run, model = ours(repository, layers)
        peer = theirs(repository, layers)
        runs: dict[str, Callable[[], object]] = {"walk": lambda: walk(model), "kernelhub": our_run}
        if peer is not None:
            runs["kernels"] = peer[0]
        for run in runs.values():
            run()  # the kernel is loaded from here on
        models = [model] if peer is None else [model, peer[1]]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                restore(models)
                times[name].append(seconds(run))
    found: dict[str, Any] = {"layers": layers, "rounds": rounds}
    for index, unit in enumerate(("clock_us", "processor_us")):
        found[unit] = {
            name: statistics.median(pair[index] for pair in pairs) / layers * 1e6 for name, pairs in times.items()
        }
        if peer is not None:
            found[unit]["ratio"] = found[unit]["kernels"] / found[unit]["kernelhub"]
    return found


def show(result: dict[str, Any]) -> None:
    print(f"{result['layers']} layers, median of {result['rounds']} rounds, us per layer")
    print(f"{'':24}{'clock':>8}{'processor':>11}")
    titles = {
        "walk": "walk over the modules",
        "kernelhub": "kernelhub",
        "kernels": "kernels",
        "ratio": "kernels / kernelhub",
    }
    for name, title in titles.items():
        if name in result["clock_us"]:
            print(f"{title:24}{result['clock_us'][name]:8.2f}{result['processor_us'][name]:11.2f}")
    if "kernels" not in result["clock_us"]:
        print("kernels is not installed, and not in .peers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    result = measure(arguments.layers, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
