"""What a client says where nobody else shows how far it is: that a build begins, and how long it took."""

from __future__ import annotations

import logging
import sys

from kernelhub.hub.sources.base import NoProgress

# Its own, so that a program can show these lines and no others.
LOGGER = "kernelhub.steps"


class TerminalLine(NoProgress):
    """Says what takes seconds: on standard error where that is a terminal, else to the log."""

    def note(self, text: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"kernelhub: {text}\n")
            sys.stderr.flush()
        else:
            logging.getLogger(LOGGER).info("%s", text)
