"""A session's part at one peer: the rules of position, epoch and truncation. No I/O, no torch, no clock.

The stage's state is its KV cache (positions ``0 .. have - 1``), what it has put out (the checkpoint log,
or the token list at the last stage) and who may talk to it. Rules, in the order in which they apply to a
frame (session, epoch, sequence, start):

1. the sender was not named by the owner: refused;
2. its epoch is over, or its sequence number was seen: dropped;
3. it starts after the end of what is here or queued: refused with ``gap``;
4. it starts before the end: what waits from ``start`` on is not run, KV cache and log are truncated to ``start`` when
   its turn comes, then it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from peers.checkpoints import CheckpointLog
from peers.drafting import MAX_DRAFT, Drafter
from peers.executor import Cache, SampleRequest
from peers.stage_input import NO_STEP, OpenRequest, Work
from swarm.errors import BadRequest, Gap, NotAllowed, ProtocolError, StaleEpoch, TooLong
from swarm.types import PeerAddress, PeerId


@dataclass(slots=True)
class _Released:
    """What is left of a cache."""

    length: int

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses at the tokens from ``start`` on. ``number`` tells their rows from those of other drafts."""

    number: int = 0
    start: int = 0
    ids: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Target:
    """Somebody who follows this stage's outputs from ``cursor`` on: the next stage, the first, or the owner."""

    peer: PeerAddress | None
    """``None``: the owner."""
    layer: int
    epoch: int
    cursor: int
    sequence: int = 0
    unacked: deque[int] = field(default_factory=deque)

    def same_as(self, other: Target) -> bool:
        mine = self.peer.peer_id if self.peer else None
        theirs = other.peer.peer_id if other.peer else None
        return (mine, self.layer, self.epoch) == (theirs, other.layer, other.epoch)


class Stage:
    """See the module's text. ``log`` is ``None`` at the last stage: its outputs are tokens, or nothing in step mode."""

    def __init__(
        self, request: OpenRequest, owner: PeerId, *, first: bool, last: bool, cache: Cache, log: CheckpointLog | None
    ) -> None:
        self.session = request.session
        self.owner = owner
        self.layers = request.layers
        self.max_positions = request.max_positions
        self.input_wire, self.output_wire = request.input_wire, request.output_wire
        self.kv = request.kv
        self.first, self.last = first, last
        self.cache, self.log = cache, log
        self.epoch = request.epoch
        self.superseded = False
        """A newer epoch is about to begin: nothing more of this one is run or sent."""
        self.inbox: deque[Work] = deque()
        self.targets: list[Target] = []
        self.inputs: list[int] = []
        """First stage: the token ids by position, which ``no_kv_cache`` runs again each step."""
        self.tokens: list[int] = []
        """Last stage: all known tokens; ``tokens[p + 1]`` is the output at position ``p``."""
        self.logprobs: dict[int, bytes] = {}
        """Last stage, if the owner asked for them: ``pb.Logprobs`` of the tokens that it sampled, by position."""
        self.computed = 0
        """Rows run since this stage was opened, for accounting."""
        self.ended = False
        """Last stage: an end-of-text id was sampled, or all that was asked for."""
        self.trace: dict[int, Sequence[bytes]] = {}
        """What this stage and those before say of their time, by the end of their rows; of the newest ones."""
        self.step = NO_STEP
        """Step mode: of the newest rows."""
        self.draft = self.draft_start = 0
        """Rows at ``draft_start`` and later were run from guesses, those of draft number ``draft``; 0: none were."""
        self.drafter: Drafter | None = None
        """Last stage, if the owner asked for it."""
        self.sent = Draft()
        """Last stage: what was guessed last."""
        self._adopt(request)

    # ---- opening and moving to a newer epoch ------------------------------------------------------------

    def reopen(self, request: OpenRequest) -> None:
        """Move to ``request.epoch`` and truncate to ``request.keep``; raises :class:`StaleEpoch`."""
        if request.epoch < self.epoch:
            raise StaleEpoch(f"epoch {request.epoch} is over; this stage is in {self.epoch}")
        if request.layers != self.layers or request.max_positions != self.max_positions:
            raise BadRequest("a stage keeps the layers and positions that it was opened with")
        if (request.input_wire, request.output_wire) != (self.input_wire, self.output_wire):
            raise BadRequest("a stage's hidden states come and go as when it was opened")
        if request.kv != self.kv:
            raise BadRequest("a stage keeps its keys and values as when it was opened")
        self._adopt(request)

    def _adopt(self, request: OpenRequest) -> None:
        if self.last and not request.step_mode and not request.token_ids:
            raise BadRequest("the last stage is opened with the text so far")
        self.epoch, self.superseded = request.epoch, False
        self.known = request.keep
        """Positions that the owner has inputs for: they will come, if they are not here."""
        self.previous = request.previous
        self.step_mode, self.no_kv_cache = request.step_mode, request.no_kv_cache
        self.sampling, self.end_ids, self.stop_at = request.sampling, request.end_ids, request.stop_at
        self.prompt_length = request.prompt_length
        self.inbox.clear()
        self.targets = []
        self.started = False
        self.trace.clear()
        self._next_sequence = dict.fromkeys(request.previous, 0)
        self.ended = False
        known = list(self.tokens)
        # A guess may have been wrong, and the frame that would have said so may have been lost with this epoch. And a
        # request that failed in a later piece has left positions without outputs.
        self.truncate(min(request.keep, self.settled))
        self.draft, self.sent = 0, Draft(self.sent.number)
        if self.last and not self.step_mode:
            committed = list(request.token_ids)
            self.tokens = committed + known[len(committed) : self.cache.length + 1]
            self.logprobs = {place: told for place, told in self.logprobs.items() if place >= len(committed)}
            # A successor that followed in larger frames has run the newest position without sampling after it: once
            # more, then. Its row comes from the log upstream.
            if self.cache.length >= len(self.tokens):
                self.truncate(len(self.tokens) - 1)
            if not request.speculate or request.no_kv_cache:
                self.drafter = None
            elif self.drafter is None:
                self.drafter = Drafter(self.tokens)
            else:
                self.drafter.restart(self.tokens)
        self.expected = self.cache.length

    def release(self) -> None:
        """Let go of the memory. Whoever still refers to the stage, a task that ends or a traceback, sees its length;
        a step in flight has the cache itself."""
        self.cache = _Released(self.cache.length)
        self.inbox.clear()
        if self.log is not None:
            self.log = CheckpointLog(self.log.row_bytes)

    @property
    def have(self) -> int:
        return self.cache.length

    @property
    def settled(self) -> int:
        """Positions below this one were not run from guesses that may be wrong, and their outputs are in the log."""
        end = min(self.cache.length, self.draft_start) if self.draft else self.cache.length
        return end if self.log is None else min(end, self.log.end)

    @property
    def log_start(self) -> int:
        """First position whose output can still be sent again."""
        if self.log is not None:
            return self.log.start if self.log.end else self.cache.length
        return self.cache.length if self.step_mode else 0

    # ---- frames -----------------------------------------------------------------------------------------

    def check_sender(self, sender: PeerId) -> None:
        if sender not in self.previous:
            raise NotAllowed("this sender was not named when the session was opened")

    def accept(self, work: Work, waiting_limit: int, most_rows: int = 1) -> bool:
        """Queue ``work`` under the rules above. ``False``: dropped. Raises ``NotAllowed``, ``Gap``, ``TooLong``.

        One that nobody counts, a token's, joins the one before it if that waits, for a pass of ``most_rows`` at most: a
        successor that warms up gets tokens as fast as the old route makes them, and may be slower.
        """
        if work.sender is not None:
            self.check_sender(work.sender)
        if work.epoch != self.epoch or self.superseded:
            return False
        if work.sender is not None:
            due = self._next_sequence[work.sender]
            if work.sequence < due:
                return False
            if work.sequence > due:
                raise Gap(f"frame {work.sequence} came before frame {due}")
        if work.start > self.expected:
            raise Gap(f"frame starts at {work.start}, this stage has {self.expected}")
        if work.start + work.rows > self.max_positions:
            raise TooLong(f"position {work.start + work.rows} is past the {self.max_positions} that were reserved")
        self._take_back(work)
        newest = self.inbox[-1] if self.inbox else None
        joins = newest is not None and self._joins(newest, work, most_rows)
        if not joins and len(self.inbox) >= waiting_limit:
            raise ProtocolError(f"{len(self.inbox)} frames wait for this stage already")
        if work.sender is not None:
            self._next_sequence[work.sender] = work.sequence + 1
        self.expected = work.start + work.rows
        if newest is not None and joins:
            newest.join(work)
        else:
            self.inbox.append(work)
        return True

    @staticmethod
    def _joins(newest: Work, work: Work, most_rows: int) -> bool:
        if work.want_ack or newest.rows + work.rows > most_rows:
            return False
        return (newest.sender, newest.step, newest.start + newest.rows) == (work.sender, work.step, work.start)

    def _take_back(self, work: Work) -> None:
        """Rows that wait and would be truncated by ``work`` are not run at all: no position waits twice."""
        while self.inbox and self.inbox[-1].start >= work.start:
            work.want_ack |= self.inbox.pop().want_ack  # one for all that the sender sent before
        if self.inbox:
            self.inbox[-1].cut(work.start)

    def truncate(self, length: int) -> None:
        """Forget positions ``length`` and after: KV cache, log, and what followers were sent of them."""
        reached = self.output_end
        self.cache.truncate(min(length, self.cache.length))
        if self.log is not None:
            self.log.truncate(length)
        del self.inputs[length:]
        # The tokens that the last stage knows are the owner's or its own samples: running a position again does not
        # make them doubtful, so they, and what the owner was sent of them, stay.
        if not self.last or self.step_mode:
            for target in self.targets:
                if target.cursor <= reached:  # else it has more than this stage ever put out, and keeps it
                    target.cursor = min(target.cursor, length)

    def begin(self, work: Work) -> None:
        """``work`` is run now, at the end of what is here: everything before it was right, or it would not be sent."""
        self.draft, self.draft_start = work.draft, work.draft_start

    def to_sample(self, start: int, end: int) -> SampleRequest | None:
        """What to sample after rows ``start .. end - 1``: the first token that is unknown, if the ring is to go on and
        the row before it is among them, and with a draft those after it."""
        newest = len(self.tokens) - 1
        if not self.last or self.step_mode or self.ended or not start <= newest < end:
            return None
        guessed = self.draft and self.draft_start < end
        if guessed and self.draft_start <= newest:
            return None  # the rest of a draft of which the ring has passed on
        drafts = self.sent.ids[: end - newest - 1] if guessed and self._is_sent_at(newest + 1) else ()
        return SampleRequest(self.sampling, self.tokens, self.prompt_length, end - newest, drafts)

    def _is_sent_at(self, position: int) -> bool:
        return self.draft == self.sent.number and self.draft_start == self.sent.start == position

    def add_tokens(self, sampled: Sequence[tuple[int, bytes]]) -> None:
        """The last stage sampled these, token ids and ``pb.Logprobs`` if asked for: one, and one for each right guess.
        An end id inside the prompt ends nothing, a sampled one does."""
        known = len(self.tokens)
        for token_id, logprobs in sampled:
            if logprobs:
                self.logprobs[len(self.tokens)] = logprobs
            self.tokens.append(token_id)
            if self.drafter is not None:
                self.drafter.append(token_id)
            self.ended = token_id in self.end_ids or len(self.tokens) >= self.stop_at
            if self.ended:
                break
        guessed = len(self.tokens) - known - 1
        if guessed:
            self.draft_start += guessed
            for target in self.targets:
                if target.peer is not None and target.cursor == known - 1:
                    target.cursor += guessed  # the ring has run them already

    def guess(self, limit: int) -> Draft:
        """A draft to go round the ring after the newest token, ``limit`` tokens at most; empty if none pays."""
        if self.drafter is None or self.ended:
            return Draft(self.sent.number)
        # The token after the draft is sampled too, and is the last one at most.
        ids = self.drafter.propose(min(limit, self.stop_at - len(self.tokens) - 1))
        ends = next((index for index, token in enumerate(ids) if token in self.end_ids), len(ids))
        self.sent = Draft(self.sent.number + 1, len(self.tokens), ids[:ends])
        return self.sent

    # ---- outputs ----------------------------------------------------------------------------------------

    @property
    def awaits_start(self) -> bool:
        """Step mode: what the last stage computed before it was told of the owner would never be answered."""
        return self.last and self.step_mode and not self.started

    @property
    def output_end(self) -> int:
        """Outputs exist for positions below this."""
        if self.log is not None:
            return self.log.end
        return max(0, len(self.tokens) - 1)

    def follow(self, targets: list[Target]) -> None:
        """Replace the targets; one that stays (same peer, layer and epoch) keeps its place."""
        self.targets = [next((old for old in self.targets if old.same_as(new)), new) for new in targets]
        self.started = True

    def next_rows(self, target: Target, max_rows: int) -> tuple[int, int] | None:
        """Positions ``[start, end)`` that ``target`` should be sent now."""
        end = min(self.output_end, target.cursor + max_rows)
        if target.cursor >= end:
            return None
        if self.last and target.peer is not None and self.ended:
            return None
        return target.cursor, end

    def is_decode(self, start: int, end: int) -> bool:
        """Are the outputs at ``start .. end - 1`` one token's, or a token's and its draft's?"""
        drafted = self.draft != 0 and end > self.draft_start
        return end - start == 1 or (drafted and end - start <= MAX_DRAFT + 1)

    def remember_trace(self, end: int, hops: Sequence[bytes]) -> None:
        if len(self.trace) > 64:
            self.trace.clear()
        self.trace[end] = hops
