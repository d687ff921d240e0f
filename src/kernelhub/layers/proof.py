"""capture -> equal? -> faster? -> the fastest: each kernel beside the original forward, on the calls that the model makes.

The kernels are not on the model yet: a layer runs its original among originals, so that an error of one kernel is not
taken for another's. What was found before, of the same kernel for the same kind of layer and calls, is not found again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

from torch import nn

from kernelhub.errors import InvalidReference, NoKernelForLayer
from kernelhub.layers import timing
from kernelhub.layers.capture import Call, Recorder, Sample, capture, original_forward
from kernelhub.layers.evidence import NOTHING, Evidence
from kernelhub.layers.examine import KernelFailed, OriginalFailed, examine, first_line
from kernelhub.layers.fitness import is_special
from kernelhub.layers.kernel import LayerKernel, Swap
from kernelhub.layers.mode import KernelizeFallback, Mode
from kernelhub.layers.outcome import Outcome, allow, where
from kernelhub.layers.replay import Replay
from kernelhub.layers.survey import Site
from kernelhub.layers.tolerance import Tolerance
from kernelhub.layers.verdicts import Equality, Key, Memory, Timing, key_of, tolerance_facts
from kernelhub.layers.workload import Frames, Side, time_calls

_log = logging.getLogger("kernelhub")


@dataclass(frozen=True)
class Demand:
    """What is to be shown of each kernel, on what. `tolerance` None: the default of each dtype; `refresh`: anew."""

    sample: Sample
    equal: bool
    tolerance: Tolerance | None
    faster: bool
    refresh: bool = False

    @classmethod
    def of(
        cls, sample_inputs: Any, verify: bool | Tolerance, only_if_faster: bool, refresh: bool = False
    ) -> Demand | None:
        """None where nothing is to be shown. Raises `InvalidReference` [ValueError] for what cannot be."""
        if not isinstance(verify, (bool, Tolerance)):
            raise InvalidReference(
                f"verify={verify!r}", hint="Expected True, False, Tolerance(rtol, atol) or Tolerance.exact()."
            )
        equal, faster = verify is not False, bool(only_if_faster)
        if not (equal or faster):
            if sample_inputs is None and not refresh:
                return None
            what = "refresh=True" if sample_inputs is None else "sample_inputs"
            raise InvalidReference(
                f"{what} without a question: nothing would be measured",
                hint="Say verify=True, only_if_faster=True, or both.",
            )
        if sample_inputs is None:
            asked = "verify" if equal else "only_if_faster"
            raise InvalidReference(
                f"{asked}={verify if equal else True!r} needs sample_inputs: kernels are measured on the model's own inputs",
                hint="A tensor, a tuple of arguments, a mapping of keywords, or a function that runs the model.",
            )
        given = verify if isinstance(verify, Tolerance) else None
        return cls(Sample.of(sample_inputs), equal, given, faster, bool(refresh))


def prove(
    model: nn.Module,
    sites: list[Site],
    outcomes: list[Outcome],
    demand: Demand,
    mode: Mode,
    fallback: KernelizeFallback,
    memory: Memory,
) -> list[Outcome]:
    """The outcomes with what was measured; of several kernels the fastest, and where none stands the test the original.

    The layers of `model` run their originals. Raises `NoKernelForLayer` [ValueError] where `fallback` does not allow
    that, and what the model raises on the sample.
    """
    candidates = [site.module for site, outcome in zip(sites, outcomes, strict=True) if outcome.kernel is not None]
    if not candidates:
        return outcomes
    recorded = capture(model, candidates, demand.sample, mode)
    judge = _Judge(demand, mode, memory, recorded, Counter(map(id, candidates)))
    choices = [judge.choice(site, outcome) for site, outcome in zip(sites, outcomes, strict=True)]
    judge.remember()
    return [
        outcome if choice is None else _settled(site, outcome, choice, fallback)
        for site, outcome, choice in zip(sites, outcomes, choices, strict=True)
    ]


@dataclass(frozen=True)
class _Verdict:
    """What was found of a kernel on a layer: `case` and `reason` say why it may not stand there."""

    kernel: LayerKernel
    swap: Swap
    evidence: Evidence
    case: KernelizeFallback | None = None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kernel.repository}: {self.reason}"


def _settled(site: Site, outcome: Outcome, verdicts: list[_Verdict], fallback: KernelizeFallback) -> Outcome:
    """The fastest of the kernels that stand the test (not timed: the first), or the original."""
    standing = [verdict for verdict in verdicts if verdict.case is None]
    if not standing:
        for verdict in verdicts:
            if verdict.case is not None and verdict.case not in fallback:
                raise NoKernelForLayer(f"{where(site)}: {verdict}", hint=allow(verdict.case))
        swap = verdicts[0].swap
        reason = "; ".join([*swap.lost, *map(str, verdicts)])
        return Outcome(outcome.name, None, None, reason, verdicts[0].evidence)
    best = max(standing, key=lambda verdict: verdict.evidence.speedup or 0.0)
    lost = [str(verdict) if verdict.case else _slower(verdict, best) for verdict in verdicts if verdict is not best]
    swap = replace(best.swap, evidence=best.evidence, lost=(*best.swap.lost, *lost))
    return Outcome(outcome.name, best.kernel, swap)


def _slower(verdict: _Verdict, best: _Verdict) -> str:
    found = verdict.evidence
    return (
        f"{verdict.kernel.repository}: {found.speedup:.2f}x, and {best.kernel.repository} {best.evidence.speedup:.2f}x"
    )


@dataclass
class _Judge:
    """Tests each kernel on each layer; `users` is how many sites have a module, whose calls are kept until the last."""

    demand: Demand
    mode: Mode
    memory: Memory
    recorded: Mapping[int, Recorder]
    users: Counter[int]
    _choices: dict[tuple[int, ...], list[_Verdict]] = field(default_factory=dict)
    _found: dict[str, tuple[Key, LayerKernel, list[Equality]]] = field(default_factory=dict)
    _timings: dict[str, tuple[Timing, str | None]] = field(default_factory=dict)
    _frames: Frames = field(default_factory=Frames)

    def choice(self, site: Site, outcome: Outcome) -> list[_Verdict] | None:
        """What was found of the kernels for a layer; None where there are none. A function of several is tested once."""
        kernel, swap = outcome.kernel, outcome.swap
        if kernel is None or swap is None:
            return None
        candidates = [(kernel, swap), *outcome.others]
        key = (id(site.module), *(id(one) for one, _ in candidates))
        if key not in self._choices:
            self._choices[key] = self._tested(site, candidates)
        self.users[id(site.module)] -= 1
        if not self.users[id(site.module)]:
            self.recorded[id(site.module)].calls.clear()  # the copies go when this layer is done
        return self._choices[key]

    def remember(self) -> None:
        """Keep what was found: of a kind of layer, what holds for all of them that the model has."""
        for key, kernel, found in self._found.values():
            if len({not one.difference for one in found}) > 1:
                _log.debug("%s is equal for some layers of a kind: they are compared each time", kernel.repository)
                self.memory.forget(key, kernel.loaded)
                continue
            whole = found[0]
            for one in found[1:]:
                whole = whole.with_(one)
            self.memory.keep(key, whole, kernel.loaded)

    def _tested(self, site: Site, candidates: list[tuple[LayerKernel, Swap]]) -> list[_Verdict]:
        recorder, found = self.recorded[id(site.module)], []
        calls = list(recorder.calls.values())
        unknown = _untestable(site.module, recorder, calls)
        case = KernelizeFallback.NOT_EQUAL if self.demand.equal else KernelizeFallback.NOT_FASTER
        replay = Replay(site.module, Mode.TRAINING in self.mode)
        with _training_state(site.module, replay.training):
            for kernel, swap in candidates:
                if unknown:
                    found.append(_Verdict(kernel, swap, NOTHING, case, unknown))
                    continue
                found.append(_Test(self, site, replay, kernel, swap, calls).verdict())
                if found[-1].case is None and not self.demand.faster:
                    break  # the first that is equal
        return found


@dataclass(frozen=True)
class _Test:
    """One kernel on one layer."""

    judge: _Judge
    site: Site
    replay: Replay
    kernel: LayerKernel
    swap: Swap
    calls: list[Call]

    def verdict(self) -> _Verdict:
        judge, evidence = self.judge, NOTHING
        key = key_of(self.site.module, self.kernel, self.calls, judge.mode)
        if judge.demand.equal:
            try:
                difference, evidence = self._equality(key)
            except (OriginalFailed, KernelFailed) as error:
                return self._refused(NOTHING, KernelizeFallback.NOT_EQUAL, str(error))
            if difference:
                return self._refused(evidence, KernelizeFallback.NOT_EQUAL, f"not equal: {difference}")
        if not judge.demand.faster:
            return _Verdict(self.kernel, self.swap, evidence)
        try:
            found, when = self._timing(key)
        except Exception as error:  # noqa: BLE001 - whatever the kernel raises is what is wrong with it
            return self._refused(evidence, KernelizeFallback.NOT_FASTER, f"timing it failed: {first_line(error)}")
        speed = timing.Speed(found.ratio, found.low, found.high)
        evidence = replace(
            evidence,
            speedup=speed.ratio,
            speedup_low=speed.low,
            speedup_high=speed.high,
            timed_on=found.path,
            remembered=min(filter(None, (evidence.remembered, when)), default=None),
        )
        if speed.wins:
            return _Verdict(self.kernel, self.swap, evidence)
        shared = "" if found.path == self.site.path else f", timed on {found.path}"
        return self._refused(evidence, KernelizeFallback.NOT_FASTER, f"not faster: {speed}{shared}")

    def _refused(self, evidence: Evidence, case: KernelizeFallback, reason: str) -> _Verdict:
        return _Verdict(self.kernel, self.swap, evidence, case, reason)

    def _sides(self, key: Key | None) -> tuple[Side, Side]:
        """Original and kernel, as they are written and as the mode runs them."""
        module = self.site.module
        forwards = original_forward(module), MethodType(self.kernel.forward, module)
        if Mode.TORCH_COMPILE not in self.judge.mode:
            return Side(forwards[0]), Side(forwards[1])
        kind = str(key.facts["layer"]) if key else str(id(module))
        original, kernel = (Side(forward, self.judge._frames.of(forward, kind)) for forward in forwards)
        return original, kernel

    def _equality(self, key: Key | None) -> tuple[str, Evidence]:
        """Where the kernel differs from the original, if it does: remembered, or looked at."""
        judge, tolerance = self.judge, self.judge.demand.tolerance
        key = key and key.of("equal", tolerance=tolerance_facts(tolerance))
        known = judge.memory.recall(key, Equality)
        if known is not None:
            found, when = known
            measured = (found.calls, found.max_error, found.max_relative_error, found.worst)
            return found.difference, Evidence(found.reference, *measured, remembered=when)
        difference, evidence = examine(self.replay, *self._sides(key), self.calls, tolerance)
        if key is not None:
            _, _, listed = judge._found.setdefault(key.name, (key, self.kernel, []))
            reference, errors = str(evidence.reference), (evidence.max_error, evidence.max_relative_error)
            listed.append(Equality(difference, reference, evidence.calls, *errors, evidence.worst))
        return difference, evidence

    def _timing(self, key: Key | None) -> tuple[Timing, str | None]:
        """How much faster the kernel is. Layers of one kind with calls of one kind share what was measured of the first."""
        judge, key = self.judge, key and key.of("faster")
        name = key.name if key else f"{id(self.site.module)} {id(self.kernel)}"
        if name not in judge._timings:
            known = judge.memory.recall(key, Timing)
            judge._timings[name] = known or (self._timed(key), None)
        return judge._timings[name]

    def _timed(self, key: Key | None) -> Timing:
        speed = time_calls(self.replay, *self._sides(key), self.calls)
        found = Timing(speed.ratio, speed.low, speed.high, self.site.path)
        if key is not None:
            self.judge.memory.keep(key, found, self.kernel.loaded)
        return found


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
