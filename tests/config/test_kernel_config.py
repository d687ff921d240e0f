"""KernelConfig: what is checked, what is made of it, and what it does to a model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from kernelfiles import write_kernel
from torch import nn

from kernelhub import (
    KernelConfig,
    LayerRepository,
    LocalLayerRepository,
    LockedLayerRepository,
    Mode,
    kernel_report,
    register_kernel_mapping,
    unkernelize,
    use_kernel_forward_from_hub,
)
from kernelhub.errors import KernelHubWarning

NORM = "kernelhub/norm:RMSNorm"
V1 = LayerRepository("kernelhub/norm", layer_name="RMSNorm", version=1)


def problems(mapping: Any, model: nn.Module, **options: Any) -> list[str]:
    with pytest.raises(ValueError) as caught:
        KernelConfig(mapping, **options).sanitize_kernel_mapping(model)
    return [line.strip() for line in str(caught.value).split("\n")[1:]]


# What is checked


def test_one_error_lists_every_problem_with_its_place_and_the_nearest_name(model: nn.Module) -> None:
    found = problems(
        {
            "RMSnorm": NORM,
            "SiLU": {"cudda": "kernelhub/activation:SiLU", "cpu": ("kernelhub/activation:SiLU", {"versoin": 1})},
            "RMSNorm": ("kernelhub/norm:RMSNorm", {"version": "1", "trust_remote_code": "yes"}),
        },
        model,
    )
    assert found[:6] == [
        "kernel_mapping: no layer of Sequential is registered as 'RMSnorm'; did you mean 'RMSNorm'?",
        "kernel_mapping['SiLU']: 'cudda' is not a device type (cpu, cuda, mps, neuron, npu, rocm, tpu, xpu); did you mean 'cuda'?",
        "kernel_mapping['SiLU']['cpu']: 'versoin' is none of version, revision, trust_remote_code; did you mean 'version'?",
        "kernel_mapping['SiLU']['cpu']: expected exactly one of version and revision, got none",
        "kernel_mapping['RMSNorm']: trust_remote_code must be True or False, got 'yes'",
        "kernel_mapping['RMSNorm']: version must be a whole number such as 1, got '1'",
    ]
    assert found[6].startswith("It has RMSNorm, SiLU. Layers are marked with")


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        ("kernelhub/norm", "names no layer"),
        ("norm:RMSNorm", "does not name a kernel repository"),
        ("kernelhub/norm:", "not the name of a layer"),
        ("/abs/path:RMSNorm", "use_local_kernel=True"),
        (r"C:\kernels\norm:RMSNorm", "use_local_kernel=True"),
        ((NORM, {"version": 1, "revision": "main"}), "exactly one of version and revision, got version 1 and revision main"),
        (("kernelhub/norm@v2:RMSNorm", {"version": 1}), "got @v2 behind the name and version 1"),
        ((NORM, {}), "exactly one of version and revision, got none"),
        ((NORM, {"trust_remote_code": True}), "exactly one of version and revision, got none"),
        ((NORM, {"version": True}), "version must be a whole number"),
        ((NORM, {"version": -1}), "version must be a whole number"),
        ((NORM, {"revision": "a b"}), "is not a revision"),
        ((NORM, {"version": 1, "trust_remote_code": 1}), "must be True or False"),
        ((NORM, {"version": 1, "trust_remote_code": ["org/*"]}), "must be True or False"),
        ((NORM, 1), "expected \"org/repo:Layer\""),
        ((NORM,), "expected \"org/repo:Layer\""),
        (7, "expected \"org/repo:Layer\""),
        ({}, "there is no kernel in it"),
        ({"cpu": 7}, "expected \"org/repo:Layer\""),
        ({"cpu": {"INFERENCE": NORM}}, "is not a Mode; did you mean 'Mode.INFERENCE'?"),
        (LocalLayerRepository("/x", layer_name="RMSNorm"), "expected \"org/repo:Layer\""),
        (LockedLayerRepository("org/norm", layer_name="RMSNorm"), "expected \"org/repo:Layer\""),
    ],
)  # fmt: skip
def test_what_a_value_may_not_be(value: Any, fact: str, model: nn.Module) -> None:
    (found,) = problems({"RMSNorm": value}, model)
    assert found.startswith("kernel_mapping['RMSNorm']")
    assert fact in found
    with pytest.raises(ValueError, match="kernel_mapping"):
        KernelConfig({"RMSNorm": value}).create_compatible_mapping(model)


def test_what_a_mapping_may_not_be(model: nn.Module) -> None:
    assert "expected a dict" in problems([NORM], model)[0]
    assert "is not the name of a layer" in problems({3: NORM}, model)[0]


KEY = (("RMSNorm", "0"), ("Linear", "1"))


@pytest.mark.parametrize(
    ("key", "fact"),
    [
        ((("RMSNorm", "layers.*.norm"), ("Linear", "layers.*.mlp")), "no module is named 'layers.*', the parent of"),
        ((("RMSNorm", "0"), ("Linear", "7")), "the model (Sequential) has no 7"),
        ((("RMSnorm", "0"), ("Linear", "1")), "0 is a Norm, registered as 'RMSNorm', not a 'RMSnorm'"),
        ((("RMSNorm", "a.0"), ("Linear", "b.1")), "the layers have different parents: 'a' and 'b'"),
        ((("RMSNorm", "0"), "1"), "'1' is not a layer's name and a path"),
    ],
)
def test_what_a_key_of_several_layers_may_not_be(key: Any, fact: str, model: nn.Module) -> None:
    (problem,) = problems({key: "org/fused:Both"}, model)
    assert problem.startswith(f"kernel_mapping[{key!r}]: {fact}")


def test_a_parent_is_suggested() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)) for _ in range(2))

    key = (("LayerNorm", "layer.*.0"), ("Linear", "layer.*.1"))
    (problem,) = problems({key: "org/fused:Both"}, Layers())
    assert problem.endswith("; did you mean 'layers.*'?")


def test_a_key_of_several_layers_is_made_like_others(model: nn.Module) -> None:
    config = KernelConfig({KEY: {"cpu": "org/fused:Both", "cuda": "org/other:Both"}, "SiLU": "org/a:SiLU"})
    config.sanitize_kernel_mapping(model)
    made = config.create_compatible_mapping(model)
    assert made[KEY] == {"cpu": {Mode.INFERENCE: LayerRepository("org/fused", layer_name="Both", version=1)}}
    made = config.create_compatible_mapping(model.train())
    assert list(made[KEY]["cpu"]) == [Mode.TRAINING]


def test_several_layers_are_fused_by_a_config(model: nn.Module, tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "fused", code={"__init__.py": "from . import layers", "layers.py": FUSED})
    x = torch.linspace(-1, 1, 16).reshape(2, 8)
    expected = model(x)
    config = KernelConfig({KEY: f"{kernel}:NormLinear"}, use_local_kernel=True, inherit_mapping=False)
    config.apply(model)
    assert [(row.path, row.layer) for row in kernel_report(model).kernels] == [("0", "NormLinear"), ("1", "NormLinear")]
    torch.testing.assert_close(model(x), expected)


FUSED = """
from torch import nn
from torch.nn import functional as F


class NormLinear(nn.Module):
    def forward(self, x):
        return self.linear(self.norm(x))


class NormLinearLayout(nn.Module):
    def __init__(self, norm, linear):
        super().__init__()
        self.norm, self.linear = norm, linear
"""


def test_local_paths_are_absolute_and_exist(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "norm").mkdir()
    KernelConfig({"RMSNorm": f"{tmp_path}/norm:RMSNorm"}, use_local_kernel=True).sanitize_kernel_mapping(model)
    local = {"use_local_kernel": True}
    assert (
        "is not a folder; did you mean 'norm'?" in problems({"RMSNorm": f"{tmp_path}/Nrom:RMSNorm"}, model, **local)[0]
    )
    assert "is not an absolute path" in problems({"RMSNorm": "norm/build:RMSNorm"}, model, **local)[0]
    assert "names no layer" in problems({"RMSNorm": str(tmp_path)}, model, **local)[0]
    assert "/absolute/path:Layer" in problems({"RMSNorm": V1}, model, **local)[0]


def test_a_model_without_marked_layers_is_told_how_to_mark_them() -> None:
    found = problems({"RMSNorm": NORM}, nn.Linear(2, 2))
    assert "It has no kernel-aware layers." in found[-1]
    assert "transformers.mark(model)" in found[-1]


def test_each_kernel_of_a_list_is_checked(model: nn.Module) -> None:
    found = problems({"RMSNorm": [NORM, "norm:RMSNorm", 3], "SiLU": []}, model)
    assert found[0].startswith("kernel_mapping['RMSNorm'][1]: ")
    assert found[1].startswith("kernel_mapping['RMSNorm'][2]: expected ")
    assert found[2].startswith("kernel_mapping['SiLU']: there is no kernel in the list")
    assert len(found) == 3 or found[3].startswith("It has")


# What is made of it


def test_a_list_of_kernels_is_one_registration_in_its_order(model: nn.Module) -> None:
    other = LayerRepository("org/norm", layer_name="RMSNorm", version=2)
    made = KernelConfig({"RMSNorm": [NORM, "org/norm@v2:RMSNorm"]}).create_compatible_mapping(model)
    assert made == {"RMSNorm": {"cpu": {Mode.TRAINING if model.training else Mode.INFERENCE: [V1, other]}}}
    config = KernelConfig({"RMSNorm": [V1, other]})
    config.create_compatible_mapping(model)
    assert config == KernelConfig({"RMSNorm": [V1, other]}), "what was written is kept"


@pytest.mark.parametrize(
    ("value", "repository"),
    [
        (NORM, V1),
        ("org/norm@v2:RMSNorm", LayerRepository("org/norm", layer_name="RMSNorm", version=2)),
        ("org/norm@main:RMSNorm", LayerRepository("org/norm", layer_name="RMSNorm", revision="main")),
        (("org/norm:RMSNorm", {"version": 3}), LayerRepository("org/norm", layer_name="RMSNorm", version=3)),
        (
            ("org/norm:RMSNorm", {"revision": "dev", "trust_remote_code": True}),
            LayerRepository("org/norm", layer_name="RMSNorm", revision="dev", trust_remote_code=True),
        ),
        (
            ("org/norm@v2:RMSNorm", {"trust_remote_code": True}),
            LayerRepository("org/norm", layer_name="RMSNorm", version=2, trust_remote_code=True),
        ),
        ({"cuda": "org/other:Norm", "cpu": NORM}, V1),
        (V1, V1),
    ],
)  # fmt: skip
def test_each_form_becomes_its_repository(value: Any, repository: LayerRepository, model: nn.Module) -> None:
    config = KernelConfig({"RMSNorm": value})
    config.sanitize_kernel_mapping(model)
    made = config.create_compatible_mapping(model)
    assert made == {"RMSNorm": {"cpu": {Mode.INFERENCE: repository}}}
    assert config.kernel_mapping == made


def test_it_starts_from_what_was_written_each_time(model: nn.Module) -> None:
    written = {"RMSNorm": NORM, "SiLU": {"cuda": "org/a:SiLU"}}
    config = KernelConfig(written)
    meta = copy.deepcopy(model)
    assert config.create_compatible_mapping(model) == {"RMSNorm": {"cpu": {Mode.INFERENCE: V1}}}
    assert config.create_compatible_mapping(model.train(), compile=True) == {
        "RMSNorm": {"cpu": {Mode.TRAINING | Mode.TORCH_COMPILE: V1}}
    }
    assert config.to_dict()["kernel_mapping"] == written
    with pytest.raises(ValueError, match="its device cannot be told"):
        config.create_compatible_mapping(meta.to("meta"))
    config.kernel_mapping["RMSNorm"] = "org/other:RMSNorm"
    KernelConfig(written).kernel_mapping["RMSNorm"] = "org/other:RMSNorm"
    assert written == {"RMSNorm": NORM, "SiLU": {"cuda": "org/a:SiLU"}}


def test_what_is_changed_in_the_made_mapping_counts_as_written(model: nn.Module) -> None:
    config = KernelConfig({"RMSNorm": NORM, "SiLU": "org/a:SiLU", "Other": {"cuda": "org/b:Other"}})
    config.create_compatible_mapping(model)
    config.kernel_mapping["RMSNorm"] = "org/norm@v5:RMSNorm"
    del config.kernel_mapping["SiLU"]
    made = config.create_compatible_mapping(model.train())
    other = LayerRepository("org/norm", layer_name="RMSNorm", version=5)
    assert made == {"RMSNorm": {"cpu": {Mode.TRAINING: other}}}
    assert config.to_dict()["kernel_mapping"] == {"RMSNorm": "org/norm@v5:RMSNorm", "Other": {"cuda": "org/b:Other"}}
    config.kernel_mapping = {"SiLU": NORM}
    assert list(config.create_compatible_mapping(model)) == ["SiLU"]


def test_a_drive_letter_is_no_layer(model: nn.Module) -> None:
    config = KernelConfig({"RMSNorm": r"C:\kernels\norm:RMSNorm"}, use_local_kernel=True)
    (repository,) = config.create_compatible_mapping(model)["RMSNorm"]["cpu"].values()
    assert repository == LocalLayerRepository(Path(r"C:\kernels\norm"), layer_name="RMSNorm")


def test_a_kernel_for_other_devices_is_named_where_there_is_none_for_the_layer_s() -> None:
    model = nn.Sequential(use_kernel_forward_from_hub("Elsewhere")(type("Elsewhere", (nn.Linear,), {}))(4, 4)).eval()
    with pytest.warns(KernelHubWarning, match=r"no kernel is registered for Elsewhere on cpu \(only cuda\)$"):
        KernelConfig({"Elsewhere": {"cuda": "org/repo:Layer"}}).apply(model)


def test_update_kernel_adds_devices_and_modes(model: nn.Module) -> None:
    config = KernelConfig()
    for device, mode, options in (
        ("cpu", Mode.INFERENCE, {}),
        ("cpu", Mode.TRAINING, {"version": 2}),
        ("cuda", Mode.INFERENCE, {"revision": "main", "trust_remote_code": True}),
    ):
        config.update_kernel("org/norm", "RMSNorm", "Fast", device, mode, **options)

    def of(**options: Any) -> LayerRepository:
        return LayerRepository("org/norm", layer_name="Fast", **options)

    cpu = {Mode.INFERENCE: of(version=1), Mode.TRAINING: of(version=2)}
    cuda = {Mode.INFERENCE: of(revision="main", trust_remote_code=True)}
    assert config.kernel_mapping == {"RMSNorm": {"cpu": cpu, "cuda": cuda}}
    config.sanitize_kernel_mapping(model)
    assert config.create_compatible_mapping(model) == {"RMSNorm": {"cpu": cpu}}
    config.update_kernel("org/norm@v9", "RMSNorm", "Fast", "cpu", Mode.TRAINING)
    assert config.kernel_mapping["RMSNorm"]["cpu"][Mode.TRAINING] == LayerRepository("org/norm@v9", layer_name="Fast")
    assert "cuda" in config.to_dict()["kernel_mapping"]["RMSNorm"]
    for bad in ({"device": "gpu", "mode": Mode.INFERENCE}, {"device": "cpu", "mode": "INFERENCE"}):
        with pytest.raises(ValueError):
            config.update_kernel("org/norm", "RMSNorm", "Fast", **bad)


def test_registered_names_are_those_of_modules_and_functions(model: nn.Module) -> None:
    config = KernelConfig()
    config.store_registered_layer_names(model)
    assert config.registered_layer_names == {"0": "RMSNorm", "2": "SiLU"}
    config.store_registered_layer_names(nn.Linear(2, 2))
    assert config.registered_layer_names == {}


# What it does


def test_apply_does_all_of_it_and_is_undone(model: nn.Module) -> None:
    x = torch.randn(4, 8)
    expected = model(x)
    config = KernelConfig({"RMSNorm": NORM, "SiLU": {"cpu": "kernelhub/activation@v1:SiLU"}})
    assert config.apply(model) is model
    assert [row.path for row in kernel_report(model).kernels] == ["0", "2"]
    torch.testing.assert_close(model(x), expected)
    config.apply(model.train(), include="0")
    (row,) = kernel_report(model).kernels
    assert (row.path, row.mode) == ("0", "TRAINING")
    config.apply(unkernelize(model), mode=Mode.INFERENCE, compile=True)
    assert {row.mode for row in kernel_report(model).kernels} == {"INFERENCE|TORCH_COMPILE"}


def test_apply_changes_nothing_where_something_is_wrong(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="did you mean 'SiLU'"):
        KernelConfig({"RMSNorm": NORM, "Silu": NORM}).apply(model)
    with pytest.raises(ValueError, match="FALLBACK"):
        KernelConfig({"RMSNorm": NORM}).apply(model, mode=Mode.FALLBACK)
    assert not kernel_report(model).kernels


def test_inherit_mapping_says_whether_other_registrations_count(model: nn.Module) -> None:
    register_kernel_mapping({"SiLU": {"cpu": LayerRepository("kernelhub/activation", layer_name="SiLU", version=1)}})
    KernelConfig({"RMSNorm": NORM}).apply(model)
    assert len(kernel_report(model).kernels) == 2
    KernelConfig({"RMSNorm": NORM}, inherit_mapping=False).apply(model)
    assert [row.path for row in kernel_report(model).kernels] == ["0"]


def test_a_local_kernel_is_applied(model: nn.Module, tmp_path: Path) -> None:
    from kernelfiles import write_kernel

    layers = "import torch\n\nclass SiLU(torch.nn.Module):\n    def forward(self, x):\n        return x * 0 + 7\n"
    folder = write_kernel(tmp_path / "local", code={"__init__.py": "from . import layers\n", "layers.py": layers})
    KernelConfig({"SiLU": f"{folder}:SiLU"}, use_local_kernel=True).apply(model)
    assert torch.equal(model(torch.randn(2, 8)), torch.full((2, 8), 7.0))


def test_configs_copy_and_pickle(model: nn.Module) -> None:
    config = KernelConfig({"RMSNorm": (NORM, {"version": 1})}, inherit_mapping=False)
    config.create_compatible_mapping(model)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert other.kernel_mapping == config.kernel_mapping
    assert config != KernelConfig({"RMSNorm": (NORM, {"version": 2})}, inherit_mapping=False)
    assert config != KernelConfig({"RMSNorm": (NORM, {"version": 1})})
    assert repr(config).startswith("KernelConfig({'RMSNorm': (")
