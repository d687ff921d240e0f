"""Requests to a hub: retries, deadlines, what errors mean, and what is sent to whom."""

from __future__ import annotations

import email.utils
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from loopback_hub import LoopbackHub, Reply, Request

from kernelhub.errors import HubUnavailable, InvalidMetadata, KernelNotFound, RepositoryNotFound
from kernelhub.hub.http import EntryNotFound, HttpClient
from kernelhub.hub.patience import Budget, Cancelled, Patience


async def _json_app(scope: Any, receive: Any, send: Any) -> None:
    body = b'{"ok": true}'
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def patience(waits: list[float]) -> Patience:
    """Patience that notes how long it would wait, and does not."""
    return Patience(sleep=waits.append, random=lambda: 1.0, now=lambda: 1_000_000.0)


def client_of(hub: LoopbackHub, patience: Patience, token: str | None = None) -> HttpClient:
    hub.app = hub.app or _json_app
    return HttpClient("the test hub", hub.url, lambda: "agent/1; x", lambda: token, patience)


def test_sends_exactly_the_user_agent_and_no_token_where_there_is_none(hub: LoopbackHub, patience: Patience) -> None:
    assert client_of(hub, patience).get_json("/x") == ({"ok": True}, None)
    (request,) = hub.requests
    assert request.headers["user-agent"] == "agent/1; x"
    assert request.headers["accept-encoding"] == "identity"
    assert "authorization" not in request.headers


def test_sends_the_token(hub: LoopbackHub, patience: Patience) -> None:
    client_of(hub, patience, "secret").get("/x")
    assert hub.requests[0].headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_retries_with_growing_waits(hub: LoopbackHub, patience: Patience, waits: list[float], status: int) -> None:
    hub.fail("/x", status, times=3)
    assert client_of(hub, patience).get_json("/x")[0] == {"ok": True}
    assert waits == [0.5, 1.0, 2.0]
    assert len(hub.requests) == 4


def test_jitter_at_most_halves_the_wait(hub: LoopbackHub, waits: list[float]) -> None:
    hub.fail("/x", 500, times=2)
    client_of(hub, Patience(sleep=waits.append, random=lambda: 0.0)).get("/x")
    assert waits == [0.25, 0.5]


@pytest.mark.parametrize(
    ("header", "wait"),
    [
        ("7", 7.5),
        (email.utils.formatdate(1_000_009, usegmt=True), 9.5),
        (email.utils.formatdate(999_000, usegmt=True), 0.5),  # in the past: only the jitter
        ("soon", 0.5),  # not understood: the usual wait
    ],
)
def test_waits_as_long_as_the_hub_asks(
    hub: LoopbackHub, patience: Patience, waits: list[float], header: str, wait: float
) -> None:
    hub.fail("/x", 429, times=1, retry_after=header)
    client_of(hub, patience).get("/x")
    assert waits == [wait]


def test_gives_up_at_once_where_the_hub_asks_to_wait_too_long(
    hub: LoopbackHub, patience: Patience, waits: list[float]
) -> None:
    hub.fail("/x", 429, retry_after="3600")
    with pytest.raises(HubUnavailable, match="asks to wait 3600 s") as caught:
        client_of(hub, patience).get("/x")
    assert waits == []
    assert len(hub.requests) == 1
    assert "HF_TOKEN" in str(caught.value)


def test_the_error_names_the_hub_the_request_and_the_status(hub: LoopbackHub, patience: Patience) -> None:
    hub.fail("/x", 503)
    with pytest.raises(HubUnavailable) as caught:
        client_of(hub, patience).get("/x?y=1")
    error = caught.value
    assert (error.hub, error.request, error.status) == ("the test hub", "GET /x?y=1", 503)
    for part in ("the test hub", "GET /x?y=1", "503", "5 times"):
        assert part in str(error)
    assert len(hub.requests) == patience.attempts


def test_a_hub_that_is_not_there(patience: Patience, waits: list[float]) -> None:
    with socket.socket() as bound:  # bound and not listening: refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        client = HttpClient("nobody", url, lambda: "a", lambda: None, patience)
        with pytest.raises(HubUnavailable, match=r"nobody .*GET /x: ConnectError.*5 times") as caught:
            client.get("/x")
    assert caught.value.status is None
    assert len(waits) == 4


def test_a_cut_answer_is_asked_for_again(hub: LoopbackHub, patience: Patience) -> None:
    hub.cut("/x", after=3, times=1)
    assert client_of(hub, patience).get_json("/x")[0] == {"ok": True}
    assert len(hub.requests) == 2


def test_a_large_answer_that_is_always_cut(hub: LoopbackHub, patience: Patience) -> None:
    """An answer is not resumed, so its bytes are no progress."""
    hub.break_with("/x", _always_cut)
    with pytest.raises(HubUnavailable, match="5 times"):
        client_of(hub, patience).get("/x")
    assert len(hub.requests) == patience.attempts


def _always_cut(_: Request, reply: Reply) -> None:
    reply.set_body(b" " * 1_000_000)
    reply.cut = 500_000


def test_a_hub_that_stalls_ends_in_an_error(hub: LoopbackHub) -> None:
    hub.stall("/x")
    with pytest.raises(HubUnavailable, match="ReadTimeout"):
        client_of(hub, Patience(read=0.1, total=0.3, backoff=0.01)).get("/x")


def test_a_body_that_trickles_ends_in_an_error(hub: LoopbackHub) -> None:
    """Every read brings a byte, so no read times out; a second passes whenever the clock is read."""
    time = [0.0]

    def clock() -> float:
        time[0] += 1.0
        return time[0]

    async def trickle(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
        await send({"type": "http.response.body", "body": b"1"})

    hub.app = trickle
    client = client_of(hub, Patience(clock=clock, sleep=lambda _: None, total=20.0))
    with pytest.raises(HubUnavailable, match="almost nothing"):
        client.get("/x")


def test_progress_renews_the_budget() -> None:
    time = [0.0]
    budget = Budget(Patience(clock=lambda: time[0], total=10.0))
    budget.failures = 3
    for _ in range(100):
        time[0] += 9.0
        budget.received(64 * 1024)
    assert budget.remaining() == 10.0
    assert budget.failures == 0


@pytest.fixture
def silent() -> Iterator[tuple[str, threading.Event]]:
    """A server that sends a byte of a response's headers and then nothing; the event says that it was asked."""
    asked, done = threading.Event(), threading.Event()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"H")
                asked.set()
                done.wait(30)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        done.set()
        thread.join(timeout=10)


def test_headers_that_trickle_do_not_hold_the_caller(silent: tuple[str, threading.Event]) -> None:
    """The session's read timeout starts again with every byte, so only the watch over the threads can end this."""
    url, asked = silent
    client = HttpClient("slow", url, lambda: "a", lambda: None, Patience(clock=lambda: 1e6 if asked.is_set() else 0.0))
    with pytest.raises(HubUnavailable, match="slow .*almost nothing"):
        client.get("/x")


@pytest.mark.parametrize(
    ("status", "headers", "token", "error"),
    [
        (404, {"x_error_code": "RepoNotFound"}, None, RepositoryNotFound),
        (401, {"x_error_code": "RepoNotFound"}, None, RepositoryNotFound),
        (401, {}, None, RepositoryNotFound),
        (401, {}, "expired", HubUnavailable),
        (403, {"x_error_code": "GatedRepo"}, "good", HubUnavailable),
        (401, {"x_error_code": "GatedRepo"}, None, HubUnavailable),
        (403, {}, "good", HubUnavailable),
        (404, {"x_error_code": "RevisionNotFound"}, None, KernelNotFound),
        (404, {"x_error_code": "EntryNotFound"}, None, EntryNotFound),
        (404, {}, None, EntryNotFound),
        (400, {}, None, HubUnavailable),
        (304, {}, None, HubUnavailable),
    ],
)
def test_what_a_refusal_means(
    hub: LoopbackHub,
    patience: Patience,
    status: int,
    headers: dict[str, str],
    token: str | None,
    error: type[Exception],
) -> None:
    hub.fail("/x", status, x_error_message="because\x85 so", **headers)
    with pytest.raises(error) as caught:
        client_of(hub, patience, token).get("/x")
    assert type(caught.value) is error
    assert f"the test hub: GET /x: {status}" in str(caught.value)
    assert "because? so" in str(caught.value)
    assert len(hub.requests) == 1
    if status in (401, 403):
        assert "HF_TOKEN" in str(caught.value)


def test_the_caller_says_what_a_404_without_a_code_means(hub: LoopbackHub, patience: Patience) -> None:
    hub.fail("/x", 404)
    with pytest.raises(RepositoryNotFound):
        client_of(hub, patience).get("/x", absent=RepositoryNotFound)


def test_answers_are_bounded(hub: LoopbackHub, patience: Patience) -> None:
    client = client_of(hub, patience)
    assert client.get("/x", limit=12).body == b'{"ok": true}'
    with pytest.raises(InvalidMetadata, match="more than 11 bytes"):
        client.get("/x", limit=11)


@pytest.mark.parametrize("body", [b"<html>", b"", b"\xff", b"[" * 100_000])
def test_what_is_not_json(hub: LoopbackHub, patience: Patience, body: bytes) -> None:
    hub.break_with("/x", lambda _, reply: reply.set_body(body))
    with pytest.raises(InvalidMetadata, match=r"the test hub: GET /x: .*not JSON"):
        client_of(hub, patience).get_json("/x")


def _redirect(to: str) -> Callable[[Request, Reply], None]:
    def change(_: Request, reply: Reply) -> None:
        reply.status, reply.headers = 302, {"location": to, "content-length": "0"}
        reply.body = b""

    return change


def test_credentials_stay_on_their_origin(hub: LoopbackHub, patience: Patience) -> None:
    hub.break_with("/away", _redirect(f"{hub.other_origin}/there"))
    hub.break_with("/here", _redirect("/there"))
    client = client_of(hub, patience, "secret")
    for start in ("/away", "/here"):
        assert client.get_json(start)[0] == {"ok": True}
    sent = [
        (request.target, request.headers["host"].split(":")[0], request.headers.get("authorization"))
        for request in hub.requests
    ]
    assert sent == [
        ("/away", "127.0.0.1", "Bearer secret"),
        ("/there", "localhost", None),
        ("/here", "127.0.0.1", "Bearer secret"),
        ("/there", "127.0.0.1", "Bearer secret"),
    ]


def test_redirects_in_a_circle(hub: LoopbackHub, patience: Patience) -> None:
    hub.break_with("/x", _redirect("/x"))
    with pytest.raises(HubUnavailable, match="TooManyRedirects"):
        client_of(hub, patience).get("/x")


def test_the_next_page_is_on_the_same_origin(hub: LoopbackHub, patience: Patience) -> None:
    def link(to: str) -> Callable[[Request, Reply], None]:
        return lambda _, reply: reply.headers.update({"link": f'<{to}>; rel="next"'})

    hub.break_with("/a", link(f"{hub.url}/a?cursor=2"))
    hub.break_with("/b", link("/b?cursor=2"))
    hub.break_with("/c", link(f"{hub.other_origin}/c"))
    client = client_of(hub, patience, "secret")
    assert client.get("/a").next_page == f"{hub.url}/a?cursor=2"
    assert client.get("/b").next_page == f"{hub.url}/b?cursor=2"
    with pytest.raises(InvalidMetadata, match="another host"):
        client.get("/c")
    for path, to in (("/d", "http://["), ("/e", "//[x]/")):
        hub.break_with(path, link(to))
        with pytest.raises(InvalidMetadata, match="no address of a next page"):
            client.get(path)


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "xn--a"])
def test_redirects_to_what_is_no_name(hub: LoopbackHub, patience: Patience, host: str) -> None:
    hub.break_with("/x", _redirect(f"http://{host}/"))
    with pytest.raises(HubUnavailable):
        client_of(hub, patience).get("/x")


def test_json_that_has_no_canonical_text(hub: LoopbackHub, patience: Patience) -> None:
    for path, value in (("/a", ["\ud800"]), ("/b", float("nan"))):
        hub.break_with(path, lambda _, reply, value=value: reply.set_json(value))
        with pytest.raises(InvalidMetadata, match="is not JSON"):
            client_of(hub, patience).get_json(path)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Any], Any]], Any]]:
    """Make huggingface_hub's session one whose answers a function gives; its own is back at the end."""
    import huggingface_hub.utils

    factory = huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY
    http = sys.modules[type(huggingface_hub.utils.get_session()).__module__.partition(".")[0]]

    def use(handler: Callable[[Any], Any]) -> Any:
        transport = http.MockTransport(handler)
        huggingface_hub.utils.set_client_factory(lambda: http.Client(transport=transport, follow_redirects=True))
        return http

    yield use
    huggingface_hub.utils.set_client_factory(factory)


def test_the_session_is_the_one_that_the_user_set(session: Any, patience: Patience) -> None:
    http = session(lambda request: http.Response(200, json={"from": str(request.url)}))
    client = HttpClient("hub", "https://hub.example", lambda: "a", lambda: None, patience)
    assert client.get_json("/x")[0] == {"from": "https://hub.example/x"}


def test_no_answer_over_http_to_a_question_over_https(session: Any, patience: Patience) -> None:
    def answer(request: Any) -> Any:
        if request.url.scheme == "https":
            return http.Response(302, headers={"location": "http://hub.example/x"})
        return http.Response(200, json={})

    http = session(answer)
    with pytest.raises(HubUnavailable, match="redirects to http:"):
        HttpClient("hub", "https://hub.example", lambda: "a", lambda: None, patience).get("/x")


def test_every_request_has_timeouts(session: Any, patience: Patience) -> None:
    seen: list[dict[str, float]] = []

    def answer(request: Any) -> Any:
        seen.append(request.extensions["timeout"])
        return http.Response(200, json={})

    http = session(answer)
    HttpClient("hub", "https://hub.example", lambda: "a", lambda: None, patience).get("/x")
    (timeouts,) = seen
    assert set(timeouts) == {"connect", "read", "write", "pool"}
    assert all(0 < value <= 60 for value in timeouts.values())


def test_huggingface_hub_offline_is_an_answer_and_no_retry(
    hub: LoopbackHub, patience: Patience, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE"):
        client_of(hub, patience).get("/x")
    assert waits == []
    assert hub.requests == []


def test_jobs_run_together_and_answer_in_order(hub: LoopbackHub, patience: Patience) -> None:
    barrier = threading.Barrier(3)

    def job(number: int) -> Callable[[Budget], int]:
        def run(_: Budget) -> int:
            barrier.wait(timeout=30)
            return number

        return run

    assert client_of(hub, patience).run_all([job(number) for number in range(9)], workers=3) == list(range(9))


def test_the_first_error_ends_all_jobs(hub: LoopbackHub, patience: Patience) -> None:
    started = []

    def job(number: int) -> Callable[[Budget], None]:
        def run(_: Budget) -> None:
            started.append(number)
            if number == 2:
                raise InvalidMetadata("the second")

        return run

    with pytest.raises(InvalidMetadata, match="the second"):
        client_of(hub, patience).run_all([job(number) for number in range(50)], workers=1)
    assert started == [0, 1, 2]


def test_an_error_ends_the_jobs_that_run(hub: LoopbackHub, patience: Patience) -> None:
    """So that nothing is written any more when the caller removes what was written."""
    running, ended = threading.Event(), threading.Event()

    def endless(budget: Budget) -> None:
        try:
            while not ended.wait(0):
                budget.received(1_000_000)
                running.set()
        finally:
            ended.set()

    def fails(_: Budget) -> None:
        assert running.wait(30)
        raise InvalidMetadata("the other")

    try:
        with pytest.raises(InvalidMetadata, match="the other"):
            client_of(hub, patience).run_all([endless, fails], workers=2)
        assert ended.wait(30)
    finally:
        ended.set()


def test_a_cancelled_request_is_not_tried_again(hub: LoopbackHub, patience: Patience) -> None:
    hub.fail("/x", 500)
    budget = Budget(replace(patience, sleep=lambda _: setattr(budget, "cancelled", True)))
    client = client_of(hub, budget.patience)
    with pytest.raises(Cancelled):
        client.send("/x", lambda response, budget: None, budget, {})
    assert len(hub.requests) == 1


@pytest.mark.parametrize("way", [["http://b.example/x"], ["http://b.example/x", "https://c.example/x"]])
@pytest.mark.parametrize("status", [200, 404])
def test_no_answer_is_believed_that_came_over_a_way_which_anyone_can_alter(
    session: Any, patience: Patience, way: list[str], status: int
) -> None:
    """Not even that something is not there: another hub would be asked instead."""
    hops = dict(zip(["https://hub.example/x", *way], way, strict=False))

    def handler(request: Any) -> Any:
        there = hops.get(str(request.url))
        return http.Response(302, headers={"location": there}) if there else http.Response(status, json={})

    http = session(handler)
    client = HttpClient("hub", "https://hub.example", lambda: "a", lambda: None, patience)
    with pytest.raises(HubUnavailable, match="redirects to http:, which anyone can alter"):
        client.get("/x")
