"""Which addresses the service reaches, and how an image is fetched."""

import gzip
import ipaddress
import socket
import threading

import pytest

from core.errors import InputFetchFailed, InputTooLarge, InputUnreachable, UrlNotAllowed
from core.outbound import Outbound, check_url, is_public
from tests.web import Reply, Web

pytestmark = pytest.mark.anyio

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "2001:4860:4860::8888"]
)
def test_public_addresses_are_reached(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "169.254.169.254", "172.16.0.1"),
        *("192.0.0.8", "192.0.0.10", "192.0.2.1", "192.168.1.1", "198.18.0.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:169.254.169.254"),
        *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2001:0:53aa:64c:1c::1", "2001:db8::1", "2002:a9fe:a9fe::1"),
        *("fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1"),
    ],
)
def test_addresses_of_other_kinds_are_not_reached(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    ["", "photo.png", "ftp://example.com/a", "file:///etc/passwd", "https://", "http://[::1", "https://a:b@c.com/"],
)
def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(UrlNotAllowed):
        check_url(url)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
async def test_no_spelling_of_loopback_gets_a_connection(web: Web, host: str) -> None:
    port = web.url.rpartition(":")[2]
    async with Outbound() as outbound:
        with pytest.raises((UrlNotAllowed, InputUnreachable, InputFetchFailed)):
            await outbound.fetch(f"http://{host}:{port}/", 1000, 5)
    assert web.seen == []


async def test_a_public_address_is_refused_on_another_port() -> None:
    async with Outbound() as outbound:
        with pytest.raises(UrlNotAllowed):
            await outbound.fetch("http://8.8.8.8:6379/", 1000, 5)


async def test_an_image_is_fetched_from_an_allowed_network(web: Web) -> None:
    async with Outbound(LOOPBACK) as outbound:
        assert await outbound.fetch(web.serve("/a.png", b"bytes"), 1000, 5) == b"bytes"
    assert web.seen[0].headers["Accept-Encoding"] == "identity"


async def test_a_redirect_is_checked_like_the_first_url(web: Web) -> None:
    url = web.serve("/a", status=302, Location="http://169.254.169.254/latest/meta-data")
    async with Outbound(LOOPBACK) as outbound:
        with pytest.raises(UrlNotAllowed):
            await outbound.fetch(url, 1000, 5)


async def test_a_redirect_to_another_scheme_is_refused(web: Web) -> None:
    async with Outbound(LOOPBACK) as outbound:
        with pytest.raises(UrlNotAllowed):
            await outbound.fetch(web.serve("/a", status=302, Location="file:///etc/passwd"), 1000, 5)


async def test_redirects_end_after_the_third(web: Web) -> None:
    async with Outbound(LOOPBACK) as outbound:
        with pytest.raises(InputFetchFailed, match="more than 3 times"):
            await outbound.fetch(web.serve("/a", status=302, Location="/a"), 1000, 5)
    assert len(web.seen) == 4


async def test_a_body_is_cut_off_at_the_limit_whatever_its_headers_say(web: Web) -> None:
    async with Outbound(LOOPBACK) as outbound:
        assert len(await outbound.fetch(web.serve("/a", b"x" * 1000), 1000, 5)) == 1000
        with pytest.raises(InputTooLarge):
            await outbound.fetch(web.serve("/b", b"x" * 1001), 1000, 5)


async def test_a_compressed_body_is_refused(web: Web) -> None:
    url = web.serve("/a", gzip.compress(b"x" * 1000), Content_Encoding="gzip")
    async with Outbound(LOOPBACK) as outbound:
        with pytest.raises(InputFetchFailed, match="compressed"):
            await outbound.fetch(url, 10_000, 5)


@pytest.mark.parametrize(
    ("status", "error"), [(404, InputFetchFailed), (403, InputFetchFailed), (503, InputUnreachable)]
)
async def test_a_status_tells_whether_time_may_help(web: Web, status: int, error: type[Exception]) -> None:
    async with Outbound(LOOPBACK) as outbound:
        with pytest.raises(error, match=str(status)):
            await outbound.fetch(web.serve("/a", status=status), 1000, 5)


async def test_a_server_that_never_answers_is_given_up(web: Web) -> None:
    waiting = threading.Event()
    web.replies["/a"] = Reply(before=lambda: waiting.wait(3))
    async with Outbound(LOOPBACK) as outbound:
        with pytest.raises(InputUnreachable):
            await outbound.fetch(web.url + "/a", 1000, 0.2)
    waiting.set()


async def test_an_answer_that_is_no_http_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def babble() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example.com ESMTP\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        async with Outbound(LOOPBACK) as outbound:
            with pytest.raises((InputFetchFailed, InputUnreachable)):
                await outbound.fetch(f"http://127.0.0.1:{server.getsockname()[1]}/", 1000, 5)
        thread.join()


async def test_environment_proxies_are_ignored(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", web.url)
    async with Outbound(LOOPBACK) as outbound:
        with pytest.raises(InputUnreachable):
            await outbound.fetch("http://127.0.0.1:9/a.png", 1000, 5)
    assert web.seen == []
