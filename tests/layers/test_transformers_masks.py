"""Decoders that give their layers no mask where a call needs none, and the class's own forward everywhere else."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AttentionMaskInterface, DynamicCache, masking_utils
from transformers.masking_utils import sdpa_mask

from kernelhub import Mode, kernel_report, kernelize, unkernelize, use_kernel_mapping
from kernelhub.integrations.transformers import default_mapping, mark
from kernelhub.layers import replay
from kernelhub.layers.state import snapshot

pytestmark = pytest.mark.usefixtures("unnamed", "nothing_compiled")

LAYER = "CausalDecoder"
ASKED = "_preprocess_mask_arguments"
IDS = torch.arange(1, 21).reshape(2, 10)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def causal(name: str, **options: Any) -> Callable[[], Any]:
    config = getattr(hf, f"{name}Config")
    return lambda: getattr(hf, f"{name}ForCausalLM")(config(**{**SIZES, **options}))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": causal("Llama"),
    "gemma": causal("Gemma", head_dim=8),
    "mistral": causal("Mistral"),
    "mistral without a window": causal("Mistral", sliding_window=None),
    "ministral": causal("Ministral", sliding_window=32, head_dim=8),
    "qwen2": causal("Qwen2"),
    "qwen3": causal("Qwen3", head_dim=8),
    "phi3": causal("Phi3"),
    "cohere": causal("Cohere"),
}


def made(name: str = "llama") -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def without_masks(model: nn.Module, mode: Mode = Mode.INFERENCE, **options: Any) -> Any:
    """The model with this kernel alone."""
    mark(model)
    with use_kernel_mapping({LAYER: default_mapping()[LAYER]}, inherit_mapping=False):
        kernelize(model, mode=mode, **options)
    assert [row.layer for row in kernel_report(model).kernels] == [LAYER]
    return model


class Asked:
    """How often a model's code asked for a mask: by what transformers' functions for that call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        monkeypatch.setattr(masking_utils, ASKED, self._counted(getattr(masking_utils, ASKED)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.times += 1
            return function(*args, **kwargs)

        return counted


def same(found: Any, expected: Any) -> None:
    """The same outputs, bit for bit: tensors, tuples of them, and caches."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, DynamicCache):
        assert type(found) is type(expected)
        assert len(found.layers) == len(expected.layers)
        for ours, theirs in zip(found.layers, expected.layers, strict=True):
            assert type(ours) is type(theirs)
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
    elif isinstance(expected, dict):
        assert type(found) is type(expected)
        assert list(found) == list(expected)
        for name in expected:
            same(found[name], expected[name])
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            same(ours, theirs)
    else:
        assert found == expected


# Calls that need no mask

PLAIN: dict[str, dict[str, Any]] = {
    "ids": {"input_ids": IDS},
    "no cache": {"input_ids": IDS, "use_cache": False},
    "a cache": {"input_ids": IDS, "use_cache": True},
    "one token": {"input_ids": IDS[:, :1]},
    "said to return nothing else": {
        "input_ids": IDS, "output_attentions": None, "output_hidden_states": False, "return_dict": True,
    },
    "labels": {"input_ids": IDS, "labels": IDS, "num_items_in_batch": 18},
    "a tuple of the whole model": {"input_ids": IDS, "return_dict": False},
}  # fmt: skip


@pytest.mark.parametrize("call", PLAIN)
@pytest.mark.parametrize("name", MODELS)
def test_no_mask_is_made_and_the_bits_are_the_same(name: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if call != "ids" and name not in ("llama", "qwen3"):
        pytest.skip("the same code for every class")
    model = made(name)
    with torch.no_grad():
        expected = model(**PLAIN[call])
        asked = Asked(monkeypatch)
        same(without_masks(model)(**PLAIN[call]), expected)
        assert asked.times == 0
        unkernelize(model)
        same(model(**PLAIN[call]), expected)
        assert asked.times > 0


def test_embeddings_in_place_of_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    model, embedded = made(), torch.randn(2, 7, 32)
    with torch.no_grad():
        expected = model(inputs_embeds=embedded)
        asked = Asked(monkeypatch)
        same(without_masks(model)(inputs_embeds=embedded), expected)
    assert asked.times == 0


def test_the_decoder_alone_and_fewer_layers_than_there_are() -> None:
    model = made().model
    model.config.num_hidden_layers = 1
    with torch.no_grad():
        expected = model(IDS)
        same(without_masks(model)(IDS), expected)
    (row,) = kernel_report(model).kernels
    assert (row.path, row.layer, row.repository) == ("", LAYER, "kernelhub/decoder")


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_training_gives_the_same_gradients(checkpointing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    options = {"use_cache": False} if checkpointing else {}

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(IDS, labels=IDS, **options).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    asked = Asked(monkeypatch)
    without_masks(model, Mode.TRAINING)
    same(gradients(), expected)
    assert asked.times == 0


# Calls that need one, or more than a last hidden state


def _ones(padding: int = 0) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    mask[0, :padding] = 0
    return mask


def _cache(model: Any) -> DynamicCache:
    return model(IDS[:, :4], use_cache=True).past_key_values


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]).expand(2, -1)
OTHERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "a mask": lambda _: {"attention_mask": _ones()},
    "padding": lambda _: {"attention_mask": _ones(3)},
    "packed sequences": lambda _: {"position_ids": PACKED, "use_cache": False},
    "positions": lambda _: {"position_ids": torch.arange(10).unsqueeze(0)},
    "a cache that is filled": lambda model: {"past_key_values": _cache(model)},
    "an empty cache": lambda _: {"past_key_values": DynamicCache()},
    "hidden states": lambda _: {"output_hidden_states": True},
    "attentions": lambda _: {"output_attentions": True},
    "a keyword that it does not know": lambda _: {"cu_seq_lens_q": None},
    "attention to both sides": lambda _: {"is_causal": False},
}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("call", OTHERS)
def test_the_forward_of_the_class_runs_where_a_condition_does_not_hold(
    call: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, arguments = made(name), OTHERS[call]
    with torch.no_grad():
        expected = model(IDS, **arguments(model))
        model = without_masks(made(name))  # one without the hooks of the first
        prepared = arguments(model)
        asked = Asked(monkeypatch)
        same(model(IDS, **prepared), expected)
    assert asked.times == 1


def _set(**values: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, value in values.items():
            setattr(model.config, name, value)

    return change


CONFIGS: dict[str, Callable[[Any], None]] = {
    "another attention": lambda model: model.set_attn_implementation("eager"),
    "hidden states": _set(output_hidden_states=True),
    "attention to both sides": _set(is_causal=False),
    "a tuple": _set(return_dict=False),
    "a window": _set(sliding_window=10),
    "layers of another kind": _set(layer_types=["full_attention", "chunked_attention"]),
}


@pytest.mark.parametrize("change", CONFIGS)
def test_and_where_the_config_says_otherwise(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    CONFIGS[change](model)
    with torch.no_grad():
        expected = model.model(IDS, use_cache=False)
        model = without_masks(made())
        CONFIGS[change](model)  # after it was kernelized
        asked = Asked(monkeypatch)
        same(model.model(IDS, use_cache=False), expected)
    assert asked.times == 1


def test_tokens_beyond_the_window_get_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    for window, masks in ((11, 0), (10, 1), (4, 1)):
        torch.manual_seed(0)
        model = causal("Mistral", sliding_window=window)().eval()
        with torch.no_grad():
            expected = model(IDS).logits
            with monkeypatch.context() as patch:
                asked = Asked(patch)
                assert torch.equal(without_masks(model)(IDS).logits, expected)
        assert asked.times == masks


@pytest.mark.parametrize("name", ["Mistral", "Phi3", "Qwen2"])
def test_a_window_counts_whatever_kinds_the_layers_are_said_to_be(name: str) -> None:
    """Mistral's and Phi-3's forwards give every layer the window's mask and never look at `layer_types`."""
    torch.manual_seed(0)
    model = causal(name, sliding_window=4, layer_types=["full_attention"] * 2)().eval()
    with torch.no_grad():
        expected = model(IDS)
        same(without_masks(model)(IDS), expected)


def test_a_mask_of_somebodys_own_for_this_attention_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_masks(made())
    seen = []

    def own(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["q_length"])
        return sdpa_mask(*args, **kwargs)

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", own)
    model(IDS)
    assert seen == [10]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_function_for_masks_of_somebodys_in_the_modeling_module_is_called(
    name: str, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scope = made(name), sys.modules[type(made(name)).__module__]
    called = "create_causal_mask" if name == "llama" else "create_sliding_window_causal_mask"
    held = getattr(scope, called)

    def own(*_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros(2, 1, 10, 10)  # each token attends to all

    with torch.no_grad():
        before = model(IDS).logits
        monkeypatch.setattr(scope, called, functools.wraps(held)(own) if wrapped else own)
        expected = model(IDS).logits
        assert not torch.allclose(expected, before, rtol=0, atol=1e-3)
        assert torch.equal(without_masks(model)(IDS).logits, expected)


def test_a_cache_of_somebodys_in_the_modeling_module_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(DynamicCache):
        pass

    model = without_masks(made())
    monkeypatch.setattr(sys.modules[type(model).__module__], "DynamicCache", Own)
    assert type(model(IDS).past_key_values) is Own


def test_hooks_that_record_outputs_stay_with_the_forward_that_sets_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_masks(made())
    with torch.no_grad():
        expected = made()(IDS).logits
        assert len(model(IDS, output_hidden_states=True).hidden_states) == 3
        asked = Asked(monkeypatch)
        assert torch.equal(model(IDS).logits, expected)
    assert asked.times == 1


def test_wrong_arguments_raise_what_they_raise_without_it() -> None:
    model = without_masks(made()).model
    for arguments in ({}, {"input_ids": IDS, "inputs_embeds": torch.randn(2, 10, 32)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**arguments)


def test_checkpointing_with_a_cache_asked_for_is_left_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_masks(made().train(), Mode.TRAINING)
    model.gradient_checkpointing_enable()
    asked = Asked(monkeypatch)
    assert model(IDS, use_cache=True).past_key_values is None
    assert asked.times == 1


# Compiled and exported


class Graphs:
    """A backend of torch.compile's that keeps its graphs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def attention(self) -> list[tuple[bool, bool]]:
        """Of each attention: whether it gets a mask, and whether it is causal by itself."""
        calls = [node for node in self.graphs[-1].graph.nodes if "scaled_dot_product" in str(node.target)]
        return [(call.kwargs.get("attn_mask") is not None, bool(call.kwargs.get("is_causal"))) for call in calls]


@pytest.mark.parametrize(("name", "training"), [("llama", True), ("mistral", False)])
def test_compiled_there_is_no_mask_nor_a_graph_for_each_length(name: str, training: bool) -> None:
    model = made(name).train(training)
    lengths = [torch.arange(1, 2 * length + 1).reshape(2, length) for length in (10, 12)]
    found = {}
    with torch.set_grad_enabled(training):
        expected = [model(ids, use_cache=False).logits for ids in lengths]
        for kind in ("plain", "ours"):
            if kind == "ours":
                without_masks(model, (Mode.TRAINING if training else Mode.INFERENCE) | Mode.TORCH_COMPILE)
            torch._dynamo.reset()
            found[kind] = Graphs()
            compiled = torch.compile(model, backend=found[kind], fullgraph=True)
            for ids, logits in zip(lengths, expected, strict=True):
                torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits, rtol=0, atol=1e-5)
    torch._dynamo.reset()
    assert found["plain"].attention() == [(True, False)] * 2, "what there is to gain"
    assert found["ours"].attention() == [(False, True)] * 2
    assert len(found["ours"].graphs) <= len(found["plain"].graphs)


def test_compiled_padding_and_packed_sequences_keep_their_mask() -> None:
    calls = [{"attention_mask": _ones(3)}, {"position_ids": PACKED}, {}]
    model = made()
    with torch.no_grad():
        expected = [model(IDS, use_cache=False, **call).logits for call in calls]
        without_masks(model, Mode.INFERENCE | Mode.TORCH_COMPILE)
        graphs = Graphs()
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
        for call, logits, masked in zip(calls, expected, (True, True, False), strict=True):
            torch.testing.assert_close(compiled(IDS, use_cache=False, **call).logits, logits, rtol=0, atol=1e-5)
            assert {mask for mask, _ in graphs.attention()} == {masked}
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_right_for_other_lengths(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not strictly, torch 2.11 refuses to export heads that transformers repeats (`repeat_kv`) for other lengths.
    monkeypatch.setitem(SIZES, "num_key_value_heads", SIZES["num_attention_heads"])
    model = without_masks(made())
    asked = Asked(monkeypatch)
    length = torch.export.Dim("length", min=2, max=40)
    with torch.no_grad():
        program = torch.export.export(
            model,
            (IDS,),
            {"use_cache": False},
            dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
            strict=strict,
        )
        assert strict or asked.times == 1, "left to transformers where it can be told from compiling"
        for ids in (IDS, IDS[:, :3], torch.arange(1, 41).reshape(2, 20)):
            found = program.module()(ids, use_cache=False).logits
            torch.testing.assert_close(found, made()(ids, use_cache=False).logits, rtol=0, atol=1e-5)


# What every layer kernel has


def test_it_is_proven_like_any_other() -> None:
    model = made()
    mark(model)
    with use_kernel_mapping({LAYER: default_mapping()[LAYER]}, inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING, sample_inputs={"input_ids": IDS}, verify=True)
    (row,) = kernel_report(model).kernels
    assert (row.layer, row.reference, row.calls) == (LAYER, "float64", 1)
    assert row.max_relative_error < 1e-5
    unkernelize(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_proof_of_it_takes_no_second_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that only its children read, few are copied, and few gradients kept; below, they are as of any layer."""
    monkeypatch.setattr(replay, "_MOST_OF_CHILDREN", 1000)
    model = made()
    mark(model)
    taken = snapshot(model.model)
    assert set(taken.tensors) == {name for name, _ in model.model.named_buffers()}
    assert set(taken.counted) == {name for name, _ in model.model.named_parameters()}
    compared = [name for name, _ in replay._compared(model.model)]
    assert compared == [f"layers.{at}.{norm}.weight" for at in (0, 1) for norm in NORMS] + ["norm.weight"]
    layer = model.model.layers[0]
    assert len(replay._compared(layer)) == len(list(layer.parameters()))
    assert set(snapshot(layer).tensors) == {name for name, _ in layer.named_parameters()}
    with use_kernel_mapping({LAYER: default_mapping()[LAYER]}, inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING, sample_inputs={"input_ids": IDS}, verify=True, refresh=True)
    (row,) = kernel_report(model).kernels
    assert (row.reference, row.max_error) == ("original", 0.0)


NORMS = ("input_layernorm", "post_attention_layernorm")


def test_hooks_and_adapters_of_its_children_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel calls them as modules, so there is nothing that it would leave out."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made(), peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.base_model.model.model.layers[0].register_forward_hook(lambda _, __, output: output * 2)
    with torch.no_grad():
        expected = model(IDS).logits
        asked = Asked(monkeypatch)
        assert torch.equal(without_masks(model)(IDS).logits, expected)
        assert asked.times == 0
        model.base_model.model.model.norm.register_forward_pre_hook(lambda _, arguments: (arguments[0] + 1,))
        found = model(IDS).logits
        assert torch.equal(found, unkernelize(model)(IDS).logits)
        assert not torch.equal(found, expected)


def test_a_kernelized_decoder_takes_prompts_of_an_adapter() -> None:
    """They come as embeddings, with a mask, or as a cache."""
    peft = pytest.importorskip("peft")
    for config in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        torch.manual_seed(0)
        settings = config(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(made(), settings).eval()
        with torch.no_grad():
            expected = model(IDS).logits
            without_masks(model.get_base_model())
            torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-6)


def test_copies_and_pickles_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_masks(made())
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    asked = Asked(monkeypatch)
    with torch.no_grad():
        same(loaded(IDS), model(IDS))
    assert asked.times == 0
