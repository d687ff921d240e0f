"""Putting a kernel's forward on a module, and taking it away again.

What is on a kernelized module is the kernel's forward, bound to the module, and one marker beside it. Bound methods cost a
call nothing (31 ns and 970 ns for `m.forward(x)` and `m(x)`, as a plain method does), survive `copy.deepcopy` bound to
the copy, and leave the module's class alone, which FSDP2 and accelerate need. What a bound method cannot do alone is come
back from a pickle: it is pickled as `getattr(module, "forward")`, and finds what the module has by then. The marker lies
before it in the module's `__dict__`, so it is read first, and puts the kernel's forward there if the kernel is here.
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet, WeakValueDictionary, finalize, ref

from torch import nn
from torch._guards import CompileContext

from kernelhub.errors import KernelHubError
from kernelhub.layers import contract
from kernelhub.layers.kernel import Swap, read_back

if TYPE_CHECKING:
    from kernelhub.layers.fusion import Fusion

MARKER = "_kernelhub_swap"
USES = "_kernelhub_functions"
_OURS = (MARKER, "_old_forward", "forward", USES)  # all that is ever changed on a module; the marker is read first

_log = logging.getLogger("kernelhub")


class Marker:
    """What a kernelized module carries beside its forward.

    `function` is the kernel's forward; `explicit` says that the class's forward had been put on the instance before (as
    accelerate does), and belongs there afterwards.
    """

    __slots__ = ("__weakref__", "explicit", "function", "fusion", "module", "swap", "users")

    def __init__(
        self, module: nn.Module, swap: Swap, function: Any, explicit: bool, fusion: Fusion | None = None
    ) -> None:
        self.module, self.swap, self.function, self.explicit = module, swap, function, explicit
        # For a module that one kernel computes together with others: what they share.
        self.fusion = fusion
        # For a function that is one module for the process: who uses its kernel.
        self.users: WeakSet[Uses] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Marker | Lost:
        fusion = self.fusion
        if fusion is not None and id(fusion.parent) not in memo:
            return Lost(self.swap, f"it was copied without {' and '.join(fusion.names)} together")
        module = copy.deepcopy(self.module, memo)
        return Marker(module, self.swap, self.function, self.explicit, copy.deepcopy(fusion, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        if in_effect(self.module) is not self:
            return _nothing, ()
        if self.fusion is not None:
            return _read_part, (self.module, self.swap, self.explicit, self.fusion, self.module is self.fusion.parts[0])
        return _read_marker, (self.module, self.swap, self.explicit)


@dataclass(frozen=True)
class Lost:
    """In place of a marker: the module came from a file, and its kernel could not be read back here.

    Or it is a copy of one of several modules with one kernel, without the others.
    """

    swap: Swap
    reason: str
    fusion: ClassVar[None] = None  # what the forward of a fused module asks for

    def __deepcopy__(self, memo: dict[int, Any]) -> Lost:
        return self


@dataclass(frozen=True)
class Taken:
    """In place of a marker: the kernel raised when it was used, and the module runs its own forward since."""

    swap: Swap
    reason: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Taken:
        return self


class Uses:
    """What a module carries whose kernel-aware functions run kernels: a stake in each of them.

    A function is one module for the whole process; it goes back to the original when the last stake is gone.
    """

    __slots__ = ("__weakref__", "functions", "module")

    def __init__(self, module: nn.Module, functions: Mapping[str, tuple[nn.Module, Swap]]) -> None:
        self.module, self.functions = module, dict(functions)

    def __deepcopy__(self, memo: dict[int, Any]) -> Uses:
        uses = Uses(copy.deepcopy(self.module, memo), self.functions)
        with functions_lock:
            for function, swap in self.functions.values():
                _join(uses, function, swap)
        return uses

    def __reduce__(self) -> tuple[Any, ...]:
        live = {name: stake for name, stake in self.functions.items() if holds(self, *stake)}
        return _read_uses, (self.module, live)


functions_lock = threading.RLock()


def slot(attributes: Mapping[str, Any]) -> str:
    """The name under which a module's own forward lies: accelerate keeps it beside its hook, and calls it from there."""
    return "_old_forward" if "_hf_hook" in attributes and "_old_forward" in attributes else "forward"


def in_effect(module: nn.Module) -> Marker | None:
    """The module's marker, where the forward that it stands for is what the module runs."""
    marker = ours(module)
    return marker if marker is not None and marker.module is module else None


def ours(module: nn.Module) -> Marker | None:
    """The module's marker, where its forward is the kernel's, if only bound to another module (by `copy.copy`)."""
    attributes = module.__dict__
    marker = attributes.get(MARKER)
    if type(marker) is not Marker:
        return None
    forward = attributes.get(slot(attributes))
    if type(forward) is MethodType and forward.__self__ is marker.module and forward.__func__ is marker.function:
        return marker
    return None


def of_class(module: nn.Module, forward: Any) -> bool:
    """Whether `forward` is nothing but the forward of the module's class, bound to the module."""
    return (
        type(forward) is MethodType
        and forward.__self__ is module
        and forward.__func__ is getattr(type(module), "forward", None)
    )


def left_over(module: nn.Module) -> bool:
    """Whether the module's forward is that of a fused kernel, which it was copied away from."""
    attributes = module.__dict__
    forward = attributes.get("forward")
    return (
        isinstance(attributes.get(MARKER), Lost)
        and type(forward) is MethodType
        and forward.__self__ is module
        and getattr(forward.__func__, "fused", False) is True
    )


def put(module: nn.Module, swap: Swap, function: Any, fusion: Fusion | None = None) -> None:
    """Let the module run the kernel's forward `function`. The module has its own forward now (see `take`)."""
    attributes = module.__dict__
    name = slot(attributes) if "_hf_hook" in attributes else "forward"
    explicit = name in attributes
    if explicit:
        del attributes[name]  # what stands in the dict first is pickled first, and the marker must be
    attributes[MARKER] = Marker(module, swap, function, explicit, fusion)
    attributes[name] = MethodType(function, module)
    if name != "forward":
        attributes["forward"] = attributes.pop("forward")


def take(module: nn.Module) -> None:
    """Give the module its own forward back; what somebody else put over the kernel's meanwhile stays."""
    attributes = module.__dict__
    own, alone = ours(module), left_over(module)
    marker = attributes.pop(MARKER, None)
    if alone or (isinstance(marker, Lost) and of_class(module, attributes.get("forward"))):
        del attributes["forward"]  # that is how the pickle of a bound method came back
    if own is None:
        return
    name = slot(attributes)
    del attributes[name]
    if own.explicit or name != "forward":
        attributes[name] = MethodType(type(module).forward, module)
        if name != "forward":
            attributes["forward"] = attributes.pop("forward")


class Transaction:
    """Changes to modules that are all made, or all taken back."""

    def __init__(self) -> None:
        # In their order: a layer that a forward was put on, the marker of one that it was taken from (see plan.Tree for why
        # no more is made), and of functions and who has a stake in them all that they had.
        self._done: list[nn.Module | Marker | tuple[nn.Module, dict[str, Any]]] = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.undo()

    def put(self, module: nn.Module, swap: Swap, function: Any, fusion: Fusion | None = None) -> None:
        """Let a layer run a kernel's forward, whatever kernel another thread has put there meanwhile."""
        if MARKER in module.__dict__:
            self._take(module)
        self._done.append(module)
        put(module, swap, function, fusion)

    def take(self, module: nn.Module) -> None:
        """Give a module its own forward back, and those that are fused with it theirs."""
        marker = in_effect(module)
        for part in marker.fusion.parts if marker is not None and marker.fusion is not None else (module,):
            self._take(part)

    def _take(self, module: nn.Module) -> None:
        marker = in_effect(module)
        if marker is None:
            self._remember(module)
        else:
            self._done.append(marker)
        take(module)

    def use(self, function: nn.Module, swap: Swap, forward: Any) -> None:
        """Let a process-wide function run a kernel, or another one than before."""
        self._remember(function)
        if in_effect(function):
            take(function)
        put(function, swap, forward)

    def join(self, module: nn.Module, functions: Mapping[str, tuple[nn.Module, Swap]]) -> None:
        """Give a module its stake in functions that run the kernels named."""
        self._remember(module)
        module.__dict__[USES] = uses = Uses(module, functions)
        for function, swap in functions.values():
            _join(uses, function, swap)

    def leave(self, module: nn.Module) -> None:
        """End a module's stake in functions; those that nobody has a stake in any more go back to the original."""
        self._remember(module)
        uses = module.__dict__.pop(USES, None)
        if uses is None:
            return
        for function, _ in uses.functions.values():
            users = _users(function)
            if uses in users:
                self._remember(function)
                users.discard(uses)
                if not has_users(function):
                    take(function)
            elif isinstance(function.__dict__.get(MARKER), Taken):
                self._remember(function)
                take(function)

    def undo(self) -> None:
        """Make every module what it was."""
        while self._done:
            done = self._done[-1]  # taken off when it is undone: whoever interrupts this may undo the rest
            if isinstance(done, nn.Module):
                take(done)
            elif isinstance(done, Marker):
                put(done.module, done.swap, done.function, done.fusion)
                done.module.__dict__[MARKER].users = done.users
            else:
                _reinstate(*done)
            self._done.pop()

    def _remember(self, module: nn.Module) -> None:
        attributes = module.__dict__
        self._done.append((module, {name: attributes[name] for name in _OURS if name in attributes}))


def _reinstate(module: nn.Module, before: Mapping[str, Any]) -> None:
    attributes = module.__dict__
    for name in _OURS:
        attributes.pop(name, None)
        if name in before:
            attributes[name] = before[name]
    uses = before.get(USES)
    if isinstance(uses, Uses):
        for function, swap in uses.functions.values():
            _join(uses, function, swap)


def has_users(function: nn.Module) -> bool:
    """Whether anybody has a stake in the function's kernel."""
    return any(True for _ in _users(function))  # iterating skips those that are gone, which the length may count


def holds(uses: Uses, function: nn.Module, swap: Swap) -> bool:
    """Whether the function still runs the kernel that the stake is in."""
    marker = in_effect(function)
    return marker is not None and marker.swap.content == swap.content and uses in _users(function)


def _users(function: nn.Module) -> WeakSet[Uses]:
    marker = function.__dict__.get(MARKER)
    if type(marker) is not Marker:
        return WeakSet()
    if marker.users is None:
        marker.users = WeakSet()
    return marker.users


def _join(uses: Uses, function: nn.Module, swap: Swap) -> None:
    marker = in_effect(function)
    if marker is not None and marker.swap.content == swap.content:
        _users(function).add(uses)
        finalize(uses, _gone, function, ref(marker)).atexit = False


def _gone(function: nn.Module, joined: ref[Marker]) -> None:
    """A module with a stake is gone: if it was the last, its function must not run the kernel for everybody else.

    The collector calls this anywhere, so it waits for nobody: whoever is changing functions just now looks for himself, and a
    trace of Dynamo, which reads functions more than once, must find what it has found.
    """
    if _is_traced():
        _waiting.append((function, joined))
        if _take_later not in gc.callbacks:
            gc.callbacks.append(_take_later)
        return
    if not functions_lock.acquire(blocking=False):
        return
    try:
        marker = in_effect(function)
        if marker is not None and marker is joined() and not has_users(function):
            take(function)
    finally:
        functions_lock.release()


_waiting: list[tuple[nn.Module, ref[Marker]]] = []


def settle() -> None:
    """Take the kernels off functions whose last users went while a trace was under way."""
    while _waiting and not _is_traced():
        _gone(*_waiting.pop())


def _take_later(phase: str, _: Any) -> None:
    """At the end of a later collection, outside of traces."""
    if phase == "stop" and not _is_traced():
        gc.callbacks.remove(_take_later)
        settle()


def _is_traced() -> bool:
    return CompileContext.try_get() is not None


# Reading models from files: each of these is called by pickle while the module is still empty.


def _nothing() -> None:
    """What a marker that was no longer in effect comes back as."""


def _read_marker(module: nn.Module, swap: Swap, explicit: bool) -> Marker | Lost:
    function = _function_for(module, swap)
    if isinstance(function, Lost):
        return function
    # The marker first, here too: what the pickle says of the module only updates what is there, in the order there is.
    marker = module.__dict__[MARKER] = Marker(module, swap, function, explicit)
    module.__dict__["forward"] = MethodType(function, module)
    return marker


def _read_part(module: nn.Module, swap: Swap, explicit: bool, fusion: Fusion, first: bool) -> Marker | Lost:
    """One of several modules with one kernel. The others may still be empty: the layout is built when it is used."""
    known = _lost.get(id(swap))
    if known is not None:
        return known
    from kernelhub.layers.fusion import entering, passing

    try:
        kernel = read_back(swap)
        if first:
            contract.check(kernel.cls, kernel.forward, type(module), str(swap.repository))
        cls: Any = kernel.cls
        function = entering(kernel.forward, cls)
    except (KernelHubError, ImportError, OSError) as error:
        return _gone_for(swap, error)
    function = function if first else passing
    marker = module.__dict__[MARKER] = Marker(module, swap, function, explicit, fusion)
    module.__dict__["forward"] = MethodType(function, module)
    return marker


def _gone_for(swap: Swap, error: BaseException) -> Lost:
    _log.warning("%s is not here, the model runs without it: %s", swap.repository, error)
    lost = _lost[id(swap)] = Lost(swap, _first_line(error))
    return lost


def _read_uses(module: nn.Module, functions: Mapping[str, tuple[nn.Module, Swap]]) -> Uses:
    uses = Uses(module, functions)
    with functions_lock:
        for function, swap in functions.values():
            if in_effect(function) is None:
                forward = _function_for(function, swap)
                if not isinstance(forward, Lost):
                    put(function, swap, forward)
            _join(uses, function, swap)
    return uses


# By the identity of the swap: all layers of one pickle share it, so that a kernel that is not here is looked for once.
_lost: WeakValueDictionary[int, Lost] = WeakValueDictionary()


def _function_for(module: nn.Module, swap: Swap) -> Any:
    known = _lost.get(id(swap))
    if known is not None:
        return known
    try:
        kernel = read_back(swap)
        contract.check(kernel.cls, kernel.forward, type(module), str(swap.repository))
    except (KernelHubError, ImportError, OSError) as error:
        return _gone_for(swap, error)
    if not swap.restore:
        return kernel.forward
    from kernelhub.layers.quarantine import watched  # here: it takes forwards off modules, as this module does

    return watched(kernel.forward)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
