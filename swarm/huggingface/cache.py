"""What stands where transformers keeps keys and values: the sequences of a batch, and the sessions that hold them."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from transformers.cache_utils import Cache

from swarm.blocking_client import Client
from swarm.errors import BadRequest
from swarm.stepping import StepAnswer, StepSession


@dataclass(slots=True)
class _Row:
    """One sequence of a batch, column by column; a padded column is masked and never reaches the swarm."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)

    def copy(self) -> _Row:
        return _Row(list(self.ids), list(self.mask))

    @property
    def tokens(self) -> list[int]:
        return [token for token, shown in zip(self.ids, self.mask, strict=True) if shown]


class SwarmCache(Cache):
    """``cache``, once ``past_key_values``: the sequences of a batch, and the sessions that hold them in the swarm.

    Keep it across calls of ``generate`` to go on with a conversation; :meth:`close` frees the peers' memory, and so
    do the model's ``close`` and the garbage collector, for nobody closes the cache in a result of ``generate``.
    Sessions survive the loss of peers; if one ends all the same, for want of peers or after a long rest, the next call
    opens another and computes the text again.
    """

    def __init__(self, client: Client, capacity: int) -> None:
        """``capacity``: tokens of each sequence for which memory is reserved at first; it grows when needed."""
        super().__init__(layers=[])
        self._client = client
        self._capacity = capacity
        self._rows: list[_Row] = []
        self._sessions: list[StepSession] = []  # always the same list
        weakref.finalize(self, _forget, client, self._sessions).atexit = False
        self._computed_before = 0
        self._is_user_defined = False  # what generate says of a cache that it was given

    @property
    def positions_computed(self) -> int:
        """Positions that the swarm was asked to compute for this cache, those of rebuilds not counted."""
        return self._computed_before + sum(session.computed for session in self._sessions)

    @property
    def sessions(self) -> Sequence[StepSession]:
        """For a look at routes and rebuilds."""
        return tuple(self._sessions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the stages of all sessions. The tokens stay: used again, the cache computes them again.

        A session that has ended, with the model at the latest, has none.
        """
        sessions = self._sessions.copy()
        self._sessions.clear()
        self._computed_before += sum(session.computed for session in sessions)
        left = [session for session in sessions if session.error is None]
        if left:
            self._client.run(_close(left))

    def reserve(self, capacity: int) -> None:
        """Sessions that are opened from now on have room for so many tokens at least."""
        self._capacity = max(self._capacity, capacity)

    # ---- what transformers asks of a cache --------------------------------------------------------------

    def __len__(self) -> int:
        return self._client.profile.num_layers

    def __repr__(self) -> str:
        return f"SwarmCache({self.batch_size} sequences of {self.get_seq_length()} tokens)"

    def __deepcopy__(self, memo: dict[int, Any]) -> SwarmCache:
        twin = SwarmCache(self._client, self._capacity)
        twin._rows = [row.copy() for row in self._rows]
        return twin

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns, padded ones included."""
        return len(self._rows[0].ids) if self._rows else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return len(self._rows)

    @property
    def is_initialized(self) -> bool:
        return bool(self._rows)

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Whether a layer has no keys and values but a state; generate then gives it all tokens again."""
        return [False] * len(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: remove so many columns; positive, as it was in older versions: keep so many."""
        length = self.get_seq_length()
        keep = length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        for row in self._rows:
            del row.ids[max(0, keep) :], row.mask[max(0, keep) :]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._rows = [self._rows[index].copy() for index in beam_idx.tolist()]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows = [row.copy() for row in self._rows for _ in range(repeats)]

    def reset(self) -> None:
        self._rows = []

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise BadRequest("keys and values are kept by the peers; this cache is for SwarmForCausalLM alone")

    # ---- what the model asks of it ----------------------------------------------------------------------

    @property
    def masks(self) -> list[list[bool]]:
        """Of each sequence, the columns that are no padding."""
        return [list(row.mask) for row in self._rows]

    def advance(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, keep: int, hidden: bool
    ) -> list[StepAnswer | None]:
        """Append ``input_ids`` ``[batch, new]``; for each row, what the model says after the last ``keep`` columns.

        ``None`` for a row in which all of those are padding.
        """
        new, past = input_ids.tolist(), self.get_seq_length()
        if not self._rows:
            self._rows = [_Row() for _ in new]
        if len(new) != len(self._rows):
            raise BadRequest(f"a batch of {len(new)} with a cache of {len(self._rows)} sequences")
        total = past + input_ids.shape[1]
        mask = [[True] * total] * len(new) if attention_mask is None else attention_mask.bool().tolist()
        if attention_mask is not None and list(attention_mask.shape) != [len(new), total]:
            raise BadRequest(f"attention_mask is {list(attention_mask.shape)}, not [{len(new)}, {total}]")
        before = [row.copy() for row in self._rows]
        try:
            for row, ids, shown in zip(self._rows, new, mask, strict=True):
                row.ids += ids
                row.mask = shown.copy()
            wanted = [(row.tokens, sum(row.mask[: total - keep])) for row in self._rows]
            return self._client.run(self._run(wanted, hidden))
        except BaseException:
            self._rows = before
            raise

    async def _run(self, wanted: list[tuple[list[int], int]], hidden: bool) -> list[StepAnswer | None]:
        """For each sequence the answers from a position on; all sessions at once, so that peers batch them."""
        asked = [index for index, (tokens, answer_from) in enumerate(wanted) if answer_from < len(tokens)]
        longest = max((len(wanted[index][0]) for index in asked), default=0)
        sessions = await self._matched([wanted[index][0] for index in asked], longest)
        steps = [session.run(*wanted[index], hidden=hidden) for index, session in zip(asked, sessions, strict=True)]
        answers: list[StepAnswer | None] = [None] * len(wanted)
        for index, answer in zip(asked, await asyncio.gather(*steps, return_exceptions=True), strict=True):
            if isinstance(answer, BaseException):
                raise answer
            answers[index] = answer
        return answers

    async def _matched(self, sequences: list[list[int]], longest: int) -> list[StepSession]:
        """A session for each sequence: the one that holds most of it, and a fresh one where none is left."""
        profile, settings = self._client.profile, self._client.settings
        limit = min(profile.max_positions, settings.peer.max_cache_tokens_per_session)
        if longest > self._capacity:
            self._capacity = 2 * longest
        capacity = max(longest, min(self._capacity, limit))
        usable = [s for s in self._sessions if s.error is None and longest <= s.inputs.stop_at]
        pairs = [(s.shared(tokens), i, j) for i, tokens in enumerate(sequences) for j, s in enumerate(usable)]
        taken: dict[int, int] = {}
        for _, row, number in sorted(pairs, key=lambda pair: (-pair[0], pair[1] != pair[2], pair[1])):
            if row not in taken and number not in taken.values():
                taken[row] = number
        kept = [usable[number] for number in taken.values()]
        others = [session for session in self._sessions if session not in kept]
        self._computed_before += sum(session.computed for session in others)
        await _close(others)
        self._sessions[:] = kept
        matched = []
        for row in range(len(sequences)):
            if row in taken:
                matched.append(usable[taken[row]])
            else:
                session = await self._client.step_session(capacity).__aenter__()
                self._sessions.append(session)
                matched.append(session)
        return matched


async def _close(sessions: Sequence[StepSession]) -> None:
    await asyncio.gather(*(session.close() for session in sessions))


def _forget(client: Client, sessions: list[StepSession]) -> None:
    if sessions:
        client.begin(_close(sessions))
