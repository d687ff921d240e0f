"""The examples in docstrings of `core`, `settings` and `errors` do what they say.

A test and not `--doctest-modules`: that option would import every Python file below `tests`, the fixtures' kernels too.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import kernelhub.core

CORE = [f"kernelhub.core.{module.name}" for module in pkgutil.iter_modules(kernelhub.core.__path__)]


@pytest.mark.parametrize("name", [*CORE, "kernelhub.settings", "kernelhub.errors"])
def test_the_examples_of(name: str) -> None:
    # raise_on_error would stop at the first failure without its text: doctest prints each, and pytest shows that.
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_the_examples_are_found() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in CORE for test in finder.find(importlib.import_module(name)) if test.examples]
    assert {"kernelhub.core.refs", "kernelhub.core.variants", "kernelhub.core.archs"} <= {test.name for test in found}
