"""One generation: a route, the tokens that come round it, and what to do when it breaks.

After :class:`swarm.chain.Chain` has established a route, the tokens go round the ring by themselves and the
owner only listens: it commits tokens, watches heartbeats and progress, and has the chain mended when a hop
is lost or leaves.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from types import TracebackType

from swarm import protocol_pb2 as pb
from swarm.chain import Chain
from swarm.config import Settings
from swarm.control import HopLost
from swarm.health import Health
from swarm.knowledge import View
from swarm.models import ModelProfile
from swarm.prefix import Prefixes
from swarm.rebuilds import Patience, Rebuild
from swarm.transcript import FinishReason, Generated, GenerationRequest, Transcript, length_of
from swarm.transport import Transport
from swarm.types import Announcement, PeerId, Route, SessionId
from swarm.watching import HandoverReady, Watch

__all__ = ["Generated", "GenerationRequest", "RouteChanged", "Session"]


@dataclass(frozen=True, slots=True)
class RouteChanged:
    """The session runs on ``route`` from now on."""

    epoch: int
    route: Route
    reason: str
    """``opened``, or what happened to whom."""
    cause: str = "opened"
    """``opened``, ``leaving``, or the code of the error by which a hop was lost; ``lost`` if nobody told."""
    rebuild: Rebuild | None = None
    """What the change cost; ``None`` of the first route."""


class Session:
    """An ``async with``; iterate :meth:`events` once. Leaving the block frees every stage."""

    def __init__(
        self,
        transport: Transport,
        view: View,
        profile: ModelProfile,
        request: GenerationRequest,
        settings: Settings,
        health: Health,
        prefixes: Prefixes | None = None,
    ) -> None:
        """``prefixes``: of who asked for the session, if that is not this process.

        Raises :class:`BadRequest` and :class:`TooLong`.
        """
        self.session_id = SessionId(secrets.token_hex(16))
        self.transcript = Transcript(request, length_of(request, profile, settings), profile.vocab_size)
        self._settings = settings
        self._view = view
        self._health = health
        self._tasks = asyncio.TaskGroup()
        prefixes = prefixes or health.prefixes
        self._chain = Chain(
            self.session_id, self.transcript, transport, view, profile, settings, health, prefixes, self._tasks
        )
        self._watch = Watch(self._chain, settings)

    async def __aenter__(self) -> Session:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._chain.close()
        await self._tasks.__aexit__(None, None, None)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.transcript.finish_reason

    @property
    def rebuilds(self) -> list[Rebuild]:
        return self._chain.rebuilds

    @property
    def reused(self) -> int:
        """Tokens of the prompt that every stage had from an earlier session."""
        return self._chain.reused

    @property
    def route(self) -> Route:
        return self._chain.route

    async def events(self) -> AsyncGenerator[RouteChanged | Generated, None]:
        """Until the end of text or ``max_tokens``. Raises :class:`SwarmError` when no route can be had."""
        chain, patience = self._chain, Patience(self._settings.recovery.max_rebuilds)
        now = asyncio.get_running_loop().time
        reason = cause = "opened"
        await chain.establish(reason)
        while True:
            yield RouteChanged(chain.epoch, chain.route, reason, cause, chain.rebuilds[-1] if chain.rebuilds else None)
            known, begun = len(self.transcript), self.transcript.generated
            promised = {a.peer.peer_id: a for a in self._view.announcements()}
            heard_at = now()
            try:
                async for token in self._listen():
                    waited_s, heard_at = now() - heard_at, now()
                    if token.index > begun and not self.transcript.request.speculate:
                        # not of the first: its pass had more rows than one
                        self._note_paces(token, promised, waited_s, heard_at)
                    yield token
                return
            except HopLost as loss:
                patience.lost(loss, fruitful=len(self.transcript) > known)
                reason, cause = await chain.bury(loss), loss.error.code
            except HandoverReady as ready:
                reason, cause = await chain.replace(ready.handover), "leaving"
            await patience.pause()
            await chain.establish(reason)

    async def _listen(self) -> AsyncGenerator[Generated, None]:
        """Tokens until the end. Raises ``HopLost`` or ``HandoverReady`` when the route has to change."""
        watch, transcript = self._watch, self.transcript
        watch.begin()
        while True:
            if transcript.fresh:
                watch.moved()  # once: tokens of one pass are one step
            while transcript.fresh:
                watch.waiting()
                yield transcript.fresh.popleft()
            if transcript.finish_reason is not None:
                self._chain.praise()
                return
            output = await watch.output()
            if output is not None:
                await self._take(output)
            watch.check()

    def _note_paces(
        self, token: Generated, promised: Mapping[PeerId, Announcement], waited_s: float, now: float
    ) -> None:
        """Of the hops that we chose, if they took no longer than we waited: the last one may say anything of others."""
        if sum(timing.compute_s for timing in token.hops) > waited_s:
            return
        chosen = {(hop.peer.peer_id, hop.layers) for hop in self._chain.hops}
        for timing in token.hops:
            if timing.peer_id in promised and (timing.peer_id, timing.layers) in chosen:
                self._health.paces.note(promised[timing.peer_id], timing, now)

    async def _take(self, output: pb.Output) -> None:
        known = len(self.transcript)
        with self._chain.controls[-1].blamed():
            self.transcript.commit(output)
        if self.transcript.finish_reason is None:
            await self._chain.feed_from(known)
