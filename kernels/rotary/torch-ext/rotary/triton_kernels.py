"""The rotation as one Triton kernel, over q's heads and k's, and the tables as another."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turned(x, cos, other, sin, one, ROUNDS: tl.constexpr, T: tl.constexpr):
    """x * cos + other * sin, rounded where PyTorch's three operations round.

    Of a product and a sum the compiler would make one operation, which rounds once less, also where the product is rounded
    to 16 bits in between. So the sum is such an operation itself, with a factor of which only the caller knows that it is 1.
    """
    first, second = x * cos, other * sin
    if ROUNDS:
        first, second = first.to(T).to(tl.float32), second.to(T).to(tl.float32)
    return tl.fma(first, tl.zeros_like(first) + tl.cast(one, tl.float32), second).to(T)


@triton.jit
def _heads(
    x_ptr, y_ptr, heads, width, x_head, y_head, cos_first, cos_second, sin_first, sin_second, first_head, rotary, one,
    INTERLEAVED: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token, of which cos and sin are given."""
    T: tl.constexpr = y_ptr.dtype.element_ty
    half = rotary // 2
    head = first_head + tl.arange(0, BLOCK_H)[:, None]
    pair = tl.arange(0, BLOCK_P)[None, :]
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, half + pair
    inside = (head < heads) & (pair < half)
    head = head.to(tl.int64)
    a = tl.load(x_ptr + head * x_head + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + head * x_head + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + head * y_head + first, _turned(a, cos_first, b, -sin_first, one, ROUNDS, T), mask=inside)
    tl.store(y_ptr + head * y_head + second, _turned(b, cos_second, a, sin_second, one, ROUNDS, T), mask=inside)
    for start in range(rotary, width, 2 * BLOCK_P):
        column = start + tl.arange(0, 2 * BLOCK_P)[None, :]
        rest = (head < heads) & (column < width)
        tl.store(
            y_ptr + head * y_head + column, tl.load(x_ptr + head * x_head + column, mask=rest, other=0.0), mask=rest
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def rotate(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, rotary, q_heads, k_heads, q_width, k_width,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    cos_batch, cos_token, sin_batch, sin_token, one,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, ROUNDS: tl.constexpr,
    PAIRED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A token to BLOCK_H heads of q or of k. With PAIRED, cos and sin have one element for each pair."""
    of_q, of_k = tl.cdiv(q_heads, BLOCK_H), tl.cdiv(k_heads, BLOCK_H)
    program = tl.program_id(0) // (of_q + of_k)
    part = tl.program_id(0) % (of_q + of_k)
    batch, token = (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)[None, :]
    half = rotary // 2
    if PAIRED:
        first, second = pair, pair
    elif INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, half + pair
    here = pair < half
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    cos_first = tl.load(cos_ptr + first, mask=here, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + second, mask=here, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + first, mask=here, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + second, mask=here, other=0.0).to(tl.float32)
    # The first of a pair takes -sin of its own place, transposed sin of the other one's.
    if TRANSPOSED:
        sin_first, sin_second = -sin_second, -sin_first
    if INVERSE:
        sin_first, sin_second = -sin_first, -sin_second
    if part < of_q:
        _heads(
            q_ptr + batch * q_batch + token * q_token, q_out_ptr + batch * q_out_batch + token * q_out_token,
            q_heads, q_width, q_head, q_out_head, cos_first, cos_second, sin_first, sin_second, part * BLOCK_H, rotary,
            one, INTERLEAVED, ROUNDS, BLOCK_H, BLOCK_P,
        )  # fmt: skip
    else:
        _heads(
            k_ptr + batch * k_batch + token * k_token, k_out_ptr + batch * k_out_batch + token * k_out_token,
            k_heads, k_width, k_head, k_out_head, cos_first, cos_second, sin_first, sin_second, (part - of_q) * BLOCK_H,
            rotary, one, INTERLEAVED, ROUNDS, BLOCK_H, BLOCK_P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens", "position_batch"])
def tables(
    inv_freq_ptr, positions_ptr, cos_ptr, sin_ptr, rows, tokens, pairs, step, position_batch, position_token, scale,
    LAYOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_R tokens, BLOCK_P of their pairs. LAYOUT is of `tables.py`."""
    T: tl.constexpr = cos_ptr.dtype.element_ty
    parts = tl.cdiv(pairs, BLOCK_P)
    row = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    pair = tl.program_id(0) % parts * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    inside = (row < rows) & (pair < pairs)
    at = row // tokens * position_batch + row % tokens * position_token
    position = tl.load(positions_ptr + at, mask=row < rows, other=0).to(tl.float32)
    angle = position * tl.load(inv_freq_ptr + pair * step, mask=pair < pairs, other=0.0).to(tl.float32)
    # Nothing is added here, so there is nothing that the compiler could round once less.
    factor = tl.cast(scale, tl.float32)
    cos, sin = (tl.cos(angle) * factor).to(T), (tl.sin(angle) * factor).to(T)
    if LAYOUT == 0:
        first, second = row * (2 * pairs) + pair, row * (2 * pairs) + pairs + pair
    elif LAYOUT == 1:
        first, second = row * (2 * pairs) + 2 * pair, row * (2 * pairs) + 2 * pair + 1
    else:
        first, second = row * pairs + pair, row * pairs + pair
    tl.store(cos_ptr + first, cos, mask=inside)
    tl.store(sin_ptr + first, sin, mask=inside)
    if LAYOUT != 2:
        tl.store(cos_ptr + second, cos, mask=inside)
        tl.store(sin_ptr + second, sin, mask=inside)
