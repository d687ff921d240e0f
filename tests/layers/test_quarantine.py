"""`on_error="restore"`: what is answered, by whom, and what is left of the kernel afterwards."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import models_for_tests as models
import pytest
import torch
from kernels_for_tests import write_kernel
from torch import nn

from kernelhub import LocalFuncRepository, LocalLayerRepository, Mode, kernel_report, kernelize, kernelized, unkernelize
from kernelhub.errors import InvalidReference, KernelHubWarning
from kernelhub.layers import mapping, quarantine, swap
from kernelhub.layers.kernel import LayerKernel, load_layer
from kernelhub.layers.quarantine import watched
from kernelhub.layers.swap import in_effect

I, T = Mode.INFERENCE, Mode.TRAINING  # noqa: E741 - as in the tables

# A kernel that does what its test says: `fault` is called with the layer and its input before it computes.
LAYERS = """
import torch
from torch import nn

faults = []


def failing(self, x):
    for fault in faults:
        fault(self, x)
    return x + 1000


class Gate(nn.Module):
    def forward(self, x):
        return failing(self, x)


class RMSNorm(nn.Module):
    def forward(self, hidden_states):
        return failing(self, hidden_states)


def rotate(q, k, scale=1.0):
    failing(None, q)
    return q, k
"""

Fault = Callable[[nn.Module, torch.Tensor], None]


@pytest.fixture
def small(hub: Any, tmp_path: Path) -> Path:
    """The kernels, registered for the layers of `models_for_tests`."""
    folder = write_kernel(
        tmp_path / "small", name="faulty", layers=LAYERS, init="from . import layers\nrotate = layers.rotate"
    )
    kernels = {name: {"cpu": {T: LocalLayerRepository(folder, layer_name=name)}} for name in ("Gate", "RMSNorm")}
    kernels["rotary"] = {"cpu": {T: LocalFuncRepository(folder, func_name="rotate")}}
    mapping.register_kernel_mapping(kernels)
    return folder


@pytest.fixture
def loaded(small: Path, hub: Any) -> LayerKernel:
    return load_layer(LocalLayerRepository(small, layer_name="Gate"), "cpu", hub)


@pytest.fixture
def faults(loaded: LayerKernel) -> Iterator[list[Fault]]:
    """What the kernels do before they compute."""
    found: list[Fault] = loaded.loaded.module.layers.faults
    found.clear()  # modules of equal files are one module, in all tests
    yield found
    found.clear()


def raising(error: BaseException) -> Fault:
    def fault(module: nn.Module, x: torch.Tensor) -> None:
        raise error

    return fault


def put(module: nn.Module, forward: Any) -> None:
    """Let the module run this forward as if `kernelize` had put it there."""
    kernelized = kernelize(models.Gate(), mode=I, device="cpu", on_error="restore")
    swap.put(module, in_effect(kernelized).swap, forward)


def gate(mode: Mode = I, on_error: str = "restore") -> models.Gate:
    return kernelize(models.Gate(), mode=mode, device="cpu", on_error=on_error)


X = torch.tensor([-1.0, 2.0])
KERNELS, ORIGINALS = X + 1000, torch.relu(X)


# What is asked


@pytest.mark.parametrize("on_error", ["ignore", None, True])
def test_what_cannot_be_asked_is_an_error(small: Path, on_error: Any) -> None:
    model = models.Gate()
    with pytest.raises(InvalidReference, match="on_error="):
        kernelize(model, mode=I, device="cpu", on_error=on_error)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("mode", [I, T])
def test_compiled_models_cannot_be_restored(small: Path, mode: Mode) -> None:
    with pytest.raises(InvalidReference, match="compiled code has no place"):
        kernelize(models.Gate(), mode=mode | Mode.TORCH_COMPILE, device="cpu", on_error="restore")


def test_nothing_stands_on_the_call_path_without_it(loaded: LayerKernel) -> None:
    plain, careful = gate(on_error="raise"), gate()
    assert plain.forward.__func__ is loaded.forward
    assert isinstance(careful.forward, MethodType)
    assert careful.forward.__func__ is watched(loaded.forward)


def test_without_it_the_error_is_the_callers(faults: list[Fault]) -> None:
    model = gate(on_error="raise")
    faults.append(raising(RuntimeError("it broke")))
    with pytest.raises(RuntimeError, match="it broke"):
        model(X)
    faults.clear()
    assert torch.equal(model(X), KERNELS)


# What is answered


def test_the_original_answers_and_the_kernel_goes_once_with_a_warning(faults: list[Fault]) -> None:
    model = models.Model(layers=2)
    kernelize(model, mode=I, on_error="restore")
    assert len(kernel_report(model).kernels) == 5
    first = model.layers[0].gate
    faults.append(lambda module, x: raising(ValueError("it broke\nbadly"))(module, x) if module is first else None)
    with pytest.warns(
        KernelHubWarning, match="Gate runs its own forward from now on: .*ValueError: it broke$"
    ) as warned:
        answer = model(torch.ones(2, 8))
    assert warned[0].filename == models.__file__  # the model's line that called the layer
    assert answer.shape == (2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(2, 8))
    assert "forward" not in vars(first)
    rows = {row.path: row for row in kernel_report(model).rows}
    assert [path for path, row in rows.items() if row.outcome == "original"] == ["layers.0.gate"]
    row = rows["layers.0.gate"]
    assert "its kernel was taken out: " in row.reason
    assert "raised ValueError: it broke" in row.reason
    assert (row.mode, row.stale) == ("INFERENCE", False)


def test_the_answer_is_the_originals_with_its_gradients(faults: list[Fault]) -> None:
    expected, model = models.Norm(), kernelize(models.Norm(), mode=T, on_error="restore")
    x, y = (torch.linspace(-1, 1, 8).requires_grad_() for _ in range(2))
    faults.append(
        lambda module, given: (given * module.weight).sum().backward and raising(OSError("late"))(module, given)
    )
    with pytest.warns(KernelHubWarning):
        model(x).sum().backward()
    expected(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(model.weight.grad, expected.weight.grad)


def test_what_the_original_raises_too_is_the_callers_error_and_the_kernel_stays(faults: list[Fault]) -> None:
    model = kernelize(models.Norm(), mode=I, on_error="restore")
    faults.append(lambda module, x: x @ module.weight)
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(2, 3))
    assert caught.value.__context__ is not None, "the kernel's own error is shown with it"
    faults.clear()
    assert in_effect(model)


class Cache:
    """As those of keys and values: what is added makes another tensor, and writes to none."""

    def __init__(self) -> None:
        self.keys: list[Any] = [None]

    def update(self, x: torch.Tensor) -> None:
        self.keys[0] = x if self.keys[0] is None else torch.cat([self.keys[0], x])


class Slotted:
    __slots__ = ("keys",)

    def __init__(self) -> None:
        self.keys = torch.zeros(0, 2)

    def update(self, x: torch.Tensor) -> None:
        self.keys = torch.cat([self.keys, x])


@pytest.mark.parametrize(
    ("cache", "update"),
    [
        (Cache, lambda cache, x: cache.update(x)),
        (Slotted, lambda cache, x: cache.update(x)),
        (list, lambda cache, x: cache.append(x)),
        (dict, lambda cache, x: cache.update(n=cache.get("n", 0) + 1)),
        (lambda: {"n": 1}, lambda cache, x: cache.update(n=cache["n"] + 1)),
        (lambda: [Cache()], lambda cache, x: cache[0].update(x)),
    ],
)
def test_a_cache_that_the_kernel_added_to_is_not_added_to_again(cache: Any, update: Any) -> None:
    def held(given: Any) -> list[Any]:
        return quarantine._before(nn.Identity(), (X, given), {}).held

    given = cache()
    before = held(given)
    assert before == held(given)
    update(given, torch.ones(1, 2))
    assert before != held(given)


@pytest.mark.usefixtures("faults")
def test_a_kernel_that_added_to_a_cache_before_it_raised_cannot_be_answered_for() -> None:
    model, cache = gate(), Cache()
    function = in_effect(model).function
    before = quarantine._before(model, (X, cache), {})
    cache.update(X)
    with (
        pytest.warns(KernelHubWarning, match="written to what it was called with"),
        pytest.raises(ValueError, match="too late"),
    ):
        quarantine._answer(model, function, ValueError("too late"), before, (X, cache), {})
    assert in_effect(model) is None


def test_a_kernel_that_wrote_to_its_input_before_it_raised_cannot_be_answered_for(faults: list[Fault]) -> None:
    model = gate()

    def fault(module: nn.Module, x: torch.Tensor) -> None:
        x.add_(1)
        raise ValueError("too late")

    faults.append(fault)
    x = X.clone()
    with (
        pytest.warns(KernelHubWarning, match="written to what it was called with"),
        pytest.raises(ValueError, match="too late"),
    ):
        model(x)
    assert torch.equal(model(X), ORIGINALS), "the next call is the original's"


@pytest.mark.parametrize("where", ["parameter", "nested", "keyword"])
def test_writes_are_seen_wherever_torch_counts_them(loaded: LayerKernel, where: str) -> None:
    model, given = models.Norm(), torch.ones(8)
    written = model.weight if where == "parameter" else given

    def kernel(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        written.mul_(2)
        raise ValueError("too late")

    put(model, forward=watched(kernel))
    args, kwargs = {
        "parameter": ((given,), {}),
        "nested": (((1, [given]),), {}),
        "keyword": ((), {"cache": {"key": (given,)}}),
    }[where]
    with torch.no_grad(), pytest.warns(KernelHubWarning), pytest.raises(ValueError, match="too late"):
        model(*args, **kwargs)
    assert in_effect(model) is None


def test_it_works_in_inference_mode_and_under_autocast(faults: list[Fault]) -> None:
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        model = gate()
        faults[:] = [raising(RuntimeError("it broke"))]
        with context, pytest.warns(KernelHubWarning):
            assert torch.equal(model(X.clone()), ORIGINALS)


# Errors that say nothing of the kernel


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(1),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_interrupts_and_full_memory_are_passed_on(faults: list[Fault], error: BaseException) -> None:
    model = gate()
    faults.append(raising(error))
    with pytest.raises(type(error)) as caught:
        model(X)
    assert caught.value is error
    faults.clear()
    assert torch.equal(model(X), KERNELS)


def test_on_tensors_without_values_nothing_is_decided(faults: list[Fault]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = gate()
    faults.append(lambda module, x: raising(NotImplementedError("no such op"))(module, x))
    with FakeTensorMode() as mode, pytest.raises(NotImplementedError):
        model(mode.from_tensor(X))
    with pytest.raises(NotImplementedError):
        model(X.to("meta"))
    assert in_effect(model)


def test_checkpointing_that_stops_early_is_no_error_of_the_kernel(loaded: LayerKernel) -> None:
    """Recomputation ends with an exception of torch's own, inside the forward that saved the last tensor."""
    from torch.utils.checkpoint import checkpoint

    seen: list[str] = []

    def kernel(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        try:
            return x * self.weight
        except Exception as error:
            seen.append(type(error).__module__)
            raise

    model = models.Norm()
    put(model, forward=watched(kernel))
    x = torch.linspace(1, 2, 8).requires_grad_()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert seen == ["torch.utils.checkpoint"]
    assert in_effect(model)
    assert torch.equal(model.weight.grad, x)


def test_an_error_in_the_backward_is_an_error(faults: list[Fault]) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x + 1000

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ValueError("the backward broke")

    model = models.Gate()
    model.forward = MethodType(watched(lambda self, x: Broken.apply(x)), model)
    output = model(X.clone().requires_grad_())
    with pytest.raises(ValueError, match="the backward broke"):
        output.sum().backward()


def test_somebody_who_compiles_it_anyway_gets_the_kernels_errors(faults: list[Fault]) -> None:
    """Traced as it is without the option: nothing is caught in a compiled frame."""
    model = gate()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), KERNELS)


# What is left


def broken(faults: list[Fault]) -> models.Model:
    """A model of which one layer's kernel was taken out."""
    model = models.Model(layers=1)
    kernelize(model, mode=I, on_error="restore")
    faults[:] = [lambda module, x: raising(OSError("it broke"))(module, x) if type(module) is models.Gate else None]
    with pytest.warns(KernelHubWarning):
        model(torch.ones(2, 8))
    return model


def outcomes(model: nn.Module) -> dict[str, str]:
    return {row.path: row.outcome for row in kernel_report(model).rows}


PART = {"layers.0.norm": "kernel", "layers.0.gate": "original", "norm": "kernel"}


def test_copies_and_files_are_as_the_model_is(faults: list[Fault]) -> None:
    model = broken(faults)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert outcomes(same) == PART
        assert "OSError: it broke" in next(
            row.reason for row in kernel_report(same).rows if row.path == "layers.0.gate"
        )
        faults[:] = [raising(ValueError("that too"))]
        with pytest.warns(KernelHubWarning, match="Norm runs its own forward"):
            same(torch.ones(2, 8))
        assert set(outcomes(same).values()) == {"original"}
        assert outcomes(model) == PART, "each has its own"


def test_undone_it_is_as_if_it_had_never_been(faults: list[Fault]) -> None:
    model = broken(faults)
    unkernelize(model)
    fresh = models.Model(layers=1)
    for module, other in zip(model.modules(), fresh.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()


def test_kernelized_again_the_kernel_is_back(faults: list[Fault]) -> None:
    model = broken(faults)
    faults.clear()
    kernelize(model, mode=I)
    assert set(outcomes(model).values()) == {"kernel"}


def test_a_failing_kernelize_leaves_it_taken_out(faults: list[Fault], monkeypatch: pytest.MonkeyPatch) -> None:
    model = broken(faults)
    with pytest.raises(ZeroDivisionError):
        kernelize(model, mode=I, sample_inputs=lambda model: 1 / 0, verify=True)
    assert outcomes(model) == PART
    assert "it broke" in str(kernel_report(model))


def test_inside_kernelized_it_ends_with_the_block(faults: list[Fault]) -> None:
    model = models.Gate()
    with kernelized(model, mode=I, device="cpu", on_error="restore"):
        faults[:] = [raising(OSError("it broke"))]
        with pytest.warns(KernelHubWarning):
            assert torch.equal(model(X), ORIGINALS)
    assert not any(name.startswith("_kernelhub") for name in vars(model))


def test_undone_while_a_call_runs_it_is_answered_and_nothing_is_left(faults: list[Fault]) -> None:
    model = gate()

    def fault(module: nn.Module, x: torch.Tensor) -> None:
        unkernelize(module)
        raise ValueError("it broke")

    faults.append(fault)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(X), ORIGINALS)
    assert vars(model).keys() == vars(models.Gate()).keys()


def test_threads_that_fail_at_once_are_all_answered_and_one_warns(faults: list[Fault]) -> None:
    model, barrier, answers = gate(), threading.Barrier(8), []

    def fault(module: nn.Module, x: torch.Tensor) -> None:
        barrier.wait(30)
        raise ValueError("it broke")

    faults.append(fault)
    threads = [threading.Thread(target=lambda: answers.append(model(X))) for _ in range(8)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(answers) == 8
    assert all(torch.equal(answer, ORIGINALS) for answer in answers)
    assert len([one for one in caught if issubclass(one.category, KernelHubWarning)]) == 1


def test_a_function_goes_back_for_everybody_and_users_leave_nothing(faults: list[Fault]) -> None:
    users = [models.Attention(), models.Attention()]
    for user in users:
        kernelize(user, mode=I, device="cpu", on_error="restore")
    faults[:] = [raising(OSError("it broke"))]
    q, k = torch.ones(2), torch.ones(2)
    expected = type(models.rotate).forward(q, k)
    with pytest.warns(KernelHubWarning, match="rotate runs its own forward"):
        answer = models.rotate(q, k)
    assert all(map(torch.equal, answer, expected))
    assert all("OSError: it broke" in kernel_report(user).rows[0].reason for user in users)
    for user in users:
        unkernelize(user)
    assert not any(name.startswith("_kernelhub") for name in (*vars(models.rotate), *vars(users[0])))
