"""Kernels that are built when they are asked for: once, into the store, and again when anything of it changes."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from build_projects import BINDING, TOML, counting_compiler, tiny
from kernelfiles import write_files

from kernelhub import Hub, Settings
from kernelhub.build.assemble import Workshop
from kernelhub.build.project import build_project
from kernelhub.build.toolchain import find_toolchain
from kernelhub.core.refs import KernelRef
from kernelhub.core.variants import VariantRejected
from kernelhub.errors import BuildFailed, InvalidMetadata, KernelHubWarning, KernelNotFound, NoCompatibleVariant
from kernelhub.hub.probe import detect_host
from kernelhub.hub.publish import publish

COMPILED = f"torch-stable-abi210-cpu-{detect_host().cpu}-linux"
NAME = KernelRef.parse("acme/tiny@v1")


@pytest.fixture
def compiler(tmp_path, toolchain):
    return counting_compiler(tmp_path / "bin")


@pytest.fixture
def make_hub(tmp_path, compiler):
    """A client of one project under the name acme/tiny, as LOCAL_KERNELS gives it."""

    def make(project: Path | None = None, progress=None, **settings) -> Hub:
        settings.setdefault("cxx", str(compiler[0]))
        local = (("acme/tiny", project),) if project else ()
        settings = Settings(cache=tmp_path / "store", local_kernels=local, offline=True, **settings)
        return Hub(settings, progress=progress)

    return make


def compiled(compiler) -> int:
    return len(compiler[1].read_text().splitlines())


def test_it_is_built_once_and_then_lies_in_the_store(make_hub, compiler, tmp_path):
    project = tiny(tmp_path / "tiny")
    loaded = make_hub(project).load(NAME)
    assert str(loaded.variant) == COMPILED
    assert loaded.module.VALUE == 1
    assert loaded.path.is_relative_to(tmp_path / "store" / "kernels")
    assert compiled(compiler) == 1
    assert make_hub(project).load(NAME).module is loaded.module
    assert make_hub().load_local(project).module is loaded.module
    assert make_hub().load_local(project).path != loaded.path  # under the name that a folder gives
    assert compiled(compiler) == 2


def test_an_edited_source_is_built_again_and_an_undone_edit_is_not(make_hub, compiler, tmp_path):
    project = tiny(tmp_path / "tiny")
    first = make_hub(project).load(NAME)
    tiny(project, value=2)
    second = make_hub(project).load(NAME)
    assert first.metadata.id != second.metadata.id
    assert first.module.NAMESPACE != second.module.NAMESPACE
    tiny(project, value=1)
    assert make_hub(project).load(NAME).path == first.path
    assert compiled(compiler) == 2


def test_another_compiler_builds_again_and_the_sources_part_of_the_commit_stays(make_hub, compiler, tmp_path):
    project = tiny(tmp_path / "tiny", noarch=True)
    first = make_hub(project).load(NAME)
    other = tmp_path / "bin" / "other-g++"
    other.write_text(
        compiler[0].read_text().replace("exec g++", '[ "$1" = --version ] && echo "g++ 99.0" && exit\nexec g++')
    )
    other.chmod(0o755)
    second = make_hub(project, cxx=str(other)).load(NAME)
    assert (str(first.variant), str(second.variant)) == (COMPILED, COMPILED)
    assert second.path != first.path
    one, two = first.repo_info.revision, second.repo_info.revision
    assert one != two
    assert one[:28] == two[:28]
    # What a lock names on one machine is found on another, which builds its own.
    pinned = KernelRef.parse(f"acme/tiny@{one}")
    assert make_hub(project, cxx=str(other)).load(pinned).path == second.path
    assert make_hub(project).load(pinned).path == first.path
    tiny(project, value=2, noarch=True)
    assert make_hub(project).load(pinned).path == first.path  # the sources are others now, and the store has this
    with pytest.raises(KernelNotFound):
        make_hub(project).load(KernelRef.parse("acme/tiny@" + "1" * 40))


def test_eight_processes_build_once(compiler, tmp_path):
    project = tiny(tmp_path / "tiny")
    code = f"""
from pathlib import Path
from kernelhub import Hub, Settings
from kernelhub.core.refs import KernelRef
settings = Settings(cache=Path({str(tmp_path / "store")!r}), local_kernels=(("acme/tiny", Path({str(project)!r})),),
                    offline=True, cxx={str(compiler[0])!r})
input()
print(Hub(settings).install(KernelRef.parse("acme/tiny@v1")))
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=300) for process in running]
    assert {out for out, _ in answers} == {answers[0][0]}, answers
    assert answers[0][0].strip().endswith(COMPILED)
    assert compiled(compiler) == 1


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine without one, where nobody asks for a certain one."""
    monkeypatch.setattr("kernelhub.build.toolchain._cxx", lambda wanted: None)
    find_toolchain.cache_clear()
    yield
    find_toolchain.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_noarch_variant_serves_and_nothing_is_said(make_hub, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = make_hub(tiny(tmp_path / "tiny", noarch=True), cxx=None).load(NAME)
    assert str(loaded.variant) == "torch-cpu"
    assert loaded.module.VALUE == 1


def test_a_compiler_of_the_users_that_does_not_run_is_named(make_hub, tmp_path):
    project = tiny(tmp_path / "tiny", noarch=True)
    with pytest.warns(KernelHubWarning, match=r"CXX is '/nowhere/ccache g\+\+', and .* says nothing"):
        assert str(make_hub(project, cxx="/nowhere/ccache g++").load(NAME).variant) == "torch-cpu"
    with pytest.raises(NoCompatibleVariant, match=r"CXX is '/nowhere/ccache g\+\+'"):
        make_hub(project, cxx="/nowhere/ccache g++", build="always").load(NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_hub(tiny(tmp_path / "other", noarch=True), cxx="/nowhere/other-g++", build="never").load(NAME)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_and_without_noarch_the_error_has_the_reason(make_hub, tmp_path):
    hub = make_hub(tiny(tmp_path / "tiny"), cxx=None)
    with pytest.raises(NoCompatibleVariant, match=r"no C\+\+ compiler was found"):
        hub.load(NAME)
    assert not hub.has(NAME)
    (rejected,) = hub.variants(NAME)
    assert isinstance(rejected, VariantRejected)
    assert rejected.variant.variant_str == COMPILED


def test_never_builds_nothing(make_hub, compiler, tmp_path):
    project = tiny(tmp_path / "tiny", noarch=True)
    assert str(make_hub(project, build="never").load(NAME).variant) == "torch-cpu"
    with pytest.raises(NoCompatibleVariant, match="KERNELHUB_BUILD=never"):
        make_hub(tiny(tmp_path / "other"), build="never").load(NAME)
    assert str(make_hub(project).load(NAME).variant) == COMPILED  # what was known under `never` is not believed
    assert compiled(compiler) == 1


def test_never_starts_no_compiler_for_what_is_known(make_hub, tmp_path, monkeypatch):
    project = tiny(tmp_path / "tiny", noarch=True)
    make_hub(project, build="never").load(NAME)

    def find_toolchain(*arguments, **options):
        raise AssertionError("a compiler was started")

    monkeypatch.setattr("kernelhub.build.toolchain.find_toolchain", find_toolchain)
    assert str(make_hub(project, build="never").load(NAME).variant) == "torch-cpu"
    with pytest.raises(AssertionError, match="was started"):
        make_hub(project).load(NAME)


def test_a_build_that_fails_is_one_warning_and_the_noarch_variant(make_hub, tmp_path):
    project = tiny(tmp_path / "tiny", binding=BINDING + "int broken = missing_name;\n", noarch=True)
    hub = make_hub(project)
    with pytest.warns(KernelHubWarning, match=r"torch-ext/binding\.cpp:4: .*missing_name") as caught:
        loaded = hub.load(NAME)
    assert len(caught) == 1
    assert str(loaded.variant) == "torch-cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hub.load(NAME) is loaded


def test_a_build_that_failed_is_not_tried_by_each_new_process(make_hub, tmp_path):
    """A new client stands for a new process: it knows what lies in the store and nothing else."""
    project = tiny(tmp_path / "tiny", binding=BINDING + "int broken = missing_name;\n", noarch=True)
    with pytest.warns(KernelHubWarning, match="missing_name"):
        make_hub(project).load(NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = make_hub(project)
        assert str(again.load(NAME).variant) == "torch-cpu"
    reasons = [item.reason for item in again.variants(NAME) if isinstance(item, VariantRejected)]
    assert any("did not compile here: torch-ext/binding.cpp:4" in reason for reason in reasons)
    with pytest.warns(KernelHubWarning, match="missing_name"):
        make_hub(project).load(NAME, refresh=True)
    (project / "torch-ext" / "binding.cpp").write_text(BINDING)
    assert str(make_hub(project).load(NAME).variant) == COMPILED


def test_a_header_that_is_missing_is_looked_for_again(make_hub, tmp_path):
    project = tiny(tmp_path / "tiny", binding="#include <not_installed_yet.h>\n" + BINDING, noarch=True)
    for _ in range(2):
        with pytest.warns(KernelHubWarning, match="not_installed_yet"):
            make_hub(project).load(NAME)


def test_a_build_that_failed_is_tried_again_after_prune_and_no_folder_of_it_stays(make_hub, tmp_path):
    project = tiny(tmp_path / "tiny", binding=BINDING + "int broken = missing_name;\n", noarch=True)
    store, folder = make_hub(project).store, tmp_path / "store" / "build"
    with pytest.warns(KernelHubWarning, match=f"`kernelhub build {project}` says more"):
        make_hub(project).load(NAME)
    (failed,) = folder.glob("*.failed")
    for name in ("old", "new"):
        write_files(folder / f"._tiny_cpu_abc.{name}", {"a.o": b"x"})
    for path in (folder / "._tiny_cpu_abc.old", folder / "._tiny_cpu_abc.old" / "a.o"):
        os.utime(path, (1e9, 1e9))
    removed = {path.name for path, _ in store.prune(lambda repo: False)}
    assert removed == {failed.name, "._tiny_cpu_abc.old"}
    with pytest.warns(KernelHubWarning, match="missing_name"):
        make_hub(project).load(NAME)
    (project / "torch-ext" / "binding.cpp").write_text(BINDING)
    make_hub(project).load(NAME)
    assert list(folder.glob("*.failed")) == []


def test_a_compiler_that_could_not_run_is_tried_again(make_hub, tmp_path):
    killed = tmp_path / "g++"
    killed.write_text('#!/bin/sh\ncase "$*" in *--version*|*-print*) exec g++ "$@";; esac\nkill -9 $$\n')
    killed.chmod(0o755)
    project = tiny(tmp_path / "tiny", noarch=True)
    for _ in range(2):
        with pytest.warns(KernelHubWarning, match="does not compile"):
            make_hub(project, cxx=str(killed)).load(NAME)


def test_always_wants_the_compiled_build(make_hub, compiler, tmp_path):
    project = tiny(tmp_path / "tiny", noarch=True)
    assert str(make_hub(project, build="always").load(NAME).variant) == COMPILED
    broken = tiny(tmp_path / "broken", binding="int broken = ;\n", noarch=True)
    with pytest.raises(BuildFailed, match=r"while loading acme/tiny@v1.*do not compile"):
        make_hub(broken, build="always").load(NAME)
    with pytest.warns(KernelHubWarning, match="CXX is '/nowhere/g"):
        assert str(make_hub(project, cxx="/nowhere/g++").load(NAME).variant) == "torch-cpu"
    with pytest.raises(NoCompatibleVariant, match=r"(?s)always asks for the compiled build.*CXX is '/nowhere/g"):
        make_hub(project, build="always", cxx="/nowhere/g++").load(NAME)


def test_a_failed_build_without_noarch_is_the_error(make_hub, tmp_path):
    with pytest.raises(BuildFailed, match="do not compile"):
        make_hub(tiny(tmp_path / "tiny", binding="int broken = ;\n")).load(NAME)
    assert not list((tmp_path / "store" / "kernels").rglob("*.tmp"))


def test_the_build_folder_serves_until_a_source_is_edited(make_hub, compiler, toolchain, tmp_path):
    project = tiny(tmp_path / "tiny")
    build_project(project, Workshop(toolchain, tmp_path / "work"))
    assert make_hub().load_local(project).path == project / "build" / COMPILED
    assert compiled(compiler) == 0
    tiny(project, value=2)
    assert make_hub().load_local(project).path.is_relative_to(tmp_path / "store")
    assert compiled(compiler) == 1


def test_a_build_that_failed_leaves_a_project_that_can_be_built(make_hub, compiler, tmp_path):
    project = tiny(tmp_path / "tiny")
    (project / "build").mkdir()
    assert make_hub().load_local(project).module.VALUE == 1


def test_sources_that_were_edited_are_not_published_with_what_was_built_of_others(toolchain, tmp_path):
    project, hub = tiny(tmp_path / "tiny"), str(tmp_path / "hub")
    build_project(project, Workshop(toolchain, tmp_path / "work"))
    tiny(project, value=2)
    with pytest.raises(InvalidMetadata, match=r"were changed since they were built\n.*kernelhub build"):
        publish(project, hub, NAME.repo, epoch=0)
    assert not (tmp_path / "hub").exists()
    tiny(project)
    assert publish(project, hub, NAME.repo, epoch=0).changed


@pytest.mark.parametrize("change", ["renamed", "unreadable"])
def test_what_was_built_does_not_stand_in_for_a_project_that_is_broken(change, make_hub, toolchain, tmp_path):
    project = tiny(tmp_path / "tiny")
    build_project(project, Workshop(toolchain, tmp_path / "work"))
    if change == "renamed":
        (project / "torch-ext/binding.cpp").rename(project / "torch-ext/renamed.cpp")
    else:
        (project / "build.toml").write_text("[general\n")
    problem = r"binding\.cpp: No such file" if change == "renamed" else r"build\.toml: .*line 1"
    with pytest.raises(InvalidMetadata, match=problem):
        make_hub().load_local(project)
    with pytest.raises(InvalidMetadata, match=problem):
        publish(project, str(tmp_path / "hub"), NAME.repo, epoch=0)
    assert not (tmp_path / "hub").exists()


def test_builds_of_other_tools_are_taken_as_they_are(make_hub, compiler, toolchain, tmp_path):
    project = tiny(tmp_path / "tiny")
    (built,) = build_project(project, Workshop(toolchain, tmp_path / "work"))
    metadata = built.path / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"kernelhub"', '"other"'))
    tiny(project, value=2, toml=TOML.replace("edition = 5", "edition = 99"))
    assert make_hub().load_local(project).path == built.path


def test_a_line_is_said_of_a_build_and_none_of_what_is_there(make_hub, tmp_path):
    class Notes:
        def __init__(self):
            self.said = []

        def note(self, text):
            self.said.append(text)

        def expect(self, size):
            pass

        def advance(self, size):
            pass

    project, notes = tiny(tmp_path / "tiny"), Notes()
    for _ in range(2):
        make_hub(project, progress=notes).install(NAME)
    begun, ended = notes.said
    assert begun == f"building acme/tiny {COMPILED}"
    assert re.fullmatch(rf"built acme/tiny {COMPILED} in \d+\.\d s", ended)


def command(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A command in a process of its own, whose output goes to pipes."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("KERNELHUB_", "LOCAL_KERNELS"))}
    return subprocess.Popen(
        [sys.executable, "-m", "kernelhub", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**known, "KERNELHUB_CACHE": str(tmp_path / "store"), "KERNELHUB_OFFLINE": "1", **environment},
        # A background job's children inherit that SIGINT is ignored; whoever presses Ctrl-C has a foreground job.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )


def test_a_command_says_what_it_builds_where_nobody_sees_a_bar_and_the_library_logs_it(
    make_hub, compiler, tmp_path, capfd, caplog
):
    project = tiny(tmp_path / "tiny")
    ran = command(tmp_path, "get", str(NAME), LOCAL_KERNELS=f"acme/tiny={project}", CXX=str(compiler[0]))
    _, said = ran.communicate(timeout=100)
    begun, ended = said.splitlines()
    assert begun == f"kernelhub: building acme/tiny {COMPILED}"
    assert re.fullmatch(rf"kernelhub: built acme/tiny {COMPILED} in \d+\.\d s", ended)
    project = tiny(tmp_path / "other", value=2)
    with caplog.at_level("INFO", "kernelhub"):
        make_hub(project).install(NAME)
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage().split()[0] for record in caplog.records] == ["building", "built"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_builds_ends_the_compilers_and_ctrl_c_says_one_line(make_hub, tmp_path, number):
    project, begun, never = tiny(tmp_path / "tiny"), tmp_path / "begun", tmp_path / "never"
    for pipe in (begun, never):
        os.mkfifo(pipe)
    script = tmp_path / "waiting-g++"
    waiting = f'*" -c "*) exec 3> {begun}; echo compiling >&3; read line < {never};;'
    script.write_text(f'#!/bin/sh\ncase "$*" in {waiting} esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    ran = command(tmp_path, "get", str(NAME), LOCAL_KERNELS=f"acme/tiny={project}", CXX=str(script))
    try:
        with os.fdopen(os.open(begun, os.O_RDONLY | os.O_NONBLOCK)) as compiler:  # there may be no compiler ever
            select.select([compiler], [], [], 100)
            assert compiler.readline() == "compiling\n"
            ran.send_signal(number)
            out, said = ran.communicate(timeout=100)
            ended, _, _ = select.select([compiler], [], [], 60)  # its end of the pipe is closed, by whatever ended it
    finally:
        ran.kill()
    assert ended
    assert (ran.returncode, out) == (128 + number, "")
    building, *interrupted = said.splitlines()
    assert building == f"kernelhub: building acme/tiny {COMPILED}"
    nothing_left = "interrupted; the store and the hub hold nothing that is half done"
    assert [line.startswith(nothing_left) for line in interrupted] == ([True] if number == signal.SIGINT else [])
    left = list((tmp_path / "store").rglob("*"))
    assert [path for path in left if path.suffix in (".py", ".cpp", ".o", ".so") or path.name.startswith(".")] == []
    assert make_hub(project, cxx="g++").load(NAME).module.VALUE == 1
