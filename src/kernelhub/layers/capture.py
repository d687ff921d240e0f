"""One run of the original model, in which each layer's calls are recorded; the model is as before afterwards."""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernelhub.errors import InvalidReference
from kernelhub.layers.fusion import recorded_at
from kernelhub.layers.mode import Mode
from kernelhub.layers.state import as_before
from kernelhub.layers.survey import uncompiled
from kernelhub.layers.swap import slot
from kernelhub.layers.values import Signature, rebuilt, tensors_in, twin


@dataclass(frozen=True)
class Sample:
    """What a model is run on, and how much of it is kept.

    `inputs`: a tensor, a tuple of arguments, a mapping of keywords, or a function that runs the model (it is given the
    model if it takes an argument). Of each layer at most `max_calls` calls that differ in dtypes, shapes, strides or other
    values are kept, with at most `max_bytes` of tensors; a call that would be too much is left out, and counted.

    Raises `InvalidReference` [ValueError] for anything else.
    """

    inputs: Any
    max_calls: int = 4
    max_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        if not (isinstance(self.inputs, (torch.Tensor, tuple, Mapping)) or callable(self.inputs)):
            raise InvalidReference(
                f"sample_inputs: {type(self.inputs).__name__} is nothing to run a model on",
                hint="Expected a tensor, a tuple of arguments, a mapping of keywords, or a function that runs the model.",
            )
        for name in ("max_calls", "max_bytes"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InvalidReference(f"Sample: {name}={getattr(self, name)!r}", hint="Expected a number from 1 on.")

    @classmethod
    def of(cls, value: Any) -> Sample:
        return value if isinstance(value, cls) else cls(value)

    def run(self, model: nn.Module) -> None:
        """Run the model on the inputs. A cache among them that the model writes into stays as it is: a copy is written."""
        inputs = self.inputs
        if isinstance(inputs, torch.Tensor):
            model(inputs)
        elif isinstance(inputs, tuple):
            model(*map(_own, inputs))
        elif isinstance(inputs, Mapping):
            model(**{name: _own(value) for name, value in inputs.items()})
        elif _takes_argument(inputs):
            inputs(model)
        else:
            inputs()


def _own(argument: Any) -> Any:
    """A copy of an object that a model could write into, such as a cache; what cannot be copied, and all else, as it is."""
    if isinstance(argument, (torch.Tensor, nn.Module)) or callable(argument) or not hasattr(argument, "__dict__"):
        return argument
    try:
        return copy.deepcopy(argument)
    except Exception:  # noqa: BLE001 - whatever its class raises
        return argument


def _takes_argument(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    return False


@dataclass(frozen=True)
class Autocast:
    """The autocast that a call was made under, of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def here(cls, device_types: Iterable[str]) -> tuple[Autocast, ...]:
        return tuple(
            cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(device_types)
        )

    @property
    def elsewhere(self) -> bool:
        """Whether it is another one than there is here."""
        return self.enabled or torch.is_autocast_enabled(self.device_type)

    def again(self) -> Any:
        if not self.elsewhere:
            return nullcontext()  # entering it would change nothing but what compiled frames are guarded by
        # Without its cache of cast weights, which would outlive the weights that a run in float64 puts there.
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(frozen=True)
class Call:
    """A recorded call of a layer. `homes` has the devices of tensors that wait on the CPU, by identity."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    signature: Signature
    autocast: tuple[Autocast, ...]
    homes: Mapping[int, torch.device]

    def again(self, dtype: torch.dtype | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as they came, in tensors of their own; floating point ones in `dtype`, if one is given."""

        def made(tensor: torch.Tensor) -> torch.Tensor:
            wanted = dtype if tensor.dtype.is_floating_point else None
            return twin(tensor, device=self.homes.get(id(tensor)), dtype=wanted).requires_grad_(tensor.requires_grad)

        args, kwargs = rebuilt((self.args, dict(self.kwargs)), made)
        return args, kwargs

    def altered(self) -> Call | None:
        """The same call with other values in its first floating point tensor; None where it has none."""
        first = next((leaf for leaf in tensors_in((self.args, self.kwargs)) if leaf.dtype.is_floating_point), None)
        if first is None or first.layout is not torch.strided or first.numel() == 0:
            return None
        homes = dict(self.homes)

        def changed(tensor: torch.Tensor) -> torch.Tensor:
            made = twin(tensor).requires_grad_(tensor.requires_grad)
            if tensor is first:
                other = torch.roll(-tensor.detach(), 1, -1) if tensor.dim() else -tensor.detach()
                if 0 not in tensor.stride():
                    made.detach().copy_(other)
            if id(tensor) in homes:
                homes[id(made)] = homes[id(tensor)]
            return made

        args, kwargs = rebuilt((self.args, dict(self.kwargs)), changed)
        return Call(args, kwargs, self.signature, self.autocast, homes)


class Recorder:
    """Stands where a layer's forward was, keeps the arguments of its calls, and calls it."""

    def __init__(self, forward: Any, sample: Sample, kept: Copies, training: bool) -> None:
        self._forward, self._sample, self._kept, self._training = forward, sample, kept, training
        self.calls: dict[Signature, Call] = {}
        self.seen, self.bytes = 0, 0
        self.left_out: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        self._record(args, kwargs)
        return self._forward(*args, **kwargs)

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = Signature.of((args, kwargs))
        if signature in self.calls or len(self.calls) >= self._sample.max_calls:
            return
        tensors = tensors_in((args, kwargs))
        if any(tensor.is_meta for tensor in tensors):
            self.left_out = "a call has tensors on the meta device, which have no values"
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self.bytes + size > self._sample.max_bytes:
            self.left_out = (
                f"the inputs of a call take {size:,} bytes, and Sample(max_bytes={self._sample.max_bytes:,}) are kept"
            )
            return
        kinds = {"cpu", *(tensor.device.type for tensor in tensors)}
        autocast, homes = Autocast.here(kinds), {}
        # Where the run has no gradients (generate) and training is asked for, everything gets one.
        differentiable = self._training and not torch.is_grad_enabled()
        try:
            # What is made under inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                held = rebuilt((args, kwargs), lambda tensor: self._kept.of(tensor, differentiable))
        except Exception as error:  # noqa: BLE001 - whatever an argument's class raises when it is copied
            self.left_out = f"an argument of a call cannot be copied: {type(error).__name__}: {error}"
            return
        for source, made in zip(tensors, tensors_in(held), strict=True):
            if made.device != source.device:
                homes[id(made)] = source.device
        self.bytes += size
        self.calls[signature] = Call(held[0], held[1], signature, autocast, homes)


@dataclass
class Copies:
    """Copies of tensors, one for all layers that are given the same one, as masks and position embeddings are."""

    _known: dict[tuple[int, bool], tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = field(default_factory=dict)

    def of(self, tensor: torch.Tensor, differentiable: bool) -> torch.Tensor:
        """A copy that requires a gradient where the tensor does, or where `differentiable` says so of all."""
        wanted = tensor.requires_grad or (differentiable and tensor.dtype.is_floating_point)
        version = -1 if tensor.is_inference() else tensor._version
        known = self._known.get((id(tensor), wanted))
        if known is not None and known[0]() is tensor and known[1] == version >= 0:
            return known[2]
        made = twin(tensor, device=_room_for(tensor)).requires_grad_(wanted)
        self._known[id(tensor), wanted] = (weakref.ref(tensor), version, made)
        return made


def _room_for(tensor: torch.Tensor) -> torch.device:
    """The tensor's device, or the CPU where less than four times its size is free there."""
    if tensor.device.type != "cuda":
        return tensor.device
    free, _ = torch.cuda.mem_get_info(tensor.device)
    unused = torch.cuda.memory_reserved(tensor.device) - torch.cuda.memory_allocated(tensor.device)
    room = free + unused >= 4 * tensor.numel() * tensor.element_size()
    return tensor.device if room else torch.device("cpu")


def capture(model: nn.Module, modules: Sequence[nn.Module], sample: Sample, mode: Mode) -> dict[int, Recorder]:
    """The calls of `modules` in one run of the model, by the identity of the module.

    The model runs in the training state of the mode, with gradients in TRAINING and without them else. Random state,
    buffers, gradients, training flags and forwards are afterwards as they were. Raises what the model raises.
    """
    inner, training = uncompiled(model), Mode.TRAINING in mode
    kept = Copies()
    found: dict[int, Recorder] = {}
    with ExitStack() as stack:
        stack.enter_context(as_before(inner))
        stack.enter_context(_eager())
        stack.enter_context(torch.set_grad_enabled(training))
        if inner.training != training:
            inner.train(training)
        for module in modules:
            if id(module) not in found:
                called = recorded_at(module)
                recorder = found[id(module)] = Recorder(_current(called), sample, kept, training)
                stack.enter_context(_forward(called, recorder))
        sample.run(inner)
    return found


def _current(module: nn.Module) -> Any:
    name = slot(module.__dict__)
    return module.__dict__.get(name) or original_forward(module)


def original_forward(module: nn.Module) -> Any:
    """The forward of the module's class, bound to the module."""
    return inspect.getattr_static(type(module), "forward").__get__(module, type(module))


@contextmanager
def _forward(module: nn.Module, forward: Any) -> Iterator[None]:
    attributes = module.__dict__
    name = slot(attributes)
    before = dict(attributes)
    attributes[name] = forward
    try:
        yield
    finally:
        if name in before:
            attributes[name] = before[name]
        else:
            attributes.pop(name, None)


def _eager() -> Any:
    """Compiled parts of the model run as they are written: a compiled frame would not see the recorders."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds, and nothing is compiled without it
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
