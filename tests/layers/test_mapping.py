"""Devices, repositories, and which registration serves a layer."""

from __future__ import annotations

import asyncio
import pickle
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelhub.errors import InvalidReference
from kernelhub.layers.device import CUDAProperties, Device, ROCMProperties
from kernelhub.layers.mapping import (
    NoRow,
    Row,
    choose,
    current_table,
    merge,
    parse,
    register_kernel_mapping,
    use_kernel_mapping,
)
from kernelhub.layers.mode import KernelizeFallback, Mode, serving
from kernelhub.layers.repositories import (
    FuncRepository,
    LayerRepository,
    LocalFuncRepository,
    LocalLayerRepository,
    LockedFuncRepository,
    LockedLayerRepository,
)

pytestmark = pytest.mark.usefixtures("hub")

MODES = (
    Mode.FALLBACK,
    Mode.INFERENCE,
    Mode.INFERENCE | Mode.TORCH_COMPILE,
    Mode.TRAINING,
    Mode.TRAINING | Mode.TORCH_COMPILE,
)


def repo(name: str = "norm", version: int = 1) -> LayerRepository:
    return LayerRepository(f"org/{name}", layer_name="Norm", version=version)


def chosen(mapping: dict, device: str = "cuda", capability: int | None = 90, mode: Mode = Mode.INFERENCE) -> object:
    found = choose("Norm", parse({"Norm": mapping})["Norm"], device, capability, mode)
    return found.repository if isinstance(found, Row) else found.case


# Values


def test_devices_are_the_known_types_and_properties_belong_to_theirs() -> None:
    assert [Device(kind).type for kind in ["cpu", "cuda", "rocm", "mps", "xpu", "npu", "neuron", "tpu"]]
    for make in (
        lambda: Device("gpu"),
        lambda: Device("cpu", CUDAProperties(80, 90)),
        lambda: Device("cuda", ROCMProperties(90, 94)),
        lambda: CUDAProperties(90, 80),
        lambda: CUDAProperties(8.0, 9.0),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidReference):
            make()
    assert Device("cuda", CUDAProperties(75, 89)) == Device(
        "cuda", CUDAProperties(min_capability=75, max_capability=89)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: LayerRepository("org/norm", layer_name=layer, version=1, trust_remote_code=["org/norm"]),
        lambda layer: FuncRepository("org/norm@main", func_name=layer),
        lambda layer: LocalLayerRepository(Path("/kernels/norm"), layer_name=layer),
        lambda layer: LocalFuncRepository(Path("/kernels/norm"), func_name=layer),
        lambda layer: LockedLayerRepository("org/norm", lockfile=Path("/x/kernels.lock"), layer_name=layer),
        lambda layer: LockedFuncRepository("org/norm", func_name=layer),
    ],
)
def test_repositories_compare_and_hash_by_value_and_pickle(make: object) -> None:
    one, same, other = make("A"), make("A"), make("B")  # type: ignore[operator]
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert len({one, same, other}) == 2
    assert pickle.loads(pickle.dumps(one)) == one
    assert str(one).endswith(":A")


def test_a_layer_and_a_function_of_one_name_are_different() -> None:
    assert LayerRepository("o/n", layer_name="A", version=1) != FuncRepository("o/n", func_name="A", version=1)


def test_the_user_agent_is_no_part_of_a_repositorys_value() -> None:
    with_agent = LayerRepository("org/norm", layer_name="Norm", version=1, user_agent={"app": "1"})
    assert with_agent == repo()
    assert hash(with_agent) == hash(repo())


def test_a_repository_that_cannot_be_is_an_error_where_it_is_written() -> None:
    for make in (
        lambda: LayerRepository("org/norm", layer_name="Norm"),
        lambda: LayerRepository("org/norm", layer_name="Norm", version=1, revision="main"),
        lambda: LayerRepository("norm", layer_name="Norm", version=1),
        lambda: LayerRepository("org/norm", layer_name="Norm", version=1, trust_remote_code="org/norm"),  # type: ignore[arg-type]
        lambda: LockedLayerRepository("norm", layer_name="Norm"),
    ):
        with pytest.raises(ValueError):
            make()


# The table of modes


@pytest.mark.parametrize("asked", [mode for mode in MODES if mode is not Mode.FALLBACK], ids=str)
def test_of_what_is_registered_the_first_of_the_row_serves(asked: Mode) -> None:
    """Every registration is taken away in turn, best first: the next one of the row serves, and at the end none."""
    left = {mode: repo(f"k{mode.value}") for mode in MODES}
    for expected in serving(asked):
        assert chosen({"cuda": left}, mode=asked) == repo(f"k{expected.value}")
        del left[expected]
    assert chosen({"cuda": left}, mode=asked) in (KernelizeFallback.NO_COMPATIBLE_MODE, KernelizeFallback.NO_LAYER)
    assert (chosen({"cuda": left}, mode=asked) is KernelizeFallback.NO_LAYER) == (not left)


def test_a_repository_without_a_mode_is_a_fallback() -> None:
    assert [str(row.mode) for row in parse({"Norm": {"cuda": repo()}})["Norm"]] == ["FALLBACK"]


# Devices and capabilities


def test_of_several_ranges_the_narrowest_that_holds_the_device_wins() -> None:
    mapping = {
        "cuda": repo("any"),
        Device("cuda", CUDAProperties(70, 100)): repo("wide"),
        Device("cuda", CUDAProperties(86, 90)): repo("narrow"),
        Device("cuda", CUDAProperties(100, 100)): repo("other"),
    }
    assert chosen(mapping, capability=90) == repo("narrow")
    assert chosen(mapping, capability=86) == repo("narrow")
    assert chosen(mapping, capability=91) == repo("wide")
    assert chosen(mapping, capability=100) == repo("other")
    assert chosen(mapping, capability=120) == repo("any")
    assert chosen(mapping, capability=None) == repo("any")


def test_of_equal_ranges_the_newest_wins() -> None:
    older, newer = Device("cuda", CUDAProperties(80, 90)), Device("cuda", CUDAProperties(85, 95))
    assert chosen({older: repo("older"), newer: repo("newer")}) == repo("newer")
    assert chosen({newer: repo("newer"), older: repo("older")}) == repo("older")


def test_a_narrow_range_that_does_not_serve_the_mode_leaves_it_to_a_wider_one() -> None:
    mapping = {
        "cuda": {Mode.TRAINING: repo("wide")},
        Device("cuda", CUDAProperties(90, 90)): {Mode.INFERENCE: repo("narrow")},
    }
    assert chosen(mapping, mode=Mode.INFERENCE) == repo("narrow")
    assert chosen(mapping, mode=Mode.TRAINING) == repo("wide")


def test_each_way_of_having_no_kernel_is_told_apart() -> None:
    ranged = {Device("cuda", CUDAProperties(80, 90)): {Mode.INFERENCE: repo()}}
    assert chosen(ranged, device="rocm") is KernelizeFallback.NO_DEVICE
    assert chosen(ranged, capability=75) is KernelizeFallback.NO_COMPATIBLE_PROPERTIES
    assert chosen(ranged, capability=None) is KernelizeFallback.NO_COMPATIBLE_PROPERTIES
    assert chosen(ranged, mode=Mode.TRAINING) is KernelizeFallback.NO_COMPATIBLE_MODE
    missing = choose("Norm", (), "cuda", 90, Mode.INFERENCE)
    assert isinstance(missing, NoRow)
    assert missing.case is KernelizeFallback.NO_LAYER


ranges = st.tuples(st.integers(50, 120), st.integers(0, 40)).map(lambda pair: CUDAProperties(pair[0], sum(pair)))
rows = st.lists(st.tuples(st.one_of(st.none(), ranges), st.sampled_from(MODES)), max_size=8)


@given(rows, st.integers(50, 160), st.sampled_from(MODES[1:]))
def test_what_is_chosen_holds_the_device_serves_the_mode_and_is_the_narrowest(
    registered: list[tuple[CUDAProperties | None, Mode]], capability: int, asked: Mode
) -> None:
    table = parse({})
    for number, (properties, mode) in enumerate(registered):
        table = merge(table, parse({"Norm": {Device("cuda", properties): {mode: repo(f"k{number}")}}}))
    found = choose("Norm", table.get("Norm", ()), "cuda", capability, asked)
    fit = [
        row
        for row in table.get("Norm", ())
        if (row.device.properties is None or row.device.properties.holds(capability)) and row.mode in serving(asked)
    ]
    assert isinstance(found, Row) == bool(fit)
    if isinstance(found, Row):
        assert found in fit
        assert found.width == min(row.width for row in fit)


# Registering


def test_registering_adds_and_replaces_only_the_same_layer_device_range_and_mode() -> None:
    """needs 18: the order of registrations and imports does not drop anything."""
    register_kernel_mapping({"Norm": {"cuda": {Mode.INFERENCE: repo("a")}}})
    register_kernel_mapping({"Norm": {"cuda": {Mode.TRAINING: repo("b")}, "cpu": repo("c")}})
    register_kernel_mapping({"Norm": {Device("cuda", CUDAProperties(90, 90)): repo("d")}, "Other": {"cpu": repo("e")}})
    register_kernel_mapping({"Norm": {"cuda": {Mode.INFERENCE: repo("f")}}})
    found = {(str(row.device), str(row.mode)): row.repository for row in current_table()["Norm"]}
    assert found == {
        ("cuda", "TRAINING"): repo("b"),
        ("cpu", "FALLBACK"): repo("c"),
        ("cuda 90 to 90", "FALLBACK"): repo("d"),
        ("cuda", "INFERENCE"): repo("f"),
    }
    register_kernel_mapping({"Norm": {"cpu": repo("g")}}, inherit_mapping=False)
    assert dict(current_table()) == {"Norm": parse({"Norm": {"cpu": repo("g")}})["Norm"]}


def test_a_context_lays_its_registrations_over_the_global_ones_and_takes_them_away() -> None:
    register_kernel_mapping({"Norm": {"cpu": repo("global")}})
    with use_kernel_mapping({"Other": {"cpu": repo("inner")}}):
        assert set(current_table()) == {"Norm", "Other"}
        with use_kernel_mapping({"Norm": {"cpu": repo("innermost")}}):
            assert [row.repository for row in current_table()["Norm"]] == [repo("innermost")]
            assert "Other" in current_table()
        with use_kernel_mapping({"Third": {"cpu": repo()}}, inherit_mapping=False):
            assert set(current_table()) == {"Third"}
        register_kernel_mapping({"Late": {"cpu": repo("late")}})
        assert "Late" in current_table()
    assert set(current_table()) == {"Norm", "Late"}


def test_a_context_is_left_also_when_its_block_raises() -> None:
    with pytest.raises(RuntimeError), use_kernel_mapping({"Norm": {"cpu": repo()}}):
        raise RuntimeError
    assert dict(current_table()) == {}


def test_threads_see_global_registrations_and_no_context_of_another() -> None:
    """needs 17: what one thread lays over the registrations does not leak into another."""
    inside, leave, seen = threading.Event(), threading.Event(), {}

    def other() -> None:
        with use_kernel_mapping({"Theirs": {"cpu": repo()}}):
            inside.set()
            leave.wait(30)
            seen["theirs"] = set(current_table())

    thread = threading.Thread(target=other)
    with use_kernel_mapping({"Mine": {"cpu": repo()}}):
        thread.start()
        assert inside.wait(30)
        assert set(current_table()) == {"Mine"}
        register_kernel_mapping({"Both": {"cpu": repo()}})
        assert set(current_table()) == {"Mine", "Both"}
    leave.set()
    thread.join(30)
    assert seen["theirs"] == {"Theirs", "Both"}


def test_tasks_see_their_own_context_only() -> None:
    async def task(name: str, meet: asyncio.Event) -> set[str]:
        with use_kernel_mapping({name: {"cpu": repo()}}):
            await asyncio.wait_for(meet.wait(), 30)
            return set(current_table())

    async def main() -> list[set[str]]:
        meet = asyncio.Event()
        tasks = [asyncio.create_task(task(name, meet)) for name in ("A", "B", "C")]
        await asyncio.sleep(0)  # a turn of the loop: every task is inside its block
        meet.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [{"A"}, {"B"}, {"C"}]


def test_many_threads_register_at_once_and_none_is_lost() -> None:
    start = threading.Barrier(8)

    def register(number: int) -> None:
        start.wait(30)
        for step in range(20):
            register_kernel_mapping({f"Layer{number}": {"cpu": {MODES[step % 5]: repo(f"k{step}")}}})

    threads = [threading.Thread(target=register, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {name: len(found) for name, found in current_table().items()} == {f"Layer{number}": 5 for number in range(8)}


@pytest.mark.parametrize(
    "mapping",
    [
        [],
        {1: {}},
        {"Norm": repo()},
        {"Norm": {"gpu": repo()}},
        {"Norm": {1: repo()}},
        {"Norm": {"cpu": "org/norm"}},
        {"Norm": {"cpu": {"inference": repo()}}},
        {"Norm": {"cpu": {Mode.INFERENCE: None}}},
    ],
)
def test_a_malformed_mapping_is_an_error_and_registers_nothing(mapping: object) -> None:
    with pytest.raises(ValueError):
        register_kernel_mapping(mapping)  # type: ignore[arg-type]
    assert dict(current_table()) == {}
