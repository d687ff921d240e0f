"""The kernels of this repository, for their tests: from the source folder without compiled ops, or built and by name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kernelhub
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.settings import Settings

ROOT = Path(__file__).parents[1] / "kernels"


def load_noarch(project: str, name: str) -> ModuleType:
    """Import a project's Python under a private name, with the `_ops` of a build that has none."""
    package = project.replace("-", "_")
    folder = ROOT / project / "torch-ext" / package
    ops = ModuleType(f"{name}._ops")
    ops.ops = getattr(torch.ops, name)
    ops.add_op_namespace_prefix = lambda op: f"{name}::{op}"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.modules[ops.__name__] = ops
    spec.loader.exec_module(module)
    return module


def load_compiled(project: str, config: pytest.Config, backend: str | None = None) -> ModuleType:
    """The project's kernel with compiled ops, built by the hub; kept from run to run, by what it is built from.

    Of the ops for CPUs where `backend` is `"cpu"`, else of those for what torch was built for.
    """
    cache = config.cache.mkdir("kernels")
    set_default_hub(Hub(settings=Settings(cache=cache, offline=True, build="always")))
    try:
        return kernelhub.get_kernel(f"kernelhub/{project}", version=1, backend=backend)
    finally:
        set_default_hub(None)
