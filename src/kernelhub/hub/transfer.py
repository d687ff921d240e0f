"""One file from a hub to the disk: streamed, hashed as it arrives, resumed after a cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelhub.errors import HubUnavailable, IntegrityError, Violation
from kernelhub.hub.disk import writing
from kernelhub.hub.http import Headers, HttpClient
from kernelhub.hub.patience import Budget, Interrupted

# How often a file is begun again: once for wrong bytes, and for hubs that do not resume.
_MAX_RESTARTS = 4


@dataclass(frozen=True)
class RemoteFile:
    """A file as a hub lists it: its size in bytes, and its hash in hex.

    `algorithm` is `sha256`, or `sha1` for git's hash of a blob: over `"blob <size>\\0"` and the content.
    """

    path: str
    size: int
    algorithm: str
    hash: str


class Download:
    """One file on its way to disk: what is there of it, and its hash so far. Used by one thread."""

    def __init__(
        self,
        http: HttpClient,
        target: str,
        headers: Headers,
        file: RemoteFile,
        path: Path,
        report: Callable[[int], None],
    ) -> None:
        self._http, self._target, self._headers = http, target, headers
        self._file, self._path, self._report = file, path, report
        self._received = self._reported = self._restarts = 0
        self._hash = _content_hash(file)

    def run(self, budget: Budget) -> None:
        """Fetch the file. Raises `IntegrityError` where its bytes are wrong twice, each time from the beginning."""
        with writing(self._path):
            if self._file.size == 0:
                self._path.touch()  # its hash says all there is to know
            elif not self._attempt(budget):
                self._restart()
                self._attempt(budget)
        if not self._right:
            raise IntegrityError(
                f"{self._http.hub_name} sent other bytes for {self._file.path} than its listing says",
                [Violation("different", self._file.path)],
                hint="Something between here and the hub alters files, or the hub is broken.",
            )

    @property
    def _right(self) -> bool:
        return self._received == self._file.size and self._hash.hexdigest() == self._file.hash

    def _attempt(self, budget: Budget) -> bool:
        try:
            self._http.send(self._target, self._write, budget, self._headers, more_headers=self._range)
        except HubUnavailable as error:
            if error.status != 416:
                raise
            self._received = -1  # the hub has a shorter file than it listed
        return self._right

    def _restart(self) -> None:
        """Begin again. Bytes that come twice renew the budget too, so it is this that ends a hub that never resumes."""
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise HubUnavailable(
                f"{self._http.hub_name} is not available: GET {self._target}: it is cut off each time and does not resume",
                hub=self._http.hub_name,
                request=f"GET {self._target}",
                hint="Try again later, or over another connection.",
            )
        self._received, self._hash = 0, _content_hash(self._file)

    def _range(self) -> Headers:
        return {"range": f"bytes={self._received}-"} if self._received else {}

    def _write(self, response: Any, budget: Budget) -> None:
        """Append the response's body; from the beginning where the hub does not resume."""
        start = f"bytes {self._received}-"
        if self._received and response.status_code != 206:
            self._restart()
        elif self._received and not response.headers.get("content-range", "").startswith(start):
            self._restart()
            raise Interrupted("it went on at another place than it was asked for")
        with self._path.open("ab" if self._received else "wb") as stream:
            for chunk in response.iter_raw():
                budget.received(len(chunk))
                if self._received + len(chunk) > self._file.size:
                    self._received = self._file.size + 1  # more than was listed: wrong, whatever else comes
                    return
                stream.write(chunk)
                self._hash.update(chunk)
                self._received += len(chunk)
                if self._received > self._reported:
                    self._report(self._received - self._reported)
                    self._reported = self._received
        if self._received < self._file.size:
            raise Interrupted(f"{self._received:,} of {self._file.size:,} bytes came")


def _content_hash(file: RemoteFile) -> hashlib._Hash:
    """The hash that the tree states: sha256 for LFS files, else git's, of a header and the content."""
    if file.algorithm == "sha256":
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
