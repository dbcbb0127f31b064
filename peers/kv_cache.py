"""The KV cache of one session for a stage's layers, in blocks that come as positions are written.

Blocks as in vLLM's paged attention (Kwon et al., SOSP 2023), but one holds :data:`BLOCK` positions of all layers of the
stage: a session grows by one allocation, and what attention reads at a time stays adjacent.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from swarm.errors import BadRequest, Gap, TooLong
from swarm.kv import MODEL, SCALE_BYTES, row_bytes
from swarm.types import LayerRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

BLOCK: Final = 64
"""Positions in a block."""
FLOAT32, INT8, BFLOAT16, UNKNOWN = 0, 1, 2, -1
"""How rows are kept, as ``attention_kernel.c`` calls it."""


def blocks_for(positions: int, block: int = BLOCK) -> int:
    """How many blocks hold so many positions."""
    return -(-positions // block)


class SequenceCache:
    """Keys and values of one session: blocks ``[layers, 2, kv_heads, BLOCK, row]``, each one allocation.

    A row is ``head_dim`` numbers of the model's dtype, or as ``swarm.kv`` has it for ``int8``. Keys in float32 and in
    bfloat16 on a CPU are ``[head_dim, BLOCK]``, as :mod:`peers.attention_kernel` reads them. Blocks of positions that
    another cache has as well, see :meth:`copy`, are shared until one of the two writes there.
    """

    __slots__ = (
        "_addresses",
        "_blocks",
        "_keys",
        "_shape",
        "_shared",
        "_turned",
        "_values",
        "capacity",
        "device",
        "dtype",
        "kind",
        "layers",
        "length",
        "row_kind",
    )

    def __init__(
        self,
        layers: LayerRange,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kind: str = MODEL,
    ) -> None:
        """Raises :class:`BadRequest` for heads that can't be kept as ``kind`` says."""
        import torch

        if kind == "int8" and head_dim % SCALE_BYTES:
            raise BadRequest(
                f"heads of {head_dim} numbers can't be kept in int8, {SCALE_BYTES} would have to divide it"
            )
        self.layers = layers
        self.capacity = capacity
        """Most positions that there may be."""
        self.kind = kind
        self.length = 0
        """Positions that hold the keys and values of committed inputs; what lies behind is scratch."""
        self.dtype, self.device = dtype, torch.device(device)
        self._shape = (len(layers), 2, kv_heads, BLOCK, head_dim)
        kinds = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16} if self.device.type == "cpu" else {}
        self.row_kind = kinds.get(dtype, UNKNOWN) if kind == MODEL else INT8
        self._turned = self.row_kind in (FLOAT32, BFLOAT16)
        self._blocks: list[torch.Tensor] = []
        # Indexing a tensor costs microseconds, at every block of every layer of every step: done once, when it comes.
        self._keys: list[tuple[torch.Tensor, ...]] = []
        self._values: list[tuple[torch.Tensor, ...]] = []
        """Of each block and layer, ``[kv_heads, BLOCK, row]``."""
        self._addresses: ctypes.Array[ctypes.c_int64] | torch.Tensor = (ctypes.c_int64 * blocks_for(capacity))()
        if self.device.type == "cuda":
            self._addresses = torch.zeros(blocks_for(capacity), dtype=torch.int64, device=self.device)
        self._shared = 0
        """So many of the first blocks may be another cache's as well."""

    @staticmethod
    def bytes_needed(
        layers: LayerRange, kv_heads: int, head_dim: int, positions: int, item_bytes: int, kind: str = MODEL
    ) -> int:
        """What ``positions`` take, in whole blocks; ``item_bytes`` is the size of one number of the model's dtype."""
        rows = len(layers) * 2 * kv_heads * BLOCK * blocks_for(positions)
        return rows * row_bytes(kind, head_dim, item_bytes)

    @property
    def size_bytes(self) -> int:
        """Of the blocks that are there."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def blocks_address(self) -> int:
        """Of a table of the blocks' addresses, where the blocks are, for as long as the cache lives."""
        table = self._addresses
        return ctypes.addressof(table) if isinstance(table, ctypes.Array) else table.data_ptr()

    def grow(self, start: int, end: int) -> None:
        """Have blocks for positions up to ``end``, of which those from ``start`` on are this cache's to write."""
        import torch

        layers, two, kv_heads, block, head_dim = self._shape
        for index in range(start // block, self._shared):
            self._put(index, self._blocks[index].clone())
        self._shared = min(self._shared, start // block)
        while len(self._blocks) < blocks_for(end):
            if self.kind == MODEL:
                fresh = torch.empty(self._shape, dtype=self.dtype, device=self.device)
            else:
                shape = (layers, two, kv_heads, block, head_dim + SCALE_BYTES)
                fresh = torch.empty(shape, dtype=torch.int8, device=self.device)
            self._put(len(self._blocks), fresh)

    def _put(self, index: int, block: torch.Tensor) -> None:
        self._blocks[index : index + 1] = [block]
        keys, values = block.unbind(1)
        if self._turned:
            keys = keys.view(*keys.shape[:2], keys.shape[3], keys.shape[2]).transpose(2, 3)
        self._keys[index : index + 1] = [keys.unbind(0)]
        self._values[index : index + 1] = [values.unbind(0)]
        self._addresses[index] = block.data_ptr()

    def copy(self, length: int, capacity: int) -> SequenceCache:
        """A cache for ``capacity`` positions that begins with the first ``length`` of this one.

        It shares full blocks with this one; neither sees what the other writes.
        """
        _, _, kv_heads, block, head_dim = self._shape
        copied = SequenceCache(self.layers, kv_heads, head_dim, capacity, self.dtype, self.device, self.kind)
        full, rest = divmod(length, block)
        for index in range(full):
            copied._put(index, self._blocks[index])
        copied._shared, self._shared = full, max(full, self._shared)
        if rest:
            copied._put(full, self._blocks[full].clone())
        copied.length = length
        return copied

    def truncate(self, length: int) -> None:
        """Forgets positions ``length`` and later; raises :class:`Gap` if the cache is shorter than that.

        Blocks that are left empty go, but one: guesses that come and go at a block's end must not cost one each.
        """
        if length < 0 or length > self.length:
            raise Gap(f"the KV cache ends at {self.length}, it can't be truncated to {length}")
        self.length = length
        kept = blocks_for(length) + 1
        for index in range(kept, len(self._blocks)):
            self._addresses[index] = 0
        del self._blocks[kept:], self._keys[kept:], self._values[kept:]
        self._shared = min(self._shared, kept)

    def check_room(self, start: int, count: int) -> None:
        """Raises :class:`Gap` or :class:`TooLong` if ``count`` positions can't be written at ``start``."""
        if start < 0 or start > self.length:
            raise Gap(f"the frame starts at {start}, the KV cache ends at {self.length}")
        if start + count > self.capacity:
            raise TooLong(f"{start + count} positions exceed the {self.capacity} that the session was opened for")

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores ``[kv_heads, count, head_dim]`` at positions ``start ..``, for which :meth:`grow` made room;
        :attr:`length` is the caller's to move."""
        layer -= self.layers.start
        if self.kind == "int8":
            keys, values = _rounded(keys), _rounded(values)
        written, count, block = 0, keys.shape[1], self._shape[3]
        while written < count:
            index, first = divmod(start + written, block)
            fitting = min(block - first, count - written)
            for to, rows in ((self._keys, keys), (self._values, values)):
                to[index][layer][:, first : first + fitting] = rows[:, written : written + fitting]
            written += fitting


class DenseRows:
    """Positions ``first .. end - 1`` of a cache with the positions adjacent, in memory that all layers share."""

    __slots__ = ("_blocks", "_cache", "_dense", "_gathered", "_rows", "_scales")

    def __init__(self, cache: SequenceCache, first: int, end: int) -> None:
        import torch

        _, _, kv_heads, block, head_dim = cache._shape
        start = first // block
        self._cache, self._blocks = cache, range(start, blocks_for(end))
        self._rows = slice(first - start * block, end - start * block)
        positions = len(self._blocks) * block
        self._gathered: torch.Tensor | None = None
        self._dense: torch.Tensor | None = None
        if len(self._blocks) > 1:
            row, dtype = cache._blocks[0].shape[-1], cache._blocks[0].dtype
            self._gathered = torch.empty((2, kv_heads, positions, row), dtype=dtype, device=cache.device)
        if cache.kind == "int8":
            self._dense = torch.empty((2, kv_heads, positions, head_dim), dtype=cache.dtype, device=cache.device)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[kv_heads, positions, head_dim]`` of a layer, by its number in the model, until the next
        call."""
        layer -= self._cache.layers.start
        return self._gather(self._cache._keys, layer, 0), self._gather(self._cache._values, layer, 1)

    def _gather(self, blocks: Sequence[Sequence[torch.Tensor]], layer: int, part: int) -> torch.Tensor:
        import torch

        rows = blocks[self._blocks[0]][layer]
        if self._gathered is not None:
            rows = torch.cat([blocks[index][layer] for index in self._blocks], dim=1, out=self._gathered[part])
        if self._dense is not None:
            codes, scales = _parts(rows)
            rows = torch.mul(codes, scales, out=self._dense[part])
        return rows[:, self._rows]


def _parts(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[..., head_dim]`` and scales ``[..., 1]`` of rows in int8."""
    import torch

    return rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].view(torch.float32)


def _rounded(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``[..., head_dim]`` in int8, see ``swarm.kv``."""
    import torch

    rounded = torch.empty((*rows.shape[:-1], rows.shape[-1] + SCALE_BYTES), dtype=torch.int8, device=rows.device)
    codes, scales = _parts(rounded)
    rows = rows.float()
    scales.copy_(rows.abs().amax(-1, keepdim=True) / 127)
    codes.copy_((rows / torch.where(scales > 0, scales, 1.0)).round())
    return rounded
