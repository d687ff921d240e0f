"""A compile that fails: the first error with its place, the command that repeats it, and what to do."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from build_projects import BINDING, TOML, tiny
from kernelfiles import write_files

from kernelhub import Hub, Settings
from kernelhub.build.assemble import Workshop
from kernelhub.build.compile import _error, keep, read_failure
from kernelhub.build.project import build_project
from kernelhub.errors import BuildFailed, InvalidMetadata, StoreError


def failure(project, toolchain, tmp_path) -> BuildFailed:
    with pytest.raises(BuildFailed) as caught:
        build_project(project, Workshop(toolchain, tmp_path / "work", jobs=1))
    return caught.value


def test_the_first_error_with_its_place_in_the_project_and_the_command_that_repeats_it(toolchain, tmp_path):
    error = failure(tiny(tmp_path / "tiny", binding=BINDING + "int broken = missing_name;\n"), toolchain, tmp_path)
    assert error.error.startswith("torch-ext/binding.cpp:4: ")
    assert "missing_name" in error.error
    assert error.error in str(error)
    assert error.command in str(error)
    again = subprocess.run(error.command, shell=True, capture_output=True, text=True, timeout=120)
    assert again.returncode != 0
    assert "missing_name" in again.stderr


def test_a_project_has_one_failed_build_at_most_and_a_build_that_works_leaves_nothing(toolchain, tmp_path):
    project = tiny(tmp_path / "tiny", binding="int broken = ;\n")
    failure(project, toolchain, tmp_path)
    failure(project, toolchain, tmp_path)
    assert len(list((tmp_path / "work").glob("*.failed"))) == 1
    assert [path.name for path in (tmp_path / "work").iterdir() if path.suffix != ".failed"] == ["locks"]


def test_builds_that_fail_at_the_same_time_leave_one(tmp_path):
    def fail(number: int) -> None:
        for round_ in range(20):
            work = write_files(tmp_path / f".work.{number}.{round_}", {"build.ninja": str(number).encode()})
            assert keep(work, tmp_path / "one.failed") == tmp_path / "one.failed"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fail, range(8)))
    assert {path.name for path in tmp_path.iterdir()} == {"one.failed", "locks"}
    assert [path.name for path in (tmp_path / "one.failed").iterdir()] == ["build.ninja"]


def test_a_header_that_is_not_there(toolchain, tmp_path):
    error = failure(tiny(tmp_path / "tiny", binding='#include "nowhere.hpp"\n'), toolchain, tmp_path)
    assert "nowhere.hpp" in error.error
    assert "`include` of the section" in error.hint


def test_headers_that_are_not_stable_are_refused_where_the_abi_is(toolchain, tmp_path):
    error = failure(tiny(tmp_path / "tiny", binding="#include <ATen/core/Tensor.h>\n"), toolchain, tmp_path)
    assert "TORCH_TARGET_VERSION" in error.error
    assert "torch.stable-abi is set" in error.hint


def test_a_failed_link_says_what_is_missing(toolchain, tmp_path):
    toml = TOML + 'cxx-flags = ["-fopenmp"]\n'
    binding = 'extern "C" int two;\nint two = 2;\n' + BINDING
    project = tiny(
        tmp_path / "tiny", toml=toml.replace('binding.cpp"]', 'binding.cpp", "torch-ext/other.cpp"]'), binding=binding
    )
    (project / "torch-ext" / "other.cpp").write_text('extern "C" int two;\nint two = 3;\n')
    error = failure(project, toolchain, tmp_path)
    assert "multiple definition of" in error.error


@pytest.mark.parametrize("name", ["kernel.c", "kernel.hip", "kernel.metal"])
def test_sources_that_no_compiler_here_takes(name, toolchain, tmp_path):
    project = tiny(tmp_path / "tiny", toml=TOML.replace("binding.cpp", name))
    (project / "torch-ext" / name).write_text("")
    with pytest.raises(InvalidMetadata, match="are not compiled by this version"):
        build_project(project, Workshop(toolchain, tmp_path / "work"))


def test_headers_alone_are_nothing_to_compile(toolchain, tmp_path):
    project = tiny(tmp_path / "tiny", toml=TOML.replace("binding.cpp", "value.h"))
    with pytest.raises(InvalidMetadata, match="nothing to compile"):
        build_project(project, Workshop(toolchain, tmp_path / "work"))


# What compilers print, and what it comes to: the first error, and a word of the hint.
PRINTED = [
    ("a/b.cpp:12:5: error: 'x' was not declared", "a/b.cpp:12: 'x' was not declared", None),
    ("./b.cu(7): error: identifier \"x\" is undefined", 'b.cu:7: identifier "x" is undefined', None),
    ("b.cpp:1:10: fatal error: Python.h: No such file or directory", "b.cpp:1: Python.h: No such file or directory", "python3-dev"),
    ("b.cpp:1:10: fatal error: 'x.cuh' file not found", "b.cpp:1: 'x.cuh' file not found", "`include`"),
    ("/t/CUDAContextLight.h:10:10: fatal error: cusparse.h: No such file or directory", "/t/CUDAContextLight.h:10: cusparse.h: No such file or directory", "CUDA toolkit"),
    ("/t/c10.h:3:2: error: #error You need C++20 to compile PyTorch", "/t/c10.h:3: #error You need C++20 to compile PyTorch", "C++20"),
    ("a (1).cpp:12:5: error: 'x' was not declared", "a (1).cpp:12: 'x' was not declared", None),
    ("a(copy)/(b).cu(7): error: no", "a(copy)/(b).cu:7: no", None),
    ("g++: error: unrecognized command-line option '-std=c++20'", "unrecognized command-line option '-std=c++20'", "C++20"),
    ("nvcc fatal   : Unsupported gpu architecture 'compute_99'", "Unsupported gpu architecture 'compute_99'", "cuda-capabilities"),
    ("/c/host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!", None, "set CXX"),
    ("b.cpp:4:9: error: 'parallel_for' is not a member of 'torch::stable'", None, "raise torch.stable-abi"),
    ("/usr/bin/ld: b.o: in function `f':\nb.cpp:(.text+0x5): undefined reference to `g()'", "undefined reference to `g()'", "`src` of a section"),
    ("/usr/bin/ld: cannot find -lcudart: No such file or directory", "cannot find -lcudart: No such file or directory", "does not find"),
    ("g++: fatal error: Killed signal terminated program cc1plus", None, "--jobs 1"),
    ("b.cpp:9:1: warning: this is no error\nb.cpp:10:1: error: this is one\nb.cpp:11:1: error: another", "b.cpp:10: this is one", None),
    ("", "the compiler said nothing", None),
]  # fmt: skip


@pytest.mark.parametrize(("printed", "first", "hint"), PRINTED, ids=range(len(PRINTED)))
def test_what_compilers_print(printed, first, hint, tmp_path):
    lines = [
        "[1/3] g++ -c a.cpp",
        "FAILED: [code=1] _objects/b.o",
        "g++ -c b.cpp -o _objects/b.o",
        *printed.splitlines(),
        "[2/3] x",
    ]
    found = read_failure(lines)
    assert found.command == "g++ -c b.cpp -o _objects/b.o"
    if first is not None:
        assert found.text == first
    error = _error(found, tmp_path)
    assert error.hint.endswith(f"To repeat it: cd {tmp_path} && g++ -c b.cpp -o _objects/b.o")
    assert (hint in error.hint) if hint else error.hint.startswith("To repeat it")


def test_the_command_that_repeats_it_runs_where_the_store_has_a_space(toolchain, tmp_path):
    project = tiny(tmp_path / "tiny", binding="int broken = missing_name;\n")
    error = failure(project, toolchain, tmp_path / "sp ace")
    again = subprocess.run(error.command, shell=True, capture_output=True, text=True, timeout=120)
    assert "missing_name" in again.stderr


def test_where_no_step_was_begun_ninja_is_what_repeats_it(toolchain, tmp_path):
    script = tmp_path / "ninja"
    script.write_text("#!/bin/sh\necho ninja: error: out of luck; exit 1\n")
    script.chmod(0o755)
    error = failure(tiny(tmp_path / "tiny"), replace(toolchain, ninja=(str(script),)), tmp_path)
    assert error.error == "out of luck"
    assert error.command.endswith(f".failed && {script}")


@pytest.mark.parametrize("twice", ["torch-ext/binding.cpp", "./torch-ext//binding.cpp"])
def test_a_source_that_is_listed_twice(twice, toolchain, tmp_path):
    toml = TOML.replace('binding.cpp"]', f'binding.cpp", "torch-ext/value.h", "torch-ext/value.h", "{twice}"]')
    with pytest.raises(InvalidMetadata, match=r"\[torch\] src: .*binding\.cpp is there twice"):
        build_project(tiny(tmp_path / "tiny", toml=toml), Workshop(toolchain, tmp_path / "work"))


def test_a_library_with_a_second_cxx_runtime_is_not_handed_out(toolchain, tmp_path):
    static = replace(toolchain, cxx=replace(toolchain.cxx, command=(toolchain.cxx.command[0], "-static-libstdc++")))
    if toolchain.cxx.kind != "gcc":
        pytest.skip("for g++")
    with pytest.raises(BuildFailed, match="was linked into the kernel"):
        build_project(tiny(tmp_path / "tiny"), Workshop(static, tmp_path / "work"))


def test_a_command_that_compiles_nothing_is_named(tmp_path, toolchain):
    script = tmp_path / "nothing"
    script.write_text("#!/bin/sh\necho nothing 1.2\n")
    script.chmod(0o755)
    idle = replace(toolchain, cxx=replace(toolchain.cxx, command=(str(script),)))
    error = failure(tiny(tmp_path / "tiny"), idle, tmp_path)
    assert f"{script} made no library, and no error\n  Is it a C++ compiler?" in str(error)


@pytest.mark.parametrize("path", ["value.h", "torch-ext/nowhere.h", "torch-ext/tiny/nowhere.py"])
def test_links_to_nothing_are_named(path, toolchain, tmp_path):
    project = tiny(tmp_path / "tiny", noarch=True)
    (project / path).symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidMetadata, match=f"{path} cannot be read: No such file"):
        build_project(project, Workshop(toolchain, tmp_path / "work"))
    with pytest.raises(InvalidMetadata, match=f"{path} cannot be read: No such file"):
        Hub(Settings(cache=tmp_path / "store")).load_local(project)


def test_a_project_that_cannot_be_written(toolchain, tmp_path):
    project = tiny(tmp_path / "tiny", noarch=True)
    (project / "build").write_text("")  # as a folder that is read-only
    with pytest.raises(StoreError, match=f"cannot write {project / 'build' / 'torch-cpu'}: "):
        build_project(project, Workshop(toolchain, tmp_path / "work"), variants=["torch-cpu"])


def test_steps_are_counted(toolchain, tmp_path):
    said = []
    workshop = Workshop(toolchain, tmp_path / "work", steps=lambda done, total: said.append((done, total)))
    build_project(tiny(tmp_path / "tiny"), workshop)
    assert said == [(1, 2), (2, 2)]
