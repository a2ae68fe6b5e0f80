"""The one HTTP client for every URL that a user gave; it refuses at connect time what the service must not reach."""

import asyncio
import io
import ipaddress
import logging
import re
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from types import TracebackType
from typing import Any, BinaryIO, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from core.addresses import REFUSED, Networks, check_url, permits
from core.errors import InputFetchFailed, InputTooLarge, InputUnreachable, TransientError, UrlNotAllowed

MAX_REDIRECTS = 3
CONNECT_TIMEOUT_SECONDS = 5.0
EXCERPT_BYTES = 2048
"""How much of a receiver's answer is kept."""

DNS_CACHE_SECONDS = 10
"""How long addresses are used that were looked up, and checked, for another connection."""

LOOKUPS_AT_ONCE = 64
"""How many names are looked up at a time at most; one whose servers are silent takes the system half a minute."""

_UNCOMPRESSED = {"Accept-Encoding": "identity"}

logger = logging.getLogger(__name__)


class NoAnswer(TransientError):
    """Nothing complete came back: no connection, or not in time."""


class NotHttp(NoAnswer):
    """What came back was not HTTP."""


@dataclass(frozen=True)
class Answer:
    """What a receiver answered: the status and the first EXCERPT_BYTES of the body as text."""

    status: int
    excerpt: str
    retry_after: float | None = None
    """How many seconds it asked to be left alone; None when it asked nothing, or nothing that can be read."""

    @property
    def passing(self) -> bool:
        """Whether time may lead to another answer."""
        return _is_passing(self.status)


class Outbound:
    """An asynchronous context manager; use it inside one event loop."""

    def __init__(self, allow: Networks = (), proxy: str = "", *, resolver: AbstractResolver | None = None) -> None:
        """Make a client.

        Args:
            allow: networks that are reached although they are not public, on any port.
            proxy: the URL of a forward proxy for all requests, which then looks names up and decides about addresses.
            resolver: what looks names up; the system's where None.
        """
        self._allow = allow
        # Apart from its credentials: errors of the library show the URL.
        self._proxy, self._credentials = _split_credentials(proxy) if proxy else (None, None)
        self._resolver = resolver

    async def __aenter__(self) -> Self:
        if self._proxy is None:
            # The resolver sees all addresses of a name, and the socket factory the one that is about to be connected
            # to, for names and for literals alike: there is no gap between check and use for a name that resolves
            # differently the second time.
            self._resolver = _CheckedResolver(self._resolver or _SystemResolver(), self._allow)
            connector = aiohttp.TCPConnector(
                resolver=self._resolver, socket_factory=self._open_socket, limit=0, ttl_dns_cache=DNS_CACHE_SECONDS
            )
        else:
            connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=DNS_CACHE_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,  # a few kilobytes of gzip can hold gigabytes
            headers={"User-Agent": "upscaled"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        if self._resolver is not None:
            await self._resolver.close()

    async def fetch(self, url: str, max_bytes: int, timeout_seconds: float) -> bytes:
        """GET an image, following at most MAX_REDIRECTS redirects, each checked like the first URL.

        Raises:
            UrlNotAllowed: the URL or a redirect leads where the service does not go.
            InputFetchFailed: a 4xx, too many redirects, a compressed body.
            InputTooLarge: the body is longer than `max_bytes`, whatever its headers claimed.
            InputUnreachable: no answer in time, redirects included; no connection, a 5xx.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                target = self._check(url)
                for _ in range(MAX_REDIRECTS + 1):
                    async with self._request("GET", target, timeout_seconds, _UNCOMPRESSED) as response:
                        if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                            target = follow(target, response.headers["Location"], self._check)
                            continue
                        _require_plain_success(response)
                        return await _read_capped(response, max_bytes)
        except NotHttp as error:
            raise InputFetchFailed("The image URL did not give a valid HTTP answer.") from error
        except (NoAnswer, TimeoutError) as error:
            raise InputUnreachable("The image URL could not be reached, or did not answer in time.") from error
        raise InputFetchFailed(f"The image URL redirected more than {MAX_REDIRECTS} times.")

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], timeout_seconds: float) -> Answer:
        """POST `body` without following redirects.

        Raises:
            UrlNotAllowed: the URL leads where the service does not go.
            NoAnswer: nothing complete came back.
        """
        headers = {**_UNCOMPRESSED, **headers}
        # The library asks to be handed large bodies as files; it still knows their length.
        async with self._request("POST", self._check(url), timeout_seconds, headers, io.BytesIO(body)) as response:
            excerpt = await response.content.read(EXCERPT_BYTES)
            return _answer(response, excerpt.decode(errors="replace").replace("\0", ""))

    async def put(self, url: str, file: BinaryIO, content_type: str, timeout_seconds: float) -> Answer:
        """PUT what is left of `file`, and close it, without following redirects; of the answer's body nothing is read.

        No header says more than the data's type and length, for the URL may be signed over them.

        Raises:
            UrlNotAllowed: the URL leads where the service does not go.
            NoAnswer: no status came back.
        """
        headers = {"Content-Type": content_type}
        with file:
            async with self._request("PUT", self._check(url), timeout_seconds, headers, file) as response:
                return _answer(response, "")

    def _check(self, url: str) -> URL:
        return check_url(url, self._allow, proxied=self._proxy is not None)

    @asynccontextmanager
    async def _request(
        self, method: str, url: URL, timeout_seconds: float, headers: Mapping[str, str], data: BinaryIO | None = None
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Lend the answer to one request; what the library raises, here or while it is read, is translated."""
        for_proxy = {} if self._credentials is None else {"Proxy-Authorization": self._credentials}
        if url.scheme == "http":  # then the proxy reads this very request, and otherwise the CONNECT before it
            headers = {**headers, **for_proxy}
        try:
            async with self._session.request(
                method,
                url,
                data=data,
                headers=headers,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Disposition") if method == "PUT" else (),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=CONNECT_TIMEOUT_SECONDS),
                proxy=self._proxy,
                proxy_headers=for_proxy or None,
            ) as response:
                if self._proxy is not None and response.status == 407:
                    raise _proxy_refused(url, 407)
                yield response
        except aiohttp.ClientHttpProxyError as error:
            if error.status in (403, 407):
                raise _proxy_refused(url, error.status) from None  # the error shows what we sent to the proxy
            raise NoAnswer("No answer: the proxy could not connect.") from None
        except TimeoutError as error:
            raise NoAnswer(f"No answer within {timeout_seconds:g} seconds.") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise NoAnswer(f"No answer: {type(error).__name__}.") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise NotHttp(f"No answer: {type(error).__name__}.") from error

    def _open_socket(self, address_info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
        family, kind, protocol, _, socket_address = address_info
        _require_permitted("", str(socket_address[0]), socket_address[1], self._allow)
        return socket.socket(family, kind, protocol)


class _SystemResolver(AbstractResolver):
    """Looks names up as the system does, in threads of its own.

    Names that nobody answers for, and callers choose the names, would otherwise hold all the threads by which this
    process finds Postgres and Redis.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(LOOKUPS_AT_ONCE, "lookup")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        kind, flags = socket.SOCK_STREAM, socket.AI_ADDRCONFIG
        look_up = partial(socket.getaddrinfo, host, port, family, kind, flags=flags)
        found = await asyncio.get_running_loop().run_in_executor(self._pool, look_up)
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=family,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for family, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _CheckedResolver(AbstractResolver):
    """Refuses a name if one of its addresses is refused: which of them would be connected to is not ours to say."""

    def __init__(self, resolver: AbstractResolver, allow: Networks) -> None:
        self._resolver = resolver
        self._allow = allow

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        results = await self._resolver.resolve(host, port, family)
        for result in results:
            _require_permitted(host, result["host"], result["port"], self._allow)
        return results

    async def close(self) -> None:
        await self._resolver.close()


def follow(url: URL, location: str, check: Callable[[str], URL] = check_url) -> URL:
    """Return where a redirect from `url` leads; raises UrlNotAllowed where that is not followed."""
    if "\\" in location:  # to some it is a slash
        raise UrlNotAllowed("The URL redirects to a malformed one.")
    try:
        joined = str(url.join(URL(location, encoded=True)))
    except ValueError as error:
        raise UrlNotAllowed("The URL redirects to a malformed one.") from error
    target = check(joined)
    if (url.scheme, target.scheme) == ("https", "http"):
        raise UrlNotAllowed("The URL redirects from https to http.")
    return target


def read_retry_after(value: str) -> float | None:
    """Return the seconds that a Retry-After header means, be it a number or an HTTP date; None for anything else."""
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _require_permitted(host: str, address: str, port: int, allow: Networks) -> None:
    if not permits(ipaddress.ip_address(address), port, allow):
        logger.warning("refused to connect to %s, port %d, for %s", address, port, host or "a URL")
        raise UrlNotAllowed(REFUSED)


def _split_credentials(proxy: str) -> tuple[URL, str | None]:
    """Return a proxy's URL without what it holds of a user, and the header that says that instead."""
    url = URL(proxy)
    credentials = None if url.user is None else aiohttp.encode_basic_auth(url.user, url.password or "")
    return url.with_user(None), credentials


def _proxy_refused(url: URL, status: int) -> UrlNotAllowed:
    logger.warning("the proxy refused to connect to %s: %d", url.host, status)
    return UrlNotAllowed(REFUSED)


def _answer(response: aiohttp.ClientResponse, excerpt: str) -> Answer:
    return Answer(response.status, excerpt, read_retry_after(response.headers.get("Retry-After", "")))


def _is_passing(status: int) -> bool:
    return status >= 500 or status in (408, 429)


def _require_plain_success(response: aiohttp.ClientResponse) -> None:
    if _is_passing(response.status):
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
