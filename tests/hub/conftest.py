"""Fixtures of the hub's tests: a real server on loopback, and a folder of kernels for it to serve."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, write_kernel


@pytest.fixture(scope="session")
def _loopback() -> Iterator[LoopbackHub]:
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)  # before the thread runs: a client that is early waits in the queue
        hub = LoopbackHub(f"http://127.0.0.1:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            hub, lifespan="off", log_level="critical", access_log=False, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield hub
        server.should_exit = server.force_exit = True
        thread.join(timeout=10)


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
