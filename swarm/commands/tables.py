"""Tables and colours for a terminal. Pure, but for the question whether stdout is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import typer


@dataclass(frozen=True, slots=True)
class Cell:
    """Text with a colour, which counts for nothing in the width."""

    text: str
    colour: str | None = None

    def __str__(self) -> str:
        return self.text


def colours_wanted() -> bool:
    """On a terminal only, and not where NO_COLOR (no-color.org) is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, colour: str | None, *, coloured: bool) -> str:
    return typer.style(text, fg=colour) if coloured and colour else text


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str | Cell]],
    *,
    right: Collection[str] = (),
    coloured: bool = False,
) -> list[str]:
    """Lines with columns as wide as their widest cell; those named in ``right`` are aligned to the right."""
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    widths = [
        max(len(cell.text) for cell in column) for column in zip([Cell(name) for name in head], *cells, strict=True)
    ]

    def line(row: Sequence[Cell]) -> str:
        parts = []
        for name, cell, width in zip(head, row, widths, strict=True):
            padding = " " * (width - len(cell.text))
            text = paint(cell.text, cell.colour, coloured=coloured)
            parts.append(padding + text if name in right else text + padding)
        return "  ".join(parts).rstrip()

    return [line([Cell(name) for name in head]), *(line(row) for row in cells)]
