"""What the compute thread runs next. Pure: steps and the time come in, a batch goes out.

Decode steps go first, then chunks of prompts up to ``engine.max_batch_tokens`` rows. Steps of one batch share a layer
sub-range. The oldest waiting step chooses it, or of prompts the one whose owner's turn it is; after a pass with prompts
the oldest decode step does.

Owners have equal shares, however many prompts they have: each has as many chunks in a pass as the one with the fewest,
and as many of the pieces below. A session's next chunk is submitted only when its last one is done, too late for the
pass that follows at once. So where that session is all that its owner has, and others wait, this pass waits for it.

While sessions decode, a chunk is run in pieces of a few rows (:mod:`peers.piece_size`), so that it holds none of them
up for long (chunked prefill as in Sarathi-Serve, Agrawal et al., OSDI 2024). A session's step is here for a part of its
time only; for the rest it is at other stages. So between two passes of decode steps there is one piece, and then the
next step is waited for, for not much longer than it usually takes: it finds the thread idle, and the processor, which
other stages may share. Where decode steps are always waiting, every other pass is theirs alone, and they leave room in
the others, however many they are. Each prompt has its piece: sessions that wait for their first token count as much as
those that wait for their next.

Sessions that once were in one pass stay together: they leave a stage at the same moment and so reach the next, and
while one stage works for all of them the others have nothing to do. So where tokens are sampled a pass takes so many
sessions as leave some for the other stages, like the micro-batches of a pipeline (GPipe, Huang et al., NeurIPS 2019):
with three equal stages a third of them. The rest follow in the next pass, and from then on the groups go round one
behind the other. Where there is one stage only, two groups become one: each waits for the other to come back.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice

from peers.drafting import MAX_DRAFT
from peers.executor import Done, StepReply, StepRequest
from peers.piece_size import PieceSize
from swarm.errors import SwarmError
from swarm.protocol import timings_from_wire

DECODING_S = 0.5
"""So long after a session's decode step another one is expected, unless it has ended."""
PATIENCE = 1.5
"""A piece waits so many times as long as it usually is from one pass with decode steps to the next."""
LEAST_TOGETHER = 4
"""So few sessions wait for memory, not for arithmetic: apart they would take longer and leave no one free earlier."""
RETURN_S = 0.005
"""So soon the sessions of a pass have their next steps here, if no other stage has to run anything before."""
MOST_PIECES = 8
"""So many in one pass at most, while sessions decode, and no more than there are prompts."""
SMOOTHING = 0.2
"""Weight of the newest time from one pass with decode steps to the next, in what is usual."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A step, from when it was submitted until all of it was run."""

    request: StepRequest
    """What is still to be run of it."""
    done: Done
    since: float
    piece: StepRequest = field(init=False)
    """What is run of it now."""
    parts: list[bytes] = field(default_factory=list)
    """Hidden states of the pieces that were run."""
    queue_s: float = 0.0
    compute_s: float = 0.0
    processor_s: float = 0.0

    def __post_init__(self) -> None:
        self.piece = self.request

    def cut(self, most: int) -> int:
        """Chooses the piece: ``most`` rows, but all together of which logits are wanted; returns how many."""
        request = self.request
        wanted = request.sample.rows if request.sample is not None else request.logit_rows
        before = min(most, request.rows - wanted)
        if request.rows <= most or before <= 0:
            self.piece = request
        else:
            ids, hidden = request.token_ids, request.hidden
            row_bytes = len(hidden) // request.rows if hidden is not None else 0
            self.piece = replace(
                request,
                rows=before,
                token_ids=None if ids is None else ids[:before],
                hidden=None if hidden is None else hidden[: before * row_bytes],
                sample=None,
                logit_rows=0,
            )
            self.request = replace(
                request,
                start=request.start + before,
                rows=request.rows - before,
                token_ids=None if ids is None else ids[before:],
                hidden=None if hidden is None else hidden[before * row_bytes :],
            )
        return self.piece.rows

    @property
    def is_prefill(self) -> bool:
        """A decode step has one row, and those of a draft."""
        return self.request.rows > MAX_DRAFT + 1 or bool(self.parts)

    def take(self, reply: StepReply | SwarmError, now: float) -> StepReply | SwarmError | None:
        """The answer to the whole request, from that to a piece; None if there are more to run."""
        if isinstance(reply, SwarmError):
            return reply
        if not self.parts and self.piece is self.request:
            return reply
        self.queue_s += reply.queue_s
        self.compute_s += reply.compute_s
        self.processor_s += reply.processor_s
        self.parts.append(reply.hidden)
        if self.piece is not self.request:
            self.since = now
            return None
        return replace(
            reply,
            hidden=b"".join(self.parts),
            queue_s=self.queue_s,
            compute_s=self.compute_s,
            processor_s=self.processor_s,
        )


class Batching:
    """The steps that wait. All methods are for one thread at a time."""

    def __init__(self, max_tokens: int, piece_tokens: int, stages: float = 1.0) -> None:
        """``stages``: so many like this one a token passes on its way round."""
        self._max_tokens = max_tokens
        self._piece_size = PieceSize(piece_tokens, stages)
        self._taken = (0, 0)
        """Decode steps and whole pieces of prompts in the last batch."""
        self._waiting: deque[Waiting] = deque()
        self._decoded_at = float("-inf")
        """When the last pass with decode steps was taken."""
        self._period_s = 0.0
        """How long after the one before that usually is."""
        self._had_piece = False
        """A prompt had its turn since then."""
        self._gave_way = False
        """The last batch left a prompt waiting, so that decode steps had a pass for themselves; the next one won't."""
        self._decoding: dict[int, float] = {}
        """When each session, by its cache's ``id``, had its last decode step here."""
        self._returning: set[int] = set()
        """Sessions of the last pass whose next steps will be here at once."""
        self._following: dict[int, str] = {}
        """Owners of the prompts of the last pass that are to go on, by the cache's ``id``."""
        self._returned_at: float | None = None
        """When neither is waited for any longer; None: the pass is not over."""
        self._turns: dict[str, int] = {}
        """When each owner had its last turn, in turns; those of whom it matters."""
        self._turn = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting)

    def add(self, *waiting: Waiting) -> None:
        self._waiting.extend(waiting)
        for one in waiting:
            self._returning.discard(id(one.request.cache))
            self._following.pop(id(one.request.cache), None)

    def forget(self, cache: int) -> list[Waiting]:
        """The steps with the cache of this ``id``: they wait no longer, and others don't wait for them."""
        self._decoding.pop(cache, None)
        self._returning.discard(cache)
        self._following.pop(cache, None)
        forgotten = [waiting for waiting in self._waiting if id(waiting.request.cache) == cache]
        self._waiting = deque(waiting for waiting in self._waiting if id(waiting.request.cache) != cache)
        return forgotten

    def hold_s(self, now: float) -> float | None:
        """When to ask again, if nothing is added: so long is something held back. None: nothing waits."""
        if not self._waiting:
            return None
        until = self._held_until(now) if self._returned_at is None else self._returned_at
        return max(0.0, until - now)

    def take(self, now: float) -> list[Waiting]:
        """The next batch; empty if there is none, or none yet. The rest keeps its order."""
        if self._awaits_return(now):
            return []
        held = now < self._held_until(now)
        steps_first = held or (self._had_piece and any(not waiting.is_prefill for waiting in self._waiting))
        oldest = next((waiting for waiting in self._waiting if not (steps_first and waiting.is_prefill)), None)
        if oldest is None:
            return []
        prompts = self._in_turn()
        layers = (prompts[0] if oldest.is_prefill else oldest).request.layers
        steps = [waiting for waiting in self._waiting if waiting.request.layers == layers and not waiting.is_prefill]
        if steps:
            steps = self._cohort(steps, now)
            self._note_decode(now)
        shares = self._shares([prompt for prompt in prompts if prompt.request.layers == layers], now)
        self._gave_way = bool(steps and shares) and not self._gave_way
        wanted = [(step, step.request.rows) for step in steps]
        batch: list[Waiting] = []
        rows = 0
        left = 0 if self._gave_way else min(sum(most for _, most in shares), self._max_tokens // 2)
        for waiting, most in wanted if self._gave_way else wanted + shares:
            prompt = waiting.is_prefill
            room = self._max_tokens - rows - (0 if prompt else left)
            if batch and room <= 0:
                continue
            rows += waiting.cut(max(1, min(most, room)) if prompt else most)
            batch.append(waiting)
            if prompt:
                self._had_piece = True
                self._turn += 1
                self._turns[waiting.request.owner] = self._turn
        self._taken = self._counted(batch, now)
        self._returning = {id(waiting.request.cache) for waiting in batch if len(waiting.request.round) == 1}
        going_on = [waiting.request for waiting in batch if waiting.is_prefill and waiting.request.more]
        self._following = {id(request.cache): request.owner for request in going_on}
        chosen = set(batch)
        self._waiting = deque(waiting for waiting in self._waiting if waiting not in chosen)
        return batch

    def took(self, seconds: float) -> None:
        """The last batch was computed in so long."""
        steps, pieces = self._taken
        if steps or pieces:
            self._piece_size.note(steps, pieces, seconds)

    def _counted(self, batch: Sequence[Waiting], now: float) -> tuple[int, int]:
        """Zeros for a batch that tells nothing: a prompt's last piece is shorter, and alone it is not cut in such."""
        rows = [waiting.piece.rows for waiting in batch if waiting.is_prefill]
        if not rows:
            return len(batch), 0
        whole = all(count % self._piece_size.rows == 0 for count in rows) and self._others_decode(now)
        return (len(batch) - len(rows), sum(rows) // self._piece_size.rows) if whole else (0, 0)

    def _others_decode(self, now: float) -> bool:
        """Sessions other than those whose prompts, or replays, wait."""
        waiting = {id(one.request.cache) for one in self._waiting if one.is_prefill}
        return any(now - at < DECODING_S and cache not in waiting for cache, at in self._decoding.items())

    def _held_until(self, now: float) -> float:
        held = self._had_piece and self._others_decode(now)
        return self._decoded_at + PATIENCE * self._period_s if held else float("-inf")

    def _owners_that_wait(self) -> set[str]:
        return {waiting.request.owner for waiting in self._waiting if waiting.is_prefill}

    def _in_turn(self) -> list[Waiting]:
        """All prompts, those first whose owners had their last turn longest ago."""
        prompts = [waiting for waiting in self._waiting if waiting.is_prefill]
        first = min((self._turns.get(prompt.request.owner, 0) for prompt in prompts), default=self._turn)
        self._turns = {owner: turn for owner, turn in self._turns.items() if turn >= first}
        return sorted(prompts, key=lambda prompt: self._turns.get(prompt.request.owner, 0))

    def _shares(self, prompts: list[Waiting], now: float) -> list[tuple[Waiting, int]]:
        """Which of the prompts are run next, and how many rows of each at most."""
        by_owner: dict[str, list[Waiting]] = {}
        for prompt in prompts:
            by_owner.setdefault(prompt.request.owner, []).append(prompt)
        if prompts and self._others_decode(now):
            places = (own[turn % len(own)] for turn in count() for own in by_owner.values())
            pieces = Counter(islice(places, min(len(prompts), MOST_PIECES)))
            return [(prompt, number * self._piece_size.rows) for prompt, number in pieces.items()]
        owners = self._owners_that_wait() | set(self._following.values())
        fewest = min((len(by_owner.get(owner, ())) for owner in owners), default=0)
        each = max(1, fewest) if len(owners) > 1 else len(prompts)
        return [(own[turn], self._max_tokens) for turn in range(each) for own in by_owner.values() if turn < len(own)]

    def _cohort(self, steps: list[Waiting], now: float) -> list[Waiting]:
        """The oldest of the steps: as many as are run now."""
        self._decoding |= {id(waiting.request.cache): now for waiting in steps}
        self._decoding = {key: at for key, at in self._decoding.items() if now - at < DECODING_S}
        most = len(steps) // LEAST_TOGETHER
        if most < 2:
            return steps
        passes = round(len(steps) * _at_once(steps[0].request.round) / len(self._decoding))
        return steps[: math.ceil(len(steps) / max(1, min(passes, most)))]

    def _awaits_return(self, now: float) -> bool:
        """Of two groups of sessions at the only stage, one waits for the other, and one owner's prompts for those of
        another that go on at once."""
        owners = self._owners_that_wait()
        if any(not waiting.is_prefill for waiting in self._waiting):
            awaited = bool(self._returning)
        else:
            awaited = bool(owners) and not owners.issuperset(self._following.values())
        if not awaited:
            self._returned_at = None
            return False
        if self._returned_at is None:
            self._returned_at = now + RETURN_S
        if now < self._returned_at:
            return True
        self._returning, self._following, self._returned_at = set(), {}, None
        return False

    def _note_decode(self, now: float) -> None:
        since_s = now - self._decoded_at
        if since_s < DECODING_S:
            self._period_s += SMOOTHING * (since_s - self._period_s)
        self._decoded_at, self._had_piece = now, False


def _at_once(ring: Sequence[bytes]) -> int:
    """How many passes are under way round a ring when its slowest stage is always at work; 1 if that is not known."""
    timings = timings_from_wire(ring)
    slowest_s = max((timing.compute_s for timing in timings), default=0.0)
    return int(sum(timing.compute_s + timing.link_s for timing in timings) / slowest_s) if slowest_s > 0 else 1
