"""Projects in the shapes that kernels are written in: compiled, loaded, and the same bytes when compiled again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from build_projects import BINDING, TOML, copied, tiny
from kernelfiles import write_files

from kernelhub import Hub, Settings
from kernelhub.build.assemble import Workshop
from kernelhub.build.ninja import plan
from kernelhub.build.project import build_project
from kernelhub.build.recipe import Recipe
from kernelhub.build.sources import native_files, source_digest
from kernelhub.build.targets import Target, compiled_target
from kernelhub.core.metadata import Metadata
from kernelhub.errors import BuildFailed, InvalidMetadata, InvalidReference
from kernelhub.hub.probe import detect_host
from kernelhub.hub.verify import verify

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".peers"


def variant_of(project: Path) -> Path:
    (folder,) = (project / "build").iterdir()
    return folder


def load(project: Path, tmp_path: Path):
    return Hub(Settings(cache=tmp_path / "store")).load_local(project).module


def test_one_op_on_the_stable_abi(build, tmp_path):
    project, (built,) = build("relu-stable")
    host = detect_host()
    assert built.variant == f"torch-stable-abi210-cpu-{host.cpu}-{host.os}"
    assert built.path == variant_of(project)
    verified = verify(built.path)
    ident = verified.metadata.id
    assert ident.startswith("_relu_stable_cpu_")
    assert set(verified.digest.files) == {
        "__init__.py", "_ops.py", "relu_stable/__init__.py", f"{ident}.abi3.so",
    }  # fmt: skip
    kernel = load(project, tmp_path)
    x = torch.randn(5, 7)
    assert torch.equal(kernel.relu(x), torch.relu(x))
    assert torch.equal(getattr(torch.ops, ident).relu(x.t()), torch.relu(x.t()))


def test_an_error_in_a_kernel_is_a_runtime_error_that_names_the_source_by_its_path_in_the_project(build, tmp_path):
    kernel = load(build("relu-stable")[0], tmp_path)
    with pytest.raises(RuntimeError, match=r"relu_cpu/relu\.cpp:8, relu takes float32 tensors"):
        kernel.relu(torch.zeros(3, dtype=torch.int64))


def test_ops_pass_torchs_own_check(build, tmp_path):
    kernel = load(build("relu-stable")[0], tmp_path)
    op = getattr(
        torch.ops, variant_of(build("relu-stable")[0]).joinpath("_ops.py").read_text().split("`")[1].split(".")[-1]
    )
    torch.library.opcheck(op.relu.default, (torch.randn(3, 4),))
    assert torch.equal(torch.compile(kernel.relu, backend="aot_eager", fullgraph=True)(torch.ones(2)), torch.ones(2))


def test_several_sources_headers_elsewhere_data_files_fakes_and_autograd(build, tmp_path):
    project, (built,) = build("poly-ops")
    assert {"data.json", "inner/fakes.py", "inner/autograd.py"} < set(verify(built.path).digest.files)
    assert not (built.path / "notes.txt").exists()
    kernel = load(project, tmp_path)
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    assert kernel.DATA == {"answer": 42}
    assert kernel.square(x.detach()).tolist() == [3.0, 12.0, 27.0]  # POLY_SCALE is a flag of its section alone
    kernel.cube(x).sum().backward()
    assert x.grad.tolist() == [3.0, 12.0, 27.0]
    with torch._subclasses.FakeTensorMode():
        assert kernel.square(torch.empty(4, 5)).shape == (4, 5)


def test_an_extension_of_one_torch_and_backends_that_are_skipped(build, tmp_path):
    project, done = build("relu-torch")
    built, cuda, rocm = done
    major, minor = detect_host().torch
    assert built.variant == f"torch{major}{minor}-cxx11-cpu-{detect_host().cpu}-linux"
    assert (cuda.path, rocm.path) == (None, None)
    assert "cutlass_3_8" in cuda.reason
    assert "ROCm" in rocm.reason
    assert load(project, tmp_path).relu(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


@pytest.mark.skipif(not (PEERS / "kernels").is_dir(), reason="the kernels package is not in .peers")
def test_the_kernels_package_loads_what_is_written(build):
    code = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
relu, poly = (get_local_kernel(Path(path)) for path in sys.argv[1:])
assert relu.relu(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
assert poly.square(torch.tensor([2.0])).tolist() == [12.0] and poly.DATA == {"answer": 42}
"""
    folders = [str(build(name)[0]) for name in ("relu-stable", "poly-ops")]
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code, *folders], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr


def test_the_package_in_the_package_has_the_kernels_symbols(build):
    """Older clients import `<variant>/<name>/__init__.py` from `sys.path`."""
    folder = variant_of(build("relu-stable")[0])
    code = "import torch, relu_stable; assert relu_stable.relu(torch.tensor([-1.0])).item() == 0.0"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


def test_a_clean_rebuild_elsewhere_gives_the_same_bytes(build, toolchain, tmp_path):
    first = variant_of(build("relu-stable")[0])
    project = copied("relu-stable", tmp_path / "quite" / "another place")
    build_project(project, Workshop(toolchain, tmp_path / "work of another name", jobs=1))
    second = variant_of(project)
    files = {path.relative_to(first) for path in first.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert [path for path in files if (first / path).read_bytes() != (second / path).read_bytes()] == []


def test_no_path_of_this_machine_is_in_a_binary(build):
    for name in ("relu-stable", "relu-torch"):
        library = next(variant_of(build(name)[0]).glob("*.so")).read_bytes()
        assert str(ROOT).encode() not in library
        assert str(Path.home()).encode() not in library
        assert b"projects" not in library


def test_a_build_of_the_stable_abi_takes_only_stable_symbols(build):
    abi = pytest.importorskip("kernelhub.build.abi")
    (report,) = abi.check(build("relu-stable")[0] / "build")
    # How old the system may be depends on the compiler here; what the kernel takes of torch and Python does not.
    assert [problem for problem in report.problems if not problem.startswith("asks for GLIBC")] == []
    (other,) = abi.check(build("relu-torch")[0] / "build")
    renamed = build("relu-torch")[0] / "renamed" / "torch-stable-abi210-cpu-x86_64-linux"
    renamed.mkdir(parents=True, exist_ok=True)
    (renamed / other.path.name).write_bytes(other.path.read_bytes())
    (wrong,) = abi.check(renamed)
    assert any("not in torch's stable ABI" in problem for problem in wrong.problems)
    assert not any("not in torch's stable ABI" in problem for problem in other.problems)


# Namespaces


def ident(project: Path, toolchain) -> str:
    recipe = Recipe.load(project)
    target = compiled_target(recipe, "cpu", toolchain, ())
    assert isinstance(target, Target)
    return plan(recipe, target, toolchain, native_files(project, recipe), source_digest(project, recipe)).ident


def test_everything_that_makes_the_binary_makes_the_namespace(toolchain, tmp_path, monkeypatch):
    project = tiny(tmp_path / "tiny")
    compiler, torch_install = toolchain.cxx, toolchain.torch
    elsewhere = replace(torch_install, root=Path("/elsewhere"))
    assert ident(tiny(tmp_path / "again"), toolchain) == ident(project, toolchain)
    assert ident(project, replace(toolchain, torch=elsewhere, ninja=("/bin/ninja",))) == ident(project, toolchain)
    changed = {
        ident(project, toolchain),
        ident(project, replace(toolchain, cxx=replace(compiler, identity="g++ 99"))),
        ident(project, replace(toolchain, torch=replace(torch_install, version="2.13.9"))),
        ident(project, replace(toolchain, libc="glibc 2.99")),
        ident(tiny(tmp_path / "value", value=2), toolchain),
        ident(tiny(tmp_path / "flags", toml=TOML + 'cxx-flags = ["-O1"]\n'), toolchain),
        ident(tiny(tmp_path / "abi", toml=TOML.replace('"2.10"', '"2.9"')), toolchain),
        ident(tiny(tmp_path / "source", binding=BINDING + "// more\n"), toolchain),
    }
    monkeypatch.setattr("kernelhub.build.ninja._LIMITED_API", "0x030a0000")  # flags of the builder's own
    changed.add(ident(project, toolchain))
    assert len(changed) == 9


def test_what_no_digest_covers_is_not_there_for_the_compiler(toolchain, tmp_path):
    """A header beside the project, or in a folder without sources, would be used and not be noticed when it changes."""
    for number, path in enumerate(("../secret.h", "build/secret.h", ".hidden/secret.h")):
        project = tiny(tmp_path / str(number) / "tiny", binding=f'#include "{path}"\n' + BINDING)
        (project / path).parent.mkdir(exist_ok=True)
        (project / path).write_text("#define SECRET 1\n")
        with pytest.raises(BuildFailed, match=r"secret\.h: No such file"):
            build_project(project, Workshop(toolchain, tmp_path / "elsewhere" / "work"))


@pytest.mark.parametrize("path", ["../secret.cpp", "/etc/passwd", "torch-ext/../../secret.cpp", "missing.cpp"])
def test_sources_are_inside_the_project(path, toolchain, tmp_path):
    (tmp_path / "secret.cpp").write_text("\n")
    project = tiny(tmp_path / "tiny", toml=TOML.replace("torch-ext/binding.cpp", path))
    with pytest.raises(InvalidMetadata, match=r"\[torch\] src"):
        build_project(project, Workshop(toolchain, tmp_path / "work"))


@pytest.mark.parametrize("name", ["nosuch-pkg>=1", "onednn"])
def test_packages_that_no_loader_takes_are_refused(name, toolchain, tmp_path):
    toml = TOML.replace("[torch]", f'python-depends = ["einops", "{name}"]\n\n[torch]')
    project = tiny(tmp_path / "tiny", toml=toml, binding="int broken = ;\n")  # to be seen before anything is compiled
    with pytest.raises(
        InvalidMetadata, match=f"python-depends: '{name}' is not a package that kernels for the CPU may"
    ):
        build_project(project, Workshop(toolchain, tmp_path / "work"))


@pytest.mark.parametrize("path", ["tiny.py", "tiny/__init__.py", "tiny/inner/one.py"])
def test_a_module_of_the_kernels_own_name_is_refused(path, toolchain, tmp_path):
    """The builder's package of that name would be imported for it, again and again."""
    project = tiny(tmp_path / "tiny", binding="int broken = ;\n")  # to be seen before anything is compiled
    write_files(project, {f"torch-ext/tiny/{path}": b""})
    with pytest.raises(InvalidMetadata, match=f"torch-ext/tiny: {path} would never be imported"):
        build_project(project, Workshop(toolchain, tmp_path / "work"))


# What a build leaves


def test_a_build_replaces_what_other_sources_made_and_nothing_else(toolchain, tmp_path):
    project = tiny(tmp_path / "tiny")
    (built,) = build_project(project, Workshop(toolchain, tmp_path / "work"))
    metadata = Metadata.parse((built.path / "metadata.json").read_bytes())
    assert metadata.raw["kernelhub"]["sources"] == source_digest(project, Recipe.load(project))
    stale = Path(shutil.copytree(built.path, project / "build" / "torch-stable-abi29-cpu-x86_64-linux"))
    raw = json.loads((stale / "metadata.json").read_text())
    raw["kernelhub"]["sources"] = "0" * 64
    (stale / "metadata.json").write_text(json.dumps(raw))
    others = Path(shutil.copytree(built.path, project / "build" / "torch-stable-abi28-cpu-x86_64-linux"))
    del raw["kernelhub"]
    (others / "metadata.json").write_text(json.dumps(raw))
    build_project(project, Workshop(toolchain, tmp_path / "work"))
    assert {path.name for path in (project / "build").iterdir()} == {built.path.name, others.name}
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["locks"]


BUILDS_OFTEN = """
import sys
from pathlib import Path
from kernelhub.build.assemble import Workshop
from kernelhub.build.project import build_project
from kernelhub.build.toolchain import find_toolchain
project, work = map(Path, sys.argv[1:])
toolchain = find_toolchain(with_cuda=False)
input()
for _ in range(40):
    build_project(project, Workshop(toolchain, work), variants=["torch-cpu"])
"""


def test_builds_of_one_project_at_the_same_time(tmp_path):
    project = tiny(tmp_path / "tiny", noarch=True)
    command = [sys.executable, "-c", BUILDS_OFTEN, str(project), str(tmp_path / "work")]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    assert [path.name for path in (project / "build").iterdir()] == ["torch-cpu"]


def test_what_was_built_is_there_until_the_new_one_is(tmp_path, toolchain, monkeypatch):
    project = tiny(tmp_path / "tiny", noarch=True)
    workshop, removed = Workshop(toolchain, tmp_path / "work"), []
    (built,) = build_project(project, workshop, variants=["torch-cpu"])
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append((Path(path), built.path.is_dir())))
    build_project(project, workshop, variants=["torch-cpu"])
    assert removed
    assert all(path != built.path and there for path, there in removed)


def test_provenance_is_the_git_commit(toolchain, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("no git")
    project = tiny(tmp_path / "tiny", noarch=True)

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *who, *arguments], cwd=project, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")

    def provenance() -> tuple[str, bool]:
        *_, built = build_project(project, Workshop(toolchain, tmp_path / "work"), variants=["torch-cpu"])
        found = Metadata.parse((built.path / "metadata.json").read_bytes()).provenance["kernel"]
        return found.commit, found.dirty

    assert provenance() == (git("rev-parse", "HEAD").strip(), False)
    assert provenance()[1] is False  # what was built is no change
    (project / "build.toml").write_text(TOML + "[torch-noarch]\n# changed\n")
    assert provenance()[1] is True


def test_what_was_asked_for_and_cannot_be_built_is_an_error(toolchain, tmp_path):
    toml = TOML.replace('backends = ["cpu"]', 'backends = ["cpu", "xpu"]')
    project = tiny(tmp_path / "tiny", toml=toml)
    workshop = Workshop(toolchain, tmp_path / "work")
    done = build_project(project, workshop)
    assert [bool(item.path) for item in done] == [True, False]
    assert "XPU" in done[1].reason
    with pytest.raises(InvalidReference, match="xpu cannot be built here: kernels for XPU"):
        build_project(project, workshop, backends=["xpu"])
    with pytest.raises(InvalidReference, match="not for 'metal'"):
        build_project(project, workshop, backends=["metal"])
    with pytest.raises(InvalidReference, match="no variant 'torch-cpu'"):
        build_project(project, workshop, variants=["torch-cpu"])
    with pytest.raises(BuildFailed, match="nothing of .* can be built here"):
        build_project(project, replace(workshop, toolchain=replace(toolchain, cxx=None)))
