"""The byte budget that admits sessions and lets them grow. Pure accounting, which imports no torch, so that it can be
tested, and reasoned about, without a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from swarm.errors import Busy, ConfigError
from swarm.types import SessionId


class KVBudget:
    """Who may hold how many bytes. Sessions are kept in order of use, least recently used first.

    A full budget refuses a newcomer with :class:`Busy`; whether idle sessions give way first is the caller's
    decision (:meth:`evictable`), because their owners have to be told. What is only kept for later (:meth:`keep`)
    counts as free: it goes as soon as a session needs the room.
    """

    def __init__(self, limit_bytes: int, max_sessions: int, policy: str = "lru") -> None:
        if policy != "lru":
            raise ConfigError(f"unknown cache_eviction_policy {policy!r}; known: lru")
        if limit_bytes < 0 or max_sessions < 0:
            raise ConfigError("a KV budget can't be negative")
        self.limit_bytes = limit_bytes
        self.max_sessions = max_sessions
        self._held: OrderedDict[SessionId, int] = OrderedDict()
        self._idle: set[SessionId] = set()
        self._used_bytes = 0
        self._kept: OrderedDict[str, tuple[int, Callable[[], object]]] = OrderedDict()
        self._kept_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Reserved for sessions."""
        return self._used_bytes

    @property
    def kept_bytes(self) -> int:
        """Kept for later, in what sessions leave."""
        return self._kept_bytes

    @property
    def free_bytes(self) -> int:
        return self.limit_bytes - self._used_bytes

    @property
    def sessions(self) -> int:
        return len(self._held)

    def held(self, session: SessionId) -> int:
        """Bytes that the session holds; 0 if it holds none."""
        return self._held.get(session, 0)

    def reserve(self, session: SessionId, size_bytes: int) -> None:
        """What the session holds becomes ``size_bytes``: it comes, grows, or gives a part back.

        Raises :class:`Busy` and changes nothing.
        """
        if size_bytes < 0:
            raise ValueError(f"can't reserve {size_bytes} bytes")
        if session not in self._held and len(self._held) >= self.max_sessions:
            raise Busy(f"max_cached_sessions: {len(self._held)} of {self.max_sessions} sessions are open")
        more_bytes = size_bytes - self.held(session)
        if more_bytes > max(0, self.free_bytes):
            raise Busy(f"KV budget: {more_bytes} bytes asked for, {self.free_bytes} of {self.limit_bytes} are free")
        self._held[session] = size_bytes
        self._used_bytes += more_bytes
        self.touch(session)
        self._make_way()

    def release(self, session: SessionId) -> int:
        """Gives everything back and returns how much it was; twice is harmless."""
        size_bytes = self._held.pop(session, 0)
        self._idle.discard(session)
        self._used_bytes -= size_bytes
        return size_bytes

    def touch(self, session: SessionId) -> None:
        """The session was used just now: it becomes the last to be evicted, and is idle no longer."""
        if session in self._held:
            self._held.move_to_end(session)
            self._idle.discard(session)

    def keep(self, name: str, size_bytes: int, dropped: Callable[[], object]) -> bool:
        """Hold bytes until they are needed; ``dropped`` is called then. ``False``: sessions need them now."""
        if size_bytes > self.free_bytes:
            return False
        self._kept[name] = size_bytes, dropped
        self._kept_bytes += size_bytes
        self._make_way()
        return True

    def forget(self, name: str) -> None:
        """What was kept is no more; twice is harmless."""
        self._kept_bytes -= self._kept.pop(name, (0, None))[0]

    def touch_kept(self, name: str) -> None:
        """It was used just now: it becomes the last to go."""
        self._kept.move_to_end(name)

    def _make_way(self) -> None:
        while self._used_bytes + self._kept_bytes > self.limit_bytes:
            _, (size_bytes, dropped) = self._kept.popitem(last=False)
            self._kept_bytes -= size_bytes
            dropped()

    def mark_idle(self, session: SessionId) -> None:
        """The session waits for its owner; from now on it may be evicted."""
        if session in self._held:
            self._idle.add(session)

    def is_idle(self, session: SessionId) -> bool:
        return session in self._idle

    @property
    def idle(self) -> list[SessionId]:
        """Sessions that may be evicted, the one that was used longest ago first."""
        return [session for session in self._held if session in self._idle]

    def evictable(self, size_bytes: int, sessions: int = 0, others: Sequence[SessionId] = ()) -> list[SessionId]:
        """Whose release makes room for ``size_bytes`` and ``sessions`` more: idle sessions, oldest first, then
        ``others`` in their order, and no more of them than it takes.

        An empty list means either that there is room already or that releasing all of them would not do;
        :meth:`reserve` tells the two apart.
        """
        chosen: list[SessionId] = []
        free_bytes = self.free_bytes
        free_sessions = self.max_sessions - len(self._held)
        for session in [*self.idle, *(other for other in others if other not in self._idle)]:
            if free_bytes >= size_bytes and free_sessions >= sessions:
                return chosen
            chosen.append(session)
            free_bytes += self._held[session]
            free_sessions += 1
        return chosen if free_bytes >= size_bytes and free_sessions >= sessions else []
