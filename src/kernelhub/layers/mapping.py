"""Which kernel for which layer: immutable tables, a global one and one laid over it for the current context.

>>> from kernelhub.layers.repositories import LayerRepository
>>> norm = LayerRepository("org/norm", layer_name="RMSNorm", version=1)
>>> other = LayerRepository("org/other", layer_name="RMSNorm", version=1)
>>> table = parse({"RMSNorm": {"cuda": {Mode.INFERENCE: norm}, "cpu": [norm, other]}})
>>> [(str(row.device), str(row.mode), len(row.repositories)) for row in table["RMSNorm"]]
[('cuda', 'INFERENCE', 1), ('cpu', 'FALLBACK', 2)]
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kernelhub.errors import InvalidReference
from kernelhub.layers.device import Device
from kernelhub.layers.keys import FusionKey, check_key
from kernelhub.layers.mode import KernelizeFallback, Mode, serving
from kernelhub.layers.repositories import Repository, check_repository

# What users write, `layer name` also being a key of several: {layer name: {device type or Device: repository, or {mode: repository}}}; a list of repositories may
# stand for one.
KernelMapping = Mapping[Any, Mapping[Any, Any]]


@dataclass(frozen=True)
class Row:
    """One registration: on this device, for this mode, this repository, or one of the `others` after it.

    Measured, the fastest of those that are equal to the original is taken; else the first that can be used.
    """

    device: Device
    mode: Mode
    repository: Repository
    others: tuple[Repository, ...] = ()

    @property
    def repositories(self) -> tuple[Repository, ...]:
        """All that may be taken, in the order in which they were registered."""
        return (self.repository, *self.others)

    @property
    def named(self) -> str:
        """The repositories, as a reader wants them."""
        return ", or ".join(map(str, self.repositories))

    @property
    def width(self) -> float:
        """How many capabilities the row covers; the narrowest row that holds a device wins."""
        return self.device.properties.width if self.device.properties else float("inf")


# By layer name, or the key of several; of each layer's rows the newest is last.
Name = str | FusionKey
Table = Mapping[Name, tuple[Row, ...]]
_EMPTY: Table = MappingProxyType({})


@dataclass(frozen=True)
class NoRow:
    """Why no registration serves a layer; `case` is what `use_fallback` calls it."""

    case: KernelizeFallback
    reason: str


@dataclass(frozen=True)
class _Overlay:
    """What a context lays over the global table; without `inherit` it stands for it."""

    table: Table
    inherit: bool


_lock = threading.Lock()
_global: Table = _EMPTY
_NO_OVERLAY = _Overlay(_EMPTY, True)
_overlay: ContextVar[_Overlay] = ContextVar("kernel_mapping", default=_NO_OVERLAY)


def register_kernel_mapping(mapping: KernelMapping, inherit_mapping: bool = True) -> None:
    """Register kernels for all threads.

    A registration replaces an earlier one for the same layer, device, capability range and mode, and nothing else; with
    `inherit_mapping=False` all earlier ones are dropped. Raises `InvalidReference` [ValueError] for a malformed mapping.
    """
    global _global
    table = parse(mapping)
    with _lock:
        _global = merge(_global, table) if inherit_mapping else table


@contextmanager
def use_kernel_mapping(mapping: KernelMapping, *, inherit_mapping: bool = True) -> Iterator[None]:
    """Register kernels for the current context (thread, task) while the `with` block runs.

    With `inherit_mapping=False` the block sees these registrations only. Raises `InvalidReference` [ValueError].
    """
    table, outer = parse(mapping), _overlay.get()
    inner = _Overlay(merge(outer.table, table), outer.inherit) if inherit_mapping else _Overlay(table, False)
    token = _overlay.set(inner)
    try:
        yield
    finally:
        _overlay.reset(token)


def current_table() -> Table:
    """The registrations that hold here and now."""
    overlay = _overlay.get()
    return merge(_global, overlay.table) if overlay.inherit else overlay.table


def parse(mapping: KernelMapping) -> Table:
    """A mapping's value. Raises `InvalidReference`, which names the layer and the device where something is wrong."""
    if not isinstance(mapping, Mapping):
        raise InvalidReference(f"a kernel mapping is a dict from layer names, got {mapping!r}")
    table: Table = _EMPTY
    for name, devices in mapping.items():
        wrong = check_key(name) if isinstance(name, tuple) else ""
        if wrong:
            raise InvalidReference(f"kernel mapping: {name!r}: {wrong}")
        if not isinstance(name, (str, tuple)) or not isinstance(devices, Mapping):
            raise InvalidReference(
                f"kernel mapping: {name!r}: {devices!r}",
                hint="Expected {layer name: {device type: repository, or {mode: repository}}}.",
            )
        rows = [row for key, value in devices.items() for row in _rows(name, key, value)]
        table = merge(table, {name: tuple(rows)})
    return table


def merge(base: Table, over: Table) -> Table:
    """`base` with the rows of `over` added; a row replaces the one of the same device, range and mode."""
    merged = dict(base)
    for name, rows in over.items():
        replaced = {(row.device, row.mode) for row in rows}
        kept = [row for row in merged.get(name, ()) if (row.device, row.mode) not in replaced]
        merged[name] = (*kept, *rows)
    return MappingProxyType(merged)


def choose(name: str, rows: tuple[Row, ...], device_type: str, capability: int | None, mode: Mode) -> Row | NoRow:
    """The row that serves a layer on a device, or why there is none.

    Of the capability ranges that hold the device, the narrowest that serves the mode wins, of equal ones the newest;
    within a range the modes are tried in the order of `serving`.
    """
    if not rows:
        return NoRow(KernelizeFallback.NO_LAYER, f"no kernel is registered for {name}")
    on_type = [row for row in rows if row.device.type == device_type]
    if not on_type:
        types = ", ".join(sorted({row.device.type for row in rows}))
        return NoRow(KernelizeFallback.NO_DEVICE, f"no kernel is registered for {name} on {device_type} (only {types})")
    holding = [row for row in on_type if _holds(row, capability)]
    if not holding:
        ranges = ", ".join(sorted({str(row.device.properties) for row in on_type}))
        have = "none" if capability is None else str(capability)
        return NoRow(
            KernelizeFallback.NO_COMPATIBLE_PROPERTIES,
            f"no kernel for {name} on {device_type} covers capability {have} (registered: {ranges})",
        )
    order = serving(mode)
    served = [(row.width, -age, order.index(row.mode), row) for age, row in enumerate(holding) if row.mode in order]
    if not served:
        modes = ", ".join(sorted({str(row.mode) for row in holding}))
        return NoRow(
            KernelizeFallback.NO_COMPATIBLE_MODE,
            f"no kernel for {name} on {device_type} serves {mode} (registered: {modes})",
        )
    newest = {row.device: -age for _, age, _, row in served}
    return min(served, key=lambda item: (item[0], -newest[item[3].device], item[2]))[3]


def needs_capability(rows: tuple[Row, ...], device_type: str) -> bool:
    """Whether the device's capability decides between the rows."""
    return any(row.device.properties for row in rows if row.device.type == device_type)


def _holds(row: Row, capability: int | None) -> bool:
    if row.device.properties is None:
        return True
    return capability is not None and row.device.properties.holds(capability)


def _rows(name: Name, key: object, value: object) -> Iterator[Row]:
    where = f"kernel mapping: {name!r}: {key!r}"
    if not isinstance(key, (str, Device)):
        raise InvalidReference(f"{where}: expected a device type or a Device")
    device = Device(key) if isinstance(key, str) else key
    if not isinstance(value, Mapping):
        yield _row(device, Mode.FALLBACK, value, where)
        return
    for mode, repository in value.items():
        if not isinstance(mode, Mode):
            raise InvalidReference(f"{where}: {mode!r} is not a Mode", hint="Such as {Mode.INFERENCE: repository}.")
        yield _row(device, mode, repository, f"{where}: {mode}")


def _row(device: Device, mode: Mode, value: object, where: str) -> Row:
    """A registration of one repository, or of a list of them, in which each is named once."""
    if not isinstance(value, (list, tuple)):
        return Row(device, mode, check_repository(value, where))
    if not value:
        raise InvalidReference(f"{where}: the list of repositories is empty", hint="Leave the device or mode out.")
    first, *others = dict.fromkeys(check_repository(item, f"{where}[{at}]") for at, item in enumerate(value))
    return Row(device, mode, first, tuple(others))
