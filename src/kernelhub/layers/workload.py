"""A layer's calls as work to be timed: original against kernel, as they will be run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType
from typing import Any

import torch
from torch import nn

from kernelhub.layers import timing
from kernelhub.layers.capture import Call, original_forward, same_random_state, snapshot
from kernelhub.layers.mode import Mode
from kernelhub.layers.replay import Replay, cotangent, differentiable
from kernelhub.layers.values import leaves, tensors_in


def time_calls(replay: Replay, kernel: Any, calls: list[Call], mode: Mode) -> timing.Speed:
    """All recorded calls of a layer, original against kernel, as they will be run: with backward in TRAINING, compiled."""
    original, module = original_forward(replay.module), replay.module
    if Mode.TORCH_COMPILE in mode:
        original, kernel = _compiled(original), _compiled(kernel)
    device, before = _device(calls, module), snapshot(module)
    try:
        with same_random_state({device}), torch.set_grad_enabled(replay.training):
            sides = _work(replay, original, calls), _work(replay, kernel, calls)
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

    return under_autocast if any(autocast.enabled for autocast in call.autocast) else plain


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
