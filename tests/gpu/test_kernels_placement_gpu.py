"""Where and when the compiled CUDA ops run: on their tensors' GPU and its current stream, in graphs, to the same bits each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gpu.watched import CASES, Arguments, Op, described, tensors_of, watch_all
from kernelfunctions import FUNCTIONS
from kernelprojects import load_compiled
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # of ops that have nothing to do
]

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Copy:
    """Arguments whose tensors lie as the given ones do, strides, alignment and shared memory included, in memory of their own."""

    def __init__(self, arguments: Arguments, device: str = "cuda:0") -> None:
        self.memory: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.arguments = tuple(self._of(x, device) if isinstance(x, Tensor) else x for x in arguments)

    def _of(self, x: Tensor, device: str) -> Tensor:
        storage = x.untyped_storage()
        key = storage.data_ptr(), x.dtype  # nothing has no address
        if key not in self.memory:
            whole = x.detach().as_strided((storage.nbytes() // x.element_size(),), (1,), 0)
            self.memory[key] = whole, whole.to(device, copy=True)
        return self.memory[key][1].as_strided(x.shape, x.stride(), x.storage_offset())

    def clear(self) -> None:
        for _, own in self.memory.values():
            own.zero_()

    def fill(self) -> None:
        for given, own in self.memory.values():
            own.copy_(given)


def run(op: Op, copy: Copy) -> list[Tensor]:
    """What the op returns, and then its tensors, some of which it may have written to."""
    results = op(*copy.arguments)
    return tensors_of(results) + tensors_of(copy.arguments)


def again(op: Op, arguments: Arguments, cycles: int) -> list[Tensor]:
    first, *others = (run(op, Copy(arguments)) for _ in range(4))
    for other in others:
        assert_same(other, first)
    return first


def on_a_stream(op: Op, arguments: Arguments, cycles: int, device: int = 0, current: int = 0) -> list[Tensor]:
    """Behind work that takes longer than to start the op does, on a stream of its own: only then the inputs are there.

    It is a stream of the tensors' GPU, on which nothing can be started for another; and nothing is allocated on another.
    """
    here = f"cuda:{device}"
    late = Copy(Copy(arguments, here).arguments, here)
    late.clear()
    others = [gpu for gpu in range(torch.cuda.device_count()) if gpu != device]
    for gpu in (device, *others):
        torch.cuda.synchronize(gpu)
    before = [torch.cuda.memory_stats(gpu).get("requested_bytes.all.allocated", 0) for gpu in others]
    with torch.cuda.stream(torch.cuda.Stream(here)):
        torch.cuda._sleep(cycles)
        late.fill()
        with torch.cuda.device(current):
            found = run(op, late)
            assert torch.cuda.current_device() == current
    torch.cuda.synchronize(device)
    assert [torch.cuda.memory_stats(gpu).get("requested_bytes.all.allocated", 0) for gpu in others] == before
    assert all(x.device.index == device for x in found)
    return found


def captured(op: Op, arguments: Arguments, cycles: int) -> list[Tensor]:
    """Replayed twice, of inputs that were not there when it was captured, into results that hold something else."""
    later = Copy(arguments)
    later.clear()
    if torch.cuda.memory_reserved() > 4 << 30:  # each graph has memory of its own
        torch.cuda.empty_cache()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):  # `torch.cuda.graph` empties the allocator's cache first, each time
        graph.capture_begin()
        try:
            found = run(op, later)
        finally:
            graph.capture_end()
    results = found[: len(found) - len(tensors_of(later.arguments))]
    for _ in range(2):
        for x in results:
            x.detach().view(BITS[x.element_size()]).fill_(-1)
        later.fill()  # after that: a result may lie in an argument's memory
        graph.replay()
    torch.cuda.synchronize()
    return found


def on_another_gpu(op: Op, arguments: Arguments, cycles: int, device: int, current: int) -> list[Tensor]:
    if torch.cuda.get_device_name(1) != torch.cuda.get_device_name(0):
        pytest.skip("needs two GPUs of one kind")
    return on_a_stream(op, arguments, cycles, device, current)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
WAYS: dict[str, Callable[[Op, Arguments, int], list[Tensor]]] = {
    "again": again,
    "on a stream": on_a_stream,
    "captured": captured,
    "on another GPU": partial(on_another_gpu, device=1, current=0),
    "on another GPU, the current one": partial(on_another_gpu, device=1, current=1),
    "beside another GPU, the current one": partial(on_another_gpu, device=0, current=1),
}


def bits(x: Tensor) -> Tensor:
    return x.detach().view(BITS[x.element_size()]).to("cuda:0")


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(bits(a), bits(b))


def assert_same(found: list[Tensor], expected: list[Tensor], what: object = "") -> None:
    assert len(found) == len(expected), what
    assert all(map(same, found, expected)), what


every_way = pytest.mark.parametrize("way", [pytest.param(way, marks=two_gpus if "GPU" in way else ()) for way in WAYS])


@every_way
@pytest.mark.parametrize(("project", "dtype"), CASES, ids=str)
def test_gives_the_same_bits(project: str, dtype: torch.dtype, way: str, request: pytest.FixtureRequest) -> None:
    def watch(name: str, op: Op, arguments: Arguments) -> Any:
        expected = run(op, Copy(arguments))
        assert_same(WAYS[way](op, arguments, 4_000_000), expected, described(name, arguments))
        return op(*arguments)

    watch_all(project, dtype, request.config, watch)


@every_way
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_their_gradients_give_the_same_bits(
    name: str, way: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = FUNCTIONS[name]
    module = load_compiled(of.project, request.config)
    if name == "linear_cross_entropy":
        monkeypatch.setattr(module.functions.projection, "_FEW", 0)  # 700 rows in eleven parts
    step = of.step(module)
    for rows in (5, 700):
        arguments = of.arguments(rows, "cuda")
        expected = run(step, Copy(arguments))
        assert_same(WAYS[way](step, arguments, 100_000_000), expected, rows)


@pytest.mark.parametrize("elsewhere", ["cpu", pytest.param("cuda:1", marks=two_gpus)])
@pytest.mark.parametrize(("project", "dtype"), CASES, ids=str)
def test_refuses_tensors_on_two_devices(
    project: str, dtype: torch.dtype, elsewhere: str, request: pytest.FixtureRequest
) -> None:
    """Whichever of them is not on the others' GPU."""
    asked: set[tuple[str, tuple[int, ...]]] = set()

    def watch(name: str, op: Op, arguments: Arguments) -> Any:
        places = tuple(place for place, x in enumerate(arguments) if isinstance(x, Tensor))
        if (name, places) not in asked and len(places) > 1 and all(arguments[place].numel() for place in places):
            asked.add((name, places))
            others = Copy(arguments, elsewhere).arguments
            for place in places:
                with pytest.raises(RuntimeError, match=r"one device|one GPU"):
                    op(*arguments[:place], others[place], *arguments[place + 1 :])
        return op(*arguments)

    watch_all(project, dtype, request.config, watch)
