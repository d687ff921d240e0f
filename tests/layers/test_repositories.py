"""Where kernels come from: by name, from a folder, by a lock file; a layer, or a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernelfiles import MemorySource, kernel_files
from kernels_for_tests import INIT, LAYERS
from torch import nn

from kernelhub.core.digest import Digest
from kernelhub.core.lockfile import LockedKernel, LockFile
from kernelhub.core.refs import RepoId
from kernelhub.errors import IntegrityError, KernelNotFound, LayerContractError, NoKernelForLayer, UntrustedKernel
from kernelhub.hub.client import Hub, default_hub, set_default_hub
from kernelhub.layers.kernel import load_layer
from kernelhub.layers.repositories import (
    FuncRepository,
    LayerRepository,
    LocalFuncRepository,
    LocalLayerRepository,
    LockedFuncRepository,
    LockedLayerRepository,
    Repository,
    _classes,
)
from kernelhub.settings import Settings

pytestmark = pytest.mark.usefixtures("hub")

FILES = kernel_files({"__init__.py": INIT, "layers.py": LAYERS}, name="sources")


@pytest.fixture
def source(hub: Hub, tmp_path: Path) -> MemorySource:
    found = MemorySource({"org/k": {"torch-cpu": FILES}, "org/any": {"torch-universal": FILES}})
    set_default_hub(Hub(Settings(cache=tmp_path / "store"), sources=[found]))
    return found


def lock(path: Path, commit: str, files: dict[str, bytes] = FILES) -> Path:
    digest = Digest.of(files).text
    path.write_text(LockFile((LockedKernel(RepoId("org", "k"), commit, variants={"torch-cpu": digest}),)).to_text())
    return path


def layer(repository: Repository) -> type[nn.Module]:
    """The layer's class from the CPU's build, also where torch was built for a GPU."""
    return load_layer(repository, "cpu", default_hub()).cls


def test_a_repository_loads_its_layer_for_what_torch_was_built_for(source: MemorySource) -> None:
    assert LayerRepository("org/any", layer_name="Gate", version=1).load()()(torch.zeros(1)) == 1000


def test_each_kind_of_repository_loads_its_layer(
    source: MemorySource, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lockfile = lock(tmp_path / "kernels.lock", source.commit("org/k"))
    x = torch.zeros(1)
    for repository, expected in (
        (LayerRepository("org/k", layer_name="Gate", version=1), 1000),
        (LayerRepository("org/k@main", layer_name="Gate"), 1000),
        (LocalLayerRepository(folder, layer_name="Gate"), 1000),
        (LockedLayerRepository("org/k", lockfile=lockfile, layer_name="Gate"), 1000),
        (FuncRepository("org/k", func_name="no_backward", version=1), 1),
        (LocalFuncRepository(folder / "build" / "torch-cpu", func_name="no_backward"), 1),
        (LockedFuncRepository("org/k", lockfile=lockfile, func_name="no_backward"), 1),
    ):
        cls = layer(repository)
        assert issubclass(cls, nn.Module)
        assert cls()(x) == expected
    monkeypatch.chdir(tmp_path)
    assert layer(LockedLayerRepository("org/k", layer_name="Gate"))()(x) == 1000


def test_a_repository_touches_nothing_before_it_is_loaded(source: MemorySource) -> None:
    repository = LayerRepository("org/k", layer_name="Gate", version=1)
    assert hash(repository) == hash(LayerRepository("org/k", layer_name="Gate", version=1))
    assert repr(repository) + str(repository)
    assert source.asked == []
    layer(repository)
    assert source.asked != []


def test_a_lock_is_checked_when_a_layer_is_loaded(source: MemorySource, tmp_path: Path) -> None:
    """needs 20."""
    other = kernel_files({"__init__.py": INIT, "layers.py": LAYERS + "# changed\n"}, name="sources")
    lockfile = lock(tmp_path / "kernels.lock", source.commit("org/k"), other)
    with pytest.raises(IntegrityError):
        layer(LockedLayerRepository("org/k", lockfile=lockfile, layer_name="Gate"))
    with pytest.raises(KernelNotFound):
        layer(LockedLayerRepository("org/other", lockfile=lockfile, layer_name="Gate"))


def test_trust_is_asked_of_remote_kernels_and_not_of_the_users_folder(source: MemorySource, folder: Path) -> None:
    """needs 2, needs 29."""
    source.trusted = False
    with pytest.raises(UntrustedKernel):
        layer(LayerRepository("org/k", layer_name="Gate", version=1))
    assert layer(LayerRepository("org/k", layer_name="Gate", version=1, trust_remote_code=["org/*"]))
    assert layer(LocalLayerRepository(folder, layer_name="Gate"))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda path: LocalLayerRepository(path, layer_name="Missing"), NoKernelForLayer, "It has Anything"),
        (lambda path: LocalFuncRepository(path, func_name="missing"), NoKernelForLayer, "no function 'missing'"),
        (lambda path: LocalFuncRepository(path, func_name="layers"), NoKernelForLayer, "no function"),
        (lambda path: LocalLayerRepository(path, layer_name="plain_function"), LayerContractError, "FuncRepository"),
    ],
)
def test_a_name_that_the_kernel_does_not_have_is_told(
    make: Callable[[Path], LocalLayerRepository], error: type[Exception], says: str, folder: Path
) -> None:
    with pytest.raises(error, match=says):
        layer(make(folder))


def test_only_modules_are_named_as_layers(folder: Path) -> None:
    assert _classes(SimpleNamespace(Gate=nn.Linear, Tensor=torch.Tensor, number=3)) == ["Gate"]
    assert _classes(None) == []


def test_a_function_says_of_itself_what_its_attributes_say(folder: Path, hub: Hub) -> None:
    rotate = load_layer(LocalFuncRepository(folder, func_name="rotate"), "cpu", hub)
    assert (rotate.can_torch_compile, rotate.has_backward) == (True, True)
    other = load_layer(LocalFuncRepository(folder, func_name="no_backward"), "cpu", hub)
    assert (other.can_torch_compile, other.has_backward) == (False, False)
    assert list(inspect.signature(rotate.forward).parameters) == ["self", "q", "k", "scale"]
    assert rotate.forward.__name__ == "forward"


def test_what_a_layer_does_not_say_is_assumed(folder: Path, hub: Hub) -> None:
    """As published kernels mean it: a backward unless they deny it, torch.compile only where they say so."""
    kernel = load_layer(LocalLayerRepository(folder, layer_name="Forward"), "cpu", hub)
    assert (kernel.has_backward, kernel.can_torch_compile, kernel.takes_dtensor) == (True, False, False)
    assert load_layer(LocalLayerRepository(folder, layer_name="Anything"), "cpu", hub).takes_dtensor
