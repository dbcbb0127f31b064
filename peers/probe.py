"""The functional probe: a peer counts once another has sent rows through its layers and the right numbers came back.

A joiner asks a serving peer to probe it (:func:`obtain_voucher`). That verifier dials the joiner's announced addresses,
sends a few random rows, and computes the same: with its own layers where the two overlap, else one layer of its own
copy of the checkpoint, loaded for a moment within its KV budget. If they agree in time, it signs a voucher
(``swarm.admission``), which the joiner announces. Whoever finds nobody to ask vouches for itself, and is probed by
another as soon as there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import torch

from peers.executor import Executor, StepRequest, run
from peers.kv_budget import KVBudget
from swarm import protocol_pb2 as pb
from swarm.admission import is_signed, vouch
from swarm.config import Settings
from swarm.coverage import weights_bytes
from swarm.errors import BadRequest, Busy, NotAdmitted, NotAllowed, SwarmError, Unreachable
from swarm.identity import Identity
from swarm.info import ask_for_voucher, probe
from swarm.models import ModelProfile
from swarm.protocol import address_from_wire, rows_from_wire, rows_to_wire
from swarm.transport import Transport
from swarm.types import Announcement, LayerRange, PeerAddress, PeerId, PeerState, SessionId, Voucher

logger = logging.getLogger(__name__)

ROWS = 4
"""Of a probe: enough for attention to have something to attend to."""
MOST_ROWS = 16
"""That anybody may have computed."""
INPUT_SIZE = 0.1
"""Root mean square of random hidden states: small beside what a layer adds to them, which is what is compared."""
MOST_WAITING = 8
"""Joiners, or probes, that wait for one peer at once."""
MOST_ASKED = 3
"""Peers that a joiner asks, one after the other."""
ENOUGH_TO_END = 2
"""Peers that have to find one wrong that serves already: a single one, who may be wrong itself, can't end it."""
TOLERANCE = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.1}
"""Relative error of a row, by dtype: kernels of other devices round otherwise, another quantisation is further off."""

Borrow = Callable[[LayerRange], AbstractAsyncContextManager[Executor]]
"""Loads layers of the same checkpoint for a moment."""
Knock = Callable[[PeerAddress], Awaitable[None]]
"""Makes a new connection to a peer's announced addresses; raises ``Unreachable`` if none takes it."""


@dataclass(frozen=True, slots=True)
class Vouching:
    """What a peer needs to vouch for others, beside its own layers."""

    identity: Identity
    borrow: Borrow
    knock: Knock


class Prober:
    """Answers probes with this peer's layers, and probes joiners that ask for it; one of each at a time."""

    def __init__(
        self, transport: Transport, executor: Executor, budget: KVBudget, vouching: Vouching, settings: Settings
    ) -> None:
        self._transport = transport
        self._executor = executor
        self._budget = budget
        self._vouching = vouching
        self._settings = settings
        self._answering = _Queue()
        self._vouching_queue = _Queue()

    async def answer(self, request: pb.Probe) -> bytes:
        """Our layers' outputs; raises ``WrongRange``, ``BadTensor``, ``BadRequest``, ``Busy``."""
        layers, profile = LayerRange(request.start, request.end), self._executor.profile
        ids: list[int] | None = None
        hidden = None
        if layers.start > 0:
            hidden = rows_from_wire(request.hidden, profile.dtype, profile.hidden_size, MOST_ROWS)
        elif 0 < (rows := len(request.token_ids)) <= MOST_ROWS:
            ids = list(request.token_ids)
        else:
            raise BadRequest(f"a probe has 1 to {MOST_ROWS} rows, not {rows}")
        async with self._answering:
            return await outputs(self._executor, layers, ids, hidden)

    async def vouch(self, remote: PeerId, request: pb.ProbeMe) -> pb.Voucher:
        """Probe ``remote``; raises :class:`NotAdmitted` if it can't be reached, is late, or its numbers are wrong."""
        profile = self._executor.profile
        joiner, layers = address_from_wire(request.peer), LayerRange(request.start, request.end)
        if joiner.peer_id != remote:
            raise NotAllowed("a peer can have only itself probed")
        if request.model != profile.model_id or layers.end > profile.num_layers:
            raise BadRequest(f"this peer serves {profile.model_id}, not layers {layers} of {request.model[:80]}")
        async with self._vouching_queue:
            name = f"peer {remote[-6:]}"
            try:
                await self._vouching.knock(joiner)
            except Unreachable as error:
                raise NotAdmitted(f"{name} can't be reached where it says it is: {error.message}") from None
            off = await self._error_of(joiner, layers)
            allowed = TOLERANCE[profile.dtype]
            if not off <= allowed:
                raise NotAdmitted(
                    f"the layers of {name} give other numbers than this model's: off by {off:.2g}, "
                    f"{allowed:g} is allowed in {profile.dtype}"
                )
            voucher = vouch(self._vouching.identity, remote, profile.model_id, layers)
        logger.info("vouched for peer %s, layers %s", remote[-6:], layers)
        return pb.Voucher(verifier=voucher.verifier, at=voucher.at, signature=voucher.signature)

    async def _error_of(self, joiner: PeerAddress, layers: LayerRange) -> float:
        """The largest relative error of a row that the joiner's layers computed."""
        own = self._executor.layers
        start, end = max(own.start, layers.start), min(own.end, layers.end)
        if start < end:
            return await self._compare(joiner, self._executor, LayerRange(start, end))
        profile = self._executor.profile
        inner = range(max(1, layers.start), min(profile.num_layers - 1, layers.end)) or range(layers.start, layers.end)
        one = random.choice(inner)  # not the ends, where there is a choice: their tables are large
        chosen = LayerRange(one, one + 1)
        with self._room_for(chosen, profile):
            async with self._vouching.borrow(chosen) as borrowed:
                return await self._compare(joiner, borrowed, chosen)

    @contextlib.contextmanager
    def _room_for(self, layers: LayerRange, profile: ModelProfile) -> Iterator[None]:
        """The borrowed layer's weights come out of the KV budget; raises ``Busy``: another peer may have room."""
        key = SessionId("the layer that a joiner is probed with")
        self._budget.reserve(key, weights_bytes(profile, layers))
        try:
            yield
        finally:
            self._budget.release(key)

    async def _compare(self, joiner: PeerAddress, executor: Executor, layers: LayerRange) -> float:
        profile = executor.profile
        ids, hidden = rows_for(profile, layers, random.getrandbits(32))
        request = pb.Probe(start=layers.start, end=layers.end, token_ids=ids or [])
        if hidden is not None:
            request.hidden.CopyFrom(rows_to_wire(hidden, profile.dtype, profile.hidden_size))
        expected = await outputs(executor, layers, ids, hidden)
        try:
            found = await probe(self._transport, joiner, request, self._settings)
        except SwarmError as error:
            name = f"peer {joiner.peer_id[-6:]}"
            raise NotAdmitted(f"{name} did not answer a probe of layers {layers}: {error.message}") from None
        return relative_error(found, expected, hidden, profile, layers)


class _Queue:
    """One at a time; a few may wait, others hear ``Busy``."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._waiting = 0

    async def __aenter__(self) -> None:
        if self._waiting >= MOST_WAITING:
            raise Busy("this peer is probing others already")
        self._waiting += 1
        try:
            await self._lock.acquire()
        except BaseException:
            self._waiting -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._waiting -= 1
        self._lock.release()


# --- the numbers -----------------------------------------------------------------------------------------------------


def rows_for(profile: ModelProfile, layers: LayerRange, chance: int) -> tuple[list[int] | None, bytes | None]:
    """The input of a probe: token ids for layer 0, else hidden states ``[ROWS, hidden]`` in the model's dtype."""
    seeded = random.Random(f"{profile.model_id} {layers} {chance}")
    if layers.start == 0:
        return [seeded.randrange(profile.vocab_size) for _ in range(ROWS)], None
    generator = torch.Generator().manual_seed(seeded.getrandbits(63))
    rows = INPUT_SIZE * torch.randn(ROWS, profile.hidden_size, generator=generator)
    return None, _to_bytes(rows, profile.dtype)


async def outputs(executor: Executor, layers: LayerRange, ids: Sequence[int] | None, hidden: bytes | None) -> bytes:
    """Hidden states after ``layers``; after the last layer (and the final norm) also the last row's float32 logits."""
    profile = executor.profile
    rows = len(ids) if ids is not None else len(hidden or b"") // (profile.hidden_size * _dtype(profile.dtype).itemsize)
    last = layers.end == profile.num_layers
    step = StepRequest(
        layers=layers,
        cache=executor.new_cache(layers, rows),
        start=0,
        rows=rows,
        token_ids=ids,
        hidden=hidden,
        logit_rows=1 if last else 0,
        want_hidden=True,
    )
    reply = await run(executor, step)
    return reply.hidden + reply.logits


def relative_error(
    found: bytes, expected: bytes, hidden: bytes | None, profile: ModelProfile, layers: LayerRange
) -> float:
    """The worst row's; infinite for another size. Of hidden states, what the layers added to their input counts."""
    if found == expected:
        return 0.0
    if len(found) != len(expected):
        return float("inf")
    last, width = layers.end == profile.num_layers, profile.hidden_size
    size = len(expected) - (4 * profile.vocab_size if last else 0)
    given = 0.0 if last or hidden is None else _from_bytes(hidden, profile.dtype, width)
    error = _worst(
        _from_bytes(found[:size], profile.dtype, width), _from_bytes(expected[:size], profile.dtype, width), given
    )
    if last:
        logits = (_from_bytes(data[size:], "float32", profile.vocab_size) for data in (found, expected))
        error = max(error, _worst(*logits))
    return error


def _worst(theirs: torch.Tensor, ours: torch.Tensor, given: torch.Tensor | float = 0.0) -> float:
    errors = (theirs - ours).norm(dim=1) / (ours - given).norm(dim=1)
    return float(errors.nan_to_num(float("inf")).max())


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _to_bytes(rows: torch.Tensor, dtype: str) -> bytes:
    data: bytes = rows.to(_dtype(dtype)).contiguous().view(torch.uint8).numpy().tobytes()
    return data


def _from_bytes(data: bytes, dtype: str, width: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=_dtype(dtype)).view(-1, width).double()


# --- the joiner ------------------------------------------------------------------------------------------------------


async def obtain_voucher(
    transport: Transport,
    announcements: Sequence[Announcement],
    profile: ModelProfile,
    layers: LayerRange,
    identity: Identity,
    settings: Settings,
    *,
    serving: bool = False,
) -> Voucher:
    """From a serving peer, best one with layers of ours; from ourselves if nobody is there, or nobody can tell.

    Raises :class:`NotAdmitted` with a verifier's reason if nobody vouches for us and one of them found us wrong, or
    ``ENOUGH_TO_END`` of them if we are ``serving`` already.
    """
    others = [a for a in announcements if a.state is PeerState.SERVING and a.peer.peer_id != identity.peer_id]
    random.shuffle(others)
    others.sort(key=lambda a: a.layers.end <= layers.start or a.layers.start >= layers.end)
    refusals: list[NotAdmitted] = []
    for verifier in others[:MOST_ASKED]:
        try:
            voucher = await ask_for_voucher(transport, verifier.peer, profile.model_id, layers, settings)
            if is_signed(voucher, identity.peer_id, profile.model_id, layers):
                return voucher
            logger.info("peer %s gave a voucher that does not hold", verifier.peer.peer_id[-6:])
        except NotAdmitted as error:
            logger.info("peer %s does not vouch for us: %s", verifier.peer.peer_id[-6:], error)
            refusals.append(error)
        except SwarmError as error:
            logger.info("peer %s could not probe our layers: %s", verifier.peer.peer_id[-6:], error)
    if len(refusals) >= (ENOUGH_TO_END if serving else 1):
        raise refusals[0]
    if others:
        told = f": {refusals[0]}" if refusals else ""
        logger.warning("none of %d serving peers vouches for us; they are asked again later%s", len(others), told)
    return vouch(identity, identity.peer_id, profile.model_id, layers)
