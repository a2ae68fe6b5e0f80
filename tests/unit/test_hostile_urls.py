"""No URL that a caller can write leads to the machine itself or the network behind it: not one connection is made."""

import asyncio
import io
import ipaddress
import logging
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from core.addresses import PUBLIC_PORTS
from core.errors import InputFetchFailed, InputUnreachable, UrlNotAllowed
from core.outbound import NoAnswer, Outbound

pytestmark = pytest.mark.anyio

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))

# {} is the port of the server that must not be reached.
REFUSED_AT_ONCE = [
    # Loopback and its neighbours as they are.
    *("http://127.0.0.1:{}/", "http://127.1.2.3:{}/", "http://0.0.0.0:{}/", "http://[::1]:{}/", "http://[::]:{}/"),
    *("http://10.0.0.1:{}/", "http://172.16.0.1:{}/", "http://192.168.0.1:{}/", "http://255.255.255.255:{}/"),
    *("http://169.254.169.254/latest/meta-data/", "http://100.100.100.200/latest/", "http://168.63.129.16/"),
    *("http://192.0.0.192/", "http://[fd00:ec2::254]/latest/", "http://[fe80::1]/", "http://[fec0::1]/"),
    # Other ways to write an IPv4 address: short, octal, hexadecimal, one number, a dot behind it.
    *("http://127.1:{}/", "http://127.0.1:{}/", "http://0:{}/", "http://0177.0.0.1:{}/", "http://0177.1:{}/"),
    *("http://0x7f.0.0.1:{}/", "http://0x7f.1:{}/", "http://0x7f000001:{}/", "http://0X7F000001:{}/"),
    *("http://2130706433:{}/", "http://017700000001:{}/", "http://127.0.0.1.:{}/", "http://127.0.0.01:{}/"),
    *("http://4294967297:{}/", "http://127.0.0.0x1:{}/", "http://00000127.0.0.1:{}/", "http://0x:{}/"),
    # Letters and dots that are made into ASCII on the way.
    *("http://①②⑦.⓪.⓪.①:{}/", "http://１２７.０.０.１:{}/", "http://127。0。0。1:{}/", "http://127．0｡0．1:{}/"),
    *("http://²¹³⁰⁷⁰⁶⁴³³:{}/", "http://０x7f000001:{}/", "http://127%2e0%2e0%2e1:{}/", "http://%31%32%37.0.0.1:{}/"),
    # IPv4 inside IPv6, and zones.
    *("http://[::ffff:127.0.0.1]:{}/", "http://[::ffff:7f00:1]:{}/", "http://[0:0:0:0:0:ffff:7f00:1]:{}/"),
    *("http://[::127.0.0.1]:{}/", "http://[::ffff:0:127.0.0.1]:{}/", "http://[64:ff9b::127.0.0.1]:{}/"),
    *("http://[64:ff9b:1::7f00:1]:{}/", "http://[2002:7f00:1::]:{}/", "http://[2001:0:7f00:1::]:{}/"),
    *("http://[0000:0000:0000:0000:0000:0000:0000:0001]:{}/", "http://[::1%25lo]:{}/", "http://[::1%lo]:{}/"),
    *("http://[fe80::1%25lo]:{}/", "http://[2606:4700::1111%25lo]:{}/", "http://[127.0.0.1]:{}/"),
    # What one parser takes for the host and another for something else.
    *("http://127.0.0.1:{}\\@example.com/", "http://example.com\\@127.0.0.1:{}/", "http:\\\\127.0.0.1:{}\\"),
    *(
        "http://a@127.0.0.1:{}/",
        "http://a:b@127.0.0.1:{}/",
        "http://example.com@127.0.0.1:{}/",
        "http://@127.0.0.1:{}/",
    ),
    *("http://:@127.0.0.1:{}/", "http://8.8.8.8:80@127.0.0.1:{}/", "http://127.0.0.1:{}@8.8.8.8:6379/"),
    *("http://8.8.8.8%00@127.0.0.1:{}/", "http://127.0.0.1:{}%40example.com/", "http://[::1]:{}]/", "http://[::1:{}/"),
    *(
        "http://127.0.0.1:{} @example.com/",
        "http://127.0.0.1\t:{}/",
        "http://127.0.0.1\r\n:{}/",
        "\thttp://127.0.0.1:{}/",
    ),
    *("http://127.0.0.1:{}/\r\nHost: a", "http://example.com\x00.127.0.0.1:{}/", "http://\u00ad127.0.0.1:{}/"),
    # Other schemes, none, and hosts that are missing.
    *("file:///etc/passwd", "gopher://127.0.0.1:{}/_PING", "ftp://127.0.0.1:{}/", "dict://127.0.0.1:{}/info"),
    *("ws://127.0.0.1:{}/", "unix:///var/run/docker.sock", "jar:http://127.0.0.1:{}/!/", "//127.0.0.1:{}/"),
    *("http:127.0.0.1:{}/", "http:/127.0.0.1:{}/", "http:///127.0.0.1:{}/", "127.0.0.1:{}", "url:http://127.0.0.1:{}/"),
    # Ports.
    *(
        "http://127.0.0.1:0/",
        "http://8.8.8.8:0/",
        "http://8.8.8.8:22/",
        "http://8.8.8.8:6379/",
        "http://8.8.8.8:65536/",
    ),
    *("http://8.8.8.8:-80/", "http://8.8.8.8:80:{}/", "http://8.8.8.8:8O/", "http://example.com:6379/"),
    "http://127.0.0.1:{}/".ljust(10_000, "a"),
]

BAD_ADDRESSES = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "100.64.0.1", "169.254.169.254", "172.31.0.1", "192.0.0.8"),
    *("192.168.1.1", "198.18.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "::ffff:127.0.0.1", "::127.0.0.1"),
    *("64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "fc00::1", "fe80::1", "fe80::1%lo", "fec0::1", "ff02::1"),
]

NAMES = ["localhost", "localhost.", "LOCALHOST", "ⓛocalhost", "127.0.0.1.nip.io", "metadata.google.internal", "redis"]

Send = Callable[[Outbound, str], Awaitable[object]]

SENDS: dict[str, Send] = {
    "fetch": lambda outbound, url: outbound.fetch(url, 1000, 2),
    "post": lambda outbound, url: outbound.post(url, b"{}", {}, 2),
    "put": lambda outbound, url: outbound.put(url, io.BytesIO(b"data"), "image/png", 2),
}


@dataclass
class Listener:
    """A server on loopback, over IPv4 and IPv6, that counts the connections it gets and answers 404."""

    port: int
    accepted: list[str] = field(default_factory=list[str])


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Generator[Listener]:
    """A Listener whose port counts as a public one: then it is by its address, and nothing else, that it is safe."""
    servers: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as four:
        listener = Listener(four.getsockname()[1])
        servers.append(four)
        if socket.has_ipv6:
            with suppress(OSError):  # there are machines without it
                servers.append(socket.create_server(("::1", listener.port), family=socket.AF_INET6))
        monkeypatch.setattr("core.addresses.PUBLIC_PORTS", (*PUBLIC_PORTS, listener.port))
        threads = [threading.Thread(target=_serve, args=(server, listener)) for server in servers]
        for thread in threads:
            thread.start()
        yield listener
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            server.close()


def _serve(server: socket.socket, listener: Listener) -> None:
    while True:
        try:
            connection, address = server.accept()
        except OSError:
            return
        listener.accepted.append(address[0])
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


class Answers(AbstractResolver):
    """Answers each look-up with the next of the given lists of addresses, and then always with the last."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = answers
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        addresses = self._answers[min(len(self.asked), len(self._answers) - 1)]
        self.asked.append(host)
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address, family in zip(addresses, families, strict=True)
        ]

    async def close(self) -> None:
        pass


def _always(*_: object) -> bool:
    return True


@asynccontextmanager
async def _resolving(*answers: Sequence[str], allow: bool = False) -> AsyncGenerator[tuple[Outbound, Answers]]:
    resolver = Answers(*answers)
    async with Outbound(LOOPBACK if allow else (), resolver=resolver) as outbound:
        yield outbound, resolver


async def test_there_are_enough_hostile_urls() -> None:
    assert len(set(REFUSED_AT_ONCE)) == len(REFUSED_AT_ONCE) >= 100


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
async def test_a_hostile_url_is_refused_before_anything_is_looked_up_or_connected_to(
    listener: Listener, send: Send
) -> None:
    async with _resolving(["127.0.0.1"]) as (outbound, resolver):
        for url in REFUSED_AT_ONCE:
            with pytest.raises(UrlNotAllowed):
                await send(outbound, url.replace("{}", str(listener.port)))
            assert resolver.asked == [], url
    assert listener.accepted == []


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
async def test_a_literal_address_that_its_text_did_not_give_away_is_refused_when_it_is_connected_to(
    listener: Listener, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.addresses.permits", _always)  # the look at the text, and only that
    for address in BAD_ADDRESSES:
        host = f"[{address.replace('%', '%25')}]" if ":" in address else address
        async with Outbound() as outbound:
            with pytest.raises(UrlNotAllowed):
                await send(outbound, f"http://{host}:{listener.port}/")
    assert listener.accepted == []


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
async def test_a_name_of_a_bad_address_is_refused_even_beside_good_ones(listener: Listener, send: Send) -> None:
    for address in BAD_ADDRESSES:
        for answer in ([address], ["8.8.8.8", address], [address, "2606:4700::1111"]):
            async with _resolving(answer) as (outbound, resolver):
                with pytest.raises(UrlNotAllowed):
                    await send(outbound, f"http://example.com:{listener.port}/")
                assert resolver.asked == ["example.com"]
    assert listener.accepted == []


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
async def test_names_that_mean_this_machine_are_refused(listener: Listener, send: Send) -> None:
    async with _resolving(["127.0.0.1", "::1"]) as (outbound, resolver):
        for name in NAMES:
            with pytest.raises(UrlNotAllowed):
                await send(outbound, f"http://{name}:{listener.port}/")
        assert len(resolver.asked) >= len({name.lower() for name in NAMES}) - 1  # Ⓛ is an l
    assert listener.accepted == []


@pytest.mark.parametrize("name", ["localhost", "localhost.", "ⓛocalhost"])
async def test_the_system_s_own_answer_for_localhost_is_refused(listener: Listener, name: str) -> None:
    async with Outbound() as outbound:
        with pytest.raises((UrlNotAllowed, InputUnreachable)):  # not every system knows the one with a dot
            await outbound.fetch(f"http://{name}:{listener.port}/", 1000, 2)
    assert listener.accepted == []


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where a connection was asked for; none is made."""
    addresses: list[str] = []

    async def connect(_: object, __: socket.socket, address: tuple[str, int]) -> None:
        addresses.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr("asyncio.selector_events.BaseSelectorEventLoop.sock_connect", connect)
    return addresses


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
async def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    listener: Listener, connected: list[str], send: Send
) -> None:
    async with _resolving(["8.8.8.8"], ["127.0.0.1"]) as (outbound, resolver):
        for _ in range(2):  # for a moment it is not looked up again
            with pytest.raises((InputUnreachable, NoAnswer)):
                await send(outbound, f"http://rebinding.example:{listener.port}/")
        assert resolver.asked == ["rebinding.example"]
    assert connected == ["8.8.8.8", "8.8.8.8"]


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
async def test_a_name_that_means_another_address_the_second_time_is_refused_then(
    listener: Listener, connected: list[str], send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.outbound.DNS_CACHE_SECONDS", 0)
    async with _resolving(["8.8.8.8"], ["127.0.0.1"]) as (outbound, resolver):
        for error in ((InputUnreachable, NoAnswer), UrlNotAllowed):
            with pytest.raises(error):
                await send(outbound, f"http://rebinding.example:{listener.port}/")
        assert len(resolver.asked) == 2
    assert connected == ["8.8.8.8"]
    assert listener.accepted == []


LOCATIONS = [
    *("http://127.0.0.1:{}/", "//127.0.0.1:{}/", "http://[::1]:{}/", "http://0x7f.1:{}/", "//[::ffff:127.0.0.1]:{}/"),
    *("http://2130706433:{}/", "http://127。0。0。1:{}/", "http://a:b@127.0.0.1:{}/", "http://a@8.8.8.8/"),
    *("http://internal.example:{}/", "//aaaa.example:{}/", "\\\\127.0.0.1:{}\\", "/\\127.0.0.1:{}/"),
    *("http://169.254.169.254/latest/", "file:///etc/passwd", "gopher://127.0.0.1:{}/", "ftp://127.0.0.1:{}/"),
    *("data:image/png;base64,AAAA", "http://[::1", "http://8.8.8.8:22/", "http://" + "a" * 8000 + ":{}/"),
]


async def test_no_redirect_leads_to_where_a_url_would_not(listener: Listener) -> None:
    locations = iter(LOCATIONS)

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        location = next(locations).replace("{}", str(listener.port))
        writer.write(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n".encode())
        writer.write(b"Connection: close\r\n\r\n")
        writer.close()

    # Another address of this machine, which is allowed, while the listener's is not.
    async with await asyncio.start_server(redirect, "127.0.0.77", 0) as server:
        url = f"http://127.0.0.77:{server.sockets[0].getsockname()[1]}/a"
        resolver = Answers(["127.0.0.1"])
        async with Outbound((ipaddress.ip_network("127.0.0.77/32"),), resolver=resolver) as outbound:
            for _ in LOCATIONS:
                with pytest.raises(UrlNotAllowed):
                    await outbound.fetch(url, 1000, 2)
    assert next(locations, None) is None
    assert resolver.asked == ["internal.example", "aaaa.example"]
    assert listener.accepted == []


@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "allowed.example"])
async def test_the_same_server_is_reached_where_the_operator_allows_it(
    listener: Listener, send: Send, host: str
) -> None:
    async with _resolving(["127.0.0.1"], allow=True) as (outbound, _):
        with suppress(InputFetchFailed):  # it answers 404
            await send(outbound, f"http://{host}:{listener.port}/")
    assert listener.accepted == ["::1" if host == "[::1]" else "127.0.0.1"]


async def test_a_refusal_tells_the_log_the_address_and_the_caller_nothing(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    async with _resolving(["10.11.12.13"]) as (outbound, _):
        with caplog.at_level(logging.INFO), pytest.raises(UrlNotAllowed) as refused:
            await outbound.fetch(f"http://internal.example:{listener.port}/", 1000, 2)
    assert "10.11.12.13" in caplog.text
    assert "internal.example" in caplog.text
    assert str(refused.value) == "The URL leads to an address that this service does not reach."
