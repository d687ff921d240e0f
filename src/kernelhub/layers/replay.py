"""A recorded call made again with one forward or another, and all that came of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernelhub.layers.capture import Call
from kernelhub.layers.markers import calls_children
from kernelhub.layers.state import same_random_state, snapshot
from kernelhub.layers.values import leaves, tensors_in

_SEED = 20240229
# Bytes of weights, of a module whose children may be a whole model: so many are copied to float64, and have gradients that
# are compared. A second model in memory would be more than it takes to run it.
_MOST_OF_CHILDREN = 1 << 26


@dataclass(frozen=True)
class Effects:
    """All that a call did, by name: outputs, arguments after it, gradients, and what it changed on the module.

    A gradient that there was none of is a tensor of zeros here; `missing` has its name.
    """

    values: Mapping[str, Any]
    missing: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Replay:
    """How the calls of a layer are made again: with gradients or without."""

    module: nn.Module
    training: bool

    def run(self, forward: Any, call: Call) -> Effects:
        """Make the call with `forward`. The module and the random state are as before. Raises what it raises."""
        before = snapshot(self.module)
        try:
            values, missing = self._run(forward, call, None)
        finally:
            changed = before.take_back()
        values.update(_named(changed))
        return Effects(values, missing)

    def run_in_float64(self, forward: Any, call: Call) -> Effects:
        """Make the call with everything that is floating point in float64, what the forward casts to shorter types too.

        What it changes on the module is not among the effects. Raises what it raises where it cannot be.
        """
        before = snapshot(self.module)
        try:
            with _in_float64(self.module):
                values, missing = self._run(forward, call, torch.float64)
        finally:
            before.take_back()
        return Effects(values, missing)

    def _run(self, forward: Any, call: Call, dtype: torch.dtype | None) -> tuple[dict[str, Any], frozenset[str]]:
        args, kwargs = call.again(dtype)
        named = argument_names(self.module, args, kwargs)
        weights = _compared(self.module)
        with surroundings(call, self.training, _devices(args, kwargs), lifted=dtype is not None):
            output = forward(*args, **kwargs)
            values = dict(leaves(output, "output"))
            gradients, missing = self._gradients(values, named, weights)
        for name, value in named.items():
            for inner, leaf in leaves(value, name):
                values[f"{inner} after the call"] = leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
        detached = {name: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for name, leaf in values.items()}
        return {**detached, **gradients}, missing

    def _gradients(
        self, outputs: Mapping[str, Any], named: Mapping[str, Any], weights: list[tuple[str, nn.Parameter]]
    ) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
        """The gradients of the arguments and weights, against cotangents that are the same in every run."""
        if not self.training:
            return {}, frozenset()
        inputs = [item for value in named.items() for item in leaves(value[1], value[0])]
        wanted = [(name, leaf) for name, leaf in inputs if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        wanted = [(f"gradient of {name}", leaf) for name, leaf in (*wanted, *weights)]
        found = gradients_of(outputs.values(), [leaf for _, leaf in wanted])
        values, missing = {}, set()
        for (name, leaf), gradient in zip(wanted, found, strict=True):
            values[name] = torch.zeros_like(leaf, requires_grad=False) if gradient is None else gradient.detach()
            if gradient is None:
                missing.add(name)
        return values, frozenset(missing)


def may_be_lifted(module: nn.Module) -> bool:
    """Whether there is room for the module's weights in float64."""
    return not calls_children(module) or sum(8 * item.numel() for item in module.parameters()) <= _MOST_OF_CHILDREN


def _compared(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights whose gradients are compared: all, or the smallest of a module that only its children read."""
    weights = [(name, item) for name, item in module.named_parameters() if item.requires_grad]
    if not calls_children(module):
        return weights
    room, found = _MOST_OF_CHILDREN, []
    for name, item in sorted(weights, key=lambda weight: (weight[1].numel(), weight[0])):
        room -= item.numel() * item.element_size()
        if room >= 0:
            found.append((name, item))
    return found


def gradients_of(outputs: Iterable[Any], wanted: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `wanted` against random cotangents of the outputs; None for what the outputs do not depend on."""
    ends = differentiable(outputs)
    if not ends or not wanted:
        return (None,) * len(wanted)
    return torch.autograd.grad(ends, wanted, [cotangent(end) for end in ends], allow_unused=True)


def differentiable(outputs: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among the outputs that have a gradient."""
    return [leaf for leaf in outputs if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def cotangent(tensor: torch.Tensor) -> torch.Tensor:
    """Random numbers of the tensor's shape: short ones, so that they are the same in every dtype."""
    generator = torch.Generator().manual_seed(_SEED)
    made = torch.randn(tensor.shape, generator=generator)
    return (made * 32).round().div(32).to(tensor.detach())


def argument_names(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the names that the original's forward has for them."""
    forward = inspect.getattr_static(type(module), "forward").__get__(module, type(module))
    bound = inspect.signature(forward).bind(*args, **kwargs)
    return dict(bound.arguments)


@contextmanager
def surroundings(call: Call, training: bool, devices: set[torch.device], *, lifted: bool = False) -> Iterator[None]:
    """What the call was made in: its autocast (off in float64), gradients, and one seed for every run."""
    with ExitStack() as stack:
        stack.enter_context(same_random_state(devices))
        for autocast in call.autocast:
            # Autocast leaves float64 alone, but would cast what is not.
            stack.enter_context(torch.autocast(autocast.device_type, enabled=False) if lifted else autocast.again())
        stack.enter_context(torch.set_grad_enabled(training))
        torch.manual_seed(_SEED)
        yield


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written to holds NaN: who reads it, shows it."""
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic algorithm
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            deterministic.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Lifting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation that is asked for a shorter floating point type gives float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*[_lifted(item) for item in args], **{name: _lifted(item) for name, item in (kwargs or {}).items()})


_SHORT = (torch.float32, torch.float16, torch.bfloat16)


def _lifted(item: Any) -> Any:
    return torch.float64 if isinstance(item, torch.dtype) and item in _SHORT else item


@contextmanager
def _in_float64(module: nn.Module) -> Iterator[None]:
    """The module's weights and buffers, and its children's, are float64 copies inside."""
    tables: list[Any] = [table for child in module.modules() for table in (child._parameters, child._buffers)]
    before = [dict(table) for table in tables]
    copies: dict[int, torch.Tensor] = {}

    def lifted(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or tensor.dtype not in _SHORT:
            return tensor
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().double().requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    try:
        for table in tables:
            table.update({name: lifted(item) for name, item in table.items()})
        with _Lifting():  # type: ignore[no-untyped-call]
            yield
    finally:
        for table, held in zip(tables, before, strict=True):
            table.clear()
            table.update(held)


def _devices(args: Any, kwargs: Any) -> set[torch.device]:
    return {tensor.device for tensor in tensors_in((args, kwargs))}


def _named(changed: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf for key, value in changed.items() for name, leaf in leaves(value, key)}
