"""plan -> load -> contract -> swap: what is swapped, what keeps its forward and why, and what is an error."""

from __future__ import annotations

import asyncio
import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import models_for_tests as models
import pytest
import torch
from kernels_for_tests import write_kernel
from torch import nn

import kernelhub
from kernelhub import KernelizeFallback, KernelPlan, Mode, kernel_report, kernelize, plan_kernels, unkernelize
from kernelhub.errors import (
    IntegrityError,
    KernelHubWarning,
    KernelNotFound,
    LayerContractError,
    NoCompatibleVariant,
    NoKernelForLayer,
)
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.layers import plan as plan_module
from kernelhub.layers.device import CUDAProperties, Device
from kernelhub.layers.mapping import register_kernel_mapping, use_kernel_mapping
from kernelhub.layers.markers import (
    calls_children,
    mark_as_calling,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
)
from kernelhub.layers.repositories import LayerRepository, LocalFuncRepository, LocalLayerRepository, Repository
from kernelhub.settings import Settings

pytestmark = [pytest.mark.usefixtures("hub"), pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning")]

Kernel = Callable[[str], Repository]
I, T, C, F = Mode.INFERENCE, Mode.TRAINING, Mode.TORCH_COMPILE, Mode.FALLBACK  # noqa: E741 - as in the table


@use_kernel_forward_from_hub("Thousand")
class Layer(nn.Module):
    """Its kernels add 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def thousand(repository: object) -> None:
    register_kernel_mapping({"Thousand": {"cpu": repository}})


def runs_kernel(module: nn.Module) -> bool:
    return bool((module(torch.zeros(2)) == 1000).all())


def reason(model: nn.Module, path: str = "") -> str:
    return next(row.reason for row in kernel_report(model).rows if row.path == path)


# What is swapped


@pytest.mark.usefixtures("registered")
def test_only_the_forwards_of_marked_instances_change() -> None:
    """needs 14: no submodule, parameter, buffer or state-dict key is added, and no class changes."""
    model = models.Model()
    names = [name for name, _ in model.named_modules()]
    kinds = [type(module) for module in model.modules()]
    keys, parameters = list(model.state_dict()), [id(item) for item in model.parameters()]
    class_forward = models.Norm.forward
    assert kernelize(model, mode=I) is model
    assert [name for name, _ in model.named_modules()] == names
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    assert [id(item) for item in model.parameters()] == parameters
    assert models.Norm.forward is class_forward
    assert models.Norm()(torch.ones(8)) is not None, "another instance is not touched"
    assert [row.outcome for row in kernel_report(model).rows] == ["kernel"] * 5


@pytest.mark.usefixtures("registered")
def test_a_call_reaches_the_kernels_own_function_with_nothing_in_between() -> None:
    model = kernelize(models.Model(), mode=I)
    forward = model.norm.forward
    assert forward.__self__ is model.norm
    assert forward.__func__.__module__.endswith(".layers")
    assert forward.__func__.__qualname__ == "RMSNorm.forward"


@pytest.mark.usefixtures("registered")
def test_outputs_and_gradients_are_the_kernels() -> None:
    model, x = models.Model(), torch.randn(3, 8)
    expected = model(x)
    kernelize(model, mode=T, exclude=models.Gate)
    assert torch.equal(model(x), expected)
    kernelize(model, mode=T)
    assert not torch.allclose(model(x), expected)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_two_models_of_one_class_have_kernels_of_their_own(kernel: Kernel) -> None:
    """needs 17: nothing leaks from one model to another."""
    thousand(kernel("Forward"))
    one, other = Layer(), Layer()
    kernelize(one, mode=I)
    assert runs_kernel(one)
    assert not runs_kernel(other)


def test_shared_and_tied_modules_are_swapped_once(kernel: Kernel) -> None:
    thousand(kernel("Forward"))
    shared = Layer()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, Layer()])})
    model["b"][1].weight = shared.weight
    kernelize(model, mode=I)
    assert [row.path for row in kernel_report(model).rows] == ["a", "b.1"]
    assert runs_kernel(model["a"])
    assert runs_kernel(model["b"][1])
    assert model["b"][1].weight is shared.weight
    unkernelize(model)
    assert "forward" not in shared.__dict__


def test_a_kernel_function_with_another_name_is_a_forward_too(kernel: Kernel) -> None:
    thousand(kernel("Misnamed"))
    layer = kernelize(Layer(), mode=I)
    assert runs_kernel(layer)
    assert layer.forward.__func__.__name__ == "forward"


def test_a_function_of_a_kernel_serves_as_a_layer(folder: Path) -> None:
    thousand(
        {
            T: LocalFuncRepository(folder, func_name="no_backward"),
            I: LocalFuncRepository(folder, func_name="no_backward"),
        }
    )
    layer = Layer()
    kernelize(layer, mode=I)
    assert torch.equal(layer(torch.zeros(2)), torch.ones(2))
    with pytest.raises(ValueError, match="no backward"):
        kernelize(layer, mode=T)


# The modes, end to end: what is registered where, and what each asked-for mode runs


@pytest.mark.parametrize("asked", [I, I | C, T, T | C], ids=str)
@pytest.mark.parametrize("registered", [I, I | C, T, T | C, F], ids=str)
def test_the_table_of_modes_row_by_row(asked: Mode, registered: Mode, kernel: Kernel) -> None:
    rows = {I: [I, I | C, T, T | C, F], I | C: [I | C, T | C, F], T: [T, T | C, F], T | C: [T | C, F]}
    thousand({registered: kernel("Gate")})
    layer = kernelize(Layer(), mode=asked)
    assert runs_kernel(layer) == (registered in rows[asked])
    if registered not in rows[asked]:
        with pytest.raises(NoKernelForLayer, match="serves"):
            kernelize(Layer(), mode=asked, use_fallback=False)


@pytest.mark.parametrize(
    ("layer", "registered", "asked", "outcome"),
    [
        ("NoBackward", T, T, "error"),
        ("NoBackward", T | C, T | C, "error"),
        ("NoBackward", F, T, "original"),
        ("NoBackward", F, I, "kernel"),
        ("NoBackward", T, I, "kernel"),
        ("NoBackward", I | C, I | C, "kernel"),
        ("Forward", I | C, I | C, "error"),
        ("Forward", T | C, T | C, "error"),
        ("Forward", F, I | C, "original"),
        ("Forward", T | C, T, "kernel"),
        ("Forward", F, T, "kernel"),
        ("NoBackwardNoCompile", F, T | C, "original"),
    ],
)
def test_a_kernel_that_lacks_what_a_mode_needs(
    layer: str, registered: Mode, asked: Mode, outcome: str, kernel: Kernel
) -> None:
    """needs 13: a kernel that does not say that it compiles is never compiled."""
    thousand({registered: kernel(layer)})
    model = Layer()
    if outcome == "error":
        with pytest.raises(ValueError, match="does not serve"):
            kernelize(model, mode=asked)
        kernelize(model, mode=asked, use_fallback=KernelizeFallback.ALL)
        assert not runs_kernel(model)
        return
    kernelize(model, mode=asked)
    assert runs_kernel(model) == (outcome == "kernel")
    if outcome == "original":
        assert "does not serve" in reason(model)


@pytest.mark.parametrize("mode", [F, C])
def test_a_mode_without_inference_or_training_is_an_error(mode: Mode) -> None:
    with pytest.raises(ValueError):
        kernelize(Layer(), mode=mode)


# The contract


@pytest.mark.parametrize("layer", ["TooMany", "Constructed", "Members", "Required", "NotAModule"])
def test_a_kernel_that_cannot_stand_in_is_an_error_unless_contract_is_allowed(layer: str, kernel: Kernel) -> None:
    """needs 19."""
    thousand(kernel(layer))
    model = Layer()
    with pytest.raises(TypeError, match="cannot stand in"):
        kernelize(model, mode=I)
    kernelize(model, mode=I, use_fallback=KernelizeFallback.DEFAULT | KernelizeFallback.CONTRACT)
    assert kernel_report(model).rows[0].outcome == "original"
    assert "cannot stand in" in reason(model)


def test_other_parameter_names_are_a_note_in_the_report(kernel: Kernel) -> None:
    thousand(kernel("OtherNames"))
    model = kernelize(Layer(), mode=I)
    assert runs_kernel(model)
    assert reason(model) == "its positional parameters are named (hidden), not (x)"


def test_a_function_in_layers_is_told_to_be_one(kernel: Kernel) -> None:
    thousand(kernel("missing"))
    with pytest.raises(NoKernelForLayer, match="no layer 'missing'"):
        kernelize(Layer(), mode=I)


# What keeps its forward


def test_a_subclass_with_a_forward_of_its_own_keeps_it_unless_it_is_marked(kernel: Kernel) -> None:
    thousand(kernel("Forward"))

    class Same(Layer):
        pass

    class Other(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model = nn.ModuleList([Same(), Other()])
    kernelize(model, mode=I)
    assert [runs_kernel(module) for module in model] == [True, False]
    assert reason(model, "1") == "Other has a forward of its own, and Layer is what is marked as Thousand"
    replace_kernel_forward_from_hub(Other, "Thousand")
    kernelize(model, mode=I)
    assert [runs_kernel(module) for module in model] == [True, True]


def test_a_condition_is_asked_for_each_instance(kernel: Kernel) -> None:
    """needs 3: an instance whose maths differs from the kernel's keeps its forward."""
    thousand(kernel("Forward"))

    @use_kernel_forward_from_hub("Thousand", condition=lambda module: module.activation == "silu")
    class Conditional(Layer):
        def __init__(self, activation: str) -> None:
            super().__init__()
            self.activation = activation

    model = nn.ModuleList([Conditional("silu"), Conditional("gelu")])
    kernelize(model, mode=I)
    assert [runs_kernel(module) for module in model] == [True, False]
    assert "condition" in reason(model, "1")


def test_a_condition_that_raises_stops_everything_before_a_change(kernel: Kernel) -> None:
    thousand(kernel("Forward"))
    model = nn.ModuleList([Layer(), type("Bad", (Layer,), {"kernel_condition": staticmethod(lambda module: 1 / 0)})()])
    with pytest.raises(ZeroDivisionError):
        kernelize(model, mode=I)
    assert not runs_kernel(model[0])


@pytest.mark.parametrize(
    ("case", "mapping", "says"),
    [
        (KernelizeFallback.NO_LAYER, {}, "no kernel is registered for Thousand"),
        (KernelizeFallback.NO_DEVICE, {"cuda": 1}, "on cpu"),
        (KernelizeFallback.NO_COMPATIBLE_MODE, {"cpu": {T: 1}}, "serves"),
    ],
)
def test_fallback_cases_are_errors_where_they_are_not_allowed(
    case: KernelizeFallback, mapping: dict, says: str, kernel: Kernel
) -> None:
    """needs 1: in strict mode a layer without a kernel is an error that names it."""

    def filled(value: object) -> object:
        return {key: filled(item) for key, item in value.items()} if isinstance(value, dict) else kernel("Gate")

    register_kernel_mapping({"Thousand": filled(mapping)} if mapping else {})
    mode = I | C
    model = nn.ModuleDict({"inner": Layer()})
    kernelize(model, mode=mode, use_fallback=case)
    assert says in reason(model, "inner")
    with pytest.raises(NoKernelForLayer, match=f"inner .Layer.*{says}"):
        kernelize(model, mode=mode, use_fallback=KernelizeFallback.ALL & ~case)
    with pytest.raises(ValueError, match="exclude="):
        kernelize(model, mode=mode, use_fallback=False)
    kernelize(model, mode=mode, use_fallback=False, exclude="**")


def test_no_compatible_properties_and_the_narrowest_range(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """needs 6: what is registered for other GPUs is not run on this one."""
    monkeypatch.setattr(plan_module, "capability", lambda device: 75 if device.index else 90)
    register_kernel_mapping(
        {
            "Thousand": {
                Device("cuda", CUDAProperties(80, 90)): kernel("Gate"),
                Device("cuda", CUDAProperties(90, 90)): kernel("Forward"),
            }
        }
    )
    row = plan_kernels(Layer(), mode=I, device="cuda:0").rows[0]
    assert row.repository is not None
    assert row.repository.endswith(":Forward")
    with pytest.raises(NoKernelForLayer, match="covers capability 75"):
        kernelize(
            Layer(),
            mode=I,
            device="cuda:1",
            use_fallback=KernelizeFallback.ALL & ~KernelizeFallback.NO_COMPATIBLE_PROPERTIES,
        )


def test_cannot_load_is_an_error_unless_it_is_allowed(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """needs 12: no build for this machine says so, and keeps the original where that is allowed."""
    model = Layer()
    missing = LayerRepository("org/none", layer_name="Gate", version=1)
    write_kernel(tmp_path / "other", backends=("cuda",))
    unfit = LocalLayerRepository(tmp_path / "other", layer_name="Gate")
    broken = write_kernel(
        tmp_path / "broken", name="broken", init="import package_that_is_not_there\nfrom . import layers\n"
    )
    cases = [
        (missing, KernelNotFound),
        (unfit, NoCompatibleVariant),
        (LocalLayerRepository(broken, layer_name="Gate"), ImportError),
    ]
    for repository, error in cases:
        with use_kernel_mapping({"Thousand": {"cpu": repository}}):
            with pytest.raises(error):
                kernelize(model, mode=I)
            kernelize(model, mode=I, use_fallback=KernelizeFallback.CANNOT_LOAD)
            assert not runs_kernel(model)
            assert kernel_report(model).rows[0].reason


def test_integrity_is_an_error_always(tmp_path: Path) -> None:
    folder = write_kernel(tmp_path / "planted", name="planted")
    cache = folder / "build" / "torch-cpu" / "__pycache__"
    cache.mkdir()
    (cache / "layers.cpython-311.pyc").write_bytes(b"planted")
    thousand(LocalLayerRepository(folder, layer_name="Gate"))
    with pytest.raises(IntegrityError):
        kernelize(Layer(), mode=I, use_fallback=KernelizeFallback.ALL)


def test_a_build_that_does_not_cover_the_layers_own_device_cannot_load(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    """needs 6, needs 5: each layer's own device counts."""
    from kernelhub.errors import IncompatibleDevice
    from kernelhub.layers import loader as module
    from kernelhub.layers.kernel import load_layer

    loaded = load_layer(kernel("Gate"), "cpu", hub)
    built = type("M", (), {"backend": type("B", (), {"archs": ("9.0",)})()})()
    fake = type(loaded)(loaded.repository, "cuda", loaded.cls, loaded.forward, type("L", (), {"metadata": built})())
    monkeypatch.setattr(module, "visible_archs", lambda backend: ("9.0", "8.0"))
    loader = module.Loader(hub, None, KernelizeFallback.ALL)  # type: ignore[arg-type]
    loader._check_device(fake, torch.device("cuda:0"))
    with pytest.raises(IncompatibleDevice, match="cuda:1 has 8.0"):
        loader._check_device(fake, torch.device("cuda:1"))


# Devices


def test_a_layer_without_parameters_runs_where_its_nearest_ancestor_does(kernel: Kernel) -> None:
    """needs 5: each layer's own device."""
    register_kernel_mapping({"Gate": {"cpu": kernel("Gate")}})
    model = nn.ModuleDict(
        {
            "one": nn.Sequential(models.Gate(), nn.Linear(2, 2, device="meta")),
            "other": nn.Sequential(nn.Sequential(models.Gate()), nn.Linear(2, 2)),
        }
    )
    found = {row.path: (row.device, row.action) for row in plan_kernels(model, mode=I).rows}
    assert found == {"one.0": ("meta", "keep"), "other.0.0": ("cpu", "try")}


def test_a_module_that_is_shared_between_devices_keeps_its_forward(kernel: Kernel) -> None:
    register_kernel_mapping({"Gate": {"cpu": kernel("Gate")}})
    gate = models.Gate()
    model = nn.ModuleList([nn.Sequential(gate, nn.Linear(2, 2)), nn.Sequential(gate, nn.Linear(2, 2, device="meta"))])
    assert plan_kernels(model, mode=I).rows[0].reason == "it is shared between cpu and meta"


def test_where_no_device_can_be_told_it_must_be_said(kernel: Kernel) -> None:
    register_kernel_mapping({"Gate": {"cpu": kernel("Gate")}})
    with pytest.raises(ValueError, match="device="):
        kernelize(models.Gate(), mode=I)
    gate = kernelize(models.Gate(), mode=I, device="cpu")
    assert gate(torch.zeros(1)) == 1000
    assert kernelize(models.Gate(), mode=I, device=Device("cpu"))(torch.zeros(1)) == 1000
    with pytest.raises(ValueError, match="not a device"):
        kernelize(models.Gate(), mode=I, device="gpu")


def test_a_layer_on_the_cpu_asks_for_the_cpus_build(kernel: Kernel, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    load_local = hub.load_local

    def recorded(path: Path, *, backend: str | None = None) -> object:
        asked.append(backend)
        return load_local(path, backend=backend)

    monkeypatch.setattr(hub, "load_local", recorded)
    thousand(kernel("Forward"))
    kernelize(Layer(), mode=I)
    assert asked == ["cpu"]


def test_layers_of_one_model_get_the_kernels_of_their_own_devices(kernel: Kernel) -> None:
    register_kernel_mapping({"Thousand": {"cpu": kernel("Gate"), "cuda": kernel("Forward")}})
    meta, plain = Layer().to("meta"), Layer()
    model = nn.ModuleList([meta, plain])
    kernelize(model, mode=I)
    assert runs_kernel(plain)
    assert "meta device" in reason(model, "0")


# include and exclude


@pytest.mark.parametrize(
    ("include", "exclude", "swapped"),
    [
        (None, None, ["layers.0.norm", "layers.1.norm", "norm"]),
        ("norm", None, ["norm"]),
        ("layers.*.norm", None, ["layers.0.norm", "layers.1.norm"]),
        (["**.norm"], None, ["layers.0.norm", "layers.1.norm", "norm"]),
        ("layers.0.**", None, ["layers.0.norm"]),
        ("layers.*", None, []),
        ("layers.1.n*", None, ["layers.1.norm"]),
        (models.Norm, "layers.**", ["norm"]),
        (None, ["norm", "layers.1.norm"], ["layers.0.norm"]),
        ([models.Gate], None, []),
        (["norm", nn.Linear], None, ["norm"]),
    ],
)
def test_include_and_exclude_choose_layers(
    include: object, exclude: object, swapped: list[str], kernel: Kernel
) -> None:
    """needs 16: this kernel only."""
    register_kernel_mapping({"RMSNorm": {"cpu": kernel("RMSNorm")}})
    model = kernelize(models.Model(), mode=I, include=include, exclude=exclude)
    assert [row.path for row in kernel_report(model).kernels] == swapped


@pytest.mark.parametrize("selection", ["", [3], [None]])
def test_a_selection_that_names_nothing_is_an_error(selection: object) -> None:
    with pytest.raises(ValueError, match="include"):
        kernelize(Layer(), mode=I, include=selection)


# Again, and all or nothing


def test_kernelizing_again_starts_from_the_originals(kernel: Kernel) -> None:
    thousand({I: kernel("Gate"), T: kernel("OtherNames")})
    model = nn.ModuleList([Layer(), Layer()])
    kernelize(model, mode=I, include="0")
    kernelize(model, mode=T, include="1")
    assert [runs_kernel(module) for module in model] == [False, True]
    assert kernel_report(model).rows[1].layer == "OtherNames"
    with use_kernel_mapping({}, inherit_mapping=False):
        kernelize(model, mode=I)
    assert all("forward" not in module.__dict__ for module in model)


def test_if_anything_fails_the_model_is_as_it_was(kernel: Kernel) -> None:
    """needs 18: all or nothing."""
    thousand(kernel("Gate"))
    register_kernel_mapping({"Second": {"cpu": kernel("TooMany")}})
    second = type("Second", (Layer,), {})
    replace_kernel_forward_from_hub(second, "Second")
    model = nn.ModuleList([Layer(), second()])
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(LayerContractError, match="while kernelizing 1"):
        kernelize(model, mode=I)
    assert [dict(module.__dict__) for module in model.modules()] == before
    kernelize(model, mode=I, exclude="1")
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(LayerContractError):
        kernelize(model, mode=T)
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert runs_kernel(model[0])


def test_a_failure_in_the_middle_of_swapping_is_taken_back(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelhub.layers import swap

    thousand(kernel("Gate"))
    model = nn.ModuleList([Layer(), Layer(), Layer()])
    kernelize(model, mode=I, include="0")
    before = [dict(module.__dict__) for module in model.modules()]
    put, count = swap.put, iter(range(10))

    def interrupted(*arguments: object) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt
        put(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(swap, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kernelize(model, mode=T)
    assert [set(module.__dict__) for module in model.modules()] == [set(item) for item in before]
    assert [runs_kernel(module) for module in model] == [True, False, False]
    assert kernel_report(model).rows[0].mode == "INFERENCE"


# Off, warnings, logs


def test_disable_kernel_mapping_turns_everything_off(
    registered: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """needs 15: one switch, and it covers a model that has kernels already."""
    model = kernelize(models.Model(), mode=I)
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "kernelhub"):
        warnings.simplefilter("error")
        kernelize(model, mode=I, use_fallback=False)
    assert kernel_report(model).kernels == ()
    assert all("DISABLE_KERNEL_MAPPING" in row.reason for row in kernel_report(model).rows)
    assert "DISABLE_KERNEL_MAPPING" in caplog.text


def test_a_model_that_got_no_kernel_says_so_once(kernel: Kernel) -> None:
    """needs 1: a warning when nothing was swapped."""
    for model, says in ((Layer(), "1 x no kernel is registered"), (nn.Linear(1, 1), "no kernel-aware layers")):
        with pytest.warns(KernelHubWarning, match=says) as caught:
            kernelize(model, mode=I)
        assert [item.filename for item in caught] == [__file__]
        with pytest.warns(KernelHubWarning, match=says) as caught, kernelhub.kernelized(model, mode=I):
            pass
        assert [item.filename for item in caught] == [__file__]
    with pytest.warns(KernelHubWarning, match=r"\n  Kernels are registered with use_kernel_mapping"):
        kernelize(Layer(), mode=I)
    with use_kernel_mapping({"Gate": {"cpu": kernel("Gate")}}), pytest.warns(KernelHubWarning) as caught:
        kernelize(Layer(), mode=I)
    assert "use_kernel_mapping" not in str(caught[0].message), "something is registered, and is not for this layer"
    thousand(kernel("Gate"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernelize(Layer(), mode=I)


def test_the_log_has_a_line_for_each_class_and_none_at_the_root(
    registered: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        kernelize(models.Model(layers=5), mode=I)
    lines = [(record.name, record.getMessage()) for record in caplog.records if record.name.startswith("kernelhub")]
    assert [name for name, _ in lines] == ["kernelhub"] * 2
    assert sorted(text.partition(" run")[0] for _, text in lines) == ["5 x Gate", "6 x Norm"]
    assert logging.getLogger("kernelhub").handlers == []


# The plan


@pytest.mark.usefixtures("registered")
def test_a_plan_changes_and_fetches_nothing_and_prints_a_table(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan fetches nothing")

    for name in ("load", "load_local", "load_locked"):
        monkeypatch.setattr(hub, name, refuse)
    model = nn.ModuleDict({"model": models.Model(), "layer": Layer()})
    before = [dict(module.__dict__) for module in model.modules()]
    plan = plan_kernels(model, mode=I)
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert [row.path for row in plan.tried] == [
        "model.layers.0.norm", "model.layers.0.gate", "model.layers.1.norm", "model.layers.1.gate", "model.norm",
    ]  # fmt: skip
    assert "checked when it is loaded" in plan.tried[0].reason
    assert "no kernel is registered for Thousand" in str(plan)
    lines = str(plan).splitlines()
    assert lines[0] == "device: cpu"
    assert lines[1].split() == ["path", "class", "layer", "would", "try", "reason"]
    assert [line for line in lines if "checked when it is loaded" in line] == lines[-1:], "once, not on each row"
    assert plan.to_dict()["rows"][-1]["action"] == "keep"


def test_a_plan_says_what_holds_for_all_layers_once(kernel: Kernel) -> None:
    """100 columns of each row were the same two sentences."""
    with use_kernel_mapping({"RMSNorm": {"cpu": [kernel("RMSNorm"), kernel("Gate")]}}, inherit_mapping=False):
        plan = plan_kernels(models.Model(), mode=I)
    assert len(plan.tried) == 3
    assert all("the fastest of them" in row.reason for row in plan.tried), "each row alone says it all the same"
    text = str(plan)
    assert text.count("checked when it is loaded") == text.count("the fastest of them") == 1
    assert str(KernelPlan(())).startswith("it has no kernel-aware layers")


def test_a_plan_and_what_kernelize_does_agree(registered: None) -> None:
    model = models.Model()
    tried = [row.path for row in plan_kernels(model, mode=I, exclude="norm").tried]
    kernelize(model, mode=I, exclude="norm")
    assert [row.path for row in kernel_report(model).kernels] == tried


# Threads and tasks


def test_threads_and_tasks_kernelize_with_mappings_of_their_own(kernel: Kernel) -> None:
    """needs 17."""
    thousand(kernel("Gate"))
    names = ["Gate", "Forward", "OtherNames", "Misnamed"]
    found: dict[str, str] = {}
    start = threading.Barrier(len(names))

    def work(name: str) -> None:
        with use_kernel_mapping({"Thousand": {"cpu": kernel(name)}}):
            start.wait(30)
            for _ in range(5):
                model = kernelize(Layer(), mode=I)
            found[name] = kernel_report(model).rows[0].layer or ""

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {name: name for name in names}

    async def task(name: str) -> str:
        with use_kernel_mapping({"Thousand": {"cpu": kernel(name)}}):
            await asyncio.sleep(0)
            return kernel_report(kernelize(Layer(), mode=I)).rows[0].layer or ""

    async def main() -> list[str]:
        return await asyncio.gather(*(task(name) for name in names))

    assert asyncio.run(main()) == names


# By name: from a hub, with trust


def test_a_kernel_by_name_is_fetched_once_and_trust_is_asked_for(tmp_path: Path) -> None:
    """needs 2, needs 4: only the caller's code grants trust; a kernel that is here sends nothing."""
    from kernelfiles import MemorySource, kernel_files
    from kernels_for_tests import INIT, LAYERS

    files = kernel_files({"__init__.py": INIT, "layers.py": LAYERS}, name="named")
    source = MemorySource({"org/named": {"torch-cpu": files}}, trusted=False)
    set_default_hub(Hub(Settings(cache=tmp_path / "store"), sources=[source]))
    repository = LayerRepository("org/named", layer_name="Gate", version=1)
    thousand(repository)
    with pytest.raises(kernelhub.UntrustedKernel):
        kernelize(Layer(), mode=I, use_fallback=KernelizeFallback.ALL)
    thousand(LayerRepository("org/named", layer_name="Gate", version=1, trust_remote_code=["org/named"]))
    model = kernelize(Layer(), mode=I)
    assert runs_kernel(model)
    row = kernel_report(model).rows[0]
    assert (row.repository, row.commit, row.variant) == ("org/named", source.commit("org/named"), "torch-cpu")
    assert (row.digest or "").startswith("sha256-")
    source.asked.clear()
    kernelize(model, mode=I)
    assert source.asked == []


def test_what_is_on_the_children_is_only_for_kernels_that_say_that_they_call_them(kernel: Kernel) -> None:
    """And only in classes of which it was said too: neither a kernel nor a mark alone is enough."""

    class Calling(models.Mlp):
        pass

    replace_kernel_forward_from_hub(Calling, "Calling")
    for said in (False, True):
        if said:
            mark_as_calling(Calling)
        for layer in ("Mlp", "CallingMlp"):
            model = Calling()
            with use_kernel_mapping({"Calling": {"cpu": kernel(layer)}}, inherit_mapping=False):
                assert len(kernel_report(kernelize(model, mode=I)).kernels) == 1, "nothing is on its children"
                model.up.register_forward_hook(lambda _, __, output: output * 2)
                expected = unkernelize(model)(torch.ones(8))
                runs = kernel_report(kernelize(model, mode=I)).kernels != ()
            assert runs == (said and layer == "CallingMlp")
            torch.testing.assert_close(model(torch.ones(8)), expected)
            if not runs:
                more = ", and the kernel does not say that it calls the layer's children" if said else ""
                assert reason(model) == f"its up has hooks, which the kernel would not call{more}"


def test_a_kernel_that_only_runs_the_original_on_a_device_is_none_there(kernel: Kernel) -> None:
    """Not measured either, and no error where every layer must have a kernel: there is nothing that it could lose."""
    model = models.Linear(8, 8)
    with use_kernel_mapping({"Linear": {"cpu": kernel("NotOnCpus")}}, inherit_mapping=False):
        for options in ({"use_fallback": False}, {"verify": True, "sample_inputs": torch.ones(1, 8)}):
            kernelize(model, mode=I, **options)
            assert reason(model).endswith(":NotOnCpus gains nothing on cpu, where it runs the layer's own forward")
    with use_kernel_mapping({"Linear": {"cpu": [kernel("NotOnCpus"), kernel("NotOnGpus")]}}, inherit_mapping=False):
        (row,) = kernel_report(kernelize(model, mode=I)).kernels
        assert row.layer == "NotOnGpus"


def test_what_was_said_of_a_layer_is_not_said_of_another_that_the_class_is_marked_as() -> None:
    class Calling(models.Mlp):
        pass

    class Other(Calling):
        pass

    class Same(Calling):
        pass

    replace_kernel_forward_from_hub(Calling, "Calling")
    mark_as_calling(Calling)
    replace_kernel_forward_from_hub(Other, "Other")
    assert [calls_children(cls()) for cls in (Calling, Same, Other, models.Mlp)] == [True, True, False, False]
    replace_kernel_forward_from_hub(Calling, "Whole")
    assert not calls_children(Calling())
