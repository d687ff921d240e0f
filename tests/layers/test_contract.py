"""What a layer kernel must be to stand in for a forward."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn

from kernelhub.errors import LayerContractError
from kernelhub.layers.contract import check, compare
from kernelhub.layers.repositories import function_class


def layer(source: str, **members: Any) -> type[nn.Module]:
    """A layer class whose forward has the signature `source`, such as `self, x, *, scale=1.0`."""
    space: dict[str, Any] = {}
    exec(f"def forward({source}):\n    return None", space)
    return types.new_class("Layer", (nn.Module,), exec_body=lambda ns: ns.update(forward=space["forward"], **members))


def problems(original: str, kernel: str, **members: Any) -> tuple[str, ...]:
    own = layer(kernel, **members)
    return compare(own, own.forward, layer(original)).problems


FIT = [
    ("self, x", "self, x"),
    ("self, x, y=None", "self, a, b=None"),
    ("self, x, y", "self, x, y=1"),
    ("self, x, *, scale=1.0", "self, x, *, scale=1.0"),
    ("self, x, *args, **kwargs", "self, x, *args, **kwargs"),
    ("self, /, x", "self, x"),
    ("self, *, a, b", "self, *, b, a"),
]
UNFIT = [
    ("self, x", "self, x, y", "other parameters"),
    ("self, x, y=None", "self, x", "other parameters"),
    ("self, x, y=None", "self, x, y", "no default"),
    ("self, x, *, scale=1.0", "self, x, *, scale", "no default"),
    ("self, x, *, scale", "self, x, *, factor", "keyword 'factor'"),
    ("self, x, scale=1.0", "self, x, *, scale=1.0", "other parameters"),
    ("self, x", "self, x, /", "positional-only"),
    ("self, x, **kwargs", "self, x", "**kwargs"),
    ("self, x", "self, x, *args", "*args"),
]


@pytest.mark.parametrize(("original", "kernel"), FIT)
def test_signatures_that_agree(original: str, kernel: str) -> None:
    assert problems(original, kernel) == ()


@pytest.mark.parametrize(("original", "kernel", "says"), UNFIT)
def test_signatures_that_drifted_are_refused(original: str, kernel: str, says: str) -> None:
    """needs 19: names of keywords, numbers, kinds and defaults are part of the contract."""
    found = problems(original, kernel)
    assert len(found) == 1
    assert says in found[0]


def test_other_names_and_other_defaults_are_notes() -> None:
    own = layer("self, hidden, eps=1e-5")
    notes = check(own, own.forward, layer("self, x, eps=1e-6"), "org/norm:Norm")
    assert notes == (
        "the default of 'eps' is 1e-05, the original's 1e-06",
        "its positional parameters are named (hidden, eps), not (x, eps)",
    )


def test_members_that_the_module_would_not_get_are_refused() -> None:
    assert problems("self, x", "self, x", can_torch_compile=True, has_backward=False) == ()
    assert "helper, scale" in problems("self, x", "self, x", scale=2, helper=lambda self: 1)[0]
    assert "__call__" in problems("self, x", "self, x", __call__=lambda self, x: x)[0]


def test_annotations_and_documentation_are_no_members() -> None:
    class Documented(nn.Module):
        """With a docstring."""

        weight: torch.Tensor
        variance_epsilon: float

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert compare(Documented, Documented.forward, layer("self, x")).problems == ()


def test_a_constructor_is_refused_also_an_inherited_one() -> None:
    class Constructed(nn.Module):
        def __init__(self) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Inherited(Constructed):
        pass

    for cls in (Constructed, Inherited):
        with pytest.raises(TypeError, match="constructor"):
            check(cls, cls.forward, layer("self, x"), "org/norm:Norm")


def test_what_is_no_module_or_has_no_forward_is_refused() -> None:
    class NoModule:
        def forward(self, x: object) -> object:
            return x

    class NoForward(nn.Module):
        pass

    for cls, says in ((NoModule, "not an nn.Module"), (NoForward, "no forward")):
        with pytest.raises(LayerContractError, match=says) as caught:
            check(cls, getattr(cls, "forward", None), layer("self, x"), "org/norm:Norm")  # type: ignore[arg-type]
        assert caught.value.problems


def test_a_function_is_compared_with_a_functions_own_parameters() -> None:
    def rope(q: object, k: object, scale: float = 1.0) -> None: ...

    own = function_class(rope)
    original = type("Func", (nn.Module,), {"forward": staticmethod(rope)})
    assert compare(own, own.forward, original).problems == ()
    assert compare(own, own.forward, layer("self, q, k, scale=1.0")).problems == ()
    assert compare(own, own.forward, layer("self, q, k")).problems != ()
