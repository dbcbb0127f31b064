"""Dialling through the p2p daemon. The rest: ``tests/live/test_libp2p.py``."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from swarm.config import Settings, TimeoutSettings
from swarm.daemon import Daemon
from swarm.daemon_requests import _bindings, _pb
from swarm.errors import Unreachable
from swarm.identity import Identity
from swarm.types import PeerAddress


async def test_knock_and_dial_of_a_peer_that_was_missed_have_one_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that answers late, or whose machine takes connections and nothing else, was waited for twice as long."""
    connect = asyncio.open_connection
    took: list[float] = []
    now = asyncio.get_running_loop().time

    async def slowly(host: str, port: int) -> object:
        await asyncio.sleep(0.9)
        return await connect(host, port)

    async def p2pd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await _bindings.read_pbmsg_safe(reader, request := _pb.Request())
            if request.type == _pb.Request.LIST_PEERS:
                await _bindings.write_pbmsg(writer, _pb.Response(type=_pb.Response.OK))
            await reader.read()

    monkeypatch.setattr(asyncio, "open_connection", slowly)
    remote = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = remote.sockets[0].getsockname()[1]
    peer = PeerAddress(Identity.ephemeral().peer_id, (f"/ip4/127.0.0.1/tcp/{port}",))
    settings = Settings(timeouts=replace(TimeoutSettings(), connect_s=1.0))
    daemon = Daemon(Identity.ephemeral(), settings, listen=False, accept=cast(Any, None), on_death=lambda: None)
    daemon._p2p, daemon.alive = SimpleNamespace(daemon_listen_maddr={"unix": str(tmp_path / "p2pd")}), True
    async with remote, await asyncio.start_unix_server(p2pd, tmp_path / "p2pd"):
        for _ in range(2):
            began = now()
            with pytest.raises(Unreachable, match="did not answer within 1 s"):
                await daemon.dial(peer, "echo")
            took.append(now() - began)
    assert max(took) < 1.6, took
