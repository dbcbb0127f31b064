"""The hops of one session: planned, opened, started, mended.

Opening a route and rebuilding it are the same procedure, :meth:`Chain.establish`:

1. plan hops for every range of layers that has no living stage (at first: all of them);
2. send ``Open`` with a new epoch to all hops, new and surviving; each truncates to the committed length and
   answers how many positions it ``have``;
3. send ``Start``: each hop learns its targets and the first position whose output each of them lacks, and
   replays that from its checkpoint log;
4. feed the token ids that the first hop lacks.

Which peers they are is up to ``hop_planner.py``; what they are told in 2 and 3 is written in ``opener.py``. A peer that
leaves is replaced before it goes, see ``handover.py``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random

from swarm import protocol_pb2 as pb
from swarm.accusations import Accusations
from swarm.awake import Standstills
from swarm.config import Settings
from swarm.control import HopControl, HopLost
from swarm.coverage import coverage_of
from swarm.errors import Busy, Evicted, NoRoute, StreamLost, SwarmError, Unreachable
from swarm.events import Events
from swarm.handover import Handover
from swarm.health import Health
from swarm.hop_planner import HopPlanner
from swarm.knowledge import View
from swarm.models import ModelProfile
from swarm.opener import Opener
from swarm.prefix import Prefixes, SessionPrefix
from swarm.rebuilds import RETRY_FIRST_S, RETRY_MOST_S, Rebuild
from swarm.rivals import Rivals
from swarm.transcript import Tokens
from swarm.transport import Transport
from swarm.types import Hop, LayerRange, PeerId, Route, SessionId

logger = logging.getLogger(__name__)

CROWD_S = 1.0
"""Of sessions that come at once each may be refused by some peer, for the room that others take which are refused by
another: so long a new one asks again, and holds nothing meanwhile."""
SETTLE_S = 0.02
"""After a stream is lost: time for others that were lost by the same accident to show it too."""


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
        prefixes: Prefixes,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._prefix = SessionPrefix(prefixes, profile.model_id, transcript)
        self.planner = HopPlanner(session_id, transcript, self._prefix, view, profile, settings, health)
        self.opener = Opener(session_id, transcript, self._prefix, profile, self.planner.pass_s)
        self.transcript = transcript
        self.settings = settings
        self.controls: list[HopControl] = []
        self.events = Events()
        """What the hops say."""
        self.epoch = 0
        self.next_epoch = itertools.count(1).__next__
        self.complete = False
        self.settled = 0
        """Step mode: the epoch in which an answer has come through all hops, so that none of them replays any more."""
        self.stale = False
        """Step mode: the hops have to be told of the inputs by :meth:`reopen`."""
        self.rebuilds: list[Rebuild] = []
        self.reused = 0
        """Tokens of the prompt that every stage had from an earlier session when this one was opened."""
        self._name = session_id[:8]
        self._jitter = random.Random(session_id)
        """So that sessions that wait for the same peer don't ask in step."""
        self._profile = profile
        self._transport = transport
        self._tasks = tasks
        self._lost: list[Hop] = []
        self._lost_at = 0.0
        self._refused: dict[PeerId, SwarmError] = {}
        """Peers that failed since the route was last complete: not tried again while others have their layers."""
        self._accusations = Accusations()
        self._returning: list[Hop] = []
        """Hops whose stages wait for us to come back: they were lost when our own daemon died."""
        self._ring_from = 0
        """Outputs at this position and later go round the ring; earlier ones are fed by the owner."""
        self._handovers: dict[HopControl, tuple[Handover, asyncio.Task[None]]] = {}

    @property
    def hops(self) -> tuple[Hop, ...]:
        """In order; they leave some layers out while the chain is not complete."""
        return tuple(control.hop for control in self.controls)

    @property
    def route(self) -> Route:
        return Route(self.hops)

    async def close(self) -> None:
        """Free every stage."""
        self._stop_handovers()
        if self.complete:
            self._prefix.remember(self.route)
        prefix = self._prefix.name()
        for control in self.controls:  # at once, and not in tasks: who ends a session twice would cancel those
            await control.close(prefix)

    async def release(self) -> None:
        """Free every stage, and have :meth:`establish` open them all anew."""
        self._interrupt()
        await self.close()
        self.controls = []

    def _interrupt(self) -> None:
        """The route is no longer complete; how long it is not counts from the first loss. Handovers are part of it."""
        self._stop_handovers()
        if self.complete:
            self.complete, self._lost_at = False, _now()

    # ---- opening and mending ----------------------------------------------------------------------------

    async def establish(self, reason: str) -> None:
        """Bring the session onto a complete route, however many attempts that takes within ``recovery.wait_s``."""
        with Standstills() as standstills:
            await self._establish(reason, standstills)

    async def _establish(self, reason: str, standstills: Standstills) -> None:
        first, wire = reason == "opened", self.transcript.wire
        survivors, pause = set(self.controls), RETRY_FIRST_S
        deadline, crowd_until = _now() + self.settings.recovery.wait_s, _now() + CROWD_S
        while True:
            self.epoch = self.next_epoch()
            keep = self.transcript.kept
            if first and self.transcript.wire != wire:  # an attempt that failed left its cuts, and rows rounded there
                await self.release()
                self.transcript.wire = wire
            try:
                await self._assemble()
                self.transcript.wire = self.transcript.wire.cut_at(hop.layers.start for hop in self.hops)
                await self._open_and_start()
                break
            except HopLost as loss:
                await self.bury(loss)
            except NoRoute as error:
                stood_s = standstills.take()  # then peers may have given us up, and are not to blame
                deadline, crowd_until = deadline + stood_s, crowd_until + stood_s
                no_room = (Busy, Evicted) if first else Busy  # one that runs may find its stage's room again
                full = next((refusal for refusal in self._refused.values() if isinstance(refusal, no_room)), None)
                if first and not stood_s and (full is None or _now() > crowd_until):
                    await self.planner.explain(error, self._refused)
                if _now() > deadline:
                    wait_s = self.settings.recovery.wait_s
                    if full is not None:
                        raise Busy(f"{full.message}, and nobody had room within {wait_s:.0f} s") from None
                    raise NoRoute(f"{error.message}, and nobody came within {wait_s:.0f} s") from None
                if not first and pause == 2 * RETRY_FIRST_S:  # a moment ago a spare may just not have been in the view
                    self._tell_of_wait(full or error, deadline)
                if full is not None:
                    # Sessions that wait for room hold none: else two might wait for each other.
                    await self.release()
                await asyncio.sleep(pause * self._jitter.uniform(0.5, 1.0))
                pause = min(2 * pause, RETRY_MOST_S)
                self._refused.clear()
                await self._transport.ready()
                await self.planner.refresh()
        self.complete = True
        self._refused.clear()
        if first:
            self.reused = min(control.came_with or 0 for control in self.controls)
        else:
            self._record(reason, keep, survivors)

    async def reopen(self) -> None:
        """Bring all hops into a new epoch. Raises ``HopLost``."""
        self._stop_handovers()
        self.epoch = self.next_epoch()
        await self._open_and_start()

    def _tell_of_wait(self, problem: SwarmError, deadline: float) -> None:
        left_s, told = max(0.0, deadline - _now()), problem.message
        if isinstance(problem, NoRoute):
            told += f"; {coverage_of([hop.layers for hop in self.hops], self._profile).remedy()}"
        logger.warning("session %s waits up to %.0f s: %s", self._name, left_s, told)

    async def _assemble(self) -> None:
        """Dial new hops wherever layers have none; ``controls`` then cover the model in order. Raises ``NoRoute``."""
        returning, self._returning = self._returning, []
        returned = await asyncio.gather(*(self._return(hop) for hop in returning), return_exceptions=True)
        for hop, problem in zip(returning, returned, strict=True):
            if isinstance(problem, SwarmError):
                self._refuse(hop, problem)
            elif problem is not None:
                raise problem
        reached = await asyncio.gather(*(self._reach(layers) for layers in self.gaps()), return_exceptions=True)
        for problem in reached:
            if problem is not None:
                raise problem

    def gaps(self) -> list[LayerRange]:
        """Layers that no hop has."""
        ends = [0, *(control.hop.layers.end for control in self.controls)]
        starts = [*(control.hop.layers.start for control in self.controls), self._profile.num_layers]
        return [LayerRange(end, start) for end, start in zip(sorted(ends), sorted(starts), strict=True) if end < start]

    async def _return(self, hop: Hop) -> None:
        self._add(await self.dial(hop))

    async def _reach(self, layers: LayerRange) -> None:
        def plan(silent: set[PeerId]) -> tuple[Hop, ...]:
            return self.planner.plan(layers, self._refused.keys() | silent, self.hops)

        self._add(*await Rivals(plan, self.dial, self._refuse).reach())

    def _add(self, *controls: HopControl) -> None:
        """At once, whatever becomes of the others that are dialled: from now on :meth:`close` closes them."""
        self.controls = sorted([*self.controls, *controls], key=_layers)

    def _refuse(self, hop: Hop, error: SwarmError) -> None:
        self.planner.blame(hop, error)
        self._refused[hop.peer.peer_id] = error
        logger.info("session %s can't reach %s [%s]: %s", self._name, hop.peer.peer_id[-6:], hop.layers, error)

    async def dial(self, hop: Hop) -> HopControl:
        """Raises ``Unreachable``; not for what was the death of our own daemon."""
        generation = await self._transport.ready()
        try:
            return await self._dial(hop)
        except Unreachable:
            if await self._transport.ready() == generation:
                raise
            return await self._dial(hop)

    async def _dial(self, hop: Hop) -> HopControl:
        return await HopControl.dial(hop, self._transport, self.settings, self.events.put, self._tasks)

    async def _open_and_start(self) -> None:
        """Raises ``HopLost``."""
        known, self.stale = len(self.transcript), False
        await self.opener.open(self.controls, self.epoch)
        self._commit_what_came()
        if self.transcript.finish_reason is None:
            if len(self.transcript) > known:
                await self.opener.tell_last(self.controls, self.epoch)
            self._ring_from = await self.opener.start(self.controls, self.epoch)
            await self._feed(self.controls[0].have)

    def _commit_what_came(self) -> None:
        """Tokens that were still on their way when the route was interrupted.

        What a hop says is wrong in this very epoch, such as that it has no more room, stays to be heard.
        """
        for control, event in self.events.waiting():
            if isinstance(event, pb.Output) and control is self.controls[-1]:
                with control.blamed():
                    self.transcript.commit(event)
            elif isinstance(event, SwarmError) and control in self.controls:
                raise HopLost(control, event)
            elif isinstance(event, pb.Error) and event.epoch >= self.epoch:
                self.events.put(control, event)

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

    async def bury(self, loss: HopLost) -> str:
        """Take lost hops off the route and remember why; losses through our own daemon's death are forgiven."""
        self._interrupt()
        if isinstance(loss.error, StreamLost) or loss.accuser is not None:
            await asyncio.sleep(SETTLE_S)
        if loss.accuser is not None and isinstance(loss.error, Evicted):
            await loss.control.hear_of_stage()  # it knows best; an accuser who is right is remembered for no accusation
        guilty = self._guilty(loss)
        dead = [c for c in self.controls if c is guilty or c.lost is not None]
        self.controls = [c for c in self.controls if c not in dead]
        errors = {control: loss.error if control is guilty else control.lost or loss.error for control in dead}
        for control in dead:
            control.abort()
        generation = await self._transport.ready()
        for control, error in errors.items():
            if generation != control.generation and isinstance(error, StreamLost):
                self._returning.append(control.hop)
            else:
                self.planner.blame(control.hop, error)
                self._refused[control.hop.peer.peer_id] = error
        self._lost += [control.hop for control in dead]
        names = ", ".join(f"{c.hop.peer.peer_id[-6:]} [{c.hop.layers}]" for c in dead)
        logger.info("session %s lost %s: %s", self._name, names, loss.error)
        return f"lost {names}: {loss.error}"

    def _guilty(self, loss: HopLost) -> HopControl:
        accused, accuser = loss.control, loss.accuser
        if accuser is None:
            return accused
        heard = accused.is_heard()
        believed = self._accusations.believed(accuser.hop.peer.peer_id, accused.hop.peer.peer_id, heard=heard)
        return accused if believed else accuser

    def praise(self) -> None:
        for control in self.controls:
            self.planner.praise(control.hop)

    # ---- inputs -----------------------------------------------------------------------------------------

    async def feed_from(self, known: int) -> None:
        """Tokens were committed at ``known`` and after: give the first hop those that don't come round the ring."""
        if known <= self._ring_from:
            await self._feed(known)

    async def feed_step(self, start: int, *, rewound: bool) -> None:
        """Step mode: inputs from ``start`` on are new; ``rewound``: stages hold others there. Raises ``HopLost``."""
        if self.stale or (rewound and self.settled != self.epoch):
            # A hop may still be replaying what its target has already, the inputs that are replaced among it, and the
            # replacement may overtake that: then nobody would tell the target. A new epoch tells everybody.
            self.stale = True
            return
        if rewound:
            # What we feed the successors of the first hop is gone; its next heartbeat begins another handover.
            self._stop_handovers(self.controls[0])
            warming = [control for handover, _ in self._handovers.values() for control in handover.fresh]
            for control in [*self.controls, *warming]:
                control.have = min(control.have, start)
            for control in warming:  # they may take long to come to this input
                control.agreed = min(control.agreed, start)
        await self._feed(start)

    async def _feed(self, start: int) -> None:
        if start < len(self.transcript):
            control = self.controls[0]
            with control.blamed():
                await control.input(self.epoch, start, self.transcript.tokens[start:], self.transcript.step)

    # ---- planned leaves ---------------------------------------------------------------------------------

    def prepare_handover(self, leaving: HopControl, token_s: float) -> None:
        """Warm successors for ``leaving`` while the route goes on; once for each hop of this route."""
        if leaving not in self._handovers:
            handover = Handover(self, leaving, token_s)
            self._handovers[leaving] = handover, self._tasks.create_task(handover.run())

    def give_up_warming(self, peer: PeerId, error: SwarmError) -> None:
        """A successor that others can't reach; its handover looks for another."""
        for handover, _ in self._handovers.values():
            for control in handover.fresh:
                if control.hop.peer.peer_id == peer:
                    control.abort(error)

    def is_due(self, handover: Handover) -> bool:
        """False for one that was overtaken by a rebuild."""
        return any(handover is known for known, _ in self._handovers.values())

    async def replace(self, handover: Handover) -> str:
        """Put the warm successors into the leaving hop's place; :meth:`establish` makes it the route."""
        leaving, fresh = handover.leaving, handover.take()
        self._interrupt()
        self._lost = [leaving.hop]
        index = self.controls.index(leaving)
        self.controls[index : index + 1] = fresh
        await leaving.close()
        return f"peer {leaving.hop.peer.peer_id[-6:]} is leaving"

    def _stop_handovers(self, leaving: HopControl | None = None) -> None:
        """All of them, or that of one hop."""
        for hop in [leaving] if leaving else list(self._handovers):
            if hop in self._handovers:
                handover, task = self._handovers.pop(hop)
                task.cancel()
                handover.abort()


def _layers(control: HopControl) -> LayerRange:
    return control.hop.layers


def _now() -> float:
    return asyncio.get_running_loop().time()
