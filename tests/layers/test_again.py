"""Models that kernelize themselves again when their mode changes: transformers' do, where `use_kernels` is on."""

from __future__ import annotations

import models_for_tests as models
import pytest

from kernelhub import Mode, kernel_report, kernelize, kernelized, unkernelize

pytestmark = [
    pytest.mark.usefixtures("hub", "registered"),
    pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning"),
]


class Again(models.Model):
    """What transformers' models do in `train()`."""

    _use_kernels: bool

    def train(self, mode: bool = True) -> Again:
        changed = self.training != mode
        super().train(mode)
        if changed and self.__dict__.get("_use_kernels"):
            kernelize(self, mode=Mode.TRAINING if mode else Mode.INFERENCE)
        return self


def again() -> Again:
    model = Again()
    model._use_kernels = True
    return kernelize(model, mode=Mode.TRAINING)


def test_what_was_undone_is_not_done_again_by_train_and_eval() -> None:
    model = again()
    assert kernel_report(model.eval()).kernels
    unkernelize(model)
    assert model._use_kernels is False
    assert not kernel_report(model.train()).kernels
    assert not kernel_report(model.eval()).kernels


def test_undoing_some_layers_leaves_it_on() -> None:
    model = again()
    unkernelize(model, include="layers.0.*")
    assert model._use_kernels is True


def test_a_block_gives_the_model_back_as_it_was() -> None:
    model = again()
    with kernelized(model, mode=Mode.INFERENCE):
        pass
    assert model._use_kernels is True
    assert kernel_report(model.eval()).kernels


def test_models_without_the_switch_get_none() -> None:
    model = kernelize(models.Model(), mode=Mode.TRAINING)
    unkernelize(model)
    assert "_use_kernels" not in model.__dict__
