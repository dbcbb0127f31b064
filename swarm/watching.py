"""Listening to the hops of a chain: what the last one puts out, and who is lost, silent, stuck or about to leave."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections import deque
from dataclasses import dataclass, field

from swarm import protocol_pb2 as pb
from swarm.chain import Chain
from swarm.config import Settings
from swarm.control import Event, HopControl, HopLost
from swarm.errors import DeadlineExceeded, SwarmError
from swarm.handover import Handover
from swarm.protocol import error_from_wire
from swarm.types import PeerId


class HandoverReady(Exception):
    """The successors of a leaving hop are warm."""

    def __init__(self, handover: Handover) -> None:
        super().__init__("the successors of a leaving hop are warm")
        self.handover = handover


@dataclass(slots=True)
class _Pace:
    """Measured step times, for the step deadline."""

    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=32))

    @property
    def latest_s(self) -> float:
        return self.gaps[-1] if self.gaps else 0.05

    def deadline_s(self, settings: Settings) -> float:
        measured = statistics.median(self.gaps) if self.gaps else 0.0
        return max(settings.timeouts.step_floor_s, settings.timeouts.step_factor * measured)


class Watch:
    """Over ``chain``; :meth:`begin` after each :meth:`Chain.establish`, then :meth:`output` again and again."""

    def __init__(self, chain: Chain, settings: Settings) -> None:
        self._chain = chain
        self._settings = settings
        self._pace = _Pace()
        self._began = self._moved_at = self._checked = 0.0
        self._stepped = False
        """A step ended since :meth:`begin`; the first one has a prompt in it, or a replay, and tells of no other."""

    def begin(self) -> None:
        """The route is new: everybody is given their time from now on."""
        self._began = self._moved_at = self._checked = _now()
        self._stepped = False
        for control in self._chain.controls:
            control.last_heard = self._began

    def waiting(self) -> None:
        """Something was asked of the hops just now; the step deadline counts from here."""
        self._began = self._moved_at = _now()

    def moved(self) -> None:
        """A step came to its end."""
        if self._stepped:
            self._pace.gaps.append(_now() - self._moved_at)
        self._stepped = True
        self.waiting()

    async def output(self) -> pb.Output | None:
        """The last hop's next output; ``None`` after anything else, and after an eighth of a heartbeat of silence.

        Raises ``HopLost`` or ``HandoverReady`` when the route has to change.
        """
        chain, heartbeat_s = self._chain, self._settings.timeouts.heartbeat_s
        event: Event | Handover | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(heartbeat_s / 8):
                control, event = await chain.events.get()
        late = _now() - self._checked - heartbeat_s
        if late > 0:
            # This process itself stood still (a suspended laptop, a busy machine): nobody is to blame.
            self._began = _now()
            for silent in chain.controls:
                silent.last_heard += late
        self._checked = _now()
        if isinstance(event, pb.Output) and control is chain.controls[-1]:
            return event
        if event is not None:
            self._consider(control, event)
        return None

    def check(self, *, awaited: bool = True) -> None:
        """Raises ``HopLost`` for a hop that is silent or, if an output is ``awaited``, doesn't move."""
        self._check_silence()
        if awaited:
            self._check_progress()

    def _consider(self, control: HopControl, event: Event | Handover) -> None:
        """Anything but an output of the last hop."""
        if isinstance(event, Handover):
            if self._chain.is_due(event):
                raise HandoverReady(event)
            return
        if control not in self._chain.controls:
            if isinstance(event, pb.Error):  # of a successor that is warming up
                self._chain.give_up_warming(PeerId(event.peer_id) or control.hop.peer.peer_id, error_from_wire(event))
            return
        if isinstance(event, SwarmError):
            raise HopLost(control, event)
        if isinstance(event, pb.Error) and event.epoch >= self._chain.epoch:
            error = error_from_wire(event)
            blamed = self._blamed(control, event)
            if blamed is not None:
                raise HopLost(blamed, error, control if control is not blamed else None)
            self._chain.give_up_warming(PeerId(event.peer_id), error)
        if isinstance(event, pb.Status) and event.draining:
            self._chain.prepare_handover(control, self._pace.latest_s)

    def _check_silence(self) -> None:
        for control in self._chain.controls:
            with control.blamed():
                try:
                    control.check_heard()
                except DeadlineExceeded as error:
                    self._lose_with(control, error)
                    raise

    def _lose_with(self, lost: HopControl, error: DeadlineExceeded) -> None:
        """Who fell silent with it is lost by the same accident: the rebuild must not begin with asking them.

        Unless nobody is heard: then it may be our own network, and they may be there in a moment.
        """
        controls = self._chain.controls
        silent = [control for control in controls if not control.is_heard()]
        if len(silent) < len(controls):
            for control in silent:
                if control is not lost:
                    control.abort(error)

    def _check_progress(self) -> None:
        """A peer that beats but doesn't move is given the step deadline, and more while it computes: for a prompt, what
        follows from the announced speeds. To run steps of others before ours is to move, but not for ever: after
        ``session_idle_s`` without an output or a position more it no longer counts what they say."""
        timeouts, controls, tokens = self._settings.timeouts, self._chain.controls, len(self._chain.transcript)
        waited = _now() - max(self._began, *(control.moved_at for control in controls))
        allowed = self._pace.deadline_s(self._settings)
        if any(control.computing for control in controls):
            allowed *= timeouts.step_slow_factor
            if waited > allowed and tokens - min(control.have for control in controls) > 1:
                allowed = max(allowed, timeouts.step_slow_factor * self._chain.planner.pass_s(self._chain.hops))
        if waited <= allowed:
            waited, allowed = _now() - max(self._began, *(c.gained_at for c in controls)), timeouts.session_idle_s
        if waited <= allowed:
            return
        upstream = tokens
        for control in controls:
            if control.have < upstream:
                raise HopLost(control, DeadlineExceeded(f"no progress for {waited:.1f} s"))
            upstream = control.have
        raise HopLost(self._chain.controls[-1], DeadlineExceeded(f"no token for {waited:.1f} s"))

    def _blamed(self, reporter: HopControl, error: pb.Error) -> HopControl | None:
        """Whom an error is about: the hop that it names, or who reported it; None if what it names is not on the route,
        but perhaps about to be."""
        if not error.peer_id:
            return reporter
        return next((c for c in self._chain.controls if c.hop.peer.peer_id == error.peer_id), None)


def _now() -> float:
    return asyncio.get_running_loop().time()
