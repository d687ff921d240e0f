"""A hub that misbehaves: true answers of either protocol, and what goes wrong with them, byte by byte.

A server of plain sockets, because a well-made one does not send half a header, lie about a length, or die at the n-th byte.
"""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import random
import re
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

GIGABYTE = 1024**3
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Answer:
    """What a hub says when nothing is wrong."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def part(self, wanted: str | None) -> Answer:
        """The answer to a request for a range."""
        match = _RANGE.fullmatch(wanted or "")
        if self.status != 200 or match is None:
            return self
        start = int(match[1])
        headers = {**self.headers, "content-range": f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"}
        return Answer(206, headers, self.body[start:])

    def json(self) -> Any:
        return json.loads(self.body)


Truth = Callable[[str], Answer]


def files_of(folder: Path) -> Truth:
    """A static web host: the files of a folder."""

    def truth(target: str) -> Answer:
        path = folder / unquote(target.partition("?")[0]).lstrip("/")
        if not path.is_file():
            return Answer(404, {"content-type": "text/plain"}, b"no such file")
        return Answer(200, {"content-type": "application/octet-stream"}, path.read_bytes())

    return truth


def answers_of(app: Any) -> Truth:
    """What an ASGI app answers, asked once for each target."""
    known: dict[str, Answer] = {}

    async def ask(target: str) -> Answer:
        path, _, query = target.partition("?")
        scope = {
            "type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": unquote(path),
            "raw_path": path.encode(), "query_string": query.encode(), "headers": [(b"host", b"hub")],
            "server": ("hub", 80), "client": ("client", 1), "root_path": "",
        }  # fmt: skip
        status, headers, body = 500, {}, b""

        async def send(message: dict[str, Any]) -> None:
            nonlocal status, headers, body
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = {name.decode(): text.decode() for name, text in message["headers"]}
            else:
                body += message.get("body", b"")

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        await app(scope, receive, send)
        return Answer(status, {name: text for name, text in headers.items() if name != "content-length"}, body)

    def truth(target: str) -> Answer:
        if target not in known:
            known[target] = asyncio.run(ask(target))
        return known[target]

    return truth


@dataclass
class Ask:
    """One request, which a fault answers: on `connection`, knowing what would be right (`answer`)."""

    connection: socket.socket
    target: str
    headers: Mapping[str, str]
    answer: Answer
    hub: FaultyHub

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        lines = [
            f"HTTP/1.1 {status} Whatever",
            "connection: close",
            *(f"{name}: {text}" for name, text in headers.items()),
        ]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.head(status, {"content-length": str(len(body)), **headers})
        self.send(body)

    def right(self) -> None:
        self.reply(self.answer.status, self.answer.headers, self.answer.body)

    def instead(self, body: bytes) -> None:
        self.reply(self.answer.status, self.answer.headers, body)

    def rewrite(self, change: Callable[[Any], Any]) -> None:
        self.instead(json.dumps(change(self.answer.json())).encode())

    def hold(self) -> None:
        """Say nothing more until the test is over, or the client has gone."""
        self.connection.settimeout(0.05)
        while not self.hub.closing.is_set():
            with suppress(TimeoutError):
                if not self.connection.recv(1024):
                    return

    def die(self) -> None:
        """Reset the connection, as a machine does that was switched off and on."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Fault = Callable[[Ask], None]


@dataclass
class FaultyHub:
    """A hub at `url`. `fault` answers the requests whose target matches `where`: the first `times`, or all (None)."""

    truth: Truth
    url: str = ""
    where: re.Pattern[str] | None = None
    fault: Fault | None = None
    times: int | None = None
    targets: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def break_with(self, where: str, fault: Fault, times: int | None = None) -> None:
        self.where, self.fault, self.times = re.compile(where), fault, times

    def heal(self) -> None:
        self.fault = None

    def serve(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            more = connection.recv(65536)
            if not more:
                return
            request += more
        first, *lines = request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        target = first.split(" ")[1]
        headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
        self.targets.append(target)
        answer = self.truth(target.removeprefix("/elsewhere")).part(headers.get("range"))
        ask = Ask(connection, target, headers, answer, self)
        (self._fault(target) or Ask.right)(ask)

    def _fault(self, target: str) -> Fault | None:
        with self.lock:
            hit = self.fault is not None and self.where is not None and self.where.search(target) and self.times != 0
            if not hit or target.startswith("/elsewhere"):
                return None
            self.times = None if self.times is None else self.times - 1
            return self.fault


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128


@contextmanager
def serving(truth: Truth) -> Iterator[FaultyHub]:
    """Serve on a free port of loopback."""
    hub = FaultyHub(truth)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # the client had enough
                hub.serve(self.request)

    with _Server(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.closing.set()
            server.shutdown()
            thread.join(10)


# What goes wrong with any answer


def delay(ask: Ask) -> None:
    ask.hub.closing.wait(0.05)
    ask.right()


def stall(ask: Ask) -> None:
    ask.hold()


def stall_in_body(ask: Ask) -> None:
    ask.head(ask.answer.status, {**ask.answer.headers, "content-length": str(len(ask.answer.body))})
    ask.send(ask.answer.body[: len(ask.answer.body) // 2])
    ask.hold()


def die_at_once(ask: Ask) -> None:
    ask.die()


def die_in_head(ask: Ask) -> None:
    ask.send(b"HTTP/1.1 200 OK\r\ncontent-le")
    ask.die()


def cut(where: float) -> Fault:
    """End the body after that part of it: 0 is before its first byte, 1 before its last."""

    def fault(ask: Ask) -> None:
        body = ask.answer.body
        ask.head(ask.answer.status, {**ask.answer.headers, "content-length": str(len(body))})
        ask.send(body[: int(where * max(len(body) - 1, 0))])

    return fault


def corrupt(seed: int) -> Fault:
    """Change one byte."""

    def fault(ask: Ask) -> None:
        body = bytearray(ask.answer.body or b"?")
        place = random.Random(seed).randrange(len(body))
        body[place] ^= 1 << random.Random(seed + 1).randrange(8)
        ask.instead(bytes(body))

    return fault


def reorder(ask: Ask) -> None:
    """The same facts in another order; of what is no JSON, the same bytes backwards."""
    try:
        value = ask.answer.json()
    except ValueError:
        ask.instead(ask.answer.body[::-1])
        return
    ask.instead(json.dumps(dict(reversed(value.items())) if isinstance(value, dict) else value[::-1]).encode())


def of_another(ask: Ask) -> None:
    """The answer to another request."""
    others = [target for target in ask.hub.targets if target != ask.target]
    ask.instead(ask.hub.truth(others[-1]).body if others else b"")


def status(code: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return lambda ask: ask.reply(code, named, b'{"error": "no"}')


def redirect(to: Callable[[Ask], str], code: int = 302) -> Fault:
    return lambda ask: ask.reply(code, {"location": to(ask)}, b"")


def length(change: Callable[[int], Any]) -> Fault:
    """Say another length than the body has."""

    def fault(ask: Ask) -> None:
        ask.head(ask.answer.status, {**ask.answer.headers, "content-length": str(change(len(ask.answer.body)))})
        ask.send(ask.answer.body)

    return fault


def no_length(ask: Ask) -> None:
    ask.head(ask.answer.status, ask.answer.headers)
    ask.send(ask.answer.body)


def chunked(ask: Ask) -> None:
    ask.head(ask.answer.status, {**ask.answer.headers, "transfer-encoding": "chunked"})
    for start in range(0, len(ask.answer.body), 100):
        part = ask.answer.body[start : start + 100]
        ask.send(b"%x\r\n%s\r\n" % (len(part), part))
    ask.send(b"0\r\n\r\n")


def packed(body: Callable[[bytes], bytes]) -> Fault:
    """Say that the body is gzip, although it was asked for as it is."""
    return lambda ask: ask.reply(
        ask.answer.status, {**ask.answer.headers, "content-encoding": "gzip"}, body(ask.answer.body)
    )


@functools.cache
def _bomb() -> bytes:
    return gzip.compress(bytes(256 * 1024**2), 1)


def bomb(_: bytes) -> bytes:
    return _bomb()


def endless(ask: Ask) -> None:
    ask.head(200, {"content-length": str(10 * GIGABYTE)})
    data = bytes(1024**2)
    for _ in range(10 * 1024):
        ask.send(data)


def body(data: bytes) -> Fault:
    return lambda ask: ask.reply(200, {}, data)


ELSEWHERE: Callable[[Ask], str] = lambda ask: ask.hub.url.replace("127.0.0.1", "localhost") + "/elsewhere" + ask.target  # noqa: E731

# By name: what goes wrong, and what must come of it where it goes wrong once, and each time: the kernel, an error, or
# either of them.
KERNEL, ERROR, EITHER = frozenset({"kernel"}), frozenset({"error"}), frozenset({"kernel", "error"})
FAULTS: dict[str, tuple[Fault, frozenset[str], frozenset[str]]] = {
    "delayed": (delay, KERNEL, KERNEL),
    "stalled": (stall, KERNEL, ERROR),
    "stalled in its body": (stall_in_body, KERNEL, ERROR),
    "dead at once": (die_at_once, KERNEL, ERROR),
    "dead in its head": (die_in_head, KERNEL, ERROR),
    "cut before its first byte": (cut(0), KERNEL, ERROR),
    "cut in its middle": (cut(0.5), KERNEL, EITHER),  # a file may go on each time, and come to its end
    "cut before its last byte": (cut(1), KERNEL, EITHER),
    **{f"altered in a byte ({seed})": (corrupt(seed), EITHER, EITHER) for seed in range(3)},
    "in another order": (reorder, EITHER, EITHER),
    "another request's": (of_another, EITHER, EITHER),
    "401": (status(401), ERROR, ERROR),
    "403": (status(403), ERROR, ERROR),
    "404": (status(404), EITHER, EITHER),
    "429": (status(429), KERNEL, ERROR),
    "429, now": (status(429, retry_after="0"), KERNEL, ERROR),
    "429, in an hour": (status(429, retry_after="3600"), ERROR, ERROR),
    "429, whenever": (status(429, retry_after="soon"), KERNEL, ERROR),
    "500": (status(500), KERNEL, ERROR),
    "503": (status(503), KERNEL, ERROR),
    "204": (status(204), EITHER, EITHER),
    "600": (status(600), EITHER, EITHER),
    "elsewhere, and there": (redirect(ELSEWHERE), KERNEL, KERNEL),
    "elsewhere, and not there": (redirect(lambda ask: "http://127.0.0.1:9/x"), EITHER, ERROR),
    "elsewhere in a circle": (redirect(lambda ask: ask.hub.url + ask.target), EITHER, ERROR),
    "in a local file": (redirect(lambda ask: "file:///etc/hostname"), EITHER, ERROR),
    "elsewhere without a name": (redirect(lambda ask: "http://"), EITHER, ERROR),
    "longer than it says": (length(lambda size: max(size - 1, 0)), EITHER, EITHER),
    "shorter than it says": (length(lambda size: size + 10), KERNEL, ERROR),
    "of a negative length": (length(lambda size: -5), EITHER, ERROR),
    "of no number's length": (length(lambda size: "many"), EITHER, ERROR),
    "of 10 GB, it says": (length(lambda size: 10 * GIGABYTE), KERNEL, ERROR),
    "of 10 GB": (endless, EITHER, ERROR),
    "of no length": (no_length, KERNEL, KERNEL),
    "in chunks": (chunked, KERNEL, KERNEL),
    "packed": (packed(gzip.compress), EITHER, EITHER),
    "packed, it says": (packed(lambda body: body), EITHER, EITHER),
    "packed 256 MB of nothing": (packed(bomb), EITHER, ERROR),
    "empty": (body(b""), EITHER, ERROR),
    "a page to log in": (body(b"<!doctype html><title>Log in</title>" * 40), EITHER, ERROR),
    "deep JSON": (body(b"[" * 100_000), EITHER, ERROR),
    "null": (body(b"null"), EITHER, ERROR),
    "noise": (body(random.Random(1).randbytes(5000)), EITHER, ERROR),
}
