"""Ranks that decide together: two and four processes (gloo, this machine), and the protocol alone, in threads.

All cases of one number of processes share one start: each start costs seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernelfiles
import models_for_tests as models
import pytest
import torch
import torch.distributed as dist
from kernels_for_tests import LAYERS
from torch import nn

from kernelhub import KernelizeFallback, LayerRepository, Mode, kernel_report, kernelize, use_kernel_mapping
from kernelhub.errors import InvalidReference, KernelHubError, RankFailed, RanksDisagree
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.layers import ranks as ranks_module
from kernelhub.layers.agreement import agree, check_same, place_of, prove_together
from kernelhub.layers.evidence import Evidence
from kernelhub.layers.outcome import Outcome
from kernelhub.layers.ranks import Ranks, _Session, deciding
from kernelhub.settings import Settings

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

REPO = "org/small"
# A kernel that is equal for some inputs: what ranks see of it depends on what they run it on.
SOMETIMES = """
import torch
from torch import nn


class Gate(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return torch.relu(x) if x.abs().max() < 100 else x
"""
Case = Callable[[int, int], Any]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """What all processes run, each with its rank and the number of them; what it returns is kept for the test."""
    CASES[function.__name__] = function
    return function


# What the cases have


class Group:
    """Where the processes of one start find what they need."""

    scratch: Path
    rank: int
    count = 0
    device = "cpu"  # of the group's collectives


def kernels(layers: str) -> dict[str, dict[str, dict[str, bytes]]]:
    files = {"__init__.py": "from . import layers\n", "layers.py": layers}
    return {REPO: {"torch-cpu": kernelfiles.kernel_files(files)}}


def hub(layers: str = LAYERS, *, own: bool = True, has: bool = True) -> kernelfiles.MemorySource:
    """A fresh default hub; with its own store, or one that all processes of this machine share."""
    Group.count += 1
    source = kernelfiles.MemorySource(kernels(layers) if has else {})
    cache = Group.scratch / f"cache{Group.count}{f'-{Group.rank}' if own else ''}"
    set_default_hub(Hub(Settings(cache=cache, ref_ttl=0.0), sources=[source]))  # each would ask again
    return source


def run(model: nn.Module | None = None, *, layer: str = "RMSNorm", version: str = "v1", **options: Any) -> nn.Module:
    """A small model, kernelized with a kernel for the layers of that name."""
    repository = LayerRepository(f"{REPO}@{version}", layer_name=layer)
    model = models.Model() if model is None else model
    with warnings.catch_warnings(), use_kernel_mapping({layer: {"cpu": {Mode.INFERENCE: repository}}}):
        warnings.simplefilter("ignore")
        return kernelize(model, mode=Mode.INFERENCE, **options)


def reported(model: nn.Module) -> list[list[str]]:
    return [[row.path, row.outcome, row.reason] for row in kernel_report(model).rows]


def told(call: Callable[[], Any]) -> list[Any]:
    """The error that a call raises, as it is raised here; and that its model is what it was."""
    try:
        call()
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        return [type(error).__name__, "\n".join([str(error), *notes])]
    return ["nothing", ""]


# The cases


@case
def agreed(rank: int, size: int) -> Any:
    """Nothing is wrong."""
    source = hub(own=False)
    before = len(source.asked)
    model = run()
    return {"rows": reported(model), "asked": source.asked[before:]}


@case
def one_cannot_load(rank: int, size: int) -> Any:
    hub(has=rank != 1)
    model = models.Model()
    error = told(lambda: run(model))
    allowed = run(use_fallback=KernelizeFallback.ALL)
    return {"error": error, "forward": "forward" in vars(model.norm), "rows": reported(allowed)}


@case
def other_digest(rank: int, size: int) -> Any:
    hub(LAYERS if rank != 1 else LAYERS + "\n# changed\n")
    model = models.Model()
    return {"error": told(lambda: run(model)), "forward": "forward" in vars(model.norm)}


@case
def other_model(rank: int, size: int) -> Any:
    hub()
    return {"error": told(lambda: run(models.Model(layers=3 if rank == 1 else 2)))}


@case
def other_mapping(rank: int, size: int) -> Any:
    hub()
    return {"error": told(lambda: run(version="v1" if rank != 1 else "main"))}


@case
def other_arguments(rank: int, size: int) -> Any:
    hub()
    return {"error": told(lambda: run(on_error="restore" if rank == 1 else "raise"))}


@case
def one_is_switched_off(rank: int, size: int) -> Any:
    hub()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setenv("DISABLE_KERNEL_MAPPING", "1")
        return {"error": told(run)}


@case
def one_argument_is_wrong(rank: int, size: int) -> Any:
    hub()
    return {"error": told(lambda: run(use_fallback="yes" if rank == 1 else True))}


@case
def one_raises_in_verification(rank: int, size: int) -> Any:
    hub()

    def sample(model: nn.Module) -> Any:
        if rank == 1:
            raise ZeroDivisionError("the sample of this rank")
        return model(torch.ones(2, 8))

    model = models.Model()
    error = told(lambda: run(model, sample_inputs=sample, verify=True))
    return {"error": error, "forward": "forward" in vars(model.norm)}


@case
def one_finds_it_different(rank: int, size: int) -> Any:
    hub(SOMETIMES)
    x = torch.full((2, 8), -1000.0 if rank == 1 else -1.0)
    model = run(
        nn.Sequential(nn.Linear(1, 1), models.Gate()), layer="Gate", sample_inputs=lambda m: m[1](x), verify=True
    )
    row = kernel_report(model).rows[0]
    return {"rows": reported(model), "calls": row.calls}


@case
def one_is_alone(rank: int, size: int) -> Any:
    """A model on one rank, with group=False; then one on all of them."""
    hub()
    alone = reported(run(group=False)) if rank == 1 else None
    return {"alone": alone, "together": reported(run())}


@case
def one_does_not_come(rank: int, size: int) -> Any:
    """Nobody waits for ever, the group is usable afterwards, and the next call is in step."""
    hub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELHUB_RANKS_TIMEOUT", "0.3")
        error = told(run) if rank != 1 else None
    value = torch.ones(1, device=Group.device)
    dist.all_reduce(value)
    return {"error": error, "sum": value.item(), "rows": reported(run())}


@case
def the_first_does_not_come(rank: int, size: int) -> Any:
    hub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELHUB_RANKS_TIMEOUT", "0.3")
        error = told(run) if rank != 0 else None
    dist.barrier()
    return {"error": error, "rows": reported(run())}


@case
def a_group_of_some(rank: int, size: int) -> Any:
    """The others may do what they like: these have another model."""
    hub()
    group = dist.new_group([0, 1])
    if rank > 1:
        return {"error": told(lambda: run(group=group)), "rows": None}
    return {"error": None, "rows": reported(run(models.Model(layers=1), group=group))}


def check(name: str, rank: int, size: int) -> Any:
    """One case; what went wrong in it is told to the test, and does not end the others."""
    try:
        return CASES[name](rank, size)
    except BaseException:
        return {"broken": traceback.format_exc()}


def worker(rank: int, size: int, scratch: Path, address: str, names: list[str], backend: str) -> None:
    if backend == "nccl":
        Group.device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    if address.isdigit():
        there = dist.TCPStore("127.0.0.1", int(address), is_master=False)
        dist.init_process_group(backend, store=there, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=size)
    torch.set_num_threads(1)
    os.environ["KERNELHUB_RANKS_TIMEOUT"] = "20"  # what hangs ends soon, as an error
    Group.scratch, Group.rank = scratch, rank
    found = {}
    for name in names:
        found[name] = check(name, rank, size)
        dist.barrier()
    (scratch / f"found{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def start(scratch: Path, size: int, address: str, names: list[str], backend: str = "gloo") -> list[dict[str, Any]]:
    """Run the cases in `size` processes; what each of them found. They are forked from one that has torch already."""
    scratch.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "kernelhub.layers.kernelize", "kernelhub.layers.proof"])
    processes = [
        context.Process(target=worker, args=(rank, size, scratch, address, names, backend), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=90)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    return [json.loads((scratch / f"found{rank}").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four processes found, which meet in a file."""
    folder = tmp_path_factory.mktemp("ranks")
    return start(folder / "four", 4, f"file://{folder}/rendezvous", list(CASES))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, which meet at a port."""
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = ["agreed", "one_cannot_load", "other_digest", "one_raises_in_verification", "one_does_not_come"]
    return start(tmp_path_factory.mktemp("ranks") / "two", 2, str(port.port), names)


@pytest.fixture(params=["two", "four"])
def found(request: pytest.FixtureRequest) -> Callable[[str], list[Any]]:
    """`found("agreed")`: what each process found in that case."""
    return lambda name: _of(request.getfixturevalue(request.param), name)


def _of(found: list[dict[str, Any]], name: str) -> list[Any]:
    of_case = [one[name] for one in found]
    for rank, one in enumerate(of_case):
        assert "broken" not in one, f"rank {rank}: {one['broken']}"
    return of_case


KERNELS = [["layers.0.norm", "kernel", ""], ["layers.1.norm", "kernel", ""], ["norm", "kernel", ""]]


def norms(rows: list[list[str]]) -> list[list[str]]:
    return [row for row in rows if row[0].endswith("norm")]


def test_where_nothing_is_wrong_all_run_kernels_and_one_fetched_them(found: Callable[[str], list[Any]]) -> None:
    ranks = found("agreed")
    assert all(norms(one["rows"]) == KERNELS for one in ranks)
    assert "fetch" in ranks[0]["asked"]
    assert all(one["asked"] == [] for one in ranks[1:]), "the others found it in the store, and asked nobody"


def test_where_one_cannot_load_none_runs_a_kernel(found: Callable[[str], list[Any]]) -> None:
    ranks = found("one_cannot_load")
    for rank, one in enumerate(ranks):
        kind, text = one["error"]
        assert kind == ("KernelNotFound" if rank == 1 else "RankFailed")
        assert "rank 1" in text
        assert f"{REPO}@v1 was not found" in text
        assert not one["forward"]
        expected = [[path, "original"] for path, *_ in KERNELS]
        assert [row[:2] for row in norms(one["rows"])] == expected
        assert all(row[2].startswith(f"rank 1: {REPO}@v1 was not found") for row in norms(one["rows"]))


def test_other_code_on_one_rank_is_an_error_that_names_ranks_and_layers(found: Callable[[str], list[Any]]) -> None:
    ranks = found("other_digest")
    for one in ranks:
        kind, text = one["error"]
        assert kind == "RanksDisagree"
        assert "layers.0.norm: org/small@v1:RMSNorm is sha256-" in text
        assert "on rank 1" in text
        assert not one["forward"]


def test_an_error_in_verification_reaches_every_rank(found: Callable[[str], list[Any]]) -> None:
    for rank, one in enumerate(found("one_raises_in_verification")):
        kind, text = one["error"]
        assert kind == ("ZeroDivisionError" if rank == 1 else "RankFailed")
        assert "the sample of this rank" in text
        assert "rank 1" in text or rank == 1
        assert not one["forward"]


def test_who_does_not_come_is_named_and_the_group_is_usable(found: Callable[[str], list[Any]]) -> None:
    ranks = found("one_does_not_come")
    for rank, one in enumerate(ranks):
        if rank != 1:
            kind, text = one["error"]
            assert kind == "RankFailed"
            assert "rank 1 did not come" in text
            assert "group=False" in text
            assert "KERNELHUB_RANKS_TIMEOUT" in text
        assert one["sum"] == len(ranks)
        assert norms(one["rows"]) == KERNELS


def test_who_waits_for_the_first_says_so(four: list[Any]) -> None:
    for rank, one in enumerate(_of(four, "the_first_does_not_come")):
        if rank:
            assert one["error"][0] == "RankFailed"
            assert "rank 0 did not come" in one["error"][1]
        assert norms(one["rows"]) == KERNELS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("other_model", ["only rank 1: layers.2.norm (Norm, RMSNorm)"]),
        ("other_mapping", [f"only rank 1: RMSNorm: cpu, INFERENCE: {REPO}@main:RMSNorm"]),
        ("other_arguments", ["only rank 1: on_error=restore", "only ranks 0, 2, 3: on_error=raise"]),
        ("one_is_switched_off", ["only rank 1: DISABLE_KERNEL_MAPPING=True"]),
    ],
)
def test_ranks_that_ask_for_different_things_are_told_what(four: list[Any], name: str, expected: list[str]) -> None:
    for one in _of(four, name):
        kind, text = one["error"]
        assert kind == "RanksDisagree"
        for line in expected:
            assert line in text


def test_a_wrong_argument_on_one_rank_ends_all(four: list[Any]) -> None:
    for rank, one in enumerate(_of(four, "one_argument_is_wrong")):
        kind, text = one["error"]
        assert kind == ("InvalidReference" if rank == 1 else "RankFailed")
        assert "use_fallback must be" in text
        assert "rank 1" in text


def test_a_kernel_that_is_not_equal_on_one_rank_runs_on_none(four: list[Any]) -> None:
    rows = [one["rows"] for one in _of(four, "one_finds_it_different")]
    assert all(row == rows[0] for row in rows), "one decision, one report"
    [[_, outcome, reason]] = rows[0]
    assert outcome == "original"
    assert reason.startswith("rank 1: ")
    assert "not equal" in reason
    assert all(one["calls"] for one in _of(four, "one_finds_it_different")), "each keeps what it measured"


def test_a_rank_that_decides_alone_waits_for_nobody(four: list[Any]) -> None:
    for rank, one in enumerate(_of(four, "one_is_alone")):
        assert one["alone"] is None or norms(one["alone"]) == KERNELS
        assert (one["alone"] is not None) == (rank == 1)
        assert norms(one["together"]) == KERNELS


def test_a_group_decides_for_its_own_ranks(four: list[Any]) -> None:
    for rank, one in enumerate(_of(four, "a_group_of_some")):
        if rank > 1:
            assert one["error"][0] == "InvalidReference"
            assert "not in the group" in one["error"][1]
        else:
            assert [row[1] for row in norms(one["rows"])] == ["kernel", "kernel"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_is_the_same_with_nccl(tmp_path: Path) -> None:
    names = ["agreed", "one_cannot_load", "one_does_not_come"]
    found = start(tmp_path / "nccl", 2, f"file://{tmp_path}/rendezvous", names, "nccl")
    assert all(norms(one["rows"]) == KERNELS for one in _of(found, "agreed"))
    assert [one["error"][0] for one in _of(found, "one_cannot_load")] == ["RankFailed", "KernelNotFound"]
    assert [one["sum"] for one in _of(found, "one_does_not_come")] == [2.0, 2.0]


# The protocol, in threads: one store, a session for each rank


def together(size: int, *calls: Callable[[_Session], Any], timeout: float = 5.0, store: Any = None) -> list[Any]:
    """What each rank's call returns or raises; a rank without a call does not come."""
    store = store or dist.HashStore()
    found: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            with _Session(store, tuple(range(size)), rank, timeout) as session:
                found[rank] = calls[rank](session)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(calls)) if calls[rank]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return found


def raising(error: BaseException) -> Callable[[_Session], Any]:
    def call(session: _Session) -> Any:
        raise error

    return call


def saying(*values: Any) -> Callable[[_Session], Any]:
    return lambda session: [session.tell("a step", value) for value in values]


def test_what_each_says_is_told_to_all() -> None:
    found = together(3, saying(1, "a"), saying(2, "b"), saying(3, "c"))
    assert found == [[[(0, 1), (1, 2), (2, 3)], [(0, "a"), (1, "b"), (2, "c")]]] * 3


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [KernelHubError("it broke\nand more"), OSError("it broke"), KeyboardInterrupt()])
def test_an_error_of_one_ends_all_at_their_next_step(failing: int, error: BaseException) -> None:
    calls = [saying(1, 2)] * 3
    calls[failing] = raising(error)
    found = together(3, *calls)
    for rank, one in enumerate(found):
        if rank == failing:
            assert one is error
        else:
            assert isinstance(one, RankFailed)
            assert list(one.failed) == [failing]
            assert one.failed[failing].startswith(type(error).__name__)
            assert "and more" not in str(one)


def test_errors_of_two_are_each_their_own() -> None:
    found = together(3, saying(1), raising(OSError("a")), raising(ValueError("b")))
    assert [type(one) for one in found] == [RankFailed, OSError, ValueError]
    assert found[0].failed == {1: "OSError: a", 2: "ValueError: b"}


def test_a_rank_that_stops_half_way_is_named() -> None:
    """It said something in the first step, and does not come to the second: it was killed, or hangs."""
    found = together(3, saying(1, 2), saying(1, 2), saying(1), timeout=0.3)
    assert [type(found[rank]) for rank in (0, 1)] == [RankFailed, RankFailed]
    assert list(found[1].failed) == [2]
    assert "a step" in str(found[1])


def test_a_call_that_others_did_not_join_leaves_nothing_for_the_next() -> None:
    store = dist.HashStore()
    assert isinstance(together(2, saying(1), timeout=0.1, store=store)[0], RankFailed)
    assert isinstance(together(2, None, saying(1), timeout=0.1, store=store)[1], RankFailed)  # type: ignore[arg-type]
    assert together(2, saying("x"), saying("y"), store=store) == [[[(0, "x"), (1, "y")]]] * 2


def test_a_long_session_leaves_one_small_key() -> None:
    store = dist.HashStore()
    before = store.num_keys()
    for _ in range(3):
        together(3, *[saying(*range(20))] * 3, store=store)
    assert store.num_keys() - before <= 3


def test_only_different_views_are_sent() -> None:
    sent: list[Any] = []

    class Counted(_Session):
        def tell(self, step: str, value: Any) -> list[tuple[int, Any]]:
            sent.append(value)
            return super().tell(step, value)

    def view(text: str) -> Callable[[_Session], Any]:
        def call(session: _Session) -> Any:
            session.__class__ = Counted
            return session.views("views", [text])

        return call

    assert together(3, *[view("same")] * 3) == [[((0, 1, 2), ["same"])]] * 3
    assert ["same"] not in sent
    expected = [((0, 2), ["same"]), ((1,), ["other"])]
    assert together(3, view("same"), view("other"), view("same")) == [expected] * 3
    assert sent.count(["same"]) == 1, "rank 0 says it for rank 2 too"


def test_the_first_of_each_place_works_before_the_others() -> None:
    order: list[int] = []

    def call(session: _Session) -> str:
        def work(first: bool) -> str:
            order.append(session.rank)
            return "first" if first else "later"

        return session.first_at("loading", "ab"[session.rank % 2], work)

    assert together(4, *[call] * 4) == ["first", "first", "later", "later"]
    assert set(order[:2]) == {0, 1}


def test_a_store_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def set(self, *_: Any) -> None:
            raise dist.DistNetworkError("Connection reset by peer")

        delete_key = set

    [error, _] = together(2, saying(1), store=Gone())
    assert isinstance(error, RankFailed)
    assert "cannot reach the store that the ranks share: DistNetworkError: Connection reset" in str(error)


# What is agreed on


class Fixed(Ranks):
    """A rank among others whose views are given."""

    def __init__(self, *views: Any) -> None:
        self._views = views

    @property
    def alone(self) -> bool:
        return False

    def views(self, step: str, value: Any) -> list[tuple[tuple[int, ...], Any]]:
        others = [other(step) if callable(other) else other for other in self._views]
        views = [((0,), value), *(((rank,), view) for rank, view in enumerate(others, 1))]
        return views if any(view != value for _, view in views) else [((0, 1), value)]


def candidate(name: str, digest: str = "sha256-1") -> Any:
    swap = SimpleNamespace(repository=name, layer="L", digest=digest, evidence=Evidence(calls=2))
    return SimpleNamespace(name=name), swap


def outcome(*names: str, reason: str = "") -> Outcome:
    if not names:
        return Outcome("Layer", None, None, reason)
    (kernel, swap), *others = map(candidate, names)
    return Outcome("Layer", kernel, swap, reason, None, tuple(others))


def view(*names: str, reason: str = "") -> list[Any]:
    return [reason, [[name, "L", "sha256-1"] for name in names]]


SITE: Any = SimpleNamespace(path="norm")


def names(outcome: Outcome) -> list[str]:
    kernels = [outcome.kernel, *(kernel for kernel, _ in outcome.others)]
    return [kernel.name for kernel in kernels if kernel is not None]


@pytest.mark.parametrize(
    ("here", "there", "left", "reason"),
    [
        (outcome("a"), view("a"), ["a"], ""),
        (outcome("a", "b"), view("b", "a"), ["a", "b"], ""),
        (outcome("a", "b", "c"), view("c", "b"), ["b", "c"], ""),
        (outcome("a"), view(reason="it is broken"), [], "rank 1: it is broken"),
        (outcome(reason="it is broken"), view("a"), [], "rank 0: it is broken"),
        (outcome(reason="mine"), view(reason="theirs"), [], "mine"),
        (outcome("a"), view("b"), [], "no kernel is on every rank: rank 0 has a, rank 1 has b"),
    ],
)
def test_a_layer_runs_what_every_rank_has(here: Outcome, there: list[Any], left: list[str], reason: str) -> None:
    [found] = agree(Fixed([there]), "loading", [SITE], [here])
    assert names(found) == left
    assert found.reason == reason


def test_the_lowest_ranks_choice_is_looked_at_again_by_all() -> None:
    asked: list[list[str]] = []

    def prove(outcomes: list[Outcome]) -> list[Outcome]:
        asked.append([",".join(names(one)) for one in outcomes])
        return [one._replace(others=()) for one in outcomes]

    def there(step: str) -> Any:
        return [view("b"), view("c")] if step == "comparing kernels" else [view("a"), view()]

    found = prove_together(Fixed(there), [SITE, SITE], [outcome("a", "b"), outcome("c")], prove)
    assert asked == [["a,b", "c"], ["a", ""]]
    assert [names(one) for one in found] == [["a"], ["c"]]


def test_a_choice_that_another_rank_refuses_is_none() -> None:
    def there(step: str) -> Any:
        return [view("b")] if step == "comparing kernels" else [view(reason="not faster")]

    keep = lambda outcomes: [one._replace(others=()) for one in outcomes]  # noqa: E731
    [found] = prove_together(Fixed(there), [SITE], [outcome("a", "b")], keep)
    assert (names(found), found.reason) == ([], "rank 1: not faster")
    assert found.evidence == Evidence(calls=2)


def test_one_repository_with_two_contents_is_an_error() -> None:
    there = [["", [["a", "L", "sha256-2"]]]]
    with pytest.raises(RanksDisagree, match="norm: a is sha256-1 on rank 0, sha256-2 on rank 1") as caught:
        agree(Fixed(there), "loading", [SITE], [outcome("a")])
    assert caught.value.differences == ("norm: a is sha256-1 on rank 0, sha256-2 on rank 1",)


def test_long_differences_are_cut() -> None:
    lines = [f"layer {index}" for index in range(100)]
    with pytest.raises(RanksDisagree, match="only rank 0: 95 more"):
        check_same(Fixed([]), "what is asked for", lambda: lines)
    with pytest.raises(RanksDisagree, match="in another order"):
        check_same(Fixed(lines[::-1]), "what is asked for", lambda: lines)


# Alone


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("group", [None, False])
def test_without_distributed_nobody_is_asked(group: Any) -> None:
    with deciding(group, 0.0) as ranks:
        assert ranks.alone


@pytest.fixture
def single(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/single", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("single")
def test_a_group_of_one_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_Session", None)
    for group in (None, False, dist.group.WORLD):
        with deciding(group, 0.0) as ranks:
            assert ranks.alone


@pytest.mark.usefixtures("single")
def test_what_is_no_group_is_refused() -> None:
    for group, expected in [(True, "is no process group"), (dist.GroupMember.NON_GROUP_MEMBER, "not in the group")]:
        with pytest.raises(InvalidReference, match=expected), deciding(group, 1.0):
            pass


def test_a_group_without_distributed_is_refused() -> None:
    with pytest.raises(InvalidReference, match="not initialised"), deciding("a group", 1.0):
        pass


def test_processes_that_share_a_store_are_at_one_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "store")
    assert place_of(tmp_path / "store") == place_of(tmp_path / "link") == place_of(tmp_path / "a" / ".." / "store")
    assert place_of(tmp_path / "store") != place_of(tmp_path / "other")
