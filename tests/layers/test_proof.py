"""`verify`: what is compared, on what, with what reference, and that the model is as before."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import proof_kernels as layers
import pytest
import torch
from kernels_for_tests import write_kernel
from torch import nn

from kernelhub import (
    KernelizeFallback,
    LocalLayerRepository,
    Mode,
    Sample,
    Tolerance,
    kernel_report,
    kernelize,
    register_kernel_mapping,
    use_kernel_forward_from_hub,
)
from kernelhub.errors import InvalidReference, NoKernelForLayer
from kernelhub.hub.client import Hub
from kernelhub.layers.markers import mark_as_calling
from kernelhub.layers.report_values import ReportRow

pytestmark = pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning")

I, T = Mode.INFERENCE, Mode.TRAINING  # noqa: E741 - as in the tables
Register = Callable[..., None]


@pytest.fixture
def register(hub: Hub, tmp_path: Path) -> Register:
    """`register("Norm", forward)`: a kernel with that forward for the layer; without one, the right one."""

    def register(layer: str, forward: str | None = None, before: str = "") -> None:
        code = layers.source(forward or layers.RIGHT[layer], before)
        folder = write_kernel(tmp_path / layer.lower(), name=layer.lower(), layers=code, init="from . import layers")
        register_kernel_mapping({layer: {"cpu": {T: LocalLayerRepository(folder, layer_name="Kernel")}}})

    return register


def checked(
    model: nn.Module, sample: Any, mode: Mode = I, verify: bool | Tolerance = True, **options: Any
) -> ReportRow:
    """The first row of the model after it was kernelized and verified."""
    kernelize(model, mode=mode, device="cpu", sample_inputs=sample, verify=verify, **options)
    return kernel_report(model).rows[0]


# What is asked


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"verify": True}, "verify=True needs sample_inputs"),
        ({"only_if_faster": True}, "only_if_faster=True needs sample_inputs"),
        ({"sample_inputs": torch.ones(1)}, "sample_inputs without a question: nothing would be measured"),
        ({"refresh": True}, "refresh=True without a question"),
        ({"sample_inputs": 3, "verify": True}, "int is nothing to run a model on"),
        ({"sample_inputs": torch.ones(1), "verify": "yes"}, "verify='yes'"),
    ],
)
def test_what_cannot_be_asked_is_an_error_before_anything_happens(options: dict[str, Any], expected: str) -> None:
    model = layers.Norm()
    with pytest.raises(InvalidReference, match=expected):
        kernelize(model, mode=I, **options)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("bad", [{"rtol": -1.0}, {"atol": float("nan")}, {"of_largest": "much"}])
def test_a_tolerance_is_a_number_from_zero_on(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidReference, match=next(iter(bad))):
        Tolerance(**bad)


@pytest.mark.parametrize("bad", [{"max_calls": 0}, {"max_bytes": -5}])
def test_bounds_of_a_sample_are_numbers_from_one_on(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidReference, match=next(iter(bad))):
        Sample(torch.ones(1), **bad)


@pytest.mark.parametrize(
    "sample",
    [
        torch.randn(3, 8),
        (torch.randn(3, 8),),
        {"input": torch.randn(3, 8)},
        lambda model: model(torch.randn(3, 8)),
        Sample(torch.randn(3, 8)),
    ],
    ids=["tensor", "args", "kwargs", "function", "Sample"],
)
def test_every_kind_of_sample_inputs_runs_the_model(register: Register, sample: Any) -> None:
    register("Norm")
    row = checked(nn.Sequential(layers.Norm()), sample)
    assert (row.outcome, row.reference, row.calls, row.worst) == ("kernel", "float64", 1, "output")
    assert row.max_error is not None
    assert row.max_error < 1e-6
    assert row.max_relative_error is not None


def test_a_function_without_arguments_is_called_without(register: Register) -> None:
    register("Norm")
    model = nn.Sequential(layers.Norm())
    assert checked(model, lambda: model(torch.randn(3, 8))).outcome == "kernel"


# What is compared


@pytest.mark.parametrize("mode", [I, T])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layer", ["Norm", "Act", "Batch"])
def test_right_kernels_are_equal(register: Register, layer: str, dtype: torch.dtype, mode: Mode) -> None:
    register(layer)
    kinds = {"Norm": lambda: layers.Norm(), "Act": lambda: layers.Act(), "Batch": lambda: layers.Batch(8)}
    model = nn.Sequential(kinds[layer](), nn.Linear(8, 8)).to(dtype)
    row = checked(model, torch.randn(6, 8, dtype=dtype), mode)
    assert (row.outcome, row.reason) == ("kernel", "")


def test_nested_results_and_effects_on_arguments_are_compared(register: Register) -> None:
    register("Many")
    assert checked(layers.Many(), {"x": torch.randn(3), "cache": torch.zeros(3)}).outcome == "kernel"


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        ("return {'first': (x * scale, x), 'second': [x + 1, scale]}", "output.first[1]"),
        ("return {'first': (x * scale, None), 'second': [x + 1, 3.0]}", r"output.second[1]: 3.0, the original has 2.0"),
        ("return {'first': (x * scale, None), 'second': (x + 1, scale)}", "output.second(): 'tuple of 2'"),
        ("return {'first': (x * scale, None)}", "dict of 1"),
        ("return {'first': (x * scale, None), 'second': [x + 2, scale]}", "output.second[0]: it is off by 1"),
    ],
)
def test_a_difference_anywhere_in_the_result_is_named(register: Register, forward: str, expected: str) -> None:
    register("Many", f"def forward(self, x, scale=2.0, *, cache=None):\n        {forward}")
    row = checked(layers.Many(), torch.randn(3))
    assert row.outcome == "original"
    assert f"not equal: {expected}" in row.reason or expected in row.reason


def test_results_that_lie_in_memory_as_the_original_s_do_not_are_a_difference(register: Register) -> None:
    """A view that the model takes of them would fail. Where the original's have gaps, the kernel's need none."""
    register("Act", "def forward(self, x):\n        return torch.relu(x).t().contiguous().t()")
    row = checked(layers.Act(), torch.randn(3, 8), T)
    assert "output: its strides are (1, 3), the original's (8, 1)" in row.reason
    register("Half", "def forward(self, x):\n        return torch.relu(x)[:, :4].contiguous()")
    assert checked(layers.Half(), torch.randn(3, 8), T).outcome == "kernel"


def test_an_effect_that_the_kernel_lacks_is_a_difference(register: Register) -> None:
    register(
        "Many",
        "def forward(self, x, scale=2.0, *, cache=None):\n        return {'first': (x * scale, None), 'second': [x + 1, scale]}",
    )
    row = checked(layers.Many(), {"x": torch.randn(3), "cache": torch.zeros(3)})
    assert "cache after the call: it is off by 1" in row.reason


def test_buffers_that_the_original_changes_are_compared_and_put_back(register: Register) -> None:
    register(
        "Batch",
        "def forward(self, x):\n        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True)",
    )
    model = layers.Batch(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    row = checked(model, torch.randn(6, 4), T)
    assert "after the call" in row.reason
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@use_kernel_forward_from_hub("Act")
class Counting(nn.Module):
    """A buffer that the forward puts another in the place of."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Module()
        self.child.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.child.count = self.child.count + 1
        return torch.relu(x)


COUNT = "def forward(self, x):\n        {}\n        return torch.relu(x)"


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (COUNT.format("self.child.count = self.child.count + 1"), ""),
        (COUNT.format("pass"), "child.count that it sets: the original has it, the kernel has not"),
        (COUNT.format("self.child.count = self.child.count + 2"), "child.count that it sets: it is off by 1"),
    ],
)
def test_buffers_that_are_replaced_are_compared_and_put_back(register: Register, forward: str, expected: str) -> None:
    register("Act", forward)
    model = Counting()
    count = model.child.count
    row = checked(model, torch.randn(3, 8))
    assert (row.outcome, expected in row.reason) == ("original" if expected else "kernel", True)
    assert model.child.count is count
    assert count.item() == 0


class Embedding(nn.Module):
    """PyTorch writes to these weights at every look-up, the kernel of a layer that calls it must not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8, max_norm=1.0)
        self.scale = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.scale(self.embed(ids))


def test_writes_to_weights_that_only_children_read_are_seen(register: Register) -> None:
    """Of weights that are not copied, because they may be a whole model's."""
    right = "return self.scale(self.embed(ids))"
    for writes, expected in (
        ("", ""),
        (
            "with torch.no_grad():\n            self.scale.weight.mul_(1)\n        ",
            "a write to scale.weight, which is not taken back: the kernel has it, the original has not",
        ),
    ):
        register("Embedding", f"def forward(self, ids):\n        {writes}{right}")
        cls = use_kernel_forward_from_hub("Embedding")(type("Embedding", (Embedding,), {}))
        mark_as_calling(cls)
        row = checked(cls(), torch.arange(4), T)
        assert (row.outcome, expected in row.reason) == ("original" if expected else "kernel", True)


def test_of_meta_tensors_nothing_can_be_shown(register: Register) -> None:
    register("Act")
    row = checked(layers.Act(), torch.randn(3, 8, device="meta"))
    assert "not tested: a call has tensors on the meta device" in row.reason
    register("Batch")
    assert "not tested: its weights" in checked(layers.Batch(4).to("meta"), torch.randn(6, 4, device="meta"), T).reason


def test_the_reference_is_the_original_where_float64_cannot_be_had(register: Register) -> None:
    @use_kernel_forward_from_hub("Act")
    class Short(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype is torch.float64:
                raise RuntimeError("no float64 here")
            return torch.relu(x)

    register("Act")
    row = checked(Short(), torch.randn(3))
    assert (row.outcome, row.reference) == ("kernel", "original")


def test_an_original_that_is_another_function_in_float64_is_its_own_reference(register: Register) -> None:
    @use_kernel_forward_from_hub("Act")
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) if x.dtype is not torch.float64 else x

    register("Act")
    row = checked(Branching(), torch.randn(3, 8))
    assert (row.outcome, row.reference) == ("kernel", "original")


def test_a_kernel_with_more_than_twice_the_originals_error_is_not_equal(register: Register) -> None:
    """Within the tolerance of float32, and ten times as far off as the original is."""
    register("Norm", "def forward(self, x):\n        return norm(x, self.weight, self.eps) * (1 + 5e-6)")
    row = checked(layers.Norm(), torch.randn(5, 8))
    assert "from float64, the original by" in row.reason
    assert checked(layers.Norm(), torch.randn(5, 8), verify=Tolerance(rtol=1e-30)).outcome == "original"


def test_the_casts_of_the_original_are_lifted_too(register: Register) -> None:
    """Else the reference would have the error of float32, and a kernel that is nearer to float64 would look wrong."""
    from kernelhub.layers.capture import capture, original_forward
    from kernelhub.layers.replay import Replay

    model = layers.Norm()
    x = torch.randn(5, 8)
    (call,) = capture(model, [model], Sample(x), I)[id(model)].calls.values()
    found = Replay(model, False).run_in_float64(original_forward(model), call).values["output"]
    wide = x.double()
    exact = model.weight.double() * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + model.eps))
    assert found.dtype is torch.float64
    assert torch.allclose(found, exact, rtol=1e-14, atol=0)
    assert model.weight.dtype is torch.float32


@pytest.mark.parametrize(("verify", "outcome"), [(True, "kernel"), (Tolerance.exact(), "original")])
def test_exact_asks_for_bits(register: Register, verify: bool | Tolerance, outcome: str) -> None:
    register("Act", "def forward(self, x):\n        return torch.where(x > 0, x, -0.0)")
    row = checked(layers.Act(), torch.tensor([-1.0, 1.0]), verify=verify)
    assert row.outcome == outcome
    if outcome == "original":
        assert "1 of 2 values is not the same bits, the first at (0,)" in row.reason
        assert row.reference == "original"


def test_a_tolerance_of_the_callers_own_is_taken(register: Register) -> None:
    register("Act", "def forward(self, x):\n        return torch.relu(x).bfloat16().to(x.dtype)")
    x = torch.rand(64, 8)
    assert checked(layers.Act(), x).outcome == "original"
    # The original is exact here: a kernel may not be less so where float64 is the reference, whatever is allowed.
    assert "from float64" in checked(layers.Act(), x, verify=Tolerance(rtol=0.1)).reason


def test_a_sequence_of_calls_is_compared_call_by_call(register: Register) -> None:
    """The kernel is wrong for one length only, and the sample has three."""
    register("Act", "def forward(self, x):\n        return torch.relu(x) + (x.shape[0] == 3)")

    def run(model: nn.Module) -> None:
        for length in (1, 2, 2, 3):
            model(torch.randn(length, 8))

    row = checked(nn.Sequential(layers.Act()), run)
    assert (row.outcome, row.calls) == ("original", 3)
    assert checked(nn.Sequential(layers.Act()), Sample(run, max_calls=2)).outcome == "kernel"


# What cannot be shown


def test_a_layer_that_the_sample_does_not_reach_keeps_its_forward(register: Register) -> None:
    register("Act")
    model = nn.ModuleDict({"used": layers.Act(), "unused": layers.Act()})
    kernelize(model, mode=I, device="cpu", sample_inputs=lambda model: model["used"](torch.ones(2)), verify=True)
    rows = kernel_report(model).rows
    assert [row.outcome for row in rows] == ["kernel", "original"]
    assert "the sample inputs never reach it" in rows[1].reason


def test_inputs_over_the_bound_are_not_kept_and_the_row_says_so(register: Register) -> None:
    register("Act")
    row = checked(layers.Act(), Sample(torch.ones(100), max_bytes=399))
    assert "the inputs of a call take 400 bytes, and Sample(max_bytes=399) are kept" in row.reason
    assert checked(layers.Act(), Sample(torch.ones(100), max_bytes=400)).outcome == "kernel"


def test_arguments_that_cannot_be_copied_are_the_reason(register: Register) -> None:
    class Stubborn:
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("I am one of a kind")

    @use_kernel_forward_from_hub("Two")
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, other: object) -> torch.Tensor:
            return x

    register("Two", "def forward(self, x, other):\n        return x")
    row = checked(Two(), (torch.ones(2), Stubborn()))
    assert "cannot be copied: TypeError: I am one of a kind" in row.reason


def test_fallbacks_decide_between_an_error_and_the_original(register: Register) -> None:
    register("Act", "def forward(self, x):\n        return x")
    model = nn.Sequential(nn.Linear(8, 8), layers.Act())
    with pytest.raises(NoKernelForLayer, match=r"1 \(Act\): .*not equal: output") as caught:
        kernelize(model, mode=I, sample_inputs=torch.randn(3, 8), verify=True, use_fallback=False)
    assert "KernelizeFallback.NOT_EQUAL" in str(caught.value)
    assert "forward" not in vars(model[1])
    allowed = KernelizeFallback.NOT_EQUAL
    assert checked(model, torch.randn(3, 8), use_fallback=allowed).outcome == "original"


# The model is as before


def test_random_state_buffers_gradients_and_flags_are_as_before(register: Register) -> None:
    register("Act")
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), layers.Act()).eval()
    model(torch.randn(4, 8)).sum().backward()
    gradients = [(parameter.grad, parameter.grad.clone()) for parameter in model.parameters()]
    states = {name: value.clone() for name, value in model.state_dict().items()}
    keys = [list(vars(module)) for module in model.modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()

    def run(model: nn.Module) -> None:
        assert model.training, "TRAINING runs the model in training mode"
        random.random()
        loss = model(torch.randn(4, 8)).sum()
        loss.backward()

    row = checked(model, run, T)
    assert (row.outcome, row.reason) == ("kernel", "")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in states.items())
    for parameter, (gradient, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)
    assert [list(vars(module)) for module in list(model.modules())[:-1]] == keys[:-1]


class Cache:
    """Keys of earlier tokens, as models keep them: one list of tensors that grow, one that are written in place."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.static = torch.zeros(4)
        self.length = 0

    def update(self, x: torch.Tensor) -> None:
        self.keys.append(x)
        self.static[self.length] = x.detach().sum()
        self.length += 1

    def state(self) -> tuple[int, int, list[float]]:
        return len(self.keys), self.length, self.static.tolist()


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.cache, self.table, self.last = layers.Act(), Cache(), {"calls": [0]}, torch.zeros(2)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        self.cache.update(x)
        if cache is not None:
            cache.update(x)
        self.table["calls"].append(1)
        self.table["more"] = self.table.get("more", 0) + 1
        self.last.add_(1)
        self.flag = True
        return self.act(x)


def test_caches_of_the_model_and_of_the_sample_are_as_before(register: Register) -> None:
    register("Act")
    model, cache = Cached(), Cache()
    model(torch.ones(2))
    states = model.cache.state(), cache.state(), model.table["calls"][:], model.table["more"], model.last.tolist()
    held = model.cache, model.cache.keys[0], model.table, model.last
    del model.flag
    kernelize(model, mode=I, device="cpu", sample_inputs={"x": torch.ones(2), "cache": cache}, verify=True)
    assert kernel_report(model).rows[0].outcome == "kernel"
    assert states == (
        model.cache.state(),
        cache.state(),
        model.table["calls"],
        model.table["more"],
        model.last.tolist(),
    )
    assert all(
        one is other
        for one, other in zip(held, (model.cache, model.cache.keys[0], model.table, model.last), strict=True)
    )
    assert not hasattr(model, "flag")


def test_a_model_that_fails_on_the_sample_is_as_before(register: Register) -> None:
    register("Act")
    model = nn.Sequential(nn.Linear(8, 8), layers.Act())
    kernelize(model, mode=I)
    before = dict(vars(model[1]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        kernelize(model, mode=I, sample_inputs=torch.randn(3, 5), verify=True)
    assert vars(model[1]).keys() == before.keys()
    assert vars(model[1])["forward"] == before["forward"]


def test_the_original_runs_also_where_the_model_ran_kernels_before(register: Register) -> None:
    register("Act", "def forward(self, x):\n        return torch.relu(x) + 1")
    model = nn.Sequential(nn.Linear(8, 8), layers.Act())
    kernelize(model, mode=I)
    assert checked(model, torch.randn(3, 8)).outcome == "original", "the kernel is not compared with itself"


def test_calls_are_made_again_under_their_own_autocast(register: Register) -> None:
    """The kernel is right under autocast only: its matrix product is then in bfloat16."""

    @use_kernel_forward_from_hub("Product")
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    register("Product", "def forward(self, x):\n        return (x.bfloat16() @ self.weight.bfloat16())")

    def run(model: nn.Module) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(3, 8))

    assert checked(Product(), run).outcome == "kernel"
    row = checked(Product(), torch.randn(3, 8))
    assert "its dtype is bfloat16, the original's float32" in row.reason


def test_gradients_are_asked_for_where_the_model_has_them(register: Register) -> None:
    """A kernel that gives none for a tensor that needs none is right: position embeddings, for one."""

    @use_kernel_forward_from_hub("Turn")
    class Turn(nn.Module):
        def forward(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
            return x * angle

    register("Turn", "def forward(self, x, angle):\n        return x * angle.detach()")
    x, angle = torch.randn(3, requires_grad=True), torch.randn(3)
    assert checked(Turn(), (x, angle), T).outcome == "kernel"
    row = checked(Turn(), (x, angle.requires_grad_()), T)
    assert "gradient of angle" in row.reason
    assert "the kernel has no gradient there" in row.reason


def test_what_was_captured_goes_when_it_is_done(register: Register) -> None:
    register("Act")
    held: list[weakref.ref[torch.Tensor]] = []

    def run(model: nn.Module) -> None:
        x = torch.randn(3)
        held.append(weakref.ref(x))
        model(x)

    checked(layers.Act(), run)
    assert held[0]() is None


def test_a_compiled_model_is_run_as_it_is_written(register: Register) -> None:
    register("Act")
    model = torch.compile(nn.Sequential(nn.Linear(8, 8), layers.Act()), backend="eager", fullgraph=True)
    model(torch.randn(3, 8))
    row = checked(model, lambda: model(torch.randn(3, 8)))
    assert (row.outcome, row.calls) == ("kernel", 1)


def test_a_shared_function_is_tested_once_for_all_its_users(register: Register, hub: Hub, tmp_path: Path) -> None:
    from models_for_tests import Attention

    body = "def forward(self, q, k, scale=1.0):\n        return q * scale, k * scale"
    folder = write_kernel(tmp_path / "rotary", name="rotary", layers=layers.source(body), init="from . import layers")
    register_kernel_mapping({"rotary": {"cpu": LocalLayerRepository(folder, layer_name="Kernel")}})
    model = nn.Sequential(Attention(), Attention())
    kernelize(model, mode=T, sample_inputs=torch.randn(3, 8), verify=True)
    rows = [row for row in kernel_report(model).rows if row.layer_name == "rotary"]
    assert [(row.outcome, row.reference, row.shared) for row in rows] == [("kernel", "float64", True)] * 2


def test_a_report_with_measurements_is_saved_and_shown(register: Register) -> None:
    register("Norm")
    model = nn.Sequential(layers.Norm())
    checked(model, torch.randn(3, 8))
    report = kernel_report(model)
    assert type(report).from_dict(report.to_dict()) == report
    same, head = str(report).splitlines()[1:3]
    assert same.endswith("; against: float64; calls: 1")
    assert {"error", "runs"} <= set(head.split())
