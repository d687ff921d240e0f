"""A repository that brings its source: built where none of its builds fits, after trust was decided."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernelfiles import kernel_files, write_files
from loopback_hub import LoopbackHub

from kernelhub import Hub, Settings
from kernelhub.benchmark import run_script, scripts
from kernelhub.core.refs import KernelRef, RepoId
from kernelhub.core.trust import Origin
from kernelhub.errors import IntegrityError, KernelNotFound, NoCompatibleVariant, UntrustedKernel
from kernelhub.hub.publish import publish
from kernelhub.hub.server import app
from kernelhub.hub.sources.huggingface import HuggingFaceSource
from kernelhub.hub.sources.layout import LayoutSource

REF = KernelRef.parse("org/tree@v1")
RECIPE = """
[general]
name = "tree"
version = 1
edition = 5
license = "MIT"
backends = ["cpu"]

[torch-noarch]
"""


def agent() -> str:
    return "test"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with its source, and one build for a machine that this is not."""
    folder = tmp_path / "repositories" / "org" / "tree"
    write_files(folder, {"build.toml": RECIPE.encode(), "torch-ext/tree/__init__.py": b"BUILT = 1\n"})
    write_files(folder / "build" / "torch-cuda", kernel_files("BUILT = 0\n", name="tree", backend={"type": "cuda"}))
    return folder


@pytest.fixture
def layout(repository: Path, tmp_path: Path) -> LayoutSource:
    publish(repository, str(tmp_path / "hub"), RepoId("org", "tree"), epoch=1)
    return LayoutSource(str(tmp_path / "hub"), agent)


def client(tmp_path: Path, source: object, build: str = "auto", **settings: object) -> Hub:
    return Hub(Settings(cache=tmp_path / "store", build=build, **settings), sources=[source])


def test_a_hub_in_a_folder(layout, tmp_path):
    loaded = client(tmp_path, layout).load(REF)
    assert loaded.module.BUILT == 1
    assert str(loaded.variant) == "torch-cpu"
    assert loaded.repo_info.repo_id == "org/tree"
    assert loaded.repo_info.revision == layout.resolve(RepoId("org", "tree"), REF.pin)


def test_the_hugging_face_protocol(repository, tmp_path, hub: LoopbackHub):
    hub.app = app(repository.parent.parent)
    source = HuggingFaceSource(hub.url, agent, lambda: None)
    module = client(tmp_path, source).load(REF, trust_remote_code=True).module
    assert module.BUILT == 1
    hub.requests.clear()
    assert client(tmp_path, source).load(REF, trust_remote_code=True).module is module
    assert hub.requests == []


BENCHMARK = b"""
from kernelhub import Benchmark


class Built(Benchmark):
    def setup(self):
        pass

    def benchmark_built(self):
        self.out = self.kernel.BUILT
"""


@pytest.mark.parametrize("protocol", ["layout", "hugging face"])
def test_its_benchmarks_are_fetched_once_it_is_trusted(protocol, repository, tmp_path, hub: LoopbackHub):
    write_files(repository / "benchmarks", {"benchmark.py": BENCHMARK, "data/sizes.json": b"[1]\n"})
    if protocol == "layout":
        publish(repository, str(tmp_path / "hub"), RepoId("org", "tree"), epoch=1)
        here = client(tmp_path, LayoutSource(str(tmp_path / "hub"), agent))
    else:
        hub.app = app(repository.parent.parent)
        here = client(tmp_path, HuggingFaceSource(hub.url, agent, lambda: None))
        with pytest.raises(UntrustedKernel):
            here.benchmarks(REF)
        assert hub.targets("/resolve/") == hub.targets("benchmarks") == []

    folder = here.benchmarks(REF, trust_remote_code=True)
    assert [path.name for path in scripts(folder)] == ["benchmark.py"]
    assert (folder / "data" / "sizes.json").read_bytes() == b"[1]\n"
    kernel = here.load(REF, trust_remote_code=True).module
    assert [item.workload for item in run_script(folder / "benchmark.py", kernel, "cpu", rounds=3)] == ["built"]

    hub.requests.clear()
    assert here.benchmarks(REF, trust_remote_code=True) == folder
    assert hub.requests == []  # it is here
    # What was altered in the store is fetched again, not run.
    (folder / "benchmark.py").write_bytes(b"raise SystemExit\n")
    assert here.benchmarks(REF, trust_remote_code=True) == folder
    assert (folder / "benchmark.py").read_bytes() == BENCHMARK


@pytest.mark.parametrize("protocol", ["layout", "hugging face"])
def test_without_benchmarks_the_error_says_so(protocol, repository, layout, tmp_path, hub: LoopbackHub):
    hub.app = app(repository.parent.parent)
    source = layout if protocol == "layout" else HuggingFaceSource(hub.url, agent, lambda: None)
    with pytest.raises(KernelNotFound, match="has no benchmarks of org/tree"):
        client(tmp_path, source).benchmarks(REF, trust_remote_code=True)


def test_has_kernel_agrees(layout, tmp_path):
    assert client(tmp_path, layout).has(REF) is True
    assert client(tmp_path, layout, build="never").has(REF) is False


def test_it_is_built_once_and_loads_without_the_hub(layout, tmp_path):
    module = client(tmp_path, layout).load(REF).module
    (tmp_path / "hub" / "blobs").rename(tmp_path / "gone")
    assert client(tmp_path, layout).load(REF).module is module


def test_never_means_never(layout, tmp_path):
    with pytest.raises(NoCompatibleVariant):
        client(tmp_path, layout, build="never").load(REF)
    assert not list((tmp_path / "store").rglob("build.toml"))


def test_nothing_is_fetched_or_built_before_trust(repository, tmp_path):
    publish(repository, str(tmp_path / "hub"), RepoId("org", "tree"), epoch=1)

    class Remote(LayoutSource):
        @property
        def origin(self) -> Origin:
            return Origin.REMOTE

    with pytest.raises(UntrustedKernel):
        client(tmp_path, Remote(str(tmp_path / "hub"), agent)).load(REF)
    assert not list((tmp_path / "store").rglob("build.toml"))


def test_a_source_that_was_changed_in_the_store_is_fetched_again(layout, tmp_path):
    client(tmp_path, layout).install(REF)
    (source,) = (tmp_path / "store").rglob("torch-ext/tree/__init__.py")
    source.parent.chmod(0o755)
    source.chmod(0o644)
    source.write_text("BUILT = 'evil'\n")
    assert client(tmp_path, layout).load(REF).module.BUILT == 1


def test_a_source_archive_that_was_changed_on_the_hub_is_refused(layout, tmp_path):
    archive = layout.manifest(RepoId("org", "tree"), layout.resolve(RepoId("org", "tree"), REF.pin)).source
    (blob,) = (tmp_path / "hub" / "blobs").rglob(archive)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(IntegrityError, match="not what its manifest names"):
        client(tmp_path, layout).load(REF)


def test_a_repository_without_source_says_which_builds_it_has(repository, tmp_path, hub: LoopbackHub):
    (repository / "build.toml").unlink()
    hub.app = app(repository.parent.parent)
    with pytest.raises(NoCompatibleVariant, match="made for CUDA"):
        client(tmp_path, HuggingFaceSource(hub.url, agent, lambda: None)).load(REF, trust_remote_code=True)
