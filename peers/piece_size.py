"""How many rows of a prompt are run between two decode steps of other sessions. Pure.

What a token waits for is time, not rows: sixteen rows take twice as long as one from float32 matrices on a CPU, six
times as long from 4-bit ones, and no longer at all on a card. So the size follows what was measured.

A piece is begun when a token has left. While that is at the other stages there is time for it, and two decode steps
longer at each stage make a token three times as late at most: in a chain of n equal stages a piece may take as long as
n + 1 steps.
"""

from __future__ import annotations

from typing import Final

LEAST_ROWS: Final = 8
"""With fewer, kernels read weights almost as often as for one row, and prompts take for ever."""
MOST_ROWS: Final = 128
HOP_S: Final = 0.001
"""A decode step's way to the next stage takes so long at least."""
SMOOTHING: Final = 0.2
"""Weight of the newest pass in what one takes; more before there were many."""
LEAST_SEEN: Final = 4
"""So many pieces of a size tell how long it takes."""


class PieceSize:
    """Starts with the rows that the settings say. ``stages``: so many like this one a token passes."""

    def __init__(self, rows: int, stages: float = 1.0) -> None:
        self.rows = rows
        self._allowed_steps = stages + 1
        self._step_s = 0.0
        """What a pass of decode steps takes; 0: not known."""
        self._piece_s = 0.0
        """What a piece of this size takes, of ``_seen`` of them."""
        self._seen = 0

    def note(self, steps: int, pieces: int, seconds: float) -> None:
        """A pass of so many decode steps and whole pieces took so long."""
        if not pieces:
            self._step_s += (SMOOTHING if self._step_s else 1.0) * (seconds - self._step_s)
            return
        if not self._step_s:
            return
        piece_s = max(0.0, seconds - (self._step_s if steps else 0.0)) / pieces
        self._seen += 1
        self._piece_s += max(SMOOTHING, 1 / self._seen) * (piece_s - self._piece_s)
        if self._seen < LEAST_SEEN:
            return
        allowed_s = self._allowed_steps * (self._step_s + HOP_S)
        if self._piece_s > allowed_s and self.rows >= 2 * LEAST_ROWS:
            self._change(self.rows // 2)
        elif 2 * self._piece_s <= allowed_s and 2 * self.rows <= MOST_ROWS:  # twice the rows take twice as long at most
            self._change(2 * self.rows)

    def _change(self, rows: int) -> None:
        self.rows, self._seen, self._piece_s = rows, 0, 0.0
