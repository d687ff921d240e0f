"""Ten families of transformers models, each from its config with random weights: the same results, and what was swapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import nn

from kernelhub import (
    KernelConfig,
    LayerContractError,
    Mode,
    kernel_report,
    kernelize,
    unkernelize,
    use_kernel_mapping,
)
from kernelhub.integrations.transformers import default_mapping, kernelize_pretrained, mark

pytestmark = pytest.mark.usefixtures("nothing_compiled")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
IDS = torch.arange(1, 21).reshape(2, 10)


class Family(NamedTuple):
    """A model, its inputs, and how many of its layers run which kernel; `keeps` are the layers without a kernel."""

    model: Callable[[], nn.Module]
    inputs: dict[str, torch.Tensor]
    kernels: dict[str, int]
    keeps: dict[str, int] = {}  # noqa: RUF012 - an empty dict that nobody writes to
    generates: bool = True


def causal(name: str, **options: Any) -> Callable[[], nn.Module]:
    config = getattr(hf, f"{name}Config")
    return lambda: getattr(hf, f"{name}ForCausalLM")(config(**{**DECODER, **options}))


TEXT = {"input_ids": IDS}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
SPEECH = {"input_features": torch.linspace(-1, 1, 2 * 8 * 40).reshape(2, 8, 40), "decoder_input_ids": IDS}

FAMILIES = {
    "llama": Family(causal("Llama"), TEXT, {"RMSNorm": 5, "SiLU": 2, "GatedMLP": 2, "DecoderLayer": 2, "rotary_pos_emb": 2, "RotaryEmbedding": 1, "CausalDecoder": 1}, keeps={"RotaryAttention": 2}),
    "qwen3": Family(causal("Qwen3", head_dim=8), TEXT, {"RMSNorm": 9, "SiLU": 2, "GatedMLP": 2, "DecoderLayer": 2, "rotary_pos_emb": 2, "RotaryEmbedding": 1, "CausalDecoder": 1}, keeps={"NormedRotaryAttention": 2}),
    "gemma": Family(causal("Gemma", head_dim=8), TEXT, {"RMSNormZeroCentered": 5, "GeluTanh": 2, "GatedMLP": 2, "rotary_pos_emb": 2, "RotaryEmbedding": 1, "CausalDecoder": 1}, keeps={"RotaryAttention": 2}),
    "mistral": Family(causal("Mistral"), TEXT, {"RMSNorm": 5, "SiLU": 2, "GatedMLP": 2, "DecoderLayer": 2, "rotary_pos_emb": 2, "RotaryEmbedding": 1, "CausalDecoder": 1}, keeps={"WindowedRotaryAttention": 2}),
    "phi3": Family(causal("Phi3"), TEXT, {"RMSNorm": 5, "SiLU": 2, "PackedGatedMLP": 2, "rotary_pos_emb": 2, "RotaryEmbedding": 1, "CausalDecoder": 1}),
    "gpt-neox": Family(causal("GPTNeoX"), TEXT, {"LayerNorm": 5, "GeLU": 2, "rotary_pos_emb": 2, "RotaryEmbedding": 1}),
    "bert": Family(
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), TEXT, {"LayerNorm": 6, "GeLU": 3}, generates=False
    ),
    "vit": Family(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**{**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 3})
        ),
        PIXELS,
        {"LayerNorm": 5, "GeLU": 2},
        generates=False,
    ),
    "t5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4,
                feed_forward_proj="gated-gelu", decoder_start_token_id=0,
            )
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS},
        {"RMSNormWeightDtype": 12, "NewGELU": 4, "GatedFeedForward": 4},
    ),
    "whisper": Family(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                vocab_size=64, d_model=32, num_mel_bins=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
                max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                suppress_tokens=None, begin_suppress_tokens=None,
            )
        ),
        SPEECH,
        {"LayerNorm": 12, "GeLU": 4},
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def model(family: Family, unnamed: None) -> Iterator[nn.Module]:
    """The family's model with random weights, norms' too, which otherwise multiply by one."""
    torch.manual_seed(0)
    model = family.model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    yield model
    unkernelize(model)  # functions are the process's, too: the next model finds the originals


def logits(model: nn.Module, family: Family, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**family.inputs, **options).logits


def step(model: nn.Module, family: Family) -> dict[str, torch.Tensor]:
    """The gradients of one training step on a loss that every output matters to. Dropout draws the same for both."""
    torch.manual_seed(1)
    model.zero_grad()
    output = model(**family.inputs).logits
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def counts(model: nn.Module) -> dict[str, int]:
    """How many layers run which kernel. The loss is a function beside the layers, with tests of its own."""
    names = (row.layer_name for row in kernel_report(model).kernels)
    return dict(Counter(name for name in names if name != "ForCausalLMLoss"))


def test_inference_gives_the_same_and_every_norm_activation_and_gated_mlp_is_swapped(
    family: Family, model: nn.Module
) -> None:
    expected = logits(model, family)
    assert kernelize_pretrained(model) is model
    assert counts(model) == family.kernels
    report = kernel_report(model)
    assert [row.path for row in report.rows if row.outcome == "original" and not row.reason] == []
    assert Counter(row.layer_name for row in report.rows if row.outcome == "original") == family.keeps
    unnamed = [type(module).__name__ for path, module in model.named_modules() if _looks_swappable(module)]
    assert unnamed == []
    torch.testing.assert_close(logits(model, family), expected, rtol=0, atol=1e-4)
    unkernelize(model)
    assert torch.equal(logits(model, family), expected)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_model_itself(family: Family, model: nn.Module) -> None:
    expected = logits(model, family)
    model.to(torch.bfloat16)
    cast = family._replace(
        inputs={name: x.bfloat16() if x.is_floating_point() else x for name, x in family.inputs.items()}
    )
    eager = (logits(model, cast).float() - expected).abs().max()
    kernelize_pretrained(model)
    assert counts(model) == family.kernels
    assert (logits(model, cast).float() - expected).abs().max() <= 2 * eager


def _looks_swappable(module: nn.Module) -> bool:
    """Whether it is a norm, an activation or a gated MLP, by its class's name or its projections, with its own forward."""
    name = type(module).__name__
    known = name.endswith(("Norm", "Activation")) or name.startswith(("GELU", "SiLU", "NewGELU"))
    gated = any(hasattr(module, projection) for projection in ("gate_proj", "gate_up_proj", "wi_1"))
    return (known or gated) and "forward" not in module.__dict__


def test_a_training_step_gives_the_same_gradients(family: Family, model: nn.Module) -> None:
    expected = step(model.train(), family)
    kernelize_pretrained(model)
    own = [row for row in kernel_report(model).kernels if not row.shared]  # a function may still serve an earlier model
    assert {row.mode for row in own} == {str(Mode.TRAINING)}
    assert counts(model) == family.kernels
    found = step(model, family)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=1e-4 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_compiled_it_gives_the_same_without_a_graph_break(family: Family, model: nn.Module) -> None:
    expected = logits(model, family)
    kernelize_pretrained(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
    assert counts(model) == family.kernels
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # what is traced is the same for every backend
    # To make a cache, transformers' encoder-decoders copy their configuration, which torch 2.11 does not trace.
    options = {"use_cache": False} if model.config.is_encoder_decoder else {}
    torch.testing.assert_close(logits(compiled, family, **options), expected, rtol=0, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "t5"], indirect=True)
def test_compiled_training_gives_the_same_gradients(family: Family, model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.modules():
        if hasattr(layer, "dropout") and isinstance(layer.dropout, float):
            layer.dropout = 0.0
    expected = step(model.train(), family)
    kernelize_pretrained(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    found = step(model, family)
    torch._dynamo.reset()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=1e-4 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("hidden_act", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu"])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_gated_mlps_with_biases_and_other_activations(hidden_act: str, family: Family, model: nn.Module) -> None:
    torch.manual_seed(0)
    other = causal("Llama", hidden_act=hidden_act, mlp_bias=True, attention_bias=True)().eval()
    expected = logits(other, family)
    kernelize_pretrained(other)
    assert counts(other).get("GatedMLP", 0) == (0 if hidden_act == "relu" else 2)
    torch.testing.assert_close(logits(other, family), expected, rtol=0, atol=1e-4)
    unkernelize(other)
    assert mark(other).kept == (
        {f"model.layers.{at}.mlp": f"its act_fn is ReLU; the kernel knows {GATES}" for at in (0, 1)}
        if hidden_act == "relu"
        else {}
    )
    del model


GATES = "GELUActivation, GELUTanh, NewGELUActivation, SiLU, SiLUActivation"
MLP = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mistral"], indirect=True)
@pytest.mark.parametrize("training", [False, True])
def test_norm_and_mlp_of_a_layer_are_fused(training: bool, family: Family, model: nn.Module) -> None:
    expected = step(model.train(), family) if training else {"": logits(model, family)}
    mark(model)
    config = KernelConfig({MLP: "kernelhub/decoder:RMSNormGatedMLP"})
    config.apply(model)
    found = {row.path: row for row in kernel_report(model).kernels}
    assert list(found) == [f"model.layers.{at}.{name}" for at in (0, 1) for name in ("mlp", "post_attention_layernorm")]
    assert {row.layer for row in found.values()} == {"RMSNormGatedMLP"}
    results = step(model, family) if training else {"": logits(model, family)}
    assert results.keys() == expected.keys()
    for name, value in results.items():
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4 * scale)
    with use_kernel_mapping(default_mapping()), use_kernel_mapping(config.kernel_mapping):
        kernelize(model, mode=Mode.TRAINING if training else Mode.INFERENCE)
    assert counts(model)["RMSNormZeroCentered" if "Gemma" in type(model).__name__ else "RMSNorm"] >= 5
    unkernelize(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["phi3"], indirect=True)
def test_an_mlp_that_the_fused_kernel_does_not_know_is_refused(family: Family, model: nn.Module) -> None:
    mark(model)
    with pytest.raises(LayerContractError, match="Phi3MLP has no gate_proj, up_proj, act_fn, which the kernel reads"):
        KernelConfig({MLP: "kernelhub/decoder:RMSNormGatedMLP"}).apply(model)
    assert kernel_report(model).kernels == ()
    del family


def test_generation_with_a_cache_gives_the_same_tokens(family: Family, model: nn.Module) -> None:
    if not family.generates:
        pytest.skip("it does not generate")
    inputs = {name: value for name, value in family.inputs.items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": True, "num_beams": 1}
    expected = model.generate(**inputs, **options)
    kernelize_pretrained(model)
    assert kernel_report(model).kernels
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning")
def test_options_reach_kernelize_and_mode_is_what_was_asked_for(family: Family, model: nn.Module) -> None:
    kernelize_pretrained(model, mode=Mode.TRAINING, include="model.norm")
    (row,) = kernel_report(model).kernels
    assert (row.path, row.mode) == ("model.norm", "TRAINING")
