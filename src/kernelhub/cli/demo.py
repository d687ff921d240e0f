"""`kernelhub demo`: real architectures, kernelized with the kernels that come with this package, checked and timed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low, quantiles
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelhub import __version__
from kernelhub.cli.demo_models import Case, built_in_cases, model_case
from kernelhub.cli.options import Json
from kernelhub.cli.render import show_json, show_note
from kernelhub.cli.render_demo import show_demo
from kernelhub.core.words import counted
from kernelhub.errors import MissingDependency
from kernelhub.hub.disk import writing

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kernelhub.layers.mapping import KernelMapping
    from kernelhub.layers.report_values import KernelReport

# The largest difference of an output, over the largest output. Every layer's own rounding is part of it, so it is wider
# than what one layer is held to; on a CPU the kernels give the same bits.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
WARMUP = 2
ROUNDS = 15
REPEATS = 3  # of each measurement in a round; the fastest counts, so that interruptions do not
STEPS = 8  # one-token steps that are timed together
# Only kernels that are equal and faster on what the model does with them, measured in this run.
PROVEN = {"verify": True, "only_if_faster": True, "refresh": True}

Model = Annotated[
    str | None, typer.Option(metavar="NAME|FOLDER", help="A model that transformers can load, in place of the three.")
]
Save = Annotated[Path | None, typer.Option(metavar="FILE", help="Write what --json prints to this file too.")]


@dataclass(frozen=True)
class Times:
    """Seconds before and after, a pair per round, in which both saw the same weather."""

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """How many times as long before as after, by round."""
        return [before / after for before, after in zip(self.before, self.after, strict=True)]

    @property
    def middle(self) -> tuple[float, float]:
        """Before and after in the round with the median ratio: medians of each may be those of different weather."""
        pairs = sorted(zip(self.before, self.after, strict=True), key=lambda pair: (pair[0] / pair[1], pair[0]))
        return pairs[(len(pairs) - 1) // 2]  # of equal ratios, as of the same model twice, the median time

    @property
    def speedup(self) -> float:
        """The median of the rounds' ratios."""
        return median_low(self.ratios)

    @property
    def speedup_range(self) -> tuple[float, float]:
        """What the middle half of the rounds' ratios lies between; with 1 inside, no difference was measured."""
        if len(self.ratios) < 2:
            return self.speedup, self.speedup
        low, _, high = quantiles(self.ratios, n=4, method="inclusive")
        return min(low, self.speedup), high  # of an even number the lower of both in the middle is the median

    def to_dict(self) -> dict[str, Any]:
        before, after = self.middle
        return {
            "before_ms": before * 1e3,
            "after_ms": after * 1e3,
            "speedup": self.speedup,
            "speedup_range": list(self.speedup_range),
        }


@dataclass(frozen=True)
class Comparison:
    """A model before and after: what was swapped, how far its outputs moved, how long a forward takes.

    `report` is of the model with every kernel that there is for it, `proof` of the model with those kernels alone that
    were equal to the original and faster on this machine, each measured on what the model calls its layer with.
    `max_error` is the largest difference of an output over the largest output, in both; `restored` says that the outputs
    after `unkernelize` are those from before, bit for bit. `forward` is the time of the whole input (`inputs` says which),
    `step` that of one more token, with the input's keys and values kept; None where the model does not go on by tokens.
    What is timed after is the model of `proof`; where no kernel is faster, that is the model from before.
    """

    name: str
    device: str
    dtype: str
    inputs: str
    report: KernelReport
    proof: KernelReport
    unreached: Mapping[str, str]
    max_error: float
    tolerance: float
    restored: bool
    forward: Times
    step: Times | None

    @property
    def problems(self) -> tuple[str, ...]:
        """Why this is no success; empty where it is one."""
        found = []
        if not self.report.kernels:
            found.append("no layer runs a kernel")
        if not self.max_error <= self.tolerance:
            found.append(
                f"the outputs differ by {self.max_error:.2g} of the largest, and {self.tolerance:g} is allowed"
            )
        if wrong := [row.path for row in self.proof.rows if "not equal" in row.reason]:
            found.append(
                f"the kernels of {counted(len(wrong), 'layer')} are not equal to what they stand for, such as {wrong[0]}"
            )
        if not self.restored:
            found.append("the outputs after unkernelize are not those from before")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "device": self.device,
            "dtype": self.dtype,
            "inputs": self.inputs,
            "layers": len(self.report.rows),
            "kernels": len(self.report.kernels),
            "faster": len(self.proof.kernels),
            "max_error": self.max_error,
            "tolerance": self.tolerance,
            **self.forward.to_dict(),
            "step": None if self.step is None else self.step.to_dict(),
            "restored": self.restored,
            "problems": list(self.problems),
            "unreached": dict(self.unreached),
            "report": self.report.to_dict(),
            "proof": self.proof.to_dict(),
        }


@dataclass(frozen=True)
class Demo:
    """The comparisons of one run."""

    comparisons: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        return bool(self.comparisons) and not any(comparison.problems for comparison in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kernelhub": __version__,
            "ok": self.ok,
            "models": [comparison.to_dict() for comparison in self.comparisons],
        }


def demo(model: Model = None, save: Save = None, as_json: Json = False) -> int:
    """Kernelize real models (Llama, Gemma 3, BERT; random weights), check and time them; 1 if that is no success."""
    _needs_transformers()
    cases = [model_case(model)] if model is not None else built_in_cases()
    result = run_demo(cases, rounds=ROUNDS)
    if save is not None:
        _write(save, result)
    if as_json:
        show_json(result.to_dict())
    else:
        show_demo(result)
    return 0 if result.ok else 1


def run_demo(cases: list[Case], mapping: KernelMapping | None = None, *, rounds: int) -> Demo:
    """Compare each model with itself; `mapping` None is what comes with this package."""
    found = []
    for case in cases:
        show_note(f"{case.name}: kernelized, proven, timed; this takes some seconds")
        found.append(compare(case, mapping, rounds=rounds))
    return Demo(tuple(found))


def compare(case: Case, mapping: KernelMapping | None = None, *, rounds: int) -> Comparison:
    """Kernelize the model, check its outputs against those from before, and time both in turns.

    Checked with every kernel that there is, timed with those that were measured to be faster. Each round times both, so
    that both see the same weather. The model is left as it came, but for the names of its layers.
    """
    import torch

    from kernelhub.integrations.transformers import mark
    from kernelhub.layers.kernelize import unkernelize
    from kernelhub.layers.report import kernel_report

    model, device = case.model, next(case.model.parameters()).device
    unreached = mark(model).unreached
    with torch.no_grad():
        expected = _outputs(case)
        _kernelize(model, mapping)
        report, max_error = kernel_report(model), difference(expected, _outputs(case))
        unkernelize(model)
        _kernelize(model, mapping, sample_inputs=lambda: _forward(case), **PROVEN)
        proof, max_error = kernel_report(model), max(max_error, difference(expected, _outputs(case)))
        unkernelize(model)
        restored = _same(expected, _outputs(case))
        faster = [row.path for row in proof.kernels]
        taken = [_round(case, mapping, faster, index % 2 == 0) for index in range(WARMUP + rounds)][WARMUP:]
        unkernelize(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Comparison(
        name=case.name,
        device=_device_name(device),
        dtype=dtype,
        inputs=_shapes(case),
        report=report,
        proof=proof,
        unreached=unreached,
        max_error=max_error,
        tolerance=TOLERANCES.get(dtype, max(TOLERANCES.values())),
        restored=restored,
        forward=Times(tuple(before[0] for before, _ in taken), tuple(after[0] for _, after in taken)),
        step=Times(tuple(before[1] for before, _ in taken), tuple(after[1] for _, after in taken))
        if case.steps
        else None,
    )


def difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """The largest difference of an output over the largest output, over all outputs; infinite where they do not match."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return float("inf")
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        old, new = old.double().cpu(), new.double().cpu()
        error = (new - old).abs()[~_equal(old, new)]
        if error.numel():
            largest = old[old.isfinite()].abs().max() if old.isfinite().any() else old.new_tensor(0.0)
            ratio = float(error.max() / largest.clamp_min(1e-30))
            worst = max(worst, ratio if ratio == ratio else float("inf"))  # NaN where there was none
    return worst


def _equal(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where two tensors are equal, element by element; a NaN and a NaN are."""
    return (one == other) | (one.isnan() & other.isnan())


# Running them


def _round(
    case: Case, mapping: KernelMapping | None, layers: list[str], before_first: bool
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of a forward and of a step, before and with the kernels of `layers`; who is first takes turns."""
    from kernelhub.layers.kernelize import unkernelize

    seconds = {}
    for kernelized in (False, True) if before_first else (True, False):
        if kernelized and not layers:
            continue
        unkernelize(case.model)
        if kernelized:
            _kernelize(case.model, mapping, include=layers)
        _forward(case)  # the first after a switch finds cold caches
        seconds[kernelized] = min(_time(case) for _ in range(REPEATS)), _step_time(case) if case.steps else 0.0
    return seconds[False], seconds[True] if layers else seconds[False]  # without kernels it is the same model


def _kernelize(model: nn.Module, mapping: KernelMapping | None, **options: Any) -> None:
    """Let the model run the kernels; the options are those of `kernelize`."""
    from kernelhub.integrations.transformers import default_mapping
    from kernelhub.layers.kernelize import kernelize
    from kernelhub.layers.mapping import use_kernel_mapping
    from kernelhub.layers.mode import Mode

    chosen = default_mapping() if mapping is None else mapping
    with use_kernel_mapping(chosen, inherit_mapping=False), _no_warning_of_none():
        kernelize(model, mode=Mode.INFERENCE, **options)


@contextmanager
def _no_warning_of_none() -> Iterator[None]:
    """That nothing was swapped is what the demo itself says, and ends with 1 for."""
    import warnings

    from kernelhub.errors import KernelHubWarning

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs no kernel", category=KernelHubWarning)
        yield


def _outputs(case: Case) -> list[torch.Tensor]:
    """The floating-point tensors of one forward, wherever they lie in what it returns, and the logits of a step."""
    import torch

    def tensors(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield from tensors(item)
        elif isinstance(value, Mapping):
            yield from tensors(list(value.values()))

    found = list(tensors(case.model(**case.inputs)))
    return [*found, _step(case, *_filled(case)).logits] if case.steps else found


def _same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return [tensor.shape for tensor in before] == [tensor.shape for tensor in after] and all(
        bool(_equal(old, new).all()) for old, new in zip(before, after, strict=True)
    )


def _shapes(case: Case) -> str:
    """The sizes of what the model is given: `input_ids 2 x 128`."""
    import torch

    shapes = {name: value.shape for name, value in case.inputs.items() if isinstance(value, torch.Tensor)}
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())


def _forward(case: Case) -> Any:
    return case.model(**case.inputs)


def _time(case: Case) -> float:
    """Seconds of one forward."""
    device = next(case.model.parameters()).device
    _wait(device)
    start = time.perf_counter()
    _forward(case)
    _wait(device)
    return time.perf_counter() - start


def _step_time(case: Case) -> float:
    """Seconds of one more token after the input: the mean of a few, after one that is not counted."""
    token, cache = _filled(case)
    _step(case, token, cache)
    taken = []
    for _ in range(REPEATS):
        _wait(token.device)
        start = time.perf_counter()
        for _ in range(STEPS):
            _step(case, token, cache)
        _wait(token.device)
        taken.append((time.perf_counter() - start) / STEPS)
    return min(taken)


def _filled(case: Case) -> tuple[torch.Tensor, Any]:
    """A token, and the keys and values of the input's first row."""
    ids = case.inputs["input_ids"][:1]
    return ids[:, :1], case.model(input_ids=ids, use_cache=True).past_key_values


def _step(case: Case, token: torch.Tensor, cache: Any) -> Any:
    return case.model(input_ids=token, past_key_values=cache, use_cache=True)


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def _needs_transformers() -> None:
    import importlib.util

    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"the demo needs {' and '.join(missing)}", packages=["'kernelhub[demo]'"])


def _write(path: Path, result: Demo) -> None:
    with writing(path):
        path.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
