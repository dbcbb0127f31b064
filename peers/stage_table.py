"""The stages of a peer: admitted within the KV budget, freed when their owner is done, gone, or idle too long."""

from __future__ import annotations

import asyncio
import logging

from peers.checkpoints import CheckpointLog
from peers.executor import Executor
from peers.kv_cache import KVBudget
from peers.prefix_cache import PrefixCache
from peers.runner import Outside, StageRunner
from peers.stage import OpenRequest, Stage
from swarm.config import Settings
from swarm.types import PeerId, SessionId
from swarm.wire import encoding_of, row_bytes

logger = logging.getLogger(__name__)

StageKey = tuple[SessionId, int]
"""Session and first layer: one peer may run two stages of one session."""


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
        self.prefixes = PrefixCache(self.budget, settings.peer.max_cached_sessions if settings.peer.prefix_cache else 0)
        self.runners: dict[StageKey, StageRunner] = {}
        self._tasks = tasks
        self._lingering: dict[StageKey, asyncio.TimerHandle] = {}
        self._emptied = asyncio.Event()
        self._emptied.set()

    async def empty(self) -> None:
        """Wait until there is no stage left."""
        await self._emptied.wait()

    def of_session(self, session: str) -> list[StageRunner]:
        return [runner for (held, _), runner in self.runners.items() if held == session]

    def admit(self, owner: PeerId, request: OpenRequest, outside: Outside) -> StageRunner:
        """Reserve memory, build the stage, with what an earlier one left for it; raises :class:`Busy`."""
        profile, key = self.executor.profile, (request.session, request.layers.start)
        last = request.layers.end == profile.num_layers
        logged_bytes = row_bytes(encoding_of(request.output_wire, profile.dtype), profile.hidden_size)
        size = self.executor.cache_bytes(request.layers, request.max_positions)
        if not last:
            size += CheckpointLog.bytes_needed(logged_bytes, request.max_positions)
        found = self.prefixes.find(owner, request.layers, request.output_wire, request.prefix)
        self._make_room(size)
        self.budget.reserve(_held_as(key), size)
        try:
            first = request.layers.start == 0
            if found is not None and self.prefixes.holds(found[0]):
                kept, tokens = found
                cache = self.executor.copy_cache(kept.cache, tokens, request.max_positions)
                log = kept.log.copy(tokens, request.max_positions) if kept.log is not None else None
                stage = Stage(request, owner, first=first, last=last, cache=cache, log=log)
                stage.inputs.extend(kept.inputs[: stage.have])
            else:
                log = None if last else CheckpointLog(logged_bytes, request.max_positions)
                cache = self.executor.new_cache(request.layers, request.max_positions)
                stage = Stage(request, owner, first=first, last=last, cache=cache, log=log)
        except BaseException:
            self.budget.release(_held_as(key))
            raise
        runner = StageRunner(stage, self.executor, outside, self.settings, self._tasks)
        self.runners[key] = runner
        self._emptied.clear()
        return runner

    def _make_room(self, size_bytes: int) -> None:
        now = asyncio.get_running_loop().time()
        for key, runner in self.runners.items():
            if now - runner.last_used > self.settings.timeouts.evictable_after_s and not runner.computing:
                self.budget.mark_idle(_held_as(key))
        for held in self.budget.evictable(size_bytes, 1):
            session, _, layer = held.rpartition(":")
            logger.info("session %s was idle and is evicted", session[:8])
            self.free((SessionId(session), int(layer)))

    def attach(self, key: StageKey) -> None:
        """The stage's owner is here, or back."""
        timer = self._lingering.pop(key, None)
        if timer is not None:
            timer.cancel()
        self.budget.touch(_held_as(key))

    def linger(self, key: StageKey) -> None:
        """The owner's stream broke: free the stage unless it comes back within ``timeouts.owner_grace_s``."""
        self.budget.mark_idle(_held_as(key))
        loop = asyncio.get_running_loop()
        self._lingering[key] = loop.call_later(self.settings.timeouts.owner_grace_s, self.free, key)

    def free(self, key: StageKey, prefix: bytes = b"") -> None:
        """Everything that the stage holds goes back; twice is harmless.

        ``prefix`` names the text; what was computed of it is kept for its owner as long as there is room.
        """
        runner = self.runners.pop(key, None)
        size_bytes = self.budget.release(_held_as(key))
        if runner is not None:
            runner.close()
            self.prefixes.keep(runner.stage, prefix, size_bytes, asyncio.get_running_loop().time())
            runner.stage.release()
        timer = self._lingering.pop(key, None)
        if timer is not None:
            timer.cancel()
        if not self.runners:
            self._emptied.set()

    def free_all(self) -> None:
        self.prefixes.close()
        for key in list(self.runners):
            self.free(key)

    async def sweep(self) -> None:
        """For ever: free stages that have not been used for ``timeouts.session_idle_s``."""
        idle_s = self.settings.timeouts.session_idle_s
        while True:
            await asyncio.sleep(idle_s / 10)
            now = asyncio.get_running_loop().time()
            self.prefixes.expire(now - idle_s)
            for key, runner in list(self.runners.items()):
                if now - runner.last_used > idle_s:
                    logger.info("session %s was idle for %.0f s and is freed", key[0][:8], idle_s)
                    self.free(key)

    def kv_tokens_free(self) -> int:
        """Tokens that would still fit, over all layers of this peer."""
        profile, layers = self.executor.profile, self.executor.layers
        one = self.executor.cache_bytes(layers, 1) + row_bytes(profile.dtype, profile.hidden_size)
        return self.budget.free_bytes // one


def _held_as(key: StageKey) -> SessionId:
    return SessionId(f"{key[0]}:{key[1]}")
