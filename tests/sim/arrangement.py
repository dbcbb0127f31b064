"""A swarm that arranges itself, simulated for days: who joins, leaves, crashes and lies, and what becomes of coverage.

Pure and seeded; the placement is the real one (``peers.placement``). What is simulated:

- *Peers.* Memory and speed as on volunteers' machines: mostly 2 to 12 layers, a few with many more; speeds log-normal,
  loosely tied to memory. They arrive at random, by day more than by night, and stay for a day on average; most of
  them crash. Some lie about their speed.
- *Knowledge.* What a peer announces is known after up to an announce period; a crash only when its announcement
  has expired and the view is read again. Everybody decides by that, never by the truth.
- *Loading* takes seconds per layer; a mover serves its old range meanwhile and looks again before it drops it.

``python -m tests.sim.arrangement --peers 2000 --days 3 --svg FILE`` reports and draws.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from peers.placement import MOST_CREDIT, Holder, Spare, Strength, arrange
from peers.rebalance import Mover, close_gaps, may_leave, should_move, tolerable
from swarm.config import DiscoverySettings, PlacementSettings
from swarm.types import Capacity, LayerRange, PeerId

NOWHERE = Capacity(0, 0, 0)
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


@dataclass(frozen=True, slots=True)
class Scenario:
    peers: int = 1000
    """On average."""
    layers: int = 80
    hours: float = 24.0
    life_s: float = DAY_S
    crash_share: float = 0.75
    """Of those that go; the others say goodbye."""
    liar_share: float = 0.03
    lie: float = 6.0
    """What a liar's announced speed is multiplied by ..."""
    found_out_s: float = 900.0
    """... until those who use and probe it have measured it."""
    load_s_per_layer: float = 3.0
    night: float = 0.3
    """How far the rate of arrivals falls at night, and rises by day."""
    capacities: tuple[int, ...] = (2, 2, 3, 3, 4, 4, 4, 6, 6, 8, 8, 12, 16, 24, 40)
    speed_sigma: float = 0.7


@dataclass(slots=True)
class Peer:
    peer_id: PeerId
    capacity: Capacity
    rate: float
    credit: float
    """What others reckon with: the announced rate, within reason."""
    moved_at: float
    layers: LayerRange | None = None
    """What it serves."""
    loading: LayerRange | None = None
    alive: bool = True
    known: LayerRange | None = None
    """Where others think that it is, or will be."""


@dataclass(slots=True)
class Report:
    """Sampled once a minute."""

    hours: list[float] = field(default_factory=list)
    efficiency: list[float] = field(default_factory=list)
    """True throughput of the weakest layer, by what the same peers could do at most."""
    peers: list[int] = field(default_factory=list)
    moves: int = 0
    joins: int = 0
    peer_hours: float = 0.0
    holes: list[float] = field(default_factory=list)
    """For how long a layer was served by nobody, though the peers had room for it, in seconds ..."""
    closing: list[float] = field(default_factory=list)
    """... and how long of that the swarm knew it: a crash shows only when an announcement expires."""

    @property
    def moves_share_per_hour(self) -> float:
        return self.moves / self.peer_hours if self.peer_hours else 0.0

    def after(self, hours: float) -> list[float]:
        return [value for at, value in zip(self.hours, self.efficiency, strict=True) if at >= hours]

    def text(self) -> str:
        steady = self.after(2.0)
        low = sorted(steady)[len(steady) // 100] if steady else math.nan
        return (
            f"{statistics.mean(self.peers):.0f} peers, {self.joins} joins, {self.hours[-1]:.0f} h: weakest layer at "
            f"{statistics.mean(steady):.1%} of the optimum (1st percentile {low:.1%}, least {min(steady):.1%}), "
            f"{self.moves_share_per_hour:.2%} of peers move in an hour, "
            f"{len(self.holes)} holes, the longest {max(self.holes, default=0.0):.0f} s, "
            f"{max(self.closing, default=0.0):.0f} s of it known"
        )


class Arrangement:
    """One run: :meth:`run` gives the report."""

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        placement: PlacementSettings | None = None,
        discovery: DiscoverySettings | None = None,
    ) -> None:
        self.scenario = scenario
        self.placement = placement or PlacementSettings()
        self.discovery = discovery or DiscoverySettings()
        self.rng = random.Random(seed)
        self.now = 0.0
        self.report = Report()
        self.peers: dict[PeerId, Peer] = {}
        """Those that are alive."""
        self.true = Strength((0.0,) * scenario.layers, (0,) * scenario.layers)
        self.known = self.true
        self.known_peers: dict[PeerId, Peer] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.complete = False
        """Coverage was complete once."""
        self._bare_since: dict[int, float] = {}
        self._known_since: dict[int, float] = {}

    def run(self) -> Report:
        for _ in range(self.scenario.peers):  # the swarm comes together within an hour
            self.at(self.rng.uniform(0.0, HOUR_S), self.join)
        self.at(self.rng.expovariate(self.scenario.peers / self.scenario.life_s), self.arrive)
        self.at(self.placement.check_period_s, self.check)
        self.at(60.0, self.sample)
        end = self.scenario.hours * HOUR_S
        while self._events[0][0] <= end:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self.report

    def at(self, delay_s: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay_s, self._count, event))

    # --- life

    def arrive(self) -> None:
        hour = self.now / HOUR_S % 24
        by_day = 1 - self.scenario.night * math.cos(2 * math.pi * hour / 24)
        if self.rng.random() < by_day / (1 + self.scenario.night):
            self.join()
        rate = self.scenario.peers / self.scenario.life_s * (1 + self.scenario.night)
        self.at(self.rng.expovariate(rate), self.arrive)

    def new_peer(self) -> Peer:
        layers = self.rng.choice(self.scenario.capacities)
        ends = max(1, layers - 2)
        rate = 100.0 * layers**0.5 * self.rng.lognormvariate(0.0, self.scenario.speed_sigma)
        lie = self.scenario.lie if self.rng.random() < self.scenario.liar_share else 1.0
        return Peer(
            PeerId(f"{self.rng.getrandbits(64):016x}"),
            Capacity(layers, ends, ends, whole=ends >= self.scenario.layers),
            rate,
            min(rate * lie, MOST_CREDIT * 100.0 * 2.0),  # the median of these swarms is about 200
            self.now,
        )

    def join(self) -> None:
        peer = self.new_peer()
        self.peers[peer.peer_id] = peer
        self.report.joins += 1
        self.at(self.placement.settle_s, lambda: self.decide(peer))
        self.at(self.rng.expovariate(1 / self.scenario.found_out_s), lambda: self.find_out(peer))
        self.at(self.rng.expovariate(1 / self.scenario.life_s), lambda: self.go(peer))

    def decide(self, peer: Peer) -> None:
        """By what it reads of the DHT now, where leases stand that are a moment old."""
        spare = Spare(peer.peer_id, peer.capacity, peer.credit)
        placed, _ = arrange(self.known, runs(self.known.servers), [spare])
        if peer.alive:
            self.load(peer, placed[peer.peer_id], known_in_s=1.0)

    def load(self, peer: Peer, layers: LayerRange, known_in_s: float) -> None:
        held = set(range(peer.layers.start, peer.layers.end)) if peer.layers else set()
        count = len(set(range(layers.start, layers.end)) - held)
        peer.loading, peer.moved_at = layers, self.now
        self.at(known_in_s, lambda: self.learn(peer, layers))
        self.at(count * self.scenario.load_s_per_layer + 1.0, lambda: self.loaded(peer))

    def loaded(self, peer: Peer) -> None:
        if not peer.alive or peer.loading is None:
            return
        if peer.layers is not None:
            servers = self.known.plus(peer.layers, 1.0).servers  # we count for the old range, too
            if not may_leave(peer.layers, peer.loading, servers) and all(self.known.servers):
                peer.loading, old = None, peer.layers
                self.at(1.0, lambda: self.learn(peer, old))
                return
            self.true = self.true.plus(peer.layers, -peer.rate)
            self.report.moves += 1
        peer.layers, peer.loading = peer.loading, None
        self.true = self.true.plus(peer.layers, peer.rate)
        self.watch()

    def find_out(self, peer: Peer) -> None:
        """Probes have shown how fast it really is."""
        if peer.known is not None:
            self.known = self.known.plus(peer.known, peer.rate).plus(peer.known, -peer.credit)
        peer.credit = peer.rate

    def go(self, peer: Peer) -> None:
        peer.alive = False
        del self.peers[peer.peer_id]
        if peer.layers is not None:
            self.true = self.true.plus(peer.layers, -peer.rate)
            self.watch()
        ttl_s = self.discovery.announce_ttl_s
        crashed = self.rng.random() < self.scenario.crash_share
        known_in_s = ttl_s - self.rng.uniform(0, self.discovery.announce_period_s) if crashed else 0.0
        self.at(known_in_s + self.rng.uniform(0, self.discovery.view_period_s), lambda: self.miss(peer))

    # --- knowledge

    def learn(self, peer: Peer, layers: LayerRange) -> None:
        if peer.alive and layers == (peer.loading or peer.layers):  # it says so still
            self.forget(peer)
            peer.known = layers
            self.known = self.known.plus(layers, peer.credit)
            self.known_peers[peer.peer_id] = peer
            self.notice()

    def forget(self, peer: Peer) -> None:
        if peer.known is not None:
            self.known = self.known.plus(peer.known, -peer.credit)
            peer.known = None
            del self.known_peers[peer.peer_id]

    def miss(self, peer: Peer) -> None:
        self.forget(peer)
        self.notice()

    def notice(self) -> None:
        """Knowledge has changed: a gap is acted on at once."""
        self.watch()
        if self.complete and not all(self.known.servers):
            self.at(0.5, self.close)

    # --- moving

    def check(self) -> None:
        """All peers ask themselves once in a period, by the same knowledge: that they act at once is the worst case."""
        self.at(self.placement.check_period_s, self.check)
        if not all(self.known.servers):
            self.close()
            return
        if min(self.known.secured) >= tolerable(self.known, self.placement):
            return
        for peer in self.settled():
            assert peer.layers is not None
            me = Mover(peer.layers, peer.capacity, peer.credit, peer.moved_at)
            target = should_move(me, self.known, self.placement, self.now, self.rng.random())
            if target is not None:
                self.load(peer, target, known_in_s=1.0)

    def close(self) -> None:
        """Everybody works out who has to move, and those do."""
        if all(self.known.servers):
            return
        holders = [
            Holder(p.peer_id, p.known, p.capacity if p.loading is None else NOWHERE)
            for p in self.known_peers.values()
            if p.known is not None
        ]
        moves = close_gaps(holders, self.scenario.layers)
        for peer in self.settled():
            if peer.peer_id in moves:
                self.load(peer, moves[peer.peer_id], known_in_s=1.0)

    def settled(self) -> list[Peer]:
        return [
            peer
            for peer in self.peers.values()
            if peer.layers is not None and peer.loading is None and peer.known == peer.layers
        ]

    # --- watching

    def watch(self) -> None:
        """The truth has changed: note which layers are bare, and for how long those were that are no longer."""
        self.complete = self.complete or all(self.true.servers)
        for layer, servers in enumerate(self.true.servers):
            if servers == 0 and self.complete:
                self._bare_since.setdefault(layer, self.now)
                if self.known.servers[layer] == 0:
                    self._known_since.setdefault(layer, self.now)
            elif layer in self._bare_since:
                self._end_hole(layer)
        if self._bare_since and sum(peer.capacity.middle for peer in self.peers.values()) < self.scenario.layers + 4:
            self._bare_since.clear()
            self._known_since.clear()

    def _end_hole(self, layer: int) -> None:
        self.report.holes.append(self.now - self._bare_since.pop(layer))
        self.report.closing.append(self.now - self._known_since.pop(layer, self.now))

    def sample(self) -> None:
        self.at(60.0, self.sample)
        optimum = sum(peer.rate for peer in self.peers.values()) / self.scenario.layers
        self.report.hours.append(self.now / HOUR_S)
        self.report.efficiency.append(min(self.true.rates) / optimum if optimum else 0.0)
        self.report.peers.append(len(self.peers))
        self.report.peer_hours += len(self.peers) / 60


def runs(servers: tuple[int, ...]) -> list[LayerRange]:
    """The layers that somebody serves, as ranges."""
    found: list[LayerRange] = []
    for layer, count in enumerate(servers):
        if count and found and found[-1].end == layer:
            found[-1] = LayerRange(found[-1].start, layer + 1)
        elif count:
            found.append(LayerRange(layer, layer + 1))
    return found


def draw(report: Report, scenario: Scenario) -> str:
    """The weakest layer's throughput and the number of peers over time, as SVG."""
    width, height, left, top = 720, 260, 56, 30
    end, most = report.hours[-1], max(report.peers) * 1.1

    def line(values: list[float], colour: str) -> str:
        step = max(1, len(values) // 700)
        points = [
            f"{left + width * at / end:.1f},{top + height * (1 - value):.1f}"
            for at, value in list(zip(report.hours, values, strict=True))[::step]
        ]
        return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{" ".join(points)}"/>'

    shares = [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]
    grid = "".join(
        f'<line x1="{left}" x2="{left + width}" y1="{(y := top + height * (1 - share)):.1f}" y2="{y:.1f}" '
        f'stroke="{"#888" if share == 0.9 else "#ddd"}"/><text x="{left - 6}" y="{y + 4:.1f}" '
        f'text-anchor="end">{share:.0%}</text>'
        for share in shares
    )
    hours = "".join(
        f'<text x="{left + width * hour / end:.1f}" y="{top + height + 16}" text-anchor="middle">{hour} h</text>'
        for hour in range(0, int(end) + 1, max(1, int(end) // 6))
    )
    title = (
        f"The weakest layer's throughput, by the optimum of the same peers; {scenario.peers} peers, "
        f"{scenario.layers} layers"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {top + height + 46}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{left}" y="18" font-size="13">{title}</text>{grid}{hours}'
        f"{line([count / most for count in report.peers], '#9bd')}{line(report.efficiency, '#c30')}"
        f'<text x="{left}" y="{top + height + 36}">red: weakest layer; blue: peers, of {most:.0f}; '
        f"{report.moves_share_per_hour:.2%} of peers move in an hour</text></svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--days", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    scenario = Scenario(peers=options.peers, layers=options.layers, hours=24 * options.days)
    began = time.perf_counter()
    report = Arrangement(scenario, options.seed).run()
    print(f"seed {options.seed}: {report.text()}; simulated in {time.perf_counter() - began:.0f} s")
    if options.svg:
        options.svg.write_text(draw(report, scenario), encoding="utf-8")


if __name__ == "__main__":
    main()
