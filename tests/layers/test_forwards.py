"""A class is named by its name and by what its forward computes: another forward is never taken for the one that was compared."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.activations import GELUActivation, SiLUActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama

from kernelhub.integrations import losses
from kernelhub.integrations.families import FAMILIES, OTHER_FORWARD, TORCH, family_of
from kernelhub.integrations.forwards import _own_names, digest, digest_of
from kernelhub.integrations.transformers import kernelize_pretrained, mark
from kernelhub.layers.kernelize import unkernelize
from kernelhub.layers.markers import replace_kernel_forward_from_hub
from kernelhub.layers.mode import Mode
from kernelhub.layers.report import kernel_report

pytestmark = pytest.mark.usefixtures("unnamed", "nothing_compiled")

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(1, 21).reshape(2, 10)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# The table

TRANSFORMERS = Path(transformers.__file__).parent
FILES = {
    "transformers.": [*TRANSFORMERS.glob("models/*/modeling_*.py"), TRANSFORMERS / "activations.py"],
    TORCH: [Path(nn.__file__).parent / "modules" / f"{name}.py" for name in ("activation", "normalization")],
}


def _functions(cls: ast.ClassDef) -> list[ast.FunctionDef]:
    """The forward, and those of its methods that it calls; nothing where it has none of its own."""
    methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
    found = {"forward": methods["forward"]} if "forward" in methods else {}
    waiting = list(found.values())
    while waiting:
        new = {name: methods[name] for name in _own_names(waiting.pop()) if name in methods and name not in found}
        found |= new
        waiting += new.values()
    return list(found.values())


def test_the_table_has_the_forwards_of_its_classes_and_no_other() -> None:
    known = {(family.package, name): family for family in FAMILIES for name in family.names.split() if family.forwards}
    found: dict[Any, set[str]] = {family: set() for family in known.values()}
    for package, paths in FILES.items():
        for path in paths:
            for block in re.finditer(r"^class (\w+)\(.*?(?=^\S|\Z)", path.read_text(), re.M | re.S):
                family = known.get((package, block[1]))
                if family is None:
                    continue
                (cls,) = ast.parse(block[0]).body
                assert isinstance(cls, ast.ClassDef)
                functions = _functions(cls)
                if functions:
                    found[family].add(digest_of(functions))
    for family, digests in found.items():
        assert digests == set(family.forwards.split()), (family.layer, family.names)
    without = {family.layer for family in FAMILIES if not family.forwards}
    assert without == {
        "RotaryEmbedding",
        "RotaryEmbeddingByLayerType",
    }  # which kernels ask for their formula themselves


@pytest.mark.parametrize(
    "name", ["LlamaAttention", "LlamaDecoderLayer", "LlamaMLP", "LlamaRMSNorm", "LlamaModel", "LlamaForCausalLM"]
)
def test_a_class_at_hand_has_the_digest_of_its_source(name: str) -> None:
    (cls,) = ast.parse(re.search(rf"^class {name}\(.*?(?=^\S)", _text(), re.M | re.S)[0]).body
    assert isinstance(cls, ast.ClassDef)
    assert digest(getattr(modeling_llama, name)) == digest_of(_functions(cls))


def _text() -> str:
    return Path(str(modeling_llama.__file__)).read_text()


# Forwards that are others


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """Llama's module as another version of transformers could have it, one text in it replaced by another."""

    def make(old: str, new: str) -> ModuleType:
        text = _text().replace("from ...", "from transformers.")
        assert text.count(old) == 1
        path = tmp_path / "modeling_llama_changed.py"
        path.write_text(text.replace(old, new))
        name = "transformers.models.llama.modeling_llama_changed"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return make


CHANGES = {
    "LlamaRMSNorm": ("return self.weight * hidden_states.to(", "return (1 + self.weight) * hidden_states.to("),
    "LlamaMLP": (
        "self.act_fn(self.gate_proj(x)) * self.up_proj(x)",
        "self.act_fn(self.up_proj(x)) * self.gate_proj(x)",
    ),
    "LlamaAttention": (
        "cos, sin = position_embeddings\n",
        "cos, sin = position_embeddings\n        key_states = key_states * 0.5\n",
    ),
    "LlamaDecoderLayer": (
        "hidden_states = self.mlp(hidden_states)\n",
        "hidden_states = 2 * self.mlp(hidden_states)\n",
    ),
    "LlamaModel": (
        "hidden_states = inputs_embeds\n",
        "hidden_states = inputs_embeds * self.config.hidden_size**0.5\n",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING], ids=str)
def test_a_class_of_another_version_keeps_its_forward(
    name: str, mode: Mode, changed: Callable[[str, str], ModuleType]
) -> None:
    module = changed(*CHANGES[name])
    torch.manual_seed(0)
    model = module.LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    expected = logits(model)
    assert not torch.allclose(expected, logits(llama()), rtol=0, atol=1e-4)
    cls = getattr(module, name)
    paths = {path for path, part in model.named_modules() if type(part) is cls}
    marks = mark(model)
    assert marks.kept == dict.fromkeys(paths, OTHER_FORWARD)
    assert marks.unreached == {f"{cls.__module__}.{name}": OTHER_FORWARD}
    kernelize_pretrained(model, mode=mode)
    report = kernel_report(model)
    assert report.kernels
    assert not paths & {row.path for row in report.kernels}
    assert f"{cls.__module__}.{name}: {OTHER_FORWARD}" in str(report.notes)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    unkernelize(model)


def test_a_forward_that_somebody_put_on_the_class_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def wrapper(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * held(self, x)

    held = modeling_llama.LlamaMLP.forward
    for other in (forward, functools.wraps(held)(wrapper)):
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", other)
        model = llama()
        expected = logits(model)
        assert digest(modeling_llama.LlamaMLP) is None
        assert {mark(model).kept[f"model.layers.{at}.mlp"] for at in (0, 1)} == {OTHER_FORWARD}
        kernelize_pretrained(model)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        unkernelize(model)


class SiLU(nn.Module):
    """Named as one of the activations that the kernels know, and another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.7 * x)


class Tripled(modeling_llama.LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def test_classes_of_somebodys_inside_the_layers_are_called() -> None:
    """An activation of a known name, and a norm that comes from the model's."""
    model = llama()
    model.model.layers[0].mlp.act_fn = SiLU()
    model.model.layers[1].post_attention_layernorm.__class__ = Tripled
    expected = logits(model)
    marks = mark(model)
    assert marks.kept == {
        "model.layers.0.mlp": "its act_fn is a SiLU with another forward than the one of that name that the kernel knows",
        "model.layers.1.post_attention_layernorm": "Tripled has a forward of its own",
    }
    kernelize_pretrained(model)
    assert "DecoderLayer" in {row.layer for row in kernel_report(model).kernels}
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    unkernelize(model)


def test_a_forward_that_comes_after_the_class_was_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    assert mark(model).layers["model.layers.0.mlp"] == "GatedMLP"
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x * 2)
    family = family_of(modeling_llama.LlamaMLP)
    assert family is not None
    assert not family[1].condition(model.model.layers[0].mlp)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of the weights; and the logits."""
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    output = model(IDS, labels=IDS)
    output.loss.backward()
    found = {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}
    return {**found, "logits": output.logits.detach()}


def assert_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Without and with gradients, where a decoder layer runs a kernel."""
    for mode in (Mode.INFERENCE, Mode.TRAINING):
        kernelize_pretrained(model, mode=mode)
        assert "DecoderLayer" in {row.layer for row in kernel_report(model).kernels}
        torch.testing.assert_close(logits(model.eval()), expected["logits"], rtol=0, atol=1e-5)
        torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-5)
    unkernelize(model)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "cls",
    [modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP, SiLUActivation, nn.Linear],
    ids=lambda cls: cls.__name__,
)
def test_in_a_decoder_layer_a_forward_that_comes_after_its_class_was_named_is_called(
    cls: Any, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark(llama())
    held = cls.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * held(self, x)

    monkeypatch.setattr(cls, "forward", functools.wraps(held)(forward) if wrapped else forward)
    assert_same(llama(), gradients(llama()))


class Halved(GemmaRMSNorm):
    """The forward of the class that it comes from, and another method that this one calls."""

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return super()._norm(x) / 2


def with_norms(cls: Any) -> LlamaForCausalLM:
    model = llama()
    for layer in model.model.layers:
        layer.input_layernorm = cls(SIZES["hidden_size"])
    return model


def test_in_a_decoder_layer_another_method_of_a_marked_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    mark(GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)))
    assert GemmaRMSNorm.kernel_layer_name == "RMSNormZeroCentered"
    assert_same(with_norms(Halved), gradients(with_norms(Halved)))
    monkeypatch.setattr(GemmaRMSNorm, "_norm", lambda self, x: x)
    assert_same(with_norms(GemmaRMSNorm), gradients(with_norms(GemmaRMSNorm)))


def test_in_a_decoder_layer_a_condition_of_somebodys_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not to be swapped is called, though this norm's forward and the kernel's give the same."""
    model, called = llama(), []
    norm = modeling_llama.LlamaRMSNorm
    replace_kernel_forward_from_hub(
        norm, "RMSNorm", lambda module: module is not model.model.layers[0].post_attention_layernorm
    )
    kernelize_pretrained(model)
    held = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: (called.append(self), held(self, x))[1])
    gradients(model)
    assert called == [model.model.layers[0].post_attention_layernorm]
    unkernelize(model)


def test_in_a_decoder_layer_the_formula_in_python_is_called() -> None:
    mark(llama())
    model, called = llama(), []
    for layer in model.model.layers:
        layer.mlp.act_fn = GELUActivation(use_gelu_python=True)
        layer.mlp.act_fn.act = lambda x: (called.append(x), x * 2)[1]
    kernelize_pretrained(model)
    logits(model)
    assert len(called) == 2
    unkernelize(model)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "mlp", "mlp.act_fn"])
def test_in_a_decoder_layer_a_kernels_forward_that_somebody_wrapped_is_called(name: str, restore: bool) -> None:
    """As a function, so that what wraps it looks like it: `functools.wraps` takes over all that it has."""
    model = llama()
    kernelize_pretrained(model, mode=Mode.TRAINING, on_error="restore" if restore else "raise")
    called = []
    for layer in model.model.layers:
        part = layer.get_submodule(name)
        held = part.forward.__func__

        def wrapper(self: Any, *args: Any, _held: Any = held) -> Any:
            called.append(self)
            return _held(self, *args)

        part.forward = MethodType(functools.wraps(held)(wrapper), part)
    gradients(model)
    assert called == [layer.get_submodule(name) for layer in model.model.layers]
    called.clear()
    logits(model.eval())
    assert called == [layer.get_submodule(name) for layer in model.model.layers]


def test_a_method_that_comes_after_the_class_was_looked_at_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(GemmaRMSNorm)
    assert before is not None
    with monkeypatch.context() as patch:
        patch.setattr(GemmaRMSNorm, "_norm", lambda self, x: x)
        assert digest(GemmaRMSNorm) is None
    assert digest(GemmaRMSNorm) == before


def test_a_fused_loss_is_for_the_forward_and_the_loss_that_were_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", lambda self, *args, **kwargs: None)
        assert losses.mark_fused_loss(model) == {"": OTHER_FORWARD}
    assert losses.mark_fused_loss(model) == {}
    monkeypatch.setitem(losses.ForCausalLMLoss.__globals__, "fixed_cross_entropy", lambda *args, **kwargs: None)
    assert losses.mark_fused_loss(model) == {"": "its loss is another than the kernel computes"}
    assert not losses.mark_loss(model)
    assert not losses._condition(model)


# Digests


def _digest(text: str) -> str:
    return digest_of(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))


ONE = "@a\ndef f(self, x, y=1):\n    return self.g(x) * y\n"


@pytest.mark.parametrize(
    "same",
    [
        "@a\ndef f(self, x: int, y: 'str' = 1) -> None:\n    'said'\n    return self.g(x) * y  # said\n",
        "@a\ndef f(self, x, y=1):\n    return (self.g(x) *\n        y)\n",
    ],
)
def test_what_is_said_of_a_function_is_no_part_of_its_digest(same: str) -> None:
    assert _digest(same) == _digest(ONE)


@pytest.mark.parametrize(
    ("old", "new"),
    [("@a\n", ""), ("@a\n", "@b\n"), ("y=1", "y=2"), ("y=1", "y"), ("x) *", "x) /"), ("self.g", "self.h")],
)
def test_what_a_function_does_is(old: str, new: str) -> None:
    assert _digest(ONE.replace(old, new)) != _digest(ONE)


def test_a_method_that_the_forward_calls_is_part_of_it() -> None:
    cls = transformers.models.gemma.modeling_gemma.GemmaRMSNorm

    class Other(cls):
        _norm = modeling_llama.LlamaRMSNorm.forward

    assert Other.forward is cls.forward
    assert digest(Other) not in (None, digest(cls))
    assert mark(nn.Sequential(Other(8))).kept == {"0": OTHER_FORWARD}


def test_without_a_source_it_cannot_be_told() -> None:
    scope: dict[str, Any] = {"__name__": "transformers.somewhere"}
    exec("def forward(self, x):\n    return x", scope)
    assert digest(type("Some", (nn.Module,), {"forward": scope["forward"]})) is None
    assert digest(None) is None
    assert digest(type("Called", (nn.Module,), {"forward": functools.partial(print)})) is None
