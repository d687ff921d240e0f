"""What was found of kernels, remembered: a second run on layers and calls of the same kind measures nothing.

A verdict is found again by everything that it could depend on, but the values of weights and inputs: a kernel that was equal
for layers of a kind, on calls of a kind, is taken to be equal for others of that kind. Anything else that changed gives
another key, and is measured.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kernelhub.errors import KernelHubError
from kernelhub.hub.importer import LoadedKernel
from kernelhub.hub.store import Store
from kernelhub.layers import describe
from kernelhub.layers.capture import Call
from kernelhub.layers.kernel import LayerKernel
from kernelhub.layers.machine import machine, switches, version
from kernelhub.layers.mode import Mode
from kernelhub.layers.tolerance import DEFAULTS, Tolerance
from kernelhub.layers.values import leaves, tensors_in

_log = logging.getLogger("kernelhub")

_SCHEMA = 1

# The code that finds verdicts: what an older version of it found is not what this one would.
_PROOF = (
    "capture", "compare", "describe", "examine", "fusion", "layout", "machine", "proof", "replay", "timing", "tolerance", "values",
    "verdicts", "workload",
)  # fmt: skip


# What a verdict is found by


@dataclass(frozen=True)
class Key:
    """All that a verdict depends on. `name` is short, and the same in every process."""

    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        return describe.digest(self.facts)

    def of(self, question: str, **more: Any) -> Key:
        """The key of the answer to one question."""
        return Key({**self.facts, "question": question, **more})


def key_of(module: nn.Module, kernel: LayerKernel, calls: Iterable[Call], mode: Mode) -> Key | None:
    """The key of a kernel on a layer with these calls; None where the layer holds what cannot be told."""
    calls = list(calls)
    try:
        facts = {
            "schema": _SCHEMA,
            "proof": proof_digest(),
            "machine": machine(_devices(module, calls)),
            "switches": switches(),
            "kernel": _kernel(kernel),
            "class": describe.digest(describe.code(module)),
            "settings": describe.digest(describe.settings(module)),
            "weights": describe.weights(module),
            "calls": [_call(call) for call in calls],
            "mode": str(mode),
        }
        return Key({**facts, "layer": describe.digest(facts)})
    except Exception as error:  # noqa: BLE001 - whatever objects of others raise when they are looked at
        _log.debug("nothing is remembered of %s: %s", type(module).__name__, error)
        return None


@functools.cache
def proof_digest() -> str:
    """Stands for the code of this package that finds verdicts."""
    state = hashlib.sha256()
    for name in _PROOF:
        state.update(name.encode())
        state.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return state.hexdigest()


def _kernel(kernel: LayerKernel) -> dict[str, Any]:
    loaded = kernel.loaded
    packages = {name: version(name) for name in sorted(loaded.metadata.python_depends)}
    return {
        "digest": loaded.digest,
        "depends": sorted(loaded.depends),
        "packages": packages,
        "layer": kernel.repository.name,
        "backend": kernel.backend,
    }


def _call(call: Call) -> dict[str, Any]:
    given = (call.args, dict(call.kwargs))
    held = tensors_in(given)
    others = [(name, leaf) for name, leaf in leaves(given, "") if not isinstance(leaf, torch.Tensor)]
    return {
        "arguments": [_without_index(list(leaf)) for leaf in call.signature.leaves],
        "aligned": list(map(describe.aligned, held)),
        "others": [[name, describe.value(leaf)] for name, leaf in others],
        "autocast": [[item.device_type, item.enabled, str(item.dtype)] for item in call.autocast],
    }


def _without_index(leaf: list[Any]) -> list[Any]:
    """A leaf of a signature without the number of its device."""
    return [str(item).partition(":")[0] if at == 4 else item for at, item in enumerate(leaf)]


def _devices(module: nn.Module, calls: list[Call]) -> set[torch.device]:
    held = [tensor for call in calls for tensor in tensors_in((call.args, dict(call.kwargs)))]
    homes = {home for call in calls for home in call.homes.values()}
    return homes | {item.device for item in (*module.parameters(), *module.buffers(), *held)}


def tolerance_facts(given: Tolerance | None) -> Any:
    """What is allowed, as a key has it."""
    named = {str(dtype): item for dtype, item in DEFAULTS.items()} if given is None else {"given": given}
    return {name: {part: str(value) for part, value in asdict(item).items()} for name, item in named.items()}


# What is remembered


@dataclass(frozen=True)
class Equality:
    """What comparing found. `difference` is empty where the kernel is equal; `layers` is how many it was shown for."""

    difference: str
    reference: str
    calls: int
    max_error: float | None
    max_relative_error: float | None
    worst: str | None
    layers: int = 1

    def with_(self, other: Equality) -> Equality:
        """What holds for both: the larger errors, and the result that came nearest to what is allowed in the worse one."""
        worse = other if (other.max_relative_error or 0.0) > (self.max_relative_error or 0.0) else self
        return replace(
            worse,
            difference=self.difference or other.difference,
            reference=self.reference if self.reference == other.reference else "original",
            max_error=_larger(self.max_error, other.max_error),
            max_relative_error=_larger(self.max_relative_error, other.max_relative_error),
            layers=self.layers + other.layers,
        )


@dataclass(frozen=True)
class Timing:
    """What timing found, on the layer `path`: the original's time over the kernel's, with its interval."""

    ratio: float
    low: float
    high: float
    path: str


_Found = TypeVar("_Found", Equality, Timing)


@dataclass(frozen=True)
class Recalled:
    """A verdict from the store, and when it was found (UTC)."""

    found: Any
    when: str


class Memory:
    """The verdicts in a store. One that cannot be written is read; what is in it and is no verdict is not there."""

    def __init__(self, store: Store, *, refresh: bool = False, clock: Callable[[], float] = time.time) -> None:
        self._store, self._refresh, self._clock = store, refresh, clock

    def recall(self, key: Key | None, kind: type[_Found]) -> tuple[_Found, str] | None:
        """What was found for the key, and when; None where it is not known, or to be found anew."""
        if key is None or self._refresh:
            return None
        record = self._store.verdict(_kernel_digest(key), key.name)
        if record is None or ("found" in record and record["found"] is None):
            return None
        try:
            return _read(record, key, kind)
        except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:
            _log.warning("the verdict %s in the store is none, and found again: %s", key.name[:12], error)
            return None

    def forget(self, key: Key, kernel: LoadedKernel) -> None:
        """Nothing holds for the key: what was found before does not any more."""
        if self._store.verdict(_kernel_digest(key), key.name) is not None:
            self.keep(key, None, kernel)

    def keep(self, key: Key, found: Equality | Timing | None, kernel: LoadedKernel) -> None:
        """Remember what was found. A store that cannot be written does not, and it is found again next time."""
        record = {
            "key": dict(key.facts),
            "found": found and {name: _text(value) for name, value in asdict(found).items()},
            "time": self._clock(),
            "path": str(kernel.path),
            "name": kernel.repo_info.repo_id if kernel.repo_info else kernel.metadata.name,
        }
        try:
            self._store.set_verdict(_kernel_digest(key), key.name, record)
        except (KernelHubError, OSError) as error:
            _log.info("what was measured is not remembered: %s", str(error).partition("\n")[0])


def _kernel_digest(key: Key) -> str:
    return str(key.facts["kernel"]["digest"])


def _read(record: Mapping[str, Any], key: Key, kind: type[_Found]) -> tuple[_Found, str]:
    """A record's value. Raises where it is not one for this key, whatever it is."""
    if describe.digest(record["key"]) != key.name:
        raise ValueError("it is for something else")
    raw = record["found"]
    if raw.keys() != {field.name for field in fields(kind)}:
        raise ValueError(f"it has {', '.join(sorted(map(str, raw)))}")
    found = kind(**{field.name: _value(raw[field.name], str(field.type)) for field in fields(kind)})
    when = datetime.fromtimestamp(float(record["time"]), timezone.utc)
    return found, when.strftime("%Y-%m-%d %H:%M:%S")


def _text(value: Any) -> Any:
    """Numbers as JSON has them all: infinities and NaN are text."""
    return repr(value) if isinstance(value, float) else value


def _value(raw: Any, wanted: str) -> Any:
    """A field's value, of the type that the field is declared with."""
    if raw is None and wanted.endswith("| None"):
        return None
    name = wanted.removesuffix(" | None")
    if name == "float" and isinstance(raw, str) and len(raw) <= 40:
        return float(raw)
    if name == "int" and type(raw) is int:
        return raw
    if name == "str" and isinstance(raw, str) and len(raw) <= 10_000:
        return raw
    raise ValueError(f"{raw!r:.60} is no {name}")


def _larger(one: float | None, other: float | None) -> float | None:
    return max((item for item in (one, other) if item is not None), default=None)
