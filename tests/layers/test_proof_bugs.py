"""Planted bugs: kernels that are wrong in one way each, as kernels have been. `verify=True` catches every one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import proof_kernels as layers
import pytest
import torch
from kernels_for_tests import write_kernel
from torch import nn

from kernelhub import LocalLayerRepository, Mode, Tolerance, kernel_report, kernelize, register_kernel_mapping
from kernelhub.layers.report_values import ReportRow

pytestmark = pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning")

I, T = Mode.INFERENCE, Mode.TRAINING  # noqa: E741 - as in the tables


class Bug(NamedTuple):
    """A kernel's wrong forward for a layer, the call that shows it, and what the report says of it."""

    layer: str
    forward: str
    expected: str
    sample: Any
    mode: Mode = I
    before: str = ""
    verify: bool | Tolerance = True
    dtype: torch.dtype = torch.float32


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def sliced(*shape: int) -> torch.Tensor:
    """A view of every second column."""
    return rows(*shape[:-1], 2 * shape[-1])[..., ::2]


OWN_BACKWARD = """
class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return norm(x, weight, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + ctx.eps)
        along = (grad * weight * x).mean(-1, keepdim=True)
        to_x = grad * weight * scale - x * scale.pow(3) * along
        to_weight = (grad * x * scale).sum(0)
        return RETURNED
"""

BUGS = {
    "wrong epsilon": Bug(
        "Norm",
        "def forward(self, x):\n        return norm(x, self.weight, 1e-5)",
        "from float64, the original by",
        rows(4, 8),
    ),
    "wrong epsilon in bfloat16, where the input is small": Bug(
        "Norm",
        "def forward(self, x):\n        return norm(x, self.weight, 1e-5)",
        "output: it is off by",
        0.02 * rows(4, 8, dtype=torch.bfloat16),
        dtype=torch.bfloat16,
    ),
    # It is nearer to float64 than the original is: only who asks for bits can refuse it.
    "wrong rounding of the weight product": Bug(
        "Norm",
        "def forward(self, x):\n        return norm(x.float(), self.weight.float(), self.eps).to(x.dtype)",
        "not the same bits",
        rows(64, 8, dtype=torch.bfloat16),
        dtype=torch.bfloat16,
        verify=Tolerance.exact(),
    ),
    "a transposed output of the same shape": Bug(
        "Act", "def forward(self, x):\n        return torch.relu(x).mT.contiguous()", "output: it is off by", rows(8, 8)
    ),
    "a transposed output": Bug(
        "Act",
        "def forward(self, x):\n        return torch.relu(x).mT",
        "its shape is (8, 3), the original's (3, 8)",
        rows(3, 8),
    ),
    "an output of another dtype": Bug(
        "Act",
        "def forward(self, x):\n        return torch.relu(x).double()",
        "its dtype is float64, the original's float32",
        rows(3, 8),
    ),
    "a non-contiguous input read as contiguous": Bug(
        "Act",
        "def forward(self, x):\n        return torch.relu(x.as_strided(x.shape, (x.shape[1], 1)))",
        "NaN at",
        (sliced(3, 8),),
    ),
    "an expanded input read as contiguous": Bug(
        "Act",
        "def forward(self, x):\n        return torch.relu(torch.as_strided(x, x.shape, (x.shape[1], 1)))",
        "NaN at",
        (rows(1, 8).expand(3, 8),),
    ),
    "a batch dimension above 65535": Bug(
        "Act",
        "def forward(self, x):\n        out = x.clone()\n        out[:65535].relu_()\n        return out",
        "output: it is off by",
        rows(65540, 2),
    ),
    "a sequence length that is not a multiple of the block": Bug(
        "Act",
        "def forward(self, x):\n        out, whole = torch.zeros_like(x), len(x) // 4 * 4\n        out[:whole] = torch.relu(x[:whole])\n        return out",
        "output: it is off by",
        rows(6, 8).abs(),
    ),
    "a backward that is off by a factor": Bug(
        "Norm",
        "def forward(self, x):\n        return Norm.apply(x, self.weight, self.eps)",
        "gradient of x: it is off by",
        rows(4, 8),
        T,
        OWN_BACKWARD.replace("RETURNED", "2 * to_x, to_weight, None"),
    ),
    "a backward that forgets the weight": Bug(
        "Norm",
        "def forward(self, x):\n        return Norm.apply(x, self.weight, self.eps)",
        "the kernel has no gradient there",
        rows(4, 8),
        T,
        OWN_BACKWARD.replace("RETURNED", "to_x, None, None"),
    ),
    "a result without a backward": Bug(
        "Norm",
        "def forward(self, x):\n        return norm(x.detach(), self.weight.detach(), self.eps)",
        "the kernel has no gradient there",
        rows(4, 8),
        T,
    ),
    "a hard-coded activation": Bug(
        "Act", "def forward(self, x):\n        return nn.functional.silu(x)", "output: it is off by", rows(3, 8)
    ),
    "a write into the input": Bug(
        "Act", "def forward(self, x):\n        return x.relu_()", "x after the call: it is off by", rows(3, 8)
    ),
    "a write into the input past autograd": Bug(
        "Act",
        "def forward(self, x):\n        out = torch.relu(x)\n        x.data.zero_()\n        return out",
        "x after the call: it is off by",
        rows(3, 8),
        T,
    ),
    "a write into the weight": Bug(
        "Norm",
        "def forward(self, x):\n        out = norm(x, self.weight, self.eps)\n        self.weight.data.mul_(2)\n        return out",
        "weight after the call",
        rows(3, 8),
    ),
    "uninitialised padding read": Bug(
        "Act",
        "def forward(self, x):\n        padded = x.new_empty(x.shape[0] + 1, x.shape[1])\n        padded[:-1] = x\n"
        "        return torch.relu(x) + 0 * padded.sum()",
        "called again: output: NaN at",
        rows(3, 8),
    ),
    "a read past the end of the input": Bug(
        "Act",
        "def forward(self, x):\n        past = x.as_strided((x.numel() + 1,), (1,))\n        return torch.relu(x) + 0 * past[-1]",
        "output: NaN at",
        rows(3, 8),
    ),
    "NaN swallowed": Bug(
        "Act",
        "def forward(self, x):\n        return torch.relu(x).nan_to_num(0.0)",
        "no NaN at 1 place where the original has it, the first at (1,)",
        torch.tensor([1.0, float("nan"), -1.0]),
    ),
    "an infinity clipped": Bug(
        "Act",
        "def forward(self, x):\n        return torch.relu(x).clamp(max=3e38)",
        "no inf at 1 place",
        torch.tensor([1.0, float("inf"), -1.0]),
    ),
    "a result that depends on the order of threads": Bug(
        "Act",
        """def forward(self, x):
        ORDER.reverse()  # as the scheduler may
        out, turn = torch.relu(x), [threading.Event(), threading.Event()]

        def write(value, mine, next):
            mine.wait(10)
            out[0, 0] = value
            next.set()

        turns = [turn[ORDER[0]], turn[ORDER[1]], threading.Event()]
        threads = [threading.Thread(target=write, args=(out[0, 0].item() + index, turn[index], turns[ORDER.index(index) + 1]))
                   for index in (0, 1)]
        for thread in threads:
            thread.start()
        turns[0].set()
        for thread in threads:
            thread.join(10)
        return out""",
        "output: it is off by 1",
        rows(3, 8),
        before="ORDER = [0, 1]",
    ),
    "a result kept between calls, by shape": Bug(
        "Act",
        "def forward(self, x):\n        if x.shape not in KEPT:\n            KEPT[x.shape] = torch.relu(x)\n        return KEPT[x.shape]",
        "called with other values in between: output",
        rows(3, 8),
        before="KEPT = {}",
    ),
    "a result in memory that the next call writes to": Bug(
        "Act",
        "def forward(self, x):\n        out = KEPT.setdefault(x.shape, torch.empty_like(x))\n        return out.copy_(torch.relu(x))",
        "output",
        rows(3, 8),
        before="KEPT = {}",
    ),
    "a state kept on the module": Bug(
        "Act",
        "def forward(self, x):\n        self.before = torch.relu(x)\n        return self.before",
        "the attribute before that it sets: the kernel has it, the original has not",
        rows(3, 8),
    ),
    "a sum that grows from call to call": Bug(
        "Act",
        "def forward(self, x):\n        COUNT.append(1)\n        return torch.relu(x) + (len(COUNT) - 1)",
        "off by",
        rows(3, 8),
        before="COUNT = []",
    ),
    "an exception": Bug(
        "Act",
        "def forward(self, x):\n        raise RuntimeError('no such launch')",
        "the kernel raises RuntimeError: no such launch",
        rows(3, 8),
    ),
    "an exception in the backward": Bug(
        "Norm",
        "def forward(self, x):\n        return Norm.apply(x, self.weight, self.eps)",
        "the kernel raises ZeroDivisionError",
        rows(4, 8),
        T,
        OWN_BACKWARD.replace("RETURNED", "1 / 0"),
    ),
    "no output": Bug(
        "Act", "def forward(self, x):\n        torch.relu(x)", "output: None, the original has a tensor", rows(3, 8)
    ),
}


def verified(tmp_path: Path, bug: Bug, forward: str) -> tuple[nn.Module, ReportRow]:
    code = layers.source(forward, bug.before)
    folder = write_kernel(tmp_path / "kernel", name="bug", layers=code, init="from . import layers")
    register_kernel_mapping({bug.layer: {"cpu": {T: LocalLayerRepository(folder, layer_name="Kernel")}}})
    model = getattr(layers, bug.layer)().to(bug.dtype)
    sample = bug.sample
    if bug.mode is T and isinstance(sample, torch.Tensor):
        sample = lambda model: model(bug.sample.clone().requires_grad_())  # noqa: E731
    kernelize(model, mode=bug.mode, device="cpu", sample_inputs=sample, verify=bug.verify)
    return model, kernel_report(model).rows[0]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", BUGS)
def test_a_wrong_kernel_is_caught_and_the_original_stays(name: str, tmp_path: Path) -> None:
    bug = BUGS[name]
    torch.manual_seed(0)
    model, row = verified(tmp_path, bug, bug.forward)
    assert row.outcome == "original"
    assert "not equal: " in row.reason
    assert bug.expected in row.reason
    assert "forward" not in vars(model)
    assert not [name for name in vars(model) if name.startswith("before")]
    weight = getattr(model, "weight", None)
    if weight is not None:
        assert torch.equal(weight, layers.Norm().weight.to(bug.dtype))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", BUGS)
def test_the_right_kernel_is_taken_in_the_same_place(name: str, tmp_path: Path) -> None:
    """What the bugs are caught by does not refuse what is right."""
    bug = BUGS[name]
    _, row = verified(tmp_path, bug, layers.RIGHT[bug.layer])
    assert (row.outcome, row.reason) == ("kernel", "")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("mode", [I, T])
def test_a_right_backward_is_equal(tmp_path: Path, mode: Mode) -> None:
    """A backward of the kernel's own, in the form that the wrong ones have."""
    right = OWN_BACKWARD.replace("RETURNED", "to_x, to_weight, None")
    bug = Bug(
        "Norm",
        "def forward(self, x):\n        return Norm.apply(x, self.weight, self.eps)",
        "",
        rows(64, 8),
        mode,
        right,
    )
    _, row = verified(tmp_path, bug, bug.forward)
    assert (row.outcome, row.reason) == ("kernel", "")
