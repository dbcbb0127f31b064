"""Figures as a picture: bars, grouped by section and unit, in plain SVG. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from swarm.bench.sections import Figure

WIDTH, LABELS, BAR, GAP, HEAD = 960, 430, 16, 6, 34
"""Pixels: of the picture, of the names at its left, and the heights of a bar, of what is between two, of a heading."""
COLOURS = {"tokens/s": "#2a7f9e", "ms": "#c8793a", "x": "#5b8c3e", "MiB": "#7a5c99", "": "#777777"}


def svg(figures: Sequence[Figure]) -> str:
    """A document of its own. What has section and unit in common shares a scale, wherever it is among ``figures``."""
    parts: list[str] = []
    y = 0
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        groups.setdefault((figure.section, figure.unit), []).append(figure)
    for (section, unit), bars in groups.items():
        y += HEAD
        parts.append(f'<text x="8" y="{y - 8}" class="head">{escape(f"{section}, {unit}" if unit else section)}</text>')
        most = max(figure.value for figure in bars) or 1.0
        for figure in bars:
            length = max(0.0, figure.value) / most * (WIDTH - LABELS - 90)
            middle = y + BAR - 4
            parts.append(f'<text x="{LABELS - 8}" y="{middle}" text-anchor="end">{escape(figure.name)}</text>')
            colour = COLOURS.get(unit, COLOURS[""])
            parts.append(f'<rect x="{LABELS}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>')
            parts.append(f'<text x="{LABELS + length + 6:.1f}" y="{middle}">{figure.value:.4g}</text>')
            y += BAR + GAP
    style = "text{font:12px sans-serif;fill:#222}.head{font-weight:bold;font-size:14px}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + GAP}" '
        f'viewBox="0 0 {WIDTH} {y + GAP}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
