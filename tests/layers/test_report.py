"""The report: what runs in each layer, or why its own forward does."""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import models_for_tests as models
import pytest
import torch
from torch import nn

from kernelhub import Mode, kernel_report, kernelize, register_kernel_mapping, unkernelize
from kernelhub.errors import InvalidMetadata
from kernelhub.layers import report
from kernelhub.layers import survey as survey_module
from kernelhub.layers.mapping import use_kernel_mapping
from kernelhub.layers.mode import KernelizeFallback
from kernelhub.layers.report_values import KernelReport, ReportRow
from kernelhub.layers.repositories import Repository
from kernelhub.layers.tables import table

pytestmark = [pytest.mark.usefixtures("hub"), pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning")]

Kernel = Callable[[str], Repository]


@pytest.fixture
def model(registered: None) -> nn.Module:
    return kernelize(models.Model(), mode=Mode.INFERENCE, exclude="norm")


def test_a_row_says_which_kernel_runs_with_its_digest(model: nn.Module, folder: Path) -> None:
    """needs 1: everyone can see what ran."""
    row = kernel_report(model).rows[0]
    assert row.digest is not None
    assert row.digest.startswith("sha256-")
    assert row.to_dict() == {
        "path": "layers.0.norm",
        "class_name": "Norm",
        "layer_name": "RMSNorm",
        "device": "cpu",
        "mode": "INFERENCE",
        "outcome": "kernel",
        "reason": "",
        "repository": str(folder),
        "layer": "RMSNorm",
        "commit": None,
        "variant": "torch-cpu",
        "digest": row.digest,
        "reference": None,
        "calls": 0,
        "max_error": None,
        "max_relative_error": None,
        "worst": None,
        "speedup": None,
        "speedup_low": None,
        "speedup_high": None,
        "timed_on": None,
        "remembered": None,
        "lost": (),
        "shared": False,
        "stale": False,
    }


def test_a_layer_that_kept_its_forward_has_a_row_with_the_reason(model: nn.Module) -> None:
    row = kernel_report(model).rows[-1]
    assert (row.path, row.outcome, row.reason, row.digest) == ("norm", "original", "it is in `exclude`", None)


def test_a_report_prints_a_table_and_a_summary(model: nn.Module, folder: Path) -> None:
    found = kernel_report(model)
    lines = str(found).splitlines()
    assert lines[0] == found.summary() == f"4 of 5 kernel-aware layers run a kernel: 4 x {folder}"
    assert lines[1] == "device: cpu; mode: INFERENCE"
    assert lines[2].split() == ["path", "layer", "runs", "notes"]
    assert [line.split()[0] for line in lines[3:8]] == [row.path for row in found.rows]
    assert lines[7].split(maxsplit=3)[2:] == ["original", "it is in `exclude`"]
    (kernel,) = {
        (row.repository, (row.commit or "")[:12], row.variant, row.digest[:19]) for row in found.kernels if row.digest
    }
    assert lines[8:10] == ["", table(("kernel", "commit", "variant", "file digest"), [kernel]).splitlines()[0]]
    assert lines[10].split() == [text for text in kernel if text]
    assert len(lines) == 11
    empty = str(kernel_report(nn.Linear(1, 1))).splitlines()
    assert empty[0] == "0 of 0 kernel-aware layers run a kernel"
    assert empty[1].startswith("it has no kernel-aware layers: kernelhub.integrations.transformers.mark(model)")
    assert len(empty) == 2, "no head of a table without rows"


def test_what_differs_between_layers_stands_with_each() -> None:
    row = partial(ReportRow, class_name="Norm", layer_name="Norm", outcome="kernel", repository="me/norm", layer="Norm")
    cpu = row(
        path="a", device="cpu", mode="INFERENCE", variant="torch-cpu", digest="sha256-1", worst="gradient of weight"
    )
    gpu = row(path="b", device="cuda:0", mode="INFERENCE", variant="torch-cuda", digest="sha256-2", worst="output[0]")
    lines = str(KernelReport("Model", (cpu, gpu))).splitlines()
    assert lines[1] == "mode: INFERENCE"
    assert lines[2].split() == ["path", "layer", "runs", "worst", "device"]
    assert lines[3].split() == ["a", "Norm", "me/norm:Norm", "(torch-cpu)", "gradient", "of", "weight", "cpu"]
    assert lines[4].split() == ["b", "Norm", "me/norm:Norm", "(torch-cuda)", "cuda:0"]
    assert [line.split() for line in lines[7:]] == [
        ["me/norm", "torch-cpu", "sha256-1"],
        ["me/norm", "torch-cuda", "sha256-2"],
    ]


def test_a_report_is_saved_read_and_compared(model: nn.Module, tmp_path: Path) -> None:
    before = kernel_report(model)
    before.save(tmp_path / "report.json")
    read = KernelReport.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert read == before
    assert read.diff(before) == ()
    unkernelize(model, include="layers.0.gate")
    (line,) = before.diff(kernel_report(model))
    assert line.startswith("layers.0.gate: ")
    assert ":Gate torch-cpu sha256-" in line
    assert line.endswith("-> original (its original was given back, or it was added later)")
    assert kernel_report(model).rows[-1].reason == "it is in `exclude`"
    other = kernel_report(models.Model(layers=1))
    assert any(line.endswith("not there") for line in before.diff(other))


def test_a_report_names_the_machine_and_under_distributed_the_rank(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = kernel_report(model).machine
    assert facts["torch"] == torch.__version__
    assert facts["devices"].startswith("cpu: ")
    assert facts.keys() == {"kernelhub", "torch", "python", "system", "devices", "threads"}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert kernel_report(model).machine["rank"] == "1 of 4"


def of(**changes: object) -> KernelReport:
    """A report of one layer that runs a kernel, from one machine."""
    machine = {"torch": "2.13.0", "rank": "0 of 2"}
    row: dict[str, object] = {
        "path": "norm",
        "class_name": "Norm",
        "layer_name": "RMSNorm",
        "device": "cpu",
        "mode": "INFERENCE",
        "outcome": "kernel",
        "repository": "org/norm",
        "digest": "sha256-a",
        "reference": "float64",
        "calls": 2,
        "max_error": 1e-7,
        "worst": "output",
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
    }
    machine |= {name: str(value) for name, value in changes.items() if name in machine}
    row |= {name: value for name, value in changes.items() if name not in machine}
    return KernelReport("Model", (ReportRow(**row),), machine=machine)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ()),
        ({"torch": "2.14.0"}, ("torch: 2.13.0 -> 2.14.0",)),
        ({"rank": "1 of 2"}, ("rank: 0 of 2 -> 1 of 2",)),
        ({"device": "cuda:0"}, ("norm: device cpu -> cuda:0",)),
        ({"reference": None}, ("norm: reference float64 -> none",)),
        ({"calls": 3}, ("norm: calls 2 -> 3",)),
        ({"max_error": 1.05e-7}, ()),
        ({"max_error": 2e-7}, ("norm: error 1e-07 -> 2e-07",)),
        ({"speedup": 2.2, "speedup_low": 2.05, "speedup_high": 2.3}, ()),
        (
            {"speedup": 3.0, "speedup_low": 2.9, "speedup_high": 3.1},
            ("norm: speed 2.00x (1.90 to 2.10) -> 3.00x (2.90 to 3.10)",),
        ),
        ({"digest": "sha256-b", "calls": 3}, ("norm: org/norm:None sha256-a -> org/norm:None sha256-b",)),
        (
            {"outcome": "original", "reason": "not faster"},
            ("norm: org/norm:None sha256-a -> original (not faster)",),
        ),
    ],
)
def test_a_diff_says_what_changed_between_two_machines_or_ranks(
    changes: dict[str, object], expected: tuple[str, ...]
) -> None:
    here, there = of(timed_on="norm"), of(timed_on="norm", **changes)
    assert here.diff(there) == expected
    assert len(there.diff(here)) == len(expected)


@pytest.mark.parametrize("change", [{"max_error": 10**400}, {"speedup": 10**400}, {"speedup_low": None}])
def test_numbers_that_have_no_text_are_no_report(change: dict[str, object]) -> None:
    value = of().to_dict()
    value["rows"][0].update(change)
    with pytest.raises(InvalidMetadata, match="row 0"):
        KernelReport.from_dict(value)


def once(reason: str, **changes: object) -> KernelReport:
    """A report of one layer that keeps its forward."""
    return of(outcome="original", repository=None, digest=None, reason=reason, **changes)


def test_what_is_remembered_is_no_change() -> None:
    """Of a cached verdict the figures are those of all layers of a kind."""
    then = {"remembered": "2026-11-22 10:52:29", "calls": 4, "max_error": 5e-6, "worst": "gradient of weight"}
    assert of().diff(of(**then)) == of(**then).diff(of()) == ()
    assert of(**then).diff(of(**{**then, "remembered": "2026-11-23 10:52:29", "max_error": 1e-6})) == ()
    (line,) = of().diff(of(**{**then, "speedup": 3.0, "speedup_low": 2.9, "speedup_high": 3.1, "timed_on": "norm"}))
    assert line.startswith("norm: speed 2.00x")
    here, there = "not equal: output: it is off by 0.3", "not equal: output: it is off by 0.4"
    assert once(here).diff(once(there, remembered="2026-11-22 10:52:29")) == ()
    assert once(here).diff(once(there)) == (f"norm: reason {here} -> {there}",), "both were looked at"


def test_an_interval_of_a_verdict_is_no_change_where_they_meet() -> None:
    slow = "org/norm: not faster: 0.93x (0.90 to 0.96)"
    again = "org/norm: not faster: 0.94x (0.91 to 0.97), timed on layers.0.norm"
    timed = {"speedup": 0.93, "speedup_low": 0.90, "speedup_high": 0.96}
    assert once(slow, **timed).diff(once(again, speedup=0.94, speedup_low=0.91, speedup_high=0.97)) == ()
    (line,) = once(slow, **timed).diff(once(again, speedup=0.5, speedup_low=0.4, speedup_high=0.6))
    assert line == "norm: speed 0.93x (0.90 to 0.96) -> 0.50x (0.40 to 0.60)"
    (line,) = once(slow).diff(once(f"{again}; org/other: not equal: output"))
    assert line.startswith("norm: reason org/norm: not faster")


def test_a_proof_of_which_some_is_remembered_names_its_day_once() -> None:
    row = partial(ReportRow, class_name="Norm", layer_name="Norm", device="cpu", mode="INFERENCE", outcome="original")
    rows = (row(path="a", remembered="2026-11-22 10:52:29"), row(path="b", remembered="2026-11-22 10:52:31"))
    assert "remembered of: 2026-11-22" in str(KernelReport("Model", rows)).splitlines()[1]


def test_a_report_says_that_a_swap_was_undone(kernel: Kernel) -> None:
    """Not that no kernel is registered: what is registered by then says nothing of what was swapped."""
    with use_kernel_mapping({"RMSNorm": {"cpu": kernel("RMSNorm")}}, inherit_mapping=False):
        model = kernelize(models.Model(), mode=Mode.INFERENCE)
    loaded = pickle.loads(pickle.dumps(model))
    for one in (model, loaded):
        unkernelize(one)
        found = kernel_report(one)
        assert {row.reason for row in found.rows} == {"the model was unkernelized"}
        assert {row.mode for row in found.rows} == {None}
    never = unkernelize(models.Model())
    assert kernel_report(never).rows[0].reason == "no kernel is registered for RMSNorm"


def test_a_part_that_was_kernelized_since_has_its_own_reasons(kernel: Kernel) -> None:
    model, norm = models.Model(), {"RMSNorm": {"cpu": kernel("RMSNorm")}}
    with use_kernel_mapping(norm, inherit_mapping=False):
        unkernelize(kernelize(model, mode=Mode.INFERENCE))
        kernelize(model.layers[0], mode=Mode.INFERENCE, exclude="norm", use_fallback=KernelizeFallback.ALL)
        found = {row.path: row.reason for row in kernel_report(model).rows}
        assert found["layers.0.norm"] == "it is in `exclude`"
        assert found["layers.1.norm"] == "the model was unkernelized"
        unkernelize(model)
    assert {row.reason for row in kernel_report(model).rows} == {"the model was unkernelized"}


def test_reasons_are_those_of_the_call_also_when_the_registrations_are_others_by_now(kernel: Kernel) -> None:
    model = models.Model()
    with use_kernel_mapping(
        {"RMSNorm": {"cpu": {Mode.INFERENCE: kernel("TooMany")}}, "Gate": {"cuda": kernel("Gate")}}
    ):
        kernelize(model, mode=Mode.INFERENCE, use_fallback=KernelizeFallback.ALL)
    found = {row.path: row.reason for row in kernel_report(model).rows}
    assert "cannot stand in for" in found["norm"]
    assert found["layers.0.gate"] == "no kernel is registered for Gate on cpu (only cuda)"
    assert {row.mode for row in kernel_report(model).rows} == {"INFERENCE"}


def test_reasons_are_found_for_a_model_that_was_wrapped_or_is_part_of_another(kernel: Kernel) -> None:
    register_kernel_mapping({"Gate": {"cuda": kernel("Gate")}, "RMSNorm": {"cpu": kernel("RMSNorm")}})
    model = kernelize(models.Model(), mode=Mode.INFERENCE)
    register_kernel_mapping({}, inherit_mapping=False)
    rows = {row.path: row.reason for row in kernel_report(nn.ModuleDict({"inner": model})).rows}
    assert rows["inner.layers.0.gate"] == "no kernel is registered for Gate on cpu (only cuda)"
    part = {row.path: row.reason for row in kernel_report(model.layers[0]).rows}
    assert part == {"norm": "", "gate": "no kernel is registered for Gate"}, "what a plan says now"


def test_a_model_that_was_never_kernelized_has_the_reasons_of_a_plan(registered: None) -> None:
    rows = kernel_report(nn.ModuleList([models.Norm(), models.Mlp()])).rows
    assert [row.outcome for row in rows] == ["original"] * 2
    assert rows[0].reason == "a kernel is registered for it; kernelize to run it"
    assert rows[1].reason == "no kernel is registered for Mlp"
    assert "parameters" in kernel_report(models.Gate()).rows[0].reason


def test_what_is_kept_about_a_model_goes_with_it(registered: None) -> None:
    gc.collect()
    before = len(report._runs)
    model = kernelize(models.Model(), mode=Mode.INFERENCE)
    assert len(report._runs) == before + 1
    del model
    gc.collect()
    assert len(report._runs) == before
    model = kernelize(models.Model(), mode=Mode.INFERENCE)
    unkernelize(model)
    assert len(report._runs) == before + 1, "that it was undone"
    del model
    gc.collect()
    assert len(report._runs) == before


def test_a_walk_looks_at_each_module_a_fixed_number_of_times(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear in the number of modules, also where layers take their device from far away."""
    register_kernel_mapping({"Gate": {"cpu": kernel("Gate")}})
    looks = []
    look = survey_module._own_device
    monkeypatch.setattr(survey_module, "_own_device", lambda module: looks.append(1) or look(module))

    def count(layers: int) -> int:
        looks.clear()
        gates = [nn.Sequential(models.Gate(), nn.Identity()) for _ in range(layers)]
        kernelize(nn.Sequential(*gates, nn.Linear(1, 1)), mode=Mode.INFERENCE)
        return len(looks)

    few, many = count(50), count(500)
    assert many <= 10 * few + 10


def test_one_layer_runs_and_several_run() -> None:
    row = partial(ReportRow, class_name="N", layer_name="N", device=None, mode=None, outcome="kernel", repository="o/n")
    assert KernelReport("M", (row(path="a"),)).summary() == "1 of 1 kernel-aware layer runs a kernel: 1 x o/n"
    assert KernelReport("M", (row(path="a"), row(path="b"))).summary().startswith("2 of 2 kernel-aware layers run a")


def test_tables_leave_out_empty_columns() -> None:
    assert table(("a", "b"), [("1", "")]) == "a\n1"
    assert table(("a", "b"), []) == "a  b"
