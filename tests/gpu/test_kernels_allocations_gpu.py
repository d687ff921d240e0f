"""What the compiled CUDA ops allocate: their results, and what is listed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu.watched import CASES, Arguments, Op, described, tensors_of, watch_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]


def sums_of_blocks(arguments: Arguments) -> int:
    """Gradients of weight and bias: for each, a row of float32 sums of each block that runs at once, and two numbers for each row."""
    x = tensors_of(arguments)[0]
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    blocks = 16 * torch.cuda.get_device_properties("cuda").multi_processor_count
    return 4 * (2 * width * min(rows, blocks) + 2 * rows)


def between(arguments: Arguments) -> int:
    """The product between the two of an MLP, which is no result, and two counters for each 256 rows."""
    x, gate = arguments[:2]
    return x.shape[0] * gate.shape[0] * x.element_size() + 8 * ((x.shape[0] + 255) // 256)


BESIDES: dict[str, Callable[[Arguments], int]] = {
    "rms_norm_backward": sums_of_blocks,
    "rms_norm_gated_backward": sums_of_blocks,
    "layer_norm_backward": sums_of_blocks,
    "added_mlp": between,
    "added_mlp_parts": between,
}


def requested() -> int:
    """Bytes that have been asked of PyTorch's allocator, ever."""
    return torch.cuda.memory_stats()["requested_bytes.all.allocated"]


@pytest.mark.parametrize(("project", "dtype"), CASES, ids=str)
def test_ops_allocate_their_results(project: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    wrong: list[str] = []

    def watch(name: str, op: Op, arguments: Arguments) -> Any:
        before = requested()
        results = op(*arguments)
        made = requested() - before
        of_results = sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(results)}.values())
        most = of_results + BESIDES.get(name, lambda _: 0)(arguments)
        if not (made <= most if name in BESIDES else made == of_results):
            wrong.append(f"{described(name, arguments)}: {made} bytes, results {of_results}, at most {most}")
        return results

    watch_all(project, dtype, request.config, watch)
    assert not wrong, f"{len(wrong)} calls, the first: " + "\n".join(wrong[:10])
