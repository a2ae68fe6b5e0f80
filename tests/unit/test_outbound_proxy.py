"""With a forward proxy every request goes through it, and what it is told of us goes no further."""

import asyncio
import io
import ipaddress
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from core.errors import InputUnreachable, UrlNotAllowed
from core.outbound import NoAnswer, Outbound
from tests.web import Web

pytestmark = pytest.mark.anyio

TARGET = "target.example"


def _proxy(web: Web, user: str = "") -> str:
    return web.url.replace("http://", f"http://{user}")


async def test_a_proxy_is_asked_for_what_is_behind_a_name_and_its_own_address_is_not_judged(web: Web) -> None:
    web.serve(f"http://{TARGET}/a.png", b"image")
    async with Outbound(proxy=_proxy(web)) as outbound:
        assert await outbound.fetch(f"http://{TARGET}/a.png", 1000, 5) == b"image"
    (seen,) = web.seen
    assert (seen.path, seen.headers["Host"]) == (f"http://{TARGET}/a.png", TARGET)
    assert "Proxy-Authorization" not in seen.headers


async def test_a_redirect_goes_through_the_proxy_too(web: Web) -> None:
    web.serve(f"http://{TARGET}/a", status=302, Location="//other.example/b")
    web.serve("http://other.example/b", b"image")
    async with Outbound(proxy=_proxy(web)) as outbound:
        assert await outbound.fetch(f"http://{TARGET}/a", 1000, 5) == b"image"


async def test_a_proxy_that_asks_for_a_password_gets_it_each_time(web: Web) -> None:
    web.serve(f"http://{TARGET}/a", b"x")
    async with Outbound(proxy=_proxy(web, "user:p%40ss@")) as outbound:
        await outbound.fetch(f"http://{TARGET}/a", 1000, 5)
        await outbound.post(f"http://{TARGET}/a", b"", {}, 5)
        await outbound.put(f"http://{TARGET}/a", io.BytesIO(b""), "image/png", 5)
    assert [seen.headers["Proxy-Authorization"] for seen in web.seen] == ["Basic dXNlcjpwQHNz"] * 3


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://10.0.0.1/",
        f"http://{TARGET}:8080/",
        f"http://a:b@{TARGET}/",
        "ftp://a/",
    ],
)
async def test_literal_addresses_ports_and_schemes_are_refused_before_the_proxy_hears_of_them(
    web: Web, url: str
) -> None:
    # A port may not be judged by the address here: no network that is allowed lets it pass.
    async with Outbound((ipaddress.ip_network("192.0.2.0/24"),), _proxy(web)) as outbound:
        with pytest.raises(UrlNotAllowed):
            await outbound.fetch(url, 1000, 5)
    assert web.seen == []


async def test_an_https_url_is_tunnelled_and_its_server_sees_nothing_of_the_proxy_s_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, trusted = _certified(tmp_path)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusted)
    async with _tunnel(200, served) as tunnel, Outbound(proxy=tunnel.url) as outbound:
        assert await outbound.fetch(f"https://{TARGET}/a.png", 1000, 5) == b"image"
    connect, get = tunnel.heads
    assert connect.startswith(f"CONNECT {TARGET}:443 ")
    assert "Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=" in connect
    assert get.startswith("GET /a.png ")
    assert "authorization" not in get.lower()


async def test_a_server_whose_certificate_nobody_vouches_for_is_told_nothing(tmp_path: Path) -> None:
    served, _ = _certified(tmp_path)
    async with _tunnel(200, served) as tunnel, Outbound(proxy=tunnel.url) as outbound:
        with pytest.raises(InputUnreachable):
            await outbound.fetch(f"https://{TARGET}/a.png", 1000, 5)
        with pytest.raises(NoAnswer):
            await outbound.put(f"https://{TARGET}/a.png", io.BytesIO(b"secret"), "image/png", 5)
    assert {head.split()[0] for head in tunnel.heads} == {"CONNECT"}


@pytest.mark.parametrize("status", [403, 407])
async def test_what_a_proxy_refuses_is_not_allowed(status: int, caplog: pytest.LogCaptureFixture) -> None:
    async with _tunnel(status) as tunnel, Outbound(proxy=tunnel.url) as outbound:
        with pytest.raises(UrlNotAllowed) as refused:
            await outbound.fetch(f"https://{TARGET}/", 1000, 5)
    assert str(refused.value) == "The URL leads to an address that this service does not reach."
    assert TARGET in caplog.text
    assert "secret" not in caplog.text


async def test_a_proxy_refuses_a_plain_url_by_407(web: Web) -> None:
    web.serve(f"http://{TARGET}/", status=407)
    async with Outbound(proxy=_proxy(web)) as outbound:
        with pytest.raises(UrlNotAllowed):
            await outbound.post(f"http://{TARGET}/", b"", {}, 5)


async def test_a_proxy_that_cannot_connect_or_be_reached_is_no_answer() -> None:
    async with _tunnel(502) as tunnel, Outbound(proxy=tunnel.url) as outbound:
        with pytest.raises(NoAnswer, match="No answer: the proxy could not connect"):
            await outbound.put(f"https://{TARGET}/", io.BytesIO(b""), "image/png", 5)
    async with Outbound(proxy="http://user:secret@127.0.0.1:9") as outbound:
        with pytest.raises(InputUnreachable):
            await outbound.fetch(f"http://{TARGET}/", 1000, 5)


@pytest.mark.parametrize("url", [f"http://{TARGET}/", f"https://{TARGET}/"])
@pytest.mark.parametrize("reached", [True, False])
async def test_no_error_of_a_proxy_shows_its_password(url: str, *, reached: bool) -> None:
    async with _tunnel(502) as tunnel:
        proxy = tunnel.url if reached else "http://user:secret@127.0.0.1:9"
        async with Outbound(proxy=proxy) as outbound:
            with pytest.raises(InputUnreachable) as raised:
                await outbound.fetch(url, 1000, 5)
    error: BaseException | None = raised.value
    while error is not None:
        assert "secret" not in str(error)
        assert "dXNlcjpzZWNyZXQ" not in str(error)
        error = error.__context__


@dataclass
class _Tunnel:
    """A proxy that answers a CONNECT with a status and, at 200, is the server behind it as well."""

    url: str = ""
    heads: list[str] = field(default_factory=list[str])


@asynccontextmanager
async def _tunnel(status: int, served: ssl.SSLContext | None = None) -> AsyncGenerator[_Tunnel]:
    tunnel = _Tunnel()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tunnel.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        length = "" if status == 200 else "Content-Length: 0\r\n"  # to a CONNECT that succeeds there is no body
        writer.write(f"HTTP/1.1 {status} A\r\n{length}\r\n".encode())
        if served is not None:
            try:
                await writer.start_tls(served)
            except (ssl.SSLError, ConnectionError):  # the client does not believe it
                writer.close()
                return
            tunnel.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nimage")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        tunnel.url = f"http://user:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield tunnel


def _certified(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return how a server proves to be TARGET, and how a client believes it."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, TARGET)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TARGET)]), critical=False)
        .sign(key, hashes.SHA256())
    ).public_bytes(serialization.Encoding.PEM)
    file = folder / "both.pem"
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file.write_bytes(certificate + key.private_bytes(serialization.Encoding.PEM, *form))
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(file)
    return served, ssl.create_default_context(cadata=certificate.decode())
