"""The built wheel, installed into an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_the_package_the_kernels_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"kernelhub"}
    for name in ("py.typed", "_kernels/norm/build.toml", "_kernels/activation/torch-ext/activation/__init__.py"):
        assert f"kernelhub/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".so")) or "/build/torch" in name]


def test_it_runs_in_a_clean_environment_without_torch(wheel, tmp_path):
    """Its own dependencies are all that it needs to select, fetch and verify a kernel."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*install, "--constraint", str(ROOT / "constraints.txt"), str(wheel)], check=True, capture_output=True
    )
    variables = {"PATH": str(environment / "bin"), "KERNELHUB_CACHE": str(tmp_path / "store"), "KERNELHUB_OFFLINE": "1"}

    def kernelhub(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin" / "kernelhub"), *arguments]
        return subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "Swap faster compute kernels" in kernelhub("--help").stdout
    done = kernelhub("get", "kernelhub/norm@v1")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "layers.py").is_file()
    missing = kernelhub("serve", str(tmp_path))
    assert "pip install 'kernelhub[server]'" in missing.stderr
