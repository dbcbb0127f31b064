"""One range of layers at one peer, from the moment it is loaded until it is drained."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import resource
import time
from dataclasses import dataclass, replace

from peers.admission import Admission
from peers.engine import Engine
from peers.machine import Speed, free_bytes, gflops, measure
from peers.memory import MemoryPlan
from peers.peer import Peer
from peers.probe import Vouching
from peers.process_memory import return_freed_heap
from peers.rebalance import may_drop
from peers.seat import Watch, credible
from peers.service import PeerService
from peers.shard import Shard
from peers.speed_cache import store_speed
from swarm.admission import require
from swarm.coverage import Coverage, served
from swarm.errors import Busy, SwarmError
from swarm.knock import knock
from swarm.types import Announcement, LayerRange, PeerAddress, PeerState, SessionId

logger = logging.getLogger(__name__)

AGAIN_S = 4.0
"""After so long, more or less, steps are measured once again, if nothing is being computed."""
LONGEST_MEASURING_S = 3.0
"""Where it takes longer, it would hold up a session that comes meanwhile."""


@dataclass(slots=True)
class Move:
    layers: LayerRange
    urgent: bool
    """Layers are missing."""
    loading: asyncio.Task[Shard] | None = None
    """Done already, where memory allowed it."""


async def serve_range(peer: Peer, layers: LayerRange, shard: Shard) -> Move | None:
    """Serve until it is time to go; what to serve next, or ``None`` to leave the swarm.

    Raises :class:`NotAdmitted` if this machine is too slow for the swarm's policy, or its layers were found wrong.
    """
    plan = peer.room.divide(peer.profile, layers)
    settings = peer.room.settings_for(peer.settings, plan)
    async with Engine(shard, settings) as engine:
        began = time.perf_counter()
        measuring = asyncio.create_task(measure(engine))
        if not await peer.stopping.unless(measuring):
            return None
        speed = measuring.result()
        measuring_s = time.perf_counter() - began
        _adopt(speed, peer, engine)
        return_freed_heap()
        on_gpu = peer.device.type != "cpu"
        require(settings.policy, peer.room.given_bytes // 10**6, gflops(peer.profile, speed), on_gpu)

        async def knock_at(address: PeerAddress) -> None:
            await knock(address, settings.timeouts.connect_s)

        vouching = Vouching(peer.identity, peer.borrow, knock_at)
        service = PeerService(peer.transport, engine, peer.view, settings, peer.files, vouching, peer.dial_back)
        async with service:
            if peer.metrics is not None:
                peer.metrics.serve(service, engine)
            tenure = Tenure(peer, layers, engine, speed, service)
            await tenure.run(plan, shard.size_bytes, measuring_s)
            peer.cut_off = len(service.table.runners)
    shard.release()  # our handlers, which stand until the next range has its own, lead to it
    return_freed_heap()
    move = tenure.move
    if move is not None:
        going = peer.announcement(move.layers, PeerState.JOINING)
        await peer.announcer.update(replace(going, moving_to=move.layers))
    return move


def _adopt(speed: Speed, peer: Peer, engine: Engine) -> None:
    """From now on this is how fast we are."""
    peer.speed = speed
    engine.pace.calibrate(speed.step_s, speed.decode_s_per_layer, speed.head_s)
    store_speed(peer.profile, peer.device, peer.settings.peer, speed)


class Tenure:
    """While ``service`` serves ``layers``: announced, vouched for, then left for another range, or for good."""

    def __init__(self, peer: Peer, layers: LayerRange, engine: Engine, speed: Speed, service: PeerService) -> None:
        self.move: Move | None = None
        """Where we are about to go."""
        self._peer = peer
        self._layers = layers
        self._engine = engine
        self._speed = speed
        self._service = service
        self._admission = Admission(peer, layers)

    async def run(self, plan: MemoryPlan, weights_bytes: int, measuring_s: float) -> None:
        """Until the service is drained, or we are told to stop before it began. ``plan`` and ``weights_bytes`` are for
        the report, ``measuring_s`` is how long it took to measure our speed."""
        peer, service = self._peer, self._service
        await self._announce()
        joining = asyncio.create_task(self._admission.obtain())
        if not await peer.stopping.unless(joining):
            return
        await self._announce()
        async with contextlib.AsyncExitStack() as stack:
            probing = asyncio.create_task(service.link_prober.run())
            stack.callback(probing.cancel)
            renewing = asyncio.create_task(self._renew())
            stack.callback(renewing.cancel)
            self._report_ready(plan, weights_bytes, joining.result().verifier)
            for news in (self._admission.tell_reachability(), self._tell_coverage()):
                telling = asyncio.create_task(news)
                stack.callback(telling.cancel)
            if measuring_s < LONGEST_MEASURING_S:
                measuring = asyncio.create_task(self._measure_again())
                stack.callback(measuring.cancel)
            broken = asyncio.create_task(self._engine.broken())
            stack.callback(broken.cancel)
            while True:
                self.move = await self._until_it_should_go(renewing, broken)
                if self.move is None or await self._load_ahead(self.move):
                    break
                self.move = None
                await self._announce()
            service.drain()
            peer.report({"event": "draining", "sessions": len(service.table.runners)})
            await self._announce()
            # without the missing layers no session goes on: there is nothing to wait for
            urgent = self.move is not None and self.move.urgent
            drain_s = peer.settings.placement.gap_drain_s if urgent else peer.settings.timeouts.drain_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await service.drained(leaving=self.move is None)

    def announcement(self) -> Announcement:
        """What is so at this moment."""
        table, pace, speed, now = self._service.table, self._engine.pace, self._speed, time.perf_counter()
        slowdown = pace.slowdown_at(now)
        said = self._peer.announcement(self._layers, self._service.state)
        if self._admission.voucher is None:
            return replace(said, state=PeerState.JOINING, moving_to=self._layers)
        return replace(
            said,
            voucher=self._admission.voucher,
            kv_tokens_free=table.kv_tokens_free(),
            sessions=len(table.runners),
            moving_to=self.move.layers if self.move else None,
            decode_s_per_layer=speed.decode_s_per_layer * slowdown,
            step_s=speed.step_s * slowdown,
            head_s=speed.head_s * slowdown,
            queue_s=pace.queue_s_at(now),
            links=self._service.link_prober.reports(),
        )

    async def _announce(self) -> None:
        await self._peer.announcer.update(self.announcement())

    async def _renew(self) -> None:
        """For ever: announce, and while only we vouch for ourselves, ask others. Raises :class:`NotAdmitted`."""
        while True:
            await self._service.link_prober.wait_for_news(self._peer.settings.discovery.announce_period_s)
            if self._admission.alone and self._service.state is PeerState.SERVING:
                await self._admission.obtain()
            await self._announce()

    async def _measure_again(self) -> None:
        """A machine on which a peer starts is seldom quiet: what is found to be quicker some seconds later is true.

        Sessions tell by their steps how long one takes, but not what a layer has of it.
        """
        peer, engine = self._peer, self._engine
        await asyncio.sleep(AGAIN_S * random.uniform(0.5, 1.5))  # not together with those that started with us
        if engine.queue_length or any(runner.computing for runner in self._service.table.runners.values()):
            return
        try:
            found = await measure(engine, self._speed.prefill_s_per_token_layer)
        except SwarmError as error:
            logger.info("the speed was not measured again: %s", error)
            return
        self._speed = self._speed.or_quicker(found, len(self._layers))
        _adopt(self._speed, peer, engine)
        await self._announce()

    def _coverage(self) -> Coverage:
        peer = self._peer
        others = [a for a in peer.view.announcements() if a.peer.peer_id != peer.identity.peer_id]
        return served([*others, self.announcement()], peer.profile, peer.view.check)

    async def _tell_coverage(self) -> None:
        """For ever, whenever layers come to be missing, and when none is missing any more; what is so at first is in
        the report that we are ready."""
        complete = self._coverage().complete
        while True:
            await asyncio.sleep(self._peer.settings.discovery.view_period_s)
            coverage = self._coverage()
            if coverage.complete is not complete:
                complete = coverage.complete
                self._peer.report({"event": "coverage", "complete": complete, "message": coverage.sentence()})

    def _report_ready(self, plan: MemoryPlan, weights_bytes: int, verifier: str) -> None:
        peer, local = self._peer, self._peer.transport.local
        peer.report(
            {
                "event": "ready",
                "peer_id": local.peer_id,
                "addresses": list(local.multiaddrs),
                "model": peer.profile.model_id,
                "layers": [self._layers.start, self._layers.end],
                "pid": os.getpid(),
                "weights_mb": round(weights_bytes / 1e6, 1),
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "memory": plan.in_mb(),
                "vouched_by": verifier,
                "coverage": self._coverage().sentence(),
            }
        )

    async def _until_it_should_go(self, *lasting: asyncio.Task[None]) -> Move | None:
        """Where to; ``None`` when told to stop. Raises what ends one of ``lasting``."""
        asked = asyncio.create_task(self._peer.stopping.asked.wait())
        moving = asyncio.create_task(self._next_move())
        try:
            await asyncio.wait((asked, moving, *lasting), return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            moving.cancel()
        if asked.done():
            return None
        for task in lasting:
            if task.done():
                task.result()
        return moving.result()

    async def _next_move(self) -> Move:
        """Never returns for a peer with fixed layers, or with all of them."""
        peer = self._peer
        if peer.settings.peer.layers != "auto" or peer.room.capacity.whole:
            await asyncio.Event().wait()
        capacity = peer.room.capacity
        watch = Watch(peer.transport, peer.view, self.announcement, capacity, peer.profile, peer.settings)
        target, reason, urgent = await watch.next_move()
        peer.report({"event": "moving", "layers": [target.start, target.end], "reason": reason})
        return Move(target, urgent)

    async def _load_ahead(self, move: Move) -> bool:
        """Load the new range beside the old one where both fit; False: others have left meanwhile, or it can't be
        loaded, and we have to stay. Raises what keeps us from loading layers that are missing."""
        peer, budget = self._peer, self._service.table.budget
        target = peer.room.divide(peer.profile, move.layers)
        size = target.weights_bytes + target.buffers_bytes
        key = SessionId("the range that is loaded ahead")
        try:
            budget.reserve(key, size)  # until the stages are freed together with the old range
        except Busy:
            return await self._may_go(move)
        if not peer.room.capped and size > free_bytes(peer.device):
            budget.release(key)
            return await self._may_go(move)
        await self._announce()
        loading = peer.load(move.layers)
        try:
            if not await peer.stopping.unless(loading):
                return True  # the next range is cut short, too
        except SwarmError as error:
            if move.urgent:
                raise
            self._report_staying(f"layers {move.layers} could not be loaded: {error.message}")
        else:
            if await self._may_go(move):
                move.loading = loading
                return True
        budget.release(key)
        return False

    async def _may_go(self, move: Move) -> bool:
        """Says where we go, then asks: of two that leave the same layers, one at least reads it of the other."""
        peer = self._peer
        if move.urgent:
            return True
        await self._announce()
        await peer.view.refresh()
        own = self.announcement()
        if may_drop(credible(peer.view), own.peer.peer_id, own.layers, move.layers):
            return True
        self._report_staying("others have left them meanwhile")
        return False

    def _report_staying(self, reason: str) -> None:
        self._peer.report({"event": "staying", "layers": [self._layers.start, self._layers.end], "reason": reason})
