"""A hub on loopback that speaks the Hugging Face Hub's protocol and counts requests; prints its address.

    python benchmarks/counting_server.py FOLDER

`GET /requests` answers how many others came since it was last asked.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn

from kernelhub.hub.server import app


def counting(inner: Any) -> Any:
    """The application, with a count of its requests."""
    count = 0

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        nonlocal count
        if scope["type"] != "http":
            await inner(scope, receive, send)
        elif scope["path"] == "/requests":
            body, count = str(count).encode(), 0
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [(b"content-length", str(len(body)).encode())],
                }
            )
            await send({"type": "http.response.body", "body": body})
        else:
            count += 1
            await inner(scope, receive, send)

    return outer


def main() -> None:
    listener = socket.socket()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does so only for sockets of its own
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    config = uvicorn.Config(counting(app(Path(sys.argv[1]), trusted=True)), log_level="error")
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
