"""Frames between stages: from links to the stages that they are for, and from stages to links."""

from __future__ import annotations

import asyncio
import logging

from peers.link_prober import LinkProber
from peers.links import Links
from peers.stage import Stage
from peers.stage_input import MAX_SESSION_CHARS, NO_STEP, Work
from peers.stage_table import StageTable
from peers.step_answers import step_from_wire
from swarm import protocol_pb2 as pb
from swarm.awake import timeout_awake
from swarm.errors import Evicted, NotAllowed, ProtocolError, SwarmError
from swarm.knowledge import View
from swarm.protocol import cut_timings, decode, error_from_wire, error_to_wire, rows_from_wire
from swarm.transport import Stream, Transport
from swarm.types import PeerAddress, PeerId, SessionId
from swarm.wire import encoding_of, row_bytes

logger = logging.getLogger(__name__)


class FrameRouter:
    """What runners call :class:`peers.outside.Outside`. A frame to a stage of this very peer takes no network."""

    def __init__(self, transport: Transport, table: StageTable, tasks: asyncio.TaskGroup) -> None:
        self._transport = transport
        self._table = table
        timeouts = table.settings.timeouts
        self._links = Links(transport, tasks, timeouts, self._on_reply, self._on_lost, self._awaits)
        self._incoming: dict[PeerId, Stream] = {}
        """The newest link of each."""
        self._closed = False

    @property
    def local_id(self) -> PeerId:
        return self._transport.local.peer_id

    def try_to_peer(self, peer: PeerAddress, message: pb.LinkMessage) -> bool:
        if peer.peer_id != self.local_id:
            return self._links.try_send(peer, message)
        self._deliver(self.local_id, message.frame)
        return True

    async def reach(self, peer: PeerAddress) -> None:
        if peer.peer_id != self.local_id:
            await self._links.reach(peer)

    async def to_peer(self, peer: PeerAddress, message: pb.LinkMessage) -> None:
        if peer.peer_id == self.local_id:
            self._deliver(self.local_id, message.frame)
        else:
            await self._links.send(peer, message)

    def link_s(self, peer: PeerId) -> float:
        return self._links.one_way_s(peer)

    def frame_rows(self, peer: PeerId, row_bytes: int) -> int:
        here = self._table.settings.limits.max_frame_bytes // row_bytes
        return self._links.frame_rows(peer, row_bytes) if peer != self.local_id else here

    def carried(self, peer: PeerAddress) -> int:
        return self._links.carried(peer.peer_id)

    def prober(self, view: View) -> LinkProber:
        """Of the links from here."""
        executor = self._table.executor
        layers, num_layers = executor.layers, executor.profile.num_layers
        return LinkProber(self._links, view, self.local_id, layers, num_layers, self._table.settings)

    def acknowledge(self, sender: PeerId, ack: pb.Ack) -> None:
        if sender == self.local_id:
            self._on_reply(self.local_id, pb.LinkMessage(ack=ack))
        else:
            self._reply(sender, pb.LinkMessage(ack=ack))

    def _reply(self, peer: PeerId, message: pb.LinkMessage) -> None:
        stream = self._incoming.get(peer)
        if stream is not None and not stream.try_send(message.SerializeToString()):
            logger.info("%s takes no replies: its link is dropped", peer[-6:])
            stream.abort()  # who waited for it to take them would wait with ever more of them

    async def handle_link(self, stream: Stream) -> None:
        """Until its owner ends it, or is silent for so long that it should have; the next frame comes on a new one."""
        timeouts, clock = self._table.settings.timeouts, asyncio.get_running_loop().time
        if self._closed:
            stream.abort()  # else it would stay here, where no stage is any more, whatever this peer serves next
            return
        if (older := self._incoming.get(stream.remote)) is not None:
            older.abort()
        self._incoming[stream.remote] = stream
        try:
            async with timeout_awake(2 * timeouts.link_idle_s) as silence:
                heard_at = clock()
                while (frame := await stream.receive()) is not None:
                    if clock() - heard_at > timeouts.heartbeat_s:  # a frame makes no timer of its own
                        heard_at = clock()
                        silence.reschedule(heard_at + 2 * timeouts.link_idle_s)
                    message = decode(pb.LinkMessage, frame)
                    kind = message.WhichOneof("kind")
                    if kind == "ping":
                        await stream.send(pb.LinkMessage(pong=message.ping).SerializeToString())
                    elif kind == "frame":
                        self._deliver(stream.remote, message.frame)
                    else:
                        raise ProtocolError("a link carries frames and pings")
        except TimeoutError:
            logger.info("link from %s was silent and is closed", stream.remote[-6:])
        except SwarmError as error:
            logger.info("link from %s ended: %s", stream.remote[-6:], error)
        finally:
            if self._incoming.get(stream.remote) is stream:
                del self._incoming[stream.remote]

    def _deliver(self, sender: PeerId, frame: pb.Frame) -> None:
        """One frame to its stage. What is wrong with it concerns its session alone, never the link."""
        runner = self._table.runners.get((SessionId(frame.session), frame.layer))
        try:
            if runner is None:
                raise Evicted("no such stage here")
            runner.stage.check_sender(sender)  # before a look at the frame: a stranger's errors are no news
            work = self._to_work(runner.stage, sender, frame)
            runner.accept(work)
            if runner.stage.inbox:
                self._table.bound_waiting()
        except NotAllowed as error:
            self._refuse(sender, frame, error)
        except SwarmError as error:
            if runner is None:
                self._refuse(sender, frame, error)
            else:
                runner.owner.report(error, sender)

    def _to_work(self, stage: Stage, sender: PeerId, frame: pb.Frame) -> Work:
        profile = self._table.executor.profile
        hidden: bytes | None = None
        ids: tuple[int, ...] = ()
        rows = len(frame.token_ids)  # looked at only if they may be so many: a frame has room for millions
        if stage.first:
            if not 0 < rows <= stage.max_positions or frame.HasField("hidden"):
                raise ProtocolError(f"the first stage takes 1 to {stage.max_positions} token ids")
            ids = tuple(frame.token_ids)
            if max(ids) >= profile.vocab_size:
                raise ProtocolError("the first stage takes token ids of the vocabulary")
        else:
            if rows:
                raise ProtocolError("only the first stage takes token ids")
            width, encoding = profile.hidden_size, encoding_of(stage.input_wire, profile.dtype)
            hidden = rows_from_wire(frame.hidden, encoding, width, stage.max_positions)
            rows = len(hidden) // row_bytes(encoding, width)
        return Work(
            epoch=frame.epoch,
            start=frame.start,
            rows=rows,
            hidden=hidden,
            token_ids=ids,
            hops=cut_timings(frame.hops, stage.layers.start),  # so many hops there are before it at most
            sender=sender,
            sequence=frame.sequence,
            want_ack=frame.want_ack,
            draft=frame.draft,
            draft_start=frame.draft_start,
            step=step_from_wire(frame.step) if stage.step_mode else NO_STEP,
        )

    def _refuse(self, sender: PeerId, frame: pb.Frame, error: SwarmError) -> None:
        session = frame.session[:MAX_SESSION_CHARS]  # what a stranger calls one may be long
        refusal = pb.Refusal(session=session, epoch=frame.epoch, error=error_to_wire(error))
        if sender == self.local_id:
            self._on_reply(sender, pb.LinkMessage(refusal=refusal))
        else:
            self._reply(sender, pb.LinkMessage(refusal=refusal))

    def _on_reply(self, peer: PeerId, message: pb.LinkMessage) -> None:
        """Acks and refusals that come back on an outgoing link."""
        kind = message.WhichOneof("kind")
        if kind == "ack":
            for runner in self._table.of_session(message.ack.session):
                runner.acknowledged(peer, message.ack)
        elif kind == "refusal":
            refusal = message.refusal
            for runner in self._table.of_session(refusal.session):
                if refusal.epoch == runner.stage.epoch and _goes_on_at(peer, runner.stage):
                    runner.owner.report(error_from_wire(refusal.error), peer)
        else:
            raise ProtocolError("a link is answered with acks and refusals")

    def _on_lost(self, peer: PeerId, error: SwarmError) -> None:
        """The owners of all sessions that go on at ``peer`` hear at once that it can't be reached from here."""
        for runner in list(self._table.runners.values()):
            if _goes_on_at(peer, runner.stage):
                runner.owner.report(error, peer)

    def _awaits(self, peer: PeerId) -> bool:
        targets = (target for runner in self._table.runners.values() for target in runner.stage.targets)
        return any(target.unacked and target.peer is not None and target.peer.peer_id == peer for target in targets)

    async def aclose(self) -> None:
        self._closed = True
        for stream in list(self._incoming.values()):
            stream.abort()  # who sends again opens a new one, to whatever is served here then
        await self._links.aclose()


def _goes_on_at(peer: PeerId, stage: Stage) -> bool:
    return any(target.peer is not None and target.peer.peer_id == peer for target in stage.targets)
