"""The client's steps: what is asked when, what is believed, and what is refused before any code runs."""

from __future__ import annotations

import stat
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from kernelfiles import MemorySource, kernel_files, write_files, write_kernel

from kernelhub import Hub, Settings, get_kernel, get_kernel_dep
from kernelhub.core.host import Host
from kernelhub.core.lockfile import LockedKernel, LockFile
from kernelhub.core.refs import KernelRef, RepoId
from kernelhub.core.trust import Origin
from kernelhub.core.variants import VariantAccepted, VariantRejected
from kernelhub.errors import (
    CompatibilityWarning,
    HubUnavailable,
    IncompatibleDevice,
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelCycle,
    KernelHubWarning,
    KernelNotFound,
    MissingDependency,
    NoCompatibleVariant,
    RepositoryNotFound,
    UntrustedKernel,
)
from kernelhub.hub import checks as checks_module
from kernelhub.hub.client import loaded_kernels, set_default_hub
from kernelhub.hub.sources.base import Moved
from kernelhub.hub.sources.local import local_source
from kernelhub.hub.sources.project import ProjectSource

HOST = Host(python=(3, 11), torch=(2, 13), backend="cpu", cpu="x86_64", os="linux")
SMALL = KernelRef.parse("org/small@v1")


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def source_of(**kernel: object) -> MemorySource:
    return MemorySource({"org/small": {"torch-cpu": kernel_files(**kernel)}})


@pytest.fixture
def make_hub(tmp_path: Path, clock: Clock):
    def make(*sources: object, host: Host = HOST, **settings: object) -> Hub:
        settings.setdefault("cache", tmp_path / "store")
        return Hub(Settings(**settings), sources=sources, host=host, clock=clock)

    return make


def unavailable(question: str) -> None:
    raise HubUnavailable("https://memory.test does not answer", hub="https://memory.test", request=question)


# What is asked


def test_a_cold_load_asks_each_question_once_and_a_warm_one_none(make_hub):
    source = source_of()
    assert make_hub(source).load(SMALL).module.double(2) == 4
    assert source.asked == ["resolve", "listing", "publisher_trusted", "fetch"]
    source.asked.clear()
    make_hub(source).load(SMALL)
    assert source.asked == []


def test_the_second_call_in_a_process_returns_the_same_module_and_reads_nothing(make_hub, tmp_path):
    hub = make_hub(source_of())
    first = hub.load(SMALL)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    assert hub.load(SMALL).module is first.module


def test_explicit_trust_does_not_ask_for_the_publisher(make_hub):
    source = source_of()
    source.trusted = False
    make_hub(source).load(SMALL, trust_remote_code=["org/small"])
    assert "publisher_trusted" not in source.asked


def test_a_version_is_asked_for_again_after_its_time(make_hub, clock):
    source = source_of()
    make_hub(source).load(SMALL)
    old = source.commit("org/small")
    source.kernels["org/small"]["torch-cpu"] = kernel_files("VALUE = 2\n")
    clock.now += 3599
    assert make_hub(source).load(SMALL).repo_info.revision == old
    clock.now += 2
    assert make_hub(source).load(SMALL).module.VALUE == 2


def test_refresh_asks_now(make_hub):
    source = source_of()
    hub = make_hub(source)
    hub.load(SMALL)
    source.kernels["org/small"]["torch-cpu"] = kernel_files("VALUE = 3\n")
    assert hub.load(SMALL, refresh=True).module.VALUE == 3


def test_a_clock_that_went_backwards_does_not_make_a_record_fresh_for_ever(make_hub, clock):
    source = source_of()
    make_hub(source).load(SMALL)
    clock.now -= 10
    source.asked.clear()
    make_hub(source).load(SMALL)
    assert source.asked == ["resolve"]


def test_a_pinned_commit_in_the_store_sends_nothing_whatever_the_order_of_hubs(make_hub):
    """needs 4: cached kernels still need the network"""
    source, other = source_of(), MemorySource({}, name="https://first.test", key="first")
    pinned = KernelRef.parse(f"org/small@{source.commit('org/small')}")
    make_hub(other, source).load(pinned)
    source.asked.clear()
    other.asked.clear()
    make_hub(other, source).load(pinned)
    assert (source.asked, other.asked) == ([], [])


def test_a_hub_that_does_not_have_it_is_not_asked_again_within_the_time(make_hub):
    source, other = source_of(), MemorySource({}, name="https://first.test", key="first")
    make_hub(other, source).load(SMALL)
    make_hub(other, source).load(SMALL)
    assert other.asked == ["resolve"]


def test_the_first_source_that_has_it_answers(make_hub):
    first, second = source_of(code="WHERE = 1\n"), source_of(code="WHERE = 2\n")
    second.key = "second"
    assert make_hub(first, second).load(SMALL).module.WHERE == 1


def test_a_source_that_cannot_be_reached_is_an_error_not_a_move_to_the_next(make_hub):
    first, second = source_of(), source_of()
    first.fault, second.key = unavailable, "second"
    with pytest.raises(HubUnavailable, match=r"while loading org/small@v1: https://memory.test does not answer"):
        make_hub(first, second).load(SMALL)
    assert second.asked == []


def test_a_hub_that_does_not_answer_is_not_all_that_is_said_of_a_misspelt_name(make_hub):
    """The hub before it, which has none of that name, is named too."""
    first, second = source_of(), source_of()
    first.name, second.fault, second.key = "/srv/kernels", unavailable, "second"
    with pytest.raises(HubUnavailable, match=r"does not answer\n  /srv/kernels has no org/smal\."):
        make_hub(first, second).load(KernelRef.parse("org/smal@v1"))


def test_the_stores_version_is_used_with_one_warning_where_the_hub_does_not_answer(make_hub, clock):
    source = source_of()
    make_hub(source).load(SMALL)
    clock.now += 4000
    source.fault = unavailable
    hub = make_hub(source)
    with pytest.warns(KernelHubWarning, match="does not answer"):
        hub.install(SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hub.install(SMALL)


def test_another_version_that_the_repository_lacks_does_not_move_on(make_hub):
    first, second = source_of(), source_of()
    second.key = "second"
    with pytest.raises(KernelNotFound, match="org/small has no v2"):
        make_hub(first, second).load(KernelRef.parse("org/small@v2"))
    assert second.asked == []


def test_a_name_that_nobody_has_lists_where_it_was_looked_for(make_hub):
    with pytest.raises(KernelNotFound, match=r"org/none@v1 was not found \(looked in https://memory.test\)"):
        make_hub(source_of()).load(KernelRef.parse("org/none@v1"))


# Offline


def test_offline_uses_the_store_however_old_and_asks_nothing(make_hub, clock):
    source = source_of()
    make_hub(source).load(SMALL)
    clock.now += 10_000_000
    source.asked.clear()
    hub = make_hub(source, offline=True)
    assert hub.load(SMALL).module.double(1) == 2
    assert source.asked == []


def test_offline_trusts_what_was_recorded_when_it_was_fetched(make_hub):
    source = source_of()
    source.trusted = False
    make_hub(source).load(SMALL, trust_remote_code=True)
    with pytest.raises(UntrustedKernel):
        make_hub(source, offline=True).load(SMALL)


def test_offline_without_the_kernel_says_so(make_hub):
    source = source_of()
    with pytest.raises(KernelNotFound, match="not asked offline"):
        make_hub(source, offline=True).load(SMALL)
    assert source.asked == []


def test_local_files_only_asks_nothing(make_hub):
    source = source_of()
    with pytest.raises(KernelNotFound):
        make_hub(source).install(SMALL, local_files_only=True)
    assert source.asked == []


def test_a_folder_hub_serves_offline(make_hub):
    source = source_of()
    source.origin = Origin.FOLDER
    assert make_hub(source, offline=True).load(SMALL).module.double(3) == 6


# Trust


def test_what_nobody_vouches_for_is_refused_before_it_is_fetched(make_hub, tmp_path):
    source = source_of(code=f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    source.trusted = False
    with pytest.raises(UntrustedKernel, match='trust_remote_code=\\["https://memory.test/org/small"\\]'):
        make_hub(source).load(SMALL)
    assert "fetch" not in source.asked
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("trust", [True, ["org/small"], ["org/*"], ("org/small",)])
def test_the_caller_may_trust(make_hub, trust):
    source = source_of()
    source.trusted = None
    assert make_hub(source).load(SMALL, trust_remote_code=trust)


@pytest.mark.parametrize("trust", [["org/other"], ["other/*"], []])
def test_trust_in_others_is_none_in_this(make_hub, trust):
    source = source_of()
    source.trusted = None
    with pytest.raises(UntrustedKernel):
        make_hub(source).load(SMALL, trust_remote_code=trust)


def test_an_untrusted_call_after_a_trusted_one_is_refused(make_hub):
    source = source_of()
    source.trusted = False
    hub = make_hub(source)
    hub.load(SMALL, trust_remote_code=True)
    with pytest.raises(UntrustedKernel):
        hub.load(SMALL)


def test_installing_goes_through_the_same_gate(make_hub):
    source = source_of()
    source.trusted = False
    for step in (lambda hub: hub.install(SMALL), lambda hub: hub.has(SMALL)):
        with pytest.raises(UntrustedKernel):
            step(make_hub(source))


def test_the_embedded_hub_alone_owns_its_organisation(make_hub, tmp_path):
    evil = MemorySource({"kernelhub/norm": {"torch-cpu": kernel_files("EVIL = 1\n")}})
    hub = make_hub(evil, ProjectSource.embedded())
    assert not hasattr(hub.load(KernelRef.parse("kernelhub/norm@v1")).module, "EVIL")
    with pytest.raises(KernelNotFound):
        make_hub(evil).load(KernelRef.parse("kernelhub/norm@v1"))
    assert evil.asked == []


def test_the_user_may_put_a_folder_over_an_embedded_kernel(make_hub, tmp_path):
    mine, _ = local_source(write_kernel(tmp_path / "norm", code="MINE = 1\n"), RepoId.parse("kernelhub/norm"))
    hub = make_hub(mine, ProjectSource.embedded())
    assert hub.load(KernelRef.parse("kernelhub/norm@v1")).module.MINE == 1


# Selection


def test_no_variant_lists_each_with_its_reason(make_hub):
    """needs 12: no variant for a new torch"""
    source = MemorySource(
        {"org/small": {name: kernel_files() for name in ("torch-cuda", "torch27-cxx11-cpu-x86_64-linux", "old")}}
    )
    with pytest.raises(NoCompatibleVariant) as caught:
        make_hub(source).load(SMALL)
    assert [name for name, _ in caught.value.rejected] == ["old", "torch-cuda", "torch27-cxx11-cpu-x86_64-linux"]
    assert "built for torch 2.7, this machine has 2.13" in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


def test_variants_are_listed_best_first_unknown_names_among_them(make_hub):
    source = MemorySource(
        {"org/small": {name: kernel_files() for name in ("torch-universal", "torch-cpu", "torch-cuda", "../evil")}}
    )
    ranked = make_hub(source).variants(SMALL)
    assert [item.variant.variant_str for item in ranked] == ["torch-cpu", "torch-universal", "../evil", "torch-cuda"]
    assert [type(item) for item in ranked] == [VariantAccepted, VariantAccepted, VariantRejected, VariantRejected]


def test_a_backend_that_the_machine_lacks_is_wrong_use(make_hub):
    with pytest.raises(ValueError, match="backend 'cuda' is not supported on this machine"):
        make_hub(source_of()).load(SMALL, backend="cuda")
    with pytest.raises(ValueError, match=r"'gpu' is not a backend\n.*Expected 'cpu'"):
        make_hub(source_of()).load(SMALL, backend="gpu")


def test_has_agrees_with_load(make_hub):
    source = MemorySource({"org/small": {"torch-cuda": kernel_files()}}, key="other")
    assert make_hub(source_of()).has(SMALL) is True
    assert make_hub(source).has(SMALL) is False
    assert make_hub(source).has(KernelRef.parse("org/none@v1")) is False
    assert "fetch" not in source.asked


# Checks before any code runs


@pytest.fixture
def ran(tmp_path: Path):
    """Code that leaves a mark when it runs, and whether it did."""
    mark = tmp_path / "mark"
    return f"open({str(mark)!r}, 'w').close()\n", mark.exists


def test_a_kernel_that_needs_a_newer_client_is_refused(make_hub, ran):
    code, did_run = ran
    with pytest.raises(ValueError, match="needs what the kernels package has from 99.0.0 on"):
        make_hub(source_of(code=code, kernels_minver="99.0.0")).load(SMALL)
    assert not did_run()


def test_a_kernel_that_needs_this_level_loads(make_hub):
    assert make_hub(source_of(kernels_minver="0.17.2")).load(SMALL)


def test_a_missing_package_is_named_with_its_command(make_hub, ran, monkeypatch):
    code, did_run = ran
    real = checks_module.importlib.util.find_spec
    monkeypatch.setattr(
        checks_module.importlib.util, "find_spec", lambda name, *rest: None if name == "tvm_ffi" else real(name, *rest)
    )
    with pytest.raises(MissingDependency, match="pip install apache-tvm-ffi") as caught:
        make_hub(source_of(code=code, python_depends=["tvm-ffi"])).load(SMALL)
    assert isinstance(caught.value, ImportError)
    assert not did_run()


@pytest.mark.parametrize("name", ["requests", "nvidia-cutlass-dsl", "os"])
def test_packages_that_kernels_may_not_depend_on_are_an_error(make_hub, ran, name):
    code, did_run = ran
    with pytest.raises(InvalidMetadata, match="may depend on"):
        make_hub(source_of(code=code, python_depends=[name])).load(SMALL)
    assert not did_run()


CUDA = replace(HOST, backend="cuda", backend_version=(13, 0))


def cuda_source(code: str, archs: list[str]) -> MemorySource:
    files = kernel_files(code, backend={"type": "cuda", "archs": archs})
    return MemorySource({"org/small": {"torch-cuda": files}})


@pytest.fixture
def devices(monkeypatch):
    def have(*archs: str, current: int = 0) -> None:
        monkeypatch.setattr(checks_module, "visible_archs", lambda backend: archs)
        monkeypatch.setattr(checks_module, "current_device", lambda: current)

    return have


def test_a_build_for_another_architecture_is_refused_before_import(make_hub, ran, devices):
    """needs 6: a build for another architecture kills the process"""
    code, did_run = ran
    devices("9.0")
    source = cuda_source(code, ["8.0", "10.0"])
    with pytest.raises(IncompatibleDevice, match=r"built for 8.0, 10.0; the current device 0 has 9.0"):
        make_hub(source, host=CUDA).load(SMALL)
    assert make_hub(source, host=CUDA).has(SMALL) is False
    assert not did_run()
    assert make_hub(source, host=CUDA).load(SMALL, check_arch=False)


def test_another_visible_device_that_it_does_not_cover_is_a_warning(make_hub, devices):
    devices("8.0", "9.0")
    with pytest.warns(CompatibilityWarning, match="device 1 has 9.0"):
        make_hub(cuda_source("A = 1\n", ["8.0"]), host=CUDA).load(SMALL)


def test_a_build_that_covers_all_devices_says_nothing(make_hub, devices):
    devices("9.0", "12.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_hub(cuda_source("A = 2\n", ["8.0+PTX"]), host=CUDA).load(SMALL)


# Integrity


def stored(hub: Hub, path: str = "__init__.py") -> Path:
    return hub.install(SMALL) / path


def overwrite(path: Path, text: str) -> None:
    path.parent.chmod(stat.S_IRWXU)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    path.write_text(text)


def test_an_altered_file_in_the_store_is_set_aside_and_fetched_again(make_hub, tmp_path):
    source = source_of()
    overwrite(stored(make_hub(source)), f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    set_default_hub(make_hub(source))
    try:
        with pytest.warns(KernelHubWarning, match="set aside and fetched again") as warned:
            module = get_kernel(str(SMALL))
    finally:
        set_default_hub(None)
    assert [item.filename for item in warned] == [__file__]
    assert module.double(4) == 8
    assert not (tmp_path / "ran").exists()
    assert source.asked.count("fetch") == 2


def test_an_altered_file_is_an_error_offline_and_names_the_file(make_hub):
    source = source_of()
    overwrite(stored(make_hub(source)), "double = None\n")
    with pytest.raises(IntegrityError, match="different: __init__.py") as caught:
        make_hub(source, offline=True).load(SMALL)
    assert [str(item) for item in caught.value.violations] == ["different: __init__.py"]


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("change", ["altered", "truncated", "removed", "added", "metadata", "bytecode", "link"])
def test_every_change_in_the_store_is_seen(make_hub, digest, change):
    source = source_of(digest=digest, code="VALUE = 1\n")
    hub = make_hub(source)
    init = stored(hub)
    folder = init.parent
    folder.chmod(stat.S_IRWXU)
    for file in folder.iterdir():
        file.chmod(stat.S_IRUSR | stat.S_IWUSR)
    if change == "altered":
        init.write_text("VALUE = 2\n")
    elif change == "truncated":
        init.write_text("")
    elif change == "removed":
        init.unlink()
    elif change == "added":
        (folder / "more.py").write_text("")
    elif change == "metadata":
        (folder / "metadata.json").write_text((folder / "metadata.json").read_text() + " ")
    elif change == "bytecode":
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "x.pyc").write_bytes(b"")
    else:
        (folder / "linked").symlink_to(folder.parent, target_is_directory=True)
    with pytest.raises((IntegrityError, InvalidMetadata)):
        make_hub(source, offline=True).load(SMALL)
    with pytest.warns(KernelHubWarning):
        assert make_hub(source).load(SMALL).module.VALUE == 1


def test_what_arrives_different_from_its_digest_is_never_stored(make_hub, tmp_path):
    source = source_of()
    source.kernels["org/small"]["torch-cpu"]["__init__.py"] = b"double = None\n"
    with pytest.raises(IntegrityError, match="different: __init__.py"):
        make_hub(source).load(SMALL)
    assert not [path for path in (tmp_path / "store").rglob("*") if path.name in ("torch-cpu", "__init__.py")]


def test_bytecode_alone_does_not_load(make_hub):
    files = kernel_files()
    code = files.pop("__init__.py")
    files["__init__.pyc"] = code
    source = MemorySource({"org/small": {"torch-cpu": files}})
    with pytest.raises(IntegrityError, match=r"bytecode: __init__.pyc"):
        make_hub(source).load(SMALL)


@pytest.mark.parametrize("metadata", [b"", b"{", b"[]", b"null", b'{"name": "x"}', b"\xff\xfe", b"[" * 100_000])
def test_malformed_metadata_is_an_error_and_leaves_nothing(make_hub, tmp_path, metadata):
    files = {**kernel_files(), "metadata.json": metadata}
    with pytest.raises(InvalidMetadata):
        make_hub(MemorySource({"org/small": {"torch-cpu": files}})).load(SMALL)
    assert not list((tmp_path / "store").rglob("torch-cpu"))


def test_missing_metadata_is_an_error(make_hub):
    files = kernel_files()
    del files["metadata.json"]
    with pytest.raises(InvalidMetadata, match=r"has no metadata.json"):
        make_hub(MemorySource({"org/small": {"torch-cpu": files}})).load(SMALL)


# Dependencies between kernels


def depending(*on: str, code: str = "") -> dict[str, dict[str, bytes]]:
    depends = [{"repo-id": name, "version": 1} for name in on]
    lines = [f"from kernelhub import get_kernel_dep\nDEPS = [get_kernel_dep(name) for name in {list(on)!r}]\n", code]
    return {"torch-cpu": kernel_files("".join(lines), kernel_depends=depends)}


def test_a_kernel_gets_the_kernels_that_it_declares(make_hub):
    source = MemorySource({"org/top": depending("org/mid"), "org/mid": depending("org/small"), **source_of().kernels})
    module = make_hub(source).load(KernelRef.parse("org/top@v1")).module
    assert module.DEPS[0].DEPS[0].double(5) == 10


def test_installing_fetches_the_dependencies_so_that_loading_sends_nothing(make_hub):
    source = MemorySource({"org/top": depending("org/small"), **source_of().kernels})
    make_hub(source).install(KernelRef.parse("org/top@v1"))
    assert make_hub(source, offline=True).load(KernelRef.parse("org/top@v1"))


def test_a_circle_is_named(make_hub):
    source = MemorySource({"org/a": depending("org/b"), "org/b": depending("org/c"), "org/c": depending("org/a")})
    with pytest.raises(KernelCycle, match="org/a -> org/b -> org/c -> org/a"):
        make_hub(source).load(KernelRef.parse("org/a@v1"))
    with pytest.raises(KernelCycle):
        make_hub(source).install(KernelRef.parse("org/a@v1"))


def test_dependencies_go_through_the_gate_too(make_hub):
    mine = MemorySource({"org/top": depending("evil/small")}, name="mine", key="mine", origin=Origin.FOLDER)
    evil = MemorySource({"evil/small": {"torch-cpu": kernel_files()}}, trusted=False)
    with pytest.raises(UntrustedKernel, match="evil/small"):
        make_hub(mine, evil).load(KernelRef.parse("org/top@v1"))


def test_what_is_not_declared_is_not_given(make_hub):
    code = "from kernelhub import get_kernel_dep\nget_kernel_dep('org/other')\n"
    with pytest.raises(KernelNotFound, match="does not declare that it depends on org/other"):
        make_hub(source_of(code=code)).load(SMALL)


def test_outside_of_a_load_there_is_no_dependency():
    with pytest.raises(KernelNotFound, match="no kernel is being loaded"):
        get_kernel_dep("org/small")


# Redirects


def test_a_moved_repository_is_followed_and_the_destinations_trust_counts(make_hub):
    source = MemorySource({"new/small": {"torch-cpu": kernel_files()}})

    class Redirecting(MemorySource):
        def listing(self, repo, commit):
            if repo.org == "old":
                raise Moved(KernelRef.parse("new/small@v1"))
            return super().listing(repo, commit)

    source = Redirecting({**source.kernels, "old/small": {"torch-cpu": {}}})
    loaded = make_hub(source).load(KernelRef.parse("old/small@v1"))
    assert loaded.repo_info.repo_id == "new/small"
    source.trusted = False
    with pytest.raises(UntrustedKernel, match="new/small"):
        make_hub(source, trust=("old/*",), cache=make_hub(source).settings.cache / "other").load(
            KernelRef.parse("old/small@v1")
        )


def test_redirects_in_a_circle_end(make_hub):
    class Circle(MemorySource):
        def listing(self, repo, commit):
            raise Moved(KernelRef(RepoId("org", "b" if repo.name == "a" else "a"), SMALL.pin))

    with pytest.raises(KernelNotFound, match="redirects in a row"):
        make_hub(Circle({"org/a": {}, "org/b": {}})).load(KernelRef.parse("org/a@v1"))


# The user's own folders


@pytest.mark.parametrize("where", ["", "build", "build/torch-cpu"])
def test_a_local_kernel_is_found_from_each_of_its_folders(make_hub, tmp_path, where):
    folder = write_kernel(tmp_path / "my kernel ü")
    loaded = make_hub().load_local(folder / where)
    assert loaded.module.double(2) == 4
    assert loaded.path == folder / "build" / "torch-cpu"
    assert loaded.repo_info is None


def test_a_source_tree_is_a_local_kernel(make_hub, tmp_path):
    tree = tmp_path / "tree"
    write_files(
        tree,
        {
            "build.toml": b'[general]\nname = "tree"\nversion = 1\nedition = 5\nlicense = "MIT"\nbackends = ["cpu"]\n'
            b"[torch-noarch]\n",
            "torch-ext/tree/__init__.py": b"VALUE = 1\n",
        },
    )
    assert make_hub().load_local(tree).module.VALUE == 1
    (tree / "torch-ext/tree/__init__.py").write_text("VALUE = 2\n")
    assert make_hub().load_local(tree).module.VALUE == 2


def test_a_local_kernel_is_verified_where_it_lies(make_hub, tmp_path):
    folder = write_kernel(tmp_path / "k")
    (folder / "build/torch-cpu/__init__.py").write_text("double = None\n")
    with pytest.raises(IntegrityError, match=r"different: __init__.py"):
        make_hub().load_local(folder)


def test_a_local_kernel_leaves_no_trace(make_hub, tmp_path):
    folder = write_kernel(tmp_path / "k")
    before = sorted(path for path in folder.rglob("*"))
    make_hub().load_local(folder)
    assert sorted(path for path in folder.rglob("*")) == before
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("content", [None, "empty", "file"])
def test_a_folder_that_is_no_kernel_says_what_was_expected(make_hub, tmp_path, content):
    path = tmp_path / "x"
    if content == "empty":
        path.mkdir()
    elif content == "file":
        path.write_text("")
    with pytest.raises(InvalidReference, match="Expected"):
        make_hub().load_local(path)


# Locks


def test_a_lock_decides_commit_and_digest(make_hub, tmp_path):
    source = source_of(code="LOCKED = 1\n")
    loaded = make_hub(source).load(SMALL)
    commit = source.commit("org/small")
    lock = tmp_path / "kernels.lock"

    def write(digest: str) -> None:
        kernel = LockedKernel(RepoId("org", "small"), commit, variants={"torch-cpu": digest})
        lock.write_text(LockFile((kernel,)).to_text())

    write(loaded.digest)
    assert make_hub(source).load_locked(RepoId("org", "small"), lockfile=lock).repo_info.revision == commit
    write("sha256-" + "A" * 43 + "=")
    with pytest.raises(IntegrityError, match="the lock file says"):
        make_hub(source).load_locked(RepoId("org", "small"), lockfile=lock)
    with pytest.raises(KernelNotFound, match="not in the lock file"):
        make_hub(source).load_locked(RepoId("org", "other"), lockfile=lock)
    with pytest.raises(InvalidReference, match="cannot read the lock file"):
        make_hub(source).load_locked(RepoId("org", "small"), lockfile=tmp_path / "none.lock")


# What was loaded


def test_loaded_kernels_are_listed_with_where_they_came_from(make_hub):
    source = source_of(code="LISTED = 1\n")
    loaded = make_hub(source).load(SMALL)
    assert loaded in loaded_kernels()
    assert loaded.repo_info.repo_id == "org/small"
    assert loaded.repo_info.revision == source.commit("org/small")
    assert loaded.digest.startswith("sha256-")
    assert sys.modules[loaded.module.__name__] is loaded.module


# What hubs and files say that they should not


def gone(question: str) -> None:
    raise RepositoryNotFound("https://memory.test has no such repository", hint="Set HF_TOKEN.")


def test_a_repository_that_is_gone_or_hidden_stays_in_use(make_hub, clock):
    source = source_of()
    make_hub(source).load(SMALL)
    clock.now += 4000
    source.fault = gone
    with pytest.warns(KernelHubWarning, match="as it was known before"):
        make_hub(source).load(SMALL)
    source.fault = None
    assert make_hub(source, offline=True).load(SMALL)


def test_not_found_is_not_remembered_where_nobody_had_it(make_hub):
    source = source_of()
    source.fault = gone
    with pytest.raises(KernelNotFound, match="Set HF_TOKEN"):
        make_hub(source).load(SMALL)
    source.fault = None
    assert make_hub(source).load(SMALL)


def test_metadata_for_another_backend_than_the_folders_is_refused(make_hub):
    with pytest.raises(InvalidMetadata, match="torch-cpu: its metadata.json says that it is for CUDA"):
        make_hub(source_of(backend={"type": "cuda", "archs": ["9.0"]})).load(SMALL)


@pytest.mark.parametrize("text", ['{"variants": {"torch-cpu": 5}}', '{"variants": {}}', '{"variants": []}', "{", "5"])
def test_a_damaged_listing_is_asked_for_again(make_hub, tmp_path, text):
    source = source_of()
    make_hub(source).load(SMALL)
    (listing,) = (tmp_path / "store").rglob("listing.json")
    listing.write_text(text)
    source.asked.clear()
    assert make_hub(source).load(SMALL)
    assert "listing" in source.asked


def test_an_untrusted_kernel_can_be_looked_at_and_is_not_fetched(make_hub):
    source = source_of()
    source.trusted = False
    facts = make_hub(source).describe(SMALL)
    assert (facts["trusted"], facts["variant"]) == (None, "torch-cpu")
    assert "fetch" not in source.asked


def test_a_local_override_that_is_no_kernel_shows_the_entry(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidReference, match="LOCAL_KERNELS: org/x="):
        Hub(Settings(cache=tmp_path / "store", local_kernels=(("org/x", tmp_path / "empty"),))).sources()
