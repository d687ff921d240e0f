"""Two sets of effects beside each other: where they differ by more than is allowed, and how much they differ at most."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernelhub.core.words import counted
from kernelhub.layers.replay import Effects
from kernelhub.layers.tolerance import Tolerance, tolerance_for

# A kernel may be this many times as far from the float64 reference as the original is.
ERROR_RATIO = 2.0

# What the names of computed results begin with.
COMPUTED = ("output", "gradient of ")
# A result, or what it holds itself: how a cache inside it keeps its tensors is the cache's affair.
_RESULT = re.compile(r"output(?:\.[^.\[]+|\[\d+\])?")


@dataclass(frozen=True)
class Comparison:
    """The largest errors, the name of the result with the worst (`share` of what is allowed), and the first difference.

    `difference` is empty where there is none.
    """

    difference: str = ""
    max_error: float = 0.0
    max_relative_error: float = 0.0
    worst: str | None = None
    share: float = -1.0

    def with_(self, other: Comparison) -> Comparison:
        """Both together."""
        worse = other if other.share > self.share else self
        return Comparison(
            self.difference or other.difference,
            max(self.max_error, other.max_error),
            max(self.max_relative_error, other.max_relative_error),
            worse.worst,
            worse.share,
        )


def together(comparisons: Iterable[Comparison]) -> Comparison:
    found = Comparison()
    for comparison in comparisons:
        found = found.with_(comparison)
    return found


def compare(kernel: Effects, original: Effects, precise: Effects | None, given: Tolerance | None) -> Comparison:
    """The kernel's effects beside the original's. `precise` are the original's in float64, where there are any."""
    found = []
    for name in {**original.values, **kernel.values}:
        if name not in kernel.values:
            comparison = Comparison("the original has it, the kernel has not")
        elif name not in original.values:
            comparison = Comparison("the kernel has it, the original has not")
        else:
            # Arguments and state after the call are compared with the original's: in float64 they are other tensors.
            computed = precise is not None and name.startswith(COMPUTED)
            reference = precise.values.get(name) if precise is not None and computed else None
            comparison = _leaf(kernel.values[name], original.values[name], reference, given)
            if not comparison.difference and _RESULT.fullmatch(name):
                comparison = replace(comparison, difference=_lies_elsewhere(kernel.values[name], original.values[name]))
        if comparison.difference:
            note = " (the kernel has no gradient there)" if name in kernel.missing - original.missing else ""
            comparison = replace(comparison, difference=f"{name}: {comparison.difference}{note}")
        found.append(replace(comparison, worst=name if comparison.share >= 0 else None))
    return together(found)


def _leaf(kernel: Any, original: Any, precise: Any, given: Tolerance | None) -> Comparison:
    if not (isinstance(kernel, torch.Tensor) and isinstance(original, torch.Tensor)):
        alike = type(kernel) is type(original) and (kernel is original or _equal(kernel, original))
        return Comparison() if alike else Comparison(f"{_shown(kernel)}, the original has {_shown(original)}")
    for name in ("dtype", "shape", "device", "layout"):
        theirs, ours = getattr(original, name), getattr(kernel, name)
        if theirs != ours:
            return Comparison(f"its {name} is {_bare(ours)}, the original's {_bare(theirs)}")
    if kernel.numel() == 0 or kernel.layout is not torch.strided:
        return Comparison()
    tolerance = tolerance_for(original.dtype, given)
    if tolerance.bits:
        return _bits(kernel, original)
    fits = isinstance(precise, torch.Tensor) and precise.shape == original.shape
    return _numbers(kernel, original, precise if fits else None, tolerance)


def _lies_elsewhere(kernel: Any, original: Any) -> str:
    """How the dimensions of a result lie in memory, where those of the original's lie in another way and have no gaps.

    A view of it that the model takes would fail, and the format that it was set to be lost.
    """
    if not isinstance(original, torch.Tensor) or original.layout is not torch.strided or original.numel() < 2:
        return ""
    there = [(step, size) for step, size in zip(original.stride(), original.shape, strict=True) if size > 1]
    here = [(step, size) for step, size in zip(kernel.stride(), kernel.shape, strict=True) if size > 1]
    if here == there or sum(step * (size - 1) for step, size in there) + 1 != original.numel():
        return ""
    return f"its strides are {tuple(kernel.stride())}, the original's {tuple(original.stride())}"


def _equal(one: Any, other: Any) -> bool:
    if callable(one) or not _has_values(one):
        return True  # objects without values: of one kind is all that can be asked
    try:
        return bool(one == other)
    except (ValueError, TypeError, RuntimeError):  # arrays of other libraries have no one answer
        return repr(one) == repr(other)


def _has_values(value: Any) -> bool:
    return any("__eq__" in vars(cls) for cls in type(value).__mro__[:-1])


def _bits(kernel: torch.Tensor, original: torch.Tensor) -> Comparison:
    differ = kernel != original
    if kernel.dtype.is_floating_point:
        differ = (differ | (kernel.signbit() != original.signbit())) & ~(kernel.isnan() & original.isnan())
    count = int(differ.sum())
    if not count:
        return Comparison(share=0.0)
    errors = (kernel.to(_wide(kernel)) - original.to(_wide(original))).abs()[differ]
    error = float(errors[errors.isfinite()].max()) if bool(errors.isfinite().any()) else 0.0
    where = _at(differ)
    text = f"{count:,} of {counted(kernel.numel(), 'value')} {'is' if count == 1 else 'are'} not the same bits, the first at {where}"
    return Comparison(text, error, share=float("inf"))


def _numbers(
    kernel: torch.Tensor, original: torch.Tensor, precise: torch.Tensor | None, tolerance: Tolerance
) -> Comparison:
    """The errors of floating point tensors of one shape against the reference, which is `precise` or the original."""
    alike = torch.equal(kernel, original)
    if alike and precise is None:
        return Comparison(share=0.0)
    special = None if alike else _special(kernel, original)
    if special is not None:
        return special
    wide, rounding = _wide(original), torch.finfo(original.dtype).eps
    kernel, original = kernel.to(wide), original.to(wide)
    reference = original if precise is None else precise.to(wide)
    errors, largest = (kernel - reference).abs(), float(reference.abs().max())
    if not math.isfinite(largest + float(errors.max())):  # infinities and NaN stand where they should: the rest counts
        finite = original.isfinite() & reference.isfinite()
        errors = torch.where(finite, errors, 0.0)
        largest = float(torch.where(finite, reference, 0.0).abs().max())
    error = float(errors.max())
    found = Comparison("", error, error / largest if largest else (0.0 if error == 0 else float("inf")), share=0.0)
    if alike:
        return found  # what is the same is equal, however far both are from the reference
    shares = torch.where(errors == 0, 0.0, errors / tolerance.allowed(reference, largest))
    share = float(shares.max())
    found = replace(found, share=share)
    if not share <= 1:
        text = f"it is off by {error:.3g} at most, and by {share:.3g} times what is allowed at {_at(shares == share)}"
        return replace(found, difference=text)
    return found if precise is None else _beside_the_originals(found, original, reference, rounding, largest)


def _beside_the_originals(
    found: Comparison, original: torch.Tensor, reference: torch.Tensor, rounding: float, largest: float
) -> Comparison:
    """The kernel's error beside the original's own. `rounding` is the unit of the dtype."""
    distances = (original - reference).abs()
    own = float(torch.where(distances.isfinite(), distances, 0.0).max())
    # An original that happens to be exact gives no measure: a unit of rounding of the largest value is always granted.
    limit = ERROR_RATIO * max(own, rounding * largest)
    found = replace(found, share=max(found.share, found.max_error / limit if limit else 0.0))
    if found.max_error <= limit:
        return found
    text = f"it is off by {found.max_error:.3g} from float64, the original by {own:.3g}"
    return replace(found, difference=text)


def _special(kernel: torch.Tensor, original: torch.Tensor) -> Comparison | None:
    """NaN and infinities must be where the original has them."""
    if original.dtype.is_complex:
        kernel, original = torch.view_as_real(kernel.resolve_conj()), torch.view_as_real(original.resolve_conj())
    if bool(kernel.isfinite().all()) and bool(original.isfinite().all()):
        return None
    for name, is_special in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        ours, theirs = is_special(kernel), is_special(original)
        differ = ours != theirs
        if bool(differ.any()):
            extra, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
            text = f"{name} at {counted(extra, 'place')} where the original has none" if extra else ""
            missed = f"no {name} at {counted(lost, 'place')} where the original has it" if lost else ""
            found = " and ".join(part for part in (text, missed) if part)
            return Comparison(f"{found}, the first at {_at(differ)}", share=float("inf"))
    return None


def _wide(tensor: torch.Tensor) -> torch.dtype:
    if tensor.dtype.is_complex:
        return torch.complex128
    return torch.float64 if tensor.device.type != "mps" else torch.float32


def _at(found: torch.Tensor) -> str:
    return str(tuple(found.nonzero()[0].tolist()))


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, torch.Tensor) else f"a tensor of shape {tuple(value.shape)}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _bare(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")
