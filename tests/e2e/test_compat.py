"""The distribution named `kernels`: installed, it lets unmodified transformers run on kernelhub.

transformers looks for that package once, when it is imported, so all of it happens in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from kernelfiles import write_kernel

from kernelhub.core.refs import RepoId
from kernelhub.hub.publish import publish

ROOT = Path(__file__).resolve().parents[2]

KERNEL = """
from torch.nn import functional as F
from . import layers

calls = []

def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    calls.append(attention_mask)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, scale=scaling)
    return output.transpose(1, 2).contiguous(), None

flash_attn_forward = attention  # transformers 5.22 refuses a kernel that has none of the names it knows

def rotate(q, k, cos, sin, unsqueeze_dim=1):
    calls.append("rotate")
    def turned(x):
        half = x.shape[-1] // 2
        return layers.torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin
"""

SCRIPT = """
import json, sys, warnings
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import kernels
import kernelhub
from kernelhub import (FuncRepository, KernelConfig, get_kernel, kernel_report, register_kernel_mapping, unkernelize)
from kernelhub.integrations.transformers import default_mapping, mark

facts, folder = {}, sys.argv[1]
facts["version"] = kernels.__version__
facts["same"] = [name for name in kernels.__all__ if getattr(kernels, name) is not getattr(kernelhub, name)]
facts["kernels modules"] = sorted(name for name in sys.modules if name.partition(".")[0] == "kernels")

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)
LlamaForCausalLM(config).save_pretrained(folder)
ids = torch.arange(10)[None]
before = LlamaForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    expected = before(ids).logits

def distance(model):
    with torch.no_grad():
        return float((model(ids).logits - expected).abs().max())

def run(model):
    return {row.path: (row.layer_name, row.outcome, row.mode, row.reason) for row in kernel_report(model).rows}

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = LlamaForCausalLM.from_pretrained(folder, use_kernels=True).eval()
facts["default"] = run(model)
facts["default warns"] = [str(warning.message) for warning in caught if "runs no kernel" in str(warning.message)]
facts["default distance"] = distance(model)

attention = get_kernel("test/attention", version=1)
register_kernel_mapping({**default_mapping(),
    "rotary_pos_emb": {"cpu": FuncRepository("test/attention", func_name="rotate", version=1)}})
model.set_use_kernels(True)
facts["cpu"], facts["cpu distance"] = run(model), distance(model)
facts["rotated"] = attention.calls.count("rotate")
model.train()
facts["train"] = run(model)
model(ids, labels=ids).loss.backward()
facts["gradients"] = all(parameter.grad is not None for parameter in model.parameters())
model.eval()
facts["eval"] = run(model)
unkernelize(model)
facts["undone"], facts["use_kernels"] = run(model), model.use_kernels
facts["undone train"], facts["undone distance"] = run(model.train()), distance(model.eval())
mark(model)
KernelConfig({"RMSNorm": "kernelhub/norm:RMSNorm"}, inherit_mapping=False).apply(model)
facts["config"] = run(model)

attention.calls.clear()
model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="test/attention:attention").eval()
facts["attention distance"], facts["attended"] = distance(model), len(attention.calls)
facts["tokens"] = [one.generate(ids, max_new_tokens=5, do_sample=False).tolist() for one in (before, model)]

mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mamba.set_use_kernels(True)
facts["mamba"] = run(mamba)
print("FACTS" + json.dumps(facts))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder), str(ROOT / "compat" / "kernels")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(scope="module")
def facts(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script saw."""
    folder = tmp_path_factory.mktemp("compat")
    kernel = write_kernel(folder / "kernel", code={"__init__.py": KERNEL, "layers.py": "import torch\n"})
    publish(kernel, str(folder / "hub"), RepoId.parse("test/attention"), epoch=0)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("KERNEL", "HF_", "DISABLE_"))},
        "PYTHONPATH": str(installed),
        "HF_HUB_OFFLINE": "1",
        "KERNELHUB_HUBS": str(folder / "hub"),
        "KERNELHUB_CACHE": str(folder / "store"),
        "KERNELHUB_BUILD": "never",
    }
    command = [sys.executable, str(script), str(folder / "model")]
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.partition("FACTS")[2])
    return found


NORMS = {"model.norm"} | {
    f"model.layers.{index}.{name}" for index in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")
}
ACTIVATIONS = {f"model.layers.{index}.mlp.act_fn" for index in (0, 1)}
ROTARIES = {f"model.layers.{index}.self_attn.rotary_pos_emb" for index in (0, 1)}


def swapped(rows: dict[str, list[str]], mode: str | None = None) -> set[str]:
    return {path for path, row in rows.items() if row[1] == "kernel" and mode in (None, row[2])}


def test_every_name_is_kernelhubs(facts: dict[str, Any]) -> None:
    assert facts["version"] == "0.17.2+kernelhub"
    assert facts["same"] == ["kernelize"], "which decides on each rank alone"


def test_the_modules_have_what_the_top_has(installed: Path) -> None:
    code = """
import kernels, kernels.benchmark, kernels.layer, kernels.layer.mode
for module in (kernels.benchmark, kernels.layer, kernels.layer.mode):
    for name in module.__all__:
        assert getattr(module, name) is getattr(kernels, name), name
assert {"Mode", "get_kernel", "kernelize"} <= set(dir(kernels))
import inspect
assert inspect.signature(kernels.kernelize).parameters["group"].default is False
try:
    kernels.nothing
except AttributeError as error:
    print(error)
"""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'nothing'" in done.stdout


def test_importing_it_imports_no_torch(installed: Path) -> None:
    code = "import sys, kernels; print('torch' in sys.modules, kernels.__version__)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False 0.17.2+kernelhub"


def test_the_default_mapping_falls_back_and_says_so(facts: dict[str, Any]) -> None:
    """transformers' own mapping has nothing for a CPU."""
    assert set(facts["default"]) == NORMS | ACTIVATIONS | ROTARIES
    assert swapped(facts["default"]) == set()
    assert all("no kernel is registered" in row[3] for row in facts["default"].values())
    assert facts["default warns"]
    assert facts["default distance"] == 0


def test_kernels_registered_for_the_cpu_run(facts: dict[str, Any]) -> None:
    assert swapped(facts["cpu"], "INFERENCE") == NORMS | ACTIVATIONS | ROTARIES
    assert facts["cpu distance"] < 1e-4
    assert facts["rotated"] == 2


def test_train_and_eval_kernelize_again(facts: dict[str, Any]) -> None:
    assert swapped(facts["train"], "TRAINING") == NORMS | ACTIVATIONS | ROTARIES
    assert facts["gradients"]
    assert swapped(facts["eval"], "INFERENCE") == NORMS | ACTIVATIONS | ROTARIES


def test_unkernelize_undoes_it_for_good(facts: dict[str, Any]) -> None:
    """needs 17: transformers itself has no way back."""
    assert swapped(facts["undone"]) == swapped(facts["undone train"]) == set()
    assert facts["use_kernels"] is False
    assert facts["undone distance"] == 0


def test_a_kernel_config_of_ours_applies(facts: dict[str, Any]) -> None:
    assert swapped(facts["config"]) == NORMS


def test_attention_by_repository_name(facts: dict[str, Any]) -> None:
    assert facts["attended"] == 2
    assert facts["attention distance"] < 1e-4
    assert facts["tokens"][0] == facts["tokens"][1]


def test_functions_with_a_fallback_are_seen(facts: dict[str, Any]) -> None:
    names = {row[0] for row in facts["mamba"].values()}
    assert {"causal_conv1d_fn", "causal_conv1d_update"} <= names
    assert all(row[3] for row in facts["mamba"].values() if row[1] == "original")


def test_installing_it_over_the_real_one_says_so_and_leaves_nothing_of_that(tmp_path: Path) -> None:
    """A wheel of the name and version of the Hugging Face package stands in for it."""
    real = tmp_path / "kernels-0.17.2-py3-none-any.whl"
    with zipfile.ZipFile(real, "w") as wheel:
        folder = "kernels-0.17.2.dist-info"
        wheel.writestr("kernels/__init__.py", "")
        wheel.writestr("kernels/of_the_real_one.py", "")
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
        wheel.writestr(
            f"{folder}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        names = ["kernels/__init__.py", "kernels/of_the_real_one.py", f"{folder}/METADATA", f"{folder}/WHEEL"]
        wheel.writestr(f"{folder}/RECORD", "".join(f"{name},,\n" for name in [*names, f"{folder}/RECORD"]))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    made = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run([*made, str(ROOT / "compat" / "kernels")], check=True, capture_output=True, text=True)
    (ours,) = tmp_path.glob("kernels-0.17.2+kernelhub-*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    said = ""
    for wheel in (real, ours):
        into = [*pip, "--python", str(tmp_path / "env"), "install", "--no-deps", "--no-index", str(wheel)]
        said = subprocess.run(into, check=True, capture_output=True, text=True).stdout
    assert "Found existing installation: kernels 0.17.2" in said
    assert "Successfully installed kernels-0.17.2+kernelhub" in said
    assert [path.name for path in (tmp_path / "env").rglob("*.dist-info")] == ["kernels-0.17.2+kernelhub.dist-info"]
    assert not list((tmp_path / "env").rglob("of_the_real_one.py"))
