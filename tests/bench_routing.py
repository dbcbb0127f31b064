"""How long planning takes, for swarms of several sizes. ``python -m tests.bench_routing [--peers N] [--rounds N]``

Peers hold ranges of 2 to 40 of 80 layers, as their memory has it; each tells of links to eight others and is vouched
for, and the planner knows what a client's does. A process's first plan works out the link times, too; for later ones
the view's refresh has done so.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace

from swarm.admission import check_announcement
from swarm.config import PlannerSettings, PolicySettings
from swarm.health import Health
from swarm.knowledge import known
from swarm.link_times import Links, links_of
from swarm.routing import Demand, Plan, plan
from swarm.types import (
    LINK_SUFFIX,
    Announcement,
    LayerRange,
    LinkReport,
    ModelId,
    PeerAddress,
    PeerId,
    PeerState,
    Voucher,
)

LAYERS = 80
DEMAND = Demand(tokens=1_000, prompt_tokens=500, new_tokens=200, activation_bytes=16_384)


class View:
    """As ``swarm.discovery.SwarmView``, for announcements that were just read."""

    def __init__(self, announcements: list[Announcement]) -> None:
        self._read_at = {a.peer.peer_id: time.monotonic() for a in announcements}
        self._announcements = announcements
        self._links: Links | None = None

    def check(self, announcement: Announcement) -> str | None:
        return check_announcement(PolicySettings(), announcement)

    def links(self) -> Links:
        if self._links is None:
            self._links = links_of(self._announcements, self.age)
        return self._links

    def age(self, peer_id: PeerId) -> float:
        return time.monotonic() - self._read_at[peer_id]


def random_swarm(peers: int, rng: random.Random) -> list[Announcement]:
    """And one more that holds everything, slowly."""
    ids = [PeerId(f"peer{index:0{LINK_SUFFIX}}") for index in range(peers + 1)]
    own_s = {peer_id: rng.lognormvariate(-4.0, 0.6) for peer_id in ids}
    announcements = []
    for peer_id in ids:
        length = min(LAYERS, max(2, round(rng.lognormvariate(2.0, 0.7))))
        start = rng.randint(0, LAYERS - length)
        others = rng.sample(ids, min(8, peers))
        ways = {other: (own_s[peer_id] + own_s[other]) / 2 * rng.uniform(0.5, 1.5) for other in others}
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
                voucher=Voucher(ids[0], 0.0, b"signature"),
                links=tuple(
                    LinkReport(other[-LINK_SUFFIX:], s, s / 10) for other, s in ways.items() if other != peer_id
                ),
            )
        )
    whole = replace(announcements[-1], layers=LayerRange(0, LAYERS), decode_s_per_layer=0.01, kv_tokens_free=50_000)
    return [*announcements[:-1], whole]


def timed(announcements: list[Announcement], view: View, health: Health, seed: int) -> tuple[float, float, Plan]:
    """Seconds, seconds of the processor, the plan."""
    began, work_began = time.perf_counter(), time.process_time()
    found = plan(
        announcements,
        LayerRange(0, LAYERS),
        DEMAND,
        known(view, health, time.monotonic(), PlannerSettings(), seed=seed),
    )
    return time.perf_counter() - began, time.process_time() - work_began, found


def in_words(times: list[tuple[float, float, Plan]]) -> str:
    wall_ms, work_ms = ([taken[column] * 1e3 for taken in times] for column in (0, 1))
    return f"{statistics.median(wall_ms):6.1f} ms (best {min(wall_ms):.1f}, processor {statistics.median(work_ms):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", type=int, nargs="*", default=[3, 10, 100, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for peers in options.peers:
        announcements, health = random_swarm(peers, random.Random(peers)), Health(60.0)
        views = [View(announcements) for _ in range(options.rounds)]
        first = [timed(announcements, view, health, seed) for seed, view in enumerate(views)]
        later = [timed(announcements, view, health, seed) for seed, view in enumerate(views)]
        found = later[-1][2]
        print(
            f"{peers:6} peers: {in_words(later)}, with link times {in_words(first)};"
            f" {len(found.hops)} hops, {found.decode_s * 1e3:.0f} ms a token"
        )


if __name__ == "__main__":
    main()
