"""The suite's own guards fail what they are there to fail."""

from __future__ import annotations

import socket

import pytest
import torch
from guards import NetworkUsed


def test_a_connection_beyond_this_machine_fails_the_test() -> None:
    with socket.socket() as one, pytest.raises(NetworkUsed, match=r"192\.0\.2\.7"):
        one.connect(("192.0.2.7", 80))
    with socket.socket(type=socket.SOCK_DGRAM) as one, pytest.raises(NetworkUsed):
        one.sendto(b"", ("192.0.2.7", 53))
    with socket.socket() as one, pytest.raises(NetworkUsed):
        one.connect_ex(("2001:db8::1", 80) if one.family == socket.AF_INET6 else ("198.51.100.1", 80))


def test_processes_of_one_machine_may_talk() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        one.sendall(b"x")


def test_memory_that_nobody_wrote_is_nan() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
    assert torch.empty(3, device="meta").is_meta


@pytest.mark.unwritten
def test_what_measures_may_have_memory_as_torch_gives_it() -> None:
    assert torch.empty.__module__ != "guards"
    assert not hasattr(torch.empty, "__wrapped__")
