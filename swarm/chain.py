"""The hops of one session: planned, opened, started, mended.

Opening a route and rebuilding it are the same procedure, :meth:`Chain.establish`:

1. plan hops for every range of layers that has no living stage (at first: all of them);
2. send ``Open`` with a new epoch to all hops, new and surviving; each truncates to the committed length and
   answers how many positions it ``have``;
3. send ``Start``: each hop learns its targets and the first position whose output each of them lacks, and
   replays that from its checkpoint log;
4. feed the token ids that the first hop lacks.

A peer that leaves is replaced before it goes, see ``handover.py``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import zlib
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.control import Event, HopControl
from swarm.coverage import explained
from swarm.errors import NoRoute, PeerLost, ProtocolError, StreamLost, SwarmError, Unreachable
from swarm.handover import Handover
from swarm.health import Health
from swarm.knowledge import Seen, known
from swarm.models import ModelProfile
from swarm.prefix import reckoned
from swarm.protocol import ITEM_BYTES, address_to_wire
from swarm.routing import Demand, plan
from swarm.transcript import FinishReason
from swarm.transport import Transport
from swarm.types import Announcement, Hop, LayerRange, PeerId, Route, SessionId

logger = logging.getLogger(__name__)

RETRY_FIRST_S = 0.1
RETRY_MOST_S = 1.0
"""Pauses between attempts to find a replacement, doubled from the first to the longest."""

SETTLE_S = 0.02
"""After a stream is lost: time for others that were lost by the same accident to show it too."""


class View(Seen, Protocol):
    """What the session needs of discovery."""

    def announcements(self) -> Sequence[Announcement]: ...

    async def refresh(self) -> object: ...


class Tokens(Protocol):
    """What the chain needs to know of a session's tokens: those of a generation, or the inputs of step mode."""

    tokens: list[int]
    stop_at: int
    finish_reason: FinishReason | None

    def __len__(self) -> int: ...

    @property
    def kept(self) -> int:
        """Positions before this one may stay at the stages when the route changes."""

    @property
    def unchanged(self) -> int:
        """... and before this one at a stage that comes back after it was off the route."""

    @property
    def generated(self) -> int: ...

    @property
    def reusable(self) -> bool:
        """Stages may use for it what they computed in earlier sessions, and the other way round."""

    @property
    def step(self) -> pb.Step | None:
        """In step mode, the newest input."""

    def describe(self, message: pb.Open, *, last: bool) -> None: ...

    def commit(self, output: pb.Output) -> None: ...


@dataclass(frozen=True, slots=True)
class Rebuild:
    """One change of the route and what it cost, for reports."""

    epoch: int
    token_index: int
    kept: int
    """The committed length (prompt included) to which the surviving stages truncated."""
    reason: str
    lost: tuple[Hop, ...]
    replayed: tuple[tuple[LayerRange, int], ...]
    """New layer ranges with the positions that they had to compute again."""
    duration_s: float


class HopLost(Exception):
    """A hop of the route has to be replaced."""

    def __init__(self, control: HopControl, error: SwarmError) -> None:
        super().__init__(str(error))
        self.control, self.error = control, error


class Chain:
    """``controls`` are the hops in order; between :meth:`bury` and :meth:`establish` some layers have none."""

    def __init__(
        self,
        session_id: SessionId,
        transcript: Tokens,
        transport: Transport,
        view: View,
        profile: ModelProfile,
        settings: Settings,
        health: Health,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.controls: list[HopControl] = []
        self.events: asyncio.Queue[tuple[HopControl, Event | Handover]] = asyncio.Queue()
        """What the hops say. Bounded by what stages may say: a token for each position, a status a heartbeat."""
        self.epoch = 0
        self.complete = False
        self.rebuilds: list[Rebuild] = []
        self.reused = 0
        """Tokens of the prompt that every stage had from an earlier session when this one was opened."""
        self._session_id = session_id
        self._seed = zlib.crc32(session_id.encode())
        self.transcript = transcript
        self._transport = transport
        self._view = view
        self._profile = profile
        self.settings = settings
        self._health = health
        self._tasks = tasks
        self.next_epoch = itertools.count(1).__next__
        self._lost: list[Hop] = []
        self._lost_at = 0.0
        self._returning: list[Hop] = []
        """Hops whose stages wait for us to come back: they were lost when our own daemon died."""
        self._ring_from = 0
        """Outputs at this position and later go round the ring; earlier ones are fed by the owner."""
        self._handovers: dict[HopControl, tuple[Handover, asyncio.Task[None]]] = {}

    @property
    def route(self) -> Route:
        return Route(tuple(control.hop for control in self.controls))

    async def close(self) -> None:
        """Free every stage."""
        self._stop_handovers()
        prefix = self._prefix(len(self.transcript))
        if self.complete:
            self._health.prefixes.remember(prefix, self.route)
        await asyncio.gather(*(control.close(prefix) for control in self.controls))

    async def release(self) -> None:
        """Free every stage, and have :meth:`establish` open them all anew."""
        if self.complete:
            self.complete, self._lost_at = False, _now()
        await self.close()
        self.controls = []

    async def establish(self, reason: str) -> None:
        """Bring the session onto a complete route, however many attempts that takes within ``recovery.wait_s``."""
        first = reason == "opened"
        refused: dict[PeerId, SwarmError] = {}
        pause = RETRY_FIRST_S
        deadline = _now() + self.settings.recovery.wait_s
        self._stop_handovers()
        while True:
            self.epoch = self.next_epoch()
            keep = self.transcript.kept
            survivors = set(self.controls)
            try:
                await self._assemble(refused)
                await self._open_all()
                if self.transcript.finish_reason is None:
                    await self._start_all()
                break
            except HopLost as loss:
                await self.bury(loss)
                refused[loss.control.hop.peer.peer_id] = loss.error
            except NoRoute as error:
                if first:
                    await self._give_up_first(error, refused)
                if _now() > deadline:
                    waited = f"nobody came within {self.settings.recovery.wait_s:.0f} s"
                    raise NoRoute(f"{error.message}, and {waited}") from None
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MOST_S)
                refused.clear()
                await self._view.refresh()
        self.complete = True
        if first:
            self.reused = min(control.came_with or 0 for control in self.controls)
        else:
            self._record(reason, keep, survivors)

    def _record(self, reason: str, kept: int, survivors: set[HopControl]) -> None:
        fresh = [control for control in self.controls if control not in survivors]
        rebuild = Rebuild(
            epoch=self.epoch,
            token_index=self.transcript.generated,
            kept=kept,
            reason=reason,
            lost=tuple(self._lost),
            replayed=tuple((control.hop.layers, max(0, kept - (control.came_with or 0))) for control in fresh),
            duration_s=_now() - self._lost_at,
        )
        self.rebuilds.append(rebuild)
        self._lost = []

    async def _give_up_first(self, error: NoRoute, refused: dict[PeerId, SwarmError]) -> None:
        """A session that never ran doesn't wait: it says at once why, but looks at the DHT once more before."""
        for refusal in refused.values():
            if not isinstance(refusal, PeerLost | Unreachable):
                raise refusal from None
        if refused:
            named = ", ".join(peer[-6:] for peer in refused)
            raise NoRoute(f"{error.message}: {named} announced them but can't be reached") from None
        await self._view.refresh()
        try:
            self.plan(LayerRange(0, self._profile.num_layers), {})
        except NoRoute:
            raise explained(error, self._view.announcements(), self._profile) from None

    def plan(self, layers: LayerRange, refused: dict[PeerId, SwarmError]) -> tuple[Hop, ...]:
        """The best hops over ``layers``; of near-equals each session takes others, which spreads the load."""
        transcript, profile = self.transcript, self._profile
        demand = Demand(
            tokens=transcript.stop_at,
            prompt_tokens=len(transcript),
            new_tokens=max(1, transcript.stop_at - len(transcript)),
            activation_bytes=profile.hidden_size * ITEM_BYTES[profile.dtype],
            chunk_tokens=self.settings.engine.prefill_chunk_tokens,
        )
        knowledge = known(
            self._view,
            self._health,
            _now(),
            self.settings.planner,
            before=next(
                (c.hop.peer.peer_id for c in reversed(self.controls) if c.hop.layers.end <= layers.start), None
            ),
            after=next((c.hop.peer.peer_id for c in self.controls if c.hop.layers.start >= layers.end), None),
            seed=self._seed,
        )
        held = self._health.prefixes.held(self._prefix(len(transcript)))
        found = plan(
            [reckoned(a, held.get(a.peer.peer_id, 0), demand.prompt_tokens) for a in self._view.announcements()],
            layers,
            demand,
            knowledge,
            ring=len(layers) == profile.num_layers,
            excluded=frozenset(refused),
        )
        return tuple(planned.hop for planned in found.hops)

    def _prefix(self, end: int) -> bytes:
        """Names the tokens before ``end``, for stages that may use what they computed of them again."""
        if not self.transcript.reusable:
            return b""
        return self._health.prefixes.chain(self._profile.model_id, self.transcript.tokens[:end])

    async def refresh_view(self) -> None:
        await self._view.refresh()

    async def _assemble(self, refused: dict[PeerId, SwarmError]) -> None:
        """Dial new hops wherever layers have none; ``controls`` then cover the model in order."""
        hops, self._returning = self._returning, []
        reached = 0
        ends = sorted([c.hop.layers for c in self.controls] + [hop.layers for hop in hops])
        for layers in [*ends, None]:
            start = layers.start if layers else self._profile.num_layers
            if start > reached:
                hops += self.plan(LayerRange(reached, start), refused)
            reached = layers.end if layers else reached
        dialled = await asyncio.gather(*(self.dial(hop) for hop in hops), return_exceptions=True)
        failures: list[tuple[Hop, SwarmError]] = []
        for hop, result in zip(hops, dialled, strict=True):
            if isinstance(result, HopControl):
                self.controls.append(result)
            elif isinstance(result, SwarmError):
                failures.append((hop, result))
            else:
                raise result
        self.controls.sort(key=lambda control: control.hop.layers)
        for hop, error in failures:
            self.blame(hop, error)
            refused[hop.peer.peer_id] = error
        if failures:
            await self._assemble(refused)

    async def dial(self, hop: Hop) -> HopControl:
        return await HopControl.dial(hop, self._transport, self.settings, self._hear, self._tasks)

    def _hear(self, control: HopControl, event: Event) -> None:
        self.events.put_nowait((control, event))

    async def _open_all(self) -> None:
        """Open every hop in the new epoch; tokens that were still on their way are committed first."""
        keep = self.transcript.kept
        await self._all([self._open(index, keep) for index in range(len(self.controls))])
        # A stage without a log of what its successor lacks has to compute it again, so it forgets it.
        for index in range(len(self.controls) - 1, 0, -1):
            control, before = self.controls[index], self.controls[index - 1]
            if before.log_start > control.have and before.have > control.have:
                await self._all([self._open(index - 1, control.have)])
                before.came_with = min(before.came_with or 0, before.have)
        while not self.events.empty():
            control, event = self.events.get_nowait()
            if isinstance(event, pb.Output) and control is self.controls[-1]:
                try:
                    self.transcript.commit(event)
                except ProtocolError as error:
                    raise HopLost(control, error) from None
            elif isinstance(event, SwarmError) and control in self.controls:
                raise HopLost(control, event)

    async def _open(self, index: int, keep: int) -> None:
        control, previous = self.controls[index], self.controls[index - 1]  # the first one's is the last: the ring
        keep = min(keep, control.agreed)
        if control.came_with is None:
            keep = min(keep, self.transcript.unchanged)
        try:
            message = self.open_message(control.hop, previous.hop, self.epoch, keep)
            if control.came_with is None:
                message.prefix = self._prefix(keep - 1)  # one position has to be run to sample after it
            await control.open(message)
            control.agreed = self.transcript.stop_at
        except SwarmError as error:
            raise HopLost(control, error) from None

    async def _all(self, actions: Iterable[Awaitable[None]]) -> None:
        results = await asyncio.gather(*actions, return_exceptions=True)
        problems = [result for result in results if result is not None]
        for problem in problems[1:]:
            if isinstance(problem, HopLost):
                await self.bury(problem)
        if problems:
            raise problems[0]

    def open_message(self, hop: Hop, previous: Hop, epoch: int, keep: int) -> pb.Open:
        message = pb.Open(
            session=self._session_id,
            epoch=epoch,
            model=self._profile.model_id,
            start=hop.layers.start,
            end=hop.layers.end,
            max_positions=self.transcript.stop_at,
            keep=keep,
            previous=[previous.peer.peer_id],
        )
        self.transcript.describe(message, last=hop.layers.end == self._profile.num_layers)
        return message

    async def _start_all(self) -> None:
        controls = self.controls
        for control, following in itertools.pairwise(controls):
            await self._start(control, [self.target(following, following.have)])
        await self._start(controls[-1], self._targets_of_last())
        await self._feed(controls[0], controls[0].have)

    def _targets_of_last(self) -> list[pb.Target]:
        controls, known = self.controls, len(self.transcript)
        if self.transcript.step is not None:
            return [pb.Target(epoch=self.epoch)]
        # Tokens that some stage computed already may reach the last stage before the first has caught up: such a
        # token comes to the owner only, who feeds it in order. Later ones go round the ring.
        ahead = max(control.have for control in controls if control is not controls[0] or len(controls) == 1)
        self._ring_from = max(known - 1, ahead)
        return [pb.Target(epoch=self.epoch, forward_from=known - 1), self.target(controls[0], self._ring_from)]

    def target(self, control: HopControl, forward_from: int, epoch: int | None = None) -> pb.Target:
        return pb.Target(
            epoch=epoch or self.epoch,
            peer=address_to_wire(control.hop.peer),
            forward_from=forward_from,
            layer=control.hop.layers.start,
        )

    async def _start(self, control: HopControl, targets: list[pb.Target]) -> None:
        try:
            await control.start(self.epoch, targets)
        except SwarmError as error:
            raise HopLost(control, error) from None

    async def _feed(self, control: HopControl, start: int) -> None:
        try:
            if start < len(self.transcript):
                await control.input(self.epoch, start, self.transcript.tokens[start:], self.transcript.step)
        except SwarmError as error:
            raise HopLost(control, error) from None

    async def feed_from(self, known: int) -> None:
        """Tokens were committed at ``known`` and after: give the first hop those that don't come round the ring."""
        if known <= self._ring_from:
            await self._feed(self.controls[0], known)

    async def feed_step(self, start: int, *, rewound: bool) -> None:
        """Step mode: inputs from ``start`` on are new; ``rewound``: stages hold others there. Raises ``HopLost``."""
        if rewound:
            # What we feed the successors of the first hop is gone; its next heartbeat begins another handover.
            self._stop_handovers(self.controls[0])
            warming = [control for handover, _ in self._handovers.values() for control in handover.fresh]
            for control in [*self.controls, *warming]:
                control.have = min(control.have, start)
            for control in warming:  # they may take long to come to this input
                control.agreed = min(control.agreed, start)
        await self._feed(self.controls[0], start)

    def praise(self) -> None:
        for control in self.controls:
            self._health.succeeded(control.hop.peer.peer_id, _now())

    async def bury(self, loss: HopLost) -> str:
        """Take lost hops off the route and remember why; losses through our own daemon's death are forgiven."""
        if self.complete:
            self.complete, self._lost_at = False, _now()
        if isinstance(loss.error, StreamLost):
            await asyncio.sleep(SETTLE_S)
        dead = [c for c in self.controls if c is loss.control or c.lost is not None]
        self.controls = [c for c in self.controls if c not in dead]
        generation = await self._transport.ready()
        for control in dead:
            error = loss.error if control is loss.control else control.lost or loss.error
            control.abort()
            if generation != control.generation and isinstance(error, StreamLost):
                self._returning.append(control.hop)
            else:
                self.blame(control.hop, error)
        self._lost += [control.hop for control in dead]
        names = ", ".join(f"{c.hop.peer.peer_id[-6:]} [{c.hop.layers}]" for c in dead)
        logger.info("session %s lost %s: %s", self._session_id[:8], names, loss.error)
        return f"lost {names}: {loss.error}"

    def blame(self, hop: Hop, error: SwarmError) -> None:
        self._health.failed(hop.peer.peer_id, error.code, _now())

    # ---- planned leaves ---------------------------------------------------------------------------------

    def prepare_handover(self, leaving: HopControl, token_s: float) -> None:
        """Warm successors for ``leaving`` while the route goes on; once for each hop of this route."""
        if leaving not in self._handovers:
            handover = Handover(self, leaving, token_s)
            self._handovers[leaving] = handover, self._tasks.create_task(handover.run())

    def is_due(self, handover: Handover) -> bool:
        """False for one that was overtaken by a rebuild."""
        return any(handover is known for known, _ in self._handovers.values())

    async def replace(self, handover: Handover) -> str:
        """Put the warm successors into the leaving hop's place; :meth:`establish` makes it the route."""
        leaving = handover.leaving
        self.complete, self._lost_at, self._lost = False, _now(), [leaving.hop]
        index = self.controls.index(leaving)
        self.controls[index : index + 1] = handover.take()
        await leaving.close()
        return f"peer {leaving.hop.peer.peer_id[-6:]} is leaving"

    def _stop_handovers(self, leaving: HopControl | None = None) -> None:
        """All of them, or that of one hop."""
        for hop in [leaving] if leaving else list(self._handovers):
            if hop in self._handovers:
                handover, task = self._handovers.pop(hop)
                task.cancel()
                handover.abort()


def _now() -> float:
    return asyncio.get_running_loop().time()
