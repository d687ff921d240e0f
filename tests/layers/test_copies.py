"""Copies and files of kernelized models: kernelized where the kernel is here, clean originals elsewhere, never a mix."""

from __future__ import annotations

import copy
import io
import logging
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import models_for_tests as models
import pytest
import torch
from kernelfiles import MemorySource, kernel_files
from kernels_for_tests import INIT, LAYERS, write_kernel
from torch import nn

from kernelhub import Mode, kernel_report, kernelize, register_kernel_mapping, unkernelize
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.layers.mapping import use_kernel_mapping
from kernelhub.layers.repositories import LayerRepository, LocalFuncRepository, LocalLayerRepository, Repository
from kernelhub.settings import Settings

pytestmark = [pytest.mark.usefixtures("hub"), pytest.mark.filterwarnings("ignore::kernelhub.errors.KernelHubWarning")]


def outcomes(model: nn.Module) -> list[str]:
    return [row.outcome for row in kernel_report(model).rows]


def bound_to_themselves(model: nn.Module) -> bool:
    """Whether every forward on an instance is bound to that instance."""
    forwards = [(module, module.__dict__["forward"]) for module in model.modules() if "forward" in module.__dict__]
    return all(forward.__self__ is module for module, forward in forwards)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


COPIES: list[Callable[[nn.Module], nn.Module]] = [copy.deepcopy, pickled, saved]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("make", COPIES)
def test_a_copy_is_kernelized_and_bound_to_itself(make: Callable[[nn.Module], nn.Module]) -> None:
    model, x = models.Model(), torch.randn(2, 8)
    plain = model(x)
    kernelize(model, mode=Mode.INFERENCE)
    twin = make(model)
    assert outcomes(twin) == outcomes(model) == ["kernel"] * 5
    assert bound_to_themselves(twin)
    assert bound_to_themselves(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin.norm.weight.mul_(2)
    assert torch.equal(twin(x), model(x) * 2), "the copy's kernels read the copy's weights"
    with torch.no_grad():
        twin.norm.weight.div_(2)
    unkernelize(twin)
    assert torch.equal(twin(x), plain)
    assert all("forward" not in module.__dict__ for module in twin.modules())
    assert outcomes(model) == ["kernel"] * 5


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("make", COPIES)
def test_a_copy_of_a_copy_and_of_a_part_is_kernelized(make: Callable[[nn.Module], nn.Module]) -> None:
    model = kernelize(models.Model(), mode=Mode.INFERENCE)
    twin = make(make(model).layers[0])
    assert outcomes(twin) == ["kernel"] * 2
    assert bound_to_themselves(twin)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("make", COPIES)
def test_what_is_no_longer_in_effect_is_not_brought_back(make: Callable[[nn.Module], nn.Module]) -> None:
    """Other libraries undo kernels by taking the forward away; a copy must not put it back."""
    model = kernelize(models.Model(), mode=Mode.INFERENCE)
    del model.norm.__dict__["forward"]
    twin = make(model)
    assert outcomes(twin) == outcomes(model) == ["kernel"] * 4 + ["original"]
    assert twin.norm.forward.__func__ is models.Norm.forward


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("make", COPIES)
def test_a_forward_that_stood_on_the_instance_before_does_not_hide_the_kernel(
    make: Callable[[nn.Module], nn.Module],
) -> None:
    """What accelerate leaves behind lies in the dict before the marker, and is read before it unless it is moved."""
    model, x = models.Norm(), torch.randn(2, 8)
    model.forward = model.forward
    kernelize(model, mode=Mode.INFERENCE)
    twin = make(model)
    assert outcomes(twin) == ["kernel"]
    assert torch.equal(twin(x), model(x))
    unkernelize(twin)
    assert twin.__dict__["forward"].__func__ is models.Norm.forward
    assert bound_to_themselves(twin)


@pytest.mark.usefixtures("registered")
def test_a_shallow_copy_is_told_apart_and_put_right_by_kernelizing_again() -> None:
    model = kernelize(models.Norm(), mode=Mode.INFERENCE)
    twin = copy.copy(model)
    assert "bound to the module that it was copied from" in kernel_report(twin).rows[0].reason
    kernelize(twin, mode=Mode.INFERENCE)
    assert bound_to_themselves(twin)
    assert bound_to_themselves(model)


@pytest.mark.usefixtures("registered")
def test_what_data_parallel_copies_calls_the_original_and_after_unkernelize_itself() -> None:
    """As docs/layers.md says."""
    model = kernelize(models.Norm(), mode=Mode.INFERENCE)
    assert model._replicate_for_data_parallel().forward.__self__ is model
    unkernelize(model)
    twin = model._replicate_for_data_parallel()
    assert twin.forward.__self__ is twin


@pytest.mark.parametrize("name", ["Misnamed", "Forward"])
def test_functions_of_any_name_and_func_repositories_come_back(name: str, folder: Path) -> None:
    for repository in (
        LocalLayerRepository(folder, layer_name=name),
        LocalFuncRepository(folder, func_name="no_backward"),
    ):
        with use_kernel_mapping({"Gate": {"cpu": repository}}):
            model = kernelize(models.Gate(), mode=Mode.INFERENCE, device="cpu")
        twin = pickled(model)
        assert torch.equal(twin(torch.zeros(1)), model(torch.zeros(1)))
        assert outcomes(twin) == ["kernel"]


# From the store, by name


@pytest.fixture
def named(tmp_path: Path) -> tuple[MemorySource, nn.Module]:
    """A hub with a kernel by name that the caller trusts, and a model kernelized with it."""
    files = kernel_files({"__init__.py": INIT, "layers.py": LAYERS}, name="named")
    source = MemorySource({"org/named": {"torch-cpu": files}}, trusted=False)
    set_default_hub(Hub(Settings(cache=tmp_path / "store", trust=("org/named",)), sources=[source]))
    with use_kernel_mapping({"Gate": {"cpu": LayerRepository("org/named", layer_name="Gate", version=1)}}):
        model = kernelize(nn.Sequential(models.Gate(), nn.Linear(1, 1)), mode=Mode.INFERENCE)
    source.asked.clear()
    return source, model


def use_hub(tmp_path: Path, source: MemorySource, **settings: object) -> None:
    set_default_hub(Hub(Settings(cache=tmp_path / "store", **settings), sources=[source]))  # type: ignore[arg-type]


def test_a_model_from_a_file_asks_no_hub(named: tuple[MemorySource, nn.Module], tmp_path: Path) -> None:
    """needs 4, needs 8."""
    source, model = named
    use_hub(tmp_path, source, trust=("org/named",))
    twin = pickled(model)
    assert outcomes(twin) == ["kernel"]
    assert kernel_report(twin).rows[0].commit == source.commit("org/named")
    assert source.asked == []


def test_a_model_from_a_file_is_original_where_the_policy_does_not_trust_its_kernel(
    named: tuple[MemorySource, nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """needs 2: a file grants nothing."""
    source, model = named
    use_hub(tmp_path, source)
    twin = pickled(model)
    assert outcomes(twin) == ["original"]
    assert "published by 'org'" in kernel_report(twin).rows[0].reason
    assert twin[0](torch.zeros(1)) == 0
    assert "runs without it" in caplog.text
    assert source.asked == []


def test_a_model_from_a_file_is_a_clean_original_where_the_kernel_is_not_in_the_store(
    named: tuple[MemorySource, nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, model = named
    file = pickle.dumps(nn.ModuleList([model, copy.deepcopy(model)]))
    set_default_hub(Hub(Settings(cache=tmp_path / "empty", trust=("org/named",)), sources=[source]))
    with caplog.at_level(logging.WARNING, "kernelhub"):
        twin = pickle.loads(file)
    assert source.asked == []
    assert len(caplog.records) == 1, "a kernel that is not here is looked for, and told of, once"
    assert outcomes(twin) == ["original"] * 2
    assert "could not be read back" in kernel_report(twin).rows[0].reason
    assert bound_to_themselves(twin)
    assert twin[0][0](torch.zeros(1)) == 0
    again = pickled(twin)
    assert outcomes(again) == ["original"] * 2
    unkernelize(twin)
    assert twin[0][0].__dict__.keys() == models.Gate().__dict__.keys()
    use_hub(tmp_path, source, trust=("org/named",))
    assert outcomes(pickle.loads(file)) == ["kernel"] * 2


def test_kernels_that_are_switched_off_do_not_come_back_from_files(
    named: tuple[MemorySource, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """needs 15."""
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    assert outcomes(pickled(named[1])) == ["original"]


def test_a_folder_that_changed_since_does_not_come_back(tmp_path: Path) -> None:
    folder = write_kernel(tmp_path / "local", name="local")
    register_kernel_mapping({"Gate": {"cpu": LocalLayerRepository(folder, layer_name="Gate")}})
    model = kernelize(models.Gate(), mode=Mode.INFERENCE, device="cpu")
    file = pickle.dumps(model)
    assert outcomes(pickle.loads(file)) == ["kernel"]
    write_kernel(folder, name="local", layers=LAYERS.replace("x + 1000", "x + 2000"))
    twin = pickle.loads(file)
    assert twin(torch.zeros(1)) == 0
    assert "is not what the model was kernelized with" in kernel_report(twin).rows[0].reason
    shutil.rmtree(folder)
    assert outcomes(pickle.loads(file)) == ["original"]


# Functions


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_has_a_stake_of_its_own_in_its_functions(
    make: Callable[[nn.Module], nn.Module], kernel: Callable[[str], Repository]
) -> None:
    register_kernel_mapping({"rotary": {"cpu": kernel("Rotary")}})
    model, x = models.Attention(), torch.zeros(1, 8)
    plain = model(x)
    twin = make(kernelize(model, mode=Mode.INFERENCE))
    assert outcomes(twin) == ["kernel"]
    unkernelize(model)
    assert outcomes(twin) == ["kernel"]
    assert torch.allclose(twin(x), plain + 400)
    unkernelize(twin)
    assert torch.equal(twin(x), plain)
    assert outcomes(model) == ["original"]


def test_a_functions_kernel_comes_back_with_the_model(kernel: Callable[[str], Repository]) -> None:
    register_kernel_mapping({"rotary": {"cpu": kernel("Rotary")}})
    model, x = kernelize(models.Attention(), mode=Mode.INFERENCE), torch.zeros(1, 8)
    expected, file = model(x), pickle.dumps(model)
    unkernelize(model)
    twin = pickle.loads(file)
    assert torch.equal(twin(x), expected)
    unkernelize(twin)
    assert "forward" not in models.rotate.__dict__


# Another process


def look(model: nn.Module, x: torch.Tensor, answers: multiprocessing.Queue) -> None:
    """What a spawned process sees of a model that was sent to it."""
    try:
        report = kernel_report(model)
        answers.put((report.to_dict(), model(x).detach().numpy(), bound_to_themselves(model), pickle.dumps(model)))
    except BaseException as error:
        answers.put(repr(error))


def test_a_spawned_process_gets_a_kernelized_model(
    kernel: Callable[[str], Repository], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Local kernels, kernels by name that an override serves, and functions; and back again as a pickle."""
    monkeypatch.setenv("KERNELHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCAL_KERNELS", f"org/named={folder}")
    set_default_hub(None)
    register_kernel_mapping(
        {
            "RMSNorm": {"cpu": kernel("RMSNorm")},
            "Gate": {"cpu": LayerRepository("org/named", layer_name="Gate", version=1)},
            "rotary": {"cpu": kernel("Rotary")},
        }
    )
    model = kernelize(nn.Sequential(models.Model(), models.Attention()), mode=Mode.INFERENCE)
    x = torch.randn(2, 8)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=look, args=(model, x, answers))
    process.start()
    answer = answers.get(timeout=120)
    process.join(60)
    assert not isinstance(answer, str), answer
    report, output, bound, file = answer
    assert report == kernel_report(model).to_dict()
    assert {row["outcome"] for row in report["rows"]} == {"kernel"}
    assert bound
    assert (output == model(x).detach().numpy()).all()
    back = pickle.loads(file)
    assert outcomes(back) == outcomes(model)
    unkernelize(model)
    unkernelize(back)
