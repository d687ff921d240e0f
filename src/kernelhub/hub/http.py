"""Requests to a hub: one client over huggingface_hub's session, that never waits for ever and never gives up at once.

The session is the one that `huggingface_hub` uses, so its proxies, certificates and whatever client a user set with
`set_client_factory` apply here too. What that session lacks is added: timeouts (it has none), a deadline, retries of
every kind of request, bounded bodies, and errors that name the hub, the request and the status.
"""

from __future__ import annotations

import contextvars
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from kernelhub.core.canonical import canonical_json
from kernelhub.errors import HubUnavailable, InvalidMetadata, KernelHubError, KernelNotFound, RepositoryNotFound
from kernelhub.hub.patience import RETRIED, Budget, Interrupted, Patience, reason_of, retry_after, said

T = TypeVar("T")
Headers = Mapping[str, str]

MAX_ANSWER = 32 * 1024 * 1024

# Seconds for threads to notice that a call is over, before its caller cleans up what they write to.
_FAREWELL = 1.0

_TOKEN_HINT = "Set HF_TOKEN, or run `hf auth login`, with a token that may read it."


class EntryNotFound(KernelNotFound):
    """The repository is there at this revision, and this file or folder is not in it."""


@dataclass(frozen=True)
class Answer:
    """The whole body of a request, and the next page's address where it has one (always on the same origin)."""

    body: bytes
    next_page: str | None = None


def _no_headers() -> Headers:
    return {}


@dataclass(frozen=True)
class HttpClient:
    """Sends GET requests to one hub.

    `base_url` has no trailing slash; a `target` is a path on it (starting with `/`) or an address that `Answer` gave.
    `user_agent` and `token` are asked for each call, so that they are what the user has set by then. The user agent is
    sent exactly as it is.
    """

    hub_name: str
    base_url: str
    user_agent: Callable[[], str]
    token: Callable[[], str | None]
    patience: Patience = field(default_factory=Patience)

    def headers(self) -> dict[str, str]:
        """The headers of a request. Bodies are asked for unpacked, because hubs state their unpacked sizes."""
        headers = {"user-agent": self.user_agent(), "accept-encoding": "identity"}
        token = self.token()
        if token:
            headers["authorization"] = f"Bearer {token}"
        return headers

    def get(self, target: str, *, limit: int = MAX_ANSWER, absent: type[KernelNotFound] = EntryNotFound) -> Answer:
        """A body of at most `limit` bytes.

        Raises `RepositoryNotFound`, `KernelNotFound`, `EntryNotFound` (`absent` is raised for a 404 that does not say
        what is missing), `HubUnavailable`, or `InvalidMetadata` for a larger body.
        """
        headers = self.headers()

        def read(response: Any, budget: Budget) -> Answer:
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > limit:
                    raise InvalidMetadata(f"{self.hub_name}: GET {target}: the answer has more than {limit:,} bytes")
                budget.check()
            return Answer(bytes(body), self._next_page(response, target))

        def job(budget: Budget) -> Answer:
            return self.send(target, read, budget, headers, absent=absent)

        return self.run_all([job], workers=1)[0]

    def get_json(self, target: str, *, absent: type[KernelNotFound] = EntryNotFound) -> tuple[Any, str | None]:
        """A JSON value and the next page's address. Raises what `get` does, and `InvalidMetadata` for what is not JSON.

        So is what has no canonical text: half of a surrogate pair, NaN.
        """
        answer = self.get(target, absent=absent)
        try:
            value = json.loads(answer.body)
            canonical_json(value)
        except (ValueError, RecursionError) as error:
            raise InvalidMetadata(f"{self.hub_name}: GET {target}: the answer is not JSON: {error}") from error
        return value, answer.next_page

    def send(
        self,
        target: str,
        consume: Callable[[Any, Budget], T],
        budget: Budget,
        headers: Headers,
        *,
        more_headers: Callable[[], Headers] = _no_headers,
        absent: type[KernelNotFound] = EntryNotFound,
    ) -> T:
        """What `consume` makes of the response (status below 300, body not read yet), with retries.

        `consume` may raise `Interrupted` to have another attempt; `more_headers` is asked before each.
        """
        budget.request = target
        while True:
            try:
                budget.check()
                return self._attempt(target, consume, budget, {**headers, **more_headers()}, absent)
            except Interrupted as interrupted:
                if given_up := budget.pause(interrupted):
                    raise self._unavailable(target, given_up, interrupted.status) from interrupted

    def _attempt(
        self,
        target: str,
        consume: Callable[[Any, Budget], T],
        budget: Budget,
        headers: Headers,
        absent: type[KernelNotFound],
    ) -> T:
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import get_session

        url = self.base_url + target if target.startswith("/") else target
        session = get_session()
        try:
            with session.stream("GET", url, headers=headers, timeout=budget.timeouts()) as response:
                status = response.status_code
                way = {item.url.scheme for item in (*response.history, response)}
                if url.startswith("https:") and way != {"https"}:
                    raise self._unavailable(target, "it redirects to http:, which anyone can alter")
                if status in RETRIED:
                    after = retry_after(response.headers.get("retry-after"), self.patience.now())
                    raise Interrupted(f"{status} {response.reason_phrase}".rstrip(), status=status, after=after)
                if status >= 300:
                    raise self._refusal(response, target, "authorization" in headers, absent)
                return consume(response, budget)
        except OfflineModeIsEnabled as error:
            raise HubUnavailable(
                f"{self.hub_name} was not asked, because huggingface_hub is offline: GET {target}",
                hub=self.hub_name,
                request=f"GET {target}",
                hint="Unset HF_HUB_OFFLINE to reach it.",
            ) from error
        except _session_errors("TransportError") as error:
            raise Interrupted(reason_of(error)) from error
        except (*_session_errors("HTTPError"), *_session_errors("InvalidURL")) as error:
            raise self._unavailable(target, reason_of(error)) from error
        except UnicodeError as error:
            raise self._unavailable(target, "it redirects to a name that is none") from error

    def _unavailable(self, target: str, reason: str, status: int | None = None) -> HubUnavailable:
        return HubUnavailable(
            f"{self.hub_name} is not available: GET {target}: {reason}",
            hub=self.hub_name,
            request=f"GET {target}",
            status=status,
            hint="Try again later. What is in the store is used with KERNELHUB_OFFLINE=1."
            if status != 429
            else "Too many requests: try again later, or with a token (HF_TOKEN), which hubs allow more.",
        )

    def _refusal(self, response: Any, target: str, with_token: bool, absent: type[KernelNotFound]) -> KernelHubError:
        """The error that a status of 300 to 499 means."""
        status, code = response.status_code, said(response.headers.get("x-error-code", ""))
        told = said(response.headers.get("x-error-message", ""))
        fact = f"{self.hub_name}: GET {target}: {status}" + "".join(f" {text}" for text in (code, told) if text)
        if code == "GatedRepo":
            hint = f"Ask for access on the repository's page, then: {_TOKEN_HINT}"
            return HubUnavailable(fact, hub=self.hub_name, request=f"GET {target}", status=status, hint=hint)
        if code == "RepoNotFound" or (status == 401 and not code and not with_token):
            # Hubs answer 401 for what does not exist, so that nobody learns the names of private repositories.
            return RepositoryNotFound(fact, hint=f"Is the name right? If it is private: {_TOKEN_HINT}")
        if code in ("RevisionNotFound", "EntryNotFound"):
            return EntryNotFound(fact) if code == "EntryNotFound" else KernelNotFound(fact)
        if status == 404 and not code:
            return absent(fact)
        hint = _TOKEN_HINT if status in (401, 403) else "Is the address that of a hub?"
        return HubUnavailable(fact, hub=self.hub_name, request=f"GET {target}", status=status, hint=hint)

    def _next_page(self, response: Any, target: str) -> str | None:
        link: str | None = response.links.get("next", {}).get("url")
        if link is None:
            return None
        try:
            url = urljoin(str(response.url), link)
            elsewhere = _origin(url) != _origin(self.base_url)
        except ValueError as error:
            raise InvalidMetadata(f"{self.hub_name}: GET {target}: no address of a next page: {said(link)}") from error
        if elsewhere:
            raise InvalidMetadata(f"{self.hub_name}: GET {target}: the next page is on another host: {said(link)}")
        return url

    def run_all(self, jobs: Sequence[Callable[[Budget], T]], *, workers: int) -> list[T]:
        """What the jobs return, run by up to `workers` threads; the first error ends all.

        The caller's thread watches. A job that is past its deadline is given up, even where it still sits in a read:
        the session's read timeout starts again with every byte, so a hub that trickles a response's headers would hold
        a thread for hours. Such a thread is a daemon and ends with the connection.
        """
        crew = _Crew(jobs, self.patience)
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(crew.work,), daemon=True)
            for _ in range(min(workers, len(jobs)))
        ]
        try:
            for thread in threads:
                thread.start()
            stalled = crew.wait()
            if stalled is not None:
                raise self._unavailable(stalled.request, "it sent almost nothing")
            return crew.results()
        finally:
            crew.stop()
            end = time.monotonic() + _FAREWELL
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(end - time.monotonic(), 0.0))


class _Crew:
    """Threads that share a list of jobs. `lock` guards everything here; it is held for moments only."""

    def __init__(self, jobs: Sequence[Callable[[Budget], Any]], patience: Patience) -> None:
        self._jobs = jobs
        self._patience = patience
        self._changed = threading.Condition()
        self._next = 0
        self._running: dict[int, Budget] = {}
        self._results: dict[int, Any] = {}
        self._errors: dict[int, BaseException] = {}
        self._stopped = False

    def work(self) -> None:
        """Take jobs until there are none or all is stopped."""
        while True:
            with self._changed:
                index = self._next
                if self._stopped or self._errors or index >= len(self._jobs):
                    return
                self._next += 1
                budget = self._running[index] = Budget(self._patience)
            try:
                result, error = self._jobs[index](budget), None
            except BaseException as caught:  # noqa: BLE001 - `results` raises it in the caller's thread
                result, error = None, caught
            with self._changed:
                del self._running[index]
                if error is not None:
                    self._errors[index] = error
                else:
                    self._results[index] = result
                if error is not None or len(self._results) == len(self._jobs):
                    self._changed.notify_all()

    def wait(self) -> Budget | None:
        """Until all is done or one failed; the budget of a job that is overdue."""
        with self._changed:
            while len(self._results) < len(self._jobs) and not self._errors:
                overdue = next((budget for budget in self._running.values() if budget.overdue), None)
                if overdue is not None:
                    return overdue
                self._changed.wait(1.0)
        return None

    def results(self) -> list[Any]:
        """The results in the order of the jobs; raises the error of the first job that has one."""
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._results[index] for index in range(len(self._jobs))]

    def stop(self) -> None:
        """Begin no further job, and end those that run when they next look."""
        with self._changed:
            self._stopped = True
            for budget in self._running.values():
                budget.cancelled = True


def _session_errors(name: str) -> tuple[type[Exception], ...]:
    """The session's exception classes of this name. huggingface_hub 1 builds on httpx, 2 on its successor httpx2."""
    modules = (sys.modules.get("httpx2"), sys.modules.get("httpx"))
    return tuple(getattr(module, name) for module in modules if module is not None)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    return parts.scheme, parts.hostname, port or {"http": 80, "https": 443}.get(parts.scheme)
