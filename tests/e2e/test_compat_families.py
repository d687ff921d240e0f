"""The ten families with the distribution named `kernels`: transformers' own decorators are live, and rotary embeddings take part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys
import torch
import kernels
sys.path.insert(0, sys.argv[1])
from test_families import FAMILIES, counts, logits
from kernelhub import kernel_report, unkernelize
from kernelhub.integrations.transformers import kernelize_pretrained

facts = {}
for name, family in FAMILIES.items():
    torch.manual_seed(0)
    model = family.model().eval()
    expected = logits(model, family)
    kernelize_pretrained(model)
    report = kernel_report(model)
    facts[name] = {
        "counts": counts(model),
        "plain": family.kernels,
        "unexplained": [row.path for row in report.rows if row.outcome == "original" and not row.reason],
        "original": sorted({row.layer_name for row in report.rows if row.outcome == "original"}),
        "keeps": sorted(family.keeps),
        "error": (logits(model, family) - expected).abs().max().item(),
        "notes": list(report.notes),
    }
    unkernelize(model)
    facts[name]["undone"] = torch.equal(logits(model, family), expected)
print("FACTS" + json.dumps(facts))
"""

# Rotary embeddings by family: one function a layer, where the family has any.
ROTARIES = {"llama": 2, "qwen3": 2, "gemma": 2, "mistral": 2, "phi3": 2, "gpt-neox": 2}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(ROOT / "compat" / "kernels")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("KERNEL", "HF_", "DISABLE_"))},
        "PYTHONPATH": str(folder / "site"),
        "HF_HUB_OFFLINE": "1",
        "KERNELHUB_CACHE": str(folder / "store"),
        "KERNELHUB_BUILD": "never",
    }
    command = [sys.executable, str(script), str(ROOT / "tests" / "layers")]
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.partition("FACTS")[2])
    return found


def test_every_rotary_embedding_is_swapped_beside_the_rest(facts: dict[str, Any]) -> None:
    assert len(facts) == 10
    for name, fact in facts.items():
        rotary = {"rotary_pos_emb": ROTARIES[name]} if name in ROTARIES else {}
        assert fact["counts"] == {**fact["plain"], **rotary}, name
        assert not any("rotary" in note for note in fact["notes"]), name


def test_no_layer_is_unexplained_and_the_results_are_the_same(facts: dict[str, Any]) -> None:
    for name, fact in facts.items():
        assert fact["unexplained"] == [], name
        assert fact["original"] == fact["keeps"], name
        assert fact["error"] <= 1e-4, name
        assert fact["undone"], name
