"""A folder of kernels as a hub: the read side of the Hugging Face Hub's interface, as an ASGI app.

`kernelhub`, `huggingface_hub` and the `kernels` package load from it (`HF_ENDPOINT`). A server has no Xet, and says
nothing of it, because clients that see it offered use it.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote, urlencode

from kernelhub.core.canonical import sha256_hex
from kernelhub.core.refs import RepoId, is_commit
from kernelhub.errors import InvalidReference, KernelHubError, MissingDependency
from kernelhub.hub.repositories import CHUNK, File, Repositories, Snapshot, repositories

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = 1000
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


def app(hub: Path, *, trusted: bool = False, page: int = PAGE) -> Starlette:
    """The ASGI app that serves a folder.

    `trusted` is what it says of every publisher (`trustedKernelPublisher`), `page` how many entries of a tree it gives
    at once. Raises `InvalidReference` where there is no such folder, `InvalidMetadata` where its `hub.json` is none,
    `MissingDependency` without starlette.
    """
    if not hub.is_dir():
        raise InvalidReference(f"{hub} is not a folder", hint="Expected a hub's folder, or one of <org>/<name>/build.")
    try:
        from starlette.applications import Starlette
        from starlette.routing import Route
    except ImportError as error:
        raise _no_server() from error

    served = _Served(repositories(hub), trusted, page)
    return Starlette(routes=[Route("/{path:path}", served.answer, methods=["GET"])])  # a GET route takes HEAD too


@dataclass(frozen=True)
class Running:
    """A server that runs in a thread of its own, at `url`."""

    url: str
    thread: threading.Thread = field(repr=False)

    def wait(self) -> None:
        """Until the server ends, or the user presses Ctrl-C."""
        try:
            while self.thread.is_alive():
                self.thread.join(0.5)  # a join without a limit cannot be interrupted on Windows
        except KeyboardInterrupt:
            return


@contextmanager
def running(asgi: Any, host: str = "127.0.0.1", port: int = 0) -> Iterator[Running]:
    """Serve an ASGI app while the context lasts; port 0 takes a free one.

    It can be reached when the context begins. Raises `InvalidReference` where the address cannot be listened on,
    `MissingDependency` without uvicorn.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise _no_server() from error

    with _listener(host, port) as listener:
        config = uvicorn.Config(
            asgi, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            shown = f"[{host}]" if ":" in host else host
            yield Running(f"http://{shown}:{listener.getsockname()[1]}", thread)
        finally:
            server.should_exit = server.force_exit = True
            thread.join(timeout=10)


def listen(
    hub: Path, host: str = "127.0.0.1", port: int = 0, *, trusted: bool = False
) -> AbstractContextManager[Running]:
    """Serve a folder while the context lasts. Raises what `app` and `running` do."""
    return running(app(hub, trusted=trusted), host, port)


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that a client which comes before the server's thread waits in its queue."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=128)
        # asyncio does this for sockets that it makes itself; without it each answer of two writes waits 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise InvalidReference(
            f"cannot listen on {host} port {port}: {error.strerror or error}", hint="Use another address, or port 0."
        ) from error


def _no_server() -> MissingDependency:
    return MissingDependency("serving needs starlette and uvicorn", packages=["'kernelhub[server]'"])


class _Refusal(Exception):
    """A request that gets an error: its status, the hub's code for it, and a text."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class _Served:
    """The endpoints, over what a folder holds."""

    repositories: Repositories
    trusted: bool
    page: int

    async def answer(self, request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse

        try:
            match _segments(request):
                case ["kernels", org, name, "resolve", revision, *path]:
                    return await self._resolve(request, org, name, revision, "/".join(path))
                case ["api", "organizations", org, "overview"]:
                    return JSONResponse(await run_in_threadpool(self._overview, org))
                case ["api", "kernels", org, name, "refs"]:
                    return JSONResponse(await run_in_threadpool(self._refs, org, name))
                case ["api", "kernels", org, name]:
                    return JSONResponse(await run_in_threadpool(self._info, org, name, "main"))
                case ["api", "kernels", org, name, "revision", revision]:
                    return JSONResponse(await run_in_threadpool(self._info, org, name, revision))
                case ["api", "kernels", org, name, "tree", revision, *path]:
                    return await run_in_threadpool(self._tree, request, org, name, revision, "/".join(path))
            raise _Refusal(404, "", "no such address")
        except _Refusal as refusal:
            headers = {"X-Error-Message": quote(str(refusal), safe=" /:,.@'")}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            return JSONResponse({"error": str(refusal)}, status_code=refusal.status, headers=headers)
        except (KernelHubError, OSError) as error:
            # The folder is not what it should be: the server's fault, and worth a look at its side.
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=500)

    def _overview(self, org: str) -> dict[str, Any]:
        if not _is_name(org) or not self.repositories.has_org(org):
            raise _Refusal(404, "", f"no organization {org}")
        return {"name": org, "fullname": org, "trustedKernelPublisher": self.trusted}

    def _refs(self, org: str, name: str) -> dict[str, Any]:
        refs = self._repo(org, name)[1]
        rows = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": commit} for ref, commit in sorted(refs.items())
        ]
        return {"branches": rows, "tags": [], "converts": []}

    def _info(self, org: str, name: str, revision: str) -> dict[str, Any]:
        snapshot = self._snapshot(org, name, revision)
        return {
            "_id": snapshot.commit[:24],
            "id": f"{org}/{name}",
            "sha": snapshot.commit,
            "author": org,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["kernel"],
        }

    def _tree(self, request: Request, org: str, name: str, revision: str, path: str) -> Response:
        from starlette.responses import JSONResponse

        snapshot = self._snapshot(org, name, revision)
        rows = _rows(snapshot, path, recursive=request.query_params.get("recursive", "").lower() in ("true", "1"))
        if not rows and path:
            raise _Refusal(404, "EntryNotFound", f"{path} is not in {org}/{name} at {snapshot.commit}")
        start, size = _number(request, "cursor", 0), min(_number(request, "limit", self.page), self.page)
        headers = {"X-Repo-Commit": snapshot.commit}
        if start + size < len(rows):
            query = urlencode({**request.query_params, "cursor": start + size})
            address = f"{request.url.scheme}://{request.url.netloc}{_raw_path(request)}?{query}"
            headers["Link"] = f'<{address}>; rel="next"'
        return JSONResponse(rows[start : start + size], headers=headers)

    async def _resolve(self, request: Request, org: str, name: str, revision: str, path: str) -> Response:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import Response, StreamingResponse

        # What is known needs no thread, whose hand-over costs more than sending a small file.
        repo = _repo_id(org, name)
        known = self.repositories.known(repo, revision)
        snapshot = known or cast(Snapshot, await run_in_threadpool(self._snapshot, org, name, revision))
        file = snapshot.file(path) if snapshot.quick else await run_in_threadpool(snapshot.file, path)
        if file is None or not file.unchanged:
            raise _Refusal(404, "EntryNotFound", f"{path} is not in {org}/{name} at {snapshot.commit}")
        headers = {"X-Repo-Commit": snapshot.commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.sha256:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        status, start, end = _range(request.headers.get("range"), file.size)
        if status == 416:
            return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{file.size}"})
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        headers |= {"Content-Length": str(end - start), "Content-Type": "application/octet-stream"}
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        if end - start <= CHUNK:
            return Response(_read(file, start, end), status_code=status, headers=headers)
        return StreamingResponse(_stream(file, start, end), status_code=status, headers=headers)

    def _repo(self, org: str, name: str) -> tuple[RepoId, Mapping[str, str]]:
        repo = _repo_id(org, name)
        refs = self.repositories.refs(repo)
        if refs is None:
            raise _Refusal(404, "RepoNotFound", f"no repository {repo}")
        return repo, refs

    def _snapshot(self, org: str, name: str, revision: str) -> Snapshot:
        repo, refs = self._repo(org, name)
        commit = refs.get(revision.removeprefix("refs/heads/"), revision)
        snapshot: Snapshot | None = self.repositories.snapshot(repo, commit) if is_commit(commit) else None
        if snapshot is None:
            raise _Refusal(404, "RevisionNotFound", f"{repo} has no revision {revision}")
        return snapshot


def _raw_path(request: Request) -> str:
    raw: bytes = request.scope.get("raw_path") or quote(request.scope["path"]).encode()
    return raw.partition(b"?")[0].decode("ascii", "replace")


def _segments(request: Request) -> list[str]:
    """The parts of the address, each decoded: a `%2F` is part of a revision's name, not a separator."""
    return [unquote(part) for part in _raw_path(request).split("/") if part]


def _repo_id(org: str, name: str) -> RepoId:
    try:
        return RepoId.parse(f"{org}/{name}")
    except InvalidReference:
        raise _Refusal(404, "RepoNotFound", f"no repository {org}/{name}") from None


def _is_name(org: str) -> bool:
    try:
        RepoId.parse(f"{org}/any")
    except InvalidReference:
        return False
    return True


def _number(request: Request, key: str, default: int) -> int:
    text = request.query_params.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0 else default


def _rows(snapshot: Snapshot, path: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The entries below a path, folders before what is in them; all levels, or the first."""
    if path == "build" and not recursive:
        loose = [file.to_json(name) for name, file in snapshot.top.items() if name.startswith("build/")]
        return [_folder(f"build/{name}") for name in sorted(snapshot.variants)] + loose
    prefix = f"{path}/" if path else ""
    rows: dict[str, dict[str, Any]] = {}
    for name, file in sorted(snapshot.below(path).items()):
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)) if recursive else range(1, min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            rows.setdefault(folder, _folder(folder))
        if recursive or len(parts) == 1:
            rows[name] = file.to_json(name)
    return list(rows.values())


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": sha256_hex(path.encode())[:40], "size": 0, "path": path}


def _range(header: str | None, size: int) -> tuple[int, int, int]:
    """The status, and the bytes from and up to which to send (RFC 9110, 14.2); what is not understood is all of it."""
    match = _RANGE.fullmatch(header.strip()) if header else None
    if not match or not (match[1] or match[2]):
        return 200, 0, size
    if not match[1]:
        start, end = max(size - int(match[2]), 0), size
    else:
        start, end = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
        if match[2] and int(match[2]) < int(match[1]):
            return 200, 0, size
    return (206, start, end) if start < end else (416, 0, 0)


def _read(file: File, start: int, end: int) -> bytes:
    with file.path.open("rb") as stream:
        stream.seek(start)
        return stream.read(end - start)


async def _stream(file: File, start: int, end: int) -> AsyncIterator[bytes]:
    from starlette.concurrency import run_in_threadpool

    for position in range(start, end, CHUNK):
        yield await run_in_threadpool(_read, file, position, min(position + CHUNK, end))
