"""Step mode: the owner gives a session's inputs one after another, and gets logits back instead of tokens.

The same chain, stages and rebuilds as for a generation, only that the last stage answers the owner and nothing
goes round a ring. Inputs may go back: one that starts before the end of what the stages hold truncates them. So a
session holds whatever sequence its owner wants next, and computes only what differs from the one before.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from swarm import protocol_pb2 as pb
from swarm.chain import Chain
from swarm.config import Settings
from swarm.control import HopControl, HopLost
from swarm.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Internal,
    ProtocolError,
    SwarmError,
    TooLong,
)
from swarm.health import Health
from swarm.knowledge import View
from swarm.kv import MODEL as KV_MODEL
from swarm.models import ModelProfile
from swarm.protocol import rows_from_wire
from swarm.rebuilds import RETRY_FIRST_S, Patience, Rebuild
from swarm.transcript import FinishReason
from swarm.transport import Transport
from swarm.types import Route, SessionId
from swarm.watching import HandoverReady, Watch
from swarm.wire import MODEL, Wire, row_bytes

FRAME_SHARE = 4
"""The answers to one input take at most this part of the largest frame: a peer's frames may be smaller."""


@dataclass(frozen=True, slots=True)
class StepAnswer:
    """What the model says after positions ``start``, ``start + 1``, ..."""

    start: int
    logits: bytes
    """Row-major float32 ``[rows, vocabulary]``."""
    hidden: Mapping[int, bytes]
    """By the number of layers before them, where the route is cut and at its end: hidden states ``[rows, hidden]`` in
    the model's dtype, the last behind the final norm. Empty unless asked for."""


class Inputs:
    """All inputs of a session in step mode, and the answers to the newest ones. Pure."""

    def __init__(self, capacity: int, profile: ModelProfile, wire: str = MODEL, kv: str = KV_MODEL) -> None:
        self.wire = Wire.chosen(wire, profile.dtype)
        self.kv = kv
        self.tokens: list[int] = []
        self.stop_at = capacity
        """Most tokens that there may be."""
        self.finish_reason: FinishReason | None = None
        self.awaited = 0
        """First position whose answer is lacking."""
        self._profile = profile
        self._number = 0
        self._answer_from = 0
        self._want_hidden = False
        self._sure = capacity
        """Before this position all stages hold the same tokens, however much of the newest input has reached them."""
        self._lowest = capacity
        """The lowest position that was ever given another token."""
        self._logits: list[bytes] = []
        self._hidden: list[bytes] = []

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def generated(self) -> int:
        return len(self.tokens)

    @property
    def kept(self) -> int:
        """What is awaited is run again after a change of the route, and so is what some stage may not have replaced."""
        return min(len(self.tokens), self.awaited, self._sure)

    @property
    def unchanged(self) -> int:
        return min(len(self.tokens), self._lowest)

    @property
    def answered(self) -> bool:
        return self.awaited == len(self.tokens)

    @property
    def reusable(self) -> bool:
        return False

    @property
    def step(self) -> pb.Step | None:
        return pb.Step(number=self._number, answer_from=self._answer_from, hidden=self._want_hidden)

    def describe(self, message: pb.Open, *, last: bool) -> None:
        message.step_mode = True

    def feed(self, start: int, token_ids: Sequence[int], answer_from: int, *, hidden: bool = False) -> bool:
        """Tokens from ``start`` on are ``token_ids``; answers are wanted from ``answer_from`` on.

        Returns whether there were others at ``start``. Raises :class:`BadRequest` or :class:`TooLong`.
        """
        end = start + len(token_ids)
        if not 0 <= start <= min(answer_from, len(self.tokens)) or answer_from >= end:
            raise BadRequest(f"an input {start}:{end} after {len(self.tokens)} tokens with answers from {answer_from}")
        if end > self.stop_at:
            raise TooLong(f"{end} tokens; this session was opened for {self.stop_at}")
        if not 0 <= min(token_ids) <= max(token_ids) < self._profile.vocab_size:
            raise BadRequest(f"a token id is not in the vocabulary of {self._profile.vocab_size}")
        rewound = start < len(self.tokens)
        if rewound:
            self._sure, self._lowest = min(self._sure, start), min(self._lowest, start)
        self.tokens[start:] = token_ids
        self._number += 1
        self._answer_from = self.awaited = answer_from
        self._want_hidden = hidden
        self._logits, self._hidden = [], []
        return rewound

    def commit(self, output: pb.Output) -> None:
        """Rows that are known, and answers to earlier inputs, are passed over; a row that comes too early is refused.

        Raises :class:`ProtocolError` for such a row, and for what can't be an answer.
        """
        if output.step != self._number:
            return
        profile, most = self._profile, len(self.tokens) - self._answer_from
        logits = rows_from_wire(output.tensor, "float32", profile.vocab_size, most)
        rows = output.tensor.shape[0]
        known, end = self.awaited - output.start, output.start + rows
        if known < 0 or end > len(self.tokens):
            raise ProtocolError(f"answers {output.start}:{end} came where {self.awaited} was due")
        if known >= rows:
            return
        if self._want_hidden:
            hidden = rows_from_wire(output.hidden, profile.dtype, profile.hidden_size, most)
            if output.hidden.shape[0] != rows:
                raise ProtocolError(f"{output.hidden.shape[0]} hidden states with {rows} rows of logits")
            self._hidden.append(hidden[known * len(hidden) // rows :])
        self._logits.append(logits[known * 4 * profile.vocab_size :])
        self.awaited = end
        if self.answered:
            self._sure = self.stop_at

    def answer(self) -> StepAnswer:
        """To the newest input; call it once it is :attr:`answered`."""
        hidden = {self._profile.num_layers: b"".join(self._hidden)} if self._want_hidden else {}
        return StepAnswer(self._answer_from, b"".join(self._logits), hidden)


class StepSession:
    """An ``async with``. The route is opened with the first input and mended in the background, between inputs too.

    Once it is idle for so long that peers may give its memory to others, a loss is mended with the next input.
    """

    def __init__(
        self,
        transport: Transport,
        view: View,
        profile: ModelProfile,
        capacity: int,
        settings: Settings,
        health: Health,
    ) -> None:
        """``capacity``: the number of tokens that is reserved at every hop. Raises :class:`TooLong`."""
        limit = min(profile.max_positions, settings.peer.max_cache_tokens_per_session)
        if not 0 < capacity <= limit:
            raise TooLong(f"a session of {capacity} tokens; the limit is {limit}")
        self.session_id = SessionId(secrets.token_hex(16))
        self.inputs = Inputs(capacity, profile, settings.inference.wire, settings.inference.kv)
        self.computed = 0
        """Positions that were asked for so far, those of rebuilds not counted."""
        self._network = transport, view, profile
        self._settings = settings
        self._health = health
        answer_bytes = 4 * profile.vocab_size + row_bytes(profile.dtype, profile.hidden_size)
        self._rows_at_once = max(1, settings.limits.max_frame_bytes // FRAME_SHARE // answer_bytes)
        self._chain: Chain | None = None
        self._watch: Watch | None = None
        self._asked = asyncio.Event()
        """An input came that is not answered yet."""
        self._answered_at = 0.0
        self._turn = asyncio.Lock()
        """One input after the other."""
        self._changing = asyncio.Lock()
        """The route, or the inputs."""
        self._answer: asyncio.Future[StepAnswer] | None = None
        self._error: SwarmError | None = None
        self._life: asyncio.Task[None] | None = None

    async def __aenter__(self) -> StepSession:
        self._life = asyncio.create_task(self._live())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Free every stage; who still waits for an answer gets ``Cancelled``. Twice is harmless."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait((self._life,))
            self._end(Cancelled("the session was closed"))  # also where it was closed before it could begin
            if not self._life.cancelled():
                self._life.result()

    @property
    def error(self) -> SwarmError | None:
        """Why the session has ended, if it has."""
        return self._error

    @property
    def rebuilds(self) -> list[Rebuild]:
        return self._chain.rebuilds if self._chain else []

    @property
    def route(self) -> Route | None:
        """``None`` before the first input, and while hops are lacking."""
        return self._chain.route if self._chain and not self._chain.gaps() else None

    def shared(self, tokens: Sequence[int]) -> int:
        """How many tokens at the start of ``tokens`` the session holds."""
        held = self.inputs.tokens
        most = min(len(held), len(tokens))
        return next((index for index in range(most) if held[index] != tokens[index]), most)

    async def run(self, tokens: Sequence[int], answer_from: int, *, hidden: bool = False) -> StepAnswer:
        """The answers after positions ``answer_from`` and later of ``tokens``, which is the whole sequence.

        Only what differs from the sequence before is computed, and rows whose answers are wanted. ``hidden``: the
        hidden states, too, of peers that keep checkpoints. Raises :class:`SwarmError`; after one that is not the
        request's fault the session is over.
        """
        async with self._turn:
            start = min(self.shared(tokens), answer_from)
            answers = []
            for wanted in range(answer_from, len(tokens), self._rows_at_once):
                piece = tokens[start : wanted + self._rows_at_once]
                answer = await self._step(start, piece, wanted, hidden)
                start += len(piece)
                if hidden:
                    answer = replace(answer, hidden={**await self._at_cuts(wanted, start), **answer.hidden})
                answers.append(answer)
        if not answers:
            raise BadRequest(f"no answer is wanted of {len(tokens)} tokens from {answer_from} on")
        cuts = set.intersection(*(set(a.hidden) for a in answers))  # the route may have changed meanwhile
        states = {cut: b"".join(a.hidden[cut] for a in answers) for cut in sorted(cuts)}
        return StepAnswer(answer_from, b"".join(a.logits for a in answers), states)

    async def _step(self, start: int, token_ids: Sequence[int], answer_from: int, hidden: bool) -> StepAnswer:
        async with self._changing:
            if self._error is not None:
                raise self._error
            rewound = self.inputs.feed(start, token_ids, answer_from, hidden=hidden)
            self.computed += len(token_ids)
            self._answer = asyncio.get_running_loop().create_future()
            self._asked.set()
            if self._chain is not None and self._watch is not None and self._chain.complete:
                self._watch.waiting()
                try:
                    await self._chain.feed_step(start, rewound=rewound)
                except HopLost as loss:
                    self._chain.events.put(loss.control, loss.error)
        return await self._answer

    async def _at_cuts(self, start: int, end: int) -> dict[int, bytes]:
        """Rows ``start .. end - 1`` behind every hop but the last, out of their checkpoint logs.

        A hop that was replaced just now has them after its replay. Raises as :meth:`run`.
        """
        _, _, profile = self._network
        wait_s = self._settings.recovery.wait_s
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    async with self._changing:
                        if self._error is not None:
                            raise self._error
                        controls = self._chain.controls[:-1] if self._chain is not None else []
                    told = await asyncio.gather(*(c.fetch(start, end) for c in controls), return_exceptions=True)
                    found: dict[int, bytes] = {}
                    for control, fetched in zip(controls, told, strict=True):
                        if isinstance(fetched, pb.Fetched):
                            found |= _rows_at(control, fetched, start, end, profile)
                        elif not (isinstance(fetched, SwarmError) and fetched.retryable):  # else the hop is replaced
                            raise fetched
                    if len(found) == len(controls):
                        return found
                    await asyncio.sleep(RETRY_FIRST_S)
        except TimeoutError:
            raise DeadlineExceeded(f"no hidden states came within {wait_s:g} s") from None

    # ---- the session's own task -------------------------------------------------------------------------

    async def _live(self) -> None:
        ended: SwarmError = Internal("the session failed; see the log")
        try:
            async with asyncio.TaskGroup() as tasks:
                health, prefixes = self._health, self._health.prefixes
                chain = Chain(self.session_id, self.inputs, *self._network, self._settings, health, prefixes, tasks)
                try:
                    await self._drive(chain)
                except SwarmError as error:
                    ended = error
                finally:
                    await chain.close()
        except asyncio.CancelledError:
            ended = Cancelled("the session was closed")
            raise
        finally:
            self._end(ended)

    def _end(self, error: SwarmError) -> None:
        self._error = self._error or error
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._error)

    async def _drive(self, chain: Chain) -> None:
        """Open, listen, mend, until the session can't go on."""
        await self._asked.wait()
        async with self._changing:
            self._chain = chain
            await chain.establish("opened")
        self._watch = watch = Watch(chain, self._settings)
        patience = Patience(self._settings.recovery.max_rebuilds)
        while True:
            known = self.computed, self.inputs.awaited
            watch.begin()
            try:
                await self._listen(chain, watch)
            except HopLost as loss:
                patience.lost(loss, fruitful=(self.computed, self.inputs.awaited) != known)
                if self._long_idle():
                    # Its memory is wanted by others, most likely: they may have all of it until the next input.
                    await chain.release()
                    await self._asked.wait()
                async with self._changing:
                    reason = await chain.bury(loss) if chain.controls else f"rested after: {loss.error}"
                    await patience.pause()
                    await chain.establish(reason)
            except HandoverReady as ready:
                async with self._changing:
                    await chain.establish(await chain.replace(ready.handover))

    def _long_idle(self) -> bool:
        idle_s = asyncio.get_running_loop().time() - self._answered_at
        return not self._asked.is_set() and idle_s > self._settings.timeouts.evictable_after_s

    async def _listen(self, chain: Chain, watch: Watch) -> None:
        """For ever; raises ``HopLost`` or ``HandoverReady`` when the route has to change."""
        while True:
            if self._asked.is_set() and self.inputs.answered:
                watch.moved()
                chain.praise()
                self._asked.clear()
                self._answered_at = asyncio.get_running_loop().time()
                if self._answer is not None and not self._answer.done():  # else nobody waits for it any more
                    self._answer.set_result(self.inputs.answer())
            if chain.stale:  # here, and not where the input came: who asked may give up meanwhile
                async with self._changing:
                    await chain.reopen()
            output = await watch.output()
            if output is not None:
                with chain.controls[-1].blamed():
                    self.inputs.commit(output)
                if output.epoch == chain.epoch:
                    chain.settled = chain.epoch
            watch.check(awaited=not self.inputs.answered)


def _rows_at(control: HopControl, fetched: pb.Fetched, start: int, end: int, profile: ModelProfile) -> dict[int, bytes]:
    """By the number of layers up to this hop's end; empty if they are not there yet. Raises :class:`SwarmError`."""
    if not fetched.HasField("hidden"):
        if fetched.log_start > start:
            name = f"peer {control.hop.peer.peer_id[-6:]}"
            raise BadRequest(f"{name} keeps no checkpoints, so it can't tell the hidden states behind its layers")
        return {}
    rows = rows_from_wire(fetched.hidden, profile.dtype, profile.hidden_size, end - start)
    if fetched.hidden.shape[0] != end - start:
        raise ProtocolError(f"{fetched.hidden.shape[0]} hidden states came where {end - start} were asked for")
    return {control.hop.layers.end: rows}
