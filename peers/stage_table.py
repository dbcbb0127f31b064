"""The stages of a peer: admitted within the KV budget, grown in it, freed when they end or have to give way.

A stage holds memory for the positions that are known to come, and gets more block by block. Sessions rarely become as
long as they may, so more is promised than there is, :data:`OVERCOMMIT` times the budget at most. Where it runs out,
somebody gives way: kept prefixes first, then idle sessions, then of those that run the one with the fewest positions,
which costs least to compute again (preemption by recomputation as in vLLM, Kwon et al., SOSP 2023). Its owner is told
``busy`` and rebuilds the route. That this order is the same at all peers, and that a session never waits for room while
it holds any (``swarm/chain.py``), keeps sessions from blocking each other for good: the longest always goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from peers.checkpoints import CheckpointLog
from peers.executor import Executor
from peers.kv_budget import KVBudget
from peers.outside import Outside
from peers.prefix_cache import PrefixCache
from peers.runner import StageRunner
from peers.stage import Stage
from peers.stage_input import OpenRequest
from swarm.awake import Standstills
from swarm.config import Settings
from swarm.errors import Busy, Evicted, SwarmError
from swarm.prefix import cut
from swarm.types import PeerId, SessionId
from swarm.wire import encoding_of, row_bytes

logger = logging.getLogger(__name__)

StageKey = tuple[SessionId, int]
"""Session and first layer: one peer may run two stages of one session."""

OVERCOMMIT: Final = 2
"""All open sessions at their full lengths take so many times the budget at most."""
LEAST_WAITING_BYTES: Final = 256 * 1024 * 1024
"""Frames that are not computed yet and answers that are not read yet may take as much memory as the budget has, and so
much where that is less."""
OWED_S: Final = 3.0
"""So long after a session gave way, or asked to come back, newcomers have to wait for it. It asks more often."""


@dataclass(frozen=True, slots=True)
class Debt:
    """A session had to give way, and comes before newcomers."""

    until: float
    """Newcomers wait so long for it, and longer when it asks again ..."""
    end: float
    """... but never longer than this."""


class StageTable:
    """Every stage has a key and a reservation; :meth:`free` gives all of it back, or to :attr:`prefixes`."""

    def __init__(self, executor: Executor, settings: Settings, tasks: asyncio.TaskGroup) -> None:
        self.executor = executor
        self.settings = settings
        self.budget = KVBudget(
            settings.peer.kv_budget_mb * 1024 * 1024,
            settings.peer.max_cached_sessions,
            settings.peer.cache_eviction_policy,
        )
        most_kept = settings.peer.max_cached_sessions if settings.peer.prefix_cache else 0
        self.prefixes = PrefixCache(self.budget, most_kept, executor.copy_cache)
        self.most_waiting_bytes = max(self.budget.limit_bytes, LEAST_WAITING_BYTES)
        self.runners: dict[StageKey, StageRunner] = {}
        self._tasks = tasks
        self._lingering: dict[StageKey, asyncio.TimerHandle] = {}
        self._owed: dict[SessionId, Debt] = {}
        self._emptied = asyncio.Event()
        self._emptied.set()

    async def empty(self) -> None:
        """Wait until there is no stage left."""
        await self._emptied.wait()

    def of_session(self, session: str) -> list[StageRunner]:
        return [runner for (held, _), runner in self.runners.items() if held == session]

    # ---- coming -----------------------------------------------------------------------------------------

    def admit(self, owner: PeerId, request: OpenRequest, outside: Outside) -> StageRunner:
        """Reserve memory for what is known to come, build the stage, with what an earlier one left for it.

        Raises :class:`Busy`.
        """
        profile, key = self.executor.profile, (request.session, request.layers.start)
        last = request.layers.end == profile.num_layers
        room = self._in_blocks(max(request.keep, len(request.token_ids), 1))
        prefix = cut(request.prefix, request.keep)  # room is reserved for no more
        found = self.prefixes.find(owner, request.layers, request.output_wire, request.kv, prefix)
        self._let_in(key, request, room)
        try:
            first = request.layers.start == 0
            if found is not None and self.prefixes.holds(found[0]):
                kept, tokens = found
                cache = self.executor.copy_cache(kept.cache, tokens, request.max_positions)
                log = kept.log.copy(tokens) if kept.log is not None else None
                stage = Stage(request, owner, first=first, last=last, cache=cache, log=log)
                stage.inputs.extend(kept.inputs[: stage.have])
            else:
                log = None if last else CheckpointLog(self._logged_bytes(request))
                cache = self.executor.new_cache(request.layers, request.max_positions, request.kv)
                stage = Stage(request, owner, first=first, last=last, cache=cache, log=log)
        except BaseException:
            self.budget.release(_held_as(key))
            raise
        settings, tasks = self.settings, self._tasks
        runner = StageRunner(stage, self.executor, outside, settings, tasks, self.make_room, self.bound_waiting)
        runner.room = room
        self.runners[key] = runner
        self._emptied.clear()
        return runner

    def _let_in(self, key: StageKey, request: OpenRequest, room: int) -> None:
        """Reserve ``room`` positions, if need be at the cost of idle sessions. Whoever comes leaves every session,
        itself included, a block to grow by: else one would have to give way at once."""
        full, size = self._size(request, request.max_positions), self._size(request, room)
        limit = self.budget.limit_bytes
        if full > limit:  # nobody waits for what can't come
            raise Busy(f"KV budget: {full} bytes asked for, {limit} are all there is")
        self._let_those_owed_first(request.session)
        stages = {_held_as(held): runner for held, runner in self.runners.items()}
        promised = sum(self._size(runner.stage, runner.stage.max_positions) for runner in stages.values())
        needed = size + self._to_grow(request, room)
        needed += sum(self._to_grow(runner.stage, runner.room) for runner in stages.values())
        free = self.budget.free_bytes
        self._mark_idle()
        for idle in self.budget.idle:
            if promised + full <= OVERCOMMIT * limit and needed <= free:
                break
            runner = stages[idle]
            promised -= self._size(runner.stage, runner.stage.max_positions)
            needed -= self._to_grow(runner.stage, runner.room)
            free += self.budget.held(idle)
        if promised + full > OVERCOMMIT * limit:
            raise Busy(f"KV budget: {full} bytes asked for, {promised} of {OVERCOMMIT} times {limit} are promised")
        if needed > free:
            raise Busy(f"KV budget: {needed} bytes asked for, to begin and grow, {free} of {limit} are free")
        self._evict(free, sessions=1)
        self.budget.reserve(_held_as(key), size)
        self._owed.pop(request.session, None)

    def _let_those_owed_first(self, session: SessionId) -> None:
        now = asyncio.get_running_loop().time()
        self._owed = {owed: debt for owed, debt in self._owed.items() if debt.until > now}
        if debt := self._owed.get(session):
            self._owed[session] = replace(debt, until=min(now + OWED_S, debt.end))
        elif self._owed:
            raise Busy("KV budget: sessions that had to give way come back first")

    # ---- growing, and giving way ------------------------------------------------------------------------

    def make_room(self, runner: StageRunner, end: int) -> bool:
        """See ``peers.runner.MakeRoom``. What truncation left unused goes back, but for a spare block."""
        stage, key = runner.stage, _key_of(runner.stage)
        self.budget.touch(_held_as(key))
        used = max(self._in_blocks(stage.have) + self.executor.kv_block, self._in_blocks(stage.known))
        room = max(min(runner.room, used), self._in_blocks(end))
        if room == runner.room:
            return True
        size = self._size(stage, room)
        if room > runner.room:
            self._mark_idle()
            others = [other for other in self.runners.values() if other.stage.session != stage.session]
            shorter = sorted((other for other in others if self._rank(other) < self._rank(runner)), key=self._rank)
            more = size - self.budget.held(_held_as(key))
            self._evict(more, others=[_key_of(other.stage) for other in shorter])
        try:
            self.budget.reserve(_held_as(key), size)
        except Busy as error:
            self._give_way(key, error)
            return False
        runner.room = room
        return True

    def _rank(self, runner: StageRunner) -> tuple[int, SessionId]:
        """Who comes first in this order gives way first. In whole blocks, since peers see a session at other points."""
        return runner.stage.have // self.executor.kv_block, runner.stage.session

    def _mark_idle(self) -> None:
        now = asyncio.get_running_loop().time()
        for key, runner in self.runners.items():
            if runner.computing:
                self.budget.touch(_held_as(key))
            elif key in self._lingering or now - runner.last_used > self.settings.timeouts.evictable_after_s:
                self.budget.mark_idle(_held_as(key))

    def _evict(self, size_bytes: int, sessions: int = 0, others: Sequence[StageKey] = ()) -> None:
        """Make room, if that can be done: at the cost of idle sessions, then of ``others``."""
        keys = {_held_as(key): key for key in self.runners}
        for held in self.budget.evictable(size_bytes, sessions, [_held_as(key) for key in others]):
            if self.budget.is_idle(held):
                self._give_way(keys[held], Evicted("this stage was idle and gave its memory to another session"))
            else:
                self._give_way(keys[held], Busy("KV budget: this stage gave its memory to a session with more tokens"))

    def _give_way(self, key: StageKey, error: SwarmError) -> None:
        """Free the stage now, and tell its owner why."""
        runner = self.runners[key]
        if isinstance(error, Busy):
            now = asyncio.get_running_loop().time()
            end = now + self.settings.recovery.wait_s  # its owner waits no longer, either
            self._owed[runner.stage.session] = Debt(min(now + OWED_S, end), end)
        runner.owner.report(error, None)
        self.free(key)

    def bound_waiting(self) -> None:
        """A frame or an answer has to wait. Where all that wait take too much memory, the stage with most of it ends:
        one neighbour can fill those of many sessions, which honest ones never do, since they send no more than a window
        ahead, and one owner can leave the answers of many unread."""
        waiting = {key: runner.waiting_bytes for key, runner in self.runners.items()}
        while sum(waiting.values()) > self.most_waiting_bytes:
            worst = max(waiting, key=waiting.__getitem__)
            told = f"{waiting.pop(worst)} bytes of frames and answers wait at this stage, and too many at all"
            self.runners[worst].owner.report(Busy(told), None)
            self.free(worst)

    # ---- memory -----------------------------------------------------------------------------------------

    def _in_blocks(self, positions: int) -> int:
        block = self.executor.kv_block
        return -(-positions // block) * block

    def _size(self, stage: Stage | OpenRequest, positions: int) -> int:
        """Bytes of KV cache and log."""
        logged = self._logged_bytes(stage) if stage.layers.end < self.executor.profile.num_layers else 0
        cached = self.executor.cache_bytes(stage.layers, positions, stage.kv)
        return cached + logged * self._in_blocks(positions)

    def _to_grow(self, stage: Stage | OpenRequest, room: int) -> int:
        """Bytes of its next block."""
        return self._size(stage, 1) if room < stage.max_positions else 0

    def _logged_bytes(self, stage: Stage | OpenRequest) -> int:
        profile = self.executor.profile
        return row_bytes(encoding_of(stage.output_wire, profile.dtype), profile.hidden_size)

    def kv_tokens_free(self) -> int:
        """Tokens that a session might have, over all layers of this peer; none where ``max_cached_sessions`` are at
        work."""
        self._mark_idle()
        if self.budget.sessions - len(self.budget.idle) >= self.budget.max_sessions:
            return 0
        block, profile = self.executor.kv_block, self.executor.profile
        one = self.executor.cache_bytes(self.executor.layers, block) + block * row_bytes(
            profile.dtype, profile.hidden_size
        )
        promised = sum(self._size(runner.stage, runner.stage.max_positions) for runner in self.runners.values())
        free = min(self.budget.free_bytes, OVERCOMMIT * self.budget.limit_bytes - promised)
        return max(0, free // one * block)

    # ---- going ------------------------------------------------------------------------------------------

    def attach(self, key: StageKey) -> None:
        """The stage's owner is here, or back."""
        timer = self._lingering.pop(key, None)
        if timer is not None:
            timer.cancel()
        self.budget.touch(_held_as(key))

    def linger(self, key: StageKey) -> None:
        """The owner's stream broke: free the stage unless it comes back within ``timeouts.owner_grace_s``."""
        if key not in self.runners or key in self._lingering:
            return
        loop = asyncio.get_running_loop()
        self._lingering[key] = loop.call_later(self.settings.timeouts.owner_grace_s, self.free, key)

    def free(self, key: StageKey, prefix: bytes = b"") -> None:
        """Everything that the stage holds goes back; twice is harmless.

        ``prefix`` names the text; what was computed of it is kept for its owner as long as there is room.
        """
        runner = self.runners.pop(key, None)
        self.budget.release(_held_as(key))
        timer = self._lingering.pop(key, None)
        if timer is not None:
            timer.cancel()
        if not self.runners:
            self._emptied.set()
        if runner is not None:
            runner.close()
            stage = runner.stage
            self.executor.forget(stage.cache)
            now = asyncio.get_running_loop().time()
            try:
                self.prefixes.keep(stage, prefix, lambda positions: self._size(stage, positions), now)
            finally:
                stage.release()

    def free_all(self) -> None:
        self.prefixes.close()
        for key in list(self.runners):
            self.free(key)

    async def sweep(self) -> None:
        """For ever: free stages that have not been used for ``timeouts.session_idle_s``."""
        idle_s = self.settings.timeouts.session_idle_s
        with Standstills() as standstills:
            while True:
                await asyncio.sleep(idle_s / 10)
                # While this process stood still nobody could use them: what was said meanwhile is still to be read.
                unused_since = asyncio.get_running_loop().time() - idle_s - standstills.take()
                self.prefixes.expire(unused_since)
                # in a list: what a loop named last, it would hold until the next one
                for key in [key for key, runner in self.runners.items() if runner.last_used < unused_since]:
                    logger.info("session %s was idle for %.0f s and is freed", key[0][:8], idle_s)
                    self.free(key)


def _key_of(stage: Stage) -> StageKey:
    return stage.session, stage.layers.start


def _held_as(key: StageKey) -> SessionId:
    return SessionId(f"{key[0]}:{key[1]}")
