"""The user agent: what it says, and that it is all there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from kernelhub import Hub, Settings, __version__
from kernelhub.core.refs import KernelRef
from kernelhub.errors import InvalidReference
from kernelhub.hub.server import app
from kernelhub.hub.telemetry import user_agent


def test_it_names_versions_backend_and_platform():
    text = user_agent(enabled=True, caller={"app": "1.2"})
    assert text.startswith(f"kernelhub/{__version__}; python/3.")
    for part in ("torch/", "backend/", "platform/linux-", "app/1.2"):
        assert part in text
    assert not text.endswith((";", "; "))


@pytest.mark.parametrize("caller", [None, "app/1", {"app": "1"}])
def test_switched_off_it_is_the_name_and_version_alone(caller):
    assert user_agent(enabled=False, caller=caller) == f"kernelhub/{__version__}"


@pytest.mark.parametrize("caller", ["a\r\nX-Evil: 1", {"a": "b\n"}, "ü"])
def test_what_cannot_stand_in_a_header_is_refused(caller):
    with pytest.raises(InvalidReference, match="cannot stand in a header"):
        user_agent(enabled=True, caller=caller)


def sent(hub: LoopbackHub, kernels: Path, tmp_path: Path, caller: object, **variables: str) -> set[str]:
    """The user agents that a real server received during a cold load, as the environment says."""
    hub.app = app(kernels, trusted=True)
    hub.requests.clear()
    settings = Settings.from_env({"HF_ENDPOINT": hub.url, "KERNELHUB_CACHE": str(tmp_path / "store"), **variables})
    Hub(settings).load(KernelRef.parse("acme/relu@v1"), user_agent=caller)
    assert len(hub.requests) > 4
    return {request.headers.get("user-agent", "") for request in hub.requests}


def test_a_server_receives_it_with_every_request(hub, kernels, tmp_path):
    (text,) = sent(hub, kernels, tmp_path, {"app": "1.2"})
    assert text == user_agent(enabled=True, caller={"app": "1.2"})
    assert "torch/" in text
    assert "app/1.2" in text


@pytest.mark.parametrize("value", ["1", "on", "YES", "True"])
@pytest.mark.parametrize("name", ["DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"])
def test_each_variable_leaves_the_name_alone_and_every_request_works(hub, kernels, tmp_path, name, value):
    assert sent(hub, kernels, tmp_path, "app/1.2", **{name: value}) == {f"kernelhub/{__version__}"}
