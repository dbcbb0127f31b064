"""What a session is to generate, and what it has: the committed tokens, the only truth about it. Pure."""

from __future__ import annotations

import operator
import reprlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from swarm import kv
from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.errors import BadRequest, ProtocolError, TooLong
from swarm.models import ModelProfile
from swarm.protocol import check_end_ids, logprobs_from_wire, timings_from_wire
from swarm.sampling import SamplingParams, whole_number
from swarm.types import HopTiming
from swarm.wire import AS_IT_IS, Wire

FinishReason = Literal["stop", "length"]

MAX_TOKENS = 2**32 - 1
"""As many as a session may ask for: what a delegation's field holds. A text ends at the model's limit long before."""


class Tokens(Protocol):
    """What a chain needs to know of its session's tokens: those of a generation, or the inputs of step mode."""

    tokens: list[int]
    stop_at: int
    finish_reason: FinishReason | None
    wire: Wire
    """How the session's hidden states travel; the chain adds its first route's cuts."""
    kv: str
    """How its stages keep keys and values, see ``swarm.kv``."""

    def __len__(self) -> int: ...

    @property
    def kept(self) -> int:
        """Positions before this one may stay at the stages when the route changes."""

    @property
    def unchanged(self) -> int:
        """... and before this one at a stage that comes back after it was off the route."""

    @property
    def generated(self) -> int: ...

    @property
    def reusable(self) -> bool:
        """Stages may use for it what they computed in earlier sessions, and the other way round."""

    @property
    def step(self) -> pb.Step | None:
        """In step mode, the newest input."""

    def describe(self, message: pb.Open, *, last: bool) -> None:
        """What a stage, and the ``last`` one above all, has to know."""

    def commit(self, output: pb.Output) -> None:
        """Take what is new of it. Raises ``ProtocolError`` for what can't be the next output."""


def token_ids(prompt: Sequence[int]) -> list[int]:
    """A prompt that is no text; raises ``BadRequest`` for what is no prompt at all."""
    try:
        if isinstance(prompt, bytes | bytearray) or any(isinstance(token_id, bool) for token_id in prompt):
            raise TypeError
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise BadRequest(f"the prompt must be a text or a list of token ids, not {reprlib.repr(prompt)}") from None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate. ``prompt`` is token ids."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    end_ids: frozenset[int]
    no_kv_cache: bool = False
    speculate: bool = False
    """Drafts may be tried; they never change the text."""
    generated: tuple[int, ...] = ()
    """Tokens that an earlier owner of this generation committed already; it goes on after them."""
    wire: Wire = AS_IT_IS
    """How hidden states travel, with the cuts of an earlier owner's first route."""
    kv: str = kv.MODEL
    """How stages keep keys and values."""

    def __post_init__(self) -> None:
        if self.kv not in kv.KINDS:
            raise BadRequest(
                f"keys and values can't be kept as {reprlib.repr(self.kv)}; there are: {', '.join(kv.KINDS)}"
            )
        check_end_ids(self.end_ids)
        if not self.prompt:
            raise BadRequest("the prompt is empty")
        object.__setattr__(self, "max_tokens", whole_number("max_tokens", self.max_tokens, 1, MAX_TOKENS))
        if len(self.generated) >= self.max_tokens:
            raise BadRequest(f"all {self.max_tokens} tokens were generated already")


def length_of(request: GenerationRequest, profile: ModelProfile, settings: Settings) -> int:
    """Number of tokens, prompt included, at which the text ends; raises :class:`TooLong` if it has them already."""
    limit = min(profile.max_positions, settings.peer.max_cache_tokens_per_session)
    known = len(request.prompt) + len(request.generated)
    if known >= limit:
        raise TooLong(f"the text has {known} tokens; the limit is {limit} with at least one to come")
    return min(len(request.prompt) + request.max_tokens, limit)


@dataclass(frozen=True, slots=True)
class Generated:
    """One committed token."""

    index: int
    token_id: int
    hops: tuple[HopTiming, ...]
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Transcript:
    """``tokens`` holds prompt and generated tokens; they are appended at its end only, each once."""

    def __init__(self, request: GenerationRequest, stop_at: int, vocab_size: int) -> None:
        """``stop_at``: number of tokens, prompt included, at which the generation ends.

        Raises :class:`BadRequest` for tokens that are not in the vocabulary.
        """
        self.request = request
        self.stop_at = stop_at
        self.tokens: list[int] = [*request.prompt, *request.generated]
        if strange := [token_id for token_id in self.tokens if not 0 <= token_id < vocab_size]:
            raise BadRequest(f"token {strange[0]} is not in the vocabulary of {vocab_size}")
        self.fresh: deque[Generated] = deque()
        """Committed, and not yet given to the user."""
        self.finish_reason: FinishReason | None = None
        self.wire = request.wire
        self.kv = request.kv
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def kept(self) -> int:
        return len(self.tokens)

    @property
    def unchanged(self) -> int:
        """Positions before this one have had the same token since the session began."""
        return len(self.tokens)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def reusable(self) -> bool:
        return not self.request.no_kv_cache

    @property
    def step(self) -> pb.Step | None:
        """Tokens go round the ring, not in steps."""
        return None

    def describe(self, message: pb.Open, *, last: bool) -> None:
        request = self.request
        message.no_kv_cache = request.no_kv_cache
        if last:
            message.sampling.CopyFrom(request.sampling.to_wire())
            message.token_ids.extend(self.tokens)
            message.end_ids.extend(sorted(request.end_ids))
            message.stop_at = self.stop_at
            message.prompt_length = len(request.prompt)
            message.speculate = request.speculate

    def commit(self, output: pb.Output) -> None:
        """The commit rule: a token that is known is passed over, the next one is taken, a later one is refused.

        Raises :class:`ProtocolError` for a later one, and for one that is not in the vocabulary.
        """
        hops = timings_from_wire(output.hops)  # of one pass: they go to its first token
        for offset, token_id in enumerate(output.token_ids):
            position = output.start + 1 + offset
            if self.finish_reason is not None:
                break
            if position < len(self.tokens):
                continue
            if position > len(self.tokens):
                raise ProtocolError(f"token {position} came before {len(self.tokens)}")
            if token_id >= self._vocab_size:
                raise ProtocolError(f"token id {token_id} is not in the vocabulary of {self._vocab_size}")
            self._append(
                token_id,
                hops if offset == 0 else (),
                output.logprobs[offset] if offset < len(output.logprobs) else None,
            )

    def _append(self, token_id: int, hops: tuple[HopTiming, ...], logprobs: pb.Logprobs | None) -> None:
        logprob, top = logprobs_from_wire(logprobs, self._vocab_size) if logprobs else (None, ())
        token = Generated(self.generated, token_id, hops, logprob, top)
        self.tokens.append(token_id)
        self.fresh.append(token)
        if token_id in self.request.end_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.stop_at:
            self.finish_reason = "length"
