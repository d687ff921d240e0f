"""Marks name layers and change nothing else."""

from __future__ import annotations

import copy
import inspect
import pickle

import models_for_tests as models
import pytest
import torch
from torch import nn

from kernelhub.layers.markers import (
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernel_func_from_hub,
    use_kernelized_func,
)


def test_a_marked_class_is_the_class_with_the_attributes_that_other_libraries_read() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    forward, names = Plain.forward, set(vars(Plain))
    marked = use_kernel_forward_from_hub("Layer", condition=lambda module: module.training)(Plain)
    assert marked is Plain
    assert Plain.forward is forward
    assert set(vars(Plain)) - names == {"kernel_layer_name", "kernel_condition"}
    assert Plain.kernel_layer_name == "Layer"
    assert Plain.kernel_condition(Plain().eval()) is False
    assert Plain().kernel_condition(Plain()) is True, "an instance's attribute is not bound to it"
    assert Plain()._modules == {}


def test_a_class_of_someone_elses_is_marked_in_place() -> None:
    class Theirs(nn.Module):
        pass

    replace_kernel_forward_from_hub(Theirs, "Layer")
    assert Theirs.kernel_layer_name == "Layer"
    assert Theirs.kernel_condition(Theirs()) is True


def test_a_marked_function_is_called_as_before_and_has_a_forward() -> None:
    @use_kernel_forward_from_hub("rope")
    def rope(q: torch.Tensor, k: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        """Rotates."""
        return q * scale + k

    one = torch.ones(2)
    assert isinstance(rope, nn.Module)
    assert torch.equal(rope(one, k=one), torch.full((2,), 3.0))
    assert list(inspect.signature(rope).parameters) == ["q", "k", "scale"]
    assert list(inspect.signature(rope.forward).parameters) == ["q", "k", "scale"]
    assert (rope.__name__, rope.__doc__, rope.__wrapped__(one, one)[0]) == ("rope", "Rotates.", 3.0)
    assert type(rope).kernel_layer_name == "rope"


def test_a_marked_function_is_one_for_the_process_also_in_copies_and_pickles() -> None:
    assert copy.deepcopy(models.rotate) is models.rotate
    assert copy.copy(models.rotate) is models.rotate
    assert pickle.loads(pickle.dumps(models.rotate)) is models.rotate


def test_instances_name_the_functions_they_call_by_layer_and_not_as_submodules() -> None:
    attention = models.Attention()
    assert attention.__dict__["_kernel_funcs"] == {"rotary": models.rotate}
    assert [name for name, _ in attention.named_modules()] == ["", "linear"]
    assert set(attention.state_dict()) == {"linear.weight", "linear.bias"}
    assert models.Attention.__init__.__wrapped__ is not None

    @use_kernelized_func()
    class Sub(models.Attention):
        pass

    assert Sub().__dict__["_kernel_funcs"] == {"rotary": models.rotate}


def test_the_older_spelling_marks_functions_too() -> None:
    marked = use_kernel_func_from_hub("rope")(lambda x: x)
    assert type(marked).kernel_layer_name == "rope"


def test_what_cannot_be_marked_is_an_error() -> None:
    for mark in (
        lambda: use_kernel_forward_from_hub("Layer")(int),
        lambda: use_kernel_forward_from_hub("Layer")(3),
        lambda: use_kernel_forward_from_hub(""),
        lambda: replace_kernel_forward_from_hub(nn.Linear(1, 1), "Layer"),  # type: ignore[arg-type]
        lambda: use_kernelized_func(len),
    ):
        with pytest.raises(ValueError):
            mark()
