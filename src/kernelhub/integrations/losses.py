"""The losses of transformers' causal language models: how `mark` names them, and the projection fused into them.

A model finds its loss by its property `loss_function`, which returns what `_loss_function` in the instance's `__dict__` is,
where that is there. `mark_loss` puts a kernel-aware function there that calls the same loss: one function for the process,
as those are that transformers' decorators make, and of this module, so that copies and pickles find it by name.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from kernelhub.integrations.families import FUSE_LOSS, LOSS, OTHER_FORWARD
from kernelhub.integrations.forwards import digest
from kernelhub.layers.mapping import KernelMapping
from kernelhub.layers.markers import FUNCS, replace_kernel_forward_from_hub, use_kernel_forward_from_hub
from kernelhub.layers.repositories import LayerRepository
from kernelhub.layers.survey import uncompiled

__all__ = ["causal_lm_loss", "fused_loss_mapping", "mark_fused_loss", "mark_loss"]

LAYER, FUSED = "ForCausalLMLoss", "FusedForCausalLM"
DEVICES = ("cpu", "cuda", "rocm", "xpu", "mps")

# The classes whose forward is: the model, the projection `lm_head` without anything after it, the loss. A test compares
# their sources.
_NAMES = """
ApertusForCausalLM ArceeForCausalLM BitNetForCausalLM CwmForCausalLM DiffLlamaForCausalLM Emu3ForCausalLM
Ernie4_5ForCausalLM Exaone4ForCausalLM GemmaForCausalLM Glm4ForCausalLM GlmForCausalLM HeliumForCausalLM
HunYuanDenseV1ForCausalLM Jais2ForCausalLM Lfm2ForCausalLM LlamaForCausalLM Ministral3ForCausalLM
MinistralForCausalLM MistralForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OlmoHybridForCausalLM
Phi3ForCausalLM PhiForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Qwen3_5ForCausalLM SeedOssForCausalLM
SmolLM3ForCausalLM Starcoder2ForCausalLM YoutuForCausalLM
"""
FUSED_CLASSES = frozenset(_NAMES.split())
# Digests (`forwards.py`) of that forward, and of the loss and the function that it calls.
_FUSED_FORWARD = "b0276fa03263c1d2"
_LOSS, _CROSS_ENTROPY = "90cd70f33ede6cde", "9ca2226a2c7bcf09"


@use_kernel_forward_from_hub(LAYER)
def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss`, as a function that a kernel can stand in for."""
    loss: Tensor = ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    return loss


def mark_loss(module: nn.Module) -> bool:
    """Name the loss of a model of transformers', if it is that of causal language models and its forward asks for it.

    Whether it is named now. A loss that was set on the model stays, and so does one that its class defines.
    """
    cls: Any = type(module)
    if not isinstance(module, PreTrainedModel) or cls.loss_function is not PreTrainedModel.loss_function:
        return False
    if module.__dict__.get(LOSS) is causal_lm_loss:
        return True
    if hasattr(module, LOSS) or "loss_function" not in _names(cls.forward) or not _knows_loss():
        return False
    # Without a loss type, or with one that it does not know, transformers takes this loss, too.
    if LOSS_MAPPING.get(getattr(module, "loss_type", None), ForCausalLMLoss) is not ForCausalLMLoss:
        return False
    # Past nn.Module's own ways: not a submodule, so the model's modules and state dict stay what they are.
    module.__dict__[LOSS] = causal_lm_loss
    module.__dict__.setdefault(FUNCS, {})[LAYER] = causal_lm_loss
    return True


def mark_fused_loss(model: nn.Module) -> dict[str, str]:
    """Name the causal language models in `model` (mostly itself) as layers whose projection and loss can be one.

    Not part of `mark`, because of what such a kernel does not return: in training with labels, the output's `logits` are
    None. Without labels, and in `eval()`, it returns what the model's own forward does. Returns by module path why a causal language
    model is not named; its forward stays, as it does where no kernel is registered (see `fused_loss_mapping`).

    Example: `mark_fused_loss(model)`, `with use_kernel_mapping({**default_mapping(), **fused_loss_mapping()}):
    kernelize(model, mode=Mode.TRAINING)`.
    """
    kept = {}
    for path, module in uncompiled(model).named_modules():
        if not isinstance(module, PreTrainedModel) or not type(module).__name__.endswith("ForCausalLM"):
            continue
        cls = next((base for base in type(module).__mro__ if _is_known(base)), None)
        reason = _unfit(module) if cls is not None else "its forward is not one that the kernel knows"
        if cls is not None and getattr(type(module), "forward", None) is not getattr(cls, "forward", None):
            reason = f"{type(module).__name__} has a forward of its own"
        elif cls is not None and digest(type(module)) != _FUSED_FORWARD:
            reason = OTHER_FORWARD
        if cls is None or reason is not None:
            kept[path] = str(reason)
            continue
        module.__dict__[FUSE_LOSS] = True
        replace_kernel_forward_from_hub(cls, FUSED, _condition)
    return kept


def fused_loss_mapping() -> KernelMapping:
    """The kernel for what `mark_fused_loss` names, on every device that it runs on. Not part of `default_mapping`."""
    return {FUSED: dict.fromkeys(DEVICES, LayerRepository("kernelhub/loss", layer_name=FUSED, version=1))}


def _names(function: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_names if code is not None else ()


def _is_known(cls: type) -> bool:
    return cls.__name__ in FUSED_CLASSES and cls.__module__.startswith("transformers.models.")


def _condition(module: nn.Module) -> bool:
    return FUSE_LOSS in module.__dict__ and _unfit(module) is None and digest(type(module)) == _FUSED_FORWARD


def _knows_loss() -> bool:
    """Whether transformers' loss is the one that the kernels compute."""
    cross_entropy = ForCausalLMLoss.__globals__.get("fixed_cross_entropy")
    return digest(ForCausalLMLoss) == _LOSS and digest(cross_entropy) == _CROSS_ENTROPY


def _unfit(module: Any) -> str | None:
    """Why the kernel cannot compute the loss of this instance."""
    head = getattr(module, "lm_head", None)
    if type(head) is not nn.Linear:
        return f"its lm_head is {type(head).__name__}; the kernel reads the weight of a Linear"
    if head.out_features != module.config.vocab_size:
        return f"its lm_head has {head.out_features} outputs for {module.config.vocab_size} classes"
    if module.__dict__.get(LOSS) not in (None, causal_lm_loss, ForCausalLMLoss):
        return "it has a loss of its own"
    if LOSS_MAPPING.get(getattr(module, "loss_type", None), ForCausalLMLoss) is not ForCausalLMLoss:
        return f"its loss is that of {module.loss_type}"
    return None if _knows_loss() else "its loss is another than the kernel computes"
