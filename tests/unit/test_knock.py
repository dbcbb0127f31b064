from __future__ import annotations

import asyncio

import pytest

from swarm.errors import ProtocolError, Unreachable
from swarm.knock import knock
from swarm.types import PeerAddress, PeerId


async def test_a_knock_needs_one_address_at_which_somebody_listens() -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    here, relayed = f"/ip4/127.0.0.1/tcp/{port}", "/ip4/127.0.0.1/tcp/1/p2p-circuit"
    async with server:
        await knock(PeerAddress(PeerId("a"), ("/ip4/127.0.0.1/tcp/1", here)), 3.0)
    await knock(PeerAddress(PeerId("a"), (relayed,)), 3.0)
    with pytest.raises(Unreachable, match=r"nothing listens at 127\.0\.0\.1 port"):
        await knock(PeerAddress(PeerId("a"), (here,)), 3.0)
    with pytest.raises(ProtocolError):
        await knock(PeerAddress(PeerId("a"), ("/unix/etc",)), 3.0)


async def test_a_knock_does_not_wait_for_addresses_that_do_not_answer_once_another_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many peers announce an address of their own network as well, from which nothing at all comes back elsewhere."""
    connect = asyncio.open_connection

    async def behind_a_router(host: str, port: int) -> object:
        if port == 1:
            await asyncio.Event().wait()
        return await connect(host, port)

    monkeypatch.setattr(asyncio, "open_connection", behind_a_router)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    here = f"/ip4/127.0.0.1/tcp/{server.sockets[0].getsockname()[1]}"
    before = asyncio.all_tasks()
    async with server, asyncio.timeout(5):
        await knock(PeerAddress(PeerId("a"), ("/ip4/10.0.0.1/tcp/1", here)), 60.0)
        assert asyncio.all_tasks() <= before
        with pytest.raises(Unreachable):
            await knock(PeerAddress(PeerId("a"), ("/ip4/10.0.0.1/tcp/1",)), 0.1)
