"""Naming the layers of transformers' models, and what the embedded kernels then compute in their place."""

from __future__ import annotations

import ast
import copy
import functools
import gc
import importlib
import inspect
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from kernelprojects import load_noarch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, activations
from transformers.models.phi3 import modeling_phi3

from kernelhub import KernelConfig
from kernelhub.errors import InvalidReference, KernelHubWarning
from kernelhub.hub.client import Hub, default_hub, set_default_hub
from kernelhub.integrations import transformers as integration
from kernelhub.integrations.families import FAMILIES, MARKED, OTHER_FORWARD, TORCH
from kernelhub.integrations.rotary import FUNCTION, OTHER_FORMULAS, PARAMETERS, aware
from kernelhub.integrations.transformers import default_mapping, kernelize_pretrained, mark
from kernelhub.layers.kernelize import kernelize, kernelized, unkernelize
from kernelhub.layers.mapping import use_kernel_mapping
from kernelhub.layers.markers import replace_kernel_forward_from_hub
from kernelhub.layers.mode import Mode
from kernelhub.layers.plan import plan_kernels
from kernelhub.layers.report import KernelReport, kernel_report
from kernelhub.layers.repositories import LayerRepository
from kernelhub.layers.swap import MARKER
from kernelhub.settings import Settings

pytestmark = pytest.mark.usefixtures("unnamed")

SOURCES = Path(transformers.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def store(kernel_store: Path) -> Iterator[None]:
    """This repository's kernels, compiled."""
    set_default_hub(Hub(settings=Settings(cache=kernel_store, offline=True)))
    yield
    set_default_hub(None)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return BertModel(config).eval()


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10))[0]


# The table


def _forwards() -> dict[str, str]:
    """Each norm class in transformers' sources -> its formula, the parameters' names taken out."""
    found = {}
    for path in SOURCES.glob("models/*/modeling_*.py"):
        text = path.read_text()
        for block in re.finditer(r"^class \w*Norm\w*\(.*?(?=^\S|\Z)", text, re.M | re.S):
            (cls,) = ast.parse(block[0]).body
            assert isinstance(cls, ast.ClassDef)
            methods = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
            if any(method.name == "forward" for method in methods):
                found[cls.name] = _formula(methods)
    return found


def _formula(methods: list[ast.FunctionDef]) -> str:
    lines = []
    for method in sorted(methods, key=lambda method: method.name):
        if method.name not in ("forward", "_norm"):
            continue
        body = [node for node in method.body if not isinstance(node, ast.Expr)]
        text = f"{method.name}: " + "; ".join(ast.unparse(node) for node in body)
        for index, argument in enumerate(method.args.args[1:]):
            text = re.sub(rf"\b{argument.arg}\b", f"_{index}", text)
        lines.append(text)
    return "\n".join(lines)


# By layer, a class for each way in which transformers writes its formula.
SPELLINGS = {
    "RMSNorm": ["LlamaRMSNorm", "Llama4TextRMSNorm"],
    "RMSNormCastLast": ["Olmo2RMSNorm", "HeliumRMSNorm", "MoshiRMSNorm", "Gemma4RMSNorm"],
    "RMSNormZeroCentered": ["GemmaRMSNorm"],
    "RMSNormWeightDtype": ["T5LayerNorm"],
    "RMSNormGated": ["Qwen3NextRMSNormGated"],
    "RMSNormGatedCastLast": ["KimiLinearRMSNormGated"],
    "RMSNormGateFirst": ["BambaRMSNormGated"],
    "LayerNormCastLast": ["CohereLayerNorm"],
}


def test_the_table_has_every_class_of_each_formula_and_no_other() -> None:
    forwards = _forwards()
    for layer, spellings in SPELLINGS.items():
        formulas = {forwards[name] for name in spellings}
        expected = {name for name, formula in forwards.items() if formula in formulas}
        named = {
            name
            for family in FAMILIES
            if family.layer == layer and family.package != TORCH
            for name in family.names.split()
        }
        assert named == expected, layer
    assert {family.layer for family in FAMILIES if re.search("Norm(?!ed)", family.layer)} == {*SPELLINGS, "LayerNorm"}


# Those of other kinds of layers: a class for each way in which transformers writes its formula.
MODULES = {
    "GatedMLP": ["LlamaMLP", "Qwen2_5_VLMLP", "IdeficsMLP"],
    "PackedGatedMLP": ["Phi3MLP"],
    "GatedFeedForward": ["T5DenseGatedActDense"],
    "DecoderLayer": ["LlamaDecoderLayer"],
    "CausalDecoder": ["GemmaModel", "LlamaModel", "MinistralModel", "MistralModel", "Qwen2Model"],
    "RotaryEmbedding": [
        "LlamaRotaryEmbedding",
        "OlmoRotaryEmbedding",
        "CohereRotaryEmbedding",
        "GptOssRotaryEmbedding",
    ],
    "RotaryEmbeddingByLayerType": ["Gemma3RotaryEmbedding", "Olmo3RotaryEmbedding", "DeepseekV4RotaryEmbedding"],
}


def test_the_table_has_every_mlp_decoder_and_rotary_embedding_of_each_formula_and_no_other() -> None:
    formulas: dict[str, set[str]] = {}
    for path in SOURCES.glob("models/*/modeling_*.py"):
        for block in re.finditer(r"^class (\w+)\(.*?(?=^\S|\Z)", path.read_text(), re.M | re.S):
            # Only those that could be one of them: parsing all of transformers takes half a minute.
            called = (
                r"self\.(down_proj|wi_1|post_attention_layernorm|rotary_emb)\(|\.cos\(\) \* \w*\.?attention_scaling"
            )
            if not re.search(called, block[0]):
                continue
            (cls,) = ast.parse(block[0]).body
            assert isinstance(cls, ast.ClassDef)
            for node in cls.body:
                if isinstance(node, ast.FunctionDef) and node.name == "forward":
                    formulas.setdefault(cls.name, set()).add(_arguments_out(node))
    for layer, spellings in MODULES.items():
        known = set().union(*(formulas[name] for name in spellings))
        expected = {name for name, found in formulas.items() if found <= known}
        assert {name for family in FAMILIES if family.layer == layer for name in family.names.split()} == expected, (
            layer
        )


def _arguments_out(forward: ast.FunctionDef) -> str:
    body = [node for node in forward.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    text = "; ".join(ast.unparse(node) for node in body)
    for index, argument in enumerate(forward.args.args[1:]):
        text = re.sub(rf"(?<!\.)\b{argument.arg}\b(?!=)", f"_{index}", text)
    return text


def _find(name: str) -> type[nn.Module]:
    for path in SOURCES.glob("models/*/modeling_*.py"):
        if f"\nclass {name}(" in path.read_text():
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            return getattr(module, name)
    raise AssertionError(f"transformers has no {name}")


@pytest.mark.parametrize("name", [name for names in SPELLINGS.values() for name in names])
def test_each_spelling_gives_the_same_bits(name: str) -> None:
    model = nn.Sequential(_find(name)(32)).eval()
    nn.init.normal_(model[0].weight)
    inputs = [torch.randn(4, 32) for _ in range(2 if "Gated" in name else 1)]
    for dtype in (torch.float32, torch.bfloat16):
        cast = [tensor.to(dtype) for tensor in inputs]
        expected = model.to(dtype)[0](*cast)
        assert mark(model).layers == {"0": next(layer for layer, names in SPELLINGS.items() if name in names)}
        with use_kernel_mapping(default_mapping(), inherit_mapping=False):
            kernelize(model, mode=Mode.INFERENCE)
        assert [row.outcome for row in kernel_report(model).rows] == ["kernel"]
        got = model[0](*cast)
        # Cohere's sums are taken in another order, and Gemma 4 writes the root as a power; in float32 both round elsewhere.
        if name in ("CohereLayerNorm", "Gemma4RMSNorm"):
            torch.testing.assert_close(got, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        else:
            assert torch.equal(got, expected)
        unkernelize(model)


ACTIVATIONS = {
    "SiLU": [activations.SiLUActivation, nn.SiLU],
    "GeLU": [activations.GELUActivation],
    "TorchGELU": [nn.GELU, lambda: nn.GELU(approximate="tanh")],
    "GeluTanh": [activations.GELUTanh],
    "NewGELU": [activations.NewGELUActivation, activations.AccurateGELUActivation],
    "FastGELU": [activations.FastGELUActivation],
    "QuickGELU": [activations.QuickGELUActivation],
    "Mish": [activations.MishActivation, nn.Mish],
    "ReLUSquared": [activations.ReLUSquaredActivation],
    "Tanh": [nn.Tanh],
}


@pytest.mark.parametrize("layer", ACTIVATIONS)
def test_each_activation_runs_its_kernel_and_agrees(layer: str) -> None:
    for make in ACTIVATIONS[layer]:
        model = nn.Sequential(make(), nn.Linear(32, 32)).eval()
        x = torch.randn(4, 32)
        expected = model(x)
        assert mark(model).layers == {"0": layer}
        with use_kernel_mapping(default_mapping(), inherit_mapping=False):
            kernelize(model, mode=Mode.INFERENCE)
        assert [row.layer for row in kernel_report(model).kernels] == [layer]
        torch.testing.assert_close(model(x), expected)


def test_the_default_mapping_has_every_layer_of_the_embedded_kernels_on_every_device() -> None:
    mapping = default_mapping()
    layers = set()
    for name in ("norm", "activation", "decoder", "rotary", "loss"):
        from kernelhub.core.refs import KernelRef

        loaded = default_hub().load(KernelRef.of(f"kernelhub/{name}", version=1), backend="cpu")
        # The first stands for two modules, the second is for those who ask for it (kernelhub.integrations.losses).
        single = set(loaded.module.layers.__all__) - {"RMSNormGatedMLP", "FusedForCausalLM"}
        layers |= single
        for layer in single:
            by_device = [value if isinstance(value, dict) else {None: value} for value in mapping[layer].values()]
            found = {str(repository) for modes in by_device for repository in modes.values()}
            assert found == {f"kernelhub/{name}@v1:{layer}"}
    assert set(mapping) == layers
    assert all(set(devices) == {"cpu", "cuda", "rocm", "xpu", "mps"} for devices in mapping.values())
    assert {family.layer for family in FAMILIES} <= layers


def test_what_inductor_computes_faster_is_left_to_it_where_the_mode_is_of_torch_compile() -> None:
    """On a GPU, which is not needed to plan."""
    model = llama()
    mark(model)
    with use_kernel_mapping(default_mapping(), inherit_mapping=False):
        for device, kept in (("cuda", {"RMSNorm", "RotaryEmbedding"}), ("cpu", set())):
            for mode in (Mode.INFERENCE, Mode.TRAINING):
                assert {row.action for row in plan_kernels(model, mode=mode, device=device).rows} == {"try"}
                rows = plan_kernels(model, mode=mode | Mode.TORCH_COMPILE, device=device).rows
                assert {row.layer_name for row in rows if row.action == "keep"} == kept
                reasons = {row.reason for row in rows if row.action == "keep"}
                assert all(re.match(r"no kernel for (RMSNorm|RotaryEmbedding) on cuda serves", one) for one in reasons)


def test_what_is_left_to_inductor_in_training_only_is_not_left_in_inference() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    model = transformers.GemmaModel(transformers.GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    mark(model)
    with use_kernel_mapping(default_mapping(), inherit_mapping=False):
        for mode, action in ((Mode.INFERENCE, "try"), (Mode.TRAINING, "keep")):
            rows = plan_kernels(model, mode=mode | Mode.TORCH_COMPILE, device="cuda").rows
            assert {row.action for row in rows if row.layer_name == "RMSNormZeroCentered"} == {action}
            rows = plan_kernels(model, mode=mode, device="cuda").rows
            assert {row.action for row in rows} == {"try"}


def reported(model: nn.Module, mode: Mode) -> KernelReport:
    """What the model reports; it is as it was again, for its loss is a function, the process's."""
    report = kernel_report(kernelize_pretrained(model, mode=mode))
    unkernelize(model)
    return report


def test_the_report_says_what_is_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Mode.INFERENCE | Mode.TORCH_COMPILE
    assert reported(llama(), compiled).notes == ()
    monkeypatch.setattr(integration, "LEFT_TO_INDUCTOR", {"cpu": {"RMSNorm": (Mode.INFERENCE, Mode.TRAINING)}})
    report = reported(llama(), compiled)
    assert {row.layer_name for row in report.rows if row.outcome == "original"} == {"RMSNorm", "RotaryAttention"}
    (said,) = report.notes
    assert said.startswith("RMSNorm keeps its forward on cpu: compiled together with what stands around it")
    assert said in str(report)
    report = reported(llama(), Mode.INFERENCE)
    assert {row.layer_name for row in report.rows if row.outcome == "original"} == {"RotaryAttention"}
    assert report.notes == ()
    assert reported(bert(), compiled).notes == (), "it has none of them"


def test_a_kernel_of_the_users_counts_for_what_is_left_to_inductor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one mode, it goes before this package's, which are for whatever nothing else serves; compiled or not."""
    theirs = LayerRepository("kernelhub/norm", layer_name="RMSNormCastLast", version=1)
    for mode in (Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE | Mode.TORCH_COMPILE):
        for left in ({}, {"cpu": {"RMSNorm": (Mode.INFERENCE, Mode.TRAINING)}}):
            monkeypatch.setattr(integration, "LEFT_TO_INDUCTOR", left)
            with use_kernel_mapping({"RMSNorm": {"cpu": {mode: theirs}}}, inherit_mapping=False):
                report = reported(llama().train(Mode.TRAINING in mode), mode)
            assert {row.layer for row in report.rows if row.layer_name == "RMSNorm"} == {"RMSNormCastLast"}
            assert report.notes == ()


# Marking


def test_marks_every_norm_and_activation_of_llama_and_bert() -> None:
    marks = mark(llama())
    assert marks.kept == {}
    assert marks.layers == {
        **{f"model.layers.{i}.{norm}": "RMSNorm" for i in (0, 1) for norm in _LLAMA_NORMS},
        "model": "CausalDecoder",
        **{f"model.layers.{i}": "DecoderLayer" for i in (0, 1)},
        **{f"model.layers.{i}.self_attn": "RotaryAttention" for i in (0, 1)},
        **{f"model.layers.{i}.self_attn.rotary_pos_emb": "rotary_pos_emb" for i in (0, 1)},
        **{f"model.layers.{i}.mlp": "GatedMLP" for i in (0, 1)},
        **{f"model.layers.{i}.mlp.act_fn": "SiLU" for i in (0, 1)},
        "model.norm": "RMSNorm",
        "model.rotary_emb": "RotaryEmbedding",
        "ForCausalLMLoss": "ForCausalLMLoss",
    }
    marks = mark(bert())
    assert marks.kept == {}
    assert marks.layers == {
        "embeddings.LayerNorm": "LayerNorm",
        **{f"encoder.layer.{i}.{norm}": "LayerNorm" for i in (0, 1) for norm in _BERT_NORMS},
        **{f"encoder.layer.{i}.intermediate.intermediate_act_fn": "GeLU" for i in (0, 1)},
        "pooler.activation": "Tanh",
    }


_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
_BERT_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")


@pytest.mark.parametrize("make", [llama, bert])
def test_kernelized_and_back(make: type) -> None:
    model = make()
    before, state = run(model), {name: value.clone() for name, value in model.state_dict().items()}
    marks = mark(model)
    dictionaries = {path: dict(module.__dict__) for path, module in model.named_modules()}
    with use_kernel_mapping(default_mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE)
    report = kernel_report(model)
    assert {row.path: row.layer_name for row in report.rows} == marks.layers
    kept = [row.path for row in report.rows if row.outcome != "kernel"]
    assert kept == [path for path, name in marks.layers.items() if name == "RotaryAttention"], "on a CPU"
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)  # torch's LayerNorm sums in another order
    unkernelize(model)
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == dictionaries
    assert torch.equal(run(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("hidden", [32, 64, 192])
def test_a_llama_in_float32_gives_the_same_logits_bit_for_bit(hidden: int) -> None:
    """With the compiled norms, activations and rotary embedding: what rounds, rounds where eager does."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = run(model)
    mark(model)
    layers = ("RMSNorm", "SiLU", "rotary_pos_emb", "RotaryEmbedding")
    with use_kernel_mapping({name: default_mapping()[name] for name in layers}, inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE)
    rows = kernel_report(model).kernels
    assert Counter(row.layer_name for row in rows) == {
        "RMSNorm": 5,
        "SiLU": 2,
        "rotary_pos_emb": 2,
        "RotaryEmbedding": 1,
    }
    assert all("stable-abi" in row.variant for row in rows), "compiled"
    assert torch.equal(run(model), before)
    unkernelize(model)


def test_marking_changes_nothing_but_the_names() -> None:
    marked, plain = bert(), bert()
    mark(marked)
    assert torch.equal(run(marked), run(plain))
    assert list(marked.state_dict()) == list(plain.state_dict())
    for (_, one), (_, other) in zip(marked.named_modules(), plain.named_modules(), strict=True):
        assert set(one.__dict__) - set(other.__dict__) <= {MARKED}
        assert type(one) is type(other)


def test_torch_layers_of_other_models_keep_their_forward() -> None:
    """Marking one model makes no layer of another one kernel-aware, although both have the same class."""
    mark(bert())
    other = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8))
    with use_kernel_mapping(default_mapping(), inherit_mapping=False), pytest.warns(UserWarning, match="no kernel"):
        kernelize(other, mode=Mode.INFERENCE)
    assert kernel_report(other).kernels == ()
    assert "forward" not in other[0].__dict__


def test_copies_of_a_marked_model_are_marked() -> None:
    model = bert()
    marks = mark(model)
    duplicate = copy.deepcopy(model)
    with use_kernel_mapping(default_mapping(), inherit_mapping=False):
        assert {row.path for row in plan_kernels(duplicate, mode=Mode.INFERENCE).tried} == set(marks.layers)


def test_marking_twice_is_marking_once() -> None:
    model = bert()
    assert mark(model) == mark(model)


def test_a_compiled_model_is_marked_inside() -> None:
    model = bert()
    assert mark(torch.compile(model)).layers == mark(model).layers


def test_a_subclass_with_a_forward_of_its_own_keeps_it() -> None:
    class Other(nn.LayerNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return -super().forward(input)

    class Renamed(nn.LayerNorm):
        """What FSDP does: a class of its own, with the forward of the layer's class."""

    model = nn.Sequential(Other(8), Renamed(8))
    marks = mark(model)
    assert marks.layers == {"1": "LayerNorm"}
    assert marks.kept == {"0": "Other has a forward of its own"}
    with use_kernel_mapping(default_mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE)
    assert [row.path for row in kernel_report(model).kernels] == ["1"]


def test_classes_of_other_packages_that_share_a_name_are_left_alone() -> None:
    class LlamaRMSNorm(nn.Module):
        weight = torch.ones(8)
        eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    quantized = torch.ao.nn.quantized.LayerNorm(8, nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8)), 1.0, 0)
    marks = mark(nn.Sequential(LlamaRMSNorm(), quantized))
    assert marks.layers == {}
    assert marks.kept == {"1": "LayerNorm has a forward of its own"}


def test_a_name_that_is_there_already_stays() -> None:
    """With a `kernels` package installed transformers names its classes itself; users may name torch's."""
    model = llama()
    norm = type(model.model.norm)
    replace_kernel_forward_from_hub(norm, "Mine")
    marks = mark(model)
    assert norm.kernel_layer_name == "Mine"
    assert marks.layers["model.norm"] == "Mine"
    assert marks.layers["model.layers.0.mlp.act_fn"] == "SiLU"


def test_a_name_that_says_another_of_our_formulas_is_corrected() -> None:
    """transformers' decorators name norms that cast last, and those that round before the gate, as the ones that do not."""
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**options, vocab_size=64, pad_token_id=0)).eval()
    model.to(torch.bfloat16)
    norm = type(model.model.norm)
    for name in ("RMSNorm", "RMSNormCastLast"):
        replace_kernel_forward_from_hub(norm, name)
        assert mark(model).layers["model.norm"] == norm.kernel_layer_name == "RMSNormCastLast"
    nn.init.normal_(model.model.norm.weight)
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    expected = model.model.norm(x)
    replace_kernel_forward_from_hub(norm, "RMSNorm")
    kernelize_pretrained(model)
    (row,) = (row for row in kernel_report(model).rows if row.path == "model.norm")
    assert (row.outcome, row.layer) == ("kernel", "RMSNormCastLast")
    assert torch.equal(model.model.norm(x), expected)
    unkernelize(model)


def test_a_name_that_says_another_formula_stays_where_the_forward_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = _find("Olmo2RMSNorm")
    replace_kernel_forward_from_hub(norm, "RMSNorm")
    monkeypatch.setattr(norm, "forward", lambda self, x: x)
    marks = mark(nn.Sequential(norm(8)))
    assert (marks.layers, marks.kept) == ({}, {"0": OTHER_FORWARD})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.SiLU(inplace=True), "inplace"),
        (lambda: nn.Mish(inplace=True), "inplace"),
        (lambda: activations.GELUActivation(use_gelu_python=True), "formula in Python"),
        (lambda: _find("CohereLayerNorm")((4, 8)), "of shape (4, 8)"),
        (lambda: _find("Gemma4RMSNorm")(8, with_scale=False), "no weight"),
        (lambda: _changed(_find("LlamaRMSNorm")(8), variance_epsilon=None), "reads a number"),
        (lambda: _changed(_find("LlamaRMSNorm")(8), weight=None), "its weight is None"),
        (lambda: _changed(_find("Qwen3NextRMSNormGated")(8), activation="relu"), "'relu'"),
        (lambda: _changed(nn.GELU(), approximate="fast"), "neither none nor tanh"),
        (lambda: _changed(_find("LlamaRotaryEmbedding")(LlamaConfig()), rope_type="longrope"), "'longrope'"),
        (lambda: _changed(_find("LlamaRotaryEmbedding")(LlamaConfig()), rope_type="my_dynamic"), "'my_dynamic'"),
        (
            lambda: _changed(_find("Gemma3RotaryEmbedding")(_gemma3()), rope_type={"full_attention": "dynamic"}),
            "'dynamic'",
        ),
    ],
)
def test_an_instance_that_a_kernel_cannot_read_keeps_its_forward(make, reason: str) -> None:
    model = nn.Sequential(make())
    marks = mark(model)
    assert marks.layers == {}
    assert reason in marks.kept["0"]
    assert reason in str(marks)
    assert MARKED not in model[0].__dict__


def _gemma3() -> transformers.Gemma3TextConfig:
    return transformers.Gemma3TextConfig(**SIZES)


def _changed(module: nn.Module, **attributes: object) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_an_instance_that_changed_after_it_was_marked_keeps_its_forward() -> None:
    """The attributes are asked for again when the model is kernelized."""
    model = llama()
    mark(model)
    model.model.norm.weight = nn.Parameter(torch.ones(1, 32))
    with use_kernel_mapping(default_mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE)
    rows = {row.path: row for row in kernel_report(model).rows}
    assert rows["model.norm"].outcome == "original"
    assert "condition" in rows["model.norm"].reason
    assert rows["model.layers.0.input_layernorm"].outcome == "kernel"


# Rotary embeddings


def _rotary_sources() -> dict[str, str]:
    """The modeling modules of transformers with such a function -> the source of it and of what it calls."""
    found = {}
    for path in sorted(SOURCES.glob("models/*/modeling_*.py")):
        text = path.read_text()
        if f"\ndef {FUNCTION}(" in text:
            blocks = re.findall(r"^def (?:apply_rotary_pos_emb|rotate_half)\(.*?(?=^\S)", text, re.M | re.S)
            found[f"transformers.models.{path.parent.name}.{path.stem}"] = "".join(sorted(blocks))
    return found


@functools.cache
def _rotary_formulas() -> dict[str, int]:
    """The modeling modules whose function the kernel could stand in for -> its formula, asked of one function of each text."""
    formulas = importlib.import_module(f"{load_noarch('rotary', 'rotary_in_a_table').__name__}.formulas")
    texts: dict[str, list[str]] = {}
    for name, text in _rotary_sources().items():
        texts.setdefault(text, []).append(name)
    found = {}
    for names in texts.values():
        one = vars(importlib.import_module(names[0]))[FUNCTION]
        function = type(one).forward if isinstance(one, nn.Module) else one
        if tuple(inspect.signature(function).parameters) == PARAMETERS:
            formula = formulas.of(type("Asked", (nn.Module,), {"forward": staticmethod(function)}))
            found.update(dict.fromkeys(names, formula))
    return found


def test_the_table_has_every_rotary_embedding_of_another_formula_and_no_other() -> None:
    found = _rotary_formulas()
    assert {name for name, formula in found.items() if formula == -1} == OTHER_FORMULAS
    assert len(found) > 160


ATTENTIONS = {
    "RotaryAttention": ["LlamaAttention"],
    "WindowedRotaryAttention": ["MistralAttention", "Qwen2Attention"],
    "NormedRotaryAttention": ["Qwen3Attention"],
}


def test_the_table_has_every_attention_of_each_formula_with_llamas_rotary_embedding_and_no_other() -> None:
    formulas: dict[str, set[str]] = {}
    llamas = {name for name, formula in _rotary_formulas().items() if formula == 0}
    turned = set()
    for path in SOURCES.glob("models/*/modeling_*.py"):
        for block in re.finditer(r"^class (\w+)\(.*?(?=^\S|\Z)", path.read_text(), re.M | re.S):
            if f" = {FUNCTION}(" not in block[0] or " self.o_proj(" not in block[0]:
                continue
            (cls,) = ast.parse(block[0]).body
            assert isinstance(cls, ast.ClassDef)
            for node in cls.body:
                if isinstance(node, ast.FunctionDef) and node.name == "forward":
                    formulas.setdefault(cls.name, set()).add(_arguments_out(node))
            if f"transformers.models.{path.parent.name}.{path.stem}" in llamas:
                turned.add(cls.name)
    for layer, spellings in ATTENTIONS.items():
        known = set().union(*(formulas[name] for name in spellings))
        expected = {name for name, found in formulas.items() if found <= known and name in turned}
        assert {name for family in FAMILIES if family.layer == layer for name in family.names.split()} == expected, (
            layer
        )


def test_an_attention_whose_window_is_its_own_has_it_as_an_attribute() -> None:
    """As the kernel reads it: else it is the configuration's."""
    windowed, normed = (
        next(set(family.names.split()) for family in FAMILIES if family.layer == layer)
        for layer in ("WindowedRotaryAttention", "NormedRotaryAttention")
    )
    own = set()
    for path in SOURCES.glob("models/*/modeling_*.py"):
        for block in re.finditer(r"^class (\w+)\(.*?(?=^\S|\Z)", path.read_text(), re.M | re.S):
            if block[1] in windowed | normed:
                assert ("sliding_window=self.sliding_window" in block[0]) == ("self.sliding_window = " in block[0])
                own |= {block[1]} if "self.sliding_window = " in block[0] else set()
    assert own - normed == {"CwmAttention", "DeepseekOcr2VisionAttention", "MinistralAttention", "Qwen2Attention"}
    assert own > normed


def phi3() -> nn.Module:
    torch.manual_seed(0)
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, pad_token_id=0)).eval()


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture
def plain_rotary() -> Iterator[None]:
    """Phi-3's function as transformers has it, and afterwards again."""
    scope = vars(modeling_phi3)
    held = scope[FUNCTION]
    scope[FUNCTION] = type(held).forward if isinstance(held, nn.Module) else held
    yield
    scope[FUNCTION] = held


@pytest.mark.usefixtures("plain_rotary")
def test_a_rotary_embedding_becomes_kernel_aware_and_computes_as_before() -> None:
    gc.collect()  # models of other tests, which would still use the loss that this one does not ask for
    before, original = run(phi3()), modeling_phi3.apply_rotary_pos_emb
    model, other = phi3(), phi3()
    assert mark(model).layers["model.layers.0.self_attn.rotary_pos_emb"] == "rotary_pos_emb"
    function = modeling_phi3.apply_rotary_pos_emb
    assert type(function).forward is original
    assert (function.__name__, function.__module__) == (FUNCTION, original.__module__)
    assert torch.equal(run(model), before)
    mark(model)
    assert modeling_phi3.apply_rotary_pos_emb is function, "once"
    with use_kernel_mapping({"rotary_pos_emb": default_mapping()["rotary_pos_emb"]}, inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE)
    assert [row.path for row in kernel_report(model).kernels] == ["model.layers.0.self_attn.rotary_pos_emb"]
    assert torch.equal(run(model), before)
    assert "forward" in vars(function)
    assert torch.equal(run(other), before), "of the same modeling module, and not kernelized"
    unkernelize(model)
    assert "forward" not in vars(function)
    assert torch.equal(run(model), before)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled), before)
    assert torch.equal(original(*_rotary_operands())[0], function(*_rotary_operands())[0]), "who has imported it before"


def _rotary_operands() -> list[torch.Tensor]:
    x, table = torch.linspace(-1, 1, 96).reshape(1, 4, 3, 8), torch.linspace(-1, 1, 24).reshape(1, 3, 8)
    return [x, -x, table, table.flip(-1)]


@pytest.mark.usefixtures("plain_rotary")
def test_copies_and_pickles_have_the_rotary_embedding_of_their_process() -> None:
    model = phi3()
    mark(model)
    function = modeling_phi3.apply_rotary_pos_emb
    assert copy.deepcopy(model).model.layers[0].self_attn._kernel_funcs == {"rotary_pos_emb": function}
    saved = pickle.dumps(model)
    vars(modeling_phi3)[FUNCTION] = type(function).forward  # as in a process that has marked nothing
    loaded = pickle.loads(saved)
    assert isinstance(modeling_phi3.apply_rotary_pos_emb, nn.Module)
    attention = loaded.model.layers[0].self_attn
    assert attention._kernel_funcs == {"rotary_pos_emb": modeling_phi3.apply_rotary_pos_emb}
    assert torch.equal(run(loaded), run(model))


def test_only_rotary_embeddings_of_transformers_are_read_from_pickles() -> None:
    for name in ("os", "transformers.models.bert.modeling_bert", "transformers.models.glm.modeling_glm"):
        with pytest.raises(InvalidReference):
            aware(name)


@pytest.mark.usefixtures("plain_rotary")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_rotary_embedding_of_somebodys_stays(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = modeling_phi3.apply_rotary_pos_emb

    def own(q, k, cos, sin, unsqueeze_dim=1):
        return held(2 * q, k, cos, sin, unsqueeze_dim)

    own = functools.wraps(held)(own) if wrapped else own
    monkeypatch.setattr(modeling_phi3, FUNCTION, own)
    before = run(phi3())
    model = kernelize_pretrained(phi3())
    (note,) = (line for line in kernel_report(model).notes if FUNCTION in line)
    assert note.endswith(f"it is a function of {__name__}, and not the one that transformers has")
    assert modeling_phi3.apply_rotary_pos_emb is own
    assert torch.allclose(run(model), before, rtol=0, atol=1e-5)
    unkernelize(model)


def test_rotary_embeddings_that_no_kernel_can_stand_in_for_are_said() -> None:
    glm = transformers.GlmForCausalLM(transformers.GlmConfig(**SIZES, head_dim=8, pad_token_id=0)).eval()
    marks = mark(glm)
    assert marks.unreached == {
        f"transformers.models.glm.modeling_glm.{FUNCTION}": "the kernel does not know its formula"
    }
    assert "does not know its formula" in str(marks)
    assert any("not reached: " in line and FUNCTION in line for line in kernel_report(glm).notes)
    (attention,) = (module for path, module in glm.named_modules() if path.endswith("self_attn"))
    assert "_kernel_funcs" not in vars(attention)
    codegen = transformers.GPTJModel(
        transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=8, vocab_size=64)
    )
    (reason,) = mark(codegen).unreached.values()
    assert reason == "it takes (tensor, sin, cos), and the kernel (q, k, cos, sin, unsqueeze_dim)"
    assert mark(bert()).unreached == {}


def test_trains_with_the_gradients_of_the_original() -> None:
    model = llama().train()
    ids = torch.arange(20).reshape(2, 10)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    mark(model)
    with use_kernel_mapping(default_mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING)
    assert len(kernel_report(model).kernels) == 16
    for name, value in gradients().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_the_report_says_which_functions_nothing_can_reach() -> None:
    model = transformers.GlmForCausalLM(transformers.GlmConfig(**SIZES, head_dim=8, pad_token_id=0)).eval()
    mark(model)
    report = kernel_report(model)
    assert any("apply_rotary_pos_emb" in line for line in report.notes)
    assert "not reached: " in str(report)
    assert KernelReport.from_dict(report.to_dict()) == report
    assert kernel_report(llama()).notes == ()


@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING], ids=str)
def test_a_compiled_decoder_layer_sees_that_its_parts_run_kernels(mode: Mode) -> None:
    """Else it would call them, and what is between two products would be no op of ours."""
    model = llama().train(mode is Mode.TRAINING)
    kernelize_pretrained(model, mode=mode | Mode.TORCH_COMPILE)
    found: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        for part in graph.modules():
            if isinstance(part, torch.fx.GraphModule):
                found.update(str(node.target) for node in part.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    try:
        with torch.set_grad_enabled(mode is Mode.TRAINING):
            torch.compile(model, backend=backend, fullgraph=True)(torch.arange(8)[None], use_cache=False)
    finally:
        unkernelize(model)
    assert not any("silu" in name for name in found)


# What is left of it


def attributes(model: nn.Module, *without: str) -> list[dict[str, object]]:
    """Of each module, in their order."""
    return [{name: value for name, value in vars(module).items() if name not in without} for module in model.modules()]


def orders(model: nn.Module) -> list[list[str]]:
    return [list(module.__dict__) for module in model.modules()]


def marked(model: nn.Module) -> int:
    return sum(bool(vars(module).keys() & {"_kernel_funcs", "_loss_function", MARKED}) for module in model.modules())


@pytest.mark.parametrize("fuse_loss", [False, True])
@pytest.mark.parametrize("make", [llama, bert])
def test_unkernelize_leaves_nothing_on_a_pretrained_model(make: Callable[[], nn.Module], fuse_loss: bool) -> None:
    model = make()
    before, order, file = attributes(model), orders(model), pickle.dumps(model)
    assert b"kernelhub" not in file
    for _ in range(2):
        kernelize_pretrained(model, fuse_loss=fuse_loss)
        kernelize_pretrained(model, fuse_loss=fuse_loss)
        assert marked(model)
        twin, other = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for one in (model, twin, other):
            assert kernel_report(one).kernels
            unkernelize(one)
            assert orders(one) == order
            assert not marked(one)
        assert attributes(model) == before
        assert pickle.dumps(model) == file


@pytest.mark.parametrize("warns", [False, True])
def test_a_call_that_fails_at_its_end_leaves_a_model_that_runs_a_kernel_itself_and_uses_functions_as_it_was(
    warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(ranks: object, step: str, same: object) -> None:
        if step == "swapping":
            raise RuntimeError("the ranks disagree")

    model = llama().train()
    kernelize_pretrained(model, exclude="model.norm") if warns else mark(model)
    before, kernels = attributes(model, MARKER), kernel_report(model).kernels
    if warns:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(KernelHubWarning):
                kernelize_pretrained(model, fuse_loss=True, exclude=nn.Module)
    else:
        monkeypatch.setattr("kernelhub.layers.kernelize.check_same", fail)
        with pytest.raises(RuntimeError, match="disagree"):
            kernelize_pretrained(model, fuse_loss=True)
    assert attributes(model, MARKER) == before
    assert kernel_report(model).kernels == kernels


def test_what_fails_or_is_refused_leaves_no_marks() -> None:
    model = llama()
    before = attributes(model)
    with pytest.raises(InvalidReference):
        kernelize_pretrained(model, fuse_loss=True, include=3)
    assert attributes(model) == before


def test_a_with_block_and_a_part_leave_the_marks_and_the_user_keeps_his_own() -> None:
    model = llama()
    kernelize_pretrained(model)
    named, rows = marked(model), len(kernel_report(model).kernels)
    with use_kernel_mapping(default_mapping()), kernelized(model, mode=Mode.INFERENCE):
        pass
    assert (marked(model), len(kernel_report(model).kernels)) == (named, rows)
    unkernelize(model, include="model.norm")
    assert (marked(model), len(kernel_report(model).kernels)) == (named, rows - 1)
    mark(model)
    unkernelize(model)
    assert marked(model) == named
    kernelize_pretrained(model)
    unkernelize(model)
    assert marked(model) == named


def test_a_pretrained_models_report_in_a_process_that_has_marked_nothing(kernel_store: Path, tmp_path: Path) -> None:
    """What the classes are marked as is not in the pickle; what runs is."""
    model = kernelize_pretrained(bert())
    expected = [(row.path, row.layer, row.outcome) for row in kernel_report(model).rows]
    assert expected
    file = tmp_path / "model"
    file.write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys\n"
        "from kernelhub import kernel_report, unkernelize\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print([(row.path, row.layer, row.outcome) for row in kernel_report(model).rows])\n"
        "print(kernel_report(unkernelize(model)).rows)\n"
    )
    environment = {**os.environ, "KERNELHUB_CACHE": str(kernel_store), "KERNELHUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, file], env=environment, capture_output=True, text=True, check=True
    )
    assert [ast.literal_eval(line) for line in run.stdout.splitlines()] == [expected, ()]


def test_programs_of_torchscript_in_a_model_are_left_alone() -> None:
    plain = llama()
    plain.model.layers[0].mlp.act_fn = torch.jit.script(nn.SiLU())
    plain.model.layers[1].mlp = torch.jit.trace(plain.model.layers[1].mlp, torch.randn(1, 2, 32))
    expected = run(plain)
    kernelize_pretrained(plain)
    paths = {row.path for row in kernel_report(plain).kernels}
    assert "model.norm" in paths
    assert not any(path.startswith("model.layers.1.mlp") for path in paths)
    torch.testing.assert_close(run(plain), expected)
    unkernelize(plain)
    program = torch.jit.script(nn.Sequential(nn.LayerNorm(4)))
    with pytest.warns(KernelHubWarning, match="runs no kernel"):
        kernelize_pretrained(program)


@pytest.mark.parametrize("what", [3, None, "name", LlamaForCausalLM])
def test_what_is_no_model_or_no_mode_is_an_error_that_says_so(what: object) -> None:
    for call in (kernelize_pretrained, mark, unkernelize, KernelConfig({}).apply):
        with pytest.raises(InvalidReference, match="expected a model"):
            call(what)
    with pytest.raises(InvalidReference, match="cannot be kernelized for mode inference"):
        kernelize_pretrained(llama(), mode="inference")


def test_paths_at_which_there_is_nothing_are_named() -> None:
    model = llama()
    with pytest.warns(KernelHubWarning) as said:
        kernelize_pretrained(model, include=iter(["model.norm", "model.layers.*.mpl", nn.Linear]), exclude="modle.norm")
    assert [str(one.message) for one in said] == [
        "include: no module is at 'model.layers.*.mpl'; there is 'model.layers.1.mlp'",
        "exclude: no module is at 'modle.norm'; there is 'model.norm'",
    ]
    assert [row.path for row in kernel_report(model).kernels] == ["model.norm"]
    with pytest.warns(KernelHubWarning, match="include: no module is at 'nothing'"):
        unkernelize(model, include=["nothing"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unkernelize(model, include="model.**", exclude=["lm_head", "model.layers.0.self_attn.rotary_pos_emb"])


def test_a_loss_that_is_not_there_to_be_fused_is_said() -> None:
    model = kernelize_pretrained(bert(), fuse_loss=True)
    assert "the loss is not fused: it has no causal language model" in kernel_report(model).notes
    model = kernelize_pretrained(llama(), fuse_loss=True)
    assert not any("not fused" in note for note in kernel_report(model).notes)
