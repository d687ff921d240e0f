"""The models that `kernelhub demo` kernelizes: three real architectures, or the one that is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernelhub.errors import InvalidReference

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Case:
    """A model in eval mode, and the inputs of one forward; whether it goes on from there, a token at a time."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    steps: bool = False


def built_in_cases() -> list[Case]:
    """Real architectures with random weights: sizes that take seconds on two cores, and larger ones for a GPU.

    What norms, rotary embeddings and activations take grows with the hidden size, what the matrix products take with its
    square. The dtypes are those that such models are published and loaded in: bfloat16, where the processor multiplies it
    (where not, its products take longer than float32's), and float32 for the BERT. On the CPU the Gemma 3 has the 270M
    model's sizes, with 4 of its 18 layers, and six norms, a rotary embedding and a GELU in each.
    """
    import torch
    from transformers import (
        BertConfig,
        BertModel,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    device = default_device()
    scale, encoder = (1, torch.float32) if device.type == "cpu" else (4, torch.bfloat16)
    decoder = torch.bfloat16 if device.type != "cpu" or _multiplies_bfloat16() else torch.float32
    rows, tokens = 2, 128 * scale
    llama = LlamaConfig(
        vocab_size=4096,
        hidden_size=384 * scale,
        intermediate_size=1024 * scale,
        num_hidden_layers=4,
        num_attention_heads=6 * scale,
        num_key_value_heads=2 * scale,
    )
    gemma = Gemma3TextConfig(
        vocab_size=4096,
        hidden_size=640 * scale,
        intermediate_size=2048 * scale,
        num_hidden_layers=4,
        num_attention_heads=4 * scale,
        num_key_value_heads=scale,
        head_dim=256,
    )
    bert = BertConfig(
        vocab_size=4096,
        hidden_size=256 * scale,
        intermediate_size=1024 * scale,
        num_hidden_layers=4,
        num_attention_heads=4 * scale,
        max_position_embeddings=tokens,
    )
    cases: list[tuple[str, Callable[[], nn.Module], torch.dtype, dict[str, Any], bool]] = [
        ("LlamaForCausalLM", lambda: LlamaForCausalLM(llama), decoder, {"use_cache": False}, True),
        ("Gemma3ForCausalLM", lambda: Gemma3ForCausalLM(gemma), decoder, {"use_cache": False}, True),
        ("BertModel", lambda: BertModel(bert), encoder, {}, False),
    ]
    built = []
    for name, build, dtype, extra, steps in cases:
        with _seeded():
            model = build().to(device, dtype).eval()
            ids = torch.randint(4096, (rows, tokens)).to(device)
        built.append(Case(name, model, {"input_ids": ids, **extra}, steps))
    return built


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16."""
    import torch

    # Public from torch 2.6 on for one of the two instruction sets only.
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported is not None and supported() for supported in known)


def model_case(name: str) -> Case:
    """A model that transformers can load, by name or from a folder, with random inputs.

    Raises `InvalidReference` where it cannot be loaded, or where it is not clear what to give it.
    """
    import transformers
    from safetensors import SafetensorError

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = next(iter(config.architectures or ()), "")
        loader = getattr(transformers, architecture, transformers.AutoModel)
        model = loader.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise InvalidReference(
            f"transformers cannot load {name!r}: {str(error).strip().partition(chr(10))[0]}",
            hint="Expected a folder with a config.json and weights, or a model's name on the Hugging Face Hub.",
        ) from error
    model = model.to(default_device()).eval()
    with _seeded():
        inputs = _inputs(model, name)
    return Case(f"{type(model).__name__} ({name})", model, inputs)


def _inputs(model: Any, name: str) -> dict[str, Any]:
    """Random inputs of the kind that the model's main input is."""
    import torch

    config, main = model.config.get_text_config(), model.main_input_name
    first = next(model.parameters())
    if main == "input_ids":
        tokens = min(128, getattr(config, "max_position_embeddings", None) or 128)
        # Past the last special token of the common vocabularies, where there are that many; positions depend on padding.
        low = min(1000, config.vocab_size // 2)
        inputs: dict[str, Any] = {"input_ids": torch.randint(low, config.vocab_size, (2, tokens), device=first.device)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, : tokens // 2]
        return {**inputs, **({"use_cache": False} if hasattr(config, "use_cache") else {})}
    config = getattr(model.config, "vision_config", model.config)
    if main == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        shape = (2, getattr(config, "num_channels", 3), *size)
    elif main == "input_values":
        shape = (2, 16000)  # a second of sound
    else:
        raise InvalidReference(
            f"{name}: {type(model).__name__} takes {main!r}, and the demo has no such inputs",
            hint="It has token ids, pixel values and sound. `kernelhub.kernelize` takes any model.",
        )
    return {main: torch.randn(shape, device=first.device, dtype=first.dtype)}


def default_device() -> torch.device:
    """The GPU (or other accelerator) that torch would use, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers every time, without touching anyone else's."""
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
