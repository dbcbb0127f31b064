"""Six peers with room for eight layers each arrange themselves over a model of 30, and again when one is killed.

``python -m tests.bench_arrangement --starts 12``: each start begins with six ``swarm-peer serve --layers auto`` at
once, which know nothing but a DHT node. When all are ready, every layer has to be served. Then a generation runs, one
peer (another one each time) is killed in the middle of it, and the tokens have to be those of ``transformers``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from swarm import connect_async
from swarm.announcement_record import check_record
from swarm.client import AsyncClient
from swarm.coverage import missing_layers
from swarm.dht import Dht
from swarm.identity import Identity
from swarm.libp2p import Libp2pTransport
from swarm.local import LocalSwarm
from swarm.types import LayerRange, PeerId, PeerState
from tests.live.helpers import MODEL, SETTINGS, Reference, Watched, watch

WHOLE = LayerRange(0, 30)
ROOM_MB = "200"
"""In float32 a layer of the built-in model has 14.2 MB. 200 MB less a tenth of margin and 28 MB of buffers have room
for 8 of them with KV caches for 2,048 tokens, also with layer 0 (the embedding stays in the file); for 1 with the head,
whose table counts 113 MB. The refusal of a range that does not fit names these numbers."""
PEERS = 6
PROMPT = "The harbour was"
TOKENS = 48
KILL_AT = 8
CLOSED_S = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    ready_s: float
    layers: list[LayerRange]
    victim: LayerRange
    closed_s: float
    """From the kill until living peers served every layer again."""
    tokens_s: float
    """From the kill to the next token."""


class Together(LocalSwarm):
    """All peers at once, through a DHT node that is there."""

    def start(self) -> None:
        try:
            self._guard.start()
            self._start(self._ranges)
        except BaseException:
            self.stop()
            raise


@asynccontextmanager
async def bootstrap() -> AsyncIterator[str]:
    """Address of a DHT node that serves no layers."""
    async with (
        Libp2pTransport(Identity.ephemeral(), SETTINGS, listen=True) as transport,
        Dht(transport, SETTINGS, check_record) as dht,
    ):
        await dht.connect([])
        yield transport.local.multiaddrs[0]


async def until_covered(client: AsyncClient, gone: PeerId, began: float, limit_s: float) -> float:
    """Seconds from ``began`` until living peers serve every layer; AssertionError after ``limit_s``."""
    while True:
        announcements = [a for a in await client.peers() if a.peer.peer_id != gone]
        served = [a.layers for a in announcements if a.state is PeerState.SERVING and client.view.check(a) is None]
        if not (missing := missing_layers(served, WHOLE)):
            return time.monotonic() - began
        assert time.monotonic() - began < limit_s, f"missing are {missing}, served {served}"
        await asyncio.sleep(0.25)


async def one_start(folder: Path, reference: Reference, victim: int) -> Outcome:
    """``victim``: which peer is killed, counted by first layer."""
    async with bootstrap() as address:
        env = {"SWARM_PEER_MAX_MEMORY_MB": ROOM_MB, "SWARM_INITIAL_PEERS": address}
        swarm = Together(MODEL, ["auto"] * PEERS, dtype="float32", extra_args=["--verbose"], log_dir=folder, env=env)
        began = time.monotonic()
        await asyncio.to_thread(swarm.start)
        try:
            ready_s = time.monotonic() - began
            layers = sorted(peer.layers for peer in swarm.peers)
            missing = missing_layers(layers, WHOLE)
            assert not missing, f"missing are {missing}, taken {[str(one) for one in layers]}"
            index = sorted(range(PEERS), key=lambda i: swarm.peers[i].layers)[victim]
            gone = swarm.peers[index]
            async with connect_async(swarm.initial_peers, settings=SETTINGS) as client:
                await until_covered(client, PeerId(""), time.monotonic(), 10.0)
                closed_s, tokens_s = await _through_a_kill(client, swarm, index, reference)
            return Outcome(ready_s, layers, gone.layers, closed_s, tokens_s)
        finally:
            await asyncio.to_thread(swarm.stop)


async def _through_a_kill(
    client: AsyncClient, swarm: LocalSwarm, index: int, reference: Reference
) -> tuple[float, float]:
    prompt = client.tokenizer.encode(PROMPT)
    expected = reference.greedy(prompt, TOKENS)
    gone = swarm.peers[index].peer_id
    killed_at = resumed_at = 0.0
    closing: asyncio.Task[float] | None = None

    def on_token(token: int, _: Watched) -> None:
        nonlocal killed_at, resumed_at, closing
        if token == KILL_AT and closing is None:
            swarm.kill(index)
            killed_at = time.monotonic()
            closing = asyncio.create_task(until_covered(client, gone, killed_at, CLOSED_S))
        resumed_at = time.monotonic() if token == KILL_AT + 3 else resumed_at  # some were on their way already

    seen = await watch(client, prompt, on_token, max_tokens=TOKENS, temperature=0, limit_s=90.0)
    assert closing is not None
    closed_s = await closing
    assert seen.token_ids == expected, f"{seen.token_ids} instead of {expected}"
    return closed_s, resumed_at - killed_at


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--starts", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="which peer is killed in the first start")
    options = parser.parse_args()
    reference = Reference.built_in()
    good = 0
    for start in range(options.starts):
        with tempfile.TemporaryDirectory() as folder:
            try:
                one = asyncio.run(one_start(Path(folder), reference, (options.first + start) % PEERS))
            except Exception as error:  # one bad start is counted, and the others still tell something
                print(f"{start + 1}: FAILED: {error!r}; logs: {_tails(Path(folder))}", flush=True)
                continue
        good += 1
        print(
            f"{start + 1}: ready after {one.ready_s:.1f} s, {' '.join(map(str, one.layers))}; {one.victim} killed: "
            f"covered again after {one.closed_s:.1f} s, next token after {one.tokens_s:.1f} s, tokens as expected",
            flush=True,
        )
    print(f"{good} of {options.starts} starts covered all layers, before and after the kill")
    raise SystemExit(0 if good == options.starts else 1)


def _tails(folder: Path) -> str:
    return "".join(f"\n--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(folder.iterdir()))


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
