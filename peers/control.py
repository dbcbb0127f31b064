"""Control streams: an owner opens a stage, steers it, and hears its heartbeats and outputs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TypeVar

from peers.frame_router import FrameRouter
from peers.runner import StageRunner
from peers.stage import Stage, Target
from peers.stage_input import OpenRequest, Work
from peers.stage_table import StageKey, StageTable
from peers.step_answers import step_from_wire
from swarm import kv
from swarm import protocol_pb2 as pb
from swarm.awake import timeout_awake
from swarm.errors import BadRequest, Busy, Evicted, NotAllowed, ProtocolError, SwarmError, TooLong, WrongRange
from swarm.protocol import (
    address_from_wire,
    check_count,
    check_end_ids,
    decode,
    error_to_wire,
    peer_id_from_wire,
)
from swarm.sampling import SamplingParams
from swarm.transport import Stream
from swarm.types import LayerRange, PeerId, PeerState, SessionId
from swarm.wire import MODEL

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_TARGETS = 4
MAX_PREVIOUS = 8

Tell = Callable[[pb.ControlReply], Awaitable[None]]


@dataclass(slots=True)
class _Pulse:
    """The heartbeats of one control stream. Whatever the owner says meanwhile, it puts none of them off."""

    tell: Tell
    beaten_at: float


class ControlHandler:
    """``handle`` runs once for each control stream; ``state`` says whether newcomers are taken."""

    def __init__(self, table: StageTable, router: FrameRouter, state: Callable[[], PeerState]) -> None:
        self._table = table
        self._router = router
        self._state = state
        self._timeouts = table.settings.timeouts

    async def handle(self, stream: Stream) -> None:
        key: StageKey | None = None
        clean, prefix = False, b""

        async def tell(reply: pb.ControlReply) -> None:
            await stream.send(reply.SerializeToString())

        pulse = _Pulse(tell, _now())
        try:
            async with timeout_awake(self._timeouts.open_s):
                first = await stream.receive()
            if first is None:
                return
            message = decode(pb.ControlRequest, first)
            if message.WhichOneof("kind") != "open":
                raise ProtocolError("a control stream begins with open")
            while True:
                kind = message.WhichOneof("kind")
                if kind == "open":
                    if key not in (None, (message.open.session, message.open.start)):
                        raise ProtocolError("a control stream is for one stage")
                    key = await self._open(stream.remote, message.open, pulse)
                    # The stage is this stream's by now, so that it is let go of if the owner can't hear this.
                    await tell(pb.ControlReply(opened=self._opened(self._table.runners[key])))
                elif key is None or key not in self._table.runners:
                    raise Evicted("this stage is gone")
                elif kind == "start":
                    self._start(self._table.runners[key], message.start)
                elif kind == "input":
                    self._input(self._table.runners[key], message.input)
                elif kind == "fetch":
                    await tell(pb.ControlReply(fetched=self._table.runners[key].fetch(message.fetch)))
                elif kind == "finish":
                    prefix = message.finish.prefix
                else:  # a ping
                    await tell(pb.ControlReply(status=self._status(self._table.runners[key])))
                frame = await self._next(stream, key, pulse)
                if frame is None:
                    clean = True
                    return
                message = decode(pb.ControlRequest, frame)
        except TimeoutError:
            logger.info("owner %s opened a control stream and said nothing", stream.remote[-6:])
        except SwarmError as error:
            logger.info("control stream of %s: %s", stream.remote[-6:], error)
            await self._last_words(stream, error)
        finally:
            self._detach(key, tell, clean=clean, prefix=prefix)

    async def _next(self, stream: Stream, key: StageKey, pulse: _Pulse) -> bytes | None:
        """The owner's next frame; meanwhile it hears heartbeats."""

        def beating() -> StageRunner:
            runner = self._table.runners.get(key)
            if runner is None or runner.owner.stream is not pulse.tell:
                raise Evicted("this stage gave its memory to another session, or was opened again elsewhere")
            return runner

        return await self._beat(stream.receive(), beating, pulse)

    async def _beat(self, waiting: Coroutine[None, None, T], beating: Callable[[], StageRunner], pulse: _Pulse) -> T:
        """What is waited for; meanwhile the owner hears a heartbeat of the stage every ``heartbeat_s``."""
        task = asyncio.ensure_future(waiting)
        try:
            while not task.done():
                due_s = pulse.beaten_at + self._timeouts.heartbeat_s - _now()
                if due_s > 0:
                    await asyncio.wait((task,), timeout=due_s)
                else:
                    pulse.beaten_at = _now()
                    await pulse.tell(pb.ControlReply(status=self._status(beating())))
            return task.result()
        finally:
            task.cancel()

    async def _last_words(self, stream: Stream, error: SwarmError) -> None:
        try:
            await stream.send(pb.ControlReply(error=error_to_wire(error)).SerializeToString())
        except SwarmError as lost:
            logger.debug("owner %s was gone already: %s", stream.remote[-6:], lost)

    def _detach(self, key: StageKey | None, tell: Tell, *, clean: bool, prefix: bytes) -> None:
        """The control stream ended. A clean end frees the stage; else it lingers for the owner's return."""
        runner = self._table.runners.get(key) if key is not None else None
        if key is None or runner is None or runner.owner.stream is not tell:
            return
        runner.owner.stream = None
        if clean:
            self._table.free(key, prefix)
        else:
            self._table.linger(key)

    async def _open(self, owner: PeerId, message: pb.Open, pulse: _Pulse) -> StageKey:
        request = self._checked(message)
        key = (request.session, request.layers.start)
        runner = self._table.runners.get(key)
        if runner is not None and runner.stage.owner != owner:
            raise NotAllowed("this session has another owner")
        if runner is not None and runner.stage.layers != request.layers and runner.stage.epoch < request.epoch:
            self._table.free(key)  # lost, and not gone yet; its owner has cut the route anew
            runner = None
        if runner is None:
            if self._state() is not PeerState.SERVING:
                raise Busy(f"this peer is {self._state()} and takes no new sessions")
            runner = self._table.admit(owner, request, self._router)
        else:
            reopened = runner
            self._table.attach(key)

            def beating() -> StageRunner:
                if self._table.runners.get(key) is reopened:
                    self._table.attach(key)  # an older stream of its owner may have ended meanwhile
                return reopened

            try:
                await self._beat(runner.reopen(request), beating, pulse)  # it may have a long step to end
            finally:
                if runner.owner.stream is None and self._table.runners.get(key) is runner:
                    self._table.linger(key)
            if self._table.runners.get(key) is not runner:
                raise Evicted("this stage is gone")
        self._table.attach(key)
        runner.owner.stream = pulse.tell
        return key

    def _opened(self, runner: StageRunner) -> pb.Opened:
        stage = runner.stage
        return pb.Opened(
            epoch=stage.epoch,
            have=stage.have,
            log_start=stage.log_start,
            heartbeat_s=self._timeouts.heartbeat_s,
        )

    def _checked(self, message: pb.Open) -> OpenRequest:
        profile = self._table.executor.profile
        if message.model != profile.model_id:
            raise BadRequest(f"this peer serves {profile.model_id}, not {message.model[:80]}")
        layers = LayerRange(message.start, message.end)
        if not self._table.executor.layers.covers(layers):
            raise WrongRange(f"this peer serves layers {self._table.executor.layers}, not {layers}")
        limit = min(profile.max_positions, self._table.settings.peer.max_cache_tokens_per_session)
        if not 0 < message.max_positions <= limit:
            raise TooLong(f"{message.max_positions} tokens asked for; this peer's limit for a session is {limit}")
        check_end_ids(message.end_ids)
        check_count(message.token_ids, message.max_positions, "tokens")
        return OpenRequest(
            session=SessionId(message.session),
            epoch=message.epoch,
            layers=layers,
            max_positions=message.max_positions,
            keep=message.keep,
            previous=frozenset(map(peer_id_from_wire, message.previous[:MAX_PREVIOUS])),
            step_mode=message.step_mode,
            no_kv_cache=message.no_kv_cache,
            sampling=SamplingParams.from_wire(message.sampling),
            token_ids=self._tokens(message.token_ids),
            end_ids=frozenset(message.end_ids),
            stop_at=message.stop_at,
            prompt_length=message.prompt_length,
            speculate=message.speculate,
            prefix=message.prefix,
            kv=message.kv or kv.MODEL,
            input_wire=message.input_wire or MODEL,
            output_wire=(message.output_wire or MODEL) if layers.end < profile.num_layers else MODEL,
        )

    def _tokens(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Of a message whose number of tokens was looked at."""
        size = self._table.executor.profile.vocab_size
        if max(token_ids, default=0) >= size:
            raise BadRequest(f"a token id is not in the vocabulary of {size}")
        return tuple(token_ids)

    def _start(self, runner: StageRunner, message: pb.Start) -> None:
        if len(message.targets) > MAX_TARGETS:
            raise ProtocolError(f"a stage has at most {MAX_TARGETS} targets")
        runner.start(message.epoch, [_target_of(runner.stage, target) for target in message.targets])

    def _input(self, runner: StageRunner, message: pb.Input) -> None:
        if not runner.stage.first or not message.token_ids:
            raise ProtocolError("input is token ids for the first stage")
        if len(message.token_ids) > (most := runner.stage.max_positions):
            raise TooLong(f"{len(message.token_ids)} tokens are more than the {most} positions that were reserved")
        ids = self._tokens(message.token_ids)
        step = step_from_wire(message.step)
        runner.accept(Work(epoch=message.epoch, start=message.start, rows=len(ids), token_ids=ids, step=step))

    def _status(self, runner: StageRunner) -> pb.Status:
        return runner.status(draining=self._state() is PeerState.DRAINING)


def _target_of(stage: Stage, message: pb.Target) -> Target:
    """Raises ``WrongRange`` for one that does not follow ``stage`` on a route, such as the stage itself."""
    following = 0 if stage.last else stage.layers.end  # the ring leads from the last stage to the first
    peer = address_from_wire(message.peer) if message.HasField("peer") else None
    if peer is None and not stage.last:
        raise WrongRange(f"the owner hears from the last stage, not from that of layers {stage.layers}")
    if peer is not None and message.layer != following:
        raise WrongRange(f"layer {following} follows layers {stage.layers}, not layer {message.layer}")
    return Target(peer=peer, layer=message.layer, epoch=message.epoch, cursor=message.forward_from)


def _now() -> float:
    return asyncio.get_running_loop().time()
