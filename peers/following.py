"""The targets of one stage follow its outputs: the next stage, the first one, or the owner.

The checkpoint log is the buffer, so a slow target costs no memory, and a replacement is a target that begins further
back. The newest row goes out at once, in the callback that brought it, unless the link is congested. Everything else,
prefill with its window of unacknowledged frames, replays and slow links, is done by one task for each target.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from peers.outgoing import frame_of, output_of
from peers.outside import Outside
from peers.owner_line import OwnerLine
from peers.stage import Stage, Target
from peers.step_answers import StepAnswers
from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.errors import Internal, SwarmError
from swarm.models import ModelProfile
from swarm.types import PeerId

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Follower:
    target: Target
    replay_until: int
    """Outputs before this one were there when the target came."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    sending: bool = True
    """The task is at work; while it waits, outputs may go out past it."""
    task: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """What went round the ring last."""

    start: int = 0
    rows: int = 0
    sent_at: float = 0.0


class Followers:
    """Of one stage. All methods are for the event loop's thread."""

    def __init__(
        self,
        stage: Stage,
        profile: ModelProfile,
        outside: Outside,
        owner: OwnerLine,
        settings: Settings,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.answers = StepAnswers(profile, settings.limits.max_frame_bytes // 2)
        """Step mode: what is on its way to the owner."""
        self.round = Round()
        self.sent_at = 0.0
        """When a frame was sent last."""
        self._stage = stage
        self._profile = profile
        self._outside = outside
        self._owner = owner
        self._settings = settings
        self._tasks = tasks
        self._followers: list[_Follower] = []

    def start(self, targets: Sequence[Target]) -> None:
        """Those are followed from now on, and no others; who is among them already goes on."""
        self.stop(keep=targets)
        followed = [follower.target for follower in self._followers]
        for target in targets:
            if target not in followed:
                follower = _Follower(target, self._stage.output_end)
                follower.task = self._tasks.create_task(self._follow(follower))
                self._followers.append(follower)

    def stop(self, keep: Sequence[Target] = ()) -> None:
        """Send nothing more, but to ``keep``."""
        for follower in list(self._followers):
            if follower.target not in keep:
                self._followers.remove(follower)
                if follower.task is not None:
                    follower.task.cancel()

    def send(self) -> None:
        """There are new outputs. To the ring first: what goes to the owner is on nobody's critical path."""
        for follower in self._followers:
            if follower.sending or not self._send_at_once(follower.target):
                follower.wake.set()

    def acknowledged(self, peer: PeerId, ack: pb.Ack) -> None:
        for follower in self._followers:
            target = follower.target
            if target.peer is None or target.peer.peer_id != peer:
                continue
            if (target.layer, target.epoch) == (ack.layer, ack.epoch):
                while target.unacked and target.unacked[0] <= ack.sequence:
                    target.unacked.popleft()
                follower.wake.set()

    @property
    def carried(self) -> int:
        """Changes while rows wait for their line, as it carries what is before them."""
        waiting = [follower.target.peer for follower in self._followers if follower.sending and follower.target.peer]
        return sum(map(self._outside.carried, waiting))

    def _send_at_once(self, target: Target) -> bool:
        """The newest row, and its draft's, to a peer that lacks only those; ``False`` leaves it to the follower."""
        if target.peer is None or target.unacked:
            return False
        span = self._stage.next_rows(target, self._settings.engine.prefill_chunk_tokens)
        if span is None:
            return True
        if not self._stage.is_decode(*span):
            return False
        message = self._frame(target, *span)
        if not self._outside.try_to_peer(target.peer, message):
            return False
        self._sent(target, span[1])
        return True

    async def _follow(self, follower: _Follower) -> None:
        """Send what the target lacks as it appears."""
        target, limits, engine = follower.target, self._settings.limits, self._settings.engine
        try:
            if target.peer is not None:  # a dial takes several round trips: not when the first rows are waiting for it
                await self._outside.reach(target.peer)
            while True:
                follower.sending = True
                if target.peer is None and self._stage.step_mode:
                    sent = await self._send_logits(target)
                elif len(target.unacked) >= limits.window_frames:
                    sent = False
                else:
                    replayed = target.cursor < follower.replay_until
                    chunk = engine.replay_chunk_tokens if replayed else engine.prefill_chunk_tokens
                    sent = await self._send_rows(target, chunk)
                if not sent:
                    follower.sending = False
                    await follower.wake.wait()
                    follower.wake.clear()
        except SwarmError as error:
            self._owner.report(error, target.peer.peer_id if target.peer else None)
        except Exception:
            # The outermost edge of one session: a bug here must not take the other sessions down.
            logger.exception("session %s: sending failed", self._stage.session[:8])
            self._owner.report(Internal("the stage failed; see the peer's log"), None)

    async def _send_rows(self, target: Target, chunk: int) -> bool:
        if target.peer is not None and self._stage.log is not None:
            chunk = min(chunk, self._outside.frame_rows(target.peer.peer_id, self._stage.log.row_bytes))
        span = self._stage.next_rows(target, chunk)
        if span is None:
            return False
        if target.peer is None:
            output = output_of(self._stage, target, *span)
            target.cursor = span[1]
            await self._owner.tell(pb.ControlReply(output=output))
        else:
            message = self._frame(target, *span)
            self._sent(target, span[1])
            await self._outside.to_peer(target.peer, message)
        return True

    async def _send_logits(self, target: Target) -> bool:
        output = self.answers.take(target.epoch)
        if output is None:
            return False
        end = output.start + output.tensor.shape[0]
        output.hops.extend(self._stage.trace.get(end, ()))
        await self._owner.tell(pb.ControlReply(output=output))
        return True

    def _frame(self, target: Target, start: int, end: int) -> pb.LinkMessage:
        most_rows = self._settings.engine.prefill_chunk_tokens
        message = frame_of(self._stage, target, start, end, self._profile, most_rows)
        if self._stage.drafter is not None:
            self.round = Round(message.frame.start, len(message.frame.token_ids), self._now())
        return message

    def _sent(self, target: Target, end: int) -> None:
        if not self._stage.is_decode(target.cursor, end):
            target.unacked.append(target.sequence)
        target.sequence += 1
        target.cursor = end
        self.sent_at = self._now()
        if self._stage.log is not None and not self._settings.peer.checkpoints:
            self._stage.log.forget_before(min(target.cursor for target in self._stage.targets))

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
