"""The norms as Triton kernels. Sums are in float32, in an order that only the shape decides."""

# ruff: noqa: SIM109, SIM300  (what is decided when a kernel is compiled is written as Triton reads it)

from __future__ import annotations

import triton
import triton.language as tl

# As in compiled.py; and what is asked of a kernel.
_CAST_FIRST, _ZERO_CENTERED = tl.constexpr(0), tl.constexpr(2)
_SIGMOID, _SILU_FIRST = tl.constexpr(2), tl.constexpr(3)
_ADD, _GATED, _LAYER = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


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
def _over(a, b, T: tl.constexpr):
    if T == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _gate_value(z, GATE: tl.constexpr, T: tl.constexpr):
    """silu(z) or sigmoid(z)."""
    below = 1.0 + _exp(-z, T)
    if GATE == _SIGMOID:
        return _over(tl.full(z.shape, 1.0, tl.float32), below, T)
    else:
        return _over(z, below, T)


@triton.jit
def _gate_slope(z, GATE: tl.constexpr, T: tl.constexpr):
    """Their derivatives. Of e**-|z|, which does not overflow."""
    e = _exp(-tl.abs(z), T)
    part = _over(tl.full(z.shape, 1.0, tl.float32), 1.0 + e, T)
    slope = e * part * part
    if GATE == _SIGMOID:
        return slope
    else:
        return z * slope + tl.where(z < 0.0, e * part, part)


@triton.jit
def _input(x, other, KIND: tl.constexpr, GATE: tl.constexpr, T: tl.constexpr):
    """What is normalised, in float32: x, x plus the residual as it is rounded, or x times the gate's silu."""
    x = x.to(tl.float32)
    if KIND == _ADD:
        x = (x + other.to(tl.float32)).to(T).to(tl.float32)
    if KIND == _GATED and GATE == _SILU_FIRST:
        x = x * _gate_value(other.to(tl.float32), GATE, T)
    return x


@triton.jit
def _weighted(h, weight, other, FORM: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, T: tl.constexpr):
    """h = x / rms(x) times the weight, rounded where the form says so; times the gate."""
    w = weight.to(tl.float32)
    if FORM == _CAST_FIRST:
        y = (h.to(T).to(tl.float32) * w).to(T).to(tl.float32)
    elif FORM == _ZERO_CENTERED:
        y = h * (1.0 + w)
    else:
        y = h * w
    if KIND == _GATED and GATE != _SILU_FIRST:
        y = y * _gate_value(other.to(tl.float32), GATE, T)
    return y


@triton.jit(do_not_specialize=["rows"])
def rms_rows(
    x_ptr, other_ptr, weight_ptr, y_ptr, sum_ptr, rows, n, x_stride, other_stride, eps,
    FORM: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_R whole rows to a program, which are read once."""
    T: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = (row < rows) & (column < n)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    other = x
    if KIND != 0:
        other = tl.load(other_ptr + row * other_stride + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < n, other=0.0)
    of = _input(x, other, KIND, GATE, T)
    at = row * n + column
    if KIND == _ADD:
        tl.store(sum_ptr + at, of.to(T), mask=inside)
    scale = tl.rsqrt(tl.sum(of * of, 1) / n + tl.cast(eps, tl.float32))[:, None]
    tl.store(y_ptr + at, _weighted(of * scale, weight, other, FORM, KIND, GATE, T).to(T), mask=inside)


@triton.jit
def rms_long_rows(
    x_ptr, other_ptr, weight_ptr, y_ptr, sum_ptr, n, x_stride, other_stride, eps,
    FORM: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row to a program, read twice."""
    T: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    other_ptr += row * other_stride
    y_ptr += row * n
    sum_ptr += row * n
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < n
        x = tl.load(x_ptr + column, mask=inside, other=0.0)
        other = x
        if KIND != 0:
            other = tl.load(other_ptr + column, mask=inside, other=0.0)
        of = _input(x, other, KIND, GATE, T)
        if KIND == _ADD:
            tl.store(sum_ptr + column, of.to(T), mask=inside)
        squares += of * of
    scale = tl.rsqrt(tl.sum(squares, 0) / n + tl.cast(eps, tl.float32))
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < n
        x = tl.load(x_ptr + column, mask=inside, other=0.0)
        other = x
        if KIND != 0:
            other = tl.load(other_ptr + column, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        of = _input(x, other, KIND, GATE, T)
        tl.store(y_ptr + column, _weighted(of * scale, weight, other, FORM, KIND, GATE, T).to(T), mask=inside)


@triton.jit
def _away(x, x_at, inside, n):
    """The differences of rows from their means, and the variances.

    Where a mean is more than 8 times the deviation its own rounding shows beside that, and is taken back: the row is read
    again. Of one of equal elements every difference is 0 then. Ordinary rows have nothing but the question.
    """
    mean = tl.sum(x, 1)[:, None] / n
    away = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(away * away, 1)[:, None] / n
    far = mean * mean > 64.0 * variance
    if tl.max(far.to(tl.int32)) > 0:
        off = tl.where(far, tl.sum(away, 1)[:, None] / n, 0.0)  # each row goes by its own
        again = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)  # not held in registers for this
        away = tl.where(inside, again - (mean + off), 0.0)
        variance = tl.maximum(variance - off * off, 0.0)
    return away, variance


@triton.jit
def _mean_away(x_ptr, mean, n, BLOCK_N: tl.constexpr):
    """The mean of the differences from a mean: by how much its rounding has it wrong. Of one row, read in steps."""
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + column, mask=column < n, other=0.0).to(tl.float32)
        sums += tl.where(column < n, x - mean, 0.0)
    return tl.sum(sums, 0) / n


@triton.jit(do_not_specialize=["rows"])
def layer_rows(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rows, n, x_stride, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = (row < rows) & (column < n)
    x_at = x_ptr + row * x_stride + column
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    away, variance = _away(x, x_at, inside, n)
    y = away * tl.rsqrt(variance + tl.cast(eps, tl.float32))
    if WEIGHT:
        y = y * tl.load(weight_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_long_rows(
    x_ptr, weight_ptr, bias_ptr, y_ptr, n, x_stride, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row to a program, read three times: sums of squares alone would cancel. Far from zero once more, as `_away`."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * n
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        sums += tl.load(x_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 0) / n
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + column, mask=column < n, other=0.0).to(tl.float32)
        away = tl.where(column < n, x - mean, 0.0)
        squares += away * away
    variance = tl.sum(squares, 0) / n
    if mean * mean > 64.0 * variance:
        off = _mean_away(x_ptr, mean, n, BLOCK_N)
        mean += off
        variance = tl.maximum(variance - off * off, 0.0)
    scale = tl.rsqrt(variance + tl.cast(eps, tl.float32))
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < n
        y = (tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32) - mean) * scale
        if WEIGHT:
            y = y * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            y = y + tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=inside)


# Gradients. With g = grad * weight and h = (x - mean) / rms, that of the input is (g - mean(g) - h * mean(g * h)) / rms,
# without the means where the norm takes off none, and the weight's is the sum over the rows of grad * h.


@triton.jit
def _part(grad, x, other, KIND: tl.constexpr, GATE: tl.constexpr, T: tl.constexpr):
    """x as it is normalised, and what the weight is multiplied with to give g: grad, or grad times the gate."""
    x, by = x.to(tl.float32), grad.to(tl.float32)
    if KIND == _GATED:
        value = _gate_value(other.to(tl.float32), GATE, T)
        if GATE == _SILU_FIRST:
            x = x * value
        else:
            by = by * value
    return x, by


@triton.jit
def _factor(weight, FORM: tl.constexpr):
    w = weight.to(tl.float32)
    if FORM == _ZERO_CENTERED:
        w = 1.0 + w
    return w


@triton.jit
def _gradients(
    to, x, grad, other, h, w, KIND: tl.constexpr, GATE: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """The gradients of x and of the gate, from that of what is normalised, `to`."""
    gate_grad = to
    if KIND == _ADD:
        to = to + other.to(tl.float32)
    if KIND == _GATED:
        z = other.to(tl.float32)
        if GATE == _SILU_FIRST:
            gate_grad = to * x.to(tl.float32) * _gate_slope(z, GATE, T)
            to = to * _gate_value(z, GATE, T)
        else:
            gate_grad = grad.to(tl.float32) * h * w * _gate_slope(z, GATE, T)
    return to, gate_grad


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _layer_sums(x, g, inside, n, T: tl.constexpr):
    """Of rows: mean, variance, the sum of g * (x - mean), and the mean of g, all from sums about zero.

    In float32, or where a mean is more than 8 times the deviation, from sums about that mean: nearer by, those about zero have
    lost at most 64 times their rounding, which 16 bits do not show. What the mean's own rounding was is taken back then.
    """
    sums, squares, gs, products = tl.reduce((x, x * x, g, g * x), 1, _add_four)
    sums, squares, gs, products = sums[:, None] / n, squares[:, None] / n, gs[:, None], products[:, None]
    mean, variance, product = sums, squares - sums * sums, products - sums * gs
    near = (mean * mean <= 64.0 * variance) & (variance <= 3.4e38)  # not where the squares are infinite
    if T == tl.float32:
        near = near & False
    if tl.min(near.to(tl.int32)) == 0:
        away = tl.where(inside, x - mean, 0.0)
        sums, squares, products = tl.reduce((away, away * away, g * away), 1, _add_three)
        sums, squares, products = sums[:, None] / n, squares[:, None] / n, products[:, None]
        variance = tl.where(near, variance, tl.maximum(squares - sums * sums, 0.0))
        product = tl.where(near, product, products - sums * gs)
        mean = tl.where(near, mean, mean + sums)
    return mean, variance, product, gs / n


@triton.jit(do_not_specialize=["rows"])
def backward_rows(
    grad_ptr, x_ptr, other_ptr, weight_ptr, x_grad_ptr, gate_grad_ptr, weight_sums_ptr, bias_sums_ptr,
    rows, n, grad_stride, x_stride, other_stride, eps,
    FORM: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Programs that go through rows, BLOCK_R at a time, and each write a row of their sums for weight and bias."""
    T: tl.constexpr = x_grad_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_N)[None, :]
    w = tl.full([1, BLOCK_N], 1.0, tl.float32)
    if WEIGHT:
        w = _factor(tl.load(weight_ptr + column, mask=column < n, other=0.0), FORM)
    weight_sums = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    bias_sums = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < rows) & (column < n)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0)
        other = x
        if KIND == _ADD or KIND == _GATED:
            other = tl.load(other_ptr + row * other_stride + column, mask=inside, other=0.0)
        of, by = _part(grad, x, other, KIND, GATE, T)
        g = by * w
        constant = 0.0
        if KIND == _LAYER:
            mean, variance, product, constant = _layer_sums(of, g, inside, n, T)
            of = of - mean
        else:
            squares, products = tl.reduce((of * of, g * of), 1, _add_two)
            variance, product = squares[:, None] / n, products[:, None]
        # Of a row that there is not, which without an eps would be infinitely many times zero.
        scale = tl.where(row < rows, tl.rsqrt(variance + tl.cast(eps, tl.float32)), 0.0)
        h = of * scale
        to = (g - constant - h * (product * scale / n)) * scale
        to, gate_grad = _gradients(to, x, grad, other, h, w, KIND, GATE, T)
        at = row * n + column
        tl.store(x_grad_ptr + at, to.to(T), mask=inside)
        if KIND == _GATED:
            tl.store(gate_grad_ptr + at, gate_grad.to(T), mask=inside)
        if NEEDS_WEIGHT:
            weight_sums += by * h
        if NEEDS_BIAS:
            bias_sums += by
    to_part = tl.program_id(0).to(tl.int64) * n + tl.arange(0, BLOCK_N)
    here = tl.arange(0, BLOCK_N) < n
    if NEEDS_WEIGHT:
        tl.store(weight_sums_ptr + to_part, tl.sum(weight_sums, 0), mask=here)
    if NEEDS_BIAS:
        tl.store(bias_sums_ptr + to_part, tl.sum(bias_sums, 0), mask=here)


@triton.jit
def backward_long_rows(
    grad_ptr, x_ptr, other_ptr, weight_ptr, x_grad_ptr, gate_grad_ptr, found_ptr,
    n, grad_stride, x_stride, other_stride, eps,
    FORM: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row to a program: the input's gradient, and mean and scale for `backward_columns`."""
    T: tl.constexpr = x_grad_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    grad_ptr += row * grad_stride
    other_ptr += row * other_stride
    mean = 0.0
    if KIND == _LAYER:
        sums = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, n, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            sums += tl.load(x_ptr + column, mask=column < n, other=0.0).to(tl.float32)
        mean = tl.sum(sums, 0) / n
    squares = tl.zeros([BLOCK_N], tl.float32)
    products = tl.zeros([BLOCK_N], tl.float32)
    constants = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < n
        x = tl.load(x_ptr + column, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + column, mask=inside, other=0.0)
        other = x
        if KIND == _ADD or KIND == _GATED:
            other = tl.load(other_ptr + column, mask=inside, other=0.0)
        of, by = _part(grad, x, other, KIND, GATE, T)
        if WEIGHT:
            by = by * _factor(tl.load(weight_ptr + column, mask=inside, other=0.0), FORM)
        of = tl.where(inside, of - mean, 0.0)
        squares += of * of
        products += of * by
        constants += by
    variance = tl.sum(squares, 0) / n
    product = tl.sum(products, 0)
    constant = 0.0
    if KIND == _LAYER:
        constant = tl.sum(constants, 0) / n
        if mean * mean > 64.0 * variance:
            off = _mean_away(x_ptr, mean, n, BLOCK_N)
            mean += off
            product -= off * constant * n
            variance = tl.maximum(variance - off * off, 0.0)
    scale = tl.rsqrt(variance + tl.cast(eps, tl.float32))
    back = product * scale / n
    tl.store(found_ptr + 2 * row, mean)
    tl.store(found_ptr + 2 * row + 1, scale)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < n
        x = tl.load(x_ptr + column, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + column, mask=inside, other=0.0)
        other = x
        if KIND == _ADD or KIND == _GATED:
            other = tl.load(other_ptr + column, mask=inside, other=0.0)
        w = tl.full([BLOCK_N], 1.0, tl.float32)
        if WEIGHT:
            w = _factor(tl.load(weight_ptr + column, mask=inside, other=0.0), FORM)
        of, by = _part(grad, x, other, KIND, GATE, T)
        h = (of - mean) * scale
        to = (by * w - h * back - constant) * scale
        to, gate_grad = _gradients(to, x, grad, other, h, w, KIND, GATE, T)
        tl.store(x_grad_ptr + row * n + column, to.to(T), mask=inside)
        if KIND == _GATED:
            tl.store(gate_grad_ptr + row * n + column, gate_grad.to(T), mask=inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def backward_columns(
    grad_ptr, x_ptr, other_ptr, found_ptr, weight_sums_ptr, bias_sums_ptr,
    rows, n, parts, grad_stride, x_stride, other_stride,
    KIND: tl.constexpr, GATE: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N columns, one part of the rows to a program."""
    T: tl.constexpr = x_ptr.dtype.element_ty
    part = tl.program_id(0) % parts
    column = (tl.program_id(0) // parts) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    weight_sums = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    bias_sums = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for tile in range(part, tl.cdiv(rows, BLOCK_R), parts):
        row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < rows) & (column < n)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0)
        other = x
        if KIND == _GATED:
            other = tl.load(other_ptr + row * other_stride + column, mask=inside, other=0.0)
        mean = tl.load(found_ptr + 2 * row, mask=row < rows, other=0.0)
        scale = tl.load(found_ptr + 2 * row + 1, mask=row < rows, other=0.0)
        of, by = _part(grad, x, other, KIND, GATE, T)
        weight_sums += by * ((of - mean) * scale)
        bias_sums += by
    column = (tl.program_id(0) // parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    to_part = part.to(tl.int64) * n + column
    if NEEDS_WEIGHT:
        tl.store(weight_sums_ptr + to_part, tl.sum(weight_sums, 0), mask=column < n)
    if NEEDS_BIAS:
        tl.store(bias_sums_ptr + to_part, tl.sum(bias_sums, 0), mask=column < n)
