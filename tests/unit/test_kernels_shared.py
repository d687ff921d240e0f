"""Kernel projects are complete by themselves, so what several need lies in each: the copies are the same."""

from __future__ import annotations

import pytest
from kernelprojects import ROOT


@pytest.mark.parametrize("name", ["direct.h", "level.h", "operands.h", "simd.h", "types.h"])
def test_copies_of_headers_are_alike(name: str) -> None:
    found = {path.parent.name: path.read_bytes() for path in sorted(ROOT.glob(f"*/*_cpu/{name}"))}
    assert len(found) >= 2
    assert len(set(found.values())) == 1, f"{name} differs between {', '.join(found)}: copy one over the others"


@pytest.mark.parametrize("name", ["device.h", "operands.h", "rows.cuh"])
def test_copies_of_cuda_headers_are_alike(name: str) -> None:
    found = {path.parent.name: path.read_bytes() for path in sorted(ROOT.glob(f"*/*_cuda/{name}"))}
    assert len(found) >= 2
    assert len(set(found.values())) == 1, f"{name} differs between {', '.join(found)}: copy one over the others"


@pytest.mark.parametrize("name", ["direct.py", "once.py", "order.py"])
def test_copies_of_python_files_are_alike(name: str) -> None:
    found = {path.parent.name: path.read_bytes() for path in sorted(ROOT.glob(f"*/torch-ext/*/{name}"))}
    assert len(found) >= 2
    assert len(set(found.values())) == 1, f"{name} differs between {', '.join(found)}: copy one over the others"
