"""Calls of compiled kernels that go around PyTorch's dispatcher: the op's results, and never where somebody could tell."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH = 96
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def norm(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("norm", request.config, "cpu")


@pytest.fixture(scope="session")
def activation(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("activation", request.config, "cpu")


class Case:
    """One function: its tensors, and with them the direct call, the op, and the function that models call."""

    def __init__(
        self, kernel: ModuleType, name: str, shape: tuple[int, ...] = (3, WIDTH), dtype: torch.dtype = DTYPES[0]
    ):
        c = kernel.compiled
        generator = torch.Generator().manual_seed(0)

        def t(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(dtype)

        x, other, weight, bias = t(*shape), t(*shape), t(shape[-1]), t(shape[-1])
        direct, ops = c.DIRECT, c.ops
        self.tensors, self.direct, self.op, self.function = {
            "rms_norm": (
                [x, weight],
                lambda x, w: direct.rms_norm(x, w, 1e-6, 0),
                lambda x, w: ops.rms_norm(x, w, 1e-6, 0),
                lambda x, w: kernel.rms_norm(x, w, 1e-6),
            ),
            "add_rms_norm": (
                [x, other, weight],
                lambda x, r, w: direct.add_rms_norm(x, r, w, 1e-6, 0),
                lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-6, 0),
                lambda x, r, w: kernel.add_rms_norm(x, r, w, 1e-6),
            ),
            "layer_norm": (
                [x, weight, bias],
                lambda x, w, b: direct.layer_norm(x, w, b, 1e-5, None),
                lambda x, w, b: ops.layer_norm(x, w, b, 1e-5),
                lambda x, w, b: kernel.layer_norm(x, w, b, 1e-5),
            ),
            "apply": (
                [x],
                lambda x: direct.apply(x, 2),
                lambda x: ops.apply(x, 2),
                lambda x: kernel.gelu_tanh(x),
            ),
            "multiply": (
                [x, other],
                lambda a, b: direct.multiply(a, b, 0),
                lambda a, b: ops.multiply(a, b, 0),
                lambda a, b: kernel.silu_and_mul(a, b),
            ),
        }[name]
        self.op_name = f"{c.ops.name}::{name}"

    def taken(self) -> bool:
        return self.direct(*self.tensors) is not None


KERNEL_OF = {
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "layer_norm": "norm",
    "apply": "activation",
    "multiply": "activation",
}


@pytest.fixture(params=KERNEL_OF)
def make(request: pytest.FixtureRequest) -> Callable[..., Case]:
    """Makes a case of each function."""
    kernel = request.getfixturevalue(KERNEL_OF[request.param])
    assert kernel.compiled.DIRECT is not None
    return lambda *options: Case(kernel, request.param, *options)


def flat(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_ops_results_bit_for_bit(make: Callable[..., Case], dtype: torch.dtype) -> None:
    for shape in ((1, 2048), (WIDTH,), (2, 3, 65), (1, 7), (8, 2048), (1, 16384), (4, 4096), (3, 5000)):
        case = make(shape, dtype)
        with torch.no_grad():
            got, expected = flat(case.direct(*case.tensors)), flat(case.op(*case.tensors))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), shape
            assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), False)
            assert all(a.data_ptr() != x.data_ptr() for x in case.tensors)


def test_the_levels_of_instructions_are_the_ops(norm: ModuleType, activation: ModuleType) -> None:
    cases = [Case(norm, "layer_norm", (1, 2048)), Case(activation, "multiply", (1, 2048))]
    try:
        for case, kernel in zip(cases, (norm, activation), strict=True):
            for level in range(3):
                kernel.compiled.ops.use_level(level)
                assert torch.equal(case.direct(*case.tensors), case.op(*case.tensors))
    finally:
        for kernel in (norm, activation):
            kernel.compiled.ops.use_level(2)


def test_every_form_and_function_is_the_ops(norm: ModuleType, activation: ModuleType) -> None:
    x, w, b = torch.randn(3, WIDTH), torch.randn(WIDTH), torch.randn(WIDTH)
    n, a = norm.compiled, activation.compiled
    for form in range(3):
        assert torch.equal(n.DIRECT.rms_norm(x, w, 1e-6, form), n.ops.rms_norm(x, w, 1e-6, form))
        for got, expected in zip(
            n.DIRECT.add_rms_norm(x, x, w, 0.5, form), n.ops.add_rms_norm(x, x, w, 0.5, form), strict=True
        ):
            assert torch.equal(got, expected)
    for options in ((w, b), (w, None), (None, b), (None, None)):
        assert torch.equal(n.DIRECT.layer_norm(x, *options, 1e-5, None), n.ops.layer_norm(x, *options, 1e-5))
    for shape in ((WIDTH,), torch.Size((WIDTH,))):
        assert torch.equal(n.DIRECT.layer_norm(x, w, b, 1e-5, shape), n.ops.layer_norm(x, w, b, 1e-5))
    for function in range(4):
        assert torch.equal(a.DIRECT.apply(x, function), a.ops.apply(x, function))
        assert torch.equal(a.DIRECT.multiply(x, 2 * x, function), a.ops.multiply(x, 2 * x, function))


def test_the_functions_take_the_direct_way(
    make: Callable[..., Case], norm: ModuleType, activation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make()

    def refuse(*_: Any) -> None:
        raise AssertionError("the op was called")

    expected = flat(case.function(*case.tensors))
    for compiled in (norm.compiled, activation.compiled):
        for name in list(vars(compiled)):
            if name.endswith("_now"):
                monkeypatch.setattr(compiled, name, refuse)
    for got, wanted in zip(flat(case.function(*case.tensors)), expected, strict=True):
        assert torch.equal(got, wanted)
    with torch.inference_mode():
        got = flat(case.function(*case.tensors))
        assert all(result.is_inference() for result in got)
    parameters = [nn.Parameter(x) if x.dim() == 1 else x for x in case.tensors]
    with torch.no_grad():
        case.function(*parameters)


def test_nothing_is_kept_and_nothing_lost(make: Callable[..., Case]) -> None:
    """References are counted by hand."""
    case = make()
    held = [*case.tensors, None, True, torch.empty_like]
    with torch.no_grad():
        before = [sys.getrefcount(x) for x in held]
        for _ in range(200):
            result = case.direct(*case.tensors)
            case.direct(case.tensors[0].T, *case.tensors[1:])
        after = [sys.getrefcount(x) for x in held]
    assert all(b - a < 20 for a, b in zip(before, after, strict=True)), (before, after)
    assert all(a - b < 20 for a, b in zip(before, after, strict=True)), (before, after)
    assert all(sys.getrefcount(x) <= 4 for x in flat(result))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Passing(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_op(make: Callable[..., Case]) -> None:
    case = make()
    with Seen() as dispatched:
        assert not case.taken()
        case.function(*case.tensors)
    assert case.op_name in dispatched.names
    with Passing() as called:
        assert not case.taken()
        case.function(*case.tensors)
    assert any(case.op_name.split("::")[1] in name for name in called.names)
    assert case.taken()


def test_the_profiler_sees_the_op(make: Callable[..., Case]) -> None:
    case = make()
    with profile() as found:
        case.function(*case.tensors)
    assert case.op_name in {event.name for event in found.events()}
    assert case.taken()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("enabled", [True, False])
def test_a_trace_is_pytorchs(make: Callable[..., Case], enabled: bool) -> None:
    """It has no place for an autograd function, is loaded where there is no kernel, and gradients flow through it."""
    case = make()
    tensors = tuple(x.requires_grad_() for x in case.tensors)
    check = "add" not in case.op_name  # of which PyTorch's check names the sum in two ways, of the same graph
    with torch.set_grad_enabled(enabled):
        other = tuple(x.detach().flip(-1).requires_grad_() for x in tensors)
        traced = torch.jit.trace(case.function, other, check_trace=check)
    assert case.op_name.split("::")[0] not in str(traced.graph)
    found, expected = flat(traced(*tensors)), flat(case.function(*tensors))
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(sum(y.square().sum() for y in ys), tensors) for ys in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_not_where_a_gradient_is_asked_for(make: Callable[..., Case]) -> None:
    for position in range(len(make().tensors)):
        case = make()
        case.tensors[position].requires_grad_()
        assert not case.taken()
        with torch.no_grad():
            assert case.taken()
        sum(y.float().sum() for y in flat(case.function(*case.tensors))).backward()
        assert case.tensors[position].grad is not None


def test_forwards_of_gradients_take_it(
    make: Callable[..., Case], norm: ModuleType, activation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make()
    leaves = [x.requires_grad_() for x in case.tensors]
    with Seen() as dispatched:  # the op's, then
        expected = torch.autograd.grad(sum(y.square().sum() for y in flat(case.function(*leaves))), leaves)
    assert case.op_name in dispatched.names
    with profile() as found:
        case.function(*leaves)
    assert case.op_name in {event.name for event in found.events()}
    called = []
    for compiled in (norm.compiled, activation.compiled):
        for name in list(vars(compiled)):
            if name.endswith("_inside") and name != "_inside":
                original = getattr(compiled, name)
                short = original.__closure__[[*original.__code__.co_freevars].index("short")].cell_contents

                def directly(*arguments: Any, short: Any = short) -> Any:
                    called.append(short.__name__)
                    result = short(*arguments)
                    assert result is not None
                    return result

                monkeypatch.setattr(compiled, name, directly)
    got = torch.autograd.grad(sum(y.square().sum() for y in flat(case.function(*leaves))), leaves)
    assert called == [case.op_name.split("::")[1]]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_tensor_that_outlived_its_transform_is_what_it_holds(make: Callable[..., Case]) -> None:
    case = make()
    x, *others = (t.requires_grad_() for t in case.tensors)
    kept: list[Tensor] = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(x.detach())
    with torch.no_grad():
        assert case.direct(kept[0], *others) is None
        assert torch.equal(flat(case.function(kept[0], *others))[0], flat(case.function(x, *others))[0])
    if others:
        got = torch.autograd.grad(flat(case.function(kept[0], *others))[0].square().sum(), others)
        expected = torch.autograd.grad(flat(case.function(x, *others))[0].square().sum(), others)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_not_under_transforms(make: Callable[..., Case]) -> None:
    case = make()
    taken = []

    def inside(*tensors: Tensor) -> Tensor:
        taken.append(case.taken())  # of plain tensors, too
        return flat(case.function(*tensors))[0]

    torch.func.vmap(lambda x: inside(x, *case.tensors[1:]))(case.tensors[0][None])
    torch.func.jvp(inside, tuple(case.tensors), tuple(case.tensors))
    torch.func.functionalize(inside)(*case.tensors)
    with forward_ad.dual_level():
        inside(*case.tensors)
    assert taken == [False] * 4
    assert case.taken()


class Named(Tensor):
    pass


class NamedParameter(nn.Parameter):
    pass


def odd() -> dict[str, Callable[[Tensor], Any]]:
    """Ways to something that is no tensor of elements side by side on the CPU, of any of the three dtypes."""

    return {
        "subclass": lambda x: x.as_subclass(Named),
        "subclass of a parameter": lambda x: NamedParameter(x, requires_grad=False),
        "float64": lambda x: x.double(),
        "int": lambda x: x.int(),
        "complex": lambda x: x.cfloat(),
        "meta": lambda x: x.to("meta"),
        "sparse": lambda x: x.to_sparse(),
        "mkldnn": lambda x: x.to_mkldnn(),
        "nested": lambda x: torch.nested.nested_tensor([x, x]),
        "functional": torch._to_functional_tensor,
        "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
        "negative bit": torch._neg_view,
        "apart": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        "backwards": lambda x: x.flip(-1).as_strided(x.shape, [0] * x.dim()),
        "expanded": lambda x: x[..., :1].expand(x.shape),
        "empty": lambda x: x[..., :0],
        "no dimension": lambda x: x.sum(),
        "list": lambda x: x.tolist(),
        "None": lambda x: None,
        "type": lambda x: Tensor,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", odd())
def test_takes_nothing_but_plain_elements_side_by_side(make: Callable[..., Case], kind: str) -> None:
    for position, x in enumerate(make().tensors):
        case = make()
        case.tensors[position] = odd()[kind](x)
        if kind == "None" and case.op_name.endswith("layer_norm") and position > 0:
            continue  # a layer norm has none, or no bias
        assert not case.taken(), position


def test_nor_other_strides_dtypes_shapes_and_sizes(make: Callable[..., Case]) -> None:
    case = make((1, 3, WIDTH))
    x, *others = case.tensors
    for tensors in (
        [torch.randn(2, 4, WIDTH)[:1, :3], *others],  # contiguous by its sizes, but not by the first stride
        [torch.randn(3, 2 * WIDTH)[:, :WIDTH], *others],
        *([x, *others[:at], others[at].half(), *others[at + 1 :]] for at in range(len(others))),
        *([x, *others[:at], others[at][..., :-1].clone(), *others[at + 1 :]] for at in range(len(others))),
        *([x, *others[:at], others[at][None], *others[at + 1 :]] for at in range(len(others))),
    ):
        assert case.direct(*tensors) is None
    large = make((5, 4096))
    assert not large.taken(), "several threads are worth it"


def test_nor_wrong_arguments(norm: ModuleType, activation: ModuleType) -> None:
    n, a = norm.compiled.DIRECT, activation.compiled.DIRECT
    x, w = torch.randn(3, WIDTH), torch.randn(WIDTH)
    for eps in (None, 1, "0", torch.tensor(0.0)):
        assert n.rms_norm(x, w, eps, 0) is None
        assert n.layer_norm(x, w, None, eps, None) is None
    for number in (-1, 4, 1 << 70, None, 0.0):
        assert n.rms_norm(x, w, 1e-6, number) is None
        assert n.add_rms_norm(x, x, w, 1e-6, number) is None
        assert a.apply(x, number) is None
        assert a.multiply(x, x, number) is None
    for shape in ((48,), (3, WIDTH), (), [WIDTH], WIDTH, ("96",)):
        assert n.layer_norm(x, w, None, 1e-5, shape) is None
    assert n.rms_norm(x) is n.add_rms_norm() is n.layer_norm(x, w) is a.apply() is a.multiply(x) is None
    with pytest.raises(TypeError, match="arguments"):
        n.prepare(None)


def test_a_negative_view_is_what_it_says(make: Callable[..., Case]) -> None:
    case = make()
    expected = flat(case.op(-case.tensors[0], *case.tensors[1:]))
    got = flat(case.function(torch._neg_view(case.tensors[0]), *case.tensors[1:]))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_threads_do_not_mix_their_results(make: Callable[..., Case]) -> None:
    case = make()
    expected = [flat(case.op(k * case.tensors[0], *case.tensors[1:]))[0] for k in range(4)]
    wrong: list[int] = []

    def work(k: int) -> None:
        x = k * case.tensors[0]
        for _ in range(200):
            if not torch.equal(flat(case.direct(x, *case.tensors[1:]))[0], expected[k]):
                wrong.append(k)

    threads = [Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


EXCHANGED: list[Any] = []


def exchange(name: str, major: int) -> Any:
    """A capsule of a table of functions, none of which is there; of a name and a major version."""
    table, text = (ctypes.c_uint64 * 7)(major), name.encode()
    EXCHANGED.append((table, text))  # a capsule keeps neither
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(table), text, None)


def test_without_the_table_of_functions_the_ops_are_called(norm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = sys.modules[f"{norm.__name__}.direct"].functions
    assert functions() is norm.compiled.DIRECT
    for table in (
        None,
        7,
        exchange("another", 1),
        exchange("dlpack_exchange_api", 2),
        exchange("dlpack_exchange_api", 1),
    ):
        monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", table, raising=False)
        assert functions() is None
    monkeypatch.undo()
    for watcher in ("_len_torch_function_stack", "_is_tracing"):
        with monkeypatch.context() as lacking:
            lacking.delattr(torch._C, watcher)
            assert functions() is None
    assert functions() is norm.compiled.DIRECT
    monkeypatch.setattr(norm.compiled, "DIRECT", None)
    monkeypatch.setattr(sys.modules[f"{norm.__name__}.functions"], "DIRECT", None)
    case = Case(norm, "rms_norm")
    assert torch.equal(case.function(*case.tensors), case.op(*case.tensors))


def test_modes_of_another_thread_are_its_own(norm: ModuleType) -> None:
    case = Case(norm, "rms_norm")
    found: list[bool] = []
    with Seen():
        thread = Thread(target=lambda: found.append(case.taken()))
        thread.start()
        thread.join()
    assert found == [True]
