"""What this machine is, against what torch says itself."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from kernelhub.core.backends import BY_NAME
from kernelhub.hub import probe


def test_it_agrees_with_torch_without_importing_it():
    code = (
        "import sys; from kernelhub.hub.probe import detect_host, torch_versions; host = detect_host();"
        "assert 'torch' not in sys.modules; import torch;"
        "assert torch.__version__.startswith('%d.%d' % host.torch), host;"
        "assert torch_versions()['__version__'] == torch.__version__;"
        "expected = 'cuda' if torch.version.cuda else 'rocm' if torch.version.hip else 'cpu';"
        "assert host.backend == expected, host; assert host.cxx_abi == 'cxx11'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_machine_is_spelt_as_variants_are():
    host = probe.detect_host()
    assert host.cpu in ("x86_64", "aarch64")
    assert host.os == platform.system().lower()
    assert host.python == sys.version_info[:2]


@pytest.mark.parametrize(
    ("versions", "backend", "version"),
    [
        ({"__version__": "2.11.0+cu130", "cuda": "13.0"}, "cuda", (13, 0)),
        ({"__version__": "2.9.0", "hip": "6.4.43482-0f2d60242"}, "rocm", (6, 4)),
        ({"__version__": "2.9.0", "xpu": "20250201"}, "xpu", (2025, 2)),
        ({"__version__": "2.9.0"}, "cpu", None),
        ({}, "cpu", None),
    ],
)
def test_the_backend_is_what_torch_was_built_for(versions, backend, version):
    assert probe._torch_backend(versions, "x86_64", "linux") == (BY_NAME[backend], version)


def test_torch_on_a_mac_is_built_for_metal():
    assert probe._torch_backend({"__version__": "2.13.0"}, "aarch64", "darwin") == (BY_NAME["metal"], None)
    assert probe._torch_backend({"__version__": "2.2.0"}, "x86_64", "darwin") == (BY_NAME["cpu"], None)


def test_a_cpu_has_no_architectures():
    assert probe.visible_archs(BY_NAME["cpu"]) == ()
