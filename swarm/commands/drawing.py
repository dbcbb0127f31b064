"""Layers as a picture for a terminal: one line a peer, and how many peers hold each layer. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.types import LayerRange

HIGHEST_DIGIT = 9


@dataclass(frozen=True, slots=True)
class Pen:
    held: str = "█"
    leaving: str = "▒"
    absent: str = "·"


UNICODE = Pen()
ASCII = Pen("#", "=", ".")


def pen_for(encoding: str | None) -> Pen:
    try:
        (UNICODE.held + UNICODE.leaving + UNICODE.absent).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def cells(num_layers: int, width: int) -> list[LayerRange]:
    """The layers behind each character: one, or of a deep model several."""
    width = min(num_layers, width)
    bounds = [num_layers * column // width for column in range(width + 1)]
    return [LayerRange(start, end) for start, end in itertools.pairwise(bounds)]


def bar(layers: LayerRange, columns: Sequence[LayerRange], pen: Pen, *, serving: bool = True) -> str:
    """A column that is held in part counts as held."""
    mark = pen.held if serving else pen.leaving
    return "".join(mark if layers.start < c.end and c.start < layers.end else pen.absent for c in columns)


def counts_line(counts: Sequence[int], columns: Sequence[LayerRange]) -> str:
    """The least number of peers in each column: 0 to 9, + for more."""
    least = [min(counts[column.start : column.end]) for column in columns]
    return "".join(str(count) if count <= HIGHEST_DIGIT else "+" for count in least)


def ruler(columns: Sequence[LayerRange], every: int = 10) -> str:
    """Layer numbers above their columns."""
    line = ""
    for position in range(0, len(columns), every):
        number = str(columns[position].start)
        if position + len(number) <= len(columns):
            line = line.ljust(position) + number
    return line.ljust(len(columns))
