"""Which URLs may be asked for, and which addresses may be connected to. What a web page names is not to be trusted.

A URL is read by one parser, for the check and for the request. All addresses that a name stands for must be public.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx2

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

PORTS = (80, 443)
MAX_URL = 8192
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\\]")
_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
_LOCAL = ("localhost", "local", "internal", "localdomain", "home.arpa", "onion")
"""Endings of names that never stand for a public address."""
_METADATA = frozenset(
    map(ipaddress.ip_address, ("169.254.169.254", "100.100.100.200", "168.63.129.16", "fd00:ec2::254"))
)
"""Where clouds tell a machine its secrets; one of them is in public space."""
_TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")))
"""IPv6 that leads to an IPv4 address inside it."""


class Refused(Exception):
    """A URL that is not asked for, or whose answer is not taken; `reason` is what the log files it under."""

    def __init__(self, reason: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.status = reason, message, status


def resolve(host: str, port: int) -> Sequence[str]:
    """Raises `OSError`."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class Network:
    """What names stand for, and where a connection to an address that passed leads."""

    resolve: Callable[[str, int], Sequence[str]] = resolve
    dial: Callable[[str], str] = str


def read_url(text: str, ports: Collection[int] = PORTS) -> "httpx2.URL":
    """
    Raises:
        Refused: url, scheme, credentials, host, port.
    """
    import httpx2

    if len(text) > MAX_URL or _FORBIDDEN.search(text):
        raise Refused("url", "a space, a control character or a backslash in it, or too long")
    try:
        url = httpx2.URL(text)
        # the whole name is checked in the form that is sent
        host = url.raw_host.decode("ascii").lower()
    except (httpx2.InvalidURL, ValueError, TypeError) as error:
        raise Refused("url", f"no URL: {error}") from error
    if url.scheme not in ("http", "https"):
        raise Refused("scheme", f"scheme {url.scheme or 'none'!r}, not http or https")
    if url.userinfo or "@" in text.partition("://")[2].partition("/")[0]:
        raise Refused("credentials", "a name or a password in it")
    _check_host(host)
    port = port_of(url)
    if port not in ports:
        raise Refused("port", f"port {port}, none of {', '.join(map(str, ports))}")
    return url


def port_of(url: "httpx2.URL") -> int:
    return (443 if url.scheme == "https" else 80) if url.port is None else url.port


def public_address(host: str, port: int, network: Network) -> str:
    """The address to connect to.

    Raises:
        Refused: the name stands for nothing (dns), or also for an address that is not public (address_...).
    """
    literal = _literal(host)
    try:
        addresses = [str(literal)] if literal is not None else list(network.resolve(host, port))
        found = [ipaddress.ip_address(address) for address in addresses]
    except (OSError, ValueError) as error:
        raise Refused("dns", f"{host} stands for no address") from error
    if not found:
        raise Refused("dns", f"{host} stands for no address")
    for address in found:
        problem = refusal_of(address)
        if problem is not None:
            raise Refused(f"address_{problem}", f"{host} stands for {address}")
    return network.dial(str(found[0]))


def refusal_of(address: Address) -> str | None:
    """Why an address is not to be connected to."""
    if address in _METADATA:
        return "metadata"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return "mapped"
        if int(address) > 1 and any(address in network for network in _TRANSLATED):
            return "translated"
        if address.scope_id is not None:
            return "link_local"
    kinds = {
        "unspecified": address.is_unspecified,
        "loopback": address.is_loopback,
        "link_local": address.is_link_local,
        "multicast": address.is_multicast,
        "private": address.is_private,
        "reserved": address.is_reserved or not address.is_global,
    }
    return next((kind for kind, holds in kinds.items() if holds), None)


def _check_host(host: str) -> None:
    if _literal(host) is not None:
        return
    name = host.removesuffix(".")
    if not _NAME.fullmatch(name) or len(name) > 253:
        raise Refused("host", f"{host!r} is no name of a host")
    # 0x7f.1, 2130706433 and 0177.0.0.1 are addresses too, for whoever reads them that way
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        raise Refused("host", f"{host} is an address in disguise")
    if "." not in name or any(name == end or name.endswith(f".{end}") for end in _LOCAL):
        raise Refused("host", f"{host} is a name of this machine or network")


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
