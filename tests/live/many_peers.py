"""Several peers in one process, for tests of many models: a peer of its own is mostly Python's imports.

Reads ``[{"model": ..., "layers": "0:2", "swarm": "a"}, ...]`` from its argument; those of one swarm join the first of
it. Prints ``{"swarm": ..., "addresses": [...]}`` for each that is ready, and serves until its stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace

import uvloop

from peers.server import serve
from swarm.config import ModelSettings, NetworkSettings, PeerSettings, Settings


async def start(spec: dict[str, str], initial_peers: tuple[str, ...]) -> list[str]:
    settings = replace(
        Settings(),
        model=ModelSettings(name=spec["model"], dtype="float32"),
        peer=PeerSettings(layers=spec["layers"], threads=1),
        network=NetworkSettings(initial_peers=initial_peers),
    )
    ready: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

    def report(event: dict[str, object]) -> None:
        if event["event"] == "ready":
            addresses = event["addresses"]
            assert isinstance(addresses, list)
            ready.set_result(addresses)

    serving.append(asyncio.create_task(serve(settings, report)))
    await asyncio.wait((serving[-1], ready), return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        serving[-1].result()  # raises
    return ready.result()


async def main(specs: list[dict[str, str]]) -> None:
    first: dict[str, tuple[str, ...]] = {}
    for spec in specs:
        addresses = await start(spec, first.get(spec["swarm"], ()))
        first.setdefault(spec["swarm"], tuple(addresses))
        print(json.dumps({"swarm": spec["swarm"], "addresses": addresses}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # the p2pd processes end with this one


serving: list[asyncio.Task[None]] = []

if __name__ == "__main__":
    uvloop.run(main(json.loads(sys.argv[1])))
