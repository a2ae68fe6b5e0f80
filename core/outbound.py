"""The one HTTP client for every URL that a user gave; it refuses at connect time what the service must not reach."""

import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import aiohttp
from pydantic.networks import IPvAnyNetwork
from yarl import URL

from core.errors import InputFetchFailed, InputTooLarge, InputUnreachable, UrlNotAllowed

PUBLIC_PORTS = (80, 443)
MAX_REDIRECTS = 3
CONNECT_TIMEOUT_SECONDS = 5.0
EXCERPT_BYTES = 2048
"""How much of a receiver's answer is kept."""

_REFUSED_V4 = ipaddress.ip_network("192.0.0.0/24")  # protocol assignments; partly "global" for Python
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
_V4_COMPATIBLE = ipaddress.ip_network("::/96")


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Tell whether `address` is an ordinary public one.

    `is_global` alone lets multicast pass and every IPv6 form that wraps a private IPv4 address.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour or address.teredo or address.is_site_local or address in _V4_COMPATIBLE:
            return False
        if any(address in network for network in _NAT64):
            return False
    elif address in _REFUSED_V4:
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


_PLAIN = re.compile(r"[^\x00-\x20\x7f\ud800-\udfff]*")


@dataclass(frozen=True)
class Answer:
    """What a receiver answered: the status and the first EXCERPT_BYTES of the body as text."""

    status: int
    excerpt: str
    retry_after: float | None = None
    """How many seconds it asked to be left alone; None when it asked nothing, or nothing that can be read."""


class Outbound:
    """An asynchronous context manager; use it inside one event loop."""

    def __init__(self, allow: tuple[IPvAnyNetwork, ...] = ()) -> None:
        self._allow = allow

    async def __aenter__(self) -> Self:
        # The socket factory sees the address that is about to be connected to, for names and for literals alike, so
        # there is no gap between check and use for a name that resolves differently the second time.
        connector = aiohttp.TCPConnector(socket_factory=self._open_socket, limit=0, ttl_dns_cache=10)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,  # a few kilobytes of gzip can hold gigabytes
            headers={"User-Agent": "upscaled", "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def fetch(self, url: str, max_bytes: int, timeout_seconds: float) -> bytes:
        """GET an image, following at most MAX_REDIRECTS redirects, each checked like the first URL.

        Raises:
            UrlNotAllowed: the URL or a redirect leads where the service does not go.
            InputFetchFailed: a 4xx, too many redirects, a compressed body.
            InputTooLarge: the body is longer than `max_bytes`, whatever its headers claimed.
            InputUnreachable: no answer in time, no connection, a 5xx.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=CONNECT_TIMEOUT_SECONDS)
        try:
            target = check_url(url)
            for _ in range(MAX_REDIRECTS + 1):
                async with self._session.get(target, allow_redirects=False, timeout=timeout) as response:
                    if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                        target = check_url(str(target.join(URL(response.headers["Location"]))))
                        continue
                    _require_plain_success(response)
                    return await _read_capped(response, max_bytes)
        except (TimeoutError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise InputUnreachable("The image URL could not be reached, or did not answer in time.") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise InputFetchFailed("The image URL did not give a valid HTTP answer.") from error
        raise InputFetchFailed(f"The image URL redirected more than {MAX_REDIRECTS} times.")

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], timeout_seconds: float) -> Answer:
        """POST `body` without following redirects.

        Raises:
            UrlNotAllowed: the URL leads where the service does not go.
            TimeoutError, aiohttp.ClientError: nothing complete came back.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=CONNECT_TIMEOUT_SECONDS)
        async with self._session.post(
            check_url(url), data=body, headers=headers, allow_redirects=False, timeout=timeout
        ) as response:
            excerpt = await response.content.read(EXCERPT_BYTES)
            return Answer(
                response.status,
                excerpt.decode(errors="replace").replace("\0", ""),
                read_retry_after(response.headers.get("Retry-After", "")),
            )

    def _open_socket(self, address_info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
        family, kind, protocol, _, socket_address = address_info
        address, port = ipaddress.ip_address(str(socket_address[0]).partition("%")[0]), socket_address[1]
        allowed = any(address in network for network in self._allow)
        if not allowed and not (is_public(address) and port in PUBLIC_PORTS):
            raise UrlNotAllowed("The URL leads to an address that this service does not reach.")
        return socket.socket(family, kind, protocol)


def check_url(url: str) -> URL:
    """Parse a user's URL and check everything that can be checked without the network.

    Raises:
        UrlNotAllowed: not http or https, no host, a user name in it, or characters that no URL has.
    """
    if not _PLAIN.fullmatch(url):
        raise UrlNotAllowed("The URL must not contain spaces or control characters.")
    try:
        parsed = URL(url)
        host, port = parsed.host, parsed.port
    except ValueError as error:
        raise UrlNotAllowed("The URL is malformed.") from error
    if parsed.scheme not in ("http", "https") or not host or not port:
        raise UrlNotAllowed("The URL must begin with http:// or https:// and name a host.")
    if parsed.user is not None or parsed.password is not None:
        raise UrlNotAllowed("The URL must not carry a user name or password.")
    return parsed


def read_retry_after(value: str) -> float | None:
    """Return the seconds that a Retry-After header means, be it a number or an HTTP date; None for anything else."""
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _require_plain_success(response: aiohttp.ClientResponse) -> None:
    if response.status >= 500 or response.status in (408, 429):
        raise InputUnreachable(f"The image URL answered {response.status}.")
    if response.status != 200:
        raise InputFetchFailed(f"The image URL answered {response.status}.")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise InputFetchFailed("The image URL answered with a compressed body although none was asked for.")


async def _read_capped(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(64 * 1024):
        body += chunk
        if len(body) > max_bytes:
            raise InputTooLarge(f"The image file is larger than {max_bytes} bytes.")
    return bytes(body)
