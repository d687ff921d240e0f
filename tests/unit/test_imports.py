"""Importing does nothing but import: run in a fresh process, with hooks that write down what else happened."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kernelhub.core

HEAVY = [
    "torch",
    "huggingface_hub",
    "fsspec",
    "filelock",
    "zstandard",
    "starlette",
    "uvicorn",
    "requests",
    "httpx",
    "numpy",
]

# Reads of the environment count where kernelhub's own code does them, or where they ask for a variable of ours: the
# standard library reads some at its own import. The hook sees what is written, made, run or connected to by anyone.
PROBE = """
import json, os, sys, threading

read, done = [], []

class Environment(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame and frame.f_globals.get("__name__") in ("os", "collections.abc", "_collections_abc"):
            frame = frame.f_back
        ours = ("KERNELHUB_", "KERNELS_", "HF_", "DISABLE_", "LOCAL_KERNELS", "DO_NOT_TRACK")
        if frame.f_globals.get("__name__", "").split(".")[0] == "kernelhub" or str(key).startswith(ours):
            read.append(str(key))
        return super().__getitem__(key)

os.environ.__class__ = Environment

def hook(event, arguments):
    if event in ("os.mkdir", "os.rename", "subprocess.Popen", "os.system", "socket.connect", "socket.bind"):
        done.append(f"{event} {arguments}")
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        done.append(f"open {arguments[:2]}")
    elif event == "_thread.start_new_thread":
        done.append(event)

sys.addaudithook(hook)
before = set(sys.modules)
for name in sys.argv[2:]:
    __import__(name)
if sys.argv[1] == "self-test":  # what the hooks must see
    os.environ.get("KERNELHUB_CACHE")
    threading.Thread(target=int).start()
    os.mkdir("made")
loggers = [name for name, logger in vars(sys.modules["logging"].root.manager)["loggerDict"].items()
           if getattr(logger, "handlers", None)] if "logging" in sys.modules else []
print(json.dumps({
    "modules": sorted(set(sys.modules) - before), "read": read, "done": done,
    "threads": threading.active_count(), "handlers": loggers,
}))
"""


def probe(folder: Path, *modules: str, mode: str = "import") -> dict[str, Any]:
    """What a fresh process saw while it imported `modules`, with its home and working folder in `folder`."""
    homes = {name: str(folder) for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR")}
    environment = {**os.environ, **homes, "PYTHONDONTWRITEBYTECODE": "1", "KERNELHUB_HUBS": "/nowhere"}
    command = [sys.executable, "-c", PROBE, mode, *modules]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    seen: dict[str, Any] = json.loads(ran.stdout)
    return seen


CORE = sorted(f"kernelhub.core.{module.name}" for module in pkgutil.iter_modules(kernelhub.core.__path__))


@pytest.mark.parametrize(
    "modules",
    [
        ["kernelhub"],
        ["kernelhub.core", *CORE],
        ["kernelhub.errors", "kernelhub.settings"],
        ["kernelhub.hub"],
        ["kernelhub.cli"],
    ],
    ids=lambda modules: modules[0],
)
def test_importing_imports_nothing_heavy_and_does_nothing(modules: list[str], tmp_path: Path) -> None:
    seen = probe(tmp_path, *modules)
    loaded = {name.partition(".")[0] for name in seen["modules"]}
    assert set(modules) <= set(seen["modules"])
    assert sorted(loaded.intersection(HEAVY)) == []
    assert (seen["read"], seen["done"], seen["threads"], seen["handlers"]) == ([], [], 1, [])
    assert list(tmp_path.iterdir()) == []


def test_the_probe_sees_what_it_looks_for(tmp_path: Path) -> None:
    seen = probe(tmp_path, "kernelhub", mode="self-test")
    assert seen["read"] == ["KERNELHUB_CACHE"]
    assert any(event.startswith("os.mkdir") for event in seen["done"])
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_no_module_imports_what_another_keeps_to_itself() -> None:
    package = Path(kernelhub.core.__file__).parents[1]
    found = [
        f"{path.relative_to(package)}: from {node.module} import {name.name}"
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernelhub")
        for name in node.names
        if name.name.startswith("_") and not name.name.startswith("__")
    ]
    assert found == []
