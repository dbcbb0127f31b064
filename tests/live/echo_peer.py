"""A peer in a process of its own, for tests that kill it: says where it listens, then serves until stdin ends.

Protocols: ``echo`` sends each frame back, ``mute`` never answers, ``cut`` sends one frame and drops the stream, ``bye``
sends one frame and ends, ``big`` sends one frame of 2 MiB, ``fail`` raises.
"""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

from swarm.config import LimitSettings, NetworkSettings, Settings
from swarm.identity import Identity
from swarm.libp2p import Libp2pTransport
from swarm.transport import Stream


async def echo(stream: Stream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


async def mute(stream: Stream) -> None:
    while await stream.receive() is not None:
        pass


async def cut(stream: Stream) -> None:
    await stream.send(b"first")
    stream.abort()


async def bye(stream: Stream) -> None:
    await stream.send(b"first")


async def big(stream: Stream) -> None:
    await stream.send(bytes(2 * 1024 * 1024))
    await stream.receive()


async def fail(stream: Stream) -> None:
    raise RuntimeError("a bug in a handler")


async def main(maddr: str) -> None:
    settings = Settings(network=NetworkSettings(host_maddrs=(maddr,)), limits=LimitSettings(max_streams_per_peer=8))
    async with Libp2pTransport(Identity.ephemeral(), settings) as transport:
        for handler in (echo, mute, cut, bye, big, fail):
            await transport.serve(handler.__name__, handler)
        facts = {"daemon_pid": transport.daemon_pid, "addresses": transport.local.multiaddrs}
        print(json.dumps(facts), flush=True)
        await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1] if len(sys.argv) > 1 else "/ip4/127.0.0.1/tcp/0"))
