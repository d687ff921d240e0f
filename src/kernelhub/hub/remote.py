"""The files of a hub that lies elsewhere, over fsspec: on a web host (read only), or in an object store.

Proxies, certificates and credentials are those that fsspec and its file systems read themselves (`fsspec.config`, the
environment). Object stores retry and time out by themselves; for the web this module does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, urljoin

import fsspec
from fsspec.config import conf

from kernelhub.core.refs import Revision
from kernelhub.errors import HubUnavailable, InvalidReference, KernelHubError, MissingDependency
from kernelhub.hub.addresses import shown
from kernelhub.hub.files import Files, too_large
from kernelhub.hub.patience import RETRIED, Budget, Interrupted, Patience, reason_of, retry_after
from kernelhub.hub.sources.base import Progress

T = TypeVar("T")

_CHUNK = 1024 * 1024
_PART = 16 * 1024 * 1024  # of an object: each costs a request
_HREF = re.compile(r"""href\s*=\s*["']([^"'?#]+)["']""", re.IGNORECASE)
_MISSING = frozenset({404, 410})
# S3's answers to an exclusive write: it is there, and somebody is writing it just now, so ask again.
_THERE, _BEING_WRITTEN, _TRIES = 412, 409, 8
_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3"}

# Protocols whose exclusive writes are known to be exclusive.
_EXCLUSIVE = frozenset({"s3", "s3a"})


def open_remote(url: str, user_agent: Callable[[], str], patience: Patience | None = None) -> Files:
    """The files at an address. Raises `InvalidReference`, or `MissingDependency` with the pip command."""
    shown(url)  # of which not all is an address
    protocol = url.partition("://")[0].lower()
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        package = f"'kernelhub[{extra}]'" if extra else str(error).split()[1]
        raise MissingDependency(f"{protocol}:// needs a package that is not installed", packages=[package]) from error
    except ValueError as error:
        raise InvalidReference(
            f"{url!r} is not a hub's address: {protocol}:// is not known", hint="Expected a path, https:// or s3://."
        ) from error
    if protocol in ("http", "https"):
        return WebFiles(url.rstrip("/"), user_agent, patience or Patience())
    kind = ExclusiveObjectFiles if protocol in _EXCLUSIVE else ObjectFiles
    return kind(url.rstrip("/"))


@dataclass(frozen=True)
class WebFiles:
    """Files on a web host: any that serves files by their paths will do."""

    url: str
    user_agent: Callable[[], str]
    patience: Patience = field(default_factory=Patience)

    @property
    def name(self) -> str:
        return shown(self.url)

    def read(self, path: str, limit: int) -> bytes | None:
        def consume(chunks: Iterator[bytes]) -> bytes:
            data = bytearray()
            for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise too_large(self.name, path, limit)
            return bytes(data)

        return self._get(path, consume)

    def download(self, path: str, size: int, into: BinaryIO, progress: Progress) -> bool:
        furthest = 0

        def consume(chunks: Iterator[bytes]) -> bool:
            nonlocal furthest
            into.seek(0)
            into.truncate()
            count = 0
            for chunk in chunks:
                taken = chunk[: size + 1 - count]
                into.write(taken)
                count += len(taken)
                progress.advance(max(count - furthest, 0))
                furthest = max(count, furthest)
                if count > size:
                    break
            return True

        return self._get(path, consume) or False

    def names(self, folder: str) -> list[str] | None:
        """What the host's page for the folder links to; a ref with a `/` in it is not found so."""
        page = self.read(f"{folder}/", 16 * _CHUNK)
        if page is None:
            return None
        url = f"{self.url}/{folder}/"
        names = set()
        for link in _HREF.findall(page.decode(errors="replace")):
            with suppress(ValueError):  # what is no address leads to no file
                names.add(unquote(urljoin(url, link).removeprefix(url)))
        return sorted(name for name in names if _is_plain(name))

    def check_root(self) -> None:
        pass  # a host answers for files; that of `hub.json` tells

    def _get(self, path: str, consume: Callable[[Iterator[bytes]], T]) -> T | None:
        """What `consume` makes of the body, which it may get again from its start; None where there is no such file."""

        def attempt(budget: Budget) -> T | None:
            fs = self._filesystem()
            response = self._open(fs, path, budget)
            if response is None:
                return None
            try:
                return consume(self._chunks(fs, response, budget))
            finally:
                fs.loop.call_soon_threadsafe(response.close)

        return self._retry(path, attempt)

    def _open(self, fs: Any, path: str, budget: Budget) -> Any:
        """The response (an aiohttp one) whose body is to be read; None where there is no such file."""
        import aiohttp
        from fsspec.asyn import sync

        url = f"{self.url}/{path}"
        connect, read, _, pool = budget.timeouts()
        timeout = aiohttp.ClientTimeout(total=None, connect=pool, sock_connect=connect, sock_read=read)

        async def get() -> Any:
            session = await fs.set_session()
            response = await session.get(fs.encode_url(url), **{**fs.kwargs, "timeout": timeout})
            if response.status != 200:
                response.close()
            return response

        response = sync(fs.loop, get, timeout=connect + read + pool)
        status = response.status
        way = {item.url.scheme for item in (*response.history, response)}
        if url.startswith("https:") and way != {"https"}:
            response.close()
            raise self._unavailable(path, "it redirects to http:, which anyone can alter")
        if status in _MISSING:
            return None
        if status in RETRIED:
            after = retry_after(response.headers.get("Retry-After"), self.patience.now())
            raise Interrupted(f"{status} {response.reason}", status=status, after=after)
        if status != 200:
            raise self._unavailable(path, f"{status} {response.reason}", status)
        return response

    def _chunks(self, fs: Any, response: Any, budget: Budget) -> Iterator[bytes]:
        from fsspec.asyn import sync

        while chunk := sync(fs.loop, response.content.read, _CHUNK):
            budget.received(len(chunk))
            yield chunk

    def _retry(self, path: str, attempt: Callable[[Budget], T]) -> T:
        """What `attempt` returns, after as many tries and as long waits as `patience` allows."""
        import aiohttp

        budget = Budget(self.patience)
        while True:
            try:
                return attempt(budget)
            except (aiohttp.InvalidURL, aiohttp.ClientSSLError, UnicodeError) as error:  # the last: a name that is none
                raise self._unavailable(path, reason_of(error)) from error
            except KernelHubError:
                raise
            except (Interrupted, aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                interrupted = error if isinstance(error, Interrupted) else Interrupted(reason_of(error))
                if given_up := budget.pause(interrupted):
                    raise self._unavailable(path, given_up, getattr(error, "status", None)) from error

    def _filesystem(self) -> Any:
        """fsspec's file system for this thread, with the user agent of this moment; fsspec keeps and reuses it."""
        configured = {**conf.get("http", {}), **conf.get("https", {})}
        own = {"User-Agent": self.user_agent(), "Accept-Encoding": "identity"}
        return fsspec.filesystem(
            "http",
            headers={**configured.get("headers", {}), **own},
            # aiohttp reads the proxies of the environment only where it is told to
            client_kwargs={"trust_env": True, **configured.get("client_kwargs", {})},
        )

    def _unavailable(self, path: str, reason: str, status: int | None = None) -> HubUnavailable:
        request = f"GET {path}"
        return HubUnavailable(
            f"{self.name} is not available: {request}: {reason}",
            hub=self.name,
            request=request,
            status=status,
            hint="Its host must let these files be read, and answer 404 for those that are not there."
            if status in (401, 403)
            else "Try again later. What is in the store is used with KERNELHUB_OFFLINE=1.",
        )


@dataclass(frozen=True)
class ObjectFiles:
    """Files in an object store, or wherever else fsspec reads and lists."""

    url: str

    @property
    def name(self) -> str:
        return shown(self.url)

    def read(self, path: str, limit: int) -> bytes | None:
        data = self._part(path, 0, limit + 1)
        if data is not None and len(data) > limit:
            raise too_large(self.name, path, limit)
        return data

    def download(self, path: str, size: int, into: BinaryIO, progress: Progress) -> bool:
        for start in range(0, size, _PART):
            part = self._part(path, start, min(start + _PART, size))
            if part is None:
                return False
            into.write(part)
            progress.advance(len(part))
            if len(part) < min(_PART, size - start):
                break
        return True

    def _part(self, path: str, start: int, end: int) -> bytes | None:
        return self._ask("GET", path, lambda fs, key: cast("bytes", fs.cat_file(key, start=start, end=end)))

    def names(self, folder: str) -> list[str] | None:
        def find(fs: Any, key: str) -> list[str]:
            fs.invalidate_cache()
            return [item.removeprefix(key).lstrip("/") for item in fs.find(key) if item.startswith(key)]

        return sorted(self._ask("LIST", folder, find) or [])

    def check_root(self) -> None:
        pass  # a prefix is there when something lies under it

    def _ask(self, request: str, path: str, job: Callable[[Any, str], T]) -> T | None:
        """What `job` answers, of the file system and the object's key; None where there is no such object."""
        try:
            fs, key = fsspec.core.url_to_fs(f"{self.url}/{path}")
            return job(fs, key)
        except FileNotFoundError:
            return None
        except FileExistsError:
            raise
        except Exception as error:  # each store has errors of its own, which are no OSErrors: botocore's are not
            cause: Any = getattr(error, "__cause__", None) or error
            answer = getattr(cause, "response", None) or {}
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
            raise HubUnavailable(
                f"{self.name} is not available: {request} {path}: {reason_of(error)}",
                hub=self.name,
                request=f"{request} {path}",
                status=status,
                hint="Are the address, the region and the credentials right?",
            ) from error


@dataclass(frozen=True)
class ExclusiveObjectFiles(ObjectFiles):
    """Files in an object store that writes an object only if it is not there, when asked to (S3's `If-None-Match`)."""

    def create(self, path: str, data: bytes) -> bool:
        for _ in range(_TRIES):
            try:
                self._ask("PUT", path, lambda fs, key: fs.pipe_file(key, data, mode="create"))
            except FileExistsError:
                return False
            except HubUnavailable as error:
                if error.status == _THERE:  # as older s3fs tells it
                    return False
                if error.status != _BEING_WRITTEN:
                    raise
            else:
                return True
        raise HubUnavailable(f"{self.name}: {path} is being written all the time", hub=self.name, status=_BEING_WRITTEN)

    def replace(self, path: str, data: bytes) -> None:
        self._ask("PUT", path, lambda fs, key: fs.pipe_file(key, data))


def _is_plain(name: str) -> bool:
    try:
        return str(Revision.parse(name)) == name and "/" not in name
    except InvalidReference:
        return False
