"""Benchmarks of kernels: what is timed, what is compared, and what the numbers say."""

from __future__ import annotations

import py_compile
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernelhub.benchmark import Measurement, Summary, compare, run_script, scripts, summarize
from kernelhub.errors import InvalidReference

SCRIPT = """
import torch
from {module} import Benchmark

class Doubles(Benchmark):
    seed = 3

    def setup(self):
        self.x = torch.randn(4, device=self.device)
        self.calls = []

    def setup_wrong(self):
        self.x = torch.ones(4)

    def benchmark_out(self):
        self.out = self.kernel.double(self.x)

    def verify_out(self):
        assert torch.equal(self.x, torch.randn(4, generator=torch.Generator().manual_seed(3)))
        return self.x * 2

    def benchmark_returned(self):
        return self.kernel.double(self.x)

    def verify_returned(self):
        return self.x * 2

    def benchmark_wrong(self):
        self.out = self.kernel.double(self.x) + 1

    def verify_wrong(self):
        return self.x * 2

    def benchmark_alone(self):
        self.kernel.double(self.x)

class Unrelated:
    pass
"""


@pytest.fixture
def kernel() -> ModuleType:
    module = ModuleType("kernel")
    module.double = lambda x: x + x  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("module", ["kernelhub", "kernels.benchmark"])
def test_every_workload_is_set_up_timed_and_compared(
    module: str, kernel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path" / "kernels").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))  # a folder of the package's name is not the package
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    script = tmp_path / "benchmark.py"
    script.write_text(SCRIPT.format(module=module))
    found = list(run_script(script, kernel, "cpu", rounds=5, warmup=1))
    assert [(item.benchmark, item.workload, item.equal, item.max_error) for item in found] == [
        ("Doubles", "out", True, 0.0),
        ("Doubles", "returned", True, 0.0),
        ("Doubles", "wrong", False, 1.0),
        ("Doubles", "alone", None, None),
    ]
    assert [(item.kernel.count, item.reference is None) for item in found] == [(5, False)] * 3 + [(5, True)]
    assert "kernels" not in sys.modules


def test_the_workloads_of_a_base_class_come_first(kernel: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "benchmark_more.py"
    script.write_text(
        SCRIPT.format(module="kernelhub") + "class More(Doubles):\n    def benchmark_a(self):\n        pass\n"
    )
    found = [
        item.workload for item in run_script(script, kernel, "cpu", rounds=3, warmup=0) if item.benchmark == "More"
    ]
    assert found == ["out", "returned", "wrong", "alone", "a"]


def test_scripts_are_found_by_name(tmp_path: Path, kernel: ModuleType) -> None:
    with pytest.raises(InvalidReference, match="has no benchmarks"):
        scripts(tmp_path)
    folder = tmp_path
    for name in ("benchmark_b.py", "benchmark.py", "helper.py"):
        (folder / name).write_text("x = 1\n")
    assert [path.name for path in scripts(tmp_path)] == ["benchmark.py", "benchmark_b.py"]
    with pytest.raises(InvalidReference, match="has no class with benchmark_"):
        list(run_script(folder / "benchmark.py", kernel, "cpu"))


def test_scripts_leave_no_bytecode_and_run_none(
    tmp_path: Path, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the store it would be what was not published: the next run would not find the scripts as they were fetched."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    script = tmp_path / "benchmark.py"
    text = "from kernelhub import Benchmark\nclass B(Benchmark):\n    def benchmark_{}(self): pass\n"
    script.write_text(text.format("evil"))
    planted = Path(py_compile.compile(str(script), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH))
    script.write_text(text.format("good"))
    assert [item.workload for item in run_script(script, kernel, "cpu", rounds=3, warmup=0)] == ["good"]
    planted.unlink()
    list(run_script(script, kernel, "cpu", rounds=3, warmup=0))
    assert list(planted.parent.iterdir()) == []


def test_the_interval_is_that_of_the_median() -> None:
    """Ranks 40 and 60 of 100: the binomial's 2.5 % and 97.5 % points, as tables of sign-test intervals have them."""
    times = [float(number) for number in range(1, 101)]
    assert summarize(times[::-1]) == Summary(50.5, 41.0, 61.0, 100)
    assert summarize(times).median == statistics.median(times)
    assert summarize([1.0]) == Summary(1.0, 1.0, 1.0, 1)
    assert summarize([1.0, 3.0]) == Summary(2.0, 1.0, 3.0, 2)


def test_the_interval_holds_the_true_median_about_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(2000, 60, generator=generator, dtype=torch.float64).pow(3)  # skewed, as times are
    held = sum(found.low <= 0.125 <= found.high for found in map(summarize, samples.tolist()))
    assert 0.94 < held / 2000 < 0.985


def test_speedup() -> None:
    fast, slow = Summary(1.0, 1.0, 1.0, 3), Summary(3.0, 3.0, 3.0, 3)
    assert Measurement("A", "b", fast, slow).speedup == 3.0
    assert Measurement("A", "b", fast).speedup is None


def test_comparing() -> None:
    one = torch.ones(3)
    assert compare(one, one + 1e-6) == (pytest.approx(1e-6, rel=0.1), True)
    assert compare(one, one + 1e-3)[1] is False
    assert compare(one.bfloat16(), one.bfloat16() * 1.0078125)[1] is True
    assert compare(one, torch.ones(2)) == (None, False)
    assert compare(None, one) == (None, False)
    assert compare((one, one), [one, one + 1]) == (1.0, False)
    assert compare(torch.tensor([float("nan")]), torch.tensor([float("nan")]))[1] is True
    assert compare(torch.tensor([1, 2]), torch.tensor([1, 3])) == (1.0, False)
    assert compare(torch.empty(0), torch.empty(0)) == (0.0, True)
    assert compare(3, 3) == (None, True)


def test_complex_numbers_are_compared_whole() -> None:
    one = torch.tensor([1 + 1j, 2 - 1j])
    assert compare(one, one.conj())[1] is False
    assert compare(one, one + 1e-6j) == (pytest.approx(1e-6, rel=0.1), True)
    assert compare(one, one + 3j) == (3.0, False)
    assert compare(one, one.real)[1] is False
    assert compare(torch.complex(one.real, one.real * float("nan")), one)[1] is False


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_whole_numbers_are_compared_exactly(dtype: torch.dtype) -> None:
    large = torch.tensor([2**53, 2**62], dtype=dtype)
    assert compare(large, large) == (0.0, True)
    assert compare(torch.tensor([2**53 + 1, 2**62], dtype=dtype), large) == (1.0, False)
    assert compare(torch.tensor([2**53, 0], dtype=dtype), large) == (2.0**62, False)
    assert compare(torch.tensor([2**63 - 1]), torch.tensor([-(2**63)])) == (2.0**64, False)
    assert compare(torch.tensor([True, False]), torch.tensor([True, True])) == (1.0, False)
    assert compare(torch.tensor([-1]), torch.tensor([2**64 - 1], dtype=torch.uint64))[1] is False


def test_what_is_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    given = torch.tensor([1.0, inf, -inf, nan])
    assert compare(given, given.clone()) == (0.0, True)
    for place, value in ((0, inf), (0, nan), (1, -inf), (1, 1.0), (3, 1.0)):
        expected = given.clone()
        expected[place] = value
        assert compare(given, expected) == (inf, False)
        assert compare(expected, given) == (inf, False)
        assert compare((given, expected), (given, given)) == (inf, False)
