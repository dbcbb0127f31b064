"""KV caches and logs of sessions that ended, for later sessions of the same owner that begin with the same tokens.

What is kept yields at once to sessions that need the room (:meth:`KVBudget.keep`), the least recently used first. It
serves nobody but the owner whose session computed it: another owner could otherwise have taken the name of a text for
rows that were computed from another one, or find out by the time to the first token what others asked.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from peers.checkpoints import CheckpointLog
from peers.executor import Cache
from peers.kv_budget import KVBudget
from peers.stage import Stage
from swarm.prefix import BLOCK, NAME_BYTES, cut, shared_tokens
from swarm.types import LayerRange, PeerId


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What one stage of one session had computed, for the tokens that ``chain`` names."""

    name: str
    owner: PeerId
    layers: LayerRange
    wire: str
    """Of the rows in ``log``."""
    kv: str
    """Of the rows in ``cache``."""
    chain: bytes
    cache: Cache
    log: CheckpointLog | None
    inputs: tuple[int, ...]
    """First stage: the token ids."""
    since: float
    """When its session ended."""


class PrefixCache:
    """At most ``most`` entries, within what sessions leave of ``budget``.

    ``copy``: makes a cache for so many positions that begins with so many of another.
    """

    def __init__(self, budget: KVBudget, most: int, copy: Callable[[Cache, int, int], Cache]) -> None:
        self._budget = budget
        self._most = most
        self._copy = copy
        self._entries: OrderedDict[str, Kept] = OrderedDict()
        self._number = itertools.count()
        self._closed = False

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, stage: Stage, chain: bytes, size_of: Callable[[int], int], now: float) -> None:
        """``stage`` ends after a text that ``chain`` names; ``size_of``: bytes that its cache and log take for so many
        positions."""
        tokens = min(len(chain) // NAME_BYTES * BLOCK, stage.settled) // BLOCK * BLOCK
        if self._closed or not tokens or self._most < 1:
            return
        chain = cut(chain, tokens)
        same = self._of(stage.owner, stage.layers, stage.output_wire, stage.kv)
        if longer := next((entry for entry in same if entry.chain.startswith(chain)), None):
            self._touch(longer)
            return
        for entry in same:
            if chain.startswith(entry.chain):
                self._drop(entry)
        name, cache = str(next(self._number)), self._copy(stage.cache, tokens, tokens)
        if not self._budget.keep(name, size_of(tokens), lambda: self._entries.pop(name)):
            return
        if stage.log is not None:
            stage.log.truncate(tokens)
        self._entries[name] = Kept(
            name=name,
            owner=stage.owner,
            layers=stage.layers,
            wire=stage.output_wire,
            kv=stage.kv,
            chain=chain,
            cache=cache,
            log=stage.log,
            inputs=tuple(stage.inputs[:tokens]),
            since=now,
        )
        if len(self._entries) > self._most:
            self._drop(next(iter(self._entries.values())))

    def find(self, owner: PeerId, layers: LayerRange, wire: str, kv: str, chain: bytes) -> tuple[Kept, int] | None:
        """What ``owner`` may use for a text that begins as ``chain`` says, and for how many tokens."""
        best = max(self._of(owner, layers, wire, kv), key=lambda entry: shared_tokens(entry.chain, chain), default=None)
        tokens = shared_tokens(best.chain, chain) if best is not None else 0
        if best is None or not tokens:
            return None
        self._touch(best)
        return best, tokens

    def holds(self, entry: Kept) -> bool:
        return entry.name in self._entries

    def expire(self, before: float) -> None:
        """Forget what was kept before that time."""
        for entry in [entry for entry in self._entries.values() if entry.since < before]:
            self._drop(entry)

    def close(self) -> None:
        """Forget everything, and keep nothing more: this peer is leaving."""
        self._closed = True
        for entry in list(self._entries.values()):
            self._drop(entry)

    def _of(self, owner: PeerId, layers: LayerRange, wire: str, kv: str) -> list[Kept]:
        wanted = (owner, layers, wire, kv)
        return [e for e in self._entries.values() if (e.owner, e.layers, e.wire, e.kv) == wanted]

    def _touch(self, entry: Kept) -> None:
        self._entries.move_to_end(entry.name)
        self._budget.touch_kept(entry.name)

    def _drop(self, entry: Kept) -> None:
        del self._entries[entry.name]
        self._budget.forget(entry.name)
