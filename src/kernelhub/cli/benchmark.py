"""`kernelhub benchmark`: a kernel's own benchmarks, timed beside their references."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelhub.cli.options import Backend, Json, Trust
from kernelhub.cli.render import show_json, show_table

if TYPE_CHECKING:
    from kernelhub.benchmark import Measurement, Summary


def benchmark(
    kernel: Annotated[str, typer.Argument(metavar="DIR|ORG/NAME@v1", help="A project, a repository, or a name.")] = ".",
    backend: Backend = None,
    trust: Trust = None,
    rounds: Annotated[int, typer.Option(min=3, help="How often each workload is timed.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="How often it runs before that.")] = 10,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the times into this .svg or .png (needs matplotlib).")
    ] = None,
    as_json: Json = False,
) -> int:
    """Run a kernel's benchmarks: medians with their 95 % confidence intervals, beside the references. Ends with 1 if a
    result is not equal to its reference."""
    from kernelhub.benchmark import run_script, scripts

    figures = _figures(plot) if plot else None  # before anything is measured
    folder, module = _kernel(kernel, backend, trust or [])
    device = _device(backend)
    found = [
        measurement
        for script in scripts(folder)
        for measurement in run_script(script, module, device, rounds=rounds, warmup=warmup)
    ]
    name = Path(kernel).resolve().name if Path(kernel).name in ("", "..") else kernel  # a picture outlives its folder
    if plot:
        _plot(figures, found, plot, f"{name} on {device}")
    if as_json:
        show_json({"kernel": kernel, "device": device, "benchmarks": [_row(item) for item in found]})
    else:
        show_table(f"{name} on {device}", _COLUMNS, [_cells(item) for item in found])
    return 1 if any(item.equal is False for item in found) else 0


def _kernel(kernel: str, backend: str | None, trust: list[str]) -> tuple[Path, ModuleType]:
    """The folder that has the benchmarks, and the kernel's module."""
    from kernelhub.core.refs import KernelRef
    from kernelhub.errors import InvalidReference
    from kernelhub.hub.client import Hub

    hub = Hub()
    try:
        ref = KernelRef.of(kernel)
    except InvalidReference:
        path = Path(kernel)
        if not path.is_dir():
            raise
        return path / "benchmarks", hub.load_local(path, backend=backend, trust_remote_code=trust).module
    # A whole name is one, also where a folder has it: what lies in the current folder is not what the user trusts.
    folder = hub.benchmarks(ref, trust_remote_code=trust)
    return folder, hub.load(ref, backend=backend, trust_remote_code=trust).module


def _device(backend: str | None) -> str:
    """The device that a backend's kernels run on; the CPU where there is none to see."""
    import torch

    from kernelhub.core.backends import BY_NAME
    from kernelhub.hub.probe import detect_host

    device = BY_NAME[backend or detect_host().backend].device
    return "cpu" if device == "cuda" and not torch.cuda.is_available() else device


_COLUMNS = ("benchmark", "workload", "median", "95 % interval", "reference", "speedup", "max error", "equal")


def _cells(item: Measurement) -> tuple[Any, ...]:
    return (
        item.benchmark,
        item.workload,
        _time(item.kernel.median),
        f"{_time(item.kernel.low)} to {_time(item.kernel.high)}",
        _time(item.reference.median) if item.reference else None,
        f"{item.speedup:.2f}x" if item.speedup else None,
        f"{item.max_error:.3g}" if item.max_error is not None else None,
        None if item.equal is None else ("yes" if item.equal else "NO"),
    )


def _time(seconds: float) -> str:
    """`0.00123` -> "1.230 ms"."""
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"


def _row(item: Measurement) -> dict[str, Any]:
    return {
        "benchmark": item.benchmark,
        "workload": item.workload,
        "kernel": _seconds(item.kernel),
        "reference": _seconds(item.reference) if item.reference else None,
        "speedup": item.speedup,
        "max_error": item.max_error if item.max_error is not None and math.isfinite(item.max_error) else None,
        "equal": item.equal,
    }


def _seconds(summary: Summary) -> dict[str, Any]:
    return {
        "median_seconds": summary.median,
        "low_seconds": summary.low,
        "high_seconds": summary.high,
        "count": summary.count,
    }


def _figures(path: Path) -> Any:
    """What draws into such a file. Raises `InvalidReference` for one that cannot be written, `MissingDependency`."""
    from kernelhub.errors import InvalidReference, MissingDependency

    if path.suffix not in (".svg", ".png"):
        raise InvalidReference(f"--plot {path} is neither a .svg nor a .png", hint="Such as --plot times.svg.")
    if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
        raise InvalidReference(f"--plot {path} cannot be written", hint="Name a file in a folder that is there.")
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingDependency("drawing needs matplotlib", packages=["'kernelhub[benchmark]'"]) from error


def _plot(figures: Any, found: list[Measurement], path: Path, title: str) -> None:
    """Bars of the medians with their intervals, the kernel beside its reference."""
    from kernelhub.hub.disk import writing

    figure = figures.Figure(figsize=(8, 1.2 + 0.6 * len(found)), layout="constrained")
    axes = figure.subplots()
    for offset, label in ((0.2, "kernel"), (-0.2, "reference")):
        summaries = [item.kernel if label == "kernel" else item.reference for item in reversed(found)]
        rows = [(number + offset, summary) for number, summary in enumerate(summaries) if summary]
        axes.barh(
            [at for at, _ in rows],
            [summary.median * 1e3 for _, summary in rows],
            height=0.36,
            label=label,
            xerr=[
                [(summary.median - summary.low) * 1e3 for _, summary in rows],
                [(summary.high - summary.median) * 1e3 for _, summary in rows],
            ],
        )
    axes.set_yticks(range(len(found)), [f"{item.benchmark} {item.workload}" for item in reversed(found)])
    axes.set_xlabel("milliseconds a call (median, 95 % interval)")
    axes.set_title(title)
    axes.legend()
    with writing(path):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
