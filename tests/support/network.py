"""Connections beyond this machine are refused, in the tests' process and in those that tests start.

`tests/support/process/sitecustomize.py` calls `forbid` in every Python that a test starts; it lies on their PYTHONPATH.
Only the standard library is imported here, since each of those processes pays for it.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

ALLOWED_NAMES = {"", "localhost", "ip6-localhost", "<broadcast>"}
refused: list[str] = []
"""Addresses that were refused, also where whoever asked swallowed the error."""


class OutsideConnection(AssertionError):
    """A test wanted to speak to another machine."""


def allows(host: object) -> bool:
    """Whether the host is this machine: loopback, no address at all, or an address of its own."""
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    if name.lower() in ALLOWED_NAMES or name == socket.gethostname():
        return True
    try:
        address = ipaddress.ip_address(name.split("%")[0])
    except ValueError:
        return False  # a name that somebody else would have to resolve
    return address.is_loopback or address.is_unspecified or _is_own(address)


def _is_own(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Only a machine's own addresses can be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def refuse(what: str, host: object, port: object) -> None:
    refused.append(f"{host}:{port}")
    raise OutsideConnection(
        f"{what} {host}:{port}: tests speak to no other machine; give the code a file, a fixture or a server on "
        "127.0.0.1 (tests/support/network.py)"
    )


def forbid() -> None:
    """From now on this process connects, sends and resolves names within this machine alone."""
    if getattr(socket.socket.connect, "within", False):
        return
    real_connect, real_connect_ex, real_sendto = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto
    real_getaddrinfo = socket.getaddrinfo

    def check(asked: socket.socket, what: str, address: Any) -> None:
        if asked.family in (socket.AF_INET, socket.AF_INET6) and not allows(address[0]):
            refuse(what, address[0], address[1])

    def connect(self: socket.socket, address: Any) -> None:
        check(self, "a connection to", address)
        real_connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        check(self, "a connection to", address)
        return real_connect_ex(self, address)

    def sendto(self: socket.socket, data: Any, *rest: Any) -> int:
        check(self, "a datagram to", rest[-1])
        return real_sendto(self, data, *rest)

    def getaddrinfo(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        if not allows(host):
            refuse("the address of", host, port)
        return real_getaddrinfo(host, port, *rest, **more)

    connect.within = True  # pyright: ignore[reportFunctionMemberAccess]
    socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto = connect, connect_ex, sendto
    socket.getaddrinfo = getaddrinfo
