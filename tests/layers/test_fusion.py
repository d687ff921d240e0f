"""Several modules with one kernel: what it computes, what it leaves as it is, and what is refused."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from fused_kernels import KEY, Block, Model, Norm, SmallMlp, write_fused
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from kernelhub import KernelizeFallback, Mode, kernel_report, kernelize, kernelized, plan_kernels, unkernelize
from kernelhub.errors import InvalidReference, KernelHubWarning, LayerContractError, NoKernelForLayer
from kernelhub.hub.client import Hub
from kernelhub.layers.fusion import find
from kernelhub.layers.mapping import use_kernel_mapping
from kernelhub.layers.repositories import LocalLayerRepository

X = torch.linspace(-1, 1, 3 * 8).reshape(3, 8)
pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fused(tmp_path_factory.mktemp("kernels") / "fused")


@pytest.fixture
def fuse(fused: Path) -> Callable[..., nn.Module]:
    """`fuse(model, "NormMlp")`: kernelize with that kernel for the norm and the MLP of each layer, and none else."""

    def run(
        model: nn.Module, name: str = "NormMlp", *, key: Any = KEY, mode: Mode = Mode.INFERENCE, **options: Any
    ) -> nn.Module:
        with use_kernel_mapping({key: {"cpu": LocalLayerRepository(fused, layer_name=name)}}, inherit_mapping=False):
            return kernelize(model, mode=mode, **options)

    return run


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def rows(model: nn.Module) -> dict[str, Any]:
    return {row.path: row for row in kernel_report(model).rows}


@pytest.mark.parametrize("name", ["NormMlp", "Calls", "Named", "Laid", "Renamed"])
def test_one_kernel_computes_both_modules(name: str, fuse: Callable[..., nn.Module]) -> None:
    model = Model().eval()
    expected, keys, modules = outputs(model), list(model.state_dict()), list(model.named_modules())
    assert fuse(model, name) is model
    torch.testing.assert_close(outputs(model), expected)
    assert list(model.state_dict()) == keys
    assert list(model.named_modules()) == modules
    assert model.layers[0].mlp(X) is X  # what it is given is the result already


def test_the_report_names_all_of_them(fuse: Callable[..., nn.Module], fused: Path) -> None:
    model = fuse(Model().eval())
    found = rows(model)
    assert list(found) == ["layers.0.norm", "layers.0.mlp", "layers.1.norm", "layers.1.mlp", "norm"]
    assert {row.repository for path, row in found.items() if path != "norm"} == {str(fused)}
    assert {row.layer for row in kernel_report(model).kernels} == {"NormMlp"}
    assert found["layers.0.norm"].reason == "it computes layers.0.mlp too"
    assert found["layers.1.mlp"].reason == "computed by the kernel on layers.1.norm"
    assert (found["layers.1.mlp"].class_name, found["layers.1.mlp"].layer_name) == ("SmallMlp", "Mlp")
    assert found["norm"].outcome == "original"


def test_unkernelize_gives_each_part_its_own_forward_back(fuse: Callable[..., nn.Module]) -> None:
    model = Model().eval()
    before = [dict(module.__dict__) for module in model.modules()]
    expected = outputs(model)
    fuse(model)
    unkernelize(model)
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("part", ["norm", "mlp"])
def test_parts_come_and_go_together(part: str, fuse: Callable[..., nn.Module]) -> None:
    model = Model().eval()
    expected = outputs(model)
    fuse(model)
    unkernelize(model, include=f"layers.0.{part}")
    assert [row.path for row in kernel_report(model).kernels] == ["layers.1.norm", "layers.1.mlp"]
    torch.testing.assert_close(outputs(model), expected)
    fuse(model)
    with pytest.warns(KernelHubWarning, match="runs no kernel"):
        fuse(getattr(model.layers[0], part))  # kernelized alone: the other is no part of what is asked for
    torch.testing.assert_close(outputs(model), expected)


def test_with_kernelized_it_is_as_before(fuse: Callable[..., nn.Module], fused: Path) -> None:
    model = fuse(Model().eval())
    before = kernel_report(model)
    expected = outputs(model)
    norm = {"Norm": {"cpu": LocalLayerRepository(fused, layer_name="Norm")}}
    with use_kernel_mapping(norm, inherit_mapping=False), kernelized(model, mode=Mode.INFERENCE):
        assert {row.layer for row in kernel_report(model).kernels} == {"Norm"}
        torch.testing.assert_close(outputs(model), expected)
    assert kernel_report(model).rows == before.rows
    assert torch.equal(outputs(model), expected)


def test_an_error_leaves_the_model_as_it_was(fuse: Callable[..., nn.Module]) -> None:
    model = fuse(Model().eval())
    before = kernel_report(model)

    def broken(model: nn.Module) -> None:
        raise RuntimeError("the sample does not run")

    with pytest.raises(RuntimeError, match="does not run"):
        fuse(model, "Calls", sample_inputs=broken, verify=True)
    assert kernel_report(model).rows == before.rows


@pytest.mark.parametrize("name", ["NormMlp", "Calls", "Named"])
def test_training_reads_the_weights_as_they_are(name: str, fuse: Callable[..., nn.Module]) -> None:
    model, other = Model(), Model()
    fuse(model, name, mode=Mode.TRAINING)
    assert len(kernel_report(model).kernels) == 4
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, other)]
    for _ in range(3):
        for one, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            one(X).square().sum().backward()
            optimizer.step()
    for (path, found), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=lambda text, path=path: f"{path}: {text}")
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["NormMlp", "Calls", "Named", "Laid"])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_later_are_seen(name: str, assign: bool, fuse: Callable[..., nn.Module]) -> None:
    model = fuse(Model().eval(), name)
    outputs(model)
    state = {key: value * 0.5 for key, value in Model().state_dict().items()}
    other = Model().eval()
    for one in (model, other):
        one.load_state_dict(state, assign=assign)
    torch.testing.assert_close(outputs(model), outputs(other))
    model.layers[0].mlp.up.weight.data = other.layers[0].mlp.up.weight.data.clone() * 2
    other.layers[0].mlp.up.weight.data *= 2
    torch.testing.assert_close(outputs(model), outputs(other))


@pytest.mark.parametrize("name", ["NormMlp", "Named", "Laid"])
def test_another_dtype(name: str, fuse: Callable[..., nn.Module]) -> None:
    model = fuse(Model().eval(), name).double()
    other = Model().eval().double()
    with torch.no_grad():
        torch.testing.assert_close(model(X.double()), other(X.double()))


@pytest.mark.parametrize("name", ["NormMlp", "Calls", "Named", "Laid"])
def test_copies_are_fused_with_their_own_weights(name: str, fuse: Callable[..., nn.Module]) -> None:
    model = fuse(Model().eval(), name)
    expected = outputs(model)
    copied = copy.deepcopy(model)
    assert len(kernel_report(copied).kernels) == 4
    assert torch.equal(outputs(copied), expected)
    with torch.no_grad():
        copied.layers[0].mlp.up.weight.zero_()
    assert not torch.equal(outputs(copied), expected)
    assert torch.equal(outputs(model), expected)
    unkernelize(copied)
    assert kernel_report(copied).kernels == ()
    assert len(kernel_report(model).kernels) == 4


@pytest.mark.parametrize("part", ["norm", "mlp"])
def test_a_copy_of_one_part_alone_is_the_original(part: str, fuse: Callable[..., nn.Module]) -> None:
    original, model = Model().eval(), fuse(Model().eval())
    alone = copy.deepcopy(getattr(model.layers[0], part))
    assert torch.equal(alone(X), getattr(original.layers[0], part)(X))
    assert kernel_report(alone).kernels == ()
    unkernelize(alone)
    assert "forward" not in alone.__dict__
    assert torch.equal(alone(X), getattr(original.layers[0], part)(X))


@pytest.mark.parametrize("name", ["NormMlp", "Laid"])
def test_a_saved_model_comes_back_fused(name: str, fuse: Callable[..., nn.Module]) -> None:
    model = fuse(Model().eval(), name)
    expected = outputs(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [row.path for row in kernel_report(loaded).kernels] == [row.path for row in kernel_report(model).kernels]
    assert torch.equal(outputs(loaded), expected)
    unkernelize(loaded)
    torch.testing.assert_close(outputs(loaded), expected)


def test_where_the_kernel_is_not_it_comes_back_as_the_original(
    fuse: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Model().eval()
    model = fuse(Model().eval())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    loaded = torch.load(file, weights_only=False)
    assert kernel_report(loaded).kernels == ()
    assert torch.equal(outputs(loaded), outputs(original))
    unkernelize(loaded)
    assert all("forward" not in module.__dict__ for module in loaded.modules())


@pytest.mark.parametrize("name", ["NormMlp", "Calls", "Named"])
def test_it_compiles_without_a_graph_break_once_for_all_layers(name: str, fuse: Callable[..., nn.Module]) -> None:
    model = Model(layers=4).eval()
    expected = outputs(model)
    fuse(model, name, mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
    torch._dynamo.reset()
    frames = []

    def counting(graph: Any, inputs: Any) -> Any:
        frames.append(graph)
        return graph.forward

    for layer in model.layers:
        layer.compile(backend=counting, fullgraph=True)
    torch.testing.assert_close(outputs(model), expected)
    assert len(frames) <= 2, "a layer compiles for itself"
    torch._dynamo.reset()


def test_verify_compares_the_kernel_with_the_modules_one_after_another(fuse: Callable[..., nn.Module]) -> None:
    for mode in (Mode.INFERENCE, Mode.TRAINING):
        model = fuse(Model().train(Mode.TRAINING in mode), sample_inputs=X, verify=True, mode=mode)
        first = rows(model)["layers.1.norm"]
        assert (first.outcome, first.calls) == ("kernel", 1)
        assert first.max_error < 1e-5
        assert rows(model)["layers.1.mlp"].calls == 0


def test_a_kernel_that_is_not_equal_leaves_the_modules_as_they_were(fuse: Callable[..., nn.Module]) -> None:
    model = Model().eval()
    expected = outputs(model)
    with pytest.warns(KernelHubWarning, match="not equal"):
        fuse(model, "Wrong", sample_inputs=X, verify=True)
    assert torch.equal(outputs(model), expected)
    assert any(
        "layers.0: norm + mlp: not fused: " in note and "not equal" in note for note in kernel_report(model).notes
    )
    with pytest.raises(NoKernelForLayer, match="not equal"):
        fuse(model, "Wrong", sample_inputs=X, verify=True, use_fallback=KernelizeFallback.NO_LAYER)


# What is laid out


def test_a_layout_with_weights_of_its_own_says_so(fuse: Callable[..., nn.Module]) -> None:
    model = fuse(Model().eval(), "Laid")
    assert (
        "keeps weights of its own (scaled), made of the modules': for inference" in rows(model)["layers.0.norm"].reason
    )


def test_a_layout_with_weights_of_its_own_is_not_for_training(fuse: Callable[..., nn.Module]) -> None:
    model = Model()
    with pytest.warns(KernelHubWarning, match="which gradients would not reach"):
        fuse(model, "Laid", mode=Mode.TRAINING)
    assert kernel_report(model).kernels == ()
    assert "does not serve TRAINING" in kernel_report(model).notes[0]
    with pytest.raises(NoKernelForLayer, match="gradients would not reach"):
        fuse(model, "Laid", mode=Mode.TRAINING, use_fallback=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Unset", "UnsetLayout does not set its weights from the modules: scaled"),
        ("Drawn", "DrawnLayout does not set its weights from the modules: up.bias, up.weight"),
        ("Loaded", r"the weights of LoadedLayout \(scaled\) are filled while a checkpoint is loaded"),
        ("Changes", "ChangesLayout changes SmallMlp"),
        ("Writes", "WritesLayout changes their weights"),
        ("Fails", "FailsLayout raises TypeError"),
        ("Alone", "there is no nn.Module named AloneLayout beside it"),
    ],
)
def test_layouts_that_cannot_be_right(name: str, said: str, fuse: Callable[..., nn.Module]) -> None:
    model = Model().eval()
    expected = outputs(model)
    with pytest.raises(LayerContractError, match=said):
        fuse(model, name)
    assert torch.equal(outputs(model), expected)
    with pytest.warns(KernelHubWarning, match="runs no kernel"):
        fuse(model, name, use_fallback=KernelizeFallback.ALL)


def test_building_a_layout_draws_nothing(fuse: Callable[..., nn.Module]) -> None:
    model = Model().eval()
    torch.manual_seed(3)
    with pytest.raises(LayerContractError):
        fuse(model, "Drawn")
    found = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(1))


def test_a_kernel_without_a_backward_is_not_for_training(fuse: Callable[..., nn.Module]) -> None:
    model = Model()
    with pytest.warns(KernelHubWarning, match="has_backward = False"):
        fuse(model, "Forward", mode=Mode.TRAINING)
    assert len(kernel_report(fuse(model.eval(), "Forward")).kernels) == 4


# What the kernel would pass by


def _hook(model: Model) -> None:
    model.layers[0].mlp.up.register_forward_hook(lambda *_: None)


def _hook_between(model: Model) -> None:
    model.layers[0].norm.register_forward_hook(lambda *_: None)


def _adapter(model: Model) -> None:
    wrapped = nn.Module()
    wrapped.base_layer = model.layers[0].mlp.up
    model.layers[0].mlp.up = wrapped


def _quantised(model: Model) -> None:
    model.layers[0].mlp.up = torch.ao.nn.quantized.dynamic.Linear(8, 16)


def _own_forward(model: Model) -> None:
    model.layers[0].mlp.forward = lambda x: x


def _own_call(model: Model) -> None:
    norm = model.layers[0].norm
    base = type(norm)
    norm.__class__ = type("Other", (base,), {"__call__": lambda self, x: 3 * base.__call__(self, x)})


def test_hooks_of_all_modules_see_what_the_modules_give(fuse: Callable[..., nn.Module]) -> None:
    model, seen = fuse(Model().eval()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, _, result: seen.append((module, result)))
    try:
        outputs(model)
        fused, seen = seen, []
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda module, _, result: seen.append((module, result)))
        outputs(unkernelize(model))
    finally:
        handle.remove()
    assert [module for module, _ in fused] == [module for module, _ in seen]
    for (_, found), (_, expected) in zip(fused, seen, strict=True):
        torch.testing.assert_close(found, expected)


def _shared(model: Model) -> None:
    model.layers[1].mlp = model.layers[0].mlp
    model.layers[1].norm = Model().layers[0].norm


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_hook, "layers.0.mlp: its up has hooks, which the kernel would not call"),
        (_hook_between, "layers.0.norm has hooks, which would see what the fused kernel hands on"),
        (_adapter, "layers.0.mlp: its up is adapted (Module), and the kernel would not call the adapter"),
        (_quantised, "layers.0.mlp: its up"),
        (_own_call, "layers.0.norm has a __call__ of its own, which would see what the fused kernel hands on"),
        (_own_forward, "layers.0.mlp: somebody else put a forward of their own on this instance"),
    ],
)
@pytest.mark.parametrize("name", ["NormMlp", "Laid"])
def test_what_the_kernel_would_pass_by_keeps_its_forwards(
    name: str, change: Callable[[Model], None], said: str, fuse: Callable[..., nn.Module]
) -> None:
    model = Model().eval()
    change(model)
    fuse(model, name)
    assert [row.path for row in kernel_report(model).kernels] == ["layers.1.norm", "layers.1.mlp"]
    (note,) = kernel_report(model).notes
    assert note.startswith(f"layers.0: norm + mlp: not fused: {said}")


def test_a_module_in_two_places_is_not_fused(fuse: Callable[..., nn.Module]) -> None:
    model = Model(layers=1).eval()
    model.other = model.layers[0].mlp
    with pytest.warns(KernelHubWarning, match="stands in 2 places"):
        fuse(model)
    model = Model().eval()
    _shared(model)
    with pytest.raises(InvalidReference, match=r"layers.1.mlp is fused in layers.0: norm \+ mlp too"):
        fuse(model)


def test_an_adapter_of_peft_is_not_passed_by(fuse: Callable[..., nn.Module]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model().eval(), peft.LoraConfig(target_modules=["layers.0.mlp.up"], r=2))
    nn.init.ones_(model.base_model.model.layers[0].mlp.up.lora_B["default"].weight)
    expected = outputs(model)
    fuse(model, key=(("Norm", "**.layers.*.norm"), ("Mlp", "**.layers.*.mlp")))
    assert {row.path.split(".")[3] for row in kernel_report(model).kernels} == {"1"}
    torch.testing.assert_close(outputs(model), expected)


# What changes after the modules were fused


def _hook_later(model: Model) -> None:
    model.layers[0].norm.register_forward_hook(lambda module, args, output: output + 1)


def _pre_hook_later(model: Model) -> None:
    model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _replaced(model: Model, name: str) -> None:
    torch.manual_seed(7)
    made: nn.Module = Norm(8) if name == "norm" else SmallMlp(8)
    with torch.no_grad():
        next(made.parameters()).mul_(3)
    setattr(model.layers[0], name, made)


def _forward(model: Model, name: str, wraps: bool) -> None:
    part = getattr(model.layers[0], name)
    held = part.forward
    part.forward = (lambda x: 2 * held(x)) if wraps else (lambda x: 3 * x)


def _method(model: Model, name: str) -> None:
    part = getattr(model.layers[0], name)
    part.forward = MethodType(functools.wraps(part.forward.__func__)(lambda self, x: 3 * x), part)


def _parent_forward(model: Model) -> None:
    block = model.layers[0]
    block.forward = lambda x: block.mlp(block.norm(x)) + block.norm(x)


@pytest.mark.parametrize("name", ["NormMlp", "Named", "Laid"])
@pytest.mark.parametrize(
    "change",
    [
        _hook_later,
        _pre_hook_later,
        lambda model: _replaced(model, "norm"),
        lambda model: _replaced(model, "mlp"),
        lambda model: setattr(model.layers[0], "mlp", nn.Identity()),
        lambda model: _forward(model, "norm", wraps=True),
        lambda model: _forward(model, "mlp", wraps=True),
        lambda model: _forward(model, "norm", wraps=False),
        lambda model: _forward(model, "mlp", wraps=False),
        lambda model: _method(model, "norm"),
        lambda model: _method(model, "mlp"),
        lambda model: register_parametrization(model.layers[0].norm, "weight", nn.Softplus()),
        _parent_forward,
    ],
)
def test_modules_that_do_not_belong_together_any_more_run_their_own_forwards(
    name: str, change: Callable[[Model], None], fuse: Callable[..., nn.Module]
) -> None:
    model, other = fuse(Model().eval(), name), Model().eval()
    outputs(model)
    for one in (model, other):
        change(one)
    torch.testing.assert_close(outputs(model), outputs(other))
    unkernelize(model)
    assert torch.equal(outputs(model), outputs(other))


def test_a_hook_sees_what_it_would_have_seen(fuse: Callable[..., nn.Module]) -> None:
    model, other = fuse(Model().eval()), Model().eval()
    seen: list[torch.Tensor] = []
    handles = [one.layers[0].norm.register_forward_hook(lambda *call: seen.append(call[2])) for one in (model, other)]
    for one in (model, other):
        outputs(one)
    torch.testing.assert_close(seen[0], seen[1])
    for handle in handles:
        handle.remove()
    assert model.layers[0].mlp(X) is X, "the kernel computes both again"


def test_weights_of_a_layout_s_own_are_not_for_compiled_code(fuse: Callable[..., nn.Module]) -> None:
    model = Model().eval()
    with pytest.warns(KernelHubWarning, match="which compiled code would not make again"):
        fuse(model, "Laid", mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
    assert kernel_report(model).kernels == ()


# What the parent does with what lies between


class Between(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + y + self.mlp(y)


class Later(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = self.mlp(y)
        return z + y


class Changed(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        y = y * 2
        return self.mlp(y)


class Twice(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + self.mlp(x)


class Branch(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        if x.sum() > 0:
            y = self.mlp(y)
        return y


class Loop(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = self.mlp(self.norm(x))
        return x


class Weights(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + self.norm.weight


class Helper(Block):
    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + self.helper(x)


class Harmless(Block):
    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + self.helper(x)


class Overridden(Harmless):
    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


def apply_mlp(block: Block, x: torch.Tensor) -> torch.Tensor:
    return block.mlp(x)


class Itself(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + apply_mlp(self, x)


class Deeper(Block):
    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + self.helper(x)


class Hands(Deeper):
    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return apply_mlp(self, x)


class Cached(Block):
    @functools.cached_property
    def first(self) -> nn.Module:
        return self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + self.first(x)


class Tables(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + self._modules["norm"](x)


class Children(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + next(self.children())(x)


class Super(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + super().forward(x)


class LateUse(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def between() -> torch.Tensor:
            return y

        y = self.norm(x)
        z = self.mlp(y)
        return z + between()


def also_normed(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Block, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) + self.norm(x)

    return wrapper


class Decorated(Block):
    @also_normed
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x))


class Called(Block):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) + self.norm(x)


class Holds(Block):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.held = {"first": [self.norm]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + self.held["first"][0](x)


class HoldsItself(Block):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.__dict__["held"] = self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) + self.held(x)


class Reversed(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.mlp(x))


class Nested(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class OtherName(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        shape = x.shape
        z = self.mlp(y)
        y = z + x
        return y.reshape(shape)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (Between, "uses the result of self.norm elsewhere than in self.mlp"),
        (Later, "uses the result of self.norm elsewhere than in self.mlp"),
        (Changed, "uses the result of self.norm elsewhere than in self.mlp"),
        (Twice, "uses self.mlp 2 times; expected one call"),
        (Branch, "does not call self.mlp after self.norm"),
        (Loop, "calls self.norm in a loop"),
        (Weights, "uses self.norm 2 times; expected one call"),
        (Helper, "Helper.helper uses its norm or mlp too"),
        (Overridden, "Overridden.helper uses its norm or mlp too"),
        (Itself, "hands itself to other code"),
        (Reversed, "does not call self.mlp after self.norm"),
        (Deeper, "Deeper.inner uses its norm or mlp too"),
        (Hands, "Hands.inner hands itself to other code"),
        (Cached, "Cached.* one of them as first too|Cached.first uses its norm or mlp too"),
        (Tables, "Tables.forward uses its norm or mlp too"),
        (Children, "Children.forward uses its norm or mlp too"),
        (Super, "Super.forward calls what it overrides"),
        (LateUse, "uses the result of self.norm elsewhere than in self.mlp"),
        (Decorated, "what runs around Decorated.forward uses its norm or mlp too"),
        (Called, "what runs around Called.forward uses its norm or mlp too"),
        (Holds, "Holds holds one of them as held too"),
        (HoldsItself, "HoldsItself holds one of them as held too"),
    ],
)
def test_a_parent_that_sees_what_lies_between_is_refused(
    block: type[nn.Module], said: str, fuse: Callable[..., nn.Module]
) -> None:
    model = Model(block=block).eval()
    expected = outputs(model)
    with pytest.raises(LayerContractError, match=said):
        fuse(model)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("block", [Nested, OtherName, Harmless])
def test_a_parent_that_hands_on_the_result_alone(block: type[nn.Module], fuse: Callable[..., nn.Module]) -> None:
    model = Model(block=block).eval()
    expected = outputs(model)
    fuse(model)
    assert len(kernel_report(model).kernels) == 4
    torch.testing.assert_close(outputs(model), expected)


def test_a_forward_on_the_instance_of_the_parent_is_unknown(fuse: Callable[..., nn.Module]) -> None:
    model = Model().eval()
    model.layers[0].forward = lambda x: x
    with pytest.raises(LayerContractError, match="has a forward of its own on the instance"):
        fuse(model)
    sequence = nn.Sequential(Norm(8), SmallMlp(8)).eval()
    sequence.forward = lambda x: sequence[1](sequence[0](x)) + sequence[0](x)
    with pytest.raises(LayerContractError, match="has a forward of its own on the instance"):
        fuse(sequence, key=(("Norm", "0"), ("Mlp", "1")))


def test_without_source_it_is_refused(fuse: Callable[..., nn.Module]) -> None:
    scope: dict[str, Any] = {"Block": Block}
    exec("class Typed(Block):\n    def forward(self, x):\n        return self.mlp(self.norm(x))", scope)
    with pytest.raises(LayerContractError, match="source of Typed.forward cannot be read"):
        fuse(Model(block=scope["Typed"]).eval())


def test_source_that_is_not_what_runs_is_no_source(fuse: Callable[..., nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "blocks.py"
    text = "class Late(Block):\n    def forward(self, x):\n        return {}\n"
    scope: dict[str, Any] = {"Block": Block}
    exec(compile(text.format("self.mlp(self.norm(x)) + self.norm.weight"), str(path), "exec"), scope)
    path.write_text(text.format("self.mlp(self.norm(x))"))
    with pytest.raises(LayerContractError, match="source of Late.forward cannot be read"):
        fuse(Model(block=scope["Late"]).eval())


def test_neighbours_in_a_sequential_hand_on_their_results(fuse: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(Norm(8), SmallMlp(8), nn.ReLU(), SmallMlp(8)).eval()
    expected = outputs(model)
    fuse(model, key=(("Norm", "0"), ("Mlp", "1")))
    assert [row.path for row in kernel_report(model).kernels] == ["0", "1"]
    torch.testing.assert_close(outputs(model), expected)
    with pytest.raises(LayerContractError, match="hands itself to other code"):
        fuse(model, key=(("Norm", "0"), ("Mlp", "3")))


# Keys, and others' kernels


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ((("Norm", "layers.*.norm"), ("Mlp", "blocks.*.mlp")), "the layers have different parents: 'layers.*' and 'blocks.*'"),
        ((("Norm", "layers.*.norm"), ("Mlp", "layers.*.feed")), r"layers.0 \(Block\) has no layers.0.feed"),
        ((("LayerNorm", "layers.*.norm"), ("Mlp", "layers.*.mlp")), "layers.0.norm is a Norm, registered as 'Norm', not a 'LayerNorm'"),
        ((("Norm", "layers.*.norm"), ("Mlp", "layers.*.*")), "does not end in the name of a child"),
        ((("Norm", "layers.*.norm"), "Mlp"), "'Mlp' is not a layer's name and a path"),
        ((("Norm", "layers.*.norm"), ("Norm", "layers.*.norm")), "names a child twice"),
        ((), "names no layers"),
    ],
)  # fmt: skip
def test_keys_that_name_nothing_right(key: Any, said: str, fuse: Callable[..., nn.Module]) -> None:
    with pytest.raises(InvalidReference, match=said):
        fuse(Model().eval(), key=key)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("*.norm", []),
        ("*.*.norm", ["layers.0", "layers.1"]),
        ("layers.1.norm", ["layers.1"]),
        ("lay*.0.norm", ["layers.0"]),
        ("**.0.norm", ["layers.0"]),
        ("layers.**.norm", ["layers.0", "layers.1"]),
        ("lay**.norm", []),
        ("norm", [""]),
    ],
)
def test_paths_of_parents(path: str, found: list[str]) -> None:
    assert [group.path for group in find(Model(), (("Norm", path),)).groups] == found


def test_a_key_for_other_models_says_nothing_of_this_one(fuse: Callable[..., nn.Module]) -> None:
    model = Model().eval()
    with pytest.warns(KernelHubWarning, match="runs no kernel"):
        fuse(model, key=(("Norm", "blocks.*.norm"), ("Mlp", "blocks.*.mlp")))


def test_parts_get_no_kernels_of_their_own_but_others_do(fuse: Callable[..., nn.Module], fused: Path) -> None:
    model = Model().eval()
    expected = outputs(model)
    mapping = {
        KEY: {"cpu": LocalLayerRepository(fused, layer_name="NormMlp")},
        "Norm": {"cpu": LocalLayerRepository(fused, layer_name="Norm")},
    }
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE, exclude="layers.1.mlp")
        plan = {row.path: row for row in plan_kernels(model, mode=Mode.INFERENCE).rows}
    found = {row.path: row.layer for row in kernel_report(model).kernels}
    assert found == {"layers.0.norm": "NormMlp", "layers.0.mlp": "NormMlp", "layers.1.norm": "Norm", "norm": "Norm"}
    assert kernel_report(model).notes == ("layers.1: norm + mlp: not fused: layers.1.mlp: it is in `exclude`",)
    assert plan["layers.0: norm + mlp"].repository == f"{fused}:NormMlp"
    torch.testing.assert_close(outputs(model), expected)


def test_a_module_around_fused_ones_keeps_its_forward(fuse: Callable[..., nn.Module], fused: Path) -> None:
    from kernelhub.layers.markers import use_kernel_forward_from_hub

    marked = use_kernel_forward_from_hub("Block")(type("Marked", (Block,), {"forward": Block.forward}))
    model = Model(block=marked).eval()
    mapping = {
        KEY: {"cpu": LocalLayerRepository(fused, layer_name="NormMlp")},
        "Block": {"cpu": LocalLayerRepository(fused, layer_name="Norm")},
    }
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE)
    assert rows(model)["layers.0"].reason == "its layers.0: norm + mlp are fused, which a kernel here would not know of"


def test_a_part_that_others_changed_is_told(fuse: Callable[..., nn.Module]) -> None:
    model = fuse(Model().eval())
    model.layers[0].mlp.forward = lambda x: x
    assert rows(model)["layers.0.norm"].stale
    assert "has another forward; kernelize again" in rows(model)["layers.0.norm"].reason


def test_a_warning_is_one_where_nothing_can_be_fused(hub: Hub) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel_report(Model())
