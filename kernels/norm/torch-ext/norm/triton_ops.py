"""The ops of `compiled.py` as Triton kernels, registered when this module is imported, which needs Triton.

How many rows a program has and how many warps is fixed by the length of a row, nothing is tuned: two runs give the same bits.
"""

# Without postponed annotations: PyTorch reads the ops' schemas from them.
# ruff: noqa: ARG005  (what the ops are given and what decides on the shapes is not the same)

import functools
from typing import Any

import torch
from torch import Tensor

from . import triton_kernels as kernels
from ._ops import add_op_namespace_prefix, ops
from .triton_here import launch, register

__all__ = ["probe"]

_ADD, _GATED, _LAYER = 1, 2, 3
_ZERO_CENTERED = 2

# Elements of a row that one program has in registers; longer ones are read twice, in steps of _STEP.
# Of a gated norm's backward, in whose registers two rows more are, 14336 take 5.1 ms as a whole (4096 rows) and 0.3 in steps.
_LONGEST, _LONGEST_BACKWARD, _LONGEST_GATED, _STEP = 32768, 16384, 8192, 4096
# The most warps of a program: a row of 16384 takes 67 us with 16 or 8 on an H200 (4096 rows), 90 with 32. Backwards, where a
# thread has more to hold, rows above 8192 take 170 us with 8 and 175 with 16, a layer norm's 278 and 322.
_WARPS, _WARPS_BACKWARD = 16, 8
# Bytes of shared memory for a backward's rows to come, which any GPU since compute capability 8.0 has.
_AHEAD = 96 << 10
_SHORT = 256


def _block(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile(n: int) -> dict[str, int]:
    """Rows of n elements as one program's tile: at least 1024 elements, 16 to a thread, more in rows above 8192."""
    block = _block(n)
    rows = max(1, 1024 // block)
    return {"BLOCK_R": rows, "BLOCK_N": block, "num_warps": min(max(rows * block // 512, 4), _WARPS)}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 8
    return getattr(torch.get_device_module(device).get_device_properties(device), "multi_processor_count", 128)


def _stages(x: Tensor, tile: dict[str, int], arrays: int) -> int:
    """How many tiles of a backward are on their way at once, those to come in shared memory; of two no use was seen.

    By what an H200 was fastest with: 8192 x 4096 takes 58 us with 4, 69 with 1, but 4096 x 16384 198 and 164. Short rows are
    slower with any (262144 x 128: 106 with 3, 64 with 1).
    """
    block, elements = tile["BLOCK_N"], tile["BLOCK_R"] * tile["BLOCK_N"]
    if block <= _SHORT or elements > 8192 or torch.version.cuda is None:
        return 1
    room = _AHEAD // (arrays * elements * x.element_size())
    return 1 if room < 2 else min(1 + room, 4 if 1024 < elements <= 4096 else 3)


def _rows(x: Tensor) -> tuple[Tensor, Any]:
    """x as rows whose elements lie side by side, and the elements from one row to the next; a copy where there is no other way."""
    n = x.shape[-1]
    if x.is_contiguous():
        return x, n
    flat = x.reshape(-1, n)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _forward(
    x: Tensor, other: Tensor | None, weight: Tensor, eps: float, form: int, kind: int, gate: int
) -> tuple[Tensor, Tensor]:
    y = _new(x)
    total = _new(x) if kind == _ADD else None
    if x.numel() == 0:
        return y, y if total is None else total
    n = int(x.shape[-1])
    rows = x.numel() // n
    x, x_stride = _rows(x)
    other, other_stride = (x, x_stride) if other is None else _rows(other)
    weight = weight.contiguous()
    to = x if total is None else total  # a kernel is given an input where it writes nothing, never one result twice
    if n > _LONGEST:
        launch(
            kernels.rms_long_rows, rows, x, x, other, weight, y, to, n, x_stride, other_stride, eps,
            FORM=form, KIND=kind, GATE=gate, BLOCK_N=_STEP, num_warps=16,
        )  # fmt: skip
        return y, to
    tile = _tile(n)
    launch(
        kernels.rms_rows, _cdiv(rows, tile["BLOCK_R"]), x, x, other, weight, y, to, rows, n, x_stride, other_stride,
        eps, FORM=form, KIND=kind, GATE=gate, **tile,
    )  # fmt: skip
    return y, to


def _cdiv(a: Any, b: int) -> Any:
    return (a + b - 1) // b


def _backward(
    grad: Tensor,
    x: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    eps: float,
    form: int,
    kind: int,
    gate: int,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, the gate, the weight and the bias; those of rows are empty where they are not needed."""
    n = int(x.shape[-1])
    dtype, device = x.dtype, x.device
    x_grad = _new(x)
    gate_grad = _new(x) if kind == _GATED else x
    if x.numel() == 0:
        zeros = [torch.zeros(n if needed else 0, dtype=dtype, device=device) for needed in (needs_weight, needs_bias)]
        return x_grad, gate_grad, zeros[0], zeros[1]
    rows = x.numel() // n
    x, x_stride = _rows(x)
    grad, grad_stride = _rows(grad)
    other, other_stride = (x, x_stride) if other is None else _rows(other)
    weights = x if weight is None else weight.contiguous()
    options = {"KIND": kind, "GATE": gate}
    longest = min(_LONGEST_BACKWARD, _LONGEST_GATED) if kind == _GATED else _LONGEST_BACKWARD
    tile = _tile(min(n, 1024) if n > longest else n)
    if tile["BLOCK_N"] > 8192:
        tile["num_warps"] = _WARPS_BACKWARD
    # Programs that are on the GPU at the same time; each adds up its rows, in their order, and PyTorch the programs.
    computes = kind in (_GATED, _LAYER)  # enough for few programs to keep a multiprocessor busy
    each = (4 if computes and n <= _SHORT else 8) if n <= 1024 else 2 if n <= 2048 else 1
    parts = torch.sym_min(_cdiv(rows, tile["BLOCK_R"]), 64 if n > longest else each * _multiprocessors(device))
    weight_sums, bias_sums = (
        torch.empty((parts if needed else 0, n), dtype=torch.float32, device=device)
        for needed in (needs_weight, needs_bias)
    )
    needs = {"NEEDS_WEIGHT": needs_weight, "NEEDS_BIAS": needs_bias}
    if n > longest:
        found = torch.empty((rows, 2), dtype=torch.float32, device=device)
        launch(
            kernels.backward_long_rows, rows, x, grad, x, other, weights, x_grad, gate_grad, found,
            n, grad_stride, x_stride, other_stride, eps,
            FORM=form, WEIGHT=weight is not None, BLOCK_N=_STEP, num_warps=16, **options,
        )  # fmt: skip
        if needs_weight or needs_bias:
            launch(
                kernels.backward_columns, parts * _cdiv(n, tile["BLOCK_N"]), x, grad, x, other, found, weight_sums, bias_sums,
                rows, n, parts, grad_stride, x_stride, other_stride, **options, **needs, **tile,
            )  # fmt: skip
    else:
        launch(
            kernels.backward_rows, parts, x, grad, x, other, weights, x_grad, gate_grad, weight_sums, bias_sums,
            rows, n, grad_stride, x_stride, other_stride, eps,
            FORM=form, WEIGHT=weight is not None, STAGES=_stages(x, tile, 2 if kind in (0, _LAYER) else 3), **options, **needs, **tile,
        )  # fmt: skip
    weight_grad, bias_grad = (
        sums.sum(0).to(dtype) if needed else torch.empty(0, dtype=dtype, device=device)
        for sums, needed in ((weight_sums, needs_weight), (bias_sums, needs_bias))
    )
    return x_grad, gate_grad, weight_grad, bias_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: int) -> Tensor:
    return _forward(x, None, weight, eps, form, 0, 0)[0]


def rms_norm_backward(
    grad: Tensor, sum_grad: Tensor | None, x: Tensor, weight: Tensor, eps: float, form: int, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    kind = 0 if sum_grad is None else _ADD
    found = _backward(grad, x, sum_grad, weight, eps, form, kind, 0, needs_weight, False)
    return found[0], found[2]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
    return _forward(x, residual, weight, eps, form, _ADD, 0)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, form: int, kind: int) -> Tensor:
    return _forward(x, gate, weight, eps, form, _GATED, kind)[0]


def rms_norm_gated_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    x_grad, gate_grad, weight_grad, _ = _backward(grad, x, gate, weight, eps, 0, _GATED, kind, True, False)
    return x_grad, gate_grad, weight_grad


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = _new(x)
    if x.numel() == 0:
        return y
    n = int(x.shape[-1])
    rows = x.numel() // n
    x, stride = _rows(x)
    weights, biases = (x if row is None else row.contiguous() for row in (weight, bias))
    has = {"WEIGHT": weight is not None, "BIAS": bias is not None}
    if n > _LONGEST:
        launch(
            kernels.layer_long_rows, rows, x, x, weights, biases, y, n, stride, eps, BLOCK_N=_STEP, num_warps=16, **has
        )  # fmt: skip
        return y
    tile = _tile(n)
    launch(
        kernels.layer_rows, _cdiv(rows, tile["BLOCK_R"]), x, x, weights, biases, y, rows, n, stride, eps, **has, **tile
    )  # fmt: skip
    return y


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x_grad, _, weight_grad, bias_grad = _backward(grad, x, None, weight, eps, 0, _LAYER, 0, needs_weight, needs_bias)
    return x_grad, weight_grad, bias_grad


def probe(device: torch.device) -> None:
    """Compile and run the smallest norm."""
    ones = torch.ones(1, 16, dtype=torch.bfloat16, device=device)
    rms_norm(ones, ones[0], 1e-6, 0)
    torch.get_device_module(device).synchronize(device)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _row(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty((x.shape[-1] if wanted else 0,))


# What the ops return, for `torch.compile` and export: contiguous tensors.
_SHAPES = {
    rms_norm: lambda x, *_: _like(x),
    rms_norm_backward: lambda grad, sum_grad, x, weight, eps, form, needed: (_like(x), _row(x, needed)),
    add_rms_norm: lambda x, *_: (_like(x), _like(x)),
    rms_norm_gated: lambda x, *_: _like(x),
    rms_norm_gated_backward: lambda grad, x, *_: (_like(x), _like(x), _row(x, True)),
    layer_norm: lambda x, *_: _like(x),
    layer_norm_backward: lambda grad, x, weight, eps, w, b: (_like(x), _row(x, w), _row(x, b)),
}

for _function, _shapes in _SHAPES.items():
    _name = f"triton_{_function.__name__}"
    if not hasattr(ops, _name):  # it is there where this build was imported before, from another place
        torch.library.triton_op(add_op_namespace_prefix(_name), _function, mutates_args=()).register_fake(_shapes)
    register(_function.__name__, getattr(ops, _name).default, _function)
