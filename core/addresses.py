"""Which URLs users may send the service to: what their text tells, and what the addresses behind their names tell."""

import ipaddress
import re
from typing import TypeAlias

from pydantic.networks import IPvAnyNetwork
from yarl import URL

from core.errors import UrlNotAllowed

PUBLIC_PORTS = (80, 443)
MAX_URL_CHARACTERS = 8192
"""Signed URLs are long; what is longer than this is none."""

REFUSED = "The URL leads to an address that this service does not reach."

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Networks: TypeAlias = tuple[IPvAnyNetwork, ...]

# IANA's special-purpose registries, spelled out: what Python calls global has changed between its patch releases.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, among them Teredo, which wraps IPv4
        "2001:db8::/32",
        "2002::/16",  # 6to4, which wraps IPv4
        "3fff::/20",
    )
)
_SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        "192.88.99.0/24",  # relays of 6to4
        *("224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # public by its number, but every machine of Azure meets its host there
    )
)

_PLAIN = re.compile(r"[^\x00-\x20\x7f\\\ud800-\udfff]*")
_NAME = re.compile(r"(?=.{1,253}\.?$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)
_NUMERIC = re.compile(r"([0-9]+|0x[0-9a-f]*)\.?", re.IGNORECASE)


def is_public(address: Address) -> bool:
    """Tell whether `address` is an ordinary public one, and no other form of one that is not."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _SPECIAL_V4)
    if address.scope_id is not None:
        return False
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    return address in _GLOBAL_V6 and not any(address in network for network in _SPECIAL_V6)


def permits(address: Address, port: int, allow: Networks = ()) -> bool:
    """Tell whether the service connects there: to public addresses by PUBLIC_PORTS, and anywhere in `allow`."""
    return any(address in network for network in allow) or (is_public(address) and port in PUBLIC_PORTS)


def check_url(url: str, allow: Networks = (), *, proxied: bool = False) -> URL:
    """Parse a user's URL and check everything that can be checked without the network.

    Args:
        allow: networks that are reached although they are not public.
        proxied: whether it is a proxy that looks the name up, so that its port cannot be judged by its address.

    Raises:
        UrlNotAllowed: not http or https, no host, a user name in it, a literal address or a port that is not reached,
            or characters that no URL has.
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise UrlNotAllowed(f"The URL is longer than {MAX_URL_CHARACTERS} characters.")
    if not _PLAIN.fullmatch(url):
        raise UrlNotAllowed("The URL must not contain spaces or control characters, nor backslashes.")
    try:
        parsed = URL(url)
        host, port = parsed.host and parsed.raw_host, parsed.port
        if parsed.scheme not in ("http", "https") or not host or not port:
            raise UrlNotAllowed("The URL must begin with http:// or https:// and name a host.")
        if parsed.user is not None or parsed.password is not None:
            raise UrlNotAllowed("The URL must not carry a user name or password.")
        address = _literal(host)
        as_written = URL(url, encoded=True)
    except ValueError as error:
        raise UrlNotAllowed("The URL is malformed.") from error
    if address is not None and not permits(address, port, allow):
        raise UrlNotAllowed(REFUSED)
    if address is None and port not in PUBLIC_PORTS and (proxied or not allow):
        raise UrlNotAllowed("The URL's port is one that this service does not reach: 80 and 443 it does.")
    # Path and query go out as they were written, where they can: there are signatures over their very characters.
    return as_written if url.isascii() and _authority(as_written) == _authority(parsed) else parsed


def _literal(host: str) -> Address | None:
    """Return the address that a host is in itself; None for a name; raises ValueError for what is neither."""
    if ":" in host:
        return ipaddress.IPv6Address(host)
    if _NUMERIC.fullmatch(host.rstrip(".").rpartition(".")[2]):
        # Octal, hexadecimal, short: there are several ways to read these, so that only a.b.c.d is taken.
        return ipaddress.IPv4Address(host)
    if not _NAME.fullmatch(host):
        raise ValueError(host)
    return None


def _authority(url: URL) -> tuple[object, ...]:
    return url.scheme, (url.raw_host or "").lower(), url.port, url.raw_user, url.raw_password
