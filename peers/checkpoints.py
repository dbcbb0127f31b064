"""The checkpoint log: what a stage has put out, kept so that a new successor can be replayed.

Rows are the very bytes that are sent, in the stage's wire, so a replay repeats them and the log needs no torch. The
rows of a session lie in one buffer, which is as long as they are. Those at its front can be given back one by one: a
bytearray does not move the others each time.
"""

from __future__ import annotations

from swarm.errors import Internal


class CheckpointLog:
    """Rows ``start .. end - 1``, one for each position, each of ``row_bytes`` bytes."""

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.start = 0
        self.end = 0
        self._buffer = bytearray()

    def append(self, position: int, rows: bytes) -> None:
        """Add whole rows at ``position``, which must be the end of the log."""
        count, rest = divmod(len(rows), self.row_bytes)
        if position != self.end or rest:
            raise Internal(f"{len(rows)} bytes at {position} don't continue a log of {self.start}:{self.end}")
        self._buffer += rows
        self.end += count

    def read(self, start: int, end: int) -> bytes:
        """Rows ``start .. end - 1``, which must be in the log."""
        if not self.start <= start <= end <= self.end:
            raise Internal(f"rows {start}:{end} are not in a log of {self.start}:{self.end}")
        return bytes(memoryview(self._buffer)[self._offset(start) : self._offset(end)])

    def copy(self, end: int) -> CheckpointLog:
        """A log that has this one's rows before ``end``, as far as they are here."""
        copied = CheckpointLog(self.row_bytes)
        copied.start, copied.end = min(self.start, end), end
        copied._buffer += memoryview(self._buffer)[: self._offset(end)]
        return copied

    def truncate(self, end: int) -> None:
        """Forget rows at ``end`` and after."""
        self.end = min(self.end, end)
        del self._buffer[self._offset(self.end) :]
        self.start = min(self.start, self.end)

    def forget_before(self, start: int) -> None:
        """Without checkpoints: rows that every target has are not kept."""
        start = max(self.start, min(start, self.end))
        del self._buffer[: self._offset(start)]
        self.start = start

    def _offset(self, position: int) -> int:
        """Where its row begins in the buffer; 0 for rows that are forgotten."""
        return max(0, position - self.start) * self.row_bytes
