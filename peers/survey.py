"""``swarm-peer probe``: what this machine could give a swarm, without joining it."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from peers.cgroup import allowance
from peers.engine import Engine
from peers.machine import Report, Speed, choose_device, free_bytes, gflops, load_shard, measure
from peers.reachability import Reachability, find_out
from peers.seat import Room, no_layer_fits
from peers.speed_cache import device_name, load_speed, store_speed
from swarm.admission import objection
from swarm.config import Settings
from swarm.errors import SwarmError
from swarm.identity import Identity
from swarm.info import describe, fetch_files, round_trip_s
from swarm.libp2p import Libp2pTransport
from swarm.models import ModelProfile, ModelReference, load_profile, resolve
from swarm.multiaddrs import peer_addresses
from swarm.types import LayerRange, PeerAddress

MB = 1_000_000
MOST_MEASURED = 4
"""Layers that are loaded to be measured: enough to tell a layer from what comes with every step."""
ECHOES = 5


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    kind: str
    free_mb: int
    total_mb: int


@dataclass(frozen=True, slots=True)
class Way:
    """To a peer that was given; ``error`` says why it could not be measured."""

    peer_id: str
    round_trip_ms: float | None = None
    mb_per_s: float | None = None
    """Of one model file that it sent."""
    error: str = ""


async def survey(settings: Settings, report: Report, *, fresh: bool) -> None:
    """Reports one ``probe`` event. ``fresh``: measure again, though it is known how fast this device is."""
    reference = resolve(settings.model.name, settings.model.dtype, weights=settings.model.weights)
    profile = await asyncio.to_thread(load_profile, reference)
    device = choose_device(settings.peer.device)
    room = Room.of(settings, profile, free_bytes(device), on_cpu=device.type == "cpu")
    speed = None if fresh else load_speed(profile, device, settings.peer)
    cached = speed is not None
    if speed is None:
        speed = await _measured(reference, profile, room, settings)
        store_speed(profile, device, settings.peer, speed)
    lacks = objection(settings.policy, room.given_bytes // MB, gflops(profile, speed), device.type != "cpu")
    ways, reachability = await _ways(settings)
    report(
        {
            "event": "probe",
            "devices": [asdict(one) for one in devices()],
            "device": str(device),
            "model": profile.model_id,
            "num_layers": profile.num_layers,
            "given_mb": room.given_bytes // MB,
            "capacity": asdict(room.capacity),
            "speed": asdict(speed) | {"cached": cached},
            "gflops": round(gflops(profile, speed), 1),
            "admitted": lacks is None,
            "reason": lacks or "",
            "peers": [asdict(way) for way in ways],
            "reachability": None if reachability is None else asdict(reachability),
        }
    )


def devices() -> list[Device]:
    """The CPU last."""
    found: list[Device] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Device(torch.cuda.get_device_name(index), f"cuda:{index}", free // MB, total // MB))
    total, allowed = psutil.virtual_memory().total, allowance()
    if allowed is not None:
        total = min(total, allowed.limit_bytes)
    cpu = Device(device_name(torch.device("cpu")), "cpu", free_bytes(torch.device("cpu")) // MB, total // MB)
    if torch.backends.mps.is_available():
        found.append(Device(device_name(torch.device("mps")), "mps", cpu.free_mb, cpu.total_mb))
    return [*found, cpu]


async def _measured(reference: ModelReference, profile: ModelProfile, room: Room, settings: Settings) -> Speed:
    """A few layers from the middle, loaded for the purpose. Raises :class:`NotAdmitted` if not one fits."""
    capacity = room.capacity
    count = min(MOST_MEASURED, capacity.middle or capacity.first or capacity.last)
    if not count:
        raise no_layer_fits(profile, room.demands)
    start = min(1, profile.num_layers - count) if capacity.middle else 0
    layers = LayerRange(start, start + count)
    work = asyncio.to_thread(load_shard, reference, profile, layers, settings, lambda event: None, lambda: False)
    async with Engine(await work, settings) as engine:
        return await measure(engine)


async def _ways(settings: Settings) -> tuple[list[Way], Reachability | None]:
    """Listens meanwhile where a peer would, to be dialled. Raises ``PortInUse``."""
    peers = peer_addresses(settings.network.initial_peers)
    if not peers:
        return [], None
    async with Libp2pTransport(Identity.ephemeral(), settings, listen=True) as transport:
        ways = [await _way(transport, peer, settings) for peer in peers]  # one by one: they share our line
        return ways, await find_out(transport, peers, settings)


async def _way(transport: Libp2pTransport, peer: PeerAddress, settings: Settings) -> Way:
    try:
        description = await describe(transport, peer, settings)
        trips = [await round_trip_s(transport, peer, settings) for _ in range(ECHOES)]
        largest = max(description.files, key=lambda name: description.files[name], default=None)
        speed = None
        if largest is not None:
            began = time.perf_counter()
            await fetch_files(transport, description, [largest], settings)
            speed = description.files[largest] / MB / (time.perf_counter() - began)
    except SwarmError as error:
        return Way(peer.peer_id, error=error.message)
    return Way(peer.peer_id, 1e3 * statistics.median(trips), speed)


def lines(event: dict[str, Any]) -> list[str]:
    """The event for people."""
    capacity, speed = event["capacity"], event["speed"]
    said = [f"{d['kind']}: {d['name']}, {d['free_mb']} of {d['total_mb']} MB free" for d in event["devices"]]
    said.append(
        f"{event['model']} on {event['device']}: {1e3 * speed['decode_s_per_layer']:.2f} ms a token and layer, "
        f"{1e6 * speed['prefill_s_per_token_layer']:.0f} us a prompt token and layer, {event['gflops']:g} GFLOPS"
        + (" (measured before; --fresh measures again)" if speed["cached"] else "")
    )
    ends = f"{capacity['first']} from the first or {capacity['last']} to the last"
    fits = "all of it" if capacity["whole"] else f"{capacity['middle']} of its {event['num_layers']} layers, {ends},"
    said.append(f"{event['given_mb']} MB have room for {fits} beside KV caches")
    if not event["admitted"]:
        said.append(f"the swarm's policy keeps it out: this machine {event['reason']}")
    for way in event["peers"]:
        name = f"peer {way['peer_id'][-6:]}"
        if way["error"]:
            said.append(f"{name}: {way['error']}")
        else:
            carried = f", {way['mb_per_s']:.1f} MB/s" if way["mb_per_s"] is not None else ""
            said.append(f"{name}: {way['round_trip_ms']:.1f} ms there and back{carried}")
    if event["reachability"] is not None:
        said.append(f"this machine {event['reachability']['sentence']}")
    return said
