"""Stands for a model, so that no token can be lost, doubled or misplaced unnoticed."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm.types import LayerRange

_MASK = (1 << 64) - 1
BROKEN_ROW = b"\xff" * 8
"""Stands for a row that is not finite; its beginning does, where rows are rounded."""


def mix(*values: int) -> int:
    """A 64-bit hash (splitmix64's finaliser over a running sum)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + value) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


@dataclass
class ToyCache:
    """For each layer and position, a hash of all inputs up to there; what a KV cache is to attention."""

    layers: LayerRange
    capacity: int
    length: int = 0
    serial: int = field(default_factory=itertools.count().__next__)
    prefix: dict[int, list[int]] = field(default_factory=dict)

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)
        for column in self.prefix.values():
            del column[length:]


class ToyDecoder:
    """A decoder whose next token depends on every token and every layer before it.

    A hidden state is one 64-bit number. Whatever is lost, doubled, misordered or run through a layer twice
    changes every later token.
    """

    ROW_BYTES = 8
    ROUNDED_BYTES = 4
    """Of a row on a wire that rounds: the number's beginning."""

    def __init__(self, num_layers: int, vocab_size: int, seed: int, echo: float = 0.0) -> None:
        """``echo``: share of tokens that are those which followed the token before them last time."""
        self.num_layers, self.vocab_size, self.seed, self.echo = num_layers, vocab_size, seed, echo

    def run(self, layers: LayerRange, cache: ToyCache, start: int, rows: Sequence[int]) -> list[int]:
        """``rows``: token ids for layer 0, else hidden states; returns the hidden states after ``layers``."""
        if start > cache.length or cache.layers != layers or start + len(rows) > cache.capacity:
            raise AssertionError(f"rows at {start} on a cache of {cache.length} for {cache.layers}, run as {layers}")
        cache.truncate(start)
        outputs = []
        for row in rows:
            state = row
            for layer in range(layers.start, layers.end):
                column = cache.prefix.setdefault(layer, [])
                column.append(mix(column[-1] if column else layer, state))
                state = mix(self.seed, layer, state, column[-1])
            outputs.append(state)
        cache.length = start + len(rows)
        return outputs

    def caches(self, capacity: int, cuts: Sequence[int] = ()) -> list[ToyCache]:
        """Of all layers, for :meth:`run_all`; ``cuts``: layers before which rows are rounded."""
        bounds = [0, *cuts, self.num_layers]
        return [ToyCache(LayerRange(start, end), capacity) for start, end in itertools.pairwise(bounds)]

    def run_all(self, caches: Sequence[ToyCache], rows: Sequence[int]) -> list[int]:
        """The hidden states of ``rows``, which are token ids that follow those before, after the last layer."""
        states = list(rows)
        for cache in caches:
            if cache.layers.start:
                states = self.from_wire(self.to_wire(states, self.ROUNDED_BYTES), self.ROUNDED_BYTES)
            states = self.run(cache.layers, cache, cache.length, states)
        return states

    @classmethod
    def to_wire(cls, states: Sequence[int], row_bytes: int) -> bytes:
        return b"".join(state.to_bytes(cls.ROW_BYTES, "big")[:row_bytes] for state in states)

    @classmethod
    def from_wire(cls, data: bytes, row_bytes: int) -> list[int]:
        rows = (data[start : start + row_bytes] for start in range(0, len(data), row_bytes))
        return [int.from_bytes(row.ljust(cls.ROW_BYTES, b"\0"), "big") for row in rows]

    def token(self, state: int, seed: int, history: Sequence[int]) -> int:
        """What follows ``history``, whose last token's hidden state is ``state``."""
        noise = mix(state, len(history), seed)
        if noise >> 32 < self.echo * 2**32:
            for place in range(len(history) - 2, -1, -1):
                if history[place] == history[-1]:
                    return history[place + 1]
        return noise % self.vocab_size

    def logits(self, states: Sequence[int]) -> bytes:
        """Float32 ``[rows, vocabulary]``, for step mode: every number depends on all of the row's state."""
        values = [mix(state, token) % 2**24 for state in states for token in range(self.vocab_size)]
        return struct.pack(f"<{len(values)}f", *values)

    def generate(
        self, prompt: Sequence[int], max_tokens: int, seed: int, end_ids: frozenset[int], cuts: Sequence[int] = ()
    ) -> list[int]:
        """What an undisturbed run gives; ``cuts``: layers before which rows are rounded."""
        caches = self.caches(len(prompt) + max_tokens, cuts)
        tokens, rows = list(prompt), list(prompt)
        while True:
            state = self.run_all(caches, rows)[-1]
            tokens.append(self.token(state, seed, tokens))
            if tokens[-1] in end_ids or len(tokens) == len(prompt) + max_tokens:
                return tokens[len(prompt) :]
            rows = tokens[-1:]
