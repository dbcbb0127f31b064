"""What the p2p daemon needs around it."""

from __future__ import annotations

import socket
import tempfile

import pytest

from swarm.errors import ConfigError
from swarm.multiaddrs import tcp_endpoint
from swarm.premises import reserved_ports, runtime_folder


def test_without_a_temporary_folder_that_can_be_written_it_is_said_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    with pytest.raises(ConfigError, match="TMPDIR"), runtime_folder():
        pass


def test_a_port_for_web_sockets_is_left_to_the_daemon_which_shares_none() -> None:
    with reserved_ports(["/ip4/127.0.0.1/tcp/0/ws", "/ip4/127.0.0.1/tcp/0"]) as (web, plain):
        assert web.endswith("/ws")
        for address, free in ((web, True), (plain, False)):
            endpoint = tcp_endpoint(address)
            assert endpoint is not None
            with socket.socket() as daemon:
                assert _binds(daemon, endpoint) is free


def _binds(one: socket.socket, endpoint: tuple[str, int]) -> bool:
    try:
        one.bind(endpoint)
    except OSError:
        return False
    return True
