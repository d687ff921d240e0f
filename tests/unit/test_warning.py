"""Warnings point at the user's line: whatever of this package, of PyTorch, of models or of a `with` block lies between."""

from __future__ import annotations

import threading
import warnings
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from kernelhub.errors import KernelHubWarning
from kernelhub.warning import once, warn

SAY = partial(warn, "said \x1b[2J", KernelHubWarning)


def calling(name: str, function: Any) -> Any:
    """A function of a module of that name, which calls another in its third line."""
    made: Any = ModuleType(name)
    made.function = function
    exec(compile("\ndef call():\n    return function()\n", f"/{name}.py", "exec"), vars(made))
    return made.call


@pytest.mark.parametrize(
    "between",
    [
        "kernelhub",
        "kernelhub.hub.client",
        "torch.nn.modules.module",
        "contextlib",
        "transformers.models.llama.modeling_llama",
        "peft.peft_model",
    ],
)
def test_what_lies_between_is_passed_over(between: str) -> None:
    call = calling("users.code", calling("kernelhub.layers", calling(between, calling("kernelhub.inside", SAY))))
    with pytest.warns(KernelHubWarning) as warned:
        call()
    assert [(item.filename, item.lineno) for item in warned] == [("/users.code.py", 3)]
    assert str(warned[0].message) == "said \\x1b[2J"


def test_a_filter_names_the_module_that_it_is_for() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module="users")
        calling("users.code", calling("kernelhub", SAY))()
        calling("other.code", calling("kernelhub", SAY))()
    assert [item.filename for item in warned] == ["/other.code.py"]


def test_a_line_warns_once_where_the_filter_says_so() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        one, other = (calling(name, calling("kernelhub", SAY)) for name in ("users.code", "other.code"))
        for call in (one, one, other):
            call()
    assert [item.filename for item in warned] == ["/users.code.py", "/other.code.py"]


def test_where_no_line_is_the_users_the_outermost_is_named() -> None:
    def run() -> None:
        thread = threading.Thread(target=calling("kernelhub.worker", SAY))
        thread.start()
        thread.join()

    with pytest.warns(KernelHubWarning) as warned:
        run()
    assert warned[0].filename == threading.__file__


def test_a_text_is_said_once() -> None:
    say, again = once(), once()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for each, text in ((say, "said"), (say, "said"), (again, "said"), (say, "more")):
            each(text, KernelHubWarning)
    assert [str(item.message) for item in warned] == ["said", "said", "more"]
    assert {item.filename for item in warned} == {__file__}
