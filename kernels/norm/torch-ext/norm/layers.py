"""The functions as layers: each `forward` reads what the class whose place it takes keeps on the module."""

from __future__ import annotations

from torch import Tensor, nn

from . import functions

__all__ = [
    "LayerNorm",
    "LayerNormCastLast",
    "RMSNorm",
    "RMSNormCastLast",
    "RMSNormGateFirst",
    "RMSNormGated",
    "RMSNormGatedCastLast",
    "RMSNormWeightDtype",
    "RMSNormZeroCentered",
]


class RMSNorm(nn.Module):
    """Reads `weight`, and `variance_epsilon` or `eps`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functions.rms_norm(hidden_states, _parameter(self, "weight"), _epsilon(self))


class RMSNormCastLast(nn.Module):
    """Reads `weight`, and `variance_epsilon` or `eps`; rounds once, after the product with the weight."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functions.rms_norm_cast_last(hidden_states, _parameter(self, "weight"), _epsilon(self))


class RMSNormZeroCentered(nn.Module):
    """Reads `weight`, which is stored less 1, and `eps` or `variance_epsilon`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functions.rms_norm_zero_centered(hidden_states, _parameter(self, "weight"), _epsilon(self))


class RMSNormWeightDtype(nn.Module):
    """Reads `weight`, and `variance_epsilon` or `eps`; rounds to the weight's dtype where that has 16 bits."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functions.rms_norm_weight_dtype(hidden_states, _parameter(self, "weight"), _epsilon(self))


class RMSNormGated(nn.Module):
    """Reads `weight`, `variance_epsilon` or `eps`, and `activation`, the name of the gate's."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return functions.rms_norm_gated(
            hidden_states, _parameter(self, "weight"), gate, _epsilon(self), self.activation
        )


class RMSNormGatedCastLast(nn.Module):
    """Reads `weight`, `variance_epsilon` or `eps`, and `activation`; rounds once, at the end."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return functions.rms_norm_gated_cast_last(
            hidden_states, _parameter(self, "weight"), gate, _epsilon(self), self.activation
        )


class RMSNormGateFirst(nn.Module):
    """Reads `weight`, and `variance_epsilon` or `eps`; the gate is applied before the normalisation."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return functions.rms_norm_gate_first(hidden_states, _parameter(self, "weight"), gate, _epsilon(self))


class LayerNorm(nn.Module):
    """As `torch.nn.LayerNorm`: reads `normalized_shape`, `weight`, `bias` (either may be None) and `eps`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return functions.layer_norm(
            input, _parameter(self, "weight"), _parameter(self, "bias"), self.eps, self.normalized_shape
        )


class LayerNormCastLast(nn.Module):
    """Reads `weight`, and `variance_epsilon` or `eps`; no bias, and one rounding at the end."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functions.layer_norm_cast_last(hidden_states, _parameter(self, "weight"), _epsilon(self))


def _parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter; what is none (parametrized, a plain tensor, None) by the way of all attributes, 0.3 us longer."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def _epsilon(module: nn.Module) -> float:
    """The number added to the mean square. Looked up in the instance first: a missing attribute of a module is slow."""
    found = module.__dict__.get("variance_epsilon")
    return module.eps if found is None else found
