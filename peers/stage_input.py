"""What comes to a stage, checked: the owner's open, and frames that wait for their turn. Values without I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm import kv
from swarm.errors import BadRequest
from swarm.sampling import SamplingParams
from swarm.types import LayerRange, PeerId, SessionId
from swarm.wire import MODEL, WIRES

MAX_SESSION_CHARS = 64
MOST_JOINED = 32
"""Rows of single tokens that wait for one pass; each that joins is one copy of those before it."""


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What an owner asks of a stage, checked."""

    session: SessionId
    epoch: int
    layers: LayerRange
    max_positions: int
    keep: int
    previous: frozenset[PeerId]
    step_mode: bool
    no_kv_cache: bool
    sampling: SamplingParams
    token_ids: tuple[int, ...]
    end_ids: frozenset[int]
    stop_at: int
    prompt_length: int
    speculate: bool = False
    prefix: bytes = b""
    """Names the tokens that a new stage may take over from an earlier session, see ``swarm.prefix``."""
    input_wire: str = MODEL
    output_wire: str = MODEL
    """How hidden states come in and go out, see ``swarm.wire``."""
    kv: str = kv.MODEL
    """How keys and values are kept, see ``swarm.kv``."""

    def __post_init__(self) -> None:
        if not 0 < len(self.session) <= MAX_SESSION_CHARS:
            raise BadRequest(f"a session id has 1 to {MAX_SESSION_CHARS} characters")
        for wire in (self.input_wire, self.output_wire):
            if wire not in WIRES:
                raise BadRequest(f"no such wire as {wire[:20]!r}; there are: {', '.join(WIRES)}")
        if self.kv not in kv.KINDS:
            raise BadRequest(f"keys and values can't be kept as {self.kv[:20]!r}; there are: {', '.join(kv.KINDS)}")
        if self.keep > self.max_positions or len(self.token_ids) > self.max_positions:
            raise BadRequest(f"more tokens than the session's {self.max_positions} positions")


@dataclass(frozen=True, slots=True)
class StepMark:
    """Step mode: which input of the owner rows belong to, and what it wants to know of them."""

    number: int = 0
    answer_from: int = 0
    hidden: bool = False


NO_STEP = StepMark()


@dataclass(slots=True)
class Work:
    """One frame that waits for its turn: rows ``start .. start + rows - 1``."""

    epoch: int
    start: int
    rows: int
    hidden: bytes | None = None
    token_ids: tuple[int, ...] = ()
    hops: Sequence[bytes] = ()
    """What the stages before say of their time, as they said it."""
    sender: PeerId | None = None
    sequence: int = 0
    want_ack: bool = False
    received_at: float = 0.0
    draft: int = 0
    draft_start: int = 0
    """Rows at this position and later are guesses, of the draft that the last stage numbered ``draft``; 0: none are."""
    step: StepMark = NO_STEP

    def join(self, later: Work) -> None:
        """Take over the rows of the frame that came after this one."""
        if self.hidden is not None and later.hidden is not None:
            self.hidden += later.hidden
        self.token_ids, self.rows = self.token_ids + later.token_ids, self.rows + later.rows
        self.hops, self.sequence = later.hops, later.sequence
        self.draft, self.draft_start = later.draft, later.draft_start

    def cut(self, end: int) -> None:
        """Leave only the rows before ``end``."""
        rows = min(self.rows, end - self.start)
        if self.hidden is not None:
            self.hidden = self.hidden[: len(self.hidden) // self.rows * rows]
        self.token_ids, self.rows = self.token_ids[:rows], rows
