"""The life of a peer: join, take a range, load it, announce, serve, drain; then another range, or leave."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import random
import resource
import signal
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

import swarm
from peers.dial_back import DialBack, new_dialler
from peers.engine import Engine
from peers.link_prober import LinkProber
from peers.machine import Report, Speed, choose_device, free_bytes, gflops, load_shard, measure
from peers.probe import Vouching, knock, obtain_voucher
from peers.process_memory import return_freed_heap
from peers.reachability import Reachability, find_out
from peers.rebalance import may_drop
from peers.seat import Room, Watch, take_seat
from peers.service import PeerService
from peers.shard import Shard
from peers.speed_cache import load_speed, store_speed
from swarm.admission import check_announcement, require
from swarm.announcement_record import check_record
from swarm.config import Settings
from swarm.coverage import coverage_of
from swarm.dht import Dht
from swarm.discovery import MAX_SKEW_S, Announcer, SwarmView
from swarm.errors import Busy, NotAdmitted, SwarmError, WrongRange
from swarm.identity import Identity
from swarm.libp2p import Libp2pTransport
from swarm.models import ModelProfile, ModelReference, load_profile, resolve, tokenizer_files
from swarm.types import Announcement, LayerRange, PeerAddress, PeerState, SessionId, Voucher

if TYPE_CHECKING:
    from peers.metrics import PeerMetrics

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROBE_PAUSE_S = 1.0
"""A peer whose layers were found wrong has them probed once more: verifiers may be wrong, too."""

GUESSED_BYTES_PER_S = 1e10
"""Of weights read for one token, before anything is measured: a CPU's memory."""


async def serve(settings: Settings, report: Report) -> None:
    """Until SIGTERM or SIGINT, which drain; a second one ends at once. Raises :class:`SwarmError` until it is ready."""
    reference = resolve(settings.model.name, settings.model.dtype, weights=settings.model.weights)
    profile = load_profile(reference)
    layers = choose_layers(settings, profile)
    files = tokenizer_files(reference)  # before the weights are there: making them takes memory for a moment
    return_freed_heap()
    device = choose_device(settings.peer.device)
    room = Room.of(settings, profile, free_bytes(device), on_cpu=device.type == "cpu")
    require(settings.policy, room.given_bytes // 10**6, math.inf, device.type != "cpu")
    if layers is not None:
        room.divide(profile, layers)
    stopping = _stop_on_signals()
    async with contextlib.AsyncExitStack() as stack:
        identity = Identity.ephemeral()
        if settings.network.identity:
            identity = stack.enter_context(Identity.load_or_create(settings.network.identity))
        transport = await stack.enter_async_context(Libp2pTransport(identity, settings, listen=True))
        dht = await stack.enter_async_context(Dht(transport, settings, check_record))
        joining = asyncio.create_task(dht.connect(settings.network.initial_peers))
        if layers is None and not await _unless(stopping, joining):
            return
        view = SwarmView(
            dht,
            profile.model_id,
            profile.num_layers,
            settings.discovery,
            on_seen=dht.remember,
            check=functools.partial(check_announcement, settings.policy),
            planner=settings.planner,
        )
        announcer = Announcer(dht, identity, settings.discovery)
        peer = _Peer(
            settings,
            reference,
            profile,
            files,
            room,
            identity,
            transport,
            view,
            announcer,
            stopping,
            report,
            device,
            speed=load_speed(profile, device, settings.peer),
            dial_back=DialBack(new_dialler(settings)),
        )
        if settings.peer.metrics_port:
            # Imported here: most peers do without, and stay smaller.
            from peers.metrics import PeerMetrics
            from swarm.telemetry import MetricsServer

            peer.metrics = PeerMetrics(view, announcer)
            metrics = MetricsServer(peer.metrics.registry, settings.peer.metrics_host, settings.peer.metrics_port)
            await stack.enter_async_context(metrics)
        if layers is None:
            await stack.enter_async_context(view)
            await stack.enter_async_context(announcer)
            seat = asyncio.create_task(peer.seat())
            if not await _unless(stopping, seat):
                return
            layers = seat.result()
        loading = peer.load(layers)
        if not await _unless(stopping, loading):
            joining.cancel()
            return
        await joining
        if settings.peer.layers != "auto":
            await stack.enter_async_context(view)
            await stack.enter_async_context(announcer)
        transport.on_restart(announcer.renew)
        while (move := await peer.serve(layers, loading)) is not None:
            layers, loading = move.layers, move.loading or peer.load(move.layers)
            if not await _unless(stopping, loading):
                break
    report({"event": "left", "sessions_cut_off": peer.cut_off})


@dataclass(slots=True)
class _Move:
    layers: LayerRange
    urgent: bool
    """Layers are missing."""
    loading: asyncio.Task[Shard] | None = None
    """Done already, where memory allowed it."""


@dataclass(slots=True)
class _Peer:
    """What lasts while ranges come and go."""

    settings: Settings
    reference: ModelReference
    profile: ModelProfile
    files: dict[str, bytes]
    room: Room
    identity: Identity
    transport: Libp2pTransport
    view: SwarmView
    announcer: Announcer
    stopping: asyncio.Event
    report: Report
    device: torch.device
    cut_off: int = 0
    """Sessions that were still here when their stage was freed."""
    voucher: Voucher | None = None
    """For the layers that are served now."""
    speed: Speed | None = None
    """As it was measured last, perhaps in an earlier run."""
    metrics: PeerMetrics | None = None
    dial_back: DialBack | None = None

    def announcement(self, layers: LayerRange, state: PeerState) -> Announcement:
        speed = self.speed
        guess_s = self.profile.layer_bytes / GUESSED_BYTES_PER_S
        return Announcement(
            peer=self.transport.local,
            model=self.profile.model_id,
            layers=layers,
            state=state,
            version=swarm.__version__,
            decode_s_per_layer=speed.decode_s_per_layer if speed else guess_s,
            prefill_s_per_token_layer=speed.prefill_s_per_token_layer if speed else guess_s,
            kv_tokens_free=0,
            capacity=self.room.capacity,
            memory_mb=self.room.given_bytes // 10**6,
            gflops=gflops(self.profile, speed) if speed else 0.0,
            gpu=self.device.type != "cpu",
            voucher=self.voucher,
        )

    async def seat(self) -> LayerRange:
        draft = self.announcement(LayerRange(0, 1), PeerState.JOINING)
        return await take_seat(self.view, self.announcer, draft, self.profile, self.settings.placement)

    def load(self, layers: LayerRange) -> asyncio.Task[Shard]:
        plan = self.room.divide(self.profile, layers)
        began: dict[str, object] = {"event": "loading", "layers": [layers.start, layers.end], "percent": 0}
        self.report(began | {"memory": plan.sentence()})
        work = asyncio.to_thread(load_shard, self.reference, self.profile, layers, self.settings, self.report)
        return asyncio.create_task(work)

    async def serve(self, layers: LayerRange, loaded: asyncio.Task[Shard]) -> _Move | None:
        """Serve the range until it is time to go; what to serve next, or ``None`` to leave the swarm."""
        plan = self.room.divide(self.profile, layers)
        settings = self.room.settings_for(self.settings, plan)
        self.voucher = None
        move: _Move | None = None
        async with contextlib.AsyncExitStack() as stack:
            shard = loaded.result()
            engine = await stack.enter_async_context(Engine(shard, settings))
            speed = self.speed = await measure(engine)
            engine.pace.calibrate(speed.step_s, speed.decode_s_per_layer, speed.head_s)
            store_speed(self.profile, self.device, settings.peer, speed)
            return_freed_heap()
            require(
                settings.policy, self.room.given_bytes // 10**6, gflops(self.profile, speed), self.device.type != "cpu"
            )
            vouching = Vouching(self.identity, self.borrow, self.knock)
            service = PeerService(self.transport, engine, self.view, settings, self.files, vouching, self.dial_back)
            await stack.enter_async_context(service)
            if self.metrics is not None:
                self.metrics.serve(service, engine)

            def announcement() -> Announcement:
                table = service.table
                said = self.announcement(layers, service.state)
                if self.voucher is None:
                    return replace(said, state=PeerState.JOINING, moving_to=layers)
                free, sessions = table.kv_tokens_free(), len(table.runners)
                return replace(
                    said,
                    kv_tokens_free=free,
                    sessions=sessions,
                    moving_to=move.layers if move else None,
                    decode_s_per_layer=speed.decode_s_per_layer * engine.pace.slowdown,
                    step_s=speed.step_s * engine.pace.slowdown,
                    head_s=speed.head_s * engine.pace.slowdown,
                    queue_s=engine.pace.queue_s,
                    links=service.link_prober.reports(),
                )

            await self.announcer.update(announcement())
            joining = asyncio.create_task(self.be_vouched_for(layers))
            if not await _unless(self.stopping, joining):
                return None
            await self.announcer.update(announcement())
            probing = asyncio.create_task(service.link_prober.run())
            stack.callback(probing.cancel)
            renewing = asyncio.create_task(self._renew(announcement, service.link_prober))
            stack.callback(renewing.cancel)
            self.report(
                {
                    "event": "ready",
                    "peer_id": self.transport.local.peer_id,
                    "addresses": list(self.transport.local.multiaddrs),
                    "model": self.profile.model_id,
                    "layers": [layers.start, layers.end],
                    "pid": os.getpid(),
                    "weights_mb": round(shard.size_bytes / 1e6, 1),
                    "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                    "memory": plan.in_mb(),
                    "vouched_by": joining.result().verifier,
                    "coverage": self.coverage_sentence(announcement()),
                }
            )
            telling = asyncio.create_task(self._tell_reachability())
            stack.callback(telling.cancel)
            while True:
                move = await self._until_it_should_go(announcement, renewing)
                if move is None or await self._load_ahead(move, service, announcement):
                    break
                move = None
            service.drain()
            sessions = len(service.table.runners)
            self.report({"event": "draining", "sessions": sessions})
            await self.announcer.update(announcement())
            # without the missing layers no session goes on: there is nothing to wait for
            urgent = move is not None and move.urgent
            await _drained(service, settings.placement.gap_drain_s if urgent else settings.timeouts.drain_s)
            self.cut_off = len(service.table.runners)
        self.voucher = None
        if move is not None:
            going = self.announcement(move.layers, PeerState.JOINING)
            await self.announcer.update(replace(going, moving_to=move.layers))
        return move

    async def be_vouched_for(self, layers: LayerRange) -> Voucher:
        """Have our layers probed; raises :class:`NotAdmitted` if they were found wrong, and again when asked again."""
        try:
            self.voucher = await self._probed(layers)
        except NotAdmitted as error:
            logger.warning("probed once more: %s", error)
            await asyncio.sleep(PROBE_PAUSE_S)
            try:
                self.voucher = await self._probed(layers)
            except NotAdmitted as error:
                found = await self.reachability()
                if found.dialled is False:
                    raise NotAdmitted(f"{error.message}; this machine {found.sentence}") from None
                raise
        self._compare_clocks(self.voucher)
        return self.voucher

    async def reachability(self) -> Reachability:
        """As a few serving peers see it."""
        others = [a.peer for a in self.view.announcements() if a.state is PeerState.SERVING]
        others = [peer for peer in others if peer.peer_id != self.identity.peer_id]
        random.shuffle(others)
        return await find_out(self.transport, others, self.settings)

    async def _tell_reachability(self) -> None:
        found = await self.reachability()
        self.report({"event": "reachability", "dialled": found.dialled, "message": found.sentence})

    def _compare_clocks(self, voucher: Voucher) -> None:
        skew_s = time.time() - voucher.at
        if abs(skew_s) > MAX_SKEW_S:
            peer = voucher.verifier[-6:]
            message = f"our clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} that of peer {peer}"
            self.report({"event": "warning", "code": "clock", "message": message})

    async def _probed(self, layers: LayerRange) -> Voucher:
        try:
            await self.view.refresh()
        except SwarmError as error:
            logger.info("the view could not be refreshed: %s", error)
        known = self.view.announcements()
        return await obtain_voucher(self.transport, known, self.profile, layers, self.identity, self.settings)

    @contextlib.asynccontextmanager
    async def borrow(self, layers: LayerRange) -> AsyncGenerator[Engine]:
        """Some layers of our checkpoint, for a probe."""
        work = asyncio.to_thread(load_shard, self.reference, self.profile, layers, self.settings, lambda event: None)
        async with Engine(await work, self.settings) as engine:
            yield engine
        del engine
        return_freed_heap()

    async def knock(self, peer: PeerAddress) -> None:
        await knock(peer, self.settings.timeouts.connect_s)

    def coverage_sentence(self, own: Announcement) -> str:
        others = [a for a in self.view.announcements() if a.peer.peer_id != own.peer.peer_id]
        return coverage_of([a.layers for a in [*others, own] if a.state is PeerState.SERVING], self.profile).sentence()

    async def _renew(self, announcement: Callable[[], Announcement], prober: LinkProber) -> None:
        """For ever: announce, and while only we vouch for ourselves, ask others. Raises what be_vouched_for does."""
        while True:
            await prober.wait_for_news(self.settings.discovery.announce_period_s)
            own = announcement()
            alone = self.voucher is not None and self.voucher.verifier == own.peer.peer_id
            if alone and own.state is PeerState.SERVING:
                await self.be_vouched_for(own.layers)
            await self.announcer.update(announcement())

    async def _until_it_should_go(
        self, announcement: Callable[[], Announcement], renewing: asyncio.Task[None]
    ) -> _Move | None:
        """Where to, with ``--layers auto``; ``None`` on a signal. Raises what ends ``renewing``."""
        stopped = asyncio.create_task(self.stopping.wait())
        waiting: set[asyncio.Task[Any]] = {stopped, renewing}
        moving: asyncio.Task[tuple[LayerRange, str, bool]] | None = None
        if self.settings.peer.layers == "auto" and not self.room.capacity.whole:
            watch = Watch(self.transport, self.view, announcement, self.room.capacity, self.profile, self.settings)
            moving = asyncio.create_task(watch.next_move())
            waiting.add(moving)
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting - {renewing}:
                task.cancel()
        if stopped.done():
            return None
        if renewing.done():
            renewing.result()
        assert moving is not None
        target, reason, urgent = moving.result()
        self.report({"event": "moving", "layers": [target.start, target.end], "reason": reason})
        return _Move(target, urgent)

    async def _load_ahead(self, move: _Move, service: PeerService, announcement: Callable[[], Announcement]) -> bool:
        """Load the new range beside the old one where both fit; False: others have left meanwhile, we have to stay."""
        target = self.room.divide(self.profile, move.layers)
        size = target.weights_bytes + target.buffers_bytes
        key = SessionId("the range that is loaded ahead")
        try:
            service.table.budget.reserve(key, size)  # until the stages are freed together with the old range
        except Busy:
            return True
        if not self.room.capped and size > free_bytes(self.device):
            service.table.budget.release(key)
            return True
        await self.announcer.update(announcement())
        loading = self.load(move.layers)
        if not await _unless(self.stopping, loading):
            return True  # the next range is cut short, too
        own = announcement()
        if not move.urgent and not may_drop(self.view.announcements(), own.peer.peer_id, own.layers, move.layers):
            service.table.budget.release(key)
            self.report({"event": "staying", "layers": [own.layers.start, own.layers.end]})
            return False
        move.loading = loading
        return True


async def _unless(stopping: asyncio.Event, work: asyncio.Task[T]) -> bool:
    """Wait for ``work``, or until the peer is to stop: then cancel it. Whether it is done; raises what it raised."""
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not work.done():
        work.cancel()
        return False
    work.result()
    return True


def choose_layers(settings: Settings, profile: ModelProfile) -> LayerRange | None:
    """``None``: what the swarm needs."""
    if settings.peer.layers == "auto":
        return None
    layers = LayerRange.parse(settings.peer.layers)
    if layers.end > profile.num_layers:
        raise WrongRange(f"layers {layers} asked for; {profile.name} has layers 0:{profile.num_layers}")
    return layers


def _stop_on_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; after that the default action is back, so a second one ends the process."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop() -> None:
        stopping.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopping


async def _drained(service: PeerService, deadline_s: float) -> None:
    """Wait until the owners have moved their sessions away, at most ``deadline_s``."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(deadline_s):
            await service.table.empty()
