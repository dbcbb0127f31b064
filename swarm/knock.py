"""Whether somebody listens where a peer says it is, found out without the p2p daemon."""

from __future__ import annotations

import asyncio

from swarm.announcement_record import MAX_MULTIADDRS
from swarm.errors import ProtocolError, Unreachable
from swarm.multiaddrs import tcp_endpoint
from swarm.types import PeerAddress


async def knock(peer: PeerAddress, deadline_s: float) -> None:
    """A TCP connection to any of the announced addresses, the first that answers; relayed ones are left to libp2p.

    (libp2p itself would reuse the connection through which the joiner asks, which says nothing about its address.)
    Raises ``Unreachable``, or ``ProtocolError`` for what is no address.
    """
    try:
        endpoints = [tcp_endpoint(address) for address in peer.multiaddrs[:MAX_MULTIADDRS]]
    except ValueError as error:
        raise ProtocolError(f"a peer that gives as its address: {error}") from None
    direct = [endpoint for endpoint in endpoints if endpoint is not None]
    if len(direct) < len(endpoints) or not direct:
        return

    async def dial(host: str, port: int) -> bool:
        try:
            async with asyncio.timeout(deadline_s):
                _, writer = await asyncio.open_connection(host, port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    dials = [asyncio.create_task(dial(host, port)) for host, port in direct]
    try:
        for answered in asyncio.as_completed(dials):
            if await answered:
                return
    finally:
        for task in dials:
            task.cancel()
        await asyncio.gather(*dials, return_exceptions=True)
    raise Unreachable(f"nothing listens at {', '.join(f'{host} port {port}' for host, port in direct)}")
