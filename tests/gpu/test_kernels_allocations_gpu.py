"""What the compiled CUDA ops allocate: their results, and what is listed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu.sanitize import PROJECTS
from kernelprojects import load_compiled
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]


def sums_of_blocks(arguments: tuple[Any, ...]) -> int:
    """Gradients of weight and bias: for each, a row of float32 sums of each block that runs at once, and two numbers for each row."""
    x = next(argument for argument in arguments if isinstance(argument, Tensor))
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    blocks = 16 * torch.cuda.get_device_properties("cuda").multi_processor_count
    return 4 * (2 * width * min(rows, blocks) + 2 * rows)


def between(arguments: tuple[Any, ...]) -> int:
    """The product between the two of an MLP, which is no result, and two counters for each 256 rows."""
    x, gate = arguments[:2]
    return x.shape[0] * gate.shape[0] * x.element_size() + 8 * ((x.shape[0] + 255) // 256)


BESIDES: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "rms_norm_backward": sums_of_blocks,
    "rms_norm_gated_backward": sums_of_blocks,
    "layer_norm_backward": sums_of_blocks,
    "added_mlp": between,
    "added_mlp_parts": between,
}


class Counted:
    """An op library whose calls are counted, with what each allocated that it should not have."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.called, self.wrong = ops, set(), []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self.ops, name)

        def call(*arguments: Any) -> Any:
            before = requested()
            result = op(*arguments)
            made = requested() - before
            results = [result] if isinstance(result, Tensor) else list(result or ())
            of_results = sum({x.data_ptr(): x.untyped_storage().nbytes() for x in results}.values())
            most = of_results + BESIDES.get(name, lambda _: 0)(arguments)
            self.called.add(name)
            if not (made <= most if name in BESIDES else made == of_results):
                shapes = [tuple(x.shape) for x in arguments if isinstance(x, Tensor)]
                self.wrong.append(f"{name}{shapes}: {made} bytes, results {of_results}, at most {most}")
            return result

        return call


def requested() -> int:
    """Bytes that have been asked of PyTorch's allocator, ever."""
    return torch.cuda.memory_stats()["requested_bytes.all.allocated"]


DTYPES = (torch.bfloat16, torch.float32)
CASES = [(project, dtype) for project in PROJECTS for dtype in DTYPES[: 1 if project == "decoder" else 2]]


@pytest.mark.parametrize(("project", "dtype"), CASES, ids=str)
def test_ops_allocate_their_results(project: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if project == "decoder" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    ops = Counted(load_compiled(project, request.config).compiled.ops)
    PROJECTS[project](ops, dtype)
    assert ops.called
    assert not ops.wrong, f"{len(ops.wrong)} calls, the first: " + "\n".join(ops.wrong[:10])
