"""Questions to a peer: what it serves, and the files that a client needs of its model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from swarm import protocol_pb2 as pb
from swarm.awake import timeout_awake
from swarm.config import Settings, TimeoutSettings
from swarm.errors import DeadlineExceeded, ModelError, ProtocolError, StreamLost, WrongRange
from swarm.models import ModelProfile
from swarm.multiaddrs import is_dialable
from swarm.protocol import MAX_ADDRESSES, address_to_wire, decode, error_from_wire, one_line
from swarm.transport import INFO, Stream, Transport
from swarm.types import LayerRange, ModelId, PeerAddress, PeerId, Voucher

FILE_PATIENCE = 6
"""So many times ``timeouts.info_s`` may a model file take ..."""
FILE_PATIENCE_BYTES = 4 * 1024 * 1024
"""... of this size; a larger one longer, for there are some of 20 MB, and a home's line may carry 1 Mbit/s."""
MAX_FAILURE_CHARS = 200
"""Of why an address could not be dialled."""


def file_s(size_bytes: int, timeouts: TimeoutSettings) -> float:
    """How long a model file of this size may take."""
    return FILE_PATIENCE * timeouts.info_s * max(1.0, size_bytes / FILE_PATIENCE_BYTES)


@dataclass(frozen=True, slots=True)
class Description:
    """What a peer says of itself and its model."""

    peer: PeerAddress
    profile: ModelProfile
    layers: LayerRange
    state: str
    version: str
    files: dict[str, int]
    """Names and sizes in bytes of the model files that it hands out."""
    sessions: int
    """Stages that are open there."""
    kv_bytes_used: int
    """Reserved for their KV caches and checkpoint logs."""
    kv_bytes_kept: int
    """... and what is left of sessions that ended."""


@asynccontextmanager
async def _ask(
    transport: Transport, peer: PeerAddress, request: pb.InfoRequest, deadline_s: float
) -> AsyncIterator[Stream]:
    try:
        async with timeout_awake(deadline_s):
            stream = await transport.open(peer, INFO)
            try:
                await stream.send(request.SerializeToString())
                yield stream
            finally:
                await stream.close()
    except TimeoutError:
        raise DeadlineExceeded(f"peer {peer.peer_id[-6:]} did not answer within {deadline_s:g} s") from None


async def _answer(stream: Stream) -> pb.InfoReply | None:
    frame = await stream.receive()
    if frame is None:
        return None
    reply = decode(pb.InfoReply, frame)
    if reply.WhichOneof("kind") == "error":
        raise error_from_wire(reply.error)
    return reply


async def describe(transport: Transport, peer: PeerAddress, settings: Settings) -> Description:
    """Raises ``Unreachable``, ``PeerLost`` or ``ProtocolError``, within ``timeouts.info_s``."""
    async with _ask(transport, peer, pb.InfoRequest(describe=True), settings.timeouts.info_s) as stream:
        reply = await _answer(stream)
    if reply is None or reply.WhichOneof("kind") != "description":
        raise ProtocolError("no description came")
    d = reply.description
    try:
        profile, layers = ModelProfile.from_json(d.profile_json), LayerRange(d.start, d.end)
    except (ModelError, WrongRange) as error:
        raise ProtocolError(f"a description that makes no sense: {error}") from error
    if profile.model_id != d.model:
        raise ProtocolError("a description of another model than its profile's")
    held = d.sessions, d.kv_bytes_used, d.kv_bytes_kept
    return Description(peer, profile, layers, one_line(d.state), one_line(d.version), dict(d.files), *held)


async def fetch_files(
    transport: Transport, description: Description, names: Iterable[str], settings: Settings
) -> dict[str, bytes]:
    """Those of ``names`` that the peer has, each at most ``limits.max_info_bytes``."""
    files: dict[str, bytes] = {}
    for name in names:
        if name not in description.files:
            continue
        parts, size = [], 0
        request = pb.InfoRequest(model_file=name)
        patience_s = file_s(min(description.files[name], settings.limits.max_info_bytes), settings.timeouts)
        async with _ask(transport, description.peer, request, patience_s) as stream:
            while (reply := await _answer(stream)) is not None:
                size += len(reply.chunk)
                if size > settings.limits.max_info_bytes:
                    raise ProtocolError(f"{name} is larger than max_info_bytes ({settings.limits.max_info_bytes})")
                parts.append(reply.chunk)
        if size != description.files[name]:
            raise StreamLost(f"{name} came with {size} of {description.files[name]} bytes")
        files[name] = b"".join(parts)
    return files


async def ask_for_voucher(
    transport: Transport, peer: PeerAddress, model: ModelId, layers: LayerRange, settings: Settings
) -> Voucher:
    """Have ``peer`` probe our ``layers``, within ``timeouts.probe_s``; ``NotAdmitted``: it found them wrong."""
    me = address_to_wire(transport.local)
    request = pb.InfoRequest(probe_me=pb.ProbeMe(peer=me, model=model, start=layers.start, end=layers.end))
    async with _ask(transport, peer, request, settings.timeouts.probe_s) as stream:
        reply = await _answer(stream)
    if reply is None or reply.WhichOneof("kind") != "voucher":
        raise ProtocolError("no voucher came")
    return Voucher(PeerId(reply.voucher.verifier), reply.voucher.at, reply.voucher.signature)


async def probe(transport: Transport, peer: PeerAddress, request: pb.Probe, settings: Settings) -> bytes:
    """What the layers of ``peer`` make of a small input, within half of ``timeouts.probe_s``."""
    async with _ask(transport, peer, pb.InfoRequest(probe=request), settings.timeouts.probe_s / 2) as stream:
        reply = await _answer(stream)
    if reply is None or reply.WhichOneof("kind") != "probed":
        raise ProtocolError("no answer to the probe came")
    return reply.probed


@dataclass(frozen=True, slots=True)
class DialledBack:
    """What a peer found when it dialled us, over a new connection."""

    peer: PeerId
    seen_at: str
    """Multiaddr that our question came from."""
    reached: str
    """Where we answered; empty: nowhere."""
    failures: tuple[tuple[str, str], ...]
    """Addresses where we did not, and what happened there."""


async def ask_to_dial_back(transport: Transport, peer: PeerAddress, settings: Settings) -> DialledBack:
    """Have ``peer`` dial this process; raises ``Busy``, and what else keeps it from answering, within ``info_s``."""
    request = pb.InfoRequest(dial_me=pb.DialMe(peer=address_to_wire(transport.local)))
    async with _ask(transport, peer, request, settings.timeouts.info_s) as stream:
        reply = await _answer(stream)
    if reply is None or reply.WhichOneof("kind") != "dialled_back":
        raise ProtocolError("it does not dial back")
    told = reply.dialled_back
    addresses = [told.seen_at, *(dial.multiaddr for dial in told.dials)]
    if len(addresses) > MAX_ADDRESSES or not all(map(is_dialable, addresses)):
        raise ProtocolError("it dialled what is no address")
    _, kind, *host = told.seen_at.split("/")[:3]
    if told.dials and (kind.startswith("dns") or any(a.split("/")[1:3] != [kind, *host] for a in addresses)):
        raise ProtocolError("it dialled another host than the one that asked")
    reached = next((dial.multiaddr for dial in told.dials if not dial.error), "")
    failures = tuple((dial.multiaddr, one_line(dial.error, MAX_FAILURE_CHARS)) for dial in told.dials if dial.error)
    return DialledBack(peer.peer_id, told.seen_at, reached, failures)


async def round_trip_s(transport: Transport, peer: PeerAddress, settings: Settings) -> float:
    """Seconds for one small question and its answer on a stream that is open already."""
    loop = asyncio.get_running_loop()
    async with _ask(transport, peer, pb.InfoRequest(echo=1), settings.timeouts.info_s) as stream:
        began = loop.time()
        reply = await _answer(stream)
        if reply is None or reply.echo != 1:
            raise ProtocolError("the echo is not what was sent")
        return loop.time() - began
