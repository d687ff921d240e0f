"""What a client says where nobody else shows how far it is: one line for each kernel that is built."""

from __future__ import annotations

import logging
import sys

from kernelhub.hub.sources.base import NoProgress


class TerminalLine(NoProgress):
    """Says what takes seconds: on standard error where that is a terminal, else to the log."""

    def note(self, text: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"kernelhub: {text}\n")
            sys.stderr.flush()
        else:
            logging.getLogger("kernelhub").info("%s", text)
