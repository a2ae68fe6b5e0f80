"""Clients that are slow, or send what is no request, at a real server."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import httpx2 as httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from api import middleware, protocol, server
from cli.embedded import Redis
from core.settings import load_settings
from core.storage import LocalStorage
from tests.apis import Api, open_apis, until
from tests.requests import png

PICTURE = "uploads/00000000-0000-4000-8000-000000000001.png"
GET = b"GET /healthz HTTP/1.1\r\nHost: upscaled\r\n"
LARGE_BYTES = 12 * 1024 * 1024


@pytest.fixture(scope="module")
def api(redis_server: Redis, tmp_path_factory: pytest.TempPathFactory) -> Generator[Api]:
    """An API that is impatient, and serves without a database all that needs no key."""
    settings = load_settings(
        database_url="postgresql://nobody@127.0.0.1:9/nothing",
        redis_url=redis_server.url,
        secret_key="a secret of thirty-two characters",
        storage_dir=tmp_path_factory.mktemp("storage"),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HEAD_SECONDS", "STALLED_SECONDS"):
            patch.setattr(protocol, name, 0.4)
        patch.setattr(protocol, "LINGER_SECONDS", 0.2)
        for name in ("PAUSE_SECONDS", "GRACE_SECONDS"):
            patch.setattr(middleware, name, 0.4)
        patch.setattr(server, "KEEP_ALIVE_SECONDS", 1)
        with open_apis(settings, "none", 1) as apis:
            yield apis[0]


class Line:
    """A bare connection to an API."""

    def __init__(self, opened: socket.socket) -> None:
        self._socket = opened

    def say(self, *parts: bytes, pause: float = 0.0) -> None:
        for part in parts:
            self._socket.sendall(part)
            time.sleep(pause)

    def hear(self) -> bytes:
        """Return all that comes until the other side closes."""
        heard = bytearray()
        while part := self.hear_some():
            heard += part
        return bytes(heard)

    def hear_some(self, most: int = 1024 * 1024) -> bytes:
        return self._socket.recv(most)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read to the end; return status, headers and body of the one answer."""
        head, _, body = self.hear().partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert len(body) == int(headers["content-length"])
        return int(status.split()[1]), headers, body

    def problem(self) -> tuple[int, str]:
        """Read to the end; return status and code of the one answer, which is a problem in our form."""
        status, headers, body = self.answer()
        problem = json.loads(body)
        assert (headers["content-type"], headers["connection"]) == ("application/json", "close")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-request-id"] == problem["request_id"]
        assert problem["status"] == status
        return status, problem["code"]


@contextmanager
def call(api: Api, receive_bytes: int | None = None) -> Generator[Line]:
    url = httpx.URL(api.client.base_url)
    with socket.socket() as opened:
        opened.settimeout(5)
        if receive_bytes is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        opened.connect((url.host, url.port))
        yield Line(opened)


@pytest.fixture
def line(api: Api) -> Generator[Line]:
    with call(api) as line:
        yield line


def _storage(api: Api) -> LocalStorage:
    storage = api.parts.storage
    assert isinstance(storage, LocalStorage)
    return storage


async def _put_head(api: Api, data: bytes) -> bytes:
    """Return the head of a request that puts a picture."""
    storage = _storage(api)
    storage.path(PICTURE).unlink(missing_ok=True)
    signed = await storage.sign_put(PICTURE, "image/png", len(data), datetime.now(UTC) + timedelta(minutes=5))
    headers = "".join(f"{name}: {value}\r\n" for name, value in signed.headers.items())
    return f"PUT {httpx.URL(signed.url).raw_path.decode()} HTTP/1.1\r\nHost: upscaled\r\n{headers}\r\n".encode()


@asynccontextmanager
async def _serving(app: ASGIApp) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Serve some application by our protocol; yield a connection to it."""
    config, state = uvicorn.Config(app, http=protocol.Protocol, log_config=None), ServerState()
    config.load()
    loop = asyncio.get_running_loop()
    served = await loop.create_server(lambda: protocol.Protocol(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*served.sockets[0].getsockname())
    yield reader, writer
    writer.close()
    served.close()
    await served.wait_closed()


async def _answer(send: Send, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# Headers


def test_headers_that_come_a_byte_at_a_time_are_waited_for_no_longer_than_any(line: Line) -> None:
    began = time.monotonic()
    line.say(b"GE", b"T /", b"heal", pause=0.1)
    assert line.problem() == (408, "request_too_slow")
    assert time.monotonic() - began < protocol.HEAD_SECONDS + 0.3


def test_a_connection_on_which_nothing_is_said_is_closed(line: Line) -> None:
    assert line.hear() == b""


def test_the_next_request_of_a_connection_may_take_no_longer(line: Line) -> None:
    line.say(GET + b"\r\n")
    time.sleep(0.5)  # idle is no slowness
    line.say(b"\r\n", b"GET /healthz", b" HTTP/1.1\r\n", pause=0.1)
    first, _, rest = line.hear().partition(b"HTTP/1.1 408 ")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert b"request_too_slow" in rest


def test_empty_lines_keep_no_connection_open(line: Line) -> None:
    line.say(GET + b"\r\n")
    with pytest.raises(OSError, match=r"reset|pipe"):
        for _ in range(40):
            line.say(b"\r\n", pause=0.05)


def test_a_request_that_is_still_answered_is_not_cut_off_by_the_time_of_headers(api: Api, line: Line) -> None:
    line.say(GET + b"Connection: close\r\n\r\n")
    assert line.answer()[0] == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (GET + b"X-Long: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (GET + b"X-Never-Ending: " + b"a" * 200_000, 431),
        (GET + b"".join(b"X-%d: 1\r\n" % number for number in range(101)) + b"\r\n", 431),
        (b"\r\n" * 20_000, 431),
    ],
    ids=["url", "header", "open header", "many headers", "empty lines"],
)
def test_what_comes_without_a_body_has_limits(line: Line, head: bytes, status: int) -> None:
    try:
        line.say(head)
        assert line.problem()[0] == status
    except ConnectionError:  # we sent on after it had closed, which takes the answer away
        assert len(head) > 40_000


@pytest.mark.parametrize(
    "request_line",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /healthz HTTP/9.9\r\n\r\n",
        b"CONNECT 127.0.0.1:5432 HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        GET + b"X-Bad : 1\r\n\r\n",
        GET + b"X-Bad: a\0b\r\n\r\n",
        *(
            b"POST /healthz HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n"
            for length in (
                b"Content-Length: -1\r\n",
                b"Content-Length: 1e3\r\n",
                b"Content-Length: 0x10\r\n",
                b"Content-Length: " + b"9" * 40 + b"\r\n",
                b"Content-Length: 1\r\nContent-Length: 2\r\n",
                b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
                b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
                b"Transfer-Encoding: chunked, identity\r\n",
            )
        ),
    ],
)
def test_what_is_no_request_is_answered_in_our_form(line: Line, request_line: bytes) -> None:
    line.say(request_line)
    assert line.problem() == (400, "bad_request")


@pytest.mark.anyio
async def test_what_follows_a_chunked_body_does_not_pass_for_a_header() -> None:
    async def show(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await _answer(send, b" ".join(name for name, _ in scope["headers"]))

    async with _serving(show) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"1\r\na\r\n0\r\nX-API-Key: smuggled\r\n\r\n")
        assert (await reader.read()).endswith(b"\r\n\r\nconnection transfer-encoding")


def test_an_upgrade_is_not_made(line: Line) -> None:
    line.say(GET + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n")
    assert line.hear().startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("wanted", ["GET /healthz", "CONNECT /v2/nothing"])
def test_what_follows_a_wish_for_an_upgrade_is_no_request(line: Line, wanted: str) -> None:
    wish = f"{wanted} HTTP/1.1\r\nHost: upscaled\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n".encode()
    line.say(wish, GET + b"\r\n", pause=0.1)
    assert line.hear().count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("length", ["Content-Length: 33", "Transfer-Encoding: chunked"])
def test_the_body_of_a_wish_for_an_upgrade_does_not_pass_for_a_request(line: Line, length: str) -> None:
    head = f"POST /v2/uploads HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n{length}\r\n\r\n".encode()
    line.say(head, GET + b"\r\n", pause=0.1)
    assert line.problem() == (400, "bad_request")


# Bodies


@pytest.mark.anyio
async def test_a_body_that_stops_coming_is_given_up(api: Api, line: Line) -> None:
    line.say(await _put_head(api, png(8, 8)), b"\x89PNG")
    assert line.problem() == (408, "request_too_slow")
    assert not _storage(api).path(PICTURE).exists()


@pytest.mark.anyio
async def test_a_put_does_not_go_on_until_nobody_looks_for_what_it_stores(
    api: Api, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.files.LATE_SECONDS", -600.0)
    line.say(await _put_head(api, png(8, 8)), png(8, 8)[:-1])
    assert line.problem() == (408, "request_too_slow")
    assert not _storage(api).path(PICTURE).exists()


@pytest.mark.anyio
async def test_a_body_that_trickles_is_given_up(api: Api, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "PAUSE_SECONDS", 30)
    line.say(await _put_head(api, png(80, 80)), *[b"a"] * 5, pause=0.1)
    assert line.problem() == (408, "request_too_slow")


@pytest.mark.anyio
async def test_what_is_said_beside_a_chunk_has_limits_too(api: Api, line: Line) -> None:
    head = (await _put_head(api, png(8, 8))).replace(b"Content-Length", b"X-Length")
    line.say(head.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n1;"), b"a" * 33_000, pause=0.1)
    assert line.problem() == (431, "bad_request")


@pytest.mark.anyio
async def test_a_slow_body_that_keeps_coming_is_taken(api: Api, line: Line) -> None:
    data = png(64, 64) + bytes(9000)
    parts = [data[at : at + 1500] for at in range(0, len(data), 1500)]
    line.say((await _put_head(api, data)).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), *parts, pause=0.12)
    assert line.answer()[0] == 200
    assert _storage(api).path(PICTURE).read_bytes() == data


def test_who_is_refused_while_sending_can_read_why(line: Line) -> None:
    head = b"POST /v2/uploads HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
    line.say(head, *[bytes(100_000)] * 10, pause=0.01)
    assert line.problem() == (413, "payload_too_large")


def test_an_answered_request_whose_body_goes_on_is_not_read_for_ever(api: Api, line: Line) -> None:
    line.say(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
    with pytest.raises(OSError, match=r"reset|pipe"):
        for _ in range(40):
            line.say(b"a", pause=0.05)


# Answers


def _stored(api: Api, size_bytes: int) -> Path:
    path = _storage(api).path(PICTURE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


async def _get(api: Api) -> bytes:
    url = await _storage(api).url(PICTURE, datetime.now(UTC) + timedelta(minutes=5))
    return f"GET {httpx.URL(url).raw_path.decode()} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def _connections(api: Api) -> int:
    return len(api.server.server_state.connections)


@pytest.mark.anyio
async def test_who_stops_reading_an_answer_loses_the_connection(api: Api) -> None:
    _stored(api, LARGE_BYTES)
    until(lambda: _connections(api) == 0, 5)
    with call(api, receive_bytes=4096) as line:
        line.say(await _get(api))
        until(lambda: _connections(api) == 1, 2)
        until(lambda: _connections(api) == 0, 3)
        with pytest.raises(ConnectionResetError):
            line.hear()


@pytest.mark.anyio
async def test_who_reads_an_answer_slowly_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 0.2)

    async def send_at_once(_scope: Scope, _receive: Receive, send: Send) -> None:
        await _answer(send, bytes(LARGE_BYTES))

    async with _serving(send_at_once) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        began, heard = time.monotonic(), 0
        while part := await reader.read(64 * 1024):
            heard += len(part)
            await anyio.sleep(0.003)
    assert heard > LARGE_BYTES
    assert time.monotonic() - began > 2 * protocol.STALLED_SECONDS


# All together


def test_too_many_connections_are_told_so(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    until(lambda: _connections(api) == 0, 5)
    monkeypatch.setattr(api.server.config, "limit_concurrency", 2)
    with call(api) as first, call(api) as second:
        second.say(GET + b"\r\n")
        status, headers, body = second.answer()
        assert (status, json.loads(body)["code"]) == (503, "unavailable")
        assert int(headers["retry-after"]) > 0
        first.say(GET + b"Connection: close\r\n\r\n")
        assert first.answer()[0] == 200


def test_a_server_does_not_say_what_it_is(api: Api) -> None:
    assert "server" not in api.client.get("/healthz").headers
