"""The cross entropy and its gradient as Triton kernels."""

# ruff: noqa: SIM300  (what is decided when a kernel is compiled is written as Triton reads it)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exp(x, T: tl.constexpr):
    """e**x. The GPU's own 2**x is good for 16 bits; in float32 the rounding of x * log2(e) would show for a large x."""
    if T == tl.float32:
        x = tl.where(x < -104.0, -104.0, x)
        x = tl.where(x > 89.0, 89.0, x)
        whole = tl.floor(x * 1.4426950408889634)
        part = tl.fma(x, tl.full(x.shape, 1.44269502162933349609375, tl.float32), -whole) + x * 1.925963033500e-8
        return tl.exp2(part) * tl.exp2(whole)
    else:
        return tl.exp(x)


@triton.jit
def _gradient(x, most, inverse, scale, is_label, n, smoothing, z_loss, T: tl.constexpr):
    """scale * (softmax(x) - (1 - smoothing) at the label - smoothing / n), with the z loss's part."""
    factor = inverse * (1.0 + 2.0 * z_loss * (most - tl.log(inverse)))
    p = _exp(x - most, T) * factor
    return tl.where(is_label, p - (1.0 - smoothing), p) * scale - scale * smoothing / n


@triton.jit
def losses(
    logits_ptr, labels_ptr, losses_ptr, sums_ptr, scale_ptr, n, stride, ignore_index, smoothing, z_loss,
    WITH_GRADIENT: tl.constexpr, SMOOTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row to a program, read once for its sums, which are kept, and WITH_GRADIENT once more, to be written over.

    A label that is no class reads nothing and gives NaN.
    """
    T: tl.constexpr = logits_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    smoothing, z_loss = tl.cast(smoothing, tl.float32), tl.cast(z_loss, tl.float32)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    is_class = (label >= 0) & (label < n)
    at_label = tl.load(logits_ptr + label, mask=is_class, other=float("nan")).to(tl.float32)
    count = tl.where(kept, n, 0)
    most = tl.full([], float("-inf"), tl.float32)
    totals = tl.zeros([BLOCK], tl.float32)
    plains = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < n
        x = tl.load(logits_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
        found = tl.maximum(most, tl.max(x, 0))  # passes over NaNs, which show in the sum
        shift = tl.where(found == float("-inf"), 0.0, found)
        totals = totals * _exp(most - shift, T) + _exp(x - shift, T)
        if SMOOTHS:
            plains += tl.where(inside, x, 0.0)
        most = found
    # Nothing but -inf has no largest: 0 / 0 in the formula.
    total = tl.where(most == float("-inf"), float("nan"), tl.sum(totals, 0))
    log_sum = tl.log(total)
    # Beside large logits the logarithm would be lost, so it is added last.
    loss = (most - at_label) + log_sum
    if SMOOTHS:
        loss = (1.0 - smoothing) * loss + smoothing * ((most - tl.sum(plains, 0) / n) + log_sum)
    if z_loss != 0.0:
        loss += z_loss * (most + log_sum) * (most + log_sum)
    inverse = tl.where(is_class, 1.0 / total, float("nan"))
    tl.store(losses_ptr + row, tl.where(kept, loss, 0.0))
    if WITH_GRADIENT:
        scale = tl.load(scale_ptr + row)
        for start in range(0, n, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < n
            x = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
            grad = _gradient(x, most, inverse, scale, column == label, n, smoothing, z_loss, T)
            tl.store(logits_ptr + column, tl.where(kept, grad, 0.0).to(T), mask=inside)
    else:
        tl.store(sums_ptr + 2 * row, tl.where(kept, most, 0.0))
        tl.store(sums_ptr + 2 * row + 1, tl.where(kept, inverse, 0.0))


@triton.jit
def gradients(
    logits_ptr, labels_ptr, sums_ptr, scale_ptr, grad_ptr, n, stride, ignore_index, smoothing, z_loss,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK classes of a row to a program."""
    T: tl.constexpr = logits_ptr.dtype.element_ty
    smoothing, z_loss = tl.cast(smoothing, tl.float32), tl.cast(z_loss, tl.float32)
    across = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    column = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    x = tl.load(logits_ptr + row * stride + column, mask=column < tl.where(kept, n, 0), other=0.0).to(tl.float32)
    most = tl.load(sums_ptr + 2 * row)
    inverse = tl.load(sums_ptr + 2 * row + 1)
    grad = _gradient(x, most, inverse, tl.load(scale_ptr + row), column == label, n, smoothing, z_loss, T)
    tl.store(grad_ptr + row * n + column, tl.where(kept, grad, 0.0).to(T), mask=column < n)
