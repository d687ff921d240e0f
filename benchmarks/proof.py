"""How long proving a model's swaps takes: the first time, and when it was done before; and how much memory it needs.

    python benchmarks/proof.py [--layers 16] [--hidden 512] [--tokens 128] [--json]

A Llama with random weights and the kernels that come with this package, `verify` and `only_if_faster`. The first run measures,
the second (in a process of its own) finds what the first one remembered. Memory is the peak of a process that proves the
model's swaps over that of a process that only runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

GOALS = {"first": 30.0, "second": 1.0, "memory": 1.3}


def model_of(layers: int, hidden: int, tokens: int) -> tuple[Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval(), torch.randint(4096, (1, tokens))


def peak() -> int:
    """The most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(what: str, layers: int, hidden: int, tokens: int) -> dict[str, Any]:
    """One process: `run` the model, or `prove` its swaps."""
    import torch

    import kernelhub
    from kernelhub.integrations.transformers import default_mapping, mark

    model, ids = model_of(layers, hidden, tokens)
    mark(model)
    with torch.no_grad():
        model(ids)
    if what == "run":
        return {"peak": peak()}
    with kernelhub.use_kernel_mapping(default_mapping(), inherit_mapping=False):
        kernelhub.kernelize(model, mode=kernelhub.Mode.INFERENCE)  # the kernels are here and imported from now on
        kernelhub.unkernelize(model)
        start = time.perf_counter()
        kernelhub.kernelize(model, mode=kernelhub.Mode.INFERENCE, sample_inputs=ids, verify=True, only_if_faster=True)
        seconds = time.perf_counter() - start
    rows = kernelhub.kernel_report(model).rows
    return {
        "seconds": seconds,
        "peak": peak(),
        "rows": len(rows),
        "kernels": sum(row.outcome == "kernel" for row in rows),
        "remembered": sum(row.remembered is not None for row in rows),
        "not remembered": sorted({f"{row.class_name}: {row.reason}" for row in rows if row.remembered is None}),
    }


def measure(layers: int, hidden: int, tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KERNEL")}
        environment = {**inherited, "KERNELHUB_CACHE": folder}

        def run(what: str) -> dict[str, Any]:
            command = [sys.executable, __file__, "--child", what, "--layers", str(layers)]
            command += ["--hidden", str(hidden), "--tokens", str(tokens)]
            made = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
            return found

        alone, first, second = run("run"), run("prove"), run("prove")
    return {
        "layers": layers,
        "hidden": hidden,
        "tokens": tokens,
        "first": first["seconds"],
        "second": second["seconds"],
        "memory": second["peak"] / alone["peak"],
        "memory_first": first["peak"] / alone["peak"],
        "rows": first["rows"],
        "kernels": first["kernels"],
        "remembered": second["remembered"],
        "not remembered": second["not remembered"],
    }


def show(found: dict[str, Any]) -> None:
    print(f"a Llama of {found['layers']} layers, hidden {found['hidden']}, {found['tokens']} tokens")
    print(f"{found['rows']} kernel-aware layers, {found['kernels']} run a kernel, {found['remembered']} remembered")
    for reason in found["not remembered"]:
        print(f"    not remembered: {reason}")
    print(f"first  {found['first']:6.2f} s   (goal {GOALS['first']:g})")
    print(f"second {found['second']:6.2f} s   (goal {GOALS['second']:g})")
    print(
        f"memory {found['memory_first']:6.2f} of the model's own run, {found['memory']:.2f} the second time (goal {GOALS['memory']:g})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--child", choices=("run", "prove"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sizes = chosen.layers, chosen.hidden, chosen.tokens
    if chosen.child:
        print(json.dumps(child(chosen.child, *sizes)))
        return
    found = measure(*sizes)
    print(json.dumps(found, indent=2)) if chosen.json else show(found)


if __name__ == "__main__":
    main()
