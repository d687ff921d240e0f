"""The nested values that go into a call and come out of it: their leaves, and copies that a kernel cannot tell apart.

A copy has the strides and the alignment of the original. What lies between its elements, and around it, is NaN: a kernel
that reads a strided tensor as if it were contiguous, or past its end, shows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_ALIGNMENT = 64  # bytes; what torch's CPU allocator gives, and more than any vector load asks for
_MARGIN = 64  # elements on each side that nobody may read; a whole number of alignments in every dtype
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, nn.Module, type)
_SHOWN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, slice, range)


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested tuples, lists, mappings and objects, each with its name, such as `output[0].key`.

    The kinds of the containers come too, under names that end in `()`.
    """
    yield from _leaves(value, name, set())


def _leaves(value: Any, name: str, above: set[int]) -> Iterator[tuple[str, Any]]:
    inside = _inside(value, name)
    if inside is None or id(value) in above:
        yield name, value
        return
    yield f"{name}()", f"{type(value).__name__} of {len(inside)}"
    for key, item in inside:
        yield from _leaves(item, key, above | {id(value)})


def _inside(value: Any, name: str) -> list[tuple[str, Any]] | None:
    """What the value is made of; None for a leaf."""
    if isinstance(value, (torch.Tensor, *_PLAIN)) or callable(value):
        return None
    if isinstance(value, Mapping):
        return [(f"{name}.{key}", item) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    held = getattr(value, "__dict__", None)
    return [(f"{name}.{key}", item) for key, item in held.items()] if held else None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The distinct tensors of a nested value."""
    found = {id(leaf): leaf for _, leaf in leaves(value, "") if isinstance(leaf, torch.Tensor)}
    return list(found.values())


def rebuilt(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The nested value again with each tensor changed; one that is there twice is there twice afterwards.

    Other objects are copied deeply; raises what their copying raises.
    """
    return copy.deepcopy(value, _memo(value, change))


def _memo(value: Any, change: Callable[[torch.Tensor], Any]) -> dict[int, Any]:
    """What `deepcopy` finds already made: modules and functions are not copied, and tensors as we want them."""
    memo: dict[int, Any] = {}
    for _, leaf in leaves(value, ""):
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in memo:
                memo[id(leaf)] = change(leaf)
        elif isinstance(leaf, nn.Module):
            memo[id(leaf)] = leaf
    return memo


def twin(tensor: torch.Tensor, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A detached copy of the tensor with its strides, its alignment, and NaN around and between its elements."""
    source = tensor.detach().resolve_conj().resolve_neg()
    device, dtype = device or source.device, dtype or source.dtype
    if source.layout is not torch.strided or source.numel() == 0 or source.is_nested:
        return source.to(device=device, dtype=dtype, copy=True)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(source.size(), source.stride(), strict=True))
    offset = _MARGIN + source.data_ptr() % _ALIGNMENT // source.element_size()
    flat = torch.full((offset + extent + _MARGIN,), _poison(dtype), dtype=dtype, device=device)
    made = flat.as_strided(source.size(), source.stride(), offset)
    # Of a dimension with stride 0 (an expanded tensor) one element stands for all.
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in source.stride())
    if _overlaps(source[once]):
        flat[offset : offset + extent].copy_(source.as_strided((extent,), (1,)))
    else:
        made[once].copy_(source[once])
    return made


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point or dtype.is_complex else 0


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie in one place, as in sliding windows."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


@dataclass(frozen=True)
class Signature:
    """What makes two calls the same kind of call: their tensors' kinds, and their other values."""

    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any) -> Signature:
        return cls(tuple(_kind(name, leaf) for name, leaf in leaves(value, "")))


def _kind(name: str, leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, torch.Tensor):
        strides = tuple(leaf.stride()) if leaf.layout is torch.strided else ()
        return name, str(leaf.dtype), tuple(leaf.shape), strides, str(leaf.device), leaf.requires_grad
    return name, _text(leaf)


def _text(leaf: Any) -> str:
    """What a value that is no tensor is told apart by: the same in every process."""
    if isinstance(leaf, _SHOWN):
        return repr(leaf)
    if isinstance(leaf, (set, frozenset)):
        return f"{type(leaf).__qualname__} of {sorted(map(repr, leaf))}"
    named = leaf if isinstance(leaf, type) or callable(leaf) else type(leaf)
    kind = type(leaf) if not hasattr(named, "__qualname__") else named
    return f"{kind.__module__}.{kind.__qualname__}"
