"""A layer's calls as they will be run, compiled where the mode says so; and as work to be timed, original against kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from kernelhub.layers import timing
from kernelhub.layers.capture import Call
from kernelhub.layers.replay import Replay, cotangent, differentiable
from kernelhub.layers.state import same_random_state, snapshot
from kernelhub.layers.values import leaves, tensors_in


@dataclass(frozen=True)
class Side:
    """A forward, bound to its layer: as it is `written`, and `compiled` where the mode runs it so."""

    written: Any
    compiled: Any = None

    @property
    def run(self) -> Any:
        """The forward as the mode runs it."""
        return self.written if self.compiled is None else self.compiled


class Frames:
    """Forwards in compiled frames of their own: one for all layers of a kind, so that it is compiled once."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, str], Any] = {}

    def of(self, forward: Any, kind: str) -> Any:
        """The compiled forward of a layer; `kind` says which layers are alike."""
        function = getattr(forward, "__func__", forward)
        key = (function, kind)
        if key not in self._made:
            self._made[key] = _compiled(function)
        made = self._made[key]
        return made if function is forward else partial(made, forward.__self__)


def time_calls(replay: Replay, original: Side, kernel: Side, calls: list[Call]) -> timing.Speed:
    """All recorded calls of a layer, original against kernel, as they will be run: with backward in TRAINING, compiled."""
    module = replay.module
    device, before = _device(calls, module), snapshot(module)
    try:
        with same_random_state({device}), torch.set_grad_enabled(replay.training):
            sides = _work(replay, original.run, calls), _work(replay, kernel.run, calls)
            return timing.race(*sides, timing.stopwatch(device))
    finally:
        before.take_back()


def _work(replay: Replay, forward: Any, calls: list[Call]) -> Callable[[], object]:
    """What is timed: nothing but the calls, and in TRAINING their gradients. The rest is made beforehand."""
    weights = [item for item in replay.module.parameters() if item.requires_grad]
    steps = [_step(forward, call, weights, replay.training) for call in calls]

    def work() -> None:
        for step in steps:
            step()

    return work


def _step(forward: Any, call: Call, weights: list[nn.Parameter], training: bool) -> Callable[[], object]:
    args, kwargs = call.again()
    wanted = [*(item for item in tensors_in((args, kwargs)) if item.requires_grad), *weights]
    cotangents: list[torch.Tensor] = []

    def plain() -> None:
        output = forward(*args, **kwargs)
        if training and wanted:
            ends = differentiable(leaf for _, leaf in leaves(output, ""))
            if not cotangents:  # in the warm-up
                cotangents.extend(map(cotangent, ends))
            if ends:
                torch.autograd.grad(ends, wanted, cotangents, allow_unused=True)

    def under_autocast() -> None:
        with ExitStack() as stack:
            for autocast in call.autocast:
                stack.enter_context(autocast.again())
            plain()

    return under_autocast if any(autocast.elsewhere for autocast in call.autocast) else plain


def _compiled(forward: Any) -> Any:
    """The forward in a compiled frame of its own.

    Frames are cached by their code object: with one for all, layers would push each other out of the cache, and past its
    limit torch.compile runs them as they are, without a word.
    """

    def frame(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = FunctionType(frame.__code__.replace(co_name="kernelhub_frame"), globals(), "frame", None, frame.__closure__)
    return torch.compile(own)


def _device(calls: list[Call], module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *tensors_in([(call.args, dict(call.kwargs)) for call in calls])]
    return next((item.device for item in tensors), torch.device("cpu"))
