"""The memory of verdicts: what a second run does not measure again, and what it does."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import proof_kernels as layers
import pytest
import torch
from kernels_for_tests import write_kernel
from torch import nn

from kernelhub import (
    LocalLayerRepository,
    Mode,
    Sample,
    Tolerance,
    kernel_report,
    kernelize,
    kernelized,
    register_kernel_mapping,
)
from kernelhub.hub import store as store_module
from kernelhub.hub.client import Hub
from kernelhub.hub.importer import LoadedKernel
from kernelhub.hub.store import MAX_VERDICT
from kernelhub.layers import describe, machine, proof, timing, verdicts
from kernelhub.layers.capture import capture
from kernelhub.layers.kernel import load_layer
from kernelhub.layers.report_values import ReportRow
from kernelhub.layers.verdicts import Equality, Memory, Timing, key_of

pytestmark = pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning")

I, T = Mode.INFERENCE, Mode.TRAINING  # noqa: E741 - as in the tables
CALLS: list[int] = []

COUNTED = """can_torch_compile = True

    def forward(self, x):
        CALLS.append(1)
        return norm(x, self.weight, self.eps)"""
BEFORE = "from test_verdicts import CALLS"


def register(folder: Path, forward: str = COUNTED, before: str = BEFORE, layer: str = "Norm") -> None:
    code = layers.source(forward, before)
    write_kernel(folder, name="counted", layers=code, init="from . import layers")
    modes = T | Mode.TORCH_COMPILE
    register_kernel_mapping({layer: {"cpu": {modes: LocalLayerRepository(folder, layer_name="Kernel")}}})


@pytest.fixture
def counted(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A right kernel for `Norm` that says when it runs; timing it takes one call a side."""
    CALLS.clear()
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "_LEAST", 0.0)
    register(tmp_path / "counted")
    return


def prove(model: nn.Module | None = None, sample: Any = None, **options: Any) -> tuple[int, ReportRow]:
    """How often the kernel was called for the proof, and the first row of the report."""
    model = layers.Norm() if model is None else model
    sample = torch.randn(3, 8) if sample is None else sample
    CALLS.clear()
    asked = {"mode": I, "verify": True, "only_if_faster": False, **options}
    kernelize(model, sample_inputs=sample, **asked)
    return len(CALLS), kernel_report(model).rows[0]


def files(hub: Hub) -> list[Path]:
    return [found.file for found in hub.store.verdicts()]


# A second run


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    "options", [{}, {"only_if_faster": True}, {"verify": False, "only_if_faster": True}, {"mode": T}]
)
def test_a_second_run_measures_nothing_and_says_so(options: dict[str, Any]) -> None:
    first, measured = prove(**options)
    second, row = prove(**options)
    assert first > 0
    assert second == 0
    assert measured.remembered is None
    assert row.remembered is not None
    assert row.remembered.startswith("20")
    assert row.to_dict() | {"remembered": None} == measured.to_dict()


@pytest.mark.usefixtures("counted")
def test_a_wrong_kernel_is_remembered_as_wrong(tmp_path: Path) -> None:
    register(tmp_path / "wrong", COUNTED.replace("self.eps)", "self.eps) + 1"))
    first, measured = prove()
    second, row = prove()
    assert (first > 0, second) == (True, 0)
    assert (measured.outcome, row.outcome) == ("original", "original")
    assert row.reason == measured.reason
    assert "not equal: output" in row.reason


@pytest.mark.usefixtures("counted")
def test_refresh_measures_again_and_remembers_that() -> None:
    prove()
    again, row = prove(refresh=True)
    assert again > 0
    assert row.remembered is None
    assert prove()[0] == 0
    with kernelized(layers.Norm(), mode=I, sample_inputs=torch.randn(3, 8), verify=True, refresh=True) as model:
        assert kernel_report(model).rows[0].remembered is None


@pytest.mark.usefixtures("counted")
def test_other_layers_and_values_of_the_same_kind_are_taken_to_be_alike() -> None:
    """What a remembered verdict means: the kind of layer and call, not the values in them."""
    prove()
    model = nn.Sequential(layers.Norm(), layers.Norm())
    with torch.no_grad():
        model[1].weight.mul_(2)
    count, _ = prove(model, 5 * torch.randn(3, 8))
    assert count == 0
    assert [row.remembered is not None for row in kernel_report(model).rows] == [True, True]


@pytest.mark.usefixtures("counted")
def test_the_errors_of_a_kind_are_the_largest_of_its_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)  # with three inputs of a hundred one layer is just not equal, and nothing is remembered
    register(tmp_path / "off", COUNTED.replace("self.eps)", "self.eps) * (1 + self.weight[0] * 1e-7)"))
    model = nn.Sequential(layers.Norm(), layers.Norm(), layers.Norm())
    with torch.no_grad():
        model[1].weight.mul_(1.5)
    prove(model)
    errors = [row.max_error for row in kernel_report(model).rows]
    assert prove()[1].max_error == max(error for error in errors if error is not None)


@pytest.mark.usefixtures("counted")
def test_where_layers_of_a_kind_differ_they_are_compared_each_time(tmp_path: Path) -> None:
    register(tmp_path / "half", COUNTED.replace("self.eps)", "self.eps) + (self.weight[0] > 0.9)"))
    model = nn.Sequential(layers.Norm(), layers.Norm())
    with torch.no_grad():
        model[1].weight.mul_(2)
    for _ in range(2):
        count, _ = prove(model)
        assert count > 0
        assert [row.outcome for row in kernel_report(model).rows] == ["kernel", "original"]


@pytest.mark.usefixtures("counted")
def test_a_verdict_that_does_not_hold_for_all_layers_any_more_is_forgotten(tmp_path: Path) -> None:
    register(tmp_path / "half", COUNTED.replace("self.eps)", "self.eps) + (self.weight[0] > 0.9)"))
    prove()
    assert prove()[0] == 0
    model = nn.Sequential(layers.Norm(), layers.Norm())
    with torch.no_grad():
        model[1].weight.mul_(2)
    assert prove(model)[1].remembered is not None
    prove(model, refresh=True)
    for _ in range(2):
        count, _ = prove(model)
        assert count > 0
        assert [row.outcome for row in kernel_report(model).rows] == ["kernel", "original"]


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(("one", "other"), [(nn.GELU(), nn.GELU("tanh")), (torch.float32, torch.float64)])
def test_what_a_layer_is_called_with_counts(hub: Hub, tmp_path: Path, one: Any, other: Any) -> None:
    class Scaled(layers.Norm):
        def forward(self, x: torch.Tensor, extra: Any = None) -> torch.Tensor:
            return x

    found = {key(Scaled(), tmp_path / "counted", hub, (torch.randn(3, 8), extra)) for extra in (one, one, other)}
    assert len(found) == 2


@pytest.mark.usefixtures("counted")
def test_what_may_pass_is_not_remembered(tmp_path: Path) -> None:
    for number, error in enumerate(["MemoryError()", "torch.OutOfMemoryError('CUDA out of memory')"]):
        register(tmp_path / f"raises{number}", COUNTED.replace("return norm", f"raise {error}\n        return norm"))
        assert "the kernel raises" in prove()[1].reason
        assert prove()[0] > 0
    register(tmp_path / "raises", COUNTED.replace("return norm", "raise ValueError('no')\n        return norm"))
    assert "the kernel raises ValueError: no" in prove()[1].reason
    assert prove()[0] == 0


# What a verdict is found by: a part each


def _other_eps() -> dict[str, Any]:
    model = layers.Norm()
    model.eps = 1e-5
    return {"model": model}


def _half_precision() -> dict[str, Any]:
    return {"model": layers.Norm().bfloat16(), "sample": torch.randn(3, 8).bfloat16()}


def _under_autocast() -> dict[str, Any]:
    def run(model: nn.Module) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(3, 8))

    return {"sample": run}


def _frozen() -> dict[str, Any]:
    model = layers.Norm()
    model.weight.requires_grad_(False)
    return {"model": model}


def _other_weight_dtype() -> dict[str, Any]:
    return {"model": layers.Norm().double()}


def _two_calls() -> dict[str, Any]:
    def run(model: nn.Module) -> None:
        model(torch.randn(3, 8))
        model(torch.randn(4, 8))

    return {"sample": run}


def _odd_alignment() -> dict[str, Any]:
    return {"sample": torch.randn(25)[1:].view(3, 8)}


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "eps": _other_eps,
    "dtypes": _half_precision,
    "dtype of the weight": _other_weight_dtype,
    "shape": lambda: {"sample": torch.randn(4, 8)},
    "strides": lambda: {"sample": torch.randn(8, 3).T},
    "alignment": _odd_alignment,
    "size of the weight": lambda: {"model": layers.Norm(4), "sample": torch.randn(3, 4)},
    "gradient of the weight": _frozen,
    "autocast": _under_autocast,
    "mode": lambda: {"mode": T},
    "calls": _two_calls,
    "tolerance": lambda: {"verify": Tolerance(rtol=1e-3)},
    "bits": lambda: {"verify": Tolerance.exact()},
    "question": lambda: {"verify": False, "only_if_faster": True},
}


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("what", CHANGES)
def test_anything_of_the_layer_or_the_call_that_changed_is_measured_again(what: str) -> None:
    prove()
    count, row = prove(**CHANGES[what]())
    assert count > 0
    assert row.remembered is None
    assert prove(**CHANGES[what]())[0] == 0, "and then remembered"
    assert prove()[0] == 0, "and the first one still is"


@pytest.mark.usefixtures("counted")
def test_a_mode_that_changes_nothing_but_how_it_is_run_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    prove()
    assert prove(mode=I | Mode.TORCH_COMPILE)[0] > 0
    assert prove(mode=I | Mode.TORCH_COMPILE)[0] == 0


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("name", ["torch", "triton", "python", "threads", "devices"])
def test_a_change_of_the_machine_is_measured_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prove()
    real = verdicts.machine
    assert name in real([])
    monkeypatch.setattr(verdicts, "machine", lambda devices: {**real(devices), name: "another"})
    assert prove()[0] > 0


@pytest.mark.usefixtures("counted")
def test_torch_s_version_threads_and_the_device_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine.machine([torch.device("cpu")])
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["devices"] == [machine.device_name(torch.device("cpu"))]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert machine.machine([])["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("counted")
def test_a_switch_of_torch_is_measured_again() -> None:
    prove()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if before != "medium" else "high")
        assert prove()[0] > 0
    finally:
        torch.set_float32_matmul_precision(before)
    assert prove()[0] == 0


@pytest.mark.usefixtures("counted")
def test_another_version_of_the_proof_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    prove()
    monkeypatch.setattr(verdicts, "proof_digest", lambda: "another")
    assert prove()[0] > 0
    assert all(Path(verdicts.__file__).with_name(f"{name}.py").is_file() for name in verdicts._PROOF)


@pytest.mark.usefixtures("counted")
def test_another_kernel_is_measured(tmp_path: Path) -> None:
    prove()
    register(tmp_path / "copy")
    assert prove()[0] == 0, "the same bytes elsewhere are the same kernel"
    register(tmp_path / "edited", COUNTED + "  # edited")
    assert prove()[0] > 0


@pytest.mark.usefixtures("counted")
def test_what_a_kernel_depends_on_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prove()
    real = LoadedKernel.__init__

    def with_another(self: LoadedKernel, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        object.__setattr__(self, "depends", ("sha256-another",))

    monkeypatch.setattr(LoadedKernel, "__init__", with_another)
    assert prove()[0] > 0


# What a layer is


def key(module: nn.Module, folder: Path, hub: Hub, sample: Any = None) -> str | None:
    kernel = load_layer(LocalLayerRepository(folder, layer_name="Kernel"), "cpu", hub)
    calls = capture(module, [module], Sample.of(torch.randn(3, 8) if sample is None else sample), I)[id(module)].calls
    found = key_of(module, kernel, calls.values(), I)
    return found and found.name


def made(source: str, **names: Any) -> type[nn.Module]:
    """A layer's class from source, as a module of its own."""
    space: dict[str, Any] = {"nn": nn, "torch": torch, "__name__": "some_module", **names}
    exec(source, space)
    return space["Layer"]


CODE = """
SCALE = 2.0

def helper(x):
    return x * SCALE

class Base(nn.Module):
    def inner(self, x):
        return helper(x)

class Layer(Base):
    def forward(self, x):
        def nested(y):
            return y + 1.0
        return nested(self.inner(x))
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y + 1.0", "y + 1.5"),
        ("helper(x)\n\nclass Layer", "helper(x) + 0\n\nclass Layer"),
        ("x * SCALE", "x / SCALE"),
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("return nested(self.inner(x))", "return nested(self.inner(x)).relu()"),
        ("forward(self, x)", "forward(self, x, scale=1.0)"),
    ],
)
def test_the_code_of_a_layer_is_all_that_it_calls(old: str, new: str) -> None:
    assert old in CODE
    before, after = (describe.digest(describe.code(made(text)())) for text in (CODE, CODE.replace(old, new)))
    assert before != after
    commented = CODE.replace("return helper(x)", "return helper(x)  # as it was")
    assert describe.digest(describe.code(made(commented)())) == before


def test_a_helper_of_another_module_counts_where_that_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    def of(factor: str) -> str:
        module = ModuleType("my_helpers")
        exec(f"def scaled(x):\n    return x * {factor}", module.__dict__)
        monkeypatch.setitem(sys.modules, "my_helpers", module)
        code = "class Layer(nn.Module):\n    def forward(self, x):\n        return my_helpers.scaled(x)"
        return describe.digest(describe.code(made(code, my_helpers=module)()))

    assert of("2") == of("2")
    assert of("2") != of("3")


def test_the_class_of_a_child_counts() -> None:
    text = "class Layer(nn.Module):\n    def forward(self, x):\n        return x"
    one, other = nn.Sequential(made(text)()), nn.Sequential(made(text.replace("return x", "return x + 1"))())
    assert describe.digest(describe.code(one)) != describe.digest(describe.code(other))


class Config:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1e-5, 1e-6),
        (True, 1),
        (torch.relu, torch.tanh),
        (lambda x: x + 1, lambda x: x + 2),
        (Config(size=1), Config(size=2)),
        ({"a": [1, (2, None)]}, {"a": [1, (2, 3)]}),
        (torch.float32, torch.bfloat16),
        (Mode.INFERENCE, Mode.TRAINING),
        (nn.functional.silu, nn.functional.gelu),
        (Path("a"), Path("b")),
    ],
)
def test_settings_are_told_apart_and_are_the_same_in_every_layer(one: Any, other: Any) -> None:
    def of(value: Any) -> str:
        module = nn.Identity()
        module.setting = value
        return describe.digest(describe.settings(module))

    assert of(one) == of(one)
    assert of(one) != of(other)


def test_private_settings_count_and_hooks_of_children_too() -> None:
    module = nn.Sequential(nn.ReLU())
    before = describe.settings(module)
    module._scale = 2
    named = describe.settings(module)
    assert named != before
    module.register_forward_hook(lambda *_: None)
    assert describe.settings(module) == named, "those of the layer itself run around any forward"
    module[0].register_forward_hook(lambda *_: None)
    assert describe.settings(module) != named


def test_keys_are_the_same_in_every_process(hub: Hub, counted: None, tmp_path: Path) -> None:
    import subprocess
    import sys

    text = "import json; from kernelhub.layers import describe; import proof_kernels as layers; print(json.dumps(\
        [describe.code(layers.Norm()), describe.settings(layers.Norm())]))"
    here = [describe.code(layers.Norm()), describe.settings(layers.Norm())]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "7"}
    made = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
    there = json.loads(made.stdout)
    assert there == json.loads(json.dumps(here))
    assert [describe.digest(item) for item in there] == [describe.digest(item) for item in here]


def test_what_others_put_on_torchs_classes_counts_where_it_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(layers.Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.some_helper() is None else x + 1

    layer, other = layers.Norm(), Other()
    before, named = describe.code(layer), describe.code(other)
    monkeypatch.setattr(nn.Module, "some_helper", lambda self: None, raising=False)
    assert describe.code(layer) == before
    assert describe.code(other) != named
    for name in ("_call_impl", "__getattr__"):
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, name, lambda self, *args: None)
            assert describe.code(layer) != before


def test_code_from_source_and_from_bytecode_is_the_same() -> None:
    import marshal

    text = """
def one(x): return x.sum((0, 1)), {"a", "b"} == x
def two(x): return x.sum((0, 1)), {"b", "a"} == x
class Layer(nn.Module):
    def forward(self, x, dims=(0, 1)): return one(x), two(x), x.sum((0, 1))
"""
    code = compile(text, "some_module", "exec")
    found = set()
    for one in (code, marshal.loads(marshal.dumps(code)), marshal.loads(marshal.dumps(code, 2))):
        space: dict[str, Any] = {"nn": nn, "__name__": "some_module"}
        exec(one, space)
        found.add(describe.digest(describe.code(space["Layer"]())))
    assert len(found) == 1


def test_tables_that_were_filled_in_another_order_are_the_same() -> None:
    module, other = nn.Identity(), nn.Identity()
    module.table, module.config = {"a": [1], "b": [2]}, Config(one=[1], two=[2])
    other.config, other.table = Config(two=[2], one=[1]), {"b": [2], "a": [1]}
    assert describe.settings(module) == describe.settings(other)


def test_sets_have_no_order() -> None:
    module, other = nn.Identity(), nn.Identity()
    one, two = Config(size=1), Config(size=2)
    module.setting, other.setting = [{one, two}, "x"], [{two, one}, "x"]
    assert describe.settings(module) == describe.settings(other)


def test_of_a_layer_that_holds_what_cannot_be_told_nothing_is_remembered(
    hub: Hub, counted: None, tmp_path: Path
) -> None:
    model = layers.Norm()
    model.lock = threading.Lock()
    assert key(model, tmp_path / "counted", hub) is None
    for _ in range(2):
        count, row = prove(model, only_if_faster=True)
        assert count > 0
        assert row.remembered is None
    assert files(hub) == []


def test_cycles_among_settings_end() -> None:
    module = nn.Identity()
    module.config = config = Config(size=1)
    config.itself, config.listed = config, [config]
    assert describe.digest(describe.settings(module))
    module.config = [Config(number=number) for number in range(describe._MOST + 1)]
    with pytest.raises(describe.Opaque, match="more than"):
        describe.settings(module)


# The store


def remembered(hub: Hub) -> Path:
    """The one verdict that a run left."""
    prove()
    (file,) = files(hub)
    return file


BAD: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "empty": lambda _: b"",
    "not JSON": lambda _: b"import os",
    "a list": lambda _: b"[]",
    "deep": lambda _: b"[" * 100_000,
    "large": lambda raw: json.dumps(raw | {"more": "x" * MAX_VERDICT}).encode(),
    "no key": lambda raw: json.dumps({"found": raw["found"]}).encode(),
    "another key": lambda raw: json.dumps(raw | {"key": raw["key"] | {"mode": "TRAINING"}}).encode(),
    "no numbers": lambda raw: json.dumps(raw | {"found": raw["found"] | {"calls": "1"}}).encode(),
    "numbers that are none": lambda raw: json.dumps(raw | {"found": raw["found"] | {"max_error": "much"}}).encode(),
    "true for a number": lambda raw: json.dumps(raw | {"found": raw["found"] | {"calls": True}}).encode(),
    "another question": lambda raw: json.dumps(raw | {"found": {"ratio": "2.0"}}).encode(),
    "no time": lambda raw: json.dumps(raw | {"time": "now"}).encode(),
    "a time past all": lambda raw: json.dumps(raw | {"time": 1e300}).encode(),
    "a pickle": lambda _: b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00c__main__\nboom\n.",
}


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("what", BAD)
def test_files_that_are_no_verdicts_are_ignored_with_a_line_and_replaced(
    hub: Hub, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = remembered(hub)
    good = file.read_bytes()
    file.write_bytes(BAD[what](json.loads(good)))
    with caplog.at_level(logging.WARNING, "kernelhub"):
        count, row = prove()
    assert count > 0
    assert (row.outcome, row.remembered) == ("kernel", None)
    assert "verdict" in caplog.text
    assert json.loads(file.read_bytes())["key"] == json.loads(good)["key"]
    assert prove()[0] == 0


@pytest.mark.usefixtures("counted")
@pytest.mark.skipif(os.name == "nt", reason="has no pipes in folders")
def test_a_folder_or_a_pipe_in_the_place_of_a_verdict_is_ignored(hub: Hub) -> None:
    file = remembered(hub)
    file.unlink()
    file.mkdir()
    assert prove()[0] > 0
    file.rmdir()
    os.mkfifo(file)
    assert prove()[0] > 0
    file.unlink()
    file.symlink_to("/dev/zero")
    assert prove()[0] > 0


@pytest.mark.usefixtures("counted")
def test_a_store_that_cannot_be_written_works_without_memory(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(path: Path, value: Any, *, must: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "kernelhub"):
        patch.setattr(store_module, "write_json", refused)
        for _ in range(2):
            count, row = prove()
            assert count > 0
            assert row.outcome == "kernel"
    assert "what was measured is not remembered: cannot write to the store" in caplog.text
    prove()
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_json", refused)
        assert prove()[0] == 0, "what is there is read"


def test_verdicts_are_written_beside_their_place_and_renamed(
    hub: Hub, counted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", torn)
        assert prove()[1].outcome == "kernel"
    assert files(hub) == []
    prove()
    (file,) = files(hub)
    assert list(file.parent.iterdir()) == [file]


def test_a_record_that_is_read_is_the_value_that_was_kept(hub: Hub, counted: None, tmp_path: Path) -> None:
    model = layers.Norm()
    kernel = load_layer(LocalLayerRepository(tmp_path / "counted", layer_name="Kernel"), "cpu", hub)
    calls = capture(model, [model], Sample(torch.randn(3, 8)), I)[id(model)].calls
    found = key_of(model, kernel, calls.values(), I)
    assert found is not None
    memory = Memory(hub.store, clock=lambda: 0.0)
    equality = Equality("", "float64", 3, 1e-7, float("inf"), "output", 2)
    for key, value in ((found.of("equal"), equality), (found.of("faster"), Timing(1.5, 1.25, float("inf"), "a.b"))):
        memory.keep(key, value, kernel.loaded)
        assert memory.recall(key, type(value)) == (value, "1970-01-01 00:00:00")
    assert memory.recall(found.of("faster"), Equality) is None, "an answer to another question"
    assert Memory(hub.store, refresh=True).recall(found.of("equal"), Equality) is None


# Keeping house


@pytest.mark.usefixtures("counted")
def test_prune_removes_verdicts_of_kernels_that_are_gone(hub: Hub, tmp_path: Path) -> None:
    import shutil

    prove()
    assert list(hub.store.prune_verdicts(lambda _: False)) == []
    shutil.rmtree(tmp_path / "counted")
    ((removed, size),) = hub.store.prune_verdicts(lambda _: False)
    assert size > 0
    assert not removed.parent.exists()
    assert files(hub) == []


@pytest.mark.usefixtures("counted")
def test_prune_removes_what_is_selected_and_what_is_no_verdict(hub: Hub) -> None:
    file = remembered(hub)
    (file.parent / f".{file.name}.0.tmp").write_text("left behind")
    (file.parent / "foreign.txt").write_text("not ours")
    (found,) = [found for found in hub.store.verdicts() if found.file == file]
    assert (found.kernel, found.path.is_dir(), found.time > 1e9) == ("counted", True, True)
    removed = [path.name for path, _ in hub.store.prune_verdicts(lambda _: False)]
    assert sorted(removed) == sorted([f".{file.name}.0.tmp", "foreign.txt"])
    assert [path for path, _ in hub.store.prune_verdicts(lambda verdict: verdict.time > 0)] == [file]


def test_proofs_are_imported_only_where_they_are_asked_for() -> None:
    assert proof.Demand.of(None, False, False) is None
