"""The owner's end of one control stream: one hop of one session."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator

from swarm import protocol_pb2 as pb
from swarm.config import Settings, TimeoutSettings
from swarm.errors import DeadlineExceeded, ProtocolError, StreamLost, SwarmError
from swarm.protocol import decode, error_from_wire
from swarm.transport import CONTROL, Stream, Transport
from swarm.types import Hop

Event = pb.Output | pb.Status | pb.Error | SwarmError
"""What a hop says; an exception is the last thing that it says."""

MOST_HEARTBEAT_S = 10.0
"""A peer that beats more rarely counts as silent meanwhile, whatever it said."""

Listener = Callable[["HopControl", Event], None]


def expected_heartbeat_s(told_s: float, timeouts: TimeoutSettings) -> float:
    """Of a peer that says that it beats so often: its settings need not be ours. What we expect of ours, if that is
    longer."""
    return max(timeouts.heartbeat_s, min(told_s, MOST_HEARTBEAT_S))


class HopLost(Exception):
    """A hop of the route has to be replaced; ``accuser``: the other hop that says so, if it was not noticed here."""

    def __init__(self, control: HopControl, error: SwarmError, accuser: HopControl | None = None) -> None:
        super().__init__(str(error))
        self.control, self.error, self.accuser = control, error, accuser


class HopControl:
    """Opens and steers a stage. Outputs, errors and heartbeats that tell of a leave go to ``listener``, in order."""

    def __init__(self, hop: Hop, stream: Stream, settings: Settings, listener: Listener, generation: int) -> None:
        self.hop = hop
        self.have = 0
        """Positions that the stage holds, as it said last."""
        self.came_with: int | None = None
        """Positions that it held when it was opened for the first time."""
        self.agreed = sys.maxsize
        """Before this position the stage can't hold other tokens than the owner's."""
        self.log_start = 0
        self.computed = 0
        self.computing = False
        self.draining = False
        self.targets: list[pb.Target] = []
        self.lost: SwarmError | None = None
        self.generation = generation
        """Of the own transport when the stream was opened."""
        self.last_heard = self.moved_at = self.gained_at = _now()
        """When it last said anything, that it got on, and that it had more positions."""
        self.unheard_bytes = 0
        """Of what went to the listener and was not looked at yet, see ``swarm.events``."""
        self._stream = stream
        self._settings = settings
        self._heartbeat_s = settings.timeouts.heartbeat_s
        self._listener = listener
        self._opened: asyncio.Future[pb.Opened] | None = None
        self._fetched: asyncio.Future[pb.Fetched] | None = None
        self._fetches = 0
        self._opening = 0
        """The epoch that was asked for last."""
        self._reader: asyncio.Task[None] | None = None
        self._stage_told = asyncio.Event()
        """Set when the peer says how its stage is, or that there is none."""

    @classmethod
    async def dial(
        cls, hop: Hop, transport: Transport, settings: Settings, listener: Listener, tasks: asyncio.TaskGroup
    ) -> HopControl:
        """Raises ``Unreachable`` within ``timeouts.connect_s``."""
        generation = await transport.ready()
        stream = await transport.open(hop.peer, CONTROL)
        control = cls(hop, stream, settings, listener, generation)
        control._reader = tasks.create_task(control._read())
        return control

    async def open(self, request: pb.Open, pass_s: float = 0.0) -> None:
        """Open the stage, or move it to a newer epoch; sets ``have``. ``pass_s``: what the stage may have to end first
        should take so long at most. Raises what the peer answers, or ``PeerLost``."""
        if self.lost is not None:
            raise self.lost
        self._opened, self._opening = asyncio.get_running_loop().create_future(), request.epoch
        try:
            await self._send(pb.ControlRequest(open=request))
            opened = await self._answer(self._opened, pass_s)
        finally:
            self._opened.cancel()  # nobody waits for it any more
            if not self._opened.cancelled():
                self._opened.exception()  # nor misses what became of it meanwhile
            self._opened = None
        if opened.epoch != request.epoch or opened.have > request.keep:
            raise ProtocolError(f"opened epoch {opened.epoch} with {opened.have} positions, not as asked")
        self.have, self.log_start = opened.have, opened.log_start
        self._heartbeat_s = expected_heartbeat_s(opened.heartbeat_s, self._settings.timeouts)
        if self.came_with is None:
            self.came_with = opened.have
        self.targets = []

    async def _answer(self, opened: asyncio.Future[pb.Opened], pass_s: float) -> pb.Opened:
        """A peer that has a step to end first beats meanwhile, and has the time for that which it has at any other
        time. One that froze is lost as soon, too.

        Counted in waits that brought nothing, and not on the clock: while this process stood still nobody was silent,
        nor late.
        """
        timeouts, misses, began = self._settings.timeouts, 0, _now()
        step_s = max(timeouts.open_s, timeouts.step_slow_factor * pass_s)
        while misses < timeouts.heartbeat_misses:
            self._hear_arriving()
            heard_at = self.last_heard
            asked_at = _now()
            if (await asyncio.wait((opened,), timeout=self._heartbeat_s))[0]:
                return opened.result()
            began += _now() - asked_at - self._heartbeat_s
            self._check_answer(began, "open", step_s if self.computing else timeouts.open_s)
            misses = misses + 1 if self.last_heard == heard_at else 0
        raise DeadlineExceeded(f"no answer to open, and no heartbeat for {misses * self._heartbeat_s:.1f} s")

    def _check_answer(self, began: float, question: str, allowed_s: float) -> None:
        """Raises ``DeadlineExceeded`` for one that is late and not on its way, nor behind what is; or that comes in
        drops, without end."""
        self._hear_arriving()
        timeouts, now = self._settings.timeouts, _now()
        if now - max(began, self._stream.arrived_at) > allowed_s or now - began > timeouts.session_idle_s:
            raise DeadlineExceeded(f"no answer to {question} within {now - began:.0f} s")

    async def start(self, epoch: int, targets: list[pb.Target]) -> None:
        self.targets = targets
        await self._send(pb.ControlRequest(start=pb.Start(epoch=epoch, targets=targets)))

    async def input(self, epoch: int, start: int, token_ids: list[int], step: pb.Step | None) -> None:
        await self._send(pb.ControlRequest(input=pb.Input(epoch=epoch, start=start, token_ids=token_ids, step=step)))

    async def fetch(self, start: int, end: int) -> pb.Fetched:
        """Outputs out of the stage's checkpoint log, if it has them. One after the other. Raises ``PeerLost``, or
        what the peer's last words were."""
        if self.lost is not None:
            raise self.lost
        self._fetches += 1
        fetched: asyncio.Future[pb.Fetched] = asyncio.get_running_loop().create_future()
        self._fetched = fetched
        try:
            await self._send(pb.ControlRequest(fetch=pb.Fetch(number=self._fetches, start=start, end=end)))
            began = asked_at = _now()
            while not (await asyncio.wait((fetched,), timeout=self._settings.timeouts.heartbeat_s))[0]:
                began += _now() - asked_at - self._settings.timeouts.heartbeat_s  # while this process stood still
                asked_at = _now()
                self._check_answer(began, "fetch", self._settings.timeouts.open_s)
            return fetched.result()
        finally:
            self._fetched = None

    async def ping(self) -> None:
        """Ask for a ``Status`` out of turn."""
        await self._send(pb.ControlRequest(ping=True))

    async def hear_of_stage(self) -> None:
        """Until the peer has said whether it still has the stage, for ``heartbeat_misses`` heartbeats at most;
        :attr:`lost` tells."""
        self._stage_told.clear()
        with contextlib.suppress(SwarmError, TimeoutError):
            async with asyncio.timeout(self._heartbeat_s * self._settings.timeouts.heartbeat_misses):
                await self.ping()
                await self._stage_told.wait()

    async def close(self, prefix: bytes = b"") -> None:
        """Free the stage, which may keep what ``prefix`` names. Never raises, never waits long."""
        if self.lost is None:
            if prefix:  # if it doesn't get there, nothing but time is lost
                self._stream.try_send(pb.ControlRequest(finish=pb.Finish(prefix=prefix)).SerializeToString())
            self.lost = StreamLost("closed")
            await self._stream.close()
        else:
            self._stream.abort()
        self._end()

    def abort(self, reason: SwarmError | None = None) -> None:
        """Give the peer up; what it still says is not heard."""
        if self.lost is None:
            self.lost = reason or StreamLost("given up")
        self._stream.abort()
        self._end()

    def _hear_arriving(self) -> None:
        """Heartbeats wait behind an answer that is on its way: on a narrow line, the logits of many rows take long."""
        self.last_heard = max(self.last_heard, self._stream.arrived_at)
        self.moved_at = max(self.moved_at, self._stream.arrived_at)

    def is_heard(self) -> bool:
        """Its stream lasts, and not two heartbeats in a row are missing."""
        self._hear_arriving()
        silent_s = _now() - self.last_heard
        return self.lost is None and silent_s < 2 * self._heartbeat_s

    def check_heard(self) -> None:
        """Raises ``DeadlineExceeded`` after ``heartbeat_misses`` heartbeats of silence."""
        self._hear_arriving()
        silent_s = _now() - self.last_heard
        if silent_s > self._heartbeat_s * self._settings.timeouts.heartbeat_misses:
            raise DeadlineExceeded(f"no heartbeat for {silent_s:.1f} s")

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """A :class:`SwarmError` within is this hop's fault: it leaves as ``HopLost``."""
        try:
            yield
        except SwarmError as error:
            raise HopLost(self, error) from None

    def _end(self) -> None:
        if self._fetched is not None and not self._fetched.done() and self.lost is not None:
            self._fetched.set_exception(self.lost)
        if self._reader is not None:
            self._reader.cancel()

    async def _send(self, request: pb.ControlRequest) -> None:
        if self.lost is not None:
            raise self.lost
        await self._stream.send(request.SerializeToString())

    async def _read(self) -> None:
        try:
            while (frame := await self._stream.receive()) is not None:
                self.last_heard = _now()
                self._hear(decode(pb.ControlReply, frame))
            self._finish(StreamLost("the peer ended the session"))
        except SwarmError as error:
            self._finish(error)

    def _hear(self, reply: pb.ControlReply) -> None:
        kind = reply.WhichOneof("kind")
        if kind == "opened":
            # An older epoch's is the answer to an open that was given up.
            if self._opened is not None and not self._opened.done() and reply.opened.epoch >= self._opening:
                self._opened.set_result(reply.opened)
        elif kind == "fetched":
            if self._fetched is not None and not self._fetched.done() and reply.fetched.number == self._fetches:
                self._fetched.set_result(reply.fetched)
        elif kind == "output":
            self._listener(self, reply.output)
        elif kind == "status":
            # of an older epoch it may tell of rows that the newest open took back
            if reply.status.epoch >= self._opening and reply.status.have > self.have:
                self.have, self.gained_at = reply.status.have, self.last_heard
            if reply.status.computed != self.computed:
                self.computed, self.moved_at = reply.status.computed, self.last_heard
            self.computing, self.draining = reply.status.computing, reply.status.draining
            self._stage_told.set()
            if self.draining:  # the rest is known here; a flood of it need not be kept
                self._listener(self, reply.status)
        elif reply.error.epoch == 0:  # of no epoch: the peer's last words
            self._finish(error_from_wire(reply.error))
        elif self._opened is not None and not self._opened.done() and reply.error.epoch >= self._opening:
            self._opened.set_exception(error_from_wire(reply.error))
        else:  # also what went wrong in an older epoch, and crossed the open on its way
            self._listener(self, reply.error)

    def _finish(self, error: SwarmError) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self._stage_told.set()
        if self._fetched is not None and not self._fetched.done():
            self._fetched.set_exception(error)
        if self._opened is not None and not self._opened.done():
            self._opened.set_exception(error)
        else:
            self._listener(self, error)


def _now() -> float:
    return asyncio.get_running_loop().time()
