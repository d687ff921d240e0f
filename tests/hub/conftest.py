"""Fixtures of the hub's tests: a real server on loopback, and a folder of kernels for it to serve."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, write_kernel

from kernelhub.hub.server import running


@pytest.fixture(scope="session")
def _loopback() -> Iterator[LoopbackHub]:
    hub = LoopbackHub("")
    with running(hub) as server:
        hub.url = server.url
        logging.getLogger("uvicorn.error").disabled = True  # it reports the bodies that the tests cut
        yield hub


@pytest.fixture
def hub(_loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """The server with no history and no faults; the test sets `app`. Nothing of the user's Hugging Face is seen."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    _loopback.reset()
    yield _loopback
    _loopback.reset()


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder of kernel repositories with `acme/relu`, which has one small variant."""
    root = tmp_path / "kernels"
    write_kernel(root)
    return root
