"""Kernel repositories on disk, and servers on loopback that hold hubs in folders."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernelhub.core.refs import RepoId

REPO = RepoId("org", "relu")
EPOCH = 1_763_755_200  # 2025-11-21T20:00:00Z
AGENT = "kernelhub/test; what/ever"

LAYERS = b"""
import torch
from torch import nn

class Relu(nn.Module):
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()
"""


def agent() -> str:
    return AGENT


def metadata(**changes: Any) -> bytes:
    value = {
        "name": "relu",
        "id": "relu_0001",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
        **changes,
    }
    return json.dumps(value, indent=1).encode()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def repository(folder: Path, *, text: str = "one", files: int = 0, variants: tuple[str, ...] = ("torch-cpu",)) -> Path:
    """A kernel repository whose contents are told apart by `text`."""
    for variant in variants:
        contents = {
            "metadata.json": metadata(),
            "__init__.py": f"TEXT = {text!r}\n".encode(),
            "layers.py": LAYERS,
            **{f"more/file{number}.py": b"x = 1\n" for number in range(files)},
        }
        write(folder / "build" / variant, contents)
    return write(folder, {"CARD.md": b"# relu\n", "benchmarks/benchmark.py": b"pass\n"})


@dataclass
class Web:
    """A static web host, what it was asked, and how it is to misbehave.

    Each by a path's last part: `answers` are given instead, in order; `bodies` stand in for files; `cuts` is how often a
    body ends after a byte, or goes no further where it is in `stalled_within` too; `stalled` gets no answer at all.
    """

    folder: Path
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    answers: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    bodies: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    stalled: set[str] = field(default_factory=set)
    stalled_within: set[str] = field(default_factory=set)
    encodings: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)
    closing: threading.Event = field(default_factory=threading.Event)

    def handler(self) -> type[http.server.SimpleHTTPRequestHandler]:
        web = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(web.folder))

            def do_GET(self) -> None:
                web.requests.append((self.path, self.headers.get("User-Agent", "")))
                web.encodings.add(self.headers.get("Accept-Encoding", ""))
                name = self.path.rpartition("/")[2]
                if name in web.stalled:
                    web.closing.wait(60)
                elif web.answers.get(name):
                    status, headers = web.answers[name].pop(0)
                    self.send_response(status)
                    for key, value in {"Content-Length": "0", **headers}.items():
                        self.send_header(key, value)
                    self.end_headers()
                elif web.cuts.get(name):
                    web.cuts[name] -= 1
                    self.send_response(200)
                    self.send_header("Content-Length", "1000000")
                    self.end_headers()
                    self.wfile.write(b"{")
                    if name in web.stalled_within:
                        web.closing.wait(60)
                elif name in web.bodies:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(web.bodies[name])))
                    self.end_headers()
                    with contextlib.suppress(ConnectionError):  # the client had enough
                        self.wfile.write(web.bodies[name])
                        web.sent.add(name)
                else:
                    super().do_GET()

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


@contextmanager
def serving(folder: Path) -> Iterator[Web]:
    """Serve a folder on a free port of loopback."""
    web = Web(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), web.handler())
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


@dataclass(frozen=True)
class Bucket:
    """A bucket of a store on loopback that speaks S3's protocol."""

    url: str
    endpoint: str
    client: Any


@contextmanager
def s3_bucket(monkeypatch: Any) -> Iterator[Bucket]:
    """An empty bucket, reached with what the environment says, as users reach theirs.

    The server handles one request at a time: moto looks whether an object is there and then writes it, with nothing to
    keep another thread from doing the same in between, which the store it stands for never allows.
    """
    import boto3
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *args: Any, **more: Any) -> None:
            pass

    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ: Any, start_response: Any) -> list[bytes]:
        with lock:
            return list(app(environ, start_response))

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=Quiet)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps the clients of the environment that it saw first
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        client = boto3.client("s3", endpoint_url=endpoint)
        name = f"hub-{server.server_port}"
        client.create_bucket(Bucket=name)
        yield Bucket(f"s3://{name}/kernels", endpoint, client)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
