"""`kernelhub verify-report`: a receipt of one machine, checked on another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernelfiles import write_kernel
from torch import nn

from kernelhub import LayerRepository, LocalLayerRepository, Mode, kernel_report, kernelize, use_kernel_mapping
from kernelhub.cli.main import run
from kernelhub.hub.client import set_default_hub
from kernelhub.layers.markers import use_kernel_forward_from_hub
from kernelhub.layers.report_values import KernelReport, ReportRow

LAYERS = """
import os
from torch import nn

if os.environ.get("NO_IMPORTS"):
    raise AssertionError("a kernel that is only checked is not imported")


class Act(nn.Module):
    def forward(self, x):
        return nn.functional.relu(x)
"""


@use_kernel_forward_from_hub("ReceiptAct")
class Act(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


class Machine:
    """A machine with a store of its own; `hub` is the folder that both know."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.hub = folder, folder / "hub"
        self._patch, self._capsys = monkeypatch, capsys
        self.move_to("first")

    def move_to(self, name: str) -> None:
        self._patch.setenv("KERNELHUB_CACHE", str(self.folder / name))
        set_default_hub(None)

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def verify(self, report: Path) -> tuple[int, Any]:
        """What the other machine says."""
        self.move_to("second")
        self._patch.setenv("NO_IMPORTS", "1")
        code, out, err = self("verify-report", report, "--json")
        assert err == "" or code, err
        return code, json.loads(out)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Machine]:
    for name in [name for name in os.environ if name.startswith(("KERNEL", "HF_", "LOCAL_KERNELS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KERNELHUB_OFFLINE", "1")
    monkeypatch.setenv("KERNELHUB_BUILD", "never")
    made = Machine(tmp_path, monkeypatch, capsys)
    files = {"__init__.py": "from . import layers\n", "layers.py": LAYERS}
    code, _, err = made("publish", write_kernel(tmp_path / "small", code=files), made.hub, "--repo-id", "org/small")
    assert code == 0, err
    monkeypatch.setenv("KERNELHUB_HUBS", str(made.hub))
    yield made
    set_default_hub(None)


def receipt(machine: Machine, repository: Any, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """The saved report of a model with two layers that run the repository's kernel."""
    model = nn.Sequential(Act(), Act())
    with use_kernel_mapping({"ReceiptAct": {"cpu": repository}}, inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE, device="cpu", sample_inputs=torch.randn(3, 4), verify=True)
    report = kernel_report(model)
    assert len(report.kernels) == 2, str(report)
    path = machine.folder / "report.json"
    report.save(path)
    if change is not None:
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))
    return path


PUBLISHED = LayerRepository("org/small", layer_name="Act", version=1)


def test_a_receipt_is_checked_on_another_machine_without_importing_anything(machine: Machine) -> None:
    code, found = machine.verify(receipt(machine, PUBLISHED))
    (kernel,) = found["kernels"]
    assert code == 0
    assert (kernel["state"], kernel["repository"], kernel["layers"]) == ("same", "org/small", 2)
    assert (found["layers"], found["checked"], found["model"]) == (2, 2, "Sequential")
    assert found["machine"]["torch"] == torch.__version__
    code, out, _ = machine("verify-report", machine.folder / "report.json")
    assert (code, "2 of 2 layers" in out) == (0, True)


def test_another_digest_is_said_and_ends_with_4(machine: Machine) -> None:
    def forged(raw: dict[str, Any]) -> None:
        for row in raw["rows"]:
            row["digest"] = "sha256-" + "A" * 43 + "="

    code, found = machine.verify(receipt(machine, PUBLISHED, forged))
    assert code == 4
    assert found["kernels"][0]["state"] == "different"
    assert "here it has the digest sha256-" in found["kernels"][0]["reason"]


def test_a_hub_that_serves_other_bytes_ends_with_4(machine: Machine) -> None:
    path = receipt(machine, PUBLISHED)
    archives = [file for file in (machine.hub / "blobs").rglob("*") if file.is_file()]
    assert archives
    for archive in archives:
        data = bytearray(archive.read_bytes())
        data[len(data) // 2] ^= 1
        archive.chmod(0o644)
        archive.write_bytes(bytes(data))
    code, found = machine.verify(path)
    assert code == 4, found
    assert found["kernels"][0]["state"] == "different"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"repository": "org/none"}, "was not found"),
        ({"commit": "0" * 40}, ""),
        ({"commit": "v1"}, "is no commit"),
        ({"repository": "../../etc"}, ""),
        ({"variant": "torch-cuda"}, "has no torch-cuda"),
        ({"variant": None}, "does not say which variant"),
        ({"digest": None}, "does not say which variant, or not its digest"),
        ({"repository": "/nowhere/at/all", "commit": None}, "which is not here"),
    ],
)
def test_what_cannot_be_had_here_is_said_and_ends_with_1(machine: Machine, change: dict[str, Any], reason: str) -> None:
    code, found = machine.verify(receipt(machine, PUBLISHED, lambda raw: raw["rows"][0].update(change)))
    states = {kernel["state"]: kernel for kernel in found["kernels"]}
    assert code == 1
    assert set(states) == {"same", "not checked"}, "the other row could be"
    assert reason in states["not checked"]["reason"]
    assert (found["checked"], found["layers"]) == (1, 2)


def test_kernels_in_folders_are_checked_where_the_folder_is_here(machine: Machine) -> None:
    folder = machine.folder / "small"
    path = receipt(machine, LocalLayerRepository(folder, layer_name="Act"))
    assert machine.verify(path)[0] == 0
    (file,) = folder.rglob("layers.py")
    file.write_text(LAYERS + "# edited\n")
    code, found = machine.verify(path)
    assert (code, found["kernels"][0]["state"]) == (4, "different")
    shutil.rmtree(folder)
    assert machine.verify(path)[0] == 1


def test_embedded_kernels_are_made_again_and_compared(machine: Machine) -> None:
    model_layer = LayerRepository("kernelhub/activation", layer_name="SiLU", version=1)

    @use_kernel_forward_from_hub("ReceiptAct")
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x)

    model = nn.Sequential(Gate())
    with use_kernel_mapping({"ReceiptAct": {"cpu": model_layer}}, inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    path = machine.folder / "report.json"
    kernel_report(model).save(path)
    assert machine.verify(path)[0] == 0
    raw = json.loads(path.read_text())
    raw["rows"][0]["variant"] = "torch-stable-abi210-cpu-x86_64-linux"
    path.write_text(json.dumps(raw))
    code, found = machine.verify(path)
    assert code == 1, found
    assert "compiled there" in found["kernels"][0]["reason"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "schema_version 1"),
        ('{"schema_version": 2}', "newer kernelhub"),
        ('{"schema_version": 1, "model": "M", "rows": {}}', "`rows`"),
        ('{"schema_version": 1, "model": "M", "rows": [1]}', "row 0 is no object"),
        ('{"schema_version": 1, "model": "M", "rows": [{"path": "a"}]}', "row 0 has no class_name"),
        ('{"schema_version": 1, "model": "M", "rows": [{"path": 1}]}', "path is str, got 1"),
        ('{"schema_version": 1, "model": "M", "rows": [{"run": "rm"}]}', "'run' is nothing"),
        ('{"schema_version": 1, "model": "M", "rows": [], "notes": "text"}', "`notes`"),
        ('{"schema_version": 1, "model": "M", "rows": [], "machine": {"torch": 2}}', "`machine`"),
    ],
)
def test_files_that_are_no_reports_are_errors_with_their_place(machine: Machine, text: str, message: str) -> None:
    path = machine.folder / "bad.json"
    path.write_text(text)
    code, _, err = machine("verify-report", path)
    assert code == 4
    assert message in err
    assert "bad.json" in err


def test_names_in_a_report_are_shown_as_they_are(machine: Machine) -> None:
    """Neither markup that means nothing, nor what steers a terminal, nor half of a character, is more than text."""
    path = machine.folder / "report.json"
    row = ReportRow(
        "0",
        "Act",
        "Act",
        None,
        None,
        "kernel",
        repository="org/\x9b2J\ud800",
        variant="torch-cpu",
        digest="x",
        commit="x",
    )
    path.write_text(json.dumps(KernelReport("[/x] [red]\x1b[2J\ud800", (row,)).to_dict()))
    code, out, err = machine("verify-report", path)
    assert code in (1, 4), (out, err)
    assert "[/x] [red]\\x1b[2J\\ud800" in out + err
    code, out, err = machine("verify-report", path, "--json")
    assert code in (1, 4), (out, err)
    assert json.loads(out)
    assert all(char.isprintable() or char == "\n" for char in out + err)


def test_a_report_that_is_not_there_is_wrong_use(machine: Machine) -> None:
    code, _, err = machine("verify-report", machine.folder / "none.json")
    assert code == 2
    assert "cannot read the report" in err


def test_a_report_without_kernels_has_nothing_to_check(machine: Machine) -> None:
    path = machine.folder / "report.json"
    kernel_report(nn.Sequential(Act())).save(path)
    code, found = machine.verify(path)
    assert (code, found["layers"]) == (0, 0)
    assert KernelReport.load(path).rows[0].outcome == "original"


def test_prune_knows_verdicts(machine: Machine) -> None:
    receipt(machine, PUBLISHED)
    assert json.loads(machine("cache", "list", "--json")[1])["verdicts"] == 1
    assert "1 verdict" in machine("cache", "list")[1]
    assert json.loads(machine("cache", "prune", "--older-than", "1", "--json")[1])["removed"] == []
    assert "1 verdict" in machine("cache", "prune", "--older-than", "0")[1]
    receipt(machine, PUBLISHED)
    assert "0 verdicts" in machine("cache", "prune", "org/other")[1]
    assert "1 verdict" in machine("cache", "prune", "org/small")[1], "its kernel is gone"
    receipt(machine, PUBLISHED)
    assert "1 verdict" in machine("cache", "prune", "--all")[1]
