"""Which peers are to run a session's layers: the planner's question as one session asks it, and its grudges."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Collection, Mapping

from swarm.config import Settings
from swarm.coverage import explained
from swarm.errors import BadRequest, Busy, Evicted, NoRoute, PeerLost, SwarmError, Unreachable, WrongRange
from swarm.health import Health
from swarm.knowledge import View, known
from swarm.models import ModelProfile
from swarm.prefix import SessionPrefix, reckoned
from swarm.routing import Demand, plan
from swarm.transcript import Tokens
from swarm.types import Hop, LayerRange, PeerId, SessionId
from swarm.wire import encoding_of, row_bytes


class HopPlanner:
    """Of the session whose tokens are ``transcript``. What it learns of peers goes into the process's ``health``."""

    def __init__(
        self,
        session_id: SessionId,
        transcript: Tokens,
        prefix: SessionPrefix,
        view: View,
        profile: ModelProfile,
        settings: Settings,
        health: Health,
    ) -> None:
        self._seed = zlib.crc32(session_id.encode())
        self._transcript = transcript
        self._prefix = prefix
        self._view = view
        self._profile = profile
        self._settings = settings
        self._health = health

    def plan(self, layers: LayerRange, refused: Collection[PeerId], route: Collection[Hop]) -> tuple[Hop, ...]:
        """The best hops over ``layers`` between those that ``route`` has right before and after them, round the ring,
        and between the cuts of the session's wire.

        Of near-equals each session takes others, which spreads the load. Even peers that announced no room are asked,
        if there are no others: announcements are seconds old, and the room may have been that of a session that has
        ended, such as the last turn of the same chat. Raises :class:`NoRoute`.
        """
        try:
            return self._hops(layers, refused, route, self._transcript.stop_at)
        except NoRoute:
            return self._hops(layers, refused, route, 0)

    def _hops(
        self, layers: LayerRange, refused: Collection[PeerId], route: Collection[Hop], room: int
    ) -> tuple[Hop, ...]:
        pieces = self._transcript.wire.pieces(layers)
        return tuple(hop for piece in pieces for hop in self._plan(piece, refused, route, room))

    def _plan(self, layers: LayerRange, refused: Collection[PeerId], route: Collection[Hop], room: int) -> list[Hop]:
        """``room``: for so many tokens."""
        tokens, profile = len(self._transcript), self._profile
        encoding = encoding_of(self._transcript.wire.name, profile.dtype)
        demand = Demand(
            tokens=room,
            prompt_tokens=tokens,
            new_tokens=max(1, self._transcript.stop_at - tokens),
            activation_bytes=row_bytes(encoding, profile.hidden_size),
            log_layers=profile.log_layers,
            chunk_tokens=self._settings.engine.prefill_chunk_tokens,
        )
        last = profile.num_layers
        before = (hop.peer.peer_id for hop in route if hop.layers.end % last == layers.start)
        after = (hop.peer.peer_id for hop in route if hop.layers.start == layers.end % last)
        knowledge = known(
            self._view,
            self._health,
            _now(),
            self._settings.planner,
            before=next(before, None),
            after=next(after, None),
            seed=self._seed,
        )
        held = self._prefix.held()
        found = plan(
            [reckoned(a, held.get(a.peer.peer_id, 0), tokens) for a in self._view.announcements()],
            layers,
            demand,
            knowledge,
            ring=len(layers) == profile.num_layers,
            excluded=frozenset(refused),
        )
        return [planned.hop for planned in found.hops]

    def pass_s(self, hops: Collection[Hop]) -> float:
        """How long a pass over rows of prompts, as many as there may be, should take at the slowest, as announced."""
        paces = {a.peer.peer_id: a.prefill_s_per_token_layer for a in self._view.announcements()}
        a_row_s = max(paces.get(hop.peer.peer_id, 0.0) * len(hop.layers) for hop in hops)
        return a_row_s * self._settings.engine.max_batch_tokens

    async def refresh(self) -> None:
        """Read the announcements anew: somebody may have joined just now."""
        await self._view.refresh()

    async def explain(self, error: NoRoute, refused: Mapping[PeerId, SwarmError]) -> None:
        """Raise why a session that never ran finds no route; first look once more, and return if there is one now."""
        for refusal in refused.values():
            if not isinstance(refusal, PeerLost | Unreachable | Busy | Evicted):
                raise refusal from None
        await self.refresh()
        whole = LayerRange(0, self._profile.num_layers)
        try:
            self.plan(whole, refused, ())
            return
        except NoRoute as now:
            for refusal in refused.values():
                if isinstance(refusal, Busy | Evicted):
                    self._hops(whole, (), (), self._transcript.stop_at)  # says more if nobody has announced room
                    raise Busy(refusal.message) from None
            if refused:
                raise NoRoute(f"{now.message}; another may be loading these layers: try again in a moment") from None
        raise explained(error, self._view.announcements(), self._profile, self._view.check) from None

    def blame(self, hop: Hop, error: SwarmError) -> None:
        """What a peer says of this request is no failure of the peer; a range that it no longer has is."""
        if isinstance(error, BadRequest) and not isinstance(error, WrongRange):
            return
        if isinstance(error, Busy | Evicted):
            self._health.full(hop.peer.peer_id, _now())
        else:
            self._health.failed(hop.peer.peer_id, error.code, _now())

    def praise(self, hop: Hop) -> None:
        self._health.succeeded(hop.peer.peer_id, _now())


def _now() -> float:
    return asyncio.get_running_loop().time()
