"""What a stage needs of whatever computes: the engine with torch, or a toy in the simulator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from swarm import kv
from swarm.errors import SwarmError
from swarm.models import ModelProfile
from swarm.sampling import SampleResult, SamplingParams
from swarm.types import LayerRange
from swarm.wire import MODEL


class Cache(Protocol):
    """A session's KV cache: positions ``0 .. length - 1``."""

    @property
    def length(self) -> int: ...

    def truncate(self, length: int) -> None: ...


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Sample the token that follows a row, and for as long as a draft is right, those that follow the next ones."""

    params: SamplingParams
    history: Sequence[int]
    """All tokens up to and including the first row's that is sampled after."""
    prompt_length: int
    rows: int = 1
    """So many of the step's last rows, of which the first is sampled after."""
    drafts: tuple[int, ...] = ()
    """The tokens from which the rows after the first were run, as far as they are known; fewer than ``rows``."""


@dataclass(frozen=True, slots=True)
class StepRequest:
    """Rows ``start .. start + rows - 1`` of one session through ``layers``."""

    layers: LayerRange
    cache: Cache
    start: int
    rows: int
    token_ids: Sequence[int] | None
    """Given when ``layers`` starts at 0."""
    hidden: bytes | None
    """``[rows, hidden]`` as ``input_wire`` says, given otherwise."""
    sample: SampleRequest | None = None
    logit_rows: int = 0
    """Step mode: how many of the last rows want logits."""
    want_hidden: bool = False
    """Step mode: the last layer's hidden states are wanted, too."""
    input_wire: str = MODEL
    output_wire: str = MODEL
    """How hidden states come in and go out, see ``swarm.wire``."""
    owner: str = ""
    """Of the session: prompts of different owners take turns."""
    more: bool = False
    """Rows of the session that its owner knows already are to follow these."""
    round: Sequence[bytes] = ()
    """Where tokens are sampled: what the stages said of their time when the session's last one went round the ring."""


@dataclass(frozen=True, slots=True)
class StepReply:
    hidden: bytes
    """Outputs ``[rows, hidden]`` as ``StepRequest.output_wire`` says; empty at the last layer unless wanted."""
    tokens: tuple[SampleResult, ...]
    """What was asked for in ``StepRequest.sample``: one token, and one for each draft that was right."""
    logits: bytes
    """Row-major float32 ``[logit_rows, vocabulary]``."""
    queue_s: float
    compute_s: float
    batch: int
    processor_s: float = 0.0
    """Of ``compute_s``, without the time in which other processes had the processor; all of it on other devices."""


Done = Callable[[StepReply | SwarmError], None]


class Executor(Protocol):
    """Computes steps of the layers that this peer holds. Steps of many sessions may run as one batch."""

    @property
    def profile(self) -> ModelProfile: ...

    @property
    def layers(self) -> LayerRange: ...

    @property
    def kv_block(self) -> int:
        """Positions for which a cache gets memory at a time."""

    @property
    def passes(self) -> int:
        """That it has run, of anybody's steps."""

    def new_cache(self, layers: LayerRange, capacity: int, kind: str = kv.MODEL) -> Cache:
        """Empty, for at most ``capacity`` positions; ``kind``: see ``swarm.kv``. Raises :class:`BadRequest`."""

    def copy_cache(self, cache: Cache, length: int, capacity: int) -> Cache:
        """A cache for ``capacity`` positions that begins with the first ``length`` of ``cache``."""

    def cache_bytes(self, layers: LayerRange, positions: int, kind: str = kv.MODEL) -> int:
        """What so many positions take, in whole blocks."""

    def forget(self, cache: Cache) -> None:
        """Nobody wants its steps any more: ``done`` gets ``Cancelled`` for those that wait."""

    def submit(self, step: StepRequest, done: Done) -> None:
        """Truncate the cache to ``step.start``, run the rows, extend the cache; then ``done``, once, on the loop.

        ``done`` gets ``BadTensor`` when the input isn't finite, ``Internal`` when the output isn't or the device fails.
        """


async def run(executor: Executor, step: StepRequest) -> StepReply:
    """One step, awaited; raises what :meth:`Executor.submit` would hand to ``done``."""
    future: asyncio.Future[StepReply | SwarmError] = asyncio.get_running_loop().create_future()
    executor.submit(step, lambda reply: None if future.done() else future.set_result(reply))
    reply = await future
    if isinstance(reply, SwarmError):
        raise reply
    return reply
