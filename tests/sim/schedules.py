"""Seeded fault schedules: what goes wrong, when, in which swarm. One seed is one world and one generation."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from swarm.handover import LAG
from swarm.session import Session
from swarm.types import LayerRange, PeerState
from swarm.wire import MODEL, Wire
from tests.sim.world import NUM_LAYERS, Faults, Outcome, SimPeer, World, run_virtual

KINDS = ("kill", "freeze", "drain", "cut", "cut_owner", "lie", "daemon", "kill_two", "join")

BOUND_S = 600.0
"""Virtual seconds in which every schedule must be over; the session's own limits end it far earlier."""


@dataclass(frozen=True)
class Fault:
    token: int
    """Index of the generated token after which it strikes; -1: while the prompt is being computed."""
    delay_s: float
    kind: str
    victim: int


def random_ranges(rng: random.Random) -> list[LayerRange]:
    """Two or three coverings of all layers, each cut at places of its own."""
    ranges = []
    for _ in range(rng.choice((2, 2, 3))):
        cuts = sorted(rng.sample(range(1, NUM_LAYERS), rng.randrange(0, 4)))
        bounds = [0, *cuts, NUM_LAYERS]
        ranges += [LayerRange(a, b) for a, b in itertools.pairwise(bounds)]
    return ranges


def random_faults(rng: random.Random, max_tokens: int) -> list[Fault]:
    return [
        Fault(rng.randrange(-1, max_tokens - 1), rng.uniform(0.0, 0.06), rng.choice(KINDS), rng.randrange(6))
        for _ in range(rng.randrange(0, 5))
    ]


class Troublemaker:
    """Carries a schedule out, and keeps the swarm repairable: whatever range is lost comes back in time."""

    def __init__(self, world: World, faults: list[Fault], rng: random.Random) -> None:
        self.world, self.faults, self.rng = world, faults, rng
        self._tasks: set[asyncio.Task[None]] = set()

    def on_token(self, session: Session, index: int) -> None:
        due = [fault for fault in self.faults if fault.token == index]
        for fault in due:
            self.faults.remove(fault)
            self._later(fault.delay_s, lambda fault=fault: self._strike(session, fault))

    def _later(self, delay_s: float, action: Callable[[], object]) -> None:
        async def act() -> None:
            await asyncio.sleep(delay_s)
            result = action()
            if asyncio.iscoroutine(result):
                await result

        task = asyncio.create_task(act())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _victim(self, session: Session, index: int) -> SimPeer | None:
        if not session._chain.complete:
            return None
        peer = self.world.peer_of(session, index)
        return peer if peer.node.alive else None

    def _strike(self, session: Session, fault: Fault) -> None:
        world, rng, peer = self.world, self.rng, self._victim(session, fault.victim)
        if fault.kind == "daemon":
            world.owner.restart_daemon()
        elif fault.kind == "join" or peer is None:
            self._later(0.0, lambda: world.add_peer(rng.choice(random_ranges(rng))))
        elif fault.kind in ("kill", "kill_two"):
            self._kill(peer)
            other = self._victim(session, fault.victim + 1)
            if fault.kind == "kill_two" and other is not None:
                self._kill(other)
        elif fault.kind == "freeze":
            peer.node.freeze()
            self._later(rng.uniform(0.2, 12.0), peer.node.resume)
            self._replace(peer)
        elif fault.kind == "drain":
            world.drain(peer)
            self._replace(peer)
        elif fault.kind == "lie":
            peer.executor.lies = True
            self._replace(peer)
        else:
            other = world.owner if fault.kind == "cut_owner" else world.peer_of(session, fault.victim + 1).node
            pair = peer.node.address.peer_id, other.address.peer_id
            if pair[0] != pair[1]:
                world.network.partition(*pair)
                self._later(rng.uniform(0.1, 8.0), lambda: world.network.heal(*pair))
                self._replace(peer)

    def _kill(self, peer: SimPeer) -> None:
        # A dead peer's announcement may stay for a while: a ghost.
        self.world.kill(peer, forget=self.rng.random() < 0.5)
        self._replace(peer)

    def _replace(self, lost: SimPeer) -> None:
        """Somebody with the same layers joins after a while, unless a healthy peer with them is there for sure."""
        layers = lost.executor.layers
        for peer in self.world.peers:
            healthy = peer.node.alive and not peer.node.frozen and not peer.executor.lies
            sure = healthy and peer.service.state is PeerState.SERVING and peer.executor.layers.covers(layers)
            if peer is not lost and sure and self.rng.random() < 0.5:
                return
        self._later(self.rng.uniform(0.0, 6.0), lambda: self.world.add_peer(layers))

    async def done(self) -> None:
        while self._tasks:
            await asyncio.wait(set(self._tasks))


def run_seed(seed: int) -> Outcome:
    """One world, one generation, every invariant; raises ``AssertionError`` with the seed's story."""

    async def main() -> Outcome:
        rng = random.Random(seed)
        faults = Faults(
            duplicate=rng.choice((0.0, 0.0, 0.05)),
            reorder=rng.choice((0.0, 0.0, 0.0, 0.02)),
            slow=rng.choice((0.0, 0.02)),
        )
        echo = rng.choice((0.0, 0.8, 0.95))
        world = World(seed, faults, echo=echo)
        for layers in random_ranges(rng):
            await world.add_peer(layers)
        prompt = [rng.randrange(64) for _ in range(rng.randrange(1, 24))]
        max_tokens = rng.randrange(4, 40 if echo else 20)
        plan = random_faults(rng, max_tokens)
        trouble = Troublemaker(world, list(plan), rng)
        async with asyncio.timeout(BOUND_S):
            wishes: dict[str, object] = {"no_kv_cache": rng.random() < 0.05, "speculate": rng.random() < 0.7}
            wishes["wire"] = Wire("int8" if seed % 4 == 3 else MODEL)
            outcome = await world.generate(prompt, max_tokens, trouble.on_token, **wishes)
        expected = world.decoder.generate(prompt, max_tokens, seed, frozenset(), outcome.cuts)
        story = f"seed {seed}: {len(prompt)} prompt tokens, {plan}, rebuilds {outcome.session.rebuilds}"
        assert outcome.error is None, f"{outcome.error!r}; {story}"
        assert outcome.tokens == expected, f"{outcome.tokens} instead of {expected}; {story}"
        check_rebuilds(world, outcome, [fault.kind for fault in plan], story)
        await trouble.done()
        await world.settle()
        return outcome

    return run_virtual(main)


def check_rebuilds(world: World, outcome: Outcome, kinds: list[str], story: str) -> None:
    """Rebuilds have causes, and compute nothing again that is still there."""
    rebuilds = outcome.session.rebuilds
    if not world.faults.reorder:
        # On links that keep their order nobody ever misses a frame, whatever else happens.
        assert not any("came before" in r.reason or "frame starts" in r.reason for r in rebuilds), story
        # Nor does anybody wait for what nobody does, where nothing is silent for long.
        if not {"freeze", "cut", "cut_owner"} & set(kinds):
            assert not any("no token for" in r.reason or "no progress for" in r.reason for r in rebuilds), story
    if not kinds and not world.faults.reorder:
        assert not rebuilds, story
    if rebuilds and not world.faults.reorder and not outcome.no_kv_cache:
        # A successor that took over warm may have to run the newest position once more, to sample after it. Guesses
        # that were not yet known to be right are run again; those of a successor may be so far back as it lags behind.
        guesses = outcome.session.transcript.request.speculate
        warm = 1 + (LAG if guesses else 0)
        kept = min(r.kept - warm if r.reason.endswith("is leaving") else r.kept for r in rebuilds)
        kept -= world.settings.engine.prefill_chunk_tokens if guesses else 0
        for peer in world.peers:
            for times in peer.executor.positions_run.values():
                again = [position for (position, _), count in times.items() if count > 1]
                assert all(position >= kept for position in again), f"{again} ran twice; {story}"


def main(first: int, last: int) -> int:
    """Run seeds ``first .. last - 1``; prints each that fails, with its story, and how many were rebuilt."""
    failed = rebuilt = drafts_right = 0
    for seed in range(first, last):
        try:
            outcome = run_seed(seed)
            rebuilt += bool(outcome.session.rebuilds)
            drafts_right += outcome.drafts_right
        except Exception:
            failed += 1
            print(f"seed {seed} fails; again: python -m tests.sim.schedules {seed} {seed + 1}")
            traceback.print_exc(limit=-3, file=sys.stdout)
    print(f"{last - first} seeds, {rebuilt} with rebuilds, {drafts_right} drafted tokens were right, {failed} failed")
    hurt = (rebuilt > (last - first) / 4 and drafts_right > last - first) or last - first < 20
    return 0 if hurt and not failed else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
