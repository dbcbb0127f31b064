"""KV memory: the cache of one session for a stage's layers, and the byte budget that admits sessions.

:class:`KVBudget` is pure accounting and imports no torch, so that admission can be tested, and reasoned about,
without a model. :class:`SequenceCache` holds the tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from swarm.errors import Busy, ConfigError, Gap, TooLong
from swarm.types import LayerRange, SessionId

if TYPE_CHECKING:
    import torch


class SequenceCache:
    """Keys and values of one session for one layer range: ``[layers, 2, kv_heads, capacity, head_dim]``.

    One allocation per stage. On a CPU the pages are only committed when positions are written, so a session that
    reserves a long context and stays short costs little physical memory. Keys of one layer are ``[kv_heads,
    positions, head_dim]`` with the positions adjacent, which is what attention reads as a slice, without a copy.
    """

    __slots__ = ("_data", "_keys", "_values", "capacity", "layers", "length", "size_bytes")

    def __init__(
        self,
        layers: LayerRange,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        import torch

        self.layers = layers
        self.capacity = capacity
        self.length = 0
        """Positions that hold the keys and values of committed inputs; what lies behind is scratch."""
        self.size_bytes = self.bytes_needed(layers, kv_heads, head_dim, capacity, dtype.itemsize)
        self._data = torch.empty((len(layers), 2, kv_heads, capacity, head_dim), dtype=dtype, device=device)
        # Indexing a tensor costs microseconds, at every layer of every session of every step: done once, here.
        self._keys = list(self._data[:, 0].unbind(0))
        self._values = list(self._data[:, 1].unbind(0))

    @staticmethod
    def bytes_needed(layers: LayerRange, kv_heads: int, head_dim: int, capacity: int, item_bytes: int) -> int:
        """What a cache of this shape takes; ``item_bytes`` is the size of one element of its dtype."""
        return len(layers) * 2 * kv_heads * capacity * head_dim * item_bytes

    @property
    def base_address(self) -> int:
        """Where layer 0 of the model would begin, if this cache had it."""
        _, two, kv_heads, capacity, head_dim = self._data.shape
        layer_bytes = two * kv_heads * capacity * head_dim * self._data.itemsize
        return self._data.data_ptr() - self.layers.start * layer_bytes

    def copy(self, length: int, capacity: int) -> SequenceCache:
        """A cache for ``capacity`` positions that begins with the first ``length`` of this one."""
        _, _, kv_heads, _, head_dim = self._data.shape
        copied = SequenceCache(self.layers, kv_heads, head_dim, capacity, self._data.dtype, self._data.device)
        copied._data[:, :, :, :length] = self._data[:, :, :, :length]
        copied.length = length
        return copied

    def truncate(self, length: int) -> None:
        """Forgets positions ``length`` and later; raises :class:`Gap` if the cache is shorter than that."""
        if length < 0 or length > self.length:
            raise Gap(f"the KV cache ends at {self.length}, it can't be truncated to {length}")
        self.length = length

    def check_room(self, start: int, count: int) -> None:
        """Raises :class:`Gap` or :class:`TooLong` if ``count`` positions can't be written at ``start``."""
        if start < 0 or start > self.length:
            raise Gap(f"the frame starts at {start}, the KV cache ends at {self.length}")
        if start + count > self.capacity:
            raise TooLong(f"{start + count} positions exceed the {self.capacity} that the session reserved")

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[kv_heads, capacity, head_dim]`` of a layer, by its number in the model."""
        index = layer - self.layers.start
        return self._keys[index], self._values[index]

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores ``[kv_heads, count, head_dim]`` at positions ``start ..``; :attr:`length` is the caller's to move."""
        end = start + keys.shape[1]
        own_keys, own_values = self.layer(layer)
        own_keys[:, start:end] = keys
        own_values[:, start:end] = values


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
        """Adds to what the session holds (its checkpoint log grows); raises :class:`Busy` and changes nothing."""
        if size_bytes < 0:
            raise ValueError(f"can't reserve {size_bytes} bytes")
        if session not in self._held and len(self._held) >= self.max_sessions:
            raise Busy(f"max_cached_sessions: {len(self._held)} of {self.max_sessions} sessions are open")
        if self._used_bytes + size_bytes > self.limit_bytes:
            raise Busy(f"KV budget: {size_bytes} bytes asked for, {self.free_bytes} of {self.limit_bytes} are free")
        self._held[session] = self._held.get(session, 0) + size_bytes
        self._used_bytes += size_bytes
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

    def evictable(self, size_bytes: int, sessions: int = 0) -> list[SessionId]:
        """The idle sessions, oldest first, whose release makes room for ``size_bytes`` and ``sessions`` more.

        An empty list means either that there is room already or that evicting every idle session would not do;
        :meth:`reserve` tells the two apart.
        """
        chosen: list[SessionId] = []
        free_bytes = self.free_bytes
        free_sessions = self.max_sessions - len(self._held)
        for session, held in self._held.items():
            if free_bytes >= size_bytes and free_sessions >= sessions:
                return chosen
            if session in self._idle:
                chosen.append(session)
                free_bytes += held
                free_sessions += 1
        return chosen if free_bytes >= size_bytes and free_sessions >= sessions else []
