"""What a remembered verdict is found by: everything that a layer computes with tells its description apart."""

from __future__ import annotations

import cmath
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from kernelhub.layers import describe, machine
from kernelhub.layers.values import Signature


def made(source: str, name: str = "some_module", **names: Any) -> type[nn.Module]:
    """A layer's class from source, as a module of its own."""
    space: dict[str, Any] = {
        "nn": nn,
        "torch": torch,
        "F": functional,
        "functools": functools,
        "__name__": name,
        **names,
    }
    exec(source, space)
    return space["Layer"]


def digest(cls: type[nn.Module], **held: Any) -> str:
    module = cls()
    module.__dict__.update(held)
    return describe.digest([describe.code(module), describe.settings(module), describe.weights(module)])


def layer(returned: str, member: str = "pass", before: str = "") -> str:
    return f"{before}\nclass Layer(nn.Module):\n    {member}\n    def forward(self, x):\n        return {returned}\n"


CACHED = "@functools.cached_property\n    def scale(self): return 1"
HELD = "class Held:\n    def __call__(self, x): return x * 1\nheld = Held()"
SOURCES: dict[str, tuple[str, str, str]] = {
    "a function of the class": (layer("type(self).act(x)", "act = torch.tanh"), "tanh", "relu"),
    "a dtype of the class": (layer("x.to(self.kind)", "kind = torch.float32"), "float32", "bfloat16"),
    "a table of the class": (layer("x * self.table['a']", "table = {'a': 1}"), "1}", "2}"),
    "a partial of the class": (layer("type(self).act(x)", "act = functools.partial(F.gelu, approximate='none')"), "none", "tanh"),
    "a cached property": (layer("x * self.scale", CACHED), "return 1", "return 2"),
    "a class in the class": (layer("x * self.Sizes.one", "class Sizes: one = 1"), "= 1", "= 2"),
    "a global table": (layer("x * TABLE['eps']", before="TABLE = {'eps': 1}"), "1}", "2}"),
    "a global list": (layer("x * LIST[0]", before="LIST = [1]"), "[1]", "[2]"),
    "a global namespace": (layer("x * N.a", before="import types\nN = types.SimpleNamespace(a=1)"), "a=1", "a=2"),
    "a global object": (layer("x * C.a", before="class C: pass\nC = C()\nC.a = 1"), "a = 1", "a = 2"),
    "a cached function": (layer("x * f(1)", before="@functools.cache\ndef f(n): return 1"), "return 1", "return 2"),
    "a global module": (layer("ACT(x)", before="ACT = nn.GELU()"), "GELU()", "GELU('tanh')"),
    "a global callable": (layer("held(x)", before=HELD), "x * 1", "x * 2"),
    "a scripted function": (layer("f(x)", before="f = torch.jit.script(F.hardtanh if 0 else F.relu6)"), "if 0", "if 1"),
    "a function of another module": (layer("f(x)", before="from math import sqrt as f"), "math", "cmath"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("what", SOURCES)
def test_all_that_code_refers_to_counts(what: str) -> None:
    text, old, new = SOURCES[what]
    assert old in text
    assert digest(made(text)) == digest(made(text))
    assert digest(made(text)) != digest(made(text.replace(old, new)))


def _array(value: float) -> Any:
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(5_000)
    array[2_500] = value
    return array


def _held(factor: str) -> Any:
    space: dict[str, Any] = {"__name__": "some_module"}
    exec(HELD.replace("* 1", f"* {factor}"), space)
    return space["held"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: torch.ones(2), lambda: torch.ones(2).double()),
        (lambda: torch.ones(2), lambda: torch.ones(3)),
        (nn.GELU, lambda: nn.GELU("tanh")),
        (lambda: [nn.GELU()], lambda: [nn.GELU("tanh")]),
        (lambda: [nn.Linear(2, 2)], lambda: [nn.Linear(2, 2).double()]),
        (lambda: _held("1"), lambda: _held("2")),
        (lambda: math.sqrt, lambda: cmath.sqrt),
        (lambda: {1: 2}.get, lambda: {1: 3}.get),
        (lambda: _array(0), lambda: _array(1)),
        (lambda: torch.ops.aten.relu.default, lambda: torch.ops.aten.gelu.default),
    ],
)
def test_all_that_a_layer_holds_counts(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    cls = made(layer("x"))
    assert digest(cls, held=one()) == digest(cls, held=one())
    assert digest(cls, held=one()) != digest(cls, held=other())


def test_weights_that_lie_elsewhere_count() -> None:
    """A kernel that loads vectors may be right at one place and not at another."""

    def of(offset: int) -> str:
        module = nn.Module()
        module.weight = nn.Parameter(torch.ones(9)[offset : offset + 8])
        return describe.digest(describe.weights(module))

    assert of(0) == of(4 * 0)
    assert of(0) != of(1)


def _wrapped(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize("put", [_wrapped, functools.wraps(functional.silu)(lambda x: x)])
@pytest.mark.parametrize("called", ["F.silu(x)", "torch.nn.functional.silu(x)"])
def test_what_was_put_into_a_package_counts(called: str, put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = made(layer(called))
    before = digest(cls)
    monkeypatch.setattr(functional, "silu", put)
    assert digest(cls) != before


def test_a_forward_that_was_put_on_a_class_of_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = describe.code(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert describe.code(model) != before


def _module(
    monkeypatch: pytest.MonkeyPatch, name: str, source: str, file: str | None = None, **more: Any
) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(more, **({"__file__": file} if file else {}))
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_what_a_function_imports_when_it_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "class Layer(nn.Module):\n    def forward(self, x):\n        from lazy_helpers import scaled\n        return scaled(x)"

    def of(factor: int) -> str:
        _module(monkeypatch, "lazy_helpers", f"def scaled(x): return x * {factor}")
        return digest(made(text))

    assert of(1) == of(1)
    assert of(1) != of(2)


def test_modules_within_modules_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(factor: int) -> str:
        inner = _module(monkeypatch, "outer.inner", f"def scaled(x): return x * {factor}")
        return digest(made(layer("outer.inner.scaled(x)"), outer=_module(monkeypatch, "outer", "", inner=inner)))

    assert of(1) == of(1)
    assert of(1) != of(2)


@pytest.mark.parametrize(
    ("file", "counts"),
    [("/home/me/work/a_package/__init__.py", True), ("/usr/lib/python3/site-packages/a_package/__init__.py", False)],
)
def test_the_version_of_a_package_stands_for_it_where_it_is_installed(
    file: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(factor: int) -> str:
        describe._versioned.cache_clear()
        _module(monkeypatch, "a_package", "", file, __version__="1.0")
        helpers = _module(monkeypatch, "a_package.helpers", f"def scaled(x): return x * {factor}")
        return digest(made(layer("scaled(x)"), "a_package.layers", scaled=helpers.scaled))

    assert of(1) == of(1)
    assert (of(1) != of(2)) is counts
    describe._versioned.cache_clear()


def test_a_module_that_is_named_as_one_of_python_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _module(monkeypatch, "profile", "", str(tmp_path / "profile.py"))
    describe._versioned.cache_clear()
    assert digest(made(layer("x * 1"), "profile")) != digest(made(layer("x * 2"), "profile"))
    describe._versioned.cache_clear()
    assert describe._versioned("functools") == "functools"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.float32, torch.float16),
        (functional.silu, functional.gelu),
        (functional.silu, functional.mish),
        (slice(0, 1), slice(0, 2)),
        ({1, 2}, {1, 3}),
        (range(2), range(3)),
        (torch.device("cpu"), torch.device("meta")),
        (torch.Size([1]), torch.Size([2])),
        (int, float),
    ],
)
def test_calls_with_other_arguments_are_other_calls(one: Any, other: Any) -> None:
    x = torch.ones(1)
    assert Signature.of((x, one)) == Signature.of((x, one))
    assert Signature.of((x, one)) != Signature.of((x, other))


@pytest.mark.parametrize(
    ("change", "back"),
    [
        (lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False)),
        (lambda: torch.backends.cuda.enable_flash_sdp(False), lambda: torch.backends.cuda.enable_flash_sdp(True)),
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    ],
)
def test_switches_of_torch_count(change: Callable[[], Any], back: Callable[[], Any]) -> None:
    before = machine.switches()
    try:
        change()
        assert machine.switches() != before
    finally:
        back()
    assert machine.switches() == before


def test_what_is_read_from_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.switches()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert machine.switches() != before
