"""How long a swarm view takes to read many announcements from a real DHT. ``python -m tests.bench_view [--peers N]``

Three DHT nodes on this machine hold the signed records, each with a voucher and eight link times, of as many identities
as there are peers. A client reads them as a new process does, nothing cached, and then again as every refresh does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import time
from dataclasses import replace

import uvloop

from swarm.admission import vouch
from swarm.announcement_record import _decode, check_record, encode_announcement
from swarm.config import DiscoverySettings, Settings
from swarm.dht import Dht
from swarm.discovery import SwarmView, bucket_of, key_of
from swarm.identity import Identity
from swarm.libp2p import Libp2pTransport
from swarm.types import LINK_SUFFIX, Announcement, Capacity, LayerRange, LinkReport, ModelId, PeerAddress, PeerState

MODEL, LAYERS, PER_BUCKET = ModelId("smollm2-135m@0123456789abcdef"), 30, 8
AT_ONCE = 16
SETTINGS = Settings(discovery=replace(DiscoverySettings(), view_period_s=3600.0))
TTL_S = 60.0


def announcement(identity: Identity, others: list[Identity], rng: random.Random) -> Announcement:
    start = rng.randrange(LAYERS - 8)
    layers = LayerRange(start, start + 8)
    seen = rng.sample(others, 8)
    return Announcement(
        peer=PeerAddress(
            identity.peer_id, (f"/ip4/203.0.113.7/tcp/{rng.randint(2000, 60000)}/p2p/{identity.peer_id}",)
        ),
        model=MODEL,
        layers=layers,
        state=PeerState.SERVING,
        version="0.1.0",
        decode_s_per_layer=0.001,
        prefill_s_per_token_layer=0.0001,
        kv_tokens_free=10_000,
        sent_at=time.time(),
        capacity=Capacity(8, 8, 8),
        links=tuple(
            LinkReport(other.peer_id[-LINK_SUFFIX:], rng.uniform(0, 0.1), rng.uniform(0, 0.01)) for other in seen
        ),
        voucher=vouch(seen[0], identity.peer_id, MODEL, layers),
    )


async def measure(peers: int, rounds: int) -> None:
    rng = random.Random(1)
    identities = [Identity.ephemeral() for _ in range(peers)]
    async with contextlib.AsyncExitStack() as stack:

        async def node(listen: bool) -> Dht:
            transport = await stack.enter_async_context(Libp2pTransport(Identity.ephemeral(), SETTINGS, listen))
            return await stack.enter_async_context(Dht(transport, SETTINGS, check_record))

        nodes = [await node(listen=True) for _ in range(3)]
        first = nodes[0]._transport.local.multiaddrs
        client = await node(listen=False)
        for other in (*nodes[1:], client):
            await other.connect(first)
        told = [announcement(identity, identities, rng) for identity in identities]
        records = [encode_announcement(a, identity) for a, identity in zip(told, identities, strict=True)]
        gate = asyncio.Semaphore(AT_ONCE)

        async def publish(a: Announcement, record: bytes) -> bool:
            async with gate:
                key = key_of(MODEL, bucket_of(a.layers.start, PER_BUCKET))
                return await rng.choice(nodes).store(key, a.peer.peer_id, record, TTL_S)

        began = time.perf_counter()
        stored = await asyncio.gather(*map(publish, told, records))
        size = sum(map(len, records)) / peers
        print(f"{sum(stored)} records of {size:.0f} bytes stored in {time.perf_counter() - began:.1f} s", flush=True)
        for _ in range(rounds):
            _decode.cache_clear()
            view = SwarmView(client, MODEL, LAYERS, SETTINGS.discovery)
            times, worked = [], []
            for _ in range(2):
                began, work_began = time.perf_counter(), time.process_time()
                found = await view.refresh()
                view.links()
                times.append(time.perf_counter() - began)
                worked.append(time.process_time() - work_began)
            print(
                f"{len(found)} announcements read in {times[0]:.2f} s (processor {worked[0]:.2f}), "
                f"again in {times[1]:.2f} s ({worked[1]:.2f})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    uvloop.run(measure(options.peers, options.rounds))


if __name__ == "__main__":
    main()
