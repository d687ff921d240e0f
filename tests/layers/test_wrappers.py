"""Models that other libraries have their hands on: accelerate's hooks, PEFT's adapters, quantised and hooked children."""

from __future__ import annotations

import copy
from collections.abc import Callable

import models_for_tests as models
import pytest
import torch
from torch import nn

from kernelhub import Mode, kernel_report, kernelize, register_kernel_mapping, unkernelize
from kernelhub.layers.repositories import Repository

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.usefixtures("hub", "registered"), pytest.mark.filterwarnings("ignore")]

Kernel = Callable[[str], Repository]


def offload(model: nn.Module) -> nn.Module:
    """Weights wait on the CPU and come for each call, as on a device that is too small for them."""
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def attributes(model: nn.Module) -> list[dict[str, object]]:
    """The attributes of each module; accelerate's hooks, which hold state of their own, by their kind."""
    return [
        {name: type(value) if name in ("_hf_hook", "forward") else value for name, value in module.__dict__.items()}
        for module in model.modules()
    ]


# accelerate


def test_a_kernel_goes_under_accelerates_hooks() -> None:
    """Offloaded weights are on the meta device between calls: the hook must still run, and then the kernel."""
    torch.manual_seed(0)
    plain, x = models.Model(), torch.randn(2, 8)
    swapped = kernelize(copy.deepcopy(plain), mode=Mode.INFERENCE)
    expected = swapped(x)
    model = offload(copy.deepcopy(plain))
    assert next(model.parameters()).device.type == "meta"
    hooked = attributes(model)
    kernelize(model, mode=Mode.INFERENCE)
    assert [row.device for row in kernel_report(model).kernels] == ["cpu"] * 5
    assert torch.equal(model(x), expected)
    assert model.norm.forward.__wrapped__ is not None
    unkernelize(model)
    assert attributes(model) == hooked
    assert torch.equal(model(x), plain(x))


def test_hooks_that_come_after_kernels_call_them() -> None:
    plain, x = models.Model(), torch.randn(2, 8)
    model = kernelize(copy.deepcopy(plain), mode=Mode.INFERENCE)
    expected = model(x)
    offload(model)
    assert torch.equal(model(x), expected)
    assert len(kernel_report(model).kernels) == 5
    unkernelize(model)
    assert torch.equal(model(x), plain(x))
    hooked = [module for module in (model.norm, model.layers[0].norm) if "_old_forward" in module.__dict__]
    assert len(hooked) == 2
    assert all(module._old_forward.__func__ is models.Norm.forward for module in hooked)


@pytest.mark.parametrize("order", ["hook kernel remove undo", "hook kernel undo remove", "kernel hook undo remove"])
def test_kernels_and_hooks_go_in_any_order(order: str) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, x = models.Model(), torch.randn(2, 8)
    plain = model(x)
    twin = copy.deepcopy(model)
    on = False
    for step in order.split():
        if step == "kernel":
            kernelize(model, mode=Mode.INFERENCE)
        elif step == "undo":
            unkernelize(model)
        else:
            for one in (model, twin):
                if step == "hook":
                    add_hook_to_module(one.norm, ModelHook())
                else:
                    remove_hook_from_module(one.norm)
        on = {"kernel": True, "undo": False}.get(step, on)
        assert (len(kernel_report(model).kernels) == 5) == on
        assert torch.equal(model(x), plain) == (not on)
    assert model.norm.__dict__.keys() == twin.norm.__dict__.keys()
    assert model.norm.__dict__["forward"] == model.norm.forward
    assert model.norm.__dict__["forward"].__func__ is models.Norm.forward


def test_a_model_stays_picklable_when_its_hooks_are_gone() -> None:
    """The marker must stand before the forward, in whatever order the two came."""
    import pickle

    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, x = models.Model(), torch.randn(2, 8)
    add_hook_to_module(model.norm, ModelHook())
    kernelize(model, mode=Mode.INFERENCE)
    remove_hook_from_module(model.norm)
    twin = pickle.loads(pickle.dumps(model))
    assert len(kernel_report(twin).kernels) == 5
    assert torch.equal(twin(x), model(x))


def test_a_patch_over_accelerates_hook_is_somebody_elses() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = models.Model()
    add_hook_to_module(model.norm, ModelHook())
    model.norm.forward = lambda x: x
    kernelize(model, mode=Mode.INFERENCE)
    assert "somebody else" in kernel_report(model).rows[-1].reason


# PEFT


def test_lora_on_other_layers_trains_beside_kernels() -> None:
    model, x = models.Model(), torch.randn(2, 8)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["linear"], r=2))
    kernelize(adapted, mode=Mode.TRAINING)
    assert len(kernel_report(adapted).kernels) == 5
    adapted(x).sum().backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    unkernelize(adapted)
    assert torch.equal(adapted(x), model(x))


def test_kernels_survive_lora_that_comes_after_them() -> None:
    model, x = kernelize(models.Model(), mode=Mode.TRAINING), torch.randn(2, 8)
    expected = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["linear"], r=2))
    assert torch.allclose(adapted(x), expected), "a fresh adapter adds nothing"
    assert len(kernel_report(adapted).kernels) == 5


def test_modules_to_save_are_kernelized_inside_their_wrapper() -> None:
    """needs 31: the innermost instances run the kernel, and the wrapper is not patched."""
    model, x = models.Model(), torch.randn(2, 8)
    config = peft.LoraConfig(target_modules=["linear"], r=2, modules_to_save=["layers.0.norm"])
    adapted = peft.get_peft_model(model, config)
    wrapper = adapted.base_model.model.layers[0].norm
    kernelize(adapted, mode=Mode.TRAINING)
    paths = [row.path for row in kernel_report(adapted).kernels if "layers.0.norm" in row.path]
    assert [path.rpartition("norm.")[2] for path in paths] == ["original_module", "modules_to_save.default"]
    assert "forward" not in wrapper.__dict__
    adapted(x).sum().backward()
    assert wrapper.modules_to_save["default"].weight.grad is not None
    assert wrapper.original_module.weight.grad is None


# Children of a layer whose kernel reads their weights


@pytest.fixture
def mlp(kernel: Kernel) -> models.Mlp:
    register_kernel_mapping({"Mlp": {"cpu": {Mode.TRAINING: kernel("Mlp")}}}, inherit_mapping=False)
    return models.Mlp()


def kept(model: nn.Module) -> str:
    row = kernel_report(model).rows[0]
    assert row.outcome == "original"
    return row.reason


def test_an_mlp_of_plain_children_runs_its_kernel(mlp: models.Mlp) -> None:
    x = torch.randn(2, 8)
    expected = mlp(x)
    kernelize(mlp, mode=Mode.TRAINING)
    assert kernel_report(mlp).rows[0].outcome == "kernel"
    assert torch.allclose(mlp(x), expected)


def test_an_mlp_with_lora_on_a_child_keeps_its_forward(mlp: models.Mlp) -> None:
    """needs 31: a kernel that reads the weights would leave the adapter out."""
    adapted = peft.get_peft_model(
        nn.Sequential(mlp), peft.LoraConfig(target_modules=["up"], r=2, init_lora_weights=False)
    )
    x = torch.randn(2, 8)
    expected = adapted(x)
    kernelize(adapted, mode=Mode.TRAINING)
    assert kept(adapted) == "its up is adapted (Linear), and the kernel would not call the adapter"
    assert torch.equal(adapted(x), expected)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_an_mlp_with_a_hook_on_a_child_keeps_its_forward(register: str, mlp: models.Mlp) -> None:
    handle = getattr(mlp.down, register)(lambda *_: None)
    kernelize(mlp, mode=Mode.TRAINING)
    assert kept(mlp) == "its down has hooks, which the kernel would not call"
    handle.remove()
    kernelize(mlp, mode=Mode.TRAINING)
    assert kernel_report(mlp).rows[0].outcome == "kernel"


def test_an_mlp_with_a_patched_child_keeps_its_forward(mlp: models.Mlp) -> None:
    mlp.up.forward = lambda x: x
    kernelize(mlp, mode=Mode.TRAINING)
    assert kept(mlp).startswith("its up has a forward of its own")


class Packed(nn.Module):
    """As libraries of quantised layers keep weights: whole numbers in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))


def test_an_mlp_with_quantised_children_keeps_its_forward(mlp: models.Mlp) -> None:
    mlp.up = Packed()
    kernelize(mlp, mode=Mode.TRAINING)
    assert kept(mlp) == "its up is quantised (Packed)"
    mlp.up = nn.Linear(8, 16, bias=False)
    mlp.up.weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)
    kernelize(mlp, mode=Mode.TRAINING)
    assert kept(mlp) == "its up: its weight is quantised (int8)"


class Quantised(torch.Tensor):
    """A tensor with a behaviour of its own under torch's functions."""

    @classmethod
    def __torch_function__(cls, function: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_that_are_no_plain_tensors_keep_the_forward(mlp: models.Mlp) -> None:
    mlp.up.weight = nn.Parameter(torch.zeros(16, 8).as_subclass(Quantised))
    kernelize(mlp, mode=Mode.TRAINING)
    assert kept(mlp) == "its up: its weight is a Quantised, not a plain tensor"


class Named(nn.Parameter):
    """A parameter that carries a name and behaves as any other."""


def test_a_parameter_class_without_a_behaviour_of_its_own_is_plain(mlp: models.Mlp) -> None:
    mlp.up.weight = Named(torch.zeros(16, 8))
    kernelize(mlp, mode=Mode.TRAINING)
    assert kernel_report(mlp).rows[0].outcome == "kernel"


def test_children_that_run_kernels_themselves_do_not_stop_their_parents(kernel: Kernel) -> None:
    register_kernel_mapping({"Mlp": {"cpu": kernel("Mlp")}, "Gate": {"cpu": kernel("Gate")}})

    class Gated(models.Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.gate = models.Gate()

    model = Gated()
    kernelize(model, mode=Mode.INFERENCE)
    kernelize(model, mode=Mode.INFERENCE)
    assert [row.outcome for row in kernel_report(model).rows] == ["kernel", "kernel"]
