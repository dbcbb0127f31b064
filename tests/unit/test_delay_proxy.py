"""The slow link for measurements: everything arrives, later, in order, and no faster than allowed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from swarm.bench.delay_proxy import DelayProxy
from swarm.errors import BadRequest


@contextmanager
def echo_server() -> Iterator[int]:
    """Answers each connection with what it sent, until the sender's end."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(65536):
                    connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def round_trip_s(port: int, data: bytes) -> float:
    """Seconds until all of ``data`` has come back, and then the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        began = time.monotonic()
        writing = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
        writing.start()
        came = b""
        while part := connection.recv(65536):
            came += part
        took_s = time.monotonic() - began
        writing.join(10)
    assert came == data
    return took_s


def test_bytes_come_back_in_order_and_after_both_delays() -> None:
    data = bytes(range(256)) * 2000
    with echo_server() as port, DelayProxy(port, delay_s=0.05) as proxy:
        assert round_trip_s(proxy.port, data) >= 0.1
        proxy.shape.delay_s = 0.0
        assert round_trip_s(proxy.port, data) > 0


def test_a_limit_holds_in_each_direction() -> None:
    with echo_server() as port, DelayProxy(port, bytes_per_s=1e6) as proxy:
        assert round_trip_s(proxy.port, bytes(200_000)) >= 0.2


def test_it_ends_with_connections_open_and_refuses_for_a_dead_target() -> None:
    with echo_server() as port, DelayProxy(port) as proxy:
        left_open = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
        left_open.sendall(b"?")
        assert left_open.recv(1) == b"?"
    assert left_open.recv(1) == b""
    left_open.close()
    with DelayProxy.for_new_peer() as proxy, socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as lost:
        assert lost.recv(1) == b""
        assert proxy.peer_args == [
            "--host-maddrs",
            proxy.peer_args[1],
            "--announce-maddrs",
            f"/ip4/127.0.0.1/tcp/{proxy.port}",
        ]


def test_a_link_from_the_future_is_refused() -> None:
    with pytest.raises(BadRequest):
        DelayProxy(1, delay_s=-0.1)


def test_a_proxy_that_ends_with_bytes_on_their_way_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        DelayProxy(server.getsockname()[1], delay_s=60) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), 5) as sender,
    ):
        sender.sendall(b"never")
        server.settimeout(5)
        accepted = server.accept()[0]
        sender.close()
    accepted.close()
    assert not caplog.records
