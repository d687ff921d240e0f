"""The CUDA kernels beside eager, `F.*`, torch.compile, Liger, quack and this package's own Triton kernels, in one run.

    python benchmarks/gpu_kernels.py [--json FILE] [--plot FILE] [--only TEXT] [--no-models] [--cache DIR]

Of each the **device** time, the median over replays of a CUDA graph of many calls, divided by the calls; where a processor
decides, also the **host** time, what 200 calls without waiting take it, each (small shapes), or the time of an **uncaptured** call
(backward), alone, with the device idle before it, and **in a row** with others, of which none is waited for. The ways of a row take turns, so that what slows the machine down for a while slows all of them; times that a
processor decides are taken in three visits, since one that others share is slow for seconds. The share is the fewest bytes
that the operation must move, over its device time, over the bandwidth of a copy measured in the same run; above 100 % data lies
in the cache, or more is read than written. Peers that are not installed, or do not run here, are left out and the reason is printed; where one of ours fails, the
run does. `NOTES.md` has figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernelhub
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.settings import Settings

DTYPE = torch.bfloat16
Way = Callable[[], object]
RMS_SHAPES = ((1, 4096), (64, 4096), (4096, 2048), (8192, 4096), (16384, 8192), (4096, 16384))
BACKWARD_SHAPES = ((8192, 4096), (16384, 8192))
LAYER_SHAPES = ((8192, 4096), (16384, 8192))
REPLAY_US = 3000.0  # of one graph, about
REPLAYS, TURNS, VISITS = 15, 5, 3
IN_A_ROW = 20  # calls


# Ours compiled, ours in Triton (what a machine without a compiler runs), and the others.
OURS = ("ours", "triton")


@dataclass(frozen=True)
class Kernels:
    """One starter kernel, compiled for this GPU, and its noarch build."""

    compiled: ModuleType
    noarch: ModuleType


def kernel(name: str, folder: Path) -> Kernels:
    found = []
    for build in ("always", "never"):
        set_default_hub(Hub(settings=Settings(cache=folder / build, offline=True, build=build)))
        try:
            found.append(kernelhub.get_kernel(f"kernelhub/{name}", version=1))
        finally:
            set_default_hub(None)
    kernels = Kernels(*found)
    if not kernels.compiled.compiled.HERE or kernels.noarch.compiled.HERE:
        raise RuntimeError(f"expected kernelhub/{name} compiled and as a noarch build; found {found}")
    return kernels


@cache
def stream() -> torch.cuda.Stream:
    """Graphs are captured on this one."""
    return torch.cuda.Stream()


def graph_of(way: Way, calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream()):
        for _ in range(calls):
            way()
    return graph


@dataclass(frozen=True)
class Replay:
    """A graph of so many calls that a replay takes long enough to be timed, and no launch waits for the processor."""

    graph: torch.cuda.CUDAGraph
    calls: int

    @classmethod
    def of(cls, way: Way) -> Replay:
        torch.cuda.synchronize()
        with torch.cuda.stream(stream()):
            for _ in range(3):
                way()
        torch.cuda.synchronize()
        few = cls(graph_of(way, 4), 4)
        few.us()
        calls = max(4, min(500, int(REPLAY_US / statistics.median(few.us() for _ in range(5)))))
        return cls(graph_of(way, calls), calls)

    def us(self) -> float:
        """Device time of a call."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / self.calls


def device_us(replays: dict[str, Replay]) -> dict[str, float]:
    """Of each way, in turns: in each turn a replay that is not timed, which finds the caches as another way left them."""
    found: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(TURNS):
        for name, replay in replays.items():
            replay.us()
            found[name] += [replay.us() for _ in range(REPLAYS // TURNS)]
    return {name: statistics.median(times) for name, times in found.items()}


def host_us(way: Way) -> float:
    """What a call takes the processor; the device is idle before and may still be at work after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        way()
    return (time.perf_counter() - start) / 200 * 1e6


def uncaptured_us(way: Callable[[], object]) -> float:
    """Device time between two events around a call as it is, which begins when the processor has got there."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream()):
        start.record()
        way()
        stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


def uncaptured_in_a_row_us(way: Way) -> float:
    """Of a call, where several are made and none is waited for: of device and processor, the time of the slower one."""

    def several() -> None:
        for _ in range(IN_A_ROW):
            way()

    return uncaptured_us(several) / IN_A_ROW


def copy_bandwidth() -> float:
    """Bytes read and written a second, of a copy that no cache holds, in GB/s."""
    source = torch.randn(1 << 31, device="cuda").to(DTYPE)
    target = torch.empty_like(source)
    # in a graph another engine copies, at 2,700 GB/s
    us = statistics.median(uncaptured_us(lambda: target.copy_(source)) for _ in range(REPLAYS))
    return 2 * source.numel() * source.element_size() / us / 1e3


class Peers:
    """The peers' functions; None and a reason where there are none."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.liger = self._import("liger", "liger_kernel.ops", "liger_kernel.transformers")
        self.quack = self._import("quack", "quack.rmsnorm")

    def _import(self, name: str, *modules: str) -> ModuleType | None:
        import importlib

        try:
            found = [importlib.import_module(module) for module in modules]
        except Exception as error:  # noqa: BLE001  (whatever keeps a peer from running is told, and the others run)
            self.missing[name] = f"{type(error).__name__}: {error}"
            return None
        return found[0]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(DTYPE)


def eager_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def operands(rows: int, width: int, weights: int) -> list[Tensor]:
    return [randn(rows, width), *(randn(width) for _ in range(weights))]


def rms_norm(peers: Peers, norm: Kernels, x: Tensor, w: Tensor) -> dict[str, Way]:
    compiled = torch.compile(eager_rms)
    ways: dict[str, Way] = {
        "eager": lambda: eager_rms(x, w, 1e-6),
        "F": lambda: F.rms_norm(x, w.shape, w, 1e-6),
        "compile": lambda: compiled(x, w, 1e-6),
        "ours": lambda: norm.compiled.rms_norm(x, w, 1e-6),
        "triton": lambda: norm.noarch.rms_norm(x, w, 1e-6),
    }
    if peers.liger:
        ways["liger"] = lambda: peers.liger.LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)
    if peers.quack:
        ways["quack"] = lambda: peers.quack.rmsnorm(x, w, eps=1e-6)
    return ways


def layer_norm(peers: Peers, norm: Kernels, x: Tensor, w: Tensor, b: Tensor) -> dict[str, Way]:
    compiled = torch.compile(lambda x, w, b: F.layer_norm(x, w.shape, w, b))
    ways: dict[str, Way] = {
        "F": lambda: F.layer_norm(x, w.shape, w, b),
        "compile": lambda: compiled(x, w, b),
        "ours": lambda: norm.compiled.layer_norm(x, w, b),
        "triton": lambda: norm.noarch.layer_norm(x, w, b),
    }
    if peers.liger:
        ways["liger"] = lambda: peers.liger.LigerLayerNormFunction.apply(x, w, b, 1e-5)
    if peers.quack and not x.requires_grad:  # it has no backward
        wide = w.float(), b.float()  # which it wants weights to be
        ways["quack"] = lambda: peers.quack.layernorm_fwd(x, *wide, eps=1e-5)
    return ways


def backward(forward: Callable[..., dict[str, Way]], rows: int, width: int, weights: int) -> dict[str, Way]:
    of, grad = [x.requires_grad_() for x in operands(rows, width, weights)], randn(rows, width)
    return {name: backward_of(way, of, grad) for name, way in forward(*of).items()}


def backward_of(way: Callable[[], Tensor], of: list[Tensor], grad: Tensor) -> Way:
    """The backward of a forward that the first call does: on the stream of all that is measured, where autograd will run it."""
    kept: list[Tensor] = []

    def backward() -> object:
        if not kept:
            with torch.enable_grad(), torch.cuda.stream(stream()):
                kept.append(way())
            torch.cuda.synchronize()
        return torch.autograd.grad(kept[0], of, grad, retain_graph=True)

    return backward


def product(peers: Peers, activation: Kernels, function: str, rows: int, width: int) -> dict[str, Way]:
    a, b = randn(rows, width), randn(rows, width)
    formula = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}[function]
    compiled = torch.compile(lambda a, b: formula(a) * b)
    ours, triton = (getattr(build, f"{function}_and_mul") for build in (activation.compiled, activation.noarch))
    ways: dict[str, Way] = {
        "eager": lambda: formula(a) * b,
        "compile": lambda: compiled(a, b),
        "ours": lambda: ours(a, b),
        "triton": lambda: triton(a, b),
    }
    if peers.liger:
        theirs = {"silu": "LigerSiLUMulFunction", "gelu_tanh": "LigerGELUMulFunction"}[function]
        ways["liger"] = lambda: getattr(peers.liger, theirs).apply(a, b)
    return ways


def rotary(peers: Peers, rotary: Kernels, batch: int, heads: int, few: int, tokens: int) -> dict[str, Way]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = randn(batch, tokens, heads, 128).transpose(1, 2), randn(batch, tokens, few, 128).transpose(1, 2)
    cos, sin = randn(1, tokens, 128), randn(1, tokens, 128)
    original = getattr(apply_rotary_pos_emb, "__wrapped__", apply_rotary_pos_emb)
    compiled = torch.compile(original)
    ways: dict[str, Way] = {
        "eager": lambda: original(q, k, cos, sin),
        "compile": lambda: compiled(q, k, cos, sin),
        "ours": lambda: rotary.compiled.apply_rotary(q, k, cos, sin),
        "triton": lambda: rotary.noarch.apply_rotary(q, k, cos, sin),
    }
    if peers.liger:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        ways["liger"] = lambda: liger_rotary_pos_emb(q, k, cos, sin)
    if peers.quack:
        from quack.rotary import apply_rotary_emb

        heads_of, tables = [x.transpose(1, 2) for x in (q, k)], [x[0, :, :64].contiguous() for x in (cos, sin)]
        ways["quack"] = lambda: [apply_rotary_emb(x, *tables) for x in heads_of]  # it takes one of the two
    return ways


@dataclass(frozen=True)
class Operation:
    """One row."""

    name: str
    shape: str
    bytes: int  # that must be moved
    make: Callable[[], dict[str, Way]]
    timers: tuple[Callable[[Way], float], ...] = ()  # of what a processor decides; their names are the row's keys


def operations(peers: Peers, folder: Path) -> Iterator[Operation]:
    norm, activation, turned = (kernel(name, folder) for name in ("norm", "activation", "rotary"))
    rms, layer = (partial(forward, peers, norm) for forward in (rms_norm, layer_norm))
    for rows, width in RMS_SHAPES:
        make = partial(lambda *shape: rms(*operands(*shape)), rows, width, 1)
        yield Operation("RMSNorm", f"{rows} x {width}", 4 * rows * width, make, (host_us,) if rows <= 64 else ())
    for rows, width in BACKWARD_SHAPES:
        make = partial(backward, rms, rows, width, 1)
        yield Operation(
            "RMSNorm backward", f"{rows} x {width}", 6 * rows * width, make, (uncaptured_us, uncaptured_in_a_row_us)
        )
    for function, rows in (("silu", 1), ("silu", 8192), ("gelu_tanh", 8192)):
        make = partial(product, peers, activation, function, rows, 14336)
        yield Operation(
            f"{function}(a) * b", f"{rows} x 14336", 6 * rows * 14336, make, (host_us,) if rows == 1 else ()
        )
    size = 4 * 4096 * 40 * 128 * 4
    yield Operation("rotary", "4 x (32 + 8) x 4096 x 128", size, partial(rotary, peers, turned, 4, 32, 8, 4096))
    for rows, width in LAYER_SHAPES:
        make = partial(lambda *shape: layer(*operands(*shape)), rows, width, 2)
        yield Operation("LayerNorm", f"{rows} x {width}", 4 * rows * width, make)
    for rows, width in BACKWARD_SHAPES:
        make = partial(backward, layer, rows, width, 2)
        yield Operation(
            "LayerNorm backward", f"{rows} x {width}", 6 * rows * width, make, (uncaptured_us, uncaptured_in_a_row_us)
        )


def measure_operations(peers: Peers, folder: Path, only: str | None, copy: float) -> list[dict[str, Any]]:
    found = []
    chosen = [row for row in operations(peers, folder) if only is None or only in f"{row.name} {row.shape}"]
    if not chosen:
        raise SystemExit(f"no operation has {only!r} in its name and shape")
    for operation in chosen:
        row = measure_device(operation, copy, peers.missing)
        found.append(row)
        show(row)
        gc.collect()
        torch.cuda.empty_cache()
    timed = [(operation, row) for operation, row in zip(chosen, found, strict=True) if operation.timers]
    visits = [[measure_again(operation, list(row["device_us"])) for operation, row in timed] for _ in range(VISITS)]
    for (operation, row), *times in zip(timed, *visits, strict=True):
        for what in (timer.__name__ for timer in operation.timers):
            row[what] = {
                way: statistics.median(us for visit in times for us in visit[what][way]) for way in row["device_us"]
            }
            show_again(row, what)
    return found


def measure_device(operation: Operation, copy: float, missing: dict[str, str]) -> dict[str, Any]:
    """The row so far; ways that do not run are added to `missing`, with the reason."""
    torch._dynamo.reset()
    replays = {}
    with torch.no_grad():
        for way, call in operation.make().items():
            try:
                for _ in range(5):
                    call()
                replays[way] = Replay.of(call)
            except Exception as error:  # whatever keeps a peer from running is told, and the others run
                if way in OURS:
                    raise
                torch.cuda.synchronize()
                place = f"{way}: {operation.name} {operation.shape}"
                missing[place] = f"{type(error).__name__}: {str(error)[:200]}"
                print(f"  {place} does not run: {missing[place]}")
        times = device_us(replays)
    row: dict[str, Any] = {"operation": operation.name, "shape": operation.shape, "bytes": operation.bytes}
    row["device_us"] = times
    row["share"] = {way: operation.bytes / us / 1e3 / copy for way, us in times.items()}
    row["best_peer_over_ours"] = best_peer_over_ours(times)
    return row


def best_peer_over_ours(times: dict[str, float]) -> float:
    return min(us for way, us in times.items() if way not in OURS) / times["ours"]


def measure_again(operation: Operation, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Of those ways, by each of the operation's timers; compiled anew, as what was compiled before is another row's by now."""
    torch._dynamo.reset()
    with torch.no_grad():
        made = operation.make()
        ways = {name: made[name] for name in names}
        for way in ways.values():
            for _ in range(5):
                way()
        found: dict[str, dict[str, list[float]]] = {}
        for timer in operation.timers:
            times = found[timer.__name__] = {name: [] for name in ways}
            for _ in range(REPLAYS // VISITS):
                for name, way in ways.items():
                    times[name].append(timer(way))
    return found


def show(row: dict[str, Any]) -> None:
    cells = "; ".join(f"{way} {us:.2f} us {row['share'][way]:.0%}" for way, us in row["device_us"].items())
    ratio = f"best peer / ours {row['best_peer_over_ours']:.3f}"
    print(f"{row['operation']:18} {row['shape']:26} {cells}  {ratio}", flush=True)


def show_again(row: dict[str, Any], what: str) -> None:
    cells = "; ".join(f"{way} {us:.1f} us" for way, us in row[what].items())
    ratio = f"best peer / ours {best_peer_over_ours(row[what]):.2f}"
    print(
        f"{row['operation']:18} {row['shape']:26} {what.removesuffix('_us').replace('_', ' ')}: {cells}  {ratio}",
        flush=True,
    )


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
    for name in ("triton", "transformers", "liger-kernel", "quack-kernels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar per way for each row: its share of a copy's bandwidth."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    ways = [
        way
        for way in ("eager", "F", "compile", "liger", "quack", "triton", "ours")
        if any(way in row["share"] for row in rows)
    ]
    figure, axis = plt.subplots(figsize=(11, 0.62 * len(rows) + 1.5))
    height = 0.8 / len(ways)
    for number, way in enumerate(ways):
        places = [at + (number - len(ways) / 2) * height for at, row in enumerate(rows) if way in row["share"]]
        axis.barh(places, [100 * row["share"][way] for row in rows if way in row["share"]], height, label=way)
    axis.set_yticks(range(len(rows)), [f"{row['operation']}\n{row['shape']}" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("bytes that must be moved, over device time, in % of a copy's bandwidth")
    axis.axvline(100, color="grey", linewidth=0.7)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", metavar="TEXT", help="operations and shapes with this in their names")
    parser.add_argument("--no-models", action="store_true")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the kernels built for this there")
    options = parser.parse_args()
    torch.manual_seed(0)
    peers = Peers()
    for name, reason in peers.missing.items():
        print(f"without {name}: {reason}")
    copy = copy_bandwidth()
    print(f"copy {copy:.0f} GB/s on {torch.cuda.get_device_name()}")
    result: dict[str, Any] = {
        "machine": {"gpu": torch.cuda.get_device_name(), "cores": os.cpu_count(), **versions()},
        "date": datetime.now(timezone.utc).date().isoformat(),
        "copy_gb_s": copy,
        "without": peers.missing,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        result["operations"] = measure_operations(peers, folder, options.only, copy)
        result["copy_gb_s_after"] = copy_bandwidth()
        save(result, options.json)  # the models take as long again
        if not options.no_models:
            from gpu_models import measure_models

            result["models"] = {}
            for name, row in measure_models(folder / "always"):
                result["models"][name] = row
                save(result, options.json)
    if options.plot:
        plot(result["operations"], options.plot)


def save(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
