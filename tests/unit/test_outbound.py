"""Which addresses the service reaches, and how an image is fetched."""

import asyncio
import gzip
import io
import ipaddress
import random
import socket
import threading
import time
from contextlib import nullcontext
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import anyio
import pytest
from yarl import URL

from core.addresses import check_url, is_public
from core.errors import InputFetchFailed, InputTooLarge, InputUnreachable, UrlNotAllowed
from core.outbound import Answer, NoAnswer, Outbound, follow
from tests.web import Reply, Web

pytestmark = pytest.mark.anyio

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "8.8.8.8",
            "1.1.1.1",
            "93.184.216.34",
            "100.63.255.255",
            "100.128.0.0",
            "172.32.0.1",
            "192.0.1.1",
            "192.167.0.1",
        ),
        *("2606:4700::1111", "::ffff:8.8.8.8", "2001:4860:4860::8888", "2001:200::1", "2003::1", "2a00::1", "3ffe::1"),
    ],
)
def test_public_addresses_are_reached(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "169.254.169.254", "172.16.0.1"),
        *("172.31.255.255", "192.0.0.8", "192.0.0.10", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1"),
        *("198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1"),
        *("255.255.255.255", "168.63.129.16", "0.255.255.255", "100.127.255.255", "127.255.255.255"),
        *(
            "::",
            "::1",
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:168.63.129.16",
        ),
        *("::ffff:0:127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "100:0:0:1::1"),
        *("2001:0:53aa:64c:1c::1", "2001:2::1", "2001:10::1", "2001:20::1", "2001:1ff::1", "2001:db8::1"),
        *(
            "2002:a9fe:a9fe::1",
            "2002:808:808::1",
            "3fff::1",
            "4000::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
        ),
        *("fe80::1", "fe80::1%eth0", "2606:4700::1111%eth0", "fec0::1", "feff::1", "ff02::1", "ff0e::1"),
    ],
)
def test_addresses_of_other_kinds_are_not_reached(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


def test_nothing_is_reached_that_python_knows_not_to_be_global() -> None:
    draw = random.Random(1)  # noqa: S311 - the same addresses each time
    v4 = (ipaddress.IPv4Address(draw.getrandbits(32)) for _ in range(5000))
    v6 = (ipaddress.IPv6Address(0x2 << 124 | draw.getrandbits(125)) for _ in range(2000))
    assert [address for address in (*v4, *v6) if is_public(address) and not address.is_global] == []


@pytest.mark.parametrize(
    "url",
    ["", "photo.png", "ftp://example.com/a", "file:///etc/passwd", "https://", "http://[::1", "https://a:b@c.com/"],
)
def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(UrlNotAllowed):
        check_url(url)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://example.com", "example.com"),
        ("http://EXAMPLE.com:80/a?b=c#d", "example.com"),
        ("https://example.com./a", "example.com."),
        ("https://b\u00fccher.example/\u00fc", "xn--bcher-kva.example"),
        ("https://my_bucket.example.com/a", "my_bucket.example.com"),
        ("https://8.8.8.8/a", "8.8.8.8"),
        ("https://[2606:4700::1111]/a", "2606:4700::1111"),
    ],
)
def test_an_ordinary_url_passes(url: str, host: str) -> None:
    assert (check_url(url).raw_host or "").lower() == host


def test_a_url_has_a_greatest_length() -> None:
    check_url("https://example.com/".ljust(8192, "a"))
    with pytest.raises(UrlNotAllowed, match="8192"):
        check_url("https://example.com/".ljust(8193, "a"))


@pytest.mark.parametrize(
    ("url", "allow", "proxied", "passes"),
    [
        ("http://8.8.8.8:8080/", (), False, False),
        ("http://127.0.0.1:8080/", LOOPBACK, False, True),
        ("http://10.0.0.1/", LOOPBACK, False, False),
        ("http://name:8080/", (), False, False),
        ("http://name:8080/", LOOPBACK, False, True),  # its addresses will tell
        ("http://name:8080/", LOOPBACK, True, False),  # and here the proxy sees them, and we do not
        ("http://name/", LOOPBACK, True, True),
        ("http://10.0.0.1/", (), True, False),
    ],
)
def test_literal_addresses_and_ports_are_judged_before_anything_is_connected_to(
    url: str, allow: tuple[IPv4Network, ...], proxied: bool, passes: bool
) -> None:
    with nullcontext() if passes else pytest.raises(UrlNotAllowed):
        check_url(url, allow, proxied=proxied)


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


async def test_a_redirect_from_https_to_http_is_refused() -> None:
    secure = URL("https://example.com/a")
    for location in ("http://example.com/a", "HTTP://other.example/"):
        with pytest.raises(UrlNotAllowed, match="from https to http"):
            follow(secure, location)
    assert str(follow(secure, "//other.example/?a=%2F")) == "https://other.example/?a=%2F"
    assert str(follow(URL("http://example.com/a/b"), "c")) == "http://example.com/a/c"


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


async def test_the_time_for_an_image_is_for_all_its_redirects_together(web: Web) -> None:
    def rest() -> None:
        time.sleep(0.15)

    for place in range(3):
        web.replies[f"/{place}"] = Reply(302, headers={"Location": f"/{place + 1}"}, before=rest)
    async with Outbound(LOOPBACK) as outbound:
        with pytest.raises(InputUnreachable):
            await outbound.fetch(web.url + "/0", 1000, 0.25)


@pytest.mark.parametrize("path", ["/a%2Fb%20c/", "/a?X=%2F%3D%2B+&Y=%41%7e", "/~'()*!$&,;=:@"])
async def test_a_signed_url_goes_out_as_it_was_written(web: Web, path: str) -> None:
    web.serve(path)
    async with Outbound(LOOPBACK) as outbound:
        assert (await outbound.put(web.url + path, io.BytesIO(b""), "image/png", 5)).status == 200
    assert [seen.path for seen in web.seen] == [path]


async def test_a_put_has_no_headers_but_those_of_its_body_and_closes_the_file_that_it_comes_from(
    web: Web, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 8192
    named = tmp_path / "secret.webp"
    named.write_bytes(data)
    file = named.open("rb")
    async with Outbound(LOOPBACK) as outbound:
        await outbound.put(web.serve("/a", status=204), file, "image/webp", 5)
        refused = named.open("rb")
        with pytest.raises(UrlNotAllowed):
            await outbound.put("http://10.0.0.1/a", refused, "image/webp", 5)
    assert (file.closed, refused.closed) == (True, True)
    (seen,) = web.seen
    assert (seen.method, seen.body == data) == ("PUT", True)
    assert seen.headers == {
        "Host": web.url.removeprefix("http://"),
        "User-Agent": "upscaled",
        "Content-Type": "image/webp",
        "Content-Length": str(len(data)),
    }


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_post_and_put_follow_no_redirect(web: Web, status: int) -> None:
    url = web.serve("/a", status=status, Location="/b")
    async with Outbound(LOOPBACK) as outbound:
        assert (await outbound.post(url, b"", {}, 5)).status == status
        assert (await outbound.put(url, io.BytesIO(b""), "image/png", 5)).status == status
    assert [seen.path for seen in web.seen] == ["/a", "/a"]


def test_a_status_says_whether_time_may_lead_to_another() -> None:
    statuses = (200, 204, 301, 400, 403, 404, 408, 409, 410, 412, 429, 500, 502, 503, 504, 507)
    assert [status for status in statuses if Answer(status, "").passing] == [408, 429, 500, 502, 503, 504, 507]


async def test_cookies_are_not_sent_back(web: Web) -> None:
    url = web.serve("/a", Set_Cookie="a=b")
    async with Outbound(LOOPBACK) as outbound:
        for _ in range(2):
            await outbound.post(url, b"", {}, 5)
    assert "Cookie" not in web.seen[1].headers


async def test_what_a_server_says_too_late_is_no_answer(web: Web) -> None:
    waiting = threading.Event()
    web.replies["/a"] = Reply(before=lambda: waiting.wait(3))
    async with Outbound(LOOPBACK) as outbound:
        put = outbound.put(web.url + "/a", io.BytesIO(b""), "image/png", 0.2)
        for send in (outbound.post(web.url + "/a", b"", {}, 0.2), put):
            with pytest.raises(NoAnswer, match=r"within 0\.2 seconds"):
                await send
    waiting.set()


async def test_names_that_nobody_answers_for_keep_the_process_from_looking_up_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over, look_up = threading.Event(), socket.getaddrinfo

    def look_up_slowly(host: str, *rest: Any, **named: Any) -> Any:
        if host.endswith(".example"):
            over.wait(10)
            raise socket.gaierror
        return look_up(host, *rest, **named)

    async def fetch(outbound: Outbound, name: str) -> None:
        with pytest.raises(InputUnreachable):
            await outbound.fetch(f"http://{name}.example/", 1000, 0.5)

    monkeypatch.setattr("socket.getaddrinfo", look_up_slowly)
    try:
        async with Outbound(LOOPBACK) as outbound, anyio.create_task_group() as tasks:
            for number in range(40):  # more than there are threads for everybody
                tasks.start_soon(fetch, outbound, f"slow{number}")
            await anyio.sleep(0.1)
            with anyio.fail_after(0.3):  # as the clients of Postgres and Redis do
                await asyncio.get_running_loop().getaddrinfo("localhost", 80)
    finally:
        over.set()


async def test_environment_proxies_are_ignored(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", web.url)
    async with Outbound(LOOPBACK) as outbound:
        with pytest.raises(InputUnreachable):
            await outbound.fetch("http://127.0.0.1:9/a.png", 1000, 5)
    assert web.seen == []
