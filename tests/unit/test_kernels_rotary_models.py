"""kernelhub/rotary in transformers' models: marked by transformers itself, where the distribution named `kernels` is ours.

transformers looks for that distribution once, when it is imported, so all of it happens in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernelprojects import load_compiled

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys
from pathlib import Path

import torch
import test_families as families
from transformers import NanoChatConfig, NanoChatForCausalLM, Olmo2Config, Olmo2ForCausalLM

from kernelhub import Mode, kernel_report, kernelize, register_kernel_mapping, unkernelize, use_kernel_mapping
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.integrations.transformers import default_mapping, kernelize_pretrained
from kernelhub.settings import Settings

others = {
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**families.DECODER)),
    "nanochat": lambda: NanoChatForCausalLM(NanoChatConfig(**families.DECODER)),
}
known = {name: families.FAMILIES[name].model for name in ("llama", "qwen3", "gemma", "mistral", "phi3", "gpt-neox")}
made = {**known, **others}
rotary = {"rotary_pos_emb": default_mapping()["rotary_pos_emb"]}


def output(model):
    with torch.no_grad():
        return model(**families.TEXT)[0]


def gradients(model):
    model.zero_grad()
    found = model.train()(**families.TEXT)[0]
    (found * torch.linspace(-1, 1, found.numel()).reshape(found.shape)).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def close(found, expected):
    return all(bool((a - b).abs().max() <= 1e-5 * b.abs().max()) for a, b in zip(found, expected, strict=True))


def rows(model, mode):
    with use_kernel_mapping(rotary, inherit_mapping=False):
        kernelize(model, mode=mode)
    return sum(row.layer_name == "rotary_pos_emb" for row in kernel_report(model).kernels)


facts = {"families": {name: families.FAMILIES[name].kernels for name in known}}
for name, make in made.items():
    torch.manual_seed(0)
    model, facts[name] = make().eval(), {}
    fact = facts[name]
    aware = "rotary_pos_emb" in str([vars(module).get("_kernel_funcs", {}).keys() for module in model.modules()])
    if not aware:
        continue
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        expected = output(model)
        fact[f"inference {dtype}"] = rows(model, Mode.INFERENCE)
        fact[f"equal {dtype}"] = torch.equal(output(model), expected)
        unkernelize(model)
        fact[f"undone {dtype}"] = torch.equal(output(model), expected)
    model.float()
    expected = gradients(model)
    fact["training"] = rows(model, Mode.TRAINING)
    fact["close gradients"] = close(gradients(model), expected)
    unkernelize(model)

torch.manual_seed(0)
model = made["llama"]().eval()
with use_kernel_mapping(rotary, inherit_mapping=False):
    kernelize(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
facts["compiled rows"] = len(kernel_report(model).kernels)
graphs = []
def backend(graph, arguments):
    graphs.append(str(graph.graph))
    return graph
compiled = torch.compile(model, backend=backend)
facts["equal compiled"] = torch.equal(output(compiled), output(model))
facts["op in graphs"] = sum("rotate" in graph for graph in graphs), len(graphs)

# The whole mapping, without compilers
set_default_hub(Hub(settings=Settings(cache=Path(sys.argv[1]), offline=True, build="never")))
for name, make in known.items():
    model = make().eval()
    expected = output(model)
    kernelize_pretrained(model)
    facts[name]["all"] = families.counts(model)
    facts[name]["close"] = torch.allclose(output(model), expected, rtol=0, atol=1e-4)
    unkernelize(model)
register_kernel_mapping(default_mapping())
model = made["llama"]().eval()
model.set_use_kernels(True)
facts["use_kernels"] = families.counts(model)
print("FACTS" + json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script saw. It uses the build that the other tests of this kernel use."""
    folder = tmp_path_factory.mktemp("rotary")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder / "installed"), str(ROOT / "compat" / "kernels")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    load_compiled("rotary", request.config, "cpu")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("KERNEL", "HF_", "DISABLE_"))},
        "PYTHONPATH": os.pathsep.join((str(folder / "installed"), str(ROOT / "tests" / "layers"))),
        "HF_HUB_OFFLINE": "1",
        "KERNELHUB_CACHE": str(request.config.cache.mkdir("kernels")),
        "KERNELHUB_BUILD": "always",
    }
    command = [sys.executable, str(script), str(folder / "store")]
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.partition("FACTS")[2])
    return found


SWAPPED = ("llama", "qwen3", "gemma", "mistral", "olmo2", "nanochat")


@pytest.mark.parametrize("name", SWAPPED)
def test_each_models_rotary_embeddings_run_the_compiled_kernel_with_the_same_bits(
    facts: dict[str, Any], name: str
) -> None:
    """needs 7: numerics drift."""
    assert facts[name] | {"all": None, "close": None} == {
        **{f"inference torch.{dtype}": 2 for dtype in ("float32", "bfloat16")},
        **{f"equal torch.{dtype}": True for dtype in ("float32", "bfloat16")},
        **{f"undone torch.{dtype}": True for dtype in ("float32", "bfloat16")},
        "training": 2,
        "close gradients": True,
        "all": None,
        "close": None,
    }


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "mistral", "phi3", "gpt-neox"])
def test_the_default_mapping_swaps_them_beside_norms_and_activations(facts: dict[str, Any], name: str) -> None:
    """As many as without the distribution; `mark` names the functions of the last two."""
    assert facts[name]["all"] == facts["families"][name]
    assert facts[name]["close"]


def test_use_kernels_swaps_them_with_the_default_mapping_registered(facts: dict[str, Any]) -> None:
    assert facts["use_kernels"] == facts["families"]["llama"]


def test_a_compiled_model_has_the_op_in_its_graph(facts: dict[str, Any]) -> None:
    assert facts["compiled rows"] == 2
    assert facts["equal compiled"]
    assert facts["op in graphs"] == [1, 1]
