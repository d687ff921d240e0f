"""kernelhub/loss under transformers' models: the loss function, and the projection fused with it on request."""

from __future__ import annotations

import ast
import copy
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.integrations.losses import (
    FUSED_CLASSES,
    causal_lm_loss,
    fused_loss_mapping,
    mark_fused_loss,
    mark_loss,
)
from kernelhub.integrations.transformers import default_mapping, kernelize_pretrained, mark
from kernelhub.layers.kernelize import kernelize, unkernelize
from kernelhub.layers.mapping import use_kernel_mapping
from kernelhub.layers.mode import Mode
from kernelhub.layers.report import kernel_report
from kernelhub.settings import Settings

pytestmark = pytest.mark.usefixtures("unnamed")

IDS = torch.arange(20).reshape(2, 10)
LABELS = IDS.masked_fill(IDS % 5 == 0, -100)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A store of this file's own. The kernels in PyTorch: nothing here is about how they compute."""
    cache = tmp_path_factory.mktemp("store")
    set_default_hub(Hub(settings=Settings(cache=cache, offline=True, build="never")))
    yield
    set_default_hub(None)


def llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **options})).train()


def loss_only(model: nn.Module) -> nn.Module:
    """Kernelized with nothing but the loss."""
    mark(model)
    mapping = {"ForCausalLMLoss": default_mapping()["ForCausalLMLoss"]}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        return kernelize(model, mode=Mode.TRAINING)


def fused_only(model: nn.Module, mode: Mode = Mode.TRAINING) -> nn.Module:
    assert mark_fused_loss(model) == {}
    with use_kernel_mapping(fused_loss_mapping(), inherit_mapping=False):
        return kernelize(model, mode=mode)


def step(model: nn.Module, **options: object) -> list[Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = model(IDS, **{"labels": LABELS, **options}).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


# The loss


@pytest.mark.parametrize(
    "make",
    [
        llama,
        lambda: GPT2LMHeadModel(
            GPT2Config(
                n_layer=1,
                n_head=2,
                n_embd=8,
                vocab_size=32,
                bos_token_id=0,
                eos_token_id=0,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ),
    ],
)
def test_a_kernel_computes_the_loss_and_goes_again(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = [step(model), step(model, num_items_in_batch=torch.tensor(9))]
    marks = mark(model)
    assert marks.layers["ForCausalLMLoss"] == "ForCausalLMLoss"
    dictionary, names = dict(model.__dict__), [name for name, _ in model.named_modules()]
    torch.testing.assert_close(step(model), before[0], rtol=0, atol=0)
    loss_only(model)
    rows = [row for row in kernel_report(model).rows if row.outcome == "kernel"]
    assert [(row.path, row.layer) for row in rows] == [("ForCausalLMLoss", "ForCausalLMLoss")]
    assert [name for name, _ in model.named_modules()] == names
    out = model(IDS, labels=LABELS)
    assert "ForCausalLMLoss" not in str(out.loss.grad_fn)
    assert model.loss_function.forward.__module__ != causal_lm_loss.__module__
    torch.testing.assert_close(step(model), before[0])
    torch.testing.assert_close(step(model, num_items_in_batch=torch.tensor(9)), before[1])
    unkernelize(model)
    assert "forward" not in causal_lm_loss.__dict__
    assert dict(model.__dict__) == dictionary
    torch.testing.assert_close(step(model), before[0], rtol=0, atol=0)


def test_copies_and_pickles_keep_it() -> None:
    model = loss_only(llama())
    expected = step(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.loss_function is causal_lm_loss
        assert [row.path for row in kernel_report(other).kernels] == ["ForCausalLMLoss"]
        torch.testing.assert_close(step(other), expected, rtol=0, atol=0)
        unkernelize(other)
    unkernelize(model)
    assert "forward" not in causal_lm_loss.__dict__


def test_a_loss_that_is_not_this_one_is_left_alone() -> None:
    own = llama()
    own.loss_function = ForCausalLMLoss

    class Overridden(LlamaForCausalLM):
        loss_function = property(lambda self: ForCausalLMLoss)

    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    for model in (
        own,
        Overridden(LlamaConfig(**SMALL)),
        llama().model,
        BertModel(BertConfig(**small)),
        BertForMaskedLM(BertConfig(**small)),
        T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=2, vocab_size=32)),
        nn.Linear(2, 2),
    ):
        before = dict(model.__dict__)
        assert not mark_loss(model)
        assert model.__dict__ == before


def test_marking_twice_is_marking_once() -> None:
    model = llama()
    assert mark_loss(model)
    before = dict(model.__dict__)
    assert mark_loss(model)
    assert model.__dict__ == before
    model.loss_function = ForCausalLMLoss  # the model's owner has the last word
    assert not mark_loss(model)


# The projection, too


@pytest.mark.parametrize(
    "make",
    [
        llama,
        lambda: llama(tie_word_embeddings=True),
        lambda: llama().double(),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)).train(),
    ],
)
def test_the_projection_is_fused_on_request(make: Callable[[], nn.Module]) -> None:
    model = make()
    options = [
        {},
        {"num_items_in_batch": torch.tensor(9)},
        {"shift_labels": LABELS.flip(1)},
        {"ignore_index": 3},
        {"attention_mask": torch.ones_like(IDS)},
    ]
    options[3]["labels"] = IDS
    before = [step(model, **one) for one in options]
    dictionary = dict(model.__dict__)
    fused_only(model)
    assert [(row.path, row.layer) for row in kernel_report(model).kernels] == [("", "FusedForCausalLM")]
    for one, expected in zip(options, before, strict=True):
        torch.testing.assert_close(step(model, **one), expected)
    out = model(IDS, labels=LABELS, output_hidden_states=True, use_cache=True)
    assert out.logits is None
    assert len(out.hidden_states) == 2
    assert out.past_key_values is not None
    first = model(IDS, labels=LABELS, return_dict=False)[0]
    assert torch.equal(first, out.loss)
    unkernelize(model)
    assert {**dictionary, "_kernelhub_fused_loss": True} == dict(model.__dict__)
    torch.testing.assert_close(step(model), before[0], rtol=0, atol=0)


def test_without_labels_and_in_evaluation_the_logits_are_there() -> None:
    plain, model = llama(), fused_only(llama())
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert model(IDS, labels=LABELS).logits is None
    assert model(IDS, labels=LABELS, logits_to_keep=torch.arange(10)).logits is not None
    for one in (plain, model):
        one.eval()
    ours, theirs = model(IDS, labels=LABELS), plain(IDS, labels=LABELS)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    tokens = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, plain.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0))


def test_a_head_that_is_more_than_its_weight_is_called() -> None:
    """Adapters and hooks that come after the model was kernelized."""
    model = fused_only(llama())
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output + 1)
    assert model(IDS, labels=LABELS).logits is not None
    handle.remove()
    assert model(IDS, labels=LABELS).logits is None
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module).__name__))
    assert model(IDS, labels=LABELS).logits is not None
    handle.remove()
    assert called[-2:] == ["Linear", "LlamaForCausalLM"]
    assert model(IDS, labels=LABELS).logits is None
    model.lm_head = nn.Sequential(model.lm_head)
    assert model(IDS, labels=LABELS).logits is not None


def test_a_loss_that_comes_after_the_model_was_kernelized_is_called() -> None:
    model = fused_only(llama())
    held = model.loss_function
    model.loss_function = lambda logits, **_: logits.square().mean()
    output = model(IDS, labels=LABELS)
    assert torch.equal(output.loss, output.logits.square().mean())
    model.loss_function = held
    assert model(IDS, labels=LABELS).logits is None
    vars(model).pop("_loss_function")
    assert model(IDS, labels=LABELS).logits is None, "transformers' own"


def test_frozen_models_and_frozen_heads_train_what_is_left() -> None:
    model, plain = llama(), llama()
    for one in (model, plain):
        one.lm_head.requires_grad_(False)
    fused_only(model)
    for one in (model, plain):
        one(IDS, labels=LABELS).loss.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad is None) == (name == "lm_head.weight")
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_verify_finds_that_the_logits_are_missing() -> None:
    model = llama()
    mark_fused_loss(model)
    mark(model)
    mapping = {"ForCausalLMLoss": default_mapping()["ForCausalLMLoss"], **fused_loss_mapping()}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        sample = {"input_ids": IDS, "labels": LABELS}
        kernelize(model, mode=Mode.TRAINING, sample_inputs=sample, verify=True)
    rows = {row.layer_name: row for row in kernel_report(model).rows if row.layer_name in mapping}
    assert {name: row.outcome for name, row in rows.items()} == {
        "ForCausalLMLoss": "kernel",
        "FusedForCausalLM": "original",
    }
    assert rows["ForCausalLMLoss"].max_error < 1e-6
    assert model(IDS, labels=LABELS).logits is not None
    unkernelize(model)


def test_only_models_that_asked_are_fused() -> None:
    fused_only(llama())
    other = llama()
    with use_kernel_mapping(fused_loss_mapping(), inherit_mapping=False), pytest.warns(UserWarning, match="no kernel"):
        kernelize(other, mode=Mode.TRAINING)
    assert other(IDS, labels=LABELS).logits is not None
    assert "FusedForCausalLM" not in default_mapping()


def test_in_one_call() -> None:
    model, expected = llama(), llama()
    kernelize_pretrained(model, fuse_loss=True)
    assert {"FusedForCausalLM", "ForCausalLMLoss"} <= {row.layer for row in kernel_report(model).kernels}
    out = model(IDS, labels=LABELS)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected(IDS, labels=LABELS).loss)
    unkernelize(model)
    model.lm_head = nn.Sequential(model.lm_head)
    kernelize_pretrained(model, fuse_loss=True)
    assert any("not fused: its lm_head is Sequential" in line for line in kernel_report(model).notes)
    unkernelize(model)


def _changed(**attributes: object) -> LlamaForCausalLM:
    model = llama()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


class Renamed(LlamaForCausalLM):
    """As FSDP makes one: another class with the same forward."""


class Own(LlamaForCausalLM):
    def forward(self, *args: object, **kwargs: object) -> object:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _changed(lm_head=nn.Identity()), "its lm_head is Identity"),
        (lambda: _changed(lm_head=nn.Linear(32, 65)), "65 outputs for 64 classes"),
        (lambda: _changed(loss_function=lambda **kwargs: 0), "a loss of its own"),
        (lambda: _changed(loss_type="ForMaskedLM"), "ForMaskedLM"),
        (lambda: Own(LlamaConfig(**SMALL)), "its forward is not one|forward of its own"),
    ],
)
def test_a_model_that_the_kernel_cannot_compute_is_not_named(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    if type(model) is Own:
        type(model).__name__ = "OwnForCausalLM"
    (kept,) = mark_fused_loss(model).values()
    assert re.search(reason, kept)
    assert "kernel_layer_name" not in vars(LlamaForCausalLM)


def test_classes_that_only_renamed_it_are_fused() -> None:
    Renamed.__name__ = "FSDPLlamaForCausalLM"
    model = fused_only(Renamed(LlamaConfig(**SMALL)).train())
    assert model(IDS, labels=LABELS).logits is None


def test_it_takes_less_memory() -> None:
    """The model's own loss has all logits several times, in float32."""

    def most(model: nn.Module) -> int:
        ids = torch.randint(0, 4000, (4, 256))
        model(ids, labels=ids).loss.backward()  # the gradients are there from now on
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(ids, labels=ids).loss.backward()
        now = peak = 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return peak

    logits = 4 * 256 * 4000 * 4
    own = most(llama(vocab_size=4000))
    model = fused_only(llama(vocab_size=4000))
    assert own > 3 * logits
    assert most(model) < own - 1.5 * logits


def test_the_classes_are_those_whose_forward_is_llamas() -> None:
    def formula(cls: ast.ClassDef) -> str | None:
        for node in cls.body:
            if isinstance(node, ast.FunctionDef) and node.name == "forward":
                body = [ast.unparse(line) for line in node.body if not isinstance(line, ast.Expr)]
                text = "; ".join([ast.unparse(node.args), *map(ast.unparse, node.decorator_list), *body])
                return re.sub(r": [\w.| \[\]]+(?=[,=)]| =)|\w+OutputWithPast", "", text)
        return None

    found = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for block in re.finditer(r"^class \w+ForCausalLM\(.*?(?=^\S|\Z)", path.read_text(), re.M | re.S):
            (cls,) = ast.parse(block[0]).body
            assert isinstance(cls, ast.ClassDef)
            found[cls.name] = formula(cls)
    assert {name for name, text in found.items() if text == found["LlamaForCausalLM"]} == FUSED_CLASSES
    assert all(issubclass(getattr(transformers, name), PreTrainedModel) for name in ("LlamaForCausalLM",))
