"""transformers' own KernelConfig, which refuses the CPU, with the distribution named `kernels` in place. Skipped without a GPU.

transformers looks for that package once, when it is imported, so all of it happens in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]

SCRIPT = """
import json, sys
import torch
from transformers import KernelConfig, LlamaConfig, LlamaForCausalLM

from kernelhub import kernel_report, unkernelize

folder = sys.argv[1]
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
ids = torch.arange(20, device="cuda").reshape(2, 10)
with torch.no_grad():
    expected = LlamaForCausalLM.from_pretrained(folder).cuda().eval()(ids).logits
    config = KernelConfig({"RMSNorm": "kernelhub/norm:RMSNorm"}, inherit_mapping=False)
    model = LlamaForCausalLM.from_pretrained(folder, use_kernels=True, kernel_config=config, device_map="cuda").eval()
    found = model(ids).logits
    rows = [[row.path, row.layer, row.outcome, row.device] for row in kernel_report(model).rows]
    unkernelize(model)
    again = model(ids).logits
print(json.dumps({
    "rows": rows,
    "error": (found - expected).abs().max().item(),
    "undone": torch.equal(again, expected),
    "left": len(kernel_report(model).kernels),
}))
"""


def test_its_kernel_config_runs_kernels_of_this_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(tmp_path / "site"), str(ROOT / "compat" / "kernels")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    environment = {
        **os.environ,
        # What the tests run with comes after: transformers may lie in a folder of its own.
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT / "src"), *filter(None, sys.path)]),
        "KERNELHUB_CACHE": str(tmp_path / "store"),
        "KERNELHUB_BUILD": "never",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    ran = [row for row in facts["rows"] if row[2] == "kernel"]
    assert {row[1] for row in ran} == {"RMSNorm"}
    assert len(ran) == 5
    assert {row[3] for row in ran} == {"cuda:0"}
    assert facts["error"] <= 1e-4
    assert facts["undone"]
    assert facts["left"] == 0
