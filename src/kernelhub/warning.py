"""Warnings that point at the line of the user's that led to them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType

from kernelhub.errors import printable

# Between a user's line and this package lie PyTorch, where a model calls a layer, the libraries that models come from and
# are wrapped by, and what carries a `with` block.
_BETWEEN = frozenset({"kernelhub", "torch", "contextlib", "transformers", "diffusers", "peft", "accelerate"})


def warn(text: str, category: type[Warning]) -> None:
    """Warn at the nearest line on the stack that is the user's own; what would steer a terminal is escaped.

    The line decides what is shown again and what a filter for a module passes: it is no use where all have the same.
    """
    # The stack is walked, because how deep the user's line lies depends on PyTorch's hooks and on who wraps the model.
    # `warnings.warn(skip_file_prefixes=...)` is of Python 3.12, goes by files, of which generated code has none, and
    # names no line at all in a thread that only libraries run in.
    frame = _users_frame(sys._getframe(1))
    names = frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    module = names.get("__name__") or "<unknown>"
    warnings.warn_explicit(printable(text), category, frame.f_code.co_filename, frame.f_lineno, module, registry)


def once() -> Callable[[str, type[Warning]], None]:
    """`warn`, but the same text only the first time."""
    said: set[str] = set()

    def warn_once(text: str, category: type[Warning]) -> None:
        if text not in said:
            said.add(text)
            warn(text, category)

    return warn_once


def _users_frame(frame: FrameType) -> FrameType:
    """The nearest frame from here outwards that is the user's; the outermost where none is, as in a command."""
    while frame.f_back is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _BETWEEN:
            return frame
        frame = frame.f_back
    return frame
