"""Predicted against measured time a token, on real peers. ``python -m tests.bench_predictions [--only hops choice]``

Five peers of the built-in model run on this machine, each behind a proxy that can delay what passes. Every peer holds
all layers, and a route runs just those that it names, so that one swarm serves for all routes:

- *hops*: routes of 1, 2, 3 and 5 hops over even ranges;
- *links*: two and three hops with 20 ms and 60 ms one way on the links of one peer;
- *choice*: random arrangements, in which peers are reckoned to hold random ranges and some are delayed. The chosen
  route and its runners-up are driven in turn; the choice is right if none is faster by more than ``planner.spread``.

The prediction is made before each run, from the announcements alone, as any client makes it. Runs of all routes of a
part are interleaved, and medians are compared, because other work on the machine slows them all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

import uvloop

from swarm.bench.delay_proxy import DelayProxy
from swarm.client import AsyncClient, connect_async
from swarm.config import DiscoverySettings, Settings
from swarm.errors import NoRoute
from swarm.link_times import Links
from swarm.local import LocalSwarm, even_ranges
from swarm.plans import Check
from swarm.routing import Plan, plan, price
from swarm.session import RouteChanged, Session
from swarm.types import Announcement, Hop, LayerRange, PeerId, Route

MODEL, LAYERS, PEERS = "smollm2-135m", 30, 5
WHOLE = LayerRange(0, LAYERS)
PROMPT = "On the first day a carpenter came to the old mill, walked nine miles and asked for water."
QUICK = DiscoverySettings(announce_period_s=2.0, view_period_s=2.0, ping_period_s=2.0)
SETTLE_S = 12.0
"""After delays have changed: until they were measured, announced and read."""


@dataclass
class Fixed:
    """A swarm view in which just one route is possible."""

    client: AsyncClient
    route: Route

    def announcements(self) -> Sequence[Announcement]:
        return restricted(self.client, {hop.peer.peer_id: hop.layers for hop in self.route.hops})

    async def refresh(self) -> object:
        return self.announcements()

    def links(self) -> Links:
        return self.client.view.links()

    def age(self, peer_id: PeerId) -> float:
        return self.client.view.age(peer_id)

    @property
    def check(self) -> Check:
        return self.client.view.check


def restricted(client: AsyncClient, held: dict[PeerId, LayerRange]) -> list[Announcement]:
    """As if peers held these layers only."""
    return [
        replace(a, layers=held[a.peer.peer_id], head_s=a.head_s if held[a.peer.peer_id].end == LAYERS else 0.0)
        for a in client.view.announcements()
        if a.peer.peer_id in held
    ]


@dataclass
class Case:
    """One route: milliseconds a token."""

    name: str
    route: Route
    predicted: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Of medians within rounds."""
        return statistics.median(p / m for p, m in zip(self.predicted, self.measured, strict=True))

    def line(self) -> str:
        predicted, measured = statistics.median(self.predicted), statistics.median(self.measured)
        return f"{self.name:<34} predicted {predicted:6.1f} ms  measured {measured:6.1f} ms  ratio {self.ratio:.2f}"


async def drive(client: AsyncClient, case: Case, tokens: int) -> None:
    """Predict, then generate on just this route, and note both."""
    request = replace(
        client.request(PROMPT, max_tokens=tokens, temperature=0.0, speculation="off"), end_ids=frozenset()
    )
    await client.view.refresh()
    priced = price(
        client.view.announcements(), case.route, client.demand(len(request.prompt), tokens), client.knowledge()
    )
    session = Session(
        client.transport, Fixed(client, case.route), client.profile, request, client.settings, client.health
    )
    times: list[float] = []
    timings = []
    async with session, contextlib.aclosing(session.events()) as events:
        async for event in events:
            if isinstance(event, RouteChanged):
                assert event.reason == "opened", event.reason
                assert event.route.hops == case.route.hops
                continue
            times.append(time.perf_counter())
            timings.append(event.hops)
    gaps = [after - before for before, after in itertools.pairwise(times[1:])]
    case.predicted.append(1e3 * priced.decode_s)
    case.measured.append(1e3 * statistics.median(gaps))
    hops = [steps for steps in timings[2:] if len(steps) == len(case.route.hops)]
    found = {
        "compute": sum(statistics.median(1e3 * steps[i].compute_s for steps in hops) for i in range(len(hops[0]))),
        "queue": sum(statistics.median(1e3 * steps[i].queue_s for steps in hops) for i in range(len(hops[0]))),
        "link": sum(statistics.median(1e3 * steps[i].link_s for steps in hops) for i in range(len(hops[0]))),
    }
    rest = case.measured[-1] - sum(found.values())
    case.parts.append(
        f"compute {1e3 * sum(p.compute_s for p in priced.hops):.1f}/{found['compute']:.1f} "
        f"link {1e3 * sum(p.link_s for p in priced.hops):.1f}/{found['link']:.1f} "
        f"queue {1e3 * sum(p.queue_s for p in priced.hops):.1f}/{found['queue']:.1f} "
        f"overhead {1e3 * sum(p.overhead_s for p in priced.hops):.1f}/{rest:.1f}"
    )


async def compare(client: AsyncClient, cases: Sequence[Case], rounds: int, tokens: int, *, verbose: bool) -> None:
    for _ in range(rounds):
        for case in cases:
            await drive(client, case, tokens)
    for case in cases:
        print(case.line(), flush=True)
        if verbose:
            for part in case.parts:
                print(f"    {part}", flush=True)


def even_route(client: AsyncClient, peers: Sequence[PeerId]) -> Route:
    by_id = {a.peer.peer_id: a.peer for a in client.view.announcements()}
    return Route(tuple(Hop(by_id[p], layers) for p, layers in zip(peers, even_ranges(LAYERS, len(peers)), strict=True)))


async def warm(client: AsyncClient, peers: Sequence[PeerId]) -> None:
    """A busy machine's pace is learned by steps."""
    for _ in range(2):
        for peer in peers:
            await drive(client, Case("", even_route(client, [peer])), 12)
    await asyncio.sleep(2 * QUICK.announce_period_s)


def random_arrangement(peers: Sequence[PeerId], rng: random.Random) -> dict[PeerId, LayerRange]:
    """Ranges over which there are several routes."""
    while True:
        held = {}
        for peer in peers:
            length = rng.choice((8, 12, 15, 20, 25, LAYERS))
            start = rng.choice((0, LAYERS - length, rng.randint(0, LAYERS - length)))
            held[peer] = LayerRange(start, start + length)
        starts = sum(layers.start == 0 for layers in held.values())
        ends = sum(layers.end == LAYERS for layers in held.values())
        if starts >= 2 and ends >= 2 and sum(layers == WHOLE for layers in held.values()) <= 1:
            return held


async def choose(
    client: AsyncClient,
    peers: Sequence[PeerId],
    proxies: Sequence[DelayProxy],
    rng: random.Random,
    options: argparse.Namespace,
) -> bool:
    """One random arrangement: whether the chosen route was measured fastest."""
    for proxy in proxies:
        proxy.shape.delay_s = rng.choice((0.0, 0.0, 0.005, 0.02, 0.06))
    found: Plan | None = None
    await asyncio.sleep(SETTLE_S)
    while found is None:
        held = random_arrangement(peers, rng)
        await client.view.refresh()
        with contextlib.suppress(NoRoute):
            knowledge = replace(client.knowledge(), seed=None)
            found = plan(restricted(client, held), WHOLE, client.demand(20, options.tokens), knowledge, runners_up=3)
    cases = [Case(f"  {_short(one.route)}", one.route) for one in (found, *found.runners_up)]
    delays = " ".join(f"{1e3 * proxy.shape.delay_s:.0f}" for proxy in proxies)
    print(f"arrangement {' '.join(map(str, held.values()))}, delays {delays} ms", flush=True)
    await compare(client, cases, options.rounds, options.tokens, verbose=options.verbose)
    slower = [
        statistics.median(c / b for c, b in zip(cases[0].measured, other.measured, strict=True)) for other in cases[1:]
    ]
    right = all(share <= 1 + client.settings.planner.spread for share in slower)
    print(
        f"  the choice is {'right' if right else 'WRONG'}: {' '.join(f'{share:.2f}' for share in slower)}", flush=True
    )
    return right


def _short(route: Route) -> str:
    return " ".join(f"{hop.peer.peer_id[-3:]}[{hop.layers}]" for hop in route.hops)


async def measure(swarm: LocalSwarm, proxies: Sequence[DelayProxy], options: argparse.Namespace) -> None:
    peers = [peer.peer_id for peer in swarm.peers]
    async with connected(swarm) as client:
        await warm(client, peers)
        ratios: list[float] = []
        for part, delays_ms in (("hops", [0]), ("links", [20, 60])):
            if part not in options.only:
                continue
            for delay_ms in delays_ms:
                proxies[0].shape.delay_s = delay_ms / 1e3
                await asyncio.sleep(SETTLE_S if delay_ms else 0)
                counts = (1, 2, 3, 5) if part == "hops" else (2, 3)
                cases = [
                    Case(
                        f"{hops} hops" + (f", {delay_ms} ms to one" if delay_ms else ""),
                        even_route(client, peers[:hops]),
                    )
                    for hops in counts
                ]
                await compare(client, cases, options.rounds, options.tokens, verbose=options.verbose)
                ratios += [case.ratio for case in cases]
            proxies[0].shape.delay_s = 0.0
        if ratios:
            print(f"predictions off by at most {max(abs(ratio - 1) for ratio in ratios):.0%}", flush=True)
        if "choice" in options.only:
            rng = random.Random(options.seed)
            right = [await choose(client, peers, proxies, rng, options) for _ in range(options.arrangements)]
            print(f"the chosen route was the fastest in {sum(right)} of {len(right)} arrangements", flush=True)


@contextlib.asynccontextmanager
async def connected(swarm: LocalSwarm) -> AsyncGenerator[AsyncClient]:
    async with connect_async(swarm.initial_peers, settings=replace(Settings(), discovery=QUICK)) as client:
        deadline = time.monotonic() + 60
        while (
            len(client.view.announcements()) < PEERS
            or len(client.view.links().measured_from(swarm.peers[0].peer_id)) < 4
        ):
            if time.monotonic() > deadline:
                raise SystemExit("the peers did not measure their links within 60 s")
            await asyncio.sleep(0.5)
            await client.view.refresh()
        yield client


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=["hops", "links", "choice"], default=["hops", "links", "choice"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--arrangements", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="Where the time went, predicted/measured, for each run.")
    options = parser.parse_args()
    env = {
        f"SWARM_DISCOVERY_{name.upper()}": str(getattr(QUICK, name)) for name in ("announce_period_s", "view_period_s")
    }
    env["SWARM_DISCOVERY_PING_PERIOD_S"] = str(QUICK.ping_period_s)
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(DelayProxy.for_new_peer()) for _ in range(PEERS)]
        args_of = {index: proxy.peer_args for index, proxy in enumerate(proxies)}
        whole = [WHOLE] * PEERS
        swarm = stack.enter_context(LocalSwarm(MODEL, whole, dtype="float32", args_of=args_of, env=env, report=print))
        uvloop.run(measure(swarm, proxies, options))


if __name__ == "__main__":
    main()
