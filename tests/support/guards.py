"""Guards over the whole suite: no socket beyond this machine, and no number read that was never written."""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CALLS = ("connect", "connect_ex", "sendto")
"""What of a socket reaches another."""
UNWRITTEN = ("empty", "empty_like", "empty_strided")
"""Functions of torch whose result nobody has written yet; `Tensor.new_empty` besides."""


class NetworkUsed(AssertionError):
    """A test tried to reach another machine."""


@functools.cache
def _own_addresses() -> frozenset[str]:
    """The addresses of this machine: processes of one test may talk to each other by them."""
    import psutil

    return frozenset(address.address for each in psutil.net_if_addrs().values() for address in each)


def _stays_here(address: Any) -> bool:
    if not isinstance(address, tuple) or not address:
        return True  # a unix socket, by path or by name
    host = address[0]
    if isinstance(host, bytes):
        host = host.decode()
    try:
        if ipaddress.ip_address(host).is_loopback:
            return True
    except ValueError:
        return host in ("", "localhost")
    return host in _own_addresses()


@contextmanager
def no_network() -> Iterator[None]:
    """Within it, a socket that is to reach an address beyond this machine raises `NetworkUsed`."""

    def guarded(name: str) -> Callable[..., Any]:
        real = getattr(socket.socket, name)

        def call(self: socket.socket, *args: Any) -> Any:
            address = args[-1] if name == "sendto" else args[0]
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _stays_here(address):
                raise NetworkUsed(f"a test opened a connection to {address}: none may reach beyond this machine")
            return real(self, *args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(socket.socket, name, guarded(name), raising=False)
        yield


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Within it, memory that torch hands out unwritten holds NaN: whoever reads it before writing gets NaN.

    Left out are tensors without numbers (meta, fake) and what torch's compiler looks at.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    def filled(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def make(*args: Any, **kwargs: Any) -> Any:
            made = real(*args, **kwargs)
            if torch.compiler.is_compiling() or not isinstance(made, torch.Tensor) or isinstance(made, FakeTensor):
                return made
            if made.device.type == "meta" or not (made.is_floating_point() or made.is_complex()) or not made.numel():
                return made
            with torch.no_grad():
                torch.Tensor.fill_(made.detach(), float("nan"))
            return made

        return make

    with pytest.MonkeyPatch.context() as patch:
        for name in UNWRITTEN:
            patch.setattr(torch, name, filled(getattr(torch, name)))
        patch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
        yield
