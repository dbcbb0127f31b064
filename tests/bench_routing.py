"""How long planning takes, for swarms of several sizes. ``python -m tests.bench_routing [--peers N] [--rounds N]``

Peers hold ranges of 2 to 40 of 80 layers, as their memory has it; each has measured links to eight others.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from swarm.link_times import Links, LinkTime
from swarm.routing import Demand, Knowledge, plan
from swarm.types import Announcement, LayerRange, ModelId, PeerAddress, PeerId, PeerState

LAYERS = 80


def random_swarm(peers: int, rng: random.Random) -> tuple[list[Announcement], Links]:
    ids = [PeerId(f"p{index}") for index in range(peers)]
    announcements = []
    for peer_id in ids:
        length = min(LAYERS, max(2, round(rng.lognormvariate(2.0, 0.7))))
        start = rng.randint(0, LAYERS - length)
        announcements.append(
            Announcement(
                peer=PeerAddress(peer_id),
                model=ModelId("bench@0"),
                layers=LayerRange(start, start + length),
                state=PeerState.SERVING,
                version="0",
                decode_s_per_layer=rng.lognormvariate(-6.5, 0.6),
                prefill_s_per_token_layer=rng.lognormvariate(-10.0, 0.6),
                kv_tokens_free=rng.choice([500, 5_000, 50_000]),
                queue_s=rng.choice([0.0, 0.0, 0.01]),
            )
        )
    own_s = {peer_id: rng.lognormvariate(-4.0, 0.6) for peer_id in ids}
    times = {}
    for source in ids:
        for target in rng.sample(ids, min(8, peers - 1)):
            if target != source:
                between_s = (own_s[source] + own_s[target]) / 2 * rng.uniform(0.5, 1.5)
                times[source, target] = LinkTime(between_s, jitter_s=between_s / 10)
    return announcements, Links(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", type=int, nargs="*", default=[3, 10, 100, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    wanted = LayerRange(0, LAYERS)
    for peers in options.peers:
        announcements, links = random_swarm(peers, random.Random(peers))
        announcements.append(Announcement(**{**_facts(announcements[0]), "layers": wanted, "decode_s_per_layer": 0.01}))
        demand = Demand(tokens=1_000, prompt_tokens=500, new_tokens=200, activation_bytes=16_384)
        times, worked = [], []
        for seed in range(options.rounds):
            began, work_began = time.perf_counter(), time.process_time()
            found = plan(announcements, wanted, demand, Knowledge(links=links, seed=seed))
            times.append(time.perf_counter() - began)
            worked.append(time.process_time() - work_began)
        print(
            f"{peers:6} peers: {statistics.median(times) * 1e3:6.1f} ms (best {min(times) * 1e3:.1f}, "
            f"processor {statistics.median(worked) * 1e3:.1f});"
            f" {len(found.hops)} hops, {found.decode_s * 1e3:.0f} ms a token"
        )


def _facts(announcement: Announcement) -> dict[str, object]:
    facts = {name: getattr(announcement, name) for name in Announcement.__dataclass_fields__}
    return facts | {"peer": PeerAddress(PeerId("whole"))}


if __name__ == "__main__":
    main()
