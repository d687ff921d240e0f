"""The user agent: what it says, and that it is all there is."""

from __future__ import annotations

import pytest

from kernelhub import __version__
from kernelhub.errors import InvalidReference
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
