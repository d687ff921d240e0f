"""transformers' models: naming the layers that no decorator names, and the kernels of our own for them.

transformers' decorators name layers only where a package called `kernels` is installed, and never torch's own layers
(`nn.LayerNorm`, `nn.GELU`) inside models. `mark` names both, from the table of `families.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernelhub.integrations.families import FAMILIES, FUSE_LOSS, LOSS, MARKED, OTHER_FORWARD, TORCH, Family, family_of
from kernelhub.integrations.rotary import FUNCTION, mark_rotary
from kernelhub.layers.kernelize import kernelize
from kernelhub.layers.mapping import KernelMapping, use_kernel_mapping
from kernelhub.layers.markers import (
    always,
    keep,
    lend,
    mark_as_calling,
    marks_on,
    replace_kernel_forward_from_hub,
    unmark,
)
from kernelhub.layers.mode import Mode, serving
from kernelhub.layers.report import kernel_report, note
from kernelhub.layers.repositories import LayerRepository
from kernelhub.layers.survey import uncompiled

__all__ = ["Marks", "default_mapping", "kernelize_pretrained", "mark"]

DEVICES = ("cpu", "cuda", "rocm", "xpu", "mps")

NORM_LAYERS = (
    "LayerNorm",
    "LayerNormCastLast",
    "RMSNorm",
    "RMSNormCastLast",
    "RMSNormGateFirst",
    "RMSNormGated",
    "RMSNormGatedCastLast",
    "RMSNormWeightDtype",
    "RMSNormZeroCentered",
)
ACTIVATION_LAYERS = (
    "FastGELU",
    "GeGLUMLP",
    "GeLU",
    "GeluAndMul",
    "GeluTanh",
    "GeluTanhAndMul",
    "Mish",
    "NewGELU",
    "QuickGELU",
    "ReLUSquared",
    "SiLU",
    "SiluAndMul",
    "SwiGLUMLP",
    "Tanh",
    "TorchGELU",
)
# Those for single modules; `RMSNormGatedMLP` is for two.
DECODER_LAYERS = (
    "CausalDecoder",
    "DecoderLayer",
    "GatedFeedForward",
    "GatedMLP",
    "NormedRotaryAttention",
    "PackedGatedMLP",
    "RotaryAttention",
    "WindowedRotaryAttention",
)
ROTARY_LAYERS = ("rotary_pos_emb", "RotaryEmbedding", "RotaryEmbeddingByLayerType")
LOSS_LAYERS = ("ForCausalLMLoss",)

_FORMULAS = frozenset(family.layer for family in FAMILIES)
# What `mark` and `mark_fused_loss` put on instances, beside the functions that they call.
_ON_INSTANCES = (MARKED, LOSS, FUSE_LOSS)

# By device, the layers that keep their forward under torch.compile, and in which of the two modes: those that inductor
# computes faster together with what stands around them. On an H200 it adds and norms in one pass, also before the sum, which
# loses less than the kernels save only for the zero-centred norm in inference (benchmarks/NOTES.md, "Compiled"). A layer can be
# left in both modes or in training: a kernel for training serves inference, too.
ALWAYS = (Mode.INFERENCE, Mode.TRAINING)
LEFT_TO_INDUCTOR: Mapping[str, Mapping[str, tuple[Mode, ...]]] = {
    "cuda": {
        "LayerNorm": ALWAYS,
        "RMSNorm": ALWAYS,
        "RMSNormZeroCentered": (Mode.TRAINING,),
        # Which it fuses, too: kernels of 2 to 3 us in a compiled Llama's profile. Not timed beside ours.
        "RotaryEmbedding": ALWAYS,
        "RotaryEmbeddingByLayerType": ALWAYS,
    }
}


@dataclass(frozen=True)
class Marks:
    """What `mark` found, by module path: the layers' names (also those that they had), and why other layers have none.

    `unreached` are functions (rotary embeddings) that no kernel can stand in for, and classes whose forward is another than
    the one that the kernel is for, by name, and why.
    """

    layers: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {name: list(self.layers.values()).count(name) for name in sorted(set(self.layers.values()))}
        lines = [f"{count} x {name}" for name, count in counts.items()] or ["no layers"]
        lines += [f"{path} keeps its forward: {reason}" for path, reason in self.kept.items()]
        lines += [f"{name}: {reason}" for name, reason in self.unreached.items()]
        return "\n".join(lines)


def mark(model: nn.Module) -> Marks:
    """Name the layers of `model` for which there are kernels and which no decorator has named. Nothing else changes.

    A class of transformers' is named itself, as its decorator would do. A class of torch's is named too, but with a
    condition that holds only for the instances in models that `mark` was called on: those of other models keep their
    forward, whatever they are kernelized with. A subclass with a forward of its own is left alone, and so is a class
    that is named already, and one whose forward is another than that of transformers 5.22, by its source. But a class of
    transformers' with the name of a formula gets the one of its own: transformers' decorators name norms that cast last
    `RMSNorm`, too. The loss of a causal language model, which is a function, is named on the model; see
    `kernelhub.integrations.losses`, also for the projection before it.

    The names on instances are the model's until it is gone, also when it is unkernelized.

    Example: `mark(model)`, `with use_kernel_mapping(default_mapping()): kernelize(model, mode=Mode.INFERENCE)`.
    """
    for module in uncompiled(model).modules():
        keep(module)
    return _mark(model)


def _mark(model: nn.Module) -> Marks:
    marks = Marks()
    for path, module in uncompiled(model).named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # a program, whose class says nothing of it
            continue
        rotary = mark_rotary(module)
        if rotary == "":
            marks.layers[f"{path}.{ROTARY_LAYERS[0]}" if path else ROTARY_LAYERS[0]] = ROTARY_LAYERS[0]
        elif rotary is not None:
            marks.unreached[f"{type(module).forward.__module__}.{FUNCTION}"] = rotary
        if _marks_loss(module):
            marks.layers[f"{path}.{LOSS_LAYERS[0]}" if path else LOSS_LAYERS[0]] = LOSS_LAYERS[0]
        found = family_of(type(module))
        if found is None:
            continue
        cls, family = found
        if getattr(type(module), "forward", None) is not cls.forward:
            marks.kept[path] = f"{type(module).__name__} has a forward of its own"
            continue
        if _named_by_others(cls, family):
            marks.layers[path] = vars(cls)["kernel_layer_name"]
            continue
        # Also where no instance here can have a kernel: it would get one by that name.
        if "kernel_layer_name" in vars(cls):
            replace_kernel_forward_from_hub(cls, family.layer, family.condition)
        if not family.knows(type(module)):
            marks.kept[path] = marks.unreached[f"{cls.__module__}.{cls.__qualname__}"] = OTHER_FORWARD
            continue
        reason = family.unfit(module)
        if reason:
            marks.kept[path] = reason
            continue
        if family.package == TORCH:
            module.__dict__[MARKED] = family.layer
        replace_kernel_forward_from_hub(cls, family.layer, family.condition)
        if family.calls_children:
            mark_as_calling(cls)
        marks.layers[path] = family.layer
    note(model, _notes(marks))
    return marks


def default_mapping() -> KernelMapping:
    """The kernels that come with this package, for every layer that they have and every device that they run on.

    Under torch.compile those of `LEFT_TO_INDUCTOR` are not for the modes named there: the layers keep their forward.
    """
    return _mapping(LEFT_TO_INDUCTOR)


def _mapping(left: Mapping[str, Mapping[str, tuple[Mode, ...]]]) -> KernelMapping:
    """Each is registered for whatever nothing else serves; those of `left` for the modes that are not left."""
    return {
        layer: {
            device: _for_modes(
                LayerRepository(f"kernelhub/{kernel}", layer_name=layer, version=1), left.get(device, {}).get(layer, ())
            )
            for device in DEVICES
        }
        for kernel, layers in (
            ("norm", NORM_LAYERS),
            ("activation", ACTIVATION_LAYERS),
            ("decoder", DECODER_LAYERS),
            ("rotary", ROTARY_LAYERS),
            ("loss", LOSS_LAYERS),
        )
        for layer in layers
    }


def _for_modes(repository: LayerRepository, left: tuple[Mode, ...]) -> LayerRepository | dict[Mode, LayerRepository]:
    if not left:
        return repository
    compiled = (mode | Mode.TORCH_COMPILE for mode in ALWAYS if mode not in left)
    return dict.fromkeys((*ALWAYS, *compiled), repository)


def kernelize_pretrained(
    model: nn.Module, *, mode: Mode | None = None, fuse_loss: bool = False, **options: Any
) -> nn.Module:
    """Name the layers of a transformers model, and kernelize it with the kernels of this package; returns the same model.

    `mode` None is the model's training state. With `fuse_loss` a causal language model computes its loss without all of
    the logits, which its output then lacks in training with labels (see `kernelhub.integrations.losses`), and computes
    less where only the last token's logits are asked for (`logits_to_keep=1`, as `generate` does). The other options are
    those of `kernelize`. Kernels that are registered count too; for a layer, device and mode that both have, this
    package's. Raises what `kernelize` raises. `unkernelize` takes the names off the instances, too, that were not there before.

    Example: `kernelize_pretrained(AutoModelForCausalLM.from_pretrained(folder))`.
    """
    with _lent(model):
        return _kernelize(model, mode, fuse_loss, options)


def _kernelize(model: nn.Module, mode: Mode | None, fuse_loss: bool, options: dict[str, Any]) -> nn.Module:
    marks = _mark(model)
    if mode is not None:
        serving(mode)
    wanted = mode or (Mode.TRAINING if model.training else Mode.INFERENCE)
    # Where nothing is left, this package's kernels are for whatever nothing of the user's serves, like those of other layers.
    mapping, notes = _mapping(LEFT_TO_INDUCTOR if Mode.TORCH_COMPILE in wanted else {}), _notes(marks)
    if fuse_loss:
        from kernelhub.integrations.losses import fused_loss_mapping

        notes += tuple(f"the loss is not fused: {reason}" for reason in _not_fused(model))
        mapping = {**mapping, **fused_loss_mapping()}
    note(model, notes)
    with use_kernel_mapping(mapping):
        kernelize(model, mode=wanted, **options)
    if Mode.TORCH_COMPILE in wanted:
        note(model, (*notes, *_left(model)))
    return model


@contextmanager
def _lent(model: nn.Module) -> Iterator[None]:
    """What the block marks on instances goes when the model is unkernelized; at once if the block raises."""
    before = {module: marks_on(module, _ON_INSTANCES) for module in uncompiled(model).modules()}
    try:
        yield
    except BaseException:
        for module, marks in before.items():
            unmark(module, marks_on(module, _ON_INSTANCES) - marks)
        raise
    for module, marks in before.items():
        lend(module, marks_on(module, _ON_INSTANCES) - marks)


def _not_fused(model: nn.Module) -> list[str]:
    """Why losses are not fused, whose models are then not named."""
    from kernelhub.integrations.losses import mark_fused_loss

    reasons = list(mark_fused_loss(model).values())
    if not reasons and not any(FUSE_LOSS in module.__dict__ for module in uncompiled(model).modules()):
        reasons.append("it has no causal language model")
    return reasons


def _left(model: nn.Module) -> list[str]:
    """What the report says of the layers that were left to inductor: nothing else serves the mode."""
    reasons = {row.reason for row in kernel_report(model).rows}
    return [
        f"{layer} keeps its forward on {device}: compiled together with what stands around it, that is faster"
        for device, layers in LEFT_TO_INDUCTOR.items()
        for layer in layers
        if any(reason.startswith(f"no kernel for {layer} on {device} serves ") for reason in reasons)
    ]


def _notes(marks: Marks) -> tuple[str, ...]:
    return tuple(f"not reached: {name}: {reason}" for name, reason in marks.unreached.items())


def _marks_loss(module: nn.Module) -> bool:
    if "transformers.modeling_utils" not in sys.modules:
        return False
    from kernelhub.integrations.losses import mark_loss  # which imports transformers

    return mark_loss(module)


def _named_by_others(cls: type[nn.Module], family: Family) -> bool:
    """Whether the user has named the class, or a decorator of transformers' by a name that says nothing of its formula."""
    name, condition = vars(cls).get("kernel_layer_name"), getattr(cls, "kernel_condition", None)
    if name is None or getattr(condition, "__self__", None) is family:
        return False
    decorated = family.package != TORCH and condition in (None, always)
    return not (decorated and name in _FORMULAS)
