"""What running a model or a layer could change, and taking it back: weights, buffers, attributes, caches, random state."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernelhub.layers.markers import calls_children

_ABSENT = object()


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside: the model's buffers, gradients, training flags, caches, and the random state, are as before."""
    modules = list(model.modules())
    flags = [(module, module.training) for module in modules]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    values = {
        id(tensor): (tensor, tensor.clone())
        for _, table in buffers
        for tensor in table.values()
        if tensor is not None and not tensor.is_meta
    }
    held = Held.by(modules)
    for parameter, _ in gradients:
        parameter.grad = None
    with same_random_state(devices_of(model)):
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            for table, before in buffers:
                table.clear()
                table.update(before)
            with torch.no_grad():
                for tensor, value in values.values():
                    if not same(tensor, value):
                        tensor.copy_(value)
            held.take_back()
            for parameter, gradient in gradients:
                parameter.grad = gradient


# What nn.Module keeps itself, and accelerate's hook, which may hold every weight of the model.
_NOT_HELD = frozenset(nn.Module().__dict__) | {"_hf_hook"}
_HELD_BYTES = 1 << 28
_HELD_DEPTH = 6


@dataclass
class Held:
    """What modules hold in plain attributes, such as a cache of keys and values: lists, tables, objects, and tensors in them.

    At most 256 MiB of tensors: what is over that is not copied, and not taken back.
    """

    tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = field(default_factory=list)
    lists: list[tuple[list[Any], list[Any]]] = field(default_factory=list)
    tensors: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _seen: dict[int, Any] = field(default_factory=dict)
    _bytes: int = 0

    @classmethod
    def by(cls, modules: Iterable[nn.Module]) -> Held:
        held = cls()
        for module in modules:
            held._table(module.__dict__, _NOT_HELD, _HELD_DEPTH)
        return held

    def take_back(self) -> None:
        """Make all of it what it was."""
        for table, before in self.tables:
            if table.keys() != before.keys() or any(table[name] is not value for name, value in before.items()):
                table.clear()
                table.update(before)
        for items, earlier in self.lists:
            items[:] = earlier
        with torch.no_grad():
            for tensor, value in self.tensors:
                if not same(tensor, value):
                    tensor.copy_(value)

    def _table(self, table: dict[Any, Any], without: frozenset[str], depth: int) -> None:
        self.tables.append((table, dict(table)))
        for name, value in table.items():
            if name not in without:
                self._look(value, depth - 1)

    def _look(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth < 0:
            return
        if isinstance(value, torch.Tensor):
            self._seen[id(value)] = value
            size = value.numel() * value.element_size()
            if (
                not isinstance(value, nn.Parameter)
                and value.device.type != "meta"
                and self._bytes + size <= _HELD_BYTES
            ):
                self._bytes += size
                self.tensors.append((value, value.detach().clone()))
        elif type(value) is dict:
            self._seen[id(value)] = value
            self._table(value, frozenset(), depth)
        elif type(value) in (list, tuple):
            self._seen[id(value)] = value
            if type(value) is list:
                self.lists.append((value, list(value)))
            for item in value:
                self._look(item, depth - 1)
        elif (
            type(getattr(value, "__dict__", None)) is dict and not isinstance(value, nn.Module) and not callable(value)
        ):
            self._seen[id(value)] = value
            self._table(value.__dict__, frozenset(), depth)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the values are equal; a NaN is equal to a NaN."""
    if torch.equal(one, other):
        return True
    if not one.dtype.is_floating_point or one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def devices_of(model: nn.Module) -> set[torch.device]:
    """Where the model's weights and buffers are."""
    return {tensor.device for table in (model.parameters(), model.buffers()) for tensor in table}


@contextmanager
def same_random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """The random states of Python, numpy (where it is imported), torch and the devices are afterwards as before."""
    numpy: Any = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    by_type: dict[str, list[torch.device]] = {}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            by_type.setdefault(device.type, []).append(device)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, listed in by_type.items():
            stack.enter_context(torch.random.fork_rng(devices=listed, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def snapshot(module: nn.Module) -> Snapshot:
    """What a call of the module could change: its weights, buffers and attributes, those of its children too.

    Of the weights that only its children read, which may be a whole model's, no more than whether they are written to.
    """
    tables = [
        (f"{path}." if path else "", table)
        for path, child in module.named_modules()
        for table in (child.__dict__, child._parameters, child._buffers)
    ]
    weights = module.named_parameters(recurse=not calls_children(module))
    held = dict((*weights, *module.named_buffers()))
    others = {name: item for name, item in module.named_parameters() if name not in held and not item.is_inference()}
    return Snapshot(
        [(path, table, copy.copy(table)) for path, table in tables],
        {name: (item, item.detach().clone()) for name, item in held.items()},
        {name: (item, item._version) for name, item in others.items()},
    )


@dataclass(frozen=True)
class Snapshot:
    """A module's state, to see what a call changed and to take it back, but for writes to tensors that are only counted."""

    attributes: list[tuple[str, dict[str, Any], dict[str, Any]]]
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    counted: Mapping[str, tuple[torch.Tensor, int]]

    def take_back(self) -> dict[str, Any]:
        """What is different, by name, with the value that it was given; the module is as before afterwards."""
        changed: dict[str, Any] = {}
        for path, table, before in self.attributes:
            names = [name for name in {**before, **table} if table.get(name, _ABSENT) is not before.get(name, _ABSENT)]
            changed.update({f"the attribute {path}{name} that it sets": table.get(name) for name in names})
            if names:
                table.clear()
                table.update(before)
        with torch.no_grad():
            for name, (tensor, value) in self.tensors.items():
                if not same(tensor, value):
                    changed[f"{name} after the call"] = tensor.detach().clone()
                    tensor.copy_(value)
        for name, (tensor, version) in self.counted.items():
            if tensor._version != version:
                changed[f"a write to {name}, which is not taken back"] = True
        return changed
