"""Requests to where users say: to public addresses only, so that none reaches into the server's network.

A name is resolved once and the connection is made to exactly the address that was checked: a name that
resolves otherwise a moment later (DNS rebinding) gains nothing.
"""

import socket
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpcore
import httpx

from coterie.service.threads import Threads

LIMIT_URL = 2000
LAST_PORT = 65_535
_IPV6_UNICAST = IPv6Network("2000::/3")  # all that is routed between networks
# Public by their numbers, but they lead elsewhere: into IPv4, or to what a cloud tells its machines.
_MISLEADING: tuple[IPv4Network | IPv6Network, ...] = (
    IPv6Network("2002::/16"),  # 6to4
    IPv6Network("2001::/32"),  # Teredo
    IPv4Network("192.0.0.0/24"),  # Oracle's metadata
    IPv4Network("168.63.129.16/32"),  # Azure's
)
_LOOK_UPS = Threads("names", 8)  # of receivers, some of which may have a name server that does not answer


class AddressForbidden(Exception):
    """A URL that the server does not call; says why."""


def parse_url(text: str) -> httpx.URL:
    """A URL that could be called, whatever its host means.

    Raises:
        AddressForbidden: If it is none, or not http or https, or has a user's name or password in it.
    """
    try:
        url = httpx.URL(text)
        url.raw_host.decode("ascii")
    except (httpx.InvalidURL, UnicodeError):
        raise AddressForbidden("must be a URL as https://example.org/path") from None
    if len(text) > LIMIT_URL:
        raise AddressForbidden(f"must be at most {LIMIT_URL} characters")
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise AddressForbidden("must begin with https:// or http:// and name a host")
    if url.userinfo:
        raise AddressForbidden("must not hold a user's name or password")
    if url.port is not None and not 0 < url.port <= LAST_PORT:
        raise AddressForbidden(f"must name a port from 1 to {LAST_PORT}")
    return url


def resolve(host: str, *, allow_private: bool) -> list[str]:
    """The addresses of a host, best first. Blocks while the name is looked up.

    Raises:
        AddressForbidden: If it has none, or one of them is not public, unless that is allowed.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter for what can't be a name
        raise AddressForbidden(f"its host {host} has no address") from None
    addresses = [str(address[0]) for _, _, _, _, address in found]
    if not allow_private and not all(is_public(address) for address in addresses):
        raise AddressForbidden(
            f"its host {host} has an address that is not public; the server's operator may allow those with "
            "COTERIE_WEBHOOK_ALLOW_PRIVATE"
        )
    return addresses


def is_public(address: str) -> bool:
    """Whether an address, in its usual form, is one of a single host on the internet."""
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        ip = ip.ipv4_mapped or ip
    if any(ip in network for network in _MISLEADING):
        return False
    unicast = ip in _IPV6_UNICAST if isinstance(ip, IPv6Address) else not ip.is_multicast
    return unicast and ip.is_global


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to what `resolve` allows.

    Args:
        allow_private: Whether any address will do.
    """

    def __init__(self, *, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve, check, connect; raises AddressForbidden, or as httpcore does."""
        look_up = partial(resolve, host, allow_private=self._allow_private)
        *others, last = await _LOOK_UPS.run(look_up, abandon_on_cancel=True)
        for address in others:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
        return await self._network.connect_tcp(last, port, timeout, local_address, socket_options)
