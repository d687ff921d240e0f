"""A kernel's forward beside the original's, on one call after the other: all that comes of both is compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kernelhub.layers.capture import Call
from kernelhub.layers.compare import COMPUTED, Comparison, compare, together
from kernelhub.layers.evidence import Evidence
from kernelhub.layers.replay import Effects, Replay, may_be_lifted, poisoned_memory
from kernelhub.layers.tolerance import Tolerance
from kernelhub.layers.values import tensors_in
from kernelhub.layers.workload import Side


class OriginalFailed(RuntimeError):
    """The original forward cannot be run again on what it was called with, so that there is nothing to compare with."""


class KernelFailed(RuntimeError):
    """The kernel raised on a call that the original answers."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"the kernel raises {first_line(error)}")
        # Another time there may be more memory, or a device that still answers: nothing is to be learnt from this.
        self.passing = isinstance(error, (MemoryError, *_PASSING)) or "allocate memory" in str(error)


_PASSING = tuple(getattr(torch, name) for name in ("OutOfMemoryError", "AcceleratorError") if hasattr(torch, name))


def examine(
    replay: Replay, original: Side, kernel: Side, calls: list[Call], tolerance: Tolerance | None
) -> tuple[str, Evidence]:
    """Where the kernel's forward differs from the original's on each call (empty: nowhere), and by how much.

    Each call is made three times: as it was, with other values, and again as it was, in memory full of NaN. What a kernel
    keeps from one call to the next, or reads before it wrote it, shows; and so does a result of the first call that the
    second changed, because it is looked at after that. Raises `OriginalFailed`, and `KernelFailed` where that says nothing
    of the kernel.
    """
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
    return whole.difference, evidence


def _examine_call(
    replay: Replay, original: Side, kernel: Side, call: Call, tolerance: Tolerance | None
) -> tuple[Comparison, str]:
    expected = _original(replay, original, call)
    precise = None if tolerance == Tolerance.exact() else _precise(replay, original, call, expected, tolerance)
    reference = "original" if precise is None else "float64"
    try:
        first = _run(replay, kernel.run, call)
        others = _with_other_values(replay, original, kernel, call, expected, tolerance)
        # Only now: the call with other values may have written into what the first returned.
        runs = [compare(first, expected, precise, tolerance)]
        again = [] if kernel.compiled is None else [_run(replay, kernel.run, call)]
        with poisoned_memory():  # as it is written: a compiled frame would be compiled once more for this
            again.append(_run(replay, kernel.written, call))
    except KernelFailed as error:
        if error.passing:
            raise
        return Comparison(str(error), share=float("inf")), reference
    runs += [_said(others, "called with other values in between: ")] if others else []
    runs += [_said(compare(effects, expected, precise, tolerance), "called again: ") for effects in again]
    return together(runs), reference


def _run(replay: Replay, kernel: Any, call: Call) -> Effects:
    """The call with the kernel, to its end on the device: what goes wrong on a GPU is raised later."""
    try:
        effects = replay.run(kernel, call)
        for device in {leaf.device for leaf in tensors_in(dict(effects.values)) if leaf.device.type == "cuda"}:
            torch.cuda.synchronize(device)
    except Exception as error:
        raise KernelFailed(error) from error
    return effects


def _said(comparison: Comparison, text: str) -> Comparison:
    if not comparison.difference:
        return comparison
    return replace(comparison, difference=text + comparison.difference)


def _original(replay: Replay, original: Side, call: Call) -> Effects:
    try:
        return replay.run(original.run, call)
    except Exception as error:
        raise OriginalFailed(f"not tested: the original cannot be run by itself: {first_line(error)}") from error


def _precise(
    replay: Replay, original: Side, call: Call, expected: Effects, tolerance: Tolerance | None
) -> Effects | None:
    """The original in float64; None where it cannot be run so, or is then another function than before."""
    if not any(leaf.dtype.is_floating_point for leaf in tensors_in(dict(expected.values))):
        return None
    if not may_be_lifted(replay.module):
        return None
    try:
        precise = replay.run_in_float64(original.written, call)
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
    replay: Replay, original: Side, kernel: Side, call: Call, expected: Effects, tolerance: Tolerance | None
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
    return compare(_run(replay, kernel.run, other), reference, precise, tolerance)


def _special(effects: Effects) -> bool:
    tensors = (leaf for leaf in tensors_in(dict(effects.values)) if leaf.dtype.is_floating_point)
    return any(not bool(leaf.isfinite().all()) for leaf in tensors)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
