"""A session whose owner is a peer: for clients that can't, or don't want to, plan and listen to every hop.

The thin client keeps what matters, the committed tokens. If the peer that owns the session is lost, the
next one is asked to go on after exactly those, so nothing is lost and nothing comes twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from types import TracebackType
from typing import Self

from swarm import kv
from swarm import protocol_pb2 as pb
from swarm.awake import timeout_awake
from swarm.config import Settings
from swarm.control import expected_heartbeat_s
from swarm.errors import BadRequest, DeadlineExceeded, NoRoute, StreamLost, SwarmError, TooLong, Unreachable
from swarm.models import ModelProfile
from swarm.protocol import (
    MAX_HOPS,
    address_from_wire,
    address_to_wire,
    check_count,
    check_end_ids,
    decode,
    error_from_wire,
    one_line,
)
from swarm.rebuilds import Rebuild
from swarm.session import RouteChanged
from swarm.transcript import FinishReason, Generated, GenerationRequest, Transcript, length_of
from swarm.transport import DELEGATE, Stream, Transport
from swarm.types import Hop, LayerRange, PeerAddress, Route
from swarm.wire import MODEL, Wire

logger = logging.getLogger(__name__)


def route_to_wire(event: RouteChanged) -> pb.RouteNews:
    news = pb.RouteNews(epoch=event.epoch, reason=event.reason, hops=_hops_to_wire(event.route.hops))
    if (rebuild := event.rebuild) is not None:
        news.rebuilt.CopyFrom(
            pb.Rebuilt(
                token_index=rebuild.token_index,
                kept=rebuild.kept,
                lost=_hops_to_wire(rebuild.lost),
                replayed=[pb.Replayed(start=r.start, end=r.end, positions=count) for r, count in rebuild.replayed],
                duration_us=int(rebuild.duration_s * 1e6),
            )
        )
    return news


def route_from_wire(news: pb.RouteNews) -> RouteChanged:
    """Raises :class:`BadRequest` or :class:`WrongRange` if the hops are no route."""
    check_count(news.hops, MAX_HOPS, "hops of a route")
    reason, rebuild, told = one_line(news.reason), None, news.rebuilt
    if news.HasField("rebuilt"):
        rebuild = Rebuild(
            epoch=news.epoch,
            token_index=told.token_index,
            kept=told.kept,
            reason=reason,
            lost=_hops_from_wire(told.lost[:MAX_HOPS]),
            replayed=tuple((LayerRange(r.start, r.end), r.positions) for r in told.replayed[:MAX_HOPS]),
            duration_s=told.duration_us / 1e6,
        )
    cause = "opened" if reason == "opened" else "lost"
    return RouteChanged(news.epoch, Route(_hops_from_wire(news.hops)), reason, cause, rebuild)


def _hops_to_wire(hops: Iterable[Hop]) -> list[pb.RouteHop]:
    return [pb.RouteHop(peer=address_to_wire(hop.peer), start=hop.layers.start, end=hop.layers.end) for hop in hops]


def _hops_from_wire(hops: Iterable[pb.RouteHop]) -> tuple[Hop, ...]:
    return tuple(Hop(address_from_wire(hop.peer), LayerRange(hop.start, hop.end)) for hop in hops)


class DelegatedSession:
    """The same surface as :class:`swarm.session.Session`, run by one of the peers in ``via``."""

    def __init__(
        self,
        transport: Transport,
        via: Sequence[PeerAddress],
        profile: ModelProfile,
        request: GenerationRequest,
        settings: Settings,
    ) -> None:
        """Raises :class:`BadRequest` and :class:`TooLong`, as the owner would."""
        if not via:
            raise BadRequest("a delegated session needs a peer to delegate to")
        self.rebuilds: list[Rebuild] = []
        """As its owners told of them; that one owner followed another is none."""
        self.reused = 0
        """An owner does not tell."""
        self.transcript = Transcript(request, length_of(request, profile, settings), profile.vocab_size)
        self._transport = transport
        self._via = list(via)
        self._profile = profile
        self._settings = settings
        self._stream: Stream | None = None
        self._finished: FinishReason | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            await self._stream.close()

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.transcript.finish_reason or self._finished

    async def events(self) -> AsyncGenerator[RouteChanged | Generated, None]:
        """As :meth:`swarm.session.Session.events`; a peer that is lost or busy is followed by the next.

        Once the session has begun, somebody who takes it over is looked for as long as for lost layers.
        """
        now, wait_s = asyncio.get_running_loop().time, self._settings.recovery.wait_s
        turn = failures = 0
        begun, lost_at = False, now()
        while True:
            known, opened = len(self.transcript), False
            peer = self._via[turn % len(self._via)]
            try:
                async for event in self._through(peer):
                    begun = opened = True
                    yield event
                return
            except SwarmError as error:
                # Only what another owner could do better is tried again: it has the same swarm to work with.
                lost = isinstance(error, StreamLost | DeadlineExceeded | Unreachable) or error.code == "busy"
                # An owner that has had a route waits for lost layers itself. One that takes over says at once that
                # there is none: they may have been lost together with the owner before it.
                lost = lost or (begun and not opened and isinstance(error, NoRoute))
                turn += 1
                failures += 1
                if failures == 1 or len(self.transcript) > known:
                    failures, lost_at = 1, now()
                waited = not begun or now() - lost_at > wait_s
                if not lost or (failures > 2 * len(self._via) and waited):
                    raise
                logger.info("the owner %s of this session was lost: %s", peer.peer_id[-6:], error)
                await asyncio.sleep(self._settings.timeouts.heartbeat_s / 2 if failures > len(self._via) else 0)
                await self._transport.ready()

    async def _through(self, peer: PeerAddress) -> AsyncGenerator[RouteChanged | Generated, None]:
        self._stream = stream = await self._transport.open(peer, DELEGATE)
        transcript, request, timeouts = self.transcript, self.transcript.request, self._settings.timeouts
        message = pb.Delegate(
            model=self._profile.model_id,
            prompt=request.prompt,
            generated=transcript.tokens[len(request.prompt) :],
            max_tokens=request.max_tokens,
            sampling=request.sampling.to_wire(),
            end_ids=sorted(request.end_ids),
            no_kv_cache=request.no_kv_cache,
            speculate=request.speculate,
            wire=transcript.wire.name,
            cuts=transcript.wire.cuts,
            kv=transcript.kv,
        )
        await stream.send(message.SerializeToString())
        heartbeat_s = timeouts.heartbeat_s
        try:
            while transcript.finish_reason is None:
                reply = await self._reply(stream, heartbeat_s * timeouts.heartbeat_misses)
                kind = reply.WhichOneof("kind")
                if kind == "route":
                    changed = route_from_wire(reply.route)
                    transcript.wire = transcript.wire.cut_at(hop.layers.start for hop in changed.route.hops)
                    if changed.rebuild is not None:
                        self.rebuilds.append(changed.rebuild)
                    yield changed
                elif kind == "token":
                    transcript.commit(reply.token)
                    while transcript.fresh:
                        yield transcript.fresh.popleft()
                elif kind == "finished":
                    self._finished = "stop" if reply.finished == "stop" else "length"
                    return
                elif kind == "error":
                    raise error_from_wire(reply.error)
                elif kind == "heartbeat_s":
                    heartbeat_s = expected_heartbeat_s(reply.heartbeat_s, timeouts)
        finally:
            await stream.close()

    async def _reply(self, stream: Stream, silence_s: float) -> pb.DelegateReply:
        try:
            async with timeout_awake(silence_s):
                frame = await stream.receive()
        except TimeoutError:
            raise DeadlineExceeded(f"the session's owner was silent for {silence_s:g} s") from None
        if frame is None:
            raise StreamLost("the session's owner ended without a result")
        return decode(pb.DelegateReply, frame)


def request_from_wire(message: pb.Delegate, profile: ModelProfile) -> GenerationRequest:
    """What a thin client asks for, checked; raises :class:`BadRequest`."""
    from swarm.sampling import SamplingParams

    if message.model != profile.model_id:
        raise BadRequest(f"this peer serves {profile.model_id}, not {message.model[:80]}")
    check_end_ids(message.end_ids)
    check_count(message.cuts, profile.num_layers, "cuts of a route")
    if (known := len(message.prompt) + len(message.generated)) >= profile.max_positions:
        raise TooLong(f"the text has {known} tokens; the model's limit is {profile.max_positions}")
    return GenerationRequest(
        prompt=tuple(message.prompt),
        generated=tuple(message.generated),
        max_tokens=message.max_tokens,
        sampling=SamplingParams.from_wire(message.sampling),
        end_ids=frozenset(message.end_ids),
        no_kv_cache=message.no_kv_cache,
        speculate=message.speculate,
        wire=Wire(message.wire or MODEL, tuple(message.cuts)),
        kv=message.kv or kv.MODEL,
    )
