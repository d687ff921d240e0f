"""Benchmarks that kernels bring: `benchmarks/benchmark*.py`, run, checked and summarised.

A script has classes with `benchmark_<workload>` methods. For each workload a new instance gets `kernel` and `device`, then
`setup_<workload>` (or `setup`) makes the inputs, `benchmark_<workload>` is timed, and `verify_<workload>`, where there is
one, gives what `self.out` (or what the benchmark returned) must be equal to; it is timed too, as the reference.

    from kernelhub import Benchmark

    class Relu(Benchmark):
        def setup(self):
            self.x = torch.randn(1024, 1024, device=self.device)

        def benchmark_square(self):
            self.out = self.kernel.relu(self.x)

        def verify_square(self):
            return torch.relu(self.x)
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kernelhub.errors import InvalidReference

if TYPE_CHECKING:
    import torch

# Relative and absolute differences that pass, per dtype: those of torch.testing.assert_close, twice.
TOLERANCES = {"float16": (2e-3, 2e-5), "bfloat16": (3.2e-2, 2e-5), "float32": (2.6e-6, 2e-5), "float64": (2e-7, 2e-7)}
TOLERANCES |= {
    "complex32": TOLERANCES["float16"],
    "complex64": TOLERANCES["float32"],
    "complex128": TOLERANCES["float64"],
}


class Benchmark:
    """The base of a kernel's benchmarks; `kernel`, `device` and, from `seed`, the random state are set before `setup`."""

    kernel: Any = None
    device: str = "cpu"
    seed: int | None = None
    out: Any = None

    def setup(self) -> None:
        """Make the inputs, as attributes of self."""


@dataclass(frozen=True)
class Summary:
    """Times in seconds: the median, and the 95 % confidence interval of the median."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Measurement:
    """One workload. `reference` is the time of `verify_*`; `max_error` and `equal` are None where there is none."""

    benchmark: str
    workload: str
    kernel: Summary
    reference: Summary | None = None
    max_error: float | None = None
    equal: bool | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster than the reference."""
        return self.reference.median / self.kernel.median if self.reference else None


def summarize(times: Sequence[float]) -> Summary:
    """The median with its confidence interval, by order statistics: nothing is assumed of how times are distributed.

    The interval lies between the ranks n/2 -+ 0.98 sqrt(n), the binomial's 2.5 % and 97.5 % points. It is the range of all
    where there are few.

    >>> summarize([3.0, 1.0, 2.0])
    Summary(median=2.0, low=1.0, high=3.0, count=3)
    """
    ordered, count = sorted(times), len(times)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    margin = 0.98 * math.sqrt(count)
    low, high = math.floor(count / 2 - margin), math.ceil(count / 2 + margin)
    return Summary(middle, ordered[max(low, 0)], ordered[min(high, count - 1)], count)


def scripts(folder: Path) -> list[Path]:
    """The scripts in a `benchmarks` folder. Raises `InvalidReference` where there is none."""
    found = sorted(folder.glob("benchmark*.py"))
    if not found:
        raise InvalidReference(f"{folder} has no benchmarks", hint="Expected benchmark*.py in it.")
    return found


def run_script(
    script: Path, kernel: ModuleType, device: str, *, rounds: int = 100, warmup: int = 10
) -> Iterator[Measurement]:
    """Run every workload of a script, one after the other.

    Raises `InvalidReference` where the script has no benchmarks. What the script raises goes through.
    """
    module = _import(script)
    classes = [
        value
        for name, value in sorted(vars(module).items())
        if inspect.isclass(value) and value.__name__ == name and _workloads(value)
    ]
    if not classes:
        raise InvalidReference(f"{script} has no class with benchmark_* methods")
    for benchmark in classes:
        for workload in _workloads(benchmark):
            yield _measure(benchmark, workload, kernel, device, rounds, warmup)


def _workloads(benchmark: type) -> list[str]:
    """The names of a class's workloads, in the order in which they are written."""
    names: dict[str, None] = {}
    for base in reversed(benchmark.__mro__):
        names.update(dict.fromkeys(name for name in vars(base) if name.startswith("benchmark_")))
    return [name.removeprefix("benchmark_") for name in names]


def _measure(benchmark: type, workload: str, kernel: ModuleType, device: str, rounds: int, warmup: int) -> Measurement:
    import torch

    instance = benchmark()
    instance.kernel, instance.device = kernel, device
    torch.manual_seed(getattr(instance, "seed", None) or 0)
    getattr(instance, f"setup_{workload}", instance.setup)()
    timed: Callable[[], Any] = getattr(instance, f"benchmark_{workload}")
    reference: Callable[[], Any] | None = getattr(instance, f"verify_{workload}", None)
    calls = [timed, reference] if reference else [timed]
    max_error, equal = None, None
    if reference:
        given = timed()
        out = getattr(instance, "out", None)
        max_error, equal = compare(given if out is None else out, reference())
    times = _times(calls, device, rounds, warmup)
    return Measurement(
        benchmark.__name__,
        workload,
        summarize(times[0]),
        summarize(times[1]) if reference else None,
        max_error,
        equal,
    )


def _times(calls: Sequence[Callable[[], Any]], device: str, rounds: int, warmup: int) -> list[list[float]]:
    """Seconds of each call, taken in turns: what slows the machine for a while slows all of them."""
    wait = _synchronizer(device)
    found: list[list[float]] = [[] for _ in calls]
    for number in range(warmup + rounds):
        for times, call in zip(found, calls, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            if number >= warmup:
                times.append(time.perf_counter() - start)
    return found


def _synchronizer(device: str) -> Callable[[], None]:
    """What waits until a device has done what it was given."""
    import torch

    kind = torch.device(device).type
    module = getattr(torch, kind, None)
    wait: Callable[[], None] = getattr(module, "synchronize", None) or (lambda: None)
    return wait


def compare(given: Any, expected: Any) -> tuple[float | None, bool]:
    """The largest difference, and whether it is within the tolerance of the dtype; of several tensors the worst.

    Whole numbers are compared exactly. Infinities and NaNs in the same places are equal; else the difference is infinite.
    """
    import torch

    if isinstance(expected, torch.Tensor):
        if not isinstance(given, torch.Tensor) or given.shape != expected.shape:
            return None, False
        return _compare_tensors(given, expected)
    if isinstance(expected, (tuple, list)) and isinstance(given, (tuple, list)) and len(given) == len(expected):
        pairs = [compare(one, other) for one, other in zip(given, expected, strict=True)]
        errors = [error for error, _ in pairs if error is not None]
        return max(errors, default=None), all(equal for _, equal in pairs)
    return None, bool(given == expected)


def _compare_tensors(given: torch.Tensor, expected: torch.Tensor) -> tuple[float | None, bool]:
    import torch

    relative, absolute = TOLERANCES.get(str(given.dtype).removeprefix("torch."), (0.0, 0.0))
    whole = not any(item.is_floating_point() or item.is_complex() for item in (given, expected))
    dtype = torch.complex128 if given.is_complex() or expected.is_complex() else torch.float64
    given, expected = given.detach().cpu(), expected.detach().cpu()
    one, other = given.to(dtype), expected.to(dtype)
    same = (one == other) | (one.isnan() & other.isnan())
    error = (one - other).abs()
    if whole:  # float64 has 53 bits
        difference = given.to(torch.int64) - expected.to(torch.int64)
        same &= difference == 0
        error = torch.where(error < 2.0**62, difference.abs().to(torch.float64), error)
    error = error.masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    close = same | (error.isfinite() & (error <= absolute + relative * other.abs()))
    return (error.max().item() if error.numel() else 0.0), bool(close.all())


class _SourceLoader(SourceFileLoader):
    """Compiles the source: bytecode is neither read, whoever left it there, nor written into a store's folder."""

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _import(script: Path) -> ModuleType:
    name = f"_kernelhub_benchmark_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script, loader=_SourceLoader(name, str(script)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _importable_as_kernels():
        spec.loader.exec_module(module)
    return module


def _has_kernels_package() -> bool:
    """Whether it is installed: a folder of that name on the path imports too, and has nothing in it."""
    loaded = sys.modules.get("kernels")
    spec = loaded.__spec__ if loaded else importlib.util.find_spec("kernels")
    return spec is not None and spec.origin is not None


@contextmanager
def _importable_as_kernels() -> Iterator[None]:
    """Scripts that import `Benchmark` from the `kernels` package run without it, and with it where it is installed."""
    if _has_kernels_package():
        yield
        return
    package, module = ModuleType("kernels"), ModuleType("kernels.benchmark")
    for stand_in in (package, module):
        stand_in.Benchmark = Benchmark  # type: ignore[attr-defined]
    before: dict[str, ModuleType] = {
        name: sys.modules[name] for name in ("kernels", "kernels.benchmark") if name in sys.modules
    }
    sys.modules.update({"kernels": package, "kernels.benchmark": module})
    try:
        yield
    finally:
        del sys.modules["kernels"], sys.modules["kernels.benchmark"]
        sys.modules.update(before)
