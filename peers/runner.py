"""One stage at work: takes its frames in order, has them computed, and lets its targets follow the outputs.

A decode step makes no task switch here: a frame that finds the stage idle is submitted at once, and when its outputs
come back they go out in the same callback (:mod:`peers.following`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peers.executor import Executor, StepReply, StepRequest
from peers.following import Followers
from peers.outside import Outside
from peers.owner_line import OwnerLine
from peers.row_codec import DTYPES, decoded, encoded
from peers.stage import Stage, Target
from peers.stage_input import MOST_JOINED, OpenRequest, Work
from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.errors import BadRequest, BadTensor, Internal, SwarmError
from swarm.protocol import logprobs_to_wire, rows_to_wire, timing_to_wire, timings_from_wire
from swarm.types import HopTiming, PeerId
from swarm.wire import encoding_of, row_bytes

logger = logging.getLogger(__name__)

MakeRoom = Callable[["StageRunner", int], bool]
"""Have memory for the stage's positions up to this one. ``False``: there is none; the stage gave way, and is closed."""
BoundWaiting = Callable[[], None]
"""Something has to wait: where all that waits takes too much memory, some stage ends, perhaps this one."""


@dataclass(slots=True)
class _Job:
    """The frame that is being computed, chunk after chunk."""

    work: Work
    start: int
    ids: tuple[int, ...]
    rows: int
    queue_s: float
    offset: int = 0


class StageRunner:
    """Runs one :class:`Stage`. All methods are for the event loop's thread."""

    def __init__(
        self,
        stage: Stage,
        executor: Executor,
        outside: Outside,
        settings: Settings,
        tasks: asyncio.TaskGroup,
        make_room: MakeRoom,
        bound_waiting: BoundWaiting,
    ) -> None:
        self.stage = stage
        self.executor = executor
        self.outside = outside
        self.settings = settings
        self.owner = OwnerLine(stage, tasks)
        self._used_at = self._now()
        self._make_room = make_room
        self._bound_waiting = bound_waiting
        self.room = 0
        """Positions, in whole blocks, for which memory is reserved here."""
        self._job: _Job | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._followers = Followers(stage, executor.profile, outside, self.owner, settings, tasks)
        self._closed = False

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    @property
    def computing(self) -> bool:
        return self._job is not None

    @property
    def waiting_bytes(self) -> int:
        """Of hidden states in frames that are not computed yet, and of answers that the owner has not taken."""
        works = self.stage.inbox if self._job is None else (self._job.work, *self.stage.inbox)
        return sum(len(work.hidden) for work in works if work.hidden is not None) + self._followers.answers.size_bytes

    @property
    def last_used(self) -> float:
        """When it was last asked, computed or sent anything."""
        return max(self._used_at, self._followers.sent_at)

    # ---- called by the service --------------------------------------------------------------------------

    def accept(self, work: Work) -> None:
        """Queue a frame; raises what :meth:`Stage.accept` raises."""
        work.received_at = self._used_at = self._now()
        if self.stage.accept(work, self.settings.limits.max_waiting_frames, MOST_JOINED):
            self._take_next()
        else:
            self._acknowledge(work)

    async def reopen(self, request: OpenRequest) -> None:
        """Move to a newer epoch: what is being computed stays here, nothing that waits is run. How long that may take
        is up to the owner, who knows what this peer promised."""
        self._used_at = self._now()
        if request.epoch >= self.stage.epoch:
            self.stage.superseded = True
            self.stage.inbox.clear()
            self._followers.stop()
            self.executor.forget(self.stage.cache)  # its turn may be longer away than the owner waits
        idle_s = self.settings.timeouts.session_idle_s
        try:
            async with asyncio.timeout(idle_s):
                await self._idle.wait()
        except TimeoutError:
            raise Internal(f"a step took longer than session_idle_s ({idle_s:g} s)") from None
        self.stage.reopen(request)
        self._followers.answers.clear()

    def start(self, epoch: int, targets: list[Target]) -> None:
        """Send outputs to ``targets`` from now on; those of an older epoch's start are ignored."""
        if epoch != self.stage.epoch or self.stage.superseded:
            return
        self.stage.follow(targets)
        self._followers.start(self.stage.targets)
        self._take_next()

    def acknowledged(self, peer: PeerId, ack: pb.Ack) -> None:
        self._followers.acknowledged(peer, ack)

    def fetch(self, request: pb.Fetch) -> pb.Fetched:
        """Rows of the checkpoint log as the next hop gets them, in the model's dtype, if they are all there.

        Raises :class:`BadRequest`.
        """
        log, profile = self.stage.log, self.executor.profile
        rows, most = request.end - request.start, self.settings.limits.max_frame_bytes // 2
        if log is None or not 0 < rows * row_bytes(profile.dtype, profile.hidden_size) <= most:
            raise BadRequest(f"rows {request.start}:{request.end} can't be fetched from this stage at once")
        reply = pb.Fetched(number=request.number, log_start=self.stage.log_start)
        if log.start <= request.start and request.end <= log.end:
            data, width = log.read(request.start, request.end), profile.hidden_size
            encoding = encoding_of(self.stage.output_wire, profile.dtype)
            if encoding != profile.dtype:
                data = encoded(decoded(data, encoding, width, DTYPES[profile.dtype]), profile.dtype)
            reply.hidden.CopyFrom(rows_to_wire(data, profile.dtype, width))
        return reply

    def status(self, draining: bool) -> pb.Status:
        """``computed`` changes as the stage gets on: by its rows, while a step waits for its turn by passes for others,
        and while rows wait for the line, by what it carries for others. An owner gives up a stage that stands still,
        and all that it has would be computed again, by as busy a peer."""
        turns = self.executor.passes % 2**31 if self.computing else 0
        return pb.Status(
            epoch=self.stage.epoch,
            have=self.stage.have,
            computing=self.computing,
            draining=draining,
            computed=self.stage.computed + turns + self._followers.carried,
        )

    def close(self) -> None:
        """Nothing is computed or sent any more; a step in flight ends without consequences."""
        self._closed = True
        self._followers.stop()
        self._idle.set()

    # ---- computing --------------------------------------------------------------------------------------

    def _take_next(self) -> None:
        if self._job is not None or self._closed:
            return
        stage = self.stage
        if stage.superseded or stage.awaits_start or not stage.inbox:
            self._idle.set()
            return
        self._idle.clear()
        work = stage.inbox.popleft()
        self._acknowledge(work)
        start, ids = work.start, work.token_ids
        inputs = [*stage.inputs[:start], *ids] if stage.first else []
        if stage.first and stage.no_kv_cache:
            start, ids = 0, tuple(inputs)
        stage.truncate(start)
        stage.begin(work)
        stage.inputs = inputs
        stage.step = work.step
        rows = len(ids) if stage.first else work.rows
        self._job = _Job(work, start, ids, rows, queue_s=self._now() - work.received_at)
        self._step(self._job)

    def _step(self, job: _Job) -> None:
        stage = self.stage
        start, rows = job.start + job.offset, job.rows - job.offset
        if stage.first:
            engine, known = self.settings.engine, min((target.cursor for target in stage.targets), default=0)
            replayed = start + engine.replay_chunk_tokens <= known  # nobody waits for these outputs
            rows = min(rows, engine.replay_chunk_tokens if replayed else engine.prefill_chunk_tokens)
        if not self._make_room(self, start + rows):
            return
        step = StepRequest(
            layers=stage.layers,
            cache=stage.cache,
            start=start,
            rows=rows,
            token_ids=job.ids[job.offset : job.offset + rows] if stage.first else None,
            hidden=job.work.hidden,
            sample=stage.to_sample(start, start + rows),
            logit_rows=self._logit_rows(start, start + rows),
            want_hidden=stage.step.hidden,
            input_wire=stage.input_wire,
            output_wire=stage.output_wire,
            owner=stage.owner,
            more=start + rows < max(stage.known, stage.expected),
            round=stage.trace.get(start, ()) if stage.last else (),
        )
        self.executor.submit(step, lambda reply: self._computed(job, step, reply))

    def _computed(self, job: _Job, step: StepRequest, reply: StepReply | SwarmError) -> None:
        """The executor's callback. Errors of one frame go to the owner; the stage stays for the rebuild."""
        if self._closed:
            return
        try:
            if isinstance(reply, SwarmError):
                raise reply
            self._keep(job, step, reply)
        except SwarmError as error:
            self._fail(job, error)
            return
        except Exception:
            # The outermost edge of one session: a bug here must not take the other sessions down.
            logger.exception("session %s failed", self.stage.session[:8])
            self._fail(job, Internal("the stage failed; see the peer's log"))
            return
        job.offset += step.rows
        if job.offset < job.rows and not self.stage.superseded and not self._closed:
            self._step(job)
        else:
            self._job = None
            self._take_next()

    def _keep(self, job: _Job, step: StepRequest, reply: StepReply) -> None:
        stage, end = self.stage, step.start + step.rows
        stage.computed += step.rows
        self._used_at = self._now()
        queue_s = reply.queue_s + (job.queue_s if job.offset == 0 else 0.0)
        timing = HopTiming(self.outside.local_id, stage.layers, queue_s, reply.compute_s, reply.batch, self._link_s())
        hops = (*job.work.hops, timing_to_wire(timing))
        if stage.log is not None:
            stage.log.append(step.start, reply.hidden)
        elif reply.tokens:
            asked = stage.sampling.logprobs > 0
            stage.add_tokens([(token.token_id, logprobs_to_wire(token) if asked else b"") for token in reply.tokens])
            self._note_round(step, reply, hops)
            end = stage.output_end
        elif reply.logits and not stage.superseded:
            self._followers.answers.add(stage.step, end, step.logit_rows, reply)
            self._bound_waiting()
        stage.remember_trace(end, hops)
        self._followers.send()

    def _note_round(self, step: StepRequest, reply: StepReply, hops: Sequence[bytes]) -> None:
        """The rows that went round the ring last are back; so many guesses among them were right."""
        sent = self._followers.round
        if self.stage.drafter is not None and (step.start, step.rows) == (sent.start, sent.rows):
            batch = max((timing.batch for timing in timings_from_wire(hops)), default=1)
            self.stage.drafter.note_round(sent.rows - 1, len(reply.tokens) - 1, self._now() - sent.sent_at, batch)

    def _link_s(self) -> float:
        following = next((target.peer for target in self.stage.targets if target.peer is not None), None)
        return self.outside.link_s(following.peer_id) if following is not None else 0.0

    def _fail(self, job: _Job, error: SwarmError) -> None:
        stage = self.stage
        self._job = None
        stage.inbox.clear()
        stage.expected = stage.have
        if not stage.superseded:
            self.owner.report(error, job.work.sender if isinstance(error, BadTensor) else None)
        self._take_next()

    def _logit_rows(self, start: int, end: int) -> int:
        """Step mode: how many of the last rows the owner wants the logits of."""
        stage = self.stage
        if not (stage.last and stage.step_mode and stage.targets):
            return 0
        return max(0, end - max(start, stage.step.answer_from))

    def _acknowledge(self, work: Work) -> None:
        if work.want_ack and work.sender is not None:
            ack = pb.Ack(
                session=self.stage.session, epoch=work.epoch, sequence=work.sequence, layer=self.stage.layers.start
            )
            self.outside.acknowledge(work.sender, ack)
