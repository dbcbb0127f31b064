"""The life of a peer: join, take a range, load it, serve it; then another range, or leave."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import Sequence

from peers.dial_back import DialBack, new_dialler
from peers.machine import Report, choose_device, free_bytes
from peers.peer import Peer
from peers.process_memory import return_freed_heap
from peers.seat import Room, take_seat
from peers.speed_cache import load_speed
from peers.stopping import Stopping
from peers.tenure import serve_range
from swarm.admission import check_announcement, require
from swarm.announcement_record import check_record
from swarm.config import Settings
from swarm.dht import Dht
from swarm.discovery import Announcer, SwarmView
from swarm.errors import Cancelled, WrongRange
from swarm.identity import Identity
from swarm.info import Description, describe
from swarm.libp2p import Libp2pTransport
from swarm.models import ModelProfile, load_profile, resolve, tokenizer_files
from swarm.multiaddrs import peer_addresses
from swarm.types import LayerRange, PeerAddress, PeerState


async def serve(settings: Settings, report: Report) -> None:
    """Until SIGTERM or SIGINT, which drain; a second one ends at once. Raises :class:`SwarmError` until it is ready,
    :class:`Cancelled` by Ctrl-C before its layers are loaded."""
    given = peer_addresses(settings.network.initial_peers)
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
    stopping = Stopping.on_signals()
    async with contextlib.AsyncExitStack() as stack:
        identity, book = Identity.ephemeral(), ""
        if settings.network.identity:
            identity = stack.enter_context(Identity.load_or_create(settings.network.identity))
            book = f"{settings.network.identity}.peers"
        transport = await stack.enter_async_context(Libp2pTransport(identity, settings, listen=True))
        dht = await stack.enter_async_context(Dht(transport, settings, check_record, book))
        joining = asyncio.create_task(dht.connect(settings.network.initial_peers))
        view = SwarmView(
            dht,
            profile.model_id,
            profile.num_layers,
            settings.discovery,
            on_seen=dht.remember,
            check=functools.partial(check_announcement, settings.policy),
            planner=settings.planner,
        )
        peer = Peer(
            settings=settings,
            reference=reference,
            profile=profile,
            files=files,
            device=device,
            room=room,
            identity=identity,
            transport=transport,
            view=view,
            announcer=Announcer(dht, identity, settings.discovery),
            stopping=stopping,
            report=report,
            speed=load_speed(profile, device, settings.peer),
            dial_back=DialBack(new_dialler(settings)),
        )
        if settings.peer.metrics_port:
            await _serve_metrics(peer, stack)
        if layers is None:
            if not await stopping.unless(joining):
                return _stopped_early(stopping)
            await _begin_announcing(peer, stack)
            seat = asyncio.create_task(_take_seat(peer))
            if not await stopping.unless(seat):
                return _stopped_early(stopping)
            layers = seat.result()
        loading = peer.load(layers)
        if not await stopping.unless(loading):
            joining.cancel()
            return _stopped_early(stopping)
        if not await joining and any(to.peer_id != identity.peer_id for to in given):
            told = "none of the initial peers answered: a swarm of its own until one of them does"
            report({"event": "warning", "code": "alone", "message": told})
        comparing = asyncio.create_task(_compare_model(peer, given))
        stack.callback(comparing.cancel)
        if settings.peer.layers != "auto":
            await _begin_announcing(peer, stack)
        transport.on_restart(peer.announcer.renew)
        while (move := await serve_range(peer, layers, loading.result())) is not None:
            layers, loading = move.layers, move.loading or peer.load(move.layers)
            if not await stopping.unless(loading):
                break
    report({"event": "left", "sessions_cut_off": peer.cut_off})


def _stopped_early(stopping: Stopping) -> None:
    """SIGTERM is how others end a peer, whatever it does at the moment: that is no failure."""
    if stopping.interrupted:
        raise Cancelled("stopped before it served")


def choose_layers(settings: Settings, profile: ModelProfile) -> LayerRange | None:
    """``None``: what the swarm needs."""
    if settings.peer.layers == "auto":
        return None
    layers = LayerRange.parse(settings.peer.layers)
    if layers.end > profile.num_layers:
        raise WrongRange(f"layers {layers} asked for; {profile.name} has layers 0:{profile.num_layers}")
    return layers


async def _begin_announcing(peer: Peer, stack: contextlib.AsyncExitStack) -> None:
    await stack.enter_async_context(peer.view)
    await stack.enter_async_context(peer.announcer)


async def _take_seat(peer: Peer) -> LayerRange:
    draft = peer.announcement(LayerRange(0, 1), PeerState.JOINING)
    demands = peer.room.demands
    return await take_seat(peer.view, peer.announcer, draft, peer.profile, demands, peer.settings.placement)


async def _compare_model(peer: Peer, given: Sequence[PeerAddress]) -> None:
    """Warn if those through whom we joined serve another model, of the same name perhaps: we wait for nobody."""
    others = [other for other in given if other.peer_id != peer.identity.peer_id]
    asked = (describe(peer.transport, other, peer.settings) for other in others)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    theirs = {answer.profile.model_id: answer.profile for answer in answers if isinstance(answer, Description)}
    if theirs and peer.profile.model_id not in theirs:
        named = ", ".join(f"{profile.model_id} ({profile.precision})" for profile in theirs.values())
        ours = f"{peer.profile.model_id} ({peer.profile.precision})"
        told = f"the initial peers serve {named}, this peer {ours}: another model, which shares no route with theirs"
        peer.report({"event": "warning", "code": "another_model", "message": told})


async def _serve_metrics(peer: Peer, stack: contextlib.AsyncExitStack) -> None:
    # Imported here: most peers do without, and stay smaller.
    from peers.metrics import PeerMetrics
    from swarm.telemetry import MetricsServer

    peer.metrics = PeerMetrics(peer.view, peer.announcer)
    host, port = peer.settings.peer.metrics_host, peer.settings.peer.metrics_port
    await stack.enter_async_context(MetricsServer(peer.metrics.registry, host, port))
