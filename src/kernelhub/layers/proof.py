"""capture -> equal? -> faster?: each kernel beside the original forward, on the calls that the model makes.

The kernels are not on the model yet: a layer runs its original among originals, so that an error of one kernel is not
taken for another's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from kernelhub.errors import InvalidReference, NoKernelForLayer
from kernelhub.layers import timing
from kernelhub.layers.capture import Call, Recorder, Sample, capture, original_forward
from kernelhub.layers.compare import COMPUTED, Comparison, compare, together
from kernelhub.layers.evidence import NOTHING, Evidence
from kernelhub.layers.fitness import is_special
from kernelhub.layers.mode import KernelizeFallback, Mode
from kernelhub.layers.outcome import Outcome, allow, where
from kernelhub.layers.replay import Effects, Replay, poisoned_memory
from kernelhub.layers.survey import Site
from kernelhub.layers.tolerance import Tolerance
from kernelhub.layers.values import tensors_in
from kernelhub.layers.workload import time_calls


@dataclass(frozen=True)
class Demand:
    """What is to be shown of each kernel, on what. `tolerance` None: the default of each dtype."""

    sample: Sample
    equal: bool
    tolerance: Tolerance | None
    faster: bool

    @classmethod
    def of(cls, sample_inputs: Any, verify: bool | Tolerance, only_if_faster: bool) -> Demand | None:
        """None where nothing is to be shown. Raises `InvalidReference` [ValueError] for what cannot be."""
        if not isinstance(verify, (bool, Tolerance)):
            raise InvalidReference(
                f"verify={verify!r}", hint="Expected True, False, Tolerance(rtol, atol) or Tolerance.exact()."
            )
        equal, faster = verify is not False, bool(only_if_faster)
        if not (equal or faster):
            if sample_inputs is None:
                return None
            raise InvalidReference(
                "sample_inputs without a question: nothing would be run on them",
                hint="Say verify=True, only_if_faster=True, or both.",
            )
        if sample_inputs is None:
            asked = "verify" if equal else "only_if_faster"
            raise InvalidReference(
                f"{asked}={verify if equal else True!r} needs sample_inputs: kernels are measured on the model's own inputs",
                hint="A tensor, a tuple of arguments, a mapping of keywords, or a function that runs the model.",
            )
        return cls(Sample.of(sample_inputs), equal, verify if isinstance(verify, Tolerance) else None, faster)


def prove(
    model: nn.Module,
    sites: list[Site],
    outcomes: list[Outcome],
    demand: Demand,
    mode: Mode,
    fallback: KernelizeFallback,
) -> list[Outcome]:
    """The outcomes with what was measured; a kernel that does not stand the test leaves the original and a reason.

    The layers of `model` run their originals. Raises `NoKernelForLayer` [ValueError] where `fallback` does not allow
    that, and what the model raises on the sample.
    """
    candidates = [site.module for site, outcome in zip(sites, outcomes, strict=True) if outcome.kernel is not None]
    if not candidates:
        return outcomes
    judge = _Judge(demand, mode, fallback, capture(model, candidates, demand.sample, mode))
    return [judge.outcome(site, outcome) for site, outcome in zip(sites, outcomes, strict=True)]


@dataclass(frozen=True)
class _Verdict:
    """What was found of a kernel on a layer: `case` and `reason` say why it may not stand there."""

    evidence: Evidence
    case: KernelizeFallback | None = None
    reason: str = ""


@dataclass
class _Judge:
    demand: Demand
    mode: Mode
    fallback: KernelizeFallback
    recorded: Mapping[int, Recorder]
    _verdicts: dict[tuple[int, int], _Verdict] = field(default_factory=dict)
    _races: dict[tuple[Any, ...], tuple[timing.Speed, str]] = field(default_factory=dict)

    def outcome(self, site: Site, outcome: Outcome) -> Outcome:
        """The outcome, after the test. A function that several modules call is tested once."""
        kernel, swap = outcome.kernel, outcome.swap
        if kernel is None or swap is None:
            return outcome
        key = id(site.module), id(kernel)
        if key not in self._verdicts:
            self._verdicts[key] = self._verdict(site, kernel.forward, swap.content)
        verdict = self._verdicts[key]
        if verdict.case is None:
            return outcome._replace(swap=replace(swap, evidence=verdict.evidence))
        if verdict.case not in self.fallback:
            raise NoKernelForLayer(f"{where(site)}: {kernel.repository}: {verdict.reason}", hint=allow(verdict.case))
        return Outcome(outcome.name, None, None, f"{kernel.repository}: {verdict.reason}", verdict.evidence)

    def _verdict(self, site: Site, function: Any, content: tuple[object, ...]) -> _Verdict:
        recorder = self.recorded[id(site.module)]
        calls = list(recorder.calls.values())
        recorder.calls.clear()  # the copies go when this layer is done
        unknown = _untestable(site.module, recorder, calls)
        case = KernelizeFallback.NOT_EQUAL if self.demand.equal else KernelizeFallback.NOT_FASTER
        if unknown:
            return _Verdict(NOTHING, case, unknown)
        replay = Replay(site.module, Mode.TRAINING in self.mode)
        with _training_state(site.module, replay.training):
            return self._tested(site, replay, MethodType(function, site.module), calls, content)

    def _tested(
        self, site: Site, replay: Replay, kernel: Any, calls: list[Call], content: tuple[object, ...]
    ) -> _Verdict:
        evidence = NOTHING
        if self.demand.equal:
            try:
                found, evidence = examine(replay, kernel, calls, self.demand.tolerance)
            except OriginalFailed as error:
                return _Verdict(NOTHING, KernelizeFallback.NOT_EQUAL, str(error))
            if found.difference:
                return _Verdict(evidence, KernelizeFallback.NOT_EQUAL, f"not equal: {found.difference}")
        if not self.demand.faster:
            return _Verdict(evidence)
        try:
            speed, path = self._speed(site, replay, kernel, calls, content)
        except Exception as error:  # noqa: BLE001 - whatever the kernel raises is what is wrong with it
            return _Verdict(evidence, KernelizeFallback.NOT_FASTER, f"timing it failed: {_first_line(error)}")
        evidence = replace(evidence, speedup=speed.ratio, speedup_low=speed.low, speedup_high=speed.high, timed_on=path)
        if speed.wins:
            return _Verdict(evidence)
        shared = "" if path == site.path else f", timed on {path}"
        return _Verdict(evidence, KernelizeFallback.NOT_FASTER, f"not faster: {speed}{shared}")

    def _speed(
        self, site: Site, replay: Replay, kernel: Any, calls: list[Call], content: tuple[object, ...]
    ) -> tuple[timing.Speed, str]:
        """How much faster the kernel is; layers of one kind with calls of one kind share what was measured of the first."""
        signatures = tuple((call.signature, call.autocast) for call in calls)
        key = (type(site.module), content, plain_attributes(site.module), _weight_kinds(site.module), signatures)
        if key not in self._races:
            self._races[key] = time_calls(replay, kernel, calls, self.mode), site.path
        return self._races[key]


def _untestable(module: nn.Module, recorder: Recorder, calls: list[Call]) -> str:
    """Why nothing can be shown of the layer; empty where it can."""
    weights = (*module.parameters(), *module.buffers())
    if any(is_special(type(item)) for item in weights):
        return "not tested: its weights are sharded or of a special kind, which are there only while the model runs"
    if any(item.device.type == "meta" for item in weights):
        return "not tested: its weights are offloaded, and there only while the model runs"
    if calls:
        return ""
    if recorder.left_out:
        return f"not tested: {recorder.left_out}"
    return "not tested: the sample inputs never reach it"


class OriginalFailed(RuntimeError):
    """The original forward cannot be run again on what it was called with, so that there is nothing to compare with."""


class KernelFailed(RuntimeError):
    """The kernel raised on a call that the original answers."""


def examine(replay: Replay, kernel: Any, calls: list[Call], tolerance: Tolerance | None) -> tuple[Comparison, Evidence]:
    """The kernel's forward beside the original's on each call. Raises `OriginalFailed`.

    Each call is made three times: as it was, with other values, and again as it was, in memory full of NaN. What a kernel
    keeps from one call to the next, or reads before it wrote it, shows; and so does a result of the first call that the
    second changed, because it is looked at after that.
    """
    original = original_forward(replay.module)
    found, references = [], set()
    for call in calls:
        comparison, reference = _examine_call(replay, original, kernel, call, tolerance)
        found.append(comparison)
        references.add(reference)
        if comparison.difference:
            break
    whole = together(found)
    measured = whole.share >= 0
    evidence = Evidence(
        reference="float64" if references == {"float64"} else "original",
        calls=len(found),
        max_error=whole.max_error if measured else None,
        max_relative_error=whole.max_relative_error if measured else None,
        worst=whole.worst,
    )
    return whole, evidence


def _examine_call(
    replay: Replay, original: Any, kernel: Any, call: Call, tolerance: Tolerance | None
) -> tuple[Comparison, str]:
    expected = _original(replay, original, call)
    precise = None if tolerance == Tolerance.exact() else _precise(replay, original, call, expected, tolerance)
    reference = "original" if precise is None else "float64"
    try:
        first = _run(replay, kernel, call)
        others = _with_other_values(replay, original, kernel, call, expected, tolerance)
        # Only now: the call with other values may have written into what the first returned.
        runs = [compare(first, expected, precise, tolerance)]
        with poisoned_memory():
            again = _run(replay, kernel, call)
    except KernelFailed as error:
        return Comparison(str(error), share=float("inf")), reference
    runs += [_said(others, "called with other values in between: ")] if others else []
    runs += [_said(compare(again, expected, precise, tolerance), "called again: ")]
    return together(runs), reference


def _run(replay: Replay, kernel: Any, call: Call) -> Effects:
    """The call with the kernel, to its end on the device: what goes wrong on a GPU is raised later."""
    try:
        effects = replay.run(kernel, call)
        for device in {leaf.device for leaf in tensors_in(dict(effects.values)) if leaf.device.type == "cuda"}:
            torch.cuda.synchronize(device)
    except Exception as error:
        raise KernelFailed(f"the kernel raises {_first_line(error)}") from error
    return effects


def _said(comparison: Comparison, text: str) -> Comparison:
    if not comparison.difference:
        return comparison
    return replace(comparison, difference=text + comparison.difference)


def _original(replay: Replay, original: Any, call: Call) -> Effects:
    try:
        return replay.run(original, call)
    except Exception as error:
        raise OriginalFailed(f"not tested: the original cannot be run by itself: {_first_line(error)}") from error


def _precise(
    replay: Replay, original: Any, call: Call, expected: Effects, tolerance: Tolerance | None
) -> Effects | None:
    """The original in float64; None where it cannot be run so, or is then another function than before."""
    if not any(leaf.dtype.is_floating_point for leaf in tensors_in(dict(expected.values))):
        return None
    try:
        precise = replay.run_in_float64(original, call)
    except Exception:  # noqa: BLE001 - many ops have no float64; the original as it is will do
        return None
    if any(name.startswith(COMPUTED) for name in expected.values.keys() - precise.values.keys()):
        return None
    own = compare(_in_dtype_of(precise, expected), expected, None, tolerance)
    return None if own.difference else precise


def _in_dtype_of(precise: Effects, expected: Effects) -> Effects:
    values = dict(expected.values)
    for name, value in precise.values.items():
        like = values.get(name)
        if isinstance(like, torch.Tensor) and isinstance(value, torch.Tensor):
            values[name] = value.to(like.dtype)
    return Effects(values)


def _with_other_values(
    replay: Replay, original: Any, kernel: Any, call: Call, expected: Effects, tolerance: Tolerance | None
) -> Comparison | None:
    """The same kind of call with other values, where the original makes sense of them."""
    other = call.altered()
    if other is None:
        return None
    try:
        reference = _original(replay, original, other)
    except OriginalFailed:
        return None
    if _special(reference) and not _special(expected):
        return None
    precise = None if tolerance == Tolerance.exact() else _precise(replay, original, other, reference, tolerance)
    return compare(_run(replay, kernel, other), reference, precise, tolerance)


def _special(effects: Effects) -> bool:
    tensors = (leaf for leaf in tensors_in(dict(effects.values)) if leaf.dtype.is_floating_point)
    return any(not bool(leaf.isfinite().all()) for leaf in tensors)


@contextmanager
def _training_state(module: nn.Module, training: bool) -> Iterator[None]:
    """The layer in the training state of the mode, as it was in the recorded run."""
    flags = [(child, child.training) for child in module.modules()]
    if module.training != training:
        module.train(training)
    try:
        yield
    finally:
        for child, flag in flags:
            child.training = flag


def plain_attributes(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """The settings of a layer and its children (eps, activation, sizes): what is no tensor and no module, by name."""
    found = []
    for path, child in module.named_modules():
        for name, value in child.__dict__.items():
            if not name.startswith("_") and not isinstance(value, (torch.Tensor, nn.Module)):
                found.append(
                    (
                        f"{path}.{name}",
                        repr(value)
                        if not callable(value)
                        else getattr(value, "__qualname__", type(value).__qualname__),
                    )
                )
    return tuple(found)


def _weight_kinds(module: nn.Module) -> tuple[Any, ...]:
    named = (*module.named_parameters(), *module.named_buffers())
    return tuple(
        (name, item.dtype, tuple(item.shape), tuple(item.stride()), item.device, item.requires_grad)
        for name, item in named
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
