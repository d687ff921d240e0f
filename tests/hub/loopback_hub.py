"""A real server on loopback, what it was asked, and what it gets wrong on request."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Request:
    """A request as the server received it: `target` is the raw path and query, header names are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]


@dataclass
class Reply:
    """A whole response, which a fault may change before it is sent. `cut` sends so many bytes and closes."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut: int | None = None

    def json(self) -> Any:
        return json.loads(self.body)

    def set_json(self, value: Any) -> None:
        self.set_body(json.dumps(value).encode())

    def set_body(self, body: bytes) -> None:
        self.body = body
        self.headers["content-length"] = str(len(body))


@dataclass
class Fault:
    """What goes wrong for requests whose target contains `where`: the first `times` of them, or all."""

    where: str
    change: Callable[[Request, Reply], None] | None
    times: int | None = None


@dataclass
class LoopbackHub:
    """The server: `app` answers, `faults` change the answers, `requests` has all that were received."""

    url: str
    app: App | None = None
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def reset(self) -> None:
        self.app = None
        self.requests, self.faults = [], []

    @property
    def other_origin(self) -> str:
        """The same server under another name, which for credentials is another host."""
        return self.url.replace("127.0.0.1", "localhost")

    def targets(self, part: str = "") -> list[str]:
        return [request.target for request in self.requests if part in request.target]

    def break_with(self, where: str, change: Callable[[Request, Reply], None] | None, times: int | None = None) -> None:
        self.faults.append(Fault(where, change, times))

    def fail(self, where: str, status: int, times: int | None = None, **headers: str) -> None:
        """Answer with a status and headers (`retry_after` is `retry-after`)."""

        def change(_: Request, reply: Reply) -> None:
            reply.status, reply.headers = status, {name.replace("_", "-"): text for name, text in headers.items()}
            reply.set_body(b'{"error": "a fault"}')

        self.break_with(where, change, times)

    def stall(self, where: str, times: int | None = None) -> None:
        """Accept the request and never answer."""
        self.break_with(where, None, times)

    def cut(self, where: str, after: int, times: int | None = None) -> None:
        """Close the connection after so many bytes of the body."""
        self.break_with(where, lambda _, reply: setattr(reply, "cut", after), times)

    def alter(self, where: str, times: int | None = None) -> None:
        """Send a body of the same length with one byte changed."""

        def change(_: Request, reply: Reply) -> None:
            middle = len(reply.body) // 2
            reply.body = reply.body[:middle] + bytes([reply.body[middle] ^ 1]) + reply.body[middle + 1 :]

        self.break_with(where, change, times)

    def rewrite(self, where: str, change: Callable[[Any], Any], times: int | None = None) -> None:
        """Send another JSON value."""
        self.break_with(where, lambda _, reply: reply.set_json(change(reply.json())), times)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = scope["query_string"].decode()
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
        request = Request(scope["method"], scope["raw_path"].decode() + (f"?{query}" if query else ""), headers)
        self.requests.append(request)
        fault = self._fault(request)
        assert self.app is not None, "the test has not said what the hub serves"
        if fault is None:
            await self.app(scope, receive, send)
        elif fault.change is None:
            while (await receive())["type"] != "http.disconnect":
                pass
        else:
            await self._changed(fault.change, request, scope, receive, send)

    def _fault(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.where in request.target and fault.times != 0:
                fault.times = None if fault.times is None else fault.times - 1
                return fault
        return None

    async def _changed(
        self, change: Callable[[Request, Reply], None], request: Request, scope: Scope, receive: Receive, send: Send
    ) -> None:
        reply = Reply(500, {}, b"")

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                reply.body += message.get("body", b"")

        assert self.app is not None
        await self.app(scope, receive, keep)
        change(request, reply)
        headers = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        if reply.cut is None:
            await send({"type": "http.response.body", "body": reply.body})
        else:
            # Returning before the body is whole makes uvicorn close the connection.
            await send({"type": "http.response.body", "body": reply.body[: reply.cut], "more_body": True})


def write_kernel(
    root: Path,
    repo: str = "acme/relu",
    variant: str = "torch-universal",
    version: int = 1,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """A repository's variant that loads everywhere; `files` are added to the least that it needs."""
    name = repo.partition("/")[2]
    folder = root / repo / "build" / variant
    metadata = {
        "name": name,
        "id": f"{name.replace('-', '_')}_1234",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    contents = {
        "metadata.json": json.dumps(metadata).encode(),
        "__init__.py": b"def answer():\n    return 42\n",
        f"{name.replace('-', '_')}/__init__.py": b"from .. import answer\n",
        **(files or {}),
    }
    for path, data in contents.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder
