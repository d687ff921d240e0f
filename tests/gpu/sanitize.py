"""Calls every CUDA op of norm, activation, rotary, loss and decoder on every path that a shape can take: what compute-sanitizer watches.

    make sanitize-gpu
    python tests/gpu/sanitize.py --cache DIR [--covered] [PROJECT ...]

With `--covered` nothing is watched; the calls are profiled, and the end is an error where a kernel of the sources was not
among what ran. Inputs are copied from the CPU and nothing but the ops runs between, so that all they read was written by a
copy or by them, which initcheck sees though it is told to look at no kernel but these.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import kernelhub
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.settings import Settings

KERNELS = Path(__file__).parents[2] / "kernels"
# Rows and widths: empty, one element, tails, several rows to a warp, rows in one to eight packs to a thread, few and many of
# them, rows too long for registers, aligned and not.
SHAPES = (
    (0, 64), (1, 1), (67, 7), (3, 65), (700, 128), (3, 1000), (1, 4096), (70, 4096), (601, 2048), (601, 4096), (600, 5120),
    (600, 8192), (530, 16384), (530, 20480), (5, 16392), (3, 40004), (2, 131072), (2, 131075),
)  # fmt: skip
SOME = ((67, 7), (700, 128), (1, 4096), (601, 2048), (600, 4096), (3, 40004))


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """On the GPU by a copy, in memory of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to("cuda")


def shapes(dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    return SHAPES if dtype is torch.bfloat16 else SOME


def laid(shape: tuple[int, int, int], dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Three tensors of a shape by other strides: rows in another order, not aligned, one row again and again.

    None whose elements lie apart: those PyTorch copies first.
    """
    a, b, c = shape
    wholes = [numbers(b, a, 2 * c, dtype=dtype, seed=seed) for seed in range(3)]
    for view in (
        lambda x: x[:, :, :c].transpose(0, 1),
        lambda x: x[:, :, 1 : c + 1].transpose(0, 1),
        lambda x: x[:1, :, c:].transpose(0, 1).expand(shape),
    ):
        yield tuple(view(whole) for whole in wholes)


def norm(ops: Any, dtype: torch.dtype) -> None:
    def every(x: Tensor, other: Tensor, grad: Tensor) -> None:
        w, b = (numbers(x.shape[-1], dtype=dtype, seed=seed) for seed in (3, 4))
        for form in range(3):
            ops.rms_norm(x, w, 1e-6, form)
            ops.rms_norm_backward(grad, None, x, w, 1e-6, form, form != 1)
        ops.add_rms_norm(x, other, w, 1e-6, 0)
        ops.rms_norm_backward(grad, other, x, w, 1e-6, 0, True)
        for form, gate in ((0, 1), (1, 2), (0, 3)):
            ops.rms_norm_gated(x, other, w, 1e-6, form, gate)
            ops.rms_norm_gated_backward(grad, x, other, w, 1e-6, gate)
        ops.layer_norm(x, w, b, 1e-5)
        ops.layer_norm(x, None, None, 1e-5)
        ops.layer_norm_backward(grad, x, w, 1e-5, True, True)
        ops.layer_norm_backward(grad, x, None, 1e-5, False, False)

    for rows, width in shapes(dtype):
        every(*(numbers(rows, width, dtype=dtype, seed=seed) for seed in range(3)))
    for width in (40, 96):
        for operands in laid((5, 6, width), dtype):
            every(*operands)
    # More rows than four times the second cache holds, which are read twice
    if dtype is torch.bfloat16:
        for width in (8192, 12288, 16384):
            row = numbers(1, width, dtype=dtype)
            rows = 4 * torch.cuda.get_device_properties("cuda").L2_cache_size // (width * dtype.itemsize) + 1
            ops.rms_norm(row.expand(rows, -1), row[0], 1e-6, 0)
    # Rows whose mean is far from zero, of which the layer norm has another sum: eight and eight. Where rows of one block differ,
    # racecheck reports what only `__syncthreads` separates, in any kernel whose warps waited unequally often at named barriers.
    far = torch.randn(600, 4096, generator=torch.Generator().manual_seed(5))
    far[torch.arange(600) % 16 < 8] += 100
    far = far.to(dtype).to("cuda")
    for some in (far, far[:, :2048], far[:, :128], far[:, :70]):
        ops.layer_norm(some, None, None, 1e-5)
        ops.layer_norm_backward(some, some, None, 1e-5, True, True)


def activation(ops: Any, dtype: torch.dtype) -> None:
    def every(a: Tensor, b: Tensor, grad: Tensor, x: Tensor) -> None:
        for function in range(4):
            ops.apply(a, function)
            ops.apply_backward(grad, a, function)
            ops.multiply(a, b, function)
            ops.multiply_backward(grad, a, b, function)
            ops.multiply_backward_result(grad, a, b, function)
            ops.halves(x, function)
            ops.halves_backward(grad, x, function)
            ops.halves_backward_result(grad, x, function)

    for rows, width in (*SOME, (0, 64), (1, 1), (1, 14336), (70, 1001), (70, 14336)):
        x = numbers(rows, 2 * width, dtype=dtype, seed=3)
        every(*(numbers(rows, width, dtype=dtype, seed=seed) for seed in range(3)), x)
    for a, b, width in ((5, 6, 33), (5, 6, 96), (50, 60, 512)):
        for operands in laid((a, b, width), dtype):
            every(*operands, numbers(b, a, 2 * width, dtype=dtype).transpose(0, 1))


def rotary(ops: Any, dtype: torch.dtype) -> None:
    for tokens, width, turned in (
        (1, 128, 128),
        (5, 128, 128),
        (700, 128, 128),
        (200, 80, 80),
        (9, 64, 32),
        (300, 48, 16),
        (7, 6, 6),
        (0, 64, 64),
    ):
        q, k = (numbers(2, tokens, heads, width, dtype=dtype, seed=heads).transpose(1, 2) for heads in (5, 2))
        for table, form in ((dtype, 0), (dtype, 8), (torch.float32, 8)):
            cos, sin = (numbers(2, tokens, turned, dtype=table, seed=seed) for seed in (1, 2))
            for bits in range(8):  # interleaved, inverse, transposed
                ops.rotate(q, k, cos, sin, 1, turned, form | bits)
            ops.rotate(q, k, cos[:1, :, : turned // 2], sin[:1, :, : turned // 2], 1, turned, form)
            ops.rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2, turned, form)
        apart = numbers(2, 7, tokens, 2 * width + 1, dtype=dtype)
        some = apart[:, :5, :, 1 : width + 1], apart[:, 5:, :, width:-1]
        ops.rotate(*some, *(numbers(1, tokens, turned, dtype=dtype, seed=seed) for seed in (1, 2)), 1, turned, 0)
        # q, k and v of one product, and tokens inside heads
        whole, tables = (
            numbers(2, tokens, 9, width, dtype=dtype),
            [numbers(2, tokens, turned, dtype=dtype) for _ in range(2)],
        )
        for bits in range(8):
            ops.rotate(whole[:, :, :5], whole[:, :, 5:7], *tables, 2, turned, bits)
        whole = numbers(2, 7, tokens, width, dtype=dtype)
        ops.rotate(whole[:, :5], whole[:, 5:], *tables, 1, turned, 0)
    many = numbers(65537, 1, 1, 32, dtype=dtype)  # more batches than a grid has
    ops.rotate(many, many, *(numbers(1, 1, 32, dtype=dtype, seed=seed) for seed in (1, 2)), 1, 32, 0)
    for batch, tokens, pairs in ((1, 1, 64), (2, 7, 3), (1, 3000, 64), (3, 1, 20), (2, 40000, 5), (1, 0, 8), (1, 5, 0)):
        inv_freq, to = numbers(2 * pairs, dtype=dtype), {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
        some = torch.arange(2 * batch * tokens).reshape(2 * tokens, batch).t() * 37
        for positions in (some.to("cuda"), some.int().to("cuda"), some[:1].to("cuda").expand(batch, -1)):
            for layout in range(3):
                ops.tables(inv_freq[:pairs], positions[:, :tokens], 1.0, to, layout)
                ops.tables(inv_freq[::2], positions[:, ::2], 1.25, to, layout)


def loss(ops: Any, dtype: torch.dtype) -> None:
    for rows, classes in ((0, 10), (1, 1), (7, 33), (300, 1000), (67, 1001), (40, 32000), (5, 128256), (3, 32001)):
        logits = numbers(rows, 2 * classes, dtype=dtype)[:, :classes]
        labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(1))
        labels[rows // 2 : rows // 2 + 1] = -100
        labels = labels.to("cuda")
        grad = torch.ones(rows).to("cuda")
        for x in (logits, numbers(rows, classes, dtype=dtype)):
            for options in ((-100, 0.0, 0.0), (-100, 0.1, 1e-3)):
                losses, sums = ops.cross_entropy(x, labels, *options)
                ops.cross_entropy_backward(grad, x, labels, sums, *options)
                if x.is_contiguous():
                    ops.cross_entropy_gradient_(x, labels, losses, *options)
                    ops.scale_(x, torch.full((), 0.5).to("cuda"))


def decoder(ops: Any, dtype: torch.dtype) -> None:
    if dtype is torch.float32 or not hasattr(ops, "gated_product"):  # other GPUs have the noarch variant
        return
    for rows, depth, columns in (
        (0, 64, 128),
        (1, 8, 8),
        (257, 200, 136),
        (600, 2048, 1000),
        (5000, 72, 384),
        (2000, 1800, 1024),
    ):
        x, gate, up = (numbers(n, depth, dtype=dtype, seed=n) for n in (rows, columns, columns))
        for function in (0, 2):
            ops.gated_product(x, gate, up, function)
            ops.gated_product_parts(x, gate, up, function)
        residual = numbers(rows, columns, dtype=dtype)
        ops.add_product(x, gate, residual)
        down, added = numbers(depth, columns, dtype=dtype), numbers(rows, depth, dtype=dtype)
        for function in (0, 2):
            ops.added_mlp(x, gate, up, down, added, function)
            ops.added_mlp_parts(x, gate, up, down, added, function)
        turned, factor = numbers(depth, columns, dtype=dtype), numbers(rows, columns, dtype=dtype, seed=1)
        for function in (0, 2):
            for again in (True, False):
                ops.gated_gradients(x, turned, residual, factor, function, again)
    for batches, tokens, depth, of_q, of_k, head_dim in (
        (0, 5, 64, 1, 1, 64), (1, 1, 8, 1, 1, 64), (2, 150, 200, 5, 2, 64), (1, 300, 72, 3, 1, 128), (3, 700, 136, 14, 2, 128),
        (1, 333, 200, 3, 1, 256), (4, 1000, 576, 14, 2, 64),
    ):  # fmt: skip
        q, k, v = (numbers(heads * head_dim, depth, dtype=dtype, seed=heads) for heads in (of_q, of_k, of_k))
        bias = numbers(of_k * head_dim, dtype=dtype)
        for tables in (1, batches):
            cos, sin = (numbers(tables, tokens, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
            x = numbers(batches, tokens, depth, dtype=dtype)
            ops.rotary_projections(x, q, None, k, bias, v, None, cos, sin, head_dim)


PROJECTS: dict[str, Callable[[Any, torch.dtype], None]] = {
    "norm": norm, "activation": activation, "rotary": rotary, "loss": loss, "decoder": decoder,
}  # fmt: skip


def kernels_of(project: str) -> set[str]:
    """The names of the kernels in a project's CUDA sources."""
    found: set[str] = set()
    for path in (KERNELS / project / f"{project}_cuda").iterdir():
        if path.suffix in (".cu", ".cuh"):
            found |= set(re.findall(r"__global__ void (?:__\w+__\([^{;]*?\)\s+)*(\w+)\(", path.read_text()))
    return found


def run(modules: dict[str, ModuleType]) -> None:
    for project, module in modules.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            PROJECTS[project](module.compiled.ops, dtype)
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projects", nargs="*", metavar="PROJECT", help=f"of {', '.join(PROJECTS)}; without, all")
    parser.add_argument("--cache", type=Path, required=True, help="where the built kernels are kept")
    parser.add_argument("--covered", action="store_true", help="look which kernels run, without compute-sanitizer")
    options = parser.parse_args()
    unknown = [name for name in options.projects if name not in PROJECTS]
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}; expected some of {', '.join(PROJECTS)}")
    set_default_hub(Hub(settings=Settings(cache=options.cache, offline=True, build="always")))
    modules = {name: kernelhub.get_kernel(f"kernelhub/{name}", version=1) for name in options.projects or PROJECTS}
    if not options.covered:
        run(modules)
        sys.stdout.write(f"all ops called: {', '.join(modules)}\n")
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(modules)
    ran = " ".join({event.name for event in profile.events()})
    missing = sorted(
        f"{project}: {name}"
        for project in modules
        for name in kernels_of(project)
        if not re.search(rf"\b{name}\b", ran)
    )
    ran_too = sum(len(kernels_of(project)) for project in modules) - len(missing)
    sys.stdout.write(f"{ran_too} kernels ran; not run: {', '.join(missing) or 'none'}\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
