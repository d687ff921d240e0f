"""After `unkernelize` a model is what it would be had it never been kernelized."""

from __future__ import annotations

import functools
import gc
import pickle
from collections.abc import Callable

import models_for_tests as models
import pytest
import torch
from torch import nn
from torch._guards import CompileContext, CompileId, compile_context

from kernelhub import Mode, kernel_report, kernelize, kernelized, register_kernel_mapping, unkernelize
from kernelhub.layers.repositories import Repository

pytestmark = [
    pytest.mark.usefixtures("hub", "registered"),
    pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning"),
]


def attributes(model: nn.Module) -> list[dict[str, object]]:
    return [dict(module.__dict__) for module in model.modules()]


def orders(model: nn.Module) -> list[list[str]]:
    return [list(module.__dict__) for module in model.modules()]


def test_unkernelize_restores_attributes_outputs_state_and_pickles_exactly() -> None:
    """needs 17: the revert is complete."""
    torch.manual_seed(0)
    model, x = models.Model(), torch.randn(4, 8)
    before, order, output, file = attributes(model), orders(model), model(x), pickle.dumps(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kernelize(model, mode=Mode.INFERENCE)
    assert not torch.equal(model(x), output)
    assert unkernelize(model) is model
    assert attributes(model) == before
    assert orders(model) == order
    assert torch.equal(model(x), output)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert pickle.dumps(model) == file


def test_unkernelize_of_a_model_that_was_never_kernelized_does_nothing() -> None:
    model = models.Model()
    before = attributes(model)
    unkernelize(model)
    assert attributes(model) == before


def test_hooks_that_come_and_go_in_between_are_what_they_would_be() -> None:
    def note(*_: object) -> None:
        calls.append("hook")

    calls: list[str] = []
    model, x = models.Model(), torch.randn(4, 8)
    early = model.norm.register_forward_hook(note)
    kernelize(model, mode=Mode.INFERENCE)
    early.remove()
    late = model.norm.register_forward_pre_hook(note)
    model(x)
    assert calls == ["hook"]
    unkernelize(model)
    assert list(model.norm._forward_pre_hooks.values()) == [note]
    assert not model.norm._forward_hooks
    model(x)
    assert calls == ["hook"] * 2
    late.remove()
    assert "forward" not in model.norm.__dict__


def test_hooks_of_every_kind_run_around_a_kernel_as_around_the_original() -> None:
    def run(model: nn.Module) -> list[str]:
        calls: list[str] = []
        handles = [
            model.norm.register_forward_pre_hook(lambda *_: calls.append("pre")),
            model.norm.register_forward_hook(lambda *_: calls.append("post")),
            model.norm.register_full_backward_pre_hook(lambda *_: calls.append("backward pre")),
            model.norm.register_full_backward_hook(lambda *_: calls.append("backward")),
        ]
        model(torch.randn(2, 8, requires_grad=True)).sum().backward()
        for handle in handles:
            handle.remove()
        return calls

    model = models.Model()
    plain = run(model)
    assert run(kernelize(model, mode=Mode.TRAINING)) == plain == ["pre", "post", "backward pre", "backward"]


def test_a_forward_that_somebody_put_over_the_kernels_stays() -> None:
    model = models.Model()
    kernelize(model, mode=Mode.INFERENCE)

    def patched(x: torch.Tensor) -> torch.Tensor:
        return x

    model.norm.forward = patched
    assert "replaced" in kernel_report(model).rows[-1].reason
    assert kernel_report(model).rows[-1].outcome == "original"
    unkernelize(model)
    assert model.norm.__dict__["forward"] is patched
    assert set(model.norm.__dict__) == {*models.Norm().__dict__, "forward"}


def test_a_forward_of_somebody_elses_on_the_instance_is_kept_with_the_reason() -> None:
    model = models.Model()
    model.norm.forward = functools.partial(models.Norm.forward, model.norm)
    patched = model.norm.__dict__["forward"]
    kernelize(model, mode=Mode.INFERENCE)
    assert model.norm.__dict__["forward"] is patched
    assert kernel_report(model).rows[-1].reason == "somebody else put a forward of their own on this instance"


def test_the_class_own_forward_on_the_instance_comes_back_there() -> None:
    """As accelerate leaves it when it takes a hook away."""
    model = models.Model()
    model.norm.forward = model.norm.forward
    before = attributes(model)
    kernelize(model, mode=Mode.INFERENCE)
    assert kernel_report(model).rows[-1].outcome == "kernel"
    unkernelize(model)
    assert attributes(model) == before


@pytest.mark.parametrize(("include", "left"), [("norm", 4), (models.Norm, 2), ("**", 0), ("nothing", 5)])
def test_unkernelize_takes_back_what_is_chosen(include: object, left: int) -> None:
    model = kernelize(models.Model(), mode=Mode.INFERENCE)
    unkernelize(model, include=include)  # type: ignore[arg-type]
    assert len(kernel_report(model).kernels) == left


def test_unkernelize_leaves_out_what_is_excluded() -> None:
    model = kernelize(models.Model(), mode=Mode.INFERENCE)
    unkernelize(model, exclude="norm")
    assert [row.path for row in kernel_report(model).kernels] == ["norm"]


def test_kernelized_is_undone_at_the_end_also_after_an_error() -> None:
    model = models.Model()
    before = attributes(model)
    with kernelized(model, mode=Mode.INFERENCE, include="norm") as same:
        assert same is model
        assert [row.path for row in kernel_report(model).kernels] == ["norm"]
    assert attributes(model) == before
    with pytest.raises(RuntimeError), kernelized(model, mode=Mode.INFERENCE):
        raise RuntimeError
    assert attributes(model) == before
    with pytest.raises(ValueError), kernelized(model, mode=Mode.FALLBACK):
        pass
    assert attributes(model) == before


def test_kernelized_leaves_a_kernelized_model_as_it_found_it(kernel: Callable[[str], Repository]) -> None:
    model = kernelize(models.Model(), mode=Mode.TRAINING, include="norm")
    report = kernel_report(model)
    assert {row.reason for row in report.rows} == {"", "it is not in `include`"}
    with kernelized(model, mode=Mode.INFERENCE):
        assert len(kernel_report(model).kernels) == 5
    assert kernel_report(model) == report, "with the reasons of the call whose kernels run again"
    loaded = pickle.loads(pickle.dumps(model))
    with kernelized(loaded, mode=Mode.INFERENCE):
        pass
    assert kernel_report(loaded).kernels == report.kernels


def test_a_with_block_leaves_a_forward_that_was_put_there_inside() -> None:
    model = kernelize(models.Norm(), mode=Mode.TRAINING)

    def patched(x: torch.Tensor) -> torch.Tensor:
        return x

    with kernelized(model, mode=Mode.INFERENCE):
        model.forward = patched
    assert model.__dict__["forward"] is patched


# Functions


@pytest.fixture
def rotary(registered: None, kernel: Callable[[str], Repository]) -> None:
    register_kernel_mapping({"rotary": {"cpu": kernel("Rotary")}})


def rotated() -> bool:
    return bool((models.rotate(torch.zeros(1), torch.zeros(1))[0] == 200).all())


@pytest.mark.usefixtures("rotary")
def test_a_function_is_kernelized_for_its_users_and_comes_back_with_the_last() -> None:
    one, other = nn.Sequential(models.Attention(), models.Attention()), models.Attention()
    before = [attributes(one), attributes(other), dict(models.rotate.__dict__)]
    kernelize(one, mode=Mode.INFERENCE)
    assert rotated()
    rows = kernel_report(one).rows
    assert [(row.path, row.outcome, row.shared) for row in rows] == [
        ("0.rotary", "kernel", True),
        ("1.rotary", "kernel", True),
    ]
    kernelize(other, mode=Mode.INFERENCE)
    unkernelize(one)
    assert rotated(), "the other model still uses it"
    unkernelize(other)
    assert not rotated()
    assert [attributes(one), attributes(other), dict(models.rotate.__dict__)] == before


@pytest.mark.usefixtures("rotary")
def test_a_function_comes_back_when_its_last_user_in_a_model_is_chosen() -> None:
    model = nn.Sequential(models.Attention(), models.Attention())
    kernelize(model, mode=Mode.INFERENCE)
    unkernelize(model, include="0.rotary")
    assert rotated()
    unkernelize(model, include="1.rotary")
    assert not rotated()


@pytest.mark.usefixtures("rotary")
def test_a_second_model_that_asks_for_another_choice_is_told(
    kernel: Callable[[str], Repository], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = models.Attention(), models.Attention()
    kernelize(one, mode=Mode.INFERENCE)
    register_kernel_mapping({"rotary": {"cpu": kernel("Missing")}}, inherit_mapping=False)
    kernelize(other, mode=Mode.INFERENCE, exclude="**")
    row = kernel_report(other).rows[0]
    assert (row.outcome, row.shared) == ("kernel", True)
    assert "one function for the whole process" in row.reason
    assert "one function for the whole process" in caplog.text
    with pytest.raises(ValueError, match="unkernelize the other model first"):
        kernelize(other, mode=Mode.INFERENCE, exclude="**", use_fallback=False)
    unkernelize(other)
    assert rotated(), "it is not the other model's to take back"
    unkernelize(one)
    assert not rotated()


@pytest.mark.usefixtures("rotary")
def test_a_model_that_goes_while_a_trace_is_under_way_leaves_functions_alone_until_that_is_done() -> None:
    """A trace reads the function more than once, and must find what it has found."""
    model = models.Attention()
    kernelize(model, mode=Mode.INFERENCE)
    with compile_context(CompileContext(CompileId(frame_id=0, frame_compile_id=0))):
        del model
        gc.collect()
        assert rotated()
    gc.collect()
    assert not rotated()


@pytest.mark.usefixtures("rotary")
def test_a_model_that_is_gone_holds_no_function() -> None:
    """needs 17: the next model runs the original."""
    one, other = models.Attention(), models.Attention()
    kernelize(one, mode=Mode.INFERENCE)
    kernelize(other, mode=Mode.INFERENCE)
    del one
    gc.collect()
    assert rotated()
    del other
    gc.collect()
    assert not rotated()


@pytest.mark.usefixtures("rotary")
def test_functions_are_taken_back_when_something_fails(kernel: Callable[[str], Repository]) -> None:
    register_kernel_mapping({"RMSNorm": {"cpu": kernel("TooMany")}}, inherit_mapping=False)
    register_kernel_mapping({"rotary": {"cpu": kernel("Rotary")}})
    model = nn.Sequential(models.Attention(), models.Norm())
    before = dict(models.rotate.__dict__)
    with pytest.raises(TypeError):
        kernelize(model, mode=Mode.INFERENCE)
    assert dict(models.rotate.__dict__) == before


@pytest.mark.usefixtures("rotary")
def test_a_with_block_gives_functions_back_as_it_found_them() -> None:
    one, other = models.Attention(), models.Attention()
    with kernelized(one, mode=Mode.INFERENCE):
        assert rotated()
    assert not rotated()
    kernelize(other, mode=Mode.INFERENCE)
    with kernelized(other, mode=Mode.INFERENCE):
        assert rotated()
    assert rotated()
    assert kernel_report(other).rows[0].outcome == "kernel"
    unkernelize(other)
    assert not rotated()
