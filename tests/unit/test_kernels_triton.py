"""When the kernels turn to Triton, and when not: asked here without it and without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernelprojects import ROOT, load_noarch

PROJECTS = ("norm", "activation", "rotary", "loss")


@pytest.fixture
def here(request: pytest.FixtureRequest) -> ModuleType:
    """The module that decides, newly imported."""
    return load_noarch("norm", f"_norm_for_{request.node.name.replace('[', '_').rstrip(']')}").compiled.triton_here


def present(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found or None if name == "triton" else find(name, *rest)
    )


def test_copies_of_what_decides_are_alike() -> None:
    assert len({(ROOT / name / "torch-ext" / name / "triton_here.py").read_bytes() for name in PROJECTS}) == 1


def test_on_a_cpu_nothing_of_triton_is_imported() -> None:
    """Not even where it is there: a module of that name that cannot be imported stands for it."""
    program = """
import sys, torch
from kernelprojects import load_noarch
sys.modules["triton"] = None
x = torch.randn(3, 8, requires_grad=True)
norm, activation, rotary, loss = (load_noarch(name, "_" + name) for name in ("norm", "activation", "rotary", "loss"))
norm.rms_norm(x, x[0].detach()).sum().backward()
norm.layer_norm(x, x[0], x[0])
activation.silu_and_mul(x).sum().backward()
rotary.apply_rotary(x[None], x[None], x.detach(), x.detach())
loss.cross_entropy(x, torch.tensor([1, 2, 3])).backward()
print([name for name in sys.modules if "triton_ops" in name or "triton_kernels" in name])
"""
    tests = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        cwd=tests,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "[]\n"), ran.stderr


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_on_no_gpu_is_not_taken(here: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "works", lambda kind, index: True)
    assert not here.takes(torch.zeros(2, 2, device=device))


def test_what_is_taken(here: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rules for operands, as if the CPU were a device of Triton's."""
    monkeypatch.setattr(here, "_DEVICES", frozenset(("cpu",)))
    monkeypatch.setattr(here, "works", lambda kind, index: True)
    x = torch.zeros(2, 2)
    assert here.takes(x, None, torch.nn.Parameter(x))
    assert not here.takes(x.double())
    assert not here.takes(x, x.half())
    assert not here.takes(x, x.to("meta"))
    assert not here.takes(x.as_subclass(type("Subclass", (torch.Tensor,), {})))
    taken = []
    torch.func.vmap(lambda row: taken.append(here.takes(row)) or row)(x)
    with torch.autograd.forward_ad.dual_level():
        taken.append(here.takes(x))
    assert taken == [False, False]


def test_without_triton_pytorch_runs_and_nothing_is_said(here: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not here.works("xpu", 0)


def test_triton_that_fails_is_asked_once_and_one_warning_says_so(
    here: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    present(monkeypatch, True)
    ops = ModuleType("triton_ops")
    asked = []

    def probe(device: torch.device) -> None:
        asked.append(device)
        raise RuntimeError("Failed to find C compiler.\nmore")

    ops.probe = probe
    package = here.__name__.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, f"{package}.triton_ops", ops)
    monkeypatch.setattr(sys.modules[package], "triton_ops", ops, raising=False)
    with pytest.warns(UserWarning, match=r"xpu:1 \(RuntimeError: Failed to find C compiler\.\)\. PyTorch's own code"):
        assert not here.works("xpu", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not here.works("xpu", 1)
    assert asked == [torch.device("xpu", 1)]
    monkeypatch.setattr(ops, "probe", asked.append)
    assert here.works("xpu", 2)
    assert here.works("xpu", 2)
    assert len(asked) == 2


def test_while_a_graph_is_captured_nothing_is_decided(here: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel cannot be loaded then; the next call asks again."""
    present(monkeypatch, False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not here.works("cuda", 0)
    assert not here._known
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not here.works("cuda", 0)
    assert here._known == {("cuda", 0): False}


def test_a_trace_calls_the_op_and_else_its_kernels_are_started(here: ModuleType) -> None:
    here.register("op", lambda x: ("traced", x), lambda x: ("direct", x))
    call = here.op("op")
    assert call(1) == ("direct", 1)
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert call(1) == ("traced", 1)
