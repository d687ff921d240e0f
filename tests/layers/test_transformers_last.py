"""Prompts of which only the last token's logits are asked for: what the last layer computes, and when it computes all."""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kernelhub import Mode, kernel_report, kernelize, unkernelize, use_kernel_mapping
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.integrations.losses import fused_loss_mapping, mark_fused_loss
from kernelhub.integrations.transformers import default_mapping, kernelize_pretrained, mark
from kernelhub.settings import Settings

pytestmark = pytest.mark.usefixtures("unnamed", "nothing_compiled")

IDS = torch.arange(1, 21).reshape(2, 10)
ALL, LAST = 10, 1
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    """Functions are the process's: the next test finds none of these models' with a kernel."""
    yield
    while _models:
        unkernelize(_models.pop())


_models: list[nn.Module] = []


def causal(name: str, **options: Any) -> Any:
    """A model, each bias of it with values that count."""
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**{**SIZES, **options})
    model = getattr(hf, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: causal("Llama"),
    "llama with biases": lambda: causal("Llama", attention_bias=True, mlp_bias=True),
    "qwen2": lambda: causal("Qwen2"),
    "mistral": lambda: causal("Mistral", sliding_window=11),
    "ministral": lambda: causal("Ministral", sliding_window=32, head_dim=8),
    "arcee": lambda: causal("Arcee"),  # its MLP has no gate
    "qwen3": lambda: causal("Qwen3", head_dim=8),  # norms of q and k
    "gemma": lambda: causal("Gemma", head_dim=8),  # its second norm is none that `DecoderLayer` knows
    "phi3": lambda: causal("Phi3"),  # one projection for q, k and v
}
TAKEN = ("llama", "llama with biases", "qwen2", "mistral", "ministral", "qwen3")


def kernelized(model: Any, alone: bool = False, mode: Mode = Mode.INFERENCE, **options: Any) -> Any:
    """With all kernels, or `alone` with those two that compute the last token by itself."""
    _models.append(model)
    if not alone:
        return kernelize_pretrained(model, mode=mode, fuse_loss=True, **options)
    mark(model)
    assert mark_fused_loss(model) == {}
    mapping = {"CausalDecoder": default_mapping()["CausalDecoder"], **fused_loss_mapping()}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=mode, **options)
    assert {row.layer for row in kernel_report(model).kernels} == {"CausalDecoder", "FusedForCausalLM"}
    return model


class Rows(TorchFunctionMode):
    """How many tokens each MLP's last projection was given, in the order of its calls. No hook: hooks are a reason for all."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers = model.model.layers
        self.seen: list[list[int]] = [[] for _ in self.layers]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            for layer, seen in zip(self.layers, self.seen, strict=True):
                if args[1] is layer.mlp.down_proj.weight:
                    seen.append(args[0].shape[1])
        return function(*args, **(kwargs or {}))


def rows(model: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
    with Rows(model) as counted:
        model(*args, **kwargs)
    return counted.seen


def tensors(output: Any) -> list[Tensor]:
    """The logits, and the keys and values of each layer."""
    cache = output.past_key_values
    return [output.logits, *(kept for layer in cache.layers for kept in (layer.keys, layer.values))]


def close(found: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    """Each within twice the original's own distance from float64, and a unit of rounding."""
    assert len(found) == len(theirs) == len(exact)
    for ours, original, truth in zip(found, theirs, exact, strict=True):
        assert ours.shape == original.shape
        assert (ours.dtype, ours.device) == (original.dtype, original.device)
        unit = torch.finfo(ours.dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (original - truth).abs().max() + unit


# What is computed


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_logits_and_the_cache_are_as_exact_and_decoding_goes_on(name: str, dtype: torch.dtype, alone: bool) -> None:
    model = MODELS[name]().to(dtype)
    exact = copy.deepcopy(model).double()
    truth, theirs = (one(IDS, logits_to_keep=1) for one in (exact, model))
    before, exactly = tensors(theirs), tensors(truth)
    following = torch.tensor([[3], [4]])
    expected = [
        tensors(one(following, past_key_values=made.past_key_values)) for one, made in ((model, theirs), (exact, truth))
    ]
    kernelized(model, alone)
    output = model(IDS, logits_to_keep=1)
    assert type(output) is type(theirs)
    assert list(output) == list(theirs)
    assert type(output.past_key_values) is DynamicCache
    close(tensors(output), before, exactly)
    close(tensors(model(following, past_key_values=output.past_key_values)), *expected)
    taken = name in TAKEN
    if name != "phi3" and name != "arcee":
        assert rows(model, IDS, logits_to_keep=1) == [[ALL], [LAST if taken else ALL]]


@pytest.mark.parametrize(
    "call", ["one sequence", "embeddings", "no cache", "two tokens", "an empty cache", "a cache with a config"]
)
@torch.no_grad()
def test_calls_that_it_takes(call: str) -> None:
    model = causal("Llama")
    calls: dict[str, Callable[[Any], dict[str, Any]]] = {
        "one sequence": lambda _: {"input_ids": IDS[:1]},
        "embeddings": lambda one: {"inputs_embeds": one.model.embed_tokens(IDS)},
        "no cache": lambda _: {"input_ids": IDS, "use_cache": False},
        "two tokens": lambda _: {"input_ids": IDS[:, :2]},
        "an empty cache": lambda _: {"input_ids": IDS, "past_key_values": DynamicCache()},
        "a cache with a config": lambda one: {"input_ids": IDS, "past_key_values": DynamicCache(config=one.config)},
    }
    arguments, exact = calls[call], copy.deepcopy(model).double()
    truth, theirs = (one(**arguments(one), logits_to_keep=1) for one in (exact, model))
    kernelized(model)
    with Rows(model) as counted:
        given = arguments(model)
        output = model(**given, logits_to_keep=1)
    assert [seen[0] > 1 for seen in counted.seen] == [True, False]
    if call == "no cache":
        assert output.past_key_values is theirs.past_key_values is None
        close([output.logits], [theirs.logits], [truth.logits])
    else:
        close(tensors(output), tensors(theirs), tensors(truth))
        assert given.get("past_key_values", output.past_key_values) is output.past_key_values


@torch.no_grad()
def test_fewer_layers_than_there_are_and_one() -> None:
    for layers, seen in ((0, [[], [], []]), (1, [[LAST], [], []]), (2, [[ALL], [LAST], []])):
        model = causal("Llama", num_hidden_layers=3)
        model.config.num_hidden_layers = layers
        expected = model(IDS, logits_to_keep=1).logits
        kernelized(model)
        assert rows(model, IDS, logits_to_keep=1) == seen
        torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected)


@torch.no_grad()
def test_under_autocast() -> None:
    model, exact = causal("Llama"), causal("Llama").double()
    truth = exact(IDS, logits_to_keep=1)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(IDS, logits_to_keep=1)
        kernelized(model)
        output = model(IDS, logits_to_keep=1)
        assert rows(model, IDS, logits_to_keep=1) == [[ALL], [LAST]]
    close(tensors(output), tensors(theirs), tensors(truth))


# generate


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"attention_mask": torch.ones_like(IDS)}])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "qwen3"])
def test_generate_gives_the_same_tokens(name: str, options: dict[str, Any]) -> None:
    model = MODELS[name]()
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False, **options)
    kernelized(model)
    with Rows(model) as counted:
        found = model.generate(IDS, max_new_tokens=4, do_sample=False, **options)
    assert torch.equal(found, expected)
    taken = name in TAKEN
    assert counted.seen == [[ALL, 1, 1, 1], [LAST if taken else ALL, 1, 1, 1]]


def test_generate_with_padding_computes_all() -> None:
    model, mask = causal("Llama"), torch.ones_like(IDS)
    mask[0, :3] = 0
    expected = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    kernelized(model)
    with Rows(model) as counted:
        found = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)
    assert counted.seen[1][0] == ALL


# Calls that need all


def _padded() -> Tensor:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    return mask


def _filled(model: Any) -> DynamicCache:
    return model(IDS[:, :4], use_cache=True).past_key_values


class Own(DynamicCache):
    pass


class Layer(DynamicLayer):
    pass


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
OTHERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "hidden states": lambda _: {"output_hidden_states": True},
    "attentions": lambda _: {"output_attentions": True},
    "all logits": lambda _: {"logits_to_keep": 0},
    "two logits": lambda _: {"logits_to_keep": 2},
    "logits by a tensor": lambda _: {"logits_to_keep": torch.tensor([3, 9])},
    "a bool": lambda _: {"logits_to_keep": True},
    "labels": lambda _: {"labels": IDS, "logits_to_keep": 0},
    "labels of the last token": lambda _: {"labels": IDS[:, -1:], "shift_labels": IDS[:, -1:]},
    "padding": lambda _: {"attention_mask": _padded()},
    "a mask of pairs": lambda _: {"attention_mask": torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()},
    "packed sequences": lambda _: {"position_ids": PACKED, "use_cache": False},
    "other positions": lambda _: {"position_ids": torch.arange(3, 13).unsqueeze(0)},
    "a cache that is filled": lambda model: {"past_key_values": _filled(model)},
    "a cache of fixed size": lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=16)},
    "a cache of somebody's": lambda _: {"past_key_values": Own()},
    "a cache with a window": lambda model: {"past_key_values": DynamicCache(config=hf.MistralConfig(**SIZES, sliding_window=10))},
    "a keyword that it does not know": lambda _: {"cu_seq_lens_q": None},
    "a tuple": lambda _: {"return_dict": False},
}  # fmt: skip


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "layers"):
        return [kept for layer in value.layers for kept in (layer.keys, layer.values)]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [found for one in values for found in _flat(one)]


@pytest.mark.parametrize("call", OTHERS)
@torch.no_grad()
def test_a_call_that_needs_more_has_all(call: str) -> None:
    arguments = OTHERS[call]
    expected = causal("Llama")(IDS, **{"logits_to_keep": 1, **arguments(causal("Llama"))})
    model = kernelized(causal("Llama"), alone=True)
    given = {"logits_to_keep": 1, **arguments(model)}
    with Rows(model) as counted:
        found = model(IDS, **given)
    assert [seen[-1] for seen in counted.seen] == [ALL, ALL]
    assert type(found) is type(expected)
    for ours, theirs in zip(_flat(found), _flat(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_gradients_and_training_have_all() -> None:
    model = kernelized(causal("Llama"), mode=Mode.TRAINING)
    with Rows(model) as counted:
        output = model(IDS, logits_to_keep=1)
        output.logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        with torch.no_grad():
            model.train()(IDS, logits_to_keep=1)
            model.eval().model.layers[-1].train()(torch.randn(2, 3, 32), position_embeddings=(torch.ones(1, 3, 8),) * 2)
            model(IDS, logits_to_keep=1)
            model.train().model.eval().layers[-1].self_attn.train()
            model(IDS, logits_to_keep=1)
    assert counted.seen == [[ALL] * 4, [ALL, ALL, 3, ALL, ALL]]
    model.eval()
    with torch.no_grad():
        assert rows(model, IDS, logits_to_keep=1) == [[ALL], [LAST]]


@torch.no_grad()
def test_a_prompt_beyond_the_window_has_all() -> None:
    model = causal("Mistral", sliding_window=10)
    expected = model(IDS, logits_to_keep=1).logits
    kernelized(model)
    assert rows(model, IDS, logits_to_keep=1) == [[ALL], [ALL]]
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected)


@torch.no_grad()
def test_one_token_is_decoding_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kernelized(causal("Llama"))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(model.model.forward.__func__, "last_token", never)
    cache = model(IDS).past_key_values
    model(IDS[:, :1], past_key_values=cache, logits_to_keep=1)
    model(inputs_embeds=torch.randn(2, 1, 32), past_key_values=cache, logits_to_keep=1)
    with pytest.raises(AssertionError, match="asked"):
        model(IDS, logits_to_keep=1)


@pytest.mark.parametrize("name", ["llama", "mistral"])  # one returns the cache, the other does not
@torch.no_grad()
def test_a_cache_that_is_not_to_be_used_is_returned_where_the_class_does(name: str) -> None:
    model, call = MODELS[name](), {"use_cache": False, "logits_to_keep": 1}
    expected = model(IDS, past_key_values=DynamicCache(), **call)
    kernelized(model)
    found = model(IDS, past_key_values=DynamicCache(), **call)
    assert list(found) == list(expected)
    for ours, theirs in zip(_flat(found), _flat(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_layer_that_is_there_twice_has_all_of_its_tokens_in_the_cache() -> None:
    """transformers' own forward lets the second one attend to what the first has put there."""
    model = causal("Llama", num_hidden_layers=1)
    model.config.num_hidden_layers = 2
    model.model.layers.append(model.model.layers[0])
    expected = model(IDS, past_key_values=DynamicCache(), logits_to_keep=1)
    kernelized(model, alone=True)
    found = model(IDS, past_key_values=DynamicCache(), logits_to_keep=1)
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert rows(model, IDS, use_cache=False, logits_to_keep=1)[0] == [ALL, LAST]


@torch.no_grad()
def test_what_says_how_to_return_is_not_for_the_layers() -> None:
    model, given = kernelized(causal("Llama")), []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, __, options: given.append("return_dict" in options), with_kwargs=True
    )
    assert model.model.forward.__func__.last_token(model.model, IDS, return_dict=True) is not None
    assert given == [False]


@pytest.mark.parametrize(
    "ids", [None, [[1, 2, 3]], IDS[0], IDS[None], IDS[:, :0]], ids=["none", "lists", "1", "3", "no"]
)
@torch.no_grad()
def test_what_is_no_prompt_is_said_as_by_the_class(ids: Any) -> None:
    model = causal("Llama")
    with pytest.raises(Exception) as theirs:
        model(ids, logits_to_keep=1)
    kernelized(model, alone=True)
    with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
        model(ids, logits_to_keep=1)


class Embedded(Tensor):
    """Of somebody's own, who may have several ways of taking the last token."""


@torch.no_grad()
def test_what_it_asks_of_a_call_by_itself() -> None:
    model = kernelized(causal("Llama"))
    last_token, decoder = model.model.forward.__func__.last_token, model.model
    assert last_token(decoder, IDS).last_hidden_state.shape == (2, 1, 32)
    assert last_token(decoder, IDS[:, :1]) is None
    assert last_token(decoder) is None
    assert last_token(decoder, IDS, inputs_embeds=torch.randn(2, 10, 32)) is None
    assert last_token(decoder, inputs_embeds=torch.randn(2, 10, 32)) is not None
    assert last_token(decoder, inputs_embeds=torch.randn(2, 10, 32).as_subclass(Embedded)) is None
    for mask in (torch.ones(2, 9), torch.ones(1, 10), torch.ones(2, 10).as_subclass(Embedded), [[1] * 10] * 2):
        assert last_token(decoder, IDS, mask) is None
    for positions in (torch.arange(11)[None], torch.arange(10), torch.arange(10).expand(3, 10), [list(range(10))]):
        assert last_token(decoder, IDS, position_ids=positions) is None
    assert last_token(decoder, IDS, torch.ones(2, 10), torch.arange(10).expand(2, 10)) is not None
    wrong = torch.arange(10).expand(2, 10).clone()
    wrong[1, 5] += 1
    assert last_token(decoder, IDS, torch.ones(2, 10), wrong) is None
    assert last_token(decoder, IDS, _padded(), torch.arange(10)[None]) is None
    for part in (decoder.layers[1], decoder.layers[1].self_attn):
        part.training = True  # it alone: each has a mode of its own
        assert last_token(decoder, IDS).last_hidden_state.shape == (2, ALL, 32)
        part.training = False
    decoder.training = True
    assert last_token(decoder, IDS) is None
    decoder.training = False
    assert last_token(decoder, IDS).last_hidden_state.shape == (2, LAST, 32)


@torch.no_grad()
def test_nothing_is_read_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model, positions = kernelized(causal("Llama")), torch.arange(10).expand(2, -1)
    last_token, decoder = model.model.forward.__func__.last_token, model.model
    asked: list[bool] = []

    def of_each(mask: Tensor) -> Tensor:
        asked.append(last_token(decoder, IDS[:1], mask[None]) is None)
        return mask

    torch.vmap(of_each)(torch.ones_like(IDS))
    assert asked == [True]
    assert last_token(decoder, IDS, position_ids=positions) is not None
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert last_token(decoder, IDS, position_ids=positions) is None
        assert last_token(decoder, IDS) is not None, "which needs no reading"
    output = model.to("meta")(
        IDS.to("meta"), position_ids=positions.to("meta"), past_key_values=DynamicCache(), logits_to_keep=1
    )
    assert output.logits.shape == (2, 1, 64)


@torch.no_grad()
def test_what_it_asks_of_a_cache() -> None:
    model = kernelized(causal("Llama"))
    last_token, decoder = model.model.forward.__func__.last_token, model.model
    for name, value in (("offloading", True), ("layer_class_to_replicate", Layer)):
        cache = DynamicCache()
        setattr(cache, name, value)
        assert last_token(decoder, IDS, past_key_values=cache) is None
        assert cache.layers == []
    cache = DynamicCache()
    cache.layers.append(Layer())
    assert last_token(decoder, IDS, past_key_values=cache) is None
    cache = _filled(model)
    assert last_token(decoder, IDS, past_key_values=cache) is None
    assert cache.get_seq_length() == 4
    cache.reset()
    assert last_token(decoder, IDS, past_key_values=cache) is not None
    assert cache.get_seq_length() == 10


# Who listens


PARTS = (
    "model", "model.layers.1", "model.layers.1.input_layernorm", "model.layers.1.self_attn",
    *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"), "model.layers.1.post_attention_layernorm",
    "model.layers.1.mlp", *(f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj", "act_fn")),
    "model.norm",
)  # fmt: skip


@pytest.mark.parametrize(("before", "alone"), [(False, False), (True, True)])
@pytest.mark.parametrize("path", PARTS)
@torch.no_grad()
def test_hooks_see_all_tokens(path: str, before: bool, alone: bool) -> None:
    model = kernelized(causal("Llama"), alone)
    part, seen = model.get_submodule(path), []

    def listen(module: nn.Module, args: Any, kwargs: Any, *_: Any) -> None:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        seen.append(given.shape[1])

    register = part.register_forward_pre_hook if before else part.register_forward_hook
    handle = register(listen, with_kwargs=True)
    assert rows(model, IDS, logits_to_keep=1)[1] == [ALL]
    assert seen == [ALL]
    handle.remove()
    assert rows(model, IDS, logits_to_keep=1)[1] == [LAST]


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
@torch.no_grad()
def test_norms_of_q_and_k_are_parts_too(name: str) -> None:
    """Who listens to one, or puts another there, gets all tokens."""
    model, seen = kernelized(MODELS["qwen3"]()), []
    expected = model(IDS).logits[:, -1:]
    attention = model.model.layers[1].self_attn
    handle = attention.get_submodule(name).register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    assert rows(model, IDS, logits_to_keep=1)[1] == [ALL]
    assert seen == [ALL]
    handle.remove()
    assert rows(model, IDS, logits_to_keep=1)[1] == [LAST]
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected)
    setattr(attention, name, Mixing())
    expected = model(IDS).logits[:, -1:]
    assert rows(model, IDS, logits_to_keep=1)[1] == [ALL]
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected)


@torch.no_grad()
def test_hooks_of_all_modules_see_all_tokens_and_those_of_other_layers_are_no_reason() -> None:
    model, seen = kernelized(causal("Llama")), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(module) if module is model.model.layers[1].mlp else None
    )
    assert rows(model, IDS, logits_to_keep=1)[1] == [ALL]
    assert len(seen) == 1
    handle.remove()
    model.model.layers[0].register_forward_hook(lambda *_: seen.append("first"))
    model.lm_head.register_forward_hook(lambda _, __, output: output * 2)
    expected = 2 * causal("Llama")(IDS).logits[:, -1:]
    assert rows(model, IDS, logits_to_keep=1) == [[ALL], [LAST]]
    assert seen[1:] == ["first"]
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected)


def _forward_of_its_own(model: Any, path: str) -> None:
    part = model.get_submodule(path)
    held = part.forward
    part.forward = functools.wraps(held)(lambda *args, **kwargs: held(*args, **kwargs))


def _adapter(model: Any, path: str) -> None:
    parent, _, name = path.rpartition(".")
    held = model.get_submodule(path)

    class Adapter(nn.Linear):
        pass

    other = Adapter(held.in_features, held.out_features, bias=False)
    other.load_state_dict(held.state_dict())
    setattr(model.get_submodule(parent), name, other)


CHANGES: dict[str, Callable[[Any], None]] = {
    **{f"the forward of {path}": functools.partial(_forward_of_its_own, path=path) for path in PARTS},
    **{f"{path}": functools.partial(_adapter, path=path) for path in PARTS if path.endswith("_proj")},
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_parts_that_somebody_put_there_are_given_all_tokens(change: str) -> None:
    model = kernelized(causal("Llama"))
    expected = model(IDS).logits[:, -1:]
    CHANGES[change](model)
    assert rows(model, IDS, logits_to_keep=1)[1] == [ALL]
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected)


class Quantised(Tensor):
    """A weight whose products round the input to steps of what is the largest of all tokens."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            step = args[0].abs().max() / 7
            return nn.functional.linear((args[0] / step).round() * step, args[1].as_subclass(Tensor))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("path", [path for path in PARTS if path.endswith("_proj")])
@torch.no_grad()
def test_a_weight_that_is_no_plain_tensor_is_given_all_tokens(path: str) -> None:
    model = kernelized(causal("Llama"))
    part = model.get_submodule(path)
    part.weight = nn.Parameter(part.weight.as_subclass(Quantised), requires_grad=False)
    expected = model(IDS).logits[:, -1:]
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected)


class Mixing(nn.Module):
    """A norm over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize("path", [path for path in PARTS if path.endswith("norm")])
@torch.no_grad()
def test_a_norm_of_somebodys_is_given_all_tokens(path: str) -> None:
    model, parent = causal("Llama"), path.rpartition(".")[0]
    setattr(model.get_submodule(parent), path.rpartition(".")[2], Mixing())
    expected = model(IDS).logits[:, -1:]
    kernelized(model, alone=True)
    assert rows(model, IDS, logits_to_keep=1)[1] == [ALL]
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected)


@torch.no_grad()
def test_an_attention_of_somebodys_is_given_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = kernelized(causal("Llama")), []

    def own(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", own)
    model(IDS, logits_to_keep=1)
    assert seen == [ALL, ALL]


@torch.no_grad()
def test_a_rotary_embedding_of_somebodys_is_given_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = causal("Llama"), []
    scope = sys.modules[type(model).__module__]
    held = scope.apply_rotary_pos_emb

    def own(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(q.shape[:3])
        return held(q, *args, **kwargs)

    kernelized(model, alone=True)
    monkeypatch.setattr(scope, "apply_rotary_pos_emb", own)
    model(IDS, logits_to_keep=1)
    assert seen == [(2, 4, ALL)] * 2


@torch.no_grad()
def test_a_decoder_that_is_compiled_by_itself_is_called() -> None:
    model, graphs = kernelized(causal("Llama"), alone=True), []
    expected = model(IDS).logits[:, -1:]

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.model.compile(backend=backend)
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected)
    assert graphs
    torch._dynamo.reset()


@torch.no_grad()
def test_a_forward_of_another_decoder_is_called_as_it_is() -> None:
    model, other = kernelized(causal("Llama")), kernelized(causal("Llama", initializer_range=0.2))
    expected = other(IDS, logits_to_keep=1).logits
    model.model.forward, model.lm_head = other.model.forward, other.lm_head
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, expected)


@torch.no_grad()
def test_a_kernel_that_is_watched_for_errors_computes_all() -> None:
    model = kernelized(causal("Llama"), alone=True, on_error="restore")
    assert rows(model, IDS, logits_to_keep=1) == [[ALL], [ALL]]


@torch.no_grad()
def test_without_the_decoders_kernel_all_is_computed() -> None:
    model = causal("Llama")
    expected = model(IDS, logits_to_keep=1)
    mark_fused_loss(model)
    with use_kernel_mapping(fused_loss_mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE)
    assert rows(model, IDS, logits_to_keep=1) == [[ALL], [ALL]]
    assert torch.equal(model(IDS, logits_to_keep=1).logits, expected.logits)


# Compiled, proven, undone


class Graphs:
    """A backend of torch.compile's that keeps how many tokens each linear layer of its graphs was given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        linear = [node for node in graph.graph.nodes if node.op == "call_function" and "linear" in str(node.target)]
        self.tokens = [node.args[0].meta["example_value"].shape[1] for node in linear]
        return graph.forward


@pytest.mark.parametrize(("name", "alone"), [("llama", False), ("llama", True), ("mistral", False), ("qwen3", True)])
@torch.no_grad()
def test_compiled(name: str, alone: bool) -> None:
    model = MODELS[name]()
    expected = model(IDS, logits_to_keep=1)
    kernelized(model, alone, Mode.INFERENCE | Mode.TORCH_COMPILE)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for options in ({}, {"use_cache": False}):
        found = compiled(IDS, logits_to_keep=1, **options)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        if not options:
            for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        taken = name in TAKEN
        assert graphs.tokens.count(LAST) == (8 if taken else 1)  # the layer's seven, and `lm_head`
        assert graphs.tokens.count(ALL) == (9 if taken else 14)  # k and v of the last
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_a_mask_and_positions_are_not_read() -> None:
    model = causal("Llama")
    calls = [{"attention_mask": torch.ones_like(IDS)}, {"attention_mask": _padded()}, {"position_ids": PACKED}]
    expected = [model(IDS, use_cache=False, logits_to_keep=1, **call).logits for call in calls]
    kernelized(model, True, Mode.INFERENCE | Mode.TORCH_COMPILE)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for call, logits in zip(calls, expected, strict=True):
        found = compiled(IDS, use_cache=False, logits_to_keep=1, **call)
        torch.testing.assert_close(found.logits, logits, rtol=0, atol=1e-5)
        assert graphs.tokens.count(LAST) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exported_it_is_right_for_other_lengths(strict: bool) -> None:
    model = causal("Llama", num_key_value_heads=4)
    lengths = (IDS, IDS[:, :3], torch.arange(1, 41).reshape(2, 20))
    expected = [model(ids, logits_to_keep=1).logits for ids in lengths]
    kernelized(model, alone=True)
    length = torch.export.Dim("length", min=2, max=40)
    options = {"use_cache": False, "logits_to_keep": 1}
    shapes = {"input_ids": {1: length}, **dict.fromkeys(options)}
    program = torch.export.export(model, (IDS,), options, dynamic_shapes=shapes, strict=strict)
    for ids, logits in zip(lengths, expected, strict=True):
        torch.testing.assert_close(program.module()(ids, **options).logits, logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_it_is_proven_like_any_other() -> None:
    model = causal("Llama")
    mark(model)
    mark_fused_loss(model)
    mapping = {"CausalDecoder": default_mapping()["CausalDecoder"], **fused_loss_mapping()}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        sample = {"input_ids": IDS, "logits_to_keep": 1}
        kernelize(model, mode=Mode.INFERENCE, sample_inputs=sample, verify=True)
    assert {row.layer for row in kernel_report(model).kernels} == {"CausalDecoder", "FusedForCausalLM"}
    assert all(row.max_error < 1e-5 for row in kernel_report(model).kernels)
    assert rows(model, IDS, logits_to_keep=1) == [[ALL], [LAST]]


@torch.no_grad()
def test_undone_the_model_is_as_it_was() -> None:
    model = causal("Llama")
    expected = model(IDS, logits_to_keep=1)
    kernelized(model)
    assert rows(model, IDS, logits_to_keep=1) == [[ALL], [LAST]]
    unkernelize(model)
    assert rows(model, IDS, logits_to_keep=1) == [[ALL], [ALL]]
    for ours, theirs in zip(tensors(model(IDS, logits_to_keep=1)), tensors(expected), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_copies_and_pickles_have_it(tmp_path: Path) -> None:
    model = kernelized(causal("Llama"))
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert rows(other, IDS, logits_to_keep=1) == [[ALL], [LAST]]


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_on_a_gpu(dtype: torch.dtype, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled kernels: their ops take the many rows, and the few of the last token."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "max_position_embeddings": 1024}
    model = causal("Llama", **sizes, initializer_range=0.05).to("cuda", dtype)
    exact = copy.deepcopy(model).double()
    ids = torch.randint(1, 64, (2, 700), device="cuda")
    truth, theirs = exact(ids, logits_to_keep=1), model(ids, logits_to_keep=1)
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    cache = request.config.cache.mkdir("kernels")
    set_default_hub(Hub(settings=Settings(cache=cache, offline=True, build="always")))  # as other tests of the process
    kernelized(model)
    forward, seen = model.model.forward.__func__, []
    held = forward.last_token

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = held(*args, **kwargs)
        seen.append(None if found is None else found.last_hidden_state.shape)
        return found

    monkeypatch.setattr(forward, "last_token", counted)
    output = model(ids, logits_to_keep=1)
    close(tensors(output), tensors(theirs), tensors(truth))
    assert output.past_key_values.get_seq_length(1) == 700
    found = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert seen == [(2, 1, 512)] * 2
    if dtype is torch.float32:
        assert torch.equal(found, tokens)
