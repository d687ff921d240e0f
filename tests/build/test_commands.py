"""`init`, `build`, `check-abi` and `benchmark` as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from build_projects import TOML, tiny
from kernelfiles import write_files

from kernelhub import Hub, Settings
from kernelhub.build.recipe import Recipe
from kernelhub.cli.main import run
from kernelhub.errors import KernelHubWarning, NoCompatibleVariant


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project, for each backend there is."""
    folder = tmp_path_factory.mktemp("init") / "my-relu"
    assert run(["init", str(folder), "--backends", "cpu,cuda"]) == 0
    return folder


def test_a_new_project_is_read_without_a_note(project):
    recipe = Recipe.load(project)
    assert (recipe.name, recipe.backends, recipe.notes) == ("my-relu", ("cpu", "cuda"), ())
    assert [section.sources for section in recipe.sections] == [("relu_cpu/relu.cpp",), ("relu_cuda/relu.cu",)]
    assert [path for path in project.rglob("*") if path.is_file() and re.search("@[a-z_]+@", path.read_text())] == []


def test_a_new_project_builds_tests_and_benchmarks(project, toolchain, capsys, tmp_path, monkeypatch):
    assert run(["build", str(project), "--backend", "cpu", "--json"]) == 0
    (built,) = json.loads(capsys.readouterr().out)["built"]
    assert built["variant"].startswith("torch-stable-abi210-cpu-")
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=project, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout + tests.stderr
    plot = tmp_path / "plot.svg"
    assert run(["benchmark", str(project), "--backend", "cpu", "--rounds", "5", "--plot", str(plot), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["benchmarks"]
    assert [(row["workload"], row["equal"], row["max_error"]) for row in rows] == [
        ("row", True, 0.0),
        ("large", True, 0.0),
    ]
    assert all(
        row["kernel"]["low_seconds"] <= row["kernel"]["median_seconds"] <= row["kernel"]["high_seconds"] for row in rows
    )
    assert plot.read_text().lstrip().startswith("<?xml")
    assert run(["benchmark", str(project), "--backend", "cpu", "--rounds", "5"]) == 0
    assert "speedup" in capsys.readouterr().out
    monkeypatch.chdir(project)
    assert run(["benchmark", "--backend", "cpu", "--rounds", "3"]) == 0
    assert capsys.readouterr().out.startswith(f"{project.name} on cpu\n"), "not '. on cpu'"


def test_an_error_that_is_not_finite_is_null(toolchain, capsys, tmp_path):
    script = """
import torch
from kernelhub import Benchmark
class Wrong(Benchmark):
    def benchmark_nan(self):
        return torch.tensor([float("nan")])
    def verify_nan(self):
        return torch.tensor([1.0])
"""
    write_files(tiny(tmp_path / "tiny"), {"benchmarks/benchmark.py": script.encode()})
    assert run(["benchmark", str(tmp_path / "tiny"), "--rounds", "3", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["benchmarks"]
    assert (row["max_error"], row["equal"]) == (None, False)


def test_init_takes_spaces_and_says_what_a_shell_takes(capsys, tmp_path):
    folder = tmp_path / "sp ace" / "my-relu"
    assert run(["init", str(folder), "--backends", "cpu, cuda"]) == 0
    assert Recipe.load(folder).backends == ("cpu", "cuda")
    assert f"cd '{folder}' && kernelhub build" in capsys.readouterr().out


def test_init_refuses_names_folders_and_backends(project, capsys, tmp_path):
    for arguments in (
        ["init", str(tmp_path / "Bad_Name")],
        ["init", str(tmp_path / "con")],
        ["init", str(tmp_path / "layers")],
        ["init", str(project)],
        ["init", str(tmp_path / "x-y"), "--backends", "tpu"],
    ):
        assert run(arguments) == 2
        error = capsys.readouterr().err
        assert "error:" in error
    assert "projects are not made for tpu\n  Expected cpu or cuda, or both." in error
    assert run(["benchmark", "org/none@v1", "--plot", str(tmp_path / "a.xyz")]) == 2, "before anything is looked for"
    assert "a.xyz is neither a .svg nor a .png" in capsys.readouterr().err
    assert run(["benchmark", "org/none@v1", "--plot", str(tmp_path / "nope" / "a.svg")]) == 2
    assert "a.svg cannot be written\n  Name a file in a folder that is there." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_init_says_what_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert run(["init", str(tmp_path / "file" / "my-relu")]) == 1
    assert f"error: cannot write {tmp_path / 'file' / 'my-relu'}: Not a directory" in capsys.readouterr().err


def test_a_compiler_whose_quotation_is_not_closed_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", 'g++ "')
    problem = "CXX is 'g++ \"', which no shell takes for a command: is a quotation mark missing?"
    assert run(["build", str(tiny(tmp_path / "tiny")), "--backend", "cpu"]) == 2
    assert problem in capsys.readouterr().err
    assert run(["doctor", "--json"]) == 1
    (finding,) = [item for item in json.loads(capsys.readouterr().out) if item["name"] == "CXX"]
    assert finding["value"] == problem
    with pytest.raises(NoCompatibleVariant, match="is a quotation mark missing"), pytest.warns(KernelHubWarning):
        Hub(Settings(cache=tmp_path / "store", offline=True, cxx='g++ "')).load_local(tmp_path / "tiny")


def test_build_says_what_is_skipped_and_refuses_it_by_name(toolchain, capsys, tmp_path):
    tiny(tmp_path / "tiny", toml=TOML.replace('["cpu"]', '["cpu", "xpu"]'))
    assert run(["build", str(tmp_path / "tiny")]) == 0
    out = capsys.readouterr().out
    assert "built    " in out
    assert "skipped  xpu: kernels for XPU are not built by this version" in out
    assert run(["build", str(tmp_path / "tiny"), "--backend", "xpu"]) == 2
    assert run(["build", str(tmp_path / "tiny"), "--variant", "torch-xpu"]) == 2


def test_a_failed_build_ends_with_1_and_says_where(toolchain, capsys, tmp_path):
    tiny(tmp_path / "tiny", binding="int broken = missing_name;\n")
    assert run(["build", str(tmp_path / "tiny"), "-j", "1"]) == 1
    error = capsys.readouterr().err
    assert "torch-ext/binding.cpp:1: " in error
    assert "To repeat it: cd " in error


def test_update_toml(capsys, tmp_path):
    tiny(tmp_path / "tiny", toml=TOML.replace("edition = 5\n", ""))
    assert run(["build", str(tmp_path / "tiny"), "--update-toml"]) == 0
    assert "general.edition is missing" in capsys.readouterr().out
    assert Recipe.load(tmp_path / "tiny").notes == ()
    assert not (tmp_path / "tiny" / "build").exists()
    assert run(["build", str(tmp_path / "tiny"), "--update-toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == []


def test_update_toml_keeps_the_ends_of_lines_and_writes_nothing_wrong(capsys, tmp_path):
    file = tmp_path / "build.toml"
    file.write_bytes(b"\xef\xbb\xbf" + TOML.replace("edition = 5\n", "").replace("\n", "\r\n").encode())
    assert run(["build", str(tmp_path), "--update-toml"]) == 0
    assert file.read_bytes().count(b"\r\n") == file.read_bytes().count(b"\n")
    file.write_bytes(before := b'general.name = "old"\ngeneral.backends = ["cpu"]\n')
    assert run(["build", str(tmp_path), "--update-toml"]) == 4
    assert "it is laid out so that it cannot be rewritten\n  Write by hand: edition = 5" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_an_older_build_toml_is_built_with_a_note(toolchain, capsys, tmp_path):
    tiny(tmp_path / "tiny", toml=TOML.replace("edition = 5\n", ""))
    assert run(["build", str(tmp_path / "tiny")]) == 0
    assert (
        "general.edition is missing, the present one is 5 (`kernelhub build --update-toml` writes it)"
        in capsys.readouterr().err
    )


def test_check_abi_ends_with_1_where_something_is_wrong(toolchain, capsys, tmp_path):
    pytest.importorskip("kernelhub.build.abi")
    pytest.importorskip("elftools")
    tiny(tmp_path / "tiny")  # takes nothing of torch, and of the system only what is old
    assert run(["build", str(tmp_path / "tiny")]) == 0
    capsys.readouterr()
    assert run(["check-abi", str(tmp_path / "tiny"), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    library = Path(report["path"])
    library.rename(library.with_name("renamed.abi3.so"))
    assert run(["check-abi", str(tmp_path / "tiny")]) == 1
    assert "it has no PyInit_renamed" in capsys.readouterr().out
    assert run(["check-abi", str(tmp_path / "nothing")]) == 2
