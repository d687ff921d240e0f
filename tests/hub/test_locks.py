"""Locks, from a project's pyproject.toml to a load: what they pin, what they refuse, and where they are found."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from kernelfiles import MemorySource, kernel_files, write_files, write_kernel

import kernelhub
from kernelhub import Hub, Settings
from kernelhub.cli.main import run
from kernelhub.core.digest import Digest
from kernelhub.core.host import Host
from kernelhub.core.lockfile import LockedKernel, LockFile
from kernelhub.core.refs import KernelRef, RepoId, Revision, Version
from kernelhub.errors import (
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelCycle,
    KernelHubWarning,
    KernelNotFound,
    NoCompatibleVariant,
    StoreError,
    UntrustedKernel,
    Yanked,
)
from kernelhub.hub.client import set_default_hub
from kernelhub.hub.locks import lock_to_package, make_lock, package_lock, project_dependencies, write_lock
from kernelhub.hub.publish import publish, yank
from kernelhub.hub.sources.base import Moved

HOST = Host(python=(3, 11), torch=(2, 13), backend="cpu", cpu="x86_64", os="linux")
TOP, BASE = RepoId("org", "top"), RepoId("org", "base")
V1 = Version(1)
EPOCH = 1_763_755_200


def depends(repo: str = "org/base", **pin: object) -> list[dict[str, object]]:
    return [{"repo-id": repo, **(pin or {"version": 1})}]


def source_of(base: str = "VALUE = 1\n") -> MemorySource:
    """org/top, whose CUDA build depends on org/base, and its CPU build too."""
    top = "from kernelhub import get_kernel_dep\nVALUE = get_kernel_dep('org/base').VALUE\n"
    return MemorySource(
        {
            "org/top": {
                "torch-cpu": kernel_files(top, name="top", kernel_depends=depends()),
                "torch-cuda": kernel_files(top, name="top", kernel_depends=depends(), backend={"type": "cuda"}),
            },
            "org/base": {"torch-cpu": kernel_files(base, name="base")},
        }
    )


@pytest.fixture
def make_hub(tmp_path: Path):
    def make(*sources: object, **settings: object) -> Hub:
        settings.setdefault("cache", tmp_path / "store")
        return Hub(Settings(**settings), sources=sources, host=HOST)

    return make


def lock_of(hub: Hub, *refs: str, **options: object) -> LockFile:
    return make_lock(hub, [KernelRef.parse(ref) for ref in refs], **options)


# Making


def test_a_lock_has_every_variants_digest_and_what_kernels_depend_on_and_fetches_metadata_only(make_hub):
    source = source_of()
    lock = lock_of(make_hub(source), "org/top@v1")
    assert [(str(kernel), kernel.commit, kernel.hub) for kernel in lock.kernels] == [
        ("org/base@v1", source.commit("org/base"), "https://memory.test"),
        ("org/top@v1", source.commit("org/top"), "https://memory.test"),
    ]
    top = lock.find(TOP)
    assert top.variants == {name: Digest.of(files).text for name, files in source.kernels["org/top"].items()}
    assert top.depends == (BASE,)
    assert "fetch" not in source.asked
    assert LockFile.parse(lock.to_text()).to_text() == lock.to_text()


def test_a_variant_that_declares_no_digest_is_fetched_and_its_files_are_what_is_locked(make_hub):
    files = kernel_files("OLD = 1\n", digest=False)
    source = MemorySource({"org/small": {"torch-cpu": files}})
    lock = lock_of(make_hub(source), "org/small@v1")
    assert "fetch" in source.asked
    assert lock.kernels[0].variants == {"torch-cpu": Digest.of(files).text}


def test_a_variant_that_cannot_be_read_is_left_out_and_said(make_hub):
    source = source_of()
    source.kernels["org/base"]["torch-rocm"] = {"metadata.json": b"{}"}
    with pytest.warns(KernelHubWarning, match=r"torch-rocm: .*\n  This variant of org/base is left out"):
        lock = lock_of(make_hub(source), "org/base@v1")
    assert set(lock.kernels[0].variants) == {"torch-cpu"}


def test_kernels_that_depend_on_each_other_cannot_be_locked(make_hub):
    source = source_of()
    source.kernels["org/base"]["torch-cpu"] = kernel_files("", name="base", kernel_depends=depends("org/top"))
    with pytest.raises(KernelCycle, match="org/top@v1 -> org/base@v1 -> org/top@v1"):
        lock_of(make_hub(source), "org/top@v1")


def test_locking_asks_for_trust_of_dependencies_too(make_hub):
    source = source_of()
    source.trusted = None
    with pytest.raises(UntrustedKernel, match="org/top"):
        lock_of(make_hub(source), "org/top@v1")
    with pytest.raises(UntrustedKernel, match="org/base"):
        lock_of(make_hub(source), "org/top@v1", trust_remote_code=["org/top"])
    assert len(lock_of(make_hub(source), "org/top@v1", trust_remote_code=["org/*"]).kernels) == 2


def test_what_is_compiled_here_has_no_digest_and_the_commit_names_no_compiler(make_hub):
    from kernelhub.hub.sources.defaults import building_of
    from kernelhub.hub.sources.project import ProjectSource

    hub = make_hub(build="auto")
    hub._sources = (ProjectSource.embedded(building_of(hub.settings)),)
    lock = lock_of(hub, "kernelhub/norm@v1")
    assert all(name.count("-") == 1 for name in lock.kernels[0].variants), lock.kernels[0].variants
    assert lock.kernels[0].commit.endswith("0" * 12)
    assert hub.sources()[0].resolve(RepoId("kernelhub", "norm"), V1)[:28] == lock.kernels[0].commit[:28]


def test_an_override_of_this_machine_is_neither_locked_nor_loaded_by_lock(make_hub, tmp_path):
    from kernelhub.hub.sources.local import local_source

    source = source_of()
    local = local_source(write_kernel(tmp_path / "mine", code="VALUE = 9\n"), BASE)[0]
    assert make_hub(local, source).load(KernelRef.parse("org/base@v1")).module.VALUE == 9
    lock = lock_of(make_hub(local, source), "org/base@v1")
    assert lock.kernels[0].commit == source.commit("org/base")
    nowhere = LockFile((replace(lock.kernels[0], hub=None),))
    for item in (lock, nowhere):
        fresh = make_hub(local, source, cache=tmp_path / f"for {item.kernels[0].hub is None}")
        assert fresh.load_locked(BASE, lockfile=item).module.VALUE == 1


def test_a_version_that_was_withdrawn_stays_where_it_was_locked_and_nobody_new_gets_it(make_hub, tmp_path):
    from kernelhub.hub.sources.layout import LayoutSource

    url = str(tmp_path / "hub")
    publish(write_kernel(tmp_path / "small"), url, BASE, epoch=EPOCH)
    lock = lock_of(make_hub(LayoutSource(url, str)), "org/base@v1")
    yank(url, BASE, "v1", "wrong results")
    fresh = make_hub(LayoutSource(url, str), cache=tmp_path / "fresh")
    with pytest.raises(Yanked, match="wrong results"):
        lock_of(fresh, "org/base@v1")
    with pytest.warns(KernelHubWarning, match=r"wrong results\n  It was locked before, and stays"):
        assert lock_of(fresh, "org/base@v1", before=lock) == lock


class MovedSource(MemorySource):
    """org/old went to org/base."""

    def resolve(self, repo, pin):
        if str(repo) == "org/old":
            raise Moved(KernelRef(BASE))
        return super().resolve(repo, pin)


def test_a_repository_that_moved_is_locked_where_it_is_and_found_by_both_names(make_hub):
    source = MovedSource(source_of().kernels)
    lock = lock_of(make_hub(source), "org/old@v1")
    assert [(str(kernel), kernel.repo) for kernel in lock.kernels] == [("org/old@v1", BASE)]
    lock = LockFile.parse(lock.to_text())
    for repo in (RepoId("org", "old"), BASE):
        assert make_hub(source).load_locked(repo, lockfile=lock).module.VALUE == 1
    assert make_lock(make_hub(source), [KernelRef.parse("org/old@v1")], before=lock) == lock


def test_metadata_that_a_hub_altered_is_not_locked(hub, make_hub, tmp_path):
    """`hub` speaks the Hugging Face Hub's protocol."""
    from kernelhub.hub.server import app
    from kernelhub.hub.sources.huggingface import HuggingFaceSource

    hub.app = app(write_kernel(tmp_path / "kernels" / "org" / "base").parents[1], trusted=True)
    client = make_hub(HuggingFaceSource(hub.url, str))
    assert lock_of(client, "org/base@v1").kernels[0].variants != {}
    hub.alter("metadata.json")
    with pytest.raises(IntegrityError, match=r"different: metadata\.json"):
        lock_of(client, "org/base@v1")


# Loading


def test_dependencies_are_taken_from_the_lock_whatever_the_hub_has_by_now(make_hub):
    source = source_of()
    lock = lock_of(make_hub(source), "org/top@v1")
    make_hub(source).load_locked(TOP, lockfile=lock)
    source.kernels["org/base"]["torch-cpu"] = kernel_files("VALUE = 2\n", name="base")
    assert make_hub(source).load_locked(TOP, lockfile=lock).module.VALUE == 1
    assert make_hub(source, ref_ttl=0).load(KernelRef.parse("org/top@v1")).module.VALUE == 2


def test_a_dependency_with_other_bytes_than_the_lock_names_is_refused(make_hub):
    source = source_of()
    lock = lock_of(make_hub(source), "org/top@v1")
    source.commit_of["org/base"] = lock.find(BASE).commit  # a hub that serves other files under the commit
    source.kernels["org/base"]["torch-cpu"] = kernel_files("VALUE = 2\n", name="base")
    with pytest.raises(IntegrityError, match="while loading org/base@.*the lock file says"):
        make_hub(source).load_locked(TOP, lockfile=lock)


def test_a_dependency_that_is_not_locked_is_not_looked_for_elsewhere(make_hub):
    source = source_of()
    lock = LockFile((lock_of(make_hub(source), "org/top@v1").find(TOP),))
    source.asked.clear()
    with pytest.raises(KernelNotFound, match=r"org/base@v1 is not in the lock file \(there: org/top@v1\)"):
        make_hub(source).load_locked(TOP, lockfile=lock)


def test_a_variant_that_the_lock_does_not_name_is_not_taken(make_hub):
    source = source_of()
    lock = lock_of(make_hub(source), "org/base@v1")
    source.commit_of["org/base"] = lock.find(BASE).commit
    better = "torch-stable-abi210-cpu-x86_64-linux"
    source.kernels["org/base"][better] = kernel_files("VALUE = 'not locked'\n", name="base")
    fresh = make_hub(source, cache=make_hub().settings.cache / "fresh")
    assert str(fresh.variants(KernelRef.parse("org/base@v1"))[0].variant) == better
    assert fresh.load_locked(BASE, lockfile=lock).module.VALUE == 1
    del source.kernels["org/base"]["torch-cpu"]
    with pytest.raises(NoCompatibleVariant, match="the lock file does not name it"):
        make_hub(source, cache=make_hub().settings.cache / "other").load_locked(BASE, lockfile=lock)


def test_a_lock_grants_no_trust(make_hub):
    source = source_of()
    lock = lock_of(make_hub(source), "org/top@v1")
    source.trusted = None
    hub = make_hub(source, cache=make_hub().settings.cache / "fresh")
    with pytest.raises(UntrustedKernel, match="org/top"):
        hub.load_locked(TOP, lockfile=lock)
    with pytest.raises(UntrustedKernel, match="org/base"):
        hub.load_locked(TOP, lockfile=lock, trust_remote_code=["org/top"])


def test_the_hub_that_the_lock_names_is_asked_first_and_no_other_is_added(make_hub):
    one, two = source_of(), source_of()
    two.name, two.key = "https://two.test", "two"
    lock = lock_of(make_hub(two), "org/base@v1")
    make_hub(one, two, cache=make_hub().settings.cache / "a").load_locked(BASE, lockfile=lock)
    assert "fetch" in two.asked
    assert one.asked == []
    make_hub(one, cache=make_hub().settings.cache / "b").load_locked(BASE, lockfile=lock)
    assert "fetch" in one.asked


def test_after_a_download_loading_sends_nothing(make_hub):
    source = source_of()
    lock = lock_of(make_hub(source), "org/top@v1")
    hub = make_hub(source)
    hub.download(lock.find(TOP), lock)
    source.asked.clear()
    assert make_hub(source).load_locked(TOP, lockfile=lock).module.VALUE == 1
    assert make_hub(source).load_locked(TOP, lockfile=lock, local_files_only=True).module.VALUE == 1
    assert source.asked == []


def test_load_kernel_never_downloads(make_hub):
    source = source_of()
    lock = lock_of(make_hub(source), "org/top@v1")
    source.asked.clear()
    with pytest.raises(KernelNotFound):
        make_hub(source).load_locked(TOP, lockfile=lock, local_files_only=True)
    assert source.asked == []


def test_all_variants_are_downloaded_and_compared(make_hub):
    source = source_of()
    lock = lock_of(make_hub(source), "org/top@v1")
    folders = make_hub(source).download(lock.find(TOP), lock, all_variants=True)
    assert [item.path.name for item in folders] == ["torch-cpu", "torch-cuda"]
    source.commit_of["org/top"] = lock.find(TOP).commit
    source.kernels["org/top"]["torch-cuda"]["__init__.py"] = b"VALUE = 3\n"
    source.kernels["org/top"]["torch-cuda"] = kernel_files("VALUE = 3\n", name="top", backend={"type": "cuda"})
    fresh = make_hub(source, cache=make_hub().settings.cache / "fresh")
    with pytest.raises(IntegrityError, match="torch-cuda has the digest"):
        fresh.download(lock.find(TOP), lock, all_variants=True)
    del source.kernels["org/top"]["torch-cuda"]
    with pytest.raises(KernelNotFound, match="has no torch-cuda of org/top"):
        make_hub(source, cache=make_hub().settings.cache / "c").download(lock.find(TOP), lock, all_variants=True)


# The hashes of the kernels package


def git_lfs_concat(files: dict[str, bytes], in_lfs: set[str]) -> str:
    """The hash as the kernels package writes it, from the description of its format."""
    state = hashlib.sha256()
    for path, data in sorted((path.encode(), data) for path, data in files.items()):
        blob = hashlib.sha1(b"blob " + str(len(data)).encode() + b"\0" + data).digest()
        state.update(path + (hashlib.sha256(data).digest() if path.decode() in in_lfs else blob))
    return f"sha256-{state.hexdigest()}"


@pytest.mark.parametrize("in_lfs", [set(), {"__init__.py"}, {"lib.so"}, {"data.bin", "lib.so"}])
def test_the_hashes_of_the_older_lock_of_the_kernels_package_are_checked(make_hub, in_lfs):
    files = {**kernel_files("VALUE = 5\n", digest=False), "lib.so": b"\x7fELF" * 9, "data.bin": b"\0" * 50}
    source = MemorySource({"org/small": {"torch-cpu": files}})

    def lock(value: str, kind: str = "git_lfs_concat") -> LockFile:
        variants = {"torch-cpu": {"hash": value, "hash_type": kind}}
        return LockFile.parse(
            json.dumps([{"repo_id": "org/small", "sha": source.commit("org/small"), "variants": variants}])
        )

    small, right = RepoId("org", "small"), git_lfs_concat(files, in_lfs)
    make_hub(source).download(lock(right).kernels[0], lock(right))
    wrong = git_lfs_concat({**files, "lib.so": b"other"}, in_lfs)
    with pytest.raises(IntegrityError, match="torch-cpu has not the hash that the lock file says"):
        make_hub(source).load_locked(small, lockfile=lock(wrong))
    with pytest.raises(InvalidMetadata, match="of a kind that is not known here"):
        make_hub(source).load_locked(small, lockfile=lock(right, "md5"))


def test_the_newer_lock_of_the_kernels_package_pins_dependencies_too(make_hub):
    source = source_of()
    rows = [
        {"dependency": {"repo-id": repo, "version": 1}, "lock": {"commit": source.commit(repo)}}
        for repo in ("org/top", "org/base")
    ]
    lock = LockFile.parse(json.dumps(rows))
    make_hub(source).load_locked(TOP, lockfile=lock)
    source.kernels["org/base"]["torch-cpu"] = kernel_files("VALUE = 2\n", name="base")
    assert make_hub(source).load_locked(TOP, lockfile=lock).module.VALUE == 1
    with pytest.raises(KernelNotFound, match="org/base@v1 is not in the lock file"):
        make_hub(source).load_locked(TOP, lockfile=LockFile.parse(json.dumps(rows[:1])))


# The commands


@pytest.fixture
def kernelhub_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in os.environ if name.startswith(("KERNEL", "HF_", "LOCAL_KERNELS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KERNELHUB_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("KERNELHUB_OFFLINE", "1")
    monkeypatch.setenv("KERNELHUB_BUILD", "never")
    monkeypatch.setenv("KERNELHUB_HUBS", str(tmp_path / "hub ü"))

    def command(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in a folder with letters of its own, that uses org/top, which needs org/base."""
    url = str(tmp_path / "hub ü")
    publish(write_kernel(tmp_path / "base", code="VALUE = 1\n", name="base"), url, BASE, epoch=EPOCH)
    top = write_kernel(tmp_path / "top", code="VALUE = 1\n", name="top", kernel_depends=depends())
    publish(top, url, TOP, epoch=EPOCH)
    folder = tmp_path / "projekt ü"
    return write_files(folder, {"pyproject.toml": b'[tool.kernelhub.dependencies]\n"org/top" = 1\n'})


def test_lock_writes_checks_and_says_what_changed(kernelhub_, project, tmp_path):
    path = project / "kernels.lock"
    code, out, _ = kernelhub_("lock", project, "--check")
    assert (code, path.exists()) == (1, False)
    assert "org/top@v1 is new" in out
    assert kernelhub_("lock", project)[0] == 0
    text = path.read_text()
    assert kernelhub_("lock", project, "--check")[:2] == (0, f"{path} (2 kernels) is up to date\n")
    new = write_kernel(tmp_path / "base2", code="VALUE = 2\n", name="base")
    commit = publish(new, str(tmp_path / "hub ü"), BASE, epoch=EPOCH + 1).commit
    code, out, _ = kernelhub_("lock", project, "--check", "--json")
    changes = json.loads(out)["changes"]
    assert (code, path.read_text()) == (1, text)
    assert [change.endswith(f"and is {commit}") for change in changes] == [True], changes
    (project / "pyproject.toml").write_text('[tool.kernelhub.dependencies]\n"org/base" = 1\n')
    code, out, _ = kernelhub_("lock", project, "--check")
    assert code == 1
    assert "org/top@v1 is not needed any more" in out
    assert kernelhub_("lock", project)[0] == 0
    assert [str(kernel) for kernel in LockFile.parse(path.read_bytes()).kernels] == ["org/base@v1"]


def test_lock_reads_the_kernels_packages_table_and_says_what_is_wrong(kernelhub_, project):
    pyproject = project / "pyproject.toml"
    pyproject.write_text('[tool.kernels.dependencies]\n"org/base" = 1\n')
    assert kernelhub_("lock", project)[0] == 0
    for text, words in (
        ("", "names no kernels"),
        ("[tool.kernelhub\n", "not TOML"),
        ("[tool.kernelhub]\ndependencies = 3\n", "not a table"),
        ('[tool.kernelhub.dependencies]\n"org/base" = true\n', "neither a version nor a revision"),
        ('[tool.kernelhub.dependencies]\n"base" = 1\n', "does not name a kernel repository"),
    ):
        pyproject.write_text(text)
        code, _, err = kernelhub_("lock", project)
        assert code == 2, text
        assert words in err
    assert "cannot read it" in kernelhub_("lock", project / "none")[2]


def test_a_lock_that_cannot_be_written_is_an_error_and_the_old_one_stays(tmp_path):
    (tmp_path / "kernels.lock").mkdir()
    with pytest.raises(StoreError, match=r"cannot write .*kernels\.lock"):
        write_lock(tmp_path / "kernels.lock", LockFile())
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.lock"]


def test_download_fetches_what_the_lock_names(kernelhub_, project):
    assert kernelhub_("download", project)[0] == 2
    assert kernelhub_("lock", project)[0] == 0
    code, out, err = kernelhub_("download", project, "--json")
    assert code == 0, err
    assert [row["kernel"] for row in json.loads(out)["kernels"]] == ["org/top@v1"]
    code, out, _ = kernelhub_("download", project, "--all-variants", "--json")
    assert [row["kernel"] for row in json.loads(out)["kernels"]] == ["org/base@v1", "org/top@v1"]
    path = project / "kernels.lock"
    path.write_text(path.read_text().replace('"digest": "sha256-', '"digest": "sha256-x'))
    assert kernelhub_("download", project)[0] == 4


def test_download_goes_on_past_a_kernel_without_a_build_for_this_machine(kernelhub_, project, tmp_path):
    other = write_kernel(tmp_path / "other", "torch-xpu", name="other", backend={"type": "xpu"})
    publish(other, str(tmp_path / "hub ü"), RepoId("org", "a-other"), epoch=EPOCH)
    (project / "pyproject.toml").write_text('[tool.kernelhub.dependencies]\n"org/a-other" = 1\n"org/base" = 1\n')
    assert kernelhub_("lock", project)[0] == 0
    code, out, err = kernelhub_("download", project, "--json")
    assert code == 1
    assert [row["kernel"] for row in json.loads(out)["kernels"]] == ["org/base@v1"]
    assert "org/a-other" in err


@pytest.mark.parametrize("command", ["lock", "download"])
def test_commands_say_what_they_do_and_can_be_interrupted(kernelhub_, project, command, monkeypatch):
    code, out, _ = kernelhub_(command, "--help")
    assert (code, "--json" in out, "[PROJECT]" in out) == (0, True, True)
    assert kernelhub_("lock", project)[0] == 0
    before = (project / "kernels.lock").read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Hub, command, interrupted)
    assert kernelhub_(command, project)[0] == 130
    assert [path.name for path in project.iterdir() if "lock" in path.name] == ["kernels.lock"]
    assert (project / "kernels.lock").read_bytes() == before


# In packages


BUILDS = {
    "hatchling": """
[build-system]
requires = ["hatchling", "kernelhub"]
build-backend = "hatchling.build"

[tool.hatch.build.hooks.kernelhub]
[tool.hatch.build.targets.wheel]
packages = ["tiny_package"]
""",
    "setuptools": """
[build-system]
requires = ["setuptools>=64", "kernelhub"]
build-backend = "setuptools.build_meta"

[tool.setuptools]
packages = ["tiny_package"]
""",
}
SRC_LAYOUT = 'package-dir = {"" = "src"}\n'


def build(project: Path, backend: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel of a project that uses org/top; offline, with what is installed here."""
    text = '[project]\nname = "tiny-project"\nversion = "1.0"\n' + BUILDS[backend]
    with (project / "pyproject.toml").open("a") as file:
        file.write(text)
    write_files(project, {"tiny_package/__init__.py": b""})
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    return subprocess.run(
        [*command, "--disable-pip-version-check", "--wheel-dir", str(project / "dist"), str(project)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("backend", sorted(BUILDS))
def test_a_built_wheel_has_the_lock_and_kernels_are_loaded_by_it(kernelhub_, project, backend, tmp_path, monkeypatch):
    assert kernelhub_("lock", project)[0] == 0
    built = build(project, backend)
    assert built.returncode == 0, built.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr("importlib.metadata.MetadataPathFinder.invalidate_caches", lambda *_: None, raising=False)
    text = (project / "kernels.lock").read_text()
    import tiny_package

    for name in ("tiny-project", "tiny_project", "tiny_package", "tiny_package.layers", tiny_package):
        assert package_lock(name).to_text() == text
    set_default_hub(None)
    try:
        assert kernelhub.get_locked_kernel("org/top", package=tiny_package).VALUE == 1
        assert kernelhub.load_kernel("org/top", package="tiny-project").VALUE == 1
        with pytest.raises(KernelNotFound, match="not in the lock file"):
            kernelhub.load_kernel("org/none", package="tiny-project")
    finally:
        set_default_hub(None)
        sys.modules.pop("tiny_package", None)


@pytest.mark.parametrize(
    ("module", "more"), [("hatchling.build", ""), ("setuptools.build_meta", ""), ("setuptools.build_meta", SRC_LAYOUT)]
)
def test_a_wheel_is_built_from_a_source_distribution(kernelhub_, project, module, more, tmp_path):
    assert kernelhub_("lock", project)[0] == 0
    with (project / "pyproject.toml").open("a") as file:
        file.write(f'[project]\nname = "tiny-project"\nversion = "1.0"\n{BUILDS[module.partition(".")[0]]}{more}')
    write_files(project / "src" if more else project, {"tiny_package/__init__.py": b""})

    def build(what: str, folder: Path) -> Path:
        code = f"from {module} import *; build_{what}({str(tmp_path)!r})"
        ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        (made,) = tmp_path.glob("tiny_project-1.0*.tar.gz" if what == "sdist" else "tiny_project-1.0*.whl")
        return made

    shutil.unpack_archive(build("sdist", project), tmp_path / "unpacked")
    wheel = build("wheel", tmp_path / "unpacked" / "tiny_project-1.0")
    (lock,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/kernels.lock")]
    assert zipfile.ZipFile(wheel).read(lock).decode() == (project / "kernels.lock").read_text()


@pytest.mark.parametrize("backend", sorted(BUILDS))
def test_a_project_without_its_lock_is_not_built(kernelhub_, project, backend):
    write_files(project, {"tiny_project.egg-info/kernels.lock": LockFile(()).to_text().encode()})  # of another time
    built = build(project, backend)
    assert built.returncode != 0
    assert "names kernels and has no kernels.lock" in built.stdout + built.stderr


def test_a_lock_that_lacks_a_kernel_of_the_project_is_not_packed(project):
    (project / "kernels.lock").write_text(LockFile((LockedKernel(TOP, "0" * 40, Version(2)),)).to_text())
    with pytest.raises(KernelNotFound, match=r"org/top@v1 is not in the lock file \(there: org/top@v2\)"):
        lock_to_package(project)
    (project / "pyproject.toml").write_text("")
    assert lock_to_package(project) is None
    assert lock_to_package(project / "none") is None


def distribution(site: Path, name: str, package: str, lock: str | None) -> None:
    info = site / f"{name}-1.0.dist-info"
    files = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", "RECORD": f"{package}/__init__.py,,\n"}
    write_files(
        info, {path: text.encode() for path, text in {**files, **({"kernels.lock": lock} if lock else {})}.items()}
    )


def test_which_lock_is_meant_is_never_guessed(tmp_path, monkeypatch):
    one, two = (LockFile((LockedKernel(TOP, char * 40, V1),)).to_text() for char in "12")
    distribution(tmp_path, "first", "shared_space", one)
    distribution(tmp_path, "second", "shared_space", two)
    distribution(tmp_path, "third", "third", None)
    distribution(tmp_path, "fourth", "fourth", "{")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_lock("second").kernels[0].commit == "2" * 40
    with pytest.raises(InvalidReference, match=r"comes from first and second, and each has a kernels\.lock"):
        package_lock("shared_space.part")
    with pytest.raises(InvalidReference, match="none of third has"):
        package_lock("third")
    with pytest.raises(InvalidReference, match="no installed distribution of that name"):
        package_lock("not_installed_anywhere")
    with pytest.raises(InvalidMetadata, match=r"kernels\.lock of fourth"):
        package_lock("fourth")
    with pytest.raises(InvalidReference, match="neither a module nor a name"):
        package_lock(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidReference, match="no lock file was given"):
        kernelhub.load_kernel("org/top")
    with pytest.raises(InvalidReference, match="one of lockfile and package"):
        kernelhub.load_kernel("org/top", lockfile="x", package="y")


def test_dependencies_may_name_revisions(tmp_path, make_hub):
    text = b'[tool.kernelhub.dependencies]\n"org/base" = "main"\n'
    wanted = project_dependencies(write_files(tmp_path, {"pyproject.toml": text}))
    assert wanted == (KernelRef(BASE, Revision("main")),)
    lock = make_lock(make_hub(source_of()), wanted)
    assert [str(kernel) for kernel in lock.kernels] == ["org/base@main"]
    assert LockFile.parse(lock.to_text()).to_text() == lock.to_text()
    lock.check_covers(wanted)
    with pytest.raises(KernelNotFound):
        lock.check_covers([KernelRef(BASE, V1)])


BUILD_TOML = b"""
[general]
name = "base"
version = 1
license = "Apache-2.0"
backends = ["cpu"]
kernel-depends = [{ repo-id = "org/below", version = 1 }]

[torch-noarch]
"""


def test_what_is_built_here_does_not_stand_in_for_a_build_that_is_locked(make_hub, tmp_path):
    from kernelhub.hub.sources.layout import LayoutSource

    url = str(tmp_path / "hub")
    project = write_files(
        write_kernel(tmp_path / "base", code="VALUE = 'published'\n", name="base"),
        {"build.toml": BUILD_TOML, "torch-ext/base/__init__.py": b"VALUE = 'built'\n"},
    )
    publish(project, url, BASE, epoch=EPOCH)
    publish(write_kernel(tmp_path / "below", name="below"), url, RepoId("org", "below"), epoch=EPOCH)
    hub = make_hub(LayoutSource(url, str), build="always")
    assert hub.load(KernelRef(BASE, V1)).module.VALUE == "built"
    lock = lock_of(hub, "org/base@v1")
    assert hub.load_locked(BASE, lockfile=lock).module.VALUE == "published"


def test_what_only_has_a_source_is_locked_by_its_commit_with_what_that_depends_on(make_hub, tmp_path):
    from kernelhub.hub.sources.layout import LayoutSource

    url = str(tmp_path / "hub")
    project = write_files(
        write_kernel(tmp_path / "base", "torch-xpu", name="base", backend={"type": "xpu"}),
        {"build.toml": BUILD_TOML, "torch-ext/base/__init__.py": b"VALUE = 'built'\n"},
    )
    publish(project, url, BASE, epoch=EPOCH)
    publish(write_kernel(tmp_path / "below", name="below"), url, RepoId("org", "below"), epoch=EPOCH)
    hub = make_hub(LayoutSource(url, str), build="auto")
    lock = lock_of(hub, "org/base@v1")
    assert [str(kernel) for kernel in lock.kernels] == ["org/below@v1", "org/base@v1"]
    assert hub.load_locked(BASE, lockfile=lock).module.VALUE == "built"
