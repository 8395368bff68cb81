"""The suite's own guards fail what they are there to fail."""

from __future__ import annotations

import socket
import subprocess
import sys

import network
import pytest
import torch

ELSEWHERE = "192.0.2.7"


def test_a_connection_beyond_this_machine_is_refused_and_remembered() -> None:
    with socket.socket() as one, pytest.raises(network.OutsideConnection, match=r"192\.0\.2\.7"):
        one.connect((ELSEWHERE, 80))
    with socket.socket() as one, pytest.raises(network.OutsideConnection):
        one.connect_ex((ELSEWHERE, 80))
    with socket.socket(type=socket.SOCK_DGRAM) as one, pytest.raises(network.OutsideConnection):
        one.sendto(b"", (ELSEWHERE, 53))
    with pytest.raises(network.OutsideConnection):
        socket.getaddrinfo("example.org", 443)
    assert len(network.refused) == 4, "a test whose code swallows the refusal fails by this list"
    network.refused.clear()


def test_a_process_that_a_test_starts_is_refused_too() -> None:
    code = f"import socket; socket.create_connection(({ELSEWHERE!r}, 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "OutsideConnection" in done.stderr


def test_processes_of_one_machine_may_talk() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        one.sendall(b"x")


def test_memory_that_nobody_wrote_is_nan() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
    assert torch.empty(3, device="meta").is_meta
    with torch.device("meta"):
        assert torch.empty(3).is_meta


@pytest.mark.unwritten
def test_what_measures_may_have_memory_as_torch_gives_it() -> None:
    assert not hasattr(torch.empty, "__wrapped__")
